"""What tests give to workers: small functions that a worker's process can import."""

import os
import signal
import time
from functools import partial
from pathlib import Path

from featlas.errors import UserError
from featlas.ingest.cluster import run_shards


class LongWay(UserError):
    """An error whose constructor wants more than its message."""

    def __init__(self, metres: int, *, to: str) -> None:
        super().__init__(f"{metres} m to {to}")


def squares(folder):
    """A worker that squares; a shard's first visit is written down, so that `die once` knows whether it was here."""

    def work(shard):
        what, number = shard
        visits = Path(folder, f"{what}-{number}")
        visits.write_text(visits.read_text() + "x" if visits.exists() else "x")
        if what == "always" or (what == "once" and visits.read_text() == "x"):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "refuse":
            raise LongWay(number, to="go")
        if what == "break":
            raise KeyError(number)
        time.sleep(0.02)
        return number**2, os.getpid(), Path.cwd(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("SECRET_OF_TESTS")

    return work


def unmade():
    """A worker that dies while it is made."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying_once(make_worker, marker):
    """The worker that `make_worker` makes; the first shard of all, done and not yet told, is the death of who did it."""
    work = make_worker()

    def done(shard):
        result = work(shard)
        try:
            Path(marker).touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
        return result

    return done


def with_a_death(marker):
    """`run_shards`, in which one worker dies as `dying_once` does."""

    def run(session, make_worker, *given, **named):
        run_shards(session, partial(dying_once, make_worker, marker), *given, **named)

    return run
