"""What is asked of a graph about its runs: which there are, which sequences are done, their edges, means of these, when one is finished."""

import json
from collections.abc import Collection, Iterator

import numpy as np
import polars as pl

from ..errors import UserError
from .store import BlockReader, GraphStore
from .streaming import EDGES_PER_BLOCK as EDGES_PER_BLOCK
from .streaming import edge_ranges

ATTRIBUTION_PATCHING = "attribution patching"
"""`Run.method` of effective edges measured at one step."""

INTEGRATED_GRADIENTS = "integrated gradients"
"""`Run.method` of effective edges measured at several."""

RUNNING, DONE = "running", "done"
"""`Run.status` while sequences are missing, and once all planned ones are in."""

_INFLUENCES = {
    "source": pl.String(), "target": pl.String(), "weight": pl.Float64(), "abs_weight": pl.Float64(), "max_weight": pl.Float64(),
    "variance": pl.Float64(), "n": pl.Int64(),
}  # fmt: skip


class SequenceNotDone(UserError):
    """A sequence that the run does not have, or has not finished."""


def exists(store: GraphStore, run: str) -> bool:
    """Whether the graph has the run."""
    return len(store.query("MATCH (r:Run) WHERE r.key = $run RETURN r.key AS run", {"run": run})) > 0


def batch_size(store: GraphStore, run: str) -> int | None:
    """How many sequences went together when the run was begun; None for a run that the graph does not have."""
    rows = store.query("MATCH (r:Run) WHERE r.key = $run RETURN r.settings AS settings", {"run": run})
    return int(json.loads(rows["settings"][0])["batch_size"]) if len(rows) and rows["settings"][0] else None


def done_sequences(store: GraphStore, run: str) -> frozenset[str]:
    """Keys of the sequences whose edges are committed for `run`."""
    rows = store.query("MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) WHERE r.key = $run AND m.status = 'done' RETURN s.key AS sequence", {"run": run})
    return frozenset(rows["sequence"].to_list()) if len(rows) else frozenset()


def edge_blocks(store: GraphStore, run: str, size: int) -> Iterator[pl.DataFrame]:
    """The run's `ATTRIBUTES` in blocks of about `size` edges, at most twice as many, by source and target.

    All edges of one source and target, whatever their sequence, are in one block, which alone may therefore be larger; blocks
    follow each other by source and then target.
    """
    if isinstance(store, BlockReader):
        yield from store.edge_blocks(run, size)
        return
    for sources, targets in edge_ranges("ATTRIBUTES", store, run=run, size=size):
        yield store.read_edges("ATTRIBUTES", run=run, sources=sources, targets=targets)


def aggregate(edges: pl.DataFrame, n_done: int) -> pl.DataFrame:
    """Per (source, target): mean, mean magnitude, signed extreme, variance and count of the sequences' effects.

    Effects are added one after the other, by sequence, so that every sum is the same whichever other edges are in the frame.
    """
    edges = edges.sort("source", "target", "sequence", "src_pos", "dest_pos")
    first, group = _groups(edges, "source", "target", "sequence")
    effect = np.bincount(group, edges["weight"].to_numpy(), minlength=len(first))  # (pairs with a sequence,)
    per_sequence = edges.select("source", "target")[first]
    first, group = _groups(per_sequence, "source", "target")
    total = lambda values: np.bincount(group, values, minlength=len(first))
    mean, n = total(effect) / n_done, total(np.ones_like(effect))
    by_magnitude = np.lexsort((-np.abs(effect), group))  # stable: of equal magnitudes the earlier sequence's
    return per_sequence[first].with_columns(
        weight=pl.Series(mean),
        abs_weight=pl.Series(total(np.abs(effect)) / n_done),
        max_weight=pl.Series(effect[by_magnitude][first], dtype=pl.Float64),
        variance=pl.Series((total((effect - mean[group]) ** 2) + (n_done - n) * mean**2) / n_done),
        n=pl.Series(n).cast(pl.Int64),
    )


def _groups(rows: pl.DataFrame, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Runs of equal rows in a sorted frame: the place of each run's first row (runs,), and each row's run (rows,)."""
    new = rows.select(pl.any_horizontal(pl.col(name) != pl.col(name).shift(1) for name in names).fill_null(True)).to_series().to_numpy()
    return np.flatnonzero(new), np.cumsum(new) - 1


STRENGTHS = ("abs_weight", "weight")
"""Properties of `INFLUENCES` whose magnitude an edge's strength can be."""


def nth_strength(store: GraphStore, run: str, column: str, n: int) -> float | None:
    """The n-th greatest magnitude of a property of `STRENGTHS` among a run's `INFLUENCES`, n from 1; None where there are no more than n edges."""
    text = (
        f"MATCH (:Feature)-[e:INFLUENCES]->(:Feature) WHERE e.run = $run RETURN abs(e.{_strength(column)}) AS strength"
        " ORDER BY strength DESC SKIP $before LIMIT 2"
    )
    found = store.query(text, {"run": run, "before": n - 1})["strength"].to_list()
    return max(found) if len(found) == 2 else None


def strong_influences(store: GraphStore, run: str, column: str, least: float) -> pl.DataFrame:
    """A run's `INFLUENCES` whose property of `STRENGTHS` has at least this magnitude: source, target, weight, abs_weight, by source and target.

    The database leaves the others out: of a large run only what is asked for is read.
    """
    text = (
        f"MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature) WHERE e.run = $run AND abs(e.{_strength(column)}) >= $least"
        " RETURN a.key AS source, b.key AS target, e.weight AS weight, e.abs_weight AS abs_weight"
    )
    schema = {"source": pl.String, "target": pl.String, "weight": pl.Float64, "abs_weight": pl.Float64}
    return store.query(text, {"run": run, "least": float(least)}).cast(schema).sort("source", "target")  # type: ignore[arg-type]


def count_influences(store: GraphStore, run: str) -> int:
    """How many `INFLUENCES` a run has."""
    return int(store.query("MATCH (:Feature)-[e:INFLUENCES]->(:Feature) WHERE e.run = $run RETURN count(*) AS n", {"run": run})["n"][0])


def _strength(column: str) -> str:
    """The name of a property that goes into a query's text: one of those known. Raises ValueError."""
    if column not in STRENGTHS:
        raise ValueError(f"{column!r} is none of {STRENGTHS}")
    return column


def influences_of(store: GraphStore, run: str, sequences: Collection[str]) -> pl.DataFrame:
    """The effects of a run over some of its done sequences only, as `aggregate` gives them: what `INFLUENCES` would be had the run no others.

    Read in blocks, so that memory is bounded by the result. Raises `SequenceNotDone`.
    """
    parts = list(influence_blocks(store, run, sequences))
    return pl.concat(parts) if parts else pl.DataFrame(schema=_INFLUENCES)


def influence_blocks(store: GraphStore, run: str, sequences: Collection[str]) -> Iterator[pl.DataFrame]:
    """The rows of `influences_of` block by block, for what need not hold them all. Raises `SequenceNotDone`."""
    wanted = set(sequences)
    missing = sorted(wanted - done_sequences(store, run))
    if missing or not wanted:
        which = f"{len(missing)} of {len(wanted)} sequences, among them {missing[0]!r}," if missing else "no sequence at all"
        raise SequenceNotDone(f"run {run!r} has not done {which}: the run's sequences are listed by `featlas query sequences --param run={run}`")
    if len(wanted) == 1:
        blocks: Iterator[pl.DataFrame] = iter([store.read_edges("ATTRIBUTES", run=run, sequence=next(iter(wanted)))])
    else:
        blocks = edge_blocks(store, run, EDGES_PER_BLOCK)
    for block in blocks:
        yield aggregate(block.filter(pl.col("sequence").is_in(list(wanted))), len(wanted))


def record_counts(store: GraphStore, run: str, *, n_sequences: int) -> None:
    """Set a run's counts, and its status: `done` where no planned sequence is missing."""
    total = store.query("MATCH (r:Run)-[m:ON_SEQUENCE]->(:Sequence) WHERE r.key = $run RETURN sum(m.n_edges) AS n_edges", {"run": run})
    store.query(
        "MATCH (r:Run) WHERE r.key = $run SET r.n_sequences = $n_sequences, r.n_edges = $n_edges,"
        " r.status = CASE WHEN r.n_planned > $n_sequences THEN $running ELSE $done END",
        {"run": run, "n_sequences": n_sequences, "n_edges": int(total["n_edges"][0] or 0), "running": RUNNING, "done": DONE},
        write=True,
    )
