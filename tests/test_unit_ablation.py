"""Ablation of units: equal to edge ablation of the sets written out, to the naive definition, and what must hold for every set."""

import random
from dataclasses import replace

import pytest
import torch
from featlas.errors import UserError
from featlas.model.ablation import Errors, WrongGraph, ablate_edges, ablate_nodes
from featlas.model.baselines import Baseline, baseline_nodes
from featlas.model.masks import EdgeSet
from featlas.model.sites import OUTPUT, parse_site
from featlas.model.targets import ProbeTarget
from featlas.model.unit_ablation import ablate_units
from featlas.model.units import NotUnits, UnitEdges, Units, single_features, whole_site

from .ablation_cases import BASELINES, random_experiment, tiny_case
from .hand_worked_ablation import CIRCUITS
from .micro import FAMILIES
from .naive_ablation import naive_edge_ablation
from .test_ablation import SITES, assert_near, hand_worked_batch, hand_worked_set
from .unit_cases import random_unit_edges, random_units


def drawn_sets(units, rng):
    """Sets of several densities, complements, the full and the empty one."""
    sets = [random_unit_edges(units, rng, rng.choice([0.2, 0.5, 0.9]), rng.random() < 0.4) for _ in range(3)]
    return [*sets, sets[0].inverse(), UnitEdges.full(units), UnitEdges.empty(units)]


def assert_equal_to_the_sets_written_out(case, seed, errors):
    rng, batch = random.Random(seed), case.batch()
    sets = drawn_sets(random_units(case, rng), rng)
    ours = ablate_units(batch, sets, errors=errors)
    assert_near(ours, ablate_edges(batch, [one.expanded() for one in sets], errors=errors))
    if errors is not Errors.DEAD:
        assert torch.equal(ours[-2], batch.clean_end), "the full set is the clean run"


@pytest.mark.parametrize("seed", range(36))
def test_equal_to_edge_ablation_of_the_sets_written_out(seed):
    drawn = random_experiment(seed)
    assert_equal_to_the_sets_written_out(drawn.case, seed, drawn.errors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1150))
def test_many_sets_equal_edge_ablation_of_the_sets_written_out(seed):
    for errors in Errors:
        assert_equal_to_the_sets_written_out(random_experiment(seed).case, seed, errors)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("errors", list(Errors))
def test_every_baseline_and_treatment_of_error_nodes(baseline, errors):
    family = FAMILIES[BASELINES.index(baseline)]
    assert_equal_to_the_sets_written_out(tiny_case(family, "topk", SITES, baseline=baseline, length=5), 1, errors)


@pytest.mark.parametrize("seed", [2, 5, 11, 19])
def test_equal_to_the_definition(seed):
    drawn, rng = random_experiment(seed), random.Random(seed)
    sets = [random_unit_edges(random_units(drawn.case, rng), rng, 0.5, complement=i == 1) for i in range(2)]
    ours = ablate_units(drawn.case.batch(), sets, errors=drawn.errors)  # of two partitions
    run = lambda one: naive_edge_ablation(*drawn.case.oracle(), one.expanded(), errors=drawn.errors, target=drawn.case.target)
    assert_near(ours, torch.stack([run(one) for one in sets]))


def test_units_of_single_features_are_features():
    """By hand: each circuit of single edges, as edges of units."""
    batch = hand_worked_batch()
    units = single_features(batch.graph, batch.clean.dictionaries)
    found = []
    for edges, _, _ in CIRCUITS:
        rows = hand_worked_set(batch, edges).rows
        of = lambda site, node: units.output if batch.graph.sites[site] == OUTPUT else int(units.of[batch.graph.sites[site]][node])
        own = UnitEdges.of(units, [of(s, i) for s, i in rows[:, [0, 1]].tolist()], [of(s, i) for s, i in rows[:, [3, 4]].tolist()])
        assert torch.equal(own.expanded().rows, rows)
        found += [own, own.inverse()]
    values = batch.measure(ablate_units(batch, found), batch.clean.target.metric)[:, 0].tolist()
    assert values == [y for _, alive, without in CIRCUITS for y in (alive, without)]


def one_unit_a_site(case):
    """The features and the error node of each site as one unit."""
    return Units.from_labels(case.graph, {site: torch.zeros(d_sae + 1) for site, d_sae in case.d_sae.items()})


def test_one_unit_a_site_is_all_of_its_nodes():
    case = tiny_case("llama", "topk", ("embed", "resid_0", "resid_1"), baseline="mean")
    batch, units = case.batch(), one_unit_a_site(case)
    chain = UnitEdges.of(units, [0, 1, 2], [1, 2, 3])  # every edge there is
    broken = UnitEdges.of(units, [0, 2], [1, 3])
    whole, cut, beginning = ablate_units(batch, [chain, broken, UnitEdges.of(units, [0, 1], [1, 2])])
    assert torch.equal(whole, batch.clean_end)
    empty = ablate_units(batch, [UnitEdges.empty(units)])[0]
    assert_near(cut, empty)
    assert_near(beginning, empty)


def test_cutting_a_unit_from_all_its_readers_is_its_node_ablation():
    """Where every reader still has an edge: under any baseline."""
    case = tiny_case("gemma2", "jumprelu", batch=3)
    rng, batch = random.Random(1), case.batch()
    units = random_units(case, rng)
    chosen = [unit for unit in range(len(units)) if len(units.at(case.graph.sites[int(units.site_of[unit])])) > 1]
    cuts = [UnitEdges.of(units, [u] * int(units.joined[u].sum()), units.joined[u].nonzero().flatten().tolist()).inverse() for u in chosen]
    assert_near(ablate_units(batch, cuts), ablate_nodes(batch, [units.nodes([u]).inverse() for u in chosen]))


@pytest.mark.parametrize("kind", ["topk", "linear"])
def test_where_the_target_is_a_sum_of_what_it_reads_cuts_of_its_edges_add_up(kind):
    """A probe of resid_0, which is the sum of attn_0, mlp_0 and the clean stream: a set of edges into it split in two."""
    case = replace(tiny_case("llama", kind, ("attn_0", "mlp_0")), target=ProbeTarget(parse_site("resid_0"), torch.ones(8), torch.tensor(0.0), -1))
    rng, batch = random.Random(3), case.batch()
    units = random_units(case, rng)
    sources = units.joined[:, units.output].nonzero().flatten().tolist()
    rng.shuffle(sources)
    cuts = [sources[:3], sources[3:5], sources[:5]]
    one, other, both = batch.clean_end - ablate_units(batch, [UnitEdges.of(units, cut, [units.output] * len(cut)).inverse() for cut in cuts])
    assert_near(one + other, both)
    assert float(one.abs().max()) > 1e-3


def test_how_many_sets_go_together_their_order_and_the_memory_change_nothing():
    case = tiny_case("gpt_neox", "topk", SITES, batch=2, length=3, d_sae=5)
    rng, batch = random.Random(6), case.batch()
    sets = [*drawn_sets(random_units(case, rng), rng), *drawn_sets(random_units(case, rng), rng)]
    together = ablate_units(batch, sets)
    assert_near(torch.cat([ablate_units(batch, [one]) for one in sets]), together)
    assert_near(ablate_units(batch, sets, memory=1), together)
    assert_near(ablate_units(batch, sets[::-1], memory=100_000), together.flip(0))
    assert ablate_units(batch, []).shape == (0, 2, 8)


def test_the_order_of_sequences_and_the_size_of_batches_change_nothing():
    case = tiny_case("gemma2", "topk", batch=4, length=6, d_sae=6, heads=True)
    rng = random.Random(2)
    sets = drawn_sets(random_units(case, rng), rng)
    together = ablate_units(case.batch(), sets)
    assert_near(ablate_units(case.only(2, 0, 3, 1).batch(), sets), together[:, [2, 0, 3, 1]])
    assert_near(torch.cat([ablate_units(case.only(i).batch(), sets) for i in range(4)], dim=1), together)
    assert_near(ablate_units(case.only(1, 1).batch(), sets), together[:, [1, 1]])


def test_equal_prompts_give_the_clean_run_for_every_set():
    case = tiny_case("llama", "topk", SITES, baseline="counterfactual")
    case = replace(case, pairs=replace(case.pairs, corrupt=case.pairs.clean))
    clean = case.batch().clean
    batch = clean.with_baseline(baseline_nodes(case.binding, case.dictionaries, case.pairs, clean.values, Baseline.COUNTERFACTUAL))
    rng = random.Random(8)
    sets = drawn_sets(random_units(case, rng), rng)
    assert torch.equal(ablate_units(batch, sets), batch.clean_end.expand(len(sets), -1, -1))


def test_units_of_other_sites_or_dictionaries_are_refused():
    case, other, wide = tiny_case(), tiny_case(names=("embed", "attn_0")), tiny_case(d_sae=9)
    with pytest.raises(WrongGraph, match="units over embed, attn_0, y") as raised:
        ablate_units(case.batch(), [UnitEdges.full(one_unit_a_site(other))])
    assert isinstance(raised.value, UserError)
    with pytest.raises(NotUnits, match="9 features of embed are in units: its dictionary has 8"):
        ablate_units(case.batch(), [UnitEdges.full(one_unit_a_site(wide))])


def test_error_units_alone_are_no_source_where_errors_are_kept_or_dead():
    """Whether a unit's features are live depends on units that have features."""
    case = tiny_case("llama", "relu", ("embed", "resid_0", "resid_1"))
    parts = {site: whole_site(d, site)[0] for site, d in case.dictionaries.items()}
    units, batch = Units.from_labels(case.graph, parts), case.batch()
    by_errors = UnitEdges.of(units, [1, 2], [2, 4])  # embed/error → resid_0/all → resid_1/all
    for errors in (Errors.KEPT, Errors.DEAD):
        ours, empty = ablate_units(batch, [by_errors, UnitEdges.empty(units)], errors=errors)
        theirs = ablate_edges(batch, [by_errors.expanded(), EdgeSet.empty(case.graph)], errors=errors)
        assert_near(torch.stack([ours, empty]), theirs)


def test_no_hook_is_left_behind():
    case = tiny_case("gpt2", "topk", heads=True)
    rng = random.Random(0)
    ablate_units(case.batch(), drawn_sets(random_units(case, rng), rng))
    case.binding.assert_no_hooks()
