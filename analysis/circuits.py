"""Circuits: the part of a run's graph that carries its strongest effects from the inputs to the output.

1. `read_effects`: a run's edges: means over all its sequences, over those of one task, over some of them, or one sequence's.
2. `strengths`: one row an edge, with the number that is thresholded.
3. `select`: keep the edges at or above the threshold, then the strongest `top_edges` of them.
4. `Candidates.circuit`: drop what cannot be reached from an input (a node of a site without parents) or cannot reach the output.
5. `rank`: each edge's share of what enters its target, and each node's influence on the output.
6. `strongest_paths`: the best paths from an input to the output, exactly, by dynamic programming over the sites.
7. `write_circuit`, `read_circuit`: put the circuit into the graph, and get it back.

Every pass over a graph visits each edge once, in the topological order of the sites. `nested` cuts a whole sweep of circuits: for
every edge `Candidates.entries` gives the size from which on it is in the pruned circuit.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..errors import UserError
from ..model.sites import EMBED, OUTPUT, SiteGraph, parse_site
from ..queries.circuits import circuit_edges, circuit_members, find_circuit
from ..queries.runs import count_influences, influences_of, nth_strength, strong_influences
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow, find_run, model_features, run_sequences

NO_POSITION = -1

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]


class NoEdges(UserError):
    """A run, or one of its sequences, has no edges to make a circuit of."""


class EmptyCircuit(UserError):
    """The threshold leaves no path from an input to the output.

    first_path: the greatest threshold that leaves one, rounded down to three digits; None where the edges have no such path at all.
    """

    def __init__(self, message: str, first_path: float | None = None) -> None:
        super().__init__(message)
        self.first_path = first_path


class UnknownTask(UserError):
    """No sequence of the run belongs to the task."""


class UnknownNodes(UserError):
    """Edges name nodes that the model and its dictionaries do not have."""


class BackwardEdge(UserError):
    """An edge that does not lead from a site to a later one."""


class NotRestored(UserError):
    """A circuit of the graph cannot be read as it was written."""


class By(StrEnum):
    """Which number of an edge is thresholded."""

    ABS_WEIGHT = "abs_weight"
    """The mean over sequences of the effect's magnitude: an edge whose sign changes between sequences keeps its strength."""
    WEIGHT = "weight"
    """The magnitude of the mean signed effect: an edge whose sign changes between sequences cancels."""


class PathRule(StrEnum):
    """What makes one path stronger than another."""

    PRODUCT = "product"
    """The product of the edges' shares: the part of everything that enters the output that came along this very path."""
    BOTTLENECK = "bottleneck"
    """The strength of the path's weakest edge."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which edges a circuit is cut from, and how.

    `threshold` is in the metric's units; `sequence` chooses one sequence's `ATTRIBUTES` instead of the run's `INFLUENCES`, `task` the means
    over the run's sequences of one task, `sequences` those over some by their keys. `positions` keeps token positions apart (they must
    have been kept at ingestion), otherwise a sequence's are summed. `origin` says where the edges come from that were not cut by the
    threshold, `other_runs` which further runs they come from, `pruned` whether what is on no path from an input to the output was dropped.
    """

    run: str
    threshold: float = 0.0
    by: By = By.ABS_WEIGHT
    top_edges: int | None = None
    sequence: str | None = None
    positions: bool = False
    task: str | None = None
    sequences: tuple[str, ...] | None = None
    origin: str | None = None
    other_runs: tuple[str, ...] = ()
    pruned: bool = True

    @property
    def runs(self) -> tuple[str, ...]:
        """Every run that edges come from."""
        return (self.run, *self.other_runs)

    @property
    def of_whole_run(self) -> bool:
        """Whether the effects are the run's own means, over all of its sequences."""
        return self.sequence is None and self.task is None and self.sequences is None

    @property
    def effects_of(self) -> str:
        """Whose effects these are, in words."""
        if self.sequence is not None:
            return f"sequence {self.sequence!r} of run {self.run!r}"
        if self.task is not None:
            return f"task {self.task!r} of run {self.run!r}"
        return f"run {self.run!r}" if self.sequences is None else f"{len(self.sequences)} sequences of run {self.run!r}"

    @property
    def description(self) -> str:
        """What the circuit is made of, in words."""
        least = f" >= {self.threshold:g}" if self.threshold > 0 or self.top_edges is None else ""
        cut = f"{'edges with' if self.top_edges is None else f'the {self.top_edges} strongest edges by'} {self.by.value}{least}"
        made = self.origin or f"{self.effects_of}: {cut}"
        return made + ("" if self.pruned else "; not pruned") + ("; positions apart" if self.positions else "")

    def to_json(self) -> str:
        """The fields as JSON; those that a circuit cut from a run's edges alone does not need only where they say something."""
        later = {"task": None, "sequences": None, "origin": None, "other_runs": (), "pruned": True}
        return json.dumps({name: value for name, value in asdict(self).items() if name not in later or value != later[name]}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        fields = json.loads(text)
        fields |= {name: tuple(fields[name]) for name in ("sequences", "other_runs") if fields.get(name) is not None}
        return cls(**{**fields, "by": By(fields["by"])})


@dataclass(frozen=True)
class Circuit:
    """Part of a run's graph. Where it is pruned all its nodes lie on a path from an input to the output; it may be empty.

    `nodes` columns: `key`, `pos` (-1: not kept), `site`, `layer`, `kind`, `index`, `role` (input, inner, output),
    `influence` (share of what enters the output that passes through the node; a pruned circuit's inputs sum to 1, the output has 1).
    `edges` columns: `source`, `target`, `src_pos`, `dest_pos`, `weight` (signed, metric units), `strength` (>= 0, the
    thresholded number), `share` (of all strength entering the target; sums to 1 over a target's edges unless none has any), `flow`
    (share x influence of the target). Both are sorted by site, then key, so that equal circuits are equal frames.
    """

    selection: Selection
    nodes: pl.DataFrame
    edges: pl.DataFrame

    @property
    def n_nodes(self) -> int:
        """Features, error nodes and the output."""
        return self.nodes.height

    @property
    def n_edges(self) -> int:
        """Directed edges among them."""
        return self.edges.height

    @property
    def average_degree(self) -> float:
        """Mean number of edges at a node, incoming and outgoing together: 2m / n."""
        return 2 * self.n_edges / self.n_nodes if self.n_nodes else 0.0

    @property
    def density(self) -> float:
        """Edges over the most that an acyclic graph of these nodes could have: m / (n (n - 1) / 2)."""
        return 2 * self.n_edges / (self.n_nodes * (self.n_nodes - 1)) if self.n_nodes > 1 else 0.0

    @property
    def key(self) -> str:
        """Content hash of the selection and the edge set: the same circuit cut twice has the same key."""
        content = self.selection.to_json()
        ends = self.edges.select("source", "target", "src_pos", "dest_pos").write_csv()
        return hashlib.sha256(f"{content}\n{ends}".encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class Path:
    """A way from an input to the output: `nodes` (n keys), `positions` (n), `weights` (n - 1, signed), and its score."""

    nodes: tuple[str, ...]
    positions: tuple[int, ...]
    weights: tuple[float, ...]
    score: float


def strengths(edges: pl.DataFrame, selection: Selection) -> pl.DataFrame:
    """Rows `source, target, src_pos, dest_pos, weight, strength` of `INFLUENCES`, or of one sequence's `ATTRIBUTES`.

    Raises `NoEdges` where there are none.
    """
    if selection.sequence is not None:
        edges = edges.filter(pl.col("sequence") == selection.sequence)
    if edges.is_empty():
        way_out = "see its status with `featlas query runs`, finish it with `featlas ingest finish RUN`"
        if selection.sequence is not None:
            way_out = "its sequences are listed by `featlas query sequences`"
        raise NoEdges(f"{selection.effects_of} has no edges: {way_out}")
    if selection.sequence is None:
        strength = pl.col("abs_weight") if selection.by is By.ABS_WEIGHT else pl.col("weight").abs()
        rows = edges.with_columns(pl.lit(NO_POSITION).alias("src_pos"), pl.lit(NO_POSITION).alias("dest_pos"), strength.alias("strength"))
    elif selection.positions:
        rows = edges.with_columns(pl.col("weight").abs().alias("strength"))
    else:
        summed = edges.group_by("source", "target").agg(pl.col("weight").sum())
        rows = summed.with_columns(
            pl.lit(NO_POSITION).alias("src_pos"), pl.lit(NO_POSITION).alias("dest_pos"), pl.col("weight").abs().alias("strength")
        )
    return rows.select(
        "source", "target", pl.col("src_pos").cast(pl.Int64), pl.col("dest_pos").cast(pl.Int64),
        pl.col("weight").cast(pl.Float64), pl.col("strength").cast(pl.Float64),
    )


def select(rows: pl.DataFrame, selection: Selection) -> pl.DataFrame:
    """Edges of strength >= the threshold (an edge of strength 0 is none), then the strongest `top_edges`; ties by key."""
    kept = rows.filter((pl.col("strength") >= selection.threshold) & (pl.col("strength") > 0))
    if selection.top_edges is None:
        return kept
    order = ["strength", "source", "target", "src_pos", "dest_pos"]
    return kept.sort(order, descending=[True, False, False, False, False]).head(selection.top_edges)


def threshold_for(rows: pl.DataFrame, n_edges: int) -> float:
    """The threshold that the `n_edges` strongest of these edges reach, rounded down to three digits; 0 where there are no more than that."""
    if rows.height <= n_edges:
        return 0.0
    return _rounded_down(float(np.partition(rows["strength"].to_numpy(), -n_edges)[-n_edges]))  # the n-th largest


def _rounded_down(strength: float) -> float:
    """A strength to three digits, never above it."""
    step = 10.0 ** (np.floor(np.log10(strength)) - 2) if strength > 0 else 1.0
    return float(f"{np.floor(strength / step) * step:.3g}")


def _stages(order: Numbers) -> list[Numbers]:
    """The places of equal values, by value: passes in which a graph's edges (or nodes) are visited, each once."""
    by_order = np.argsort(order, kind="stable")
    return np.split(by_order, np.flatnonzero(np.diff(order[by_order])) + 1) if len(order) else []


def _least_rank(start: Flags, source: Numbers, target: Numbers, rank: Floats, stage: Numbers) -> Floats:
    """The least rank within which each node is reached from a `start` node along source -> target, (n_nodes,): inf where none does.

    A way's rank is its weakest (greatest) edge's. source, target, rank, stage: (n_edges,); an edge is visited once, when its stage is due.
    """
    least = np.where(start, -np.inf, np.inf)
    for edges in _stages(stage):
        np.minimum.at(least, target[edges], np.maximum(rank[edges], least[source[edges]]))
    return least


def _ends(edges: pl.DataFrame) -> pl.DataFrame:
    """Distinct (key, pos) at either end of the edges."""
    sources = edges.select(pl.col("source").alias("key"), pl.col("src_pos").alias("pos"))
    targets = edges.select(pl.col("target").alias("key"), pl.col("dest_pos").alias("pos"))
    return pl.concat([sources, targets]).unique()


def _site_order(sites: Collection[str]) -> pl.DataFrame:
    """Columns `site`, `order`: the sites' topological order."""
    parsed = [parse_site(name) for name in sites]
    n_layers = max((site.layer for site in parsed), default=0) + 1
    ordered = SiteGraph.of(n_layers, False, [EMBED, *parsed]).sites  # embed: no graph is without a site
    return pl.DataFrame({"site": [site.name for site in ordered], "order": range(len(ordered))}, schema={"site": pl.String, "order": pl.Int64})


def _numbered(edges: pl.DataFrame, features: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Nodes sorted by (site, key, pos) with a row number `node`, and edges with the numbers `from_node`, `to_node`."""
    nodes = _ends(edges).join(features.select("key", "site", "layer", "kind", "index").unique("key"), on="key", how="left")
    if nodes["site"].null_count():
        unknown = nodes.filter(pl.col("site").is_null())["key"].sort()
        raise UnknownNodes(
            f"{len(unknown)} of {nodes.height} nodes are none of this model's and its dictionaries', among them {unknown[0]!r}: "
            "keys must be whole, and of the run's own model and dictionaries; `featlas query find_features` finds them"
        )
    nodes = nodes.join(_site_order(nodes["site"].unique().to_list()), on="site", how="left").sort("order", "key", "pos").with_row_index("node")
    at = nodes.select("node", "key", "pos")
    numbered = edges.join(at.rename({"node": "from_node", "key": "source", "pos": "src_pos"}), on=["source", "src_pos"])
    numbered = numbered.join(at.rename({"node": "to_node", "key": "target", "pos": "dest_pos"}), on=["target", "dest_pos"])
    return nodes, numbered.sort("from_node", "to_node")


@dataclass(frozen=True, eq=False)
class Candidates:
    """Edges to choose circuits from, their nodes numbered in the topological order of the sites. Make one by `of`.

    nodes: `node` (the row's number), `key`, `pos`, `site`, `layer`, `kind`, `index`, `order` (the site's place), `role`.
    edges: `source`, `target`, `src_pos`, `dest_pos`, `weight`, `strength`, `from_node`, `to_node`, sorted by the last two.
    Masks and ranks below are over these edges, in this order.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    roots: tuple[str, ...]

    @classmethod
    def of(cls, edges: pl.DataFrame, features: pl.DataFrame, roots: Collection[str]) -> Self:
        """`edges` as `strengths` gives them; `roots`: the names of the sites without parents, and `error` where nothing enters error nodes.

        Raises `UnknownNodes` for an end that `features` lacks and `BackwardEdge` for an edge against the order of the sites.
        """
        nodes, numbered = _numbered(edges, features)
        given = pl.col("site").is_in(list(roots)) | pl.col("kind").is_in(list(roots))
        role = pl.when(pl.col("site") == OUTPUT.name).then(pl.lit("output")).when(given).then(pl.lit("input"))
        made = cls(nodes.with_columns(role.otherwise(pl.lit("inner")).alias("role")), numbered, tuple(roots))
        if (backward := made.order[made.source] >= made.order[made.target]).any():
            row = numbered.row(int(np.flatnonzero(backward)[0]), named=True)
            raise BackwardEdge(f"edge {row['source']!r} -> {row['target']!r}: an edge leads from a site to a later one")
        return made

    @cached_property
    def source(self) -> Numbers:
        """Number of each edge's source, (n_edges,)."""
        return self.edges["from_node"].to_numpy().astype(np.int64)

    @cached_property
    def target(self) -> Numbers:
        """Number of each edge's target, (n_edges,)."""
        return self.edges["to_node"].to_numpy().astype(np.int64)

    @cached_property
    def order(self) -> Numbers:
        """Each node's site by its place, (n_nodes,)."""
        return self.nodes["order"].to_numpy().astype(np.int64)

    @cached_property
    def strength(self) -> Floats:
        """Each edge's strength, (n_edges,)."""
        return self.edges["strength"].to_numpy().astype(np.float64)

    @cached_property
    def ranking(self) -> Floats:
        """Each edge's place from 1 on when the strongest stand first, (n_edges,); ties by key, and inf for an edge of strength 0, which is none."""
        order = ["strength", "source", "target", "src_pos", "dest_pos"]
        numbered = self.edges.with_row_index("edge").filter(pl.col("strength") > 0)
        by_strength = numbered.sort(order, descending=[True, False, False, False, False])["edge"].to_numpy()
        places = np.full(self.edges.height, np.inf)
        places[by_strength] = np.arange(1, len(by_strength) + 1)
        return places

    def entries(self, rank: Floats, edges: Numbers | None = None) -> Floats:
        """The least rank k at which each edge is in the pruned circuit of the edges with rank <= k; inf for one that never is.

        rank: (n_edges,), of the edges named by their places (all unless given). An edge is in as soon as it has its rank, its source is
        reached from an input and the output is reached from its target: the weakest edge on the best way through it decides.
        """
        source, target = (self.source, self.target) if edges is None else (self.source[edges], self.target[edges])
        role = self.nodes["role"]
        reached = _least_rank((role == "input").to_numpy(), source, target, rank, self.order[source])
        reaching = _least_rank((role == "output").to_numpy(), target, source, rank, -self.order[target])
        return np.maximum(rank, np.maximum(reached[source], reaching[target]))

    def circuit(self, kept: Flags, selection: Selection, nodes: Flags | None = None) -> Circuit:
        """The circuit of the edges where `kept` (n_edges,), pruned where the selection says so; it may be empty.

        nodes: (n_nodes,) nodes that an unpruned circuit has whether or not an edge leads to them.
        """
        at = np.flatnonzero(kept)
        if selection.pruned:
            at = at[self.entries(np.zeros(len(at)), at) < np.inf]
        used = np.zeros(self.nodes.height, dtype=bool) if nodes is None or selection.pruned else nodes.copy()
        used[self.source[at]] = used[self.target[at]] = True
        number = np.cumsum(used) - 1
        edges = self.edges[at].with_columns(from_node=pl.Series(number[self.source[at]]), to_node=pl.Series(number[self.target[at]]))
        ranked, edges = rank(self.nodes.filter(used), edges)
        return Circuit(
            selection,
            ranked.select("key", "pos", "site", "layer", "kind", "index", "role", "influence"),
            edges.select("source", "target", "src_pos", "dest_pos", "weight", "strength", "share", "flow"),
        )


    def between(self, source: int, target: int, selection: Selection) -> Circuit:
        """The edges on ways from one node to another, by their numbers: these are its input and its output; shares stay those among all edges.

        `influence` is that on the run's output. It has no edge where there is no way.
        """
        everything = self.circuit(self.strength > 0, replace(selection, pruned=False), np.ones(self.nodes.height, dtype=bool))
        start, end, at = np.zeros(self.nodes.height, dtype=bool), np.zeros(self.nodes.height, dtype=bool), np.flatnonzero(self.strength > 0)
        start[source] = end[target] = True
        first, last, none = self.source[at], self.target[at], np.zeros(len(at))
        reached = _least_rank(start, first, last, none, self.order[first])
        reaching = _least_rank(end, last, first, none, -self.order[last])
        edges = everything.edges.filter(pl.Series((reached[first] < np.inf) & (reaching[last] < np.inf)))
        role = pl.when(pl.Series(start)).then(pl.lit("input")).when(pl.Series(end)).then(pl.lit("output")).otherwise(pl.lit("inner"))
        nodes = everything.nodes.with_columns(role.alias("role")).join(_ends(edges), on=["key", "pos"], how="semi", maintain_order="left")
        return Circuit(replace(selection, pruned=False), nodes, edges)


def nested(candidates: Candidates, selection: Selection, sizes: Sequence[int]) -> list[Circuit]:
    """The pruned circuits of the `sizes` strongest edges, from one sort and one pass in each direction; some may be empty.

    The same as cutting each on its own with that `top_edges`: a size counts the edges before pruning, and one beyond all candidates
    is all of them. The selection's own threshold and `top_edges` do not count.
    """
    entry = candidates.entries(candidates.ranking)
    return [candidates.circuit(entry <= size, replace(selection, threshold=0.0, top_edges=size)) for size in sizes]


def rank(nodes: pl.DataFrame, edges: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Add `influence` to nodes, `share` and `flow` to edges, as `Circuit` defines them; rows are numbered by `from_node`, `to_node`.

    influence(y) = 1 and influence(u) = sum over u -> d of share(u -> d) influence(d): one pass over the sites from the output back.
    Where nothing with a strength enters a node, its edges have share 0.
    """
    entering = pl.col("strength").sum().over("to_node")
    edges = edges.with_columns(pl.when(entering > 0).then(pl.col("strength") / entering).otherwise(0.0).alias("share"))
    source, target = (edges[name].to_numpy().astype(np.int64) for name in ("from_node", "to_node"))
    share, order = edges["share"].to_numpy(), nodes["order"].to_numpy().astype(np.int64)
    influence = (nodes["role"] == "output").to_numpy().astype(np.float64)  # (n_nodes,)
    for into in _stages(-order[target]):
        np.add.at(influence, source[into], share[into] * influence[target[into]])
    nodes = nodes.with_columns(pl.Series("influence", influence, dtype=pl.Float64))
    return nodes, edges.with_columns(pl.Series("flow", share * influence[target], dtype=pl.Float64))


def input_roots(nodes: pl.DataFrame) -> list[str]:
    """The `roots` by which `Candidates.of` gives these nodes (`site`, `kind`, `role`) the roles that they have.

    Where a site has inputs and others, its inputs are its error nodes: nothing enters those of an imported attribution graph.
    """
    is_input = pl.col("role") == "input"
    sites = nodes.group_by("site").agg(is_input.any().alias("any"), is_input.all().alias("all")).filter(pl.col("any"))
    mixed = ["error"] if (sites["any"] & ~sites["all"]).any() else []
    return sorted(sites.filter(pl.col("all"))["site"].to_list()) + mixed


def root_sites(edges: pl.DataFrame, features: pl.DataFrame) -> list[str]:
    """Sites that nothing in these edges enters: the sites without parents, when the edges are all of a run's."""
    sites = features.select("key", "site").unique("key")
    entered = edges.select(pl.col("target").alias("key")).unique().join(sites, on="key")["site"].unique()
    left = edges.select(pl.col("source").alias("key")).unique().join(sites, on="key")["site"].unique()
    return sorted(set(left.to_list()) - set(entered.to_list()))


def extract(edges: pl.DataFrame, features: pl.DataFrame, selection: Selection, *, roots: Collection[str] | None = None) -> Circuit:
    """The circuit of a run.

    `edges`: the run's `INFLUENCES` (`source, target, weight, abs_weight`), or its `ATTRIBUTES` (`source, target, sequence,
    src_pos, dest_pos, weight`) where the selection names a sequence. `features`: `key, site, layer, kind, index` of their
    ends. `roots`: the names of the sites without parents; found from the edges unless given.
    Raises `NoEdges` for a run without edges and `EmptyCircuit` where no path survives.
    """
    rows = strengths(edges, selection)
    chosen = select(rows, selection)
    inputs = list(roots) if roots is not None else root_sites(rows, features)
    circuit = Candidates.of(chosen, features, inputs).circuit(np.ones(chosen.height, dtype=bool), selection)
    if not circuit.n_edges:
        raise _no_path(rows, Candidates.of(rows, features, inputs), selection, chosen.height)
    return circuit


def _no_path(rows: pl.DataFrame, candidates: Candidates, selection: Selection, n_kept: int) -> EmptyCircuit:
    """The error for a selection that left `n_kept` of the edges, with the threshold that would leave a path."""
    first = first_path(candidates)
    strength = rows["strength"].to_numpy()
    way_out = (
        "there is none among all edges either: measure with a lower threshold" if first is None
        else f"the first path is whole at --threshold {first:g}, with the {int((strength >= first).sum()):,} strongest edges"
    )  # fmt: skip
    return EmptyCircuit(
        f"threshold {selection.threshold:g} (by {selection.by.value}) leaves no path from {', '.join(candidates.roots) or 'an input'} to the output: "
        f"{n_kept} of {rows.height} edges were kept, the strongest has {strength.max():.4g}; {way_out}",
        first,
    )


def first_path(candidates: Candidates) -> float | None:
    """The greatest threshold that leaves a path from an input to the output: the weakest edge of the path whose weakest edge is strongest.

    Rounded down to three digits; None where no path exists. The widest path problem, Pollack, "The maximum capacity through a network" (1960).
    """
    entry = candidates.entries(np.where(candidates.strength > 0, -candidates.strength, np.inf))
    best = float(entry.min(initial=np.inf))
    return None if best == np.inf else _rounded_down(-best)


def run_roots(run: RunRow) -> list[str] | None:
    """The names of the run's sites without parents; None for a run that does not say.

    Edges alone would take a site that lost all incoming ones for an input.
    """
    roots = json.loads(str(run.properties.get("settings") or "{}")).get("roots")
    return None if roots is None else [str(name) for name in roots]


def read_effects(store: GraphStore, run: RunRow, selection: Selection) -> pl.DataFrame:
    """The edges that a selection is cut from: one sequence's `ATTRIBUTES`, or rows as `INFLUENCES` over the sequences that it names.

    Over a task or some sequences effects are aggregated as those of the run are: positions summed within a sequence first, an absent
    edge counting 0. Raises `UnknownTask`, or `SequenceNotDone`.
    """
    if selection.sequence is not None:
        return store.read_edges("ATTRIBUTES", run=run.key, sequence=selection.sequence)
    if selection.task is None and selection.sequences is None:
        return store.read_edges("INFLUENCES", run=run.key)
    return influences_of(store, run.key, _sequences_of(store, run, selection))


def cut_effects(store: GraphStore, run: RunRow, selection: Selection) -> pl.DataFrame:
    """`read_effects` without edges that the selection leaves out anyway, where the database can leave them out; all of them where none is left.

    It can for the means over all sequences of a run that says which sites are its inputs, which are otherwise found from all edges.
    """
    if selection.of_whole_run and run_roots(run) is not None:
        column = selection.by.value
        least = selection.threshold
        if selection.top_edges is not None:
            least = max(least, nth_strength(store, run.key, column, selection.top_edges) or 0.0)
        if least > 0 and (found := strong_influences(store, run.key, column, least)).height:
            return found
    return read_effects(store, run, selection)


def _sequences_of(store: GraphStore, run: RunRow, selection: Selection) -> Collection[str]:
    """The keys of the sequences of the selection's task, and of those the ones that it names."""
    if selection.task is None:
        return selection.sequences or ()
    done = run_sequences(store, run.key)
    of_task = done.filter(pl.col("task") == selection.task)["key"].to_list()
    if not of_task:
        known = ", ".join(done["task"].unique().drop_nulls().sort().to_list()) or "none: see its status with `featlas query runs`"
        raise UnknownTask(f"no sequence of run {run.key!r} is of task {selection.task!r}: its tasks are {known}")
    if selection.sequences is None:
        return of_task
    if other := sorted(set(selection.sequences) - set(of_task)):
        raise UnknownTask(f"sequence {other[0]!r} is not of task {selection.task!r} in run {run.key!r}")
    return selection.sequences


def run_candidates(store: GraphStore, run: RunRow, selection: Selection) -> Candidates:
    """All edges of a run, of one of its tasks, of some of its sequences or of one, to choose circuits from. Raises `NoEdges`."""
    rows = strengths(read_effects(store, run, selection), selection)
    features = model_features(store, run.model)
    roots = run_roots(run)
    return Candidates.of(rows, features, root_sites(rows, features) if roots is None else roots)


def run_circuit(store: GraphStore, run: RunRow, selection: Selection, *, n_edges: int | None = None) -> Circuit:
    """The circuit of a run in a graph. With `n_edges` the selection's threshold is replaced by the one that so many edges reach.

    Where so few leave no path, as in graphs of many sites, the threshold is the one that leaves the first path (`first_path`).
    Raises `NoEdges` and `EmptyCircuit` as `extract` does.
    """
    features, roots = model_features(store, run.model), run_roots(run)
    if n_edges is not None:
        selection = replace(selection, threshold=_threshold_of(store, run, selection, n_edges))
    try:
        return extract(cut_effects(store, run, selection), features, selection, roots=roots)
    except EmptyCircuit:
        edges = read_effects(store, run, selection)  # what is said of the others, and the first path, need all of them
    try:
        return extract(edges, features, selection, roots=roots)
    except EmptyCircuit as error:
        if n_edges is None or error.first_path is None:
            raise
        return extract(edges, features, replace(selection, threshold=error.first_path), roots=roots)


def strongest_candidates(store: GraphStore, run: RunRow, selection: Selection, n_edges: int | None) -> tuple[Candidates, Selection, int]:
    """The edges that a selection keeps, to make a circuit of; the selection; and how many edges it was cut from.

    With `n_edges` its threshold is the one that so many reach, or where these leave no path the one that leaves the first. Raises `NoEdges`.
    """
    if n_edges is not None:
        selection = replace(selection, threshold=_threshold_of(store, run, selection, n_edges))
    rows, features, roots = strengths(cut_effects(store, run, selection), selection), model_features(store, run.model), run_roots(run)
    inputs = root_sites(rows, features) if roots is None else roots
    candidates = Candidates.of(select(rows, selection), features, inputs)
    if n_edges is not None and selection.pruned and first_path(candidates) is None:
        everything = run_candidates(store, run, selection)
        if (first := first_path(everything)) is not None:
            selection = replace(selection, threshold=first)
            candidates = Candidates.of(select(everything.edges.select(rows.columns), selection), features, inputs)
    return candidates, selection, count_influences(store, run.key) if selection.of_whole_run else rows.height


def _threshold_of(store: GraphStore, run: RunRow, selection: Selection, n_edges: int) -> float:
    """`threshold_for` of the edges that a selection is cut from, found in the database where it can be."""
    if selection.of_whole_run:
        strength = nth_strength(store, run.key, selection.by.value, n_edges)
        return 0.0 if strength is None else _rounded_down(strength)
    edges = read_effects(store, run, selection)
    return threshold_for(strengths(edges, selection), n_edges) if edges.height else 0.0


def strongest_paths(circuit: Circuit, n: int = 10, *, rule: PathRule = PathRule.PRODUCT) -> tuple[Path, ...]:
    """The `n` strongest paths from an input to the output, strongest first, exactly.

    Both rules are monotone (a stronger tail never makes a weaker path), so the n best tails of each node suffice: one join
    for each site, from the output back. Ties are broken by the order of nodes.
    """
    nodes, edges = _numbered(circuit.edges, circuit.nodes)
    step = pl.col("share") if rule is PathRule.PRODUCT else pl.col("strength")
    edges = edges.join(nodes.select(pl.col("node").alias("from_node"), pl.col("order")), on="from_node").with_columns(step.alias("step"))
    output = circuit.nodes.filter(pl.col("role") == "output").select("key", "pos").join(nodes, on=["key", "pos"])["node"]
    best = pl.DataFrame({"row": range(output.len()), "node": output, "score": 1.0 if rule is PathRule.PRODUCT else np.inf, "next": -1, "weight": 0.0})
    best = best.cast({"row": pl.Int64, "next": pl.Int64, "score": pl.Float64})
    for order in sorted(edges["order"].unique().to_list(), reverse=True):
        here = edges.filter(pl.col("order") == order).join(best, left_on="to_node", right_on="node")
        total = pl.col("step") * pl.col("score") if rule is PathRule.PRODUCT else pl.min_horizontal("step", "score")
        tails = here.select(pl.col("from_node").alias("node"), total.alias("score"), pl.col("row").alias("next"), "weight")
        tails = tails.sort(["node", "score", "next"], descending=[False, True, False]).group_by("node", maintain_order=True).head(n)
        rows = pl.int_range(best.height, best.height + tails.height, eager=True).alias("row")
        best = pl.concat([best, tails.with_columns(rows).select(best.columns)])
    inputs = circuit.nodes.filter(pl.col("role") == "input").select("key", "pos").join(nodes, on=["key", "pos"]).select("node")
    starts = best.join(inputs, on="node", how="semi").sort(["score", "row"], descending=[True, False]).head(n)
    return tuple(_walk(best, nodes, row, score) for row, score in starts.select("row", "score").iter_rows())


def _walk(best: pl.DataFrame, nodes: pl.DataFrame, row: int, score: float) -> Path:
    """Follow `next` from one row of the table of best tails to the output."""
    visited: list[int] = []
    while row >= 0:
        visited.append(row)
        row = best["next"][row]
    at = best["node"].gather(visited)
    return Path(
        tuple(nodes["key"].gather(at).to_list()),
        tuple(nodes["pos"].gather(at).to_list()),
        tuple(best["weight"].gather(visited[:-1]).to_list()),
        score,
    )


def _best_along(start: np.ndarray, source: np.ndarray, target: np.ndarray, share: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """Greatest product of shares from any `start` node (1 there, else 0) along source -> target; `stage` (n_edges,) orders the passes."""
    best = start.astype(np.float64)
    for here in _stages(stage):
        np.maximum.at(best, target[here], best[source[here]] * share[here])
    return best


def strongest_part(circuit: Circuit, max_edges: int) -> Circuit:
    """The `max_edges` edges on the strongest paths: the best path through each of them is at least as strong as any edge left out has.

    Shares and influence stay those of the whole circuit. Every kept edge's own best path is kept too, so nothing dangles
    (but for edges cut from a tie at the very end, which are pruned: a few edges less than asked for may remain).
    """
    if circuit.n_edges <= max_edges:
        return circuit
    nodes, edges = _numbered(circuit.edges, circuit.nodes)
    nodes = nodes.join(circuit.nodes.select("key", "pos", "role"), on=["key", "pos"], maintain_order="left")
    source, target, share = (edges[c].to_numpy() for c in ("from_node", "to_node", "share"))
    order = nodes["order"].to_numpy()
    head = _best_along((nodes["role"] == "input").to_numpy(), source, target, share, order[source])
    tail = _best_along((nodes["role"] == "output").to_numpy(), target, source, share, -order[target])
    through = edges.with_columns(pl.Series("through", head[source] * share * tail[target]))
    chosen = through.sort(["through", "from_node", "to_node"], descending=[True, False, False]).head(max_edges)
    candidates = Candidates.of(chosen.select(circuit.edges.columns), circuit.nodes, input_roots(circuit.nodes))
    part = candidates.edges.filter(candidates.entries(np.zeros(chosen.height)) < np.inf).select(circuit.edges.columns)
    return Circuit(circuit.selection, circuit.nodes.join(_ends(part), on=["key", "pos"], how="semi", maintain_order="left"), part)


def site_summary(circuit: Circuit) -> pl.DataFrame:
    """Per site in topological order: `site, layer, features, errors, flow, error_flow`.

    `flow` is the influence of the site's nodes together, `error_flow` the part of it that error nodes carry.
    """
    error = pl.col("kind") == "error"
    per_site = circuit.nodes.group_by("site", "layer").agg(
        (pl.col("kind") == "feature").sum().alias("features"),
        error.sum().alias("errors"),
        pl.col("influence").sum().alias("flow"),
        pl.col("influence").filter(error).sum().alias("error_flow"),
    )
    return per_site.join(_site_order(per_site["site"].to_list()), on="site").sort("order").drop("order")


def top_nodes(circuit: Circuit, n: int, *, kinds: Sequence[str] = ("feature",)) -> pl.DataFrame:
    """The `n` nodes of these kinds with the greatest influence, with `in_strength`, `out_strength`, `n_in`, `n_out`."""
    entering = circuit.edges.group_by(pl.col("target").alias("key"), pl.col("dest_pos").alias("pos")).agg(
        pl.col("weight").sum().alias("in_strength"), pl.len().alias("n_in")
    )
    leaving = circuit.edges.group_by(pl.col("source").alias("key"), pl.col("src_pos").alias("pos")).agg(
        pl.col("weight").sum().alias("out_strength"), pl.len().alias("n_out")
    )
    chosen = circuit.nodes.filter(pl.col("kind").is_in(list(kinds)))
    full = chosen.join(entering, on=["key", "pos"], how="left").join(leaving, on=["key", "pos"], how="left")
    full = full.with_columns(pl.col("in_strength", "out_strength").fill_null(0.0), pl.col("n_in", "n_out").fill_null(0))
    return full.sort(["influence", "key", "pos"], descending=[True, False, False]).head(n)


def write_circuit(store: GraphStore, circuit: Circuit) -> str:
    """Merge the `Circuit` node, its `IN_CIRCUIT`, `CIRCUIT_EDGE` and `OF_RUN` edges; returns its key. Idempotent.

    Positions that were kept apart are summed: the graph's nodes are features.
    """
    key, selection = circuit.key, circuit.selection
    node = {"key": key, "run": selection.run, "sequence": selection.sequence, "threshold": selection.threshold, "by": selection.by.value}
    node |= {"n_nodes": circuit.n_nodes, "n_edges": circuit.n_edges, "average_degree": circuit.average_degree, "density": circuit.density}
    node |= {"task": selection.task, "description": selection.description, "settings": selection.to_json()}
    store.merge_nodes("Circuit", pl.DataFrame([node]))
    members = circuit.nodes.group_by("key").agg(pl.col("role").first()).sort("key")
    store.merge_edges("IN_CIRCUIT", members.select(pl.col("key").alias("source"), pl.lit(key).alias("target"), "role"))
    links = circuit.edges.group_by("source", "target").agg(pl.col("weight", "strength").sum()).sort("source", "target")
    store.merge_edges("CIRCUIT_EDGE", links.select("source", "target", pl.lit(key).alias("circuit"), "weight", "strength"))
    store.merge_edges("OF_RUN", pl.DataFrame({"source": [key] * len(selection.runs), "target": list(selection.runs)}))
    return key


def read_circuit(store: GraphStore, name: str) -> Circuit:
    """The circuit of the graph whose key begins with `name`, as it was when `write_circuit` wrote it; its key is the same.

    One with positions kept apart is cut anew, since the graph holds their sums. Raises `UnknownCircuit`, and `NotRestored` where
    the graph no longer holds what the circuit was made of.
    """
    node = find_circuit(store, name)
    if "parcellation" in json.loads(str(node.get("settings") or "{}")):
        raise NotRestored(f"circuit {node['key']} has {node.get('description')} for nodes, not features: `featlas query circuit-edges` shows it")
    key, selection = str(node["key"]), _stored_selection(node)
    if selection.positions:
        circuit = _cut_again(store, key, selection)
    else:
        members = circuit_members(store, key)
        links = circuit_edges(store, key).with_columns(pl.lit(NO_POSITION).alias("src_pos"), pl.lit(NO_POSITION).alias("dest_pos"))
        links = links.with_columns(pl.col("strength").fill_null(pl.col("weight").abs()))
        circuit = Candidates.of(links, members, input_roots(members)).circuit(np.ones(links.height, dtype=bool), selection)
    if circuit.key != key and node.get("settings") is not None:
        raise NotRestored(f"circuit {key} was changed after it was written ({circuit.n_edges} edges are left of {node.get('n_edges')}): cut it again")
    return circuit


def _stored_selection(node: Mapping[str, object]) -> Selection:
    """The selection of a `Circuit` node by its properties; of one without settings (an older graph's) what the other properties tell."""
    if (settings := node.get("settings")) is not None:
        return Selection.from_json(str(settings))
    sequence = node.get("sequence")
    threshold = float(str(node.get("threshold") or 0.0))
    return Selection(str(node["run"]), threshold, By(str(node.get("by"))), sequence=None if sequence is None else str(sequence))


def _cut_again(store: GraphStore, key: str, selection: Selection) -> Circuit:
    """A circuit of one sequence with its positions, from the sequence's edges."""
    if selection.origin is not None:
        raise NotRestored(f"circuit {key} ({selection.description}) had positions apart, the graph holds their sums: make it again from its parts")
    return run_circuit(store, find_run(store, selection.run), selection)
