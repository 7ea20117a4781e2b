"""What a region is: how tightly its features belong together, what they write, when they are active, and what for.

Every block of every kept level of a parcellation is described from the samples that it was found in:
1. `coherence`: mean correlation, and mean cosine of the decoder's rows, of its live features with each other and with all others of the site.
2. `activity`: how often any of its members is active, how often the mean one is, how strongly.
3. `purposes`: which task, or class of sequences, the members' values are greatest on, with its share, and beside it what is usual at the site.
4. `exemplars`: the members that correlate most with the block's others; `contexts`: the tokens where all members together are strongest.
5. `likeness`: are blocks merely a smaller dictionary? The rank correlation of correlation and cosine over pairs of features, and how far the
   partition agrees with one of the decoder's cosines into as many blocks.
6. `automatic_labels`: a name by rule; what people call a block stands above it.

Sums over members are products with the sparse indicator of the blocks: nothing here loops over features or tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse, stats  # type: ignore[import-untyped]
from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped]

from ..queries.samples import SiteSamples
from .correlations import Correlation, correlation
from .notes import SEPARATOR
from .parcellation import Level, NotAPartition, Parcellation, SitePartition

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

ATTRIBUTION = "attribution"
"""The basis whose values are attributions to the metric; the other is activation."""

APART = 1.25
"""A task sets a block apart, in its label, where its share is at least so many times the usual."""

BLOCKS: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "site": pl.String(), "level": pl.Int64(), "block": pl.Int64(), "size": pl.Int64(), "mean_correlation": pl.Float64(),
        "mean_correlation_outside": pl.Float64(), "mean_cosine": pl.Float64(), "mean_cosine_outside": pl.Float64(), "frequency": pl.Float64(),
        "member_frequency": pl.Float64(), "mean_activation": pl.Float64(), "task": pl.String(), "task_share": pl.Float64(),
        "task_entropy": pl.Float64(), "distinctive_task": pl.String(), "distinctive_lift": pl.Float64(), "automatic_label": pl.String(),
        "label": pl.String(),
    }
)  # fmt: skip
"""One row per block. mean_correlation: over pairs of members, null for one member alone; _outside: over pairs of a member and a live feature that is
none; the cosines are of the decoder's rows, likewise. frequency: the share of tokens where any member is active; member_frequency: the members' mean
share. mean_activation: mean magnitude over members and tokens. task: the task (or class) on which the members' values are greatest, by the mean over
its sequences (attributions) or tokens (activations) of their summed magnitude; task_share: its part in the sum over tasks; task_entropy: of the
shares, in nats; distinctive_task: the one whose share is greatest in proportion to its share at the whole site, and that proportion; null for a
corpus. label: what people call the block, else null."""

EXEMPLARS: Mapping[str, pl.DataType] = MappingProxyType(
    {"site": pl.String(), "level": pl.Int64(), "block": pl.Int64(), "rank": pl.Int64(), "feature": pl.Int64(), "mean_correlation": pl.Float64()}
)
"""Members by their mean correlation with the block's others, greatest first (rank 0); null where there are no others."""

CONTEXTS: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "site": pl.String(), "level": pl.Int64(), "block": pl.Int64(), "rank": pl.Int64(), "value": pl.Float64(), "sequence": pl.Int64(),
        "position": pl.Int64(), "task": pl.String(), "before": pl.List(pl.String()), "token": pl.String(), "after": pl.List(pl.String()),
    }
)  # fmt: skip
"""Tokens where the members' summed value has the greatest magnitude, each of another sequence, with the text around."""

PURPOSES: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "site": pl.String(), "level": pl.Int64(), "block": pl.Int64(), "by": pl.String(), "name": pl.String(), "value": pl.Float64(),
        "share": pl.Float64(), "lift": pl.Float64(),
    }
)  # fmt: skip
"""Every block on every task (`by` task) and every class of sequences (`by` class): value, its share in the block's sum over names, and lift, the
share in proportion to that of all live features of the site."""

SITES: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "site": pl.String(), "level": pl.Int64(), "rule": pl.String(), "chosen": pl.Boolean(), "n_blocks": pl.Int64(), "n_live": pl.Int64(),
        "n_dead": pl.Int64(), "mean_correlation": pl.Float64(), "mean_correlation_outside": pl.Float64(), "mean_cosine": pl.Float64(),
        "mean_cosine_outside": pl.Float64(), "rank_correlation": pl.Float64(), "n_pairs": pl.Int64(), "cosine_ami": pl.Float64(),
    }
)  # fmt: skip
"""One row per site and level. The means are over pairs of features inside blocks and across. rank_correlation: Spearman's, of correlation and cosine
over `n_pairs` pairs of live features; cosine_ami: adjusted mutual information (0 by chance, 1 the same) with Ward's partition of the decoder's rows,
scaled to length 1, into as many blocks. Null without a decoder, or where all its rows are orthogonal (neurons)."""


@dataclass(frozen=True, slots=True)
class DescribeOptions:
    """How much is said of a block. kind: what is correlated, as the parcellation's settings say unless given. n_exemplars, n_contexts: per block.

    before, after: tokens of text around a context. n_pairs: pairs of features at most for the rank correlation, n_clustered: features at most for
    the partition of cosines; of more, so many are drawn by seed.
    """

    kind: Correlation | None = None
    n_exemplars: int = 5
    n_contexts: int = 5
    before: int = 16
    after: int = 8
    n_pairs: int = 500_000
    n_clustered: int = 4000
    seed: int = 0


class HasDecoder(Protocol):
    """What is needed of a dictionary: `W_dec`, (d_sae, d_in), a tensor or an array."""

    @property
    def W_dec(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Description:
    """What is known of the blocks of a parcellation: frames `BLOCKS`, `EXEMPLARS`, `CONTEXTS`, `PURPOSES`, `SITES`."""

    parcellation: str
    basis: str
    blocks: pl.DataFrame
    exemplars: pl.DataFrame
    contexts: pl.DataFrame
    purposes: pl.DataFrame
    sites: pl.DataFrame

    def with_labels(self, labels: pl.DataFrame) -> "Description":
        """The same with what people call blocks (`site, level, block, label`)."""
        blocks = self.blocks.drop("label").join(
            labels.select("site", "level", "block", "label"), on=["site", "level", "block"], how="left", maintain_order="left"
        )
        return replace(self, blocks=_typed(blocks, BLOCKS))

    def chosen(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows of one of the frames that are of sites' chosen levels."""
        return frame.join(self.sites.filter("chosen").select("site", "level"), on=["site", "level"], how="semi", maintain_order="left")


def describe(
    parcellation: Parcellation,
    samples: Callable[[str], SiteSamples],
    sequences: pl.DataFrame,
    tokens: pl.DataFrame | None = None,
    *,
    dictionaries: Mapping[Any, HasDecoder] | None = None,
    feature_labels: pl.DataFrame | None = None,
    options: DescribeOptions | None = None,
) -> Description:
    """Every block of a parcellation, from the samples that it was found in (`samples` gives a site's, by its name).

    sequences: the run's, one row per sequence (`sequence, task, label`). tokens: what the rows of the samples are (`sequence, position, text`);
    contexts have no text without. dictionaries: by site, for the cosines. feature_labels: `site, feature, label` of features that have a name, for
    the automatic labels. Raises `NotAPartition` where samples or dictionaries are not those of the partition.
    """
    chosen = options or DescribeOptions()
    if chosen.kind is None:
        chosen = replace(chosen, kind=Correlation(parcellation.settings.get("correlation", Correlation.PEARSON)))
    decoders = {str(site): dictionary.W_dec for site, dictionary in (dictionaries or {}).items()}
    parts: dict[str, list[pl.DataFrame]] = {name: [] for name in ("blocks", "exemplars", "contexts", "purposes", "sites")}
    for name, own in parcellation.sites.items():
        if not len(own.features):  # all dead
            continue
        site = _Site.of(own, samples(name), decoders.get(name), parcellation.basis, sequences, tokens, chosen)
        for level in range(len(own.levels)):
            for part, frame in _described(site, level).items():
                parts[part].append(frame.with_columns(pl.lit(name).alias("site"), pl.lit(level, dtype=pl.Int64).alias("level")))
    schemas = {"blocks": BLOCKS, "exemplars": EXEMPLARS, "contexts": CONTEXTS, "purposes": PURPOSES, "sites": SITES}
    frames = {part: pl.concat([pl.DataFrame(schema=dict(schemas[part])), *(_typed(frame, schemas[part]) for frame in found)])
              for part, found in parts.items()}  # fmt: skip
    frames["blocks"] = automatic_labels(frames["blocks"], frames["exemplars"], frames["contexts"], feature_labels)
    return Description(parcellation.key, parcellation.basis, **frames)


def _typed(frame: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """The columns of a schema; those that are missing are null."""
    return frame.select((pl.col(name) if name in frame.columns else pl.lit(None)).cast(dtype).alias(name) for name, dtype in schema.items())


@dataclass(frozen=True, eq=False)
class _Site:
    """A site's live features: values (n_tokens, n) CSR, correlations (n, n), decoder rows of length 1 (n, d_in) or None, and what its rows are."""

    partition: SitePartition
    samples: SiteSamples
    values: Any
    correlations: FloatArray
    directions: FloatArray | None
    basis: str
    sequences: pl.DataFrame
    tokens: pl.DataFrame | None
    options: DescribeOptions

    @classmethod
    def of(
        cls, own: SitePartition, samples: SiteSamples, decoder: Any, basis: str, sequences: pl.DataFrame, tokens: pl.DataFrame | None,
        options: DescribeOptions,
    ) -> "_Site":  # fmt: skip
        if (samples.dictionary, samples.d_sae) != (own.dictionary, own.d_sae):
            raise NotAPartition(f"samples of {own.site} are of dictionary {samples.dictionary}, its partition is of {own.dictionary}: sample it anew")
        values = sparse.csr_matrix(samples.values[:, own.features], dtype=np.float64)
        values.eliminate_zeros()
        correlations = correlation(samples, own.features, kind=options.kind or Correlation.PEARSON)
        return cls(own, samples, values, correlations, _directions(own, decoder), basis, sequences, tokens, options)

    @cached_property
    def likeness(self) -> "Likeness":
        """How much its correlations follow its decoder's cosines: the same at every level."""
        return likeness(self.correlations, self.directions, self.options)

    def indicator(self, level: Level) -> Any:
        """Which block each live feature is in, CSR (n, n_blocks)."""
        n = len(level.labels)
        return sparse.csr_matrix((np.ones(n), (np.arange(n), level.labels)), shape=(n, level.n_blocks))


def _directions(own: SitePartition, decoder: Any) -> FloatArray | None:
    """The live features' decoder rows, each of length 1; None without a decoder."""
    if decoder is None:
        return None
    if len(decoder) != own.d_sae:
        raise NotAPartition(f"the dictionary of {own.site} has {len(decoder)} features, its partition is of {own.d_sae}: find regions anew for it")
    rows = decoder.detach().double().cpu().numpy() if hasattr(decoder, "detach") else np.asarray(decoder, dtype=np.float64)
    rows = rows[own.features]
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def _described(site: _Site, level: int) -> dict[str, pl.DataFrame]:
    """The frames of one level, without site and level."""
    members = site.indicator(site.partition.levels[level])
    blocks, overall = coherence(site.correlations, site.directions, members)
    summed = _summed(site.values, members)
    found = purposes(site.values, members, _groups(site), mean_over_sequences=site.basis == ATTRIBUTION)
    blocks = blocks.hstack(activity(site.values, members)).join(_main_purposes(found), on="block", how="left", maintain_order="left")
    return {
        "blocks": blocks,
        "exemplars": exemplars(site.correlations, site.partition.levels[level].labels, site.partition.features, n=site.options.n_exemplars),
        "contexts": contexts(summed, site.samples, site.sequences, site.tokens, site.options),
        "purposes": found,
        "sites": _site_row(site, level, overall),
    }


# 1. Coherence


def coherence(correlations: FloatArray, directions: FloatArray | None, members: Any) -> tuple[pl.DataFrame, Mapping[str, float | None]]:
    """Per block `block, size` and the mean correlation and cosine inside and outside; and the same over all pairs inside blocks and across.

    correlations (n, n); directions (n, d_in), of length 1; members (n, n_blocks), the indicator of blocks.
    """
    size = np.asarray(members.sum(axis=0)).ravel()
    between = members.T @ (members.T @ correlations).T  # (n_blocks, n_blocks) sums over pairs
    own = np.asarray(members.T @ np.diag(correlations)).ravel()
    found: dict[str, FloatArray] = {}
    overall: dict[str, float | None] = {}
    _means("mean_correlation", np.diag(between) - own, between.sum(axis=1) - np.diag(between), size, found, overall)
    if directions is None or not _overlap(directions):
        nothing = np.full(len(size), np.nan)
        found |= {"mean_cosine": nothing, "mean_cosine_outside": nothing}
        overall |= {"mean_cosine": None, "mean_cosine_outside": None}
    else:
        sums = members.T @ directions  # (n_blocks, d_in)
        inside = (sums**2).sum(axis=1)
        lengths = np.asarray(members.T @ (directions**2).sum(axis=1)).ravel()
        _means("mean_cosine", inside - lengths, sums @ sums.sum(axis=0) - inside, size, found, overall)
    frame = pl.DataFrame({"block": np.arange(len(size)), "size": size.astype(np.int64), **found})
    return frame.with_columns(pl.col(name).fill_nan(None) for name in found), overall


def _overlap(directions: FloatArray) -> bool:
    """Whether any two of them are not orthogonal: neurons' never are."""
    gram_sum = (directions.sum(axis=0) ** 2).sum() - (directions**2).sum()
    return bool(abs(gram_sum) > 1e-9 or np.abs(directions[:64] @ directions.T).sum() > (directions[:64] ** 2).sum() + 1e-9)


def _means(
    name: str, inside: FloatArray, outside: FloatArray, size: FloatArray, found: dict[str, FloatArray], overall: dict[str, float | None]
) -> None:
    """Means of sums over ordered pairs inside blocks, (n_blocks,), and from inside to outside."""
    n_inside, n_outside = size * (size - 1), size * (size.sum() - size)
    divided = lambda sums, n: np.divide(sums, n, out=np.full(len(size), np.nan), where=n > 0)
    found[name], found[f"{name}_outside"] = divided(inside, n_inside), divided(outside, n_outside)
    overall[name] = float(inside.sum() / n_inside.sum()) if n_inside.any() else None
    overall[f"{name}_outside"] = float(outside.sum() / n_outside.sum()) if n_outside.any() else None


# 2. Activity


def _summed(values: Any, members: Any) -> Any:
    """The members' values, added: CSR (n_tokens, n_blocks)."""
    return sparse.csr_matrix(values @ members)


def activity(values: Any, members: Any) -> pl.DataFrame:
    """Per block `frequency`, `member_frequency`, `mean_activation`. values: CSR (n_tokens, n) without stored zeros."""
    n_tokens = values.shape[0]
    size = np.asarray(members.sum(axis=0)).ravel()
    active = sparse.csr_matrix((np.ones(values.nnz), values.indices, values.indptr), shape=values.shape)
    any_active = (active @ members).tocsc()
    frequency = np.bincount(active.indices, minlength=values.shape[1]) / n_tokens
    magnitude = np.asarray(abs(values).sum(axis=0)).ravel() / n_tokens
    return pl.DataFrame(
        {
            "frequency": np.diff(any_active.indptr) / n_tokens,
            "member_frequency": np.asarray(members.T @ frequency).ravel() / size,
            "mean_activation": np.asarray(members.T @ magnitude).ravel() / size,
        }
    )


# 3. Purposes


@dataclass(frozen=True, eq=False)
class _Grouping:
    """Which group, by its place in `names`, each token is in, −1 for none; how many tokens and sequences each group has."""

    by: str
    names: list[str]
    of_token: IntArray
    n_tokens: IntArray
    n_sequences: IntArray


def _groups(site: _Site) -> list[_Grouping]:
    """Tokens by the task of their sequence, and by its class; a grouping with fewer than two groups says nothing and is left out."""
    found = []
    for by, column in (("task", "task"), ("class", "label")):
        if column not in site.sequences.columns:
            continue
        rows = site.sequences.select("sequence", pl.col(column).cast(pl.String).alias("name"))
        names = rows["name"].drop_nulls().unique().sort().to_list()
        if len(names) < 2:
            continue
        number = rows["name"].replace_strict({name: i for i, name in enumerate(names)}, default=-1, return_dtype=pl.Int64).to_numpy()
        sequence = rows["sequence"].to_numpy()
        order = np.argsort(sequence)
        of_token = number[order][np.searchsorted(sequence[order], site.samples.sequence)]
        seen = np.unique(np.stack([of_token, site.samples.sequence]), axis=1)[0]
        n_tokens, n_sequences = (np.bincount(groups[groups >= 0], minlength=len(names)) for groups in (of_token, seen))
        found.append(_Grouping(by, names, of_token, n_tokens, n_sequences))
    return found


def purposes(values: Any, members: Any, groups: list[_Grouping], *, mean_over_sequences: bool) -> pl.DataFrame:
    """Every block on every group, as `PURPOSES` without site and level; groups without a token are left out.

    values: CSR (n_tokens, n). The value of a block on a group is its members' summed magnitude over the group's tokens, per sequence or per token.
    """
    summed = abs(values) @ members  # (n_tokens, n_blocks)
    frames = [pl.DataFrame(schema={name: dtype for name, dtype in PURPOSES.items() if name not in ("site", "level")})]
    for group in groups:
        inside = np.flatnonzero(group.of_token >= 0)
        of_group = sparse.csr_matrix((np.ones(len(inside)), (group.of_token[inside], inside)), shape=(len(group.names), len(group.of_token)))
        n = group.n_sequences if mean_over_sequences else group.n_tokens
        seen = np.flatnonzero(n > 0)
        mean = (of_group @ summed).toarray()[seen] / n[seen, None]  # (n_groups, n_blocks)
        share = _shares(mean)
        usual = _shares(mean.sum(axis=1, keepdims=True))
        lift = np.divide(share, usual, out=np.full_like(share, np.nan), where=usual > 0)
        n_blocks = mean.shape[1]
        frame = pl.DataFrame(
            {
                "block": np.repeat(np.arange(n_blocks), len(seen)), "by": group.by, "name": [group.names[i] for i in seen] * n_blocks,
                "value": mean.T.ravel(), "share": share.T.ravel(), "lift": lift.T.ravel(),
            }
        )  # fmt: skip
        frames.append(frame.with_columns(pl.col("share", "lift").fill_nan(None)).select(frames[0].columns))
    return pl.concat(frames)


def _shares(mean: FloatArray) -> FloatArray:
    """Each column over its sum; NaN where there is nothing."""
    total = mean.sum(axis=0, keepdims=True)
    return np.divide(mean, total, out=np.full_like(mean, np.nan), where=total > 0)


def _main_purposes(found: pl.DataFrame) -> pl.DataFrame:
    """Per block the task, or the class where there is one task only, of greatest share, the entropy of the shares, and what sets it apart."""
    by = "task" if (found["by"] == "task").any() else "class"
    own = found.filter(pl.col("by") == by, pl.col("share").is_not_null())
    surprise = pl.when(pl.col("share") > 0).then(-pl.col("share") * pl.col("share").log()).otherwise(0.0)
    return own.group_by("block", maintain_order=True).agg(
        pl.col("name").sort_by("share", "name", descending=[True, False]).first().alias("task"),
        pl.col("share").max().alias("task_share"),
        surprise.sum().alias("task_entropy"),
        pl.col("name").sort_by("lift", "name", descending=[True, False]).first().alias("distinctive_task"),
        pl.col("lift").max().alias("distinctive_lift"),
    )


# 4. Exemplars and contexts


def exemplars(correlations: FloatArray, labels: IntArray, features: IntArray, *, n: int) -> pl.DataFrame:
    """The `n` members of each block of greatest mean correlation with its others, `block, rank, feature, mean_correlation`; ties by feature."""
    n_features = len(labels)
    members = sparse.csr_matrix((np.ones(n_features), (np.arange(n_features), labels)))
    size = np.bincount(labels)[labels]
    total = np.asarray((members.T @ correlations).T)[np.arange(n_features), labels] - np.diag(correlations)
    mean = np.divide(total, size - 1, out=np.full(n_features, np.nan), where=size > 1)
    order = np.lexsort((features, -np.nan_to_num(mean), labels))
    first = np.searchsorted(labels[order], np.arange(labels.max() + 1))
    rank = np.arange(n_features) - first[labels[order]]
    frame = pl.DataFrame({"block": labels[order], "rank": rank, "feature": features[order], "mean_correlation": mean[order]})
    return frame.filter(pl.col("rank") < n).with_columns(pl.col("mean_correlation").fill_nan(None))


def contexts(
    summed: Any, samples: SiteSamples, sequences: pl.DataFrame, tokens: pl.DataFrame | None, options: DescribeOptions
) -> pl.DataFrame:
    """The tokens where a block's summed value has the greatest magnitude, one a sequence, as `CONTEXTS` without site and level.

    summed: CSR (n_tokens, n_blocks).
    """
    entries = summed.tocoo()
    row = entries.row.astype(np.int64)
    frame = pl.DataFrame({"block": entries.col.astype(np.int64), "row": row, "sequence": samples.sequence[row], "value": entries.data})
    by_size = frame.filter(pl.col("value") != 0).with_columns(size=pl.col("value").abs()).sort(["size", "row"], descending=[True, False])
    top = by_size.unique(["block", "sequence"], keep="first", maintain_order=True).group_by("block", maintain_order=True).head(options.n_contexts)
    top = top.with_columns(rank=pl.int_range(pl.len(), dtype=pl.Int64).over("block")).sort("block", "rank")
    row = top["row"].to_numpy()
    task = sequences.select("sequence", pl.col("task").cast(pl.String)).unique("sequence") if "task" in sequences.columns else None
    placed = top.with_columns(position=pl.Series(samples.position[row], dtype=pl.Int64))
    if task is not None:
        placed = placed.join(task.cast({"sequence": pl.Int64}), on="sequence", how="left", maintain_order="left")
    return placed.hstack(_around(row, samples, tokens, options)).drop("row", "size")


def _around(rows: IntArray, samples: SiteSamples, tokens: pl.DataFrame | None, options: DescribeOptions) -> pl.DataFrame:
    """`before`, `token`, `after`: the texts of these rows and of the rows around them that are of the same sequence and beside each other."""
    width = options.before + 1 + options.after
    if tokens is None or not len(rows):
        empty = pl.Series([[]] * len(rows), dtype=pl.List(pl.String))
        return pl.DataFrame({"before": empty, "token": pl.Series([None] * len(rows), dtype=pl.String), "after": empty})
    place = rows[:, None] + np.arange(-options.before, options.after + 1)  # (n, width)
    inside = (place >= 0) & (place < samples.n_tokens)
    place = np.clip(place, 0, samples.n_tokens - 1)
    distance = samples.position[place] - samples.position[rows][:, None]
    inside &= (samples.sequence[place] == samples.sequence[rows][:, None]) & (distance == np.arange(-options.before, options.after + 1))
    texts = tokens["text"].gather(pl.Series(place.ravel()))
    texts = pl.select(pl.when(pl.Series(inside.ravel())).then(texts)).to_series()
    window = pl.DataFrame({"texts": texts.reshape((len(rows), width)).arr.to_list()})["texts"]
    return pl.DataFrame(
        {
            "before": window.list.slice(0, options.before).list.drop_nulls(), "token": tokens["text"].gather(pl.Series(rows)),
            "after": window.list.slice(options.before + 1).list.drop_nulls(),
        }
    )  # fmt: skip


# 5. Are blocks a smaller dictionary?


def _site_row(site: _Site, level: int, overall: Mapping[str, float | None]) -> pl.DataFrame:
    own, kept = site.partition, site.partition.levels[level]
    row = {
        "rule": kept.rule, "chosen": level == own.chosen, "n_blocks": kept.n_blocks, "n_live": len(own.features),
        "n_dead": own.d_sae - len(own.features), **overall, "rank_correlation": site.likeness.rank_correlation, "n_pairs": site.likeness.n_pairs,
        "cosine_ami": site.likeness.agreement(kept.labels),
    }  # fmt: skip
    return pl.DataFrame([row], schema={name: SITES[name] for name in row})


@dataclass(frozen=True, eq=False)
class Likeness:
    """How much correlations follow the cosines of the decoder. tree: Ward's, of the rows of the features `clustered`; None without a decoder."""

    rank_correlation: float | None
    n_pairs: int
    clustered: IntArray
    tree: FloatArray | None

    def agreement(self, labels: IntArray) -> float | None:
        """Adjusted mutual information of a partition with the tree's, cut into as many blocks; null where either says nothing."""
        own = labels[self.clustered]
        n_blocks = len(np.unique(own))
        if self.tree is None or n_blocks < 2 or n_blocks == len(own):
            return None
        from sklearn.metrics import adjusted_mutual_info_score  # type: ignore[import-untyped]  # slow to import

        return float(adjusted_mutual_info_score(own, fcluster(self.tree, n_blocks, criterion="maxclust")))


def likeness(correlations: FloatArray, directions: FloatArray | None, options: DescribeOptions) -> Likeness:
    """Spearman's correlation of correlation and cosine over pairs of features, and Ward's tree of the decoder's rows."""
    n = len(correlations)
    if directions is None or n < 3 or not _overlap(directions):
        return Likeness(None, 0, np.arange(n), None)
    random = np.random.default_rng(options.seed)
    i, j = _pairs(n, options.n_pairs, random)
    cosine = _rowwise(directions, i, j) if len(i) < n * (n - 1) // 2 else (directions @ directions.T)[i, j]
    rank = float(stats.spearmanr(correlations[i, j], cosine).statistic)
    chosen = np.arange(n) if n <= options.n_clustered else np.sort(random.choice(n, options.n_clustered, replace=False))
    # on the unit sphere squared distance is 2 − 2 cos
    return Likeness(rank if np.isfinite(rank) else None, len(i), chosen, linkage(directions[chosen], "ward"))


def _pairs(n: int, n_pairs: int, random: np.random.Generator) -> tuple[IntArray, IntArray]:
    """All pairs i < j of n, or where they are more so many drawn with replacement."""
    if n * (n - 1) // 2 <= n_pairs:
        i, j = np.triu_indices(n, 1)
        return i.astype(np.int64), j.astype(np.int64)
    i = random.integers(n, size=n_pairs)
    j = (i + random.integers(1, n, size=n_pairs)) % n
    return i, j


def _rowwise(directions: FloatArray, i: IntArray, j: IntArray, at_once: int = 50_000) -> FloatArray:
    """Cosines of pairs of rows, (n_pairs,), a bounded number at a time."""
    parts = [slice(start, start + at_once) for start in range(0, len(i), at_once)]
    return np.concatenate([np.einsum("ij,ij->i", directions[i[part]], directions[j[part]]) for part in parts])


# 6. Labels


def automatic_labels(
    blocks: pl.DataFrame, exemplars: pl.DataFrame, contexts: pl.DataFrame, feature_labels: pl.DataFrame | None = None
) -> pl.DataFrame:
    """`blocks` with `automatic_label`: what a block is for, and what it reads.

    First the task of greatest share with that share, and what sets it apart where that is another task; then the names of its exemplary features,
    or without names the tokens of its strongest contexts, most telling first. A block without any is called by its number.
    """
    keys = ["site", "level", "block"]
    tokens = (
        contexts.filter(pl.col("token").is_not_null())
        .with_columns(shown=_shown(pl.col("token")), size=pl.col("value").abs())
        .group_by(*keys, "shown").agg(pl.col("size").sum()).sort([*keys, "size", "shown"], descending=[False] * 3 + [True, False])
        .group_by(keys, maintain_order=True).agg(pl.col("shown").head(3).str.join(SEPARATOR).alias("tokens"))
    )  # fmt: skip
    found = blocks.drop("automatic_label").join(tokens, on=keys, how="left", maintain_order="left")
    if feature_labels is not None:
        known = feature_labels.select("site", pl.col("feature").cast(pl.Int64), pl.col("label").alias("name")).drop_nulls("name")
        names = exemplars.join(known, on=["site", "feature"], maintain_order="left").filter(pl.col("rank") < 2)
        named = names.group_by(keys, maintain_order=True).agg(pl.col("name").unique(maintain_order=True).str.join("; ").alias("names"))
        found = found.join(named, on=keys, how="left", maintain_order="left")
    else:
        found = found.with_columns(names=pl.lit(None, dtype=pl.String))
    percent = lambda share: (100 * pl.col(share)).round().cast(pl.Int64).cast(pl.String) + " %"
    apart = pl.concat_str(pl.lit(", most apart "), pl.col("distinctive_task"), pl.lit(" ×"), pl.col("distinctive_lift").round(1).cast(pl.String))
    purpose = pl.col("task") + pl.lit(" ") + percent("task_share")
    sets_apart = (pl.col("distinctive_task") != pl.col("task")) & (pl.col("distinctive_lift") >= APART)
    purpose = purpose + pl.when(sets_apart).then(apart).otherwise(pl.lit(""))
    reads = pl.coalesce("names", "tokens")
    label = (
        pl.when(purpose.is_not_null() & reads.is_not_null()).then(pl.concat_str(purpose, pl.lit(": "), reads))
        .otherwise(pl.coalesce(purpose, reads, pl.lit("block ") + pl.col("block").cast(pl.String)))
    )  # fmt: skip
    return _typed(found.with_columns(automatic_label=label), BLOCKS)


def _shown(token: pl.Expr) -> pl.Expr:
    """A token without the blanks around it, line breaks made visible."""
    return token.str.strip_chars(" ").replace({"": "␣"}).str.replace_all("\n", "⏎", literal=True).str.replace_all("\t", "⇥", literal=True)
