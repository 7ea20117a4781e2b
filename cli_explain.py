"""The commands that show one computation step by step: `featlas explain ablation`, `featlas explain attribution`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console, files
from .options import DEFAULT_ATLAS, Atlas, Device, Graph, Json, NotBoth, Run, app, open_atlas, open_statistics

if TYPE_CHECKING:
    from .explain import Scene
    from .queries.store import GraphStore

explain_app = typer.Typer(
    help="One computation step by step, with its numbers and a drawing.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)
app.add_typer(explain_app, name="explain")

Sequence = Annotated[str | None, typer.Option("--sequence", help="The sequence, by the beginning of its key; the run's first unless given.")]
OneTask = Annotated[str | None, typer.Option("--task", help="A sequence of one task of a mixture; for ablation also that task's circuit.")]
Drawing = Annotated[Path | None, typer.Option("--output", "-o", help="Save the drawing, an SVG file.")]


@explain_app.command("ablation")
def explain_ablation_command(
    target: Annotated[
        str | None, typer.Option("--target", help="The live node to look at: resid_17/696, resid_17/error, y; one that much leads into unless given.")
    ] = None,
    position: Annotated[int | None, typer.Option("--position", help="Its token position, from 0; the last where it moves unless given.")] = None,
    circuit: Annotated[str | None, typer.Option("--circuit", help="A circuit of the graph, by the beginning of its key, instead of --edges.")] = None,
    edges: Annotated[int | None, typer.Option("--edges", help="A circuit of about so many strongest edges; 60 unless given.")] = None,
    run: Run = None,
    task: OneTask = None,
    sequence: Sequence = None,
    device: Device = "cpu",
    output: Drawing = None,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """How the model computes one node when only a circuit is alive: its edges, its private input, its local function, the entry that is kept."""
    from .analysis.circuits import Selection, read_circuit, run_circuit
    from .explain import explain_ablation
    from .queries.subgraphs import find_run

    if circuit is not None and edges is not None:
        raise NotBoth("--circuit and --edges exclude each other: a circuit of the graph is cut already")
    with open_atlas(atlas, graph, write=False) as store:
        if circuit is None:
            found = find_run(store, run)
            chosen = run_circuit(store, found, Selection(found.key, task=task), n_edges=60 if edges is None else edges)
        else:
            chosen = read_circuit(store, circuit)
            found = find_run(store, chosen.selection.run)
        scene = _scene(store, atlas, found.key, sequence, task, device)
        shown = explain_ablation(scene, chosen, target, position)
    if output is not None:
        with console.saving(output):
            files.write_text(output, shown.svg)
    if as_json:
        steps = shown.steps
        console.say_json({
            "sequence": scene.pair.key, "n_edges": shown.n_edges, "target": asdict(shown.target), "metric": steps.metric,
            "metric_full": steps.metric_full, "metric_empty": steps.metric_empty, "faithfulness": steps.faithfulness,
        })  # fmt: skip
        return
    from .show_explain import show_ablation

    show_ablation(shown)
    _wrote(output)


@explain_app.command("attribution")
def explain_attribution_command(
    source: Annotated[str, typer.Argument(help="The upstream node u: resid_11/523, resid_11/error.")],
    target: Annotated[str, typer.Argument(help="The downstream node d: resid_17/696, or y for the output.")],
    source_position: Annotated[int | None, typer.Option("--source-position", help="u's token position; where it changes most unless given.")] = None,
    target_position: Annotated[int | None, typer.Option("--target-position", help="d's token position; where it changes most unless given.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps of integrated gradients; the run's own unless given.")] = None,
    run: Run = None,
    task: OneTask = None,
    sequence: Sequence = None,
    device: Device = "cpu",
    output: Drawing = None,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """How the weight of one edge comes about: what d is on the way, what the output is with d alone, the slope from u, and the product."""
    from .explain import explain_attribution

    with open_atlas(atlas, graph, write=False) as store:
        scene = _scene(store, atlas, run, sequence, task, device)
        shown = explain_attribution(scene, source, target, source_position=source_position, target_position=target_position, steps=steps)
    if output is not None:
        with console.saving(output):
            files.write_text(output, shown.svg)
    if as_json:
        console.say_json({"sequence": scene.pair.key, **asdict(shown.steps), "mean_slope": shown.steps.mean_slope, "effect": shown.steps.effect})
        return
    from .show_explain import show_attribution

    show_attribution(shown)
    _wrote(output)


def _scene(store: "GraphStore", atlas: Path, run: str | None, sequence: str | None, task: str | None, device: str) -> "Scene":
    """The run's model on one of its sequences."""
    from .analysis.study import StudyOptions
    from .explain import open_scene
    from .queries.subgraphs import find_run

    statistics = open_statistics(atlas)
    try:
        return open_scene(store, statistics, atlas, find_run(store, run), sequence=sequence, task=task, options=StudyOptions(device=device))
    finally:
        if statistics is not None:
            statistics.close()


def _wrote(output: Path | None) -> None:
    if output is not None:
        console.say(f"wrote {output}: open it in any browser")
