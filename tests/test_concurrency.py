"""Two at once: processes on one atlas are served one after the other or refused with a message that says why; nothing is written twice or half."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
from featlas.queries import holders
from featlas.queries.atlases import Prunable, prune_atlas
from featlas.queries.bulk_import import export_import_files
from featlas.queries.import_loading import load_import_files
from featlas.queries.integrity import Finding, Repair, Severity, check_atlas
from featlas.queries.pruning import delete_nodes
from featlas.queries.repairing import repair_atlas
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, SequenceCommit, open_graph

from .atlas_cases import MODEL, edges_of, write_graph
from .servers import Neo4jTestServer
from .study_atlas import TinyAtlas

Run = Callable[..., tuple[int, str, str]]
N_EDGES, N_COMMITS = 40, 60


@contextmanager
def held(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code`, from where it has said that it is there; it is ended with the block."""
    words = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "there\n"
            yield process
        finally:
            process.kill()


HOLD_GRAPH = """
    import sys, time
    from featlas.queries.store import open_graph
    with open_graph(sys.argv[1]):
        print("there", flush=True)
        time.sleep(float(sys.argv[2]))
"""
HOLD_STATISTICS = """
    import sys, time
    from featlas.queries.statistics import StatisticsStore
    with StatisticsStore(sys.argv[1]):
        print("there", flush=True)
        time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def atlas(tiny: TinyAtlas, tmp_path: Path) -> Path:
    return tiny.copied(tmp_path)


@pytest.fixture
def key(tiny: TinyAtlas) -> str:
    with open_graph(tiny.atlas, read_only=True) as store:
        return str(store.query("MATCH (f:Feature) WHERE f.kind = 'feature' RETURN f.key AS key ORDER BY key")["key"][0])


@pytest.mark.slow
def test_a_writer_beside_a_writer_waits_and_is_served_or_says_who_is_in_the_way(
    featlas: Run, atlas: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(HOLD_GRAPH, atlas, 60) as process:
        monkeypatch.setenv("FEATLAS_WAIT", "0.2")
        code, out, err = featlas("labels", "set", "--atlas", atlas, key, "mine")
        assert (code, out) == (1, "")
        assert f"is being written by process {process.pid} (" in err
        assert ", since " in err
        assert "0.2 s were waited" in err
        assert "FEATLAS_WAIT=600" in err
        assert "--graph" in err
        assert featlas("query", "runs", "--atlas", atlas)[0] == 0
        assert featlas("labels", "search", "plural", "--atlas", atlas)[0] == 0
    with held(HOLD_GRAPH, atlas, 1.0):
        monkeypatch.delenv("FEATLAS_WAIT")
        assert featlas("labels", "set", "--atlas", atlas, key, "mine")[0] == 0
    with StatisticsStore(atlas, read_only=True) as statistics:
        assert statistics.query("SELECT label FROM feature_labels")["label"].to_list() == ["mine"]


@pytest.mark.slow
def test_statistics_that_are_held_are_waited_for_and_a_killed_holder_leaves_no_lock(
    featlas: Run, atlas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATLAS_WAIT", "0.2")
    with held(HOLD_STATISTICS, atlas, 60) as process:
        code, _, err = featlas("labels", "list", "--atlas", atlas)
        assert code == 1
        assert f"is held by process {process.pid} (" in err
    assert featlas("labels", "list", "--atlas", atlas)[0] == 0  # the holder was killed


def test_the_patience_is_a_number_of_seconds(featlas: Run, tiny: TinyAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    assert holders.patience() == holders.WAIT_S
    for said in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv("FEATLAS_WAIT", said)
        with pytest.raises(holders.BadPatience, match="FEATLAS_WAIT"):
            holders.patience()
        assert featlas("labels", "list", "--atlas", tiny.atlas)[0] == 2
    monkeypatch.setenv("FEATLAS_WAIT", "0")
    assert holders.patience() == 0.0


def test_a_holder_is_named_by_its_command_without_its_values() -> None:
    mine = holders.held_by(os.getpid())
    assert mine.startswith(f"process {os.getpid()} (")
    assert "since " in mine
    words = [sys.executable, "-c", "import time; print('there', flush=True); time.sleep(60)", "hunter2"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert "hunter2" not in holders.held_by(process.pid)
    finally:
        process.kill()
        process.wait()
    assert holders.held_by(None) == "another process"
    assert holders.held_by(2**22 + 1) == f"process {2**22 + 1}"


def features(n: int) -> pl.DataFrame:
    return pl.DataFrame({"key": [f"f{i}" for i in range(n)], "site": "resid_0", "kind": "feature", "model": "m"})


def commits(n: int) -> list[SequenceCommit]:
    """Sequences of a run, each with the same number of edges: f0 drives f1, f2, …"""
    edges = pl.DataFrame({"source": ["f0"] * N_EDGES, "target": [f"f{i + 1}" for i in range(N_EDGES)], "weight": [1.0] * N_EDGES})
    return [SequenceCommit("r", f"s{i}", edges) for i in range(n)]


WRITE = """
    import sys
    from featlas.queries import embedded
    embedded.CHECKPOINT_BYTES = 20_000  # a checkpoint every few commits
    from featlas.queries.store import open_graph
    from tests.test_concurrency import commits, N_COMMITS
    print("there", flush=True)
    for commit in commits(N_COMMITS):
        with open_graph(sys.argv[1]) as store:
            store.commit_sequences([commit])
    print("done", flush=True)
"""


@pytest.mark.slow
def test_a_reader_beside_a_writer_never_sees_half_a_transaction(tmp_path: Path) -> None:
    with open_graph(tmp_path) as store:
        store.merge_nodes("Feature", features(N_EDGES + 1))
        store.merge_nodes("Run", pl.DataFrame({"key": ["r"]}))
        store.merge_nodes("Sequence", pl.DataFrame({"key": [f"s{i}" for i in range(N_COMMITS)]}))
    seen = []
    with held(WRITE, tmp_path) as process:
        while process.poll() is None and (not seen or seen[-1] < N_COMMITS):
            with open_graph(tmp_path, read_only=True) as store:
                marks = store.query("MATCH (:Run)-[m:ON_SEQUENCE]->() RETURN count(*) AS n")["n"][0]
                edges = store.query("MATCH ()-[e:ATTRIBUTES]->() RETURN count(*) AS n")["n"][0]
            assert edges == N_EDGES * marks  # a reader's two questions are of one snapshot, that of its opening
            seen.append(marks)
        assert process.wait(60) == 0
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    with open_graph(tmp_path, read_only=True) as store:
        assert store.read_edges("ATTRIBUTES").height == N_EDGES * N_COMMITS


@pytest.mark.slow
def test_readers_work_on_a_file_system_that_cannot_be_written(featlas: Run, atlas: Path, tmp_path: Path, key: str) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    mounted = subprocess.run(["mount", "--bind", atlas, place], capture_output=True, check=False)
    if mounted.returncode or subprocess.run(["mount", "-o", "remount,bind,ro", place], capture_output=True, check=False).returncode:
        subprocess.run(["umount", place], capture_output=True, check=False)
        pytest.skip("nothing can be mounted here")
    try:
        for words in (("query", "runs"), ("labels", "list"), ("labels", "search", "w1"), ("series", "list")):
            code, _, err = featlas(*words, "--atlas", place)
            assert code == 0, err
        code, _, err = featlas("labels", "set", "--atlas", place, key, "mine")
        assert code == 1
        assert "cannot be written to" in err
        assert "copy the atlas" in err
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
@pytest.mark.neo4j
def test_two_writers_of_one_run_on_a_server_write_every_edge_once(known_neo4j: Neo4jTestServer) -> None:
    influences = pl.DataFrame({
        "source": ["f0"] * N_EDGES, "target": [f"f{i + 1}" for i in range(N_EDGES)], "run": "r", "weight": 1.0, "abs_weight": 1.0, "n": 1,
    })  # fmt: skip

    def write(_: int) -> int:
        with open_graph(known_neo4j.uri) as store:
            store.merge_nodes("Feature", features(N_EDGES + 1))
            store.merge_nodes("Run", pl.DataFrame({"key": ["r"]}))
            store.merge_nodes("Sequence", pl.DataFrame({"key": [f"s{i}" for i in range(8)]}))
            written = sum(store.commit_sequences(commits(8)[low : low + 2]) for low in range(0, 8, 2))
            store.merge_edges("INFLUENCES", influences)
            return written

    with ThreadPoolExecutor(3) as pool:
        written = list(pool.map(write, range(3)))
    assert sum(written) == 8  # each sequence by one of them
    counted = "MATCH (a:Feature)-[e:{}]->(b:Feature) RETURN count(e) AS n, count(DISTINCT [a.key, b.key, e.sequence]) AS apart"
    assert known_neo4j.run(counted.format("ATTRIBUTES")) == [{"n": 8 * N_EDGES, "apart": 8 * N_EDGES}]
    assert known_neo4j.run(counted.format("INFLUENCES")) == [{"n": N_EDGES, "apart": N_EDGES}]
    assert known_neo4j.run("MATCH (:Run)-[m:ON_SEQUENCE]->() RETURN count(m) AS n") == [{"n": 8}]
    assert known_neo4j.run("MATCH (f:Feature) RETURN count(f) AS n") == [{"n": N_EDGES + 1}]


# -- check, repair and prune beside a run that is measured -----------------------------------------------------

N_PLANNED = 100
EDGES_OF_ONE = 10


def begin(writer: GraphStore, run: str) -> None:
    """What an ingest writes before the first batch: the run, and the texts that it has planned."""
    writer.merge_nodes("Run", pl.DataFrame({"key": [run], "model": [MODEL], "status": ["running"], "n_planned": [N_PLANNED]}))
    writer.merge_nodes("Sequence", pl.DataFrame({"key": [f"{run}{i}" for i in range(N_PLANNED)], "task": "t"}))


@contextmanager
def measured_beside(store: GraphStore, writer: GraphStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SequenceCommit]]:
    """Whenever `store` has read something a sequence is committed by `writer`: of run `live`, which has begun, and of `late`, which begins then."""
    begin(writer, "live")
    done: list[SequenceCommit] = []
    at_work = [False]

    def commit() -> None:
        if at_work[0] or len(done) >= 2 * N_PLANNED:
            return
        at_work[0] = True
        if len(done) == 1:
            begin(writer, "late")
        run = "late" if len(done) % 2 else "live"
        done.append(SequenceCommit(run, f"{run}{len(done) // 2}", edges_of("one", "s0"), {}))
        assert writer.commit_sequences(done[-1:]) == 1
        at_work[0] = False

    answer, read_edges = store.answer, store.read_edges

    def answering(*given: object, write: bool = False, **named: object) -> object:
        found = answer(*given, write=write, **named)  # type: ignore[arg-type]
        if not write:
            commit()
        return found

    def reading(*given: object, **named: object) -> pl.DataFrame:
        rows = read_edges(*given, **named)  # type: ignore[arg-type]
        commit()
        return rows

    with monkeypatch.context() as patched:
        patched.setattr(store, "answer", answering)
        patched.setattr(store, "read_edges", reading)
        yield done


EVERYTHING = [Finding(Severity.ERROR, one.value, 1, repair=one) for one in (Repair.ORPHANS, Repair.UNMARKED, Repair.INFLUENCES, Repair.UNUSED)]


def check_repair_and_prune_beside_a_run(store: GraphStore, writer: GraphStore, atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing wrong is said, nothing of what comes in is taken; what was wrong before is mended all the same."""
    write_graph(writer)
    writer.query("MATCH (:Run {key: 'two'})-[m:ON_SEQUENCE]->(:Sequence {key: 's3'}) DELETE m", write=True)
    with measured_beside(store, writer, monkeypatch) as done:
        found = check_atlas(store)
        wrong = {one.what: one.n for one in found if one.severity is Severity.ERROR}
        counted = "runs that count other sequences or edges than they have"
        assert wrong == {"edges of sequences that are not marked as done": 4, counted: 1, "runs that are called done and have sequences missing": 1}
        assert not [one for one in found if one.repair is Repair.UNUSED]  # planned, not left over
        assert repair_atlas(store, None, None, EVERYTHING)[Repair.UNMARKED] == 4
        assert prune_atlas(store, None, atlas, Prunable(runs=("two",))) == {"Feature": 0, "Sequence": 0, "Model": 0}
        assert len(done) > 50
    rest = [SequenceCommit(run, f"{run}{i}", edges_of("one", "s0"), {}) for run in ("live", "late") for i in range(N_PLANNED)]
    assert writer.commit_sequences(rest) == 2 * N_PLANNED - len(done)
    edges = store.query("MATCH ()-[e:ATTRIBUTES]->() RETURN e.run AS run, count(*) AS n ORDER BY run").rows()
    assert edges == [("late", N_PLANNED * EDGES_OF_ONE), ("live", N_PLANNED * EDGES_OF_ONE), ("one", 3 * EDGES_OF_ONE)]
    assert [one.what for one in check_atlas(store) if one.severity is not Severity.NOTE] == ["runs that are not finished"]


@pytest.mark.slow
def test_a_run_that_is_measured_meanwhile_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_graph(tmp_path) as store, open_graph(tmp_path) as writer:
        check_repair_and_prune_beside_a_run(store, writer, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.neo4j
def test_a_run_that_is_measured_meanwhile_on_a_server_loses_nothing(
    known_neo4j: Neo4jTestServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_graph(known_neo4j.uri) as store, open_graph(known_neo4j.uri) as writer:
        check_repair_and_prune_beside_a_run(store, writer, tmp_path, monkeypatch)
        # a node that comes into use between the question and the deletion stays, and the others go
        writer.merge_nodes("Sequence", pl.DataFrame({"key": ["used", "unused"]}))
        begin(writer, "last")
        keys, query = pl.Series(["used", "unused"]), store.query

        def used_first(*given: object, **named: object) -> pl.DataFrame:
            writer.commit_sequences([SequenceCommit("last", "used", edges_of("one", "s0"), {})])
            return query(*given, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "query", used_first)
        assert delete_nodes(store, "Sequence", keys) == 1
        assert writer.query("MATCH (s:Sequence) WHERE s.key IN ['used', 'unused'] RETURN s.key AS key")["key"].to_list() == ["used"]


def import_beside_a_run(store: GraphStore, writer: GraphStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import into a graph while another run is measured into it: it is whole, and the run too."""
    with open_graph(folder / "source") as source:
        write_graph(source, ("two",))
        export_import_files(source, folder / "files")
    write_graph(writer, ("one",))
    with measured_beside(store, writer, monkeypatch) as done:
        load_import_files(store, folder / "files")
        assert 10 < len(done) < 2 * N_PLANNED
    rest = [SequenceCommit(run, f"{run}{i}", edges_of("one", "s0"), {}) for run in ("live", "late") for i in range(N_PLANNED)]
    assert writer.commit_sequences(rest) == 2 * N_PLANNED - len(done)
    edges = store.query("MATCH ()-[e:ATTRIBUTES]->() RETURN e.run AS run, count(*) AS n ORDER BY run").rows()
    assert edges == [("late", N_PLANNED * EDGES_OF_ONE), ("live", N_PLANNED * EDGES_OF_ONE), ("one", 3 * EDGES_OF_ONE), ("two", 8)]
    assert not [one.what for one in check_atlas(store) if one.severity is Severity.ERROR]


@pytest.mark.slow
def test_an_import_beside_a_run_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_graph(tmp_path) as store, open_graph(tmp_path) as writer:
        import_beside_a_run(store, writer, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.neo4j
def test_an_import_beside_a_run_on_a_server_is_whole(known_neo4j: Neo4jTestServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_graph(known_neo4j.uri) as store, open_graph(known_neo4j.uri) as writer:
        import_beside_a_run(store, writer, tmp_path, monkeypatch)
