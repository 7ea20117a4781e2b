"""Circuits on graphs small enough to work out by hand."""

import itertools
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import polars as pl
import pytest
from featlas.analysis.circuit_algebra import (
    Choice,
    NotAChoice,
    NotCombined,
    Operation,
    chosen,
    chosen_from,
    combine,
    combine_stored,
    file_choice,
    query_choice,
)
from featlas.analysis.circuits import (
    BackwardEdge,
    By,
    Candidates,
    Circuit,
    EmptyCircuit,
    NoEdges,
    NotRestored,
    PathRule,
    Selection,
    UnknownNodes,
    UnknownTask,
    cut_effects,
    extract,
    first_path,
    nested,
    read_circuit,
    root_sites,
    run_candidates,
    run_circuit,
    select,
    site_summary,
    strengths,
    strongest_paths,
    threshold_for,
    top_nodes,
    write_circuit,
)
from featlas.queries.circuits import UnknownCircuit
from featlas.queries.runs import SequenceNotDone
from featlas.queries.store import GraphStore, open_graph
from featlas.queries.subgraphs import UnknownRun, find_run, model_features

# Two inputs a, b at resid_0; c, d and the error node e at resid_1; f at resid_2; y.
SITES = {"a": "resid_0", "b": "resid_0", "c": "resid_1", "d": "resid_1", "e": "resid_1", "f": "resid_2", "y": "y"}
EDGES = [
    ("a", "c", 3.0), ("b", "c", -1.0), ("a", "d", 2.0), ("a", "e", 0.5),
    ("c", "f", 4.0), ("d", "f", -1.0), ("e", "f", 0.25), ("f", "y", 5.0),
]


def features(sites: dict[str, str] = SITES) -> pl.DataFrame:
    rows = [
        {
            "key": key, "site": site, "layer": int(site.split("_")[1]) if "_" in site else -1, "index": str(i),
            "kind": "output" if site == "y" else "error" if key.startswith("e") else "feature",
        }
        for i, (key, site) in enumerate(sites.items())
    ]
    return pl.DataFrame(rows)


def influences(edges: list[tuple[str, str, float]] = EDGES, abs_weight: dict[tuple[str, str], float] | None = None) -> pl.DataFrame:
    larger = abs_weight or {}
    rows = [{"source": s, "target": t, "run": "r", "weight": w, "abs_weight": larger.get((s, t), abs(w))} for s, t, w in edges]
    return pl.DataFrame(rows)


def test_whole_graph_has_known_numbers() -> None:
    circuit = extract(influences(), features(), Selection("r"))
    assert (circuit.n_nodes, circuit.n_edges) == (7, 8)
    assert circuit.average_degree == pytest.approx(16 / 7)
    assert circuit.density == pytest.approx(8 / 21)
    assert dict(circuit.nodes.select("key", "role").iter_rows()) == {
        "a": "input", "b": "input", "c": "inner", "d": "inner", "e": "inner", "f": "inner", "y": "output",
    }


def test_influence_by_hand() -> None:
    circuit = extract(influences(), features(), Selection("r"))
    influence = dict(circuit.nodes.select("key", "influence").iter_rows())
    assert influence["y"] == 1.0
    assert influence["f"] == 1.0
    assert influence["c"] == pytest.approx(4 / 5.25)
    assert influence["d"] == pytest.approx(1 / 5.25)
    assert influence["e"] == pytest.approx(0.25 / 5.25)
    assert influence["a"] == pytest.approx((0.75 * 4 + 1 + 0.25) / 5.25)
    assert influence["b"] == pytest.approx(0.25 * 4 / 5.25)
    summary = site_summary(circuit)
    assert summary["site"].to_list() == ["resid_0", "resid_1", "resid_2", "y"]
    assert summary["flow"].to_list() == pytest.approx([1, 1, 1, 1])
    assert summary["error_flow"].to_list() == pytest.approx([0, 0.25 / 5.25, 0, 0])


def test_prune_drops_what_is_not_on_a_path_from_input_to_output() -> None:
    # At 1: a->e (0.5) and e->f (0.25) go. At 3: only a->c->f->y is left; d is no longer reached, b neither.
    assert set(extract(influences(), features(), Selection("r", threshold=1.0)).nodes["key"]) == {"a", "b", "c", "d", "f", "y"}
    assert extract(influences(), features(), Selection("r", threshold=3.0)).nodes["key"].to_list() == ["a", "c", "f", "y"]
    # a -> e stays above 0.3 while e -> f does not: e dangles and goes, and its incoming edge with it.
    dangling = extract(influences(), features(), Selection("r", threshold=0.3))
    assert "e" not in dangling.nodes["key"].to_list()
    assert dangling.edges.filter(pl.col("target") == "e").is_empty()


def test_top_edges_are_the_strongest_and_ties_go_by_key() -> None:
    circuit = extract(influences(), features(), Selection("r", top_edges=3))
    assert sorted(circuit.edges["strength"].to_list()) == [3.0, 4.0, 5.0]
    tied = influences([("a", "c", 1.0), ("b", "c", 1.0), ("c", "f", 2.0), ("f", "y", 2.0)])
    assert extract(tied, features(), Selection("r", top_edges=3)).nodes["key"].to_list() == ["a", "c", "f", "y"]


def test_by_weight_lets_effects_of_changing_sign_cancel() -> None:
    edges = influences([("a", "c", 0.0), ("b", "c", 1.0), ("c", "y", 1.0)], {("a", "c"): 2.0})
    by_abs = extract(edges, features(), Selection("r", threshold=0.5, by=By.ABS_WEIGHT))
    by_weight = extract(edges, features(), Selection("r", threshold=0.5, by=By.WEIGHT))
    assert set(by_abs.nodes["key"]) == {"a", "b", "c", "y"}
    assert set(by_weight.nodes["key"]) == {"b", "c", "y"}
    assert by_abs.nodes.filter(pl.col("key") == "a")["influence"].item() == pytest.approx(2 / 3)


def test_one_sequence_sums_positions_or_keeps_them() -> None:
    rows = [("a", "c", "s", 0, 1, 2.0), ("a", "c", "s", 1, 1, -0.5), ("c", "y", "s", 1, 2, 1.0), ("b", "c", "other", 0, 1, 9.0)]
    attributes = pl.DataFrame(rows, schema=["source", "target", "sequence", "src_pos", "dest_pos", "weight"], orient="row")
    summed = extract(attributes, features(), Selection("r", sequence="s"))
    assert summed.edges.select("source", "target", "src_pos", "weight").rows() == [("a", "c", -1, 1.5), ("c", "y", -1, 1.0)]
    kept = extract(attributes, features(), Selection("r", sequence="s", positions=True))
    assert kept.nodes.select("key", "pos").rows() == [("a", 0), ("a", 1), ("c", 1), ("y", 2)]
    assert kept.nodes["influence"].to_list() == pytest.approx([0.8, 0.2, 1.0, 1.0])


def test_the_first_path_is_the_one_whose_weakest_edge_is_strongest() -> None:
    """Of the paths to y: a-c-f-y has 3 as its weakest edge, a-d-f-y and b-c-f-y 1, a-e-f-y 0.25."""
    def first(edges: list[tuple[str, str, float]]) -> float | None:
        return first_path(Candidates.of(strengths(influences(edges), Selection("r")), features(), ["resid_0"]))

    assert first(EDGES) == 3.0
    assert first([edge for edge in EDGES if edge[:2] != ("a", "c")]) == 1.0
    assert first([edge for edge in EDGES if edge[:2] != ("f", "y")]) is None
    assert first([("a", "c", 0.0), ("c", "y", 1.0)]) is None  # an edge of strength 0 is none
    assert first([("a", "c", 0.12345), ("c", "y", 1.0)]) == 0.123


def test_errors_name_the_value_and_the_way_out() -> None:
    with pytest.raises(EmptyCircuit, match=r"threshold 50 .* strongest has 5; the first path is whole at --threshold 3, with the 3 strongest"):
        extract(influences(), features(), Selection("r", threshold=50.0))
    with pytest.raises(NoEdges, match=r"run 'r' has no edges"):
        extract(influences().clear(), features(), Selection("r"))


def test_roots_are_the_sites_nothing_enters() -> None:
    assert root_sites(influences(), features()) == ["resid_0"]
    late = extract(influences(), features(), Selection("r"), roots=["resid_1"])
    assert late.nodes.filter(pl.col("role") == "input")["key"].to_list() == ["c", "d", "e"]


def layered(seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Random graph of four sites with five nodes each; skipping edges too."""
    rng = np.random.default_rng(seed)
    sites = {f"n{layer}{i}": f"resid_{layer}" for layer in range(4) for i in range(5)} | {"y": "y"}
    pairs = [(u, v) for u, v in itertools.combinations(sites, 2) if sites[u] != sites[v] and rng.random() < 0.4]
    return influences([(u, v, float(rng.normal())) for u, v in pairs]), features(sites)


@pytest.mark.parametrize("rule", list(PathRule))
@pytest.mark.parametrize("seed", range(5))
def test_strongest_paths_equal_enumeration(seed: int, rule: PathRule) -> None:
    circuit = extract(*layered(seed), Selection("r", threshold=0.1))
    step = {(u, v): (share, strength) for u, v, share, strength in circuit.edges.select("source", "target", "share", "strength").iter_rows()}

    def scores(node: str) -> list[float]:
        """Scores of all paths from `node` to y."""
        if node == "y":
            return [1.0 if rule is PathRule.PRODUCT else np.inf]
        out = [(v, values) for (u, v), values in step.items() if u == node]
        return [share * s if rule is PathRule.PRODUCT else min(strength, s) for v, (share, strength) in out for s in scores(v)]

    inputs = circuit.nodes.filter(pl.col("role") == "input")["key"]
    expected = sorted((s for node in inputs for s in scores(node)), reverse=True)[:20]
    paths = strongest_paths(circuit, 20, rule=rule)
    assert [p.score for p in paths] == pytest.approx(expected)
    assert len({p.nodes for p in paths}) == len(paths)
    weight = {(u, v): w for u, v, w in circuit.edges.select("source", "target", "weight").iter_rows()}
    for path in paths:
        assert list(path.weights) == [weight[pair] for pair in itertools.pairwise(path.nodes)]
        assert path.nodes[-1] == "y"


@pytest.mark.parametrize("seed", range(5))
def test_inputs_share_all_of_the_output(seed: int) -> None:
    circuit = extract(*layered(seed), Selection("r"))
    assert circuit.nodes.filter(pl.col("role") == "input")["influence"].sum() == pytest.approx(1.0)
    shares = circuit.edges.group_by("target").agg(pl.col("share").sum())["share"]
    assert shares.to_list() == pytest.approx([1.0] * shares.len())
    paths = strongest_paths(circuit, 10_000)
    assert sum(p.score for p in paths) == pytest.approx(1.0)


def test_key_depends_on_content_only() -> None:
    edges, nodes = layered(1)
    circuit = extract(edges, nodes, Selection("r", threshold=0.2))
    again = extract(edges.sample(fraction=1.0, shuffle=True, seed=3), nodes.sample(fraction=1.0, shuffle=True, seed=4), Selection("r", threshold=0.2))
    assert circuit.key == again.key
    assert circuit.edges.equals(again.edges)
    assert circuit.nodes.equals(again.nodes)
    assert circuit.key != extract(edges, nodes, Selection("r", threshold=0.5)).key


def test_top_nodes_orders_by_influence() -> None:
    top = top_nodes(extract(influences(), features(), Selection("r")), 2)
    assert top["key"].to_list() == ["f", "a"]
    assert top.select("in_strength", "out_strength", "n_in", "n_out").rows() == [(3.25, 5.0, 3, 1), (0.0, 5.5, 0, 3)]


def stored_graph(folder: Path) -> GraphStore:
    """The small graph of this file, in a real embedded store, as the ingest job leaves it."""
    store = open_graph(folder)
    store.merge_nodes("Model", pl.DataFrame({"key": ["m@1"], "name": ["m"]}))
    run = {"key": "run-r", "model": "m@1", "task": "t", "metric": "kl", "dictionaries": '{"resid_0": "d"}'}
    store.merge_nodes("Run", pl.DataFrame([run]))
    nodes = features().with_columns(pl.lit("m@1").alias("model"), pl.lit("d").alias("dictionary"), pl.lit(-1).alias("index"))
    store.merge_nodes("Feature", nodes)
    store.merge_edges("INFLUENCES", influences().with_columns(pl.lit("run-r").alias("run")))
    return store


def test_written_circuit_is_read_back_and_writing_twice_changes_nothing(tmp_path: Path) -> None:
    with stored_graph(tmp_path) as store:
        run = find_run(store)
        assert (run.key, run.task, run.metric, run.dictionaries) == ("run-r", "t", "kl", {"resid_0": "d"})
        known = model_features(store, run.model)
        assert sorted(known["key"]) == sorted(SITES)
        edges = store.read_edges("INFLUENCES", run=run.key)
        circuit = extract(edges, known, Selection(run.key, threshold=1.0))
        assert circuit.nodes["key"].to_list() == ["a", "b", "c", "d", "f", "y"]
        for _ in range(2):
            key = write_circuit(store, circuit)
            node = store.query("MATCH (c:Circuit)-[:OF_RUN]->(r:Run) RETURN c.key AS key, r.key AS run, c.n_nodes AS n, c.n_edges AS m, c.by AS by")
            assert node.rows() == [(key, "run-r", 6, 6, "abs_weight")]
            roles = store.query("MATCH (f:Feature)-[i:IN_CIRCUIT]->(:Circuit) RETURN f.key AS key, i.role AS role ORDER BY key")
            assert roles.rows() == [("a", "input"), ("b", "input"), ("c", "inner"), ("d", "inner"), ("f", "inner"), ("y", "output")]
            written = store.read_edges("CIRCUIT_EDGE").select("source", "target", "weight").sort("source", "target")
            assert written.equals(circuit.edges.select("source", "target", "weight").sort("source", "target"))
        with pytest.raises(UnknownRun, match=r"no run 'zz' in the graph: its runs are run-r \(t, "):
            find_run(store, "zz")
        assert find_run(store, "run").key == "run-r"


def test_runs_of_an_empty_graph(tmp_path: Path) -> None:
    with open_graph(tmp_path) as store, pytest.raises(UnknownRun, match="no runs yet"):
        find_run(store)


@pytest.mark.slow
def test_a_hundred_thousand_edges_take_seconds() -> None:
    rng = np.random.default_rng(0)
    sites = {f"{layer:02d}-{i}": f"resid_{layer}" for layer in range(10) for i in range(500)} | {"y": "y"}
    layer = rng.integers(0, 9, 100_000)
    source = [f"{a:02d}-{i}" for a, i in zip(layer, rng.integers(0, 500, 100_000))]
    target = [f"{a + 1:02d}-{i}" for a, i in zip(layer, rng.integers(0, 500, 100_000))]
    last = [(f"09-{i}", "y", 1.0) for i in range(500)]
    edges = influences([*zip(source, target, rng.normal(size=100_000).tolist()), *last]).unique(["source", "target"])
    circuit = extract(edges, features(sites), Selection("r"))
    assert circuit.n_nodes == 5001
    paths = strongest_paths(circuit, 10)
    assert len(paths) == 10
    assert all(len(p.nodes) == 11 for p in paths)


def test_a_long_chain_is_pruned_in_one_visit_of_each_edge_and_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 20_000
    keys = [f"n{i:05}" for i in range(n)]
    sites = {key: f"resid_{i}" for i, key in enumerate(keys)} | {"y": "y"}
    chain = pl.DataFrame({"source": keys, "target": [*keys[1:], "y"], "src_pos": -1, "dest_pos": -1, "weight": 1.0, "strength": 1.0})
    nodes = pl.DataFrame({"key": list(sites), "site": list(sites.values())}).with_columns(layer=pl.lit(0), kind=pl.lit("feature"), index=pl.lit(0))
    candidates = Candidates.of(chain, nodes, ["resid_0"])
    visited: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(np, name)

        class minimum:
            @staticmethod
            def at(into: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
                visited.append(len(places))
                np.minimum.at(into, places, values)

    monkeypatch.setattr("featlas.analysis.circuits.np", Counting())
    whole = candidates.entries(np.zeros(n))
    assert np.isfinite(whole).all()
    assert sum(visited) == 2 * n
    cut = candidates.entries(np.where(np.arange(n) == n // 2, np.inf, 0.0))  # one edge less, and nothing is on a path
    assert np.isinf(cut).all()
    assert sum(visited) == 4 * n


@pytest.mark.parametrize("seed", range(4))
def test_a_sweep_is_the_same_as_cutting_every_size_alone(seed: int) -> None:
    edges, nodes = layered(seed)
    rows = strengths(edges, Selection("r"))
    sizes = [0, 1, 5, 10, 20, 35, 50, rows.height, 10 * rows.height]
    candidates = Candidates.of(rows, nodes, root_sites(rows, nodes))
    found = nested(candidates, Selection("r"), sizes)
    assert [circuit.selection.top_edges for circuit in found] == sizes
    for size, circuit in zip(sizes, found, strict=True):
        try:
            alone = extract(edges, nodes, Selection("r", top_edges=size), roots=candidates.roots)
        except EmptyCircuit:
            assert (circuit.n_nodes, circuit.n_edges) == (0, 0)
            continue
        assert circuit.key == alone.key
        assert circuit.edges.equals(alone.edges)
        assert circuit.nodes.equals(alone.nodes)
    assert any(circuit.n_edges == 0 for circuit in found)


def test_edges_of_other_nodes_or_against_the_order_are_refused() -> None:
    with pytest.raises(UnknownNodes, match=r"1 of 8 nodes .* 'zz'"):
        extract(influences([*EDGES, ("zz", "c", 1.0)]), features(), Selection("r"))
    with pytest.raises(BackwardEdge, match="'f' -> 'c'"):
        extract(influences([*EDGES, ("f", "c", 1.0)]), features(), Selection("r"))


def made(edges: list[tuple[str, str, float]]) -> Circuit:
    return extract(influences(edges), features(), Selection("r"), roots=["resid_0"])


def weights(circuit: Circuit) -> dict[tuple[str, str], float]:
    return {(u, v): w for u, v, w in circuit.edges.select("source", "target", "weight").iter_rows()}


def test_union_intersection_difference_by_hand() -> None:
    left = made([("a", "c", 3.0), ("c", "f", 4.0), ("f", "y", 5.0)])
    right = made([("a", "d", 2.0), ("d", "f", -1.0), ("a", "c", 9.0), ("c", "f", 7.0), ("f", "y", 6.0)])
    assert weights(combine(Operation.UNION, [left, right])) == {
        ("a", "c"): 3.0, ("c", "f"): 4.0, ("f", "y"): 5.0, ("a", "d"): 2.0, ("d", "f"): -1.0,
    }  # fmt: skip
    assert weights(combine(Operation.INTERSECTION, [right, left])) == {("a", "c"): 9.0, ("c", "f"): 7.0, ("f", "y"): 6.0}
    rest = combine(Operation.DIFFERENCE, [right, left], pruned=False)
    assert weights(rest) == {("a", "d"): 2.0, ("d", "f"): -1.0}
    assert dict(rest.nodes.select("key", "role").iter_rows()) == {"a": "input", "d": "inner", "f": "inner"}
    assert combine(Operation.DIFFERENCE, [right, left]).n_edges == 0  # y is not reached
    three = combine(Operation.INTERSECTION, [left, right, made([("a", "c", 1.0), ("c", "f", 1.0), ("f", "y", 1.0), ("b", "c", 1.0)])])
    assert three.n_edges == 3
    assert three.selection.description.startswith(f"intersection of {left.key}, {right.key}")
    with pytest.raises(NotCombined, match="two or more"):
        combine(Operation.UNION, [left])


@pytest.mark.parametrize("seed", range(3))
def test_set_operations_are_those_of_sets(seed: int) -> None:
    edges, nodes = layered(seed)
    parts = [extract(edges.sample(fraction=0.8, seed=s), nodes, Selection("r"), roots=["resid_0"]) for s in range(3)]
    sets = [set(weights(part)) for part in parts]
    for operation, expected in ((Operation.UNION, sets[0] | sets[1] | sets[2]), (Operation.INTERSECTION, sets[0] & sets[1] & sets[2]),
                                (Operation.DIFFERENCE, sets[0] - sets[1] - sets[2])):  # fmt: skip
        assert set(weights(combine(operation, parts, pruned=False))) == expected


def test_edges_and_nodes_by_hand(tmp_path: Path) -> None:
    rows = strengths(influences(), Selection("r"))
    folder = tmp_path / "by[hand]*"  # which is no pattern
    folder.mkdir()
    file = folder / "edges.csv"
    file.write_text("source,target,weight\na,c,\nc,f,\nf,y,\na,d,0.5\n")
    by_edges = chosen(rows, features(), file_choice(file), Selection("r"), ["resid_0"])
    assert weights(by_edges) == {("a", "c"): 3.0, ("c", "f"): 4.0, ("f", "y"): 5.0}  # d leads nowhere
    unpruned = chosen(rows, features(), file_choice(file), Selection("r", pruned=False), ["resid_0"])
    assert weights(unpruned)["a", "d"] == 0.5
    assert unpruned.selection.description == "file edges.csv; not pruned"
    lines = folder / "nodes.jsonl"
    lines.write_text('{"key": "a"}\n{"key": "c"}\n{"key": "d"}\n{"key": "f"}\n')
    by_nodes = chosen(rows, features(), file_choice(lines), Selection("r"), ["resid_0"])
    assert set(weights(by_nodes)) == {("a", "c"), ("c", "f"), ("f", "y"), ("a", "d"), ("d", "f")}
    not_measured = Choice(pl.DataFrame({"source": ["b", "d", "f"], "target": ["d", "f", "y"]}), "by hand")
    assert weights(chosen(rows, features(), not_measured, Selection("r"), ["resid_0"])) == {("b", "d"): 0.0, ("d", "f"): -1.0, ("f", "y"): 5.0}
    for frame, said in (({"x": ["a"]}, "name neither edges"), ({"key": []}, "no rows"), ({"key": [1]}, "column key must hold keys")):
        with pytest.raises(NotAChoice, match=said):
            Choice(pl.DataFrame(frame), "by hand")
    with pytest.raises(UnknownNodes, match="'zz'"):
        chosen(rows, features(), Choice(pl.DataFrame({"key": ["a", "zz"]}), "by hand"), Selection("r"), ["resid_0"])
    with pytest.raises(NotAChoice, match=r"none\.csv cannot be read"):
        file_choice(tmp_path / "none.csv")
    (tmp_path / "bad.jsonl").write_text("not json")
    with pytest.raises(NotAChoice, match="no CSV file"):
        file_choice(tmp_path / "bad.jsonl")


def test_positions_by_hand() -> None:
    rows = [("a", "c", "s", 0, 1, 2.0), ("a", "c", "s", 1, 1, -0.5), ("c", "y", "s", 1, 2, 1.0)]
    attributes = pl.DataFrame(rows, schema=["source", "target", "sequence", "src_pos", "dest_pos", "weight"], orient="row")
    selection = Selection("r", sequence="s", positions=True)
    measured = strengths(attributes, selection)
    given = pl.DataFrame({"source": ["a", "c"], "target": ["c", "y"], "src_pos": [1, 1], "dest_pos": [1, 2]})
    kept = chosen(measured, features(), Choice(given, "by hand"), selection, ["resid_0"])
    assert kept.edges.select("source", "src_pos", "weight").rows() == [("a", 1, -0.5), ("c", 1, 1.0)]
    at = chosen(measured, features(), Choice(pl.DataFrame({"key": ["a", "c"], "pos": [0, 1]}), "by hand"), selection, ["resid_0"])
    assert at.edges.select("source", "src_pos", "weight").rows() == [("a", 0, 2.0), ("c", 1, 1.0)]
    with pytest.raises(NotAChoice, match="--positions need"):
        chosen(measured, features(), Choice(given.select("source", "target"), "by hand"), selection, ["resid_0"])
    with pytest.raises(NotCombined, match="positions apart"):
        combine(Operation.UNION, [kept, made(EDGES)])


def test_only_the_edges_that_are_kept_are_read_and_the_circuit_is_that_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stored_graph(tmp_path) as store:
        store.query("MATCH (r:Run) SET r.settings = $settings", {"settings": '{"roots": ["resid_0"]}'}, write=True)
        run = find_run(store)
        everything, known, roots = store.read_edges("INFLUENCES", run=run.key), model_features(store, run.model), ["resid_0"]
        whole = Mock(side_effect=AssertionError("every edge was read"))
        for by in By:
            for selection in (Selection(run.key, 1.0, by), Selection(run.key, 3.0, by), Selection(run.key, 0.3, by, top_edges=3)):
                expected = extract(everything, known, selection, roots=roots)
                with monkeypatch.context() as patched:
                    patched.setattr(type(store), "_read_edges", whole)
                    found = run_circuit(store, run, selection)
                    cut = cut_effects(store, run, selection)
                assert found.edges.equals(expected.edges)
                assert found.key == expected.key
                assert cut.height == select(strengths(everything, selection), selection).height
            for n_edges in (3, 4, 7, 8, 100):
                rows = strengths(everything, Selection(run.key, by=by))
                expected = extract(everything, known, Selection(run.key, threshold_for(rows, n_edges), by), roots=roots)
                assert run_circuit(store, run, Selection(run.key, by=by), n_edges=n_edges).edges.equals(expected.edges)
        first = run_circuit(store, run, Selection(run.key), n_edges=1)  # f -> y alone is no path from an input
        assert (first.selection.threshold, first.n_edges) == (3.0, 3)
        with pytest.raises(EmptyCircuit, match=r"first path is whole at --threshold 3,"):
            run_circuit(store, run, Selection(run.key, 4.5))


def mixture(folder: Path) -> GraphStore:
    """The small graph with two tasks of two sequences each, as the ingest job leaves it."""
    store = stored_graph(folder)
    store.merge_nodes("Sequence", pl.DataFrame({"key": ["s1", "s2", "t1", "t2"], "task": ["one", "one", "two", "two"]}))
    rows = {
        "s1": [("a", "c", 0, 1, 2.0), ("a", "c", 1, 1, -0.5), ("c", "f", 1, 1, 1.0), ("f", "y", 1, 1, 3.0)], "s2": [("a", "c", 0, 0, -1.0)],
        "t1": [("b", "c", 0, 1, 4.0), ("c", "f", 1, 1, -2.0), ("f", "y", 1, 1, 1.0)], "t2": [("c", "f", 0, 0, 1.0), ("f", "y", 1, 1, 1.0)],
    }  # fmt: skip
    for key, edges in rows.items():
        store.commit_sequence("run-r", key, pl.DataFrame(edges, schema=["source", "target", "src_pos", "dest_pos", "weight"], orient="row"), {})
    return store


def test_circuit_of_a_task_is_aggregated_over_its_sequences_only(tmp_path: Path) -> None:
    with mixture(tmp_path) as store:
        run = find_run(store)
        one = run_circuit(store, run, Selection(run.key, task="one"))
        # positions are summed within a sequence first: a -> c is 1.5 in s1 and -1 in s2; an edge that s2 lacks counts 0
        assert weights(one) == {("a", "c"): 0.25, ("c", "f"): 0.5, ("f", "y"): 1.5}
        assert dict(zip(weights(one), one.edges["strength"])) == {("a", "c"): 1.25, ("c", "f"): 0.5, ("f", "y"): 1.5}
        two = run_circuit(store, run, Selection(run.key, task="two"))
        assert weights(two) == {("b", "c"): 2.0, ("c", "f"): -0.5, ("f", "y"): 1.0}
        some = run_circuit(store, run, Selection(run.key, sequences=("s1", "t1")))
        assert weights(some) == {("a", "c"): 0.75, ("b", "c"): 2.0, ("c", "f"): -0.5, ("f", "y"): 2.0}
        of_both = run_circuit(store, run, Selection(run.key, task="one", sequences=("s1",)))
        assert weights(of_both) == {("a", "c"): 1.5, ("c", "f"): 1.0, ("f", "y"): 3.0}
        assert len({circuit.key for circuit in (one, two, some)}) == 3
        assert run_candidates(store, run, Selection(run.key, task="one")).edges.height == 3
        for selection, error, said in (
            (Selection(run.key, task="three"), UnknownTask, r"of task 'three': its tasks are one, two"),
            (Selection(run.key, task="one", sequences=("t1",)), UnknownTask, "'t1' is not of task 'one'"),
            (Selection(run.key, sequences=("s1", "zz")), SequenceNotDone, r"1 of 2 sequences, among them 'zz'"),
            (Selection(run.key, sequences=()), SequenceNotDone, "no sequence at all"),
        ):
            with pytest.raises(error, match=said):
                run_circuit(store, run, selection)


@pytest.mark.slow
def test_circuits_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    with mixture(tmp_path) as store:
        run = find_run(store)
        one, two = (run_circuit(store, run, Selection(run.key, task=task)) for task in ("one", "two"))
        kept = run_circuit(store, run, Selection(run.key, sequence="s1", positions=True))
        cut = run_circuit(store, run, Selection(run.key, sequences=("s1", "t1"), threshold=0.6))
        both = combine(Operation.UNION, [one, two])
        loose = combine(Operation.DIFFERENCE, [one, two], pruned=False)
        for circuit in (one, two, kept, cut, both, loose):
            key = write_circuit(store, circuit)
            assert key == circuit.key
            read = read_circuit(store, key[:10])
            assert read.key == key
            assert read.selection == circuit.selection
            assert read.edges.equals(circuit.edges)
            assert read.nodes.select(circuit.nodes.columns).equals(circuit.nodes.cast({"index": read.nodes.schema["index"]}, strict=False))
        node = store.query("MATCH (c:Circuit) WHERE c.key = $key RETURN c.task AS task, c.description AS text", {"key": one.key})
        assert node.rows() == [("one", "task 'one' of run 'run-r': edges with abs_weight >= 0")]
        assert combine_stored(store, Operation.UNION, [one.key, two.key[:8]]).key == both.key
        with pytest.raises(EmptyCircuit, match="--no-prune keeps"):
            combine_stored(store, Operation.DIFFERENCE, [one.key, two.key])
        with pytest.raises(UnknownCircuit, match=r"no circuit 'zz' in the graph: its circuits are .* edges; "):
            read_circuit(store, "zz")
        with pytest.raises(UnknownCircuit, match="is not unique"):
            read_circuit(store, "")
        store.query("MATCH (:Feature)-[e:CIRCUIT_EDGE]->(:Feature) WHERE e.circuit = $key DELETE e", {"key": both.key}, write=True)
        with pytest.raises(NotRestored, match="0 edges are left of 4"):
            read_circuit(store, both.key)
        named = "MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature) WHERE e.abs_weight >= 3 RETURN a.key AS source, b.key AS target"
        asked = chosen_from(store, run, query_choice(store, named), Selection(run.key))
        assert set(weights(asked)) == {("a", "c"), ("c", "f"), ("f", "y")}
        with pytest.raises(EmptyCircuit, match="leave no path"):
            chosen_from(store, run, Choice(pl.DataFrame({"source": ["a"], "target": ["c"]}), "by hand"), Selection(run.key))


def test_circuits_of_an_older_graph_are_read_by_their_properties(tmp_path: Path) -> None:
    with stored_graph(tmp_path) as store:
        circuit = extract(influences(), features(), Selection("run-r", threshold=1.0))
        node = {"key": "old", "run": "run-r", "threshold": 1.0, "by": "abs_weight", "n_nodes": circuit.n_nodes, "n_edges": circuit.n_edges}
        store.merge_nodes("Circuit", pl.DataFrame([node]))
        members = circuit.nodes.select(pl.col("key").alias("source"), pl.lit("old").alias("target"), "role")
        store.merge_edges("IN_CIRCUIT", members)
        store.merge_edges("CIRCUIT_EDGE", circuit.edges.select("source", "target", "weight", pl.lit("old").alias("circuit")))
        read = read_circuit(store, "old")
        assert weights(read) == weights(circuit)
        assert read.selection == Selection("run-r", 1.0)
