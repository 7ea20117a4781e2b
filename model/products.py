"""Matrix products with weights by the fastest kernel at hand.

torch gives fp32 products on a CPU to MKL, which on AMD's processors reaches about half of what oneDNN does with the same
operands. Inside `fast_products` linear layers go through oneDNN there, forward and backward; elsewhere nothing changes.
Both are fp32 throughout: results differ by rounding only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@cache
def onednn_is_faster() -> bool:
    """Whether this is a machine on which oneDNN's fp32 products are the faster ones: an AMD processor, oneDNN in torch."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:  # no Linux: torch's own choice stays
        return False


@torch.library.custom_op("featlas::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ by oneDNN: x (..., K), weight (N, K) → (..., N)."""
    return torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, None, "none", [], "").view(*x.shape[:-1], weight.shape[0])


@product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])  # by torch's way, that a weight which rests elsewhere may be fetched again


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    # Weights are never trained here.
    (weight,) = ctx.saved_tensors
    return product(gradient, weight.t()), None


product.register_autograd(_backward, setup_context=_save)


@product.register_vmap
def _(info: Any, dims: tuple[int | None, int | None], x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    assert dims[1] is None, "the weight is shared"
    return product(x.movedim(dims[0] or 0, 0), weight), 0


class _FastProducts(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and _fits(args[0], args[1]):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            out = product(args[0], args[1])
            return out if bias is None else out + bias
        if func is torch.addmm and not kwargs and _fits(args[1], args[2]):  # GPT-2's Conv1D
            return product(args[1], args[2].t()) + args[0]
        return func(*args, **kwargs)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not weight.requires_grad and weight.ndim == 2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias by the fastest kernel (torch's own where gradients are wanted): x (..., K), weight (N, K), bias (N,) → (..., N)."""
    if not _fits(x, weight) or x.requires_grad or not x.numel() or not onednn_is_faster():
        return torch.nn.functional.linear(x, weight, bias)
    out = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
    return out.view(*x.shape[:-1], weight.shape[0])


@contextmanager
def fast_products(like: Tensor) -> Iterator[None]:
    """Inside, linear layers on tensors of `like`'s device and type take the fastest kernel."""
    if like.device.type != "cpu" or like.dtype != torch.float32 or not onednn_is_faster():
        yield
        return
    with _FastProducts():
        yield
