"""What ablation says of a vision model's regions, as tables that a person reads."""

import polars as pl

from . import console
from .analysis.region_study import REGIONS
from .show_ablation import number
from .show_region_verdict import show_selectivity
from .vision import CUT, KEPT, VisionVerdict


def show_vision(found: VisionVerdict, n: int) -> None:
    """The network, its regions, and what they are worth to each class, beside random blocks; `n` regions of the class × block matrix."""
    verdict, parcellation, share = found.verdict, found.parcellation, found.options.share
    console.heading(f"Regions of {found.digits.key}, a convolutional network on handwritten digits")
    console.say(
        f"accuracy {found.accuracy:.1%} on {len(found.digits.test)} images that it was not trained on; regions by {parcellation.method} from "
        f"activations on {len(found.digits.train)}; attributions on {verdict.n_found}, ablation on {verdict.n_tested} others, baseline "
        f"{found.study.baseline_name}; 95 % bootstrap intervals"
    )
    sites = parcellation.sites.items()
    rows = [(name, own.d_sae, len(own.features), own.levels[own.chosen].n_blocks, own.notes.get("verdict", "")) for name, own in sites]
    console.table(("layer", "neurons", "live", "blocks", ""), rows)
    _show_targeted(found, share)
    _show_classes(found, share)
    _show_curve(found)
    _show_matrix(found, n)
    _show_selectivity(found)


def _show_targeted(found: VisionVerdict, share: float) -> None:
    for part, title, said in (
        (CUT, f"The {share:.0%} of the blocks strongest for a class cut: accuracy lost", "lost"),
        (KEPT, f"Only the {share:.0%} of the blocks strongest for a class alive: accuracy", "accuracy"),
    ):
        rows = []
        for r in found.targeted.filter(pl.col("part") == part).iter_rows(named=True):
            cells = [number(r[name], r[f"{name}_low"], r[f"{name}_high"]) for name in ("own", "others", "difference", "beyond")]
            rows.append((r["method"], f"{r['share_of_features']:.1%}", *cells))
        console.heading(title)
        console.table(("partition", "live neurons", f"{said}, that class", f"{said}, others", "difference", "regions' difference − this"), rows)


def _show_classes(found: VisionVerdict, share: float) -> None:
    rows = found.class_table.filter((pl.col("method") == REGIONS) & (pl.col("part") == CUT))
    tasks = rows["task"].unique().sort().to_list()
    cells = {(ranked, task): value for ranked, task, value in rows.select("ranked_for", "task", "accuracy").iter_rows()}
    full = dict(rows.select("task", "full").iter_rows())
    console.heading(f"Accuracy by class with the regions strongest for a class cut ({share:.0%} of them)")
    shown = [("none cut", *(f"{full[task]:.2f}" for task in tasks))]
    shown += [(f"{ranked}'s", *(f"{cells[ranked, task]:.2f}" for task in tasks)) for ranked in tasks]
    console.table(("regions cut", *tasks), shown)


def _show_curve(found: VisionVerdict) -> None:
    """Accuracy, classes pooled, against the share of live neurons in the strongest blocks."""
    methods = list(dict.fromkeys(own.method for own in found.verdict.competitors))
    for part, title in ((KEPT, "Only the strongest blocks alive: accuracy, all classes"), (CUT, "The strongest blocks cut: accuracy, all classes")):
        rows = found.curve.filter(pl.col("part") == part)
        cells = {(m, s): f"{a:.3f} ({u:,.0f})" for m, s, a, u in rows.select("method", "share", "accuracy", "n_units").iter_rows()}
        console.heading(title)
        shares = sorted(rows["share"].unique().to_list())
        console.table(("share of live neurons", *methods), [(f"{s:.0%}", *(cells.get((m, s), "") for m in methods)) for s in shares])
    console.say("in brackets how many blocks that takes" + (" (means over draws)" if found.options.random_draws > 1 else ""))


def _show_matrix(found: VisionVerdict, n: int) -> None:
    """Class × block, one region cut at a time: the share of the logit difference that is lost, and the accuracy."""
    matrix = found.verdict.matrix.filter(pl.col("method") == REGIONS)
    tasks = matrix["task"].unique().sort().to_list()
    order = matrix.group_by("removed").agg(pl.col("value").max()).sort("value", "removed", descending=[True, False])["removed"].head(n)
    cells = {(removed, task): (value, low) for removed, task, value, low in matrix.select("removed", "task", "value", "low").iter_rows()}
    sizes = dict(matrix.select("removed", "n_features").iter_rows())
    lost = found.matrix.filter(pl.col("method") == REGIONS)
    most = dict(lost.group_by("removed").agg(pl.col("lost").max()).iter_rows())
    console.heading(f"Class × block: the share of each class's logit difference that is lost without a region ({len(sizes)} regions, one at a time)")
    mark = lambda value, low: "–" if value is None else f"{value:.2f}".replace("-", "−") + ("*" if low is not None and low > 0 else "")
    rows = [(removed, sizes[removed], *(mark(*cells[removed, task]) for task in tasks), f"{most[removed]:.2f}") for removed in order]
    console.table(("region", "neurons", *tasks, "accuracy lost at most"), rows)
    console.say("* the interval lies above 0")


def _show_selectivity(found: VisionVerdict) -> None:
    table = found.selectivity
    console.heading("Selectivity of single blocks: 1 where each breaks one class only, 0 where it breaks all alike (logit difference)")
    show_selectivity(table, "class")
