"""Known truth: samples whose blocks are planted, to measure methods of partition by, and samples with no structure at all.

A two-level factor model. Feature i of fine block b, which lies in the coarse block c, has at every sample

    z_i = λ_i · (√s_c · u_c + √s_f · v_b) + √(1 − s_c − s_f) · ε_i,    u, v, ε independent standard normal,

with loadings λ_i = max(0.2, 1 + spread · normal). At λ = 1 two features of one fine block correlate with s_c + s_f, two of one coarse block with
s_c, others with 0. Unstructured features are ε alone. Features come in random order. What is seen of z depends on the kind:

- GAUSS: z itself.
- SAE: ReLU(z − threshold), each feature active at a share of the samples of its own, 3 to 15 %: as activations of a sparse dictionary.
- ATTR: sign(z) · z², times a log-normal scale that a sample's features share: signed and heavy-tailed, as attributions are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri  # type: ignore[import-untyped]

from ..errors import UserError
from .parcellation import FloatArray, IntArray

NOISE = -1
"""The label of unstructured features, at both levels. They belong to no block and are left out of agreement with the truth."""

N_COARSE, COARSE_SHARE, FINE_SHARE = 6, 0.15, 0.25
"""Coarse blocks (fewer where there are not two fine blocks for each), and the shares of variance s_c and s_f."""

SMALLEST_BLOCK, SIZE_CONCENTRATION = 3, 10.0
"""Every fine block has at least so many features; the others are dealt by Dirichlet weights of this concentration (sizes vary by about a third)."""

ACTIVE, SCALE_SPREAD = (0.03, 0.15), 0.5
"""The range of an SAE feature's frequency, and the standard deviation of the logarithm of a sample's scale for ATTR."""


class Planted(StrEnum):
    """What is seen of the factor model."""

    GAUSS = "gauss"
    SAE = "sae"
    ATTR = "attr"


class NotPlantable(UserError):
    """Sizes that no planted partition can have."""


@dataclass(frozen=True, eq=False)
class PlantedData:
    """samples: (T, n) float32. fine, coarse: (n,) planted blocks, each 0 … B − 1, and `NOISE` for unstructured features; coarse joins fine blocks."""

    kind: Planted
    samples: NDArray[np.float32]
    fine: IntArray
    coarse: IntArray

    @property
    def structured(self) -> NDArray[np.bool_]:
        """Which features belong to a block, (n,)."""
        return self.fine != NOISE

    def correlation(self, rows: Sequence[int] | IntArray | NDArray[np.bool_] | slice | None = None) -> FloatArray:
        """Pearson's r over all or some samples, (n, n) float64, diagonal 1; a feature that is constant there correlates with none."""
        chosen = self.samples if rows is None else self.samples[rows]
        return pearson(chosen)

    def halves(self, seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Two halves of the samples at random, each (T,) bool."""
        first = np.zeros(len(self.samples), dtype=bool)
        first[np.random.default_rng(seed).permutation(len(first))[: len(first) // 2]] = True
        return first, ~first

    def shuffled(self, seed: int) -> "PlantedData":
        """Every feature's samples permuted on their own: its distribution stays, only chance correlations are left. All features are `NOISE`."""
        none = np.full_like(self.fine, NOISE)
        return PlantedData(self.kind, np.random.default_rng(seed).permuted(self.samples, axis=0), none, none)


def pearson(samples: NDArray[np.floating]) -> FloatArray:
    """Pearson's r of the columns of (T, n) samples, (n, n) float64, diagonal 1, zero between a constant column and any other."""
    centred = samples.astype(np.float64)
    centred -= centred.mean(axis=0)
    norm = np.linalg.norm(centred, axis=0)
    # A constant column is left with rounding errors alone, which must not be scaled up to a correlation.
    constant = norm <= 1e-9 * np.sqrt(len(samples)) * np.abs(samples).max(axis=0, initial=0)
    centred /= np.where(constant, np.inf, norm)
    found = np.clip(centred.T @ centred, -1, 1)
    np.fill_diagonal(found, 1)
    return found


def planted(
    kind: Planted | str,
    n: int,
    *,
    seed: int,
    samples: int = 4000,
    noise_share: float = 0.1,
    loading_spread: float = 0.15,
    n_blocks: int | None = None,
) -> PlantedData:
    """Samples (T, n) with a planted partition into `n_blocks` fine blocks (about √n unless given) and up to `N_COARSE` coarse ones.

    noise_share: of the features have no structure. loading_spread: by how much loadings vary, 0 for equal ones. Raises `NotPlantable` for sizes
    that leave a fine block less than `SMALLEST_BLOCK` features.
    """
    if samples < 2 or not 0 <= noise_share <= 1 or loading_spread < 0:
        raise NotPlantable(f"{samples} samples, noise share {noise_share}, spread {loading_spread}: at least 2, 0 to 1, at least 0 are needed")
    n_structured = n - round(noise_share * n)
    wanted = round(n**0.5) if n_blocks is None else n_blocks
    if n_structured and not 1 <= wanted <= n_structured // SMALLEST_BLOCK:
        raise NotPlantable(f"{n_structured} structured features for {wanted} blocks: at least {SMALLEST_BLOCK} for each are needed")
    rng = np.random.default_rng(seed)
    fine, coarse = _labels(n, n_structured, wanted, rng)
    seen = _seen(Planted(kind), _latent(fine, coarse, samples, loading_spread, rng), rng)
    return PlantedData(Planted(kind), seen, fine, coarse)


def unstructured(kind: Planted | str, n: int, *, seed: int, samples: int = 4000) -> PlantedData:
    """Samples of n uncorrelated features, distributed as those of `planted` are: all are `NOISE`.

    ATTR features share a sample's scale, so that they are not independent: chance correlations are exp(2 · SCALE_SPREAD²) = 1.6 times greater.
    """
    return planted(kind, n, seed=seed, samples=samples, noise_share=1.0)


def _labels(n: int, n_structured: int, n_blocks: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Fine and coarse labels of n features in random order."""
    fine, coarse = (np.full(n, NOISE, dtype=np.int64) for _ in range(2))
    if not n_structured:
        return fine, coarse
    weights = rng.dirichlet(np.full(n_blocks, SIZE_CONCENTRATION))
    sizes = SMALLEST_BLOCK + rng.multinomial(n_structured - SMALLEST_BLOCK * n_blocks, weights)
    where = rng.permutation(n)[:n_structured]
    fine[where] = np.repeat(np.arange(n_blocks), sizes)
    n_coarse = max(1, min(N_COARSE, n_blocks // 2))
    coarse[where] = (np.arange(n_blocks) % n_coarse)[fine[where]]
    return fine, coarse


def _latent(fine: IntArray, coarse: IntArray, samples: int, spread: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """z, (T, n), of variance 1 at every feature: dividing by its standard deviation changes no correlation."""
    z = rng.standard_normal((samples, len(fine)), dtype=np.float32)
    inside = fine != NOISE
    if not inside.any():
        return z
    u = rng.standard_normal((samples, coarse.max() + 1), dtype=np.float32)
    v = rng.standard_normal((samples, fine.max() + 1), dtype=np.float32)
    loading = np.maximum(0.2, 1 + spread * rng.standard_normal(inside.sum())).astype(np.float32)
    signal = np.sqrt(np.float32(COARSE_SHARE)) * u[:, coarse[inside]] + np.sqrt(np.float32(FINE_SHARE)) * v[:, fine[inside]]
    shared = COARSE_SHARE + FINE_SHARE
    deviation = np.sqrt(loading**2 * shared + 1 - shared)
    z[:, inside] = (loading * signal + np.sqrt(np.float32(1 - shared)) * z[:, inside]) / deviation
    return z


def _seen(kind: Planted, z: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """What is seen of z, (T, n)."""
    if kind is Planted.SAE:
        frequency = rng.uniform(*ACTIVE, size=z.shape[1])
        return np.maximum(z - ndtri(1 - frequency).astype(np.float32), 0)
    if kind is Planted.ATTR:
        scale = np.exp(SCALE_SPREAD * rng.standard_normal((len(z), 1), dtype=np.float32))
        return np.sign(z) * z**2 * scale
    return z
