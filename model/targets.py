"""What the output `y` is: a metric of the logits, a feature's activation, or a probe's value, at one position of the sequence.

With x the value at the target's position of the site that it reads (for the logits the last residual stream):

- logits: the metric of the next token's logits, which are computed from x at the last position;
- feature: node `index` of a dictionary's encoding of x, the position's scale included;
- probe: x · weight + bias, from a safetensors file.

A feature is named `resid_11/123`, or `resid_11/123@-2` at another position than the last: from 0, or from −1 backwards.
A probe is named by its file, with the tensors `weight` (width,) and, optionally, `bias` (one number), and in the file's metadata
`site` and, where wanted, `name`, `position` and `basis` (`heads` for a probe of the attention's concatenated head outputs).
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .binding import Network
from .dictionaries import Dictionary
from .metrics import Metric, evaluate
from .sites import Basis, Site, SiteKind, UnknownSite, parse_site

PROBE_SUFFIX = ".safetensors"
_FEATURE = re.compile(r"([^/@]+)/(\d+)(?:@([+-]?\d+))?")
_TENSORS = ("weight", "bias")
_HASH_LENGTH = 12


class UnknownTarget(UserError):
    """A text names no target, or one that these dictionaries do not have."""


class BadProbe(UserError):
    """A probe's file does not hold a probe of this model."""


class PositionOutOfRange(UserError):
    """A sequence is too short for the target's position."""


class Target(ABC):
    """A differentiable number of a sequence, read from one site at one position.

    `site` is None for the logits, which are read from the last residual stream; `basis` is what the site's value is read in.
    """

    site: Site | None
    basis: Basis

    @property
    @abstractmethod
    def name(self) -> str:
        """What the output is called: `logit_diff`, `feature resid_11/123`, `probe NAME`."""

    @property
    @abstractmethod
    def key(self) -> str:
        """The name, and what else tells this output from every other of the same model."""

    @abstractmethod
    def position(self, length: int) -> int:
        """The position that is read in a sequence of `length` tokens, from 0; raises `PositionOutOfRange`."""

    @abstractmethod
    def __call__(self, binding: Network, value: Tensor, answer: Tensor, wrong_answer: Tensor, clean_logits: Tensor | None) -> Tensor:
        """The target of each sequence, (n,), differentiable in `value` (n, width), the site's value at the target's position.

        `answer`, `wrong_answer` (n,) and `clean_logits` (n, vocab) matter to the logits only.
        """

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Everything that determines the target's values, as plain JSON."""


@dataclass(frozen=True, eq=False)
class LogitTarget(Target):
    """A metric of the logits after the last position."""

    metric: Metric
    site: None = field(default=None, init=False)
    basis: Basis = field(default=Basis.RESIDUAL, init=False)

    @property
    def name(self) -> str:
        return self.metric.value

    @property
    def key(self) -> str:
        return self.name

    def position(self, length: int) -> int:
        return _position(length, -1, self.name)

    def __call__(self, binding: Network, value: Tensor, answer: Tensor, wrong_answer: Tensor, clean_logits: Tensor | None) -> Tensor:
        return evaluate(self.metric, binding.logits(value), answer, wrong_answer, clean_logits)

    def identity(self) -> dict[str, object]:
        return {"kind": "logits", "metric": self.metric.value}


@dataclass(frozen=True, eq=False)
class FeatureTarget(Target):
    """The value of one node of a dictionary, `index`, at position `pos` (from the end where negative)."""

    site: Site
    dictionary: Dictionary
    index: int
    pos: int = -1
    basis: Basis = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", self.dictionary.basis)
        if not 0 <= self.index < self.dictionary.d_sae:
            raise UnknownTarget(f"target {self.name[8:]}: the dictionary of {self.site} has features 0 to {self.dictionary.d_sae - 1}")

    @property
    def name(self) -> str:
        return f"feature {self.site}/{self.index}" + ("" if self.pos == -1 else f"@{self.pos}")

    @property
    def key(self) -> str:
        return f"{self.name}|{self.dictionary.id}"

    def position(self, length: int) -> int:
        return _position(length, self.pos, self.name)

    def __call__(self, binding: Network, value: Tensor, answer: Tensor, wrong_answer: Tensor, clean_logits: Tensor | None) -> Tensor:
        return self.dictionary.encode(value)[:, self.index]

    def identity(self) -> dict[str, object]:
        at = {"site": self.site.name, "dictionary": self.dictionary.id, "index": self.index, "position": self.pos}
        return {"kind": "feature", **at}


@dataclass(frozen=True, eq=False)
class ProbeTarget(Target):
    """A linear probe, value · weight + bias; weight (width,), bias () on the model's device, in its floating-point type."""

    site: Site
    weight: Tensor
    bias: Tensor
    pos: int = -1
    label: str = "probe"
    basis: Basis = Basis.RESIDUAL

    @property
    def name(self) -> str:
        return f"probe {self.label}"

    @property
    def key(self) -> str:
        return f"{self.name}|{self.site}|{self.basis.value}|{self.pos}|{self.digest}"

    @property
    def digest(self) -> str:
        """First 12 hex digits of the sha256 over weight and bias, as float64."""
        numbers = torch.cat([self.weight, self.bias.reshape(1)]).detach().cpu().double().numpy()
        return hashlib.sha256(numbers.astype("<f8").tobytes()).hexdigest()[:_HASH_LENGTH]

    def position(self, length: int) -> int:
        return _position(length, self.pos, self.name)

    def __call__(self, binding: Network, value: Tensor, answer: Tensor, wrong_answer: Tensor, clean_logits: Tensor | None) -> Tensor:
        return value @ self.weight + self.bias

    def identity(self) -> dict[str, object]:
        at = {"site": self.site.name, "basis": self.basis.value, "position": self.pos, "name": self.label}
        return {"kind": "probe", **at, "sha256": self.digest}


def _position(length: int, pos: int, name: str) -> int:
    place = pos if pos >= 0 else length + pos
    if not 0 <= place < length:
        raise PositionOutOfRange(f"{name} is read at position {pos}, and a sequence has {length} tokens: take one from {-length} to {length - 1}")
    return place


# --- from a text to a target -----------------------------------------------------------------------------------------


def parse_target(text: str, dictionaries: Mapping[Site, Dictionary], binding: Network) -> Target:
    """The target that a user names: a feature, `resid_11/123` or `resid_11/123@-2`, or a probe's safetensors file.

    `dictionaries` must have the feature's site. Raises `UnknownTarget`, `UnknownSite` or `BadProbe`.
    """
    if _names_a_file(text):
        return read_probe(Path(text), binding)
    site, index, pos = _parse_feature(text)
    if site.layer >= binding.n_layers:
        raise UnknownSite(f"target {text!r}: this model has layers 0 to {binding.n_layers - 1}")
    if site not in dictionaries:
        have = ", ".join(other.name for other in dictionaries)
        raise UnknownTarget(f"target {text!r}: there is no dictionary of {site.name}; the dictionaries are of {have}")
    return FeatureTarget(site, dictionaries[site], index, pos)


def target_site(text: str) -> Site | None:
    """The site whose dictionary the target needs: None for a probe, which needs none. Raises as `parse_target` does."""
    return None if _names_a_file(text) else _parse_feature(text)[0]


def _names_a_file(text: str) -> bool:
    return text.endswith(PROBE_SUFFIX) or Path(text).is_file()


def _parse_feature(text: str) -> tuple[Site, int, int]:
    match = _FEATURE.fullmatch(text.strip())
    if match is None:
        raise UnknownTarget(
            f"target {text!r} is neither a feature, as in resid_11/123 or resid_11/123@-2 (at the last position but one), "
            f"nor a probe's {PROBE_SUFFIX} file"
        )
    name, index, pos = match.groups()
    site = parse_site(name)
    if site.kind is SiteKind.OUTPUT:
        raise UnknownTarget(f"target {text!r}: y has no features; the output is a metric of the logits when no target is given")
    return site, int(index), -1 if pos is None else int(pos)


def read_probe(path: Path, binding: Network) -> ProbeTarget:
    """The probe of a safetensors file (see the module's text); raises `BadProbe`, or `UnknownSite` for a site that the model lacks."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping: it has keys() only
    except (OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadProbe(f"probe {path} is no readable safetensors file: {reason}") from None
    if unknown := [name for name in tensors if name not in _TENSORS] or [name for name in _TENSORS[:1] if name not in tensors]:
        raise BadProbe(f"probe {path} has the tensors {', '.join(tensors) or '(none)'}, not weight and (optionally) bias: see {unknown[0]!r}")
    if "site" not in metadata:
        raise BadProbe(f"probe {path} does not say what it reads: save it with metadata such as {{'site': 'resid_11', 'position': '-1'}}")
    site, basis = parse_site(metadata["site"]), _basis(path, metadata)
    if site.kind is SiteKind.OUTPUT or site.layer >= binding.n_layers:
        raise UnknownSite(f"probe {path} reads {site.name}: this model has embed, and attn_L, mlp_L, resid_L with L from 0 to {binding.n_layers - 1}")
    weight, bias = _tensors(path, tensors, f"{site.name} ({basis.value})", binding.width(site, basis))
    name = metadata.get("name") or path.name.removesuffix(PROBE_SUFFIX)
    weight, bias = (tensor.to(device=binding.device, dtype=binding.dtype) for tensor in (weight, bias))
    return ProbeTarget(site, weight, bias, _metadata_position(path, metadata), name, basis)


def _tensors(path: Path, tensors: Mapping[str, Tensor], site: str, width: int) -> tuple[Tensor, Tensor]:
    """The weight (width,) and bias (), also as a linear layer of one output saves them, (1, width) and (1,)."""
    weight, bias = tensors["weight"], tensors.get("bias", torch.zeros(()))
    if tuple(weight.shape) not in ((width,), (1, width)):
        raise BadProbe(f"probe {path} has a weight of shape {tuple(weight.shape)}; {site} has width {width} in this model, so it must be ({width},)")
    if bias.numel() != 1:
        raise BadProbe(f"probe {path} has a bias of shape {tuple(bias.shape)}: a probe gives one number, and so must its bias be")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise BadProbe(f"probe {path}: its {name} is not all finite floating-point numbers")
    return weight.reshape(width), bias.reshape(())


def _basis(path: Path, metadata: Mapping[str, str]) -> Basis:
    name = metadata.get("basis", Basis.RESIDUAL.value)
    if name not in list(Basis):
        raise BadProbe(f"probe {path} has basis {name!r}: it is one of {', '.join(Basis)}")
    return Basis(name)


def _metadata_position(path: Path, metadata: Mapping[str, str]) -> int:
    text = metadata.get("position", "-1")
    try:
        return int(text)
    except ValueError:
        raise BadProbe(f"probe {path} has position {text!r}: a whole number, from 0, or from -1 backwards") from None
