"""Samples of nodes: one pass over a corpus or a task's prompts, kept token by token instead of summed up.

1. A `SampleSource` is the texts: blocks of a corpus (`text_source`), or the prompts of a task's pairs (`task_source`). Where they have more than
   `max_tokens` tokens, whole texts are drawn from all of them at random, by seed, and kept in order: never tokens of a text, never the first ones.
2. `plan_samples` gives the run its key, by a hash of model, dictionaries, texts, basis and what that depends on. A run that is there already
   is returned as it is.
3. For each batch a measure of `statistics` gives each site's nodes (activations, or attributions), which are appended to the run's files: memory
   holds the texts' tokens and one batch.

Batch size, device and the seed that drew the texts are no part of the key: the same texts give the same samples, to rounding.
"""

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy import sparse  # type: ignore[import-untyped]

from ..model.baselines import NodeMoments
from ..model.binding import bind
from ..model.corpus import read_texts, token_blocks
from ..model.dictionaries import Dictionary
from ..model.loading import LoadedModel
from ..model.pairs import InvalidPairs, Pair, encode_pairs
from ..model.sites import Site
from ..model.tasks import batches as pair_batches
from ..queries.samples import SampleRun, SampleStore, SampleWriter
from .effective import EdgeSettings
from .moments import NotFinite, SparseNodes
from .statistics import (
    KEY_LENGTH,
    BadStatisticsOptions,
    EmptyCorpus,
    Measure,
    Progress,
    StatisticsOptions,
    TokenBatch,
    activation_measure,
    attribution_arguments,
    attribution_measure,
    token_texts,
)

MAX_TOKENS = 100_000
"""Tokens of a run unless another number is given. 2,048 features of which 32 are on take 25 MB a site, 576 neurons 230 MB."""

LABELLED = frozenset({"profession_gender"})
"""Tasks whose own label is the class of a prompt; of all others it is what is right to follow."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How texts become samples. length: tokens per block of a corpus. batch_size: sequences (or pairs) in one run of the model.

    skip_positions: first positions left out; None is 1 for corpora, 0 for tasks. max_tokens: at most so many tokens. seed: draws the texts.
    """

    length: int = 128
    batch_size: int = 8
    skip_positions: int | None = None
    max_tokens: int = MAX_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise BadStatisticsOptions(f"--max-tokens {self.max_tokens} samples nothing: give at least 1")
        self.statistics  # noqa: B018 - checks the others

    @property
    def statistics(self) -> StatisticsOptions:
        """The same for a corpus of statistics."""
        return StatisticsOptions(length=self.length, batch_size=self.batch_size, skip_positions=self.skip_positions)


@dataclass(frozen=True, eq=False)
class SampleSource:
    """Texts to sample, in batches of sequences of equal length. sequences: one row each, in order, as `SEQUENCE_COLUMNS`, and more of tasks.

    first_position: positions before it are left out. n_available: how many sequences they were drawn from. donor_seed: that of the pairs' donors.
    """

    name: str
    batches: tuple[TokenBatch, ...]
    sequences: pl.DataFrame
    first_position: int
    n_available: int
    donor_seed: int | None = None

    @property
    def n_sequences(self) -> int:
        return self.sequences.height

    @cached_property
    def n_tokens(self) -> int:
        """Tokens that are measured."""
        return sum(len(batch.tokens) * (batch.tokens.shape[1] - self.first_position) for batch in self.batches)

    @cached_property
    def hash(self) -> str:
        """Of the tokens and keys of all sequences, in order."""
        digest = hashlib.sha256("\n".join(self.sequences["key"]).encode())
        for row in (row for batch in self.batches for row in batch.tokens):
            digest.update(len(row).to_bytes(8, "little") + row.to(torch.int64).cpu().numpy().tobytes())
        return digest.hexdigest()[:KEY_LENGTH]


# -- 1. Texts ------------------------------------------------------------------------------------------------


def text_source(spec: str, tokenizer: Any, options: SampleOptions, *, max_sequences: int | None = None) -> SampleSource:
    """Blocks of a text corpus (see `read_texts`): of its first `max_sequences`, all unless given, as many as the tokens allow, drawn by seed.

    The corpus is read once; only the blocks drawn are held. Raises `EmptyCorpus`, `BadStatisticsOptions`, and what `read_texts` raises.
    """
    first = 1 if options.skip_positions is None else options.skip_positions
    measured = options.length - first
    if measured < 1:
        raise BadStatisticsOptions(f"--skip-positions is {first} and --length {options.length}: no position would be left")
    room = options.max_tokens // measured
    if room < 1:
        raise BadStatisticsOptions(f"--max-tokens {options.max_tokens} is less than one block of {measured} tokens: raise it, or lower --length")
    random = np.random.default_rng(options.seed)
    drawn: list[tuple[float, int, torch.Tensor]] = []  # the blocks with the smallest random numbers so far, the largest of them first
    count = 0
    for count, block in enumerate(token_blocks(read_texts(spec), tokenizer, options.length, limit=max_sequences), start=1):
        (heapq.heappush if len(drawn) < room else heapq.heappushpop)(drawn, (-random.random(), count, block))
    if not count:
        raise EmptyCorpus(f"corpus {spec!r} has fewer than {options.length} tokens: give more text or a smaller --length")
    tokens = torch.stack([block for _, _, block in sorted(drawn, key=lambda entry: entry[1])])  # (sequence, pos)
    texts = tokenizer.batch_decode(tokens.tolist(), clean_up_tokenization_spaces=False)
    nothing = pl.Series([None] * len(tokens), dtype=pl.String)
    keys = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:KEY_LENGTH] for row in tokens.to(torch.int64)]
    frame = {"sequence": np.arange(len(tokens)), "key": keys, "task": nothing, "label": nothing, "text": texts}
    return SampleSource(spec, tuple(TokenBatch(part) for part in tokens.split(options.batch_size)), pl.DataFrame(frame), first, count)


def task_source(
    name: str,
    pairs: Sequence[Pair],
    tokenizer: Any,
    options: SampleOptions,
    *,
    clean_only: bool = False,
    donor_seed: int | None = None,
    device: torch.device | str = "cpu",
) -> SampleSource:
    """The prompts of pairs, as many pairs as the tokens allow, drawn by seed: of each the clean one, then (unless `clean_only`) the corrupted.

    A prompt's label is its class: what is right to follow it, for the tasks `LABELLED` their own label. The prompts of a pair have its key.
    With a `donor_seed` the pairs have donors, for attributions from a resampled baseline. Raises `InvalidPairs`, `NoDonor`, `EmptyCorpus`,
    `BadStatisticsOptions`.
    """
    parts = ("clean",) if clean_only else ("clean", "corrupt")
    first = options.skip_positions or 0
    chosen = _drawn_pairs(pairs, tokenizer, options, len(parts))
    if not chosen:
        raise EmptyCorpus(f"task {name!r} has no pairs")
    batches, rows = [], []
    for batch in pair_batches(chosen, tokenizer, batch_size=options.batch_size, donor_seed=donor_seed):
        tokens = torch.stack([getattr(batch, part) for part in parts], dim=1).flatten(0, 1)  # (batch · parts, pos): a pair's prompts side by side
        if tokens.shape[1] <= first:
            raise BadStatisticsOptions(f"--skip-positions is {first}, but a prompt has {tokens.shape[1]} tokens: no position would be left")
        batches.append(TokenBatch(tokens, batch.to(device)))
        rows += [(pair.key, pair.task, _label(pair, part), getattr(pair, part), part, pair.label) for pair in batch.pairs for part in parts]
    columns = ["key", "task", "label", "text", "part", "task_label"]
    frame = pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row").with_row_index("sequence")
    return SampleSource(name, tuple(batches), frame, first, len(pairs) * len(parts), donor_seed)


def _drawn_pairs(pairs: Sequence[Pair], tokenizer: Any, options: SampleOptions, prompts: int) -> list[Pair]:
    """As many pairs as the tokens allow, shorter ones first, in order: an order that is the same in batches of any size."""
    lengths = []
    for pair, encoded in zip(pairs, encode_pairs(pairs, tokenizer), strict=True):
        if isinstance(encoded, str):
            raise InvalidPairs(f"pair {pair.clean!r}: {encoded}")
        lengths.append(len(encoded.clean))
    tokens = prompts * (np.array(lengths, dtype=np.int64) - (options.skip_positions or 0))
    order = np.random.default_rng(options.seed).permutation(len(pairs))
    kept = order[np.cumsum(tokens[order]) <= options.max_tokens] if tokens.sum() > options.max_tokens else order
    if len(order) and not len(kept):
        raise BadStatisticsOptions(f"--max-tokens {options.max_tokens} is less than one pair of {tokens[order[0]]} tokens: raise it")
    return [pairs[i] for i in sorted(kept, key=lambda i: (lengths[i], i))]


def _label(pair: Pair, part: str) -> str:
    """The class of a prompt of a pair."""
    right, wrong = pair.answer.strip(), pair.wrong_answer.strip()
    if pair.task in LABELLED and pair.label is not None:
        return pair.label if part == "clean" else pair.label.replace(right, wrong)
    return right if part == "clean" else wrong


# -- 2. and 3. The run ---------------------------------------------------------------------------------------


def plan_samples(
    model: LoadedModel,
    dictionaries: Mapping[Site, Dictionary],
    source: SampleSource,
    options: SampleOptions,
    *,
    settings: EdgeSettings | None = None,
    statistics_run: str | None = None,
    named: Mapping[str, str] | None = None,
) -> SampleRun:
    """The run's record with its key; of attributions where there are `settings`, else of activations.

    named: what the model and the dictionaries were called, so that they can be opened again; no part of the key.
    """
    sites = [site for site in bind(model).graph(dictionaries).sites if site in dictionaries]
    basis = "activation" if settings is None else "attribution"
    arguments: dict[str, object] = {"skip_positions": source.first_position, "dtype": str(model.dtype).removeprefix("torch.")}
    if settings is not None:
        arguments |= attribution_arguments(settings, donor_seed=source.donor_seed, statistics_run=statistics_run)
    ids = {site.name: dictionaries[site].id for site in sites}
    widths = [[site.name, dictionaries[site].d_sae] for site in sites]
    identity = {"model": model.key, "dictionaries": ids, "widths": widths, "texts": source.hash, "basis": basis, "arguments": arguments}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
    described = {**arguments, "max_tokens": options.max_tokens, "seed": options.seed, "n_available": source.n_available, "texts": source.hash}
    if named is not None:
        described["named"] = dict(named)
    return SampleRun(key, model.key, basis, source.name, ids, source.n_sequences, source.n_tokens, described, source.sequences)


def collect_samples(
    store: SampleStore,
    model: LoadedModel,
    dictionaries: Mapping[Site, Dictionary],
    source: SampleSource,
    options: SampleOptions,
    *,
    settings: EdgeSettings | None = None,
    means: Mapping[Site, NodeMoments] | None = None,
    statistics_run: str | None = None,
    named: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> SampleRun:
    """Sample the nodes of `dictionaries`' sites into `store`; returns the run. One that is there already is returned, and nothing is computed.

    With `settings` the samples are attributions (gradient · (node − baseline)) of a `task_source` with `clean_only`, else activations; `means` and
    `statistics_run` are as in `measure_attributions`. Raises `NotFinite` naming the site, and `BadStatisticsOptions` for attributions of a corpus.
    """
    planned = plan_samples(model, dictionaries, source, options, settings=settings, statistics_run=statistics_run, named=named)
    if store.has(planned.key):
        return store.find(planned.key)
    binding = bind(model)
    if settings is None:
        measure = activation_measure(binding, dictionaries, source.first_position)
    else:
        measure = attribution_measure(binding, dictionaries, settings, means=means, first_position=source.first_position)
    with store.writing(planned.key) as writer:
        _collect(writer, source, measure, model.tokenizer, progress)
        return writer.finish(planned)


def _collect(writer: SampleWriter, source: SampleSource, measure: Measure, tokenizer: Any, progress: Progress | None) -> None:
    first, tokens = source.first_position, 0
    sequences = 0
    for batch in source.batches:
        for site, nodes in measure(batch).items():
            writer.add(site.name, _matrix(nodes, site))
        measured = batch.tokens[:, first:].cpu().numpy()  # (batch, pos)
        n, length = measured.shape
        place = {"sequence": np.repeat(np.arange(n) + sequences, length), "position": np.tile(np.arange(length) + first, n)}
        writer.add_tokens(pl.DataFrame({**place, "text": token_texts(measured, tokenizer)}))
        sequences, tokens = sequences + n, tokens + measured.size
        if progress is not None:
            progress(sequences, source.n_sequences, tokens)


def _matrix(nodes: SparseNodes, site: Site) -> Any:
    """The features of a batch as a CSR matrix (n_rows, d_sae); its entries are sorted by row already."""
    if not torch.isfinite(nodes.value).all():
        raise NotFinite(f"site {site}: a node has the value NaN or infinity: run the model in float32, or in bfloat16 rather than float16")
    row, feature, value = (part.cpu().numpy() for part in (nodes.row, nodes.feature, nodes.value.float()))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=nodes.n_rows))])
    return sparse.csr_matrix((value, feature, indptr), shape=(nodes.n_rows, nodes.d_sae))
