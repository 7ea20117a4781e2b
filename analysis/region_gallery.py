"""Pages of regions, communities and heads: figures with their question, what is held fixed, how to read them, and what they found.

1. Exhibits, each of one frame (`correlation_exhibit`: of a matrix, a site's at a time).
2. Pages: `regions_page` (found and described), `verdict_page` (put to the test), `heads_page`, `communities_page`, all by `gallery.gallery`.
3. `regions_of_run`: what the report of a circuit says of regions that were found in the same model and dictionaries.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from ..queries.blocks import blocks_of, losses_of
from ..queries.library import run_query
from ..queries.partitions import stored_parcellations, user_labels
from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow
from .community_ablation import Tested as TestedCommunities
from .community_ablation import Treatment, removal_table
from .community_study import CommunityStudy, layer_flow
from .faithfulness import Averaging
from .gallery import Exhibit, gallery, identifier, removal_exhibit
from .heads import HeadShares, Overlap, alluvial_frame
from .parcellation import PATH_SCORES, FloatArray, IntArray, Parcellation, SitePartition
from .plots import Figure, stated
from .region_plots import (
    alluvial_figure,
    correlation_figure,
    drives_figure,
    likeness_figure,
    path_figure,
    selectivity_figure,
    signed,
    sweep_figure,
    task_block_figure,
)
from .region_study import MATRIX, RANDOM, REGIONS
from .regions import Description
from .regions_store import read_parcellation

SITES_ABREAST = 5
"""Sites side by side in one figure."""


def _number(value: float | None, form: str = ".3f") -> str:
    return "undefined" if value is None else signed(value, form)


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    return _number(value) + ("" if low is None or high is None else f" ({_number(low)} … {_number(high)})")


# --- regions, found -----------------------------------------------------------------------------------------------------


def path_frames(parcellation: Parcellation) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(`site` and `PATH_SCORES` of all sites; `site, rule, n_blocks, chosen` of the levels that are kept)."""
    scores = [own.scores.select(pl.lit(name).alias("site"), *PATH_SCORES) for name, own in parcellation.sites.items()]
    kept = [
        (name, level.rule, level.n_blocks, i == own.chosen)
        for name, own in parcellation.sites.items() for i, level in enumerate(own.levels) if len(level.labels)
    ]  # fmt: skip
    schema = {"site": pl.String(), "rule": pl.String(), "n_blocks": pl.Int64(), "chosen": pl.Boolean()}
    empty = pl.DataFrame(schema={"site": pl.String(), **PATH_SCORES})
    return pl.concat([empty, *scores]), pl.DataFrame(kept, schema=schema, orient="row")


def path_exhibits(parcellation: Parcellation) -> list[Exhibit]:
    """What is known of every level of every site's path, some sites a figure; none where no site has a path."""
    scores, kept = path_frames(parcellation)
    sites = scores.filter(pl.col("n_blocks").is_not_null())["site"].unique(maintain_order=True).to_list()
    fixed = f"{parcellation.method} of {parcellation.basis}s, samples {parcellation.samples[:8]}; halves of the samples are of whole sequences."
    shown = []
    for i, some in enumerate(sites[start : start + SITES_ABREAST] for start in range(0, len(sites), SITES_ABREAST)):
        rows, levels = (frame.filter(pl.col("site").is_in(some)) for frame in (scores, kept))
        shown.append(Exhibit(
            name=f"path-{i}", title=f"How many blocks: {', '.join(some)}", fixed=fixed,
            question="How fine are the regions, and would another rule have chosen a level like it?",
            reading="From left to right partitions get finer. Held-out likelihood is of one half of the samples under blocks found in the other; "
            "stability is how far the blocks of the halves agree. Where the curves are flat, the choice of a level is a matter of taste.",
            figure=path_figure(rows, levels, title="Levels of the path of partitions", subtitle=f"{parcellation.method} of {parcellation.basis}s"),
            table=rows, findings=[_path_finding(parcellation.sites[site]) for site in some],
        ))  # fmt: skip
    return shown


def _path_finding(own: SitePartition) -> str:
    """How many blocks by which rule, what other rules say, and whether it is more than chance."""
    chosen = own.levels[own.chosen]
    others = "; ".join(f"{level.n_blocks:,} by {level.rule}" for i, level in enumerate(own.levels) if i != own.chosen)
    verdict = own.notes.get("verdict")
    if "significant" in own.notes:
        p = own.notes.get("p")
        said = "more" if own.notes["significant"] else "no more"
        verdict = f"{said} than in shuffled samples" + ("" if p is None else f" (p = {p:.2g})")
    blocks = f"{chosen.n_blocks:,} blocks of {len(own.features):,} live features, by {chosen.rule}"
    return f"{own.site}: {blocks}" + (f" ({others})" if others else "") + (f"; {verdict}" if verdict else "") + "."


def correlation_exhibit(own: SitePartition, correlation: FloatArray, *, kind: str = "correlation", names: Sequence[str] | None = None) -> Exhibit:
    """A site's correlations (n, n) of its live features in the order of the chosen level's blocks. names: of the live features."""
    chosen = own.levels[own.chosen]
    coarser = [level.labels for level in own.levels[own.chosen + 1 :]]
    named = list(names) if names is not None else [f"{own.site}/{feature}" for feature in own.features]
    return Exhibit(
        name=identifier("correlation", own.site), title=f"Correlations of {own.site} in the order of its blocks",
        question="Do the blocks show in the correlations that they were found in?",
        fixed=f"{kind} over the tokens of the samples; {len(own.features):,} live features, {own.d_sae - len(own.features):,} dead ones left out.",
        reading="A square on the diagonal is a block; inside it features should be bluer than beside it. Blue off the diagonal: two blocks that are "
        "active together; stripes: blocks that go with everything.",
        figure=correlation_figure(correlation, chosen.labels, coarser=coarser, features=named, title=f"Correlations of {own.site}"),
        table=pl.DataFrame({"feature": own.features, "block": chosen.labels}).group_by("block").agg(pl.len().alias("size"), "feature").sort("block"),
    )  # fmt: skip


def likeness_exhibit(description: Description) -> Exhibit | None:
    """Correlation against decoder cosine inside blocks; None without cosines."""
    blocks, sites = description.chosen(description.blocks), description.sites.filter("chosen")
    if not blocks["mean_cosine"].drop_nulls().len():
        return None
    said = [
        f"{row['site']}: over {row['n_pairs']:,} pairs of features correlation and cosine have rank correlation {_number(row['rank_correlation'])}; "
        f"blocks agree with clusters of decoder rows by AMI {_number(row['cosine_ami'])}. Inside blocks the mean correlation is "
        f"{_number(row['mean_correlation'])} (across {_number(row['mean_correlation_outside'])}), the mean cosine {_number(row['mean_cosine'])} "
        f"(across {_number(row['mean_cosine_outside'])})."
        for row in sites.iter_rows(named=True)
    ]  # fmt: skip
    return Exhibit(
        name="likeness", title="Are regions merely a smaller dictionary?", question="Do features of a region also write the same direction?",
        fixed="The chosen level of each site; the same pairs of features for both axes.",
        reading="A circle is a block, its area the number of its features. Were regions sets of near copies, they would lie to the right, "
        "where decoder rows point the same way. High and near 0 on the x axis: features that act together and write different things.",
        figure=likeness_figure(blocks, sites, title="Correlation and decoder cosine inside blocks"),
        table=blocks.select("site", "block", "size", "mean_correlation", "mean_correlation_outside", "mean_cosine", "mean_cosine_outside"),
        findings=said,
    )  # fmt: skip


def regions_page(
    parcellation: Parcellation, description: Description | None = None, correlations: Callable[[str], FloatArray] | None = None, *,
    settings: Sequence[tuple[str, str]] = (), commands: Sequence[str] = (),
) -> str:  # fmt: skip
    """Regions as found: levels, correlations by block, likeness to the dictionary. correlations: of a site's live features, by its name."""
    exhibits = path_exhibits(parcellation)
    likeness = likeness_exhibit(description) if description is not None else None
    exhibits += [likeness] if likeness is not None else []
    if description is not None:
        exhibits = [_with_blocks(exhibit, description) for exhibit in exhibits]
    kind = str(parcellation.settings.get("correlation") or "correlation")
    for name, own in parcellation.sites.items() if correlations is not None else ():
        if len(own.features) > 1 and correlations is not None:
            exhibits.append(correlation_exhibit(own, correlations(name), kind=f"{kind} correlation"))
    said = [("parcellation", parcellation.key), ("samples", parcellation.samples), ("model", parcellation.model), ("method", parcellation.method)]
    said += [(name, str(value)) for name, value in parcellation.settings.items() if name != "method" and str(value) not in ("None", "{}", "[]")]
    return gallery(
        exhibits, f"Regions of {parcellation.model.partition('@')[0]}", settings=[*said, *settings], commands=commands,
        subtitle=f"{parcellation.method} of {parcellation.basis}s, parcellation {parcellation.key}",
    )  # fmt: skip


def _with_blocks(exhibit: Exhibit, description: Description) -> Exhibit:
    """The likeness exhibit with what every block is called and for, in its table."""
    if exhibit.name != "likeness":
        return exhibit
    blocks = description.chosen(description.blocks).with_columns(label=pl.coalesce("label", "automatic_label"))
    columns = ("site", "block", "label", "size", "mean_correlation", "mean_correlation_outside", "mean_cosine", "mean_cosine_outside", "frequency",
               "member_frequency", "task", "task_share", "distinctive_task", "distinctive_lift")  # fmt: skip
    return Exhibit(**{**exhibit.__dict__, "table": blocks.select(columns)})


# --- regions, put to the test ---------------------------------------------------------------------------------------------


def sweep_exhibit(table: pl.DataFrame, metric: str, compared: Mapping[str, pl.DataFrame] | None = None) -> Exhibit:
    """φ of what is kept, by share. compared: by what was done (kept, cut), rows of `faithfulness.matched` against the regions."""
    rows = table.filter(pl.col("averaging") == Averaging.RATIO_OF_MEANS.value)
    said = [line for what, frame in (compared or {}).items() for line in _compared(what, frame)]
    return Exhibit(
        name="sweep", title="Keeping and cutting regions, beside other sets of features",
        question="Do regions hold what the model needs for the tasks, more than as many features chosen one by one or at random?",
        fixed=f"{stated(rows.drop('metric', 'n'))}. The same sequences, baseline and live features for every line; error nodes, dead features and "
        "sites that were not partitioned are units of their own, alive whatever is kept or cut above; below, edges join them too.",
        reading="Units are taken by attribution, greatest first, until they hold a share of the live features. To the left only they are alive: φ "
        "should rise early. To the right they are cut: φ should fall early. Below, the strongest edges between units are kept in place of units.",
        figure=sweep_figure(table, metric=metric, title="φ against the share that is kept, or cut"),
        table=rows.filter(pl.col("metric") == metric).select(
            "method", "ablation", "part", "share", "n_units", "n_features", "n_edges", "value", "low", "high", "n"
        ), findings=said,
    )  # fmt: skip


def _compared(what: str, frame: pl.DataFrame) -> list[str]:
    """At how many sizes each partition's φ is higher or lower than the regions' at equal numbers of live features."""
    decided = frame.drop_nulls("difference").group_by("method", maintain_order=True).agg(
        pl.col("difference").mean(), (pl.col("low") > 0).sum().alias("above"), (pl.col("high") < 0).sum().alias("below"), pl.len().alias("n")
    )
    return [
        f"{what}: φ of {method} is higher than the regions' at {above}, lower at {below} and undecided at {n - above - below} of {n} sizes; "
        f"mean difference {_number(mean, '+.3f')}."
        for method, mean, above, below, n in decided.iter_rows()
    ]  # fmt: skip


def matrix_exhibit(matrix: pl.DataFrame, fixed: str, names: Mapping[str, str] | None = None) -> Exhibit:
    """Which block breaks which task, of `region_study.MATRIX`."""
    own = matrix.filter(pl.col("method") == REGIONS)
    most = own.drop_nulls("value").sort(pl.col("value").abs(), descending=True).unique("task", keep="first", maintain_order=True).sort("task")
    called = names or {}
    said = [
        f"{task} loses most without {called.get(removed, removed)}: {_interval(value, low, high)} of its effect."
        for task, removed, value, low, high in most.select("task", "removed", "value", "low", "high").iter_rows()
    ]  # fmt: skip
    random = matrix.filter(pl.col("method") == RANDOM).group_by("task").agg(pl.col("value").mean(), pl.col("value").abs().max().alias("most"))
    control = random.sort("task").iter_rows()
    said += [f"Random blocks: {task} loses {_number(value)} on average, {_number(top)} at most." for task, value, top in control]
    return Exhibit(
        name="matrix", title="Which region breaks which task", fixed=fixed,
        question="Does a task break without a region, and only that task?",
        reading="Each cell is the share of the task's effect that is lost when the block alone is at its baseline, with its 95 % interval: 0 "
        "nothing, 1 all, above 1 the sign turns. To the right the same of all partitions' blocks; random blocks are as large.",
        figure=task_block_figure(matrix, names=names, title="Share of a task's effect that is lost without a block", subtitle=fixed), table=matrix,
        findings=said,
    )  # fmt: skip


def selectivity_exhibit(table: pl.DataFrame, fixed: str) -> Exhibit:
    """Is what blocks break one task's alone? Of `region_study.SELECTIVITY`."""
    said = [
        f"{r['method']}: selectivity {_interval(r['value'], r['low'], r['high'])}"
        + ("" if r["method"] == REGIONS else f", regions' subtracted {_interval(r['difference'], r['difference_low'], r['difference_high'])}") + "."
        for r in table.iter_rows(named=True)
    ]  # fmt: skip
    return Exhibit(
        name="selectivity", title="Selectivity of blocks", fixed=fixed,
        question="Is what a block breaks one task's alone, more than of other blocks?",
        reading="1 where each block breaks one task only, 0 where it breaks all alike. A block's task is decided on one half of the sequences and "
        "judged on the other. A difference whose interval crosses 0 decides nothing. In brackets: how many blocks were cut.",
        figure=selectivity_figure(table, title="Selectivity by partition", subtitle=fixed), table=table, findings=said,
    )  # fmt: skip


def drives_exhibit(drives: pl.DataFrame, nodes: pl.DataFrame, fixed: str) -> Exhibit:
    """What regions drive each other, as `plots.drives_figure` takes it."""
    known = drives.drop_nulls(["weight", "effect"])
    same = known.select(((pl.col("weight") * pl.col("effect")) > 0).mean()).item() if known.height else None
    said = [] if same is None else [f"Cutting the edge moves the metric the way attribution says for {same:.0%} of {known.height:,} edges."]
    return Exhibit(
        name="drives", title="What regions drive each other", fixed=fixed,
        question="Along which edges between regions does the effect flow, and does cutting one matter?",
        reading="The input is at the bottom. An edge's attribution is the sum over the edges of its members. To the right: the effect of "
        "cutting that edge alone; on the dashed line attribution tells it exactly.",
        figure=drives_figure(drives, nodes, title="Strongest edges between units", subtitle=fixed), table=drives, findings=said,
    )  # fmt: skip


@dataclass(frozen=True)
class Tested:
    """Frames of a test of regions. table: `faithfulness` with sizes; compared: by what was done, of `faithfulness.matched`; matrix: `MATRIX`;

    selectivity: `SELECTIVITY` or None; drives: of `drive_table`; nodes: `name, label, site, n_features` of all units; metric, fixed: in words.
    """

    table: pl.DataFrame
    compared: Mapping[str, pl.DataFrame]
    matrix: pl.DataFrame
    selectivity: pl.DataFrame | None
    drives: pl.DataFrame
    nodes: pl.DataFrame
    metric: str
    fixed: str


def verdict_page(tested: Tested, names: Mapping[str, str], title: str, *, subtitle: str = "", settings: Sequence[tuple[str, str]] = ()) -> str:
    """Regions put to the test as one page; `names`: what units are called."""
    exhibits = [sweep_exhibit(tested.table, tested.metric, tested.compared)] if tested.table.height else []
    exhibits += [matrix_exhibit(tested.matrix, tested.fixed, names)] if tested.matrix.height else []
    exhibits += [selectivity_exhibit(tested.selectivity, tested.fixed)] if tested.selectivity is not None else []
    exhibits += [drives_exhibit(tested.drives, tested.nodes, tested.fixed)] if tested.drives.height else []
    return gallery(exhibits, title, subtitle=subtitle, settings=settings)


# --- heads -----------------------------------------------------------------------------------------------------------------


def heads_page(blocks: IntArray, shares: HeadShares, compared: Overlap, *, settings: Sequence[tuple[str, str]] = ()) -> str:
    """Regions (d_sae,) and heads of one site's features: the flows between them, and how clearly each feature is of a head."""
    frame, left, right = alluvial_frame(blocks, shares)
    null = compared.null_ami
    said = [
        f"{compared.n:,} features in {compared.n_blocks} regions and {compared.n_heads} heads: AMI {_number(compared.ami)}; with heads permuted "
        f"{_number(float(null.mean()))} on average, {_number(float(null.max()))} at most (p = {compared.p:.2g}).",
        f"{compared.purity:.0%} of the features are of their region's first head.",
    ]  # fmt: skip
    flows = Exhibit(
        name="alluvial", title=f"Regions and heads of {shares.site}", question="Are regions attention heads under another name?",
        fixed=f"The same {compared.n:,} features to the left and to the right; a feature's head is the one of the greatest share ({shares.method}).",
        reading="A ribbon is as thick as the number of features that a region and a head share, in its head's colour. Regions of one colour are of "
        "one head; a head that takes ribbons from everywhere is spread over regions.",
        figure=alluvial_figure(frame, left, right, title=f"Regions and heads of {shares.site}", subtitle=f"AMI {_number(compared.ami)}"),
        table=compared.contingency, findings=said,
    )  # fmt: skip
    return gallery([flows], f"Heads of {shares.site}", subtitle=f"dictionary {shares.dictionary}, by {shares.method}", settings=settings)


# --- communities -----------------------------------------------------------------------------------------------------------


def communities_page(study: CommunityStudy, tested: TestedCommunities | None = None, *, largest: int = 24) -> str:
    """Communities of an effective graph: do they follow layers or tasks, and which task breaks without each? The `largest` are drawn one by one."""
    fixed = f"{study.communities.method.value}, {study.graph.description}: {study.graph.n:,} nodes, {study.graph.m:,} edges"
    exhibits = [_flow_exhibit(study, what, frame, fixed, largest) for what, frame in _community_flows(study).items()]
    if tested is not None:
        said = f"{fixed}; {tested.metric}, baseline {tested.baseline}, {tested.n_tested} held-out sequences"
        exhibits += [
            removal_exhibit(removal_table(tested, treatment), f"community {treatment.value}; {said}", quantity="φ", name=f"communities-{place}")
            for place, treatment in enumerate(Treatment)
        ]
    settings = [("run", study.run.key), ("graph", study.graph.description), ("seed", str(study.options.seed))]
    settings += [("baseline", tested.baseline)] if tested is not None else []
    return gallery(exhibits, f"Communities of {study.run.task}", subtitle=study.run.model, settings=settings)


def _community_flows(study: CommunityStudy) -> dict[str, pl.DataFrame]:
    """`community, name, n` by site, and where there are tasks to tell apart by the task that nodes are most attributed to."""
    labels = study.communities.labels
    flows = {"site": layer_flow(study.graph, labels).select("community", pl.col("site").alias("name"), "n")}
    if len(study.tasks) > 1:
        has = study.strengths.sum(axis=1) > 0
        task = pl.Series([study.tasks[i] for i in study.strengths[has].argmax(axis=1)], dtype=pl.String)
        counted = pl.DataFrame({"community": labels[has], "name": task}).group_by("community", "name").agg(pl.len().cast(pl.Int64).alias("n"))
        flows["task"] = counted.sort("community", "name")
    return flows


def _flow_exhibit(study: CommunityStudy, what: str, frame: pl.DataFrame, fixed: str, largest: int) -> Exhibit:
    names = [f"community {i}" for i in range(largest)] + ["the smaller ones"]
    named = frame.with_columns(left=pl.Series([names[min(community, largest)] for community in frame["community"]], dtype=pl.String))
    flows = named.group_by("left", pl.col("name").alias("right"), maintain_order=True).agg(pl.col("n").sum())
    found = dict(study.graph.nodes.select("site", "order").unique().iter_rows()) if what == "site" else {}
    right = sorted(frame["name"].unique().to_list(), key=lambda name: (found.get(name, 0), name))
    rows = study.following.filter(pl.col("what") == what)
    said = [
        f"AMI with {what}s {_number(value)}; {null}: {_interval(mean, low, high)}, p = {p:.2g}."
        for value, null, mean, low, high, p in rows.select("value", "null", "null_mean", "null_low", "null_high", "p").iter_rows()
    ]  # fmt: skip
    of = "the site it stands at" if what == "site" else "the task it carries the greatest share of"
    return Exhibit(
        name=f"communities-{what}", title=f"Do communities follow {what}s?", fixed=fixed,
        question=f"Is a community of one {what}, or does it run through several?",
        reading=f"To the left communities, the largest first; to the right each node by {of}. A ribbon is as thick as the number of nodes.",
        figure=alluvial_figure(flows, names, right, sides=("communities", f"{what}s"), things="nodes", title=f"Communities and {what}s"),
        table=frame.rename({"name": what}), findings=said,
    )  # fmt: skip


# --- in the report of a circuit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRegions:
    """What a report says of regions: what was found in words, the path's figure, the table of blocks, and which breaks which task (or None)."""

    key: str
    subtitle: str
    findings: Sequence[str]
    paths: Figure | None
    blocks: pl.DataFrame
    matrix: Figure | None


def regions_of_run(store: GraphStore, statistics: StatisticsStore, run: RunRow, *, sites: int = SITES_ABREAST) -> RunRegions | None:
    """The regions found last in a run's model and dictionaries, with what the graph knows of their blocks; None where there are none."""
    for key in stored_parcellations(statistics, run.model)["parcellation"]:
        parcellation = read_parcellation(statistics, key)
        if all(run.dictionaries.get(name) == own.dictionary for name, own in parcellation.sites.items()):
            return regions_known(store, statistics, parcellation, sites=sites)
    return None


def regions_known(store: GraphStore, statistics: StatisticsStore, parcellation: Parcellation, *, sites: int = SITES_ABREAST) -> RunRegions:
    """What the graph and the statistics know of a parcellation's blocks; the path's figure is of the first `sites`."""
    scores, kept = path_frames(parcellation)
    drawn = scores["site"].unique(maintain_order=True).to_list()[:sites]
    subtitle = f"{parcellation.method} of {parcellation.basis}s"
    shown = scores.filter(pl.col("site").is_in(drawn)), kept.filter(pl.col("site").is_in(drawn))
    blocks = _known_blocks(store, parcellation)
    names = _user_names(statistics, parcellation)
    losses = _losses(store, parcellation)
    return RunRegions(
        parcellation.key, subtitle, [_path_finding(own) for own in parcellation.sites.values()],
        path_figure(*shown, title="Levels of the path of partitions", subtitle=subtitle) if shown[0].height else None, blocks,
        task_block_figure(losses, names=names, title="Share of a task's effect that is lost without a region") if losses.height else None,
    )  # fmt: skip


def _known_blocks(store: GraphStore, parcellation: Parcellation) -> pl.DataFrame:
    """The chosen levels' blocks with what the graph knows of them, or their sizes alone where they were not written there."""
    written = blocks_of(store, parcellation.key).height > 0
    rows = run_query(store, "regions", {"parcellation": parcellation.key, "limit": 100_000}) if written else pl.DataFrame()
    columns = {"site": pl.String, "number": pl.Int64, "size": pl.Int64, "label": pl.String, "correlation_inside": pl.Float64,
               "correlation_outside": pl.Float64, "frequency": pl.Float64, "task": pl.String, "task_share": pl.Float64}  # fmt: skip
    if rows.height:
        return rows.select(pl.col(name).cast(dtype) for name, dtype in columns.items())
    found = [
        {"site": name, "number": number, "size": size}
        for name, own in parcellation.sites.items()
        for number, size in enumerate(np.bincount(own.levels[own.chosen].labels).tolist())
    ]  # fmt: skip
    return pl.DataFrame(found, schema=columns)


def _user_names(statistics: StatisticsStore, parcellation: Parcellation) -> dict[str, str]:
    """What people call the chosen levels' blocks, by the names of their units."""
    chosen = {name: own.chosen for name, own in parcellation.sites.items()}
    rows = user_labels(statistics, parcellation.key).select("site", "level", "block", "label").iter_rows()
    return {f"{site}/block {block}": f"{site}/{block} {label}" for site, level, block, label in rows if chosen.get(site) == level}


def _losses(store: GraphStore, parcellation: Parcellation) -> pl.DataFrame:
    """What each task loses without each block, as `MATRIX`; of several metrics and baselines the one measured on most blocks."""
    rows = losses_of(store, parcellation.key)
    if rows.is_empty():
        return pl.DataFrame(schema=MATRIX)
    held = ["metric", "baseline", "split", "averaging", "seed"]
    most = rows.group_by(held).len().sort("len", *held, descending=[True] + [False] * len(held)).head(1)
    own = rows.join(most, on=held, how="semi").with_columns(removed=pl.format("{}/block {}", "site", "index"), method=pl.lit(REGIONS))
    known = {"n_features": "size", "unit": "index"}
    return own.select((pl.col(known.get(name, name)) if known.get(name, name) in own.columns else pl.lit(None)).cast(dtype).alias(name)
                      for name, dtype in MATRIX.items())  # fmt: skip
