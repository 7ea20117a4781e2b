"""Linear CKA and SVCCA against their definitions on centred matrices, what they must not depend on, and the monotone path against all paths."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
from featlas.analysis.similarity import BadVariance, linear_cka, monotone_path, svcca, whitening
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[np.float64]


def covariances(x: Array, y: Array) -> tuple[Array, Array, Array]:
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return x.T @ y / len(x), x.T @ x / len(x), y.T @ y / len(x)


def naive_cka(x: Array, y: Array) -> float:
    """Kornblith et al. 2019, eq. 3 with linear kernels: HSIC of Gram matrices of the rows, centred by H."""
    n = len(x)
    h = np.eye(n) - 1 / n
    hsic = lambda k, m: np.trace(k @ h @ m @ h)
    k, m = x @ x.T, y @ y.T
    return float(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)))


def naive_svcca(x: Array, y: Array, variance: float) -> float:
    """Raghu et al. 2017: SVD of the centred rows, keep the directions, then CCA as the singular values of the product of orthonormal bases."""
    bases = []
    for z in (x, y):
        u, s, _ = np.linalg.svd(z - z.mean(axis=0), full_matrices=False)
        share = np.cumsum(s**2) / np.sum(s**2)
        bases.append(u[:, : int(np.argmax(share >= variance - 1e-12)) + 1])
    return float(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).mean())


def pair(seed: int, n: int = 80, d_a: int = 6, d_b: int = 9) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, d_a)) * np.linspace(1, 5, d_a) + 3
    return x, x @ random.normal(size=(d_a, d_b)) + 2 * random.normal(size=(n, d_b))


@pytest.mark.parametrize("seed", range(5))
def test_both_are_their_definitions(seed: int) -> None:
    x, y = pair(seed)
    between, a, b = covariances(x, y)
    assert linear_cka(between, a, b) == pytest.approx(naive_cka(x, y), rel=1e-9)
    for variance in (0.5, 0.9, 0.99, 1.0):
        assert svcca(between, a, b, variance) == pytest.approx(naive_svcca(x, y, variance), rel=1e-7)


def test_a_worked_example() -> None:
    """x = (1, 0, −1, 0), y = (x, x⊥) with x⊥ = (0, 1, 0, −1): Σ_xx = ½, Σ_yy = ½ I, Σ_xy = (½, 0)."""
    x = np.array([[1.0], [0], [-1], [0]])
    y = np.hstack([x, np.array([[0.0], [1], [0], [-1]])])
    between, a, b = covariances(x, y)
    assert linear_cka(between, a, b) == pytest.approx(0.25 / (0.5 * np.sqrt(0.5)))
    assert svcca(between, a, b) == pytest.approx(1.0)  # the one direction of x is one of y
    assert np.isnan(linear_cka(between, 0 * a, b))
    assert np.isnan(svcca(between, 0 * a, b))


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_rotation_and_scale_change_nothing_and_every_map_leaves_cca(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, y = pair(seed)
    rotation = np.linalg.qr(random.normal(size=(x.shape[1], x.shape[1])))[0]
    plain, turned = covariances(x, y), covariances(3 * x @ rotation + 5, y)
    assert linear_cka(*plain) == pytest.approx(linear_cka(*turned), rel=1e-9)
    assert svcca(*plain) == pytest.approx(svcca(*turned), rel=1e-6)
    itself = covariances(x, x @ rotation)
    assert linear_cka(*itself) == pytest.approx(1.0)
    assert svcca(*itself) == pytest.approx(1.0)
    skewed = covariances(x @ random.normal(size=(x.shape[1], x.shape[1])), y)
    assert svcca(*plain, variance=1.0) == pytest.approx(svcca(*skewed, variance=1.0), rel=1e-5)
    assert 0 <= linear_cka(*plain) <= 1


def test_unrelated_rows_are_unlike() -> None:
    random = np.random.default_rng(0)
    found = covariances(random.normal(size=(5000, 10)), random.normal(size=(5000, 10)))
    assert linear_cka(*found) < 0.01
    assert svcca(*found) < 0.05


def test_directions_that_are_kept() -> None:
    assert [whitening(np.diag([9.0, 0.9, 0.1, 0.0]), share).kept for share in (0.5, 0.9, 0.99, 1.0)] == [1, 1, 2, 3]
    np.testing.assert_allclose(np.abs(whitening(np.diag([4.0, 1.0]), 1.0).map), np.diag([0.5, 1.0]))
    for wrong in (0.0, 1.1, -1.0):
        with pytest.raises(BadVariance, match=str(wrong)):
            whitening(np.eye(2), wrong)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_monotone_path_is_the_best_of_all(n_a: int, n_b: int, seed: int) -> None:
    likeness = np.random.default_rng(seed).normal(size=(n_a, n_b))
    path = monotone_path(likeness)
    assert (np.diff(path) >= 0).all()
    worth = lambda columns: likeness[np.arange(n_a), list(columns)].sum()
    assert worth(path) == pytest.approx(max(map(worth, combinations_with_replacement(range(n_b), n_a))))


def test_a_path_worked_by_hand() -> None:
    assert monotone_path(np.array([[0.9, 0.1, 0.0], [0.8, 0.7, 0.2], [0.9, 0.3, 0.5]])).tolist() == [0, 0, 0]
    assert monotone_path(np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.2], [0.6, 0.3, 0.5]])).tolist() == [0, 1, 2]
    assert monotone_path(np.array([[np.nan, 0.1], [0.2, np.nan]])).tolist() in ([0, 0], [1, 1])
