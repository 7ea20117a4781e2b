"""The command that finds communities of effective graphs and puts them to the test: `featlas analyze communities`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import console
from .cli_ablation import (
    AblationBaseline,
    ControlDraws,
    Dictionaries,
    Draws,
    ErrorNodes,
    Gallery,
    Model,
    OneTask,
    Probe,
    save_frame,
    save_page,
    study_of,
)
from .options import (
    DEFAULT_ATLAS,
    Atlas,
    BatchSize,
    ByOption,
    Device,
    Graph,
    Json,
    Mean,
    Memory,
    NoiseScale,
    NotBoth,
    Run,
    Seed,
    StatisticsRun,
    analyze_app,
    memory_bytes,
    open_atlas,
)

if TYPE_CHECKING:
    from .analysis.communities import Communities, CommunityOptions, EffectiveGraph
    from .analysis.study import Study
    from .queries.store import GraphStore


@analyze_app.command("communities")
def analyze_communities_command(
    run: Run = None,
    circuit: Annotated[str | None, typer.Option("--circuit", help="Of a circuit of the graph, by the beginning of its key, not a run.")] = None,
    task: OneTask = None,
    threshold: Annotated[float, typer.Option("--threshold", help="Only edges at or above this strength.")] = 0.0,
    top_edges: Annotated[int | None, typer.Option("--top-edges", help="Only so many strongest edges.")] = None,
    by: ByOption = "abs_weight",
    error_nodes: Annotated[bool, typer.Option("--error-nodes/--no-error-nodes", help="Whether error nodes are in the graph.")] = False,
    with_output: Annotated[bool, typer.Option("--with-output/--no-output", help="Whether the output is in the graph.")] = False,
    method: Annotated[
        Literal["leiden", "infomap", "louvain", "spectral", "nested-sbm"],
        typer.Option("--method", help="Leiden and Infomap follow directions; nested-sbm is graph-tool's, with a time limit."),
    ] = "leiden",
    resolution: Annotated[float, typer.Option("--resolution", help="Of leiden, louvain, infomap: greater gives more communities.")] = 1.0,
    communities: Annotated[
        int | None, typer.Option("--communities", help="Of spectral: how many, by the eigengap unless given; of nested-sbm: of the nearest level.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Hard time limit of nested-sbm; Leiden takes its place where it is not done.")] = 120.0,
    graph_tool: Annotated[str | None, typer.Option("--graph-tool", help="The Python that has graph-tool; searched for unless given.")] = None,
    gds: Annotated[bool, typer.Option("--gds", help="On a Neo4j server with Graph Data Science: leiden or louvain of that library.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds whose communities are compared; 1 compares none.")] = 5,
    scan: Annotated[bool, typer.Option("--scan/--no-scan", help="Compare resolutions from a quarter to four times the chosen one.")] = True,
    nulls: Annotated[int, typer.Option("--nulls", help="Rewired graphs with the same degrees and layers; 0 for none.")] = 20,
    null_weights: Annotated[
        Literal["carried", "shuffled"], typer.Option("--null-weights", help="A rewired edge keeps its source's weight, or weights are permuted.")
    ] = "carried",
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="All methods beside the chosen one.")] = False,
    test: Annotated[bool, typer.Option("--test/--no-test", help="Remove each community from the model, and keep it alone.")] = True,
    largest: Annotated[int, typer.Option("--largest", help="Communities that are tested one by one; the others are tested together.")] = 8,
    held_out: Annotated[int, typer.Option("--held-out", help="New sequences to test on, shared evenly among the tasks.")] = 48,
    control_draws: ControlDraws = 3,
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
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save every node with its community, as .parquet or .csv.")] = None,
    gallery: Gallery = None,
    write: Annotated[bool, typer.Option("--write/--no-write", help="Write communities and their scores into the graph.")] = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Communities of features across layers: are they stable, more than chance, of layers or of tasks, and which task breaks without each?"""
    from . import show_communities
    from .analysis.circuits import By, read_circuit
    from .analysis.communities import CommunityOptions, GraphOptions, Method
    from .analysis.community_ablation import AblationOptions, ablate_communities
    from .analysis.community_nulls import Weights
    from .analysis.community_records import write_communities
    from .analysis.community_study import StudyOptions, as_json_value, study_communities
    from .analysis.region_gallery import communities_page
    from .analysis.study import METRICS
    from .queries.subgraphs import find_run

    options = CommunityOptions(Method(method), resolution, communities, seed, seconds, graph_tool)
    options.check()
    wanted = StudyOptions(seeds, scan, nulls, Weights(null_weights), compare)
    wanted.check()
    ablation = AblationOptions(largest, held_out, control_draws)
    ablation.check()
    with open_atlas(atlas, graph, write=write) as store:
        divide = None
        if gds:
            if circuit is not None or task is not None or top_edges is not None or with_output:
                raise NotBoth("--gds divides a run's whole graph: leave out --circuit, --task, --top-edges and --with-output")
            divide = _by_gds(store, graph, options, by, threshold, error_nodes)
        given = None if circuit is None else read_circuit(store, circuit)
        found = find_run(store, run if run is not None or given is None else given.selection.run)
        study: Study | None = None
        if test:  # opened first: what is wrong with the model is said before anything is computed
            study = study_of(
                store, found, atlas, model=model, dictionaries=dictionaries, device=device, metrics=METRICS[:1], baseline=baseline,
                statistics_run=statistics_run, mean=mean, noise_scale=noise_scale, draws=draws, seed=seed, errors=errors, batch_size=batch_size,
                memory=memory_bytes(memory), target=target,
            )  # fmt: skip
        chosen = GraphOptions(By(by), threshold, top_edges, task, error_nodes, with_output)
        with console.progress("communities", quiet=as_json) as bar:
            key = None if given is None else given.key
            own = None if divide is None else partial(divide, found.key)
            result = study_communities(store, found, chosen, options, wanted, circuit=key, found=own, progress=bar)
        if not as_json:
            show_communities.show_communities(result)
        tested = None
        if study is not None:
            with console.progress("sequences", quiet=as_json) as bar:
                tested = ablate_communities(
                    store, study, result.graph, result.communities, ablation, seed=seed, progress=lambda done, total: bar(done, total, "")
                )
        # shown and saved first: what was measured is not lost where writing fails
        save_frame(output, lambda: show_communities.frame(result))
        save_page(gallery, lambda: communities_page(result, tested))
        written = None
        if as_json:
            console.say_json(as_json_value(result, tested))
        elif tested is not None:
            show_communities.show_tested(tested, result)
        if write:
            written = write_communities(store, found, result.graph, result.communities, options, result.described, tested=tested, notes=result.notes)
            if not as_json:
                show_communities.show_written(written)


def _by_gds(
    store: "GraphStore", uri: str | None, options: "CommunityOptions", by: str, threshold: float, errors: bool
) -> "Callable[[str, EffectiveGraph], Communities]":
    """What divides the graph of a run on its server. Raises `NoGds` where it cannot."""
    import polars as pl

    from .analysis.communities import Communities, directed_modularity
    from .analysis.parcellation import by_size
    from .queries.gds import GdsOptions, connected, gds_communities, require_gds
    from .queries.store import ServerCredentials

    kinds = ("feature", "error") if errors else ("feature",)
    settings = GdsOptions(options.method.value, by, threshold, kinds, options.resolution, options.seed)
    settings.check()
    require_gds(store)

    def divide(run: str, graph: "EffectiveGraph") -> Communities:
        found = gds_communities(lambda: connected(str(uri), ServerCredentials.from_environment()), run, settings)
        joined = graph.nodes.select("key").join(found, on="key", how="left", maintain_order="left")
        labels = by_size(joined["community"].cast(pl.Int64).to_numpy())
        info = {"by": "Graph Data Science", "directions": "ignored", "seed": options.seed, "resolution": options.resolution}
        return Communities(labels, options.method, directed_modularity(graph, labels), None, info)

    return divide

