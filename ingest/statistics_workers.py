"""Statistics by several workers, or by several jobs of a batch system: shards are measured apart and merged in their order.

1. The driver plans the run, cuts it into shards and writes their number down (`statistics_shards`).
2. Each worker makes model, dictionaries and texts from the same names and measures one shard after the other into the shard's folder.
3. Whenever the shards that come next are there the driver merges them; once the first tokens are merged it tells the live nodes to all.
4. A worker that dies leaves its shard's last commit, and another goes on from there; a driver that dies leaves the finished shards.

What is merged is what one process has after so many sequences. The result differs from the single pass' in the last bits alone, and not at all by
what died or came first. Another number of workers has other shares of cores and memory, by which sums are rounded: it differs in last bits, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from ..errors import UserError
from ..model.baselines import NodeMoments
from ..model.beginning import with_beginning
from ..model.dictionaries import Dictionary
from ..model.dictionary_sources import load_dictionaries
from ..model.loading import LoadedModel, load_model
from ..model.sites import Site, parse_site
from ..model.tasks import load_task
from ..queries.statistics import NoSuchRun, NotAStatisticsStore, RunRecord, StatisticsStore, StatisticsStoreHeld
from .cluster import RaySession, run_shards, worker_device
from .corpora import Corpus, pair_corpus, text_corpus
from .effective import EdgeSettings
from .statistics import Measurement, Pass, Progress, activations, attributions, measure_into, shard_folder, write_manifest
from .statistics_options import LEAST_MEMORY, StatisticsOptions
from .statistics_shards import LOCK_SECONDS, BadShards, BatchReader, Shard, ShardFolder, default_shards

HEAD_SECONDS = 120.0
"""How long a worker waits for the live nodes before it measures the first tokens itself."""


class WorkerDiffers(UserError):
    """A worker, asked for the same, has something else."""


@dataclass(frozen=True, kw_only=True)
class StatisticsJob:
    """What is measured, by names alone, so that every worker can make it: the words of `featlas ingest statistics`.

    corpus or task: one of them. clean_only and donor_seed: see `pair_corpus`. settings, means, statistics_run: of attributions.
    """

    model: str
    dictionaries: str
    options: StatisticsOptions
    corpus: str | None = None
    task: str | None = None
    limit: int | None = None
    sites: tuple[str, ...] | None = None
    bos: bool | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    skip_invalid: bool = False
    basis: str = "activation"
    donor_seed: int | None = None
    settings: EdgeSettings = field(default_factory=EdgeSettings)
    means: Mapping[Site, NodeMoments] | None = None
    statistics_run: str | None = None

    def measurement(self) -> Measurement:
        """The measurement, made here; its corpus is read as it is measured, and not counted before."""
        model = load_model(self.model, device=self.device, dtype=self.dtype)
        sites = None if self.sites is None else [parse_site(name) for name in self.sites]
        dictionaries = load_dictionaries(self.dictionaries, model, sites=sites, device=self.device, dtype=self.dtype)
        model = with_beginning(model, dictionaries, self.bos)
        if self.corpus is not None:
            corpus = text_corpus(self.corpus, model.tokenizer, self.options, max_sequences=self.limit, counted=False)
        else:
            pairs = load_task(str(self.task), model.tokenizer, n=self.limit or 100, seed=self.seed, skip_invalid=self.skip_invalid)
            corpus = pair_corpus(
                str(self.task), pairs, model.tokenizer, self.options, clean_only=self.basis == "attribution", donor_seed=self.donor_seed,
                device=model.device, counted=False,
            )  # fmt: skip
        return self.of(model, dictionaries, corpus)

    def of(self, model: LoadedModel, dictionaries: Mapping[Site, Dictionary], corpus: Corpus) -> Measurement:
        """The measurement of what is loaded."""
        if self.basis == "attribution":
            return attributions(model, dictionaries, corpus, self.options, self.settings, means=self.means, statistics_run=self.statistics_run)
        return activations(model, dictionaries, corpus, self.options, basis=self.basis)

    def anywhere(self) -> "StatisticsJob":
        """The same, with paths that are true in any folder; a name without a slash may be of something that comes with featlas."""
        true = lambda name: str(Path(name).absolute()) if "/" in name and Path(name).exists() else name
        corpus = str(Path(self.corpus).absolute()) if self.corpus is not None and Path(self.corpus).exists() else self.corpus
        return replace(self, model=true(self.model), dictionaries=true(self.dictionaries), corpus=corpus, task=self.task and true(self.task))


@dataclass(frozen=True)
class Identity:
    """What driver and workers must agree in before shards of both may be merged."""

    version: str
    model: str
    dictionaries: tuple[tuple[str, str], ...]

    @staticmethod
    def of(measurement: Measurement) -> "Identity":
        dictionaries = tuple((site.name, dictionary.id) for site, dictionary in measurement.dictionaries.items())
        return Identity(version("featlas"), measurement.model.key, dictionaries)

    def check(self, own: "Identity") -> None:
        """Raise `WorkerDiffers` with the first thing in which a worker's own differs."""
        for said, here, there in (
            ("featlas", self.version, own.version), ("model", self.model, own.model), ("dictionaries", self.dictionaries, own.dictionaries)
        ):  # fmt: skip
            if here != there:
                raise WorkerDiffers(f"a worker's {said} is {there!r}, the driver's {here!r}: all machines need the same")


# -- by workers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """What a worker says of a shard: its tokens, and whether it was measured (or found)."""

    tokens: int
    measured: bool


class StatisticsWorker:
    """Measures shards in a worker's process. memory: bytes for products, of this worker."""

    def __init__(self, job: StatisticsJob, folder: Path, run: str, expected: Identity, memory: int) -> None:
        self.measurement, self.memory = job.measurement(), memory
        expected.check(Identity.of(self.measurement))
        self.folder, self.reader = ShardFolder(folder, run), BatchReader(self.measurement.corpus.batches)

    def __call__(self, shard: Shard) -> Done:
        measured = measure_into(
            self.folder, shard, self.measurement, self.reader, memory=self.memory, wait_s=LOCK_SECONDS, head_wait_s=HEAD_SECONDS
        )
        return Done(self.folder.tokens(shard) or 0, measured)


def measure_by_workers(
    store: StatisticsStore,
    measurement: Measurement,
    job: StatisticsJob,
    session: RaySession,
    *,
    n_shards: int | None = None,
    progress: Progress | None = None,
    on_loss: Callable[[str], None] | None = None,
) -> RunRecord:
    """Measure into `store` by the workers of a Ray session; returns the finished run. Repeating the call changes nothing, or resumes.

    `measurement` is the driver's own making of `job`. n_shards: how many shards a new run is cut into; None is by its length. `on_loss` hears
    of workers that died. Raises what `run_measurement` and `run_shards` raise, and `WorkerDiffers`.
    """
    record = store.start_run(measurement.plan())
    if record.status == "done":
        return record
    pass_ = Pass(store, record, measurement)
    pass_.cut(n_shards or default_shards(len(measurement.corpus.marks)))
    pass_.begin_shards()
    missing = pass_.missing()
    there = measurement.corpus.n_sequences - sum(shard.stop - shard.first for shard in missing)
    reached = _Reached(there, pass_.records.tokens)

    def take(place: int, done: Done) -> None:
        reached.sequences += missing[place].stop - missing[place].first
        reached.tokens += done.tokens
        pass_.merge_ready()
        if progress is not None:
            progress(reached.sequences, measurement.corpus.n_sequences, reached.tokens)

    memory = max(job.options.memory // session.workers, LEAST_MEMORY)
    # The shards' folders are named in full: a worker may have been started elsewhere.
    theirs = replace(job.anywhere(), device=worker_device(job.device, gpu=session.gpu))
    make = partial(StatisticsWorker, theirs, pass_.folder.path.absolute(), record.run, Identity.of(measurement), memory)
    run_shards(session, make, missing, take, label=str, on_loss=on_loss)
    pass_.measure_shards()
    pass_.finish()
    write_manifest(store, measurement, record.run, {**session.described, "shards": len(pass_.shards)}, device=theirs.device)
    return store.run(record.run)


@dataclass
class _Reached:
    """Sequences that are measured, merged or not, and tokens of those that this call has seen."""

    sequences: int
    tokens: int


# -- one shard of a batch system's ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardReport:
    """One shard, measured here or found, and how many of the run's are there now; merged: the run was done before."""

    run: str
    shard: Shard
    measured: bool
    n_done: int
    merged: bool = False


def measure_one_shard(store: Path, measurement: Measurement, number: int, of: int, *, progress: Progress | None = None) -> ShardReport:
    """Measure shard `number` of `of` beside the statistics store at `store` (its file, or its atlas), which is only asked whether the run is done.

    Any number of processes may do so at once; `run_measurement` merges what they leave. Raises `BadShards` where the run was cut otherwise,
    `ShardInWork` where another process is at this shard.
    """
    run = measurement.plan().run
    folder = shard_folder(store, run)
    planned = measurement.shards(of)
    if not 1 <= number <= of:
        raise BadShards(f"--shard {number}/{of}: shards are numbered from 1 to {of}")
    shard = planned[number - 1]
    if _is_merged(store, run):
        return ShardReport(run, shard, False, of, merged=True)
    settled = folder.settle(of)
    if settled != of:
        raise BadShards(f"--shard {number}/{of}: run {run} was cut into {settled} shards; go on with those, or delete {folder.path}")
    told = None if progress is None else lambda done, tokens: progress(done - shard.first, shard.stop - shard.first, tokens)
    measured = measure_into(folder, shard, measurement, BatchReader(measurement.corpus.batches), progress=told)
    return ShardReport(run, shard, measured, sum(folder.tokens(other) is not None for other in planned))


def _is_merged(store: Path, run: str) -> bool:
    """Whether a run is done, as far as its store can be read now: its shards are gone then, and a job that is queued once more has nothing to do."""
    try:
        with StatisticsStore(store, read_only=True) as there:
            return there.run(run).status == "done"
    except (NotAStatisticsStore, NoSuchRun, StatisticsStoreHeld):
        return False
