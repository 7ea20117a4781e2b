"""A circuit as tables that a person reads, and as a page; what to try next."""

import shlex
from pathlib import Path

from . import console
from .analysis.circuits import PathRule, site_summary, top_nodes
from .analysis.notes import readable
from .analysis.report import Report, render
from .queries.subgraphs import STRONGEST_ON_OUTPUT

NEXT_COMMANDS = (
    "featlas query --list",
    "featlas analyze circuit --edges 100 --by weight",
    f"featlas query --cypher {shlex.quote(STRONGEST_ON_OUTPUT)}",
)


def show_circuit(report: Report, key: str | None) -> None:
    """A circuit as tables."""
    circuit = report.circuit
    console.heading(f"Circuit {key or '(not written)'}: {report.title}, {report.subtitle}")
    console.say(
        f"{circuit.n_nodes} nodes, {circuit.n_edges} edges with {circuit.selection.by.value} >= {circuit.selection.threshold:g}; "
        f"average degree {circuit.average_degree:.2f}, density {circuit.density:.3g}"
    )
    console.heading("Where the effect flows")
    sites = site_summary(circuit).reverse()
    rows = [(row["site"], row["features"], row["errors"], f"{row['flow']:.0%}", f"{row['error_flow']:.0%}") for row in sites.iter_rows(named=True)]
    console.table(("site", "features", "error nodes", "share of the flow", "of it by error nodes"), rows)
    console.heading("Features with the most influence")
    show_features(report)
    score = "part of all that enters the output" if report.rule is PathRule.PRODUCT else "strength of the weakest edge"
    console.heading(f"Strongest paths ({score})")
    show_paths(report)


def show_features(report: Report) -> None:
    """The most influential features by name, with a context each."""
    top = top_nodes(report.circuit, report.n_features).join(report.notes, on="key", how="left", maintain_order="left")
    rows = [
        (
            readable(row["name"], 36), row["site"], str(row["index"]), f"{row['influence']:.1%}", f"{row['out_strength']:+.3g}",
            readable(row["contexts"][0], 80) if row["contexts"] else "",
        )
        for row in top.iter_rows(named=True)
    ]
    console.table(("feature", "site", "index", "influence", "effect out", "strongest context"), rows)


def show_paths(report: Report) -> None:
    """The strongest paths, nodes by name with the weights between them."""
    names = dict(report.notes.select("key", "name").iter_rows())
    sites = dict(report.circuit.nodes.select("key", "site").iter_rows())
    for path in report.paths:
        nodes = [f"[{sites[key]}] {readable(names.get(key) or key, 28)}" for key in path.nodes]
        steps = [f"{node} ({weight:+.2g}) →" for node, weight in zip(nodes, path.weights)]
        score = f"{path.score:.2%}" if report.rule is PathRule.PRODUCT else f"{path.score:.3g}"
        console.say(f"  {score:>8}  {' '.join([*steps, nodes[-1]])}")


def write_report(report: Report, output: Path) -> None:
    """Save the page; raises `OutputFails`."""
    with console.saving(output):
        output.write_text(render(report), encoding="utf-8")
