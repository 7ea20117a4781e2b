"""Planted truth: sizes, correlations and distributions are as the factor model says."""

import numpy as np
import pytest
from featlas.analysis.planted import (
    ACTIVE,
    COARSE_SHARE,
    FINE_SHARE,
    NOISE,
    SCALE_SPREAD,
    SMALLEST_BLOCK,
    NotPlantable,
    Planted,
    pearson,
    planted,
    unstructured,
)

KINDS = list(Planted)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_labels(kind: Planted) -> None:
    data = planted(kind, 200, seed=0, samples=50)
    assert data.samples.shape == (50, 200)
    assert data.samples.dtype == np.float32
    assert (data.fine == NOISE).sum() == 20
    assert ((data.fine == NOISE) == (data.coarse == NOISE)).all()
    sizes = np.bincount(data.fine[data.structured])
    assert len(sizes) == round(200**0.5)
    assert sizes.min() >= SMALLEST_BLOCK
    assert len(np.unique(data.coarse[data.structured])) == 6
    for block in range(len(sizes)):  # a fine block lies in one coarse block
        assert len(np.unique(data.coarse[data.fine == block])) == 1
    assert len(np.unique(data.fine[:40])) > 5, "features come in random order"


def test_correlations_are_the_models() -> None:
    """At equal loadings: s_c + s_f within a fine block, s_c within a coarse one, 0 elsewhere and for noise, all within sampling error."""
    data = planted(Planted.GAUSS, 120, seed=1, samples=4000, loading_spread=0.0)
    r = data.correlation()
    same_fine = (data.fine[:, None] == data.fine) & data.structured
    same_coarse = (data.coarse[:, None] == data.coarse) & data.structured & ~same_fine
    np.fill_diagonal(same_fine, False)
    other = ~same_fine & ~same_coarse & ~np.eye(120, dtype=bool)
    assert r[same_fine].mean() == pytest.approx(COARSE_SHARE + FINE_SHARE, abs=0.02)
    assert r[same_coarse].mean() == pytest.approx(COARSE_SHARE, abs=0.02)
    assert r[other].mean() == pytest.approx(0, abs=0.01)
    noise = r[~data.structured]
    assert np.abs(noise[noise < 1]).max() < 5 / 4000**0.5


def test_loadings_vary_by_the_spread() -> None:
    """One block: r_ij = λ_i λ_j s / (sd_i sd_j), so that off-diagonal entries spread with the loadings and are one number without."""
    equal, varied = (planted("gauss", 40, seed=0, samples=8000, noise_share=0, loading_spread=s, n_blocks=1).correlation() for s in (0.0, 0.3))
    off = ~np.eye(40, dtype=bool)
    assert equal[off].std() < 0.015 < 0.04 < varied[off].std()


def test_kinds_are_distributed_as_said() -> None:
    sae = planted(Planted.SAE, 300, seed=0).samples
    active = (sae > 0).mean(axis=0)
    assert sae.min() == 0
    assert ACTIVE[0] - 0.01 < active.min() < 0.05
    assert 0.13 < active.max() < ACTIVE[1] + 0.02
    attr = planted(Planted.ATTR, 300, seed=0).samples.astype(np.float64)
    assert (attr > 0).mean() == pytest.approx(0.5, abs=0.02)
    kurtosis = ((attr - attr.mean(0)) ** 4).mean(0) / attr.var(0) ** 2
    assert np.median(kurtosis) > 10, "a normal one has 3"


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_samples(kind: Planted) -> None:
    first, second, other = (planted(kind, 60, seed=s, samples=30) for s in (3, 3, 4))
    assert (first.samples == second.samples).all()
    assert (first.fine == second.fine).all()
    assert (first.samples != other.samples).any()


@pytest.mark.parametrize("kind", KINDS)
def test_unstructured_and_shuffled_have_chance_correlations_alone(kind: Planted) -> None:
    data = planted(kind, 80, seed=0, samples=2000)
    shared = np.exp(2 * SCALE_SPREAD**2) if kind is Planted.ATTR else 1.0  # √(E s⁴) / E s² of the scale s
    for null, greater in ((unstructured(kind, 80, seed=0, samples=2000), shared), (data.shuffled(0), 1.0)):
        assert not null.structured.any()
        off = null.correlation()[~np.eye(80, dtype=bool)]
        assert off.std() == pytest.approx(greater / 2000**0.5, rel=0.15)
        assert abs(off.mean()) < 0.003
    assert (np.sort(data.shuffled(0).samples, axis=0) == np.sort(data.samples, axis=0)).all(), "each feature keeps its values"


def test_pearson_is_numpys_and_constant_columns_correlate_with_none() -> None:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((50, 6)).astype(np.float32)
    np.testing.assert_allclose(pearson(samples), np.corrcoef(samples.T.astype(np.float64)), atol=1e-12)
    samples[:, 2] = 0.1  # not exact in binary: its deviations from the mean are rounding errors
    found = pearson(samples)
    assert (np.delete(found[2], 2) == 0).all()
    assert (np.diag(found) == 1).all()


def test_rows_choose_samples() -> None:
    data = planted("sae", 60, seed=0, samples=400)
    first, second = data.halves(0)
    assert first.sum() == second.sum() == 200
    assert not (first & second).any()
    np.testing.assert_allclose(data.correlation(first), pearson(data.samples[first]))
    assert np.abs(data.correlation(first) - data.correlation(second)).max() > 0.01


@pytest.mark.parametrize(("n", "options"), [(10, {"n_blocks": 4}), (100, {"noise_share": 1.5}), (100, {"samples": 1}), (100, {"n_blocks": 0})])
def test_impossible_sizes_are_refused(n: int, options: dict) -> None:
    with pytest.raises(NotPlantable):
        planted("gauss", n, seed=0, **options)
