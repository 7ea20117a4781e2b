"""What one edge-ingest job writes, batch by batch, as it is measured: nodes when they occur first, each sequence's edges with its mark."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl
import torch

from ..errors import FeatlasError
from ..model.sites import OUTPUT
from ..model.targets import LogitTarget
from ..model.tasks import PairBatch
from ..queries.schema import output_key
from ..queries.store import GraphStore, SequenceCommit
from .effective import EdgeBlock
from .nodes import site_nodes

if TYPE_CHECKING:
    from .pipeline import Plan

QUEUE_BATCHES = 1
"""Batches computed ahead of the writer before it holds the computation back."""


class WriterFailed(FeatlasError):
    """The writing thread stopped; its own error is the cause."""


@dataclass(frozen=True)
class Progress:
    """Where a run is: sequences done of all, edges written, seconds since the start."""

    done: int
    total: int
    edges: int
    seconds: float

    @property
    def edges_per_second(self) -> float:
        return self.edges / self.seconds if self.seconds > 0 else 0.0


class Tracker:
    """Counts what is in the graph, and says so. edges: those that this call wrote."""

    def __init__(self, done: int, total: int, progress: Callable[[Progress], None] | None, started: float) -> None:
        self.done, self.total, self.edges = done, total, 0
        self._progress, self._started = progress, started

    def add(self, sequences: int, edges: int) -> None:
        """So many more sequences, and edges, are committed."""
        self.done += sequences
        self.edges += edges
        if self._progress is not None:
            self._progress(Progress(self.done, self.total, self.edges, time.monotonic() - self._started))


@dataclass(frozen=True)
class Measured:
    """One batch's edges, on their way to the writer."""

    batch: PairBatch
    clean: list[float]  # the metric on the clean sequences
    corrupt: list[float]
    blocks: list[EdgeBlock]
    done: frozenset[str]


def commit_batch(store: GraphStore, nodes: "NodeTable", measured: Measured) -> tuple[int, int]:
    """Write a batch's new nodes, then its sequences that are not done; how many sequences and edges these are."""
    commits = commits_of(nodes, measured)
    merge_features(store, nodes.unseen(measured.blocks))
    store.commit_sequences(commits)
    return len(commits), sum(len(c.edges) for c in commits)


def merge_features(store: GraphStore, new: pl.DataFrame) -> None:
    """Write nodes as `NodeTable` gives them."""
    # Features are named later, by people or by their contexts: their label is not touched here.
    own_name = pl.col("kind") != "feature"
    for rows in (new.filter(~own_name).drop("label"), new.filter(own_name)):
        if len(rows):
            store.merge_nodes("Feature", rows)


def commits_of(nodes: "NodeTable", measured: Measured) -> list[SequenceCommit]:
    """What is to be committed of a batch: its sequences that are not done, with their edges and marks."""
    frame = nodes.edges(measured.blocks)
    by_sequence = dict(frame.partition_by("sequence", as_dict=True, include_key=False)) if len(frame) else {}
    empty = frame.drop("sequence").clear()
    commits = []
    for i, pair in enumerate(measured.batch.pairs):
        if pair.key in measured.done:
            continue
        edges = by_sequence.get((i,), empty)
        mark = {"status": "done", "n_edges": len(edges), "metric_clean": measured.clean[i], "metric_corrupt": measured.corrupt[i]}
        commits.append(SequenceCommit(nodes.plan.run, pair.key, edges, mark))
    return commits


class Writer:
    """The thread that writes; what it raises is raised again where the next batch is handed over, or at the end."""

    def __init__(self, store: GraphStore, plan: "Plan", tracker: Tracker) -> None:
        self.store, self.tracker = store, tracker
        self._nodes = NodeTable(plan)
        self._queue: queue.Queue[Measured | None] = queue.Queue(maxsize=QUEUE_BATCHES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="featlas-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, measured: Measured) -> None:
        """Hand a batch over; waits while the queue is full."""
        while self._error is None:
            try:
                self._queue.put(measured, timeout=0.2)
                return
            except queue.Full:
                continue
        self._raise()

    def close(self) -> None:
        """Wait until everything is written, also where one is asked to stop meanwhile: the thread must not outlive its store."""
        told, interrupt = False, None
        while self._thread.is_alive():
            try:
                if not told:
                    self._queue.put(None, timeout=0.2)
                    told = True
                self._thread.join(0.2)
            except queue.Full:
                continue
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
        if self._error is not None:
            self._raise()

    def _raise(self) -> None:
        error = self._error
        assert error is not None
        # A known error keeps its own sentence and exit code; anything else is wrapped so that its traceback is kept as the cause.
        if isinstance(error, FeatlasError):
            raise error
        raise WriterFailed(f"writing to the graph failed: {error}") from error

    def _work(self) -> None:
        try:
            while (measured := self._queue.get()) is not None:
                self._write(measured)
        except BaseException as error:  # noqa: BLE001 - carried over to the computing thread, which raises it
            self._error = error

    def _write(self, measured: Measured) -> None:
        self.tracker.add(*commit_batch(self.store, self._nodes, measured))


class NodeTable:
    """Keys and properties of the run's nodes by their number: site offset + feature index, made on demand, vectorised."""

    def __init__(self, plan: "Plan") -> None:
        self.plan = plan
        sites = list(plan.dictionaries)
        self._offsets: list[int] = []
        frames, offset = [], 0
        for site in sites:
            frames.append(site_nodes(plan.model.key, plan.dictionaries[site], site))
            self._offsets.append(offset)
            offset += len(frames[-1])
        self._offsets.append(offset)  # the output comes last, as `y` does in the graph
        frames.append(self._output_frame())
        self._frame = pl.concat(frames)
        self._seen = torch.zeros(len(self._frame), dtype=torch.bool)
        self._offset_of = torch.tensor(self._offsets)

    def _output_frame(self) -> pl.DataFrame:
        model, target = self.plan.model, self.plan.target
        label = target.name.replace("_", " ") if isinstance(target, LogitTarget) else target.name
        row = {
            "key": output_key(model.key, target.key), "model": model.key, "dictionary": "-", "site": OUTPUT.name, "layer": OUTPUT.layer,
            "kind": "output", "index": -1, "label": label,
        }  # fmt: skip
        return pl.DataFrame([row], schema=self._schema())

    @staticmethod
    def _schema() -> dict[str, Any]:
        text = dict.fromkeys(("key", "model", "dictionary", "site"), pl.String)
        return {**text, "layer": pl.Int64, "kind": pl.String, "index": pl.Int64, "label": pl.String}

    def _numbers(self, block: EdgeBlock) -> tuple[torch.Tensor, torch.Tensor]:
        src = self._offset_of[torch.from_numpy(block.src_site)] + torch.from_numpy(block.src_index)
        dest = self._offset_of[torch.from_numpy(block.dest_site)] + torch.from_numpy(block.dest_index)
        return src, dest

    def edges(self, blocks: Sequence[EdgeBlock]) -> pl.DataFrame:
        """The blocks as rows: sequence (place in the batch), source and target keys, positions, weight."""
        keys = self._frame["key"]
        frames = []
        for block in blocks:
            src, dest = self._numbers(block)
            frames.append(
                pl.DataFrame(
                    {
                        "sequence": block.sequence,
                        "source": keys.gather(src.numpy()),
                        "target": keys.gather(dest.numpy()),
                        "src_pos": block.src_pos,
                        "dest_pos": block.dest_pos,
                        "weight": block.weight,
                    }
                )
            )
        numbers = dict.fromkeys(("src_pos", "dest_pos"), pl.Int64)
        schema = {"sequence": pl.Int64, "source": pl.String, "target": pl.String, **numbers, "weight": pl.Float64}
        return pl.concat(frames) if frames else pl.DataFrame(schema=schema)

    def unseen(self, blocks: Sequence[EdgeBlock]) -> pl.DataFrame:
        """Nodes that occur in the blocks and in none before, ready to be merged."""
        return self.unseen_of(self.touched(blocks))

    def touched(self, blocks: Sequence[EdgeBlock]) -> np.ndarray:
        """The numbers of the nodes that occur in the blocks, ascending."""
        touched = torch.zeros_like(self._seen)
        for block in blocks:
            for numbers in self._numbers(block):
                touched[numbers] = True
        return touched.nonzero().flatten().numpy()

    def unseen_of(self, numbers: np.ndarray) -> pl.DataFrame:
        """Of the nodes of these numbers those that were in none before, ready to be merged."""
        seen = self._seen.numpy()  # the same memory; numpy takes numbers that a worker sent, which may not be written to
        new = numbers[~seen[numbers]]
        seen[numbers] = True
        return self._frame[new]
