"""The edge-ingest job by several workers: each measures batches of the plan; the graph comes out as by one.

1. The driver has planned the run, and opened the graph; each worker makes the same plan from the same options, and both compare their keys.
2. A shard is one batch of the plan, with all its companions, so that a sequence is rounded as in a run by one process.
3. Where the graph is a file, which one process writes, edges come back as Arrow tables of numbers and the driver's writer commits them. On a
   server each worker commits its own batches, and only their counts come back. Into a folder of import files on this machine each worker writes
   its own parts, and the driver marks their sequences in the ledger.
4. What a dead worker had committed is in the graph and not written again: a sequence goes in whole, once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from importlib import metadata

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from ..errors import UserError
from ..model.tasks import PairBatch
from ..queries.import_sink import ImportSink, Part, write_batch
from ..queries.store import SequenceCommit, open_graph
from .cluster import RaySession, ray_session, run_shards, worker_device
from .cost import Cost, expected_cost
from .effective import EdgeBlock, Tally, attribute, prepare
from .pipeline import EdgeOptions, Job, Plan, plan_run
from .writing import Measured, NodeTable, Writer, commit_batch, commits_of, merge_features

# What a number of a block needs at most, half of what it has while it is computed.
_TYPES = {
    "sequence": np.int32, "src_site": np.int16, "src_index": np.int32, "src_pos": np.int32, "dest_site": np.int16, "dest_index": np.int32,
    "dest_pos": np.int32, "weight": np.float64,
}  # fmt: skip


class WorkerDiffers(UserError):
    """A worker, asked for the same, has something else."""


@dataclass(frozen=True)
class Identity:
    """What driver and workers must agree in before they may fill one graph."""

    version: str
    model: str
    dictionaries: tuple[tuple[str, str], ...]
    run: str

    @staticmethod
    def of(plan: Plan) -> "Identity":
        dictionaries = tuple((site.name, dictionary.id) for site, dictionary in plan.dictionaries.items())
        return Identity(metadata.version("featlas"), plan.model.key, dictionaries, plan.run)

    def check(self, own: "Identity") -> None:
        """Raise `WorkerDiffers` with the first thing in which a worker's own differs, the most telling first."""
        names = {"version": "featlas", "model": "the model", "dictionaries": "the dictionaries", "run": "the run's key"}
        for name, said in names.items():
            here, there = getattr(self, name), getattr(own, name)
            if here != there:
                if name == "dictionaries":
                    here, there = sorted(set(here) - set(there)), sorted(set(there) - set(here))
                raise WorkerDiffers(
                    f"a worker has other things under the same names: {said} is {there!r} there and {here!r} here. All machines need the same "
                    "featlas, model, dictionaries, task files and atlas, at the same paths"
                )


@dataclass(frozen=True)
class EdgeShard:
    """One batch of the plan: its number, its first sequence and how many it has. done: those that are in the graph already."""

    batch: int
    first: str
    n: int
    done: frozenset[str]

    @staticmethod
    def of(number: int, batch: PairBatch, done: frozenset[str]) -> "EdgeShard":
        keys = [pair.key for pair in batch.pairs]
        return EdgeShard(number, keys[0], len(keys), done.intersection(keys))

    @property
    def label(self) -> str:
        more = "" if self.n == 1 else f" and the {self.n - 1} after it"
        return f"batch {self.batch} (sequence {self.first}{more})"


@dataclass(frozen=True)
class ShardEdges:
    """What a worker makes of a shard. table: the edges' numbers; None where the worker has written them. n_edges: of sequences not done before.

    written: of a worker that wrote import files, what of them the driver is to mark.
    """

    clean: list[float]
    corrupt: list[float]
    table: pa.Table | None
    n_edges: int
    tally: Tally
    cost: Cost | None
    device: str
    written: "WrittenShard | None" = None


@dataclass(frozen=True)
class WrittenShard:
    """A shard in import files. part: None where it has no edges; nodes: numbers of the edges' ends; marks: of each sequence that was not done."""

    part: Part | None
    nodes: np.ndarray
    marks: dict[str, Mapping[str, object]]


class WrittenBy(StrEnum):
    """Who writes what workers measure."""

    DRIVER = "driver"
    """The driver's one writer: into a file, or into a folder that workers elsewhere may not have."""
    WORKERS = "workers"
    """Each worker commits to a server."""
    PARTS = "parts"
    """Each worker writes parts of import files, which the driver marks."""

    @staticmethod
    def of(options: EdgeOptions) -> "WrittenBy":
        if options.import_files is not None:
            return WrittenBy.PARTS if options.ray_address is None else WrittenBy.DRIVER
        return WrittenBy.DRIVER if options.graph is None else WrittenBy.WORKERS


# -- the worker's side ---------------------------------------------------------------------------------------


class EdgeWorker:
    """Lives in a worker's process: the plan, and the graph where it is a server's."""

    def __init__(self, options: EdgeOptions, identity: Identity, by: WrittenBy) -> None:
        self.plan = plan_run(options)
        identity.check(Identity.of(self.plan))
        self.batches = list(self.plan.batches())
        self.nodes = NodeTable(self.plan)
        self.store = open_graph(options.graph) if by is WrittenBy.WORKERS and options.graph is not None else None
        self.folder = options.import_files if by is WrittenBy.PARTS else None
        device = self.plan.model.device
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        self.told_cost = False

    def __call__(self, shard: EdgeShard) -> ShardEdges:
        """Measure a batch, and commit it where there is a server."""
        plan, batch = self.plan, self.batches[shard.batch]
        prepared = prepare(plan.binding, plan.dictionaries, batch, plan.options.settings, plan.means, plan.target)
        cost = None if self.told_cost else expected_cost(prepared)
        self.told_cost = True
        blocks = list(attribute(prepared))
        measured = Measured(batch, prepared.clean_metric.tolist(), prepared.corrupt_metric.tolist(), blocks, shard.done)
        table, n_edges, written = None, 0, None
        if self.folder is not None:
            commits = commits_of(self.nodes, measured)
            written = WrittenShard(write_batch(self.folder, commits), self.nodes.touched(blocks), {c.sequence: c.mark for c in commits})
            n_edges = sum(commit.edges.height for commit in commits)
        elif self.store is None:
            table = table_of(blocks)
        else:
            n_edges = commit_batch(self.store, self.nodes, measured)[1]
        return ShardEdges(measured.clean, measured.corrupt, table, n_edges, prepared.tally, cost, self.device, written)


def table_of(blocks: Sequence[EdgeBlock]) -> pa.Table:
    """The blocks' columns one after the other, in the narrowest types that hold them; no number is copied again on its way."""
    columns = {
        name: np.concatenate([getattr(block, name) for block in blocks]).astype(type_, copy=False) if blocks else np.empty(0, type_)
        for name, type_ in _TYPES.items()
    }
    return pa.table(columns)


def block_of(table: pa.Table) -> EdgeBlock:
    """One block of a table's edges."""
    wide = {name: np.float64 if name == "weight" else np.int64 for name in _TYPES}
    return EdgeBlock(**{name: table.column(name).to_numpy().astype(wide[name]) for name in _TYPES})


# -- the driver's side ---------------------------------------------------------------------------------------


@dataclass
class Workforce:
    """Who measured, for the manifest."""

    session: dict[str, object] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)
    lost: int = 0

    @property
    def described(self) -> dict[str, object]:
        return {**self.session, "devices": sorted(self.devices), "lost": self.lost}


def measure_by_workers(job: Job, note: Callable[[str], None] | None = None) -> Workforce:
    """Measure the job's sequences that are not done by its options' workers.

    note: hears that workers start, and of those that died. Raises what `cluster.ray_session` and `cluster.run_shards` raise, and `WorkerDiffers`.
    """
    options, force = job.plan.options, Workforce()
    batches = {i: batch for i, batch in enumerate(job.plan.batches()) if not job.is_done(batch)}
    shards = [EdgeShard.of(i, batch, job.done) for i, batch in batches.items()]
    if not shards:
        return force
    _release(job.plan)

    def lost(reason: str) -> None:
        force.lost += 1
        if note is not None:
            note(reason)

    by = WrittenBy.of(options)
    marker = PartMarker(job) if by is WrittenBy.PARTS else None
    if note is not None:
        note(f"starting {options.workers} workers; each loads the model, which takes longer than a few sequences do")
    with (
        Writer(job.store, job.plan, job.tracker) if by is WrittenBy.DRIVER else nullcontext() as writer,
        ray_session(options.ray_address, options.workers, device=options.device) as session,
    ):
        force.session = session.described
        make = partial(EdgeWorker, _of_worker(job.plan, session), Identity.of(job.plan), by)
        take = partial(_take, job, force, shards, batches, marker or writer)
        run_shards(session, make, shards, take, label=lambda shard: shard.label, on_loss=lost)
    return force


class PartMarker:
    """Marks in the ledger of a folder of import files what workers have written there."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.store, ImportSink)
        self.sink, self.tracker, self.run = job.store, job.tracker, job.plan.run
        self.nodes = NodeTable(job.plan)

    def put(self, written: WrittenShard) -> None:
        """The nodes first, then the marks: a part whose sequences have none is thrown away when the folder is opened again."""
        merge_features(self.sink, self.nodes.unseen_of(written.nodes))
        no_edges = pl.DataFrame(schema={"source": pl.String, "target": pl.String, "weight": pl.Float64})
        n = self.sink.commit_written([SequenceCommit(self.run, key, no_edges, mark) for key, mark in written.marks.items()], written.part)
        self.tracker.add(n, 0 if written.part is None else written.part.rows)


def _take(
    job: Job,
    force: Workforce,
    shards: Sequence[EdgeShard],
    batches: Mapping[int, PairBatch],
    writer: Writer | PartMarker | None,
    place: int,
    result: ShardEdges,
) -> None:
    """What the driver does with a shard's result."""
    shard = shards[place]
    force.devices.add(result.device)
    job.tally.add(result.tally)
    if result.cost is not None:
        job.say_cost(replace(result.cost, seconds=result.cost.seconds / min(job.plan.options.workers, len(shards))))
    if writer is None:
        job.tracker.add(shard.n - len(shard.done), result.n_edges)
    elif isinstance(writer, PartMarker):
        assert result.written is not None
        writer.put(result.written)
    else:
        assert result.table is not None
        writer.put(Measured(batches[shard.batch], result.clean, result.corrupt, [block_of(result.table)], shard.done))


def _of_worker(plan: Plan, session: RaySession) -> EdgeOptions:
    """The options by which a worker makes the same plan, in the same batches, on the device that it is given."""
    device = worker_device(plan.options.device, gpu=session.gpu)
    return replace(plan.options, batch_size=plan.batch_size, device=device, workers=1, ray_address=None)


def _release(plan: Plan) -> None:
    """The driver computes nothing: its weights make room for the workers'; shapes and names are left."""
    plan.model.module.to("meta")
