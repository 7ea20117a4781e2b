"""A circuit with a gate on each edge: between 0, cut, and 1, alive, and differentiable.

With all gates at 0 or 1 this is edge ablation with the edges at 1 (see `ablation`). In between a target reads of a source its baseline
plus gate · (ablated − baseline), and is itself as alive as the most open of its edges: baseline + max gate · (its own entry − baseline).

1. `Wires`: the circuit's edges into each site, with the nodes of its parents that some edge lists as columns.
2. `GatedCircuit.run`, in topological order: each target's private input, the base plus gate · change · decoder row over its edges; the whole
   local function; the target's own entry of the result. Inputs without any change are of the baseline alone: one a sequence, kept.

A column is a feature, whose entry is its change from the baseline, or a site's error node, whose entry is 1 and multiplies a vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .ablation import DEFAULT_MEMORY, AblationBatch, Errors
from .binding import LocalFunction
from .masks import ERROR, SHARED, SOURCE, SOURCE_POSITION, SOURCE_SITE, TARGET, TARGET_POSITION, TARGET_SITE, EdgeSet
from .products import fast_products
from .sites import OUTPUT, Site


@dataclass(frozen=True, eq=False)
class Wires:
    """A circuit's E edges into the T live targets of one site.

    edge (E,): places in the circuit's rows. target (E,): which of the T. column (E,): which of the parents' U columns; those of parent i start
    at offsets[i], its error node is the last. source_position (E,). node, position (T,): the targets; place (T,): their columns in their own site.
    """

    site: Site
    function: LocalFunction
    edge: Tensor
    target: Tensor
    column: Tensor
    source_position: Tensor
    offsets: tuple[int, ...]
    node: Tensor
    position: Tensor
    place: Tensor

    @property
    def n_columns(self) -> int:
        """U."""
        return self.offsets[-1]


@dataclass(frozen=True, eq=False)
class Moved:
    """How far a site's nodes are from their baseline: listed features (batch, pos, C), the error node (batch, pos, width)."""

    features: Tensor
    error: Tensor


def portions(rows: Tensor, size: int) -> Sequence[Tensor]:
    """Rows (n, …) at most `size` at a time; of no rows none."""
    return rows.split(size) if len(rows) else ()


class GatedCircuit:
    """The edges of a circuit in a batch, as `run` needs them; `circuit` must not be a complement, and error nodes are not `Errors.KEPT`."""

    def __init__(self, batch: AblationBatch, circuit: EdgeSet, errors: Errors = Errors.LISTED, memory: int = DEFAULT_MEMORY) -> None:
        assert not circuit.complement, "edges are listed one by one"
        assert errors is not Errors.KEPT, "edges are listed one by one"
        self.batch, self.clean, self.circuit, self.errors, self.memory = batch, batch.clean, circuit, errors, memory
        self.graph, self.device = batch.graph, batch.clean.binding.device
        exists = self._exists()
        self.columns = {site: self._columns(number, exists).to(self.device) for number, site in enumerate(self.graph.sites)}
        self.wires = {site: self._wires(number, site, exists) for number, site in enumerate(self.graph.sites) if self.graph.parents(site)}

    # -- wires ---------------------------------------------------------------------------------------------------------------

    def _exists(self) -> Tensor:
        """Which edges exist where they are meant, and are not of error nodes that are dead, (n,)."""
        rows, length = self.circuit.rows, self.clean.length
        source, target, site = rows[:, SOURCE_POSITION], rows[:, TARGET_POSITION], rows[:, TARGET_SITE]
        mixes = torch.tensor([bool(self.graph.parents(s)) and self.clean.functions[s].mixes_positions for s in self.graph.sites])
        exists = (target < length) & (source < length) & (mixes[site] | (source == target))
        exists &= (site != len(self.graph.sites) - 1) | (target == SHARED) | (target == length - 1)
        if self.errors is Errors.DEAD:
            exists &= (rows[:, SOURCE] != ERROR) & (rows[:, TARGET] != ERROR)
        return exists

    def _columns(self, number: int, exists: Tensor) -> Tensor:
        """The features of a site that are at either end of an edge, ascending."""
        rows = self.circuit.rows[exists]
        ends = torch.cat([rows[rows[:, SOURCE_SITE] == number, SOURCE], rows[rows[:, TARGET_SITE] == number, TARGET]])
        return ends[ends != ERROR].unique()

    def _wires(self, number: int, site: Site, exists: Tensor) -> Wires:
        function = self.clean.functions[site]
        edge = ((self.circuit.rows[:, TARGET_SITE] == number) & exists).nonzero().flatten()
        rows = self.circuit.rows[edge]
        identity = rows[:, [TARGET, TARGET_POSITION]]
        if site == OUTPUT:  # one, always alive
            identity = torch.cat([torch.tensor([[0, SHARED]]).expand(len(rows), -1), torch.tensor([[0, SHARED]])])
        targets, target = identity.unique(dim=0, return_inverse=True)
        offsets, column = [0], torch.zeros_like(edge)
        for parent in function.parents:
            known = self.columns[parent].cpu()
            own = rows[:, SOURCE_SITE] == self.graph.sites.index(parent)
            place = torch.where(rows[own, SOURCE] == ERROR, len(known), torch.searchsorted(known, rows[own, SOURCE]))
            column[own] = offsets[-1] + place
            offsets.append(offsets[-1] + len(known) + 1)
        own_columns = self.columns[site].cpu()
        place = torch.searchsorted(own_columns, targets[:, 0].contiguous()).clamp(max=max(0, len(own_columns) - 1))
        parts = (edge, target[: len(rows)], column, rows[:, SOURCE_POSITION], targets[:, 0], targets[:, 1], place)
        edge, target, column, source_position, node, position, place = (part.to(self.device) for part in parts)
        return Wires(site, function, edge, target, column, source_position, tuple(offsets), node, position, place)

    # -- a run ---------------------------------------------------------------------------------------------------------------

    def run(self, gates: Tensor | None = None) -> tuple[Tensor, dict[Site, Moved]]:
        """What the target reads, (batch, width), and every site's ablated nodes, with `gates` (n_edges,) on the circuit's rows, 1 unless given.

        Gradients flow to `gates` as torch's grad mode says.
        """
        gates = self.batch.clean_end.new_ones(len(self.circuit)) if gates is None else gates
        states: dict[Site, Moved] = {}
        for site in self.graph.sites:
            if site == OUTPUT:
                return self._output(states, gates), states
            states[site] = self._inner(site, states, gates) if self.graph.parents(site) else self._root(site)
        raise AssertionError("a graph ends with y")

    def _root(self, site: Site) -> Moved:
        clean, base, columns = self.clean.nodes[site], self.batch.base[site], self.columns[site]
        error = clean.error - base.error
        return Moved(clean.features[..., columns] - base.features[..., columns], torch.zeros_like(error) if self.errors is Errors.DEAD else error)

    def mask(self, wires: Wires, gates: Tensor) -> Tensor:
        """The gate of each column in each target, (T, pos or 1, U): of its own for each position where edges are meant for single ones."""
        by_position = wires.function.mixes_positions and bool((wires.source_position != SHARED).any())
        mask = gates.new_zeros(len(wires.node), self.clean.length if by_position else 1, wires.n_columns)
        at = wires.source_position if by_position else torch.zeros_like(wires.source_position)
        return mask.index_put((wires.target, at, wires.column), gates[wires.edge])

    def entries(self, wires: Wires, states: Mapping[Site, Moved]) -> Tensor:
        """The parents' columns, (batch, pos, U)."""
        parts = []
        for parent in wires.function.parents:
            state = states[parent]
            parts += [state.features, torch.ones_like(state.error[..., :1])]
        return torch.cat(parts, dim=-1)

    def moving(self, wires: Wires, states: Mapping[Site, Moved]) -> Tensor:
        """Which columns are not at their baseline, bool (batch, pos, U)."""
        parts = []
        for parent in wires.function.parents:
            parts += [states[parent].features != 0, (states[parent].error != 0).any(dim=-1, keepdim=True)]
        return torch.cat(parts, dim=-1)

    def _inner(self, site: Site, states: Mapping[Site, Moved], gates: Tensor) -> Moved:
        wires, like = self.wires[site], self.clean.values[site]
        features, error = like.new_zeros(*like.shape[:2], len(self.columns[site])), like.new_zeros(like.shape)
        if not len(wires.edge):
            return Moved(features, error)
        mask = self.mask(wires, gates)
        alive = gates.new_zeros(len(wires.node)).scatter_reduce(0, wires.target, gates[wires.edge], "amax")
        at = torch.arange(self.clean.length, device=self.device)
        here = (wires.position == SHARED)[:, None] | (wires.position[:, None] == at)  # (T, pos)
        for of_error in (False, True):
            chosen = ((wires.node == ERROR) == of_error).nonzero().flatten()
            if not len(chosen):
                continue
            moved = self._targets(wires, chosen, mask, states)  # (t, batch, pos) and for errors the width
            moved = moved * (alive[chosen, None] * here[chosen]).reshape(len(chosen), 1, -1, *[1] * of_error)
            if of_error:
                error = moved.sum(dim=0)
            else:
                features = features.index_add(2, wires.place[chosen], moved.movedim(0, -1))
        return Moved(features, error)

    def _output(self, states: Mapping[Site, Moved], gates: Tensor) -> Tensor:
        wires = self.wires[OUTPUT]
        mask, values = self.mask(wires, gates), self.entries(wires, states)
        length, size = self.clean.length, self.clean.size
        sequence = torch.arange(size, device=self.device)
        at = (sequence,) if wires.function.mixes_positions else (sequence, torch.full_like(sequence, length - 1))
        target = torch.zeros_like(sequence)
        return self.values(wires, self.coefficients(wires, mask, values, target, at), states, at)[:, -1]

    def _targets(self, wires: Wires, chosen: Tensor, mask: Tensor, states: Mapping[Site, Moved]) -> Tensor:
        """Own entries minus baseline of some targets (t,), all features or all errors: (t, batch, pos), for errors (t, batch, pos, width)."""
        values, mixes, last = self.entries(wires, states), wires.function.mixes_positions, self.clean.last_only[wires.site]
        moving = self.moving(wires, states).to(mask.dtype)
        listed = (mask[chosen].detach() != 0).to(mask.dtype)
        counts = torch.einsum("tpu,bpu->tbp", listed.expand(-1, self.clean.length, -1), moving)  # (t, batch, pos)
        if mixes:
            wanted = counts.any(dim=-1)
        else:
            at = torch.arange(self.clean.length, device=self.device)
            position = wires.position[chosen]
            wanted = (counts != 0) & ((position == SHARED)[:, None] | (position[:, None] == at))[:, None]
            wanted[..., :-1] &= not last
        places = wanted.nonzero()  # (n, 2 or 3): target, sequence and perhaps position
        found = self._resting(wires, chosen)
        for some in portions(places, self.rows_at_once(wires)):
            at_rows = tuple(some[:, 1:].T)
            arguments = (wires, mask, values, chosen[some[:, 0]], states, at_rows)
            if torch.is_grad_enabled():
                moved = checkpoint(self._moved, *arguments, use_reentrant=False)
            else:
                moved = self._moved(*arguments)
            found = found.index_put((some[:, 0], *at_rows), moved if mixes else moved[:, 0])
        return found

    def _moved(self, wires: Wires, mask: Tensor, values: Tensor, target: Tensor, states: Mapping[Site, Moved], at: tuple[Tensor, ...]) -> Tensor:
        """Own entries minus baseline of targets (n,) in sequences or cells `at`: (n, pos or 1), for errors (n, pos or 1, width)."""
        with fast_products(self.batch.clean_end):  # here, for a backward pass that computes it again
            result = self.values(wires, self.coefficients(wires, mask, values, target, at), states, at)
        return self.own(wires, target, result, at)

    def coefficients(self, wires: Wires, mask: Tensor, values: Tensor, target: Tensor, at: tuple[Tensor, ...]) -> Tensor:
        """Gate times entry of every column, (n, pos or 1, U), for targets (n,) in sequences or cells `at`."""
        return mask[target] * self._gathered(values, at)

    def values(
        self, wires: Wires, coefficients: Tensor, states: Mapping[Site, Moved], at: tuple[Tensor, ...], extra: Mapping[Site, Tensor] | None = None
    ) -> Tensor:
        """The site's values at private inputs, (n, pos or 1, width); `extra`: what is added to a parent's, (n, pos or 1, width)."""
        inputs = {}
        for i, parent in enumerate(wires.function.parents):
            own = coefficients[..., wires.offsets[i] : wires.offsets[i + 1]]
            written = own[..., :-1] @ self.clean.dictionaries[parent].directions(self.columns[parent])
            value = self._gathered(self.batch.base_values[parent], at) + written + own[..., -1:] * self._gathered(states[parent].error, at)
            inputs[parent] = value if extra is None or parent not in extra else value + extra[parent]
        constants = {c: self._gathered(self.clean.values[c], at) for c in wires.function.constants}
        return wires.function(inputs, constants, self.clean.run)

    def own(self, wires: Wires, target: Tensor, values: Tensor, at: tuple[Tensor, ...]) -> Tensor:
        """Entries of targets (n,), all features or all errors, in the site's values (n, pos or 1, width), minus their baseline."""
        dictionary, base, node = self.clean.dictionaries[wires.site], self.batch.base[wires.site], wires.node[target]
        n, positions = values.shape[:2]
        if len(node) and bool(node[0] == ERROR):
            return values - dictionary.decode(dictionary.encode(values)) - self._gathered(base.error, at)
        rows = torch.arange(n * positions, device=values.device)
        entries = dictionary.encode_at(values.flatten(0, 1), rows, node.repeat_interleave(positions)).view(n, positions)
        before = base.features.expand(self.clean.size, self.clean.length, -1)
        if wires.function.mixes_positions:
            return entries - before[at[0][:, None], torch.arange(positions, device=values.device), node[:, None]]
        return entries - before[(*at, node)][:, None]

    def _gathered(self, tensor: Tensor, at: tuple[Tensor, ...]) -> Tensor:
        """Entries of a tensor (batch or 1, pos or 1, n) for sequences, (rows, pos, n), or for cells, (rows, 1, n)."""
        found = tensor.expand(self.clean.size, self.clean.length, -1)[at]
        return found if len(at) == 1 else found[:, None]

    def rows_at_once(self, wires: Wires) -> int:
        """How many inputs go through the local function together."""
        d_sae = 0 if wires.site == OUTPUT else self.clean.dictionaries[wires.site].d_sae
        n = self.clean.length if wires.function.mixes_positions else 1
        return max(1, self.memory // 4 // (4 * n * (24 * self.clean.binding.d_model + 2 * d_sae + 3 * wires.n_columns)))

    @torch.no_grad()
    def _resting(self, wires: Wires, chosen: Tensor) -> Tensor:
        """Own entries minus baseline where everything that is read is at its baseline; see `_targets` for the shapes."""
        features, error = self._rest[wires.site]
        length = self.clean.length
        if bool(wires.node[chosen[0]] == ERROR):
            return error.expand(len(chosen), -1, length, -1).clone()
        return features[..., wires.place[chosen]].movedim(-1, 0).expand(-1, -1, length).clone()

    @cached_property
    def _rest(self) -> dict[Site, tuple[Tensor, Tensor]]:
        """Per site its listed features (batch, pos, C) and error (batch, pos, width) at the parents' baselines, minus their own baselines."""
        found = {}
        with torch.no_grad():
            for site, wires in self.wires.items():
                if site == OUTPUT or not len(wires.edge):
                    continue
                values = {parent: self.batch.base_values[parent] for parent in wires.function.parents}
                value = wires.function(values, {c: self.clean.values[c] for c in wires.function.constants}, self.clean.run)
                dictionary, base = self.clean.dictionaries[site], self.batch.base[site]
                nodes = dictionary.encode(value)
                error = value - dictionary.decode(nodes) - base.error
                found[site] = ((nodes - base.features)[..., self.columns[site]], error)
        return found
