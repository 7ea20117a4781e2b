"""A series of models on one page: what they can do, how faithful their circuits are, and when features and edges of the last model appear.

`series_exhibits` makes the figures with their questions from a record's frames; `series_page` puts them on a page that opens offline.
"""

from collections.abc import Sequence

import polars as pl

from ..queries.series import SeriesRecord
from .controls import Method
from .edge_overlap import PART as EDGES
from .edge_overlap import PERMUTED, REWIRED
from .faithfulness import ATTRIBUTION, POOLED
from .gallery import Exhibit, gallery
from .series_plots import Panel, lines_figure

SHARE = (-0.03, 1.03)  # limits of an axis of shares


def series_page(record: SeriesRecord, *, commands: Sequence[str] = ()) -> str:
    """The page as text."""
    names = record.frames["members"]["name"].to_list()
    subtitle = f"{len(names)} models by {record.axis}: {names[0]} to {names[-1]}"
    settings = [(name, _plain(value)) for name, value in record.settings.items()]
    return gallery(series_exhibits(record), record.title, subtitle=subtitle, settings=settings, commands=commands)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def series_exhibits(record: SeriesRecord) -> list[Exhibit]:
    """The figures that the record's frames allow, in the order in which they are read."""
    makers = (_abilities, _dictionaries, _faithfulness, _graphs, _features, _sites, _edges)
    return [exhibit for make in makers if (exhibit := make(record)) is not None]


def beside_last(record: SeriesRecord, frame: str) -> pl.DataFrame:
    """The rows of a frame of pairs in which a model stands beside the last."""
    return record.frames[frame].filter(pl.col("reference") == last(record))


def beside_previous(record: SeriesRecord, frame: str) -> pl.DataFrame:
    """The rows of a frame of pairs in which a model stands beside the one before it."""
    names = record.frames["members"].sort("x")["name"].to_list()
    steps = pl.DataFrame({"name": names[1:], "reference": names[:-1]}, schema={"name": pl.String, "reference": pl.String})
    return record.frames[frame].join(steps, on=["name", "reference"], how="semi")


def last(record: SeriesRecord) -> str:
    """The name of the last model."""
    return str(record.frames["members"].sort("x")["name"][-1])


def matched_share(sites: pl.DataFrame) -> tuple[float | None, float | None]:
    """The share of a model's live features that have a counterpart on the same site of the other, and what chance gives; None without such sites."""
    same = sites.filter(pl.col("site_a") == pl.col("site_b"))
    live = int(same["n_a"].sum())
    return (float(same["n_matched"].sum()) / live, float((same["null_share"] * same["n_a"]).sum()) / live) if live else (None, None)


def solved_from(record: SeriesRecord, level: float = 0.9) -> pl.DataFrame:
    """`task`, and the first place from which on accuracy stays at least at `level`; null where it never does."""
    tasks = record.frames["tasks"].filter(pl.col("label").is_null()).sort("x", descending=True)
    stays = (pl.col("accuracy") >= level).cast(pl.Int8).cum_min().over("task").cast(pl.Boolean)
    from_place = tasks.with_columns(stays.alias("stays")).group_by("task", maintain_order=True).agg(
        pl.col("x").filter(pl.col("stays")).min().alias("x"), pl.col("name").filter(pl.col("stays")).last().alias("name")
    )  # fmt: skip
    return from_place.sort("x", nulls_last=True)


def _abilities(record: SeriesRecord) -> Exhibit:
    tasks = record.frames["tasks"].filter(pl.col("label").is_null())
    accuracy = tasks.select("x", "name", pl.col("task").alias("line"), pl.col("accuracy").alias("value"))
    margin = tasks.select("x", "name", pl.col("task").alias("line"), pl.col("logit_diff").alias("value"))
    panels = [Panel("answer preferred to the wrong answer", accuracy, "share of pairs", SHARE), Panel("by how much", margin, "logit difference")]
    members = record.frames["members"].drop_nulls("loss")
    if members.height:
        loss = members.select("x", "name", pl.lit("loss").alias("line"), pl.col("loss").alias("value"))
        panels.append(Panel("loss on held-out texts", loss, "nats per token"))
    found = [
        f"{task} is solved from {name} on (accuracy at least 90 %)" if name is not None else f"{task} is never solved (accuracy below 90 %)"
        for task, name in solved_from(record).select("task", "name").iter_rows()
    ]
    return Exhibit(
        "abilities", "What the models can do", "Which task is solved when?", "the same pairs of each task for every model",
        "A share of one half is chance.", lines_figure(panels, axis=record.axis, title="What the models can do", columns=3), tasks, found,
    )  # fmt: skip


def _dictionaries(record: SeriesRecord) -> Exhibit | None:
    quality = record.frames["quality"]
    if quality.is_empty():
        return None
    names = {"fvu": ("unexplained variance (FVU)", "share"), "l0": ("active features (L0)", "per position"), "dead_share": ("dead features", "share")}
    lines = {column: quality.select("x", "name", pl.col("site").alias("line"), pl.col(column).alias("value")) for column in names}
    panels = [Panel(title, lines[column], unit) for column, (title, unit) in names.items()]
    return Exhibit(
        "dictionaries", "How good the dictionaries are", "Do differences between models come from their dictionaries?", "the task's clean prompts",
        "A dictionary that explains less leaves more to the error nodes.",
        lines_figure(panels, axis=record.axis, title="The dictionaries", columns=3), quality,
    )  # fmt: skip


_DETERMINED = (pl.col("high") - pl.col("low")).fill_null(float("inf")) <= 1.0


def _faithfulness(record: SeriesRecord) -> Exhibit:
    rows = record.frames["areas"].filter(pl.col("area") == "CPR")
    chance = rows.filter(pl.col("method") == Method.RANDOM_EDGES.value).select("x", "task", pl.col("value").alias("null"))
    ours = rows.filter(pl.col("method") == ATTRIBUTION).join(chance, on=["x", "task"], how="left")
    cpr = ours.filter(_DETERMINED).select("x", "name", pl.col("task").alias("line"), "value", "low", "high", "null")
    points = record.frames["faithfulness"].filter(pl.col("method") == ATTRIBUTION)
    percent = (pl.col("share") * 100).round_sig_figs(1).cast(pl.String).str.strip_suffix(".0") + pl.lit(" % of the edges")
    shown = points.filter((pl.col("task") == POOLED) & (pl.col("share") > 0) & _DETERMINED)
    by_share = shown.select("x", "name", percent.alias("line"), "value", "low", "high")
    gap = (pl.col("full_value") - pl.col("empty_value")).alias("value")
    effect = points.filter(pl.col("share") >= 1.0).select("x", "name", pl.col("task").alias("line"), gap)
    panels = [
        Panel("CPR: mean φ over the share of edges kept", cpr, "φ", _limits(cpr)),
        Panel("φ by what is kept, tasks pooled", by_share, "φ", _limits(by_share)),
        Panel("what there is to explain: m(M) − m(∅)", effect, "metric"),
    ]
    return Exhibit(
        "faithfulness", "How faithful the circuits are", "From when on does a small part of the graph do what the whole model does?",
        "edge ablation to the run's own baseline, sequences that the circuits were not found on; φ is a ratio of means; bands: bootstrap, 95 %",
        "φ is 1 for the whole model and 0 for none of it; dotted: random edges of equal number. Before a task is solved there is nothing to explain, "
        "and φ is a ratio of two small numbers: points whose interval is wider than 1 are left out (the table has them).",
        lines_figure(panels, axis=record.axis, title="How faithful the circuits are", columns=3), rows,
    )  # fmt: skip


def _limits(frame: pl.DataFrame) -> tuple[float, float]:
    """φ from a little below 0 to a little above 1, more where values lie there; single outliers leave the axis as it is."""
    values = frame["value"].drop_nulls()
    low, high = (float(values.quantile(q) or 0.0) for q in (0.1, 0.9)) if len(values) else (0.0, 1.0)
    return min(-0.1, low - 0.1), max(1.05, high + 0.1)


def _graphs(record: SeriesRecord) -> Exhibit:
    numbers = record.frames["graphs"]
    one = lambda column, name: numbers.select("x", "name", pl.lit(name).alias("line"), pl.col(column).alias("value"))
    spread = pl.concat([one("edges", "edges"), one("effective_edges", "effective edges")], how="vertical_relaxed")
    between = pl.concat_str("source_site", pl.lit(" → "), "target_site").alias("line")
    flow = record.frames["flow"].select("x", "name", between, pl.col("share").alias("value"))
    panels = [
        Panel("edges", spread, "edges", log=True),
        Panel("strength into the output from error nodes", one("error_share", "error nodes"), "share", SHARE),
        Panel("where the strength lies", flow, "share", SHARE),
    ]
    return Exhibit(
        "graphs", "How the graph grows", "Does attribution gather on fewer edges?",
        "edges above the run's threshold, on paths from an input to the output",
        "Effective edges: exp of the entropy of the edges' shares of all strength (Hill number of order 1). Few effective ones of many edges: "
        "attribution is concentrated.",
        lines_figure(panels, axis=record.axis, title="How the graph grows", columns=3), numbers,
    )  # fmt: skip


def _features(record: SeriesRecord) -> Exhibit | None:
    if "sites" not in record.frames:
        return None
    same = pl.col("site_a") == pl.col("site_b")
    panels = []
    for title, rows in (("beside the last", beside_last(record, "sites")), ("beside the one before", beside_previous(record, "sites"))):
        columns = (pl.col("site_a").alias("line"), pl.col("share_a").alias("value"), pl.col("null_share").alias("null"))
        panels.append(Panel(f"features matched, {title}", rows.filter(same).select("x", "name", *columns), "share of live features", SHARE))
    return Exhibit(
        "features", "When the last model's features appear", "What share of features has a counterpart in the last model, or in the one before?",
        "the same site of both models, prompts of the same task as the edges; counterparts are mutual nearest neighbours by the correlation of "
        "activations, beyond chance",
        "Dotted: what chance gives, the text of one model shifted against the other's.",
        lines_figure(panels, axis=record.axis, title="When features appear"), record.frames["sites"],
    )  # fmt: skip


def _sites(record: SeriesRecord) -> Exhibit | None:
    if "sites" not in record.frames or record.frames["sites"]["cka"].is_null().all():
        return None
    same = beside_last(record, "sites").filter(pl.col("site_a") == pl.col("site_b"))
    panels = [
        Panel(title, same.select("x", "name", pl.col("site_a").alias("line"), pl.col(column).alias("value")), "similarity", SHARE)
        for column, title in (("cka", "linear CKA"), ("svcca", "SVCCA"))
    ]
    return Exhibit(
        "sites", "How alike the representations are", "When is what a layer holds what it holds in the last model?",
        "raw values of the same site on the same prompts, beside the last model",
        "CKA is dominated by directions of large variance, SVCCA counts all that hold 99 % of it alike. Neither is of features.",
        lines_figure(panels, axis=record.axis, title="How alike the representations are"), same,
    )  # fmt: skip


SHARED_EDGES = "weighted Jaccard, mean over sizes"
"""The number of a comparison that says in one how much two graphs share, without asking for a size."""
RANKS = "Spearman, all edges"
"""Whether edges that are strong in one graph are strong in the other; an edge that one lacks has strength 0 there."""
_LINES = {"shared": "edges shared", REWIRED: "if rewired", PERMUTED: "if counterparts are exchanged"}


def _shared_lines(rows: pl.DataFrame, quantity: str | None = None) -> pl.DataFrame:
    """A number of shared edges, and what two kinds of chance give, as three lines."""
    found = rows.filter((pl.col("part") == EDGES) & (pl.col("quantity") == (quantity or SHARED_EDGES)))
    shared = found.unique(["x", "name"], maintain_order=True).with_columns(pl.lit("shared").alias("null"), pl.col("value").alias("null_mean"))
    nulls = found.filter(pl.col("null").is_in([REWIRED, PERMUTED]))
    lines = pl.concat([shared.with_columns(pl.lit(None, pl.Float64).alias("null_low"), pl.lit(None, pl.Float64).alias("null_high")), nulls])
    columns = (pl.col("null_mean").alias("value"), pl.col("null_low").alias("low"), pl.col("null_high").alias("high"))
    return lines.select("x", "name", pl.col("null").replace_strict(_LINES).alias("line"), *columns)


def _edges(record: SeriesRecord) -> Exhibit | None:
    if "values" not in record.frames or beside_last(record, "values").is_empty():
        return None
    panels = []
    for title, rows in (("beside the last", beside_last(record, "values")), ("beside the one before", beside_previous(record, "values"))):
        panels.append(Panel(f"edges shared, {title}", _shared_lines(rows), "weighted Jaccard", SHARE))
    whole = (pl.col("part") == "coverage") & pl.col("quantity").str.starts_with("strength of") & (pl.col("site") == "")
    covered = beside_last(record, "values").filter(whole).select("x", "name", pl.col("quantity").alias("line"), "value")
    panels.append(Panel("strength between matched nodes", covered, "share", SHARE))
    panels.append(Panel("ranks of all edges, beside the last", _shared_lines(beside_last(record, "values"), RANKS), "Spearman's ρ", (-1.03, 1.03)))
    return Exhibit(
        "edges", "When the last model's edges appear", "Is what drives what in the last model already there?",
        "edges between matched features; strengths as shares of each graph's; by chance: the other graph rewired with its degrees and layers kept, "
        "or counterparts exchanged at random inside their sites",
        "Weighted Jaccard over sizes from one to all edges, each decade of sizes alike. Where nearly all pairs are joined, rewiring changes nothing: "
        "then exchanged counterparts say what chance gives.",
        lines_figure(panels, axis=record.axis, title="When edges appear"), record.frames["values"],
    )  # fmt: skip
