"""Downstream nodes as rows, with the first factor ∂m/∂f_d of each at every step of the path.

A row is a node (feature or error) at one cell, a position of one sequence. At step k its cotangent, in the site's output space, is

    feature:  c · ∂enc_j/∂x          with c = ∂m/∂f at f_d(α_k)
    error:    v − (∂enc/∂x)ᵀ W_dec v   with v = ∂m/∂x along the path, since error = x − dec(enc(x))

with the encoder's derivative at the site's recomputed value x(α_k). At the last step, α = 1, c and v come from the clean run's
one backward pass. For the steps before it:

- exact: the tail of the model runs once for each row and step at which the row's derivative is not zero;
- interpolated: for a feature, c is a function of the one number f. The tail runs at the end of each side of the range that f takes.
  It gives c there, and also m, and m(f_end) − m(f_clean) is the integral of c over the range: a quadratic with both end values and
  that integral. How far the integral is from the trapezoid's is the error estimate; above the tolerance the side is halved, and if
  that is not enough the row is computed exactly. Error nodes, whose path is a curve in many dimensions, are exact;
- clean: c and v stay at their values at α = 1.

The output's own rows need no such factor: their cotangent is the metric's gradient at what the target reads from x(α).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..model.binding import LocalFunction
from ..model.dictionaries import Dictionary
from ..model.products import fast_products
from ..model.sites import Site
from .budget import chunk, position_width, tail_row_bytes
from .preparation import Prepared
from .settings import FirstFactor, InconsistentSite, NotFinite

CONSISTENCY = 1e-3
"""Relative difference allowed between a site and its own recomputation from its parents' clean values."""

SAMPLED = 16
"""Evaluations that half-precision tails repeat in full precision to measure their error: about so many per site for features, and for errors."""

NOISE_FACTOR = 4.0
"""Differences of the metric below so many times its own rounding say nothing."""


class Cotangents(Protocol):
    """Rows of a site that go backward through its local function, sorted by cell: what the engine needs to know of them."""

    @property
    def cell(self) -> Tensor: ...  # (n,)

    @property
    def active(self) -> Tensor: ...  # (n, S) bool: the cotangent is not zero there

    @property
    def outs(self) -> Tensor: ...  # (S, cells, width) the site's value at each step

    def cotangents(self, dictionary: Dictionary | None, row: Tensor, step: Tensor) -> Tensor:
        """Cotangents of evaluations (n,): row and step of each → (n, width)."""
        ...


@dataclass(frozen=True)
class Rows:
    """Downstream nodes to expand, sorted by cell, with what their cotangents at each of the S steps are made of."""

    cell: Tensor  # (n,)
    index: Tensor  # (n,) feature, d_sae for the error node
    active: Tensor  # (n, S) bool: the derivative is not zero there
    first: Tensor  # (n, S) ∂m/∂f of features, 0 for errors
    vector: Tensor  # (n_error, S, width) ∂m/∂x of errors
    vector_of: Tensor  # (n,) place in `vector`, −1 for features
    outs: Tensor  # (S, cells, width) the site's value at each step

    def __len__(self) -> int:
        return len(self.cell)

    def cotangents(self, dictionary: Dictionary | None, row: Tensor, step: Tensor) -> Tensor:
        """Cotangents of evaluations (n,): row and step of each → (n, width). The output has no dictionary: its gradient itself."""
        if dictionary is None:
            return self.vector[self.vector_of[row], step]
        cotangent = self.vector.new_empty(len(row), dictionary.d_in)
        at = self.outs[step, self.cell[row]]  # (n, width)
        error = self.vector_of[row] >= 0
        feature = ~error
        cotangent[feature] = dictionary.active_rows(at[feature], self.index[row[feature]]) * self.first[row[feature], step[feature]][:, None]
        vector = self.vector[self.vector_of[row[error]], step[error]]
        cotangent[error] = vector - dictionary.encode_vjp(at[error], dictionary.project(vector))
        return cotangent


def output_rows(prepared: Prepared, function: LocalFunction) -> Rows:
    """One row a sequence: the output at the position that the target reads, cotangent ∂m/∂(value of the site that it reads)."""
    batch, pos = prepared.shape
    position = prepared.position
    gradient = prepared.gradients[prepared.end][:, position]  # (batch, width)
    sequence = torch.arange(batch, device=gradient.device)
    outs = outputs_at_steps(prepared, function)
    vector = gradient[:, None].repeat(1, len(outs), 1)  # (batch, S, width)
    for k in range(len(outs) - 1):
        with torch.enable_grad():
            leaf = outs[k].view(batch, pos, -1)[:, position].detach().requires_grad_()
            metric = prepared.measure(leaf, sequence)
        vector[:, k] = torch.autograd.grad(metric.sum(), leaf)[0]
    cell = sequence * pos + position
    active = torch.ones(batch, len(outs), dtype=torch.bool, device=cell.device)
    return Rows(cell, torch.zeros_like(cell), active, vector.new_zeros(batch, len(outs)), vector, sequence, outs)


def rows_of(prepared: Prepared, function: LocalFunction, frontier: Tensor, reachable: Tensor) -> Rows:
    """Rows of the frontier's nodes (cells, d_sae + 1) at reachable cells; features without derivative at every step have none."""
    site = function.site
    dictionary = prepared.dictionaries[site]
    wanted = frontier & reachable[:, None]
    # Behind the position that the target reads nothing acts on it.
    wanted &= (torch.arange(len(wanted), device=wanted.device) % prepared.shape[1] <= prepared.position)[:, None]
    outs = outputs_at_steps(prepared, function)
    cell, index, active, value = _feature_rows(prepared, dictionary, outs, wanted)
    error_cell = wanted[:, -1].nonzero().flatten()
    n, n_error, steps = len(cell), len(error_cell), len(outs)
    first, vector = _first_factors(prepared, site, _Path(outs, cell, index, active, value, error_cell))
    order = torch.cat([cell, error_cell]).sort(stable=True).indices
    device = cell.device
    return Rows(
        cell=torch.cat([cell, error_cell])[order],
        index=torch.cat([index, torch.full((n_error,), dictionary.d_sae, device=device)])[order],
        active=torch.cat([active, torch.ones(n_error, steps, dtype=torch.bool, device=device)])[order],
        first=torch.cat([first, first.new_zeros(n_error, steps)])[order],
        vector=vector,
        vector_of=torch.cat([torch.full((n,), -1, device=device), torch.arange(n_error, device=device)])[order],
        outs=outs,
    )


def outputs_at_steps(prepared: Prepared, function: LocalFunction) -> Tensor:
    """The site's value recomputed from its parents along the path, (S, cells, width); at the last step the clean value itself."""
    clean = prepared.values[function.target]
    batch, pos = prepared.shape
    outs = clean.new_empty(prepared.settings.steps, batch * pos, clean.shape[-1])
    outs[-1] = clean.flatten(0, 1)
    constants = {site: prepared.values[site] for site in function.constants}
    with torch.no_grad(), fast_products(clean):
        # The last step is recomputed too, to see that the parents are complete.
        for k, alpha in enumerate(prepared.alphas if prepared.settings.steps > 1 else ()):
            out = function({parent: at_alpha(prepared, parent, alpha) for parent in function.parents}, constants, prepared.run)
            if alpha == 1:
                check_consistent(out, clean, function.site, prepared.binding.precision)
            else:
                outs[k] = out.flatten(0, 1)
    return outs


def at_alpha(prepared: Prepared, site: Site, alpha: float) -> Tensor:
    """A chosen site's value on the path, x_base + α (x_clean − x_base)."""
    clean = prepared.values[site]
    return clean if alpha == 1 else torch.lerp(prepared.base[site], clean, alpha)


def check_consistent(ours: Tensor, theirs: Tensor, site: Site, precision: torch.dtype) -> None:
    """Raise `InconsistentSite` where a site's recomputation from clean parents is not its clean value; `precision` is the weights'."""
    size = theirs.float().norm(dim=-1)
    # A position's own size counts, so that one of a massive activation does not hide the others; but rounding goes by the larger ones.
    error = float(((ours.detach() - theirs).float().norm(dim=-1) / size.clamp_min(0.1 * float(size.mean()) + 1e-30)).max())
    tolerance = CONSISTENCY if precision in (torch.float32, torch.float64) else 64 * float(torch.finfo(precision).eps)
    if not error <= tolerance:
        raise InconsistentSite(
            f"{site.name} recomputed from its parents differs from the model's value by {error:.1e} (allowed {tolerance:.0e}): "
            "check that the dictionaries belong to this model and its sites"
        )


def _feature_rows(prepared: Prepared, dictionary: Dictionary, outs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wanted features that are active at any step: cell, index (n,), active and value (n, S); a chunk of cells at a time."""
    steps = len(outs)
    cells = wanted[:, :-1].any(-1).nonzero().flatten()
    step = chunk(prepared.settings.memory, steps * dictionary.d_sae * 3 * outs.itemsize)
    found = []
    for low in range(0, len(cells), step):
        part = cells[low : low + step]
        active = torch.stack([dictionary.active(out[part]) for out in outs], dim=-1) & wanted[part, :-1, None]  # (c, d_sae, S)
        at, index = active.any(-1).nonzero(as_tuple=True)
        value = torch.stack([dictionary.encode(out[part])[at, index] for out in outs], dim=-1)  # (n, S)
        found.append((part[at], index, active[at, index], value))
    if not found:
        none = cells.new_zeros(0)
        return none, none, torch.zeros(0, steps, dtype=torch.bool, device=none.device), outs.new_zeros(0, steps)
    cell, index, active, value = (torch.cat(column) for column in zip(*found, strict=True))
    return cell, index, active, value


# --- the first factor -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Path:
    """Values of a site's wanted nodes along the path: features (n, S), and the cells of the errors."""

    outs: Tensor
    cell: Tensor
    index: Tensor
    active: Tensor
    value: Tensor
    error_cell: Tensor


def _first_factors(prepared: Prepared, site: Site, path: _Path) -> tuple[Tensor, Tensor]:
    """∂m/∂f of features (n, S), and ∂m/∂x on the errors' paths (n_error, S, width)."""
    dictionary, steps = prepared.dictionaries[site], len(path.outs)
    gradient = prepared.gradients[site].flatten(0, 1)  # (cells, width)
    at_clean = _along(gradient, dictionary, path.cell, path.index, prepared.settings.memory)  # (n,)
    first = at_clean[:, None].repeat(1, steps)
    vector = gradient[path.error_cell][:, None].repeat(1, steps, 1)
    how = prepared.settings.first_factor
    prepared.tally.rows += len(path.cell) + len(path.error_cell)
    if steps == 1 or how is FirstFactor.CLEAN:
        return first, vector
    tails = _Tails(prepared, site)
    _exact_errors(prepared, site, path, tails, vector)
    if how is FirstFactor.INTERPOLATED and prepared.settings.tolerance > 0:
        left = _interpolate(prepared, site, path, tails, first)
        prepared.tally.fallbacks += len(left)
    else:
        left = torch.arange(len(path.cell), device=path.cell.device)
    _exact_features(prepared, site, path, tails, first, left)
    return first, vector


def _along(gradient: Tensor, dictionary: Dictionary, cell: Tensor, index: Tensor, memory: int) -> Tensor:
    """G[cell] · W_dec[index] for each row, (n,)."""
    step = chunk(memory, 2 * gradient.shape[1] * gradient.itemsize)
    parts = [
        (gradient[c] * dictionary.directions(i)).sum(-1)
        for c, i in zip(cell.split(step), index.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else gradient.new_zeros(0)


def _exact_errors(prepared: Prepared, site: Site, path: _Path, tails: "_Tails", vector: Tensor) -> None:
    """Fill in ∂m/∂x where the error node moves along its path, at every step before the last."""
    dictionary, cell = prepared.dictionaries[site], path.error_cell
    error_at = lambda x: x - dictionary.decode(dictionary.encode(x))
    clean_error = error_at(path.outs[-1][cell]) if len(cell) else path.outs[-1][:0]
    row, step = torch.ones(len(cell), len(path.outs) - 1, dtype=torch.bool, device=cell.device).nonzero(as_tuple=True)
    change = lambda at: error_at(path.outs[step[at], cell[row[at]]]) - clean_error[row[at]]
    for at, gradient, _ in tails(cell[row], change):
        vector[row[at], step[at]] = gradient


def _exact_features(prepared: Prepared, site: Site, path: _Path, tails: "_Tails", first: Tensor, left: Tensor) -> None:
    """Fill in ∂m/∂f of the rows `left` at every step before the last at which they are active."""
    dictionary = prepared.dictionaries[site]
    row, step = path.active[left, :-1].nonzero(as_tuple=True)
    row = left[row]
    directions = lambda at: dictionary.directions(path.index[row[at]])
    change = lambda at: (path.value[row[at], step[at]] - path.value[row[at], -1])[:, None] * directions(at)
    for at, gradient, _ in tails(path.cell[row], change):
        first[row[at], step[at]] = (gradient * directions(at)).sum(-1)


class _Segments(NamedTuple):
    """Parts of features' ways, from `near` (closer to the clean value) to `far`, as shifts of f; c and m at both ends, each (n,)."""

    row: Tensor
    near: Tensor
    far: Tensor
    near_slope: Tensor
    far_slope: Tensor
    near_metric: Tensor
    far_metric: Tensor

    def take(self, which: Tensor) -> "_Segments":
        return _Segments(*(column[which] for column in self))

    def halves(self, slope: Tensor, metric: Tensor) -> "_Segments":
        """Both halves of every segment, given c and m in the middle."""
        middle = (self.near + self.far) / 2
        first = _Segments(self.row, self.near, middle, self.near_slope, slope, self.near_metric, metric)
        second = _Segments(self.row, middle, self.far, slope, self.far_slope, metric, self.far_metric)
        return _Segments(*(torch.cat(both) for both in zip(first, second, strict=True)))


def _interpolate(prepared: Prepared, site: Site, path: _Path, tails: "_Tails", first: Tensor) -> Tensor:
    """Fill in ∂m/∂f between the clean value and the end of each side of its range; returns the rows that are to be computed exactly.

    A side whose estimated error is above the tolerance is halved once before its row is given up.
    """
    dictionary, sequence_of = prepared.dictionaries[site], path.cell // prepared.shape[1]
    shift = torch.where(path.active, path.value - path.value[:, -1:], 0)  # (n, S), 0 at the last step
    ends = torch.stack([shift.amin(-1), shift.amax(-1)], dim=-1)  # (n, 2): the two sides of the clean value

    def at_shifts(row: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        """c and m where feature `row` is moved by `by`."""
        directions = lambda at: dictionary.directions(path.index[row[at]])
        slope, metric = torch.empty_like(by), torch.empty_like(by)
        for at, gradient, value in tails(path.cell[row], lambda at: by[at][:, None] * directions(at)):
            slope[at], metric[at] = (gradient * directions(at)).sum(-1), value
        return slope, metric

    row, side = (ends != 0).nonzero(as_tuple=True)
    far = ends[row, side]
    slope, metric = at_shifts(row, far)
    whole = _Segments(row, torch.zeros_like(far), far, first[row, -1], slope, tails.clean_metric[sequence_of[row]], metric)
    _, _, failed = _bend(whole, prepared.settings.tolerance, tails.noise[sequence_of[row]])
    hard = whole.take(failed)
    halves = hard.halves(*at_shifts(hard.row, (hard.near + hard.far) / 2))
    segments = _Segments(*(torch.cat(both) for both in zip(whole.take(~failed), halves, strict=True)))
    bend, estimate, failed = _bend(segments, prepared.settings.tolerance, tails.noise[sequence_of[segments.row]])
    left = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    left[segments.row[failed]] = True
    _fill(first, segments, bend, torch.where(path.active, shift, 0))
    good = ~left[segments.row]
    # What the quadratic corrects is counted as its error: an upper estimate, since its own is of the next order.
    prepared.tally.interpolation_error += float(estimate[good].sum())
    prepared.tally.interpolated += float((segments.far_metric - segments.near_metric).abs()[good].sum())
    return left.nonzero().flatten()


def _bend(part: _Segments, tolerance: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By how much the mean of c lies beyond the trapezoid's, 0 where that is rounding; its part in m; whether that is too much: each (n,)."""
    span = part.far - part.near
    bend = (part.far_metric - part.near_metric) / span - (part.near_slope + part.far_slope) / 2
    estimate, floor = (bend * span).abs(), NOISE_FACTOR * noise
    allowed = tolerance * span.abs() * torch.maximum(part.near_slope.abs(), part.far_slope.abs())
    return torch.where(estimate > floor, bend, 0), estimate, ~(estimate <= torch.maximum(allowed, floor))


def _fill(first: Tensor, part: _Segments, bend: Tensor, shift: Tensor) -> None:
    """Write c at the steps whose shift (n, S) lies in a segment: the quadratic with the segment's slopes at its ends and its integral."""
    here = shift[part.row]  # (segments, S)
    near, far = part.near[:, None], part.far[:, None]
    t = (here - near) / (far - near)
    inside = (here != 0) & (t > 0) & (t <= 1)
    c = part.near_slope[:, None] + t * (part.far_slope - part.near_slope)[:, None] + 6 * t * (1 - t) * bend[:, None]
    segment, step = inside.nonzero(as_tuple=True)
    first[part.row[segment], step] = c[segment, step]


class _Tails:
    """Batched runs of the tail behind one site: clean sequences with one position moved, and ∂m/∂x there."""

    def __init__(self, prepared: Prepared, site: Site) -> None:
        self.prepared, self.site, self.tail = prepared, site, prepared.tail(site)
        self.clean_metric, self.noise = self._reference()

    def _reference(self) -> tuple[Tensor, Tensor]:
        """The metric of the unmoved tail (batch,), and how far the tail's rounding puts it from the whole model's, (batch,)."""
        batch = self.prepared.shape[0]
        whole, parts = self.prepared.clean_metric, []
        size = chunk(self.prepared.settings.memory, tail_row_bytes(self.prepared.binding, self.tail, 0))
        for sequence in torch.arange(batch, device=whole.device).split(size):
            value = self.prepared.values[self.site][sequence, : self.tail.length]
            with torch.no_grad(), self._precision():
                parts.append(self.prepared.measure(self.tail(value, sequence, 0), sequence).to(whole.dtype))
        metric = torch.cat(parts)
        return metric, torch.maximum((metric - whole).abs(), torch.finfo(whole.dtype).eps * whole.abs().clamp_min(1))

    def _precision(self, full: bool = False) -> AbstractContextManager[object]:
        dtype = self.prepared.settings.tail_type
        value = self.prepared.values[self.site]
        if dtype is None or full:
            return fast_products(value)
        return self.prepared.binding.autocast(dtype)

    def __call__(self, cell: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run the tail for evaluations at `cell` (n,), each with change(evaluations) (m, width) added to the clean value there.

        Yields (evaluations (m,), ∂m/∂x at the cell (m, width), m (m,)) chunk by chunk.
        """
        prepared, pos = self.prepared, self.prepared.shape[1]
        prepared.tally.evaluations += len(cell)
        width = position_width(self.tail.length)
        bucket = cell % pos // width
        numbers = bucket.unique().tolist()
        for number in numbers:
            which = (bucket == number).nonzero().flatten()
            start = number * width
            per_row = tail_row_bytes(prepared.binding, self.tail, start)
            sampled = 0
            for at in which.split(chunk(prepared.settings.memory, per_row)):
                moved = change(at)
                gradient, metric = self._run(cell[at], moved, start)
                if not (gradient.isfinite().all() and metric.isfinite().all()):
                    kind = prepared.settings.tail_dtype or moved.dtype
                    raise NotFinite(f"runs of the model behind {self.site.name} are not finite in {kind}: take a wider --tail-dtype or --dtype")
                if prepared.settings.tail_type is not None and not sampled:
                    some = torch.arange(0, len(at), max(1, len(at) * len(numbers) // SAMPLED), device=at.device)
                    self._compare(cell[at[some]], moved[some], start, gradient[some])
                    sampled += len(some)
                yield at, gradient, metric

    def _run(self, cell: Tensor, change: Tensor, start: int, full: bool = False) -> tuple[Tensor, Tensor]:
        prepared, pos = self.prepared, self.prepared.shape[1]
        sequence, place = cell // pos, cell % pos - start
        value = prepared.values[self.site][sequence, start : self.tail.length]
        with torch.enable_grad(), self._precision(full):
            leaf = change.detach().requires_grad_()
            moved = value.index_put((torch.arange(len(cell), device=cell.device), place), leaf, accumulate=True)
            metric = prepared.measure(self.tail(moved, sequence, start), sequence)
            (gradient,) = torch.autograd.grad(metric.sum(), leaf)
        return gradient, metric.detach().to(gradient.dtype)

    def _compare(self, cell: Tensor, change: Tensor, start: int, half: Tensor) -> None:
        """Repeat some evaluations in full precision and note the difference."""
        full, _ = self._run(cell, change, start, full=True)
        self.prepared.tally.tail_error += float((half - full).abs().sum())
        self.prepared.tally.tail_scale += float(full.abs().sum())
