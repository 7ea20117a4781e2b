"""Files that featlas keeps in an atlas, read back: what was changed, cut off or copied wrongly is said by its name, whatever library found it out."""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from ..errors import FeatlasError

SIGNS = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, RecursionError, zipfile.BadZipFile, pl.exceptions.PolarsError,
    pl.exceptions.PanicException,
)  # fmt: skip
"""What reading a damaged file fails with, in the libraries that read them."""


class DamagedFile(FeatlasError):
    """A file of an atlas is not what featlas wrote."""


@contextmanager
def intact(path: Path, way_out: str) -> Iterator[None]:
    """Whatever reading `path` (a file, or a folder of files) fails with becomes `DamagedFile`, which names it and the way out."""
    try:
        yield
    except SIGNS as error:
        said = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__
        raise DamagedFile(f"{path} is damaged ({what}): {way_out}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; to be called inside `intact`."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} where an object should be")
    return found


def run_options(atlas: Path, run: str) -> dict[str, Any]:
    """The options that a run was made with, from its manifest; empty where the atlas has none. Raises `DamagedFile`."""
    path = atlas / "runs" / f"{run}.json"
    if not path.is_file():
        return {}
    with intact(path, "move it away; the run's model and dictionaries are then named by --model and --dictionaries"):
        options = read_object(path).get("options") or {}
        for name in ("model", "dictionaries", "task"):
            if not isinstance(options.get(name), str | None):
                raise TypeError(f"{name} is {options[name]!r:.40}, no text")
        if not isinstance(options.get("settings"), dict | None):
            raise TypeError("its settings are no object")
        return dict(options)
