"""Attention heads as a partition of features: which head each feature belongs to, how clearly, and whether regions of interest are heads.

1. `HeadShares`: for each feature the shares of the heads in it, measured (attribution from heads to features, or the heads' parts of what its
   encoder reads) or from the weights. A feature's head is the one of the greatest share; its ambiguity is 1 − that share, and its entropy
   −Σ s ln s / ln(number of heads): 0 for a feature of one head, 1 for equal shares.
2. `overlap` compares that partition with another one of the same features, beside the same comparison with features' heads permuted.
3. `alluvial` are the flows between the two, ready to be drawn: blocks to the left, heads to the right, the flows into a head in the blocks' order.

On an identity dictionary of head outputs a feature is a neuron of one head: `slices` says of which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import torch

from ..errors import UserError
from ..model.dictionaries import Dictionary
from ..model.sites import Basis, Site
from ..model.units import heads as head_units
from .parcellation import FloatArray, IntArray
from .partitioning import ami, contingency, variation_of_information

DRAWS = 1000
"""Permutations of the null, unless given."""


class NoHeads(UserError):
    """Heads are asked of a dictionary or a partition that has none."""


@dataclass(frozen=True, eq=False)
class HeadShares:
    """Shares of heads in the features of one site. heads: (layer, head) of each column.

    shares: (d_sae, n_heads), each row sums to 1, or is 0 for a feature that no head has a part in. method: what the shares are of.
    """

    site: str
    dictionary: str
    method: str
    heads: tuple[tuple[int, int], ...]
    shares: FloatArray

    @staticmethod
    def of(site: Site, dictionary: Dictionary, method: str, heads: Sequence[tuple[int, int]], magnitude: FloatArray) -> "HeadShares":
        """From magnitudes ≥ 0, (d_sae, n_heads)."""
        total = magnitude.sum(axis=1, keepdims=True)
        shares = np.divide(magnitude, total, out=np.zeros_like(magnitude), where=total > 0)
        return HeadShares(site.name, dictionary.id, method, tuple(heads), shares)

    @cached_property
    def touched(self) -> IntArray:
        """The features that some head has a part in, ascending."""
        return np.flatnonzero(self.shares.any(axis=1))

    @cached_property
    def labels(self) -> IntArray:
        """The column of each feature's head, the first of equal ones, (d_sae,); −1 where no head has a part."""
        return np.where(self.shares.any(axis=1), self.shares.argmax(axis=1), -1).astype(np.int64)

    @cached_property
    def ambiguity(self) -> FloatArray:
        """1 − the greatest share, (d_sae,); NaN where no head has a part."""
        return np.where(self.labels < 0, np.nan, 1 - self.shares.max(axis=1, initial=0.0))

    @cached_property
    def entropy(self) -> FloatArray:
        """−Σ s ln s over ln(number of heads), (d_sae,); 0 where there is one head, NaN where no head has a part."""
        logs = np.log(self.shares, out=np.zeros_like(self.shares), where=self.shares > 0)
        found = -(self.shares * logs).sum(axis=1) / max(np.log(len(self.heads)), np.finfo(float).tiny)
        return np.where(self.labels < 0, np.nan, np.clip(found, 0.0, 1.0))

    @property
    def names(self) -> list[str]:
        """`layer.head` of each column."""
        return [f"{layer}.{head}" for layer, head in self.heads]

    def features(self) -> pl.DataFrame:
        """One row per touched feature: feature, layer, head, share (its head's), ambiguity, entropy."""
        at = self.touched
        layer, head = np.array(self.heads, dtype=np.int64)[self.labels[at]].reshape(-1, 2).T
        return pl.DataFrame({
            "feature": at, "layer": layer, "head": head, "share": self.shares[at].max(axis=1, initial=0.0), "ambiguity": self.ambiguity[at],
            "entropy": self.entropy[at],
        })  # fmt: skip

    def table(self) -> pl.DataFrame:
        """One row per head: layer, head, features (that are its), share (of all shares), ambiguity and entropy (means over its features, or null)."""
        at = self.touched
        count = np.bincount(self.labels[at], minlength=len(self.heads))
        mean = lambda values: [v if n else None for v, n in zip(np.bincount(self.labels[at], values[at], len(self.heads)) / count.clip(1), count)]
        return pl.DataFrame(
            {
                "layer": [layer for layer, _ in self.heads], "head": [head for _, head in self.heads], "features": count,
                "share": self.shares.sum(axis=0) / max(len(at), 1), "ambiguity": mean(self.ambiguity), "entropy": mean(self.entropy),
            },
            schema={
                "layer": pl.Int64(), "head": pl.Int64(), "features": pl.Int64(), "share": pl.Float64(), "ambiguity": pl.Float64(),
                "entropy": pl.Float64(),
            },
        )  # fmt: skip


def slices(dictionary: Dictionary, site: Site, n_heads: int) -> IntArray:
    """The head of each neuron of an identity on head outputs, (d_sae,): the labels of `PartitionMethod.HEADS`. Raises `NotUnits` for others."""
    labels, _ = head_units(dictionary, site, n_heads)
    return labels[:-1].numpy()


def membership(dictionary: Dictionary, site: Site, n_heads: int) -> HeadShares:
    """Shares of 1: every neuron of an identity on head outputs is of one head. Raises `NotUnits` for other dictionaries."""
    return HeadShares.of(site, dictionary, "membership", _own(site, n_heads), np.eye(n_heads)[slices(dictionary, site, n_heads)])


@torch.no_grad()
def decoder_shares(dictionary: Dictionary, site: Site, n_heads: int) -> HeadShares:
    """Shares of the norms of each feature's decoder direction in the heads' slices. Raises `NoHeads` for a dictionary of another basis."""
    if dictionary.basis is not Basis.HEADS:
        raise NoHeads(
            f"the decoder of {site.name} writes the {dictionary.basis.value} basis, which has no heads' slices: "
            "take --method encoder, effective or structural"
        )
    parts = dictionary.W_dec.view(dictionary.d_sae, n_heads, -1).double().norm(dim=-1)
    return HeadShares.of(site, dictionary, "decoder", _own(site, n_heads), parts.cpu().numpy())


def _own(site: Site, n_heads: int) -> tuple[tuple[int, int], ...]:
    return tuple((site.layer, head) for head in range(n_heads))


# --- two partitions of the same features ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Overlap:
    """Two partitions of the features that both have. vi: variation of information in nats.

    null_ami: (draws,) AMI with one partition's labels permuted. p: share of permutations with at least this AMI, the observed among them.
    contingency: block, layer, head, n (features), share (of the block's).
    """

    n: int
    n_blocks: int
    n_heads: int
    ami: float
    vi: float
    null_ami: FloatArray
    p: float
    contingency: pl.DataFrame

    @property
    def purity(self) -> float:
        """Share of the features that are of their block's most frequent head."""
        return float(self.contingency.group_by("block").agg(pl.col("n").max())["n"].sum() / self.n)


def overlap(blocks: IntArray, shares: HeadShares, *, draws: int = DRAWS, seed: int = 0) -> Overlap:
    """Blocks (d_sae,), −1 for features that are in none, beside the features' heads. Raises `NoHeads` where the two share no feature."""
    own, head = _both(blocks, shares)
    observed = ami(own, head)
    null = _null(own, head, draws, seed)
    rows = _flows(own, head).with_columns(
        layer=pl.col("column").replace_strict(dict(enumerate(layer for layer, _ in shares.heads)), return_dtype=pl.Int64),
        head=pl.col("column").replace_strict(dict(enumerate(head for _, head in shares.heads)), return_dtype=pl.Int64),
        share=pl.col("n") / pl.col("n").sum().over("block"),
    )
    # a permutation that gives the observed table gives the observed number up to rounding
    p = (1 + int((null >= observed - 1e-12).sum())) / (1 + draws)
    return Overlap(
        len(own), len(np.unique(own)), len(np.unique(head)), observed, variation_of_information(own, head), null, p,
        rows.select("block", "layer", "head", "n", "share"),
    )  # fmt: skip


def _both(blocks: IntArray, shares: HeadShares) -> tuple[IntArray, IntArray]:
    """Block and head column of the features that have both."""
    if blocks.shape != shares.labels.shape:
        raise NoHeads(f"{len(blocks)} features have blocks, {len(shares.labels)} have heads: the partition is of another dictionary")
    both = (blocks >= 0) & (shares.labels >= 0)
    if not both.any():
        raise NoHeads(f"no feature of {shares.site} has both a block and a head: take more sequences, or another method")
    return blocks[both], shares.labels[both]


def _flows(blocks: IntArray, heads: IntArray) -> pl.DataFrame:
    """Features in each block and head: block, column, n; by block, then head."""
    return pl.DataFrame({"block": blocks, "column": heads}).group_by("block", "column").agg(n=pl.len().cast(pl.Int64)).sort("block", "column")


def _null(a: IntArray, b: IntArray, draws: int, seed: int) -> FloatArray:
    """AMI of `a` with `b` permuted, (draws,).

    The expected information and both entropies depend on the sizes alone, which permuting keeps: AMI is an affine function of the information,
    known from two tables.
    """
    generator = np.random.default_rng(seed)
    a, b = (np.unique(labels, return_inverse=True)[1] for labels in (a, b))
    tables = [contingency(a, generator.permutation(b)) for _ in range(draws)]
    information = np.array([_information(table) for table in tables])
    if not len(information) or np.ptp(information) < 1e-12:
        return np.full(len(information), ami(a, b) if len(information) else 0.0)
    low, high = int(information.argmin()), int(information.argmax())
    ends = [ami(*_labels(tables[i])) for i in (low, high)]
    slope = (ends[1] - ends[0]) / (information[high] - information[low])
    return ends[0] + slope * (information - information[low])


def _information(table: IntArray) -> float:
    """Mutual information of a contingency table, in nats."""
    p = table / table.sum()
    expected = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    return float((p[p > 0] * np.log(p[p > 0] / expected[p > 0])).sum())


def _labels(table: IntArray) -> tuple[IntArray, IntArray]:
    """Labels that have this contingency table."""
    row, column = table.nonzero()
    return np.repeat(row, table[row, column]), np.repeat(column, table[row, column])


# --- a figure's frame -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Alluvial:
    """Flows between two partitions. frame: left, right, n; by the right side's order, then the left's. The orders list each side's names."""

    frame: pl.DataFrame
    left_order: list[str]
    right_order: list[str]


def alluvial(blocks: IntArray, shares: HeadShares) -> Alluvial:
    """Features flow from their blocks, to the left, into their heads, to the right.

    Heads are in the model's order and take their flows in the blocks' order (a feature's place to the right is by head, then block); a block
    stands at the mean place of its features' heads, so that flows cross little.
    """
    own, head = _both(blocks, shares)
    flows = _flows(own, head)
    means = flows.group_by("block").agg(at=(pl.col("column") * pl.col("n")).sum() / pl.col("n").sum()).sort("at", "block")
    left, right = means["block"].to_list(), sorted(flows["column"].unique().to_list())
    place = {block: i for i, block in enumerate(left)}
    rows = flows.with_columns(at=pl.col("block").replace_strict(place, return_dtype=pl.Int64)).sort("column", "at")
    of_block, of_head = (lambda block: f"block {block}"), (lambda column: f"head {shares.names[column]}")
    frame = pl.DataFrame({
        "left": [of_block(block) for block in rows["block"]], "right": [of_head(column) for column in rows["column"]], "n": rows["n"],
    })  # fmt: skip
    return Alluvial(frame, [of_block(block) for block in left], [of_head(column) for column in right])


def alluvial_frame(blocks: IntArray, shares: HeadShares) -> tuple[pl.DataFrame, list[str], list[str]]:
    """`alluvial` as (frame with left, right, n; left order; right order)."""
    found = alluvial(blocks, shares)
    return found.frame, found.left_order, found.right_order
