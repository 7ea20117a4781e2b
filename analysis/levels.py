"""Which level of a path of partitions: scores of all levels, rules that choose by them, and whether there are blocks at all.

1. `scored`: the held-out likelihood and the stability of every level. The samples are split into two halves of whole sequences, and the method is run
   again on each half. The blocks found on one half, with the means and variances of their weights there, are scored on the other half's weights, and
   the other way round; a level of the full path has the score of the halves' levels with as many blocks. Labels from all samples would know both
   halves' noise: they are used where no `refit` is given, and prefer fine levels by it.
2. `choose`: the level that a rule takes. By held-out likelihood unless another is asked for; the description length alone splits too much.
3. `null_verdict`: whether the best level's held-out likelihood exceeds that of one block by more than it does where every feature's samples are
   shuffled on their own, which leaves each feature as it is and takes away what they have in common (parallel analysis, Horn 1965). Where it does
   not, the partition is one block.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import polars as pl
import torch
from scipy.stats import t as student  # type: ignore[import-untyped]
from sklearn.metrics import adjusted_mutual_info_score  # type: ignore[import-untyped]

from ..errors import UserError
from .block_model import BadWeights, block_sums, folded, moments, prepared
from .parcellation import PATH_SCORES, FloatArray, IntArray, PartitionPath

Halves = tuple[FloatArray, FloatArray]
"""The weights (n, n) of the same features over two halves of the samples."""

Refit = Callable[[FloatArray], PartitionPath]
"""The method, as it was used for the path: weights (n, n) → a path."""


class NoSuchLevel(UserError):
    """A rule that cannot choose from a path: its score was not measured, or no level is as asked."""


class Rule(StrEnum):
    """What chooses a level."""

    HELD_OUT = "held-out likelihood"
    """The greatest held-out likelihood; of equal ones the coarser level. The default."""
    STABILITY = "stability between halves"
    """The greatest stability of all levels of two or more blocks that are not single features, the finer of equal ones. Where there are two scales
    it tends to the coarser."""
    HEADS = "more blocks than heads"
    """The fewest blocks that are more than the layer's attention heads."""
    DESCRIPTION_LENGTH = "description length"
    """The least description length. Of correlations it asks for too many blocks: never the default."""
    GIVEN = "number of blocks"
    """The number of blocks nearest to a given one."""


def scored(path: PartitionPath, halves: Halves | None, *, refit: Refit | None = None, more_halves: Sequence[Halves] = ()) -> pl.DataFrame:
    """The scores of every level, as `PATH_SCORES`.

    more_halves: further splits; held-out likelihood and stability are means over all splits, stability_low and stability_high its least and
    greatest, null for a single split. Stability needs `refit`: it is the AMI of the two halves' levels with the number of blocks nearest to the
    level's. Without halves both are null. Raises `BadWeights` for halves of other features.
    """
    splits = [*([] if halves is None else [halves]), *more_halves]
    fits = [_fits(path, split, refit) for split in splits]
    held_out = np.mean([held_out_likelihood(path.n_blocks, fit, split) for fit, split in zip(fits, splits, strict=True)], axis=0) if splits else None
    stability = np.stack([agreement(path.n_blocks, fit) for fit in fits]) if splits and refit is not None else None  # (splits, levels)
    none = [None] * len(path)
    several = stability is not None and len(stability) > 1
    return pl.DataFrame(
        {
            "level": np.arange(len(path)),
            "n_blocks": path.n_blocks,
            "largest": [int(np.bincount(labels).max()) for labels in path.labels],
            "description_length": none if path.description_length is None else path.description_length,
            "held_out": none if held_out is None else held_out,
            "stability": none if stability is None else stability.mean(axis=0),
            "stability_low": none if stability is None or not several else stability.min(axis=0),
            "stability_high": none if stability is None or not several else stability.max(axis=0),
        },
        schema=dict(PATH_SCORES),
        nan_to_null=True,
    )


def choose(path: PartitionPath, scores: pl.DataFrame, rule: Rule, *, n_heads: int | None = None, n_blocks: int | None = None) -> int:
    """The level that a rule takes, an index into the path. n_heads: for `Rule.HEADS`. n_blocks: for `Rule.GIVEN`.

    Raises `NoSuchLevel` where the rule's score was not measured, its number is missing, or the path has no such level.
    """
    match rule:
        case Rule.HELD_OUT:
            return _last_greatest(_measured(scores, "held_out", rule))
        case Rule.DESCRIPTION_LENGTH:
            return _last_greatest(-_measured(scores, "description_length", rule))
        case Rule.STABILITY:
            telling = (path.n_blocks > 1) & (scores["largest"].to_numpy() > 1)  # one block agrees with itself, and so do single features
            stable = np.where(telling, _measured(scores, "stability", rule), -np.inf)
            return int(stable.argmax())
        case Rule.HEADS:
            if n_heads is None:
                raise NoSuchLevel(f"the rule “{rule}” needs the number of heads: the layer's attention must be known")
            more = np.flatnonzero(path.n_blocks > n_heads)
            if not len(more):
                raise NoSuchLevel(f"no level has more blocks than {n_heads} heads: the finest has {path.n_blocks.max()}; choose by another rule")
            return int(more[-1])
        case Rule.GIVEN:
            if n_blocks is None or n_blocks < 1:
                raise NoSuchLevel(f"the rule “{rule}” needs a number of blocks, at least 1, not {n_blocks}")
            return path.with_blocks(n_blocks)


def _measured(scores: pl.DataFrame, column: str, rule: Rule) -> FloatArray:
    """A score of all levels, −∞ where it is null; refused where it is null everywhere."""
    values = scores[column]
    if values.null_count() == len(values):
        needs = "a method that has one" if column == "description_length" else "two halves of the samples"
        raise NoSuchLevel(f"the rule “{rule}” needs {needs}: {column} was not measured; choose by another rule, or give the number of blocks")
    # A null description length counts as infinite, which is −∞ too when it is negated.
    return values.fill_null(math.inf if column == "description_length" else -math.inf).to_numpy()


def _last_greatest(values: FloatArray) -> int:
    """Where the greatest value is, the coarser level of equal ones."""
    return int(np.flatnonzero(values == values.max())[-1])


def _fits(path: PartitionPath, halves: Halves, refit: Refit | None) -> tuple[PartitionPath, PartitionPath]:
    """The paths whose blocks are scored: found on each half, or the full path's own for both."""
    n = path.labels.shape[1]
    for half in halves:
        if half.shape != (n, n):
            raise BadWeights(f"a half's weights have shape {half.shape}: the path is of {n} features")
    return (path, path) if refit is None else (refit(halves[0]), refit(halves[1]))


def held_out_likelihood(n_blocks: IntArray, fits: tuple[PartitionPath, PartitionPath], halves: Halves) -> FloatArray:
    """ln p of one half's weights given the other's blocks, means and variances, in nats per pair, the mean of both ways, (levels,).

    n_blocks: (levels,); of a fit the level with the nearest number of blocks counts. NaN for a single feature, which has no pair.
    """
    ways = ((fits[0], halves[0], halves[1]), (fits[1], halves[1], halves[0]))
    means = [transferred(fit, seen, unseen)[[fit.with_blocks(int(b)) for b in n_blocks]] for fit, seen, unseen in ways]
    return (means[0] + means[1]) / 2


def transferred(path: PartitionPath, seen: FloatArray, unseen: FloatArray) -> FloatArray:
    """ln p per pair of unseen weights, normal with the means and variances that the blocks of each level have in the seen ones, (levels,)."""
    n = path.labels.shape[1]
    if n < 2:
        return np.full(len(path), np.nan)
    known = prepared(seen)
    new = prepared(unseen, mean=known.mean)
    finest = torch.from_numpy(path.labels[0])
    of_seen, of_new = block_sums(known, finest), block_sums(new, finest)
    found, now = np.empty(len(path)), path.labels[0]
    for level, labels in enumerate(path.labels):
        into = np.empty(int(now.max()) + 1, dtype=np.int64)
        into[now] = labels
        of_seen, of_new, now = folded(of_seen, torch.from_numpy(into)), folded(of_new, torch.from_numpy(into)), labels
        mean, variance = moments(of_seen, known.variance)
        misfit = of_new.squares - 2 * mean * of_new.total + mean * mean * of_new.pairs
        log_density = -of_new.pairs / 2 * (2 * math.pi * variance).log() - misfit / (2 * variance)
        found[level] = float(log_density.triu().sum()) / (n * (n - 1) / 2)
    return found


def agreement(n_blocks: IntArray, fits: tuple[PartitionPath, PartitionPath]) -> FloatArray:
    """AMI of two paths' levels with the numbers of blocks nearest to those asked for, (levels,)."""
    pairs = [(fits[0].with_blocks(int(b)), fits[1].with_blocks(int(b))) for b in n_blocks]
    known = {pair: float(adjusted_mutual_info_score(fits[0].labels[pair[0]], fits[1].labels[pair[1]])) for pair in set(pairs)}
    return np.array([known[pair] for pair in pairs])


@dataclass(frozen=True)
class Verdict:
    """Whether there are blocks. gain: of the best level's held-out likelihood over one block's, nats per pair. null_gains: of shuffled samples, each
    searched over the same levels. p: of the gain under Student's t with the null gains' mean and deviation. significant: p < alpha and the gain is
    greater than every null gain. level: of the path; None where one block is all there is."""

    significant: bool
    gain: float
    null_gains: tuple[float, ...]
    p: float
    alpha: float
    level: int | None


FEWEST_SHUFFLES = 3
"""Of two, t has one degree of freedom, and hardly any gain is beyond chance."""

SMALLEST_GAIN = 1e-3
"""Nats per pair: the deviation of null gains is taken to be at least this, so that equal null gains make no trifle significant."""


def null_verdict(
    path: PartitionPath,
    halves: Halves,
    shuffled_halves: Sequence[Halves],
    *,
    refit: Refit,
    scores: pl.DataFrame | None = None,
    alpha: float = 0.01,
) -> Verdict:
    """The verdict on a path of partitions, by at least `FEWEST_SHUFFLES` shuffles of the samples.

    shuffled_halves: the weights of two halves of samples in which every feature was permuted on its own, one pair for each shuffle, with the same
    features and as many samples. refit: the method. scores: of the path, where they are known, by the same halves and `refit`.
    Raises `NoSuchLevel` for fewer shuffles.
    """
    if len(shuffled_halves) < FEWEST_SHUFFLES:
        raise NoSuchLevel(f"{len(shuffled_halves)} shuffles of the samples: the null needs at least {FEWEST_SHUFFLES}")
    if path.labels.shape[1] < 2:
        return Verdict(False, 0.0, (0.0,) * len(shuffled_halves), 1.0, alpha, None)
    curve = held_out_likelihood(path.n_blocks, _fits(path, halves, refit), halves) if scores is None else _measured(scores, "held_out", Rule.HELD_OUT)
    gain = _gain(path, curve, halves)
    null = np.array([_gain(path, held_out_likelihood(path.n_blocks, _fits(path, own, refit), own), own) for own in shuffled_halves])
    deviation = max(float(null.std(ddof=1)), SMALLEST_GAIN) * math.sqrt(1 + 1 / len(null))
    p = float(student.sf((gain - null.mean()) / deviation, len(null) - 1))
    significant = bool(p < alpha and gain > null.max())
    return Verdict(significant, gain, tuple(null.tolist()), p, alpha, _last_greatest(curve) if significant else None)


def _gain(path: PartitionPath, curve: FloatArray, halves: Halves) -> float:
    """By how much the best level of two blocks and more exceeds one block, nats per pair; 0 where the path has none."""
    n = path.labels.shape[1]
    one = PartitionPath("one block", np.zeros((1, n), dtype=np.int64))
    several = curve[path.n_blocks > 1]
    single = held_out_likelihood(np.array([1]), (one, one), halves)[0]
    return float(several.max() - single) if len(several) else 0.0
