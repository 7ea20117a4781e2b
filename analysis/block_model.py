"""A dense Gaussian stochastic block model: a complete weighted graph, fitted by matrix algebra alone.

The weight of every pair of nodes is normal, with a mean and a variance that belong to the pair's two blocks. Mean and variance are integrated out
under one broad prior, so that a partition has a description length in nats, lower being better:

    L(b) = −Σ_{r≤s} ln p(weights between r and s)  −  ln P(b).

- p(x₁ … x_N) is the marginal likelihood under a normal-inverse-χ² prior (κ₀ = 1, ν₀ = 3; m₀, v₀: mean and variance of all weights):
  Γ(ν_N/2)/Γ(ν₀/2) · √(κ₀/κ_N) · (ν₀v₀)^{ν₀/2} / (ν_N v_N)^{ν_N/2} · π^{−N/2}, with κ_N = κ₀ + N, ν_N = ν₀ + N and
  ν_N v_N = ν₀v₀ + Σ(x − x̄)² + N κ₀/κ_N (x̄ − m₀)²  (Murphy 2007; the non-microcanonical real-normal weights of Peixoto 2018, Phys. Rev. E 97, 012306).
- −ln P(b) = ln C(n − 1, B − 1) + ln n! − Σ_r ln n_r! + ln n  (Peixoto 2017, Phys. Rev. E 95, 012317). The graph is complete: it has no other term.

A fit has four steps; nothing in it loops over nodes or pairs:

1. `embedding`: the leading eigenvectors times eigenvalues, by randomised subspace iteration, every row then scaled to length one. The rows of
   two nodes of one block point the same way whatever their loadings are, which is what a degree correction does in a sparse graph.
2. `_start`: Ward's tree on these rows, cut into about 2.2 √n blocks: finer than what the description length asks for.
3. `_reassigned`: all nodes at once to the block that their weights fit best, as in Lloyd's algorithm, for as long as the description length falls.
4. `_merged`: the pairs of blocks whose merging costs least are merged, down to one block. Each merge is a level of the path.

The description length alone is no choice of a level: the entries of a correlation matrix share their rows' sampling noise, so that it asks for too
many blocks (`levels` has rules).
"""

import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped]
from sklearn.cluster import KMeans  # type: ignore[import-untyped]
from torch import Tensor

from ..errors import UserError
from .parcellation import FloatArray, IntArray, PartitionPath, by_size

METHOD = "dense-sbm"

PRIOR_COUNT, PRIOR_FREEDOM = 1.0, 3.0
"""κ₀ and ν₀. Sharper priors lower their own description length and split far too much."""

START_PER_ROOT, START_AT_LEAST = 2.2, 40
"""Blocks at the start: so many times √n, and at least so many where there are nodes enough."""

OVERSAMPLING, POWER_ITERATIONS = 10, 4
"""Of the subspace iteration (Halko, Martinsson and Tropp 2011)."""

WARD_LIMIT = 12_000
"""Up to so many nodes Ward's tree is built (n²/2 distances in memory); beyond, k-means on the same rows makes the start."""

REASSIGNMENTS = 10
MERGED_SHARE, FORCED_SHARE, SINGLY_BELOW = 0.1, 0.02, 60
"""A round merges up to this share of the blocks, the first where each merge lowers the description length, the second where not; few blocks are
merged one pair at a time."""

CELLS_AT_ONCE = 1 << 21
"""How many hypothetical block pairs are weighed at a time when merges are: what bounds the memory."""


class BadWeights(UserError):
    """Weights that are no symmetric finite matrix, or labels that are not of its nodes."""


class BlockSums(NamedTuple):
    """What a partition makes of the weights, float64 on the CPU. sizes: (B,). pairs, total, squares: (B, B) symmetric: the number of pairs of nodes
    between two blocks, the sum of their weights and of the weights' squares; on the diagonal each pair of a block's nodes counts once."""

    sizes: Tensor
    pairs: Tensor
    total: Tensor
    squares: Tensor


class Weights(NamedTuple):
    """Weights minus their mean, the diagonal 0, and their squares, (n, n) on a device. mean, variance: of all pairs: the prior's m₀ and v₀."""

    centred: Tensor
    squares: Tensor
    mean: float
    variance: float


def dense_block_model(weights: FloatArray, *, seed: int = 0, device: str = "cpu", start_blocks: int | None = None) -> PartitionPath:
    """The path of partitions that the model finds, from its start to one block, a level for each merge, with every level's description length.

    weights: (n, n) symmetric, the diagonal is ignored; Fisher weights of correlations. start_blocks: how many the path begins with, at most
    (about 2.2 √n unless given). The same seed gives the same path. Needs about four (n, n) matrices. Raises `BadWeights`.
    """
    began = time.perf_counter()
    known = prepared(weights, device)
    n = len(weights)
    wanted = default_start(n) if start_blocks is None else min(n, max(1, start_blocks))
    labels, rounds = _reassigned(known, _start(known, wanted, seed))
    levels, lengths = _merged(block_sums(known, labels), known.variance, labels.cpu().numpy())
    best = int(np.argmin(lengths))
    info: dict[str, Any] = {
        "seed": seed, "device": device, "start_blocks": int(levels[0].max()) + 1, "reassignments": rounds,
        "least_description_length_blocks": int(levels[best].max()) + 1, "torch": torch.__version__, "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    return PartitionPath(METHOD, levels, lengths, info)


def description_length(weights: FloatArray, labels: IntArray) -> float:
    """L(b) in nats of a partition, labels (n,), of weights (n, n)."""
    known = prepared(weights)
    _, compact = np.unique(labels, return_inverse=True)
    if compact.shape != (len(weights),):
        raise BadWeights(f"labels of shape {np.shape(labels)} for {len(weights)} nodes")
    return _length(block_sums(known, torch.from_numpy(compact)), known.variance)


def default_start(n: int) -> int:
    """How many blocks a path of n nodes begins with."""
    return min(n, max(START_AT_LEAST, round(START_PER_ROOT * math.sqrt(n))))


def prepared(weights: FloatArray, device: str = "cpu", mean: float | None = None) -> Weights:
    """Weights as they are worked on: checked, minus `mean` (their own unless given), the diagonal 0. float32 where the device has no float64."""
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not len(weights):
        raise BadWeights(f"weights have shape {weights.shape}: a square matrix of at least one node is needed")
    kept = torch.as_tensor(weights, dtype=torch.float64).clone().fill_diagonal_(0)  # (n, n)
    pairs = max(1, len(kept) * (len(kept) - 1))
    total = float(kept.sum())
    if not math.isfinite(total):
        bad = int((~torch.isfinite(kept)).sum())
        raise BadWeights(f"{bad} weights are not finite: leave out the features that are constant, or without samples, before correlating")
    scale = float(kept.abs().max())
    if not _symmetric(kept, 1e-6 * scale):
        raise BadWeights("the weights are not symmetric: a pair of nodes has one weight")
    centre = total / pairs if mean is None else mean
    kept.sub_(centre).fill_diagonal_(0)  # centred sums of squares lose no digits to the mean
    squares = kept * kept
    # Of equal weights rounding errors alone are left: below this they must not count as structure.
    variance = max(float(squares.sum()) / pairs, 1e-12 * max(1.0, scale * scale))
    from ..model.loading import parse_device

    parse_device(device)  # one device: weights of regions are not spread
    dtype = torch.float32 if device.startswith("mps") else torch.float64
    return Weights(kept.to(device, dtype), squares.to(device, dtype), centre, variance)


def _symmetric(matrix: Tensor, tolerance: float, rows: int = 512) -> bool:
    """Whether no entry differs from its mirror image by more, a few rows at a time."""
    return all(
        bool(((matrix[i : i + rows] - matrix[:, i : i + rows].T).abs() <= tolerance).all())
        for i in range(0, len(matrix), rows)
    )  # fmt: skip


def block_sums(weights: Weights, labels: Tensor) -> BlockSums:
    """Sums over the pairs of nodes between each two blocks. labels: (n,) 0 … B − 1, each used."""
    n_blocks = int(labels.max()) + 1
    own = labels.to(weights.centred.device)
    return _sums_of(row_sums(weights.centred, own, n_blocks), row_sums(weights.squares, own, n_blocks), labels.cpu(), n_blocks)


def row_sums(matrix: Tensor, labels: Tensor, n_blocks: int) -> Tensor:
    """What a symmetric matrix has between each block and each node, (B, n)."""
    if matrix.device.type == "cpu":
        return matrix.new_zeros(n_blocks, len(matrix)).index_add_(0, labels, matrix)
    # Adding by index uses atomics on a GPU, whose order differs from run to run.
    return torch.nn.functional.one_hot(labels, n_blocks).to(matrix.dtype).T @ matrix


def _sums_of(first: Tensor, second: Tensor, labels: Tensor, n_blocks: int) -> BlockSums:
    """Block sums from sums by block and node, both (B, n)."""
    sizes = torch.bincount(labels, minlength=n_blocks).to(torch.float64)
    pairs = torch.outer(sizes, sizes) - torch.diag(sizes)
    total, squares = (
        torch.zeros(n_blocks, n_blocks, dtype=torch.float64).index_add_(1, labels, sums.to("cpu", torch.float64)) for sums in (first, second)
    )
    halves = torch.ones(n_blocks, n_blocks, dtype=torch.float64).fill_diagonal_(0.5)  # inside a block each pair was met twice
    return BlockSums(sizes, pairs * halves, (total + total.T) / 2 * halves, (squares + squares.T) / 2 * halves)


def folded(sums: BlockSums, into: Tensor) -> BlockSums:
    """The sums of a coarser partition: block r becomes part of block into[r], (B,)."""
    n_blocks = int(into.max()) + 1

    def fold(matrix: Tensor) -> Tensor:
        whole = matrix + torch.diag(matrix.diagonal())
        rows = matrix.new_zeros(n_blocks, matrix.shape[1]).index_add_(0, into, whole)
        both = matrix.new_zeros(n_blocks, n_blocks).index_add_(1, into, rows)
        return both - torch.diag(both.diagonal() / 2)

    return BlockSums(sums.sizes.new_zeros(n_blocks).index_add_(0, into, sums.sizes), fold(sums.pairs), fold(sums.total), fold(sums.squares))


def log_marginal(pairs: Tensor, total: Tensor, squares: Tensor, variance: float) -> Tensor:
    """ln p of N weights with sum and sum of squares as given (weights minus m₀), elementwise; 0 where there are none."""
    prior = PRIOR_FREEDOM * variance
    spread = prior + (squares - total * total / (PRIOR_COUNT + pairs)).clamp_min(0)  # Σ(x − x̄)² + N κ₀/κ_N x̄²: x̄ = total/N cancels N
    freedom = (PRIOR_FREEDOM + pairs) / 2
    constant = PRIOR_FREEDOM / 2 * math.log(prior) - math.lgamma(PRIOR_FREEDOM / 2)
    return torch.lgamma(freedom) - freedom * spread.log() - (1 + pairs / PRIOR_COUNT).log() / 2 - pairs * (math.log(math.pi) / 2) + constant


def partition_length(sizes: Tensor) -> float:
    """−ln P(b) of block sizes (B,), in nats."""
    n, b = float(sizes.sum()), len(sizes)
    choose = math.lgamma(n) - math.lgamma(b) - math.lgamma(n - b + 1)
    return choose + math.lgamma(n + 1) - float(torch.lgamma(sizes + 1).sum()) + math.log(n)


def _length(sums: BlockSums, variance: float) -> float:
    """The description length of a partition in nats."""
    return partition_length(sums.sizes) - float(log_marginal(sums.pairs, sums.total, sums.squares, variance).triu().sum())


def embedding(weights: Weights, rank: int, seed: int) -> Tensor:
    """Leading eigenvectors times eigenvalues by size, rows of length one (or 0), (n, rank), on the device."""
    matrix = weights.centred
    n = len(matrix)
    width = min(n, rank + OVERSAMPLING)
    start = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))  # on the CPU: one start for all devices
    basis = start.to(matrix.device, matrix.dtype)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q  # (n, width)
    small = basis.T @ (matrix @ basis)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    leading = values.abs().argsort(descending=True)[:rank]
    rows = (basis @ vectors[:, leading]) * values[leading].abs()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _start(weights: Weights, n_blocks: int, seed: int) -> Tensor:
    """Labels (n,) of the start, on the device: blocks of one where there are as many as nodes."""
    n = len(weights.centred)
    if n_blocks >= n:
        return torch.arange(n, device=weights.centred.device)
    rows = embedding(weights, n_blocks, seed).cpu().to(torch.float64).numpy()
    if n <= WARD_LIMIT:
        found = fcluster(linkage(rows, "ward"), n_blocks, "maxclust")
    else:
        found = KMeans(n_blocks, n_init=1, max_iter=30, random_state=seed).fit_predict(rows)
    return torch.from_numpy(by_size(found)).to(weights.centred.device)


def _reassigned(weights: Weights, labels: Tensor) -> tuple[Tensor, int]:
    """Labels after moving all nodes at once to where they fit best, while that lowers the description length, and how often it did."""
    first, second, sums = _all_sums(weights, labels)
    length = _length(sums, weights.variance)
    for done in range(REASSIGNMENTS):
        better = torch.unique(_best_blocks(first, second, sums, labels, weights.variance), return_inverse=True)[1]
        if torch.equal(better, labels):
            return labels, done
        next_first, next_second, next_sums = _all_sums(weights, better)
        next_length = _length(next_sums, weights.variance)
        if next_length >= length:
            return labels, done
        labels, length, first, second, sums = better, next_length, next_first, next_second, next_sums
    return labels, REASSIGNMENTS


def _all_sums(weights: Weights, labels: Tensor) -> tuple[Tensor, Tensor, BlockSums]:
    """Sums of weights and of squares by block and node, (B, n) each, and by two blocks."""
    n_blocks = int(labels.max()) + 1
    first, second = row_sums(weights.centred, labels, n_blocks), row_sums(weights.squares, labels, n_blocks)
    return first, second, _sums_of(first, second, labels.cpu(), n_blocks)


def moments(sums: BlockSums, variance: float) -> tuple[Tensor, Tensor]:
    """Posterior mean and variance of the weights (minus m₀) between each two blocks, (B, B) each."""
    strength = PRIOR_COUNT + sums.pairs
    spread = (sums.squares - sums.total * sums.total / strength).clamp_min(0)
    return sums.total / strength, (PRIOR_FREEDOM * variance + spread) / (PRIOR_FREEDOM + sums.pairs)


def _best_blocks(first: Tensor, second: Tensor, sums: BlockSums, labels: Tensor, variance: float) -> Tensor:
    """For every node the block whose means and variances its weights to all blocks fit best, (n,): −2 ln of a normal density, summed."""
    mean, spread = (m.to(first.device, first.dtype) for m in moments(sums, variance))  # (B, B)
    sizes = sums.sizes.to(first.device, first.dtype)
    others = sizes[:, None] - torch.nn.functional.one_hot(labels, len(sizes)).to(first.dtype).T  # (B, n): a node has no weight with itself
    cost = (spread.log() + mean * mean / spread) @ others + (1 / spread) @ second - 2 * (mean / spread) @ first  # (B, n)
    return (cost - 2 * sizes.log()[:, None]).argmin(dim=0)


def merge_changes(sums: BlockSums, variance: float) -> Tensor:
    """By how much the description length changes when two blocks are merged, (B, B) above the diagonal, infinite elsewhere."""
    n_blocks, n = len(sums.sizes), float(sums.sizes.sum())
    now = log_marginal(sums.pairs, sums.total, sums.squares, variance)
    of_block = now.sum(dim=1)
    changes = torch.full_like(now, math.inf)
    at_once = max(1, CELLS_AT_ONCE // n_blocks**2)
    for begin in range(0, n_blocks, at_once):
        rows = torch.arange(begin, min(begin + at_once, n_blocks))
        changes[rows, begin:] = _merge_losses(sums, variance, rows, begin) + of_block[rows, None] + of_block[begin:] - now[rows, begin:]
    size = torch.lgamma(sums.sizes + 1)
    changes += size[:, None] + size - torch.lgamma(sums.sizes[:, None] + sums.sizes + 1)
    # ln C(n − 1, B − 1) becomes ln C(n − 1, B − 2).
    changes += math.log(n_blocks - 1) - math.log(n - n_blocks + 1) if n_blocks > 1 else 0.0
    return changes.masked_fill(torch.ones_like(now, dtype=torch.bool).tril(), math.inf)


def _merge_losses(sums: BlockSums, variance: float, rows: Tensor, begin: int) -> Tensor:
    """−ln p of all weights of block r ∪ s with every block, r of `rows` and s from `begin` on, (rows, B − begin)."""
    apart = [m[rows, None, :] + m[None, begin:, :] for m in (sums.pairs, sums.total, sums.squares)]  # (rows, s, t): (r ∪ s, t)
    found = log_marginal(apart[0], apart[1], apart[2], variance)
    later = torch.arange(begin, len(sums.sizes))
    outside = found.sum(dim=2) - found[torch.arange(len(rows)), :, rows] - found[:, torch.arange(len(later)), later]
    own = [m.diagonal()[rows, None] + m.diagonal()[None, begin:] + m[rows, begin:] for m in (sums.pairs, sums.total, sums.squares)]
    return -outside - log_marginal(own[0], own[1], own[2], variance)


def _merged(sums: BlockSums, variance: float, labels: IntArray) -> tuple[IntArray, FloatArray]:
    """The path from labels (n,) to one block: its levels (levels, n) and their description lengths (levels,)."""
    levels, lengths, now = [by_size(labels)], [_length(sums, variance)], labels
    while len(sums.sizes) > 1:
        # Merges of one round share no block, so that numbers of blocks stay theirs until the round's end.
        root = torch.arange(len(sums.sizes))
        whole = sums
        for keep, gone in _cheapest(merge_changes(sums, variance)):
            root[gone] = keep
            into = torch.unique(root, return_inverse=True)[1]
            sums = folded(whole, into)
            levels.append(by_size(into.numpy()[now]))
            lengths.append(_length(sums, variance))
        now = into.numpy()[now]
    return np.stack(levels), np.array(lengths)


def _cheapest(changes: Tensor) -> list[tuple[int, int]]:
    """The cheapest merges of one round that share no block, cheapest first: many where they lower the description length, few or one where not."""
    n_blocks = len(changes)
    limit = 1 if n_blocks <= SINGLY_BELOW else max(1, int(MERGED_SHARE * n_blocks))
    forced = 1 if n_blocks <= SINGLY_BELOW else max(1, int(FORCED_SHARE * n_blocks))
    # 2 · limit merges can be blocked by at most limit others through 2 blocks with B − 1 partners each: so many candidates always hold one more.
    flat = changes.flatten()
    order = flat.argsort(stable=True)[: min(n_blocks * (n_blocks - 1) // 2, 2 * limit * n_blocks)]
    taken: set[int] = set()
    found: list[tuple[int, int]] = []
    for at, change in zip(order.tolist(), flat[order].tolist(), strict=True):
        if len(found) >= (limit if change < 0 else forced):
            break
        pair = divmod(at, n_blocks)
        if taken.isdisjoint(pair):
            taken.update(pair)
            found.append(pair)
    return found
