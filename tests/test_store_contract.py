"""What every graph store must do, run on the embedded one and on a real Neo4j; then what only one of them can get wrong."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
from featlas.errors import FeatlasError, UserError
from featlas.queries.embedded import LadybugStore
from featlas.queries.schema import EDGES, NODES, SCHEMA_VERSION, RowsRejected, UnknownLabel
from featlas.queries.store import (
    GraphStore,
    KeyRange,
    NotAGraph,
    QueryLimits,
    QueryRejected,
    QueryTooSlow,
    SchemaVersionMismatch,
    SequenceCommit,
    ServerCredentials,
    StoreBusy,
    StoreFailed,
    StoreUnreachable,
    UnknownDatabase,
    UnknownEndpoint,
    WriteRefused,
    WrongCredentials,
    graph_target,
    open_graph,
)
from polars.testing import assert_frame_equal

from .servers import Neo4jTestServer

Opener = Callable[..., GraphStore]
EDGE = pl.DataFrame({"source": ["a", "b"], "target": ["b", "c"], "weight": [1.5, -2.0]})
STRANGE = "é \"double\" 'single' `tick` \\ $x {y} \n\t ,;日本 🙂 -- // /* NULL"


@pytest.fixture(params=["embedded", pytest.param("server", marks=pytest.mark.neo4j)])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens the one graph of this test, again and again; it is empty at first."""
    opened: list[GraphStore] = []
    if request.param == "embedded":
        target, credentials = str(tmp_path / "new folder" / "graph.lbug"), None
    else:
        server: Neo4jTestServer = request.getfixturevalue("clean_neo4j")
        target, credentials = server.uri, ServerCredentials(server.username, server.password)

    def opening(**options: bool) -> GraphStore:
        opened.append(open_graph(target, credentials=credentials, **options))
        return opened[-1]

    yield opening
    for store in opened:
        store.close()


@pytest.fixture
def store(reopen: Opener) -> GraphStore:
    """A graph with the features a, b, c, the run r and the sequences s, t."""
    store = reopen()
    store.merge_nodes("Feature", pl.DataFrame({"key": ["a", "b", "c"], "layer": [0, 1, 2], "label": ["verbs", None, STRANGE]}))
    store.merge_nodes("Run", pl.DataFrame({"key": ["r"]}))
    store.merge_nodes("Sequence", pl.DataFrame({"key": ["s", "t"]}))
    return store


def count(store: GraphStore, pattern: str) -> int:
    return int(store.query(f"MATCH {pattern} RETURN count(*) AS n")["n"][0])


# Nodes and edges


def test_merging_the_same_nodes_twice_changes_nothing(store: GraphStore) -> None:
    text = "MATCH (f:Feature) RETURN f AS f ORDER BY f.key"
    before = store.query(text)
    store.merge_nodes("Feature", pl.DataFrame({"key": ["a", "b", "c"], "layer": [0, 1, 2], "label": ["verbs", None, STRANGE]}))
    assert_frame_equal(store.query(text), before)
    assert count(store, "(f:Feature)") == 3


def test_merging_sets_the_given_columns_and_leaves_the_others(store: GraphStore) -> None:
    store.merge_nodes("Feature", pl.DataFrame({"key": ["a", "c"], "frequency": [0.5, None], "label": [None, "nouns"]}))
    rows = store.query("MATCH (f:Feature) RETURN f.key AS key, f.layer AS layer, f.label AS label, f.frequency AS frequency ORDER BY key")
    assert rows.rows() == [("a", 0, None, 0.5), ("b", 1, None, None), ("c", 2, "nouns", None)]


def test_the_last_of_two_rows_of_one_key_wins(store: GraphStore) -> None:
    store.merge_nodes("Feature", pl.DataFrame({"key": ["d", "d"], "layer": [5, 6]}))
    store.merge_edges("WIRED", pl.DataFrame({"source": ["a", "a"], "target": ["b", "b"], "path": ["ov", "ov"], "weight": [1.0, 2.0]}))
    assert store.query("MATCH (f:Feature) WHERE f.key = 'd' RETURN f.layer AS layer").rows() == [(6,)]
    assert store.read_edges("WIRED")["weight"].to_list() == [2.0]


def test_merging_the_same_edges_twice_changes_nothing_and_new_values_replace_old(store: GraphStore) -> None:
    rows = EDGE.with_columns(run=pl.lit("r"), n=pl.Series([3, None]), ablation_metric=pl.Series([STRANGE, None]))
    store.merge_edges("INFLUENCES", rows)
    before = store.read_edges("INFLUENCES")
    store.merge_edges("INFLUENCES", rows)
    assert_frame_equal(store.read_edges("INFLUENCES"), before)
    shown = before.select("source", "target", "run", "weight", "n", "ablation_metric").rows()
    assert shown == [("a", "b", "r", 1.5, 3, STRANGE), ("b", "c", "r", -2.0, None, None)]
    store.merge_edges("INFLUENCES", pl.DataFrame({"source": ["a"], "target": ["b"], "run": ["r"], "weight": [7.0]}))
    assert store.read_edges("INFLUENCES").select("weight", "n").rows() == [(7.0, 3), (-2.0, None)]


def test_edges_of_another_identity_are_other_edges(store: GraphStore) -> None:
    for run in ("r2", "r1"):
        store.merge_edges("INFLUENCES", EDGE.with_columns(run=pl.lit(run)))
    assert store.read_edges("INFLUENCES").select("run", "source").rows() == [("r1", "a"), ("r1", "b"), ("r2", "a"), ("r2", "b")]
    assert store.read_edges("INFLUENCES", run="r2")["run"].to_list() == ["r2", "r2"]
    assert store.read_edges("INFLUENCES", run="r3").height == 0


def test_types_that_join_several_labels(store: GraphStore) -> None:
    store.merge_nodes("Circuit", pl.DataFrame({"key": ["circuit"]}))
    store.merge_nodes("Block", pl.DataFrame({"key": ["block", "outer"]}))
    store.merge_nodes("Score", pl.DataFrame({"key": ["x", "y"], "value": [1.0, float("inf")]}))
    store.merge_nodes("Partition", pl.DataFrame({"key": ["partition"]}))
    store.merge_edges("SCORED", pl.DataFrame({"source": ["circuit", "block"], "target": ["x", "y"]}))
    store.merge_edges("PART_OF", pl.DataFrame({"source": ["block", "outer"], "target": ["outer", "partition"]}))
    assert store.read_edges("SCORED").rows() == [("block", "y"), ("circuit", "x")]
    assert store.read_edges("PART_OF").rows() == [("block", "outer"), ("outer", "partition")]
    with pytest.raises(UnknownEndpoint, match="partition"):
        store.merge_edges("SCORED", pl.DataFrame({"source": ["circuit", "partition"], "target": ["y", "y"]}))
    assert store.read_edges("SCORED").height == 2


@pytest.mark.parametrize("label", list(NODES))
def test_empty_frames_of_nodes_are_fine(reopen: Opener, label: str) -> None:
    store = reopen()
    store.merge_nodes(label, pl.DataFrame(schema={name: column.dtype for name, column in NODES[label].all_columns.items()}))
    assert count(store, f"(n:{label})") == (1 if label == "Meta" else 0)


@pytest.mark.parametrize("type", list(EDGES))
def test_empty_frames_of_edges_are_fine_and_reading_none_has_all_columns(reopen: Opener, type: str) -> None:
    store = reopen()
    schema = {name: column.dtype for name, column in EDGES[type].all_columns.items()}
    store.merge_edges(type, pl.DataFrame(schema=schema))
    assert dict(store.read_edges(type).schema) == schema


def test_an_unknown_endpoint_is_named_and_nothing_is_written(store: GraphStore) -> None:
    with pytest.raises(UnknownEndpoint, match=r"1 node\(s\) .* 'nobody'; nothing was written"):
        store.merge_edges("INFLUENCES", pl.DataFrame({"source": ["a", "nobody"], "target": ["b", "b"], "run": ["r", "r"]}))
    with pytest.raises(UnknownEndpoint, match=r"4 node\(s\)"):
        store.merge_edges("INFLUENCES", pl.DataFrame({"source": ["u", "v"], "target": ["w", "x"], "run": ["r", "r"]}))
    assert count(store, "()-[e:INFLUENCES]->()") == 0


def test_rows_that_do_not_fit_are_refused_by_column(store: GraphStore) -> None:
    for action, message in (
        (lambda: store.merge_nodes("Feature", pl.DataFrame({"key": ["d"], "colour": ["red"]})), "unknown column 'colour'"),
        (lambda: store.merge_nodes("Feature", pl.DataFrame({"layer": [1]})), "column 'key' is missing"),
        (lambda: store.merge_nodes("Feature", pl.DataFrame({"key": ["d", None]})), "'key' is null in 1 of 2"),
        (lambda: store.merge_nodes("Feature", pl.DataFrame({"key": ["d"], "layer": ["deep"]})), "'layer' must be INT64, not String"),
        (lambda: store.merge_edges("INFLUENCES", EDGE), "column 'run' is missing"),
        (lambda: store.commit_sequence("r", "s", EDGE.with_columns(weight=pl.lit(None, dtype=pl.Float64)), {}), "'weight' is null in 2 of 2"),
        (lambda: store.commit_sequence("r", "s", pl.concat([EDGE, EDGE]), {}), "twice in one sequence"),
    ):
        with pytest.raises(RowsRejected, match=message):
            action()
    with pytest.raises(UnknownLabel, match="unknown node label 'Feat': the schema has Meta, Model, Feature"):
        store.merge_nodes("Feat", pl.DataFrame({"key": ["d"]}))
    with pytest.raises(UnknownLabel, match="unknown edge type 'DRIVEN'"):
        store.read_edges("DRIVEN")
    assert count(store, "(f:Feature)") == 3
    assert count(store, "()-[e:ON_SEQUENCE]->()") == 0


# Sequences


def test_a_sequence_is_committed_once_with_its_mark(store: GraphStore) -> None:
    assert store.commit_sequence("r", "s", EDGE, {"metric_clean": 3.5, "metric_corrupt": None})
    assert not store.commit_sequence("r", "s", EDGE, {"metric_clean": 9.0})
    assert store.read_edges("ATTRIBUTES").rows() == [("a", "b", "r", "s", -1, -1, 1.5), ("b", "c", "r", "s", -1, -1, -2.0)]
    assert store.read_edges("ON_SEQUENCE").rows() == [("r", "s", "r|s", "done", 2, 3.5, None)]


def test_positions_tell_edges_apart(store: GraphStore) -> None:
    rows = pl.DataFrame({"source": ["a"] * 3, "target": ["b"] * 3, "src_pos": [1, 0, 0], "dest_pos": [1, 2, 1], "weight": [1.0, 2.0, 3.0]})
    assert store.commit_sequence("r", "s", rows, {})
    assert store.read_edges("ATTRIBUTES", run="r").select("src_pos", "dest_pos", "weight").rows() == [(0, 1, 3.0), (0, 2, 2.0), (1, 1, 1.0)]


def test_sequences_committed_together_skip_those_done(store: GraphStore) -> None:
    store.commit_sequence("r", "s", EDGE, {})
    assert store.commit_sequences([SequenceCommit("r", "s", EDGE), SequenceCommit("r", "t", EDGE)]) == 1
    assert store.commit_sequences([SequenceCommit("r", "s", EDGE), SequenceCommit("r", "t", EDGE)]) == 0
    assert store.commit_sequences([]) == 0
    assert store.read_edges("ATTRIBUTES")["sequence"].to_list() == ["s", "s", "t", "t"]


def test_a_sequence_without_edges_is_marked(store: GraphStore) -> None:
    assert store.commit_sequence("r", "s", EDGE.clear(), {"status": "done"})
    assert not store.commit_sequence("r", "s", EDGE, {})
    assert store.read_edges("ATTRIBUTES").height == 0
    assert store.read_edges("ON_SEQUENCE")["n_edges"].to_list() == [0]


def test_an_error_in_the_middle_leaves_nothing_of_any_sequence(store: GraphStore) -> None:
    wrong = EDGE.with_columns(target=pl.Series(["c", "nobody"]))
    with pytest.raises(UnknownEndpoint, match=r"ATTRIBUTES edges name 1 node.* 'nobody'"):
        store.commit_sequences([SequenceCommit("r", "s", EDGE), SequenceCommit("r", "t", wrong)])
    for run, sequence, unknown in (("r", "absent", "absent"), ("nowhere", "s", "nowhere")):
        with pytest.raises(UnknownEndpoint, match=f"ON_SEQUENCE edges name 1 node.* '{unknown}'"):
            store.commit_sequence(run, sequence, EDGE, {})
    assert count(store, "()-[e:ATTRIBUTES]->()") == 0
    assert count(store, "()-[e:ON_SEQUENCE]->()") == 0
    assert store.commit_sequences([SequenceCommit("r", "s", EDGE), SequenceCommit("r", "t", EDGE)]) == 2


@pytest.mark.slow
def test_a_big_batch_is_written_and_read_whole(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """45,000 edges: more than one statement, and one hub with more edges than go into one record."""
    n = 300
    keys = [f"{STRANGE}{i}" for i in range(n)]
    store.merge_nodes("Feature", pl.DataFrame({"key": keys}))
    source, target = [keys[0]] * 30_000, [keys[1 + i % (n - 1)] for i in range(30_000)]
    rows = pl.DataFrame({
        "source": [*source, *(keys[i % n] for i in range(15_000))], "target": [*target, *(keys[(i * 7 + i // n) % n] for i in range(15_000))],
        "src_pos": [*range(30_000), *range(30_000, 45_000)], "dest_pos": [0] * 45_000, "weight": [i / 64 for i in range(45_000)],
    })
    if store.dialect == "neo4j":
        monkeypatch.setattr("featlas.queries.server.EDGES_PER_RECORD", 7_000)
    assert store.commit_sequence("r", "s", rows, {})
    expected = rows.with_columns(run=pl.lit("r"), sequence=pl.lit("s")).select(list(EDGES["ATTRIBUTES"].all_columns)).sort(EDGES["ATTRIBUTES"].order)
    assert_frame_equal(store.read_edges("ATTRIBUTES", run="r"), expected)
    nullable = rows.select("source", "target").unique().sort("source", "target")
    nullable = nullable.with_columns(run=pl.lit("r"), n=pl.when(pl.int_range(pl.len()) % 3 == 0).then(None).otherwise(pl.int_range(pl.len())))
    store.merge_edges("INFLUENCES", nullable)
    assert_frame_equal(store.read_edges("INFLUENCES").select("source", "target", "run", "n"), nullable.sort("source", "target"))


# Reading a part


@pytest.fixture
def filled(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> tuple[GraphStore, pl.DataFrame]:
    """Edges of two runs and two sequences between nodes whose keys order differently by code point, by UTF-16 and by locale."""
    monkeypatch.setattr("featlas.queries.server.EDGES_PER_RECORD", 8)  # so that a few nodes are hubs
    keys = ["", "A", "B", "Z", "a", "b", "z", "é", STRANGE, "日本", "\uffee", "🙂", "🙂🙂"]
    store.merge_nodes("Feature", pl.DataFrame({"key": keys}))
    store.merge_nodes("Run", pl.DataFrame({"key": ["q"]}))
    ends = [(u, v) for i, u in enumerate(keys) for j, v in enumerate(keys) if (i * j + j) % 3]
    rows = pl.DataFrame({"source": [u for u, _ in ends], "target": [v for _, v in ends], "weight": [float(i) for i in range(len(ends))]})
    written = []
    for run, sequence, part in (("r", "s", rows), ("r", "t", rows[::2]), ("q", "s", rows[::3])):
        store.commit_sequence(run, sequence, part, {})
        store.merge_edges("INFLUENCES", part.with_columns(run=pl.lit(run)))
        written.append(part.with_columns(run=pl.lit(run), sequence=pl.lit(sequence), src_pos=pl.lit(-1), dest_pos=pl.lit(-1)))
    edge = EDGES["ATTRIBUTES"]
    return store, pl.concat(written).select(pl.col(name).cast(column.dtype) for name, column in edge.all_columns.items()).sort(edge.order)


PARTS = tuple(itertools.product(
    (None, "r"), (None, "t", "absent"),
    (None, KeyRange("B", "b"), KeyRange("日", "\uffff"), KeyRange("🙂", "🙂🙂"), KeyRange("b", "a")),
    (None, KeyRange("", "é"), KeyRange(STRANGE, "\uffee")),
))  # fmt: skip


def test_a_part_is_what_a_filter_of_the_whole_gives(filled) -> None:
    store, written = filled
    for run, sequence, sources, targets in PARTS:
        expected = written
        for column, value in (("run", run), ("sequence", sequence)):
            expected = expected if value is None else expected.filter(pl.col(column) == value)
        for column, keys in (("source", sources), ("target", targets)):
            if keys is not None:
                expected = expected.filter(pl.Series([key in keys for key in expected[column].to_list()], dtype=pl.Boolean))
        assert_frame_equal(store.read_edges("ATTRIBUTES", run=run, sequence=sequence, sources=sources, targets=targets), expected)


def test_filters_hold_for_types_that_have_the_property(filled) -> None:
    store, _ = filled
    whole = store.read_edges("INFLUENCES")
    assert_frame_equal(store.read_edges("INFLUENCES", sequence="s", run="q"), whole.filter(pl.col("run") == "q"))  # edges of no sequence
    assert_frame_equal(store.read_edges("INFLUENCES", targets=KeyRange("z", "z")), whole.filter(pl.col("target") == "z"))
    marks = store.read_edges("ON_SEQUENCE", run="r", sources=KeyRange("r", "r"), targets=KeyRange("t", "zz"))
    assert marks.select("source", "target").rows() == [("r", "t")]


# Queries


def test_parameters_carry_any_text_and_labels_survive(store: GraphStore) -> None:
    found = store.query("MATCH (f:Feature) WHERE f.label = $label RETURN f.key AS key, f.label AS label", {"label": STRANGE})
    assert found.rows() == [("c", STRANGE)]
    plain = {"a": 1, "b": 0.5, "c": True, "d": ["x", "y"]}
    assert store.query("RETURN $a AS a, $b AS b, $c AS c, $d AS d", plain).rows(named=True) == [plain]


WRITES = (
    "CREATE (:Feature {key: 'new'})", "MERGE (f:Feature {key: 'new'})", "MATCH (f:Feature) SET f.layer = 99", "MATCH (f:Feature) DETACH DELETE f",
    "MATCH (a:Feature {key: 'a'}) MATCH (b:Feature {key: 'b'}) CREATE (a)-[:WIRED {weight: 1.0}]->(b)",
    "// a comment first\nMATCH (f:Feature) SET f.label = 'x' RETURN f.key AS key", "PROFILE CREATE (:Feature {key: 'new'})",
    "UNWIND ['x'] AS key CREATE (:Feature {key: key})",
)


@pytest.mark.slow
@pytest.mark.parametrize("cypher", WRITES)
def test_a_query_writes_only_when_allowed(store: GraphStore, reopen: Opener, cypher: str) -> None:
    state = "MATCH (f:Feature) RETURN f AS f ORDER BY f.key"
    before = store.query(state)
    with pytest.raises(WriteRefused, match="--write"):
        store.query(cypher)
    store.close()
    reader = reopen(read_only=True)
    with pytest.raises(WriteRefused, match="opened read-only"):
        reader.query(cypher, write=True)
    assert_frame_equal(reader.query(state), before)


def test_an_allowed_write_is_kept(store: GraphStore) -> None:
    text = "MATCH (f:Feature) WHERE f.key = $key SET f.label = $label RETURN f.label AS label"
    assert store.query(text, {"key": "a", "label": STRANGE}, write=True).rows() == [(STRANGE,)]
    assert store.query("MATCH (f:Feature) WHERE f.key = 'a' RETURN f.label AS label").rows() == [(STRANGE,)]


@pytest.mark.parametrize(("cypher", "shown"), [
    ("MATCH (f:Feature RETURN f", "RETURN"), ("RETURN 1; RETURN 2", "statement"), ("COMMIT; CREATE (:Feature {key: 'x'})", "COMMIT|statement"),
    ("", "empty|end of input"),
    ("RETURN $missing", "missing"), ("MATCH (f) RETURN g", "g"), ("RETURN 1 / 0 AS x", "zero"),
])
def test_a_wrong_query_shows_the_databases_own_message(store: GraphStore, cypher: str, shown: str) -> None:
    with pytest.raises(UserError, match=shown) as caught:
        store.query(cypher)
    assert isinstance(caught.value, (QueryRejected, WriteRefused))
    assert count(store, "(f:Feature)") == 3
    if shown == "RETURN":
        assert "line" in str(caught.value)
        assert "^" in str(caught.value)


@pytest.mark.parametrize(("cypher", "parameters"), [
    ("RETURN $x AS x", {"x": 10**30}), ("RETURN $x AS x", {"x": object()}), ("RETURN '\ud800' AS x", {}),
])
def test_what_the_database_cannot_take_is_the_askers_mistake(store: GraphStore, cypher: str, parameters: dict[str, object]) -> None:
    with pytest.raises(QueryRejected) as caught:
        store.query(cypher, parameters)
    assert "\n" not in str(caught.value)


def test_a_map_of_mixed_lists_is_a_value_or_a_mistake(store: GraphStore) -> None:
    try:
        assert store.query("RETURN $x AS x", {"x": {"a": [1, "b"]}})["x"][0] == '{"a": [1, "b"]}'
    except QueryRejected:
        assert store.dialect == "ladybug"  # its lists are of one type


def test_a_relationship_knows_its_ends_wherever_it_stands(store: GraphStore) -> None:
    store.merge_nodes("Circuit", pl.DataFrame({"key": ["circuit"]}))
    store.merge_edges("WIRED", EDGE.with_columns(path=pl.lit("ov")))
    store.merge_edges("IN_CIRCUIT", pl.DataFrame({"source": ["c"], "target": ["circuit"]}))
    first = {"type": "WIRED", "source": "a", "target": "b", "properties": {"path": "ov", "weight": 1.5}}
    second = {"type": "WIRED", "source": "b", "target": "c", "properties": {"path": "ov", "weight": -2.0}}
    member = {"type": "IN_CIRCUIT", "source": "c", "target": "circuit", "properties": {}}
    assert store.answer("MATCH ()-[e:WIRED]->(b) RETURN e AS e ORDER BY b.key").columns == [[first, second]]
    # matched against its direction, and beside a node that is one of its ends
    assert store.answer("MATCH (n)<-[e:IN_CIRCUIT]-() RETURN n.key AS key, e AS e, [e] AS list").columns == [["circuit"], [member], [[member]]]
    path = store.answer("MATCH p = (a)-[:WIRED*2..2]->(c) RETURN p AS p").columns[0][0]
    assert path["relationships"] == [first, second]
    assert [node["properties"]["key"] for node in path["nodes"]] == ["a", "b", "c"]
    assert json.loads(store.query("MATCH ()-[e:IN_CIRCUIT]->() RETURN e AS e")["e"][0]) == member


def test_rows_over_the_limit_are_not_fetched(store: GraphStore) -> None:
    text = "MATCH (f:Feature) RETURN f.key AS key, f.layer AS layer ORDER BY key"
    for rows, keys, cut in ((2, ["a", "b"], True), (3, ["a", "b", "c"], False), (9, ["a", "b", "c"], False)):
        answer = store.answer(text, limits=QueryLimits(rows=rows))
        assert (list(answer.names), answer.columns[0], answer.cut) == (["key", "layer"], keys, cut)
    assert not store.answer(text).cut
    assert store.answer(text, limits=QueryLimits(rows=2)).frame().rows() == [("a", 0), ("b", 1)]


@pytest.mark.slow
def test_a_query_that_takes_too_long_is_stopped_and_the_next_is_answered(store: GraphStore) -> None:
    store.merge_nodes("Feature", pl.DataFrame({"key": [f"n{i}" for i in range(400)], "layer": list(range(400))}))
    matched = " ".join(f"MATCH ({name}:Feature)" for name in "abcd")
    text = f"{matched} WHERE a.layer + b.layer + c.layer + d.layer = -1 RETURN count(*) AS n"
    began = time.monotonic()
    with pytest.raises(QueryTooSlow, match=r"0\.5 s"):
        store.answer(text, limits=QueryLimits(seconds=0.5))
    assert time.monotonic() - began < 30
    assert store.answer("RETURN 1 AS x", limits=QueryLimits(rows=5, seconds=5)).columns == [[1]]


# Opening and closing


def test_what_was_written_is_there_after_reopening(store: GraphStore, reopen: Opener) -> None:
    store.commit_sequence("r", "s", EDGE, {})
    before = store.read_edges("ATTRIBUTES")
    store.close()
    store.close()
    with reopen(read_only=True) as again:
        assert_frame_equal(again.read_edges("ATTRIBUTES"), before)
        for action in (
            lambda: again.merge_nodes("Run", pl.DataFrame({"key": ["x"]})), lambda: again.commit_sequence("r", "t", EDGE, {}),
            lambda: again.merge_edges("INFLUENCES", EDGE.with_columns(run=pl.lit("r"))),
        ):
            with pytest.raises(WriteRefused, match="read-only"):
                action()
    with reopen() as again:
        assert again.commit_sequence("r", "t", EDGE, {})


def test_a_graph_of_another_schema_version_is_refused_with_both_versions(store: GraphStore, reopen: Opener) -> None:
    store.query("MATCH (m:Meta) SET m.value = '0'", write=True)
    store.close()
    with pytest.raises(SchemaVersionMismatch, match=f"has schema version 0, this featlas works with version {SCHEMA_VERSION}: .*new graph"):
        reopen()
    with pytest.raises(SchemaVersionMismatch):
        reopen(read_only=True)


def test_an_absent_graph_is_not_opened_for_reading(reopen: Opener) -> None:
    with pytest.raises(NotAGraph, match="ingest"):
        reopen(read_only=True)


def test_where_the_graph_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEO4J_URI", raising=False)
    assert graph_target(Path("atlas")) == Path("atlas/graph.lbug")
    monkeypatch.setenv("NEO4J_URI", "bolt://host")
    assert graph_target(Path("atlas")) == "bolt://host"
    assert graph_target(Path("atlas"), "other.lbug") == "other.lbug"
    with pytest.raises(NotAGraph, match=r"http://host: a server's URI begins with one of bolt://"):
        open_graph("http://host")


# The embedded store's own traps


@pytest.mark.slow
@pytest.mark.parametrize("read_only", [False, True])
def test_a_graph_of_an_earlier_featlas_gets_what_it_lacks_when_it_is_opened(tmp_path: Path, read_only: bool) -> None:
    """Columns of nodes and edges, and whole tables, are added in place; what was there stays."""
    path = tmp_path / "graph.lbug"
    with open_graph(path) as store:
        store.merge_nodes("Feature", pl.DataFrame({"key": ["a", "b"], "label": ["verbs", None]}))
        store.merge_nodes("Circuit", pl.DataFrame({"key": ["c"]}))
        store.merge_edges("IN_CIRCUIT", pl.DataFrame({"source": ["a"], "target": ["c"], "role": ["input"]}))
        for text in ("ALTER TABLE IN_CIRCUIT DROP ablation_effect", "ALTER TABLE Score DROP task", "DROP TABLE ABLATED", "DROP TABLE WIRED"):
            store.query(text, write=True)
    with open_graph(path, read_only=read_only) as store:
        assert store.read_edges("IN_CIRCUIT").select("source", "target", "role", "ablation_effect").rows() == [("a", "c", "input", None)]
        assert store.read_edges("ABLATED").is_empty()
        assert store.query("MATCH (f:Feature) RETURN f.label AS label ORDER BY f.key")["label"].to_list() == ["verbs", None]
        assert store.query("MATCH (s:Score) RETURN s.task AS task").is_empty()
    with open_graph(path) as store:
        store.merge_edges("IN_CIRCUIT", pl.DataFrame({"source": ["a"], "target": ["c"], "ablation_effect": [0.5]}))
        assert store.read_edges("IN_CIRCUIT").select("role", "ablation_effect").rows() == [("input", 0.5)]
        store.merge_edges("WIRED", pl.DataFrame({"source": ["a"], "target": ["b"], "path": ["residual"]}))


@pytest.mark.slow
@pytest.mark.parametrize("cypher", [
    "COPY (MATCH (f:Feature) RETURN f.key) TO '{folder}/out.csv'", "EXPORT DATABASE '{folder}/exported' (format='csv')",
    "LOAD FROM '{folder}/in.csv' RETURN *", "MATCH (f:Feature) LOAD FROM '{folder}/in.csv' RETURN *",
    "ATTACH '{folder}/other.lbug' AS other (dbtype lbug)", "INSTALL json", "CALL threads = 1", "CHECKPOINT", "COMMIT",
    "explain copy (match (f:Feature) return f.key) to '{folder}/out.csv'", "CREATE MACRO twice(x) AS x + x",
    "/* MATCH */ copy/**/(MATCH (f:Feature) RETURN f.key) TO '{folder}/out.csv'",
])
def test_reading_queries_have_no_side_effects(tmp_path: Path, cypher: str) -> None:
    (tmp_path / "in.csv").write_text("a,b\n1,2\n")
    with open_graph(tmp_path / "graph.lbug") as store:
        store.merge_nodes("Feature", pl.DataFrame({"key": ["a"]}))
        with pytest.raises(WriteRefused):
            store.query(cypher.replace("{folder}", str(tmp_path)))
        assert {path.name for path in tmp_path.iterdir()} <= {"in.csv", "graph.lbug", "graph.lbug.wal", "graph.lbug.shadow"}
        assert store.query("MATCH (f:Feature) RETURN 'COPY (x) TO y' AS load, f.key AS copy").rows() == [("COPY (x) TO y", "a")]


def in_another_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


OPEN = "import sys; from featlas.queries.store import open_graph; open_graph(sys.argv[1], read_only=len(sys.argv) > 2).query('RETURN 1 AS x')"


@pytest.mark.slow
def test_a_second_writing_process_is_refused_with_the_first_ones_number(tmp_path: Path) -> None:
    with open_graph(tmp_path) as store:
        store.merge_nodes("Run", pl.DataFrame({"key": ["r"]}))
        refused = in_another_process(OPEN, tmp_path)
        assert refused.returncode != 0
        assert f"StoreBusy: {tmp_path / 'graph.lbug'} is being written by process {os.getpid()}" in refused.stderr
        assert in_another_process(OPEN, tmp_path, "read-only").returncode == 0
    assert in_another_process(OPEN, tmp_path).returncode == 0


def test_stores_on_one_path_share_one_handle(tmp_path: Path) -> None:
    """Two handles of Ladybug's own on one file would lose the second one's writes."""
    with open_graph(tmp_path) as one:
        two = open_graph(tmp_path / "graph.lbug")
        two.merge_nodes("Run", pl.DataFrame({"key": ["r"]}))
        one.merge_nodes("Run", pl.DataFrame({"key": ["q"]}))
        reader = open_graph(tmp_path, read_only=True)
        assert [count(each, "(r:Run)") for each in (one, two, reader)] == [2, 2, 2]
        with pytest.raises(WriteRefused):
            reader.merge_nodes("Run", pl.DataFrame({"key": ["x"]}))
        two.close()
        assert count(one, "(r:Run)") == 2
        with pytest.raises(StoreFailed, match="closed"):
            two.query("RETURN 1 AS x")
        reader.close()
    with open_graph(tmp_path, read_only=True) as reader:
        assert count(reader, "(r:Run)") == 2
        with pytest.raises(StoreBusy, match="open for reading in this process"):
            open_graph(tmp_path)


def test_threads_take_turns_in_writing(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with open_graph(tmp_path) as store:
        def write(i: int) -> None:
            try:
                for j in range(5):
                    store.merge_nodes("Run", pl.DataFrame({"key": [f"{i}-{j}"]}))
                    count(store, "(r:Run)")
            except FeatlasError as error:
                failures.append(error)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert count(store, "(r:Run)") == 20


def test_what_is_no_graph_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.lbug").write_text("not a database" * 1000)
    with pytest.raises(NotAGraph, match=r"notes\.lbug is not a Ladybug database"):
        open_graph(tmp_path / "notes.lbug")
    import ladybug
    with ladybug.Database(str(tmp_path / "foreign.lbug")) as database, ladybug.Connection(database) as connection:
        connection.execute("CREATE NODE TABLE Person(name STRING PRIMARY KEY)")
    with pytest.raises(NotAGraph, match=r"foreign\.lbug is a Ladybug database, but no featlas graph"):
        open_graph(tmp_path / "foreign.lbug")
    with pytest.raises(NotAGraph, match="folder cannot be made"):
        open_graph(tmp_path / "notes.lbug" / "below" / "graph.lbug")
    assert (tmp_path / "notes.lbug").read_text() == "not a database" * 1000


WRITER = """
import os, signal, sys
import polars as pl
from featlas.queries.store import open_graph
store = open_graph(sys.argv[1])
keys = [f"f{i}" for i in range(100)]
store.merge_nodes("Feature", pl.DataFrame({"key": keys})); store.merge_nodes("Run", pl.DataFrame({"key": ["r"]}))
store.merge_nodes("Sequence", pl.DataFrame({"key": [f"s{i}" for i in range(50)]}))
for i in range(50):
    edges = pl.DataFrame({"source": keys * 20, "target": keys * 20, "src_pos": [j // 100 for j in range(2000)], "weight": [1.0] * 2000})
    store.commit_sequence("r", f"s{i}", edges, {})
    if i == 10: print("ready", flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_sequences(tmp_path: Path) -> None:
    """Edges and mark are one: every marked sequence has its 2000 edges, no other has any, and the graph can be written again."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    with open_graph(tmp_path, read_only=True) as store:
        marked = store.read_edges("ON_SEQUENCE")["target"].to_list()
        edges = store.query("MATCH ()-[e:ATTRIBUTES]->() RETURN e.sequence AS sequence, count(*) AS n ORDER BY sequence")
    assert edges["sequence"].to_list() == sorted(marked)
    assert len(marked) >= 11
    assert set(edges["n"]) == {2000}
    with open_graph(tmp_path) as store:
        assert store.commit_sequence("r", "s49", EDGE.with_columns(source=pl.lit("f0"), target=pl.Series(["f1", "f2"])), {}) == ("s49" not in marked)


@pytest.mark.slow
def test_a_torn_log_costs_only_the_transaction_that_was_not_committed(tmp_path: Path) -> None:
    code = WRITER.replace('print("ready", flush=True)', "os.kill(os.getpid(), signal.SIGKILL)")
    assert in_another_process(code, tmp_path).returncode == -9
    log = tmp_path / "graph.lbug.wal"
    log.write_bytes(log.read_bytes()[:-100])
    with open_graph(tmp_path) as store:
        assert store.read_edges("ON_SEQUENCE").height == 10
        assert store.read_edges("ATTRIBUTES").height == 20_000
        assert isinstance(store, LadybugStore)


@pytest.mark.slow
def test_copy_and_the_mark_in_one_transaction_would_not_survive_a_crash(tmp_path: Path) -> None:
    """Why edges are not written by COPY: its rows are on disk only after the checkpoint, the mark at the commit."""
    code = """
import os, signal, sys
import ladybug, polars as pl
c = ladybug.Connection(ladybug.Database(sys.argv[1], auto_checkpoint=False))
c.execute("CREATE NODE TABLE F(key STRING PRIMARY KEY)"); c.execute("CREATE REL TABLE E(FROM F TO F)"); c.execute("CREATE (:F {key: 'a'})")
c.execute("BEGIN TRANSACTION"); frame = pl.DataFrame({"s": ["a"], "t": ["a"]}); c.execute("COPY E FROM $frame", {"frame": frame})
c.execute("CREATE (:F {key: 'mark'})"); c.execute("COMMIT"); os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "copy.lbug"
    assert in_another_process(code, path).returncode == -9
    import ladybug
    with ladybug.Database(str(path)) as database, ladybug.Connection(database) as connection:
        marks = connection.execute("MATCH (f:F {key: 'mark'}) RETURN count(*)").get_next()
        edges = connection.execute("MATCH ()-[e:E]->() RETURN count(*)").get_next()
    assert (marks, edges) == ([1], [0])


# The server's own traps


@pytest.mark.neo4j
def test_server_mistakes_are_one_line_without_the_password(clean_neo4j: Neo4jTestServer) -> None:
    right = ServerCredentials(clean_neo4j.username, clean_neo4j.password)
    address = clean_neo4j.uri.removeprefix("bolt://")
    for uri, credentials, kind, message in (
        (clean_neo4j.uri, ServerCredentials("neo4j", "hunter2-wrong"), WrongCredentials, "set NEO4J_USERNAME and NEO4J_PASSWORD"),
        (clean_neo4j.uri, ServerCredentials("neo4j", right.password, "absent"), UnknownDatabase, "no database 'absent': set NEO4J_DATABASE"),
        ("bolt://127.0.0.1:1", right, StoreUnreachable, "featlas neo4j up"), ("neo4j://127.0.0.1:1", right, StoreUnreachable, "featlas neo4j up"),
        (f"bolt+s://{address}", right, StoreUnreachable, "without TLS the scheme is bolt://"),
        ("bolt://127.0.0.1:port", right, NotAGraph, "is no server's URI"),
    ):
        with pytest.raises(kind) as caught:
            open_graph(uri, credentials=credentials)
        text = str(caught.value)
        assert message in text
        assert uri in text
        assert "\n" not in text
        assert "hunter2" not in text
        assert right.password not in text
    assert issubclass(WrongCredentials, UserError)
    assert not issubclass(StoreUnreachable, UserError)
    assert "hunter2" not in repr(ServerCredentials("neo4j", "hunter2"))


@pytest.mark.neo4j
def test_credentials_come_from_the_environment(clean_neo4j: Neo4jTestServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NEO4J_USERNAME", clean_neo4j.username), ("NEO4J_PASSWORD", clean_neo4j.password), ("NEO4J_DATABASE", "neo4j")):
        monkeypatch.setenv(name, value)
    with open_graph(clean_neo4j.uri.replace("bolt://", "neo4j://")) as store:
        assert store.query("RETURN 1 AS x").rows() == [(1,)]


@pytest.mark.neo4j
def test_constraints_and_indexes_are_made_on_first_use(clean_neo4j: Neo4jTestServer) -> None:
    with open_graph(clean_neo4j.uri, credentials=ServerCredentials(clean_neo4j.username, clean_neo4j.password)):
        pass
    constraints = clean_neo4j.run("SHOW CONSTRAINTS YIELD labelsOrTypes, properties WHERE properties = ['key']")
    constrained = {tuple(row["labelsOrTypes"]) for row in constraints}
    assert {(label,) for label in NODES} | {("ON_SEQUENCE",)} <= constrained
    indexed = {(row["labelsOrTypes"][0], row["properties"][0]) for row in clean_neo4j.run("SHOW RANGE INDEXES") if row["labelsOrTypes"]}
    assert {("ATTRIBUTES", "run"), ("ATTRIBUTES", "sequence"), ("INFLUENCES", "run"), ("Feature", "site")} <= indexed


@pytest.mark.neo4j
def test_another_ones_database_is_left_alone(clean_neo4j: Neo4jTestServer) -> None:
    clean_neo4j.run("CREATE (:Feature {name: 'of a house'})")
    with pytest.raises(NotAGraph, match="NEO4J_DATABASE"):
        open_graph(clean_neo4j.uri, credentials=ServerCredentials(clean_neo4j.username, clean_neo4j.password))
    assert clean_neo4j.run("MATCH (n) RETURN count(n) AS n") == [{"n": 1}]


@pytest.mark.neo4j
def test_two_writers_of_one_sequence_write_it_once(clean_neo4j: Neo4jTestServer) -> None:
    credentials = ServerCredentials(clean_neo4j.username, clean_neo4j.password)
    with open_graph(clean_neo4j.uri, credentials=credentials) as store:
        store.merge_nodes("Feature", pl.DataFrame({"key": ["a", "b", "c"]}))
        store.merge_nodes("Run", pl.DataFrame({"key": ["r"]}))
        store.merge_nodes("Sequence", pl.DataFrame({"key": [f"s{i}" for i in range(10)]}))
        written: list[bool] = []
        failures: list[BaseException] = []

        def write() -> None:
            try:
                written.extend([store.commit_sequence("r", f"s{i}", EDGE, {}) for i in range(10)])
            except FeatlasError as error:
                failures.append(error)

        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert written.count(True) == 10
        assert store.read_edges("ATTRIBUTES").height == 20
