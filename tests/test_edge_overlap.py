"""Edges that two graphs share: hand-worked numbers, a count edge by edge, planted equality, and the nulls."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from featlas.analysis.edge_overlap import (
    PERMUTED,
    REWIRED,
    Scale,
    by_size,
    by_threshold,
    compare_edges,
    coverage,
    kendall,
    null_edges,
    rank_correlations,
    spearman,
    union,
)
from featlas.analysis.graph_sides import BadMatching, Edges, one_to_one, pair_nodes
from scipy.stats import kendalltau, spearmanr

from .comparison_cases import layered, renamed, without_isolated


def edges(*rows: tuple[int, int, float]) -> Edges:
    source, target, weight = (np.array(column) for column in zip(*rows, strict=True))
    return Edges(source, target, weight.astype(float), np.abs(weight).astype(float))


def naive(a: dict[tuple[int, int], float], b: dict[tuple[int, int], float]) -> tuple[float, float, float, float]:
    """Jaccard, weighted, signed, sign agreement, edge by edge."""
    every, both = set(a) | set(b), set(a) & set(b)
    least = sum(min(abs(a.get(e, 0)), abs(b.get(e, 0))) for e in every)
    most = sum(max(abs(a.get(e, 0)), abs(b.get(e, 0))) for e in every)
    parts = [(max(sign * a.get(e, 0), 0), max(sign * b.get(e, 0), 0)) for e in every for sign in (1, -1)]
    signed = sum(min(pair) for pair in parts) / sum(max(pair) for pair in parts)
    agree = np.mean([a[e] * b[e] > 0 for e in both]) if both else float("nan")
    return len(both) / len(every), least / most, signed, float(agree)


def test_three_edges_by_hand() -> None:
    a, b = edges((0, 2, 3.0), (0, 3, -2.0), (1, 2, 1.0)), edges((0, 2, 2.0), (0, 3, 2.0), (1, 3, 4.0))
    found = by_size(union(a, b, 4, Scale.RAW), np.array([1, 2, 3]))
    # A: 02, 03, 12; B: 13, 02, 03
    assert found.shared.tolist() == [0, 1, 2]
    assert found.jaccard == pytest.approx([0, 1 / 3, 2 / 4])
    # of the two strongest 02 alone is shared: min 2; max 3 + 2 + 4
    assert found.weighted == pytest.approx([0, 2 / 9, 4 / 10])
    assert found.signed == pytest.approx([0, 2 / 9, 2 / (3 + 2 + 2 + 1 + 4)])
    assert np.isnan(found.signs[0])
    assert found.signs[1:] == pytest.approx([1, 0.5])


@pytest.mark.parametrize("seed", range(4))
def test_every_size_and_threshold_is_what_counting_edge_by_edge_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graphs = []
    for m in (25, 40):
        codes = rng.choice(100, m, replace=False)
        graphs.append(edges(*((c // 10, c % 10, float(w)) for c, w in zip(codes, rng.integers(1, 9, m) * rng.choice([-1, 1], m), strict=True))))
    found = union(*graphs, 10, Scale.RAW)
    listed = []
    for own in graphs:  # equal strengths by their number, as the module says
        order = np.lexsort((own.source * 10 + own.target, -own.strength))
        listed.append([((int(own.source[i]), int(own.target[i])), float(own.weight[i])) for i in order])
    sizes = np.arange(1, 41)
    of_sizes = by_size(found, sizes)
    for i, k in enumerate(sizes):
        expected = naive(dict(listed[0][:k]), dict(listed[1][:k]))
        assert [of_sizes.jaccard[i], of_sizes.weighted[i], of_sizes.signed[i], of_sizes.signs[i]] == pytest.approx(expected, nan_ok=True)
    levels = np.arange(1.0, 9.0)
    of_levels = by_threshold(found, levels)
    for i, t in enumerate(levels):
        expected = naive(*({e: w for e, w in own if abs(w) >= t} for own in listed))
        assert [of_levels.jaccard[i], of_levels.weighted[i], of_levels.signed[i], of_levels.signs[i]] == pytest.approx(expected, nan_ok=True)


def test_rank_correlations_are_those_of_scipy_and_undefined_where_nothing_varies() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, 50).astype(float), rng.integers(0, 6, 50).astype(float)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert kendall(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert np.isnan([spearman(a[:2], b[:2]), kendall(a[:2], b[:2]), spearman(np.ones(5), b[:5]), kendall(np.ones(5), b[:5])]).all()
    found = union(edges((0, 1, 1), (0, 2, 2), (0, 3, 3)), edges((0, 1, 3), (0, 2, 2), (0, 3, 1)), 4)
    assert rank_correlations(found) == pytest.approx([-1, -1, -1, -1])


def test_a_graph_and_its_renamed_copy_share_everything_and_a_rewired_one_what_chance_gives() -> None:
    side = layered(3, sizes=(12, 12, 12), density=0.3)
    other, matched = renamed(side, 5)
    paired = pair_nodes(side, other, matched)
    assert paired.n == side.n
    found = compare_edges(paired, draws=20).values
    whole = found.filter(pl.col("quantity").is_in(["Jaccard", "weighted Jaccard", "signed weighted Jaccard", "sign agreement"]))
    assert whole["value"].to_list() == pytest.approx([1.0] * 8)
    assert found.filter(pl.col("quantity").str.starts_with("Spearman"))["value"].to_list() == pytest.approx([1.0] * 4)
    assert (found.filter(quantity="weighted Jaccard")["p"] <= 1 / 21 + 1e-12).all()
    for null, draw in null_edges(paired, paired.edges()[1], 77).items():
        drawn = draw(0)
        by_chance = by_size(union(paired.edges()[0], drawn, paired.n), np.array([max(side.m, 1)])).weighted[0]
        row = found.filter(quantity="weighted Jaccard", null=null).row(0, named=True)
        assert abs(by_chance - row["null_mean"]) < 5 * (row["null_high"] - row["null_low"]), null
        assert row["null_mean"] < 0.8


def test_rewiring_keeps_degrees_and_strengths_and_permuting_keeps_the_graph() -> None:
    side = layered(4, sizes=(10, 10), density=0.4)
    paired = pair_nodes(side, side)
    own = paired.edges()[1]
    draws = null_edges(paired, own, 0)
    rewired, permuted = draws[REWIRED](3), draws[PERMUTED](3)
    for drawn in (rewired, permuted):
        assert len(set(zip(drawn.source.tolist(), drawn.target.tolist(), strict=True))) == own.m
        assert np.sort(drawn.strength).tolist() == np.sort(own.strength).tolist()
    assert (np.bincount(rewired.target, minlength=side.n) == np.bincount(own.target, minlength=side.n)).all()
    assert (rewired.source == own.source).all()
    assert sorted(np.bincount(permuted.target, minlength=side.n)) == sorted(np.bincount(own.target, minlength=side.n))
    site = side.order
    assert (site[permuted.source] == site[own.source]).all()


def test_a_node_that_one_graph_lacks_counts_as_edges_that_it_lacks_and_unmatched_ones_do_not_count() -> None:
    side = layered(6, sizes=(5, 5), density=0.9)
    fewer = layered(6, sizes=(5, 5), density=0.9)
    kept = fewer.source != 0
    parts = {name: getattr(fewer, name)[kept] for name in ("source", "target", "weight", "strength")}
    fewer = without_isolated(replace(fewer, **parts))
    values = compare_edges(pair_nodes(side, fewer), draws=0).values
    assert values.filter(quantity="Jaccard")["value"].to_list() == pytest.approx([fewer.m / side.m])
    other, matched = renamed(fewer, 1)
    paired = pair_nodes(side, other, matched)  # node 0 is matched with nothing
    rows = coverage(paired)
    share = rows.filter(pl.col("quantity") == "edges of A between matched nodes")["value"][0]
    assert share == pytest.approx(fewer.m / side.m)
    assert compare_edges(paired, draws=0).values.filter(quantity="Jaccard")["value"].to_list() == pytest.approx([1.0])


def test_one_to_one_takes_the_best_pair_whose_ends_are_free() -> None:
    rows = pl.DataFrame({"source": ["a", "a", "b", "c"], "target": ["x", "y", "x", "x"], "score": [0.9, 0.8, 0.85, 0.1]})
    assert one_to_one(rows).rows() == [("a", "x", 0.9)]
    rows = pl.DataFrame({"source": ["a", "b", "b"], "target": ["x", "x", "y"], "score": [0.9, 0.85, 0.5], "significant": [True, True, True]})
    assert one_to_one(rows).rows() == [("a", "x", 0.9), ("b", "y", 0.5)]
    assert one_to_one(rows.with_columns(significant=pl.Series([False, True, True]))).rows() == [("b", "x", 0.85)]
    with pytest.raises(BadMatching, match="score is missing"):
        one_to_one(rows.drop("score"))


def test_nothing_matched_is_said_with_the_way_out() -> None:
    with pytest.raises(BadMatching, match="featlas analyze match"):
        pair_nodes(layered(0), layered(0, model="another"))
    nothing = pl.DataFrame(schema={"source": pl.String, "target": pl.String, "score": pl.Float64})
    with pytest.raises(BadMatching, match=r"the matching found no pair .*more text.*--null shift.*--draws"):
        pair_nodes(layered(0), layered(0, model="another"), nothing)
    strangers = pl.DataFrame({"source": ["x"], "target": ["y"], "score": [1.0]})
    with pytest.raises(BadMatching, match="found 1 pair, but none has edges in both graphs"):
        pair_nodes(layered(0), layered(0, model="another"), strangers)
