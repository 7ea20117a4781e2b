"""Ranks of nodes and strongest paths: hand-worked, against dense matrices and all paths listed, and kept."""

import itertools
import json
import math
from pathlib import Path

import networkx as nx
import numpy as np
import polars as pl
import pytest
from featlas.analysis.circuits import By, Candidates, PathRule, Selection, strengths
from featlas.analysis.communities import EffectiveGraph, MissingPackage
from featlas.analysis.rankings_store import NoSuchRanking, list_rankings, read_ranking, write_ranking
from featlas.analysis.ranks import (
    Direction,
    NoSuchNode,
    RankMethod,
    RankOptions,
    betweenness,
    nodes_named,
    rank_nodes,
    walk,
)
from featlas.analysis.routes import NoRoute, NotOneNode, RouteOptions, best_routes
from featlas.errors import UserError
from featlas.queries.statistics import StatisticsStore

SITES = ("embed", "resid_0", "resid_1", "y")


def nodes_of(n_sites: tuple[int, ...]) -> pl.DataFrame:
    rows = []
    for order, (site, n) in enumerate(zip(SITES, n_sites, strict=True)):
        for i in range(n):
            kind = "output" if site == "y" else "error" if i == n - 1 and n > 2 else "feature"
            rows.append((f"m|d|{site}|{i}", site, order - 1, kind, i if kind == "feature" else -1, order))
    return pl.DataFrame(rows, schema=["key", "site", "layer", "kind", "index", "order"], orient="row")


def graph_of(nodes: pl.DataFrame, edges: list[tuple[int, int, float]]) -> EffectiveGraph:
    source, target, weight = (np.array(column) for column in zip(*edges, strict=True))
    return EffectiveGraph(nodes, source.astype(np.int64), target.astype(np.int64), weight.astype(np.float64), "made")


# a, b -> c, d -> y:  a→c 1, b→c 3, b→d 2, a→y 1, c→y 2, d→y 1
HAND = [(0, 2, 1.0), (1, 2, 3.0), (1, 3, 2.0), (0, 4, 1.0), (2, 4, 2.0), (3, 4, 1.0)]
HAND_NODES = nodes_of((2, 2, 0, 1))


def random_graph(seed: int, sizes: tuple[int, ...] = (5, 6, 6, 1)) -> EffectiveGraph:
    rng = np.random.default_rng(seed)
    nodes = nodes_of(sizes)
    order = nodes["order"].to_numpy()
    pairs = [(i, j) for i, j in itertools.permutations(range(nodes.height), 2) if order[i] < order[j] and (rng.random() < 0.5 or j == len(order) - 1)]
    pairs += [(0, j) for j in range(5, 11) if (0, j) not in pairs]
    return graph_of(nodes, [(i, j, float(w)) for (i, j), w in zip(pairs, rng.lognormal(0, 1, len(pairs)), strict=True)])


def dense_pagerank(graph: EffectiveGraph, backward: bool, start: list[int], damping: float) -> np.ndarray:
    """By its definition: power iteration on the whole matrix, what has nowhere to go starting anew."""
    w = np.zeros((graph.n, graph.n))
    w[graph.source, graph.target] = graph.weight
    w = w.T if backward else w
    personal = np.bincount(start, minlength=graph.n) / len(start)
    out = w.sum(axis=1, keepdims=True)
    p = np.where(out > 0, w / np.where(out > 0, out, 1), personal)
    rank = np.full(graph.n, 1 / graph.n)
    for _ in range(500):
        rank = (1 - damping) * personal + damping * p.T @ rank
    return rank


def values_of(graph: EffectiveGraph, options: RankOptions) -> np.ndarray:
    rows = rank_nodes("r", graph, options).rows
    return graph.nodes.join(rows, on="key", how="left", maintain_order="left")["value"].to_numpy()


def test_influence_by_hand() -> None:
    """Into y: a 1/4, c 2/4, d 1/4; into c: a 1/4, b 3/4; into d: b alone. So b = 3/4·1/2 + 1/4 and a = 1/4 + 1/4·1/2."""
    found = values_of(graph_of(HAND_NODES, HAND), RankOptions(RankMethod.INFLUENCE))
    assert found == pytest.approx([3 / 8, 5 / 8, 1 / 2, 1 / 4, 1])


def test_pagerank_by_hand() -> None:
    """Backward from y at damping 1/2: x = 1; c 1/4, d 1/8, a 1/8 + 1/32, b 3/32 + 1/16; divided by their sum 27/16."""
    options = RankOptions(damping=0.5)
    found = rank_nodes("r", graph_of(HAND_NODES, HAND), options)
    assert values_of(graph_of(HAND_NODES, HAND), options) == pytest.approx(np.array([5 / 32, 5 / 32, 1 / 4, 1 / 8, 1]) * 16 / 27)
    assert found.rows["key"].to_list() == [f"m|d|{k}" for k in ("y|0", "resid_0|0", "embed|0", "embed|1", "resid_0|1")]  # equal ones by key
    assert found.rows["rank"].to_list() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("start", ["all", "output", "embed/0"])
@pytest.mark.parametrize("seed", range(3))
def test_pagerank_is_that_of_its_definition(backward: bool, start: str, seed: int) -> None:
    graph = random_graph(seed)
    at = {"all": list(range(graph.n)), "output": [graph.n - 1], "embed/0": [0]}[start]
    options = RankOptions(RankMethod.PAGERANK, Direction.BACKWARD if backward else Direction.FORWARD, (start,))
    found = values_of(graph, options)
    assert found == pytest.approx(dense_pagerank(graph, backward, at, 0.85), abs=1e-12)
    assert found.sum() == pytest.approx(1)
    if start == "all":
        made = nx.DiGraph()
        made.add_nodes_from(range(graph.n))
        ends = (graph.target, graph.source) if backward else (graph.source, graph.target)
        made.add_weighted_edges_from(zip(*(end.tolist() for end in ends), graph.weight.tolist(), strict=True))
        theirs = nx.pagerank(made, tol=1e-13, max_iter=1000)
        assert found == pytest.approx([theirs[i] for i in range(graph.n)], abs=1e-9)


def test_influence_is_the_limit_of_pagerank_and_conserves_what_enters() -> None:
    graph = random_graph(1)
    first = np.zeros(graph.n)
    first[-1] = 1
    influence = walk(graph, Direction.BACKWARD, 1.0, first)
    nearly = walk(graph, Direction.BACKWARD, 1 - 1e-9, first)
    assert influence == pytest.approx(nearly, abs=1e-7)
    circuit = candidates_of(graph).circuit(np.ones(graph.m, dtype=bool), Selection("r", pruned=False))
    of_circuit = graph.nodes.join(circuit.nodes, on="key", how="left", maintain_order="left")["influence"]
    assert influence == pytest.approx(of_circuit.to_numpy())
    entered = np.bincount(graph.target, graph.weight, graph.n) > 0
    assert influence[~entered].sum() == pytest.approx(1)  # everything comes from the nodes that nothing enters


def test_betweenness_and_strength() -> None:
    graph = graph_of(HAND_NODES, HAND)
    assert values_of(graph, RankOptions(RankMethod.STRENGTH)) == pytest.approx([2, 5, 6, 3, 4])
    # a→y is 1 long and a→c→y 1 + 1/2; b→c→y is 1/3 + 1/2 and b→d→y 1/2 + 1: only b's way to y has a node between
    assert betweenness(graph) == pytest.approx([0, 0, 1, 0, 0])
    graph = random_graph(2)
    made = nx.DiGraph()
    made.add_nodes_from(range(graph.n))
    made.add_weighted_edges_from(zip(graph.source.tolist(), graph.target.tolist(), (1 / graph.weight).tolist(), strict=True))
    theirs = nx.betweenness_centrality(made, normalized=False, weight="weight")
    assert betweenness(graph) == pytest.approx([theirs[i] for i in range(graph.n)])


def test_nodes_by_their_names() -> None:
    nodes = nodes_of((3, 3, 0, 1))
    assert nodes_named(nodes, "embed/1").tolist() == [1]
    assert nodes_named(nodes, "resid_0/error").tolist() == [5]
    assert nodes_named(nodes, "output").tolist() == nodes_named(nodes, "y").tolist() == nodes_named(nodes, "m|d|y|0").tolist() == [6]
    for name in ("embed/7", "embed", "resid_9/0", "embed/²", ""):
        with pytest.raises(NoSuchNode, match="give a whole key, site/index"):
            nodes_named(nodes, name)


@pytest.mark.parametrize(
    ("changes", "said"), [({"damping": 1.0}, "--damping 1"), ({"damping": float("nan")}, "--damping nan"), ({"start": ()}, "--start")]
)
def test_settings_that_make_no_sense(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        RankOptions(**changes).check()


def candidates_of(graph: EffectiveGraph) -> Candidates:
    keys = graph.nodes["key"]
    rows = pl.DataFrame({"source": keys.gather(graph.source), "target": keys.gather(graph.target), "abs_weight": graph.weight})
    edges = strengths(rows.with_columns(weight=-pl.col("abs_weight")), Selection("r", by=By.ABS_WEIGHT))
    return Candidates.of(edges, graph.nodes, ["embed"])


def all_paths(graph: EffectiveGraph, source: int, target: int, rule: PathRule) -> list[tuple[float, tuple[int, ...]]]:
    """Every path, by walking them all."""
    entering = np.bincount(graph.target, graph.weight, graph.n)
    edges = {(i, j): w for i, j, w in zip(graph.source, graph.target, graph.weight, strict=True)}
    made = nx.DiGraph(list(edges))
    scored = []
    for path in nx.all_simple_paths(made, source, target):
        steps = [(edges[i, j], edges[i, j] / entering[j]) for i, j in itertools.pairwise(path)]
        score = math.prod(share for _, share in steps) if rule is PathRule.PRODUCT else min(w for w, _ in steps)
        scored.append((score, tuple(path)))
    return sorted(scored, reverse=True)


@pytest.mark.parametrize("rule", PathRule)
@pytest.mark.parametrize("ends", [("embed/0", "output"), ("embed/0", "resid_1/2"), ("resid_0/error", "y")])
def test_routes_are_the_best_of_all_paths(rule: PathRule, ends: tuple[str, str]) -> None:
    graph = random_graph(4)
    at = [int(nodes_named(graph.nodes, name)[0]) for name in ends]
    expected = all_paths(graph, at[0], at[1], rule)
    found = best_routes("r", candidates_of(graph), RouteOptions(*ends, n=7, rule=rule))
    assert [path.score for path in found.paths] == pytest.approx([score for score, _ in expected[:7]])
    keys = graph.nodes["key"].to_list()
    if rule is PathRule.PRODUCT:  # of the weakest edge there are ties
        assert [path.nodes for path in found.paths] == [tuple(keys[i] for i in path) for _, path in expected[:7]]
        assert found.ranking.rows["key"][0] == " > ".join(found.paths[0].nodes)
    assert all(weight < 0 for path in found.paths for weight in path.weights)  # signed
    assert found.n_edges == len({edge for _, path in expected for edge in itertools.pairwise(path)})


def test_routes_that_are_none() -> None:
    candidates = candidates_of(random_graph(4))
    with pytest.raises(NoRoute, match="edges lead from earlier sites to later ones"):
        best_routes("r", candidates, RouteOptions("output", "embed/0"))
    with pytest.raises(NoRoute):
        best_routes("r", candidates, RouteOptions("embed/0", "embed/0"))
    with pytest.raises(NoSuchNode):
        best_routes("r", candidates, RouteOptions("embed/99"))
    with pytest.raises(UserError, match="--paths 0"):
        best_routes("r", candidates, RouteOptions("embed/0", n=0))
    assert issubclass(NotOneNode, UserError)
    assert issubclass(MissingPackage, UserError)


def test_rankings_are_kept_once(tmp_path: Path) -> None:
    graph = graph_of(HAND_NODES, HAND)
    with StatisticsStore(tmp_path) as statistics:
        one = rank_nodes("r1", graph, RankOptions())
        two = rank_nodes("r1", graph, RankOptions(RankMethod.STRENGTH))
        keys = {write_ranking(statistics, ranking) for ranking in (one, two, one)}
        assert len(keys) == list_rankings(statistics).height == 2
        assert list_rankings(statistics, "other").is_empty()
        back = read_ranking(statistics, one.key[:10])
        assert back.rows.equals(one.rows)
        assert (back.key, dict(back.settings)) == (one.key, one.settings)
        for name in ("", "nothing"):
            with pytest.raises(NoSuchRanking):
                read_ranking(statistics, name)


@pytest.mark.slow
def test_the_commands(tiny, featlas, tmp_path: Path) -> None:
    """What a user is shown; the store's statistics are a copy's."""
    atlas, run = tiny.copied(tmp_path / "copy"), tiny.runs["main"]
    code, out, _ = featlas("analyze", "rank", "--run", run, "--atlas", atlas, "--json", "--nodes", "50", "--output", tmp_path / "ranks.csv")
    said = json.loads(out)
    assert (code, said["method"], said["basis"], said["rows"][0]["kind"]) == (0, "pagerank", "local", "output")
    saved = pl.read_csv(tmp_path / "ranks.csv")
    assert saved["value"].sum() == pytest.approx(1)
    assert saved.height == said["n"]
    code, out, _ = featlas("analyze", "rank", "--run", run, "--atlas", atlas, "--method", "influence", "--nodes", "2", "--no-write")
    assert (code, "100.00%" in out, "kept as" in out) == (0, True, False)
    place = next(f"{row['site']}/{row['index']}" for row in said["rows"] if row["kind"] == "feature")
    code, out, _ = featlas("analyze", "paths", "--run", run, "--atlas", atlas, "--from", place, "--paths", "2")
    assert (code, "kept as ranking" in out, "→ [y]" in out) == (0, True, True)
    with StatisticsStore(atlas, read_only=True) as statistics:
        assert list_rankings(statistics, run)["method"].to_list() == ["paths", "pagerank"]
    for words, message in (
        (("rank", "--method", "strength", "--start", "output"), "--method strength is no walk: leave out --start"),
        (("rank", "--gds"), "--gds needs a graph on a Neo4j server"),
        (("rank", "--damping", "2"), "--damping 2"),
        (("paths", "--from", "resid_77/1"), "no node 'resid_77/1'"),
    ):
        code, out, err = featlas("analyze", *words, "--run", run, "--atlas", atlas)
        assert (code, out) == (2, "")
        assert message in err
