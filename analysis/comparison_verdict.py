"""What a comparison says, in sentences: each names its number, what chance gives, and how sure that is."""

from typing import Any

import polars as pl

from .comparison_records import Comparison
from .edge_overlap import PERMUTED, REWIRED

SURE = 0.05
"""p at or below which a number is called more than chance."""


def verdict(found: Comparison) -> list[str]:
    """The sentences, the most important first."""
    return _joint(found) if found.kind == "joint" else [*_covered(found), *_edges(found), *_shape(found), *_partitions(found), *_regions(found)]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}".replace("-", "−")


def _beside(row: dict[str, Any], percent: int | None = None) -> str:
    """The null and what follows of it. percent: digits after the point where the value is told in percent."""
    if not row["null"] or row["null_mean"] is None:
        return ""
    z = "" if row["z"] is None else f", z = {row['z']:+.1f}".replace("-", "−")
    mean = _number(row["null_mean"]) if percent is None else f"{row['null_mean']:.{percent}%}"
    return f" (by chance, {row['null']}: {mean}{z}, p = {row['p']:.2g})"


def _excess(row: dict[str, Any]) -> float | None:
    """How far a number is from chance to 1."""
    return None if row["null_mean"] is None or row["null_mean"] >= 1 else (row["value"] - row["null_mean"]) / (1 - row["null_mean"])


def _fixed(row: dict[str, Any]) -> bool:
    """Whether every draw of the null is the data themselves: then it leaves nothing to tell apart."""
    return row["z"] is None and row["null_mean"] is not None and abs(row["value"] - row["null_mean"]) < 1e-9


def _more(row: dict[str, Any]) -> bool:
    return row["p"] is not None and row["p"] <= SURE


def _too_few(found: Comparison, row: dict[str, Any]) -> bool:
    """Whether no p of so few draws could be small: then a number that is not sure says nothing."""
    return not _more(row) and 1 / (1 + int(found.settings.get("draws", 0))) > SURE


def _covered(found: Comparison) -> list[str]:
    rows = [found.value("coverage", f"strength of {side} between matched nodes") for side in "AB"]
    if any(row is None for row in rows):
        return []
    parts = [float(row["value"]) for row in rows if row is not None]
    if min(parts) > 0.9995:
        return []
    return [f"Only what lies on matched nodes is compared: {parts[0]:.0%} of A's strength and {parts[1]:.0%} of B's."]


def _edges(found: Comparison) -> list[str]:
    plain, weighted = (found.value("edges", name, null=REWIRED) or found.value("edges", name) for name in ("Jaccard", "weighted Jaccard"))
    if plain is None or weighted is None or plain["value"] is None:
        return []
    said = [
        f"Of all edges of either graph {plain['value']:.1%} are in both{_beside(plain, 1)}; weighted by strength {weighted['value']:.1%}"
        f"{_beside(weighted, 1)}."
    ]
    signs, rank = found.value("edges", "sign agreement"), found.value("edges", "Spearman, shared edges")
    if plain["value"] > 1 - 1e-12 and weighted["value"] > 1 - 1e-9:
        agree = 1.0 if signs is None or signs["value"] is None else signs["value"]
        opposite = "" if agree == 1 else f", but only {agree:.0%} of them have the same sign"
        return [f"The graphs have the same edges with the same strengths{opposite}."]
    if weighted["null"] and _too_few(found, weighted):
        said.append(f"{found.settings['draws']} draws are too few to say whether that is more than chance: --draws 20 or more can.")
    elif weighted["null"]:
        moved = found.value("edges", "weighted Jaccard", null=PERMUTED)
        beyond = [name for name, row in (("degrees and layers", weighted), ("which nodes they use", moved)) if row is not None and _more(row)]
        if _fixed(weighted):
            said.append("Rewiring finds no edge of B to move: whether they share more than degrees and layers bring about cannot be said.")
        share = None if _fixed(weighted) else _excess(weighted)
        excess = f"; of what they could share beyond degrees and layers they share {share:.1%}".replace("-", "−") if share is not None else ""
        more = f"They share more than {' and more than '.join(beyond)} bring about" if beyond else "They share no more than chance brings about"
        if beyond or not _fixed(weighted):
            said.append(f"{more}{excess}.")
    if signs is not None and signs["value"] is not None and signs["n"]:
        order = "" if rank is None or rank["value"] is None else f", and their strengths are ordered alike by ρ = {_number(rank['value'])}"
        said.append(f"Of the {signs['n']:,} shared edges {signs['value']:.0%} have the same sign{order}.")
    return said


def _shape(found: Comparison) -> list[str]:
    said = []
    degrees = [found.value("profiles", f"edges {way}, KS") for way in ("in", "out")]
    if all(row is not None and row["value"] is not None for row in degrees):
        differ = [way for way, row in zip(("in", "out"), degrees, strict=True) if row is not None and _more(row)]
        said.append(f"Degrees {' and '.join(differ)} differ between the graphs." if differ else "Degrees differ no more than by chance.")
    same = found.value("refinement", "fractionally isomorphic")
    if same is not None and same["value"] is not None:
        rounds = f"{same['n']} round{'s' if same['n'] != 1 else ''}"
        shared = found.value("refinement", "shared classes after 1 round")
        after = "" if shared is None else f"; after one round {shared['value']:.1%} of the nodes are in shared classes{_beside(shared, 1)}"
        verdict = "fractionally isomorphic" if same["value"] else "not fractionally isomorphic"
        said.append(f"As graphs with sites for labels they are {verdict} ({rounds} of colour refinement){'' if same['value'] else after}.")
    return said


def _partitions(found: Comparison) -> list[str]:
    rows = [(what, found.value("partitions", f"{what}, AMI")) for what in ("regions", "communities")]
    return [
        f"Their {what} agree {'more than chance' if _more(row) else 'no more than chance' if row['null'] else ''}: AMI {_number(row['value'])}"
        f"{_beside(row)}."
        for what, row in rows if row is not None and row["value"] is not None
    ]  # fmt: skip


def _regions(found: Comparison) -> list[str]:
    said = []
    row = found.value("regions", "edges between regions, weighted Jaccard")
    if row is not None and row["value"] is not None:
        said.append(f"What corresponding regions drive has a weighted Jaccard index of {_number(row['value'])}{_beside(row)}.")
    row = found.value("regions", "fused Gromov–Wasserstein")
    if row is not None and row["value"] is not None:
        said.append(f"The graphs of regions lie {_number(row['value'])} apart by fused Gromov–Wasserstein{_beside(row)}.")
    return said


def _joint(found: Comparison) -> list[str]:
    rows = found.values.filter((pl.col("part") == "joint") & (pl.col("quantity") == "shared"))
    said = [
        f"{row['site']}: " + (
            "no blocks were found in the joint correlations, so that nothing can be said of what is shared." if row["value"] is None
            else f"{row['value']:.1%} of both models' features lie in the same blocks{_beside(row, 1)}."
        )
        for row in rows.iter_rows(named=True)
    ]  # fmt: skip
    tested = [row for row in rows.iter_rows(named=True) if row["value"] is not None and row["p"] is not None]
    if tested and all(_too_few(found, row) for row in tested):
        draws = int(found.settings.get("draws", 0))
        few = f"{draws} draw{'s are' if draws != 1 else ' is'} too few to say whether that is more than chance"
        said.append(f"{few}: no p can be below {1 / (1 + draws):.2g}; --draws 19 or more can reach {SURE:g}.")
    return said
