"""The command that keeps samples: the nodes of sites token by token."""

from typing import Annotated, Literal

import typer

from . import console
from .options import (
    DEFAULT_ATLAS,
    DEMO_DICTIONARIES,
    DEMO_MODEL,
    Atlas,
    Baseline,
    BatchSize,
    Bos,
    Device,
    Dictionaries,
    Dtype,
    Json,
    Mean,
    Metric,
    Model,
    NoiseScale,
    NotBoth,
    Seed,
    Sites,
    SkipInvalid,
    StatisticsRun,
    Steps,
    corpus_option,
    ingest_app,
    load_named,
    task_option,
)

Basis = Annotated[
    Literal["activation", "attribution"],
    typer.Option("--basis", help="Samples of activations, or (with --task, clean prompts only) of attributions to --metric from --baseline."),
]


@ingest_app.command("samples")
def ingest_samples_command(
    model: Model = DEMO_MODEL,
    dictionaries: Dictionaries = DEMO_DICTIONARIES,
    corpus: Annotated[str | None, corpus_option("Text file, folder of them, JSONL with `text`, or Hugging Face data set.")] = None,
    task: Annotated[str | None, task_option("Instead of a corpus: the prompts of a task's pairs, clean and corrupted.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Blocks of text, or pairs of a task (100 unless given), to draw from at most.")] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens in a block of text.")] = 128,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Tokens at most; where the texts have more, whole blocks or pairs are drawn from all by --seed.")
    ] = 100_000,
    skip_positions: Annotated[
        int | None, typer.Option("--skip-positions", help="First positions of each text to leave out; 1 for a corpus, 0 for a task unless given.")
    ] = None,
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
    atlas: Atlas = DEFAULT_ATLAS,
    as_json: Json = False,
) -> None:
    """Every feature's value at every token of a corpus or a task, sparse, into the atlas: what regions of interest are found from."""
    from .ingest.ranges import check_baseline, check_numbers

    check_numbers(steps=steps, noise_scale=noise_scale, limit=limit, batch_size=batch_size)
    attribution = basis == "attribution"
    if (corpus is None) == (task is None):
        raise NotBoth("name a text corpus with --corpus, or a task with --task: one of the two")
    if attribution:
        if task is None:
            raise NotBoth("--basis attribution needs the pairs of a --task: a corpus has no corrupted texts and no answers")
        check_baseline(baseline, statistics_run, per_position=mean == "per-position")
    from .cli import _edge_settings, _pairs
    from .ingest.samples import SampleOptions, collect_samples, plan_samples, task_source, text_source
    from .ingest.statistics import node_means
    from .queries.samples import SampleStore
    from .queries.statistics import StatisticsStore

    options = SampleOptions(length=length, batch_size=batch_size, skip_positions=skip_positions, max_tokens=max_tokens, seed=seed)
    settings = None
    if attribution:
        settings = _edge_settings(
            metric=metric, baseline=baseline, steps=steps, per_position=mean == "per-position", noise_scale=noise_scale, noise_seed=seed
        )
    loaded, found = load_named(model, dictionaries, sites, device, dtype, bos)
    if corpus is not None:
        source = text_source(corpus, loaded.tokenizer, options, max_sequences=limit)
    else:
        pairs = _pairs(str(task), loaded.tokenizer, limit or 100, seed, skip_invalid)
        source = task_source(
            str(task), pairs, loaded.tokenizer, options, clean_only=attribution, device=loaded.device,
            donor_seed=seed if attribution and baseline == "resample" else None,
        )  # fmt: skip
    means = None
    if settings is not None and settings.baseline.of_corpus:
        with StatisticsStore(atlas, read_only=True) as statistics:
            statistics_run = statistics.find_run(statistics_run).run
            means = node_means(statistics, statistics_run, loaded, found, settings.choice)
    store = SampleStore(atlas)
    known = store.has(plan_samples(loaded, found, source, options, settings=settings, statistics_run=statistics_run).key)
    with console.progress("samples", quiet=as_json) as bar:
        report = lambda done, total, tokens: bar(done, total, f"{tokens:,} tokens")
        run = collect_samples(
            store, loaded, found, source, options, settings=settings, means=means, statistics_run=statistics_run,
            named={"model": model, "dictionaries": dictionaries}, progress=report,
        )  # fmt: skip
    if as_json:
        of_sites = [{"site": s.site, "dictionary": s.dictionary, "d_sae": s.d_sae, "mean_l0": s.mean_l0, "bytes": s.n_bytes} for s in run.sites]
        counts = {"sequences": run.n_sequences, "tokens": run.n_tokens, "available": source.n_available}
        console.say_json({"samples": run.key, "basis": run.basis, "new": not known, **counts, "sites": of_sites})
        return
    there = ", there already" if known else ""
    drawn = f" (of {source.n_available:,}, drawn by seed {seed})" if source.n_available > run.n_sequences else ""
    console.say(f"samples {run.key}{there}: {run.basis}s at {run.n_tokens:,} tokens of {run.n_sequences:,} sequences{drawn}")
    rows = [(s.site, s.dictionary, f"{s.d_sae:,}", f"{s.mean_l0:.1f}", "dense" if s.dense else "sparse", _size(s.n_bytes)) for s in run.sites]
    console.table(("site", "dictionary", "features", "mean L0", "kept", "size"), rows)
    console.say(f"{_size(run.n_bytes)} in {store.folder / run.key}; next: featlas analyze rois --samples {run.key[:8]}")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"
