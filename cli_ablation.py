"""Commands that put circuits to the test by ablation: faithfulness, single effects, mixtures of tasks, and the page of figures."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import completion, console, files
from .errors import UserError
from .options import (
    DEFAULT_ATLAS,
    Atlas,
    BadParameterValue,
    BatchSize,
    ByOption,
    Device,
    Graph,
    Json,
    Mean,
    Memory,
    NoiseScale,
    Run,
    Seed,
    StatisticsRun,
    analyze_app,
    app,
    memory_bytes,
    open_atlas,
    open_statistics,
    split_names,
)

if TYPE_CHECKING:
    import polars as pl

    from .analysis.circuits import Circuit
    from .analysis.study import Study
    from .queries.store import GraphStore
    from .queries.subgraphs import RunRow


class BadList(UserError):
    """An option's list holds something that it cannot."""


Model = Annotated[str | None, typer.Option("--model", help="The run's model, where the atlas has no manifest of the run.")]
Dictionaries = Annotated[str | None, typer.Option("--dictionaries", help="The run's dictionaries, where the atlas has no manifest of the run.")]
Probe = Annotated[str | None, typer.Option("--target", help="The probe's .safetensors file, for a run whose output was a probe.")]
AblationBaseline = Annotated[
    Literal["counterfactual", "resample", "zero", "mean", "noise"] | None,
    typer.Option("--baseline", help="What a cut node is worth; the run's own baseline unless given."),
]
Draws = Annotated[int, typer.Option("--draws", help="With --baseline resample or noise: draws for each sequence, averaged.")]
ErrorNodes = Annotated[
    Literal["listed", "kept", "dead"],
    typer.Option("--errors", help="Error nodes: alive where the circuit has them, all alive, or none."),
]
Metrics = Annotated[str, typer.Option("--metrics", help="What is measured, comma-separated: logit_diff, log_prob, kl, tv, accuracy, mrr.")]
SplitOption = Annotated[
    Literal["fresh", "halves", "found"],
    typer.Option("--split", help="Test on new sequences of the task, on the half that the circuit was not found on, or on those that it was."),
]
HeldOut = Annotated[int, typer.Option("--held-out", help="With --split fresh: sequences to test on.")]
Ablations = Annotated[Literal["both", "edge", "node"], typer.Option("--ablation", help="What is cut to leave a circuit.")]
OneTask = Annotated[str | None, typer.Option("--task", help="Only the run's sequences of this task.")]
CircuitKeys = Annotated[
    str | None,
    typer.Option(
        "--circuit", autocompletion=completion.circuits,
        help="Circuits of the graph, by the beginnings of their keys, comma-separated, instead of a sweep.",
    ),
]  # fmt: skip
Sizes = Annotated[str | None, typer.Option("--sizes", help="Numbers of candidate edges to keep, comma-separated: 20,50,200.")]
Thresholds = Annotated[str | None, typer.Option("--thresholds", help="Strengths from which on an edge is kept, comma-separated.")]
Shares = Annotated[
    str | None, typer.Option("--shares", help="Shares of the candidates to keep, comma-separated; 0.001 to 1 in ten steps unless something is given.")
]
CandidateEdges = Annotated[int | None, typer.Option("--candidates", help="The candidates are the run's so many strongest edges; all unless given.")]
Controls = Annotated[
    str,
    typer.Option(
        "--controls",
        help="Controls of equal size: random-edges, shuffled-weights, random-nodes, top-activations, node-attribution; or all, or none.",
    ),
]
ControlDraws = Annotated[int, typer.Option("--control-draws", help="Seeds of each control that is random.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Save every value, as .parquet or .csv.")]
Gallery = Annotated[Path | None, typer.Option("--gallery", help="Save the figures as one HTML page.")]
Write = Annotated[bool, typer.Option("--write/--no-write", help="Write circuits and scores into the graph, every value into the statistics.")]


def named_metrics(text: str) -> tuple[Any, ...]:
    from .model.metrics import Metric

    known = {metric.value: metric for metric in Metric}
    if bad := [name for name in split_names(text) if name not in known]:
        raise BadList(f"--metrics {bad[0]!r} is no metric: choose from {', '.join(known)}")
    if not split_names(text):
        raise BadList(f"--metrics is empty: choose from {', '.join(known)}")
    return tuple(known[name] for name in split_names(text))


def number_list(option: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    """A list of numbers; raises `BadList`."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in split_names(text))
    except ValueError:
        example = "20,50,200" if kind is int else "0.01,0.1,1"
        raise BadList(f"{option} {text!r} is no list of {'whole ' if kind is int else ''}numbers: write {example}") from None


def _controls(text: str) -> tuple[Any, ...]:
    from .analysis.controls import Method

    known = {method.value.replace(" ", "-"): method for method in Method}
    if text == "all":
        return tuple(known.values())
    if text == "none":
        return ()
    if bad := [name for name in split_names(text) if name not in known]:
        raise BadList(f"--controls {bad[0]!r} is no control: choose from {', '.join(known)}; or all, or none")
    return tuple(known[name] for name in split_names(text))


def study_of(store: "GraphStore", run: "RunRow", atlas: Path, **options: Any) -> "Study":
    """The run with its model; `options` are those of `StudyOptions` in the command line's words."""
    from .analysis.study import StudyOptions, open_study
    from .model.ablation import Errors
    from .model.baselines import Baseline

    options["baseline"] = None if options["baseline"] is None else Baseline(options["baseline"])
    options["errors"] = Errors(options["errors"])
    options["per_position"] = options.pop("mean") == "per-position"
    settings = StudyOptions(**options)
    settings.check()
    return open_study(store, run, settings, atlas)


def named_ablations(name: str) -> tuple[Any, ...]:
    """What `--ablation` cuts."""
    from .analysis.study import Ablation

    return tuple(Ablation) if name == "both" else (Ablation(name),)


def save_frame(path: Path | None, frame: "Callable[[], pl.DataFrame]") -> None:
    """Make and save a table where a file was asked for, as CSV or parquet by its ending."""
    if path is not None:
        console.save_frame(frame(), path)


def save_page(path: Path | None, page: Callable[[], str]) -> None:
    """Make and save a page of figures where one was asked for."""
    if path is not None:
        with console.saving(path):
            files.write_text(path, page())


@analyze_app.command("faithfulness")
def analyze_faithfulness_command(
    run: Run = None,
    circuit: CircuitKeys = None,
    task: OneTask = None,
    sizes: Sizes = None,
    thresholds: Thresholds = None,
    shares: Shares = None,
    candidates: CandidateEdges = None,
    by: ByOption = "abs_weight",
    ablation: Ablations = "both",
    controls: Controls = "all",
    control_draws: ControlDraws = 3,
    split: SplitOption = "fresh",
    held_out: HeldOut = 32,
    per_sequence: Annotated[
        int, typer.Option("--per-sequence", help="Also give so many of the run's sequences circuits of their own, and test these on them.")
    ] = 0,
    complement: Annotated[bool, typer.Option("--complement/--no-complement", help="Test what is left without the circuit too: completeness.")] = True,
    metrics: Metrics = "logit_diff,kl,tv,accuracy,mrr",
    baseline: AblationBaseline = None,
    mean: Mean = "over-positions",
    noise_scale: NoiseScale = 1.0,
    draws: Draws = 1,
    errors: ErrorNodes = "listed",
    statistics_run: StatisticsRun = None,
    target: Probe = None,
    model: Model = None,
    dictionaries: Dictionaries = None,
    device: Device = "cpu",
    batch_size: BatchSize = 8,
    memory: Memory = "2GB",
    seed: Seed = 0,
    output: Output = None,
    gallery: Gallery = None,
    write: Write = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Does the circuit do the task? Circuits of growing size alone in the model, beside controls of equal size, on sequences not seen before."""
    from . import show_ablation, verdict
    from .analysis.circuits import By, read_circuit
    from .analysis.study import Split
    from .analysis.sweeps import SweepOptions, plan_sweep
    from .queries.statistics import StatisticsStore
    from .queries.subgraphs import find_run

    sweep_options = SweepOptions(
        sizes=number_list("--sizes", sizes, int), thresholds=number_list("--thresholds", thresholds, float),
        shares=number_list("--shares", shares, float),
        candidates=candidates, by=By(by), ablations=named_ablations(ablation), split=Split(split), held_out=held_out,
        complement=complement, task=task, per_sequence=per_sequence,
    )  # fmt: skip
    sweep_options.check()
    options = verdict.VerdictOptions(controls=_controls(controls), control_draws=control_draws)
    options.check()
    measured = named_metrics(metrics)
    with open_atlas(atlas, graph, write=write) as store:
        given: tuple[Circuit, ...] = tuple(read_circuit(store, key) for key in split_names(circuit or ""))
        found = find_run(store, run if run is not None or not given else given[0].selection.run)
        study = study_of(
            store, found, atlas, model=model, dictionaries=dictionaries, device=device, metrics=measured, baseline=baseline,
            statistics_run=statistics_run, mean=mean, noise_scale=noise_scale, draws=draws, seed=seed, errors=errors, batch_size=batch_size,
            memory=memory_bytes(memory), target=target,
        )  # fmt: skip
        plan = plan_sweep(store, study, sweep_options, circuits=given)
        with console.progress("sequences", quiet=as_json) as bar:
            sweep = verdict.try_circuits(plan, options, progress=lambda done, total: bar(done, total, ""))
        # shown and saved first: what was measured is not lost where writing fails
        save_frame(output, lambda: verdict.values_with_sizes(sweep))
        save_page(gallery, lambda: verdict.page(sweep, study))
        if as_json:
            console.say_json(verdict.as_json(sweep))
        else:
            if given and given[0].selection.sequence is not None:
                console.note("a circuit of one sequence is tested on that sequence: --split and --held-out do not matter")
            show_ablation.show_sweep(sweep)
            if gallery is not None:
                console.say(f"the figures: {gallery}")
        if write:
            with StatisticsStore(atlas) as statistics:
                verdict.write_back(store, statistics, study, sweep, options)


@analyze_app.command("effects")
def analyze_effects_command(
    run: Run = None,
    circuit: Annotated[
        str | None, typer.Option("--circuit", autocompletion=completion.circuits, help="A circuit of the graph, by the beginning of its key.")
    ] = None,
    edges: Annotated[int, typer.Option("--edges", help="Without --circuit: the circuit of about so many of the run's strongest edges.")] = 200,
    within: Annotated[
        Literal["both", "model", "circuit"], typer.Option("--within", help="Cut each edge in the whole model, in the circuit, or both.")
    ] = "both",
    nodes: Annotated[bool, typer.Option("--nodes/--no-nodes", help="Cut each node too.")] = True,
    split: SplitOption = "fresh",
    held_out: HeldOut = 16,
    metrics: Metrics = "logit_diff",
    baseline: AblationBaseline = None,
    mean: Mean = "over-positions",
    noise_scale: NoiseScale = 1.0,
    draws: Draws = 1,
    errors: ErrorNodes = "listed",
    statistics_run: StatisticsRun = None,
    target: Probe = None,
    model: Model = None,
    dictionaries: Dictionaries = None,
    device: Device = "cpu",
    batch_size: BatchSize = 8,
    memory: Memory = "2GB",
    seed: Seed = 0,
    show_n: Annotated[int, typer.Option("--show", help="Edges and nodes to show.")] = 15,
    gallery: Gallery = None,
    write: Annotated[bool, typer.Option("--write/--no-write", help="Write the effects onto the graph's edges and nodes.")] = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """What the metric loses when one edge, or one node, of a circuit alone is cut: in the whole model, and in the circuit."""
    from . import show_ablation, verdict
    from .analysis.circuits import Selection, read_circuit, run_circuit, write_circuit
    from .analysis.scores import mean_effects, write_effects
    from .analysis.single_effects import EffectOptions, measure_effects
    from .analysis.study import Split
    from .queries.statistics import StatisticsStore
    from .queries.subgraphs import find_run

    for option, value in (("--edges", edges), ("--held-out", held_out), ("--show", show_n)):
        if value < 1:
            raise BadParameterValue(f"{option} {value} is too small: give at least 1")
    measured = named_metrics(metrics)
    with open_atlas(atlas, graph, write=write) as store:
        given = None if circuit is None else read_circuit(store, circuit)
        found = find_run(store, run if run is not None or given is None else given.selection.run)
        study = study_of(
            store, found, atlas, model=model, dictionaries=dictionaries, device=device, metrics=measured, baseline=baseline,
            statistics_run=statistics_run, mean=mean, noise_scale=noise_scale, draws=draws, seed=seed, errors=errors, batch_size=batch_size,
            memory=memory_bytes(memory), target=target,
        )  # fmt: skip
        finding, pairs, name = verdict.testing_pairs(store, study, Split(split), held_out, given)
        chosen = given or run_circuit(store, found, Selection(found.key, sequences=finding), n_edges=edges)
        wanted = EffectOptions(in_model=within != "circuit", in_circuit=within != "model", nodes=nodes)
        with console.progress("sequences", quiet=as_json) as bar:
            effects = measure_effects(
                study, chosen, pairs, wanted, split=name, among=verdict.donors(store, study, pairs),
                progress=lambda done, total: bar(done, total, ""),
            )  # fmt: skip
        names = verdict.readable_names(store, found)
        means = mean_effects(effects)
        save_page(gallery, lambda: verdict.effects_page(chosen, effects, study))
        if as_json:
            console.say_json({"run": found.key, "circuit": chosen.key, "effects": means.to_dicts()})
        else:
            fixed = (
                f"circuit {chosen.key} of run {found.key}: metric {study.default_metric}, baseline {study.baseline_name}, "
                f"{effects['sequence'].n_unique()} sequences ({name}); effects are means over them, an edge or node is cut at all positions"
            )
            show_ablation.show_effects(means.filter(means["metric"] == study.default_metric), names, show_n, fixed=fixed)
        if write:
            write_circuit(store, chosen)
            with StatisticsStore(atlas) as statistics:
                written = write_effects(store, statistics, found, effects, metric=study.default_metric, baseline=study.baseline_name)
            if not as_json:
                show_ablation.show_written(written)


@analyze_app.command("mixture")
def analyze_mixture_command(
    run: Run = None,
    edges: Annotated[int, typer.Option("--edges", help="Strongest edges of each task's circuit, before pruning.")] = 500,
    by: ByOption = "abs_weight",
    ablation: Ablations = "both",
    control_draws: ControlDraws = 3,
    held_out: Annotated[int, typer.Option("--held-out", help="New sequences to test on, shared evenly among the tasks.")] = 48,
    metrics: Metrics = "logit_diff,accuracy",
    baseline: AblationBaseline = None,
    mean: Mean = "over-positions",
    noise_scale: NoiseScale = 1.0,
    draws: Draws = 1,
    errors: ErrorNodes = "listed",
    statistics_run: StatisticsRun = None,
    model: Model = None,
    dictionaries: Dictionaries = None,
    device: Device = "cpu",
    batch_size: BatchSize = 8,
    memory: Memory = "2GB",
    seed: Seed = 0,
    gallery: Gallery = None,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """In a run of several tasks: what each task loses when the part of the graph that belongs to one of them alone is removed."""
    from . import show_ablation, verdict
    from .analysis.circuits import By
    from .analysis.mixtures import MixtureOptions, run_mixture
    from .queries.subgraphs import find_run

    options = MixtureOptions(edges, By(by), held_out, control_draws, named_ablations(ablation))
    options.check()
    measured = named_metrics(metrics)
    with open_atlas(atlas, graph, write=False) as store:
        found = find_run(store, run)
        study = study_of(
            store, found, atlas, model=model, dictionaries=dictionaries, device=device, metrics=measured, baseline=baseline,
            statistics_run=statistics_run, mean=mean, noise_scale=noise_scale, draws=draws, seed=seed, errors=errors, batch_size=batch_size,
            memory=memory_bytes(memory),
        )  # fmt: skip
        with console.progress("sequences", quiet=as_json) as bar:
            mixture = run_mixture(store, study, options, progress=lambda done, total: bar(done, total, ""))
    save_page(gallery, lambda: verdict.mixture_page(mixture, study))
    if as_json:
        console.say_json({"run": mixture.run, "table": mixture.table.to_dicts(), "overlap": mixture.overlap.to_dicts()})
    else:
        show_ablation.show_mixture(mixture)


@app.command("plot")
def plot_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page to write.")] = Path("gallery.html"),
    run: Run = None,
    metric: Annotated[str | None, typer.Option("--metric", help="The metric to look at first; the run's own unless given.")] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The baseline by its name in figures: zero, 'mean per position'; the run's own unless given.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Circuits of one task of the run's mixture, measured with --task.")] = None,
    candidates: Annotated[
        int | None, typer.Option("--candidates", help="Circuits among the run's so many strongest edges, measured with --candidates.")
    ] = None,
    split: Annotated[
        Literal["held-out", "found"], typer.Option("--on", help="Values on sequences not seen before, or on those that circuits were found on.")
    ] = "held-out",
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """A gallery of what was measured of a run's circuits and kept: faithfulness, controls, single effects; nothing is measured anew."""
    from . import verdict
    from .queries.subgraphs import find_run

    with open_atlas(atlas, graph, write=False) as store, console.saving(output):
        found = find_run(store, run)
        statistics = open_statistics(atlas)
        try:
            page = verdict.stored_page(store, statistics, found, metric, baseline, split, task, candidates)
        finally:
            if statistics is not None:
                statistics.close()
        files.write_text(output, page)
    if as_json:
        console.say_json({"output": str(output), "run": found.key})
    else:
        console.say(f"wrote {output}: open it in any browser")


@analyze_app.command("improve")
def analyze_improve_command(
    run: Run = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Rankings beside attribution, comma-separated: measured (effects), greedy (pruning), learned (gates).")
    ] = "measured,greedy,learned",
    candidates: Annotated[int, typer.Option("--candidates", help="The candidates are the run's so many strongest edges.")] = 400,
    sizes: Sizes = None,
    shares: Annotated[str, typer.Option("--shares", help="Shares of the candidates to keep, comma-separated.")] = "0.05,0.1,0.2,0.35,0.5,0.75,1",
    by: ByOption = "abs_weight",
    task: OneTask = None,
    found: Annotated[int, typer.Option("--found", help="Sequences of the run that the rankings are made on.")] = 8,
    drop: Annotated[float, typer.Option("--drop", help="Greedy pruning: the share of the edges that goes in a round.")] = 0.2,
    train_steps: Annotated[int, typer.Option("--train-steps", help="Learned gates: steps of Adam.")] = 120,
    rate: Annotated[float, typer.Option("--rate", help="Learned gates: Adam's rate.")] = 0.1,
    penalty: Annotated[float, typer.Option("--penalty", help="Learned gates: what all gates open costs, beside losing all of the metric, 1.")] = 0.5,
    split: SplitOption = "fresh",
    held_out: HeldOut = 16,
    metrics: Metrics = "logit_diff,kl",
    baseline: AblationBaseline = None,
    mean: Mean = "over-positions",
    noise_scale: NoiseScale = 1.0,
    draws: Draws = 1,
    errors: ErrorNodes = "listed",
    statistics_run: StatisticsRun = None,
    target: Probe = None,
    model: Model = None,
    dictionaries: Dictionaries = None,
    device: Device = "cpu",
    batch_size: BatchSize = 8,
    memory: Memory = "2GB",
    seed: Seed = 0,
    output: Output = None,
    gallery: Gallery = None,
    write: Write = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Circuits pruned by measured effects, or by trained gates, instead of attribution: what is gained on sequences not seen before."""
    from . import show_ablation, verdict
    from .analysis.circuits import By
    from .analysis.improved import ImprovementOptions, gains, run_improvement
    from .analysis.improvement import Training
    from .analysis.study import Ablation, Split
    from .analysis.sweeps import SweepOptions, plan_sweep
    from .queries.statistics import StatisticsStore
    from .queries.subgraphs import find_run

    own = None if sizes is not None else number_list("--shares", shares, float)
    sweep_options = SweepOptions(
        sizes=number_list("--sizes", sizes, int), shares=own, candidates=candidates, by=By(by), ablations=(Ablation.EDGE,), split=Split(split),
        held_out=held_out, complement=False, task=task,
    )  # fmt: skip
    sweep_options.check()
    options = ImprovementOptions(_improvements(methods), found, drop, Training(train_steps, rate, penalty, seed))
    options.check()
    measured = named_metrics(metrics)
    with open_atlas(atlas, graph, write=write) as store:
        chosen = find_run(store, run)
        study = study_of(
            store, chosen, atlas, model=model, dictionaries=dictionaries, device=device, metrics=measured, baseline=baseline,
            statistics_run=statistics_run, mean=mean, noise_scale=noise_scale, draws=draws, seed=seed, errors=errors, batch_size=batch_size,
            memory=memory_bytes(memory), target=target,
        )  # fmt: skip
        plan = plan_sweep(store, study, sweep_options)
        with console.progress("sequences", quiet=as_json) as bar:
            say = (lambda _: None) if as_json else console.note
            sweep = run_improvement(plan, options, say=say, progress=lambda done, total: bar(done, total, ""))
        gained = gains(sweep) if sweep.reaches_all else None
        save_frame(output, lambda: verdict.values_with_sizes(sweep))
        save_page(gallery, lambda: verdict.improvement_page(sweep, study, gained))
        if as_json:
            console.say_json({**verdict.as_json(sweep), "gains": [] if gained is None else gained.to_dicts()})
        else:
            show_ablation.show_improvement(sweep, gained)
        if write:
            with StatisticsStore(atlas) as statistics:
                verdict.write_back(store, statistics, study, sweep, verdict.VerdictOptions())


def _improvements(text: str) -> tuple[Any, ...]:
    from .analysis.improved import Improvement

    known = {"measured": Improvement.REMEASURED, "greedy": Improvement.GREEDY, "learned": Improvement.LEARNED}
    if (bad := [name for name in split_names(text) if name not in known]) or not split_names(text):
        raise BadList(f"--methods {(bad or [text])[0]!r} is no ranking: choose from {', '.join(known)}")
    return tuple(known[name] for name in split_names(text))
