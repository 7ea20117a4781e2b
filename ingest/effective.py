"""Effective connectivity: attribution edges u → d by attribution patching, vectorised.

For a clean and a corrupted sequence, a metric m and an edge u → d, the upstream sites sit at their clean state; site d is
recomputed locally; only node d is put into an otherwise clean run, which gives m. The effect of node u on m through d is
`∂m/∂x_u · W_dec[u] · (f_u,clean − f_u,base)`, of an error node `∂m/∂x_u · (error_clean − error_base)`, with, by the chain
rule, `∂m/∂x_u = ∂m/∂f_d · ∂f_d/∂x_u` (Syed et al. 2023, arXiv 2310.10348; Marks et al. 2024, arXiv 2403.19647).

1. `prepare`: one clean run and one backward give every site's gradient G = ∂m/∂x; one corrupted run gives the baseline.
2. `attribute`: sites are visited from `y` backwards. The downstream nodes to expand become rows: cotangents in the
   site's output space, already multiplied by the first factor ∂m/∂f_d.
3. Rows are packed into lanes (a sequence where attention is recomputed, else a single position), so that one batched
   vector–Jacobian product through the local function serves a slot of every lane at once.
4. The gradients are contracted with the upstream nodes that changed, and thresholded, chunk by chunk.
5. A node is expanded upstream only if one of its outgoing edges was kept.

At one step (α = 1, the clean run) a feature inactive in the clean run gets no incoming edge.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import FeatlasError, UserError
from ..model.binding import Binding, Forward, LocalFunction
from ..model.dictionaries import Dictionary
from ..model.metrics import Metric, evaluate, require_attribution_metric
from ..model.sites import EMBED, OUTPUT, Basis, Site, SiteGraph, SiteKind
from ..model.tasks import PairBatch

CHUNK_BYTES = 192 * 2**20
"""How much one chunk of rows may take, the backward pass' intermediates included (estimated)."""

LENGTHS = 16
"""Into how many lengths a sequence is cut at most where rows at different positions see prefixes of different length."""

CONSISTENCY = 1e-3
"""Relative difference allowed between a site and its own recomputation from its parents' clean values."""


class ZeroGradient(FeatlasError):
    """The metric does not depend on a chosen site: every attribution through it would be zero."""


class NotFinite(FeatlasError):
    """A gradient or a node's change is NaN or infinite: comparisons with it would silently drop or keep edges."""


class InconsistentSite(FeatlasError):
    """A site recomputed from its parents' clean values is not what the model computed."""


class UnavailableSteps(UserError):
    """A number of integration steps that this engine does not offer."""


class UnavailableBaseline(UserError):
    """A baseline that was not given the means that it needs."""


class Positions(StrEnum):
    """What becomes of token positions in the edges."""

    SUM = "sum"  # kept effects are added over positions
    MAX = "max"  # the signed effect of greatest magnitude
    KEEP = "keep"  # every position pair is an edge of its own


class Baseline(StrEnum):
    """The value that nodes are moved from."""

    COUNTERFACTUAL = "counterfactual"  # the corrupted sequence's nodes
    ZERO = "zero"  # every node 0, hence x = b_dec
    MEAN = "mean"  # the nodes' means over a corpus


@dataclass(frozen=True)
class NodeMeans:
    """Mean nodes of a site over a corpus: features (d_sae,) and the error vector (d_in,)."""

    features: Tensor
    error: Tensor


@dataclass(frozen=True)
class EdgeSettings:
    """What an attribution run computes; `threshold` 0 keeps every edge with an effect, `max_edges` None keeps all."""

    metric: Metric = Metric.LOGIT_DIFF
    baseline: Baseline = Baseline.COUNTERFACTUAL
    steps: int = 1
    threshold: float = 0.0
    max_edges: int | None = None
    positions: Positions = Positions.SUM

    def check(self) -> None:
        """Raise a `UserError` for a setting out of range."""
        if self.steps != 1:
            raise UnavailableSteps(
                f"--steps {self.steps} is not available yet: this engine does attribution patching, --steps 1; integrated gradients come later"
            )
        if not self.threshold >= 0:
            raise UserError(f"--threshold {self.threshold} is negative: it is compared with |effect|, give 0 or more")
        if self.max_edges is not None and self.max_edges < 1:
            raise UserError(f"--max-edges {self.max_edges} keeps nothing: give at least 1, or leave it out to keep all")
        require_attribution_metric(self.metric, self.steps)


class EdgeBlock(NamedTuple):
    """Edges into one site, as columns of equal length.

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


@dataclass(frozen=True)
class _CandidateGroup:
    """Changed features at cells with similar numbers of them; `index` None means all features, in order."""

    cells: Tensor  # (P,) cell = sequence · n_pos + pos
    index: Tensor | None  # (P, C) feature, 0 in the padding
    delta: Tensor  # (P, C) clean − baseline, 0 in the padding


@dataclass(frozen=True)
class Candidates:
    """The upstream nodes of one site that differ from the baseline."""

    groups: tuple[_CandidateGroup, ...]
    error_delta: Tensor  # (cells, d_in)
    live: Tensor  # (cells,) bool: something changed there

    @property
    def finite(self) -> bool:
        """Whether every change is a number."""
        return bool(self.error_delta.isfinite().all()) and all(bool(group.delta.isfinite().all()) for group in self.groups)


@dataclass(frozen=True)
class Prepared:
    """A batch ready for attribution. Values and gradients are (batch, pos, width) per site, without graph."""

    binding: Binding
    graph: SiteGraph
    dictionaries: Mapping[Site, Dictionary]
    settings: EdgeSettings
    run: Forward
    values: dict[Site, Tensor]  # chosen sites, and the constants of late starts
    gradients: dict[Site, Tensor]  # chosen sites, and the final residual stream
    candidates: dict[Site, Candidates]
    clean_metric: Tensor  # (batch,)
    corrupt_metric: Tensor  # (batch,)

    @property
    def bases(self) -> dict[Site, Basis]:
        return {site: dictionary.basis for site, dictionary in self.dictionaries.items()}

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, pos)."""
        batch, pos = self.run.values[self.graph.sites[0]].shape[:2]
        return int(batch), int(pos)


def prepare(
    binding: Binding,
    dictionaries: Mapping[Site, Dictionary],
    pairs: PairBatch,
    settings: EdgeSettings,
    means: Mapping[Site, NodeMeans] | None = None,
) -> Prepared:
    """Run the clean and corrupted sequences of a batch and find what changed between them.

    `means` is needed for the mean baseline. Raises `ZeroGradient` where the metric does not depend on a chosen site.
    """
    settings.check()
    pairs = pairs.to(binding.device)
    graph = binding.graph(dictionaries)
    bases = {site: dictionary.basis for site, dictionary in dictionaries.items()}
    run, gradients, clean_metric = _clean_run(binding, graph, bases, pairs, settings.metric)
    with torch.no_grad():
        corrupt = binding.forward(pairs.corrupt, bases)
        assert corrupt.logits is not None
        assert run.logits is not None
        corrupt_metric = evaluate(settings.metric, corrupt.logits, pairs.answer, pairs.wrong_answer, run.logits)
        candidates = {}
        for site, dictionary in dictionaries.items():
            changed = torch.arange(pairs.clean.shape[1], device=binding.device) >= pairs.first_difference[:, None]
            # Causality: before the first differing token both runs are equal, and rounding must not say otherwise.
            base = torch.where(changed[..., None], corrupt.values[site], run.values[site])
            candidates[site] = _candidates(dictionary, run.values[site], base, settings.baseline, (means or {}).get(site))
            if not candidates[site].finite:
                raise NotFinite(f"nodes of {site.name} are not finite in {run.values[site].dtype}: take --dtype float32")
    return Prepared(
        binding, graph, dictionaries, settings, run, dict(run.values), gradients, candidates, clean_metric.detach(), corrupt_metric
    )


def _clean_run(
    binding: Binding, graph: SiteGraph, bases: Mapping[Site, Basis], pairs: PairBatch, metric: Metric
) -> tuple[Forward, dict[Site, Tensor], Tensor]:
    """The clean run with every chosen site's value and its gradient G = ∂m/∂x, from one backward pass."""
    final = Site(SiteKind.RESID, binding.n_layers - 1)
    constants = {c for site in graph.sites for c in LocalFunction(binding, graph, site, bases).constants}
    recorded = {**dict.fromkeys(constants | {final}, Basis.RESIDUAL), **bases}
    first = graph.sites[0]
    # The graph of the backward pass starts at the residual stream that the first chosen layer reads.
    start = Site(SiteKind.RESID, first.layer - 1) if first.layer > 0 else EMBED
    with torch.enable_grad():
        run = binding.forward(pairs.clean, recorded, patches={start: lambda x: x.detach().requires_grad_()}, keep_attention=True)
        assert run.logits is not None
        value = evaluate(metric, run.logits, pairs.answer, pairs.wrong_answer, run.logits.detach())
        wanted = list(dict.fromkeys([*bases, final]))
        grads = torch.autograd.grad(value.sum(), [run.values[site] for site in wanted])
    gradients = dict(zip(wanted, grads, strict=True))
    for site in wanted:
        if not gradients[site].isfinite().all():
            raise NotFinite(f"the gradient of {metric.value} at {site.name} is not finite in {run.logits.dtype}: take --dtype float32")
        if not gradients[site].any():
            raise ZeroGradient(f"the gradient of {metric.value} is zero everywhere at {site.name}: no effect can be attributed through it")
    run.values = {site: x.detach() for site, x in run.values.items()}
    run.logits = run.logits.detach()
    return run, gradients, value


def _candidates(dictionary: Dictionary, clean: Tensor, base: Tensor, baseline: Baseline, means: NodeMeans | None) -> Candidates:
    """Nodes that differ between clean and baseline, in padded groups of similar size."""
    clean_nodes = dictionary.encode(clean).flatten(0, 1)  # (cells, d_sae)
    clean_error = (clean - dictionary.decode(clean_nodes.view(*clean.shape[:2], -1))).flatten(0, 1)  # (cells, d_in)
    if baseline is Baseline.COUNTERFACTUAL:
        base_nodes = dictionary.encode(base)
        base_error = (base - dictionary.decode(base_nodes)).flatten(0, 1)
        same = (base == clean).all(-1).flatten()
        delta = torch.where(same[:, None], 0, clean_nodes - base_nodes.flatten(0, 1))
        error_delta = torch.where(same[:, None], 0, clean_error - base_error)
    elif baseline is Baseline.ZERO:
        delta, error_delta = clean_nodes, clean_error
    else:
        if means is None:
            raise UnavailableBaseline(
                "the mean baseline needs the nodes' means: run `featlas ingest statistics` and name its run by --statistics-run"
            )
        delta, error_delta = clean_nodes - means.features.to(clean_nodes), clean_error - means.error.to(clean_error)
    live = delta.any(-1) | error_delta.any(-1)
    return Candidates(tuple(_group(delta)), error_delta, live)


def _group(delta: Tensor) -> Iterator[_CandidateGroup]:
    """Split cells into groups whose counts of changed features lie within a factor of two, so that padding wastes little."""
    counts = (delta != 0).sum(-1)  # (cells,)
    upper = int(counts.max())
    while upper > 0:
        lower = upper // 2
        cells = ((counts <= upper) & (counts > lower)).nonzero().flatten()
        if len(cells):
            rows = delta[cells]
            width = int(counts[cells].max())
            if 2 * width > delta.shape[1]:
                yield _CandidateGroup(cells, None, rows)
            else:
                index = (rows != 0).to(torch.uint8).topk(width, dim=-1).indices.sort(-1).values  # the changed ones first, then in order
                yield _CandidateGroup(cells, index, rows.gather(-1, index))
        upper = lower


def node_attributions(prepared: Prepared) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Attribution of every node to the metric, node by node at one step: G · W_dec · Δf, and G · Δerror.

    Yields (site, features (batch, pos, d_sae), errors (batch, pos)).
    """
    batch, pos = prepared.shape
    for site, dictionary in prepared.dictionaries.items():
        gradient = prepared.gradients[site].flatten(0, 1)  # (cells, d_in)
        candidates = prepared.candidates[site]
        features = gradient.new_zeros(len(gradient), dictionary.d_sae)
        projected = dictionary.project(gradient)  # (cells, d_sae)
        for group in candidates.groups:
            if group.index is None:
                features[group.cells] = projected[group.cells] * group.delta
            else:
                features[group.cells[:, None], group.index] = projected[group.cells].gather(-1, group.index) * group.delta
        errors = (gradient * candidates.error_delta).sum(-1)
        yield site, features.view(batch, pos, -1), errors.view(batch, pos)


@dataclass(frozen=True)
class _Rows:
    """Downstream nodes to expand, sorted by lane: where they sit and their cotangents in the site's output space."""

    cell: Tensor  # (n,)
    index: Tensor  # (n,)
    cotangent: Tensor  # (n, width)

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, which: Tensor) -> "_Rows":
        return _Rows(self.cell[which], self.index[which], self.cotangent[which])


def attribute(prepared: Prepared) -> Iterator[EdgeBlock]:
    """All edges of a batch, one block a downstream site, from `y` backwards."""
    graph, (batch, pos) = prepared.graph, prepared.shape
    sizes = {site: dictionary.d_sae + 1 for site, dictionary in prepared.dictionaries.items()}
    frontier = {
        site: torch.zeros(batch * pos, size, dtype=torch.bool, device=prepared.binding.device) for site, size in sizes.items()
    }
    for site in reversed(graph.sites):
        function = LocalFunction(prepared.binding, graph, site, prepared.bases)
        if not function.parents:
            continue
        rows = _output_rows(prepared) if site == OUTPUT else _rows(prepared, site, frontier[site])
        rows = rows.take(_reachable(prepared, function, rows.cell))
        if not len(rows):
            continue
        parts = []
        for coo in _edges_into(prepared, function, rows):
            for place in coo.src_site.unique().tolist():
                of_site = coo.src_site == place
                frontier[graph.sites[place]][coo.cell[of_site], coo.node[of_site]] = True
            parts.append(coo)
        if parts:
            yield _block(prepared, site, rows, _Coo(*(torch.cat(column) for column in zip(*parts, strict=True))))


def _output_rows(prepared: Prepared) -> _Rows:
    """One row a sequence: the output at its last position, cotangent ∂m/∂(final residual stream)."""
    batch, pos = prepared.shape
    final = prepared.gradients[Site(SiteKind.RESID, prepared.binding.n_layers - 1)]
    cells = torch.arange(batch, device=final.device) * pos + pos - 1
    return _Rows(cells, torch.zeros_like(cells), final[:, -1])


def _rows(prepared: Prepared, site: Site, frontier: Tensor) -> _Rows:
    """Rows of the frontier's nodes at `site`; features whose encoder derivative is zero have none."""
    dictionary = prepared.dictionaries[site]
    value, gradient = prepared.values[site].flatten(0, 1), prepared.gradients[site].flatten(0, 1)  # (cells, d_in)
    error = dictionary.d_sae
    wanted = frontier.clone()
    wanted[:, :error] &= dictionary.active(value)
    cell, index = wanted.nonzero(as_tuple=True)
    is_error = index == error
    cotangent = gradient.new_empty(len(cell), gradient.shape[1])
    at, feature = cell[~is_error], index[~is_error]
    first = (gradient[at] * dictionary.W_dec[feature]).sum(-1)  # ∂m/∂f
    cotangent[~is_error] = dictionary.active_rows(value[at], feature) * first[:, None]
    at = cell[is_error]
    # error = x − dec(enc(x)), hence ∂(G·error)/∂x = G − (∂enc/∂x)ᵀ W_dec G
    cotangent[is_error] = gradient[at] - dictionary.encode_vjp(value[at], dictionary.project(gradient[at]))
    return _Rows(cell, index, cotangent)


def _reachable(prepared: Prepared, function: LocalFunction, cell: Tensor) -> Tensor:
    """Which rows see any changed parent node: at their own position, or at or before it where attention is recomputed."""
    batch, pos = prepared.shape
    live = torch.stack([prepared.candidates[parent].live for parent in function.parents]).any(0)
    if function.mixes_positions:
        live = live.view(batch, pos).cummax(-1).values.flatten()
    return live[cell].nonzero().flatten()


def _edges_into(prepared: Prepared, function: LocalFunction, rows: _Rows) -> Iterator[_Coo]:
    """Batched VJPs of the local function over all rows, contracted and thresholded chunk by chunk."""
    _, pos = prepared.shape
    if not function.mixes_positions:
        yield from _grouped_by_lane(prepared, function, rows, torch.arange(len(rows), device=rows.cell.device), None)
        return
    # A row at position p has no gradient after p: rows of nearby positions go together, through a sequence cut behind the last.
    width = max(1, pos // LENGTHS)
    bucket = rows.cell % pos // width
    for number in bucket.unique().tolist():
        which = (bucket == number).nonzero().flatten()
        length = int((rows.cell[which] % pos).max()) + 1
        yield from _grouped_by_lane(prepared, function, rows, which, length)


def _grouped_by_lane(prepared: Prepared, function: LocalFunction, rows: _Rows, which: Tensor, length: int | None) -> Iterator[_Coo]:
    """Pack the rows `which` into lanes: sequences of `length` positions, or single cells where `length` is None."""
    lane_of = rows.cell[which] // prepared.shape[1] if length else rows.cell[which]
    lanes, lane, counts = lane_of.unique(return_inverse=True, return_counts=True)  # rows are sorted by cell, hence by lane
    slot = torch.arange(len(which), device=lane.device) - (counts.cumsum(0) - counts)[lane]
    upper = int(counts.max())
    while upper > 0:
        lower = upper // 2
        # Lanes with similar numbers of rows go together, so that few slots stay empty.
        chosen = ((counts <= upper) & (counts > lower)).nonzero().flatten()
        if len(chosen):
            place = torch.full((len(lanes),), -1, device=lane.device)
            place[chosen] = torch.arange(len(chosen), device=lane.device)
            here = (place[lane] >= 0).nonzero().flatten()
            yield from _lane_group(prepared, function, rows, _Packing(lanes[chosen], place[lane[here]], slot[here], which[here], length))
        upper = lower


class _Packing(NamedTuple):
    """Which rows go where: `row` sits in `slot` of lane number `lane`; `lanes` are the sequences or cells themselves.

    `length` is how many positions of a sequence a lane has, None where lanes are single cells.
    """

    lanes: Tensor
    lane: Tensor
    slot: Tensor
    row: Tensor
    length: int | None

    def at_lanes(self, value: Tensor) -> Tensor:
        """A site's value (batch, pos, width) at the lanes, (lanes, length or 1, width)."""
        return value.flatten(0, 1)[self.lanes][:, None] if self.length is None else value[self.lanes, : self.length]


def _lane_group(prepared: Prepared, function: LocalFunction, rows: _Rows, packing: _Packing) -> Iterator[_Coo]:
    """Run the local function once on the group's lanes, then one batched VJP per chunk of slots."""
    pos = prepared.shape[1]
    leaves = {parent: packing.at_lanes(prepared.values[parent]).requires_grad_() for parent in function.parents}
    constants = {site: packing.at_lanes(prepared.values[site]) for site in function.constants}
    run = prepared.run if packing.length in (None, pos) else prepared.run.shortened(packing.length)
    with torch.enable_grad(), _attention_kernels(packing.lanes.device):
        out = function(leaves, constants, run)  # (lanes, length or 1, width)
    _check_consistent(out, packing.at_lanes(prepared.values[function.target]), function.site)
    n_slots = int(packing.slot.max()) + 1
    step = max(1, CHUNK_BYTES // (out.shape[0] * out.shape[1] * _row_bytes(prepared.binding, function)))
    for low in range(0, n_slots, step):
        in_chunk = ((packing.slot >= low) & (packing.slot < low + step)).nonzero().flatten()
        slot, lane, row = packing.slot[in_chunk] - low, packing.lane[in_chunk], packing.row[in_chunk]
        n = min(step, n_slots - low)
        cotangent = out.new_zeros(n, *out.shape)  # (slots, lanes, length or 1, width)
        cotangent[slot, lane, torch.zeros_like(slot) if packing.length is None else rows.cell[row] % pos] = rows.cotangent[row]
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent, is_grads_batched=True, retain_graph=True)
        row_at = torch.full((n, len(packing.lanes)), -1, device=row.device)
        row_at[slot, lane] = row
        yield from _contract(prepared, dict(zip(leaves, grads, strict=True)), row_at, packing, rows.cell)


def _attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """On CUDA the plain attention kernel, whose backward pass takes a batch of cotangents at once; the fused ones would be looped over."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def _row_bytes(binding: Binding, function: LocalFunction) -> int:
    """Estimated bytes that one position of one row takes in a backward pass through the local function."""
    config = binding.module.config
    hidden = int(getattr(config, "intermediate_size", None) or 4 * binding.d_model)
    width = 8 * binding.d_model + 4 * hidden if function.mixes_positions or function.target.kind is SiteKind.MLP else 8 * binding.d_model
    return width * binding.dtype.itemsize


def _check_consistent(ours: Tensor, theirs: Tensor, site: Site) -> None:
    error = float((ours.detach() - theirs).float().norm() / theirs.float().norm().clamp_min(1e-30))
    tolerance = CONSISTENCY if theirs.dtype in (torch.float32, torch.float64) else 64 * float(torch.finfo(theirs.dtype).eps)
    if not error <= tolerance:
        raise InconsistentSite(
            f"{site.name} recomputed from its parents differs from the model's value by {error:.1e} (allowed {tolerance:.0e}): "
            "check that the dictionaries belong to this model and its sites"
        )


def _contract(
    prepared: Prepared, grads: Mapping[Site, Tensor], row_at: Tensor, packing: _Packing, row_cell: Tensor
) -> Iterator[_Coo]:
    """Effects of every changed parent node on the rows of one chunk, kept by threshold and by rank.

    `grads`: parent → (slots, lanes, length or 1, width); `row_at`: (slots, lanes) row or −1.
    """
    (batch, pos), lanes = prepared.shape, packing.lanes
    per_lane = packing.length or 1
    cells = lanes if packing.length is None else (lanes[:, None] * pos + torch.arange(per_lane, device=lanes.device)).flatten()
    # place: cell → its number among the lanes' flattened cells, −1 where the chunk has none
    place = torch.full((batch * pos,), -1, device=lanes.device)
    place[cells] = torch.arange(len(cells), device=lanes.device)
    found = []
    for parent, grad in grads.items():
        gradient = grad.flatten(1, 2)  # (slots, cells of the lanes, width)
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


def _effects(prepared: Prepared, site: Site, gradient: Tensor, place: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Effects of the changed nodes of one parent that pass the threshold, as (slot, cell, node, weight)."""
    dictionary, candidates = prepared.dictionaries[site], prepared.candidates[site]
    threshold = prepared.settings.threshold

    def kept(effect: Tensor) -> Tensor:
        return (effect.abs() >= threshold) & (effect != 0)

    for group in candidates.groups:
        here = (place[group.cells] >= 0).nonzero().flatten()
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
            effect = torch.bmm(local.transpose(0, 1), dictionary.W_dec[index].transpose(1, 2)) * delta[:, None]  # (P, slots, C)
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
    row = coo.row[order]
    start = torch.ones_like(row, dtype=torch.bool)
    start[1:] = row[1:] != row[:-1]
    first = torch.where(start, torch.arange(len(row), device=row.device), 0).cummax(0).values
    chosen = order[torch.arange(len(row), device=row.device) - first < limit].sort().values
    return _Coo(*(column[chosen] for column in coo))


def _block(prepared: Prepared, site: Site, rows: _Rows, coo: _Coo) -> EdgeBlock:
    """The block of edges into `site`, with positions aggregated as the settings say."""
    pos = prepared.shape[1]
    number = prepared.graph.sites.index(site)
    dest_cell, dest_index = rows.cell[coo.row], rows.index[coo.row]
    # On the host from here on: not every device has float64.
    weight = coo.weight.cpu().double()
    columns = [c.cpu() for c in (coo.cell // pos, coo.src_site, coo.node, dest_index, coo.cell % pos, dest_cell % pos)]
    if prepared.settings.positions is not Positions.KEEP:
        columns, weight = _over_positions(columns[:4], weight, prepared.settings.positions)
        columns += [torch.full_like(columns[0], -1)] * 2
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
