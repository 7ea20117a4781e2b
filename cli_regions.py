"""Commands of regions of interest: found from samples and described, and put to the test by ablation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import checks, completion, console
from .cli_ablation import (
    AblationBaseline,
    BadList,
    Dictionaries,
    Draws,
    ErrorNodes,
    Gallery,
    Metrics,
    Model,
    Probe,
    named_metrics,
    number_list,
    save_frame,
    save_page,
    study_of,
)
from .options import (
    DEFAULT_ATLAS,
    DEMO_DICTIONARIES,
    DEMO_MODEL,
    Atlas,
    BadParameterValue,
    BatchSize,
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
    WrongModel,
    analyze_app,
    load_named,
    memory_bytes,
    open_atlas,
    split_names,
)

if TYPE_CHECKING:

    from .analysis.finding import FindingOptions
    from .model.dictionary_sources import SiteDictionaries
    from .queries.samples import SampleRun
    from .queries.statistics import StatisticsStore

Method = Literal["dense-sbm", "nested-sbm", "weighted-sbm", "ward", "spectral", "leiden", "louvain", "hdbscan", "heads"]
MethodOption = Annotated[
    Method,
    typer.Option(
        "--method",
        help="How features are put into blocks: our dense block model, graph-tool's (nested-sbm on the nearest-neighbour graph, weighted-sbm on the "
        "complete one, for few features), a baseline, or the attention heads where features are their outputs' dimensions (identity-heads).",
    ),
]
LevelOption = Annotated[
    str | None,
    typer.Option(
        "--level",
        help="Which level of the path the regions are: held-out (greatest held-out likelihood; the default), stability (between halves), heads "
        "(fewest blocks that are more than heads), description-length, or a number of blocks.",
    ),
]
ParcellationOption = Annotated[
    str | None,
    typer.Option(
        "--parcellation", autocompletion=completion.parcellations,
        help="Regions found before, by the beginning of their key; those found last unless given.",
    ),
]  # fmt: skip
SampledModel = Annotated[
    str | None,
    typer.Option("--model", callback=checks.model, help="The samples' model, where it is named otherwise now; as it was then unless given."),
]
SampledDictionaries = Annotated[
    str | None,
    typer.Option(
        "--dictionaries", callback=checks.dictionaries, autocompletion=completion.dictionaries,
        help="The samples' dictionaries, where they are named otherwise now; as they were then unless given.",
    ),
]  # fmt: skip
Write = Annotated[bool, typer.Option("--write/--no-write", help="Keep the regions in the statistics store and write them into the graph.")]
RULES = {"held-out": "held-out likelihood", "stability": "stability between halves", "heads": "more blocks than heads"}


def finding_options(method: str, level: str, n_heads: int | None, **others: Any) -> "FindingOptions":
    """The options of finding in the command line's words."""
    from .analysis.finding import FindingOptions
    from .analysis.levels import Rule
    from .analysis.partitioning import PartitionMethod

    n_blocks = None
    if level.isdigit():
        rule, n_blocks = Rule.GIVEN, int(level)
    elif level in (*RULES, "description-length"):
        rule = Rule(RULES[level]) if level in RULES else Rule.DESCRIPTION_LENGTH
    else:
        raise BadList(f"--level {level!r} is no rule and no number: choose from {', '.join(RULES)}, description-length, or a number of blocks")
    options = FindingOptions(method=PartitionMethod(method), rule=rule, n_blocks=n_blocks, n_heads=n_heads, **others)
    options.check()
    return options


def kept_statistics(atlas: Path) -> "StatisticsStore":
    """The atlas' statistics store, for reading."""
    from .queries.statistics import StatisticsStore

    return StatisticsStore(atlas, read_only=True)


def named_in(run: "SampleRun", what: str) -> str:
    """The model or the dictionaries that samples were measured with, as they were named then."""
    fallback = {"model": DEMO_MODEL, "dictionaries": DEMO_DICTIONARIES}[what]
    return str((run.settings.get("named") or {}).get(what, fallback))


def check_sampled(run: "SampleRun", model: str, dictionaries: "SiteDictionaries") -> None:
    """Raise `WrongModel` where a model or its dictionaries are not those that samples were measured with."""
    ids = {site.name: dictionary.id for site, dictionary in dictionaries.items()}
    if model != run.model or any(run.dictionaries[site] != name for site, name in ids.items()):
        raise WrongModel(f"samples {run.key} are of {run.model} with other dictionaries than these: name theirs by --model and --dictionaries")


@analyze_app.command("rois")
def analyze_rois_command(
    samples: Annotated[
        str | None,
        typer.Option(
            "--samples", autocompletion=completion.samples, help="Run of `ingest samples`, by the beginning of its key; the latest unless given."
        ),
    ] = None,
    parcellation: Annotated[
        str | None,
        typer.Option(
            "--parcellation", autocompletion=completion.parcellations,
            help="Show regions found before, by the beginning of their key, instead of finding them.",
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the regions found before, and leave.")] = False,
    method: MethodOption = "dense-sbm",
    level: LevelOption = None,
    sites: Annotated[str | None, typer.Option("--sites", help="Sites to partition, comma-separated; all of the samples unless given.")] = None,
    correlation: Annotated[
        Literal["pearson", "signed-log", "log-magnitude", "spearman"] | None,
        typer.Option("--correlation", help="Of values, logarithms, or ranks; pearson for activations, log-magnitude for attributions."),
    ] = None,
    min_count: Annotated[
        int | None, typer.Option("--min-count", help="A live feature is active on at least so many tokens of each half of the samples.")
    ] = None,
    min_sequences: Annotated[
        int | None, typer.Option("--min-sequences", help="A live feature is active in at least so many sequences of each half of the samples.")
    ] = None,
    nulls: Annotated[int, typer.Option("--nulls", help="Shuffled copies of the samples to do better than, at least 3; 0 for none.")] = 3,
    neighbours: Annotated[
        int | None, typer.Option("--neighbours", help="Of each feature in the nearest-neighbour graph; by the number of features unless given.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Time limit of graph-tool at each site.")] = 120.0,
    graph_tool: Annotated[
        str | None, typer.Option("--graph-tool", help="The Python that has graph-tool; it is looked for unless given.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Name a region of those found last, or of --parcellation: resid_11/3='plural nouns'; empty takes it back."),
    ] = None,
    show_n: Annotated[int, typer.Option("--show", help="Regions of each site to show.")] = 12,
    model: SampledModel = None,
    dictionaries: SampledDictionaries = None,
    device: Device = "cpu",
    seed: Seed = 0,
    gallery: Gallery = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the regions' table, as .parquet or .csv.")] = None,
    write: Write = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Regions of interest: features of a site that are active together, found from samples, described, named, and made nodes of the graph."""
    from . import regions, show_regions
    from .analysis.correlations import Correlation
    from .analysis.heads import slices
    from .model.binding import bind
    from .queries.partitions import stored_parcellations
    from .queries.samples import SampleStore
    from .queries.store import open_graph

    if parcellation is not None and samples is not None:
        raise NotBoth("--parcellation shows regions found before and --samples finds new ones: give one")
    if parcellation is not None and (sites is not None or level is not None):
        raise NotBoth(f"--parcellation shows regions as they were found: leave out {'--level' if sites is None else '--sites'}")
    if show_n < 1:
        raise BadParameterValue(f"--show {show_n} is too small: give at least 1")
    if listed:
        with kept_statistics(atlas) as statistics:
            show_regions.show_list(stored_parcellations(statistics), as_json)
        return
    named = [regions.NamedBlock.parse(text) for text in label or ()]
    if named and not write:
        raise NotBoth("--label names regions that are kept: leave out --no-write")
    limits = {name: value for name, value in (("min_count", min_count), ("min_sequences", min_sequences)) if value is not None}
    options = finding_options(
        method, level or "held-out", None, correlation=None if correlation is None else Correlation(correlation), nulls=nulls, neighbours=neighbours,
        seconds=seconds, interpreter=graph_tool, device=device, seed=seed, **limits,
    )  # fmt: skip
    store = SampleStore(atlas, read_only=True)
    # A name alone is for regions that are there: those found last.
    naming = bool(named) and samples is None and level is None and sites is None and method == "dense-sbm"
    kept = None if parcellation is None and not naming else regions.read(atlas, parcellation)
    run = store.find(samples if kept is None else kept[0].samples)
    wanted = regions.sampled_sites(run, split_names(sites or "")) if kept is None else list(kept[0].sites)
    loaded, known = load_named(model or named_in(run, "model"), dictionaries or named_in(run, "dictionaries"), ",".join(wanted), device, "float32")
    check_sampled(run, loaded.key, known)
    if kept is None:
        with console.progress("sites", quiet=as_json) as bar:
            places = {site: i for i, site in enumerate(wanted)}
            options = replace(options, n_heads=bind(loaded).n_heads)
            if method == "heads":
                of_heads = {site.name: slices(dictionary, site, bind(loaded).n_heads) for site, dictionary in known.items()}
                options = replace(options, labels_of=of_heads)
            progress = lambda said: bar(places.get(said.partition(":")[0], 0), len(wanted), said)
            found = regions.find_regions(store, run, wanted, options, progress=progress)
        labels = None
    else:
        found, labels = kept
    if write:
        labels = regions.keep(atlas, found, named)
    result = regions.described(store, run, found, known, labels)
    save_frame(output, lambda: result.description.blocks)
    save_page(gallery, lambda: regions.page(store, result))
    if as_json:
        console.say_json(regions.as_json(result))
    else:
        show_regions.show_regions(result, show_n)
        for one in named:
            console.say(f"{one.site}/{one.block} is called {one.label!r} now" if one.label else f"{one.site}/{one.block} has its own name again")
    if write:
        with open_graph(graph or atlas) as opened:
            regions.write_into_graph(opened, result)


@analyze_app.command("ablate-rois")
def analyze_ablate_rois_command(
    run: Run = None,
    parcellation: ParcellationOption = None,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            help="What competes beside random blocks (always) and heads (where the sites are the identity on heads): features, methods such as "
            "ward or spectral at the regions' own numbers of blocks, or keys of other regions, comma-separated.",
        ),
    ] = "features,ward",
    shares: Annotated[str | None, typer.Option("--shares", help="Shares of the live features to keep and to cut, comma-separated.")] = None,
    edge_shares: Annotated[
        str | None, typer.Option("--edge-shares", help="Shares of the edges between regions that circuits of regions keep; none for no circuits.")
    ] = None,
    rank: Annotated[
        Literal["sum", "mean"],
        typer.Option("--rank", help="Rank blocks by their members' attributions added up, or by their mean, so that size does not decide."),
    ] = "sum",
    blocks: Annotated[int, typer.Option("--blocks", help="Blocks of each partition to cut one at a time: the task × block matrix; 0 for none.")] = 24,
    drives: Annotated[int, typer.Option("--drives", help="Strongest edges between regions to cut one at a time; 0 for none.")] = 40,
    random_draws: Annotated[int, typer.Option("--random-draws", help="Random partitions with blocks of the same sizes.")] = 2,
    held_out: Annotated[int, typer.Option("--held-out", help="New sequences to test on, shared evenly among the tasks.")] = 24,
    level: Annotated[int | None, typer.Option("--level", help="Another level of the regions, 0 the finest; the chosen one unless given.")] = None,
    metrics: Metrics = "logit_diff,accuracy",
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
    show_n: Annotated[int, typer.Option("--show", help="Blocks and edges to show.")] = 15,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save every value, as .parquet or .csv.")] = None,
    gallery: Gallery = None,
    write: Annotated[bool, typer.Option("--write/--no-write", help="Write edges between regions, their circuits and scores into the graph.")] = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Do regions matter? Kept, cut and wired up by ablation, beside single features, heads and random blocks of the same sizes."""
    from . import region_verdict, regions, show_region_verdict
    from .analysis.study import found_pairs, held_out_pairs
    from .queries.samples import SampleStore
    from .queries.statistics import StatisticsStore
    from .queries.subgraphs import find_run

    of_edges = () if edge_shares == "none" else number_list("--edge-shares", edge_shares, float)
    given = {"shares": number_list("--shares", shares, float), "edge_shares": of_edges}
    rivals = split_names(against)
    options = region_verdict.RegionTests(
        per_member=rank == "mean", blocks=blocks, drives=drives, random_draws=random_draws, features="features" in rivals, held_out=held_out,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    options.check()
    if show_n < 1:
        raise BadParameterValue(f"--show {show_n} is too small: give at least 1")
    measured = named_metrics(metrics)
    with open_atlas(atlas, graph, write=write) as store:
        found = find_run(store, run)
        own, labels = regions.read(atlas, parcellation, found.model)
        chosen = regions.at_level(own, level)
        names = regions.names_of(chosen, labels)
        others = regions.others(SampleStore(atlas, read_only=True), atlas, chosen, [name for name in rivals if name != "features"])
        study = study_of(
            store, found, atlas, model=model, dictionaries=dictionaries, device=device, metrics=measured, baseline=baseline,
            statistics_run=statistics_run, mean=mean, noise_scale=noise_scale, draws=draws, seed=seed, errors=errors, batch_size=batch_size,
            memory=memory_bytes(memory), target=target,
        )  # fmt: skip
        pairs = found_pairs(store, found)
        tested = held_out_pairs(study, pairs, held_out)

        @contextmanager
        def progress(label: str) -> Iterator[Callable[[int, int], None]]:
            with console.progress(label, quiet=as_json) as bar:
                yield lambda done, total: bar(done, total, "")

        verdict = region_verdict.put_to_the_test(study, {region_verdict.REGIONS: chosen, **others}, pairs, tested, options, progress=progress)
        save_frame(output, lambda: region_verdict.all_values(verdict))
        save_page(gallery, lambda: region_verdict.page(verdict, chosen, names))
        if as_json:
            console.say_json(region_verdict.as_json(verdict, chosen))
        else:
            show_region_verdict.show_verdict(verdict, chosen, names, show_n)
        if write:
            with StatisticsStore(atlas) as statistics:
                written = region_verdict.write_back(store, statistics, verdict, chosen)
            if not as_json:
                counts = f"{written.n_drives:,} edges between blocks, {written.n_circuits} circuits of them, {written.n_scores} scores"
                console.say(f"written: {counts}; see `featlas query region_outputs` and `query strongest_drives`")
