"""Which features of two models, checkpoints or dictionaries are the same: those whose activations go together on the same segments of text.

1. Live features of each site: active on `min_active` segments or more, and not constant (`LiveSite`).
2. Joint correlation of every live feature of A with every one of B, pair of sites by pair of sites and block by block: of each feature only the
   `top_k` best of the other side are kept (`strongest`). Nothing of size n_a × n_b is held but one block.
3. `nearest`: pairs of which each is the other's best, within a pair of sites and over all sites at once. `assign`: the one-to-one assignment with
   the greatest sum of scores, among the kept.
4. Chance: one side's rows are exchanged, so that only each side's own course remains (`null_rows`), and the best are sought again, `draws` times.
   `score_threshold`: the least score at which chance makes at most `fdr` of what is found.
5. `similarities` adds CKA and SVCCA of the raw values; `correspondence` says which site is which.

Two features that fire on exactly the same segments tie; the first is taken, and the assignment gives the other one its counterpart.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from scipy.sparse.csgraph import min_weight_full_bipartite_matching  # type: ignore[import-untyped]

from ..errors import UserError
from ..queries.matches import (
    OVERALL,
    PAIRS,
    SCORES,
    SITES,
    Aligned,
    AlignedRun,
    MatchingRows,
    Method,
    Pairing,
    list_matchings,
    read_matches,
    read_scores,
    read_site_pairs,
    replace_matches,
    write_matching,
)
from ..queries.schema import feature_key
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from .similarity import VARIANCE_KEPT, monotone_path, similarities

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

BIN = 0.02
"""Width of the bins in which scores are counted."""

KEY_LENGTH = 24


class BadMatchOptions(UserError):
    """An option of a matching is out of its range."""


class NothingToMatch(UserError):
    """A side has no live feature, or there are too few sequences to exchange."""


class Null(StrEnum):
    """How chance is made; both keep how each side's features go on from segment to segment."""

    SEQUENCES = "sequences"
    """Each sequence of A meets another one of B, of about its length: what is by position alone stays, and counts as chance."""
    SHIFT = "shift"
    """All rows of B are shifted by one random number, cyclically: for texts that are all made alike, where position says what is there."""


@dataclass(frozen=True, kw_only=True)
class MatchOptions:
    """How features are matched.

    min_active: segments on which a feature must be active. top_k: best counterparts kept of each feature, on each site; the assignment chooses among
    them. fdr: the expected share of false ones among the significant pairs. draws: of chance. null: SEQUENCES for a corpus, SHIFT for a task unless
    given. absolute: opposite signs match too, as they may where features are neurons. variance: what SVCCA keeps. memory: bytes for one block.
    """

    min_active: int = 10
    top_k: int = 16
    fdr: float = 0.05
    draws: int = 5
    null: Null | None = None
    absolute: bool = False
    variance: float = VARIANCE_KEPT
    memory: int = 512 * 1024**2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("min_active", "top_k", "draws", "memory"):
            if getattr(self, name) < 1:
                raise BadMatchOptions(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.fdr < 1:
            raise BadMatchOptions(f"fdr is {self.fdr}: it is a share, between 0 and 1, such as 0.05")
        if not 0 < self.variance <= 1:
            raise BadMatchOptions(f"variance is {self.variance}: a share above 0, and at most 1, such as 0.99")


@dataclass(frozen=True, eq=False)
class Matching:
    """What was found. pairs: as `PAIRS`; sites: as `SITES`; scores: as `SCORES`; overall: `OVERALL` of the search over all sites at once."""

    key: str
    aligned: str
    model_a: str
    model_b: str
    source: str
    pairs: pl.DataFrame
    sites: pl.DataFrame
    scores: pl.DataFrame
    overall: Mapping[str, Any]
    settings: Mapping[str, Any]

    def matched(self, pairing: Pairing = Pairing.MUTUAL, *, same_sites: bool = False) -> pl.DataFrame:
        """The significant matches, one-to-one: source, target, score, best first; over all sites at once, or between sites of one name."""
        among = pl.col("method") == str(Method.SITE_PAIRS if same_sites else Method.ALL_SITES)
        among &= (pl.col("site_a") == pl.col("site_b")) | (not same_sites)
        chosen = among & pl.col("significant") & pl.col(str(pairing))
        return self.pairs.filter(chosen).sort("score", descending=True).select("source", "target", "score")


Report = Callable[[int, int], None]
"""Called with (pairs of sites done, pairs in all)."""


# -- 1. Live features ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LiveSite:
    """The live features of a site: their indices (n_live,), and their values on every segment, (n_segments, n_live), CSR or dense, float64."""

    site: str
    features: IntArray
    values: Any

    @property
    def n(self) -> int:
        return len(self.features)

    @property
    def n_bytes(self) -> int:
        """What the values take."""
        return int(self.values.data.nbytes if sparse.issparse(self.values) else self.values.nbytes)

    def rows(self, chosen: IntArray | None) -> "LiveSite":
        """The same on other segments, in the order given; None is all."""
        return self if chosen is None else replace(self, values=self.values[chosen])


def live_site(side: AlignedRun, site: str, min_active: int) -> LiveSite:
    """The features of a site that are active on at least so many segments, and vary."""
    samples = side.site(site)
    if samples.dense:
        values = samples.values.astype(np.float64)
        live = np.flatnonzero((np.count_nonzero(values, axis=0) >= min_active) & (values.max(axis=0) > values.min(axis=0)))
        return LiveSite(site, live, values[:, live])
    values = samples.values.astype(np.float64)
    values.eliminate_zeros()
    live = np.flatnonzero((np.bincount(values.indices, minlength=values.shape[1]) >= min_active) & (moments(values)[1] > 0))
    return LiveSite(site, live, values[:, live])


def moments(values: Any) -> tuple[FloatArray, FloatArray]:
    """Means and standard deviations of columns, CSR or dense, (n_columns,) each; exactly 0 for a constant column."""
    n = values.shape[0]
    mean = np.asarray(values.mean(axis=0)).ravel()
    if not sparse.issparse(values):
        return mean, np.where(values.max(axis=0) > values.min(axis=0), values.std(axis=0), 0.0)
    # Deviations from the mean first, of entries and of zeros: no difference of large sums.
    squares = np.bincount(values.indices, weights=(values.data - mean[values.indices]) ** 2, minlength=values.shape[1])
    silent = n - np.bincount(values.indices, minlength=values.shape[1])
    low, high = (np.asarray(part.todense()).ravel() for part in (values.min(axis=0), values.max(axis=0)))
    return mean, np.where(high > low, np.sqrt((squares + silent * mean**2) / n), 0.0)


# -- 2. Joint correlation ------------------------------------------------------------------------------------


def correlation_blocks(a: LiveSite, b: LiveSite, memory: int) -> Iterator[tuple[int, FloatArray]]:
    """(start, r) with r the correlations (rows, n_b) of some of A's features, from `start` on, with all of B's; 0 where one is constant."""
    n = a.values.shape[0]
    (mean_a, std_a), (mean_b, std_b) = moments(a.values), moments(b.values)
    columns = a.values.tocsc() if sparse.issparse(a.values) else a.values
    step = max(memory // (8 * 4 * max(b.n, 1)), 1)  # the block, its sparse form, and what is made of it
    for start in range(0, a.n, step):
        part = slice(start, start + step)
        product = columns[:, part].T @ b.values
        r = product.toarray() if sparse.issparse(product) else np.asarray(product)
        r /= n
        r -= np.outer(mean_a[part], mean_b)
        scale = np.outer(std_a[part], std_b)
        np.divide(r, scale, out=r, where=scale > 0)
        r[scale == 0] = 0.0
        yield start, np.clip(r, -1.0, 1.0, out=r)


class Strongest(NamedTuple):
    """Of each feature of one side the best of the other, best first: other (n, k), −1 where there are fewer, and score (n, k), −inf there."""

    other: IntArray
    score: FloatArray

    @property
    def best(self) -> IntArray:
        """The very best, (n,)."""
        return self.other[:, 0]


def _rank(score: FloatArray, absolute: bool) -> FloatArray:
    """What makes one score better than another."""
    return np.where(np.isfinite(score), np.abs(score), score) if absolute else score


def _top(score: FloatArray, index: IntArray, k: int, absolute: bool) -> Strongest:
    """The k best of each row, best first, of equals the first; score and index (n, m)."""
    rank = _rank(score, absolute)
    if rank.shape[1] > k:
        kept = np.argmax(rank, axis=1)[:, None] if k == 1 else np.argpartition(-rank, k - 1, axis=1)[:, :k]
        rank, score, index = np.take_along_axis(rank, kept, 1), np.take_along_axis(score, kept, 1), np.take_along_axis(index, kept, 1)
    order = np.lexsort((index, -rank), axis=1)
    return Strongest(np.take_along_axis(index, order, axis=1), np.take_along_axis(score, order, axis=1))


def strongest(a: LiveSite, b: LiveSite, k: int, memory: int, *, absolute: bool = False) -> tuple[Strongest, Strongest]:
    """For each feature of A its k best of B, and for each of B its k best of A."""
    of_a: list[Strongest] = []
    of_b = Strongest(np.full((b.n, 0), -1), np.full((b.n, 0), -np.inf))
    for start, r in correlation_blocks(a, b, memory):
        of_a.append(_top(r, np.broadcast_to(np.arange(b.n), r.shape), k, absolute))
        own = _top(np.ascontiguousarray(r.T), np.broadcast_to(np.arange(start, start + len(r)), r.T.shape), k, absolute)
        of_b = _top(np.hstack([of_b.score, own.score]), np.hstack([of_b.other, own.other]), k, absolute)
    return Strongest(np.concatenate([part.other for part in of_a]), np.concatenate([part.score for part in of_a])), of_b


# -- 3. Pairs ------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Pairs of features by their number on either side, and their scores, (n,) each."""

    a: IntArray
    b: IntArray
    score: FloatArray


def nearest(of_a: Strongest, of_b: Strongest, *, absolute: bool = False) -> Pairs:
    """The pairs of which each is the other's best; pairs of no or a negative score are in none."""
    a = np.flatnonzero((of_a.best >= 0) & (_rank(of_a.score[:, 0], absolute) > 0))
    mutual = of_b.best[of_a.best[a]] == a
    a = a[mutual]
    return Pairs(a, of_a.best[a], of_a.score[a, 0])


def assign(of_a: Strongest, of_b: Strongest, *, absolute: bool = False) -> Pairs:
    """The one-to-one assignment with the greatest sum of scores among the pairs that either side kept; pairs of no or a negative score are in none.

    It is the optimum over all pairs where k is as large as the smaller side, and may miss some of it else. The sparse Jonker-Volgenant algorithm,
    in which each feature of A may also go to a place of its own, worth 0.
    """
    n_a, n_b = len(of_a.other), len(of_b.other)
    rows = np.concatenate([np.repeat(np.arange(n_a), of_a.other.shape[1]), of_b.other.ravel()])
    columns = np.concatenate([of_a.other.ravel(), np.repeat(np.arange(n_b), of_b.other.shape[1])])
    score = np.concatenate([of_a.score.ravel(), of_b.score.ravel()])
    rank = _rank(score, absolute)
    kept = (rows >= 0) & (columns >= 0) & (rank > 0)
    cell, first = np.unique(rows[kept] * n_b + columns[kept], return_index=True)
    rows, columns, score, rank = cell // max(n_b, 1), cell % max(n_b, 1), score[kept][first], rank[kept][first]
    if not len(cell):
        return Pairs(rows, columns, score)
    own = np.arange(n_a)
    # 1 is added to all, since the algorithm knows no weight of 0; every row takes exactly one, so that the best stays the best.
    weights = sparse.csr_array(
        (np.concatenate([rank + 1, np.ones(n_a)]), (np.concatenate([rows, own]), np.concatenate([columns, n_b + own]))), shape=(n_a, n_b + n_a)
    )
    a, b = min_weight_full_bipartite_matching(weights, maximize=True)
    real = b < n_b
    a, b = a[real].astype(np.int64), b[real].astype(np.int64)
    return Pairs(a, b, score[np.searchsorted(cell, a * n_b + b)])


# -- 4. Chance -----------------------------------------------------------------------------------------------


def null_rows(sequence: IntArray, group: IntArray, null: Null, random: np.random.Generator) -> tuple[IntArray | None, IntArray]:
    """Which rows of A (None for all) meet which of B so that no two belong together, (n,) each.

    sequence: (n_rows,), ascending, where each row is; group: what belongs together. Raises `NothingToMatch`.
    """
    n = len(sequence)
    starts = np.flatnonzero(np.concatenate([[True], sequence[1:] != sequence[:-1]]))
    lengths = np.diff(np.append(starts, n))
    if null is Null.SHIFT:
        least = min(int(lengths.max()), n // 4)
        if n < 8:
            raise NothingToMatch(f"{n} segments are too few to be shifted against each other: give more text")
        return None, (np.arange(n) + int(random.integers(least, n - least + 1))) % n
    if len(starts) < 2:
        raise NothingToMatch("one sequence cannot be exchanged with another: give more text, or take --null shift")
    groups = group[starts]
    order = np.lexsort((random.random(len(starts)), lengths))  # neighbours are of like length
    other = np.roll(order, -int(random.integers(1, max(min(8, len(order) // 2), 1) + 1)))
    apart = groups[order] != groups[other]
    one, other = order[apart], other[apart]
    common = np.minimum(lengths[one], lengths[other])
    if not len(common):
        raise NothingToMatch("all sequences belong together: give texts that do not, or take --null shift")
    place = np.arange(common.sum()) - np.repeat(np.cumsum(common) - common, common)
    return np.repeat(starts[one], common) + place, np.repeat(starts[other], common) + place


def score_threshold(score: FloatArray, null: FloatArray, draws: int, fdr: float) -> float | None:
    """The least of the scores at or above which the expected share of chance is at most `fdr`, None where there is none.

    null: the scores of all draws together. The share at t is (null scores ≥ t, plus one) / draws over the scores ≥ t: the one keeps a few draws
    without any such score from being taken for certainty.
    """
    found = np.sort(score)[::-1]
    there = np.searchsorted(-found, -found, side="right")  # scores ≥ each
    by_chance = (len(null) - np.searchsorted(np.sort(null), found, side="left") + 1) / draws
    passing = np.flatnonzero(by_chance <= fdr * there)
    return float(found[passing[-1]]) if len(passing) else None


# -- The matching --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _PairOfSites:
    """What was found between two sites, and by chance, one entry a draw."""

    of_a: Strongest
    of_b: Strongest
    null_a: tuple[Strongest, ...]
    null_b: tuple[Strongest, ...]


def match(aligned: Aligned, options: MatchOptions | None = None, *, progress: Report | None = None) -> Matching:
    """Match the features of the two sides of aligned samples. Raises `NothingToMatch`."""
    options = _decided(aligned, options or MatchOptions())
    live_a, live_b = (_sites(side, options) for side in (aligned.a, aligned.b))
    counts = [{site: live(site).n for site in side.site_names} for live, side in ((live_a, aligned.a), (live_b, aligned.b))]
    for model, own in zip((aligned.model_a, aligned.model_b), counts):
        if not sum(own.values()):
            raise NothingToMatch(f"no feature of {model} is active on {options.min_active} of {aligned.n_segments} segments: give more text")
    first = aligned.a.site(aligned.a.site_names[0])
    random = np.random.default_rng(options.seed)
    draws = [null_rows(first.sequence, first.group, options.null or Null.SEQUENCES, random) for _ in range(options.draws)]
    found: dict[tuple[str, str], _PairOfSites] = {}
    for one in aligned.a.site_names:
        for other in aligned.b.site_names:
            found[one, other] = _between(live_a(one), live_b(other), draws, options)
            if progress is not None:
                progress(len(found), len(aligned.a.site_names) * len(aligned.b.site_names))
    features = [{site: live(site).features for site in side.site_names} for live, side in ((live_a, aligned.a), (live_b, aligned.b))]
    return _matching(aligned, options, found, features)


def _decided(aligned: Aligned, options: MatchOptions) -> MatchOptions:
    """The options with the null that fits the text where none is given."""
    return replace(options, null=options.null or (Null.SHIFT if aligned.settings.get("of_task") else Null.SEQUENCES))


def _settings(options: MatchOptions) -> dict[str, Any]:
    """What of the options determines the result, as JSON has it."""
    return {**{name: value for name, value in asdict(options).items() if name != "memory"}, "null": str(options.null)}


def matching_key(aligned: Aligned, options: MatchOptions | None = None) -> str:
    """The key of what `match` would find: a hash of the aligned samples and the options."""
    content = [aligned.key, _settings(_decided(aligned, options or MatchOptions()))]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def _sites(side: AlignedRun, options: MatchOptions) -> Callable[[str], LiveSite]:
    """A side's sites, read once where all of them fit into the memory, else one after the other."""
    samples = sum(site.n_bytes for site in side.run.sites) * 2  # as float64
    return lru_cache(maxsize=None if samples <= options.memory else 1)(lambda site: live_site(side, site, options.min_active))


def _between(a: LiveSite, b: LiveSite, draws: Sequence[tuple[IntArray | None, IntArray]], options: MatchOptions) -> _PairOfSites:
    absolute = options.absolute
    if not a.n or not b.n:
        nothing = lambda n: Strongest(np.full((n, 1), -1), np.full((n, 1), -np.inf))
        return _PairOfSites(nothing(a.n), nothing(b.n), (nothing(a.n),) * len(draws), (nothing(b.n),) * len(draws))
    of_a, of_b = strongest(a, b, options.top_k, options.memory, absolute=absolute)
    chance = [strongest(a.rows(rows_a), b.rows(rows_b), 1, options.memory, absolute=absolute) for rows_a, rows_b in draws]
    return _PairOfSites(of_a, of_b, tuple(part[0] for part in chance), tuple(part[1] for part in chance))


class _Search(NamedTuple):
    """One search: its mutual and its assigned pairs, chance's scores of all draws, and the threshold."""

    mutual: Pairs
    assigned: Pairs
    null: FloatArray
    threshold: float | None

    def significant(self, score: FloatArray, absolute: bool) -> BoolArray:
        """Which scores are at or above the threshold."""
        return np.zeros(len(score), dtype=bool) if self.threshold is None else _rank(score, absolute) >= self.threshold


def _search(of_a: Strongest, of_b: Strongest, null: Sequence[tuple[Strongest, Strongest]], options: MatchOptions) -> _Search:
    absolute = options.absolute
    mutual, assigned = nearest(of_a, of_b, absolute=absolute), assign(of_a, of_b, absolute=absolute)
    chance = _rank(np.concatenate([nearest(*draw, absolute=absolute).score for draw in null]), absolute)
    return _Search(mutual, assigned, chance, score_threshold(_rank(mutual.score, absolute), chance, options.draws, options.fdr))


def _merged(parts: Sequence[Strongest], offsets: Sequence[int], k: int, absolute: bool) -> Strongest:
    """The best over several sites of the other side, counted over all of them: `offsets` says where each begins."""
    index = np.hstack([np.where(part.other >= 0, part.other + offset, -1) for part, offset in zip(parts, offsets)])
    return _top(np.hstack([part.score for part in parts]), index, k, absolute)


def _over_all(
    aligned: Aligned, parts: Callable[[str, str], tuple[Strongest, Strongest]], counts: Sequence[Mapping[str, int]], k: int, absolute: bool
) -> tuple[Strongest, Strongest]:
    """The best of each feature over all sites of the other side, features counted over all sites of their own."""
    offsets = [np.concatenate([[0], np.cumsum(list(own.values()))])[:-1].tolist() for own in counts]
    a, b = aligned.a.site_names, aligned.b.site_names
    rows = [_merged([parts(one, other)[0] for other in b], offsets[1], k, absolute) for one in a]
    columns = [_merged([parts(one, other)[1] for one in a], offsets[0], k, absolute) for other in b]
    of_a, of_b = (_stacked(own) for own in (rows, columns))
    return of_a, of_b


def _stacked(parts: Sequence[Strongest]) -> Strongest:
    """Sites below each other; those that have fewer columns are filled up."""
    width = max(part.other.shape[1] for part in parts)
    filled = lambda array, value: np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=value)
    return Strongest(np.concatenate([filled(p.other, -1) for p in parts]), np.concatenate([filled(p.score, -np.inf) for p in parts]))


def _matching(
    aligned: Aligned, options: MatchOptions, found: Mapping[tuple[str, str], _PairOfSites], features: Sequence[Mapping[str, IntArray]]
) -> Matching:
    """The frames of a matching."""
    counts = [{site: len(own) for site, own in side.items()} for side in features]
    absolute = options.absolute
    searches = {
        sites: _search(part.of_a, part.of_b, list(zip(part.null_a, part.null_b)), options) for sites, part in found.items()
    }  # fmt: skip
    real = _over_all(aligned, lambda one, other: (found[one, other].of_a, found[one, other].of_b), counts, options.top_k, absolute)
    null = [
        _over_all(aligned, lambda one, other, d=d: (found[one, other].null_a[d], found[one, other].null_b[d]), counts, 1, absolute)  # type: ignore[misc]
        for d in range(options.draws)
    ]
    whole = _search(*real, null, options)
    nodes = [_nodes(side, own) for side, own in zip((aligned.a, aligned.b), features)]
    frames = [_pairs(whole, nodes, Method.ALL_SITES, absolute)]
    for (one, other), search in searches.items():
        own = [table.filter(pl.col("site") == site) for table, site in zip(nodes, (one, other))]
        frames.append(_pairs(search, own, Method.SITE_PAIRS, absolute))
    pairs = pl.concat(frames)
    sites = _site_rows(aligned, searches, counts, options, pairs)
    scores = pl.concat([_histogram(search, sites, options.draws) for sites, search in [(("", ""), whole), *searches.items()]])
    numbers = _numbers(whole, sum(counts[0].values()), sum(counts[1].values()), options)
    ends = (aligned.key, aligned.model_a, aligned.model_b, aligned.source)
    settings = {**_settings(options), "named": aligned.settings.get("named")}
    return Matching(matching_key(aligned, options), *ends, pairs, sites, scores, numbers, settings)


def _nodes(side: AlignedRun, features: Mapping[str, IntArray]) -> pl.DataFrame:
    """The live features of a side, in order: key, site, feature."""
    frames = []
    for site, own in features.items():
        stem = feature_key(side.model, side.dictionaries[site], site, "")
        frames.append(pl.DataFrame({"feature": own}, schema={"feature": pl.Int64}).select(
            (pl.lit(stem) + pl.col("feature").cast(pl.String)).alias("key"), pl.lit(site).alias("site"), "feature"))  # fmt: skip
    return pl.concat(frames)


def _pairs(search: _Search, nodes: Sequence[pl.DataFrame], method: Method, absolute: bool) -> pl.DataFrame:
    """The pairs of one search that are mutual, assigned, or both, as `PAIRS`."""
    n_b = max(nodes[1].height, 1)
    cells = [pairs.a * n_b + pairs.b for pairs in (search.mutual, search.assigned)]
    cell, first = np.unique(np.concatenate(cells), return_index=True)
    score = np.concatenate([search.mutual.score, search.assigned.score])[first]
    rows, columns = nodes[0][cell // n_b], nodes[1][cell % n_b]
    frame = pl.DataFrame({
        "source": rows["key"], "target": columns["key"], "site_a": rows["site"], "site_b": columns["site"],
        "feature_a": rows["feature"], "feature_b": columns["feature"], "score": score, "mutual": np.isin(cell, cells[0]),
        "assigned": np.isin(cell, cells[1]), "significant": search.significant(score, absolute),
    }, schema={name: dtype for name, dtype in PAIRS.items() if name != "method"}).with_columns(method=pl.lit(str(method)))  # fmt: skip
    return frame.sort(pl.col("score").abs() if absolute else pl.col("score"), "source", "target", descending=[True, False, False])


def _numbers(search: _Search, n_a: int, n_b: int, options: MatchOptions) -> dict[str, Any]:
    """The numbers of one search, as `OVERALL` names them."""
    passing = search.significant(search.mutual.score, options.absolute)
    matched = search.mutual.score[passing]
    by_chance = 0 if search.threshold is None else int(np.count_nonzero(search.null >= search.threshold))
    values = (
        n_a, n_b, len(search.mutual.score), len(matched), len(matched) / max(n_a, 1), len(matched) / max(n_b, 1),
        float(matched.mean()) if len(matched) else None, by_chance / options.draws / max(n_a, 1), search.threshold,
    )  # fmt: skip
    return dict(zip(OVERALL, values))


def _site_rows(
    aligned: Aligned,
    searches: Mapping[tuple[str, str], _Search],
    counts: Sequence[Mapping[str, int]],
    options: MatchOptions,
    pairs: pl.DataFrame,
) -> pl.DataFrame:
    """One row per pair of sites, as `SITES`."""
    matched = pairs.filter((pl.col("method") == str(Method.ALL_SITES)) & pl.col("mutual") & pl.col("significant"))
    of_all = {(one, other): n for one, other, n in matched.group_by("site_a", "site_b").len().iter_rows()}
    rows = [
        {
            "site_a": one, "site_b": other, "layer_a": aligned.a.layers[one], "layer_b": aligned.b.layers[other],
            "n_all": of_all.get((one, other), 0), **_numbers(search, counts[0][one], counts[1][other], options),
        }
        for (one, other), search in searches.items()
    ]  # fmt: skip
    alike = similarities(aligned, options.variance)
    frame = pl.DataFrame(rows, schema_overrides={"mean_score": pl.Float64, "threshold": pl.Float64})
    frame = frame.join(alike, on=["site_a", "site_b"], how="left", maintain_order="left")
    return frame.select(pl.col(name).cast(dtype) for name, dtype in SITES.items())


def _histogram(search: _Search, sites: tuple[str, str], draws: int) -> pl.DataFrame:
    """How the scores are spread, as `SCORES`; bins without any are left out."""
    last = round(1 / BIN) - 1  # which holds 1 too
    place = [np.minimum(np.floor(score / BIN + 1e-9).astype(np.int64), last) for score in (search.mutual.score, search.null)]
    bins = np.unique(np.concatenate(place))
    counts = [np.bincount(np.searchsorted(bins, own), minlength=len(bins)) for own in place]
    return pl.DataFrame({
        "method": np.full(len(bins), str(Method.SITE_PAIRS if sites[0] else Method.ALL_SITES)), "site_a": np.full(len(bins), sites[0]),
        "site_b": np.full(len(bins), sites[1]), "low": bins * BIN, "n": counts[0], "null_n": counts[1] / draws,
    }, schema=dict(SCORES))  # fmt: skip


# -- 5. Which site is which ----------------------------------------------------------------------------------


def correspondence(sites: pl.DataFrame) -> pl.DataFrame:
    """For each site of A, in order, the site of B that it is most like: by the share of its features matched, by CKA, by SVCCA, and by the share
    along a path that keeps the order of sites.

    sites: as `SITES`. Columns site_a, by_share, share, by_cka, cka, by_svcca, svcca, by_path; null where nothing was matched or measured.
    """
    a, b = (sites[name].unique(maintain_order=True).to_list() for name in ("site_a", "site_b"))
    grid = lambda name: sites[name].cast(pl.Float64).fill_null(np.nan).to_numpy().reshape(len(a), len(b))
    found: dict[str, list[Any]] = {"site_a": a}
    for name, column in (("share", "share_a"), ("cka", "cka"), ("svcca", "svcca")):
        values = np.where(np.isfinite(grid(column)), grid(column), -np.inf)
        best = values.argmax(axis=1)
        top = values[np.arange(len(a)), best]
        there = np.isfinite(top) & ((top > 0) | (name != "share"))
        found[f"by_{name}"] = [b[j] if there[i] else None for i, j in enumerate(best)]
        found[name] = [float(top[i]) if there[i] else None for i in range(len(a))]
    share = grid("share_a")
    path = monotone_path(share)
    found["by_path"] = [b[j] if share.any() else None for j in path]
    types = {name: pl.Float64 if name in ("share", "cka", "svcca") else pl.String for name in found}
    return pl.DataFrame(found, schema=types)


# -- Keeping -------------------------------------------------------------------------------------------------


def keep_matching(statistics: StatisticsStore, matching: Matching) -> None:
    """Write a matching into the statistics, in place of the one of the same key."""
    record = {
        "aligned": matching.aligned, "model_a": matching.model_a, "model_b": matching.model_b, "source": matching.source,
        "settings": json.dumps(dict(matching.settings), sort_keys=True), **matching.overall,
    }  # fmt: skip
    write_matching(statistics, MatchingRows(matching.key, record, matching.sites, matching.pairs, matching.scores))


def stored_matching(statistics: StatisticsStore, key: str) -> Matching | None:
    """A matching that was kept, by its whole key; None where there is none."""
    there = list_matchings(statistics).filter(pl.col("matching") == key)
    if there.is_empty():
        return None
    row = there.row(0, named=True)
    frames = read_matches(statistics, key), read_site_pairs(statistics, key), read_scores(statistics, key)
    overall = {name: row[name] for name in OVERALL}
    return Matching(key, row["aligned"], row["model_a"], row["model_b"], row["source"], *frames, overall, json.loads(row["settings"]))


_ENDS = ("source", "target", "site_a", "feature_a", "site_b", "feature_b", "score")
CONTEXTS = {**{name: PAIRS[name] for name in _ENDS}, "texts": pl.List(pl.String)}
"""The columns of `shared_contexts`."""


def shared_contexts(aligned: Aligned, matching: Matching, n: int, *, texts: int = 4) -> pl.DataFrame:
    """The `n` best matches over all sites that are strongest at different texts, as `CONTEXTS`.

    texts: segments at which both are strongest, by the smaller of the two shares of their own maximum.
    """
    chosen = (pl.col("method") == str(Method.ALL_SITES)) & pl.col("mutual") & pl.col("significant")
    best = matching.pairs.filter(chosen).sort(pl.col("score").abs(), "source", descending=[True, False]).head(8 * n)
    segments = aligned.a.tokens()["text"].fill_null("")
    read = lru_cache(maxsize=2)(lambda side, site: side.site(site).values)
    found, seen = {}, set()
    for (one, other), own in sorted(best.group_by("site_a", "site_b"), key=lambda group: group[0]):
        sides = [(read(aligned.a, one), own["feature_a"]), (read(aligned.b, other), own["feature_b"])]
        columns = [np.abs(values[:, features.to_numpy()]) for values, features in sides]
        dense = [part.toarray() if sparse.issparse(part) else np.asarray(part) for part in columns]
        both = np.minimum(*(part / part.max(axis=0) for part in dense))
        for place, source in enumerate(own["source"]):
            order = np.argsort(-both[:, place], kind="stable")
            strong = segments[order[both[order, place] > 0][: 40 * texts]]
            found[source, own["target"][place]] = strong.unique(maintain_order=True).head(texts).to_list()
    rows: list[dict[str, Any]] = []
    for row in best.iter_rows(named=True):
        told = found[row["source"], row["target"]]
        if tuple(told[:1]) not in seen and len(rows) < n:
            seen.add(tuple(told[:1]))
            rows.append({**{name: row[name] for name in _ENDS}, "texts": told})
    return pl.DataFrame(rows, schema=CONTEXTS)


def write_matches(graph: GraphStore, matching: Matching, aligned: Aligned, methods: Sequence[Method] = (Method.ALL_SITES,)) -> int:
    """Make the significant pairs of a matching the graph's `MATCHES` edges; how many there are. The nodes are created where the graph lacks them."""
    chosen = matching.pairs.filter(pl.col("significant") & pl.col("method").is_in([str(method) for method in methods]))
    for side, end, site, feature in ((aligned.a, "source", "site_a", "feature_a"), (aligned.b, "target", "site_b", "feature_b")):
        of_sites = pl.DataFrame(
            [{"site": name, "dictionary": side.dictionaries[name], "layer": side.layers[name]} for name in side.site_names],
            schema={"site": pl.String, "dictionary": pl.String, "layer": pl.Int64},
        )
        ends = chosen.select(pl.col(end).alias("key"), pl.col(site).alias("site"), pl.col(feature).alias("index")).unique("key")
        nodes = ends.join(of_sites, on="site").select(
            "key", pl.lit(side.model).alias("model"), "dictionary", "site", "layer", pl.lit("feature").alias("kind"), "index"
        )
        graph.merge_nodes("Feature", nodes.sort("key"))
    return replace_matches(graph, matching.key, chosen)
