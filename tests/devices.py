"""Devices that are not there: tensors that say where they lie, compute on the CPU, and refuse to meet tensors that lie elsewhere.

`pretending(n)` gives `cuda:0` … `cuda:n-1`. Inside, tensors made on or moved to one of them are `Placed`: every operation looks at where its
arguments lie before it computes with the numbers underneath, and raises `Mixed`, as a GPU would, where they differ (a number without
dimensions, and what a tensor is indexed by, may come from the CPU). What code does with devices is thus tried on any machine, values and all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")


_inside_kernel: list[bool] = []
"""Not empty while a kernel runs that makes tensors of its own (a causal mask): it takes the device of its arguments for the CPU."""


class Mixed(AssertionError):
    """One operation was given tensors of different devices."""


class Placed(torch.Tensor):
    """A tensor on a device that is not there; the numbers are `numbers`, on the CPU."""

    numbers: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, numbers: Tensor, place: torch.device | None = None, requires_grad: bool = False) -> "Placed":
        if place is None:  # as accelerate makes a parameter of another anew
            assert isinstance(numbers, Placed)
            assert not requires_grad
            return numbers
        made = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype, device="cpu"
        )
        made.numbers, made.place = numbers, place
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Placed({self.place}, {self.numbers!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        place = _one_place(func, [leaf for leaf in tree_leaves((_but_indices(func, args), kwargs)) if isinstance(leaf, Tensor)])
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is None:
            kwargs.pop("device", None)
        bare = lambda x: x.numbers if isinstance(x, Placed) else x
        found = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        given = {id(leaf.numbers): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Placed)}

        def placed(x: Any) -> Any:
            if not isinstance(x, Tensor) or isinstance(x, Placed):
                return x
            return given[id(x)] if id(x) in given else Placed(x, place)  # an argument changed in place is given back itself

        return tree_map(placed, found)


def _but_indices(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments that must lie together: a GPU's tensor may be indexed by what lies on the CPU (not the other way round)."""
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_) and isinstance(args[0], Placed):
        return (args[0], [index for index in args[1] if isinstance(index, Placed)], *args[2:])
    return args


def _one_place(func: Any, tensors: list[Tensor]) -> torch.device:
    places = {t.place for t in tensors if isinstance(t, Placed)}
    if not (places and _inside_kernel):
        places |= {t.device for t in tensors if not isinstance(t, Placed) and t.ndim > 0}
    if len(places) > 1:
        raise Mixed(f"{func} was given tensors on {', '.join(sorted(map(str, places)))}")
    return next(iter(places))


def _is_wrapped(x: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def _address(x: Tensor) -> int:
    return (x.numbers if isinstance(x, Placed) else x).untyped_storage().data_ptr()


def place_of(x: Tensor) -> torch.device:
    inner = x
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        inner = torch._C._functorch.get_unwrapped(inner)
    return inner.place if isinstance(inner, Placed) else torch.Tensor.device.__get__(inner)


class _To(torch.autograd.Function):
    """Moves between devices, forward and back."""

    @staticmethod
    def forward(x: Tensor, place: torch.device) -> Tensor:
        return _placed(x, place)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.device], output: Tensor) -> None:
        ctx.place = place_of(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return moved(gradient, ctx.place), None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, None], x: Tensor, place: torch.device) -> tuple[Tensor, int | None]:
        return _To.apply(x, place), dims[0]

    generate_vmap_rule = False


def _placed(x: Tensor, place: torch.device) -> Tensor:
    numbers = x.numbers if isinstance(x, Placed) else x
    numbers = numbers.detach().clone()
    return Placed(numbers, place) if place.type == "cuda" else numbers


def moved(x: Tensor, place: torch.device) -> Tensor:
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", 0)
    if place_of(x) == place:
        return x
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or x.requires_grad:
        return _To.apply(x, place)
    return _placed(x, place)


class Pretending(TorchFunctionMode):
    """Looks at devices in calls of torch from Python."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and getattr(func, "__self__", None) is torch.Tensor.device:
            return place_of(args[0])
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return moved(args[0], CPU)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], Placed):
            raise Mixed(f"{name} of a tensor on {args[0].place}")
        if func is torch.Tensor.tolist and isinstance(args[0], Placed):
            return args[0].numbers.tolist()
        if func in (torch.Tensor.data_ptr, torch.Tensor.untyped_storage) and isinstance(args[0], Placed):
            return func(args[0].numbers)
        if func is torch.nn.functional.scaled_dot_product_attention:
            _one_place(func, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not _is_wrapped(leaf)])
            _inside_kernel.append(True)
            try:
                return func(*args, **kwargs)
            finally:
                _inside_kernel.pop()
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
            like = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Placed)]
            if like:  # new_zeros, zeros_like, … of a tensor elsewhere
                args = tree_map(lambda x: x.numbers if isinstance(x, Placed) else x, args)
            return tree_map(lambda x: moved(x, torch.device(device)) if isinstance(x, Tensor) else x, func(*args, **kwargs))
        if device is not None and torch.device(device).type == "cpu" and any(isinstance(leaf, Placed) for leaf in tree_leaves(args)):
            args = tree_map(lambda x: x.numbers if isinstance(x, Placed) else x, args)
        return func(*args, **kwargs)

    @staticmethod
    def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for arg in args:
            if isinstance(arg, Tensor):
                device, dtype = place_of(arg), arg.dtype
            elif isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, (str, int, torch.device)) and not isinstance(arg, bool):
                device = torch.device("cuda", arg) if isinstance(arg, int) else torch.device(arg)
        if dtype is not None and dtype != x.dtype:
            x = torch.Tensor.to(x, dtype=dtype) if not isinstance(x, Placed) else x.type(dtype)
        return x if device is None or torch.device(device).type == "meta" else moved(x, torch.device(device))


@contextmanager
def pretending(n: int = 2) -> Iterator[None]:
    """Inside there are `n` GPUs."""
    with (
        mock.patch("torch.cuda.device_count", return_value=n),
        # These two run inside autograd, where calls of torch are not looked at.
        mock.patch("featlas.model.placement._address", _address),
        mock.patch("featlas.model.placement._brought", lambda weight, device, dtype: moved(weight.type(dtype), device)),
        Pretending(),
    ):
        yield
