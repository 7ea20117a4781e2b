"""The dense Gaussian block model: its description length against integrals and loops, its merges, moves and path, and planted blocks."""

import itertools
import math

import featlas.analysis.block_model as block_model
import numpy as np
import pytest
import torch
from featlas.analysis.block_model import BadWeights, block_sums, default_start, dense_block_model, description_length, folded, merge_changes, prepared
from featlas.analysis.parcellation import by_size
from featlas.analysis.planted import planted
from scipy import integrate, stats
from sklearn.metrics import adjusted_mutual_info_score


def fisher(correlation):
    """2 · artanh(r), the diagonal 0."""
    weights = 2 * np.arctanh(np.clip(correlation, -1 + 1e-6, 1 - 1e-6))
    np.fill_diagonal(weights, 0)
    return weights


def random_weights(n, seed, n_blocks=3, spread=0.3):
    """Symmetric weights with block means, and the blocks."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(n_blocks, size=n)
    means = rng.normal(size=(n_blocks, n_blocks))
    weights = (means + means.T)[blocks][:, blocks] + spread * rng.normal(size=(n, n))
    weights = np.triu(weights, 1)
    return weights + weights.T + np.diag(rng.normal(size=n)), blocks


def naive_marginal(values, mean, variance, strength=1.0, freedom=3.0):
    """ln p(x₁ … x_N) by the chain rule: every value under Student's t that the values before it predict."""
    total = 0.0
    for x in values:
        scale = math.sqrt(variance * (strength + 1) / strength)
        total += stats.t.logpdf(x, freedom, loc=mean, scale=scale)
        variance = (freedom * variance + strength / (strength + 1) * (x - mean) ** 2) / (freedom + 1)
        mean = (strength * mean + x) / (strength + 1)
        strength, freedom = strength + 1, freedom + 1
    return total


def naive_length(weights, labels):
    """The description length from its definition, pair by pair."""
    n = len(weights)
    pairs = list(itertools.combinations(range(n), 2))
    all_weights = np.array([weights[i, j] for i, j in pairs])
    blocks = sorted(set(labels))
    likelihood = 0.0
    for a, r in enumerate(blocks):
        for s in blocks[a:]:
            values = [weights[i, j] for i, j in pairs if {labels[i], labels[j]} == {r, s}]
            likelihood += naive_marginal(values, all_weights.mean(), all_weights.var())
    arrangements = math.factorial(n) // math.prod(math.factorial(int(np.sum(labels == r))) for r in blocks)
    return -likelihood + math.log(math.comb(n - 1, len(blocks) - 1)) + math.log(arrangements) + math.log(n)


@pytest.mark.parametrize("seed", range(3))
def test_description_length_is_that_of_the_chain_of_predictions(seed):
    weights, blocks = random_weights(13, seed)
    rng = np.random.default_rng(seed)
    for labels in (blocks, np.zeros(13, dtype=int), np.arange(13), rng.permutation(13) % 5 * 7):
        assert description_length(weights, labels) == pytest.approx(naive_length(weights, labels), rel=1e-10)


def test_marginal_likelihood_is_the_integral_over_mean_and_variance():
    values, mean, variance = np.array([0.3, -0.2, 0.9]), 0.1, 0.5

    m, v = np.linspace(-12, 12, 1201)[:, None], np.exp(np.linspace(-7, 7, 701))
    prior = stats.invgamma.pdf(v, 1.5, scale=1.5 * variance) * stats.norm.pdf(m, mean, np.sqrt(v))
    likelihood = np.prod([stats.norm.pdf(x, m, np.sqrt(v)) for x in values], axis=0)
    integral = integrate.trapezoid(integrate.trapezoid(prior * likelihood * v, np.log(v), axis=1), m[:, 0])
    shifted = torch.from_numpy(values - mean)
    known = block_model.log_marginal(torch.tensor(3.0), shifted.sum(), (shifted**2).sum(), variance)
    assert math.log(integral) == pytest.approx(float(known), abs=1e-4)


def test_every_level_has_its_description_length_and_the_path_ends_in_one_block():
    weights = fisher(planted("sae", 160, seed=1, samples=800).correlation())
    path = dense_block_model(weights)
    assert path.n_blocks.tolist() == list(range(path.n_blocks[0], 0, -1))
    assert path.n_blocks[0] <= default_start(160)
    for labels, length in zip(path.labels, path.description_length, strict=True):
        assert length == pytest.approx(description_length(weights, labels), rel=1e-9)
        assert labels.tolist() == by_size(labels).tolist()


def test_every_merge_changes_the_length_by_what_it_claims():
    weights, blocks = random_weights(40, 4, n_blocks=6)
    labels = by_size(blocks)
    known = prepared(weights)
    changes = merge_changes(block_sums(known, torch.from_numpy(labels)), known.variance)
    before = description_length(weights, labels)
    for r, s in itertools.combinations(range(6), 2):
        merged = np.where(labels == s, r, labels)
        assert float(changes[r, s]) == pytest.approx(description_length(weights, merged) - before, abs=1e-7)
    assert torch.isinf(changes[torch.ones(6, 6).tril().bool()]).all()


def test_merges_weighed_a_few_rows_at_a_time_are_the_same(monkeypatch):
    weights, _ = random_weights(40, 5)
    known = prepared(weights)
    sums = block_sums(known, torch.arange(40) % 20)
    whole = merge_changes(sums, known.variance)
    monkeypatch.setattr(block_model, "CELLS_AT_ONCE", 1000)
    torch.testing.assert_close(merge_changes(sums, known.variance), whole)


def test_folded_sums_are_the_sums_of_the_merged_partition():
    weights, _ = random_weights(30, 6)
    known = prepared(weights)
    fine, into = torch.arange(30) % 9, torch.tensor([0, 1, 2, 0, 1, 3, 3, 0, 2])
    for folds, direct in zip(folded(block_sums(known, fine), into), block_sums(known, into[fine]), strict=True):
        torch.testing.assert_close(folds, direct)


def single_moves(labels):
    """Every partition that differs by one node's block, a new block among them."""
    for i, to in itertools.product(range(len(labels)), range(labels.max() + 2)):
        if to != labels[i]:
            moved = labels.copy()
            moved[i] = to
            yield moved


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_no_single_move_and_no_merge_betters_the_best_level_of_clear_blocks(seed):
    weights, blocks = random_weights(24, seed)
    path = dense_block_model(weights)
    best = int(path.description_length.argmin())
    labels, length = path.labels[best], path.description_length[best]
    assert adjusted_mutual_info_score(labels, blocks) == pytest.approx(1)
    assert min(description_length(weights, moved) for moved in single_moves(labels)) > length
    assert best == len(path) - 1 or path.description_length[best + 1] > length
    assert length <= naive_length(weights, blocks) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_of_few_nodes_the_best_of_all_partitions_is_found_or_nearly(seed):
    weights, _ = random_weights(7, seed, n_blocks=2, spread=0.4)
    least = min(description_length(weights, np.array(p)) for p in all_partitions(7))
    # The path is greedy: it may end above the least of all 877 partitions, here by less than half a nat.
    assert least - 1e-9 <= dense_block_model(weights).description_length.min() <= least + 0.5


def all_partitions(n):
    """Every partition of n things as labels: each label at most one above those before it."""

    def grow(labels):
        if len(labels) == n:
            yield labels
            return
        for label in range(max(labels) + 2):
            yield from grow([*labels, label])

    return grow([0])


@pytest.mark.slow
def test_single_moves_gain_little_where_blocks_are_noisy():
    weights = fisher(planted("sae", 90, seed=3, samples=600).correlation())
    path = dense_block_model(weights)
    best = int(path.description_length.argmin())
    length = path.description_length[best]
    gain = length - min(description_length(weights, moved) for moved in single_moves(path.labels[best]))
    assert gain < 0.01 * (path.description_length[-1] - length)  # of what the blocks save over one block


@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (2, 1), (3, 1)])
def test_tiny_sites(n, blocks):
    weights = np.zeros((n, n))
    path = dense_block_model(weights)
    assert path.labels.shape == (n, n)
    assert path.n_blocks.tolist() == list(range(n, 0, -1))
    assert path.n_blocks[path.description_length.argmin()] == blocks
    assert np.isfinite(path.description_length).all()


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-9])
@pytest.mark.parametrize("n", [12, 70])
def test_equal_weights_are_one_block(n, value):
    path = dense_block_model(np.full((n, n), value))
    assert path.n_blocks[path.description_length.argmin()] == 1


def test_the_diagonal_does_not_count():
    weights, _ = random_weights(50, 7)
    other = weights.copy()
    np.fill_diagonal(other, np.nan)
    first, second = dense_block_model(weights), dense_block_model(other)
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(first.description_length, second.description_length)


def test_weights_are_left_as_they_were():
    weights, _ = random_weights(20, 8)
    before = weights.copy()
    dense_block_model(weights)
    assert np.array_equal(weights, before)


def test_the_same_seed_gives_the_same_path():
    weights = fisher(planted("gauss", 200, seed=2, samples=500).correlation())
    first, again = (dense_block_model(weights, seed=5) for _ in range(2))
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.description_length, again.description_length)
    assert first.info["seed"] == 5
    assert first.method == "dense-sbm"


def test_start_blocks_bound_the_finest_level():
    weights, _ = random_weights(80, 9)
    assert dense_block_model(weights, start_blocks=10).n_blocks[0] <= 10
    assert dense_block_model(weights, start_blocks=1).n_blocks.tolist() == [1]
    assert dense_block_model(weights, start_blocks=500).n_blocks[0] <= 80


def test_large_sites_start_from_k_means(monkeypatch):
    data = planted("gauss", 300, seed=3, samples=1500)
    monkeypatch.setattr(block_model, "WARD_LIMIT", 100)
    path = dense_block_model(fisher(data.correlation()))
    inside = data.structured
    found = path.labels[path.with_blocks(int(data.fine.max()) + 2)]
    assert adjusted_mutual_info_score(found[inside], data.fine[inside]) > 0.95


def test_the_start_does_not_split_by_loading():
    """Rows of one block point the same way whatever the loadings: the start has the two blocks, not the strong and the weak features."""
    loading = np.random.default_rng(0).uniform(0.2, 1.0, 80)
    blocks = np.repeat([0, 1], 40)
    weights = np.outer(loading, loading) * np.where(blocks[:, None] == blocks, 1.0, -0.3)
    known = prepared(weights)
    rows = block_model.embedding(known, 2, seed=0)
    assert rows.norm(dim=1).numpy() == pytest.approx(np.ones(80))
    assert by_size(block_model._start(known, 2, seed=0)).tolist() == blocks.tolist()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (np.zeros((2, 3)), "square"),
        (np.zeros((0, 0)), "at least one"),
        (np.array([[0, np.nan], [np.nan, 0]]), "2 weights are not finite"),
        (np.array([[0, np.inf], [np.inf, 0]]), "not finite"),
        (np.array([[0, 1.0], [0.5, 0]]), "symmetric"),
    ],
)
def test_bad_weights_are_refused_by_name(weights, said):
    with pytest.raises(BadWeights, match=said):
        dense_block_model(weights)


def test_labels_of_other_nodes_are_refused():
    with pytest.raises(BadWeights, match="3 nodes"):
        description_length(np.zeros((3, 3)), np.zeros(4, dtype=int))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_the_same_blocks():
    data = planted("sae", 400, seed=0)
    weights = fisher(data.correlation())
    here, there = dense_block_model(weights), dense_block_model(weights, device="cuda")
    level = here.with_blocks(20), there.with_blocks(20)
    assert adjusted_mutual_info_score(here.labels[level[0]], there.labels[level[1]]) > 0.98
    np.testing.assert_allclose(there.description_length[-20:], here.description_length[-20:], rtol=1e-3)


@pytest.mark.slow
def test_planted_blocks_are_on_the_path():
    for kind, seed in (("sae", 0), ("gauss", 1), ("attr", 2)):
        data = planted(kind, 400, seed=seed)
        path = dense_block_model(fisher(data.correlation()))
        inside = data.structured
        best = max(adjusted_mutual_info_score(labels[inside], data.fine[inside]) for labels in path.labels)
        coarse = path.labels[path.with_blocks(int(data.coarse.max()) + 2)]
        assert best > 0.97, kind
        assert adjusted_mutual_info_score(coarse[inside], data.coarse[inside]) > 0.95, kind
