"""Fuzzing in the small: a few cases of every target, always the same ones; and every way in which a case once broke, by itself.

The campaign is `python scripts/fuzz.py --all --cases 10000`.
"""

import json
import struct
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.ingest.label_files import read_neuronpedia
from featlas.model.bios import BadBio, read_bios
from featlas.model.corpus import BadRecord, read_texts
from featlas.queries.kept_files import DamagedFile, run_options
from featlas.queries.samples import SampleStore
from featlas.queries.series import SeriesRecord, write_series
from hypothesis import given, settings

from .fuzz.campaign import attack, shares, table
from .fuzz.made import WholeStage, made
from .fuzz.mutations import DEEP, Doubled, Raw, changed, documents, places, written
from .fuzz.targets import CONFIG, SAE, TARGETS, tensors_file
from .study_atlas import TinyAtlas

CASES = {"pairs": 8, "labels": 4, "attribution_graphs": 3, "queries": 6, "serve": 12, "settings": 6, "dictionaries": 3, "names": 2}
"""Cases of a target in CI; one of each other."""


@pytest.fixture(scope="module")
def stage(tiny: TinyAtlas, tmp_path_factory: pytest.TempPathFactory) -> WholeStage:
    return made(tiny, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TARGETS if name not in ("databases", "models", "gguf")])
def test_no_case_ends_in_a_traceback_or_changes_what_it_was_refused(stage: WholeStage, name: str) -> None:
    report = attack(TARGETS[name], stage, CASES.get(name, 1), raising=True)
    assert report.cases >= 1
    assert report.refused + report.succeeded == report.cases


def test_a_campaign_shares_its_cases_out_and_tells_of_them() -> None:
    given = shares(1000)
    assert set(given) == set(TARGETS)
    assert 1000 <= sum(given.values()) < 1000 + len(TARGETS)
    assert given["labels"] > given["gguf"] > 0
    assert table([]).splitlines()[-1] == "| all | 0 | 0 | 0 | 0 | 0 |"


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(documents({"a": [1, {"b": "c"}]}))
def test_documents_are_bytes(data: bytes) -> None:
    assert isinstance(data, bytes)


def test_spoiling_a_document_by_hand() -> None:
    tree = {"a": [1, {"b": "c"}]}
    assert places(tree) == [(), ("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
    assert changed(tree, ("a", 1, "b"), lambda old: old * 2) == {"a": [1, {"b": "cc"}]}
    assert written(Doubled((("a", 1), ("a", Raw("NaN"))))) == '{"a": 1, "a": NaN}'


# ---- what broke once


@pytest.mark.parametrize("line", ["[" * DEEP + "]" * DEEP, '{"text": ' + "9" * 5_000 + "}", '{"text": "a"'])
def test_lines_of_a_corpus_that_no_parser_takes(tmp_path: Path, line: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(BadRecord, match="line 2"):
        list(read_texts(path))


def test_biographies_nested_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "bios.jsonl"
    path.write_text("[" * DEEP + "\n", encoding="utf-8")
    with pytest.raises(BadBio, match="line 1"):
        list(read_bios(path))


def test_manifests_of_runs_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "r.json"
    path.parent.mkdir()
    assert run_options(tmp_path, "r") == {}
    damaged = ("{", "[1]", "1", '{"options": 1}', '{"options": {"model": 3}}', '{"options": {"settings": "x"}}', "[" * DEEP, "\ud800")
    for text in damaged:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(DamagedFile, match=r"r\.json is damaged .*: move it away"):
            run_options(tmp_path, "r")
    path.write_text(json.dumps({"options": {"model": "m", "settings": {"steps": 2}}}))
    assert run_options(tmp_path, "r")["settings"] == {"steps": 2}


@pytest.mark.parametrize("change", [lambda m: [m], lambda m: {**m, "n_tokens": "many"}, lambda m: {k: v for k, v in m.items() if k != "sites"},
                                    lambda m: {**m, "sites": 3}, lambda m: {**m, "layout": "1"}])  # fmt: skip
def test_samples_whose_manifest_is_damaged(tmp_path: Path, change) -> None:
    folder = tmp_path / "samples" / "k"
    folder.mkdir(parents=True)
    whole = {
        "layout": 1, "key": "k", "model": "m", "basis": "activation", "source": "s", "dictionaries": {}, "n_sequences": 0, "n_tokens": 0,
        "settings": {}, "finished": "now", "sites": [],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(change(whole)))
    with pytest.raises(DamagedFile, match="featlas ingest samples"):
        SampleStore(tmp_path, read_only=True).runs()


def broken(path: Path, config: object, weights: bytes) -> Path:
    folder = path / "dictionaries" / "resid_0"
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    (folder / "sae_weights.safetensors").write_bytes(weights)
    return folder.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        (None, SAE, "is no dictionary's configuration"), ("text", SAE, "is no dictionary's"), ([CONFIG], SAE, "is no dictionary's configuration"),
        ({**CONFIG, "metadata": 3}, SAE, "is no dictionary's configuration"), ({**CONFIG, "architecture": ["standard"]}, SAE, "is no text"),
        (CONFIG, {k: v for k, v in SAE.items() if k != "W_enc"}, "'W_enc' is neither in"),
        ({**CONFIG, "architecture": "jumprelu"}, SAE, "'threshold' is neither in"),
        (CONFIG, {**SAE, "b_enc": np.zeros(5)}, "they are of no one dictionary"), (CONFIG, {**SAE, "W_dec": np.zeros(())}, "a matrix of"),
        (CONFIG, {**SAE, "b_dec": np.full(8, np.nan)}, "not finite"), ({**CONFIG, "architecture": "topk", "k": 99}, SAE, "k is 99"),
        ({**CONFIG, "architecture": "topk", "k": "x"}, SAE, "describe no dictionary"),
    ],
)  # fmt: skip
def test_dictionaries_that_are_none(tiny: TinyAtlas, featlas, tmp_path: Path, config: object, tensors: dict[str, np.ndarray], said: str) -> None:
    folder = broken(tmp_path, config, tensors_file(tensors))
    words = ("--model", tiny.folder / "model", "--dictionaries", folder, "--task", tiny.folder / "task.jsonl", "--steps", 1, "--limit", 1)
    code, out, err = featlas("ingest", "edges", *words, "--atlas", tmp_path / "atlas")
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "atlas" / "graph.lbug").exists()


def test_weights_too_large_are_said_to_be(tiny: TinyAtlas, featlas, tmp_path: Path) -> None:
    folder = broken(tmp_path, {"architecture": "linear"}, tensors_file({**SAE, "W_dec": np.full(SAE["W_dec"].shape, 1e38)}))
    words = ("--model", tiny.folder / "model", "--dictionaries", folder, "--task", tiny.folder / "task.jsonl", "--steps", 1, "--limit", 1)
    code, _, err = featlas("ingest", "edges", *words, "--atlas", tmp_path / "atlas")
    assert code == 1
    assert "not finite in torch.float32" in err
    assert "too large" in err


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"model_type": ["llama"]}, {"num_hidden_layers": 10**12}, {"num_attention_heads": None},
                                    {"sliding_window": 10**40}, {"max_position_embeddings": -(2**70)}])  # fmt: skip
def test_models_whose_configuration_is_of_none(tiny: TinyAtlas, featlas, tmp_path: Path, change: dict[str, object]) -> None:
    for path in (tiny.folder / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    code, _, err = featlas("tasks", "check", tiny.folder / "task.jsonl", "--limit", 2, "--model", tmp_path)
    assert code in (1, 2)
    assert len(err.strip().splitlines()) == 1


def test_a_message_holds_no_character_that_acts_on_a_terminal(featlas) -> None:
    code, _, err = featlas("tasks", "check", "agreement", "--model", "./a\x1b[2J\n\u202efeatlas: all is well\x9b")
    assert code == 2
    assert err == "featlas: no such model folder: ./a\\x1b[2J\\n\\u202efeatlas: all is well\\x9b\n"
    _, _, err = featlas("tasks", "check", "agreement", "--model", "./a\x7f\u202e", "--json")
    assert json.loads(err)["error"].endswith("./a\x7f\u202e")
    assert "\u202e" not in err


def test_a_command_in_a_folder_that_is_gone(featlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    for words in (("tasks", "list"), ("config", "path"), ("config", "init")):
        code, _, err = featlas(*words)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "the folder that you are in" in err


def test_a_message_is_no_longer_than_can_be_read(featlas) -> None:
    code, _, err = featlas("tasks", "check", "agreement", "--model", "./" + "x/" * 20_000)
    assert code == 2
    assert len(err) < 8_300
    code, _, err = featlas("tasks", "check", "agreement", "--device", "x" * 20_000)
    assert code == 2
    assert len(err) < 8_300
    assert err.endswith("characters more)\n")


@pytest.mark.slow
def test_statistics_whose_blocks_are_damaged(featlas, tiny: TinyAtlas, tmp_path: Path) -> None:
    atlas = tiny.copied(tmp_path)
    path = atlas / "statistics.duckdb"
    whole = path.read_bytes()
    for start, end in ((8, 12), (12_288, len(whole))):  # the magic word; every block behind the three headers
        path.write_bytes(bytes(byte ^ 0xFF if start <= place < end else byte for place, byte in enumerate(whole)))
        code, _, err = featlas("labels", "list", "--atlas", atlas)
        assert code in (1, 2)
        assert "statistics.duckdb" in err
        assert len(err.splitlines()) == 1


def test_a_series_whose_files_are_not_all_there(featlas, tmp_path: Path) -> None:
    write_series(tmp_path, SeriesRecord("5e21e5", "Tiny", "step", {}, {"members": pl.DataFrame({"name": ["a"], "x": [0.0]})}))
    code, _, err = featlas("series", "show", "--atlas", tmp_path)
    assert code == 2
    assert "series 5e21e5 lacks members.loss" in err
    assert featlas("series", "list", "--atlas", tmp_path)[0] == 0


@pytest.mark.parametrize("value", ["9" * 5_000, "[" * DEEP, "1" * 40])
def test_parameters_of_cypher_that_no_parser_takes(featlas, tiny: TinyAtlas, value: str) -> None:
    code, _, err = featlas("query", "--cypher", "RETURN $x AS x", "--param", f"x={value}", "--atlas", tiny.atlas, "--json")
    assert code in (0, 2)
    assert "Traceback" not in err


def test_neuronpedias_scores_that_are_no_list(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    explanation = {"modelId": "m", "layer": "0-res", "index": 1, "description": "verbs"}
    path.write_text(json.dumps([{**explanation, "scores": scores} for scores in (True, 3, "x", {})]))
    assert read_neuronpedia(path, {}, "resid_0").rows["confidence"].to_list() == [None] * 4


def test_arguments_that_are_no_text(featlas) -> None:
    code, _, err = featlas("labels", "list", "--site", "\udcff")
    assert (code, "no UTF-8" in err) == (2, True)


def test_a_safetensors_file_by_hand(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    path = tmp_path / "x.safetensors"
    path.write_bytes(tensors_file({"a": np.arange(6.0).reshape(2, 3), "b": np.ones(1)}))
    found = load_file(path)
    np.testing.assert_array_equal(found["a"], np.arange(6.0).reshape(2, 3))
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] < 200
