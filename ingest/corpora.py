"""Corpora: finite, repeatable sources of token sequences, from texts or from the pairs of a task, counted and hashed."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..model.corpus import read_texts, token_blocks
from ..model.tasks import Pair, PairBatch
from ..model.tasks import batches as pair_batches
from .statistics_options import BadStatisticsOptions, StatisticsOptions

KEY_LENGTH = 24


class EmptyCorpus(UserError):
    """The corpus has not even one sequence of the length asked for."""


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of equal length, tokens (batch, pos); `pairs` where they come from a task."""

    tokens: Tensor
    pairs: PairBatch | None = None


class BatchMark(NamedTuple):
    """What is known of a batch before it is measured: `n` sequences of `length` tokens, and a hash of them."""

    n: int
    length: int
    digest: str


@dataclass(frozen=True)
class Corpus:
    """A finite, repeatable source of sequences.

    hash: of all tokens in order. batches: starts it anew, always the same batches. keys: names of the sequences in order, for tasks.
    first_position: positions before it are left out. donor_seed: where the pairs have donors, the seed by which they were drawn.
    marks: of its batches in order, by which it is cut into shards. One that is not counted has no hash, number or marks, only batches.
    """

    name: str
    hash: str
    n_sequences: int
    batches: Callable[[], Iterator[TokenBatch]]
    first_position: int
    keys: tuple[str, ...] = ()
    donor_seed: int | None = None
    marks: tuple[BatchMark, ...] = ()


def text_corpus(
    spec: str,
    tokenizer: Any,
    options: StatisticsOptions,
    *,
    max_sequences: int | None = None,
    max_texts: int | None = None,
    counted: bool = True,
) -> Corpus:
    """The blocks of `options.length` tokens of a text corpus (see `read_texts`), at most `max_sequences` of them.

    Reads and tokenises the corpus once to count and hash it, unless not `counted`. Raises `EmptyCorpus`, and what `read_texts` raises.
    """
    first = 1 if options.skip_positions is None else options.skip_positions
    if first >= options.length:
        raise BadStatisticsOptions(f"skip_positions is {first} and length {options.length}: no position would be left")
    blocks = lambda: token_blocks(read_texts(spec, limit=max_texts), tokenizer, options.length, limit=max_sequences)
    batches = lambda: _stacked(blocks(), options.batch_size)
    if not counted:
        return Corpus(spec, "", 0, batches, first)
    digest, marks = _hash_batches(batches())
    if not marks:
        raise EmptyCorpus(f"corpus {spec!r} has fewer than {options.length} tokens: give more text or a smaller length")
    return Corpus(spec, digest, _count(marks), batches, first, marks=marks)


def pair_corpus(
    name: str,
    pairs: Sequence[Pair],
    tokenizer: Any,
    options: StatisticsOptions,
    *,
    clean_only: bool = False,
    donor_seed: int | None = None,
    device: torch.device | str = "cpu",
    counted: bool = True,
) -> Corpus:
    """The sequences of a task: of each batch of pairs the clean ones, then (unless `clean_only`) the corrupted ones.

    With a `donor_seed` the pairs have donors, for attributions from a resampled baseline. Raises `NoDonor` for a pair that can have none.
    """
    first = options.skip_positions or 0

    def batches() -> Iterator[TokenBatch]:
        for batch in pair_batches(pairs, tokenizer, batch_size=options.batch_size, donor_seed=donor_seed):
            tokens = batch.clean if clean_only else torch.cat([batch.clean, batch.corrupt])
            if tokens.shape[1] <= first:
                raise BadStatisticsOptions(f"skip_positions is {first}, but a sequence has {tokens.shape[1]} tokens: no position would be left")
            yield TokenBatch(tokens, batch.to(device))

    if not counted:
        return Corpus(name, "", 0, batches, first, donor_seed=donor_seed)
    digest, marks = _hash_batches(batches())
    if not marks:
        raise EmptyCorpus(f"task {name!r} has no pairs")
    keys = [pair.key for batch in pair_batches(pairs, tokenizer, batch_size=options.batch_size) for pair in batch.pairs * (1 if clean_only else 2)]
    return Corpus(name, digest, _count(marks), batches, first, tuple(keys), donor_seed, marks)


def _stacked(blocks: Iterable[Tensor], batch_size: int) -> Iterator[TokenBatch]:
    blocks = iter(blocks)
    while batch := list(islice(blocks, batch_size)):
        yield TokenBatch(torch.stack(batch))  # (batch, pos)


def _hash_batches(batches: Iterable[TokenBatch]) -> tuple[str, tuple[BatchMark, ...]]:
    """sha256 over the shapes and tokens of all batches, and the mark of each."""
    digest, marks = hashlib.sha256(), []
    for batch in batches:
        described = _described(batch)
        digest.update(described)
        marks.append(_mark(batch, described))
    return digest.hexdigest()[:KEY_LENGTH], tuple(marks)


def _described(batch: TokenBatch) -> bytes:
    return repr(tuple(batch.tokens.shape)).encode() + batch.tokens.to(torch.int64).cpu().numpy().tobytes()


def _mark(batch: TokenBatch, described: bytes) -> BatchMark:
    return BatchMark(len(batch.tokens), batch.tokens.shape[1], hashlib.sha256(described).hexdigest()[:16])


def mark(batch: TokenBatch) -> BatchMark:
    """The mark of a batch."""
    return _mark(batch, _described(batch))


def _count(marks: Sequence[BatchMark]) -> int:
    return sum(found.n for found in marks)


def shuffled_corpus(corpus: Corpus, batch_size: int, seed: int) -> Corpus:
    """The sequences in random order, those of one length together, in full batches; what does not fill one is left out.

    Neighbouring blocks of a text are of one document and depend on each other; so that they rarely share a batch, all tokens are held in memory.
    """
    by_length: dict[int, list[Tensor]] = {}
    for batch in corpus.batches():
        by_length.setdefault(batch.tokens.shape[1], []).append(batch.tokens.cpu())
    random = np.random.default_rng(seed)
    shuffled = []
    for length in sorted(by_length):
        tokens = torch.cat(by_length[length])
        tokens = tokens[torch.from_numpy(random.permutation(len(tokens)))]
        shuffled += [TokenBatch(part) for part in tokens.split(batch_size) if len(part) == batch_size]
    digest, marks = _hash_batches(shuffled)
    if not marks:
        raise EmptyCorpus(f"corpus {corpus.name!r} has no {batch_size} sequences of one length to shuffle: give more text, or a smaller batch size")
    return Corpus(corpus.name, digest, _count(marks), lambda: iter(shuffled), corpus.first_position, marks=marks)
