"""A circuit, or a model's wiring, as tables that a person reads; what to try next."""

import shlex
from typing import TYPE_CHECKING, Any

from . import console
from .analysis.circuits import PathRule, site_summary, top_nodes
from .analysis.notes import marked, readable
from .analysis.summary import Summary
from .queries.subgraphs import STRONGEST_ON_OUTPUT

if TYPE_CHECKING:
    import polars as pl

    from .analysis.agreement import Agreement, AgreementOptions
    from .analysis.connectivities import Read
    from .analysis.selectivity import Selectivity
    from .ingest.cost import Cost
    from .ingest.pipeline import RunSummary
    from .ingest.structural import WeightSummary

NEXT_COMMANDS = (
    "featlas query --list",
    "featlas analyze circuit --edges 100 --by weight",
    f"featlas query --cypher {shlex.quote(STRONGEST_ON_OUTPUT)}",
)


def note_cost(cost: "Cost") -> None:
    """What a run will cost if nothing falls under the threshold, on standard error, before it starts."""
    tails = f", {cost.evaluations:,} runs of the model's tail" if cost.evaluations else ""
    console.note(
        f"{cost.sequences} sequences, {cost.rows:,} downstream nodes{tails}: about {_duration(cost.seconds)} of computing if all are expanded; "
        "--threshold and --max-edges leave some out"
    )


def _duration(seconds: float) -> str:
    """Roughly how long, for people."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


def show_ingest(summary: "RunSummary") -> None:
    """What an ingest of edges came to, and how far its approximations are off."""
    done = f"{summary.n_sequences - summary.n_skipped} sequences" + (f" ({summary.n_skipped} were done before)" if summary.n_skipped else "")
    console.say(f"run {summary.run}: {done}, {summary.n_edges:,} edges written, {summary.n_influences:,} after aggregation, {summary.seconds:.1f} s")
    tally = summary.tally
    if tally.rows:
        tails = f", {tally.evaluations:,} runs of the tail" if tally.evaluations else ""
        console.say(f"{tally.rows:,} downstream nodes expanded{tails}")
    if tally.interpolated:
        error = tally.interpolation_error / tally.interpolated
        exact = f"{tally.fallbacks:,} nodes computed exactly instead"
        console.say(f"interpolated first factors: relative error estimated at {error:.1e} at most, {exact}")
    if tally.tail_scale:
        console.say(f"half-precision tails: first factors off by {tally.tail_error / tally.tail_scale:.1e} of their size on a sample")


def show_circuit(report: Summary, key: str | None) -> None:
    """A circuit as tables."""
    circuit = report.circuit
    console.heading(f"Circuit {key or '(not written)'}: {report.title}, {report.subtitle}")
    console.say(
        f"{circuit.n_nodes} nodes, {circuit.n_edges} edges; average degree {circuit.average_degree:.2f}, density {circuit.density:.3g}\n"
        f"made of {circuit.selection.description}"
    )
    console.heading("Where the effect flows")
    sites = site_summary(circuit).reverse()
    rows = [(row["site"], row["features"], row["errors"], f"{row['flow']:.0%}", f"{row['error_flow']:.0%}") for row in sites.iter_rows(named=True)]
    console.table(("site", "features", "error nodes", "share of the flow", "of it by error nodes"), rows)
    console.heading("Features with the most influence")
    show_features(report)
    score = "part of all that enters the output" if report.options.rule is PathRule.PRODUCT else "strength of the weakest edge"
    console.heading(f"Strongest paths ({score})")
    show_paths(report)


def show_features(report: Summary) -> None:
    """The most influential features by name, with a context each."""
    top = top_nodes(report.circuit, report.options.n_features).join(report.notes, on="key", how="left", maintain_order="left")
    rows = [
        (
            readable(marked(row["name"], row["label_kind"]), 36), row["site"], str(row["index"]),
            f"{row['influence']:.1%}", f"{row['out_strength']:+.3g}",
            readable(row["contexts"][0], 80) if row["contexts"] else "",
        )
        for row in top.iter_rows(named=True)
    ]
    console.table(("feature", "site", "index", "influence", "effect out", "strongest context"), rows)


def show_paths(report: Summary) -> None:
    """The strongest paths, nodes by name with the weights between them."""
    names = {key: marked(name, kind) for key, name, kind in report.notes.select("key", "name", "label_kind").iter_rows()}
    sites = dict(report.circuit.nodes.select("key", "site").iter_rows())
    for path in report.paths:
        nodes = [f"[{sites[key]}] {readable(names.get(key) or key, 28)}" for key in path.nodes]
        steps = [f"{node} ({weight:+.2g}) →" for node, weight in zip(nodes, path.weights)]
        score = f"{path.score:.2%}" if report.options.rule is PathRule.PRODUCT else f"{path.score:.3g}"
        console.say(f"  {score:>8}  {' '.join([*steps, nodes[-1]])}")


def show_weights(summary: "WeightSummary", shares: "pl.DataFrame | None", *, has_text: bool) -> None:
    """The wires between each two sites, and which heads have most to do with the features of each."""
    console.heading(f"Wiring {summary.wiring}")
    rows = [
        (
            pair.source, pair.target, report.kind, report.paths, f"{report.edges:,}", f"{report.strongest:.3g}", f"{report.median_cosine:.3f}",
            f"{report.chance:.3f}", f"{report.beyond_chance:.0%}", "was there" if pair.skipped else "written",
        )
        for pair in summary.pairs
        for report in pair.reports
    ]  # fmt: skip
    columns = ("from", "to", "by", "paths", "wires", "strongest", "median |cosine|", "chance reaches", "beyond it", "edges")
    console.table(columns, rows)
    if not has_text:
        console.note("paths through MLPs were left out: their mean slopes need a text, --task or --corpus")
    if shares is not None and shares.height:
        console.heading("Heads with the greatest mean share in the features of a site (in brackets: in how many features they lead their layer)")
        console.table(("site", "heads", "even share", "layer.head: share"), _head_rows(shares))
    parts = [f"{summary.edges:,} edges and {summary.shares:,} heads' shares written"]
    parts += [f"means over {summary.tokens:,} tokens"] if summary.tokens else []
    console.say("\n" + ", ".join([*parts, f"{summary.seconds:.1f} s"]))


_ROLES = {"write": "write it", "value": "carry it on", "query": "look for others by it", "key": "find it"}


def _head_rows(shares: "pl.DataFrame") -> list[tuple[str, ...]]:
    """One row per site and role: the heads that have the greatest shares."""
    rows: list[tuple[str, ...]] = []
    for found in shares.partition_by("site", "role", maintain_order=True):
        heads = [f"{row['layer']}.{row['head']}: {row['share']:.0%} ({row['leads']:.0%})" for row in found.iter_rows(named=True)]
        rows.append((found["site"][0], _ROLES[found["role"][0]], f"{found['even'][0]:.0%}", ", ".join(heads)))
    return rows


_DEFINITIONS = {
    "integrated_gradients": "integrated gradients", "attribution_patching": "attribution patching", "gradient_product": "gradient product",
    "frozen": "frozen", "patching": "patching",
}  # fmt: skip


def show_definitions(table: "pl.DataFrame", edges: "pl.DataFrame") -> None:
    """How far definitions of an edge agree: with exact patching by kind of site, error nodes' edges apart, then all pairs of them."""
    columns = ("into", "chosen", "definition", "edges", "Spearman", "Pearson", "same sign", "difference", "top 10", "top 100")
    against = [row for row in table.to_dicts() if row["second"] == "patching"]
    for kind, title in (("features", "Against exact patching: edges between features"), ("errors", "Edges with an error node at an end")):
        rows = [row for row in against if row["edges"] == kind and (row["chosen"] == "all" or row["dest"] == "all")]
        if kind == "errors":
            rows = [row for row in rows if row["dest"] == row["chosen"] == "all"]
        if rows:
            console.heading(title)
            console.table(columns, [(row["dest"], row["chosen"], _DEFINITIONS[row["first"]], *_agreement_cells(row)) for row in rows])
    rows = [row for row in table.to_dicts() if (row["edges"], row["dest"], row["chosen"]) == ("features", "all", "all")]
    console.heading("Each with each: edges between features")
    both = [(_DEFINITIONS[row["first"]], _DEFINITIONS[row["second"]], *_agreement_cells(row)) for row in rows]
    console.table(("definition", "definition", *columns[3:]), both)
    clear = (edges["patching"].abs() > edges["rounding"]).sum() / len(edges)
    console.say(f"\n{len(edges):,} edges of {edges['sequence'].n_unique()} sequences; patching is above the metric's rounding on {clear:.0%} of them")


def _agreement_cells(row: dict[str, Any]) -> tuple[object, ...]:
    figures = ("spearman", "pearson", "sign", "difference", "top_10", "top_100")
    return (row["n"], *(None if row[name] is None else f"{row[name]:.3f}" for name in figures))


def show_connectivities(run: str, read: "Read", agreement: "Agreement", options: "AgreementOptions") -> None:
    """How far connectivities agree: a table for each two, a line for each pair of sites, their mean and its null; and what to know to read it."""
    from .analysis.agreement import POOLED

    for (first, second), of_kind in agreement.table.group_by("first", "second", maintain_order=True):
        console.heading(f"{first} · {second}")
        measures = of_kind["measure"].unique(maintain_order=True).to_list()
        shown = sorted((name for name in measures if name != "partial_signed"), key=lambda name: name.startswith("overlap"))
        lines = []
        for (source, target), of_sites in of_kind.group_by("source_site", "target_site", maintain_order=True):
            rows = [of_sites.filter(measure=name).to_dicts() for name in shown]
            name = POOLED if source == POOLED else f"{source} → {target}"
            lines.append((name, f"{of_sites['n_pairs'][0]:,}", *map(_agreement_value, rows)))
            if source == POOLED:
                lines.append(("relabelled", "", *map(_agreement_interval, rows)))
        console.table(("sites", "pairs", *(name.replace("_", " ") for name in shown)), lines)
    nulls = agreement.table["null"].unique(maintain_order=True).to_list()
    matched = f", ** also of those inside {options.bins} groups of like frequency" if len(nulls) > 1 else ""
    console.say(f"\nrelabelled: 95 % of {options.draws} relabellings of one side's features; * beyond them at a false discovery rate of 5 %{matched}")
    console.say(f"run {run}, {options.pairs} pairs{_agreement_basis(read, options)}")
    if read.n_other or read.n_outside:
        outside = f"; {read.n_outside:,} with a feature that is not live in the statistics" if read.n_outside else ""
        console.say(f"left out: {read.n_other:,} effective edges with an error node or the output at an end{outside}")
    for name, why in read.missing.items():
        console.note(f"without {name} connectivity: {why}")
    for source, target, n in agreement.left_out:
        console.note(f"{source} → {target} left out: too few pairs to compare ({n} effective edges)")
    if len(nulls) == 1:
        console.note("features have no frequencies: `featlas ingest statistics` measures them, for the partial correlations and the matched null")


def _agreement_value(rows: list[dict[str, Any]]) -> str:
    """A measure, with stars for the nulls that it is beyond, in their order."""
    if not rows:
        return ""
    beyond = [row["q"] is not None and row["q"] <= 0.05 for row in rows]
    digits = 3 if rows[0]["measure"] == "shared" else 2
    return f"{rows[0]['value']:.{digits}f}" + (" **" if len(rows) > 1 and all(beyond) else " *" if beyond[0] else "")


def _agreement_interval(rows: list[dict[str, Any]]) -> str:
    """The interval of a measure's first null."""
    return "" if not rows or rows[0]["p"] is None else f"{rows[0]['null_low']:.2f}…{rows[0]['null_high']:.2f}"


def _agreement_basis(read: "Read", options: "AgreementOptions") -> str:
    """Whose correlations they are; where absent values stand for 0, that is said."""
    functional = f"; correlations of statistics run {read.functional_run}" if read.functional_run else ""
    zeros = {"live": "an effective edge that was not kept counts as 0", "union": "an edge that is not stored counts as 0, which biases all measures"}
    zero = zeros.get(options.pairs.value)
    return functional + (f"; {zero}" if zero else "")


def show_selectivity(result: "Selectivity") -> None:
    """Both tasks after each removal, and where what was removed lies."""
    by_site = lambda frame, *columns: ", ".join(
        f"{' → '.join(row[:-1])} {row[-1]}" for row in frame.group_by(columns).len().sort(columns).iter_rows()
    )
    console.say(f"gender's features: {by_site(result.nodes, 'site')}")
    console.say(f"edges from them to the profession: {by_site(result.edges, 'source_site', 'target_site')}")
    interval = lambda row, name: f"[{row[name + 'low']:.2f}, {row[name + 'high']:.2f}]"
    rows = [
        (
            row["task"], row["removed"], row["n_removed"] or "", row["n"], f"{row['value']:.0%}", interval(row, ""), f"{row['margin']:+.2f}",
            "" if row["gap"] is None else f"{row['gap']:+.2f}", "" if row["gap"] is None else interval(row, "gap_"),
            f"{row['worst']:.0%}", row["worst_group"],
        )
        for row in result.table.iter_rows(named=True)
    ]  # fmt: skip
    columns = ("task", "removed", "number", "sequences", "accuracy", "95 %", "margin", "gap", "95 %", "worst", "group")
    console.table(columns, rows)
    console.say(
        f"removed nodes take their {result.options.baseline.value} baseline. margin: how far the right answer is ahead; gap: how much further it is "
        "where gender and profession go together as in the stereotype than in the same text with the gender turned round"
    )
