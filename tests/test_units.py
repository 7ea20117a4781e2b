"""Units: partitions of a site graph's nodes, and sets of edges between them."""

import random

import pytest
import torch
from featlas.model.masks import ERROR, EdgeSet, NodeSet, NotAnEdge
from featlas.model.sites import parse_site
from featlas.model.units import NotUnits, UnitEdges, Units, heads, single_features, whole_site

from .ablation_cases import tiny_case
from .unit_cases import random_unit_edges, random_units

SITES = ("embed", "mlp_0", "resid_0")
EMBED, MLP, RESID = (parse_site(name) for name in SITES)


def three_features():
    """Three features a site; units 0, 1 at embed, 2 at mlp_0, 3 to 5 at resid_0."""
    case = tiny_case("llama", "relu", SITES, d_sae=3, batch=1)
    labels = {EMBED: [0, 1, 0, 1], MLP: [0, 0, 0, 0], RESID: [1, 0, 1, 2]}
    return case, Units.from_labels(case.graph, {site: torch.tensor(own) for site, own in labels.items()})


def test_a_partition_by_hand():
    case, units = three_features()
    assert len(units) == units.output == 6
    assert units.names == ("embed/0", "embed/1", "mlp_0/0", "resid_0/0", "resid_0/1", "resid_0/2", "y")
    assert units.site_of.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert units.sizes.tolist() == [2, 2, 4, 1, 2, 1, 1]
    assert [units.at(site) for site in (EMBED, MLP, RESID)] == [range(2), range(2, 3), range(3, 6)]
    assert [units.members(unit).tolist() for unit in range(7)] == [[0, 2], [ERROR, 1], [ERROR, 0, 1, 2], [1], [0, 2], [ERROR], [0]]
    reads = {(i, j) for i in (0, 1) for j in (2, 3, 4, 5)} | {(2, j) for j in (3, 4, 5)} | {(j, 6) for j in (3, 4, 5)}
    assert set(map(tuple, units.joined.nonzero().tolist())) == reads
    chosen = units.nodes([4, 1, 6])
    wanted = NodeSet.of(case.graph, ["embed", "embed", "resid_0", "resid_0"], [ERROR, 1, 0, 2])
    assert torch.equal(chosen.rows, wanted.rows)


def test_edges_between_units_are_all_edges_between_their_members():
    case, units = three_features()
    edges = UnitEdges.of(units, [1, 5, 1], [4, 6, 4])
    assert len(edges) == 2
    wanted = EdgeSet.of(case.graph, ["embed"] * 4 + ["resid_0"], [ERROR, ERROR, 1, 1, ERROR], ["resid_0"] * 4 + ["y"], [0, 2, 0, 2, 0])
    assert torch.equal(edges.expanded().rows, wanted.rows)
    assert not edges.expanded().complement
    assert edges.inverse().expanded().complement
    assert set(map(tuple, edges.alive.nonzero().tolist())) == {(1, 4), (5, 6)}
    assert torch.equal(edges.inverse().alive, units.joined & ~edges.alive)
    assert torch.equal(UnitEdges.full(units).alive, units.joined)
    assert not UnitEdges.empty(units).alive.any()
    assert len(UnitEdges.empty(units).expanded()) == 0


def test_units_of_random_labels_are_a_partition():
    case = tiny_case("gpt2", "topk", d_sae=7)
    rng = random.Random(0)
    for _ in range(5):
        units = random_units(case, rng)
        every = units.nodes(range(len(units)))
        assert len(every) == sum(d_sae + 1 for d_sae in case.d_sae.values()) == int(units.sizes[:-1].sum())
        edges = random_unit_edges(units, rng, 0.5)
        sizes = units.sizes
        assert len(edges.expanded()) == sum(int(sizes[u] * sizes[v]) for u, v in edges.rows.tolist())


def test_single_features_whole_sites_and_heads():
    case = tiny_case("llama", {"attn_0": "identity", "resid_0": "relu"}, ("attn_0", "resid_0"), heads=True)
    attn, resid = case.graph.sites[:2]
    singles = single_features(case.graph, case.dictionaries)
    assert singles.sizes.tolist() == [1] * (len(singles) + 1)
    assert singles.names[:2] == ("attn_0/0", "attn_0/1")
    assert singles.members(singles.at(attn)[-1]).tolist() == [ERROR]
    d_sae = case.d_sae[attn]
    parts = {attn: heads(case.dictionaries[attn], attn, 2), resid: whole_site(case.dictionaries[resid], resid)}
    units = Units.from_labels(case.graph, {s: labels for s, (labels, _) in parts.items()}, {s: names for s, (_, names) in parts.items()})
    assert units.names == ("attn_0/head 0", "attn_0/head 1", "attn_0/error", "resid_0/all", "resid_0/error", "y")
    assert units.members(1).tolist() == list(range(d_sae // 2, d_sae))
    with pytest.raises(NotUnits, match="only where the dictionary is the identity"):
        heads(case.dictionaries[resid], resid, 2)


def test_what_is_no_partition_is_refused():
    case, units = three_features()
    own = {site: units.of[site] - units.at(site)[0] for site in units.of}
    with pytest.raises(NotUnits, match="resid_0 has no units"):
        Units.from_labels(case.graph, {EMBED: own[EMBED], MLP: own[MLP]})
    with pytest.raises(NotUnits, match="not 0 to 3, each with a node"):
        Units.from_labels(case.graph, {**own, EMBED: torch.tensor([0, 1, 0, 3])})
    with pytest.raises(NotUnits, match="1 names for the 2 units of embed"):
        Units.from_labels(case.graph, own, {EMBED: ["a"], MLP: ["b"], RESID: ["c", "d", "e"]})
    with pytest.raises(NotUnits, match="unit 7: there are units 0 to 6, the last one y"):
        UnitEdges.of(units, [0], [7])
    with pytest.raises(NotAnEdge, match="an edge from resid_0/0 to mlp_0/0"):
        UnitEdges.of(units, [3], [2])
