"""The command `featlas`: each command opens, calls, prints.

Heavy imports stand inside the commands, so that `featlas --help` answers at once. A user's mistake is one line on standard
error and exit code 2, a failure one line and 1; anything else is a bug and keeps its traceback.
"""

from . import starting  # noqa: F401, I001 - first: it says what Ctrl-C does while the others are imported

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import checks, cli_statistics, completion, console, running
from .console import Format
from .options import (
    BOS,
    DEFAULT_ATLAS,
    DEMO_DICTIONARIES,
    DEMO_MODEL,
    Architecture,
    AskPassword,
    Atlas,
    BadParameterValue,
    Baseline,
    Basis,
    BatchSize,
    Bos,
    ByOption,
    Device,
    Dictionaries,
    Dtype,
    EdgeBatchSize,
    FirstFactor,
    Graph,
    Json,
    Keep,
    Limit,
    Mean,
    Memory,
    Metric,
    Model,
    NoiseScale,
    NormScale,
    NoSuchDictionaries,
    NotBoth,
    Positions,
    Quiet,
    Reach,
    Rule,
    Run,
    Screen,
    Seed,
    ShowVersion,
    Sites,
    SkipInvalid,
    StatisticsRun,
    Steps,
    TailDtype,
    Target,
    Task,
    Tolerance,
    WirePaths,
    WireWeight,
    WrongModel,
    analyze_app,
    app,
    corpus_option,
    dictionaries_app,
    ingest_app,
    load_named,
    memory_bytes,
    neo4j_app,
    open_atlas,
    open_statistics,
    password_from_terminal,
    split_names,
    task_option,
    within_context,
    tasks_app,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .analysis.circuits import Circuit
    from .analysis.summary import Summary
    from .ingest.effective import EdgeSettings
    from .ingest.lookup import VirtualWeights
    from .model.pairs import Pair, Refusal
    from .queries.store import GraphStore
    from .queries.subgraphs import RunRow


@app.callback(invoke_without_command=True)
def root(context: typer.Context, version: ShowVersion = False, quiet: Quiet = False, ask_password: AskPassword = False) -> None:
    """featlas: a feature atlas of neural networks, in a graph database."""
    console.be_quiet(quiet)
    if ask_password and context.invoked_subcommand is not None:
        password_from_terminal()
    if version:
        from importlib import metadata

        console.say(f"featlas {metadata.version('featlas')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.say(context.get_help())
        raise typer.Exit(2)


# --- tasks -----------------------------------------------------------------------------------------------------------

TaskArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK", callback=checks.task, autocompletion=completion.tasks, help="Task name, a mixture a+b+c, or a JSONL file of pairs."
    ),
]  # fmt: skip


@tasks_app.command("list")
def tasks_list_command(as_json: Json = False) -> None:
    """The tasks, and what a model must represent to solve each."""
    from .model.tasks import TASKS

    if as_json:
        console.say_json([{"task": task.name, "summary": task.summary, "feature": task.feature} for task in TASKS.values()])
    else:
        console.table(("task", "summary"), [(task.name, task.summary) for task in TASKS.values()])


@tasks_app.command("show")
def tasks_show_command(
    task: TaskArgument, model: Model = DEMO_MODEL, limit: Limit = 10, seed: Seed = 0, skip_invalid: SkipInvalid = False, as_json: Json = False
) -> None:
    """Some pairs of a task, as built for the model's tokenizer."""
    from dataclasses import asdict

    from .model.tasks import TASKS

    pairs = _pairs(task, _tokenizer(model), limit, seed, skip_invalid)
    if as_json:
        console.say_json([asdict(pair) for pair in pairs])
        return
    if task in TASKS:
        console.say(f"{TASKS[task].summary}\n{TASKS[task].feature}")
    rows = [(pair.task, pair.label, pair.clean, pair.answer.strip(), pair.corrupt, pair.wrong_answer.strip()) for pair in pairs]
    console.table(("task", "label", "clean", "answer", "corrupted", "wrong answer"), rows)


@tasks_app.command("build")
def tasks_build_command(
    task: TaskArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSONL file to write.")],
    model: Model = DEMO_MODEL,
    limit: Limit = 100,
    seed: Seed = 0,
    skip_invalid: SkipInvalid = False,
    as_json: Json = False,
) -> None:
    """Write a task's pairs to a JSONL file, which --task takes."""
    from .model.tasks import write_pairs

    pairs = _pairs(task, _tokenizer(model), limit, seed, skip_invalid)
    with console.saving(output):
        n = write_pairs(output, pairs)
    if as_json:
        console.say_json({"output": str(output), "pairs": n})
    else:
        console.say(f"wrote {n} pairs to {output}")


@tasks_app.command("check")
def tasks_check_command(
    task: TaskArgument,
    model: Model = DEMO_MODEL,
    limit: Limit = 100,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 32,
    skip_invalid: SkipInvalid = False,
    as_json: Json = False,
) -> None:
    """Does the model solve a task: accuracy of answer against wrong answer, and the mean logit differences, by task and label."""
    from .model.loading import load_model
    from .model.solvability import check_task

    loaded = load_model(model, device=device, dtype=dtype)
    checked = check_task(loaded, _pairs(task, loaded.tokenizer, limit, seed, skip_invalid), batch_size=batch_size)
    if as_json:
        console.say_json(checked.to_dicts())
        return
    columns = ("task", "label", "pairs", "accuracy", "logit difference", "corrupted", "flipped", "answer comes first")
    shares = ("accuracy", "flipped", "first")
    rows = [
        [row["task"], row["label"], row["n"], *(f"{row[c]:.0%}" if c in shares else f"{row[c]:+.2f}" for c in list(checked.columns)[3:])]
        for row in checked.iter_rows(named=True)
    ]
    console.table(columns, rows)


Bios = Annotated[
    str, typer.Option("--bios", help="Biographies: a JSONL file with hard_text, profession and gender, or a data set of that form by its name.")
]
Split = Annotated[Literal["train", "dev", "test"], typer.Option("--split", help="Split of a data set; a file has none.")]
MaleProfession = Annotated[str, typer.Option("--male", help="The profession whose biographies are men's in the ambiguous set.")]
FemaleProfession = Annotated[str, typer.Option("--female", help="The profession whose biographies are women's in the ambiguous set.")]
BioLength = Annotated[int, typer.Option("--length", help="Tokens of a biography that are read; longer ones are cut.")]


@tasks_app.command("bios")
def tasks_bios_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSONL file to write.")],
    limit: Annotated[int, typer.Option("--limit", help="Biographies at most.")] = 1000,
    stereotyped: Annotated[
        float, typer.Option("--stereotyped", help="Share whose gender is the one that goes with the profession: 0.5 is balanced.")
    ] = 0.5,
    male: MaleProfession = "professor",
    female: FemaleProfession = "nurse",
    source: Annotated[str | None, typer.Option("--from", help="Copy from this data set, as LabHC/bias_in_bios, instead of making texts.")] = None,
    split: Split = "train",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write biographies in the form of Bias in Bios: small texts made here, or those of two professions of the data set itself."""
    from itertools import islice

    from .model.bios import Contrast, make_bios, read_bios, write_bios

    contrast = Contrast(male, female)
    if source is None:
        found = make_bios(limit, contrast=contrast, stereotyped=stereotyped, seed=seed)
    else:
        found = list(islice((bio for bio in read_bios(source, split=split) if contrast.has(bio)), limit))
    with console.saving(output):
        n = write_bios(output, found)
    if as_json:
        console.say_json({"output": str(output), "biographies": n})
    else:
        console.say(f"wrote {n} biographies to {output}")


@tasks_app.command("probe")
def tasks_probe_command(
    bios: Bios,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write, which --target takes.")],
    about: Annotated[Literal["profession", "gender"], typer.Option("--about", help="What the probe tells apart.")] = "profession",
    training: Annotated[
        Literal["ambiguous", "balanced"],
        typer.Option("--training", help="Train where profession and gender always go together, or on all four combinations equally."),
    ] = "ambiguous",
    site: Annotated[str, typer.Option("--site", help="The site whose value is read.")] = "resid_23",
    position: Annotated[int, typer.Option("--position", help="The position that is read, from 0, or from -1 backwards.")] = -1,
    limit: Annotated[int, typer.Option("--limit", help="Biographies to train on, at most.")] = 400,
    held_out: Annotated[int, typer.Option("--held-out", help="Balanced biographies, not trained on, to measure accuracy on.")] = 200,
    l2: Annotated[float, typer.Option("--l2", help="Penalty on the squared weights, of standardised components.")] = 0.01,
    length: BioLength = 64,
    male: MaleProfession = "professor",
    female: FemaleProfession = "nurse",
    split: Split = "train",
    model: Model = DEMO_MODEL,
    bos: Bos = "auto",
    device: Device = "cpu",
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a linear probe on biographies, save it, and print its accuracy on balanced ones by gender and profession."""
    from .bios_experiment import ProbeTraining, train_bios_probe
    from .model.bios import Contrast
    from .model.probes import ProbeOptions, save_probe

    training_options = ProbeTraining(
        model=model, bios=bios, split=split, contrast=Contrast(male, female), about=about, ambiguous=training == "ambiguous", site=site,
        probe=ProbeOptions(l2, position), length=length, n=limit, n_held_out=held_out, seed=seed, bos=BOS[bos], device=device, batch_size=batch_size,
    )  # fmt: skip
    probe, accuracy = train_bios_probe(training_options)
    with console.saving(output):
        save_probe(probe, output)
    if as_json:
        console.say_json({"probe": str(output), "accuracy": accuracy.to_dicts()})
        return
    console.say(f"wrote {output}: {probe.name} at {probe.site}, position {probe.pos}")
    rows = [(row["group"] or "all", row["n"], f"{row['accuracy']:.0%}") for row in accuracy.iter_rows(named=True)]
    console.table(("held out", "biographies", "accuracy"), rows)


def _tokenizer(model: str) -> Any:
    from .model.loading import load_model

    return load_model(model).tokenizer


def _pairs(task: str, tokenizer: Any, limit: int, seed: int, skip_invalid: bool) -> "list[Pair]":
    """A task's pairs; the lines of a file that were passed over are named on standard error."""
    from .model.tasks import load_task

    return load_task(task, tokenizer, n=limit, seed=seed, skip_invalid=skip_invalid, report=_left_out)


def _left_out(path: str, refusal: "Refusal") -> None:
    """Say on standard error that a line of a task's file is left out, and why."""
    console.note(f"{path}, line {refusal.line}: left out: {refusal.reason}")


# --- dictionaries ----------------------------------------------------------------------------------------------------


@dictionaries_app.command("list")
def dictionaries_list_command(
    what: Annotated[str | None, typer.Argument(help="A folder, demo, a release (shows its sites), or part of releases' or models' names.")] = None,
    as_json: Json = False,
) -> None:
    """Dictionaries that can be named: sae_lens releases, or the sites of a release, of a folder or of the demo's. Nothing is downloaded."""
    from .model.dictionary_sources import DEMO, DEMO_FOLDER, list_folder, list_releases, release_sites

    folder = DEMO_FOLDER if what == DEMO else Path(what) if what is not None and Path(what).is_dir() else None
    if folder is not None:
        columns, rows = ["site", "folder"], [[site.name, str(path)] for site, path in list_folder(folder).items()]
    else:
        releases = list_releases(what or "")
        if any(release.name == what for release in releases):
            columns, rows = ["site", "id"], [[site.name, sae_id] for site, sae_id in release_sites(str(what)).items()]
        elif releases:
            columns, rows = ["release", "model", "dictionaries"], [[r.name, r.model, str(len(r.ids))] for r in releases]
        else:
            raise NoSuchDictionaries(f"no folder, release or model {what!r}: `featlas dictionaries list` shows all releases")
    if as_json:
        console.say_json([dict(zip(columns, row)) for row in rows])
    else:
        console.table(columns, rows)


@dictionaries_app.command("train")
def dictionaries_train_command(
    sites: Annotated[str, typer.Option("--sites", help="Sites to train on, comma-separated: resid_5,resid_11.")],
    corpus: Annotated[str, corpus_option("Text file, folder of them, JSONL with `text`, or Hugging Face data set.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to save to, one sub-folder a site; the same call resumes.")],
    model: Model = DEMO_MODEL,
    architecture: Architecture = "topk",
    width: Annotated[int, typer.Option("--width", help="Features per site.")] = 2048,
    k: Annotated[int, typer.Option("--k", help="Active features per token (topk, batchtopk).")] = 32,
    sparsity: Annotated[float, typer.Option("--sparsity", help="Coefficient of the sparsity loss (the other kinds).")] = 1.0,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens read in all.")] = 500_000,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over them.")] = 3,
    task: Annotated[str | None, task_option("Mix in the clean prompts of this task or mixture, a fifth of the tokens.")] = None,
    prompts: Annotated[int, typer.Option("--prompts", help="With --task: how many prompts.")] = 2000,
    length: Annotated[int, typer.Option("--length", help="Tokens in a block of text; the model's context at most.")] = 128,
    heads: Annotated[bool, typer.Option("--heads", help="Attention sites: read the heads' outputs before the projection (hook_z).")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train small dictionaries, all sites from one pass over a corpus, by sae_lens' trainers; resumable."""
    from .model import training
    from .model.loading import load_model

    loaded = load_model(model, device=device, dtype=dtype)
    texts = [pair.clean for pair in _pairs(task, loaded.tokenizer, prompts, seed, False)] if task else []
    options = training.TrainingOptions(
        sites=training.sites_of(split_names(sites)), architecture=training.Architecture(architecture), width=width, k=k, sparsity=sparsity,
        tokens=tokens, prompt_share=training.TrainingOptions.prompt_share if texts else 0.0, epochs=epochs, heads=heads, seed=seed,
        context=within_context(length, loaded),
    )  # fmt: skip
    with console.progress("training", quiet=as_json) as report:
        trained = training.train_dictionaries(loaded, corpus, output, options, prompts=texts, progress=lambda p: report(p.done, p.total, p.stage))
    if as_json:
        console.say_json([{"site": t.site.name, "folder": str(t.folder), "steps": t.steps, "seconds": t.seconds} for t in trained])
        return
    console.table(("site", "folder", "steps", "seconds"), [(t.site.name, str(t.folder), t.steps, f"{t.seconds:.0f}") for t in trained])


@dictionaries_app.command("evaluate")
def dictionaries_evaluate_command(
    corpus: Annotated[str | None, corpus_option("Text that they did not see: file, folder, JSONL, or data set.")] = None,
    task: Annotated[str | None, task_option("Instead of a corpus: the clean prompts of a task.")] = None,
    model: Model = DEMO_MODEL,
    dictionaries: Dictionaries = DEMO_DICTIONARIES,
    sites: Sites = None,
    limit: Annotated[int, typer.Option("--limit", help="Blocks of text, or prompts, at most.")] = 100,
    length: Annotated[int, typer.Option("--length", help="Tokens in a block of text.")] = 128,
    loss_tokens: Annotated[int, typer.Option("--loss-tokens", help="Tokens on which the recovered loss is measured; 0: not at all.")] = 5000,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """How good dictionaries are on a text: unexplained variance (FVU), active features (L0), dead share, loss recovered."""
    from .model.corpus import prompt_tokens, read_texts, token_blocks
    from .model.evaluation import evaluate_dictionaries

    if (corpus is None) == (task is None):
        raise NotBoth("name a text corpus with --corpus, or a task with --task: one of the two")
    loaded, found = load_named(model, dictionaries, sites, device, dtype)
    if corpus is not None:
        sequences = token_blocks(read_texts(corpus), loaded.tokenizer, within_context(length, loaded), limit=limit)
    else:
        sequences = prompt_tokens([pair.clean for pair in _pairs(str(task), loaded.tokenizer, limit, seed, False)], loaded.tokenizer, longest=length)
    measured = evaluate_dictionaries(loaded, found, sequences, loss_tokens=loss_tokens)
    recovered = [None if loss_tokens == 0 else quality.loss_recovered for quality in measured]
    if as_json:
        rows = [{"site": q.site.name, "dictionary": q.dictionary, "fvu": q.fvu, "l0": q.l0, "dead_share": q.dead_share} for q in measured]
        console.say_json([{**row, "loss_recovered": share, "positions": q.positions} for row, share, q in zip(rows, recovered, measured)])
        return
    shown = [
        (q.site.name, q.dictionary, f"{q.fvu:.3f}", f"{q.l0:.1f}", f"{q.dead_share:.0%}", None if share is None else f"{share:.0%}", q.positions)
        for q, share in zip(measured, recovered)
    ]
    console.table(("site", "dictionary", "FVU", "L0", "dead", "loss recovered", "positions"), shown)


# --- ingest ----------------------------------------------------------------------------------------------------------


@ingest_app.command("edges")
def ingest_edges_command(
    model: Model = DEMO_MODEL,
    dictionaries: Dictionaries = DEMO_DICTIONARIES,
    task: Task = "agreement",
    limit: Limit = 100,
    steps: Steps = 10,
    first_factor: FirstFactor = "exact",
    tolerance: Tolerance = 0.02,
    screen: Screen = None,
    tail_dtype: TailDtype = None,
    metric: Metric = "logit_diff",
    target: Target = None,
    baseline: Baseline = "counterfactual",
    mean: Mean = "over-positions",
    noise_scale: NoiseScale = 1.0,
    threshold: Annotated[float, typer.Option("--threshold", help="Keep single-position edges with |effect| of at least this; 0: all.")] = 0.0,
    max_edges: Annotated[int | None, typer.Option("--max-edges", help="Then the strongest so many edges into each node and position.")] = None,
    positions: Positions = "sum",
    statistics_run: StatisticsRun = None,
    sites: Sites = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    memory: Memory = "2GB",
    batch_size: EdgeBatchSize = None,
    workers: Annotated[
        int, typer.Option("--workers", help="Processes that measure, by Ray: each with a share of the cores or a GPU, and --memory of its own.")
    ] = 1,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="The Ray cluster that the workers run on, HOST:PORT or auto; else this machine.")
    ] = None,
    skip_invalid: SkipInvalid = False,
    import_files: Annotated[
        Path | None,
        typer.Option("--import-files", help="Instead of a graph, files in this folder for Neo4j's offline importer: new, or one that was begun so."),
    ] = None,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Effective edges of every sequence of a task into the graph; an interrupted run continues, a repeated one changes nothing."""
    from dataclasses import asdict

    from .ingest.ranges import check_baseline, check_numbers

    allowed = memory_bytes(memory)
    check_numbers(
        steps=steps, threshold=threshold, max_edges=max_edges, tolerance=tolerance, screen=screen, memory=allowed, noise_scale=noise_scale,
        limit=limit, batch_size=batch_size, workers=workers,
    )  # fmt: skip
    check_baseline(baseline, statistics_run, per_position=mean == "per-position")
    if import_files is not None:
        from .queries.import_sink import check_folder

        check_folder(import_files)
    from . import show
    from .ingest.pipeline import EdgeOptions, ingest_edges

    settings = _edge_settings(
        metric=metric, baseline=baseline, positions=positions, first_factor=first_factor, steps=steps, threshold=threshold, max_edges=max_edges,
        tolerance=tolerance, screen=screen, tail_dtype=tail_dtype, per_position=mean == "per-position", noise_scale=noise_scale, noise_seed=seed,
        memory=allowed,
    )  # fmt: skip
    options = EdgeOptions(
        model=model, dictionaries=dictionaries, task=task, atlas=atlas, graph=None if import_files is not None else graph,
        import_files=import_files, sites=split_names(sites) if sites else None, limit=limit,
        seed=seed,
        settings=settings, batch_size=batch_size, device=device, dtype=dtype, skip_invalid=skip_invalid, statistics_run=statistics_run,
        target=target, bos=BOS[bos], workers=workers, ray_address=ray_address,
    )  # fmt: skip
    with console.progress("edges", quiet=as_json) as report:
        summary = ingest_edges(
            options,
            progress=lambda p: report(p.done, p.total, f"{p.edges:,} edges, {p.edges_per_second:,.0f}/s"),
            report=_left_out,
            announce=None if as_json else show.note_cost,
            note=console.note,
        )
    files = {} if import_files is None else {"import_files": str(import_files)}
    if as_json:
        console.say_json({**asdict(summary), **files})
        return
    show.show_ingest(summary)
    if import_files is not None:
        console.say(f"import files in {import_files}: `featlas neo4j import` loads them into an empty Neo4j, `featlas import files` into any graph")


def _edge_settings(*, metric: str, baseline: str, positions: str = "sum", first_factor: str = "exact", **others: Any) -> "EdgeSettings":
    """The engine's settings from the command line's words; raises a `UserError` for what it cannot do."""
    from .ingest import effective
    from .model import metrics

    settings = effective.EdgeSettings(
        metric=metrics.Metric(metric), baseline=effective.Baseline(baseline), positions=effective.Positions(positions),
        first_factor=effective.FirstFactor(first_factor), **others,
    )  # fmt: skip
    settings.check()
    return settings


@ingest_app.command("finish")
def ingest_finish_command(
    run: Annotated[str, typer.Argument(autocompletion=completion.runs, help="The run, by its key or the beginning of it.")],
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Derive a run's INFLUENCES anew from its committed edges, as the end of `ingest edges` does."""
    from .ingest.closing import close_run
    from .queries.labels import restore_labels
    from .queries.subgraphs import find_run

    with open_atlas(atlas, graph, write=True) as store:
        key = find_run(store, run).key
        n_influences = close_run(store, key)
        restore_labels(store, atlas)
    if as_json:
        console.say_json({"run": key, "n_influences": n_influences})
    else:
        console.say(f"run {key}: {n_influences:,} aggregated edges")


@ingest_app.command("statistics")
def ingest_statistics_command(
    model: Model = DEMO_MODEL,
    dictionaries: Dictionaries = DEMO_DICTIONARIES,
    corpus: Annotated[str | None, corpus_option("Text file, folder of them, JSONL with `text`, or Hugging Face data set.")] = None,
    task: Annotated[str | None, task_option("Instead of a corpus: the texts of a task's pairs.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Blocks of text, or pairs of a task (100 unless given), at most.")] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens in a block of text.")] = 128,
    contexts: Annotated[int, typer.Option("--contexts", help="Strongest contexts kept per feature.")] = 10,
    by_position: Annotated[bool, typer.Option("--by-position", help="Means per position too.")] = False,
    between: Annotated[
        Literal["none", "adjacent", "all"],
        typer.Option("--between", help="Products of live features of different sites too: of a site and those it reads from, or of all pairs."),
    ] = "none",
    min_frequency: Annotated[float, typer.Option("--min-frequency", help="A feature is live from this share of the first tokens on.")] = 1e-3,
    max_live: Annotated[int, typer.Option("--max-live", help="Live features per site at most, the most frequent.")] = 2048,
    memory: Memory = "2GB",
    shuffled: Annotated[
        bool, typer.Option("--shuffled", help="The null: each site sees other texts of its batch, so that sites correlate by chance only.")
    ] = False,
    basis: Basis = "activation",
    metric: Metric = "logit_diff",
    steps: Steps = 1,
    baseline: Baseline = "counterfactual",
    mean: Mean = "over-positions",
    noise_scale: NoiseScale = 1.0,
    statistics_run: StatisticsRun = None,
    sites: Sites = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    skip_invalid: SkipInvalid = False,
    workers: cli_statistics.Workers = None,
    ray_address: cli_statistics.RayAddress = None,
    shard: cli_statistics.OneShard = None,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Per feature: count, frequency, moments and strongest contexts, into the statistics store; frequencies and names onto the graph's features."""
    from .ingest.ranges import check_baseline, check_numbers

    allowed = memory_bytes(memory)
    check_numbers(steps=steps, noise_scale=noise_scale, limit=limit, batch_size=batch_size)
    if basis == "attribution":
        check_baseline(baseline, statistics_run, per_position=mean == "per-position")
    if (corpus is None) == (task is None):
        raise NotBoth("name a text corpus with --corpus, or a task with --task: one of the two")
    if basis == "attribution" and task is None:
        raise NotBoth("--basis attribution needs the pairs of a --task: a corpus has no corrupted texts and no answers")
    if shuffled and basis == "attribution":
        raise NotBoth("--shuffled is of activations: leave --basis attribution out")
    how = cli_statistics.How.of(workers, ray_address, shard, device)
    from .ingest.statistics import SHUFFLED, Between, StatisticsOptions, pair_corpus, text_corpus
    from .ingest.statistics_workers import StatisticsJob

    settings = _edge_settings(
        metric=metric, baseline=baseline, steps=steps, per_position=mean == "per-position", noise_scale=noise_scale, noise_seed=seed
    )
    # The driver of workers describes and merges, and leaves the accelerators to them.
    loaded, found = load_named(model, dictionaries, sites, device if how.workers is None else "cpu", dtype, bos)
    if corpus is not None:
        length = within_context(length, loaded)
    options = StatisticsOptions(
        length=length, batch_size=batch_size, n_contexts=contexts, by_position=by_position, between=Between(between), min_frequency=min_frequency,
        max_live=max_live, memory=allowed, seed=seed,
    )  # fmt: skip
    donor_seed = seed if basis == "attribution" and baseline == "resample" else None
    if corpus is not None:
        source = text_corpus(corpus, loaded.tokenizer, options, max_sequences=limit)
    else:
        pairs = _pairs(str(task), loaded.tokenizer, limit or 100, seed, skip_invalid)
        source = pair_corpus(
            str(task), pairs, loaded.tokenizer, options, clean_only=basis == "attribution", device=loaded.device, donor_seed=donor_seed
        )  # fmt: skip
    job = StatisticsJob(
        model=model, dictionaries=dictionaries, options=options, corpus=corpus, task=task, limit=limit, bos=BOS[bos], device=device, dtype=dtype,
        sites=split_names(sites) if sites else None, seed=seed, skip_invalid=skip_invalid, basis=SHUFFLED if shuffled else basis,
        donor_seed=donor_seed, settings=settings, statistics_run=statistics_run,
    )  # fmt: skip
    cli_statistics.run(cli_statistics.Asked(job, loaded, found, source, how), atlas, graph, as_json=as_json)


@ingest_app.command("weights")
def ingest_weights_command(
    model: Model = DEMO_MODEL,
    dictionaries: Dictionaries = DEMO_DICTIONARIES,
    sites: Sites = None,
    paths: WirePaths = None,
    pairs: Reach = "parents",
    top_k: Annotated[int, typer.Option("--top-k", help="Strongest wires kept of each feature, to each site and by each kind of path.")] = 10,
    keep: Keep = "both",
    weight: WireWeight = "raw",
    norm_scale: NormScale = "one",
    task: Annotated[str | None, task_option("Text for the means of --paths mlp and --norm-scale mean: a task's prompts.")] = None,
    corpus: Annotated[str | None, corpus_option("Or a text corpus: file, folder, JSONL with `text`, or data set.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Pairs of the task, or blocks of the corpus, at most.")] = 100,
    length: Annotated[int, typer.Option("--length", help="Tokens in a block of a corpus.")] = 128,
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Attention heads' shares in each feature too, into the statistics store.")] = True,
    memory: Memory = "2GB",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    skip_invalid: SkipInvalid = False,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Virtual weights between features into the graph as WIRED, from the weights alone; repeated or interrupted, it does what is missing."""
    from dataclasses import asdict

    from . import show
    from .ingest import linearisation, structural, wiring
    from .ingest.statistics import StatisticsOptions, pair_corpus, text_corpus
    from .queries.head_shares import summarise_shares
    from .queries.statistics import StatisticsStore
    from .queries.store import open_graph

    if corpus is not None and task is not None:
        raise NotBoth("name a text corpus with --corpus, or a task with --task: one of the two")
    kinds = None if paths is None else wiring.parse_kinds(split_names(paths))
    options = structural.WeightOptions(
        kinds=kinds, reach=wiring.Reach(pairs), norm_scale=linearisation.NormScale(norm_scale), shares=heads,
        wires=wiring.WireOptions(top_k=top_k, keep=wiring.Keep(keep), measure=wiring.Measure(weight), memory=memory_bytes(memory)),
    )  # fmt: skip
    options.chosen_kinds(corpus is not None or task is not None)
    loaded, found = load_named(model, dictionaries, sites, device, dtype)
    # a first position has activations of its own kind, hundreds of times larger: one would outweigh all others in a mean
    reading, text = StatisticsOptions(length=length, batch_size=batch_size, skip_positions=1, seed=seed), None
    if corpus is not None:
        text = text_corpus(corpus, loaded.tokenizer, reading, max_sequences=limit)
    elif task is not None:
        text = pair_corpus(task, _pairs(task, loaded.tokenizer, limit, seed, skip_invalid), loaded.tokenizer, reading, device=loaded.device)
    atlas.mkdir(parents=True, exist_ok=True)
    with open_graph(graph or atlas) as store, StatisticsStore(atlas) as statistics, console.progress("weights", quiet=as_json) as bar:
        summary = structural.ingest_weights(store, statistics, loaded, found, options, corpus=text, progress=bar)
        shares = summarise_shares(statistics, loaded.key, {site.name: found[site].id for site in found}) if heads else None
    if as_json:
        console.say_json({**asdict(summary), "heads": [] if shares is None else shares.to_dicts()})
    else:
        show.show_weights(summary, shares, has_text=text is not None)


@ingest_app.command("correlations")
def ingest_correlations_command(
    run: Annotated[str | None, typer.Argument(help="The statistics run, by its key or the beginning of it; the one done last unless given.")] = None,
    fdr: Annotated[float, typer.Option("--fdr", help="Share of false ones among those called significant (Benjamini and Hochberg).")] = 0.05,
    sample: Annotated[
        Literal["tokens", "effective", "sequences"],
        typer.Option("--sample", help="Independent observations: all tokens, what they come to given that tokens of a text depend, or only texts."),
    ] = "effective",
    min_r: Annotated[float, typer.Option("--min-r", help="Pass over correlations of smaller magnitude, significant or not.")] = 0.0,
    max_edges: Annotated[int, typer.Option("--max-edges", help="Edges in the graph at most, the strongest.")] = 100_000,
    memory: Memory = "512MB",
    write: Annotated[bool, typer.Option("--write/--no-write", help="Write the edges into the graph, not only into the statistics.")] = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Functional connectivity: significant correlations of a statistics run's features, as CORRELATES edges of the graph."""
    from .ingest.functional import CorrelationOptions, Sample, correlate, write_correlates
    from .ingest.statistics import SHUFFLED
    from .queries.statistics import FILE_NAME, NotAStatisticsStore, StatisticsStore
    from .queries.store import open_graph

    options = CorrelationOptions(fdr=fdr, sample=Sample(sample), min_r=min_r, max_edges=max_edges, memory=memory_bytes(memory))
    if not (atlas / FILE_NAME).exists():
        raise NotAStatisticsStore(f"no statistics store in {atlas}: `featlas ingest statistics` makes one")
    with StatisticsStore(atlas) as statistics:
        record = statistics.find_run(run)
        with console.progress("correlations", quiet=as_json) as bar:
            found = correlate(statistics, record.run, options, progress=lambda done, total: bar(done, total, ""))
        n_edges = 0
        if write and record.basis != SHUFFLED:
            with open_graph(graph or atlas) as store:
                n_edges = write_correlates(store, statistics, record.run, max_edges)
    if as_json:
        console.say_json({**{k: v for k, v in vars(found).items() if k != "tests"}, "n_edges": n_edges, "tests": found.tests.to_dicts()})
        return
    columns = ("site", "site", "tested", "significant", "least |r|", "greatest |r|", "independent share of tokens")
    names = ("site_i", "site_j", "n_tested", "n_significant", "least_r", "greatest_r", "effective_share")
    console.table(columns, [[f"{row[n]:,}" if n.startswith("n_") else row[n] for n in names] for row in found.tests.iter_rows(named=True)])
    at = f" (p ≤ {found.p_threshold:.2g}, |r| ≥ {found.least_r:.3g})" if found.least_r is not None and found.p_threshold is not None else ""
    console.say(f"statistics run {found.run}: {found.n_significant:,} of {found.n_tested:,} correlations are significant at FDR {fdr:g}{at}")
    if write and record.basis != SHUFFLED:
        console.say(f"{n_edges:,} CORRELATES edges in the graph")
        if n_edges < found.n_significant:
            console.note(f"{found.n_significant - n_edges:,} weaker ones are in the statistics only: --max-edges is {max_edges:,}")


@ingest_app.command("definitions")
def ingest_definitions_command(
    model: Model = DEMO_MODEL,
    dictionaries: Dictionaries = DEMO_DICTIONARIES,
    task: Task = "agreement",
    limit: Limit = 8,
    steps: Annotated[int, typer.Option("--steps", help="Steps of integrated gradients, 2 or more.")] = 10,
    edges: Annotated[
        int, typer.Option("--edges", help="Edges between features to compare, and as many with error nodes: half the strongest, half drawn of all.")
    ] = 300,
    metric: Metric = "logit_diff",
    baseline: Baseline = "counterfactual",
    mean: Mean = "over-positions",
    noise_scale: NoiseScale = 1.0,
    threshold: Annotated[float, typer.Option("--threshold", help="Draw from single-position edges with |effect| of at least this; 0: all.")] = 0.0,
    max_edges: Annotated[int | None, typer.Option("--max-edges", help="And from the strongest so many into each node and position.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the edges, a column a definition, in this parquet file.")] = None,
    statistics_run: StatisticsRun = None,
    sites: Sites = None,
    memory: Memory = "2GB",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    skip_invalid: SkipInvalid = False,
    atlas: Atlas = DEFAULT_ATLAS,
    as_json: Json = False,
) -> None:
    """Definitions of an edge on the same edges: integrated gradients, their approximations, and exact patching; how far they agree."""
    from .ingest.ranges import check_baseline, check_numbers

    allowed = memory_bytes(memory)
    check_numbers(
        steps=steps, threshold=threshold, max_edges=max_edges, memory=allowed, noise_scale=noise_scale, limit=limit, batch_size=batch_size
    )
    check_baseline(baseline, statistics_run, per_position=mean == "per-position")
    from . import show
    from .ingest.definitions import agreement, compare_batches
    from .ingest.statistics import node_means
    from .model.binding import bind
    from .model.tasks import batches
    from .queries.statistics import StatisticsStore

    settings = _edge_settings(
        metric=metric, baseline=baseline, positions="keep", steps=steps, threshold=threshold, max_edges=max_edges, memory=allowed,
        per_position=mean == "per-position", noise_scale=noise_scale, noise_seed=seed,
    )  # fmt: skip
    loaded, found = load_named(model, dictionaries, sites, device, dtype)
    pairs = _pairs(task, loaded.tokenizer, limit, seed, skip_invalid)
    means = None
    if settings.baseline.of_corpus:
        with StatisticsStore(atlas, read_only=True) as statistics:
            means = node_means(statistics, statistics_run, loaded, found, settings.choice)
    with console.progress("definitions", quiet=as_json) as bar:
        compared = compare_batches(
            bind(loaded), found,
            batches(pairs, loaded.tokenizer, batch_size=batch_size, donor_seed=seed if baseline == "resample" else None),
            settings, n_edges=edges, n_sequences=len(pairs), seed=seed, means=means, progress=lambda done, total: bar(done, total, "sequences"),
        )  # fmt: skip
    table = agreement(compared)
    if as_json:
        console.say_json({"n_sequences": compared["sequence"].n_unique(), "n_edges": len(compared), "agreement": table.to_dicts()})
    else:
        show.show_definitions(table, compared)
    if output is not None:
        console.save_frame(compared, output)


# --- analyze ---------------------------------------------------------------------------------------------------------

Threshold = Annotated[float | None, typer.Option("--threshold", help="Least strength of an edge; unless given, what the --edges strongest reach.")]
Edges = Annotated[int, typer.Option("--edges", help="Without --threshold: about so many edges.")]
TopEdges = Annotated[int | None, typer.Option("--top-edges", help="Then the strongest so many edges.")]
Sequence = Annotated[str | None, typer.Option("--sequence", help="One sequence, by its key, instead of the run's means.")]
Union = Annotated[str | None, typer.Option("--union", metavar="KEY,KEY", help="Edges of any of these circuits, by the beginnings of their keys.")]
Intersection = Annotated[str | None, typer.Option("--intersection", metavar="KEY,KEY", help="Edges that all of these circuits have.")]
Difference = Annotated[str | None, typer.Option("--difference", metavar="KEY,KEY", help="Edges of the first of these circuits that no other has.")]
ByQuery = Annotated[
    str | None, typer.Option("--cypher", help="Edges or nodes by hand: a query that returns source and target, or key; all are keys of features.")
]
ByFile = Annotated[Path | None, typer.Option("--file", help="Edges or nodes by hand: the same columns in a CSV file or a file of JSON lines.")]
Paths = Annotated[int, typer.Option("--paths", help="Strongest paths to show.")]
PathRuleOption = Annotated[Rule, typer.Option("--path-rule", help="Path score: product of the edges' shares, or the weakest edge.")]
CorrelationBasis = Annotated[Literal["activation", "attribution"], typer.Option("--basis", help="Correlations of activations or attributions.")]
DEFAULT_EDGES = 300


@analyze_app.command("circuit")
def analyze_circuit_command(
    run: Run = None,
    threshold: Threshold = None,
    edges: Edges = DEFAULT_EDGES,
    by: ByOption = "abs_weight",
    top_edges: TopEdges = None,
    sequence: Sequence = None,
    task: Annotated[str | None, typer.Option("--task", help="Only the sequences of one task of the run's mixture.")] = None,
    positions: Annotated[bool, typer.Option("--positions", help="With --sequence: keep token positions apart, where they were kept.")] = False,
    union: Union = None,
    intersection: Intersection = None,
    difference: Difference = None,
    cypher: ByQuery = None,
    file: ByFile = None,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="Drop what is not on a path from an input to the output.")] = True,
    paths: Paths = 10,
    path_rule: PathRuleOption = "product",
    features: Annotated[int, typer.Option("--features", help="Most influential features to show.")] = 15,
    write: Annotated[bool, typer.Option("--write/--no-write", help="Write the circuit back into the graph.")] = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Threshold a run's edges, drop what is not on a path from an input to the output, and write the circuit back.

    Or make a circuit of others, or by hand.
    """
    from . import show
    from .analysis.circuits import By as Thresholded
    from .analysis.circuits import Selection, run_circuit, write_circuit
    from .queries.subgraphs import find_run

    operations = {"union": union, "intersection": intersection, "difference": difference}
    by_hand = {"--cypher": cypher, "--file": file}
    cut = {"--threshold": threshold, "--top-edges": top_edges}
    of_run = {"--task": task, "--sequence": sequence, "--positions": positions or None}
    ways = {f"--{name}": value for name, value in operations.items()} | by_hand
    _at_most_one({"--task": task, "--sequence": sequence}, "a task's sequences, or one sequence")
    _at_most_one(ways, "a circuit is made in one way")
    made = next((name for name, value in ways.items() if value is not None), None)
    if edges < 1 or (top_edges is not None and top_edges < 1):
        raise BadParameterValue(f"--edges {edges} or --top-edges {top_edges} keeps no edge: give at least 1")
    if threshold is not None and not threshold >= 0:
        raise BadParameterValue(f"--threshold {threshold:g} is negative: it is compared with an edge's strength, give 0 or more")
    if positions and sequence is None:
        raise BadParameterValue("--positions keeps the positions of one sequence apart: name it by --sequence (`featlas query sequences`)")
    for name, value in {**cut, **({} if made in by_hand else of_run)}.items():
        if made is not None:
            _at_most_one({made: True, name: value}, f"{made} takes its edges whole")

    with open_atlas(atlas, graph, write=write) as store:
        operation = next((name for name, value in operations.items() if value is not None), None)
        if operation is not None:
            from .analysis.circuit_algebra import Operation, combine_stored

            circuit = combine_stored(store, Operation(operation), split_names(operations[operation] or ""), pruned=prune)
        else:
            found = find_run(store, run)
            selection = Selection(found.key, threshold or 0.0, Thresholded(by), top_edges, sequence, positions, task, pruned=prune)
            if made is not None:
                from .analysis.circuit_algebra import chosen_from, file_choice, query_choice

                choice = file_choice(file) if file is not None else query_choice(store, cypher or "")
                circuit = chosen_from(store, found, choice, selection)
            else:
                circuit = run_circuit(store, found, selection, n_edges=edges if threshold is None and top_edges is None else None)
        key = write_circuit(store, circuit) if write else None
        report = _gather(store, atlas, circuit.selection.run, circuit, paths=paths, path_rule=path_rule, features=features)
    if as_json:
        console.say_json(_circuit_json(circuit, report, key))
    else:
        show.show_circuit(report, key)


def _at_most_one(options: "Mapping[str, object]", why: str) -> None:
    """Refuse two options that exclude each other. Raises `NotBoth`."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise NotBoth(f"{' and '.join(given)} exclude each other: {why}")


def _gather(store: "GraphStore", atlas: Path, run: str, circuit: "Circuit", *, paths: int, path_rule: str, features: int) -> "Summary":
    """The circuit with everything that is known of its nodes."""
    from . import show
    from .analysis.circuits import PathRule
    from .analysis.summary import SummaryOptions, summarise
    from .queries.subgraphs import find_run

    options = SummaryOptions(n_paths=paths, n_features=features, rule=PathRule(path_rule), commands=show.NEXT_COMMANDS)
    statistics = open_statistics(atlas)
    try:
        return summarise(store, statistics, find_run(store, run), circuit, options)
    finally:
        if statistics is not None:
            statistics.close()


def _circuit_json(circuit: "Circuit", report: "Summary", key: str | None) -> dict[str, object]:
    numbers = {"n_nodes": circuit.n_nodes, "n_edges": circuit.n_edges, "average_degree": circuit.average_degree, "density": circuit.density}
    selection = circuit.selection
    named = circuit.nodes.join(report.notes.select("key", "name"), on="key", how="left", maintain_order="left")
    paths = [{"score": path.score, "nodes": path.nodes, "weights": path.weights} for path in report.paths]
    return {
        "circuit": key, "run": selection.run, "threshold": selection.threshold, "by": selection.by.value, "description": selection.description,
        **numbers,
        "nodes": named.to_dicts(), "edges": circuit.edges.to_dicts(), "paths": paths,
    }  # fmt: skip


@analyze_app.command("agreement")
def analyze_agreement_command(
    run: Run = None,
    pairs: Annotated[
        Literal["effective", "live", "union", "intersection"],
        typer.Option(
            "--pairs",
            help="Pairs of features compared: those with an effective edge or all live ones (with exact correlations and virtual weights), "
            "or those with a stored edge of either or both (INFLUENCES, CORRELATES, WIRED; in a union a missing edge counts as 0).",
        ),
    ] = "effective",
    basis: CorrelationBasis = "activation",
    statistics_run: Annotated[str | None, typer.Option("--statistics-run", help="Run of `ingest statistics`; else the last that fits.")] = None,
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="Look up exact virtual weights, for which the model is loaded.")] = True,
    paths: Annotated[str, typer.Option("--paths", help="Paths that a virtual weight sums: residual, attention, mlp (needs --task).")] = "residual",
    task: Annotated[str | None, task_option("Text for the mean slopes of --paths mlp: a task's prompts.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Pairs of that task at most.")] = 100,
    k: Annotated[str, typer.Option("--k", help="Overlap of the k strongest pairs: numbers, or shares such as 0.05.")] = "10,100,1000,0.05",
    draws: Annotated[int, typer.Option("--draws", help="Relabellings that make up each null; p is at least 2 / (draws + 1).")] = 200,
    bins: Annotated[int, typer.Option("--bins", help="Groups of like frequency for the null that relabels inside them.")] = 10,
    max_pairs: Annotated[int, typer.Option("--max-pairs", help="Where two sites have more, features are drawn at random.")] = 50_000,
    model: Model = DEMO_MODEL,
    dictionaries: Dictionaries = DEMO_DICTIONARIES,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save every measure: FILE.csv, FILE.parquet or FILE.json.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Save a figure: FILE.html.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    skip_invalid: SkipInvalid = False,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """How far effective, functional and structural connectivity agree, site by site, against relabelled features."""
    from contextlib import ExitStack

    from . import show
    from .analysis.agreement import AgreementOptions, Pairs, agree
    from .analysis.connectivities import Basis, Ingredients, read_grids
    from .queries.subgraphs import find_run

    if output is not None and output.suffix not in (".csv", ".parquet", ".json"):
        raise BadParameterValue(f"--output {output}: its ending says what it is to be: .csv, .parquet or .json")
    options = AgreementOptions(pairs=Pairs(pairs), k=_numbers(k), draws=draws, bins=bins, max_pairs=max_pairs, seed=seed)
    with ExitStack() as opened, console.progress("agreement", quiet=as_json) as report:
        store = opened.enter_context(open_atlas(atlas, graph, write=False))
        statistics = open_statistics(atlas)
        if statistics is not None:
            opened.enter_context(statistics)
        found = find_run(store, run)
        virtual = None
        if weights and pairs in ("effective", "live"):
            prompts = (task, limit, seed, skip_invalid) if task else None
            virtual = _virtual_weights(found, model, dictionaries, paths, prompts, device, dtype)
        read = read_grids(Ingredients(store, found, statistics, statistics_run, Basis(basis), virtual), options)
        agreement = agree(read.grids, options, progress=report)
    if output is not None:
        console.write_frame(agreement.table, Format(output.suffix[1:]), output)
    if plot is not None:
        from .analysis.plots import agreement_figure, save_figure

        with console.saving(plot):
            save_figure(agreement_figure(agreement.table, title=f"Agreement of connectivities, run {found.key}, {pairs} pairs"), plot)
    if as_json:
        about = {"run": found.key, "pairs": pairs, "functional_run": read.functional_run, "missing": read.missing, "left_out": agreement.left_out}
        counts = {"edges_with_error_or_output": read.n_other, "edges_outside_live": read.n_outside}
        console.say_json({**about, **counts, "table": agreement.table.to_dicts()})
    else:
        show.show_connectivities(found.key, read, agreement, options)


def _virtual_weights(
    run: "RunRow", model: str, dictionaries: str, paths: str, prompts: tuple[str, int, int, bool] | None, device: str, dtype: str
) -> "VirtualWeights":
    """Virtual weights of a run's model and dictionaries; raises `WrongModel` where those named are others."""
    from .ingest.lookup import VirtualWeights
    from .ingest.statistics import StatisticsOptions, pair_corpus
    from .ingest.wiring import parse_kinds

    kinds = parse_kinds(split_names(paths))
    loaded, found = load_named(model, dictionaries, ",".join(run.dictionaries), device, dtype)
    ids = {site.name: dictionary.id for site, dictionary in found.items()}
    if loaded.key != run.model or ids != dict(run.dictionaries):
        raise WrongModel(
            f"run {run.key} is of {run.model} with other dictionaries than --model {model} --dictionaries {dictionaries} are: "
            "name those of the run, or leave virtual weights out with --no-weights"
        )
    # a first position has activations of its own kind, hundreds of times larger
    options = StatisticsOptions(skip_positions=1)
    text = None
    if prompts is not None:
        text = pair_corpus(prompts[0], _pairs(prompts[0], loaded.tokenizer, *prompts[1:]), loaded.tokenizer, options, device=loaded.device)
    return VirtualWeights(loaded, found, kinds, text)


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in split_names(text))
    except ValueError:
        raise BadParameterValue(f"--k {text!r} is no list of numbers: write 10,100,0.05") from None


@analyze_app.command("selectivity")
def analyze_selectivity_command(
    limit: Annotated[int, typer.Option("--limit", help="Sequences to measure each task on; every text in both genders.")] = 64,
    found: Annotated[int, typer.Option("--found", help="Other sequences, on which gender's features and edges are found.")] = 16,
    nodes: Annotated[int, typer.Option("--nodes", help="Features of gender that are removed.")] = 20,
    edges: Annotated[int, typer.Option("--edges", help="Edges from them to the profession that are removed, at most.")] = 100,
    rule: Annotated[
        Literal["attribution", "difference"],
        typer.Option("--rule", help="Gender's features: with the strongest edges in its run, or whose activation differs most between genders."),
    ] = "attribution",
    baseline: Annotated[
        Literal["zero", "counterfactual", "resample"],
        typer.Option("--baseline", help="What a removed node is worth: 0, its value in the text of the other gender, or in another prompt."),
    ] = "zero",
    draws: Annotated[int, typer.Option("--draws", help="Random edges and nodes of equal number, so many times.")] = 5,
    steps: Annotated[int, typer.Option("--steps", help="Steps of integrated gradients for the runs that are measured here.")] = 1,
    threshold: Annotated[float, typer.Option("--threshold", help="Single-position edges that those runs keep: |effect| of at least this.")] = 0.005,
    gender_run: Annotated[str | None, typer.Option("--gender-run", help="A run of the graph for gender, instead of measuring one.")] = None,
    profession_run: Annotated[str | None, typer.Option("--profession-run", help="A run of the graph for the profession.")] = None,
    profession_probe: Annotated[
        Path | None, typer.Option("--profession-probe", help="Read both off --bios by probes (with --gender-probe) instead of asking the model.")
    ] = None,
    gender_probe: Annotated[Path | None, typer.Option("--gender-probe", help="The probe of the gender, on the same site and position.")] = None,
    bios: Bios = "LabHC/bias_in_bios",
    split: Split = "test",
    length: BioLength = 64,
    male: MaleProfession = "professor",
    female: FemaleProfession = "nurse",
    model: Model = DEMO_MODEL,
    dictionaries: Dictionaries = DEMO_DICTIONARIES,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the table: FILE.csv, FILE.parquet or FILE.json.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 8,
    memory: Memory = "2GB",
    seed: Seed = 0,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Gender and profession: remove the edges from gender to the profession, or gender's features, and see which task breaks."""
    from . import show
    from .analysis.selectivity import Rule, SelectivityOptions
    from .bios_experiment import BiosOptions, Probes, run_selectivity
    from .model.baselines import Baseline
    from .model.bios import Contrast

    if (profession_probe is None) != (gender_probe is None):
        raise NotBoth("--profession-probe and --gender-probe go together: train both by `featlas tasks probe`, on one site")
    if output is not None and output.suffix not in (".csv", ".parquet", ".json"):
        raise BadParameterValue(f"--output {output}: its ending says what it is to be: .csv, .parquet or .json")
    probes = None
    if profession_probe is not None and gender_probe is not None:
        probes = Probes(profession_probe, gender_probe, bios, split, Contrast(male, female), length)
    removal = SelectivityOptions(
        n_nodes=nodes, n_edges=edges, draws=draws, baseline=Baseline(baseline), seed=seed, batch_size=batch_size, memory=memory_bytes(memory)
    )
    options = BiosOptions(
        model=model, dictionaries=dictionaries, atlas=atlas, graph=graph, n_found=found, n_measured=limit, steps=steps, threshold=threshold,
        rule=Rule(rule), removal=removal, runs=(gender_run, profession_run), probes=probes, device=device, dtype=dtype,
    )  # fmt: skip
    with console.progress("selectivity", quiet=as_json) as report:
        result = run_selectivity(options, lambda stage, done, total: report(done, total, stage))
    if output is not None:
        console.write_frame(result.table, Format(output.suffix[1:]), output)
    if as_json:
        frames = {name: getattr(result, name).to_dicts() for name in ("table", "nodes", "edges")}
        console.say_json({"baseline": baseline, "rule": rule, **frames})
    else:
        show.show_selectivity(result)


# --- query -----------------------------------------------------------------------------------------------------------


@app.command("query")
def query_command(
    name: Annotated[str | None, typer.Argument(autocompletion=completion.queries, help="A named query; --list shows them.")] = None,
    cypher: Annotated[str | None, typer.Option("--cypher", help="Cypher of your own instead of a named query.")] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", autocompletion=completion.parameters, help="A parameter, name=value; numbers and JSON are read as such."),
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="How to print or save the answer.")] = Format.TABLE,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the answer in this file.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Allow --cypher to change the graph.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="List the named queries with their parameters.")] = False,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Ask the graph: a named query, or Cypher of your own; read-only unless --write."""
    from .queries.library import list_queries, run_query

    if as_json and format not in (Format.TABLE, Format.JSON):
        raise NotBoth(f"--json is --format json: leave out one of --json and --format {format.value}")
    format = Format.JSON if as_json else format
    if show_list and format is Format.JSON:
        console.say_json([{"query": q.name, "parameters": [str(parameter) for parameter in q.parameters], "doc": q.doc} for q in list_queries()])
        return
    if show_list:
        console.table(("query", "parameters", "what it answers"), [(q.name, "; ".join(map(str, q.parameters)), q.doc) for q in list_queries()])
        return
    if (name is None) == (cypher is None):
        both = "both were given" if cypher is not None else "neither was given"
        raise NotBoth(f"give the name of a query (see `featlas query --list`) or Cypher of your own with --cypher: {both}")
    given = dict(_split_parameter(text) for text in param or [])
    with open_atlas(atlas, graph, write=write) as store:
        if cypher is not None:
            answer = store.query(cypher, {key: _typed(value) for key, value in given.items()}, write=write)
        else:
            answer = run_query(store, str(name), given)
    if answer.is_empty() and given:
        asked = ", ".join(f"{key}={value}" for key, value in given.items())
        console.note(f"no rows for {asked}: keys must be whole; `featlas query find_features` finds those of features")
    console.write_frame(answer, format, output)


def _split_parameter(text: str) -> tuple[str, str]:
    """`name=value` apart."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise BadParameterValue(f"--param {text!r} is not of the form name=value, for example --param limit=10")
    return name.strip(), value


def _typed(value: str) -> object:
    """A parameter of one's own Cypher: JSON where it is JSON (numbers, true, false, lists), else the text itself."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # no JSON, or such as no parser takes: 5,000 digits, 5,000 brackets
        return value


# --- doctor, demo ----------------------------------------------------------------------------------------------------


@app.command("doctor")
def doctor_command(
    model: Annotated[str | None, typer.Option("--model", help="Also: does this model load, and solve --task.")] = None,
    dictionaries: Annotated[str | None, typer.Option("--dictionaries", help="Also: how well do these dictionaries fit --model.")] = None,
    task: Annotated[str | None, task_option("The task that --model should solve.")] = None,
    device: Device = "cpu",
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Annotated[
        str | None, typer.Option("--graph", envvar="NEO4J_URI", help="Also: does this Neo4j server answer, and may it be written.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What is installed and working, each thing ok, warn or fail with the way out; exit code 1 where something fails.

    With --model: is the model seen right, does it solve --task, do --dictionaries fit it.
    """
    from . import doctor, show_doctor

    if model is None and (dictionaries or task):
        raise NotBoth("--dictionaries and --task are checked on a model: name it with --model")
    found = doctor.check_all(atlas, graph)
    if model is not None:
        found += doctor.check_model(model, dictionaries, task, device)
    if as_json:
        console.say_json(show_doctor.as_json(found))
    else:
        show_doctor.show(found)
    if any(check.status is doctor.Status.FAIL for check in found):
        raise typer.Exit(1)


@app.command("demo")
def demo_command(
    limit: Annotated[int, typer.Option("--limit", help="Pairs in all.")] = 48,
    fast: Annotated[bool, typer.Option("--fast", help="A few pairs only, to see it work.")] = False,
    series: Annotated[
        bool, typer.Option("--series", help="Instead: train a small transformer here, and see circuits emerge over its checkpoints (minutes).")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page to write.")] = Path("report.html"),
    seed: Seed = 0,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """The whole pipeline on SmolLM2-135M: tasks it solves, statistics, edges, circuit, findings, and an HTML page."""
    from .demo import DemoOptions, run_demo

    if series:
        from .cli_series import present
        from .series import demo_series

        atlas.mkdir(parents=True, exist_ok=True)
        with console.progress("series", quiet=as_json) as report:
            record = demo_series(atlas, graph=graph, fast=fast, seed=seed, progress=report)
        present(record, output, as_json)
        return
    options = DemoOptions(atlas=atlas, graph=graph, output=output, limit=min(limit, 4) if fast else limit, seed=seed)
    with console.aside(as_json):
        circuit = run_demo(options).circuit
    if as_json:
        counts = {"n_nodes": circuit.n_nodes, "n_edges": circuit.n_edges}
        console.say_json({"atlas": str(atlas), "run": circuit.selection.run, "circuit": circuit.key, **counts, "output": str(output)})


# --- neo4j -----------------------------------------------------------------------------------------------------------

Home = Annotated[Path | None, typer.Option("--home", envvar="FEATLAS_NEO4J_HOME", help="Folder of the server: data, logs, password.")]


BoltPort = Annotated[int, typer.Option("--bolt-port", help="Port for clients; 0 takes any free one.")]
HttpPort = Annotated[int, typer.Option("--http-port", help="Port of the Browser; 0 takes any free one.")]


@neo4j_app.command("up")
def neo4j_up_command(
    home: Home = None,
    bolt_port: BoltPort = 7687,
    http_port: HttpPort = 7474,
    heap_mb: Annotated[int, typer.Option("--heap-mb", help="Memory of the server in MiB.")] = 2048,
    gds: Annotated[bool, typer.Option("--gds", help="With the open edition of Graph Data Science; a running server must go down first.")] = False,
    tls_certificate: Annotated[
        Path | None, typer.Option("--tls-certificate", help="Encrypt bolt with this certificate (PEM); with --tls-key.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="The certificate's private key (PEM, PKCS #8, not encrypted).")] = None,
    as_json: Json = False,
) -> None:
    """Start a local Neo4j with its Browser (Java 17; the jars are fetched once by Maven) and say how to log in."""
    from .queries.neo4j_server import ServerOptions, TlsFiles, default_home, up

    if (tls_certificate is None) != (tls_key is None):
        raise NotBoth("--tls-certificate and --tls-key belong together: give both, or none for a server without TLS")
    tls = TlsFiles(tls_certificate, tls_key) if tls_certificate is not None and tls_key is not None else None
    info = up(home or default_home(), ServerOptions(bolt_port=bolt_port, http_port=http_port, heap_mb=heap_mb, gds=gds, tls=tls))
    if as_json:
        console.say_json({"uri": info.uri, "browser": info.http_url, "username": info.username, "password_file": str(info.password_file)})
        return
    console.say(f"Neo4j answers at {info.uri}; its Browser is {info.http_url}")
    console.say(f"log in as {info.username} with the password in {info.password_file}")
    console.say(f"use it with --graph {info.uri}, or: export NEO4J_URI={info.uri}")
    console.say("colours, a guide with ten questions and queries to save for its Browser: featlas neo4j browser --serve")


@neo4j_app.command("down")
def neo4j_down_command(home: Home = None, as_json: Json = False) -> None:
    """Stop the local Neo4j; its data stay."""
    from .queries.neo4j_server import default_home, down

    stopped = down(home or default_home())
    if as_json:
        console.say_json({"stopped": stopped})
    else:
        console.say("Neo4j is stopped" if stopped else "no Neo4j of featlas was running")


@neo4j_app.command("status")
def neo4j_status_command(home: Home = None, as_json: Json = False) -> None:
    """Whether the local Neo4j runs, and where; exit code 1 where it does not."""
    from .queries.neo4j_server import default_home, status

    info = status(home or default_home())
    if as_json:
        console.say_json(None if info is None else {"uri": info.uri, "browser": info.http_url, "pid": info.pid})
    elif info is None:
        console.say("no Neo4j of featlas is running: start it with `featlas neo4j up`")
    else:
        console.say(f"Neo4j answers at {info.uri}; its Browser is {info.http_url}")
        console.say(f"log in as {info.username} with the password in {info.password_file}")
    if info is None:
        raise typer.Exit(1)


@neo4j_app.command("import")
def neo4j_import_command(
    folder: Annotated[Path, typer.Argument(help="Folder of import files, made by `featlas export`.")],
    home: Home = None,
    bolt_port: BoltPort = 7687,
    http_port: HttpPort = 7474,
    as_json: Json = False,
) -> None:
    """Load import files into the local Neo4j, whose database must be empty: the fast way for large graphs. The server is restarted."""
    from .queries.bulk_import import bulk_import
    from .queries.neo4j_server import ServerOptions, default_home

    info = bulk_import(folder, home or default_home(), ServerOptions(bolt_port=bolt_port, http_port=http_port))
    if as_json:
        console.say_json({"uri": info.uri, "browser": info.http_url})
    else:
        console.say(f"loaded {folder}; Neo4j answers at {info.uri}, its Browser is {info.http_url}")


# --- main ------------------------------------------------------------------------------------------------------------


SMALL_MACHINE = 4  # processors


def _settle_threads() -> None:
    """Thread settings for libraries that read them when they are first imported; what the user has set stays.

    OpenMP threads that wait actively for each other on a small or shared machine cost a factor of 20 (measured on 2 processors).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if (os.cpu_count() or 1) <= SMALL_MACHINE:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    """The entry point: run the command, and turn what goes wrong on purpose into one line and an exit code."""
    _settle_threads()
    sys.exit(running.run(app, sys.argv[1:]))


from . import (  # noqa: E402 - at the end: they register their commands on this app and take their options from here
    cli_ablation,  # noqa: F401
    cli_atlas,  # noqa: F401
    cli_browser,  # noqa: F401
    cli_communities,  # noqa: F401
    cli_compare,  # noqa: F401
    cli_config,  # noqa: F401
    cli_explain,  # noqa: F401
    cli_export,  # noqa: F401
    cli_graph,  # noqa: F401
    cli_heads,  # noqa: F401
    cli_labels,  # noqa: F401
    cli_match,  # noqa: F401
    cli_plan,  # noqa: F401
    cli_regions,  # noqa: F401
    cli_report,  # noqa: F401
    cli_samples,  # noqa: F401
    cli_series,  # noqa: F401
    cli_serve,  # noqa: F401
    cli_vision,  # noqa: F401
)

if __name__ == "__main__":
    main()
