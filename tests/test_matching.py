"""Matching of features: against dense correlations, all assignments and every permutation; what must match, matches, and chance does not."""

from itertools import permutations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.analysis.matching import (
    BadMatchOptions,
    LiveSite,
    MatchOptions,
    NothingToMatch,
    Null,
    Strongest,
    assign,
    correlation_blocks,
    correspondence,
    keep_matching,
    live_site,
    match,
    moments,
    nearest,
    null_rows,
    score_threshold,
    strongest,
    write_matches,
)
from featlas.queries.matches import (
    Method,
    NoMatching,
    Pairing,
    list_matchings,
    matched_features,
    read_matches,
    read_scores,
    read_site_pairs,
)
from featlas.queries.schema import feature_key
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import open_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from .aligned_cases import Array, aligned_of, sparse_features

ONE_BLOCK = 1 << 30


def dense_correlation(x: Array, y: Array) -> Array:
    """Column by column, by numpy's own."""
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = np.corrcoef(x, y, rowvar=False)
    return np.nan_to_num(whole[: x.shape[1], x.shape[1] :])


def site(values: Array, *, dense: bool = False) -> LiveSite:
    return LiveSite("s", np.arange(values.shape[1]), values if dense else sparse.csr_matrix(values))


# -- 1. and 2. -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("memory", [1, 700, ONE_BLOCK])
def test_correlations_are_numpys_own(dense: tuple[bool, bool], memory: int) -> None:
    x, y = sparse_features(0, 60, 7, frequency=0.4), 1e4 + sparse_features(1, 60, 5, frequency=0.4)
    x[:, 3], y[:, 2] = 0.0, 5.0  # constants
    blocks = list(correlation_blocks(site(x, dense=dense[0]), site(y, dense=dense[1]), memory))
    assert [start for start, _ in blocks] == np.cumsum([0, *(len(r) for _, r in blocks)])[:-1].tolist()
    assert len(blocks) == {1: 7, 700: 2, ONE_BLOCK: 1}[memory]
    np.testing.assert_allclose(np.concatenate([r for _, r in blocks]), dense_correlation(x, y), atol=1e-10)


def test_moments_of_sparse_and_dense_agree() -> None:
    x = sparse_features(2, 50, 6, frequency=0.3) + np.array([0, 0, 0, 1e6, 0, 0])
    x[:, 5] = 0.1
    for found in (moments(sparse.csr_matrix(x)), moments(x)):
        np.testing.assert_allclose(found[0], x.mean(axis=0))
        np.testing.assert_allclose(found[1], [*x[:, :5].std(axis=0), 0.0], rtol=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_strongest_are_those_of_the_whole_matrix(seed: int, n_b: int, k: int, absolute: bool) -> None:
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(30, 8)), random.normal(size=(30, n_b))
    r = dense_correlation(x, y) if n_b > 1 else np.array([[np.corrcoef(column, y[:, 0])[0, 1]] for column in x.T])
    of_a, of_b = strongest(site(x, dense=True), site(y), k, 8 * 4 * n_b * 3, absolute=absolute)
    for found, whole in ((of_a, r), (of_b, r.T)):
        order = np.argsort(-(np.abs(whole) if absolute else whole), axis=1)[:, :k]
        assert found.other.tolist() == order.tolist()
        np.testing.assert_allclose(found.score, np.take_along_axis(whole, order, axis=1), atol=1e-12)


def test_live_features_are_active_often_enough_and_vary(tmp_path: Path) -> None:
    x = np.zeros((40, 5))
    x[:12, 0], x[:9, 1], x[:, 2], x[::2, 4] = 1, 1, 3, 2
    aligned = aligned_of(tmp_path, {"resid_0": x}, {"resid_0": x})
    assert live_site(aligned.a, "resid_0", 10).features.tolist() == [0, 4]
    assert live_site(aligned.a, "resid_0", 9).features.tolist() == [0, 1, 4]


# -- 3. Pairs ------------------------------------------------------------------------------------------------


def of_matrix(r: Array, k: int | None = None) -> tuple[Strongest, Strongest]:
    """What `strongest` would keep of a matrix of scores."""
    def best(whole: Array) -> Strongest:
        order = np.argsort(-whole, axis=1, kind="stable")[:, :k]
        return Strongest(order, np.take_along_axis(whole, order, axis=1))

    return best(r), best(r.T)


def test_nearest_and_assigned_worked_by_hand() -> None:
    """a0 and a1 both like b0 best; b0 prefers a0, so that a1 has no mutual counterpart, and the assignment gives it b1: .9 + .5 > .8 + .6."""
    r = np.array([[0.9, 0.6], [0.8, 0.5], [-0.2, -0.1]])
    found = nearest(*of_matrix(r))
    assert (found.a.tolist(), found.b.tolist(), found.score.tolist()) == ([0], [0], [0.9])
    given = assign(*of_matrix(r))
    assert (given.a.tolist(), given.b.tolist()) in (([0, 1], [0, 1]), ([0, 1], [1, 0]))
    assert given.score.sum() == pytest.approx(1.4)
    r[0, 1] = 0.5
    given = assign(*of_matrix(r))
    assert (given.a.tolist(), given.b.tolist(), given.score.tolist()) == ([0, 1], [0, 1], [0.9, 0.5])
    assert assign(*of_matrix(-np.ones((2, 2)))).a.tolist() == []
    assert nearest(*of_matrix(-np.ones((2, 2)))).a.tolist() == []
    assert assign(*of_matrix(-r), absolute=True).score.tolist() == [-0.9, -0.5]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_assignment_is_the_best_of_all(n_a: int, n_b: int, seed: int) -> None:
    r = np.random.default_rng(seed).normal(size=(n_a, n_b))
    found = assign(*of_matrix(r))
    worth = np.maximum(r, 0)
    if n_a > n_b:
        worth = worth.T
    best = max(worth[np.arange(len(worth)), list(order)].sum() for order in permutations(range(worth.shape[1]), len(worth)))
    assert found.score.sum() == pytest.approx(best)
    assert len(set(found.a.tolist())) == len(set(found.b.tolist())) == len(found.a)
    np.testing.assert_allclose(found.score, r[found.a, found.b])


def test_the_assignment_among_few_is_nearly_that_among_all() -> None:
    random = np.random.default_rng(3)
    x = sparse_features(4, 800, 120)
    y = x[:, random.permutation(120)] + 0.8 * sparse_features(5, 800, 120)
    of_a, of_b = strongest(site(x), site(y), 16, ONE_BLOCK)
    r = np.maximum(dense_correlation(x, y), 0)
    rows, columns = linear_sum_assignment(r, maximize=True)
    assert assign(of_a, of_b).score.sum() == pytest.approx(r[rows, columns].sum(), rel=1e-3)
    whole = strongest(site(x), site(y), 120, ONE_BLOCK)
    assert assign(*whole).score.sum() == pytest.approx(r[rows, columns].sum(), rel=1e-12)


# -- 4. Chance -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=3, max_size=12), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_exchanged_rows_keep_their_order_and_place_and_meet_another_sequence(lengths: list[int], seed: int) -> None:
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    one, other = null_rows(sequence, sequence, Null.SEQUENCES, np.random.default_rng(seed))
    assert one is not None
    assert len(one) == len(other) > 0
    assert (sequence[one] != sequence[other]).all()
    assert (position[one] == position[other]).all()
    assert len(np.unique(one)) == len(one)
    assert len(np.unique(other)) == len(other)


def test_what_belongs_together_never_meets() -> None:
    sequence = np.repeat(np.arange(12), 5)
    group = sequence // 2
    for seed in range(20):
        one, other = null_rows(sequence, group, Null.SEQUENCES, np.random.default_rng(seed))
        assert (group[one] != group[other]).all()
        assert len(one) >= 30
    with pytest.raises(NothingToMatch, match="belong together"):
        null_rows(sequence, 0 * group, Null.SEQUENCES, np.random.default_rng(0))
    with pytest.raises(NothingToMatch, match="--null shift"):
        null_rows(np.zeros(30, dtype=np.int64), np.zeros(30, dtype=np.int64), Null.SEQUENCES, np.random.default_rng(0))


def test_a_shift_is_cyclic_and_longer_than_a_sequence() -> None:
    sequence = np.repeat(np.arange(10), 6)
    shifts = set()
    for seed in range(30):
        one, other = null_rows(sequence, sequence, Null.SHIFT, np.random.default_rng(seed))
        assert one is None
        shift = int(other[0])
        assert other.tolist() == np.roll(np.arange(60), -shift).tolist()
        assert 6 <= shift <= 54
        shifts.add(shift)
    assert len(shifts) > 15
    with pytest.raises(NothingToMatch, match="4 segments"):
        null_rows(sequence[:4], sequence[:4], Null.SHIFT, np.random.default_rng(0))


def test_a_threshold_worked_by_hand() -> None:
    """At .7 there are 3 scores, and (0 + 1) / 2 by chance: a share of 1/6; at .5 there are 4, and (1 + 1) / 2: ¼; at .4 there are 5, and 2: .4."""
    score, null = np.array([0.9, 0.8, 0.7, 0.5, 0.4]), np.array([0.6, 0.45, 0.42, 0.1])
    assert score_threshold(score, null, 2, 0.25) == 0.5
    assert score_threshold(score, null, 2, 0.4) == 0.4
    assert score_threshold(score, null, 2, 0.2) == 0.7
    assert score_threshold(score, null, 2, 0.05) is None
    assert score_threshold(np.zeros(0), null, 2, 0.5) is None
    assert score_threshold(np.ones(40), np.zeros(0), 1, 0.05) == 1.0


# -- What must match, matches --------------------------------------------------------------------------------


def check_frames(found, n_a: int, n_b: int) -> None:
    """What holds of every matching."""
    for method in Method:
        for pairing in Pairing:
            own = found.pairs.filter((pl.col("method") == str(method)) & pl.col(str(pairing)))
            by = ["source"] if method is Method.ALL_SITES else ["source", "site_b"]
            assert not own.select(by).is_duplicated().any()
            by = ["target"] if method is Method.ALL_SITES else ["target", "site_a"]
            assert not own.select(by).is_duplicated().any()
    assert found.pairs.select(pl.col("mutual") | pl.col("assigned")).to_series().all()
    assert found.overall["n_a"] == n_a
    assert found.overall["n_b"] == n_b
    whole = found.scores.filter(pl.col("method") == "all-sites")
    assert whole["n"].sum() == found.overall["n_mutual"]
    assert found.sites["n_all"].sum() == found.overall["n_matched"] == found.matched().height


@pytest.mark.parametrize("null", Null)
def test_a_model_matches_itself(tmp_path: Path, null: Null) -> None:
    x = {"resid_0": sparse_features(0, 400, 30), "resid_1": sparse_features(1, 400, 20)}
    x["resid_1"][:, 4] = 0  # dead
    raw = {name: np.random.default_rng(i).normal(size=(400, 6)) for i, name in enumerate(x)}
    aligned = aligned_of(tmp_path, x, x, raw=(raw, raw), models=("m@1", "m@1"))
    found = match(aligned, MatchOptions(null=null))
    check_frames(found, 49, 49)
    matched = found.matched()
    assert matched.height == 49
    assert matched["score"].min() == pytest.approx(1.0)
    pairs = found.pairs.filter((pl.col("method") == "all-sites") & pl.col("mutual"))
    assert (pairs["site_a"] == pairs["site_b"]).all()
    assert (pairs["feature_a"] == pairs["feature_b"]).all()
    assert pairs["assigned"].all()
    own = found.sites.filter(pl.col("site_a") == pl.col("site_b"))
    assert own["share_a"].to_list() == [1.0, 1.0]
    assert own["cka"].to_list() == pytest.approx([1.0, 1.0])
    assert own["svcca"].to_list() == pytest.approx([1.0, 1.0])
    assert correspondence(found.sites).select("by_share", "by_cka", "by_svcca", "by_path").rows() == [("resid_0",) * 4, ("resid_1",) * 4]


def test_a_permutation_is_found_and_a_rotation_leaves_cka(tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    x, order = sparse_features(0, 500, 40), random.permutation(40)
    values = random.normal(size=(500, 8))
    turned = values @ np.linalg.qr(random.normal(size=(8, 8)))[0]
    aligned = aligned_of(tmp_path, {"resid_0": x}, {"resid_3": 2.5 * x[:, order]}, raw=({"resid_0": values}, {"resid_3": turned}))
    found = match(aligned)
    check_frames(found, 40, 40)
    pairs = found.pairs.filter((pl.col("method") == "site-pairs") & pl.col("mutual") & pl.col("significant")).sort("feature_b")
    assert pairs["feature_a"].to_list() == order.tolist()
    assert pairs["source"].to_list() == [feature_key("m@1", "da", "resid_0", i) for i in order]
    assert pairs["target"][0] == feature_key("n@1", "db", "resid_3", 0)
    row = found.sites.row(0, named=True)
    assert (row["cka"], row["svcca"], row["share_a"], row["layer_b"]) == pytest.approx((1.0, 1.0, 1.0, 0))
    assert row["kept_a"] == row["kept_b"] == 8


@pytest.mark.parametrize("seed", range(3))
def test_unrelated_features_do_not_match(tmp_path: Path, seed: int) -> None:
    aligned = aligned_of(tmp_path, {"resid_0": sparse_features(2 * seed, 600, 80)}, {"resid_0": sparse_features(2 * seed + 1, 600, 80)})
    found = match(aligned, MatchOptions(seed=seed))
    check_frames(found, 80, 80)
    assert found.overall["share_a"] < 0.05
    assert found.overall["null_share"] < 0.05
    assert found.overall["n_mutual"] > 10  # there always are mutual nearest neighbours; none is more than chance
    assert found.sites["cka"].to_list() == [None]


def test_half_that_is_shared_is_found_against_chance(tmp_path: Path) -> None:
    """30 of 60 features are the same with noise: at a false discovery rate of a tenth nearly all are found, and few others."""
    x, y = sparse_features(0, 1200, 60), sparse_features(1, 1200, 60)
    y[:, :30] = x[:, :30] + 0.4 * sparse_features(2, 1200, 30)
    found = match(aligned_of(tmp_path, {"resid_0": x}, {"resid_0": y}), MatchOptions(fdr=0.1, draws=10))
    pairs = found.pairs.filter((pl.col("method") == "all-sites") & pl.col("mutual") & pl.col("significant"))
    right = pairs.filter((pl.col("feature_a") == pl.col("feature_b")) & (pl.col("feature_a") < 30)).height
    assert right == 30
    assert pairs.height - right <= 6


def test_slow_features_by_chance_need_more_than_rows_that_are_shuffled(tmp_path: Path) -> None:
    """Features that stay on for 20 segments correlate by chance as few independent rows do: the threshold knows it, shuffled rows would not."""
    slow = [np.repeat(sparse_features(seed, 50, 40, frequency=0.3), 20, axis=0) for seed in (0, 1)]
    found = match(aligned_of(tmp_path, {"resid_0": slow[0]}, {"resid_0": slow[1]}))
    assert found.overall["n_matched"] <= 1
    r = dense_correlation(slow[0], np.random.default_rng(0).permutation(slow[1]))
    assert found.scores.filter(pl.col("null_n") > 0)["low"].max() > r.max() + 0.1


def test_options_reach_the_search(tmp_path: Path) -> None:
    x = sparse_features(0, 400, 12) - 0.2
    aligned = aligned_of(tmp_path, {"mlp_0": x}, {"mlp_0": -x})
    assert match(aligned).overall["n_matched"] == 0
    turned = match(aligned, MatchOptions(absolute=True))
    assert turned.overall["n_matched"] == 12
    assert turned.matched()["score"].to_list() == pytest.approx([-1.0] * 12)
    one, other = (match(aligned, MatchOptions(absolute=True, memory=memory)) for memory in (4000, ONE_BLOCK))
    assert one.key == other.key
    assert_frame_equal(one.pairs, other.pairs)
    assert match(aligned, MatchOptions(seed=1)).key != one.key
    told: list[tuple[int, int]] = []
    match(aligned, progress=lambda *done: told.append(done))
    assert told == [(1, 1)]
    task = aligned_of(tmp_path, {"mlp_0": x}, {"mlp_0": x}, key="task", of_task=True)
    assert match(task).settings["null"] == "shift"
    for wrong, said in (({"fdr": 1}, "fdr is 1"), ({"draws": 0}, "draws is 0"), ({"variance": 0.0}, "variance is 0"), ({"top_k": 0}, "top_k is 0")):
        with pytest.raises(BadMatchOptions, match=said):
            MatchOptions(**wrong)
    with pytest.raises(NothingToMatch, match="active on 401 of 400 segments"):
        match(aligned, MatchOptions(min_active=401))


def test_a_site_without_live_features_is_no_obstacle(tmp_path: Path) -> None:
    x = sparse_features(0, 300, 10)
    aligned = aligned_of(tmp_path, {"resid_0": 0 * x, "resid_1": x}, {"resid_0": x, "resid_1": 0 * x})
    found = match(aligned)
    check_frames(found, 10, 10)
    assert found.sites.select("site_a", "site_b", "n_matched").rows() == [
        ("resid_0", "resid_0", 0), ("resid_0", "resid_1", 0), ("resid_1", "resid_0", 10), ("resid_1", "resid_1", 0)]  # fmt: skip
    assert correspondence(found.sites)["by_share"].to_list() == [None, "resid_0"]


# -- Keeping -------------------------------------------------------------------------------------------------


def test_a_matching_is_kept_and_read_again_in_either_order(tmp_path: Path) -> None:
    x = {"resid_0": sparse_features(0, 300, 10), "resid_1": sparse_features(1, 300, 8)}
    y = {name: np.roll(values, 1, axis=1) for name, values in x.items()}
    aligned = aligned_of(tmp_path, x, y)
    found = match(aligned)
    with StatisticsStore(tmp_path) as statistics:
        with pytest.raises(NoMatching, match="featlas analyze match"):
            read_matches(statistics)
        for _ in range(2):
            keep_matching(statistics, found)
        order = ["method", "source", "target"]
        assert_frame_equal(read_matches(statistics, found.key[:6]).sort(order), found.pairs.sort(order))
        assert_frame_equal(read_site_pairs(statistics), found.sites)
        assert_frame_equal(read_scores(statistics), found.scores, check_row_order=False)
        listed = list_matchings(statistics).row(0, named=True)
        assert (listed["matching"], listed["n_matched"], listed["model_b"]) == (found.key, 18, "n@1")
        assert_frame_equal(matched_features(statistics), found.matched(), check_row_order=False)
        turned = read_matches(statistics, model_a="n@1", model_b="m@1", method=Method.ALL_SITES)
        straight = read_matches(statistics, model_a="m@1", method=Method.ALL_SITES)
        assert turned["target"].sort().to_list() == straight["source"].sort().to_list()
        assert set(turned["site_a"]) == set(y)
        with pytest.raises(NoMatching, match=r"of m@1 and z@1"):
            read_matches(statistics, model_a="m@1", model_b="z@1")
        with pytest.raises(NoMatching, match="'zz'"):
            read_matches(statistics, "zz")


def test_edges_are_written_once_and_replaced(tmp_path: Path) -> None:
    x = {"resid_0": sparse_features(0, 300, 10), "resid_1": sparse_features(1, 300, 8)}
    aligned = aligned_of(tmp_path / "atlas", x, x)
    found = match(aligned)
    with open_graph(tmp_path / "atlas") as graph:
        graph.merge_nodes("Feature", pl.DataFrame({"key": [feature_key("m@1", "da", "resid_0", 3)], "label": ["mine"]}))
        assert write_matches(graph, found, aligned) == 18
        assert write_matches(graph, found, aligned) == 18
        edges = graph.read_edges("MATCHES")
        assert edges.height == 18
        assert (edges["source"] < edges["target"]).all()
        assert set(edges["matching"]) == {found.key}
        nodes = graph.query("MATCH (f:Feature) RETURN f.key AS key, f.label AS label ORDER BY key")
        assert nodes.height == 36
        assert nodes["label"].drop_nulls().to_list() == ["mine"]
        both = write_matches(graph, found, aligned, list(Method))
        assert graph.read_edges("MATCHES").height == both == 36
        fewer = match(aligned, MatchOptions(min_active=35))
        object.__setattr__(fewer, "key", found.key)
        left = write_matches(graph, fewer, aligned)
        assert graph.read_edges("MATCHES").height == left < 18
        itself = aligned_of(tmp_path / "itself", x, x, models=("m@1", "m@1"))
        for side in (itself.b.run.dictionaries,):
            side.update(dict.fromkeys(x, "da"))  # type: ignore[attr-defined]
        assert write_matches(graph, match(itself), itself) == 0  # a feature is not joined to itself
