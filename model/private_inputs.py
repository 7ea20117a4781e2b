"""The private inputs of one site's targets: each distinct one once through the local function.

1. A place is where an input is needed: a (target, sequence, position), or a (target, sequence) where the local function mixes positions.
2. Places with equal inputs are found by signatures of their changed nodes. Where baselines are those of a run, a place without any
   changed source is at its baseline, and needs nothing.
3. Of each distinct input the hidden value is computed (`low_rank`), or the value itself where the site has no such form.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .dictionaries import Dictionary, sparse_affine
from .masks import ERROR, SHARED, Errors
from .products import fast_products, linear
from .readout import Reader
from .signatures import Signatures, row_hashes
from .sites import OUTPUT, Site

if TYPE_CHECKING:
    from .edge_ablation import EdgeAblation

WHOLE = -2
"""Stands where a target's number does, for a site's value that is computed from all of its parents' ablated nodes."""

_ROWS_ON_CPU = 512
"""Rows (positions of inputs) that go together where a processor's cache matters more than few large products."""


@dataclass(frozen=True, eq=False)
class Entries:
    """The targets of one site, over all classes of sets: n of them, and the E edges into them. Tables on the CPU.

    They are in ascending order. variant (n,): which class. node (n,): its number, `ERROR` or `WHOLE`.
    position (n,): `SHARED` or its own. dead (n,): every edge into it is cut.
    target (E,): the place of an edge's target among the n. parent (E,), source (E,), source_position (E,): where the edge comes from.
    """

    variant: Tensor
    node: Tensor
    position: Tensor
    dead: Tensor
    target: Tensor
    parent: Tensor
    source: Tensor
    source_position: Tensor

    @staticmethod
    def of(variant: Tensor, node: Tensor, position: Tensor, parent: Tensor, source: Tensor, source_position: Tensor) -> "Entries":
        """Targets that may be named several times, the first E of them by the edges into them."""
        width, length = (int(tensor.max()) + extra if len(tensor) else 1 for tensor, extra in ((node, 3), (position, 2)))
        keys, inverse = ((variant * width + node + 2) * length + position + 1).unique(return_inverse=True)
        dead, target = torch.zeros(len(keys), dtype=torch.bool), inverse[: len(parent)]
        return Entries(
            keys // (width * length), keys // length % width - 2, keys % length - 1, dead, target, parent, source, source_position
        )

    def __len__(self) -> int:
        return len(self.variant)

    @property
    def n_edges(self) -> Tensor:
        """Edges into each target, (n,)."""
        return torch.bincount(self.target, minlength=len(self))

    def with_dead(self, dead: Tensor) -> "Entries":
        return replace(self, dead=dead)

    def only(self, chosen: Tensor) -> "Entries":
        """The targets of a mask (n,), with their edges."""
        if bool(chosen.all()):
            return self
        edges = chosen[self.target]
        variant, node, position, dead = (tensor[chosen] for tensor in (self.variant, self.node, self.position, self.dead))
        target = (chosen.cumsum(0) - 1)[self.target[edges]]
        return Entries(variant, node, position, dead, target, self.parent[edges], self.source[edges], self.source_position[edges])

    def part(self, start: int, stop: int) -> "Entries":
        """The targets from `start` on, before `stop`, with their edges."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[start:stop] = True
        return self.only(chosen)

    def same_as(self, first: int, columns: Sequence[Tensor], changed: Sequence[Tensor]) -> Tensor:
        """Which targets class `first` has too, with the same edges, none of whose sources has changed, (n,).

        columns: of each parent's state. changed: per parent which of them, and the error node, have, (classes, C + 1).
        """
        lists = torch.zeros(len(self), dtype=torch.int64)
        lists.index_add_(0, self.target, row_hashes(torch.stack([self.parent, self.source, self.source_position], dim=1)))
        if not len(self):
            return torch.zeros(0, dtype=torch.bool)
        keys = (self.node + 2) * (int(self.position.max()) + 2) + self.position + 1
        theirs = (self.variant == first).nonzero().flatten()
        if not len(theirs):
            return torch.zeros(len(self), dtype=torch.bool)
        at = theirs[torch.searchsorted(keys[theirs], keys).clamp(max=len(theirs) - 1)]
        moved = torch.zeros(len(self), dtype=torch.int64)
        for i, (own, table) in enumerate(zip(columns, changed, strict=True)):
            edges = (self.parent == i).nonzero().flatten()
            column, known = places(own, self.source[edges])
            moved.index_add_(0, self.target[edges], (known & table[self.variant[self.target[edges]], column]).long())
        return (keys[at] == keys) & (lists[at] == lists) & (moved == 0)


def places(columns: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Where nodes are among `columns`, the error node behind them, and whether they are there at all; both (n,)."""
    column = torch.searchsorted(columns, source).clamp(max=max(len(columns) - 1, 0))
    known = columns[column] == source if len(columns) else torch.zeros_like(source, dtype=torch.bool)
    return torch.where(source == ERROR, len(columns), column), known | (source == ERROR)


@dataclass
class State:
    """A site's ablated nodes in every class of sets, as differences from the baseline.

    columns (C,): the features that some set lists, as source or target. delta (classes, batch, pos, C). error (classes, batch, pos, width).
    value (classes, batch, pos, width): the site's whole ablated value, where a set reads everything.
    """

    columns: Tensor
    delta: Tensor
    error: Tensor
    value: Tensor | None = None

    def trimmed(self) -> "State":
        """Without the features that are nowhere different from the baseline."""
        kept = self.delta.flatten(0, 2).any(dim=0)
        return self if bool(kept.all()) else State(self.columns[kept], self.delta[..., kept], self.error, self.value)

    def differs(self, first: int) -> Tensor:
        """Which features (and, last, the error node) differ from class `first`, (classes, C + 1)."""
        features = torch.stack([(own != self.delta[first]).flatten(0, 1).any(dim=0) for own in self.delta])
        errors = torch.stack([(own != self.error[first]).any() for own in self.error])
        return torch.cat([features, errors[:, None]], dim=1)


@dataclass(frozen=True, eq=False)
class Computed:
    """Hidden values (rows, width) of a site, at `cell` (rows,), and for n targets which of the rows is theirs: all other tensors are (n,)."""

    hidden: Tensor
    cell: Tensor
    row: Tensor
    variant: Tensor
    sequence: Tensor
    position: Tensor
    node: Tensor

    def only(self, chosen: Tensor) -> "Computed":
        """The targets chosen by a mask (n,)."""
        own = (tensor[chosen] for tensor in (self.row, self.variant, self.sequence, self.position, self.node))
        return Computed(self.hidden, self.cell, *own)


def distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The first place of each distinct key, (m,), and which of those a place has, (n,)."""
    found, inverse = keys.unique(return_inverse=True)
    first = torch.full((len(found),), len(keys), device=keys.device)
    return first.scatter_reduce_(0, inverse, torch.arange(len(keys), device=keys.device), "amin"), inverse


class Inputs:
    """The private inputs of some targets of one site."""

    reader: Reader

    def __init__(self, ablation: "EdgeAblation", site: Site, entries: Entries, positions: int) -> None:
        self.ablation, self.site, self.entries = ablation, site, entries
        self.clean = ablation.batch.clean
        self.function = self.clean.functions[site]
        self.mixes = self.function.mixes_positions
        self.form = self.clean.form(site)
        self.device = ablation.device
        self.variant, self.node, self.position = (t.to(self.device) for t in (entries.variant, entries.node, entries.position))
        self.states = [ablation.states[parent] for parent in self.function.parents]
        classes = ablation.classes[site]
        self.classes = [above.to(self.device) for above in classes.parents]
        widths = torch.tensor([0, *(len(state.columns) + 1 for state in self.states)])
        self.offsets = widths.cumsum(0).tolist()
        # From everything, minus what is listed, or from the baseline, plus it.
        complement = ablation.complement[classes.first].to(self.device)
        self.from_whole = complement[self.variant] | (self.node == WHOLE)
        self.sign = 1.0 - 2.0 * complement[self.variant]
        self.keeps = ~self.from_whole if ablation.errors is Errors.KEPT else torch.zeros_like(self.from_whole)
        self.mask = self._mask(positions)

    def _mask(self, positions: int) -> Tensor:
        """Which of the parents' nodes are listed for each target, bool (n, pos or 1, U); a parent's error node is its last column."""
        entries = self.entries
        mask = torch.zeros(len(entries), positions, self.offsets[-1], dtype=torch.bool, device=self.device)
        target, column, at, _ = self._edges()
        shared = (at == SHARED) | (positions == 1)
        mask[target[shared], :, column[shared]] = True
        mask[target[~shared], at[~shared], column[~shared]] = True
        for end in self.offsets[1:]:
            mask[:, :, end - 1] |= self.keeps[:, None]
        return mask

    def _edges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The edges whose sources differ from the baseline somewhere: target, column among all parents', position, parent."""
        entries, found = self.entries, []
        for i, state in enumerate(self.states):
            own = (entries.parent == i).nonzero().flatten()
            column, known = places(state.columns.cpu(), entries.source[own])
            own, column = own[known], column[known] + self.offsets[i]
            found.append(torch.stack([entries.target[own], column, entries.source_position[own], torch.full_like(own, i)]))
        return torch.cat(found, dim=1).to(self.device).unbind()  # type: ignore[return-value]

    # -- which inputs -------------------------------------------------------------------------------------------------

    def computed(self) -> Iterator[Computed]:
        """Each distinct input once."""
        start, change = self._signatures()
        target, sequence, position = self._places(change)
        first, inverse = distinct((start + change)[target, sequence, position])
        # Inputs of one cell have the same active nodes: they go together.
        by_cell = (sequence[first] * self.clean.length + position[first]).argsort(stable=True)
        leaders = first[by_cell]
        rank = torch.empty_like(by_cell)
        rank[by_cell] = torch.arange(len(by_cell), device=rank.device)
        row = rank[inverse]
        order = row.argsort(stable=True)
        bounds = torch.bincount(row, minlength=len(leaders)).cumsum(0).tolist()
        n_rows = len(leaders) * (self.clean.length if self.mixes else 1)
        self.reader = self._reader(n_rows)
        rows = self._rows(n_rows)
        size = self._rows_at_once()
        for begin in range(0, len(leaders), size):
            end = min(begin + size, len(leaders))
            part = order[bounds[begin - 1] if begin else 0 : bounds[end - 1]]
            where = leaders[begin:end]
            hidden = self._hidden(target[where], sequence[where], position[where], rows)
            yield self._placed(hidden, sequence[where], position[where], row[part] - begin, target[part], sequence[part], position[part])

    def _places(self, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(target, sequence, position) of every place, each (n,); position 0 where positions are mixed."""
        size, length = self.clean.size, self.clean.length
        everywhere = self.position == SHARED
        if self.mixes:
            wanted = torch.ones(len(self.entries), size, 1, dtype=torch.bool, device=self.device)
        else:
            at = torch.arange(length, device=self.device)
            wanted = everywhere[:, None] | (self.position[:, None] == at)  # (n, pos)
            if self.ablation.batch.clean.last_only[self.site]:
                wanted = wanted & (at == length - 1)
            wanted = wanted[:, None].expand(-1, size, -1)
        if self._free():
            wanted = wanted & ((change != 0) | self.from_whole[:, None, None])
        target, sequence, position = wanted.nonzero(as_tuple=True)
        return target, sequence, position

    def _free(self) -> bool:
        """Whether a target whose sources are all at their baseline is at its own: where baselines are a run's."""
        base = self.ablation.batch.base
        return self.site != OUTPUT and not self.function.constants and all(base[s].origin is not None for s in (self.site, *self.function.parents))

    def _signatures(self) -> tuple[Tensor, Tensor]:
        """Of each target's input (n, batch, pos or 1) int64: the number of the point that it starts from, and that of its changes."""
        size, length = self.clean.size, self.clean.length
        hashes = Signatures(self.offsets[-1], length if self.mixes else 1, self.device)
        constants = [self.clean.values[c].expand(size, length, -1) for c in self.function.constants]
        base = [self.ablation.batch.base_values[parent] for parent in self.function.parents]
        start = hashes.vectors([*base, *constants]).expand(len(self.entries), -1, -1)  # (n, batch, pos)
        if bool(self.from_whole.any()):
            own = self.variant[self.from_whole].unique()
            values = [state.value[above[own]] for state, above in zip(self.states, self.classes, strict=True) if state.value is not None]
            whole = hashes.vectors([*values, *(c.expand(len(own), -1, -1, -1) for c in constants)])  # (own, batch, pos)
            place = torch.searchsorted(own, self.variant).clamp(max=len(own) - 1)
            start = torch.where(self.from_whole[:, None, None], whole[place], start)
        return (start.sum(dim=-1, keepdim=True) if self.mixes else start), self._changes(hashes)

    def _changes(self, hashes: Signatures) -> Tensor:
        """The numbers of what differs from the points, (n, batch, pos or 1) int64."""
        n_cells = self.clean.size * (1 if self.mixes else self.clean.length)
        change = torch.zeros(len(self.entries), n_cells, dtype=torch.int64, device=self.device)
        target, column, at, parent = self._edges()
        for i, (state, above, offset) in enumerate(zip(self.states, self.classes, self.offsets, strict=False)):
            codes = hashes.codes(state.delta, state.error, offset).movedim(3, 1)  # (classes, C + 1, batch, pos)
            together = (codes.sum(dim=-1) if self.mixes else codes).flatten(2)  # (classes, C + 1, cells)
            for edges in (parent == i).nonzero().flatten().split(max(1, self.ablation.memory // 16 // (8 * n_cells))):
                place, own = above[self.variant[target[edges]]], column[edges] - offset
                shared = (at[edges] == SHARED) | (self.mask.shape[1] == 1)
                change.index_add_(0, target[edges][shared], together[place[shared], own[shared]])
                if self.mask.shape[1] > 1:
                    change.index_add_(0, target[edges][~shared], codes[place[~shared], own[~shared], :, at[edges][~shared]])
            if bool(self.keeps.any()):
                change[self.keeps] += together[above[self.variant[self.keeps]], -1]
        return change.unflatten(1, (self.clean.size, -1))

    def _reader(self, n_rows: int) -> Reader:
        """What reads the targets' entries off hidden values."""
        columns = self.node[self.node >= 0].unique()
        if self.site == OUTPUT:
            return Reader(_nothing(self.ablation), None, columns[:0], None, pull=False)
        dictionary = self.clean.dictionaries[self.site]
        known = self.ablation.batch.likely(self.site)
        output = None if self.form is None else self.form.output
        n_columns = len(columns) + (0 if known is None else int(known.any(dim=0).sum()))
        return Reader(dictionary, output, columns, known, pull=n_rows > n_columns)

    def _rows(self, n_rows: int) -> Tensor | None:
        """What each changed node adds, (U, width), for a site of low-rank form; without its first layer where there are few rows."""
        if self.form is None:
            return None
        directions = torch.cat([
            self.form.directions(parent, self.clean.dictionaries[parent].directions(state.columns))
            for parent, state in zip(self.function.parents, self.states, strict=True)
        ])  # fmt: skip
        return self.form.rows(directions) if n_rows > 2 * len(directions) else directions

    def _rows_at_once(self) -> int:
        """How many inputs go through the local function together."""
        positions = self.clean.length if self.mixes else 1
        per_row = 4 * positions * (32 * self.clean.binding.d_model + 4 * self.offsets[-1])
        size = self.ablation.memory // 4 // per_row
        return max(1, min(size, max(1, _ROWS_ON_CPU // positions)) if self.device.type == "cpu" else size)

    # -- sums of the stream: no inputs at all ---------------------------------------------------------------------------

    @property
    def by_virtual_weights(self) -> bool:
        """Whether features' raw values are sums over edges, change · (W_dec[u] · W_enc[t]): a sum of the stream, an encoder with a local mask."""
        if self.site == OUTPUT or self.form is None or self.form.layer is not None:
            return False
        dictionary = self.clean.dictionaries[self.site]
        return getattr(dictionary, "mask_is_local", False) and sparse_affine(dictionary, self.node[:0]) is not None

    def virtual(self) -> Computed:
        """The nodes of targets that are features, as `hidden` (places, 1), by virtual weights; all of a class's positions at once."""
        assert self.form is not None
        affine = sparse_affine(self.clean.dictionaries[self.site], self.node)
        assert affine is not None
        directions = [
            self.form.directions(parent, self.clean.dictionaries[parent].directions(state.columns))
            for parent, state in zip(self.function.parents, self.states, strict=True)
        ]
        weight, offset = affine  # (n, d_model), (n,)
        size, length = self.clean.size, self.clean.length
        raw = offset[:, None].expand(-1, size * length).clone()
        change = torch.zeros_like(raw)  # how many sources differ from the baseline
        for variant in self.variant.unique().tolist():
            own = (self.variant == variant).nonzero().flatten()
            raw[own] += linear(weight[own], self._start(variant, own))
            for i, state in enumerate(self.states):
                mask = self.mask[own, 0, self.offsets[i] : self.offsets[i + 1]].to(weight.dtype)  # (own, C + 1)
                place = int(self.classes[i][variant])
                delta, error = state.delta[place].flatten(0, 1), state.error[place].flatten(0, 1)  # (cells, C), (cells, width)
                sign = self.sign[own, None]
                if len(state.columns):
                    raw[own] += sign * linear(mask[:, :-1] * linear(weight[own], directions[i]), delta)
                    change[own] += linear(mask[:, :-1], (delta != 0).to(weight.dtype))
                raw[own] += sign * mask[:, -1:] * linear(weight[own], self.form.directions(self.function.parents[i], error))
                change[own] += mask[:, -1:] * error.any(dim=-1)
        target, sequence, position = self._places(change.unflatten(1, (size, length)))
        values = self._reader(0).activated(raw.unflatten(1, (size, length))[target, sequence, position], self.node[target])
        row = torch.arange(len(target), device=self.device)
        return Computed(values[:, None], sequence * length + position, row, self.variant[target], sequence, position, self.node[target])

    def _start(self, variant: int, own: Tensor) -> Tensor:
        """The stream that a class's targets start from, (cells, d_model)."""
        assert self.form is not None
        whole = bool(self.from_whole[own[0]])  # one class is one or the other
        values = {}
        for parent, state, above in zip(self.function.parents, self.states, self.classes, strict=True):
            value = self.ablation.batch.base_values[parent]
            if whole and state.value is not None:
                value = state.value[above[variant]]
            values[parent] = value.flatten(0, 1)
        shape = (self.clean.size, self.clean.length, -1)
        return self.form.stream(values, {c: self.clean.values[c].expand(shape).flatten(0, 1) for c in self.function.constants})

    # -- what they are ------------------------------------------------------------------------------------------------

    def _hidden(self, target: Tensor, sequence: Tensor, position: Tensor, rows: Tensor | None) -> Tensor:
        """Hidden values at the inputs of these places, (R, pos or 1, width)."""
        at = (sequence,) if self.mixes else (sequence, position)
        points, constants, point = self._points(target, sequence, position)
        coefficients = [self._coefficients(i, target, at) for i in range(len(self.states))]  # (R, pos or 1, C) each
        if self.form is not None and rows is not None:
            return self.form.hidden(self.form.stream(points, constants), point, torch.cat(coefficients, dim=-1), rows)
        inputs = {
            parent: points[parent][point] + self._decoded(parent, state, own)
            for parent, state, own in zip(self.function.parents, self.states, coefficients, strict=True)
        }
        with fast_products(self.clean.values[self.clean.end]):
            return self.function(inputs, {c: values[point] for c, values in constants.items()}, self.clean.run)

    def _points(self, target: Tensor, sequence: Tensor, position: Tensor) -> tuple[Mapping[Site, Tensor], Mapping[Site, Tensor], Tensor]:
        """Distinct points that inputs start from, error nodes included: the parents' values and the constants (P, pos or 1, width).

        Also which of the P is each input's, (R,).
        """
        errors = self.mask[target][..., [end - 1 for end in self.offsets[1:]]]  # (R, pos or 1, parents)
        whole, variant = self.from_whole[target], self.variant[target]
        if errors.shape[1] > 1:
            first = point = torch.arange(len(target), device=self.device)
        else:
            bits = (errors[:, 0] * 2 ** torch.arange(errors.shape[-1], device=self.device)).sum(dim=-1)
            own = torch.where(whole | (bits > 0), 2 * variant + whole, 0)
            cell = sequence * self.clean.length + position
            first, point = distinct((own * 2 ** errors.shape[-1] + bits) * (self.clean.size * self.clean.length) + cell)
        at = (sequence[first],) if self.mixes else (sequence[first], position[first])
        whole, variant, sign = whole[first], variant[first], self.sign[target[first]]
        values = {}
        for i, (parent, state) in enumerate(zip(self.function.parents, self.states, strict=True)):
            above = self.classes[i][variant]
            start = self._gathered(self.ablation.batch.base_values[parent], at)
            if state.value is not None:
                start = torch.where(whole[:, None, None], self._picked(state.value, above, at), start)
            values[parent] = start + (errors[first][..., i] * sign[:, None])[..., None] * self._picked(state.error, above, at)
        return values, {c: self._gathered(self.clean.values[c], at) for c in self.function.constants}, point

    def _coefficients(self, i: int, target: Tensor, at: tuple[Tensor, ...]) -> Tensor:
        """How much of each of a parent's features is added, (R, pos or 1, C)."""
        state = self.states[i]
        mask = self.mask[target, :, self.offsets[i] : self.offsets[i + 1] - 1]
        return mask * self._picked(state.delta, self.classes[i][self.variant[target]], at) * self.sign[target, None, None]

    def _decoded(self, parent: Site, state: State, coefficients: Tensor) -> Tensor:
        """Coefficients (R, pos or 1, C) times decoder rows; columns that are zero in all rows are left out."""
        used = coefficients.flatten(0, 1).any(dim=0).nonzero().flatten()
        if not len(used):
            return coefficients.new_zeros(1)
        return linear(coefficients[..., used], self.clean.dictionaries[parent].directions(state.columns[used]).T)

    def _picked(self, tensor: Tensor, variant: Tensor, at: tuple[Tensor, ...]) -> Tensor:
        """Entries of a state's tensor (classes, batch, pos, n) for places: (R, pos or 1, n)."""
        found = tensor[(variant, *at)]
        return found if self.mixes else found[:, None]

    def _gathered(self, tensor: Tensor, at: tuple[Tensor, ...]) -> Tensor:
        """Entries of a tensor (batch, pos, n) for places: (R, pos or 1, n)."""
        found = tensor.expand(self.clean.size, self.clean.length, -1)[at]
        return found if self.mixes else found[:, None]

    def _placed(
        self, hidden: Tensor, rows_sequence: Tensor, rows_position: Tensor, row: Tensor, target: Tensor, sequence: Tensor, position: Tensor
    ) -> Computed:
        """The targets that these rows belong to, at each position where they are wanted."""
        variant, node, length = self.variant[target], self.node[target], self.clean.length
        if not self.mixes:
            return Computed(hidden[:, 0], rows_sequence * length + rows_position, row, variant, sequence, position, node)
        first = length - 1 if self.ablation.batch.clean.last_only[self.site] else 0
        hidden = hidden[:, first:]
        own, at = self.position[target], torch.arange(first, length, device=self.device)
        cell = rows_sequence[:, None] * length + at  # (R, n)
        wanted = (own == SHARED)[:, None] | (own[:, None] == at)  # (places, n)
        place, column = wanted.nonzero(as_tuple=True)
        return Computed(
            hidden.flatten(0, 1), cell.flatten(), row[place] * len(at) + column, variant[place], sequence[place], at[column], node[place]
        )


def _nothing(ablation: "EdgeAblation") -> Dictionary:
    """Some dictionary: y has none, and nothing is read by it."""
    return next(iter(ablation.batch.clean.dictionaries.values()))
