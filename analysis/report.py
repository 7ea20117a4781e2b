"""One self-contained HTML page about a circuit: it opens offline, and nothing in it comes from anywhere else.

Every token, label and setting is escaped; plotly.js and the page's own script are inlined.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

import polars as pl

from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow, model_features, run_sequences
from .circuits import Circuit, Path, PathRule, site_summary, strongest_paths, top_nodes
from .notes import CONTEXTS, feature_notes, readable, strongest_contexts
from .plots import circuit_figure, embedded, flow_figure, plotly_script
from .region_gallery import RunRegions, regions_of_run


@dataclass(frozen=True)
class Report:
    """What the page says.

    `settings` are (name, value) of the run; `tasks` is as `task_summary` gives it; `notes` are of schema `notes.NOTES`;
    `commands` are what to try next; `tokens` those of the one sequence whose positions were kept; `regions` what is known of regions, if any are.
    """

    title: str
    subtitle: str
    circuit: Circuit
    notes: pl.DataFrame
    paths: Sequence[Path]
    rule: PathRule
    settings: Sequence[tuple[str, str]]
    tasks: pl.DataFrame
    commands: Sequence[str]
    max_edges: int = 150
    n_features: int = 25
    tokens: Sequence[str] | None = None
    regions: RunRegions | None = None


def render(report: Report) -> str:
    """The page as text, about 5 MB, nearly all of it plotly.js."""
    circuit = report.circuit
    page = Template(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    figure = circuit_figure(circuit, report.notes, max_edges=report.max_edges, tokens=report.tokens)
    return page.substitute(
        title=html.escape(report.title),
        subtitle=html.escape(report.subtitle),
        plotly=plotly_script(),
        numbers=_numbers(circuit),
        circuit=embedded(figure, "circuit"),
        flow=embedded(flow_figure(site_summary(circuit)), "flow"),
        features=_features(circuit, report.notes, report.n_features),
        rule=_RULES[report.rule],
        paths="".join(_path(path, circuit, report.notes, report.rule) for path in report.paths),
        regions=_regions(report.regions),
        tasks=_tasks(report.tasks),
        settings="".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in report.settings),
        commands=html.escape("\n".join(report.commands)),
        highlight=resources.files(__package__).joinpath("report.js").read_text(encoding="utf-8"),
    )


_RULES = {
    PathRule.PRODUCT: "A path's score is the product of its edges' shares: the part of everything entering the output that came this very way.",
    PathRule.BOTTLENECK: "A path's score is the strength of its weakest edge.",
}


def _numbers(circuit: Circuit) -> str:
    """The four numbers at the top."""
    shown = (("nodes", f"{circuit.n_nodes:,}"), ("edges", f"{circuit.n_edges:,}"), ("average degree", f"{circuit.average_degree:.1f}"))
    cells = [*shown, ("density", f"{circuit.density:.3g}"), (f"threshold, by {circuit.selection.by.value}", f"{circuit.selection.threshold:.3g}")]
    return "".join(f"<div><b>{value}</b>{html.escape(name)}</div>" for name, value in cells)


def _head(*columns: str) -> str:
    """A table's first row; a leading # marks a column of numbers."""
    cells = (f'<th class="number">{name[1:]}</th>' if name.startswith("#") else f"<th>{name}</th>" for name in columns)
    return f"<tr>{''.join(cells)}</tr>"


def _context(text: str) -> str:
    """One context, the feature's token marked."""
    return f'<span class="context">{html.escape(text).replace("【", "<mark>").replace("】", "</mark>")}</span>'


def _features(circuit: Circuit, notes: pl.DataFrame, n: int) -> str:
    """Table of the features with the most influence."""
    rows = top_nodes(circuit, n).join(notes, on="key", how="left", maintain_order="left")
    head = _head("feature", "site", "#influence", "#effect out", "#in / out", "contexts")
    lines = []
    for row in rows.iter_rows(named=True):
        name = f'<b>{html.escape(readable(row["name"] or row["key"], 40))}</b><br><span class="key">{html.escape(row["key"])}</span>'
        colour = "up" if row["out_strength"] >= 0 else "down"
        contexts = "".join(_context(text) for text in (row["contexts"] or [])[:3])
        lines.append(
            f'<tr><td>{name}</td><td>{html.escape(row["site"])}</td><td class="number">{row["influence"]:.1%}</td>'
            f'<td class="number"><span class="{colour}">{row["out_strength"]:+.3g}</span></td>'
            f'<td class="number">{row["n_in"]} / {row["n_out"]}</td><td>{contexts}</td></tr>'
        )
    return f"<table>{head}{''.join(lines)}</table>"


def _path(path: Path, circuit: Circuit, notes: pl.DataFrame, rule: PathRule) -> str:
    """One path as a row of nodes with the weights between them."""
    known = pl.DataFrame({"key": path.nodes, "pos": path.positions}).join(circuit.nodes, on=["key", "pos"], how="left", maintain_order="left")
    known = known.join(notes.select("key", "name"), on="key", how="left", maintain_order="left")
    score = f"{path.score:.2%}" if rule is PathRule.PRODUCT else f"{path.score:.3g}"
    parts = [f'<span class="score">{score}</span>']
    for i, row in enumerate(known.iter_rows(named=True)):
        kind = "node error" if row["kind"] == "error" else "node"
        parts.append(f'<span class="{kind}">{html.escape(readable(row["name"] or row["key"], 32))}<small>{html.escape(row["site"])}</small></span>')
        if i < len(path.weights):
            weight = path.weights[i]
            parts.append(f'<span class="{"up" if weight >= 0 else "down"}">{weight:+.2g} →</span>')
    return f'<div class="path">{"".join(parts)}</div>'


def _tasks(tasks: pl.DataFrame) -> str:
    """Table of the tasks and how well the model does on them."""
    head = _head("task", "#pairs", "#answer preferred", "#metric, clean", "#metric, corrupted")
    lines = [
        f'<tr><td>{html.escape(task)}</td><td class="number">{pairs}</td><td class="number">{"" if solved is None else f"{solved:.0%}"}</td>'
        f'<td class="number">{_signed(clean)}</td><td class="number">{_signed(corrupt)}</td></tr>'
        for task, pairs, solved, clean, corrupt in tasks.select("task", "pairs", "solved", "clean", "corrupt").iter_rows()
    ]
    return f'<table class="settings">{head}{"".join(lines)}</table>'


def _regions(found: RunRegions | None) -> str:
    """The section about regions of interest, nothing where none were found."""
    if found is None:
        return ""
    said = "".join(f"<li>{html.escape(finding)}</li>" for finding in found.findings)
    figures = [embedded(figure, name) for name, figure in (("region-paths", found.paths), ("region-losses", found.matrix)) if figure is not None]
    return (
        f'<h2>Regions</h2><p class="soft">Sets of features of a site that are active together: {html.escape(found.subtitle)}, parcellation '
        f"{html.escape(found.key)}. r inside and outside: mean correlation over pairs of its features, and of one of its features and another.</p>"
        f'<ul>{said}</ul><div class="wide">{"".join(figures)}</div>{_region_table(found.blocks)}'
    )


_SHOWN_REGIONS = 30


def _region_table(blocks: pl.DataFrame) -> str:
    """The largest regions, opened by a click."""
    head = _head("region", "#features", "label", "#r inside", "#outside", "#active", "for")
    number = lambda value: "" if value is None else f"{value:.3f}".replace("-", "−")
    percent = lambda value, form: "" if value is None else f"{value:{form}}"
    lines = []
    for row in blocks.sort("size", "site", "number", descending=[True, False, False]).head(_SHOWN_REGIONS).iter_rows(named=True):
        label, purpose = (html.escape(readable(row[name] or "", 60)) for name in ("label", "task"))
        cells = (number(row["correlation_inside"]), number(row["correlation_outside"]), percent(row["frequency"], ".1%"))
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        lines.append(
            f'<tr><td>{html.escape(row["site"])}/{row["number"]}</td><td class="number">{row["size"]:,}</td><td>{label}</td>{numbers}'
            f'<td>{purpose} {percent(row["task_share"], ".0%")}</td></tr>'
        )
    shown = f"the {len(lines)} largest of {blocks.height:,} regions" if blocks.height > len(lines) else f"{blocks.height:,} regions"
    return f'<details><summary>{shown}</summary><div class="wide"><table>{head}{"".join(lines)}</table></div></details>'


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def task_summary(sequences: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Per task of a run's sequences: `task, pairs, solved, clean, corrupt`.

    `clean` and `corrupt` are the metric's means on either text; `solved`, for the logit difference only, is the share of pairs whose
    clean text makes the right answer likelier than the wrong one.
    """
    solved = (pl.col("metric_clean") > 0).mean() if metric == "logit_diff" else pl.lit(None, dtype=pl.Float64)
    means = [pl.col("metric_clean").mean().alias("clean"), pl.col("metric_corrupt").mean().alias("corrupt")]
    return sequences.group_by("task").agg(pl.len().alias("pairs"), solved.alias("solved"), *means).sort("task")


_SETTINGS = (
    "key", "model", "task", "method", "steps", "metric", "baseline", "threshold", "max_edges", "aggregation", "seed",
    "n_sequences", "n_edges", "version",
)  # fmt: skip


@dataclass(frozen=True)
class PageOptions:
    """How much of it: paths, features in the table, edges in the drawing; and the commands to try next."""

    n_paths: int = 10
    n_features: int = 25
    max_edges: int = 150
    rule: PathRule = PathRule.PRODUCT
    commands: Sequence[str] = ()


def gather(store: GraphStore, statistics: StatisticsStore | None, run: RunRow, circuit: Circuit, options: PageOptions) -> Report:
    """Everything the page says about a circuit, from the graph and, where there is one, the statistics store of its atlas."""
    measured = statistics.latest_run(run.model, run.dictionaries) if statistics is not None else None
    features = model_features(store, run.model).join(circuit.nodes.select("key").unique(), on="key", how="semi")
    contexts = pl.DataFrame(schema=CONTEXTS)
    if statistics is not None and measured is not None:
        contexts = strongest_contexts(statistics, measured.run, features["key"].to_list())
    regions = regions_of_run(store, statistics, run) if statistics is not None else None
    settings = [(name, str(run.properties[name])) for name in _SETTINGS if run.properties.get(name) is not None]
    settings += [("dictionaries", ", ".join(f"{site}: {dictionary}" for site, dictionary in run.dictionaries.items()))]
    settings += [("statistics", f"{measured.run}: {measured.tokens:,} tokens of {measured.corpus}")] if measured is not None else []
    metric = run.metric if " " in run.metric else run.metric.replace("_", " ")  # "feature resid_11/123" names a site
    return Report(
        title=f"{run.model.partition('@')[0]}: {run.task.replace('+', ' + ')}", subtitle=f"effects on the {metric}, run {run.key}", circuit=circuit,
        notes=feature_notes(features, contexts, output=metric), paths=strongest_paths(circuit, options.n_paths, rule=options.rule), rule=options.rule,
        settings=settings, tasks=task_summary(run_sequences(store, run.key), run.metric), commands=options.commands, max_edges=options.max_edges,
        n_features=options.n_features, regions=regions,
    )  # fmt: skip
