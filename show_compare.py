"""Comparisons as a person reads them: a verdict in sentences, then tables with every number beside its null."""

from typing import Any

import polars as pl

from . import console
from .analysis.comparison_records import Comparison
from .analysis.comparison_verdict import verdict

TITLES = {
    "coverage": "How much of either graph lies on matched nodes",
    "edges": "Edges between matched nodes",
    "profiles": "Degrees, strengths and paths (distances: 0 is the same)",
    "refinement": "Colour refinement, nodes labelled by site and kind",
    "partitions": "Agreement of partitions over matched nodes",
    "regions": "Graphs of regions",
    "joint": "Joint partitions",
}
_LINKS_SHOWN = 12
_COUNTS = ("communities of ", "regions of ", "regions that correspond")
"""How the quantities begin that are counts."""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}"


def _value(quantity: str, value: float | None) -> str:
    """A number of a table: counts whole, answers in words."""
    if value is not None and quantity == "fractionally isomorphic":
        return "yes" if value else "no"
    return f"{value:,.0f}" if value is not None and quantity.startswith(_COUNTS) else _number(value)


def _row(row: dict[str, Any], *, with_site: bool, with_null: bool) -> tuple[object, ...]:
    null = row["null"]
    beside = "" if not null else f"{_number(row['null_mean'])} ({_number(row['null_low'])} … {_number(row['null_high'])})"
    site = (row["site"] or "all",) if with_site else ()
    told = (*site, row["quantity"], _value(row["quantity"], row["value"]))
    if not with_null:
        return told
    z = "" if not null else "–" if row["z"] is None else f"{row['z']:+.1f}".replace("-", "−")
    p = "" if row["p"] is None else f"{row['p']:.3g}"
    return (*told, beside, z, p, null)


def show_values(values: pl.DataFrame) -> None:
    """The parts' tables; numbers of single sites follow those of the whole."""
    for part in values["part"].unique(maintain_order=True):
        own = values.filter(pl.col("part") == part)
        if part in ("coverage", "profiles"):  # the numbers of single sites are in the saved table
            own = own.filter((pl.col("site") == "") | ((pl.col("part") == "coverage") & (pl.col("value") < 1)))
        begins = part.partition(",")[0]
        console.heading(TITLES.get(begins, part) + part.removeprefix(begins).replace(",", ", with", 1))
        with_site = bool((own["site"] != "").any())
        with_null = bool((own["null"] != "").any())
        nulls = ("null's mean (middle 95 %)", "z", "p", "null") if with_null else ()
        columns = (*(("site",) if with_site else ()), "", "value", *nulls)
        console.table(columns, [_row(row, with_site=with_site, with_null=with_null) for row in own.iter_rows(named=True)])


def show_comparison(found: Comparison, as_json: bool = False) -> None:
    """A comparison of graphs: what it says, and its numbers."""
    if as_json:
        console.say_json(as_json_value(found))
        return
    if found.kind == "joint":
        show_joint(found)
        return
    console.heading(f"A: {found.a}")
    console.say(f"B: {found.b}")
    among = {"same": ", between the same sites", "all": ", over all sites"}.get(str(found.settings.get("match_sites")), "")
    of = f"matching {found.matching} of {found.model_a} and {found.model_b}{among}" if found.matching else f"the same nodes of {found.model_a}"
    console.say(f"nodes: {of}; {found.notes['pairs']:,} pairs, {found.notes['pairs_in_both']:,} with edges in both graphs")
    console.heading("What it says")
    for line in verdict(found):
        console.say(f"- {line}")
    show_values(found.values)
    console.say(
        "z: standard deviations of the null from its mean, positive where the graphs are more alike than chance. p: one-sided, the value counted\n"
        "among the draws; of degrees and strengths the probability of being as different, of all else as alike, under the null."
    )
    if found.links.height:
        shown = min(_LINKS_SHOWN, found.links.height)
        console.heading(f"Regions that the coupling joins ({shown} of {found.links.height}, from A's strongest region on; all weigh the same)")
        rows = found.links.head(_LINKS_SHOWN).select("source_label", "target_label", "weight").iter_rows()
        console.table(("region of A", "region of B", "mass"), [(a, b, f"{weight:.4f}") for a, b, weight in rows])
    for part, reason in found.notes.get("without", {}).items():
        console.say(f"without {part}: {reason}")


def as_json_value(found: Comparison) -> dict[str, Any]:
    """Everything, for machines."""
    fields = ("key", "kind", "a", "b", "run_a", "run_b", "model_a", "model_b", "matching", "settings", "notes")
    frames = ("values", "curves", "links") if found.kind == "graphs" else ("values", "blocks", "members")
    return {
        **{name: getattr(found, name) for name in fields}, "verdict": verdict(found), **{name: getattr(found, name).to_dicts() for name in frames}
    }  # fmt: skip


def show_joint(found: Comparison, n: int = 12, as_json: bool = False) -> None:
    """Joint partitions: how far both models' features are in the same blocks, and the blocks."""
    if as_json:
        console.say_json(as_json_value(found))
        return
    console.heading(f"Joint partitions {found.key} of {found.notes.get('source', '')}")
    console.say(f"A: {found.a}\nB: {found.b}")
    for line in verdict(found):
        console.say(f"- {line}")
    show_values(found.values)
    for (site_a, site_b), own in found.blocks.group_by("site_a", "site_b", maintain_order=True):
        shown = own.head(n)
        console.heading(f"{site_a} of A and {site_b} of B: {shown.height} of {own.height} blocks, the largest first")
        rows = [
            (row["block"], row["n_a"], row["n_b"], _number(row["shared"]), _number(row["null_mean"]), _number(row["r_a"]), _number(row["r_b"]),
             _number(row["r_between"]))
            for row in shown.iter_rows(named=True)
        ]  # fmt: skip
        console.table(("block", "of A", "of B", "shared", "by chance", "r inside A", "inside B", "between"), rows)
    for name, said in found.notes.get("verdicts", {}).items():
        console.say(f"{name.replace('|', ' and ')}: {said}")


def show_list(comparisons: pl.DataFrame, as_json: bool = False) -> None:
    """The comparisons that were made before."""
    if as_json:
        console.say_json(comparisons.to_dicts())
        return
    if comparisons.is_empty():
        console.say("no comparisons yet: `featlas compare RUN_A RUN_B` makes them, `featlas analyze joint` of aligned samples")
        return
    rows = [
        (row["comparison"], row["kind"], row["a"], row["b"], row["matching"], f"{row['finished']:%Y-%m-%d %H:%M}")
        for row in comparisons.iter_rows(named=True)
    ]  # fmt: skip
    console.table(("comparison", "of", "A", "B", "matching", "made (UTC)"), rows)
