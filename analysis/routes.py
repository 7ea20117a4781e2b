"""Routes: the strongest paths between any two nodes of a run's graph.

A path's score is the product of its edges' shares, the part of everything that enters its end which came along this very path (an edge's share is
its part in all strength that enters its target), or the strength of its weakest edge: the two rules of circuits (`circuits.PathRule`), which
`circuits.strongest_paths` follows from the inputs to the output.

1. `best_routes`: edges that are on no way from the one to the other are left out, then the k best tails of each node are found, site by site.
2. By Graph Data Science: Yen's k shortest paths, an edge being −log share long; the same paths, but for ties. It has no weakest-edge rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import polars as pl

from ..errors import UserError
from ..queries.gds import Client, Projection, edge_weights, gds_paths, gds_ranks, run_outputs
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow, model_features
from .circuits import By, Candidates, Path, PathRule, Selection, read_effects, root_sites, run_roots, select, strengths, strongest_paths
from .ranks import EVERYWHERE, GDS, LOCAL, Direction, Ranking, RankOptions, nodes_named, ranking_of

ARROW = " > "
"""Between the keys of a path, as in the named queries."""


class NoRoute(UserError):
    """No path leads from the one node to the other."""


class NotOneNode(UserError):
    """A name fits several nodes."""


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """Between which nodes (names as `ranks.nodes_named` takes them), how many, by which rule, among which edges."""

    source: str
    target: str = "output"
    n: int = 10
    rule: PathRule = PathRule.PRODUCT
    by: By = By.ABS_WEIGHT
    threshold: float = 0.0

    def check(self) -> None:
        """Raise a `UserError` for a setting out of range."""
        if self.n < 1:
            raise UserError(f"--paths {self.n} shows none: give at least 1")
        if not self.threshold >= 0:
            raise UserError(f"--threshold {self.threshold:g} is negative: it is compared with an edge's strength, give 0 or more")

    @property
    def settings(self) -> dict[str, object]:
        """What the paths depend on, JSON-able."""
        return {"from": self.source, "to": self.target, "rule": self.rule.value, "by": self.by.value, "threshold": self.threshold, "paths": self.n}


@dataclass(frozen=True, eq=False)
class Routes:
    """What was found. source, target: keys; paths: strongest first; n_edges: how many edges are on any way between the two, where that is known."""

    source: str
    target: str
    paths: tuple[Path, ...]
    ranking: Ranking
    n_edges: int | None = None


def read_candidates(store: GraphStore, run: RunRow, options: RouteOptions) -> Candidates:
    """The run's edges of the strength asked for. Raises `circuits.NoEdges`."""
    selection = Selection(run.key, options.threshold, options.by)
    rows = strengths(read_effects(store, run, selection), selection)
    features, roots = model_features(store, run.model), run_roots(run)
    return Candidates.of(select(rows, selection), features, root_sites(rows, features) if roots is None else roots)


def best_routes(run: str, candidates: Candidates, options: RouteOptions) -> Routes:
    """The strongest paths between the two nodes, exactly. Raises `NoRoute`, `NotOneNode`, `ranks.NoSuchNode`."""
    options.check()
    source, target = (one_node(candidates.nodes, name) for name in (options.source, options.target))
    circuit = candidates.between(source, target, Selection(run, options.threshold, options.by))
    start, end = candidates.nodes["key"].gather([source, target]).to_list()
    if not circuit.n_edges:
        raise no_route(run, options, start, end)
    paths = strongest_paths(circuit, options.n, rule=options.rule)
    return Routes(start, end, paths, ranking_of_paths(run, LOCAL, options, [(path.nodes, path.score) for path in paths]), circuit.n_edges)


def one_node(nodes: pl.DataFrame, name: str) -> int:
    """The row of the one node that a name means. Raises `NotOneNode`, `ranks.NoSuchNode`."""
    rows = nodes_named(nodes, name)
    if len(rows) > 1:
        raise NotOneNode(f"{name!r} fits {len(rows)} nodes: name one by its key, {' or '.join(nodes['key'].gather(rows[:3]).to_list())}")
    return int(rows[0])


def no_route(run: str, options: RouteOptions, source: str, target: str) -> NoRoute:
    """What is said where nothing leads from the one to the other."""
    return NoRoute(
        f"no path of run {run!r} leads from {source} to {target} at threshold {options.threshold:g}: lower it, or exchange the two: "
        "edges lead from earlier sites to later ones"
    )


def ranking_of_paths(run: str, basis: str, options: RouteOptions, paths: Sequence[tuple[Sequence[str], float]]) -> Ranking:
    """Paths as rows of a ranking: the key of one is its nodes' keys."""
    keys, scores = [ARROW.join(nodes) for nodes, _ in paths], [score for _, score in paths]
    return ranking_of(run, "paths", basis, options.settings, keys, scores)


# --- by Graph Data Science ---------------------------------------------------------------------------------------------


def run_nodes(store: GraphStore, run: RunRow) -> pl.DataFrame:
    """The model's nodes, of its outputs only those that the run's edges enter: what names are looked for among."""
    outputs = run_outputs(store, run.key)
    return model_features(store, run.model).filter((pl.col("kind") != "output") | pl.col("key").is_in(outputs))


def kinds_of(options: RankOptions) -> tuple[str, ...]:
    """The kinds of nodes that are in the graph."""
    return ("feature", *(("error",) if options.graph.errors else ()), *(("output",) if options.graph.output else ()))


def gds_ranking(store: GraphStore, connect: Callable[[], Client], run: RunRow, options: RankOptions, *, threads: int = 1) -> Ranking:
    """`ranks.rank_nodes` of a run's whole graph, computed on its server. Raises what `queries.gds` raises, and `ranks.NoSuchNode`."""
    options.check()
    graph = options.graph
    if graph.task is not None or graph.top_edges is not None:
        raise UserError("--gds ranks a run's whole graph: leave out --task and --top-edges, and cut it by --threshold")
    start = None
    if options.method.walks and EVERYWHERE not in options.start:
        nodes = run_nodes(store, run)
        start = sorted({key for name in options.start for key in nodes["key"].gather(nodes_named(nodes, name)).to_list()})
    rows = gds_ranks(
        connect, Projection(run.key, graph.by.value, graph.threshold, kinds_of(options), threads), options.method.value,
        backward=options.direction is Direction.BACKWARD, damping=options.damping, start=start,
    )  # fmt: skip
    return ranking_of(run.key, options.method.value, GDS, options.settings, rows["key"].to_list(), rows["value"].to_list())


def gds_routes(store: GraphStore, connect: Callable[[], Client], run: RunRow, options: RouteOptions, *, threads: int = 1) -> Routes:
    """`best_routes`, computed on the run's server. Raises what `queries.gds` raises, and as `best_routes` does."""
    options.check()
    if options.rule is not PathRule.PRODUCT:
        raise UserError("--gds has no paths by their weakest edge: take --path-rule product, or leave --gds out")
    nodes = run_nodes(store, run)
    source, target = (str(nodes["key"][one_node(nodes, name)]) for name in (options.source, options.target))
    projection = Projection(run.key, options.by.value, options.threshold, ("feature", "error", "output"), threads)
    found = [] if source == target else list(gds_paths(connect, projection, source, target, options.n).iter_rows())
    if not found:
        raise no_route(run.key, options, source, target)
    weights = edge_weights(store, run.key, sorted({edge for keys, _ in found for edge in pairwise(keys)}))
    paths = tuple(Path(tuple(keys), (-1,) * len(keys), tuple(weights[edge] for edge in pairwise(keys)), score) for keys, score in found)
    return Routes(source, target, paths, ranking_of_paths(run.key, GDS, options, found))
