"""Correlations of a site's features over samples, exactly and fast, with what is needed to judge them: halves, and the null.

Samples are sparse: of 2,048 features a token has 32. A feature that is silent has the value 0 and counts as such.

1. `live_features`: those that were seen often enough, in enough different texts, in both halves of the samples.
2. `halves`: two halves by whole sequences, the two prompts of a pair, and pairs that share a prompt, kept together: tokens of one text depend on
   each other.
3. `correlation`: features × features in float64, from the products XᵀX: sparse where the samples are, a block of features at a time.
   What is correlated is a choice (`Correlation`): the values, their logarithms with or without sign, or their ranks. All leave 0 where it is,
   so that sparse samples stay sparse.
4. `shuffled`: the same where there is nothing to find, each feature's values moved independently of all others'.
5. `fisher`: correlations as weights for a model with normal entries.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from ..errors import UserError
from ..queries.samples import SiteSamples
from ..queries.statistics import fisher_weights

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

MIN_COUNT = 10
"""A live feature is not 0 on at least so many tokens of each half."""

MIN_SEQUENCES = 5
"""A live feature is not 0 in at least so many sequences of each half."""

BLOCK_BYTES = 2**27
"""Memory for a block of products, or of dense columns, beside the samples and the result."""

CROWDED = 1 / 4
"""A column in which a greater share is not 0 is permuted whole; in the others only the places of what is not 0 are drawn."""


class TooFewSamples(UserError):
    """There are not enough sequences to split, or tokens to correlate."""


class Correlation(StrEnum):
    """What is correlated. Of heavy-tailed attributions a few tokens decide Pearson's coefficient; the others weigh them less."""

    PEARSON = "pearson"
    """The values as they are."""
    SIGNED_LOG = "signed-log"
    """sign(x)·log(1 + |x|/s), s the feature's mean |x| where it is not 0: linear below s, logarithmic above."""
    LOG_MAGNITUDE = "log-magnitude"
    """The same without the sign: whether two features matter at the same tokens, be it with opposite signs."""
    SPEARMAN = "spearman"
    """Ranks over all tokens, equal ones (all the zeros) sharing their mean rank."""


class Null(StrEnum):
    """How `shuffled` breaks what features have to do with each other; each keeps every feature's values."""

    PERMUTED = "permuted"
    """Over tokens at random. A text's tokens are taken for independent, which they are not: the spread is too small by as much."""
    ROTATED = "rotated"
    """All moved on by one random number of tokens, the last ones to the front: what a feature has to do with its own neighbours stays.

    In prompts of equal length two features that are each bound to a position meet again after some rotations, which then is no chance."""


# -- 1. and 2. Which features, which rows --------------------------------------------------------------------


def halves(samples: SiteSamples, seed: int = 0) -> tuple[BoolArray, BoolArray]:
    """Two masks over the rows, (n_tokens,) each: half of the groups (sequences, or the pairs that they belong to) at random, and the others.

    Raises `TooFewSamples` where there is only one group.
    """
    groups = np.unique(samples.group)
    if len(groups) < 2:
        raise TooFewSamples(f"samples of {samples.site} are of one sequence: two halves need at least two, take more text or a smaller --length")
    chosen = np.random.default_rng(seed).permutation(groups)[: len(groups) // 2]
    first = np.isin(samples.group, chosen)
    return first, ~first


def live_features(samples: SiteSamples, *, min_count: int = MIN_COUNT, min_sequences: int = MIN_SEQUENCES, seed: int = 0) -> IntArray:
    """The live features, ascending: not 0 on ≥ min_count tokens and in ≥ min_sequences sequences of each half, and not constant there.

    The halves are those of `halves` with this seed. All other features are dead: too rare for a correlation that means something.
    """
    live = np.ones(samples.d_sae, dtype=bool)
    for rows in halves(samples, seed):
        values = _rows(samples.values, rows)
        _, sequence = np.unique(samples.sequence[rows], return_inverse=True)
        live &= (_counts(values) >= min_count) & (_sequence_counts(values, sequence) >= min_sequences) & ~_constant(values)
    return np.flatnonzero(live).astype(np.int64)


def _rows(values: Any, rows: BoolArray | None) -> Any:
    return values if rows is None else values[np.flatnonzero(rows)]


def _counts(values: Any) -> IntArray:
    """Rows where each feature is not 0, (d_sae,)."""
    if sparse.issparse(values):
        return np.bincount(values.indices[values.data != 0], minlength=values.shape[1])
    return np.count_nonzero(values, axis=0)


def _sequence_counts(values: Any, sequence: IntArray) -> IntArray:
    """Sequences in which each feature is not 0, (d_sae,); sequence: (n_rows,), 0 … n − 1."""
    if not len(sequence):
        return np.zeros(values.shape[1], dtype=np.int64)
    active = sparse.csr_matrix(values != 0, dtype=np.float32)
    member = sparse.csr_matrix((np.ones(len(sequence), dtype=np.float32), (sequence, np.arange(len(sequence)))))  # (sequences, rows)
    return _counts((member @ active).tocsr())


def _constant(values: Any) -> BoolArray:
    """Features with the same value on every row, (d_sae,): rounding gives them some variance."""
    if not values.shape[0]:
        return np.ones(values.shape[1], dtype=bool)
    low, high = values.min(axis=0), values.max(axis=0)
    if sparse.issparse(values):
        low, high = (bound.toarray().ravel() for bound in (low, high))
    return low == high


# -- 3. Correlations -----------------------------------------------------------------------------------------


def correlation(
    samples: SiteSamples, features: IntArray, rows: BoolArray | None = None, *, kind: Correlation = Correlation.PEARSON
) -> FloatArray:
    """Correlations of these features over the rows (all unless given), (n, n) float64; 1 on the diagonal, 0 where a feature is constant.

    Exact to rounding: sums of products in float64. Memory: n² floats for the result, `BLOCK_BYTES` for a block of products or of rows, and the
    chosen rows and columns once more (sparse ones in float64). Raises `TooFewSamples` for fewer than 2 rows.
    """
    values = _rows(samples.values, rows)[:, features]
    if values.shape[0] < 2:
        raise TooFewSamples(f"samples of {samples.site} have {values.shape[0]} tokens to correlate over: there must be at least 2")
    constant = _constant(values)
    covariance = _covariance(transformed(values, kind))
    scale = np.sqrt(np.clip(np.diag(covariance), 0.0, None))
    scale[constant] = 0.0
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    covariance *= inverse[:, None]
    covariance *= inverse[None, :]
    np.clip(covariance, -1.0, 1.0, out=covariance)
    np.fill_diagonal(covariance, 1.0)
    return covariance


def _covariance(values: Any) -> FloatArray:
    """Population covariances of the columns of values (n_rows, n), (n, n) float64."""
    n_rows, n = values.shape
    if not sparse.issparse(values):
        return _dense_covariance(values)
    values = values.astype(np.float64)
    mean = np.asarray(values.mean(axis=0)).ravel()
    columns = values.T.tocsr()  # (n, n_rows)
    product = np.empty((n, n))
    # a sparse block takes up to 12 bytes an entry beside the dense one that it is copied to
    step = max(1, BLOCK_BYTES // (12 * max(n, 1)))
    for start in range(0, n, step):
        product[start : start + step] = (columns[start : start + step] @ values).toarray()
    product /= n_rows
    product -= np.outer(mean, mean)
    return product


def _dense_covariance(values: NDArray[Any]) -> FloatArray:
    """The same of a dense array: centred first, a block of rows at a time."""
    n_rows, n = values.shape
    mean = values.mean(axis=0, dtype=np.float64)
    product = np.zeros((n, n))
    step = max(1, BLOCK_BYTES // (8 * max(n, 1)))
    for start in range(0, n_rows, step):
        centred = values[start : start + step] - mean
        product += centred.T @ centred
    return product / n_rows


def transformed(values: Any, kind: Correlation) -> Any:
    """Values (n_rows, n), CSR or dense, of which Pearson's coefficient is the one asked for; 0 stays 0. All but Pearson's own are float64."""
    if kind is Correlation.PEARSON:
        return values
    csr = sparse.csr_matrix(values, dtype=np.float64)
    csr.eliminate_zeros()
    change = _CHANGES[kind]
    changed = sparse.csr_matrix((change(csr), csr.indices, csr.indptr), shape=csr.shape)
    return changed if sparse.issparse(values) else changed.toarray()


def _signed_log(values: Any) -> FloatArray:
    """The entries' signed logarithms, (nnz,)."""
    n = values.shape[1]
    size = np.bincount(values.indices, weights=np.abs(values.data), minlength=n) / np.maximum(np.bincount(values.indices, minlength=n), 1)
    return np.sign(values.data) * np.log1p(np.abs(values.data) / size[values.indices])


def _ranks(values: Any) -> FloatArray:
    """The entries' ranks in their columns less the rank that all of a column's zeros share, (nnz,)."""
    n_rows, n = values.shape
    order = np.lexsort((values.data, values.indices))
    column, value = values.indices[order], values.data[order]
    count = np.bincount(column, minlength=n)
    begin = np.concatenate([[0], np.cumsum(count)[:-1]])
    place = np.arange(1, len(column) + 1) - begin[column]  # 1 … among what is not 0
    # equal values share the mean of the places that they take
    new = np.concatenate([[True], (column[1:] != column[:-1]) | (value[1:] != value[:-1])]) if len(column) else np.zeros(0, dtype=bool)
    tie = np.cumsum(new) - 1
    place = (np.bincount(tie, weights=place) / np.bincount(tie))[tie] if len(column) else place.astype(np.float64)
    zeros = n_rows - count
    negative = np.bincount(column[value < 0], minlength=n)
    rank = place + np.where(value > 0, zeros[column], 0) - (negative + (zeros + 1) / 2)[column]
    found = np.empty(len(order))
    found[order] = rank
    return found


def _log_magnitude(values: Any) -> FloatArray:
    """The entries' magnitudes, as `_signed_log`, (nnz,)."""
    return np.abs(_signed_log(values))


_CHANGES = {Correlation.SIGNED_LOG: _signed_log, Correlation.LOG_MAGNITUDE: _log_magnitude, Correlation.SPEARMAN: _ranks}


# -- 4. The null ---------------------------------------------------------------------------------------------


def shuffled(
    samples: SiteSamples,
    features: IntArray,
    seed: int = 0,
    *,
    rows: BoolArray | None = None,
    null: Null = Null.PERMUTED,
    kind: Correlation = Correlation.PEARSON,
) -> FloatArray:
    """Correlations (n, n) of the features where each one's values were moved over the rows independently of the others: nothing but chance."""
    moved = shuffled_samples(samples, features, seed, rows=rows, null=null)
    return correlation(moved, np.arange(len(features)), kind=kind)


def shuffled_samples(
    samples: SiteSamples, features: IntArray, seed: int = 0, *, rows: BoolArray | None = None, null: Null = Null.PERMUTED
) -> SiteSamples:
    """Samples with the columns of `features` alone, in their order, the values of each moved over the rows independently."""
    kept = slice(None) if rows is None else np.flatnonzero(rows)
    values = samples.values[kept][:, features]
    random = np.random.default_rng(seed)
    move = _rotated if null is Null.ROTATED else _permuted
    return SiteSamples(
        samples.site, samples.dictionary, len(features), move(values, random), samples.sequence[kept], samples.position[kept], samples.group[kept]
    )


def _permuted(values: Any, random: np.random.Generator) -> Any:
    if not sparse.issparse(values):
        return random.permuted(values, axis=0)
    csr = values.tocsr(copy=True)
    csr.eliminate_zeros()
    crowded = np.bincount(csr.indices, minlength=csr.shape[1]) > CROWDED * csr.shape[0]
    parts = [_scattered(csr[:, np.flatnonzero(~crowded)], random), *_permuted_whole(csr[:, np.flatnonzero(crowded)], random)]
    order = np.concatenate([np.flatnonzero(~crowded), np.flatnonzero(crowded)])
    return sparse.hstack(parts, format="csr")[:, np.argsort(order)]


def _scattered(csr: Any, random: np.random.Generator) -> Any:
    """Each column's entries on rows drawn without replacement: those drawn twice are drawn anew until none is."""
    n_rows = csr.shape[0]
    column = csr.indices.astype(np.int64)
    cell = column * n_rows + random.integers(n_rows, size=len(column))
    while True:
        order = np.argsort(cell, kind="stable")
        again = order[1:][cell[order[1:]] == cell[order[:-1]]]
        if not len(again):
            break
        cell[again] = column[again] * n_rows + random.integers(n_rows, size=len(again))
    # no row is treated differently from any other, so every way of placing a column's values is equally likely
    return sparse.csr_matrix((csr.data, (cell % n_rows, column)), shape=csr.shape)


def _permuted_whole(csr: Any, random: np.random.Generator) -> Iterator[Any]:
    """Blocks of columns, each column permuted."""
    step = max(1, BLOCK_BYTES // (8 * max(csr.shape[0], 1)))
    for start in range(0, csr.shape[1], step):
        yield sparse.csr_matrix(random.permuted(csr[:, start : start + step].toarray(), axis=0))


def _rotated(values: Any, random: np.random.Generator) -> Any:
    n_rows, n = values.shape
    offset = random.integers(n_rows, size=n)
    if not sparse.issparse(values):
        return np.take_along_axis(values, (np.arange(n_rows)[:, None] - offset) % n_rows, axis=0)
    entries = values.tocoo()
    return sparse.csr_matrix((entries.data, ((entries.row + offset[entries.col]) % n_rows, entries.col)), shape=values.shape)


# -- 5. Weights -----------------------------------------------------------------------------------------------


def fisher(correlation: FloatArray) -> FloatArray:
    """2·artanh(r), |r| clipped just below 1; 0 on the diagonal, which is no correlation. (n, n)."""
    weights = fisher_weights(correlation)
    np.fill_diagonal(weights, 0.0)
    return weights
