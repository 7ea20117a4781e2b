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
from enum import StrEnum
from importlib.metadata import version
from itertools import combinations, islice
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ..errors import FeatlasError, UserError
from ..model.baselines import Baseline, BaselineChoice, NodeMoments
from ..model.binding import Binding, bind, capture_sites
from ..model.corpus import read_texts, token_blocks
from ..model.dictionaries import Dictionary
from ..model.loading import LoadedModel
from ..model.sites import Site
from ..model.tasks import Pair, PairBatch
from ..model.tasks import batches as pair_batches
from ..queries.schema import feature_key
from ..queries.statistics import ERROR, RunRecord, SiteRecord, StatisticsStore
from .effective import EdgeSettings, node_attributions, prepare
from .moments import Contexts, LiveRule, Moments, NotFinite, SiteShape, SiteStatistics, SparseNodes, Window
from .products import LAGS, JointMoments, Tile, packed, unpacked
from .ranges import check_baseline
from .settings import DEFAULT_MEMORY

KEY_LENGTH = 24

LEAST_MEMORY = 64 * 1024**2
"""Less than this many bytes would not hold the products' own working space."""

COMMIT_SHARE = 0.1
"""Share of the time that commits may take: they become rarer, down to one in 20 · `commit_seconds`, where each takes long."""

JOINT = "second moments"
"""The part of a saved state that is of all sites together."""

SHUFFLED = "shuffled activation"
"""Basis of a run whose sites were rotated against each other: what correlations come to by chance."""


class BadStatisticsOptions(UserError):
    """An option of the statistics is out of its range."""


class EmptyCorpus(UserError):
    """The corpus has not even one sequence of the length asked for."""


class StateDoesNotFit(FeatlasError):
    """A saved state ends inside a batch, or is of other nodes: the file was changed from outside."""


class Between(StrEnum):
    """Which pairs of different sites products are kept of."""

    NONE = "none"
    ADJACENT = "adjacent"
    """A site and each site that it reads from."""
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions:
    """What is measured, and how. All but `commit_seconds`, `memory` and `seed` are part of the run's key.

    The seed is only noted: the pass has no randomness. Another `memory` changes when products are folded, hence their last bits.

    length: tokens per block of a corpus. batch_size: sequences (or pairs) per forward pass.
    skip_positions: first positions left out; None is 1 for corpora, 0 for tasks.
    n_contexts, before, after: strongest contexts per node, and the tokens kept around each.
    second_moments: products of the live features (`LiveRule`: frequency ≥ min_frequency over the first live_rows tokens, max_live at most).
    between: pairs of different sites whose products are kept too. memory: bytes for all products and what waits for them; more is on disk.
    by_position: means per position too. commit_seconds: a killed run loses about this much work.
    """

    length: int = 128
    batch_size: int = 8
    skip_positions: int | None = None
    n_contexts: int = 10
    before: int = 16
    after: int = 8
    second_moments: bool = True
    live_rows: int = LiveRule.rows
    min_frequency: float = LiveRule.min_frequency
    max_live: int = LiveRule.max_live
    between: Between = Between.NONE
    memory: int = DEFAULT_MEMORY
    by_position: bool = False
    seed: int = 0
    commit_seconds: float = 30.0

    def __post_init__(self) -> None:
        least = {
            "length": 2, "batch_size": 1, "n_contexts": 0, "before": 0, "after": 0, "live_rows": 1, "max_live": 1, "commit_seconds": 0,
            "memory": LEAST_MEMORY,
        }  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise BadStatisticsOptions(f"{name} is {getattr(self, name)}: it must be at least {bound}")
        if not 0 <= self.min_frequency <= 1:
            raise BadStatisticsOptions(f"min_frequency is {self.min_frequency}: it is a share of tokens, between 0 and 1")
        if self.skip_positions is not None and self.skip_positions < 0:
            raise BadStatisticsOptions(f"skip_positions is {self.skip_positions}: it must be at least 0")
        if self.between is not Between.NONE and not self.second_moments:
            raise BadStatisticsOptions(f"between is {self.between}, but second moments are not measured: ask for them, or for between none")

    @property
    def rule(self) -> LiveRule | None:
        return LiveRule(self.live_rows, self.min_frequency, self.max_live) if self.second_moments else None


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of equal length, tokens (batch, pos); `pairs` where they come from a task."""

    tokens: Tensor
    pairs: PairBatch | None = None


@dataclass(frozen=True)
class Corpus:
    """A finite, repeatable source of sequences.

    hash: of all tokens in order. batches: starts it anew, always the same batches. keys: names of the sequences in order, for tasks.
    first_position: positions before it are left out. donor_seed: where the pairs have donors, the seed by which they were drawn.
    """

    name: str
    hash: str
    n_sequences: int
    batches: Callable[[], Iterator[TokenBatch]]
    first_position: int
    keys: tuple[str, ...] = ()
    donor_seed: int | None = None


Measure = Callable[[TokenBatch], Mapping[Site, SparseNodes]]
"""Nodes of each site of one batch; row r is position `first + r % n` of sequence `r // n`, n the number of positions measured."""

Progress = Callable[[int, int, int], None]
"""Called after each batch with (sequences done, sequences in all, tokens measured)."""


# -- 1. Corpora ----------------------------------------------------------------------------------------------


def text_corpus(spec: str, tokenizer: Any, options: StatisticsOptions, *, max_sequences: int | None = None, max_texts: int | None = None) -> Corpus:
    """The blocks of `options.length` tokens of a text corpus (see `read_texts`), at most `max_sequences` of them.

    Reads and tokenises the corpus once to count and hash it. Raises `EmptyCorpus`, and what `read_texts` raises.
    """
    first = 1 if options.skip_positions is None else options.skip_positions
    if first >= options.length:
        raise BadStatisticsOptions(f"skip_positions is {first} and length {options.length}: no position would be left")
    blocks = lambda: token_blocks(read_texts(spec, limit=max_texts), tokenizer, options.length, limit=max_sequences)
    batches = lambda: _stacked(blocks(), options.batch_size)
    digest, count = _hash_batches(batches())
    if count == 0:
        raise EmptyCorpus(f"corpus {spec!r} has fewer than {options.length} tokens: give more text or a smaller length")
    return Corpus(spec, digest, count, batches, first)


def pair_corpus(
    name: str,
    pairs: Sequence[Pair],
    tokenizer: Any,
    options: StatisticsOptions,
    *,
    clean_only: bool = False,
    donor_seed: int | None = None,
    device: torch.device | str = "cpu",
) -> Corpus:
    """The sequences of a task: of each batch of pairs the clean ones, then (unless `clean_only`) the corrupted ones.

    With a `donor_seed` the pairs have donors, for attributions from a resampled baseline. Raises `NoDonor` for a pair that can have none.
    """
    first = options.skip_positions or 0

    def batches() -> Iterator[TokenBatch]:
        for batch in pair_batches(pairs, tokenizer, batch_size=options.batch_size, donor_seed=donor_seed):
            tokens = batch.clean if clean_only else torch.cat([batch.clean, batch.corrupt])
            if tokens.shape[1] <= first:
                raise BadStatisticsOptions(f"skip_positions is {first}, but a sequence has {tokens.shape[1]} tokens: no position would be left")
            yield TokenBatch(tokens, batch.to(device))

    digest, count = _hash_batches(batches())
    if count == 0:
        raise EmptyCorpus(f"task {name!r} has no pairs")
    keys = [pair.key for batch in pair_batches(pairs, tokenizer, batch_size=options.batch_size) for pair in batch.pairs * (1 if clean_only else 2)]
    return Corpus(name, digest, count, batches, first, tuple(keys), donor_seed)


def _stacked(blocks: Iterable[Tensor], batch_size: int) -> Iterator[TokenBatch]:
    blocks = iter(blocks)
    while batch := list(islice(blocks, batch_size)):
        yield TokenBatch(torch.stack(batch))  # (batch, pos)


def _hash_batches(batches: Iterable[TokenBatch]) -> tuple[str, int]:
    """sha256 over the shapes and tokens of all batches, and the number of sequences."""
    digest, count = hashlib.sha256(), 0
    for batch in batches:
        digest.update(repr(tuple(batch.tokens.shape)).encode())
        digest.update(batch.tokens.to(torch.int64).cpu().numpy().tobytes())
        count += len(batch.tokens)
    return digest.hexdigest()[:KEY_LENGTH], count


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


def shuffled_corpus(corpus: Corpus, batch_size: int, seed: int) -> Corpus:
    """The sequences in random order, those of one length together, in full batches; what does not fill one is left out.

    Neighbouring blocks of a text are of one document and depend on each other; so that they rarely share a batch, all tokens are held in memory.
    """
    by_length: dict[int, list[Tensor]] = {}
    for batch in corpus.batches():
        by_length.setdefault(batch.tokens.shape[1], []).append(batch.tokens.cpu())
    random = np.random.default_rng(seed)
    shuffled = []
    for length in sorted(by_length):
        tokens = torch.cat(by_length[length])
        tokens = tokens[torch.from_numpy(random.permutation(len(tokens)))]
        shuffled += [TokenBatch(part) for part in tokens.split(batch_size) if len(part) == batch_size]
    digest, count = _hash_batches(shuffled)
    if count == 0:
        raise EmptyCorpus(f"corpus {corpus.name!r} has no {batch_size} sequences of one length to shuffle: give more text, or a smaller batch size")
    return Corpus(corpus.name, digest, count, lambda: iter(shuffled), corpus.first_position)


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
    binding = bind(model)
    if measure is None:
        if basis == SHUFFLED:
            corpus = shuffled_corpus(corpus, options.batch_size, options.seed)
            measure = shuffled_measure(activation_measure(binding, dictionaries, corpus.first_position))
            options = replace(options, n_contexts=0, by_position=False)  # its texts are not those of its nodes
        elif basis != "activation":
            raise BadStatisticsOptions(f"basis {basis!r} needs a function that measures it")
        else:
            measure = activation_measure(binding, dictionaries, corpus.first_position)
    sites = [site for site in binding.graph(dictionaries).sites if site in dictionaries]
    planned = plan_run(model, {site: dictionaries[site] for site in sites}, corpus, options, basis=basis, arguments=arguments)
    record = store.start_run(planned)
    if record.status == "done":
        shutil.rmtree(store.parts(record.run), ignore_errors=True)
        return record
    device = model.device if model.device.type == "cuda" else torch.device("cpu")
    shapes = {site: _shape(dictionaries[site], options, basis) for site in sites}
    pass_ = _Pass(store, record, corpus, shapes, device)
    if options.rule is not None:
        pairs = site_pairs(binding, sites, options.between)
        pass_.joint = JointMoments(
            {site.name: dictionaries[site].d_sae for site in sites}, pairs, options.rule, store.parts(record.run),
            memory=options.memory, device=device,
        )  # fmt: skip
    pass_.restore()
    pass_.run(measure, options.commit_seconds, progress)
    pass_.finish(model.tokenizer)
    return store.run(record.run)


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
    measure = attribution_measure(bind(model), dictionaries, settings, means=means, first_position=corpus.first_position)
    arguments = attribution_arguments(settings, donor_seed=corpus.donor_seed, statistics_run=statistics_run)
    return measure_statistics(
        store, model, dictionaries, corpus, options, basis="attribution", measure=measure, arguments=arguments, progress=progress
    )


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


class _Pass:
    """One pass over a corpus, from the last commit on."""

    def __init__(self, store: StatisticsStore, record: RunRecord, corpus: Corpus, shapes: Mapping[Site, SiteShape], device: torch.device) -> None:
        self.store, self.record, self.corpus, self.shapes, self.device = store, record, corpus, shapes, device
        self.sequences, self.tokens = record.sequences, record.tokens
        self.sites: dict[Site, SiteStatistics] = {}
        self.joint: JointMoments | None = None

    def restore(self) -> None:
        """Take up the records of the last commit, or begin."""
        saved = self.store.load_state(self.record.run)
        if bool(saved) != (self.record.sequences > 0):
            held = f"{self.record.sequences} sequences and {len(saved)} saved parts"
            raise StateDoesNotFit(f"statistics run {self.record.run} has {held}: delete the run and repeat it")
        self.sites = {
            site: SiteStatistics.from_arrays(shape, unpacked(saved[site.name]), self.device) if saved else SiteStatistics.empty(shape, self.device)
            for site, shape in self.shapes.items()
        }
        if not saved:
            shutil.rmtree(self.store.parts(self.record.run), ignore_errors=True)
        elif self.joint is not None:
            if JOINT not in saved:
                raise StateDoesNotFit(f"statistics run {self.record.run} was begun by an older featlas: delete the run and repeat it")
            self.joint.restore(unpacked(saved[JOINT]))

    def _remaining(self) -> Iterator[TokenBatch]:
        """The batches after those that are in the records already."""
        passed = 0
        for batch in self.corpus.batches():
            if passed >= self.record.sequences:
                yield batch
            elif passed + len(batch.tokens) > self.record.sequences:
                stopped = f"stopped at sequence {self.record.sequences}, inside a batch"
                raise StateDoesNotFit(f"statistics run {self.record.run} {stopped}: delete the run and repeat it")
            passed += len(batch.tokens)

    def run(self, measure: Measure, commit_seconds: float, progress: Progress | None) -> None:
        committed, wait = time.monotonic(), commit_seconds
        for batch in self._remaining():
            self._add(batch, measure(batch))
            if time.monotonic() - committed >= wait:
                began = time.monotonic()
                self.commit()
                committed = time.monotonic()
                wait = max(commit_seconds, min((committed - began) / COMMIT_SHARE, 20 * commit_seconds))
            if progress is not None:
                progress(self.sequences, self.corpus.n_sequences, self.tokens)

    def _add(self, batch: TokenBatch, nodes: Mapping[Site, SparseNodes]) -> None:
        window = Window(batch.tokens.to(self.device), self.sequences, self.corpus.first_position)
        for site, statistics in self.sites.items():
            try:
                statistics.add(nodes[site].to(self.device), window)
            except NotFinite as error:
                last = self.sequences + len(batch.tokens) - 1
                raise NotFinite(f"site {site}, sequences {self.sequences} to {last}: {error}") from None
        if self.joint is not None:
            self.joint.add({site.name: nodes[site] for site in self.sites}, window.n_positions)
        self.sequences += len(batch.tokens)
        self.tokens += len(batch.tokens) * window.n_positions

    def commit(self) -> None:
        state = {site.name: packed(statistics.to_arrays()) for site, statistics in self.sites.items()}
        if self.joint is not None:
            state[JOINT] = packed(self.joint.save())
        self.store.save_state(self.record.run, self.sequences, self.tokens, state)
        if self.joint is not None:
            self.joint.cleaned()

    def finish(self, tokenizer: Any) -> None:
        """Turn the records into the store's tables."""
        frames: dict[str, Iterable[pl.DataFrame]] = {}
        live: dict[str, np.ndarray] = {}
        if self.joint is not None:
            self.joint.fold()
            live = self.joint.live or {}
            frames |= joint_tables(self.joint, {site.name: statistics.moments for site, statistics in self.sites.items()})
        parts: dict[str, list[pl.DataFrame]] = {}
        for site, statistics in self.sites.items():
            tables = site_tables(self.record, self.record.site(site.name), statistics, live.get(site.name), self.corpus.keys, tokenizer)
            for table, frame in tables.items():
                parts.setdefault(table, []).append(frame)
        self.store.finish_run(self.record.run, self.sequences, self.tokens, {**parts, **frames})
        shutil.rmtree(self.store.parts(self.record.run), ignore_errors=True)


# -- 5. Tables -----------------------------------------------------------------------------------------------


def site_tables(
    record: RunRecord, site: SiteRecord, statistics: SiteStatistics, live: np.ndarray | None, keys: Sequence[str], tokenizer: Any
) -> dict[str, pl.DataFrame]:
    """Table name → rows of one site, without the column `run`."""
    tables = {
        "feature_statistics": _feature_table(record, site, statistics, live),
        "contexts": _context_table(statistics.contexts, site.d_sae, keys, tokenizer),
    }
    if statistics.errors is not None:
        tables["error_means"] = _error_table(statistics)
    if statistics.positions is not None:
        rows, nodes, _ = statistics.positions.sums
        position, feature = nodes.nonzero(as_tuple=True)
        mean = nodes[position, feature] / rows[position]
        tables["node_means"] = pl.DataFrame({"position": position.cpu().numpy(), "feature": feature.cpu().numpy(), "mean": mean.cpu().numpy()})
    return {table: frame.with_columns(pl.lit(site.site).alias("site")) for table, frame in tables.items()}


def _feature_table(record: RunRecord, site: SiteRecord, statistics: SiteStatistics, live_nodes: np.ndarray | None) -> pl.DataFrame:
    moments = statistics.moments
    live = np.zeros(site.d_sae + 1, dtype=bool)
    live[live_nodes if live_nodes is not None else []] = True
    live[site.d_sae] = False  # it is no feature, though it takes part in second moments
    host = {name: getattr(moments, name).cpu().numpy() for name in ("count", "mean", "variance", "minimum", "maximum", "magnitude")}
    active = np.maximum(host["count"], 1)
    index = pl.int_range(site.d_sae + 1, dtype=pl.Int32, eager=True)
    frame = pl.DataFrame(
        {
            "feature": index, "live": live, "count": host["count"], "frequency": host["count"] / moments.rows,
            "mean": host["mean"], "variance": host["variance"], "minimum": host["minimum"], "maximum": host["maximum"],
            "mean_active": host["mean"] * moments.rows / active, "mean_magnitude": host["magnitude"] / moments.rows,
        }
    )  # fmt: skip
    error = pl.col("feature") == site.d_sae
    name = pl.when(error).then(pl.lit("error")).otherwise(pl.col("feature").cast(pl.String))
    return frame.with_columns(
        pl.lit(site.layer).alias("layer"),
        pl.when(error).then(pl.lit("error")).otherwise(pl.lit("feature")).alias("kind"),
        pl.concat_str([pl.lit(feature_key(record.model, site.dictionary, site.site, "")), name]).alias("key"),
        pl.when(error).then(pl.lit(ERROR, dtype=pl.Int32)).otherwise(pl.col("feature")).alias("feature"),
    )


def joint_tables(joint: JointMoments, moments: Mapping[str, Moments]) -> dict[str, Iterable[pl.DataFrame]]:
    """Table name → frames of what is of all sites together, without the column `run`; products are read tile by tile."""
    pairs = pl.DataFrame(joint.pairs, schema=["site_i", "site_j"], orient="row").with_row_index("ordinal")
    return {
        "live_nodes": [_live_table(joint, site, moments[site]) for site in joint.widths],
        "run_lags": [pl.DataFrame({"lag": LAGS, "rows": joint.lag_rows})],
        "site_pairs": [pairs],
        "second_moments": (_product_table(joint, tile, sums) for tile, sums in joint.blocks(within=True)),
        "second_moments_between": (_product_table(joint, tile, sums) for tile, sums in joint.blocks(within=False)),
    }


def _live_table(joint: JointMoments, site: str, moments: Moments) -> pl.DataFrame:
    assert joint.live is not None  # the caller has folded
    nodes, sums = joint.live[site], joint.sums[site]
    mean = sums.sums / joint.rows
    square, cube = sums.squares / joint.rows, sums.cubes / joint.rows
    # Exactly: rounding leaves a constant far from 0 some variance.
    constant = (moments.minimum == moments.maximum).cpu().numpy()[nodes]
    variance = np.where(constant, 0.0, np.clip(square - mean**2, 0.0, None))
    third = cube - 3 * mean * square + 2 * mean**3
    autocorrelation = sums.autocorrelation(joint.rows, joint.lag_rows) * (variance > 0)[:, None]
    return pl.DataFrame(
        {
            "site": [site] * len(nodes), "feature": _numbers(joint, site).astype(np.int32), "shift": sums.shift, "mean": mean, "variance": variance,
            "skewness": np.divide(third, variance**1.5, out=np.zeros_like(third), where=variance > 0),
            "autocorrelation": pl.Series(autocorrelation.tolist(), dtype=pl.List(pl.Float64)),
        }
    )  # fmt: skip


def _numbers(joint: JointMoments, site: str) -> np.ndarray:
    """The live nodes' numbers in the store: the error node is `ERROR`."""
    assert joint.live is not None
    return np.where(joint.live[site] == joint.widths[site], ERROR, joint.live[site])


def _product_table(joint: JointMoments, tile: Tile, sums: np.ndarray) -> pl.DataFrame:
    """The nonzero products of a tile; within a site those with feature_i ≤ feature_j, the error node being the least."""
    i, j = np.nonzero(sums)
    first, second = _numbers(joint, tile.first)[tile.start + i], _numbers(joint, tile.second)[j]
    frame = pl.DataFrame({"feature_i": first.astype(np.int32), "feature_j": second.astype(np.int32), "sum_product": sums[i, j]})
    if tile.first == tile.second:
        return frame.filter(pl.col("feature_i") <= pl.col("feature_j")).with_columns(pl.lit(tile.first).alias("site"))
    return frame.with_columns(pl.lit(tile.first).alias("site_i"), pl.lit(tile.second).alias("site_j"))


def _context_table(contexts: Contexts, d_sae: int, keys: Sequence[str], tokenizer: Any) -> pl.DataFrame:
    sequence = contexts.sequence.cpu().numpy()
    feature, rank = np.nonzero(sequence >= 0)  # sorted by feature, then rank
    sequence, tokens = sequence[feature, rank], contexts.tokens.cpu().numpy()[feature, rank]  # (n,), (n, before + 1 + after)
    frame = pl.DataFrame(
        {
            "feature": np.where(feature == d_sae, ERROR, feature).astype(np.int32), "rank": rank.astype(np.int32),
            "value": contexts.value.cpu().numpy()[feature, rank], "sequence": sequence,
            "sequence_key": pl.Series([keys[i] for i in sequence] if keys else [None] * len(sequence), dtype=pl.String),
            "position": contexts.position.cpu().numpy()[feature, rank],
            "ids": _rows(pl.Series(tokens.reshape(-1), dtype=pl.Int32), tokens.shape), "texts": _rows(token_texts(tokens, tokenizer), tokens.shape),
        }
    )  # fmt: skip
    texts, before = pl.col("texts").list, contexts.before
    return frame.with_columns(
        pl.col("ids").list.eval(pl.element().filter(pl.element() >= 0)).alias("token_ids"),
        texts.slice(0, before).list.drop_nulls().alias("before"), texts.get(before).alias("token"),
        texts.slice(before + 1).list.drop_nulls().alias("after"),
    ).drop("ids", "texts")  # fmt: skip


def _rows(flat: pl.Series, shape: tuple[int, ...]) -> pl.Series:
    """A flat series (n · width,) as n lists of `width`."""
    return flat.reshape(shape).arr.to_list() if len(flat) else pl.Series(dtype=pl.List(flat.dtype))


def token_texts(tokens: np.ndarray, tokenizer: Any) -> pl.Series:
    """The text of each token id, flat, null where there is none (-1); each different id is decoded once."""
    ids, place = np.unique(tokens, return_inverse=True)
    real = ids[ids >= 0]
    texts = tokenizer.batch_decode(real[:, None].tolist(), clean_up_tokenization_spaces=False) if len(real) else []
    return pl.Series([None] * (len(ids) - len(real)) + texts, dtype=pl.String).gather(place.reshape(-1))


def _error_table(statistics: SiteStatistics) -> pl.DataFrame:
    """The overall mean and variance vectors (position -1), then the mean vectors by position."""
    assert statistics.errors is not None  # the caller asked
    errors = statistics.errors
    rows = [(-1, errors.rows, errors.mean.tolist(), errors.variance.tolist())]
    if statistics.positions is not None:
        counts, _, sums = statistics.positions.sums
        measured = counts.nonzero().squeeze(-1).tolist()
        rows += [(position, int(counts[position]), (sums[position] / counts[position]).tolist(), []) for position in measured]
    schema: dict[str, Any] = {"position": pl.Int32, "tokens": pl.Int64, "mean": pl.List(pl.Float64), "variance": pl.List(pl.Float64)}
    return pl.DataFrame(rows, schema=schema, orient="row")
