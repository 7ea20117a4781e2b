"""Files whole or not at all; full disks; commits whose answer is lost; and an economical part of the crash campaign."""

import ast
import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
from featlas import files, running
from featlas.errors import UserError
from featlas.files import DiskFull, is_full, whole, write_text
from featlas.queries import server as server_module
from featlas.queries.server import Neo4jStore
from featlas.queries.statistics import NotAStatisticsStore, StatisticsStore
from featlas.queries.store import ServerCredentials, StoreFailed, StoreUnreachable
from neo4j.exceptions import Neo4jError, ServiceUnavailable

from .proxy import Proxy
from .servers import Neo4jTestServer

ROOT = Path(__file__).parents[1]
PYTHON = {**os.environ, "OMP_NUM_THREADS": "1", "FEATLAS_CONFIG": ""}


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_text(path, "old\r\n")
    path.chmod(0o640)
    with whole(path) as part:
        part.write_text("half")
        assert path.read_bytes() == b"old\r\n"
        part.write_text("new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "torn here: \ud800")
    assert path.read_text() == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]


def test_links_are_followed_and_what_is_no_file_is_written_to_itself(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    write_text(link, "new")
    assert (link.is_symlink(), real.read_text()) == (True, "new")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "said")
    reader.join(10)
    assert heard == ["said"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_parts_of_killed_processes_go_when_they_are_old(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    for name, age in (("0123abcd", 2 * files.ABANDONED_SECONDS), ("4567abcd", 0.0)):
        part = tmp_path / f".{path.name}.{name}.part"
        part.write_text("left")
        os.utime(part, (time.time() - age,) * 2)
    other = tmp_path / ".a1.json.0123abcd.part"  # another file's
    other.write_text("left")
    os.utime(other, (0, 0))
    write_text(path, "{}")
    assert sorted(one.name for one in tmp_path.iterdir()) == [".a1.json.0123abcd.part", ".a[1].json.4567abcd.part", "a[1].json"]


def test_a_full_disk_is_known_by_its_number_and_in_words(tmp_path: Path) -> None:
    assert is_full(OSError(errno.ENOSPC, "no room"))
    assert is_full(OSError(errno.EDQUOT, "quota"))
    assert not is_full(OSError(errno.EACCES, "denied"))
    assert not is_full(None)
    caused = RuntimeError("writing failed")
    caused.__cause__ = ValueError("I/O error: No space left on device (os error 28)")
    assert is_full(caused)
    assert not is_full(UserError("no task is called 'No space left on device'"))  # what a user wrote is no sign
    said = str(DiskFull(tmp_path / "not" / "there.json"))
    assert str(tmp_path / "not" / "there.json") in said
    assert " left)" in said
    assert "make room there, then give the same command again" in said


def test_a_command_that_meets_a_full_disk_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "a.json"))

    from featlas import cli, console

    monkeypatch.setattr(console, "table", stopped)
    assert running.run(cli.app, ["tasks", "list"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"featlas: the disk of {tmp_path / 'a.json'} is full (")


# Those who write in place: into a hidden folder that takes its name when all is there, or what is made anew at every use.
IN_PLACE = {
    "files.py", "analysis/exchange.py", "analysis/graph_tool.py", "analysis/graph_tool_worker.py", "ingest/alignment.py", "ingest/products.py",
    "model/loading.py", "model/small_models.py", "model/training.py", "queries/bulk_import.py", "queries/import_sink.py", "queries/matches.py",
    "queries/neo4j_browser.py", "queries/neo4j_server.py", "queries/samples.py", "queries/series.py", "ingest/import_shards.py",
    "ingest/statistics_shards.py", "ingest/cluster.py", "model/placement.py",
}  # fmt: skip
WRITING = {"write_text", "write_bytes", "write_parquet", "write_csv", "write_ndjson", "write_json", "savez"}
OWN = {"files", "exchange"}  # modules whose functions are called so and write whole


def in_place(path: str, text: str) -> list[str]:
    """Where a file of the package writes a file under its final name."""
    if not any(f".{name}(" in text for name in WRITING):
        return []
    tree = ast.parse(text)
    given = {item.optional_vars.id for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items
             if isinstance(item.optional_vars, ast.Name)}  # fmt: skip
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITING and node.args:
            names = {one.id for part in (node.func.value, node.args[0]) for one in ast.walk(part) if isinstance(one, ast.Name)}
            if not names & (given | OWN) and "part" not in names:
                found.append(f"{path}:{node.lineno}: {ast.unparse(node)[:60]}")
    return found


def test_nothing_of_the_package_is_written_in_place() -> None:
    paths = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")) if path.parent.name not in ("tests", "scripts", "benchmarks", "docs")]
    wrong = [one for path in paths if (name := path.relative_to(ROOT).as_posix()) not in IN_PLACE and not name.startswith("build/")
             for one in in_place(name, path.read_text(encoding="utf-8"))]  # fmt: skip
    assert wrong == []
    assert in_place("a.py", "frame.write_parquet(output)") == ["a.py:1: frame.write_parquet(output)"]
    assert in_place("a.py", "with whole(output) as part:\n    frame.write_parquet(part)") == []


def test_statistics_that_were_cut_off_in_the_making_are_made_anew_and_no_other_file_is(tmp_path: Path) -> None:
    path = tmp_path / "statistics.duckdb"
    with StatisticsStore(path):
        pass
    begun = path.read_bytes()
    for size in (0, 4096, 8192, 12287):
        path.write_bytes(begun[:size])
        with StatisticsStore(path) as store:
            assert store.runs().is_empty()
    path.write_bytes(b"a text of somebody's")
    with pytest.raises(NotAStatisticsStore):
        StatisticsStore(path)
    assert path.read_bytes() == b"a text of somebody's"


# --- full disks ------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(mount: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of `size` bytes at `mount`, and a function that gives it another size; skips where only root could make one."""
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no small disk can be made here: {made.stderr.strip()}")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(mount)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


FILLING = """
    import sys
    import polars as pl
    from pathlib import Path
    from featlas.errors import FeatlasError
    from featlas.queries.store import open_graph
    keys = [f"f{i}" for i in range(1001)]
    try:
        with open_graph(Path(sys.argv[1])) as store:
            store.merge_nodes("Feature", pl.DataFrame({"key": keys, "model": "m"}))
            store.merge_nodes("Run", pl.DataFrame({"key": ["r"]}))
            store.merge_nodes("Sequence", pl.DataFrame({"key": [f"s{i}" for i in range(20)]}))
            edges = pl.DataFrame({"source": keys[:-1], "target": keys[1:], "weight": [0.5] * 1000})
            for i in range(20):
                print("written" if store.commit_sequence("r", f"s{i}", edges, {}) else "there")
            counted = store.query("MATCH ()-[e:ATTRIBUTES]->() RETURN count(*) AS n")
            print(counted["n"][0], store.query("MATCH ()-[e:ON_SEQUENCE]->() RETURN count(*) AS n")["n"][0])
    except FeatlasError as error:
        print(type(error).__name__, error)
        try:
            open_graph(Path(sys.argv[1]))
        except FeatlasError as error:
            print(type(error).__name__)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a small disk can be made by root only")
def test_the_embedded_graph_on_a_full_disk_ends_with_a_message_and_goes_on(tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    command = [sys.executable, "-c", textwrap.dedent(FILLING), str(mount)]
    with small_disk(mount, 2 * 2**20) as resized:
        done = subprocess.run(command, capture_output=True, text=True, env=PYTHON, timeout=120, check=False)
        lines = done.stdout.splitlines()
        assert (done.returncode, lines[-1], "terminate called" in done.stderr) == (0, "StoreBusy", False), done.stderr
        written = lines.count("written")
        assert 0 < written < 20
        assert lines[-2].startswith(f"DiskFull the disk of {mount / 'graph.lbug'} is full ({mount} has ")
        resized(64 * 2**20)
        done = subprocess.run(command, capture_output=True, text=True, env=PYTHON, timeout=120, check=False)
        lines = done.stdout.splitlines()
        assert lines[-1] == "20000 20", done.stdout + done.stderr
        assert lines.count("there") == written  # what was committed is not written twice, and not lost
        assert lines.count("written") == 20 - written


# --- a server that goes away -----------------------------------------------------------------------------------------


def opened(server: Neo4jTestServer, port: int) -> Neo4jStore:
    return Neo4jStore(f"bolt://127.0.0.1:{port}", ServerCredentials(server.username, server.password))


def filled(store: Neo4jStore) -> pl.DataFrame:
    """Nodes for one run of two sequences; the edges of a sequence."""
    store.merge_nodes("Feature", pl.DataFrame({"key": ["a", "b", "c"], "model": "m"}))
    store.merge_nodes("Run", pl.DataFrame({"key": ["r"]}))
    store.merge_nodes("Sequence", pl.DataFrame({"key": ["s", "t"]}))
    return pl.DataFrame({"source": ["a", "b"], "target": ["b", "c"], "weight": [0.5, -0.25]})


def stored(server: Neo4jTestServer, type: str) -> int:
    return int(server.run(f"MATCH ()-[e:{type}]->() RETURN count(e) AS n")[0]["n"])  # type: ignore[call-overload]


def test_a_server_that_is_busy_with_others_did_not_go_away(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(server_module, "PATIENCE_S", 0.0)
    monkeypatch.setattr(server_module, "PAUSES_S", (0.0, 0.0))
    store = object.__new__(Neo4jStore)
    store.uri = "bolt://127.0.0.1:1"

    def deadlocked() -> None:
        raise Neo4jError._hydrate_neo4j(code="Neo.TransientError.Transaction.DeadlockDetected", message="waiting in a circle")

    said = r"bolt://127.0.0.1:1 answers, and could not do this beside what others do there \(.*circle.*give the same command"
    with pytest.raises(StoreUnreachable, match=said):
        store._patiently(deadlocked)
    assert "is busy with others" in caplog.text
    with pytest.raises(StoreUnreachable, match="went away"):
        store._patiently(lambda: (_ for _ in ()).throw(ServiceUnavailable("no route")))


def test_a_server_without_the_memory_for_a_query_is_told_from_one_that_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "PATIENCE_S", 0.0)
    store = object.__new__(Neo4jStore)
    store.uri = "bolt://127.0.0.1:1"

    def too_big() -> None:
        text = "The allocation of an extra 2.0 MiB would use more than the limit 1.4 GiB. dbms.memory.transaction.total.max threshold reached"
        raise Neo4jError._hydrate_neo4j(code="Neo.TransientError.General.MemoryPoolOutOfMemoryError", message=text)

    with pytest.raises(StoreUnreachable, match=r"answers, and could not do this beside what others do there \(.*limit 1.4 GiB"):
        store._patiently(too_big)
    for users in (True, False):
        with (
            pytest.raises(StoreFailed, match=r"^bolt://127.0.0.1:1 has not the memory for this \(.*limit 1.4 GiB.*--heap-mb"),
            server_module._readable_errors(store.uri, None, users_query=users),
        ):
            too_big()


@pytest.mark.slow
@pytest.mark.neo4j
def test_a_commit_whose_answer_is_lost_is_neither_lost_nor_doubled(clean_neo4j: Neo4jTestServer, caplog: pytest.LogCaptureFixture) -> None:
    port = int(clean_neo4j.uri.rpartition(":")[2])
    with Proxy(port) as proxy, opened(clean_neo4j, proxy.port) as store:
        edges = filled(store)
        proxy.lose_answers = 1
        store.commit_sequence("r", "s", edges, {})
        assert (proxy.counts.lost_answers, proxy.lose_answers) == (1, 0)
        assert (stored(clean_neo4j, "ATTRIBUTES"), stored(clean_neo4j, "ON_SEQUENCE")) == (2, 1)
        assert "does not answer" in caplog.text
        proxy.lose_answers = 1
        store.merge_edges("INFLUENCES", edges.with_columns(run=pl.lit("r")))
        assert (proxy.counts.lost_answers, stored(clean_neo4j, "INFLUENCES")) == (2, 2)
        proxy.reset()
        store.commit_sequence("r", "t", edges, {})
        assert (stored(clean_neo4j, "ATTRIBUTES"), stored(clean_neo4j, "ON_SEQUENCE")) == (4, 2)


@pytest.mark.slow
@pytest.mark.neo4j
def test_the_same_commit_without_a_look_at_the_mark_would_be_doubled(clean_neo4j: Neo4jTestServer) -> None:
    """The control: edges that are only created, with the same lost answer and the same second attempt."""
    port = int(clean_neo4j.uri.rpartition(":")[2])
    with Proxy(port) as proxy, opened(clean_neo4j, proxy.port) as store:
        filled(store)
        proxy.lose_answers = 1
        text = "MATCH (a:Feature {key: 'a'}) MATCH (b:Feature {key: 'b'}) CREATE (a)-[:ATTRIBUTES {run: 'r'}]->(b)"
        store._write(lambda session: session.execute_write(lambda tx: tx.run(text).consume()))
    assert stored(clean_neo4j, "ATTRIBUTES") == 2


@pytest.mark.slow
@pytest.mark.neo4j
def test_a_server_that_stays_away_is_given_up(clean_neo4j: Neo4jTestServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "PATIENCE_S", 0.2)
    monkeypatch.setattr(server_module, "PAUSES_S", (0.1, 0.1))
    monkeypatch.setattr(server_module, "DRIVERS_PATIENCE_S", 0.1)
    with Proxy(int(clean_neo4j.uri.rpartition(":")[2])) as proxy, opened(clean_neo4j, proxy.port) as store:
        edges = filled(store)
        proxy.closed = True
        proxy.reset()
        with pytest.raises(StoreUnreachable) as caught:
            store.commit_sequence("r", "s", edges, {})
        assert f"bolt://127.0.0.1:{proxy.port} went away" in str(caught.value)
        assert "what was committed stays" in str(caught.value)
        assert "give the same command again" in str(caught.value)
        proxy.closed = False
        assert store.commit_sequence("r", "s", edges, {})


# --- the campaign ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_part_of_the_campaign(tmp_path: Path) -> None:
    """The whole of it, with its table, stands in docs/crashes.md."""
    table = tmp_path / "table.json"
    command = [sys.executable, "scripts/crash_campaign.py", "--kills", "2", "--stores", "embedded", "--faults", "kill"]
    command += ["--jobs", "edges,statistics", "--output", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(table.read_text(encoding="utf-8"))["kills"]
    assert [(row["job"], row["store"], row["equal"]) for row in rows] == [
        ("edges", "embedded", True), ("statistics", "DuckDB", True),
    ]  # fmt: skip
    assert all(row["kills"] == 2 for row in rows)
