"""Methods of partition against known answers: cliques, a dendrogram made by hand, scipy's own, agreement worked out by hand."""

import random
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from featlas.analysis import partitioning
from featlas.analysis.correlations import fisher
from featlas.analysis.parcellation import PartitionPath
from featlas.analysis.partitioning import (
    BadPartitionOption,
    NoCommunitiesExtra,
    NotACorrelation,
    Objective,
    PartitionMethod,
    PartitionOptions,
    ami,
    contingency,
    cut,
    from_weights,
    hierarchy_sizes,
    partition,
    random_blocks,
    variation_of_information,
)
from featlas.analysis.planted import planted
from scipy.cluster.hierarchy import fcluster, linkage

SELF_SUFFICIENT = [
    PartitionMethod.WARD,
    PartitionMethod.SPECTRAL,
    PartitionMethod.LEIDEN,
    PartitionMethod.LOUVAIN,
    PartitionMethod.HDBSCAN,
    PartitionMethod.DENSE_SBM,
]


def cliques(sizes: Sequence[int], inside: float = 0.7, outside: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlations of blocks of these sizes in random order, a little noise on each pair, and the blocks."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    noise = rng.uniform(-0.03, 0.03, (len(labels), len(labels)))
    found = np.where(labels[:, None] == labels, inside, outside) + (noise + noise.T) / 2
    np.fill_diagonal(found, 1)
    return found, labels


@pytest.mark.parametrize("method", SELF_SUFFICIENT)
def test_two_cliques(method: PartitionMethod) -> None:
    correlation, labels = cliques([14, 11])
    path = partition(method, correlation, PartitionOptions(neighbours=8))
    assert path.method == method.value
    best = path.labels[path.with_blocks(2)]
    assert ami(best, labels) == pytest.approx(1)
    assert best.max() == 1
    assert (best == 0).sum() == 14, "larger blocks first"
    assert path.info["seconds"] > 0


@pytest.mark.parametrize("method", SELF_SUFFICIENT)
def test_opposed_cliques_are_apart(method: PartitionMethod) -> None:
    """r = −0.7 between the two: signed or not, no method puts opposed features together."""
    correlation, labels = cliques([12, 10], outside=-0.7)
    path = partition(method, correlation, PartitionOptions(neighbours=8))
    assert ami(path.labels[path.with_blocks(2)], labels) == pytest.approx(1)


@pytest.mark.parametrize("method", SELF_SUFFICIENT)
def test_same_seed_same_path(method: PartitionMethod) -> None:
    correlation = planted("sae", 80, seed=0, samples=500).correlation()
    first, second = (partition(method, correlation, PartitionOptions(seed=5)) for _ in range(2))
    np.testing.assert_array_equal(first.labels, second.labels)


@pytest.mark.parametrize("method", SELF_SUFFICIENT)
def test_order_of_features_does_not_matter(method: PartitionMethod) -> None:
    correlation, labels = cliques([9, 8, 7])
    order = np.random.default_rng(1).permutation(len(labels))
    path = partition(method, correlation[np.ix_(order, order)], PartitionOptions(neighbours=5))
    assert ami(path.labels[path.with_blocks(3)], labels[order]) == pytest.approx(1)


@pytest.mark.parametrize("options", [PartitionOptions(n_blocks=3), PartitionOptions()])
@pytest.mark.parametrize("method", [PartitionMethod.SPECTRAL, PartitionMethod.HDBSCAN])
def test_three_cliques_with_and_without_their_number(method: PartitionMethod, options: PartitionOptions) -> None:
    correlation, labels = cliques([20, 15, 12])
    path = partition(method, correlation, options)
    assert ami(path.labels[0], labels) == pytest.approx(1)
    if method is PartitionMethod.SPECTRAL:
        assert path.info["n_blocks_by"] == ("given" if options.n_blocks else "eigengap")


def test_planted_blocks_are_found() -> None:
    data = planted("sae", 200, seed=0, samples=3000)
    correlation, inside = data.correlation(), data.structured
    n_blocks = int(data.fine.max()) + 2  # and one for unstructured features
    for method in (PartitionMethod.WARD, PartitionMethod.SPECTRAL):
        path = partition(method, correlation, PartitionOptions(n_blocks=n_blocks))
        found = path.labels[path.with_blocks(n_blocks)]
        assert found.max() + 1 == n_blocks
        assert ami(found[inside], data.fine[inside]) > 0.95


def test_hdbscan_puts_what_belongs_nowhere_into_the_last_block() -> None:
    correlation, labels = cliques([12, 9])
    alone = np.eye(25)
    alone[:21, :21] = correlation
    path = partition(PartitionMethod.HDBSCAN, alone)
    assert path.info["unclustered"] == 4
    assert set(path.labels[0, 21:]) == {2}
    assert ami(path.labels[0, :21], labels) == pytest.approx(1)
    nothing = partition(PartitionMethod.HDBSCAN, np.eye(12), PartitionOptions(min_size=8))
    assert nothing.n_blocks.tolist() == [1]


# --- hierarchies ------------------------------------------------------------------------------------------------------


def test_cutting_a_dendrogram_made_by_hand() -> None:
    """((0 1) 2) and (3 4), two merges at the same height: each number of blocks is met exactly."""
    merges = np.array([[0, 1, 1.0, 2], [3, 4, 2.0, 2], [2, 5, 2.0, 3], [6, 7, 5.0, 5]])
    expected = {5: [0, 1, 2, 3, 4], 4: [0, 0, 1, 2, 3], 3: [0, 0, 1, 2, 2], 2: [0, 0, 0, 1, 1], 1: [0, 0, 0, 0, 0]}
    for n_blocks, labels in expected.items():
        assert cut(merges, n_blocks).tolist() == labels


def test_ward_is_scipys_on_the_rows() -> None:
    correlation = planted("gauss", 90, seed=2, samples=300).correlation()
    path = partition(PartitionMethod.WARD, correlation)
    merges = linkage(correlation, "ward")  # from the rows themselves, not from distances by a matrix product
    assert len(path) == len(hierarchy_sizes(90))
    for labels, n_blocks in zip(path.labels, path.n_blocks, strict=True):
        assert ami(labels, fcluster(merges, n_blocks, "maxclust")) == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 2, 5, 40, 1000])
def test_hierarchies_go_down_to_one_block_and_through_the_number_asked_for(n: int) -> None:
    sizes = hierarchy_sizes(n, n_blocks=min(n, 37))
    assert sizes[-1] == 1
    assert min(n, 37) in sizes
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] <= n


def test_louvain_gives_its_levels() -> None:
    """Pairs of cliques that correlate: the path is nested and its last level no finer than its first."""
    correlation, labels = cliques([12] * 6)
    pairs = (labels[:, None] // 2 == labels // 2) & (labels[:, None] != labels)
    correlation[pairs] = 0.35
    path = partition(PartitionMethod.LOUVAIN, correlation, PartitionOptions(neighbours=20))
    assert path.n_blocks[-1] <= path.n_blocks[0]
    assert ami(path.labels[-1], labels // 2) == pytest.approx(1)


def test_resolution_and_objective_reach_leiden() -> None:
    correlation, labels = cliques([12] * 6)
    correlation[(labels[:, None] // 2 == labels // 2) & (labels[:, None] != labels)] = 0.35
    coarse, fine = (partition(PartitionMethod.LEIDEN, correlation, PartitionOptions(resolution=r, neighbours=20)) for r in (0.5, 4.0))
    assert ami(coarse.labels[0], labels // 2) == pytest.approx(1)
    assert ami(fine.labels[0], labels) == pytest.approx(1)
    potts = PartitionOptions(objective=Objective.CPM, resolution=0.5, neighbours=20)
    assert ami(partition(PartitionMethod.LEIDEN, correlation, potts).labels[0], labels) == pytest.approx(1), "0.35 < γ < 0.7"


def test_igraphs_generator_is_pythons_again() -> None:
    igraph = pytest.importorskip("igraph")
    random.seed(3)
    before = igraph.Graph.Erdos_Renyi(30, m=40).get_edgelist()
    partition(PartitionMethod.LOUVAIN, cliques([8, 8])[0])
    random.seed(3)
    assert igraph.Graph.Erdos_Renyi(30, m=40).get_edgelist() == before


@pytest.mark.parametrize("missing", ["igraph", "leidenalg"])
def test_a_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(NoCommunitiesExtra, match=r"featlas\[communities\]"):
        partition(PartitionMethod.LEIDEN, cliques([5, 5])[0])


@pytest.mark.parametrize("method", [PartitionMethod.WARD, PartitionMethod.LEIDEN])
def test_a_method_of_weights_is_that_of_their_correlations(method: PartitionMethod) -> None:
    correlation = planted("gauss", 60, seed=0, samples=500).correlation()
    expected = partition(method, correlation, PartitionOptions(seed=2))
    found = from_weights(method, PartitionOptions(seed=2))(fisher(correlation))
    np.testing.assert_array_equal(found.labels, expected.labels)


# --- block models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PartitionMethod.NESTED_SBM, PartitionMethod.WEIGHTED_SBM])
@pytest.mark.parametrize("failure", ["GraphToolMissing", "GraphToolTimeout", "GraphToolFailed"])
def test_the_dense_model_stands_in_for_graph_tool_and_says_so(method: PartitionMethod, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> PartitionPath:
        raise getattr(partitioning, failure)("no graph-tool here")

    monkeypatch.setattr(partitioning, "nested_block_model", fails)
    correlation, labels = cliques([14, 11])
    path = partition(method, correlation)
    assert path.method == "dense-sbm"
    assert path.info["instead_of"] == method.value
    assert path.info["reason"] == "no graph-tool here"
    assert ami(path.labels[path.with_blocks(2)], labels) == pytest.approx(1)


def test_options_reach_graph_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def records(correlation: np.ndarray, **options: object) -> PartitionPath:
        seen.update(options)
        return PartitionPath("nested-sbm", np.zeros((1, len(correlation)), dtype=np.int64))

    monkeypatch.setattr(partitioning, "nested_block_model", records)
    options = PartitionOptions(seed=4, neighbours=7, seconds=9.0, interpreter="/some/python")
    assert partition(PartitionMethod.NESTED_SBM, cliques([6, 6])[0], options).method == "nested-sbm"
    assert seen == {"kind": partitioning.NestedKind.NEAREST, "neighbours": 7, "seed": 4, "seconds": 9.0, "interpreter": "/some/python"}


# --- controls ---------------------------------------------------------------------------------------------------------


def test_random_blocks_keep_sizes_alone() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    dealt = random_blocks(labels, 0)
    assert np.bincount(dealt).tolist() == [50, 30, 20]
    assert abs(ami(dealt, labels)) < 0.05
    assert (dealt == random_blocks(labels, 0)).all()
    assert (dealt != random_blocks(labels, 1)).any()
    correlation = np.eye(100)
    like = partition(PartitionMethod.RANDOM, correlation, PartitionOptions(labels=labels)).labels[0]
    assert np.bincount(like).tolist() == [50, 30, 20]
    equal = partition(PartitionMethod.RANDOM, correlation, PartitionOptions(n_blocks=8)).labels[0]
    assert np.bincount(equal).tolist() == [13] * 4 + [12] * 4


def test_heads_are_the_given_labels() -> None:
    path = partition(PartitionMethod.HEADS, np.eye(6), PartitionOptions(labels=np.array([7, 2, 2, 5, 7, 2])))
    assert path.labels.tolist() == [[2, 0, 0, 1, 2, 0]]
    assert path.info["labels"] == [2, 5, 7]


# --- agreement --------------------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    a, b = [0, 0, 1, 1], [0, 1, 0, 1]
    assert ami(a, a) == ami(a, [5, 5, 3, 3]) == pytest.approx(1)
    assert variation_of_information(a, [5, 5, 3, 3]) == pytest.approx(0, abs=1e-12)
    assert variation_of_information(a, b) == pytest.approx(2 * np.log(2))  # independent: H(a) + H(b)
    assert variation_of_information(a, [0, 0, 0, 0]) == pytest.approx(np.log(2))
    # H(x | y) with counts [[2, 1], [0, 3]]: given y = 0 x is known, given y = 1 it is 1 of 4; the other way 0 is 2 of 3 and 1 is sure.
    x, y = [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]
    given_y = 4 / 6 * (-0.25 * np.log(0.25) - 0.75 * np.log(0.75))
    given_x = 3 / 6 * (-2 / 3 * np.log(2 / 3) - 1 / 3 * np.log(1 / 3))
    assert variation_of_information(x, y) == pytest.approx(given_x + given_y)
    assert contingency(x, y).tolist() == [[2, 1], [0, 3]]
    assert contingency([4, 9, 9], [1, 1, 0]).tolist() == [[0, 1], [1, 1]]


def test_independent_partitions_agree_by_chance_alone() -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 30, (3, 600))
    assert abs(ami(a, b)) < 0.03
    vi = variation_of_information
    assert vi(a, b) == pytest.approx(vi(b, a))
    assert vi(a, c) <= vi(a, b) + vi(b, c)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("method", SELF_SUFFICIENT)
def test_too_few_features_are_one_block(method: PartitionMethod, n: int) -> None:
    assert partition(method, np.eye(n)).labels.tolist() == [[0] * n]
    assert partition(method, np.eye(n), PartitionOptions(n_blocks=n)).n_blocks.tolist() == [n]


@pytest.mark.parametrize("bad", [np.zeros((3, 4)), np.full((5, 5), np.nan), np.full((5, 5), 2.0), np.triu(np.ones((5, 5))), np.zeros((0, 0))])
def test_what_is_no_correlation_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(NotACorrelation):
        partition(PartitionMethod.WARD, bad)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (PartitionMethod.WARD, PartitionOptions(n_blocks=11)),
        (PartitionMethod.WARD, PartitionOptions(n_blocks=0)),
        (PartitionMethod.LEIDEN, PartitionOptions(neighbours=0)),
        (PartitionMethod.LEIDEN, PartitionOptions(resolution=-1.0)),
        (PartitionMethod.HDBSCAN, PartitionOptions(min_size=1)),
        (PartitionMethod.RANDOM, PartitionOptions()),
        (PartitionMethod.RANDOM, PartitionOptions(labels=np.zeros(9, dtype=np.int64))),
        (PartitionMethod.HEADS, PartitionOptions()),
    ],
)
def test_options_out_of_range_are_refused(method: PartitionMethod, options: PartitionOptions) -> None:
    with pytest.raises(BadPartitionOption):
        partition(method, np.eye(10), options)


def test_other_arrays_agree_with_nothing() -> None:
    with pytest.raises(BadPartitionOption):
        ami([0, 1], [0, 1, 2])
