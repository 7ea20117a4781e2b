"""Edges by several workers: the graph of one process, whoever is killed, on both databases."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.ingest import edge_shards
from featlas.ingest.cluster import RaySession, TooManyWorkers, cores
from featlas.ingest.edge_shards import EdgeShard, EdgeWorker, Identity, WorkerDiffers, block_of, table_of
from featlas.ingest.effective import EdgeBlock, EdgeSettings
from featlas.ingest.pipeline import EdgeOptions, ingest_edges, plan_run
from featlas.queries.bulk_import import NoImportFiles
from featlas.queries.import_loading import load_import_files
from featlas.queries.import_sink import write_batch
from featlas.queries.store import SequenceCommit, ServerCredentials, open_graph
from polars.testing import assert_frame_equal

from .cluster_work import with_a_death
from .micro import save_tiny

ROOT = Path(__file__).parents[1]
N_PAIRS = 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model's folder and a task of two lengths for it."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "model", "llama", seed=1, n_layers=2)
    lines = []
    for i in range(N_PAIRS):
        words = [f"w{(7 * i + 3 * k) % 40}" for k in range(5 if i % 3 else 6)]
        other = [words[0], f"w{(7 * i + 11) % 40}", *words[2:]]
        lines.append(json.dumps({"clean": " ".join(words), "corrupt": " ".join(other), "answer": " w1", "wrong_answer": " w2", "task": "t"}))
    (folder / "task.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """What one process makes of it: the run's key and its tables."""
    atlas = tmp_path_factory.mktemp("alone")
    run = ingest_edges(options(tiny, atlas)).run
    return run, tables(atlas, run)


@pytest.fixture
def graph(request, monkeypatch):
    """A real server, its credentials in the environment."""
    server = request.getfixturevalue("clean_neo4j")
    monkeypatch.setenv("NEO4J_USERNAME", server.username)
    monkeypatch.setenv("NEO4J_PASSWORD", server.password)
    return server.uri


def options(tiny, atlas, **changes) -> EdgeOptions:
    base = EdgeOptions(
        model=str(tiny / "model"), dictionaries="identity", task=str(tiny / "task.jsonl"), atlas=Path(atlas), sites=("resid_0", "mlp_1", "resid_1"),
        batch_size=2, settings=EdgeSettings(steps=2),
    )  # fmt: skip
    return replace(base, **changes)


def tables(target, run) -> dict[str, pl.DataFrame]:
    """What a run left in a graph, in a fixed order."""
    with open_graph(target) as store:
        found = {name: store.read_edges(name, run=run) for name in ("ATTRIBUTES", "INFLUENCES")}
        found["ON_SEQUENCE"] = store.read_edges("ON_SEQUENCE")
        found["nodes"] = store.query("MATCH (f:Feature) RETURN f.key AS key, f.site AS site, f.kind AS kind, f.`index` AS number")
        found["runs"] = store.query("MATCH (r:Run) RETURN r.key AS key, r.status AS status, r.n_edges AS edges, r.n_sequences AS sequences")
    return {name: frame.sort(frame.columns[:3]) for name, frame in found.items()}


def assert_alike(ours, others) -> None:
    """The same rows, their numbers to float32's rounding."""
    for name in ours:
        assert_frame_equal(ours[name], others[name], check_exact=False, rel_tol=1e-5, abs_tol=1e-7)


@contextmanager
def in_this_process(address, workers, *, device):
    yield RaySession(address, workers, 1, False)


def by_turns(session, make_worker, shards, on_result, *, label, on_loss):
    """`run_shards` without Ray: two workers in this process, shards backwards; the first worker dies with a shard done and not told."""
    crew = [make_worker(), make_worker()]
    for place in reversed(range(len(shards))):
        if place == len(shards) - 1:
            crew[0](shards[place])
            on_loss(f"died over {label(shards[place])}")
            crew[0] = make_worker()
        on_result(place, crew[place % 2](shards[place]))


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setattr(edge_shards, "ray_session", in_this_process)
    monkeypatch.setattr(edge_shards, "run_shards", by_turns)
    monkeypatch.setattr("featlas.ingest.pipeline.check_workers", lambda *_, **__: None)


@pytest.mark.slow
def test_shards_in_any_order_make_the_graph_of_one_process(tiny, tmp_path, alone, without_ray):
    run, expected = alone
    seen, notes, costs = [], [], []
    summary = ingest_edges(options(tiny, tmp_path, workers=2), progress=seen.append, note=notes.append, announce=costs.append)
    assert (summary.run, summary.n_sequences, summary.n_edges) == (run, N_PAIRS, len(expected["ATTRIBUTES"]))
    assert ([p.done for p in seen][-1], len(costs)) == (N_PAIRS, 1)
    assert notes[0].startswith("starting 2 workers")
    assert "died over batch" in notes[1]
    for name, frame in tables(tmp_path, run).items():
        assert frame.equals(expected[name]), name  # one thread, the same batches: bit by bit
    manifest = json.loads((tmp_path / "runs" / f"{run}.json").read_text())
    assert manifest["workers"] == {"n": 2, "threads": 1, "gpu": False, "where": "this machine", "devices": ["cpu"], "lost": 1}
    assert (manifest["options"]["workers"], manifest["options"]["ray_address"]) == (2, None)
    again = ingest_edges(options(tiny, tmp_path, workers=2))
    assert (again.n_skipped, again.n_edges) == (N_PAIRS, 0)


def loaded(folder, path, run):
    """What a folder of import files holds of a run."""
    with open_graph(path) as store:
        load_import_files(store, folder)
    return tables(path, run)


@pytest.mark.parametrize("address", [None, pytest.param("elsewhere:1", marks=pytest.mark.slow)])
def test_import_files_by_workers_hold_what_one_process_makes(tiny, tmp_path, alone, without_ray, address, monkeypatch):
    """On this machine the workers write the parts; from another they come to the driver, which does."""
    run, expected = alone
    files, wrote = tmp_path / "files", []
    monkeypatch.setattr(edge_shards, "write_batch", lambda *given: wrote.append(given) or write_batch(*given))
    with monkeypatch.context() as patch:
        patch.setattr(edge_shards, "run_shards", lambda *given, **named: by_turns(given[0], given[1], given[2][:3], *given[3:], **named) or stop())
        with pytest.raises(Stopped):
            ingest_edges(options(tiny, tmp_path / "atlas", workers=2, ray_address=address, import_files=files))
    with pytest.raises(NoImportFiles, match="is not finished"):
        load_import_files(None, files)
    seen = []
    summary = ingest_edges(options(tiny, tmp_path / "atlas", workers=2, ray_address=address, import_files=files), progress=seen.append)
    assert 0 < summary.n_skipped < N_PAIRS
    assert seen[-1].done == N_PAIRS
    assert bool(wrote) == (address is None)
    for name, frame in loaded(files, tmp_path / "loaded.lbug", run).items():
        assert frame.equals(expected[name]), name


class Stopped(Exception):
    """The driver is stopped."""


def stop():
    raise Stopped


@pytest.mark.slow
def test_ray_workers_write_import_files(tiny, tmp_path, alone):
    run, expected = alone
    summary = ingest_edges(options(tiny, tmp_path / "atlas", workers=2, import_files=tmp_path / "files"))
    assert (summary.run, summary.n_edges) == (run, len(expected["ATTRIBUTES"]))
    assert_alike(loaded(tmp_path / "files", tmp_path / "loaded.lbug", run), expected)


@pytest.mark.slow
def test_a_half_done_run_goes_on_with_another_number_of_workers(tiny, tmp_path, alone, without_ray, monkeypatch):
    run, expected = alone

    def half(session, make_worker, shards, on_result, **_):
        work = make_worker()
        for place in (0, 2):
            on_result(place, work(shards[place]))
        raise KeyboardInterrupt

    monkeypatch.setattr(edge_shards, "run_shards", half)
    with pytest.raises(KeyboardInterrupt):
        ingest_edges(options(tiny, tmp_path, workers=2))
    monkeypatch.setattr(edge_shards, "run_shards", by_turns)
    # Another size of batch is not another rounding: the run goes on with the size that it began with.
    resumed = ingest_edges(options(tiny, tmp_path, workers=3, batch_size=5))
    assert resumed.n_skipped == 4
    for name, frame in tables(tmp_path, run).items():
        assert frame.equals(expected[name]), name


def test_a_worker_with_other_things_is_refused(tiny, tmp_path):
    chosen = options(tiny, tmp_path)
    identity = Identity.of(plan_run(chosen))
    identity.check(identity)
    for change, message in [
        ({"version": "0.0.1"}, "featlas is '0.1.0' there and '0.0.1' here"),
        ({"model": "model@0"}, "the model is 'model@.*' there and 'model@0' here"),
        ({"dictionaries": (*identity.dictionaries[:2], ("resid_1", "other"))}, r"the dictionaries is \[\('resid_1', 'identity'\)\] there"),
        ({"run": "0" * 16}, "the run's key is"),
    ]:
        with pytest.raises(WorkerDiffers, match=message):
            EdgeWorker(chosen, replace(identity, **change), False)


def test_numbers_survive_the_way():
    generator = np.random.default_rng(0)
    blocks = []
    for n in (3, 0, 5):
        whole = {name: generator.integers(-1, 9, n) for name in EdgeBlock._fields if name != "weight"}
        blocks.append(EdgeBlock(**whole, weight=generator.normal(size=n)))
    back = block_of(table_of(blocks))
    for name in EdgeBlock._fields:
        expected = np.concatenate([getattr(block, name) for block in blocks])
        assert getattr(back, name).dtype == expected.dtype
        np.testing.assert_array_equal(getattr(back, name), expected)
    assert len(block_of(table_of([])).weight) == 0


def test_a_shard_names_its_sequences():
    assert EdgeShard(3, "abc", 1, frozenset()).label == "batch 3 (sequence abc)"
    assert EdgeShard(3, "abc", 4, frozenset()).label == "batch 3 (sequence abc and the 3 after it)"


def test_too_many_workers_are_refused_before_anything(tiny, tmp_path):
    with pytest.raises(TooManyWorkers, match=f"--workers {cores() + 1}"):
        ingest_edges(options(tiny, tmp_path / "new", workers=cores() + 1))
    assert not (tmp_path / "new").exists()


# -- a real Ray, and a real server ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("by_value")
def test_a_worker_killed_half_way_changes_nothing(tiny, tmp_path, alone, monkeypatch):
    run, expected = alone
    notes = []

    monkeypatch.setattr(edge_shards, "run_shards", with_a_death(tmp_path / "died"))
    summary = ingest_edges(options(tiny, tmp_path / "atlas", workers=2), note=notes.append)
    assert [" died over batch " in note for note in notes] == [False, True], notes
    assert (summary.run, summary.n_edges) == (run, len(expected["ATTRIBUTES"]))
    assert_alike(tables(tmp_path / "atlas", run), expected)


@pytest.mark.slow
@pytest.mark.neo4j
def test_a_killed_driver_is_gone_on_from(tiny, tmp_path, graph, alone):
    """Two workers write into Neo4j themselves; the driver is killed; one process finishes the run."""
    run, expected = alone
    described = {
        "model": str(tiny / "model"), "dictionaries": "identity", "task": str(tiny / "task.jsonl"), "atlas": str(tmp_path), "graph": graph,
        "sites": ["resid_0", "mlp_1", "resid_1"], "batch_size": 2, "workers": 2, "steps": 2,
    }  # fmt: skip
    (tmp_path / "options.json").write_text(json.dumps(described))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOP_AFTER": "1"}
    command = [sys.executable, "-m", "tests.ingest_child", str(tmp_path / "options.json")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout.readline().strip().isdigit()
    child.send_signal(signal.SIGKILL)
    child.wait()
    resumed = ingest_edges(options(tiny, tmp_path, graph=graph))
    assert 0 < resumed.n_skipped < N_PAIRS
    assert_alike(tables(graph, run), expected)


def together(works: "list[Callable[[], object]]") -> list[BaseException]:
    """Do all at once, each in a thread; what they raised."""
    errors: list[BaseException] = []

    def guarded(work):
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - asserted on by the caller
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.neo4j
@pytest.mark.slow
def test_writers_that_deadlock_on_a_server_are_tried_again(graph, clean_neo4j, caplog):
    """Two writers commit the same two sequences in opposite orders: the server breaks the circle, the driver begins again, nothing is doubled."""
    keys = [f"f{i:03}" for i in range(60)]
    rounds = 6
    with open_graph(graph) as store:
        store.merge_nodes("Feature", pl.DataFrame({"key": keys}))
        store.merge_nodes("Run", pl.DataFrame({"key": ["r"], "n_planned": [2 * rounds]}))
        store.merge_nodes("Sequence", pl.DataFrame({"key": [f"s{i}" for i in range(2 * rounds)]}))
    pairs = [(keys[i // 60], keys[i % 60]) for i in range(3600)]
    edges = pl.DataFrame(pairs, schema=["source", "target"], orient="row").with_columns(weight=pl.lit(1.0))
    both = threading.Barrier(2)
    written: list[int] = []

    def write(step: int) -> None:
        with open_graph(graph) as store:
            for i in range(rounds):
                commits = [SequenceCommit("r", f"s{2 * i + k}", edges) for k in (0, 1)]
                both.wait(60)
                written.append(store.commit_sequences(commits[::step]))

    with caplog.at_level("DEBUG", logger="neo4j"):
        assert together([partial(write, step) for step in (1, -1)]) == []
    assert "DeadlockDetected" in caplog.text
    assert sum(written) == 2 * rounds
    with open_graph(graph) as store:
        assert len(store.read_edges("ON_SEQUENCE")) == 2 * rounds
        counted = store.read_edges("ATTRIBUTES", run="r").group_by("sequence").len()
    assert counted["len"].to_list() == [3600] * 2 * rounds
    assert str(ServerCredentials.from_environment().password) not in caplog.text
