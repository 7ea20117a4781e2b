"""The edge-ingest job: sequences in, attribution edges out, into the graph store, resumable.

1. `plan`: model, dictionaries and pairs are loaded; the run's key is the hash of everything that determines its edges.
2. Batches of equal length are formed from *all* pairs, so that an interrupted run recomputes a half-done batch with the
   same companions and hence the same rounding (it goes on with the batch size that it began with); sequences whose mark is
   in the graph are not written again.
3. One thread computes, one writes; a bounded queue between them holds back whichever is faster.
4. A sequence's edges and its `ON_SEQUENCE` mark are one transaction.
5. `finish_run` derives `INFLUENCES` from the committed edges, in a fixed order.
"""

import hashlib
import json
import platform
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
import torch

from ..errors import FeatlasError
from ..model.baselines import NodeMoments
from ..model.beginning import adds_beginning, with_beginning
from ..model.binding import Binding, bind
from ..model.dictionaries import Dictionary
from ..model.dictionary_sources import load_dictionaries
from ..model.loading import LoadedModel, load_model
from ..model.sites import OUTPUT, Site, SiteGraph, parse_site
from ..model.targets import FeatureTarget, LogitTarget, Target, parse_target, target_site
from ..model.tasks import Pair, PairBatch, Refusal, batches, load_task
from ..queries import runs
from ..queries.labels import restore_labels
from ..queries.runs import aggregate as aggregate
from ..queries.schema import output_key
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore, SequenceCommit, open_graph
from .budget import sequence_bytes
from .closing import NothingToDo, close_run
from .cost import Cost, expected_cost
from .effective import Baseline, EdgeBlock, EdgeSettings, Tally, attribute, prepare
from .nodes import site_nodes
from .preparation import of_target
from .ranges import check_baseline, check_numbers
from .statistics import node_means

QUEUE_BATCHES = 1
"""Batches computed ahead of the writer before it holds the computation back."""

EDGES_PER_BLOCK = 250_000
"""Edges of a run that are held at once when `INFLUENCES` are derived; a block takes about 150 MB."""


MOST_SEQUENCES = 8
"""Sequences in a batch at most, unless asked for more: the engine's products are large enough by then."""


class WriterFailed(FeatlasError):
    """The writing thread stopped; its own error is the cause."""


@dataclass(frozen=True)
class EdgeOptions:
    """What `featlas ingest edges` takes. `graph` None means the atlas' embedded graph.

    batch_size: sequences at a time; None is as many, up to `MOST_SEQUENCES`, as a quarter of the settings' memory holds.
    target: what the output is instead of the settings' metric, a feature or a probe (see `model.targets`). bos: whether prompts begin with
    a beginning-of-text token; None as the dictionaries were trained.
    """

    model: str
    dictionaries: str
    task: str
    atlas: Path
    graph: str | None = None
    sites: tuple[str, ...] | None = None
    limit: int = 100
    seed: int = 0
    settings: EdgeSettings = field(default_factory=EdgeSettings)
    batch_size: int | None = None
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    skip_invalid: bool = False
    statistics_run: str | None = None
    target: str | None = None
    bos: bool | None = None

    @property
    def donor_seed(self) -> int | None:
        """The seed of the sequences to resample from, for the baseline that does."""
        return self.seed if self.settings.baseline is Baseline.RESAMPLE else None


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


@dataclass(frozen=True)
class RunSummary:
    """What a run came to. `n_edges` counts what this call wrote, the graph's total is on the `Run` node; `tally` is of this call too."""

    run: str
    n_sequences: int
    n_skipped: int
    n_edges: int
    n_influences: int
    seconds: float
    sites: tuple[str, ...]
    tally: Tally


@dataclass(frozen=True)
class _Plan:
    """Everything decided before the first batch is run."""

    options: EdgeOptions
    model: LoadedModel
    binding: Binding
    dictionaries: Mapping[Site, Dictionary]
    pairs: tuple[Pair, ...]
    run: str
    means: Mapping[Site, NodeMoments] | None
    graph: SiteGraph
    target: Target
    batch_size: int

    def batches(self) -> Iterator[PairBatch]:
        """All pairs in batches, with donors where the baseline needs them."""
        return batches(self.pairs, self.model.tokenizer, batch_size=self.batch_size, donor_seed=self.options.donor_seed)

    @property
    def method(self) -> str:
        return runs.ATTRIBUTION_PATCHING if self.options.settings.steps == 1 else runs.INTEGRATED_GRADIENTS


def ingest_edges(
    options: EdgeOptions,
    *,
    progress: Callable[[Progress], None] | None = None,
    report: Callable[[str, Refusal], None] | None = None,
    announce: Callable[[Cost], None] | None = None,
) -> RunSummary:
    """Measure the edges of every sequence of a task and write them; continues where an interrupted run stopped.

    `report` hears of every line of a task's file that is left out (`skip_invalid`), `announce` what the run will cost at most.

    Raises a `UserError` for options that cannot be met, before anything is written.
    """
    started = time.monotonic()
    plan = plan_run(options, report)
    options.atlas.mkdir(parents=True, exist_ok=True)
    with open_graph(options.graph or options.atlas) as store:
        # A run that was begun goes on in the same batches, whatever memory is allowed now.
        plan = replace(plan, batch_size=runs.batch_size(store, plan.run) or plan.batch_size)
        _write_manifest(plan, None)
        _write_provenance(store, plan)
        done = runs.done_sequences(store, plan.run)
        writer = _Writer(store, plan, len(done), progress, started)
        tally = Tally()
        try:
            for batch in plan.batches():
                if all(pair.key in done for pair in batch.pairs):
                    continue
                prepared = prepare(plan.binding, plan.dictionaries, batch, options.settings, plan.means, plan.target)
                if announce is not None:
                    announce(expected_cost(prepared).of(len(plan.pairs) - len(done)))
                    announce = None
                blocks = list(attribute(prepared))
                tally.add(prepared.tally)
                writer.put(_Measured(batch, prepared.clean_metric.tolist(), prepared.corrupt_metric.tolist(), blocks, done))
        finally:
            writer.close()
        n_influences = finish_run(store, plan.run)
        restore_labels(store, options.atlas)
    summary = RunSummary(
        plan.run, len(plan.pairs), len(done), writer.edges, n_influences, time.monotonic() - started, tuple(s.name for s in plan.dictionaries), tally
    )
    _write_manifest(plan, summary)
    return summary


def plan_run(options: EdgeOptions, report: Callable[[str, Refusal], None] | None = None) -> _Plan:
    """Load what the options name and fix the run's key."""
    # With a target of its own the settings' metric means nothing.
    (options.settings if options.target is None else replace(options.settings, metric=EdgeSettings().metric)).check()
    check_numbers(limit=options.limit, batch_size=options.batch_size)
    check_baseline(options.settings.baseline.value, options.statistics_run, per_position=options.settings.per_position)
    if options.settings.baseline.of_corpus:
        with StatisticsStore(options.atlas, read_only=True) as statistics:
            options = replace(options, statistics_run=statistics.find_run(options.statistics_run).run)
    model = load_model(options.model, revision=options.revision, device=options.device, dtype=options.dtype)
    dictionaries = load_dictionaries(options.dictionaries, model, sites=_sites(options), device=options.device, dtype=options.dtype)
    binding = bind(model)
    target = LogitTarget(options.settings.metric) if options.target is None else parse_target(options.target, dictionaries, binding)
    graph = SiteGraph.of(binding.n_layers, binding.parallel, dictionaries, target.site)
    ordered = {site: dictionaries[site] for site in graph.sites if site != OUTPUT}
    read = ordered | ({target.site: target.dictionary} if isinstance(target, FeatureTarget) else {})
    model = with_beginning(model, read, options.bos)
    loaded = load_task(options.task, model.tokenizer, n=options.limit, seed=options.seed, skip_invalid=options.skip_invalid, report=report)
    pairs = tuple(loaded[: options.limit])
    if not pairs:
        raise NothingToDo(f"task {options.task!r} has no sequence to run on")
    key = _run_key(options, model, ordered, pairs, target)
    size = options.batch_size or _batch_size(options.settings, binding, ordered, model, pairs)
    plan = _Plan(options, model, binding, ordered, pairs, key, _means(options, model, ordered), graph, target, size)
    if options.donor_seed is not None or target.site is not None:
        for batch in plan.batches():  # a sequence without a donor, or too short for the target, is said now
            target.position(batch.clean.shape[1])
    return plan


def _batch_size(settings: EdgeSettings, binding: Binding, dictionaries: Mapping[Site, Dictionary], model: LoadedModel, pairs: Sequence[Pair]) -> int:
    """How many sequences of the greatest length a quarter of the memory holds, one at least."""
    length = max(len(ids) for ids in model.tokenizer([pair.clean for pair in pairs])["input_ids"])
    widths = [dictionary.d_sae for dictionary in dictionaries.values()]
    per_sequence = sequence_bytes(binding, widths, settings.steps, length, dense=settings.baseline.of_corpus)
    return max(1, min(MOST_SEQUENCES, settings.memory // 4 // per_sequence))


def _sites(options: EdgeOptions) -> tuple[Site, ...] | None:
    """The sites whose dictionaries are loaded: those chosen and the target's; None for all that there are."""
    if options.sites is None:
        return None
    own = None if options.target is None else target_site(options.target)
    return tuple(dict.fromkeys([*map(parse_site, options.sites), *([own] if own else [])]))


def _run_key(
    options: EdgeOptions, model: LoadedModel, dictionaries: Mapping[Site, Dictionary], pairs: Sequence[Pair], target: Target
) -> str:
    """Hash of everything that determines the edges: not the device, the batch size or where they are stored."""
    identity = {
        "model": model.key,
        "dtype": options.dtype,
        "dictionaries": {site.name: dictionary.id for site, dictionary in dictionaries.items()},
        "settings": of_target(options.settings, target).identity,
        "target": target.identity(),
        "bos": adds_beginning(model.tokenizer),
        "donor_seed": options.donor_seed,
        "statistics_run": options.statistics_run if options.settings.baseline.of_corpus else None,
        "pairs": [pair.key for pair in pairs],
        # Another version may round, or decide, differently: its edges never mix with these.
        "version": metadata.version("featlas"),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _means(options: EdgeOptions, model: LoadedModel, dictionaries: Mapping[Site, Dictionary]) -> Mapping[Site, NodeMoments] | None:
    """The nodes' moments from the statistics run that the options name, for baselines that need them."""
    if not options.settings.baseline.of_corpus:
        return None
    with StatisticsStore(options.atlas, read_only=True) as statistics:
        return node_means(statistics, options.statistics_run, model, dictionaries, options.settings.choice)


def _write_provenance(store: GraphStore, plan: _Plan) -> None:
    """Model, run and sequence nodes; a run that was finished before stays as it is until it is finished again."""
    options, model, settings = plan.options, plan.model, plan.options.settings
    graph = plan.graph
    described = {name: getattr(model, name) for name in ("key", "name", "revision", "family", "n_layers", "d_model")}
    store.merge_nodes("Model", pl.DataFrame([described]))
    run = {
        "key": plan.run,
        "model": model.key,
        "dictionaries": json.dumps({site.name: dictionary.id for site, dictionary in plan.dictionaries.items()}),
        "task": options.task,
        "method": plan.method,
        "steps": settings.steps,
        "metric": plan.target.name,
        "baseline": settings.baseline.value,
        "threshold": settings.threshold,
        "max_edges": settings.max_edges,
        "aggregation": settings.positions.value,
        "status": runs.RUNNING,
        "sites": json.dumps([site.name for site in plan.dictionaries]),
        "seed": options.seed,
        "version": metadata.version("featlas"),
        "n_planned": len(plan.pairs),
        "settings": json.dumps(
            {
                "dtype": options.dtype, "limit": options.limit, "statistics_run": options.statistics_run, "batch_size": plan.batch_size,
                "bos": adds_beginning(model.tokenizer), "target": plan.target.identity(), "engine": of_target(settings, plan.target).identity,
                "roots": [site.name for site in graph.sites if site != OUTPUT and not graph.parents(site)],
            }
        ),
    }  # fmt: skip
    # Said once: the same run asked for in other words (another seed over the same file, say) stays the run that it was.
    if not runs.exists(store, plan.run):
        store.merge_nodes("Run", pl.DataFrame([run], schema_overrides={"max_edges": pl.Int64}))
    store.merge_edges("OF_MODEL", pl.DataFrame({"source": [plan.run], "target": [model.key]}))
    store.merge_nodes(
        "Sequence",
        pl.DataFrame(
            [{name: getattr(p, name) for name in ("key", "task", "clean", "corrupt", "answer", "wrong_answer")} for p in plan.pairs]
        ),
    )


@dataclass(frozen=True)
class _Measured:
    """One batch's edges, on their way to the writer."""

    batch: PairBatch
    clean: list[float]  # the metric on the clean sequences
    corrupt: list[float]
    blocks: list[EdgeBlock]
    done: frozenset[str]


class _Writer:
    """The thread that writes; what it raises is raised again where the next batch is handed over, or at the end."""

    def __init__(self, store: GraphStore, plan: _Plan, n_done: int, progress: Callable[[Progress], None] | None, started: float) -> None:
        self.store, self.plan, self.progress, self.started = store, plan, progress, started
        self.edges = 0
        self.n_done = n_done
        self._nodes = _NodeTable(plan)
        self._queue: queue.Queue[_Measured | None] = queue.Queue(maxsize=QUEUE_BATCHES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="featlas-writer", daemon=True)
        self._thread.start()

    def put(self, measured: _Measured) -> None:
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

    def _write(self, measured: _Measured) -> None:
        frame = self._nodes.edges(measured.blocks)
        new = self._nodes.unseen(measured.blocks)
        # Features are named later, by people or by their contexts: their label is not touched here.
        own_name = pl.col("kind") != "feature"
        for nodes in (new.filter(~own_name).drop("label"), new.filter(own_name)):
            if len(nodes):
                self.store.merge_nodes("Feature", nodes)
        by_sequence = dict(frame.partition_by("sequence", as_dict=True, include_key=False)) if len(frame) else {}
        empty = frame.drop("sequence").clear()
        commits = []
        for i, pair in enumerate(measured.batch.pairs):
            if pair.key in measured.done:
                continue
            edges = by_sequence.get((i,), empty)
            mark = {"status": "done", "n_edges": len(edges), "metric_clean": measured.clean[i], "metric_corrupt": measured.corrupt[i]}
            commits.append(SequenceCommit(self.plan.run, pair.key, edges, mark))
        self.store.commit_sequences(commits)
        self.edges += sum(len(c.edges) for c in commits)
        self.n_done += len(commits)
        if self.progress is not None:
            self.progress(Progress(self.n_done, len(self.plan.pairs), self.edges, time.monotonic() - self.started))


class _NodeTable:
    """Keys and properties of the run's nodes by their number: site offset + feature index, made on demand, vectorised."""

    def __init__(self, plan: _Plan) -> None:
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
        touched = torch.zeros_like(self._seen)
        for block in blocks:
            for numbers in self._numbers(block):
                touched[numbers] = True
        new = (touched & ~self._seen).nonzero().flatten()
        self._seen |= touched
        return self._frame[new.numpy()]


def finish_run(store: GraphStore, run: str) -> int:
    """Derive `INFLUENCES` from the run's committed edges, as `close_run` does; returns their number."""
    return close_run(store, run, EDGES_PER_BLOCK)


def _write_manifest(plan: _Plan, summary: RunSummary | None) -> None:
    """`runs/<key>.json` in the atlas: what is run and where, and at the end what came of it; no secrets, no addresses."""
    folder = plan.options.atlas / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    options = {**asdict(plan.options), "graph": "server" if plan.options.graph else "embedded", "atlas": str(plan.options.atlas)}
    packages = ("featlas", "torch", "transformers", "nnsight", "sae-lens", "ladybug", "neo4j", "polars", "numpy")
    manifest = {
        "run": plan.run,
        "status": "running" if summary is None else "done",
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": options,
        "model": plan.model.key,
        "dictionaries": {site.name: dictionary.id for site, dictionary in plan.dictionaries.items()},
        "summary": None if summary is None else asdict(summary),
        "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "device": str(plan.model.device),
        "threads": torch.get_num_threads(),
        # CPU kernels are deterministic for a given number of threads; CUDA's are not promised to be.
        "deterministic": plan.model.device.type == "cpu",
    }
    (folder / f"{plan.run}.json").write_text(json.dumps(manifest, indent=2, default=str) + "\n", encoding="utf-8")
