"""What the output reads: values against the definitions, gradients against finite differences, what users get wrong."""

from pathlib import Path

import pytest
import torch
from featlas.model.binding import bind
from featlas.model.dictionaries import identity
from featlas.model.metrics import Metric, evaluate
from featlas.model.sites import Basis, UnknownSite, parse_site
from featlas.model.targets import BadProbe, FeatureTarget, LogitTarget, PositionOutOfRange, ProbeTarget, UnknownTarget, parse_target, target_site
from safetensors.torch import save_file

from .micro import VOCAB, tiny_module
from .micro_dictionaries import tiny_dictionary

SITE = parse_site("resid_1")
WIDTH = 16
ANSWER, WRONG = torch.tensor([2, 3, 4]), torch.tensor([5, 6, 7])


@pytest.fixture(scope="module")
def binding():
    return bind(tiny_module("gpt2", dtype=torch.float64))  # whose norms do not go down to float32


@pytest.fixture(scope="module")
def value() -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture(scope="module")
def dictionaries(value):
    return {SITE: tiny_dictionary("topk", WIDTH).to(dtype=torch.float64), parse_site("attn_0"): identity(WIDTH, basis=Basis.HEADS)}


def probe_file(path: Path, weight=None, bias=None, **metadata: str) -> str:
    weight = torch.arange(WIDTH, dtype=torch.float32) if weight is None else weight
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    save_file(tensors, path, metadata={"site": "resid_1", **metadata})
    return str(path)


def test_logits(binding, value) -> None:
    clean = torch.randn(3, VOCAB, dtype=torch.float64)
    for metric in (Metric.LOGIT_DIFF, Metric.LOG_PROB, Metric.KL):
        target = LogitTarget(metric)
        expected = evaluate(metric, binding.logits(value), ANSWER, WRONG, clean)
        torch.testing.assert_close(target(binding, value, ANSWER, WRONG, clean), expected)
        assert (target.name, target.key, target.site, target.basis) == (metric.value, metric.value, None, Basis.RESIDUAL)
        assert target.position(7) == 6
        assert target.identity() == {"kind": "logits", "metric": metric.value}


def test_a_feature(binding, value, dictionaries) -> None:
    dictionary = dictionaries[SITE]
    active = int(dictionary.encode(value)[0].argmax())
    target = parse_target(f"resid_1/{active}", dictionaries, binding)
    assert isinstance(target, FeatureTarget)
    found = target(binding, value, ANSWER, WRONG, None)
    # From the definition: the k largest of (x − b_dec)·W_enc + b_enc.
    raw = (value - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    rank = (raw > raw[:, active, None]).sum(-1)
    torch.testing.assert_close(found, torch.where(rank < dictionary.k, raw[:, active].clamp_min(0), 0.0))
    assert found[0] > 0
    assert (target.name, target.site, target.basis, target.position(5)) == (f"feature resid_1/{active}", SITE, Basis.RESIDUAL, 4)
    assert target.identity() == {"kind": "feature", "site": "resid_1", "dictionary": "tiny", "index": active, "position": -1}


def test_a_feature_of_heads(binding, dictionaries) -> None:
    target = parse_target(" attn_0/3@0 ", dictionaries, binding)
    assert (target.name, target.basis, target.position(4)) == ("feature attn_0/3@0", Basis.HEADS, 0)
    assert target.key == "feature attn_0/3@0|identity-heads"


def test_a_probe(binding, value, tmp_path) -> None:
    path = probe_file(tmp_path / "plural.safetensors", bias=torch.tensor(0.5), position="-2", name="number of the subject")
    target = parse_target(path, {}, binding)
    assert isinstance(target, ProbeTarget)
    naive = [sum(i * float(x) for i, x in enumerate(row)) + 0.5 for row in value]
    assert target(binding, value, ANSWER, WRONG, None).tolist() == pytest.approx(naive)
    assert (target.name, target.site, target.basis, target.position(5)) == ("probe number of the subject", SITE, Basis.RESIDUAL, 3)
    # As a linear layer of one output is saved, with no name: the same numbers, hence the same digest.
    layer = probe_file(tmp_path / "layer.safetensors", weight=torch.arange(WIDTH, dtype=torch.float32)[None], bias=torch.tensor([0.5]))
    other = parse_target(layer, {}, binding)
    assert other.name == "probe layer"
    assert other.identity()["sha256"] == target.identity()["sha256"]
    assert other.key != target.key
    heads = parse_target(probe_file(tmp_path / "h.safetensors", site="attn_1", basis="heads"), {}, binding)
    assert heads.basis is Basis.HEADS
    assert float(heads.bias) == 0.0


@pytest.mark.parametrize("kind", ["logits", "feature", "probe"])
def test_gradient_equals_finite_differences(kind, binding, value, dictionaries, tmp_path) -> None:
    active = int(dictionaries[SITE].encode(value)[0].argmax())
    target = {
        "logits": lambda: LogitTarget(Metric.LOG_PROB),
        "feature": lambda: parse_target(f"resid_1/{active}", dictionaries, binding),
        "probe": lambda: parse_target(probe_file(tmp_path / "p.safetensors"), {}, binding),
    }[kind]()
    leaf = value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(target(binding, leaf, ANSWER, WRONG, None).sum(), leaf)
    step, direction = 1e-6, torch.randn(value.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        up, down = (target(binding, value + sign * step * direction, ANSWER, WRONG, None) for sign in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(-1), (up - down) / (2 * step), rtol=1e-5, atol=1e-8)
    assert gradient[0].abs().max() > 1e-3


def test_positions_out_of_range(binding, dictionaries) -> None:
    with pytest.raises(PositionOutOfRange, match=r"position -4, and a sequence has 3 tokens: take one from -3 to 2"):
        parse_target("resid_1/0@-4", dictionaries, binding).position(3)
    with pytest.raises(PositionOutOfRange, match="position 3"):
        parse_target("resid_1/0@3", dictionaries, binding).position(3)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("resid_1", UnknownTarget, "neither a feature, as in resid_11/123"),
        ("resid_1/error", UnknownTarget, "neither a feature"),
        ("resid_1/4@x", UnknownTarget, "neither a feature"),
        ("stream_1/4", UnknownSite, "unknown site 'stream_1'"),
        ("y/0", UnknownTarget, "y has no features"),
        ("resid_7/4", UnknownSite, "layers 0 to 2"),
        ("resid_0/4", UnknownTarget, "no dictionary of resid_0; the dictionaries are of resid_1, attn_0"),
        ("resid_1/24", UnknownTarget, "target resid_1/24: the dictionary of resid_1 has features 0 to 23"),
        ("nowhere.safetensors", BadProbe, "no readable safetensors file"),
    ],
)
def test_texts_that_name_no_target(text, kind, message, binding, dictionaries) -> None:
    with pytest.raises(kind, match=message):
        parse_target(text, dictionaries, binding)


@pytest.mark.parametrize(
    ("tensors", "metadata", "kind", "message"),
    [
        ({"weight": torch.zeros(WIDTH)}, {}, BadProbe, "does not say what it reads"),
        ({"weight": torch.zeros(WIDTH)}, {"site": "resid"}, UnknownSite, "unknown site 'resid'"),
        ({"weight": torch.zeros(WIDTH)}, {"site": "resid_3"}, UnknownSite, "reads resid_3"),
        ({"weight": torch.zeros(WIDTH)}, {"site": "y"}, UnknownSite, "reads y"),
        ({"weight": torch.zeros(WIDTH)}, {"site": "resid_1", "position": "last"}, BadProbe, "position 'last'"),
        ({"weight": torch.zeros(WIDTH)}, {"site": "attn_1", "basis": "head"}, BadProbe, "basis 'head'"),
        ({"weight": torch.zeros(8)}, {"site": "resid_1"}, BadProbe, r"shape \(8,\); resid_1 \(residual\) has width 16"),
        ({"weight": torch.zeros(2, WIDTH)}, {"site": "resid_1"}, BadProbe, r"shape \(2, 16\)"),
        ({"weight": torch.full((WIDTH,), torch.nan)}, {"site": "resid_1"}, BadProbe, "weight is not all finite"),
        ({"weight": torch.zeros(WIDTH, dtype=torch.int64)}, {"site": "resid_1"}, BadProbe, "weight is not all finite floating"),
        ({"weight": torch.zeros(WIDTH), "bias": torch.zeros(2)}, {"site": "resid_1"}, BadProbe, r"bias of shape \(2,\)"),
        ({"weight": torch.zeros(WIDTH), "bias": torch.tensor(torch.inf)}, {"site": "resid_1"}, BadProbe, "bias is not all finite"),
        ({"kernel": torch.zeros(WIDTH)}, {"site": "resid_1"}, BadProbe, "has the tensors kernel, not weight"),
        ({"bias": torch.zeros(1)}, {"site": "resid_1"}, BadProbe, "has the tensors bias, not weight"),
    ],
)
def test_files_that_hold_no_probe(tensors, metadata, kind, message, binding, tmp_path) -> None:
    path = tmp_path / "probe.safetensors"
    save_file(tensors, path, metadata=metadata or None)
    with pytest.raises(kind, match=message):
        parse_target(str(path), {}, binding)


def test_a_file_of_another_format(binding, tmp_path) -> None:
    path = tmp_path / "probe.npz"
    path.write_bytes(b"\x80\x02not safetensors")
    with pytest.raises(BadProbe, match="no readable safetensors file"):
        parse_target(str(path), {}, binding)


def test_the_site_whose_dictionary_is_needed() -> None:
    assert target_site("mlp_3/7@-2") == parse_site("mlp_3")
    assert target_site("anything.safetensors") is None
