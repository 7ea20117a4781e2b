"""Node ablation: by hand, against one patched run of the model, and against edge ablation on the complete graph of the kept nodes."""

import random
from dataclasses import replace

import pytest
import torch
from featlas.model.ablation import Errors, WrongGraph, ablate_edges, ablate_nodes, clean_run
from featlas.model.baselines import Baseline, baseline_nodes
from featlas.model.masks import ERROR, NodeSet
from featlas.model.metrics import Metric
from featlas.model.unit_ablation import ablate_units

from .ablation_cases import BASELINES, random_experiment, random_nodes, tiny_case
from .hand_worked import hand_worked_case
from .hand_worked_ablation import CLEAN, CORRUPT, NODES
from .micro import FAMILIES
from .micro_dictionaries import KINDS
from .naive_ablation import Model, alive_nodes, complete_edges, every_kept_node_has_a_kept_parent, naive_node_ablation
from .test_ablation import SITES, assert_near
from .unit_cases import random_unit_edges, random_units


def assert_equal_to_the_definition(case, nodes, errors=Errors.LISTED):
    ours = ablate_nodes(case.batch(), nodes, errors=errors)
    theirs = [naive_node_ablation(*case.oracle(), one, errors=errors, target=case.target) for one in nodes]
    assert_near(ours, torch.stack(theirs))


def test_dead_nodes_change_the_output_as_worked_out_by_hand():
    binding, dictionaries, pairs = hand_worked_case()
    clean = clean_run(binding, dictionaries, pairs)
    batch = clean.with_baseline(baseline_nodes(binding, dictionaries, pairs, clean.values, Baseline.COUNTERFACTUAL))
    sets = [NodeSet.of(batch.graph, [site for site, _ in dead], [node for _, node in dead]).inverse() for dead, _ in NODES]
    found = batch.measure(ablate_nodes(batch, [*sets, NodeSet.full(batch.graph), NodeSet.empty(batch.graph)]), Metric.LOGIT_DIFF)
    assert found[:, 0].tolist() == [*(y for _, y in NODES), CLEAN, CORRUPT]


@pytest.mark.parametrize("seed", range(36))
def test_random_nodes_equal_the_definition(seed):
    drawn = random_experiment(seed)
    assert_equal_to_the_definition(drawn.case, drawn.nodes, drawn.errors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1250))
def test_many_random_nodes_equal_the_definition(seed):
    drawn = random_experiment(seed)
    assert_equal_to_the_definition(drawn.case, drawn.nodes, drawn.errors)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "per_head_linear"])
def test_every_kind_of_dictionary(kind):
    case = tiny_case("gemma2", kind, ("attn_0", "mlp_0", "resid_1"))
    rng = random.Random(1)
    sets = [random_nodes(case, rng, share, by_position=i == 1, complement=i == 2) for i, share in enumerate((0.5, 0.5, 0.2))]
    for errors in Errors:
        assert_equal_to_the_definition(case, sets, errors)


def with_kept_parents(case, rng, share):
    """A random set in which every kept node reads a kept one: one feature of each site is always kept, and all of the first site.

    In a set of edges error nodes that are kept read all features of the first site at their clean value, whether or not another node does.
    """
    drawn = random_nodes(case, rng, share)
    always = {(s, 0) for s in range(len(case.graph.sites) - 1)} | {(0, node) for node in range(case.d_sae[case.graph.sites[0]])}
    rows = always | {(site, node) for site, node, _ in drawn.rows.tolist()}
    names = [site.name for site in case.graph.sites]
    return NodeSet.of(case.graph, [names[s] for s, _ in rows], [node for _, node in rows])


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("errors", list(Errors))
def test_equal_to_edge_ablation_on_the_complete_graph_where_every_kept_node_has_a_kept_parent(baseline, errors):
    case = tiny_case(FAMILIES[BASELINES.index(baseline)], "relu", SITES, baseline=baseline, length=3, d_sae=5, heads=baseline == "zero")
    model, rng = Model.of(case.binding, case.dictionaries), random.Random(7)
    sets = [with_kept_parents(case, rng, share) for share in (0.2, 0.6)]
    assert all(every_kept_node_has_a_kept_parent(model, one, case.length) for one in sets)
    batch = case.batch()
    by_nodes = ablate_nodes(batch, sets, errors=errors)
    by_edges = ablate_edges(batch, [complete_edges(model, one, case.length) for one in sets], errors=errors)
    assert_near(by_nodes, by_edges)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_edge_ablation_on_the_complete_graph_always_under_the_counterfactual_baseline(family):
    """A kept node without a kept parent is what the corrupted sequence makes of it, which is its baseline."""
    case = tiny_case(family, {name: ("topk", "jumprelu", "gated")[i % 3] for i, name in enumerate(SITES)}, baseline="counterfactual", length=3)
    model, rng = Model.of(case.binding, case.dictionaries), random.Random(9)
    sets = [random_nodes(case, rng, 0.15), random_nodes(case, rng, 0.3, by_position=True), random_nodes(case, rng, 0.3, complement=True)]
    sets += [NodeSet.of(case.graph, ["resid_0", "mlp_1", "mlp_0"], [1, ERROR, 2])]
    assert not every_kept_node_has_a_kept_parent(model, sets[-1], case.length)
    batch = case.batch()
    by_edges = ablate_edges(batch, [complete_edges(model, one, case.length) for one in sets])
    assert_near(ablate_nodes(batch, sets), by_edges)


def test_under_another_baseline_a_kept_node_without_a_kept_parent_tells_the_two_apart():
    case = tiny_case("llama", "relu", baseline="mean")
    alone = NodeSet.of(case.graph, ["mlp_1"] * 9, [ERROR, *range(8)])
    model = Model.of(case.binding, case.dictionaries)
    batch = case.batch()
    by_nodes, by_edges = ablate_nodes(batch, [alone]), ablate_edges(batch, [complete_edges(model, alone, case.length)])
    empty = ablate_nodes(batch, [NodeSet.empty(case.graph)])
    assert_near(by_edges, empty)  # mlp_1 has no edge into it: dead
    assert float((by_nodes - empty).abs().max()) > 1e-3


def test_the_full_set_is_the_clean_run_and_the_empty_one_all_baselines():
    case = tiny_case("gemma3_text", "gated", batch=3)
    batch = case.batch()
    full, empty = ablate_nodes(batch, [NodeSet.full(case.graph), NodeSet.empty(case.graph)])
    assert_near(full, batch.clean_end)
    assert_near(empty, naive_node_ablation(*case.oracle(), NodeSet.empty(case.graph)))
    assert float((full - empty).abs().max()) > 1e-3


@pytest.mark.parametrize("by_position", [False, True])
def test_the_complement_of_the_complement_and_the_complement_written_out(by_position):
    case = tiny_case("qwen3", "jumprelu", length=3)
    model = Model.of(case.binding, case.dictionaries)
    kept = random_nodes(case, random.Random(4), 0.5, by_position=by_position)
    others = sorted(alive_nodes(model, kept.inverse(), case.length, "listed"))
    names = [site.name for site in case.graph.sites]
    written = NodeSet.of(case.graph, [names[s] for s, _, _ in others], [i for _, i, _ in others], [p for _, _, p in others])
    once, twice, other, out = ablate_nodes(case.batch(), [kept, kept.inverse().inverse(), kept.inverse(), written])
    assert torch.equal(once, twice)
    assert_near(other, out)
    assert float((once - other).abs().max()) > 1e-3


def test_order_batches_sets_and_memory_change_nothing():
    case = tiny_case("gpt_neox", "topk", batch=3, length=5, heads=True)
    rng = random.Random(3)
    sets = [random_nodes(case, rng, 0.5, by_position=i == 1, complement=i == 2) for i in range(4)]
    together = ablate_nodes(case.batch(), sets)
    assert_near(ablate_nodes(case.only(2, 0, 1).batch(), sets), together[:, [2, 0, 1]])
    assert_near(torch.cat([ablate_nodes(case.only(i).batch(), sets) for i in range(3)], dim=1), together)
    assert_near(torch.cat([ablate_nodes(case.batch(), [one]) for one in sets]), together)
    assert_near(ablate_nodes(case.batch(), sets, memory=1), together)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_that_differ_late_are_run_from_there_on(family):
    """Prompts that differ at their last two tokens alone: behind a clean beginning as from the first position on."""
    case = tiny_case(family, "topk", ("embed", "attn_0", "resid_0", "mlp_1"), length=6, batch=2)
    pairs = replace(case.pairs, corrupt=torch.cat([case.pairs.clean[:, :4], (case.pairs.clean[:, 4:] + 7) % 48], dim=1))
    values = case.batch().clean.values
    case = replace(case, pairs=pairs, base=baseline_nodes(case.binding, case.dictionaries, pairs, values, Baseline.COUNTERFACTUAL))
    rng = random.Random(2)
    sets = [random_nodes(case, rng, share, complement=i % 2 == 0) for i, share in enumerate((0.05, 0.4, 0.3, 0.7))]
    late, early = case.batch(), case.batch()
    early.clean.__dict__["begins_late"] = False  # as with an attention that can be run on whole sequences alone
    assert late.clean.begins_late
    assert_near(ablate_nodes(late, sets), ablate_nodes(early, sets))
    assert_near(ablate_nodes(late, sets), torch.stack([naive_node_ablation(*case.oracle(), one) for one in sets]))
    units = random_units(case, rng)
    edges = [random_unit_edges(units, rng, 0.4), random_unit_edges(units, rng, 0.2, complement=True)]
    assert_near(ablate_units(late, edges), ablate_units(early, edges))


def test_a_set_over_other_sites_is_refused():
    case, other = tiny_case(), tiny_case(names=("embed", "attn_0"))
    with pytest.raises(WrongGraph, match="a set over embed, attn_0, y"):
        ablate_nodes(case.batch(), [NodeSet.full(other.graph)])


def test_what_no_chosen_site_feeds_stays_clean():
    """A graph that starts late: resid_0 and attn_1 are no part of it, and resid_1 reads them at their clean value."""
    case = tiny_case("llama", "relu", ("mlp_1", "resid_1"), baseline="zero")
    kept = NodeSet.of(case.graph, ["resid_1"] * 9, [ERROR, *range(8)])
    end = ablate_nodes(case.batch(), [kept])[0]
    values = case.binding.forward(case.pairs.clean, {site: dictionary.basis for site, dictionary in case.dictionaries.items()}).values
    mlp, resid = case.graph.sites[:2]
    assert_near(end, (values[resid] - values[mlp] + case.dictionaries[mlp].b_dec)[:, -1])
    assert case.graph.parents(resid) == (mlp,)
