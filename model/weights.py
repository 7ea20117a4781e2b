"""The weights of a block as matrices, whatever the family calls and stores them, each checked against the module it comes from.

1. `linear_norm` takes a norm apart into its linear part (gain, centring) and a scale per position, which alone depends on the input.
2. `attention_weights` gives W_Q, W_K, W_V and W_O per head: split from fused matrices, key and value heads shared within groups.
   The attention module itself, run on two positions, must equal what these matrices give.
3. `mlp_weights` gives the matrices of a plain MLP, W_out·act(W_in·x), or of a gated one, W_out·(act(W_gate·x) ⊙ W_in·x). The MLP
   itself must equal what these give. With its norms' scales frozen, its Jacobian at a position is a product of these
   matrices and of diagonal factors, which `MLPWeights.factors` computes.
4. `read_directions` and `write_directions` are the features' ends: the linear part of the encoder, and what a feature adds to the stream.

A layout that is not known, or not as expected, raises `UnknownArchitecture`; nothing is guessed. Biases take part in the checks and
in the operating point of an MLP, never in the matrices. All matrices act on column vectors, (out, in).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .binding import Binding, Block, Forward, UnknownArchitecture
from .dictionaries import Dictionary, IdentityDictionary, LinearDictionary, Normalisation
from .dictionaries import computed as computed
from .placement import place_of, tensor_of
from .sites import Basis, Site

WEIGHTS_TOLERANCE = 1e-4
"""Relative error above which matrices are refused (fp32 models measure 1e-7 to 1e-6)."""

KEPT_LAYERS = 4
"""Layers whose matrices `ModelWeights` keeps: those of shared key and value heads are copies."""


@dataclass(frozen=True, eq=False)
class LinearNorm:
    """The linear part of a norm: x → gain ⊙ (x − mean(x) if centred). `gain` is (width,), None for the identity.

    A LayerNorm or RMSNorm is this times a scale per position, plus a bias.
    """

    gain: Tensor | None = None
    centred: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The linear part of the norm of x, (..., width) → (..., width)."""
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        return x if self.gain is None else x * self.gain

    def transposed(self, gradient: Tensor) -> Tensor:
        """A gradient with respect to the norm's output as one with respect to its input, (..., width) → (..., width)."""
        if self.gain is not None:
            gradient = gradient * self.gain
        return gradient - gradient.mean(dim=-1, keepdim=True) if self.centred else gradient

    def scale(self, module: nn.Module, x: Tensor) -> Tensor:
        """The factor s of each position with module(x) = s · linear part + bias, (..., width) → (..., 1); 1 for the identity.

        It is read off the module's own output, so that neither the kind of norm nor its ε needs to be known.
        """
        linear = self(x)
        if self.gain is None:
            return torch.ones_like(linear[..., :1])
        own = x.to(place_of(module), next(module.parameters()).dtype)
        output = (module(own) - module(torch.zeros_like(own[:1]))).to(x)
        return (output * linear).sum(-1, keepdim=True) / (linear * linear).sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The attention of one layer, per head, on the stream that its norm reads.

    W_Q, W_K, W_V: (n_heads, head_dim, d_model), those of a key and value head repeated for each head of its group; the gains of
    norms of queries and keys are in W_Q and W_K. W_O: (n_heads, d_model, head_dim). norm, post: before and after.
    """

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    norm: LinearNorm
    post: LinearNorm

    @property
    def n_heads(self) -> int:
        return len(self.W_O)


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """The MLP of one layer: W_out (d_model, d_mlp), W_in and, where it is gated, W_gate (d_mlp, d_model).

    b_in, b_gate: (d_mlp,), b_out: (d_model,), or None.
    norm, post: before and after. act: the activation, element by element.
    """

    W_in: Tensor
    W_out: Tensor
    b_in: Tensor | None
    W_gate: Tensor | None
    b_gate: Tensor | None
    act: Callable[[Tensor], Tensor]
    norm: LinearNorm
    post: LinearNorm
    b_out: Tensor | None = None

    def factors(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The diagonal factors of the Jacobian at what the norm gives, (..., d_model) → (..., d_mlp) each, the second for gated MLPs.

        Jacobian = W_out · (diag(first) · W_in + diag(second) · W_gate). Plain: first = act'(W_in·x + b_in). Gated: first = act(gate),
        second = act'(gate) ⊙ (W_in·x + b_in) with gate = W_gate·x + b_gate.
        """
        inner = _affine(self.W_in, self.b_in, normed)  # (..., d_mlp)
        if self.W_gate is None:
            return self._slope(inner), None
        gate = _affine(self.W_gate, self.b_gate, normed)  # (..., d_mlp)
        return self.act(gate), self._slope(gate) * inner

    def jacobian(self, first: Tensor, second: Tensor | None) -> Tensor:
        """The linear map of given diagonal factors (d_mlp,), without the norms: (d_model, d_model), in the factors' type."""
        inner = first[:, None] * self.W_in.to(first.dtype)
        if self.W_gate is not None and second is not None:
            inner = inner + second[:, None] * self.W_gate.to(first.dtype)
        return self.W_out.to(first.dtype) @ inner

    def _slope(self, x: Tensor) -> Tensor:
        """act'(x), by autograd: any activation that works element by element."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            total = self.act(leaf).sum()
        return torch.autograd.grad(total, leaf)[0]


def _affine(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x · weightᵀ + bias in x's type, in which the factors are kept: those of a model in half precision are float32."""
    out = x @ weight.to(x).T
    return out if bias is None else out + bias.to(x)


# ---- 1. norms


@torch.no_grad()
def linear_norm(module: nn.Module, width: int, device: torch.device | None = None) -> LinearNorm:
    """The linear part of a norm on vectors of `width`, on `device`, where the norm itself is unless given; an `Identity` has none.

    Raises `UnknownArchitecture` for what is no norm with a gain.
    Families store the gain itself or its difference from 1, and centre or do not: the one of the four that the module computes is taken.
    """
    if isinstance(module, nn.Identity):
        return LinearNorm()
    weight = tensor_of(module, "weight")
    if isinstance(weight, Tensor) and weight.shape == (width,):
        probe = _probe(3, width, like=weight)
        for gain in (weight, 1 + weight):
            for centred in (False, True):
                norm = LinearNorm(gain, centred)
                expected = norm.scale(module, probe) * norm(probe) + module(torch.zeros_like(probe))
                if _error(expected, module(probe)) <= _tolerance(weight):
                    return LinearNorm(gain.to(device or gain.device), centred)
    raise UnknownArchitecture(f"{type(module).__name__} is no LayerNorm or RMSNorm with a gain of {width} numbers: its linear part is not known")


# ---- 2. attention


@dataclass(frozen=True, eq=False)
class _Projection:
    """Weights (heads, head_dim, d_model) and bias (heads, head_dim) of queries, keys or values."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """(pos, d_model) → (heads, pos, head_dim)."""
        out = torch.einsum("hed,pd->hpe", self.weight, x)
        return out if self.bias is None else out + self.bias[:, None]

    def repeated(self, n_heads: int) -> "_Projection":
        """One per head where heads share them in groups of equal size."""
        times = n_heads // len(self.weight)
        bias = None if self.bias is None else self.bias.repeat_interleave(times, dim=0)
        return _Projection(self.weight.repeat_interleave(times, dim=0), bias)


@torch.no_grad()
def attention_weights(binding: Binding, layer: int, run: Forward | None = None) -> AttentionWeights:
    """The attention of one layer as matrices, checked against the module; raises `UnknownArchitecture`.

    `run` lends the attention's arguments for two positions (`probe_run`).
    """
    block = binding.blocks[layer]
    args, kwargs = binding.arguments(layer, run or probe_run(binding))
    queries, keys, values = (p.repeated(binding.n_heads) for p in _projections(block.attn, binding))
    W_out, b_out = matrix(block.out_proj, binding.device)  # (d_model, n_heads * head_dim)
    W_O = W_out.view(binding.d_model, binding.n_heads, -1).transpose(0, 1)  # (n_heads, d_model, head_dim)
    output, heads = _attend_plainly(block, _probe(2, binding.d_model, like=W_out), args, kwargs)
    output, heads = output.to(W_out.device), heads.to(W_out.device)
    ours = _expected_heads(block.attn, _probe(2, binding.d_model, like=W_out), (queries, keys, values))
    _compare(ours, heads, f"attention of layer {layer}, its heads", block.attn)
    _compare(_affine(W_out, b_out, ours), output, f"attention of layer {layer}, its output", block.attn)
    q_gain, k_gain = (_head_gain(block.attn, name, binding) for name in ("q_norm", "k_norm"))
    return AttentionWeights(
        W_Q=_with_gain(queries.weight, q_gain),
        W_K=_with_gain(keys.weight, k_gain),
        W_V=values.weight,
        W_O=W_O,
        norm=linear_norm(block.ln_attn, binding.d_model, binding.device),
        post=linear_norm(block.post_attn, binding.d_model, binding.device),
    )


def _projections(attn: nn.Module, binding: Binding) -> tuple[_Projection, _Projection, _Projection]:
    """Queries, keys and values by the family's layout."""
    width, heads = binding.head_dim, binding.n_heads
    if isinstance(fused := getattr(attn, "query_key_value", None), nn.Module):  # GPT-NeoX: per head its query, key and value
        weight, bias = matrix(fused, binding.device)
        weights = _shaped(weight, (heads, 3, width, binding.d_model), attn).unbind(1)
        biases = (None,) * 3 if bias is None else bias.view(heads, 3, width).unbind(1)
        return _three(weights, biases)
    if isinstance(fused := getattr(attn, "c_attn", None), nn.Module):  # GPT-2: all queries, all keys, all values
        weight, bias = matrix(fused, binding.device)
        weights = _shaped(weight, (3, heads, width, binding.d_model), attn).unbind(0)
        biases = (None,) * 3 if bias is None else bias.view(3, heads, width).unbind(0)
        return _three(weights, biases)
    found = []
    for name in ("q_proj", "k_proj", "v_proj"):
        module = getattr(attn, name, None)
        if not isinstance(module, nn.Module):
            raise UnknownArchitecture(f"{type(attn).__name__} has no {name}, query_key_value or c_attn: its queries, keys and values are not known")
        weight, bias = matrix(module, binding.device)
        n = len(weight) // width
        if heads % max(n, 1):
            raise UnknownArchitecture(f"{type(attn).__name__}: {n} heads in {name} do not divide {heads} heads")
        found.append(_Projection(_shaped(weight, (n, width, binding.d_model), attn), None if bias is None else bias.view(n, width)))
    return found[0], found[1], found[2]


def _three(weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> tuple[_Projection, _Projection, _Projection]:
    queries, keys, values = (_Projection(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return queries, keys, values


def _shaped(weight: Tensor, shape: tuple[int, ...], owner: nn.Module) -> Tensor:
    if weight.numel() != torch.Size(shape).numel():
        raise UnknownArchitecture(f"{type(owner).__name__} has a matrix of {tuple(weight.shape)} where {shape} is expected")
    return weight.reshape(shape)


def matrix(module: nn.Module, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
    """(out, in) and bias of a linear module, on `device`, where they are unless given; GPT-2's `Conv1D` keeps its weight as (in, out)."""
    weight: Any = tensor_of(module, "weight")
    bias: Any = tensor_of(module, "bias")
    if not isinstance(module, (nn.Linear, Conv1D)) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UnknownArchitecture(f"{type(module).__name__} is no plain linear layer: its weights cannot be read as a matrix")
    if device is not None:
        weight, bias = weight.to(device), None if bias is None else bias.to(device)
    return (weight.T if isinstance(module, Conv1D) else weight), bias


def _head_gain(attn: nn.Module, name: str, binding: Binding) -> Tensor | None:
    """The gain of a norm of each head's queries or keys (Qwen3, Gemma-3)."""
    module = getattr(attn, name, None)
    return linear_norm(module, binding.head_dim, binding.device).gain if isinstance(module, nn.Module) else None


def _with_gain(weight: Tensor, gain: Tensor | None) -> Tensor:
    return weight if gain is None else weight * gain[:, None]


def probe_run(binding: Binding) -> Forward:
    """The attention's arguments for two positions, of every layer."""
    with torch.no_grad():
        return binding.forward(torch.zeros(1, 2, dtype=torch.long), {}, keep_attention=True)


def _attend_plainly(block: Block, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The module on x (2, d_model), its positions not rotated: output (d_model,) and heads (n_heads * head_dim,) of the second position."""
    if kwargs.get("position_embeddings") is not None:  # a rotation by nothing
        cos, sin = kwargs["position_embeddings"]
        kwargs = {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
    grabbed: list[Tensor] = []
    handle = block.out_proj.register_forward_pre_hook(lambda module, inputs: grabbed.append(inputs[0]))
    try:
        output = block.attn(x[None].to(place_of(block.module)), *args, **kwargs)
    finally:
        handle.remove()
    output = output[0] if isinstance(output, tuple) else output
    return output[0, 1], grabbed[0][0, 1]


def _expected_heads(attn: Any, x: Tensor, projections: tuple[_Projection, ...]) -> Tensor:
    """What the matrices give for the second position's heads of x (2, d_model), (n_heads * head_dim,)."""
    q, k, v = (projection(x) for projection in projections)  # (n_heads, 2, head_dim)
    named = (("q_norm", q), ("k_norm", k))
    q, k = (norm(part.to(place_of(norm))).to(part) if isinstance(norm := getattr(attn, name, None), nn.Module) else part for name, part in named)
    scores = (q[:, 1:] @ k.transpose(1, 2)) * attn.scaling  # (n_heads, 1, 2)
    if cap := getattr(attn, "attn_logit_softcapping", None):
        scores = torch.tanh(scores / cap) * cap
    return (scores.softmax(dim=-1) @ v).flatten()


# ---- 3. MLPs

# The names of a gated MLP's and of a plain MLP's parts, by family: (W_in, W_gate, W_out).
_MLP_NAMES = (("up_proj", "gate_proj", "down_proj"), ("c_fc", None, "c_proj"), ("dense_h_to_4h", None, "dense_4h_to_h"))


@torch.no_grad()
def mlp_weights(binding: Binding, layer: int) -> MLPWeights:
    """The MLP of one layer as matrices, checked against the module; raises `UnknownArchitecture`."""
    block = binding.blocks[layer]
    mlp = block.mlp
    names = next((n for n in _MLP_NAMES if all(name is None or isinstance(getattr(mlp, name, None), nn.Module) for name in n)), None)
    act: Any = getattr(mlp, "act_fn", None) or getattr(mlp, "act", None)
    if names is None or act is None:
        known = " or ".join(str(n[0]) for n in _MLP_NAMES)
        raise UnknownArchitecture(f"{type(mlp).__name__} has no part {known} with an activation: its matrices are not known")
    home = binding.device
    W_in, b_in = matrix(getattr(mlp, str(names[0])), home)
    W_gate, b_gate = matrix(getattr(mlp, names[1]), home) if names[1] else (None, None)
    W_out, b_out = matrix(getattr(mlp, str(names[2])), home)
    norm, post = linear_norm(block.ln_mlp, binding.d_model, home), linear_norm(block.post_mlp, binding.d_model, home)
    weights = MLPWeights(W_in, W_out, b_in, W_gate, b_gate, act, norm, post, b_out)
    x = _probe(4, binding.d_model, like=W_out)
    inner = _affine(W_in, b_in, x)
    if _error(act(inner[..., :1]), act(inner)[..., :1]) > _tolerance(inner):
        raise UnknownArchitecture(f"{type(mlp).__name__}: {type(act).__name__} does not work element by element: this MLP is not supported")
    inner = act(inner) if W_gate is None else act(_affine(W_gate, b_gate, x)) * inner
    _compare(_affine(W_out, b_out, inner), mlp(x[None].to(place_of(mlp)))[0].to(home), f"MLP of layer {layer}", mlp)
    return weights


class ModelWeights:
    """The matrices of a model's blocks, checked when a layer is first asked for; those of the last few layers are kept."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self._run = probe_run(binding)
        self.attention: Callable[[int], AttentionWeights] = lru_cache(maxsize=KEPT_LAYERS)(lambda layer: attention_weights(binding, layer, self._run))
        self.mlp: Callable[[int], MLPWeights] = lru_cache(maxsize=KEPT_LAYERS)(lambda layer: mlp_weights(binding, layer))


# ---- 4. the ends of a wire


def read_directions(dictionary: Dictionary, rows: slice = slice(None)) -> Tensor:
    """What features read: the gradient of node i with respect to the site's value where it is active, (n, d_in) for features `rows`.

    A gated encoder's gain is in it, a centring of the input too. An input normalised per position counts with its scale held
    fixed: the node is s · a(x / s), so that the scale drops out. Biases and thresholds have no part in it.
    """
    if isinstance(dictionary, IdentityDictionary):
        return dictionary.directions(rows)
    sparse: Any = dictionary  # both other kinds have an encoder's matrix
    directions = computed(sparse.W_enc[:, rows].T)
    if not isinstance(dictionary, LinearDictionary):
        if sparse.gain is not None:
            directions = directions * sparse.gain[rows][:, None]
        if sparse.input.centred or sparse.input.normalisation is Normalisation.LAYER_NORM:
            directions = directions - directions.mean(dim=-1, keepdim=True)
    return directions.to(dictionary.home)


def write_directions(
    dictionary: Dictionary, site: Site, attention: Callable[[int], AttentionWeights], rows: slice = slice(None), *, scale: float = 1.0
) -> Tensor:
    """What one unit of a feature adds to the residual stream, (n, d_model) for features `rows`.

    Features on head outputs go through W_O and the linear part of the post-norm, if any, times its `scale`.
    """
    written = dictionary.directions(rows)
    if dictionary.basis is Basis.RESIDUAL:
        return written
    weights = attention(site.layer)
    heads = written.view(len(written), weights.n_heads, -1)  # (n, n_heads, head_dim)
    return weights.post(torch.einsum("nhe,hde->nd", heads, computed(weights.W_O))) * scale


# ---- checking


def _probe(n: int, width: int, *, like: Tensor) -> Tensor:
    """Fixed vectors without structure, (n, width)."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, width, generator=generator) + 0.1).to(like.device, like.dtype)


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).float().norm() / theirs.float().norm().clamp_min(1e-30))


def _tolerance(weight: Tensor) -> float:
    return WEIGHTS_TOLERANCE if weight.dtype in (torch.float32, torch.float64) else 64 * float(torch.finfo(weight.dtype).eps)


def _compare(ours: Tensor, theirs: Tensor, what: str, module: nn.Module) -> None:
    error = _error(ours, theirs)
    if not error <= _tolerance(theirs):
        raise UnknownArchitecture(
            f"{type(module).__name__}: {what} computed from its matrices differs from the module by {error:.1e} "
            f"(allowed {_tolerance(theirs):.0e}): this layout is not supported"
        )
