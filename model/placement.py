"""Where a model's parts lie: on one device, its layers spread over several, or its weights at rest in main memory or on disk.

A placement is what `--device` says:

    cuda:0                      everything there
    auto, balanced              layers spread over what is here, by what is free; what does not fit rests in main memory, then on disk
    cuda:0=0-15,cuda:1=16-31    layers by device; what lies before them goes with the first layer, what lies behind with the last
    cuda:0=0-15,cpu=16-31       `cpu` beside a GPU, and `disk`, say where weights rest: they are computed with on the GPU
    cuda:0+cpu, cpu+disk        computed with on the first, every layer resting in the second
    map.json                    accelerate's own device map: a module's name → device

1. `device_map` turns it into accelerate's map of modules to devices, on a model without weights.
2. accelerate's hooks move inputs to a module's device, and weights that rest elsewhere there and away again.
3. `home_of` is the device of everything else: recorded values, gradients, what attribution makes of them.
4. `light_graphs` keeps weights that rest elsewhere out of what autograd remembers: a backward pass fetches them again.

Where a model lies is no part of what it computes: rounding aside, no number depends on it.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError

RESTING = ("cpu", "disk")
STRATEGIES = ("auto", "balanced")

ROOM = 0.7
"""So much of what is free on a device `auto` and `balanced` fill with weights: dictionaries and working tensors need the rest."""

_DEVICE = r"cpu|disk|mps|cuda(?::\d+)?"
_LAYERS = re.compile(rf"({_DEVICE})=(\d+)(?:-(\d+))?")
_OFFLOAD = re.compile(rf"({_DEVICE})\+({'|'.join(RESTING)})")


class NoSuchDevice(UserError):
    """The device is not on this machine."""


class BadPlacement(UserError):
    """A placement that cannot be read, or that does not fit the model."""


class LayerRange(NamedTuple):
    """Layers `first` to `last`, both included, and where they go."""

    device: str
    first: int
    last: int


@dataclass(frozen=True)
class Placement:
    """What `--device` says, read. One is set of `device` (with `rest`, where the layers' weights lie), `strategy`, `layers`, `file`."""

    text: str
    device: str | None = None
    rest: str | None = None
    strategy: str | None = None
    layers: tuple[LayerRange, ...] = ()
    file: Path | None = None

    @property
    def is_one_device(self) -> bool:
        """Whether it is a device and nothing else."""
        return self.device is not None and self.rest is None


def parse_placement(text: str, *, here: bool = True) -> Placement:
    """A placement by its form; raises `BadPlacement`, and, unless it is for a machine elsewhere, `NoSuchDevice` for devices that are not `here`."""
    check = parse_device if here else torch.device
    if text in STRATEGIES:
        return Placement(text, strategy=text)
    if text.endswith(".json"):
        return Placement(text, file=Path(text))
    if match := _OFFLOAD.fullmatch(text):
        device, rest = match.groups()
        if device in RESTING and (device, rest) != ("cpu", "disk"):
            raise BadPlacement(
                f"--device {text!r}: weights cannot rest in {rest} and be computed with on {device}; give cuda:0+cpu, cuda:0+disk or cpu+disk"
            )
        check(device)
        return Placement(text, device=device, rest=rest)
    if "=" in text:
        parts = [_LAYERS.fullmatch(part.strip()) for part in text.split(",")]
        if not all(parts):
            raise BadPlacement(f"--device {text!r} gives no layers to devices: write cuda:0=0-15,cuda:1=16-31")
        layers = tuple(LayerRange(m[1], int(m[2]), int(m[3] or m[2])) for m in parts if m)
        for device in dict.fromkeys(part.device for part in layers):
            if device != "disk":
                check(device)
        return Placement(text, layers=layers)
    if not here and not re.fullmatch(_DEVICE, text):
        raise BadPlacement(f"--device {text!r} is no device")
    check(text)
    return Placement(text, device=text)


def parse_device(name: str) -> torch.device:
    """The torch device called `name` (`cpu`, `cuda`, `cuda:1`, `mps`); raises `NoSuchDevice`, naming those that are here."""
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["mps"] if torch.backends.mps.is_available() else [])]
    if name not in here and f"{name}:0" not in here:
        raise NoSuchDevice(f"device {name!r} is not available here: choose one of {', '.join(here)}")
    return torch.device(name)


def parse_bytes(text: str) -> int | None:
    """An amount of memory: a number of bytes, or with KB, MB, GB or TB (of 1024 each) behind it; None for what is none."""
    number = text.strip().upper().removesuffix("B")
    power = "KMGT".find(number[-1:]) + 1 if number[-1:] else 0
    try:
        amount = float(number[:-1] if power else number) * 1024**power
    except ValueError:
        return None
    return int(amount) if 0 < amount < float("inf") else None


# ---- 1. from a placement to accelerate's map


def device_map(placement: Placement, skeleton: nn.Module, machine: Mapping[str, int] | None = None) -> dict[str, str | int]:
    """Module's name → device, for a `skeleton` (the model without weights); raises `BadPlacement` where they do not fit.

    machine: device → free bytes, of a machine that is not this one.
    """
    if placement.strategy is not None:
        return _by_what_is_free(placement.strategy, skeleton, machine)
    if placement.file is not None:
        found = _from_file(placement.file, here=machine is None)
    else:
        found = _by_layers(placement, skeleton)
    _check(found, skeleton, placement.text)
    return found


def _by_what_is_free(strategy: str, skeleton: Any, machine: Mapping[str, int] | None) -> dict[str, str | int]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    skeleton.tie_weights()
    whole = list(getattr(skeleton, "_no_split_modules", None) or ())
    memory: dict[Any, int] = get_max_memory() if machine is None else {_number(device): free for device, free in machine.items()}
    if strategy == "balanced":
        memory = get_balanced_memory(skeleton, memory, no_split_module_classes=whole)
    room = {device: int(ROOM * free) for device, free in memory.items()}
    with _silent():
        return dict(infer_auto_device_map(skeleton, room, no_split_module_classes=whole))


@contextmanager
def _silent() -> Iterator[None]:
    """accelerate looks at devices that are planned with and not here, and says so."""
    log = logging.getLogger("accelerate.utils.modeling")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _number(device: str) -> str | int:
    """A device as accelerate names it: a GPU by its number."""
    return int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device


def _from_file(path: Path, *, here: bool) -> dict[str, str | int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadPlacement(f"--device {path}: no device map can be read from it ({error})") from None
    if not isinstance(found, dict) or not found:
        raise BadPlacement(f'--device {path}: a device map is an object of module names and devices, {{"model.layers.0": "cuda:0", …}}')
    for name, device in found.items():
        if isinstance(device, bool) or not isinstance(device, (int, str)):
            raise BadPlacement(f"--device {path}: {name} is given to {device!r}, which is no device")
        if device != "disk" and here:
            parse_device(f"cuda:{device}" if isinstance(device, int) else device)
    return found


def _by_layers(placement: Placement, skeleton: Any) -> dict[str, str | int]:
    """Layers as they are told; what lies before them with the first layer that does not rest, what lies behind with the last."""
    names, n_layers = _names_of_layers(skeleton)
    ranges = placement.layers or (LayerRange(str(placement.rest), 0, n_layers - 1),)
    of_layer: dict[int, str] = {}
    for part in ranges:
        for layer in range(part.first, part.last + 1):
            if layer >= n_layers or layer in of_layer:
                reason = f"the model has layers 0 to {n_layers - 1}" if layer >= n_layers else "it is given twice"
                raise BadPlacement(f"--device {placement.text}: layer {layer} cannot go to {part.device}, {reason}")
            of_layer[layer] = part.device
    if missing := sorted(set(range(n_layers)) - set(of_layer)):
        raise BadPlacement(f"--device {placement.text}: layer {missing[0]} is given to no device")
    computing = [of_layer[layer] for layer in range(n_layers) if of_layer[layer] not in RESTING]
    first, last = (computing[0], computing[-1]) if computing else (placement.device or "cpu",) * 2
    tied = bool(getattr(skeleton.config.get_text_config(), "tie_word_embeddings", False))
    found: dict[str, str | int] = {}
    for name, _ in names.before:
        found[name] = first
    for layer, name in enumerate(names.layers):
        found[name] = of_layer[layer]
    for name, module in names.behind:
        found[name] = first if tied and module is skeleton.get_output_embeddings() else last
    return found


class _Names(NamedTuple):
    before: list[tuple[str, nn.Module]]
    layers: list[str]
    behind: list[tuple[str, nn.Module]]


def _names_of_layers(skeleton: Any) -> tuple[_Names, int]:
    """The modules' names: what comes before the layers, the layers, what comes behind."""
    from .binding import Binding

    binding = Binding(skeleton)
    name_of = {module: name for name, module in skeleton.named_modules()}
    layers = [name_of[layer] for layer in binding.layers]
    holder = layers[0].rpartition(".")[0]
    above = {holder[:i] for i, letter in enumerate(holder) if letter == "."} | {""}
    late = {binding.final_norm, binding.unembedding}
    before: list[tuple[str, nn.Module]] = []
    behind: list[tuple[str, nn.Module]] = []
    for name, module in skeleton.named_modules():
        if name != holder and name not in above and name.rpartition(".")[0] in above:
            (behind if module in late else before).append((name, module))
    return _Names(before, layers, behind), len(layers)


def _check(found: Mapping[str, str | int], skeleton: nn.Module, text: str) -> None:
    from accelerate.utils import check_device_map

    known = {name for name, _ in skeleton.named_modules()} | {name for name, _ in skeleton.named_parameters()}
    if unknown := [name for name in found if name not in known]:
        raise BadPlacement(f"--device {text}: the model has no module {unknown[0]!r}")
    try:
        check_device_map(skeleton, dict(found))
    except ValueError as error:
        raise BadPlacement(f"--device {text}: {' '.join(str(error).split())}") from None


# ---- 2. spreading


def spread(module: nn.Module, devices: Mapping[str, str | int], *, folder: Path | None = None) -> nn.Module:
    """Spread a model that is in memory by a device map; `folder` takes the weights that are to rest on disk. Returns the module."""
    from accelerate import dispatch_model

    main = next((device for device in devices.values() if device not in RESTING), "cpu")
    dispatch_model(module, dict(devices), main_device=main, offload_dir=folder, force_hooks=True)
    return watch(module)


def watch(module: nn.Module) -> nn.Module:
    """Let `light_graphs` know which weights rest elsewhere; a module that accelerate has spread is changed, any other is left alone."""
    resting = [(part, hook) for part in module.modules() if (hook := _align_hook(part)) is not None and hook.offload]
    if not resting:
        return module
    from accelerate.hooks import add_hook_to_module

    loans = _Loans()
    for part, hook in resting:
        add_hook_to_module(part, _loan_hook(hook, loans), append=True)
    module._loans = loans  # type: ignore[assignment]
    return module


def _align_hook(part: nn.Module) -> Any:
    """accelerate's hook that knows a part's device, None where there is none."""
    hook: Any = getattr(part, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        if hasattr(one, "execution_device"):
            return one
    return None


# ---- 3. asking


def home_of(module: nn.Module) -> torch.device:
    """The device of recorded values and of all that is made of them: where a spread model computes first, else where the model lies."""
    return place_of(module)


def place_of(part: nn.Module) -> torch.device:
    """Where a part of a model computes, whether its weights are there or rest elsewhere."""
    hook = _align_hook(part)
    if hook is not None and hook.execution_device is not None:
        device = hook.execution_device
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    parameter = next(part.parameters(), None)
    if parameter is not None and parameter.is_meta:  # its weights rest: a part of it knows where it computes
        resting = (one for one in part.modules() if one is not part and _align_hook(one) is not None)
        return next(map(place_of, resting), parameter.device)
    return torch.device("cpu") if parameter is None else parameter.device


def tensor_of(part: nn.Module, name: str) -> Any:
    """A part's own weight or bias, fetched where it rests elsewhere; what else the name stands for is given as it is."""
    found = getattr(part, name, None)
    if not isinstance(found, Tensor) or found.device.type != "meta":
        return found
    hook = _align_hook(part)
    if hook is None or not hook.offload:
        return found
    return hook.weights_map[name].to(place_of(part), found.dtype)


def is_spread(module: nn.Module) -> bool:
    """Whether accelerate has spread the model."""
    return _align_hook(module) is not None


def placed_bytes(module: nn.Module) -> dict[str, int]:
    """Bytes of weights by where they lie: a device's name, or `at rest`. Tied ones count once."""
    found: dict[str, int] = {}
    for parameter in {id(p): p for p in module.parameters()}.values():
        where = "at rest" if parameter.device.type == "meta" else str(parameter.device)
        found[where] = found.get(where, 0) + parameter.numel() * parameter.itemsize
    return found


# ---- 4. graphs without the weights that rest elsewhere


class _Loans:
    """Weights that are on their computing device just now: place in memory → (where they came from, name, shape, strides)."""

    def __init__(self) -> None:
        self.out: dict[int, tuple[Any, str, torch.device]] = {}

    def pack(self, saved: Tensor) -> Any:
        if saved.is_meta or saved.layout is not torch.strided:
            return saved
        found = self.out.get(_address(saved))
        return saved if found is None else _Loan(*found, saved.dtype, saved.size(), saved.stride(), int(saved.storage_offset()))

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        return kept.fetched() if isinstance(kept, _Loan) else kept


class _Loan(NamedTuple):
    """Stands in a graph for a weight, or a view of one."""

    weights: Mapping[str, Tensor]
    name: str
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def fetched(self) -> Tensor:
        whole = _brought(self.weights[self.name], self.device, self.dtype).contiguous()
        return whole.as_strided(self.size, self.stride, self.offset + whole.storage_offset())


def _brought(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return weight.to(device, dtype)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _loan_hook(align: Any, loans: _Loans) -> Any:
    """A hook of accelerate's kind, behind the one that fetches a part's weights: notes them while they are here."""
    from accelerate.hooks import ModelHook

    noted: list[int] = []

    def forget() -> None:
        # Another tensor may be given the same place in memory next.
        for address in noted:
            loans.out.pop(address, None)
        noted.clear()

    class Noting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            forget()  # what a run that was stopped inside left
            for name, weight in module.named_parameters(recurse=align.place_submodules):
                if weight.is_contiguous() and not weight.storage_offset():
                    noted.append(_address(weight))
                    loans.out[noted[-1]] = align.weights_map, name, weight.device
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            forget()
            return output

    return Noting()


@contextmanager
def light_graphs(module: nn.Module) -> Iterator[None]:
    """Inside, autograd remembers where weights that rest elsewhere come from, not the weights; elsewhere nothing changes."""
    loans: _Loans | None = getattr(module, "_loans", None)
    if loans is None or not torch.is_grad_enabled():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(loans.pack, loans.unpack):
        yield
