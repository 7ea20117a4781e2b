"""Import files written while a run is measured: what `ingest edges --import-files FOLDER` has in place of a graph.

1. Nodes, marks and whatever else is small stand in a *ledger*, an embedded graph inside the folder; `ATTRIBUTES` and `INFLUENCES`, which are
   large, go straight into parts of gzipped CSV files.
2. `commit_sequences`: the batch's edges are written under a hidden name, synced and renamed (`files.whole`); a mark file beside them says whose
   they are; then the ledger marks the sequences as done, all in one transaction. On opening, a part whose sequences the ledger does not call done
   is thrown away: a killed run goes on with nothing lost and nothing twice. Other processes may write parts as well (`write_batch`), whose
   sequences the ledger then marks (`commit_written`).
3. `edge_blocks`: the parts are dealt once into bins of neighbouring sources, each about a block large, and the bins are read one by one, so that
   `INFLUENCES` are derived in bounded memory in two passes over the edges.
4. The parts of `INFLUENCES` count from the moment on in which `influences.json` names them, which is before the ledger calls their run done.
5. `finish`: nodes and small edges are copied out of the ledger and the importer's arguments are written; until then nothing loads the folder.

A folder takes any number of runs, one after the other: each adds to it.
"""

import hashlib
import json
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import polars as pl

from ..files import on_disk, whole, write_text
from .bulk_import import ARGUMENTS, UNFINISHED, FolderNotEmpty, ImportFiles, ImportFolder, by_ends, edge_stem, has_line_breaks, read_part, write_part
from .runs import DONE
from .schema import EDGES, NODES, EdgeType, edge_frame
from .store import Answer, EdgeFilter, GraphStore, QueryLimits, QueryRejected, SequenceCommit, StoreFailed, UnknownEndpoint, open_graph
from .streaming import key_ranges

LEDGER = "ledger.lbug"
"""The ledger's file in the folder."""

MARKS = "marks"
"""The folder of mark files in the folder."""

LISTED = "influences.json"
"""The file in the folder that names the parts of `INFLUENCES` which are whole, with their rows."""

ROWS_AT_ONCE = 500_000
"""Edges that are read at once when parts are dealt into bins; so many take about 200 MB."""

LARGE = ("ATTRIBUTES", "INFLUENCES")
"""The edges that are in parts and not in the ledger."""

_FEATURES = ("Feature", "Feature")
_SCHEMAS = {type: {name: column.dtype for name, column in EDGES[type].all_columns.items()} for type in LARGE}
_NEEDED = ("source", "target", "sequence", "src_pos", "dest_pos", "weight")
_LARGE_WORDS = re.compile(rf"\b({'|'.join(LARGE)})\b")


@dataclass(frozen=True, slots=True)
class Part:
    """One file of edges: of which run and sequences, how many rows, whether a text in it spans lines."""

    file: str
    run: str
    sequences: tuple[str, ...]
    rows: int
    multiline: bool


def check_folder(folder: Path) -> None:
    """Raise `FolderNotEmpty` for a folder that a run cannot be measured into."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LEDGER).exists():
        raise FolderNotEmpty(f"{folder} is not empty: name a new folder for the import files, or one that `ingest edges --import-files` began")
    if folder.exists() and not folder.is_dir():
        raise FolderNotEmpty(f"{folder} is a file: name a new folder for the import files")


def write_batch(folder: Path, commits: Sequence[SequenceCommit]) -> Part | None:
    """Write the edges of some sequences of one run as a part of `folder`, and the file that says whose it is; None where there are none.

    The name is made of the sequences, so that the same batch again, by whichever process, replaces it. The part counts when a sink has
    marked its sequences.
    """
    rows = _rows_of(commits)
    return _write_rows(folder, commits, rows) if rows.height else None


def _rows_of(commits: Sequence[SequenceCommit]) -> pl.DataFrame:
    """The edges of some sequences, all columns."""
    frames = [c.stored_edges().with_columns(run=pl.lit(c.run), sequence=pl.lit(c.sequence)) for c in commits if c.edges.height]
    return pl.concat(frames).select(list(_SCHEMAS["ATTRIBUTES"])) if frames else pl.DataFrame(schema=_SCHEMAS["ATTRIBUTES"])


def _write_rows(folder: Path, commits: Sequence[SequenceCommit], rows: pl.DataFrame) -> Part:
    """A part and its mark file."""
    run, sequences = commits[0].run, tuple(commit.sequence for commit in commits)
    name = hashlib.sha256(json.dumps([run, sorted(sequences)]).encode()).hexdigest()[:16]
    part = Part(f"{edge_stem('ATTRIBUTES', _FEATURES)}-{name}.csv.gz", run, sequences, rows.height, has_line_breaks(rows))
    with whole(folder / part.file) as path:
        write_part(rows, path)
    (folder / MARKS).mkdir(exist_ok=True)
    write_text(folder / MARKS / f"{name}.json", json.dumps(asdict(part)))
    return part


class ImportSink(GraphStore):
    """A graph store whose large edges are parts of import files in `folder`, which is made, and must be empty or a sink's own.

    What asks for `ATTRIBUTES` or `INFLUENCES` in Cypher is refused: the ledger has none. Leaving it as a context manager without an error finishes
    the folder. Raises `FolderNotEmpty`, and `StoreBusy` where another process writes to it.
    """

    dialect = "ladybug"

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        with on_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._ledger: GraphStore = open_graph(folder / LEDGER)
        try:
            self._parts = self._recovered()
        except BaseException:
            self._ledger.close()
            raise
        self._known = set(self._ledger.query("MATCH (f:Feature) RETURN f.key AS key")["key"].to_list())
        self._influences = self._listed_influences()
        self._superseded: list[str] = []  # parts of INFLUENCES that stay until those in their place are listed
        self._passes: dict[str, tuple[str, tuple[str, str]]] = {}  # run -> this pass over its INFLUENCES, and the last edge written

    # What the ledger has

    def merge_nodes(self, label: str, rows: pl.DataFrame) -> None:
        self._ledger.merge_nodes(label, rows)
        if label == "Feature":
            self._known.update(rows["key"].to_list())

    def answer(
        self, cypher: str, parameters: Mapping[str, object] | None = None, *, write: bool = False, limits: QueryLimits | None = None
    ) -> Answer:
        if write and self._passes:  # a run that is called done in the next moment has its INFLUENCES, whatever is killed from now on
            self._list_influences()
        if found := _LARGE_WORDS.search(cypher):
            raise QueryRejected(f"{self.folder} holds import files: their {found[1]} can be asked for when they are loaded")
        return self._ledger.answer(cypher, parameters, write=write, limits=limits)

    def close(self) -> None:
        self._ledger.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    # Edges

    def commit_sequences(self, commits: Sequence[SequenceCommit]) -> int:
        done = {run: self._done(run) for run in dict.fromkeys(commit.run for commit in commits)}
        fresh = [commit for commit in commits if commit.sequence not in done[commit.run]]
        written: list[Part] = []
        for run in dict.fromkeys(commit.run for commit in fresh):
            of_run = [commit for commit in fresh if commit.run == run]
            rows = _rows_of(of_run)
            if rows.height:
                self._require_features("ATTRIBUTES", rows)
                written.append(_write_rows(self.folder, of_run, rows))
        return self._mark(fresh, written)

    def commit_written(self, commits: Sequence[SequenceCommit], part: Part | None) -> int:
        """Mark sequences as done whose edges another process wrote by `write_batch`, which gave `part`; how many these are.

        The edges' nodes must be merged before. commits: with no edges, and their number in the mark. Raises `StoreFailed` where the part is not
        in the folder or some of its sequences are done already.
        """
        if part is not None and not (self.folder / part.file).exists():
            raise StoreFailed(f"{self.folder} has no {part.file}, which a worker wrote: driver and workers need one folder, at the same path")
        if any(commit.sequence in self._done(commit.run) for commit in commits):
            raise StoreFailed(f"{self.folder}: sequences came a second time; give the same `ingest edges` again, which goes on")
        return self._mark(commits, [] if part is None else [part])

    def _mark(self, fresh: Sequence[SequenceCommit], written: Sequence[Part]) -> int:
        """Sequences become done, and their parts with them."""
        marks = [replace(c, edges=c.edges.clear(), mark={"n_edges": c.edges.height, **c.mark}) for c in fresh]
        n = self._ledger.commit_sequences(marks) if marks else 0
        self._parts |= {part.file: part for part in written}  # refused ones are removed when the folder is opened again
        return n

    def merge_edges(self, type: str, rows: pl.DataFrame) -> None:
        """As every store does; `INFLUENCES` of a run are taken whole, in blocks that follow each other: a block that does not begins anew."""
        if type == "ATTRIBUTES":
            raise StoreFailed("edges of sequences are written by sequences into import files (commit_sequences)")
        if type != "INFLUENCES":
            self._ledger.merge_edges(type, rows)
            return
        frame = edge_frame(type, rows)
        self._require_features(type, frame)
        frame = frame.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in _SCHEMAS[type].items() if name not in frame.columns)
        for (run,), of_run in frame.partition_by("run", as_dict=True, maintain_order=True).items():
            self._write_influences(str(run), of_run.select(list(_SCHEMAS[type])))

    def edge_blocks(self, run: str, size: int) -> Iterator[pl.DataFrame]:
        """The run's `ATTRIBUTES` in blocks, as `runs.edge_blocks` gives them, in two passes over its parts."""
        parts = [part for part in self._parts.values() if part.run == run]
        ranges = key_ranges(self._source_counts(parts), size)
        if not ranges:
            return
        with tempfile.TemporaryDirectory(prefix="bins-", dir=self.folder) as bins:
            self._deal(parts, [keys.low for keys in ranges], Path(bins))
            for number, keys in enumerate(ranges):
                dealt = sorted(Path(bins).glob(f"{number}-*.parquet"))
                rows = pl.scan_parquet(dealt, glob=False).with_columns(run=pl.lit(run))
                if keys.low != keys.high:
                    yield _ordered(rows.collect())
                    continue
                of_hub = rows.group_by(pl.col("target").alias("node")).agg(pl.len().cast(pl.Int64).alias("n")).collect()
                for targets in key_ranges(of_hub, size):
                    yield _ordered(rows.filter(pl.col("target").is_between(pl.lit(targets.low), pl.lit(targets.high))).collect())

    def _read_edges(self, edge: EdgeType, only: EdgeFilter) -> pl.DataFrame:
        if edge.name not in LARGE:
            return self._ledger._read_edges(edge, only)
        names = [part.file for part in self._parts.values()] if edge.name == "ATTRIBUTES" else sorted(self._influences)
        wanted = pl.all_horizontal(
            only.within(pl.col("source"), pl.col("target")), *(pl.col(name) == value for name, value in only.properties(edge).items())
        )
        frames = [read_part(self.folder / name, _SCHEMAS[edge.name]).filter(wanted) for name in names]
        return pl.concat([pl.DataFrame(schema=_SCHEMAS[edge.name]), *frames])

    def finish(self) -> ImportFiles:
        """Write what the ledger has and the importer's arguments: from now on the folder can be loaded."""
        self._list_influences()
        made, keys = ImportFolder(self.folder), {}
        for label in NODES.values():
            columns = ", ".join(f"n.`{name}` AS `{name}`" for name in label.all_columns)
            rows = self._ledger.query(f"MATCH (n:{label.name}) RETURN {columns}").cast({n: c.dtype for n, c in label.all_columns.items()})
            made.add_nodes(label.name, rows)
            keys[label.name] = rows.select("key")
        for edge in (edge for edge in EDGES.values() if edge.name not in LARGE):
            for ends, rows in by_ends(edge, self._ledger.read_edges(edge.name), keys):
                made.add_edges(edge.name, ends, rows)
        parts = sorted(self._parts.values(), key=lambda part: part.file)
        multiline = any(part.multiline for part in parts)
        for type, names, n in (
            ("ATTRIBUTES", [part.file for part in parts], sum(part.rows for part in parts)),
            ("INFLUENCES", sorted(self._influences), sum(self._influences.values())),
        ):
            if names:
                made.add_parts(type, _FEATURES, names, n, multiline=multiline)
        written = made.finish()
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return written

    # Parts

    def _done(self, run: str) -> frozenset[str]:
        text = "MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) WHERE r.key = $run AND m.status = $done RETURN s.key AS sequence"
        return frozenset(self._ledger.query(text, {"run": run, "done": DONE})["sequence"].to_list())

    def _require_features(self, type: str, rows: pl.DataFrame) -> None:
        ends = pl.concat([rows["source"].unique(), rows["target"].unique()]).unique()
        if missing := sorted(set(ends.to_list()) - self._known):
            raise UnknownEndpoint(type, missing, len(missing))

    def _write_influences(self, run: str, rows: pl.DataFrame) -> None:
        first, last = rows.select("source", "target").row(0), rows.select("source", "target").row(-1)
        this = self._passes.get(run)
        if this is None or first <= this[1]:
            for old in [name for name in self._influences if name.startswith(f"{self._influence_stem(run)}-")]:
                del self._influences[old]
                self._superseded.append(old)
            this = (uuid.uuid4().hex[:8], last)
        self._passes[run] = (this[0], (str(last[0]), str(last[1])))
        number = sum(name.startswith(f"{self._influence_stem(run)}-") for name in self._influences)
        name = f"{self._influence_stem(run)}-{this[0]}-{number:05}.csv.gz"
        self._write(name, rows)
        self._influences[name] = rows.height

    def _list_influences(self) -> None:
        """Name the parts of `INFLUENCES` as they are now; those in whose place they are go."""
        write_text(self.folder / LISTED, json.dumps(self._influences))
        while self._superseded:
            (self.folder / self._superseded.pop()).unlink(missing_ok=True)

    @staticmethod
    def _influence_stem(run: str) -> str:
        return f"{edge_stem('INFLUENCES', _FEATURES)}-{hashlib.sha256(run.encode()).hexdigest()[:16]}"

    def _write(self, name: str, rows: pl.DataFrame) -> None:
        """A part under its name, whole or not at all."""
        with whole(self.folder / name) as path:
            write_part(rows, path)

    def _source_counts(self, parts: Sequence[Part]) -> pl.DataFrame:
        """`node`, `n`: how many edges of the parts leave each node."""
        counts = pl.DataFrame(schema={"node": pl.String, "n": pl.Int64})
        for group in _groups(parts):
            sources = [read_part(self.folder / part.file, _SCHEMAS["ATTRIBUTES"]).select(node="source", n=pl.lit(1, pl.Int64)) for part in group]
            counts = pl.concat([counts, *sources]).group_by("node").agg(pl.col("n").sum())
        return counts

    def _deal(self, parts: Sequence[Part], lows: Sequence[str], bins: Path) -> None:
        """Each edge into the bin of its source: files `BIN-GROUP.parquet`; bin i begins at the i-th of `lows`."""
        begins = pl.DataFrame({"source": lows, "bin": range(len(lows))}).with_columns(pl.col("bin").cast(pl.Int64))
        for number, group in enumerate(_groups(parts)):
            rows = pl.concat([read_part(self.folder / part.file, _SCHEMAS["ATTRIBUTES"]).select(_NEEDED) for part in group])
            sources = rows.select(pl.col("source").unique()).sort("source").set_sorted("source")
            dealt = rows.join(sources.join_asof(begins.set_sorted("source"), on="source"), on="source")
            for (which,), part in dealt.partition_by("bin", as_dict=True, include_key=False).items():
                part.write_parquet(bins / f"{which}-{number}.parquet", compression="lz4")

    # Opening

    def _recovered(self) -> dict[str, Part]:
        """The parts whose sequences are done, by file; what else a killed run left is removed, and the arguments are put aside."""
        if (self.folder / ARGUMENTS).exists():
            (self.folder / ARGUMENTS).replace(self.folder / UNFINISHED)
        done: dict[str, frozenset[str]] = {}
        parts: dict[str, Part] = {}
        for file in sorted((self.folder / MARKS).glob("*.json")):
            fields = json.loads(file.read_text(encoding="utf-8"))
            part = Part(**{**fields, "sequences": tuple(fields["sequences"])})
            if part.run not in done:
                done[part.run] = self._done(part.run)
            if done[part.run].issuperset(part.sequences):
                parts[part.file] = part
            else:
                file.unlink()
        stem = edge_stem("ATTRIBUTES", _FEATURES)
        for path in (*self.folder.glob(".*.part"), *(self.folder / MARKS).glob(".*.part"), *self.folder.glob(f"{stem}-*.csv.gz")):
            if path.name not in parts:
                path.unlink()
        for left in self.folder.glob("bins-*"):
            for path in left.iterdir():
                path.unlink()
            left.rmdir()
        return parts

    def _listed_influences(self) -> dict[str, int]:
        """The `INFLUENCES` of runs that were closed, by file, with their rows; those of a run that was killed while closing are removed."""
        file, arguments = self.folder / LISTED, self.folder / UNFINISHED
        if file.exists():
            listed = set(json.loads(file.read_text(encoding="utf-8")))
        else:  # a folder of an earlier featlas
            listed = set(re.split(r"[,=\n]", arguments.read_text(encoding="utf-8"))) if arguments.exists() else set()
        kept: dict[str, int] = {}
        for path in self.folder.glob(f"{edge_stem('INFLUENCES', _FEATURES)}-*.csv.gz"):
            if path.name in listed:
                kept[path.name] = read_part(path, _SCHEMAS["INFLUENCES"]).height
            else:
                path.unlink()
        return kept


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts in groups of about `ROWS_AT_ONCE` rows; a part with more stands alone."""
    group: list[Part] = []
    for part in parts:
        if group and sum(p.rows for p in group) + part.rows > ROWS_AT_ONCE:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _ordered(rows: pl.DataFrame) -> pl.DataFrame:
    edge = EDGES["ATTRIBUTES"]
    return rows.select(list(_SCHEMAS["ATTRIBUTES"])).sort(edge.order)
