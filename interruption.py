"""Ctrl-C: how a command is stopped, and what it says of the work done so far.

1. The first SIGINT (Ctrl-C) or SIGTERM raises `KeyboardInterrupt` in the main thread: files are closed and what is being written is finished.
2. A second one ends the process at once. The stores survive that too: what was not committed is as if it had never been.
3. `KEPT` says of each long command what stays in the atlas when it is interrupted, and whether the same command goes on from there.
"""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_SECONDS = 0.02  # after which an interrupt that was swallowed is raised once more


@dataclass(frozen=True)
class Reached:
    """How far a piece of work was: `done` of `total`; None where its length was not known yet."""

    label: str
    done: int
    total: int | None


class Interrupted(KeyboardInterrupt):
    """An interrupt that knows how far the work was."""

    def __init__(self, reached: Reached) -> None:
        super().__init__()
        self.reached = reached


@dataclass(frozen=True)
class Kept:
    """What stays of a command that is interrupted. counted: said after "37 of 100"; None where nothing of what is counted stays."""

    counted: str | None
    resumes: bool
    also: str = ""


_MEASURED = Kept(None, False, "what was measured is not written")
KEPT: dict[tuple[str, ...], Kept] = {
    ("demo",): Kept(None, True, "what is in the atlas stays"),
    ("dictionaries", "train"): Kept(None, True, "stored activations and finished dictionaries are kept; the one in training begins anew"),
    ("ingest", "edges"): Kept("sequences are in the atlas", True),
    ("ingest", "statistics"): Kept(None, True, "what was committed last (at most about 30 s ago) and finished shards are kept"),
    ("ingest", "weights"): Kept(None, True, "pairs of sites that are wired stay"),
    ("ingest", "finish"): Kept(None, True, "the run's edges are untouched"),
    ("ingest", "samples"): Kept(None, False, "samples are kept when all are there: nothing was written"),
    ("atlas", "copy"): Kept(None, True, "what is copied stays"),
    ("atlas", "prune"): Kept(None, True, "what is deleted is gone; a file that was being written anew is as it was"),
    ("ingest", "correlations"): Kept(None, False, "a test that was not finished is not kept"),
    ("ingest", "definitions"): _MEASURED,
    ("analyze", "agreement"): _MEASURED,
    ("analyze", "selectivity"): Kept(None, True, "runs of edges that it has measured stay in the atlas"),
    ("analyze", "faithfulness"): _MEASURED,
    ("analyze", "effects"): _MEASURED,
    ("analyze", "mixture"): _MEASURED,
    ("analyze", "improve"): _MEASURED,
    ("analyze", "communities"): _MEASURED,
    ("analyze", "rois"): Kept(None, False, "regions are kept when all sites have theirs: nothing was written"),
    ("analyze", "ablate-rois"): _MEASURED,
    ("analyze", "heads"): _MEASURED,
    ("analyze", "vision"): _MEASURED,
    ("analyze", "match"): _MEASURED,
    ("analyze", "joint"): _MEASURED,
    ("compare",): _MEASURED,
    ("ingest", "aligned"): Kept(None, False, "aligned samples are kept when all are there: nothing was written"),
    ("series", "measure"): Kept(None, True, "models that are measured stay"),
    ("series", "train"): Kept(None, False, "a training that was not finished is not kept"),
}
"""What an interrupt leaves of each command that takes long."""


class Signals:
    """Listens to the signals that end a process. `received` is the first one, None so far."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The first interrupts, the second ends."""
        if self.received is not None:
            os.write(2, b"\nfeatlas: ended at once; what was not committed is not in the atlas\n")
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if sys.stderr is not None and sys.stderr.isatty():
            os.write(2, b"\nfeatlas: finishing what is being written; once more ends at once\n")
        raise KeyboardInterrupt

    def unraisable(self, what: Any) -> None:
        """An interrupt that fell into a destructor or a callback, where Python drops it, comes again; its trace is not shown."""
        if self.received is not None and issubclass(what.exc_type, KeyboardInterrupt):
            with suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGALRM, _raise)
                signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        else:
            sys.__unraisablehook__(what)


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


_listening: list[Signals] = []


def pending() -> bool:
    """Whether this process has been asked to stop."""
    return bool(_listening) and _listening[-1].received is not None


def again() -> None:
    """Raise an interrupt once more that a library has swallowed; called from time to time by what reports progress."""
    if pending() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


@contextmanager
def listening() -> Iterator[Signals]:
    """Turn the signals into interrupts while this is open, and for good once one has come. What the parent ignores stays ignored (`nohup`)."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    hook = sys.unraisablehook
    _listening.append(signals)
    sys.unraisablehook = signals.unraisable
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signals)
    try:
        yield signals
    finally:
        if signals.received is None:  # else the interpreter, which is about to end, would answer the next one with a trace
            for number, handler in before.items():
                signal.signal(number, handler)
        sys.unraisablehook = hook
        _listening.pop()


@contextmanager
def at(where: "list[Reached]") -> Iterator[None]:
    """Tell an interrupt how far the work was: `where` holds it, last. Libraries turn interrupts into errors of their own: those count too."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        raise Interrupted(where[-1]) from error
    except BaseException as error:
        if not pending():
            raise
        raise Interrupted(where[-1]) from error


def command_line(arguments: Sequence[str]) -> str:
    """The command as one would type it."""
    return shlex.join(["featlas", *arguments])


def explained(command: Sequence[str], reached: Reached | None, arguments: Sequence[str]) -> str:
    """What an interrupted command says: how far it was, what stays, and the command that goes on or begins anew."""
    kept = KEPT.get(tuple(command))
    count = "" if reached is None or reached.total is None else f"{reached.done:,} of {reached.total:,}"
    if kept is None:
        stopped = f"interrupted ({reached.label}: {count})" if reached is not None and count else "interrupted"
        return f"{stopped}: what was committed stays; the same command again: {command_line(arguments)}"
    if count and kept.counted is not None:
        into_files = any(word.split("=")[0] == "--import-files" for word in arguments)
        said = f"interrupted: {count} {kept.counted.replace('in the atlas', 'in the import files') if into_files else kept.counted}"
    elif count and reached is not None:
        said = f"interrupted ({reached.label}: {count}): {kept.also}"
    else:
        said = f"interrupted: {kept.also or 'what was written before stays'}"
    then = "the same command goes on from there" if kept.resumes else "the same command begins anew"
    return f"{said}; {then}: {command_line(arguments)}"
