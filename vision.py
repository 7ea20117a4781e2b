"""Regions of interest of a vision model: do neurons that fire together serve the same classes?

The study of a small convolutional network on handwritten digits (`model.vision`), on the code that language models go through:

1. Every neuron of every layer is a feature (identity dictionaries); its activations on the images that the network was trained on are samples.
2. `find_parcellation` finds blocks of correlated neurons in each layer; other methods, and random blocks of the same sizes, compete.
3. `put_to_the_test` attributes the logit difference to every node, ablates one block at a time on other images (class × block), and keeps and cuts
   the strongest blocks by growing share.
4. `class_trials`: for every class the share of blocks with the strongest attribution to that class is cut, or only kept, and every class's
   accuracy measured: `class_table`. A part of the network that serves a class costs that class more than the others: `targeted`.

A class is a task, an image a sequence of one token; both are cut to the network's mean over the images trained on, unless told otherwise.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from .analysis.correlations import correlation
from .analysis.faithfulness import CIRCUIT, COMPLEMENT, DEFAULT_BOOTSTRAP, HELD_OUT, Averaging, Bootstrap, faithfulness
from .analysis.finding import FindingOptions, find_parcellation, like
from .analysis.gallery import gallery, removal_exhibit
from .analysis.parcellation import Parcellation
from .analysis.partitioning import FINDERS, PartitionMethod
from .analysis.region_gallery import correlation_exhibit, matrix_exhibit, path_exhibits, selectivity_exhibit, sweep_exhibit
from .analysis.region_study import REGIONS, Contestant, selectivity
from .analysis.study import Study, StudyOptions, Trial, measure
from .errors import UserError
from .model.baselines import Baseline
from .model.loading import LoadedModel
from .model.metrics import Metric
from .model.targets import LogitTarget
from .model.tasks import Pair
from .model.vision import (
    EPOCHS,
    Digits,
    ImageTokenizer,
    LayeredNetwork,
    activations,
    bind_digits,
    image_pairs,
    moments,
    neurons,
    per_class,
    train_digits,
)
from .queries.samples import SampleRun, SiteSamples
from .queries.subgraphs import FEATURES as FEATURE_COLUMNS
from .queries.subgraphs import RunRow
from .region_verdict import Progress, RegionTests, RegionVerdict, put_to_the_test

FloatArray = NDArray[np.float64]

CHOICE = "random choice"
"""As many of the regions, drawn at random: what cutting any does."""

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)

CLASS_TABLE = {
    "method": pl.String(), "part": pl.String(), "ranked_for": pl.String(), "task": pl.String(), "accuracy": pl.Float64(), "low": pl.Float64(),
    "high": pl.Float64(), "full": pl.Float64(), "n": pl.Int64(),
}  # fmt: skip
"""What `class_table` returns. part: only kept, or cut. ranked_for: the class whose strongest blocks they are, null for a random choice. task: the
class that is tested. full: accuracy of the whole network."""

TARGETED = {
    "method": pl.String(), "part": pl.String(), "share_of_features": pl.Float64(), "own": pl.Float64(), "own_low": pl.Float64(),
    "own_high": pl.Float64(), "others": pl.Float64(), "others_low": pl.Float64(), "others_high": pl.Float64(), "difference": pl.Float64(),
    "difference_low": pl.Float64(), "difference_high": pl.Float64(), "beyond": pl.Float64(), "beyond_low": pl.Float64(),
    "beyond_high": pl.Float64(),
}  # fmt: skip
"""What `targeted` returns, means over classes and draws. own, others: cut, the accuracy lost by the class whose strongest blocks they are and by the
other classes; kept, the accuracy of each. difference: own − others. beyond: the regions' difference minus this method's, images resampled together.
share_of_features: of the live ones that those blocks hold."""

KEPT, CUT = "kept", "cut"
_PARTS = {CIRCUIT: KEPT, COMPLEMENT: CUT}


@dataclass(frozen=True)
class VisionOptions:
    """finding: how regions are found. against: other methods at the regions' numbers of blocks. share: of the blocks that are cut or only kept.

    per_member: rank blocks by attribution per live member. attributed, tested: images of each class. blocks: of each partition that are cut one at
    a time. shares: of live features, for the curve. steps: of integrated gradients in attribution.
    """

    finding: FindingOptions = field(default_factory=FindingOptions)
    against: tuple[str, ...] = ("ward",)
    share: float = 0.1
    per_member: bool = False
    baseline: Baseline = Baseline.MEAN
    random_draws: int = 5
    attributed: int = 20
    tested: int = 30
    blocks: int = 12
    shares: tuple[float, ...] = SHARES
    steps: int = 5
    epochs: int = EPOCHS
    seed: int = 0

    def check(self) -> None:
        """Raise a `UserError` for a number out of range."""
        self.finding.check()
        if not 0 < self.share < 1:
            raise UserError(f"--share {self.share:g} is no share of the blocks: give a number between 0 and 1")
        for name, value, least in (
            ("--attributed", self.attributed, 1), ("--tested", self.tested, 2), ("--steps", self.steps, 1), ("--epochs", self.epochs, 1),
            ("--random-draws", self.random_draws, 1), ("--blocks", self.blocks, 1),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"{name} {value} is too small: give at least {least}")
        if unknown := [name for name in self.against if name not in FINDERS]:
            raise UserError(f"--against {unknown[0]!r} is no method: choose from {', '.join(sorted(FINDERS))}")

    @property
    def tests(self) -> RegionTests:
        """What every partition goes through."""
        return RegionTests(
            shares=self.shares, edge_shares=(), per_member=self.per_member, blocks=self.blocks, drives=0, random_draws=self.random_draws,
            held_out=10 * self.tested,
        )  # fmt: skip


# --- the network as a study -------------------------------------------------------------------------------------------


def digits_study(digits: Digits, options: VisionOptions) -> Study:
    """The network with all that the ablation of language models takes; nothing of it is in a graph."""
    binding = bind_digits(digits)
    dictionaries = neurons(binding)
    ids = {site.name: dictionary.id for site, dictionary in dictionaries.items()}
    run = RunRow(
        digits.key, digits.key, "digits", Metric.LOGIT_DIFF.value, ids,
        {"baseline": options.baseline.value, "steps": options.steps, "seed": options.seed},
    )  # fmt: skip
    name, _, revision = digits.key.partition("@")
    model = LoadedModel(
        None, ImageTokenizer(len(digits.images)), name, revision, "cnn", binding.n_layers, binding.d_model, binding.device, binding.dtype
    )  # fmt: skip
    study = StudyOptions(metrics=(Metric.LOGIT_DIFF, Metric.ACCURACY), baseline=options.baseline, seed=options.seed, batch_size=100)
    return Study(
        run, model, binding, dictionaries, binding.graph(dictionaries), LogitTarget(Metric.LOGIT_DIFF), pl.DataFrame(schema=FEATURE_COLUMNS), study,
        options.baseline, moments(binding, digits.train, dictionaries) if options.baseline.of_corpus else None,
    )  # fmt: skip


def sampled(study: Study, digits: Digits) -> tuple[SampleRun, list[SiteSamples]]:
    """Every neuron's activation on the images trained on, an image a sequence of one token, as samples that regions are found in."""
    numbers = digits.train.numpy().astype(np.int64)
    place = np.arange(len(numbers))
    ids = {site.name: dictionary.id for site, dictionary in study.dictionaries.items()}
    samples = [
        SiteSamples(site.name, ids[site.name], value.shape[1], value.cpu().numpy().astype(np.float32), place, np.zeros_like(place))
        for site, value in activations(study.binding, digits.train, study.dictionaries).items()
    ]
    sequences = pl.DataFrame(
        {
            "sequence": place, "key": [f"image {n}" for n in numbers], "task": [f"digit {d}" for d in digits.labels[digits.train].tolist()],
            "label": [str(d) for d in digits.labels[digits.train].tolist()], "text": [f"image {n}" for n in numbers],
        }
    )  # fmt: skip
    settings = {"images": len(numbers), "seed": digits.seed}
    key = hashlib.sha256(json.dumps([digits.key, settings]).encode()).hexdigest()[:16]
    return SampleRun(key, study.run.model, "activation", "digits trained on", ids, len(numbers), len(numbers), settings, sequences), samples


# --- classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ClassTrial:
    """A trial with the blocks that are strongest for a class (None: drawn at random), and the share of live features that they hold."""

    trial: Trial
    ranked_for: str | None
    n_blocks: int
    share_of_features: float


def class_trials(contestant: Contestant, share: float, *, per_member: bool = False) -> list[ClassTrial]:
    """For each class the `share` of the blocks with the strongest attribution to its images; a trial's size is the place of the class."""
    blocks = np.flatnonzero(contestant.live)
    n = max(1, round(share * len(blocks)))
    found = []
    for place, (task, strength) in enumerate(contestant.by_task.items()):
        score = strength[blocks] / contestant.live[blocks] if per_member else strength[blocks]
        chosen = blocks[np.argsort(-score, kind="stable")[:n]]
        found.append(_class_trial(contestant, contestant.method, place, chosen, task, contestant.draw))
    return found


def random_choices(contestant: Contestant, share: float, draws: int, seed: int) -> list[ClassTrial]:
    """So many random choices of as many of a partition's blocks."""
    blocks = np.flatnonzero(contestant.live)
    n = max(1, round(share * len(blocks)))
    rng = np.random.default_rng(seed)
    return [_class_trial(contestant, CHOICE, 0, rng.choice(blocks, n, replace=False), None, draw) for draw in range(draws)]


def _class_trial(contestant: Contestant, method: str, size: int, chosen: NDArray[np.int64], task: str | None, draw: int) -> ClassTrial:
    trial = Trial(method, size, contestant.units.nodes(chosen.tolist()), draw)
    return ClassTrial(trial, task, len(chosen), float(contestant.live[chosen].sum() / contestant.live.sum()))


@dataclass(frozen=True, eq=False)
class _Resampled:
    """Accuracies of a method under every row of resampled images: kept, cut (resamples + 1, rankings, classes), and full (resamples + 1, classes).

    Rankings are the classes in order, or one for a random choice.
    """

    kept: FloatArray
    cut: FloatArray
    full: FloatArray


def _resampled(values: pl.DataFrame, bootstrap: Bootstrap) -> dict[str, _Resampled]:
    """By method, draws averaged; images are resampled within their class, alike for all methods. values: of the metric accuracy."""
    tasks = sorted(values["task"].unique().to_list())
    found: dict[str, _Resampled] = {}
    for (method,), own in values.group_by("method", maintain_order=True):
        per_task = []
        for i, task in enumerate(tasks):
            rows = own.filter(pl.col("task") == task)
            images = sorted(rows["sequence"].unique().to_list())
            counts = Bootstrap(bootstrap.resamples, bootstrap.seed + i, bootstrap.level).counts(len(images)) / len(images)
            means = rows.group_by("part", "size", "sequence").agg(pl.col("value").mean(), pl.col("full").first()).sort("part", "size", "sequence")
            parts = {part: means.filter(pl.col("part") == part)["value"].to_numpy().reshape(-1, len(images)) for part in (CIRCUIT, COMPLEMENT)}
            full = means["full"].to_numpy()[: len(images)]
            per_task.append((counts @ parts[CIRCUIT].T, counts @ parts[COMPLEMENT].T, counts @ full))
        kept, cut, full = (np.stack([one[i] for one in per_task], axis=-1) for i in range(3))
        found[str(method)] = _Resampled(kept, cut, full)
    return found


def class_table(values: pl.DataFrame, *, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> pl.DataFrame:
    """Every class's accuracy with each class's strongest blocks cut, or only kept, as `CLASS_TABLE`; values of `class_trials`."""
    values = values.filter(pl.col("metric") == Metric.ACCURACY.value)
    tasks = sorted(values["task"].unique().to_list())
    counted = dict(values.unique(["task", "sequence"]).group_by("task").len().iter_rows())
    rows = []
    for method, own in _resampled(values, bootstrap).items():
        for part, accuracy in ((KEPT, own.kept), (CUT, own.cut)):
            for r in range(accuracy.shape[1]):
                low, high = bootstrap.interval(accuracy[1:, r])
                for t, task in enumerate(tasks):
                    ranked = None if method == CHOICE else tasks[r]
                    rows.append((method, part, ranked, task, accuracy[0, r, t], low[t], high[t], own.full[0, t], counted[task]))
    return pl.DataFrame(rows, schema=CLASS_TABLE, orient="row")


def targeted(values: pl.DataFrame, shares: Mapping[str, float], *, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> pl.DataFrame:
    """Do a class's strongest blocks serve that class more than the others? As `TARGETED`. shares: of the live features, by method."""
    values = values.filter(pl.col("metric") == Metric.ACCURACY.value)
    resampled = _resampled(values, bootstrap)
    rows = []
    for part in (CUT, KEPT):
        stats = {method: _own_and_others(own, part) for method, own in resampled.items()}
        regions = stats[REGIONS][2]
        for method, (own, others, difference) in stats.items():
            columns = np.stack([own, others, difference, regions - difference], axis=1)
            low, high = bootstrap.interval(columns[1:])
            numbers = [x for i in range(4) for x in (columns[0, i], low[i], high[i])]
            if method == CHOICE:  # of no class in particular
                numbers[6:] = [None] * 6
            if method == REGIONS:
                numbers[9:] = [None] * 3
            rows.append((method, part, shares[method], *numbers))
    return pl.DataFrame(rows, schema=TARGETED, orient="row")


def _own_and_others(found: _Resampled, part: str) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(own, others, own − others), each (resamples + 1,)."""
    accuracy = found.kept if part == KEPT else found.full[:, None] - found.cut  # (resamples + 1, rankings, classes)
    n, everything = accuracy.shape[2], accuracy.sum(axis=(1, 2))
    if accuracy.shape[1] == 1:  # a random choice is no class's
        mean = everything / n
        return mean, mean, np.zeros_like(mean)
    own = np.einsum("rcc->r", accuracy)
    others = (everything - own) / (n * (n - 1))
    return own / n, others, own / n - others


# --- the study --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VisionVerdict:
    """What was measured. verdict: by the tests that regions of language models go through. class_values: of `class_trials`, as `VALUES`.

    samples: the activations that the parcellation was found in.
    """

    options: VisionOptions
    digits: Digits
    study: Study
    parcellation: Parcellation
    samples: Sequence[SiteSamples]
    verdict: RegionVerdict
    trials: Sequence[ClassTrial]
    class_values: pl.DataFrame

    @cached_property
    def class_table(self) -> pl.DataFrame:
        """Accuracy of every class with every class's strongest blocks cut or only kept."""
        return class_table(self.class_values)

    @cached_property
    def targeted(self) -> pl.DataFrame:
        """Whether a class's strongest blocks serve that class more than the others."""
        shares: dict[str, list[float]] = {}
        for one in self.trials:
            shares.setdefault(one.trial.method, []).append(one.share_of_features)
        return targeted(self.class_values, {method: float(np.mean(own)) for method, own in shares.items()})

    @cached_property
    def matrix(self) -> pl.DataFrame:
        """Class × block: the accuracy that each class loses without each block, one at a time: method, draw, removed, n_features, task, lost, low,
        high, n. Greatest loss first."""
        rows = self.verdict.matrix_values.filter(pl.col("metric") == Metric.ACCURACY.value)
        # The mean of what is lost is the ratio of means to 1.
        lost = rows.with_columns((pl.col("full") - pl.col("value")).alias("value"), full=pl.lit(1.0), empty=pl.lit(0.0))
        table = faithfulness(lost, by=("task", "draw"), averaging=(Averaging.RATIO_OF_MEANS,))
        names = pl.DataFrame(
            [
                {"method": c.method, "draw": c.draw, "size": unit, "removed": c.units.names[unit], "n_features": int(c.live[unit])}
                for c in self.verdict.competitors for unit in range(len(c.units))
            ],
            schema={"method": pl.String, "draw": pl.Int64, "size": pl.Int64, "removed": pl.String, "n_features": pl.Int64},
        )  # fmt: skip
        joined = table.join(names, on=["method", "draw", "size"], how="inner")
        return joined.select("method", "draw", "removed", "n_features", "task", pl.col("value").alias("lost"), "low", "high", "n")

    @cached_property
    def curve(self) -> pl.DataFrame:
        """Accuracy against the share of live features in the strongest blocks, classes pooled: method, part, share, n_units, accuracy, full."""
        rows = self.verdict.values.filter(pl.col("metric") == Metric.ACCURACY.value)
        kept = self.verdict.kept.select("method", "ablation", "size", "draw", "share", "n_units", "n_features")
        joined = rows.join(kept, on=["method", "ablation", "size", "draw"], how="left")
        means = joined.group_by("method", "part", "share", maintain_order=True).agg(
            pl.col("n_units", "n_features").mean(), pl.col("value").mean().alias("accuracy"), pl.col("full").mean()
        )
        return means.with_columns(pl.col("part").replace_strict(_PARTS)).sort("method", "part", "share")

    @cached_property
    def selectivity(self) -> pl.DataFrame:
        """How much of what one block breaks is one class's alone, by the logit difference, as `region_study.SELECTIVITY`."""
        return selectivity(self.verdict.matrix_values.filter(pl.col("metric") == Metric.LOGIT_DIFF.value))

    @property
    def accuracy(self) -> float:
        """Of the whole network, on all images that it was not trained on."""
        return self.digits.accuracy(self.digits.test)


def run_vision(
    options: VisionOptions,
    *,
    digits: Digits | None = None,
    say: Callable[[str], None] = lambda said: None,
    progress: Callable[[str], AbstractContextManager[Progress]] = lambda label: nullcontext(lambda done, total: None),
) -> VisionVerdict:
    """Train the network unless given, find its regions, and put them to the test. `say` is told what goes on in finding regions."""
    options.check()
    if digits is None:
        say("training")
        digits = train_digits(seed=options.seed, epochs=options.epochs)
    study = digits_study(digits, options)
    run, samples = sampled(study, digits)
    parcellation = find_parcellation(run, samples, options.finding, progress=say)
    rivals = {
        name: find_parcellation(run, samples, like(options.finding, parcellation, PartitionMethod(name)), progress=say) for name in options.against
    }
    found, tested = study_pairs(study, digits, options)
    verdict = put_to_the_test(study, {REGIONS: parcellation, **rivals}, found, tested, options.tests, progress=progress)
    trials = [one for own in verdict.competitors for one in class_trials(own, options.share, per_member=options.per_member)]
    trials += random_choices(verdict.regions, options.share, options.random_draws, options.seed)
    among = list({pair.key: pair for pair in (*found, *tested)}.values())
    with progress("blocks of each class") as report:
        values = measure(study, tested, [one.trial for one in trials], split=HELD_OUT, among=among, progress=report)
    return VisionVerdict(options, digits, study, parcellation, samples, verdict, trials, values)


def study_pairs(study: Study, digits: Digits, options: VisionOptions) -> tuple[list[Pair], list[Pair]]:
    """(attributed, tested): images that the network was trained on, and others, as many of each class."""
    binding = study.binding
    assert isinstance(binding, LayeredNetwork)
    chosen = (per_class(digits.train, digits.labels, options.attributed), per_class(digits.test, digits.labels, options.tested))
    found, tested = (image_pairs(binding, digits.labels, own, digits.train, seed=options.seed) for own in chosen)
    return found, tested


# --- out of the program -----------------------------------------------------------------------------------------------


def as_json(found: VisionVerdict) -> dict[str, object]:
    """A verdict for machines."""
    sites = {
        name: {"n_blocks": own.levels[own.chosen].n_blocks, "n_live": len(own.features), "d_sae": own.d_sae, "notes": dict(own.notes)}
        for name, own in found.parcellation.sites.items()
    }
    return {
        "model": found.digits.key, "accuracy": found.accuracy, "baseline": found.study.baseline_name, "share": found.options.share,
        "parcellation": found.parcellation.key, "method": found.parcellation.method, "sites": sites, "targeted": found.targeted.to_dicts(),
        "classes": found.class_table.to_dicts(), "matrix": found.matrix.to_dicts(), "matrix_logit_diff": found.verdict.matrix.to_dicts(),
        "curve": found.curve.to_dicts(),
        "selectivity": found.selectivity.to_dicts(), "attributed": found.verdict.n_found, "tested": found.verdict.n_tested,
    }  # fmt: skip


def page(found: VisionVerdict) -> str:
    """The figures as one page: accuracy by class, regions one by one, shares, selectivity, and the correlations that they were found in."""
    regions, baseline = found.parcellation, found.study.baseline_name
    fixed = f"{found.options.share:.0%} of the blocks, baseline {baseline}, {found.verdict.n_tested} images that it was not trained on"
    exhibits = []
    for method in dict.fromkeys(own.method for own in found.verdict.competitors):
        rows = found.class_table.filter((pl.col("method") == method) & (pl.col("part") == CUT))
        shown = rows.select("task", pl.format("{}'s", "ranked_for").alias("removed"), pl.col("accuracy").alias("value"), "low", "high", "n")
        own = removal_exhibit(shown, fixed, name=f"classes-{method.replace(' ', '-')}")
        exhibits.append(replace(own, title=f"Accuracy by class with each class's strongest blocks cut: {method}"))
    table = found.verdict.table
    exhibits += [
        matrix_exhibit(found.verdict.matrix, f"logit difference, baseline {baseline}"),
        sweep_exhibit(table, Metric.ACCURACY.value), selectivity_exhibit(found.selectivity, f"logit difference, baseline {baseline}"),
        *(correlation_exhibit(regions.sites[own.site], correlation(own, regions.sites[own.site].features)) for own in found.samples),
        *path_exhibits(regions),
    ]  # fmt: skip
    settings = [
        ("network", found.digits.key), ("accuracy", f"{found.accuracy:.4f}"), ("regions", regions.method),
        ("share of blocks", f"{found.options.share:g}"),
        ("images of each class", f"{found.options.attributed} attributed, {found.options.tested} tested"), ("baseline", baseline),
    ]  # fmt: skip
    return gallery(exhibits, "Regions of a vision model", subtitle="a convolutional network on handwritten digits", settings=settings)
