"""The command of the vision study: regions of a small convolutional network, on the code that language models go through."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import console
from .cli_ablation import Gallery, number_list, save_frame, save_page
from .cli_regions import LevelOption, MethodOption, finding_options
from .options import BadParameterValue, Json, Seed, analyze_app, split_names


@analyze_app.command("vision")
def analyze_vision_command(
    method: MethodOption = "dense-sbm",
    level: LevelOption = "held-out",
    against: Annotated[
        str, typer.Option("--against", help="Other methods at the regions' own numbers of blocks, comma-separated; none for random blocks alone.")
    ] = "ward",
    share: Annotated[float, typer.Option("--share", help="Share of the blocks that are cut, or only kept, for each class.")] = 0.1,
    shares: Annotated[str | None, typer.Option("--shares", help="Shares of the live neurons to keep and to cut, all classes together.")] = None,
    rank: Annotated[
        Literal["sum", "mean"],
        typer.Option("--rank", help="Rank blocks by their members' attributions added up, or by their mean, so that size does not decide."),
    ] = "sum",
    baseline: Annotated[
        Literal["mean", "zero", "resample", "counterfactual", "noise"],
        typer.Option(
            "--baseline",
            help="What a cut neuron is worth: its mean over the images trained on, 0, its value on another image, or on one of the wrong class that "
            "the image is taken for most, or its own value with noise.",
        ),
    ] = "mean",
    random_draws: Annotated[int, typer.Option("--random-draws", help="Random partitions with blocks of the same sizes, and random choices.")] = 5,
    attributed: Annotated[int, typer.Option("--attributed", help="Images of each class, of those trained on, that attribution is measured on.")] = 20,
    tested: Annotated[int, typer.Option("--tested", help="Images of each class, not trained on, that ablation is tested on.")] = 30,
    blocks: Annotated[int, typer.Option("--blocks", help="Blocks of each partition to cut one at a time: the class × block matrix.")] = 12,
    nulls: Annotated[int, typer.Option("--nulls", help="Shuffled copies of the activations that regions must do better than; 0 for none.")] = 3,
    steps: Annotated[int, typer.Option("--steps", help="Steps of integrated gradients in attribution; 1 is gradient × change.")] = 5,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs of training.")] = 30,
    seed: Seed = 0,
    show_n: Annotated[int, typer.Option("--show", help="Regions to show.")] = 12,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save every accuracy by class, as .parquet or .csv.")] = None,
    gallery: Gallery = None,
    as_json: Json = False,
) -> None:
    """A convolutional network on digits: do neurons that fire together serve the same classes? Nothing is downloaded or kept."""
    from . import show_vision, vision
    from .model.baselines import Baseline

    if show_n < 1:
        raise BadParameterValue(f"--show {show_n} is too small: give at least 1")
    given = number_list("--shares", shares, float)
    options = vision.VisionOptions(
        finding=finding_options(method, level or "held-out", None, nulls=nulls, seed=seed),
        against=() if against == "none" else tuple(split_names(against)),
        share=share, per_member=rank == "mean", baseline=Baseline(baseline), random_draws=random_draws, attributed=attributed, tested=tested,
        blocks=blocks, shares=vision.SHARES if given is None else tuple(given), steps=steps, epochs=epochs, seed=seed,
    )  # fmt: skip
    options.check()
    options.tests.check()

    @contextmanager
    def progress(label: str) -> Iterator[Callable[[int, int], None]]:
        with console.progress(label, quiet=as_json) as bar:
            yield lambda done, total: bar(done, total, "")

    found = vision.run_vision(options, progress=progress)
    save_frame(output, lambda: found.class_table)
    save_page(gallery, lambda: vision.page(found))
    if as_json:
        console.say_json(vision.as_json(found))
    else:
        show_vision.show_vision(found, show_n)
