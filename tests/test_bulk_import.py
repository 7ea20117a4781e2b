"""The offline importer: what is loaded equals what the embedded store holds, awkward texts included; nothing is ever overwritten."""

import gzip
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from featlas.queries import neo4j_server as launcher
from featlas.queries.bulk_import import (
    DatabaseNotEmpty,
    FolderNotEmpty,
    NoImportFiles,
    bulk_import,
    export_import_files,
    require_empty,
    write_import_files,
)
from featlas.queries.import_sink import ImportSink
from featlas.queries.schema import NODES
from featlas.queries.store import GraphStore, SequenceCommit, ServerCredentials, UnknownEndpoint, open_graph

from .servers import THROWAWAY

# quotes, separators, line ends, what other CSV dialects escape, other scripts, nothing at all; null is not the empty text
TEXTS = [
    'say "no"', "a,b;c\td", "line one\nline two", "carriage\rreturn\r\nboth", "back\\slash \\n \\\"", "", None, "  spaces  ", "null", "NULL", "'",
    '"', '""', "naïve 漢字 🜁 \u202eright to left", "\ufeffmark", ";", "|", "0123", "1e5", "true", "-", "#comment", "//", "$x {y}", "x" * 70_000,
]  # fmt: skip
WEIGHTS = [0.0, -1.5, 1e-300, 5e-324, 1.7976931348623157e308, 0.1, 123456789.12345679, -2.5e-7, math.inf, -math.inf]


def weird_graph() -> tuple[dict[str, pl.DataFrame], dict[str, pl.DataFrame]]:
    """A graph with every awkward text as a property and in a key, and an edge type that joins several labels."""
    n = len(TEXTS)
    features = pl.DataFrame(
        {
            "key": [f"m|d|resid_1|{i}|{(text or '')[:1000]}" for i, text in enumerate(TEXTS)],  # a server's index takes keys up to 8 kB
            "label": TEXTS,
            "index": [2**53 + 1 - i for i in range(n)],
            "layer": [None if i % 3 else i for i in range(n)],
            "frequency": [None if i % 4 == 0 else i / 7 for i in range(n)],
        }
    )
    keys = features["key"].to_list()
    nodes = {
        "Feature": features,
        "Run": pl.DataFrame({"key": ["run"], "settings": ['{"a": "b\\n"}'], "threshold": [1e-4], "steps": [1]}),
        "Sequence": pl.DataFrame({"key": ["s1", "s2"], "clean": ["The keys\nare", 'She said "hi"'], "task": ["agreement", None]}),
        "Block": pl.DataFrame({"key": ["b1", "b2"], "size": [2, 3]}),
        "Partition": pl.DataFrame({"key": ["p"], "method": ["sbm"]}),
    }
    attributes = {
        "source": [keys[i % n] for i in range(40)],
        "target": [keys[(i * 7 + 1) % n] for i in range(40)],
        "run": ["run"] * 40,
        "sequence": ["s1" if i % 2 else "s2" for i in range(40)],
        "src_pos": [i % 5 - 1 for i in range(40)],
        "dest_pos": [i // 5 for i in range(40)],
        "weight": [WEIGHTS[i % len(WEIGHTS)] for i in range(40)],
    }
    edges = {
        "ATTRIBUTES": pl.DataFrame(attributes),
        "PART_OF": pl.DataFrame({"source": ["b1", "b2"], "target": ["b2", "p"]}),
        "ON_SEQUENCE": pl.DataFrame({"source": ["run"], "target": ["s1"], "key": ["run|s1"], "status": ["done"], "n_edges": [20]}),
    }
    return nodes, edges


def fill(store: GraphStore) -> None:
    nodes, edges = weird_graph()
    for label, rows in nodes.items():
        store.merge_nodes(label, rows)
    for type, rows in edges.items():
        store.merge_edges(type, rows)


def content(store: GraphStore) -> dict[str, pl.DataFrame]:
    """Everything in a store, in an order that does not depend on the database."""
    found = {}
    for label in NODES.values():
        columns = ", ".join(f"n.`{name}` AS `{name}`" for name in label.all_columns)
        rows = store.query(f"MATCH (n:{label.name}) RETURN {columns}")
        found[label.name] = rows.cast({name: column.dtype for name, column in label.all_columns.items()}).sort("key")
    return found | {type: store.read_edges(type) for type in ("ATTRIBUTES", "PART_OF", "ON_SEQUENCE", "INFLUENCES")}


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[GraphStore]:
    with open_graph(tmp_path / "graph.lbug") as store:
        fill(store)
        yield store


@pytest.mark.neo4j
@pytest.mark.slow
def test_imported_graph_equals_the_embedded_one(neo4j_jars: None, embedded: GraphStore, tmp_path: Path) -> None:
    home = tmp_path / "server"
    files = export_import_files(embedded, tmp_path / "import files, all", rows_per_file=7)  # many parts, and a name that needs quoting
    assert (files.n_nodes, files.n_edges) == (len(TEXTS) + 7, 43)
    try:
        info = bulk_import(files.folder, home, THROWAWAY)
        with open_graph(info.uri, credentials=ServerCredentials(info.username, info.password)) as server:
            expected, found = content(embedded), content(server)
            for name, rows in expected.items():
                assert found[name].equals(rows), name
            assert found["Feature"]["label"].null_count() == 1
            assert (found["Feature"]["label"] == "").sum() == 1
            assert found["ATTRIBUTES"].height == 40
            constraints = server.query("SHOW CONSTRAINTS YIELD labelsOrTypes, properties RETURN labelsOrTypes[0] AS label, properties[0] AS property")
            assert ("Feature", "key") in constraints.rows()
        with pytest.raises(DatabaseNotEmpty, match=f"holds {len(TEXTS) + 6} nodes"):
            bulk_import(files.folder, home, THROWAWAY)
        with open_graph(info.uri, credentials=ServerCredentials(info.username, info.password)) as server:
            assert server.read_edges("ATTRIBUTES").height == 40
    finally:
        launcher.down(home)


@pytest.mark.neo4j
@pytest.mark.slow
def test_started_but_empty_database_is_loaded_and_a_failed_import_can_be_repeated(neo4j_jars: None, embedded: GraphStore, tmp_path: Path) -> None:
    home = tmp_path / "server"
    files = export_import_files(embedded, tmp_path / "files")
    with ImportSink(tmp_path / "measured") as sink:  # as while a run is measured
        nodes, edges = weird_graph()
        for label, rows in nodes.items():
            sink.merge_nodes(label, rows)
        sink.merge_edges("PART_OF", edges["PART_OF"])
        for (sequence,), rows in edges["ATTRIBUTES"].partition_by("sequence", as_dict=True).items():
            sink.commit_sequences([SequenceCommit("run", sequence, rows.drop("run", "sequence"))])
    broken = shutil.copytree(files.folder, tmp_path / "broken")
    (broken / "edges-PART_OF-Block-Block-0000.csv.gz").write_bytes(gzip.compress(b'"b1","nowhere"\n'))
    try:
        info = launcher.up(home, THROWAWAY)
        with open_graph(info.uri, credentials=ServerCredentials(info.username, info.password)):
            pass  # has the schema and its version node, and nothing else: that counts as empty
        with pytest.raises(launcher.AdminFailed, match="nowhere"):
            bulk_import(broken, home, THROWAWAY)
        again = bulk_import(tmp_path / "measured", home, THROWAWAY)
        assert again.password == info.password
        with open_graph(again.uri, credentials=ServerCredentials(again.username, again.password)) as server:
            assert content(server)["ATTRIBUTES"].equals(content(embedded)["ATTRIBUTES"])
    finally:
        launcher.down(home)


def test_export_of_a_store_writes_what_frames_do(embedded: GraphStore, tmp_path: Path) -> None:
    export_import_files(embedded, tmp_path / "a")
    write_import_files(*weird_graph(), tmp_path / "b")
    arguments = [set((tmp_path / name / "import.args").read_text().splitlines()) for name in ("a", "b")]
    assert arguments[0] == arguments[1]


def test_import_files_say_what_they_hold(tmp_path: Path) -> None:
    nodes = {"Feature": pl.DataFrame({"key": ["a", "b", 'c"'], "label": ["", None, "x,y"], "index": [1, 2, None]})}
    edges = {"INFLUENCES": pl.DataFrame({"source": ["a", "a"], "target": ["b", 'c"'], "run": ["r", "r"], "weight": [0.5, math.inf]})}
    files = write_import_files(nodes, edges, tmp_path / "files", rows_per_file=2)
    assert (files.n_nodes, files.n_edges) == (4, 2)
    text = {path.name: gzip.decompress(path.read_bytes()).decode() for path in files.folder.glob("*.gz")}
    text |= {path.name: path.read_text() for path in files.folder.iterdir() if path.suffix != ".gz"}
    assert text["nodes-Feature-header.csv"] == "key:ID(Feature),label:string,index:long\n"
    assert text["nodes-Feature-0000.csv.gz"] == '"a","",1\n"b",,2\n'
    assert text["nodes-Feature-0001.csv.gz"] == '"c""","x,y",\n'
    assert text["edges-INFLUENCES-Feature-Feature-header.csv"] == ":START_ID(Feature),:END_ID(Feature),run:string,weight:double\n"
    assert text["edges-INFLUENCES-Feature-Feature-0000.csv.gz"] == '"a","b","r","0.5"\n"a","c""","r","Infinity"\n'
    assert text["nodes-Meta-0000.csv.gz"] == '"schema_version","1"\n'
    assert text["import.args"].splitlines() == [
        "--id-type=string",
        "--nodes=Meta=nodes-Meta-header.csv,nodes-Meta-0000.csv.gz",
        "--nodes=Feature=nodes-Feature-header.csv,nodes-Feature-0000.csv.gz,nodes-Feature-0001.csv.gz",
        "--relationships=INFLUENCES=edges-INFLUENCES-Feature-Feature-header.csv,edges-INFLUENCES-Feature-Feature-0000.csv.gz",
    ]


def test_edge_to_a_node_that_is_not_there_is_named(tmp_path: Path) -> None:
    nodes = {"Feature": pl.DataFrame({"key": ["a"]})}
    edges = {"INFLUENCES": pl.DataFrame({"source": ["a", "a"], "target": ["nowhere", "a"], "run": ["r", "r"]})}
    with pytest.raises(UnknownEndpoint, match=r"INFLUENCES .*'nowhere'"):
        write_import_files(nodes, edges, tmp_path / "files")


def test_folders_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(FolderNotEmpty, match="is not empty"):
        write_import_files({}, {}, tmp_path)
    with pytest.raises(NoImportFiles, match=r"import\.args"):
        bulk_import(tmp_path, tmp_path / "home")
    require_empty(tmp_path / "never started")  # and starts nothing
