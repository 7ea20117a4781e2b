"""Circuits and whole graphs for other programs: networkx, igraph, GraphML (Gephi, yEd, Cytoscape), JSON of nodes and links, Parquet.

1. `circuit_frames` makes one frame of nodes and one of edges of a circuit; a node is a feature, or a feature at a position where positions
   were kept.
2. `to_networkx`, `to_igraph`, `write_graphml`, `write_node_link` give these frames another form.
3. `write_parquet` writes the whole graph of a store, a file for each label and type.

In the forms of graph libraries an edge's `weight` is its strength, never negative, since that is what their algorithms read under this name
(shortest paths, centralities, Louvain, Gephi's layouts); the signed effect is `effect`. Frames and Parquet keep the atlas' own names.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ..errors import UserError
from ..files import write_text
from ..model.sites import parse_site
from ..queries import schema
from ..queries.schema import SCHEMA_VERSION, EdgeType, NodeLabel
from ..queries.store import GraphStore
from ..queries.streaming import edge_blocks, node_blocks, typed
from .circuits import NO_POSITION, Circuit

if TYPE_CHECKING:
    import igraph
    import networkx

# colours of the nodes (red, green, blue), by what they are
COLOURS = {
    "embed": (148, 163, 184), "attn": (147, 51, 234), "mlp": (22, 163, 74), "resid": (37, 99, 235), "error": (120, 113, 108), "y": (217, 119, 6),
}  # fmt: skip
_ROW, _COLUMN = 200.0, 60.0  # distance of sites, and of nodes of a site, in a drawing

NODES = ("id", "key", "pos", "label", "site", "layer", "kind", "index", "role", "influence")
EDGES = ("source", "target", "weight", "effect", "share", "flow")


class OutputExists(UserError):
    """Files would be mixed with those of an earlier export."""


@dataclass(frozen=True)
class GraphFrames:
    """A directed graph: `nodes` with `NODES`, `edges` with `EDGES`, their ends the nodes' `id`; `weight` >= 0 is the strength, `effect` is signed.

    `about` says what it is a graph of, by name.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    about: dict[str, str]


def node_ids(key: pl.Expr, pos: pl.Expr) -> pl.Expr:
    """The key, or `key@position` where positions were kept."""
    return pl.when(pos == NO_POSITION).then(key).otherwise(pl.concat_str(key, pl.lit("@"), pos.cast(pl.String)))


def circuit_frames(circuit: Circuit, names: pl.DataFrame | None = None) -> GraphFrames:
    """The circuit's nodes and edges; `names` (`key`, `name`) gives the labels, without it a node is called by its site and index."""
    given = pl.DataFrame(schema={"key": pl.String, "name": pl.String}) if names is None else names.select("key", "name").unique("key")
    plain = pl.when(pl.col("kind") == "feature").then(pl.concat_str("site", pl.lit("/"), pl.col("index").cast(pl.String)))
    called = plain.when(pl.col("kind") == "error").then(pl.concat_str(pl.lit("error of "), "site")).otherwise(pl.col("site"))
    nodes = circuit.nodes.join(given, on="key", how="left", maintain_order="left").with_columns(
        pl.coalesce("name", called).alias("label"), node_ids(pl.col("key"), pl.col("pos")).alias("id")
    )
    edges = circuit.edges.select(
        node_ids(pl.col("source"), pl.col("src_pos")).alias("source"), node_ids(pl.col("target"), pl.col("dest_pos")).alias("target"),
        pl.col("strength").alias("weight"), pl.col("weight").alias("effect"), "share", "flow",
    )
    about = {"circuit": circuit.key, "run": circuit.selection.run, "description": circuit.selection.description}
    return GraphFrames(nodes.select(NODES), edges.select(EDGES), about)


def _frames(graph: Circuit | GraphFrames) -> GraphFrames:
    return circuit_frames(graph) if isinstance(graph, Circuit) else graph


def to_networkx(graph: Circuit | GraphFrames) -> "networkx.DiGraph":
    """A `networkx.DiGraph`: nodes by `id`, every column an attribute (nulls left out), what it is of under `graph.graph`."""
    import networkx

    frames = _frames(graph)
    made = networkx.DiGraph(**frames.about)
    made.add_nodes_from((row["id"], _present(row, "id")) for row in frames.nodes.iter_rows(named=True))
    made.add_edges_from((row["source"], row["target"], _present(row, "source", "target")) for row in frames.edges.iter_rows(named=True))
    return made


def to_igraph(graph: Circuit | GraphFrames) -> "igraph.Graph":
    """A directed `igraph.Graph`: `vs["name"]` is the node's `id`, every other column an attribute."""
    import igraph

    frames = _frames(graph)
    place = pl.DataFrame({"id": frames.nodes["id"], "place": np.arange(frames.nodes.height)})
    ends = frames.edges.select("source", "target")
    ends = ends.join(place.rename({"id": "source", "place": "from"}), on="source", maintain_order="left")
    ends = ends.join(place.rename({"id": "target", "place": "to"}), on="target", maintain_order="left")
    made = igraph.Graph(n=frames.nodes.height, edges=ends.select("from", "to").to_numpy(), directed=True, graph_attrs=dict(frames.about))
    for name in frames.nodes.columns:
        made.vs["name" if name == "id" else name] = frames.nodes[name].to_list()
    for name in (name for name in frames.edges.columns if name not in ("source", "target")):
        made.es[name] = frames.edges[name].to_list()
    return made


def _present(row: dict[str, Any], *without: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None and name not in without}


def drawn(frames: GraphFrames) -> pl.DataFrame:
    """A place, a colour and a size for each node, under the names that Gephi reads: `x`, `y` (a row for each site), `r`, `g`, `b`, `size`."""
    sites = frames.nodes["site"].unique(maintain_order=True).to_list()  # a circuit's nodes are sorted by site
    rows = pl.DataFrame({"site": sites, "row": np.arange(len(sites)), "stem": [parse_site(site).kind.value for site in sites]})
    nodes = frames.nodes.join(rows, on="site", how="left", maintain_order="left")
    stem = pl.when(pl.col("kind") == "error").then(pl.lit("error")).otherwise(pl.col("stem"))
    number = pl.int_range(pl.len()).over("site")
    colours = pl.DataFrame([{"stem": stem, "r": r, "g": g, "b": b} for stem, (r, g, b) in COLOURS.items()])
    return (
        nodes.select(
            ((number - (pl.len().over("site") - 1) / 2) * _COLUMN).alias("x"), (pl.col("row") * _ROW).alias("y"), stem.alias("stem"),
            (10.0 + 30.0 * pl.col("influence").fill_null(0).clip(0, 1).sqrt()).alias("size"),
        )
        .join(colours, on="stem", how="left", maintain_order="left")
        .drop("stem")
    )


def legal_xml(text: str) -> str:
    """The text with what no XML file may hold made visible: control characters as their pictures, others as �."""
    return "".join(character if _is_legal(code := ord(character)) else chr(0x2400 + code) if code < 32 else "\ufffd" for character in text)


def _is_legal(code: int) -> bool:
    return code in (0x9, 0xA, 0xD) or 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or 0x10000 <= code <= 0x10FFFF


def write_graphml(graph: Circuit | GraphFrames, path: Path) -> GraphFrames:
    """Write GraphML, with places, colours and sizes that Gephi reads; networkx and igraph read it back edge for edge. Returns what was written."""
    import networkx

    frames = _frames(graph)
    text = pl.selectors.string()
    pretty = frames.nodes.hstack(drawn(frames)).with_columns(text.map_elements(legal_xml, return_dtype=pl.String))
    ends = frames.edges.with_columns(pl.col("source", "target").map_elements(legal_xml, return_dtype=pl.String))
    written = GraphFrames(pretty, ends, {name: legal_xml(value) for name, value in frames.about.items()})
    networkx.write_graphml(to_networkx(written), path, named_key_ids=True)
    return frames


def write_node_link(graph: Circuit | GraphFrames, path: Path) -> GraphFrames:
    """Write networkx's JSON of nodes and links (`networkx.node_link_graph` reads it, and d3 does). Returns what was written."""
    import networkx

    frames = _frames(graph)
    content = networkx.node_link_data(to_networkx(frames), edges="links")
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return frames


def write_parquet(store: GraphStore, folder: Path) -> tuple[int, int]:
    """Write the whole graph as `nodes/LABEL.parquet` and `edges/TYPE.parquet` with `graph.json`; how many nodes and edges there are.

    Rows go in blocks, which bounds the memory: edges by blocks of their sources, in each as `GraphStore.read_edges` orders
    them. The folder is made, and must not hold anything (`OutputExists`); it appears whole or not at all.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExists(f"{folder} is there already: name a new folder for the graph's files")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    counts: dict[str, dict[str, int]] = {}
    try:
        tables: dict[str, Mapping[str, NodeLabel | EdgeType]] = {"nodes": dict(schema.NODES), "edges": dict(schema.EDGES)}
        for what, blocks in (("nodes", node_blocks), ("edges", edge_blocks)):
            (part / what).mkdir(parents=True)
            counts[what] = {}
            for name, table in tables[what].items():
                counts[what][name] = _write_blocks((rows for (rows,) in blocks(name, store)), table, part / what / f"{name}.parquet")
        (part / "graph.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, **counts}, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sum(counts["nodes"].values()), sum(counts["edges"].values())


def _write_blocks(blocks: Iterable[pl.DataFrame], table: NodeLabel | EdgeType, path: Path) -> int:
    """One Parquet file of a label's or type's rows, a row group a block; how many rows there are."""
    from pyarrow import parquet

    arrow = lambda frame: frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    empty, n = typed(pl.DataFrame(), table), 0
    with parquet.ParquetWriter(path, arrow(empty).schema, compression="zstd") as file:
        for block in blocks:
            file.write_table(arrow(typed(block, table)))
            n += block.height
    return n
