"""Dictionaries: what takes a site's value apart into features, with the derivative of the encoder in our own hands.

1. `prepare` brings the value to the encoder's input: centring, normalisation per position, the decoder bias taken off.
2. One product with `W_enc` gives every feature's raw value; each kind turns raw values into activations and a mask.
3. A node is the activation times the position's scale s, so that for every kind

       x = b_dec + Σ node · W_dec + error

   is exact: means, scales of the bias and a centred-off mean stay in the error.

A dictionary may lie on another device than the values that it takes apart (its layer's), and may be kept in another type: what comes in
is brought to it, and what comes out goes back, to the device and in the type of what came in. Its weights may also be away, and are read
again when they are next needed (`Shelf`).

All kinds have an affine decoder. Where the input is not normalised per position the derivative of a node is its mask times
the encoder's column, which `encoder_rows` and `encode_vjp` use; otherwise they take one batched backward pass.
"""

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from .products import linear
from .sites import Basis

__all__ = [
    "Basis",
    "Dictionary",
    "GatedDictionary",
    "IdentityDictionary",
    "InputTransform",
    "JumpReLUDictionary",
    "Kind",
    "LinearDictionary",
    "Normalisation",
    "ReLUDictionary",
    "TopKDictionary",
    "per_head_linear",
]

# The constant that sae_lens adds to the standard deviation on the way in, and not on the way out.
_LAYER_NORM_EPS = 1e-5

_AT_ONCE = 2**20
"""Entries of a comparison that are held at once."""

_PRODUCT_ADVANTAGE = 16
"""How many entries a matrix product makes in the time of one dot product of gathered rows."""


class Kind(StrEnum):
    """How a dictionary makes activations of its input."""

    RELU = "relu"
    GATED = "gated"
    TOPK = "topk"
    JUMPRELU = "jumprelu"
    LINEAR = "linear"
    PER_HEAD_LINEAR = "per_head_linear"
    IDENTITY = "identity"


class Normalisation(StrEnum):
    """Normalisation of the input per position."""

    NONE = "none"
    LAYER_NORM = "layer_norm"
    CONSTANT_NORM = "constant_norm_rescale"


@dataclass(frozen=True, slots=True)
class InputTransform:
    """What happens to a site's value before the encoder's product.

    centred: the mean over the width is taken off first (dictionaries of models with centred writing weights).
    normalisation: per position. subtract_b_dec: the decoder's bias is taken off last.
    """

    centred: bool = False
    normalisation: Normalisation = Normalisation.NONE
    subtract_b_dec: bool = False


_TAKEN_AWAY = ("encode", "active", "encode_columns", "encode_at", "decode", "lift", "project", "meets", "encoder_rows", "active_rows", "encode_vjp",
               "activate")  # fmt: skip
"""Methods whose first argument is a tensor of values, nodes or gradients: they compute where the dictionary lies."""


def _where_it_lies(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes tensors to the dictionary, and its result back to the device and type of the first of them."""

    @wraps(method)
    def taken(self: "Dictionary", first: Tensor, *rest: Any) -> Any:
        if self.shelf is not None:
            self.shelf.touch(self)
        device, dtype = self.b_dec.device, self.b_dec.dtype
        if first.device == device and first.dtype == dtype:
            return method(self, first, *rest)

        def there(value: Any) -> Any:
            return value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value

        def back(value: Tensor) -> Tensor:
            return value.to(first.device, first.dtype if value.is_floating_point() and first.is_floating_point() else None)

        found = method(self, there(first), *map(there, rest))
        return tuple(map(back, found)) if isinstance(found, tuple) else back(found)

    return taken


@dataclass(frozen=True, eq=False)
class Dictionary(ABC):
    """A dictionary of one site; tensors are never changed in place, and nothing is remembered between calls.

    W_dec: (d_sae, d_in). b_dec: (d_in,). prepend_bos: whether it was trained on sequences that
    begin with a beginning-of-text token; None where it does not say.
    """

    shelf: ClassVar["Shelf | None"] = None
    """Where weights that are away come from; set on a dictionary itself (`Shelf.put`)."""

    id: str
    basis: Basis
    W_dec: Tensor
    b_dec: Tensor
    prepend_bos: bool | None = None

    kind: ClassVar[Kind]

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name in _TAKEN_AWAY:
            if name in vars(cls):
                setattr(cls, name, _where_it_lies(vars(cls)[name]))

    if not TYPE_CHECKING:  # a checker would take it that there is every attribute

        def __getattr__(self, name: str) -> Any:
            # Only what is not there comes here: weights that are away.
            shelf = vars(self).get("shelf")
            if shelf is None or not shelf.fetch(self, name):
                raise AttributeError(f"{type(self).__name__} has no {name}")
            return vars(self)[name]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_sae, d_in), known while the weights are away."""
        known: tuple[int, int] | None = vars(self).get("known_shape")
        return known or (int(self.W_dec.shape[0]), int(self.W_dec.shape[1]))

    @property
    def d_in(self) -> int:
        """Width of the site's value."""
        return self.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.shape[0]

    @property
    def home(self) -> torch.device:
        """The device of what is made of its directions: that of the values it takes apart, its own unless it was put elsewhere."""
        known: torch.device | None = vars(self).get("known_home")
        return known or self.b_dec.device

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors, those derived from them included, as they are now."""
        return sum(value.numel() * value.itemsize for value in vars(self).values() if isinstance(value, Tensor))

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Node values of a site's value, (..., d_in) → (..., d_sae), the position's scale included; differentiable."""

    @abstractmethod
    def active(self, x: Tensor) -> Tensor:
        """Where a node's derivative is not zero, (..., d_in) → bool (..., d_sae)."""

    @_where_it_lies
    def encode_columns(self, x: Tensor, columns: Tensor) -> Tensor:
        """Node values of some features only, (..., d_in) and columns (n,) → (..., n)."""
        return self.encode(x)[..., columns]

    @_where_it_lies
    def encode_at(self, x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """Value i is that of node index[i] at x[rows[i]]; x (n_rows, d_in), rows and index (n,) → (n,)."""
        return self.encode(x)[rows, index]

    def directions(self, rows: Tensor | slice | int) -> Tensor:
        """W_dec of some features, float32 at least, (..., d_in): on the device of `rows` (...,); of a slice, or of one (d_in,), at home."""
        if self.shelf is not None:
            self.shelf.touch(self)
        if not isinstance(rows, Tensor):
            return computed(self.W_dec[rows]).to(self.home)
        return computed(self.W_dec[rows.to(self.W_dec.device)]).to(rows.device)

    @_where_it_lies
    def decode(self, nodes: Tensor) -> Tensor:
        """b_dec + nodes · W_dec, (..., d_sae) → (..., d_in)."""
        return nodes @ self.W_dec + self.b_dec

    @_where_it_lies
    def lift(self, nodes: Tensor) -> Tensor:
        """nodes · W_dec, a change of nodes as one of the site's value: (..., d_sae) → (..., d_in)."""
        return nodes @ self.W_dec

    @_where_it_lies
    def project(self, gradient: Tensor) -> Tensor:
        """A gradient with respect to the site's value as one with respect to its nodes, W_dec · g: (..., d_in) → (..., d_sae)."""
        return gradient @ self.W_dec.T

    @_where_it_lies
    def meets(self, size: Tensor) -> Tensor:
        """Whether a node's direction shares a dimension with a gradient of these magnitudes, (..., d_in) ≥ 0 → bool (..., d_sae)."""
        return size @ self.W_dec.abs().T != 0

    @_where_it_lies
    def encoder_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Row r is the gradient of node index[r] with respect to x[r]; x (n, d_in), index (n,) → (n, d_in)."""
        if not len(index):
            return x.new_zeros(0, self.d_in)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            chosen = self.encode(leaf).gather(1, index[:, None]).sum()
        return torch.autograd.grad(chosen, leaf)[0]

    @_where_it_lies
    def active_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """`encoder_rows` where feature index[r] is known to be active at x[r]: most kinds need not look at x then."""
        return self.encoder_rows(x, index)

    @_where_it_lies
    def encode_vjp(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """Row r is Σ_j cotangent[r, j] · ∂node_j/∂x at x[r]; x (n, d_in), cotangent (n, d_sae) → (n, d_in)."""
        if not len(x):
            return x.new_zeros(0, self.d_in)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            nodes = self.encode(leaf)
        return torch.autograd.grad(nodes, leaf, grad_outputs=cotangent)[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """This dictionary on another device or in another floating-point type."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {name: value.to(device=device, dtype=dtype) for name, value in tensors if isinstance(value, Tensor)}
        return replace(self, **moved)


def computed(x: Tensor) -> Tensor:
    """Half precision is for storing: what is made of weights and directions is made in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --- weights that come and go ----------------------------------------------------------------------------------------


class Shelf:
    """Keeps the weights of the dictionaries used last within `memory` bytes (None: all of them); the others' are read again when needed.

    The one just asked for is always kept. A dictionary's kind, shape and id are known all the time.
    """

    def __init__(self, memory: int | None = None) -> None:
        self.memory = memory
        self.reads = 0
        self._readers: dict[int, Callable[[], Dictionary]] = {}
        self._here: OrderedDict[int, Dictionary] = OrderedDict()
        self._lock = threading.RLock()

    def put(self, dictionary: "Dictionary", read: "Callable[[], Dictionary]", home: torch.device) -> None:
        """Take charge of a dictionary, whose weights may be on `meta` until they are needed; `read` reads them."""
        shape = dictionary.shape
        with self._lock:
            self._readers[id(dictionary)] = read
            vars(dictionary).update(shelf=self, known_shape=shape, known_home=home)
            if dictionary.b_dec.is_meta:
                _empty(dictionary)
            else:
                self._here[id(dictionary)] = dictionary
                self._make_room(dictionary)

    def touch(self, dictionary: "Dictionary") -> None:
        """Note that a dictionary is used."""
        if self.memory is not None and id(dictionary) in self._here:
            with self._lock:
                if id(dictionary) in self._here:
                    self._here.move_to_end(id(dictionary))

    def fetch(self, dictionary: "Dictionary", name: str) -> bool:
        """Read a dictionary's weights if `name` is one of its tensors and they are away; whether it is there now."""
        if name not in {field.name for field in fields(dictionary)}:
            return False
        with self._lock:
            if name not in vars(dictionary):
                read = self._readers[id(dictionary)]()
                vars(dictionary).update({f.name: value for f in fields(read) if isinstance(value := vars(read).get(f.name), Tensor)})
                self.reads += 1
                self._here[id(dictionary)] = dictionary
                self._make_room(dictionary)
        return name in vars(dictionary)

    def _make_room(self, kept: "Dictionary") -> None:
        if self.memory is None:
            return
        while len(self._here) > 1 and sum(one.n_bytes for one in self._here.values()) > self.memory:
            oldest = next(key for key, one in self._here.items() if one is not kept)
            _empty(self._here.pop(oldest))


def _empty(dictionary: "Dictionary") -> None:
    """Let a dictionary's tensors go, those derived from its weights too."""
    for name in [name for name, value in vars(dictionary).items() if isinstance(value, Tensor)]:
        del vars(dictionary)[name]


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseDictionary(Dictionary):
    """Kinds with an encoder matrix and a mask. W_enc: (d_in, d_sae)."""

    W_enc: Tensor
    input: InputTransform = InputTransform()

    # The mask of one feature needs that feature's raw value only (not so for TopK).
    mask_is_local: ClassVar[bool] = True

    @abstractmethod
    def activate(self, raw: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Activations before masking and the mask, for raw values x·W_enc (..., n) of the features `columns`."""

    @property
    def gain(self) -> Tensor | None:
        """Factor per feature between raw value and activation, (d_sae,); None for 1."""
        return None

    @cached_property
    def encoder(self) -> Tensor:
        """W_enc transposed and contiguous, (d_sae, d_in): its rows are gathered often."""
        return self.W_enc.T.contiguous()

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The encoder's input (..., d_in) and the scale s of each position (..., 1), None for 1."""
        scale = None
        if self.input.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        if self.input.normalisation is Normalisation.LAYER_NORM:
            x = x - x.mean(dim=-1, keepdim=True)
            scale = x.std(dim=-1, keepdim=True)
            x = x / (scale + _LAYER_NORM_EPS)
        elif self.input.normalisation is Normalisation.CONSTANT_NORM:
            scale = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            x = x / scale
        return (x - self.b_dec if self.input.subtract_b_dec else x), scale

    def encode(self, x: Tensor) -> Tensor:
        prepared, scale = self.prepare(x)
        values, mask = self.activate(prepared @ self.W_enc, slice(None))
        nodes = torch.where(mask, values, 0.0)  # (..., d_sae)
        return nodes if scale is None else nodes * scale

    def encode_columns(self, x: Tensor, columns: Tensor) -> Tensor:
        if not self.mask_is_local:
            return super().encode_columns(x, columns)
        prepared, scale = self.prepare(x)
        values, mask = self.activate(prepared @ self.encoder[columns].T, columns)
        nodes = torch.where(mask, values, 0.0)  # (..., n)
        return nodes if scale is None else nodes * scale

    def encode_at(self, x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        if not self.mask_is_local:
            return super().encode_at(x, rows, index)
        columns, place = index.unique(return_inverse=True)
        if len(x) * len(columns) <= _PRODUCT_ADVANTAGE * len(index):
            return self.encode_columns(x, columns)[rows, place]
        prepared, scale = self.prepare(x)
        values, mask = self.activate((prepared[rows] * self.encoder[index]).sum(-1), index)
        nodes = torch.where(mask, values, 0.0)  # (n,)
        return nodes if scale is None else nodes * scale[rows, 0]

    def active(self, x: Tensor) -> Tensor:
        return self.activate(self.prepare(x)[0] @ self.W_enc, slice(None))[1]

    def encoder_rows(self, x: Tensor, index: Tensor) -> Tensor:
        if self.input.normalisation is not Normalisation.NONE:
            return super().encoder_rows(x, index)
        rows = self.encoder[index]  # (n, d_in)
        if self.mask_is_local:
            mask = self.activate((self.prepare(x)[0] * rows).sum(-1), index)[1]  # (n,)
        else:
            mask = self.active(x).gather(1, index[:, None])[:, 0]
        factor = mask.to(rows.dtype) if self.gain is None else mask * self.gain[index]
        return self._project(rows * factor[:, None])

    def active_rows(self, x: Tensor, index: Tensor) -> Tensor:
        if self.input.normalisation is not Normalisation.NONE:
            return super().active_rows(x, index)
        rows = self.encoder[index]  # (n, d_in)
        return self._project(rows if self.gain is None else rows * self.gain[index][:, None])

    def encode_vjp(self, x: Tensor, cotangent: Tensor) -> Tensor:
        if self.input.normalisation is not Normalisation.NONE:
            return super().encode_vjp(x, cotangent)
        seen = cotangent * self.active(x)
        return self._project((seen if self.gain is None else seen * self.gain) @ self.W_enc.T)

    def _project(self, gradient: Tensor) -> Tensor:
        """The gradient through the centring: the part along (1, …, 1) is lost."""
        return gradient - gradient.mean(dim=-1, keepdim=True) if self.input.centred else gradient


@dataclass(frozen=True, eq=False, kw_only=True)
class ReLUDictionary(SparseDictionary):
    """relu(x·W_enc + b_enc); sae_lens calls it `standard`. b_enc: (d_sae,)."""

    b_enc: Tensor
    kind: ClassVar[Kind] = Kind.RELU

    def activate(self, raw: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor]:
        values = raw + self.b_enc[columns]
        return values, values > 0


@dataclass(frozen=True, eq=False, kw_only=True)
class JumpReLUDictionary(SparseDictionary):
    """x·W_enc + b_enc where it exceeds a threshold per feature (and 0); BatchTopK ones become these. b_enc, threshold: (d_sae,)."""

    b_enc: Tensor
    threshold: Tensor
    kind: ClassVar[Kind] = Kind.JUMPRELU

    def activate(self, raw: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor]:
        values = raw + self.b_enc[columns]
        return values, (values > self.threshold[columns]) & (values > 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class GatedDictionary(SparseDictionary):
    """exp(r_mag)·(x·W_enc) + b_mag where it and the gate x·W_enc + b_gate are positive. b_gate, b_mag, r_mag: (d_sae,)."""

    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    kind: ClassVar[Kind] = Kind.GATED

    @cached_property
    def gain(self) -> Tensor:
        return self.r_mag.exp()

    def activate(self, raw: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor]:
        values = raw * self.gain[columns] + self.b_mag[columns]
        return values, (values > 0) & (raw + self.b_gate[columns] > 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class TopKDictionary(SparseDictionary):
    """The k largest of x·W_enc + b_enc at a position, those above 0; of equal ones the features of lower index. b_enc: (d_sae,)."""

    b_enc: Tensor
    k: int
    kind: ClassVar[Kind] = Kind.TOPK
    mask_is_local: ClassVar[bool] = False

    def activate(self, raw: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor]:
        values = raw + self.b_enc[columns]
        return values, top_k_mask(values.detach(), self.k)

    def encode_at(self, x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """Of few nodes per row the rank is counted, as many as are asked for; that is `encode`'s mask without sorting."""
        if len(index) > 8 * len(x):
            return super().encode_at(x, rows, index)
        prepared, scale = self.prepare(x)
        values = linear(prepared, self.encoder, self.b_enc)  # (n_rows, d_sae)
        own = values[rows, index]  # (n,)
        ranks = torch.empty_like(index)
        size = max(1, _AT_ONCE // self.d_sae)
        for start in range(0, len(index), size):  # by memory
            part = slice(start, start + size)
            others, mine = values[rows[part]], own[part, None]
            before = torch.arange(self.d_sae, device=x.device) < index[part, None]
            ranks[part] = ((others > mine) | ((others == mine) & before)).sum(dim=-1)
        nodes = torch.where((ranks < self.k) & (own > 0), own, 0.0)
        return nodes if scale is None else nodes * scale[rows, 0]


def sparse_affine(dictionary: Dictionary, columns: Tensor) -> tuple[Tensor, Tensor] | None:
    """Raw values x·W_enc of some features (n,) as affine functions of the site's value x: weights (n, d_in) and offsets (n,).

    None for kinds without an encoder that is masked, and where the input is normalised per position.
    """
    if not isinstance(dictionary, SparseDictionary) or dictionary.input.normalisation is not Normalisation.NONE:
        return None
    rows = computed(dictionary.encoder[columns.to(dictionary.W_dec.device)]).to(columns.device)
    offset = -(rows @ dictionary.b_dec.to(rows)) if dictionary.input.subtract_b_dec else rows.new_zeros(len(rows))
    return dictionary._project(rows), offset


def top_k_mask(values: Tensor, k: int) -> Tensor:
    """Where the `k` largest positive values of the last dimension are, bool (..., d); ties go to the lower index."""
    smallest = values.topk(min(k, values.shape[-1]), dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)  # (..., 1)
    positive = values > 0
    mask = (values >= smallest) & positive
    if bool((mask.sum(dim=-1) > k).any()):
        tied = (values == smallest) & positive
        room = k - (mask & ~tied).sum(dim=-1, keepdim=True)
        mask &= ~tied | (tied.cumsum(dim=-1) <= room)
    return mask


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearDictionary(Dictionary):
    """An affine encoder without sparsity, x·W_enc + b_enc: probes, rotations, linear pairs. W_enc: (d_in, d_sae), b_enc: (d_sae,)."""

    W_enc: Tensor
    b_enc: Tensor
    kind: ClassVar[Kind] = Kind.LINEAR

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.W_enc + self.b_enc

    def active(self, x: Tensor) -> Tensor:
        return torch.ones(*x.shape[:-1], self.d_sae, dtype=torch.bool, device=x.device)

    def encoder_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return self.W_enc.T[index]

    def encode_vjp(self, x: Tensor, cotangent: Tensor) -> Tensor:
        return cotangent @ self.W_enc.T


@dataclass(frozen=True, eq=False, kw_only=True)
class PerHeadLinearDictionary(LinearDictionary):
    """A linear dictionary whose features each read and write one attention head (block-diagonal matrices)."""

    kind: ClassVar[Kind] = Kind.PER_HEAD_LINEAR


def per_head_linear(
    id: str, encoders: Tensor, decoders: Tensor, *, b_enc: Tensor | None = None, b_dec: Tensor | None = None
) -> PerHeadLinearDictionary:
    """A dictionary on concatenated head outputs from one linear pair per head.

    encoders: (n_heads, head_dim, features). decoders: (n_heads, features, head_dim). Feature f of head h has the index
    h · features + f. b_enc: (n_heads · features,). b_dec: (n_heads · head_dim,). Biases are 0 unless given.
    """
    W_enc = torch.block_diag(*encoders)  # (n_heads * head_dim, n_heads * features)
    W_dec = torch.block_diag(*decoders)  # (n_heads * features, n_heads * head_dim)
    return PerHeadLinearDictionary(
        id=id,
        basis=Basis.HEADS,
        W_dec=W_dec,
        b_dec=W_dec.new_zeros(W_dec.shape[1]) if b_dec is None else b_dec,
        W_enc=W_enc,
        b_enc=W_enc.new_zeros(W_enc.shape[1]) if b_enc is None else b_enc,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class IdentityDictionary(Dictionary):
    """Every dimension of the site is a feature; the error is 0. Make it by `identity`."""

    kind: ClassVar[Kind] = Kind.IDENTITY

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, nodes: Tensor) -> Tensor:
        return nodes

    def project(self, gradient: Tensor) -> Tensor:
        return gradient

    def active(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape, dtype=torch.bool, device=x.device)

    def encoder_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return self.W_dec[index]

    def encode_vjp(self, x: Tensor, cotangent: Tensor) -> Tensor:
        return cotangent


def identity(
    d_in: int, *, basis: Basis = Basis.RESIDUAL, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> IdentityDictionary:
    """The identity on a site of width `d_in`: its features are the site's own dimensions; on head outputs its id is `identity-heads`."""
    id = "identity-heads" if basis is Basis.HEADS else "identity"
    return IdentityDictionary(
        id=id, basis=basis, W_dec=torch.eye(d_in, device=device, dtype=dtype), b_dec=torch.zeros(d_in, device=device, dtype=dtype)
    )
