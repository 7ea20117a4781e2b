"""A campaign: so many cases of each target, what came of them, and every way in which one broke, told once."""

import math
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings

from .stage import Broken, Stage, place_of
from .targets import TARGETS, Target


@dataclass
class Report:
    """What came of a target's cases. `broken`: the first example of each way, by where it broke, and how often."""

    target: str
    cases: int = 0
    refused: int = 0
    seconds: float = 0.0
    broken: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def succeeded(self) -> int:
        return self.cases - self.refused - sum(n for _, n in self.broken.values())


def attack(target: Target, stage: Stage, cases: int, *, start: int = 0, raising: bool = False) -> Report:
    """Run a target's cases, drawn by the number `start` alone; where one breaks it is noted, or raised where `raising`."""
    report = Report(target.name)
    stage.restore()

    @settings(
        max_examples=cases, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=False, print_blob=False
    )
    @seed(start)
    @given(target.inputs)
    def one(case: object) -> None:
        began = time.monotonic()
        report.cases += 1
        try:
            report.refused += target.run(stage, case).refused
        except Exception as error:
            if raising:
                raise
            where = error.where if isinstance(error, Broken) else place_of(error)
            what, n = report.broken.get(where, (f"{case!r:.600}\n{error}\n{traceback.format_exc()[-1500:]}", 0))
            report.broken[where] = (what, n + 1)
            stage.restore()
        finally:
            report.seconds += time.monotonic() - began

    one()
    return report


def shares(cases: int, names: Iterable[str] = ()) -> dict[str, int]:
    """How many of all cases each target gets, by its weight."""
    chosen = [TARGETS[name] for name in names] or list(TARGETS.values())
    total = sum(target.weight for target in chosen)
    return {target.name: math.ceil(cases * target.weight / total) for target in chosen}


def table(reports: Iterable[Report]) -> str:
    """Targets, cases, seconds, refusals, successes, and what broke, as a Markdown table with its sum."""
    rows = [(r.target, r.cases, r.seconds, r.refused, r.succeeded, sum(n for _, n in r.broken.values())) for r in reports]
    rows.append(("all", *(sum(row[i] for row in rows) for i in range(1, 6))))  # type: ignore[misc, arg-type]
    lines = ["| target | cases | seconds | refused | succeeded | broken |", "|---|---:|---:|---:|---:|---:|"]
    return "\n".join([*lines, *(f"| {name} | {n:,} | {s:,.0f} | {a:,} | {b:,} | {c:,} |" for name, n, s, a, b, c in rows)])


def told(report: Report) -> str:
    """Every way in which cases of a target broke."""
    return "\n".join(f"== {report.target}: {where} ({n} times)\n{what}\n" for where, (what, n) in report.broken.items())
