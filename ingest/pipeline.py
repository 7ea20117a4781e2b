"""The edge-ingest job: sequences in, attribution edges out, into the graph store, resumable.

1. `plan`: model, dictionaries and pairs are loaded; the run's key is the hash of everything that determines its edges.
2. Batches of equal length are formed from *all* pairs, so that an interrupted run recomputes a half-done batch with the
   same companions and hence the same rounding (it goes on with the batch size that it began with); sequences whose mark is
   in the graph are not written again.
3. One thread computes, one writes; a bounded queue between them holds back whichever is faster. Or several workers compute (`edge_shards`).
4. A sequence's edges and its `ON_SEQUENCE` mark are one transaction.
5. `finish_run` derives `INFLUENCES` from the committed edges, in a fixed order.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import polars as pl

from ..files import write_text
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
from ..queries.import_sink import ImportSink
from ..queries.labels import restore_labels
from ..queries.runs import aggregate as aggregate
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore, open_graph
from . import machine
from .budget import sequence_bytes
from .closing import NothingToDo, close_run
from .cluster import check_workers
from .cost import Cost, expected_cost
from .effective import Baseline, EdgeSettings, Tally, attribute, prepare
from .preparation import of_target
from .ranges import check_baseline, check_numbers
from .statistics import node_means
from .writing import Measured, Progress, Tracker, Writer
from .writing import WriterFailed as WriterFailed

EDGES_PER_BLOCK = 250_000
"""Edges of a run that are held at once when `INFLUENCES` are derived; a block takes about 150 MB."""


MOST_SEQUENCES = 8
"""Sequences in a batch at most, unless asked for more: the engine's products are large enough by then."""


@dataclass(frozen=True)
class EdgeOptions:
    """What `featlas ingest edges` takes. `graph` None means the atlas' embedded graph, `import_files` a folder of import files in place of any graph.

    batch_size: sequences at a time; None is as many, up to `MOST_SEQUENCES`, as a quarter of the settings' memory holds.
    target: what the output is instead of the settings' metric, a feature or a probe (see `model.targets`). bos: whether prompts begin with
    a beginning-of-text token; None as the dictionaries were trained. workers, ray_address: processes that measure, on this machine or on the
    cluster there; each has the settings' memory, and a GPU where the device is one.
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
    workers: int = 1
    ray_address: str | None = None
    import_files: Path | None = None

    @property
    def donor_seed(self) -> int | None:
        """The seed of the sequences to resample from, for the baseline that does."""
        return self.seed if self.settings.baseline is Baseline.RESAMPLE else None


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
class Plan:
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
    note: Callable[[str], None] | None = None,
) -> RunSummary:
    """Measure the edges of every sequence of a task and write them; continues where an interrupted run stopped.

    `report` hears of every line of a task's file that is left out (`skip_invalid`), `announce` what the run will cost at most,
    `note` of workers that died and whose work is done again.

    Raises a `UserError` for options that cannot be met, before anything is written.
    """
    started = time.monotonic()
    several = options.workers != 1 or options.ray_address is not None
    if several:
        check_workers(options.ray_address, options.workers, device=options.device)
    plan = plan_run(replace(options, device="cpu") if several else options, report)
    plan = replace(plan, options=replace(plan.options, device=options.device))
    options.atlas.mkdir(parents=True, exist_ok=True)
    with _opened(options) as store:
        # A run that was begun goes on in the same batches, whatever memory is allowed now.
        plan = replace(plan, batch_size=runs.batch_size(store, plan.run) or plan.batch_size)
        _write_manifest(plan, None)
        _write_provenance(store, plan)
        done = runs.done_sequences(store, plan.run)
        job = Job(plan, store, done, Tracker(len(done), len(plan.pairs), progress, started), announce)
        if several:
            from .edge_shards import measure_by_workers

            workers = measure_by_workers(job, note).described
        else:
            workers = None
            _measure_here(job)
        n_influences = finish_run(store, plan.run)
        restore_labels(store, options.atlas)
    names = tuple(site.name for site in plan.dictionaries)
    summary = RunSummary(plan.run, len(plan.pairs), len(done), job.tracker.edges, n_influences, time.monotonic() - started, names, job.tally)
    _write_manifest(plan, summary, workers)
    return summary


def _opened(options: EdgeOptions) -> GraphStore:
    """The graph, or the folder of import files, that the run goes into, for writing."""
    if options.import_files is not None:
        return ImportSink(options.import_files)
    return open_graph(options.graph or options.atlas)


@dataclass
class Job:
    """What is to be measured, and where it goes."""

    plan: Plan
    store: GraphStore
    done: frozenset[str]
    tracker: Tracker
    announce: Callable[[Cost], None] | None
    tally: Tally = field(default_factory=Tally)

    def say_cost(self, cost: Cost) -> None:
        """Announce the whole run's cost, from that of its first batch; once."""
        if self.announce is not None:
            self.announce(cost.of(len(self.plan.pairs) - len(self.done)))
            self.announce = None

    def is_done(self, batch: PairBatch) -> bool:
        """Whether nothing of a batch is left to do."""
        return all(pair.key in self.done for pair in batch.pairs)


def _measure_here(job: Job) -> None:
    """Measure the job's batches in this process, a thread beside it writing."""
    plan = job.plan
    with Writer(job.store, plan, job.tracker) as writer:
        for batch in plan.batches():
            if job.is_done(batch):
                continue
            prepared = prepare(plan.binding, plan.dictionaries, batch, plan.options.settings, plan.means, plan.target)
            if job.announce is not None:
                job.say_cost(expected_cost(prepared))
            blocks = list(attribute(prepared))
            job.tally.add(prepared.tally)
            writer.put(Measured(batch, prepared.clean_metric.tolist(), prepared.corrupt_metric.tolist(), blocks, job.done))


def plan_run(options: EdgeOptions, report: Callable[[str, Refusal], None] | None = None) -> Plan:
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
    plan = Plan(options, model, binding, ordered, pairs, key, _means(options, model, ordered), graph, target, size)
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


def _write_provenance(store: GraphStore, plan: Plan) -> None:
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


def finish_run(store: GraphStore, run: str) -> int:
    """Derive `INFLUENCES` from the run's committed edges, as `close_run` does; returns their number."""
    return close_run(store, run, EDGES_PER_BLOCK)


def _write_manifest(plan: Plan, summary: RunSummary | None, workers: dict[str, object] | None = None) -> None:
    """`runs/<key>.json` in the atlas: what is run and where, and at the end what came of it; no secrets, no addresses.

    workers: what `Workforce.described` says, where there were several.
    """
    folder = plan.options.atlas / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    options = {**asdict(plan.options), "graph": "server" if plan.options.graph else "embedded", "atlas": str(plan.options.atlas)}
    options["ray_address"] = None if plan.options.ray_address is None else "a cluster"
    packages = ("featlas", "torch", "transformers", "nnsight", "sae-lens", "ladybug", "neo4j", "polars", "numpy", *(["ray"] if workers else []))
    manifest = {
        "run": plan.run,
        "status": "running" if summary is None else "done",
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": options,
        "model": plan.model.key,
        "dictionaries": {site.name: dictionary.id for site, dictionary in plan.dictionaries.items()},
        "summary": None if summary is None else asdict(summary),
        "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
        **machine.described(plan.options.device),
        "workers": workers,
    }
    write_text(folder / f"{plan.run}.json", json.dumps(manifest, indent=2, default=str) + "\n")
