"""Two graphs compared whole: profiles, regions, transport, communities; planted equal after a permutation, and rewired; kept and read back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.analysis.community_nulls import rewired
from featlas.analysis.comparison_plots import comparison_figures, comparison_page
from featlas.analysis.comparison_records import DIFFERENT, Values, against, curve
from featlas.analysis.comparison_verdict import verdict
from featlas.analysis.comparisons_store import NoSuchComparison, delete_comparison, list_comparisons, read_comparison, write_comparison
from featlas.analysis.graph_comparison import CompareOptions, Part, compare
from featlas.analysis.graph_profiles import distances, length_distances, path_lengths
from featlas.analysis.graph_sides import GraphSide
from featlas.analysis.parcellation import Level, Parcellation, SitePartition
from featlas.analysis.region_graphs import region_pair, spectrum, with_regions
from featlas.analysis.transport import NoTransport, cost, structure, transport
from featlas.errors import UserError
from featlas.queries.statistics import StatisticsStore
from scipy.stats import ks_2samp, wasserstein_distance

from .comparison_cases import layered, renamed, without_isolated

SIZES = (12, 12, 12)
QUICK = CompareOptions(draws=20)


def parcellation(side: GraphSide, key: str, *, blocks: int = 4, index_of: dict[str, np.ndarray] | None = None) -> Parcellation:
    """Blocks of every third feature, so that they are not of equal index; index_of: where each feature of the first model went."""
    sites = {}
    for site in sorted({s for s in side.nodes["site"] if s != "y"}):
        labels = np.arange(12) % blocks
        if index_of is not None:
            moved = np.empty(12, dtype=np.int64)
            moved[index_of[site]] = labels
            labels = moved
        sites[site] = SitePartition(site, "d", 12, np.arange(12), (Level("given", labels),), 0, pl.DataFrame())
    return Parcellation(key, "samples", side.model, "dense-sbm", "activation", sites)


def moved(matched: pl.DataFrame) -> dict[str, np.ndarray]:
    """Where each feature went, by site; those without an edge keep their numbers as far as these are free."""
    ends = matched.select(
        pl.col("source").str.split("|").list.get(2).alias("site"), pl.col("source").str.split("|").list.get(3).cast(pl.Int64).alias("a"),
        pl.col("target").str.split("|").list.get(3).cast(pl.Int64).alias("b"),
    )  # fmt: skip
    found = {}
    for (site,), rows in ends.group_by("site"):
        index = np.full(12, -1)
        index[rows["a"].to_numpy()] = rows["b"].to_numpy()
        index[index < 0] = sorted(set(range(12)) - set(rows["b"].to_list()))
        found[str(site)] = index
    return found


@pytest.fixture(scope="module")
def planted():
    """A graph, its copy with features permuted, the matching; both with regions."""
    side = layered(3, sizes=SIZES, density=0.3)
    other, matched = renamed(side, 5)
    return with_regions(side, parcellation(side, "pa")), with_regions(other, parcellation(other, "pb", index_of=moved(matched))), matched


@pytest.fixture(scope="module")
def equal(planted):
    return compare(*planted, QUICK, matching="key")


def one(found, part: str, quantity: str, **where: str) -> dict:
    row = found.value(part, quantity, **where)
    assert row is not None, (part, quantity)
    return row


def test_a_permuted_copy_is_the_same_in_everything(equal) -> None:
    assert equal.notes["without"] == {}
    for part, quantity in (
        ("edges", "Jaccard"), ("edges", "weighted Jaccard"), ("edges", "sign agreement"), ("edges", "Kendall, all edges"),
        ("refinement", "fractionally isomorphic"), ("refinement, 4 bins of strength", "fractionally isomorphic"),
        ("refinement", "matched nodes of one class after 2 rounds"), ("partitions", "regions, AMI"),
        ("regions", "edges between regions, weighted Jaccard"), ("regions", "fractionally isomorphic"),
    ):  # fmt: skip
        assert one(equal, part, quantity)["value"] == pytest.approx(1), (part, quantity)
    for part, quantity in (
        ("profiles", "edges in, W1"), ("profiles", "strength out, KS"), ("profiles", "path length by strength, W1"),
        ("partitions", "regions, variation of information (nats)"), ("regions", "Laplacian spectrum, W1"), ("regions", "fused Gromov–Wasserstein"),
    ):  # fmt: skip
        assert one(equal, part, quantity)["value"] == pytest.approx(0, abs=1e-9), (part, quantity)
    assert one(equal, "regions", "coupling on regions that correspond by the matching")["value"] == pytest.approx(1)
    assert one(equal, "regions", "fused Gromov–Wasserstein")["p"] <= 1 / 21 + 1e-9
    assert verdict(equal)[0] == "The graphs have the same edges with the same strengths."
    ends = equal.links.select(pl.col("source_label"), pl.col("target_label"))
    assert (ends["source_label"] == ends["target_label"]).all()


@pytest.mark.slow
def test_a_rewired_copy_is_at_chance(planted) -> None:
    side, other, matched = planted
    b = other.with_targets(rewired(other.effective, 99)[0].target)
    b = with_regions(b, parcellation(other, "pb", index_of=moved(matched)))
    found = compare(side, b, matched, QUICK)
    for quantity in ("Jaccard", "weighted Jaccard", "Spearman, all edges"):
        row = one(found, "edges", quantity)
        assert abs(row["z"]) < 4, row
        assert row["value"] < 0.9
    assert one(found, "refinement", "fractionally isomorphic")["value"] == 0
    assert abs(one(found, "regions", "edges between regions, weighted Jaccard")["z"]) < 4
    assert one(found, "profiles", "edges in, KS")["p"] == 1  # rewiring keeps degrees
    assert found.key != compare(side, other, matched, CompareOptions(parts=(Part.EDGES,), draws=0)).key


def test_the_other_way_round_is_the_same(planted) -> None:
    side, _, _ = planted
    b = layered(8, sizes=SIZES, density=0.3)
    options = CompareOptions(parts=(Part.EDGES, Part.REFINEMENT), draws=0)
    there, back = compare(side, b, None, options), compare(b, side, None, options)
    for quantity in ("Jaccard", "weighted Jaccard", "signed weighted Jaccard", "Kendall, all edges"):
        assert one(there, "edges", quantity)["value"] == pytest.approx(one(back, "edges", quantity)["value"])
    assert one(there, "refinement", "shared classes after 1 round")["value"] == pytest.approx(
        one(back, "refinement", "shared classes after 1 round")["value"]
    )


def test_what_cannot_be_had_is_named(planted) -> None:
    side = replace(planted[0], regions=None)
    found = compare(side, side, None, CompareOptions(draws=0))
    assert "featlas analyze rois" in found.notes["without"]["regions"]
    with pytest.raises(UserError, match="--draws"):
        CompareOptions(draws=-1).check()
    with pytest.raises(UserError, match="--alpha"):
        CompareOptions(alpha=2).check()


# --- profiles -----------------------------------------------------------------------------------------------------------


def test_distances_are_scipys_and_draws_exchange_values() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 30).astype(float), rng.integers(3, 8, 20).astype(float)
    found, drawn = distances(a, b, draws=300, seed=1)
    assert found == pytest.approx([wasserstein_distance(a, b), ks_2samp(a, b).statistic])
    assert drawn.shape == (300, 2)
    assert against(found[1], drawn[:, 1], greater=False, tested=DIFFERENT).p < 0.05
    assert distances(a, a)[0].tolist() == [0, 0]


def diamond() -> GraphSide:
    """i → a → y and i → b → c → y over sites 0 … 3; shares into y: 1 from a, 3 from c."""
    names = [("i", "resid_0", 0), ("a", "resid_1", 1), ("b", "resid_1", 1), ("c", "resid_2", 2), ("y", "y", 3)]
    rows = [(key, site, order, "output" if key == "y" else "feature", i, order) for i, (key, site, order) in enumerate(names)]
    nodes = pl.DataFrame(rows, schema=["key", "site", "layer", "kind", "index", "order"], orient="row")
    source, target = np.array([0, 0, 1, 2, 3]), np.array([1, 2, 4, 3, 4])
    weight = np.array([2.0, 2.0, 1.0, 5.0, 3.0])
    return GraphSide("diamond", "r", "m", nodes, source, target, weight, weight, ("resid_0",))


def test_path_lengths_by_hand() -> None:
    assert path_lengths(diamond(), weighted=False).tolist() == [0, 0, 0.5, 0.5]
    assert path_lengths(diamond(), weighted=True).tolist() == [0, 0, 0.25, 0.75]
    assert length_distances(np.array([0, 0, 0.5, 0.5]), np.array([0, 0, 0.25, 0.75])) == pytest.approx([0.25, 0.25])
    assert length_distances(np.array([0, 1.0]), np.array([0, 0, 0, 1.0])) == pytest.approx([2, 1])
    assert np.isnan(length_distances(np.zeros(3), np.ones(1))).all()


def test_path_counts_are_powers_of_the_adjacency_matrix() -> None:
    side = layered(2, sizes=(5, 5, 5), density=0.5)
    skip = np.flatnonzero(side.order == 1)[:2]
    side = replace(
        side, source=np.append(side.source, skip), target=np.append(side.target, np.flatnonzero(side.order == 3)[:2]),
        weight=np.append(side.weight, [1.0, 1.0]), strength=np.append(side.strength, [1.0, 1.0]),
    )  # fmt: skip
    matrix = np.zeros((side.n, side.n))
    matrix[side.source, side.target] = 1
    begin, end = side.order == 1, side.order == 4
    counts = np.array([np.linalg.matrix_power(matrix, k)[begin][:, end].sum() for k in range(5)])
    assert path_lengths(side, weighted=False) == pytest.approx(counts / counts.sum())


# --- regions ------------------------------------------------------------------------------------------------------------


def test_what_regions_drive_is_the_sum_over_members(planted) -> None:
    side = planted[0]
    regions = side.regions
    naive = np.zeros((regions.n, regions.n))
    for s, t, w in zip(side.source, side.target, side.strength, strict=True):
        naive[regions.of_node[s], regions.of_node[t]] += w
    assert regions.weight == pytest.approx(naive)
    assert regions.weight.sum() == pytest.approx(side.strength.sum())
    sizes = dict(regions.nodes.select("label", "size").iter_rows())
    assert sizes["resid_0/0"] == 3
    assert sizes["output"] == 1


def test_regions_that_correspond_are_those_of_the_matching(planted) -> None:
    from featlas.analysis.graph_sides import pair_nodes

    pair = region_pair(pair_nodes(*planted))
    for i, j in pair.mutual:
        assert pair.a.nodes["label"][int(pair.rows_a[i])] == pair.b.nodes["label"][int(pair.rows_b[j])]
    assert len(pair.mutual) == len(pair.rows_a)


def test_the_spectrum_of_a_complete_graph_and_of_an_edge() -> None:
    assert spectrum(np.ones((4, 4)) - np.eye(4)) == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3])
    assert spectrum(np.array([[0, 3.0], [0, 0]])) == pytest.approx([0, 2])


def test_transport_finds_a_permutation_and_counts_as_its_definition_says() -> None:
    rng = np.random.default_rng(0)
    weight = np.triu(rng.random((9, 9)), 1)
    order = rng.permutation(9)
    other = np.empty_like(weight)
    other[np.ix_(order, order)] = weight
    features = rng.random((9, 3))
    shuffled = np.empty_like(features)
    shuffled[order] = features
    first, second = structure(weight, other)
    found = transport(cost(features, shuffled), first, second)
    assert found.distance == pytest.approx(0, abs=1e-9)
    assert (found.coupling.argmax(axis=1) == order).all()
    drawn = np.triu(rng.random((9, 9)), 1)
    first, second = structure(weight, drawn)
    costs = cost(features, rng.random((9, 3)))
    solved = transport(costs, first, second, alpha=0.3)
    apart = (first[:, :, None, None] - second[None, None]) ** 2  # i, k, j, l
    structural = np.einsum("ikjl,ij,kl->", apart, solved.coupling, solved.coupling)
    assert solved.distance == pytest.approx(0.7 * (costs * solved.coupling).sum() + 0.3 * structural)
    independent = np.full((9, 9), 1 / 81)
    assert (costs * independent).sum() == pytest.approx(1)
    assert np.einsum("ikjl,ij,kl->", apart, independent, independent) == pytest.approx(1)
    assert solved.distance < 1
    with pytest.raises(NoTransport, match="--alpha"):
        transport(costs, first, second, alpha=-1)


# --- records ------------------------------------------------------------------------------------------------------------


def test_a_value_against_its_null_by_hand() -> None:
    found = against(5.0, [1.0, 2.0, 3.0])
    assert (found.mean, found.z, found.p) == (2.0, 3.0, 0.25)
    assert against(5.0, [1.0, 2.0, 3.0], greater=False).z == -3.0
    assert against(5.0, [1.0, 2.0, 3.0], greater=False).p == 1.0
    assert against(5.0, [1.0, 2.0, 3.0], greater=False, tested=DIFFERENT).p == 0.25
    assert against(1.0, [1.0, 1.0]).z is None
    assert against(None, [1.0]).mean is None
    values = Values("part")
    values.add_against("q", float("nan"), "null", [])
    assert values.frame().row(0, named=True)["value"] is None
    band = curve("p", "q", "x", [1, 2], [0.5, np.nan], null="n", draws=np.array([[0.1, np.nan], [0.3, np.nan]]))
    assert band["null_mean"].to_list() == [pytest.approx(0.2), None]


def test_it_is_kept_listed_and_read_back(equal, tmp_path: Path) -> None:
    with StatisticsStore(tmp_path) as statistics:
        write_comparison(statistics, equal)
        write_comparison(statistics, equal)
        listed = list_comparisons(statistics)
        assert listed["comparison"].to_list() == [equal.key]
        back = read_comparison(statistics, equal.key[:5])
        for name in ("values", "curves", "links"):
            assert getattr(back, name).equals(getattr(equal, name)), name
        assert (back.a, back.matching, back.settings["draws"]) == (equal.a, "key", 20)
        assert verdict(back) == verdict(equal)
        with pytest.raises(NoSuchComparison, match="there are"):
            read_comparison(statistics, "nothing")
        delete_comparison(statistics, equal.key)
        assert list_comparisons(statistics).is_empty()


@pytest.mark.slow
def test_its_figures_show_what_the_frames_hold_and_names_are_escaped(equal) -> None:
    figures = comparison_figures(equal)
    assert set(figures) == {"edges-by-size", "edges-by-threshold", "ranks", "refinement", "profiles", "coupling"}
    lines = [trace for trace in figures["edges-by-size"].data if trace.name == "data"]
    assert list(lines[0].y) == equal.curves.filter((pl.col("quantity") == "Jaccard") & (pl.col("axis") == "strongest edges")
                                                   & (pl.col("null") == "B rewired"))["value"].to_list()  # fmt: skip
    page = comparison_page(replace(equal, a="<script>alert(1)</script>"))
    assert "<script>alert(1)" not in page


# --- what a reader could take for more than it is -----------------------------------------------------------------------

QUICK_EDGES = CompareOptions(parts=(Part.EDGES,), draws=5, communities=None)


def test_opposite_signs_are_not_the_same_graph() -> None:
    a = layered(0)
    said = verdict(compare(a, replace(a, weight=-a.weight), None, QUICK_EDGES))
    assert said == ["The graphs have the same edges with the same strengths, but only 0% of them have the same sign."]


def test_draws_too_few_for_a_small_p_decide_nothing() -> None:
    a = layered(0)
    kept = np.random.default_rng(0).random(a.m) < 0.9
    b = replace(a, source=a.source[kept], target=a.target[kept], weight=a.weight[kept], strength=a.strength[kept])
    said = " ".join(verdict(compare(a, b, None, QUICK_EDGES)))
    assert "5 draws are too few to say" in said
    assert "no more than chance" not in said
    assert "They share more than" in " ".join(verdict(compare(a, b, None, replace(QUICK_EDGES, draws=20))))


@pytest.mark.slow
def test_the_key_knows_strengths_and_pairs() -> None:
    a = layered(0)
    b, matched = renamed(a, 1)
    site = pl.col("source").str.split("|").list.get(2)
    moved = matched.with_columns(target=pl.col("target").reverse().over(site))
    found = [compare(a, b, pairs, QUICK_EDGES) for pairs in (matched, moved, matched)]
    assert found[0].key == found[2].key != found[1].key
    squared = replace(a, strength=a.strength**2)  # as another --by gives it: the signed weights stay
    assert compare(a, a, None, QUICK_EDGES).key != compare(a, squared, None, QUICK_EDGES).key


def test_a_site_that_one_run_did_not_measure_says_nothing_of_its_edges() -> None:
    a = layered(0)
    b, matched = renamed(a, 1)
    inner = (b.nodes["site"] != "resid_2").to_numpy()
    kept = inner[b.source] & inner[b.target]
    b = replace(b, source=b.source[kept], target=b.target[kept], weight=b.weight[kept], strength=b.strength[kept])
    b = without_isolated(replace(b, dictionaries={"resid_0": "d", "resid_1": "d"}))
    a = replace(a, dictionaries={**b.dictionaries, "resid_2": "d"})
    sites = [pl.col(end).str.split("|").list.get(2).alias(f"site_{side}") for end, side in (("source", "a"), ("target", "b"))]
    found = compare(a, b, matched.with_columns(sites), QUICK_EDGES)
    row = found.value("edges", "Jaccard")
    assert row is not None
    assert row["value"] == 1.0  # not fewer for A's edges at resid_2
    # a site that was measured, and whose edges were all cut, is one that B lacks
    cut = compare(a, replace(b, dictionaries=a.dictionaries), matched.with_columns(sites), QUICK_EDGES).value("edges", "Jaccard")
    assert cut is not None
    assert cut["value"] < 0.6


def test_transport_alone_is_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="nothing is left to compare"):
        compare(layered(0), layered(0), None, CompareOptions(parts=(Part.TRANSPORT,)))


def test_paths_begin_at_error_nodes_where_nothing_enters_them() -> None:
    rows = [("f0", "s0", 0, "feature", 0, 1), ("e1", "s1", 1, "error", -1, 2), ("f1", "s1", 1, "feature", 0, 2), ("y", "y", -1, "output", -1, 3)]
    nodes = pl.DataFrame(rows, schema=["key", "site", "layer", "kind", "index", "order"], orient="row")
    ones = np.ones(3)
    side = GraphSide("g", "r", "m", nodes, np.array([0, 1, 2]), np.array([2, 3, 3]), ones, ones, ("s0", "error"))
    assert path_lengths(side, weighted=False).tolist() == [0, 0.5, 0.5, 0]
    assert path_lengths(replace(side, roots=("s0",)), weighted=False).tolist() == [0, 0, 1, 0]


def test_a_chance_that_cannot_move_is_no_verdict() -> None:
    a, b = layered(0, sizes=(4, 4, 4), density=1.0), layered(5, sizes=(4, 4, 4), density=1.0)  # every pair is joined: nothing to rewire
    found = compare(a, b, None, replace(QUICK_EDGES, draws=20))
    row = found.value("edges", "weighted Jaccard")
    assert (row["z"], row["value"]) == (None, pytest.approx(row["null_mean"]))
    said = " ".join(verdict(found))
    assert "Rewiring finds no edge of B to move" in said
    assert "no more than chance" not in said
    assert "of what they could share" not in said
