"""Statistics by workers on a real Ray: what one process measures, also where a worker or the driver is killed, and by the command."""

import json
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from featlas.ingest import statistics_workers
from featlas.ingest.statistics import Between, Measurement, StatisticsOptions, run_measurement, shard_folder, text_corpus
from featlas.ingest.statistics_workers import Identity, StatisticsJob, StatisticsWorker, WorkerDiffers
from featlas.queries.statistics import StatisticsStore

from .cluster_work import with_a_death
from .micro import save_tiny_with_corpus
from .test_statistics_shards import assert_agree, tables

OPTIONS = StatisticsOptions(
    length=8, batch_size=2, n_contexts=2, before=1, after=1, live_rows=40, min_frequency=0.05, by_position=True, between=Between.ALL,
    commit_seconds=0,
)  # fmt: skip
N_BLOCKS = 41


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_with_corpus(tmp_path_factory.mktemp("tiny"), words=8 * N_BLOCKS)


def job_of(folder: Path) -> StatisticsJob:
    return StatisticsJob(
        model=str(folder / "model"), dictionaries="identity", options=OPTIONS, corpus=str(folder / "corpus.txt"), sites=("mlp_0", "resid_1")
    )


def measurement_of(job: StatisticsJob) -> Measurement:
    """The driver's making of it, with a corpus that is counted."""
    made = job.measurement()
    return job.of(made.model, made.dictionaries, text_corpus(str(job.corpus), made.model.tokenizer, OPTIONS))


@pytest.fixture(scope="module")
def job(folder):
    return job_of(folder)


@pytest.fixture(scope="module")
def measurement(job):
    return measurement_of(job)


@pytest.fixture(scope="module")
def whole(folder, measurement):
    with StatisticsStore(folder / "whole.duckdb") as store:
        return tables(store, run_measurement(store, measurement).run)


CHILD = """
import os, signal, sys
from pathlib import Path
from featlas.ingest.cluster import ray_session
from featlas.ingest.statistics_workers import measure_by_workers
from featlas.queries.statistics import StatisticsStore
from tests.test_statistics_workers import job_of, measurement_of

job = job_of(Path(sys.argv[1]))

def progress(done, total, tokens):
    os.kill(os.getpid(), signal.SIGKILL)

with StatisticsStore(Path(sys.argv[2])) as store, ray_session(None, 2) as session:
    measure_by_workers(store, measurement_of(job), job, session, n_shards=7, progress=progress)
"""


def test_a_worker_with_another_model_or_dictionary_is_refused(job, measurement, tmp_path):
    mine = Identity.of(measurement)
    StatisticsWorker(job, tmp_path, "run", mine, 1 << 28)
    with pytest.raises(WorkerDiffers, match=r"a worker's model is '.*', the driver's 'other@1': all machines need the same"):
        StatisticsWorker(job, tmp_path, "run", Identity(mine.version, "other@1", mine.dictionaries), 1 << 28)
    with pytest.raises(WorkerDiffers, match="a worker's dictionaries"):
        StatisticsWorker(job, tmp_path, "run", Identity(mine.version, mine.model, mine.dictionaries[:1]), 1 << 28)


def words(folder: Path, *more: object) -> list[object]:
    """The command that measures what `job_of` measures, but for a few options that it has not."""
    said = ["ingest", "statistics", "--model", folder / "model", "--dictionaries", "identity", "--corpus", folder / "corpus.txt", "--length", 8]
    return [*said, "--batch-size", 2, "--sites", "mlp_0,resid_1", "--between", "all", "--by-position", *more]


@pytest.fixture(scope="module")
def commanded(folder):
    """What the command measures in one process: its JSON, and the tables."""
    job = replace(job_of(folder), options=StatisticsOptions(length=8, batch_size=2, between=Between.ALL, by_position=True))
    with StatisticsStore(folder / "commanded.duckdb") as store:
        record = run_measurement(store, measurement_of(job))
        return {"run": record.run, "sequences": record.sequences, "tokens": record.tokens, "annotated": 0}, tables(store, record.run)


@pytest.mark.slow
@pytest.mark.usefixtures("by_value")
def test_two_workers_of_which_one_is_killed_measure_what_one_process_does(featlas, folder, commanded, tmp_path, monkeypatch):
    seen = []

    @contextmanager
    def progress(label: str, *, quiet: bool = False):
        yield lambda done, total, told: seen.append((done, told))

    monkeypatch.setattr(statistics_workers, "run_shards", with_a_death(tmp_path / "died"))
    monkeypatch.setattr(statistics_workers, "default_shards", lambda n_batches: 7)
    monkeypatch.setattr("featlas.cli_statistics.console.progress", progress)
    code, out, err = featlas(*words(folder, "--workers", 2, "--atlas", tmp_path / "atlas", "--json"))
    assert code == 0, err
    assert json.loads(out) == commanded[0]
    with StatisticsStore(tmp_path / "atlas") as store:
        assert_agree(tables(store, commanded[0]["run"]), commanded[1])
    assert seen[-1] == (N_BLOCKS, f"{N_BLOCKS * 7} tokens")
    assert len(seen) == 7  # every shard's result came once
    assert re.fullmatch(r"a worker died over shard \d/7( or shard \d/7)? \(.*\); another does it again", err.strip())


@pytest.mark.slow
def test_a_killed_driver_leaves_shards_that_the_next_one_merges(folder, measurement, whole, tmp_path):
    arguments = [sys.executable, "-c", CHILD, str(folder), str(tmp_path)]
    child = subprocess.run(arguments, capture_output=True, text=True, timeout=180, cwd=Path(__file__).parents[1], check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    run, planned, measured = measurement.plan().run, measurement.shards(7), []
    folder_ = shard_folder(tmp_path, run)
    assert folder_.n_shards() == 7

    def measure(batch):
        measured.append(batch)
        return measurement.measure(batch)

    with StatisticsStore(tmp_path) as store:
        merged = store.run(run).sequences
        left = [shard for shard in planned if shard.first >= merged and folder_.tokens(shard) is None]
        assert 3 <= len(left) <= 6  # one result was told; of the others two had been given to each worker
        assert_agree(tables(store, run_measurement(store, replace(measurement, measure=measure)).run), whole)
    assert 0 < len(measured) <= sum(shard.stop_batch - shard.first_batch for shard in left)  # what was committed of a shard in work stays


@pytest.mark.slow
def test_the_command_measures_shard_by_shard(featlas, folder, commanded, tmp_path):
    for number in (2, 1):
        code, out, err = featlas(*words(folder, "--json", "--atlas", tmp_path, "--shard", f"{number}/2"))
        assert code == 0, err
        assert json.loads(out) == {"run": commanded[0]["run"], "shard": number, "of": 2, "measured": True, "done": 3 - number}
    code, out, err = featlas(*words(folder, "--atlas", tmp_path, "--shard", "2/2"))
    assert "shard 2/2 was measured before; 2 of 2 are there" in out
    assert "the same command without --shard merges them" in err
    code, out, err = featlas(*words(folder, "--json", "--atlas", tmp_path))
    assert json.loads(out) == commanded[0]
    with StatisticsStore(tmp_path) as store:
        assert_agree(tables(store, commanded[0]["run"]), commanded[1])
    left = sorted(tmp_path.rglob("*.parts/*"))
    code, out, err = featlas(*words(folder, "--atlas", tmp_path, "--shard", "2/2"))  # a job that is queued once more
    assert f"statistics run {commanded[0]['run']} is done, with all of its shards: nothing was measured" in out
    assert sorted(tmp_path.rglob("*.parts/*")) == left


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "3"], "--shard '3': write the number of the shard and how many there are, such as 3/16"),
        (["--shard", "1/2", "--workers", "2"], "leave --workers and --ray-address out, or --shard"),
        (["--workers", "0"], "--workers 0: there must be one at least"),
        (["--workers", "5000"], "this machine has"),
        (["--workers", "1", "--ray-address", "http://x"], "write HOST:PORT"),
    ],
)
def test_words_that_make_no_sense_are_refused_before_anything_is_loaded(featlas, folder, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("featlas.cli.load_named", lambda *words: pytest.fail("the model was loaded"))
    code, out, err = featlas(*words(folder, "--atlas", tmp_path / "atlas", *more))
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "atlas").exists()
