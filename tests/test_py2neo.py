"""py2neo, at its end of life, still reads and writes the graph over bolt: an interop path, never the main one.

Its `graph.schema` speaks a syntax that servers no longer know, and it has no http:// any more: neither is used.
"""

import polars as pl
import pytest
from featlas.queries.store import ServerCredentials, open_graph

from .servers import Neo4jTestServer

py2neo = pytest.importorskip("py2neo", reason="the optional extra py2neo is not installed")

pytestmark = pytest.mark.neo4j


@pytest.fixture
def graph(clean_neo4j: Neo4jTestServer) -> "py2neo.Graph":
    return py2neo.Graph(clean_neo4j.uri, auth=(clean_neo4j.username, clean_neo4j.password))


@pytest.fixture
def credentials(clean_neo4j: Neo4jTestServer) -> ServerCredentials:
    return ServerCredentials(clean_neo4j.username, clean_neo4j.password)


FEATURES = pl.DataFrame({"key": ["a", "b", "c"], "site": ["resid_1", "resid_2", "y"], "label": ['plural "noun"', "漢字", None], "index": [3, 4, -1]})
INFLUENCES = pl.DataFrame({"source": ["a", "b"], "target": ["b", "c"], "run": ["r", "r"], "weight": [0.1, -2.5e-7], "n": [7, 2**40]})


def test_py2neo_reads_what_the_store_wrote(graph: "py2neo.Graph", clean_neo4j: Neo4jTestServer, credentials: ServerCredentials) -> None:
    with open_graph(clean_neo4j.uri, credentials=credentials) as store:
        store.merge_nodes("Feature", FEATURES)
        store.merge_edges("INFLUENCES", INFLUENCES)
    assert graph.evaluate("MATCH (f:Feature) RETURN count(f)") == 3
    assert graph.nodes.match("Feature", key="a").first()["label"] == 'plural "noun"'
    read = graph.run(
        "MATCH (a:Feature)-[e:INFLUENCES {run: $run}]->(b:Feature) "
        "RETURN a.key AS source, b.key AS target, e.run AS run, e.weight AS weight, e.n AS n ORDER BY source", run="r",
    ).to_data_frame()  # fmt: skip
    assert pl.from_pandas(read).equals(INFLUENCES)
    path = graph.run("MATCH p = (:Feature {key: 'a'})-[:INFLUENCES*2]->(:Feature) RETURN p").evaluate()
    assert [node["key"] for node in path.nodes] == ["a", "b", "c"]


def test_the_store_reads_what_py2neo_wrote(graph: "py2neo.Graph", clean_neo4j: Neo4jTestServer, credentials: ServerCredentials) -> None:
    from py2neo import bulk

    with open_graph(clean_neo4j.uri, credentials=credentials) as store:
        rows = [{"key": row["key"], "site": row["site"], "index": row["index"]} for row in FEATURES.iter_rows(named=True)]
        bulk.merge_nodes(graph.auto(), rows, ("Feature", "key"))
        edges = [(source, {"run": run, "weight": weight, "n": n}, target) for source, target, run, weight, n in INFLUENCES.iter_rows()]
        for _ in range(2):  # merged: the second time changes nothing
            bulk.merge_relationships(graph.auto(), edges, ("INFLUENCES", "run"), start_node_key=("Feature", "key"), end_node_key=("Feature", "key"))
        graph.run("MATCH (f:Feature {key: $key}) SET f.label = $label", key="b", label="verb")
        read = store.read_edges("INFLUENCES", run="r")
        assert read.select(INFLUENCES.columns).equals(INFLUENCES)
        labels = store.query("MATCH (f:Feature) RETURN f.key AS key, f.label AS label ORDER BY key")
        assert labels.rows() == [("a", None), ("b", "verb"), ("c", None)]


def test_py2neo_rolls_back_a_transaction(graph: "py2neo.Graph", clean_neo4j: Neo4jTestServer) -> None:
    transaction = graph.begin()
    transaction.create(py2neo.Node("Feature", key="never"))
    graph.rollback(transaction)
    assert clean_neo4j.run("MATCH (f:Feature) RETURN count(f) AS n") == [{"n": 0}]
    with pytest.raises(py2neo.errors.ConnectionUnavailable):
        py2neo.Graph(clean_neo4j.uri, auth=("neo4j", "wrong password"))
