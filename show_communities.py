"""Communities as tables that a person reads."""

import polars as pl

from . import console
from .analysis.communities import Method
from .analysis.community_ablation import RANDOM, REST, Tested, Treatment, community_name
from .analysis.community_nulls import REWIRED
from .analysis.community_records import Written
from .analysis.community_study import CommunityStudy
from .analysis.faithfulness import POOLED
from .show_ablation import number

SHOWN = 12
"""Communities in the table; the others are told by their number and sizes."""

_NOTHING = 0.005
"""|φ| below which a community alone does nothing."""


def show_communities(study: CommunityStudy) -> None:
    """What was found, and everything that takes no model."""
    graph, found, options = study.graph, study.communities, study.options
    console.heading(f"{found.n_communities} communities by {found.method.value} of {graph.description}")
    if (instead := found.info.get("instead_of")) is not None:
        console.say(f"{found.method.value} instead of {instead}: {found.info['reason']}")
    if found.info.get("by") == "Graph Data Science":
        console.say("divided by Graph Data Science on the server, which ignores directions; seeds, resolutions and rewired graphs are not run there")
    left = f"; {graph.left_out} other nodes of these edges are left out or have no edge then" if graph.left_out else ""
    at = f", resolution {options.resolution:g}" if found.method.has_resolution else ""
    code = "" if found.codelength is None else f", codelength {found.codelength:.4g} bits"
    console.say(f"{graph.n:,} nodes, {graph.m:,} edges{left}; directed modularity {found.modularity:.3f}{code}{at}, seed {options.seed}")
    _show_members(study)
    _show_following(study)
    _show_significance(study)
    _show_scan(study)
    if study.compared.height:
        console.heading("All methods at their defaults")
        columns = ("method", "communities", "largest", "modularity", "AMI with the chosen", "AMI with sites", "AMI with tasks", "seconds")
        console.table(columns, [[_plain(value) for value in row] for row in study.compared.iter_rows()])


def _plain(value: object) -> object:
    return number(value) if isinstance(value, float) else "–" if value is None else value


def _show_members(study: CommunityStudy) -> None:
    rows = study.described.head(SHOWN)
    cells = rows.select("community", "size", "n_sites", "within", "into", "out", "label").iter_rows()
    columns = ("community", "nodes", "sites", "weight inside", "entering", "leaving", "the task it is most attributed to, strongest nodes")
    console.table(columns, [(c, size, sites, *(f"{w:.3g}" for w in weights), label) for c, size, sites, *weights, label in cells])
    if (more := study.described.height - rows.height) > 0:
        console.say(f"… and {more} more, of {study.described['size'][rows.height]} nodes at most")


def _show_following(study: CommunityStudy) -> None:
    console.heading("Do communities follow layers or tasks? (adjusted mutual information: 0 unrelated, 1 the same)")
    rows = [
        (f"AMI with {'sites' if row['what'] == 'site' else 'tasks'}", number(row["value"]), row["null"],
         number(row["null_mean"], row["null_low"], row["null_high"]), f"{row['p']:.3g}")
        for row in study.following.iter_rows(named=True)
    ]  # fmt: skip
    console.table(("", "value", "null", "null's mean (middle 95 %)", "p"), rows)
    if len(study.tasks) < 2:
        console.say(f"the run has the one task {', '.join(study.tasks) or '(none)'}: communities of tasks are found in a mixture, --task a+b")
    elif study.following.filter(null=REWIRED).height:
        console.say("rewired graphs keep every node's edges for every pair of sites: what they reach with sites is what the layers alone bring about")


def _show_significance(study: CommunityStudy) -> None:
    found = study.significance
    if found is None:
        return
    console.heading(f"Against {len(found.null)} rewired graphs with the same degrees for every pair of sites")
    z = "–" if found.z is None else f"{found.z:.2f}".replace("-", "−")
    least, most = int(found.n_null.min()), int(found.n_null.max())
    console.say(
        f"{found.quantity} {found.value:.4g}, of rewired graphs {found.null.mean():.4g} ({found.null.min():.4g} … {found.null.max():.4g}): "
        f"z = {z}, p = {found.p:.3g}; they have {least} to {most} communities"
    )
    console.say(f"each edge was exchanged {2 * found.exchanges:.1f} times; {found.unchanged:.0%} of a rewired graph's edges are the data's too")


def _show_scan(study: CommunityStudy) -> None:
    if study.scan.is_empty():
        return
    console.heading("How stable are they? Agreement (AMI, middle 95 % of pairs) between seeds, and with the next resolution")
    first = "communities asked" if study.communities.method in (Method.SPECTRAL, Method.NESTED_SBM) else "resolution"
    rows = [
        (f"{row['resolution']:g}", row["n_communities"], f"{row['n_least']}–{row['n_most']}", row["largest"], number(row["modularity"]),
         number(row["seeds_ami"], row["seeds_low"], row["seeds_high"]), number(row["next_ami"], row["next_low"], row["next_high"]))
        for row in study.scan.iter_rows(named=True)
    ]  # fmt: skip
    console.table((first, "communities", "by seeds", "largest", "modularity", "between seeds", "with the next"), rows)


def show_tested(tested: Tested, study: CommunityStudy) -> None:
    """Community × task: what is left of each task without a community, and with it alone, beside random nodes like it."""
    tasks = [task for task in dict.fromkeys(tested.table["task"].to_list()) if task != POOLED]
    shown = [*tasks, POOLED] if len(tasks) > 1 else tasks
    console.heading(f"Without each community: {tested.n_tested} held-out sequences, metric {tested.metric}, baseline {tested.baseline}")
    console.say("φ of what is left (1: nothing lost, 0: as the baseline); below, as many random nodes of the same sites and kinds, draws averaged")
    label = dict(study.described.select("community", "task").iter_rows())
    named = lambda part: f"{part.name} ({label[part.community]})" if part.community is not None and label[part.community] else part.name
    names = {part.name: named(part) for part in tested.parts}
    for treatment in Treatment:
        rows = tested.table.filter(treatment=treatment.value)
        measured = rows.select("part", "task", "value", "low", "high").iter_rows()
        cells = {(part, task): number(value, low, high) for part, task, value, low, high in measured}
        if treatment is Treatment.ALONE:
            console.heading("With that community alone")
        # most sets of nodes do nothing alone: one line says so
        idle = {part for (part,), of in rows.group_by("part") if (of["value"].fill_null(0.0).abs() < _NOTHING).all()}
        quiet = [part for part in tested.parts if treatment is Treatment.ALONE and {part.name, RANDOM + part.name} <= idle]
        lines = []
        for part in (part for part in tested.parts if part not in quiet):
            lines.append((names[part.name], len(part.nodes), *(cells.get((part.name, task), "–") for task in shown)))
            lines.append(("  random like it", len(part.nodes), *(cells.get((RANDOM + part.name, task), "–") for task in shown)))
        if lines:
            console.table((treatment.value, "nodes", *shown), lines)
        if quiet:
            console.say(f"|φ| is below {_NOTHING:g} with any of these alone, and with random nodes like it: {', '.join(part.name for part in quiet)}")
    _show_selectivity(tested, study, tasks)


def _show_selectivity(tested: Tested, study: CommunityStudy, tasks: list[str]) -> None:
    """How many communities hurt a task more than random nodes do, and whether it is the one that they are attributed to."""
    console.heading("What a community's removal takes more than that of random nodes (φ, paired 95 % intervals)")
    cells = {(part, task): (value, low, high) for part, task, value, low, high, _ in tested.extra_loss.iter_rows()}
    console.table(("removed", *tasks), [(part.name, *(number(*cells[part.name, task]) for task in tasks)) for part in tested.parts])
    if len(tasks) < 2:
        return
    label = {community_name(c): task for c, task in study.described.select("community", "task").iter_rows()}
    tried = [part.name for part in tested.parts if part.name != REST]
    sure = [(name, task) for name in tried for task in tasks if (cells[name, task][1] or 0) > 0]
    worst = {name: max(tasks, key=lambda task: cells[name, task][0] or 0.0) for name in tried}
    hit = [name for name in tried if worst[name] == label[name]]
    console.say(
        f"{len({name for name, _ in sure})} of {len(tried)} communities take more of some task than random nodes do (interval above 0); "
        f"{len(hit)} of {len(tried)} take most of the task that they are most attributed to ({1 / len(tasks):.0%} by chance)"
    )


def show_written(written: Written) -> None:
    """What the graph has now."""
    console.say(f"written: partition {written.partition}, {written.n_blocks:,} blocks, {written.n_members:,} members, {written.n_scores:,} scores")


def frame(study: CommunityStudy) -> pl.DataFrame:
    """Every node with its community, for files."""
    graph = study.graph
    return graph.nodes.drop("order").with_columns(
        pl.Series("community", study.communities.labels), pl.Series("strength", graph.strength),
        *(pl.Series(f"share_{task}", study.strengths[:, i]) for i, task in enumerate(study.tasks)),
    )  # fmt: skip
