"""What the pages ask a graph and a statistics store, for many nodes at once: counts, circuits, blocks, matches; moments and contexts.

Frames have one row a fact; `key` is the node's that the fact is about.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

import polars as pl

from .schema import EDGES, NODES
from .statistics import StatisticsStore
from .store import GraphStore

KEYS_AT_ONCE = 500
"""Keys that are sent with one question."""

_TEXT, _INT, _NUMBER, _FLAG = pl.String(), pl.Int64(), pl.Float64(), pl.Boolean()
NODE_COLUMNS = {
    "key": _TEXT, "model": _TEXT, "dictionary": _TEXT, "site": _TEXT, "layer": _INT, "kind": _TEXT, "index": _INT, "label": _TEXT,
    "label_kind": _TEXT, "frequency": _NUMBER, "mean_activation": _NUMBER,
}  # fmt: skip
IN_CIRCUITS = {"key": _TEXT, "circuit": _TEXT, "role": _TEXT}
IN_BLOCKS = {
    "key": _TEXT, "block": _TEXT, "parcellation": _TEXT, "kind": _TEXT, "site": _TEXT, "index": _INT, "size": _INT, "label": _TEXT, "method": _TEXT,
}  # fmt: skip
MATCHED = {"key": _TEXT, "other": _TEXT, "method": _TEXT, "score": _NUMBER}
EFFECTS = {"key": _TEXT, "run": _TEXT, "metric": _TEXT, "baseline": _TEXT, "effect": _NUMBER, "n": _INT}
MOMENTS = {
    "key": _TEXT, "run": _TEXT, "corpus": _TEXT, "site": _TEXT, "feature": _INT, "count": _INT, "frequency": _NUMBER, "mean": _NUMBER,
    "variance": _NUMBER, "minimum": _NUMBER, "maximum": _NUMBER, "mean_active": _NUMBER, "tokens": _INT,
}  # fmt: skip
_TOKENS = pl.List(pl.String())
PLACES = {
    "key": _TEXT, "rank": _INT, "value": _NUMBER, "sequence_key": _TEXT, "position": _INT, "before": _TOKENS, "token": _TEXT, "after": _TOKENS,
}  # fmt: skip


def _typed(rows: pl.DataFrame, schema: Mapping[str, Any]) -> pl.DataFrame:
    """An answer with the declared types; an empty one has no types of its own."""
    return pl.DataFrame(schema=dict(schema)) if rows.is_empty() else rows.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def _of_keys(store: GraphStore, text: str, schema: Mapping[str, Any], keys: Collection[str]) -> pl.DataFrame:
    """The answers of a question with `$keys`, asked for some of the keys at a time."""
    wanted = sorted(set(keys))
    parts = [
        _typed(store.query(text, {"keys": wanted[start : start + KEYS_AT_ONCE]}), schema) for start in range(0, len(wanted), KEYS_AT_ONCE)
    ]
    return pl.concat(parts) if parts else pl.DataFrame(schema=dict(schema))


def count_all(store: GraphStore) -> dict[str, int]:
    """How many nodes of each label and edges of each type the graph holds; those that it has none of are left out."""
    nodes = {label: store.query(f"MATCH (n:{label}) RETURN count(n) AS n")["n"][0] for label in NODES if label != "Meta"}
    edges = {type: store.query(f"MATCH ()-[e:{type}]->() RETURN count(e) AS n")["n"][0] for type in EDGES}
    return {name: int(n) for name, n in {**nodes, **edges}.items() if n}


def _properties(store: GraphStore, label: str, where: str = "", parameters: Mapping[str, object] | None = None) -> list[dict[str, Any]]:
    """All properties of the nodes of a label, by key; null where a node has none, which one of the databases would leave out."""
    rows = store.query(f"MATCH (n:{label}) {where} RETURN properties(n) AS properties, n.key AS key ORDER BY key", parameters)
    absent = dict.fromkeys(NODES[label].all_columns)
    return [{**absent, **json.loads(text)} for text in rows["properties"].to_list()] if rows.height else []


def models_of(store: GraphStore) -> list[dict[str, Any]]:
    """The properties of all models, by key."""
    return _properties(store, "Model")


def circuits_of(store: GraphStore, run: str | None = None) -> list[dict[str, Any]]:
    """The properties of all circuits, or of those of a run, by key."""
    return _properties(store, "Circuit", "WHERE n.run = $run" if run else "", {"run": run} if run else None)


def partitions_of(store: GraphStore, parcellation: str | None = None) -> list[dict[str, Any]]:
    """The properties of all partitions, or of those of a parcellation, by key."""
    given = {"parcellation": parcellation} if parcellation else None
    return _properties(store, "Partition", "WHERE n.parcellation = $parcellation" if parcellation else "", given)


def chosen_blocks(store: GraphStore, parcellation: str) -> list[dict[str, Any]]:
    """The properties of a parcellation's blocks at the chosen levels, by key."""
    return _properties(store, "Block", "WHERE n.parcellation = $parcellation AND n.chosen", {"parcellation": parcellation})


def nodes_of(store: GraphStore, keys: Collection[str]) -> pl.DataFrame:
    """The nodes of these keys as `NODE_COLUMNS`, by key; those that the graph lacks are left out."""
    columns = ", ".join(f"f.`{name}` AS `{name}`" for name in NODE_COLUMNS)
    return _of_keys(store, f"MATCH (f:Feature) WHERE f.key IN $keys RETURN {columns} ORDER BY f.key", NODE_COLUMNS, keys)


def all_nodes(store: GraphStore) -> pl.DataFrame:
    """Every feature, error node and output as `NODE_COLUMNS`, by key."""
    columns = ", ".join(f"f.`{name}` AS `{name}`" for name in NODE_COLUMNS)
    return _typed(store.query(f"MATCH (f:Feature) RETURN {columns} ORDER BY f.key"), NODE_COLUMNS)


def node_circuits(store: GraphStore, keys: Collection[str]) -> pl.DataFrame:
    """In which circuits nodes are, as `IN_CIRCUITS`."""
    text = (
        "MATCH (f:Feature)-[i:IN_CIRCUIT]->(c:Circuit) WHERE f.key IN $keys RETURN f.key AS key, c.key AS circuit, i.role AS role"
        " ORDER BY key, circuit"
    )
    return _of_keys(store, text, IN_CIRCUITS, keys)


def node_blocks(store: GraphStore, keys: Collection[str]) -> pl.DataFrame:
    """In which regions, communities, … nodes are (of the levels that were chosen), as `IN_BLOCKS`.

    Features are members of the finest level's blocks; a coarser one is reached over the blocks that it is made of.
    """
    columns = ", ".join(f"b.`{name}` AS `{name}`" for name in IN_BLOCKS if name not in ("key", "block"))
    text = (
        "MATCH (f:Feature)-[:MEMBER_OF]->(x:Block) WHERE f.key IN $keys WITH f, x MATCH (x)-[:PART_OF*0..9]->(b:Block) WHERE b.chosen"
        f" RETURN DISTINCT f.key AS key, b.key AS block, {columns} ORDER BY key, parcellation, block"
    )
    return _of_keys(store, text, IN_BLOCKS, keys)


def block_members(store: GraphStore, parcellation: str) -> pl.DataFrame:
    """`block`, `key` of the members of a parcellation's chosen blocks, by block and key."""
    text = (
        "MATCH (f:Feature)-[:MEMBER_OF]->(x:Block) WHERE x.parcellation = $parcellation WITH f, x MATCH (x)-[:PART_OF*0..9]->(b:Block)"
        " WHERE b.chosen RETURN DISTINCT b.key AS block, f.key AS key ORDER BY block, key"
    )
    return _typed(store.query(text, {"parcellation": parcellation}), {"block": _TEXT, "key": _TEXT})


def node_matches(store: GraphStore, keys: Collection[str]) -> pl.DataFrame:
    """The counterparts of nodes in other models or dictionaries, as `MATCHED`, the best first; an edge counts for both of its ends."""
    asked = (
        "MATCH (a:Feature)-[e:MATCHES]->(b:Feature) WHERE {}.key IN $keys RETURN {}.key AS key, {}.key AS other, e.method AS method,"
        " e.score AS score"
    )
    both = [_of_keys(store, asked.format(near, near, far), MATCHED, keys) for near, far in (("a", "b"), ("b", "a"))]
    return pl.concat(both).unique(maintain_order=True).sort(["key", "score", "other"], descending=[False, True, False], nulls_last=True)


def node_effects(store: GraphStore, keys: Collection[str]) -> pl.DataFrame:
    """What runs' metrics lose when a node alone is ablated, as `EFFECTS`."""
    text = (
        "MATCH (f:Feature)-[a:ABLATED]->(r:Run) WHERE f.key IN $keys RETURN f.key AS key, r.key AS run, a.metric AS metric,"
        " a.baseline AS baseline, a.effect AS effect, a.n AS n ORDER BY key, run, metric, baseline"
    )
    return _of_keys(store, text, EFFECTS, keys)


_CHOSEN = (
    "SELECT s.*, r.corpus, r.tokens FROM feature_statistics s JOIN runs r ON r.run = s.run WHERE r.status = 'done' AND r.basis = 'activation'"
    " AND s.key IN (SELECT unnest($keys)) QUALIFY row_number() OVER (PARTITION BY s.key ORDER BY r.finished DESC, r.run) = 1"
)


def node_moments(statistics: StatisticsStore, keys: Collection[str]) -> pl.DataFrame:
    """The moments of nodes over the corpus of the run over activations that was done last with them, as `MOMENTS`."""
    return _typed(statistics.query(f"{_CHOSEN} ORDER BY key", {"keys": sorted(set(keys))}), MOMENTS)


def all_moments(statistics: StatisticsStore) -> pl.DataFrame:
    """`node_moments` of every node that a run measured."""
    keys = statistics.query("SELECT DISTINCT s.key FROM feature_statistics s JOIN runs r ON r.run = s.run WHERE r.status = 'done'")
    return node_moments(statistics, keys["key"].to_list())


def node_contexts(statistics: StatisticsStore, keys: Collection[str], n: int) -> pl.DataFrame:
    """The `n` strongest places of each node in the runs that `node_moments` takes, as `PLACES`, by key and rank."""
    text = (
        f"SELECT m.key, c.rank, c.value, c.sequence_key, c.position, c.before, c.token, c.after FROM ({_CHOSEN}) m"
        " JOIN contexts c ON c.run = m.run AND c.site = m.site AND c.feature = m.feature WHERE c.rank < $n ORDER BY m.key, c.rank"
    )
    return _typed(statistics.query(text, {"keys": sorted(set(keys)), "n": n}), PLACES)


def sequence_places(statistics: StatisticsStore, sequences: Collection[str]) -> pl.DataFrame:
    """Windows of tokens of these sequences, by their keys, wherever a context was kept: `sequence_key, position, before, token, after`."""
    text = (
        "SELECT DISTINCT sequence_key, position, before, token, after FROM contexts WHERE sequence_key IN (SELECT unnest($keys))"
        " ORDER BY sequence_key, position"
    )
    schema = {name: PLACES[name] for name in ("sequence_key", "position", "before", "token", "after")}
    return _typed(statistics.query(text, {"keys": sorted(set(sequences))}), schema)


def swept(statistics: StatisticsStore) -> pl.DataFrame:
    """The sweeps that were written: `run, subject, baseline, n_values, n_sequences, n_sizes`, and lists `metrics, methods, tasks`."""
    return statistics.query(
        "SELECT run, subject, baseline, count(*) AS n_values, count(DISTINCT sequence) AS n_sequences, count(DISTINCT size) AS n_sizes,"
        " list_sort(list(DISTINCT metric)) AS metrics, list_sort(list(DISTINCT method)) AS methods, list_sort(list(DISTINCT task)) AS tasks"
        " FROM scores GROUP BY run, subject, baseline ORDER BY run, subject, baseline"
    )
