"""The graph store on a server: Neo4j 5.26 or later, by the official driver.

How it is written and read fast:

1. Edges go in as columns, not as rows: each statement first collects the nodes that its edges join, once each, and the edges
   name them by position. A sequence's edges and its mark are one managed transaction, which the driver repeats on a deadlock.
2. Edges come back as columns too, by `collect()`, in groups of a bounded number of edges: a row at a time is five times slower.

3. The planner plans for the numbers of nodes and edges at that time, and keeps the plan: in an empty graph it looks edges up by their
   `run`, which is all of them once a run is written, for every single edge. So no statement here leaves it that choice: nodes are
   found by a hint, a run is compared inside a list, where no index applies, and MERGE, which takes no hint, is not used for edges.

What becomes of a server that goes away in the middle:

4. All writing of the package's own is repeated for `PATIENCE_S` while the server does not answer: it may be written twice without harm. That
   holds for a commit whose answer was lost, too: a sequence that is marked is not written again, in the same transaction in which it would be.
5. A server gives its driver a time in which it will say something, if only that it is at work (two minutes, unless configured otherwise): a
   connection that is silent for longer is given up, so that nothing hangs for ever.

Reading queries run in a session of read access: the server itself refuses to write.
"""

import ipaddress
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import neo4j
import polars as pl
from neo4j.exceptions import (
    AuthError,
    ClientError,
    ConfigurationError,
    ConstraintError,
    DriverError,
    IncompleteCommit,
    Neo4jError,
    ServiceUnavailable,
    SessionExpired,
)
from neo4j.graph import Node, Path, Relationship

from ..errors import FeatlasError
from . import schema
from .access import require_reading
from .schema import EDGES, NODES, SCHEMA_VERSION, STRING, VERSION_KEY, EdgeType
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
    ServerCredentials,
    StoreFailed,
    StoreUnreachable,
    UnknownDatabase,
    UnknownEndpoint,
    WriteRefused,
    WrongCredentials,
    cut_to,
    rendered_node,
    rendered_relationship,
)

log = logging.getLogger(__name__)
# The driver's own log is for those who ask for it; what went wrong is in the errors raised here.
logging.getLogger("neo4j").addHandler(logging.NullHandler())

CONNECTION_TIMEOUT_S = 10.0
PATIENCE_S = 60.0  # for a server that went away: starting one takes 5 to 20 s
PAUSES_S = (0.5, 5.0)  # between two attempts: at first, at most
DRIVERS_PATIENCE_S = 5.0  # the driver's own, in which nothing is said: deadlocks end in less
IDLE_S = 30.0  # after which a connection is tried before it is used: a network may forget those that are silent
ROWS_PER_STATEMENT = 20_000
ROWS_PER_TRANSACTION = 100_000  # of idempotent merges; a sequence is never split
EDGES_PER_RECORD = 100_000

Result = TypeVar("Result")


class Neo4jStore(GraphStore):
    """The graph on the server at `uri`. Opening raises what `store.open_graph` lists, naming the URI and never the password."""

    dialect = "neo4j"

    def __init__(self, uri: str, credentials: ServerCredentials, *, read_only: bool = False) -> None:
        self.uri = uri
        self.read_only = read_only
        self._database = credentials.database
        self._driver = open_driver(uri, credentials)
        try:
            with _readable_errors(uri, credentials.database):
                self._driver.verify_connectivity()
                self._check_schema()
        except BaseException:
            self._driver.close()
            raise

    def merge_nodes(self, label: str, rows: pl.DataFrame) -> None:
        frame = schema.node_frame(label, rows)
        sets = [f"n.`{name}` = ${name}[i]" for name in frame.columns if name != "key"]
        text = f"UNWIND range(0, size($key) - 1) AS i MERGE (n:{label} {{key: $key[i]}})" + (f" SET {', '.join(sets)}" if sets else "")

        def work(tx: neo4j.ManagedTransaction, part: pl.DataFrame) -> None:
            for statement in part.iter_slices(ROWS_PER_STATEMENT):
                _run(tx, text, statement.to_dict(as_series=False)).consume()

        def write(session: neo4j.Session) -> None:
            for part in frame.iter_slices(ROWS_PER_TRANSACTION):
                session.execute_write(work, part)

        self._write(write)

    def merge_edges(self, type: str, rows: pl.DataFrame) -> None:
        edge, frame = schema.edge_type(type), schema.edge_frame(type, rows)

        def write(session: neo4j.Session) -> None:
            for (source, target), own in session.execute_read(_by_ends, edge, frame):
                for part in own.iter_slices(ROWS_PER_TRANSACTION):
                    session.execute_write(_merge_edges, edge, source, target, part)

        self._write(write)

    def commit_sequences(self, commits: Sequence[SequenceCommit]) -> int:
        def work(tx: neo4j.ManagedTransaction) -> int:
            return sum(_commit(tx, commit) for commit in commits)

        def write(session: neo4j.Session) -> int:
            for _ in commits:
                try:
                    return session.execute_write(work)
                except ConstraintError:
                    log.info("another writer has committed one of these sequences meanwhile: trying again without it")
            return session.execute_write(work)

        return self._write(write)

    def answer(
        self, cypher: str, parameters: Mapping[str, object] | None = None, *, write: bool = False, limits: QueryLimits | None = None
    ) -> Answer:
        if write and self.read_only:
            raise WriteRefused("the graph was opened read-only")
        if not write:
            require_reading(cypher, self.dialect)
        within = limits or QueryLimits()
        access = neo4j.WRITE_ACCESS if write else neo4j.READ_ACCESS
        with _readable_errors(self.uri, self._database, users_query=True, seconds=within.seconds), self._session(access) as session:
            if write:
                # Not a managed transaction: CALL … IN TRANSACTIONS must be the one to begin them.
                names, rows = _fetch(session.run(neo4j.Query(cypher, timeout=within.seconds), dict(parameters or {})), within.rows)
                keys = session.execute_read(_keys_of_ends, rows)
            else:
                work = neo4j.unit_of_work(timeout=within.seconds)(lambda tx: _reading(tx, cypher, parameters, within.rows))
                names, rows, keys = session.execute_read(work)
        shown, cut = cut_to(rows, within.rows)
        return Answer(names, [[_plain(row[i], keys) for row in shown] for i in range(len(names))], cut)

    def _read_edges(self, edge: EdgeType, only: EdgeFilter) -> pl.DataFrame:
        # A group's records are large, those of a sequence small: one a source.
        fetch_size = 4 if only.sequence is None else 1000
        with _readable_errors(self.uri, self._database), self._session(neo4j.READ_ACCESS, fetch_size=fetch_size) as session:
            parts = [part for ends in edge.ends for part in _edge_parts(session, edge, *ends, only)]
        types = {name: column.dtype for name, column in edge.all_columns.items()}
        return pl.concat([pl.DataFrame(schema=types), *parts])

    def close(self) -> None:
        self._driver.close()

    def _session(self, access: str, fetch_size: int = 1000) -> neo4j.Session:
        return self._driver.session(database=self._database, default_access_mode=access, fetch_size=fetch_size)

    def _write(self, work: Callable[[neo4j.Session], Result]) -> Result:
        """Do what may be done twice, in a session for writing; while the server is away it is tried again."""
        if self.read_only:
            raise WriteRefused("the graph was opened read-only")

        def attempt() -> Result:
            with self._session(neo4j.WRITE_ACCESS) as session:
                return work(session)

        with _readable_errors(self.uri, self._database):
            return self._patiently(attempt)

    def _patiently(self, attempt: Callable[[], Result]) -> Result:
        """Repeat what fails since the server is away, for `PATIENCE_S` from the first failure on. Raises the driver's last error."""
        until, pause = None, PAUSES_S[0]
        while True:
            try:
                return attempt()
            except (DriverError, Neo4jError) as error:
                now = time.monotonic()
                if not _passes(error):
                    raise
                if until is not None and now > until:
                    raise _lost(error, self.uri) from error
                if until is None:
                    until = now + PATIENCE_S
                    what = "is busy with others" if _is_crowded(error) else "does not answer"
                    log.warning("%s %s (%s): trying again for %.0f s", self.uri, what, _cause(error), PATIENCE_S)
            time.sleep(pause)
            pause = min(2 * pause, PAUSES_S[1])

    # Schema

    def _check_schema(self) -> None:
        text = "MATCH (m:Meta {key: $key}) RETURN m.value"
        with self._session(neo4j.READ_ACCESS) as session:
            rows = _rows(session, text, {"key": VERSION_KEY})
            ours = "MATCH (n) WHERE any(label IN labels(n) WHERE label IN $labels) RETURN n LIMIT 1"
            labels = [label for label in NODES if label != "Meta"]
            used = bool(rows) or bool(_rows(session, ours, {"labels": labels}))
        if rows and rows[0][0] == str(SCHEMA_VERSION):
            return
        if rows:
            raise SchemaVersionMismatch(self.uri, rows[0][0])
        if used:
            raise NotAGraph(f"{self.uri} has nodes labelled like featlas's but no featlas graph: use another database (NEO4J_DATABASE) or server")
        if self.read_only:
            raise NotAGraph(f"{self.uri} holds no featlas graph yet: ingest into it first (featlas ingest edges)")
        self._create_schema()

    def _create_schema(self) -> None:
        with self._session(neo4j.WRITE_ACCESS) as session:
            for text in _schema_statements():
                try:
                    session.execute_write(_consume, text)
                except ClientError as error:  # another process makes the schema at this moment: IF NOT EXISTS looks before it waits for the lock
                    if not (error.code or "").endswith(".EquivalentSchemaRuleAlreadyExists"):
                        raise
            session.execute_write(_consume, "CALL db.awaitIndexes(60)")
            # The version comes last: a creation that was cut off is begun again.
            version = {"key": VERSION_KEY, "value": str(SCHEMA_VERSION)}
            session.execute_write(_consume, "MERGE (m:Meta {key: $key}) SET m.value = $value", version)


# Opening


def completed_credentials(uri: str, credentials: ServerCredentials) -> ServerCredentials:
    """Credentials with what was left out: the ones that `featlas neo4j up` saved for its own server, the user `neo4j`."""
    if credentials.password is None:
        from .neo4j_server import saved_credentials

        saved = saved_credentials(uri)
        if saved is not None and credentials.username in (None, saved[0]):
            return replace(credentials, username=saved[0], password=saved[1])
    return replace(credentials, username=credentials.username or "neo4j")


def open_driver(uri: str, credentials: ServerCredentials) -> neo4j.Driver:
    """The official driver for a server, not connected yet, with what the credentials leave out completed. Raises `NotAGraph` for no URI."""
    credentials = completed_credentials(uri, credentials)
    auth = None if credentials.password is None else (credentials.username or "neo4j", credentials.password)
    if auth is not None:
        _warn_where_readable(uri)
    address, trust = _trusting(uri, credentials.authorities)
    try:
        return neo4j.GraphDatabase.driver(
            address, auth=auth, connection_timeout=CONNECTION_TIMEOUT_S, connection_acquisition_timeout=2 * CONNECTION_TIMEOUT_S,
            max_transaction_retry_time=DRIVERS_PATIENCE_S, liveness_check_timeout=IDLE_S, notifications_min_severity="OFF", user_agent="featlas",
            **trust,
        )
    except (ConfigurationError, ValueError) as error:
        raise NotAGraph(_bad_uri(uri, error)) from None


def _trusting(uri: str, authorities: os.PathLike[str] | None) -> tuple[str, dict[str, Any]]:
    """The address and settings by which the driver encrypts and believes `authorities`; it takes them with a scheme without +s alone."""
    scheme, _, rest = uri.partition("://")
    if authorities is None or not scheme.endswith("+s"):
        return uri, {}
    return f"{scheme.removesuffix('+s')}://{rest}", {"encrypted": True, "trusted_certificates": neo4j.TrustCustomCAs(str(authorities))}


def _warn_where_readable(uri: str) -> None:
    """A password that leaves this machine unencrypted is warned of: whoever is between can read it, and the graph."""
    address = urlsplit(uri)
    if address.scheme in ("bolt", "neo4j") and not _is_this_machine(address.hostname or ""):
        log.warning("%s is not encrypted: the password and the graph can be read on the way; %s+s:// is, where the server has a certificate",
                    uri, address.scheme)  # fmt: skip


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bad_uri(uri: str, error: Exception) -> str:
    return f"{uri} is no server's URI ({_one_line(error)}): write it like bolt://127.0.0.1:7687 or neo4j+s://HOST"


def _passes(error: DriverError | Neo4jError) -> bool:
    """Whether an error may be another one, or none, a moment later; a commit without an answer is such for all that may be done twice."""
    return error.is_retryable() or isinstance(error, IncompleteCommit)


def _is_crowded(error: DriverError | Neo4jError) -> bool:
    """Whether a server that answers could not do it beside what others do: a deadlock, a lock, its memory."""
    return (getattr(error, "code", None) or "").startswith("Neo.TransientError.Transaction.") or _lacks_memory(error)


def _lacks_memory(error: DriverError | Neo4jError) -> bool:
    """Whether a transaction wanted more memory than the server has, or gives to all transactions or to one."""
    return "OutOfMemory" in (getattr(error, "code", None) or "")


def _lost(error: DriverError | Neo4jError, uri: str) -> StoreUnreachable:
    """What is said where a server went away in the middle, or could not for `PATIENCE_S` since others were at it."""
    if _is_crowded(error):
        return StoreUnreachable(
            f"{uri} answers, and could not do this beside what others do there ({_cause(error)}): what was committed stays in it; when they are "
            "done, give the same command again"
        )
    return StoreUnreachable(
        f"{uri} went away ({_cause(error)}): what was committed stays in it; when it answers again (`featlas neo4j up` starts one of one's own), "
        "give the same command again"
    )


@contextmanager
def _readable_errors(uri: str, database: str | None, *, users_query: bool = False, seconds: float | None = None) -> Iterator[None]:
    """Turn the driver's errors into one line that names the URI and the way out; a user's query shows the database's own message."""
    try:
        yield
    except (Neo4jError, DriverError) as error:
        if seconds is not None and ".Transaction.TransactionTimedOut" in (getattr(error, "code", None) or ""):
            raise QueryTooSlow(seconds) from None
        raise _readable(error, uri, database, users_query) from error
    except (TypeError, ValueError, OverflowError) as error:
        if users_query:
            raise QueryRejected(f"a parameter cannot be sent: {_one_line(error)}") from None
        if "resolve" in str(error):  # the driver reads the address only when it connects
            raise NotAGraph(_bad_uri(uri, error)) from None
        raise


def _readable(error: Neo4jError | DriverError, uri: str, database: str | None, users_query: bool) -> FeatlasError:
    code = getattr(error, "code", None) or ""
    message = (getattr(error, "message", None) or str(error)).strip()
    if isinstance(error, AuthError) or code.startswith("Neo.ClientError.Security.Authentication"):
        ways = "set NEO4J_USERNAME and NEO4J_PASSWORD (or NEO4J_PASSWORD_FILE), or have it asked for: featlas --ask-password …"
        return WrongCredentials(f"{uri} refused the user name or password: {ways}")
    if code == "Neo.ClientError.Database.DatabaseNotFound":
        return UnknownDatabase(f"{uri} has no database {database!r}: set NEO4J_DATABASE to one that it has, or unset it for the default")
    if isinstance(error, ServiceUnavailable):
        cause = _cause(error)
        return StoreUnreachable(f"no Neo4j answers at {uri} ({cause}): {_way_to(uri, cause.lower())}")
    if isinstance(error, SessionExpired):
        return _lost(error, uri)
    if code == "Neo.ClientError.Statement.AccessMode":
        return WriteRefused("it would change the graph")
    if users_query and isinstance(error, ClientError):
        return QueryRejected(message)
    if _lacks_memory(error):
        return StoreFailed(
            f"{uri} has not the memory for this ({_one_line(message)[:200]}): ask for less (one run, one task, one site), or start the server with "
            "more (`featlas neo4j up --heap-mb 8192`; elsewhere server.memory.heap.max_size)"
        )
    if any(sign in message.lower() for sign in _UNWRITTEN):
        return StoreFailed(
            f"{uri} could not write ({_one_line(message)[:100]}…): its disk may be full. Stop it first, while the disk is full "
            "(`featlas neo4j down`), then make room and start it: what was committed is there, and the same command goes on. "
            "Room that is made while it runs can spoil its log"
        )
    return StoreFailed(f"{uri} failed: {_one_line(message)}")


# What a Neo4j says that cannot write its log, and from then on to everything. After its disk was full it goes on to write where there is room, behind
# the gap: with such a log 5.26 does not start again (it takes all memory).
_UNWRITTEN = ("could not append transaction", "no space left", "critical error", "database panic", "unable to write")


def _way_to(uri: str, cause: str) -> str:
    """What to do about a connection that failed. cause: in small letters."""
    if "certificate" in cause or "ssl" in cause:
        return next((way_out for sign, way_out in _TLS_WAYS.items() if sign in cause), _TLS_WAYS[""])
    if urlsplit(uri).scheme in ("bolt", "neo4j") and any(sign in cause for sign in _CUT_OFF):
        return "a server that asks for TLS answers to bolt+s:// or neo4j+s:// alone; else look at what listens there"
    return "start one with `featlas neo4j up`, or check the address in --graph or NEO4J_URI"


_CUT_OFF = ("connection reset", "broken pipe", "handshake", "no data", "incomplete")
_TLS_WAYS = {
    "expired": "the server's certificate is out of date: have it renewed",
    "not yet valid": "the server's certificate is not valid yet: look at both clocks",
    "mismatch": "its certificate is another name's: connect by a name that stands in it (bolt+ssc:// would believe whoever answers)",
    "verify failed": "nobody that this machine trusts has signed its certificate: name the file of who has as NEO4J_CA_CERTIFICATE, or, to believe "
    "whoever answers, bolt+ssc:// or neo4j+ssc://",
    "": "without TLS the scheme is bolt:// or neo4j://, with a certificate signed by oneself bolt+ssc:// or neo4j+ssc://",
}


def _cause(error: BaseException) -> str:
    """The innermost reason that a connection failed, for example `[Errno 111] Connection refused`."""
    innermost: BaseException = error
    while innermost.__cause__ is not None or isinstance(innermost, BaseExceptionGroup):
        # of several servers that a router names, the first
        inner = innermost.exceptions[0] if isinstance(innermost, BaseExceptionGroup) else innermost.__cause__
        assert isinstance(inner, BaseException)
        innermost = inner
    return _one_line(innermost)[:200]


def _schema_statements() -> Iterator[str]:
    for label in NODES.values():
        yield f"CREATE CONSTRAINT {label.name.lower()}_key IF NOT EXISTS FOR (n:{label.name}) REQUIRE n.key IS UNIQUE"
        for name in label.indexed:
            yield f"CREATE INDEX {label.name.lower()}_{name} IF NOT EXISTS FOR (n:{label.name}) ON (n.`{name}`)"
    yield "CREATE CONSTRAINT on_sequence_key IF NOT EXISTS FOR ()-[e:ON_SEQUENCE]-() REQUIRE e.key IS UNIQUE"
    for edge in EDGES.values():
        for name in edge.indexed:
            yield f"CREATE INDEX {edge.name.lower()}_{name} IF NOT EXISTS FOR ()-[e:{edge.name}]-() ON (e.`{name}`)"


# Statements


def _run(tx: neo4j.ManagedTransaction, text: str, parameters: Mapping[str, object] | None = None) -> neo4j.Result:
    return tx.run(text, dict(parameters or {}))


def _consume(tx: neo4j.ManagedTransaction, text: str, parameters: Mapping[str, object] | None = None) -> None:
    _run(tx, text, parameters).consume()


def _fetch(result: neo4j.Result, limit: int | None = None) -> tuple[list[str], list[list[Any]]]:
    """A result's columns and rows; where there is a limit, at most one row more than it, which tells that there are more."""
    names = list(result.keys())
    return names, result.values() if limit is None else [list(record.values()) for record in result.fetch(limit + 1)]


def _reading(
    tx: neo4j.ManagedTransaction, cypher: str, parameters: Mapping[str, object] | None, limit: int | None
) -> tuple[list[str], list[list[Any]], dict[str, Any]]:
    names, rows = _fetch(_run(tx, cypher, parameters), limit)
    return names, rows, _keys_of_ends(tx, rows)


def _keys_of_ends(tx: neo4j.ManagedTransaction, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The keys, by element id, of the nodes that a result's relationships join: the server sends those ends without their properties."""
    keys: dict[str, Any] = {}
    ends: set[str] = set()
    waiting: list[Any] = [value for row in rows for value in row]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Node):
            keys[value.element_id] = value.get("key")
        elif isinstance(value, Relationship):
            ends |= {node.element_id for node in (value.start_node, value.end_node) if node is not None}
        elif isinstance(value, Path):
            waiting += [*value.nodes, *value.relationships]
        elif isinstance(value, (list, tuple, dict)):
            waiting += value.values() if isinstance(value, dict) else value
    unknown = sorted(ends - keys.keys())
    if unknown:
        text = "MATCH (n) WHERE elementId(n) IN $ids RETURN elementId(n), n.key"
        keys |= dict(_fetch(_run(tx, text, {"ids": unknown}))[1])
    return keys


def _rows(session: neo4j.Session, text: str, parameters: Mapping[str, object] | None = None) -> list[list[Any]]:
    return session.execute_read(lambda tx: _fetch(_run(tx, text, parameters))[1])


def _known(tx: neo4j.ManagedTransaction, label: str, keys: Sequence[str]) -> list[str]:
    """Those of `keys` that nodes of the label have."""
    text = f"UNWIND $keys AS key MATCH (n:{label} {{key: key}}) RETURN collect(n.key)"
    return list(_run(tx, text, {"keys": keys}).single(strict=True)[0])


def _by_ends(tx: neo4j.ManagedTransaction, edge: EdgeType, frame: pl.DataFrame) -> list[tuple[tuple[str, str], pl.DataFrame]]:
    """The rows for each pair of labels that the type may join; raises `UnknownEndpoint` where a row fits none."""
    keys = {column: frame[column].unique().to_list() for column in ("source", "target")}
    known = {
        (column, label): _known(tx, label, keys[column])
        for column, side in (("source", 0), ("target", 1)) for label in dict.fromkeys(ends[side] for ends in edge.ends)
    }
    parts = [
        (ends, frame.filter(pl.col("source").is_in(known["source", ends[0]]), pl.col("target").is_in(known["target", ends[1]]))) for ends in edge.ends
    ]
    if sum(part.height for _, part in parts) != frame.height:
        found = {column: {key for (c, _), some in known.items() if c == column for key in some} for column in keys}
        missing = sorted({key for column in keys for key in keys[column] if key not in found[column]})
        raise UnknownEndpoint(edge.name, missing, len(missing))
    return [(ends, part) for ends, part in parts if part.height]


def _ends_text(source: str, target: str) -> str:
    """The beginning of a statement over edges: `a` is `$sources[$a[i]]` and `b` is `$targets[$b[i]]`, each node looked up once."""
    nodes = "COLLECT {{ UNWIND range(0, size(${0}) - 1) AS i MATCH (n:{1} {{key: ${0}[i]}}) RETURN n ORDER BY i }}"
    return (
        f"WITH {nodes.format('sources', source)} AS sources, {nodes.format('targets', target)} AS targets "
        "UNWIND range(0, size($a) - 1) AS i WITH sources[$a[i]] AS a, targets[$b[i]] AS b, i "
    )


def _edge_parameters(part: pl.DataFrame) -> dict[str, object]:
    """The parameters of such a statement: the nodes' keys, the ends as positions among them, and every property as a list."""
    parameters: dict[str, object] = {**part.drop("source", "target").to_dict(as_series=False)}
    for column, nodes, position in (("source", "sources", "a"), ("target", "targets", "b")):
        names = part[column].unique(maintain_order=True)
        parameters[nodes] = names.to_list()
        # An Enum's physical values are the positions of its categories.
        parameters[position] = part[column].cast(pl.Enum(names)).to_physical().to_list()
    return parameters


def _create_edges(tx: neo4j.ManagedTransaction, edge: EdgeType, source: str, target: str, part: pl.DataFrame) -> None:
    properties = ", ".join(f"`{name}`: ${name}[i]" for name in edge.properties if name in part.columns)
    text = f"{_ends_text(source, target)} CREATE (a)-[e:{edge.name} {{{properties}}}]->(b)"
    for slice in part.iter_slices(ROWS_PER_STATEMENT):
        _consume(tx, text, _edge_parameters(slice))


def _merge_edges(tx: neo4j.ManagedTransaction, edge: EdgeType, source: str, target: str, part: pl.DataFrame) -> None:
    """Set the properties of the edges that are there and create the others; one such transaction at a time, by a lock on the version."""
    _consume(tx, "MATCH (m:Meta {key: $key}) SET m.value = m.value", {"key": VERSION_KEY})
    identity = " AND ".join(f"[e.`{name}`] = [${name}[i]]" for name in edge.identity)
    sets = ", ".join(f"e.`{name}` = ${name}[i]" for name in edge.columns if name in part.columns)
    text = (
        f"{_ends_text(source, target)} MATCH (a)-[e:{edge.name}]->(b)"
        + (f" WHERE {identity}" if identity else "") + (f" SET {sets}" if sets else "") + " RETURN collect(i)"
    )
    for slice in part.iter_slices(ROWS_PER_STATEMENT):
        found = _run(tx, text, _edge_parameters(slice)).single(strict=True)[0]
        new = slice.filter(~pl.int_range(pl.len()).is_in(found))
        if new.height:
            _create_edges(tx, edge, source, target, new)


def _commit(tx: neo4j.ManagedTransaction, commit: SequenceCommit) -> bool:
    ends = {"run": commit.run, "sequence": commit.sequence}
    text = "OPTIONAL MATCH (r:Run {key: $run}) OPTIONAL MATCH (s:Sequence {key: $sequence}) RETURN r.key, s.key, EXISTS { (r)-[:ON_SEQUENCE]->(s) }"
    run, sequence, marked = _run(tx, text, ends).single(strict=True)
    if run is None or sequence is None:
        missing = [key for key, found in ((commit.run, run), (commit.sequence, sequence)) if found is None]
        raise UnknownEndpoint("ON_SEQUENCE", missing, len(missing))
    if marked:
        return False
    # The mark comes first and its key is unique on the server: another writer of the same sequence waits here, and then fails.
    text = "MATCH (r:Run {key: $run}) MATCH (s:Sequence {key: $sequence}) CREATE (r)-[m:ON_SEQUENCE]->(s) SET m = $mark"
    _run(tx, text, {**ends, "mark": commit.stored_mark()}).consume()
    edge = EDGES["ATTRIBUTES"]
    edges = commit.stored_edges().with_columns(run=pl.lit(commit.run), sequence=pl.lit(commit.sequence))
    for _, own in _by_ends(tx, edge, edges):
        _create_edges(tx, edge, "Feature", "Feature", own)
    return True


# Reading edges


@dataclass(frozen=True, slots=True)
class _Group:
    """Edges to be read at once: those out of the nodes `keys`; where one node has too many, those to the nodes `targets` alone."""

    keys: tuple[str, ...]
    targets: tuple[str, ...] | None = None


def _edge_parts(session: neo4j.Session, edge: EdgeType, source: str, target: str, only: EdgeFilter) -> Iterator[pl.DataFrame]:
    """Frames of the edges between two labels, about `EDGES_PER_RECORD` at a time, so that neither side holds all as records."""
    constant = [name for name, column in edge.identity.items() if column is STRING]
    varying = [name for name in edge.properties if name not in constant]
    values = only.properties(edge)
    groups: Iterable[_Group | None] = [None] if "sequence" in values else _groups(session, edge, source, target, only)
    for group in groups:
        parameters = values | ({} if group is None else {"keys": group.keys, "targets": group.targets})
        for nullable in (False, True):
            text = _columns_text(edge, (source, target), group, values, nullable)
            records = [record.data() for record in session.run(text, parameters)]
            # collect() leaves nulls out: all null gives an empty list, some null makes the columns disagree.
            if all(len(record[name]) in (0, len(record["b"])) for record in records for name in varying):
                break
        for record in records:
            part = _edge_frame(edge, record, () if group is None else group.keys, nullable)
            yield part.filter(only.within(pl.col("source"), pl.col("target")))


def _groups(session: neo4j.Session, edge: EdgeType, source: str, target: str, only: EdgeFilter) -> Iterator[_Group]:
    """The groups that hold every edge of the filter's ends.

    Two strings of a statement are compared in the order of UTF-16, those of an index in the order of code points: hence the hint,
    and no other comparison of keys in the database.
    """
    ranged = "" if only.sources is None else f"USING INDEX SEEK a:{source}(key) WHERE a.key >= $low AND a.key <= $high "
    bounds = {} if only.sources is None else {"low": only.sources.low, "high": only.sources.high}
    degrees = f"MATCH (a:{source}) {ranged}WITH a, COUNT {{ (a)-[:{edge.name}]->() }} AS n WHERE n > 0 RETURN a.key, n"
    targets = f"MATCH (:{source} {{key: $key}})-[e:{edge.name}]->(b:{target}) RETURN b.key, count(e)"
    counted = _rows(session, degrees, bounds)
    for keys in _filled(counted):
        yield _Group(keys)
    for hub, n in counted:
        if n > EDGES_PER_RECORD:
            wanted = [row for row in _rows(session, targets, {"key": hub}) if only.targets is None or row[0] in only.targets]
            for part in _filled(wanted, keep_large=True):
                yield _Group((hub,), part)


def _filled(counted: Sequence[Sequence[Any]], keep_large: bool = False) -> Iterator[tuple[str, ...]]:
    """Consecutive keys whose numbers of edges sum up to at most `EDGES_PER_RECORD`; a key with more stands alone, or is left out."""
    keys: list[str] = []
    total = 0
    for key, n in counted:
        if n > EDGES_PER_RECORD and not keep_large:
            continue
        if keys and total + n > EDGES_PER_RECORD:
            yield tuple(keys)
            keys, total = [], 0
        keys.append(key)
        total += n
    if keys:
        yield tuple(keys)


def _columns_text(edge: EdgeType, ends: tuple[str, str], group: _Group | None, values: Iterable[str], nullable: bool) -> str:
    """The statement that reads a group's edges, or (without a group) those of one sequence by its index, one record a source then."""
    returned = ["collect(i) AS a" if group else "a.key AS a", "collect(b.key) AS b"]
    for name, column in edge.properties.items():
        value = f"e.`{name}`"
        if name in edge.identity and column is STRING:
            returned.append(f"{value} AS `{name}`")  # a grouping key: sent once per record
        else:
            returned.append(f"collect({f'[{value}]' if nullable else value}) AS `{name}`")
    if group:
        matched = f"UNWIND range(0, size($keys) - 1) AS i MATCH (a:{ends[0]} {{key: $keys[i]}})-[e:{edge.name}]->(b:{ends[1]})"
        hint = f"USING INDEX SEEK a:{ends[0]}(key)"
        conditions = [f"[e.`{name}`] = [${name}]" for name in values] + (["b.key IN $targets"] if group.targets is not None else [])
    else:
        matched, hint = f"MATCH (a:{ends[0]})-[e:{edge.name}]->(b:{ends[1]})", f"USING INDEX e:{edge.name}(sequence)"
        conditions = ["e.sequence = $sequence", *(f"[e.`{name}`] = [${name}]" for name in values if name != "sequence")]
    return f"{matched} {hint} " + (f"WHERE {' AND '.join(conditions)} " if conditions else "") + f"RETURN {', '.join(returned)}"


def _edge_frame(edge: EdgeType, record: Mapping[str, Any], keys: Sequence[str], nullable: bool) -> pl.DataFrame:
    n, source = len(record["b"]), record["a"]
    sources = pl.Series(keys, dtype=pl.String).gather(source) if isinstance(source, list) else pl.repeat(source, n, dtype=pl.String, eager=True)
    columns = {"source": sources, "target": pl.Series(record["b"], dtype=pl.String)}
    for name, column in edge.properties.items():
        values = record[name]
        if not isinstance(values, list):
            columns[name] = pl.repeat(values, n, dtype=column.dtype, eager=True)
        elif n and not values:
            columns[name] = pl.repeat(None, n, dtype=column.dtype, eager=True)
        else:
            columns[name] = pl.Series([value for (value,) in values] if nullable else values, dtype=column.dtype)
    return pl.DataFrame(columns)


# Results


def _plain(value: Any, keys: Mapping[str, Any]) -> Any:
    """A driver's value as plain values; see `store.rendered_node` for the shape of what is a graph's."""
    if isinstance(value, Node):
        # a node may have further labels, as those that the Browser's colours go by
        label = min(value.labels, key=lambda name: (name not in NODES, name), default="")
        return rendered_node(label, {name: _plain(item, keys) for name, item in value.items()})
    if isinstance(value, Relationship):
        # The driver orients a relationship as it is stored.
        ends = [None if node is None else keys.get(node.element_id) for node in (value.start_node, value.end_node)]
        return rendered_relationship(value.type, {name: _plain(item, keys) for name, item in value.items()}, *ends)
    if isinstance(value, Path):
        return {"nodes": [_plain(node, keys) for node in value.nodes], "relationships": [_plain(rel, keys) for rel in value.relationships]}
    if isinstance(value, (list, tuple)):
        return [_plain(item, keys) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item, keys) for name, item in value.items()}
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
