"""Loading from folders, GGUF files and the SmolLM2 package; what is refused, and how."""

import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gguf
import pytest
import torch
from featlas.errors import FeatlasError, UserError
from featlas.model import loading
from featlas.model.loading import LoadedModel, load_model
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from .micro import FAMILIES, save_tiny, tiny_module

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [3, 1, 4, 1, 5, 9, 2]])


def write_gguf(path: Path, seed: int = 0) -> torch.nn.Module:
    """Writes a tiny Llama as unquantised GGUF, as llama.cpp's converter lays it out; returns the module it was made from."""
    module = tiny_module("llama", seed=seed)
    config, weights = module.config, module.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: config.vocab_size - 1]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, letters[0] + letters[1]])
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in weights.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp pairs neighbouring dimensions in its rotation, transformers pairs halves
            value = value.reshape(heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.contiguous().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_of_each_family(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", family, n_layers=2)
    model = load_model(str(folder))
    torch.testing.assert_close(model.module(TOKENS).logits, tiny_module(family, n_layers=2)(TOKENS).logits, rtol=0, atol=1e-5)
    assert (model.n_layers, model.d_model, model.name) == (2, 16, "tiny")
    assert model.family == {"gpt_neox_sequential": "gpt_neox"}.get(family, family)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())


def test_key_holds_the_hash_of_the_weights(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    assert load_model(str(folder)).key == f"tiny@{expected}"
    save_tiny(tmp_path / "other" / "tiny", seed=1)
    assert load_model(str(tmp_path / "other" / "tiny")).revision != expected


def test_dtype(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "tiny"))
    model = load_model(folder, dtype="float64")
    assert model.dtype == next(model.module.parameters()).dtype == torch.float64


def test_handle_traces_the_same_module(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(str(save_tiny(tmp_path / "tiny")))
    seen: list[torch.Tensor] = []
    hook = model.module.get_submodule("model.layers.1").register_forward_hook(lambda module, args, output: seen.append(output))
    model.module(TOKENS)
    hook.remove()
    with model.handle.trace(TOKENS):
        traced = model.handle.model.layers[1].output.save()
    torch.testing.assert_close(traced, seen[0], rtol=0, atol=0)
    assert model.handle._module is model.module
    assert model.handle.tokenizer is model.tokenizer


def test_handle_intervenes(tmp_path: Path) -> None:
    model = load_model(str(save_tiny(tmp_path / "tiny")))
    with model.handle.trace(TOKENS):
        model.handle.model.layers[0].mlp.output[:] = 0
        without = model.handle.output.logits.save()
    hook = model.module.get_submodule("model.layers.0.mlp").register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    expected = model.module(TOKENS).logits
    hook.remove()
    torch.testing.assert_close(without, expected, rtol=0, atol=0)
    assert (model.module(TOKENS).logits - expected).abs().max() > 1e-3


def test_gguf_is_converted_once_and_equals_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_gguf(tmp_path / "micro.gguf")
    model = load_model(str(tmp_path / "micro.gguf"))
    torch.testing.assert_close(model.module(TOKENS).logits, source(TOKENS).logits, rtol=0, atol=1e-5)
    digest = hashlib.sha256((tmp_path / "micro.gguf").read_bytes()).hexdigest()[:12]
    assert model.key == f"micro@{digest}"
    (entry,) = (tmp_path / "cache" / "featlas" / "models").iterdir()
    assert digest in entry.name
    monkeypatch.setattr(loading, "_convert_gguf", lambda *a: pytest.fail("converted twice"))
    torch.testing.assert_close(load_model(str(tmp_path / "micro.gguf")).module(TOKENS).logits, model.module(TOKENS).logits, rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_convert_at_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "micro.gguf")
    script = "import sys; from featlas.model.loading import load_model; print(load_model(sys.argv[1]).key)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "micro.gguf")]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert [path.name.startswith("micro-") for path in (tmp_path / "cache" / "featlas" / "models").iterdir()] == [True]
    assert outputs[0][1] == outputs[1][1] == ""  # a library does not write to the terminal


def test_a_lost_race_is_no_error_and_a_stale_leftover_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    home = tmp_path / "featlas" / "models"
    (home / ".partial-old").mkdir(parents=True)
    os.utime(home / ".partial-old", (0, 0))
    (home / ".partial-new").mkdir()

    def convert(file: Path, folder: Path) -> None:
        winner = home / folder.name
        winner.mkdir()
        (winner / "first").touch()

    monkeypatch.setattr(loading, "_convert_gguf", convert)
    (tmp_path / "x.gguf").write_bytes(b"x")
    source = loading.find_source(str(tmp_path / "x.gguf"))
    assert (source.folder / "first").exists()
    assert {path.name for path in home.iterdir()} == {source.folder.name, ".partial-new"}


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def foreign_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), loading.NotAModelFolder, "has no config.json"),
        (break_config, loading.NotAModelFolder, "is not JSON"),
        (foreign_type, loading.UnsupportedModel, "'strange'.*never run"),
        (drop_weight, loading.ModelLoadFailed, "lacks 1 weights, model.layers.1.mlp.up_proj.weight"),
        (cut_weights, loading.ModelLoadFailed, "does not load"),
        (pickle_weights, loading.NotAModelFolder, "no .safetensors weights.*save_pretrained"),
        (drop_tokenizer, loading.NotAModelFolder, "no tokenizer"),
    ],
)
def test_harmed_folders(harm, error: type[FeatlasError], message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = save_tiny(tmp_path / "tiny")
    harm(folder)
    with pytest.raises(error, match=message) as raised:
        load_model(str(folder))
    assert "tiny" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("./nowhere", {}, "no such model folder: ./nowhere"),
        ("a/b/c", {}, "no such model folder: a/b/c"),
        ("nowhere.gguf", {}, "no such model file: nowhere.gguf"),
        ("not a name", {}, "neither a folder here nor a possible Hugging Face name"),
        ("smollm2", {"revision": "main"}, "'smollm2' has no revision 'main'"),
        ("smollm2", {"dtype": "int8"}, "unknown dtype 'int8': choose one of float32"),
        ("smollm2", {"device": "tpu"}, "device 'tpu' is not available here: choose one of cpu"),
        ("smollm2", {"device": "cuda:97"}, "device 'cuda:97' is not available here"),
    ],
)
def test_names_devices_and_types_that_cannot_be_had(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(name, **options)


def test_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(loading.HubUnreachable, match=r"'nobody/nothing' .*local folder.*'smollm2'") as raised:
        load_model("nobody/nothing")
    assert not isinstance(raised.value, UserError)
    assert "\n" not in str(raised.value)


def test_a_gguf_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "no.gguf").write_bytes(b"GGUFnot really")
    with pytest.raises(loading.ModelLoadFailed, match=r"no\.gguf cannot be read as a GGUF language model"):
        load_model(str(tmp_path / "no.gguf"))
    assert list((tmp_path / "cache" / "featlas" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "x.gguf").write_bytes(b"x")
    with pytest.raises(loading.CacheNotWritable, match="XDG_CACHE_HOME"):
        load_model(str(tmp_path / "x.gguf"))


def test_absent_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(loading.MissingExtra, match=r"featlas\[smollm2\]"):
        load_model("smollm2")


@pytest.mark.smollm2
def test_smollm2_loads_fast_and_knows_its_grammar() -> None:
    load_model("smollm2")
    started = time.perf_counter()
    model: LoadedModel = load_model("smollm2")
    assert time.perf_counter() - started < 5  # a second on a quiet machine; converting takes over 20
    assert (model.name, model.family, model.n_layers, model.d_model) == ("smollm2", "llama", 30, 576)
    tokens = model.tokenizer("The keys to the cabinet", return_tensors="pt")["input_ids"]
    best = model.module(tokens).logits[0, -1].argmax().item()
    assert model.tokenizer.decode([best]) == " are"
