"""Profiles of two graphs: how many edges nodes have, how strong they are, where strength leaves, and how long the paths to the output are.

1. `node_profiles`: each node's edges in and out, and their share of the graph's strength.
2. `distances`: of two samples the Wasserstein-1 distance ∫ |F_a − F_b| and the Kolmogorov–Smirnov distance max |F_a − F_b|, of the data and of draws
   in which the two samples' values were exchanged at random.
3. `path_lengths`: the distribution of the lengths of paths from the inputs to the output, every path counting the same, or with the product of its
   edges' shares of what enters their targets (a walk back from the output that follows strength). By dynamic programming over the sites.
4. `compare_profiles`: all of it as numbers beside nulls.

Degrees are compared site by site on the sites that the pairs join. Their null exchanges nodes of the two graphs: a small p says that the degrees
differ. Path lengths' null is B rewired: a positive z says that A's paths are more like B's than rewiring leaves them.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from .community_nulls import rewired
from .comparison_records import CURVES, DIFFERENT, FloatArray, IntArray, Values, curve, together
from .edge_overlap import REWIRED
from .graph_sides import GraphSide, Paired

PART = "profiles"

EXCHANGED = "nodes exchanged"
"""The null of two samples: whose values are whose is drawn at random."""

MEASURES = ("edges in", "edges out", "strength in", "strength out")

DRAW_CELLS = 2_000_000
"""Cells of one block of draws."""


def node_profiles(side: GraphSide) -> FloatArray:
    """(4, n), as `MEASURES`; strengths as shares of all of the graph's, times its number of nodes: 1 on average."""
    total = side.strength.sum() / max(side.n, 1)
    ends = (side.target, side.source)
    counts = [np.bincount(end, minlength=side.n).astype(np.float64) for end in ends]
    return np.stack([*counts, *(np.bincount(end, side.strength / total, side.n) for end in ends)])


def distances(a: FloatArray, b: FloatArray, *, draws: int = 0, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """(Wasserstein-1, Kolmogorov–Smirnov) of two samples, and the same of `draws` exchanges of their values, (draws, 2)."""
    values = np.concatenate([a, b])
    order = np.argsort(values, kind="stable")
    values, of_a = values[order], order < len(a)
    gaps = np.diff(values)
    rng = np.random.default_rng(seed)

    def both(flags: NDArray[np.bool_]) -> FloatArray:  # (k, n) → (k, 2)
        apart = np.abs(np.cumsum(flags, axis=1) / len(a) - np.cumsum(~flags, axis=1) / len(b))[:, :-1]  # of whole counts: exactly 0 where equal
        # where equal values follow each other the functions are compared after the last of them
        return np.stack([apart @ gaps, (apart * (gaps > 0)).max(axis=1, initial=0)], axis=1)

    step = max(1, DRAW_CELLS // len(values))
    blocks = [rng.permuted(np.tile(of_a, (min(step, draws - start), 1)), axis=1) for start in range(0, draws, step)]
    drawn = np.concatenate([both(block) for block in blocks]) if blocks else np.zeros((0, 2))
    return both(of_a[None])[0], drawn


def path_lengths(side: GraphSide, *, weighted: bool) -> FloatArray:
    """The share of paths of each length (0 … sites − 1) from the inputs (see `GraphSide.roots`) to the output, (n_sites,); all 0 without any.

    weighted: each path counts with the product of its edges' shares of the strength that enters their targets. Without an output in the graph, to
    the nodes that no edge leaves.
    """
    n_sites = int(side.order.max(initial=0)) + 1
    ways = np.zeros((side.n, n_sites))
    ways[(np.isin(side.nodes["site"].to_numpy(), side.roots) | np.isin(side.nodes["kind"].to_numpy(), side.roots)), 0] = 1.0
    share = np.ones(side.m)
    if weighted:
        into = np.bincount(side.target, side.strength, side.n)
        share = side.strength / into[side.target]
    stage = side.order[side.target]
    by_stage = np.argsort(stage, kind="stable")
    for edges in np.split(by_stage, np.flatnonzero(np.diff(stage[by_stage])) + 1):
        # all edges into a site: their sources lie at earlier ones, whose counts are complete
        np.add.at(ways[:, 1:], side.target[edges], share[edges, None] * ways[side.source[edges], :-1])
    ends = (side.nodes["kind"] == "output").to_numpy()
    if not ends.any():
        ends = np.bincount(side.source, minlength=side.n) == 0
    found = ways[ends].sum(axis=0)
    return found / found.sum() if found.sum() > 0 else found


def length_distances(a: FloatArray, b: FloatArray) -> FloatArray:
    """(Wasserstein-1, Kolmogorov–Smirnov) of two distributions over lengths; NaN where one is empty."""
    if not a.sum() or not b.sum():
        return np.full(2, np.nan)
    n = max(len(a), len(b))
    apart = np.abs(np.cumsum(np.pad(a, (0, n - len(a))) - np.pad(b, (0, n - len(b)))))
    return np.array([apart.sum(), apart.max()])


def site_shares(side: GraphSide) -> pl.DataFrame:
    """`site`, `order`, and each site's shares of the graph's nodes and of the strength that leaves and that enters."""
    profile = node_profiles(side)
    rows = side.nodes.select("site", "order", strength_in=pl.Series(profile[2] / side.n), strength_out=pl.Series(profile[3] / side.n))
    shares = rows.group_by("site", "order").agg((pl.len() / side.n).alias("nodes"), pl.col("strength_in").sum(), pl.col("strength_out").sum())
    return shares.sort("order")


def compare_profiles(paired: Paired, *, draws: int = 20, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Values and curves, as `comparison_records`."""
    values, curves = Values(PART), []
    sides = (paired.side_a, paired.side_b)
    profiles = [node_profiles(side) for side in sides]
    names = [side.nodes["site"].to_numpy() for side in sides]
    joined = {}
    for site_a, site_b in _joined_sites(paired):
        joined[site_a] = [profile[:, name == site] for profile, name, site in zip(profiles, names, (site_a, site_b), strict=True)]
    for place, (site, own) in enumerate([("", profiles), *joined.items()]):
        for i, measure in enumerate(MEASURES):
            if not own[0].shape[1] or not own[1].shape[1]:
                continue
            found, drawn = distances(own[0][i], own[1][i], draws=draws and max(draws, 200), seed=seed + 10 * place + i)
            for j, name in enumerate(("W1", "KS")):
                values.add_against(
                    f"{measure}, {name}", found[j], EXCHANGED, drawn[:, j], greater=False, tested=DIFFERENT, site=site,
                    n=own[0].shape[1] + own[1].shape[1],
                )  # fmt: skip
    of_b = [sides[1].with_targets(rewired(sides[1].effective, seed + 3000 + i)[0].target) for i in range(draws)]
    for weighted, kind in ((True, "by strength"), (False, "each path alike")):
        lengths = [path_lengths(side, weighted=weighted) for side in sides]
        of_draws = [path_lengths(side, weighted=weighted) for side in of_b]
        found = length_distances(*lengths)
        drawn = np.array([length_distances(lengths[0], own) for own in of_draws]).reshape(-1, 2)
        for j, name in enumerate(("W1", "KS")):
            values.add_against(f"path length {kind}, {name}", found[j], REWIRED, drawn[:, j], greater=False)
        for name, shares in zip("AB", lengths, strict=True):
            values.add(f"mean path length {kind}, {name}", float(shares @ np.arange(len(shares))) if shares.sum() else None)
            curves.append(curve(PART, f"path length {kind}, {name}", "edges of a path", np.arange(len(shares)), shares))
    for name, side in zip("AB", sides, strict=True):
        by_site = site_shares(side)
        for column, what in (("nodes", "nodes"), ("strength_out", "strength that leaves"), ("strength_in", "strength that enters")):
            curves.append(curve(PART, f"{what}, {name}", "site", by_site["order"].to_numpy(), by_site[column].to_numpy()))
    return values.frame(), together(curves, CURVES)


def _joined_sites(paired: Paired) -> list[tuple[str, str]]:
    """Sites of A, in their order, each with the site of B that most of its pairs lead to."""
    counted = paired.pairs.group_by("site_a", "site_b").len().sort(["len", "site_b"], descending=[True, False])
    most = dict(counted.group_by("site_a", maintain_order=True).agg(pl.col("site_b").first()).iter_rows())
    there: IntArray = np.argsort(paired.side_a.order, kind="stable")
    order = paired.side_a.nodes["site"].gather(there).unique(maintain_order=True).to_list()
    return [(site, most[site]) for site in order if site in most]
