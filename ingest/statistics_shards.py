"""Shards of a statistics run: contiguous stretches of a corpus that are measured apart and merged in order.

1. A corpus of known batches is cut into a number of shards, which is written down with the run: whoever works on it sees the same shards.
2. Shards that begin within the first tokens, by which the live nodes are chosen, keep their entries (`Collected`); whoever merges them chooses,
   as the single pass does. The later ones are given the live nodes (`Head`) and keep sums of products.
3. A shard has a folder: its state and its files, committed from time to time, so that a killed one goes on; at the end `done.json` names every
   file with its hash. A lock tells whether somebody works on it; the kernel lets go of it when that process dies, however it dies.
4. Merged in the order of their numbers, not of their arrival, shards give the same result whoever measured them and whatever died.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FeatlasError, UserError
from ..files import whole
from .corpora import BatchMark, TokenBatch, mark
from .moments import LiveRule, SparseNodes, Window
from .products import FloatArray, IntArray, packed, save_bytes, unpacked
from .records import Records, StateDoesNotFit

MOST_SHARDS = 64
"""Shards that a corpus is cut into at most, unless asked for more: each has a state to be merged."""

LEAST_BATCHES = 4
"""Batches of a shard at least, unless asked for less: a state costs about as much as a few batches."""

LOCK_SECONDS = 60.0
"""How long a shard is waited for that another process holds, by default: one that was killed lets go at once."""

STATE, DONE, BROKEN, PLAN, HEAD = "state.npz", "done.json", "broken.json", "plan.json", "head.npz"


class BadShards(UserError):
    """A shard's number, or the number of shards, is out of range or not that of the run."""


class ShardInWork(UserError):
    """Another process is measuring the shard."""


class CorpusDiffers(FeatlasError):
    """The batches read are not those that the run was planned with."""


@dataclass(frozen=True)
class Shard:
    """Batches `first_batch` to `stop_batch` of a corpus, its sequences `first` to `stop`; number 1 to `of`.

    collected: it begins within the first tokens, by which the live nodes are chosen. digest: of its batches' marks.
    """

    number: int
    of: int
    first_batch: int
    stop_batch: int
    first: int
    stop: int
    collected: bool
    digest: str

    def __str__(self) -> str:
        return f"shard {self.number}/{self.of}"


def plan_shards(marks: Sequence[BatchMark], n_shards: int, *, first_position: int, rule: LiveRule | None) -> tuple[Shard, ...]:
    """A corpus cut into `n_shards` stretches of about as many batches each. Raises `BadShards`."""
    if not 1 <= n_shards <= len(marks):
        raise BadShards(f"{n_shards} shards: the corpus has {len(marks)} batches, and a shard holds one at least")
    sequences = np.cumsum([0] + [found.n for found in marks])
    rows = np.cumsum([0] + [found.n * (found.length - first_position) for found in marks])
    bounds = [i * len(marks) // n_shards for i in range(n_shards + 1)]
    return tuple(
        Shard(
            i + 1, n_shards, start, stop, int(sequences[start]), int(sequences[stop]), rule is not None and bool(rows[start] < rule.rows),
            _digest(marks[start:stop]),
        )
        for i, (start, stop) in enumerate(pairwise(bounds))
    )  # fmt: skip


def default_shards(n_batches: int) -> int:
    """How many shards a corpus is cut into where nobody says: it does not depend on the number of workers."""
    return max(1, min(MOST_SHARDS, n_batches // LEAST_BATCHES))


def _digest(marks: Sequence[BatchMark]) -> str:
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Head:
    """The live nodes of each site, chosen by the first tokens, and what each is shifted by."""

    live: Mapping[str, IntArray]
    shifts: Mapping[str, FloatArray]


class ShardFolder:
    """Where the shards of a run are: `path`, one folder each, beside the plan and the head. Used by many processes at once."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run

    # -- the plan --------------------------------------------------------------------------------------------

    def n_shards(self) -> int | None:
        """The number of shards that the run was cut into; None where it was not. Raises `StateDoesNotFit`."""
        try:
            plan = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
            if plan["run"] == self.run:
                return int(plan["shards"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StateDoesNotFit(f"{self.path / PLAN} cannot be read ({error}): delete {self.path}, and measure the shards again") from None
        raise StateDoesNotFit(f"{self.path} holds shards of run {plan['run']}, not of {self.run}: delete it, and measure the shards again")

    def settle(self, n_shards: int) -> int:
        """Write the number of shards down, unless it is; returns the one that holds."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write_once(self.path / PLAN, json.dumps({"run": self.run, "shards": n_shards}).encode())
        return self.n_shards() or n_shards

    def head(self) -> Head | None:
        """The live nodes that were settled; None where they were not."""
        try:
            arrays = unpacked((self.path / HEAD).read_bytes())
        except FileNotFoundError:
            return None
        named = lambda stem: {key.removeprefix(f"{stem}/"): array for key, array in arrays.items() if key.startswith(f"{stem}/")}
        return Head(named("live"), named("shift"))

    def settle_head(self, live: Mapping[str, IntArray], shifts: Mapping[str, FloatArray]) -> Head:
        """Write the live nodes down, unless they are; returns those that hold."""
        self.path.mkdir(parents=True, exist_ok=True)
        arrays = {f"live/{site}": nodes for site, nodes in live.items()} | {f"shift/{site}": shift for site, shift in shifts.items()}
        _write_once(self.path / HEAD, packed(arrays))
        return self.head() or Head(live, shifts)

    # -- one shard -------------------------------------------------------------------------------------------

    def folder(self, shard: Shard) -> Path:
        return self.path / f"{shard.number:06d}"

    def products(self, shard: Shard) -> Path:
        """Where the shard's second moments keep their files."""
        return self.folder(shard) / "products"

    @contextmanager
    def held(self, shard: Shard, wait_s: float = LOCK_SECONDS) -> Iterator[None]:
        """Nobody else works on the shard while this is open; raises `ShardInWork` after `wait_s` seconds."""
        self.folder(shard).mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + wait_s
        with (self.folder(shard) / "lock").open("ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise ShardInWork(f"{shard} of run {self.run} is being measured by another process: wait until it ends") from None
                time.sleep(0.05)
            yield

    def is_done(self, shard: Shard) -> bool:
        """Whether the shard is measured; what says so and is not whole (a file is gone, or has another hash) says so no longer.

        Asked by anybody at any time, so that nothing is removed here: another process may be finishing the shard just now.
        """
        folder = self.folder(shard)
        try:
            text = (folder / DONE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return False
        except UnicodeDecodeError:
            text = ""
        try:
            done = json.loads(text)
            whole = done["shard"] == asdict(shard) and all(_hash(folder / name) == found for name, found in done["files"].items())
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            with suppress(FileNotFoundError):
                (folder / DONE).replace(folder / BROKEN)
        return whole

    def tokens(self, shard: Shard) -> int | None:
        """The tokens of a shard that says it is done; None where it does not. Its files are not looked at."""
        try:
            return int(json.loads((self.folder(shard) / DONE).read_text(encoding="utf-8"))["tokens"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load(self, shard: Shard, records: Records) -> Records:
        """Fill an empty record of the shard's from its folder."""
        state, sequences, tokens = self._state(shard)
        records.restore(state, sequences, tokens)
        return records

    def _state(self, shard: Shard) -> tuple[dict[str, bytes], int, int]:
        """The shard's last commit: parts, sequences, tokens. Raises `FileNotFoundError` where there is none."""
        arrays = unpacked((self.folder(shard) / STATE).read_bytes())
        numbers = arrays.pop("numbers")
        if str(arrays.pop("digest")) != shard.digest:
            raise StateDoesNotFit(f"{self.folder(shard)} is of other sequences: delete it, and measure the shard again")
        return {part: payload.tobytes() for part, payload in arrays.items()}, int(numbers[0]), int(numbers[1])

    def resume(self, shard: Shard, records: Records) -> None:
        """Go on from the shard's last commit, where there is one and it is whole. To be called while it is held."""
        folder = self.folder(shard)
        if (folder / BROKEN).exists():
            shutil.rmtree(self.products(shard), ignore_errors=True)
            for name in (STATE, BROKEN):
                (folder / name).unlink(missing_ok=True)
        if (folder / STATE).is_file():
            self.load(shard, records)

    def commit(self, shard: Shard, records: Records) -> None:
        """Keep what is measured so far, in one step."""
        parts: dict[str, NDArray[Any]] = {part: np.frombuffer(payload, np.uint8) for part, payload in records.save().items()}
        parts |= {"numbers": np.array([records.sequences, records.tokens]), "digest": np.array(shard.digest)}
        _replace(self.folder(shard) / STATE, packed(parts))
        records.cleaned()

    def finish(self, shard: Shard, records: Records, seconds: float) -> None:
        """Commit, and say that the shard is done: which files it has, with their hashes."""
        self.commit(shard, records)
        folder = self.folder(shard)
        files = [folder / STATE, *sorted(path for path in self.products(shard).glob("*") if path.is_file())]
        done = {"shard": asdict(shard), "run": self.run, "seconds": round(seconds, 3), "tokens": records.tokens}
        done["files"] = {str(path.relative_to(folder)): _hash(path) for path in files}
        _replace(folder / DONE, json.dumps(done, indent=1).encode())

    def remove(self, shard: Shard) -> None:
        shutil.rmtree(self.folder(shard), ignore_errors=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, payload: bytes) -> None:
    """Onto the disk, whole or not at all."""
    with whole(path) as part:
        part.write_bytes(payload)


def _write_once(path: Path, payload: bytes) -> None:
    """Whole, by the first who does; what is there stays."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    save_bytes(fresh, payload)
    try:
        os.link(fresh, path)
    except FileExistsError:
        pass
    finally:
        fresh.unlink()


# -- measuring one -------------------------------------------------------------------------------------------


class BatchReader:
    """The batches of a corpus by their numbers; going on costs nothing, going back reads the corpus anew."""

    def __init__(self, batches: Callable[[], Iterator[TokenBatch]]) -> None:
        self.batches = batches
        self.iterator: Iterator[TokenBatch] = iter(())
        self.next = -1

    def between(self, start: int, stop: int) -> Iterator[TokenBatch]:
        """Batches `start` to `stop`; raises `CorpusDiffers` where the corpus ends before."""
        if not 0 <= self.next <= start:
            self.iterator, self.next = self.batches(), 0
        while self.next < stop:
            batch = next(self.iterator, None)
            if batch is None:
                raise CorpusDiffers(f"the corpus ended after {self.next} batches, {stop} were counted: was its text changed?")
            self.next += 1
            if self.next > start:
                yield batch


def measure_shard(
    folder: ShardFolder,
    shard: Shard,
    records: Records,
    reader: BatchReader,
    measure: Callable[[TokenBatch], Mapping[Any, SparseNodes]],
    *,
    first_position: int,
    commit_seconds: float,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Measure a shard into its folder, from its last commit on; `records` are empty ones of the shard's. To be called while it is held.

    `progress` hears of the sequences done, counted in the corpus, and of the shard's tokens. Raises `CorpusDiffers` where the texts are not
    those that were planned with.
    """
    began = committed = time.monotonic()
    folder.resume(shard, records)
    resumed, at, marks = records.sequences, shard.first, []
    for batch in reader.between(shard.first_batch, shard.stop_batch):
        marks.append(mark(batch))
        at += len(batch.tokens)
        if at <= resumed:
            continue
        records.add(Window(batch.tokens.to(records.device), records.sequences, first_position), measure(batch))
        if time.monotonic() - committed >= commit_seconds and at < shard.stop:
            folder.commit(shard, records)
            committed = time.monotonic()
        if progress is not None:
            progress(records.sequences, records.tokens)
    if _digest(marks) != shard.digest or records.sequences != shard.stop:
        folder.remove(shard)
        raise CorpusDiffers(f"{shard} of run {folder.run} has other texts here than where the run was planned: was the corpus changed?")
    folder.finish(shard, records, time.monotonic() - began)
