"""A circuit with everything that is known of its nodes, as the terminal and the pages say it.

`summarise` reads it all from the graph and the statistics; `task_summary` says how well the model does on the tasks of a run's sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow, model_features
from .circuits import Circuit, Path, PathRule, strongest_paths
from .notes import CONTEXTS, feature_notes, strongest_contexts


@dataclass(frozen=True)
class SummaryOptions:
    """How much of it: paths, and features in the table; and the commands to try next."""

    n_paths: int = 10
    n_features: int = 25
    rule: PathRule = PathRule.PRODUCT
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class Summary:
    """A circuit and what it says: `notes` are of schema `notes.NOTES`, `commands` are what to try next."""

    title: str
    subtitle: str
    circuit: Circuit
    notes: pl.DataFrame
    paths: Sequence[Path]
    options: SummaryOptions


def summarise(store: GraphStore, statistics: StatisticsStore | None, run: RunRow, circuit: Circuit, options: SummaryOptions) -> Summary:
    """A circuit's nodes by name with their strongest contexts, and its strongest paths; `statistics` where the atlas has some."""
    measured = statistics.latest_run(run.model, run.dictionaries) if statistics is not None else None
    features = model_features(store, run.model).join(circuit.nodes.select("key").unique(), on="key", how="semi")
    contexts = pl.DataFrame(schema=CONTEXTS)
    if statistics is not None and measured is not None:
        contexts = strongest_contexts(statistics, measured.run, features["key"].to_list())
    metric = run.metric if " " in run.metric else run.metric.replace("_", " ")  # "feature resid_11/123" names a site
    return Summary(
        title=f"{run.model.partition('@')[0]}: {run.task.replace('+', ' + ')}", subtitle=f"effects on the {metric}, run {run.key}", circuit=circuit,
        notes=feature_notes(features, contexts, output=metric), paths=strongest_paths(circuit, options.n_paths, rule=options.rule), options=options,
    )  # fmt: skip


def task_summary(sequences: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Per task of a run's sequences: `task, pairs, solved, clean, corrupt`.

    `clean` and `corrupt` are the metric's means on either text; `solved`, for the logit difference only, is the share of pairs whose
    clean text makes the right answer likelier than the wrong one.
    """
    solved = (pl.col("metric_clean") > 0).mean() if metric == "logit_diff" else pl.lit(None, dtype=pl.Float64)
    means = [pl.col("metric_clean").mean().alias("clean"), pl.col("metric_corrupt").mean().alias("corrupt")]
    return sequences.group_by("task").agg(pl.len().alias("pairs"), solved.alias("solved"), *means).sort("task")
