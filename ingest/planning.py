"""What a model, its dictionaries and a run of them would take, from configurations and headers alone: no weight is read.

1. The model is made on `meta`, where parameters have shapes and no memory.
2. A placement is worked out as it would be when loading, for the devices here or for a machine that is described.
3. Dictionaries' bytes are those of their tensors, of the encoder's second, transposed copy among them.
4. Working memory is what the engine itself counts with (`budget`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..model.binding import Binding, LocalFunction
from ..model.dictionary_sources import IDENTITY, IDENTITY_HEADS, load_dictionaries, site_width
from ..model.loading import DTYPES, LoadedModel, dictionary_dtype, load_config, model_dtype, skeleton_of
from ..model.placement import RESTING, Placement, device_map, parse_placement
from ..model.sites import Basis, Site, SiteKind, parse_site
from ..model.tail import CleanRun, Tail
from .budget import forward_bytes, sequence_bytes, tail_row_bytes, vjp_row_bytes

MOST_SEQUENCES = 8
"""As in a run: sequences in a batch at most, unless asked for more."""


class CannotPlan(UserError):
    """What is asked about cannot be known without loading it."""


@dataclass(frozen=True)
class Part:
    """A part of the model: its parameters, and how many such parts there are."""

    name: str
    parameters: int
    times: int = 1


@dataclass(frozen=True)
class Place:
    """What lies on a device. rests: whether weights only rest there, to be computed with elsewhere."""

    device: str
    rests: bool
    layers: tuple[int, ...]
    weights: int
    dictionaries: int


@dataclass(frozen=True)
class DictionaryPlan:
    """One dictionary: its site, its size, its bytes in memory and where it lies."""

    site: str
    d_in: int
    d_sae: int
    bytes: int
    device: str


@dataclass(frozen=True)
class Working:
    """Bytes of working tensors: one sequence of a batch; a row of the tail's runs from position 0; a lane of the deepest local function.

    batch: sequences at a time within the memory allowed. fits: whether one sequence does; else `least` is the memory that it needs.
    """

    length: int
    steps: int
    memory: int
    sequence: int
    tail_row: int
    lane: int
    batch: int
    fits: bool
    least: int


@dataclass(frozen=True)
class Plan:
    """All that is known before anything is loaded; `bytes_by_dtype` is of the weights."""

    name: str
    family: str
    n_layers: int
    d_model: int
    parameters: int
    tied: bool
    parts: tuple[Part, ...]
    bytes_by_dtype: Mapping[str, int]
    dtype: str
    places: tuple[Place, ...]
    dictionaries: tuple[DictionaryPlan, ...]
    working: Working | None


@dataclass(frozen=True)
class PlanOptions:
    """What is asked. features: the width of dictionaries that are not there yet, at `sites` (all resid_L unless given); machine: device → bytes."""

    model: str
    dictionaries: str | None = None
    features: int | None = None
    sites: tuple[Site, ...] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    length: int = 64
    steps: int = 1
    memory: int = 2**30
    machine: Mapping[str, int] | None = None


def plan(options: PlanOptions) -> Plan:
    """Everything about a model and a run that is known without loading; raises a `UserError` for what cannot be had."""
    name, config = load_config(options.model)
    dtype = model_dtype(options.dtype)
    skeleton = skeleton_of(config, dtype)
    binding = Binding(skeleton)
    placement = parse_placement(options.device, here=options.machine is None)
    devices = _devices(placement, skeleton, options.machine)
    dictionaries = _dictionaries(options, name, binding, devices)
    text = config.get_text_config()
    n = _numel(skeleton)
    return Plan(
        name, text.model_type, binding.n_layers, binding.d_model, n, bool(getattr(text, "tie_word_embeddings", False)), _parts(binding, n),
        {dtype: n * kind.itemsize for dtype, kind in DTYPES.items()}, str(dtype).removeprefix("torch."),
        _places(placement, devices, skeleton, binding, dictionaries), dictionaries, _working(options, binding, dictionaries),
    )  # fmt: skip


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in module.parameters()}.values())


def _parts(binding: Binding, total: int) -> tuple[Part, ...]:
    """Embeddings, a block's attention, MLP and norms, and what lies behind; equal blocks are counted once."""
    blocks: dict[tuple[int, int, int], int] = {}
    for block in binding.blocks:
        sizes = _numel(block.attn), _numel(block.mlp), _numel(block.module)
        blocks[sizes] = blocks.get(sizes, 0) + 1
    parts, rest = [], total
    for (attention, mlp, whole), times in blocks.items():
        parts += [Part("attention", attention, times), Part("MLP", mlp, times), Part("norms of a block", whole - attention - mlp, times)]
        rest -= whole * times
    return (*parts, Part("embeddings, last norm and output head", rest))


def _devices(placement: Placement, skeleton: nn.Module, machine: Mapping[str, int] | None) -> dict[str, str]:
    """Module's name → device, as loading would have it; the whole model ("") where there is one device."""
    if placement.is_one_device:
        return {"": str(placement.device)}
    found = device_map(placement, skeleton, machine)
    return {name: f"cuda:{device}" if isinstance(device, int) else str(device) for name, device in found.items()}


def _device_of(name: str, devices: Mapping[str, str]) -> str:
    """The device of the nearest module above `name` that is given one."""
    while name not in devices:
        if not name:
            return next(iter(devices.values()))
        name = name.rpartition(".")[0]
    return devices[name]


def _computing(device: str, devices: Mapping[str, str]) -> str:
    """Where weights that rest on `device` are computed with."""
    own = [one for one in devices.values() if one not in RESTING]
    if device == "disk" or (device == "cpu" and own):
        return own[0] if own else "cpu"
    return device


def _layer_names(skeleton: nn.Module, binding: Binding) -> list[str]:
    name_of = {module: name for name, module in skeleton.named_modules()}
    return [name_of[layer] for layer in binding.layers]


def _places(
    placement: Placement, devices: Mapping[str, str], skeleton: nn.Module, binding: Binding, dictionaries: tuple[DictionaryPlan, ...]
) -> tuple[Place, ...]:
    weights: dict[str, int] = {}
    for name, parameter in skeleton.named_parameters():  # tied ones are named once
        where = str(placement.rest) if placement.rest and name.startswith(tuple(_layer_names(skeleton, binding))) else _device_of(name, devices)
        weights[where] = weights.get(where, 0) + parameter.numel() * parameter.itemsize
    layers: dict[str, list[int]] = {}
    for layer, name in enumerate(_layer_names(skeleton, binding)):
        layers.setdefault(_device_of(name, devices), []).append(layer)
    own = {where: sum(one.bytes for one in dictionaries if one.device == where) for where in {one.device for one in dictionaries}}
    return tuple(
        Place(where, _computing(where, devices) != where, tuple(layers.get(where, ())), weights.get(where, 0), own.get(where, 0))
        for where in sorted({*weights, *own}, key=lambda name: (name in RESTING, name))
    )


def _dictionaries(options: PlanOptions, name: str, binding: Binding, devices: Mapping[str, str]) -> tuple[DictionaryPlan, ...]:
    kept = dictionary_dtype(options.dtype)
    module: Any = binding.module
    names = _layer_names(module, binding)
    where = lambda site: _computing(_device_of(names[max(site.layer, 0)], devices), devices)
    sites = options.sites or tuple(Site(SiteKind.RESID, layer) for layer in range(binding.n_layers))
    if options.features is not None:
        size = (3 * binding.d_model * options.features + 2 * options.features + binding.d_model) * kept.itemsize
        return tuple(DictionaryPlan(site.name, binding.d_model, options.features, size, where(site)) for site in sites)
    if options.dictionaries is None:
        return ()
    bare = LoadedModel(SimpleNamespace(_module=module), None, name, "", "", binding.n_layers, binding.d_model, torch.device("cpu"), binding.precision)
    if options.dictionaries in (IDENTITY, IDENTITY_HEADS):
        heads = lambda site: options.dictionaries == IDENTITY_HEADS and site.kind is SiteKind.ATTN
        widths = {site: site_width(bare, Basis.HEADS if heads(site) else Basis.RESIDUAL) for site in sites}
        return tuple(DictionaryPlan(site.name, width, width, (width * width + width) * kept.itemsize, where(site)) for site, width in widths.items())
    if not Path(options.dictionaries).is_dir() and options.dictionaries != "demo":
        raise CannotPlan(f"dictionaries {options.dictionaries!r} are not here: give a folder, or their number of features by --features")
    found = load_dictionaries(options.dictionaries, bare, sites=options.sites, dtype=options.dtype)
    return tuple(
        DictionaryPlan(site.name, one.d_in, one.d_sae, found.stored_numbers(site) * kept.itemsize, where(site)) for site, one in found.items()
    )


def _working(options: PlanOptions, binding: Binding, dictionaries: tuple[DictionaryPlan, ...]) -> Working | None:
    """What the engine counts with; None without dictionaries."""
    if not dictionaries:
        return None
    sites = {parse_site(one.site): Basis.RESIDUAL for one in dictionaries}
    graph = binding.graph(sites)
    functions = [f for site in graph.sites if (f := LocalFunction(binding, graph, site, sites)).parents]
    length, widths = options.length, [one.d_sae for one in dictionaries]
    sequence = sequence_bytes(binding, widths, options.steps, length)
    first = next(iter(graph.sites))
    end = Site(SiteKind.RESID, binding.n_layers - 1)
    tail = Tail(CleanRun(binding, None, {}), first, Basis.RESIDUAL, end, Basis.RESIDUAL, length - 1)  # type: ignore[arg-type]
    row = tail_row_bytes(binding, tail, 0) if options.steps > 1 else 0
    reach = lambda f: length if f.mixes_positions else 1
    lane = max(reach(f) * (forward_bytes(binding, f, reach(f)) + vjp_row_bytes(binding, f, reach(f))) for f in functions)
    least = max(sequence, row, lane)  # none of these can be cut further
    batch = max(1, min(MOST_SEQUENCES, options.memory // 4 // sequence))
    return Working(length, options.steps, options.memory, sequence, row, lane, batch, options.memory >= least, least)


__all__ = ["CannotPlan", "DictionaryPlan", "Part", "Place", "Plan", "PlanOptions", "Working", "plan"]
