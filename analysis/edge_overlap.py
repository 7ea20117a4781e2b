"""Edges that two graphs share after their nodes were matched, at every threshold, beside two nulls.

1. `union`: the edges of either graph between paired nodes, each once, with both weights (0 where a graph has it not) and both ranks.
2. `by_size`: of the k strongest edges of each graph, for every k at once. `by_threshold`: of the edges of at least a strength.
   - Jaccard index: shared edges over all edges.
   - Weighted Jaccard (Ružička): Σ min(|a|, |b|) / Σ max(|a|, |b|); signed: the same of positive and negative parts, so that an edge of opposite
     signs counts as two.
   - Sign agreement: the share of shared edges whose signs agree.
3. `rank_correlations`: Spearman's and Kendall's (τ-b) of strengths, over shared edges and over all (an absent edge having strength 0).
4. `compare_edges`: these numbers for the data, for B rewired, and for the nodes that both have permuted inside their sites.

One sort of each graph serves all sizes: an edge is among the k strongest of both graphs exactly if its greater rank is below k, so that counts and
sums over shared edges are cumulative sums over that rank, and Σ max = Σ a + Σ b − Σ min. Time O(E log E), memory O(E).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata  # type: ignore[import-untyped]

from .community_nulls import rewired
from .comparison_records import CURVES, FloatArray, IntArray, Values, curve, together
from .graph_sides import BadMatching, Edges, Paired

PART = "edges"

REWIRED, PERMUTED = "B rewired", "matching permuted"
"""The nulls: every node of B keeps its edges for every pair of sites; or the nodes of B that A has too are exchanged inside their sites."""

POINTS = 160
"""Points of a curve that are kept, about."""

RANK_POINTS = 24
"""Sizes at which rank correlations are computed anew."""


class Scale(StrEnum):
    """What strengths of two graphs are compared as."""

    SHARE = "share"
    """Shares of all strength on paired nodes: metrics and models of different units compare."""
    RAW = "raw"
    """As they are."""


@dataclass(frozen=True, eq=False)
class Union:
    """Edges of either graph. a, b: (U,) strengths, 0 where absent. sign: (U,) product of the signs, 0 where not shared. rank_a, rank_b: (U,) places
    among the graph's own edges, the strongest 0, its number of edges where absent. m_a, m_b: edges of each."""

    a: FloatArray
    b: FloatArray
    sign: FloatArray
    rank_a: IntArray
    rank_b: IntArray
    m_a: int
    m_b: int

    @property
    def shared(self) -> NDArray[np.bool_]:
        return (self.a > 0) & (self.b > 0)


def union(a: Edges, b: Edges, n: int, scale: Scale = Scale.SHARE) -> Union:
    """The edges of two graphs of the same n numbered nodes. Raises `BadMatching` where one has none."""
    if not a.m or not b.m:
        raise BadMatching(f"{'A' if not a.m else 'B'} has no edge between matched nodes: nothing can be compared")
    codes = [edges.source * np.int64(n) + edges.target for edges in (a, b)]
    every = np.unique(np.concatenate(codes))
    places = [np.searchsorted(every, own) for own in codes]
    strength, rank, sign = [], [], []
    for edges, place in zip((a, b), places, strict=True):
        own = edges.strength / edges.strength.sum() if scale is Scale.SHARE else edges.strength
        strength.append(_spread(place, own, len(every), 0.0))
        # equal strengths: the same order in both graphs, by the edge's number
        order = np.lexsort((place, -own))
        at = np.empty(edges.m, dtype=np.int64)
        at[order] = np.arange(edges.m)
        rank.append(_spread(place, at, len(every), edges.m))
        sign.append(_spread(place, np.sign(edges.weight), len(every), 0.0))
    return Union(strength[0], strength[1], sign[0] * sign[1], rank[0].astype(np.int64), rank[1].astype(np.int64), a.m, b.m)


def _spread(place: IntArray, values: NDArray, n: int, absent: float) -> NDArray:
    found = np.full(n, absent, dtype=np.float64)
    found[place] = values
    return found


@dataclass(frozen=True, eq=False)
class Overlap:
    """Numbers along an axis, (n,) each; NaN where nothing is there to count. at: sizes or thresholds. shared: edges in both."""

    at: FloatArray
    shared: FloatArray
    jaccard: FloatArray
    weighted: FloatArray
    signed: FloatArray
    signs: FloatArray


CURVE_NAMES = {"jaccard": "Jaccard", "weighted": "weighted Jaccard", "signed": "signed weighted Jaccard", "signs": "sign agreement"}


def by_size(edges: Union, at: IntArray) -> Overlap:
    """Of the k strongest edges of each graph (all of one that has fewer), for every k of `at` (n,) ≥ 1."""
    n_sizes = max(edges.m_a, edges.m_b)
    both = edges.shared
    last = np.maximum(edges.rank_a, edges.rank_b)[both]  # the size from which on an edge is in both, less 1
    total = lambda weights: np.cumsum(np.bincount(last, weights, n_sizes))
    least, agree = np.minimum(edges.a, edges.b)[both], edges.sign[both] > 0
    sums = np.zeros(n_sizes)
    for strength, rank in ((edges.a, edges.rank_a), (edges.b, edges.rank_b)):
        there = strength > 0
        own = np.zeros(n_sizes)
        own[rank[there]] = strength[there]
        sums += np.cumsum(own)
    sizes = np.arange(1, n_sizes + 1)
    counts = np.minimum(sizes, edges.m_a) + np.minimum(sizes, edges.m_b)
    chosen = np.asarray(at) - 1
    return _overlap(at, counts[chosen], sums[chosen], *(total(w)[chosen] for w in (np.ones(len(last)), agree, least, least * agree)))


def by_threshold(edges: Union, at: FloatArray) -> Overlap:
    """Of the edges of at least a strength in each graph, for every threshold of `at` (n,)."""
    both = edges.shared
    least, agree = np.minimum(edges.a, edges.b)[both], edges.sign[both] > 0

    def above(values: FloatArray, weights: FloatArray | NDArray[np.bool_]) -> FloatArray:
        order = np.argsort(-values, kind="stable")
        sums = np.concatenate([[0.0], np.cumsum(weights[order])])
        return sums[np.searchsorted(-values[order], -np.asarray(at), side="right")]

    counts = above(edges.a, edges.a > 0) + above(edges.b, edges.b > 0)
    sums = above(edges.a, edges.a) + above(edges.b, edges.b)
    return _overlap(at, counts, sums, *(above(least, w) for w in (np.ones(len(least)), agree, least, least * agree)))


def _overlap(
    at: NDArray, counts: NDArray, sums: NDArray, shared: NDArray, agree: NDArray, least: NDArray, least_agree: NDArray
) -> Overlap:
    """counts, sums: edges and strength of A and of B added; shared, agree: edges in both, and those of one sign; least: Σ min over them."""
    part = lambda over, under: np.divide(over, under, out=np.full(len(over), np.nan), where=under > 0)
    # min + max = a + b: rounding must not take an equal pair of graphs past 1
    ratio = lambda least: np.minimum(part(least, sums - least), 1.0)
    return Overlap(np.asarray(at, dtype=np.float64), shared, part(shared, counts - shared), ratio(least), ratio(least_agree), part(agree, shared))


def grid(n: int, points: int = POINTS) -> IntArray:
    """Sizes 1 … n, about evenly on a logarithmic axis, each once."""
    return np.unique(np.round(np.geomspace(1, n, min(points, n))).astype(np.int64))


def thresholds(edges: Union, points: int = POINTS) -> FloatArray:
    """Strengths from the least to the greatest, evenly on a logarithmic axis."""
    found = np.concatenate([edges.a[edges.a > 0], edges.b[edges.b > 0]])
    return np.geomspace(found.min(), found.max(), points)


# --- rank correlations --------------------------------------------------------------------------------------------------

RANKS = ("Spearman, shared edges", "Kendall, shared edges", "Spearman, all edges", "Kendall, all edges")


def rank_correlations(edges: Union, k: int | None = None) -> FloatArray:
    """(4,), as `RANKS`, of the k strongest edges of each (of all); NaN for fewer than 3 edges, or where one side's are all equal."""
    a, b = edges.a, edges.b
    if k is not None:
        a, b = np.where(edges.rank_a < k, a, 0.0), np.where(edges.rank_b < k, b, 0.0)
    either, both = (a > 0) | (b > 0), (a > 0) & (b > 0)
    return np.array([how(a[which], b[which]) for which in (both, either) for how in (spearman, kendall)])


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Pearson's coefficient of the ranks, equal values sharing theirs; NaN as above."""
    if len(a) < 3:
        return float("nan")
    first, second = (rankdata(values) - (len(values) + 1) / 2 for values in (a, b))
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(np.clip(first @ second / scale, -1.0, 1.0)) if scale > 0 else float("nan")


def kendall(a: FloatArray, b: FloatArray) -> float:
    """τ-b; NaN as above."""
    if len(a) < 3 or (a == a[0]).all() or (b == b[0]).all():
        return float("nan")
    return float(kendalltau(a, b).statistic)


# --- all of it, beside the nulls ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EdgeResult:
    """values, curves: as `comparison_records`."""

    values: pl.DataFrame
    curves: pl.DataFrame


Draw = Callable[[int], Edges]


def null_edges(paired: Paired, b: Edges, seed: int) -> dict[str, Draw]:
    """B's edges by chance, by the number of the draw: rewired, and with the nodes permuted inside their sites."""
    graph = paired.of_b(b)

    def by_rewiring(i: int) -> Edges:
        drawn, _ = rewired(graph, seed + 1000 + i)
        return Edges(b.source, drawn.target, b.weight, b.strength)

    def by_permuting(i: int) -> Edges:
        number = paired.permuted(np.random.default_rng([seed, 2000 + i]))
        return Edges(number[b.source], number[b.target], b.weight, b.strength)

    return {REWIRED: by_rewiring, PERMUTED: by_permuting}


def compare_edges(paired: Paired, *, draws: int = 20, seed: int = 0, scale: Scale = Scale.SHARE) -> EdgeResult:
    """Edges shared between paired nodes: at every size and threshold, and ranks over all of them."""
    a, b = paired.edges()
    found = union(a, b, paired.n, scale)
    sizes, levels = grid(max(a.m, b.m)), thresholds(found)
    at_size, at_level = by_size(found, sizes), by_threshold(found, levels)
    values, curves = Values(PART), []
    drawn = {null: [union(a, draw(i), paired.n, scale) for i in range(draws)] for null, draw in null_edges(paired, b, seed).items()}
    # without draws each number stands once, alone
    for null, unions in drawn.items() if draws else [("", [])]:
        size_draws, level_draws = [by_size(one, sizes) for one in unions], [by_threshold(one, levels) for one in unions]
        for field, name in CURVE_NAMES.items():
            own = getattr(at_size, field)
            stack = _stack(size_draws, field, len(sizes))
            values.add_against(name, own[-1], null, stack[:, -1], n=int(at_size.shared[-1]))
            curves.append(curve(PART, name, "strongest edges", sizes, own, null=null, draws=stack))
            stack = _stack(level_draws, field, len(levels))
            curves.append(curve(PART, name, "threshold", levels, getattr(at_level, field), null=null, draws=stack))
        # the mean over sizes, each decade counting alike: one number that asks for no size
        for field, name in (("jaccard", "Jaccard, mean over sizes"), ("weighted", "weighted Jaccard, mean over sizes")):
            stack = _stack(size_draws, field, len(sizes))
            values.add_against(name, _mean(sizes, getattr(at_size, field)), null, [_mean(sizes, row) for row in stack], n=len(sizes))
        ranks = np.array([rank_correlations(one) for one in unions]).reshape(-1, len(RANKS))
        for i, name in enumerate(RANKS):
            values.add_against(name, float(rank_correlations(found)[i]), null, ranks[:, i], n=int((found.shared if i < 2 else found.a >= 0).sum()))
    some = grid(max(a.m, b.m), RANK_POINTS)
    at_ranks = np.array([rank_correlations(found, int(k)) for k in some])
    curves += [curve(PART, name, "strongest edges", some, at_ranks[:, i]) for i, name in enumerate(RANKS)]
    return EdgeResult(values.frame(), together(curves, CURVES))


def _stack(overlaps: Sequence[Overlap], field: str, n: int) -> FloatArray:
    """(draws, n)."""
    return np.array([getattr(one, field) for one in overlaps]).reshape(-1, n)


def _mean(sizes: IntArray, values: FloatArray) -> float:
    """The mean over the logarithm of the size, trapezoid; of one size its value."""
    if len(sizes) == 1:
        return float(values[0])
    return float(np.trapezoid(values, np.log(sizes)) / (np.log(sizes[-1]) - np.log(sizes[0])))


def coverage(paired: Paired) -> pl.DataFrame:
    """How much of each graph lies on paired nodes at all, as `VALUES`: nodes with edges, edges, and their strength, of the whole and by site."""
    values = Values("coverage")
    for name, side, rows, edges in zip("AB", (paired.side_a, paired.side_b), (paired.a, paired.b), paired.edges(), strict=True):
        known = np.zeros(side.n, dtype=bool)
        known[rows[rows >= 0]] = True
        values.add(f"nodes of {name} that are matched", float(known.mean()), n=side.n)
        values.add(f"edges of {name} between matched nodes", edges.m / side.m, n=side.m)
        values.add(f"strength of {name} between matched nodes", float(edges.strength.sum() / side.strength.sum()), n=side.m)
        site = side.nodes["site"].to_numpy()
        for one in side.nodes["site"].unique(maintain_order=True):
            own = site == one
            values.add(f"nodes of {name} that are matched", float(known[own].mean()), site=str(one), n=int(own.sum()))
    values.add("pairs that both graphs have", float(paired.both.mean()), n=paired.n)
    return values.frame()
