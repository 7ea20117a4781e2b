"""Dictionaries against sae_lens's own arithmetic, and their derivatives against autograd of one row at a time."""

import json
from typing import Any

import pytest
import torch
from featlas.model.dictionaries import (
    Basis,
    Dictionary,
    GatedDictionary,
    InputTransform,
    JumpReLUDictionary,
    Kind,
    LinearDictionary,
    Normalisation,
    ReLUDictionary,
    TopKDictionary,
    identity,
    per_head_linear,
    top_k_mask,
)
from featlas.model.dictionary_sources import build
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from torch import Tensor

D_IN, D_SAE, K = 6, 20, 4
KINDS = ("standard", "gated", "topk", "jumprelu")
NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")


def random_sae(architecture: str, *, seed: int = 0, **config: Any) -> SAE[Any]:
    """An SAE of sae_lens with every tensor random, its decoder rows of different norms."""
    sae_class, config_class = get_sae_class(architecture)
    extra = {"k": K} if architecture == "topk" else {}
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **extra, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise.abs() * 0.5 if name == "threshold" else noise)
    return sae


def ours(sae: SAE[Any]) -> Dictionary:
    return build(json.loads(json.dumps(sae.cfg.to_dict())), sae.state_dict(), id="test")


def rows(n: int = 30, *, seed: int = 1) -> Tensor:
    return 2 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) + 0.7


def scale_of(dictionary: Any, x: Tensor) -> Tensor | float:
    scale = dictionary.prepare(x)[1]
    return 1.0 if scale is None else scale


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("subtract", [True, False])
def test_nodes_and_reconstruction_equal_sae_lens(architecture: str, normalisation: str, subtract: bool) -> None:
    sae = random_sae(architecture, normalize_activations=normalisation, apply_b_dec_to_input=subtract)
    dictionary, x = ours(sae), rows()
    with torch.no_grad():
        activations = sae.encode(x)
        reconstruction = sae.decode(activations)
    nodes = dictionary.encode(x)
    scale = scale_of(dictionary, x)
    assert (nodes - activations * scale).abs().max() < 1e-5 * nodes.abs().max()
    assert 0 < (nodes != 0).float().mean() < 1
    # What sae_lens adds back after the decoder (means, the bias times the scale) is what our error node holds.
    mean = x.mean(-1, keepdim=True) if normalisation == "layer_norm" else 0.0
    theirs = dictionary.decode(nodes) + (scale - 1) * dictionary.b_dec + mean
    assert (theirs - reconstruction).abs().max() < 1e-5 * reconstruction.abs().max()


@pytest.mark.parametrize("rescale", [True, False])
def test_topk_counts_by_decoder_norm_where_it_was_trained_so(rescale: bool) -> None:
    sae = random_sae("topk", rescale_acts_by_decoder_norm=rescale)
    dictionary, x = ours(sae), rows()
    with torch.no_grad():
        activations = sae.encode(x)
        reconstruction = sae.decode(activations)
    assert (dictionary.encode(x) - activations).abs().max() < 1e-5 * activations.abs().max()
    assert (dictionary.decode(dictionary.encode(x)) - reconstruction).abs().max() < 1e-5 * reconstruction.abs().max()
    assert torch.equal((dictionary.encode(x) != 0).sum(-1) <= K, torch.ones(30, dtype=torch.bool))


def test_hook_z_reads_flattened_heads_as_sae_lens_reshapes_them() -> None:
    from sae_lens.saes.sae import SAEMetadata

    sae = random_sae("standard", reshape_activations="hook_z", metadata=SAEMetadata(hook_name="blocks.1.attn.hook_z"))
    dictionary, x = ours(sae), rows()
    with torch.no_grad():
        activations = sae.encode(x.view(-1, 3, 2))  # (n, heads, head_dim)
        reconstruction = sae.decode(activations).flatten(1)
    assert dictionary.basis is Basis.HEADS
    assert (dictionary.encode(x) - activations).abs().max() < 1e-5
    assert (dictionary.decode(activations) - reconstruction).abs().max() < 1e-5


def test_centring_equals_sae_lens_on_centred_input_and_keeps_the_mean_in_the_error() -> None:
    sae = random_sae("standard")
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    dictionary, x = ours(sae), rows()
    centred = x - x.mean(-1, keepdim=True)
    assert (dictionary.encode(x) - sae.encode(centred)).abs().max() < 1e-5
    error = x - dictionary.decode(dictionary.encode(x))
    theirs = centred - sae.decode(sae.encode(centred))
    assert (error - theirs - x.mean(-1, keepdim=True)).abs().max() < 1e-5


def test_a_batchtopk_saved_in_training_becomes_the_jumprelu_that_sae_lens_saves_for_inference(tmp_path: Any) -> None:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    sae.topk_threshold = torch.tensor(0.8, dtype=torch.double)
    sae.save_inference_model(tmp_path)
    inference = SAE.load_from_disk(tmp_path)
    dictionary, x = build(sae.cfg.to_dict(), sae.state_dict(), id="test"), rows()
    assert dictionary.kind is Kind.JUMPRELU
    assert (dictionary.encode(x) - inference.encode(x)).abs().max() < 1e-5
    assert (dictionary.decode(dictionary.encode(x)) - inference(x)).abs().max() < 1e-5


def all_dictionaries() -> list[Dictionary]:
    """Every kind under every input transform."""
    g = torch.Generator().manual_seed(3)
    r = lambda *shape: torch.randn(*shape, generator=g)
    found: list[Dictionary] = [identity(D_IN), per_head_linear("heads", r(3, 2, 5), r(3, 5, 2), b_enc=r(15), b_dec=r(D_IN))]
    found.append(LinearDictionary(id="linear", basis=Basis.RESIDUAL, W_dec=r(D_SAE, D_IN), b_dec=r(D_IN), W_enc=r(D_IN, D_SAE), b_enc=r(D_SAE)))
    for centred in (False, True):
        for normalisation in Normalisation:
            for subtract in (False, True):
                common: dict[str, Any] = {
                    "id": f"centred={centred} {normalisation} subtract={subtract}",
                    "basis": Basis.RESIDUAL,
                    "W_dec": r(D_SAE, D_IN),
                    "b_dec": r(D_IN),
                    "W_enc": r(D_IN, D_SAE),
                    "input": InputTransform(centred, normalisation, subtract),
                }
                found += [
                    ReLUDictionary(**common, b_enc=r(D_SAE)),
                    JumpReLUDictionary(**common, b_enc=r(D_SAE), threshold=r(D_SAE)),
                    GatedDictionary(**common, b_gate=r(D_SAE), b_mag=r(D_SAE), r_mag=r(D_SAE)),
                    TopKDictionary(**common, b_enc=r(D_SAE), k=K),
                ]
    return found


DICTIONARIES = all_dictionaries()
NAMES = [f"{d.kind} {d.id}" for d in DICTIONARIES]


@pytest.mark.parametrize("dictionary", DICTIONARIES, ids=NAMES)
def test_derivatives_equal_autograd_of_each_row(dictionary: Dictionary) -> None:
    x = rows(12)
    # (n, d_sae, d_in), one row at a time: no other row can leak into it.
    jacobian = torch.stack([torch.autograd.functional.jacobian(dictionary.encode, row) for row in x])
    scale = jacobian.abs().max()
    index = torch.arange(12) * 7 % dictionary.d_sae
    assert (dictionary.encoder_rows(x, index) - jacobian[torch.arange(12), index]).abs().max() <= 1e-5 * scale
    cotangent = torch.randn(12, dictionary.d_sae, generator=torch.Generator().manual_seed(5))
    expected = torch.einsum("nf,nfd->nd", cotangent, jacobian)
    assert (dictionary.encode_vjp(x, cotangent) - expected).abs().max() <= 1e-5 * scale * dictionary.d_sae
    if dictionary.kind not in (Kind.LINEAR, Kind.PER_HEAD_LINEAR, Kind.IDENTITY):
        assert torch.equal(dictionary.active(x), jacobian.abs().amax(-1) > 0)
    else:
        assert bool(dictionary.active(x).all())


@pytest.mark.parametrize("dictionary", DICTIONARIES, ids=NAMES)
def test_every_kind_adds_up_to_its_input_with_the_error_node(dictionary: Dictionary) -> None:
    x = rows(8).view(2, 4, D_IN)
    nodes = dictionary.encode(x)
    assert nodes.shape == (2, 4, dictionary.d_sae)
    error = x - dictionary.decode(nodes)
    rebuilt = dictionary.b_dec + torch.einsum("bpf,fd->bpd", nodes, dictionary.W_dec) + error
    assert (rebuilt - x).abs().max() < 1e-5


@pytest.mark.parametrize("dictionary", DICTIONARIES, ids=NAMES)
def test_a_position_is_encoded_the_same_alone_as_in_a_batch(dictionary: Dictionary) -> None:
    x = rows(9)
    alone = torch.cat([dictionary.encode(row[None]) for row in x])
    assert (dictionary.encode(x) - alone).abs().max() < 1e-5


def test_derivatives_work_without_grad_mode_and_leave_no_graph() -> None:
    dictionary = next(d for d in DICTIONARIES if d.kind is Kind.TOPK and "layer_norm" in d.id)
    with torch.no_grad():
        gradient = dictionary.encoder_rows(rows(3), torch.tensor([0, 1, 2]))
    assert not gradient.requires_grad


def test_top_k_gives_ties_to_the_lower_index_and_nothing_to_negatives() -> None:
    values = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.5], [3.0, -1.0, 0.0, -2.0, -3.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    expected = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(top_k_mask(values, 2), expected)
    assert torch.equal(top_k_mask(values, 9), values > 0)


def test_per_head_features_read_and_write_one_head() -> None:
    encoders, decoders = torch.ones(3, 2, 5), torch.ones(3, 5, 2)
    dictionary = per_head_linear("heads", encoders, decoders)
    x = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    assert dictionary.basis is Basis.HEADS
    assert dictionary.encode(x).tolist() == [[2.0] * 5 + [0.0] * 10]
    assert dictionary.decode(dictionary.encode(x)).tolist() == [[10.0, 10.0, 0.0, 0.0, 0.0, 0.0]]


def test_moving_to_another_dtype_changes_no_original() -> None:
    original = DICTIONARIES[4]
    moved = original.to(dtype=torch.float64)
    assert (moved.W_dec.dtype, original.W_dec.dtype) == (torch.float64, torch.float32)
    assert (moved.encode(rows().double()) - original.encode(rows()).double()).abs().max() < 1e-5
