"""What ablation says of regions, as tables that a person reads."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from . import console
from .analysis.faithfulness import CIRCUIT, COMPLEMENT, Averaging
from .analysis.parcellation import Parcellation
from .analysis.region_study import RANDOM, REGIONS
from .analysis.study import Ablation
from .region_verdict import RegionVerdict
from .show_ablation import number


def show_verdict(verdict: RegionVerdict, parcellation: Parcellation, names: dict[str, str], n: int) -> None:
    """Everything that was measured, with what it is held against; `names` are what units are called."""
    study = verdict.study
    console.heading(f"Regions {parcellation.key} ({parcellation.method}, {parcellation.basis}s) under ablation")
    console.say(
        f"run {study.run.key}: attributions on {verdict.n_found} sequences, tested on {verdict.n_tested} held-out; metric {verdict.metric}, "
        f"baseline {study.baseline_name}; φ is the ratio of means, with 95 % bootstrap intervals"
    )
    console.say(_partitions(verdict))
    _show_kept(verdict, CIRCUIT, "Only the strongest units alive (node ablation)")
    _show_kept(verdict, COMPLEMENT, "The strongest units cut, in order of attribution (what is left)")
    _show_compared(verdict)
    _show_circuits(verdict)
    _show_matrix(verdict, names, n)
    _show_selectivity(verdict)
    _show_drives(verdict, names, n)


def _partitions(verdict: RegionVerdict) -> str:
    """Who competes, with how many units, and what other sites' nodes are."""
    counts = {own.method: int((own.live > 0).sum()) for own in verdict.competitors}
    said = ", ".join(f"{method} ({n:,})" for method, n in counts.items())
    whole = [name.removesuffix("/all") for name in verdict.regions.units.names if name.endswith("/all")]
    rest = f"; all features of {', '.join(whole)}, which was not partitioned, are one unit in every partition" if whole else ""
    return (
        f"{said}; error nodes, and each site's dead features together, are units too: edges join them as the others, but they "
        f"are not chosen and stay alive whatever is kept or cut by nodes{rest}"
    )


def _rows(verdict: RegionVerdict, ablation: Ablation, part: str) -> pl.DataFrame:
    own = (pl.col("ablation") == ablation.value) & (pl.col("part") == part) & (pl.col("metric") == verdict.metric)
    return verdict.table.filter(own & (pl.col("averaging") == Averaging.RATIO_OF_MEANS.value))


def _show_kept(verdict: RegionVerdict, part: str, title: str) -> None:
    """φ by share of the live features, a column for each partition."""
    rows = _rows(verdict, Ablation.NODE, part)
    if rows.is_empty():
        return
    console.heading(title)
    methods = list(dict.fromkeys(own.method for own in verdict.competitors))
    cells = {(method, share): found for method, share, *found in
             rows.select("method", "share", "value", "low", "high", "n_units", "n_features").iter_rows()}  # fmt: skip
    shares = sorted({share for _, share in cells})
    shown = lambda method, share: _cell(cells.get((method, share)))
    console.table(("share of live features", *methods), [(f"{share:.0%}", *(shown(method, share) for method in methods)) for share in shares])
    draws = " (means over draws)" if verdict.options.random_draws > 1 else ""
    console.say(
        f"in brackets the interval, then how many units that takes and how many live features they have{draws}; at 100 % every unit that has any "
        "attribution to the metric"
    )


def _cell(found: Sequence[Any] | None) -> str:
    if found is None:
        return ""
    value, low, high, units, features = found
    return f"{number(value, low, high)} {units:,.0f} / {features:,.0f}"


def _show_compared(verdict: RegionVerdict) -> None:
    """At equal numbers of live features: whose φ is higher than the regions'."""
    rows = []
    for what, frame in (("kept", verdict.compared), ("cut", verdict.compared_cut)):
        decided = frame.group_by("method", maintain_order=True).agg(
            pl.col("difference").mean(), (pl.col("low") > 0).sum().alias("above"), (pl.col("high") < 0).sum().alias("below"), pl.len().alias("n")
        )
        rows += [(what, m, number(d), f"{above} of {n}", f"{below} of {n}") for m, d, above, below, n in decided.iter_rows()]
    if rows:
        console.heading("Other partitions against the regions, at equal numbers of live features")
        console.table(("units", "partition", "mean φ − regions' φ", "sizes where higher", "sizes where lower"), rows)
        console.say("kept: higher is better; cut: lower is more damage. Only sizes whose interval leaves out 0 count.")


def _show_circuits(verdict: RegionVerdict) -> None:
    """Circuits of units under edge ablation."""
    rows = _rows(verdict, Ablation.EDGE, CIRCUIT).sort("method", "size")
    if rows.is_empty():
        return
    left = {(m, s): v for m, s, v in _rows(verdict, Ablation.EDGE, COMPLEMENT).select("method", "size", "value").iter_rows()}
    console.heading("Circuits of units (edge ablation)")
    columns = rows.select("method", "size", "n_edges", "n_units", "n_features", "value", "low", "high").iter_rows()
    console.table(
        ("partition", "edges kept", "edges on paths", "units", "live features", "φ", "completeness"),
        [(m, s, f"{e:,.0f}", f"{u:,.0f}", f"{f:,.0f}", number(v, low, high), number(left.get((m, s)))) for m, s, e, u, f, v, low, high in columns],
    )


def _show_matrix(verdict: RegionVerdict, names: dict[str, str], n: int) -> None:
    """The task × block matrix: what share of its effect each task loses without a block."""
    matrix = verdict.matrix.filter(pl.col("method") == REGIONS)
    if matrix.is_empty():
        return
    tasks = matrix["task"].unique().sort().to_list()
    greatest = matrix.group_by("removed", maintain_order=True).agg(pl.col("value").abs().max().alias("most"))
    order = greatest.sort("most", descending=True, nulls_last=True)["removed"].head(n)
    cells = {(removed, task): number(value, low, high) for removed, task, value, low, high in
             matrix.select("removed", "task", "value", "low", "high").iter_rows()}  # fmt: skip
    sizes = dict(matrix.select("removed", "n_features").iter_rows())
    console.heading(f"Which region breaks which task: the share of its effect that is lost without it ({len(sizes)} regions, one at a time)")
    units = verdict.regions.units.names
    most_to = {units[unit]: f"{task} {share:.0%}" for unit, task, share in verdict.regions.purposes.iter_rows()}
    rows = [
        (names.get(removed, removed), sizes[removed], most_to.get(removed, ""), *(cells.get((removed, task), "") for task in tasks))
        for removed in order
    ]
    console.table(("region", "features", "most attributed to", *(f"{task} loses" for task in tasks)), rows)
    control = verdict.matrix.filter(pl.col("method") == RANDOM)
    if control.height:
        value = pl.col("value")
        most = control.group_by("task").agg(value.mean().alias("mean"), value.abs().max().alias("most")).sort("task")
        said = ", ".join(f"{task} {mean:.3f} (at most {top:.3f})" for task, mean, top in most.iter_rows() if mean is not None)
        known = (said or "nothing defined").replace("-", "−")
        console.say(f"without one of the strongest blocks of random partitions with the same sizes, on average: {known}")


def _show_selectivity(verdict: RegionVerdict) -> None:
    """How much of what blocks break is one task's alone."""
    table = verdict.selectivity
    if table is None:
        return
    console.heading("Selectivity: 1 where each block breaks one task only, 0 where it breaks all alike")
    show_selectivity(table, "task")
    console.say("a block's task is decided on one half of the sequences and judged on the other; – where what blocks break is not told from noise")


def show_selectivity(table: pl.DataFrame, what: str) -> None:
    """A table of `region_study.SELECTIVITY`; `what` blocks are of, a task or a class."""
    rows = [
        (r["method"], r["n_blocks"], number(r["value"], r["low"], r["high"]), number(r["impact"], r["impact_low"], r["impact_high"]),
         "" if r["method"] == REGIONS else number(r["difference"], r["difference_low"], r["difference_high"]))
        for r in table.iter_rows(named=True)
    ]  # fmt: skip
    console.table(("partition", "blocks cut", "selectivity", f"mean loss of their {what}", "selectivity − regions'"), rows)


def _show_drives(verdict: RegionVerdict, names: dict[str, str], n: int) -> None:
    """The strongest edges between regions, with what cutting them costs."""
    table = verdict.drives
    if table.is_empty():
        return
    console.heading("Strongest edges between regions, and what the metric loses when one is cut")
    rows = [
        (names.get(r["source"], r["source"]), names.get(r["target"], r["target"]), number(r["weight"]), f"{r['per_member']:.2e}".replace("-", "−"),
         number(r["effect"], r["low"], r["high"]))
        for r in table.head(n).iter_rows(named=True)
    ]  # fmt: skip
    console.table(("from", "to", "attribution (sum)", "per pair of members", "measured effect"), rows)
    if table.height > 2:
        rank = table.select(pl.corr("weight", "effect", method="spearman")).item()
        console.say(f"rank correlation of attribution and effect over {table.height} edges: {number(rank)}")
