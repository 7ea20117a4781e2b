"""The graph store: what both databases do for the rest of the package, and the factory that opens one.

A store holds the graph of `schema.py`. `open_graph` picks the backend from the target: a path is an embedded Ladybug file,
a `bolt://` or `neo4j://` URI (with `+s` or `+ssc`) is a Neo4j server. Callers never learn which they have: the two pass one
contract suite, and the drivers are imported only when opened.

A sequence is the unit of commitment: its edges and its `ON_SEQUENCE` mark go in together or not at all.
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Protocol, Self, runtime_checkable

import polars as pl

from ..errors import FeatlasError, UserError
from .credentials import authorities, password_of
from .schema import SCHEMA_VERSION, EdgeType, attributes_frame, edge_type, mark_key

SERVER_SCHEMES = tuple(f"{scheme}{security}://" for scheme in ("bolt", "neo4j") for security in ("", "+s", "+ssc"))


class NotAGraph(UserError):
    """The target holds no featlas graph, and none can be made there."""


class SchemaVersionMismatch(UserError):
    """The graph was written under another version of the schema."""

    def __init__(self, target: str, found: object) -> None:
        super().__init__(
            f"{target} has schema version {found}, this featlas works with version {SCHEMA_VERSION}: "
            f"use the featlas that wrote it, or ingest into a new graph (another --atlas, or an emptied database)"
        )


class UnknownEndpoint(UserError):
    """An edge names a node that the graph does not have."""

    def __init__(self, type: str, missing: Sequence[str], n_missing: int) -> None:
        shown = ", ".join(repr(key) for key in missing[:3]) + (", …" if n_missing > 3 else "")
        super().__init__(f"{type} edges name {n_missing} node(s) that the graph does not have: {shown}; nothing was written. Write the nodes first")


class QueryRejected(UserError):
    """The database refused a query; the message is the database's own."""


class WriteRefused(UserError):
    """A query would change something and was not allowed to."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the query was refused: {reason}. Reading is all that is allowed here; allow writing with --write (write=True)")
        self.reason = reason


class QueryTooSlow(UserError):
    """A query took longer than it was given."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the query was stopped after {seconds:g} s: ask for less (a LIMIT, shorter paths, a run or a site), or give it longer")


class StoreBusy(FeatlasError):
    """Another process or handle is in the way."""


class StoreFailed(FeatlasError):
    """The database failed at something that should have worked."""


class StoreUnreachable(FeatlasError):
    """No server answers at the URI."""


class WrongCredentials(UserError):
    """The server refused the user name or the password."""


class UnknownDatabase(UserError):
    """The server has no database of that name."""


@dataclass(frozen=True)
class SequenceCommit:
    """One sequence's edges and its mark, to be written together.

    `edges` has the columns source, target, weight and, where positions are kept, src_pos and dest_pos; `mark` the
    properties of the `ON_SEQUENCE` edge (status, n_edges, metric_clean, metric_corrupt).
    """

    run: str
    sequence: str
    edges: pl.DataFrame
    mark: Mapping[str, object] = field(default_factory=dict)

    def stored_edges(self) -> pl.DataFrame:
        """The edges as `schema.attributes_frame` gives them."""
        return attributes_frame(self.edges)

    def stored_mark(self) -> dict[str, object]:
        """The mark's properties with its key; the number of edges is counted where it is not given."""
        return {"n_edges": self.edges.height, "status": "done", **self.mark, "key": mark_key(self.run, self.sequence)}


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Nodes by their key, from `low` to `high`, both included, in the order of Unicode code points (polars' and Python's own)."""

    low: str
    high: str

    def __contains__(self, key: str) -> bool:
        return self.low <= key <= self.high


@dataclass(frozen=True, slots=True)
class EdgeFilter:
    """Which edges of a type to read; None leaves a condition out.

    `run` and `sequence` apply where the type has such a property; `sources` and `targets` to the edges' ends.
    """

    run: str | None = None
    sequence: str | None = None
    sources: KeyRange | None = None
    targets: KeyRange | None = None

    def properties(self, edge: EdgeType) -> dict[str, object]:
        """The values that properties of these edges must have, by name; a backend sends them as parameters of that name."""
        wanted = {"run": self.run, "sequence": self.sequence}
        return {name: value for name, value in wanted.items() if value is not None and name in edge.properties}

    def within(self, source: pl.Expr, target: pl.Expr) -> pl.Expr:
        """Whether both ends, given by their keys, are in their ranges."""
        ranges = [(end, keys) for end, keys in ((source, self.sources), (target, self.targets)) if keys is not None]
        return pl.all_horizontal(pl.lit(True), *(end.is_between(pl.lit(keys.low), pl.lit(keys.high)) for end, keys in ranges))


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """What a query may take: how many rows are fetched, and how many seconds it may run; None is no limit."""

    rows: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Answer:
    """A query's result by columns. Nodes, relationships and paths are the plain values of `rendered_node` and its kin.

    `cut` says that there were more rows than the limit.
    """

    names: Sequence[str]
    columns: Sequence[Sequence[object] | pl.Series]
    cut: bool = False

    def frame(self) -> pl.DataFrame:
        """The result as a frame, in which nodes, relationships, paths and maps are JSON text."""
        ready = [column for column in self.columns if isinstance(column, pl.Series)]
        return pl.DataFrame(ready) if len(ready) == len(self.columns) else result_frame(self.names, [list(column) for column in self.columns])


def cut_to(rows: Sequence[Sequence[object]], limit: int | None) -> tuple[Sequence[Sequence[object]], bool]:
    """The first `limit` rows, and whether there were more: one more than the limit is enough to tell."""
    return (rows, False) if limit is None else (rows[:limit], len(rows) > limit)


@dataclass(frozen=True)
class ServerCredentials:
    """Who to be on a server and which of its databases to use; None leaves it to the server (its default database).

    `authorities` is a file of certificates that the server's own must be signed by; the system's unless given.
    """

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    database: str | None = None
    authorities: Path | None = None

    @staticmethod
    def from_environment() -> "ServerCredentials":
        """As the environment says; see `credentials`."""
        return ServerCredentials(os.environ.get("NEO4J_USERNAME"), password_of(), os.environ.get("NEO4J_DATABASE"), authorities())


class GraphStore(ABC):
    """A graph of features. Six methods are the backend's; the rest is said in terms of them.

    `dialect` names the Cypher that `query` takes; a named query may have a text of its own for a dialect.
    """

    dialect: ClassVar[str]

    @abstractmethod
    def merge_nodes(self, label: str, rows: pl.DataFrame) -> None:
        """Create or update the nodes of `rows` by their `key`; the given columns are set, null included. Idempotent.

        Raises `schema.RowsRejected` where the frame does not fit the label.
        """

    @abstractmethod
    def merge_edges(self, type: str, rows: pl.DataFrame) -> None:
        """Create or update edges by `source`, `target` (keys of existing nodes) and the type's identity columns. Idempotent.

        Raises `UnknownEndpoint`, with nothing written, where an end does not exist.
        """

    @abstractmethod
    def commit_sequences(self, commits: Sequence[SequenceCommit]) -> int:
        """Write several sequences' edges and marks in one transaction; sequences already marked are skipped. How many were written.

        The runs, sequences and features must exist (`UnknownEndpoint` and nothing written otherwise).
        """

    @abstractmethod
    def answer(
        self, cypher: str, parameters: Mapping[str, object] | None = None, *, write: bool = False, limits: QueryLimits | None = None
    ) -> Answer:
        """Run one Cypher statement within `limits`; its result is of one shape on both backends.

        Without `write` the database itself refuses changes (`WriteRefused`). Raises `QueryRejected` with the database's message, `QueryTooSlow`.
        """

    def query(self, cypher: str, parameters: Mapping[str, object] | None = None, *, write: bool = False) -> pl.DataFrame:
        """Run one Cypher statement: `answer` as a frame. Nodes, relationships, paths and maps come as JSON text."""
        return self.answer(cypher, parameters, write=write).frame()

    def read_edges(
        self,
        type: str,
        *,
        run: str | None = None,
        sequence: str | None = None,
        sources: KeyRange | None = None,
        targets: KeyRange | None = None,
    ) -> pl.DataFrame:
        """The edges of a type that fit every condition given (see `EdgeFilter`): source, target and every property, sorted by identity."""
        edge = edge_type(type)
        frame = self._read_edges(edge, EdgeFilter(run, sequence, sources, targets))
        return frame.select(pl.col(name).cast(column.dtype) for name, column in edge.all_columns.items()).sort(edge.order)

    @abstractmethod
    def _read_edges(self, edge: EdgeType, only: EdgeFilter) -> pl.DataFrame:
        """The edges that fit the filter, with all columns of the type by name, in any order."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the database; twice is once."""

    def commit_sequence(self, run: str, sequence: str, edges: pl.DataFrame, mark: Mapping[str, object]) -> bool:
        """Write one sequence's edges and its mark in one transaction; False, and nothing written, where it is marked already."""
        return self.commit_sequences([SequenceCommit(run, sequence, edges, mark)]) == 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@runtime_checkable
class BlockReader(Protocol):
    """A store that reads a run's `ATTRIBUTES` in blocks in one pass over them, where each range of keys would be a pass of its own."""

    def edge_blocks(self, run: str, size: int) -> Iterator[pl.DataFrame]:
        """As `runs.edge_blocks` gives them."""
        ...


def is_server(target: str | Path) -> bool:
    """Whether a target names a server (by its scheme) and not a file."""
    return "://" in str(target)


def open_graph(target: str | Path, *, credentials: ServerCredentials | None = None, read_only: bool = False) -> GraphStore:
    """Open the graph at a path (embedded; a folder holds it as `graph.lbug`) or at a server's URI, and create the schema on first use.

    `credentials` default to the environment's. `read_only` opens an existing graph that nothing can be written to.
    Raises `SchemaVersionMismatch`, `NotAGraph`, `StoreBusy`, `StoreUnreachable`, `WrongCredentials` or `UnknownDatabase`.
    """
    if is_server(target):
        if not str(target).startswith(SERVER_SCHEMES):
            raise NotAGraph(f"{target}: a server's URI begins with one of {', '.join(SERVER_SCHEMES)}; anything without :// is a path")
        if "@" in str(target):
            scheme, _, rest = str(target).partition("://")
            raise NotAGraph(
                f"{scheme}://…@{rest.rpartition('@')[2]}: a name or password in the address would be shown in logs and lists of processes: "
                "give them as NEO4J_USERNAME and NEO4J_PASSWORD"
            )
        if "?" in str(target):  # never shown: somebody may have put a password there
            raise NotAGraph(f"{str(target).partition('?')[0]}?…: a server's address has nothing behind a question mark: leave it out")
        from .server import Neo4jStore

        return Neo4jStore(str(target), credentials or ServerCredentials.from_environment(), read_only=read_only)
    from .embedded import LadybugStore

    path = Path(target)
    return LadybugStore(path / "graph.lbug" if path.is_dir() else path, read_only=read_only)


def graph_target(atlas: Path, graph: str | None = None) -> str | Path:
    """Where the graph is: `graph` if given, else the server of NEO4J_URI, else the embedded file of the atlas."""
    return graph or os.environ.get("NEO4J_URI") or atlas / "graph.lbug"


def result_frame(names: Sequence[str], columns: Sequence[Sequence[object]]) -> pl.DataFrame:
    """The frame of a query's result from its columns of plain values: a column mixed of several types is text, JSON where need be."""
    series = []
    for name, values in zip(names, columns, strict=True):
        plain = [json_text(value) if isinstance(value, dict) else value for value in values]
        kinds = {type(value) for value in plain if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            plain = [value if value is None or isinstance(value, str) else json_text(value) for value in plain]
        elif kinds == {int, float}:
            plain = [None if value is None else float(value) for value in plain]  # type: ignore[arg-type]
        elif kinds == {list} and not _is_flat(plain):
            plain = [None if value is None else json_text(value) for value in plain]
        series.append(pl.Series(name, plain, dtype=None if kinds else pl.Null, strict=False))
    return pl.DataFrame(series)


def _is_flat(lists: Sequence[object]) -> bool:
    """Whether lists hold plain values of one type, so that they can be a list column."""
    kinds = {type(item) for values in lists if isinstance(values, list) for item in values if item is not None}
    return len(kinds) <= 1 and not kinds & {dict, list}


def json_text(value: object) -> str:
    """JSON of a value with its keys in order, the same text whichever database gave it."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def rendered_node(label: str, properties: Mapping[str, object]) -> dict[str, object]:
    """A node as a plain value: its label and the properties it has."""
    return {"label": label, "properties": _present(properties)}


def rendered_relationship(type: str, properties: Mapping[str, object], source: object = None, target: object = None) -> dict[str, object]:
    """A relationship as a plain value; `source` and `target` are the keys of its ends."""
    ends = {} if source is None else {"source": source, "target": target}
    return {"type": type, **ends, "properties": _present(properties)}


def _present(properties: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in properties.items() if value is not None and not (isinstance(value, float) and math.isnan(value))}
