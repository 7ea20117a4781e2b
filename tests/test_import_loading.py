"""Import files added to graphs that hold something already: nothing is lost, nothing is doubled, whatever is killed in between."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from featlas.ingest.closing import close_run
from featlas.queries.bulk_import import export_import_files
from featlas.queries.checking import graph_difference
from featlas.queries.import_loading import FilesLoaded, load_import_files
from featlas.queries.import_sink import ImportSink
from featlas.queries.integrity import check_atlas
from featlas.queries.store import GraphStore, SequenceCommit, open_graph

from .atlas_cases import SEQUENCES, edges_of, feature, write_graph
from .servers import Neo4jTestServer
from .test_import_sink import commit, measure, provenance

pytestmark = pytest.mark.slow  # each runs whole commands, copies or loads

CHILD = """
import os, signal, sys
from pathlib import Path
from featlas.queries import embedded
from featlas.queries.import_loading import load_import_files
from featlas.queries.store import open_graph

folder, graph, left = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
commit = embedded._end_transaction

def killed(connection):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(connection)

with open_graph(graph) as store:
    embedded._end_transaction = killed
    load_import_files(store, folder, edges_per_block=9)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas' graph, and in `files` all that it holds, a sequence's edges spread over the parts."""
    root = tmp_path_factory.mktemp("made")
    with open_graph(root / "graph.lbug") as store:
        write_graph(store)
        export_import_files(store, root / "files", rows_per_file=7, edges_per_block=7)
    return root


def load(folder: Path, graph: Path) -> FilesLoaded:
    with open_graph(graph) as store:
        return load_import_files(store, folder, edges_per_block=9)


def differences(first: Path, second: Path) -> pl.DataFrame:
    with open_graph(first, read_only=True) as a, open_graph(second, read_only=True) as b:
        return graph_difference(a, b)


def killed(folder: Path, graph: Path, after: int) -> bool:
    """Load in a process of its own that is killed before its transaction number `after` is committed; whether there were so many."""
    done = subprocess.run([sys.executable, "-c", CHILD, folder, graph, str(after)], env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()[-2000:]
    return done.returncode != 0


def assert_sound(graph: Path) -> None:
    with open_graph(graph, read_only=True) as store:
        assert [one.what for one in check_atlas(store)] == []


class Stopped(Exception):
    """What ends a load in the middle."""


def stop(store: GraphStore, method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a load that stops at the second call of a method of the store's."""
    kept, calls = getattr(store, method), [0]

    def stopping(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 2:
            raise Stopped
        return kept(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store, method, stopping)
        with pytest.raises(Stopped):
            load_import_files(store, folder, edges_per_block=9)


@pytest.mark.parametrize("commits", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_load_killed_again_and_again_goes_on_and_doubles_nothing(made: Path, tmp_path: Path, commits: int) -> None:
    """Each time it is killed after some more commits."""
    graph, stopped = tmp_path / "graph.lbug", 0
    while killed(made / "files", graph, commits):
        stopped += 1
        with open_graph(graph) as store:
            marked = store.read_edges("ON_SEQUENCE").select("source", "target").rows()
            assert set(store.read_edges("ATTRIBUTES").select("run", "sequence").unique().rows()) <= set(marked)
    assert stopped >= 2
    assert differences(made / "graph.lbug", graph).is_empty()
    assert_sound(graph)
    assert not list((made / "files").glob(".*"))  # what the killed ones left is gone


def test_measuring_goes_on_where_a_load_was_stopped(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ingest edges` commits what has no mark; the load that is repeated leaves that."""
    with open_graph(tmp_path / "graph.lbug") as store:
        stop(store, "commit_sequences", made / "files", monkeypatch)
        done = set(store.read_edges("ON_SEQUENCE").select("source", "target").rows())
        assert len(done) == 1
        left = [SequenceCommit("one", s, edges_of("one", s), {"metric_clean": 1.5}) for s in SEQUENCES["one"] if ("one", s) not in done]
        assert store.commit_sequences(left) == len(left)
    assert load(made / "files", tmp_path / "graph.lbug").kept == {}
    assert differences(made / "graph.lbug", tmp_path / "graph.lbug").is_empty()


def test_files_of_a_run_that_was_measured_into_them_are_loaded_by_blocks(tmp_path: Path) -> None:
    with ImportSink(tmp_path / "files") as sink:
        measure(sink, [[i] for i in range(6)])
    with open_graph(tmp_path / "direct.lbug") as store:
        measure(store, [[0, 1, 2, 3, 4, 5]])
    sizes: list[int] = []
    with open_graph(tmp_path / "graph.lbug") as store:
        kept = store.commit_sequences
        store.commit_sequences = lambda commits: sizes.append(len(commits)) or kept(commits)  # type: ignore[method-assign,func-returns-value]
        load_import_files(store, tmp_path / "files", edges_per_block=100)
    assert sizes == [3, 3]  # small parts go together
    assert differences(tmp_path / "direct.lbug", tmp_path / "graph.lbug").is_empty()


def test_what_a_graph_has_stays_and_what_it_lacks_is_filled_in(made: Path, tmp_path: Path) -> None:
    """Files of run `two` with bare features come into the graph of run `one`, whose features have labels and statistics."""
    with open_graph(tmp_path / "two.lbug") as store:
        write_graph(store, ("two",))
        bare = {"label": None, "label_kind": None, "frequency": None, "mean_activation": None, "statistics_run": None}
        store.merge_nodes("Feature", pl.DataFrame([{"key": feature(0), **bare}], schema_overrides={"frequency": pl.Float64}))
        store.merge_nodes("Sequence", pl.DataFrame([{"key": "s2", "clean": None}], schema_overrides={"clean": pl.String}))
        store.merge_nodes("Feature", pl.DataFrame([{"key": feature(3), "label": "new", "label_kind": "file"}]))
        export_import_files(store, tmp_path / "files")
    with open_graph(tmp_path / "graph.lbug") as store:
        write_graph(store, ("one",))
    assert load(tmp_path / "files", tmp_path / "graph.lbug").kept == {}
    with open_graph(tmp_path / "graph.lbug") as store:
        assert store.query("MATCH (f:Feature) WHERE f.key = $key RETURN f.label AS l", {"key": feature(3)})["l"].to_list() == ["new"]
        store.merge_nodes("Feature", pl.DataFrame([{"key": feature(3), "label": None, "label_kind": None}]))
    assert differences(made / "graph.lbug", tmp_path / "graph.lbug").is_empty()


def test_scores_of_edges_that_the_files_lack_stay(made: Path, tmp_path: Path) -> None:
    graph = Path(shutil.copy(made / "graph.lbug", tmp_path / "graph.lbug"))
    scored = "MATCH (a:Feature)-[e:{0}]->(b:Feature) WHERE a.key = $key SET e.ablation_effect = 0.5, e.ablation_metric = 'logit_diff'"
    with open_graph(graph) as store:
        for type in ("INFLUENCES", "CIRCUIT_EDGE"):
            store.query(scored.format(type), {"key": feature(0)}, write=True)
        before = {type: store.read_edges(type) for type in ("INFLUENCES", "CIRCUIT_EDGE")}
        assert load_import_files(store, made / "files", edges_per_block=9).kept == {}
        for type, rows in before.items():
            assert store.read_edges(type).equals(rows)


def test_an_older_export_takes_nothing_from_a_run_that_has_gone_on(tmp_path: Path) -> None:
    with open_graph(tmp_path / "graph.lbug") as store:
        provenance(store)
        store.commit_sequences([commit(0), commit(1)])
        close_run(store, "r1")
        export_import_files(store, tmp_path / "older")
        store.commit_sequences([commit(i) for i in range(2, 6)])
        close_run(store, "r1")
    newer = Path(shutil.copy(tmp_path / "graph.lbug", tmp_path / "newer.lbug"))
    assert load(tmp_path / "older", newer).kept == {}
    assert differences(tmp_path / "graph.lbug", newer).is_empty()


def test_parts_of_one_run_become_the_whole_one(tmp_path: Path) -> None:
    """The graph has sequences 0 to 3, the files 2 to 5."""
    for name, sequences in (("files", [2, 3, 4, 5]), ("graph", [0, 1, 2, 3]), ("whole", range(6))):
        with open_graph(tmp_path / f"{name}.lbug") as store:
            provenance(store)
            store.commit_sequences([commit(i) for i in sequences])
            close_run(store, "r1")
            if name == "files":
                export_import_files(store, tmp_path / "files", rows_per_file=30)
    assert load(tmp_path / "files", tmp_path / "graph.lbug").kept == {}
    assert differences(tmp_path / "whole.lbug", tmp_path / "graph.lbug").is_empty()


def test_a_sequence_measured_otherwise_stays_and_is_said(made: Path, tmp_path: Path, featlas) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "atlas").mkdir()
    with open_graph(Path(shutil.copy(made / "graph.lbug", tmp_path / "atlas"))) as store:
        store.query("MATCH (:Feature)-[e:ATTRIBUTES]->() WHERE e.run = 'one' AND e.sequence = 's1' SET e.weight = 7 * e.weight", write=True)
        close_run(store, "one")
        before = store.read_edges("INFLUENCES")
    code, out, _ = featlas("import", "files", made / "files", "--atlas", tmp_path / "atlas")
    assert (code, "the graph says otherwise of 1 ON_SEQUENCE, 10 ATTRIBUTES: its own stayed" in out) == (0, True), out
    code, out, _ = featlas("import", "files", made / "files", "--atlas", tmp_path / "atlas", "--json")
    assert json.loads(out)["kept"] == {"ON_SEQUENCE": 1, "ATTRIBUTES": 10}
    with open_graph(tmp_path / "atlas") as store:
        assert store.read_edges("INFLUENCES").equals(before)
    assert_sound(tmp_path / "atlas")


@pytest.mark.neo4j
def test_a_load_into_a_server_that_is_stopped_goes_on(known_neo4j: Neo4jTestServer, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_graph(known_neo4j.uri) as store:
        for method in ("commit_sequences", "merge_edges"):
            stop(store, method, made / "files", monkeypatch)
        load_import_files(store, made / "files", edges_per_block=9)
        with open_graph(made / "graph.lbug", read_only=True) as expected:
            assert graph_difference(expected, store).is_empty()
        assert load_import_files(store, made / "files", edges_per_block=9).kept == {}
        assert check_atlas(store) == []
