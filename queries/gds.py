"""Communities by Neo4j's Graph Data Science library, on a server that has it.

1. `require_gds`: the server has the library, or `NoGds` says how to get it.
2. `gds_communities`: the run's edges are projected into the server's memory, divided by Leiden or Louvain there, read back node by node, and the
   projection is dropped whatever happens.

Both take edges without their direction (the library's Leiden takes no other), and modularity of undirected graphs. One thread, so that the same
seed gives the same communities. What is sent is Cypher by the client's `run_cypher`, which all of its versions have.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import polars as pl

from ..errors import UserError
from .store import GraphStore, QueryRejected, ServerCredentials

METHODS = ("leiden", "louvain")
"""What the library divides graphs by."""

WEIGHTS = ("abs_weight", "weight")
"""Properties of edges that can be the weight; of `weight` the magnitude counts."""

_PROJECT = """
MATCH (source:Feature)-[e:INFLUENCES]->(target:Feature)
WHERE e.run = $run AND source.kind IN $kinds AND target.kind IN $kinds AND {strength} > 0 AND {strength} >= $threshold
WITH gds.graph.project(
  $name, source, target, {{relationshipProperties: {{weight: {strength}}}}}, {{undirectedRelationshipTypes: ["*"], readConcurrency: 1}}
) AS projected
RETURN projected.nodeCount AS nodes, projected.relationshipCount AS edges
"""
_DIVIDE = """
CALL gds.{method}.stream($name, {settings}) YIELD nodeId, communityId
RETURN gds.util.asNode(nodeId).key AS key, communityId AS community ORDER BY key
"""
_SETTINGS = {
    "leiden": "{relationshipWeightProperty: 'weight', gamma: $resolution, randomSeed: $seed, concurrency: 1}",
    "louvain": "{relationshipWeightProperty: 'weight', concurrency: 1}",
}
_DROP = "CALL gds.graph.drop($name, false) YIELD graphName RETURN graphName"
_THERE = "SHOW FUNCTIONS YIELD name WHERE name = 'gds.version' RETURN name"


class NoGds(UserError):
    """The graph is on no server that has the Graph Data Science library, or its client is not installed."""


class NothingProjected(UserError):
    """A run has no edge of the kinds asked for."""


class Client(Protocol):
    """What is used of `graphdatascience.GraphDataScience`."""

    def run_cypher(self, query: str, params: dict[str, Any] | None = None) -> Any: ...

    def close(self) -> None: ...


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
    from .server import completed_credentials

    known = completed_credentials(uri, credentials)
    client: Client = GraphDataScience(uri, auth=(known.username or "neo4j", known.password or ""), database=known.database, arrow=False)
    return client


def gds_communities(connect: Callable[[], Client], run: str, options: GdsOptions) -> pl.DataFrame:
    """`key`, `community` of every node with an edge, by key. Raises `NothingProjected`."""
    options.check()
    name, client = f"featlas-{uuid.uuid4().hex[:12]}", connect()
    strength = "e.abs_weight" if options.weight == "abs_weight" else "abs(e.weight)"
    try:
        given = {"name": name, "run": run, "kinds": list(options.kinds), "threshold": float(options.threshold)}
        projected = client.run_cypher(_PROJECT.format(strength=strength), given)
        if not len(projected) or not int(projected["nodes"][0] or 0):
            kinds = " and ".join(options.kinds)
            raise NothingProjected(f"run {run!r} has no edge between {kinds} nodes at threshold {options.threshold:g}: lower it")
        found = client.run_cypher(
            _DIVIDE.format(method=options.method, settings=_SETTINGS[options.method]),
            {"name": name, "resolution": float(options.resolution), "seed": int(options.seed)},
        )
        keys, communities = list(found["key"]), [int(value) for value in found["community"]]
    finally:
        try:
            client.run_cypher(_DROP, {"name": name})
        finally:
            client.close()
    return pl.DataFrame({"key": keys, "community": communities}, schema={"key": pl.String(), "community": pl.Int64()}).sort("key")
