"""The first load of a large graph into Neo4j, by its own offline importer, which writes no transactions.

1. `export_import_files` reads a graph store, or `write_import_files` takes frames: CSV files in parts, one header file a kind
   of node or edge, and `import.args`, the importer's arguments. The folder can be moved and used on any Neo4j 5, also by hand:
   `cd FOLDER && neo4j-admin database import full neo4j @import.args`.
2. `bulk_import` loads such a folder into the local server of `neo4j_server.py`, whose database must be empty: the importer
   writes the store's files itself, with the server stopped, in place of those that were there. `require_empty` is therefore
   asked before, and a database with any node is refused.

Text is quoted always, numbers never; a null is an empty field, an empty text is `""`.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ..errors import UserError
from .neo4j_server import AdminFailed, ServerInfo, ServerOptions, down, run_admin, status, up
from .schema import EDGES, NODES, SCHEMA_VERSION, VERSION_KEY, ColumnType, edge_frame, node_frame
from .store import GraphStore, ServerCredentials, UnknownEndpoint, open_graph

ARGUMENTS = "import.args"
DATABASE = "neo4j"
ROWS_PER_FILE = 1_000_000
CSV_TYPES = {ColumnType.STRING: "string", ColumnType.INT64: "long", ColumnType.DOUBLE: "double", ColumnType.BOOL: "boolean"}


class DatabaseNotEmpty(UserError):
    """The importer would delete what the database holds."""


class NoImportFiles(UserError):
    """The folder holds no import files."""


class FolderNotEmpty(UserError):
    """Import files go into a folder of their own: parts of an earlier export would be mixed with the new ones."""


@dataclass(frozen=True)
class ImportFiles:
    """A folder of import files and how many nodes and edges they hold."""

    folder: Path
    n_nodes: int
    n_edges: int


@dataclass(frozen=True)
class _Group:
    """Rows of one kind, with the importer's name for them and the header of their columns."""

    option: str
    stem: str
    header: tuple[str, ...]
    rows: pl.DataFrame


def export_import_files(store: GraphStore, folder: Path, *, rows_per_file: int = ROWS_PER_FILE) -> ImportFiles:
    """Write the whole graph of `store` as import files into `folder`, which is made and must be empty."""
    nodes, edges = (dict(frames) for frames in read_whole_graph(store))
    return write_import_files(nodes, edges, folder, rows_per_file=rows_per_file)


def read_whole_graph(store: GraphStore) -> tuple[Iterator[tuple[str, pl.DataFrame]], Iterator[tuple[str, pl.DataFrame]]]:
    """Every node label's and every edge type's rows by name, read one after the other as they are asked for."""

    def nodes() -> Iterator[tuple[str, pl.DataFrame]]:
        for label in NODES.values():
            columns = ", ".join(f"n.`{name}` AS `{name}`" for name in label.all_columns)
            rows = store.query(f"MATCH (n:{label.name}) RETURN {columns}")
            yield label.name, rows.cast({name: column.dtype for name, column in label.all_columns.items()})

    return nodes(), ((name, store.read_edges(name)) for name in EDGES)


def write_import_files(
    nodes: Mapping[str, pl.DataFrame], edges: Mapping[str, pl.DataFrame], folder: Path, *, rows_per_file: int = ROWS_PER_FILE
) -> ImportFiles:
    """Write frames by label and by edge type (columns as for `merge_nodes` and `merge_edges`) as import files into `folder`.

    The schema's version is added where `nodes` has none. Raises `schema.RowsRejected` for a frame that does not fit,
    `store.UnknownEndpoint` for an edge whose ends are not among `nodes`, FolderNotEmpty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FolderNotEmpty(f"{folder} is not empty: name a new folder for the import files")
    version = pl.DataFrame({"key": [VERSION_KEY], "value": [str(SCHEMA_VERSION)]})
    checked = {label: node_frame(label, rows) for label, rows in {"Meta": version, **nodes}.items()}
    if checked["Meta"].is_empty():
        checked["Meta"] = version
    groups = [_node_group(label, rows) for label, rows in checked.items()]
    keys = {label: rows.select("key") for label, rows in checked.items()}
    for type, rows in edges.items():
        groups += _edge_groups(type, edge_frame(type, rows), keys)
    groups = [group for group in groups if group.rows.height]
    arguments = [_write_group(group, folder, rows_per_file) for group in groups]
    if any(_has_line_breaks(group.rows) for group in groups):
        arguments.append("--multiline-fields=true")
    (folder / ARGUMENTS).write_text("\n".join(["--id-type=string", *arguments]) + "\n")
    n_nodes, n_edges = (sum(group.rows.height for group in groups if group.option.startswith(kind)) for kind in ("--nodes", "--relationships"))
    return ImportFiles(folder, n_nodes, n_edges)


def bulk_import(folder: Path, home: Path, options: ServerOptions | None = None) -> ServerInfo:
    """Load the import files of `folder` into the empty database of the local server of `home`; returns the server, running.

    Constraints and indexes are made after the load. Raises DatabaseNotEmpty (nothing is changed), NoImportFiles,
    `neo4j_server.AdminFailed` with the importer's own words (the database is left empty), and what `up` raises.
    """
    if not (folder / ARGUMENTS).is_file():
        raise NoImportFiles(f"{folder} has no {ARGUMENTS}: write import files there first (`featlas export FOLDER`)")
    require_empty(home, options)
    down(home)
    # Verified empty, the old files may go; a failed import leaves unusable ones, which would keep the server from starting.
    _delete_database_files(home)
    try:
        report = home.absolute() / "logs" / "import.report"
        run_admin(home, "database", "import", "full", DATABASE, "--verbose", f"--report-file={report}", f"@{ARGUMENTS}", folder=folder)
    except AdminFailed:
        _delete_database_files(home)
        raise
    info = up(home, options)
    _create_constraints(info)
    return info


def require_empty(home: Path, options: ServerOptions | None = None) -> None:
    """Raise DatabaseNotEmpty when the database of `home` holds a node other than the schema's version; starts the server to look."""
    if not (home / "data" / "databases" / DATABASE).exists():
        return
    info = status(home) or up(home, options)
    with _opened(info) as store:
        n_nodes = store.query("MATCH (n) WHERE NOT n:Meta RETURN count(n) AS n")["n"].item()
    if n_nodes:
        raise DatabaseNotEmpty(
            f"the Neo4j of {home} holds {n_nodes} nodes and bulk loading would delete them: "
            "empty it first, or name another --home, or ingest in the usual way, which adds to it"
        )


def _delete_database_files(home: Path) -> None:
    """Forget the one user database of a stopped server; its users and their passwords live in another."""
    for part in ("databases", "transactions"):
        folder = home / "data" / part / DATABASE
        if folder.exists():
            shutil.rmtree(folder)


def _create_constraints(info: ServerInfo) -> None:
    """The importer cannot make constraints and indexes, and a store makes them only in a database without the schema's version."""
    from .server import _schema_statements

    with _opened(info) as store:
        for statement in _schema_statements():
            store.query(statement, write=True)
        store.query("CALL db.awaitIndexes(600)", write=True)


def _opened(info: ServerInfo) -> GraphStore:
    return open_graph(info.uri, credentials=ServerCredentials(info.username, info.password, DATABASE))


def _node_group(label: str, rows: pl.DataFrame) -> _Group:
    columns = NODES[label].columns
    names = [name for name in rows.columns if name != "key"]
    header = (f"key:ID({label})", *(f"{name}:{CSV_TYPES[columns[name]]}" for name in names))
    return _Group(f"--nodes={label}", f"nodes-{label}", header, rows.select("key", *names))


def _edge_groups(type: str, rows: pl.DataFrame, keys: Mapping[str, pl.DataFrame]) -> Iterator[_Group]:
    """One group for each pair of labels that the type may join; every row must belong to one of them."""
    columns = EDGES[type].properties
    names = [name for name in rows.columns if name not in ("source", "target")]
    unplaced = rows
    for source, target in EDGES[type].ends:
        if not {source, target} <= keys.keys():
            continue
        ends = rows.join(keys[source], left_on="source", right_on="key", how="semi").join(keys[target], left_on="target", right_on="key", how="semi")
        unplaced = unplaced.join(ends, on=["source", "target"], how="anti")
        header = (f":START_ID({source})", f":END_ID({target})", *(f"{name}:{CSV_TYPES[columns[name]]}" for name in names))
        yield _Group(f"--relationships={type}", f"edges-{type}-{source}-{target}", header, ends.select("source", "target", *names))
    if unplaced.height:
        raise UnknownEndpoint(type, _missing_keys(type, unplaced, keys), unplaced.height)


def _missing_keys(type: str, unplaced: pl.DataFrame, keys: Mapping[str, pl.DataFrame]) -> list[str]:
    """The ends of edges that no node has, in order."""
    labels = {label for ends in EDGES[type].ends for label in ends if label in keys}
    known = {key for label in labels for key in keys[label]["key"]}
    ends = pl.concat([unplaced["source"], unplaced["target"]]).unique().sort()
    return [key for key in ends if key not in known]


def _write_group(group: _Group, folder: Path, rows_per_file: int) -> str:
    """Write the header and the parts of a group; returns the importer's argument that names them."""
    names = [f"{group.stem}-header.csv"]
    (folder / names[0]).write_text(",".join(group.header) + "\n")
    rows = group.rows.with_columns(_java_text(group.rows, name) for name in group.rows.columns if group.rows[name].dtype == pl.Float64)
    for number, part in enumerate(rows.iter_slices(rows_per_file)):
        names.append(f"{group.stem}-{number:04}.csv")
        part.write_csv(folder / names[-1], include_header=False, quote_style="non_numeric")
    return f"{group.option}={','.join(names)}"


def _java_text(rows: pl.DataFrame, name: str) -> pl.Expr:
    """The column as it is, or, where it holds an infinity, as text: Java spells that `Infinity`."""
    column = pl.col(name)
    if not rows[name].is_infinite().any():
        return column
    return pl.when(column.is_infinite()).then(pl.when(column > 0).then(pl.lit("Infinity")).otherwise(pl.lit("-Infinity"))).otherwise(
        column.cast(pl.String)
    ).alias(name)


def _has_line_breaks(rows: pl.DataFrame) -> bool:
    texts = [name for name in rows.columns if rows[name].dtype == pl.String]
    return any(rows[name].str.contains_any(["\n", "\r"]).any() for name in texts)
