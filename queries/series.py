"""Series: what was measured of a list of models, kept in files of the atlas.

A series is a folder `series/<key>`: `manifest.json` (`SeriesRecord` without its frames) and one parquet file for each frame. Frames that belong to
one model are first kept apart (`put_part`), so that an interrupted series goes on where it stopped.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from ..errors import UserError
from ..files import whole, write_text
from .kept_files import SIGNS

FOLDER = "series"
MANIFEST = "manifest.json"


class NoSeries(UserError):
    """The atlas has no such series."""


@dataclass(frozen=True, eq=False)
class SeriesRecord:
    """A finished series. axis: what `x` counts (step, parameters, …). settings: how it was measured, plain values. frames: by name."""

    key: str
    title: str
    axis: str
    settings: Mapping[str, object]
    frames: Mapping[str, pl.DataFrame] = field(repr=False)


def put_part(atlas: Path, key: str, member: str, frames: Mapping[str, pl.DataFrame]) -> None:
    """Keep what was measured of one model, whole or not at all; `member` is a key of the caller's."""
    folder = atlas / FOLDER / key / "members"
    work = folder / f".{member}-{uuid.uuid4().hex[:8]}"
    work.mkdir(parents=True)
    for name, frame in frames.items():
        frame.write_parquet(work / f"{name}.parquet")
    work.rename(folder / member)


def read_part(atlas: Path, key: str, member: str) -> dict[str, pl.DataFrame] | None:
    """What `put_part` kept, or None."""
    folder = atlas / FOLDER / key / "members" / member
    return _frames(folder) if folder.is_dir() else None


def write_series(atlas: Path, record: SeriesRecord) -> None:
    """Keep a finished series; one of the same key is replaced."""
    folder = atlas / FOLDER / record.key
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in record.frames.items():
        with whole(folder / f"{name}.parquet") as part:
            frame.write_parquet(part)
    manifest = {"key": record.key, "title": record.title, "axis": record.axis, "settings": dict(record.settings), "frames": list(record.frames)}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def list_series(atlas: Path) -> list[SeriesRecord]:
    """All finished series of an atlas, by key."""
    return [_read(path.parent) for path in sorted((atlas / FOLDER).glob(f"*/{MANIFEST}"))]


def read_series(atlas: Path, name: str | None = None) -> SeriesRecord:
    """The series whose key begins with `name`, or the only one. Raises `NoSeries`."""
    found = list_series(atlas)
    known = ", ".join(f"{record.key} ({record.title})" for record in found) or "none"
    fitting = [record for record in found if name is None or record.key.startswith(name)]
    if len(fitting) != 1:
        asked = "a series must be named" if name is None else f"{'no' if not fitting else 'more than one'} series {name!r}"
        raise NoSeries(f"{asked}: the atlas has {known}")
    return fitting[0]


_NEEDED = {
    "members": ("name", "x", "loss", "parameters", "model", "run"), "tasks": ("name", "x", "task", "label", "accuracy"),
    "graphs": ("name", "x", "edges", "effective_edges"), "areas": ("x", "area", "task", "method", "value"),
}  # fmt: skip


def complete(record: SeriesRecord) -> SeriesRecord:
    """The series, with everything that is shown of one. Raises `NoSeries` with what it lacks."""
    for name, columns in _NEEDED.items():
        lacking = [column for column in columns if name not in record.frames or column not in record.frames[name].columns]
        if lacking:
            raise NoSeries(f"series {record.key} lacks {name}.{lacking[0]}: its files are not all there; measure it again, or remove its folder")
    return record


def _read(folder: Path) -> SeriesRecord:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        frames = {name: pl.read_parquet(folder / f"{name}.parquet", glob=False) for name in manifest["frames"]}
        return SeriesRecord(manifest["key"], manifest["title"], manifest["axis"], manifest["settings"], frames)
    except SIGNS as error:
        raise NoSeries(f"{folder} is no series: {error}") from None


def _frames(folder: Path) -> dict[str, pl.DataFrame]:
    return {path.stem: pl.read_parquet(path, glob=False) for path in sorted(folder.glob("*.parquet"))}
