"""A model whose attention patterns and norms' denominators are constants, for derivatives of what is left.

Inside `frozen` every value is what it was. Derivatives take attention's patterns (what softmax gives) and the scale that each norm multiplies
by as constants, so that a block is linear but for its MLP (Ameisen et al. 2025, Circuit Tracing, transformer-circuits.pub).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .binding import Binding, Network, UnknownArchitecture
from .placement import place_of
from .weights import linear_norm


@contextmanager
def frozen(binding: Network) -> Iterator[None]:
    """Forward passes inside leave graphs in which patterns and denominators are constants; backward passes may come later.

    Raises `UnknownArchitecture` for a norm that is none: neither RMSNorm nor LayerNorm with a gain, nor an identity; and for any model but a
    language model, in which nothing is known to be a pattern or a norm.
    """
    if not isinstance(binding, Binding):
        raise UnknownArchitecture(f"{type(binding.module).__name__} is no language model: it has no patterns and denominators to freeze")
    handles: list[Any] = []
    try:
        handles.extend(module.register_forward_hook(_linear(module, binding.d_model)) for module in _norms(binding))
        with _FrozenPatterns():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _norms(binding: Binding) -> list[nn.Module]:
    """Every norm of the residual stream and of what is added to it; those of queries and keys act on patterns alone."""
    found = [norm for block in binding.blocks for norm in (block.ln_attn, block.post_attn, block.ln_mlp, block.post_mlp)]
    return [norm for norm in (*found, binding.final_norm) if not isinstance(norm, nn.Identity)]


def _linear(module: nn.Module, width: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that keeps the norm's output and makes it, for derivatives, scale · linear part + constant."""
    norm = linear_norm(module, width)
    parameter = next(module.parameters())
    with torch.no_grad():
        bias = module(torch.zeros(1, width, device=place_of(module), dtype=parameter.dtype))

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        linear = norm(inputs[0].to(output.device))
        at, value = linear.detach(), output.detach()
        # The scale is read off the output: no need to know which norm it is, nor its ε.
        scale = ((value - bias) * at).sum(-1, keepdim=True) / (at * at).sum(-1, keepdim=True).clamp_min(torch.finfo(at.dtype).tiny)
        return value + scale * (linear - at)

    return hook


class _FrozenPatterns(TorchFunctionMode):
    """Attention without derivatives of its patterns: of queries and keys where one kernel does it all, else of softmax."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            constant = lambda name, value: value.detach() if name in ("query", "key") else value
            args = tuple(constant(name, value) for name, value in zip(("query", "key", *("",) * len(args)), args))
            kwargs = {name: constant(name, value) for name, value in kwargs.items()}
        out = func(*args, **kwargs)
        return out.detach() if func in (F.softmax, torch.softmax) else out
