"""The commands of series: `featlas series train`, `measure`, `list` and `show`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import console, files
from .options import DEFAULT_ATLAS, Atlas, BadParameterValue, Device, Dtype, Graph, Json, Limit, Seed, Sites, app, split_names

if TYPE_CHECKING:
    from .queries.series import SeriesRecord

series_app = typer.Typer(help="One analysis over checkpoints of a training run, or sizes of a family.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(series_app, name="series")

Page = Annotated[Path | None, typer.Option("--page", help="Save the figures as a page: FILE.html.")]


@series_app.command("train")
def series_train_command(
    folder: Annotated[Path, typer.Argument(help="New folder for the checkpoints; a finished one is kept as it is.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Tasks whose sentences are the text, by commas.")] = "agreement,agreement_rc,pronoun,ioi",
    family: Annotated[Literal["llama", "gpt_neox", "gpt2"], typer.Option("--family", help="Kind of transformer.")] = "llama",
    layers: Annotated[int, typer.Option("--layers", help="Blocks.")] = 3,
    width: Annotated[int, typer.Option("--width", help="Width of the residual stream.")] = 64,
    heads: Annotated[int, typer.Option("--heads", help="Attention heads a block.")] = 4,
    steps: Annotated[int, typer.Option("--steps", help="Steps of training.")] = 3000,
    batch: Annotated[int, typer.Option("--batch", help="Sentences in a step.")] = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of AdamW, after a warm-up.")] = 3e-3,
    first: Annotated[int, typer.Option("--first", help="The first checkpoint after step 0; then its doublings.")] = 32,
    evenly: Annotated[int, typer.Option("--evenly", help="And so many at equal distances, the last step among them.")] = 2,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a small transformer on the tasks' sentences, in minutes, and keep its checkpoints; a tenth of all prompts is never trained on."""
    from dataclasses import asdict

    from .model.small_models import HELD_OUT_FILE, TEXTS_FILE, SmallModelOptions, train_small_model

    options = SmallModelOptions(
        tasks=tuple(split_names(tasks)), family=family, n_layers=layers, d_model=width, n_heads=heads, steps=steps, batch=batch,
        learning_rate=learning_rate, first=first, evenly=evenly, seed=seed,
    )  # fmt: skip
    with console.progress("training", quiet=as_json) as report:
        checkpoints = train_small_model(folder, options, progress=report)
    if as_json:
        files = {"held_out": str(folder / HELD_OUT_FILE), "texts": str(folder / TEXTS_FILE)}
        console.say_json({"folder": str(folder), **files, "checkpoints": [asdict(checkpoint) for checkpoint in checkpoints]})
        return
    console.table(("step", "tokens", "loss", "model"), [(c.step, f"{c.tokens:,}", f"{c.loss:.3f}", str(folder / c.folder)) for c in checkpoints])
    console.say(f"pairs of prompts that were not trained on: {folder / HELD_OUT_FILE}")
    console.say(f"measure them all: featlas series measure {folder}")


@series_app.command("measure")
def series_measure_command(
    models: Annotated[list[str], typer.Argument(help="A folder of checkpoints, or two models and more: folders, names, name@revision.")],
    at: Annotated[str | None, typer.Option("--at", help="Their places, by commas; else the number in each name (step3000, 70m).")] = None,
    axis: Annotated[str, typer.Option("--axis", help="What the places count.")] = "step",
    title: Annotated[str | None, typer.Option("--title", help="What to call the series.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Task, mixture or JSONL of pairs; else a folder of checkpoints' own.")] = None,
    dictionaries: Annotated[
        str,
        typer.Option(
            "--dictionaries",
            help="train (small ones on --texts, for each model), identity (neurons), or a folder or release, in which {name} stands for the model's "
            "short name, {model} for its whole one, {x} for its place.",
        ),
    ] = "train",
    texts: Annotated[Path | None, typer.Option("--texts", help="Text to train dictionaries on; of a folder of checkpoints its own.")] = None,
    sites: Sites = None,
    width: Annotated[int, typer.Option("--width", help="Features of each trained dictionary.")] = 256,
    k: Annotated[int, typer.Option("--k", help="Active features per token of trained dictionaries.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens that dictionaries are trained on.")] = 60_000,
    limit: Limit = 48,
    held_out: Annotated[int, typer.Option("--held-out", help="Further pairs on which circuits are tested.")] = 32,
    steps: Annotated[int, typer.Option("--steps", help="Steps of integrated gradients; 1 is attribution patching.")] = 1,
    threshold: Annotated[float, typer.Option("--threshold", help="Keep single-position edges with |effect| of at least this.")] = 0.001,
    matched: Annotated[int, typer.Option("--matched", help="Pairs on whose prompts features are matched.")] = 200,
    draws: Annotated[int, typer.Option("--draws", help="Draws of each null.")] = 10,
    page: Page = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """What each model can do, its graph, how faithful its circuits are, and what it shares with the last; goes on where it was interrupted."""
    from .series import SeriesOptions, begin_series, measure_series, members_of

    members = members_of(models, axis=None if at is None else _places(at))
    asked = SeriesOptions(
        atlas=atlas, graph=graph, task=task or "", dictionaries=dictionaries, texts=texts, sites=None if sites is None else tuple(split_names(sites)),
        width=width, k=k, tokens=tokens, limit=limit, held_out=held_out, steps=steps, threshold=threshold, matched=matched, draws=draws, seed=seed,
        device=device, dtype=dtype,
    )  # fmt: skip
    options = begin_series(models, asked)
    atlas.mkdir(parents=True, exist_ok=True)
    with console.progress("series", quiet=as_json) as report:
        record = measure_series(members, options, title=title or f"{members[0].name} to {members[-1].name}", axis=axis, progress=report)
    present(record, page, as_json)


def _places(text: str) -> list[float]:
    try:
        return [float(part) for part in split_names(text)]
    except ValueError:
        raise BadParameterValue(f"--at {text!r} is no list of numbers: write 70,160,410") from None


@series_app.command("list")
def series_list_command(atlas: Atlas = DEFAULT_ATLAS, as_json: Json = False) -> None:
    """The series that an atlas holds."""
    from .queries.series import list_series

    found = list_series(atlas)
    if as_json:
        console.say_json([{"key": r.key, "title": r.title, "axis": r.axis, "models": r.frames["members"]["name"].to_list()} for r in found])
        return
    rows = [(r.key, r.title, r.frames["members"].height, f"{r.frames['members']['name'][0]} … {r.frames['members']['name'][-1]}") for r in found]
    console.table(("series", "title", "models", "from … to"), rows)


@series_app.command("show")
def series_show_command(
    key: Annotated[str | None, typer.Argument(help="The series, by the beginning of its key; not needed where there is only one.")] = None,
    page: Page = None,
    atlas: Atlas = DEFAULT_ATLAS,
    as_json: Json = False,
) -> None:
    """A series that was measured, as tables, a page, or JSON with all of its numbers."""
    from .queries.series import read_series

    present(read_series(atlas, key), page, as_json)


def present(record: "SeriesRecord", page: Path | None, as_json: bool) -> None:
    """Save the figures where a page was asked for, and print the series."""
    from . import show_series
    from .analysis.series_gallery import series_page
    from .queries.series import complete

    complete(record)
    if page is not None:
        with console.saving(page):
            files.write_text(page, series_page(record, commands=[f"featlas series show {record.key}"]))
    if as_json:
        frames = {name: frame.to_dicts() for name, frame in record.frames.items()}
        console.say_json({"key": record.key, "title": record.title, "axis": record.axis, "settings": dict(record.settings), **frames})
        return
    show_series.show_series(record)
    if page is not None:
        console.say(f"the figures: {page}")
