"""Ablated models in which units are cut and kept together: edge ablation where all members of a unit share one private input.

What is computed is what `ablate_edges` makes of the expanded set (see `ablation`), in topological order:

1. A *slot* is what is always cut together at a site: the features of a unit, or the error node. Targets of one set with the same edges
   have the same private input, and so have those of sets that agree in all that the site reads.
2. An input falls into rows, one for each sequence, or for each position where the local function does not mix them. Its signature says
   whether a row equals another one, the clean run's, or the baseline (where baselines are those of a run): then nothing is computed.
3. Each distinct row goes once through the whole local function and the encoder, from the first position on at which it differs from the
   clean run. A slot keeps its own nodes of the result, as the number of that row: nodes are never copied.

The cost is one run of a local function for each distinct row; a set that differs late from the clean run costs only what lies behind.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .ablation import DEFAULT_MEMORY, AblationBatch, WrongGraph
from .dictionaries import Dictionary, TopKDictionary
from .masks import Errors
from .private_inputs import distinct
from .products import fast_products, linear
from .signatures import Signatures, row_hashes
from .sites import OUTPUT, Site
from .units import NotUnits, UnitEdges, Units

_POSITIONS_ON_CPU = 512
"""Positions of inputs that go together where a processor's cache matters more than few large products."""

_BASE, _CLEAN = -1, -2
"""Stand where the number of a computed row does: the row is the baseline's, the clean run's."""


@torch.no_grad()
def ablate_units(
    batch: AblationBatch, sets: Sequence[UnitEdges], *, errors: Errors = Errors.LISTED, memory: int = DEFAULT_MEMORY
) -> Tensor:
    """What the target reads when only the edges between units of a set are alive, (n_sets, batch, width).

    Equal to `ablate_edges` of the expanded sets up to rounding. Where error nodes are kept or dead, a unit's features are live if the unit reads
    one that has features. Sets that go together share what is equal in them, if they are of the same `Units`. Raises `WrongGraph`, `NotUnits`.
    """
    ends = batch.clean_end.expand(len(sets), -1, -1).clone()
    by_units: dict[int, list[int]] = {}
    for i, one in enumerate(sets):
        by_units.setdefault(id(one.units), []).append(i)
    for numbers in by_units.values():
        units = sets[numbers[0]].units
        _check(batch, units)
        for part in _portions(batch, sets, numbers, errors, memory // 2):
            ends[part] = _UnitAblation(batch, units, [sets[i] for i in part], errors, memory // 2).run()
    return ends


def _check(batch: AblationBatch, units: Units) -> None:
    if units.graph.sites != batch.graph.sites:
        own, other = (", ".join(site.name for site in graph.sites) for graph in (units.graph, batch.graph))
        raise WrongGraph(f"units over {own} cannot be ablated in a graph over {other}")
    for site, dictionary in batch.clean.dictionaries.items():
        if len(units.of[site]) != dictionary.d_sae + 1:
            raise NotUnits(f"{len(units.of[site]) - 1} features of {site.name} are in units: its dictionary has {dictionary.d_sae}")


def _portions(batch: AblationBatch, sets: Sequence[UnitEdges], numbers: Sequence[int], errors: Errors, memory: int) -> Iterator[list[int]]:
    """Consecutive sets whose ablated nodes fit into the memory together."""
    cells, dictionaries = batch.clean.size * batch.clean.length, batch.clean.dictionaries
    per_input = 4 * cells * max(_columns_at_most(d, cells) + d.d_in for d in dictionaries.values())
    size = len(sets[numbers[0]].units) + len(dictionaries)
    part: list[int] = []
    used = 0
    for i in numbers:
        inputs = len(sets[i].rows[:, 1].unique()) + len(dictionaries) * (sets[i].complement + (errors is Errors.KEPT))
        need = inputs * per_input + 16 * cells * size + 2 * size**2
        if part and used + need > memory:
            yield part
            part, used = [], 0
        part.append(i)
        used += need
    yield part


def _columns_at_most(dictionary: Dictionary, cells: int) -> int:
    """About how many features differ from the baseline somewhere in a batch."""
    return min(dictionary.d_sae, 2 * dictionary.k * cells) if isinstance(dictionary, TopKDictionary) else dictionary.d_sae


@dataclass(frozen=True, eq=False)
class _Slots:
    """What is cut together at a site: S slots, the error node's the last; y is one slot.

    units (S,): the unit of each. of (d_sae,): the slot of each feature.
    """

    units: Tensor
    of: Tensor

    @staticmethod
    def at(units: Units, site: Site) -> "_Slots":
        if site == OUTPUT:
            return _Slots(torch.tensor([units.output]), torch.zeros(0, dtype=torch.int64))
        own, of = units.of[site][:-1].unique(return_inverse=True)
        return _Slots(torch.cat([own, units.of[site][-1:]]), of)

    def __len__(self) -> int:
        return len(self.units)


@dataclass(eq=False)
class _State:
    """A site's ablated nodes in every class of sets, as rows of tables of differences from the baseline; row 0 of a table is the baseline.

    of (sets,), on the CPU: the class of each. columns (C,): the features that differ somewhere. slot (C,): the slot of each.
    delta (K, C), error (E, width): tables of features and of error nodes. index (classes, S, batch, pos): which row of `delta`, for the last slot
    of `error`, a slot has. codes, like index: a number of what that row has in the slot, 0 for no difference. clean (S, batch, pos): those of the
    clean run.
    """

    of: Tensor
    columns: Tensor
    slot: Tensor
    delta: Tensor
    error: Tensor
    index: Tensor
    codes: Tensor
    clean: Tensor


@dataclass(frozen=True, eq=False)
class _Inputs:
    """The different (set, target) inputs of a site, n of them. of (sets, V), on the CPU: which is each target's, −1 for a dead one.

    mask (n, U): which of the parents' slots are read. classes (n, parents): the parents' classes.
    """

    of: Tensor
    mask: Tensor
    classes: Tensor


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of inputs. of (n, batch, pos or 1): the number of the computed row, `_BASE`, or `_CLEAN`.

    Of m computed rows, in ascending order of the position: input, sequence, position (m,) each. Where positions are mixed a row begins at its
    position: before it, it is clean.
    """

    of: Tensor
    input: Tensor
    sequence: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.input)


@dataclass
class _UnitAblation:
    """One pass over the sites for some sets of the same units."""

    batch: AblationBatch
    units: Units
    sets: Sequence[UnitEdges]
    errors: Errors
    memory: int
    states: dict[Site, _State] = field(default_factory=dict)
    n_codes: int = 0  # columns of all sites so far: each has factors of its own

    @cached_property
    def slots(self) -> dict[Site, _Slots]:
        return {site: _Slots.at(self.units, site) for site in self.batch.graph.sites}

    @cached_property
    def listed(self) -> Tensor:
        """All sets' edges, (n, 3): set, source unit, target unit."""
        numbers = torch.repeat_interleave(torch.tensor([len(one) for one in self.sets]))
        return torch.cat([numbers[:, None], torch.cat([one.rows for one in self.sets])], dim=1)

    def run(self) -> Tensor:
        """What the target reads, (sets, batch, width)."""
        graph = self.batch.graph
        for number, site in enumerate(graph.sites):
            if site == OUTPUT:
                return self._output()
            self.states[site] = self._inner(site) if graph.parents(site) else self._root(site)
            later = {parent for reader in graph.sites[number + 1 :] for parent in graph.parents(reader)}
            self.states = {s: state for s, state in self.states.items() if s in later}
        raise AssertionError("a graph ends with y")

    # -- sites --------------------------------------------------------------------------------------------------------

    def _root(self, site: Site) -> _State:
        """A site without parents: its nodes are clean, in all sets."""
        index = self._clean_rows().expand(1, len(self.slots[site]), -1, -1).clone()
        if self.errors is Errors.DEAD:
            index[:, -1] = 0
        delta, error = self._clean_tables(site)
        return self._state(site, torch.zeros(len(self.sets), dtype=torch.int64), delta.nonzero(), delta[delta != 0], len(delta), error, index)

    def _inner(self, site: Site) -> _State:
        """A site with parents: every live slot from its own input."""
        inputs = self._inputs(site)
        rows = self._rows(site, inputs)
        needs_error = torch.zeros(len(rows), dtype=torch.bool, device=rows.of.device)
        of_error = inputs.of[:, -1].unique()
        wanted = rows.of[of_error[of_error >= 0].to(rows.of.device)]
        needs_error[wanted[wanted >= 0]] = True
        delta, error = self._clean_tables(site)
        places, values, errors, n = [delta.nonzero()], [delta[delta != 0]], [error], len(delta)
        for nodes, rest in self._encoded(site, inputs, rows, needs_error):
            place = nodes.nonzero()
            values.append(nodes[place.unbind(1)])
            place[:, 0] += n
            n += len(nodes)
            places.append(place)
            errors.append(rest)
        features = self._numbered(site, rows, len(delta), torch.ones_like(needs_error))
        error_nodes = self._numbered(site, rows, len(error), needs_error)
        classes, of = inputs.of.unique(dim=0, return_inverse=True)  # (classes, S)
        classes = classes.to(features.device)
        index = torch.cat([features[classes[:, :-1]], error_nodes[classes[:, -1:]]], dim=1)  # dead slots are −1, the last one: the baseline
        return self._state(site, of, torch.cat(places), torch.cat(values), n, torch.cat(errors), index)

    def _output(self) -> Tensor:
        """y: always alive, from its own input in each set."""
        clean = self.batch.clean
        inputs = self._inputs(OUTPUT)
        rows = self._rows(OUTPUT, inputs)
        found = [clean.values[clean.end][:, -1][:0]]
        found += [self._values(OUTPUT, inputs, rows, part)[:, -1] for part in self._parts(OUTPUT, rows)]
        values = torch.cat([*found, self.batch.clean_end])  # the clean rows last
        sequences = torch.arange(clean.size, device=values.device) + len(rows)
        number = rows.of[:, :, -1]
        ends = values[torch.where(number >= 0, number, sequences)]  # (n, batch, width)
        return ends[inputs.of[:, 0].to(ends.device)]

    def _clean_rows(self) -> Tensor:
        """The rows of a site's tables that are clean, (batch, pos)."""
        clean = self.batch.clean
        return 1 + torch.arange(clean.size * clean.length, device=clean.binding.device).view(clean.size, clean.length)

    def _clean_tables(self, site: Site) -> tuple[Tensor, Tensor]:
        """The first rows of a site's tables, the baseline and the clean nodes: features (1 + batch · pos, d_sae), errors (1 + batch · pos, width)."""
        nodes, base = self.batch.clean.nodes[site], self.batch.base[site]
        delta, error = (nodes.features - base.features).flatten(0, 1), (nodes.error - base.error).flatten(0, 1)
        return torch.cat([torch.zeros_like(delta[:1]), delta]), torch.cat([torch.zeros_like(error[:1]), error])

    def _numbered(self, site: Site, rows: _Rows, start: int, kept: Tensor) -> Tensor:
        """The rows in a site's table of all inputs, (n + 1, batch, pos), the last one at the baseline.

        start: where the computed rows begin in the table. kept (m,): which of them it has.
        """
        length, clean = self.batch.clean.length, self._clean_rows()
        several = self.batch.clean.functions[site].mixes_positions and not self.batch.clean.last_only[site]  # positions of a row
        sizes = kept * (length - rows.position if several else 1)
        first = start + torch.cat([sizes.cumsum(0) - sizes, sizes.new_zeros(1)])[rows.of.clamp(min=0)]  # (n, batch, pos or 1)
        if several:
            at = torch.arange(length, device=first.device)
            begin = torch.cat([rows.position, sizes.new_zeros(1)])[rows.of.clamp(min=0)]
            own = torch.where((rows.of >= 0) & (at >= begin), first + at - begin, torch.where(rows.of == _BASE, 0, clean))
        else:
            own = torch.where(rows.of >= 0, first, torch.where(rows.of == _BASE, 0, clean[:, -rows.of.shape[-1] :]))
        found = own.new_zeros(len(own) + 1, clean.shape[0], length)
        found[:-1, :, -own.shape[-1] :] = own  # of the other positions nothing is read
        return found

    def _state(self, site: Site, of: Tensor, places: Tensor, values: Tensor, n: int, error: Tensor, index: Tensor) -> _State:
        """The state of classes with these tables; those whose nodes are equal become one. places (N, 2): row and feature of `values` (N,)."""
        slots = self.slots[site]
        columns, at = places[:, 1].unique(return_inverse=True)
        delta = values.new_zeros(n, len(columns))
        delta[places[:, 0], at] = values
        slot = slots.of.to(columns.device)[columns]
        hashes = Signatures(self.n_codes + len(columns) + 1, 1, columns.device)
        own = torch.zeros(n, len(slots) - 1, dtype=torch.int64, device=columns.device)
        for part in torch.arange(n, device=columns.device).split(max(1, self.memory // 8 // (32 * (len(columns) + 1)))):
            codes = hashes.codes(delta[part], delta.new_zeros(len(part), 1), self.n_codes)[:, :-1]  # (part, C)
            own[part] = own[part].index_add_(1, slot, codes)
        of_error = hashes.codes(error[:, :0], error, self.n_codes + len(columns))[:, 0]  # (E,)
        self.n_codes += len(columns) + 1

        def codes_at(index: Tensor) -> Tensor:
            features = own[index[:, :-1], torch.arange(len(slots) - 1, device=index.device)[:, None, None]]
            return torch.cat([features, of_error[index[:, -1:]]], dim=1)

        codes, clean = codes_at(index), codes_at(self._clean_rows().expand(1, len(slots), -1, -1))[0]
        first, same = distinct(row_hashes(codes.flatten(1)))
        return _State(same.cpu()[of], columns, slot, delta, error, index[first], codes[first], clean)

    # -- inputs -------------------------------------------------------------------------------------------------------

    def _inputs(self, site: Site) -> _Inputs:
        """The site's inputs: each combination of edges and of the parents' classes once."""
        alive, live = self._alive(site)
        above = torch.stack([self.states[parent].of for parent in self.batch.graph.parents(site)], dim=1)  # (sets, parents)
        _, combination = above.unique(dim=0, return_inverse=True)
        n_sets, n_sources, n_targets = alive.shape
        keys = torch.empty(n_sets, n_targets, dtype=torch.int64)
        for part in torch.arange(n_sets).split(max(1, self.memory // 8 // (32 * (n_sources + 1) * n_targets))):
            own = torch.cat([combination[part, None, None].expand(-1, n_targets, 1), alive[part].transpose(1, 2).long()], dim=2)
            keys[part] = row_hashes(own.flatten(0, 1)).view(len(part), n_targets)
        number, target = live.nonzero(as_tuple=True)
        first, inverse = distinct(keys[live])
        of = torch.full((n_sets, n_targets), -1)
        of[live] = inverse
        device = self.batch.clean.binding.device
        return _Inputs(of, alive[number[first], :, target[first]].to(device), above[number[first]].to(device))

    def _alive(self, site: Site) -> tuple[Tensor, Tensor]:
        """Which of the parents' slots each slot reads in each set, (sets, U, V), and which slots are live, (sets, V)."""
        parents = self.batch.graph.parents(site)
        sources, targets = torch.cat([self.slots[parent].units for parent in parents]), self.slots[site].units
        place = torch.full((len(self.units.names),), -1)
        froms, tos = sources.unique(), targets.unique()
        place[froms], place[tos] = torch.arange(len(froms)), torch.arange(len(tos))
        listed = torch.zeros(len(self.sets), len(froms), len(tos), dtype=torch.bool)
        own = self.listed[self.units.site_of[self.listed[:, 2]] == self.batch.graph.sites.index(site)]
        listed[own[:, 0], place[own[:, 1]], place[own[:, 2]]] = True
        listed ^= torch.tensor([one.complement for one in self.sets])[:, None, None]
        alive = listed[:, place[sources]][:, :, place[targets]]
        if self.errors is not Errors.LISTED:
            errors = torch.tensor([len(self.slots[parent]) for parent in parents]).cumsum(0) - 1
            alive[:, errors] = False
            if site != OUTPUT:
                alive[:, :, -1] = False
            if self.errors is Errors.KEPT:
                reads = alive.any(dim=1) | (site == OUTPUT)
                alive[:, errors] = reads[:, None]
                if site != OUTPUT:
                    alive[:, :, -1] = True
        return alive, alive.any(dim=1) | (site == OUTPUT)

    def _rows(self, site: Site, inputs: _Inputs) -> _Rows:
        """The rows of a site's inputs; equal ones have one number."""
        mixes, length = self.batch.clean.functions[site].mixes_positions, self.batch.clean.length
        change, clean = self._signatures(site, inputs)  # (n, batch, pos), (batch, pos), or of the last position alone
        position = (change != clean).long().argmax(dim=-1, keepdim=True) if mixes else torch.arange(length)[-change.shape[-1] :].to(change.device)
        position = position.expand(-1, len(clean), -1) if mixes else position.expand_as(change)
        together = row_hashes(change.flatten(0, 1)).view(*change.shape[:2], 1) if mixes else change
        differs, todo = ((change != other).any(dim=-1, keepdim=True) if mixes else change != other for other in (0, clean))
        of = torch.where(todo, _BASE, _CLEAN)
        if self._free(site):
            todo = todo & differs
        number, sequence, place = todo.nonzero(as_tuple=True)
        position = position[todo]
        first, inverse = distinct(row_hashes(torch.stack([together[todo], sequence, place], dim=1)))
        order = (position[first] * len(clean) + sequence[first]).argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=rank.device)
        of[todo] = rank[inverse]
        first = first[order]
        late = not mixes or self.batch.clean.begins_late
        return _Rows(of, number[first], sequence[first], position[first] if late else torch.zeros_like(first))

    def _free(self, site: Site) -> bool:
        """Whether a row whose sources are all at their baseline is at its own: where baselines are a run's."""
        function, base = self.batch.clean.functions[site], self.batch.base
        return site != OUTPUT and not function.constants and all(base[s].origin is not None for s in (site, *function.parents))

    def _signatures(self, site: Site, inputs: _Inputs) -> tuple[Tensor, Tensor]:
        """Numbers of how inputs differ from the baseline, (n, batch, pos) int64; those of the clean run, (batch, pos). Or of the last position."""
        only_last = self.batch.clean.last_only[site] and not self.batch.clean.functions[site].mixes_positions
        total, offset, whole = None, 0, torch.zeros((), dtype=torch.int64)
        for i, parent in enumerate(self.batch.graph.parents(site)):
            state = self.states[parent]
            codes, clean = (c[..., -1:] if only_last else c for c in (state.codes, state.clean))
            if total is None:
                total = torch.zeros(len(inputs.mask), *codes.shape[2:], dtype=torch.int64, device=codes.device)
            number, slot = inputs.mask[:, offset : offset + codes.shape[1]].nonzero(as_tuple=True)
            for part in torch.arange(len(number), device=codes.device).split(max(1, self.memory // 8 // (8 * codes[0, 0].numel()))):
                total.index_add_(0, number[part], codes[inputs.classes[number[part], i], slot[part]])
            whole = whole.to(codes.device) + clean.sum(dim=0)
            offset += codes.shape[1]
        assert total is not None
        return total, whole

    # -- what they are ------------------------------------------------------------------------------------------------

    def _parts(self, site: Site, rows: _Rows) -> Iterator[Tensor]:
        """Rows that go through the local function together: where it mixes positions those that begin at the same one."""
        clean = self.batch.clean
        mixes = clean.functions[site].mixes_positions
        begins = rows.position if mixes else torch.zeros_like(rows.position)
        widest = max(dictionary.d_sae for dictionary in clean.dictionaries.values())
        for begin in begins.unique().tolist():
            positions = clean.length - begin if mixes else 1
            size = max(1, self.memory // 4 // (4 * positions * (32 * clean.binding.d_model + 6 * widest)))
            if clean.binding.device.type == "cpu":
                size = min(size, max(1, _POSITIONS_ON_CPU // positions))
            yield from (begins == begin).nonzero().flatten().split(size)

    def _encoded(self, site: Site, inputs: _Inputs, rows: _Rows, needs_error: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the computed rows in turn: differences of the features from the baseline, (n, d_sae) for n cells; those of the error nodes that are
        needed, (m, width)."""
        clean, dictionary, base = self.batch.clean, self.batch.clean.dictionaries[site], self.batch.base[site]
        mixes = clean.functions[site].mixes_positions
        for part in self._parts(site, rows):
            value = self._values(site, inputs, rows, part)  # (R, pos or 1, width)
            at = (rows.sequence[part],) if mixes else (rows.sequence[part], rows.position[part])
            before = [
                _picked(tensor.expand(clean.size, clean.length, -1), at, mixes)[:, -value.shape[1] :] for tensor in (base.features, base.error)
            ]
            features = dictionary.encode(value)
            own = needs_error[part]
            error = value[own] - dictionary.decode(features[own]) - before[1][own]
            yield (features - before[0]).flatten(0, 1), error.flatten(0, 1)

    def _values(self, site: Site, inputs: _Inputs, rows: _Rows, part: Tensor) -> Tensor:
        """The site's value at the inputs of some rows, (R, pos or 1, width); only the last position where nothing else is read."""
        clean = self.batch.clean
        function = clean.functions[site]
        mixes = function.mixes_positions
        number, sequence = rows.input[part], rows.sequence[part]
        begin = int(rows.position[part[0]]) if mixes else 0
        at = (sequence,) if mixes else (sequence, rows.position[part])
        values, offset = {}, 0
        for i, parent in enumerate(function.parents):
            state = self.states[parent]
            slots = torch.arange(state.index.shape[1], device=part.device)
            row = state.index[(inputs.classes[number, i, None], slots, *(where[:, None] for where in at))]  # (R, S, pos), (R, S) of one position
            row = (row[..., begin:] if mixes else row[..., None]) * inputs.mask[number, offset : offset + len(slots), None]
            start = _picked(self.batch.base_values[parent], at, mixes)[:, begin:]
            values[parent] = start + self._decoded(parent, state, row) + state.error[row[:, -1]]
            offset += len(slots)
        constants = {c: _picked(clean.values[c].expand(clean.size, clean.length, -1), at, mixes)[:, begin:] for c in function.constants}
        run = clean.behind(function, sequence, begin)
        with fast_products(clean.values[clean.end]):
            value = function(values, constants, run)
        return value[:, -1:] if self.batch.clean.last_only[site] else value

    def _decoded(self, parent: Site, state: _State, row: Tensor) -> Tensor:
        """What a parent's features add to its value, (R, pos or 1, width), for the rows of its slots, (R, S, pos or 1)."""
        if not len(state.columns):
            return state.error.new_zeros(1)
        columns = torch.arange(len(state.columns), device=row.device)
        change = state.delta[row.transpose(1, 2)[..., state.slot], columns]  # (R, pos or 1, C)
        used = change.flatten(0, 1).any(dim=0).nonzero().flatten()
        return linear(change[..., used], self.batch.clean.dictionaries[parent].directions(state.columns[used]).T)


def _picked(tensor: Tensor, at: tuple[Tensor, ...], mixes: bool) -> Tensor:
    """Entries of a tensor (batch, pos, n) at sequences, or at single cells: (R, pos or 1, n)."""
    return tensor[at] if mixes else tensor[at][:, None]
