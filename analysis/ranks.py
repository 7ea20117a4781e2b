"""Ranks: how much each node of a run's graph matters, by one number.

Nodes are i, j; w_ij > 0 is the strength of the edge i → j (metric units). A walker at i takes an edge with the probability of its part in what
there is to choose from: *forward* P_ij = w_ij / Σ_k w_ik, to the nodes that it drives; *backward* P_ji = w_ij / Σ_k w_kj, to those that drive it.

- **PageRank** (Brin and Page 1998): r = (1 − d) p + d (Pᵀ r + m p), summing to 1; d the damping, p even over the start nodes (all nodes: the plain
  one), m the rank of nodes with nowhere to go, which starts anew. m only scales r, so r = x / Σx with x = p + d Pᵀ x: which is what is solved.
- **Influence**: x itself at d = 1, backward from the output: the part of everything that enters the output which comes through a node, along all
  paths. The graph is acyclic, so that it is finite; the same number as a circuit's `influence`.
- **Betweenness** (Freeman 1977): on how many shortest paths between two others a node lies, an edge being 1 / w_ij long; of equally long paths each
  counts its part. Directed, not normalised.
- **Strength**: Σ_j w_ij + Σ_j w_ji.

PageRank, betweenness and strength can be computed by Neo4j's Graph Data Science instead (`queries/gds.py`): the same definitions, the same rows. Its
PageRank is x with p = 1 − d at every start node, and it does not start anew what has nowhere to go: brought to the sum 1 it is r.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import polars as pl
import scipy.sparse as sp  # type: ignore[import-untyped]

from ..errors import UserError
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow, model_features
from .communities import EffectiveGraph, FloatArray, GraphOptions, IntArray, MissingPackage
from .notes import CONTEXTS, feature_notes, strongest_contexts

LOCAL, GDS = "local", "gds"
"""`basis`: who computed it, featlas itself or Graph Data Science on the server."""

STEPS = 10_000
TOLERANCE = 1e-14
"""A walk is done when no node's number changes by more than this part of the greatest; a walk over L sites is, exactly, after L + 1 steps."""

OUTPUT = "output"
EVERYWHERE = "all"

RANKS = {
    "run": pl.String(), "method": pl.String(), "basis": pl.String(), "key": pl.String(), "value": pl.Float64(), "rank": pl.Int64(),
}  # fmt: skip
"""One row a node, or a path: `key` its key (of a path, the nodes' keys with > between them), `rank` 1 for the greatest value, equal ones by key."""


class RankMethod(StrEnum):
    """What a node's number is: see this module's head."""

    PAGERANK = "pagerank"
    INFLUENCE = "influence"
    BETWEENNESS = "betweenness"
    STRENGTH = "strength"

    @property
    def walks(self) -> bool:
        """Whether it is a walker's, which has a direction and starts somewhere."""
        return self in (RankMethod.PAGERANK, RankMethod.INFLUENCE)


class Direction(StrEnum):
    """Which way a walker goes."""

    FORWARD = "forward"
    """Along edges: to what a node drives."""
    BACKWARD = "backward"
    """Against them: to what drives it."""


class NoSuchNode(UserError):
    """A node that the graph does not have."""


@dataclass(frozen=True, slots=True)
class RankOptions:
    """What is computed, and of which graph. start: nodes by their names (see `nodes_named`); `output`, or `all`."""

    method: RankMethod = RankMethod.PAGERANK
    direction: Direction = Direction.BACKWARD
    start: tuple[str, ...] = (OUTPUT,)
    damping: float = 0.85
    graph: GraphOptions = field(default_factory=lambda: GraphOptions(errors=True, output=True))

    def check(self) -> None:
        """Raise a `UserError` for a setting out of range or without a meaning here."""
        if not 0 < self.damping < 1:
            raise UserError(f"--damping {self.damping:g} is out of range: give a number between 0 and 1, such as 0.85; influence is the limit 1")
        if not self.start:
            raise UserError("no node to start at: name one by --start, or give --start output or --start all")

    @property
    def settings(self) -> dict[str, object]:
        """What a walk depends on, JSON-able."""
        graph: dict[str, object] = {"graph": self.graph.description}
        if not self.method.walks:
            return graph
        damped = {"damping": self.damping} if self.method is RankMethod.PAGERANK else {}
        return {**graph, "direction": self.direction.value, "start": list(self.start), **damped}


@dataclass(frozen=True, eq=False)
class Ranking:
    """Nodes (or paths) of a run in an order. rows: `RANKS`, by rank. settings: JSON-able."""

    run: str
    method: str
    basis: str
    settings: Mapping[str, object]
    rows: pl.DataFrame

    @property
    def key(self) -> str:
        """A content hash of what was asked, and of whom: the same asked again is the same ranking."""
        content = json.dumps([self.run, self.method, self.basis, dict(self.settings)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:24]


def ranking_of(run: str, method: str, basis: str, settings: Mapping[str, object], keys: Sequence[str], values: Sequence[float]) -> Ranking:
    """Put values in an order: the greatest first, equal ones by key."""
    rows = pl.DataFrame({"key": keys, "value": values}, schema={"key": pl.String, "value": pl.Float64})
    rows = rows.sort(["value", "key"], descending=[True, False]).with_columns(
        pl.lit(run).alias("run"), pl.lit(method).alias("method"), pl.lit(basis).alias("basis"), pl.int_range(1, pl.len() + 1).alias("rank")
    )
    return Ranking(run, method, basis, settings, rows.select(pl.col(name).cast(dtype) for name, dtype in RANKS.items()))


def rank_nodes(run: str, graph: EffectiveGraph, options: RankOptions) -> Ranking:
    """Rank every node of the graph. Raises `NoSuchNode`, `MissingPackage` (betweenness needs igraph)."""
    options.check()
    if options.method.walks:
        values = _walked(graph, options, start_nodes(graph, options.start))
    elif options.method is RankMethod.BETWEENNESS:
        values = betweenness(graph)
    else:
        values = graph.strength
    return ranking_of(run, options.method.value, LOCAL, options.settings, graph.nodes["key"].to_list(), values.tolist())


def start_nodes(graph: EffectiveGraph, names: Sequence[str]) -> IntArray:
    """The places of the nodes where a walk starts."""
    if EVERYWHERE in names:
        return np.arange(graph.n)
    return np.unique(np.concatenate([nodes_named(graph.nodes, name) for name in names]))


def nodes_named(nodes: pl.DataFrame, name: str) -> IntArray:
    """The rows of `nodes` (key, site, kind, index) that a name means: a whole key, `resid_3/17`, `resid_3/error`, `output` (or `y`).

    Raises `NoSuchNode`.
    """
    site, _, index = name.rpartition("/")
    fits = pl.col("key") == name
    if name in (OUTPUT, "y"):
        fits |= pl.col("kind") == OUTPUT
    elif index == "error":
        fits |= (pl.col("site") == site) & (pl.col("kind") == "error")
    elif index.isascii() and index.isdigit():
        fits |= (pl.col("site") == site) & (pl.col("kind") == "feature") & (pl.col("index") == int(index))
    found = nodes.with_row_index("row").filter(fits)["row"].to_numpy().astype(np.int64)
    if not len(found):
        raise NoSuchNode(
            f"no node {name!r} in this graph of {nodes.height} nodes: give a whole key, site/index (resid_3/17), site/error, or output; "
            "`featlas query find_features` finds features, and a lower --threshold keeps more of them"
        )
    return found


def _walked(graph: EffectiveGraph, options: RankOptions, start: IntArray) -> FloatArray:
    """x of this module's head, summing to 1 for PageRank, (n,)."""
    first = np.zeros(graph.n)
    first[start] = 1 / len(start)
    x = walk(graph, options.direction, 1.0 if options.method is RankMethod.INFLUENCE else options.damping, first)
    return x / x.sum() if options.method is RankMethod.PAGERANK else x


def walk(graph: EffectiveGraph, direction: Direction, damping: float, first: FloatArray) -> FloatArray:
    """x = first + damping · Pᵀ x, (n,). Exact where no walk is longer than `STEPS`, as in every graph whose edges lead to later sites."""
    source, target = (graph.source, graph.target) if direction is Direction.FORWARD else (graph.target, graph.source)
    leaving = np.bincount(source, graph.weight, graph.n)
    steps = sp.csr_matrix((damping * graph.weight / leaving[source], (target, source)), shape=(graph.n, graph.n))
    x, moved = first.copy(), first
    for _ in range(STEPS):
        moved = steps @ moved
        x += moved
        if not moved.max(initial=0.0) > TOLERANCE * x.max():
            break
    return x


def betweenness(graph: EffectiveGraph) -> FloatArray:
    """On how many shortest paths each node lies, (n,): O(n m), minutes from some 10⁵ edges on. Raises `MissingPackage`."""
    try:
        import igraph
    except ImportError:
        raise MissingPackage('betweenness needs the package igraph: pip install "featlas[communities]"') from None
    made = igraph.Graph(n=graph.n, edges=np.column_stack([graph.source, graph.target]), directed=True)
    return np.array(made.betweenness(directed=True, weights=(1 / graph.weight).tolist()), dtype=np.float64)


def notes_of(store: GraphStore, statistics: StatisticsStore | None, run: RunRow, keys: Collection[str]) -> pl.DataFrame:
    """What is known of some nodes: `key`, `site`, `kind`, `index`, and the columns of `notes.NOTES`; `statistics` where the atlas has some."""
    features = model_features(store, run.model).filter(pl.col("key").is_in(list(keys)))
    measured = statistics.latest_run(run.model, run.dictionaries) if statistics is not None else None
    contexts = pl.DataFrame(schema=CONTEXTS)
    if statistics is not None and measured is not None:
        contexts = strongest_contexts(statistics, measured.run, features["key"].to_list())
    notes = feature_notes(features, contexts, output=run.metric.replace("_", " "))
    return notes.join(features.select("key", "site", "kind", "index"), on="key")
