"""Ctrl-C: one line, exit code 130, whole stores, and a repeated command that ends where an uninterrupted one does; never a trace."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from featlas import cli, console, interruption, running
from featlas.interruption import Interrupted, Reached, explained, listening
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import open_graph

from .micro import save_tiny_with_corpus

ROOT = Path(__file__).parents[1]
ARGUMENTS = ["ingest", "edges", "--task", "a b.jsonl"]


# --- what is said ----------------------------------------------------------------------------------------------------


def test_what_an_interrupted_command_says() -> None:
    again = "the same command goes on from there: featlas ingest edges --task 'a b.jsonl'"
    said = explained(("ingest", "edges"), Reached("edges", 1037, 2100), ARGUMENTS)
    assert said == f"interrupted: 1,037 of 2,100 sequences are in the atlas; {again}"
    assert explained(("ingest", "edges"), None, ARGUMENTS) == f"interrupted: what was written before stays; {again}"
    files = explained(("ingest", "edges"), Reached("edges", 1, 4), [*ARGUMENTS, "--import-files", "imp"])
    assert files.startswith("interrupted: 1 of 4 sequences are in the import files; ")
    lost = explained(("analyze", "faithfulness"), Reached("sequences", 12, 32), ["analyze", "faithfulness"])
    assert lost == "interrupted (sequences: 12 of 32): what was measured is not written; the same command begins anew: featlas analyze faithfulness"
    unknown = explained(("query",), None, ["query", "hubs"])
    assert unknown == "interrupted: what was committed stays; the same command again: featlas query hubs"


def test_progress_tells_the_interrupt_how_far_it_was() -> None:
    def work(error: type[BaseException]) -> None:
        with console.progress("edges") as report:
            report(3, 10)
            raise error

    with pytest.raises(Interrupted) as caught:
        work(KeyboardInterrupt)
    assert caught.value.reached == Reached("edges", 3, 10)
    with pytest.raises(ZeroDivisionError):
        work(ZeroDivisionError)  # a bug is no interrupt


@pytest.fixture
def restored() -> Iterator[None]:
    """Leaves the signals of this process as they were."""
    before = {number: signal.getsignal(number) for number in (*interruption.SIGNALS, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_error_that_a_library_makes_of_an_interrupt_is_one(restored: None) -> None:
    with listening():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            assert interruption.pending()
        with pytest.raises(Interrupted), console.progress("rows"):
            raise RuntimeError("Query interrupted")  # as DuckDB says it
        with pytest.raises(Interrupted), console.progress("rows") as report:
            report(1, 2)  # swallowed by a library: raised again at the next report
    assert not interruption.pending()


def test_an_interrupt_that_python_drops_comes_again(restored: None) -> None:
    class Late:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    def work() -> None:
        with listening():
            late = Late()
            del late
            time.sleep(5)
            pytest.fail("the interrupt was lost")

    with pytest.raises(KeyboardInterrupt):
        work()


def test_signals_are_as_before_where_none_came(restored: None) -> None:
    before = signal.getsignal(signal.SIGINT)
    with listening():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with listening():  # what the parent ignores (nohup) stays ignored
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_command_that_is_interrupted(
    restored: None, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        with console.progress("edges") as report:
            report(3, 10)
            os.kill(os.getpid(), number)
            time.sleep(5)

    monkeypatch.setattr(console, "table", stopped)
    assert running.run(cli.app, ["tasks", "list"]) == code
    said = "featlas: interrupted (edges: 3 of 10): what was committed stays; the same command again: featlas tasks list\n"
    assert capsys.readouterr() == ("", said)
    monkeypatch.setattr(console, "say_json", stopped)
    for handled in interruption.SIGNALS:
        signal.signal(handled, signal.default_int_handler)
    assert running.run(cli.app, ["tasks", "list", "--json"]) == code
    out, err = capsys.readouterr()
    one = json.loads(err)
    assert (out, one["kind"], one["exit_code"], one["done"], one["total"]) == ("", "Interrupted", code, 3, 10)


@pytest.mark.slow
def test_the_second_one_ends_at_once(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\n"
        "from featlas import interruption\n"
        "with interruption.listening():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        print('closing', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (130, "closing\n")
    assert done.stderr.strip() == "featlas: ended at once; what was not committed is not in the atlas"


# --- real processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a text, and pairs enough that a run takes a while."""
    folder = save_tiny_with_corpus(tmp_path_factory.mktemp("tiny"), words=16_000)
    words = [(f"w{7 + i % 30}", f"w{(11 * i) % 40}", f"w{(3 * i + i // 30) % 40}") for i in range(80)]
    pairs = [{"clean": f"w1 {a} {b} {c} w2", "corrupt": f"w1 w9 {b} {c} w2" if a != "w9" else f"w1 w8 {b} {c} w2"} for a, b, c in words]
    lines = [json.dumps({**pair, "answer": " w5", "wrong_answer": " w6"}) for pair in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


class Child:
    """featlas in a process of its own, past its imports."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "tests.interrupted_child", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.began = time.monotonic()

    def interrupt(self, after: float, number: signal.Signals = signal.SIGINT) -> None:
        time.sleep(after)
        self.process.send_signal(number)

    def ended(self) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=300)
        finally:
            self.process.kill()
        assert "Traceback" not in err, err
        assert "Exception ignored" not in err, err
        return self.process.returncode, out, err


def whole_run(*arguments: object) -> float:
    """Seconds that a command takes past its imports, up to its first line of result."""
    child = Child(*arguments)
    assert child.process.stdout is not None
    first = child.process.stdout.readline()
    seconds = time.monotonic() - child.began
    code, _, err = child.ended()
    assert (code, bool(first)) == (0, True), err
    return seconds


def interrupted_runs(seconds: float, arguments: list[object], seed: int) -> list[dict[str, object]]:
    """Interrupt a command at random moments of what it takes, three times, then let it end; what each said."""
    moments, said = random.Random(seed), []
    for _ in range(3):
        child = Child(*arguments, "--json")
        child.interrupt(moments.uniform(0.05, 0.8) * seconds)
        code, out, err = child.ended()
        if out:  # it was done before, and the signal met an interpreter that was ending, if any
            assert code in (0, 130, -signal.SIGINT)
            break
        assert (code, out) == (130, ""), err
        said.append(json.loads(err.splitlines()[-1]))
    assert whole_run(*arguments) > 0
    return said


def edges_of(atlas: Path) -> dict[str, pl.DataFrame]:
    with open_graph(atlas, read_only=True) as store:
        tables = {name: store.read_edges(name) for name in ("ATTRIBUTES", "INFLUENCES", "ON_SEQUENCE")}
        tables["runs"] = store.query("MATCH (r:Run) RETURN r.key AS key, r.status AS status, r.n_edges AS edges, r.n_sequences AS sequences")
    return tables


@pytest.mark.slow
def test_edges_interrupted_at_random_moments_are_those_of_a_whole_run(tiny: Path, tmp_path: Path) -> None:
    named = ["--model", tiny / "model", "--dictionaries", "identity", "--sites", "resid_0,resid_2", "--task", tiny / "pairs.jsonl"]
    command = ["ingest", "edges", *named, "--limit", 80, "--steps", 2, "--batch-size", 2]
    seconds = whole_run(*command, "--atlas", tmp_path / "whole")
    said = interrupted_runs(seconds, [*command, "--atlas", tmp_path / "parts"], seed=1)
    assert said
    for one in said:
        assert "the same command goes on from there: featlas ingest edges" in str(one["error"])
    whole, parts = edges_of(tmp_path / "whole"), edges_of(tmp_path / "parts")
    for name, table in whole.items():
        assert table.equals(parts[name]), name


@pytest.mark.slow
def test_statistics_interrupted_at_random_moments_are_those_of_a_whole_run(tiny: Path, tmp_path: Path) -> None:
    named = ["--model", tiny / "model", "--dictionaries", "identity", "--sites", "resid_0,resid_1,resid_2", "--corpus", tiny / "corpus.txt"]
    command = ["ingest", "statistics", *named, "--length", 40, "--batch-size", 4]
    seconds = whole_run(*command, "--atlas", tmp_path / "whole")
    said = interrupted_runs(seconds, [*command, "--atlas", tmp_path / "parts"], seed=2)
    assert said
    tables = []
    for name in ("whole", "parts"):
        with StatisticsStore(tmp_path / name, read_only=True) as store:
            tables.append(store.query("SELECT * FROM feature_statistics ORDER BY ALL"))
            assert store.runs()["status"].to_list() == ["done"]
    assert tables[0].equals(tables[1])


@pytest.mark.slow
def test_samples_interrupted_leave_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    named = ["--model", tiny / "model", "--dictionaries", "identity", "--sites", "resid_0,resid_1", "--corpus", tiny / "corpus.txt"]
    command = ["ingest", "samples", *named, "--length", 20, "--batch-size", 2, "--atlas", tmp_path / "atlas"]
    child, until = Child(*command), time.monotonic() + 120
    while not list((tmp_path / "atlas").glob("samples/.*")) and time.monotonic() < until:
        time.sleep(0.005)
    child.interrupt(0.0)
    code, _, err = child.ended()
    assert code == 130, err
    assert "nothing was written" in err
    assert list((tmp_path / "atlas").glob("samples/*")) == []
    assert list((tmp_path / "atlas").glob("samples/.*")) == []
    assert whole_run(*command) > 0
