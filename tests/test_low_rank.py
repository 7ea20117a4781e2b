"""Sites computed from few changed nodes: against the local function itself, for every family."""

import random
from dataclasses import replace

import pytest
import torch
from featlas.model.ablation import Errors, ablate_edges
from featlas.model.dictionaries import TopKDictionary
from featlas.model.low_rank import low_rank
from featlas.model.readout import Reader
from featlas.model.sites import Basis, parse_site

from .ablation_cases import base_of, random_edges, tiny_case
from .micro import FAMILIES
from .micro_dictionaries import tiny_dictionary
from .naive_ablation import naive_edge_ablation

SITES = ("embed", "attn_0", "mlp_0", "resid_0", "attn_1", "mlp_1", "resid_1")
POST_NORMS = ("gemma2", "gemma3_text")


def forms(family, basis=Basis.RESIDUAL):
    """A batch of a tiny model with attention in `basis`, and the form of each of its sites with parents."""
    case = tiny_case(family, "relu", SITES, heads=basis is Basis.HEADS)
    clean = case.batch().clean
    return clean, {site: clean.form(site) for site in clean.dictionaries if clean.graph.parents(site)}


@pytest.mark.parametrize("basis", list(Basis))
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_values_of_points_and_changes_give_the_local_functions_value(family, basis):
    clean, found = forms(family, basis)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for site, form in found.items():
        if form is None:
            assert family in POST_NORMS, f"{site.name} has no form"
            continue
        seen.add(site.kind)
        function, pos = clean.functions[site], clean.length
        points = {p: torch.randn(3, pos, clean.dictionaries[p].d_in, generator=generator) for p in function.parents}
        constants = {c: torch.randn(3, pos, clean.binding.d_model, generator=generator) for c in function.constants}
        point = torch.tensor([0, 2, 2, 1, 0])
        directions, values, coefficients = [], {}, []
        for p in function.parents:
            W_dec = clean.dictionaries[p].W_dec[:5]
            own = torch.randn(5, pos, 5, generator=generator) * (torch.rand(5, pos, 5, generator=generator) < 0.5)
            values[p] = points[p][point] + own @ W_dec
            directions.append(form.directions(p, W_dec))
            coefficients.append(own)
        expected = function(values, {c: v[point] for c, v in constants.items()}, clean.run)
        stream = form.stream(points, constants)
        for rows in (form.rows(torch.cat(directions)), torch.cat(directions)):  # with the first layer's, and without
            hidden = form.hidden(stream, point, torch.cat(coefficients, dim=-1), rows)
            value = hidden if form.output is None else form.output(hidden)
            assert float((value - expected).abs().max() / expected.abs().max()) < 2e-6, site.name
    assert seen, "some site has a form"


def test_a_site_behind_a_post_norm_or_a_composition_has_no_form():
    _, found = forms("gemma2")
    assert found[parse_site("mlp_0")] is None
    assert found[parse_site("attn_1")] is None
    composed = tiny_case("llama", "relu", ("embed", "resid_1")).batch().clean
    function = composed.functions[parse_site("resid_1")]
    assert low_rank(function, composed.run, composed.values[parse_site("embed")][:1]) is None


@pytest.mark.parametrize("k", [1, 5])
def test_a_screened_reader_gives_what_the_dictionary_encodes(k):
    generator = torch.Generator().manual_seed(1)
    dictionary = tiny_dictionary("topk", 16, d_sae=64)
    dictionary = TopKDictionary(**{**vars(dictionary), "k": k})
    rows = torch.randn(40, 16, generator=generator)
    expected = dictionary.encode(rows)
    cell = torch.arange(40) % 4
    for share in (0.0, 0.2, 1.0):  # whatever is taken for likely, the values are the same
        known = torch.rand(4, 64, generator=generator) < share
        reader = Reader(dictionary, None, torch.arange(64), known, pull=True)
        row, node = torch.ones(40, 64).nonzero(as_tuple=True)
        assert torch.allclose(reader.nodes(rows, row, node, cell), expected[row, node], atol=1e-6)
        few = torch.randperm(len(row), generator=generator)[:60]  # counted by rank
        assert torch.allclose(reader.nodes(rows, row[few], node[few], cell), expected[row[few], node[few]], atol=1e-6)
    assert int((expected > 0).sum(dim=-1).max()) == k


def test_equal_raw_values_go_to_the_lower_index_as_in_the_encoder():
    dictionary = tiny_dictionary("topk", 4, d_sae=6)
    same = torch.ones(4, 6)
    dictionary = TopKDictionary(**{**vars(dictionary), "W_enc": same, "b_enc": torch.zeros(6), "b_dec": torch.zeros(4), "k": 2})
    x = torch.ones(1, 4)
    assert dictionary.encode(x).tolist() == [[4.0, 4.0, 0.0, 0.0, 0.0, 0.0]]
    assert dictionary.encode_at(x, torch.tensor([0, 0, 0]), torch.tensor([1, 2, 5])).tolist() == [4.0, 0.0, 0.0]


@pytest.mark.parametrize(("kind", "by_position"), [("relu", True), ("topk", False)])
@pytest.mark.parametrize("errors", list(Errors))
@pytest.mark.slow
def test_circuits_that_lack_one_edge_each_are_the_same_together_and_apart(kind, errors, by_position):
    case = tiny_case("llama", kind, SITES, baseline="counterfactual")
    case = replace(case, pairs=replace(case.pairs, corrupt=torch.cat([case.pairs.clean[:, :1], (case.pairs.clean[:, 1:] + 7) % 48], dim=1)))
    case = replace(case, base=base_of(case, "counterfactual"))  # equal to the clean run at the first position
    circuit = random_edges(case, random.Random(3), 0.9, 0.5, by_position=by_position)
    chosen = torch.randperm(len(circuit), generator=torch.Generator().manual_seed(0))[:14].tolist()
    cut = [replace(circuit, rows=torch.cat([circuit.rows[:i], circuit.rows[i + 1 :]])) for i in chosen]
    sets = [circuit, *cut, circuit.inverse(), *(one.inverse() for one in cut[:3])]
    together = ablate_edges(case.batch(), sets, errors=errors)
    apart = torch.cat([ablate_edges(case.batch(), [one], errors=errors) for one in sets])
    theirs = torch.stack([naive_edge_ablation(*case.oracle(), one, errors=errors) for one in sets[:2]])
    assert float((together - apart).abs().max() / apart.abs().max()) < 2e-6
    assert float((together[:2] - theirs).abs().max() / theirs.abs().max()) < 1e-5
    assert len({tuple(end.flatten().tolist()) for end in together[1:15]}) > 2, "some edges matter"
