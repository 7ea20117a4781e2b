"""The self-check: every family passes it, and a model that is seen wrong fails the comparison that it concerns."""

import pytest
import torch
from featlas.model.binding import Binding, bind
from featlas.model.self_check import self_check

from .micro import FAMILIES, tiny_module

NAMES = ["reading", "blocks", "output head", "attention heads", "writing", "local functions", "tails", "hooks"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_seen_right(family: str) -> None:
    found = self_check(bind(tiny_module(family)))
    assert [one.name for one in found] == NAMES
    assert {one.name: one.error for one in found if not one.works} == {}
    assert max(one.error for one in found) > 0  # nothing was compared with itself


def wrong(found: list) -> set[str]:
    return {one.name for one in found if not one.works}


def test_a_block_that_does_more_than_its_parts_is_found() -> None:
    module = tiny_module("llama")
    block = module.model.layers[1]
    original = block.forward
    block.forward = lambda *args, **kwargs: 1.01 * original(*args, **kwargs)
    # reading and writing go by the model's own run and are right; whatever is composed by hand is not
    assert wrong(self_check(Binding(module))) == {"blocks", "local functions", "tails"}


def test_an_output_head_with_a_cap_that_nobody_knows_is_found() -> None:
    module = tiny_module("llama")
    head = module.lm_head
    original = module.forward

    def capped(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    module.forward = capped
    assert head is module.get_output_embeddings()
    assert wrong(self_check(Binding(module))) == {"output head"}


def test_a_hook_that_changes_what_is_read_is_found() -> None:
    module = tiny_module("gpt2")
    binding = bind(module)
    binding.assert_no_hooks()
    calls = []

    def drift(layer, args, output):
        calls.append(1)
        return (output[0] * (1 + 0.01 * len(calls)), *output[1:]) if isinstance(output, tuple) else output * (1 + 0.01 * len(calls))

    binding.assert_no_hooks = lambda: None  # the drift below is what must be seen
    module.transformer.h[0].mlp.register_forward_hook(drift)
    assert {"reading", "hooks"} <= wrong(self_check(binding))
