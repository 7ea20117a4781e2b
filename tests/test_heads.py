"""Heads of features: shares against loops over heads and runs of the model, overlaps against scikit-learn and all permutations, flows by hand."""

from itertools import permutations

import numpy as np
import polars as pl
import pytest
import torch
from featlas.analysis.heads import HeadShares, NoHeads, alluvial, alluvial_frame, decoder_shares, membership, overlap, slices
from featlas.ingest.effective import EdgeSettings
from featlas.ingest.head_attribution import NoHeadsBefore, effective_sums, encoder_sums, structural_sums, writing_layers
from featlas.ingest.heads import Role, site_shares
from featlas.model.baselines import Baseline
from featlas.model.dictionaries import identity
from featlas.model.sites import Basis, parse_site
from featlas.model.units import NotUnits
from featlas.model.weights import ModelWeights
from sklearn.metrics import adjusted_mutual_info_score

from .compare_edges import engine_edges, setting
from .micro_dictionaries import tiny_dictionary

SITE = parse_site("attn_1")


def made(shares, heads=None) -> HeadShares:
    """Shares in five or so features."""
    shares = np.asarray(shares, dtype=float)
    return HeadShares("resid_3", "made", "made", heads or tuple((3, h) for h in range(shares.shape[1])), shares)


# ---- shares, labels, ambiguity


def test_a_features_head_its_ambiguity_and_entropy():
    found = made([[0.5, 0.5, 0], [0, 0.1, 0.9], [0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 1]])
    assert found.labels.tolist() == [0, 2, -1, 0, 2]
    np.testing.assert_allclose(found.ambiguity, [0.5, 0.1, np.nan, 2 / 3, 0])
    mixed = -(0.1 * np.log(0.1) + 0.9 * np.log(0.9)) / np.log(3)
    np.testing.assert_allclose(found.entropy, [np.log(2) / np.log(3), mixed, np.nan, 1, 0], atol=1e-12)
    table = found.table()
    assert table["features"].to_list() == [2, 0, 2]
    assert table["ambiguity"].to_list() == [pytest.approx((0.5 + 2 / 3) / 2), None, pytest.approx(0.05)]
    np.testing.assert_allclose(table["share"], np.array([0.5 + 1 / 3, 0.5 + 0.1 + 1 / 3, 0.9 + 1 / 3 + 1]) / 4)
    assert found.features().select("feature", "layer", "head").rows() == [(0, 3, 0), (1, 3, 2), (3, 3, 0), (4, 3, 2)]


def test_magnitudes_become_shares():
    dictionary = tiny_dictionary("topk", 16, basis=Basis.HEADS)
    found = HeadShares.of(SITE, dictionary, "made", ((1, 0), (1, 1)), np.array([[1.0, 3.0], [0.0, 0.0]]))
    assert found.shares.tolist() == [[0.25, 0.75], [0, 0]]
    assert (found.site, found.dictionary, found.names) == ("attn_1", "tiny", ["1.0", "1.1"])


def test_features_without_any_head_make_empty_tables():
    found = made(np.zeros((3, 2)))
    assert found.features().height == 0
    assert found.table()["features"].to_list() == [0, 0]


def test_neurons_of_head_outputs_are_of_their_slice():
    dictionary = identity(12, basis=Basis.HEADS)
    assert slices(dictionary, SITE, 4).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    found = membership(dictionary, SITE, 4)
    assert found.labels.tolist() == slices(dictionary, SITE, 4).tolist()
    assert not found.ambiguity.any()
    for other in (identity(12), tiny_dictionary("linear", 12, basis=Basis.HEADS)):
        with pytest.raises(NotUnits, match="identity on the heads' outputs"):
            slices(other, SITE, 4)


def test_decoder_shares_are_norms_of_slices():
    dictionary = tiny_dictionary("relu", 16, basis=Basis.HEADS)
    found = decoder_shares(dictionary, SITE, 4)
    for f in range(dictionary.d_sae):
        norms = [float(dictionary.W_dec[f, 4 * h : 4 * h + 4].double().norm()) for h in range(4)]
        np.testing.assert_allclose(found.shares[f], np.array(norms) / sum(norms), rtol=1e-12)
    with pytest.raises(NoHeads, match="no heads' slices"):
        decoder_shares(tiny_dictionary("relu", 16), SITE, 4)


# ---- measured


@pytest.mark.parametrize("steps", [1, 3])
def test_attribution_from_heads_is_the_sum_of_their_neurons_edges(steps):
    binding, made_, batch = setting("llama", "relu", ("resid_1",))
    site = parse_site("resid_1")
    layers = writing_layers(binding, [parse_site("resid_0")], site)
    assert layers == (1,)
    assert writing_layers(binding, [], site) == (0, 1)
    settings = EdgeSettings(steps=steps)
    found = effective_sums(binding, made_[site], site, (0, 1), [batch], settings)
    neurons = {parse_site(name): identity(binding.d_heads, basis=Basis.HEADS) for name in ("attn_0", "attn_1")}
    signed = np.zeros((2, made_[site].d_sae + 1, 2 * binding.n_heads))
    for (s, source, i, _, target, j, _), weight in engine_edges(binding, neurons | made_, batch, settings).items():
        if target == "resid_1":
            signed[s, j, int(source[-1]) * binding.n_heads + i // binding.head_dim] += weight
    np.testing.assert_allclose(found.magnitude, np.abs(signed[:, :-1]).sum(0), rtol=1e-4, atol=1e-5 * np.abs(signed).max())
    assert found.heads == tuple((layer, head) for layer in (0, 1) for head in range(binding.n_heads))
    assert found.n == 2


@pytest.mark.parametrize("heads", [True, False], ids=["of head outputs", "of the residual stream"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_what_an_encoder_reads_of_a_head_is_what_it_loses_without_it(family, heads):
    """Put one head's output back to the baseline, with the post-norm's scale held: each active feature's raw value falls by the head's part."""
    binding, dictionaries, batch = setting(family, "relu", ("attn_1",), heads=heads)
    dictionary = dictionaries[SITE]
    found = encoder_sums(binding, dictionary, SITE, [batch])
    z, other = (binding.forward(tokens, {SITE: Basis.HEADS}).values[SITE] for tokens in (batch.clean, batch.corrupt))
    value = z if heads else binding.written(SITE, z, Basis.HEADS)
    active = dictionary.active(value)
    attention = ModelWeights(binding).attention(1)
    expected = np.zeros_like(found.magnitude)
    for head in range(binding.n_heads):
        part = slice(head * binding.head_dim, (head + 1) * binding.head_dim)
        alone = torch.zeros_like(z)
        alone[..., part] = (z - other)[..., part]
        moved = alone if heads else attention.post(torch.einsum("bphe,hde->bpd", alone.unflatten(-1, (binding.n_heads, -1)), attention.W_O))
        expected[:, head] = ((moved @ dictionary.W_enc).abs() * active).double().sum((0, 1)).numpy()
    np.testing.assert_allclose(found.magnitude, expected, rtol=1e-4, atol=1e-5 * expected.max())
    assert found.n == int((z != other).any(-1).sum())


def test_parts_of_an_encoder_add_up_from_zero_and_in_small_chunks():
    binding, dictionaries, batch = setting("llama", "linear", ("attn_1",), heads=True)
    dictionary = dictionaries[SITE]
    whole = encoder_sums(binding, dictionary, SITE, [batch], baseline=Baseline.ZERO)
    z = binding.forward(batch.clean, {SITE: Basis.HEADS}).values[SITE].flatten(0, 1).unflatten(-1, (binding.n_heads, -1))
    parts = torch.einsum("nhe,hef->nfh", z, dictionary.W_enc.unflatten(0, (binding.n_heads, -1))).abs().double().sum(0)
    np.testing.assert_allclose(whole.magnitude, parts, rtol=1e-4)
    small = encoder_sums(binding, dictionary, SITE, [batch], baseline=Baseline.ZERO, memory=1)
    np.testing.assert_allclose(small.magnitude, whole.magnitude, rtol=1e-5)


def test_structural_shares_are_those_of_the_writing_heads():
    binding, dictionaries, _ = setting("llama", "relu", ("resid_1",))
    site = parse_site("resid_1")
    found = structural_sums(binding, dictionaries[site], site, [])
    rows = pl.concat(site_shares(ModelWeights(binding), binding.graph([site]), dictionaries, site, rows=7)).filter(role=Role.WRITE.value)
    assert len(rows) == found.magnitude.size
    for row in rows.iter_rows(named=True):
        assert found.magnitude[row["feature"], found.heads.index((row["layer"], row["head"]))] == pytest.approx(row["share"], rel=1e-5)


def test_methods_that_a_site_lacks_are_refused():
    binding, dictionaries, batch = setting("llama", "relu", ("attn_1", "mlp_1", "resid_1"))
    with pytest.raises(NoHeadsBefore, match="no head writes mlp_1"):
        writing_layers(binding, dictionaries, parse_site("mlp_1"))
    with pytest.raises(NoHeadsBefore, match="take --method encoder"):
        effective_sums(binding, dictionaries[SITE], SITE, (1,), [batch], EdgeSettings(steps=1))
    with pytest.raises(NoHeadsBefore, match="take --method effective"):
        encoder_sums(binding, dictionaries[parse_site("resid_1")], parse_site("resid_1"), [batch])
    with pytest.raises(NoHeadsBefore, match="not from the mean baseline"):
        encoder_sums(binding, dictionaries[SITE], SITE, [batch], baseline=Baseline.MEAN)


# ---- overlap


def one_hot(labels, n=None) -> HeadShares:
    labels = np.asarray(labels)
    return made(np.where(labels[:, None] < 0, 0.0, np.eye(n or labels.max() + 1)[labels]))


def test_the_overlap_of_equal_partitions_and_of_small_ones_by_hand():
    heads = np.repeat(np.arange(3), 4)
    same = overlap((2 - heads), one_hot(heads))
    assert (same.ami, same.vi, same.purity) == (pytest.approx(1), pytest.approx(0), 1.0)
    assert same.p == pytest.approx(1 / 1001, abs=3e-3)
    found = overlap(np.array([0, 0, 0, 1, 1, -1]), one_hot([0, 0, 1, 1, -1, 1]), draws=10)
    assert found.n == 4
    assert found.contingency.rows() == [(0, 3, 0, 2, 2 / 3), (0, 3, 1, 1, 1 / 3), (1, 3, 1, 1, 1.0)]
    assert found.purity == 3 / 4


@pytest.mark.slow
def test_the_null_is_the_mutual_information_of_permuted_heads():
    blocks, heads = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    found = overlap(blocks, one_hot(heads), draws=600, seed=1)
    every = [adjusted_mutual_info_score(blocks, list(order)) for order in permutations(heads)]
    np.testing.assert_allclose(sorted(set(np.round(found.null_ami, 9))), sorted(set(np.round(every, 9))), atol=1e-8)
    assert found.null_ami.mean() == pytest.approx(0, abs=0.08)
    assert found.p == pytest.approx(np.mean(np.array(every) >= found.ami - 1e-12), abs=0.06)
    assert overlap(blocks, one_hot(heads), draws=50, seed=4).null_ami.tolist() == overlap(blocks, one_hot(heads), draws=50, seed=4).null_ami.tolist()


def test_random_blocks_overlap_no_more_than_permuted_ones():
    generator = np.random.default_rng(0)
    found = overlap(generator.integers(0, 8, 400), one_hot(np.repeat(np.arange(8), 50)), draws=200)
    assert abs(found.ami) < 0.03
    assert found.p > 0.01


def test_one_block_has_nothing_to_say():
    found = overlap(np.zeros(6, dtype=np.int64), one_hot([0, 0, 1, 1, 2, 2]), draws=20)
    assert found.p == 1.0


def test_partitions_of_other_features_are_refused():
    with pytest.raises(NoHeads, match="3 features have blocks, 2 have heads"):
        overlap(np.zeros(3, dtype=np.int64), one_hot([0, 1]))
    with pytest.raises(NoHeads, match="no feature of resid_3 has both"):
        overlap(np.array([-1, 0]), one_hot([0, -1]))


# ---- the figure's frame


def test_flows_are_ordered_by_head_then_block():
    blocks = np.array([0, 0, 0, 1, 1, 2, 2, 2, -1])
    heads = np.array([2, 2, 1, 0, 0, 1, 1, 0, 0])
    found = alluvial(blocks, one_hot(heads))
    assert found.left_order == ["block 1", "block 2", "block 0"]  # at mean heads 0, 2/3, 5/3
    assert found.right_order == ["head 3.0", "head 3.1", "head 3.2"]
    assert found.frame.rows() == [
        ("block 1", "head 3.0", 2), ("block 2", "head 3.0", 1), ("block 2", "head 3.1", 2), ("block 0", "head 3.1", 1), ("block 0", "head 3.2", 2),
    ]  # fmt: skip
    frame, left, right = alluvial_frame(blocks, one_hot(heads))
    assert (frame.rows(), left, right) == (found.frame.rows(), found.left_order, found.right_order)
    assert frame["n"].sum() == 8
