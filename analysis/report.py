"""One self-contained HTML page about a circuit: it opens offline, and nothing in it comes from anywhere else.

Every token, label and setting is escaped; plotly.js and the page's own script are inlined.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

import polars as pl

from .circuits import Circuit, Path, PathRule, site_summary, top_nodes
from .notes import readable
from .plots import circuit_figure, embedded, flow_figure, plotly_script


@dataclass(frozen=True)
class Report:
    """What the page says.

    `settings` are (name, value) of the run; `tasks` has columns `task, pairs, accuracy, logit_diff`; `notes` are of schema
    `notes.NOTES`; `commands` are what to try next; `tokens` those of the one sequence whose positions were kept.
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
    head = _head("task", "#pairs", "#accuracy", "#mean logit difference")
    lines = [
        f'<tr><td>{html.escape(task)}</td><td class="number">{pairs}</td>'
        f'<td class="number">{accuracy:.0%}</td><td class="number">{difference:+.2f}</td></tr>'
        for task, pairs, accuracy, difference in tasks.select("task", "pairs", "accuracy", "logit_diff").iter_rows()
    ]
    return f'<table class="settings">{head}{"".join(lines)}</table>'
