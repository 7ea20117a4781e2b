"""A study of communities: found, compared with other methods, seeds, resolutions and rewired graphs, laid beside layers and tasks.

`study_communities` does all that takes no model; `community_ablation.ablate_communities` then asks the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from ..errors import UserError
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow
from .communities import Communities, CommunityOptions, EffectiveGraph, FloatArray, GraphOptions, Method, find_communities, read_graph, stability
from .community_ablation import Tested, layer_flow, removal_table
from .community_nulls import Significance, Weights, following, null_graphs, significance, task_strengths
from .community_records import describe
from .partitioning import ami

COMPARED = {
    "method": pl.String(), "n_communities": pl.Int64(), "largest": pl.Int64(), "modularity": pl.Float64(), "ami_chosen": pl.Float64(),
    "ami_site": pl.Float64(), "ami_task": pl.Float64(), "seconds": pl.Float64(),
}  # fmt: skip
"""One row a method at its defaults: its AMI with the chosen division, with the sites and with the tasks."""


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """seeds: how many are compared (1: none). scan: whether neighbouring resolutions are. nulls: rewired graphs (0: none). compare: all methods."""

    seeds: int = 5
    scan: bool = True
    nulls: int = 20
    weights: Weights = Weights.CARRIED
    compare: bool = False

    def check(self) -> None:
        """Raise a `UserError` for a number out of range."""
        for name, value, least in (("--seeds", self.seeds, 1), ("--nulls", self.nulls, 0)):
            if value < least:
                raise UserError(f"{name} {value} is too small: give at least {least}")


@dataclass(frozen=True, eq=False)
class CommunityStudy:
    """What was found. described: `community_records.DESCRIBED`; scan: `communities.SCAN` or empty; following: `community_nulls.FOLLOWING`."""

    run: RunRow
    graph: EffectiveGraph
    options: CommunityOptions
    communities: Communities
    tasks: tuple[str, ...]
    strengths: FloatArray
    described: pl.DataFrame
    following: pl.DataFrame
    significance: Significance | None = None
    scan: pl.DataFrame = field(default_factory=pl.DataFrame)
    compared: pl.DataFrame = field(default_factory=pl.DataFrame)

    @property
    def notes(self) -> dict[str, object]:
        """What is kept of it on the partition, JSON-able."""
        followed = self.following.unique("what", keep="first", maintain_order=True)
        found: dict[str, object] = {f"ami_{what}": value for what, value in followed.select("what", "value").iter_rows()}
        if self.significance is not None:
            found |= {"quantity": self.significance.quantity, "z": self.significance.z, "p": self.significance.p}
            found["nulls"] = len(self.significance.null)
        return found


Progress = Callable[[int, int, str], None]


def study_communities(
    store: GraphStore, run: RunRow, graph_options: GraphOptions, options: CommunityOptions, wanted: StudyOptions, *, circuit: str | None = None,
    found: Callable[[EffectiveGraph], Communities] | None = None, progress: Progress | None = None,
) -> CommunityStudy:  # fmt: skip
    """Find the communities of a run's graph, or of a stored circuit, and lay everything beside them that needs no model.

    found: divides the graph in place of `find_communities` (Graph Data Science); seeds, resolutions and nulls are then not run.
    """
    say = progress or (lambda done, total, what: None)
    graph = read_graph(store, run, graph_options, circuit=circuit)
    options.check()
    communities = find_communities(graph, options) if found is None else found(graph)
    tasks, strengths = task_strengths(store, run, graph)
    scan, nulls = pl.DataFrame(), None
    # What stood in for a method is what its seeds and nulls are made by.
    own = options if communities.method is options.method else CommunityOptions(communities.method, seed=options.seed)
    if found is None and wanted.seeds > 1:
        grid = {} if wanted.scan else {"grid": (1.0,)}
        scan = stability(graph, own, seeds=wanted.seeds, progress=lambda done, total: say(done, total, "resolutions"), **grid)
    if found is None and wanted.nulls:
        nulls = null_graphs(graph, own, wanted.nulls, weights=wanted.weights, progress=lambda done, total: say(done, total, "rewired graphs"))
    follows = following(graph, communities, strengths, nulls.found if nulls else (), seed=options.seed)
    compared = compare_methods(graph, communities, strengths, options) if wanted.compare else pl.DataFrame()
    return CommunityStudy(
        run, graph, options, communities, tasks, strengths, describe(graph, communities.labels, tasks, strengths), follows,
        significance(communities, nulls) if nulls else None, scan, compared,
    )  # fmt: skip


def compare_methods(graph: EffectiveGraph, chosen: Communities, strengths: FloatArray, options: CommunityOptions) -> pl.DataFrame:
    """Every method at its defaults, as `COMPARED`."""
    import time

    rows = []
    for method in Method:
        begun = time.perf_counter()
        found = find_communities(graph, CommunityOptions(method, seed=options.seed, seconds=options.seconds, interpreter=options.interpreter))
        took = time.perf_counter() - begun
        name = method.value if found.method is method else f"{method.value} ({found.method.value} instead)"
        of_tasks = ami(found.labels, np.asarray(strengths.argmax(axis=1))) if strengths.shape[1] > 1 else None
        agreed = ami(found.labels, chosen.labels), ami(found.labels, graph.site)
        rows.append((name, found.n_communities, int(found.sizes[0]), found.modularity, *agreed, of_tasks, took))
    return pl.DataFrame(rows, schema=COMPARED, orient="row")


def as_json_value(study: CommunityStudy, tested: Tested | None = None) -> dict[str, object]:
    """A study, and what its communities are worth to the model, for machines."""
    found, significant = study.communities, study.significance
    return {
        "run": study.run.key, "graph": study.graph.description, "nodes": study.graph.n, "edges": study.graph.m, "method": found.method.value,
        "modularity": found.modularity, "codelength": found.codelength, "info": dict(found.info), "communities": study.described.to_dicts(),
        "following": study.following.to_dicts(), "scan": study.scan.to_dicts(), "compared": study.compared.to_dicts(),
        "significance": None if significant is None else {
            "quantity": significant.quantity, "value": significant.value, "null": significant.null.tolist(), "z": significant.z, "p": significant.p,
            "null_communities": significant.n_null.tolist(), "unchanged": significant.unchanged, "exchanges": significant.exchanges,
        },
        "flow": layer_flow(study.graph, found.labels).to_dicts(),
        "tested": None if tested is None else {
            "metric": tested.metric, "baseline": tested.baseline, "n_tested": tested.n_tested, "table": tested.table.to_dicts(),
            "extra_loss": tested.extra_loss.to_dicts(), "removals": removal_table(tested).to_dicts(),
        },
    }  # fmt: skip
