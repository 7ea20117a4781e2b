"""Scores and single effects, written back: onto the graph, where Cypher finds them, and whole into the statistics store.

1. `write_sweep`: every value of a sweep (one per ablated run and sequence) and the sizes of its circuits, into DuckDB; `read_sweep` gives them back.
2. `write_scores`: rows of `faithfulness` as `Score` nodes beside their circuits, and the default one on the circuit itself.
3. `write_effects`: what the metric loses when one edge, or one node, alone is cut: every value into DuckDB, the mean over sequences onto the
   graph, for the whole model on `INFLUENCES` and `ABLATED`, in a circuit on `CIRCUIT_EDGE` and `IN_CIRCUIT`.
4. `estimated_and_measured`: attribution beside ablation, edge by edge.

Writing twice is writing once: everything has a key, and the last value of a key stays.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import polars as pl

from ..errors import UserError
from ..queries.schema import score_key
from ..queries.scores import (
    circuit_ends,
    circuit_members,
    influence_ends,
    measured_circuit_edges,
    measured_influences,
    require_circuits,
)
from ..queries.statistics import SCORE_COLUMNS, SIZE_COLUMNS, StatisticsStore
from ..queries.store import GraphStore, KeyRange
from ..queries.subgraphs import RunRow
from .faithfulness import ATTRIBUTION, CIRCUIT, COMPLEMENT, HELD_OUT, POOLED, SIZES, VALUES, Averaging, checked

EFFECTS: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "circuit": pl.String(), "source": pl.String(), "target": pl.String(), "metric": pl.String(), "baseline": pl.String(), "split": pl.String(),
        "draw": pl.Int64(), "sequence": pl.String(), "task": pl.String(), "effect": pl.Float64(),
    }
)  # fmt: skip
"""What one sequence's metric loses when one edge `source` → `target` alone is cut, or one node `source` where `target` is null.

`circuit` is the key of the circuit in which it was cut, m(C) − m(C without it), null for the whole model, m(M) − m(M without it). An edge is
cut at all positions at once; `draw` is the seed of a drawn baseline, else 0."""

KINDS: Mapping[str, str] = MappingProxyType({CIRCUIT: "faithfulness", COMPLEMENT: "completeness"})
"""`Score.kind` of the two parts, also the names of a `Circuit`'s properties."""


class BadEffects(UserError):
    """Effects that cannot be written."""


@dataclass(frozen=True, slots=True)
class DefaultScore:
    """Which score a `Circuit` shows itself; the others are `Score` nodes only."""

    metric: str
    baseline: str
    ablation: str = "edge"
    averaging: Averaging = Averaging.MEAN_OF_RATIOS
    split: str = HELD_OUT

    @classmethod
    def of(cls, run: RunRow) -> "DefaultScore":
        """By the metric and the baseline that the run's edges were measured with."""
        return cls(run.metric, str(run.properties.get("baseline") or "counterfactual"))

    def chosen(self) -> pl.Expr:
        """Whether a row of scores is the default one."""
        return (
            (pl.col("metric") == self.metric) & (pl.col("baseline") == self.baseline) & (pl.col("ablation") == self.ablation)
            & (pl.col("averaging") == self.averaging.value) & (pl.col("split") == self.split) & (pl.col("task") == POOLED) & pl.col("draw").is_null()
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ScoresWritten:
    """How many `Score` nodes were written, about how many circuits, and how many of these got a default score."""

    n_scores: int
    n_circuits: int
    n_defaults: int


@dataclass(frozen=True, slots=True)
class EffectsWritten:
    """How many edges and nodes of the graph have a new effect, and how many of those given the graph does not have (`n_missing`, left out)."""

    n_edges: int
    n_nodes: int
    n_missing: int


# Sweeps


def write_sweep(statistics: StatisticsStore, run: str, subject: str, values: pl.DataFrame, sizes: pl.DataFrame | None = None) -> None:
    """Every value of a sweep (`VALUES`), and the sizes of its circuits (`SIZES`), of what `subject` names: the run itself, or one circuit."""
    named = pl.lit(run).alias("run"), pl.lit(subject).alias("subject")
    rows = checked(values).rename({"full": "full_value", "empty": "empty_value"}).with_columns(named).select(SCORE_COLUMNS)
    if sizes is not None:  # a control may have another size with another baseline
        baselines = values.select("baseline").unique(maintain_order=True)
        sizes = sizes.select(pl.col(n).cast(t) for n, t in SIZES.items()).with_columns(named).join(baselines, how="cross")
    statistics.write_scores(rows, sizes)


def read_sweep(statistics: StatisticsStore, run: str, subject: str, baseline: str | None = None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(values, sizes) of a sweep, as `VALUES` and `SIZES`, in the order of their identity; both are empty for one that was not written.

    Of one baseline, or the values of all; a control whose size depends on the baseline has then one of its sizes.
    """
    of_baseline = pl.lit(True) if baseline is None else pl.col("baseline") == baseline
    values = statistics.scores(run, subject).rename({"full_value": "full", "empty_value": "empty"}).filter(of_baseline)
    sizes = statistics.score_sizes(run, subject).filter(of_baseline).select([name for name in SIZE_COLUMNS if name in SIZES])
    return values.select(list(VALUES)), sizes.unique(["method", "ablation", "size", "draw"], keep="first", maintain_order=True)


# Scores


def write_scores(
    store: GraphStore, run: RunRow, table: pl.DataFrame, *, circuit: str | None = None, own: str = ATTRIBUTION, default: DefaultScore | None = None,
    seed: int = 0,
) -> ScoresWritten:  # fmt: skip
    """`Score` nodes and `SCORED` edges of rows of `faithfulness`, and the default score on the circuits themselves.

    All rows are about `circuit` where it is given. Otherwise `table` has the column `circuit` (by `with_sizes`): a row is about that circuit;
    a row without one, such as a control's, is about the circuit that the method `own` has at the same size, and rows of sizes without a circuit
    are left out. `Circuit.faithfulness` and `completeness` are those of `default` (the run's own metric and baseline unless given); what is
    undefined there is null. `seed` is that of the draws, where they are pooled. Raises `UnknownCircuit`.
    """
    rows = _about(table, circuit, own).with_columns(
        pl.col("part").replace_strict(dict(KINDS)).alias("kind"), pl.col("draw").fill_null(seed).alias("seed")
    )
    if rows.is_empty():
        return ScoresWritten(0, 0, 0)
    subjects = rows["subject"].unique().sort().to_list()
    require_circuits(store, subjects)
    n_scores = merge_scores(store, rows)
    # A circuit shows its own score, by whichever ranking it was cut, and never that of a control beside it.
    itself = pl.col("circuit").is_not_null() if "circuit" in rows.columns and circuit is None else pl.col("method") == own
    shown = rows.filter(itself, (default or DefaultScore.of(run)).chosen())
    for kind in KINDS.values():
        ours = shown.filter(pl.col("kind") == kind)
        if ours.height:  # a property that is not among the columns keeps its value
            store.merge_nodes("Circuit", ours.select(pl.col("subject").alias("key"), pl.col("value").alias(kind)))
    return ScoresWritten(n_scores, len(subjects), shown["subject"].n_unique())


IDENTITY = ("subject", "kind", "ablation", "metric", "baseline", "averaging", "split", "seed", "task", "method")
"""What tells a score from others, in the order of `score_key`."""


def merge_scores(store: GraphStore, rows: pl.DataFrame) -> int:
    """`Score` nodes and `SCORED` edges of rows with the columns of `IDENTITY`, `value`, `low`, `high`, `n` and `undefined_n`; how many scores.

    `subject` is the key of a node that can be scored, a circuit's or a block's.
    """
    keys = [score_key(*values) for values in rows.select(IDENTITY).iter_rows()]
    scores = rows.select(pl.Series("key", keys, dtype=pl.String), *IDENTITY, "value", "low", "high", "n", "undefined_n")
    store.merge_nodes("Score", scores)
    store.merge_edges("SCORED", scores.select(pl.col("subject").alias("source"), pl.col("key").alias("target")))
    return len(set(keys))


def _about(table: pl.DataFrame, circuit: str | None, own: str) -> pl.DataFrame:
    """The rows with `subject`, the circuit that each is about; those about none are left out."""
    if circuit is not None:
        return table.with_columns(pl.lit(circuit).alias("subject"))
    if "circuit" not in table.columns:
        raise BadEffects("the rows do not say which circuit they are about: join them with sizes (with_sizes), or name the circuit")
    ours = table.filter(pl.col("method") == own, pl.col("circuit").is_not_null()).select("ablation", "size", pl.col("circuit").alias("_own"))
    rows = table.join(ours.unique(["ablation", "size"], keep="first", maintain_order=True), on=["ablation", "size"], how="left")
    return rows.with_columns(pl.coalesce("circuit", "_own").alias("subject")).filter(pl.col("subject").is_not_null())


# Effects


def write_effects(
    store: GraphStore, statistics: StatisticsStore | None, run: RunRow, effects: pl.DataFrame, *, metric: str | None = None,
    baseline: str | None = None,
) -> EffectsWritten:  # fmt: skip
    """Every effect (`EFFECTS`) into the statistics store, and the mean over sequences of one metric and baseline onto the graph.

    The graph gets `metric` and `baseline`, the run's own unless given: draws are averaged within a sequence first. Only edges and members that
    the graph has get an effect, with their other properties left as they are; a node's effect in the whole model becomes an
    `ABLATED` edge to the run. Raises `BadEffects` where there is no effect of that metric and baseline, or one that is not finite.
    """
    frame = checked_effects(effects)
    default = DefaultScore.of(run)
    metric, baseline = metric or default.metric, baseline or default.baseline
    wanted = frame.filter(pl.col("metric") == metric, pl.col("baseline") == baseline)
    if wanted.is_empty() and frame.height:
        known = ", ".join(f"{m} by {b}" for m, b in frame.select("metric", "baseline").unique().sort("metric", "baseline").iter_rows())
        raise BadEffects(f"no effects on {metric} by the baseline {baseline}: there are {known}; name one of them")
    if statistics is not None:
        statistics.write_effects(frame.with_columns(pl.lit(run.key).alias("run"), pl.col("circuit", "target", "task").fill_null("")))
    means = mean_effects(wanted)
    circuits = means["circuit"].drop_nulls().unique().sort().to_list()
    require_circuits(store, circuits)
    written = [_write_model_edges(store, run.key, means), *(_write_circuit_edges(store, name, means) for name in circuits)]
    members = [_write_model_nodes(store, run.key, means), *(_write_circuit_nodes(store, name, means) for name in circuits)]
    n_edges, n_nodes = sum(written), sum(members)
    return EffectsWritten(n_edges, n_nodes, means.height - n_edges - n_nodes)


def checked_effects(effects: pl.DataFrame) -> pl.DataFrame:
    """`effects` with the columns and types of `EFFECTS`; empty text for no circuit or target becomes null. Raises `BadEffects`."""
    missing = [name for name in EFFECTS if name not in effects.columns]
    if missing:
        raise BadEffects(f"column {missing[0]!r} is missing: effects have {', '.join(EFFECTS)}")
    frame = effects.select(pl.col(name).cast(dtype) for name, dtype in EFFECTS.items())
    frame = frame.with_columns(pl.when(pl.col(name) != "").then(pl.col(name)).alias(name) for name in ("circuit", "target"))
    broken = frame.filter(~pl.col("effect").is_finite().fill_null(False))
    if broken.height:
        row = broken.row(0, named=True)
        what = row["source"] if row["target"] is None else f"{row['source']} -> {row['target']}"
        raise BadEffects(
            f"{broken.height} of {frame.height} effects are not finite, the first that of {what} on sequence {row['sequence']}: measure them again"
        )
    return frame


def mean_effects(effects: pl.DataFrame) -> pl.DataFrame:
    """The mean effect of every edge and node: `circuit`, `source`, `target`, `metric`, `baseline`, `effect`, `deviation` (n − 1), `n` sequences.

    A sequence's draws are averaged first.
    """
    what = ["circuit", "source", "target", "metric", "baseline"]
    per_sequence = checked_effects(effects).group_by(*what, "split", "task", "sequence").agg(pl.col("effect").mean())
    # The order of addition must not depend on the order of the rows.
    means = per_sequence.sort("split", "task", "sequence").group_by(what, maintain_order=True).agg(
        pl.col("effect").mean(), pl.col("effect").std().alias("deviation"), pl.len().cast(pl.Int64).alias("n")
    )
    return means.sort(what)


def _columns(*names: str) -> list[pl.Expr]:
    """Ends and identity as they are, and the effect under the names that edges have for it."""
    effect = {"effect": "ablation_effect", "metric": "ablation_metric", "baseline": "ablation_baseline"}
    return [*(pl.col(name) for name in names), *(pl.col(old).alias(new) for old, new in effect.items())]


def _edges_of(means: pl.DataFrame, circuit: str | None) -> pl.DataFrame:
    return means.filter(pl.col("target").is_not_null(), pl.col("circuit").eq_missing(pl.lit(circuit, dtype=pl.String)))


def _nodes_of(means: pl.DataFrame, circuit: str | None) -> pl.DataFrame:
    return means.filter(pl.col("target").is_null(), pl.col("circuit").eq_missing(pl.lit(circuit, dtype=pl.String)))


def _write_model_edges(store: GraphStore, run: str, means: pl.DataFrame) -> int:
    rows = _edges_of(means, None)
    if rows.is_empty():
        return 0
    ordered = rows["source"].sort()  # in the order of code points, as key ranges are
    known = influence_ends(store, run, KeyRange(ordered[0], ordered[-1]))
    rows = rows.join(known, on=["source", "target"], how="semi").with_columns(pl.lit(run).alias("run"))
    store.merge_edges("INFLUENCES", rows.select(_columns("source", "target", "run")))
    return rows.height


def _write_circuit_edges(store: GraphStore, circuit: str, means: pl.DataFrame) -> int:
    rows = _edges_of(means, circuit)
    if rows.is_empty():
        return 0
    rows = rows.join(circuit_ends(store, circuit), on=["source", "target"], how="semi")
    store.merge_edges("CIRCUIT_EDGE", rows.select(_columns("source", "target", "circuit")))
    return rows.height


def _write_model_nodes(store: GraphStore, run: str, means: pl.DataFrame) -> int:
    rows = _nodes_of(means, None)
    store.merge_edges("ABLATED", rows.select("source", pl.lit(run).alias("target"), "metric", "baseline", "effect", "n"))
    return rows.height


def _write_circuit_nodes(store: GraphStore, circuit: str, means: pl.DataFrame) -> int:
    rows = _nodes_of(means, circuit).with_columns(pl.lit(circuit).alias("target"))
    if rows.is_empty():
        return 0
    rows = rows.join(circuit_members(store, circuit), on=["source", "target"], how="semi")
    store.merge_edges("IN_CIRCUIT", rows.select(_columns("source", "target")))
    return rows.height


def estimated_and_measured(store: GraphStore, run: str, circuit: str | None = None) -> pl.DataFrame:
    """Edges that were cut: `source`, `target`, `within` (full model, circuit), `estimated` (attribution), `measured` (ablation), by
    which `metric` and `baseline`.

    Those of the run in the whole model, and those of a circuit, if one is named; both are in the units of the metrics they were measured with.
    """
    parts = [measured_influences(store, run).with_columns(pl.lit("full model").alias("within"))]
    if circuit is not None:
        parts.append(measured_circuit_edges(store, circuit).with_columns(pl.lit("circuit").alias("within")))
    numbers = pl.col("weight").alias("estimated"), pl.col("effect").alias("measured")
    return pl.concat(parts).select("source", "target", "within", *numbers, "metric", "baseline")
