"""Attribution between units: sums over their members' edges at threshold 0 and over positions, without any single edge being made.

The vector–Jacobian product is linear in the cotangent, and an effect is linear in what changed upstream. So

1. the cotangents of a target unit's members at a cell, each already times its own first factor at that step, are added before the
   product: one row for each cell and unit with a member active there, instead of one for each feature;
2. the changes of a source unit's members at a cell, Σ Δf · W_dec (+ Δerror), are added before the contraction: one dot product for each
   pair of a row and a source unit;
3. a node is expanded as in `attribute` at threshold 0: where it changed, and some row's gradient meets its direction.

What it costs more than this is what is each node's own: the first factors, which at several steps take runs of the model's tail.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.binding import LocalFunction
from ..model.dictionaries import Dictionary
from ..model.sites import OUTPUT, Site
from ..model.units import NotUnits, Units
from .budget import CHUNKS, chunk
from .effective import Gradients, check_finite, gradients_into, places, reachable_cells
from .grouping import rank
from .preparation import Candidates, Prepared
from .rows import Cotangents, Rows, output_rows, rows_of
from .settings import Positions

_PRODUCT_ADVANTAGE = 16
"""How many members' derivatives are added in a matrix product in the time that one takes alone."""


class UnitColumns(NamedTuple):
    """Attribution into the units of one site. weight: (batch, n_sources, n_targets) float64 on the CPU; the units' numbers are beside it."""

    site: Site
    sources: Tensor  # (n_sources,) int64: the units of the site's parents
    targets: Tensor  # (n_targets,) int64: its own
    weight: Tensor


def attribute_units(prepared: Prepared, units: Units) -> Tensor:
    """Attribution between units, (batch, n + 1, n + 1) float64: sequence, source unit, target unit; y is the last.

    What `attribute` gives at threshold 0, summed over positions and over the members of both units: threshold, limit, screen and positions of the
    settings do not matter. It takes 8 bytes · batch · (n + 1)²: 32 MB a sequence for 2000 units; `unit_columns` gives the sites' own blocks, one
    after the other. Raises `NotUnits` for units of other sites or dictionaries.
    """
    found = torch.zeros(prepared.shape[0], len(units.names), len(units.names), dtype=torch.float64)
    for columns in unit_columns(prepared, units):
        found[:, columns.sources[:, None], columns.targets[None, :]] = columns.weight
    return found


def unit_columns(prepared: Prepared, units: Units) -> Iterator[UnitColumns]:
    """`attribute_units` site by site, from y backwards; sites into which nothing leads are left out.

    Besides the block that is handed over it takes, for each site, cells · d_in numbers, and within the settings' memory the rest.
    """
    _check(prepared, units)
    prepared = replace(prepared, settings=replace(prepared.settings, threshold=0.0, max_edges=None, screen=None, positions=Positions.SUM))
    changes = {site: _Changes(prepared, site, units.of[site] - units.at(site)[0]) for site in prepared.dictionaries}
    # met[site]: Σ over rows of |gradient| at every cell
    met = {site: torch.zeros_like(prepared.values[site]).flatten(0, 1) for site in prepared.dictionaries}
    for site in reversed(prepared.graph.sites):
        function = LocalFunction(prepared.binding, prepared.graph, site, prepared.bases)
        if not function.parents:
            continue
        reachable = reachable_cells(prepared, function)
        if site == OUTPUT:
            rows: Cotangents = output_rows(prepared, function)
            target = torch.zeros_like(rows.cell)
            numbers = range(units.output, units.output + 1)
        else:
            wanted = changes[site].met_by(met.pop(site))
            if not wanted[reachable].any():
                continue
            members = rows_of(prepared, function, wanted, reachable)
            numbers = units.at(site)
            together = UnitRows.of(members, units.of[site].to(members.cell.device) - numbers[0], prepared.settings.memory)
            rows, target = together, together.unit
        if reachable[rows.cell].any():
            yield _columns(prepared, function, rows, target, numbers, units, changes, met)


def _check(prepared: Prepared, units: Units) -> None:
    ours, theirs = prepared.graph.sites, units.graph.sites
    if ours != theirs:
        named = [", ".join(site.name for site in sites) for sites in (theirs, ours)]
        raise NotUnits(f"the units are of {named[0]}, the run is of {named[1]}: make units of the run's own graph")
    for site, dictionary in prepared.dictionaries.items():
        if len(units.of[site]) != dictionary.d_sae + 1:
            raise NotUnits(f"the units of {site.name} have {len(units.of[site])} nodes, its dictionary {dictionary.d_sae} features and the error")


def _columns(
    prepared: Prepared, function: LocalFunction, rows: Cotangents, target: Tensor, numbers: range, units: Units,
    changes: Mapping[Site, "_Changes"], met: Mapping[Site, Tensor],
) -> UnitColumns:  # fmt: skip
    """Attribution into one site's rows, whose units, counted from the site's first, are `target`; adds what was met upstream to `met`."""
    batch, pos = prepared.shape
    device = target.device
    # Not every device has float64.
    where = torch.device("cpu") if device.type == "mps" else device
    sources = [units.at(parent) for parent in function.parents]
    total = torch.zeros(batch, sum(map(len, sources)), len(numbers), dtype=torch.float64, device=where)
    first = {parent: sum(map(len, sources[:i])) for i, parent in enumerate(function.parents)}
    width = max(prepared.values[parent].shape[-1] for parent in function.parents)
    per_slot = lambda packing: len(packing.lanes) * packing.per_lane * 3 * width * rows.outs.itemsize
    for found in gradients_into(prepared, function, rows, per_slot):
        place, cells = places(prepared, found.packing), found.packing.cells(pos)
        seen = _seen(found, rows.cell, cells, pos)
        to = target[found.row_at.clamp_min(0)].repeat_interleave(found.packing.per_lane, dim=1)  # (slots, cells of the lanes)
        for parent, grad in found.of.items():
            check_finite(grad, parent)
            gradient = torch.where(seen[..., None], grad.flatten(1, 2), 0)  # (slots, cells of the lanes, width)
            met[parent].index_add_(0, cells, gradient.abs().sum(0))
            for here, unit, vector in changes[parent].at(place, len(gradient)):
                at = place[here]
                effect = torch.bmm(gradient[:, at].transpose(0, 1), vector.transpose(1, 2))  # (P, slots, C)
                row = (here // pos)[:, None] * total.shape[1] + first[parent] + unit  # (P, C)
                index = row[:, None, :] * len(numbers) + to[:, at].T[:, :, None]  # (P, slots, C)
                total.view(-1).index_add_(0, index.flatten().to(where), effect.flatten().to(where).double())
    joined = torch.cat([torch.arange(part.start, part.stop) for part in sources])
    return UnitColumns(function.site, joined, torch.arange(numbers.start, numbers.stop), total.cpu())


def _seen(found: Gradients, row_cell: Tensor, cells: Tensor, pos: int) -> Tensor:
    """Where a slot holds a row that may see the cell, bool (slots, cells of the lanes): attention never looks ahead, whatever rounding says."""
    row = found.row_at.repeat_interleave(found.packing.per_lane, dim=1)
    return (row >= 0) & (cells % pos <= row_cell[row.clamp_min(0)] % pos)


# --- targets: cotangents added ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitRows:
    """Rows of whole units: the sums of their members' cotangents, cell by cell. Sorted by cell, then by unit."""

    members: Rows
    order: Tensor  # (n_members,) the members of the first row, of the second, …
    start: Tensor  # (n,) where a row's members begin in `order`
    count: Tensor  # (n,) how many there are
    cell: Tensor  # (n,)
    unit: Tensor  # (n,) counted from the site's first
    active: Tensor  # (n, S) bool: some member is
    memory: int

    @staticmethod
    def of(members: Rows, unit_of: Tensor, memory: int) -> "UnitRows":
        """The rows of the units that `members` belong to; unit_of (d_sae + 1,)."""
        n_units = int(unit_of.max()) + 1
        code, inverse, count = (members.cell * n_units + unit_of[members.index]).unique(return_inverse=True, return_counts=True)
        active = torch.zeros(len(code), members.active.shape[1], dtype=torch.int32, device=code.device)
        active.index_add_(0, inverse, members.active.int())
        order = inverse.argsort(stable=True)
        return UnitRows(members, order, count.cumsum(0) - count, count, code // n_units, code % n_units, active > 0, memory)

    @property
    def outs(self) -> Tensor:
        return self.members.outs

    def __len__(self) -> int:
        return len(self.cell)

    def cotangents(self, dictionary: Dictionary | None, row: Tensor, step: Tensor) -> Tensor:
        """Cotangents of evaluations (n,): row and step of each → (n, width), the sum over the row's members that are active at the step."""
        assert dictionary is not None  # the output is no unit with members
        if not len(row):
            return self.outs.new_zeros(0, dictionary.d_in)
        n_members = int(self.count[row].sum())
        dense = n_members * _PRODUCT_ADVANTAGE > len(row) * dictionary.d_sae
        numbers = 3 * dictionary.d_sae if dense else 4 * dictionary.d_in * int(self.count[row].max())
        add = self._product if dense else self._sum
        return torch.cat([
            add(dictionary, *part) for part in zip(*(t.split(chunk(self.memory, numbers * self.outs.itemsize)) for t in (row, step)), strict=True)
        ])  # fmt: skip

    def _evaluations(self, row: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The members of the evaluations that are active: which evaluation, which member, each (m,)."""
        count = self.count[row]
        which = torch.arange(len(row), device=row.device).repeat_interleave(count)
        member = self.order[self.start[row][which] + rank(which)]
        active = self.members.active[member, step[which]]
        return which[active], member[active]

    def _sum(self, dictionary: Dictionary, row: Tensor, step: Tensor) -> Tensor:
        """One member's cotangent after the other."""
        which, member = self._evaluations(row, step)
        found = self.outs.new_zeros(len(row), dictionary.d_in)
        return found.index_add_(0, which, self.members.cotangents(dictionary, member, step[which]))

    def _product(self, dictionary: Dictionary, row: Tensor, step: Tensor) -> Tensor:
        """All members' cotangents at once: v + (∂enc/∂x)ᵀ (c − W_dec v), c and v 0 where there is no feature or error among them."""
        members = self.members
        which, member = self._evaluations(row, step)
        error = members.vector_of[member] >= 0
        vector = self.outs.new_zeros(len(row), dictionary.d_in)
        vector[which[error]] = members.vector[members.vector_of[member[error]], step[which[error]]]
        first = -dictionary.project(vector)  # (n, d_sae)
        feature = ~error
        first.index_put_((which[feature], members.index[member[feature]]), members.first[member[feature], step[which[feature]]], accumulate=True)
        return vector + dictionary.encode_vjp(self.outs[step, self.cell[row]], first)


# --- sources: changes added ------------------------------------------------------------------------------------------


class _Changes:
    """What moves at one site, unit by unit: at each cell the changes of a unit's members, Σ Δf · W_dec (+ Δerror)."""

    def __init__(self, prepared: Prepared, site: Site, unit_of: Tensor) -> None:
        self.dictionary: Dictionary = prepared.dictionaries[site]
        self.candidates: Candidates = prepared.candidates[site]
        self.memory = prepared.settings.memory
        self.device = prepared.values[site].device
        self.n_cells = prepared.shape[0] * prepared.shape[1]
        self.unit_of = unit_of.to(self.device)  # (d_sae + 1,), counted from the site's first
        self.present = self._present()  # (cells, units)
        numbers = int(self.present.sum()) * self.dictionary.d_in * self.candidates.error_delta.itemsize
        fits = numbers <= self.memory // CHUNKS // len(prepared.dictionaries)
        everywhere = torch.arange(self.n_cells, device=self.device)
        self._kept = list(self._made(everywhere, 0)) if fits else None

    def _present(self) -> Tensor:
        """Which units have a changed member at each cell, bool (cells, units)."""
        found = torch.zeros(self.n_cells, int(self.unit_of.max()) + 1, dtype=torch.bool, device=self.device)
        for cell, node, _ in self._features(torch.ones(self.n_cells, dtype=torch.bool, device=self.device)):
            found[cell, self.unit_of[node]] = True
        found[self.candidates.error_delta.any(-1), self.unit_of[-1]] = True
        return found

    def _features(self, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The changed features of the wanted cells, bool (cells,): cell, feature, change, each (n,), a portion that fits at a time."""
        for group in self.candidates.groups:
            columns = group.delta.shape[1]
            # A node takes its direction and that times its change.
            step = chunk(self.memory, columns * 2 * (self.dictionary.d_in + 8) * group.delta.itemsize)
            for part in wanted[group.cells].nonzero().flatten().split(step):
                delta = group.delta[part]
                at, column = delta.nonzero(as_tuple=True)
                node = column if group.index is None else group.index[part][at, column]
                yield group.cells[part][at], node, delta[at, column]

    def met_by(self, gradient: Tensor) -> Tensor:
        """Changed nodes whose direction meets some row's gradient, bool (cells, d_sae + 1); gradient: Σ |…| over rows, (cells, width).

        An effect is not zero only where a node's direction and a gradient share a dimension.
        """
        found = torch.zeros(self.n_cells, self.dictionary.d_sae + 1, dtype=torch.bool, device=self.device)
        step = chunk(self.memory, 3 * self.dictionary.d_sae * gradient.itemsize)
        wanted = gradient.any(-1)
        for cell, node, _ in self._features(wanted):
            found[cell, node] = True
        for cells in wanted.nonzero().flatten().split(step):
            found[cells, :-1] &= self.dictionary.meets(gradient[cells])
        found[:, -1] = (gradient * self.candidates.error_delta.abs()).any(-1)
        return found

    def at(self, place: Tensor, slots: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The changes at cells that have a place (cells,) ≥ 0: cells (P,), units (P, C), sums (P, C, width), 0 in the padding.

        A portion at a time, of which the products with `slots` gradients fit.
        """
        if self._kept is None:
            yield from self._made((place >= 0).nonzero().flatten(), slots)
            return
        for cells, unit, vector in self._kept:
            numbers = slots * (2 * vector.shape[2] + 5 * unit.shape[1]) + vector[0].numel()
            for part in (place[cells] >= 0).nonzero().flatten().split(chunk(self.memory, numbers * vector.itemsize)):
                if len(part):
                    whole = len(part) == len(cells)
                    yield (cells, unit, vector) if whole else (cells[part], unit[part], vector[part])

    def _made(self, cells: Tensor, slots: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Cells with similar numbers of units together, so that padding wastes little."""
        width, itemsize = self.dictionary.d_in, self.candidates.error_delta.itemsize
        counts = self.present[cells].sum(-1)
        upper = int(counts.max()) if len(counts) else 0
        while upper > 0:
            lower = upper // 2
            numbers = 2 * upper * width + slots * (2 * width + 5 * upper)
            for part in cells[(counts <= upper) & (counts > lower)].split(chunk(self.memory, numbers * itemsize)):
                if len(part):
                    yield self._summed(part)
            upper = lower

    def _summed(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The changes at some cells: cells (P,), units (P, C), sums (P, C, width)."""
        present = self.present[cells]  # (P, units)
        column = present.cumsum(-1) - 1
        n, width = int(column.max()) + 1, self.dictionary.d_in
        unit = torch.zeros(len(cells), n, dtype=torch.int64, device=self.device)
        at, own = present.nonzero(as_tuple=True)
        unit[at, column[at, own]] = own
        place = torch.full((self.n_cells,), -1, device=self.device)
        place[cells] = torch.arange(len(cells), device=self.device)
        vector = self.candidates.error_delta.new_zeros(len(cells) * n, width)
        for cell, node, delta in self._features(place >= 0):
            at = place[cell]
            vector.index_add_(0, at * n + column[at, self.unit_of[node]], self.dictionary.directions(node) * delta[:, None])
        error = self.candidates.error_delta[cells]
        at = (present[:, self.unit_of[-1]] & error.any(-1)).nonzero().flatten()
        vector.index_add_(0, at * n + column[at, self.unit_of[-1]], error[at])
        return cells, unit, vector.view(len(cells), n, width)
