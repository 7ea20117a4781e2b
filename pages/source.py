"""What pages are made from, and the plain values that they are made of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import polars as pl

from ..queries.statistics import StatisticsStore
from ..queries.store import GraphStore

Page = dict[str, Any]
"""What a page says, as values that JSON has."""


@dataclass(frozen=True)
class PageSource:
    """An atlas that is open for reading: its graph, its statistics store where it has one, and its folder.

    held: it has one, but another process is writing it; pages say what the graph alone says.
    """

    store: GraphStore
    statistics: StatisticsStore | None
    atlas: Path
    held: bool = False


def plain(value: object) -> Any:
    """A value as JSON has it: numbers that are not finite are null, times are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (datetime, date)):
        return value.isoformat(sep=" ", timespec="seconds") if isinstance(value, datetime) else value.isoformat()
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return str(value)


def records(frame: pl.DataFrame) -> list[Page]:
    """The rows of a frame, each by its columns' names."""
    return [plain(row) for row in frame.iter_rows(named=True)]


def table(frame: pl.DataFrame) -> Page:
    """A frame as `columns`, `rows`: names are written once."""
    return {"columns": frame.columns, "rows": [plain(row) for row in frame.iter_rows()]}
