"""Colour refinement: the coarsest equitable partition of a graph, exactly and round by round, and what it says of two graphs.

1. `refine`: nodes begin in the classes of their labels. In a round two nodes stay in one class exactly if they have, for every class, direction and
   label of edges, equally many edges of that label to nodes of that class in that direction. Rounds go on until nothing splits: the classes are then
   the coarsest equitable partition that is finer than the labels.
2. `shares`: how many nodes of either graph each class has, after every round, when both are refined as one graph.
3. `similarity`: by rounds, what the shares have in common; `fractionally_isomorphic`: whether they are the same in the end.

Two graphs are fractionally isomorphic (there is a doubly stochastic X with AX = XB and XᵀA = BXᵀ; of labelled edges for every label at once, and
X between nodes of one label only) exactly if their coarsest equitable partitions have classes of the same sizes and parameters, that is, if
refinement of both as one graph leaves equally many nodes of each in every class (Ramana, Scheinerman and Ullman 1994).

No hashes: a node's multiset of (direction, label, class) is sorted and numbered by joining neighbours in the sequence two by two, each pair getting
the number of its place among all different pairs, until one number is left. Equal numbers are equal multisets. A round takes O(E log E) time, in
log₂(greatest degree) passes over at most E numbers; there are at most n rounds, in practice a handful.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .comparison_records import FloatArray, IntArray


class BadLabels(UserError):
    """Labels that are not one for each node or edge."""


@dataclass(frozen=True, eq=False)
class Refinement:
    """colours: (rounds + 1, n) classes 0 … after each round, the labels' first. stable: whether the last round split nothing."""

    colours: IntArray
    stable: bool

    @property
    def rounds(self) -> int:
        """Rounds that split something."""
        return len(self.colours) - 1

    @property
    def n_classes(self) -> IntArray:
        """(rounds + 1,)."""
        return self.colours.max(axis=1, initial=-1) + 1


def refine(
    n: int, source: IntArray, target: IntArray, labels: IntArray | None = None, edge_labels: IntArray | None = None, *, rounds: int | None = None
) -> Refinement:
    """Refine the classes of n nodes of a directed graph. source, target: (m,). labels: (n,) of nodes, edge_labels: (m,), all the same unless given.

    Parallel edges count as often as they are there. rounds: at most so many; until stable unless given. Raises `BadLabels`.
    """
    node_labels = np.zeros(n, dtype=np.int64) if labels is None else np.asarray(labels)
    of_edges = np.zeros(len(source), dtype=np.int64) if edge_labels is None else np.unique(np.asarray(edge_labels), return_inverse=True)[1]
    if node_labels.shape != (n,) or of_edges.shape != np.shape(source):
        raise BadLabels(f"{node_labels.shape} labels of {n} nodes and {of_edges.shape} of {len(source)} edges: give one for each")
    # both ends of an edge see it: the source as one that leaves, the target as one that enters
    node = np.concatenate([source, target]).astype(np.int64)
    other = np.concatenate([target, source]).astype(np.int64)
    kind = np.concatenate([2 * of_edges, 2 * of_edges + 1])
    colours = [np.unique(node_labels, return_inverse=True)[1].astype(np.int64)]
    stable = False
    while not stable and (rounds is None or len(colours) <= rounds):
        token = kind * np.int64(n) + colours[-1][other]
        seen = _numbered_multisets(n, node, np.unique(token, return_inverse=True)[1])
        own = colours[-1] * np.int64(seen.max(initial=0) + 1) + seen
        finer = np.unique(own, return_inverse=True)[1].astype(np.int64)
        stable = finer.max(initial=-1) == colours[-1].max(initial=-1)
        if not stable:
            colours.append(finer)
    return Refinement(np.stack(colours), stable)


def _numbered_multisets(n: int, node: IntArray, token: IntArray) -> IntArray:
    """A number (n,) for each node's multiset of tokens (k,), 0 for an empty one: equal numbers are equal multisets."""
    order = np.lexsort((token, node))
    node, token = node[order], token[order].astype(np.int64) + 1
    while len(node):
        first = np.searchsorted(node, node, side="left")
        place = np.arange(len(node)) - first
        if not place.any():
            break
        even = np.flatnonzero(place % 2 == 0)
        # the next in the sequence, or 0 where it ends: a sequence is joined with nothing but its own
        follows = np.append(node[1:] == node[:-1], False)[even]
        second = np.where(follows, token[np.minimum(even + 1, len(token) - 1)], 0)
        pairs = token[even] * np.int64(token.max() + 1) + second
        node, token = node[even], np.unique(pairs, return_inverse=True)[1].astype(np.int64) + 1
    found = np.zeros(n, dtype=np.int64)
    found[node] = token
    return found


def quantile_bins(weight: FloatArray, bins: int) -> IntArray:
    """The quantile of each weight in its own graph, (m,) 0 … bins − 1, equal weights in the same bin: what is compared is the order, not the unit."""
    if bins < 1:
        raise UserError(f"--bins {bins} is too small: give at least 1")
    if not len(weight):
        return np.zeros(0, dtype=np.int64)
    rank = np.searchsorted(np.sort(weight), weight, side="left")  # equal weights: the rank of the first
    return np.minimum(rank * bins // len(weight), bins - 1).astype(np.int64)


# --- two graphs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Coloured:
    """A graph as refinement reads it: n nodes with labels (n,), edges (m,) with labels."""

    n: int
    source: IntArray
    target: IntArray
    labels: IntArray
    edge_labels: IntArray


@dataclass(frozen=True, eq=False)
class JointRefinement:
    """Two graphs refined as one. a, b: (rounds + 1, n_a), (rounds + 1, n_b) classes on common numbers."""

    a: IntArray
    b: IntArray
    stable: bool

    @property
    def rounds(self) -> int:
        return len(self.a) - 1

    def counts(self, k: int) -> tuple[IntArray, IntArray]:
        """Nodes of each class after k rounds, (classes,) of either graph; after more rounds than there are, those of the last."""
        at = min(k, self.rounds)
        n = int(max(self.a[at].max(initial=-1), self.b[at].max(initial=-1))) + 1
        return np.bincount(self.a[at], minlength=n), np.bincount(self.b[at], minlength=n)

    def classes(self, k: int) -> tuple[int, int]:
        """Classes that either graph has after k rounds."""
        first, second = self.counts(k)
        return int((first > 0).sum()), int((second > 0).sum())


def refine_both(a: Coloured, b: Coloured, *, rounds: int | None = None) -> JointRefinement:
    """Refine the disjoint union of two graphs; labels of nodes and edges mean the same in both."""
    both = refine(
        a.n + b.n, np.concatenate([a.source, b.source + a.n]), np.concatenate([a.target, b.target + a.n]), np.concatenate([a.labels, b.labels]),
        np.concatenate([a.edge_labels, b.edge_labels]), rounds=rounds,
    )  # fmt: skip
    return JointRefinement(both.colours[:, : a.n], both.colours[:, a.n :], both.stable)


def fractionally_isomorphic(found: JointRefinement) -> bool | None:
    """Whether the graphs are (labels respected); None where refinement was stopped early and nothing tells them apart so far."""
    same = bool(np.array_equal(*found.counts(found.rounds)))
    return same if found.stable or not same else None


SIMILARITIES = ("shared classes", "WL kernel", "1 − Jensen–Shannon")


def similarity(found: JointRefinement, k: int) -> FloatArray:
    """(3,) after k rounds, as `SIMILARITIES`, each 1 for the same counts.

    Shared classes: Σ min of the classes' shares of their graph. WL kernel (Shervashidze et al. 2011): the cosine of the counts of the classes of all
    rounds 0 … k. 1 − Jensen–Shannon divergence of the shares, in bits.
    """
    first, second = (counts / max(counts.sum(), 1) for counts in found.counts(k))
    products = np.zeros(3)
    for i in range(k + 1):
        a, b = (counts.astype(np.float64) for counts in found.counts(i))
        products += a @ b, a @ a, b @ b
    scale = np.sqrt(products[1] * products[2])
    middle = (first + second) / 2
    divergence = (_kullback(first, middle) + _kullback(second, middle)) / 2
    return np.array([np.minimum(first, second).sum(), products[0] / scale if scale > 0 else np.nan, 1 - divergence])


def _kullback(p: FloatArray, q: FloatArray) -> float:
    """Σ p log₂(p / q)."""
    some = p > 0
    return float((p[some] * np.log2(p[some] / q[some])).sum())
