"""What a query answered, for a page: its rows, and the graph that is in them.

The graph is made of

1. the nodes, relationships and paths that stand in the cells, however deep in lists and maps;
2. the keys in columns that are called so (`source` and `target` are then an edge, a `path` several), where the graph has nodes of these keys;
3. the ends of relationships that were returned without them.

Nodes are named by their label and key, since a key is unique within its label only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..queries.library import nodes_by_key
from ..queries.schema import EDGES
from ..queries.store import Answer, GraphStore
from .source import Page

MOST_NODES, MOST_EDGES = 1_500, 4_000
NODE_COLUMNS = ("key", "feature", "source", "target", "circuit", "run", "block", "region", "community", "partition", "sequence")
WEIGHT_COLUMNS = ("weight", "effect", "strength", "abs_weight", "score", "r")
LARGEST_INTEGER = 2**53 - 1  # beyond it a browser's numbers are not exact
_PATH = " > "


@dataclass
class _Drawing:
    """The graph of an answer while it is gathered: nodes by (label, key), edges with their ends' keys."""

    nodes: dict[tuple[str, str], Page] = field(default_factory=dict)
    edges: list[dict[str, Any]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def add_node(self, label: str, properties: Mapping[str, Any]) -> None:
        key = properties.get("key")
        if isinstance(key, str):
            self.nodes.setdefault((label, key), _node(label, properties))

    def add_edge(self, type: str, source: object, target: object, properties: Mapping[str, Any]) -> None:
        identity = repr((type, source, target, sorted(properties.items(), key=lambda item: item[0])))
        if isinstance(source, str) and isinstance(target, str) and identity not in self.seen:
            self.seen.add(identity)
            self.edges.append({"source": source, "target": target, "type": type, "properties": dict(properties)})


def answer_page(store: GraphStore, answer: Answer) -> Page:
    """`columns`, `rows`, whether they were `cut`, and the `graph` in them: `nodes` and `edges`, and whether that was cut."""
    rows = [list(row) for row in zip(*answer.columns)]
    return {
        "columns": list(answer.names), "rows": [[exact(value) for value in row] for row in rows], "cut": answer.cut,
        "graph": graph_of(store, answer.names, rows),
    }


def graph_of(store: GraphStore, names: Sequence[str], rows: Sequence[Sequence[object]]) -> Page:
    """The graph in the rows of an answer: `nodes`, `edges` (by the nodes' ids) and `cut`."""
    drawing = _Drawing()
    for row in rows:
        for value in row:
            _gather(drawing, value)
    keyed = list(_keyed_rows(names, rows))
    wanted = {end for edge in drawing.edges for end in (edge["source"], edge["target"])} | {key for keys, _ in keyed for key in keys}
    _add_nodes(store, drawing, wanted - {key for _, key in drawing.nodes})
    _add_rows(drawing, keyed)
    return _page(drawing)


def exact(value: object) -> object:
    """A value whose whole numbers a browser reads as they are: larger ones are text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) <= LARGEST_INTEGER else str(value)
    if isinstance(value, Mapping):
        return {name: exact(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(item) for item in value]
    return value


def _gather(drawing: _Drawing, value: object) -> None:
    """Nodes, relationships and paths of a cell; see `store.rendered_node` for their shape."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            properties = value.get("properties")
            if isinstance(properties, Mapping) and isinstance(value.get("label"), str):
                drawing.add_node(str(value["label"]), properties)
            elif isinstance(properties, Mapping) and isinstance(value.get("type"), str):
                drawing.add_edge(str(value["type"]), value.get("source"), value.get("target"), properties)
            else:
                waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value


def _keyed_rows(names: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[tuple[list[str], dict[str, object]]]:
    """Each row that has keys in columns called so: those keys, and the row by its columns' names."""
    if not {*NODE_COLUMNS, "path"} & set(names):
        return
    for row in rows:
        named = dict(zip(names, row))
        path = named.get("path")
        keys = path.split(_PATH) if isinstance(path, str) and _PATH in path else []
        yield keys + [value for name in NODE_COLUMNS if isinstance(value := named.get(name), str)], named


def _add_nodes(store: GraphStore, drawing: _Drawing, keys: Iterable[str]) -> None:
    """The nodes of these keys that the graph has; more than can be drawn are not asked for."""
    wanted = sorted(keys)[: 2 * MOST_NODES]
    for label, properties in nodes_by_key(store, wanted):
        drawing.add_node(label, properties)


def _add_rows(drawing: _Drawing, keyed: Iterable[tuple[list[str], dict[str, object]]]) -> None:
    """Edges of rows that have a source and a target, or a path."""
    for _, named in keyed:
        path, weights = named.get("path"), named.get("weights")
        if isinstance(named.get("source"), str) and isinstance(named.get("target"), str):
            plain = {name: value for name, value in named.items() if name not in ("source", "target") and not isinstance(value, (dict, list))}
            weight = next((value for name in WEIGHT_COLUMNS if isinstance(value := named.get(name), (int, float))), None)
            drawing.add_edge("row", named["source"], named["target"], plain if weight is None else {**plain, "weight": weight})
        elif isinstance(path, str) and _PATH in path:
            nodes = path.split(_PATH)
            known = weights if isinstance(weights, list) and len(weights) == len(nodes) - 1 else [None] * (len(nodes) - 1)
            for source, target, weight in zip(nodes, nodes[1:], known):
                drawing.add_edge("path", source, target, {} if weight is None else {"weight": weight})


def _page(drawing: _Drawing) -> Page:
    """The nodes with their ids, and the edges whose ends are among them; an end is of a label that the edge's type may join."""
    kept = dict(list(drawing.nodes.items())[:MOST_NODES])
    labels: dict[str, list[str]] = {}
    for label, key in kept:
        labels.setdefault(key, []).append(label)
    edges = []
    for edge in drawing.edges:
        ends = [_end(labels, edge, side) for side in ("source", "target")]
        if None not in ends:
            edges.append({**edge, "source": ends[0], "target": ends[1], "properties": exact(edge["properties"])})
    cut = len(kept) < len(drawing.nodes) or len(edges) > MOST_EDGES
    return {"nodes": list(kept.values()), "edges": edges[:MOST_EDGES], "cut": cut}


def _end(labels: Mapping[str, Sequence[str]], edge: Mapping[str, Any], side: str) -> str | None:
    known = labels.get(edge[side], ())
    if edge["type"] in EDGES:
        allowed = {ends[side == "target"] for ends in EDGES[edge["type"]].ends}
        known = [label for label in known if label in allowed]
    return _id(known[0], edge[side]) if known else None


def _node(label: str, properties: Mapping[str, Any]) -> Page:
    key = str(properties["key"])
    return {"id": _id(label, key), "key": key, "label": label, "name": _name(label, properties), "properties": exact(properties)}


def _id(label: str, key: str) -> str:
    return f"{label}:{key}"


def _name(label: str, properties: Mapping[str, Any]) -> str:
    """What a node is called in a drawing: its label, else what its properties say."""
    key = str(properties["key"])
    own = properties.get("label") or properties.get("automatic_label")
    if own:
        return str(own)
    site = properties.get("site")
    if label == "Feature":
        kind = properties.get("kind")
        return f"{site}/{properties.get('index')}" if kind == "feature" else f"error of {site}" if kind == "error" else str(site or key)
    if label == "Block" and site is not None:
        return f"{properties.get('kind')} {properties.get('index')} of {site}" if site else f"{properties.get('kind')} {properties.get('index')}"
    if label == "Score" and properties.get("kind"):
        value = properties.get("value")
        return f"{properties['kind']} {value:.3g}" if isinstance(value, float) else str(properties["kind"])
    if label == "Circuit":
        return f"{properties.get('task') or 'circuit'}, {properties['n_edges']} edges" if properties.get("n_edges") else key[:12]
    for name in ("name", "task", "clean", "site", "kind"):
        if properties.get(name):
            return str(properties[name])
    return key[:12]
