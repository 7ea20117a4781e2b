"""Local functions on inputs that differ from a few points by a few nodes: the first layer is done on the changes alone.

A private input is a point (all nodes at baseline, or whole, with error nodes) plus coefficients times decoder rows. Norms are linear up
to one scale per row, so that a first layer's pre-activation is the point's plus coefficients times rows that are made once per site,
(decoder row · gain) · Wᵀ. What comes behind it, the hidden value, is an affine function short of the site's value (`Output`).

- a sum of the stream has no layer at all, its hidden value is the value;
- an MLP's hidden value is its inner activations, an attention's its heads' outputs before the projection.

The attention's own module runs on given queries, keys and values: rotations, head norms, masks and kernels are its own.
Sites that are compositions of several, and those behind a post-norm, have no such form (`low_rank` is None).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .binding import Binding, Forward, LocalFunction, UnknownArchitecture
from .products import fast_products, linear
from .readout import Output
from .sites import OUTPUT, Basis, Site, SiteKind
from .weights import LinearNorm, linear_norm, matrix, mlp_weights

_TOLERANCE = 1e-4
_FEW = 0.8
"""Changed nodes as a share of the stream's width, up to which their rows are summed; with more the layer itself is cheaper."""

Finish = Callable[[Tensor, Tensor], Tensor]
"""(stream, first layer) of rows, (rows, pos or 1, width) each, to their hidden value."""


@dataclass(frozen=True, eq=False)
class FirstLayer:
    """A linear layer on the normed stream: scale(x) · weight · norm(x) + bias. weight: (n, d_model), bias: (n,)."""

    module: nn.Module
    norm: LinearNorm
    weight: Tensor
    bias: Tensor
    finish: Finish

    @staticmethod
    def of(module: nn.Module, width: int, weights: list[Tensor], biases: list[Tensor | None], finish: Finish) -> "FirstLayer":
        weight = torch.cat(weights)
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
        shift = module(weight.new_zeros(1, width))[0]  # a LayerNorm's bias
        return FirstLayer(module, linear_norm(module, width), weight, bias + weight @ shift, finish)

    def linear(self, x: Tensor) -> Tensor:
        """The layer without bias and scale, (..., d_model) → (..., n)."""
        return linear(self.norm(x), self.weight)


@dataclass(frozen=True, eq=False)
class LowRank:
    """A site of this form. inputs: what its stream is the sum of. layer: None for a sum. output: None where the hidden value is the value."""

    function: LocalFunction
    inputs: tuple[Site, ...]
    layer: FirstLayer | None
    output: Output | None

    def stream(self, values: Mapping[Site, Tensor], constants: Mapping[Site, Tensor]) -> Tensor:
        """The stream that the site reads, from its parents' values."""
        f = self.function
        parts = [f.binding.written(s, values[s], f.bases.get(s, Basis.RESIDUAL)) if s in values else constants[s] for s in self.inputs]
        return sum(parts[1:], parts[0])

    def directions(self, parent: Site, W_dec: Tensor) -> Tensor:
        """What units of a parent's features add to the stream, (C, d_in) → (C, d_model)."""
        if self.function.bases.get(parent, Basis.RESIDUAL) is Basis.RESIDUAL:
            return W_dec
        binding = self.function.binding
        assert isinstance(binding, Binding)  # no other model has heads
        return linear(W_dec, matrix(binding.blocks[parent.layer].out_proj)[0])

    def rows(self, directions: Tensor) -> Tensor:
        """Per changed node what it adds to the stream and to the first layer, (U, d_model) → (U, d_model + n)."""
        return directions if self.layer is None else torch.cat([directions, self.layer.linear(directions)], dim=1)

    def hidden(self, points: Tensor, point: Tensor, coefficients: Tensor, rows: Tensor) -> Tensor:
        """Hidden values (R, pos or 1, width): of points (P, pos or 1, d_model), point[i] being row i's, coefficients (R, pos or 1, U)."""
        width, layer = points.shape[-1], self.layer
        x = points[point]  # (R, pos or 1, d_model)
        used = [coefficients[:, i].any(dim=0).nonzero().flatten() for i in range(x.shape[1])]
        few = layer is not None and rows.shape[1] > width and max(map(len, used)) <= _FEW * width
        first = layer.linear(points)[point] if few and layer is not None else None
        for i, columns in enumerate(used):  # positions that go together
            if len(columns):
                change = linear(coefficients[:, i, columns], (rows if few else rows[:, :width])[columns].T)
                x[:, i] += change[:, :width]
                if first is not None:
                    first[:, i] += change[:, width:]
        if layer is None:
            return x
        first = layer.linear(x) if first is None else first
        return layer.finish(x, first * layer.norm.scale(layer.module, x) + layer.bias)


@torch.no_grad()
def low_rank(function: LocalFunction, run: Forward, sample: Tensor) -> LowRank | None:
    """The form of a site's local function, None where it has none. sample: (1, pos, d_model), a stream to check an attention with."""
    site, graph, binding = function.target, function.graph, function.binding
    if not isinstance(binding, Binding):  # layers of other models are run as they are
        return None
    if not all(binding.is_home(s.layer) for s in (site, *function.parents) if s.layer >= 0):  # so are blocks of which a part lies elsewhere
        return None
    inputs = graph.architectural_parents(site)
    heads = [s for s in function.parents if function.bases.get(s, Basis.RESIDUAL) is Basis.HEADS]
    if function.site == OUTPUT or any(s not in function.parents and s not in function.constants for s in inputs):
        return None
    if any(not isinstance(binding.blocks[s.layer].post_attn, nn.Identity) for s in heads):
        return None
    if site.kind is SiteKind.RESID:
        return LowRank(function, inputs, None, None)
    try:
        if site.kind is SiteKind.MLP:
            return _mlp(binding, function, inputs)
        return _attention(binding, function, inputs, run, sample) if site.kind is SiteKind.ATTN else None
    except UnknownArchitecture:  # the module itself is always right
        return None


def _mlp(binding: Binding, function: LocalFunction, inputs: tuple[Site, ...]) -> LowRank | None:
    layer = function.target.layer
    block = binding.blocks[layer]
    if not isinstance(block.post_mlp, nn.Identity):
        return None
    weights = mlp_weights(binding, layer)
    if weights.W_gate is None:
        first = FirstLayer.of(block.ln_mlp, binding.d_model, [weights.W_in], [weights.b_in], lambda x, pre: weights.act(pre))
    else:
        width = len(weights.W_in)
        finish: Finish = lambda x, pre: weights.act(pre[..., width:]) * pre[..., :width]
        first = FirstLayer.of(block.ln_mlp, binding.d_model, [weights.W_in, weights.W_gate], [weights.b_in, weights.b_gate], finish)
    return LowRank(function, inputs, first, Output(weights.W_out, weights.b_out))


def _attention(binding: Binding, function: LocalFunction, inputs: tuple[Site, ...], run: Forward, sample: Tensor) -> LowRank | None:
    layer = function.target.layer
    block, basis = binding.blocks[layer], function.bases.get(function.target, Basis.RESIDUAL)
    if basis is Basis.RESIDUAL and not isinstance(block.post_attn, nn.Identity):
        return None
    fused = [m for name in ("query_key_value", "c_attn") if isinstance(m := getattr(block.attn, name, None), nn.Module)]
    modules: list[Any] = fused[:1] or [getattr(block.attn, name) for name in ("q_proj", "k_proj", "v_proj")]
    weights, biases = zip(*(matrix(m) for m in modules), strict=True)
    sizes = [len(w) for w in weights]
    end = matrix(block.out_proj)

    def finish(x: Tensor, pre: Tensor) -> Tensor:
        given = {id(m.weight): part for m, part in zip(modules, pre.split(sizes, dim=-1), strict=True)}
        with fast_products(x), _Given(given, id(block.out_proj.weight)):
            return binding.attend(layer, x, run, Basis.HEADS)

    first = FirstLayer.of(block.ln_attn, binding.d_model, list(weights), list(biases), finish)
    ours = finish(sample, first.linear(sample) * first.norm.scale(block.ln_attn, sample) + first.bias)
    theirs = binding.attend(layer, sample, run, Basis.HEADS)
    if not float((ours - theirs).norm()) <= _TOLERANCE * float(theirs.norm()):
        return None
    return LowRank(function, inputs, first, Output(*end) if basis is Basis.RESIDUAL else None)


class _Given(TorchFunctionMode):
    """Inside, layers whose weights are named give what is given instead of their products; the one named last gives nothing worth reading."""

    def __init__(self, given: Mapping[int, Tensor], last: int) -> None:
        super().__init__()
        self.given, self.last = given, last

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is functional.linear or func is torch.addmm:
            x, weight = (args[0], args[1]) if func is functional.linear else (args[1], args[2])
            if (found := self.given.get(id(weight))) is not None:
                return found.reshape(*x.shape[:-1], found.shape[-1])
            if id(weight) == self.last:
                return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0 if func is functional.linear else 1])
        return func(*args, **(kwargs or {}))
