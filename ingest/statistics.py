"""Statistics of every node of chosen sites over a corpus or a task: one pass, streamed into the statistics store.

1. A `Corpus` counts and hashes its sequences (no model needed), which gives the run its deterministic key.
2. The run is registered, or found: a finished one changes nothing, an interrupted one goes on after its last commit.
3. For each batch of sequences `measure` gives the sparse nodes of each site, by default its dictionaries' activations
   and error nodes; any other function with that result, such as one of node attributions, feeds the same records.
4. The records take the batch, those of each site (`moments`) and those of the sites together (`products`); every
   `commit_seconds` they are saved together with the number of sequences they hold.
5. At the end the records become the tables of the statistics store.

The first position of a text attends only to itself and has activations of its own kind, hundreds of times larger in
many models, so corpora leave out the first `skip_positions` (1) positions of each block. Tasks keep all (0).
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ..files import write_text
from ..model.baselines import Baseline, BaselineChoice, NodeMoments
from ..model.binding import Binding, bind, capture_sites
from ..model.dictionaries import Dictionary
from ..model.loading import LoadedModel
from ..model.sites import Site
from ..queries.statistics import RunRecord, SiteRecord, StatisticsStore, parts_folder
from . import machine
from .corpora import KEY_LENGTH, Corpus, EmptyCorpus, TokenBatch, pair_corpus, shuffled_corpus, text_corpus
from .effective import EdgeSettings, node_attributions, prepare
from .moments import SiteShape, SparseNodes, Window
from .products import Batch, Collected, JointMoments
from .ranges import check_baseline
from .records import JOINT, Records, StateDoesNotFit
from .statistics_options import BadStatisticsOptions, Between, StatisticsOptions
from .statistics_shards import LOCK_SECONDS, BatchReader, Head, Shard, ShardFolder, measure_shard, plan_shards
from .statistics_tables import joint_tables, site_tables, token_texts

__all__ = [
    "JOINT", "SHUFFLED", "BadStatisticsOptions", "Between", "Corpus", "EmptyCorpus", "Measure", "Measurement", "StateDoesNotFit",
    "StatisticsOptions", "TokenBatch", "pair_corpus", "shuffled_corpus", "text_corpus", "token_texts",
]  # fmt: skip

COMMIT_SHARE = 0.1
"""Share of the time that commits may take: they become rarer, down to one in 20 · `commit_seconds`, where each takes long."""

SHUFFLED = "shuffled activation"
"""Basis of a run whose sites were rotated against each other: what correlations come to by chance."""


Measure = Callable[[TokenBatch], Mapping[Site, SparseNodes]]
"""Nodes of each site of one batch; row r is position `first + r % n` of sequence `r // n`, n the number of positions measured."""

Progress = Callable[[int, int, int], None]
"""Called after each batch with (sequences done, sequences in all, tokens measured)."""


# -- 3. Nodes of a batch -------------------------------------------------------------------------------------


def activation_measure(binding: Binding, dictionaries: Mapping[Site, Dictionary], first_position: int) -> Measure:
    """The dictionaries' activations and error nodes, by one forward pass that stops after the last site needed."""
    bases = {site: dictionary.basis for site, dictionary in dictionaries.items()}

    @torch.no_grad()
    def measure(batch: TokenBatch) -> dict[Site, SparseNodes]:
        values = capture_sites(binding, batch.tokens.to(binding.device), bases)
        return {site: site_nodes(dictionary, values[site][:, first_position:]) for site, dictionary in dictionaries.items()}

    return measure


def attribution_measure(
    binding: Binding,
    dictionaries: Mapping[Site, Dictionary],
    settings: EdgeSettings,
    *,
    means: Mapping[Site, NodeMoments] | None = None,
    first_position: int = 0,
) -> Measure:
    """The attribution of each node of the clean sequences to the metric, gradient · (node − baseline), over the settings' steps.

    For a `pair_corpus` with `clean_only`, in a run of basis "attribution" whose arguments name metric and baseline.
    """

    def measure(batch: TokenBatch) -> dict[Site, SparseNodes]:
        if batch.pairs is None:
            raise BadStatisticsOptions("attributions need pairs of clean and corrupted sequences: give a task, not a text corpus")
        prepared = prepare(binding, dictionaries, batch.pairs, settings, means)
        return {
            site: SparseNodes.of_scalars(features[:, first_position:].flatten(0, 1), errors[:, first_position:].flatten())
            for site, features, errors in node_attributions(prepared)
        }

    return measure


def shuffled_measure(measure: Measure) -> Measure:
    """The nodes of site number k are those of the sequence k places further on in the batch (cyclically): no two sites see the same text.

    A run of this over a `shuffled_corpus` (basis `SHUFFLED`) tells how many correlations a test finds between sites where there are none but
    those by position: positions stay. Within a site nothing changes. Raises `BadStatisticsOptions` where a batch has fewer sequences than sites.
    """

    def shuffled(batch: TokenBatch) -> dict[Site, SparseNodes]:
        nodes, n = measure(batch), len(batch.tokens)
        if n < len(nodes):
            raise BadStatisticsOptions(f"{len(nodes)} sites cannot be shuffled in batches of {n}: raise the batch size, or take fewer sites")
        return {site: _rotated(found, k % n * (found.n_rows // n)) for k, (site, found) in enumerate(nodes.items())}

    return shuffled


def _rotated(nodes: SparseNodes, rows: int) -> SparseNodes:
    """The rows moved up by `rows`, cyclically."""
    row = (nodes.row - rows) % nodes.n_rows
    order = row.argsort(stable=True)
    vector = None if nodes.error_vector is None else nodes.error_vector.roll(-rows, 0)
    return SparseNodes(
        nodes.n_rows, nodes.d_sae, row[order], nodes.feature[order], nodes.value[order], nodes.error.roll(-rows, 0), vector
    )  # fmt: skip


def site_nodes(dictionary: Dictionary, value: Tensor) -> SparseNodes:
    """The nodes of a site's value (batch, pos, d_in): its features and x − decode(encode(x))."""
    x = value.reshape(-1, dictionary.d_in)  # (rows, d_in)
    nodes = dictionary.encode(x)  # (rows, d_sae)
    return SparseNodes.of(nodes, x - dictionary.decode(nodes))


# -- 2. and 4. The run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """What is measured of which texts, and how: everything that a pass needs beside the place where its results go.

    dictionaries: in topological order. arguments: what another basis than activations depends on; they enter the run's key.
    """

    model: LoadedModel
    binding: Binding
    dictionaries: Mapping[Site, Dictionary]
    corpus: Corpus
    options: StatisticsOptions
    basis: str
    measure: Measure
    arguments: Mapping[str, object]

    @property
    def device(self) -> torch.device:
        """Where sums are kept."""
        return self.model.device if self.model.device.type == "cuda" else torch.device("cpu")

    def plan(self) -> RunRecord:
        """The run's record, with its key."""
        return plan_run(self.model, self.dictionaries, self.corpus, self.options, basis=self.basis, arguments=self.arguments)

    def shards(self, n_shards: int) -> tuple[Shard, ...]:
        """The corpus cut into so many; raises `BadShards`."""
        return plan_shards(self.corpus.marks, n_shards, first_position=self.corpus.first_position, rule=self.options.rule)

    def records(self, folder: Path, *, memory: int | None = None, first: int = 0, head: Head | None = None, collected: bool = False) -> Records:
        """Empty records whose files go to `folder`. head: the live nodes, where they are known; collected: a shard's that come before."""
        shapes = {site: _shape(dictionary, self.options, self.basis) for site, dictionary in self.dictionaries.items()}
        widths, memory = {site.name: d.d_sae for site, d in self.dictionaries.items()}, memory or self.options.memory
        joint: JointMoments | Collected | None = None
        if self.options.rule is not None and collected:
            joint = Collected(widths, folder, memory=memory)
        elif self.options.rule is not None:
            pairs = site_pairs(self.binding, list(self.dictionaries), self.options.between)
            joint = JointMoments(
                widths, pairs, self.options.rule, folder, memory=memory, device=self.device,
                live=head.live if head else None, shifts=head.shifts if head else None,
            )  # fmt: skip
        return Records(shapes, joint, self.device, first=first)


def activations(
    model: LoadedModel,
    dictionaries: Mapping[Site, Dictionary],
    corpus: Corpus,
    options: StatisticsOptions,
    *,
    basis: str = "activation",
    measure: Measure | None = None,
    arguments: Mapping[str, object] | None = None,
) -> Measurement:
    """The measurement of activations, or of another `basis` by its `measure`, and by `arguments` what that depends on."""
    binding = bind(model)
    dictionaries = {site: dictionaries[site] for site in binding.graph(dictionaries).sites if site in dictionaries}
    if measure is None:
        if basis == SHUFFLED:
            corpus = shuffled_corpus(corpus, options.batch_size, options.seed)
            measure = shuffled_measure(activation_measure(binding, dictionaries, corpus.first_position))
            options = replace(options, n_contexts=0, by_position=False)  # its texts are not those of its nodes
        elif basis != "activation":
            raise BadStatisticsOptions(f"basis {basis!r} needs a function that measures it")
        else:
            measure = activation_measure(binding, dictionaries, corpus.first_position)
    return Measurement(model, binding, dictionaries, corpus, options, basis, measure, arguments or {})


def attributions(
    model: LoadedModel,
    dictionaries: Mapping[Site, Dictionary],
    corpus: Corpus,
    options: StatisticsOptions,
    settings: EdgeSettings,
    *,
    means: Mapping[Site, NodeMoments] | None = None,
    statistics_run: str | None = None,
) -> Measurement:
    """The measurement of the nodes' attributions to `settings.metric`; see `measure_attributions`."""
    measure = attribution_measure(bind(model), dictionaries, settings, means=means, first_position=corpus.first_position)
    arguments = attribution_arguments(settings, donor_seed=corpus.donor_seed, statistics_run=statistics_run)
    return activations(model, dictionaries, corpus, options, basis="attribution", measure=measure, arguments=arguments)


def measure_statistics(
    store: StatisticsStore,
    model: LoadedModel,
    dictionaries: Mapping[Site, Dictionary],
    corpus: Corpus,
    options: StatisticsOptions,
    *,
    basis: str = "activation",
    measure: Measure | None = None,
    arguments: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> RunRecord:
    """Measure a corpus into `store`; returns the finished run. Repeating the call changes nothing, or resumes.

    For another basis than "activation" give `measure`, and in `arguments` what it depends on (metric, baseline, …), which enters the run's key.
    Raises `NotFinite` naming the site and the sequences, and the errors of the store.
    """
    return run_measurement(
        store, activations(model, dictionaries, corpus, options, basis=basis, measure=measure, arguments=arguments), progress=progress
    )


def run_measurement(store: StatisticsStore, measurement: Measurement, *, progress: Progress | None = None) -> RunRecord:
    """Measure into `store` what is not measured: in one pass, or where the run was cut into shards those that are missing."""
    record = store.start_run(measurement.plan())
    if record.status == "done":
        shutil.rmtree(store.parts(record.run), ignore_errors=True)
        return record
    pass_ = Pass(store, record, measurement, progress)
    if pass_.shards:
        pass_.measure_shards()
    else:
        pass_.measure_until(record.total_sequences)
    pass_.finish()
    write_manifest(store, measurement, record.run)
    return store.run(record.run)


def write_manifest(
    store: StatisticsStore, measurement: Measurement, run: str, workers: Mapping[str, object] | None = None, *, device: str | None = None
) -> None:
    """`runs/statistics/<key>.json` beside the store: by which versions and on what machine a run was measured, and if its bits would come again.

    workers: what the session says of them, where there were several; device: the workers', where the measurement's own is another.
    """
    manifest = {
        "run": run, "written": datetime.now(UTC).isoformat(timespec="seconds"), "model": measurement.model.key,
        "versions": {name: version(name) for name in ("featlas", "torch", "transformers", "sae-lens", "duckdb", "polars", "numpy")},
        **machine.described(device or str(measurement.model.device)), "memory": measurement.options.memory, "workers": workers,
    }  # fmt: skip
    folder = store.path.parent / "runs" / "statistics"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{run}.json", json.dumps(manifest, indent=2) + "\n")


def site_pairs(binding: Binding, sites: Sequence[Site], between: Between) -> list[tuple[str, str]]:
    """The pairs of sites whose products are kept: each with itself, then the pairs asked for, in topological order."""
    found = [(site, site) for site in sites]
    if between is Between.ALL:
        found += combinations(sites, 2)
    elif between is Between.ADJACENT:
        graph = binding.graph(sites)
        found += [(parent, site) for site in sites for parent in graph.parents(site)]
    return [(first.name, second.name) for first, second in found]


def measure_attributions(
    store: StatisticsStore,
    model: LoadedModel,
    dictionaries: Mapping[Site, Dictionary],
    corpus: Corpus,
    options: StatisticsOptions,
    settings: EdgeSettings,
    *,
    means: Mapping[Site, NodeMoments] | None = None,
    statistics_run: str | None = None,
    progress: Progress | None = None,
) -> RunRecord:
    """`measure_statistics` over the nodes' attributions to `settings.metric`; `corpus` is a `pair_corpus` with `clean_only`.

    `means` and the `statistics_run` that they come from are for the mean and noise baselines; the resampled one wants a corpus with donors.
    """
    measurement = attributions(model, dictionaries, corpus, options, settings, means=means, statistics_run=statistics_run)
    return run_measurement(store, measurement, progress=progress)


def attribution_arguments(settings: EdgeSettings, *, donor_seed: int | None, statistics_run: str | None) -> dict[str, object]:
    """What attributions depend on beside the texts and the model, JSON-able: enters the keys of runs of them."""
    arguments: dict[str, object] = {"metric": str(settings.metric), "node_baseline": str(settings.baseline), "statistics_run": statistics_run}
    if settings.steps != 1:
        arguments["steps"] = settings.steps
    if settings.baseline is Baseline.RESAMPLE:
        arguments["donor_seed"] = donor_seed
    return arguments | {name: value for name, value in settings.identity.items() if name in ("per_position", "noise_scale", "noise_seed")}


def node_means(
    store: StatisticsStore, run: str | None, model: LoadedModel, dictionaries: Mapping[Site, Dictionary], choice: BaselineChoice | None = None
) -> dict[Site, NodeMoments]:
    """Means and deviations of the nodes of `dictionaries`' sites over the corpus of a run, for the baseline of `choice`, mean unless given.

    The run by its key or the beginning of it.

    Raises a `UserError` where no run is named, the run measured another model or dictionary, or not what the choice needs.
    """
    choice = choice or BaselineChoice(Baseline.MEAN)
    check_baseline(choice.baseline.value, run, per_position=choice.per_position)
    key = store.find_run(run).run
    found = {site: store.baseline_means(key, site.name, dictionary.id, model=model.key) for site, dictionary in dictionaries.items()}
    moments = {site: NodeMoments.of(**vars(baseline)) for site, baseline in found.items()}
    for site, dictionary in dictionaries.items():
        choice.check_moments(site, dictionary, moments[site])
    return moments


def plan_run(
    model: LoadedModel,
    dictionaries: Mapping[Site, Dictionary],
    corpus: Corpus,
    options: StatisticsOptions,
    *,
    basis: str = "activation",
    arguments: Mapping[str, object] | None = None,
) -> RunRecord:
    """The run's record with its key: a hash of model, precision, dictionaries, corpus, basis and options."""
    described: dict[str, object] = {**asdict(options), "skip_positions": corpus.first_position, **(arguments or {})}
    del described["commit_seconds"], described["seed"], described["memory"]
    if options.between is Between.NONE:
        del described["between"]  # runs from before there was a choice keep their keys
    described["dtype"] = str(model.dtype).removeprefix("torch.")
    sites = tuple(SiteRecord(site.name, site.layer, d.id, d.d_in, d.d_sae) for site, d in dictionaries.items())
    identity = {"model": model.key, "sites": [asdict(site) for site in sites], "corpus": corpus.hash, "basis": basis, "options": described}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
    return RunRecord(key, model.key, corpus.name, corpus.hash, basis, sites, corpus.n_sequences, described, version("featlas"), options.seed)


def _shape(dictionary: Dictionary, options: StatisticsOptions, basis: str) -> SiteShape:
    return SiteShape(
        dictionary.d_in, dictionary.d_sae, options.n_contexts, options.before, options.after,
        by_position=options.by_position, basis_has_vectors=basis != "attribution",
    )  # fmt: skip


class Pass:
    """One pass over a corpus into a store, from the last commit on: in place, or by merging shards in their order."""

    def __init__(self, store: StatisticsStore, record: RunRecord, measurement: Measurement, progress: Progress | None = None) -> None:
        self.store, self.record, self.measurement, self.progress = store, record, measurement, progress
        self.options, self.corpus = measurement.options, measurement.corpus
        self.folder = shard_folder(store.path, record.run)
        n_shards = self.folder.n_shards()
        self.shards: tuple[Shard, ...] = () if n_shards is None else measurement.shards(n_shards)
        self.reader = BatchReader(self.corpus.batches)
        self.merged: list[Shard] = []  # since the last commit
        self.committed, self.wait = time.monotonic(), self.options.commit_seconds
        self.records = self._restored()

    def _restored(self) -> Records:
        """The records of the last commit, or empty ones."""
        saved, run = self.store.load_state(self.record.run), self.record.run
        if bool(saved) != (self.record.sequences > 0):
            held = f"{self.record.sequences} sequences and {len(saved)} saved parts"
            raise StateDoesNotFit(f"statistics run {run} has {held}: delete the run and repeat it")
        if not saved and not self.shards:
            shutil.rmtree(self.store.parts(run), ignore_errors=True)
        records = self.measurement.records(self.store.parts(run))
        if not saved:
            records.cleaned()
            return records
        try:
            records.restore(saved, self.record.sequences, self.record.tokens)
        except StateDoesNotFit as error:
            raise StateDoesNotFit(f"statistics run {run}: {error}: delete the run and repeat it") from None
        return records

    def cut(self, n_shards: int) -> None:
        """Cut the run into so many shards, unless it was cut already."""
        self.measurement.shards(n_shards)
        self.shards = self.measurement.shards(self.folder.settle(n_shards))
        self._settle_head()

    # -- in place --------------------------------------------------------------------------------------------

    def measure_until(self, stop: int) -> None:
        """Measure the sequences that come next, up to number `stop`, straight into the records."""
        for batch in self._remaining(stop):
            window = Window(batch.tokens.to(self.measurement.device), self.records.sequences, self.corpus.first_position)
            self.records.add(window, self.measurement.measure(batch))
            self._commit_in_time()
            self._report()

    def _remaining(self, stop: int) -> Iterator[TokenBatch]:
        """The batches after those that are in the records already."""
        passed, done = 0, self.records.sequences
        for batch in self.corpus.batches():
            if passed >= stop:
                return
            if passed >= done:
                yield batch
            elif passed + len(batch.tokens) > done:
                stopped = f"stopped at sequence {done}, inside a batch"
                raise StateDoesNotFit(f"statistics run {self.record.run} {stopped}: delete the run and repeat it")
            passed += len(batch.tokens)

    # -- by shards -------------------------------------------------------------------------------------------

    def measure_shards(self) -> None:
        """Merge all shards, in their order; those that are missing are measured here."""
        self.begin_shards()
        for shard in self.missing():
            # Workers of a driver that was killed may still be ending.
            measure_into(self.folder, shard, self.measurement, self.reader, wait_s=LOCK_SECONDS)
            self.merge_ready(shard.number)

    def begin_shards(self) -> None:
        """Where a single pass stopped inside a shard, measure the rest of it in place; then merge what is there."""
        for shard in self.shards:
            if shard.first < self.records.sequences < shard.stop:
                self.measure_until(shard.stop)
        self.merge_ready()

    def missing(self) -> list[Shard]:
        """The shards that are neither merged nor measured."""
        return [shard for shard in self._unmerged() if not self.folder.is_done(shard)]

    def _unmerged(self) -> list[Shard]:
        return [shard for shard in self.shards if shard.first >= self.records.sequences]

    def merge_ready(self, up_to: int | None = None) -> None:
        """Merge the shards that come next as far as they are measured (to number `up_to`): never one before those of lower number."""
        for shard in self._unmerged():
            if (up_to is not None and shard.number > up_to) or not self.folder.is_done(shard):
                break
            empty = self.measurement.records(
                self.folder.products(shard), memory=max(self.options.memory // 2, 1), first=shard.first, collected=shard.collected,
                head=None if shard.collected else self.folder.head(),
            )  # fmt: skip
            self.records.merge(self.folder.load(shard, empty))
            self.merged.append(shard)
            self._settle_head()
            self._commit_in_time()
            self._report()

    def _settle_head(self) -> None:
        """As soon as the live nodes are chosen, tell all who measure later shards."""
        joint = self.records.joint
        if not isinstance(joint, JointMoments) or joint.live is None or not joint.sums or not self.shards:
            return
        settled = self.folder.head() or self.folder.settle_head(joint.live, {site: sums.shift for site, sums in joint.sums.items()})
        if not all(np.array_equal(nodes, joint.live[site]) for site, nodes in settled.live.items()):
            raise StateDoesNotFit(
                f"the shards of statistics run {self.record.run} were measured with other live features (another --memory, or another kind of "
                f"machine): delete {self.folder.path} and measure them again"
            )

    # -- committing ------------------------------------------------------------------------------------------

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.records.sequences, self.corpus.n_sequences, self.records.tokens)

    def _commit_in_time(self) -> None:
        if time.monotonic() - self.committed < self.wait:
            return
        began = time.monotonic()
        self.commit()
        self.committed = time.monotonic()
        least = self.options.commit_seconds
        self.wait = max(least, min((self.committed - began) / COMMIT_SHARE, 20 * least))

    def commit(self) -> None:
        """Keep all that is in the records, in one step; shards that are in them are no longer needed."""
        self.store.save_state(self.record.run, self.records.sequences, self.records.tokens, self.records.save())
        self.records.cleaned()
        for shard in self.merged:
            self.folder.remove(shard)
        self.merged = []

    def finish(self) -> None:
        """Turn the records into the store's tables."""
        records, run = self.records, self.record.run
        frames: dict[str, Iterable[pl.DataFrame]] = {}
        live: Mapping[str, np.ndarray] = {}
        if isinstance(records.joint, JointMoments):
            records.joint.fold()
            live = records.joint.live or {}
            frames |= joint_tables(records.joint, {site.name: statistics.moments for site, statistics in records.sites.items()})
        parts: dict[str, list[pl.DataFrame]] = {}
        for site, statistics in records.sites.items():
            tokenizer = self.measurement.model.tokenizer
            tables = site_tables(self.record, self.record.site(site.name), statistics, live.get(site.name), self.corpus.keys, tokenizer)
            for table, frame in tables.items():
                parts.setdefault(table, []).append(frame)
        self.store.finish_run(run, records.sequences, records.tokens, {**parts, **frames})
        shutil.rmtree(self.store.parts(run), ignore_errors=True)


# -- shards --------------------------------------------------------------------------------------------------


def shard_folder(store: Path, run: str) -> ShardFolder:
    """Where the shards of a run are, beside the file of the statistics store, which need not be open."""
    return ShardFolder(parts_folder(store, run) / "shards", run)


def measure_into(
    folder: ShardFolder,
    shard: Shard,
    measurement: Measurement,
    reader: BatchReader,
    *,
    memory: int | None = None,
    wait_s: float = 0.0,
    head_wait_s: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Measure one shard into its folder, unless it is done; returns whether anything was measured.

    The live nodes that it needs are waited for `head_wait_s` seconds, then measured here too. Raises `ShardInWork` after `wait_s` seconds
    of waiting for another process that is at it.
    """
    head = None if shard.collected or measurement.options.rule is None else _head(folder, measurement, reader, head_wait_s)
    with folder.held(shard, wait_s):
        if folder.is_done(shard):
            return False
        products = folder.products(shard)
        records = measurement.records(products, memory=memory, first=shard.first, head=head, collected=shard.collected)
        measure_shard(
            folder, shard, records, reader, measurement.measure, first_position=measurement.corpus.first_position,
            commit_seconds=measurement.options.commit_seconds, progress=progress,
        )  # fmt: skip
    return True


def _head(folder: ShardFolder, measurement: Measurement, reader: BatchReader, wait_s: float) -> Head:
    """The live nodes as they were settled; else as the first tokens choose them, which are measured."""
    until = time.monotonic() + wait_s
    while (settled := folder.head()) is None and time.monotonic() < until:
        time.sleep(0.2)
    if settled is not None:
        return settled
    joint = measurement.records(folder.path).joint
    assert isinstance(joint, JointMoments)  # the caller has asked for products
    for batch in reader.batches():
        nodes = {site.name: found for site, found in measurement.measure(batch).items()}
        if joint.collect(Batch.of(nodes, joint.widths, batch.tokens.shape[1] - measurement.corpus.first_position)):
            break
    joint.begin()
    assert joint.live is not None  # as of now
    return folder.settle_head(joint.live, {site: sums.shift for site, sums in joint.sums.items()})
