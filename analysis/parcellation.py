"""Parcellations: one partition of every site's features into blocks (regions of interest), with the path that it was chosen from.

1. A method gives a `PartitionPath` of a site's live features: partitions from fine to coarse, each a coarsening of the one before.
2. A rule chooses a level of it (`levels`); the whole path stays and is shown.
3. A `SitePartition` is what is kept: the live features, a few named levels, the chosen one among them, and the path's scores.
4. A `Parcellation` has one for every site, all by one method from one run of samples. Dead features are a block of their own, and so is
   each site's error node: together they are `Units`, which are attributed to and cut as wholes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from ..errors import UserError
from ..model.dictionaries import Dictionary
from ..model.sites import OUTPUT, SiteGraph
from ..model.units import Units, whole_site

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

PATH_SCORES: Mapping[str, pl.DataType] = MappingProxyType(
    {
        "level": pl.Int64(), "n_blocks": pl.Int64(), "largest": pl.Int64(), "description_length": pl.Float64(), "held_out": pl.Float64(),
        "stability": pl.Float64(), "stability_low": pl.Float64(), "stability_high": pl.Float64(),
    }
)  # fmt: skip
"""One row per level of a path, fine to coarse. description_length: nats, lower is better, null for methods without one. held_out: nats per pair of
features, of the other half's correlations under the blocks' means and variances; greater is better. stability: AMI between halves. Null where not
measured."""


class NotAPartition(UserError):
    """Labels that are no partition of the features, or a level that a path does not have."""


@dataclass(frozen=True, eq=False)
class PartitionPath:
    """Partitions of n things, fine to coarse. labels: (n_levels, n), each level's blocks 0 … B − 1, every level a coarsening of the one before.

    A flat method has one level. description_length: (n_levels,) in nats, None where the method has none. info: what is to be known of the
    fit, JSON-able: seconds, seed, version, whether it was cut off by its time limit, what stood in for what.
    """

    method: str
    labels: IntArray
    description_length: FloatArray | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or not len(self.labels):
            raise NotAPartition(f"a path's labels have shape {self.labels.shape}: levels × things are needed, at least one level")
        for fine, coarse in zip(self.labels[:-1], self.labels[1:], strict=True):
            pairs = np.unique(np.stack([fine, coarse]), axis=1)
            if pairs.shape[1] != len(np.unique(fine)):
                raise NotAPartition("a level of the path is no coarsening of the one before")

    def __len__(self) -> int:
        """How many levels there are."""
        return len(self.labels)

    @property
    def n_blocks(self) -> IntArray:
        """Blocks of each level, (n_levels,)."""
        return self.labels.max(axis=1) + 1

    def with_blocks(self, n: int) -> int:
        """The level whose number of blocks is nearest to `n`, the coarser of two equally near."""
        distance = np.abs(self.n_blocks - n)
        return int(np.flatnonzero(distance == distance.min())[-1])


@dataclass(frozen=True, eq=False)
class Level:
    """One level that is kept. rule: what chose it ("held-out likelihood", "stability between halves", "more blocks than heads", …).

    labels: (n,) blocks 0 … B − 1 of the site's live features, larger blocks first.
    """

    rule: str
    labels: IntArray

    @property
    def n_blocks(self) -> int:
        return int(self.labels.max(initial=-1)) + 1


@dataclass(frozen=True, eq=False)
class SitePartition:
    """The partition of one site. features: (n,) live features, ascending. levels: fine to coarse, nested. chosen: the level that ROIs are by default.

    d_sae: how many features the dictionary has, the dead ones among them. scores: of the whole path, as `PATH_SCORES`.
    notes: what is to be known, JSON-able: the null's verdict, times, fallbacks.
    """

    site: str
    dictionary: str
    d_sae: int
    features: IntArray
    levels: tuple[Level, ...]
    chosen: int
    scores: pl.DataFrame
    notes: Mapping[str, Any] = field(default_factory=dict)

    def labels_of(self, level: int | None = None) -> IntArray:
        """Blocks of all features at a level (the chosen one unless given), (d_sae,): 0 … B − 1, dead features −1."""
        at = self.chosen if level is None else level
        if not 0 <= at < len(self.levels):
            raise NotAPartition(f"{self.site} has levels 0 to {len(self.levels) - 1}, not {at}")
        found = np.full(self.d_sae, -1, dtype=np.int64)
        found[self.features] = self.levels[at].labels
        return found


@dataclass(frozen=True, eq=False)
class Parcellation:
    """The partitions of several sites, all by one method. key: a content hash of samples, method and settings. samples: the run of samples.

    basis: activation or attribution. settings: JSON-able, with the seed.
    """

    key: str
    samples: str
    model: str
    method: str
    basis: str
    sites: Mapping[str, SitePartition]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def units(self, graph: SiteGraph, dictionaries: Mapping[Any, Dictionary], level: int | None = None) -> Units:
        """Its blocks as units of a site graph: per site the blocks, the dead features, the error node.

        Sites that have no partition are one unit for all features and one for the error node. Raises `NotAPartition` where a partition is of
        another dictionary.
        """
        for site, dictionary in dictionaries.items():
            own = self.sites.get(site.name)
            if own is not None and (own.dictionary, own.d_sae) != (dictionary.id, dictionary.d_sae):
                raise NotAPartition(f"the partition of {site.name} is of dictionary {own.dictionary}, not {dictionary.id}: find regions anew for it")
        return units_of(graph, dictionaries, {name: own.labels_of(level) for name, own in self.sites.items()})


def units_of(graph: SiteGraph, dictionaries: Mapping[Any, Dictionary], blocks: Mapping[str, IntArray]) -> Units:
    """Units of a site graph from blocks of features by site, (d_sae,) with −1 for dead ones; sites without blocks are one unit for all features.

    Each site's dead features are one unit, and its error node is one.
    """
    labels, names = {}, {}
    for site in graph.sites:
        if site != OUTPUT:
            own = blocks.get(site.name)
            labels[site], names[site] = whole_site(dictionaries[site], site) if own is None else unit_labels(site.name, own)
    return Units.from_labels(graph, labels, names)


def unit_labels(site: str, blocks: IntArray) -> tuple[torch.Tensor, list[str]]:
    """Labels (d_sae + 1,) and names of a site's units from its features' blocks (d_sae,), −1 for dead ones; the error node is the last unit."""
    n = int(blocks.max(initial=-1)) + 1
    named = [f"{site}/block {b}" for b in range(n)]
    dead = blocks < 0
    labels = np.where(dead, n, blocks)
    if dead.any():
        named.append(f"{site}/dead")
    return torch.tensor([*labels.tolist(), len(named)]), [*named, f"{site}/error"]


def by_size(labels: Sequence[int] | IntArray) -> IntArray:
    """Labels renumbered 0 … B − 1, larger blocks first, ties by their first member."""
    _, first, inverse, counts = np.unique(np.asarray(labels), return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[inverse].astype(np.int64)
