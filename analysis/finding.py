"""Finding regions: from a site's samples to a partition of its live features, with the path it was chosen from and the null it is held against.

1. Live features by the rule of `correlations.live_features`; all others are dead, a block of their own.
2. Correlations over all samples, and over each of two halves by whole sequences.
3. A method's path of partitions, fine to coarse (`partitioning`).
4. Every level scored on the halves (`levels`), one chosen by a rule; those that other rules would choose are kept too, where they are nested.
5. The null: shuffled samples, in which only chance correlations stay, say whether the partition finds more than chance. Where it does not, one
   block is what is chosen.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from ..errors import UserError
from ..queries.samples import SampleRun, SiteSamples
from .correlations import MIN_COUNT, MIN_SEQUENCES, Correlation, Null, correlation, fisher, halves, live_features, shuffled
from .levels import FEWEST_SHUFFLES, Rule, choose, null_verdict, scored
from .parcellation import PATH_SCORES, FloatArray, IntArray, Level, Parcellation, PartitionPath, SitePartition, by_size
from .partitioning import PartitionMethod, PartitionOptions, from_weights, partition

FEWEST = 4
"""Live features that a site must have for a partition; with fewer they are one block."""


class NoSites(UserError):
    """None of the samples' sites is wanted."""


@dataclass(frozen=True)
class FindingOptions:
    """How regions are found. rule: which level of the path is chosen; n_blocks: so many blocks, for `Rule.GIVEN` and flat methods.

    n_heads: for `Rule.HEADS`. correlation: what is correlated, None for what suits the samples' basis (`usual`). min_count, min_sequences: the rule
    of live features. nulls: shuffled copies of the samples that the partition is held against, 0 for none; null: how they are shuffled.
    neighbours: None for `usual_neighbours`. blocks_of: numbers of blocks by site, in place of `n_blocks`. labels_of: each site's features' blocks
    (d_sae,), for the method `heads`.
    """

    method: PartitionMethod = PartitionMethod.DENSE_SBM
    rule: Rule = Rule.HELD_OUT
    n_blocks: int | None = None
    n_heads: int | None = None
    correlation: Correlation | None = None
    min_count: int = MIN_COUNT
    min_sequences: int = MIN_SEQUENCES
    nulls: int = 3
    null: Null = Null.ROTATED
    neighbours: int | None = None
    seconds: float = 120.0
    interpreter: str | None = None
    device: str = "cpu"
    seed: int = 0
    blocks_of: Mapping[str, int] | None = None
    labels_of: Mapping[str, IntArray] | None = None

    def check(self) -> None:
        """Raise a `UserError` for a number out of range."""
        for name, value, least in (("--min-count", self.min_count, 1), ("--min-sequences", self.min_sequences, 1), ("--nulls", self.nulls, 0)):
            if value < least:
                raise UserError(f"{name} {value} is too small: give at least {least}")
        for name, given, least in (("--level", self.n_blocks, 1), ("--neighbours", self.neighbours, 1)):
            if given is not None and given < least:
                raise UserError(f"{name} {given} is too small: give at least {least}")
        if not self.seconds > 0:
            raise UserError(f"--seconds {self.seconds:g} is no time: give a number above 0")
        if 0 < self.nulls < FEWEST_SHUFFLES:
            raise UserError(f"--nulls {self.nulls} is too small: give at least {FEWEST_SHUFFLES}, whose spread says what is chance, or 0 for none")
        if self.rule is Rule.GIVEN and self.n_blocks is None and self.blocks_of is None:
            raise UserError("a given number of blocks was asked for, and none was given: --level 40")

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the partitions, JSON-able; nothing of where they are computed."""
        described: dict[str, Any] = {
            "method": self.method.value, "rule": self.rule.value, "n_blocks": self.n_blocks, "n_heads": self.n_heads,
            "correlation": None if self.correlation is None else self.correlation.value, "min_count": self.min_count,
            "min_sequences": self.min_sequences, "nulls": self.nulls, "null": self.null.value, "neighbours": self.neighbours,
            "seed": self.seed, "blocks_of": dict(self.blocks_of or {}),
        }  # fmt: skip
        if self.labels_of is not None:
            described["labels_of"] = {site: hashlib.sha256(labels.tobytes()).hexdigest()[:12] for site, labels in self.labels_of.items()}
        return described


def find_parcellation(
    run: SampleRun, samples: Iterable[SiteSamples], options: FindingOptions, *, progress: Callable[[str], None] = lambda said: None
) -> Parcellation:
    """Partition every site of a run of samples. `progress` is told what goes on. Raises `NoSites` where there is no site."""
    options.check()
    options = replace(options, correlation=options.correlation or usual(run.basis))
    sites = {}
    for own in samples:
        sites[own.site] = find_partition(own, options, progress=progress)
    if not sites:
        raise NoSites(f"samples {run.key} have no such site: they are of {', '.join(run.dictionaries)}")
    described = options.identity
    content = json.dumps([run.key, sorted(sites), described], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    stands_in = {str(own.notes["instead_of"]) for own in sites.values() if "instead_of" in own.notes}
    method = f"{PartitionMethod.DENSE_SBM.value} for {options.method.value}" if stands_in else options.method.value
    return Parcellation(key, run.key, run.model, method, run.basis, sites, described)


def usual(basis: str) -> Correlation:
    """What is correlated unless told otherwise: activations as they are; of attributions, whose signs follow the pair, the log magnitudes.

    Signed attributions' correlations of one half of some hundred pairs say next to nothing of the other half's; those of magnitudes do.
    """
    return Correlation.LOG_MAGNITUDE if basis == "attribution" else Correlation.PEARSON


def find_partition(samples: SiteSamples, options: FindingOptions, *, progress: Callable[[str], None] = lambda said: None) -> SitePartition:
    """The partition of one site. notes: seconds of each part, the verdict of the null, what the method had to say."""
    started, kind = time.perf_counter(), options.correlation or Correlation.PEARSON
    features = live_features(samples, min_count=options.min_count, min_sequences=options.min_sequences, seed=options.seed)
    notes: dict[str, Any] = {"n_live": len(features), "n_dead": samples.d_sae - len(features), "n_tokens": samples.n_tokens}
    if len(features) < FEWEST:
        notes["verdict"] = f"{len(features)} live features are too few for a partition: one block"
        return _one_block(samples, features, notes)
    progress(f"{samples.site}: correlations of {len(features):,} features")
    whole = correlation(samples, features, kind=kind)
    masks = halves(samples, options.seed)
    first, second = (fisher(correlation(samples, features, mask, kind=kind)) for mask in masks)
    notes["seconds_correlation"] = round(time.perf_counter() - started, 3)
    progress(f"{samples.site}: {options.method.value}")
    started = time.perf_counter()
    how = _partition_options(samples.site, features, options)
    path = partition(options.method, whole, how)
    progress(f"{samples.site}: levels")
    stood_in: list[str] = []
    scores = scored(path, (first, second), refit=_refit(how, options.method, stood_in))
    begun = int(path.n_blocks[0])
    while 8 * begun <= len(features) and _starts_too_coarse(path, scores, options):  # up to four features a block
        begun *= 2  # what comes out may have fewer: some blocks lose all their features
        finer = replace(how, n_blocks=begun)
        other = partition(options.method, whole, finer)
        of_other = scored(other, (first, second), refit=_refit(finer, options.method, stood_in))
        if _best(of_other) < _best(scores):
            break
        how, path, scores = finer, other, of_other
    refit = _refit(how, options.method, stood_in)
    notes["seconds_partition"] = round(time.perf_counter() - started, 3)
    notes |= {name: value for name, value in path.info.items() if name != "seconds"} | _of_others(path, stood_in)
    rule = options.rule
    at = choose(path, scores, rule, n_heads=options.n_heads, n_blocks=_wanted_blocks(samples.site, options))
    if path.n_blocks[at] == 1:
        notes["verdict"] = f"one block by the rule “{rule.value}”"
        return _one_block(samples, features, notes, scores, rule.value)
    if options.nulls:
        progress(f"{samples.site}: {options.nulls} shuffled samples")
        started = time.perf_counter()
        pairs = [_null_halves(samples, features, masks, options, kind, i) for i in range(options.nulls)]
        verdict = null_verdict(path, (first, second), pairs, refit=refit, scores=scores)
        notes |= {
            "significant": bool(verdict.significant), "gain": verdict.gain, "null_gains": list(verdict.null_gains), "p": verdict.p,
            "seconds_null": round(time.perf_counter() - started, 3), **_of_others(path, stood_in),
        }  # fmt: skip
        if not verdict.significant:
            notes["verdict"] = "no more than in shuffled samples: one block"
            return _one_block(samples, features, notes, scores)
    levels, chosen = _levels(path, scores, at, rule, options)
    return SitePartition(samples.site, samples.dictionary, samples.d_sae, features, levels, chosen, scores, notes)


NEAR_THE_START = 0.75
"""A level with more than this share of the blocks that a path begins with lies at its beginning: what is finer was not looked at."""


def _starts_too_coarse(path: PartitionPath, scores: pl.DataFrame, options: FindingOptions) -> bool:
    """Whether the level of greatest held-out likelihood lies at the beginning of the dense model's path: a finer one may be better."""
    if options.method is not PartitionMethod.DENSE_SBM or options.rule is not Rule.HELD_OUT:
        return False
    return bool(path.n_blocks[choose(path, scores, Rule.HELD_OUT)] > NEAR_THE_START * path.n_blocks[0])


def _best(scores: pl.DataFrame) -> float:
    """The greatest held-out likelihood of a path."""
    return float(scores["held_out"].fill_nan(None).max())  # type: ignore[arg-type]


def _one_block(
    samples: SiteSamples, features: IntArray, notes: Mapping[str, Any], scores: pl.DataFrame | None = None, rule: str = "nothing but chance"
) -> SitePartition:
    whole = Level(rule, np.zeros(len(features), dtype=np.int64))
    empty = pl.DataFrame(schema=dict(PATH_SCORES)) if scores is None else scores
    return SitePartition(samples.site, samples.dictionary, samples.d_sae, features, (whole,), 0, empty, notes)


def _wanted_blocks(site: str, options: FindingOptions) -> int | None:
    return (options.blocks_of or {}).get(site, options.n_blocks)


def _partition_options(site: str, features: IntArray, options: FindingOptions) -> PartitionOptions:
    labels = None if options.labels_of is None else by_size(options.labels_of[site][features])
    wanted = _wanted_blocks(site, options)
    return PartitionOptions(
        seed=options.seed, n_blocks=None if wanted is None else min(wanted, len(features)), neighbours=options.neighbours, seconds=options.seconds,
        interpreter=options.interpreter, device=options.device, labels=labels,
    )  # fmt: skip


def _of_others(path: PartitionPath, stood_in: list[str]) -> dict[str, Any]:
    """What is to be said where halves or shuffled samples were partitioned by another method than the samples: their scores do not compare."""
    return {"refits_instead_of": len(stood_in), "refits_reason": stood_in[0]} if stood_in and "instead_of" not in path.info else {}


def _refit(options: PartitionOptions, method: PartitionMethod, stood_in: list[str]) -> Callable[[FloatArray], PartitionPath]:
    """The same method on the Fisher weights of a half of the samples. Where another stands in for it, the reason is added to `stood_in`."""

    fit = from_weights(method, options)

    def fitted(weights: FloatArray) -> PartitionPath:
        path = fit(weights)
        if "instead_of" in path.info:
            stood_in.append(str(path.info["reason"]))
        return path

    return fitted


def _null_halves(
    samples: SiteSamples, features: IntArray, masks: tuple[Any, Any], options: FindingOptions, kind: Correlation, i: int
) -> tuple[FloatArray, FloatArray]:
    """Fisher weights of the two halves, each shuffled on its own."""
    first, second = (
        fisher(shuffled(samples, features, options.seed + 1 + 2 * i + k, rows=mask, null=options.null, kind=kind))
        for k, mask in enumerate(masks)
    )
    return first, second


def _levels(path: PartitionPath, scores: pl.DataFrame, at: int, rule: Rule, options: FindingOptions) -> tuple[tuple[Level, ...], int]:
    """The levels that are kept, fine to coarse, each named by the rules that choose it, and the place of the chosen one."""
    named: dict[int, list[str]] = {at: [rule.value]}
    for other in (Rule.HELD_OUT, Rule.STABILITY, Rule.HEADS, Rule.DESCRIPTION_LENGTH):
        if other is rule or (other is Rule.HEADS and options.n_heads is None):
            continue
        try:
            place = choose(path, scores, other, n_heads=options.n_heads)
        except UserError:  # a rule that this path gives no ground for
            continue
        if path.n_blocks[place] > 1:
            named.setdefault(place, []).append(other.value)
    kept: list[int] = []
    for place in sorted(named):  # different levels of the path may be the same partition
        if not kept or path.n_blocks[place] != path.n_blocks[kept[-1]]:
            kept.append(place)
        else:
            named[kept[-1]] += named[place]
    levels = tuple(Level(", ".join(dict.fromkeys(named[place])), by_size(path.labels[place])) for place in kept)
    return levels, next(i for i, place in enumerate(kept) if path.n_blocks[place] == path.n_blocks[at])


def like(options: FindingOptions, parcellation: Parcellation, method: PartitionMethod) -> FindingOptions:
    """Options that find, by another method, as many blocks at every site as a parcellation has: for a comparison at equal numbers."""
    blocks = {name: own.levels[own.chosen].n_blocks for name, own in parcellation.sites.items()}
    return replace(options, method=method, rule=Rule.GIVEN, n_blocks=None, blocks_of=blocks, nulls=0)
