"""The commands that take graphs out of an atlas and into it: `featlas export`, `featlas import circuit-tracer`, `featlas import files`."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .errors import UserError
from .options import (
    DEFAULT_ATLAS,
    Atlas,
    ByOption,
    Graph,
    Json,
    NotBoth,
    Run,
    app,
    open_atlas,
    open_statistics,
)

if TYPE_CHECKING:
    from .analysis.circuits import Circuit
    from .analysis.exchange import GraphFrames
    from .queries.store import GraphStore

import_app = typer.Typer(
    help="Take in what other programs have measured.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)
app.add_typer(import_app, name="import")


class ExportFormat(StrEnum):
    """What `featlas export` writes: the first two the whole graph, the others one circuit."""

    NEO4J = "neo4j"
    PARQUET = "parquet"
    GRAPHML = "graphml"
    NODE_LINK = "networkx-json"
    CIRCUIT_TRACER = "circuit-tracer"

    @property
    def whole(self) -> bool:
        """Whether it holds the whole graph."""
        return self in (ExportFormat.NEO4J, ExportFormat.PARQUET)


class NoTokens(UserError):
    """The text cannot be cut into tokens."""


DEFAULT_EDGES = 300


@app.command("export")
def export_command(
    output: Annotated[
        Path, typer.Argument(help="neo4j, parquet: a new or empty folder. graphml, networkx-json: the file. circuit-tracer: the graph's .json file.")
    ],
    format: Annotated[
        ExportFormat,
        typer.Option("--format", help="The whole graph as files for Neo4j's offline importer or as Parquet; or one circuit, chosen by what follows."),
    ] = ExportFormat.NEO4J,
    circuit: Annotated[str | None, typer.Option("--circuit", help="A circuit of the graph, by the beginning of its key.")] = None,
    run: Run = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="Least strength of an edge; unless given, what --edges reach.")] = None,
    edges: Annotated[int | None, typer.Option("--edges", help=f"Without --threshold: about so many edges ({DEFAULT_EDGES}).")] = None,
    by: ByOption = "abs_weight",
    task: Annotated[str | None, typer.Option("--task", help="Only the sequences of one task of the run's mixture.")] = None,
    sequence: Annotated[str | None, typer.Option("--sequence", help="One sequence, by its key, instead of the run's means.")] = None,
    positions: Annotated[bool, typer.Option("--positions", help="With --sequence: keep token positions apart, where they were kept.")] = False,
    examples: Annotated[
        bool, typer.Option("--examples", help="circuit-tracer: also the features' strongest contexts, as files that its viewer shows offline.")
    ] = False,
    scan: Annotated[str | None, typer.Option("--scan", help="circuit-tracer: the model as Neuronpedia calls it, for example gemma-2-2b.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="circuit-tracer with --positions: the model, for its tokens, where its name alone does not find it.")
    ] = None,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Write the whole graph, or one circuit, for another program; `featlas neo4j import` and `featlas import circuit-tracer` read them back."""
    chosen = {
        "--circuit": circuit, "--run": run, "--threshold": threshold, "--edges": edges, "--task": task, "--sequence": sequence,
        "--positions": positions or None, "--examples": examples or None, "--scan": scan, "--model": model,
    }  # fmt: skip
    _check(format, {name for name, value in chosen.items() if value is not None})
    with open_atlas(atlas, graph, write=False) as store:
        if format.whole:
            n_nodes, n_edges = _export_whole(store, output, format)
        else:
            selection: dict[str, object] = {"threshold": threshold, "by": by, "task": task, "sequence": sequence, "positions": positions}
            cut = _circuit(store, circuit, run, edges, selection)
            n_nodes, n_edges = cut.n_nodes, cut.n_edges
            with console.saving(output):
                if format is ExportFormat.CIRCUIT_TRACER:
                    _export_circuit_tracer(store, atlas, cut, output, _tokenizer(model or store_model(store, cut)), examples=examples, scan=scan)
                else:
                    _export_circuit(store, atlas, cut, output, format)
    if as_json:
        console.say_json({"output": str(output), "format": format.value, "n_nodes": n_nodes, "n_edges": n_edges})
    else:
        console.say(f"wrote {n_nodes:,} nodes and {n_edges:,} edges to {output}")
        if format is ExportFormat.CIRCUIT_TRACER and not console.Settings.quiet:
            console.say(f"see it with circuit-tracer: circuit-tracer start-server --graph_file_dir {output.parent}")


def _check(format: ExportFormat, given: set[str]) -> None:
    """Refuse options that say nothing for the format."""
    own = {"--examples", "--scan", "--model"}
    useless = given if format.whole else given & own if format is not ExportFormat.CIRCUIT_TRACER else set()
    if useless:
        circuits = ", ".join(other.value for other in ExportFormat if not other.whole)
        whose = f"for circuits ({circuits})" if format.whole else f"for {ExportFormat.CIRCUIT_TRACER.value}"
        raise NotBoth(f"{sorted(useless)[0]} says nothing with --format {format.value}: it is {whose}")
    if "--circuit" in given and (other := given & {"--run", "--threshold", "--edges", "--task", "--sequence", "--positions"}):
        raise NotBoth(f"--circuit and {sorted(other)[0]} exclude each other: a circuit of the graph is cut already")
    if {"--threshold", "--edges"} <= given:
        raise NotBoth("--threshold and --edges exclude each other: give the strength, or about how many edges")
    if "--positions" in given and "--sequence" not in given:
        raise NotBoth("--positions needs --sequence: a run's means have no positions")


def _export_whole(store: "GraphStore", folder: Path, format: ExportFormat) -> tuple[int, int]:
    if format is ExportFormat.PARQUET:
        from .analysis.exchange import write_parquet

        with console.saving(folder):
            return write_parquet(store, folder)
    from .queries.bulk_import import export_import_files

    written = export_import_files(store, folder)
    return written.n_nodes, written.n_edges


def _circuit(store: "GraphStore", key: str | None, run: str | None, edges: int | None, selection: dict[str, object]) -> "Circuit":
    """The circuit that the options choose."""
    from .analysis.circuits import By, Selection, read_circuit, run_circuit
    from .queries.subgraphs import find_run

    if key is not None:
        return read_circuit(store, key)
    found = find_run(store, run)
    threshold = selection.pop("threshold")
    fields = {**selection, "by": By(str(selection["by"])), "threshold": threshold or 0.0}
    return run_circuit(store, found, Selection(found.key, **fields), n_edges=(edges or DEFAULT_EDGES) if threshold is None else None)  # type: ignore[arg-type]


def store_model(store: "GraphStore", circuit: "Circuit") -> str:
    """The name of the model that a circuit is of, as commands take it."""
    from .queries.subgraphs import find_run

    return find_run(store, circuit.selection.run).model.partition("@")[0]


def _tokenizer(model: str) -> Callable[[str], Sequence[str]]:
    """What cuts a text into the model's tokens; the model is looked for when it is first asked."""

    def tokens(text: str) -> Sequence[str]:
        from .model.loading import load_model

        try:
            tokenizer = load_model(model).tokenizer
        except UserError as error:
            raise NoTokens(f"the text's tokens need the model that was measured: {error}") from None
        return [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]

    return tokens


def _export_circuit_tracer(
    store: "GraphStore", atlas: Path, circuit: "Circuit", output: Path, tokenize: Callable[[str], Sequence[str]], *, examples: bool, scan: str | None
) -> None:
    from .analysis.attribution_graphs import graph_source, write_attribution_graph

    if output.suffix != ".json":
        raise NotBoth(f"{output}: circuit-tracer's graphs are .json files: name one, for example {output.with_suffix('.json')}")
    statistics = open_statistics(atlas)
    try:
        source = graph_source(store, statistics, circuit, tokenize=tokenize, examples=examples, scan=scan)
    finally:
        if statistics is not None:
            statistics.close()
    write_attribution_graph(circuit, source, output.parent, output.stem)


def _export_circuit(store: "GraphStore", atlas: Path, circuit: "Circuit", output: Path, format: ExportFormat) -> "GraphFrames":
    from .analysis.attribution_graphs import graph_source
    from .analysis.exchange import circuit_frames, write_graphml, write_node_link

    statistics = open_statistics(atlas)
    try:
        names = graph_source(store, statistics, circuit).features.select("key", "name").drop_nulls()
    finally:
        if statistics is not None:
            statistics.close()
    frames = circuit_frames(circuit, names)
    return write_graphml(frames, output) if format is ExportFormat.GRAPHML else write_node_link(frames, output)


@import_app.command("circuit-tracer")
def import_circuit_tracer_command(
    files: Annotated[list[Path], typer.Argument(help="Graphs as circuit-tracer's create_graph_files or Neuronpedia give them (.json).")],
    model: Annotated[
        str | None, typer.Option("--model", help="Key of the model in the graph, name@revision, instead of what the files call it (their scan).")
    ] = None,
    dictionaries: Annotated[
        str | None, typer.Option("--dictionaries", help="What to call the transcoders, instead of what the files call them.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="What to call the prompts' task, instead of circuit-tracer.")] = None,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Attribution graphs become a run: its features, edges by position, and their means over the files. Doing it again changes nothing."""
    from dataclasses import asdict

    from .ingest.attribution_graphs import ImportOptions, import_attribution_graphs
    from .queries.labels import restore_labels
    from .queries.store import open_graph

    if graph is None:
        with console.saving(atlas):
            atlas.mkdir(parents=True, exist_ok=True)
    with open_graph(graph or atlas) as store, console.progress("importing") as report:
        summary = import_attribution_graphs(store, files, ImportOptions(model, dictionaries, task), report)
        restore_labels(store, atlas)
    if as_json:
        console.say_json(asdict(summary))
        return
    new = "" if summary.n_new == summary.n_sequences else f" ({summary.n_new} of them new)"
    graphs = f"{summary.n_sequences:,} graph{'s' if summary.n_sequences != 1 else ''}"
    console.say(f"run {summary.run}: {graphs}{new} of {summary.model}, {summary.n_nodes:,} nodes, {summary.n_edges:,} edges")
    asked = f"featlas query top_edges --param run={summary.run}, featlas analyze circuit --run {summary.run}, featlas report --run {summary.run}"
    if not console.Settings.quiet:
        console.say(f"next: {asked}")


@import_app.command("files")
def import_files_command(
    folder: Annotated[Path, typer.Argument(help="Folder of import files, made by `featlas export` or `ingest edges --import-files`.")],
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Add import files to a graph, embedded or on a server, beside what it holds, which stays. Doing it again changes nothing."""
    from .queries.bulk_import import require_files
    from .queries.import_loading import load_import_files
    from .queries.labels import restore_labels
    from .queries.store import open_graph

    require_files(folder)
    if graph is None:
        with console.saving(atlas):
            atlas.mkdir(parents=True, exist_ok=True)
    with open_graph(graph or atlas) as store:
        with console.progress("files", quiet=as_json) as report:
            loaded = load_import_files(store, folder, progress=lambda done, total: report(done, total, ""))
        restore_labels(store, atlas)
    if as_json:
        console.say_json({"folder": str(folder), "n_nodes": loaded.n_nodes, "n_edges": loaded.n_edges, "kept": dict(loaded.kept)})
    else:
        console.say(f"loaded {loaded.n_nodes:,} nodes and {loaded.n_edges:,} edges from {folder}")
        if loaded.kept:
            console.say(f"the graph says otherwise of {', '.join(f'{n:,} {name}' for name, n in loaded.kept.items())}: its own stayed")
