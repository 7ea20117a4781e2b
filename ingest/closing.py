"""How a run is closed, whoever wrote its edges: `INFLUENCES` are derived from them. Light: no model is needed for it."""

import polars as pl

from ..errors import UserError
from ..queries import runs
from ..queries.store import GraphStore


class NothingToDo(UserError):
    """No sequence was left to run on."""


def close_run(store: GraphStore, run: str, edges_per_block: int = runs.EDGES_PER_BLOCK) -> int:
    """Derive `INFLUENCES` from the run's committed edges; closes the run if all its planned sequences are done.

    Returns the number of aggregated edges.

    Positions are summed within each sequence first; mean and variance (population) are over all done sequences, an
    absent edge counting 0. Edges that fell under the threshold or the limit of a sequence count 0 there too, so that
    means of weak edges are biased towards 0. Edges are read and written in blocks, so that memory is bounded. Idempotent.
    """
    n_done = len(runs.done_sequences(store, run))
    if n_done == 0:
        raise NothingToDo(f"run {run!r} has no finished sequence in this graph: see `featlas query runs`")
    n_influences = 0
    for edges in runs.edge_blocks(store, run, edges_per_block):
        influences = runs.aggregate(edges, n_done).with_columns(pl.lit(run).alias("run"))
        store.merge_edges("INFLUENCES", influences)
        n_influences += len(influences)
    runs.record_counts(store, run, n_sequences=n_done)
    return n_influences
