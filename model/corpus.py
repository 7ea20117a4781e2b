"""Corpora: texts from files, folders, JSONL or a Hugging Face data set, cut into blocks of tokens.

1. `read_texts` streams texts, one at a time, whatever the source, so that any corpus size fits.
2. `token_blocks` joins the texts with the tokenizer's end-of-text token and cuts the stream into equal blocks.
3. `prompt_tokens` keeps short texts apart instead: each starts at position 0, as the prompts of a task do.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .beginning import adds_beginning

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".text"})
"""Endings of the files that a folder contributes, beside `.jsonl`."""

_PIECE = 20_000
# A plain text file is handed on in pieces of about this many characters, cut at a blank line where there is one:
# a tokenizer slows down on one text of many megabytes.


class NotUtf8(UserError):
    """A corpus file is not UTF-8 text."""


class NoCorpus(UserError):
    """A corpus is named that is neither a file, nor a folder, nor a data set."""


class BadRecord(UserError):
    """A line of a JSONL corpus is no object with a string `text`."""


def read_texts(spec: str | Path, *, limit: int | None = None) -> Iterator[str]:
    """Stream the texts of a corpus, at most `limit` of them, always in the same order.

    `spec` is a text file, a folder (its `.txt`, `.md`, `.rst` and `.jsonl` files, sub-folders included, by path), a
    `.jsonl` file with an object with `text` on each line, or the name of a Hugging Face data set (`name`,
    `name:configuration`, split `train`, column `text`). Raises `NotUtf8` with file and byte, `BadRecord` with file and
    line, `NoCorpus` for a name that leads nowhere.
    """
    return islice(_texts(str(spec)), limit)


def _texts(spec: str) -> Iterator[str]:
    path = Path(spec)
    if path.is_file():
        yield from _file_texts(path)
    elif path.is_dir() and not _is_data_set(path):
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES or p.suffix == ".jsonl")
        if not files:
            raise NoCorpus(f"folder {spec!r} holds no text: put .txt, .md, .rst or .jsonl files there")
        for file in files:
            yield from _file_texts(file)
    else:
        yield from _data_set_texts(spec)


def _file_texts(path: Path) -> Iterator[str]:
    return _jsonl_texts(path) if path.suffix == ".jsonl" else _pieces(path)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a file, decoded one by one so that a wrong byte can be named by its place in the file."""
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise NotUtf8(
                    f"{path} is not UTF-8 text: byte {offset + error.start} is 0x{line[error.start]:02x}; convert it, for example by iconv"
                ) from None
            offset += len(line)


def _pieces(path: Path) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in _lines(path):
        if (size >= _PIECE and not line.strip()) or size >= 2 * _PIECE:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if "".join(piece).strip():
        yield "".join(piece)


def _jsonl_texts(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = getattr(error, "msg", str(error))
            raise BadRecord(f'{path} line {number} is no JSON: {what}; each line is an object such as {{"text": "…"}}') from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise BadRecord(f'{path} line {number} has no string "text"; each line is an object such as {{"text": "…"}}')
        yield text


def _is_data_set(path: Path) -> bool:
    """Whether a folder is a data set that `datasets` saved (Arrow shards with a state file) or Parquet files."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists() or any(path.glob("*.parquet"))


def _data_set_texts(spec: str) -> Iterator[str]:
    data = _open_data_set(spec)
    for row in data:
        text = row.get("text")
        if not isinstance(text, str):
            raise NoCorpus(f'data set {spec!r} has no text column "text": its columns are {", ".join(sorted(row))}')
        yield text


def _open_data_set(spec: str) -> Iterable[dict[str, Any]]:
    # datasets takes a second to import and is needed for this one source only.
    import datasets

    path = Path(spec)
    if path.is_dir():
        if any(path.glob("*.parquet")):
            return datasets.load_dataset("parquet", data_dir=spec, split="train", streaming=True)
        loaded = datasets.load_from_disk(spec)
        return loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
    name, _, configuration = spec.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    except (FileNotFoundError, ValueError, OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NoCorpus(f"no corpus {spec!r}: no such file or folder, and as a Hugging Face data set it cannot be opened ({reason})") from error


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def token_blocks(texts: Iterable[str], tokenizer: Any, length: int, *, limit: int | None = None) -> Iterator[Tensor]:
    """Blocks of exactly `length` tokens, int64 (length,), at most `limit` of them.

    Texts follow each other with the end-of-text token between them; a tokenizer with a beginning-of-text token puts it
    first in every block, as the model saw it in training. What does not fill a last block is left out.
    """
    if length < 2:
        raise UserError(f"blocks of {length} tokens: a block needs at least 2")
    return islice(_blocks(texts, tokenizer, length), limit)


def _blocks(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[Tensor]:
    start = [tokenizer.bos_token_id] if adds_beginning(tokenizer) else []
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    room = length - len(start)
    pending: list[int] = []
    for text in texts:
        pending += _encode(tokenizer, text) + separator
        whole = len(pending) // room * room
        for begin in range(0, whole, room):
            yield torch.tensor(start + pending[begin : begin + room])  # (length,)
        del pending[:whole]


def prompt_tokens(prompts: Sequence[str], tokenizer: Any, *, longest: int) -> Iterator[Tensor]:
    """Each prompt by itself, int64 (pos,), cut at `longest` tokens, with the special tokens that the tokenizer adds.

    Prompts of fewer than two tokens are left out: nothing remains of them once position 0 is dropped.
    """
    for prompt in prompts:
        tokens = tokenizer(prompt, add_special_tokens=True, verbose=False)["input_ids"][:longest]
        if len(tokens) >= 2:
            yield torch.tensor(tokens)  # (pos,)
