"""Commands that compare: two graphs (`featlas compare`), and two models' features put into blocks together (`featlas analyze joint`)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import console
from .cli_ablation import save_frame, save_page
from .options import (
    DEFAULT_ATLAS,
    Atlas,
    BadParameterValue,
    ByOption,
    Device,
    Graph,
    Json,
    NotBoth,
    Seed,
    analyze_app,
    app,
    open_atlas,
    open_statistics,
    split_names,
)

if TYPE_CHECKING:
    from .analysis.graph_comparison import Part

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Save the table of numbers, as .parquet or .csv.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Save the figures as one HTML page that opens offline.")]
Write = Annotated[bool, typer.Option("--write/--no-write", help="Keep the result in the statistics store.")]


def _parts(only: str | None, without: str | None) -> "tuple[Part, ...]":
    """The parts that are wanted, by their names."""
    from .analysis.graph_comparison import Part

    if only is not None and without is not None:
        raise NotBoth("--only and --without exclude each other: give one")
    named = split_names(only if only is not None else without or "")
    known = [part.value for part in Part]
    if unknown := [name for name in named if name not in known]:
        raise BadParameterValue(f"{'--only' if only is not None else '--without'} {unknown[0]!r} is no part: choose from {', '.join(known)}")
    if only is not None:  # transport is a part of the regions'
        chosen = {*named, "regions"} if "transport" in named else set(named)
        return tuple(part for part in Part if part.value in chosen)
    return tuple(part for part in Part if part.value not in named)


@app.command("compare")
def compare_command(
    run_a: Annotated[str | None, typer.Argument(metavar="RUN_A", help="A run, or a circuit, by the beginning of its key.")] = None,
    run_b: Annotated[str | None, typer.Argument(metavar="RUN_B", help="The other one; the same run unless given, for two tasks of it.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Of A, only the sequences of one of its tasks; of B too unless --other-task.")] = None,
    other_task: Annotated[str | None, typer.Option("--other-task", help="Of B, only the sequences of one of its tasks.")] = None,
    sequence: Annotated[str | None, typer.Option("--sequence", help="Of A, one sequence's edges, by the beginning of its key.")] = None,
    other_sequence: Annotated[str | None, typer.Option("--other-sequence", help="Of B, one sequence's edges.")] = None,
    matching: Annotated[
        str | None,
        typer.Option("--matching", help="A stored matching of features, by the beginning of its key; the last of the two runs' unless given."),
    ] = None,
    match_sites: Annotated[
        Literal["all", "same"] | None,
        typer.Option(
            "--match-sites",
            help="Features paired over all sites at once, or between the same sites; same unless given where runs have the same sites and layers.",
        ),
    ] = None,
    threshold: Annotated[float, typer.Option("--threshold", help="Only edges at or above this strength, in both graphs.")] = 0.0,
    top_edges: Annotated[int | None, typer.Option("--top-edges", help="Only so many strongest edges of each graph.")] = None,
    by: ByOption = "abs_weight",
    scale: Annotated[
        Literal["share", "raw"], typer.Option("--scale", help="Compare shares of each graph's strength, or strengths as they are.")
    ] = "share",
    error_nodes: Annotated[bool, typer.Option("--error-nodes/--no-error-nodes", help="Whether error nodes are in the graphs.")] = True,
    with_output: Annotated[bool, typer.Option("--with-output/--no-output", help="Whether the output is in the graphs.")] = True,
    only: Annotated[
        str | None, typer.Option("--only", help="Parts to compare, comma-separated: edges, profiles, refinement, partitions, regions, transport.")
    ] = None,
    without: Annotated[str | None, typer.Option("--without", help="Parts to leave out, comma-separated.")] = None,
    draws: Annotated[int, typer.Option("--draws", help="Random graphs, and random matchings, that each number stands beside; 0 for none.")] = 20,
    bins: Annotated[int, typer.Option("--bins", help="Classes of strength in colour refinement, by quantile in each graph.")] = 4,
    alpha: Annotated[float, typer.Option("--alpha", help="Of optimal transport: 0 what regions are … 1 what they drive.")] = 0.5,
    parcellation: Annotated[
        str | None, typer.Option("--parcellation", help="Regions of A's model, by the beginning of their key; those found last unless given.")
    ] = None,
    other_parcellation: Annotated[str | None, typer.Option("--other-parcellation", help="Regions of B's.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the comparisons made before, and leave.")] = False,
    show: Annotated[str | None, typer.Option("--show", help="Show a comparison made before, by the beginning of its key.")] = None,
    seed: Seed = 0,
    output: Output = None,
    plot: Plot = None,
    write: Write = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Two graphs: which edges they share at every threshold, how alike their degrees, paths, partitions and regions are, each beside chance."""
    from . import show_compare
    from .analysis.circuits import By
    from .analysis.comparison_plots import comparison_page
    from .analysis.comparisons_store import list_comparisons, read_comparison, write_comparison
    from .analysis.edge_overlap import Scale
    from .analysis.graph_comparison import CompareOptions, MatchSites, Sources, compare_named
    from .analysis.graph_sides import SideOptions
    from .queries.statistics import StatisticsStore

    if listed or show is not None:
        with StatisticsStore(atlas, read_only=True) as statistics:
            if listed:
                show_compare.show_list(list_comparisons(statistics), as_json)
                return
            found = read_comparison(statistics, show)
        save_frame(output, lambda: found.values)
        save_page(plot, lambda: comparison_page(found))
        show_compare.show_comparison(found, as_json)
        return
    options = CompareOptions(_parts(only, without), draws, seed, Scale(scale), bins, alpha)
    options.check()
    common = {"by": By(by), "threshold": threshold, "top_edges": top_edges, "errors": error_nodes, "output": with_output}
    a = SideOptions(task=task, sequence=sequence, **common)  # type: ignore[arg-type]
    # one sequence of A is compared with all of B's, or with one that is named
    of_b = other_task if other_task is not None else task if other_sequence is None else None
    b = SideOptions(task=of_b, sequence=other_sequence, **common)  # type: ignore[arg-type]
    for side in (a, b):
        side.check()
    with open_atlas(atlas, graph, write=False) as store:
        kept = open_statistics(atlas)
        try:
            sources = Sources(store, kept, matching, None if match_sites is None else MatchSites(match_sites), parcellation, other_parcellation)
            with console.progress("parts", quiet=as_json) as bar:
                found = compare_named(sources, (run_a, a), (run_b if run_b is not None else run_a, b), options, progress=bar)
        finally:
            if kept is not None:
                kept.close()
    # shown and saved first: what was measured is not lost where writing fails
    save_frame(output, lambda: found.values)
    save_page(plot, lambda: comparison_page(found))
    show_compare.show_comparison(found, as_json)
    if write:
        with StatisticsStore(atlas) as statistics:
            write_comparison(statistics, found)
        if not as_json:
            console.say(f"kept: `featlas compare --show {found.key[:8]}` shows it again, `featlas compare --list` lists all")


@analyze_app.command("joint")
def analyze_joint_command(
    aligned: Annotated[
        str | None, typer.Argument(metavar="ALIGNED", help="Samples of `ingest aligned`, by the beginning of their key; the last unless given.")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", help="Pairs of sites, resid_5=resid_3,resid_11=resid_6; sites of one name unless given, else by their order."),
    ] = None,
    method: Annotated[
        Literal["dense-sbm", "nested-sbm", "ward", "spectral", "leiden", "louvain"],
        typer.Option("--method", help="How the joint correlations are put into blocks."),
    ] = "dense-sbm",
    level: Annotated[
        str, typer.Option("--level", help="Which level of the path: held-out, stability, description-length, or a number of blocks.")
    ] = "held-out",
    correlation: Annotated[
        Literal["pearson", "signed-log", "log-magnitude", "spearman"] | None,
        typer.Option("--correlation", help="Of values, logarithms, or ranks; pearson for activations, log-magnitude for attributions."),
    ] = None,
    min_count: Annotated[int, typer.Option("--min-count", help="A live feature is active on at least so many segments of each half.")] = 10,
    min_sequences: Annotated[int, typer.Option("--min-sequences", help="A live feature is active in at least so many sequences of each half.")] = 5,
    nulls: Annotated[int, typer.Option("--nulls", help="Shuffled copies that the blocks must do better than, at least 3; 0 for none.")] = 3,
    draws: Annotated[int, typer.Option("--draws", help="Copies with B's text moved against A's; 0 for none, 19 or more for a p of 0.05.")] = 3,
    show_n: Annotated[int, typer.Option("--show", help="Blocks of each pair of sites to show.")] = 12,
    device: Device = "cpu",
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the blocks, as .parquet or .csv.")] = None,
    plot: Plot = None,
    write: Write = True,
    atlas: Atlas = DEFAULT_ATLAS,
    as_json: Json = False,
) -> None:
    """Two models' features at once: blocks of the joint correlations of aligned samples, and how far each block belongs to both models."""
    from . import show_compare
    from .analysis.comparison_plots import comparison_page
    from .analysis.comparisons_store import write_comparison
    from .analysis.correlations import Correlation
    from .analysis.joint_partition import joint_partitions, site_pairs
    from .cli_regions import finding_options
    from .queries.matches import AlignedStore
    from .queries.statistics import StatisticsStore

    if draws < 0 or show_n < 1:
        raise BadParameterValue(f"{'--draws' if draws < 0 else '--show'} {draws if draws < 0 else show_n} is too small")
    options = finding_options(
        method, level, None, correlation=None if correlation is None else Correlation(correlation), min_count=min_count,
        min_sequences=min_sequences, nulls=nulls, device=device, seed=seed,
    )  # fmt: skip
    samples = AlignedStore(atlas).open(aligned)
    chosen = site_pairs(samples, split_names(pairs) if pairs is not None else None)
    with console.progress("pairs of sites", quiet=as_json) as bar:
        found, _ = joint_partitions(samples, chosen, options, draws=draws, progress=bar)
    save_frame(output, lambda: found.blocks)
    save_page(plot, lambda: comparison_page(found))
    show_compare.show_joint(found, show_n, as_json)
    if write:
        with StatisticsStore(atlas) as statistics:
            write_comparison(statistics, found)
