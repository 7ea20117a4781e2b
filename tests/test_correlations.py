"""Correlations of samples against numpy and scipy on dense copies, the null's margins and spread, halves, and which features are live."""

from dataclasses import replace

import numpy as np
import pytest
from featlas.analysis.correlations import (
    Correlation,
    Null,
    TooFewSamples,
    correlation,
    fisher,
    halves,
    live_features,
    shuffled,
    shuffled_samples,
    transformed,
)
from featlas.analysis.regions import coherence
from featlas.queries.samples import SiteSamples
from scipy import sparse, stats

N_SEQUENCES, LENGTH, D = 60, 20, 40


def made(seed: int = 0, *, dense: bool = False, signed: bool = True) -> SiteSamples:
    """Samples with correlated features, of few distinct values (ties); 0 is always on, 1 never, 2 constant, 3 nearly always on and far from 0."""
    random = np.random.default_rng(seed)
    n = N_SEQUENCES * LENGTH
    common = random.normal(size=(n, 4)) @ random.normal(size=(4, D))
    values = np.round(common + random.normal(size=(n, D)), 1)
    values[random.random((n, D)) < 0.85] = 0.0
    if not signed:
        values = np.maximum(values, 0.0)
    values[:, 0] = random.normal(size=n) + 0.5
    values[:, 1], values[:, 2] = 0.0, 0.1
    values[:, 3] = np.where(random.random(n) < 0.01, 0.0, 1000 + random.normal(size=n))
    values = values.astype(np.float32)
    return SiteSamples(
        "resid_1", "tiny", D, values if dense else sparse.csr_matrix(values), np.repeat(np.arange(N_SEQUENCES), LENGTH),
        np.tile(np.arange(LENGTH), N_SEQUENCES),
    )  # fmt: skip


def whole(samples: SiteSamples) -> np.ndarray:
    """The values as a dense float64 array."""
    return np.asarray(samples.values if samples.dense else samples.values.toarray(), dtype=np.float64)


def corrcoef(values: np.ndarray) -> np.ndarray:
    """numpy's, with 0 for constant columns and 1 on the diagonal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.corrcoef(values, rowvar=False)
    constant = values.min(axis=0) == values.max(axis=0)
    found[constant, :] = found[:, constant] = 0.0
    np.fill_diagonal(found, 1.0)
    return found


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", Correlation)
def test_correlations_are_those_of_the_dense_copy(dense: bool, kind: Correlation) -> None:
    samples = made(dense=dense)
    features = np.array([0, 1, 2, 3, 5, 8, 13, 21, 34])
    rows = np.arange(samples.n_tokens) % 3 != 0
    for chosen in (None, rows):
        values = whole(samples)[:, features] if chosen is None else whole(samples)[chosen][:, features]
        if kind in (Correlation.SIGNED_LOG, Correlation.LOG_MAGNITUDE):
            size = np.array([np.abs(column[column != 0]).mean() if column.any() else 1.0 for column in values.T])
            values = (np.sign(values) if kind is Correlation.SIGNED_LOG else 1) * np.log1p(np.abs(values) / size)
            values[:, 2] = 0.0  # the logarithm of a constant is one, though rounding says otherwise
        elif kind is Correlation.SPEARMAN:
            values = stats.rankdata(values, axis=0)
        found = correlation(samples, features, chosen, kind=kind)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, corrcoef(values), atol=1e-9)
        np.testing.assert_array_equal(found[1], np.eye(9)[1])
        np.testing.assert_array_equal(found[2], np.eye(9)[2])


@pytest.mark.parametrize("dense", [False, True])
def test_small_blocks_change_nothing(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, features = made(dense=dense), np.arange(D)
    at_once = correlation(samples, features)
    monkeypatch.setattr("featlas.analysis.correlations.BLOCK_BYTES", 12 * D * 7)
    np.testing.assert_allclose(correlation(samples, features), at_once, rtol=0, atol=1e-12 if dense else 0)


def test_ranks_are_scipys_but_for_a_constant() -> None:
    values = whole(made())
    ranks = transformed(sparse.csr_matrix(values), Correlation.SPEARMAN).toarray()
    expected = stats.rankdata(values, axis=0)
    for feature in range(D):
        silent = values[:, feature] == 0
        shift = expected[silent, feature][0] if silent.any() else (expected[0, feature] - ranks[0, feature])
        np.testing.assert_allclose(ranks[:, feature], expected[:, feature] - shift, atol=1e-9)


def test_one_token_is_too_few() -> None:
    samples = made()
    with pytest.raises(TooFewSamples, match="1 tokens"):
        correlation(samples, np.arange(3), np.arange(samples.n_tokens) == 5)


# -- halves and live features --------------------------------------------------------------------------------


def test_halves_are_of_whole_groups_and_depend_on_the_seed() -> None:
    samples = made()
    first, second = halves(samples, 3)
    assert (first != second).all()
    assert first.sum() == second.sum()
    assert not set(samples.sequence[first]) & set(samples.sequence[second])
    np.testing.assert_array_equal(halves(samples, 3)[0], first)
    assert (halves(samples, 4)[0] != first).any()
    paired = replace(samples, group=samples.sequence // 2)
    for half in halves(paired, 3):
        assert set(paired.sequence[half] // 2) == {g for g in range(30) if {2 * g, 2 * g + 1} <= set(paired.sequence[half])}
    with pytest.raises(TooFewSamples, match="one sequence"):
        halves(replace(samples, group=np.zeros_like(samples.sequence)))


@pytest.mark.parametrize("dense", [False, True])
def test_live_features_by_the_rule(dense: bool) -> None:
    samples = made(dense=dense)
    values = whole(samples)
    values[:, 10] = 0.0
    values[samples.sequence == 7, 10] = 1.0  # often, but in one text only
    samples = replace(samples, values=values.astype(np.float32) if dense else sparse.csr_matrix(values.astype(np.float32)))
    expected = []
    for feature in range(D):
        fits = []
        for rows in halves(samples, 1):
            own = values[rows, feature]
            texts = {s for s, value in zip(samples.sequence[rows], own) if value != 0}
            fits.append((own != 0).sum() >= 80 and len(texts) >= 28 and len(set(own)) > 1)
        if all(fits):
            expected.append(feature)
    found = live_features(samples, min_count=80, min_sequences=28, seed=1)
    assert found.tolist() == expected
    assert 0 < len(expected) < D - 3
    assert not {1, 2, 10} & set(live_features(samples).tolist())


# -- the null ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("null", Null)
def test_the_null_keeps_every_features_values(dense: bool, null: Null) -> None:
    samples = made(dense=dense)
    features = np.array([0, 3, 7, 20, 1])
    moved = shuffled_samples(samples, features, 5, null=null)
    before, after = whole(samples)[:, features], whole(moved)
    np.testing.assert_array_equal(np.sort(before, axis=0), np.sort(after, axis=0))
    assert (before != after)[:, :4].any(axis=0).all()
    again = shuffled_samples(samples, features, 5, null=null)
    np.testing.assert_array_equal(whole(again), after)
    if null is Null.ROTATED:
        for feature in range(4):
            assert any((np.roll(before[:, feature], k) == after[:, feature]).all() for k in range(len(before)))


def test_the_nulls_mean_is_0_and_its_spread_that_of_independent_samples() -> None:
    samples = made(1)
    features = np.arange(4, D)
    upper = np.triu_indices(len(features), 1)
    real = correlation(samples, features)[upper]
    draws = np.concatenate([shuffled(samples, features, seed)[upper] for seed in range(10)])
    spread = 1 / np.sqrt(samples.n_tokens - 1)
    assert real.std() > 2 * spread
    assert abs(draws.mean()) < 4 * spread / np.sqrt(len(draws))
    assert draws.std() == pytest.approx(spread, rel=0.03)
    half = halves(samples)[0]
    assert shuffled(samples, features, 0, rows=half)[upper].std() == pytest.approx(spread * np.sqrt(2), rel=0.1)


def test_places_are_drawn_evenly() -> None:
    """Two entries of ten rows: each of the 90 ways to place them comes up as often as any other."""
    values = sparse.csr_matrix(([1.0, 2.0], ([0, 3], [0, 0])), shape=(10, 1))
    samples = SiteSamples("s", "d", 9000, sparse.hstack([values] * 9000, format="csr"), np.arange(10), np.zeros(10, dtype=np.int64))
    moved = shuffled_samples(samples, np.arange(9000), 0).values.toarray()
    ways = (moved == 1).argmax(axis=0) * 10 + (moved == 2).argmax(axis=0)
    counts = np.bincount(ways, minlength=100)[np.arange(100) % 11 != 0]
    assert len(counts) == 90
    assert stats.chisquare(counts).pvalue > 0.01


# -- weights and summaries -----------------------------------------------------------------------------------


def test_fisher_weights() -> None:
    r = np.array([[1.0, 0.5, -1.0], [0.5, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    weights = fisher(r)
    assert weights[0, 1] == pytest.approx(np.log(3))  # 2·artanh(1/2) = log((1 + 1/2)/(1 − 1/2))
    assert np.isfinite(weights).all()
    assert weights[0, 2] < -10
    np.testing.assert_array_equal(np.diag(weights), 0.0)


def test_means_inside_and_outside_of_blocks() -> None:
    samples = made(2)
    r = correlation(samples, np.arange(D))
    labels = np.random.default_rng(0).integers(0, 5, size=D)
    labels[labels == 4] = 3
    labels[7] = 4  # a block of one
    members = lambda labels: sparse.csr_matrix((np.ones(D), (np.arange(D), labels)))
    found, overall = coherence(r, None, members(labels))
    inside, outside = [], []
    for block in range(5):
        own = [r[i, j] for i in range(D) for j in range(D) if i != j and labels[i] == labels[j] == block]
        others = [r[i, j] for i in range(D) for j in range(D) if labels[i] == block != labels[j]]
        row = found.row(block, named=True)
        assert row["size"] == (labels == block).sum()
        assert row["mean_correlation_outside"] == pytest.approx(np.mean(others))
        assert row["mean_correlation"] == (pytest.approx(np.mean(own)) if own else None)
        inside += own
        outside += others
    means = overall["mean_correlation"], overall["mean_correlation_outside"]
    assert means == pytest.approx((np.mean(inside), np.mean(outside)))
    assert coherence(r, None, members(np.arange(D)))[1]["mean_correlation"] is None
