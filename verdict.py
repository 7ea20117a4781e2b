"""The verdict on a run's circuits: a sweep with its controls, its numbers written back, and the page that shows them.

1. `try_circuits`: the circuits of growing size, or circuits of the graph, put to the test on held-out sequences beside controls of equal size.
2. `write_back`: the circuits and their scores into the graph, every value into the statistics store.
3. `page`, `effects_page`, `mixture_page`: the figures.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import polars as pl
import torch

from .analysis.circuits import Circuit, Selection, run_candidates, write_circuit
from .analysis.controls import Method, mean_changes
from .analysis.faithfulness import FOUND, HELD_OUT, VALUES, faithfulness, with_sizes
from .analysis.gallery import Exhibit, GalleryOptions, effects_exhibit, gallery, improvement_exhibit, removal_exhibit, sweep_exhibits
from .analysis.mixtures import Mixture
from .analysis.notes import readable
from .analysis.scores import DefaultScore, ScoresWritten, estimated_and_measured, mean_effects, read_sweep, write_scores, write_sweep
from .analysis.study import Split, Study, found_pairs, halves, held_out_pairs, own_baseline_name
from .analysis.sweeps import BadGrid, Contender, Sweep, SweepPlan, check_unseen, control_contenders, own_contenders, run_sweep, subject_of
from .errors import UserError
from .ingest.effective import EdgeSettings, FirstFactor, Prepared, node_attributions, prepare
from .model.metrics import Metric
from .model.sites import Site
from .model.targets import LogitTarget
from .model.tasks import Pair
from .queries.schema import feature_key
from .queries.statistics import StatisticsStore
from .queries.store import GraphStore
from .queries.subgraphs import RunRow, find_run, model_features

CONTROLS = (Method.RANDOM_EDGES, Method.SHUFFLED_WEIGHTS, Method.RANDOM_NODES, Method.TOP_ACTIVATIONS, Method.NODE_ATTRIBUTION)
"""The controls of a sweep unless told otherwise: all there are."""

LARGEST_WRITTEN = 5_000
"""Edges of the largest circuit of a sweep that is written into the graph, unless told otherwise; the scores of all are in the statistics store."""


class NothingMeasured(UserError):
    """No values are kept of a run's circuits."""


@dataclass(frozen=True)
class VerdictOptions:
    """controls: beside our circuits, each that is random with `control_draws` seeds. largest_written: see `LARGEST_WRITTEN`."""

    controls: tuple[Method, ...] = CONTROLS
    control_draws: int = 3
    largest_written: int = LARGEST_WRITTEN

    def check(self) -> None:
        """Raise a `UserError` for a number out of range."""
        if self.control_draws < 1:
            raise UserError(f"--control-draws {self.control_draws} is too small: give at least 1, or --controls none")


def try_circuits(plan: SweepPlan, options: VerdictOptions, *, progress: Callable[[int, int], None] | None = None) -> Sweep:
    """Measure a plan's circuits and their controls on its testing sequences."""
    study, found = plan.study, plan.found
    effects = node_effects(study, found, plan.donors) if Method.NODE_ATTRIBUTION in options.controls else None
    activations = None
    if Method.TOP_ACTIVATIONS in options.controls:
        activations = mean_changes(study.batches(found, study.seeds[0], plan.donors), study.model.key)
    contenders: list[Contender] = own_contenders(plan)
    contenders += control_contenders(plan, options.controls, draws=options.control_draws, effects=effects, activations=activations)
    return run_sweep(plan, contenders, progress=progress)


def node_effects(study: Study, pairs: Sequence[Pair], among: Sequence[Pair] | None = None) -> pl.DataFrame:
    """What each node sends to the output on every path, as sparse feature circuits choose nodes (Marks et al. 2024): `key`, `effect`.

    The attribution of every node with the run's own steps, from the baseline that nodes are ablated to, summed over positions; the mean of
    its magnitude over sequences. among: as for `Study.batches`.
    """
    totals: dict[str, torch.Tensor] = {}
    stems: dict[str, str] = {}
    for _, effects in attributed(study, pairs, among):
        for site, per_sequence in effects:
            total = per_sequence.abs().sum(dim=0).cpu().double()
            totals[site.name] = totals[site.name] + total if site.name in totals else total
            stems[site.name] = feature_key(study.model.key, study.dictionaries[site].id, site, "")
    frames = []
    for name, total in totals.items():
        chosen = total.nonzero().flatten()
        index = ["error" if i == len(total) - 1 else str(i) for i in chosen.tolist()]
        rows = {"key": [stems[name] + i for i in index], "effect": (total[chosen] / len(pairs)).tolist()}
        frames.append(pl.DataFrame(rows, schema={"key": pl.String, "effect": pl.Float64}))
    return pl.concat(frames)


def attributed(
    study: Study, pairs: Sequence[Pair], among: Sequence[Pair] | None = None
) -> Iterator[tuple[Prepared, Iterator[tuple[Site, torch.Tensor]]]]:
    """Batch by batch what is ready for attribution, and site by site what each node of it sends to the output on every path, positions summed.

    Effects are (batch, d_sae + 1), the error node last. By the run's metric, steps and first factor, from the baseline that nodes are ablated to.
    """
    settings = attribution_settings(study)
    for batch in study.pair_batches(pairs, study.seeds[0], among):
        prepared = prepare(study.binding, study.dictionaries, batch, settings, study.moments, study.target)
        effects = (
            (site, torch.cat([features.sum(dim=1), errors.sum(dim=1)[:, None]], dim=1)) for site, features, errors in node_attributions(prepared)
        )
        yield prepared, effects


def attribution_settings(study: Study) -> EdgeSettings:
    """The run's metric, number of steps and first factor, with the baseline that nodes are ablated to."""
    options = study.options
    engine = json.loads(str(study.run.properties.get("settings") or "{}")).get("engine") or {}
    return EdgeSettings(
        metric=study.target.metric if isinstance(study.target, LogitTarget) else Metric.LOGIT_DIFF, baseline=study.baseline,
        steps=int(str(study.run.properties.get("steps") or 1)), first_factor=FirstFactor(engine.get("first_factor", FirstFactor.EXACT.value)),
        tolerance=float(engine.get("tolerance", EdgeSettings.tolerance)), per_position=options.per_position, noise_scale=options.noise_scale,
        noise_seed=options.seed, memory=options.memory,
    )  # fmt: skip


# --- writing back -----------------------------------------------------------------------------------------------------


def write_back(store: GraphStore, statistics: StatisticsStore, study: Study, sweep: Sweep, options: VerdictOptions) -> ScoresWritten:
    """The circuits with at most `largest_written` edges and all their scores into the graph; every value into the statistics store.

    Doing it twice is doing it once.
    """
    write_sweep(statistics, sweep.run, sweep.subject, sweep.values, sweep.sizes)
    written = [circuit for circuit in sweep.lasting if circuit.n_edges <= options.largest_written]
    for circuit in written:
        write_circuit(store, circuit)
    by_task = with_sizes(faithfulness(sweep.values, by=("task",)), sweep.sizes)
    # One task's sequences are no pool where circuits are of all tasks: these have a pooled score of another meaning.
    table = by_task if sweep.task_alone else pl.concat([sweep.table, by_task])
    own = pl.col("circuit").is_in([circuit.key for circuit in written])
    shown_sizes = table.filter(own).select("ablation", "size").unique()
    rows = table.filter(own | pl.col("circuit").is_null()).join(shown_sizes, on=["ablation", "size"], how="semi")
    seed = study.options.seed if study.baseline.drawn else 0
    return write_scores(store, study.run, rows, default=default_score(study, sweep), seed=seed)


def default_score(study: Study, sweep: Sweep) -> DefaultScore:
    """Which score the circuits show themselves: by the run's own metric and baseline, on held-out sequences."""
    return replace(DefaultScore.of(study.run), baseline=own_baseline_name(study.run), averaging=sweep.averaging)


def testing_pairs(
    store: GraphStore, study: Study, split: Split, n: int, circuit: Circuit | None
) -> tuple[tuple[str, ...] | None, list[Pair], str]:
    """Keys of the sequences to find a circuit on (None for all of the run's), those to test on, and the name of the split that they are.

    A circuit of one sequence is tested on that sequence, one of a task on that task.
    Raises `BadGrid` where `circuit`, if one is given, is of another run or was found on what it would be tested on.
    """
    found = found_pairs(store, study.run)
    if circuit is not None and circuit.selection.run != study.run.key:
        raise BadGrid(f"circuit {circuit.key[:12]} is of run {circuit.selection.run}, not of {study.run.key}: name the one or the other")
    sequence, task = (None, None) if circuit is None else (circuit.selection.sequence, circuit.selection.task)
    done = [pair for pair in found if task in (None, pair.task) and sequence in (None, pair.key)]
    if split is Split.FOUND or sequence is not None:
        return None, done, FOUND
    if split is Split.HALVES:
        finding, testing = halves(done, study.options.seed)
        check_unseen([] if circuit is None else [circuit], testing)
        return tuple(sorted(pair.key for pair in finding)), testing, HELD_OUT
    others = () if circuit is None else circuit.selection.other_runs
    seen = [*found, *(pair for name in others for pair in found_pairs(store, find_run(store, name)))]
    return None, held_out_pairs(study, seen, n, task=task), HELD_OUT


def donors(store: GraphStore, study: Study, pairs: Sequence[Pair]) -> Sequence[Pair]:
    """The sequences that a resampled baseline of `pairs` is drawn from: all of the run's, and these."""
    return list({pair.key: pair for pair in (*found_pairs(store, study.run), *pairs)}.values())


def readable_names(store: GraphStore, run: RunRow) -> dict[str, str]:
    """What a person calls the run's nodes: site, number and label."""
    rows = model_features(store, run.model).select("key", "site", "kind", "index", "label").iter_rows()
    return {key: _name(site, kind, index, label) for key, site, kind, index, label in rows}


def _name(site: str, kind: str, index: int, label: str | None) -> str:
    if kind == "output":
        return label or site
    number = "error" if kind == "error" else str(index)
    return f"{site}/{number}" + (f" {readable(label, 40)}" if label and kind == "feature" else "")


# --- out of the program -----------------------------------------------------------------------------------------------


def page(sweep: Sweep, study: Study) -> str:
    """The figures of a sweep as one page."""
    others = tuple(name for name in sweep.values["metric"].unique(maintain_order=True).to_list() if name != sweep.default_metric)
    candidates = sweep.n_candidates if sweep.reaches_all else None
    options = GalleryOptions(metric=sweep.default_metric, others=others, candidates=candidates, averaging=sweep.averaging, split=sweep.split)
    exhibits = sweep_exhibits(sweep.values, sweep.sizes, options)
    return gallery(exhibits, f"Circuits of {study.run.task}", subtitle=_subtitle(study), settings=_described(study, sweep.n_tested, sweep.split))


def improvement_page(sweep: Sweep, study: Study, gains: pl.DataFrame | None) -> str:
    """The figures of circuits by other rankings as one page; `gains` as `improved.gains` has them, None where the grid does not reach all."""
    options = GalleryOptions(
        metric=sweep.default_metric, candidates=sweep.n_candidates if sweep.reaches_all else None, averaging=sweep.averaging, split=sweep.split
    )
    exhibits = sweep_exhibits(sweep.values, sweep.sizes, options)
    if gains is not None:
        cpr = gains.filter(pl.col("area") == "CPR")
        exhibits.insert(0, improvement_exhibit(sweep.values, sweep.sizes, options, cpr))
    settings = _described(study, sweep.n_tested, sweep.split)
    return gallery(exhibits, f"Better circuits of {study.run.task}?", subtitle=_subtitle(study), settings=settings)


def stored_exhibits(
    store: GraphStore, statistics: StatisticsStore | None, run: RunRow, metric: str | None = None, baseline: str | None = None,
    split: str = HELD_OUT, task: str | None = None, candidates: int | None = None,
) -> list[Exhibit]:  # fmt: skip
    """The figures of what is kept of a run's circuits, or of those of one task of its mixture, or among so many candidates.

    Single effects are those by the same metric and baseline. Raises `NothingMeasured`.
    """
    wanted = baseline or own_baseline_name(run)
    selection = Selection(run.key, task=task)
    subject = subject_of(selection, candidates)
    values, sizes = pl.DataFrame(schema=dict(VALUES)), pl.DataFrame()
    if statistics is not None:
        (values, _), (_, sizes) = (read_sweep(statistics, run.key, subject, name) for name in (None, wanted))
    here = values.filter((pl.col("baseline") == wanted) & (pl.col("split") == split))
    cut = estimated_and_measured(store, run.key)
    effects = cut.filter(pl.col("baseline") == wanted)
    metrics = here["metric"].unique(maintain_order=True).to_list()
    known = list(dict.fromkeys([*metrics, *effects["metric"].unique().sort()]))
    if not known:
        others = sorted({*values["baseline"], *cut["baseline"]})
        raise NothingMeasured(
            f"nothing is kept of circuits of run {run.key} with baseline {wanted!r} on {split} sequences"
            + (f" (there are {', '.join(others)})" if others else "")
            + ": measure with `featlas analyze faithfulness` or `featlas analyze effects`; what --candidates or --task chose from is named again"
        )
    first = metric or (run.metric if run.metric in (metrics or known) else known[0])
    if first not in known:
        raise NothingMeasured(f"--metric {first!r} was not measured: there are {', '.join(known)}")
    effects = effects.filter(pl.col("metric") == first).drop("metric", "baseline")
    metrics = metrics if first in metrics else []
    exhibits = []
    if metrics:
        n = candidates or int((run_candidates(store, run, selection).strength > 0).sum())
        options = GalleryOptions(metric=first, others=tuple(name for name in metrics if name != first), candidates=n, split=split)
        exhibits += sweep_exhibits(here, sizes, options)
    if effects.height:
        exhibits.append(effects_exhibit(effects, f"{first}, baseline {wanted}, means over sequences"))
    return exhibits


def stored_page(
    store: GraphStore, statistics: StatisticsStore | None, run: RunRow, metric: str | None, baseline: str | None, split: str, task: str | None,
    candidates: int | None = None,
) -> str:  # fmt: skip
    """`stored_exhibits` as one page."""
    exhibits = stored_exhibits(store, statistics, run, metric, baseline, split, task, candidates)
    settings = [
        ("run", f"{run.key}: {run.task}, {run.properties.get('method')}, {run.properties.get('steps')} steps"), ("model", run.model),
        ("baseline", baseline or own_baseline_name(run)), ("sequences", split),
    ]  # fmt: skip
    return gallery(exhibits, f"Circuits of {run.task}", subtitle=f"{run.model} · run {run.key}", settings=settings)


def effects_page(circuit: Circuit, effects: pl.DataFrame, study: Study) -> str:
    """Estimated against measured effects of a circuit's edges as one page."""
    means = mean_effects(effects).filter((pl.col("metric") == study.default_metric) & pl.col("target").is_not_null())
    within = pl.when(pl.col("circuit").is_null()).then(pl.lit("full model")).otherwise(pl.lit("circuit"))
    rows = means.with_columns(within.alias("within")).join(circuit.edges.select("source", "target", "weight"), on=["source", "target"])
    shown = rows.select("source", "target", "within", pl.col("weight").alias("estimated"), pl.col("effect").alias("measured"))
    n = effects["sequence"].n_unique()
    fixed = f"{study.default_metric}, baseline {study.baseline_name}, {n} sequences ({effects['split'][0]})"
    exhibits = [effects_exhibit(shown, fixed)]
    return gallery(exhibits, f"Single edges of a circuit of {study.run.task}", subtitle=_subtitle(study), settings=_described(study, n, ""))


def mixture_page(mixture: Mixture, study: Study) -> str:
    """Task × removed part as one page."""
    exhibits = []
    fixed = f"{mixture.metric}, baseline {mixture.baseline}, {mixture.n_tested} held-out sequences"
    known = mixture.table.select("ablation", "quantity").unique(maintain_order=True)
    for ablation, quantity in known.iter_rows():
        rows = mixture.table.filter((pl.col("ablation") == ablation) & (pl.col("quantity") == quantity))
        name = f"removals-{ablation}-{quantity}".replace("_", "-")
        shown = rows.select("task", "removed", "value", "low", "high", "n")
        exhibits.append(removal_exhibit(shown, f"{ablation}s cut; {fixed}", quantity=quantity.replace("_", " "), name=name))
    return gallery(exhibits, f"Mixture {study.run.task}", subtitle=_subtitle(study), settings=_described(study, mixture.n_tested, HELD_OUT))


def _subtitle(study: Study) -> str:
    return f"{study.model.key} · run {study.run.key}"


def _described(study: Study, n_tested: int, split: str) -> list[tuple[str, str]]:
    """What determines the numbers of a page."""
    options, run = study.options, study.run
    sites = ", ".join(f"{site} ({name})" for site, name in run.dictionaries.items())
    return [
        ("run", f"{run.key}: {run.task}, {run.properties.get('method')}, {run.properties.get('steps')} steps"), ("model", study.model.key),
        ("sites (dictionaries)", sites), ("baseline", study.baseline_name),
        ("tested sequences", f"{n_tested} {split}".strip()), ("draws of the baseline", str(len(study.seeds))), ("seed", str(options.seed)),
    ]  # fmt: skip


def as_json(sweep: Sweep) -> dict[str, object]:
    """A sweep for machines."""
    return {
        "run": sweep.run, "split": sweep.split, "metric": sweep.default_metric, "candidates": sweep.n_candidates, "found": sweep.n_found,
        "tested": sweep.n_tested, "table": sweep.table.to_dicts(), "by_task": sweep.by_task.to_dicts(),
        "areas": sweep.areas.to_dicts() if sweep.reaches_all else [], "smallest": sweep.smallest.to_dicts(),
    }  # fmt: skip


def values_with_sizes(sweep: Sweep) -> pl.DataFrame:
    """Every value with the size of its circuit."""
    return sweep.values.join(sweep.sizes, on=["method", "ablation", "size", "draw"], how="left")
