"""What a batch will cost, said before it starts: downstream nodes, runs of the tail, time."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.binding import LocalFunction, Network
from ..model.products import fast_products
from .budget import block_flops, blocks_of, position_width
from .preparation import Prepared
from .settings import FirstFactor

BACKWARD = 1.6
"""By how much an operation with a backward pass, in smaller pieces, is slower than one of the plain forward pass (measured: 1.3 to 2)."""

TIMED_TOKENS = 256
"""Tokens in the forward pass by which the machine's speed is judged."""


@dataclass(frozen=True)
class Cost:
    """About so many rows, tail evaluations and floating-point operations of a batch, if every changed node is a downstream node.

    Of interpolated nodes one evaluation each is counted; those with two sides, or computed exactly after all, take more.
    seconds: from the operations, at the speed of the model's own forward pass here.
    """

    sequences: int
    rows: int
    evaluations: int
    flops: float
    seconds: float

    def of(self, sequences: int) -> "Cost":
        """The cost of so many sequences like these."""
        factor = sequences / self.sequences
        return Cost(sequences, round(self.rows * factor), round(self.evaluations * factor), self.flops * factor, self.seconds * factor)


def expected_cost(prepared: Prepared) -> Cost:
    """An estimate for a batch at threshold 0, from counts of changed nodes and the weights that each passes through."""
    settings, binding, (batch, pos) = prepared.settings, prepared.binding, prepared.shape
    per_block = block_flops(binding)
    rows, evaluations, flops, passes = 0, 0, 0.0, 0
    for site, dictionary in prepared.dictionaries.items():
        function = LocalFunction(binding, prepared.graph, site, prepared.bases)
        if not function.parents:
            continue
        candidates = prepared.candidates[site]
        features = sum(int((group.delta != 0).sum()) for group in candidates.groups)
        if settings.steps == 1:  # only what is active in the clean run has rows
            features = min(features, int(dictionary.active(prepared.values[site].flatten(0, 1)[candidates.live]).sum()))
        errors = int(candidates.live.sum()) if candidates.error_delta.any() else 0
        here = features + errors
        before, how = settings.steps - 1, settings.first_factor
        exact = how is FirstFactor.EXACT or settings.tolerance == 0
        runs = 0 if how is FirstFactor.CLEAN else errors * before + features * (before if exact else min(before, 1))
        place = float((candidates.live.nonzero().flatten() % pos).sum()) / int(candidates.live.sum()) if here else 0.0
        # A row's gradient passes the positions up to its own, a tail's run those from its own on: on average.
        flops += here * settings.steps * blocks_of(function) * per_block * (place + 1 if function.mixes_positions else 1)
        flops += runs * 2 * prepared.tail(site).n_layers * per_block * max(0.0, prepared.position + 1 - place)
        rows, evaluations = rows + here, evaluations + runs
        if here:
            # Whatever runs, runs at least once for each group of neighbouring positions, features and errors apart, forward and backward.
            groups = len((candidates.live.nonzero().flatten() % pos // position_width(pos)).unique())
            passes += groups * (2 * blocks_of(function) + (4 * prepared.tail(site).n_layers if runs else 0))
    speed, least = _speed(prepared)
    return Cost(batch, rows, evaluations, flops, BACKWARD * flops / speed + passes * least)


def _speed(prepared: Prepared) -> tuple[float, float]:
    """Floating-point operations a second of the model's forward pass on a batch of the engine's size, and seconds of a block on one token.

    Each the best of a few.
    """
    binding, pos = prepared.binding, prepared.shape[1]
    tokens = prepared.pairs.clean[:1].repeat(max(1, TIMED_TOKENS // pos), 1)
    flops = tokens.numel() * block_flops(binding) * binding.n_layers
    with torch.no_grad(), fast_products(next(iter(prepared.values.values()))):
        return flops / _fastest(binding, tokens), _fastest(binding, tokens[:1, :1]) / binding.n_layers


def _fastest(binding: Network, tokens: Tensor) -> float:
    """Seconds of the fastest of three forward passes."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        logits = binding.forward(tokens, {}).logits
        assert logits is not None
        float(logits[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best
