"""Statistics brought from one store into another, in one transaction: a copy that is killed has changed nothing, and is begun again.

Rows go in units (`belongings`): a statistics run with all of its tables, a parcellation, a matching, a comparison, one label, one measured value. A
unit that the target has as it is stays; one that it has otherwise is a clash; one that it lacks goes in. What a table of a unit has more (a test of
correlations that was made in one of the two) is filled in.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from .belongings import TIMES, UNCOPIED, Belonging, Owner, belonging, tables_of
from .copying import AtlasesClash, Clashes, CopyDiffers, TypeCopied
from .statistics import FILE_NAME, StatisticsStore

# a label and an index say nothing that a measurement would contradict
_NEVER_CLASH = (Owner.INDEX,)


@dataclass(frozen=True)
class _Table:
    """A table that both files have, with the columns to copy."""

    name: str
    columns: tuple[str, ...]
    belongs: Belonging

    @property
    def key(self) -> str:
        return ", ".join(f'"{name}"' for name in self.belongs.columns)

    @property
    def listed(self) -> str:
        return ", ".join(f'"{name}"' for name in self.columns)

    def counted(self, database: str, where: str) -> str:
        """A query of each unit's number of rows and a hash of them in which order does not count."""
        values = ", ".join(f'"{name}"' for name in self.columns if name not in TIMES)
        return f'SELECT {self.key}, count(*) AS n, sum(hash({values})::HUGEINT) AS content FROM {database}."{self.name}" WHERE {where} GROUP BY ALL'


@dataclass(frozen=True)
class Wanted:
    """What is taken of the statistics when not all is: what was measured of some runs of edges, some statistics runs, the labels of some features."""

    runs: Sequence[str]
    statistics_runs: Sequence[str] = ()
    features: pl.Series | None = None


def copy_statistics(source: Path, target: Path, *, wanted: Wanted | None = None, clashes: Clashes = Clashes.REFUSE) -> list[TypeCopied]:
    """Bring the statistics in the folder `source`, or what is `wanted` of them, into those in the folder `target`, which are made.

    Raises `AtlasesClash`, with nothing written, and `CopyDiffers`.
    """
    with StatisticsStore(source, read_only=True):
        pass  # brought up to this featlas' layout, if need be
    file = (source / FILE_NAME).resolve()
    with StatisticsStore(target, beside=[file]) as store, _attached(store, file) as name:
        copied = _Copying(store, name, clashes, wanted)
        with store.transaction():
            copied.refuse_or_choose()
            written = {table.name: copied.insert(table) for table in copied.tables}
        return [copied.verified(table, written[table.name]) for table in copied.tables]


@contextmanager
def _attached(store: StatisticsStore, file: Path) -> Iterator[str]:
    """Another file in the same connection, for reading, under a name of its own."""
    name = f"source_{uuid.uuid4().hex[:8]}"
    quoted = str(file).replace("'", "''")
    store._run(f"ATTACH '{quoted}' AS {name} (READ_ONLY)")
    try:
        yield name
    finally:
        store._run(f"DETACH {name}")


class _Copying:
    """The tables of two files and which of their units go."""

    def __init__(self, store: StatisticsStore, source: str, clashes: Clashes, only: Wanted | None) -> None:
        self.store, self.source, self.clashes, self.only = store, source, clashes, only
        own, other = tables_of(store), tables_of(store, source)
        self.tables = [
            _Table(name, tuple(column for column in columns if column in own[name]), belonging(name, columns))
            for name, columns in other.items() if name in own and name not in UNCOPIED
        ]  # fmt: skip
        # Which units stay as the target has them, by the kind of owner and what names its units.
        self.kept: dict[tuple[Owner, tuple[str, ...]], str] = {}

    def name_wanted(self) -> None:
        """Put what is wanted into temporary tables, by which the conditions of `wanted` ask."""
        if self.only is None:
            return
        features = pl.Series([], dtype=pl.String) if self.only.features is None else self.only.features
        for name, values in (("runs", self.only.runs), ("statistics_runs", self.only.statistics_runs), ("features", features)):
            self.store._run(f"CREATE OR REPLACE TEMP TABLE wanted_{name} (wanted VARCHAR)")
            self.store._insert(f"wanted_{name}", pl.DataFrame({"wanted": pl.Series(list(values), dtype=pl.String)}))

    def wanted(self, table: _Table) -> str:
        """The condition under which a row of the source goes."""
        if self.only is None:
            return "true"
        if table.belongs.owner is Owner.MEASURED and "run" in table.belongs.columns:
            return "run IN (SELECT wanted FROM wanted_runs)"
        if table.belongs.owner is Owner.LABEL:
            return "key IN (SELECT wanted FROM wanted_features)"
        if table.belongs.owner is Owner.RANKING:
            return f"ranking IN (SELECT ranking FROM {self.source}.rankings WHERE run IN (SELECT wanted FROM wanted_runs))"
        return "run IN (SELECT wanted FROM wanted_statistics_runs)" if table.belongs.owner is Owner.STATISTICS else "false"

    def refuse_or_choose(self) -> None:
        """Find the units that both files have, and differently; refuse them, remember them, or make room for the source's."""
        self.name_wanted()
        for table in self.tables:
            if table.belongs.owner in _NEVER_CLASH:
                continue
            using = f"({table.key})"
            differing = (
                f"SELECT {table.key} FROM ({table.counted(self.source, self.wanted(table))}) s JOIN ({table.counted('main', 'true')}) t USING {using}"
                " WHERE s.n <> t.n OR s.content <> t.content"
            )
            found = self.store.query(differing)
            if found.is_empty():
                continue
            if self.clashes is Clashes.REFUSE:
                raise AtlasesClash(f"{table.belongs.owner.value}s (table {table.name})", found.height, [str(row) for row in found.head(3).rows()])
            self._choose(table, found)

    def _choose(self, table: _Table, found: pl.DataFrame) -> None:
        """Remember the units that stay, or delete the target's rows of them in all tables of their owner."""
        unit = (table.belongs.owner, table.belongs.columns)
        name = self.kept.setdefault(unit, f"kept_{len(self.kept)}")
        self.store._run(f'CREATE TEMP TABLE IF NOT EXISTS {name} AS SELECT {table.key} FROM main."{table.name}" LIMIT 0')
        self.store._insert(f"{name}", found)
        if self.clashes is Clashes.REPLACE:
            for other in (one for one in self.tables if (one.belongs.owner, one.belongs.columns) == unit):
                self.store._run(f'DELETE FROM main."{other.name}" t WHERE EXISTS (SELECT 1 FROM {name} k WHERE {_same("t", "k", other)})')

    def _going(self, table: _Table) -> str:
        """The condition under which a row `s` of the source is to be in the target as it is."""
        unit = (table.belongs.owner, table.belongs.columns)
        if unit not in self.kept or self.clashes is Clashes.REPLACE:
            return self.wanted(table)
        return f"{self.wanted(table)} AND NOT EXISTS (SELECT 1 FROM {self.kept[unit]} k WHERE {_same('s', 'k', table)})"

    def insert(self, table: _Table) -> int:
        """Add the units that the target lacks; how many rows these are."""
        lacking = f'NOT EXISTS (SELECT 1 FROM main."{table.name}" t WHERE {_same("s", "t", table)})'
        # what is lacking is settled before the first row goes in
        selected = f'SELECT {table.listed} FROM {self.source}."{table.name}" s WHERE {self._going(table)} AND {lacking}'
        return int(self.store._fetch(f'INSERT INTO main."{table.name}" ({table.listed}) {selected}')[0][0])

    def verified(self, table: _Table, written: int) -> TypeCopied:
        """The source's rows that were to go, counted and hashed on both sides. Raises `CopyDiffers`."""
        values = ", ".join(f'"{name}"' for name in table.columns if name not in TIMES)
        total = "SELECT count(*) AS n, coalesce(sum(hash({0})::HUGEINT) % 18446744073709551616, 0)::VARCHAR AS content FROM {1}"
        of_source = f'{self.source}."{table.name}" s WHERE {self._going(table)}'
        of_target = f'main."{table.name}" t WHERE EXISTS (SELECT 1 FROM {of_source} AND {_same("s", "t", table)})'
        (n, expected), (n_found, found) = (self.store._fetch(total.format(values, rows))[0] for rows in (of_source, of_target))
        kept = self.store._fetch(f'SELECT count(*) FROM {self.source}."{table.name}" s WHERE {self.wanted(table)}')[0][0] - n
        result = TypeCopied(table.name, n, written, kept, (n, int(expected)), (n_found, int(found)))
        if not result.equal and table.belongs.owner not in _NEVER_CLASH:
            raise CopyDiffers(f"table {table.name} is not as it should be after the copy: {n} rows were to be there, {n_found} are")
        return result


def _same(first: str, second: str, table: _Table) -> str:
    """That two rows are of one unit."""
    return " AND ".join(f'{first}."{name}" IS NOT DISTINCT FROM {second}."{name}"' for name in table.belongs.columns)
