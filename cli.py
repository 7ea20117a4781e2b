"""The command `featlas`: each command opens, calls, prints.

Heavy imports stand inside the commands, so that `featlas --help` answers at once. A user's mistake is one line on standard
error and exit code 2, a failure one line and 1; anything else is a bug and keeps its traceback.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import console
from .errors import FeatlasError, UserError

if TYPE_CHECKING:

    from .analysis.circuits import Circuit
    from .analysis.report import Report
    from .model.dictionary_sources import SiteDictionaries
    from .model.loading import LoadedModel
    from .queries.statistics import StatisticsStore
    from .queries.store import GraphStore

_GROUP = {"no_args_is_help": True, "rich_markup_mode": None, "add_completion": False}
app = typer.Typer(name="featlas", help="featlas: a feature atlas of neural networks, in a graph database.", **_GROUP)  # type: ignore[arg-type]
tasks_app = typer.Typer(help="Prompt pairs: list, show, build and check them.", **_GROUP)  # type: ignore[arg-type]
dictionaries_app = typer.Typer(help="Dictionaries: list, train and evaluate them.", **_GROUP)  # type: ignore[arg-type]
ingest_app = typer.Typer(help="Measure a model: edges into the graph, statistics into DuckDB.", **_GROUP)  # type: ignore[arg-type]
analyze_app = typer.Typer(help="The science on a measured graph.", **_GROUP)  # type: ignore[arg-type]
neo4j_app = typer.Typer(help="A local Neo4j server with its Browser.", **_GROUP)  # type: ignore[arg-type]
for _name, _sub in (("tasks", tasks_app), ("dictionaries", dictionaries_app), ("ingest", ingest_app), ("analyze", analyze_app), ("neo4j", neo4j_app)):
    app.add_typer(_sub, name=_name)

# --- options that mean the same everywhere ---------------------------------------------------------------------------

_DEMO_MODEL, _DEMO_DICTIONARIES = "smollm2", "demo"

Atlas = Annotated[Path, typer.Option("--atlas", envvar="FEATLAS_ATLAS", help="Folder of the atlas: embedded graph, statistics, manifests.")]
Graph = Annotated[
    str | None, typer.Option("--graph", envvar="NEO4J_URI", help="A Neo4j server (bolt://… or neo4j://…) instead of the atlas' embedded graph.")
]
Model = Annotated[str, typer.Option("--model", help="Hugging Face name, local folder, .gguf file, or smollm2.")]
Dictionaries = Annotated[
    str, typer.Option("--dictionaries", help="Folder with a sub-folder per site, sae_lens release, release:sae_id,…, identity, or demo.")
]
Task = Annotated[str, typer.Option("--task", help="Task name, a mixture a+b+c, or a JSONL file of pairs.")]
Sites = Annotated[str | None, typer.Option("--sites", help="Sites to take, comma-separated: resid_3,mlp_4; all that have a dictionary unless given.")]
Limit = Annotated[int, typer.Option("--limit", help="Pairs at most.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:0 or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16; attribution wants float32.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Sequences in one run of the model.")]
SkipInvalid = Annotated[bool, typer.Option("--skip-invalid", help="Leave out a file's unusable pairs, naming them, instead of refusing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Run = Annotated[str | None, typer.Option("--run", help="The run, by its key or the beginning of it; not needed where there is only one.")]
By = Literal["abs_weight", "weight"]
Rule = Literal["product", "bottleneck"]
Metric = Annotated[
    Literal["logit_diff", "kl", "tv", "accuracy", "mrr"], typer.Option("--metric", help="What the effects are on; it must be differentiable.")
]
Baseline = Annotated[Literal["counterfactual", "zero", "mean"], typer.Option("--baseline", help="The value that nodes are moved from.")]
Positions = Annotated[Literal["keep", "sum", "max"], typer.Option("--positions", help="Token positions: kept apart, summed, or the greatest effect.")]
Steps = Annotated[
    int,
    typer.Option(
        "--steps",
        help="Steps of integrated gradients; only 1 (attribution patching) is available yet. "
        "At 1 a feature that is inactive in the clean run gets no incoming edge.",
    ),
]
ShowVersion = Annotated[bool, typer.Option("--version", help="Print the version and leave.")]

DEFAULT_ATLAS = Path("atlas")


class NoAtlas(UserError):
    """A command that reads found no graph."""


class BadParameterValue(UserError):
    """A --param is not of the form name=value."""


class NotBoth(UserError):
    """Two options exclude each other, or one of two is needed."""


@app.callback(invoke_without_command=True)
def root(context: typer.Context, version: ShowVersion = False) -> None:
    """featlas: a feature atlas of neural networks, in a graph database."""
    if version:
        from importlib import metadata

        console.say(f"featlas {metadata.version('featlas')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.say(context.get_help())
        raise typer.Exit(2)


# --- opening ---------------------------------------------------------------------------------------------------------


def _open_graph(atlas: Path, graph: str | None, *, write: bool) -> "GraphStore":
    """The graph that the options name; one that is only read must be there."""
    from .queries.store import open_graph

    if graph is None and not write and not (atlas / "graph.lbug").exists():
        raise NoAtlas(f"no graph in {atlas}: make one with `featlas demo` or `featlas ingest edges`, or name another with --atlas or --graph")
    if graph is None:
        atlas.mkdir(parents=True, exist_ok=True)
    return open_graph(graph or atlas, read_only=not write)


def _open_statistics(atlas: Path) -> "StatisticsStore | None":
    """The atlas' statistics for reading, where there are any."""
    from .queries.statistics import FILE_NAME, StatisticsStore

    return StatisticsStore(atlas, read_only=True) if (atlas / FILE_NAME).exists() else None


def _load(model: str, dictionaries: str, sites: str | None, device: str, dtype: str) -> "tuple[LoadedModel, SiteDictionaries]":
    from .model.dictionary_sources import load_dictionaries
    from .model.loading import load_model
    from .model.sites import parse_site

    loaded = load_model(model, device=device, dtype=dtype)
    chosen = [parse_site(name) for name in _names(sites)] if sites else None
    return loaded, load_dictionaries(dictionaries, loaded, sites=chosen, device=device, dtype=dtype)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


# --- ingest ----------------------------------------------------------------------------------------------------------


@ingest_app.command("edges")
def ingest_edges_command(
    model: Model = _DEMO_MODEL,
    dictionaries: Dictionaries = _DEMO_DICTIONARIES,
    task: Task = "agreement",
    limit: Limit = 100,
    steps: Steps = 1,
    metric: Metric = "logit_diff",
    baseline: Baseline = "counterfactual",
    threshold: Annotated[float, typer.Option("--threshold", help="Keep single-position edges with |effect| of at least this; 0: all.")] = 0.0,
    max_edges: Annotated[int | None, typer.Option("--max-edges", help="Then the strongest so many edges into each node and position.")] = None,
    positions: Positions = "sum",
    statistics_run: Annotated[str | None, typer.Option("--statistics-run", help="Run of `ingest statistics` that --baseline mean takes.")] = None,
    sites: Sites = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    skip_invalid: SkipInvalid = False,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Effective edges of every sequence of a task into the graph; an interrupted run continues, a repeated one changes nothing."""
    from dataclasses import asdict

    from .ingest import effective
    from .ingest.pipeline import EdgeOptions, ingest_edges
    from .model import metrics

    settings = effective.EdgeSettings(
        metric=metrics.Metric(metric), baseline=effective.Baseline(baseline), steps=steps, threshold=threshold, max_edges=max_edges,
        positions=effective.Positions(positions),
    )  # fmt: skip
    options = EdgeOptions(
        model=model, dictionaries=dictionaries, task=task, atlas=atlas, graph=graph, sites=_names(sites) if sites else None, limit=limit, seed=seed,
        settings=settings, batch_size=batch_size, device=device, dtype=dtype, skip_invalid=skip_invalid, statistics_run=statistics_run,
    )  # fmt: skip
    if graph is None:
        atlas.mkdir(parents=True, exist_ok=True)
    with console.progress("edges", quiet=as_json) as report:
        summary = ingest_edges(options, progress=lambda p: report(p.done, p.total, f"{p.edges:,} edges, {p.edges_per_second:,.0f}/s"))
    if as_json:
        console.say_json(asdict(summary))
        return
    done = f"{summary.n_sequences - summary.n_skipped} sequences" + (f" ({summary.n_skipped} were done before)" if summary.n_skipped else "")
    console.say(f"run {summary.run}: {done}, {summary.n_edges:,} edges written, {summary.n_influences:,} after aggregation, {summary.seconds:.1f} s")


@ingest_app.command("finish")
def ingest_finish_command(
    run: Annotated[str, typer.Argument(help="The run, by its key or the beginning of it.")],
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Derive a run's INFLUENCES anew from its committed edges, as the end of `ingest edges` does."""
    from .ingest.pipeline import finish_run
    from .queries.subgraphs import find_run

    with _open_graph(atlas, graph, write=True) as store:
        key = find_run(store, run).key
        n_influences = finish_run(store, key)
    if as_json:
        console.say_json({"run": key, "n_influences": n_influences})
    else:
        console.say(f"run {key}: {n_influences:,} aggregated edges")


@ingest_app.command("statistics")
def ingest_statistics_command(
    model: Model = _DEMO_MODEL,
    dictionaries: Dictionaries = _DEMO_DICTIONARIES,
    corpus: Annotated[str | None, typer.Option("--corpus", help="Text file, folder of them, JSONL with `text`, or Hugging Face data set.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Instead of a corpus: the texts of a task's pairs.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Blocks of text, or pairs of a task (100 unless given), at most.")] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens in a block of text.")] = 128,
    contexts: Annotated[int, typer.Option("--contexts", help="Strongest contexts kept per feature.")] = 10,
    by_position: Annotated[bool, typer.Option("--by-position", help="Means per position too.")] = False,
    sites: Sites = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    skip_invalid: SkipInvalid = False,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Per feature: count, frequency, moments and strongest contexts, into the statistics store; frequencies onto the graph's features too."""
    from .ingest.statistics import StatisticsOptions, measure_statistics, pair_corpus, text_corpus
    from .model.tasks import load_task
    from .queries.statistics import StatisticsStore

    if (corpus is None) == (task is None):
        raise NotBoth("name a text corpus with --corpus, or a task with --task: one of the two")
    loaded, found = _load(model, dictionaries, sites, device, dtype)
    options = StatisticsOptions(length=length, batch_size=batch_size, n_contexts=contexts, by_position=by_position, seed=seed)
    if corpus is not None:
        source = text_corpus(corpus, loaded.tokenizer, options, max_sequences=limit)
    else:
        pairs = load_task(str(task), loaded.tokenizer, n=limit or 100, seed=seed, skip_invalid=skip_invalid)
        source = pair_corpus(str(task), pairs, loaded.tokenizer, options, device=device)
    atlas.mkdir(parents=True, exist_ok=True)
    with StatisticsStore(atlas) as statistics, console.progress("statistics", quiet=as_json) as report:
        record = measure_statistics(
            statistics, loaded, found, source, options, progress=lambda done, total, tokens: report(done, total, f"{tokens:,} tokens")
        )
        annotated = _annotate(atlas, graph, statistics, record.run)
    if as_json:
        console.say_json({"run": record.run, "sequences": record.sequences, "tokens": record.tokens, "annotated": annotated})
    else:
        measured = f"{record.sequences:,} sequences, {record.tokens:,} tokens"
        console.say(f"statistics run {record.run}: {measured}; {annotated:,} nodes of the graph annotated")


def _annotate(atlas: Path, graph: str | None, statistics: "StatisticsStore", run: str) -> int:
    """Frequencies onto the graph's features, where there is a graph."""
    from .analysis.notes import annotate

    if graph is None and not (atlas / "graph.lbug").exists():
        return 0
    with _open_graph(atlas, graph, write=True) as store:
        return annotate(store, statistics, run)


# --- analyze, report -------------------------------------------------------------------------------------------------

Threshold = Annotated[float | None, typer.Option("--threshold", help="Least strength of an edge; unless given, what the --edges strongest reach.")]
Edges = Annotated[int, typer.Option("--edges", help="Without --threshold: about so many edges.")]
ByOption = Annotated[By, typer.Option("--by", help="Threshold the mean magnitude of the effects, or the magnitude of their mean.")]
TopEdges = Annotated[int | None, typer.Option("--top-edges", help="Then the strongest so many edges.")]
Sequence = Annotated[str | None, typer.Option("--sequence", help="One sequence, by its key, instead of the run's means.")]
Paths = Annotated[int, typer.Option("--paths", help="Strongest paths to show.")]
PathRuleOption = Annotated[Rule, typer.Option("--path-rule", help="Path score: product of the edges' shares, or the weakest edge.")]
DEFAULT_EDGES = 300


@analyze_app.command("circuit")
def analyze_circuit_command(
    run: Run = None,
    threshold: Threshold = None,
    edges: Edges = DEFAULT_EDGES,
    by: ByOption = "abs_weight",
    top_edges: TopEdges = None,
    sequence: Sequence = None,
    positions: Annotated[bool, typer.Option("--positions", help="With --sequence: keep token positions apart, where they were kept.")] = False,
    paths: Paths = 10,
    path_rule: PathRuleOption = "product",
    features: Annotated[int, typer.Option("--features", help="Most influential features to show.")] = 15,
    write: Annotated[bool, typer.Option("--write/--no-write", help="Write the circuit back into the graph.")] = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Threshold a run's edges, drop what is not on a path from an input to the output, and write the circuit back."""
    from . import show
    from .analysis.circuits import By as Thresholded
    from .analysis.circuits import Selection, run_circuit, write_circuit
    from .queries.subgraphs import find_run

    with _open_graph(atlas, graph, write=write) as store:
        found = find_run(store, run)
        selection = Selection(found.key, threshold or 0.0, Thresholded(by), top_edges, sequence, positions)
        circuit = run_circuit(store, found, selection, n_edges=edges if threshold is None and top_edges is None else None)
        key = write_circuit(store, circuit) if write else None
        report = _gather(store, atlas, found.key, circuit, paths=paths, path_rule=path_rule, features=features)
    if as_json:
        console.say_json(_circuit_json(circuit, report, key))
    else:
        show.show_circuit(report, key)


def _gather(
    store: "GraphStore", atlas: Path, run: str, circuit: "Circuit", *, paths: int, path_rule: str, features: int, drawn: int = 150
) -> "Report":
    """The circuit with everything that is known of its nodes."""
    from . import show
    from .analysis.circuits import PathRule
    from .analysis.report import PageOptions, gather
    from .queries.subgraphs import find_run

    options = PageOptions(n_paths=paths, n_features=features, max_edges=drawn, rule=PathRule(path_rule), commands=show.NEXT_COMMANDS)
    statistics = _open_statistics(atlas)
    try:
        return gather(store, statistics, find_run(store, run), circuit, options)
    finally:
        if statistics is not None:
            statistics.close()


def _circuit_json(circuit: "Circuit", report: "Report", key: str | None) -> dict[str, object]:
    numbers = {"n_nodes": circuit.n_nodes, "n_edges": circuit.n_edges, "average_degree": circuit.average_degree, "density": circuit.density}
    selection = circuit.selection
    named = circuit.nodes.join(report.notes.select("key", "name"), on="key", how="left", maintain_order="left")
    paths = [{"score": path.score, "nodes": path.nodes, "weights": path.weights} for path in report.paths]
    return {
        "circuit": key, "run": selection.run, "threshold": selection.threshold, "by": selection.by.value, **numbers,
        "nodes": named.to_dicts(), "edges": circuit.edges.to_dicts(), "paths": paths,
    }  # fmt: skip


@app.command("report")
def report_command(
    run: Run = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page to write.")] = Path("report.html"),
    threshold: Threshold = None,
    edges: Edges = DEFAULT_EDGES,
    by: ByOption = "abs_weight",
    top_edges: TopEdges = None,
    paths: Paths = 10,
    path_rule: PathRuleOption = "product",
    drawn: Annotated[int, typer.Option("--drawn", help="Edges in the drawing, at most.")] = 150,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
) -> None:
    """One self-contained HTML page about a run's circuit; it opens offline."""
    from . import show
    from .analysis.circuits import By as Thresholded
    from .analysis.circuits import Selection, run_circuit
    from .queries.subgraphs import find_run

    with _open_graph(atlas, graph, write=False) as store:
        found = find_run(store, run)
        selection = Selection(found.key, threshold or 0.0, Thresholded(by), top_edges)
        circuit = run_circuit(store, found, selection, n_edges=edges if threshold is None and top_edges is None else None)
        report = _gather(store, atlas, found.key, circuit, paths=paths, path_rule=path_rule, features=25, drawn=drawn)
    show.write_report(report, output)
    console.say(f"wrote {output}: {circuit.n_nodes} nodes, {circuit.n_edges} edges")


# --- neo4j -----------------------------------------------------------------------------------------------------------

Home = Annotated[Path | None, typer.Option("--home", envvar="FEATLAS_NEO4J_HOME", help="Folder of the server: data, logs, password.")]


@neo4j_app.command("up")
def neo4j_up_command(
    home: Home = None,
    bolt_port: Annotated[int, typer.Option("--bolt-port", help="Port for clients; 0 takes any free one.")] = 7687,
    http_port: Annotated[int, typer.Option("--http-port", help="Port of the Browser; 0 takes any free one.")] = 7474,
    heap_mb: Annotated[int, typer.Option("--heap-mb", help="Memory of the server in MiB.")] = 2048,
    as_json: Json = False,
) -> None:
    """Start a local Neo4j with its Browser (Java 17; the jars are fetched once by Maven) and say how to log in."""
    from .queries.neo4j_server import ServerOptions, default_home, up

    info = up(home or default_home(), ServerOptions(bolt_port=bolt_port, http_port=http_port, heap_mb=heap_mb))
    if as_json:
        console.say_json({"uri": info.uri, "browser": info.http_url, "username": info.username, "password_file": str(info.password_file)})
        return
    console.say(f"Neo4j answers at {info.uri}; its Browser is {info.http_url}")
    console.say(f"log in as {info.username} with the password in {info.password_file}")
    console.say(f"use it with --graph {info.uri}, or: export NEO4J_URI={info.uri}")


@neo4j_app.command("down")
def neo4j_down_command(home: Home = None) -> None:
    """Stop the local Neo4j; its data stay."""
    from .queries.neo4j_server import default_home, down

    console.say("Neo4j is stopped" if down(home or default_home()) else "no Neo4j of featlas was running")


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


# --- main ------------------------------------------------------------------------------------------------------------


def main() -> None:
    """The entry point: run the command, and turn what goes wrong on purpose into one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except FeatlasError as error:
        code = _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        code = _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted", 130)
    except BrokenPipeError:
        # the reader went away (`featlas … | head`): nothing to say, and nothing more to flush
        sys.stdout = None
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"featlas: {message}\n")
    return code


if __name__ == "__main__":
    main()
