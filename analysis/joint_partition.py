"""Joint partitions: the live features of two models at a pair of sites put into blocks together, and how far each block belongs to both.

1. `joined`: both sites' features as the columns of one matrix, whose rows are the same segments of text. Its correlations are the joint matrix
   [[AA, AB], [BA, BB]].
2. `finding.find_partition` partitions it as it does one site: live features, path, level by a rule, the null of shuffled samples.
3. Each block has n_a of A's N_a live features and n_b of B's N_b. With the shares s = n / N it is shared by 2·min(s_a, s_b) / (s_a + s_b): 1 where
   both models have the same part of their features in it, 0 where only one has any.
4. The null: B's segments moved on against A's by a random number of whole sequences, so that correlations inside each model stay and those between
   them are chance; the moved matrix is put into blocks by the same method and rule. (As many blocks as were found would be too few for groups that
   are no longer common, and would join them by force.) Blocks, largest first, are held against those of their rank.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from scipy import sparse  # type: ignore[import-untyped]

from ..errors import UserError
from ..queries.matches import Aligned
from ..queries.samples import SiteSamples
from .comparison_records import JOINT_BLOCKS, JOINT_MEMBERS, Comparison, FloatArray, IntArray, Values, together
from .correlations import Correlation, correlation, live_features
from .finding import FindingOptions, find_partition, usual
from .parcellation import SitePartition
from .partitioning import ami

PART = "joint"

MOVED = "B's text moved"
"""The null: segments of B against other ones of A."""


class NotAligned(UserError):
    """Two sites whose rows are not the same segments, or without any that is live."""


@dataclass(frozen=True, eq=False)
class JointSite:
    """The joint partition of a pair of sites. features_a, features_b: live ones; labels_a, labels_b: their blocks. blocks: as `JOINT_BLOCKS`.

    shared: over both models' features the mean of how far their blocks are shared, NaN where all are in one block, which says nothing; null: the same
    of each moved text that falls into blocks, at most (draws,).
    """

    site_a: str
    site_b: str
    features_a: IntArray
    features_b: IntArray
    labels_a: IntArray
    labels_b: IntArray
    blocks: pl.DataFrame
    shared: float
    null: FloatArray
    partition: SitePartition


def joined(a: SiteSamples, b: SiteSamples) -> SiteSamples:
    """Both sites' features as one: columns 0 … d_a − 1 are A's, the others B's. Raises `NotAligned`."""
    if a.n_tokens != b.n_tokens or not np.array_equal(a.sequence, b.sequence) or not np.array_equal(a.position, b.position):
        raise NotAligned(f"{a.site} has {a.n_tokens:,} rows and {b.site} {b.n_tokens:,}, which are not the same segments of the same text")
    if a.dense and b.dense:
        values: Any = np.concatenate([a.values, b.values], axis=1)
    else:
        values = sparse.hstack([sparse.csr_matrix(own.values) for own in (a, b)], format="csr")
    return SiteSamples(
        f"{a.site} and {b.site}", f"{a.dictionary}|{b.dictionary}", a.d_sae + b.d_sae, values, a.sequence, a.position, a.group
    )


def moved(samples: SiteSamples, seed: int) -> SiteSamples:
    """The same with its rows moved on by a whole number of sequences, at least one and not all, so that none keeps its place."""
    starts = np.flatnonzero(np.append(True, samples.sequence[1:] != samples.sequence[:-1]))
    if len(starts) < 2:
        raise NotAligned(f"{samples.site} has one sequence: there is no other text to hold it against")
    at = int(np.random.default_rng([seed, 8000]).choice(starts[1:]))
    order = np.roll(np.arange(samples.n_tokens), -at)
    return replace(samples, values=samples.values[order])


def shared(labels_a: IntArray, labels_b: IntArray, n_blocks: int) -> tuple[IntArray, IntArray, FloatArray]:
    """(n_a, n_b, how far shared) of each block, (n_blocks,)."""
    n_a, n_b = (np.bincount(labels, minlength=n_blocks) for labels in (labels_a, labels_b))
    share_a, share_b = n_a / max(len(labels_a), 1), n_b / max(len(labels_b), 1)
    total = share_a + share_b
    return n_a, n_b, np.divide(2 * np.minimum(share_a, share_b), total, out=np.zeros(n_blocks), where=total > 0)


def mean_shared(labels_a: IntArray, labels_b: IntArray, n_blocks: int) -> float:
    """How far blocks are shared, each weighing the mean of its shares of both models' features: Σ min(s_a, s_b), 1 for equal shares everywhere."""
    n_a, n_b, _ = shared(labels_a, labels_b, n_blocks)
    return float(np.minimum(n_a / max(len(labels_a), 1), n_b / max(len(labels_b), 1)).sum())


def partition_jointly(
    a: SiteSamples, b: SiteSamples, options: FindingOptions, *, draws: int = 3, progress: Callable[[str], None] = lambda said: None
) -> JointSite:
    """The joint partition of two sites, beside that of moved text. Raises `NotAligned` where a side has no live feature."""
    options.check()
    live = [live_features(own, min_count=options.min_count, min_sequences=options.min_sequences, seed=options.seed) for own in (a, b)]
    if not len(live[0]) or not len(live[1]):
        raise NotAligned(f"{(b if len(live[0]) else a).site} has no live feature in these samples: lower --min-count, or take more text")
    both = joined(a, b)
    found = find_partition(both, options, progress=progress)
    labels = found.labels_of()
    labels_a, labels_b = labels[live[0]], labels[a.d_sae + live[1]]
    n_blocks = int(labels.max()) + 1
    nulls, by_rank = [], []
    again = replace(options, nulls=0)
    for i in range(draws if n_blocks > 1 else 0):
        progress(f"{both.site}: text moved, {i + 1} of {draws}")
        # what is live is so in each half; text moved by whole sequences may leave features of another half out
        of_null = find_partition(joined(a, moved(b, options.seed + i)), again).labels_of()
        of_a, of_b = (part[part >= 0] for part in (of_null[live[0]], of_null[a.d_sae + live[1]]))
        most = max(int(part.max(initial=0)) for part in (of_a, of_b)) + 1
        if most == 1:  # no blocks: all features in one is not that they are shared
            continue
        nulls.append(mean_shared(of_a, of_b, most))
        by_rank.append(np.pad(shared(of_a, of_b, most)[2], (0, max(0, n_blocks - most)))[:n_blocks])
    blocks = _blocks(a, b, live, (labels_a, labels_b), n_blocks, np.array(by_rank).reshape(-1, n_blocks), options)
    in_all = mean_shared(labels_a, labels_b, n_blocks) if n_blocks > 1 else float("nan")
    return JointSite(a.site, b.site, live[0], live[1], labels_a, labels_b, blocks, in_all, np.array(nulls, dtype=np.float64), found)


def _blocks(
    a: SiteSamples, b: SiteSamples, live: Sequence[IntArray], labels: tuple[IntArray, IntArray], n_blocks: int, null: FloatArray,
    options: FindingOptions,
) -> pl.DataFrame:  # fmt: skip
    """As `JOINT_BLOCKS`, with mean correlations over pairs of different features."""
    both = joined(a, b)
    kind = options.correlation or Correlation.PEARSON
    matrix = correlation(both, np.concatenate([live[0], a.d_sae + live[1]]), kind=kind)
    n_a, n_b, how_far = shared(*labels, n_blocks)
    member = np.zeros((len(matrix), n_blocks))
    member[np.arange(len(matrix)), np.concatenate(labels)] = 1.0
    of_a = np.arange(len(matrix)) < len(live[0])
    sums = lambda one, other: np.einsum("ib,ib->b", member[one], matrix[np.ix_(one, other)] @ member[other])
    mean = lambda total, pairs: np.divide(total, pairs, out=np.full(n_blocks, np.nan), where=pairs > 0)
    own_a, own_b, between = sums(of_a, of_a), sums(~of_a, ~of_a), sums(of_a, ~of_a)
    columns = {
        "block": np.arange(n_blocks), "n_a": n_a, "n_b": n_b, "shared": how_far, "r_a": mean(own_a - n_a, n_a * (n_a - 1.0)),
        "r_b": mean(own_b - n_b, n_b * (n_b - 1.0)), "r_between": mean(between, n_a * n_b.astype(np.float64)),
        "null_mean": null.mean(axis=0) if len(null) else np.full(n_blocks, np.nan),
        "null_high": null.max(axis=0) if len(null) else np.full(n_blocks, np.nan),
    }  # fmt: skip
    frame = pl.DataFrame(columns).with_columns(pl.col(pl.Float64).fill_nan(None), site_a=pl.lit(a.site), site_b=pl.lit(b.site))
    return frame.select(pl.col(name).cast(dtype) for name, dtype in JOINT_BLOCKS.items())


def joint_partitions(
    aligned: Aligned, site_pairs: Sequence[tuple[str, str]], options: FindingOptions, *, draws: int = 3,
    progress: Callable[[int, int, str], None] = lambda done, total, said: None,
) -> tuple[Comparison, list[JointSite]]:  # fmt: skip
    """The joint partitions of some pairs of sites of aligned samples, as a comparison of kind joint. Raises `NotAligned`."""
    options = replace(options, correlation=options.correlation or usual(aligned.a.run.basis))
    found = []
    for i, (site_a, site_b) in enumerate(site_pairs):
        tell = lambda said, i=i: progress(i, len(site_pairs), said)
        found.append(partition_jointly(aligned.a.site(site_a), aligned.b.site(site_b), options, draws=draws, progress=tell))
    values, members = Values(PART), []
    for one in found:
        name = f"{one.site_a} and {one.site_b}"
        n = len(one.features_a) + len(one.features_b)
        values.add_against("shared", one.shared, MOVED, one.null, site=name, n=n)
        values.add("blocks", float(one.blocks.height), site=name, n=n)
        mixed = one.blocks.filter((pl.col("n_a") > 0) & (pl.col("n_b") > 0))
        values.add("blocks of both", float(mixed.height), site=name, n=one.blocks.height)
        sides = np.repeat([0, 1], [len(one.labels_a), len(one.labels_b)])
        values.add("AMI of blocks and models", ami(np.concatenate([one.labels_a, one.labels_b]), sides), site=name, n=n)
        for side, features, labels in (("a", one.features_a, one.labels_a), ("b", one.features_b, one.labels_b)):
            rows = pl.DataFrame({"feature": features, "block": labels}).with_columns(
                site_a=pl.lit(one.site_a), site_b=pl.lit(one.site_b), side=pl.lit(side)
            )
            members.append(rows.select(pl.col(column).cast(dtype) for column, dtype in JOINT_MEMBERS.items()))
    settings = {**options.identity, "draws": draws, "site_pairs": [list(pair) for pair in site_pairs]}
    key = hashlib.sha256(json.dumps([aligned.key, settings], sort_keys=True).encode()).hexdigest()[:16]
    notes = {f"{one.site_a}|{one.site_b}": str(one.partition.notes.get("verdict", "")) for one in found}
    comparison = Comparison(
        key, "joint", aligned.model_a, aligned.model_b, aligned.key, aligned.key, aligned.model_a, aligned.model_b, "", settings,
        {"verdicts": {name: said for name, said in notes.items() if said}, "source": aligned.source}, values.frame(),
        blocks=together([one.blocks for one in found], JOINT_BLOCKS), members=together(members, JOINT_MEMBERS),
    )  # fmt: skip
    return comparison, found


def site_pairs(aligned: Aligned, named: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Pairs of sites by their texts `site of A=site of B`; unless given those of one name, or, where there is none, by their order.

    Raises `NotAligned` for a text that is no pair, or a site that was not sampled.
    """
    of_a, of_b = aligned.a.site_names, aligned.b.site_names
    if named is None:
        same = [(site, site) for site in of_a if site in of_b]
        return same or list(zip(of_a, of_b, strict=False))
    found = []
    for text in named:
        site_a, _, site_b = text.partition("=")
        site_b = site_b or site_a
        for site, there, name in ((site_a, of_a, "A"), (site_b, of_b, "B")):
            if site not in there:
                raise NotAligned(f"--pairs {text!r}: {name} has no site {site!r} in these samples, it has {', '.join(there)}")
        found.append((site_a, site_b))
    return found
