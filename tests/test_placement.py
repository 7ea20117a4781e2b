"""Models over several devices, at rest in main memory or on disk, and in half precision: the same numbers, wherever the parts lie."""

import gc
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from featlas.ingest import effective
from featlas.ingest.effective import EdgeSettings, FirstFactor, attribute, prepare
from featlas.ingest.head_attribution import encoder_sums
from featlas.ingest.planning import PlanOptions, plan
from featlas.ingest.statistics import site_nodes
from featlas.model import placement
from featlas.model.ablation import Errors, ablate_edges, ablate_nodes
from featlas.model.binding import Binding, bind, capture_sites
from featlas.model.dictionaries import Dictionary, Shelf
from featlas.model.dictionary_sources import CONFIG_FILE, WEIGHTS_FILE, load_dictionaries
from featlas.model.hashes import remembered
from featlas.model.loading import load_model, skeleton_of
from featlas.model.placement import BadPlacement, NoSuchDevice, device_map, parse_placement
from featlas.model.self_check import self_check
from featlas.model.sites import Basis, Site, parse_site
from featlas.model.weights import ModelWeights
from safetensors.torch import save_file

from .ablation_cases import random_edges, random_nodes, tiny_case
from .devices import Mixed, pretending
from .micro import save_tiny, tiny_config, tiny_module
from .micro_dictionaries import tiny_dictionary
from .micro_pairs import tiny_pairs

SITES = {"attn_0": "relu", "mlp_0": "topk", "resid_1": "gated", "attn_1": "jumprelu", "resid_2": "relu/layer_norm"}
SPREADS = ("cuda:0=0,cuda:1=1-2", "cuda:1=0-1,cuda:0=2", "cuda:0=0,cpu=1-2", "cuda:1+cpu")
ONE_STEP, EXACT = EdgeSettings(steps=1), EdgeSettings(steps=3, first_factor=FirstFactor.EXACT)


def tiny_dictionaries(binding: Binding, places: dict[Site, torch.device] | None = None) -> dict[Site, Dictionary]:
    found = {}
    for i, (name, kind) in enumerate(SITES.items()):
        site = parse_site(name)
        basis = Basis.HEADS if name == "attn_0" else Basis.RESIDUAL
        made = tiny_dictionary(kind, binding.width(site, basis), seed=i, basis=basis)
        found[site] = made if places is None else made.to(places[site])
    return found


def spread_binding(family: str, text: str, **sizes: int) -> Binding:
    """A tiny model spread over devices."""
    module = tiny_module(family, **sizes)
    return bind(placement.spread(module, device_map(parse_placement(text), skeleton_of(module.config))))


def on_layers(binding: Binding) -> dict[Site, Dictionary]:
    """Dictionaries, each where its layer computes."""
    return tiny_dictionaries(binding, {parse_site(name): placement.place_of(binding.layers[parse_site(name).layer]) for name in SITES})


def edges_of(binding: Binding, dictionaries: dict[Site, Dictionary], settings: EdgeSettings) -> dict[tuple, float]:
    blocks = list(attribute(prepare(binding, dictionaries, tiny_pairs(), settings)))
    columns = [np.concatenate(column) for column in zip(*blocks, strict=True)]
    return {tuple(key): weight for *key, weight in zip(*(column.tolist() for column in columns), strict=True)}


def assert_equal(found: dict[tuple, float], expected: dict[tuple, float]) -> None:
    """The same edges, with weights of float32: other devices take other kernels."""
    assert found.keys() == expected.keys()
    assert np.allclose(list(found.values()), list(map(expected.get, found)), rtol=1e-4, atol=1e-5)


# --- several devices --------------------------------------------------------------------------------------------------


def test_tensors_of_two_devices_do_not_meet() -> None:
    with pretending(2):
        one, other = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        with pytest.raises(Mixed):
            one + other
        with pytest.raises(Mixed):
            one + torch.ones(2)
        assert (one + other.to("cuda:0")).tolist() == [2, 2]


@pytest.mark.parametrize("text", [SPREADS[0], pytest.param(SPREADS[3], marks=pytest.mark.slow)])
def test_edges_do_not_depend_on_where_the_parts_lie(text: str) -> None:
    plain = bind(tiny_module("llama"))
    expected = edges_of(plain, tiny_dictionaries(plain), ONE_STEP)
    with pretending(2):
        binding = spread_binding("llama", text)
        found = edges_of(binding, on_layers(binding), ONE_STEP)
    assert len(expected) > 1000
    assert_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "text"), [("llama", SPREADS[1]), ("gpt2", SPREADS[0]), ("gpt_neox", SPREADS[2]), ("gemma2", SPREADS[0])])
def test_integrated_gradients_do_not_depend_on_it_in_any_family(family: str, text: str) -> None:
    plain = bind(tiny_module(family))
    expected = edges_of(plain, tiny_dictionaries(plain), EXACT)
    with pretending(2):
        binding = spread_binding(family, text)
        found = edges_of(binding, on_layers(binding), EXACT)
    assert_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["cuda:0=0,cuda:1=1", "cuda:1+cpu"])
def test_ablation_statistics_and_weights_do_not_depend_on_it(text: str) -> None:
    plain = tiny_case("llama", "relu", ("attn_0", "mlp_0", "resid_0", "mlp_1"))
    rng = random.Random(0)
    edges, nodes = random_edges(plain, rng, 0.7, 0.5), random_nodes(plain, rng, 0.5)
    expected = ablate_edges(plain.batch(), [edges], errors=Errors.KEPT), ablate_nodes(plain.batch(), [nodes], errors=Errors.KEPT)
    site = parse_site("mlp_1")
    values = capture_sites(plain.binding, plain.pairs.clean, {site: Basis.RESIDUAL})[site]
    with pretending(2):
        binding = spread_binding("llama", text, n_layers=2, d_model=8, n_heads=2)
        places = {site: placement.place_of(binding.layers[site.layer]) for site in plain.dictionaries}
        home = binding.device
        moved = replace(
            plain, binding=binding, dictionaries={site: d.to(places[site]) for site, d in plain.dictionaries.items()},
            pairs=plain.pairs.to(home), base={s: type(v)(v.features.to(home), v.error.to(home)) for s, v in plain.base.items()},
        )  # fmt: skip
        found = ablate_edges(moved.batch(), [edges], errors=Errors.KEPT), ablate_nodes(moved.batch(), [nodes], errors=Errors.KEPT)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours.cpu(), theirs, atol=1e-4)
        there = capture_sites(binding, plain.pairs.clean, {site: Basis.RESIDUAL})[site]
        sparse = site_nodes(moved.dictionaries[site], there)
        assert torch.allclose(sparse.value.cpu(), site_nodes(plain.dictionaries[site], values).value, atol=1e-4)
        ours, theirs = ModelWeights(binding), ModelWeights(plain.binding)
        for layer in range(2):
            assert torch.equal(ours.attention(layer).W_O.cpu(), theirs.attention(layer).W_O)
            assert torch.equal(ours.mlp(layer).W_in.cpu(), theirs.mlp(layer).W_in)
            assert ours.mlp(layer).W_in.device == home
        assert all(check.works for check in self_check(binding))


@pytest.mark.slow
@pytest.mark.parametrize("site", ["attn_0", "attn_1"])  # read by heads, and in the residual stream
def test_what_encoders_read_of_heads_does_not_depend_on_it(site: str) -> None:
    whole = bind(tiny_module("llama"))
    expected = encoder_sums(whole, tiny_dictionaries(whole)[parse_site(site)], parse_site(site), [tiny_pairs()])
    with pretending():
        binding = spread_binding("llama", "cuda:1=0,cuda:0=1-2" if site == "attn_1" else "cuda:0=0,cuda:1=1-2")
        dictionary = tiny_dictionaries(binding)[parse_site(site)].to("cuda:0" if site == "attn_1" else "cuda:1")
        found = encoder_sums(binding, dictionary, parse_site(site), [tiny_pairs()])
    assert np.allclose(found.magnitude, expected.magnitude, rtol=1e-4, atol=1e-5)


# --- weights at rest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", ONE_STEP), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", EXACT), ("gpt2", ONE_STEP), ("gemma2", ONE_STEP)))],
)
def test_weights_on_disk_give_the_same_edges_and_are_away_afterwards(tmp_path: Path, family: str, settings: EdgeSettings) -> None:
    folder = save_tiny(tmp_path / "model", family)
    plain, resting = (bind(load_model(str(folder), device=device)) for device in ("cpu", "cpu+disk"))
    parameters = dict(resting.module.named_parameters())
    away = {name for name, parameter in parameters.items() if parameter.is_meta}
    assert away == {name for name in parameters if ".layers." in name or ".h." in name}
    assert edges_of(resting, tiny_dictionaries(resting), settings) == edges_of(plain, tiny_dictionaries(plain), settings)
    assert away == {name for name, parameter in resting.module.named_parameters() if parameter.is_meta}
    resting.assert_no_hooks()


@pytest.mark.slow
def test_what_rests_on_disk_has_a_folder_of_its_own_that_goes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featlas.model.loading.cache_folder", lambda: tmp_path / "cache")
    folder, own = save_tiny(tmp_path / "model", "llama"), f"{socket.gethostname()}-"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    place = tmp_path / "cache" / "offload"
    left, elsewhere, other = place / f"{own}{ended.pid}-x", place / f"elsewhere-{ended.pid}-x", place / f"{own}{os.getpid()}-x"
    for kept in (left, elsewhere, other):
        kept.mkdir(parents=True)
    models = [load_model(str(folder), device="cpu+disk", dtype=dtype) for dtype in ("float32", "bfloat16")]
    names = lambda: {path.name for path in place.iterdir()} - {elsewhere.name, other.name}
    assert len(names()) == 2
    assert all(name.startswith(f"{own}{os.getpid()}-") for name in names())
    del models
    gc.collect()
    assert names() == set()


def test_graphs_hold_no_weight_that_rests(tmp_path: Path) -> None:
    binding = bind(load_model(str(save_tiny(tmp_path / "model", "llama")), device="cpu+disk"))
    x = torch.randn(1, 2, binding.d_model, requires_grad=True)
    y = binding.transform(1, x)
    assert not binding.module._loans.out  # what was lent is back
    seen, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [one for one, _ in node.next_functions]
    (ours,) = torch.autograd.grad(y.sum(), x)
    plain = bind(load_model(str(tmp_path / "model")))
    (theirs,) = torch.autograd.grad(plain.transform(1, x).sum(), x)
    assert torch.equal(ours, theirs)


# --- what --device says ------------------------------------------------------------------------------------------------


def test_layers_go_where_they_are_told() -> None:
    skeleton = skeleton_of(tiny_config("llama", n_layers=4))
    found = device_map(parse_placement("cuda:0=0-1,cuda:1=2,disk=3", here=False), skeleton)
    layers = {f"model.layers.{i}": device for i, device in enumerate(("cuda:0", "cuda:0", "cuda:1", "disk"))}
    outside = {"model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0", "model.norm": "cuda:1", "lm_head": "cuda:1"}
    assert found == layers | outside


def test_an_output_head_that_is_the_embedding_stays_with_it() -> None:
    config = tiny_config("gemma2")
    config.tie_word_embeddings = True
    found = device_map(parse_placement("cuda:0=0-1,cuda:1=2", here=False), skeleton_of(config))
    assert (found["lm_head"], found["model.norm"]) == ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("text", "said"),
    [("cpu=0-1", "layer 2"), ("cpu=0-9", "layer 3"), ("cpu=0-2,disk=1", "given twice"), ("cpu=a", "no layers"), ("cpu+cpu", "cpu+disk")],
)
def test_a_placement_that_does_not_fit_is_refused_with_its_reason(text: str, said: str) -> None:
    with pytest.raises(BadPlacement, match=said.replace("+", r"\+")):
        device_map(parse_placement(text), skeleton_of(tiny_config("llama")))


def test_devices_that_are_not_here_are_named() -> None:
    with pytest.raises(NoSuchDevice, match="cuda:7"):
        parse_placement("cuda:7=0-2")


def test_a_device_map_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"model": "cpu", "lm_head": "cpu"}))
    assert device_map(parse_placement(str(file)), skeleton_of(tiny_config("llama"))) == {"model": "cpu", "lm_head": "cpu"}
    for content, said in (('{"model": "cpu"}', "lm_head"), ('{"modle": "cpu"}', "modle"), ("[", "device map")):
        file.write_text(content)
        with pytest.raises(BadPlacement, match=said):
            device_map(parse_placement(str(file)), skeleton_of(tiny_config("llama")))


# --- precision --------------------------------------------------------------------------------------------------------


def test_half_precision_is_near_and_everything_around_it_is_float32() -> None:
    plain, half = bind(tiny_module("llama")), bind(tiny_module("llama", dtype=torch.bfloat16))
    assert (half.dtype, half.precision) == (torch.float32, torch.bfloat16)
    expected, found = (edges_of(b, tiny_dictionaries(b), ONE_STEP) for b in (plain, half))
    top = sorted(expected, key=lambda key: -abs(expected[key]))[:100]
    error = sum(abs(found.get(key, 0.0) - expected[key]) for key in top) / sum(abs(expected[key]) for key in top)
    assert 1e-5 < error < 0.1


# --- dictionaries that come and go -------------------------------------------------------------------------------------


def saved(folder: Path, n: int = 3) -> Path:
    for i in range(n):
        one = tiny_dictionary("relu", 16, seed=i)
        place = folder / f"resid_{i}"
        place.mkdir(parents=True)
        save_file({name: getattr(one, name).contiguous() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}, place / WEIGHTS_FILE)
        config = {"architecture": "standard", "d_in": 16, "d_sae": 24, "apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": {}}
        (place / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def test_dictionaries_are_read_when_used_and_let_go_beyond_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(n_layers=3, d_model=16, name="tiny", device=torch.device("cpu"))
    folder = saved(tmp_path / "dictionaries")
    one_and_a_half = 3 * (2 * 16 * 24 + 24 + 16) * 4 // 2
    monkeypatch.setenv("FEATLAS_DICTIONARY_MEMORY", str(one_and_a_half))
    found = load_dictionaries(str(folder), model)
    opened = [found[site] for site in found.sites]
    assert found.shelf.reads == 0
    assert [(d.d_sae, d.d_in, d.kind) for d in opened] == [(24, 16, "relu")] * 3
    x = torch.randn(5, 16)
    for i in (0, 1, 0, 2):
        whole = tiny_dictionary("relu", 16, seed=i)
        torch.testing.assert_close(opened[i].encode(x), whole.encode(x))  # weights that lie otherwise in memory are multiplied otherwise
        assert torch.equal(opened[i].W_enc, whole.W_enc)
        assert torch.equal(opened[i].directions(torch.tensor([3, 1])), whole.W_dec[[3, 1]])
        assert sum("W_dec" in vars(one) for one in opened) == 1
    assert found.shelf.reads == 4


def test_a_shelf_lets_the_one_go_that_was_used_longest_ago() -> None:
    made = [tiny_dictionary("relu", 16, seed=i) for i in range(3)]
    shelf = Shelf(2 * made[0].n_bytes + 100)
    for i, one in enumerate(made[:2]):
        shelf.put(one, lambda i=i: tiny_dictionary("relu", 16, seed=i), torch.device("cpu"))
    made[0].decode(torch.zeros(1, 24))
    shelf.put(made[2], lambda: tiny_dictionary("relu", 16, seed=2), torch.device("cpu"))
    assert ["W_dec" in vars(one) for one in made] == [True, False, True]


def test_hashes_of_large_files_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featlas.model.hashes.WORTH_IT", 3)
    monkeypatch.setattr("featlas.model.hashes._SETTLED", -1.0)
    file, asked = tmp_path / "weights", []
    file.write_text("abc")
    look = lambda: remembered([file], lambda: asked.append(1) or str(len(asked)), tmp_path / "cache", "test")
    assert [look(), look()] == ["1", "1"]
    file.write_text("abcd")
    assert [look(), look()] == ["2", "2"]


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_has_the_numbers_that_one_works_out_by_hand(tmp_path: Path) -> None:
    config = tiny_config("llama")  # 3 layers of width 16, MLP 48, 4 heads of 4 with 2 for keys and values, 48 tokens, an output head of its own
    config.save_pretrained(tmp_path)
    attention, mlp, norms = 16 * 16 * 2 + 16 * 8 * 2, 3 * 16 * 48, 2 * 16
    found = plan(PlanOptions(str(tmp_path), features=32, device="cuda:0=0-1,cuda:1=2", machine={"cuda:0": 1, "cuda:1": 1}, dtype="bfloat16"))
    assert [(part.parameters, part.times) for part in found.parts] == [(attention, 3), (mlp, 3), (norms, 3), (2 * 48 * 16 + 16, 1)]
    block = attention + mlp + norms
    assert found.parameters == 3 * block + 2 * 48 * 16 + 16
    assert found.bytes_by_dtype["bfloat16"] == 2 * found.parameters
    one = (3 * 16 * 32 + 2 * 32 + 16) * 4  # encoder, its transposed copy, decoder; biases: float32 beside a bfloat16 model
    assert [(p.device, p.layers, p.weights, p.dictionaries) for p in found.places] == [
        ("cuda:0", (0, 1), 2 * (2 * block + 48 * 16), 2 * one), ("cuda:1", (2,), 2 * (block + 16 + 48 * 16), one),
    ]  # fmt: skip
    assert found.working.least == max(found.working.sequence, found.working.lane)
    assert found.working.fits


def test_a_plan_is_of_a_model_s_own_bytes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2")
    model = load_model(str(folder))
    found = plan(PlanOptions(str(folder)))
    assert found.parameters == sum(parameter.numel() for parameter in model.module.parameters())
    assert sum(place.weights for place in found.places) == sum(placement.placed_bytes(model.module).values())


# --- long prompts -----------------------------------------------------------------------------------------------------


def test_attention_that_keeps_no_patterns_gives_the_same_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bind(tiny_module("llama"))
    expected = edges_of(plain, tiny_dictionaries(plain), ONE_STEP)
    asked: list[bool] = []
    monkeypatch.setattr(effective, "_keeps_patterns", lambda *of, real=effective._keeps_patterns: asked.append(real(*of)))
    assert_equal(edges_of(plain, tiny_dictionaries(plain), ONE_STEP), expected)
    assert True in asked  # short prompts do keep them
