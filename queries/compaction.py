"""Files of an atlas made as small as what they hold: neither embedded database gives space back when something is deleted.

1. The database is held open for writing, so that nobody changes it meanwhile.
2. Everything is written into a new file beside it (the graph by way of parquet files, table by table, outside of Python's memory).
3. The new file is read back: every table is counted and hashed on both sides. Only where all are equal does it take the old one's place, by one
   rename. A process that is killed before that has changed nothing, one that is killed after it is done; what it leaves behind goes at the next time.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ..errors import FeatlasError
from ..files import is_alive
from .belongings import tables_of
from .embedded import LadybugStore, _connection, _run
from .foreign import foreign_parts
from .schema import EDGES, NODES
from .statistics import FILE_NAME, StatisticsStore
from .store import GraphStore, StoreBusy
from .streaming import added_hashes, content_hash, edge_blocks, node_blocks

WORK = ".compacting"
"""The folder beside the files in which a new one is made."""


class CompactionDiffers(FeatlasError):
    """The new file is not, or would not be, what the old one is; the old one stays."""


@dataclass(frozen=True)
class Compacted:
    """A file and its size before and after, in bytes."""

    file: Path
    before: int
    after: int


def size_of(path: Path) -> int:
    """The size of a file with its log, or of a folder, in bytes; 0 where there is none."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in (path, path.with_name(path.name + ".wal")) if file.exists())


def compact_graph(file: Path) -> Compacted:
    """Make an embedded graph's file as small as what it holds. Raises `StoreBusy` where it is open elsewhere, `CompactionDiffers`."""
    file = file.resolve()
    before, work = size_of(file), _work(file)
    try:
        with LadybugStore(file) as old:
            _refuse_foreign(old, file)
            new = work / file.name
            _export(old, work)
            with LadybugStore(new) as made:
                _load(made, work)
            with LadybugStore(new) as made:
                different = _differing_types(old, made)
            if different:
                raise CompactionDiffers(f"{file} was not compacted: in the new file {', '.join(different)} were not the same; the old one stays")
            _checkpoint(old, file)
            _put_in_place(new, file)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Compacted(file, before, size_of(file))


def _work(file: Path) -> Path:
    """A new folder beside the file; that of a process that was killed is removed (whoever is at it now holds the database)."""
    work = file.parent / f"{WORK}-{file.stem}-{os.getpid()}"
    for left in file.parent.glob(f"{WORK}-{file.stem}-*"):
        if not is_alive(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    work.mkdir(mode=0o700)  # the files in it are as private as the database is
    return work


def _tables() -> Iterator[tuple[str, str, str, str]]:
    """Each table (an edge type once for each pair of labels): its name, what to read, its parquet file, what to say when loading."""
    for label in NODES.values():
        if label.name != "Meta":
            columns = ", ".join(f"n.`{name}`" for name in label.all_columns)
            yield label.name, f"MATCH (n:{label.name}) RETURN {columns}", label.name, ""
    for edge in EDGES.values():
        columns = ", ".join(["a.key", "b.key", *(f"e.`{name}`" for name in edge.properties)])
        for source, target in edge.ends:
            ends = f" (from='{source}', to='{target}')" if len(edge.ends) > 1 else ""
            yield edge.name, f"MATCH (a:{source})-[e:{edge.name}]->(b:{target}) RETURN {columns}", f"{edge.name}-{source}-{target}", ends


def _export(store: LadybugStore, folder: Path) -> None:
    with _connection(store._opened().database) as connection:
        for _, text, name, _ in _tables():
            _run(connection, f"COPY ({text}) TO '{_quoted(folder / name)}.parquet'")


def _load(store: LadybugStore, folder: Path) -> None:
    """COPY is safe here: the file is used only after it was closed, with all in it, and read back."""
    with _connection(store._opened().database) as connection:
        for table, _, name, ends in _tables():
            _run(connection, f"COPY {table} FROM '{_quoted(folder / name)}.parquet'{ends}")
            (folder / f"{name}.parquet").unlink()


def _refuse_foreign(store: LadybugStore, file: Path) -> None:
    """Raise `CompactionDiffers` where a graph has more than the schema: what its user made would not be in the new file."""
    if foreign := foreign_parts(store):
        raise CompactionDiffers(
            f"{file} was not compacted: it has tables or properties that are no atlas' own and would be lost: {', '.join(foreign[:5])}. Drop them "
            "(DROP TABLE, ALTER TABLE … DROP), or leave the file as large as it is (--no-compact)"
        )


def _quoted(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace("'", "\\'")


def _differing_types(first: GraphStore, second: GraphStore) -> list[str]:
    """The labels and types of which two graphs do not have the same rows."""
    different = []
    for names, blocks in ((NODES, node_blocks), (EDGES, edge_blocks)):
        for name in names:
            hashes = [(0, (0, 0)), (0, (0, 0))]
            for block in blocks(name, first, second):
                hashes = [(n + rows.height, added_hashes(total, content_hash(rows))) for (n, total), rows in zip(hashes, block, strict=True)]
            if hashes[0] != hashes[1]:
                different.append(name)
    return different


def _checkpoint(store: LadybugStore, file: Path) -> None:
    """Bring what is in the log into the file: a log that stayed would be replayed over the new one."""
    with _connection(store._opened().database) as connection:
        _run(connection, "CHECKPOINT")
    log = file.with_name(file.name + ".wal")
    if log.exists() and log.stat().st_size:
        raise StoreBusy(f"{file} has a log that is in use: close whatever reads it, and repeat the command")


def _put_in_place(new: Path, old: Path) -> None:
    """Make a file that is whole take another's place, on the disk too; whose it is and who may read it stays."""
    was = old.stat()
    with suppress(PermissionError):  # another's file of one's group: it becomes one's own
        os.chown(new, was.st_uid, was.st_gid)
    new.chmod(stat.S_IMODE(was.st_mode))
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(old)
    folder = os.open(old.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def compact_statistics(folder: Path) -> Compacted:
    """Make the statistics' file as small as what it holds. Raises `StatisticsStoreHeld` where it is open elsewhere, `CompactionDiffers`."""
    file = (folder / FILE_NAME).resolve()
    before, work = size_of(file), _work(file)
    try:
        with StatisticsStore(file, beside=[work / FILE_NAME]) as store:
            name = _quoted_sql(work / FILE_NAME)
            own = store.query("SELECT current_database() AS name")["name"][0]
            store._run(f"ATTACH '{name}' AS compacted")
            store._run(f'COPY FROM DATABASE "{own}" TO compacted')
            different = _differing_tables(store)
            store._run("DETACH compacted")
            if different:
                raise CompactionDiffers(f"{file} was not compacted: in the new file {', '.join(different)} were not the same; the old one stays")
            store._run("CHECKPOINT")
            _put_in_place(work / FILE_NAME, file)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Compacted(file, before, size_of(file))


def _quoted_sql(path: Path) -> str:
    return str(path).replace("'", "''")


def _differing_tables(store: StatisticsStore) -> list[str]:
    """The tables of which a store and its copy `compacted` do not have the same rows."""
    own, made = tables_of(store), tables_of(store, "compacted")
    different = sorted(set(own) ^ set(made))
    for table, columns in own.items():
        values = ", ".join(f'"{name}"' for name in columns)
        total = f'SELECT count(*) AS n, coalesce(sum(hash({values})::HUGEINT), 0)::VARCHAR AS content FROM {{0}}."{table}"'
        first, second = (store.query(total.format(database)).row(0) for database in ("main", "compacted"))
        if first != second:
            different.append(table)
    return different


def summary(compacted: list[Compacted]) -> pl.DataFrame:
    """The files with their sizes before and after: `file, before, after`."""
    return pl.DataFrame([{"file": str(one.file), "before": one.before, "after": one.after} for one in compacted])
