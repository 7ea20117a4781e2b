"""Aligned samples: the features of two models, checkpoints or sets of dictionaries on the same pieces of the same text.

1. `token_spans`: both tokenizers cut a text; each token has its characters. They must be in order and leave out white space at most (`SpansDiffer`).
   White space between tokens belongs to the token after it.
2. `cut`: a *segment* ends wherever a token of both sides ends (a character in several tokens cannot be cut). Tokenizers that cut a text
   alike make a segment of every token.
3. `aligned_corpus`, `aligned_task`: texts become `Windows` of whole segments, of at most `length` tokens on either side. Each side runs the tokens
   that its tokenizer made of the text as a whole, after its beginning-of-text token where it has one.
4. `collect_aligned`: one pass for each side, one model after the other. A side's tokens in a segment are pooled; tokens that are no text are in none.
   Side A's raw values wait in files of the hidden folder, and while side B is measured their products are summed.

A token sees what stands before it in its own window, so the two sides see the same text, however they cut it.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from torch import Tensor

from ..errors import UserError
from ..model.beginning import adds_beginning
from ..model.binding import bind, capture_sites
from ..model.corpus import read_texts
from ..model.dictionaries import Dictionary
from ..model.loading import LoadedModel
from ..model.pairs import Pair
from ..model.sites import Site
from ..queries.matches import Aligned, AlignedStore, finish_aligned
from ..queries.samples import SampleRun, SampleStore, SampleWriter
from .moments import NotFinite
from .samples import LABELLED
from .statistics import KEY_LENGTH, BadStatisticsOptions, EmptyCorpus

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MAX_SEGMENTS = 20_000
"""Segments of a run unless another number is given."""

MEMORY = 2 * 1024**3
"""Bytes that sums of products may take unless another number is given."""


class NoSpans(UserError):
    """A tokenizer cannot say which characters a token is of."""


class SpansDiffer(UserError):
    """A tokenizer's tokens are not the text that they were made of."""


class NothingInCommon(UserError):
    """Two tokenizers share no boundary within the length allowed."""


class TooManyProducts(UserError):
    """The sites' products would not fit into memory."""


class Pool(StrEnum):
    """What one value is made of a segment's several tokens."""

    MAX = "max"
    """The value of the greatest magnitude, of each feature by itself."""
    LAST = "last"
    """The value at the segment's last token, which has seen all of it."""
    MEAN = "mean"
    """The mean."""


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """How texts become aligned samples.

    length: tokens of a window at most, on either side. skip_positions: segments with one of the first so many positions of either side are left out;
    None is 1 for corpora, 0 for tasks. max_segments: at most so many, whole windows drawn by `seed` where the texts have more. pool: see `Pool`;
    raw values are pooled by their last token with `last`, else by their mean. covariances: sum products of raw values. memory: bytes for those.
    """

    length: int = 128
    batch_size: int = 8
    skip_positions: int | None = None
    max_segments: int = MAX_SEGMENTS
    pool: Pool = Pool.MAX
    covariances: bool = True
    memory: int = MEMORY
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("batch_size", 1), ("max_segments", 1), ("skip_positions", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadStatisticsOptions(f"{name} is {value}: it must be at least {least}")


# -- 1. Tokens and their characters --------------------------------------------------------------------------


class Spans(NamedTuple):
    """The tokens of a text: their ids, and the characters [start, end) that each is of, all (n_tokens,)."""

    ids: IntArray
    start: IntArray
    end: IntArray


def token_spans(tokenizer: Any, text: str) -> Spans:
    """A text's tokens without special ones, each with its characters. Raises `NoSpans` and `SpansDiffer`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise NoSpans(
            f"{type(tokenizer).__name__} cannot say which characters a token is of: a model with a fast tokenizer (tokenizer.json) is needed to align"
        )
    if backend.truncation is not None or backend.padding is not None:  # of an earlier caller, or of the file
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    encoded = backend.encode(text, add_special_tokens=False)
    span = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
    spans = Spans(np.array(encoded.ids, dtype=np.int64), span[:, 0], span[:, 1])
    _check(spans, text, tokenizer)
    return spans


def _check(spans: Spans, text: str, tokenizer: Any) -> None:
    """Tokens in order, and between them nothing but white space."""
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    _, start, end = spans
    if not len(start):
        start = end = np.zeros(0, dtype=np.int64)
    back = np.flatnonzero((np.diff(start) < 0) | (np.diff(end) < 0))
    if len(back):
        at = int(start[back[0] + 1])
        raise SpansDiffer(f"the tokenizer {name} does not keep the order of {_shown(text, at)} (character {at}): its tokens cannot be aligned")
    gap_from, gap_to = np.concatenate([[0], end]), np.concatenate([start, [len(text)]])
    for i in np.flatnonzero(gap_to > gap_from):
        lost = text[gap_from[i] : gap_to[i]]
        if lost.strip():
            raise SpansDiffer(
                f"the tokenizer {name} leaves out {lost.strip()[:20]!r} of {_shown(text, int(gap_from[i]))} (character {gap_from[i]}): "
                "text that it loses cannot be aligned; leave such characters out of the text"
            )


def _shown(text: str, at: int) -> str:
    return repr(text[max(at - 15, 0) : at + 15])


# -- 2. Segments ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Segments:
    """A text cut at the characters that both sides share. end: (n,), the character at which each segment ends.

    a, b: (n + 1,), the first token of each segment on either side, and the number of tokens at the end.
    """

    text: str
    end: IntArray
    spans_a: Spans
    spans_b: Spans
    a: IntArray
    b: IntArray

    @property
    def n(self) -> int:
        return len(self.end)

    def first_character(self, segment: int) -> int:
        """Where a segment begins."""
        return int(self.end[segment - 1]) if segment else 0

    def texts(self, start: int, stop: int) -> list[str]:
        """The texts of the segments from `start` on, before `stop`."""
        ends = [self.first_character(start), *self.end[start:stop].tolist()]
        return [self.text[one:other] for one, other in pairwise(ends)]


def cut(text: str, spans_a: Spans, spans_b: Spans) -> Segments:
    """The segments of a text: one for every token where both sides cut it alike, else as fine as both allow."""
    if np.array_equal(spans_a.start, spans_b.start) and np.array_equal(spans_a.end, spans_b.end):
        tokens = np.arange(len(spans_a.end) + 1)
        return Segments(text, spans_a.end, spans_a, spans_b, tokens, tokens)
    shared = np.intersect1d(_boundaries(spans_a), _boundaries(spans_b))
    return Segments(text, shared, spans_a, spans_b, _first_tokens(spans_a, shared), _first_tokens(spans_b, shared))


def _boundaries(spans: Spans) -> IntArray:
    """The characters at which the text can be cut without cutting a token, or a character that several tokens are of."""
    following = np.append(spans.start[1:], np.iinfo(np.int64).max)
    ends = spans.end[following >= spans.end]
    return np.unique(ends[ends > 0])


def _first_tokens(spans: Spans, shared: IntArray) -> IntArray:
    """The first token of each segment, and how many tokens there are up to the last boundary, (n_segments + 1,). Tokens of no characters are with
    those before them."""
    return np.concatenate([[0], np.searchsorted(spans.end, shared, side="right")]).astype(np.int64)


# -- 3. Windows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Window:
    """Whole segments of one text. ids: each side's tokens, special ones not yet among them. segment: each token's segment, counted in the window."""

    ids: tuple[IntArray, IntArray]
    segment: tuple[IntArray, IntArray]
    texts: tuple[str, ...]
    key: str
    task: str | None = None
    label: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, eq=False)
class Windows:
    """Texts to align. rows: for each window, which of its segments are measured. beginnings: each side's beginning-of-text token, or None."""

    name: str
    windows: tuple[Window, ...]
    rows: tuple[IntArray, ...]
    beginnings: tuple[int | None, int | None]
    n_available: int
    of_task: bool = False

    @cached_property
    def n_segments(self) -> int:
        """Segments that are measured."""
        return sum(map(len, self.rows))

    @property
    def tokens_per_segment(self) -> tuple[float, float]:
        """Tokens of either side in a segment, on average."""
        segments = sum(len(window.texts) for window in self.windows)
        return tuple(sum(len(window.ids[side]) for window in self.windows) / segments for side in (0, 1))  # type: ignore[return-value]

    @cached_property
    def hash(self) -> str:
        """Of all tokens and segments, in order."""
        digest = hashlib.sha256(json.dumps([window.key for window in self.windows] + [list(self.beginnings)]).encode())
        for window, rows in zip(self.windows, self.rows):
            for part in (*window.ids, *window.segment, rows):
                digest.update(len(part).to_bytes(8, "little") + np.ascontiguousarray(part, dtype=np.int64).tobytes())
        return digest.hexdigest()[:KEY_LENGTH]

    def sequences(self) -> pl.DataFrame:
        """One row per window, as runs of samples have them."""
        rows = [(i, window.key, window.task, window.label, window.text) for i, window in enumerate(self.windows)]
        names = {"sequence": pl.Int64, "key": pl.String, "task": pl.String, "label": pl.String, "text": pl.String}
        return pl.DataFrame(rows, schema=names, orient="row")


def beginning(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a text, if it does."""
    return int(tokenizer.bos_token_id) if adds_beginning(tokenizer) else None


def aligned_corpus(spec: str, tokenizers: tuple[Any, Any], options: AlignOptions, *, limit: int | None = None) -> Windows:
    """Windows of a text corpus (see `read_texts`): of its first `limit`, all unless given, as many as the segments allow, drawn by seed.

    Raises `EmptyCorpus`, `NothingInCommon`, `NoSpans`, `SpansDiffer` and what `read_texts` raises.
    """
    first = 1 if options.skip_positions is None else options.skip_positions
    beginnings = (beginning(tokenizers[0]), beginning(tokenizers[1]))
    drawn: list[tuple[float, int, Window, IntArray]] = []  # those with the smallest random numbers so far, the largest of them first
    random, n, total = np.random.default_rng(options.seed), 0, 0
    for window in _corpus_windows(spec, tokenizers, beginnings, options.length):
        if n == limit:
            break
        rows = _measured(window, beginnings, first)
        if not len(rows):
            continue
        heapq.heappush(drawn, (-random.random(), n, window, rows))
        n, total = n + 1, total + len(rows)
        while total > options.max_segments:
            total -= len(heapq.heappop(drawn)[3])
    if not n:
        raise EmptyCorpus(f"corpus {spec!r} has no text of two segments or more: give more text, or a greater --length than {options.length}")
    if not drawn:
        raise BadStatisticsOptions(f"--max-segments {options.max_segments} is less than one window of text: raise it, or lower --length")
    chosen = sorted(drawn, key=lambda entry: entry[1])
    return Windows(spec, tuple(entry[2] for entry in chosen), tuple(entry[3] for entry in chosen), beginnings, n)


def _corpus_windows(spec: str, tokenizers: tuple[Any, Any], beginnings: tuple[int | None, int | None], length: int) -> Iterator[Window]:
    room = tuple(length - (token is not None) for token in beginnings)
    for text in read_texts(spec):
        segments = cut(text, *(token_spans(tokenizer, text) for tokenizer in tokenizers))
        for start, stop in _windows(segments, room):
            yield _window(segments, start, stop)


def _windows(segments: Segments, room: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The segments [start, stop) of each window: as many as both sides have room for, one after the other, at least two.

    Segments that are longer than the room are left out; raises `NothingInCommon` where all of a text's are.
    """
    start, found = 0, False
    while start < segments.n:
        stop = min(int(np.searchsorted(side, side[start] + most, side="right")) - 1 for side, most in zip((segments.a, segments.b), room))
        if stop - start >= 2:
            found = True
            yield start, stop
        start = max(stop, start + 1)
    if not found and max(len(segments.spans_a.ids) - room[0], len(segments.spans_b.ids) - room[1]) > 0:
        raise NothingInCommon(
            f"the two tokenizers share no two boundaries within {room[0]} and {room[1]} tokens of {segments.text[:30]!r}…: give a greater --length, "
            "or another text"
        )


def _window(segments: Segments, start: int, stop: int, **more: Any) -> Window:
    sides = [(segments.spans_a, segments.a), (segments.spans_b, segments.b)]
    ids = tuple(spans.ids[first[start] : first[stop]] for spans, first in sides)
    segment = tuple(np.repeat(np.arange(stop - start), np.diff(first[start : stop + 1])) for _, first in sides)
    texts = tuple(segments.texts(start, stop))
    key = hashlib.sha256("".join(texts).encode()).hexdigest()[:KEY_LENGTH]
    return Window(**{"ids": ids, "segment": segment, "texts": texts, "key": key, **more})


def _measured(window: Window, beginnings: tuple[int | None, int | None], first: int) -> IntArray:
    """The segments of a window that hold tokens on both sides, and none at a position before `first` on either."""
    kept = np.ones(len(window.texts), dtype=bool)
    for segment, start in zip(window.segment, beginnings):
        early = max(first - (start is not None), 0)
        kept[segment[:early]] = False
        kept &= np.bincount(segment, minlength=len(kept)) > 0
    return np.flatnonzero(kept)


def aligned_task(name: str, pairs: Sequence[Pair], tokenizers: tuple[Any, Any], options: AlignOptions) -> Windows:
    """The prompts of pairs, of each the clean one, then the corrupted; as many pairs, drawn by seed, as the segments allow.

    A prompt is a window whatever its length. Raises `EmptyCorpus`, `NothingInCommon`, `NoSpans` and `SpansDiffer`.
    """
    beginnings = (beginning(tokenizers[0]), beginning(tokenizers[1]))
    first = options.skip_positions or 0
    found: list[tuple[list[Window], list[IntArray]]] = []
    for pair in pairs:
        windows = [_prompt(pair, part, tokenizers) for part in ("clean", "corrupt")]
        found.append((windows, [_measured(window, beginnings, first) for window in windows]))
    sizes = np.array([sum(map(len, rows)) for _, rows in found], dtype=np.int64)
    if not sizes.sum():
        raise EmptyCorpus(f"task {name!r} has no pairs with segments behind the first {first} positions")
    order = np.random.default_rng(options.seed).permutation(len(found))
    kept = order[np.cumsum(sizes[order]) <= options.max_segments]
    if not len(kept):
        raise BadStatisticsOptions(f"--max-segments {options.max_segments} is less than one pair of {sizes[order[0]]} segments: raise it")
    chosen = [(window, own) for i in sorted(kept) for window, own in zip(*found[i]) if len(own)]
    return Windows(name, tuple(window for window, _ in chosen), tuple(own for _, own in chosen), beginnings, 2 * len(pairs), of_task=True)


def _prompt(pair: Pair, part: str, tokenizers: tuple[Any, Any]) -> Window:
    text = getattr(pair, part)
    segments = cut(text, *(token_spans(tokenizer, text) for tokenizer in tokenizers))
    if not segments.n:
        raise NothingInCommon(f"the two tokenizers share no boundary in {text!r}")
    right, wrong = pair.answer.strip(), pair.wrong_answer.strip()
    label = right if part == "clean" else wrong
    if pair.task in LABELLED and pair.label is not None:
        label = pair.label if part == "clean" else pair.label.replace(right, wrong)
    return _window(segments, 0, segments.n, key=pair.key, task=pair.task, label=label)


# -- 4. The run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Side:
    """A model with its dictionaries, which `load` gives. What a plan needs of them is known before: key, tokenizer, sites.

    sites: name, layer, dictionary's id, d_in, d_sae, in the model's order. named: what model and dictionaries were called.
    """

    model: str
    dtype: str
    tokenizer: Any
    sites: tuple[tuple[str, int, str, int, int], ...]
    load: Callable[[], tuple[LoadedModel, Mapping[Site, Dictionary]]]
    named: Mapping[str, str]

    @staticmethod
    def of(model: LoadedModel, dictionaries: Mapping[Site, Dictionary], named: Mapping[str, str] | None = None) -> "Side":
        """A side whose model is in memory, and stays there."""
        return _side(model, dictionaries, lambda: (model, dictionaries), named)

    @staticmethod
    def later(load: Callable[[], tuple[LoadedModel, Mapping[Site, Dictionary]]], named: Mapping[str, str] | None = None) -> "Side":
        """A side that is loaded now, to know it, let go, and loaded again when it is its turn: for two models that do not fit beside each other."""
        return _side(*load(), load, named)

    @property
    def identity(self) -> list[object]:
        """What makes it the same side."""
        return [self.model, self.dtype, [[name, dictionary, d_sae] for name, _, dictionary, _, d_sae in self.sites]]


def _side(model: LoadedModel, dictionaries: Mapping[Site, Dictionary], load: Callable[[], Any], named: Mapping[str, str] | None) -> Side:
    order = [site for site in bind(model).graph(dictionaries).sites if site in dictionaries]
    sites = tuple((site.name, site.layer, dictionaries[site].id, dictionaries[site].d_in, dictionaries[site].d_sae) for site in order)
    return Side(model.key, str(model.dtype).removeprefix("torch."), model.tokenizer, sites, load, dict(named or {}))


def aligned_key(sides: tuple[Side, Side], windows: Windows, options: AlignOptions) -> str:
    """The key of what `collect_aligned` would write: a hash of models, dictionaries, texts, and how segments are pooled."""
    content = [sides[0].identity, sides[1].identity, windows.hash, str(options.pool), options.covariances]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:KEY_LENGTH]


def collect_aligned(
    atlas: str | Path, sides: tuple[Side, Side], windows: Windows, options: AlignOptions, *, progress: Callable[[int, int], None] | None = None
) -> Aligned:
    """Measure both sides on the windows into the atlas; returns the aligned samples. What is there already is returned as it is.

    Raises `NotFinite` naming the site, and `TooManyProducts`.
    """
    store, key = AlignedStore(atlas), aligned_key(sides, windows, options)
    if store.has(key):
        return store.open(key)
    if options.covariances:
        _check_memory(sides, options.memory)
    settings = {
        "pool": str(options.pool), "length": options.length, "skip_positions": options.skip_positions, "max_segments": options.max_segments,
        "seed": options.seed, "texts": windows.hash, "n_available": windows.n_available, "of_task": windows.of_task,
        "tokens_per_segment": list(windows.tokens_per_segment), "named": [dict(side.named) for side in sides],
    }  # fmt: skip
    with store.writing(key) as folder:
        products: Products | None = None
        for number, side in enumerate(sides):
            raw = RawFiles(folder, sides[0], windows.n_segments) if options.covariances else None
            if number and raw is not None:
                products = Products(sides, raw)
            report = None if progress is None else lambda done, n=number: progress(n * len(windows.windows) + done, 2 * len(windows.windows))
            _measure_side(folder, "ab"[number], side, windows, options, settings, products or raw, report)
        if products is not None:
            products.save(folder / "covariances.npz")
            products.raw.delete()
        layers = {name: {site: layer for site, layer, *_ in side.sites} for name, side in zip("ab", sides)}
        finish_aligned(folder, {"key": key, "source": windows.name, "n_segments": windows.n_segments, "settings": settings, "layers": layers})
    return store.open(key)


def _check_memory(sides: tuple[Side, Side], memory: int) -> None:
    widths = [[d_in for _, _, _, d_in, _ in side.sites] for side in sides]
    needed = 8 * (sum(d * d for own in widths for d in own) + sum(widths[0]) * sum(widths[1]))
    if needed > memory:
        raise TooManyProducts(
            f"products of {len(widths[0])} and {len(widths[1])} sites take {needed / 1e9:.1f} GB, and --memory is {memory / 1e9:.1f} GB: "
            "take fewer by --sites and --other-sites, raise --memory, or leave them out by --no-covariances (there is no CKA and no SVCCA then)"
        )


Raw = Mapping[str, NDArray[np.float32]]
"""Raw values of sites' segments, (n_segments, d_in)."""


class RawFiles:
    """Side A's raw values, kept in files until side B is measured."""

    def __init__(self, folder: Path, side: Side, n: int) -> None:
        self.paths = {site: folder / f"raw.{site}" for site, *_ in side.sites}
        self.shapes = {site: (n, d_in) for site, _, _, d_in, _ in side.sites}

    def add(self, start: int, values: Raw) -> None:
        """The segments from `start` on; they come in order."""
        for site, rows in values.items():
            with self.paths[site].open("ab" if start else "wb") as file:
                file.write(np.ascontiguousarray(rows, dtype=np.float32).tobytes())

    def read(self, start: int, stop: int) -> dict[str, NDArray[np.float32]]:
        """The segments from `start` on, before `stop`."""
        found = {}
        for site, path in self.paths.items():
            n, width = self.shapes[site]
            found[site] = np.array(np.memmap(path, dtype=np.float32, mode="r", shape=(n, width))[start:stop])
        return found

    def delete(self) -> None:
        """Remove the files."""
        for path in self.paths.values():
            path.unlink(missing_ok=True)


class Products:
    """Sums over segments of x − shift, and of products of these, within each side and between; shift: the first segments' mean, against rounding."""

    def __init__(self, sides: tuple[Side, Side], raw: RawFiles) -> None:
        self.raw, self.n = raw, 0
        self.sites = [[site for site, *_ in side.sites] for side in sides]
        self.shifts: list[dict[str, FloatArray]] = []
        self.sums: dict[str, FloatArray] = {}

    def add(self, start: int, values: Raw) -> None:
        """Side B's segments from `start` on, with side A's from the files."""
        n = len(next(iter(values.values())))
        blocks = [{site: rows.astype(np.float64) for site, rows in side.items()} for side in (self.raw.read(start, start + n), values)]
        if not self.shifts:
            self.shifts = [{site: rows.mean(axis=0) for site, rows in side.items()} for side in blocks]
        a, b = ({site: rows - shift[site] for site, rows in side.items()} for side, shift in zip(blocks, self.shifts))
        for name, side in (("a", a), ("b", b)):
            for site, rows in side.items():
                self._sum(f"sum_{name}/{site}", rows.sum(axis=0))
                self._sum(f"{name}{name}/{site}", rows.T @ rows)
        for one, rows in a.items():
            for other, others in b.items():
                self._sum(f"ab/{one}/{other}", rows.T @ others)
        self.n += n

    def _sum(self, name: str, value: FloatArray) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def save(self, path: Path) -> None:
        """Keep them as `Aligned.covariances` reads them."""
        np.savez(path, n=np.array(self.n), allow_pickle=False, **self.sums)


def _measure_side(
    folder: Path, name: str, side: Side, windows: Windows, options: AlignOptions, settings: Mapping[str, Any], raw: Any, report: Any
) -> None:
    """One pass of one side over all windows, into its run of samples and, where wanted, its raw values."""
    model, dictionaries = side.load()
    ids = {site: dictionary for site, _, dictionary, _, _ in side.sites}
    n = windows.n_segments
    described = {**settings, "side": name, "dtype": side.dtype}
    run = SampleRun(name, side.model, "activation", windows.name, ids, len(windows.windows), n, described, windows.sequences())
    measure = _Measure(model, dictionaries, options.pool)
    number, done = "ab".index(name), 0
    with SampleStore(folder.parent, folder=folder.name).writing(name) as writer:
        for start in range(0, len(windows.windows), options.batch_size):
            part = slice(start, start + options.batch_size)
            batch = padded([window.ids[number] for window in windows.windows[part]], windows.beginnings[number])
            place = _segment_rows(windows, part, number)
            rows = sum(map(len, windows.rows[part]))
            values = measure(batch, place, rows, keep_raw=raw is not None)
            _append(writer, values.features)
            writer.add_tokens(_token_rows(windows, part))
            if raw is not None:
                raw.add(done, values.raw)
            done += rows
            if report is not None:
                report(min(start + options.batch_size, len(windows.windows)))
        writer.finish(run)


def padded(sequences: Iterable[IntArray], start: int | None) -> Tensor:
    """Token ids (batch, pos) behind the beginning-of-text token, if there is one; zeros at the end, which nothing before them sees."""
    first = [] if start is None else [start]
    rows = [torch.tensor([*first, *ids.tolist()]) for ids in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _segment_rows(windows: Windows, part: slice, side: int) -> IntArray:
    """The row of the run's matrices that each token of a padded batch is pooled into, counted in the batch, (batch, pos); −1 for none."""
    start = int(windows.beginnings[side] is not None)
    own = list(zip(windows.windows[part], windows.rows[part]))
    place = np.full((len(own), start + max(len(window.ids[side]) for window, _ in own)), -1, dtype=np.int64)
    done = 0
    for i, (window, rows) in enumerate(own):
        row_of = np.full(len(window.texts), -1, dtype=np.int64)
        row_of[rows] = np.arange(done, done + len(rows))
        segment = window.segment[side]
        place[i, start : start + len(segment)] = row_of[segment]
        done += len(rows)
    return place


def _token_rows(windows: Windows, part: slice) -> pl.DataFrame:
    """What the rows of a batch's segments are: sequence, number of the segment in it, text."""
    frames = []
    for i in range(*part.indices(len(windows.windows))):
        rows = windows.rows[i]
        texts = pl.Series([windows.windows[i].texts[row] for row in rows], dtype=pl.String)
        frames.append(pl.DataFrame({"sequence": np.full(len(rows), i), "position": rows, "text": texts}))
    return pl.concat(frames)


def _append(writer: SampleWriter, features: Mapping[str, Any]) -> None:
    for site, matrix in features.items():
        writer.add(site, matrix)


class Values(NamedTuple):
    """One batch: by site the pooled features, CSR (n_segments, d_sae), and the pooled raw values, (n_segments, d_in)."""

    features: dict[str, Any]
    raw: dict[str, NDArray[np.float32]]


class _Measure:
    """Runs a model on batches and pools its sites."""

    def __init__(self, model: LoadedModel, dictionaries: Mapping[Site, Dictionary], pool: Pool) -> None:
        self.binding, self.dictionaries, self.pool = bind(model), dictionaries, pool
        self.bases = {site: dictionary.basis for site, dictionary in dictionaries.items()}

    @torch.no_grad()
    def __call__(self, tokens: Tensor, place: IntArray, n: int, *, keep_raw: bool) -> Values:
        """tokens: (batch, pos); place: (batch, pos), the segment of each or −1; n: segments."""
        captured = capture_sites(self.binding, tokens.to(self.binding.device), self.bases)
        kept = torch.from_numpy(place.ravel() >= 0)
        segment = place.ravel()[place.ravel() >= 0]  # (rows,), ascending
        features, raw = {}, {}
        for site, dictionary in self.dictionaries.items():
            x = captured[site].flatten(0, 1)[kept.to(captured[site].device)]  # (rows, d_in)
            nodes = dictionary.encode(x)  # (rows, d_sae)
            if not torch.isfinite(nodes).all():
                raise NotFinite(f"site {site}: a node has the value NaN or infinity: run the model in float32, or in bfloat16 rather than float16")
            features[site.name] = pooled(sparse.csr_matrix(nodes.float().cpu().numpy()), segment, n, self.pool)
            if keep_raw:
                raw[site.name] = pooled_rows(x.float().cpu().numpy(), segment, n, self.pool)
        return Values(features, raw)


def pooled(nodes: Any, segment: IntArray, n: int, pool: Pool) -> Any:
    """Features of tokens, CSR (n_tokens, d_sae), as features of segments, CSR (n, d_sae). segment: each token's, ascending, (n_tokens,)."""
    if len(segment) == n:  # a token each
        return nodes
    counts = np.bincount(segment, minlength=n)
    if pool is Pool.LAST:
        return nodes[np.cumsum(counts) - 1]
    rows, width = np.repeat(segment, np.diff(nodes.indptr)), nodes.shape[1]
    if pool is Pool.MEAN:
        summed = sparse.csr_matrix((nodes.data / counts[rows].astype(np.float32), (rows, nodes.indices)), shape=(n, width))
        summed.sum_duplicates()
        return summed
    cell = rows * width + nodes.indices
    order = np.lexsort((np.abs(nodes.data), cell))
    last = np.append(np.diff(cell[order]) != 0, True)[: len(order)]  # of each cell the value of the greatest magnitude
    best = order[last]
    return sparse.csr_matrix((nodes.data[best], (rows[best], nodes.indices[best])), shape=(n, width))


def pooled_rows(x: NDArray[np.float32], segment: IntArray, n: int, pool: Pool) -> NDArray[np.float32]:
    """Raw values of tokens (n_tokens, d_in) as values of segments (n, d_in): the last token's with `last`, else the mean."""
    if len(segment) == n:
        return x
    counts = np.bincount(segment, minlength=n)
    ends = np.cumsum(counts)
    if pool is Pool.LAST:
        return x[ends - 1]
    return (np.add.reduceat(x, ends - counts, axis=0) / counts[:, None]).astype(np.float32)
