"""Regions put to the test: rankings, what is kept and cut, circuits of units, the task × block matrix and selectivity, against loops and by hand."""

import random
from collections.abc import Sequence

import networkx as nx
import numpy as np
import polars as pl
import pytest
import torch
from featlas.analysis.faithfulness import VALUES, Bootstrap
from featlas.analysis.region_study import (
    FEATURES,
    KEPT,
    MATRIX,
    RANDOM,
    REGIONS,
    SELECTIVITY,
    Contestant,
    Drives,
    Kept,
    NothingToTest,
    cutting_circuits,
    drive_removals,
    drive_table,
    keeping,
    live_members,
    region_circuits,
    removal_matrix,
    removals,
    selectivity,
    strongest_units,
)
from featlas.analysis.study import Ablation, Trial
from featlas.model.ablation import ablate_nodes
from featlas.model.masks import ERROR, NodeSet
from featlas.model.metrics import Metric
from featlas.model.sites import parse_site
from featlas.model.units import Units

from .ablation_cases import tiny_case
from .region_cases import GRAPH, random_weights, small_parcellation, small_units
from .unit_cases import random_units

FEW = Bootstrap(resamples=300)
RESID_0, RESID_1, RESID_2 = (parse_site(f"resid_{i}") for i in range(3))
LIVE = {"resid_0": np.array([0, 1, 2, 4, 5]), "resid_1": np.arange(6)}


def drives_of(units: Units, strength: np.ndarray) -> Drives:
    """Drives whose mean is the strength."""
    return Drives(units, strength, np.abs(strength), (strength != 0).astype(np.int64), 1)


def contestant(effects: Sequence[Sequence[float]], tasks: Sequence[str] | None = None, drives: np.ndarray | None = None, **changes) -> Contestant:
    """The small parcellation's units: at resid_0 blocks of 2, 2, 1 (one dead feature), at resid_1 blocks of 4 and 2, at resid_2 all; errors."""
    units = small_units(small_parcellation())
    given = {"method": REGIONS, "tasks": tasks or ["ioi"] * len(effects), "drives": None if drives is None else drives_of(units, drives), **changes}
    return Contestant(units=units, effects=np.array(effects, dtype=float), live=live_members(units, LIVE), **given)


# --- who is how strong ------------------------------------------------------------------------------------------------


def test_live_members_are_counted_unit_by_unit() -> None:
    units = small_units(small_parcellation())
    assert units.names[:-1] == (
        "resid_0/block 0", "resid_0/block 1", "resid_0/block 2", "resid_0/dead", "resid_0/error", "resid_1/block 0", "resid_1/block 1",
        "resid_1/error", "resid_2/all", "resid_2/error",
    )  # fmt: skip
    assert live_members(units, LIVE).tolist() == [2, 2, 1, 0, 0, 4, 2, 0, 0, 0]
    assert live_members(units, {"resid_1": np.array([1])}).tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]


def test_ranking_by_hand() -> None:
    #                block 0, 1, 2, dead, error, block 0, 1, error, all, error
    own = contestant([[4, 3, 1, 0, 2, 6, 1, 0, 9, 0], [-4, 1, 3, 0, 2, 2, -2, 0, -9, 0]], ["ioi", "gender"])
    assert own.strength.tolist() == [4, 2, 2, 0, 2, 4, 1.5, 0, 9, 0]
    assert {task: strength.tolist() for task, strength in own.by_task.items()} == {
        "ioi": [4, 3, 1, 0, 2, 6, 1, 0, 9, 0], "gender": [4, 1, 3, 0, 2, 2, 2, 0, 9, 0],
    }  # fmt: skip
    assert own.ranking().tolist() == [8, 0, 5, 1, 2, 4, 6]  # ties in order, nothing that is 0
    # per live member: 2, 1, 2, -, 2, 1, 0.75, -, 9; units without live features count as one
    assert own.ranking(per_member=True).tolist() == [8, 0, 2, 4, 1, 5, 6]
    # Greatest of the shares of a task's attribution (26 of ioi, 23 of gender), only units with live features.
    # ioi 4, 3, 1, -, -, 6, 1 of 26; gender 4, 1, 3, -, -, 2, 2 of 23
    assert strongest_units(own, 10) == [5, 0, 2, 1, 6]
    assert strongest_units(own, 2) == [5, 0]


def test_a_task_whose_metric_is_large_does_not_choose_for_all() -> None:
    own = contestant([[100, 80, 1, 0, 0, 60, 0, 0, 0, 0], [0, 0, 3, 0, 0, 0, 1, 0, 0, 0]], ["large", "small"])
    assert strongest_units(own, 2) == [2, 0]  # 3 of 4, 100 of 241


def test_what_a_unit_is_most_attributed_to() -> None:
    own = contestant([[30, 10, 0, 0, 0, 60, 0, 0, 0, 0], [1, 3, 0, 0, 0, 0, 4, 0, 0, 0]], ["large", "small"])
    found = {unit: (task, share) for unit, task, share in own.purposes.iter_rows()}
    # of large .3, .1, .6; of small .125, .375, 0, .5
    assert found[0] == ("large", pytest.approx(0.3 / 0.425))
    assert found[1] == ("small", pytest.approx(0.375 / 0.475))
    assert found[5] == ("large", 1.0)
    assert found[6] == ("small", 1.0)
    assert set(found) == {0, 1, 5, 6}


# --- keeping ----------------------------------------------------------------------------------------------------------


def naive_kept(own: Contestant, share: float) -> list[int]:
    """Units with live features in order until they hold the share of these; all that have attribution where they never do."""
    total, held, kept = sum(own.live), 0, []
    for unit in sorted(range(len(own.units)), key=lambda unit: (-own.strength[unit], unit)):
        if own.live[unit] and own.strength[unit] > 0 and (share == 1 or held < share * total - 1e-9):
            kept.append(unit)
            held += own.live[unit]
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_keeping_takes_units_until_they_hold_the_share(seed) -> None:
    random_numbers = np.random.default_rng(seed)
    own = contestant(random_numbers.normal(size=(3, 10)) * (random_numbers.random(10) < 0.8))
    for kept in keeping(own, (0.1, 0.3, 0.5, 0.9, 1.0)):
        expected = naive_kept(own, kept.share)
        uncounted = [unit for unit in range(len(own.units)) if not own.live[unit]]  # alive in both, whatever is kept or cut
        assert torch.equal(kept.trial.mask.rows, own.units.nodes([*expected, *uncounted]).rows), kept.share
        others = [unit for unit in range(len(own.units)) if unit not in expected]
        rest = kept.trial.alive("complement")
        assert rest.complement
        assert torch.equal(rest.rows, own.units.nodes(expected).rows), kept.share
        assert set(uncounted) <= set(others)
        assert (kept.n_units, kept.n_features) == (len(expected), own.live[expected].sum())
        assert kept.trial.ablation is Ablation.NODE
        assert not kept.trial.mask.complement


def test_shares_of_one_size_are_kept_once() -> None:
    own = contestant([[4, 3, 1, 0, 2, 6, 1, 0, 9, 0]])  # 11 live features
    kept = keeping(own, (0.01, 0.02, 0.05, 0.1, 0.95, 1.0))
    assert [one.trial.size for one in kept] == [1, 2, 11]
    assert kept[-1].n_units == sum(own.live[unit] > 0 for unit in own.ranking())  # of 0.95 and 1 the greater counts


def test_a_kept_set_has_a_row_for_each_draw_of_the_baseline() -> None:
    mask = small_units(small_parcellation()).nodes([0])
    rows = pl.DataFrame([Kept(Trial(RANDOM, 3, mask, draw=2), 0.3, 1, 2).row(4, drawn) for drawn in range(4)], schema=KEPT)
    assert rows["draw"].to_list() == [8, 9, 10, 11]
    assert rows.drop("draw").unique().row(0) == (RANDOM, "node", 3, 0.3, 1, 2, 0)


def test_without_any_attribution_there_is_nothing_to_test() -> None:
    own = contestant([[0.0] * 10], drives=np.zeros((11, 11)))
    with pytest.raises(NothingToTest, match="no unit of regions has any attribution"):
        keeping(own)
    with pytest.raises(NothingToTest, match="no edge between units has any effect"):
        region_circuits(own.drives)


def test_all_units_are_the_whole_model_and_none_the_baseline() -> None:
    case = tiny_case("llama", "topk", ("embed", "resid_0", "mlp_1"), d_sae=6)
    units = random_units(case, random.Random(3))
    own = Contestant(REGIONS, units, np.ones((2, len(units))), ["a", "b"], np.ones(len(units), dtype=np.int64))
    batch = case.batch()
    whole, nothing = (batch.measure(ablate_nodes(batch, [make(batch.graph)]), Metric.LOGIT_DIFF) for make in (NodeSet.full, NodeSet.empty))
    everything = keeping(own, (1.0,))[0].trial.mask
    found = batch.measure(ablate_nodes(batch, [everything, everything.inverse()]), Metric.LOGIT_DIFF)
    assert torch.allclose(found[:1], whole, atol=1e-5)
    assert torch.allclose(found[1:], nothing, atol=1e-5)
    assert not torch.allclose(whole, nothing, atol=1e-2)


# --- circuits of units ------------------------------------------------------------------------------------------------


def test_drives_are_ranked_among_the_edges_that_there_are() -> None:
    units = small_units(small_parcellation())
    strength = np.zeros((11, 11))
    strength[0, 5], strength[1, 6], strength[8, 10], strength[5, 8] = 1.0, 3.0, 2.0, 3.0
    strength[5, 0] = 9.0  # against the model's direction
    strength[4, 5] = 4.0
    drives = drives_of(units, strength)
    source, target = drives.edges
    assert list(zip(source.tolist(), target.tolist(), strict=True)) == [(4, 5), (1, 6), (5, 8), (8, 10), (0, 5)]
    sizes = [2, 2, 1, 1, 1, 4, 2, 1, 6, 1, 1]
    for i, j in ((0, 5), (5, 8), (8, 10)):
        assert drives.per_member[i, j] == pytest.approx(strength[i, j] / (sizes[i] * sizes[j]))


def on_paths(units: Units, edges: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """Edges on a path from a unit of a site without parents to y, by networkx."""
    graph = nx.DiGraph(edges)
    roots = [unit for unit in graph if unit != units.output and not units.graph.parents(units.graph.sites[int(units.site_of[unit])])]
    reached = set(roots).union(*(nx.descendants(graph, root) for root in roots)) if roots else set()
    reaching = nx.ancestors(graph, units.output) | {units.output} if units.output in graph else set()
    return {(s, t) for s, t in edges if s in reached and t in reaching}


@pytest.mark.parametrize("seed", range(12))
def test_circuits_are_what_lies_on_paths(seed) -> None:
    case = tiny_case("gpt2", "topk", ("embed", "attn_0", "mlp_0", "resid_0", "mlp_1"), d_sae=8)
    units = random_units(case, random.Random(seed))
    strength = random_weights(units, 1, seed)[0]
    drives = drives_of(units, strength)
    source, target = drives.edges
    circuits = region_circuits(drives, (0.02, 0.05, 0.1, 0.3, 1.0))
    assert [circuit.size for circuit in circuits] == list(dict.fromkeys(max(1, round(s * len(source))) for s in (0.02, 0.05, 0.1, 0.3, 1.0)))
    for circuit in circuits:
        expected = on_paths(units, list(zip(source[: circuit.size].tolist(), target[: circuit.size].tolist(), strict=True)))
        assert set(map(tuple, circuit.edges.rows.tolist())) == expected
        assert set(circuit.units) == {unit for edge in expected for unit in edge} - {units.output}
        assert circuit.n_edges == len(expected)


def test_circuits_as_trials() -> None:
    strength = np.zeros((11, 11))
    strength[0, 5], strength[5, 8], strength[8, 10], strength[1, 6] = 4.0, 3.0, 2.0, 1.0
    own = contestant([[1.0] * 10], drives=strength)
    kept = cutting_circuits(own, region_circuits(own.drives, (0.5, 0.75)))
    # Two edges reach no output; three are a path through blocks of 2 and 4 live features and a site that was not partitioned.
    assert [(one.trial.size, one.share, one.n_edges, one.n_units, one.n_features) for one in kept] == [(2, 0.5, 0, 0, 0), (3, 0.75, 3, 3, 6)]
    assert {one.trial.ablation for one in kept} == {Ablation.EDGE}


# --- one at a time ----------------------------------------------------------------------------------------------------


def test_removals_are_all_but_one_unit() -> None:
    own = contestant([[1.0] * 10], draw=3)
    trials = removals(own, [1, 4])
    assert [(trial.size, trial.draw, trial.complement) for trial in trials] == [(1, 3, False), (4, 3, False)]
    by_hand = [NodeSet.of(GRAPH, ["resid_0", "resid_0"], [2, 5]).inverse(), NodeSet.of(GRAPH, ["resid_0"], [ERROR]).inverse()]
    for trial, expected in zip(trials, by_hand, strict=True):
        assert torch.equal(trial.mask.rows, expected.rows)
        assert trial.mask.complement


def test_drive_removals_are_all_but_one_edge() -> None:
    strength = np.zeros((11, 11))
    strength[0, 5], strength[5, 8], strength[8, 10] = 1.0, 3.0, 2.0
    own = contestant([[1.0] * 10], drives=strength)
    trials = drive_removals(own, 2)
    assert [trial.mask.rows.tolist() for trial in trials] == [[[5, 8]], [[8, 10]]]
    assert all(trial.mask.complement for trial in trials)
    assert [trial.size for trial in trials] == [0, 1]


def values_of(losses: dict[tuple[str, int], np.ndarray], *, full: np.ndarray | float = 3.0, empty: float = -1.0) -> pl.DataFrame:
    """`VALUES` of removals: losses (blocks, tasks, sequences) as shares of m(M) − m(∅), by (method, draw); tasks t0, t1, …"""
    rows = []
    for (method, draw), lost in losses.items():
        blocks, tasks, sequences = lost.shape
        whole = np.broadcast_to(full, (tasks, sequences))
        for b, t, s in np.ndindex(blocks, tasks, sequences):
            value = whole[t, s] - lost[b, t, s] * (whole[t, s] - empty)
            point = (method, "node", "circuit", b, draw, "logit_diff", "counterfactual", "held-out", f"{t} {s}", f"t{t}")
            rows.append((*point, value, whole[t, s], empty))
    return pl.DataFrame(rows, schema=dict(VALUES), orient="row")


def test_the_matrix_is_the_share_that_each_task_loses() -> None:
    random_numbers = np.random.default_rng(0)
    own, by_chance = contestant([[1.0] * 10]), contestant([[1.0] * 10], method=RANDOM, draw=1)
    lost = {(REGIONS, 0): random_numbers.random((2, 2, 6)), (RANDOM, 1): random_numbers.random((1, 2, 6))}
    full = random_numbers.uniform(2, 4, (2, 6))
    matrix = removal_matrix(values_of(lost, full=full), [own, by_chance], bootstrap=FEW)
    assert dict(matrix.schema) == MATRIX
    assert matrix.height == 6
    for row in matrix.iter_rows(named=True):
        b, t = row["unit"], int(row["task"][1])
        shares = lost[row["method"], 0 if row["method"] == REGIONS else 1][b, t]
        whole = full[t] + 1
        assert row["value"] == pytest.approx((shares * whole).mean() / whole.mean())
        assert row["lost"] == pytest.approx((shares * whole).mean())
        assert row["low"] < row["value"] < row["high"]
        assert (row["n"], row["undefined_n"], row["n_features"]) == (6, 0, 2)
        assert row["removed"] == ("resid_0/block " if row["method"] == REGIONS else "random blocks 1: resid_0/block ") + str(b)


def test_the_matrix_where_a_task_has_no_effect() -> None:
    values = values_of({(REGIONS, 0): np.full((1, 2, 5), 0.5)}, full=np.array([[3.0] * 5, [-1.0] * 5]))
    matrix = removal_matrix(values, [contestant([[1.0] * 10])], bootstrap=FEW).sort("task")
    assert matrix["value"].to_list() == [0.5, None]
    assert matrix["undefined_n"].to_list() == [0, 5]


def test_edges_cut_one_at_a_time_lose_the_difference() -> None:
    strength = np.zeros((11, 11))
    strength[0, 5], strength[5, 8] = -1.0, 3.0
    own = contestant([[1.0] * 10], drives=strength)
    lost = np.array([[[0.1, 0.3]], [[0.0, 0.5]]])  # two edges, one task, two sequences; m(M) − m(∅) is 4
    table = drive_table(own, values_of({(REGIONS, 0): lost}), bootstrap=FEW)
    assert table.drop("low", "high").rows() == [
        ("resid_1/block 0", "resid_2/all", 3.0, 3.0, pytest.approx(3 / 24), pytest.approx(0.8), 2),
        ("resid_0/block 0", "resid_1/block 0", -1.0, 1.0, pytest.approx(-1 / 8), pytest.approx(1.0), 2),
    ]
    assert table["low"].to_list() == pytest.approx([0.4, 0.0])
    assert table["high"].to_list() == pytest.approx([1.2, 2.0])


def test_no_edges_cut_is_an_empty_table() -> None:
    for drives in (None, np.zeros((11, 11))):
        table = drive_table(contestant([[1.0] * 10], drives=drives), pl.DataFrame(schema=dict(VALUES)))
        assert table.is_empty()
        assert table.schema["source"] == pl.String


# --- selectivity ------------------------------------------------------------------------------------------------------


def of_method(table: pl.DataFrame, method: str = REGIONS) -> dict:
    return table.row(by_predicate=pl.col("method") == method, named=True)


def losses(kind: str, *, blocks: int = 12, tasks: int = 3, sequences: int = 20, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Every block breaks its own task alone ("one"), all tasks alike ("all"), or none ("none")."""
    random_numbers = np.random.default_rng(seed)
    lost = np.zeros((blocks, tasks, sequences))
    if kind == "one":
        lost[np.arange(blocks), np.arange(blocks) % tasks] = 0.3
    if kind == "all":
        lost += 0.3
    return lost + noise * random_numbers.normal(size=lost.shape)


def test_blocks_that_break_one_task_are_selective_and_those_that_break_all_are_not() -> None:
    table = selectivity(values_of({(REGIONS, 0): losses("one"), (FEATURES, 0): losses("all"), ("harm", 0): -losses("one")}), bootstrap=FEW)
    assert dict(table.schema) == SELECTIVITY
    assert table["method"].to_list() == [REGIONS, *sorted([FEATURES, "harm"])]
    for method, value in ((REGIONS, 1.0), (FEATURES, 0.0), ("harm", 1.0)):  # what is better without a block is an effect of it too
        row = of_method(table, method)
        assert [row["value"], row["low"], row["high"]] == pytest.approx([value] * 3, abs=1e-12)
        assert row["impact"] == pytest.approx(0.3)
        assert row["difference"] == pytest.approx(value - 1)
        assert row["n_blocks"] == 12


def naive_selectivity(lost: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """(selectivity, impact): block by block, tasks and signs decided on the even sequences and judged on the odd ones, and the other way round."""
    share = [(lost[..., k::2] * whole[None, :, k::2]).sum(-1) / whole[:, k::2].sum(-1) for k in (0, 1)]  # (blocks, tasks) each
    own = others = 0.0
    for decide, judge in (share, share[::-1]):
        for block in range(len(lost)):
            task = int(np.argmax(np.abs(decide[block])))
            signed = judge[block] * np.sign(decide[block])
            own += signed[task]
            others += signed[[t for t in range(lost.shape[1]) if t != task]].mean()
    return (own - others) / (own + others), own / 2 / len(lost)


@pytest.mark.parametrize("seed", range(4))
def test_selectivity_is_its_definition(seed) -> None:
    random_numbers = np.random.default_rng(seed)
    lost = losses("one", noise=0.5, seed=seed) + 0.1
    full = random_numbers.uniform(1, 5, lost.shape[1:])
    row = of_method(selectivity(values_of({(REGIONS, 0): lost}, full=full), bootstrap=FEW))
    assert (row["value"], row["impact"]) == pytest.approx(naive_selectivity(lost, full + 1))
    assert row["low"] < row["value"] < row["high"]


def test_noise_alone_has_no_selectivity() -> None:
    rows = [of_method(selectivity(values_of({(REGIONS, 0): losses("none", noise=1.0, seed=seed)}), bootstrap=FEW)) for seed in range(24)]
    assert sum(row["value"] is None for row in rows) >= 20  # undefined
    assert not [row for row in rows if row["value"] is not None and not row["low"] <= 0 <= row["high"]]
    impact = np.array([row["impact"] for row in rows])
    assert abs(impact.mean()) < 3 * impact.std(ddof=1) / np.sqrt(len(impact))
    assert sum(row["impact_low"] < 0 < row["impact_high"] for row in rows) >= 20
    # Without the halves the greatest of three noisy numbers would look like an effect.
    naive = [np.abs(losses("none", noise=1.0, seed=seed).mean(-1)).max(1).mean() for seed in range(24)]
    assert min(naive) > np.abs(impact).max()


@pytest.mark.parametrize(("kind", "more", "true"), [("one", 0.0, 1.0), ("one", 0.1, 0.6), ("all", 0.0, 0.0)])
def test_noise_takes_nothing_from_selectivity(kind, more, true) -> None:
    """Of a block's own task 0.3 is lost and of others nothing, 0.4 and 0.1, or 0.3 of all."""
    rows = [of_method(selectivity(values_of({(REGIONS, 0): losses(kind, noise=0.2, seed=s) + more}), bootstrap=FEW)) for s in range(16)]
    found = np.array([row["value"] for row in rows])
    assert abs(found.mean() - true) < 0.06  # 0.65 for 0.6: of effects no greater than noise the sign is sometimes wrong
    if true in (0.0, 1.0):
        assert sum(row["low"] <= true <= row["high"] for row in rows) >= 14


def test_other_methods_are_compared_on_the_same_resamples() -> None:
    same = losses("one", noise=0.3)
    table = selectivity(values_of({(REGIONS, 0): same, ("again", 0): same, (FEATURES, 0): losses("all", noise=0.3, seed=1)}), bootstrap=FEW)
    again, features = of_method(table, "again"), of_method(table, FEATURES)
    assert (again["difference"], again["difference_low"], again["difference_high"]) == (0, 0, 0)
    assert features["difference_high"] < 0
    assert features["difference"] == pytest.approx(features["value"] - of_method(table)["value"])
    other = selectivity(values_of({(REGIONS, 0): same, (FEATURES, 0): same}), reference=FEATURES, bootstrap=FEW)
    assert other["method"].to_list() == [FEATURES, REGIONS]


def test_draws_of_random_blocks_are_pooled() -> None:
    draws = {i: losses(kind) for i, kind in enumerate(("one", "all", "all", "one"))}
    table = selectivity(values_of({(REGIONS, 0): losses("one"), **{(RANDOM, i): own for i, own in draws.items()}}), bootstrap=FEW)
    row = of_method(table, RANDOM)
    assert row["value"] == pytest.approx((0.3 * 2) / (0.3 * 2 + 0.6 * 2))  # per block and draw: 0.3 of one task, or 0.3 of all
    assert (row["n_blocks"], row["impact"]) == (12, pytest.approx(0.3))


def test_selectivity_needs_two_tasks_and_its_reference() -> None:
    with pytest.raises(NothingToTest, match=r"only t0: ingest a mixture"):
        selectivity(values_of({(REGIONS, 0): losses("one", tasks=1)}))
    with pytest.raises(NothingToTest, match="no values of the reference 'regions': there are heads"):
        selectivity(values_of({("heads", 0): losses("one")}))


def test_a_task_without_effect_counts_nothing() -> None:
    full = np.array([[3.0] * 20, [3.0] * 20, [-1.0] * 20])
    row = of_method(selectivity(values_of({(REGIONS, 0): losses("one", blocks=2)}, full=full), bootstrap=FEW))
    assert row["value"] == pytest.approx(1.0)


def test_halves_of_one_sequence_have_no_intervals() -> None:
    lost = losses("one", noise=0.05, sequences=3) + 0.1
    row = of_method(selectivity(values_of({(REGIONS, 0): lost}), bootstrap=FEW))
    assert row["value"] == pytest.approx(naive_selectivity(lost, np.full((3, 3), 4.0))[0])
    assert [row["low"], row["high"], row["impact_low"]] == [None, None, None]
