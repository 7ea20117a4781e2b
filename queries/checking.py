"""How two atlases differ: graph against graph and statistics against statistics, row by row, whichever databases hold them.

Both differences are frames with one row for each value that is not the same, empty where there is none: `DIFFERENCES`. Graphs are read in
blocks, so that memory does not grow with them.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence

import polars as pl

from .belongings import TIMES, UNCOPIED, tables_of
from .schema import EDGES, NODES, ColumnType
from .statistics import StatisticsStore
from .store import GraphStore
from .streaming import EDGES_PER_BLOCK, edge_blocks, node_blocks

ROWS = "(rows)"
"""The property of a difference in how often a row is there at all."""

DIFFERENCES: Mapping[str, pl.DataType] = {
    "type": pl.String(), "source": pl.String(), "target": pl.String(), "identity": pl.String(), "property": pl.String(), "a": pl.String(),
    "b": pl.String(),
}  # fmt: skip
"""type: a label, an edge type or a table. source: the key of a node or of an edge's source; target: null for nodes. identity: JSON of what else tells
a row apart. property: which value differs, or `ROWS`; a, b: the values as text, null where there is none; of `ROWS` how many there are."""


def graph_difference(
    a: GraphStore, b: GraphStore, *, ignoring: Collection[str] = (), tolerance: float = 0.0, size: int = EDGES_PER_BLOCK
) -> pl.DataFrame:
    """Where two graphs differ, as `DIFFERENCES`; empty where they are equal.

    `ignoring` leaves out properties (`label`), those of one type (`Run.status`) or whole types (`INFLUENCES`). Numbers differ where they are further
    apart than `tolerance`, absolutely and relative to the greater one. A row that one graph has twice is a difference too.
    """
    parts = [pl.DataFrame(schema=DIFFERENCES)]
    for label in (name for name in NODES if name not in ignoring):
        compared = _compared(label, NODES[label].columns, ignoring)
        parts += [_block_difference(label, ["key"], compared, block[0], block[1], tolerance) for block in node_blocks(label, a, b)]
    for type in (name for name in EDGES if name not in ignoring):
        edge = EDGES[type]
        identity = ["source", "target", *edge.identity]
        compared = _compared(type, edge.columns, ignoring)
        parts += [_block_difference(type, identity, compared, block[0], block[1], tolerance) for block in edge_blocks(type, a, b, size=size)]
    return pl.concat(parts).sort("type", "source", "target", "identity", "property")


def statistics_difference(a: StatisticsStore, b: StatisticsStore, *, ignoring: Collection[str] = TIMES, tolerance: float = 0.0) -> pl.DataFrame:
    """Where two statistics stores differ, as `DIFFERENCES` with a table's name for `type` and `ROWS` for every property; empty where they are equal.

    Rows have no identity of their own here: they are compared whole, but for the columns `ignoring` names (times, unless given; `table.column` or a
    table's name too). Each row that the two have unequally often is one difference, its text in `identity`. Numbers are compared rounded to
    `tolerance`'s decimal where one is given, so that two just at a rounding's edge may count as different.
    """
    parts = [pl.DataFrame(schema=DIFFERENCES)]
    tables = {store: tables_of(store) for store in (a, b)}
    for table in sorted({*tables[a], *tables[b]} - {*UNCOPIED, *ignoring}):
        columns = {name: type for store in (a, b) for name, type in tables[store].get(table, {}).items()}
        columns = {name: type for name, type in columns.items() if name not in ignoring and f"{table}.{name}" not in ignoring}
        counts = [_row_counts(store, table, columns, tolerance) for store in (a, b) if table in tables[store]]
        if len(counts) == 1:
            empty = counts[0].clear()
            counts = [counts[0], empty] if table in tables[a] else [empty, counts[0]]
        parts.append(_count_difference(table, *counts))
    return pl.concat(parts).sort("type", "identity")


def _compared(name: str, columns: Mapping[str, ColumnType], ignoring: Collection[str]) -> list[str]:
    return [column for column in columns if column not in ignoring and f"{name}.{column}" not in ignoring]


def _block_difference(type: str, identity: Sequence[str], columns: Sequence[str], a: pl.DataFrame, b: pl.DataFrame, tolerance: float) -> pl.DataFrame:
    """The differences of two frames of one type with the same columns."""
    if a.equals(b):
        return pl.DataFrame(schema=DIFFERENCES)
    parts = [_unequal_counts(type, identity, a, b)]
    once = [frame.unique(subset=list(identity), keep="first", maintain_order=True) for frame in (a, b)]
    both = once[0].join(once[1], on=list(identity), how="inner", suffix="__b", nulls_equal=True)
    for name in columns:
        differing = both.filter(~same_values(pl.col(name), pl.col(f"{name}__b"), both.schema[name], tolerance))
        if differing.height:
            shown = differing.with_columns(property=pl.lit(name), a=pl.col(name).cast(pl.String), b=pl.col(f"{name}__b").cast(pl.String))
            parts.append(_described(type, identity, shown))
    return pl.concat(parts)


def same_values(a: pl.Expr, b: pl.Expr, dtype: pl.DataType, tolerance: float) -> pl.Expr:
    """Whether two columns have the same values, numbers to a tolerance (absolute, and relative to the greater)."""
    equal = a.eq_missing(b)
    if dtype != pl.Float64 or tolerance == 0:
        return equal
    near = (a - b).abs() <= tolerance * pl.max_horizontal(pl.lit(1.0), a.abs(), b.abs())
    return equal | near.fill_null(False)


def _unequal_counts(type: str, identity: Sequence[str], a: pl.DataFrame, b: pl.DataFrame) -> pl.DataFrame:
    """Rows, by identity, that the two frames have unequally often."""
    counted = [frame.group_by(list(identity)).agg(pl.len().alias("n")) for frame in (a, b)]
    both = counted[0].join(counted[1], on=list(identity), how="full", coalesce=True, suffix="__b", nulls_equal=True)
    unequal = both.filter(pl.col("n").fill_null(0) != pl.col("n__b").fill_null(0))
    shown = unequal.with_columns(property=pl.lit(ROWS), a=pl.col("n").cast(pl.String), b=pl.col("n__b").cast(pl.String))
    return _described(type, identity, shown)


def _described(type: str, identity: Sequence[str], rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with `property`, `a` and `b` as `DIFFERENCES`."""
    others = [name for name in identity if name not in ("key", "source", "target")]
    text = [json.dumps(row, ensure_ascii=False) for row in rows.select(others).to_dicts()] if others else [None] * rows.height
    return rows.select(
        pl.lit(type).alias("type"),
        pl.col("key" if "key" in identity else "source").alias("source"),
        (pl.lit(None, dtype=pl.String) if "key" in identity else pl.col("target")).alias("target"),
        pl.Series("identity", text, dtype=pl.String),
        "property", "a", "b",
    )  # fmt: skip


def _row_counts(store: StatisticsStore, table: str, columns: Mapping[str, str], tolerance: float) -> pl.DataFrame:
    """How often each row is there: `hash` of the row, `n`, and one such row as `text`."""
    values = list(_values(columns, tolerance))
    packed = f"struct_pack({', '.join(values)})" if values else "0"
    return store.query(f'SELECT hash({packed}) AS hash, count(*) AS n, any_value({packed}::VARCHAR) AS text FROM "{table}" GROUP BY 1')


def _values(columns: Mapping[str, str], tolerance: float) -> Iterator[str]:
    for name, type in columns.items():
        quoted = f'"{name}"'
        if tolerance > 0 and type in ("DOUBLE", "FLOAT"):
            yield f"{quoted} := round({quoted} / {tolerance!r})"
        elif tolerance > 0 and type in ("DOUBLE[]", "FLOAT[]"):
            yield f"{quoted} := list_transform({quoted}, lambda x: round(x / {tolerance!r}))"
        else:
            yield f"{quoted} := {quoted}"


def _count_difference(table: str, a: pl.DataFrame, b: pl.DataFrame) -> pl.DataFrame:
    both = a.join(b, on="hash", how="full", coalesce=True, suffix="__b")
    unequal = both.filter(pl.col("n").fill_null(0) != pl.col("n__b").fill_null(0))
    return unequal.select(
        pl.lit(table).alias("type"), pl.lit(None, dtype=pl.String).alias("source"), pl.lit(None, dtype=pl.String).alias("target"),
        pl.coalesce("text", "text__b").alias("identity"), pl.lit(ROWS).alias("property"), pl.col("n").cast(pl.String).alias("a"),
        pl.col("n__b").cast(pl.String).alias("b"),
    )  # fmt: skip
