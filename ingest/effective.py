"""Effective connectivity: attribution edges u → d by integrated gradients, vectorised.

For a clean and a corrupted sequence, a metric m and an edge u → d, the upstream sites are moved from their baseline to their
clean state, x(α) = x_base + α (x_clean − x_base), α = 1/S … 1; site d is recomputed locally from x(α); only node d is put into
an otherwise clean run, which gives m. The effect of node u on m through d is
`mean_α ∂m/∂x_u · W_dec[u] · (f_u,clean − f_u,base)`, of an error node `mean_α ∂m/∂x_u · (error_clean − error_base)`, with, by the
chain rule, `∂m/∂x_u = ∂m/∂f_d · ∂f_d/∂x_u` (Sundararajan et al. 2017, arXiv 1703.01365; Marks et al. 2024, arXiv 2403.19647;
Syed et al. 2023, arXiv 2310.10348, for S = 1, attribution patching).

1. `prepare` (preparation.py): one clean run and one backward give every site's gradient; one other run gives the baseline.
2. `attribute`: sites are visited from `y` backwards. The downstream nodes to expand become rows (rows.py): cotangents in
   the site's output space at every step, already multiplied by the first factor ∂m/∂f_d.
3. Evaluations (row, step) are packed into lanes (a sequence at a step where attention is recomputed, else a single position at a
   step), so that one batched vector–Jacobian product through the local function serves a slot of every lane at once.
4. Gradients are averaged over the steps, contracted with the upstream nodes that changed, and thresholded, chunk by chunk.
5. A node is expanded upstream only if one of its outgoing edges was kept.

At one step (α = 1, the clean run) a feature inactive in the clean run gets no incoming edge.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model.binding import LocalFunction
from ..model.products import fast_products
from ..model.sites import OUTPUT, Site
from .budget import chunk, forward_bytes, position_width, tail_row_bytes, vjp_row_bytes
from .grouping import rank
from .preparation import Candidates, Prepared, Tally, prepare
from .rows import Cotangents, Rows, at_alpha, check_consistent, output_rows, rows_of
from .settings import (
    Baseline,
    EdgeSettings,
    FirstFactor,
    InconsistentSite,
    NotFinite,
    Positions,
    TooManyEdges,
    UnavailableBaseline,
    ZeroGradient,
    wider,
)

__all__ = [
    "Baseline", "Candidates", "EdgeBlock", "EdgeSettings", "FirstFactor", "InconsistentSite", "NotFinite", "Positions", "Prepared",
    "Tally", "TooManyEdges", "UnavailableBaseline", "ZeroGradient", "attribute", "node_attributions", "prepare", "screened",
]  # fmt: skip

EDGE_BYTES = 100
"""What one kept edge takes until it is handed over."""

FOUND_BYTES = 120
"""What an effect that is kept takes while its chunk is put together and ranked."""

FEW_SLOTS = 2
"""So many rows of a lane go backward one by one, with whatever attention kernel is the best; more go together."""

Mask = Mapping[Site, Tensor]
"""Downstream nodes per site, bool (cells, d_sae + 1)."""


class EdgeBlock(NamedTuple):
    """Edges into one site, as columns of equal length; a site may come in several blocks.

    Site columns hold places in `SiteGraph.sites`, node columns feature indices (d_sae is the error node, 0 the output),
    positions are −1 where not kept. Weights are the signed effects.
    """

    sequence: np.ndarray  # int64, place in the batch
    src_site: np.ndarray  # int64
    src_index: np.ndarray  # int64
    src_pos: np.ndarray  # int64
    dest_site: np.ndarray  # int64
    dest_index: np.ndarray  # int64
    dest_pos: np.ndarray  # int64
    weight: np.ndarray  # float64


class _Coo(NamedTuple):
    """Single-position edges on the device: `row` is the downstream row, the rest describes the upstream node."""

    row: Tensor
    src_site: Tensor
    cell: Tensor
    node: Tensor
    weight: Tensor


# --- nodes ----------------------------------------------------------------------------------------------------------


def node_attributions(prepared: Prepared) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Attribution of every node to the metric: mean_α ∂m/∂x · W_dec · Δf, and mean_α ∂m/∂x · Δerror.

    The whole site moves along its path, everything behind it is recomputed (Marks et al. 2024); at one step that is G · W_dec · Δf.
    Yields (site, features (batch, pos, d_sae), errors (batch, pos)).
    """
    batch, pos = prepared.shape
    for site, dictionary in prepared.dictionaries.items():
        gradient = path_gradient(prepared, site).flatten(0, 1)  # (cells, d_in)
        candidates = prepared.candidates[site]
        features = gradient.new_zeros(len(gradient), dictionary.d_sae)
        projected = dictionary.project(gradient)  # (cells, d_sae)
        for group in candidates.groups:
            if group.index is None:
                features[group.cells] = projected[group.cells] * group.delta
            else:
                # Padding has change 0: added, so that it leaves its feature alone.
                change = projected[group.cells].gather(-1, group.index) * group.delta
                features[group.cells] = features[group.cells].scatter_add(-1, group.index, change)
        errors = (gradient * candidates.error_delta).sum(-1)
        yield site, features.view(batch, pos, -1), errors.view(batch, pos)


def path_gradient(prepared: Prepared, site: Site) -> Tensor:
    """mean_α ∂m/∂x of a site moved as a whole along its path, everything behind it recomputed: (batch, pos, width)."""
    total = prepared.gradients[site].clone()
    if prepared.settings.steps == 1:
        return total
    batch, pos = prepared.shape
    tail = prepared.tail(site)
    live = prepared.candidates[site].live.view(batch, pos)[:, : tail.length]
    if not live.any():
        return total
    start = int(live.any(0).nonzero().min())
    work = [(sequence, alpha) for sequence in live.any(1).nonzero().flatten().tolist() for alpha in prepared.alphas[:-1]]
    size = chunk(prepared.settings.memory, tail_row_bytes(prepared.binding, tail, start))
    for low in range(0, len(work), size):
        sequence = torch.tensor([s for s, _ in work[low : low + size]], device=total.device)
        alpha = torch.tensor([a for _, a in work[low : low + size]], device=total.device, dtype=total.dtype)
        clean, base = (v[site][sequence, start : tail.length] for v in (prepared.values, prepared.base))
        with torch.enable_grad(), fast_products(total):
            leaf = torch.lerp(base, clean, alpha[:, None, None]).requires_grad_()
            metric = prepared.measure(tail(leaf, sequence, start), sequence)
            (gradient,) = torch.autograd.grad(metric.sum(), leaf)
        total[:, start : tail.length].index_add_(0, sequence, gradient)
    # What does not move keeps its clean gradient at every step.
    moved = live.any(1)
    total[moved, start : tail.length] /= prepared.settings.steps
    return total


# --- edges ----------------------------------------------------------------------------------------------------------


def attribute(prepared: Prepared, only: Mask | None = None) -> Iterator[EdgeBlock]:
    """All edges of a batch, from `y` backwards; with `only`, those into these nodes.

    Settings with a `screen` make `only` by a first pass. Raises `TooManyEdges` where they do not fit into the memory allowed.
    """
    if only is None and prepared.settings.screen is not None:
        only = screened(prepared)
    held = 0
    for site, rows, parts in _expanded(prepared, only):
        found = _Found(prepared, site, rows, held)
        for coo in parts:
            found.add(coo)
        block = found.block()
        held = found.held
        if block is not None:
            yield block


def _expanded(prepared: Prepared, only: Mask | None) -> Iterator[tuple[Site, Rows, Iterator[_Coo]]]:
    """Site by site from `y` backwards: the rows expanded and their kept edges, whose sources join the frontier as they are taken."""
    frontier = _no_nodes(prepared)
    for site in reversed(prepared.graph.sites):
        function = LocalFunction(prepared.binding, prepared.graph, site, prepared.bases)
        if not function.parents:
            continue
        reachable = reachable_cells(prepared, function)
        if site == OUTPUT:
            rows = output_rows(prepared, function)
        else:
            wanted = frontier[site] if only is None else frontier[site] & only[site]
            if not wanted[reachable].any():
                continue
            rows = rows_of(prepared, function, wanted, reachable)
        if reachable[rows.cell].any():
            yield site, rows, _marking(prepared, frontier, edges_into(prepared, function, rows))


def _marking(prepared: Prepared, frontier: Mapping[Site, Tensor], parts: Iterator[_Coo]) -> Iterator[_Coo]:
    """Pass edges on and mark their sources in the frontier."""
    for coo in parts:
        for place in coo.src_site.unique().tolist():
            of_site = coo.src_site == place
            frontier[prepared.graph.sites[place]][coo.cell[of_site], coo.node[of_site]] = True
        yield coo


def screened(prepared: Prepared) -> Mask:
    """Nodes into which an edge of at least `settings.screen` leads by the clean first factor at the two ends of the path, 1/S and 1.

    Expanding goes by these edges alone: a node is found where a chain of them leads from it to the output.
    """
    settings = prepared.settings
    assert settings.screen is not None
    threshold = max(settings.screen, settings.threshold)
    ends = 2 if settings.steps > 1 else 1
    quick = replace(settings, steps=ends, first_factor=FirstFactor.CLEAN, threshold=threshold, screen=None, max_edges=None, tail_dtype=None)
    base = prepared.base
    if ends == 2:
        # Two steps at 1/S and 1 instead of ½ and 1: the path of two steps whose start is moved accordingly.
        alpha = 2 / settings.steps - 1
        base = {site: torch.lerp(value, prepared.values[site], alpha) for site, value in base.items()}
    mask = _no_nodes(prepared)
    for site, rows, parts in _expanded(replace(prepared, settings=quick, base=base, tally=Tally()), None):
        for coo in parts:
            if site != OUTPUT:
                mask[site][rows.cell[coo.row], rows.index[coo.row]] = True
    return mask


def _no_nodes(prepared: Prepared) -> dict[Site, Tensor]:
    batch, pos = prepared.shape
    device = prepared.binding.device
    return {site: torch.zeros(batch * pos, d.d_sae + 1, dtype=torch.bool, device=device) for site, d in prepared.dictionaries.items()}


def reachable_cells(prepared: Prepared, function: LocalFunction) -> Tensor:
    """Which cells see any changed parent node: at their own position, or at or before it where attention is recomputed; (cells,) bool."""
    batch, pos = prepared.shape
    live = torch.stack([prepared.candidates[parent].live for parent in function.parents]).any(0)
    if function.mixes_positions:
        live = live.view(batch, pos).cummax(-1).values.flatten()
    return live


def edges_into(prepared: Prepared, function: LocalFunction, rows: Rows) -> Iterator[_Coo]:
    """Single-position edges into rows of one site: batched VJPs of its local function, contracted and thresholded chunk by chunk."""
    kept_of = 1 if prepared.settings.threshold == 0 else 4  # a threshold leaves few
    for chunk_of in gradients_into(prepared, function, rows, lambda packing: candidates_at(prepared, function, packing) * FOUND_BYTES // kept_of):
        yield from _contract(prepared, chunk_of, rows.cell)


def gradients_into(prepared: Prepared, function: LocalFunction, rows: Cotangents, per_slot: "PerSlot") -> "Iterator[Gradients]":
    """Gradients of rows of one site with respect to its parents' values, chunk by chunk: batched VJPs of its local function.

    per_slot: how many bytes are taken, for each slot of a packing's lanes, by what is made of the gradients.
    """
    everything = reachable_cells(prepared, function)[rows.cell].nonzero().flatten()
    _, pos = prepared.shape
    if not function.mixes_positions:
        yield from _grouped_by_lane(prepared, function, rows, everything, None, per_slot)
        return
    # A row at position p has no gradient after p: rows of nearby positions go together, through a sequence cut behind the last.
    bucket = rows.cell[everything] % pos // position_width(pos)
    for number in bucket.unique().tolist():
        which = everything[bucket == number]
        length = int((rows.cell[which] % pos).max()) + 1
        yield from _grouped_by_lane(prepared, function, rows, which, length, per_slot)


def _grouped_by_lane(
    prepared: Prepared, function: LocalFunction, rows: Cotangents, which: Tensor, length: int | None, per_slot: "PerSlot"
) -> "Iterator[Gradients]":
    """Pack the rows `which` into lanes: sequences of `length` positions, or single cells where `length` is None."""
    lane_of = rows.cell[which] // prepared.shape[1] if length else rows.cell[which]
    lanes, lane, counts = lane_of.unique(return_inverse=True, return_counts=True)  # rows are sorted by cell, hence by lane
    slot = rank(lane)
    # The forward pass of all lanes at all steps stays alive while their rows go backward.
    per_lane = prepared.settings.steps * (length or 1) * forward_bytes(prepared.binding, function, length or 1)
    most = chunk(prepared.settings.memory, per_lane)
    upper = int(counts.max())
    while upper > 0:
        lower = upper // 2
        # Lanes with similar numbers of rows go together, so that few slots stay empty.
        for chosen in ((counts <= upper) & (counts > lower)).nonzero().flatten().split(most):
            if len(chosen):
                place = torch.full((len(lanes),), -1, device=lane.device)
                place[chosen] = torch.arange(len(chosen), device=lane.device)
                here = (place[lane] >= 0).nonzero().flatten()
                packing = Packing(lanes[chosen], place[lane[here]], slot[here], which[here], length)
                yield from _lane_group(prepared, function, rows, packing, per_slot)
        upper = lower


class Packing(NamedTuple):
    """Which rows go where: `row` sits in `slot` of lane number `lane`; `lanes` are the sequences or cells themselves.

    `length` is how many positions of a sequence a lane has, None where lanes are single cells.
    """

    lanes: Tensor
    lane: Tensor
    slot: Tensor
    row: Tensor
    length: int | None

    @property
    def per_lane(self) -> int:
        """Positions of a lane."""
        return self.length or 1

    def at_lanes(self, value: Tensor) -> Tensor:
        """A site's value (batch, pos, width) at the lanes, (lanes, length or 1, width)."""
        return value.flatten(0, 1)[self.lanes][:, None] if self.length is None else value[self.lanes, : self.length]

    def cells(self, n_pos: int) -> Tensor:
        """The cells of the lanes, one after the other, (lanes · (length or 1),)."""
        if self.length is None:
            return self.lanes
        return (self.lanes[:, None] * n_pos + torch.arange(self.length, device=self.lanes.device)).flatten()


PerSlot = Callable[[Packing], int]
"""Bytes that a slot of all lanes of a packing takes."""


class Gradients(NamedTuple):
    """A chunk of rows' gradients, averaged over the steps. of: parent → (slots, lanes, length or 1, width); row_at: (slots, lanes) row or −1."""

    of: Mapping[Site, Tensor]
    row_at: Tensor
    packing: Packing


@dataclass(frozen=True)
class _Pass:
    """The local function run on the lanes of some steps, ready for backward passes. out: (steps · lanes, length or 1, width)."""

    leaves: dict[Site, Tensor]
    out: Tensor
    steps: range


def _lane_group(
    prepared: Prepared, function: LocalFunction, rows: Cotangents, packing: Packing, taken: PerSlot
) -> Iterator[Gradients]:
    """Run the local function on the group's lanes at every step, then batched VJPs of a chunk of slots after the other.

    Where the passes of all steps would take too much memory, a few steps go at a time, once for each chunk of slots.
    """
    steps, n_lanes, memory = prepared.settings.steps, len(packing.lanes), prepared.settings.memory
    n_slots = int(packing.slot.max()) + 1
    seen = packing.per_lane if _keeps_patterns(prepared, function, packing) else 0
    together = min(steps, chunk(memory, n_lanes * packing.per_lane * forward_bytes(prepared.binding, function, seen)))
    groups = [range(low, min(low + together, steps)) for low in range(0, steps, together)]
    with fast_products(rows.outs):
        kept = _forward(prepared, function, packing, groups[0]) if len(groups) == 1 else None
        widths = sum(prepared.values[parent].shape[-1] for parent in function.parents)
        backward = vjp_row_bytes(prepared.binding, function, packing.per_lane)
        per_slot = n_lanes * packing.per_lane * (backward if steps == 1 else 2 * widths * rows.outs.itemsize)
        step = chunk(memory, max(per_slot, taken(packing)))
        for low in range(0, n_slots, step):
            chosen = ((packing.slot >= low) & (packing.slot < low + step)).nonzero().flatten()
            slot, lane, row = packing.slot[chosen] - low, packing.lane[chosen], packing.row[chosen]
            n = min(step, n_slots - low)
            row_at = torch.full((n, n_lanes), -1, device=row.device)
            row_at[slot, lane] = row
            at = _Evaluations(row, torch.zeros_like(row), slot, lane)
            if steps == 1:
                assert kept is not None  # one step is one group
                gradients = _backward(prepared, function, rows, kept, packing, at, n)
            else:
                passes = (kept or _forward(prepared, function, packing, group) for group in groups)
                gradients = _mean_over_steps(prepared, function, rows, passes, packing, at, n)
            yield Gradients(gradients, row_at, packing)


def candidates_at(prepared: Prepared, function: LocalFunction, packing: Packing) -> int:
    """How many upstream nodes a slot of every lane meets."""
    cells = packing.cells(prepared.shape[1])
    return sum(int(prepared.candidates[parent].counts[cells].sum()) for parent in function.parents)


def _keeps_patterns(prepared: Prepared, function: LocalFunction, packing: Packing) -> bool:
    """Whether attention goes by the plain kernel: its backward pass takes a batch of cotangents at once, where fused ones are looped over.

    But it keeps every pattern, (positions × positions) a head: for long prompts only where one lane's fit.
    """
    if int(packing.slot.max()) + 1 <= FEW_SLOTS:
        return False
    return packing.per_lane * forward_bytes(prepared.binding, function, packing.per_lane) <= prepared.settings.memory // 2


def _forward(prepared: Prepared, function: LocalFunction, packing: Packing, steps: range) -> _Pass:
    """The local function on every lane at some steps, with a graph; consistent with the clean run at the last."""
    along = lambda site: torch.cat([packing.at_lanes(at_alpha(prepared, site, prepared.alphas[k])) for k in steps])
    leaves = {parent: along(parent).requires_grad_() for parent in function.parents}
    constants = {site: packing.at_lanes(prepared.values[site]).repeat(len(steps), 1, 1) for site in function.constants}
    run = prepared.run if packing.length in (None, prepared.shape[1]) else prepared.clean.suffix(0, packing.per_lane)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if _keeps_patterns(prepared, function, packing) else nullcontext():
        out = function(leaves, constants, run)
    if steps[-1] == prepared.settings.steps - 1:
        check_consistent(out[-len(packing.lanes) :], packing.at_lanes(prepared.values[function.target]), function.site, prepared.binding.precision)
    return _Pass(leaves, out, steps)


class _Evaluations(NamedTuple):
    """Rows at steps and where they are packed: `slot` of lane `lane` (of the lanes of one step)."""

    row: Tensor
    step: Tensor
    slot: Tensor
    lane: Tensor


def _backward(
    prepared: Prepared, function: LocalFunction, rows: Cotangents, run: _Pass, packing: Packing, evaluations: _Evaluations, n_slots: int
) -> dict[Site, Tensor]:
    """One batched VJP: parent → gradients (slots, steps · lanes, length or 1, width)."""
    pos = prepared.shape[1]
    row, step, slot, lane = evaluations
    cotangent = run.out.new_zeros(n_slots, *run.out.shape)
    place = torch.zeros_like(row) if packing.length is None else rows.cell[row] % pos
    dictionary = prepared.dictionaries.get(function.site)
    cotangent[slot, (step - run.steps[0]) * len(packing.lanes) + lane, place] = rows.cotangents(dictionary, row, step)
    leaves = list(run.leaves.values())
    back = lambda g: torch.autograd.grad(run.out, leaves, g, retain_graph=True)
    if n_slots > FEW_SLOTS:
        grads = torch.func.vmap(back)(cotangent)
    else:
        grads = tuple(torch.stack(parts) for parts in zip(*map(back, cotangent), strict=True))
    return dict(zip(run.leaves, grads, strict=True))


def _mean_over_steps(
    prepared: Prepared, function: LocalFunction, rows: Cotangents, passes: Iterable[_Pass], packing: Packing, at: _Evaluations, n_slots: int
) -> dict[Site, Tensor]:
    """Gradients averaged over the path, parent → (slots, lanes, length or 1, width); steps at which a row is inactive are skipped."""
    n_lanes, memory = len(packing.lanes), prepared.settings.memory
    shape = (n_slots, n_lanes, packing.per_lane)
    total = {parent: rows.outs.new_zeros(*shape, prepared.values[parent].shape[-1]) for parent in function.parents}
    for run in passes:
        which, step = rows.active[at.row, run.steps[0] : run.steps[-1] + 1].nonzero(as_tuple=True)
        # Packed anew for each step: the active rows of a lane at a step fill its first slots.
        lane = step * n_lanes + at.lane[which]
        order = lane.argsort(stable=True)
        which, step, lane = which[order], step[order] + run.steps[0], lane[order]
        slot = rank(lane)
        size = chunk(memory, len(run.out) * packing.per_lane * vjp_row_bytes(prepared.binding, function, packing.per_lane))
        for low in range(0, int(slot.max()) + 1 if len(slot) else 0, size):
            part = ((slot >= low) & (slot < low + size)).nonzero().flatten()
            here, where = which[part], slot[part] - low
            evaluations = _Evaluations(at.row[here], step[part], where, at.lane[here])
            grads = _backward(prepared, function, rows, run, packing, evaluations, int(where.max()) + 1)
            for parent, grad in grads.items():
                found = grad[where, lane[part]]  # (n, length or 1, width)
                total[parent].view(-1, *found.shape[1:]).index_add_(0, at.slot[here] * n_lanes + at.lane[here], found)
        del run  # its graph goes before the next one is made
    return {parent: value.div_(prepared.settings.steps) for parent, value in total.items()}


# --- contraction ----------------------------------------------------------------------------------------------------


def _contract(prepared: Prepared, gradients: Gradients, row_cell: Tensor) -> Iterator[_Coo]:
    """Effects of every changed parent node on the rows of one chunk, kept by threshold and by rank."""
    pos, per_lane, row_at = prepared.shape[1], gradients.packing.per_lane, gradients.row_at
    place = places(prepared, gradients.packing)
    found = []
    for parent, grad in gradients.of.items():
        gradient = grad.flatten(1, 2)  # (slots, cells of the lanes, width)
        check_finite(gradient, parent)
        number = prepared.graph.sites.index(parent)
        for where, cell, index, weight in _effects(prepared, parent, gradient, place):
            row = row_at[where, place[cell] // per_lane]
            found.append(_Coo(row, torch.full_like(row, number), cell, index, weight))
    coo = _Coo(*(torch.cat(column) for column in zip(*found, strict=True)))
    # An empty slot has no row; attention never looks ahead, and rounding must not say otherwise.
    keep = (coo.row >= 0) & (coo.cell % pos <= row_cell[coo.row.clamp_min(0)] % pos)
    coo = _Coo(*(column[keep] for column in coo))
    if prepared.settings.max_edges is not None:
        coo = _largest_per_row(coo, prepared.settings.max_edges)
    if len(coo.row):
        yield coo


def places(prepared: Prepared, packing: Packing) -> Tensor:
    """Cell → its number among the lanes' flattened cells, −1 where they have none, (cells,)."""
    (batch, pos), cells = prepared.shape, packing.cells(prepared.shape[1])
    place = torch.full((batch * pos,), -1, device=cells.device)
    place[cells] = torch.arange(len(cells), device=cells.device)
    return place


def check_finite(gradient: Tensor, site: Site) -> None:
    """Raise `NotFinite` for a gradient with respect to a site that is no number."""
    if not gradient.isfinite().all():
        raise NotFinite(f"gradients with respect to {site.name} are not finite in {gradient.dtype}: {wider(gradient.dtype)}")


def _effects(prepared: Prepared, site: Site, gradient: Tensor, place: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Effects of the changed nodes of one parent that pass the threshold, as (slot, cell, node, weight)."""
    dictionary, candidates = prepared.dictionaries[site], prepared.candidates[site]
    threshold = prepared.settings.threshold

    def kept(effect: Tensor) -> Tensor:
        return (effect.abs() >= threshold) & (effect != 0)

    slots, width = len(gradient), gradient.shape[-1]
    for group in candidates.groups:
        columns = group.delta.shape[1]
        # A cell takes its gradients, its candidates' directions and its effects.
        numbers = slots * width + (0 if group.index is None else columns * width) + 3 * slots * columns
        step = chunk(prepared.settings.memory, numbers * gradient.itemsize)
        for here in (place[group.cells] >= 0).nonzero().flatten().split(step):
            if not len(here):
                continue
            cells, delta = group.cells[here], group.delta[here]
            local = gradient[:, place[cells]]  # (slots, P, width)
            if group.index is None:
                effect = dictionary.project(local) * delta  # (slots, P, d_sae)
                slot, cell, node = kept(effect).nonzero(as_tuple=True)
                yield slot, cells[cell], node, effect[slot, cell, node]
            else:
                index = group.index[here]
                effect = torch.bmm(local.transpose(0, 1), dictionary.directions(index).transpose(1, 2)) * delta[:, None]  # (P, slots, C)
                cell, slot, column = kept(effect).nonzero(as_tuple=True)
                yield slot, cells[cell], index[cell, column], effect[cell, slot, column]
    cells = (candidates.live & (place >= 0)).nonzero().flatten()
    effect = torch.einsum("spd,pd->sp", gradient[:, place[cells]], candidates.error_delta[cells])
    slot, cell = kept(effect).nonzero(as_tuple=True)
    yield slot, cells[cell], torch.full_like(cell, dictionary.d_sae), effect[slot, cell]


def _largest_per_row(coo: _Coo, limit: int) -> _Coo:
    """Keep the `limit` edges of greatest |weight| per row; ties go to the earlier site, node and position."""
    order = torch.arange(len(coo.row), device=coo.row.device)
    for key in (coo.cell, coo.node, coo.src_site, -coo.weight.abs(), coo.row):  # stable sorts, least significant key first
        order = order[key[order].sort(stable=True).indices]
    chosen = order[rank(coo.row[order]) < limit].sort().values
    return _Coo(*(column[chosen] for column in coo))


# --- what was found --------------------------------------------------------------------------------------------------


class _Found:
    """The kept edges into one site, gathered chunk by chunk; aggregated over positions as soon as they take much memory."""

    def __init__(self, prepared: Prepared, site: Site, rows: Rows, held: int) -> None:
        self.prepared, self.site, self.rows = prepared, site, rows
        self.held = held
        self._parts: list[_Coo] = []
        self._merged: tuple[list[Tensor], Tensor] | None = None
        self._waiting = 0

    def add(self, coo: _Coo) -> None:
        """Take a chunk's edges."""
        self._parts.append(coo)
        self._waiting += len(coo.row)
        self.held += len(coo.row)
        if self._waiting * EDGE_BYTES > self.prepared.settings.memory // 4:
            self._merge()

    def _merge(self) -> None:
        """Put the gathered chunks into columns on the host, aggregated over positions where these are not kept."""
        if not self._parts:
            return
        how, pos = self.prepared.settings.positions, self.prepared.shape[1]
        coo = _Coo(*(torch.cat(column) for column in zip(*self._parts, strict=True)))
        self._parts, self._waiting = [], 0
        dest_cell, dest_index = self.rows.cell[coo.row], self.rows.index[coo.row]
        # On the host from here on: not every device has float64.
        weight = coo.weight.cpu().double()
        columns = [c.cpu() for c in (coo.cell // pos, coo.src_site, coo.node, dest_index, coo.cell % pos, dest_cell % pos)]
        if how is not Positions.KEEP:
            columns = columns[:4]
        before = len(weight) + (len(self._merged[1]) if self._merged else 0)
        if self._merged is not None:
            columns = [torch.cat(both) for both in zip(self._merged[0], columns, strict=True)]
            weight = torch.cat([self._merged[1], weight])
        if how is not Positions.KEEP:
            columns, weight = _over_positions(columns, weight, how)
        self._merged = columns, weight
        self.held -= before - len(weight)
        if self.held * EDGE_BYTES > self.prepared.settings.memory:
            raise TooManyEdges(
                f"{self.held:,} edges of one batch are more than {self.prepared.settings.memory / 2**20:,.0f} MB hold, at {self.site.name}: raise "
                "--threshold, limit --max-edges, take a smaller --batch-size, or allow more --memory"
            )

    def block(self) -> EdgeBlock | None:
        """The edges, None where there are none."""
        self._merge()
        if self._merged is None:
            return None
        columns, weight = self._merged
        if self.prepared.settings.positions is not Positions.KEEP:
            columns = columns + [torch.full_like(columns[0], -1)] * 2
        number = self.prepared.graph.sites.index(self.site)
        sequence, src_site, src_index, dest, src_pos, dest_pos = (c.numpy() for c in columns)
        return EdgeBlock(sequence, src_site, src_index, src_pos, np.full_like(src_site, number), dest, dest_pos, weight.numpy())


def _over_positions(identity: list[Tensor], weight: Tensor, how: Positions) -> tuple[list[Tensor], Tensor]:
    """Sum, or signed maximum, of the weights of equal identity (sequence, source site and node, target node)."""
    code = torch.zeros_like(identity[0])
    for column in identity:
        code = code * (int(column.max()) + 1) + column
    order = code.sort(stable=True).indices
    if how is Positions.MAX:
        order = order[weight[order].abs().sort(descending=True, stable=True).indices]
        order = order[code[order].sort(stable=True).indices]
    code, weight = code[order], weight[order]
    start = torch.ones_like(code, dtype=torch.bool)
    start[1:] = code[1:] != code[:-1]
    firsts = start.nonzero().flatten()
    if how is Positions.MAX:
        merged = weight[firsts]
    else:
        merged = weight.new_zeros(len(firsts)).index_add_(0, start.cumsum(0) - 1, weight)
    return [column[order[firsts]] for column in identity], merged
