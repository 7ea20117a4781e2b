"""What the commands of labels print."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import console
from .analysis.notes import marked, readable

if TYPE_CHECKING:
    import polars as pl

    from .analysis.labels import Automatic

_LABEL, _WHY = 44, 84


def feature_name(site: str, feature: int) -> str:
    """A feature as people type it."""
    return f"{site}/{feature}"


def show_labels(labels: "pl.DataFrame", limit: int) -> None:
    """Labels as a table, the first `limit`."""
    rows = [
        (
            feature_name(row["site"], row["feature"]), readable(marked(row["label"], row["kind"]), _LABEL), row["kind"], row["rule"],
            row["source"], "" if row["confidence"] is None else f"{row['confidence']:.2f}", readable(row["evidence"] or "", _WHY),
        )
        for row in labels.head(limit).iter_rows(named=True)
    ]  # fmt: skip
    console.table(("feature", "label", "kind", "rule", "source", "confidence", "because"), rows)
    if labels.height > limit:
        console.note(f"{labels.height - limit:,} more: --limit {labels.height} shows all, `featlas labels export` saves them")


def show_summary(summary: "pl.DataFrame") -> None:
    """How many labels there are of each kind."""
    if summary.is_empty():
        console.say("no labels yet: `featlas labels set`, `import` or `auto` give some")
        return
    rows = [(kind, rule, source, f"{n:,}", f"{written:%Y-%m-%d %H:%M}") for kind, rule, source, n, _, written in summary.iter_rows()]
    console.table(("kind", "rule", "source", "features", "last written (UTC)"), rows)


def show_found(found: "pl.DataFrame", text: str) -> None:
    """What a search found, best first."""
    if found.is_empty():
        console.say(f"nothing found for {text!r}: a word may end in * for all that begin so")
        return
    rows = [
        (
            feature_name(row["site"], row["feature"]), f"{row['score']:.1f}",
            readable(marked(row["label"], row["label_kind"]), _LABEL) if row["label"] else "", row["label_kind"] or "",
            ", ".join(row["fields"]), readable(row["text"] or "", _WHY),
        )
        for row in found.iter_rows(named=True)
    ]  # fmt: skip
    console.table(("feature", "score", "label", "kind", "found in", "where"), rows)


def show_automatic(found: "Automatic", n: int) -> None:
    """What the rules gave: how many labels, and the surest ones of each rule."""
    import polars as pl

    counts: Mapping[str, int] = found.counts()
    console.heading(f"Automatic labels of {len(found.features):,} features")
    rows = []
    for rule, count in counts.items():
        sure = found.labels.filter(pl.col("rule") == rule)["confidence"].drop_nulls()
        middle = sure.median()
        rows.append((rule, f"{count:,}", f"{middle:.2f}" if isinstance(middle, float) else "", f"{(sure >= 0.5).sum():,}" if len(sure) else ""))
    console.table(("rule", "features", "median confidence", "0.5 or more"), rows)
    names = dict(found.features.select("key", name=pl.concat_str("site", pl.lit("/"), pl.col("feature").cast(pl.String))).iter_rows())
    for rule in counts:
        console.heading(f"{rule}: the surest")
        best = found.labels.filter(pl.col("rule") == rule).sort(["confidence", "key"], descending=[True, False], nulls_last=True).head(n)
        cells = [
            (names[key], readable(label, _LABEL), "" if sure is None else f"{sure:.2f}", readable(evidence, 110))
            for key, label, sure, evidence in best.select("key", "label", "confidence", "evidence").iter_rows()
        ]
        console.table(("feature", "label", "confidence", "because"), cells)
    console.say(f"\n{found.changed:,} features of the graph have another label now; those given by people, files or Neuronpedia stay")
    for rule, reason in found.left_out.items():
        console.note(f"nothing by the rule {rule}: {reason}")
