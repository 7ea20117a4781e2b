"""What is printed of a series of models."""

import polars as pl

from . import console
from .analysis.edge_overlap import PERMUTED, REWIRED
from .analysis.faithfulness import ATTRIBUTION, POOLED
from .analysis.series_gallery import SHARED_EDGES, beside_last, last, matched_share, solved_from
from .queries.series import SeriesRecord


def show_series(record: SeriesRecord) -> None:
    """What each model can do, its graph and circuits, and what it has in common with the last; then when tasks are solved."""
    console.heading(f"{record.title} ({record.key})")
    tasks = record.frames["tasks"].filter(pl.col("label").is_null())
    names = tasks["task"].unique(maintain_order=True).to_list()
    accuracy = {(x, task): value for x, task, value in tasks.select("x", "task", "accuracy").iter_rows()}
    members = record.frames["members"].sort("x")
    solved = [
        (row["name"], None if row["loss"] is None else f"{row['loss']:.2f}", *(_percent(accuracy.get((row["x"], task))) for task in names))
        for row in members.iter_rows(named=True)
    ]
    console.table((record.axis, "loss", *names), solved)
    for task, name in solved_from(record).select("task", "name").iter_rows():
        console.say(f"{task}: " + (f"solved from {name} on" if name is not None else "never solved (accuracy below 90 %)"))
    console.say("")
    of_last = (f"features matched in {last(record)}", "by chance", "edges shared", "rewired", "exchanged")
    rows = [_graph_row(record, row) for row in members.iter_rows(named=True)]
    console.table((record.axis, "edges", "effective", "CPR", "random", *of_last), rows)
    console.say("effective: edges of equal strength that are as spread. CPR: mean φ over the share of edges kept. Edges shared: weighted Jaccard;")
    console.say("by chance, where the last graph is rewired, or matched features are exchanged inside their sites.")


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def _graph_row(record: SeriesRecord, member: dict[str, object]) -> tuple[object, ...]:
    """A model's graph, circuits, and what it shares with the last model; blanks where it is the last, or nothing is matched."""
    here = pl.col("x") == member["x"]
    graph = record.frames["graphs"].filter(here).row(0, named=True)
    area = record.frames["areas"].filter(here & (pl.col("area") == "CPR") & (pl.col("task") == POOLED))
    cpr = dict(area.select("method", "value").iter_rows())
    ours, random = cpr.get(ATTRIBUTION), next((value for method, value in cpr.items() if method != ATTRIBUTION), None)
    matched = matched_share(beside_last(record, "sites").filter(here)) if "sites" in record.frames else (None, None)
    shared = beside_last(record, "values").filter(here & (pl.col("quantity") == SHARED_EDGES)) if "values" in record.frames else pl.DataFrame()
    chance = {null: _chance(mean, z) for null, mean, z in shared.select("null", "null_mean", "z").iter_rows()} if shared.height else {}
    edges = [_number(shared["value"][0]) if shared.height else None, *(chance.get(null) for null in (REWIRED, PERMUTED))]
    return (member["name"], f"{graph['edges']:,}", f"{graph['effective_edges']:.0f}", _number(ours), _number(random), *map(_percent, matched), *edges)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _chance(mean: float | None, z: float | None) -> str | None:
    """What chance gives, and how many of its standard deviations the value lies above it."""
    return None if mean is None else f"{mean:.2f}" if z is None else f"{mean:.2f} (z {z:+.1f})"
