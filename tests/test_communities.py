"""Communities: planted ones found, modularity by its definition, rewiring that keeps every degree, AMIs against nulls, and what is written."""

import sys
from dataclasses import replace
from itertools import product

import numpy as np
import polars as pl
import pytest
from featlas.analysis import communities as module
from featlas.analysis.circuits import NoEdges, Selection, run_candidates, run_circuit, write_circuit
from featlas.analysis.communities import (
    CommunityOptions,
    EffectiveGraph,
    GraphOptions,
    Method,
    MissingPackage,
    NoGraph,
    directed_modularity,
    eigengap,
    find_communities,
    read_graph,
    stability,
)
from featlas.analysis.community_ablation import (
    RANDOM,
    REST,
    AblationOptions,
    Treatment,
    ablate_communities,
    extra_loss,
    layer_flow,
    parts,
    random_like,
    removal_table,
)
from featlas.analysis.community_nulls import PERMUTED, REWIRED, WITHIN_SITES, Weights, following, null_graphs, rewired, significance, task_strengths
from featlas.analysis.community_records import describe, write_communities
from featlas.analysis.community_study import StudyOptions, as_json_value, study_communities
from featlas.analysis.faithfulness import POOLED, VALUES
from featlas.analysis.graph_tool import GraphToolMissing
from featlas.analysis.parcellation import PartitionPath
from featlas.analysis.partitioning import ami
from featlas.analysis.study import StudyOptions as ModelOptions
from featlas.analysis.study import found_pairs, held_out_pairs, open_study
from featlas.errors import UserError
from featlas.model.ablation import ablate_nodes
from featlas.model.masks import NodeSet
from featlas.model.metrics import Metric
from featlas.queries.library import run_query
from featlas.queries.store import open_graph
from featlas.queries.subgraphs import find_run

N_LAYERS, PER_LAYER, N_PLANTED = 5, 40, 4


def planted(seed: int = 0, *, share: float = 0.92, n_edges: int = 6000) -> tuple[EffectiveGraph, np.ndarray]:
    """A layered graph whose edges stay in their planted community with probability `share`; communities stand across all layers."""
    rng = np.random.default_rng(seed)
    n = N_LAYERS * PER_LAYER
    truth, layer = rng.integers(0, N_PLANTED, n), np.repeat(np.arange(N_LAYERS), PER_LAYER)
    source, target = rng.integers(0, n, (2, 8 * n_edges))
    kept = (layer[source] < layer[target]) & ((truth[source] == truth[target]) | (rng.random(len(source)) > share))
    pairs = np.unique(np.stack([source[kept], target[kept]], axis=1), axis=0)
    return graph_of(n, layer, pairs, rng.exponential(size=len(pairs)) + 0.01), truth


def graph_of(n: int, layer: np.ndarray, pairs: np.ndarray, weight: np.ndarray) -> EffectiveGraph:
    nodes = pl.DataFrame({
        "key": [f"k{i:04d}" for i in range(n)], "site": [f"resid_{i}" for i in layer], "layer": layer, "kind": ["feature"] * n, "index": range(n),
        "order": layer,
    })  # fmt: skip
    return EffectiveGraph(nodes, pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.int64), weight.astype(np.float64), "made")


# --- quality and methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [1.0, 0.4])
def test_directed_modularity_is_its_definition(resolution: float) -> None:
    graph, truth = planted(n_edges=300)
    dense = graph.adjacency().toarray()
    total, out, into = dense.sum(), dense.sum(axis=1), dense.sum(axis=0)
    expected = sum(
        dense[i, j] / total - resolution * out[i] * into[j] / total**2 for i, j in product(range(graph.n), repeat=2) if truth[i] == truth[j]
    )
    assert directed_modularity(graph, truth, resolution) == pytest.approx(expected, abs=1e-12)
    assert directed_modularity(graph, np.zeros(graph.n, dtype=np.int64)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", [Method.LEIDEN, Method.INFOMAP, Method.LOUVAIN, Method.SPECTRAL])
def test_planted_communities_are_found(method: Method) -> None:
    graph, truth = planted()
    found = find_communities(graph, CommunityOptions(method, n_communities=N_PLANTED if method is Method.SPECTRAL else None))
    assert ami(found.labels, truth) > (0.75 if method is Method.INFOMAP else 0.9)
    assert ami(found.labels, graph.site) < 0.1
    assert found.modularity == pytest.approx(directed_modularity(graph, found.labels))
    assert (np.diff(found.sizes) <= 0).all()
    assert (found.codelength is not None) == (method is Method.INFOMAP)
    again = find_communities(graph, CommunityOptions(method, n_communities=N_PLANTED if method is Method.SPECTRAL else None))
    assert (again.labels == found.labels).all()


def test_the_eigengap_gives_the_number_of_communities() -> None:
    graph, truth = planted()
    found = find_communities(graph, CommunityOptions(Method.SPECTRAL))
    assert found.info["by"] == "eigengap"
    assert found.n_communities == N_PLANTED
    assert ami(found.labels, truth) > 0.9
    assert eigengap(np.array([1, 0.9, 0.8, 0.2, 0.15, 0.1])) == 3


def test_leiden_counts_directions() -> None:
    """Two senders and two readers, joined one to one: an undirected expectation would count a sender as a reader too."""
    graph, _ = planted()
    found = find_communities(graph, CommunityOptions())
    better = max(directed_modularity(graph, find_communities(graph, CommunityOptions(seed=s)).labels) for s in range(3))
    assert found.modularity > 0.99 * better
    moved = found.labels.copy()
    for node in range(0, graph.n, 17):  # a local optimum of the directed quality: no single node gains by moving
        for other in range(found.n_communities):
            moved[node] = other
            assert directed_modularity(graph, moved) <= found.modularity + 1e-9
        moved[node] = found.labels[node]


def test_a_greater_resolution_gives_more_communities() -> None:
    graph, _ = planted()
    for method in (Method.LEIDEN, Method.LOUVAIN, Method.INFOMAP):
        counts = [find_communities(graph, CommunityOptions(method, resolution=r)).n_communities for r in (0.2, 1.0, 6.0)]
        assert counts[0] <= counts[1] <= counts[2], method
        assert counts[0] < counts[2], method


def test_random_numbers_elsewhere_are_left_alone() -> None:
    import igraph

    graph, _ = planted(n_edges=400)
    find_communities(graph, CommunityOptions(Method.LOUVAIN, seed=3))
    igraph.Graph.Erdos_Renyi(n=5, m=4)  # the generator that was put back still answers


def test_the_block_model_gives_way_to_leiden_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from featlas.analysis import graph_tool

    graph, truth = planted()

    def missing(*_: object, **__: object) -> PartitionPath:
        raise GraphToolMissing("no graph-tool here")

    monkeypatch.setattr(graph_tool, "nested_directed", missing)
    found = find_communities(graph, CommunityOptions(Method.NESTED_SBM))
    assert (found.method, found.info["instead_of"], found.info["reason"]) == (Method.LEIDEN, "nested-sbm", "no graph-tool here")
    assert (found.labels == find_communities(graph, CommunityOptions()).labels).all()
    # a path is taken at its finest level, or at the nearest to what is asked for
    path = PartitionPath("sbm", np.stack([truth * 2 + np.arange(graph.n) % 2, truth]), info={"seconds": 1.0})
    monkeypatch.setattr(graph_tool, "nested_directed", lambda *_, **__: path)
    assert find_communities(graph, CommunityOptions(Method.NESTED_SBM)).n_communities == 2 * N_PLANTED
    assert find_communities(graph, CommunityOptions(Method.NESTED_SBM, n_communities=5)).n_communities == N_PLANTED


@pytest.mark.graphtool
@pytest.mark.slow
def test_the_real_block_model_finds_blocks_of_layers_and_communities() -> None:
    graph, truth = planted()
    found = find_communities(graph, CommunityOptions(Method.NESTED_SBM, seconds=60))
    assert found.method is Method.NESTED_SBM
    assert ami(found.labels, truth * N_LAYERS + graph.site) > 0.5


@pytest.mark.parametrize(("method", "package"), [(Method.LEIDEN, "leidenalg"), (Method.LOUVAIN, "igraph"), (Method.INFOMAP, "infomap")])
def test_a_missing_package_is_named_with_its_extra(method: Method, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf'{package}.*pip install "featlas\[communities\]"'):
        find_communities(planted(n_edges=100)[0], CommunityOptions(method))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resolution": 0.0}, "--resolution 0.0 is out of range"),
        ({"n_communities": 4}, "leiden takes --resolution"),
        ({"method": Method.SPECTRAL, "resolution": 2.0}, "spectral takes --communities"),
        ({"method": Method.SPECTRAL, "n_communities": 1}, "--communities 1 is too small"),
        ({"seconds": 0.0}, "--seconds 0.0 is no time limit"),
    ],
)
def test_settings_out_of_range(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        CommunityOptions(**changes).check()


# --- stability --------------------------------------------------------------------------------------------------------


def test_the_scan_is_made_of_pairs_of_runs() -> None:
    graph, _ = planted(n_edges=1200, share=0.7)
    options = CommunityOptions(Method.LOUVAIN, seed=2)
    table = stability(graph, options, seeds=3, grid=(1.0, 2.0))
    runs = [[find_communities(graph, replace(options, resolution=r, seed=2 + s)) for s in range(3)] for r in (1.0, 2.0)]
    assert table["resolution"].to_list() == [1.0, 2.0]
    for row, here in zip(table.iter_rows(named=True), runs, strict=True):
        pairs = [ami(here[a].labels, here[b].labels) for a, b in ((0, 1), (0, 2), (1, 2))]
        assert row["seeds_ami"] == pytest.approx(np.mean(pairs))
        assert (row["n_least"], row["n_most"]) == (min(f.n_communities for f in here), max(f.n_communities for f in here))
        assert row["modularity"] == pytest.approx(here[0].modularity)
    assert table["next_ami"][0] == pytest.approx(np.mean([ami(a.labels, b.labels) for a in runs[0] for b in runs[1]]))
    assert table["next_ami"][1] is None
    with pytest.raises(UserError, match="--seeds 1 is too small"):
        stability(graph, options, seeds=1)


def test_the_scan_of_spectral_is_over_numbers() -> None:
    graph, _ = planted(n_edges=1200)
    table = stability(graph, CommunityOptions(Method.SPECTRAL, n_communities=4), seeds=2, grid=(0.5, 1.0, 2.0))
    assert table["resolution"].to_list() == table["n_communities"].to_list() == [2, 4, 8]


# --- rewired graphs ---------------------------------------------------------------------------------------------------


def degrees(graph: EffectiveGraph) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """Out- and in-degrees of every node for every pair of sites, counted one by one."""
    found: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for u, d in zip(graph.source.tolist(), graph.target.tolist(), strict=True):
        out, into = found.setdefault((int(graph.site[u]), int(graph.site[d])), ([0] * graph.n, [0] * graph.n))
        out[u] += 1
        into[d] += 1
    return found


@pytest.mark.parametrize("weights", list(Weights))
def test_rewiring_keeps_every_degree_and_doubles_no_edge(weights: Weights) -> None:
    graph, _ = planted(n_edges=1500)
    drawn, mixing = rewired(graph, 5, weights=weights, trace=True)
    assert degrees(drawn) == degrees(graph)
    codes = drawn.source * graph.n + drawn.target
    assert len(np.unique(codes)) == graph.m
    assert mixing.exchanges > 2
    assert mixing.unchanged[-1] < 0.3
    assert np.abs(np.diff(mixing.unchanged[-10:])).max() < 0.05  # level: mixed
    of_pair = lambda one: {pair: np.sort(one.weight[one.pair == pair]).tolist() for pair in np.unique(one.pair).tolist()}
    assert of_pair(drawn) == of_pair(graph)
    if weights is Weights.CARRIED:  # what a node sends to each site weighs what it did
        for site in range(N_LAYERS):
            sent = [np.bincount(one.source, one.weight * (one.site[one.target] == site), one.n) for one in (graph, drawn)]
            np.testing.assert_allclose(sent[0], sent[1])
    again, _ = rewired(graph, 5, weights=weights)
    assert (again.target == drawn.target).all()
    assert not (rewired(graph, 6, weights=weights)[0].target == drawn.target).all()
    assert graph.target is not drawn.target


def copies(pairs: list[tuple[int, int]], n: int) -> EffectiveGraph:
    """The same six nodes (senders 0 to 2, readers 3 to 5) n times, each copy with sites of its own: as many independent draws in one graph."""
    layer = (np.repeat(np.arange(n), 6) * 2) + np.tile([0, 0, 0, 1, 1, 1], n)
    ends = (np.array(pairs)[None] + 6 * np.arange(n)[:, None, None]).reshape(-1, 2)
    return graph_of(6 * n, layer, ends, np.ones(len(ends)))


@pytest.mark.parametrize(
    ("pairs", "out", "into", "limit"),
    [
        # the 3! permutations; χ² with 5 degrees of freedom, p = 0.001
        ([(0, 3), (1, 4), (2, 5)], [1, 1, 1], [1, 1, 1], 20.5),
        # 4 degrees of freedom; exchanges are often in each other's way, or would double an edge
        ([(0, 3), (0, 4), (1, 3), (2, 5)], [2, 1, 1], [2, 1, 1], 18.5),
    ],
)
def test_every_graph_of_the_degrees_is_equally_likely(pairs, out, into, limit) -> None:
    """Against the 0-1 matrices of these margins, listed one by one."""
    matrices = [np.array(cells).reshape(3, 3) for cells in product((0, 1), repeat=9)]
    every = [tuple(m.ravel().tolist()) for m in matrices if m.sum(axis=1).tolist() == out and m.sum(axis=0).tolist() == into]
    n = 6000
    drawn, _ = rewired(copies(pairs, n), 1, rounds=25)
    cells = np.zeros((n, 3, 3), dtype=int)
    cells[drawn.source // 6, drawn.source % 6, drawn.target % 6 - 3] = 1
    counts = dict.fromkeys(every, 0)
    for matrix in cells.reshape(n, 9).tolist():
        counts[tuple(matrix)] += 1
    expected = n / len(every)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < limit


@pytest.mark.slow
def test_a_planted_graph_is_significant_and_a_rewired_one_is_not() -> None:
    graph, _ = planted(n_edges=2500)
    options = CommunityOptions(Method.LOUVAIN)
    found = significance(find_communities(graph, options), null_graphs(graph, options, 9))
    assert found.p == pytest.approx(0.1)
    assert found.z is not None
    assert found.z > 5
    noise, _ = rewired(graph, 77)
    assert significance(find_communities(noise, options), null_graphs(noise, options, 9)).p > 0.1
    by_code = CommunityOptions(Method.INFOMAP)
    code = significance(find_communities(graph, by_code), null_graphs(graph, by_code, 4))
    assert (code.quantity, code.p) == ("codelength", pytest.approx(0.2))
    assert code.z is not None
    assert code.z > 3
    with pytest.raises(UserError, match="--nulls 0 is too small"):
        null_graphs(graph, options, 0)


# --- layers or tasks --------------------------------------------------------------------------------------------------


def test_following_tells_layers_from_tasks() -> None:
    graph, truth = planted()
    strengths = np.eye(N_PLANTED)[truth] + 0.01
    by_task = find_communities(graph, CommunityOptions())
    by_site = replace(by_task, labels=graph.site)
    rows = {(r["what"], r["null"]): r for r in following(graph, by_task, strengths, [by_site], draws=30).to_dicts()}
    assert rows["task", PERMUTED]["value"] == pytest.approx(ami(by_task.labels, truth))
    assert rows["task", PERMUTED]["value"] > 0.9
    assert rows["task", WITHIN_SITES]["null_high"] < 0.1
    assert rows["task", REWIRED]["null_mean"] == pytest.approx(ami(graph.site, truth))
    assert rows["site", REWIRED]["null_mean"] == pytest.approx(1)
    assert rows["task", PERMUTED]["p"] == pytest.approx(1 / 31)
    assert rows["site", PERMUTED]["value"] < 0.05
    other = {(r["what"], r["null"]): r["value"] for r in following(graph, by_site, strengths, draws=3).to_dicts()}
    assert other["site", PERMUTED] == pytest.approx(1)
    assert set(following(graph, by_site, strengths[:, :1], draws=3)["what"]) == {"site"}


# --- on a real run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(store, tiny):
    return find_run(store, tiny.runs["main"])


def test_the_graph_of_a_run(store, run) -> None:
    whole = run_candidates(store, run, Selection(run.key))
    kept = read_graph(store, run, GraphOptions(errors=True, output=True))
    assert (kept.n, kept.m, kept.left_out) == (whole.nodes.height, whole.edges.height, 0)
    np.testing.assert_array_equal(np.sort(kept.weight), np.sort(whole.strength))
    graph = read_graph(store, run, GraphOptions())
    assert set(graph.nodes["kind"]) == {"feature"}
    ends = whole.edges.select("source", "target", "strength").join(whole.nodes.filter(kind="feature").select(source="key"), on="source", how="semi")
    ends = ends.join(whole.nodes.filter(kind="feature").select(target="key"), on="target", how="semi")
    keys = graph.nodes["key"].to_list()
    mine = {(keys[u], keys[d]): w for u, d, w in zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True)}
    assert mine == {(u, d): w for u, d, w in ends.iter_rows()}
    assert set(keys) == {end for pair in mine for end in pair}
    assert graph.left_out == whole.nodes.height - graph.n
    strongest = read_graph(store, run, GraphOptions(top_edges=30, errors=True))
    assert strongest.m <= 30
    with pytest.raises(NoGraph, match="no edge is left of run"):
        read_graph(store, run, GraphOptions(threshold=1e9))


def test_the_graph_of_a_circuit(tiny, tmp_path) -> None:
    with open_graph(tiny.copied(tmp_path)) as graph:
        run = find_run(graph, tiny.runs["main"])
        circuit = run_circuit(graph, run, Selection(run.key), n_edges=150)
        key = write_circuit(graph, circuit)
        read = read_graph(graph, run, GraphOptions(errors=True, output=True), circuit=key[:8])
        assert (read.n, read.m) == (circuit.n_nodes, circuit.n_edges)
        with pytest.raises(NoGraph, match=f"is of run {run.key}"):
            read_graph(graph, find_run(graph, tiny.runs["identity"]), GraphOptions(), circuit=key)


def test_a_nodes_strength_in_a_task_is_that_of_its_edges(store, run) -> None:
    graph = read_graph(store, run, GraphOptions())
    tasks, strengths = task_strengths(store, run, graph)
    assert tasks == ("even", "odd")
    rows = store.read_edges("ATTRIBUTES", run=run.key)
    sequences = {r["s"]: r["task"] for r in store.query("MATCH (s:Sequence) RETURN s.key AS s, s.task AS task").to_dicts()}
    found = np.zeros((graph.n, 2))
    place = {key: i for i, key in enumerate(graph.nodes["key"])}
    summed = rows.group_by("source", "target", "sequence").agg(pl.col("weight").sum())
    for row in summed.iter_rows(named=True):
        task = tasks.index(sequences[row["sequence"]])
        for end in (row["source"], row["target"]):
            if end in place:
                found[place[end], task] += abs(row["weight"])
    np.testing.assert_allclose(strengths, found / found.sum(axis=0), rtol=1e-6)


# --- removed from the model -------------------------------------------------------------------------------------------


def test_random_nodes_are_of_the_same_sites_and_kinds() -> None:
    graph, _ = planted(n_edges=400)
    nodes = graph.nodes.with_columns(kind=pl.when(pl.col("index") % 40 == 0).then(pl.lit("error")).otherwise(pl.lit("feature")))
    graph = replace(graph, nodes=nodes)
    chosen = np.array([0, 1, 2, 45, 80, 81, 199])
    drawn = random_like(graph, chosen, 3)
    of = lambda rows: sorted(graph.nodes[rows].select("site", "kind").rows())
    assert of(drawn) == of(chosen)
    assert {0, 80} <= set(drawn.tolist())  # a site's one error node
    assert set(drawn.tolist()) != set(chosen.tolist())
    assert (random_like(graph, chosen, 3) == drawn).all()


def test_parts_are_the_largest_and_the_rest() -> None:
    graph, _ = planted(n_edges=400)
    labels = np.minimum(np.arange(graph.n) // 60, 3)
    found = parts(graph, labels, AblationOptions(largest=2, draws=2))
    assert [(part.name, part.community, len(part.nodes)) for part in found] == [("community 0", 0, 60), ("community 1", 1, 60), (REST, None, 80)]
    assert all(len(part.like) == 2 and len(part.like[0]) == len(part.nodes) for part in found)
    assert sorted(np.concatenate([part.nodes for part in found]).tolist()) == list(range(graph.n))


@pytest.fixture(scope="module")
def tested(store, run, tiny):
    study = open_study(store, run, ModelOptions(metrics=(Metric.LOGIT_DIFF,)), tiny.atlas)
    graph = read_graph(store, run, GraphOptions(errors=True))
    found = find_communities(graph, CommunityOptions())
    return study, graph, found, ablate_communities(store, study, graph, found, AblationOptions(largest=2, held_out=6, draws=2))


def test_a_community_is_removed_and_kept_alone(store, tested) -> None:
    study, graph, found, result = tested
    pairs = [pair for pair in held_out_pairs(study, found_pairs(store, study.run), 6) if len(pair.clean.split()) == 5]
    (batch,) = study.batches(pairs, 0)
    rows = graph.nodes.filter(pl.Series(found.labels == 0))
    numbers = [-1 if kind == "error" else index for kind, index in rows.select("kind", "index").iter_rows()]
    nodes = NodeSet.of(study.graph, rows["site"].to_list(), numbers)
    for treatment, mask in ((Treatment.REMOVED, nodes.inverse()), (Treatment.ALONE, nodes)):
        expected = batch.measure(ablate_nodes(batch, [mask]), Metric.LOGIT_DIFF)[0].tolist()
        for pair, value in zip(batch.pairs.pairs, expected, strict=True):
            own = result.values.filter(method=f"community 0, {treatment.value}", sequence=pair.key)
            assert own["value"].to_list() == [pytest.approx(value, abs=1e-5)]
    assert set(result.table["task"]) == {"even", "odd", POOLED}
    assert set(result.table["part"]) == {p.name for p in result.parts} | {RANDOM + p.name for p in result.parts}
    assert set(removal_table(result).columns) == {"task", "removed", "value", "low", "high", "n"}
    flow = layer_flow(graph, found.labels)
    assert flow["n"].sum() == graph.n


def made_values(values: dict[str, list[float]]) -> pl.DataFrame:
    """φ denominators of 2; a value for each sequence and method, a list of lists for several draws."""
    rows = []
    for name, numbers in values.items():
        for i, value in enumerate(numbers):
            draws = value if isinstance(value, list) else [value]
            rows += [
                {"method": f"{name}, removed", "ablation": "node", "part": "circuit", "size": 3, "draw": d, "metric": "m", "baseline": "zero",
                 "split": "held-out", "sequence": f"s{i}", "task": "ab"[i % 2], "value": v, "full": 3.0, "empty": 1.0}
                for d, v in enumerate(draws)
            ]  # fmt: skip
    return pl.DataFrame(rows, schema=dict(VALUES))


def test_extra_loss_is_the_difference_of_two_phis() -> None:
    values = made_values({"community 0": [1.0, 2.0, 1.5, 2.5], RANDOM + "community 0": [[2.0, 3.0], [2.0, 2.0], [3.0, 3.0], [2.5, 2.5]]})
    rows = {row["task"]: row for row in extra_loss(values, ["community 0"]).to_dicts()}
    assert rows["a"]["value"] == pytest.approx((2.5 + 3.0 - 1.0 - 1.5) / 2 / 2)
    assert rows["b"]["value"] == pytest.approx(0)
    assert rows[POOLED]["value"] == pytest.approx(np.mean([1.5, 0, 1.5, 0]) / 2)
    assert rows["a"]["low"] == pytest.approx(0.75)  # both sequences of the task lose the same
    assert rows["a"]["high"] == pytest.approx(0.75)


# --- written back -----------------------------------------------------------------------------------------------------


def test_what_a_community_is() -> None:
    layer = np.array([0, 0, 1, 1])
    graph = graph_of(4, layer, np.array([[0, 2], [1, 3], [0, 3]]), np.array([2.0, 1.0, 0.5]))
    labels = np.array([0, 1, 0, 1])
    table = describe(graph, labels, ("x", "y"), np.array([[0.6, 0.0], [0.1, 0.5], [0.2, 0.1], [0.1, 0.4]]))
    first, second = table.to_dicts()
    assert (first["task"], first["task_share"]) == ("x", pytest.approx(0.8 / 0.9))
    assert (second["task"], second["task_share"]) == ("y", pytest.approx(0.9 / 1.1))
    assert (first["within"], first["into"], first["out"]) == (2.0, 0.0, 0.5)
    assert (second["within"], second["into"], second["out"]) == (1.0, 0.5, 0.0)
    assert first["top_features"] == ["k0000", "k0002"]
    assert first["label"] == "x 89%: resid_0/0, resid_1/2"


def test_written_twice_is_written_once(tiny, tmp_path, tested) -> None:
    _, graph, found, result = tested
    options = CommunityOptions()
    with open_graph(tiny.copied(tmp_path)) as store:
        run = find_run(store, tiny.runs["main"])
        tasks, strengths = task_strengths(store, run, graph)
        described = describe(graph, found.labels, tasks, strengths)
        counts = []
        for _ in range(2):
            written = write_communities(store, run, graph, found, options, described, tested=result, notes={"ami_task": 0.5})
            every = {label: store.query(f"MATCH (n:{label}) RETURN count(n) AS n")["n"][0] for label in ("Partition", "Block", "Score")}
            every |= {type: store.read_edges(type).height for type in ("MEMBER_OF", "PART_OF", "SCORED", "OF_RUN")}
            counts.append(every)
        assert counts[0] == counts[1]
        assert (counts[0]["Partition"], counts[0]["Block"], counts[0]["MEMBER_OF"]) == (1, found.n_communities, graph.n)
        assert written.n_scores == counts[0]["Score"] == counts[0]["SCORED"]
        listed = run_query(store, "communities", {"run": run.key})
        assert listed["nodes"].to_list() == found.sizes.tolist()
        assert listed["method"].unique().to_list() == ["leiden"]
        for place in range(2):
            block = listed["community"][place]
            members = run_query(store, "community_members", {"community": block, "limit": 1000})
            assert set(members["feature"]) == set(graph.nodes.filter(pl.Series(found.labels == place))["key"])
            known = dict(store.read_edges("INFLUENCES", run=run.key).group_by("source").agg(pl.col("abs_weight").sum()).iter_rows())
            assert members["sent"].to_list() == pytest.approx([known.get(key, 0.0) for key in members["feature"]])
            into, out = ({row["other"]: row for row in run_query(store, "community_edges", {"community": block, "run": run.key}).filter(
                direction=way).to_dicts()} for way in ("input", "output"))  # fmt: skip
            for other in range(found.n_communities):
                for rows, source, target in ((into, other, place), (out, place, other)):
                    inside = (found.labels[graph.source] == source) & (found.labels[graph.target] == target)
                    row = rows.get(listed["community"][other])
                    assert (row is None) == (not inside.any() or other == place)
                    if row is not None:
                        assert (row["edges"], row["abs_weight"]) == (inside.sum(), pytest.approx(graph.weight[inside].sum()))
        scores = run_query(store, "community_scores", {"partition": written.partition})
        own = result.table.filter(part="community 0", treatment="removed", task="even")
        row = scores.filter(community=listed["community"][0], kind="completeness", task="even", method="leiden")
        assert row["value"].to_list() == own["value"].to_list()


@pytest.mark.slow
def test_the_study_holds_everything(store, run) -> None:
    study = study_communities(store, run, GraphOptions(errors=True), CommunityOptions(), StudyOptions(seeds=2, nulls=2, scan=False))
    told = as_json_value(study)
    assert told["nodes"] == study.graph.n
    assert len(told["communities"]) == study.communities.n_communities
    assert study.scan.height == 1
    assert study.significance is not None
    assert set(study.notes) >= {"ami_site", "ami_task", "z", "p"}
    with pytest.raises(NoEdges):
        study_communities(store, replace(run, key="none"), GraphOptions(), CommunityOptions(), StudyOptions())


def test_larger_graphs_take_seconds() -> None:
    """A hundred thousand edges: rewired and divided without a loop over them."""
    import time

    rng = np.random.default_rng(0)
    n, m = 4000, 100_000
    layer = np.repeat(np.arange(8), n // 8)
    source, target = rng.integers(0, n, (2, 3 * m))
    kept = layer[source] < layer[target]
    pairs = np.unique(np.stack([source[kept], target[kept]], axis=1), axis=0)[:m]
    graph = graph_of(n, layer, pairs, rng.exponential(size=len(pairs)))
    begun = time.process_time()
    drawn, mixing = rewired(graph, 0, rounds=5)
    assert time.process_time() - begun < 10
    assert mixing.exchanges > 0.3
    assert len(np.unique(drawn.source * n + drawn.target)) == graph.m
    assert module.directed_modularity(graph, layer) < 0
