"""What the doctor found, as a table that a person reads: the way out under each line that is not ok."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from . import console
from .doctor import Check, Status


def show(checks: Sequence[Check]) -> None:
    """A table by parts, and how many lines ended how."""
    rows: list[tuple[str, ...]] = []
    for part, own in groupby(checks, key=lambda check: check.part):
        named = part
        for check in own:
            rows.append((named, check.status.value, check.name, check.found))
            if check.way_out:
                rows.append(("", "", "", f"→ {check.way_out}"))
            named = ""
    console.table(("", "", "what", "found"), rows)
    counts = Counter(check.status for check in checks)
    console.say("\n" + ", ".join(f"{counts[status]} {status.value}" for status in Status if counts[status]))


def as_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """One object a check: part, name, status, found, way_out."""
    return [asdict(check) for check in checks]
