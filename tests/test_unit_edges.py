"""Attribution between units against the engine's single edges, the definition, and what must hold of sums."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from featlas.ingest import budget, unit_edges
from featlas.ingest.effective import Baseline, EdgeSettings, FirstFactor, Positions, attribute, node_attributions, prepare
from featlas.ingest.unit_edges import UnitRows, attribute_units, unit_columns
from featlas.model.sites import OUTPUT, SiteGraph, parse_site
from featlas.model.targets import FeatureTarget
from featlas.model.units import NotUnits, Units, heads, single_features

from .compare_edges import random_means, random_moments, setting
from .micro import FAMILIES
from .micro_dictionaries import KINDS
from .micro_pairs import tiny_pairs
from .naive import naive_edges

LAST_LAYER = ("resid_0", "attn_1", "mlp_1", "resid_1")
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def random_units(graph: SiteGraph, dictionaries, n: int = 4, seed: int = 0) -> Units:
    """Each site's nodes in `n` random units, the error node among the features of one of them."""
    generator = torch.Generator().manual_seed(seed)
    labels = {}
    for site in graph.sites[:-1]:
        size = dictionaries[site].d_sae + 1
        labels[site] = torch.cat([torch.arange(n), torch.randint(n, (size - n,), generator=generator)])[torch.randperm(size, generator=generator)]
    return Units.from_labels(graph, labels)


def summed(prepared, units: Units) -> np.ndarray:
    """The engine's single-position edges at threshold 0, added by the units of their ends."""
    found = np.zeros((prepared.shape[0], len(units) + 1, len(units) + 1))
    of = [units.of[site].numpy() if site != OUTPUT else np.array([units.output]) for site in prepared.graph.sites]
    for block in attribute(replace(prepared, settings=replace(prepared.settings, positions=Positions.KEEP, threshold=0.0, max_edges=None))):
        for sequence, src_site, src, _, dest_site, dest, _, weight in zip(*(column.tolist() for column in block), strict=True):
            found[sequence, of[src_site][src], of[dest_site][dest]] += weight
    return found


def assert_same(ours, theirs, tolerance: float = 2e-5) -> None:
    """Equal to `tolerance` of the greatest magnitude into the same unit: float32 rounding is relative to what is added."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.abs(theirs).max() > 0
    scale = np.abs(theirs).max(axis=(0, 1)) + 0.01 * np.abs(theirs).max()
    assert (np.abs(ours - theirs) <= tolerance * scale).all(), (np.abs(ours - theirs) / scale).max()


def prepared_units(case, settings, means=None, target=None, n: int = 4, seed: int = 0):
    prepared = prepare(*case, settings, means, *([] if target is None else [target]))
    return prepared, random_units(prepared.graph, prepared.dictionaries, n, seed)


def assert_sums(case, settings, means=None, target=None) -> None:
    prepared, units = prepared_units(case, settings, means, target)
    assert_same(attribute_units(prepared, units), summed(prepared, units))


# ---- the sums of single edges


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_of_the_edges_on_every_family(family):
    assert_sums(setting(family, "topk", LAST_LAYER, batch=1, length=5), EdgeSettings(steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 3])
def test_sums_of_the_edges_on_every_family_at_all_sites(family, steps):
    assert_sums(setting(family, "relu"), EdgeSettings(steps=steps))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [slow(1), 3])
def test_sums_of_the_edges_for_every_dictionary_kind(kind, steps):
    names = ("attn_0", "attn_1") if kind == "per_head_linear" else ("resid_0", "attn_1", "mlp_1", "resid_1")
    assert_sums(setting("gpt2", kind, names, heads=kind == "per_head_linear", batch=1, length=5), EdgeSettings(steps=steps))


@pytest.mark.parametrize("names", [("resid_0", "resid_2"), ("embed", "mlp_1"), ("attn_0", "resid_1", "attn_2"), ("mlp_1",)], ids="+".join)
def test_sums_of_the_edges_with_sites_left_out_and_late_starts(names):
    assert_sums(setting("llama", "relu", names, n_layers=3), EdgeSettings(steps=2))


BASELINES = [
    {"baseline": Baseline.ZERO}, {"baseline": Baseline.MEAN}, {"baseline": Baseline.MEAN, "per_position": True},
    {"baseline": Baseline.NOISE, "noise_scale": 0.5, "noise_seed": 3},
]  # fmt: skip


@pytest.mark.parametrize("choice", BASELINES, ids=lambda c: " ".join(map(str, c.values())))
@pytest.mark.parametrize("kind", ["topk", slow("relu/layer_norm")])
@pytest.mark.parametrize("steps", [slow(1), 3])
def test_sums_of_the_edges_from_every_baseline(choice, kind, steps):
    case = setting("llama", kind, ("resid_0", "mlp_1", "resid_1"), batch=1)
    assert_sums(case, EdgeSettings(steps=steps, **choice), random_moments(case[1]))


def test_sums_of_the_edges_from_another_sequence():
    binding, dictionaries, batch = setting("llama", "topk", LAST_LAYER)
    donated = replace(batch, donor=tiny_pairs(len(batch.clean), batch.clean.shape[1], seed=77).clean)
    assert_sums((binding, dictionaries, donated), EdgeSettings(steps=3, baseline=Baseline.RESAMPLE))


@pytest.mark.parametrize("how", [FirstFactor.INTERPOLATED, FirstFactor.CLEAN])
def test_sums_of_the_edges_with_other_first_factors(how):
    assert_sums(setting("qwen3", "relu", LAST_LAYER), EdgeSettings(steps=4, first_factor=how))


@pytest.mark.parametrize("steps", [1, 3])
def test_sums_of_the_edges_with_head_outputs_and_a_feature_as_the_output(steps):
    binding, dictionaries, batch = setting("gemma2", "relu", ("embed", "attn_0", "mlp_0", "attn_1"), heads=True)
    site = parse_site("attn_1")
    values = binding.forward(batch.clean, {site: dictionaries[site].basis}).values[site]
    target = FeatureTarget(site, dictionaries[site], int(dictionaries[site].encode(values)[:, -1].amin(0).argmax()))
    assert_sums((binding, dictionaries, batch), EdgeSettings(steps=steps), target=target)


def test_threshold_limit_and_screen_do_not_matter():
    case = setting("llama", "relu", LAST_LAYER)
    prepared, units = prepared_units(case, EdgeSettings(steps=2))
    other = prepare(*case, EdgeSettings(steps=2, threshold=0.5, max_edges=1, screen=0.5, positions=Positions.KEEP))
    assert torch.equal(attribute_units(prepared, units), attribute_units(other, units))


# ---- the definition


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["topk", "identity"])
def test_sums_of_the_definitions_edges(kind, steps):
    case = setting("llama", kind, ("attn_0", "resid_0", "mlp_1"), heads=kind == "identity", batch=1, length=4)
    settings = EdgeSettings(steps=steps, positions=Positions.KEEP)
    prepared, units = prepared_units(case, settings)
    place = {site.name: site for site in prepared.graph.sites}
    expected = np.zeros((1, len(units) + 1, len(units) + 1))
    for (s, source, i, _, target, j, _), weight in naive_edges(*case, settings).items():
        ends = [units.output if place[name] == OUTPUT else int(units.of[place[name]][node]) for name, node in ((source, i), (target, j))]
        expected[s, ends[0], ends[1]] += weight
    assert_same(attribute_units(prepared, units), expected)


# ---- what holds of sums


def test_single_features_are_the_edges_themselves():
    prepared = prepare(*setting("gpt_neox", "topk", LAST_LAYER, batch=1), EdgeSettings(steps=2))
    units = single_features(prepared.graph, prepared.dictionaries)
    assert_same(attribute_units(prepared, units), summed(prepared, units))


def test_a_merged_unit_has_the_sum_of_its_parts():
    prepared, fine = prepared_units(setting("llama", "relu", LAST_LAYER), EdgeSettings(steps=3), n=6)
    merged = {site: torch.unique(own // 2, return_inverse=True)[1] for site, own in fine.of.items()}
    coarse = Units.from_labels(fine.graph, merged)
    into = torch.zeros(len(fine) + 1, len(coarse) + 1, dtype=torch.float64)
    for site in fine.of:
        into[fine.of[site], coarse.of[site]] = 1
    into[fine.output, coarse.output] = 1
    assert_same(attribute_units(prepared, coarse), into.T @ attribute_units(prepared, fine) @ into)


def test_into_the_output_units_have_the_sums_of_their_nodes_attributions():
    """With one site before y a node's edge into y is its attribution."""
    case = setting("qwen2", "relu", ("mlp_1",))
    prepared, units = prepared_units(case, EdgeSettings(steps=3))
    ((site, features, errors),) = node_attributions(prepared)
    nodes = torch.cat([features, errors[..., None]], dim=-1).sum(1).double()  # (batch, d_sae + 1)
    expected = torch.zeros(len(nodes), len(units)).double().index_add_(1, units.of[site], nodes)
    assert_same(attribute_units(prepared, units)[:, :-1, -1:], expected[:, :, None])


def test_at_one_step_all_that_leaves_a_node_is_its_attribution():
    """Where every reader's nodes all changed, the chain rule adds the edges out of a unit up to the whole gradient times its change."""
    case = setting("llama", "linear", ("attn_1", "mlp_1", "resid_1"))
    means = random_means(case[1])
    prepared, units = prepared_units(case, EdgeSettings(steps=1, baseline=Baseline.MEAN), means)
    leaving = attribute_units(prepared, units).sum(2)
    for site, features, errors in node_attributions(prepared):
        nodes = torch.cat([features, errors[..., None]], dim=-1).sum(1).double()
        expected = torch.zeros(len(nodes), len(units)).double().index_add_(1, units.of[site], nodes)[:, list(units.at(site))]
        assert_same(leaving[:, None, list(units.at(site))], expected[:, None])


def test_heads_are_slices_of_the_neurons():
    case = setting("llama", "identity", ("attn_0", "attn_1"), heads=True)
    prepared = prepare(*case, EdgeSettings(steps=1))
    labels = {site: heads(prepared.dictionaries[site], site, case[0].n_heads) for site in prepared.graph.sites[:-1]}
    units = Units.from_labels(prepared.graph, {s: of for s, (of, _) in labels.items()}, {s: names for s, (_, names) in labels.items()})
    assert units.names[1] == "attn_0/head 1"
    ours = attribute_units(prepared, units)
    assert_same(ours, summed(prepared, units))
    error = [i for i, name in enumerate(units.names) if name.endswith("error")]
    assert not ours[:, error].any(), "an identity has no error"


# ---- memory


@pytest.mark.parametrize("kind", ["topk", "linear", "relu/layer_norm"])
def test_small_chunks_change_nothing(kind, monkeypatch):
    prepared, units = prepared_units(setting("gpt_neox", kind, LAST_LAYER, batch=1, length=4), EdgeSettings(steps=2))
    whole = attribute_units(prepared, units)
    monkeypatch.setattr(budget, "CHUNKS", 10**12)  # a chunk is one item
    monkeypatch.setattr(unit_edges, "CHUNKS", 10**12)  # and nothing is kept
    assert_same(attribute_units(prepared, units), whole)


def test_a_product_and_a_sum_of_members_are_the_same(monkeypatch):
    prepared, units = prepared_units(setting("llama", "relu", LAST_LAYER), EdgeSettings(steps=3))
    found = []
    for advantage in (0, 10**9):
        monkeypatch.setattr(unit_edges, "_PRODUCT_ADVANTAGE", advantage)
        found.append(attribute_units(prepared, units))
    assert_same(*found)


def test_one_row_for_each_unit_and_cell(monkeypatch):
    prepared, units = prepared_units(setting("llama", "relu", LAST_LAYER), EdgeSettings(steps=2))
    made = []
    monkeypatch.setattr(UnitRows, "of", staticmethod(lambda *of, real=UnitRows.of: made.append(real(*of)) or made[-1]))
    attribute_units(prepared, units)
    assert made
    for rows in made:
        code = rows.cell * 4 + rows.unit
        assert (code.diff() > 0).all()
        assert len(rows) < len(rows.members)


def test_columns_are_the_blocks_of_the_matrix():
    prepared, units = prepared_units(setting("llama", "topk"), EdgeSettings(steps=1))
    whole, found = attribute_units(prepared, units), torch.zeros(2, len(units) + 1, len(units) + 1, dtype=torch.float64)
    order = []
    for site, sources, targets, weight in unit_columns(prepared, units):
        order.append(site)
        assert {units.graph.sites[i] for i in units.site_of[sources].tolist()} == set(units.graph.parents(site))
        found[:, sources[:, None], targets] = weight
    assert order == [site for site in reversed(units.graph.sites) if units.graph.parents(site)]
    assert torch.equal(found, whole)


def test_units_of_other_sites_or_dictionaries_are_refused():
    case = setting("llama", "topk", LAST_LAYER)
    prepared, units = prepared_units(case, EdgeSettings(steps=1))
    with pytest.raises(NotUnits, match="the units are of resid_0, attn_1"):
        attribute_units(prepare(case[0], {s: case[1][s] for s in list(case[1])[:2]}, case[2], EdgeSettings(steps=1)), units)
    site = parse_site("mlp_1")
    other = Units.from_labels(units.graph, {s: (own - own.min() if s != site else torch.arange(3)) for s, own in units.of.items()})
    with pytest.raises(NotUnits, match="mlp_1 have 3 nodes, its dictionary 24 features"):
        attribute_units(prepared, other)
