"""Many cuts of one circuit, each on its own: the circuit runs once, and of every cut only what it changes is computed.

A cut takes some of the circuit's edges away. In topological order, for a site and all cuts together:

1. A target is touched in a sequence where one of its edges is cut whose source is not at its baseline, or where one of its sources has
   changed. Its private input is the circuit's own, plus the sources' changes, minus what the cut edges brought.
2. The site's local function runs on the inputs of touched targets alone. A target that lost its last edge is at its baseline.
3. Entries that come out as in the circuit are dropped: behind them nothing runs. Where nothing arrives at y the effect is exactly 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ablation import DEFAULT_MEMORY, AblationBatch, CleanBatch, Errors
from .gated import GatedCircuit, Moved, Wires, portions
from .masks import ERROR, SHARED, EdgeSet
from .metrics import Metric, evaluate
from .products import fast_products
from .sites import OUTPUT, Site


@dataclass(frozen=True, eq=False)
class _Changes:
    """Nodes of one site that are not as in the circuit: k feature entries and e errors.

    place (k, 3): cut, sequence, column. change (k, pos). error_place (e, 2): cut, sequence. error (e, pos, width).
    """

    place: Tensor
    change: Tensor
    error_place: Tensor
    error: Tensor


@dataclass(frozen=True, eq=False)
class _Touched:
    """Targets of one site whose input is not as in the circuit, and by what.

    place (n, 3): cut, target, sequence. entry (k,): the place of each change; column (k,); change (k, pos): to the entry of that column.
    error_entry (e,): the same of changed errors, of the parent error_parent (e,); error (e, pos, width).
    """

    place: Tensor
    entry: Tensor
    column: Tensor
    change: Tensor
    error_entry: Tensor
    error_parent: Tensor
    error: Tensor


def joined(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of equal numbers: places in `right`, places in `left`, each (n_pairs,)."""
    order = right.argsort(stable=True)
    ascending = right[order]
    start, stop = torch.searchsorted(ascending, left), torch.searchsorted(ascending, left, right=True)
    counts = stop - start
    of_left = torch.arange(len(left), device=left.device).repeat_interleave(counts)
    within = torch.arange(len(of_left), device=left.device) - (counts.cumsum(0) - counts)[of_left]
    return order[start[of_left] + within], of_left


def measured(clean: CleanBatch, ends: Tensor, sequence: Tensor, metrics: Sequence[Metric]) -> dict[Metric, Tensor]:
    """Metrics (n,) of what the target reads, `ends` (n, width), each of one of the batch's sequences (n,)."""
    pairs = clean.pairs
    of_clean = None if clean.clean_logits is None else clean.clean_logits[sequence]
    if clean.target.site is not None:
        value = clean.target(clean.binding, ends, pairs.answer[sequence], pairs.wrong_answer[sequence], of_clean)
        return dict.fromkeys(metrics, value)
    logits = clean.binding.logits(ends)
    return {metric: evaluate(metric, logits, pairs.answer[sequence], pairs.wrong_answer[sequence], of_clean) for metric in metrics}


class CircuitCuts:
    """Cuts of a circuit in a batch; `circuit` must not be a complement, and error nodes are not `Errors.KEPT`."""

    @torch.no_grad()
    def __init__(self, batch: AblationBatch, circuit: EdgeSet, errors: Errors = Errors.LISTED, memory: int = DEFAULT_MEMORY) -> None:
        self.batch, self.clean, self.circuit, self.memory = batch, batch.clean, circuit, memory
        self.gated = GatedCircuit(batch, circuit, errors, memory)
        self.device = self.gated.device
        with fast_products(batch.clean_end):
            self.end, self.states = self.gated.run()

    @torch.no_grad()
    def effects(self, edge: Tensor, cut: Tensor, metrics: Sequence[Metric]) -> dict[Metric, Tensor]:
        """m(C) − m(C without the edges of a cut), per metric (n_cuts, batch).

        Edge edge[i] of the circuit's rows is taken away by cut number cut[i], both (n,); cuts count from 0.
        """
        n = int(cut.max()) + 1 if len(cut) else 0
        whole = self.batch.measures(self.end[None], metrics)
        found = {metric: value.new_zeros(n, self.clean.size) for metric, value in whole.items()}
        edge, cut = edge.to(self.device), cut.to(self.device)
        size = self._cuts_at_once()
        with fast_products(self.batch.clean_end):
            for start in range(0, n, size):
                here = (cut >= start) & (cut < start + size)
                place, ends = _Propagation(self, edge[here], cut[here] - start).run()
                self._measure(place + torch.tensor([start, 0], device=self.device), ends, whole, found)
        return found

    def _cuts_at_once(self) -> int:
        """How many cuts go together, as changes of everything would have room in half of the memory."""
        cells = self.clean.size * self.clean.length
        errors = sum(int((wires.node == ERROR).sum() > 0) * self.clean.binding.d_model for wires in self.gated.wires.values())
        features = sum(len(columns) for columns in self.gated.columns.values())
        return max(1, self.memory // 2 // (4 * cells * (2 * features + 2 * len(self.circuit) + 4 * errors + 1)))

    def _measure(self, place: Tensor, ends: Tensor, whole: dict[Metric, Tensor], found: dict[Metric, Tensor]) -> None:
        """Put m(C) − m of ends (n, width) at their places (n, 2): cut, sequence."""
        for some in portions(torch.arange(len(ends), device=self.device), 256):  # logits are wide
            cut, sequence = place[some].T
            for metric, value in measured(self.clean, ends[some], sequence, list(whole)).items():
                found[metric][cut, sequence] = whole[metric][0, sequence] - value


class _Propagation:
    """Some cuts together: edge edge[i] of the circuit is taken away by cut[i]."""

    def __init__(self, cuts: CircuitCuts, edge: Tensor, cut: Tensor) -> None:
        self.cuts, self.gated, self.clean, self.device = cuts, cuts.gated, cuts.clean, cuts.device
        self.edge, self.cut = edge, cut
        self.taken = (cut * len(cuts.circuit) + edge).unique()  # codes of (cut, edge)
        self.changes: dict[Site, _Changes] = {}
        self.ones = torch.ones(len(cuts.circuit), dtype=self.clean.values[self.clean.end].dtype, device=self.device)

    def run(self) -> tuple[Tensor, Tensor]:
        """What the target reads where it may not be what it reads in the circuit: places (n, 2), cut and sequence, and values (n, width)."""
        for site in self.gated.graph.sites:
            if site not in self.gated.wires:
                continue
            wires = self.gated.wires[site]
            dead = self._dead(wires)
            touched = self._touched(wires, dead)
            if site == OUTPUT:
                return touched.place[:, [0, 2]], self._computed(wires, touched, torch.arange(len(touched.place), device=self.device))[:, -1]
            self.changes[site] = self._changed(wires, touched, dead)
        raise AssertionError("a graph ends with y")

    # -- what a cut touches --------------------------------------------------------------------------------------------------

    def _dead(self, wires: Wires) -> Tensor:
        """Targets that a cut leaves without any edge, as codes cut · T + target, ascending; y is always alive."""
        if wires.site == OUTPUT or not len(wires.edge):
            return self.edge[:0]
        place = self._place(wires)
        own = place >= 0
        pair, count = (self.cut[own] * len(wires.node) + wires.target[place[own]]).unique(return_counts=True)
        degree = torch.bincount(wires.target, minlength=len(wires.node))
        return pair[count == degree[pair % len(wires.node)]]

    def _place(self, wires: Wires) -> Tensor:
        """Where the cut edges stand among the site's edges, −1 where they are another site's, (n,)."""
        table = torch.full((len(self.cuts.circuit),), -1, device=self.device)
        table[wires.edge] = torch.arange(len(wires.edge), device=self.device)
        return table[self.edge]

    def _touched(self, wires: Wires, dead: Tensor) -> _Touched:
        moved, errors = [self._lost(wires)], []
        for i, parent in enumerate(wires.function.parents):
            if parent not in self.changes:
                continue
            changed, last = self.changes[parent], wires.offsets[i + 1] - 1
            edge, entry = self._readers(wires, changed.place[:, 2] + wires.offsets[i], changed.place[:, 0])
            cut, sequence, _ = changed.place[entry].T
            moved.append((cut, wires.target[edge], sequence, wires.column[edge], self._at_source(wires, edge, changed.change[entry])))
            edge, entry = self._readers(wires, torch.full_like(changed.error_place[:, 0], last), changed.error_place[:, 0])
            cut, sequence = changed.error_place[entry].T
            errors.append((cut, wires.target[edge], sequence, torch.full_like(cut, i), self._at_source(wires, edge, changed.error[entry])))
        cut, target, sequence, column, change = (torch.cat(parts) for parts in zip(*moved, strict=True))
        keep = change.any(dim=-1) & self._alive(wires, dead, cut, target)
        place, column, change = torch.stack([cut, target, sequence], dim=1)[keep], column[keep], change[keep]
        if not errors:
            none = place[:0, 0]
            errors = [(none, none, none, none, change.new_zeros(0, self.clean.length, 0))]
        cut, target, sequence, number, error = (torch.cat(parts) for parts in zip(*errors, strict=True))
        keep = self._alive(wires, dead, cut, target)
        error_place = torch.stack([cut, target, sequence], dim=1)[keep]
        places, entry = torch.cat([place, error_place]).unique(dim=0, return_inverse=True)
        return _Touched(places, entry[: len(place)], column, change, entry[len(place) :], number[keep], error[keep])

    def _lost(self, wires: Wires) -> tuple[Tensor, ...]:
        """What the cut edges brought, negative: cut, target, sequence, column, each (n,), and change (n, pos)."""
        place, size = self._place(wires), self.clean.size
        own = (place >= 0).nonzero().flatten().repeat_interleave(size)
        edge, sequence = place[own], torch.arange(size, device=self.device).repeat(len(own) // size)
        brought = self.gated.entries(wires, self.cuts.states) * self.gated.moving(wires, self.cuts.states)  # (batch, pos, U)
        change = self._at_source(wires, edge, -brought[sequence, :, wires.column[edge]])
        return self.cut[own], wires.target[edge], sequence, wires.column[edge], change

    def _readers(self, wires: Wires, column: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
        """All pairs of a change, of a column under a cut (n,), and an edge of the site that reads it and is not cut: edges, changes."""
        edge, entry = joined(column, wires.column)
        alive = ~torch.isin(cut[entry] * len(self.cuts.circuit) + wires.edge[edge], self.taken)
        return edge[alive], entry[alive]

    def _at_source(self, wires: Wires, edge: Tensor, change: Tensor) -> Tensor:
        """Changes (n, pos, …) at the positions that their edges (n,) read."""
        position = wires.source_position[edge]
        if not bool((position != SHARED).any()):
            return change
        here = (position[:, None] == SHARED) | (position[:, None] == torch.arange(self.clean.length, device=self.device))
        return change * (here if change.ndim == 2 else here[..., None])

    def _alive(self, wires: Wires, dead: Tensor, cut: Tensor, target: Tensor) -> Tensor:
        return ~torch.isin(cut * len(wires.node) + target, dead)

    # -- what becomes of it --------------------------------------------------------------------------------------------------

    def _changed(self, wires: Wires, touched: _Touched, dead: Tensor) -> _Changes:
        """The site's nodes that are not as in the circuit."""
        state, of_error = self.cuts.states[wires.site], wires.node[touched.place[:, 1]] == ERROR
        chosen = (~of_error).nonzero().flatten()
        cut, target, sequence = touched.place[chosen].T
        change, own = self._entries(wires, touched, chosen)
        before = state.features[sequence, :, wires.place[target]]  # (n, pos)
        change = torch.where(own, change - before, 0.0)
        place = torch.stack([cut, sequence, wires.place[target]], dim=1)
        chosen = of_error.nonzero().flatten()
        error_place = touched.place[chosen][:, [0, 2]]
        error, own = self._entries(wires, touched, chosen)
        error = torch.where(own[..., None], error - state.error[error_place[:, 1]], 0.0) if len(chosen) else state.error[:0]
        gone, gone_errors = self._gone(wires, dead, state)
        place, change = torch.cat([place, gone[0]]), torch.cat([change, gone[1]])
        error_place, error = torch.cat([error_place, gone_errors[0]]), torch.cat([error, gone_errors[1]])
        moves, error_moves = change.any(dim=-1), error.flatten(1).any(dim=-1)
        return _Changes(place[moves], change[moves], error_place[error_moves], error[error_moves])

    def _gone(self, wires: Wires, dead: Tensor, state: Moved) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Targets that lost their last edge go back to their baseline: places and changes of features, and of errors."""
        size = self.clean.size
        cut, target = (dead // len(wires.node)).repeat_interleave(size), (dead % len(wires.node)).repeat_interleave(size)
        sequence = torch.arange(size, device=self.device).repeat(len(dead))
        position = wires.position[target][:, None]
        here = (position == SHARED) | (position == torch.arange(self.clean.length, device=self.device))  # (n, pos)
        is_error = wires.node[target] == ERROR
        own = ~is_error
        features = -state.features[sequence[own], :, wires.place[target[own]]] * here[own]
        place = torch.stack([cut[own], sequence[own], wires.place[target[own]]], dim=1)
        errors = -state.error[sequence[is_error]] * here[is_error, :, None]
        return (place, features), (torch.stack([cut[is_error], sequence[is_error]], dim=1), errors)

    def _entries(self, wires: Wires, touched: _Touched, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Own entries of touched targets (n,), all features or all errors, minus baseline, (n, pos) or (n, pos, width).

        With it where they may have changed, bool (n, pos).
        """
        length = self.clean.length
        target, sequence = touched.place[chosen, 1], touched.place[chosen, 2]
        position = wires.position[target][:, None]
        at = torch.arange(length, device=self.device)
        own = (position == SHARED) | (position == at)  # (n, pos)
        moves = self._moves(touched)[chosen]
        width = self.clean.dictionaries[wires.site].d_in
        of_error = len(chosen) > 0 and bool(wires.node[target[0]] == ERROR)
        result = self.ones.new_zeros(len(chosen), length, *[width] * of_error)
        if not len(chosen):
            return result, own
        if wires.function.mixes_positions:
            own &= moves.cummax(dim=1).values  # nothing before the first change
            for some in portions(torch.arange(len(chosen), device=self.device), self.gated.rows_at_once(wires)):
                values = self._computed(wires, touched, chosen[some])
                result[some] = self.gated.own(wires, target[some], values, (sequence[some],))
            return result, own
        own &= moves
        if self.gated.clean.last_only[wires.site]:
            own[:, :-1] = False
        row, pos = own.nonzero(as_tuple=True)
        for some in portions(torch.arange(len(row), device=self.device), self.gated.rows_at_once(wires)):
            values = self._computed(wires, touched, chosen[row[some]], pos[some])
            result[row[some], pos[some]] = self.gated.own(wires, target[row[some]], values, (sequence[row[some]], pos[some]))[:, 0]
        return result, own

    def _moves(self, touched: _Touched) -> Tensor:
        """Where the inputs of touched targets change, bool (n, pos)."""
        counts = torch.zeros(len(touched.place), self.clean.length, device=self.device)
        counts.index_add_(0, touched.entry, (touched.change != 0).float())
        if len(touched.error_entry):
            counts.index_add_(0, touched.error_entry, touched.error.any(dim=-1).float())
        return counts > 0

    def _computed(self, wires: Wires, touched: _Touched, chosen: Tensor, pos: Tensor | None = None) -> Tensor:
        """The site's values at the inputs of touched targets (n,), at one position each or all: (n, pos or 1, width)."""
        if wires.site == OUTPUT and not wires.function.mixes_positions:
            pos = torch.full_like(chosen, self.clean.length - 1)
        elif pos is None and wires.site == OUTPUT:
            parts = [self._inputs_computed(wires, touched, some, None)[:, -1:] for some in portions(chosen, self.gated.rows_at_once(wires))]
            return torch.cat(parts) if parts else self.cuts.end[:0, None]
        return self._inputs_computed(wires, touched, chosen, pos)

    def _inputs_computed(self, wires: Wires, touched: _Touched, chosen: Tensor, pos: Tensor | None) -> Tensor:
        target, sequence = touched.place[chosen, 1], touched.place[chosen, 2]
        at = (sequence,) if pos is None else (sequence, pos)
        mask, entries = self.gated.mask(wires, self.ones), self.gated.entries(wires, self.cuts.states)
        coefficients = self.gated.coefficients(wires, mask, entries, target, at).clone()  # (n, pos or 1, U)
        entry, row = joined(chosen, touched.entry)
        change = touched.change[entry] if pos is None else touched.change[entry, pos[row]][:, None]
        steps = torch.arange(coefficients.shape[1], device=self.device)
        coefficients.index_put_((row[:, None], steps, touched.column[entry][:, None]), change, accumulate=True)
        entry, row = joined(chosen, touched.error_entry)
        extra = {}
        for i, parent in enumerate(wires.function.parents):
            own = touched.error_parent[entry] == i
            if bool(own.any()):
                moved = touched.error[entry[own]] if pos is None else touched.error[entry[own], pos[row[own]]][:, None]
                extra[parent] = moved.new_zeros(len(chosen), *moved.shape[1:]).index_add_(0, row[own], moved)
        return self.gated.values(wires, coefficients, self.cuts.states, at, extra)
