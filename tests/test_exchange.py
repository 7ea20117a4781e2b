"""Circuits for networkx, igraph, GraphML and JSON, and graphs as Parquet: what is read back is what was written, edge for edge."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import igraph
import networkx
import polars as pl
import pytest
from featlas.analysis.circuits import NO_POSITION, Circuit, Selection
from featlas.analysis.exchange import (
    OutputExists,
    circuit_frames,
    drawn,
    legal_xml,
    to_igraph,
    to_networkx,
    write_graphml,
    write_node_link,
    write_parquet,
)
from featlas.queries.schema import EDGES, NODES
from featlas.queries.store import GraphStore

from .layered_circuit import layered_circuit
from .study_atlas import TinyAtlas

HOSTILE = {"a": "bell \x07, null \x00", "b": "<b>&amp;\"'", "c": "日本 🦊 \ud800", "y": "line\nbreak\ttab"}


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return layered_circuit(threshold=1.0)[0]


def by_hand(circuit: Circuit) -> dict[tuple[str, str], tuple[float, float]]:
    """Strength and signed effect of each edge."""
    rows = circuit.edges.iter_rows(named=True)
    return {(row["source"], row["target"]): (row["strength"], row["weight"]) for row in rows}


def hostile_circuit() -> Circuit:
    """Three nodes with positions and names that XML cannot hold, and an edge that lowers."""
    kinds = ("feature", "error", "feature", "output")
    nodes = pl.DataFrame(
        {
            "key": ["a", "b", "c", "y"], "pos": [0, 1, 1, 2], "site": ["embed", "embed", "mlp_0", "y"], "layer": [-1, -1, 0, -1], "kind": kinds,
            "index": [4, -1, 7, -1], "role": ["input", "input", "inner", "output"], "influence": [0.25, 0.25, 0.5, 1.0],
        }
    )  # fmt: skip
    edges = pl.DataFrame(
        {
            "source": ["a", "b", "c"], "target": ["c", "c", "y"], "src_pos": [0, 1, 1], "dest_pos": [1, 1, 2], "weight": [0.5, -0.5, -2.0],
            "strength": [0.5, 0.5, 2.0], "share": [0.5, 0.5, 1.0], "flow": [0.25, 0.25, 1.0],
        }
    )  # fmt: skip
    return Circuit(Selection("r", sequence="s", positions=True), nodes, edges)


def test_networkx_and_igraph_hold_the_same_graph(circuit: Circuit) -> None:
    expected = by_hand(circuit)
    graph = to_networkx(circuit)
    assert {(u, v): (d["weight"], d["effect"]) for u, v, d in graph.edges(data=True)} == expected
    assert graph.graph["run"] == "a-run"
    other = to_igraph(circuit)
    names = other.vs["name"]
    assert {(names[e.source], names[e.target]): (e["weight"], e["effect"]) for e in other.es} == expected
    assert other.is_directed()
    assert set(names) == set(graph) == set(circuit.nodes["key"])
    assert dict(zip(names, other.vs["site"])) == dict(graph.nodes(data="site"))
    assert other.is_dag()


def test_weights_suit_the_algorithms_of_graph_libraries(circuit: Circuit) -> None:
    assert min(data["weight"] for *_, data in to_networkx(circuit).edges(data=True)) >= 0
    assert min(data["effect"] for *_, data in to_networkx(circuit).edges(data=True)) < 0
    assert len(networkx.community.louvain_communities(to_networkx(circuit).to_undirected(), weight="weight", seed=0)) >= 1


def test_graphml_is_read_back_by_networkx_and_igraph(circuit: Circuit, tmp_path: Path) -> None:
    path = tmp_path / "circuit.graphml"
    write_graphml(circuit, path)
    expected = by_hand(circuit)
    graph = networkx.read_graphml(path)
    assert {(u, v): (d["weight"], d["effect"]) for u, v, d in graph.edges(data=True)} == expected
    other = igraph.Graph.Read_GraphML(str(path))
    names = other.vs["id"]
    assert {(names[e.source], names[e.target]): (e["weight"], e["effect"]) for e in other.es} == expected
    assert {"label", "site", "kind", "layer", "role", "influence", "x", "y", "size", "r", "g", "b"} <= set(other.vs.attributes())


def test_graphml_survives_names_that_xml_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "hostile.graphml"
    named = {key: name.replace("\ud800", "") for key, name in HOSTILE.items()}  # no frame holds half a character
    frames = circuit_frames(hostile_circuit(), pl.DataFrame({"key": list(named), "name": list(named.values())}))
    write_graphml(frames, path)
    ElementTree.parse(path)
    graph = networkx.read_graphml(path)
    assert dict(graph.nodes(data="label")) == {
        "a@0": "bell ␇, null ␀", "b@1": "<b>&amp;\"'", "c@1": "日本 🦊 ", "y@2": "line\nbreak\ttab"
    }  # fmt: skip
    assert [(u, v, d["effect"]) for u, v, d in graph.edges(data=True)] == [("a@0", "c@1", 0.5), ("b@1", "c@1", -0.5), ("c@1", "y@2", -2.0)]
    assert legal_xml(HOSTILE["c"]) == "日本 🦊 \ufffd"


def test_a_drawing_has_a_row_for_each_site() -> None:
    frames = circuit_frames(hostile_circuit())
    places = drawn(frames)
    assert places["y"].to_list() == [0.0, 0.0, 200.0, 400.0]
    assert places["x"].to_list() == [-30.0, 30.0, 0.0, 0.0]
    assert places["size"].to_list() == pytest.approx([25.0, 25.0, 10 + 30 * 0.5**0.5, 40.0])
    assert frames.nodes["label"].to_list() == ["embed/4", "error of embed", "mlp_0/7", "y"]


def test_node_link_json_is_networkx_own(circuit: Circuit, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    write_node_link(circuit, path)
    graph = networkx.node_link_graph(json.loads(path.read_text(encoding="utf-8")), edges="links")
    assert networkx.utils.graphs_equal(graph, to_networkx(circuit))


def test_positions_tell_nodes_apart_and_their_absence_does_not(circuit: Circuit) -> None:
    assert circuit_frames(hostile_circuit()).nodes["id"].to_list() == ["a@0", "b@1", "c@1", "y@2"]
    assert circuit_frames(circuit).nodes["id"].to_list() == circuit.nodes["key"].to_list()
    assert set(circuit.nodes["pos"]) == {NO_POSITION}


def test_parquet_holds_the_whole_graph(store: GraphStore, tmp_path: Path) -> None:
    folder = tmp_path / "graph"
    n_nodes, n_edges = write_parquet(store, folder)
    told = json.loads((folder / "graph.json").read_text())
    assert (sum(told["nodes"].values()), sum(told["edges"].values())) == (n_nodes, n_edges)
    assert {path.stem for path in (folder / "nodes").iterdir()} == set(NODES)
    assert {path.stem for path in (folder / "edges").iterdir()} == set(EDGES)
    for type in ("ATTRIBUTES", "INFLUENCES"):
        read = pl.read_parquet(folder / "edges" / f"{type}.parquet")
        assert read.height > 0
        assert read.equals(store.read_edges(type))
    assert pl.read_parquet(folder / "nodes" / "Feature.parquet").height == store.query("MATCH (f:Feature) RETURN count(*) AS n")["n"].item()
    with pytest.raises(OutputExists, match="graph"):
        write_parquet(store, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


@pytest.mark.slow
def test_the_command_writes_each_format(featlas: Callable[..., tuple[int, str, str]], tiny: TinyAtlas, tmp_path: Path) -> None:
    atlas = tiny.copied(tmp_path)
    chosen = ("--run", tiny.runs["main"], "--edges", 20, "--atlas", atlas)
    for format, name in (("graphml", "c.graphml"), ("networkx-json", "c.json"), ("circuit-tracer", "ct.json")):
        code, out, err = featlas("export", tmp_path / name, "--format", format, *chosen, "--json")
        assert code == 0, err
        told = json.loads(out)
        assert told["n_edges"] > 0
    graph = networkx.read_graphml(tmp_path / "c.graphml")
    assert graph.number_of_edges() == len(json.loads((tmp_path / "c.json").read_text())["links"]) == told["n_edges"]
    code, out, err = featlas("export", tmp_path / "all", "--format", "parquet", "--atlas", atlas)
    assert (code, "nodes" in out) == (0, True), err
    code, out, err = featlas("export", tmp_path / "import-files", "--atlas", atlas)
    assert (code, (tmp_path / "import-files" / "import.args").exists()) == (0, True), err
