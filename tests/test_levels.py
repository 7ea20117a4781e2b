"""Scores of a path's levels against loops over pairs, the rules on planted blocks, and the null of shuffled samples."""

import functools
import itertools

import numpy as np
import polars as pl
import pytest
from featlas.analysis.block_model import BadWeights, dense_block_model
from featlas.analysis.levels import NoSuchLevel, Rule, choose, null_verdict, scored, transferred
from featlas.analysis.parcellation import PATH_SCORES, PartitionPath
from featlas.analysis.planted import pearson, planted, unstructured
from scipy import stats
from sklearn.metrics import adjusted_mutual_info_score


def fisher(correlation):
    """2 · artanh(r), the diagonal 0."""
    weights = 2 * np.arctanh(np.clip(correlation, -1 + 1e-6, 1 - 1e-6))
    np.fill_diagonal(weights, 0)
    return weights


def halves_of(data, seed=0):
    """Fisher weights of two halves of the samples."""
    first, second = (fisher(data.correlation(half)) for half in data.halves(seed))
    return first, second


@functools.cache
def case(kind, seed, n=240, samples=2000):
    """Planted data, its path, and the scores with a refit."""
    data = planted(kind, n, seed=seed, samples=samples)
    path = dense_block_model(fisher(data.correlation()))
    return data, path, scored(path, halves_of(data), refit=dense_block_model)


def verdict_of(data, shuffles=3):
    """The null's verdict on data of planted blocks or none."""
    path = dense_block_model(fisher(data.correlation()))
    return null_verdict(path, halves_of(data), [halves_of(data.shuffled(9 + i), i) for i in range(shuffles)], refit=dense_block_model)


def naive_transferred(labels, seen, unseen):
    """ln p per pair of unseen weights, pair by pair: normal, mean and variance from the seen weights between the two blocks and the prior."""
    pairs = list(itertools.combinations(range(len(labels)), 2))
    all_seen = np.array([seen[i, j] for i, j in pairs])
    m0, v0 = all_seen.mean(), all_seen.var()
    total = 0.0
    for i, j in pairs:
        values = np.array([seen[k, m] for k, m in pairs if {labels[k], labels[m]} == {labels[i], labels[j]}])
        count = len(values)
        mean = (m0 + values.sum()) / (1 + count)
        spread = ((values - values.mean()) ** 2).sum() + count / (1 + count) * (values.mean() - m0) ** 2
        total += stats.norm.logpdf(unseen[i, j], mean, np.sqrt((3 * v0 + spread) / (3 + count)))
    return total / len(pairs)


@pytest.mark.slow
def test_held_out_likelihood_is_that_of_the_loop_over_pairs():
    data = planted("sae", 30, seed=0, samples=300, n_blocks=4)
    seen, unseen = halves_of(data)
    path = dense_block_model(fisher(data.correlation()), start_blocks=9)
    for labels, found in zip(path.labels, transferred(path, seen, unseen), strict=True):
        assert found == pytest.approx(naive_transferred(labels, seen, unseen), rel=1e-10)


@pytest.mark.slow
def test_without_a_refit_the_paths_own_blocks_are_scored_both_ways():
    data = planted("sae", 30, seed=1, samples=300, n_blocks=4)
    first, second = halves_of(data)
    path = dense_block_model(fisher(data.correlation()), start_blocks=6)
    frame = scored(path, (first, second))
    for labels, value in zip(path.labels, frame["held_out"], strict=True):
        assert value == pytest.approx((naive_transferred(labels, first, second) + naive_transferred(labels, second, first)) / 2)
    assert frame["stability"].null_count() == len(frame)


def test_with_a_refit_the_halves_own_blocks_are_scored_and_compared():
    data, path, frame = case("sae", 0)
    first, second = halves_of(data)
    own, other = dense_block_model(first), dense_block_model(second)
    for n_blocks in (1, 5, 12):
        row = frame.row(path.with_blocks(n_blocks), named=True)
        a, b = (fit.labels[fit.with_blocks(n_blocks)] for fit in (own, other))
        assert row["stability"] == pytest.approx(adjusted_mutual_info_score(a, b))
        expected = [transferred(PartitionPath("x", labels[None]), *way)[0] for labels, way in ((a, (first, second)), (b, (second, first)))]
        assert row["held_out"] == pytest.approx(np.mean(expected))


def test_scores_have_the_declared_columns():
    _, path, frame = case("sae", 0)
    assert dict(frame.schema) == dict(PATH_SCORES)
    assert frame["n_blocks"].to_list() == path.n_blocks.tolist()
    assert frame["largest"].to_list()[-1] == 240
    assert frame["description_length"].to_list() == path.description_length.tolist()
    assert frame["stability_low"].null_count() == len(frame)
    bare = scored(PartitionPath("x", path.labels), None)
    assert dict(bare.schema) == dict(PATH_SCORES)
    assert all(bare[name].null_count() == len(path) for name in ("description_length", "held_out", "stability"))


def test_further_splits_are_averaged_and_give_the_stability_a_range():
    data, path, one = case("gauss", 1)
    other = halves_of(data, seed=5)
    alone = scored(path, other, refit=dense_block_model)
    both = scored(path, halves_of(data), refit=dense_block_model, more_halves=[other])
    for name in ("held_out", "stability"):
        np.testing.assert_allclose(both[name], (one[name] + alone[name]) / 2)
    each = np.stack([one["stability"].to_numpy(), alone["stability"].to_numpy()])
    np.testing.assert_allclose(both["stability_low"], each.min(axis=0))
    np.testing.assert_allclose(both["stability_high"], each.max(axis=0))


def test_halves_of_other_features_are_refused():
    _, path, _ = case("sae", 0)
    with pytest.raises(BadWeights, match="240 features"):
        scored(path, (np.zeros((5, 5)), np.zeros((5, 5))))


def test_a_single_feature_has_no_held_out_likelihood():
    one = np.zeros((1, 1))
    path = dense_block_model(one)
    frame = scored(path, (one, one), refit=dense_block_model)
    assert frame["held_out"].to_list() == [None]
    assert not null_verdict(path, (one, one), [(one, one)] * 3, refit=dense_block_model).significant


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gauss", "sae", "attr"])
def test_held_out_likelihood_finds_the_planted_fine_level(kind):
    agreements = []
    for seed in (0, 1):
        data, path, frame = case(kind, seed)
        found = path.labels[choose(path, frame, Rule.HELD_OUT)]
        agreements.append(adjusted_mutual_info_score(found[data.structured], data.fine[data.structured]))
    assert np.mean(agreements) > 0.9
    assert min(agreements) > 0.85


def test_stability_finds_a_planted_level_of_two_or_more_blocks():
    data, path, frame = case("gauss", 0)
    found = path.labels[choose(path, frame, Rule.STABILITY)]
    inside = data.structured
    assert found.max() > 0
    assert max(adjusted_mutual_info_score(found[inside], truth[inside]) for truth in (data.fine, data.coarse)) > 0.9


def made_scores(**columns):
    """Scores of a path of 4, 3, 2 and 1 blocks."""
    labels = np.array([[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 1, 1], [0, 0, 0, 0]])
    path = PartitionPath("made", labels, np.array([4.0, 2.0, 2.0, 9.0]))
    return path, scored(path, None).with_columns(pl.Series(name, values, dtype=pl.Float64) for name, values in columns.items())


def test_each_rule_takes_the_level_that_it_says():
    path, frame = made_scores(held_out=[1.0, 3.0, 3.0, 2.0], stability=[0.5, 0.8, 0.8, 1.0])
    assert choose(path, frame, Rule.HELD_OUT) == 2  # of equal ones the coarser
    assert choose(path, frame, Rule.DESCRIPTION_LENGTH) == 2
    assert choose(path, frame, Rule.STABILITY) == 1  # of equal ones the finer; one block does not count
    assert choose(path, frame, Rule.HEADS, n_heads=1) == 2
    assert choose(path, frame, Rule.HEADS, n_heads=3) == 0
    assert choose(path, frame, Rule.GIVEN, n_blocks=3) == 1
    assert choose(path, frame, Rule.GIVEN, n_blocks=50) == 0


def test_a_level_without_a_score_is_not_chosen():
    path, frame = made_scores(held_out=[None, 1.0, None, None], stability=[None, None, 0.1, None])
    assert choose(path, frame, Rule.HELD_OUT) == 1
    assert choose(path, frame, Rule.STABILITY) == 2


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        (Rule.HELD_OUT, {}, "held_out was not measured"),
        (Rule.STABILITY, {}, "two halves"),
        (Rule.HEADS, {}, "number of heads"),
        (Rule.HEADS, {"n_heads": 4}, "more blocks than 4 heads: the finest has 4"),
        (Rule.GIVEN, {}, "at least 1, not None"),
        (Rule.GIVEN, {"n_blocks": 0}, "at least 1, not 0"),
    ],
)
def test_a_rule_that_cannot_choose_says_why(rule, options, said):
    path, frame = made_scores()
    with pytest.raises(NoSuchLevel, match=said):
        choose(path, frame, rule, **options)


def test_a_method_without_description_length_cannot_be_chosen_by_it():
    path = PartitionPath("ward", np.zeros((1, 3), dtype=np.int64))
    with pytest.raises(NoSuchLevel, match="a method that has one"):
        choose(path, scored(path, None), Rule.DESCRIPTION_LENGTH)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gauss", "sae", "attr"])
def test_without_structure_there_is_one_block(kind):
    for seed in range(5):
        data = unstructured(kind, 60, seed=seed, samples=400)
        verdict = verdict_of(data)
        assert not verdict.significant, (kind, seed, verdict)
        assert verdict.level is None
        assert verdict.gain < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gauss", "sae", "attr"])
def test_with_structure_the_blocks_are_significant(kind):
    for seed in range(5):
        data = planted(kind, 60, seed=seed, samples=1500)
        verdict = verdict_of(data)
        assert verdict.significant, (kind, seed, verdict)
        assert verdict.gain > 0.05 + max(verdict.null_gains)


def rare_features(n, seed, samples=500):
    """Independent features of which a third are active 6 times in all: most pairs of these never meet, and correlate by nearly the same small
    negative number in every half, a few meet once and correlate strongly by chance."""
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((samples, n)) < 0.15, rng.exponential(size=(samples, n)), 0)
    rare = n // 3
    values[:, :rare] = 0
    for feature in range(rare):
        values[rng.choice(samples, 6, replace=False), feature] = rng.exponential(size=6)
    return values


@pytest.mark.slow
def test_what_rare_features_have_by_their_rarity_alone_is_no_structure():
    for seed in range(5):
        values = rare_features(90, seed)
        split = np.arange(500) % 2 == 0
        shuffles = [np.random.default_rng(50 + i).permuted(values, axis=0) for i in range(3)]
        path = dense_block_model(fisher(pearson(values)))
        verdict = null_verdict(
            path,
            (fisher(pearson(values[split])), fisher(pearson(values[~split]))),
            [(fisher(pearson(own[split])), fisher(pearson(own[~split]))) for own in shuffles],
            refit=dense_block_model,
        )
        assert not verdict.significant, (seed, verdict)


@pytest.mark.slow
def test_a_verdict_reuses_scores_that_are_known():
    data, path, frame = case("sae", 0, n=100, samples=600)
    halves, shuffled = halves_of(data), [halves_of(data.shuffled(i), i) for i in range(3)]
    known = null_verdict(path, halves, shuffled, refit=dense_block_model, scores=frame)
    assert known == null_verdict(path, halves, shuffled, refit=dense_block_model)
    assert known.level == choose(path, frame, Rule.HELD_OUT)


def test_few_shuffles_are_too_few():
    data, path, _ = case("sae", 0)
    with pytest.raises(NoSuchLevel, match="1 shuffles of the samples: the null needs at least 3"):
        null_verdict(path, halves_of(data), [halves_of(data)], refit=dense_block_model)
