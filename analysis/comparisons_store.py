"""Comparisons in the statistics store: written in place of the one of the same key, listed, found by the beginning of a key, and read back whole."""

import json
from collections.abc import Mapping

import polars as pl

from ..errors import UserError
from ..queries.statistics import StatisticsStore
from .comparison_records import CURVES, JOINT_BLOCKS, JOINT_MEMBERS, LINKS, VALUES, Comparison

RECORD = ("kind", "a", "b", "run_a", "run_b", "model_a", "model_b", "matching")
"""What is kept of a comparison itself, beside its key, settings, notes and time."""

TABLES: Mapping[str, tuple[str, Mapping[str, pl.DataType]]] = {
    "values": ("comparison_values", VALUES), "curves": ("comparison_curves", CURVES), "links": ("comparison_links", LINKS),
    "blocks": ("joint_blocks", JOINT_BLOCKS), "members": ("joint_members", JOINT_MEMBERS),
}  # fmt: skip
"""Field of `Comparison` → its table and columns."""


class NoSuchComparison(UserError):
    """The statistics store has no such comparison, or the name fits several."""


def write_comparison(statistics: StatisticsStore, comparison: Comparison) -> None:
    """Keep a comparison, in place of the one of the same key."""
    record = {name: getattr(comparison, name) for name in RECORD}
    record |= {name: json.dumps(dict(getattr(comparison, name)), sort_keys=True, ensure_ascii=False) for name in ("settings", "notes")}
    frames = {"comparisons": pl.DataFrame([record]).with_columns(finished=pl.lit(statistics.now()))}
    frames |= {table: getattr(comparison, name).select(pl.col(c).cast(t) for c, t in schema.items()) for name, (table, schema) in TABLES.items()}
    statistics.rewrite("comparison", comparison.key, frames)


def list_comparisons(statistics: StatisticsStore, kind: str | None = None) -> pl.DataFrame:
    """All comparisons (of a kind: graphs or joint), the last made first: comparison, `RECORD`, settings, notes (JSON), finished."""
    return statistics.query(
        f"SELECT comparison, {', '.join(RECORD)}, settings, notes, finished FROM comparisons WHERE $kind IS NULL OR kind = $kind"
        " ORDER BY finished DESC, comparison",
        {"kind": kind},
    )


def find_comparison(statistics: StatisticsStore, name: str | None = None) -> str:
    """The key that begins with `name`, or that of the comparison made last. Raises `NoSuchComparison`."""
    there = list_comparisons(statistics)
    keys = there["comparison"].to_list()
    fitting = keys[:1] if name is None else [key for key in keys if key.startswith(name)]
    if len(fitting) == 1:
        return str(fitting[0])
    known = "; ".join(f"{row['comparison']} ({row['a']} and {row['b']})" for row in there.head(8).iter_rows(named=True))
    said = f"comparison {name!r} is not unique" if fitting else f"no comparison{f' {name!r}' if name else ''}"
    raise NoSuchComparison(f"{said} in {statistics.path}: there are {known or 'none: `featlas compare` makes them'}")


def read_comparison(statistics: StatisticsStore, name: str | None = None) -> Comparison:
    """The comparison whose key begins with `name`, or the last one. Raises `NoSuchComparison`."""
    key = find_comparison(statistics, name)
    record = list_comparisons(statistics).filter(pl.col("comparison") == key).row(0, named=True)
    frames: dict[str, pl.DataFrame] = {}
    for field, (table, schema) in TABLES.items():
        # rows come back in the order in which they were written
        columns = ", ".join(f'"{column}"' for column in schema)
        rows = statistics.query(f"SELECT {columns} FROM {table} WHERE comparison = $key ORDER BY rowid", {"key": key})
        frames[field] = rows.select(pl.col(column).cast(dtype) for column, dtype in schema.items())
    text = lambda name: str(record[name])
    return Comparison(
        key, text("kind"), text("a"), text("b"), text("run_a"), text("run_b"), text("model_a"), text("model_b"), text("matching"),
        json.loads(record["settings"]), json.loads(record["notes"]), frames["values"], frames["curves"], frames["links"], frames["blocks"],
        frames["members"],
    )  # fmt: skip


def delete_comparison(statistics: StatisticsStore, name: str) -> str:
    """Remove a comparison; its key. Raises `NoSuchComparison`."""
    key = find_comparison(statistics, name)
    empty = {table: pl.DataFrame(schema=dict(schema)) for table, schema in TABLES.values()}
    statistics.rewrite("comparison", key, {"comparisons": pl.DataFrame(), **empty})
    return key
