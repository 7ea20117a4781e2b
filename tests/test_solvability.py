"""Solvability on a model whose logits are worked out by hand, on random ones against plain forwards, and on SmolLM2."""

import polars as pl
import pytest
import torch
from featlas.model.loading import LoadedModel, load_model, wrap_model
from featlas.model.solvability import CHECK_SCHEMA, check_task
from featlas.model.tasks import NoPairs, Pair, build_task

from .micro import FAMILIES, tiny_module, word_tokenizer


def last_word_model() -> LoadedModel:
    """A Llama whose blocks add nothing: after word i < 16, the logit of word v is 4·W[v, i] (RMSNorm makes 4 of a one-hot of width 16).

    W[1, 3] = 2, W[2, 3] = 1, W[1, 4] = 1/2, W[2, 4] = 1, W[5, 4] = 3, all others 0.
    """
    module = tiny_module("llama")
    weights = module.state_dict()
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            value.zero_()
    weights["model.norm.weight"].fill_(1)
    weights["model.embed_tokens.weight"][:16] = torch.eye(16)
    for word, after, value in ((1, 3, 2.0), (2, 3, 1.0), (1, 4, 0.5), (2, 4, 1.0), (5, 4, 3.0)):
        weights["lm_head.weight"][word, after] = value
    assert not module.config.tie_word_embeddings
    return wrap_model(module, word_tokenizer(), name="by-hand", revision="0")


def test_by_hand() -> None:
    pairs = [
        Pair("w6 w3", "w6 w4", " w1", " w2", "first", "x"),  # clean 8 - 4, corrupt 2 - 4: right, flips, w1 likeliest
        Pair("w6 w4", "w6 w3", " w2", " w1", "first", "y"),  # clean 4 - 2, corrupt 4 - 8: right, flips, but w5 likeliest
        Pair("w7 w4", "w7 w3", " w1", " w2", "first", "y"),  # clean 2 - 4, corrupt 8 - 4: wrong
        Pair("w6 w6 w3", "w6 w6 w8", " w1", " w2", "second"),  # clean 4, corrupt 0 - 0: right, does not flip
    ]
    frame = check_task(last_word_model(), pairs, batch_size=2)
    assert frame.schema == pl.Schema(CHECK_SCHEMA)
    expected = [
        ("first", None, 3, 2 / 3, 4 / 3, -2 / 3, 2 / 3, 1 / 3),
        ("first", "x", 1, 1.0, 4.0, -2.0, 1.0, 1.0),
        ("first", "y", 2, 1 / 2, 0.0, 0.0, 1 / 2, 0.0),
        ("second", None, 1, 1.0, 4.0, 0.0, 0.0, 1.0),
    ]
    assert [row[:3] for row in frame.rows()] == [row[:3] for row in expected]
    for row, numbers in zip(frame.rows(), expected, strict=True):
        assert row[3:] == pytest.approx(numbers[3:], abs=1e-4)


def test_no_pairs() -> None:
    with pytest.raises(NoPairs):
        check_task(last_word_model(), [])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_against_plain_forwards(family: str) -> None:
    tokenizer = word_tokenizer()
    model = wrap_model(tiny_module(family), tokenizer, name=family, revision="0")
    pairs = [Pair(f"w{i} w{j}", f"w{j} w{j}", f" w{i}", " w40", "t") for i in range(5) for j in range(5)]
    differences = []
    for pair in pairs:
        logits = model.module(tokenizer(pair.clean, return_tensors="pt")["input_ids"]).logits[0, -1]
        differences.append((logits[int(pair.answer[2:])] - logits[40]).item())
    (row,) = check_task(model, pairs, batch_size=7).rows(named=True)
    assert row["logit_diff"] == pytest.approx(sum(differences) / 25, abs=1e-5)
    assert row["accuracy"] == pytest.approx(sum(d > 0 for d in differences) / 25)


@pytest.mark.smollm2
@pytest.mark.parametrize("name", ["agreement", "ioi", "pronoun", "greater_than", "profession_gender"])
def test_smollm2_solves_tasks(name: str) -> None:
    model = load_model("smollm2")
    whole = check_task(model, build_task(name, model.tokenizer, n=48)).row(0, named=True)
    assert whole["accuracy"] >= 0.9
    assert whole["flipped"] >= 0.75
    assert whole["corrupt_logit_diff"] < 0 < whole["logit_diff"]
