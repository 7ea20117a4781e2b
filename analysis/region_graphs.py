"""Two graphs of regions of interest: do features that are matched lie in regions that correspond, and do these regions drive each other alike?

1. `with_regions`: a side with the regions of a parcellation as nodes: its live blocks, each site's dead features, error nodes, the output. What they
   drive each other is the sum of the strengths of the side's edges between their members, or, where the graph holds them, the attributions between
   regions of the whole run at threshold 0 (`DRIVES`).
2. `compare_memberships`: agreement (AMI, variation of information) of the two parcellations, and of communities found in either graph, over the
   matched nodes, beside labels permuted inside sites.
3. `compare_regions`: edges between regions that correspond through the matching; refinement with strengths in bins; fused Gromov–Wasserstein;
   distance of the Laplacians' spectra; each beside B's graph rewired, whose nodes' edges are added up by regions anew.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import polars as pl

from ..queries.blocks import drives_of
from ..queries.schema import block_key
from ..queries.store import GraphStore
from .communities import Communities, CommunityOptions, EffectiveGraph, find_communities
from .community_nulls import Weights, rewired
from .comparison_records import CURVES, LINKS, FloatArray, IntArray, Values, curve, together
from .edge_overlap import PERMUTED, RANKS, REWIRED, by_size, rank_correlations, union
from .graph_sides import BadMatching, Edges, GraphSide, Paired, Regions
from .parcellation import Parcellation
from .partitioning import ami, variation_of_information
from .refinement import SIMILARITIES, Coloured, JointRefinement, fractionally_isomorphic, quantile_bins, refine_both, similarity
from .regions_store import DEAD, ERROR, HEAD, OUTPUT_BLOCK, ROI, WHOLE
from .transport import cost, structure, transport

REGIONS, MEMBERSHIP = "regions", "partitions"
"""The parts that these numbers belong to."""

REGIONS_REWIRED = "B's regions rewired"
"""The null where what regions drive was measured as such: edges between regions rewired, and their strengths permuted, inside pairs of sites."""

LEAST_MASS = 0.05
"""A coupling's link is kept where it carries at least this part of its region's mass."""

MOST_ROUNDS = 12
"""Rounds of refinement that are compared."""


def with_regions(
    side: GraphSide, parcellation: Parcellation, *, level: int | None = None, names: dict[tuple[str, int], str] | None = None,
    drives: pl.DataFrame | None = None,
) -> GraphSide:  # fmt: skip
    """The side with regions. names: what (site, block) is called. drives: `queries.blocks.drives_of` in place of the sum of the side's edges.

    Features of a site that has no partition are one region.
    """
    listed = _regions_of_nodes(side, parcellation, level, names or {})
    nodes = listed.unique("key", maintain_order=True).sort("order", "kind", "key")
    place = dict(zip(nodes["key"].to_list(), range(nodes.height), strict=True))
    of_node = listed["key"].replace_strict(place, return_dtype=pl.Int64).to_numpy()
    measured = drives is not None and drives.height > 0
    if measured:
        assert drives is not None
        weight = np.zeros((nodes.height, nodes.height))
        ends = drives.filter(pl.col("source").is_in(nodes["key"].to_list()) & pl.col("target").is_in(nodes["key"].to_list()))
        at_ends = (ends[name].replace_strict(place, return_dtype=pl.Int64).to_numpy() for name in ("source", "target"))
        weight[tuple(at_ends)] = ends["abs_sum"].to_numpy()
    else:
        weight = summed(of_node, side.source, side.target, side.strength, nodes.height)
    return replace(side, regions=Regions(parcellation.key, nodes, of_node, weight, measured))


def _regions_of_nodes(side: GraphSide, parcellation: Parcellation, level: int | None, names: dict[tuple[str, int], str]) -> pl.DataFrame:
    """The region of every node, in order: `key`, `site`, `layer`, `kind`, `label`, `size`, `order`."""
    key, kind = parcellation.key, HEAD if parcellation.method == "heads" else ROI
    blocks, table = [], []
    for site, own in parcellation.sites.items():
        at, labels = own.chosen if level is None else level, own.labels_of(level)
        blocks.append(pl.DataFrame({"index": np.arange(own.d_sae), "block": labels}).with_columns(site=pl.lit(site)))
        dead = own.d_sae - len(own.features)
        table.append((site, -1, block_key(key, site, DEAD), DEAD, f"dead features of {site}", dead))
        sizes = np.bincount(own.levels[at].labels, minlength=own.levels[at].n_blocks).tolist()
        table += [(site, b, block_key(key, site, kind, at, b), kind, names.get((site, b)) or f"{site}/{b}", size) for b, size in enumerate(sizes)]
    schema = {"site": pl.String, "block": pl.Int64, "region": pl.String, "of": pl.String, "label": pl.String, "size": pl.Int64}
    known = pl.concat(blocks).join(pl.DataFrame(table, schema=schema, orient="row"), on=["site", "block"])
    of_site = pl.col("site")
    standing = pl.col("kind").replace_strict({"error": ERROR, "output": OUTPUT_BLOCK, "feature": WHOLE}, return_dtype=pl.String)
    said = pl.when(pl.col("kind") == "error").then(pl.format("error of {}", of_site)).when(pl.col("kind") == "output").then(pl.lit("output"))
    alone = of_site.replace_strict({name: {of: block_key(key, name, of) for of in (ERROR, OUTPUT_BLOCK, WHOLE)} for name in set(side.nodes["site"])},
                                return_dtype=pl.Struct(dict.fromkeys((ERROR, OUTPUT_BLOCK, WHOLE), pl.String)))  # fmt: skip
    key_alone = pl.coalesce(pl.when(standing == of).then(alone.struct.field(of)) for of in (ERROR, OUTPUT_BLOCK, WHOLE))
    joined = side.nodes.join(known, on=["site", "index"], how="left", maintain_order="left")
    blocked = (pl.col("kind") == "feature") & pl.col("region").is_not_null()
    either = lambda name, otherwise: pl.when(blocked).then(pl.col(name)).otherwise(otherwise)
    return joined.select(
        either("region", key_alone).alias("key"), "site", "layer", either("of", standing).alias("kind"),
        either("label", said.otherwise(pl.format("all features of {}", of_site))).alias("label"), either("size", 1).alias("size"), "order",
    )  # fmt: skip


def drives_of_run(store: GraphStore, parcellation: str, run: str) -> pl.DataFrame:
    """What regions drive each other in a run, where the graph holds it; else an empty frame."""
    return drives_of(store, parcellation, run)


# --- memberships --------------------------------------------------------------------------------------------------------


def compare_memberships(paired: Paired, *, draws: int = 20, seed: int = 0, communities: CommunityOptions | None = None) -> pl.DataFrame:
    """Agreement of parcellations (of all sites, and of each) and of communities over nodes that both graphs have, as `VALUES`.

    communities: how they are found in either graph (features alone); None for none. What is permuted is which of B's labels a node has, inside its
    pair of sites, `draws` times at least 100.
    """
    values = Values(MEMBERSHIP)
    a, b = paired.side_a, paired.side_b
    feature = (paired.pairs["kind"] == "feature").to_numpy() & paired.both
    if a.regions is not None and b.regions is not None and a.regions.key != b.regions.key:
        first, second = (side.regions.of_node[rows] for side, rows in ((a, paired.a), (b, paired.b)) if side.regions is not None)
        live = feature & _live(a, paired.a) & _live(b, paired.b)
        for site in ("", *paired.pairs["site_a"].unique(maintain_order=True)):
            here = live if not site else live & (paired.pairs["site_a"] == site).to_numpy()
            if here.sum() > 1:
                _agreement(values, "regions", first[here], second[here], paired.group[here], draws, seed, site)
    if communities is not None:
        found = [_communities(side, communities) for side in (a, b)]
        first, second = found[0][paired.a], found[1][paired.b]
        here = feature & (first >= 0) & (second >= 0)
        if here.sum() > 1:
            _agreement(values, "communities", first[here], second[here], paired.group[here], draws, seed, "")
        for name, own in zip("AB", found, strict=True):
            values.add(f"communities of {name}", float(own.max() + 1), n=int((own >= 0).sum()))
    return values.frame()


def _live(side: GraphSide, rows: IntArray) -> np.ndarray:
    """Which of the nodes lie in a block of their site, (M,)."""
    assert side.regions is not None
    kinds = side.regions.nodes["kind"].to_numpy()[side.regions.of_node[rows]]
    return np.asarray(np.isin(kinds, [ROI, HEAD]))


def _agreement(values: Values, what: str, a: IntArray, b: IntArray, group: IntArray, draws: int, seed: int, site: str) -> None:
    """AMI and variation of information of labels (n,), beside B's permuted inside their groups."""
    rng = np.random.default_rng([seed, 4000])
    by_group = np.argsort(group, kind="stable")
    drawn = []
    for _ in range(max(draws, 100) if draws else 0):
        moved = np.empty_like(b)
        moved[by_group] = b[np.lexsort((rng.random(len(b)), group))]
        drawn.append((ami(a, moved), variation_of_information(a, moved)))
    null = np.array(drawn).reshape(-1, 2)
    values.add_against(f"{what}, AMI", ami(a, b), PERMUTED, null[:, 0], site=site, n=len(a))
    vi = variation_of_information(a, b)
    values.add_against(f"{what}, variation of information (nats)", vi, PERMUTED, null[:, 1], greater=False, site=site, n=len(a))


def _communities(side: GraphSide, options: CommunityOptions) -> IntArray:
    """The community of every feature that has an edge to another, (n,), else −1."""
    kept = (side.nodes["kind"] == "feature").to_numpy()
    edges = kept[side.source] & kept[side.target]
    used = np.zeros(side.n, dtype=bool)
    used[side.source[edges]] = used[side.target[edges]] = True
    found = np.full(side.n, -1, dtype=np.int64)
    if used.any():
        number = np.cumsum(used) - 1
        graph = EffectiveGraph(side.nodes.filter(used), number[side.source[edges]], number[side.target[edges]], side.strength[edges])
        divided: Communities = find_communities(graph, options)
        found[used] = divided.labels
    return found


# --- what regions drive --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RegionPair:
    """Regions of A and of B that have edges, and how far they overlap. rows_a, rows_b: their rows in either side's regions.

    overlap: (n_a, n_b) matched nodes in both; site_a, site_b: labels of sites and kinds on common numbers.
    """

    a: Regions
    b: Regions
    rows_a: IntArray
    rows_b: IntArray
    overlap: FloatArray
    site_a: IntArray
    site_b: IntArray

    @cached_property
    def weights(self) -> tuple[FloatArray, FloatArray]:
        """(n_a, n_a) and (n_b, n_b)."""
        return self.a.weight[np.ix_(self.rows_a, self.rows_a)], self.b.weight[np.ix_(self.rows_b, self.rows_b)]

    @cached_property
    def mutual(self) -> list[tuple[int, int]]:
        """Regions each of which holds most of the other's matched nodes: (row of A, row of B) among those with edges."""
        if not self.overlap.size:
            return []
        to_b, to_a = self.overlap.argmax(axis=1), self.overlap.argmax(axis=0)
        return [(i, int(j)) for i, j in enumerate(to_b) if to_a[j] == i and self.overlap[i, j] > 0]


def region_pair(paired: Paired) -> RegionPair:
    """The regions of both sides that have edges. Raises `BadMatching` where a side has none."""
    a, b = paired.side_a.regions, paired.side_b.regions
    if a is None or b is None:
        raise BadMatching("both sides need regions: find some with `featlas analyze rois`")
    rows = [np.flatnonzero(own.weight.sum(axis=0) + own.weight.sum(axis=1) > 0) for own in (a, b)]
    overlap = np.zeros((a.n, b.n))
    both = paired.both
    np.add.at(overlap, (a.of_node[paired.a[both]], b.of_node[paired.b[both]]), 1.0)
    if a.key == b.key:  # the same regions: whichever nodes either graph has of them
        same = a.nodes.with_row_index("i").join(b.nodes.with_row_index("j"), on="key")
        overlap[same["i"].to_numpy(), same["j"].to_numpy()] += 1.0
    most = paired.pairs.group_by("site_b", "site_a").len().sort(["len", "site_a"], descending=[True, False])
    named = dict(most.group_by("site_b", maintain_order=True).agg(pl.col("site_a").first()).iter_rows())
    labels = [
        own.nodes.select(pl.format("{}|{}", pl.col("site").replace(mapping), "kind")).to_series().gather(kept).to_list()
        for own, kept, mapping in ((a, rows[0], {}), (b, rows[1], named))
    ]  # fmt: skip
    numbers = np.unique(np.array(labels[0] + labels[1]), return_inverse=True)[1]
    return RegionPair(a, b, rows[0], rows[1], overlap[np.ix_(*rows)], numbers[: len(rows[0])], numbers[len(rows[0]) :])


def null_weights(paired: Paired, regions: RegionPair, draws: int, seed: int) -> tuple[str, list[FloatArray]]:
    """The null's name, and what B's regions drive in each draw, (n_b, n_b)."""
    b, rows = paired.side_b, np.ix_(regions.rows_b, regions.rows_b)
    if not regions.b.measured:
        drawn = [rewired(b.effective, seed + 5000 + i)[0] for i in range(draws)]
        return REWIRED, [summed(regions.b.of_node, one.source, one.target, one.weight, regions.b.n)[rows] for one in drawn]
    source, target = np.nonzero(regions.weights[1])
    graph = EffectiveGraph(pl.DataFrame({"order": regions.site_b}), source, target, regions.weights[1][source, target])
    found = []
    for i in range(draws):
        one, _ = rewired(graph, seed + 5000 + i, weights=Weights.SHUFFLED)
        found.append(np.zeros_like(regions.weights[1]))
        found[-1][one.source, one.target] = one.weight
    return REGIONS_REWIRED, found


def summed(of_node: IntArray, source: IntArray, target: IntArray, weight: FloatArray, n: int) -> FloatArray:
    """What n regions drive each other (n, n): the weights of edges (m,) between nodes, whose regions are of_node."""
    codes = of_node[source] * np.int64(n) + of_node[target]
    return np.asarray(np.bincount(codes, weight, n * n), dtype=np.float64).reshape(n, n)


def compare_regions(
    paired: Paired, *, draws: int = 20, seed: int = 0, bins: int = 4, alpha: float = 0.5, with_transport: bool = True
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Values, curves and links (`region`: the coupling) of the graphs of regions. Raises `BadMatching`, `NoTransport`."""
    regions = region_pair(paired)
    own_a, own_b = regions.weights
    null, nulls = null_weights(paired, regions, draws, seed)
    values, curves = Values(REGIONS), []
    for name, weight in zip("AB", (own_a, own_b), strict=True):
        values.add(f"regions of {name} with edges", float(len(weight)), n=int((weight > 0).sum()))
    values.add("regions that correspond", float(len(regions.mutual)), n=int(regions.overlap.sum()))
    _edges_between(values, regions, own_b, null, nulls)
    curves += _refined(values, regions, own_b, null, nulls, bins)
    spectra = [spectrum(weight) for weight in (own_a, own_b)]
    values.add_against(
        "Laplacian spectrum, W1", spectral_distance(*spectra), null, [spectral_distance(spectra[0], spectrum(one)) for one in nulls],
        greater=False, n=len(own_a) + len(own_b),
    )  # fmt: skip
    links = pl.DataFrame(schema=dict(LINKS))
    if with_transport:
        links = _transported(values, paired, regions, own_b, null, nulls, alpha, seed)
    return values.frame(), together(curves, CURVES), links


def _edges_between(values: Values, regions: RegionPair, own_b: FloatArray, null: str, nulls: list[FloatArray]) -> None:
    """Edges between corresponding regions: the numbers of `edge_overlap`, strengths as shares."""
    if len(regions.mutual) < 2:
        return
    rows, columns = (np.array(ends) for ends in zip(*regions.mutual, strict=True))
    first = _as_edges(regions.weights[0][np.ix_(rows, rows)])

    def numbers(weight: FloatArray) -> FloatArray:
        second = _as_edges(weight[np.ix_(columns, columns)])
        if not first.m or not second.m:
            return np.full(4, np.nan)
        found = union(first, second, len(rows))
        whole = by_size(found, np.array([max(found.m_a, found.m_b)]))
        return np.array([whole.jaccard[0], whole.weighted[0], *rank_correlations(found)[[0, 2]]])

    observed, drawn = numbers(own_b), np.array([numbers(one) for one in nulls]).reshape(-1, 4)
    for i, name in enumerate(("Jaccard", "weighted Jaccard", RANKS[0], RANKS[2])):
        values.add_against(f"edges between regions, {name}", observed[i], null, drawn[:, i], n=len(rows))


def _as_edges(weight: FloatArray) -> Edges:
    source, target = np.nonzero(weight)
    return Edges(source, target, weight[source, target], weight[source, target])


def coloured(weight: FloatArray, labels: IntArray, bins: int) -> Coloured:
    """A graph of regions as refinement reads it: labels of sites, edges by the quantile of their strength."""
    source, target = np.nonzero(weight)
    return Coloured(len(weight), source, target, labels, quantile_bins(weight[source, target], bins))


def _refined(values: Values, regions: RegionPair, own_b: FloatArray, null: str, nulls: list[FloatArray], bins: int) -> list[pl.DataFrame]:
    first = coloured(regions.weights[0], regions.site_a, bins)
    both = lambda weight: refine_both(first, coloured(weight, regions.site_b, bins))
    return refinement_rows(values, both(own_b), [both(one) for one in nulls], null)


def refinement_rows(values: Values, found: JointRefinement, drawn: list[JointRefinement], null: str) -> list[pl.DataFrame]:
    """Similarity by rounds beside that of null graphs: values at each of the first three rounds, curves over all up to `MOST_ROUNDS`."""
    rounds = np.arange(min(found.rounds, MOST_ROUNDS) + 1)
    own = np.array([similarity(found, int(k)) for k in rounds])
    of_null = np.array([[similarity(one, int(k)) for k in rounds] for one in drawn]).reshape(-1, len(rounds), 3)
    curves = []
    for i, name in enumerate(SIMILARITIES):
        curves.append(curve(values.part, name, "rounds", rounds, own[:, i], null=null, draws=of_null[:, :, i]))
    values.add("shared classes of labels", own[0, 0], n=sum(found.classes(0)))
    for k in rounds[1:3]:
        values.add_against(f"shared classes after {k} round{'s' if k != 1 else ''}", own[k, 0], null, of_null[:, k, 0], n=sum(found.classes(int(k))))
    for name, which in zip("AB", range(2), strict=True):
        counts = [float(found.classes(int(k))[which]) for k in rounds]
        curves.append(curve(values.part, f"classes of {name}", "rounds", rounds, counts))
    verdict = fractionally_isomorphic(found)
    values.add("fractionally isomorphic", None if verdict is None else float(verdict), n=found.rounds)
    return curves


# --- spectra -------------------------------------------------------------------------------------------------------------


def spectrum(weight: FloatArray) -> FloatArray:
    """Eigenvalues, ascending, in 0 … 2, of the normalised Laplacian I − D^−½ (W + Wᵀ) D^−½ / 2 of a small graph; (n,)."""
    symmetric = (weight + weight.T) / 2
    degree = symmetric.sum(axis=1)
    inverse = np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    return np.clip(np.linalg.eigvalsh(np.diag((degree > 0).astype(np.float64)) - inverse[:, None] * symmetric * inverse), 0.0, 2.0)


def spectral_distance(a: FloatArray, b: FloatArray) -> float:
    """Wasserstein-1 distance of two spectra as distributions, so that graphs of different sizes compare."""
    from scipy.stats import wasserstein_distance  # type: ignore[import-untyped]

    return float(wasserstein_distance(a, b)) if len(a) and len(b) else float("nan")


# --- which region is which ------------------------------------------------------------------------------------------------


def region_features(side: GraphSide, rows: IntArray, tasks: tuple[str, ...]) -> FloatArray:
    """What regions are, (n, k) in 0 … 1: depth, logarithm of size, share of strength in and out (the greatest 1), kind, the tasks' shares of it.

    tasks: the profile's columns that both sides have. Depth: the site's place among the side's, 0 the first and 1 the last.
    """
    regions = side.regions
    assert regions is not None
    order = regions.nodes["order"].to_numpy()[rows]
    depth = order / max(int(side.order.max(initial=0)), 1)
    size = np.log1p(regions.nodes["size"].to_numpy()[rows])
    scaled = [own / max(float(own.max(initial=0)), 1e-300) for own in (size, *(np.sqrt(regions.weight.sum(axis=k))[rows] for k in (0, 1)))]
    kinds = regions.nodes["kind"].to_numpy()[rows]
    columns = [depth, *scaled, *((kinds == kind).astype(np.float64) for kind in (DEAD, ERROR, OUTPUT_BLOCK))]
    if side.profile is not None and len(tasks) > 1:
        of_task = np.zeros((regions.n, len(tasks)))
        np.add.at(of_task, regions.of_node, side.profile[:, [side.tasks.index(task) for task in tasks]])
        of_task /= np.maximum(of_task.sum(axis=1, keepdims=True), 1e-300)
        columns += list(of_task[rows].T)
    return np.column_stack(columns)


def _transported(
    values: Values, paired: Paired, regions: RegionPair, own_b: FloatArray, null: str, nulls: list[FloatArray], alpha: float, seed: int
) -> pl.DataFrame:
    a, b = paired.side_a, paired.side_b
    tasks = tuple(task for task in a.tasks if task in b.tasks)
    costs = cost(region_features(a, regions.rows_a, tasks), region_features(b, regions.rows_b, tasks))
    # by the matching: what overlaps is cheap
    known = 1.0 - regions.overlap / max(float(regions.overlap.max(initial=0.0)), 1.0)

    def solved(weight: FloatArray) -> tuple[float, float, FloatArray]:
        found = transport(costs, *structure(regions.weights[0], weight), alpha=alpha, beginnings=[known], seed=seed)
        on_matched = float(sum(found.coupling[i, j] for i, j in regions.mutual))
        return found.distance, on_matched, found.coupling

    distance, on_matched, coupling = solved(own_b)
    drawn = np.array([solved(one)[:2] for one in nulls]).reshape(-1, 2)
    values.add_against("fused Gromov–Wasserstein", distance, null, drawn[:, 0], greater=False, n=coupling.size)
    values.add_against("coupling on regions that correspond by the matching", on_matched, null, drawn[:, 1], n=len(regions.mutual))
    part = np.maximum(coupling / coupling.sum(axis=1, keepdims=True), coupling / coupling.sum(axis=0, keepdims=True))
    i, j = np.nonzero(part >= LEAST_MASS)
    ends = [own.nodes[rows] for own, rows in ((regions.a, regions.rows_a[i]), (regions.b, regions.rows_b[j]))]
    frame = pl.DataFrame(
        {
            "source": ends[0]["key"], "target": ends[1]["key"], "source_label": ends[0]["label"], "target_label": ends[1]["label"],
            "weight": coupling[i, j], "strength": (regions.a.weight.sum(axis=0) + regions.a.weight.sum(axis=1))[regions.rows_a[i]],
        }
    ).with_columns(kind=pl.lit("region"))  # fmt: skip
    return frame.sort(["strength", "weight", "source", "target"], descending=[True, True, False, False]).select(*LINKS)
