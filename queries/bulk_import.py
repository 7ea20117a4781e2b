"""The first load of a large graph into Neo4j, by its own offline importer, which writes no transactions.

1. `export_import_files` reads a graph store in blocks, `write_import_files` takes frames, and `import_sink.py` writes while a run is
   measured: gzipped CSV files in parts, one header file a kind of node or edge, and `import.args`, the importer's arguments. The folder
   can be moved and used on any Neo4j 5, also by hand: `cd FOLDER && neo4j-admin database import full neo4j @import.args`.
2. `bulk_import` loads such a folder into the local server of `neo4j_server.py`, whose database must be empty: the importer
   writes the store's files itself, with the server stopped, in place of those that were there. `require_empty` is therefore
   asked before, and a database with any node is refused.
3. `import_loading.py` adds such a folder to any graph, embedded or on a server.

Text is quoted always, numbers never; a null is an empty field, an empty text is `""`. Gzip at its fastest takes no longer than plain
text and a seventh of its room (a million edges: 264 MB of text, 39 MB so, 16 MB as Parquet, which Neo4j reads with four more jars only).
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from ..errors import UserError
from ..files import write_text
from .neo4j_server import AdminFailed, ServerInfo, ServerOptions, down, run_admin, status, up
from .schema import EDGES, NODES, SCHEMA_VERSION, VERSION_KEY, ColumnType, EdgeType, edge_frame, node_frame
from .store import GraphStore, ServerCredentials, UnknownEndpoint, open_graph
from .streaming import EDGES_PER_BLOCK, edge_blocks

ARGUMENTS = "import.args"
UNFINISHED = "import.args.before"
"""What the arguments are called while a run adds to the folder."""

DATABASE = "neo4j"
ROWS_PER_FILE = 1_000_000
CSV_TYPES = {ColumnType.STRING: "string", ColumnType.INT64: "long", ColumnType.DOUBLE: "double", ColumnType.BOOL: "boolean"}
_KINDS = {"nodes": "--nodes", "edges": "--relationships"}
_MULTILINE = "--multiline-fields=true"


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


@dataclass
class ImportFolder:
    """Import files in the making: rows in parts as they come, the importer's arguments at the end (`finish`)."""

    folder: Path
    rows_per_file: int = ROWS_PER_FILE
    multiline: bool = False
    n_nodes: int = 0
    n_edges: int = 0
    _parts: dict[str, list[str]] = field(default_factory=dict)  # the importer's option and its header file -> its parts

    def add_nodes(self, label: str, rows: pl.DataFrame) -> None:
        """Write nodes, as `schema.node_frame` gives them."""
        columns = NODES[label].columns
        names = [name for name in rows.columns if name != "key"]
        header = (f"key:ID({label})", *(f"{name}:{CSV_TYPES[columns[name]]}" for name in names))
        self._add("nodes", label, f"nodes-{label}", header, rows.select("key", *names))
        self.n_nodes += rows.height

    def add_edges(self, type: str, ends: tuple[str, str], rows: pl.DataFrame) -> None:
        """Write edges between nodes of these two labels, as `schema.edge_frame` gives them."""
        names = [name for name in rows.columns if name not in ("source", "target")]
        self._add("edges", type, edge_stem(type, ends), edge_header(type, ends, names), rows.select("source", "target", *names))
        self.n_edges += rows.height

    def add_parts(self, type: str, ends: tuple[str, str], parts: Iterable[str], n_edges: int, *, multiline: bool = False) -> None:
        """Name parts with all columns of a type that are there already; such parts have one header."""
        header = edge_header(type, ends, list(EDGES[type].properties))
        self._named("edges", type, edge_stem(type, ends), header).extend(parts)
        self.n_edges += n_edges
        self.multiline |= multiline

    def finish(self) -> ImportFiles:
        """Write the arguments: from now on the folder can be loaded."""
        lines = ["--id-type=string", *(f"{named},{','.join(parts)}" for named, parts in self._parts.items() if parts)]
        lines += [_MULTILINE] if self.multiline else []
        write_text(self.folder / ARGUMENTS, "\n".join(lines) + "\n")
        return ImportFiles(self.folder, self.n_nodes, self.n_edges)

    def _named(self, kind: str, name: str, stem: str, header: tuple[str, ...]) -> list[str]:
        """The list of the parts under one header, which is written when it is first asked for."""
        file = f"{stem}-header.csv"
        option = f"{_KINDS[kind]}={name}={file}"
        if option not in self._parts:
            (self.folder / file).write_text(",".join(header) + "\n")
        return self._parts.setdefault(option, [])

    def _add(self, kind: str, name: str, stem: str, header: tuple[str, ...], rows: pl.DataFrame) -> None:
        if rows.is_empty():
            return
        parts = self._named(kind, name, stem, header)
        for part in rows.iter_slices(self.rows_per_file):
            parts.append(f"{stem}-{len(parts):04}.csv.gz")
            write_part(part, self.folder / parts[-1])
        self.multiline |= has_line_breaks(rows)


def edge_stem(type: str, ends: tuple[str, str]) -> str:
    """How the names of the files of edges between these labels begin."""
    return f"edges-{type}-{'-'.join(ends)}"


def edge_header(type: str, ends: tuple[str, str], names: Iterable[str]) -> tuple[str, ...]:
    """The importer's header of edges with these properties."""
    columns = EDGES[type].properties
    return (f":START_ID({ends[0]})", f":END_ID({ends[1]})", *(f"{name}:{CSV_TYPES[columns[name]]}" for name in names))


def write_part(rows: pl.DataFrame, path: Path) -> None:
    """Write rows as the importer reads them, without a header."""
    rows = rows.with_columns(_java_text(rows, name) for name in rows.columns if rows[name].dtype == pl.Float64)
    rows.write_csv(path, include_header=False, quote_style="non_numeric", compression="gzip", compression_level=1, check_extension=False)


def read_part(path: Path, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """The rows of a part, gzipped or not, whose columns are these; exactly as they were written."""
    # a path is no pattern: one with a bracket in it would be read as empty
    return pl.read_csv(path, has_header=False, schema=dict(schema), quote_char='"', infer_schema=False, encoding="utf8", glob=False)


def export_import_files(
    store: GraphStore, folder: Path, *, rows_per_file: int = ROWS_PER_FILE, edges_per_block: int = EDGES_PER_BLOCK
) -> ImportFiles:
    """Write the whole graph of `store` as import files into `folder`, which is made and must be empty.

    Edges are read in blocks: what is held at once is a block of them and the nodes.
    """
    nodes = dict(_read_nodes(store))
    return write_import_files(nodes, {type: _read_blocks(store, type, edges_per_block) for type in EDGES}, folder, rows_per_file=rows_per_file)


def _read_nodes(store: GraphStore) -> Iterator[tuple[str, pl.DataFrame]]:
    for label in NODES.values():
        columns = ", ".join(f"n.`{name}` AS `{name}`" for name in label.all_columns)
        rows = store.query(f"MATCH (n:{label.name}) RETURN {columns}")
        yield label.name, rows.cast({name: column.dtype for name, column in label.all_columns.items()})


def _read_blocks(store: GraphStore, type: str, size: int) -> Iterator[pl.DataFrame]:
    return (rows for (rows,) in edge_blocks(type, store, size=size))


def write_import_files(
    nodes: Mapping[str, pl.DataFrame],
    edges: Mapping[str, pl.DataFrame | Iterator[pl.DataFrame]],
    folder: Path,
    *,
    rows_per_file: int = ROWS_PER_FILE,
) -> ImportFiles:
    """Write frames by label and by edge type (columns as for `merge_nodes` and `merge_edges`) as import files into `folder`.

    A type's edges may come in several frames. The schema's version is added where `nodes` has none. Raises `schema.RowsRejected` for a
    frame that does not fit, `store.UnknownEndpoint` for an edge whose ends are not among `nodes`, FolderNotEmpty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FolderNotEmpty(f"{folder} is not empty: name a new folder for the import files")
    version = pl.DataFrame({"key": [VERSION_KEY], "value": [str(SCHEMA_VERSION)]})
    checked = {label: node_frame(label, rows) for label, rows in {"Meta": version, **nodes}.items()}
    if checked["Meta"].is_empty():
        checked["Meta"] = version
    made = ImportFolder(folder, rows_per_file)
    for label, rows in checked.items():
        made.add_nodes(label, rows)
    keys = {label: rows.select("key") for label, rows in checked.items() if rows.height}
    for type, frames in edges.items():
        for frame in [frames] if isinstance(frames, pl.DataFrame) else frames:
            for ends, rows in by_ends(EDGES[type], edge_frame(type, frame), keys):
                made.add_edges(type, ends, rows)
    return made.finish()


def bulk_import(folder: Path, home: Path, options: ServerOptions | None = None) -> ServerInfo:
    """Load the import files of `folder` into the empty database of the local server of `home`; returns the server, running.

    Constraints and indexes are made after the load. Raises DatabaseNotEmpty (nothing is changed), NoImportFiles,
    `neo4j_server.AdminFailed` with the importer's own words (the database is left empty), and what `up` raises.
    """
    require_files(folder)
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


@dataclass(frozen=True)
class PartsOf:
    """One header and its parts: kind (nodes or edges), label or type, the columns as `merge_nodes` and `merge_edges` take them."""

    kind: str
    name: str
    schema: Mapping[str, pl.DataType]
    parts: tuple[str, ...]

    def read(self, folder: Path, part: str) -> pl.DataFrame:
        """The rows of one of the parts, with all columns of the label or type; those that the files lack are null."""
        rows = read_part(folder / part, self.schema)
        columns = (NODES[self.name] if self.kind == "nodes" else EDGES[self.name]).all_columns
        return rows.select(pl.col(n) if n in rows.columns else pl.lit(None, column.dtype).alias(n) for n, column in columns.items())


def parts_of(folder: Path) -> list[PartsOf]:
    """What a folder's arguments name, in their order."""
    found = []
    kinds = {option: kind for kind, option in _KINDS.items()}
    for line in (folder / ARGUMENTS).read_text(encoding="utf-8").splitlines():
        option, _, rest = line.partition("=")
        name, _, files = rest.partition("=")
        if option not in kinds:
            continue
        header, *parts = files.split(",")
        columns = [column.partition(":")[0] for column in (folder / header).read_text(encoding="utf-8").strip().split(",")]
        if kinds[option] == "edges":
            columns[:2] = ["source", "target"]
        known = (NODES[name] if kinds[option] == "nodes" else EDGES[name]).all_columns
        found.append(PartsOf(kinds[option], name, {column: known[column].dtype for column in columns}, tuple(parts)))
    return found


def require_files(folder: Path) -> None:
    """Raise NoImportFiles where `folder` has none, or is not finished."""
    if (folder / ARGUMENTS).is_file():
        return
    if (folder / UNFINISHED).is_file() or (folder / "marks").is_dir():
        raise NoImportFiles(f"{folder} is not finished: a run is being measured into it, or was stopped; give the same `ingest edges` again")
    raise NoImportFiles(f"{folder} has no {ARGUMENTS}: write import files there first (`featlas export FOLDER`, `ingest edges --import-files`)")


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


def by_ends(edge: EdgeType, rows: pl.DataFrame, keys: Mapping[str, pl.DataFrame]) -> Iterator[tuple[tuple[str, str], pl.DataFrame]]:
    """The rows for each pair of labels that the type may join (`keys`: column `key` by label). Raises `UnknownEndpoint` for one of none."""
    unplaced = rows
    for source, target in edge.ends:
        if not {source, target} <= keys.keys() or unplaced.is_empty():
            continue
        ends = rows.join(keys[source], left_on="source", right_on="key", how="semi", maintain_order="left")
        ends = ends.join(keys[target], left_on="target", right_on="key", how="semi", maintain_order="left")
        if ends.height < rows.height or len(edge.ends) > 1:
            unplaced = unplaced.join(ends, on=["source", "target"], how="anti")
        else:
            unplaced = rows.clear()
        yield (source, target), ends
    if unplaced.height:
        raise UnknownEndpoint(edge.name, _missing_keys(edge.name, unplaced, keys), unplaced.height)


def _missing_keys(type: str, unplaced: pl.DataFrame, keys: Mapping[str, pl.DataFrame]) -> list[str]:
    """The ends of edges that no node has, in order."""
    labels = {label for ends in EDGES[type].ends for label in ends if label in keys}
    known = {key for label in labels for key in keys[label]["key"]}
    ends = pl.concat([unplaced["source"], unplaced["target"]]).unique().sort()
    return [key for key in ends if key not in known]


def _java_text(rows: pl.DataFrame, name: str) -> pl.Expr:
    """The column as it is, or, where it holds an infinity, as text: Java spells that `Infinity`."""
    column = pl.col(name)
    if not rows[name].is_infinite().any():
        return column
    return pl.when(column.is_infinite()).then(pl.when(column > 0).then(pl.lit("Infinity")).otherwise(pl.lit("-Infinity"))).otherwise(
        column.cast(pl.String)
    ).alias(name)


def has_line_breaks(rows: pl.DataFrame) -> bool:
    """Whether a text spans lines, which the importer must be told of."""
    texts = [name for name in rows.columns if rows[name].dtype == pl.String]
    return any(rows[name].str.contains_any(["\n", "\r"]).any() for name in texts)
