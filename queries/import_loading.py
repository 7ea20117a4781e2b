"""Import files added to a graph that may hold others, embedded or on a server; a load that was killed is given again and goes on.

1. Nodes in blocks: those that are missing are made; of those that are there, what is empty is filled in. A run is unfinished at first.
2. The parts of `ATTRIBUTES` are read once, to count and hash the edges of each sequence; what the graph has of these is held against that.
3. They are read again: a sequence's edges and its mark go in one transaction, as when they were measured. Sequences whose edges lie in one part go
   at once; the others are first dealt into bins, files of whole sequences, so that memory is bounded in whichever order the rows are.
4. All other edges in blocks. The `INFLUENCES` of a run of which the graph has sequences of its own are derived from its edges instead.
5. What runs say of themselves, at last: that they are done.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from ..files import on_disk, scratch_folder
from .bulk_import import PartsOf, parts_of, require_files
from .copying import (
    MARK,
    NODES_PER_BLOCK,
    RUN_STATE,
    SOFT,
    Clashes,
    added_sequences,
    derive_influences,
    differing_sequences,
    merged,
    read_marks,
    rules,
    sequence_hashes,
    unequal,
)
from .runs import DONE, RUNNING
from .schema import EDGES
from .store import GraphStore, KeyRange, SequenceCommit
from .streaming import EDGES_PER_BLOCK, edge_blocks, edge_ranges, read_nodes

BLOCKS_PER_BIN = 4
"""Blocks of edges that are held at once where sequences lie in several parts; a part of import files is as large."""

MARKS_AT_ONCE = 1_000
"""Sequences without an edge that go in one transaction."""

_SEQUENCE = ["run", "sequence"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FilesLoaded:
    """How many nodes and edges a folder of import files held; kept: of these, by label or type, what the graph has otherwise, which stayed."""

    folder: Path
    n_nodes: int
    n_edges: int
    kept: Mapping[str, int]


def load_import_files(
    store: GraphStore, folder: Path, *, edges_per_block: int = EDGES_PER_BLOCK, progress: Progress | None = None
) -> FilesLoaded:
    """Add what the import files of `folder` hold to a graph; what is there already stays, and what it lacks is filled in. Idempotent.

    Sequences of which the graph has edges keep them. Runs count as running until all their edges are in: a load that was killed is repeated.
    progress: steps done, of how many. Raises `NoImportFiles`.
    """
    require_files(folder)
    load = _Load(store, folder, parts_of(folder), edges_per_block, progress or (lambda done, total: None))
    for group in load.groups_of("nodes"):
        load.add_nodes(group)
    load.add_sequences()
    for group in load.groups_of("edges"):
        if group.name not in ("ATTRIBUTES", "ON_SEQUENCE"):
            load.add_edges(group)
    load.finish_runs()
    return FilesLoaded(folder, load.n_nodes, load.n_edges, {name: n for name, n in load.kept.items() if n})


@dataclass
class _Load:
    """A load on its way."""

    store: GraphStore
    folder: Path
    groups: list[PartsOf]
    size: int
    progress: Progress
    n_nodes: int = 0
    n_edges: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    states: list[pl.DataFrame] = field(default_factory=list)  # what runs say of themselves
    mixed: set[str] = field(default_factory=set)  # runs of which the graph has sequences that the files lack, or has otherwise
    _ranges: dict[tuple[str, str | None], list[tuple[KeyRange, KeyRange | None]]] = field(default_factory=dict)
    _done: int = 0

    def groups_of(self, kind: str, name: str | None = None) -> list[PartsOf]:
        """Parts of one kind, and of one label or type."""
        return [group for group in self.groups if group.kind == kind and name in (None, group.name)]

    def _step(self) -> None:
        self._done += 1
        # parts of sequences' edges are read twice
        self.progress(self._done, sum(len(group.parts) * (2 if group.name == "ATTRIBUTES" else 1) for group in self.groups))

    def _keep(self, name: str, n: int) -> None:
        self.kept[name] = self.kept.get(name, 0) + n

    # -- nodes

    def add_nodes(self, group: PartsOf) -> None:
        """Make the nodes that are missing, and fill in what is empty in those that are there."""
        for part in group.parts:
            rows = group.read(self.folder, part)
            self.n_nodes += rows.height
            for block in rows.iter_slices(NODES_PER_BLOCK) if group.name != "Meta" else ():
                self._add_nodes(group.name, block)
            self._step()

    def _add_nodes(self, label: str, rows: pl.DataFrame) -> None:
        there = read_nodes(self.store, label, rows["key"])
        wanted = merged(rows, there, Clashes.KEEP, soft=SOFT.get(label, ()), identity=["key"])
        if label == "Run":
            self.states.append(rows.select("key", *RUN_STATE))
            # a run that is closed here and open in the files was copied out before
            closed = there.filter(pl.col("status") == DONE).join(rows.filter(pl.col("status").ne_missing(DONE)), on="key", how="semi")
            self.mixed |= set(closed["key"])
            wanted = self._unfinished(wanted, rows, there)
            rows = rows.drop(RUN_STATE).join(wanted.select("key", *RUN_STATE), on="key", maintain_order="left").select(wanted.columns)
        self._keep(label, _n_contradicted(rows, wanted))
        new = unequal(wanted, there)
        if new.height:
            self.store.merge_nodes(label, new)

    def _unfinished(self, wanted: pl.DataFrame, rows: pl.DataFrame, there: pl.DataFrame) -> pl.DataFrame:
        """Runs with the state that the graph has of them; those that are new are running."""
        state = there.select("key", *RUN_STATE)
        planned = rows.select("key", planned="n_planned")
        wanted = wanted.drop(RUN_STATE).join(state, on="key", how="left", maintain_order="left").join(planned, on="key", maintain_order="left")
        filled = wanted.with_columns(pl.col("status").fill_null(RUNNING), pl.col("n_planned").fill_null(pl.col("planned")))
        return filled.select(rows.columns)

    # -- sequences

    def add_sequences(self) -> None:
        """Add the edges and marks of the sequences that the graph lacks, each in one transaction; hold those that it has against the files."""
        marks = self._marks()
        counted = self._counted()
        sums = added_sequences(counted.drop("part"))
        missing, unmarked = self._compared(marks, sums)
        parts = counted.group_by(_SEQUENCE).agg(pl.col("n").sum(), n_parts=pl.len())
        spread = missing.join(parts.filter(pl.col("n_parts") > 1), on=_SEQUENCE).sort(_SEQUENCE)
        before = (pl.col("n").cum_sum() - pl.col("n")) // (self.size * BLOCKS_PER_BIN)
        bins = spread.select(*_SEQUENCE, bin=before)
        with self._scratch() as scratch:
            self._add_parts(counted, missing, unmarked, bins, scratch)
            for number in range(bins.height and int(bins["bin"].max()) + 1):  # type: ignore[arg-type]
                files = sorted(scratch.glob(f"{number}-*.parquet"))
                self._commit(pl.read_parquet(files, glob=False), missing)
                for file in files:
                    file.unlink()
        bare = missing.join(parts, on=_SEQUENCE, how="anti")
        none = pl.DataFrame(schema={name: column.dtype for name, column in EDGES["ATTRIBUTES"].all_columns.items()})
        for some in bare.iter_slices(MARKS_AT_ONCE):
            self.store.commit_sequences(_commits(none, some))

    def _marks(self) -> pl.DataFrame:
        """The files' marks: `run` and the columns of `MARK`."""
        found = [pl.DataFrame(schema={"run": pl.String, **MARK})]
        for group in self.groups_of("edges", "ON_SEQUENCE"):
            for part in group.parts:
                rows = group.read(self.folder, part)
                self.n_edges += rows.height
                found.append(rows.rename({"source": "run", "target": "sequence"}).select(found[0].columns))
                self._step()
        return pl.concat(found).unique(_SEQUENCE, keep="last", maintain_order=True)

    def _edge_parts(self) -> list[tuple[PartsOf, str]]:
        return [(group, part) for group in self.groups_of("edges", "ATTRIBUTES") for part in group.parts]

    def _counted(self) -> pl.DataFrame:
        """How many edges of each sequence are in each part, and their hashes: as `sequence_hashes`, with `part`."""
        found = [sequence_hashes([]).with_columns(part=pl.lit(0, pl.Int64))]
        for number, (group, part) in enumerate(self._edge_parts()):
            blocks = group.read(self.folder, part).iter_slices(self.size)
            found.append(sequence_hashes(blocks).with_columns(part=pl.lit(number, pl.Int64)))
            self.n_edges += int(found[-1]["n"].sum())
            self._step()
        return pl.concat(found)

    def _compared(self, marks: pl.DataFrame, sums: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The marks that the graph lacks, and the sequences with edges that neither has a mark of; runs that both have parts of are noted."""
        missing, unmarked = [marks.clear()], [sums.select(_SEQUENCE).clear()]
        for run in sorted({*marks["run"].unique(), *sums["run"].unique()}):
            of_run, sums_of_run = (rows.filter(pl.col("run") == run) for rows in (marks, sums))
            there = read_marks(self.store, run)
            missing.append(of_run.join(there, on="sequence", how="anti"))
            both = of_run.join(there, on="sequence", how="semi")
            if both.height:
                blocks = (rows.join(both, on="sequence", how="semi") for (rows,) in edge_blocks("ATTRIBUTES", self.store, run=run))
                differing = differing_sequences(both, sums_of_run, there, sequence_hashes(blocks))
                self._keep("ON_SEQUENCE", differing.height)
                self._keep("ATTRIBUTES", int(differing["n"].sum()))
            if there.height > both.height or (both.height and differing.height):
                self.mixed.add(run)
            either = pl.concat([of_run["sequence"], there["sequence"]])
            unmarked.append(sums_of_run.filter(~pl.col("sequence").is_in(either.implode())).select(_SEQUENCE))
        return pl.concat(missing), pl.concat(unmarked)

    def _add_parts(self, counted: pl.DataFrame, missing: pl.DataFrame, unmarked: pl.DataFrame, bins: pl.DataFrame, scratch: Path) -> None:
        """Commit the sequences that lie in one part, and deal the rows of the others into files `BIN-PART.parquet`."""
        wanted = pl.concat([missing.select(_SEQUENCE), unmarked])
        needed = set(counted.join(wanted, on=_SEQUENCE, how="semi")["part"])
        whole: list[pl.DataFrame] = []
        for number, (group, part) in enumerate(self._edge_parts()):
            if number in needed:
                rows = group.read(self.folder, part)
                for (which,), some in rows.join(bins, on=_SEQUENCE).partition_by("bin", as_dict=True, include_key=False).items():
                    with on_disk(scratch):
                        some.write_parquet(scratch / f"{which}-{number}.parquet", compression="lz4")
                whole.append(rows.join(bins, on=_SEQUENCE, how="anti").join(missing, on=_SEQUENCE, how="semi"))
                if sum(some.height for some in whole) >= self.size:  # parts may be small
                    self._commit(pl.concat(whole), missing)
                    whole.clear()
                # a graph that was exported as it was when a run was at work has such; they stay what they are, edges of a sequence that is not done
                for block in rows.join(unmarked, on=_SEQUENCE, how="semi").iter_slices(self.size):
                    self.store.merge_edges("ATTRIBUTES", block)
            self._step()
        if whole:
            self._commit(pl.concat(whole), missing)

    def _commit(self, rows: pl.DataFrame, marks: pl.DataFrame) -> None:
        """Commit whole sequences, about a block of edges in a transaction."""
        counts = rows.group_by(_SEQUENCE).agg(n=pl.len().cast(pl.Int64)).sort(_SEQUENCE)
        batches = counts.select(*_SEQUENCE, batch=(pl.col("n").cum_sum() - pl.col("n")) // self.size)
        for batch in batches.partition_by("batch", maintain_order=True, include_key=False):
            edges = rows.join(batch, on=_SEQUENCE, how="semi")
            self.store.commit_sequences(_commits(edges, batch.join(marks, on=_SEQUENCE, maintain_order="left")))

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder for the bins, beside the parts where that can be written to; what killed loads left there goes."""
        bins = self.folder / ".bins"
        folder = scratch_folder(bins) if os.access(self.folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="featlas-bins-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another process may have bins there
                bins.rmdir()

    # -- other edges

    def add_edges(self, group: PartsOf) -> None:
        """Make the edges that are missing, and fill in what is empty in those that are there; `INFLUENCES` are what follows from a run's edges."""
        for part in group.parts:
            rows = group.read(self.folder, part)
            self.n_edges += rows.height
            if group.name == "INFLUENCES":
                rows = rows.filter(~pl.col("run").is_in(list(self.mixed)))
            for block in rows.iter_slices(self.size):
                self._add_edges(group.name, block)
            self._step()

    def _add_edges(self, type: str, rows: pl.DataFrame) -> None:
        identity, soft = rules(type)
        there = self._there(type, rows, identity)
        policy = Clashes.REPLACE if type == "INFLUENCES" else Clashes.KEEP
        wanted = merged(rows, there, policy, soft=soft, identity=identity)
        self._keep(type, _n_contradicted(rows, wanted))
        new = unequal(wanted, there)
        if new.height:
            self.store.merge_edges(type, new)

    def _there(self, type: str, rows: pl.DataFrame, identity: list[str]) -> pl.DataFrame:
        """The graph's edges with the identities of some rows."""
        found = [rows.clear()]
        for run in rows["run"].unique().sort().to_list() if "run" in identity else [None]:
            if (type, run) not in self._ranges:
                self._ranges[type, run] = list(edge_ranges(type, self.store, run=run))
            of_run = rows if run is None else rows.filter(pl.col("run") == run)
            low, high = of_run.select(low=pl.col("source").min(), high=pl.col("source").max()).row(0)
            for sources, targets in self._ranges[type, run]:
                if sources.low <= high and low <= sources.high:
                    there = self.store.read_edges(type, run=run, sources=sources, targets=targets)
                    found.append(there.join(of_run, on=identity, how="semi").select(rows.columns))
        return pl.concat(found)

    # -- runs

    def finish_runs(self) -> None:
        """Let runs say what the files do, or, where the graph has sequences of its own, what is counted there."""
        for states in self.states:
            there = read_nodes(self.store, "Run", states["key"]).select("key", *RUN_STATE)
            for run in sorted(self.mixed & set(states["key"])):
                derive_influences(self.store, run)
            new = unequal(states.filter(~pl.col("key").is_in(list(self.mixed))), there)
            if new.height:
                self.store.merge_nodes("Run", new)


def _commits(edges: pl.DataFrame, marks: pl.DataFrame) -> list[SequenceCommit]:
    """Sequences to be committed: their marks (`run` and the columns of `MARK`) and all of their edges."""
    own = edges.select("source", "target", "src_pos", "dest_pos", "weight")
    parts = edges.partition_by(_SEQUENCE, as_dict=True)
    rows = [(parts.get((mark["run"], mark["sequence"]), edges.clear()), mark) for mark in marks.rows(named=True)]
    said = [name for name in MARK if name != "sequence"]
    return [SequenceCommit(mark["run"], mark["sequence"], part.select(own.columns), {name: mark[name] for name in said}) for part, mark in rows]


def _n_contradicted(rows: pl.DataFrame, wanted: pl.DataFrame) -> int:
    """How many rows say something that does not go in."""
    if rows.equals(wanted):
        return 0
    differs = [pl.Series(rows[name] != wanted[name]).fill_null(False) & rows[name].is_not_null() for name in rows.columns]
    return int(pl.DataFrame(differs).select(pl.any_horizontal(pl.all()).sum()).item()) if differs else 0
