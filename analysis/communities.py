"""Communities: groups of nodes, across sites, that influence each other more than their strengths let expect.

1. `read_graph`: the effective graph of a run, or of a stored circuit: the strengths of its edges; the output and error nodes left out unless
   told otherwise, since one error node a site joins nearly all others. Nodes without an edge left are no part of it.
2. `find_communities`: Leiden on directed modularity, Infomap, Louvain, spectral clustering, or the nested block model of graph-tool.
3. `directed_modularity`: how good a division is, whichever method made it.
4. `stability`: how much runs with other seeds, and at neighbouring resolutions, agree (AMI).

Directed modularity (Leicht and Newman 2008) of labels c at resolution γ: Q = Σ_ij [w_ij / m − γ s_i^out s_j^in / m²] δ(c_i, c_j), with m the sum of
all weights. Edges lead from earlier sites to later ones only, which the expectation s_i^out s_j^in does not know: `community_nulls` compares with
rewired graphs, which do.
"""

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
import scipy.sparse as sp  # type: ignore[import-untyped]
from numpy.typing import NDArray
from sklearn.cluster import KMeans  # type: ignore[import-untyped]

from ..errors import UserError
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow, model_features
from .circuits import By, Candidates, Selection, cut_effects, read_circuit, root_sites, run_roots, select, strengths
from .parcellation import PartitionPath, by_size
from .partitioning import ami

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

LARGEST_K = 40
"""Communities at most that an eigengap is looked for up to."""


class NoGraph(UserError):
    """Nothing is left of a run's graph."""


class MissingPackage(UserError):
    """A method's package is not installed."""


class Method(StrEnum):
    """How communities are found."""

    LEIDEN = "leiden"
    """Directed modularity, by the Leiden algorithm (Traag et al. 2019)."""
    INFOMAP = "infomap"
    """The map equation of a directed random walk (Rosvall and Bergstrom 2008), two levels."""
    LOUVAIN = "louvain"
    """Modularity by the Louvain algorithm (Blondel et al. 2008); directions are ignored."""
    SPECTRAL = "spectral"
    """k-means on the leading eigenvectors of the normalised adjacency matrix; directions are ignored."""
    NESTED_SBM = "nested-sbm"
    """The nested, degree-corrected stochastic block model of the directed graph (graph-tool). Its blocks may be groups of like senders or readers."""

    @property
    def has_resolution(self) -> bool:
        """Whether it takes a resolution; the others take a number of communities, or the finest level that their rule gives."""
        return self in (Method.LEIDEN, Method.INFOMAP, Method.LOUVAIN)


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """Which part of a run's edges is the graph. errors, output: whether error nodes, and the output, are in it. task: of one task's sequences."""

    by: By = By.ABS_WEIGHT
    threshold: float = 0.0
    top_edges: int | None = None
    task: str | None = None
    errors: bool = False
    output: bool = False

    @property
    def description(self) -> str:
        """In words, for tables and settings."""
        cut = "all edges" if not self.threshold and self.top_edges is None else "the strongest edges"
        cut += f" >= {self.threshold:g}" if self.threshold else ""
        cut += f", {self.top_edges} of them" if self.top_edges is not None else ""
        task = "" if self.task is None else f" of task {self.task}"
        return f"{cut} by {self.by.value}{task}, error nodes {'kept' if self.errors else 'left out'}, output {'kept' if self.output else 'left out'}"


@dataclass(frozen=True, eq=False)
class EffectiveGraph:
    """A directed graph of nodes of several sites, every node with an edge.

    nodes: `key`, `site`, `layer`, `kind`, `index`, `order` (the site's place), sorted by site, then key. source, target: (m,) rows of nodes, each
    pair once. weight: (m,) > 0, metric units. left_out: how many nodes the run's graph has beside these.
    """

    nodes: pl.DataFrame
    source: IntArray
    target: IntArray
    weight: FloatArray
    description: str = ""
    left_out: int = 0

    @property
    def n(self) -> int:
        """Nodes."""
        return self.nodes.height

    @property
    def m(self) -> int:
        """Edges."""
        return len(self.source)

    @cached_property
    def site(self) -> IntArray:
        """Each node's site by its place in the order of sites, (n,)."""
        return self.nodes["order"].to_numpy().astype(np.int64)

    @cached_property
    def pair(self) -> IntArray:
        """The pair of sites of each edge, one number a pair, (m,)."""
        order = self.site
        return order[self.source] * (int(order.max(initial=0)) + 1) + order[self.target]

    @cached_property
    def strength(self) -> FloatArray:
        """The sum of a node's edges' weights, incoming and outgoing, (n,)."""
        sent, received = (np.bincount(end, self.weight, self.n) for end in (self.source, self.target))
        return np.asarray(sent + received, dtype=np.float64)

    def adjacency(self) -> sp.csr_matrix:
        """(n, n), row: source."""
        return sp.csr_matrix((self.weight, (self.source, self.target)), shape=(self.n, self.n))


@dataclass(frozen=True, slots=True)
class CommunityOptions:
    """How communities are found.

    resolution: of modularity; greater gives more communities (Infomap: 1 / Markov time). n_communities: for spectral (by the greatest eigengap up
    to `LARGEST_K` unless given) and for the nested block model, whose level with the nearest number is taken (its finest unless given).
    seconds, interpreter: the block model's hard limit and the Python that has graph-tool.
    """

    method: Method = Method.LEIDEN
    resolution: float = 1.0
    n_communities: int | None = None
    seed: int = 0
    seconds: float = 120.0
    interpreter: str | None = None

    def check(self) -> None:
        """Raise a `UserError` for a setting out of range."""
        if not 0 < self.resolution < float("inf"):
            raise UserError(f"--resolution {self.resolution} is out of range: give a number above 0, such as 0.5, 1 or 2")
        if self.n_communities is not None and self.n_communities < 2:
            raise UserError(f"--communities {self.n_communities} is too small: give at least 2")
        if self.n_communities is not None and self.method.has_resolution:
            raise UserError(f"--communities is for spectral and nested-sbm: {self.method.value} takes --resolution")
        if self.resolution != 1 and not self.method.has_resolution:
            raise UserError(f"--resolution is for leiden, infomap and louvain: {self.method.value} takes --communities")
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds {self.seconds} is no time limit: give a number above 0")


@dataclass(frozen=True, eq=False)
class Communities:
    """A division of a graph. labels: (n,) 0 … B − 1, larger communities first, ties by their first node.

    modularity: directed, at resolution 1, whichever method made the division. codelength: bits a step of the map equation, for Infomap alone.
    method: the one that made it; info: JSON-able, with what stood in for what and why.
    """

    labels: IntArray
    method: Method
    modularity: float
    codelength: float | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_communities(self) -> int:
        return int(self.labels.max(initial=-1)) + 1

    @cached_property
    def sizes(self) -> IntArray:
        """How many nodes each has, (B,)."""
        return np.bincount(self.labels)


# --- the graph --------------------------------------------------------------------------------------------------------


def read_graph(store: GraphStore, run: RunRow, options: GraphOptions, *, circuit: str | None = None) -> EffectiveGraph:
    """The graph of a run's edges, or of a stored circuit's (by the beginning of its key). Raises `NoGraph`, and what reading raises."""
    if circuit is not None:
        found = read_circuit(store, circuit)
        if found.selection.run != run.key:
            raise NoGraph(f"circuit {found.key} is of run {found.selection.run}, not {run.key}: name that run by --run, or leave --run out")
        edges, nodes = found.edges.group_by("source", "target").agg(pl.col("strength").sum()), found.nodes
        rows = edges.sort("source", "target").with_columns(pl.lit(-1).alias("src_pos"), pl.lit(-1).alias("dest_pos"), pl.lit(0.0).alias("weight"))
        candidates = Candidates.of(rows, nodes, sorted(set(nodes.filter(pl.col("role") == "input")["site"])))
        return graph_of(candidates, options, f"circuit {found.key} ({found.selection.description})")
    selection = Selection(run.key, threshold=options.threshold, by=options.by, top_edges=options.top_edges, task=options.task)
    rows = strengths(cut_effects(store, run, selection), selection)
    features, roots = model_features(store, run.model), run_roots(run)
    candidates = Candidates.of(select(rows, selection), features, root_sites(rows, features) if roots is None else roots)
    return graph_of(candidates, options, f"run {run.key}")


def graph_of(candidates: Candidates, options: GraphOptions, name: str = "") -> EffectiveGraph:
    """The graph of some edges, without the nodes that the options leave out and those that have no edge then. Raises `NoGraph`."""
    nodes = candidates.nodes
    allowed = np.ones(nodes.height, dtype=bool)
    if not options.output:
        allowed &= (nodes["kind"] != "output").to_numpy()
    if not options.errors:
        allowed &= (nodes["kind"] != "error").to_numpy()
    kept = allowed[candidates.source] & allowed[candidates.target] & (candidates.strength > 0)
    source, target = candidates.source[kept], candidates.target[kept]
    used = np.zeros(nodes.height, dtype=bool)
    used[source] = used[target] = True
    if not used.any():
        raise NoGraph(f"no edge is left of {name or 'the graph'} ({options.description}): lower --threshold, or keep more kinds of nodes")
    number = np.cumsum(used) - 1
    columns = ["key", "site", "layer", "kind", "index", "order"]
    return EffectiveGraph(
        nodes.filter(used).select(columns), number[source], number[target], candidates.strength[kept],
        f"{name}: {options.description}", int(nodes.height - used.sum()),
    )  # fmt: skip


# --- quality ----------------------------------------------------------------------------------------------------------


def directed_modularity(graph: EffectiveGraph, labels: IntArray, resolution: float = 1.0) -> float:
    """Q as this module's head defines it."""
    total = graph.weight.sum()
    n = int(labels.max()) + 1
    within = graph.weight[labels[graph.source] == labels[graph.target]].sum()
    out, into = (np.bincount(labels[end], graph.weight, n) for end in (graph.source, graph.target))
    return float(within / total - resolution * (out @ into) / total**2)


# --- methods ----------------------------------------------------------------------------------------------------------


def find_communities(graph: EffectiveGraph, options: CommunityOptions) -> Communities:
    """Divide a graph. The nested block model gives way to Leiden where graph-tool is missing or is not done in time: `info` says so."""
    options.check()
    labels, codelength, info = _METHODS[options.method](graph, options)
    labels = by_size(labels)
    made = Method(info.get("method", options.method))
    return Communities(labels, made, directed_modularity(graph, labels), codelength, {"seed": options.seed, **info})


Found = tuple[IntArray, float | None, dict[str, Any]]


def _missing(name: str, method: Method) -> MissingPackage:
    return MissingPackage(f'{method.value} needs the package {name}: pip install "featlas[communities]"')


def _leiden(graph: EffectiveGraph, options: CommunityOptions) -> Found:
    try:
        import igraph
        import leidenalg  # type: ignore[import-untyped]
    except ImportError as error:
        raise _missing(error.name or "leidenalg", Method.LEIDEN) from None
    made = igraph.Graph(n=graph.n, edges=np.column_stack([graph.source, graph.target]), directed=True)
    # the quality of this class on a directed graph is directed modularity at the resolution; further iterations gained 4e-6 of it
    found = leidenalg.find_partition(
        made, leidenalg.RBConfigurationVertexPartition, weights=graph.weight, resolution_parameter=options.resolution, seed=options.seed,
        n_iterations=2,
    )  # fmt: skip
    return np.array(found.membership), None, {"resolution": options.resolution}


def _louvain(graph: EffectiveGraph, options: CommunityOptions) -> Found:
    try:
        import igraph
    except ImportError:
        raise _missing("igraph", Method.LOUVAIN) from None
    made = igraph.Graph(n=graph.n, edges=np.column_stack([graph.source, graph.target]))
    igraph.set_random_number_generator(random.Random(options.seed))
    try:
        found = made.community_multilevel(weights=graph.weight, resolution=options.resolution)
    finally:
        igraph.set_random_number_generator(random)
    return np.array(found.membership), None, {"resolution": options.resolution}


def _infomap(graph: EffectiveGraph, options: CommunityOptions) -> Found:
    try:
        from infomap import Infomap
    except ImportError:
        raise _missing("infomap", Method.INFOMAP) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that a later version moves
        walk = Infomap(silent=True, directed=True, two_level=True, seed=options.seed + 1, num_trials=1, markov_time=1 / options.resolution)
        walk.add_links(np.column_stack([graph.source, graph.target, graph.weight]))
        walk.run()
        modules, codelength = dict(walk.get_modules()), float(walk.codelength)
    labels = np.fromiter((modules[i] for i in range(graph.n)), dtype=np.int64, count=graph.n)
    return labels, codelength, {"resolution": options.resolution}


def _spectral(graph: EffectiveGraph, options: CommunityOptions) -> Found:
    """Eigenvectors of D^-1/2 (A + Aᵀ) D^-1/2, D raised by its mean against nodes of low degree (Qin and Rohe 2013), rows normalised, k-means."""
    from scipy.sparse.linalg import eigsh  # type: ignore[import-untyped]

    both = graph.adjacency()
    both = both + both.T
    degree = np.asarray(both.sum(axis=1)).ravel()
    scale = sp.diags(1 / np.sqrt(degree + degree.mean()))
    wanted = min((options.n_communities or LARGEST_K) + 1, graph.n - 1)
    start = np.random.default_rng(options.seed).standard_normal(graph.n)
    values, vectors = eigsh(scale @ both @ scale, k=wanted, which="LA", v0=start)
    order = np.argsort(-values)
    values, vectors = values[order], vectors[:, order]
    k = options.n_communities or eigengap(values)
    rows = vectors[:, :k]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels = KMeans(min(k, graph.n), n_init=5, random_state=options.seed).fit_predict(rows)
    return labels.astype(np.int64), None, {"n_asked": k, "by": "given" if options.n_communities else "eigengap"}


def eigengap(values: FloatArray) -> int:
    """The k >= 2 after which the eigenvalues, descending, fall most."""
    return int(np.argmax(values[1:-1] - values[2:])) + 2 if len(values) > 2 else 2


def _nested_sbm(graph: EffectiveGraph, options: CommunityOptions) -> Found:
    from .graph_tool import GraphToolFailed, GraphToolMissing, GraphToolTimeout, nested_directed

    try:
        path: PartitionPath = nested_directed(
            graph.source, graph.target, None, graph.n, seed=options.seed, seconds=options.seconds, interpreter=options.interpreter
        )
    except (GraphToolMissing, GraphToolTimeout, GraphToolFailed) as error:
        labels, codelength, info = _leiden(graph, replace(options, method=Method.LEIDEN, resolution=1.0))
        return labels, codelength, {**info, "method": Method.LEIDEN.value, "instead_of": Method.NESTED_SBM.value, "reason": str(error)}
    level = 0 if options.n_communities is None else path.with_blocks(options.n_communities)
    said = {name: path.info[name] for name in ("seconds", "graph_tool", "timed_out") if name in path.info}
    return path.labels[level], None, {"level": level, "n_blocks": path.n_blocks.tolist(), **said}


_METHODS: Mapping[Method, Callable[[EffectiveGraph, CommunityOptions], Found]] = MappingProxyType(
    {
        Method.LEIDEN: _leiden, Method.INFOMAP: _infomap, Method.LOUVAIN: _louvain, Method.SPECTRAL: _spectral, Method.NESTED_SBM: _nested_sbm,
    }
)  # fmt: skip


# --- stability --------------------------------------------------------------------------------------------------------

SCAN = {
    "resolution": pl.Float64(), "n_communities": pl.Int64(), "n_least": pl.Int64(), "n_most": pl.Int64(), "largest": pl.Int64(),
    "modularity": pl.Float64(), "seeds_ami": pl.Float64(), "seeds_low": pl.Float64(), "seeds_high": pl.Float64(), "next_ami": pl.Float64(),
    "next_low": pl.Float64(), "next_high": pl.Float64(),
}  # fmt: skip
"""One row a resolution (for spectral: a number of communities). n_communities: of the first seed, n_least and n_most of all. seeds_*: the mean AMI
between two seeds with the middle 95 % of the pairs; next_*: the same of a seed here and one at the next resolution, null in the last row."""

GRID = (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)
"""Resolutions of a scan, as multiples of the one chosen."""


def stability(
    graph: EffectiveGraph, options: CommunityOptions, *, seeds: int = 5, grid: tuple[float, ...] = GRID,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:  # fmt: skip
    """Agreement between seeds and between neighbouring resolutions, as `SCAN`. The nested block model has no scan: its seeds alone."""
    if seeds < 2:
        raise UserError(f"--seeds {seeds} is too small: agreement takes at least 2")
    steps = _steps(graph, options, grid)
    runs: list[list[Communities]] = []
    for i, (_, step) in enumerate(steps):
        runs.append([find_communities(graph, replace(step, seed=options.seed + j)) for j in range(seeds)])
        if progress is not None:
            progress(i + 1, len(steps))
    rows = []
    for i, (value, _) in enumerate(steps):
        here, after = runs[i], runs[i + 1] if i + 1 < len(steps) else []
        counts = [found.n_communities for found in here]
        between = [ami(a.labels, b.labels) for j, a in enumerate(here) for b in here[j + 1 :]]
        beyond = [ami(a.labels, b.labels) for a in here for b in after]
        rows.append(
            (value, counts[0], min(counts), max(counts), int(here[0].sizes[0]), here[0].modularity, *_spread(between), *_spread(beyond))
        )
    return pl.DataFrame(rows, schema=SCAN, orient="row")


def _steps(graph: EffectiveGraph, options: CommunityOptions, grid: tuple[float, ...]) -> list[tuple[float, CommunityOptions]]:
    """The resolutions of a scan, or the numbers of communities, with the options of each."""
    if options.method is Method.NESTED_SBM:
        return [(1.0, options)]
    if options.method.has_resolution:
        return [(options.resolution * step, replace(options, resolution=options.resolution * step)) for step in grid]
    k = options.n_communities or find_communities(graph, options).n_communities
    numbers = sorted({min(max(2, round(k * step)), graph.n - 2) for step in grid})
    return [(float(n), replace(options, n_communities=n)) for n in numbers]


def _spread(values: list[float]) -> tuple[float | None, float | None, float | None]:
    """Mean and the middle 95 %."""
    if not values:
        return None, None, None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def members(graph: EffectiveGraph, labels: IntArray) -> pl.DataFrame:
    """The nodes with their `community` and `strength` (all their edges' weights)."""
    return graph.nodes.with_columns(pl.Series("community", labels), pl.Series("strength", graph.strength))

