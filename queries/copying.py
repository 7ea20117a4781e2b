"""A graph brought into another, by whichever databases the two are held; what is there already is left, so that a copy that was stopped goes on.

1. `Selection`: all of the source, or some runs with what hangs on them.
2. `refuse_clashes` looks, before anything is written, for nodes and sequences' edges that both graphs have and that say different things.
3. Nodes first, in blocks: those that are missing are made; of those that are there, what is empty is filled in. A run is unfinished at first.
4. A sequence's edges and its mark go in one transaction, as when they were measured: a copy that was killed resumes at those without a mark.
5. All other edges in blocks, by identity; at last what a run says of itself: that it is done.
6. `verify` reads both sides once more: each type's rows are counted and hashed, as they should be and as they are.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import polars as pl

from ..errors import FeatlasError, UserError
from .pruning import delete_edges
from .runs import DONE, RUNNING, aggregate
from .schema import EDGES, NODES, edge_type
from .store import GraphStore, SequenceCommit
from .streaming import EDGES_PER_BLOCK, added_hashes, content_hash, edge_blocks, node_keys, read_nodes

NODES_PER_BLOCK = 20_000

# What may be said differently of one thing in two atlases: each group of columns goes together.
SOFT: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "Meta": (("value",),),
    "Feature": (("label", "label_kind"), ("frequency", "mean_activation", "statistics_run")),
    "Run": (("status",), ("n_planned",), ("n_sequences",), ("n_edges",), ("task",), ("seed",), ("version",), ("settings",)),
    "Circuit": (("faithfulness",), ("completeness",), ("task",), ("description",), ("settings",)),
    "Partition": (("settings",), ("notes",)),
    "Block": (("label",), ("automatic_label",), ("attributed_task", "attributed_share", "attributed_run")),
}  # fmt: skip
_ABLATION = ("ablation_effect", "ablation_metric", "ablation_baseline")
RUN_STATE = ("status", "n_planned", "n_sequences", "n_edges")

Report = Callable[[int, int, str], None]


class Clashes(StrEnum):
    """What is done where both atlases say different things of the same."""

    REFUSE = "refuse"
    """Nothing is copied."""
    KEEP = "keep"
    """The target's stays."""
    REPLACE = "replace"
    """The source's goes in."""


class AtlasesClash(UserError):
    """Two atlases say different things of the same node, edge or row."""

    def __init__(self, what: str, n: int, examples: Sequence[str]) -> None:
        shown = "; ".join(examples[:3]) + ("; …" if n > 3 else "")
        super().__init__(
            f"source and target say different things of {n} {what}: {shown}. Nothing of these was written: choose what counts with "
            "--on-clash keep (the target's) or replace (the source's), or copy into another atlas"
        )


class UnknownRuns(UserError):
    """A run was asked for that the source does not have."""


class CopyDiffers(FeatlasError):
    """What was copied is not what was to be copied."""


@dataclass(frozen=True)
class Selection:
    """What is taken of a graph: keys by label, the runs whose edges go with them; None is all."""

    runs: tuple[str, ...] | None = None
    nodes: Mapping[str, pl.Series] = field(default_factory=dict)

    def of_nodes(self, label: str, rows: pl.DataFrame) -> pl.DataFrame:
        """Those of a label's rows that are taken."""
        if self.runs is None:
            return rows
        return rows.filter(pl.col("key").is_in(self.nodes[label].implode())) if label in self.nodes else rows.clear()

    def of_edges(self, type: str, rows: pl.DataFrame) -> pl.DataFrame:
        """Those of a type's rows that are taken: of the runs, of their circuits, or between what is taken."""
        if self.runs is None:
            return rows
        if type in ("CORRELATES", "WIRED", "MATCHES"):  # these are of no run of edges
            return rows.clear()
        edge = edge_type(type)
        if type in ("ATTRIBUTES", "INFLUENCES"):
            return rows.filter(pl.col("run").is_in(list(self.runs)))
        if "circuit" in edge.identity:
            return rows.filter(pl.col("circuit").is_in(self.nodes["Circuit"].implode()))
        between = rows.filter(pl.col("source").is_in(self._ends(type, 0).implode()) & pl.col("target").is_in(self._ends(type, 1).implode()))
        return between.filter(pl.col("run").is_in(list(self.runs))) if "run" in edge.identity else between

    def _ends(self, type: str, side: int) -> pl.Series:
        labels = dict.fromkeys(ends[side] for ends in edge_type(type).ends)
        return pl.concat([self.nodes.get(label, pl.Series([], dtype=pl.String)) for label in labels])


@dataclass(frozen=True)
class TypeCopied:
    """One label or type after a copy. n: rows of the source that were to be there; written: by this call; kept: where the target's own stays.

    expected, found: hashes of those rows as they should be in the target, and as they are.
    """

    type: str
    n: int
    written: int
    kept: int
    expected: tuple[int, int]
    found: tuple[int, int]

    @property
    def equal(self) -> bool:
        """Whether the target has these rows as it should."""
        return self.expected == self.found


def copy_graph(
    source: GraphStore, target: GraphStore, *, selection: Selection | None = None, clashes: Clashes = Clashes.REFUSE, report: Report | None = None
) -> list[TypeCopied]:
    """Bring the source's graph, or what `select` chose of it, into the target, and verify it; what the target has already is left.

    `refuse_clashes` is to be asked before. Raises `AtlasesClash` for edges and, where the target is not as it should be afterwards, `CopyDiffers`.
    """
    job = _Job(source, target, selection or Selection(), clashes, report or (lambda done, total, detail: None))
    job.write()
    return job.verify()


def refuse_clashes(source: GraphStore, target: GraphStore, selection: Selection | None = None) -> None:
    """Raise `AtlasesClash` where both graphs have a node and say different things of it that cannot both be."""
    _Job(source, target, selection or Selection(), Clashes.REFUSE, lambda done, total, detail: None).refuse_clashes()


def select(source: GraphStore, runs: Sequence[str] | None) -> Selection:
    """All of a graph, or what belongs to some runs: their sequences, circuits, communities and the features of all these. Raises `UnknownRuns`."""
    if runs is None:
        return Selection()
    known = node_keys(source, "Run").to_list()
    missing = [run for run in runs if run not in known]
    if missing:
        raise UnknownRuns(f"the source has no run {missing[0]!r}: it has {', '.join(known) or 'none'}")
    given = {"runs": list(runs)}
    ask = lambda text, parameters=given: _keys(source, text, parameters)
    circuits = ask("MATCH (c:Circuit) WHERE c.run IN $runs RETURN c.key AS key")
    in_circuits = "MATCH (b:Block)-[:IN_CIRCUIT]->(c:Circuit) WHERE c.key IN $circuits RETURN DISTINCT b.parcellation AS key"
    parcellations = pl.concat([
        ask("MATCH (p:Partition)-[:OF_RUN]->(r:Run) WHERE r.key IN $runs RETURN DISTINCT p.parcellation AS key"),
        ask("MATCH (a:Block)-[e:DRIVES]->(:Block) WHERE e.run IN $runs RETURN DISTINCT a.parcellation AS key"),
        ask(in_circuits, {"circuits": circuits.to_list()}),
    ]).unique()  # fmt: skip
    of_them = {"parcellations": parcellations.to_list()}
    blocks = ask("MATCH (b:Block) WHERE b.parcellation IN $parcellations RETURN b.key AS key", of_them)
    scored = {"subjects": pl.concat([circuits, blocks]).to_list()}
    features = pl.concat([
        *(ask(f"MATCH (a:Feature)-[e:{type}]->(b:Feature) WHERE e.run IN $runs RETURN DISTINCT {end}.key AS key")
          for type in ("ATTRIBUTES", "INFLUENCES") for end in "ab"),
        ask("MATCH (f:Feature)-[:IN_CIRCUIT]->(c:Circuit) WHERE c.key IN $circuits RETURN DISTINCT f.key AS key", {"circuits": circuits.to_list()}),
        ask("MATCH (f:Feature)-[:ABLATED]->(r:Run) WHERE r.key IN $runs RETURN DISTINCT f.key AS key"),
        ask("MATCH (f:Feature)-[:MEMBER_OF]->(b:Block) WHERE b.parcellation IN $parcellations RETURN DISTINCT f.key AS key", of_them),
    ]).unique()  # fmt: skip
    return Selection(tuple(runs), {
        "Run": pl.Series("key", list(runs), dtype=pl.String),
        "Model": ask("MATCH (m:Model) RETURN m.key AS key", {}).filter(ask("MATCH (m:Model) RETURN m.key AS key", {}).is_in(
            ask("MATCH (r:Run) WHERE r.key IN $runs RETURN DISTINCT r.model AS key").implode())),
        "Feature": features,
        "Sequence": ask("MATCH (r:Run)-[:ON_SEQUENCE]->(s:Sequence) WHERE r.key IN $runs RETURN DISTINCT s.key AS key"),
        "Circuit": circuits,
        "Block": blocks,
        "Partition": ask("MATCH (p:Partition) WHERE p.parcellation IN $parcellations RETURN p.key AS key", of_them),
        "Score": ask("MATCH (s:Score) WHERE s.subject IN $subjects RETURN s.key AS key", scored),
    })  # fmt: skip


def _keys(store: GraphStore, text: str, parameters: Mapping[str, object]) -> pl.Series:
    """The column `key` of an answer; an empty list that is asked for fits nothing."""
    if any(isinstance(value, list) and not value for value in parameters.values()):
        return pl.Series("key", [], dtype=pl.String)
    return store.query(text, parameters)["key"].cast(pl.String).drop_nulls()


def merged(source: pl.DataFrame, target: pl.DataFrame, clashes: Clashes, *, soft: Sequence[Sequence[str]], identity: Sequence[str]) -> pl.DataFrame:
    """Rows of the source as they should be in the target, given those that it has: what is empty there is filled in, what differs as `clashes` says.

    Soft columns that differ stay as the target has them unless it is to be replaced; others only where the target's is to be kept.
    """
    if target.is_empty() or target is source:
        return source
    target = target.unique(list(identity), keep="first", maintain_order=True)  # what it has twice is held against once
    both = source.join(target, on=list(identity), how="left", suffix="__t", coalesce=True, nulls_equal=True, maintain_order="left")
    both = both.with_columns(there=pl.Series(_there(source, target, identity)))
    grouped = {name for group in soft for name in group}
    groups = [*soft, *([name] for name in source.columns if name not in identity and name not in grouped)]
    chosen: list[pl.Expr] = [pl.col(name) for name in identity]
    for group in groups:
        sources = clashes is Clashes.REPLACE or (clashes is Clashes.REFUSE and not grouped.issuperset(group))
        empty = pl.all_horizontal(pl.col(name if sources else f"{name}__t").is_null() for name in group)
        for name in group:
            mine, theirs = pl.col(f"{name}__t"), pl.col(name)
            value = pl.when(empty).then(mine).otherwise(theirs) if sources else pl.when(empty).then(theirs).otherwise(mine)
            chosen.append(pl.when("there").then(value).otherwise(theirs).alias(name))
    return both.select(chosen).select(source.columns)


def _there(source: pl.DataFrame, target: pl.DataFrame, identity: Sequence[str]) -> pl.Series:
    marked = target.select(identity).unique().with_columns(there=pl.lit(True))
    return source.select(identity).join(marked, on=list(identity), how="left", nulls_equal=True, maintain_order="left")["there"].fill_null(False)


@dataclass
class _Job:
    """A copy on its way."""

    source: GraphStore
    target: GraphStore
    selection: Selection
    clashes: Clashes
    report: Report
    written: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    mixed: set[str] = field(default_factory=set)  # runs of which the target has what the source has not, so that its own counts
    stayed: list[pl.DataFrame] = field(default_factory=list)  # `run, sequence`: what the target keeps as it has it

    # -- nodes

    def _node_blocks(self, label: str) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
        """The source's nodes that are taken, and those of the target that have the same keys."""
        keys = self.selection.nodes.get(label) if self.selection.runs is not None else node_keys(self.source, label)
        keys = pl.Series("key", [], dtype=pl.String) if keys is None else keys.unique().sort()
        for start in range(0, len(keys), NODES_PER_BLOCK):
            block = keys.slice(start, NODES_PER_BLOCK)
            yield read_nodes(self.source, label, block), read_nodes(self.target, label, block)

    def refuse_clashes(self) -> None:
        """Raise `AtlasesClash` where both graphs have a node and say different things of it that cannot both be."""
        for label in (name for name in NODES if name != "Meta"):
            soft = {name for group in SOFT.get(label, ()) for name in group}
            hard = [name for name in NODES[label].columns if name not in soft]
            for source, target in self._node_blocks(label):
                refuse_differing(f"{label} nodes", source, target, ["key"], hard)
        for run in self._runs():
            if (found := self._differing(run)).height:
                rows = found.head(3).rows()
                shown = [f"run {run} has {n} edges in sequence {sequence}, and {'others' if n == own else own}" for sequence, n, own in rows]
                raise AtlasesClash("sequences", found.height, shown)

    def _merge_nodes(self, label: str) -> None:
        for source, target in self._node_blocks(label):
            wanted = merged(source, target, self.clashes, soft=SOFT.get(label, ()), identity=["key"])
            self._count_kept(label, source, wanted)
            if label == "Run":  # it is done, and has what it has, when its edges are there
                state = target.select("key", *RUN_STATE)
                # a run that is closed there and open here was copied before it was
                closed = target.filter(pl.col("status") == DONE).join(source.filter(pl.col("status").ne_missing(DONE)), on="key", how="semi")
                self.mixed |= set(closed["key"])
                wanted = wanted.drop(RUN_STATE).join(state, on="key", how="left", maintain_order="left").select(wanted.columns)
                wanted = wanted.with_columns(pl.col("status").fill_null(RUNNING), pl.col("n_planned").fill_null(source["n_planned"]))
            new = unequal(wanted, target)
            if new.height:
                self.target.merge_nodes(label, new)
            self.written[label] = self.written.get(label, 0) + new.height

    def _count_kept(self, type: str, source: pl.DataFrame, wanted: pl.DataFrame) -> None:
        self.kept[type] = self.kept.get(type, 0) + unequal(source, wanted).height

    # -- edges

    def write(self) -> None:
        """Everything, in an order in which what is there is always true."""
        labels = [label for label in NODES if label != "Meta"]
        types = [type for type in EDGES if type not in ("ATTRIBUTES", "ON_SEQUENCE")]
        total = len(labels) + len(types) + 1
        for done, label in enumerate(labels):
            self.report(done, total, label)
            self._merge_nodes(label)
        self.report(len(labels), total, "ATTRIBUTES")
        self.mixed |= {run for run in self._runs() if self._sequences(run)}
        for done, type in enumerate(types, len(labels) + 1):
            self.report(done, total, type)
            self._merge_edges(type, self.mixed)
        self._finish(self.mixed)

    def _runs(self) -> list[str]:
        return list(self.selection.runs) if self.selection.runs is not None else node_keys(self.source, "Run").to_list()

    def _differing(self, run: str) -> pl.DataFrame:
        """The sequences of a run that both have and say different things of, as `differing_sequences` gives them."""
        marks, there = read_marks(self.source, run), read_marks(self.target, run)
        both = marks.select("sequence").join(there, on="sequence", how="semi")
        if both.is_empty():
            return differing_sequences(marks, sequence_hashes([]), there, sequence_hashes([]))
        parts = [
            sequence_hashes(rows.join(both, on="sequence", how="semi") for (rows,) in edge_blocks("ATTRIBUTES", store, run=run))
            for store in (self.source, self.target)
        ]
        return differing_sequences(marks, parts[0], there, parts[1])

    def _sequences(self, run: str) -> bool:
        """Copy a run's edges sequence by sequence; whether the target then has sequences of it that the source does not have so."""
        marks, there = read_marks(self.source, run), read_marks(self.target, run)
        missing = marks.join(there, on="sequence", how="anti")
        differing = self._differing(run) if self.clashes is not Clashes.REFUSE else there.clear()  # which was asked before
        if self.clashes is Clashes.KEEP:
            self.stayed.append(differing.select(run=pl.lit(run), sequence="sequence"))
            kept = {"ATTRIBUTES": int(differing["n"].sum()), "ON_SEQUENCE": differing.height}
            self.kept |= {type: self.kept.get(type, 0) + n for type, n in kept.items()}
        elif differing.height:
            # first what follows from the edges: a copy that is killed in between derives, or takes, all of it
            delete_edges(self.target, "INFLUENCES", run, lambda done, total, detail: None)
            missing = pl.concat([missing, marks.join(differing, on="sequence", how="semi")])
        batch = (pl.col("n_edges").fill_null(0).cum_sum() - pl.col("n_edges").fill_null(0)) // EDGES_PER_BLOCK
        for part in missing.with_columns(batch=batch).partition_by("batch", maintain_order=True):
            edges = sequences_edges(self.source, run, part["sequence"].to_list()).partition_by("sequence", as_dict=True)
            empty = pl.DataFrame(schema={"source": pl.String, "target": pl.String, "src_pos": pl.Int64, "dest_pos": pl.Int64, "weight": pl.Float64})
            rows = part.drop("batch").rows(named=True)
            commits = [SequenceCommit(run, row.pop("sequence"), empty, row) for row in rows]
            commits = [
                SequenceCommit(run, one.sequence, edges[one.sequence,].drop("run", "sequence"), one.mark) if (one.sequence,) in edges else one
                for one in commits
            ]
            for sequence in sorted(set(part["sequence"]) & set(differing["sequence"])):
                delete_sequence(self.target, run, sequence)
            self.target.commit_sequences(commits)
            written = {"ATTRIBUTES": sum(one.edges.height for one in commits), "ON_SEQUENCE": len(commits)}
            self.written |= {type: self.written.get(type, 0) + n for type, n in written.items()}
        kept_otherwise = self.clashes is Clashes.KEEP and differing.height > 0
        return kept_otherwise or there.join(marks, on="sequence", how="anti").height > 0

    def _edge_blocks(self, type: str) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
        """The source's edges that are taken, and those of the target that have the same identity."""
        identity = ["source", "target", *EDGES[type].identity]
        for run in self.selection.runs or (None,):
            for source, target in edge_blocks(type, self.source, self.target, run=run):
                taken = self.selection.of_edges(type, source)
                if target.height == taken.height and content_hash(target) == content_hash(taken):
                    target = taken  # mostly so when a copy is verified: one frame instead of two, and nothing to be joined
                elif target.height:
                    target = target.join(taken.select(identity), on=identity, how="semi")
                if taken.height:
                    yield taken, target
                del source, taken, target  # before the next block is read
            if "run" not in EDGES[type].identity:
                return

    def _merge_edges(self, type: str, mixed: Collection[str]) -> None:
        identity, soft = rules(type)
        hard = [name for name in EDGES[type].columns if name not in _ABLATION]
        for source, target in self._edge_blocks(type):
            if type == "INFLUENCES":  # these follow from the edges: those of a run that both have a part of are derived anew
                if mixed:
                    source, target = (rows.filter(~pl.col("run").is_in(list(mixed))) for rows in (source, target))
            elif self.clashes is Clashes.REFUSE:
                refuse_differing(f"{type} edges", source, target, identity, hard)
            policy = Clashes.REPLACE if type == "INFLUENCES" else self.clashes
            wanted = merged(source, target, policy, soft=soft, identity=identity)
            self._count_kept(type, source, wanted)
            new = unequal(wanted, target)
            if new.height:
                self.target.merge_edges(type, new)
            self.written[type] = self.written.get(type, 0) + new.height
            del source, target, wanted, new

    def _finish(self, mixed: Collection[str]) -> None:
        """What runs say of themselves: as the source does, or, where the target has sequences of its own, as is counted there."""
        for run in mixed:
            derive_influences(self.target, run)
        for source, target in self._node_blocks("Run"):
            state = source.select("key", *RUN_STATE).filter(~pl.col("key").is_in(list(mixed)))
            new = unequal(state, target.select(state.columns))
            if new.height:
                self.target.merge_nodes("Run", new)

    # -- verifying

    def verify(self) -> list[TypeCopied]:
        """Read both sides again: every type's rows as they should be in the target, and as they are. Raises `CopyDiffers`."""
        came = {run for run in self._runs() if read_marks(self.target, run).join(read_marks(self.source, run), on="sequence", how="anti").height}
        mixed = self.mixed | came
        found = [self._verified(label, self._node_blocks(label), mixed) for label in NODES if label != "Meta"]
        found += [self._verified(type, self._edge_blocks(type), mixed) for type in EDGES]
        wrong = [one.type for one in found if not one.equal]
        if wrong:
            raise CopyDiffers(
                f"the copy is not what it should be: {', '.join(wrong)} differ. Repeat the command, which writes what is missing; if it says so "
                "again, look at both with `featlas atlas check`" + ("" if self.clashes is Clashes.REPLACE else ", or choose --on-clash replace")
            )
        return found

    def _verified(self, type: str, blocks: Iterator[tuple[pl.DataFrame, pl.DataFrame]], mixed: Collection[str]) -> TypeCopied:
        n, expected, there = 0, (0, 0), (0, 0)
        identity, soft = rules(type)
        own = {"INFLUENCES": "run", "Run": "key"}.get(type)  # of runs that both have a part of, the target's are its own
        for source, target in blocks:
            if own is not None and mixed:
                source, target = (rows.filter(~pl.col(own).is_in(list(mixed))) for rows in (source, target))
            source, target = (self._without_stayed(type, rows) for rows in (source, target))
            policy = Clashes.REPLACE if type in ("ATTRIBUTES", "INFLUENCES", "ON_SEQUENCE") else self.clashes
            wanted = merged(source, target, policy, soft=soft, identity=identity)
            n += source.height
            wanted_hash = content_hash(wanted)
            expected, there = added_hashes(expected, wanted_hash), added_hashes(there, wanted_hash if wanted is target else content_hash(target))
            del source, target, wanted
        return TypeCopied(type, n, self.written.get(type, 0), self.kept.get(type, 0), expected, there)


    def _without_stayed(self, type: str, rows: pl.DataFrame) -> pl.DataFrame:
        """A block's rows but for those of sequences that the target keeps as it has them."""
        ends = {"ATTRIBUTES": ["run", "sequence"], "ON_SEQUENCE": ["source", "target"]}.get(type)
        stayed = pl.concat(self.stayed) if self.stayed else None
        return rows if ends is None or stayed is None else rows.join(stayed, left_on=ends, right_on=["run", "sequence"], how="anti")


def rules(type: str) -> tuple[list[str], Sequence[Sequence[str]]]:
    """What identifies the rows of a label or type, and which of their columns may differ."""
    if type in NODES:
        return ["key"], SOFT.get(type, ())
    edge = EDGES[type]
    return ["source", "target", *edge.identity], [_ABLATION] if set(_ABLATION) <= set(edge.columns) else []


def unequal(rows: pl.DataFrame, others: pl.DataFrame) -> pl.DataFrame:
    """The rows that are not among others as they are, null being equal to null."""
    if others.is_empty() or rows is others:
        return rows if others.is_empty() else rows.clear()
    return rows.join(others, on=rows.columns, how="anti", nulls_equal=True)


def refuse_differing(what: str, source: pl.DataFrame, target: pl.DataFrame, identity: Sequence[str], columns: Sequence[str]) -> None:
    """Raise `AtlasesClash` where rows of one identity differ in a column that both have a value in."""
    both = source.join(target, on=list(identity), how="inner", suffix="__t", nulls_equal=True)
    differs = {name: (pl.col(name) != pl.col(f"{name}__t")).fill_null(False) for name in columns}
    if both.is_empty() or not columns:
        return
    bad = both.filter(pl.any_horizontal(differs.values()))
    if bad.height:
        examples = []
        for row in bad.head(3).iter_rows(named=True):
            name = next(name for name in columns if row[name] is not None and row[f"{name}__t"] is not None and row[name] != row[f"{name}__t"])
            examples.append(f"{' → '.join(str(row[part]) for part in identity[:2])} has {name} {row[name]!r} and {row[f'{name}__t']!r}")
        raise AtlasesClash(what, bad.height, examples)


MARK = {"sequence": pl.String(), "status": pl.String(), "n_edges": pl.Int64(), "metric_clean": pl.Float64(), "metric_corrupt": pl.Float64()}
"""What a mark says, with the sequence that it is of."""


def read_marks(store: GraphStore, run: str) -> pl.DataFrame:
    """The marks of a run, columns of `MARK`, by sequence."""
    text = (
        "MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) WHERE r.key = $run RETURN s.key AS sequence, m.status AS status, m.n_edges AS n_edges,"
        " m.metric_clean AS metric_clean, m.metric_corrupt AS metric_corrupt ORDER BY sequence"
    )
    rows = store.query(text, {"run": run})
    return pl.DataFrame(schema=MARK) if rows.is_empty() else rows.cast(MARK)  # type: ignore[arg-type]


def sequence_hashes(blocks: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """How many `ATTRIBUTES` the sequences of runs have, and a hash of them in which order does not count: `run, sequence, n, first, second`."""
    sums = pl.DataFrame(schema={"run": pl.String, "sequence": pl.String, "n": pl.Int64, "first": pl.UInt64, "second": pl.UInt64})
    for rows in blocks:
        values = rows.select("source", "target", "src_pos", "dest_pos", pl.col("weight") + 0.0)  # -0.0 and 0.0 are one number
        hashes = {name: values.hash_rows(seed=seed) for name, seed in (("first", 11), ("second", 1789))}
        counted = rows.select("run", "sequence", n=pl.lit(1, pl.Int64)).with_columns(**hashes)
        sums = added_sequences(pl.concat([sums, counted]))
    return sums


def added_sequences(sums: pl.DataFrame) -> pl.DataFrame:
    """Numbers and hashes of parts of sequences, added up; hashes modulo 2⁶⁴."""
    return sums.group_by("run", "sequence").agg(pl.col("n", "first", "second").sum())


def differing_sequences(marks: pl.DataFrame, sums: pl.DataFrame, own_marks: pl.DataFrame, own_sums: pl.DataFrame) -> pl.DataFrame:
    """The sequences of a run that two graphs have and say different things of, in their edges or their marks: `sequence, n, n__own`.

    marks: as `read_marks` gives them. sums: as `sequence_hashes` does, of the run alone. Null contradicts nothing.
    """
    both = marks.join(own_marks, on="sequence", suffix="__own")
    for suffix, added in (("", sums), ("__own", own_sums)):
        named = added.select("sequence", *(pl.col(name).alias(name + suffix) for name in ("n", "first", "second")))
        both = both.join(named, on="sequence", how="left").with_columns(pl.col(f"{name}{suffix}").fill_null(0) for name in ("n", "first", "second"))
    differs = [(pl.col(name) != pl.col(f"{name}__own")).fill_null(False) for name in (*MARK, "n", "first", "second") if name != "sequence"]
    return both.filter(pl.any_horizontal(differs)).select("sequence", "n", "n__own").sort("sequence")


def delete_sequence(store: GraphStore, run: str, sequence: str) -> None:
    """Delete a sequence's mark and edges of a run, in one transaction."""
    given = {"run": run, "sequence": sequence}
    edges = "(:Feature)-[e:ATTRIBUTES]->(:Feature) WHERE e.sequence = $sequence AND [e.run] = [$run]"  # as in `sequences_edges`
    n = int(store.query(f"MATCH {edges} RETURN count(*) AS n", given)["n"][0])
    with_edges = f"WITH m MATCH {edges} DELETE m, e" if n else "DELETE m"
    store.query(f"MATCH (r:Run {{key: $run}})-[m:ON_SEQUENCE]->(s:Sequence {{key: $sequence}}) {with_edges}", given, write=True)


def sequences_edges(store: GraphStore, run: str, sequences: Sequence[str]) -> pl.DataFrame:
    """The `ATTRIBUTES` of some sequences of a run, all columns."""
    edge = EDGES["ATTRIBUTES"]
    columns = ", ".join(f"e.`{name}` AS `{name}`" for name in edge.properties)
    # a run is compared inside a list, where no index applies: a server would look up all edges of the run instead of the sequences'
    text = (
        "MATCH (a:Feature)-[e:ATTRIBUTES]->(b:Feature) WHERE e.sequence IN $sequences AND [e.run] = [$run]"
        f" RETURN a.key AS source, b.key AS target, {columns}"
    )
    rows = store.query(text, {"run": run, "sequences": list(sequences)})
    types = {name: column.dtype for name, column in edge.all_columns.items()}
    return pl.DataFrame(schema=types) if rows.is_empty() else rows.select(pl.col(name).cast(dtype) for name, dtype in types.items())


def derive_influences(store: GraphStore, run: str) -> int:
    """Derive a run's `INFLUENCES` from its edges, and count what it has; how many there are."""
    from .runs import done_sequences, record_counts

    n_done, n = len(done_sequences(store, run)), 0
    for (edges,) in edge_blocks("ATTRIBUTES", store, run=run) if n_done else ():
        influences = aggregate(edges, n_done).with_columns(run=pl.lit(run))
        store.merge_edges("INFLUENCES", influences)
        n += influences.height
    record_counts(store, run, n_sequences=n_done)
    return n
