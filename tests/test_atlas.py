"""The atlas from Python: frames equal to what the library gives, names, figures, and that nothing stays open outside of a `with` block."""

import html
import re

import polars as pl
import pytest
from featlas.analysis.circuits import Selection, read_circuit, run_circuit, write_circuit
from featlas.atlas import Atlas, NoStatistics, ReadOnly
from featlas.errors import UserError
from featlas.options import NoAtlas
from featlas.queries.inventory import UnknownFeature
from featlas.queries.library import BadParameters, UnknownQuery
from featlas.queries.runs import influences_of
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import open_graph
from featlas.queries.subgraphs import UnknownRun, find_run, model_features, run_sequences


@pytest.fixture(scope="module")
def atlas(tiny):
    return Atlas(tiny.atlas)


@pytest.fixture(scope="module")
def run(atlas, tiny):
    return atlas.run(tiny.runs["main"])


def test_runs_are_those_of_the_graph(atlas, tiny):
    assert set(atlas.runs["run"]) == set(tiny.runs.values())
    assert atlas.runs.columns[:4] == ["run", "status", "task", "method"]
    assert atlas.run(tiny.runs["main"][:10]).key == tiny.runs["main"]
    with pytest.raises(UnknownRun, match="needed"):
        atlas.run()


@pytest.mark.slow
def test_edges_are_the_librarys_with_names(atlas, run, tiny):
    with open_graph(tiny.atlas, read_only=True) as graph:
        plain = graph.read_edges("INFLUENCES", run=run.key)
        row = find_run(graph, run.key)
        of_task = influences_of(graph, run.key, run_sequences(graph, run.key).filter(pl.col("task") == "even")["key"])
        one = run.sequences["key"][0]
        single = graph.read_edges("ATTRIBUTES", run=run.key, sequence=one)
    ends = ["source", "target"]
    order = lambda frame, *columns: frame.select(*ends, *columns).sort(*ends)
    assert order(run.influences, "weight", "n").equals(order(plain, "weight", "n"))
    assert run.influences["abs_weight"].is_sorted(descending=True)
    assert order(run.edges(task="even"), "weight").equals(order(of_task, "weight"))
    assert run.edges(one[:12]).height == single.height
    assert not run.influences["source_name"].is_null().any()
    assert set(run.influences["target_site"]) <= {*row.dictionaries, "y"}
    for wrong in ("", "nothing-like-it"):
        with pytest.raises(UserError, match="sequence"):
            run.edges(wrong)


def test_a_circuit_is_the_librarys(atlas, run, tiny):
    ours = run.circuit(edges=40)
    with open_graph(tiny.atlas, read_only=True) as graph:
        theirs = run_circuit(graph, find_run(graph, run.key), Selection(run.key), n_edges=40)
    assert ours.key == theirs.key
    assert ours.nodes.drop("name").equals(theirs.nodes)
    assert ours.edges.drop("source_name", "target_name").equals(theirs.edges)
    assert not ours.nodes["name"].is_null().any()
    assert ours.sites["site"].to_list()
    best = ours.paths(3)
    assert best.height == 3
    assert best["score"].is_sorted(descending=True)
    assert best["path"][0].count(" → ") == len(best["weights"][0])
    assert run.circuit(threshold=theirs.selection.threshold).key == theirs.key
    assert ours.scores.is_empty()


def test_circuits_become_graphs_edge_for_edge(run):
    circuit = run.circuit(edges=40)
    i, n = circuit.to_igraph(), circuit.to_networkx()
    assert (i.vcount(), i.ecount(), i.is_directed()) == (circuit.circuit.n_nodes, circuit.circuit.n_edges, True)
    assert (n.number_of_nodes(), n.number_of_edges(), n.is_directed()) == (circuit.circuit.n_nodes, circuit.circuit.n_edges, True)
    edges = circuit.edges.select("source", "target", "weight").rows()
    assert {(a, b, d["effect"]) for a, b, d in n.edges(data=True)} == set(edges)
    named = dict(zip(circuit.nodes["key"], circuit.nodes["name"]))
    assert {v["name"]: v["label"] for v in i.vs} == named
    assert sum(i.es["effect"]) == pytest.approx(circuit.edges["weight"].sum())


def test_figures_are_plotly(run):
    circuit = run.circuit(edges=40)
    for figure in (circuit.figure(), circuit.flow_figure()):
        assert figure.to_dict()["data"]
    assert run.key in circuit.figure().layout.title.text


def test_features_by_site_text_and_place(atlas, tiny):
    all_of_a_site = atlas.features(site="resid_0")
    with open_graph(tiny.atlas, read_only=True) as graph:
        known = model_features(graph, atlas.models["key"][0])
    theirs = known.filter((pl.col("site") == "resid_0") & (pl.col("kind") == "feature"))
    assert sorted(all_of_a_site["key"]) == sorted(theirs["key"])
    labelled = known.filter(pl.col("label").is_not_null() & (pl.col("kind") == "feature"))
    if labelled.height:
        label = labelled["label"][0]
        assert labelled["key"][0] in atlas.features(text=label.upper())["key"]
    assert atlas.features(text="no label has this").is_empty()
    assert set(atlas.features(kind="error")["kind"]) == {"error"}


@pytest.mark.slow
def test_one_feature(atlas, run):
    key = run.circuit(edges=40).top(1)["key"][0]
    one = atlas.feature(key)
    assert atlas.feature(key).key == one.key
    assert one.outputs(run.key).equals(atlas.query("feature_outputs", run=run.key, feature=key))
    assert one.inputs(run.key, limit=2).height <= 2
    assert one.circuits.columns[0] == "circuit"
    assert one.regions.is_empty()
    assert html.escape(one.name) in one._repr_html_()
    if one.statistics.height:
        assert set(one.statistics["key"]) == {key}
    for wrong in ("resid_0/9999", "resid_0/x", "nothing", "attn_9/error"):
        with pytest.raises(UnknownFeature):
            atlas.feature(wrong)


def test_features_of_several_dictionaries_are_told_apart(atlas):
    """The identity run has features of its own at the same places."""
    with pytest.raises(UnknownFeature, match="fits 2 nodes"):
        atlas.feature("resid_0/1")


def test_questions(atlas, run):
    assert atlas.query("hubs", run=run.key, limit=2).height == 2
    assert atlas.query("MATCH (r:Run) WHERE r.key = $key RETURN r.task AS task", key=run.key)["task"].to_list() == [run.task]
    assert "hubs" in atlas.queries["query"]
    assert atlas.sql("SELECT count(*) AS n FROM runs WHERE run = $run", run="none")["n"].to_list() == [0]
    assert "feature_statistics" in atlas.tables["table"]
    with pytest.raises(UnknownQuery):
        atlas.query("hubbs")
    with pytest.raises(BadParameters):
        atlas.query("hubs", run=run.key, nothing=1)
    with pytest.raises(ReadOnly, match="read_only=False"):
        atlas.query("MATCH (r:Run) SET r.seed = 1", write=True)


def test_what_is_not_there_is_said(atlas, tmp_path, run):
    with pytest.raises(NoAtlas):
        Atlas(tmp_path).runs  # noqa: B018
    with pytest.raises(UserError, match="exclude"):
        run.circuit(edges=1, threshold=1.0)
    with pytest.raises(UserError, match="abs_weight"):
        run.circuit(by="size")
    with pytest.raises(UserError, match="bottleneck"):
        run.circuit(edges=40).paths(rule="longest")
    with open_graph(tmp_path):
        pass
    empty = Atlas(tmp_path)
    assert empty.runs.is_empty()
    assert empty.circuits.is_empty()
    assert empty.communities.is_empty()
    assert empty.parcellations.is_empty()
    assert empty.samples.is_empty()
    assert "no runs yet" in empty._repr_html_()
    with pytest.raises(NoStatistics):
        empty.sql("SELECT 1")


@pytest.mark.slow
def test_nothing_stays_open_outside_of_a_with_block(tiny, tmp_path):
    folder = tiny.copied(tmp_path)
    atlas = Atlas(folder)
    run = atlas.run(tiny.runs["main"])
    circuit = run.circuit(edges=20)
    with open_graph(folder) as graph, StatisticsStore(folder):  # both for writing
        key = write_circuit(graph, circuit.circuit)
    assert atlas.circuit(key[:8]).key == key
    with atlas as held:
        assert held.runs.equals(atlas.runs)
        with held.store() as first, held.store() as second:
            assert first is second
    with open_graph(folder) as graph:
        assert read_circuit(graph, key).key == key


@pytest.mark.slow
def test_a_circuit_is_saved_where_the_atlas_may_be_written(tiny, tmp_path):
    folder = tiny.copied(tmp_path)
    with pytest.raises(ReadOnly):
        Atlas(folder).run(tiny.runs["main"]).circuit(edges=20).save()
    atlas = Atlas(folder, read_only=False)
    key = atlas.run(tiny.runs["main"]).circuit(edges=20).save()
    assert key in atlas.circuits["circuit"]
    assert atlas.run(tiny.runs["main"]).circuits.height == 1


def test_in_print_things_say_briefly_what_they_are(atlas, run):
    circuit = run.circuit(edges=20)
    one = atlas.feature(circuit.top(1)["key"][0])
    assert repr(atlas) == f"Atlas({str(atlas.path)!r})"
    assert repr(Atlas("a", graph="bolt://neo4j:secret@host:7687", read_only=False)) == "Atlas('a', graph='bolt://host:7687', read_only=False)"
    assert repr(run) == f"AtlasRun({run.key!r}, {run.task}, {run.properties['n_edges']:,} edges)"
    assert repr(circuit) == f"AtlasCircuit({circuit.key!r}, {circuit.circuit.n_nodes} nodes, {circuit.circuit.n_edges} edges)"
    assert repr(one).startswith(f"AtlasFeature({one.key!r}")
    assert len(repr(one)) < 200


@pytest.mark.slow
def test_notebook_texts_are_escaped(tiny, tmp_path):
    folder = tiny.copied(tmp_path)
    with open_graph(folder) as graph:
        features = model_features(graph, find_run(graph, tiny.runs["main"]).model).filter(pl.col("kind") == "feature")
        graph.merge_nodes("Feature", features.select("key", pl.lit("<script>alert(1)</script>").alias("label")))
    atlas = Atlas(folder)
    run = atlas.run(tiny.runs["main"])
    circuit = run.circuit(edges=20)
    texts = [atlas._repr_html_(), run._repr_html_(), circuit._repr_html_(), atlas.feature(circuit.top(1)["key"][0])._repr_html_()]
    assert all(not re.search("<script", text) for text in texts)
    assert any("&lt;script" in text for text in texts)


@pytest.mark.slow
def test_labels_and_comparisons_are_those_of_the_commands(tiny, tmp_path, featlas):
    folder = tiny.copied(tmp_path)
    atlas = Atlas(folder)
    key = atlas.features()["key"][0]
    code, _, err = featlas("labels", "set", key, "plural nouns", "--atlas", folder)
    assert code == 0, err
    assert atlas.labels.select("key", "label", "kind").row(0) == (key, "plural nouns", "hand")
    assert atlas.search("Plural")["key"].to_list() == [key]
    run = tiny.runs["main"]
    code, _, err = featlas("compare", run, run, "--only", "edges", "--draws", 1, "--atlas", folder)
    assert code == 0, err
    assert atlas.comparisons.height == 1
    values = atlas.comparison().values
    assert set(values.filter(pl.col("quantity") == "Jaccard")["value"]) == {1.0}
    assert atlas.matchings.is_empty()
    assert atlas.series == []
    with pytest.raises(UserError, match="analyze match"):
        atlas.matches()
