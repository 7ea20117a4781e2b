"""How alike two representations of the same rows are as a whole: linear CKA and SVCCA, exactly, from covariances alone.

Both ignore rotations: nothing need be matched feature by feature. Linear CKA (Kornblith et al. 2019, "Similarity of Neural Network Representations
Revisited") is dominated by the directions of most variance; SVCCA (Raghu et al. 2017) gives the kept directions of both sides equal weight. With
fewer rows than some ten times the width both are too high: they are of the rows that were measured.

`monotone_path` says which layer corresponds to which where the order of layers must be kept.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..errors import UserError
from ..queries.matches import Aligned

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

VARIANCE_KEPT = 0.99
"""Share of a side's variance that SVCCA keeps."""

COLUMNS = {"site_a": pl.String(), "site_b": pl.String(), "cka": pl.Float64(), "svcca": pl.Float64(), "kept_a": pl.Int64(), "kept_b": pl.Int64()}
"""The columns of `similarities`."""


class BadVariance(UserError):
    """A share of variance is not above 0, or above 1."""


def linear_cka(between: FloatArray, within_a: FloatArray, within_b: FloatArray) -> float:
    """‖Σ_ab‖² / (‖Σ_aa‖ ‖Σ_bb‖), Frobenius norms, from covariances (d_a, d_b), (d_a, d_a) and (d_b, d_b); NaN where a side does not vary."""
    scale = np.linalg.norm(within_a) * np.linalg.norm(within_b)
    return float(np.sum(between**2) / scale) if scale > 0 else float("nan")


class Whitening(NamedTuple):
    """The directions of most variance of one side, scaled to variance 1: values @ map is (n, kept)."""

    map: FloatArray
    variances: FloatArray

    @property
    def kept(self) -> int:
        return len(self.variances)


def whitening(within: FloatArray, variance: float = VARIANCE_KEPT) -> Whitening:
    """The fewest principal directions that hold this share of the variance, of a covariance (d, d). Raises `BadVariance`."""
    if not 0 < variance <= 1:
        raise BadVariance(f"a share of variance to keep of {variance}: it is above 0, and at most 1")
    values, vectors = np.linalg.eigh(within)
    values, vectors = values[::-1], vectors[:, ::-1]  # greatest first
    real = values > values[0] * len(values) * np.finfo(np.float64).eps if values[0] > 0 else np.zeros(len(values), dtype=bool)
    values, vectors = values[real], vectors[:, real]
    share = np.cumsum(values) / values.sum() if len(values) else values
    kept = min(int(np.searchsorted(share, variance * (1 - 1e-12))) + 1, len(values))
    return Whitening(vectors[:, :kept] / np.sqrt(values[:kept]), values[:kept])


def canonical_correlations(between: FloatArray, a: Whitening, b: Whitening) -> FloatArray:
    """Canonical correlations of the kept directions of both sides, the greatest first, (min(kept_a, kept_b),)."""
    if not a.kept or not b.kept:
        return np.zeros(0)
    return np.clip(np.linalg.svd(a.map.T @ between @ b.map, compute_uv=False), 0.0, 1.0)


def svcca(between: FloatArray, within_a: FloatArray, within_b: FloatArray, variance: float = VARIANCE_KEPT) -> float:
    """The mean canonical correlation of the directions that hold `variance` of either side's variance; NaN where a side does not vary."""
    found = canonical_correlations(between, whitening(within_a, variance), whitening(within_b, variance))
    return float(found.mean()) if len(found) else float("nan")


def similarities(aligned: Aligned, variance: float = VARIANCE_KEPT) -> pl.DataFrame:
    """Both for every pair of sites, as `COLUMNS`, in the models' order; no rows where the samples have no covariances. Raises `BadVariance`."""
    covariances = aligned.covariances()
    if covariances is None:
        return pl.DataFrame(schema=COLUMNS)
    side_a, side_b = (cache(lambda site, own=own: whitening(own[site], variance)) for own in (covariances.a, covariances.b))
    rows = []
    for (one, other), between in covariances.between.items():
        found = canonical_correlations(between, side_a(one), side_b(other))
        mean = float(found.mean()) if len(found) else float("nan")
        rows.append((one, other, linear_cka(between, covariances.a[one], covariances.b[other]), mean, side_a(one).kept, side_b(other).kept))
    return pl.DataFrame(rows, schema=COLUMNS, orient="row").with_columns(pl.col("cka", "svcca").fill_nan(None))


def monotone_path(likeness: FloatArray) -> IntArray:
    """For each row a column, never an earlier one than the row before has, so that the sum of `likeness` (n_a, n_b) is greatest, (n_a,).

    The first such path where several are best. A value that is not finite counts as the least there is.
    """
    finite = np.isfinite(likeness)
    values = np.where(finite, likeness, (likeness[finite].min() if finite.any() else 0.0) - 1.0)
    total = np.zeros(values.shape[1])
    chosen = np.zeros(values.shape, dtype=np.int64)
    for row, own in enumerate(values):
        best = np.maximum.accumulate(total)  # of the columns up to each
        first = np.concatenate([[True], best[1:] > best[:-1]])
        chosen[row] = np.maximum.accumulate(np.where(first, np.arange(len(best)), 0))
        total = best + own
    path = np.zeros(len(values), dtype=np.int64)
    path[-1] = int(np.argmax(total))
    for row in range(len(values) - 1, 0, -1):
        path[row - 1] = chosen[row, path[row]]
    return path
