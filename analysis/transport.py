"""Optimal transport between two small graphs: which region of one corresponds to which of the other, by what regions are and by what they drive.

1. `cost`: squared distances between the regions' features, 1 on average.
2. `structure`: what regions drive each other as a matrix, square roots of shares of all strength.
3. `transport`: the fused Gromov–Wasserstein distance (Vayer et al. 2020), the least over couplings T of
   (1 − α) Σ T_ij cost_ij + α Σ (C_ij − D_kl)² T_ik T_jl, and the coupling that reaches it. The problem is not convex: it is solved from several
   beginnings and the least is taken.

Both terms are scaled so that the coupling that knows nothing (every pair alike) costs 1: the distance is 0 for equal graphs, 1 for such a
coupling.
The solver is POT (`ot`, the extra `comparison`); memory grows with the product of both numbers of regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .comparison_records import FloatArray

LARGEST = 2000
"""Regions of a graph at most: time grows with their third power."""


class NoTransport(UserError):
    """POT is not installed, or the graphs are too large for it."""


@dataclass(frozen=True, eq=False)
class Transport:
    """distance: ≥ 0, 0 for equal graphs. coupling: (n, m), its rows summing to A's masses and its columns to B's."""

    distance: float
    coupling: FloatArray


def cost(a: FloatArray, b: FloatArray) -> FloatArray:
    """Squared Euclidean distances (n, m) of features (n, k) and (m, k), over their mean."""
    squared = np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T, 0.0)
    mean = float(squared.mean())
    return squared / mean if mean > 0 else squared


def structure(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Weights ≥ 0 (n, n), (m, m) as roots of shares of their sums, times one number by which the independent coupling's structure costs 1."""
    first, second = (np.sqrt(weight / weight.sum()) if weight.sum() > 0 else np.zeros_like(weight) for weight in (a, b))
    # Σ (C_ij − D_kl)² over independent pairs
    independent = float((first**2).mean() + (second**2).mean() - 2 * first.mean() * second.mean())
    scale = independent**-0.5 if independent > 0 else 1.0
    return first * scale, second * scale


def transport(
    costs: FloatArray, a: FloatArray, b: FloatArray, *, alpha: float = 0.5, beginnings: Sequence[FloatArray] = (), seed: int = 0, random: int = 2
) -> Transport:
    """Fused Gromov–Wasserstein between structures (n, n) and (m, m) with costs (n, m), all nodes of one graph weighing the same.

    alpha: 0 features alone … 1 structure alone. beginnings: costs (n, m) whose cheapest couplings are begun from too, beside the independent
    coupling, the cheapest by features alone and those by `random` costs drawn by chance. Raises `NoTransport`.
    """
    try:
        import ot
    except ImportError:
        raise NoTransport('fused Gromov–Wasserstein needs POT: pip install "featlas[comparison]", or leave it out by --without transport') from None
    if not 0 <= alpha <= 1:
        raise NoTransport(f"--alpha {alpha:g} is out of range: give 0 (what regions are) to 1 (what they drive)")
    n, m = costs.shape
    if max(n, m) > LARGEST:
        raise NoTransport(f"{max(n, m):,} regions are too many for optimal transport, at most {LARGEST:,}: --without transport leaves it out")
    p, q = np.full(n, 1 / n), np.full(m, 1 / m)
    rng = np.random.default_rng(seed)
    cheapest = [ot.emd(p, q, np.ascontiguousarray(one)) for one in (costs, *beginnings, *(rng.random((n, m)) for _ in range(random)))]
    found = []
    for begin in (np.outer(p, q), *cheapest):
        coupling, log = ot.gromov.fused_gromov_wasserstein(
            costs, a, b, p, q, loss_fun="square_loss", symmetric=False, alpha=alpha, G0=begin, log=True, max_iter=500
        )
        found.append(Transport(max(0.0, float(log["fgw_dist"])), np.asarray(coupling)))
    return min(found, key=lambda one: one.distance)
