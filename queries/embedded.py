"""The embedded graph store: Ladybug, a Cypher database in one file.

What this file absorbs, so that no caller knows (each is reproduced by a test):

1. Each end of an edge needs its own MATCH right after LOAD FROM; any other form is a cross product.
2. COPY is fast but not crash-safe beside other writes: its rows reach the disk only at the checkpoint after the commit, so a
   process killed in between keeps the mark and loses the edges. `LOAD FROM … CREATE` goes through the write-ahead log whole.
3. Ladybug caches a prepared statement, with its frame, for each frame it is given, and crashes when one is run twice: every
   transaction gets a connection of its own, and frames are never reused.
4. Two handles of one file in one process corrupt each other: handles are shared, counted and kept one per path and process.
5. A checkpoint rewrites the whole edge table, so it is put off until the log is large (it is replayed on opening).
6. A process killed while writing may leave a torn last record, which is the transaction that was not committed.
7. A MERGE of many edges is slow beside a large table: what is there is looked up, the rest is created.
8. When the disk is full, the commit fails as it should, but then closing the database ends the whole process: such a handle is never closed.
   Its log is replayed when a later process opens the file.
"""

import ctypes
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any

import ladybug
import polars as pl

from ..files import DiskFull, is_full
from . import holders, schema
from .access import require_reading
from .schema import EDGES, NODES, SCHEMA_VERSION, VERSION_KEY, EdgeType, NodeLabel
from .store import (
    Answer,
    EdgeFilter,
    GraphStore,
    NotAGraph,
    QueryLimits,
    QueryRejected,
    QueryTooSlow,
    SchemaVersionMismatch,
    SequenceCommit,
    StoreBusy,
    StoreFailed,
    UnknownEndpoint,
    WriteRefused,
    cut_to,
    rendered_node,
    rendered_relationship,
)

log = logging.getLogger(__name__)

CHECKPOINT_BYTES = 256 * 2**20  # of write-ahead log: about 750,000 edges
LOOKED_UP_AT_ONCE = 2_000  # rows to be merged; with more it is asked first whether any of them can be there
READ_ONLY_PATIENCE_S = 10.0
ROOM_BYTES = 64 * 2**20  # a disk with so much room is not the reason why something cannot be written
# Ladybug's cross product of lock states while a writer checkpoints; it says so in one of these ways.
_BEING_WRITTEN = ("recovery is pending", "checksum verification failed", "past the end of file", "checkpoint", "could not set lock")
_TORN_LOG = ("wal file is corrupted", "wal replay")
_NOT_WRITTEN = "cannot write to file"  # the system's own reason behind it is mostly a wrong one
_PLAIN = {"STRING", "INT64", "DOUBLE", "BOOL"}


@dataclass
class _Handle:
    """A Ladybug database of this process: shared by every store on its path, closed with the last."""

    database: ladybug.Database
    read_only: bool
    users: int = 0
    full: bool = False
    writing: threading.RLock = field(default_factory=threading.RLock)


_handles: dict[Path, _Handle] = {}
_abandoned: set[Path] = set()  # still held by this process, since their disk was full
_handles_lock = threading.RLock()


class LadybugStore(GraphStore):
    """The graph in the file `path`. Raises `NotAGraph`, `StoreBusy` or `SchemaVersionMismatch` on opening."""

    dialect = "ladybug"

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path.expanduser().resolve()
        self.read_only = read_only
        self._handle: _Handle | None = _acquire(self.path, read_only)
        try:
            self._check_schema()
        except BaseException:
            self.close()
            raise

    def merge_nodes(self, label: str, rows: pl.DataFrame) -> None:
        frame = schema.node_frame(label, rows)
        properties = [name for name in frame.columns if name != "key"]
        sets = _assignments("n", properties, first=1)
        text = f"LOAD FROM $frame MERGE (n:{label} {{key: c0}}) {sets}"
        if frame.height:
            with self._write() as connection:
                _run(connection, text, {"frame": _numbered(frame.select("key", *properties))})

    def merge_edges(self, type: str, rows: pl.DataFrame) -> None:
        edge, frame = schema.edge_type(type), schema.edge_frame(type, rows)
        if not frame.height:
            return
        frame = frame.select("source", "target", *edge.identity, *(name for name in edge.columns if name in frame.columns))
        with self._write() as connection:
            if sum(_merge_between(connection, edge, ends, frame) for ends in edge.ends) != frame.height:
                self._raise_unknown_endpoint(connection, edge, frame)

    def commit_sequences(self, commits: Sequence[SequenceCommit]) -> int:
        with self._write() as connection:
            return sum(self._commit(connection, commit) for commit in commits)

    def answer(
        self, cypher: str, parameters: Mapping[str, object] | None = None, *, write: bool = False, limits: QueryLimits | None = None
    ) -> Answer:
        if write and self.read_only:
            raise WriteRefused("the graph was opened read-only")
        transaction = self._write() if write else self._read()
        with transaction as connection:
            statement = _prepared(connection, cypher, parameters, write)
            if limits is not None and limits.seconds is not None:
                connection.set_query_timeout(max(1, round(1000 * limits.seconds)))
            try:
                result = _rejecting(lambda: connection.execute(statement, dict(parameters or {})))
            except QueryRejected as error:
                if limits is None or limits.seconds is None or not str(error).startswith("Interrupted"):
                    raise
                raise QueryTooSlow(limits.seconds) from None
            connection.set_query_timeout(0)
            return _answer_of(connection, result, None if limits is None else limits.rows)

    def _read_edges(self, edge: EdgeType, only: EdgeFilter) -> pl.DataFrame:
        parameters = only.properties(edge)
        conditions = [f"e.`{name}` = ${name}" for name in parameters]
        for node, end, keys in (("a", "source", only.sources), ("b", "target", only.targets)):
            if keys is not None:
                conditions += [f"{node}.key >= ${end}_low", f"{node}.key <= ${end}_high"]
                parameters |= {f"{end}_low": keys.low, f"{end}_high": keys.high}
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        columns = ", ".join(f"e.`{name}` AS `{name}`" for name in edge.properties)
        text = f"MATCH (a)-[e:{edge.name}]->(b) {where} RETURN a.key AS source, b.key AS target" + (f", {columns}" if columns else "")
        with self._read() as connection:
            return _run(connection, text, parameters).get_as_pl()

    def close(self) -> None:
        if self._handle is not None:
            self._handle = None
            _release(self.path)

    # Transactions

    @contextmanager
    def _write(self) -> Iterator[ladybug.Connection]:
        """A connection inside a write transaction: committed at the end, rolled back on any error."""
        if self.read_only:
            raise WriteRefused("the graph was opened read-only")
        with self._opened().writing, self._until_full(), _connection(self._opened().database) as connection:
            _run(connection, "BEGIN TRANSACTION")
            try:
                yield connection
            except BaseException:
                _roll_back(connection)
                raise
            _end_transaction(connection)

    @contextmanager
    def _until_full(self) -> Iterator[None]:
        """Whatever cannot be written in the block is a full disk's doing: nothing is written by this handle from then on."""
        handle = self._opened()
        if handle.full:
            raise DiskFull(self.path)
        try:
            yield
        except (StoreFailed, QueryRejected, RuntimeError) as error:
            if _NOT_WRITTEN not in str(error).lower() and not is_full(error):
                raise
            handle.full = True
            if not is_full(error) and shutil.disk_usage(self.path.parent).free > ROOM_BYTES:
                said = f"{self.path} cannot be written ({_one_line(str(error))}): see to its disk, then give the same command again"
                raise StoreFailed(said) from error
            raise DiskFull(self.path) from error

    @contextmanager
    def _read(self) -> Iterator[ladybug.Connection]:
        """A connection inside a transaction in which the database refuses writes."""
        with _connection(self._opened().database) as connection:
            _run(connection, "BEGIN TRANSACTION READ ONLY")
            try:
                yield connection
            finally:
                _roll_back(connection)

    def _opened(self) -> _Handle:
        if self._handle is None:
            raise StoreFailed(f"{self.path}: the graph store is closed")
        return self._handle

    # Schema

    def _check_schema(self) -> None:
        with self._read() as connection:
            tables = set(_run(connection, "CALL show_tables() RETURN name").get_as_pl()["name"].to_list())
            found = None
            if "Meta" in tables:
                rows = _run(connection, "MATCH (m:Meta {key: $key}) RETURN m.value", {"key": VERSION_KEY}).get_all()
                found = rows[0][0] if rows else None
        if found == str(SCHEMA_VERSION):
            self._extend_schema(tables)
            return
        if tables:
            if found is None:
                raise NotAGraph(f"{self.path} is a Ladybug database, but no featlas graph: name another path")
            raise SchemaVersionMismatch(str(self.path), found)
        if self.read_only:
            raise NotAGraph(f"{self.path} is empty: ingest into it first (featlas ingest edges)")
        self._create_schema()

    def _extend_schema(self, tables: Collection[str]) -> None:
        """Give a graph of an earlier featlas the tables and columns that it lacks; it is opened for writing for that, if need be."""
        with self._read() as connection:
            missing = list(_missing(connection, tables))
        if not missing:
            return
        if self.read_only:
            self.close()
            LadybugStore(self.path).close()
            self._handle = _acquire(self.path, True)
            return
        log.info("%s was made by an earlier featlas: %s", self.path, "; ".join(missing))
        with self._write() as connection:
            for text in missing:
                _run(connection, text)

    def _create_schema(self) -> None:
        with self._write() as connection:
            for table in _TABLES:
                _run(connection, _table_text(table))
            _run(connection, "CREATE (:Meta {key: $key, value: $value})", {"key": VERSION_KEY, "value": str(SCHEMA_VERSION)})

    # Sequences

    def _commit(self, connection: ladybug.Connection, commit: SequenceCommit) -> bool:
        ends = {"run": commit.run, "sequence": commit.sequence}
        match = "MATCH (r:Run {key: $run}) MATCH (s:Sequence {key: $sequence})"
        if _count(connection, "MATCH (r:Run {key: $run})-[m:ON_SEQUENCE]->(s:Sequence {key: $sequence}) RETURN count(*)", ends):
            return False
        mark = {name: value for name, value in commit.stored_mark().items() if value is not None}
        assignments = ", ".join(f"`{name}`: ${name}" for name in mark)
        if not _count(connection, f"{match} CREATE (r)-[m:ON_SEQUENCE {{{assignments}}}]->(s) RETURN count(*)", {**ends, **mark}):
            self._raise_unknown_mark(connection, commit)
        edges = commit.stored_edges()
        if edges.height:
            text = (
                "LOAD FROM $frame MATCH (a:Feature {key: c0}) MATCH (b:Feature {key: c1}) CREATE (a)-[e:ATTRIBUTES "
                "{run: $run, sequence: $sequence, src_pos: c2, dest_pos: c3, weight: c4}]->(b) RETURN count(*)"
            )
            if _count(connection, text, {"frame": _numbered(edges), **ends}) != edges.height:
                self._raise_unknown_endpoint(connection, EDGES["ATTRIBUTES"], edges)
        return True

    def _raise_unknown_mark(self, connection: ladybug.Connection, commit: SequenceCommit) -> None:
        missing = [
            key for label, key in (("Run", commit.run), ("Sequence", commit.sequence))
            if not _count(connection, f"MATCH (n:{label} {{key: $key}}) RETURN count(*)", {"key": key})
        ]
        raise UnknownEndpoint("ON_SEQUENCE", missing, len(missing))

    def _raise_unknown_endpoint(self, connection: ladybug.Connection, edge: EdgeType, frame: pl.DataFrame) -> None:
        missing: list[str] = []
        for column, labels in (("source", {s for s, _ in edge.ends}), ("target", {t for _, t in edge.ends})):
            wanted = frame.select(pl.col(column).unique())
            known: set[str] = set()
            for label in labels:
                text = f"LOAD FROM $frame MATCH (n:{label} {{key: c0}}) RETURN n.key AS key"
                known |= set(_run(connection, text, {"frame": _numbered(wanted)}).get_as_pl()["key"].to_list())
            missing += [key for key in wanted[column].to_list() if key not in known]
        raise UnknownEndpoint(edge.name, sorted(set(missing)), len(set(missing)))


# Tables

_TABLES: tuple[NodeLabel | EdgeType, ...] = (*NODES.values(), *EDGES.values())


def _table_text(table: NodeLabel | EdgeType) -> str:
    """The statement that creates a label's or type's table."""
    if isinstance(table, NodeLabel):
        columns = ", ".join(f"`{name}` {column}" for name, column in table.all_columns.items())
        return f"CREATE NODE TABLE {table.name}({columns}, PRIMARY KEY(key))"
    ends = [f"FROM {source} TO {target}" for source, target in table.ends]
    return f"CREATE REL TABLE {table.name}({', '.join(ends + [f'`{name}` {column}' for name, column in table.properties.items()])})"


def _missing(connection: ladybug.Connection, tables: Collection[str]) -> Iterator[str]:
    """The statements that bring a graph with these tables up to the schema."""
    for table in _TABLES:
        if table.name not in tables:
            yield _table_text(table)
            continue
        known = {row[0] for row in _run(connection, f"CALL table_info('{table.name}') RETURN name").get_all()}
        properties = table.all_columns if isinstance(table, NodeLabel) else table.properties
        yield from (f"ALTER TABLE {table.name} ADD `{name}` {column}" for name, column in properties.items() if name not in known)
        if isinstance(table, EdgeType):
            rows = _run(connection, f"CALL show_connection('{table.name}') RETURN `source table name`, `destination table name`").get_all()
            joined = {tuple(row) for row in rows}
            yield from (f"ALTER TABLE {table.name} ADD FROM {source} TO {target}" for source, target in table.ends if (source, target) not in joined)


# Handles


def _acquire(path: Path, read_only: bool) -> _Handle:
    with _handles_lock:
        handle = _handles.get(path)
        if path in _abandoned:
            raise StoreBusy(f"{path} was left open when its disk was full: make room there, and go on in a new process")
        if handle is None:
            handle = _Handle(_open_database(path, read_only), read_only)
            _handles[path] = handle
        elif handle.read_only and not read_only:
            raise StoreBusy(f"{path} is open for reading in this process: close that store before opening it for writing")
        handle.users += 1
        return handle


def _release(path: Path) -> None:
    with _handles_lock:
        handle = _handles[path]
        handle.users -= 1
        if handle.users == 0:
            del _handles[path]
            if handle.full:
                _abandoned.add(path)
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle.database))  # never freed: that would close it
            else:
                handle.database.close()


def _open_database(path: Path, read_only: bool) -> ladybug.Database:
    if read_only and not path.exists():
        raise NotAGraph(f"{path}: there is no graph here yet; ingest into it first (featlas ingest edges), or name another --atlas")
    if not read_only:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotAGraph(f"{path}: its folder cannot be made ({error.strerror})") from None
        return _open_when_free(path)
    return _open_for_reading(path)


def _open_when_free(path: Path) -> ladybug.Database:
    """Open for writing; while another process writes, wait for it as long as `holders.patience` says. Raises `StoreBusy`."""
    waits = holders.patience()
    deadline, wait_s = time.monotonic() + waits, 0.02
    while True:
        try:
            return _open_for_writing(path)
        except StoreBusy:
            if time.monotonic() + wait_s > deadline:
                raise
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 0.5)


def _open_for_writing(path: Path) -> ladybug.Database:
    try:
        return _database(path)
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in _TORN_LOG):
            raise _opening_error(path, error) from None
    log.warning("%s: a writer was killed, or its disk was full, while it committed; its last transaction is dropped", path)
    try:
        return _database(path, throw_on_wal_replay_failure=False)
    except RuntimeError as error:
        raise _opening_error(path, error) from None


def _open_for_reading(path: Path) -> ladybug.Database:
    """Read-only beside a writer fails while it checkpoints: wait. After a killed writer only a writing open recovers: do that once."""
    deadline, wait_s = time.monotonic() + READ_ONLY_PATIENCE_S, 0.02
    while True:
        try:
            return _database(path, read_only=True)
        except RuntimeError as error:
            if not any(sign in str(error).lower() for sign in (*_BEING_WRITTEN, *_TORN_LOG)):
                raise _opening_error(path, error) from None
            failure = error
        try:
            _open_for_writing(path).close()
        except StoreBusy:
            log.debug("%s: %s; waiting for the writer", path, failure)
        if time.monotonic() > deadline:
            raise _opening_error(path, failure) from None
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 0.5)


def _database(path: Path, **options: Any) -> ladybug.Database:
    return ladybug.Database(path, checkpoint_threshold=CHECKPOINT_BYTES, **options)


def _opening_error(path: Path, error: RuntimeError) -> Exception:
    message = _one_line(str(error))
    if _NOT_WRITTEN in message.lower() or is_full(error):
        return DiskFull(path)
    if "lock" in message.lower():
        holder = re.search(r"PID (\d+)", message)
        by = holders.held_by(int(holder.group(1)) if holder else None)
        why = "only one process can write an embedded graph, several a server's (--graph)"
        return StoreBusy(f"{path} is being written by {by}: {why}; {holders.way_out(holders.patience())}")
    if "not a valid" in message.lower():
        return NotAGraph(f"{path} is not a Ladybug database: name another path, or move that file away")
    if "version" in message.lower():
        return NotAGraph(f"{path} is of another version of Ladybug than {ladybug.__version__} ({message}): install that one, or ingest anew")
    if "read-only file system" in message.lower() or "permission denied" in message.lower():
        return StoreFailed(f"{path} cannot be written to ({message}): commands that only read work here; to write, copy the atlas to another place")
    if any(sign in message.lower() for sign in (*_BEING_WRITTEN, "read enough", "cannot read")):
        damaged = "or the file is damaged: put a copy in its place (`featlas atlas copy` makes them), or measure again"
        told = message.replace("The database may be checkpointing; please retry later.", "").rstrip(" .")
        return StoreFailed(f"{path} cannot be opened: {told}; another process is writing it, then try again later, {damaged}")
    return StoreFailed(f"{path} cannot be opened: {message}")


# Statements


@contextmanager
def _connection(database: ladybug.Database) -> Iterator[ladybug.Connection]:
    connection = ladybug.Connection(database)
    try:
        yield connection
    finally:
        connection.close()


def _run(connection: ladybug.Connection, text: str, parameters: Mapping[str, object] | None = None) -> Any:
    """Run one of our own statements: an error is a failure, never the user's mistake."""
    try:
        result: Any = connection.execute(text, dict(parameters or {}))
    except RuntimeError as error:
        raise StoreFailed(f"the embedded graph store failed: {_one_line(str(error))}") from error
    return result


def _count(connection: ladybug.Connection, text: str, parameters: Mapping[str, object]) -> int:
    return int(_run(connection, text, parameters).get_next()[0])


def _end_transaction(connection: ladybug.Connection) -> None:
    try:
        connection.execute("COMMIT")
    except RuntimeError as error:
        # A statement of the user's may have ended the transaction itself.
        if "no active transaction" not in str(error).lower():
            raise StoreFailed(f"the embedded graph store failed to commit: {_one_line(str(error))}") from error


def _roll_back(connection: ladybug.Connection) -> None:
    try:
        connection.execute("ROLLBACK")
    except RuntimeError as error:
        # A statement that failed has rolled the transaction back already.
        if "no active transaction" not in str(error).lower():
            log.warning("rolling back failed: %s", _one_line(str(error)))


def _numbered(frame: pl.DataFrame) -> pl.DataFrame:
    """A fresh frame whose columns are called c0, c1, …: no property's name can then collide with a keyword or a variable."""
    return frame.select(pl.col(name).alias(f"c{i}") for i, name in enumerate(frame.columns))


def _assignments(variable: str, names: Sequence[str], first: int) -> str:
    if not names:
        return ""
    return "SET " + ", ".join(f"{variable}.`{name}` = c{i}" for i, name in enumerate(names, start=first))


# Merging edges: MERGE itself, with its SET for each property, takes ten times as long as looking up what is there and creating the rest.


def _merge_between(connection: ladybug.Connection, edge: EdgeType, ends: tuple[str, str], frame: pl.DataFrame) -> int:
    """Create the edges of `frame` between two labels that are not there, set those that are there and differ; how many of the frame are there now.

    Columns of `frame`: source, target, the type's identity, then those to be set.
    """
    identity = ["source", "target", *edge.identity]
    others = frame.columns[len(identity) :]
    rows = f"LOAD FROM $frame MATCH (a:{ends[0]} {{key: c0}}) MATCH (b:{ends[1]} {{key: c1}})"
    named = {name: f"`{name}`: c{i}" for i, name in enumerate(frame.columns)}
    pattern = "{" + ", ".join(named[name] for name in edge.identity) + "}"
    known = frame.clear()
    if frame.height < LOOKED_UP_AT_ONCE or _any_like(connection, edge, ends, frame):
        columns = ", ".join(["c0 AS source", "c1 AS target", *(f"e.`{name}` AS `{name}`" for name in frame.columns[2:])])
        text = f"{rows} MATCH (a)-[e:{edge.name} {pattern}]->(b) RETURN {columns}"
        known = _run(connection, text, {"frame": _numbered(frame)}).get_as_pl().cast(dict(frame.schema))
    new = frame.join(known, on=identity, how="anti")
    created = 0
    if new.height:
        created = _count(
            connection, f"{rows} CREATE (a)-[e:{edge.name} {{{', '.join(list(named.values())[2:])}}}]->(b) RETURN count(*)", {"frame": _numbered(new)}
        )
    if known.height and others:
        before = frame.join(known, on=identity, suffix=" before")
        changed = before.filter(pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name} before")) for name in others)).select(frame.columns)
        if changed.height:
            text = f"{rows} MATCH (a)-[e:{edge.name} {pattern}]->(b) {_assignments('e', others, first=len(identity))}"
            _run(connection, text, {"frame": _numbered(changed)})
    return created + known.select(identity).n_unique()  # an edge that the graph has twice is one


def _any_like(connection: ladybug.Connection, edge: EdgeType, ends: tuple[str, str], frame: pl.DataFrame) -> bool:
    """Whether any edge could be one of the frame's: from a node between its least and its greatest, with the values that all of its rows share."""
    low, high = frame.select(low=pl.col("source").min(), high=pl.col("source").max()).row(0)
    shared = {name: frame[name][0] for name in edge.identity if frame[name].n_unique() == 1}
    conditions = " AND ".join(["a.key >= $low AND a.key <= $high", *(f"e.`{name}` = ${name}" for name in shared)])
    text = f"MATCH (a:{ends[0]})-[e:{edge.name}]->(b:{ends[1]}) WHERE {conditions} RETURN a.key LIMIT 1"
    return bool(_run(connection, text, {"low": low, "high": high, **shared}).get_all())


# A user's query


class _Statement(ladybug.PreparedStatement):
    """A prepared statement whose end is quiet where preparing it failed."""

    _prepared_statement: Any = None


def _prepared(connection: ladybug.Connection, cypher: str, parameters: Mapping[str, object] | None, write: bool) -> Any:
    """Prepare the one statement of a query; preparing refuses several (a COMMIT could end the read-only transaction)."""
    if not write:
        require_reading(cypher, LadybugStore.dialect)  # first: preparing some calls reads files already
    try:
        cypher.encode()
        statement = _rejecting(lambda: _Statement(connection, cypher, dict(parameters or {})))
    except (TypeError, ValueError, OverflowError) as error:  # what the bindings raise for values that the database has no type for
        said = "half a character" if isinstance(error, UnicodeEncodeError) else _one_line(str(error)).partition(" Invoked with:")[0]
        raise QueryRejected(f"the text or a parameter is nothing that the database can take: {said}") from None
    failure = "" if statement.is_success() else statement.get_error_message()
    if failure:
        raise _rejection(failure)
    return statement


def _rejecting(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except RuntimeError as error:
        raise _rejection(str(error)) from None


def _rejection(message: str) -> WriteRefused | QueryRejected:
    if "write query inside a read-only transaction" in message or "read-only database" in message.lower():
        return WriteRefused("it would change the graph")
    return QueryRejected(message.strip())


def _answer_of(connection: ladybug.Connection, result: Any, limit: int | None) -> Answer:
    names, types = result.get_column_names(), result.get_column_data_types()
    if limit is None and all(type in _PLAIN for type in types):
        frame = result.get_as_pl()
        frame = frame.with_columns(pl.lit(None, dtype=pl.Null).alias(name) for name in frame.columns if frame[name].null_count() == frame.height)
        return Answer(names, frame.get_columns())
    rows, cut = cut_to(result.get_all() if limit is None else result.get_n(limit + 1), limit)
    keys = _keys_of_ends(connection, rows)
    return Answer(names, [[_plain(row[i], keys) for row in rows] for i in range(len(names))], cut)


def _plain(value: Any, keys: "_KeysById") -> Any:
    """A Ladybug value as plain values; see `store.rendered_node` for the shape of what is a graph's."""
    if isinstance(value, list):
        return [_plain(item, keys) for item in value]
    if isinstance(value, Decimal):  # also the sum of whole numbers
        return int(value) if value == value.to_integral_value() else float(value)
    if not isinstance(value, dict):
        return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
    if "_NODES" in value:
        return {"nodes": [_plain(node, keys) for node in value["_NODES"]], "relationships": [_plain(rel, keys) for rel in value["_RELS"]]}
    if "_SRC" in value:
        properties = {name: _plain(item, keys) for name, item in _properties(value).items()}
        return rendered_relationship(value["_LABEL"], properties, keys.get(_id(value["_SRC"])), keys.get(_id(value["_DST"])))
    if "_ID" in value:
        return rendered_node(value["_LABEL"], {name: _plain(item, keys) for name, item in _properties(value).items()})
    return {name: _plain(item, keys) for name, item in value.items()}


# Ladybug's own number of a node, (table, offset), and the node's key. A relationship tells its ends by their numbers alone.
_KeysById = dict[tuple[int, int], object]


def _keys_of_ends(connection: ladybug.Connection, rows: Sequence[Sequence[Any]]) -> _KeysById:
    """The keys of the nodes that a result's relationships join: those of its own nodes are known, the others are looked up."""
    keys: _KeysById = {}
    ends: set[tuple[int, int]] = set()
    waiting: list[Any] = [value for row in rows for value in row if isinstance(value, (dict, list))]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and "_SRC" in value:
            ends |= {_id(value["_SRC"]), _id(value["_DST"])}
        elif isinstance(value, dict) and "_ID" in value:
            keys[_id(value["_ID"])] = value.get("key")
        else:
            waiting += [item for item in (value.values() if isinstance(value, dict) else value) if isinstance(item, (dict, list))]
    unknown = sorted(ends - keys.keys())
    if unknown:
        labels = dict(_run(connection, "CALL show_tables() WHERE type = 'NODE' RETURN id, name").get_all())
        for table, group in groupby(unknown, key=lambda end: end[0]):
            text = f"UNWIND $offsets AS o MATCH (n:{labels[table]}) WHERE id(n) = internal_id($number, o) RETURN o, n.key"
            found = _run(connection, text, {"offsets": [offset for _, offset in group], "number": table}).get_all()
            keys |= {(table, offset): key for offset, key in found}
    return keys


def _id(value: Mapping[str, int]) -> tuple[int, int]:
    return value["table"], value["offset"]


def _properties(value: dict[str, Any]) -> dict[str, object]:
    return {name: item for name, item in value.items() if not name.startswith("_")}


def _one_line(message: str) -> str:
    return " ".join(message.split())
