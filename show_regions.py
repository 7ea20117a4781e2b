"""Regions of interest as tables that a person reads."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import console
from .analysis.notes import readable
from .analysis.regions import APART

if TYPE_CHECKING:
    import polars as pl

    from .analysis.parcellation import SitePartition
    from .regions import Regions

_LABEL, _CONTEXT = 44, 64
"""Characters of a label, and of a context, that are shown."""


def show_list(parcellations: "pl.DataFrame", as_json: bool = False) -> None:
    """The regions that were found before, as `queries.partitions.stored_parcellations`."""
    if as_json:
        console.say_json(parcellations.to_dicts())
        return
    if parcellations.is_empty():
        console.say("no regions yet: `featlas analyze rois` finds them in samples, which `featlas ingest samples` takes")
        return
    rows = parcellations.select("parcellation", "method", "basis", "n_sites", "n_blocks", "samples", "model", "finished").to_dicts()
    lines = [
        (row["parcellation"], row["method"], f"{row['basis']}s", row["n_sites"], row["n_blocks"], row["samples"][:8], row["model"],
         f"{row['finished']:%Y-%m-%d %H:%M}")
        for row in rows
    ]  # fmt: skip
    console.table(("regions", "method", "of", "sites", "blocks", "samples", "model", "found (UTC)"), lines)


def show_regions(regions: "Regions", n: int) -> None:
    """Per site how many there are and whether they are more than chance and than the decoder's directions; then the `n` largest of each."""
    parcellation, description, samples = regions.parcellation, regions.description, regions.samples
    console.heading(f"Regions {parcellation.key}: {parcellation.method} of {parcellation.basis}s of {samples.source}, {samples.n_tokens:,} tokens")
    levels = {(row["site"], row["level"]): row for row in description.sites.iter_rows(named=True)}
    lines = [_site_line(own, levels.get((name, own.chosen))) for name, own in parcellation.sites.items()]
    columns = ("site", "live", "dead", "regions", "largest", "chosen by", "r inside", "outside", "cos inside", "outside", "r ~ cos", "AMI", "chance")
    console.table(columns, lines)
    console.say(
        "r and cos: mean correlation, and cosine of decoder rows, over pairs of features inside and across regions; r ~ cos: their rank correlation\n"
        "over pairs; AMI: agreement with clusters of the decoder's rows (0 by chance, 1 the same); chance: is it more than in shuffled samples?\n"
        "(p: Student's t of the gain in held-out likelihood among those of the shuffled copies) for: where a region is "
        + ("most attributed" if parcellation.basis == "attribution" else "most active, which is not what needs it (`ablate-rois` says that)")
    )
    for said in stood_in(parcellation.sites.values()):
        console.say(said)
    for name, own in parcellation.sites.items():
        _show_site(regions, own, n)
        others = [f"{level.n_blocks} ({level.rule})" for i, level in enumerate(own.levels) if i != own.chosen and len(level.labels)]
        if others:
            console.say(f"other levels of {name} that are kept: {'; '.join(others)}")
    console.say(f"\nnext: featlas query regions --param parcellation={parcellation.key[:8]}")


def stood_in(sites: Iterable["SitePartition"]) -> list[str]:
    """What is to be said of sites where another method stood in for the one asked for, each reason once."""
    found: dict[str, list[str]] = {}
    for own in sites:
        notes = own.notes
        if "instead_of" in notes:
            found.setdefault(f"the dense block model instead of {notes['instead_of']}: {notes['reason']}", []).append(own.site)
        elif "refits_instead_of" in notes:
            said = f"halves or shuffled samples by the dense block model, their scores do not compare: {notes['refits_reason']}"
            found.setdefault(said, []).append(own.site)
    return [f"{', '.join(sites)}: {said}" for said, sites in found.items()]


def _site_line(own: "SitePartition", row: Mapping[str, Any] | None) -> tuple[object, ...]:
    n_dead = own.d_sae - len(own.features)
    if row is None:
        return (own.site, len(own.features), n_dead, 0, *[""] * 9)
    level = own.levels[own.chosen]
    largest = int((level.labels == 0).sum())
    return (
        own.site, f"{row['n_live']:,}", f"{n_dead:,}", row["n_blocks"], largest, level.rule, _number(row["mean_correlation"]),
        _number(row["mean_correlation_outside"]), _number(row["mean_cosine"]), _number(row["mean_cosine_outside"]),
        _number(row["rank_correlation"]), _number(row["cosine_ami"]), _verdict(own.notes),
    )  # fmt: skip


def _verdict(notes: Mapping[str, Any]) -> str:
    """What shuffled samples say of a partition."""
    if "significant" not in notes:
        return "one block" if "verdict" in notes else "not tested"
    p = f" (p {notes['p']:.2g})" if notes.get("p") is not None else ""
    return ("more" if notes["significant"] else "no more") + p


def _show_site(regions: "Regions", own: "SitePartition", n: int) -> None:
    """The largest regions of a site with what they are for and where they are strongest."""
    import polars as pl

    here = (pl.col("site") == own.site) & (pl.col("level") == own.chosen)
    blocks = regions.description.blocks.filter(here).sort("size", "block", descending=[True, False])
    if blocks.is_empty():
        return
    first = regions.description.contexts.filter(here & (pl.col("rank") == 0)).select(
        "block", pl.concat_str(pl.col("before").list.tail(8).list.join(""), pl.lit("【"), "token", pl.lit("】"),
                               pl.col("after").list.head(4).list.join("")).alias("context")
    )  # fmt: skip
    shown = blocks.head(n).join(first, on="block", how="left", maintain_order="left")
    rest = f" of {blocks.height}" if blocks.height > shown.height else ""
    console.heading(f"{own.site}: {shown.height}{rest} region{'s' if blocks.height > 1 else ''}, the largest first")
    lines = [
        (
            f"{own.site}/{row['block']}", row["size"], readable(row["label"] or row["automatic_label"], _LABEL), _number(row["mean_correlation"]),
            _number(row["mean_correlation_outside"]), _number(row["mean_cosine"]), f"{row['frequency']:.1%}", f"{row['member_frequency']:.2%}",
            _task(row), readable(row["context"], _CONTEXT) if row["context"] else "",
        )
        for row in shown.iter_rows(named=True)
    ]  # fmt: skip
    console.table(("region", "size", "label", "r inside", "outside", "cos inside", "active", "each", "for", "strongest at"), lines)


def _task(row: Mapping[str, Any]) -> str:
    """The task of greatest share, and what sets the region apart where that is another."""
    if row["task"] is None:
        return ""
    share = f"{row['task']} {row['task_share']:.0%}"
    apart = row["distinctive_task"]
    return share if apart in (None, row["task"]) or row["distinctive_lift"] < APART else f"{share}; {apart} ×{row['distinctive_lift']:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
