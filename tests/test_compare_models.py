"""Two models from text to verdict: edges of both, aligned samples, a stored matching, `featlas compare`.

The second model is the first in disguise: its vocabulary is in another order and its dictionaries' features are shuffled, so that neither a token's
number nor a feature's says anything. The third has other weights.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from featlas.queries.matches import Method, Pairing, matched_features, read_matches
from featlas.queries.statistics import StatisticsStore
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .micro import VOCAB, tiny_module, word_tokenizer
from .study_atlas import line
from .test_dictionary_sources import save_sae

SITES, WIDTH, D_SAE = ("embed", "resid_0", "resid_1"), 8, 12
SIZES = {"n_layers": 2, "d_model": WIDTH, "n_heads": 2}

pytestmark = pytest.mark.slow


def shuffled(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


def save_disguised(folder: Path) -> None:
    """The model of seed 1 with token i called as token order[i] was."""
    order = shuffled(7, VOCAB)
    module = tiny_module("llama", seed=1, **SIZES)
    with torch.no_grad():
        rows = {id(layer.weight): layer.weight for layer in (module.get_input_embeddings(), module.get_output_embeddings())}
        for weight in rows.values():  # once where they are tied
            weight.copy_(weight[torch.from_numpy(order)].clone())
    words = sorted(word_tokenizer().get_vocab().items(), key=lambda entry: entry[1])
    tokenizer = Tokenizer(models.WordLevel({words[old][0]: new for new, old in enumerate(order)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    module.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def save_shuffled(folder: Path, seed: int, order: np.ndarray) -> None:
    """The dictionary of `save_sae` whose feature k is that one's feature order[k]."""
    sae: Any = save_sae(folder, d_in=WIDTH, seed=seed)
    rows = torch.from_numpy(order)
    with torch.no_grad():
        for parameter, moved in ((sae.W_enc, sae.W_enc[:, rows]), (sae.b_enc, sae.b_enc[rows]), (sae.W_dec, sae.W_dec[rows])):
            parameter.copy_(moved.clone())
    sae.save_model(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `first`, `disguised`, `other`; dictionaries `plain` and `shuffled`; a task; a text."""
    made = tmp_path_factory.mktemp("models")
    for name, seed in (("first", 1), ("other", 2)):
        tiny_module("llama", seed=seed, **SIZES).save_pretrained(made / name)
        word_tokenizer().save_pretrained(made / name)
    save_disguised(made / "disguised")
    for i, site in enumerate(SITES):
        save_sae(made / "plain" / site, d_in=WIDTH, seed=i)
        save_shuffled(made / "shuffled" / site, i, shuffled(i, D_SAE))
    (made / "task.jsonl").write_text("".join(json.dumps(line(i)) + "\n" for i in range(6)), encoding="utf-8")
    random = np.random.default_rng(0)
    (made / "text.txt").write_text(" ".join(f"w{i}" for i in random.integers(0, 40, 1500)))
    return made


@pytest.fixture(scope="module")
def run_of() -> dict[str, str]:
    """The key of each model's run, as tests make them."""
    return {}


def model_of(folder: Path, name: str) -> tuple[object, ...]:
    return "--model", folder / name, "--dictionaries", folder / ("plain" if name == "first" else "shuffled")


def prepared(featlas, folder: Path, runs: dict[str, str], name: str) -> str:
    """The edges of `first` and of one more, their aligned samples and matching; the matching's key."""
    for one in ("first", name):
        if one not in runs:
            code, out, err = featlas(
                "ingest", "edges", *model_of(folder, one), "--task", folder / "task.jsonl", "--steps", 1, "--sites", ",".join(SITES),
                "--atlas", folder / "atlas", "--json",
            )  # fmt: skip
            assert code == 0, err
            runs[one] = json.loads(out)["run"]
    other = [str(part).replace("--", "--other-", 1) for part in model_of(folder, name)]
    text = ("--corpus", folder / "text.txt", "--length", 40)
    code, out, err = featlas("ingest", "aligned", *model_of(folder, "first"), *other, *text, "--atlas", folder / "atlas", "--json")
    assert code == 0, err
    code, out, err = featlas("analyze", "match", json.loads(out)["aligned"], "--atlas", folder / "atlas", "--json")
    assert code == 0, err
    return str(json.loads(out)["matching"])


def compared(featlas, folder: Path, a: str, b: str, *more: object) -> tuple[dict[str, Any], str]:
    code, out, err = featlas("compare", a, b, "--only", "edges,refinement", "--atlas", folder / "atlas", "--json", *more)
    assert code == 0, err
    found = json.loads(out)
    return found, " ".join(found["verdict"])


def number(found: dict[str, Any], part: str, quantity: str) -> float:
    return next(row["value"] for row in found["values"] if (row["part"], row["quantity"], row["site"]) == (part, quantity, ""))


def test_a_model_in_disguise_is_recognised_and_its_graph_is_the_same(featlas, folder: Path, run_of: dict[str, str]) -> None:
    key = prepared(featlas, folder, run_of, "disguised")
    with StatisticsStore(folder / "atlas", read_only=True) as statistics:
        pairs = read_matches(statistics, key, method=Method.ALL_SITES).filter("significant", "mutual")
        assert matched_features(statistics, key, pairing=Pairing.MUTUAL).height == pairs.height > 2 * D_SAE
    assert (pairs["site_a"] == pairs["site_b"]).all()
    assert pairs["score"].min() > 0.9999
    for site, a, b in pairs.select("site_a", "feature_a", "feature_b").iter_rows():
        assert shuffled(SITES.index(site), D_SAE)[b] == a

    found, _ = compared(featlas, folder, run_of["first"], run_of["disguised"])
    assert found["matching"] == key
    assert (found["model_a"], found["model_b"]) == tuple(run.split("|")[0] for run in (pairs["source"][0], pairs["target"][0]))
    assert number(found, "edges", "Jaccard") == 1
    assert number(found, "edges", "weighted Jaccard") == pytest.approx(1, abs=1e-4)
    assert number(found, "edges", "sign agreement") == 1
    assert number(found, "coverage", "strength of A between matched nodes") == pytest.approx(
        number(found, "coverage", "strength of B between matched nodes"), abs=1e-4
    )
    # the matching was made of first and disguised: asked for the other way round it is turned
    turned, _ = compared(featlas, folder, run_of["disguised"], run_of["first"])
    assert number(turned, "edges", "weighted Jaccard") == pytest.approx(1, abs=1e-4)
    assert (turned["matching"], turned["model_a"]) == (key, found["model_b"])


def test_another_model_through_its_matching_shares_less(featlas, folder: Path, run_of: dict[str, str]) -> None:
    key = prepared(featlas, folder, run_of, "other")
    found, said = compared(featlas, folder, run_of["first"], run_of["other"], "--matching", key[:8])
    assert found["matching"] == key
    assert 0 < number(found, "edges", "weighted Jaccard") < 0.9
    assert "Only what lies on matched nodes is compared" in said
    rows = pl.DataFrame(found["values"], infer_schema_length=None).filter((pl.col("part") == "edges") & (pl.col("quantity") == "Jaccard"))
    assert rows["null"].to_list() == ["B rewired", "matching permuted"]


def test_models_without_a_matching_say_how_to_make_one(featlas, folder: Path, run_of: dict[str, str]) -> None:
    prepared(featlas, folder, run_of, "disguised")
    prepared(featlas, folder, run_of, "other")
    code, _, err = featlas("compare", run_of["disguised"], run_of["other"], "--atlas", folder / "atlas")
    assert code != 0
    assert "featlas analyze match" in err
