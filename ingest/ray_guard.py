"""Runs beside a Ray that was started here, and ends what is left of it where its driver was killed.

    python -I -S ray_guard.py FOLDER

Ray's own reaper ends its servers and workers within a second; its agents would go on asking for them for a minute. This process reads its
standard input, which the driver holds open: a word means that all is well, its end without one that the driver is gone. Processes are known
by the variable that they inherited. Only the standard library: it must start at once.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARK = "FEATLAS_RAY"
GRACE_SECONDS = 2.0


def left(folder: str) -> list[int]:
    """Processes that belong to the session of a folder; none where the system does not tell (no /proc)."""
    mark = f"\0{MARK}={folder}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
            if mark in b"\0" + (entry / "environ").read_bytes() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def end(folder: str) -> None:
    """End them."""
    for pid in left(folder):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def guard(folder: str) -> None:
    """Wait for the driver's end; clean up where it was not its own."""
    if sys.stdin.buffer.read(1):
        return
    time.sleep(GRACE_SECONDS)  # Ray's own reaper comes first
    end(folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    guard(sys.argv[1])
