"""The effects of single edges and nodes of a run's circuit, each against the ablated model without it."""

from dataclasses import replace

import polars as pl
import pytest
from featlas.analysis.circuits import Circuit, Selection, run_circuit
from featlas.analysis.faithfulness import FOUND, HELD_OUT
from featlas.analysis.masks import NUMBER
from featlas.analysis.scores import EFFECTS, checked_effects
from featlas.analysis.single_effects import EffectOptions, PositionsApart, measure_effects
from featlas.analysis.study import Study, StudyOptions, found_pairs, open_study
from featlas.model.ablation import ablate_edges, ablate_nodes
from featlas.model.baselines import Baseline
from featlas.model.masks import EdgeSet, NodeSet
from featlas.model.metrics import Metric
from featlas.queries.store import GraphStore
from featlas.queries.subgraphs import find_run

from .study_atlas import TinyAtlas


@pytest.fixture(scope="module")
def study(store: GraphStore, tiny: TinyAtlas) -> Study:
    return open_study(store, find_run(store, tiny.runs["main"]), StudyOptions(metrics=(Metric.LOGIT_DIFF, Metric.KL), batch_size=3), tiny.atlas)


@pytest.fixture(scope="module")
def circuit(store: GraphStore, study: Study) -> Circuit:
    return run_circuit(store, study.run, Selection(study.run.key), n_edges=90)


def numbered(circuit: Circuit) -> tuple[list[tuple[str, int, str, int]], dict[str, tuple[str, int]]]:
    """The circuit's edges as sites and numbers of nodes, and its nodes' by key."""
    place = {key: (site, number) for key, site, number in circuit.nodes.select("key", "site", NUMBER).iter_rows()}
    return [(*place[source], *place[target]) for source, target in circuit.edges.select("source", "target").iter_rows()], place


def edge_mask(study: Study, edges: list[tuple[str, int, str, int]]) -> EdgeSet:
    return EdgeSet.of(study.graph, *(list(column) for column in zip(*edges, strict=True))) if edges else EdgeSet.empty(study.graph)


def by_hand(study: Study, circuit: Circuit, pairs, seed: int) -> dict[tuple, float]:
    """(circuit or None, source, target or None, metric, sequence) -> effect, from ablated models that lack one edge or node each."""
    edges, place = numbered(circuit)
    keys = list(circuit.edges.select("source", "target").iter_rows())
    nodes = [key for key, (site, _) in place.items() if site != "y"]
    found = {}
    for batch in study.batches(pairs, seed):
        sets = [edge_mask(study, edges), *(edge_mask(study, [edge]).inverse() for edge in edges)]
        sets += [edge_mask(study, [e for e in edges if e is not edge]) for edge in edges]
        sets += [edge_mask(study, [e for e in edges if e[:2] != place[key]]) for key in nodes]
        ends = ablate_edges(batch, sets)
        without = ablate_nodes(batch, [NodeSet.of(study.graph, [place[key][0]], [place[key][1]]).inverse() for key in nodes])
        for metric in study.metrics:
            values, full = batch.measure(ends, metric), batch.full(metric)
            n = len(edges)
            parts = {
                (None, True): full - values[1 : n + 1], (circuit.key, True): values[0] - values[n + 1 : 2 * n + 1],
                (circuit.key, False): values[0] - values[2 * n + 1 :], (None, False): full - batch.measure(without, metric),
            }  # fmt: skip
            for (within, of_edges), effects in parts.items():
                for ends_of, row in zip(keys if of_edges else [(key, None) for key in nodes], effects.tolist(), strict=True):
                    for pair, value in zip(batch.pairs.pairs, row, strict=True):
                        found[within, *ends_of, metric.value, pair.key] = value
    return found


@pytest.mark.slow
@pytest.mark.parametrize("baseline", [Baseline.COUNTERFACTUAL, Baseline.ZERO])
def test_every_effect_is_that_of_the_model_without_it(store, study, circuit, baseline) -> None:
    study, pairs = replace(study, baseline=baseline), found_pairs(store, study.run)[:4]
    told = []
    effects = measure_effects(study, circuit, pairs, split=FOUND, progress=lambda done, total: told.append((done, total)))
    assert list(effects.columns) == list(EFFECTS)
    assert checked_effects(effects).height == effects.height
    assert told[-1] == (4, 4)
    assert (set(effects["split"]), set(effects["baseline"]), set(effects["draw"])) == ({FOUND}, {baseline.value}, {0})
    ours = {row[:5]: row[5] for row in effects.select("circuit", "source", "target", "metric", "sequence", "effect").iter_rows()}
    assert len(ours) == effects.height
    assert ours == pytest.approx(by_hand(study, circuit, pairs, 0), abs=1e-4)
    assert max(map(abs, ours.values())) > 0.1


def test_what_is_cut_is_chosen(store, study, circuit) -> None:
    pairs = found_pairs(store, study.run)[:2]
    only = measure_effects(study, circuit, pairs, EffectOptions(in_circuit=False, nodes=False))
    assert only["circuit"].null_count() == only.height == circuit.n_edges * 2 * 2
    assert only["target"].null_count() == 0
    assert set(only["split"]) == {HELD_OUT}
    inside = measure_effects(study, circuit, pairs, EffectOptions(in_model=False))
    assert set(inside["circuit"]) == {circuit.key}
    assert set(inside["source"]) == set(circuit.nodes.filter(pl.col("role") != "output")["key"])


def test_draws_of_a_baseline_are_told_apart(store, study, circuit) -> None:
    study = replace(study, baseline=Baseline.RESAMPLE, options=replace(study.options, draws=2, seed=3))
    pairs = found_pairs(store, study.run)
    effects = measure_effects(study, circuit, pairs, EffectOptions(in_circuit=False, nodes=False))
    assert effects.height == circuit.n_edges * len(pairs) * 2 * 2
    apart = [effects.filter(draw=i).sort("source", "target", "metric", "sequence")["effect"] for i in range(2)]
    assert not apart[0].equals(apart[1])


def test_positions_apart_are_refused(store, study, circuit) -> None:
    apart = replace(circuit, selection=replace(circuit.selection, positions=True))
    with pytest.raises(PositionsApart, match="keeps positions apart"):
        measure_effects(study, apart, found_pairs(store, study.run)[:1])
