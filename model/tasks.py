"""The tasks: which there are, and how pairs of them are drawn for a tokenizer.

Drawing is without replacement, in an order that depends on the task and the seed alone, and goes round the labels in turn, so
that answers are balanced; pairs that the tokenizer does not fit are passed over. Asking for more gives the same pairs and more.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import task_templates
from .pairs import InvalidPairs, NoPairs, Pair, PairBatch, Refusal, batches, encode_pairs, read_pairs, write_pairs
from .task_templates import Space, Spaces
from .words import Vocabulary

__all__ = [
    "TASKS", "InvalidPairs", "NoPairs", "Pair", "PairBatch", "Refusal", "Task", "TaskTooSmall", "UnknownTask",
    "batches", "build_task", "load_task", "read_pairs", "write_pairs",
]  # fmt: skip

# How many choices of a space are drawn and tokenised at a time, and how many may fail in a row before it counts as exhausted.
_DRAW = 64
_PATIENCE = 4096


class UnknownTask(UserError):
    """No task has this name, and no file."""


class TaskTooSmall(UserError):
    """A task has fewer distinct pairs for this tokenizer than were asked for."""


@dataclass(frozen=True)
class Task:
    """A kind of pairs: `summary` in a line, `feature` what a model needs to represent, `spaces` its pairs by label."""

    name: str
    summary: str
    feature: str
    spaces: Callable[[Vocabulary], Spaces]


TASKS: dict[str, Task] = {task.name: task for task in (
    Task(
        "agreement",
        "verb agrees with its subject: 'The old key' is, not are",
        "The number of the subject, one word before the verb. The corrupt prompt has the subject in the other number. Labels: the clean number.",
        task_templates.agreement,
    ),
    Task(
        "agreement_rc",
        "verb agrees across a relative clause: 'The poet who the kings know' is, not are",
        "The number of the subject, kept across a clause whose own subject may have the other number (as often as not). "
        "The corrupt prompt has the main subject in the other number. Labels: the clean number.",
        task_templates.agreement_rc,
    ),
    Task(
        "ioi",
        "indirect object: 'When Mary and John went to the store, John gave a drink to' Mary",
        "Which of two names occurred once only. In the corrupt prompt the other person gives, so that the answer changes over. "
        "Labels: whether the receiver is named first or second, each half of the time.",
        task_templates.ioi,
    ),
    Task(
        "pronoun",
        "pronoun fits the name: 'So Mary is a really great friend, isn't' she, not he",
        "The gender of a first name. The corrupt prompt has a name of the other gender. Labels: the clean gender.",
        task_templates.pronoun,
    ),
    Task(
        "greater_than",
        "a span ends after it starts: 'The war lasted from the year 1741 to the year 17' 6, not 2",
        "That a number is greater than another. The corrupt year is early enough for the wrong answer to be possible too, and nearer. "
        "Asked for one digit, two digits or a number word, whichever is one token here. Labels: the century.",
        task_templates.greater_than,
    ),
    Task(
        "boolean",
        "value of an expression: 'True and False or True ==' True",
        "The value of three to six literals joined by and and or, after four solved examples. One literal is the other way round "
        "in the corrupt prompt and changes the value. Labels: the value and the number of literals. Small models are not far above chance.",
        task_templates.boolean,
    ),
    Task(
        "profession_gender",
        "profession from a biography, as in bias in bios: 'My friend Mary cared for patients. She worked as a' nurse",
        "The profession that a biography describes, while the gender of name and pronoun, which should not matter, stays as it is: the "
        "corrupt prompt describes another profession. Both genders are equally frequent in each. Labels: gender and profession.",
        task_templates.profession_gender,
    ),
)}  # fmt: skip


def build_task(name: str, tokenizer: Any, *, n: int, seed: int = 0) -> list[Pair]:
    """`n` distinct pairs of the task `name`, or of a mixture `a+b+c`, equally many of each (the first ones one more) in turn.

    Raises `UnknownTask`, and `TaskTooSmall` where the tokenizer allows fewer distinct pairs.
    """
    return interleave([_draw(_find(part), tokenizer, share, seed) for part, share in _shares(name, n)])


def load_task(
    spec: str,
    tokenizer: Any,
    *,
    n: int,
    seed: int = 0,
    skip_invalid: bool = False,
    report: Callable[[str, Refusal], None] | None = None,
) -> list[Pair]:
    """Pairs of a task, a JSONL file (its first `n`, or all where it has fewer), or a mixture of either, `a+b.jsonl`.

    `report(path, refusal)` is called for every line of a file that was passed over. Raises as `build_task` and `read_pairs` do.
    """
    # A path may hold a "+" itself.
    parts = [(spec, n)] if Path(spec).is_file() else _shares(spec, n)
    return interleave([_load(part, tokenizer, share, seed, skip_invalid, report) for part, share in parts])


def _load(part: str, tokenizer: Any, n: int, seed: int, skip_invalid: bool, report: Callable[[str, Refusal], None] | None) -> list[Pair]:
    if part in TASKS or not (Path(part).is_file() or part.endswith(".jsonl")):
        return _draw(_find(part), tokenizer, n, seed)
    pairs, refusals = read_pairs(part, tokenizer, skip_invalid=skip_invalid)
    for refusal in refusals if report else ():
        report(part, refusal)  # type: ignore[misc]
    return pairs[:n]


def _shares(mixture: str, n: int) -> list[tuple[str, int]]:
    if n < 1:
        raise TaskTooSmall(f"{n} pairs of {mixture!r} were asked for: ask for at least 1")
    parts = [part.strip() for part in mixture.split("+")]
    return [(part, n // len(parts) + (i < n % len(parts))) for i, part in enumerate(parts)]


def _find(name: str) -> Task:
    if name not in TASKS:
        raise UnknownTask(f"there is no task {name!r}: choose from {', '.join(TASKS)}, a mixture as in 'agreement+ioi', or a .jsonl file of pairs")
    return TASKS[name]


def interleave(lists: list[list[Pair]]) -> list[Pair]:
    """One of each in turn, as long as they last; a pair that occurs twice is kept once."""
    longest = max(map(len, lists))
    mixed = [pairs[i] for i in range(longest) for pairs in lists if i < len(pairs)]
    return list({pair.key: pair for pair in mixed}.values())


def _draw(task: Task, tokenizer: Any, n: int, seed: int) -> list[Pair]:
    """The first `n` valid pairs, one label after the other in turn."""
    spaces = task.spaces(Vocabulary(tokenizer))
    streams = [_valid_pairs(space, tokenizer, f"{task.name}:{label}:{seed}") for label, space in spaces.items()]
    found: dict[str, Pair] = {}
    while streams and len(found) < n:
        for stream in list(streams):
            pair = next(stream, None)
            if pair is None:
                streams.remove(stream)
            elif len(found) < n:
                found.setdefault(pair.key, pair)
    if len(found) < n:
        raise TaskTooSmall(f"task {task.name!r} has {len(found)} distinct pairs for this tokenizer: ask for no more than that, not {n}")
    return list(found.values())


def _valid_pairs(space: Space, tokenizer: Any, seed: str) -> Iterator[Pair]:
    """The pairs of a space that fit the tokenizer, in random order; ends when the space or the patience does."""
    order = _shuffled(space.size, random.Random(seed))
    failed = 0
    while failed < _PATIENCE and (drawn := list(islice(order, _DRAW))):
        pairs = [pair for i in drawn if (pair := space[i]) is not None]
        fitting = [p for p, encoded in zip(pairs, encode_pairs(pairs, tokenizer), strict=True) if not isinstance(encoded, str)]
        failed = 0 if fitting else failed + len(drawn)
        yield from fitting


def _shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """0 … size - 1 in random order, in memory that grows with what was taken only (Fisher and Yates, on a sparse array)."""
    moved: dict[int, int] = {}
    for last in range(size - 1, -1, -1):
        i = rng.randint(0, last)
        yield moved.get(i, i)
        moved[i] = moved.pop(last, last)
