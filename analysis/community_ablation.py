"""Communities put to the test: what each task loses when one community is removed, what it keeps with that community alone.

1. `parts`: the largest communities, the others together as the rest; for each as many random nodes of the same sites and kinds.
2. `ablate_communities`: the model with a part's nodes at their baseline (removed), and with all others at theirs (kept alone), on held-out sequences.
3. `Tested.table`: φ of what is left, task by task, with bootstrap intervals. `Tested.extra_loss`: how much more of a task removing a community takes
   than removing random nodes, paired by sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import polars as pl

from ..errors import UserError
from ..queries.store import GraphStore
from .communities import Communities, EffectiveGraph, IntArray
from .faithfulness import CIRCUIT, HELD_OUT, POOLED, Averaging, Bootstrap, faithfulness
from .masks import node_set
from .study import Study, Trial, found_pairs, held_out_pairs, measure

REST = "the rest"
"""The communities beyond the largest, together."""

RANDOM = "random nodes like "
"""Before a part's name: as many nodes of each of its sites and kinds, drawn from all nodes of the graph."""


class Treatment(StrEnum):
    """What is done with a part's nodes."""

    REMOVED = "removed"
    """They alone are at their baseline: φ of the complement."""
    ALONE = "kept alone"
    """All others are at theirs."""


TABLE = {
    "part": pl.String(), "treatment": pl.String(), "task": pl.String(), "n_nodes": pl.Int64(), "value": pl.Float64(), "low": pl.Float64(),
    "high": pl.Float64(), "n": pl.Int64(), "undefined_n": pl.Int64(),
}  # fmt: skip
"""One row per part (or random nodes like it, draws averaged), treatment and task (`POOLED`: all): φ of what is left."""

EXTRA = {
    "part": pl.String(), "task": pl.String(), "value": pl.Float64(), "low": pl.Float64(), "high": pl.Float64(), "n": pl.Int64(),
}  # fmt: skip
"""φ without random nodes minus φ without the part: above 0, the part matters more to the task than its size does. Paired by sequence."""


@dataclass(frozen=True)
class AblationOptions:
    """largest: communities tested one by one. held_out: sequences in all, shared evenly among the tasks. draws: seeds of the random nodes."""

    largest: int = 8
    held_out: int = 48
    draws: int = 3

    def check(self) -> None:
        """Raise a `UserError` for a number out of range."""
        for name, value in (("--largest", self.largest), ("--held-out", self.held_out), ("--control-draws", self.draws)):
            if value < 1:
                raise UserError(f"{name} {value} is too small: give at least 1")


@dataclass(frozen=True, eq=False)
class Part:
    """Some nodes of a graph. community: its number, None for the rest. nodes: rows of the graph. like: the seeds' draws of as many, each as nodes."""

    name: str
    community: int | None
    nodes: IntArray
    like: tuple[IntArray, ...]


@dataclass(frozen=True, eq=False)
class Tested:
    """What was measured: `values` as `faithfulness.VALUES`, with the part's name as method, the treatment in `part`'s place of the table."""

    run: str
    metric: str
    baseline: str
    n_tested: int
    parts: tuple[Part, ...]
    table: pl.DataFrame
    extra_loss: pl.DataFrame
    values: pl.DataFrame


def community_name(community: int) -> str:
    """What a community is called in tables; communities are numbered from 0, the largest first."""
    return f"community {community}"


def parts(graph: EffectiveGraph, labels: IntArray, options: AblationOptions, seed: int = 0) -> list[Part]:
    """The largest communities and the rest, with random nodes like each. labels: (n,) by size."""
    chosen = [(community_name(c), c, np.flatnonzero(labels == c)) for c in range(min(options.largest, int(labels.max()) + 1))]
    rest = np.flatnonzero(labels >= options.largest)
    whole: list[tuple[str, int | None, IntArray]] = [*chosen, *([(REST, None, rest)] if len(rest) else [])]
    return [Part(name, c, nodes, tuple(random_like(graph, nodes, seed + i) for i in range(options.draws))) for name, c, nodes in whole]


def random_like(graph: EffectiveGraph, nodes: IntArray, seed: int) -> IntArray:
    """Random nodes of the graph: of each site and kind as many as `nodes` has (a site's one error node is then the same), ascending."""
    kind = np.unique(graph.nodes["kind"].to_list(), return_inverse=True)[1]
    stratum = graph.site * (int(kind.max(initial=0)) + 1) + kind
    wanted = np.bincount(stratum[nodes], minlength=int(stratum.max()) + 1)
    order = np.lexsort((np.random.default_rng(seed).random(graph.n), stratum))
    place = np.arange(graph.n) - np.searchsorted(stratum[order], stratum[order], side="left")
    return np.sort(order[place < wanted[stratum[order]]])


def ablate_communities(
    store: GraphStore, study: Study, graph: EffectiveGraph, communities: Communities, options: AblationOptions,
    *, seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> Tested:  # fmt: skip
    """Run the model without, and with only, each part, on sequences that the run's edges were not measured on."""
    options.check()
    chosen = parts(graph, communities.labels, options, seed)
    found = found_pairs(store, study.run)
    tested = held_out_pairs(study, found, options.held_out)
    values = measure(study, tested, _trials(study, graph, chosen), split=HELD_OUT, among=[*found, *tested], progress=progress)
    own = values.filter(pl.col("metric") == study.default_metric)
    return Tested(
        study.run.key, study.default_metric, study.baseline_name, len(tested), tuple(chosen), _table(own), extra_loss(own, [p.name for p in chosen]),
        values,
    )  # fmt: skip


def _trials(study: Study, graph: EffectiveGraph, chosen: Sequence[Part]) -> list[Trial]:
    trials = []
    for part in chosen:
        for name, draws in ((part.name, [part.nodes]), (RANDOM + part.name, part.like)):
            for draw, nodes in enumerate(draws):
                rows = graph.nodes[nodes]
                mask = node_set(rows, rows, study.graph)
                trials += [
                    Trial(_method(name, Treatment.REMOVED), len(nodes), mask.inverse(), draw, complement=False),
                    Trial(_method(name, Treatment.ALONE), len(nodes), mask, draw, complement=False),
                ]
    return trials


def _method(name: str, treatment: Treatment) -> str:
    return f"{name}, {treatment.value}"


def _table(values: pl.DataFrame) -> pl.DataFrame:
    """φ of every method by task and pooled; as `TABLE`, in the order of the values."""
    way, bootstrap = (Averaging.RATIO_OF_MEANS,), Bootstrap()
    rows = pl.concat([faithfulness(values, by=by, averaging=way, bootstrap=bootstrap) for by in (("task",), ())])
    order = values.select("method").unique(maintain_order=True).with_row_index("_order")
    rows = rows.filter(pl.col("part") == CIRCUIT).join(order, on="method").sort("_order", "task")
    named = rows.with_columns(
        pl.col("method").str.replace(r", [^,]*$", "").alias("part"), pl.col("method").str.extract(r", ([^,]*)$").alias("treatment"),
        pl.col("size").alias("n_nodes"),
    )  # fmt: skip
    return named.select(pl.col(name).cast(dtype) for name, dtype in TABLE.items())


def extra_loss(values: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """How much more φ is left without random nodes than without each part, as `EXTRA`. values: of one metric."""
    found = []
    identity = ["sequence", "task"]
    for name in names:
        own, random = (
            values.filter(pl.col("method") == _method(which, Treatment.REMOVED)).group_by(identity).agg(pl.col("value", "full", "empty").mean())
            for which in (name, RANDOM + name)
        )
        paired = own.join(random.select(*identity, pl.col("value").alias("other")), on=identity)
        # A set that is worth the difference of the two: its φ is the difference of their φ.
        frame = values.filter(pl.col("method") == _method(name, Treatment.REMOVED)).unique(identity, keep="first", maintain_order=True)
        frame = frame.drop("value", "full", "empty").with_columns(pl.lit(0, dtype=pl.Int64).alias("draw")).join(paired, on=identity)
        frame = frame.with_columns((pl.col("other") - pl.col("value") + pl.col("empty")).alias("value"))
        for by in (("task",), ()):
            rows = faithfulness(frame, by=by, averaging=(Averaging.RATIO_OF_MEANS,))
            found.append(rows.select(pl.lit(name).alias("part"), "task", "value", "low", "high", "n"))
    return pl.concat(found).select(pl.col(name).cast(dtype) for name, dtype in EXTRA.items())


def removal_table(tested: Tested, treatment: Treatment = Treatment.REMOVED) -> pl.DataFrame:
    """The community × task frame of a heat map: `task`, `removed`, `value`, `low`, `high`, `n`; random nodes like a part stand beside it."""
    rows = tested.table.filter((pl.col("treatment") == treatment.value) & (pl.col("task") != POOLED))
    return rows.select("task", pl.col("part").str.replace(RANDOM, "random like ", literal=True).alias("removed"), "value", "low", "high", "n")


def layer_flow(graph: EffectiveGraph, labels: IntArray) -> pl.DataFrame:
    """The community ↔ site frame of an alluvial figure: `community`, `site`, `n` nodes, `strength`; sites in their order."""
    rows = graph.nodes.select("site", "order").with_columns(pl.Series("community", labels), pl.Series("strength", graph.strength))
    counted = rows.group_by("community", "site", "order").agg(pl.len().cast(pl.Int64).alias("n"), pl.col("strength").sum())
    return counted.sort("community", "order").select("community", "site", "n", "strength")
