"""What a metric loses when one edge, or one node, alone is cut: in the full model, or in a circuit.

The effect of an edge is m(M) − m(M without this edge), or m(C) − m(C without it); that of a node the same with the node at its baseline
in the full model (node ablation), and with all edges out of it cut in a circuit. By definition these are ablated models (see `ablation`).

In the full model a cut edge u → d changes nothing before d, and of d's site nothing but d:

1. d's own input without u is written once for each source u, whatever its targets d, and goes through d's local function: rows are of
   (source, sequence), or (source, sequence, position) where no attention is recomputed, and only of those where u is not at its baseline.
2. Where no value of d changes the effect is exactly 0: nothing runs.
3. Equal changes of one d, as when different cuts switch it off, are one; the rest of the model runs on each, from its first changed position
   on, batched over edges and sequences.

In a circuit see `cuts`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from ..errors import UserError
from .ablation import DEFAULT_MEMORY, AblationBatch, CleanBatch, Errors, WrongGraph, ablate_edges, ablate_nodes
from .binding import LocalFunction
from .cuts import CircuitCuts, joined, measured
from .gated import portions
from .masks import ERROR, SHARED, SOURCE, SOURCE_POSITION, SOURCE_SITE, TARGET, TARGET_POSITION, TARGET_SITE, EdgeSet, NodeSet
from .metrics import Metric
from .products import fast_products
from .sites import EMBED, OUTPUT, Basis, Site, SiteKind
from .tail import CleanRun, Tail

_BYTES_PER_EDGE = 96
"""What an edge of a set takes while sets are written out: its row, and as much again for sorting."""


class NotSingle(UserError):
    """Effects of single edges or nodes were asked of a set that is a complement, or of edges that a circuit cannot lose."""


@torch.no_grad()
def edge_effects(
    batch: AblationBatch,
    edges: EdgeSet,
    metrics: Sequence[Metric],
    *,
    circuit: EdgeSet | None = None,
    errors: Errors = Errors.LISTED,
    memory: int = DEFAULT_MEMORY,
) -> dict[Metric, Tensor]:
    """What each metric loses when one of `edges` alone is cut, per metric (n_edges, batch), in the order of `edges.rows`.

    In the full model, or with a `circuit` in that; an edge that it does not have changes nothing there. With a target inside the model
    its value is what is measured, whatever the metric. Raises `WrongGraph`, and `NotSingle` for a complement or where only one of the
    edges and the circuit are meant for single positions.
    """
    _check(batch, edges, circuit)
    if circuit is None and errors is not Errors.DEAD:
        with fast_products(batch.clean_end):
            return _FullModel(batch, metrics, errors, memory).edges(edges.rows)
    circuit = EdgeSet.full(batch.graph) if circuit is None else circuit
    if circuit.complement or errors is Errors.KEPT:
        return _differences(batch, circuit, (_without(circuit, row[None]) for row in edges.rows), metrics, errors, memory)
    place, found = _places(circuit.rows, edges.rows)
    cuts = CircuitCuts(batch, circuit, errors, memory)
    return _on_all(cuts.effects(place[found], torch.arange(int(found.sum())), metrics), found)


@torch.no_grad()
def node_effects(
    batch: AblationBatch,
    nodes: NodeSet,
    metrics: Sequence[Metric],
    *,
    circuit: EdgeSet | None = None,
    errors: Errors = Errors.LISTED,
    memory: int = DEFAULT_MEMORY,
) -> dict[Metric, Tensor]:
    """What each metric loses when one of `nodes` alone is at its baseline, per metric (n_nodes, batch), in the order of `nodes.rows`.

    In the full model; with a `circuit` when all edges out of the node are cut in that. Raises as `edge_effects` does, and `NotSingle` for a
    circuit that is a complement.
    """
    _check(batch, nodes, circuit)
    if circuit is None and errors is not Errors.DEAD:
        with fast_products(batch.clean_end):
            return _FullModel(batch, metrics, errors, memory).nodes(nodes.rows)
    if circuit is None:
        full, singles = NodeSet.full(batch.graph), [NodeSet(batch.graph, row[None], complement=True) for row in nodes.rows]
        values = batch.measures(ablate_nodes(batch, [full, *singles], errors=errors, memory=memory), metrics)
        return {metric: value[:1] - value[1:] for metric, value in values.items()}
    if circuit.complement:
        raise NotSingle("a node of a complement: give the circuit by its own edges")
    if errors is Errors.KEPT:
        sources = circuit.rows[:, [SOURCE_SITE, SOURCE, SOURCE_POSITION]]
        sets = (EdgeSet(batch.graph, circuit.rows[(sources != row).any(dim=1)]) for row in nodes.rows)
        return _differences(batch, circuit, sets, metrics, errors, memory)
    place, found = _places(nodes.rows, circuit.rows[:, [SOURCE_SITE, SOURCE, SOURCE_POSITION]])
    own, cut = place[found].unique(return_inverse=True)
    effects = CircuitCuts(batch, circuit, errors, memory).effects(found.nonzero().flatten(), cut, metrics)
    has_edges = torch.zeros(len(nodes), dtype=torch.bool)
    has_edges[own] = True
    return _on_all(effects, has_edges)


# --- sets without an edge ----------------------------------------------------------------------------------------------


def _check(batch: AblationBatch, chosen: EdgeSet | NodeSet, circuit: EdgeSet | None) -> None:
    for one in (chosen, circuit):
        if one is not None and one.graph.sites != batch.graph.sites:
            own, other = (", ".join(site.name for site in graph.sites) for graph in (one.graph, batch.graph))
            raise WrongGraph(f"a set over {own} cannot be ablated in a graph over {other}")
    if chosen.complement:
        raise NotSingle("effects are of single edges or nodes: list them, a complement is too many")
    if circuit is not None and len(chosen) and len(circuit) and chosen.by_position != circuit.by_position:
        which = "single positions and the circuit for all" if chosen.by_position else "all positions and the circuit for single ones"
        raise NotSingle(f"what is cut is meant for {which}: give both with positions, or both without")


def _places(among: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of `rows` (n, k) stands among distinct rows (m, k), (n,), and whether it does, bool (n,)."""
    _, code = torch.cat([among, rows]).unique(dim=0, return_inverse=True)
    table = torch.full((int(code.max()) + 1 if len(code) else 0,), -1)
    table[code[: len(among)]] = torch.arange(len(among))
    place = table[code[len(among) :]]
    return place, place >= 0


def _without(circuit: EdgeSet, rows: Tensor) -> EdgeSet:
    """The circuit without some edges (n, 6)."""
    if circuit.complement:
        return EdgeSet(circuit.graph, torch.cat([circuit.rows, rows]).unique(dim=0), complement=True)
    _, there = _places(rows, circuit.rows)
    return EdgeSet(circuit.graph, circuit.rows[~there])


def _differences(
    batch: AblationBatch, circuit: EdgeSet, sets: Iterable[EdgeSet], metrics: Sequence[Metric], errors: Errors, memory: int
) -> dict[Metric, Tensor]:
    """m(C) − m(each set), (n_sets, batch), straight from the definition; sets are written out a portion at a time."""
    found: dict[Metric, list[Tensor]] = {metric: [] for metric in metrics}
    portion = max(1, memory // 4 // (_BYTES_PER_EDGE * max(1, len(circuit))))
    remaining = iter(sets)
    while own := list(islice(remaining, portion)):
        values = batch.measures(ablate_edges(batch, [circuit, *own], errors=errors, memory=memory), metrics)
        for metric, value in values.items():
            found[metric].append(value[:1] - value[1:])
    return {metric: torch.cat(parts) if parts else batch.clean_end.new_zeros(0, batch.clean.size) for metric, parts in found.items()}


def _on_all(effects: Mapping[Metric, Tensor], which: Tensor) -> dict[Metric, Tensor]:
    """Effects (k, batch) of those that a mask (n,) chooses as (n, batch); of the others 0."""
    found = {}
    for metric, own in effects.items():
        found[metric] = own.new_zeros(len(which), own.shape[1])
        found[metric][which.to(own.device)] = own
    return found


# --- in the full model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FullModel:
    """Effects in the full model of a batch."""

    batch: AblationBatch
    metrics: Sequence[Metric]
    errors: Errors
    memory: int

    @property
    def clean(self) -> CleanBatch:
        return self.batch.clean

    @cached_property
    def tails(self) -> CleanRun:
        """The clean run with every residual stream that a tail may pass."""
        clean = self.clean
        layers = range(clean.end.layer + (clean.end.kind is SiteKind.RESID))
        bases = {clean.end: clean.target.basis, **{site: dictionary.basis for site, dictionary in clean.dictionaries.items()}}
        wanted = {**dict.fromkeys([EMBED, *(Site(SiteKind.RESID, layer) for layer in layers)], Basis.RESIDUAL), **bases}
        run = clean.binding.forward(clean.pairs.clean, wanted, keep_attention=True, stop_early=True)
        return CleanRun(clean.binding, run, run.values)

    @cached_property
    def full(self) -> dict[Metric, Tensor]:
        """The unablated model's metrics, each (batch,)."""
        return {metric: self.batch.full(metric) for metric in self.metrics}

    def edges(self, rows: Tensor) -> dict[Metric, Tensor]:
        """Effects of edges (n, 6), each (n, batch)."""
        effects = {metric: full.new_zeros(len(rows), len(full)) for metric, full in self.full.items()}
        for number, site in enumerate(self.batch.graph.sites):
            listed = (rows[:, TARGET_SITE] == number).nonzero().flatten()
            for of_error in (False, True):
                chosen = listed[(rows[listed, TARGET] == ERROR) == of_error]
                for own in self._portions(chosen[self._exists(site, rows[chosen])], site, of_error):
                    self._edges_of(site, rows[own], own, effects)
        return effects

    def nodes(self, rows: Tensor) -> dict[Metric, Tensor]:
        """Effects of nodes (n, 3), each (n, batch)."""
        effects = {metric: full.new_zeros(len(rows), len(full)) for metric, full in self.full.items()}
        for number, site in enumerate(self.batch.graph.sites):
            listed = (rows[:, 0] == number).nonzero().flatten()
            for of_error in (False, True) if self.errors is Errors.LISTED else (False,):
                chosen = listed[(rows[listed, 1] == ERROR) == of_error]
                for own in self._portions(chosen, site, of_error):
                    lost = self._lost(site, rows[own, 1], rows[own, 2])
                    self._run(site, rows[own, 1].to(lost.device), lost, own, effects)
        return effects

    def _exists(self, site: Site, rows: Tensor) -> Tensor:
        """Which edges into a site exist where they are meant, (n,): cutting any other, or one that `errors` keeps, changes nothing."""
        length = self.clean.length
        source, target = rows[:, SOURCE_POSITION], rows[:, TARGET_POSITION]
        exists = (target < length) & (source < length)
        if site == OUTPUT:
            exists &= (target == SHARED) | (target == length - 1)
        if site in self.clean.functions and not self.clean.functions[site].mixes_positions:
            exists &= source == target
        if self.errors is not Errors.LISTED:
            exists &= (rows[:, SOURCE] != ERROR) & (rows[:, TARGET] != ERROR)
        return exists

    def _portions(self, own: Tensor, site: Site, of_error: bool) -> Sequence[Tensor]:
        """Some edges or nodes in portions whose changes fit into an eighth of the memory."""
        width = self.clean.dictionaries[site].d_in if of_error and site != OUTPUT else 1
        size = max(1, self.memory // 8 // (16 * self.clean.size * self.clean.length * width))
        return portions(own, size)

    def _lost(self, site: Site, nodes: Tensor, positions: Tensor) -> Tensor:
        """How nodes (n,) move to their baseline, at one position or all: features (n, batch, pos); the error node (n, batch, pos, width)."""
        clean, base, device = self.clean.nodes[site], self.batch.base[site], self.clean.binding.device
        nodes, positions = nodes.to(device), positions.to(device)
        at = torch.arange(self.clean.length, device=device)
        here = (positions == SHARED)[:, None] | (positions[:, None] == at)  # (n, pos)
        if len(nodes) and bool(nodes[0] == ERROR):
            return (base.error - clean.error) * here[:, None, :, None]
        # Only the asked columns are subtracted.
        moved = base.features[..., nodes] - clean.features[..., nodes]  # (batch, pos, n)
        return moved.movedim(-1, 0) * here[:, None]

    # -- an edge's target ------------------------------------------------------------------------------------------------

    def _edges_of(self, site: Site, rows: Tensor, own: Tensor, effects: Mapping[Metric, Tensor]) -> None:
        """Effects of edges (n, 6) into features, or the error node, of one site, or into y; `own` says where they belong."""
        function = self.clean.functions[site]
        sources, source = rows[:, [SOURCE_SITE, SOURCE, SOURCE_POSITION]].unique(dim=0, return_inverse=True)
        device = self.clean.binding.device
        node, position, source = rows[:, TARGET].to(device), rows[:, TARGET_POSITION].to(device), source.to(device)
        if site == OUTPUT:
            for inputs in self._inputs(site, function, sources):
                edge, row = joined(inputs.source, source)
                for metric, effect in self._measured(inputs.values[row, -1], inputs.sequence[row]).items():
                    effects[metric][own.to(device)[edge], inputs.sequence[row]] = effect
            return
        dictionary, clean = self.clean.dictionaries[site], self.clean.nodes[site]
        of_error = bool(node[0] == ERROR)
        shape = (len(rows), self.clean.size, self.clean.length)
        change = clean.error.new_zeros(*shape, dictionary.d_in) if of_error else clean.features.new_zeros(shape)
        for inputs in self._inputs(site, function, sources):
            edge, row = joined(inputs.source, source)
            if of_error:
                rest = inputs.values - dictionary.decode(dictionary.encode(inputs.values))  # (rows, pos or 1, width)
                inputs.put(change, edge, row, (rest - inputs.gathered(clean.error))[row])
                continue
            n = inputs.values.shape[1]
            flat = row[:, None] * n + torch.arange(n, device=device)  # (k, pos or 1)
            nodes = dictionary.encode_at(inputs.values.flatten(0, 1), flat.flatten(), node[edge].repeat_interleave(n)).view(-1, n)
            inputs.put(change, edge, row, nodes - inputs.gathered(clean.features)[row, :, node[edge]])
        here = (position == SHARED)[:, None] | (position[:, None] == torch.arange(shape[2], device=device))  # (n, pos)
        change *= here[:, None, :, None] if of_error else here[:, None]
        self._run(site, node, change, own, effects)

    def _inputs(self, site: Site, function: LocalFunction, sources: Tensor) -> "Iterator[_Rows]":
        """A site's value where it reads everything but one source (s, 3), for every source and sequence where that one is not at its baseline."""
        clean, device = self.clean, self.clean.binding.device
        mixes = function.mixes_positions
        d_sae = 0 if site == OUTPUT else clean.dictionaries[site].d_sae
        per_row = 4 * (clean.length if mixes else 1) * (24 * clean.binding.d_model + 2 * d_sae)
        size = max(1, self.memory // 4 // per_row)
        for parent in function.parents:
            number = self.batch.graph.sites.index(parent)
            for of_error in (False, True):
                chosen = ((sources[:, 0] == number) & ((sources[:, 1] == ERROR) == of_error)).nonzero().flatten()
                for some in self._portions(chosen, parent, of_error):
                    lost = self._lost(parent, sources[some, 1], sources[some, 2])
                    cells = lost.any(dim=-1) if of_error else lost != 0  # (s, batch, pos)
                    if site == OUTPUT and not mixes:
                        cells[..., :-1] = False
                    places = (cells.any(dim=-1) if mixes else cells).nonzero()
                    for place in portions(places, size):
                        at = tuple(place.T)
                        own = place[:, 0].to(some.device)
                        moved = lost[at] if mixes else lost[at][:, None]  # (rows, pos or 1) and for errors the width
                        column = sources[some[own], 1].to(device)
                        write = moved if of_error else moved[..., None] * clean.dictionaries[parent].directions(column)[:, None]
                        first = cells[at[:2]].int().argmax(dim=-1) if mixes else at[2]
                        values = self._evaluated(function, parent, write, at[1:])
                        yield _Rows(values, some.to(device)[place[:, 0]], at[1], first, mixes)

    def _evaluated(self, function: LocalFunction, moved: Site, write: Tensor, at: tuple[Tensor, ...]) -> Tensor:
        """The function's value in the clean run, but for one parent that moves by `write` (rows, pos or 1, width); `at`: sequences, or cells."""
        clean = self.clean
        gather = lambda x: x[at] if function.mixes_positions else x[at][:, None]
        inputs = {parent: gather(clean.values[parent]) for parent in function.parents}
        inputs[moved] = inputs[moved] + write
        return function(inputs, {c: gather(clean.values[c]) for c in function.constants}, clean.run)

    # -- the rest of the model -------------------------------------------------------------------------------------------

    def _run(self, site: Site, node: Tensor, change: Tensor, own: Tensor, effects: Mapping[Metric, Tensor]) -> None:
        """Effects of changes of single nodes (n,): features (n, batch, pos), or the error node (n, batch, pos, width)."""
        of_error = change.ndim == 4
        own = own.to(change.device)
        entry = (change.flatten(2) != 0).any(dim=-1).nonzero()  # (k, 2): one of the n, sequence
        if not len(entry):
            return
        rows = change[tuple(entry.T)]  # (k, pos) and for errors the width
        if not of_error:
            bits = (rows + 0.0).view({8: torch.int64, 4: torch.int32, 2: torch.int16}[rows.element_size()]).long()
            _, inverse = torch.cat([node[entry[:, 0], None], entry[:, 1:], bits], dim=1).unique(dim=0, return_inverse=True)
            leaders = inverse.new_zeros(int(inverse.max()) + 1).scatter_(0, inverse, torch.arange(len(inverse), device=inverse.device))
        else:
            leaders = inverse = torch.arange(len(entry), device=change.device)
        sequence = entry[leaders, 1]
        found = {metric: values.new_zeros(len(leaders)) for metric, values in effects.items()}
        cells = rows[leaders].any(dim=-1) if of_error else rows[leaders] != 0
        for some, ends in self._ends(site, node[entry[leaders, 0]], rows[leaders], sequence, cells.int().argmax(dim=-1)):
            for metric, effect in self._measured(ends, sequence[some]).items():
                found[metric][some] = effect
        for metric, values in effects.items():
            values[own[entry[:, 0]], entry[:, 1]] = found[metric][inverse]

    def _ends(self, site: Site, node: Tensor, change: Tensor, sequence: Tensor, first: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Portions of changes (n, pos) or (n, pos, width), and what the target reads then, (portion, width)."""
        clean, dictionary = self.clean, self.clean.dictionaries[site]
        tail = Tail(self.tails, site, dictionary.basis, clean.end, clean.target.basis, clean.length - 1)
        for start in first.unique().tolist():
            per_row = 4 * (clean.length - start) * 24 * clean.binding.d_model + 8 * clean.length * clean.binding.d_model * tail.n_layers
            for some in portions((first == start).nonzero().flatten(), max(1, self.memory // 4 // per_row)):
                moved = change[some, start:]
                write = moved if moved.ndim == 3 else moved[..., None] * dictionary.directions(node[some])[:, None]
                yield some, tail(clean.values[site][sequence[some], start:] + write, sequence[some], start)

    def _measured(self, ends: Tensor, sequence: Tensor) -> dict[Metric, Tensor]:
        """m(M) − m of ends (n, width) of sequences (n,), per metric (n,)."""
        some_rows = portions(torch.arange(len(ends), device=ends.device), 256)  # logits are wide
        parts = [measured(self.clean, ends[some], sequence[some], self.metrics) for some in some_rows]
        return {metric: self.full[metric][sequence] - torch.cat([part[metric] for part in parts]) for metric in self.metrics}


@dataclass(frozen=True)
class _Rows:
    """A site's values (rows, pos or 1, width) without one source each: which one, in which sequence, and the first position where it is missed."""

    values: Tensor
    source: Tensor
    sequence: Tensor
    first: Tensor
    mixes: bool

    def gathered(self, clean: Tensor) -> Tensor:
        """Clean nodes (batch, pos, n) where the rows are, (rows, pos or 1, n)."""
        return clean[self.sequence] if self.mixes else clean[self.sequence, self.first][:, None]

    def put(self, change: Tensor, edge: Tensor, row: Tensor, moved: Tensor) -> None:
        """Put how targets move, (k, pos or 1, …), into a table (edges, batch, pos, …): edge (k,), row (k,). Nothing moves before `first`."""
        sequence, first = self.sequence[row], self.first[row]
        if not self.mixes:
            change[edge, sequence, first] = moved[:, 0]
            return
        behind = torch.arange(moved.shape[1], device=moved.device) >= first[:, None]  # (k, pos)
        change[edge, sequence] = torch.where(behind if moved.ndim == 2 else behind[..., None], moved, 0.0)
