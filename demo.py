"""The demonstration: a real language model's feature circuit, from prompts to a page, in a few minutes on a laptop's processor.

1. `choose_tasks`: of the tasks that one sentence explains, those that the model really solves.
2. `measure`: statistics of the features on the tasks' texts, then the effective edges of every pair.
3. `present`: the circuit by threshold, written back; findings as tables; the page.
4. `next_commands`: what to try next, with this run's own names.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from . import console, files, show
from .analysis.circuits import Circuit, PathRule, Selection, run_circuit, write_circuit
from .analysis.labels import annotate
from .analysis.summary import Summary, SummaryOptions, summarise
from .errors import UserError
from .ingest.effective import EdgeSettings
from .ingest.pipeline import EdgeOptions, RunSummary, ingest_edges
from .ingest.statistics import StatisticsOptions, measure_statistics, pair_corpus
from .model.dictionary_sources import SiteDictionaries, load_dictionaries
from .model.loading import LoadedModel, load_model
from .model.solvability import check_task
from .model.tasks import build_task
from .pages.report import ReportOptions, render
from .pages.source import PageSource
from .queries.statistics import StatisticsStore
from .queries.store import open_graph
from .queries.subgraphs import STRONGEST_ON_OUTPUT, find_run

MODEL, DICTIONARIES = "smollm2", "demo"
CANDIDATES = ("agreement", "agreement_rc", "pronoun", "ioi", "boolean")
SOLVED = 0.8  # accuracy below which a task says little about how the model solves it
CHECK_PAIRS = 12
STATISTICS_TEXTS = 3  # pairs for the statistics, for each pair whose edges are measured
EDGE_THRESHOLD = 0.02  # in logits, on single-position edges
CIRCUIT_EDGES = 600


class NothingSolved(UserError):
    """The model solves none of the tasks."""


@dataclass(frozen=True)
class DemoOptions:
    """`limit` pairs in all; `graph` None is the atlas' embedded graph."""

    atlas: Path
    graph: str | None = None
    output: Path = Path("report.html")
    limit: int = 48
    seed: int = 0
    dictionaries: str = DICTIONARIES
    candidates: tuple[str, ...] = CANDIDATES


def run_demo(options: DemoOptions) -> Summary:
    """Run all of it, printing what is found on the way."""
    started = time.monotonic()
    options.atlas.mkdir(parents=True, exist_ok=True)
    console.heading(f"1. The model: SmolLM2-135M, and the features of its dictionaries {options.dictionaries!r}")
    model = load_model(MODEL)
    dictionaries = load_dictionaries(options.dictionaries, model)
    sites = ", ".join(f"{site.name} ({dictionary.d_sae:,} features)" for site, dictionary in dictionaries.items())
    console.say(f"{model.key}: {model.n_layers} layers, {model.d_model} wide; dictionaries at {sites}")
    task = "+".join(choose_tasks(model, options))
    summary = measure(model, dictionaries, task, options)
    report = present(summary.run, options)
    console.heading(f"Done in {time.monotonic() - started:.0f} s. The page: {options.output} (open it in any browser). Try next:")
    for command in report.options.commands:
        console.say(f"  {command}")
    return report


def choose_tasks(model: LoadedModel, options: DemoOptions) -> list[str]:
    """The candidates that the model solves; raises `NothingSolved` where there is none."""
    console.heading("2. Which tasks does it solve?")
    rows, solved = [], []
    for name in options.candidates:
        pairs = build_task(name, model.tokenizer, n=CHECK_PAIRS, seed=options.seed)
        measured = check_task(model, pairs).row(0, named=True)
        if measured["accuracy"] >= SOLVED:
            solved.append(name)
        verdict = "yes" if name in solved else "no: left out"
        rows.append((name, verdict, f"{measured['accuracy']:.0%}", f"{measured['logit_diff']:+.2f}", f"{pairs[0].clean} → {pairs[0].answer.strip()}"))
    console.table(("task", "solved", "accuracy", "logit difference", "example"), rows)
    if not solved:
        raise NothingSolved(f"{MODEL} solves none of {', '.join(options.candidates)}: see `featlas tasks check`")
    return solved


def measure(model: LoadedModel, dictionaries: SiteDictionaries, task: str, options: DemoOptions) -> RunSummary:
    """Statistics into the statistics store, edges into the graph, frequencies and names onto the graph's features."""
    console.heading(f"3. Measuring {options.limit} pairs of {task}")
    # More texts than edges: a feature is named by its strongest contexts. Position 0 is a massive activation that says nothing.
    pairs = build_task(task, model.tokenizer, n=options.limit * STATISTICS_TEXTS, seed=options.seed)
    settings = StatisticsOptions(skip_positions=1, second_moments=False, seed=options.seed)
    corpus = pair_corpus(task, pairs, model.tokenizer, settings)
    with StatisticsStore(options.atlas) as statistics, console.progress("statistics") as bar:
        report = lambda done, total, tokens: bar(done, total, f"{tokens:,} tokens")
        record = measure_statistics(statistics, model, dictionaries, corpus, settings, progress=report)
    console.say(f"statistics: {record.sequences} texts, {record.tokens:,} tokens")
    summary = measure_edges(task, options)
    with StatisticsStore(options.atlas) as statistics, open_graph(options.graph or options.atlas) as store:
        annotate(store, statistics, record.run)
    return summary


def measure_edges(task: str, options: DemoOptions) -> RunSummary:
    """The effective edges of every pair into the graph."""
    edges = EdgeOptions(
        model=MODEL, dictionaries=options.dictionaries, task=task, atlas=options.atlas, graph=options.graph, limit=options.limit, seed=options.seed,
        settings=EdgeSettings(steps=1, threshold=EDGE_THRESHOLD),
    )  # fmt: skip
    with console.progress("edges") as bar:
        summary = ingest_edges(edges, progress=lambda p: bar(p.done, p.total, f"{p.edges:,} edges, {p.edges_per_second:,.0f}/s"))
    counted = f"{summary.n_edges:,} edges written, {summary.n_influences:,} after aggregation"
    console.say(f"edges: {summary.n_sequences} pairs, {counted}, {summary.seconds:.0f} s")
    return summary


def present(run: str, options: DemoOptions) -> Summary:
    """Cut the circuit, write it back, print it and save the page."""
    console.heading("4. The circuit")
    with open_graph(options.graph or options.atlas) as store, StatisticsStore(options.atlas, read_only=True) as statistics:
        found = find_run(store, run)
        circuit = run_circuit(store, found, Selection(run), n_edges=CIRCUIT_EDGES)
        key = write_circuit(store, circuit)
        settings = SummaryOptions(n_features=15, rule=PathRule.PRODUCT, commands=next_commands(circuit, options))
        report = summarise(store, statistics, found, circuit, settings)
        show.show_circuit(report, key)
        with console.saving(options.output), console.progress("page") as bar:
            text = render(PageSource(store, statistics, options.atlas), ReportOptions(), bar)
            files.write_text(options.output, text)
    return report


def next_commands(circuit: Circuit, options: DemoOptions) -> tuple[str, ...]:
    """Three commands that go on from here, complete as they stand."""
    where = f" --graph {shlex.quote(options.graph)}" if options.graph else ""
    where += f" --atlas {shlex.quote(str(options.atlas))}" if options.atlas != Path("atlas") else ""
    run = circuit.selection.run
    return (
        f"featlas query hubs --param run={run}{where}",
        f"featlas query --cypher {shlex.quote(STRONGEST_ON_OUTPUT)}{where}",
        f"featlas analyze circuit --run {run} --edges 100 --by weight{where}",
    )
