"""Who holds a database's file, and how long to wait for it.

The embedded databases are written by one process at a time. A command that finds a file held waits `patience()` seconds and then says which process
holds it: its number, the command (never its values, which may be secret), and since when.
"""

import math
import os
import time
from datetime import datetime
from pathlib import Path

from ..errors import UserError

VARIABLE = "FEATLAS_WAIT"
"""Seconds to wait for a file that another process holds."""

WAIT_S = 5.0
"""Unless `VARIABLE` says otherwise: longer than `featlas serve` keeps a file after a page."""

_PROC = Path("/proc")


class BadPatience(UserError):
    """`VARIABLE` is no number of seconds."""


def patience() -> float:
    """Seconds to wait for a file that another process holds. Raises `BadPatience`."""
    said = os.environ.get(VARIABLE)
    if not said:
        return WAIT_S
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise BadPatience(f"${VARIABLE} is {said!r}, which is no number of seconds: give 0 or more, or leave it unset to wait {WAIT_S:g} s")
    return seconds


def held_by(pid: int | None) -> str:
    """A process as a message names it: `process 123 (featlas ingest edges, since 14:03:10)`, as far as the system tells."""
    if pid is None:
        return "another process"
    known = [part for part in (_command(pid), _since(pid)) if part]
    told = ", ".join(known)
    return f"process {pid}{f' ({told})' if told else ''}"


def way_out(seconds: float) -> str:
    """What to do about a file that is held."""
    waited = f"{seconds:g} s were waited" if seconds else "nothing was waited"
    return f"{waited}; wait until it is done ({VARIABLE}=600 in the environment waits up to ten minutes), or end it"


def _command(pid: int) -> str | None:
    """The program and the words of its command: those before the first option, without paths and values."""
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return None
    place = next((i for i, word in enumerate(words[:3]) if Path(word).name in ("featlas", "featlas.cli")), None)
    if place is None:
        return Path(words[0]).name if words and words[0] else None
    said = ["featlas"]
    for word in words[place + 1 : place + 3]:
        if not word.replace("-", "").isalpha() or word.startswith("-"):
            break
        said.append(word)
    return " ".join(said)


def _since(pid: int) -> str | None:
    """When a process began: the time, with the day where it is another."""
    try:
        ticks = int((_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
        booted = next(int(line.split()[1]) for line in (_PROC / "stat").read_text(encoding="utf-8").splitlines() if line.startswith("btime "))
        began = datetime.fromtimestamp(booted + ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return f"since {began:{'%H:%M:%S' if time.time() - began.timestamp() < 12 * 3600 else '%Y-%m-%d %H:%M'}}"
