"""Five definitions of an edge (u, p) → (d, q), on the same edges.

With f_u the upstream node, Δf_u its change from baseline to clean, x_d the downstream site's value and m the metric:

- integrated gradients: the engine's edges, mean_α ∂m/∂f_d at f_d(α) · ∂f_d/∂f_u at x(α) · Δf_u (effective.py);
- attribution patching: the same at one step, the clean run;
- gradient product: (mean_α ∂m/∂x_d, the whole site d moved along its own path) · ∂f_d/∂f_u at the clean run · Δf_u, as in sparse feature
  circuits (Marks et al. 2024, arXiv 2403.19647, and their code). Into `y` there is no first factor: integrated gradients themselves;
- frozen: ∂m/∂f_d · ∂f_d/∂f_u · Δf_u at the clean run, the second factor (into `y` the metric's own derivative) with attention patterns and
  norms' denominators as constants (Ameisen et al. 2025). There MLPs are transcoders, nodes themselves; here they are linearised at the clean run;
- patching: m(clean) − m(clean, but node d as it is recomputed where only node u has its baseline value): nothing is approximated.

1. `compare_definitions` takes the engine's edges, streamed, and chooses the strongest of them and a random sample.
2. The definitions with derivatives at the clean run go through the engine's rows and packing, a row per chosen downstream node.
3. Patching runs the local function on patched inputs, encodes, and runs the model's tail, many edges at once, without gradients.
4. `agreement` says how far any two definitions agree.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import combinations

import numpy as np
import polars as pl
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from ..errors import UserError
from ..model.baselines import NodeMoments
from ..model.binding import Binding, LocalFunction
from ..model.dictionaries import Dictionary
from ..model.frozen import frozen
from ..model.products import fast_products
from ..model.sites import OUTPUT, Site
from ..model.tasks import PairBatch
from .budget import chunk, forward_bytes, position_width, tail_row_bytes
from .effective import attribute, edges_into, path_gradient
from .preparation import Prepared, prepare
from .rows import output_rows, rows_of
from .settings import EdgeSettings, Positions

FIRST_OF = (10, 100)
"""The numbers of strongest edges whose overlap is measured."""

FEATURES, ERRORS = "features", "errors"
ALL, BEFORE_OUTPUT = "all", "all but y"
TOP, SAMPLED = "top", "sampled"


class NothingToCompare(UserError):
    """There is no path along which definitions could differ, or no edge to compare them on."""


class Definition(StrEnum):
    """What the weight of an edge is; the module says how each is computed."""

    INTEGRATED_GRADIENTS = "integrated_gradients"
    ATTRIBUTION_PATCHING = "attribution_patching"
    GRADIENT_PRODUCT = "gradient_product"
    FROZEN = "frozen"
    PATCHING = "patching"


_WEIGHTS = dict.fromkeys([*(definition.value for definition in Definition), "rounding"], pl.Float64)
SCHEMA: dict[str, type[pl.DataType]] = {
    "sequence": pl.Int64, "src_site": pl.String, "src_index": pl.Int64, "src_pos": pl.Int64, "dest_site": pl.String, "dest_index": pl.Int64,
    "dest_pos": pl.Int64, "edges": pl.String, "dest_kind": pl.String, TOP: pl.Boolean, SAMPLED: pl.Boolean, **_WEIGHTS,
}  # fmt: skip
"""Columns of `compare_definitions`."""

_MEASURES = dict.fromkeys(["spearman", "pearson", "sign", "difference", *(f"top_{k}" for k in FIRST_OF)], pl.Float64)
AGREEMENT: dict[str, type[pl.DataType]] = {
    **dict.fromkeys(["edges", "dest", "chosen", "first", "second"], pl.String), "n": pl.Int64, **_MEASURES,
}  # fmt: skip
"""Columns of `agreement`."""


# --- the comparison -------------------------------------------------------------------------------------------------


def compare_batches(
    binding: Binding,
    dictionaries: Mapping[Site, Dictionary],
    batches: Iterable[PairBatch],
    settings: EdgeSettings,
    *,
    n_edges: int,
    n_sequences: int,
    seed: int = 0,
    means: Mapping[Site, NodeMoments] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """`compare_definitions` over batches of a task, `n_edges` shared out by their numbers of sequences, `n_sequences` in all.

    Instead of the place in its batch a sequence is named by its key. Raises `NothingToCompare` where no batch has an edge.
    """
    _check(settings, n_edges)
    frames, done = [], 0
    for number, batch in enumerate(batches):
        # Whole shares add up to n_edges: the edges due by now, less those that were due before.
        due = n_edges * (done + len(batch.pairs)) // n_sequences - n_edges * done // n_sequences
        done += len(batch.pairs)
        if due:
            frame = compare_definitions(prepare(binding, dictionaries, batch, settings, means), due, seed + number)
            keys = pl.Series(name="sequence", values=[pair.key for pair in batch.pairs], dtype=pl.String)
            frames.append(frame.with_columns(sequence=keys.gather(frame["sequence"])))
        if progress is not None:
            progress(done, n_sequences)
    if not any(len(frame) for frame in frames):
        raise NothingToCompare(f"no edge has an effect of at least {settings.threshold:g}: lower --threshold")
    return pl.concat(frames)


def compare_definitions(prepared: Prepared, n_edges: int, seed: int) -> pl.DataFrame:
    """Weights of chosen single-position edges of a batch by each definition, one row an edge.

    Of the edges between features `n_edges` are chosen, and as many of those with an error node at an end: half are the strongest by integrated
    gradients (`top`), half are drawn from all that the settings keep (`sampled`); an edge may be both. Columns: sequence (its place in the batch),
    src_site, src_index, src_pos, dest_site, dest_index, dest_pos, edges (features or errors), dest_kind, top, sampled, one for each
    `Definition`, and `rounding`: how far the metric's rounding alone moves it on the way that patching takes.
    Raises `NothingToCompare` at one step, where three of the definitions are the same.
    """
    _check(prepared.settings, n_edges)
    prepared = replace(prepared, settings=replace(prepared.settings, positions=Positions.KEEP))
    sites = prepared.graph.sites
    parts = []
    for (number,), part in _choose(prepared, n_edges, np.random.default_rng(seed)).partition_by("dest_site", as_dict=True).items():
        weights = _weights(prepared, _Edges.of(prepared, sites[number], part))
        parts.append(part.with_columns(pl.Series(name, value.cpu().double().numpy()) for name, value in weights.items()))
    if not parts:
        return pl.DataFrame(schema=SCHEMA)
    found = pl.concat(parts)
    names = pl.Series([site.name for site in sites], dtype=pl.String)
    kinds = pl.Series([site.kind.value for site in sites], dtype=pl.String)
    return found.with_columns(
        src_site=names.gather(found["src_site"]),
        dest_site=names.gather(found["dest_site"]),
        dest_kind=kinds.gather(found["dest_site"]),
        edges=pl.when("error").then(pl.lit(ERRORS)).otherwise(pl.lit(FEATURES)),
    ).select(pl.col(name).cast(kind) for name, kind in SCHEMA.items())


def _check(settings: EdgeSettings, n_edges: int) -> None:
    if settings.steps < 2:
        raise NothingToCompare(f"--steps {settings.steps} has no path: give 2 or more, or integrated gradients are attribution patching")
    if n_edges < 1:
        raise NothingToCompare(f"--edges {n_edges} leaves none to compare: give at least 1")


def _choose(prepared: Prepared, n_edges: int, generator: np.random.Generator) -> pl.DataFrame:
    """The strongest edges and a uniform sample of all, from the engine's stream, of which one site's edges at most are held."""
    d_sae = np.array([prepared.dictionaries[site].d_sae if site in prepared.dictionaries else -1 for site in prepared.graph.sites])
    n_top = (n_edges + 1) // 2
    kept = pl.DataFrame()
    for block in attribute(prepared):
        error = (d_sae[block.src_site] == block.src_index) | (d_sae[block.dest_site] == block.dest_index)
        # An edge is sampled if its random number is among the least: kept up block by block, this is a sample of all.
        new = pl.DataFrame(block._asdict() | {"error": error, "draw": generator.random(len(error))})
        kept = _marked(pl.concat([kept, new], how="diagonal"), n_top, n_edges - n_top)
    return kept.rename({"weight": Definition.INTEGRATED_GRADIENTS}) if len(kept) else pl.DataFrame(schema={"dest_site": pl.Int64})


def _marked(edges: pl.DataFrame, n_top: int, n_sampled: int) -> pl.DataFrame:
    """The edges that are among the strongest or the sampled ones so far, features and errors each by themselves."""
    strength = pl.col("weight").abs().rank("ordinal", descending=True).over("error")
    draw = pl.col("draw").rank("ordinal").over("error")
    return edges.with_columns(top=strength <= n_top, sampled=draw <= n_sampled).filter(pl.col(TOP) | pl.col(SAMPLED))


@dataclass(frozen=True)
class _Edges:
    """Chosen edges into one site, on the model's device; cells are sequence · n_pos + pos."""

    site: Site
    function: LocalFunction
    src_site: Tensor  # (n,) place in the graph's sites
    src_cell: Tensor
    src_index: Tensor
    cell: Tensor
    index: Tensor
    weight: Tensor  # integrated gradients

    @staticmethod
    def of(prepared: Prepared, site: Site, frame: pl.DataFrame) -> "_Edges":
        """From columns as the engine writes them."""
        column = lambda name: torch.from_numpy(frame[name].to_numpy().copy()).to(prepared.binding.device)
        sequence, pos = column("sequence"), prepared.shape[1]
        weight = column(Definition.INTEGRATED_GRADIENTS).to(prepared.clean_metric.dtype)
        return _Edges(
            site, LocalFunction(prepared.binding, prepared.graph, site, prepared.bases), column("src_site"), sequence * pos + column("src_pos"),
            column("src_index"), sequence * pos + column("dest_pos"), column("dest_index"), weight,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.cell)


def _weights(prepared: Prepared, edges: _Edges) -> dict[str, Tensor]:
    """Every other definition's weights of edges into one site, (n,) each, and the rounding of patching."""
    site = edges.site
    at_clean = replace(
        prepared, base={}, settings=replace(prepared.settings, steps=1, threshold=0.0, max_edges=None, screen=None, tail_dtype=None)
    )
    if site == OUTPUT:
        product = edges.weight
        with frozen(prepared.binding):
            own = {**prepared.gradients, prepared.end: _output_gradient(prepared)}
    else:
        product = _by_derivatives(replace(at_clean, gradients={**prepared.gradients, site: path_gradient(prepared, site)}), edges)
        own = prepared.gradients
    with frozen(prepared.binding):
        linear = _by_derivatives(replace(at_clean, gradients=own), edges)
    patching, rounding = _by_patching(prepared, edges)
    return {
        Definition.ATTRIBUTION_PATCHING: _by_derivatives(at_clean, edges),
        Definition.GRADIENT_PRODUCT: product,
        Definition.FROZEN: linear,
        Definition.PATCHING: patching,
        "rounding": rounding,
    }


# --- by derivatives at the clean run ----------------------------------------------------------------------------------


def _by_derivatives(prepared: Prepared, edges: _Edges) -> Tensor:
    """Weights by a batch prepared at one step, whose `gradients` are the first factor, through the engine: (n,), 0 where it has no edge."""
    if edges.site == OUTPUT:
        rows = output_rows(prepared, edges.function)
    else:
        cells, d_sae = prepared.shape[0] * prepared.shape[1], prepared.dictionaries[edges.site].d_sae
        wanted = torch.zeros(cells, d_sae + 1, dtype=torch.bool, device=edges.cell.device)
        wanted[edges.cell, edges.index] = True
        rows = rows_of(prepared, edges.function, wanted, torch.ones_like(wanted[:, 0]))
    # Both sides numbered alike: the downstream nodes of the chosen edges by rank, then the edges themselves.
    width = int(torch.cat([edges.index, rows.index]).max()) + 1
    nodes, node = (edges.cell * width + edges.index).unique(return_inverse=True)
    own = rows.cell * width + rows.index
    of_row = torch.searchsorted(nodes, own).clamp_max(len(nodes) - 1)
    of_row = torch.where(nodes[of_row] == own, of_row, len(nodes))  # y's row of a sequence without chosen edges matches none
    n_cells, n_src = prepared.shape[0] * prepared.shape[1], 1 + max(dictionary.d_sae for dictionary in prepared.dictionaries.values())
    code = lambda dest, site, cell, index: ((dest * len(prepared.graph.sites) + site) * n_cells + cell) * n_src + index
    codes, order = code(node, edges.src_site, edges.src_cell, edges.src_index).sort()
    weights = prepared.clean_metric.new_zeros(len(edges))
    for found in edges_into(prepared, edges.function, rows) if len(rows) else ():
        this = code(of_row[found.row], found.src_site, found.cell, found.node)
        place = torch.searchsorted(codes, this).clamp_max(len(codes) - 1)
        hit = codes[place] == this
        weights[order[place[hit]]] = found.weight[hit]
    return weights


def _output_gradient(prepared: Prepared) -> Tensor:
    """∂m/∂x of the site that the target reads, of x at the target's position alone and by the model as it now is: (batch, pos, width)."""
    gradient = torch.zeros_like(prepared.gradients[prepared.end])
    with torch.enable_grad():
        leaf = prepared.values[prepared.end][:, prepared.position].detach().requires_grad_()
        metric = prepared.measure(leaf, torch.arange(len(leaf), device=leaf.device))
        (gradient[:, prepared.position],) = torch.autograd.grad(metric.sum(), leaf)
    return gradient


# --- by patching ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _by_patching(prepared: Prepared, edges: _Edges) -> tuple[Tensor, Tensor]:
    """Exact effects of single edges and the metric's rounding, (n,) each.

    Every batch of patched runs has the unpatched ones beside it, so that an effect is no difference between two ways of computing.
    """
    change, out = _recomputed(prepared, edges)
    pos = prepared.shape[1]
    sequence, place = edges.cell // pos, edges.cell % pos
    effect, rounding = prepared.clean_metric.new_zeros(len(edges)), prepared.clean_metric.new_zeros(len(edges))
    if edges.site == OUTPUT:
        clean, patched = prepared.measure(out, sequence), prepared.measure(out + change, sequence)
        return clean - patched, (clean - prepared.clean_metric[sequence]).abs()
    tail = prepared.tail(edges.site)
    bucket = place // position_width(tail.length)
    for number in bucket.unique().tolist():
        which = (bucket == number).nonzero().flatten()
        start = int(place[which].min())
        for at in which.split(chunk(prepared.settings.memory, 2 * tail_row_bytes(prepared.binding, tail, start))):
            alone, back = sequence[at].unique(return_inverse=True)
            runs = torch.cat([sequence[at], alone])
            value = prepared.values[edges.site][runs, start : tail.length].clone()
            value[torch.arange(len(at), device=value.device), place[at] - start] += change[at]
            with fast_products(value):
                metric = prepared.measure(tail(value, runs, start), runs)
            clean = metric[len(at) + back]
            effect[at] = clean - metric[: len(at)]
            rounding[at] = (clean - prepared.clean_metric[sequence[at]]).abs()
    return torch.where(change.any(-1), effect, 0), rounding


def _recomputed(prepared: Prepared, edges: _Edges) -> tuple[Tensor, Tensor]:
    """The site at each edge's cell where only node u has its baseline value: how far node d alone moves it, and its unpatched value, (n, width)."""
    function, pos, memory = edges.function, prepared.shape[1], prepared.settings.memory
    moved = _source_changes(prepared, edges)
    clean = prepared.values[function.target]
    change, out = clean.new_zeros(len(edges), clean.shape[-1]), clean.new_zeros(len(edges), clean.shape[-1])
    dictionary = prepared.dictionaries.get(edges.site)
    bucket = edges.cell % pos // position_width(pos) if function.mixes_positions else torch.zeros_like(edges.cell)
    for number in bucket.unique().tolist():
        which = (bucket == number).nonzero().flatten()
        length = int((edges.cell[which] % pos).max()) + 1 if function.mixes_positions else None
        per_edge = 2 * forward_bytes(prepared.binding, function, length or 1) * (length or 1)
        if dictionary is not None:
            per_edge += 6 * dictionary.d_sae * clean.itemsize
        for at in which.split(chunk(memory, per_edge)):
            patched, unpatched = _run_patched(prepared, edges, moved, at, length)
            difference = patched - unpatched
            change[at] = difference if dictionary is None else _node_change(dictionary, patched, unpatched, edges.index[at])
            out[at] = unpatched
    return change, out


def _run_patched(prepared: Prepared, edges: _Edges, moved: Mapping[Site, Tensor], at: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
    """The local function of the edges `at` on patched and on clean inputs, (len(at), width) each at the edges' own cells.

    It runs on sequences of `length` positions, or on single cells where `length` is None.
    """
    function, pos = edges.function, prepared.shape[1]
    lane = edges.cell[at] if length is None else edges.cell[at] // pos
    place = torch.zeros_like(lane) if length is None else edges.cell[at] % pos
    alone, back = lane.unique(return_inverse=True)
    lanes = torch.cat([lane, alone])
    value_at = lambda value: value.flatten(0, 1)[lanes][:, None] if length is None else value[lanes, :length]
    own = torch.arange(len(at), device=lane.device)
    values = {}
    for parent in function.parents:
        value = value_at(prepared.values[parent])
        here = (edges.src_site[at] == prepared.graph.sites.index(parent)).nonzero().flatten()
        src_place = torch.zeros_like(here) if length is None else edges.src_cell[at[here]] % pos
        value[own[here], src_place] -= moved[parent][at[here]]
        values[parent] = value
    run = prepared.run if length in (None, pos) else prepared.run.shortened(length)
    with fast_products(values[function.parents[0]]):
        out = function(values, {site: value_at(prepared.values[site]) for site in function.constants}, run)
    return out[own, place], out[len(at) + back, place]


def _source_changes(prepared: Prepared, edges: _Edges) -> dict[Site, Tensor]:
    """Per parent by how much node u's change from the baseline moves its site, (n, width); 0 for edges from other parents."""
    found = {}
    for parent in edges.function.parents:
        candidates, dictionary = prepared.candidates[parent], prepared.dictionaries[parent]
        here = edges.src_site == prepared.graph.sites.index(parent)
        error = here & (edges.src_index == dictionary.d_sae)
        move = candidates.error_delta.new_zeros(len(edges), candidates.error_delta.shape[-1])
        move[error] = candidates.error_delta[edges.src_cell[error]]
        for group in candidates.groups:
            row_of = torch.full((len(candidates.live),), -1, device=here.device)
            row_of[group.cells] = torch.arange(len(group.cells), device=here.device)
            which = (here & ~error & (row_of[edges.src_cell] >= 0)).nonzero().flatten()
            row, node = row_of[edges.src_cell[which]], edges.src_index[which]
            if group.index is None:
                delta = group.delta[row, node]
            else:  # padding has change 0
                delta = torch.where(group.index[row] == node[:, None], group.delta[row], 0).sum(-1)
            move[which] = delta[:, None] * dictionary.directions(node)
        found[parent] = move
    return found


def _node_change(dictionary: Dictionary, patched: Tensor, clean: Tensor, index: Tensor) -> Tensor:
    """How far one node of each row, from its value at `clean` to that at `patched` (n, width), moves the site: (n, width)."""
    change = dictionary.encode(patched) - dictionary.encode(clean)  # (n, d_sae)
    feature = index < dictionary.d_sae
    move = patched - clean
    move[feature] = change[feature].gather(1, index[feature][:, None]) * dictionary.directions(index[feature])
    move[~feature] -= dictionary.lift(change[~feature])  # the error node's: all that is not the features'
    return move


# --- agreement ------------------------------------------------------------------------------------------------------


def agreement(frame: pl.DataFrame) -> pl.DataFrame:
    """How far each pair of definitions agrees on the edges of `compare_definitions`, one row per pair and part of the edges.

    Parts: edges between features or with an error node at an end (`edges`); into sites of one kind, into all, and into all but y
    (`dest`); all chosen ones, the strongest or the sampled ones (`chosen`). Columns: n; spearman and pearson correlation of the signed weights, null
    where one of them is constant; sign, the share of edges with the same sign (0 is a sign of its own); difference, Σ|first − second| / Σ|second|;
    top_k, the share of the k edges of greatest magnitude that both name, null where there are no more than k.
    """
    rows = []
    for kind, some in frame.group_by("edges", maintain_order=True):
        dests = {ALL: some, BEFORE_OUTPUT: some.filter(pl.col("dest_kind") != OUTPUT.name)}
        dests |= {str(dest): part for (dest,), part in some.group_by("dest_kind", maintain_order=True)}
        for dest, part in dests.items():
            for chosen, rest in ((ALL, part), (TOP, part.filter(TOP)), (SAMPLED, part.filter(SAMPLED))):
                named = {"edges": kind[0], "dest": dest, "chosen": chosen}
                rows += [named | row for row in _pairs(rest)] if len(rest) > 1 else []
    return pl.DataFrame(rows, schema=AGREEMENT)


def _pairs(frame: pl.DataFrame) -> Iterator[dict[str, object]]:
    """One row per pair of definitions."""
    for first, second in combinations(Definition, 2):
        a, b = (frame[name].to_numpy() for name in (first.value, second.value))
        total = float(np.abs(b).sum())
        yield {
            "first": first.value, "second": second.value, "n": len(a), "spearman": _correlation(stats.rankdata(a), stats.rankdata(b)),
            "pearson": _correlation(a, b), "sign": float((np.sign(a) == np.sign(b)).mean()),
            "difference": float(np.abs(a - b).sum()) / total if total else None, **{f"top_{k}": _overlap(a, b, k) for k in FIRST_OF},
        }  # fmt: skip


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's; None where one does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else None


def _overlap(a: np.ndarray, b: np.ndarray, k: int) -> float | None:
    """The share of the k entries of greatest magnitude that is common to both; of equal ones the earlier."""
    if len(a) <= k:
        return None
    strongest = lambda x: np.argsort(-np.abs(x), kind="stable")[:k]
    return len(np.intersect1d(strongest(a), strongest(b))) / k
