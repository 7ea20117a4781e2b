"""What pages say of studies: sweeps, regions, communities, matchings, comparisons and series, each as exhibits and tables.

An exhibit is a figure (as plotly.js takes it) with its question, what is held fixed, how to read it, what it found and its numbers.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import polars as pl

from ..analysis.comparison_plots import exhibits
from ..analysis.comparisons_store import list_comparisons, read_comparison
from ..analysis.faithfulness import HELD_OUT
from ..analysis.gallery import Exhibit, GalleryOptions, removal_exhibit, sweep_exhibits
from ..analysis.plots import Figure
from ..analysis.region_gallery import path_exhibits, regions_known
from ..analysis.regions_store import read_parcellation
from ..analysis.scores import read_sweep
from ..analysis.series_gallery import series_exhibits
from ..errors import FeatlasError, UserError
from ..queries.blocks import drives_of
from ..queries.library import run_query
from ..queries.matches import list_matchings, read_matches, read_site_pairs
from ..queries.pages import block_members, chosen_blocks, nodes_of, partitions_of, swept
from ..queries.partitions import stored_parcellations
from ..queries.series import complete, list_series, read_series
from ..queries.statistics import StatisticsStore
from ..queries.subgraphs import find_run
from .features import named
from .source import Page, PageSource, plain, records, table

TABLE_ROWS = 2000
PAIRS_SHOWN = 500


class NoStatistics(UserError):
    """A page needs the statistics store, and the atlas has none."""


class StatisticsBusy(FeatlasError):
    """A page needs the statistics store, and another process is writing it."""


class NoSuchStudy(UserError):
    """The atlas has no sweep, partition, matching or comparison of this key."""


def _statistics(source: PageSource, what: str) -> StatisticsStore:
    if source.held:
        raise StatisticsBusy(f"{what} are kept in the statistics of the atlas, which another process is writing: try again when it is done")
    if source.statistics is None:
        raise NoStatistics(f"{what} are kept in the statistics of an atlas, and {source.atlas} has none")
    return source.statistics


def drawn(figure: Figure) -> Page:
    """A figure as plotly.js takes it: `data`, `layout`."""
    made = json.loads(figure.to_json())
    return {"data": made["data"], "layout": made["layout"]}


def exhibit_page(exhibit: Exhibit) -> Page:
    """An exhibit as plain values; of a long table the first rows, with how many there are."""
    return {
        "name": exhibit.name, "title": exhibit.title, "question": exhibit.question, "fixed": exhibit.fixed, "reading": exhibit.reading,
        "findings": list(exhibit.findings), "figure": drawn(exhibit.figure), "table": table(exhibit.table.head(TABLE_ROWS)),
        "n_rows": exhibit.table.height,
    }  # fmt: skip


def _exhibits(shown: Iterable[Exhibit]) -> list[Page]:
    return [exhibit_page(exhibit) for exhibit in shown]


# --- sweeps -----------------------------------------------------------------------------------------------------------


def sweep_page(source: PageSource, subject: str, baseline: str | None = None) -> Page:
    """A sweep over sizes, by what was swept: its exhibits by the run's metric, then by every other one. Raises `NoSuchStudy`."""
    statistics = _statistics(source, "sweeps")
    known = swept(statistics).filter(pl.col("subject") == subject)
    rows = known if baseline is None else known.filter(pl.col("baseline") == baseline)
    if rows.is_empty():
        raise NoSuchStudy(f"no sweep of {subject!r}" + (f" with baseline {baseline}" if baseline and known.height else "") + " in this atlas")
    row = rows.row(0, named=True)
    run = find_run(source.store, row["run"])
    values, sizes = read_sweep(statistics, row["run"], subject, row["baseline"])
    metrics = values["metric"].unique(maintain_order=True).to_list()
    first = run.metric if run.metric in metrics else metrics[0]
    splits = values["split"].unique().to_list()
    split = HELD_OUT if HELD_OUT in splits else splits[0]
    options = GalleryOptions(first, tuple(metric for metric in metrics if metric != first), split=split)
    shown = _exhibits(sweep_exhibits(values, sizes, options))
    return {"subject": subject, "run": run.key, "task": run.task, "model": run.model, **plain(row), "split": split, "exhibits": shown}


# --- regions ----------------------------------------------------------------------------------------------------------

_BLOCK_COLUMNS = (
    "key", "site", "layer", "kind", "index", "size", "label", "automatic_label", "mean_correlation", "mean_correlation_outside", "mean_cosine",
    "mean_cosine_outside", "frequency", "task", "task_share", "distinctive_task", "distinctive_lift", "attributed_task", "attributed_share",
)  # fmt: skip


def _lists(block: Mapping[str, Any]) -> Page:
    """A block with its lists read."""
    return {name: json.loads(block.get(name) or "[]") for name in ("top_features", "contexts")}


def _members(source: PageSource, parcellation: str) -> dict[str, list[str]]:
    grouped = block_members(source.store, parcellation).group_by("block", maintain_order=True).agg("key")
    return dict(grouped.iter_rows())


def region_page(source: PageSource, parcellation: str) -> Page:
    """A parcellation: `blocks` of the chosen levels with what is known of each and their `members` (dead ones are only counted), exhibits, drives.

    Raises `NoSuchStudy`.
    """
    partitions = partitions_of(source.store, parcellation)
    if not partitions:
        raise NoSuchStudy(f"no parcellation {parcellation!r} in the graph: `featlas analyze rois` finds them")
    members = _members(source, parcellation)
    blocks = [
        {**{name: block.get(name) for name in _BLOCK_COLUMNS}, **_lists(block), "members": members.get(block["key"], [])}
        for block in chosen_blocks(source.store, parcellation) if block["kind"] in ("roi", "head", "dead")
    ]  # fmt: skip
    for block in blocks:
        if block["kind"] == "dead":
            block["members"] = []
    paths: list[Page] = []
    findings: list[str] = []
    losses: Page | None = None
    if source.statistics is not None and parcellation in stored_parcellations(source.statistics)["parcellation"].to_list():
        stored = read_parcellation(source.statistics, parcellation)
        paths = _exhibits(path_exhibits(stored))
        known = regions_known(source.store, source.statistics, stored)
        findings = list(known.findings)
        losses = drawn(known.matrix) if known.matrix is not None else None
    first = partitions[0]
    blocks.sort(key=lambda block: (block["layer"], block["site"], -(block["size"] or 0)))
    return plain({
        "key": parcellation, "model": first.get("model"), "method": first.get("method"), "basis": first.get("basis"), "findings": findings,
        "sites": [partition.get("site") for partition in partitions], "settings": json.loads(first.get("settings") or "{}"), "blocks": blocks,
        "exhibits": paths, "losses": losses, "drives": table(drives_of(source.store, parcellation).head(TABLE_ROWS)),
    })  # fmt: skip


# --- communities ------------------------------------------------------------------------------------------------------


def community_page(source: PageSource, parcellation: str) -> Page:
    """The communities of an effective graph: `blocks` with their members, what they send to one another (`flows`), what tasks lose without each.

    Raises `NoSuchStudy`.
    """
    partitions = [row for row in partitions_of(source.store, parcellation) if row.get("basis") == "effective"]
    if not partitions:
        raise NoSuchStudy(f"no communities {parcellation!r} in the graph: `featlas analyze communities` finds them")
    first, members = partitions[0], _members(source, parcellation)
    blocks = sorted(chosen_blocks(source.store, parcellation), key=lambda block: block.get("index", -1))
    keys = pl.DataFrame([(block, key) for block, of in members.items() for key in of], schema={"block": pl.String, "key": pl.String}, orient="row")
    sites = keys.join(nodes_of(source.store, keys["key"].to_list()).select("key", "site", "layer"), on="key")
    by_site = sites.group_by("block", "site", "layer").len().sort("block", "layer", "site")
    shown = [
        {"key": block["key"], "index": block.get("index"), "size": block.get("size"), "label": block.get("label"), "task": block.get("task"),
         "task_share": block.get("task_share"), **_lists(block), "members": members.get(block["key"], []),
         "sites": [[site, n] for site, n in by_site.filter(pl.col("block") == block["key"]).select("site", "len").iter_rows()]}
        for block in blocks
    ]  # fmt: skip
    return plain({
        "key": parcellation, "partition": first["key"], "run": first.get("run"), "model": first.get("model"), "method": first.get("method"),
        "notes": json.loads(first.get("notes") or "{}"), "settings": json.loads(first.get("settings") or "{}"), "blocks": shown,
        "flows": _flows(source, first, keys), "exhibits": _exhibits(_removals(source, first, {block["key"]: block.get("index") for block in blocks})),
    })  # fmt: skip


def _flows(source: PageSource, partition: Mapping[str, Any], members: pl.DataFrame) -> list[list[Any]]:
    """`[from, to, edges, weight, abs_weight]`: the run's edges between communities, and inside each, summed."""
    edges = source.store.read_edges("INFLUENCES", run=str(partition.get("run"))).select("source", "target", "weight", "abs_weight")
    for end, name in (("source", "from"), ("target", "to")):
        edges = edges.join(members.rename({"key": end, "block": name}), on=end)
    summed = edges.group_by("from", "to").agg(pl.len().alias("edges"), pl.col("weight").sum(), pl.col("abs_weight").sum())
    return [plain(row) for row in summed.sort(["abs_weight", "from", "to"], descending=[True, False, False]).iter_rows()]


def _kept(exhibit: Exhibit) -> Exhibit:
    """An exhibit of removals said of parts that are kept alone."""
    reading = "Each cell is φ on the row's task with the column's part alone kept, over its 95 % interval: 1 is all of the effect, 0 nothing."
    question = "Is a part enough for the task that it belongs to?"
    return replace(exhibit, title="What each task keeps with a part alone", question=question, reading=reading)


def _removals(source: PageSource, partition: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[Exhibit]:
    """What is left of each task without a community, and with it alone, beside random nodes like it."""
    scores = run_query(source.store, "community_scores", {"partition": partition["key"]})
    if scores.is_empty():
        return []
    number = pl.col("community").replace_strict(dict(numbers), return_dtype=pl.Int64)
    scores = scores.filter(pl.col("task") != "pooled").with_columns(number.alias("number"))
    random = pl.when(pl.col("method") == partition.get("method")).then(pl.lit("")).otherwise(pl.lit("random like "))
    scores = scores.with_columns(pl.concat_str(random, pl.lit("community "), pl.col("number").cast(pl.String)).alias("removed"))
    shown: list[Exhibit] = []
    for kind, treatment in (("completeness", "removed"), ("faithfulness", "kept alone")):
        for (metric, baseline), rows in scores.filter(pl.col("kind") == kind).group_by("metric", "baseline", maintain_order=True):
            ordered = rows.sort("number", "removed", "task").select("task", "removed", "value", "low", "high", "n")
            fixed = f"each community {treatment}; {metric}, baseline {baseline}, run {partition.get('run')}"
            made = removal_exhibit(ordered, fixed, quantity="φ", name=f"communities-{kind}-{len(shown)}")
            shown.append(made if kind == "completeness" else _kept(made))
    return shown


# --- matchings --------------------------------------------------------------------------------------------------------


def matchings_of(source: PageSource) -> list[Page]:
    """The matchings of features that were kept, one row each."""
    return records(list_matchings(source.statistics)) if source.statistics is not None else []


def matching_page(source: PageSource, matching: str) -> Page:
    """A matching: `sites` (every pair of sites) and its best `pairs`, by name. Raises `NoSuchStudy`."""
    statistics = _statistics(source, "matchings")
    row = next((row for row in matchings_of(source) if row["matching"] == matching), None)
    if row is None:
        raise NoSuchStudy(f"no matching {matching!r} in this atlas: `featlas analyze match` makes them")
    pairs = read_matches(statistics, matching)
    best = pairs.sort(["score", "source", "target"], descending=[True, False, False]).head(PAIRS_SHOWN)
    names = named(source, nodes_of(source.store, [*best["source"], *best["target"]])).select("key", "name")
    for end in ("source", "target"):
        best = best.join(names.rename({"key": end, "name": f"{end}_name"}), on=end, how="left", maintain_order="left")
    return {**row, "sites": table(read_site_pairs(statistics, matching)), "pairs": table(best), "n_pairs": pairs.height}


# --- comparisons ------------------------------------------------------------------------------------------------------


def comparisons_of(source: PageSource) -> list[Page]:
    """The comparisons that were kept, one row each, the last made first."""
    if source.statistics is None:
        return []
    rows = list_comparisons(source.statistics)
    return [{**row, **{name: json.loads(row[name]) for name in ("settings", "notes")}} for row in records(rows)]


def comparison_page(source: PageSource, comparison: str) -> Page:
    """A comparison of two graphs, or joint partitions: its exhibits, and every frame of it that holds something, as `tables`.

    Raises `NoSuchComparison`.
    """
    found = read_comparison(_statistics(source, "comparisons"), comparison)
    frames = [(name, getattr(found, name)) for name in ("values", "links", "blocks")]
    tables = [[title, table(frame.head(TABLE_ROWS))] for title, frame in frames if frame.height]
    return plain({
        "key": found.key, "kind": found.kind, "a": found.a, "b": found.b, "matching": found.matching, "settings": found.settings,
        "notes": found.notes, "exhibits": _exhibits(exhibits(found)), "tables": tables,
    })  # fmt: skip


# --- series -----------------------------------------------------------------------------------------------------------


def series_of(source: PageSource) -> list[Page]:
    """The series of models that were measured, one row each."""
    return [
        {"series": record.key, "title": record.title, "axis": record.axis, "models": record.frames["members"].sort("x")["name"].to_list()}
        for record in list_series(source.atlas)
    ]


def series_page(source: PageSource, series: str) -> Page:
    """A series: its models, its exhibits, its settings. Raises `NoSeries`."""
    record = complete(read_series(source.atlas, series))
    members = record.frames["members"].sort("x").select("name", "x", "loss", "parameters", "model", "run")
    return plain({
        "series": record.key, "title": record.title, "axis": record.axis, "members": table(members), "settings": record.settings,
        "exhibits": _exhibits(series_exhibits(record)),
    })  # fmt: skip
