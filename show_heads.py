"""Heads' shares in features as tables that a person reads."""

from typing import TYPE_CHECKING

import polars as pl

from . import console

if TYPE_CHECKING:
    from .analysis.heads import HeadShares, Overlap

_SHOWN = 20
"""Heads and blocks that are shown."""

WHAT = {
    "membership": "the neurons of each head's output",
    "effective": "attribution from heads to features, magnitudes added over {n} sequences",
    "encoder": "what encoders read of each head, magnitudes added over the positions of {n} sequences where a feature is active",
    "decoder": "norms of decoder directions in the heads' slices",
    "structural": "strengths with which heads write a feature, by the weights alone",
}


def show_heads(shares: "HeadShares", compared: "Overlap | None", n_sequences: int) -> None:
    touched = shares.touched
    console.heading(f"Heads of the features of {shares.site}, by {shares.method}")
    console.say(f"{WHAT[shares.method].format(n=n_sequences)}; {len(touched):,} of {len(shares.labels):,} features have a head")
    if not len(touched):
        console.say("no head moved between clean and corrupted prompts: take other pairs, or --baseline zero")
        return
    console.say(
        f"ambiguity (1 − the greatest share) {shares.ambiguity[touched].mean():.2f}, entropy {shares.entropy[touched].mean():.2f} on average; "
        f"of {len(shares.heads)} heads, equal shares would have ambiguity {1 - 1 / len(shares.heads):.2f} and entropy 1"
    )
    own = shares.table().filter(pl.col("features") > 0).sort("features", "layer", "head", descending=[True, False, False])
    fixed = lambda value: "–" if value is None else f"{value:.2f}"
    console.table(
        ("head", "features", "share of all", "ambiguity", "entropy"),
        [(f"{r['layer']}.{r['head']}", r["features"], *(fixed(r[name]) for name in ("share", "ambiguity", "entropy")))
         for r in own.head(_SHOWN).iter_rows(named=True)],
    )  # fmt: skip
    if own.height > _SHOWN:
        console.say(f"and {own.height - _SHOWN} heads with fewer features; --json has all")
    if compared is not None:
        show_overlap(compared)


def show_overlap(compared: "Overlap") -> None:
    console.heading("Blocks and heads")
    null, signed = compared.null_ami, lambda value: f"{value:.3f}".replace("-", "−")
    console.say(
        f"{compared.n:,} features in {compared.n_blocks} blocks and {compared.n_heads} heads: AMI {signed(compared.ami)} "
        f"(features' heads permuted {len(null):,} times: mean {signed(null.mean())}, greatest {signed(null.max())}; p = {compared.p:.2g}), "
        f"variation of information {compared.vi:.2f} nats; {compared.purity:.0%} of the features are of their block's first head"
    )
    first = compared.contingency.sort("block", "n", "layer", "head", descending=[False, True, False, False])
    size = first.group_by("block", maintain_order=True).agg(pl.col("n").sum().alias("size"), pl.len().alias("heads"))
    rows = first.unique("block", keep="first", maintain_order=True).join(size, on="block", maintain_order="left").head(_SHOWN)
    console.table(
        ("block", "features", "heads in it", "first head", "its share"),
        [(r["block"], r["size"], r["heads"], f"{r['layer']}.{r['head']}", f"{r['share']:.2f}") for r in rows.iter_rows(named=True)],
    )
    if size.height > _SHOWN:
        console.say(f"and {size.height - _SHOWN} blocks; --json has all")
