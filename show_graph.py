"""Ranks and paths as tables that a person reads."""

import polars as pl

from . import console
from .analysis.circuits import PathRule
from .analysis.notes import marked, readable
from .analysis.ranks import GDS, Ranking, RankMethod
from .analysis.routes import RouteOptions, Routes

_SAYS = {
    RankMethod.PAGERANK: "part of all walks' time",
    RankMethod.INFLUENCE: "part of what enters where walks start",
    RankMethod.BETWEENNESS: "shortest paths through it",
    RankMethod.STRENGTH: "sum of its edges",
}


def _whereby(ranking: Ranking) -> str:
    return "Graph Data Science on the server" if ranking.basis == GDS else "featlas"


def show_ranking(ranking: Ranking, notes: pl.DataFrame, shown: int, key: str | None) -> None:
    """The first nodes by name."""
    method, settings = RankMethod(ranking.method), ranking.settings
    console.heading(f"{ranking.method} of {ranking.rows.height:,} nodes of run {ranking.run}, by {_whereby(ranking)}")
    if method.walks:
        damping = f", damping {settings['damping']:g}" if "damping" in settings else ""
        console.say(f"walks {settings['direction']} from {', '.join(map(str, settings['start']))}{damping}; {settings['graph']}")  # type: ignore[call-overload]
    else:
        console.say(str(settings["graph"]))
    value = lambda number: f"{number:.2%}" if method.walks else f"{number:,.1f}" if method is RankMethod.BETWEENNESS else f"{number:.4g}"
    place = lambda row: str(row["index"]) if row["kind"] == "feature" else row["kind"]
    rows = ranking.rows.head(shown).join(notes, on="key", how="left", maintain_order="left")
    table = [
        (
            row["rank"], readable(marked(row["name"], row["label_kind"]), 36), row["site"], place(row), value(row["value"]),
            readable(row["contexts"][0], 60) if row["contexts"] else "",
        )
        for row in rows.iter_rows(named=True)
    ]  # fmt: skip
    console.table(("rank", "node", "site", "index", _SAYS[method], "strongest context"), table)
    if key is not None:
        console.say(f"kept as ranking {key}")


def show_routes(routes: Routes, options: RouteOptions, notes: pl.DataFrame, key: str | None) -> None:
    """The paths, nodes by name with the weights between them."""
    product = options.rule is PathRule.PRODUCT
    score = "part of all that enters the end which came along the path" if product else "strength of the weakest edge"
    n = len(routes.paths)
    names = {row["key"]: f"[{row['site']}] {readable(marked(row['name'], row['label_kind']), 28)}" for row in notes.iter_rows(named=True)}
    ends = f"from {names.get(routes.source, routes.source)} to {names.get(routes.target, routes.target)}"
    console.heading(f"{n} strongest path{'s' if n != 1 else ''} of run {routes.ranking.run} {ends}, by {_whereby(routes.ranking)}")
    ways = "" if routes.n_edges is None else f"; {routes.n_edges:,} edges are on a way between the two"
    console.say(f"{score}{ways}")
    for path in routes.paths:
        steps = [f"{names.get(node, node)} ({weight:+.2g}) →" for node, weight in zip(path.nodes, path.weights)]
        scored = f"{path.score:.3%}" if product else f"{path.score:.3g}"
        console.say(f"  {scored:>8}  {' '.join([*steps, names.get(path.nodes[-1], path.nodes[-1])])}")
    if key is not None:
        console.say(f"kept as ranking {key}")
