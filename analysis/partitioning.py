"""Methods of partition: a site's features into blocks by the correlations between them, all behind one function.

1. `partition` checks the correlations and the options, and runs one method of `METHODS`.
2. What comes back is a path from fine to coarse. Ward, Louvain and the block models give one; the other methods give one level.
3. `ami` and `variation_of_information` compare two partitions of the same features.

What becomes of negative correlations: the dense and the weighted block model, Ward (rows of C as vectors) and HDBSCAN (1 − r) keep their
sign; the spectral embeddings and the nearest-neighbour graphs of Leiden, Louvain and the nested block model take the positive ones alone.

Who is told the number of blocks: `n_blocks` decides for SPECTRAL (else the eigengap does), is one of WARD's levels, is the number of dimensions
of HDBSCAN's embedding (else it runs on 1 − r), the number of RANDOM's blocks, and where the dense block model starts from at least. The others
find it themselves.
"""

import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp  # type: ignore[import-untyped]
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components, laplacian  # type: ignore[import-untyped]
from scipy.sparse.linalg import eigsh  # type: ignore[import-untyped]
from scipy.spatial.distance import squareform  # type: ignore[import-untyped]

from ..errors import UserError
from .block_model import default_start, dense_block_model
from .correlations import fisher
from .graph_tool import GraphToolFailed, GraphToolMissing, GraphToolTimeout, NestedKind, nearest_edges, nested_block_model, usual_neighbours
from .parcellation import FloatArray, IntArray, PartitionPath, by_size

if TYPE_CHECKING:
    from igraph import Graph

HIERARCHY_FINEST = 4.0
"""Ward's path begins at this many times √n blocks (or at `n_blocks`, if that is more): half as many features in a block again are no region."""

SMALLEST = 4
"""Fewer features than this are one block (or single ones, where so many blocks are asked for): no method has anything to find there."""

HIERARCHY_STEP = 1.05
"""Ward's levels: every number of blocks up to about 30, from there each about this many times the one before."""


class PartitionMethod(StrEnum):
    """How features are put into blocks."""

    DENSE_SBM = "dense-sbm"
    """Our Gaussian block model of all correlations (`block_model`)."""
    NESTED_SBM = "nested-sbm"
    """graph-tool's nested, degree-corrected block model of the nearest-neighbour graph; the dense one where graph-tool is missing or hangs."""
    WEIGHTED_SBM = "weighted-sbm"
    """graph-tool's nested block model of the complete weighted graph, for few features; the dense one as above."""
    WARD = "ward"
    """Ward's linkage on the rows of the correlation matrix."""
    SPECTRAL = "spectral"
    """Spectral clustering of the positive correlations, labels by pivoted QR."""
    LEIDEN = "leiden"
    """Leiden on the nearest-neighbour graph, by modularity or the constant Potts model."""
    LOUVAIN = "louvain"
    """Louvain on the nearest-neighbour graph, by modularity."""
    HDBSCAN = "hdbscan"
    """Density clusters; what belongs to none is a block."""
    RANDOM = "random"
    """Blocks by chance, of the sizes of given ones: the control."""
    HEADS = "heads"
    """Given labels, such as the attention head that each feature belongs to."""


FINDERS = tuple(method for method in PartitionMethod if method not in (PartitionMethod.RANDOM, PartitionMethod.HEADS))
"""The methods that find blocks in correlations alone."""


class Objective(StrEnum):
    """What Leiden maximises."""

    MODULARITY = "modularity"
    """With `resolution` γ times the expected weights; 1 is Newman's."""
    CPM = "cpm"
    """Constant Potts model: a block's mean weight per pair of features must exceed `resolution`."""


class NotACorrelation(UserError):
    """A matrix that no method can read as correlations."""


class BadPartitionOption(UserError):
    """An option that is out of range, missing, or of another size than the features."""


class NoCommunitiesExtra(UserError):
    """Leiden or Louvain without igraph and leidenalg."""


@dataclass(frozen=True, eq=False)
class PartitionOptions:
    """What the methods are told; each reads what concerns it.

    n_blocks: see the module. neighbours: of each feature in the nearest-neighbour graph, `usual_neighbours` unless given. resolution, objective:
    Leiden's; Louvain reads `resolution` too. min_size: HDBSCAN's smallest cluster. seconds, interpreter: graph-tool's time limit and Python.
    device: the dense model's. labels: (n,) whose sizes RANDOM keeps, and HEADS itself.
    """

    seed: int = 0
    n_blocks: int | None = None
    neighbours: int | None = None
    resolution: float = 1.0
    objective: Objective = Objective.MODULARITY
    min_size: int = 5
    seconds: float = 120.0
    interpreter: str | None = None
    device: str = "cpu"
    labels: IntArray | None = field(default=None, repr=False)

    def check(self, n: int) -> None:
        """Raise `BadPartitionOption` for what n features cannot be partitioned by."""
        if self.n_blocks is not None and not 1 <= self.n_blocks <= n:
            raise BadPartitionOption(f"{self.n_blocks} blocks of {n} features: give 1 to {n}")
        positive = {"neighbours": self.neighbours, "seconds": self.seconds, "resolution": self.resolution}
        if bad := next((name for name, value in positive.items() if value is not None and not value > 0), None):
            raise BadPartitionOption(f"{bad} {positive[bad]}: give more than 0")
        if self.min_size < 2:
            raise BadPartitionOption(f"a cluster of at least {self.min_size} features: give 2 or more")
        if self.labels is not None and self.labels.shape != (n,):
            raise BadPartitionOption(f"labels of shape {self.labels.shape} for {n} features: give one for each")


def partition(method: PartitionMethod, correlation: FloatArray, options: PartitionOptions | None = None) -> PartitionPath:
    """Partition n features by their correlations (n, n). The same seed gives the same path.

    info tells seconds, seed, and what the method adds: `instead_of` and `reason` where the dense block model stood in for graph-tool's, which
    the caller must say. Raises `NotACorrelation`, `BadPartitionOption`, `NoCommunitiesExtra`.
    """
    options = options or PartitionOptions()
    checked = _checked(correlation)
    options.check(len(checked))
    started = time.perf_counter()
    small = len(checked) < SMALLEST and method not in (PartitionMethod.RANDOM, PartitionMethod.HEADS)
    path = _too_few(method, checked, options) if small else METHODS[method](checked, options)
    return replace(path, info={**path.info, "seed": options.seed, "seconds": time.perf_counter() - started})


def from_weights(method: PartitionMethod, options: PartitionOptions) -> Callable[[FloatArray], PartitionPath]:
    """A method as a function of Fisher weights (n, n), as `levels` runs it again on halves of the samples; `fisher` is undone."""

    def refit(weights: FloatArray) -> PartitionPath:
        correlation = np.tanh(weights / 2)
        np.fill_diagonal(correlation, 1.0)
        return partition(method, correlation, options)

    return refit


def _checked(correlation: FloatArray) -> FloatArray:
    """The matrix in float64. Raises `NotACorrelation`."""
    found = np.asarray(correlation, dtype=np.float64)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or not len(found):
        raise NotACorrelation(f"correlations of shape {found.shape}: a square matrix of at least one feature is needed")
    if not np.isfinite(found).all():
        raise NotACorrelation(f"{int((~np.isfinite(found)).sum())} correlations are not finite: leave out features that are constant")
    if np.abs(found).max() > 1 + 1e-6 or not np.allclose(found, found.T, atol=1e-6):
        raise NotACorrelation("correlations must be symmetric and lie in −1 to 1")
    return found


def _too_few(method: PartitionMethod, correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """Fewer than `SMALLEST` features: the first ones single and the rest a block, where a number of blocks is asked for; else one block."""
    n = len(correlation)
    labels = np.minimum(np.arange(n), (options.n_blocks or 1) - 1)
    return PartitionPath(method.value, by_size(labels)[None], info={"too_few": n})


# --- block models -----------------------------------------------------------------------------------------------------


def _dense(correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """The dense Gaussian block model of Fisher's z of all correlations. It starts from at least `n_blocks` blocks: its path then passes there."""
    n_start = max(options.n_blocks or 1, default_start(len(correlation)))
    return dense_block_model(fisher(correlation), seed=options.seed, device=options.device, start_blocks=n_start)


def _nested(correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """graph-tool's nested block model of the nearest-neighbour graph."""
    return _graph_tool(NestedKind.NEAREST, PartitionMethod.NESTED_SBM, correlation, options)


def _weighted(correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """graph-tool's nested block model of the complete weighted graph."""
    return _graph_tool(NestedKind.COMPLETE, PartitionMethod.WEIGHTED_SBM, correlation, options)


def _graph_tool(kind: NestedKind, method: PartitionMethod, correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """graph-tool's model, or the dense one where graph-tool is missing, dies, or gives nothing in time: `info` says so."""
    try:
        return nested_block_model(
            correlation, kind=kind, neighbours=options.neighbours, seed=options.seed, seconds=options.seconds, interpreter=options.interpreter
        )
    except (GraphToolMissing, GraphToolTimeout, GraphToolFailed) as reason:
        path = _dense(correlation, options)
        return replace(path, info={**path.info, "instead_of": method.value, "reason": str(reason)})


# --- hierarchies ------------------------------------------------------------------------------------------------------


def _ward(correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """Ward's linkage on the rows of C: features that correlate alike with all features join first."""
    merges = linkage(_row_distances(correlation), method="ward")
    sizes = hierarchy_sizes(len(correlation), options.n_blocks)
    labels = np.stack([by_size(cut(merges, n_blocks)) for n_blocks in sizes])
    return PartitionPath(PartitionMethod.WARD.value, labels)


def _row_distances(rows: FloatArray) -> FloatArray:
    """Euclidean distances between rows, condensed: by one matrix product, |a − b|² = |a|² + |b|² − 2 a·b."""
    squared = rows @ rows.T  # (n, n)
    norms = squared.diagonal().copy()
    squared *= -2
    squared += norms[:, None]
    squared += norms
    np.fill_diagonal(squared, 0)
    return squareform(np.sqrt(np.maximum(squared, 0, out=squared), out=squared), checks=False)


def hierarchy_sizes(n: int, n_blocks: int | None = None) -> list[int]:
    """The numbers of blocks that a hierarchy of n features is cut at, fine to coarse, down to 1; `n_blocks` among them."""
    finest = min(n, max(round(HIERARCHY_FINEST * n**0.5), n_blocks or 1))
    found, size = {finest, n_blocks or 1}, 1
    while size < finest:
        found.add(size)
        size = max(size + 1, round(size * HIERARCHY_STEP))
    return sorted(found, reverse=True)


def cut(merges: FloatArray, n_blocks: int) -> IntArray:
    """The labels (n,) of exactly so many blocks from scipy's merges (n − 1, 4): the connected components after the first n − n_blocks of them."""
    n = len(merges) + 1
    done = merges[: n - n_blocks, :2].astype(np.int64)
    made = np.repeat(np.arange(n, 2 * n - n_blocks), 2)
    joined = sp.coo_array((np.ones(len(made), dtype=bool), (done.ravel(), made)), shape=(2 * n - 1, 2 * n - 1))
    return np.unique(connected_components(joined, directed=False)[1][:n], return_inverse=True)[1]


# --- spectral ---------------------------------------------------------------------------------------------------------


def _spectral(correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """Spectral clustering of the positive correlations; the number of blocks by the eigengap where none is given."""
    from sklearn.cluster import SpectralClustering  # type: ignore[import-untyped]

    affinity = _positive(correlation)
    n_blocks = options.n_blocks or eigengap(affinity, options.seed)
    model = SpectralClustering(n_blocks, affinity="precomputed", assign_labels="cluster_qr", random_state=options.seed)
    with warnings.catch_warnings():
        # A feature without any positive correlation is a component of its own, which is what it should be.
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        labels = model.fit_predict(affinity) if 1 < n_blocks < len(affinity) else np.arange(len(affinity)) % n_blocks
    return PartitionPath(PartitionMethod.SPECTRAL.value, by_size(labels)[None], info={"n_blocks_by": "given" if options.n_blocks else "eigengap"})


def eigengap(affinity: FloatArray, seed: int) -> int:
    """The number of blocks k ≥ 2 with the greatest gap between the k-th and the next eigenvalue of D^−½ A D^−½, up to 4 √n.

    In a hierarchy this is the level whose blocks are farthest apart, mostly a coarse one.
    """
    values, _ = _leading(affinity, min(len(affinity) - 1, round(HIERARCHY_FINEST * len(affinity) ** 0.5)), seed)
    return int(np.argmax(values[1:-1] - values[2:])) + 2


def _leading(affinity: FloatArray, k: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """The k greatest eigenvalues, descending, and vectors (n, k) of the normalised affinity."""
    normalised = np.eye(len(affinity)) - laplacian(affinity, normed=True)
    start = np.random.default_rng(seed).standard_normal(len(affinity))
    values, vectors = eigsh(normalised, k, which="LA", v0=start)
    return values[::-1], vectors[:, ::-1]


def _hdbscan(correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """HDBSCAN on 1 − r, or on the spectral embedding in `n_blocks` dimensions where that is given; points of no cluster are one block, the last."""
    from sklearn.cluster import HDBSCAN

    common = {"min_cluster_size": min(options.min_size, len(correlation) - 1), "copy": True}
    if options.n_blocks is None:
        found = HDBSCAN(metric="precomputed", **common).fit_predict(np.maximum(1 - correlation, 0))
    else:
        _, vectors = _leading(_positive(correlation), min(options.n_blocks, len(correlation) - 1), options.seed)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        found = HDBSCAN(**common).fit_predict(vectors / np.where(length > 0, length, 1))
    labels, rest = np.full(len(found), 0, dtype=np.int64), found < 0
    if not rest.all():
        labels[~rest] = by_size(found[~rest])
        labels[rest] = labels[~rest].max() + 1
    on = "1 − r" if options.n_blocks is None else f"spectral embedding, {options.n_blocks} dimensions"
    return PartitionPath(PartitionMethod.HDBSCAN.value, labels[None], info={"on": on, "unclustered": int(rest.sum())})


def _positive(correlation: FloatArray) -> FloatArray:
    """Positive correlations, the diagonal 0."""
    found = np.maximum(correlation, 0)
    np.fill_diagonal(found, 0)
    return found


# --- communities of the nearest-neighbour graph -----------------------------------------------------------------------


def _neighbour_graph(correlation: FloatArray, options: PartitionOptions) -> tuple["Graph", int]:
    """The nearest-neighbour graph, weights the correlations, and of how many neighbours it is.

    Raises `NoCommunitiesExtra`, and `NotAGraph` where no correlation is positive.
    """
    try:
        import igraph
    except ImportError:
        raise NoCommunitiesExtra('this method needs igraph and leidenalg: pip install "featlas[communities]"') from None
    k = usual_neighbours(len(correlation)) if options.neighbours is None else options.neighbours
    edges = nearest_edges(correlation, k)
    return igraph.Graph(n=len(correlation), edges=edges, edge_attrs={"weight": correlation[edges[:, 0], edges[:, 1]]}), k


def _leiden(correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """Leiden until nothing improves. A feature without positive correlations is a block of its own."""
    graph, neighbours = _neighbour_graph(correlation, options)
    try:
        import leidenalg  # type: ignore[import-untyped]
    except ImportError:
        raise NoCommunitiesExtra('this method needs leidenalg: pip install "featlas[communities]"') from None
    kind = leidenalg.CPMVertexPartition if options.objective is Objective.CPM else leidenalg.RBConfigurationVertexPartition
    found = leidenalg.find_partition(graph, kind, weights="weight", n_iterations=-1, seed=options.seed, resolution_parameter=options.resolution)
    info = {"objective": options.objective.value, "resolution": options.resolution, "quality": found.quality(), "neighbours": neighbours}
    return PartitionPath(PartitionMethod.LEIDEN.value, by_size(found.membership)[None], info=info)


def _louvain(correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """Louvain, a level for every aggregation. A feature without positive correlations is a block of its own."""
    graph, neighbours = _neighbour_graph(correlation, options)
    import igraph

    # igraph draws from one generator of the process: the seed is set for this call, Python's own put back after it.
    igraph.set_random_number_generator(random.Random(options.seed))
    try:
        levels = graph.community_multilevel(weights="weight", return_levels=True, resolution=options.resolution)
    finally:
        igraph.set_random_number_generator(random)
    labels = np.stack([by_size(level.membership) for level in levels]) if levels else np.arange(len(correlation))[None]
    modularity = graph.modularity(labels[-1].tolist(), weights="weight", resolution=options.resolution)
    info = {"objective": Objective.MODULARITY.value, "resolution": options.resolution, "quality": modularity, "neighbours": neighbours}
    return PartitionPath(PartitionMethod.LOUVAIN.value, labels, info=info)


# --- controls ---------------------------------------------------------------------------------------------------------


def random_blocks(labels: Sequence[int] | IntArray, seed: int) -> IntArray:
    """The same labels dealt at random: as many blocks, of the same sizes, (n,)."""
    return np.random.default_rng(seed).permutation(np.asarray(labels, dtype=np.int64))


def _random(correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """Random blocks of the sizes of `labels`, or `n_blocks` of equal size."""
    if options.labels is not None:
        like = options.labels
    elif options.n_blocks is not None:
        like = np.arange(len(correlation)) % options.n_blocks
    else:
        raise BadPartitionOption("random blocks need labels whose sizes they keep, or a number of blocks of equal size")
    return PartitionPath(PartitionMethod.RANDOM.value, by_size(random_blocks(like, options.seed))[None])


def _heads(correlation: FloatArray, options: PartitionOptions) -> PartitionPath:
    """The given labels, renumbered in their order without gaps; info["labels"] tells what each block was called."""
    if options.labels is None:
        raise BadPartitionOption("heads need labels: which head each feature belongs to")
    names, labels = np.unique(options.labels, return_inverse=True)
    return PartitionPath(PartitionMethod.HEADS.value, labels.astype(np.int64)[None], info={"labels": names.tolist()})


Method = Callable[[FloatArray, PartitionOptions], PartitionPath]

METHODS: Mapping[PartitionMethod, Method] = MappingProxyType(
    {
        PartitionMethod.DENSE_SBM: _dense,
        PartitionMethod.NESTED_SBM: _nested,
        PartitionMethod.WEIGHTED_SBM: _weighted,
        PartitionMethod.WARD: _ward,
        PartitionMethod.SPECTRAL: _spectral,
        PartitionMethod.LEIDEN: _leiden,
        PartitionMethod.LOUVAIN: _louvain,
        PartitionMethod.HDBSCAN: _hdbscan,
        PartitionMethod.RANDOM: _random,
        PartitionMethod.HEADS: _heads,
    }
)


# --- two partitions of the same features ------------------------------------------------------------------------------


def ami(a: Sequence[int] | IntArray, b: Sequence[int] | IntArray) -> float:
    """Adjusted mutual information (Vinh et al. 2010), arithmetic mean of the entropies: 1 for equal partitions, about 0 for independent ones."""
    from sklearn.metrics import adjusted_mutual_info_score  # type: ignore[import-untyped]

    first, second = _paired(a, b)
    return float(adjusted_mutual_info_score(first, second))


def variation_of_information(a: Sequence[int] | IntArray, b: Sequence[int] | IntArray) -> float:
    """H(a | b) + H(b | a) in nats (Meilă 2003): a metric, 0 for equal partitions, at most ln n."""
    counts = contingency(a, b)
    p = counts / counts.sum()
    return max(0.0, 2 * _entropy(p.ravel()) - _entropy(p.sum(axis=0)) - _entropy(p.sum(axis=1)))


def contingency(a: Sequence[int] | IntArray, b: Sequence[int] | IntArray) -> IntArray:
    """How many features two blocks share, (labels of a, labels of b), both ascending."""
    first, second = (np.unique(labels, return_inverse=True)[1] for labels in _paired(a, b))
    counts = np.zeros((first.max(initial=-1) + 1, second.max(initial=-1) + 1), dtype=np.int64)
    np.add.at(counts, (first, second), 1)
    return counts


def _entropy(p: NDArray[np.float64]) -> float:
    """−Σ p ln p."""
    some = p[p > 0]
    return float(-(some * np.log(some)).sum())


def _paired(a: Sequence[int] | IntArray, b: Sequence[int] | IntArray) -> tuple[IntArray, IntArray]:
    """Both as arrays of one length. Raises `BadPartitionOption`."""
    first, second = np.asarray(a), np.asarray(b)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise BadPartitionOption(f"labels of shapes {first.shape} and {second.shape}: two partitions of the same features are needed")
    return first, second
