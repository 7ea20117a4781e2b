"""Colour refinement against linear programming, a naive refinement, networkx and known graphs."""

import networkx as nx
import numpy as np
import pytest
from featlas.analysis.refinement import (
    BadLabels,
    Coloured,
    fractionally_isomorphic,
    quantile_bins,
    refine,
    refine_both,
    similarity,
)
from scipy.optimize import linprog


def undirected(graph: nx.Graph) -> tuple[int, np.ndarray, np.ndarray]:
    ends = np.array(nx.convert_node_labels_to_integers(graph).edges)
    return graph.number_of_nodes(), np.concatenate([ends[:, 0], ends[:, 1]]), np.concatenate([ends[:, 1], ends[:, 0]])


def coloured(n: int, source: np.ndarray, target: np.ndarray, labels: np.ndarray | None = None, bins: np.ndarray | None = None) -> Coloured:
    zeros = np.zeros(n, dtype=np.int64), np.zeros(len(source), dtype=np.int64)
    return Coloured(n, source, target, zeros[0] if labels is None else labels, zeros[1] if bins is None else bins)


def matrices(graph: Coloured) -> list[np.ndarray]:
    """An adjacency matrix for each label of edges."""
    found = []
    for label in range(3):
        matrix = np.zeros((graph.n, graph.n))
        here = graph.edge_labels == label
        np.add.at(matrix, (graph.source[here], graph.target[here]), 1)
        found.append(matrix)
    return found


def by_programming(a: Coloured, b: Coloured) -> bool:
    """Whether a doubly stochastic X between nodes of one label has AX = XB and XᵀA = BXᵀ for every label of edges."""
    if a.n != b.n:
        return False
    n, rows, right = a.n, [], []
    place = np.arange(n * n).reshape(n, n)
    for i in range(n):
        for own in (place[i], place[:, i]):
            row = np.zeros(n * n)
            row[own] = 1
            rows.append(row)
            right.append(1.0)
    for one, other in zip(matrices(a), matrices(b), strict=True):
        for left, of_b in ((one, other), (one.T, other.T)):  # XᵀA = BXᵀ is AᵀX = XBᵀ
            for i in range(n):
                for j in range(n):
                    row = np.zeros(n * n)
                    row[place[:, j]] += left[i]
                    row[place[i]] -= of_b[:, j]
                    rows.append(row)
                    right.append(0.0)
    upper = (a.labels[:, None] == b.labels[None]).astype(float).ravel()
    return linprog(np.zeros(n * n), A_eq=np.array(rows), b_eq=right, bounds=list(zip(np.zeros(n * n), upper, strict=True))).status == 0


def naive(graph: Coloured) -> list[int]:
    """Stable classes by dictionaries of sorted tuples."""
    colours = [int(label) for label in graph.labels]
    while True:
        edges = list(zip(graph.source.tolist(), graph.target.tolist(), graph.edge_labels.tolist(), strict=True))
        out = [tuple(sorted((c, colours[t]) for s, t, c in edges if s == v)) for v in range(graph.n)]
        into = [tuple(sorted((c, colours[s]) for s, t, c in edges if t == v)) for v in range(graph.n)]
        seen = list(zip(colours, out, into, strict=True))
        number = {key: i for i, key in enumerate(sorted(set(seen)))}
        finer = [number[key] for key in seen]
        if len(set(finer)) == len(set(colours)):
            return finer
        colours = finer


def same_partition(a: np.ndarray, b: list[int]) -> bool:
    return len(set(zip(a.tolist(), b, strict=True))) == len(set(a.tolist())) == len(set(b))


def test_a_hexagon_and_two_triangles_are_fractionally_isomorphic_and_a_path_is_not() -> None:
    hexagon, triangles = coloured(*undirected(nx.cycle_graph(6))), coloured(*undirected(nx.disjoint_union(nx.cycle_graph(3), nx.cycle_graph(3))))
    path = coloured(*undirected(nx.path_graph(6)))
    assert fractionally_isomorphic(refine_both(hexagon, triangles)) is True
    assert by_programming(hexagon, triangles)
    assert fractionally_isomorphic(refine_both(hexagon, path)) is False
    assert not by_programming(hexagon, path)
    # labels tell them apart where they do not repeat along the cycle
    assert fractionally_isomorphic(refine_both(coloured(*undirected(nx.cycle_graph(6)), np.array([0, 1, 2, 0, 1, 2])),
                                               coloured(*undirected(nx.cycle_graph(6)), np.array([0, 0, 1, 1, 2, 2])))) is False  # fmt: skip


def random_graph(rng: np.random.Generator, n: int, *, labelled: bool) -> Coloured:
    source, target = np.nonzero(rng.random((n, n)) < 0.35)
    bins = rng.integers(0, 2, len(source)) if labelled else np.zeros(len(source), dtype=np.int64)
    return Coloured(n, source, target, rng.integers(0, 2, n) if labelled else np.zeros(n, dtype=np.int64), bins)


@pytest.mark.parametrize("seed", range(12))
def test_it_agrees_with_linear_programming(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = random_graph(rng, 5, labelled=bool(seed % 2))
    order = rng.permutation(5)
    labels = np.empty(5, dtype=np.int64)
    labels[order] = a.labels
    copy = Coloured(5, order[a.source], order[a.target], labels, a.edge_labels)
    other = Coloured(5, rng.permutation(a.source), a.target, a.labels, a.edge_labels)
    assert fractionally_isomorphic(refine_both(a, copy)) is True
    assert by_programming(a, copy)
    assert fractionally_isomorphic(refine_both(a, other)) is by_programming(a, other)


@pytest.mark.parametrize("seed", range(8))
def test_classes_are_the_naive_ones_and_equitable(seed: int) -> None:
    graph = random_graph(np.random.default_rng(100 + seed), 14, labelled=bool(seed % 2))
    found = refine(graph.n, graph.source, graph.target, graph.labels, graph.edge_labels)
    stable = found.colours[-1]
    assert found.stable
    assert same_partition(stable, naive(graph))
    assert (np.diff(found.n_classes) > 0).all()
    for matrix in matrices(graph):
        for colour in range(stable.max() + 1):
            counts = np.stack([matrix[:, stable == colour].sum(axis=1), matrix[stable == colour].sum(axis=0)])
            for other in range(stable.max() + 1):
                assert len(np.unique(counts[:, stable == other], axis=1).T) == 1


def test_rounds_of_undirected_graphs_are_those_of_networkx() -> None:
    graph = nx.gnm_random_graph(30, 24, seed=3)
    nx.set_node_attributes(graph, "same", "label")
    found = refine(*undirected(graph))
    hashes = nx.weisfeiler_lehman_subgraph_hashes(graph, node_attr="label", iterations=3, include_initial_labels=True)
    for k in range(4):
        own = found.colours[min(k, found.rounds)]
        assert same_partition(own, [hashes[node][k] for node in range(30)])
    assert found.n_classes[1] == len({degree for _, degree in graph.degree})


def test_a_long_multiset_is_told_from_one_that_differs_in_one_member() -> None:
    # a star of seven against one whose last leaf is of another label, seen from the centre
    for n in (2, 3, 7, 8, 9, 33):
        source, target = np.zeros(n, dtype=np.int64), np.arange(1, n + 1)
        labels = np.zeros(n + 1, dtype=np.int64)
        labels[-1] = 1
        both = refine_both(coloured(n + 1, source, target), coloured(n + 1, source, target, labels))
        assert both.a[1][0] != both.b[1][0]
        fewer = refine_both(coloured(n + 1, source, target), coloured(n + 1, source[1:], target[1:]))
        assert fewer.a[1][0] != fewer.b[1][0]


def test_similarity_by_hand() -> None:
    # a path of three against a path of two and a single node: one round gives degrees 1,2,1 and 1,1,0
    a = coloured(3, np.array([0, 1, 1, 2]), np.array([1, 0, 2, 1]))
    b = coloured(3, np.array([0, 1]), np.array([1, 0]))
    both = refine_both(a, b)
    assert similarity(both, 0) == pytest.approx([1, 1, 1])
    shared, kernel, divergence = similarity(both, 1)
    assert shared == pytest.approx(2 / 3)  # two of three nodes of degree 1 in each
    assert kernel == pytest.approx((9 + 2 * 2) / (9 + 5))  # counts 3·3 + 2·2 over 9 + (2² + 1²)
    assert divergence == pytest.approx(1 - 1 / 3)  # of either graph a third lies where the other has nothing
    assert fractionally_isomorphic(both) is False


def test_quantile_bins_depend_on_order_alone_and_equal_weights_share_one() -> None:
    weight = np.array([5.0, 1.0, 3.0, 2.0])
    assert quantile_bins(weight, 2).tolist() == [1, 0, 1, 0]
    assert quantile_bins(weight**3, 4).tolist() == quantile_bins(weight, 4).tolist() == [3, 0, 2, 1]
    assert quantile_bins(np.ones(5), 4).tolist() == [0] * 5
    assert quantile_bins(np.zeros(0), 4).tolist() == []


def test_labels_must_fit() -> None:
    with pytest.raises(BadLabels, match="give one for each"):
        refine(3, np.array([0]), np.array([1]), np.zeros(2, dtype=np.int64))


def test_no_edges_and_no_nodes() -> None:
    empty = np.zeros(0, dtype=np.int64)
    assert refine(3, empty, empty).n_classes.tolist() == [1]
    assert refine(0, empty, empty).n_classes.tolist() == [0]
