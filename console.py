"""What the commands print with: tables, progress bars, frames in the formats that machines read.

Results go to standard output, everything said on the way (progress, notes) to standard error.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import files, interruption
from .errors import UserError

if TYPE_CHECKING:
    import polars as pl

_NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+(e[+-]?\d+)?%?|")
# What a terminal obeys instead of showing: C0 (but for the end of a line and the tabulator), DEL, C1, and what turns the direction of writing.
# A label or a token from somebody else's text may hold them.
_CONTROLS: dict[int, int | str] = {**{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}, 0x7F: 0x2421}
_CONTROLS |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
_CONTROLS |= {code: f"\\u{code:04x}" for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_WIDEST = 72  # characters of a cell of a frame
_PIPED_WIDTH = 160  # columns of a table that does not go to a terminal


class Format(StrEnum):
    """How a frame is printed or saved."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


class NeedsOutput(UserError):
    """A format that no terminal can show was asked for without a file."""


class OutputFails(UserError):
    """The file asked for cannot be written."""


class Settings:
    """How much is said; the command line settles it once, before a command runs. quiet: results and mistakes only.

    aside: what is said as a result goes to standard error, since the result itself is JSON.
    """

    quiet = False
    aside = False


def be_quiet(quiet: bool) -> None:
    """Say nothing but results and mistakes (or say everything again); the libraries' own bars and warnings go too."""
    Settings.quiet = quiet
    if quiet:
        import warnings

        warnings.simplefilter("ignore")
        os.environ.update({"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"})


def _console(stream: TextIO) -> Console:
    # NO_COLOR is taken at its word: no escape sequence, bold and dim neither (https://no-color.org).
    color: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    width = None if stream.isatty() else _PIPED_WIDTH
    return Console(file=stream, width=width, color_system=color, markup=False, highlight=False, soft_wrap=False)


@contextmanager
def aside(when: bool = True) -> Iterator[None]:
    """Where a command of many steps prints JSON at its end: what its steps say goes to standard error meanwhile, or nowhere if quiet."""
    before, Settings.aside = Settings.aside, when
    try:
        yield
    finally:
        Settings.aside = before


def shown(text: str) -> str:
    """A text that a terminal shows and does not obey: control characters are pictures, those of direction are spelt out."""
    return text.translate(_CONTROLS)


def _print(what: Any, **options: Any) -> None:
    """Print a part of the result where results go."""
    if not Settings.aside:
        _console(sys.stdout).print(what, **options)
    elif not Settings.quiet:
        _console(sys.stderr).print(what, **options)


def say(text: str = "") -> None:
    """A line of the result."""
    _print(Text(shown(text)), soft_wrap=True)


def note(text: str) -> None:
    """A line about the work, on standard error; not where one is to be quiet."""
    if Settings.quiet:
        return
    _console(sys.stderr).print(Text(shown(text), style="dim"), soft_wrap=True)


def heading(text: str) -> None:
    """A line that opens a part of the result."""
    _print(Text(shown(f"\n{text}"), style="bold"), soft_wrap=True)


def say_json(value: object) -> None:
    """A value for machines."""
    text = json.dumps(value, ensure_ascii=False, indent=1, default=str)
    sys.stdout.write((shown(text) if sys.stdout.isatty() else text) + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """A table of text; a column whose values are all numbers is set to the right. Nothing in it is read as markup."""
    lines = [[_cell(value) for value in row] for row in rows]
    values = list(zip(*lines)) if lines else [() for _ in columns]
    heads = None if title is None else Text(shown(title))
    grid = Table(title=heads, title_justify="left", header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, column in zip(columns, values):
        numeric = bool(column) and all(_NUMBER.fullmatch(cell) for cell in column)
        grid.add_column(Text(shown(name)), justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        grid.add_row(*(Text(shown(cell)) for cell in line))
    _print(grid)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value).replace("\n", "⏎")


def _short(value: object) -> object:
    """A text cut where it would make a table unreadable; the other formats keep it whole."""
    return value[: _WIDEST - 1] + "…" if isinstance(value, str) and len(value) > _WIDEST else value


@contextmanager
def progress(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error: call with (done, total, detail); without a terminal it says nothing.

    What interrupts the block becomes an `Interrupted` that knows how far it was.
    """
    console, reached = _console(sys.stderr), [interruption.Reached(label, 0, None)]
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), TimeRemainingColumn()]
    hidden = quiet or Settings.quiet or not console.is_terminal
    with interruption.at(reached), Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task(label, total=None, detail="")

        def report(done: int, total: int, detail: str = "") -> None:
            reached[0] = interruption.Reached(label, done, total)
            bar.update(task, completed=done, total=total, detail=detail)
            interruption.again()

        yield report


@contextmanager
def saving(output: Path) -> Iterator[None]:
    """Turns what the file system refuses into `OutputFails`."""
    try:
        yield
    except OSError as error:
        raise OutputFails(f"cannot write {output}: {error.strerror or error}") from None


def save_frame(frame: "pl.DataFrame", output: Path) -> None:
    """Save a frame as CSV where the file's name ends so, else as parquet; raises `OutputFails`."""
    with saving(output), files.whole(output) as part:
        frame.write_csv(part) if output.suffix == ".csv" else frame.write_parquet(part)


def write_frame(frame: "pl.DataFrame", format: Format, output: Path | None = None) -> None:
    """Print a frame, or save it; raises `NeedsOutput` for parquet without a file and `OutputFails`."""
    if format is Format.PARQUET and output is None:
        raise NeedsOutput("--format parquet is binary: name a file with --output FILE.parquet")
    if output is None:
        if format is Format.TABLE:
            table(frame.columns, ([_short(value) for value in row] for row in frame.iter_rows()))
        else:
            text = _text(frame, format)
            sys.stdout.write(shown(text) if sys.stdout.isatty() else text)  # a pipe gets every character as it is
        return
    with saving(output), files.whole(output) as part:
        if format is Format.PARQUET:
            frame.write_parquet(part)
        else:
            part.write_text(_text(frame, format), encoding="utf-8")


def _text(frame: "pl.DataFrame", format: Format) -> str:
    """A frame as CSV (lists as JSON), or as JSON rows; a table saved to a file is tab-separated."""
    if format is Format.JSON:
        return json.dumps(frame.to_dicts(), ensure_ascii=False, indent=1, default=str) + "\n"
    import polars as pl

    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
    flat = frame.with_columns(
        pl.col(name).map_elements(lambda value: json.dumps(list(value), ensure_ascii=False), return_dtype=pl.String) for name in nested
    )
    return flat.write_csv(separator="\t" if format is Format.TABLE else ",")
