"""What a graph holds that is no atlas' own: tables, labels, types and properties that its user made beside it."""

from .neo4j_browser import is_of_the_browser
from .schema import EDGES, NODES, EdgeType, NodeLabel
from .store import GraphStore

_TABLES: list[NodeLabel | EdgeType] = [*NODES.values(), *EDGES.values()]
_KNOWN = {table.name: set(table.all_columns) for table in _TABLES}


def foreign_parts(store: GraphStore) -> list[str]:
    """Names such as `Note` (a label, type or table), `Feature.comment` (a property): what `atlas copy` and compaction do not bring along."""
    return sorted(_of_server(store) if store.dialect == "neo4j" else _of_file(store))


def _of_file(store: GraphStore) -> list[str]:
    names = store.query("CALL show_tables() RETURN name")["name"].to_list()
    found = [name for name in names if name not in _KNOWN]
    for name in sorted(set(names) & set(_KNOWN)):
        columns = store.query(f"CALL table_info('{name}') RETURN name")["name"].to_list()
        found += [f"{name}.{column}" for column in columns if column not in _KNOWN[name]]
    for kind in ("macros", "sequences"):
        found += [str(name) for name in store.query(f"CALL show_{kind}() RETURN name")["name"].to_list()]
    return found


def _of_server(store: GraphStore) -> list[str]:
    """Reads every node and edge once, in the server; the labels and types of `featlas neo4j browser` are the package's own."""
    labels = store.query("CALL db.labels() YIELD label RETURN label AS name")["name"].to_list()
    types = store.query("CALL db.relationshipTypes() YIELD relationshipType RETURN relationshipType AS name")["name"].to_list()
    found = [name for name in (*labels, *types) if name not in _KNOWN and not is_of_the_browser(name)]
    for pattern, names in (("(x:{})", NODES), ("()-[x:{}]->()", EDGES)):
        for name in names:
            rows = store.query(f"MATCH {pattern.format(name)} UNWIND keys(x) AS name RETURN DISTINCT name")
            found += [f"{name}.{column}" for column in rows["name"].to_list() if column not in _KNOWN[name]]
    return found
