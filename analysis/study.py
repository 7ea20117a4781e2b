"""A run of the graph with its model at hand again, and what ablated versions of that model do on sequences.

1. `open_study` loads the model and the dictionaries that a run was measured with, and makes its output again.
2. `found_pairs` are the sequences that the run's edges were measured on, `held_out_pairs` others of the same task.
3. `measure` runs the model with only each trial's edges or nodes alive, and with all others alive: one row per sequence,
   metric and draw of the baseline, with the whole model's and the baseline's own values beside it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from ..errors import UserError
from ..model.ablation import DEFAULT_MEMORY, AblationBatch, CleanBatch, Errors, ablate_edges, ablate_nodes, clean_run
from ..model.baselines import Baseline, BaselineChoice, NodeMoments, baseline_nodes
from ..model.beginning import with_beginning
from ..model.binding import Binding, Network, bind
from ..model.dictionaries import Dictionary
from ..model.dictionary_sources import load_dictionaries
from ..model.loading import LoadedModel, load_model
from ..model.masks import EdgeSet, NodeSet
from ..model.metrics import Metric
from ..model.sites import Site, SiteGraph, parse_site
from ..model.targets import FeatureTarget, LogitTarget, ProbeTarget, Target, read_probe
from ..model.tasks import Pair, PairBatch, TaskTooSmall, batches, load_task
from ..model.unit_ablation import ablate_units
from ..model.units import UnitEdges
from ..queries.kept_files import run_options
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow, model_features, run_sequences
from .faithfulness import CIRCUIT, COMPLEMENT, FOUND, HELD_OUT, VALUES

METRICS = (Metric.LOGIT_DIFF, Metric.KL, Metric.TV, Metric.ACCURACY, Metric.MRR)
"""What is measured of every ablated run unless told otherwise."""

_BATCH = 8


class WrongModel(UserError):
    """The model, the dictionaries or the target named are not those that were measured."""


class NoHeldOut(UserError):
    """A task has no sequences left that a circuit was not found on."""


class Ablation(StrEnum):
    """What is cut."""

    EDGE = "edge"
    NODE = "node"


class Split(StrEnum):
    """On which sequences a circuit is found, and on which it is tested."""

    FRESH = "fresh"
    """Found on all of the run's sequences, tested on others of the task."""
    HALVES = "halves"
    """Found on one half of the run's sequences, tested on the other."""
    FOUND = "found"
    """Found and tested on the run's sequences: an upper bound, and said so."""


@dataclass(frozen=True)
class StudyOptions:
    """How ablated models are run and what is measured of them.

    model, dictionaries: None for those of the run's manifest in the atlas. metrics: for a target inside the model it alone is measured.
    baseline None is the run's own. statistics_run: for the mean and noise baselines; None is the latest that fits. draws: of a baseline
    that is drawn (resample, noise), seeds from `seed` on; the others have one. errors: what becomes of error nodes. target: the file of
    the probe that a run was measured with.
    """

    model: str | None = None
    dictionaries: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    metrics: tuple[Metric, ...] = METRICS
    baseline: Baseline | None = None
    statistics_run: str | None = None
    per_position: bool = False
    noise_scale: float = 1.0
    draws: int = 1
    seed: int = 0
    errors: Errors = Errors.LISTED
    batch_size: int = _BATCH
    memory: int = DEFAULT_MEMORY
    target: str | None = None

    def check(self) -> None:
        """Raise a `UserError` for a setting out of range."""
        for name, value in (("--draws", self.draws), ("--batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"{name} {value} is too small: give at least 1")
        if not 0 < self.noise_scale < float("inf"):
            raise UserError(f"--noise-scale {self.noise_scale} makes no noise: give a finite number of standard deviations above 0")
        if self.memory < 2**24:
            raise UserError(f"--memory of {self.memory} bytes is too little: give at least 16MB")


@dataclass(frozen=True)
class Study:
    """A run with everything that it takes to ablate its model. `features`: the model's nodes in the graph (`model_features`).

    statistics_run: where the moments come from, if it was named and is not the run's own.
    """

    run: RunRow
    model: LoadedModel
    binding: Network
    dictionaries: Mapping[Site, Dictionary]
    graph: SiteGraph
    target: Target
    features: pl.DataFrame
    options: StudyOptions
    baseline: Baseline
    moments: Mapping[Site, NodeMoments] | None
    statistics_run: str | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is measured; a target inside the model is the one thing."""
        return self.options.metrics if isinstance(self.target, LogitTarget) else self.options.metrics[:1]

    def metric_name(self, metric: Metric) -> str:
        """What a measured number is called: the metric, or the name of a target inside the model."""
        return metric.value if isinstance(self.target, LogitTarget) else self.target.name

    @property
    def baseline_name(self) -> str:
        """What cut nodes are worth, with all that tells it from other choices: `mean per position`, `zero, errors kept`, `resample, seed 3`."""
        name = _baseline_name(self.baseline, self.options.per_position, self.options.noise_scale)
        name += f" of statistics {self.statistics_run[:8]}" if self.statistics_run is not None else ""
        name += f", seed {self.options.seed}" if self.baseline.drawn and self.options.seed else ""
        return name + (f", errors {self.options.errors.value}" if self.options.errors is not Errors.LISTED else "")

    @property
    def default_metric(self) -> str:
        """The run's own metric where it is measured, else the first that is."""
        names = [self.metric_name(metric) for metric in self.metrics]
        return self.target.name if self.target.name in names else names[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the baseline's draws."""
        return tuple(range(self.options.seed, self.options.seed + (self.options.draws if self.baseline.drawn else 1)))

    def batches(self, pairs: Sequence[Pair], seed: int, among: Sequence[Pair] | None = None) -> Iterator[AblationBatch]:
        """The pairs with a clean run and one draw of the baseline, which does not depend on the order of the pairs.

        among: the sequences, these ones included, that a resampled baseline is drawn from; the pairs themselves unless given.
        """
        for batch in self.pair_batches(pairs, seed, among):
            yield self.prepared(batch, seed)

    def pair_batches(self, pairs: Sequence[Pair], seed: int, among: Sequence[Pair] | None = None) -> Iterator[PairBatch]:
        """The batches that `batches` runs, with donors where the baseline is resampled."""
        donors = seed if self.baseline is Baseline.RESAMPLE else None
        size, tokenizer, key = self.options.batch_size, self.model.tokenizer, lambda pair: pair.key
        if donors is None or among is None:
            yield from batches(sorted(pairs, key=key), tokenizer, batch_size=size, donor_seed=donors)
            return
        singles = batches(sorted(among, key=key), tokenizer, batch_size=1, donor_seed=donors)
        given = {single.pairs[0].key: single.donor for single in singles if single.donor is not None}
        for batch in batches(sorted(pairs, key=key), tokenizer, batch_size=size):
            yield replace(batch, donor=torch.cat([given[pair.key] for pair in batch.pairs]))

    def prepared(self, batch: PairBatch, seed: int) -> AblationBatch:
        """One batch with its clean run and a draw of the baseline."""
        clean: CleanBatch = clean_run(self.binding, self.dictionaries, batch, self.target)
        return clean.with_baseline(
            baseline_nodes(
                self.binding, clean.dictionaries, clean.pairs, clean.values, self.baseline, moments=self.moments,
                per_position=self.options.per_position, noise_scale=self.options.noise_scale, seed=seed,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One circuit to be put to the test, and what it is called in the values frame.

    mask: what is alive; of edges between units all of their members' edges. complement: whether all but the circuit is tested too.
    rest: what is alive then, where that is not everything that the mask leaves out.
    """

    method: str
    size: int
    mask: EdgeSet | NodeSet | UnitEdges
    draw: int = 0
    complement: bool = True
    rest: EdgeSet | NodeSet | UnitEdges | None = None

    def alive(self, part: str) -> EdgeSet | NodeSet | UnitEdges:
        """What is alive in the circuit, or in its complement."""
        return self.mask if part == CIRCUIT else (self.mask.inverse() if self.rest is None else self.rest)

    @property
    def ablation(self) -> Ablation:
        return Ablation.NODE if isinstance(self.mask, NodeSet) else Ablation.EDGE


# --- opening ----------------------------------------------------------------------------------------------------------


def open_study(store: GraphStore, run: RunRow, options: StudyOptions, atlas: Path) -> Study:
    """Load what a run was measured with. Raises `WrongModel` where the options name something else, and what loading raises."""
    options.check()
    settings: dict[str, Any] = json.loads(str(run.properties.get("settings") or "{}"))
    baseline = options.baseline
    if baseline is None:
        baseline, per_position, noise_scale = _own_baseline(run)
        asked = options.noise_scale != StudyOptions.noise_scale
        options = replace(options, per_position=options.per_position or per_position, noise_scale=options.noise_scale if asked else noise_scale)
    if options.draws > 1 and not baseline.drawn:
        raise UserError(f"--draws {options.draws} of baseline {baseline.value}: only resample and noise are drawn, leave it out")
    BaselineChoice(baseline, options.per_position, options.noise_scale).check()
    recorded = recorded_options(atlas, run.key)
    name, folder = (given or recorded.get(what) or fallback for given, what, fallback in (
        (options.model, "model", "smollm2"), (options.dictionaries, "dictionaries", "demo"),
    ))  # fmt: skip
    dtype = options.dtype or str(settings.get("dtype") or "float32")
    revision = recorded.get("revision") if options.model is None else None
    model = load_model(name, revision=revision, device=options.device, dtype=dtype)
    described = settings.get("target") or {"kind": "logits", "metric": run.metric}
    wanted = [parse_site(site) for site in run.dictionaries]
    extra = [parse_site(str(described["site"]))] if described["kind"] == "feature" else []
    loaded = load_dictionaries(folder, model, sites=list(dict.fromkeys([*wanted, *extra])), device=options.device, dtype=dtype)
    dictionaries = {site: loaded[site] for site in wanted}
    ids = {site.name: dictionary.id for site, dictionary in dictionaries.items()}
    if model.key != run.model or ids != dict(run.dictionaries):
        raise WrongModel(
            f"run {run.key} is of {run.model} with other dictionaries than --model {name} --dictionaries {folder} are: name those of the run"
        )
    model = with_beginning(model, loaded, settings.get("bos"))
    binding = bind(model)
    target = _target(described, loaded, binding, options.target)
    graph = SiteGraph.of(binding.n_layers, binding.parallel, dictionaries, target.site)
    own = settings.get("statistics_run")
    moments, measured = _moments(atlas, options.statistics_run or own, model, dictionaries) if baseline.of_corpus else (None, own)
    named = measured if options.statistics_run is not None and measured != own else None
    return Study(run, model, binding, dictionaries, graph, target, model_features(store, run.model), options, baseline, moments, named)


def _baseline_name(baseline: Baseline, per_position: bool, noise_scale: float) -> str:
    name = baseline.value + (" per position" if per_position else "")
    return name + (f" {noise_scale:g}" if baseline is Baseline.NOISE and noise_scale != 1 else "")


def _own_baseline(run: RunRow) -> tuple[Baseline, bool, float]:
    """The baseline that a run's edges were measured from: which, whether each position has its own, the scale of noise."""
    engine = json.loads(str(run.properties.get("settings") or "{}")).get("engine") or {}
    baseline = Baseline(str(run.properties.get("baseline") or Baseline.COUNTERFACTUAL.value))
    return baseline, bool(engine.get("per_position", False)), float(engine.get("noise_scale", 1.0))


def own_baseline_name(run: RunRow) -> str:
    """What `Study.baseline_name` is for a run's own baseline, with error nodes as circuits list them."""
    return _baseline_name(*_own_baseline(run))


def recorded_options(atlas: Path, run: str) -> dict[str, Any]:
    """The options that a run was made with, from its manifest; empty where the atlas has none."""
    return run_options(atlas, run)


def _target(described: Mapping[str, Any], dictionaries: Mapping[Site, Dictionary], binding: Binding, path: str | None) -> Target:
    """The output that a run's settings describe; a probe is read from its file and must be the same."""
    if described["kind"] == "logits":
        return LogitTarget(Metric(str(described["metric"])))
    if described["kind"] == "feature":
        site = parse_site(str(described["site"]))
        return FeatureTarget(site, dictionaries[site], int(described["index"]), int(described["position"]))
    if path is None:
        raise WrongModel(f"the run's output is probe {described.get('name')!r}: name its .safetensors file by --target")
    probe: ProbeTarget = read_probe(Path(path), binding)
    if probe.digest != described["sha256"]:
        raise WrongModel(f"probe {path} is not the one that the run was measured with: its weights are other ones")
    return probe


def _moments(
    atlas: Path, run: str | None, model: LoadedModel, dictionaries: Mapping[Site, Dictionary]
) -> tuple[dict[Site, NodeMoments], str]:
    """Means and deviations of every site's nodes, from the run named or the latest that measured them; and that run's key."""
    ids = {site.name: dictionary.id for site, dictionary in dictionaries.items()}
    with StatisticsStore(atlas, read_only=True) as statistics:
        record = statistics.find_run(run) if run else statistics.latest_run(model.key, ids)
        if record is None:
            measured = f"no statistics of {model.key} and these dictionaries in {atlas}"
            raise UserError(f"{measured}: make them with `featlas ingest statistics`, or take another --baseline")
        moments = {
            site: NodeMoments.of(**vars(statistics.baseline_means(record.run, site.name, dictionary.id, model=model.key)))
            for site, dictionary in dictionaries.items()
        }
        return moments, record.run


# --- sequences --------------------------------------------------------------------------------------------------------


def found_pairs(store: GraphStore, run: RunRow) -> list[Pair]:
    """The sequences that a run has done, by key."""
    rows = run_sequences(store, run.key)
    return [Pair(r["clean"], r["corrupt"], r["answer"], r["wrong_answer"], r["task"]) for r in rows.iter_rows(named=True)]


def held_out_pairs(study: Study, found: Sequence[Pair], n: int, *, task: str | None = None) -> list[Pair]:
    """`n` sequences of the run's task, or of one `task` of its mixture, that share no prompt with those that its edges were measured on.

    Clean and corrupted prompts count alike: a pair turned round is not a new one. `found`: all of the run's own sequences. A drawn task is
    drawn further until there are `n`; a file is read further than the run did, and may have fewer. Raises `NoHeldOut`.
    """
    named, seed = study.run.task, int(str(study.run.properties.get("seed") or 0))
    way_out = "ask for fewer by --held-out, or split the run's own sequences by --split halves"
    limit = int(json.loads(str(study.run.properties.get("settings") or "{}")).get("limit") or len(found))
    seen = {prompt for pair in found for prompt in (pair.clean, pair.corrupt)}
    # Of a mixture each part gives an equal share of what is drawn.
    more, known = n if task is None else n * max(1, len({pair.task for pair in found})), -1
    while True:
        try:
            drawn = load_task(named, study.model.tokenizer, n=limit + more, seed=seed, skip_invalid=True)
        except TaskTooSmall as error:
            raise NoHeldOut(f"no {n} held-out sequences of {task or named!r}: {error}; {way_out}") from None
        wanted = [pair for pair in drawn if task in (None, pair.task)]
        fresh = [pair for pair in wanted if not seen & {pair.clean, pair.corrupt}]
        if len(fresh) >= n or len(wanted) == known:  # enough, or a file's end
            break
        more, known = 2 * more, len(wanted)
    if not fresh:
        raise NoHeldOut(f"task {task or named!r} has no sequence beyond the run's {len(found)}: {way_out}")
    return fresh[:n]


def halves(pairs: Sequence[Pair], seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Two halves of the pairs at random, tasks shared evenly between them; pairs that share a prompt are in the same half.

    Raises `NoHeldOut` where that leaves one of them empty.
    """
    generator = torch.Generator().manual_seed(seed)
    listed = sorted(pairs, key=lambda pair: pair.key)
    order = torch.randperm(len(listed), generator=generator).tolist()
    by_task = sorted((listed[i] for i in order), key=lambda pair: pair.task)  # stable: random within a task
    ours: list[Pair] = []
    others: list[Pair] = []
    for together in _sharing_prompts(by_task):
        (others if len(others) < len(ours) else ours).extend(together)
    if not others:
        raise NoHeldOut(f"the {len(listed)} sequences cannot be split: all are joined by prompts that they share; take --split fresh")
    return ours, others


def _sharing_prompts(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in groups, in order: those that are joined by a prompt, clean or corrupted, that they share."""
    group: dict[str, int] = {}  # of each prompt
    members: dict[int, list[Pair]] = {}
    for i, pair in enumerate(pairs):
        joined = sorted({group[prompt] for prompt in (pair.clean, pair.corrupt) if prompt in group})
        first = joined[0] if joined else i
        members[first] = [*(own for old in joined for own in members.pop(old)), pair]
        group |= {prompt: first for own in members[first] for prompt in (own.clean, own.corrupt)}
    return [members[i] for i in sorted(members)]


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    study: Study,
    pairs: Sequence[Pair],
    trials: Sequence[Trial],
    *,
    split: str = HELD_OUT,
    among: Sequence[Pair] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Every trial on every sequence, as `faithfulness.VALUES`; sorted by trial, then as the pairs come.

    among: the sequences that a resampled baseline is drawn from, as for `Study.batches`. With several draws of the baseline a trial's own
    draw d becomes d · draws + i for the i-th of them. `progress(done, all)` counts sequences.
    """
    if split not in (HELD_OUT, FOUND):
        raise UserError(f"split {split!r} is neither {HELD_OUT!r} nor {FOUND!r}")
    order = {pair.key: i for i, pair in enumerate(pairs)}
    frames, done, total = [], 0, len(pairs) * len(study.seeds)
    for i, seed in enumerate(study.seeds):
        for batch in study.batches(pairs, seed, among):
            frames.append(_measured(study, batch, trials, split, i))
            done += batch.clean.size
            if progress is not None:
                progress(done, total)
    if not frames:
        return pl.DataFrame(schema=dict(VALUES))
    rows = pl.concat(frames).with_columns(pl.col("sequence").replace_strict(order, return_dtype=pl.Int64).alias("_order"))
    return rows.sort("_trial", "part", "metric", "draw", "_order").select(list(VALUES))


def _measured(study: Study, batch: AblationBatch, trials: Sequence[Trial], split: str, drawn: int) -> pl.DataFrame:
    """All trials on one batch under one draw of the baseline."""
    frames = []
    for kind in (EdgeSet, UnitEdges, NodeSet):
        own = [(i, trial) for i, trial in enumerate(trials) if isinstance(trial.mask, kind)]
        if not own:
            continue
        sets = [(i, part, trial.alive(part)) for i, trial in own for part in _parts(trial)]
        ends = _ablated(study, batch, [_empty(own[0][1].mask), *(mask for _, _, mask in sets)])
        values = batch.measures(ends, study.metrics)  # each (1 + n_sets, batch)
        for metric, measured in values.items():
            full = batch.full(metric)
            frames += [
                _rows(study, batch, trials[i], i, part, metric, split, drawn, measured[row], full, measured[0])
                for row, (i, part, _) in enumerate(sets, start=1)
            ]
    return pl.concat(frames)


def _parts(trial: Trial) -> tuple[str, ...]:
    return (CIRCUIT, COMPLEMENT) if trial.complement else (CIRCUIT,)


def _empty(mask: EdgeSet | NodeSet | UnitEdges) -> EdgeSet | NodeSet | UnitEdges:
    """The set of the same kind in which nothing is alive."""
    return mask.empty(mask.units) if isinstance(mask, UnitEdges) else mask.empty(mask.graph)


def _ablated(study: Study, batch: AblationBatch, sets: Sequence[Any]) -> Tensor:
    """What the target reads in each of several sets of one kind, (n_sets, batch, width)."""
    run = ablate_units if isinstance(sets[0], UnitEdges) else ablate_edges if isinstance(sets[0], EdgeSet) else ablate_nodes
    return run(batch, sets, errors=study.options.errors, memory=study.options.memory)


def _rows(
    study: Study, batch: AblationBatch, trial: Trial, number: int, part: str, metric: Metric, split: str, drawn: int,
    value: Tensor, full: Tensor, empty: Tensor,
) -> pl.DataFrame:  # fmt: skip
    """One trial's rows for a metric, with the trial's number in `_trial`."""
    size = trial.size
    pairs = batch.pairs.pairs
    rows = pl.DataFrame(
        {
            "sequence": [pair.key for pair in pairs], "task": [pair.task for pair in pairs], "value": value.cpu().double().tolist(),
            "full": full.cpu().double().tolist(), "empty": empty.cpu().double().tolist(),
        }
    )  # fmt: skip
    same = {
        "method": trial.method, "ablation": trial.ablation.value, "part": part, "size": size,
        "draw": trial.draw * len(study.seeds) + drawn, "metric": study.metric_name(metric), "baseline": study.baseline_name, "split": split,
    }  # fmt: skip
    named = rows.with_columns(pl.lit(value).alias(name) for name, value in same.items())
    return named.select([*(pl.col(name).cast(dtype) for name, dtype in VALUES.items()), pl.lit(number).alias("_trial")])


def with_metrics(study: Study, metrics: Sequence[Metric]) -> Study:
    """The same study measuring other metrics."""
    return replace(study, options=replace(study.options, metrics=tuple(metrics)))
