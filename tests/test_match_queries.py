"""The named queries of matches on a graph worked by hand: two models with a chain of three features each, matched one by one."""

from pathlib import Path

import polars as pl
import pytest
from featlas.queries.library import run_query
from featlas.queries.store import GraphStore, ServerCredentials, open_graph

from .servers import Neo4jTestServer


def fill(store: GraphStore) -> None:
    """a0 → a1 → a2 and b0 → b1 → b2; a0 is b0, a1 is b1, and a2 is b1 too within its pair of sites. Circuits p and q of the first edges."""
    keys = [f"{model}{i}" for model in "ab" for i in range(3)]
    store.merge_nodes("Feature", pl.DataFrame({"key": keys, "model": [key[0] for key in keys], "site": [f"resid_{key[1]}" for key in keys]}))
    store.merge_nodes("Run", pl.DataFrame({"key": ["r", "s"]}))
    edges = pl.DataFrame({"source": ["a0", "a1", "b0", "b1"], "target": ["a1", "a2", "b1", "b2"], "weight": [3.0, -4.0, 2.0, 1.0]})
    store.merge_edges("INFLUENCES", edges.with_columns(run=pl.Series(["r", "r", "s", "s"])))
    store.merge_edges("CIRCUIT_EDGE", edges[[0, 2]].with_columns(circuit=pl.Series(["p", "q"])))
    store.merge_edges("MATCHES", pl.DataFrame({
        "source": ["a0", "a1", "a2", "a2"], "target": ["b0", "b1", "b1", "b2"], "method": ["all-sites", "all-sites", "site-pairs", "all-sites"],
        "score": [0.9, 0.8, 0.7, 0.3], "matching": "x", "mutual": [True, True, True, False], "assigned": [True, True, False, True],
    }))  # fmt: skip


def check(store: GraphStore) -> None:
    assert run_query(store, "matches_of_feature", {"feature": "b1"}).select("match", "score", "method").rows() == [
        ("a1", 0.8, "all-sites"), ("a2", 0.7, "site-pairs")]  # fmt: skip
    assert run_query(store, "matches_of_feature", {"feature": "a1"})["match"].to_list() == ["b1"]
    matched = run_query(store, "matched_features", {"matching": "x"})
    assert matched.select("feature", "match", "score").rows() == [("a0", "b0", 0.9), ("a1", "b1", 0.8)]
    assert run_query(store, "matched_features", {"matching": "x", "method": "site-pairs"})["feature"].to_list() == ["a2"]
    shared = run_query(store, "shared_edges", {"run": "r", "other_run": "s"})
    assert shared.select("source", "target", "weight", "other_source", "other_target", "other_weight").rows() == [("a0", "a1", 3.0, "b0", "b1", 2.0)]
    turned = run_query(store, "shared_edges", {"run": "s", "other_run": "r"})
    assert turned.select("source", "other_source", "source_score", "target_score").rows() == [("b0", "a0", 0.9, 0.8)]
    assert run_query(store, "shared_edges", {"run": "r", "other_run": "r"}).height == 0
    shared = run_query(store, "shared_circuit_edges", {"circuit": "q", "other_circuit": "p"})
    assert shared.select("source", "target", "other_source", "other_target").rows() == [("b0", "b1", "a0", "a1")]


def test_matches_worked_by_hand(tmp_path: Path) -> None:
    with open_graph(tmp_path / "graph.lbug") as store:
        fill(store)
        check(store)


@pytest.mark.neo4j
def test_matches_worked_by_hand_on_a_server(clean_neo4j: Neo4jTestServer) -> None:
    credentials = ServerCredentials(clean_neo4j.username, clean_neo4j.password)
    with open_graph(clean_neo4j.uri, credentials=credentials) as store:
        fill(store)
        check(store)
