"""Both databases give the same answers: one random graph in each, then every named query, paths, counts, orders and read-backs compared.

Weights are multiples of 1/64, so that sums are exact and do not depend on the order in which a database adds.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.analysis.regions import describe
from featlas.analysis.regions_store import write_drives, write_region_circuit, write_regions
from featlas.queries.library import BadParameters, NamedQuery, UnknownQuery, list_queries, load_query, parameter_choices, run_query
from featlas.queries.schema import EDGES, block_key, feature_key, output_key
from featlas.queries.store import GraphStore, SequenceCommit, ServerCredentials, open_graph
from polars.testing import assert_frame_equal

from .region_cases import SEQUENCES, TOKENS, random_weights, small_parcellation, small_samples, small_units
from .servers import Neo4jTestServer

N_LAYERS, N_FEATURES, N_SEQUENCES = 4, 5, 6
TASKS = ("agreement", "greater-than", "résumé 'quoted' \"twice\" \\ 日本")


def features(rng: np.random.Generator) -> pl.DataFrame:
    """Features and an error node for each residual site, some without label or frequency, and the output."""
    rows = []
    for layer in range(N_LAYERS):
        for index in [*range(N_FEATURES), "error"]:
            error = index == "error"
            rows.append({
                "key": feature_key("tiny@1", "identity", f"resid_{layer}", index), "model": "tiny@1", "dictionary": "identity",
                "site": f"resid_{layer}", "layer": layer, "kind": "error" if error else "feature", "index": -1 if error else index,
                "label": None if rng.random() < 0.3 else f"läbel {rng.integers(4)} of {TASKS[2]}",
                "frequency": None if error else rng.integers(64) / 64,
            })
    key = output_key("tiny@1", "logit_diff")
    output = {"key": key, "model": "tiny@1", "dictionary": "-", "site": "y", "layer": -1, "kind": "output", "index": -1}
    return pl.DataFrame([*rows, output], infer_schema_length=None)


def edges(rng: np.random.Generator, nodes: pl.DataFrame, share: float) -> pl.DataFrame:
    """Random edges from each layer to later layers and the output, so that there is no cycle; many weights are equal."""
    order = [layer if layer >= 0 else N_LAYERS for layer in nodes["layer"]]
    keys = nodes["key"]
    rows = [
        {"source": keys[i], "target": keys[j], "weight": int(rng.integers(-6, 7)) / 64}
        for i in range(len(keys)) for j in range(len(keys)) if order[i] < order[j] and rng.random() < share
    ]
    return pl.DataFrame(rows, schema={"source": pl.String, "target": pl.String, "weight": pl.Float64})


def fill(store: GraphStore, seed: int) -> None:
    """Write the random graph of `seed`: two runs (one with positions), influences, a circuit, blocks."""
    rng = np.random.default_rng(seed)
    nodes = features(rng)
    store.merge_nodes("Feature", nodes)
    store.merge_nodes("Model", pl.DataFrame({"key": ["tiny@1"], "name": ["tiny"], "n_layers": [N_LAYERS]}))
    store.merge_nodes("Run", pl.DataFrame({"key": ["r1", "r2"], "task": ["mixture", None], "threshold": [0.0, 0.5], "status": ["done", "running"]}))
    sequences = [f"s{i}" for i in range(N_SEQUENCES)]
    tasks = [TASKS[i % len(TASKS)] for i in range(N_SEQUENCES)]
    store.merge_nodes("Sequence", pl.DataFrame({"key": sequences, "task": tasks, "clean": [f"{t}\n{i}" for i, t in enumerate(tasks)]}))
    commits = []
    for run, positions in (("r1", False), ("r2", True)):
        for sequence in sequences:
            drawn = edges(rng, nodes, 0.15)
            if positions:
                source_positions = rng.integers(0, 2, drawn.height)
                drawn = drawn.with_columns(src_pos=source_positions, dest_pos=np.maximum(source_positions, rng.integers(0, 2, drawn.height)))
            mark = {"metric_clean": int(rng.integers(64)) / 64, "metric_corrupt": None if rng.random() < 0.5 else 0.25}
            commits.append(SequenceCommit(run, sequence, drawn, mark))
    assert store.commit_sequences(commits) == 2 * N_SEQUENCES
    for run in ("r1", "r2"):
        drawn = edges(rng, nodes, 0.3).with_columns(pl.lit(run).alias("run"), pl.col("weight").abs().alias("abs_weight"))
        drawn = drawn.with_columns(n=rng.integers(1, 9, drawn.height), ablation_effect=pl.when(pl.col("weight") > 0).then("weight"))
        drawn = drawn.with_columns(ablation_metric=pl.lit("logit_diff"), ablation_baseline=pl.lit("zero"))
        store.merge_edges("INFLUENCES", drawn)
    store.merge_nodes("Circuit", pl.DataFrame({"key": ["c"], "run": ["r1"], "threshold": [0.01], "by": ["abs_weight"], "n_nodes": [9]}))
    cut = {"ablation_metric": pl.lit("logit_diff"), "ablation_baseline": pl.lit("zero")}
    circuit = edges(rng, nodes, 0.2).with_columns(circuit=pl.lit("c"), ablation_effect=pl.when(pl.col("weight") < 0).then("weight"), **cut)
    store.merge_edges("CIRCUIT_EDGE", circuit)
    members = nodes.select(pl.col("key").alias("source"), target=pl.lit("c"), role=pl.col("kind"), ablation_effect=pl.col("frequency"), **cut)
    store.merge_edges("IN_CIRCUIT", members)
    ablated = nodes.select(pl.col("key").alias("source"), target=pl.lit("r1"), metric=pl.lit("kl"), baseline=pl.lit("mean"), n=pl.lit(3))
    store.merge_edges("ABLATED", ablated.with_columns(effect=-nodes["frequency"]))
    community = {"parcellation": "p", "run": "r1", "kind": "community"}
    blocks = pl.DataFrame({"key": ["b1", "b2", "b3"], "size": [3, 4, 5], "index": [0, 1, 2], "mean_cosine": [0.5, None, None]})
    store.merge_nodes("Block", blocks.with_columns(pl.lit(value).alias(name) for name, value in community.items()))
    store.merge_nodes("Partition", pl.DataFrame({"key": ["p"], "method": ["leiden"], "basis": ["effective"], "run": ["r1"]}))
    store.merge_edges("OF_RUN", pl.DataFrame({"source": ["p"], "target": ["r1"]}))
    belongs = [f"b{1 + i % 3}" for i in range(nodes.height - 1)]
    store.merge_edges("MEMBER_OF", pl.DataFrame({"source": nodes["key"][:-1], "target": belongs}))
    regions = small_parcellation()
    units = small_units(regions)
    write_regions(store, regions, describe(regions, lambda site: small_samples(site, seed), SEQUENCES, TOKENS))
    write_drives(store, "r1", regions, units, random_weights(units, seed=seed))
    mean = random_weights(units, seed=seed).mean(axis=0)
    write_region_circuit(store, "r1", regions, units, np.argwhere(mean), mean)
    store.merge_nodes("Score", pl.DataFrame({
        "key": ["x1", "x2", "x3"], "kind": "faithfulness", "method": ["attribution", "attribution", "random edges"], "ablation": "edge",
        "metric": "kl", "baseline": "mean", "averaging": "mean of ratios", "split": "held-out", "task": "pooled", "seed": 0,
        "value": [0.5, float("inf"), 0.25], "n": [None, 4, 4], "undefined_n": [None, 0, 1],
    }))
    store.merge_edges("PART_OF", pl.DataFrame({"source": ["b1", "b2", "b3", "b1"], "target": ["b2", "p", "p", "p"]}))
    store.merge_edges("SCORED", pl.DataFrame({"source": ["b1", "c", "c"], "target": ["x1", "x2", "x3"]}))
    matched = nodes.filter(pl.col("kind") == "feature").sort("key")["key"]
    pairs = {"source": matched[:-1], "target": matched[1:], "score": [i / 64 for i in range(len(matched) - 1)], "matching": "match", "assigned": True}
    matches = pl.DataFrame(pairs).with_columns(mutual=pl.int_range(pl.len()) % 5 != 0)
    store.merge_edges("MATCHES", pl.concat([matches.with_columns(method=pl.lit(method)) for method in ("all-sites", "site-pairs")]))
    wires = edges(rng, nodes, 0.4).with_columns(path=pl.lit("residual"))
    within = pl.DataFrame({"source": nodes["key"][:1], "target": nodes["key"][1:2], "weight": [0.5], "path": ["mlp_0"]})
    store.merge_edges("WIRED", pl.concat([wires, wires.with_columns(pl.col("weight") / 2, path=pl.lit("mlp_2")), within]))


@pytest.fixture(scope="module", params=[0, 1])
def stores(
    request: pytest.FixtureRequest, neo4j_server: Neo4jTestServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[GraphStore, GraphStore]]:
    neo4j_server.wipe()
    credentials = ServerCredentials(neo4j_server.username, neo4j_server.password)
    path = tmp_path_factory.mktemp("agree") / "graph.lbug"
    with open_graph(path) as embedded, open_graph(neo4j_server.uri, credentials=credentials) as server:
        fill(embedded, request.param)
        fill(server, request.param)
        yield embedded, server


def arguments(query: NamedQuery) -> dict[str, object]:
    known: dict[str, object] = {
        "run": "r1", "feature": feature_key("tiny@1", "identity", "resid_1", 2), "circuit": "c", "site": "resid_0",
        "task": TASKS[0], "other_task": TASKS[2], "sequence": "s1", "position": -1, "least": 1 / 64, "text": "läbel 1", "limit": 7,
        "parcellation": "p1", "block": block_key("p1", "resid_1", "roi", 1, 0),
        "community": "b1", "partition": "p", "min_size": 1, "key": "b2", "matching": "match", "other_run": "r2", "other_circuit": "c",
    }
    if query.name == "regions_of_feature":
        known["feature"] = feature_key("tiny@1", "d1", "resid_1", 2)
    if query.name == "regions_of_task":
        known["task"] = "ioi"
    return {parameter.name: known[parameter.name] for parameter in query.parameters if parameter.name in known}


@pytest.mark.neo4j
@pytest.mark.parametrize("name", [query.name for query in list_queries()])
def test_every_named_query_gives_the_same_rows(stores: tuple[GraphStore, GraphStore], name: str) -> None:
    query = load_query(name)
    given = arguments(query)
    one, other = (run_query(store, name, given) for store in stores)
    assert one.height > 0
    assert_frame_equal(one, other)
    if "limit" in given:
        one, other = (run_query(store, name, {**given, "limit": 10_000}) for store in stores)
        assert_frame_equal(one, other)


@pytest.mark.neo4j
def test_paths_with_positions_agree(stores: tuple[GraphStore, GraphStore]) -> None:
    given = {"run": "r2", "sequence": "s1", "position": 0, "site": "resid_0", "least": 0.0, "longest": 4, "limit": 10_000}
    one, other = (run_query(store, "paths_from_token", given) for store in stores)
    assert_frame_equal(one, other)
    assert one.height > 0
    assert all(positions in ("0", "1") or "1 > 0" not in positions for positions in one["positions"])


@pytest.mark.neo4j
@pytest.mark.parametrize("type", list(EDGES))
@pytest.mark.parametrize("run", [None, "r2"])
def test_edges_are_read_back_alike(stores: tuple[GraphStore, GraphStore], type: str, run: str | None) -> None:
    one, other = (store.read_edges(type, run=run) for store in stores)
    assert_frame_equal(one, other)
    assert one.columns == list(EDGES[type].all_columns)


QUERIES = (
    "MATCH (n) RETURN count(*) AS n",
    "MATCH ()-[e]->() RETURN count(*) AS n",
    "MATCH (f:Feature) RETURN f.key AS key, f.label AS label, f.frequency AS frequency ORDER BY key",
    "MATCH (f:Feature) RETURN f.key AS key ORDER BY f.layer DESC, key SKIP 3 LIMIT 9",
    "MATCH (f:Feature) RETURN f AS f ORDER BY f.key",
    "MATCH (a:Feature)-[e:INFLUENCES {run: 'r1'}]->(b:Feature) RETURN e AS e, a.key AS source, b.key AS target ORDER BY source, target LIMIT 5",
    "MATCH p = (a:Feature)-[e:CIRCUIT_EDGE {circuit: 'c'}]->(b:Feature) RETURN p AS p, a.key AS source, b.key AS target ORDER BY source, target",
    "MATCH p = (a:Feature)-[:CIRCUIT_EDGE*1..3]->(b:Feature) WHERE b.kind = 'output' RETURN a.key AS source, length(p) AS hops, count(*) AS n"
    " ORDER BY source, hops",
    "MATCH (a:Feature)-[:CIRCUIT_EDGE]->(b:Feature)-[:CIRCUIT_EDGE]->(c:Feature) RETURN a.key AS a, c.key AS c, count(*) AS n ORDER BY a, c",
    "MATCH (s:Sequence) RETURN s.task AS task, count(*) AS n, min(s.key) AS first, max(s.key) AS last ORDER BY task",
    "MATCH (s:Score) RETURN s.key AS key, s.value AS value, s.low AS low ORDER BY key",
    "MATCH (f:Feature) WHERE f.label IS NULL RETURN f.site AS site, count(*) AS n ORDER BY site",
    "MATCH (f:Feature) WHERE f.key = 'absent' RETURN f.key AS key, f.layer AS layer",
    "RETURN 1 AS i, 1.5 AS x, 'a' AS s, true AS b, null AS z, [1, 2] AS l, {a: 1, b: [1, 2]} AS m",
    "UNWIND [1, 2.5] AS x RETURN x",
)


@pytest.mark.neo4j
@pytest.mark.parametrize("cypher", QUERIES)
def test_cypher_gives_the_same_rows(stores: tuple[GraphStore, GraphStore], cypher: str) -> None:
    one, other = (store.query(cypher) for store in stores)
    assert_frame_equal(one, other)


def test_named_queries_on_a_graph_worked_by_hand(tmp_path: Path) -> None:
    """a(resid_0) -> c -> y is 3 and 0.5 strong, a -> d -> y 2 and 1, the error node of resid_1 sends 0.5 of 2.0 onwards."""
    with open_graph(tmp_path / "graph.lbug") as store:
        store.merge_nodes("Feature", pl.DataFrame({
            "key": ["a", "c", "d", "y"], "site": ["resid_0", "resid_1", "resid_1", "y"], "layer": [0, 1, 1, -1],
            "kind": ["feature", "error", "feature", "output"], "label": ["verbs", None, None, "logit_diff"],
        }))
        store.merge_nodes("Run", pl.DataFrame({"key": ["r"]}))
        store.merge_nodes("Sequence", pl.DataFrame({"key": ["s", "t"], "task": ["one", "two"]}))
        drawn = pl.DataFrame({"source": ["a", "c", "a", "d"], "target": ["c", "y", "d", "y"], "weight": [3.0, 0.5, -2.0, 1.5]})
        store.commit_sequence("r", "s", drawn, {"metric_clean": 1.0})
        store.commit_sequence("r", "t", pl.DataFrame({"source": ["a", "d"], "target": ["d", "y"], "weight": [2.0, 0.25]}), {})
        store.merge_edges("INFLUENCES", drawn.with_columns(run=pl.lit("r"), abs_weight=pl.col("weight").abs(), n=1))
        assert run_query(store, "top_edges", {"limit": "2"}).select("source", "target", "weight").rows() == [("a", "c", 3.0), ("a", "d", -2.0)]
        assert run_query(store, "paths_from_site", {"site": "resid_0", "least": 0.0}).rows() == [
            (1.5, "a > d > y", [-2.0, 1.5]), (0.5, "a > c > y", [3.0, 0.5])]
        assert run_query(store, "paths_from_site", {"site": "resid_0", "least": 1}).height == 1
        assert run_query(store, "paths_from_site", {"site": "resid_0", "least": 0, "longest": 1}).height == 0
        assert run_query(store, "error_share").rows() == [(0, "resid_0", 0.0, 5.0, 0.0), (1, "resid_1", 0.5, 2.0, 0.25)]
        assert run_query(store, "sign_flips").rows() == [("a", "d", 1, 1, 2.0, -2.0)]
        shared = run_query(store, "shared_features", {"task": "one", "other_task": "two"})
        assert shared.select("feature", "effect", "other_effect").rows() == [("a", 5.0, 2.0), ("d", 1.5, 0.25)]
        assert run_query(store, "task_features", {"task": "one"}).select("feature", "effect").rows() == [("c", 0.5)]
        assert run_query(store, "hubs", {"limit": 1}).select("feature", "degree", "n_inputs", "n_outputs").rows() == [("a", 2, 0, 2)]
        assert run_query(store, "feature_inputs", {"feature": "y"})["source"].to_list() == ["d", "c"]
        assert run_query(store, "feature_outputs", {"feature": "a"})["target"].to_list() == ["c", "d"]
        assert run_query(store, "find_features", {"text": "verb"})["feature"].to_list() == ["a"]
        assert run_query(store, "sequences")["sequence"].to_list() == ["s", "t"]
        wired = {"source": ["a", "a", "c"], "target": ["c", "c", "d"], "path": ["residual", "mlp_1", "mlp_1"], "weight": [1.0, -2.0, 4.0]}
        store.merge_edges("WIRED", pl.DataFrame(wired))
        assert run_query(store, "wired_inputs", {"feature": "c"}).select("source", "path", "weight").rows() == [
            ("a", "mlp_1", -2.0), ("a", "residual", 1.0)]
        assert run_query(store, "wired_outputs", {"feature": "c"}).select("target", "path", "weight").rows() == [("d", "mlp_1", 4.0)]
        assert run_query(store, "wired_paths", {"site": "resid_1"}).rows() == [
            ("resid_0", "mlp_1", 1, 2.0, 2.0), ("resid_0", "residual", 1, 1.0, 1.0), ("resid_1", "mlp_1", 1, 4.0, 4.0)]
        assert run_query(store, "wired_effects").select("source", "target", "effect", "path", "wired").rows() == [
            ("a", "c", 3.0, "mlp_1", -2.0), ("a", "c", 3.0, "residual", 1.0)]
        overview = run_query(store, "overview").rows()
        assert ("node", "Feature", 4) in overview
        assert ("edge", "ATTRIBUTES", 6) in overview


def test_parameters_are_checked_by_name_and_type(tmp_path: Path) -> None:
    query = load_query("paths-from-site")
    assert query.bind({"run": "r", "site": "resid_0", "least": "0.5", "limit": "3"}) == {
        "run": "r", "site": "resid_0", "least": 0.5, "longest": 6, "limit": 3}
    for given, message in (
        ({"run": "r", "site": "resid_0"}, "'least' is missing"), ({"rum": "r"}, "unknown parameter 'rum'"),
        ({"run": "r", "site": "x", "least": "much"}, "'much' is no float"), ({"run": "r", "site": "x", "least": 0, "longest": 0}, "0 is no count"),
        ({"run": "r", "site": "x", "least": 0, "longest": "1 RETURN 1"}, "is no count"),
    ):
        with pytest.raises(BadParameters, match=message) as caught:
            query.bind(given)
        assert "paths_from_site takes run: string, site: string, least: float, longest: count = 6, limit: int = 20" in str(caught.value)
    with pytest.raises(UnknownQuery, match="did you mean top_edges"):
        load_query("top_edge")
    with open_graph(tmp_path) as store:
        with pytest.raises(BadParameters, match="no run yet"):
            run_query(store, "top_edges")
        store.merge_nodes("Run", pl.DataFrame({"key": ["r1", "r2"]}))
        with pytest.raises(BadParameters, match="the graph has r1, r2"):
            run_query(store, "top_edges")


def test_nodes_and_paths_are_json_of_one_shape(tmp_path: Path) -> None:
    with open_graph(tmp_path) as store:
        store.merge_nodes("Feature", pl.DataFrame({"key": ["a", "b"], "layer": [0, 1]}))
        store.merge_edges("WIRED", pl.DataFrame({"source": ["a"], "target": ["b"], "path": ["residual"], "weight": [2.0]}))
        found = store.query("MATCH p = (a:Feature)-[e:WIRED]->(b:Feature) RETURN a AS a, e AS e, p AS p").row(0, named=True)
    a = {"label": "Feature", "properties": {"key": "a", "layer": 0}}
    wired = {"properties": {"path": "residual", "weight": 2.0}, "type": "WIRED", "source": "a", "target": "b"}
    assert json.loads(found["a"]) == a
    assert json.loads(found["e"]) == wired
    assert json.loads(found["p"])["nodes"][0] == a
    assert json.loads(found["p"])["relationships"] == [wired]


def test_neighbours_and_choices(tmp_path: Path) -> None:
    with open_graph(tmp_path) as store:
        store.merge_nodes("Feature", pl.DataFrame({"key": ["a", "b", "c"], "site": ["resid_1", "resid_0", "resid_1"]}))
        store.merge_nodes("Circuit", pl.DataFrame({"key": ["round"]}))
        store.merge_nodes("Sequence", pl.DataFrame({"key": ["s", "t"], "task": ["two", "one"]}))
        drawn = {"source": ["a", "c"], "target": ["b", "a"], "path": ["residual"] * 2, "weight": [0.25, -0.5]}
        store.merge_edges("WIRED", pl.DataFrame(drawn))
        store.merge_edges("IN_CIRCUIT", pl.DataFrame({"source": ["a"], "target": ["round"]}))
        found = run_query(store, "neighbours", {"key": "a"})
        assert [json.loads(text)["properties"]["key"] for text in found["neighbour"]] == ["round", "c", "b"]
        assert [json.loads(text)["source"] for text in found["edge"]] == ["a", "c", "a"]
        assert run_query(store, "neighbours", {"key": "b", "limit": 1}).height == 1
        choices = parameter_choices(store)
        assert (choices["site"], choices["circuit"], choices["task"], choices["run"]) == (["resid_0", "resid_1"], ["round"], ["one", "two"], [])
        assert choices["other_task"] == choices["task"]
