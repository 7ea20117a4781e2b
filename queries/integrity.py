"""Is an atlas whole? What it holds, held against itself: each finding says what is wrong, how often, where, and what mends it. Nothing is changed.

1. The graph by itself: every row is read, in blocks. Keys and what they are made of, edges that are there twice, weights that are no numbers,
   marks against the edges that are there, runs against their marks, `INFLUENCES` against what follows from the edges, circuits against their parts.
2. The graph against the statistics: runs, matchings and parcellations that one names and the other lacks; what is copied onto features.
3. The statistics by themselves: every table is read; rows of things that are not there.
4. The files: samples against what their manifests say, manifests against runs, what killed processes left.

A server may be written to meanwhile. A sequence's edges come with its mark, so that runs and marks are read before the edges and after: what only the
later reading has does not lack edges, and what only the earlier one has is being deleted.
"""

import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
import polars as pl

from .atlases import MANIFESTS, abandoned
from .belongings import BELONGINGS, Owner, tables_of
from .checking import same_values
from .pruning import DELETING, unfinished_runs, unused
from .runs import DONE, aggregate
from .samples import SampleStore
from .schema import EDGES, NODES
from .statistics import FILE_NAME, StatisticsStore
from .store import GraphStore, KeyRange
from .streaming import EDGES_PER_BLOCK, edge_blocks, edge_counts, hub_counts, key_ranges, node_blocks, node_keys

TOLERANCE = 1e-9
"""How far apart numbers may be that follow from others: databases and machines add up in different orders."""

EXAMPLES = 3
SHARDS = "shards"
"""The folder of a statistics run's parts in which those are that were measured one by one."""

Report = Callable[[int, int, str], None]


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """What is stored is wrong, or contradicts itself."""
    WARNING = "warning"
    """Something is unfinished, or names what is not there."""
    NOTE = "note"
    """Nothing is wrong; it could be tidied."""


class Repair(StrEnum):
    """What can be derived again from what is certain."""

    INFLUENCES = "influences"
    UNMARKED = "edges without a mark"
    RUN_COUNTS = "run counts"
    CIRCUIT_COUNTS = "circuit counts"
    STATISTICS = "statistics on features"
    LABELS = "labels on features"
    ORPHANS = "orphans"
    UNUSED = "unused nodes"
    TABLES = "rows of things that are gone"
    LEFTOVERS = "leftovers of killed processes"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: `n` cases of it, some as examples, the command that mends it, what `repair` does about it."""

    severity: Severity
    what: str
    n: int
    examples: tuple[str, ...] = ()
    mend: str = ""
    repair: Repair | None = None


REPAIR = "featlas atlas check --repair"
OF_STATISTICS = (Repair.STATISTICS, Repair.LABELS, Repair.TABLES, Repair.ORPHANS, Repair.LEFTOVERS)
"""What is mended by reading or writing the statistics."""

UNREADABLE = "put a copy of the file in its place (`featlas atlas copy` makes them); without one, move the file away and measure again"


@dataclass
class Checked:
    """An atlas while it is looked at."""

    store: GraphStore
    statistics: StatisticsStore | None = None
    folder: Path | None = None
    fast: bool = False
    size: int = EDGES_PER_BLOCK
    runs: dict[str, Mapping[str, object]] = field(default_factory=dict)
    marks: pl.DataFrame = field(default_factory=pl.DataFrame)
    unread: set[str] = field(default_factory=set)
    """Tables of the statistics that cannot be read: what needs them is not looked at."""

    def reads(self, *tables: str) -> bool:
        """Whether all of these tables of the statistics can be read."""
        return self.unread.isdisjoint(tables)


def check_atlas(
    store: GraphStore,
    statistics: StatisticsStore | None = None,
    folder: Path | None = None,
    *,
    fast: bool = False,
    report: Report | None = None,
    size: int = EDGES_PER_BLOCK,
) -> list[Finding]:
    """Everything that is wrong with an atlas, the worst first; empty where nothing is. `fast` leaves out the derivation of `INFLUENCES`.

    `statistics` and `folder` are None where there are none. Memory is bounded by `size`, the edges held at once.
    """
    atlas = Checked(store, statistics, folder, fast, size)
    steps: list[tuple[str, Callable[[Checked], Iterator[Finding]]]] = [
        ("nodes", _nodes), ("runs", _runs), ("edges", _edges), ("other edges", _other_edges), ("circuits", _circuits), ("blocks", _blocks),
        ("nodes that nothing uses", _unused),
    ]  # fmt: skip
    if statistics is not None:
        steps += [("statistics", _tables), ("graph against statistics", _named), ("copies on features", _copies)]
    if folder is not None:
        steps += [("samples", _samples), ("manifests", _manifests), ("leftovers", _leftovers)]
    found: list[Finding] = []
    for done, (name, step) in enumerate(steps):
        if report is not None:
            report(done, len(steps), name)
        found += [one for one in step(atlas) if one.n]
    if atlas.unread:  # nothing is taken away or written by what half a file says
        found = [replace(one, repair=None, mend="first " + UNREADABLE) if one.repair in OF_STATISTICS else one for one in found]
    order = list(Severity)
    return sorted(found, key=lambda one: order.index(one.severity))


def _few(values: Sequence[object] | pl.Series) -> tuple[str, ...]:
    return tuple(str(value) for value in values[:EXAMPLES])


def _answer(store: GraphStore, text: str, schema: Mapping[str, pl.DataType], parameters: Mapping[str, object] | None = None) -> pl.DataFrame:
    rows = store.query(text, parameters)
    return pl.DataFrame(schema=schema) if rows.is_empty() else rows.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


# -- 1. the graph --------------------------------------------------------------------------------------------


def _nodes(atlas: Checked) -> Iterator[Finding]:
    """Keys that are there twice, and keys that say something else than the properties beside them."""
    for label in NODES:
        doubled, wrong, strange = (pl.Series("key", [], dtype=pl.String) for _ in range(3))
        for (rows,) in node_blocks(label, atlas.store):
            doubled = doubled.append(rows.filter(pl.col("key").is_duplicated())["key"].unique())
            made = _KEYS.get(label)
            if made is not None:
                wrong = wrong.append(rows.filter(~made.fill_null(False))["key"])
            numbers = [name for name, column in NODES[label].columns.items() if column.dtype == pl.Float64 and label != "Run"]
            if numbers:
                strange = strange.append(rows.filter(pl.any_horizontal(_no_number(name) for name in numbers))["key"])
        yield Finding(Severity.ERROR, f"{label} keys that several nodes have", len(doubled), _few(doubled), "ingest into a new atlas")
        yield Finding(Severity.ERROR, f"{label} nodes whose properties contradict their key", len(wrong), _few(wrong), "measure them again")
        yield Finding(Severity.ERROR, f"{label} nodes with numbers that are NaN or infinite", len(strange), _few(strange), "measure them again")


def _no_number(name: str) -> pl.Expr:
    return (pl.col(name).is_nan() | pl.col(name).is_infinite()).fill_null(False)


_KEYS: Mapping[str, pl.Expr] = {
    "Feature": pl.when(pl.col("kind") == "output")
    .then(pl.col("key").str.starts_with(pl.concat_str(pl.col("model"), pl.lit("|-|y|"))))
    .otherwise(
        pl.col("key") == pl.concat_str(
            [pl.col("model"), pl.col("dictionary"), pl.col("site"),
             pl.when(pl.col("kind") == "error").then(pl.lit("error")).otherwise(pl.col("index").cast(pl.String))], separator="|",
        )
    ),
    "Partition": pl.col("key") == pl.concat_str([pl.col("parcellation"), pl.col("site")], separator="|"),
    "Block": pl.col("key").str.starts_with(pl.concat_str([pl.col("parcellation"), pl.lit("|")])),
}  # fmt: skip

_MARKS = {
    "run": pl.String(), "sequence": pl.String(), "status": pl.String(), "n_edges": pl.Int64(), "metric_clean": pl.Float64(), "n": pl.Int64(),
}  # fmt: skip


def _runs(atlas: Checked) -> Iterator[Finding]:
    """Runs against their marks: how many sequences are done, how many edges these have, whether the status says so."""
    store = atlas.store
    atlas.runs, atlas.marks = _all_runs(store), _all_marks(store)
    settled = {key for key, run in _all_runs(store).items() if run == atlas.runs.get(key)}
    doubled = atlas.marks.filter(atlas.marks.select("run", "sequence").is_duplicated())
    yield Finding(
        Severity.ERROR, "sequences that a run has more than one mark of", doubled.select("run", "sequence").n_unique(),
        _few([f"{run}: {sequence}" for run, sequence in doubled.select("run", "sequence").unique().sort("run", "sequence").iter_rows()]),
        "featlas atlas prune RUN, and ingest it anew",
    )  # fmt: skip
    done = {
        run: (n, edges)
        for run, n, edges in atlas.marks.filter(pl.col("status") == DONE).group_by("run").agg(pl.len(), pl.col("n_edges").sum()).iter_rows()
    }
    measured = {key: run for key, run in atlas.runs.items() if run.get("n_planned") is not None}
    deleting = [key for key, run in measured.items() if run.get("status") == DELETING]
    measured = {key: run for key, run in measured.items() if key not in deleting and key in settled}
    yield Finding(
        Severity.WARNING, "runs whose deletion was cut off", len(deleting), _few(deleting), f"featlas atlas prune {' '.join(deleting)} --yes"
    )
    counted = [
        f"{key} says {run.get('n_sequences')} sequences, {run.get('n_edges')} edges, and has {done.get(key, (0, 0))[0]}, {done.get(key, (0, 0))[1]}"
        for key, run in measured.items()
        if run.get("status") == DONE and (run.get("n_sequences"), run.get("n_edges")) != done.get(key, (0, 0))
    ]
    yield Finding(Severity.ERROR, "runs that count other sequences or edges than they have", len(counted), _few(counted), REPAIR, Repair.RUN_COUNTS)
    too_early = [key for key, run in measured.items() if run.get("status") == DONE and done.get(key, (0, 0))[0] < int(str(run["n_planned"]))]
    yield Finding(
        Severity.ERROR, "runs that are called done and have sequences missing", len(too_early), _few(too_early),
        "the run's own `featlas ingest edges`, which measures what is missing", Repair.RUN_COUNTS,
    )  # fmt: skip
    open_ = [f"{key} ({done.get(key, (0, 0))[0]} of {run['n_planned']} sequences)" for key, run in measured.items() if run.get("status") != DONE]
    yield Finding(
        Severity.WARNING, "runs that are not finished", len(open_), _few(open_),
        "the run's own `featlas ingest edges`, or the `featlas import files` or `featlas atlas copy` that was stopped, goes on (featlas atlas info "
        "gives it), unless it is at work now; featlas ingest finish closes it as it is",
    )  # fmt: skip
    models = set(store.query("MATCH (m:Model) RETURN m.key AS key")["key"].to_list())
    lost = [f"{key}: {run.get('model')}" for key, run in atlas.runs.items() if run.get("model") and run["model"] not in models]
    yield Finding(
        Severity.ERROR, "runs of models that the graph does not have", len(lost), _few(lost), "ingest the run again, which writes its model"
    )


def _all_runs(store: GraphStore) -> dict[str, Mapping[str, object]]:
    found = [json.loads(text) for text in store.query("MATCH (r:Run) RETURN properties(r) AS run ORDER BY r.key")["run"].to_list()]
    return {run["key"]: run for run in found}


def _all_marks(store: GraphStore) -> pl.DataFrame:
    text = (
        "MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) RETURN r.key AS run, s.key AS sequence, m.status AS status, m.n_edges AS n_edges,"
        " m.metric_clean AS metric_clean, 1 AS n"
    )
    return _answer(store, text, _MARKS)


def _edges(atlas: Checked) -> Iterator[Finding]:
    """Every edge of every run, once: doubled, no number, of no run, unmarked; counted against the marks; and what follows from them."""
    identity = ["source", "target", *EDGES["ATTRIBUTES"].identity]
    doubled, strange, influences = _Cases(), _Cases(), _Influences(atlas)
    counts = [pl.DataFrame(schema={"run": pl.String, "sequence": pl.String, "n": pl.Int64})]
    types = ("ATTRIBUTES",) if atlas.fast else ("ATTRIBUTES", "INFLUENCES")
    for sources, targets in _ranges(atlas, types):
        rows = atlas.store.read_edges("ATTRIBUTES", sources=sources, targets=targets)
        doubled.add(rows.filter(rows.select(identity).is_duplicated()).unique(identity), "run", "source", "target")
        strange.add(rows.filter(_no_number("weight") | pl.col("weight").is_null()), "run", "source", "target")
        counts.append(rows.group_by("run", "sequence").agg(pl.len().cast(pl.Int64).alias("n")))
        counts = [pl.concat(counts).group_by("run", "sequence").agg(pl.col("n").sum())] if len(counts) > 20 else counts
        if not atlas.fast:
            influences.add(rows, atlas.store.read_edges("INFLUENCES", sources=sources, targets=targets))
    again = "featlas atlas prune RUN, and ingest it anew"
    yield Finding(Severity.ERROR, "edges that are there more than once", doubled.n, doubled.examples, again)
    yield Finding(Severity.ERROR, "edges whose weight is no number", strange.n, strange.examples, again)
    later = Checked(atlas.store, runs=_all_runs(atlas.store), marks=_all_marks(atlas.store))
    yield from _against_marks(atlas, later, pl.concat(counts).group_by("run", "sequence").agg(pl.col("n").sum()))
    yield from influences.findings(later)


def _ranges(atlas: Checked, types: Sequence[str]) -> Iterator[tuple[KeyRange, KeyRange | None]]:
    """Ranges of nodes' keys whose edges of all of these types are about a block together."""
    counts = pl.concat([edge_counts(atlas.store, type) for type in types]).group_by("node").agg(pl.col("n").sum())
    for sources in key_ranges(counts, atlas.size):
        if sources.low != sources.high:
            yield sources, None
            continue
        hub = pl.concat([hub_counts(atlas.store, type, None, sources.low) for type in types]).group_by("node").agg(pl.col("n").sum())
        for targets in key_ranges(hub, atlas.size):
            yield sources, targets


@dataclass
class _Cases:
    """Cases of one finding as they are met."""

    n: int = 0
    examples: tuple[str, ...] = ()

    def add(self, rows: pl.DataFrame, *names: str) -> None:
        self.n += rows.height
        if rows.height and len(self.examples) < EXAMPLES:
            self.examples = _few([*self.examples, *(" ".join(map(str, row)) for row in rows.select(names).head(EXAMPLES).iter_rows())])


def _against_marks(atlas: Checked, later: Checked, counts: pl.DataFrame) -> Iterator[Finding]:
    """Edges counted per run and sequence against what the marks said before and say later; a run that is being deleted is left out."""
    either = pl.Series([*atlas.runs, *later.runs], dtype=pl.String).implode()
    of_no_run = counts.filter(~pl.col("run").is_in(either))
    yield Finding(
        Severity.ERROR, "edges of runs that the graph does not have", int(of_no_run["n"].sum()), _few(of_no_run["run"].unique().sort()), REPAIR,
        Repair.ORPHANS,
    )  # fmt: skip
    there = pl.Series([key for key, run in later.runs.items() if run.get("status") != DELETING], dtype=pl.String).implode()
    counts = counts.filter(pl.col("run").is_in(there))
    unmarked = _unmarked(later, counts).sort("run", "sequence")
    yield Finding(
        Severity.ERROR, "edges of sequences that are not marked as done", int(unmarked["n"].sum()),
        _few([f"{run}: {sequence}" for run, sequence in unmarked.select("run", "sequence").iter_rows()]),
        f"{REPAIR} takes them away; then the same `featlas import files` again where an import was stopped, or the run's own `featlas ingest edges`, "
        "brings them with their marks; either of these before would write them twice",
        Repair.UNMARKED,
    )  # fmt: skip
    marked = atlas.marks.filter(pl.col("run").is_in(there)).unique(["run", "sequence"])
    marked = marked.join(later.marks, on=["run", "sequence", "n_edges"], how="semi", nulls_equal=True)
    both = marked.join(counts, on=["run", "sequence"], how="left", suffix="_there").with_columns(pl.col("n_there").fill_null(0))
    wrong = both.filter(pl.col("n_edges").is_not_null() & (pl.col("n_edges") != pl.col("n_there"))).sort("run", "sequence")
    shown = [
        f"{run}, {sequence}: marked {n}, there {there}"
        for run, sequence, n, there in wrong.select("run", "sequence", "n_edges", "n_there").iter_rows()
    ]
    yield Finding(
        Severity.ERROR,
        "sequences with more or fewer edges than their mark says",
        wrong.height,
        _few(shown),
        "featlas atlas prune RUN, and ingest it anew",
    )


def _unmarked(atlas: Checked, counts: pl.DataFrame) -> pl.DataFrame:
    """Of edges counted by run and sequence those without a mark, of runs that have marks or a plan: an imported graph may have neither."""
    planned = [key for key, run in atlas.runs.items() if run.get("n_planned") is not None]
    marking = pl.concat([atlas.marks["run"].cast(pl.String), pl.Series("run", planned, dtype=pl.String)]).unique()
    return counts.filter(pl.col("run").is_in(marking.implode())).join(atlas.marks, on=["run", "sequence"], how="anti")


def unmarked_edges(store: GraphStore) -> pl.DataFrame:
    """Sequences that a run has edges of and no mark: `run, sequence, n`. The mark is what commits a sequence; marks are read after the edges."""
    counts = _answer(
        store, "MATCH (:Feature)-[e:ATTRIBUTES]->(:Feature) RETURN e.run AS run, e.sequence AS sequence, count(*) AS n",
        {"run": pl.String(), "sequence": pl.String(), "n": pl.Int64()},
    )  # fmt: skip
    atlas = Checked(store, runs=_all_runs(store), marks=_all_marks(store))
    going = [key for key, run in atlas.runs.items() if run.get("status") != DELETING]
    return _unmarked(atlas, counts.filter(pl.col("run").is_in(going))).sort("run", "sequence")


class _Influences:
    """`INFLUENCES` against what follows from the edges, block by block."""

    def __init__(self, atlas: Checked) -> None:
        done = atlas.marks.filter(pl.col("status") == DONE).group_by("run").agg(pl.len())
        # an unfinished run's are derived when it is closed
        closed = {key: run for key, run in atlas.runs.items() if run.get("status") == DONE}
        # so are those of a run that a repair opens again because sequences are missing
        self.n_done: dict[str, int] = {run: n for run, n in done.iter_rows() if run in closed and n >= int(str(closed[run].get("n_planned") or 0))}
        self.known, self.before = pl.Series(list(atlas.runs), dtype=pl.String), done
        self.missing, self.wrong, self.extra, self.of_no_run = ({} for _ in range(4))

    missing: dict[str, _Cases]
    wrong: dict[str, _Cases]
    extra: dict[str, _Cases]
    of_no_run: dict[str, _Cases]
    """By run: what changed while it was read is no finding."""

    def add(self, edges: pl.DataFrame, there: pl.DataFrame) -> None:
        unknown = there.filter(~pl.col("run").is_in(self.known.implode()))
        for (run,), own in unknown.partition_by("run", as_dict=True).items():
            self.of_no_run.setdefault(str(run), _Cases()).add(own, "run", "source", "target")
        for run, n_done in self.n_done.items():
            with np.errstate(invalid="ignore"):  # weights that are no numbers are found as such
                derived, own = aggregate(edges.filter(pl.col("run") == run), n_done), there.filter(pl.col("run") == run)
            if derived.is_empty() and own.is_empty():
                continue
            ends = ["source", "target"]
            self.missing.setdefault(run, _Cases()).add(derived.join(own, on=ends, how="anti").with_columns(run=pl.lit(run)), "run", *ends)
            self.extra.setdefault(run, _Cases()).add(own.join(derived, on=ends, how="anti"), "run", *ends)
            both = own.join(derived, on=ends, suffix="_derived")
            same = [
                same_values(pl.col(name), pl.col(f"{name}_derived"), own.schema[name], TOLERANCE)
                for name in ("weight", "abs_weight", "max_weight", "variance", "n")
            ]
            self.wrong.setdefault(run, _Cases()).add(both.filter(~pl.all_horizontal(same)), "run", *ends)

    def findings(self, later: Checked) -> Iterator[Finding]:
        after = later.marks.filter(pl.col("status") == DONE).group_by("run").agg(pl.len())
        settled = self.before.join(after, on=["run", "len"], how="semi")["run"].to_list()
        settled = [run for run in settled if later.runs.get(run, {}).get("status") == DONE]
        for what, found in (
            ("missing", self.missing),
            ("other than what follows from the edges", self.wrong),
            ("of edges that are not there", self.extra),
        ):
            cases = _together(found, settled)
            yield Finding(Severity.ERROR, f"aggregated edges (INFLUENCES) {what}", cases.n, cases.examples, REPAIR, Repair.INFLUENCES)
        what = "aggregated edges (INFLUENCES) of runs that the graph does not have"
        cases = _together(self.of_no_run, self.of_no_run.keys() - later.runs)
        yield Finding(Severity.ERROR, what, cases.n, cases.examples, REPAIR, Repair.ORPHANS)


def _together(found: Mapping[str, _Cases], runs: Collection[str]) -> _Cases:
    """The cases of some runs as one."""
    some = [cases for run, cases in found.items() if run in runs]
    return _Cases(sum(cases.n for cases in some), _few([example for cases in some for example in cases.examples]))


def _other_edges(atlas: Checked) -> Iterator[Finding]:
    """Edges of all other types: doubled, or with numbers that are none."""
    for type in (name for name in EDGES if name not in ("ATTRIBUTES", "ON_SEQUENCE")):
        edge = EDGES[type]
        identity, numbers = ["source", "target", *edge.identity], [name for name, column in edge.columns.items() if column.dtype == pl.Float64]
        doubled, strange = _Cases(), _Cases()
        for (rows,) in edge_blocks(type, atlas.store, size=atlas.size):
            doubled.add(rows.filter(rows.select(identity).is_duplicated()).unique(identity), *identity)
            if numbers:
                strange.add(rows.filter(pl.any_horizontal(_no_number(name) for name in numbers)), *identity)
        yield Finding(Severity.ERROR, f"{type} edges that are there more than once", doubled.n, doubled.examples, "make them again")
        yield Finding(Severity.ERROR, f"{type} edges with numbers that are NaN or infinite", strange.n, strange.examples, "make them again")


def _circuits(atlas: Checked) -> Iterator[Finding]:
    """Circuits against their nodes and edges, and scores and edges against circuits."""
    store = atlas.store
    types = {"key": pl.String(), "run": pl.String(), "n_nodes": pl.Int64(), "n_edges": pl.Int64()}
    circuits = _answer(store, "MATCH (c:Circuit) RETURN c.key AS key, c.run AS run, c.n_nodes AS n_nodes, c.n_edges AS n_edges", types)
    counted = {"key": pl.String(), "n": pl.Int64()}
    nodes = _answer(store, "MATCH (n)-[:IN_CIRCUIT]->(c:Circuit) RETURN c.key AS key, count(*) AS n", counted)
    edges = _answer(store, "MATCH ()-[e:CIRCUIT_EDGE]->() RETURN e.circuit AS key, count(*) AS n", counted)
    known = pl.concat([circuits["key"], node_keys(store, "Circuit")]).implode()
    runs = pl.concat([pl.Series("key", list(atlas.runs), dtype=pl.String), node_keys(store, "Run")]).implode()
    both = (
        circuits.join(nodes, on="key", how="left")
        .join(edges, on="key", how="left", suffix="_of_edges")
        .with_columns(pl.col("n", "n_of_edges").fill_null(0))
    )
    wrong = both.filter((pl.col("n_nodes") != pl.col("n")) | (pl.col("n_edges") != pl.col("n_of_edges")))
    shown = [f"{key}: says {a} nodes and {b} edges, has {c} and {d}" for key, _, a, b, c, d in wrong.iter_rows()]
    yield Finding(Severity.ERROR, "circuits that count other nodes or edges than they have", wrong.height, _few(shown), REPAIR, Repair.CIRCUIT_COUNTS)
    lost = edges.filter(~pl.col("key").is_in(known))
    yield Finding(Severity.ERROR, "edges of circuits that the graph does not have", int(lost["n"].sum()), _few(lost["key"]), REPAIR, Repair.ORPHANS)
    without = circuits.filter(pl.col("run").is_not_null() & ~pl.col("run").is_in(runs))
    shown = [f"{key} of {run}" for key, run in without.select("key", "run").iter_rows()]
    yield Finding(Severity.WARNING, "circuits of runs that the graph does not have", without.height, _few(shown), REPAIR, Repair.ORPHANS)
    scores = _answer(
        store, "MATCH (s:Score) WHERE NOT EXISTS { MATCH (s)<-[:SCORED]-() } RETURN s.key AS key, s.subject AS subject",
        {"key": pl.String(), "subject": pl.String()},
    )  # fmt: skip
    shown = [f"{key} of {subject}" for key, subject in scores.iter_rows()]
    yield Finding(Severity.WARNING, "scores of nothing", scores.height, _few(shown), REPAIR, Repair.ORPHANS)
    unlike = [f"{key}: {kind} {value:g}" for kind in ("faithfulness", "completeness") for key, value in _unlike_scores(store, kind)]
    yield Finding(
        Severity.ERROR, "circuits that say a faithfulness or completeness that none of their scores has", len(unlike), _few(unlike),
        "score them again (featlas analyze faithfulness)",
    )  # fmt: skip


def _unlike_scores(store: GraphStore, kind: str) -> list[tuple[str, float]]:
    """Circuits whose property `kind` is the value of none of their scores of that kind, with what they say."""
    text = (
        f"MATCH (c:Circuit) WHERE c.{kind} IS NOT NULL OPTIONAL MATCH (c)-[:SCORED]->(s:Score) WHERE s.kind = $kind"
        f" RETURN c.key AS key, c.{kind} AS said, s.value AS value"
    )
    rows = _answer(store, text, {"key": pl.String(), "said": pl.Float64(), "value": pl.Float64()}, {"kind": kind})
    close = ((pl.col("said") - pl.col("value")).abs() <= TOLERANCE * pl.col("said").abs()).fill_null(False)
    return list(rows.filter(~close.any().over("key")).select("key", "said").unique(maintain_order=True).iter_rows())


def _blocks(atlas: Checked) -> Iterator[Finding]:
    """Blocks and partitions without each other."""
    one = {"key": pl.String()}
    alone = _answer(atlas.store, "MATCH (b:Block) WHERE NOT EXISTS { MATCH (b)-[:PART_OF]->() } RETURN b.key AS key ORDER BY key", one)
    parcellations = _answer(atlas.store, "MATCH (p:Partition) RETURN DISTINCT p.parcellation AS key", one)["key"]
    named = _answer(atlas.store, "MATCH (b:Block) RETURN DISTINCT b.parcellation AS key", one)["key"]
    # heads, whole sites and the like are parts of nothing, but never without a parcellation of their own
    lost = named.filter(~named.is_in(parcellations.implode()))
    both = alone.filter(pl.any_horizontal(pl.col("key").str.starts_with(f"{key}|") for key in lost)) if len(lost) else alone.clear()
    yield Finding(Severity.NOTE, "blocks of parcellations that have no partition in the graph", both.height, _few(both["key"]))
    empty = parcellations.filter(~parcellations.is_in(named.implode()))
    yield Finding(Severity.WARNING, "partitions without a block", len(empty), _few(empty), "featlas analyze rois writes a parcellation again")


def _unused(atlas: Checked) -> Iterator[Finding]:
    """Nodes that nothing is measured of. While a run is unfinished none is known to be: what it has planned it is not joined to yet."""
    found = {label: unused(atlas.store, label, bare=True) for label in ("Feature", "Sequence", "Model")}
    for label, keys in found.items() if not unfinished_runs(atlas.store) else ():
        yield Finding(Severity.NOTE, f"{label} nodes that nothing uses", len(keys), _few(keys), REPAIR, Repair.UNUSED)


# -- 2. and 3. the statistics --------------------------------------------------------------------------------

ROOTS: Mapping[Owner, tuple[str, str]] = {
    Owner.STATISTICS: ("runs", "run"), Owner.PARCELLATION: ("parcellations", "parcellation"), Owner.MATCHING: ("matchings", "matching"),
    Owner.COMPARISON: ("comparisons", "comparison"),
    Owner.RANKING: ("rankings", "ranking"),
}  # fmt: skip
"""The table and column in which a unit of several tables is itself."""


def _tables(atlas: Checked) -> Iterator[Finding]:
    """Every table is read to the end; rows of things that are not there."""
    statistics = atlas.statistics
    assert statistics is not None
    tables = tables_of(statistics)
    for table, columns in tables.items():
        values = ", ".join(f'"{name}"' for name in columns)
        try:
            statistics.query(f'SELECT sum(hash({values})::HUGEINT)::VARCHAR AS read FROM "{table}"')
        except Exception as error:  # noqa: BLE001 (whatever the database cannot read)
            yield Finding(Severity.ERROR, f"table {table} cannot be read", 1, _few([str(error).splitlines()[0]]), UNREADABLE)
            atlas.unread.add(table)
    for table in tables:
        known = BELONGINGS.get(table)
        if known is not None and known.owner in ROOTS and atlas.reads(table, ROOTS[known.owner][0]):
            yield from _of_nothing(statistics, table)
    if atlas.reads("runs", "run_sites", "feature_statistics"):
        yield from _sites(statistics)


def _sites(statistics: StatisticsStore) -> Iterator[Finding]:
    """The rows of every site of a statistics run that is done: one for each feature of the site's dictionary."""
    rows = statistics.query(
        "SELECT s.run AS run, s.site AS site, s.d_sae AS expected, count(f.run) AS n FROM run_sites s JOIN runs r ON r.run = s.run"
        " LEFT JOIN feature_statistics f ON f.run = s.run AND f.site = s.site AND f.feature >= 0"
        " WHERE r.status = 'done' GROUP BY 1, 2, 3 HAVING count(f.run) <> s.d_sae ORDER BY 1, 2"
    )
    shown = [f"{run}, {site}: {expected} features, {n} rows" for run, site, expected, n in rows.iter_rows()]
    yield Finding(
        Severity.ERROR, "sites of statistics runs with more or fewer rows than features", rows.height, _few(shown),
        "take the statistics from a backup, or featlas atlas prune --statistics-run KEY and measure them again",
    )  # fmt: skip


def _of_nothing(statistics: StatisticsStore, table: str) -> Iterator[Finding]:
    """Rows of a table whose unit is not there; names that were given to a parcellation's blocks may outlive it."""
    known = BELONGINGS.get(table)
    if known is None or known.owner not in ROOTS or table in (ROOTS[known.owner][0], "block_labels"):
        return
    root, column = ROOTS[known.owner]
    rows = statistics.query(
        f"SELECT {column} AS key, count(*) AS n FROM {table} WHERE {column} NOT IN (SELECT {column} FROM {root}) GROUP BY 1 ORDER BY 1"
    )
    what = f"rows of {table} whose {known.owner.value} is not there"
    yield Finding(Severity.WARNING, what, int(rows["n"].sum()), _few(rows["key"]), REPAIR, Repair.TABLES)


def _named(atlas: Checked) -> Iterator[Finding]:
    """What the graph names and the statistics lack."""
    statistics = atlas.statistics
    assert statistics is not None
    for what, text, table, column, repair in (
        ("features whose statistics run is not there",
         "MATCH (f:Feature) WHERE f.statistics_run IS NOT NULL RETURN f.statistics_run AS key, count(*) AS n",
         "runs", "run", Repair.STATISTICS),
        ("correlations of statistics runs that are not there", "MATCH ()-[e:CORRELATES]->() RETURN e.run AS key, count(*) AS n", "runs", "run", None),
        ("matches of matchings that are not there", "MATCH ()-[e:MATCHES]->() WHERE e.matching IS NOT NULL RETURN e.matching AS key, count(*) AS n",
         "matchings", "matching", None),
        ("blocks of regions that are not in the statistics", "MATCH (b:Block) WHERE b.kind = 'roi' RETURN b.parcellation AS key, count(*) AS n",
         "parcellations", "parcellation", None),
    ):  # fmt: skip
        if not atlas.reads(table):
            continue
        rows = _answer(atlas.store, text, {"key": pl.String(), "n": pl.Int64()})
        there = statistics.query(f"SELECT DISTINCT {column} AS key FROM {table}")["key"]
        lost = rows.filter(~pl.col("key").is_in(there.implode()))
        mend = REPAIR if repair else "copy the statistics that belong to this graph beside it, or make them again"
        yield Finding(Severity.WARNING, what, int(lost["n"].sum()), _few(lost["key"]), mend, repair)
    if not atlas.reads("scores", "ablation_effects"):
        return
    yield from _measured_scores(atlas.store, statistics)
    subjects = statistics.query(
        "SELECT run AS key, count(*) AS n FROM scores GROUP BY 1 UNION ALL SELECT run, count(*) FROM ablation_effects GROUP BY 1"
    )
    lost = subjects.filter(~pl.col("key").is_in(pl.Series(list(atlas.runs), dtype=pl.String).implode())).group_by("key").agg(pl.col("n").sum())
    yield Finding(
        Severity.NOTE, "measured scores and effects of runs that this graph does not have", int(lost["n"].sum()), _few(lost["key"]),
        "they may be of another graph (--graph) beside the same folder",
    )  # fmt: skip


_ALIKE = ("ablation", "metric", "baseline", "split", "method")


def _measured_scores(store: GraphStore, statistics: StatisticsStore) -> Iterator[Finding]:
    """Scores of circuits against the values that they are means of: those of the circuit, of a sweep of its run, or of its regions."""
    text = (
        "MATCH (c:Circuit)-[:SCORED]->(s:Score) RETURN s.key AS key, c.key AS circuit, c.run AS run, s.ablation AS ablation, s.metric AS metric,"
        " s.baseline AS baseline, s.split AS split, s.method AS method"
    )
    scores = _answer(store, text, dict.fromkeys(("key", "circuit", "run", *_ALIKE), pl.String()))
    if scores.is_empty():
        return
    values = statistics.query(f"SELECT DISTINCT run, {', '.join(_ALIKE)} FROM scores").cast(pl.String)
    lost = scores.join(values, on=["run", *_ALIKE], how="anti", nulls_equal=True)
    shown = [f"{key} of {circuit}: {method}, {split}" for key, circuit, method, split in lost.select("key", "circuit", "method", "split").iter_rows()]
    yield Finding(
        Severity.WARNING, "scores of circuits of which the statistics have no value", lost.height, _few(shown),
        "copy the statistics that belong to this graph beside it, or score the circuits again (featlas analyze faithfulness)",
    )  # fmt: skip


def _copies(atlas: Checked) -> Iterator[Finding]:
    """Frequencies and labels on features against the statistics that they are copies of."""
    statistics = atlas.statistics
    assert statistics is not None
    wrong, lost, unlike = _Cases(), _Cases(), _Cases()
    for features, expected in statistics_copies(atlas.store, statistics) if atlas.reads("runs", "feature_statistics") else ():
        lost.add(features.join(expected, on="key", how="anti"), "key")
        both = features.join(expected, on="key", how="inner", suffix="_measured")
        same = [same_values(pl.col(name), pl.col(f"{name}_measured"), pl.Float64(), TOLERANCE) for name in ("frequency", "mean_activation")]
        wrong.add(both.filter(~pl.all_horizontal(same)), "key")
    yield Finding(
        Severity.ERROR, "features with another frequency or mean activation than their statistics run measured", wrong.n, wrong.examples, REPAIR,
        Repair.STATISTICS,
    )  # fmt: skip
    yield Finding(
        Severity.ERROR, "features of which the statistics run that they name has no row", lost.n, lost.examples,
        "take the statistics from a backup, or featlas atlas prune --statistics-run KEY and measure them again",
    )  # fmt: skip
    if atlas.reads("feature_labels"):
        unlike.add(unlike_labels(atlas.store, statistics), "key")
    yield Finding(Severity.WARNING, "features whose label is not the best of their labels", unlike.n, unlike.examples, REPAIR, Repair.LABELS)


def statistics_copies(store: GraphStore, statistics: StatisticsStore) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Features that have numbers of a statistics run that is there, and what that run says of them, in blocks: `key, frequency, mean_activation`."""
    done = statistics.query("SELECT run FROM runs WHERE status = 'done'")["run"]
    for (rows,) in node_blocks("Feature", store):
        measured = rows.filter(pl.col("statistics_run").is_in(done.implode())).select("key", "frequency", "mean_activation", "statistics_run")
        for (run,), own in measured.partition_by("statistics_run", as_dict=True).items():
            yield (
                own,
                statistics.feature_properties(str(run)).select("key", "frequency", "mean_activation").join(own.select("key"), on="key", how="semi"),
            )


def unlike_labels(store: GraphStore, statistics: StatisticsStore) -> pl.DataFrame:
    """Features whose label in the graph is not the best that the statistics have: `key`."""
    from .labels import best_labels, graph_labels

    both = graph_labels(store).join(best_labels(statistics).select("key", best="label", best_kind="kind"), on="key", how="left")
    stale = pl.col("best").is_null() & pl.col("label_kind").is_not_null()
    differs = pl.col("best").is_not_null() & (pl.col("best").ne_missing(pl.col("label")) | pl.col("best_kind").ne_missing(pl.col("label_kind")))
    return both.filter(stale | differs).select("key")


# -- 4. the files --------------------------------------------------------------------------------------------


def _samples(atlas: Checked) -> Iterator[Finding]:
    """Runs of samples whose files are not what their manifests say, read whole."""
    assert atlas.folder is not None
    broken = []
    for path in sorted((atlas.folder / "samples").glob("[!.]*")) if (atlas.folder / "samples").is_dir() else []:
        try:
            broken += [f"{path.name}: {what}" for what in _sample_faults(atlas.folder, path)]
        except Exception as error:  # noqa: BLE001 (whatever a file that is not whole makes its reader say)
            broken.append(f"{path.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    yield Finding(
        Severity.ERROR, "runs of samples whose files are not what they should be", len(broken), _few(broken),
        "take the files from a backup, or featlas atlas prune --samples KEY, and featlas ingest samples again",
    )  # fmt: skip


def _sample_faults(atlas: Path, folder: Path) -> Iterator[str]:
    if not (folder / "manifest.json").exists():
        yield "no manifest"
        return
    store = SampleStore(atlas, read_only=True)
    run = store._run(folder)
    missing = [name for name in ("tokens.parquet", "sequences.parquet", *(f"{site.site}.npz" for site in run.sites)) if not (folder / name).exists()]
    if missing:
        yield from (f"{name} is missing" for name in missing)
        return
    if store.tokens(run.key).height != run.n_tokens:
        yield f"tokens.parquet has other rows than {run.n_tokens}"
    if run.sequences.height != run.n_sequences:
        yield f"sequences.parquet has other rows than {run.n_sequences}"
    for site in run.sites:
        file = folder / f"{site.site}.npz"
        if file.stat().st_size != site.n_bytes:
            yield f"{file.name} has {file.stat().st_size} bytes instead of {site.n_bytes}"
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                yield f"{file.name} is damaged"


def _manifests(atlas: Checked) -> Iterator[Finding]:
    """Manifests of runs that are in no graph, and runs without one."""
    assert atlas.folder is not None
    folder = atlas.folder / MANIFESTS
    there = {path.stem for path in folder.glob("[!.]*.json")} if folder.is_dir() else set()
    unread = []
    for name in sorted(there):
        try:
            json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            unread.append(f"{name}: {error}")
    yield Finding(Severity.ERROR, "manifests that cannot be read", len(unread), _few(unread), "the run's own `featlas ingest edges` writes it again")
    lost = sorted(there - atlas.runs.keys())
    yield Finding(Severity.NOTE, "manifests of runs that this graph does not have", len(lost), _few(lost), "they may be of another graph (--graph)")
    without = sorted(key for key, run in atlas.runs.items() if run.get("n_planned") is not None and key not in there)
    yield Finding(Severity.NOTE, "runs without a manifest in this folder", len(without), _few(without), "copy it from where the run was measured")


def _leftovers(atlas: Checked) -> Iterator[Finding]:
    """What killed processes left."""
    assert atlas.folder is not None
    left = leftovers(atlas.folder, atlas.statistics) if atlas.reads("runs") else list(abandoned(atlas.folder))
    shown = [f"{path.relative_to(atlas.folder)}" for path in left]
    yield Finding(Severity.NOTE, "leftovers of processes that were killed (or are at work now)", len(left), _few(shown), REPAIR, Repair.LEFTOVERS)


def leftovers(folder: Path, statistics: StatisticsStore | None) -> list[Path]:
    """Hidden folders beside samples and the like, and the parts of statistics runs that are done or gone.

    Shards are measured without the store, which hears of their run when they are merged: until it is known to be done they stay.
    """
    found = list(abandoned(folder))
    parts = folder / f"{Path(FILE_NAME).stem}.parts"
    if parts.is_dir():
        known = {} if statistics is None else dict(statistics.query("SELECT run, status FROM runs").iter_rows())
        for path in parts.iterdir():
            status = known.get(path.name)
            if path.is_dir() and (status == "done" or (status is None and not (path / SHARDS).is_dir())):
                found.append(path)
    return sorted(found)
