"""Null models of communities: graphs with the same degrees and layers, and labels at random.

1. `rewired`: the edges of a graph exchanged at random so that every node keeps its number of outgoing and of incoming edges for every pair of sites
   (a directed configuration model within each pair of sites, without double edges).
2. `significance`: the modularity (Infomap: the codelength) of the communities found, against that of the communities found the same way in
   rewired graphs: z and p.
3. `task_strengths`: how much each task's edges at a node weigh. `following`: whether communities follow the layers, or the tasks: both AMIs,
   each beside what permuted labels, and communities of rewired graphs, give.

Rewiring. A round pairs the edges of each pair of sites at random and flips a fair coin for every two; those that come up exchange their targets,
unless the new edges exist already or come in the way of another exchange of the round. Whether two exchanges are in each other's way does not
depend on whether either is carried out, so that a round is as likely as its reverse: the chain is symmetric and aperiodic, any graph of the same
degrees can be reached by single exchanges (Ryser 1963), hence in the limit every one is equally likely. An edge keeps its weight while its target
changes: the weights of the edges that leave a node for a site stay what they were, those that enter it do not; with `Weights.SHUFFLED` weights
are then permuted within each pair of sites.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import polars as pl

from ..errors import UserError
from ..queries.runs import influence_blocks
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow, run_sequences
from .communities import Communities, CommunityOptions, EffectiveGraph, FloatArray, IntArray, find_communities
from .partitioning import ami

ROUNDS = 40
"""Rounds of exchanges; each tries half of the edges once. On the graph of a language model the share of unchanged edges is level after 20."""


class Weights(StrEnum):
    """What becomes of the weights of rewired edges."""

    CARRIED = "carried"
    """Each stays with its source."""
    SHUFFLED = "shuffled"
    """They are permuted within each pair of sites."""


@dataclass(frozen=True, eq=False)
class Mixing:
    """How far a graph was rewired. exchanges: accepted ones per edge (each moves two). unchanged: (rounds,) the share of the first graph's edges that
    are there after each round; it levels off at what a random graph of these degrees shares with it."""

    exchanges: float
    unchanged: FloatArray


def rewired(
    graph: EffectiveGraph, seed: int, *, rounds: int = ROUNDS, weights: Weights = Weights.CARRIED, trace: bool = False
) -> tuple[EffectiveGraph, Mixing]:
    """A random graph with the same nodes and degrees, site pair by site pair, and how well it was mixed (`unchanged` every round with `trace`)."""
    rng = np.random.default_rng(seed)
    source, target, n = graph.source, graph.target.copy(), np.int64(graph.n)
    begun = np.sort(source * n + target)
    accepted, shares = 0, []
    for _ in range(rounds):
        accepted += _round(source, target, graph.pair, n, rng)
        if trace:
            shares.append(_share(begun, source * n + target))
    unchanged = np.array(shares if trace else [_share(begun, source * n + target)])
    weight = graph.weight
    if weights is Weights.SHUFFLED:
        by_pair, drawn = np.argsort(graph.pair, kind="stable"), np.lexsort((rng.random(graph.m), graph.pair))
        weight = weight.copy()
        weight[by_pair] = graph.weight[drawn]
    drawn_graph = replace(graph, target=target, weight=weight, description=f"{graph.description}; rewired, seed {seed}")
    return drawn_graph, Mixing(accepted / graph.m, unchanged)


def _share(begun: IntArray, codes: IntArray) -> float:
    return float(np.isin(codes, begun, assume_unique=True).mean())


def _round(source: IntArray, target: IntArray, pair: IntArray, n: np.int64, rng: np.random.Generator) -> int:
    """One round of exchanges; `target` (m,) is changed in place. How many were carried out."""
    order = np.lexsort((rng.random(len(source)), pair))
    # neighbours in this order, the first of a pair of sites with the second and so on
    first_of_pair = np.searchsorted(pair[order], pair[order], side="left")
    even = (np.arange(len(order)) - first_of_pair) % 2 == 0
    has_next = np.append(pair[order][1:] == pair[order][:-1], False)
    i = np.flatnonzero(even & has_next)
    i = i[rng.random(len(i)) < 0.5]
    one, two = order[i], order[i + 1]
    codes = source * n + target
    old = np.stack([codes[one], codes[two]])  # (2, k)
    new = np.stack([source[one] * n + target[two], source[two] * n + target[one]])
    still = np.ones(len(source), dtype=bool)
    still[one] = still[two] = False
    free = _alone(old, new) & ~np.isin(new, codes[still]).any(axis=0)
    # of edges that share an end the exchange would change nothing
    free &= (source[one] != source[two]) & (target[one] != target[two])
    one, two = one[free], two[free]
    target[one], target[two] = target[two], target[one]
    return len(one)


def _alone(old: IntArray, new: IntArray) -> np.ndarray:
    """Which exchanges share no edge, old or new, with another one of the round, (k,). old, new: (2, k) codes of edges."""
    own = np.concatenate([old, new])  # (4, k)
    # an exchange between edges that share an end has the same edge in old and new: each exchange counts an edge once
    own = np.sort(own, axis=0)
    counted = np.ones(own.shape, dtype=bool)
    counted[1:] = own[1:] != own[:-1]
    _, place, n = np.unique(own[counted], return_inverse=True, return_counts=True)
    shared = np.zeros(own.shape, dtype=bool)
    shared[counted] = n[place] > 1
    return np.asarray(~shared.any(axis=0))


# --- significance -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Significance:
    """A quality of the communities against its values in rewired graphs, (n,). p: one-sided, the share of values at least as good, the observed one
    being one of them (Phipson and Smyth 2010); z: in standard deviations of the null, greater is better."""

    quantity: str
    value: float
    null: FloatArray
    n_null: IntArray
    unchanged: float
    exchanges: float

    @property
    def sign(self) -> float:
        """A codelength is better when it is shorter."""
        return -1.0 if self.quantity == "codelength" else 1.0

    @property
    def z(self) -> float | None:
        spread = float(self.null.std(ddof=1)) if len(self.null) > 1 else 0.0
        return None if spread == 0 else self.sign * (self.value - float(self.null.mean())) / spread

    @property
    def p(self) -> float:
        return float(1 + (self.sign * self.null >= self.sign * self.value).sum()) / (1 + len(self.null))


@dataclass(frozen=True, eq=False)
class NullGraphs:
    """The communities of rewired graphs, found as those of the data were."""

    found: tuple[Communities, ...]
    exchanges: float
    unchanged: float


def null_graphs(
    graph: EffectiveGraph, options: CommunityOptions, n: int, *, weights: Weights = Weights.CARRIED, rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> NullGraphs:  # fmt: skip
    """Rewire a graph `n` times, by seeds from the options' own on, and find the communities of each."""
    if n < 1:
        raise UserError(f"--nulls {n} is too small: give at least 1, twenty or more for a p below 0.05")
    found, mixings = [], []
    for i in range(n):
        drawn, mixing = rewired(graph, options.seed + 1000 + i, rounds=rounds, weights=weights)
        found.append(find_communities(drawn, replace(options, seed=options.seed + i)))
        mixings.append(mixing)
        if progress is not None:
            progress(i + 1, n)
    exchanges, unchanged = (float(np.mean(values)) for values in zip(*((mix.exchanges, mix.unchanged[-1]) for mix in mixings)))
    return NullGraphs(tuple(found), exchanges, unchanged)


def significance(communities: Communities, nulls: NullGraphs) -> Significance:
    """By the codelength where the method has one, else by directed modularity."""
    by_code = communities.codelength is not None
    value = communities.codelength if by_code else communities.modularity
    null = np.array([one.codelength if by_code else one.modularity for one in nulls.found], dtype=np.float64)
    counts = np.array([one.n_communities for one in nulls.found])
    assert value is not None
    return Significance("codelength" if by_code else "modularity", value, null, counts, nulls.unchanged, nulls.exchanges)


# --- layers or tasks --------------------------------------------------------------------------------------------------

FOLLOWING = {
    "what": pl.String(), "null": pl.String(), "value": pl.Float64(), "null_mean": pl.Float64(), "null_low": pl.Float64(), "null_high": pl.Float64(),
    "p": pl.Float64(), "n_nodes": pl.Int64(), "n_groups": pl.Int64(),
}  # fmt: skip
"""AMI of the communities with `what` (site, task) beside its values under `null`: labels permuted over all nodes, or over those of a site, or
communities of rewired graphs. null_low, null_high: the middle 95 %; p: the share of null values at least as great, the observed one counted."""

PERMUTED, WITHIN_SITES, REWIRED = "permuted", "permuted within sites", "rewired graphs"


def task_strengths(store: GraphStore, run: RunRow, graph: EffectiveGraph) -> tuple[tuple[str, ...], FloatArray]:
    """The run's tasks, and how strong each task's edges at every node are, (n, n_tasks); every edge of the run counts, in the graph or not.

    An edge's strength in a task is its mean |weight| over the task's sequences, absent ones counting 0. Tasks differ in the size of their metric:
    each task's strengths are divided by their sum, so that a node's greatest entry names the task of whose effects it carries the greatest share.
    """
    done = run_sequences(store, run.key)
    tasks = tuple(done["task"].drop_nulls().unique().sort().to_list())
    place = pl.DataFrame({"key": graph.nodes["key"], "node": np.arange(graph.n)})
    columns = []
    for task in tasks:
        strength = np.zeros(graph.n)
        for edges in influence_blocks(store, run.key, done.filter(pl.col("task") == task)["key"].to_list()):
            for end in ("source", "target"):
                at = edges.select(pl.col(end).alias("key"), "abs_weight").join(place, on="key")
                strength += np.bincount(at["node"].to_numpy(), at["abs_weight"].to_numpy(), graph.n)
        columns.append(strength / max(float(strength.sum()), 1e-300))
    return tasks, np.column_stack(columns) if columns else np.zeros((graph.n, 0))


def following(
    graph: EffectiveGraph, communities: Communities, strengths: FloatArray | None, nulls: Sequence[Communities] = (), *, draws: int = 200,
    seed: int = 0,
) -> pl.DataFrame:  # fmt: skip
    """Do communities follow the sites, or the tasks that nodes are most attributed to? As `FOLLOWING`; without tasks to tell apart the sites alone.

    strengths: (n, n_tasks) of `task_strengths`; nodes without any are left out of that row.
    """
    rng = np.random.default_rng(seed)
    everywhere = np.ones(graph.n, dtype=bool)
    rows = _followed("site", graph.site, everywhere, graph, communities, nulls, draws, rng)
    if strengths is not None and strengths.shape[1] > 1:
        has = strengths.sum(axis=1) > 0
        rows += _followed("task", strengths.argmax(axis=1), has, graph, communities, nulls, draws, rng)
    return pl.DataFrame(rows, schema=FOLLOWING, orient="row")


def _followed(
    what: str, groups: IntArray, kept: np.ndarray, graph: EffectiveGraph, communities: Communities, nulls: Sequence[Communities], draws: int,
    rng: np.random.Generator,
) -> list[tuple[object, ...]]:  # fmt: skip
    groups, labels, sites = groups[kept], communities.labels[kept], graph.site[kept]
    value = ami(labels, groups)
    drawn = {PERMUTED: [ami(labels, rng.permutation(groups)) for _ in range(draws)]}
    if what != "site":
        by_site = np.argsort(sites, kind="stable")
        drawn[WITHIN_SITES] = []
        for _ in range(draws):
            permuted = np.empty_like(groups)
            permuted[by_site] = groups[np.lexsort((rng.random(len(groups)), sites))]
            drawn[WITHIN_SITES].append(ami(labels, permuted))
    if nulls:
        drawn[REWIRED] = [ami(one.labels[kept], groups) for one in nulls]
    rows: list[tuple[object, ...]] = []
    for null, values in drawn.items():
        low, high = np.quantile(values, [0.025, 0.975])
        p = (1 + sum(one >= value for one in values)) / (1 + len(values))
        rows.append((what, null, value, float(np.mean(values)), float(low), float(high), p, len(labels), len(np.unique(groups))))
    return rows
