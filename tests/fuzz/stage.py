"""Where a case is run: a tiny model, dictionaries, tasks and an atlas on disk, and the command line in this process.

The property of every case: the command ends by itself in bounded time with success, or with one readable line that begins with `featlas: ` and the
exit code of a `FeatlasError`; a refused command has changed nothing that the atlas holds.
"""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from featlas import cli, running
from featlas.queries.schema import EDGES, NODES
from featlas.queries.statistics import FILE_NAME, StatisticsStore
from featlas.queries.store import open_graph

SECONDS = 60.0
"""More than any case may take, also on a machine that is busy."""


class Broken(AssertionError):
    """A case ended as none may: `where` tells such ends apart."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}\n{what}")
        self.where = where


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def refused(self) -> bool:
        return self.code != 0


@dataclass
class Stage:
    """A folder with `model`, `dictionaries`, `task.jsonl`, `atlas` and a place for the case's own files, `input`."""

    folder: Path
    runs: Mapping[str, str]
    statistics_run: str
    n_changed: int = 0
    _seen: tuple[object, ...] = field(default=(), repr=False)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def atlas(self) -> Path:
        return self.folder / "atlas"

    @property
    def input(self) -> Path:
        """An empty folder for a case's files: made anew by `fresh`."""
        return self.folder / "input"

    def fresh(self) -> Path:
        shutil.rmtree(self.input, ignore_errors=True)
        self.input.mkdir()
        return self.input

    def file(self, name: str, data: bytes) -> Path:
        """A file in a fresh folder."""
        path = self.fresh() / name
        path.write_bytes(data)
        return path

    def restore(self) -> None:
        """The atlas as it was at first."""
        shutil.rmtree(self.atlas, ignore_errors=True)
        shutil.copytree(self.folder / "pristine", self.atlas)
        self._seen, self.n_changed = (), 0

    def content(self) -> tuple[object, ...]:
        """What the atlas holds: rows of each table and a hash of all nodes and of the labels."""
        with open_graph(self.atlas, read_only=True) as store:
            nodes = [_hashed(store.query(f"MATCH (n:{label}) RETURN n AS n")) for label in NODES]
            edges = [store.query(f"MATCH ()-[e:{type}]->() RETURN count(*) AS n") for type in EDGES]
        with StatisticsStore(self.atlas / FILE_NAME, read_only=True) as statistics:
            tables = statistics.query("SELECT table_name AS t FROM duckdb_tables() ORDER BY t")["t"].to_list()
            tables = [name for name in tables if not name.startswith("search_")]  # the index of a search is made when it is asked for
            counts = [int(statistics.query(f"SELECT count(*) AS n FROM {name}")["n"][0]) for name in tables]
            labels = _hashed(statistics.query("SELECT * FROM feature_labels"))
        return (*nodes, *(tuple(frame.row(0)) for frame in edges), *counts, labels)

    def _stamps(self) -> tuple[object, ...]:
        """The files of the atlas with their sizes and times: what has not changed needs no look inside."""
        return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(self.atlas.rglob("*")) if path.is_file())

    def run(self, *words: object, environment: Mapping[str, str] | None = None) -> Outcome:
        """Run a command; raises `Broken` where it ends as none may."""
        given = [str(word) for word in words]
        began = time.monotonic()
        with _environment({"FEATLAS_CONFIG": "", "NEO4J_URI": None, "FEATLAS_ATLAS": None, **(environment or {})}):
            outcome = _run(given)
        if time.monotonic() - began > SECONDS:
            raise Broken(f"slow: {given[:2]}", f"{time.monotonic() - began:.0f} s: {given}")
        return outcome

    def writes(self, *words: object, environment: Mapping[str, str] | None = None) -> Outcome:
        """Run a command that may write to the atlas; where it is refused the atlas must be as before."""
        before = self._seen or self.content()
        stamps = self._stamps()
        outcome = self.run(*words, environment=environment)
        self._seen = before if self._stamps() == stamps else self.content()
        if outcome.refused and self._seen != before:
            raise Broken(f"changed: {words[:2]}", f"a refused command changed the atlas: {words}: {outcome.err}")
        self.n_changed += self._seen != before
        if self.n_changed > 30:
            self.restore()
        return outcome


def _hashed(frame: pl.DataFrame) -> tuple[int, int]:
    return frame.height, int(frame.hash_rows().sum() or 0) if frame.width else 0


def _run(words: Sequence[str]) -> Outcome:
    out, err = _stream("strict"), _stream("backslashreplace")  # as Python opens the real ones
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _deadline(2 * SECONDS):
            code = running.run(cli.app, words)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Broken(place_of(error), f"{list(words)}\n{traceback.format_exc()[-3000:]}") from error
    said = _content(err)
    if code:
        _check_message(words, code, said)
    return Outcome(code, _content(out), said)


def _stream(errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)


def _content(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


def _check_message(words: Sequence[str], code: int, said: str) -> None:
    """That standard error ends in one readable line of ours."""
    lines = said.rstrip("\n").split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith(("featlas: ", "Usage: ", '{"error"'))), None)
    if start is None or (start != len(lines) - 1 and not lines[start].startswith("Usage: ")):
        raise Broken(f"message of {words[:2]}", f"exit code {code}, {list(words)}: {said[-600:]!r}")
    if any((c < " " and c != "\n") or "\x7f" <= c <= "\x9f" for c in said):
        raise Broken(f"controls in the message of {words[:2]}", f"{list(words)}: {said[-600:]!r}")
    if code not in (1, 2) or len(lines[start]) > 20_000:
        raise Broken(f"end of {words[:2]}", f"exit code {code}, {len(lines[start])} characters: {list(words)}: {said[-300:]!r}")


def place_of(error: BaseException) -> str:
    """The kind of an error and where in featlas it came out."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "featlas/" in frame.filename or "/work/main/" in frame.filename]
    ours = [frame for frame in frames if "/tests/" not in frame.filename and "site-packages" not in frame.filename]
    last = ours[-1] if ours else None
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.name}" if last else type(error).__name__


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """A TimeoutError after so many seconds."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def apart(*words: object) -> Outcome:
    """Run a command in a process of its own, which may die of what it reads; raises `Broken` where it ends as none may."""
    environment = {**os.environ, "FEATLAS_CONFIG": "", "NEO4J_URI": ""}
    environment.pop("NEO4J_URI")
    given = [str(word) for word in words]
    try:
        ended = subprocess.run([sys.executable, "-m", "featlas.cli", *given], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Broken(f"no end: {given[:2]}", f"{given}") from None
    if ended.returncode < 0 or "Traceback" in ended.stderr:
        last = ended.stderr.strip().splitlines()[-1:] or [""]
        raise Broken(f"{given[:2]} ended by {ended.returncode}: {last[0][:80]}", f"{given}: {ended.stderr[-1500:]}")
    if ended.returncode:
        _check_message(given, ended.returncode, ended.stderr)
    return Outcome(ended.returncode, ended.stdout, ended.stderr)
