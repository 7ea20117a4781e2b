"""The two sides of a comparison of graphs, and which nodes of one are which of the other.

1. `read_side`: the edges of a run, of one of its tasks or sequences, or of a stored circuit, with signed weights.
2. `one_to_one`: of a frame of matched features the pairs in which each feature occurs once, the best first.
3. `pair_nodes`: the pairs of nodes that stand for each other: features by the matching (by their keys where there is none), error nodes by the
   correspondence of sites that the matched features give, the output with the output. A node may be paired with one that has no edge in the
   other graph: then its edges are ones that the other graph lacks. Edges at nodes that nothing on the other side stands for say nothing.
4. `Paired.edges`: the edges of both sides between paired nodes, on common numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..errors import UserError
from ..queries.circuits import find_circuit
from ..queries.schema import feature_key
from ..queries.store import GraphStore
from ..queries.subgraphs import RunRow, list_runs, model_features
from .circuits import By, Candidates, Selection, cut_effects, input_roots, read_circuit, root_sites, run_roots, select, strengths
from .communities import EffectiveGraph
from .comparison_records import FloatArray, IntArray

NODES = ("key", "site", "layer", "kind", "index", "order")

NO_PAIR = "align more text (`featlas ingest aligned`), or match again with --null shift or more --draws (`featlas analyze match`)"
"""What to do where a matching found nothing."""


class UnknownSide(UserError):
    """A name is neither a run's nor a circuit's."""


class BadSide(UserError):
    """What was asked of a side cannot be had together."""


class BadMatching(UserError):
    """A frame that is no matching, or one that leaves nothing to compare."""


@dataclass(frozen=True, slots=True)
class SideOptions:
    """Which edges of a run are a side's. sequence: one sequence's, by the beginning of its key. errors, output: whether those nodes are in it."""

    by: By = By.ABS_WEIGHT
    threshold: float = 0.0
    top_edges: int | None = None
    task: str | None = None
    sequence: str | None = None
    errors: bool = True
    output: bool = True

    def check(self) -> None:
        """Raise `BadSide`."""
        if self.task is not None and self.sequence is not None:
            raise BadSide(f"--task {self.task} and --sequence {self.sequence} exclude each other: give one")
        if not 0 <= self.threshold < float("inf"):
            raise BadSide(f"--threshold {self.threshold:g} is out of range: give 0 or more")
        if self.top_edges is not None and self.top_edges < 1:
            raise BadSide(f"--top-edges {self.top_edges} is too small: give at least 1")


@dataclass(frozen=True, eq=False)
class Regions:
    """Regions of interest as nodes of a small graph. nodes: `key`, `site`, `layer`, `kind`, `label`, `size`; one row a region.

    of_node: (n,) the region of every node of the side, −1 for those in none. weight: (R, R) what regions drive each other, ≥ 0, row: source; the sum
    of the side's own edges unless `measured`, which are attributions at threshold 0. key: the parcellation's.
    """

    key: str
    nodes: pl.DataFrame
    of_node: IntArray
    weight: FloatArray
    measured: bool = False

    @property
    def n(self) -> int:
        return self.nodes.height


@dataclass(frozen=True, eq=False)
class GraphSide:
    """One of two graphs. name: what it is, in words. nodes: as `NODES`, sorted by site, then key. source, target: (m,) rows of nodes, each pair once.

    weight: (m,) signed. strength: (m,) > 0, by which edges are ranked. roots: names of the sites without parents, and `error` where nothing enters
    error nodes. tasks, profile: names, and (n, n_tasks) how strong each task's edges at a node are, where that was measured. regions: where features
    have been put into some.
    """

    name: str
    run: str
    model: str
    nodes: pl.DataFrame
    source: IntArray
    target: IntArray
    weight: FloatArray
    strength: FloatArray
    roots: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    profile: FloatArray | None = None
    regions: Regions | None = None
    dictionaries: Mapping[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Nodes."""
        return self.nodes.height

    @property
    def m(self) -> int:
        """Edges."""
        return len(self.source)

    @cached_property
    def order(self) -> IntArray:
        """Each node's site by its place, (n,)."""
        return self.nodes["order"].to_numpy().astype(np.int64)

    @property
    def effective(self) -> EffectiveGraph:
        """As the graph that communities are found in and that is rewired."""
        return EffectiveGraph(self.nodes, self.source, self.target, self.strength, self.name)

    def with_targets(self, target: IntArray) -> "GraphSide":
        """The same edges with other targets, as rewiring leaves them."""
        return replace(self, target=target)


def read_side(store: GraphStore, name: str | None, options: SideOptions) -> GraphSide:
    """The edges of the run, or of the circuit, whose key begins with `name`; of the only run where it is None.

    Raises `UnknownSide`, `BadSide`, and what reading raises.
    """
    options.check()
    run, circuit = _named(store, name)
    if circuit is not None:
        if options.task is not None or options.sequence is not None:
            raise BadSide(f"{circuit} is a circuit, whose edges are what they are: leave out --task and --sequence")
        found = read_circuit(store, circuit)
        summed = found.edges.group_by("source", "target").agg(pl.col("weight").sum(), pl.col("strength").sum()).sort("source", "target")
        rows = summed.with_columns(pl.lit(-1, dtype=pl.Int64).alias("src_pos"), pl.lit(-1, dtype=pl.Int64).alias("dest_pos"))
        features, roots = found.nodes, input_roots(found.nodes)
        selection = Selection(run.key, threshold=options.threshold, by=options.by, top_edges=options.top_edges)
        title = f"circuit {circuit[:8]} of run {run.key[:8]}{_cut(options)}"
    else:
        sequence = None if options.sequence is None else _sequence(store, run, options.sequence)
        selection = Selection(
            run.key, threshold=options.threshold, by=options.by, top_edges=options.top_edges, sequence=sequence, task=options.task
        )
        rows = strengths(cut_effects(store, run, selection), selection)
        features = model_features(store, run.model)
        known = run_roots(run)
        roots = root_sites(rows, features) if known is None else known
        title = _title(run, options)
    return _side(title, run, Candidates.of(select(rows, selection), features, roots), options)


def _title(run: RunRow, options: SideOptions) -> str:
    """What the edges of a run are, in words that tell two sides apart."""
    steps = run.properties.get("steps")
    what = f"sequence {options.sequence} of " if options.sequence else f"task {options.task} of " if options.task else ""
    of_steps = f", {steps} step{'s' if steps != 1 else ''}" if steps else ""
    return f"{what}run {run.key[:8]} ({run.task}, {run.metric}{of_steps}){_cut(options)}"


def _cut(options: SideOptions) -> str:
    """What was left out of the edges: a stored comparison says it by its sides' names alone."""
    said = [f"strength at least {options.threshold:g}"] if options.threshold > 0 else []
    said += [f"the {options.top_edges:,} strongest edges"] if options.top_edges is not None else []
    said += [f"by {options.by.value}"] if options.by is not By.ABS_WEIGHT else []
    said += [f"without {what}" for what, there in (("error nodes", options.errors), ("the output", options.output)) if not there]
    return "".join(f", {part}" for part in said)


def _named(store: GraphStore, name: str | None) -> tuple[RunRow, str | None]:
    """The run, and the circuit's key where a circuit is meant."""
    runs = list_runs(store)
    fitting = [run for run in runs if name is None or run.key.startswith(name)]
    if len(fitting) == 1:
        return fitting[0], None
    known = ", ".join(f"{run.key} ({run.task}, {run.metric}, {run.properties.get('steps')} steps)" for run in runs) or "none"
    if fitting or name is None:
        raise UnknownSide(f"{'a run is needed' if name is None else f'run {name!r} is not unique'}: the graph has {known}")
    try:
        circuit = find_circuit(store, name)
    except UserError as unknown:
        raise UnknownSide(f"{name!r} is the beginning of no run's key and of no circuit's: the runs are {known}; {unknown}") from None
    own = [run for run in runs if run.key == circuit["run"]]
    if not own:
        raise UnknownSide(f"circuit {circuit['key']} is of run {circuit['run']}, which the graph does not have")
    return own[0], str(circuit["key"])


def _sequence(store: GraphStore, run: RunRow, name: str) -> str:
    """The whole key of a done sequence of a run. Raises `BadSide`."""
    from ..queries.runs import done_sequences

    fitting = sorted(key for key in done_sequences(store, run.key) if key.startswith(name))
    if name in fitting:
        return name
    if len(fitting) != 1:
        said = f"fits {len(fitting)} sequences" if fitting else "is no sequence"
        raise BadSide(f"--sequence {name!r} {said} of run {run.key}: `featlas query sequences --param run={run.key}` lists them")
    return fitting[0]


def _side(title: str, run: RunRow, candidates: Candidates, options: SideOptions) -> GraphSide:
    nodes = candidates.nodes
    allowed = np.ones(nodes.height, dtype=bool)
    for kind, wanted in (("output", options.output), ("error", options.errors)):
        if not wanted:
            allowed &= (nodes["kind"] != kind).to_numpy()
    kept = allowed[candidates.source] & allowed[candidates.target] & (candidates.strength > 0)
    if not kept.any():
        raise BadSide(f"no edge is left of {title}: lower --threshold, or keep more kinds of nodes")
    source, target = candidates.source[kept], candidates.target[kept]
    used = np.zeros(nodes.height, dtype=bool)
    used[source] = used[target] = True
    number = np.cumsum(used) - 1
    weight = candidates.edges["weight"].to_numpy()[kept]
    return GraphSide(
        title, run.key, run.model, nodes.filter(used).select(NODES), number[source], number[target], weight, candidates.strength[kept],
        candidates.roots, dictionaries=run.dictionaries,
    )  # fmt: skip


# --- which node is which ------------------------------------------------------------------------------------------------


def one_to_one(matched: pl.DataFrame) -> pl.DataFrame:
    """`source`, `target`, `score` of the pairs in which no feature occurs twice: always the best pair whose ends are both free, ties by key.

    Where the frame says which pairs are `significant` or `mutual`, the others are left out first. Raises `BadMatching` without these columns.
    """
    if missing := {"source", "target", "score"} - set(matched.columns):
        raise BadMatching(f"a matching needs columns source, target and score: {', '.join(sorted(missing))} is missing")
    for flag in ("significant", "mutual"):
        if flag in matched.columns:
            matched = matched.filter(pl.col(flag).fill_null(True))
    rest = matched.select("source", "target", "score").drop_nulls()
    # a strong negative match is a strong one, where the matching took both signs
    rest = rest.sort([pl.col("score").abs(), "source", "target"], descending=[True, False, False])
    rest, kept = rest.with_row_index("rank"), []
    while rest.height:
        # the best of its source and of its target: in any order of taking pairs, nothing can come before it
        best = rest.filter((pl.col("rank") == pl.col("rank").min().over("source")) & (pl.col("rank") == pl.col("rank").min().over("target")))
        kept.append(best)
        rest = rest.join(best.select("source"), on="source", how="anti").join(best.select("target"), on="target", how="anti").sort("rank")
    return pl.concat(kept).sort("rank").drop("rank") if kept else rest.drop("rank")


@dataclass(frozen=True, eq=False)
class Edges:
    """Edges between paired nodes. source, target: (m,) numbers of pairs; weight: signed; strength: > 0."""

    source: IntArray
    target: IntArray
    weight: FloatArray
    strength: FloatArray

    @property
    def m(self) -> int:
        return len(self.source)


@dataclass(frozen=True, eq=False)
class Paired:
    """Nodes that stand for each other. a, b: (M,) rows of each side's nodes, −1 where that graph has no edge at the node.

    pairs: `kind`, `site_a`, `site_b`, `score`, one row a pair. group: (M,) pairs of one number have the same kind and the same sites on both sides:
    their B ends may be exchanged.
    """

    side_a: GraphSide
    side_b: GraphSide
    a: IntArray
    b: IntArray
    pairs: pl.DataFrame

    @property
    def n(self) -> int:
        return len(self.a)

    @cached_property
    def both(self) -> NDArray[np.bool_]:
        """Which pairs both graphs have, (M,)."""
        return (self.a >= 0) & (self.b >= 0)

    @cached_property
    def group(self) -> IntArray:
        codes = self.pairs.select(pl.struct("kind", "site_a", "site_b").rank("dense").alias("group"))
        return codes["group"].to_numpy().astype(np.int64)

    def edges(self) -> tuple[Edges, Edges]:
        """The edges of A and of B both of whose ends are paired, on the pairs' numbers."""
        return _between(self.side_a, self.a), _between(self.side_b, self.b)

    def permuted(self, rng: np.random.Generator) -> IntArray:
        """A random renumbering (M,) of the pairs that both graphs have, inside their groups: what B's node of pair i is called then.

        The others keep their numbers: which nodes either graph has stays as it is.
        """
        drawn, both = np.arange(self.n), np.flatnonzero(self.both)
        group = self.group[both]
        drawn[both[np.argsort(group, kind="stable")]] = both[np.lexsort((rng.random(len(both)), group))]
        return drawn

    def of_b(self, edges: Edges) -> EffectiveGraph:
        """B's edges between paired nodes as a graph of the pairs, to be rewired."""
        nodes = self.pairs.select(pl.col("site_b").rank("dense").cast(pl.Int64).alias("order"))
        return EffectiveGraph(nodes, edges.source, edges.target, edges.strength)


def _between(side: GraphSide, rows: IntArray) -> Edges:
    number = np.full(side.n, -1, dtype=np.int64)
    there = np.flatnonzero(rows >= 0)
    number[rows[there]] = there
    source, target = number[side.source], number[side.target]
    kept = (source >= 0) & (target >= 0)
    return Edges(source[kept], target[kept], side.weight[kept], side.strength[kept])


def pair_nodes(a: GraphSide, b: GraphSide, matched: pl.DataFrame | None = None) -> Paired:
    """Which node of A is which of B. matched: `source` (key in A), `target` (key in B), `score`; None where both have the same keys.

    A node that only one graph has edges at is paired all the same where the matching, or the other's dictionary, knows what it is there, and the
    other's run has that dictionary. `site_a`
    and `site_b` of a matching say where that is; without them it is where most features of its site are matched to.
    Raises `BadMatching` where no feature that both graphs have is paired.
    """
    own = [side.nodes.with_row_index("row").select(pl.col("row").cast(pl.Int64), "key", "site", "kind") for side in (a, b)]
    features = _same_keys(a, b, *own) if matched is None else _matched_keys(_known(one_to_one(matched), a, b), matched, *own)
    if features.filter(pl.col("a").is_not_null() & pl.col("b").is_not_null()).is_empty():
        two = f"{a.name} ({a.model}) and {b.name} ({b.model})"
        if matched is None:
            raise BadMatching(f"the two graphs have no feature in common: {two}; match their features with `featlas analyze match`")
        n_pairs = one_to_one(matched).height
        if not n_pairs:
            raise BadMatching(f"the matching found no pair beyond chance: {two}; {NO_PAIR}")
        what = f"the matching found {n_pairs:,} pair{'s' if n_pairs != 1 else ''}, but none has edges in both graphs"
        raise BadMatching(f"{what}: {two}; keep more edges, name another one by --matching, or {NO_PAIR}")
    errors, output = (
        tuple(nodes.filter(pl.col("kind") == kind).select("row", "site") for nodes in own) for kind in ("error", "output")
    )
    sites = _site_pairs(features, set(errors[0]["site"]), set(errors[1]["site"]))
    of_errors = (
        errors[0].rename({"row": "a", "site": "site_a"})
        .join(sites, on="site_a", how="inner").join(errors[1].rename({"row": "b", "site": "site_b"}), on="site_b", how="full", coalesce=True)
    )  # fmt: skip
    of_errors = of_errors.join(sites.rename({"site_a": "other"}), on="site_b").with_columns(site_a=pl.coalesce("site_a", "other"))
    # an output is what it is, not its name: runs of different metrics call it differently
    outputs = output[0].rename({"row": "a", "site": "site_a"}).join(output[1].rename({"row": "b", "site": "site_b"}), how="cross")
    rows = [
        frame.with_columns(kind=pl.lit(kind), score=pl.col("score") if "score" in frame.columns else pl.lit(1.0))
        .select("a", "b", "kind", "site_a", "site_b", "score")
        for kind, frame in (("feature", features), ("error", of_errors), ("output", outputs))
    ]  # fmt: skip
    found = pl.concat(rows).sort("a", "b", nulls_last=True)
    ends = [found[name].fill_null(-1).to_numpy().astype(np.int64) for name in ("a", "b")]
    return Paired(a, b, ends[0], ends[1], found.select("kind", "site_a", "site_b", "score"))


def _same_keys(a: GraphSide, b: GraphSide, of_a: pl.DataFrame, of_b: pl.DataFrame) -> pl.DataFrame:
    """Features of one key; those of one graph alone where the other has the site by the same dictionary."""
    known = {site for site in {*a.dictionaries, *b.dictionaries} if a.dictionaries.get(site) == b.dictionaries.get(site)}
    anything = not a.dictionaries and not b.dictionaries and a.model == b.model
    left, right = (nodes.filter(pl.col("kind") == "feature") for nodes in (of_a, of_b))
    found = left.join(right, on="key", how="full", coalesce=True).select(
        pl.col("row").alias("a"), pl.col("row_right").alias("b"), pl.coalesce("site", "site_right").alias("site_a")
    )
    there = pl.col("a").is_not_null() & pl.col("b").is_not_null()
    kept = pl.lit(True) if anything else there | pl.col("site_a").is_in(sorted(known)) & pl.lit(a.model == b.model)
    return found.filter(kept).with_columns(pl.col("site_a").alias("site_b"), pl.lit(1.0).alias("score"))


def _known(pairs: pl.DataFrame, a: GraphSide, b: GraphSide) -> pl.DataFrame:
    """The pairs both of whose ends are features of their side's dictionaries: a graph lacks no edge at a site that its run did not measure."""
    for end, side in (("source", a), ("target", b)):
        if side.dictionaries:
            there = {feature_key(side.model, dictionary, site, "") for site, dictionary in side.dictionaries.items()}
            of_site = pl.col(end).str.replace(r"[^|]*$", "")
            pairs = pairs.filter(of_site.is_in(sorted(there)) | pl.col(end).is_in(side.nodes["key"].to_list()))
    return pairs


def _matched_keys(pairs: pl.DataFrame, matched: pl.DataFrame, of_a: pl.DataFrame, of_b: pl.DataFrame) -> pl.DataFrame:
    """Matched features that at least one of the graphs has."""
    said = [name for name in ("site_a", "site_b") if name in matched.columns]
    pairs = pairs.join(matched.select("source", "target", *said).unique(["source", "target"]), on=["source", "target"], how="left")
    pairs = pairs.with_columns(pl.lit(None, dtype=pl.String).alias(name) for name in ("site_a", "site_b") if name not in said)
    left, right = (nodes.select(pl.col("row").alias(row), "key", pl.col("site").alias(f"own_{row}")) for nodes, row in ((of_a, "a"), (of_b, "b")))
    found = pairs.join(left, left_on="source", right_on="key", how="left").join(right, left_on="target", right_on="key", how="left")
    found = found.filter(pl.col("a").is_not_null() | pl.col("b").is_not_null())
    found = found.with_columns(site_a=pl.coalesce("own_a", "site_a"), site_b=pl.coalesce("own_b", "site_b"))
    sites = [_most(found.drop_nulls(["site_a", "site_b"]), one, other) for one, other in (("site_b", "site_a"), ("site_a", "site_b"))]
    found = found.join(sites[0], on="site_b", how="left").join(sites[1], on="site_a", how="left")
    found = found.with_columns(site_a=pl.coalesce("site_a", "most_site_a"), site_b=pl.coalesce("site_b", "most_site_b"))
    return found.drop_nulls(["site_a", "site_b"])


def _most(features: pl.DataFrame, one: str, other: str) -> pl.DataFrame:
    """`one`, `most_{other}`: where most features of each site are matched to, ties by name."""
    counted = features.group_by(one, other).len().sort(["len", other], descending=[True, False])
    return counted.group_by(one, maintain_order=True).agg(pl.col(other).first().alias(f"most_{other}"))


def _site_pairs(features: pl.DataFrame, of_a: set[str], of_b: set[str]) -> pl.DataFrame:
    """`site_a`, `site_b`: sites whose error nodes stand for each other: each is where most of the other's features are matched to.

    Sites of one name, neither of which has a matched feature, stand for each other too.
    """
    there = _most(features, "site_a", "site_b").join(_most(features, "site_b", "site_a"), left_on="most_site_b", right_on="site_b")
    mutual = there.filter(pl.col("site_a") == pl.col("most_site_a")).select("site_a", pl.col("most_site_b").alias("site_b"))
    same = sorted((of_a - set(features["site_a"])) & (of_b - set(features["site_b"])))
    return pl.concat([mutual, pl.DataFrame({"site_a": same, "site_b": same}, schema={"site_a": pl.String, "site_b": pl.String})])
