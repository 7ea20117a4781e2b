"""What `featlas atlas` prints."""

from typing import TYPE_CHECKING

from . import console
from .show_match import size

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from .queries.atlases import AtlasCopied
    from .queries.compaction import Compacted
    from .queries.contents import Contents
    from .queries.integrity import Finding

_WIDEST_TASK = 40


def show_contents(contents: "Contents") -> None:
    """An atlas in a page."""
    console.say(f"graph: {contents.graph}, schema {contents.schema}")
    if contents.runs.height:
        console.heading("Runs of edges")
        columns = ("run", "task", "method", "status", "done", "planned", "edges", "share", "measured", "deterministic")
        shown = {"task": _cut, "edges": lambda n: f"{n or 0:,}", "share": _percent, "measured": lambda at: (at or "")[:16], "deterministic": _said}
        rows = contents.runs.select(columns).iter_rows(named=True)
        console.table(columns, [[shown[name](row[name]) if name in shown else row[name] for name in columns] for row in rows])
    for title, frame in (
        ("Dictionaries", contents.dictionaries), ("In the graph", contents.counts), ("Found", contents.held),
        ("Statistics runs", contents.statistics_runs), ("Samples", contents.samples),
    ):  # fmt: skip
        if frame.height:
            console.heading(title)
            console.table(frame.columns, _rows(frame))
    if contents.parts.height:
        console.heading(f"On the disk: {size(int(contents.parts['bytes'].sum()))}")
        console.table(contents.parts.columns, _rows(contents.parts))
    if contents.unfinished.height:
        console.heading("Unfinished")
        for what, state, command in contents.unfinished.iter_rows():
            console.say(f"{what}: {state}")
            console.say(f"  {command}")


def _cut(text: str | None) -> str:
    return "" if text is None else text if len(text) <= _WIDEST_TASK else f"{text[: _WIDEST_TASK - 1]}…"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def _said(value: bool | None) -> str:
    return {None: "", True: "yes", False: "no"}[value]


def _rows(frame: "pl.DataFrame") -> "list[list[object]]":
    shown = {"bytes": size, "n": lambda n: f"{n:,}", "features": lambda n: f"{n:,}", "tokens": lambda n: f"{n:,}"}
    return [[shown[name](value) if name in shown else value for name, value in zip(frame.columns, row, strict=True)] for row in frame.iter_rows()]


_ONE = {
    "sequences that a run has more than one mark of": "sequence that a run has more than one mark of",
    "sequences with more or fewer edges than their mark says": "sequence with more or fewer edges than its mark says",
    "runs whose deletion was cut off": "run whose deletion was cut off",
    "runs that count other sequences or edges than they have": "run that counts other sequences or edges than it has",
    "runs that are called done and have sequences missing": "run that is called done and has sequences missing",
    "runs that are not finished": "run that is not finished",
    "runs of samples whose files are not what they should be": "run of samples whose files are not what they should be",
    "runs without a manifest in this folder": "run without a manifest in this folder",
    "sites of statistics runs with more or fewer rows than features": "site of a statistics run with more or fewer rows than features",
    "circuits that count other nodes or edges than they have": "circuit that counts other nodes or edges than it has",
    "manifests that cannot be read": "manifest that cannot be read",
    "Sequence nodes that nothing uses": "Sequence node that nothing uses",
    "Feature nodes that nothing uses": "Feature node that nothing uses",
    "Model nodes that nothing uses": "Model node that nothing uses",
}
"""What there is often one of, said of one."""


def show_findings(findings: "Sequence[Finding]", checked: str) -> None:
    """What a check found, or that all is well."""
    if not findings:
        console.say(f"{checked}: nothing is wrong")
        return
    for one in findings:
        console.say(f"{one.severity.value}: {one.n:,} {_ONE.get(one.what, one.what) if one.n == 1 else one.what}")
        if one.examples:
            console.say(f"  {'; '.join(one.examples)}{'; …' if one.n > len(one.examples) else ''}")
        if one.mend:
            console.say(f"  way out: {one.mend}")


def show_copied(copied: "AtlasCopied") -> None:
    """What a copy wrote, and that both sides are the same."""
    for title, types in (("Graph", copied.graph), ("Statistics", copied.statistics)):
        shown = [one for one in types if one.n or one.kept]
        if shown:
            console.heading(title)
            rows = [(one.type, f"{one.n:,}", f"{one.written:,}", f"{one.kept:,}" if one.kept else "", _hash(one.found), "yes") for one in shown]
            console.table(("what", "rows", "written", "kept", "content", "equal"), rows)
    if copied.files.height:
        console.heading("Files")
        console.table(copied.files.columns, copied.files.rows())


def _hash(parts: tuple[int, int]) -> str:
    return f"{(parts[0] ^ parts[1]) % 2**64:016x}"


def show_compacted(compacted: "Sequence[Compacted]") -> None:
    """Files before and after."""
    for one in compacted:
        console.say(f"{one.file.name}: {size(one.before)} before, {size(one.after)} now")
