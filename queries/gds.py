"""Algorithms of Neo4j's Graph Data Science library, on a server that has it: communities, ranks of nodes, strongest paths.

1. `require_gds`: the server has the library, or `NoGds` says how to get it.
2. `projected`: a run's edges are copied into the server's memory, after it was asked whether that holds them (`TooLarge`), and the copy is
   dropped whatever happens. Copies that killed processes of this machine left, and any older than a day, are dropped by the next.
3. `gds_communities`, `gds_ranks`, `gds_paths`: the algorithm runs there, and its rows are read back.

Leiden and Louvain take edges without their direction (the library's Leiden takes no other), and modularity of undirected graphs; on one thread, so
that the same seed gives the same communities. What is sent is Cypher by the client's `run_cypher`, which all of its versions have.
"""

import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import polars as pl

from ..errors import UserError
from ..files import is_alive
from .store import GraphStore, QueryRejected, ServerCredentials

METHODS = ("leiden", "louvain")
"""What the library divides graphs by."""

RANKS = ("pagerank", "betweenness", "strength")
"""What the library ranks nodes by."""

WEIGHTS = ("abs_weight", "weight")
"""Properties of edges that can be the weight; of `weight` the magnitude counts."""

MOST_THREADS = 4
"""Threads that the library's open edition uses at most."""

PREFIX = "featlas-"
_STALE = "P1D"

_EDGES = """
MATCH (source:Feature)-[e:INFLUENCES]->(target:Feature)
WHERE e.run = $run AND source.kind IN $kinds AND target.kind IN $kinds AND {strength} > 0 AND {strength} >= $threshold
"""
_PROJECT = """
WITH gds.graph.project(
  $name, {source}, {target}, {{relationshipProperties: {{weight: {value}}}}}, {{undirectedRelationshipTypes: {undirected}, readConcurrency: $threads}}
) AS projected
RETURN projected.nodeCount AS nodes, projected.relationshipCount AS edges
"""
# The part of everything that enters a node which an edge brings, as a length: lengths add up where parts multiply.
_SHARES = """
WITH target, sum({strength}) AS entering, collect({{source: source, strength: {strength}}}) AS edges
UNWIND edges AS edge
WITH edge.source AS source, target, -log(edge.strength / entering) AS length
"""
_DIVIDE = """
CALL gds.{method}.stream($name, {settings}) YIELD nodeId, communityId
RETURN gds.util.asNode(nodeId).key AS key, communityId AS community ORDER BY key
"""
_SETTINGS = {
    "leiden": "{relationshipWeightProperty: 'weight', gamma: $resolution, randomSeed: $seed, concurrency: 1}",
    "louvain": "{relationshipWeightProperty: 'weight', concurrency: 1}",
}
_START = "MATCH (f:Feature) WHERE f.key IN $start WITH collect(f) AS start"
_WALK = "{{relationshipWeightProperty: 'weight', dampingFactor: $damping, maxIterations: 10000, tolerance: 1e-15, concurrency: $threads{start}}}"
_RANK = """
{start}
CALL gds.{procedure}.stream($name, {settings}) YIELD nodeId, score
RETURN gds.util.asNode(nodeId).key AS key, score AS value ORDER BY key
"""
_YENS = """
MATCH (a:Feature {key: $source}) MATCH (b:Feature {key: $target})
CALL gds.shortestPath.yens.stream($name, {sourceNode: a, targetNode: b, k: $k, relationshipWeightProperty: 'weight', concurrency: $threads})
YIELD index, totalCost, nodeIds
RETURN totalCost AS length, [node IN nodeIds | gds.util.asNode(node).key] AS keys ORDER BY length, index
"""
_DROP = "CALL gds.graph.drop($name, false) YIELD graphName RETURN graphName"
_LEFT = (
    "CALL gds.graph.list() YIELD graphName, creationTime WHERE graphName STARTS WITH $prefix"
    " RETURN graphName AS name, creationTime < datetime() - duration($age) AS stale"
)
_SIZES = """
OPTIONAL MATCH (f:Feature) WHERE f.kind IN $kinds
WITH count(f) AS nodes
CALL {{ {edges} RETURN count(e) AS edges }}
CALL gds.graph.project.estimate('*', '*', {{nodeCount: nodes, relationshipCount: {times} * edges, relationshipProperties: 'weight'}})
YIELD bytesMin
RETURN nodes, edges, bytesMin AS needed
"""
_HEAP = """
CALL dbms.queryJmx('java.lang:type=Memory') YIELD attributes
RETURN attributes.HeapMemoryUsage.value.properties.max AS heap
"""
_THERE = "SHOW FUNCTIONS YIELD name WHERE name = 'gds.version' RETURN name"


class NoGds(UserError):
    """The graph is on no server that has the Graph Data Science library, or its client is not installed."""


class NothingProjected(UserError):
    """A run has no edge of the kinds asked for."""


class TooLarge(UserError):
    """The graph, or what an algorithm needs beside it, does not fit the server's memory."""


class NotProjected(UserError):
    """A node has no edge in the graph that was asked for."""


class Client(Protocol):
    """What is used of `graphdatascience.GraphDataScience`."""

    def run_cypher(self, query: str, params: dict[str, Any] | None = None) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Client:
    """The library's client with the driver it was given, which it does not close."""

    gds: Any
    driver: Any

    def run_cypher(self, query: str, params: dict[str, Any] | None = None) -> Any:
        return self.gds.run_cypher(query, params)

    def close(self) -> None:
        try:
            self.gds.close()
        finally:
            self.driver.close()


@dataclass(frozen=True, slots=True)
class GdsOptions:
    """What is divided, and how. kinds: of nodes. resolution (γ) and seed: Leiden's; Louvain of the library has neither."""

    method: str = "leiden"
    weight: str = "abs_weight"
    threshold: float = 0.0
    kinds: Sequence[str] = ("feature",)
    resolution: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise a `UserError` for what the library does not have."""
        if self.method not in METHODS:
            raise UserError(f"--gds divides by {' or '.join(METHODS)}, not {self.method}: choose one of them by --method, or leave --gds out")
        if self.weight not in WEIGHTS:
            raise UserError(f"{self.weight!r} is no weight of edges: choose from {', '.join(WEIGHTS)}")
        if self.method == "louvain" and self.resolution != 1:
            raise UserError(f"--resolution {self.resolution:g}: Louvain of Graph Data Science has none, take --method leiden")


@dataclass(frozen=True, slots=True)
class Projection:
    """Which edges are copied: of one run, between nodes of these kinds, of this strength at least (`weight`: which number that is)."""

    run: str
    weight: str = "abs_weight"
    threshold: float = 0.0
    kinds: Sequence[str] = ("feature",)
    threads: int = 1

    def check(self) -> None:
        """Raise a `UserError` for what the library does not have."""
        if self.weight not in WEIGHTS:
            raise UserError(f"{self.weight!r} is no weight of edges: choose from {', '.join(WEIGHTS)}")
        if not 1 <= self.threads <= MOST_THREADS:
            raise UserError(f"--threads {self.threads}: the open edition of Graph Data Science takes 1 to {MOST_THREADS}")

    @property
    def strength(self) -> str:
        """The strength of an edge `e`, as Cypher."""
        return "e.abs_weight" if self.weight == "abs_weight" else "abs(e.weight)"


@dataclass(frozen=True, slots=True)
class Shape:
    """How edges are copied: against their direction, without one, and what their number is there (`strength`, `length` 1/strength, `share`)."""

    number: str = "strength"
    backward: bool = False
    undirected: bool = False

    def cypher(self, projection: Projection) -> str:
        """The statement that copies."""
        strength = projection.strength
        text = _EDGES.format(strength=strength) + (_SHARES.format(strength=strength) if self.number == "share" else "")
        value = {"strength": strength, "length": f"1.0 / {strength}", "share": "length"}[self.number]
        source, target = ("target", "source") if self.backward else ("source", "target")
        return text + _PROJECT.format(source=source, target=target, value=value, undirected='["*"]' if self.undirected else "[]")


def require_gds(store: GraphStore) -> None:
    """Raise `NoGds` where the graph's server has no Graph Data Science library."""
    way_out = "start the local one with `featlas neo4j up --gds`, install the plugin on your own, or leave --gds out"
    if store.dialect != "neo4j":
        raise NoGds(f"--gds needs a graph on a Neo4j server (--graph bolt://…): {way_out}")
    try:
        there = store.query(_THERE).height > 0
    except QueryRejected:  # of a server before functions could be listed
        there = False
    if not there:
        raise NoGds(f"the Neo4j server has no Graph Data Science library: {way_out}")


def connected(uri: str, credentials: ServerCredentials) -> Client:
    """The library's client at a server; raises `NoGds` where the client is not installed."""
    try:
        from graphdatascience import GraphDataScience
    except ImportError:
        raise NoGds('--gds needs the client of Graph Data Science: pip install "featlas[gds]"') from None
    from .server import open_driver

    # A driver of our own believes the same authorities as the graph store's.
    driver = open_driver(uri, credentials)
    try:
        return _Client(GraphDataScience(driver, database=credentials.database, arrow=False), driver)
    except BaseException:
        driver.close()
        raise


@contextmanager
def projected(connect: Callable[[], Client], projection: Projection, shape: Shape) -> Iterator[tuple[Client, str]]:
    """The client and the name of the copy that the block may use. Raises `NothingProjected`, `TooLarge`."""
    projection.check()
    name, client = f"{_own_prefix()}{os.getpid()}-{uuid.uuid4().hex[:12]}", connect()
    given = {"run": projection.run, "kinds": list(projection.kinds), "threshold": float(projection.threshold)}
    try:
        _drop_left(client)
        _check_memory(client, projection, shape, given)
        counts = client.run_cypher(shape.cypher(projection), {"name": name, **given, "threads": projection.threads})
        if not len(counts) or not int(counts["nodes"][0] or 0):
            kinds = " and ".join(projection.kinds)
            raise NothingProjected(f"run {projection.run!r} has no edge between {kinds} nodes at threshold {projection.threshold:g}: lower it")
        yield client, name
    except Exception as error:
        if (known := _known(error)) is None:
            raise
        raise known from error
    finally:
        try:
            client.run_cypher(_DROP, {"name": name})
        finally:
            client.close()


def gds_communities(connect: Callable[[], Client], run: str, options: GdsOptions) -> pl.DataFrame:
    """`key`, `community` of every node with an edge, by key. Raises `NothingProjected`, `TooLarge`."""
    options.check()
    projection = Projection(run, options.weight, options.threshold, options.kinds)
    with projected(connect, projection, Shape(undirected=True)) as (client, name):
        found = client.run_cypher(
            _DIVIDE.format(method=options.method, settings=_SETTINGS[options.method]),
            {"name": name, "resolution": float(options.resolution), "seed": int(options.seed)},
        )
        keys, communities = list(found["key"]), [int(value) for value in found["community"]]
    return pl.DataFrame({"key": keys, "community": communities}, schema={"key": pl.String(), "community": pl.Int64()}).sort("key")


def gds_ranks(
    connect: Callable[[], Client], projection: Projection, method: str, *, backward: bool = False, damping: float = 0.85,
    start: Sequence[str] | None = None,
) -> pl.DataFrame:  # fmt: skip
    """`key`, `value` of every node with an edge, by key: of pagerank (summing to 1), betweenness or strength, as `analysis.ranks` defines them.

    start: keys of the nodes where the walk of pagerank starts; None is everywhere. Raises `NothingProjected`, `TooLarge`, `NotProjected`.
    """
    if method not in RANKS:
        raise UserError(f"--gds ranks by {', '.join(RANKS)}, not {method}: choose one of them by --method, or leave --gds out")
    walks = method == "pagerank"
    shape = Shape("length" if method == "betweenness" else "strength", backward=walks and backward)
    settings = {
        "pagerank": _WALK.format(start="" if start is None else ", sourceNodes: start"),
        "betweenness": "{relationshipWeightProperty: 'weight', concurrency: $threads}",
        "strength": "{relationshipWeightProperty: 'weight', orientation: 'UNDIRECTED', concurrency: $threads}",
    }
    procedure = {"pagerank": "pageRank", "betweenness": "betweenness", "strength": "degree"}[method]
    begin = _START if walks and start is not None else ""
    with projected(connect, projection, shape) as (client, name):
        given = {"name": name, "threads": projection.threads, "damping": float(damping), "start": list(start or ())}
        found = client.run_cypher(_RANK.format(start=begin, procedure=procedure, settings=settings[method]), given)
        rows = pl.DataFrame({"key": list(found["key"]), "value": [float(value) for value in found["value"]]}, schema=_VALUES)
    return rows.with_columns(pl.col("value") / pl.col("value").sum()) if walks else rows


_VALUES = {"key": pl.String(), "value": pl.Float64()}


def gds_paths(connect: Callable[[], Client], projection: Projection, source: str, target: str, k: int) -> pl.DataFrame:
    """The `k` strongest paths between two nodes by the product of the edges' shares (Yen's): `keys` (a list), `score`, strongest first.

    Raises `NothingProjected`, `TooLarge`, `NotProjected`.
    """
    with projected(connect, projection, Shape("share")) as (client, name):
        found = client.run_cypher(_YENS, {"name": name, "source": source, "target": target, "k": k, "threads": projection.threads})
        keys, lengths = [list(path) for path in found["keys"]], [float(length) for length in found["length"]]
    rows = pl.DataFrame({"keys": keys, "length": lengths}, schema={"keys": pl.List(pl.String), "length": pl.Float64})
    return rows.select("keys", (-pl.col("length")).exp().alias("score"))


def run_outputs(store: GraphStore, run: str) -> list[str]:
    """The keys of the outputs that a run's edges enter: a model has one for each metric that was ever asked for."""
    text = "MATCH (y:Feature)<-[e:INFLUENCES]-(:Feature) WHERE y.kind = 'output' AND e.run = $run RETURN DISTINCT y.key AS key"
    rows = store.query(text, {"run": run})
    return sorted(rows["key"].to_list())


def edge_weights(store: GraphStore, run: str, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """The signed weights of some edges of a run, by their ends."""
    text = (
        "UNWIND $pairs AS pair MATCH (a:Feature {key: pair.source}) MATCH (b:Feature {key: pair.target})"
        " MATCH (a)-[e:INFLUENCES]->(b) WHERE e.run = $run RETURN a.key AS source, b.key AS target, e.weight AS weight"
    )
    if not pairs:
        return {}
    rows = store.query(text, {"run": run, "pairs": [{"source": source, "target": target} for source, target in pairs]})
    return {(source, target): weight for source, target, weight in rows.select("source", "target", "weight").iter_rows()}


def _own_prefix() -> str:
    """How the names of copies of this machine's processes begin."""
    return f"{PREFIX}{socket.gethostname()}-"


def _drop_left(client: Client) -> None:
    """Drop copies that nobody will: of processes of this machine that are gone, and old ones."""
    found = client.run_cypher(_LEFT, {"prefix": PREFIX, "age": _STALE})
    for name, stale in zip(list(found["name"]), list(found["stale"]), strict=True):
        if bool(stale) or _is_abandoned(str(name)):
            client.run_cypher(_DROP, {"name": str(name)})


def _is_abandoned(name: str) -> bool:
    """Whether a copy is of a process of this machine that has ended."""
    process = name.removeprefix(_own_prefix()).partition("-")[0]
    if not name.startswith(_own_prefix()) or not process.isdecimal():
        return False
    return not is_alive(int(process))


def _check_memory(client: Client, projection: Projection, shape: Shape, given: dict[str, Any]) -> None:
    """Raise `TooLarge` where the copy alone needs more than the server's heap has at most; the library itself looks at what is left of it."""
    text = _SIZES.format(edges=_EDGES.format(strength=projection.strength).strip(), times=2 if shape.undirected else 1)
    sizes, heap = client.run_cypher(text, given), client.run_cypher(_HEAP)
    if not len(sizes) or not len(heap):
        return
    needed, there = int(sizes["needed"][0]), int(heap["heap"][0])
    if needed > there:
        raise TooLarge(
            f"{int(sizes['edges'][0]):,} edges of {int(sizes['nodes'][0]):,} nodes need {needed / 2**20:,.0f} MiB of the server's memory, "
            f"which has {there / 2**20:,.0f} MiB: {_SMALLER}"
        )


_SMALLER = "give it more (server.memory.heap.max_size; `featlas neo4j up --heap-mb`), or raise --threshold"
_BLOCKED, _ABSENT = "minimum estimated memory", "in the in-memory graph"


def _known(error: Exception) -> UserError | None:
    """What the library says of memory and of nodes, as errors of ours."""
    said = str(error)
    if _BLOCKED in said:
        return TooLarge(f"Graph Data Science: {said[said.index(_BLOCKED) :].rstrip(' }.')}: {_SMALLER}")
    if _ABSENT in said:
        return NotProjected("a node that was named has no edge in this graph: lower --threshold, or name another")
    return None
