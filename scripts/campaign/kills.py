"""Kills at random moments, and what becomes of the atlas.

1. The job's commands run once without a kill: its length, and the phases that it goes through.
2. In each go they run again in another atlas. A command is killed at a random moment and given again, up to `MOST` times, and then runs to its end.
   Every other moment is drawn from the time that the command takes; the others from its phases, each as likely as any other, so that a short one
   (a commit, a checkpoint) is met too.
3. The atlas is compared with the uninterrupted one, all of the graph and every table.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .forks import Ended, Forks
from .jobs import Command, Place, copied, differences

MOST = 3


class Unexpected(Exception):
    """A command failed that nobody had killed."""


@dataclass
class Verdict:
    """What came of a job's kills on one store."""

    job: str
    store: str
    kills: int = 0
    goes: int = 0
    late: int = 0  # the command had ended before its moment came
    seconds_whole: float = 0.0
    seconds_lost: float = 0.0
    phases: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Whole:
    """The uninterrupted run: each command's seconds and its phases (how often, seconds)."""

    atlas: Path
    ended: Sequence[Ended]


def measure_whole(forks: Forks, commands: Sequence[Command], base: Path, atlas: Path) -> Whole:
    """Run the commands without a kill, on a copy of `base`."""
    copied(base, atlas)
    return Whole(atlas, [_finished(forks, command, Place(atlas)) for command in commands])


def campaign(
    forks: Forks, job: str, commands: Sequence[Command], whole: Whole, base: Path, *, kills: int, seed: int, place: Place, store: str,
    fresh: Callable[[], None] | None = None, graph: bool = True, say: Callable[[str], None] = print,
) -> Verdict:  # fmt: skip
    """Kill until `kills` have been, and compare after every go. `fresh` gives the place's graph what `base` has, where that is no file."""
    dice, verdict = random.Random(f"{seed}:{job}:{store}"), Verdict(job, store)
    verdict.seconds_whole = sum(one.seconds for one in whole.ended)
    while verdict.kills < kills and not verdict.failures:
        copied(base, place.atlas)
        verdict.goes += 1
        spent = 0.0
        try:
            if fresh is not None:
                fresh()
            began = time.monotonic()
            for command, known in zip(commands, whole.ended, strict=True):
                _killed_and_finished(forks, command, known, place, verdict, dice, kills)
            spent = time.monotonic() - began
            verdict.failures += differences(whole.atlas, place, graph=graph)
        except Unexpected as error:
            verdict.failures.append(str(error))
        verdict.seconds_lost += max(0.0, spent - verdict.seconds_whole)
        say(f"{job}, {store}: {verdict.kills} kills, {verdict.goes} goes{'' if verdict.equal else ': ' + verdict.failures[0]}")
    return verdict


def _killed_and_finished(
    forks: Forks, command: Command, known: Ended, place: Place, verdict: Verdict, dice: random.Random, kills: int
) -> None:
    """Kill a command some times, then let it end. known: an undisturbed run of it, by which the moments are drawn."""
    for _ in range(dice.randint(1, MOST)):
        if verdict.kills >= kills:
            break
        ended = forks.run(*command, *place.options, environment=place.environment, **_moment(known, dice, verdict.kills))
        if not ended.killed:
            verdict.late += 1
            _check(command, ended)
            return
        verdict.kills += 1
        verdict.phases[ended.phase] = verdict.phases.get(ended.phase, 0) + 1
    _finished(forks, command, place)


def _moment(known: Ended, dice: random.Random, number: int) -> Mapping[str, object]:
    """When to kill: after a share of the whole run, or within a phase."""
    if number % 2 == 0 or not known.phases:
        return {"after": dice.uniform(0.0, known.seconds)}
    phase = dice.choice(sorted(known.phases))
    n, seconds = known.phases[phase]
    return {"phase": phase, "nth": dice.randrange(n), "delay": dice.uniform(0.0, seconds / n)}


def _finished(forks: Forks, command: Command, place: Place) -> Ended:
    ended = forks.run(*command, *place.options, environment=place.environment)
    _check(command, ended)
    return ended


def _check(command: Command, ended: Ended) -> None:
    if ended.code != 0:
        raise Unexpected(f"{' '.join(map(str, command[:2]))} ended with {ended.code} in {ended.phase}: {(ended.err or ended.out).strip()[-500:]}")
