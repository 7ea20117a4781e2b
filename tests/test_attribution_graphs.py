"""Attribution graphs of circuit-tracer: read, imported as a run, asked in Cypher, and written so that its viewer opens them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from featlas.analysis.attribution_graphs import GraphSource, TokensMissing, attribution_graph, graph_source, write_attribution_graph
from featlas.analysis.circuits import By, Circuit, Selection, read_circuit, run_circuit, write_circuit
from featlas.ingest.attribution_graphs import DifferentModels, ImportOptions, SameSequence, import_attribution_graphs
from featlas.model.attribution_graphs import (
    BadAttributionGraph,
    NotAnAttributionGraph,
    pairing,
    parse_attribution_graph,
    read_attribution_graph,
    unpaired,
)
from featlas.queries.library import run_query
from featlas.queries.store import GraphStore, open_graph
from featlas.queries.subgraphs import find_run, run_sequences

from .attribution_graph_files import PROMPT, cross_layer, error, paired, saved, texas, with_attention
from .layered_circuit import layered_circuit as named_circuit

EDGE = ["source", "target", "src_pos", "dest_pos", "weight"]


def layered_circuit(**options: Any) -> tuple[Circuit, pl.DataFrame]:
    """A random circuit whose indices are numbers, as a run's are."""
    circuit, notes = named_circuit(**options)
    index = pl.when(pl.col("kind") == "feature").then("index").otherwise(pl.lit("-1")).cast(pl.Int64)
    return Circuit(circuit.selection, circuit.nodes.with_columns(index.alias("index")), circuit.edges), notes


# ---- reading


def test_pairing_is_the_walk_along_diagonals_and_its_inverse_is_exact() -> None:
    cases = [(x, y) for x in range(12) for y in range(40)]
    assert [pairing(x, y) for x, y in cases] == [paired(x, y) for x, y in cases]
    assert pairing(24, 11048) == 61311176  # as a file of gemma-3-1b has it
    large = [(0, 0), (61, 10**9), (10**9, 3), (25, 2**40)]  # past what a double tells apart
    assert [unpaired(pairing(*case)) for case in [*cases, *large]] == [*cases, *large]


def test_per_layer_transcoders_are_read(tmp_path: Path) -> None:
    graph = read_attribution_graph(saved(texas(), tmp_path / "g.json"))
    rows = {row["node_id"]: row for row in graph.nodes.iter_rows(named=True)}
    assert (graph.slug, graph.scan, graph.tokens, graph.n_layers) == ("texas", "gemma-2-2b", PROMPT, 26)
    told = {name: tuple(row[c] for c in ("site", "layer", "kind", "index", "pos", "label")) for name, row in rows.items()}
    assert told == {
        "E_6037_2": ("embed", -1, "feature", 6037, 2, " capital"), "E_9447_4": ("embed", -1, "feature", 9447, 4, " Texas"),
        "3_15928_2": ("mlp_3", 3, "feature", 15928, 2, "capitals"), "20_15589_5": ("mlp_20", 20, "feature", 15589, 5, 'say "Austin" <city> & co'),
        "11_-1_4": ("mlp_11", 11, "error", -1, 4, "error"), "27_22605_5": ("y", -1, "output", 22605, 5, " Austin"),
        "27_26865_5": ("y", -1, "output", 26865, 5, " Dallas"),
    }  # fmt: skip
    assert rows["27_22605_5"]["token_prob"] == pytest.approx(0.41)
    assert graph.links.height == 8


def test_indices_without_pairing_and_attention_are_read() -> None:
    plain = parse_attribution_graph(cross_layer())
    assert plain.nodes.filter(pl.col("kind") == "feature").select("site", "index").rows() == [("embed", 2), ("mlp_0", 253), ("mlp_7", 81)]
    attention = parse_attribution_graph(with_attention())
    assert attention.nodes.select("site", "kind", "index").rows() == [
        ("attn_2", "feature", 9), ("mlp_2", "feature", 7), ("attn_2", "error", -1), ("y", "output", 5)
    ]  # fmt: skip


def test_a_feature_named_by_its_pairing_alone_is_found() -> None:
    content = texas()
    for node in content["nodes"]:
        old = node["node_id"]
        node["node_id"] = f"node {old}"
        for link in content["links"]:
            link.update({end: node["node_id"] for end in ("source", "target") if link[end] == old})
    graph = parse_attribution_graph(content)
    assert graph.nodes.filter(pl.col("site") == "mlp_20")["index"].to_list() == [15589]


def test_control_characters_stand_in_no_label() -> None:
    content = texas()
    content["nodes"][2]["clerp"] = "cap\x01it\x7fals\u009f\ttwo"
    content["nodes"][3]["clerp"] = "\x02"
    content["metadata"]["prompt_tokens"][2] = "\x03"
    labels = parse_attribution_graph(content, "texas.json").nodes["label"].to_list()
    assert labels[2] == "capitals\u009f\ttwo"
    assert labels[3] is None
    assert labels[0] == "␃"


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = copy.deepcopy(texas())
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["nodes"][2].update(feature=1), "neither 15928 nor the pairing of 3 and 15928"),
        (lambda c: c["nodes"][2].update(feature_type="unheard of"), "unheard of"),
        (lambda c: c["nodes"][2].update(ctx_idx=6), "position 6"),
        (lambda c: c["nodes"][2].update(layer="x"), "layer 'x'"),
        (lambda c: c["links"][0].update(source="nowhere"), "nowhere"),
        (lambda c: c["links"][0].update(weight=float("nan")), "finite weight"),
        (lambda c: c["links"].append(c["links"][0]), "twice"),
        (lambda c: c["links"].append({"source": "20_15589_5", "target": "3_15928_2", "weight": 1.0}), "later"),
        (lambda c: c["nodes"].append({**error(15928, 2), "node_id": "3_15928_2"}), "two nodes"),
        (lambda c: c["nodes"].clear(), "no nodes"),
        (lambda c: c["nodes"][2].update(node_id=f"3_{10**30}_2", feature=10**30), "no model has"),
        (lambda c: c["nodes"][2].update(node_id="999999999_7_2", layer="999999999", feature=pairing(999999999, 7)), "no model has"),
        (lambda c: c["nodes"][2].update(featlas={"key": "k", "site": "mlp_3", "kind": "odd", "index": 1, "pos": 2}), "kind 'odd'"),
        (lambda c: c["nodes"][2].update(featlas={"key": "k", "site": "mlp_3", "kind": "feature", "index": 1, "pos": 99}), "position 99"),
        (lambda c: c["metadata"].update(featlas={"model": 5}), "by name"),
        (lambda c: c["metadata"].update(featlas={"roots": "embed"}), "list of roots"),
        (lambda c: c["metadata"].update(schema_version="new"), "schema_version 'new'"),
    ],
)
def test_files_that_contradict_themselves_are_refused_with_the_place(change: Callable[[dict[str, Any]], object], said: str) -> None:
    with pytest.raises(BadAttributionGraph, match=said):
        parse_attribution_graph(broken(change))


@pytest.mark.parametrize("field", ["metadata", "nodes", "links"])
def test_other_json_is_refused(field: str) -> None:
    content = texas()
    del content[field]
    with pytest.raises(NotAnAttributionGraph, match=field):
        parse_attribution_graph(content)
    for other in ([], "text", {"metadata": [], "nodes": [], "links": []}):
        with pytest.raises(NotAnAttributionGraph):
            parse_attribution_graph(other)


@pytest.mark.parametrize(
    ("text", "said"),
    [("[" * 100_000, "too deep"), (json.dumps(texas()).replace('"slug": "', '"slug": "\\ud800'), "half a character"), ("[1", "not JSON")],
)
def test_text_that_no_graph_can_be_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(text)
    with pytest.raises(NotAnAttributionGraph, match=said):
        read_attribution_graph(path)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    pickled = tmp_path / "graph.pt"
    pickled.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(NotAnAttributionGraph, match="create_graph_files"):
        read_attribution_graph(pickled)
    with pytest.raises(NotAnAttributionGraph, match="no such file"):
        read_attribution_graph(tmp_path / "none.json")


# ---- importing


@pytest.fixture
def graph(tmp_path: Path) -> GraphStore:
    with open_graph(tmp_path / "graph.lbug") as store:
        yield store


def test_two_files_are_one_run_with_their_means(graph: GraphStore, tmp_path: Path) -> None:
    files = [saved(texas(), tmp_path / "a.json"), saved(texas(3.0, slug="again"), tmp_path / "b.json")]
    summary = import_attribution_graphs(graph, files)
    assert (summary.n_sequences, summary.n_new, summary.n_nodes, summary.n_edges, summary.n_influences) == (2, 2, 7, 16, 8)
    run = find_run(graph)
    assert (run.model, run.properties["method"], run.properties["status"]) == ("gemma-2-2b@circuit-tracer", "circuit-tracer", "done")
    assert run.dictionaries == {"embed": "tokens", "mlp_11": "gemma-2-2b", "mlp_20": "gemma-2-2b", "mlp_3": "gemma-2-2b"}
    influence = graph.read_edges("INFLUENCES", run=run.key)
    strongest = influence.sort("abs_weight").row(-1, named=True)
    assert (strongest["weight"], strongest["max_weight"], strongest["n"], strongest["variance"]) == (8.0, 12.0, 2, 16.0)  # of 4 and 12
    assert strongest["source"] == "gemma-2-2b@circuit-tracer|gemma-2-2b|mlp_20|15589"
    positions = graph.read_edges("ATTRIBUTES", run=run.key).filter(pl.col("weight") == 0.75).select("src_pos", "dest_pos").row(0)
    assert positions == (4, 5)
    texts = run_sequences(graph, run.key).select("task", "clean", "answer").rows()
    assert texts == [("circuit-tracer", "".join(PROMPT), " Austin")] * 2


def test_importing_again_changes_nothing(graph: GraphStore, tmp_path: Path) -> None:
    path = saved(texas(), tmp_path / "a.json")
    first = import_attribution_graphs(graph, [path])
    graph.query("MATCH (f:Feature) WHERE f.site = 'mlp_3' SET f.label = 'mine'", write=True)
    before = [graph.read_edges(type) for type in ("ATTRIBUTES", "INFLUENCES", "ON_SEQUENCE", "OF_MODEL")]
    second = import_attribution_graphs(graph, [path])
    assert (first.run, first.n_new, second.n_new) == (second.run, 1, 0)
    after = [graph.read_edges(type) for type in ("ATTRIBUTES", "INFLUENCES", "ON_SEQUENCE", "OF_MODEL")]
    assert all(a.equals(b) for a, b in zip(before, after))
    assert graph.query("MATCH (f:Feature) WHERE f.label = 'mine' RETURN count(*) AS n")["n"].item() == 1


def test_circuits_and_named_queries_work_on_an_import(graph: GraphStore, tmp_path: Path) -> None:
    summary = import_attribution_graphs(graph, [saved(texas(), tmp_path / "a.json")])
    run = find_run(graph)
    circuit = run_circuit(graph, run, Selection(run.key))
    assert circuit.n_edges == 8
    roles = dict(circuit.nodes.group_by("role").agg(pl.len()).iter_rows())
    assert roles == {"input": 3, "inner": 2, "output": 2}  # tokens and the error node are inputs: nothing enters them
    key = write_circuit(graph, circuit)
    assert read_circuit(graph, key).nodes.equals(circuit.nodes)
    assert run_query(graph, "top_edges", {"run": summary.run})["weight"][0] == 4.0
    assert run_query(graph, "find_features", {"text": "Austin"}).height >= 1


def test_what_a_file_says_of_its_transcoders_is_kept(graph: GraphStore, tmp_path: Path) -> None:
    content = texas(info={"transcoder_set": "mwhanna/gemma-scope"}, slug="set")
    import_attribution_graphs(graph, [saved(content, tmp_path / "a.json")], ImportOptions(model="gemma-2-2b@main"))
    run = find_run(graph)
    assert (run.model, run.dictionaries["mlp_3"]) == ("gemma-2-2b@main", "mwhanna/gemma-scope")


def test_files_that_are_no_one_run_are_refused_and_nothing_is_written(graph: GraphStore, tmp_path: Path) -> None:
    a, b = saved(texas(), tmp_path / "a.json"), saved(cross_layer(), tmp_path / "b.json")
    with pytest.raises(DifferentModels, match="clt@circuit-tracer"):
        import_attribution_graphs(graph, [a, b])
    with pytest.raises(SameSequence, match="texas"):
        import_attribution_graphs(graph, [a, a])
    with pytest.raises(DifferentModels, match="mlp_11"):
        import_attribution_graphs(graph, [a, saved(texas(slug="o", info={"transcoder_set": "other"}), tmp_path / "c.json")])
    assert graph.query("MATCH (n) WHERE n.key <> 'schema_version' RETURN count(*) AS n")["n"].item() == 0


# ---- writing


def fits_the_format(content: dict[str, Any]) -> None:
    """What circuit-tracer's models and Neuronpedia's schema ask of a file, and what the viewer's code needs besides."""
    metadata = content["metadata"]
    assert all(isinstance(metadata[name], str) for name in ("slug", "scan", "prompt"))
    assert all(isinstance(token, str) for token in metadata["prompt_tokens"])
    assert isinstance(metadata["transcoder_list"], list)
    assert set(content["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    ids, features = set(), set()
    for node in content["nodes"]:
        types = {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "jsNodeId": str, "clerp": str}
        assert all(isinstance(node[name], type) for name, type in types.items()), node
        assert node["feature_type"] in ("cross layer transcoder", "mlp reconstruction error", "embedding", "logit")
        assert 0 <= node["ctx_idx"] < len(metadata["prompt_tokens"])
        assert node["layer"] == "E" or int(node["layer"]) >= 0
        assert node["influence"] is None or 0 <= node["influence"] <= 1
        assert node["feature_type"] != "logit" or "(p=" in node["clerp"]  # the viewer reads the probability from here
        ids.add(node["node_id"])
        features.add((node["layer"], node["feature"], node["ctx_idx"]))  # the viewer takes these for one feature
    assert len(ids) == len(features) == len(content["nodes"])
    # the viewer leaves out features that are at more than two thirds of the positions
    assert len(metadata["prompt_tokens"]) * 2 / 3 > 1
    assert all(link["source"] in ids and link["target"] in ids and isinstance(link["weight"], float) for link in content["links"])


def test_a_circuit_of_means_is_written_and_comes_back_edge_for_edge(graph: GraphStore, tmp_path: Path) -> None:
    circuit, notes = layered_circuit(threshold=1.0)
    known = circuit.nodes.select("key", pl.lit("d").alias("dictionary")).join(notes.select("key", "name"), on="key")
    path = write_attribution_graph(circuit, GraphSource("m@1", "all of it", known), tmp_path / "files", "all-of-it")
    content = json.loads(path.read_text(encoding="utf-8"))
    fits_the_format(content)
    assert {node["layer"] for node in content["nodes"]} == {"0", "4", "8", "12", "16", "18"}  # a site a layer: rows are layers
    import_attribution_graphs(graph, [path])
    edges = graph.read_edges("ATTRIBUTES").select(EDGE)
    assert edges.equals(circuit.edges.select(EDGE).sort("source", "target"))
    listed = json.loads((tmp_path / "files" / "graph-metadata.json").read_text())["graphs"]
    assert [entry["slug"] for entry in listed] == ["all-of-it"]


def test_imported_positions_and_probabilities_go_out_again(graph: GraphStore, tmp_path: Path) -> None:
    import_attribution_graphs(graph, [saved(texas(), tmp_path / "a.json")])
    run = find_run(graph)
    sequence = run_sequences(graph, run.key)["key"].item()
    circuit = run_circuit(graph, run, Selection(run.key, sequence=sequence, positions=True))
    source = graph_source(graph, None, circuit)
    content = attribution_graph(circuit, source, "again")
    fits_the_format(content)
    assert content["metadata"]["prompt_tokens"] == list(PROMPT)
    original = {frozenset((link["weight"], *sorted(_place(texas(), link)))) for link in texas()["links"]}
    assert {frozenset((link["weight"], *sorted(_place(content, link)))) for link in content["links"]} == original
    assert {node["clerp"] for node in content["nodes"] if node["feature_type"] == "logit"} == {
        'Output " Austin" (p=0.410)', 'Output " Dallas" (p=0.020)'
    }  # fmt: skip
    with open_graph(tmp_path / "other.lbug") as other:
        import_attribution_graphs(other, [saved(content, tmp_path / "b.json")])
        assert other.read_edges("ATTRIBUTES").select(EDGE).equals(graph.read_edges("ATTRIBUTES").select(EDGE))


def _place(content: dict[str, Any], link: dict[str, Any]) -> list[str]:
    """Where a link's ends are: type and position."""
    nodes = {node["node_id"]: node for node in content["nodes"]}
    return [f"{end} {nodes[link[end]]['feature_type']} {nodes[link[end]]['ctx_idx']}" for end in ("source", "target")]


def test_sites_that_share_a_layer_have_rows_of_their_own() -> None:
    circuit, _ = layered_circuit(threshold=1.0)
    rename = {"resid_0": "embed", "resid_4": "attn_2", "resid_8": "mlp_2", "resid_12": "resid_2", "resid_16": "attn_3"}
    nodes = circuit.nodes.with_columns(pl.col("site").replace(rename))
    mixed = Circuit(circuit.selection, nodes, circuit.edges)
    known = nodes.select("key", pl.lit("d").alias("dictionary"))
    content = attribution_graph(mixed, GraphSource("m@1", "p", known), "mixed")
    fits_the_format(content)
    assert content["metadata"]["featlas"]["sites"] == {"embed": -1, "attn_2": 0, "mlp_2": 1, "resid_2": 2, "attn_3": 3, "y": 5}
    assert "mlp_2 in row 1" in content["metadata"]["info"]["description"]


def test_influence_is_the_share_held_by_the_nodes_at_least_as_strong() -> None:
    circuit, _ = layered_circuit(n_sites=3, per_site=6)
    content = attribution_graph(circuit, GraphSource("m@1", "p", circuit.nodes.select("key", pl.lit("d").alias("dictionary"))), "s")
    score = {node["featlas"]["key"]: node["influence"] for node in content["nodes"] if node["feature_type"] != "logit"}
    inner = circuit.nodes.filter(pl.col("kind") != "output")
    total = sum(inner["influence"])
    for key, own in inner.select("key", "influence").iter_rows():
        above, at_least = (sum(other for other in inner["influence"] if keep(other)) for keep in (lambda x: x > own, lambda x: x >= own))  # noqa: B023
        assert above / total < score[key] < at_least / total + 1e-9
        if above + own == pytest.approx(at_least):  # no other has as much
            assert score[key] == pytest.approx(at_least / total)


def test_positions_without_tokens_are_refused(graph: GraphStore, tmp_path: Path) -> None:
    import_attribution_graphs(graph, [saved(texas(), tmp_path / "a.json")])
    run = find_run(graph)
    sequence = run_sequences(graph, run.key)["key"].item()
    circuit = run_circuit(graph, run, Selection(run.key, by=By.WEIGHT, sequence=sequence, positions=True))
    with pytest.raises(TokensMissing, match="--model"):
        attribution_graph(circuit, GraphSource("m@1", "p", circuit.nodes.select("key", pl.lit("d").alias("dictionary"))), "s")


def test_examples_are_written_for_the_viewer(tmp_path: Path) -> None:
    circuit, _ = layered_circuit(n_sites=2, per_site=2)
    key = circuit.nodes.filter(pl.col("kind") == "feature")["key"][0]
    examples = pl.DataFrame({"key": [key, key], "value": [1.5, 2.5], "before": [[" a"], []], "token": [" b", " c"], "after": [[], [" d", " e"]]})
    known = circuit.nodes.select("key", pl.lit("d").alias("dictionary"))
    path = write_attribution_graph(circuit, GraphSource("m@1", "p", known, examples=examples, frequency={key: 0.25}), tmp_path, "demo")
    content = json.loads(path.read_text())
    assert content["metadata"]["scan"] == "./data/features/demo"
    number = next(node["feature"] for node in content["nodes"] if node["featlas"]["key"] == key)
    written = json.loads((tmp_path / "features" / "demo" / f"{number}.json").read_text())
    first, second = written["examples_quantiles"][0]["examples"]
    assert (first["tokens"], first["tokens_acts_list"], first["train_token_ind"]) == ([" c", " d", " e"], [2.5, 0.0, 0.0], 0)
    assert (second["tokens"], second["train_token_ind"], written["act_max"], written["activation_frequency"]) == ([" a", " b"], 1, 2.5, 0.25)


# ---- commands


@pytest.mark.slow
def test_commands_write_and_read(featlas: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    path, atlas = saved(texas(), tmp_path / "texas.json"), tmp_path / "atlas"
    code, out, err = featlas("import", "circuit-tracer", path, "--atlas", atlas, "--json")
    assert code == 0, err
    assert json.loads(out)["n_edges"] == 8
    assert ": 1 graph (0 of them new) of " in featlas("import", "circuit-tracer", path, "--atlas", atlas)[1]
    quiet = ("-q", "export", tmp_path / "quiet.json", "--format", "circuit-tracer", "--threshold", "0", "--atlas", atlas)
    code, out, err = featlas(*quiet)
    assert (code, len(out.splitlines()), err) == (0, 1, "")
    code, out, err = featlas("export", tmp_path / "out" / "again.json", "--format", "circuit-tracer", "--threshold", "0", "--atlas", atlas)
    assert (code, "8 edges" in out) == (0, True), err
    fits_the_format(json.loads((tmp_path / "out" / "again.json").read_text()))
    for arguments, said in (
        ((tmp_path / "x", "--format", "parquet", "--edges", "3"), "--edges"),
        ((tmp_path / "x.graphml", "--format", "graphml", "--scan", "s"), "--scan"),
        ((tmp_path / "x.txt", "--format", "circuit-tracer"), ".json"),
        ((tmp_path / "x.graphml", "--format", "graphml", "--circuit", "k", "--threshold", "1"), "exclude"),
        ((tmp_path / "x.graphml", "--format", "graphml", "--positions"), "--sequence"),
        ((tmp_path / "x.json", "--format", "circuit-tracer", "--examples"), "ingest statistics"),
    ):
        code, out, err = featlas("export", *arguments, "--atlas", atlas)
        assert (code, out, said in err) == (2, "", True), (arguments, err)
    code, _, err = featlas("import", "circuit-tracer", tmp_path / "graph.pt", "--atlas", atlas)
    assert (code, "pickled" in err) == (2, True)
