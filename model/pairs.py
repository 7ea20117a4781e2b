"""Pairs of a clean and a corrupted prompt: records, checking against a tokenizer, files, batches.

A pair is valid for a tokenizer when both prompts have equally many tokens and each answer adds exactly one token, which the
tokenizer knows, to the clean prompt. Prompts are tokenised with the special tokens that the tokenizer adds (see `beginning`).
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_text

_REQUIRED = ("clean", "corrupt", "answer", "wrong_answer")
_OPTIONAL = ("task", "label")
# Texts are tokenised this many pairs at a time, to bound memory.
_CHUNK = 1024
_DUPLICATE = "the same pair as line "


class InvalidPairs(UserError):
    """Pairs do not fit the tokenizer or the file's form."""


class NoDonor(UserError):
    """A pair has no other of its length to take a baseline from."""


class NoPairs(UserError):
    """A file holds no pair to work on."""


@dataclass(frozen=True, slots=True)
class Pair:
    """`answer` is right after `clean`, `wrong_answer` is not; both with the leading space that belongs to them."""

    clean: str
    corrupt: str
    answer: str
    wrong_answer: str
    task: str
    label: str | None = None

    @property
    def key(self) -> str:
        """24 hex digits of the sha256 of the texts and the task; the label is no part of it."""
        content = json.dumps([self.task, self.clean, self.corrupt, self.answer, self.wrong_answer], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8")).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A line of a file (counted from 1) that gives no pair of its own, and why."""

    line: int
    reason: str

    @property
    def duplicate(self) -> bool:
        """Whether the line merely repeats an earlier one."""
        return self.reason.startswith(_DUPLICATE)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of a valid pair."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    wrong_answer: int


@dataclass(frozen=True)
class PairBatch:
    """Pairs of equal token length: `clean`, `corrupt` (batch, pos), `answer`, `wrong_answer` (batch,), all int64.

    `donor` (batch, pos), where asked for, is another pair's clean prompt for each (see `donors`).
    """

    pairs: tuple[Pair, ...]
    clean: Tensor
    corrupt: Tensor
    answer: Tensor
    wrong_answer: Tensor
    donor: Tensor | None = None

    @property
    def first_difference(self) -> Tensor:
        """The first position where clean and corrupt differ, (batch,); the number of positions where they nowhere do."""
        same = (self.clean == self.corrupt).long()  # (batch, pos)
        return same.cumprod(dim=1).sum(dim=1)

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch with its tensors on `device`."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "pairs")
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors if tensor is not None}
        return replace(self, **moved)


# ---- checking against a tokenizer


def encode_pairs(pairs: Iterable[Pair], tokenizer: Any) -> Iterator[EncodedPair | str]:
    """For each pair its token ids, or the reason why it does not fit the tokenizer; lazily, in order."""
    stream = iter(pairs)
    while chunk := list(islice(stream, _CHUNK)):
        texts = [text for p in chunk for text in (p.clean, p.corrupt, p.clean + p.answer, p.clean + p.wrong_answer)]
        ids = tokenizer(texts, add_special_tokens=True)["input_ids"]
        for i, pair in enumerate(chunk):
            yield _encode(pair, ids[4 * i : 4 * i + 4], tokenizer)


def _encode(pair: Pair, ids: Sequence[list[int]], tokenizer: Any) -> EncodedPair | str:
    clean, corrupt, with_answer, with_wrong = ids
    if not clean:
        return "the clean prompt has no tokens"
    if len(clean) != len(corrupt):
        return f"clean has {len(clean)} tokens and corrupt {len(corrupt)}: both need equally many"
    for name, text, longer in (("answer", pair.answer, with_answer), ("wrong_answer", pair.wrong_answer, with_wrong)):
        if problem := _not_one_token(text, clean, longer, tokenizer):
            return f"{name} {problem}"
    if with_answer[-1] == with_wrong[-1]:
        return f"answer {pair.answer!r} and wrong_answer {pair.wrong_answer!r} are the same token"
    return EncodedPair(tuple(clean), tuple(corrupt), with_answer[-1], with_wrong[-1])


def _not_one_token(text: str, prompt: list[int], longer: list[int], tokenizer: Any) -> str | None:
    """Why `text` after the prompt (`longer`, tokenised as one) is not one known token, or None where it is."""
    if longer[: len(prompt)] != prompt:
        shared = next((i for i, (a, b) in enumerate(zip(prompt, longer)) if a != b), len(prompt))
        return f"{text!r} is joined to the end of the prompt by the tokenizer ({_spell(longer[shared:], tokenizer)})"
    added = longer[len(prompt) :]
    if len(added) != 1:
        return f"{text!r} is {len(added)} tokens ({_spell(added, tokenizer)}), not one"
    if added[0] == tokenizer.unk_token_id:
        return f"{text!r} is unknown to the tokenizer"
    return None


def _spell(ids: list[int], tokenizer: Any) -> str:
    return ", ".join(repr(tokenizer.decode([i])) for i in ids) or "nothing"


def batches(pairs: Iterable[Pair], tokenizer: Any, *, batch_size: int, donor_seed: int | None = None) -> Iterator[PairBatch]:
    """Batches of at most `batch_size` pairs of equal token length, without padding.

    A batch is given out when it is full; what is left comes last, shortest first. The order depends on the pairs alone.
    With a `donor_seed` each batch has donors, which depend on the pairs and the seed alone.
    Raises `InvalidPairs` for a pair that does not fit the tokenizer, `NoDonor` for one without a donor.
    """
    listed = list(pairs)
    valid: Iterable[EncodedPair] = _all_valid(listed, tokenizer)
    given: Iterable[tuple[int, ...] | None] = repeat(None)
    if donor_seed is not None:
        valid = list(valid)
        given = donors(listed, valid, donor_seed)
    waiting: dict[int, list[_Member]] = {}
    for pair, encoded, donor in zip(listed, valid, given):
        group = waiting.setdefault(len(encoded.clean), [])
        group.append((pair, encoded, donor))
        if len(group) == batch_size:
            yield _batch(waiting.pop(len(encoded.clean)))
    for length in sorted(waiting):
        yield _batch(waiting[length])


_Member = tuple[Pair, EncodedPair, tuple[int, ...] | None]  # with its donor


def _all_valid(pairs: list[Pair], tokenizer: Any) -> Iterator[EncodedPair]:
    for pair, encoded in zip(pairs, encode_pairs(pairs, tokenizer), strict=True):
        if isinstance(encoded, str):
            raise InvalidPairs(f"pair {pair.clean!r}: {encoded}")
        yield encoded


def donors(pairs: Sequence[Pair], encoded: Sequence[EncodedPair], seed: int) -> list[tuple[int, ...]]:
    """For each pair the clean token ids of another pair of equal length, drawn evenly from the other prompts of that length.

    Where all others of its length have the same clean prompt, that is the donor. A pair's draw depends on the seed, on itself and
    on which prompts there are, not on how pairs are batched. Raises `NoDonor` where a pair is the only one of its length.
    """
    counts: dict[int, int] = {}
    prompts: dict[int, dict[tuple[int, ...], int]] = {}  # by length: each prompt once, numbered in order of appearance
    for one in encoded:
        counts[len(one.clean)] = counts.get(len(one.clean), 0) + 1
        of_length = prompts.setdefault(len(one.clean), {})
        of_length.setdefault(one.clean, len(of_length))
    chosen = []
    listed = {length: list(of_length) for length, of_length in prompts.items()}
    for pair, one in zip(pairs, encoded, strict=True):
        length = len(one.clean)
        if counts[length] == 1:
            raise NoDonor(
                f"pair {pair.clean!r} has {length} tokens, and no other pair of this run has: its baseline cannot be resampled; "
                "take more pairs (--limit), leave this one out, or take another --baseline"
            )
        others, own = len(listed[length]) - 1, prompts[length][one.clean]
        drawn = random.Random(f"{seed}:{pair.key}").randrange(others) if others else own
        chosen.append(listed[length][drawn + (others > 0 and drawn >= own)])
    return chosen


def _batch(group: list[_Member]) -> PairBatch:
    encoded = [e for _, e, _ in group]
    given = [donor for _, _, donor in group if donor is not None]
    return PairBatch(
        tuple(p for p, _, _ in group),
        torch.tensor([e.clean for e in encoded]),  # (batch, pos)
        torch.tensor([e.corrupt for e in encoded]),  # (batch, pos)
        torch.tensor([e.answer for e in encoded]),  # (batch,)
        torch.tensor([e.wrong_answer for e in encoded]),  # (batch,)
        torch.tensor(given) if given else None,  # (batch, pos)
    )


# ---- files


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> int:
    """Writes one JSON object a line, as `read_pairs` reads them; returns how many."""
    lines = [json.dumps({k: v for k, v in asdict(pair).items() if v is not None}, ensure_ascii=False) + "\n" for pair in pairs]
    write_text(Path(path), "".join(lines))
    return len(lines)


def read_pairs(path: str | Path, tokenizer: Any, *, skip_invalid: bool = False) -> tuple[list[Pair], list[Refusal]]:
    """The pairs of a JSONL file and the lines that gave none.

    A line is an object with `clean`, `corrupt`, `answer`, `wrong_answer`, and optionally `task` (else the file's name without its
    ending) and `label`. A repeated pair is kept once and reported. Any other refusal raises `InvalidPairs`, naming the first line,
    unless `skip_invalid`; a file that holds no valid pair raises `NoPairs` in any case.
    """
    path = Path(path)
    parsed, refusals = _parse_lines(path)
    pairs: list[Pair] = []
    first_line: dict[str, int] = {}
    for (line, pair), encoded in zip(parsed, encode_pairs((p for _, p in parsed), tokenizer), strict=True):
        if isinstance(encoded, str):
            refusals.append(Refusal(line, encoded))
        elif (earlier := first_line.setdefault(pair.key, line)) != line:
            refusals.append(Refusal(line, f"{_DUPLICATE}{earlier}"))
        else:
            pairs.append(pair)
    refusals.sort(key=lambda r: r.line)
    bad = [r for r in refusals if not r.duplicate]
    more = f" (and {len(bad) - 1} more lines)" if len(bad) > 1 else ""
    if bad and not skip_invalid:
        raise InvalidPairs(f"{path} line {bad[0].line}: {bad[0].reason}{more}; correct the file, or leave such lines out by --skip-invalid")
    if not pairs:
        raise NoPairs(f"{path} holds no valid pair: line {bad[0].line}: {bad[0].reason}{more}" if bad else f"{path} holds no pairs: it is empty")
    return pairs, refusals


def _parse_lines(path: Path) -> tuple[list[tuple[int, Pair]], list[Refusal]]:
    """The pairs by line, not yet checked against a tokenizer, and the lines that are none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NoPairs(f"the pairs in {path} cannot be read: {error.strerror or error}") from None
    parsed: list[tuple[int, Pair]] = []
    refusals: list[Refusal] = []
    offset = 0
    for number, raw in enumerate(data.split(b"\n"), start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                parsed.append((number, _parse_pair(text, path.stem)))
        except UnicodeDecodeError as error:
            refusals.append(Refusal(number, f"not UTF-8 at byte {offset + error.start} of the file (0x{raw[error.start]:02x})"))
        except ValueError as error:
            refusals.append(Refusal(number, str(error)))
        offset += len(raw) + 1
    return parsed, refusals


def _parse_pair(text: str, task: str) -> Pair:
    """The pair that one line describes; raises ValueError with the reason where it describes none."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not a pair: nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"not an object but a {type(values).__name__}")
    if absent := [key for key in _REQUIRED if key not in values]:
        raise ValueError(f"lacks {', '.join(map(repr, absent))}")
    if extra := [key for key in values if key not in _REQUIRED + _OPTIONAL]:
        raise ValueError(f"has {', '.join(map(repr, extra))}, which no pair has: its keys are {', '.join(_REQUIRED + _OPTIONAL)}")
    for key, value in values.items():
        if not isinstance(value, str) and not (key in _OPTIONAL and value is None):
            raise ValueError(f"{key} is {json.dumps(value)[:40]}, not a text")
        if key in _REQUIRED and not value:
            raise ValueError(f"{key} is empty")
        if value and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{key} holds half of a surrogate pair, which is no text")
    clean, corrupt, answer, wrong_answer = (values[key] for key in _REQUIRED)
    return Pair(clean, corrupt, answer, wrong_answer, values.get("task") or task, values.get("label"))
