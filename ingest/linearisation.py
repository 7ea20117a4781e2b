"""What virtual weights take from activations: an MLP's mean slopes and, by choice, the norms' mean scales.

With the scales of its norms frozen, the Jacobian of an MLP at position t, from the stream to what it adds to the stream, is

    J_t = p_t · G_post W_out (diag(first_t) W_in + diag(second_t) W_gate) G_pre · s_t,

G the norms' linear parts, s_t and p_t their scales. Its mean over the positions of a text is exactly the same product with the means
of s_t p_t first_t and s_t p_t second_t in the middle, which is all that has to be kept. With `NormScale.ONE` the scales count as 1 (gates
are taken where the model has them, scales included). An attention head's path takes the scale of the norm before it at one position and of a
post-norm at another, hence the product of their two means.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from ..model.binding import Binding, capture_sites
from ..model.sites import EMBED, Basis, Site, SiteKind
from ..model.weights import MLPWeights, ModelWeights, computed
from .statistics import Corpus


class NormScale(StrEnum):
    """What stands for the scale of a norm, which depends on the input."""

    ONE = "one"  # the norm's gain alone
    MEAN = "mean"  # its mean over a text


@dataclass(frozen=True)
class Linearisation:
    """Mean scales and slopes by layer; what is not there was not asked for.

    scale, post_scale: of the norms before and after attention, 1 where not measured.
    first, second: the diagonal factors of the MLPs, (d_mlp,) each, their norms' scales included; `second` of gated ones only.
    They are float64 on the CPU.
    """

    scale: Mapping[int, float] = field(default_factory=dict)
    post_scale: Mapping[int, float] = field(default_factory=dict)
    first: Mapping[int, Tensor] = field(default_factory=dict)
    second: Mapping[int, Tensor] = field(default_factory=dict)
    tokens: int = 0


@torch.no_grad()
def measure_linearisation(
    weights: ModelWeights,
    corpus: Corpus,
    *,
    attention: Iterable[int],
    mlps: Iterable[int],
    norm_scale: NormScale,
    progress: Callable[[int, int], None] | None = None,
) -> Linearisation:
    """One pass over the positions of a corpus for the attention layers (scales, `NormScale.MEAN` only) and the MLPs named."""
    sums = _Sums(weights, norm_scale)
    attention = sorted(set(attention)) if norm_scale is NormScale.MEAN else []
    mlps = sorted(set(mlps))
    bases = _sites_needed(weights.binding, attention, mlps)
    done = 0
    for batch in corpus.batches():
        captured = capture_sites(weights.binding, batch.tokens.to(weights.binding.device), bases)
        # (batch, pos, width), contiguous again: some linear layers take a view
        values = {site: value[:, corpus.first_position :].contiguous() for site, value in captured.items()}
        for layer in attention:
            sums.add_attention(layer, values)
        for layer in mlps:
            sums.add_mlp(layer, values)
        sums.tokens += batch.tokens.shape[0] * (batch.tokens.shape[1] - corpus.first_position)
        done += len(batch.tokens)
        if progress is not None:
            progress(done, corpus.n_sequences)
    return sums.means()


def _before(layer: int) -> Site:
    return Site(SiteKind.RESID, layer - 1) if layer else EMBED


def _sites_needed(binding: Binding, attention: list[int], mlps: list[int]) -> dict[Site, Basis]:
    """The stream before each layer; head outputs where a post-norm, or an MLP that reads its attention, needs them."""
    bases = {_before(layer): Basis.RESIDUAL for layer in (*attention, *mlps)}
    heads = [*attention, *(() if binding.parallel else mlps)]
    return {**bases, **{Site(SiteKind.ATTN, layer): Basis.HEADS for layer in heads}}


class _Sums:
    """Running sums over positions; batches are added up in float64."""

    def __init__(self, weights: ModelWeights, norm_scale: NormScale) -> None:
        self.weights, self.norm_scale = weights, norm_scale
        self.tokens = 0
        self._scales: dict[int, tuple[float, float]] = {}
        self._factors: dict[int, tuple[Tensor, Tensor | None]] = {}

    def add_attention(self, layer: int, values: Mapping[Site, Tensor]) -> None:
        block, weights = self.weights.binding.blocks[layer], self.weights.attention(layer)
        scale = weights.norm.scale(block.ln_attn, values[_before(layer)])  # (batch, pos, 1)
        post = weights.post.scale(block.post_attn, self.weights.binding.apply(block.out_proj, values[Site(SiteKind.ATTN, layer)]))
        earlier = self._scales.get(layer, (0.0, 0.0))
        self._scales[layer] = (earlier[0] + float(computed(scale).sum()), earlier[1] + float(computed(post).sum()))

    def add_mlp(self, layer: int, values: Mapping[Site, Tensor]) -> None:
        binding, weights = self.weights.binding, self.weights.mlp(layer)
        resid = values[_before(layer)]  # (batch, pos, d_model)
        if not binding.parallel:
            attn = Site(SiteKind.ATTN, layer)
            resid = resid + binding.written(attn, values[attn], Basis.HEADS)
        normed = binding.apply(binding.blocks[layer].ln_mlp, resid)
        scale = self._scale(layer, weights, resid, normed)
        first, second = weights.factors(normed)  # (batch, pos, d_mlp)
        sums = _summed(first, scale), None if second is None else _summed(second, scale)
        if layer in self._factors:
            before = self._factors[layer]
            sums = before[0] + sums[0], None if before[1] is None or sums[1] is None else before[1] + sums[1]
        self._factors[layer] = sums

    def _scale(self, layer: int, weights: MLPWeights, resid: Tensor, normed: Tensor) -> Tensor | None:
        """s_t · p_t of each position, (batch, pos, 1)."""
        if self.norm_scale is NormScale.ONE:
            return None
        block = self.weights.binding.blocks[layer]
        return weights.norm.scale(block.ln_mlp, resid) * weights.post.scale(block.post_mlp, self.weights.binding.apply(block.mlp, normed))

    def means(self) -> Linearisation:
        return Linearisation(
            scale={layer: sums[0] / self.tokens for layer, sums in self._scales.items()},
            post_scale={layer: sums[1] / self.tokens for layer, sums in self._scales.items()},
            first={layer: sums[0] / self.tokens for layer, sums in self._factors.items()},
            second={layer: sums[1] / self.tokens for layer, sums in self._factors.items() if sums[1] is not None},
            tokens=self.tokens,
        )


def _summed(factors: Tensor, scale: Tensor | None) -> Tensor:
    """The sum over a batch's positions, (d_mlp,), in float64 on the CPU: not every device has that type."""
    return computed(factors if scale is None else factors * scale).flatten(0, -2).sum(0).cpu().double()
