"""The verdict on regions: attributions against the definition, who competes, what is measured against the engine's own calls, what is written."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from featlas import region_verdict
from featlas.analysis.faithfulness import Averaging
from featlas.analysis.parcellation import PATH_SCORES, Level, Parcellation, SitePartition
from featlas.analysis.region_study import FEATURES, HEADS, RANDOM, REGIONS, keeping, removals, run_kept, run_removals
from featlas.analysis.study import Study, StudyOptions, found_pairs, held_out_pairs, measure, open_study
from featlas.errors import UserError
from featlas.ingest.effective import Positions, attribute, prepare
from featlas.model.ablation import ablate_nodes
from featlas.model.baselines import Baseline
from featlas.model.masks import ERROR, NodeSet
from featlas.model.metrics import Metric
from featlas.model.sites import OUTPUT, Basis, SiteGraph, parse_site
from featlas.model.units import Units
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, open_graph
from featlas.queries.subgraphs import find_run
from featlas.region_verdict import NodeEffects, RegionTests
from featlas.verdict import attribution_settings
from scipy import sparse

from .micro_dictionaries import tiny_dictionary
from .naive import naive_node_attributions
from .study_atlas import TinyAtlas
from .test_verdict import written

QUICK = RegionTests(shares=(0.3, 0.6, 1.0), edge_shares=(0.3, 1.0), blocks=3, drives=3, random_draws=2, held_out=4)
BLOCKS = {"embed": [0, 0, 1, -1, 1, 2, 0, 2, 1, -1, 0, 2], "resid_0": [1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1]}
"""Blocks of twelve features each, −1 for dead ones; mlp_1 is not partitioned."""


def open_tiny(store: GraphStore, tiny: TinyAtlas, run: str = "main", **changes) -> Study:
    chosen = StudyOptions(**{"metrics": (Metric.LOGIT_DIFF, Metric.ACCURACY), **changes})
    return open_study(store, find_run(store, tiny.runs[run]), chosen, tiny.atlas)


@pytest.fixture(scope="module")
def study(store: GraphStore, tiny: TinyAtlas) -> Study:
    return open_tiny(store, tiny)


def parcellation_of(study: Study, blocks: dict[str, list[int]] = BLOCKS, key: str = "p1") -> Parcellation:
    """The blocks as a parcellation of the study's dictionaries."""
    sites = {}
    for name, labels in blocks.items():
        own = np.array(labels, dtype=np.int64)
        live = np.flatnonzero(own >= 0)
        dictionary = study.dictionaries[parse_site(name)]
        level = Level("number of blocks", own[live])
        sites[name] = SitePartition(name, dictionary.id, dictionary.d_sae, live, (level,), 0, pl.DataFrame(schema=dict(PATH_SCORES)))
    return Parcellation(key, "samples1", study.model.key, "ward", "activation", sites, {"seed": 0})


@pytest.fixture(scope="module")
def units(study: Study) -> Units:
    return parcellation_of(study).units(study.graph, study.dictionaries)


@pytest.fixture(scope="module")
def attributed(store: GraphStore, study: Study, units: Units) -> tuple:
    pairs = found_pairs(store, study.run)[:4]
    return pairs, *region_verdict.attributions(study, pairs, None, [units])


@pytest.fixture(scope="module")
def verdict(store: GraphStore, study: Study) -> region_verdict.RegionVerdict:
    own = parcellation_of(study)
    other = parcellation_of(study, {"embed": [0, 1] * 6, "resid_0": [0] * 12}, "p2")
    pairs = found_pairs(store, study.run)
    return region_verdict.put_to_the_test(study, {REGIONS: own, "other": other}, pairs, held_out_pairs(study, pairs, 4), QUICK)


# --- attributions -----------------------------------------------------------------------------------------------------


def test_effects_of_units_are_sums_over_their_members() -> None:
    random_numbers = np.random.default_rng(0)
    graph = SiteGraph.of(2, False, [parse_site("embed"), parse_site("resid_0")])
    units = Units.from_labels(graph, {site: torch.tensor([0, 1, 1, 0, 2]) for site in graph.sites[:-1]})
    effects = {site: random_numbers.normal(size=(3, 5)) for site in units.of}
    found = NodeEffects({site: sparse.csr_matrix(values) for site, values in effects.items()}, ("a", "b", "a")).of(units)
    for s, unit in np.ndindex(3, len(units)):
        site = graph.sites[int(units.site_of[unit])]
        members = [node if node != ERROR else 4 for node in units.members(unit).tolist()]
        assert found[s, unit] == pytest.approx(sum(effects[site][s, node] for node in members))


def test_effects_are_those_of_the_definition(study, attributed, units) -> None:
    pairs, effects, _ = attributed
    ours = effects.of(units)
    settings = attribution_settings(study)
    assert (settings.steps, settings.baseline, settings.metric) == (2, Baseline.COUNTERFACTUAL, Metric.LOGIT_DIFF)  # the run's own
    at, tasks = 0, []
    for batch in study.pair_batches(pairs, 0):
        naive = naive_node_attributions(study.binding, study.dictionaries, batch, settings)
        for s in range(len(batch.pairs)):
            for unit in range(len(units)):
                site = study.graph.sites[int(units.site_of[unit])]
                features, errors = naive[site]
                expected = sum(float(errors[s].sum() if node == ERROR else features[s, :, node].sum()) for node in units.members(unit).tolist())
                assert ours[at, unit] == pytest.approx(expected, abs=1e-4)
            at += 1
        tasks += [pair.task for pair in batch.pairs]
    assert (at, list(effects.tasks)) == (4, tasks)


def test_drives_are_single_edges_grouped(study, attributed, units) -> None:
    pairs, _, (drives,) = attributed
    n = len(units) + 1
    per_sequence = []
    settings = replace(attribution_settings(study), positions=Positions.KEEP, threshold=0.0, max_edges=None)
    for batch in study.pair_batches(pairs, 0):
        prepared = prepare(study.binding, study.dictionaries, batch, settings, None, study.target)
        of = [units.of[site].numpy() if site != OUTPUT else np.array([units.output]) for site in prepared.graph.sites]
        found = np.zeros((len(batch.pairs), n, n))
        for block in attribute(prepared):
            for s, source_site, source, _, target_site, target, _, weight in zip(*(column.tolist() for column in block), strict=True):
                found[s, of[source_site][source], of[target_site][target]] += weight
        per_sequence += list(found)
    stacked = np.stack(per_sequence)
    assert drives.n_sequences == 4
    assert drives.mean == pytest.approx(stacked.mean(0), abs=1e-4)
    assert drives.strength == pytest.approx(np.abs(stacked).mean(0), abs=1e-4)
    assert (drives.n[np.abs(stacked).min(0) > 1e-3] == 4).all()
    assert (drives.n[~units.joined.numpy()] == 0).all()


# --- who competes -----------------------------------------------------------------------------------------------------


def test_competitors_are_partitions_of_the_same_nodes(study) -> None:
    own = parcellation_of(study)
    known = region_verdict.partitions(study, {REGIONS: own}, draws=2, seed=5)
    assert list(known) == [(REGIONS, 0), (RANDOM, 0), (RANDOM, 1), (FEATURES, 0)]  # no heads: these dictionaries are none
    for site, labels in ((site, np.array(BLOCKS.get(site.name, [0] * 12))) for site in study.dictionaries):
        for (method, _), units in known.items():
            found = units.of[site][:-1].numpy()
            dead = [units.names[unit].endswith("/dead") for unit in found]
            assert dead == (labels < 0).tolist(), method
            live = found[labels >= 0]
            if site.name not in BLOCKS:
                assert len(set(live)) == 1
            elif method == FEATURES:
                assert len(set(live)) == (labels >= 0).sum()
            else:
                assert sorted(np.bincount(live)[np.unique(live)]) == sorted(np.bincount(labels[labels >= 0]))
    assert any((known[RANDOM, 0].of[site] != known[RANDOM, 1].of[site]).any() for site in study.dictionaries)
    assert (FEATURES, 0) not in region_verdict.partitions(study, {REGIONS: own}, draws=1, features=False)


def test_heads_compete_where_sites_are_the_identity_on_them() -> None:
    attn, resid = parse_site("attn_0"), parse_site("resid_0")
    dictionaries = {attn: tiny_dictionary("identity", 8, basis=Basis.HEADS), resid: tiny_dictionary("relu", 8, d_sae=6)}
    graph = SiteGraph.of(2, False, [attn, resid])
    study = SimpleNamespace(graph=graph, dictionaries=dictionaries, binding=SimpleNamespace(n_heads=2))
    empty = pl.DataFrame(schema=dict(PATH_SCORES))
    blocks = np.arange(8) % 4
    of_attn = SitePartition("attn_0", dictionaries[attn].id, 8, np.arange(8), (Level("x", blocks),), 0, empty)
    known = region_verdict.partitions(study, {REGIONS: Parcellation("p", "s", "m", "ward", "activation", {"attn_0": of_attn})}, draws=1)
    assert known[HEADS, 0].of[attn].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    of_resid = SitePartition("resid_0", dictionaries[resid].id, 6, np.arange(6), (Level("x", np.arange(6) % 2),), 0, empty)
    both = Parcellation("p", "s", "m", "ward", "activation", {"attn_0": of_attn, "resid_0": of_resid})
    assert (HEADS, 0) not in region_verdict.partitions(study, {REGIONS: both}, draws=1)


def test_regions_of_other_sites_cannot_be_tested(study) -> None:
    elsewhere = replace(parcellation_of(study), sites={"resid_1": parcellation_of(study).sites["resid_0"]})
    with pytest.raises(UserError, match=r"regions p1 are of resid_1, and run .* of embed, resid_0, mlp_1"):
        region_verdict.partitions(study, {REGIONS: elsewhere}, draws=1)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_everything_alive_is_the_model_and_what_is_cut_is_the_engines_own(study, attributed, units) -> None:
    pairs, effects, drives = attributed
    live = {name: np.flatnonzero(np.array(labels) >= 0) for name, labels in BLOCKS.items()}
    (own,) = region_verdict.contestants({(REGIONS, 0): units}, effects, drives, live)
    assert own.live.sum() == 22
    values, kept = run_kept(study, pairs[:2], keeping(own, (0.5, 1.0)))
    of_metric = values.filter(metric="logit_diff")
    everything = of_metric.filter(size=22, part="circuit")
    assert everything["value"].to_list() == pytest.approx(everything["full"].to_list(), abs=1e-4)
    rest = of_metric.filter(size=22, part="complement")  # error nodes and dead features alone: they are never cut
    uncounted = units.nodes([unit for unit in range(len(units)) if not own.live[unit]])
    for batch in study.batches(pairs[:2], 0):
        measured = batch.measure(ablate_nodes(batch, [uncounted]), Metric.LOGIT_DIFF)[0]
        for pair, value in zip(batch.clean.pairs.pairs, measured.tolist(), strict=True):
            assert rest.filter(sequence=pair.key)["value"].to_list() == pytest.approx([value], abs=1e-4)
    assert (everything["full"] - everything["empty"]).abs().max() > 1e-3
    assert kept["size"].to_list() == [11, 22]
    # All but one block: the block's nodes by hand.
    unit = units.names.index("embed/block 2")
    found = run_removals(study, pairs[:2], removals(own, [unit])).filter(metric="logit_diff")
    alive = NodeSet.of(study.graph, ["embed"] * 3, [5, 7, 11]).inverse()
    for batch in study.batches(pairs[:2], 0):
        measured = batch.measure(ablate_nodes(batch, [alive]), Metric.LOGIT_DIFF)[0]
        for pair, value in zip(batch.clean.pairs.pairs, measured.tolist(), strict=True):
            assert found.filter(sequence=pair.key)["value"].to_list() == pytest.approx([value], abs=1e-6)
    assert found["size"].unique().to_list() == [unit]


def test_draws_of_the_baseline_are_averaged(store, tiny, units, attributed) -> None:
    drawn = open_tiny(store, tiny, baseline=Baseline.RESAMPLE, draws=3, metrics=(Metric.LOGIT_DIFF,))
    pairs, effects, _ = attributed
    live = {name: np.flatnonzero(np.array(labels) >= 0) for name, labels in BLOCKS.items()}
    (own,) = region_verdict.contestants({(RANDOM, 2): units}, effects, [], live)
    trials = removals(own, [0, 5])
    every = found_pairs(store, drawn.run)  # donors
    found = run_removals(drawn, pairs[:2], trials, among=every)
    single = measure(drawn, pairs[:2], trials, among=every)
    assert sorted(single["draw"].unique()) == [6, 7, 8]
    assert (found.height, found["draw"].unique().to_list()) == (4, [2])
    for row in found.iter_rows(named=True):
        rows = single.filter(size=row["size"], sequence=row["sequence"])
        assert [row[name] for name in ("value", "full", "empty")] == pytest.approx([rows[name].mean() for name in ("value", "full", "empty")])
    # Of kept sets each draw stands for itself, in the values and in the sizes.
    values, kept = run_kept(drawn, pairs[:2], keeping(own, (0.5,)), among=every)
    assert set(values["draw"]) == set(kept["draw"]) == {6, 7, 8}


def test_all_are_measured_at_the_same_sizes(verdict) -> None:
    assert [own.method for own in verdict.competitors] == [REGIONS, "other", RANDOM, RANDOM, FEATURES]
    nodes = verdict.kept.filter(ablation="node")
    assert set(nodes["size"]) == {7, 14, 22}
    assert nodes.group_by("method", "draw").len()["len"].to_list() == [3] * 5
    rows = verdict.table.filter(ablation="node", metric="logit_diff", averaging=Averaging.RATIO_OF_MEANS.value, size=22)
    whole, rest = (rows.filter(part=part) for part in ("circuit", "complement"))
    assert whole["mean_value"].to_list() == pytest.approx(whole["mean_full"].to_list(), abs=1e-4)
    assert whole.height == rest.height == 4
    # What is never cut is the same where the dead features are the same.
    left = dict(rest.select("method", "mean_value").iter_rows())
    assert left[REGIONS] == pytest.approx(left[RANDOM], abs=1e-4)
    assert set(rows["share"]) == {1.0}
    assert set(verdict.compared["method"]) == set(verdict.compared_cut["method"]) == {"other", RANDOM, FEATURES}


def test_the_matrix_has_every_block_and_task(verdict) -> None:
    own = verdict.matrix.filter(pl.col("method") == REGIONS)
    assert own.height == 3 * 2
    assert set(own["task"]) == {"even", "odd"}
    assert all("block" in name for name in own["removed"])
    assert set(verdict.matrix["method"]) == {REGIONS, "other", RANDOM}  # single features are not cut one at a time
    assert set(verdict.selectivity["method"]) == {REGIONS, "other", RANDOM}
    assert verdict.drives.height == 3
    assert verdict.drives["strength"].is_sorted(descending=True)


def test_units_by_their_mean_attribution_are_another_order(study, attributed, units) -> None:
    _, effects, _ = attributed
    live = {name: np.flatnonzero(np.array(labels) >= 0) for name, labels in BLOCKS.items()}
    (own,) = region_verdict.contestants({(REGIONS, 0): units}, effects, [], live)
    by_sum, by_mean = own.ranking().tolist(), own.ranking(per_member=True).tolist()
    assert sorted(by_sum) == sorted(by_mean)
    assert by_mean == sorted(by_mean, key=lambda unit: -own.strength[unit] / max(1, own.live[unit]))


def test_less_can_be_asked_for(store, study) -> None:
    pairs = found_pairs(store, study.run)[:2]
    few = RegionTests(shares=(1.0,), edge_shares=(), blocks=0, drives=0, random_draws=1, features=False)
    done = region_verdict.put_to_the_test(study, {REGIONS: parcellation_of(study)}, pairs, held_out_pairs(study, pairs, 2), few)
    assert (done.matrix_values.height, done.drive_values.height, len(done.circuits)) == (0, 0, 0)
    assert done.matrix.is_empty()
    assert done.drives.is_empty()
    assert done.selectivity is None
    assert json.loads(json.dumps(region_verdict.as_json(done, parcellation_of(study))))["drives"] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shares": (0.5, 0.0)}, "--shares 0 is no share"),
        ({"edge_shares": (1.5,)}, "--edge-shares 1.5"),
        ({"blocks": -1}, "--blocks -1"),
        ({"drives": -1}, "--drives -1"),
        ({"random_draws": 0}, "--random-draws 0 is too small: give at least 1"),
        ({"held_out": 0}, "--held-out 0"),
        ({"shares": ()}, "--shares is empty"),
    ],
)
def test_tests_out_of_range(changes, said) -> None:
    with pytest.raises(UserError, match=said):
        replace(QUICK, **changes).check()


# --- out of the program -----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tiny: TinyAtlas, tmp_path: Path) -> Iterator[tuple[GraphStore, StatisticsStore]]:
    folder = tiny.copied(tmp_path)
    with open_graph(folder) as graph, StatisticsStore(folder) as statistics:
        yield graph, statistics


def test_written_twice_is_written_once(fresh, study, verdict) -> None:
    graph, statistics = fresh
    own = parcellation_of(study)
    first = region_verdict.write_back(graph, statistics, verdict, own)
    count = lambda kind: graph.query(f"MATCH ()-[r:{kind}]->() RETURN count(r) AS n")["n"][0]
    before, values = written(graph), statistics.query("SELECT count(*) AS n FROM scores")["n"][0]
    assert first.n_drives == count("DRIVES") == int((verdict.regions.drives.n > 0).sum())
    assert first.n_circuits == before["Circuit"].height == sum(circuit.n_edges > 0 for circuit in verdict.circuits)
    assert first.n_scores == before["Score"].height
    assert region_verdict.write_back(graph, statistics, verdict, own) == first
    for name, frame in written(graph).items():
        assert frame.sort(frame.columns).equals(before[name].sort(before[name].columns)), name
    assert (count("DRIVES"), statistics.query("SELECT count(*) AS n FROM scores")["n"][0]) == (first.n_drives, values)
    # What a block loses stands beside it.
    shown = graph.query("MATCH (b:Block)-[:SCORED]->(s:Score {kind: 'loss'}) RETURN b.site AS site, b.`index` AS i, s.task AS task, s.value AS v")
    expected = {
        (name.split("/")[0], int(name.split()[-1]), task): value
        for name, task, value in verdict.matrix.filter(pl.col("method") == REGIONS).select("removed", "task", "value").iter_rows()
    }
    assert {row[:3]: row[3] for row in shown.iter_rows()} == pytest.approx(expected)


def test_all_that_was_measured(study, verdict, tmp_path) -> None:
    told = json.loads(json.dumps(region_verdict.as_json(verdict, parcellation_of(study))))
    assert (told["found"], told["tested"], told["metric"], told["parcellation"]) == (8, 4, "logit_diff", "p1")
    assert len(told["table"]) == verdict.table.height
    saved = region_verdict.all_values(verdict)
    parts = {"kept": verdict.values, "block cut": verdict.matrix_values, "edge cut": verdict.drive_values}
    assert dict(saved.group_by("test").len().iter_rows()) == {name: frame.height for name, frame in parts.items()}
    assert saved.filter(test="kept")["share"].null_count() == 0
    page = region_verdict.page(verdict, parcellation_of(study), {"embed/block 0": "<b>first</b>"})
    assert "p1" in page
    assert "<b>first</b>" not in page  # names are people's text
