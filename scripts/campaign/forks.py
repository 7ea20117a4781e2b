"""A process that has imported all of featlas and forks a command from itself: starting one, and killing it, costs milliseconds.

    python -m scripts.campaign.forks        (by `Forks`; talks JSON lines)

The parent is the only one to collect the command, so that the process that is killed is always the one that was meant. `Forks` is the other
side: it starts the process, and runs commands one after another.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .phases import Board, Recorder

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0
COMMIT_SECONDS = 0.02
"""How often a statistics pass commits here; 30 s otherwise, longer than a whole tiny one."""


@dataclass(frozen=True)
class Order:
    """A command line, and how it is killed: `after` so many seconds, or `delay` seconds into the `nth` time of a `phase`; None: not at all.

    patience: seconds for which a server that is away is waited for; silence: after which one that says nothing is given up (None: as always).
    """

    arguments: Sequence[str]
    after: float | None = None
    phase: str | None = None
    nth: int = 0
    delay: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)
    patience: float | None = None
    silence: float | None = None


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), its seconds, the phase in which it was killed, what it printed."""

    code: int
    seconds: float
    killed: bool
    phase: str
    out: str
    err: str
    phases: Mapping[str, tuple[int, float]]


class Forks:
    """The fork server, from outside; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        settled = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "FEATLAS_CONFIG": "", "PYTHONPATH": path}
        environment = {**os.environ, **settled}
        command = [sys.executable, "-m", "scripts.campaign.forks", str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._read()

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that forks commands has ended")
        return json.loads(line)

    def start(self, order: Order) -> int:
        """Begin a command; its process id. `wait` must follow."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(order)) + "\n")
        self.process.stdin.flush()
        return int(self._read()["pid"])

    def wait(self) -> Ended:
        return Ended(**self._read())

    def run(self, *arguments: object, **how: Any) -> Ended:
        """Run one command to its end, or to its death."""
        self.start(Order([str(word) for word in arguments], **how))
        return self.wait()


# -- inside ---------------------------------------------------------------------------------------------------


def _serve(folder: Path) -> None:
    import sae_lens  # noqa: F401
    from featlas import cli, cli_ablation, cli_labels, cli_regions, region_verdict, verdict  # noqa: F401
    from featlas.analysis import circuits, labels, parcellation, regions_store, scores  # noqa: F401
    from featlas.ingest import functional, pipeline, samples, statistics  # noqa: F401
    from featlas.model import dictionary_sources, training  # noqa: F401
    from featlas.queries import embedded, server  # noqa: F401

    options = statistics.StatisticsOptions.__init__
    options.__defaults__ = tuple(COMMIT_SECONDS if value == 30.0 else value for value in options.__defaults__ or ())
    board = Board()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        _do(Order(**json.loads(line)), board, folder)


def _do(order: Order, board: Board, folder: Path) -> None:
    board.clear()
    said, phases = [folder / "out", folder / "err"], folder / "phases.json"
    phases.unlink(missing_ok=True)
    listen, bell = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(listen)
        _child(order, board, said, phases, bell)
    os.close(bell)
    print(json.dumps({"pid": pid}), flush=True)
    status, killed = _watched(order, pid, listen, began)
    os.close(listen)
    counted = json.loads(phases.read_text()) if phases.exists() and not killed else {}  # a kill may have left half of it
    out, err = (path.read_text(errors="replace") for path in said)
    ended = Ended(os.waitstatus_to_exitcode(status), time.monotonic() - began, killed, board.phase(), out, err, counted)
    print(json.dumps(asdict(ended)), flush=True)


def _watched(order: Order, pid: int, listen: int, began: float) -> tuple[int, bool]:
    """Wait for the command and kill it when its moment has come: (status, whether it was)."""
    at = None if order.after is None else began + order.after
    waiting = order.phase is not None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status, False
        now = time.monotonic()
        if waiting and select.select([listen], [], [], 0)[0] and os.read(listen, 1):
            at, waiting = now + order.delay, False
        if (at is not None and now >= at) or now > began + LIMIT_S:
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1], os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.0005 if at is None else min(0.0005, max(0.0, at - now)))


def _child(order: Order, board: Board, said: Sequence[Path], phases: Path, bell: int) -> None:
    """Be the command: never returns."""
    code = 1
    try:
        os.setsid()
        for number, path in zip((1, 2), said):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(order.environment)
        recorder = Recorder(board, None if order.phase is None else (order.phase, order.nth), bell)
        recorder.install()
        _hurry(order)
        from featlas import cli

        sys.argv = ["featlas", *order.arguments]
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        recorder.save(phases)
    except BaseException:  # noqa: BLE001 - printed, and never back into the parent's loop
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _hurry(order: Order) -> None:
    """Shorten how long a server is waited for."""
    from featlas.queries import server
    from neo4j._sync.io._bolt._bolt_socket import BoltSocket

    if order.patience is not None:
        server.PATIENCE_S = order.patience
    if order.silence is not None:
        plain, least = BoltSocket.set_read_timeout, order.silence
        BoltSocket.set_read_timeout = lambda self, timeout: plain(self, least if timeout is None else min(timeout, least))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
