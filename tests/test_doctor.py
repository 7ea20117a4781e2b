"""The doctor: each check's line, its way out, and what makes the command fail."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import polars as pl
import pytest
from featlas import doctor
from featlas.doctor import Check, Status, check_package, check_quality, lower_bounds
from featlas.queries import runs
from featlas.queries.statistics import RunRecord, SiteRecord, StatisticsStore
from featlas.queries.store import open_graph

from .micro import save_tiny

Run = Callable[..., tuple[int, str, str]]


def test_bounds_are_those_of_the_metadata() -> None:
    bounds = lower_bounds()
    assert {"torch", "polars", "typer", "pot", "igraph"} <= set(bounds)
    assert set(doctor.CORE) <= set(bounds)
    assert set(doctor.EXTRAS) <= set(bounds)
    assert bounds["torch"] == "2.6"


def test_a_library_that_is_missing_or_too_old_fails() -> None:
    assert check_package("typer", "0.16").status is Status.OK
    old = check_package("typer", "99.1")
    assert (old.status, "older than 99.1" in old.found, "uv sync" in old.way_out) == (Status.FAIL, True, True)
    missing = check_package("no-such-library-of-ours", None)
    assert (missing.status, "uv sync" in missing.way_out) == (Status.FAIL, True)
    # numbers, not text: 0.9 is before 0.16, and a release candidate is of its release
    assert doctor._numbers("0.9") < doctor._numbers("0.16") < doctor._numbers("1.0rc1") == doctor._numbers("1.0")


@pytest.mark.parametrize(("fvu", "l0", "status"), [
    (0.2, 32, Status.OK), (0.5, 32, Status.OK), (0.51, 32, Status.WARN), (float("nan"), 32, Status.WARN),
    (0.2, 0.4, Status.WARN), (0.2, 100, Status.OK), (0.2, 101, Status.WARN), (0.0, 400, Status.OK),
])  # fmt: skip
def test_a_dictionary_is_judged_by_what_it_leaves_out_and_by_how_sparse_it_is(fvu: float, l0: float, status: Status) -> None:
    check = check_quality("resid_3", fvu, l0, 400, "agreement")
    assert check.status is status
    assert bool(check.way_out) == (status is Status.WARN)


def test_a_machine_that_is_full_is_warned_of(tmp_path: Path) -> None:
    with mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=2**30)), mock.patch.object(doctor, "free_memory", return_value=1.0):
        checks = {check.name: check for check in doctor._machine(tmp_path / "none" / "yet")}
    assert (checks["disk"].status, checks["memory"].status) == (Status.WARN, Status.WARN)
    assert "1.0 GiB free" in checks["disk"].found
    assert "--atlas" in checks["disk"].way_out
    assert "--memory" in checks["memory"].way_out


def test_memory_is_that_of_the_control_group_where_that_is_less(tmp_path: Path) -> None:
    texts = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8388608 kB\n", "/sys/fs/cgroup/memory.max": str(3 * 2**30),
             "/sys/fs/cgroup/memory.current": str(2**30)}  # fmt: skip
    with mock.patch.object(Path, "read_text", lambda self, **_: texts[str(self)]):
        assert doctor.free_memory() == 2.0
        texts["/sys/fs/cgroup/memory.max"] = "max\n"
        assert doctor.free_memory() == 8.0


def test_runs_that_are_half_done_are_named_with_the_way_on(tmp_path: Path) -> None:
    run = {"key": "abc", "model": "m", "task": "agreement", "dictionaries": "{}", "status": runs.RUNNING, "n_planned": 9}
    edges = pl.DataFrame({"source": ["a"], "target": ["b"], "weight": [1.0]})
    with open_graph(tmp_path) as store:
        store.merge_nodes("Run", pl.DataFrame([run]))
        store.merge_nodes("Sequence", pl.DataFrame([{"key": "s"}]))
        store.merge_nodes("Feature", pl.DataFrame([{"key": "a"}, {"key": "b"}]))
        store.commit_sequence("abc", "s", edges, {})
    record = RunRecord("stat1", "m", "text.txt", "h", "activation", (SiteRecord("resid_0", 0, "d", 4, 4),), 50, {}, "0")
    with StatisticsStore(tmp_path) as statistics:
        statistics.start_run(record)
        statistics.save_state("stat1", 20, 400, {"x": b"1"})
    graph, kept = doctor._atlas(tmp_path)
    assert (graph.status, kept.status) == (Status.WARN, Status.WARN)
    assert "run abc of agreement: 1 of 9 sequences" in graph.found
    assert "featlas ingest finish" in graph.way_out
    assert "run stat1 of text.txt: 20 of 50" in kept.found
    assert "featlas ingest statistics" in kept.way_out


def test_a_store_of_something_else_fails_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    (tmp_path / "statistics.duckdb").write_text("nonsense")
    (check,) = doctor._atlas(tmp_path)
    assert check.status is Status.FAIL
    assert "statistics.duckdb" in check.found + check.way_out
    (empty,) = doctor._atlas(tmp_path / "none")
    assert (empty.status, "featlas demo" in empty.found) == (Status.OK, True)


def test_both_stores_are_tried_in_a_folder_of_their_own(tmp_path: Path) -> None:
    graph, statistics = doctor._stores(tmp_path)
    assert (graph.status, statistics.status) == (Status.OK, Status.OK)
    assert "2 nodes" in graph.found
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_fails() -> None:
    check = doctor._server("bolt://127.0.0.1:1")
    assert (check.status, check.name) == (Status.FAIL, "neo4j server")
    assert "featlas neo4j up" in check.found + check.way_out


@pytest.mark.neo4j
def test_a_server_says_its_version_and_how_fast_it_is(clean_neo4j, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEO4J_USERNAME", clean_neo4j.username)
    monkeypatch.setenv("NEO4J_PASSWORD", clean_neo4j.password)
    with open_graph(clean_neo4j.uri):
        pass  # makes the schema
    check = doctor._server(clean_neo4j.uri)
    assert check.status is not Status.FAIL, check
    assert "community" in check.found
    assert "read-write" in check.found


def test_a_model_is_checked_itself_and_the_command_fails_where_something_does(
    featlas: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model")
    pairs = [{"clean": f"w1 w{i}", "corrupt": f"w2 w{i}", "answer": " w5", "wrong_answer": " w6"} for i in range(3, 9)]
    task = tmp_path / "pairs.jsonl"
    task.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    found = {(check.part, check.name): check for check in doctor.check_model(str(model), None, str(task), "cpu")}
    assert found["model", "model"].status is Status.OK
    own = {name: check.status for (part, name), check in found.items() if part == "self-check"}
    assert len(own) == 8
    assert set(own.values()) == {Status.OK}
    assert any(part == "task" for part, _ in found)
    (refused,) = doctor.check_model(str(tmp_path / "none"), None, None, "cpu")
    assert (refused.status, "no such model folder" in refused.found) == (Status.FAIL, True)

    made = [Check("part", "good", Status.OK, "1"), Check("part", "doubtful", Status.WARN, "2", "do this")]
    monkeypatch.setattr(doctor, "check_all", lambda *_: made)
    code, out, _ = featlas("doctor")
    assert code == 0
    assert "→ do this" in out
    assert "1 ok, 1 warn" in out
    monkeypatch.setattr(doctor, "check_all", lambda *_: [*made, Check("part", "bad", Status.FAIL, "3", "do that")])
    code, out, _ = featlas("doctor", "--json")
    assert code == 1
    assert json.loads(out)[-1] == {"part": "part", "name": "bad", "status": "fail", "found": "3", "way_out": "do that"}
