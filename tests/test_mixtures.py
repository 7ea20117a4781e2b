"""Mixtures of tasks: their parts as sets of edges and nodes, planted and found, the random ones like them, and every number of the table."""


import numpy as np
import polars as pl
import pytest
from featlas.analysis import mixtures
from featlas.analysis.circuits import Candidates, Circuit, Selection
from featlas.analysis.mixtures import NOTHING, Mixture, MixtureOptions, OneTask, overlap, removals, run_mixture, task_parts
from featlas.analysis.study import Ablation, Study, StudyOptions, found_pairs, held_out_pairs, open_study
from featlas.errors import UserError
from featlas.model.ablation import ablate_edges, ablate_nodes
from featlas.model.masks import EdgeSet, NodeSet
from featlas.model.metrics import Metric
from featlas.queries.store import GraphStore
from featlas.queries.subgraphs import find_run

from .study_atlas import TinyAtlas

FEW = MixtureOptions(edges=150, held_out=6, control_draws=2)


@pytest.fixture(scope="module")
def study(store: GraphStore, tiny: TinyAtlas) -> Study:
    return open_study(store, find_run(store, tiny.runs["main"]), StudyOptions(metrics=(Metric.LOGIT_DIFF,)), tiny.atlas)


# --- planted ----------------------------------------------------------------------------------------------------------


def planted(*edges: tuple[str, str]) -> Candidates:
    """Edges between in (inputs), mid and y, a letter naming each node's site."""
    sites = {"i": ("embed", -1), "m": ("resid_0", 0), "y": ("y", 1)}
    nodes = sorted({end for edge in edges for end in edge})
    rows = [(key, *sites[key[0]], "output" if key == "y" else "feature", i) for i, key in enumerate(nodes)]
    features = pl.DataFrame(rows, schema=["key", "site", "layer", "kind", "index"], orient="row")
    ends = pl.DataFrame([{"source": u, "target": d, "src_pos": -1, "dest_pos": -1, "weight": 1.0, "strength": 1.0} for u, d in edges])
    return Candidates.of(ends, features, ["embed"])


def circuit(*edges: tuple[str, str]) -> Circuit:
    candidates = planted(*edges)
    return candidates.circuit(np.ones(candidates.edges.height, dtype=bool), Selection("r"))


def edges_of(one: Circuit) -> set[tuple[str, str]]:
    return set(one.edges.select("source", "target").iter_rows())


def nodes_of(one: Circuit) -> set[str]:
    return set(one.nodes.filter(pl.col("role") != "output")["key"])


def test_parts_of_two_planted_circuits() -> None:
    common = [("i1", "m1"), ("m1", "y")]
    even, odd = circuit(*common, ("i2", "m1"), ("i2", "m2"), ("m2", "y")), circuit(*common, ("i1", "m3"), ("m3", "y"))
    pool = planted(*[(f"i{i}", f"m{j}") for i in range(1, 5) for j in range(1, 6)], *[(f"m{j}", "y") for j in range(1, 6)])
    parts = removals({"even": even, "odd": odd}, pool, MixtureOptions(control_draws=2))
    by_name = {(part.name, part.ablation, part.draw): part for part in parts}
    named = {name: edges_of(by_name[name, Ablation.EDGE, 0].circuit) for name in ("only even", "only odd", "shared")}
    assert named == {
        "only even": {("i2", "m1"), ("i2", "m2"), ("m2", "y")}, "only odd": {("i1", "m3"), ("m3", "y")}, "shared": {("i1", "m1"), ("m1", "y")},
    }  # fmt: skip
    nodes = {name: nodes_of(by_name[name, Ablation.NODE, 0].circuit) for name in ("only even", "only odd", "shared")}
    assert nodes == {"only even": {"i2", "m2"}, "only odd": {"m3"}, "shared": {"i1", "m1"}}
    for name in named:
        for draw in range(2):
            edges, drawn = by_name[f"random like {name}", Ablation.EDGE, draw], by_name[f"random like {name}", Ablation.NODE, draw]
            assert edges.size == len(named[name])
            assert drawn.size == len(nodes[name])
            of_sites = lambda pairs: sorted((u[0], d[0]) for u, d in pairs)
            assert of_sites(edges_of(edges.circuit)) == of_sites(named[name])
            assert sorted(key[0] for key in nodes_of(drawn.circuit)) == sorted(key[0] for key in nodes[name])
    drawn = [edges_of(by_name["random like only even", Ablation.EDGE, draw].circuit) for draw in range(2)]
    assert drawn[0] != drawn[1]


def test_a_part_without_anything_is_left_out() -> None:
    one = circuit(("i1", "m1"), ("m1", "y"))
    two = circuit(("i1", "m1"), ("m1", "y"), ("i2", "m1"))
    parts = removals({"a": one, "b": two}, planted(("i1", "m1"), ("m1", "y"), ("i2", "m1")), MixtureOptions(control_draws=1))
    assert {part.name for part in parts if part.ablation is Ablation.EDGE and not part.name.startswith("random")} == {"only b", "shared"}


def test_overlap_is_jaccards_index() -> None:
    table = overlap({"a": circuit(("i1", "m1"), ("m1", "y")), "b": circuit(("i1", "m1"), ("m1", "y"), ("i2", "m1"))})
    rows = {(row["task"], row["other"]): row for row in table.to_dicts()}
    assert (rows["a", "b"]["shared_edges"], rows["a", "b"]["edge_jaccard"]) == (2, pytest.approx(2 / 3))
    assert (rows["a", "b"]["shared_nodes"], rows["a", "b"]["node_jaccard"]) == (3, pytest.approx(3 / 4))
    assert rows["a", "a"]["edge_jaccard"] == rows["b", "b"]["node_jaccard"] == 1


# --- measured ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(store: GraphStore, study: Study) -> Mixture:
    return run_mixture(store, study, FEW)


def test_every_task_without_every_part(store, study, mixture) -> None:
    assert mixture.tasks == ("even", "odd")
    circuits, candidates = task_parts(store, study, FEW)
    parts = {(part.name, part.ablation): part for part in removals(circuits, candidates, FEW) if not part.draw}
    assert {"only even", "only odd", "shared"} <= {name for name, _ in parts}
    tested = held_out_pairs(study, found_pairs(store, study.run), FEW.held_out)
    assert mixture.n_tested == len(tested) == 6
    (batch,) = study.batches([pair for pair in tested if len(pair.clean.split()) == 5], 0)
    for (name, ablation), part in parts.items():
        if name.startswith("random"):
            continue
        # What is cut, straight from the graph's own numbers.
        if ablation is Ablation.EDGE:
            known = part.circuit.nodes.select("key", "site", "kind", "index")
            ends = [part.circuit.edges.join(known.rename({"key": end}), on=end, maintain_order="left") for end in ("source", "target")]
            numbers = [[-1 if k == "error" else 0 if k == "output" else i for k, i in rows.select("kind", "index").iter_rows()] for rows in ends]
            mask = EdgeSet.of(study.graph, ends[0]["site"].to_list(), numbers[0], ends[1]["site"].to_list(), numbers[1]).inverse()
            left = ablate_edges(batch, [mask])
        else:
            rows = part.circuit.nodes
            numbers = [-1 if k == "error" else i for k, i in rows.select("kind", "index").iter_rows()]
            left = ablate_nodes(batch, [NodeSet.of(study.graph, rows["site"].to_list(), numbers).inverse()])
        expected = batch.measure(left, Metric.LOGIT_DIFF)[0].tolist()
        for pair, value in zip(batch.pairs.pairs, expected, strict=True):
            own = mixture.values.filter(method=name, ablation=ablation.value, sequence=pair.key, metric="logit_diff")
            assert own["value"].to_list() == [pytest.approx(value, abs=5e-5)]  # of logits, in float32


def test_the_table_is_ratios_and_means_of_the_values(mixture) -> None:
    rows = mixture.table.to_dicts()
    assert {row["quantity"] for row in rows} == {"retained", "logit_diff", "accuracy"}
    for row in rows:
        own = mixture.values.filter(task=row["task"], ablation=row["ablation"])
        if row["removed"] == NOTHING:
            expected = own.filter(metric=row["quantity"])["full"].mean() if row["quantity"] != "retained" else 1.0
        elif row["quantity"] != "retained":
            expected = own.filter(method=row["removed"], metric=row["quantity"])["value"].mean()
        else:
            value, full, empty = own.filter(method=row["removed"], metric="logit_diff").select("value", "full", "empty").mean().row(0)
            expected = (value - empty) / (full - empty)
        if row["value"] is not None:  # the few sequences may not tell whether the task has an effect
            assert row["value"] == pytest.approx(expected, abs=1e-6), row
        assert row["n"] == own["sequence"].n_unique() == 3


def test_it_is_the_same_measured_again(store, study, mixture) -> None:
    assert run_mixture(store, study, FEW).values.equals(mixture.values)


def test_one_task_has_no_parts(store, study, monkeypatch) -> None:
    one = [pair for pair in found_pairs(store, study.run) if pair.task == "odd"]
    monkeypatch.setattr(mixtures, "found_pairs", lambda *_: one)
    with pytest.raises(OneTask, match="the one task odd: ingest a mixture"):
        task_parts(store, study, FEW)


@pytest.mark.parametrize("name", ["edges", "held_out", "control_draws"])
def test_numbers_out_of_range(name) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} 0 is too small"):
        MixtureOptions(**{name: 0}).check()
