"""Sweeps on a tiny model: grids and circuits against cutting each alone, what was found on half against sums by hand, controls, areas."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from featlas.analysis.circuits import By, Candidates, Circuit, EmptyCircuit, Selection, UnknownTask, extract, read_circuit, run_circuit, write_circuit
from featlas.analysis.controls import Method
from featlas.analysis.faithfulness import ATTRIBUTION, FOUND, HELD_OUT, Averaging
from featlas.analysis.study import Ablation, Split, Study, StudyOptions, found_pairs, open_study
from featlas.analysis.sweeps import (
    PER_SEQUENCE,
    SHARES,
    BadGrid,
    Sweep,
    SweepOptions,
    SweepPlan,
    control_contenders,
    own_contenders,
    plan_sweep,
    run_sweep,
    subject_of,
)
from featlas.model.baselines import Baseline
from featlas.model.metrics import Metric
from featlas.queries.store import GraphStore, open_graph
from featlas.queries.subgraphs import find_run, model_features
from polars.testing import assert_frame_equal

from .study_atlas import N_FOUND, TinyAtlas

METHODS = (Method.RANDOM_EDGES, Method.SHUFFLED_WEIGHTS, Method.RANDOM_NODES)
ENDS = ["source", "target"]


@pytest.fixture(scope="module")
def store(tiny: TinyAtlas, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GraphStore]:
    with open_graph(tiny.copied(tmp_path_factory.mktemp("sweeps"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def study(store: GraphStore, tiny: TinyAtlas) -> Study:
    return open_study(store, find_run(store, tiny.runs["main"]), StudyOptions(metrics=(Metric.LOGIT_DIFF, Metric.ACCURACY)), tiny.atlas)


@pytest.fixture(scope="module")
def identity(store: GraphStore, tiny: TinyAtlas) -> Study:
    return open_study(store, find_run(store, tiny.runs["identity"]), StudyOptions(metrics=(Metric.LOGIT_DIFF, Metric.KL)), tiny.atlas)


def influences(store: GraphStore, study: Study) -> pl.DataFrame:
    return store.read_edges("INFLUENCES", run=study.run.key)


# --- grids and circuits -----------------------------------------------------------------------------------------------


def test_sizes_are_numbers_of_candidates_and_circuits_those_cut_alone(store, study) -> None:
    every, features = influences(store, study), model_features(store, study.run.model)
    n = every.filter(pl.col("abs_weight") > 0).height
    plan = plan_sweep(store, study, SweepOptions(sizes=(10_000, 120, 0, 60, 120), held_out=2))
    assert plan.sizes == (0, 60, 120, n)
    assert plan.circuits[0].n_edges == 0
    for size, circuit in zip(plan.sizes[1:], plan.circuits[1:], strict=True):
        alone = extract(every, features, Selection(study.run.key, top_edges=size), roots=["embed"])
        assert_frame_equal(circuit.edges, alone.edges)
        assert circuit.key == alone.key
        assert plan.threshold(size) == pytest.approx(sorted(every["abs_weight"], reverse=True)[size - 1])
    assert plan.threshold(0) is None
    assert plan.subject == study.run.key
    assert (plan.split, len(plan.found), len(plan.tested)) == (HELD_OUT, N_FOUND, 2)


def test_shares_and_thresholds(store, study) -> None:
    every = influences(store, study)
    n = every.height
    assert plan_sweep(store, study, SweepOptions(shares=(0, 0.25, 1), held_out=1)).sizes == (0, round(n / 4), n)
    assert plan_sweep(store, study, SweepOptions(held_out=1)).sizes == tuple(sorted({max(1, round(share * n)) for share in SHARES}))
    strengths = every["abs_weight"].to_numpy()
    at = tuple(float(x) for x in np.quantile(strengths, (0.3, 0.6)))
    assert plan_sweep(store, study, SweepOptions(thresholds=at, held_out=1)).sizes == tuple(sorted(int((strengths >= x).sum()) for x in at))
    signed = plan_sweep(store, study, SweepOptions(sizes=(80,), by=By.WEIGHT, held_out=1))
    kept = every.sort(pl.col("weight").abs(), descending=True).head(80)
    assert signed.circuits[0].edges.join(kept, on=ENDS, how="anti").is_empty()
    assert signed.subject == subject_of(Selection(study.run.key, by=By.WEIGHT)) != study.run.key


def test_candidates_are_the_strongest(store, study) -> None:
    plan = plan_sweep(store, study, SweepOptions(shares=(0.5, 1), candidates=100, held_out=1))
    strongest = influences(store, study).sort("abs_weight", descending=True).head(100)
    assert plan.sizes == (50, 100)
    assert plan.candidates.edges.height == 100
    assert plan.candidates.edges.join(strongest, on=ENDS, how="anti").is_empty()
    whole = plan_sweep(store, study, SweepOptions(sizes=(50,), held_out=1))
    assert whole.circuits[0].key == plan.circuits[0].key


def test_halves_find_on_one_half_alone(store, study) -> None:
    plan = plan_sweep(store, study, SweepOptions(sizes=(60, 150), split=Split.HALVES))
    assert (len(plan.found), len(plan.tested), plan.split) == (4, 4, HELD_OUT)
    found = {pair.key for pair in plan.found}
    assert not found & {pair.key for pair in plan.tested}
    # The mean over the half of each sequence's |effect|, positions summed within a sequence; an absent edge counts 0.
    sums: dict[tuple[str, str, str], float] = {}
    for row in store.read_edges("ATTRIBUTES", run=study.run.key).iter_rows(named=True):
        if row["sequence"] in found:
            edge = (row["source"], row["target"], row["sequence"])
            sums[edge] = sums.get(edge, 0.0) + row["weight"]
    by_edge: dict[tuple[str, str], float] = {}
    for (source, target, _), value in sums.items():
        by_edge[source, target] = by_edge.get((source, target), 0.0) + abs(value) / len(found)
    ours = {row[:2]: row[2] for row in plan.candidates.edges.select(*ENDS, "strength").iter_rows()}
    assert ours == pytest.approx(by_edge)
    strongest = sorted(by_edge, key=by_edge.__getitem__, reverse=True)[:60]
    assert {row[:2] for row in plan.circuits[0].edges.select(ENDS).iter_rows()} <= set(strongest)
    assert plan.subject != study.run.key


def test_one_task_of_a_mixture(store, study) -> None:
    plan = plan_sweep(store, study, SweepOptions(sizes=(150,), task="odd", held_out=3))
    assert {pair.task for pair in (*plan.found, *plan.tested)} == {"odd"}
    assert (len(plan.found), len(plan.tested)) == (4, 3)
    assert plan.circuits[0].selection.task == "odd"
    with pytest.raises(UnknownTask, match=r"is of task 'ioi': its tasks are even, odd"):
        plan_sweep(store, study, SweepOptions(sizes=(150,), task="ioi"))


def test_a_grid_without_a_path_is_refused(store, study) -> None:
    with pytest.raises(EmptyCircuit, match=r"no circuit of 1 candidate edges leaves a path .* take more of the \d+"):
        plan_sweep(store, study, SweepOptions(sizes=(1,), held_out=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (1,), "shares": (0.5,)}, "--sizes and --shares are two grids"), ({"sizes": ()}, "--sizes is empty"),
        ({"shares": (0.1, 1.5)}, "--shares 1.5"), ({"sizes": (-3,)}, "--sizes -3"), ({"thresholds": (float("nan"),)}, "--thresholds nan"),
        ({"candidates": 0}, "--candidates 0"), ({"per_sequence": -1}, "--per-sequence -1"), ({"held_out": 0}, "--held-out 0"),
    ],
)  # fmt: skip
def test_grids_out_of_range(options, message) -> None:
    with pytest.raises(BadGrid, match=message):
        SweepOptions(**options).check()


# --- circuits of the graph --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(store: GraphStore, study: Study) -> tuple[Circuit, Circuit]:
    """Two circuits of the graph, as they are read back."""
    cut = [run_circuit(store, study.run, Selection(study.run.key), n_edges=n) for n in (90, 200)]
    return tuple(read_circuit(store, write_circuit(store, circuit)) for circuit in cut)  # type: ignore[return-value]


def test_named_circuits_are_tested_as_they_are(store, study, written) -> None:
    plan = plan_sweep(store, study, SweepOptions(held_out=2), circuits=written[::-1])
    assert plan.sizes == tuple(circuit.n_edges for circuit in written)
    assert [circuit.key for circuit in plan.circuits] == [circuit.key for circuit in written]
    # They are neither cut by a size nor kept with a sweep's.
    assert plan.threshold(plan.sizes[0]) is None
    assert plan.subject.startswith(f"{study.run.key}:")
    assert plan.candidates.edges.height == influences(store, study).height


def test_named_circuits_that_cannot_be_tested_together(store, study, identity, written) -> None:
    with pytest.raises(BadGrid, match="have the same number of edges"):
        plan_sweep(store, study, SweepOptions(held_out=2), circuits=[written[0], written[0]])
    with pytest.raises(BadGrid, match=rf"{written[0].key[:12]} is of run {study.run.key}, not of {identity.run.key}"):
        plan_sweep(store, identity, SweepOptions(held_out=2), circuits=written)
    with pytest.raises(BadGrid, match=r"was found on sequences that .*--split fresh"):
        plan_sweep(store, study, SweepOptions(split=Split.HALVES), circuits=written)
    half = plan_sweep(store, study, SweepOptions(sizes=(150,), split=Split.HALVES)).circuits[0]
    assert plan_sweep(store, study, SweepOptions(split=Split.HALVES), circuits=[half]).circuits[0].key == half.key
    other_half = replace(study, options=replace(study.options, seed=1))
    with pytest.raises(BadGrid, match="--split fresh"):
        plan_sweep(store, other_half, SweepOptions(split=Split.HALVES), circuits=[half])


def test_what_a_union_s_other_run_was_measured_on_is_not_held_out(store, study, written) -> None:
    key = "other"
    fresh = plan_sweep(store, study, SweepOptions(held_out=4), circuits=written).tested
    row = {name: study.run.properties[name] for name in ("model", "task", "metric", "dictionaries", "settings")}
    store.merge_nodes("Run", pl.DataFrame([{"key": key, **row}]))
    names = ("key", "task", "clean", "corrupt", "answer", "wrong_answer")
    store.merge_nodes("Sequence", pl.DataFrame([{name: getattr(fresh[0], name) for name in names}]))
    store.merge_edges("ON_SEQUENCE", pl.DataFrame({"source": [key], "target": [fresh[0].key], "n_edges": [0]}))
    assert found_pairs(store, find_run(store, key)) == [fresh[0]]
    union = replace(written[0], selection=replace(written[0].selection, origin="by hand", other_runs=(key,)))
    tested = plan_sweep(store, study, SweepOptions(held_out=4), circuits=[union]).tested
    assert (len(tested), fresh[0] in tested) == (4, False)
    store.query("MATCH (r:Run) WHERE r.key = $key DETACH DELETE r", {"key": key}, write=True)


def test_a_circuit_of_one_sequence_is_tested_on_it(store, study) -> None:
    pair = found_pairs(store, study.run)[3]
    circuit = run_circuit(store, study.run, Selection(study.run.key, sequence=pair.key), n_edges=150)
    plan = plan_sweep(store, study, SweepOptions(held_out=9), circuits=[circuit])
    assert (plan.tested, plan.found, plan.split) == ((pair,), (pair,), FOUND)
    sweep = run_sweep(plan, own_contenders(plan))
    assert set(sweep.values["sequence"]) == {pair.key}


# --- contenders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(store: GraphStore, study: Study) -> SweepPlan:
    n = influences(store, study).height
    return plan_sweep(store, study, SweepOptions(sizes=(0, 120, 200, n), held_out=4))


def test_contenders_have_the_circuits_sizes(plan) -> None:
    own = own_contenders(plan)
    assert [(c.size, c.ablation) for c in own] == [(size, ablation) for size in plan.sizes for ablation in Ablation]
    assert all(c.complement and c.lasting for c in own)
    controls = control_contenders(plan, METHODS, draws=2)
    assert not any(c.complement or c.lasting for c in controls)
    # Nothing has no control, and all candidates have none of their size.
    assert {c.size for c in controls} == set(plan.sizes[1:3])
    circuits = dict(zip(plan.sizes, plan.circuits, strict=True))
    for control in controls:
        ours = circuits[control.size]
        if control.method != Method.RANDOM_NODES.value:
            assert control.ablation is Ablation.EDGE
            assert abs(control.circuit.n_edges - ours.n_edges) <= 0.1 * ours.n_edges
        elif control.ablation is Ablation.NODE:
            per_site = [c.nodes.filter(pl.col("role") != "output").group_by("site").len().sort("site") for c in (control.circuit, ours)]
            assert_frame_equal(*per_site)
    per_size = len(METHODS) - 1 + len(Ablation)
    assert len(controls) == 2 * 2 * per_size
    assert len({(c.method, c.size, c.draw, c.ablation) for c in controls}) == len(controls)
    assert control_contenders(plan, ()) == []


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(plan: SweepPlan) -> Sweep:
    return run_sweep(plan, [*own_contenders(plan), *control_contenders(plan, METHODS, draws=2)])


def phi(values: pl.DataFrame) -> float:
    """The mean of ratios by hand, draws averaged first."""
    ratios = []
    for sequence in sorted(set(values["sequence"])):
        value, full, empty = values.filter(pl.col("sequence") == sequence).select("value", "full", "empty").mean().row(0)
        ratios.append((value - empty) / (full - empty))
    return float(np.mean(ratios))


def test_a_sweep_says_what_was_measured(sweep, plan) -> None:
    assert (sweep.n_found, sweep.n_tested, sweep.split, sweep.default_metric) == (N_FOUND, 4, HELD_OUT, "logit_diff")
    assert sweep.averaging is Averaging.MEAN_OF_RATIOS
    assert tuple(sweep.circuits) == plan.sizes
    assert {circuit.key for circuit in sweep.lasting} == {circuit.key for circuit in plan.circuits if circuit.n_edges}
    for ablation in Ablation:
        for part in ("circuit", "complement"):
            rows = sweep.default_rows(ablation, part)
            assert rows["size"].to_list() == list(plan.sizes)
            for row in rows.iter_rows(named=True):
                own = sweep.values.filter(
                    method=ATTRIBUTION, ablation=ablation.value, part=part, size=row["size"], metric="logit_diff"
                )
                assert row["value"] == pytest.approx(phi(own), abs=1e-6)
                assert row["n_edges"] == sweep.circuits[row["size"]].n_edges
                assert row["circuit"] == (sweep.circuits[row["size"]].key if row["size"] else None)
    assert sweep.default_rows(Ablation.EDGE, "circuit")["value"][0] == 0.0
    random = sweep.default_rows(Ablation.EDGE, "circuit", "random edges").filter(size=120)
    assert random["value"][0] == pytest.approx(phi(sweep.values.filter(method="random edges", size=120, metric="logit_diff")), abs=1e-6)
    assert random["n_draws"][0] == 2


def test_all_candidates_stand_for_every_method(sweep) -> None:
    n = sweep.n_candidates
    assert sweep.reaches_all
    known = sweep.values.select("method", "ablation", "draw").unique().filter(pl.col("method") != ATTRIBUTION)
    assert known.height == 2 * (2 + len(Ablation))
    for method, ablation, draw in known.iter_rows():
        at = {"ablation": ablation, "size": n, "part": "circuit"}
        ours, theirs = sweep.values.filter(method=ATTRIBUTION, **at), sweep.values.filter(method=method, draw=draw, **at)
        assert_frame_equal(theirs.drop("method", "draw"), ours.drop("method", "draw"), check_row_order=False)
        sizes = sweep.sizes.filter(method=method, ablation=ablation, draw=draw, size=n)
        assert sizes.select("n_nodes", "n_edges", "circuit").row(0) == (sweep.circuits[n].n_nodes, sweep.circuits[n].n_edges, None)


def test_areas_are_trapezoids(sweep) -> None:
    shares = [size / sweep.n_candidates for size in sweep.circuits]
    for method in (ATTRIBUTION, "random edges"):
        at = dict(sweep.default_rows(Ablation.EDGE, "circuit", method).select("size", "value").iter_rows())
        heights = np.array([at.get(size, 0.0) for size in sweep.circuits])
        kept = [i for i, size in enumerate(sweep.circuits) if size in at or not size]
        row = sweep.areas.filter(method=method, ablation="edge", metric="logit_diff", averaging="mean of ratios")
        by_area = dict(row.select("area", "value").iter_rows())
        assert by_area["CPR"] == pytest.approx(np.trapezoid(heights[kept], np.array(shares)[kept]), abs=1e-6)
        assert by_area["CMD"] == pytest.approx(np.trapezoid(np.abs(1 - heights[kept]), np.array(shares)[kept]), abs=1e-6)


def test_the_best_size_reaches_a_level_or_is_the_largest(sweep) -> None:
    rows = sweep.default_rows(Ablation.EDGE, "circuit")
    reached = rows.filter(pl.col("value") >= 0.8)["size"].to_list()
    assert sweep.best_size(0.8) == (reached[0] if reached else rows["size"][-1])
    assert sweep.best_size(1e9) == rows["size"][-1]


def test_a_grid_that_does_not_reach_all_has_no_areas(store, study) -> None:
    plan = plan_sweep(store, study, SweepOptions(sizes=(120,), held_out=2, ablations=(Ablation.EDGE,), complement=False))
    sweep = run_sweep(plan, own_contenders(plan))
    assert not sweep.reaches_all
    assert (set(sweep.values["ablation"]), set(sweep.values["part"])) == ({"edge"}, {"circuit"})


def test_every_edge_of_a_run_without_threshold_is_the_whole_model(store, identity) -> None:
    """Where no node is an error and every edge has an effect, nothing is cut: φ is 1, and of the rest 0."""
    n = influences(store, identity).height
    plan = plan_sweep(store, identity, SweepOptions(sizes=(n,), held_out=4))
    sweep = run_sweep(plan, own_contenders(plan))
    kept, cut = (sweep.values.filter(part=part) for part in ("circuit", "complement"))
    assert np.allclose(kept["value"], kept["full"], atol=1e-5)
    assert np.allclose(cut["value"], cut["empty"], atol=1e-5)
    assert sweep.default_rows(Ablation.EDGE, "circuit")["value"][0] == pytest.approx(1, abs=1e-4)


def test_accuracy_as_the_default_metric_is_averaged_as_it_can_be(study) -> None:
    made = Sweep("r", "r", HELD_OUT, 1, 1, 1, "accuracy", {}, (), pl.DataFrame(), pl.DataFrame())
    assert made.averaging is Averaging.RATIO_OF_MEANS


# --- circuits of single sequences -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("baseline", [Baseline.COUNTERFACTUAL, Baseline.RESAMPLE])
def test_circuits_of_single_sequences_are_tested_on_them_beside_the_common_one(store, study, baseline) -> None:
    study = replace(study, baseline=baseline, options=replace(study.options, draws=2, metrics=(Metric.LOGIT_DIFF,)))
    n = influences(store, study).height
    options = SweepOptions(sizes=(100, n), held_out=8, per_sequence=2, ablations=(Ablation.EDGE,))
    plan = plan_sweep(store, study, options)
    for pair, circuits in plan.own:
        own = store.read_edges("ATTRIBUTES", run=study.run.key, sequence=pair.key)
        summed = own.group_by(ENDS).agg(pl.col("weight").sum().abs()).sort("weight", descending=True)
        assert circuits[0].edges.join(summed.head(100), on=ENDS, how="anti").is_empty()
    sweep = run_sweep(plan, [*own_contenders(plan), *control_contenders(plan, [Method.RANDOM_EDGES], draws=1)])
    keys = {pair.key for pair, _ in plan.own}
    found = sweep.values.filter(split=FOUND)
    assert set(found["method"]) == {ATTRIBUTION, PER_SEQUENCE}  # no control stands on sequences that it was not tested on
    assert set(found["sequence"]) == keys
    assert not keys & set(sweep.values.filter(split=HELD_OUT)["sequence"])
    assert set(found["part"]) == {"circuit"}
    assert sorted(set(found["draw"])) == list(range(2 if baseline.drawn else 1))
    means = np.mean([circuits[0].n_edges for _, circuits in plan.own])
    assert sweep.sizes.filter(method=PER_SEQUENCE, size=100)["n_edges"][0] == round(means)
    rows = sweep.default_rows(Ablation.EDGE, "circuit", PER_SEQUENCE, split=FOUND)
    assert rows["size"].to_list() == [100, n]
    assert rows["value"][0] == pytest.approx(phi(found.filter(method=PER_SEQUENCE, size=100)), abs=1e-6)


def test_candidates_without_strength_are_none(store, study) -> None:
    plan = plan_sweep(store, study, SweepOptions(sizes=(10_000,), held_out=1))
    assert isinstance(plan.candidates, Candidates)
    assert (plan.candidates.strength > 0).all()
