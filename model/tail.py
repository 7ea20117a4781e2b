"""The rest of the model behind one site, run on many changed values at once over one clean run.

1. Only what lies behind the site runs: its own layer's remainder and the blocks above, up to the site that the target reads.
2. Only positions from `start` on run: what lies before a change stays as it was, and attention reads its clean keys and
   values, computed once per layer.
3. Behind the target's position nothing runs; the last block's MLP runs at that position alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .binding import Forward, Network, UnknownArchitecture, compare
from .sites import EMBED, Basis, Site, SiteKind


@dataclass
class CleanRun:
    """A finished run that tails branch off. values: site → (batch, pos, width), every `resid_l` that a tail passes among them.

    Keys and values of a layer's attention are computed when first asked for, and kept.
    """

    binding: Network
    run: Forward
    values: Mapping[Site, Tensor]
    _keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _suffixes: dict[tuple[int, int], Forward] = field(default_factory=dict)

    def before(self, layer: int) -> Tensor:
        """The residual stream that block `layer` reads, (batch, pos, d_model)."""
        return self.values[Site(SiteKind.RESID, layer - 1) if layer else EMBED]

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of every position, each (batch, key-value heads, pos, head_dim), rotation included."""
        if layer not in self._keys:
            with torch.no_grad(), self.binding.autocast(None):
                self._keys[layer] = self._recorded(layer)
        return self._keys[layer]

    def _recorded(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; checked by attending from the middle on and comparing with the whole."""
        recorder, stream = _Recorder(), self.before(layer)
        whole = self.binding.attend(layer, stream, self.run, cache=recorder)
        if recorder.seen is None:
            raise UnknownArchitecture(f"attention of layer {layer} gave its keys to no cache: runs that start behind a prefix are not possible")
        n, pos = stream.shape[:2]
        if start := pos // 2:
            everything = torch.arange(n, device=stream.device)
            prefix = Prefix(recorder.seen, everything, start)
            part = self.binding.attend(layer, stream[:, start:], self.run.suffix(start, pos), cache=prefix)
            compare(part, whole[:, start:], f"attention {layer} behind a prefix", self.binding)
        return recorder.seen

    def suffix(self, start: int, end: int) -> Forward:
        """The attention's arguments for positions `start` to `end` that read positions 0 to `end`."""
        if (start, end) not in self._suffixes:
            self._suffixes[start, end] = self.run.suffix(start, end)
        return self._suffixes[start, end]


class _Recorder:
    """Stands where transformers puts a cache of keys and values, and remembers what it is given."""

    def __init__(self) -> None:
        self.seen: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.seen = (keys, values)
        return keys, values


class Prefix:
    """Stands where transformers puts a cache: puts the clean keys and values of the positions before `start` in front."""

    def __init__(self, clean: tuple[Tensor, Tensor], sequence: Tensor, start: int) -> None:
        self.clean, self.sequence, self.start = clean, sequence, start

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return self._joined(self.clean[0], keys), self._joined(self.clean[1], values)

    def _joined(self, clean: Tensor, new: Tensor) -> Tensor:
        prefix = clean[:, :, : self.start]
        prefix = prefix.expand(len(new), -1, -1, -1) if len(clean) == 1 else prefix[self.sequence.to(prefix.device)]
        return torch.cat([prefix.to(new.dtype), new], dim=2)


@dataclass(frozen=True)
class Tail:
    """The function from one site's value to the value of the site that a target reads, at one position.

    site, basis: what is changed. end, end_basis, position: what is read. The site must feed the end.
    """

    clean: CleanRun
    site: Site
    basis: Basis
    end: Site
    end_basis: Basis
    position: int

    @property
    def length(self) -> int:
        """How many positions matter: those up to the one that is read."""
        return self.position + 1

    @property
    def n_layers(self) -> int:
        """How many blocks a run goes through (for estimates of cost and memory)."""
        return max(1, self.end.layer - self.site.layer)

    def __call__(self, value: Tensor, sequence: Tensor, start: int) -> Tensor:
        """The end's value at `position`, (n, width), for the site's values at positions `start` to `position`, (n, position + 1 - start, width).

        `sequence` (n,) says which clean sequence each row branches off. Gradients flow to `value` as torch's grad mode says.
        """
        binding, site, end = self.clean.binding, self.site, self.end
        if site == end:
            return value[:, -1]
        at = lambda s: self.clean.values[s][sequence, start : self.length]
        if site.kind in (SiteKind.EMBED, SiteKind.RESID):
            x = value
        elif site.kind is SiteKind.MLP or binding.parallel:
            # The layer's other parts are as they were: the sum moves by what this site's part moves.
            written = binding.written(site, value, self.basis) - binding.written(site, at(site), self.basis)
            x = at(Site(SiteKind.RESID, site.layer)) + written
        else:
            middle = self.clean.before(site.layer)[sequence, start : self.length] + binding.written(site, value, self.basis)
            if end == Site(SiteKind.MLP, site.layer):
                return binding.transform(site.layer, middle[:, -1:])[:, -1]
            if end == Site(SiteKind.RESID, site.layer):
                middle = middle[:, -1:]
            x = middle + binding.transform(site.layer, middle)
        for layer in range(site.layer + 1, end.layer + 1):
            x = self._block(layer, x, sequence, start)
        return x[:, -1]

    def _block(self, layer: int, x: Tensor, sequence: Tensor, start: int) -> Tensor:
        """One block on the suffix; in the end's own layer what the end holds, at its position alone."""
        binding, last = self.clean.binding, layer == self.end.layer
        if binding.chain:
            return binding.compute(Site(SiteKind.RESID, layer), [x], self.clean.run, Basis.RESIDUAL)
        basis = self.end_basis if last and self.end.kind is SiteKind.ATTN else Basis.RESIDUAL
        cache = Prefix(self.clean.keys_values(layer), sequence, start) if start else None
        attn = binding.attend(layer, x, self.clean.suffix(start, self.length), basis, cache=cache)
        if last and self.end.kind is SiteKind.ATTN:
            return attn
        if last:
            x, attn = x[:, -1:], attn[:, -1:]
        middle = x if binding.parallel else x + attn
        mlp = binding.transform(layer, middle)
        if last and self.end.kind is SiteKind.MLP:
            return mlp
        return x + attn + mlp
