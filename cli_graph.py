"""The commands that ask a run's graph for single nodes and ways: `featlas analyze rank`, `featlas analyze paths`."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import console
from .cli_ablation import save_frame
from .options import DEFAULT_ATLAS, Atlas, ByOption, Graph, Json, NotBoth, Rule, Run, analyze_app, open_atlas, open_statistics

if TYPE_CHECKING:
    import polars as pl

    from .analysis.ranks import Ranking
    from .queries.gds import Client
    from .queries.store import GraphStore
    from .queries.subgraphs import RunRow

Threads = Annotated[int, typer.Option("--threads", help="With --gds: threads on the server, 4 at most in the library's open edition.")]
ByGds = Annotated[bool, typer.Option("--gds", help="Compute on a Neo4j server with Graph Data Science: for graphs too large for this machine.")]
Keep = Annotated[bool, typer.Option("--write/--no-write", help="Keep the result in the atlas' statistics (rankings, ranking_values).")]
Least = Annotated[float, typer.Option("--threshold", help="Only edges at or above this strength.")]
SHOWN = 15


@analyze_app.command("rank")
def analyze_rank_command(
    run: Run = None,
    method: Annotated[
        Literal["pagerank", "influence", "betweenness", "strength"],
        typer.Option("--method", help="A walk with restarts, one without, shortest paths through a node, or the sum of its edges."),
    ] = "pagerank",
    direction: Annotated[
        Literal["backward", "forward"],
        typer.Option("--direction", help="Of walks: backward to what drives a node, forward to what it drives."),
    ] = "backward",
    start: Annotated[
        list[str] | None,
        typer.Option("--start", help="Where walks start, unless at the output: site/index, site/error, a key, output, or all. Repeatable."),
    ] = None,
    damping: Annotated[float, typer.Option("--damping", help="Of pagerank: how likely a walk goes on and does not start anew.")] = 0.85,
    by: ByOption = "abs_weight",
    threshold: Least = 0.0,
    top_edges: Annotated[int | None, typer.Option("--top-edges", help="Only so many strongest edges.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Only the sequences of one task of the run's mixture.")] = None,
    error_nodes: Annotated[bool, typer.Option("--error-nodes/--no-error-nodes", help="Whether error nodes are in the graph.")] = True,
    gds: ByGds = False,
    threads: Threads = 1,
    shown: Annotated[int, typer.Option("--nodes", help="Nodes to show.")] = SHOWN,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save every node with its value, as .parquet or .csv.")] = None,
    write: Keep = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """Which nodes of a run's graph matter most: PageRank, influence on the output, betweenness or strength; here or on the server."""
    from .analysis.circuits import By
    from .analysis.communities import GraphOptions, read_graph
    from .analysis.ranks import Direction, RankMethod, RankOptions, rank_nodes
    from .analysis.routes import gds_ranking
    from .queries.subgraphs import find_run
    from .show_graph import show_ranking

    chosen = GraphOptions(By(by), threshold, top_edges, task, error_nodes, output=True)
    options = RankOptions(RankMethod(method), Direction(direction), tuple(start or ("output",)), damping, chosen)
    options.check()
    _check_walk(options.method.walks, method, start, direction)
    if shown < 1:
        raise NotBoth(f"--nodes {shown} shows none: give at least 1")
    with open_atlas(atlas, graph, write=False) as store:
        found = find_run(store, run)
        if gds:
            ranking = gds_ranking(store, _server(store, graph), found, options, threads=threads)
        else:
            ranking = rank_nodes(found.key, read_graph(store, found, chosen), options)
        notes = _notes(store, atlas, found, ranking.rows["key"].head(shown).to_list())
    save_frame(output, lambda: ranking.rows)
    key = _kept(atlas, ranking) if write else None
    if as_json:
        console.say_json(_as_json(ranking, key, ranking.rows.head(shown).join(notes, on="key", how="left", maintain_order="left").to_dicts()))
    else:
        show_ranking(ranking, notes, shown, key)


@analyze_app.command("paths")
def analyze_paths_command(
    source: Annotated[str, typer.Option("--from", help="Where paths begin: site/index, site/error, or a key.")],
    target: Annotated[str, typer.Option("--to", help="Where they end.")] = "output",
    run: Run = None,
    paths: Annotated[int, typer.Option("--paths", help="Strongest paths to show.")] = 10,
    rule: Annotated[Rule, typer.Option("--path-rule", help="Path score: product of the edges' shares, or the weakest edge.")] = "product",
    by: ByOption = "abs_weight",
    threshold: Least = 0.0,
    gds: ByGds = False,
    threads: Threads = 1,
    write: Keep = True,
    atlas: Atlas = DEFAULT_ATLAS,
    graph: Graph = None,
    as_json: Json = False,
) -> None:
    """The strongest paths between any two nodes of a run's graph, exactly; here or on the server (Yen's algorithm)."""
    from .analysis.circuits import By, PathRule
    from .analysis.routes import RouteOptions, best_routes, gds_routes, read_candidates
    from .queries.subgraphs import find_run
    from .show_graph import show_routes

    options = RouteOptions(source, target, paths, PathRule(rule), By(by), threshold)
    options.check()
    with open_atlas(atlas, graph, write=False) as store:
        found = find_run(store, run)
        if gds:
            routes = gds_routes(store, _server(store, graph), found, options, threads=threads)
        else:
            routes = best_routes(found.key, read_candidates(store, found, options), options)
        notes = _notes(store, atlas, found, {key for path in routes.paths for key in path.nodes})
    key = _kept(atlas, routes.ranking) if write else None
    if as_json:
        shown = [{"score": path.score, "nodes": path.nodes, "weights": path.weights} for path in routes.paths]
        console.say_json(_as_json(routes.ranking, key, shown) | {"source": routes.source, "target": routes.target, "n_edges": routes.n_edges})
    else:
        show_routes(routes, options, notes, key)


def _check_walk(walks: bool, method: str, start: list[str] | None, direction: str) -> None:
    """Refuse options that only a walk has. Raises `NotBoth`."""
    if not walks and (start or direction != "backward"):
        raise NotBoth(f"--method {method} is no walk: leave out {'--start' if start else '--direction'}")


def _notes(store: "GraphStore", atlas: Path, run: "RunRow", keys: "Collection[str]") -> "pl.DataFrame":
    """What is known of nodes, by the atlas' statistics where it has any."""
    from .analysis.ranks import notes_of

    statistics = open_statistics(atlas)
    try:
        return notes_of(store, statistics, run, keys)
    finally:
        if statistics is not None:
            statistics.close()


def _server(store: "GraphStore", uri: str | None) -> "Callable[[], Client]":
    """What connects to the library on the graph's server. Raises `NoGds`."""
    from .queries.gds import connected, require_gds
    from .queries.store import ServerCredentials

    require_gds(store)
    return lambda: connected(str(uri), ServerCredentials.from_environment())


def _kept(atlas: Path, ranking: "Ranking") -> str:
    from .analysis.rankings_store import write_ranking
    from .queries.statistics import StatisticsStore

    with StatisticsStore(atlas) as statistics:
        return write_ranking(statistics, ranking)


def _as_json(ranking: "Ranking", key: str | None, rows: list[dict[str, object]]) -> dict[str, object]:
    return {
        "ranking": key, "run": ranking.run, "method": ranking.method, "basis": ranking.basis, "settings": dict(ranking.settings),
        "n": ranking.rows.height, "rows": rows,
    }  # fmt: skip
