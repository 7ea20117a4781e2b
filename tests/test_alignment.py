"""Aligned samples: characters that both tokenizers share, windows, pooling, and two passes that agree with plain forward passes."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from featlas.ingest.alignment import (
    AlignOptions,
    NoSpans,
    NothingInCommon,
    Pool,
    Side,
    SpansDiffer,
    TooManyProducts,
    Window,
    _windows,
    aligned_corpus,
    aligned_key,
    aligned_task,
    collect_aligned,
    cut,
    padded,
    pooled,
    pooled_rows,
    token_spans,
)
from featlas.ingest.statistics import BadStatisticsOptions, EmptyCorpus
from featlas.model.beginning import BeginningTokenizer
from featlas.model.binding import bind, capture_sites
from featlas.model.loading import LoadedModel, wrap_model
from featlas.model.pairs import Pair
from featlas.model.sites import parse_site
from featlas.queries.matches import AlignedStore, NewerAligned, NoAligned
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .micro import tiny_module, word_tokenizer
from .micro_dictionaries import tiny_dictionary

TEXT = "the cat sat on the mat, and the dog sat on the cat. déjà vu 日本 😀 ok\n\nthe  end of the tale " * 3
SITES = ("resid_0", "resid_1")


def byte_tokenizer(*, trim: bool = True, bos: bool = False, vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's, trained on `TEXT`; `trim`: spans leave out the space that a token begins with."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>"] if bos else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    if bos:
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=trim), processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>" if bos else None)


def character_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(set(TEXT))
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*letters, "[UNK]"])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def words() -> PreTrainedTokenizerFast:
    return word_tokenizer(tuple(dict.fromkeys(TEXT.split()))[:40])


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram over ▁, as SentencePiece's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([TEXT], trainers.UnigramTrainer(vocab_size=80, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS: dict[str, Any] = {
    "words": words, "bytes": byte_tokenizer, "bytes untrimmed": lambda: byte_tokenizer(trim=False), "characters": character_tokenizer,
    "metaspace": metaspace_tokenizer, "few bytes": lambda: byte_tokenizer(vocabulary=258),
}  # fmt: skip
TOKENIZERS = {name: cache(make) for name, make in TOKENIZERS.items()}


# -- 1. and 2. Characters ------------------------------------------------------------------------------------


def naive_boundaries(tokenizer: Any, text: str) -> set[int]:
    """Where a text can be cut so that no token lies on both sides, by trying every character."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = {end for _, end in offsets}
    return {p for p in range(1, len(text) + 1) if p in ends and not any(start < p < end for start, end in offsets)}


@pytest.mark.parametrize("one", TOKENIZERS)
@pytest.mark.parametrize("other", TOKENIZERS)
def test_segments_tile_the_text_and_hold_the_same_characters_on_both_sides(one: str, other: str) -> None:
    a, b = TOKENIZERS[one](), TOKENIZERS[other]()
    spans = [token_spans(tokenizer, TEXT) for tokenizer in (a, b)]
    for tokenizer, own in zip((a, b), spans):
        assert own.ids.tolist() == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    segments = cut(TEXT, *spans)
    assert "".join(segments.texts(0, segments.n)) == TEXT[: segments.end[-1]]
    assert segments.n > 30
    for own, first in zip(spans, (segments.a, segments.b)):
        for j in range(segments.n):
            tokens = slice(first[j], first[j + 1])
            assert one == other or own.start[tokens].min() >= segments.first_character(j)
            assert own.end[tokens].max() == segments.end[j]
    if one != other:
        assert set(segments.end.tolist()) == naive_boundaries(a, TEXT) & naive_boundaries(b, TEXT) or one[:5] == other[:5]
    else:
        assert segments.a.tolist() == list(range(len(spans[0].ids) + 1))


def test_characters_in_several_tokens_stay_whole() -> None:
    text = "ab 😀 é"
    split = token_spans(byte_tokenizer(vocabulary=257), text)
    assert len(split.ids) > len(text)
    segments = cut(text, split, token_spans(words(), text))
    assert segments.texts(0, segments.n) == ["ab", " 😀", " é"]
    assert np.diff(segments.a).tolist() == [2, 5, 3]
    assert np.diff(segments.b).tolist() == [1, 1, 1]


def test_a_worked_example() -> None:
    segments = cut("the cat sat", token_spans(words(), "the cat sat"), token_spans(character_tokenizer(), "the cat sat"))
    assert segments.texts(0, 3) == ["the", " cat", " sat"]
    assert segments.b.tolist() == [0, 3, 7, 11]


@given(st.text(alphabet="abcé日😀 \n", min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_is_tiled(text: str) -> None:
    one, other = _BYTES
    segments = cut(text, token_spans(one, text), token_spans(other, text))
    assert "".join(segments.texts(0, segments.n)) + text[segments.end[-1] if segments.n else 0 :] == text
    assert segments.a[-1] <= len(segments.spans_a.ids)
    assert (np.diff(segments.a) > 0).all()
    assert (np.diff(segments.b) > 0).all()


_BYTES = (byte_tokenizer(vocabulary=258), byte_tokenizer(trim=False))


def test_tokenizers_that_lose_text_or_order_are_refused() -> None:
    losing = character_tokenizer()
    losing.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("q", "removed")
    with pytest.raises(SpansDiffer, match=r"leaves out 'q' of 'abq ab' \(character 2\)"):
        token_spans(losing, "abq ab")
    with pytest.raises(NoSpans, match="fast tokenizer"):
        token_spans(SimpleNamespace(), "a")
    backend = SimpleNamespace(truncation=None, padding=None, encode=lambda *_, **__: SimpleNamespace(ids=[1, 2], offsets=[(2, 3), (0, 2)]))
    with pytest.raises(SpansDiffer, match=r"order of 'abc' \(character 0\)"):
        token_spans(SimpleNamespace(backend_tokenizer=backend), "abc")


def test_truncation_of_an_earlier_caller_is_not_applied() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert len(token_spans(tokenizer, TEXT).ids) > 50
    assert tokenizer.backend_tokenizer.truncation is not None


# -- 3. Windows ----------------------------------------------------------------------------------------------


def test_windows_are_whole_segments_within_both_lengths() -> None:
    segments = cut(TEXT, token_spans(words(), TEXT), token_spans(character_tokenizer(), TEXT))
    found = list(_windows(segments, (10, 20)))
    assert all(segments.a[stop] - segments.a[start] <= 10 and segments.b[stop] - segments.b[start] <= 20 for start, stop in found)
    assert all(one[1] <= other[0] for one, other in pairwise(found))
    longer = lambda start, stop: segments.a[stop + 1] - segments.a[start] > 10 or segments.b[stop + 1] - segments.b[start] > 20
    assert all(longer(start, stop) for start, stop in found if stop < segments.n)
    with pytest.raises(NothingInCommon, match="share no two boundaries within 10 and 3 tokens"):
        list(_windows(segments, (10, 3)))


def corpus(folder: Path, text: str = TEXT) -> str:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return str(folder / "text.txt")


def test_the_first_positions_of_either_side_are_left_out(tmp_path: Path) -> None:
    spec = corpus(tmp_path)
    with_bos = BeginningTokenizer(byte_tokenizer(bos=True), bos=True)
    for tokenizers, skip, first in (
        ((words(), words()), None, 1), ((words(), words()), 0, 0), ((with_bos, with_bos), None, 0), ((with_bos, words()), None, 1),
        ((words(), words()), 3, 3), ((with_bos, with_bos), 3, None),
    ):  # fmt: skip
        options = AlignOptions(length=16, skip_positions=skip)
        windows = aligned_corpus(spec, tokenizers, options)
        assert windows.beginnings == tuple(0 if tokenizer is with_bos else None for tokenizer in tokenizers)
        for window, rows in zip(windows.windows, windows.rows):
            assert len(window.ids[0]) + (tokenizers[0] is with_bos) <= 16
            if first is not None:
                assert rows.tolist() == list(range(first, len(window.texts)))
            else:  # positions 1 and 2 are the first two tokens
                assert rows[0] == window.segment[0][2] if len(set(window.segment[0][:2])) == 2 else rows[0] == 1


def test_windows_are_drawn_by_seed_in_order(tmp_path: Path) -> None:
    spec = corpus(tmp_path, " ".join(f"cat {i} sat on number {i}," for i in range(60)))
    tokenizers = (words(), character_tokenizer())
    every = aligned_corpus(spec, tokenizers, AlignOptions(length=20))
    some = [aligned_corpus(spec, tokenizers, AlignOptions(length=20, max_segments=30, seed=seed)) for seed in (1, 1, 2)]
    assert some[0].hash == some[1].hash != some[2].hash
    assert all(part.n_segments <= 30 and part.n_available == len(every.windows) for part in some)
    places = [[window.texts for window in every.windows].index(window.texts) for window in some[0].windows]
    assert places == sorted(places)
    assert every.tokens_per_segment[1] > 3 > every.tokens_per_segment[0] == 1.0
    limited = aligned_corpus(spec, tokenizers, AlignOptions(length=20), limit=2)
    assert [window.text for window in limited.windows] == [window.text for window in every.windows[:2]]
    with pytest.raises(BadStatisticsOptions, match="--max-segments 1 is less"):
        aligned_corpus(spec, tokenizers, AlignOptions(length=20, max_segments=1), limit=3)
    with pytest.raises(EmptyCorpus, match="no text of two segments"):
        aligned_corpus(corpus(tmp_path, "a"), tokenizers, AlignOptions())
    for wrong in ({"length": 1}, {"batch_size": 0}, {"max_segments": 0}, {"skip_positions": -1}):
        with pytest.raises(BadStatisticsOptions, match=f"{next(iter(wrong))} is"):
            AlignOptions(**wrong)


def test_prompts_of_a_task() -> None:
    pairs = [Pair(f"the cat sat on {w}", f"the dog sat on {w}", " mat", " dog", "t", None) for w in ("the", "cat", "vu")]
    windows = aligned_task("t", pairs, (words(), character_tokenizer()), AlignOptions())
    frame = windows.sequences()
    assert frame["text"].to_list() == [text for pair in pairs for text in (pair.clean, pair.corrupt)]
    assert frame["label"].to_list() == ["mat", "dog"] * 3
    assert frame["key"].to_list() == [pair.key for pair in pairs for _ in range(2)]
    assert windows.n_segments == 6 * 5
    assert aligned_task("t", pairs, (words(), words()), AlignOptions(max_segments=10)).n_segments == 10
    with pytest.raises(BadStatisticsOptions, match="--max-segments 3"):
        aligned_task("t", pairs, (words(), words()), AlignOptions(max_segments=3))


# -- 4. Pooling and passes -----------------------------------------------------------------------------------


def naive_pool(nodes: np.ndarray, segment: np.ndarray, n: int, pool: Pool) -> np.ndarray:
    """Segment by segment, feature by feature."""
    out = np.zeros((n, nodes.shape[1]), dtype=np.float32)
    for j in range(n):
        own = nodes[segment == j]
        for k in range(nodes.shape[1]):
            column = own[:, k]
            out[j, k] = {Pool.MAX: lambda c=column: c[np.argmax(np.abs(c))], Pool.LAST: lambda c=column: c[-1], Pool.MEAN: column.mean}[pool]()
    return out


@pytest.mark.parametrize("pool", Pool)
@pytest.mark.parametrize("seed", range(4))
def test_pooling_is_that_of_each_segment_by_itself(pool: Pool, seed: int) -> None:
    random = np.random.default_rng(seed)
    counts = random.integers(1, 5, size=12) if seed else np.ones(12, dtype=np.int64)
    segment = np.repeat(np.arange(12), counts)
    nodes = (random.normal(size=(len(segment), 7)) * (random.random((len(segment), 7)) < 0.4)).astype(np.float32)
    found = pooled(sparse.csr_matrix(nodes), segment, 12, pool)
    np.testing.assert_allclose(found.toarray(), naive_pool(nodes, segment, 12, pool), rtol=1e-6)
    expected = naive_pool(nodes, segment, 12, Pool.LAST if pool is Pool.LAST else Pool.MEAN)
    np.testing.assert_allclose(pooled_rows(nodes, segment, 12, pool), expected, rtol=1e-5, atol=1e-7)


def test_batches_are_padded_behind() -> None:
    assert padded([np.array([5, 6]), np.array([7])], 3).tolist() == [[3, 5, 6], [3, 7, 0]]
    assert padded([np.array([5])], None).tolist() == [[5]]


def tiny_side(tokenizer: Any, family: str, *, seed: int, kind: str = "topk", d_model: int = 16, ids: str = "d") -> Side:
    """A tiny model of that tokenizer with a dictionary at each of `SITES`."""
    module = tiny_module(family, seed=seed, d_model=d_model, n_layers=2)
    vocabulary = max(tokenizer.vocab_size, 48)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.resize_token_embeddings(vocabulary)
        module.get_input_embeddings().weight.copy_(torch.randn(vocabulary, d_model, generator=generator))
    model = wrap_model(module.requires_grad_(False), tokenizer, name=f"{family}{seed}", revision="0")
    made = {parse_site(site): tiny_dictionary(kind, d_model, seed=seed + i) for i, site in enumerate(SITES)}
    return Side.of(model, {site: replace(dictionary, id=f"{ids}{seed}") for site, dictionary in made.items()}, {"model": family})


def naive_features(side: Side, window: Window, number: int, start: int | None) -> dict[str, np.ndarray]:
    """The features of each token of a window, by a forward pass of it alone."""
    model, dictionaries = side.load()
    ids = torch.tensor([[*([start] if start is not None else []), *window.ids[number]]])
    values = capture_sites(bind(model), ids, {site: dictionary.basis for site, dictionary in dictionaries.items()})
    return {
        site.name: dictionary.encode(values[site][0, start is not None :]).numpy() for site, dictionary in dictionaries.items()
    } | {f"raw {site.name}": values[site][0, start is not None :].numpy() for site in dictionaries}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pool", Pool)
def test_both_passes_are_plain_forward_passes_pooled(tmp_path: Path, pool: Pool) -> None:
    a = tiny_side(words(), "llama", seed=1)
    b = tiny_side(BeginningTokenizer(byte_tokenizer(bos=True), bos=True), "gpt2", seed=2, kind="relu", d_model=12)
    options = AlignOptions(length=24, batch_size=3, pool=pool)
    windows = aligned_corpus(corpus(tmp_path), (a.tokenizer, b.tokenizer), options)
    assert windows.beginnings == (None, 0)
    told: list[tuple[int, int]] = []
    aligned = collect_aligned(tmp_path / "atlas", (a, b), windows, options, progress=lambda *done: told.append(done))
    assert told[-1] == (2 * len(windows.windows), 2 * len(windows.windows))
    raw: dict[tuple[int, str], list[np.ndarray]] = {}
    for number, (side, run) in enumerate(((a, aligned.a), (b, aligned.b))):
        expected: dict[str, list[np.ndarray]] = {}
        for window, rows in zip(windows.windows, windows.rows):
            for name, tokens in naive_features(side, window, number, windows.beginnings[number]).items():
                how = pool if not name.startswith("raw") else Pool.LAST if pool is Pool.LAST else Pool.MEAN
                values = naive_pool(tokens, window.segment[number], len(window.texts), how)[rows]
                (raw.setdefault((number, name[4:]), []) if name.startswith("raw") else expected.setdefault(name, [])).append(values)
        for site in SITES:
            found = run.site(site).values
            dense = found.toarray() if sparse.issparse(found) else found
            np.testing.assert_allclose(dense, np.concatenate(expected[site]), atol=2e-5)
        assert run.tokens()["text"].to_list() == [window.texts[j] for window, rows in zip(windows.windows, windows.rows) for j in rows]
    covariances = aligned.covariances()
    assert covariances is not None
    centred = {key: (x := np.concatenate(values).astype(np.float64)) - x.mean(axis=0) for key, values in raw.items()}
    n = aligned.n_segments
    for one in SITES:
        np.testing.assert_allclose(covariances.a[one], centred[0, one].T @ centred[0, one] / n, atol=1e-5)
        np.testing.assert_allclose(covariances.b[one], centred[1, one].T @ centred[1, one] / n, atol=1e-4)
        for other in SITES:
            np.testing.assert_allclose(covariances.between[one, other], centred[0, one].T @ centred[1, other] / n, atol=1e-5)


def test_batch_sizes_and_loading_later_change_nothing(tmp_path: Path) -> None:
    side = tiny_side(words(), "llama", seed=1)
    loads: list[int] = []

    def load() -> Any:
        loads.append(1)
        return side.load()

    later = Side.later(load)
    windows = aligned_corpus(corpus(tmp_path), (side.tokenizer, later.tokenizer), AlignOptions(length=9))
    options = [AlignOptions(length=9, batch_size=size) for size in (1, 7)]
    one = collect_aligned(tmp_path / "one", (side, side), windows, options[0])
    other = collect_aligned(tmp_path / "other", (side, later), windows, options[1])
    assert one.key == other.key == aligned_key((side, side), windows, options[0])
    assert len(loads) == 2
    for site in SITES:
        values = [run.site(site).values.toarray() for run in (one.a, one.b, other.a, other.b)]
        assert all(np.allclose(values[0], found, atol=1e-5) for found in values[1:])
    assert collect_aligned(tmp_path / "other", (side, later), windows, options[1]).finished == other.finished
    assert len(loads) == 2  # it was there already


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    side = tiny_side(words(), "llama", seed=1)
    pairs = [Pair(f"the cat sat on {w}", f"the dog sat on {w}", " mat", " dog", "t", None) for w in ("the", "cat", "vu")]
    options = AlignOptions(covariances=False)
    windows = aligned_task("t", pairs, (side.tokenizer, side.tokenizer), options)
    aligned = collect_aligned(tmp_path, (side, side), windows, options)
    assert aligned.covariances() is None
    store = AlignedStore(tmp_path)
    assert [found.key for found in store.list()] == [aligned.key] == [store.open(aligned.key[:5]).key]
    assert aligned.a.site_names == SITES
    assert aligned.a.layers == {"resid_0": 0, "resid_1": 1}
    assert sorted(path.name for path in aligned.folder.iterdir()) == ["a", "b", "manifest.json"]
    assert len(np.unique(aligned.a.site("resid_0").group)) == 3  # the prompts of a pair stay together
    with pytest.raises(NoAligned, match=f"no aligned samples 'zz'.*{aligned.key}"):
        store.open("zz")
    with pytest.raises(NoAligned, match="featlas ingest aligned"):
        AlignedStore(tmp_path / "none").open()
    with pytest.raises(TooManyProducts, match="2 and 2 sites take"):
        collect_aligned(tmp_path, (side, side), windows, AlignOptions(memory=1000))
    assert not list((tmp_path / "aligned").glob(".*"))
    manifest = json.loads((aligned.folder / "manifest.json").read_text())
    (aligned.folder / "manifest.json").write_text(json.dumps(manifest | {"layout": 99}))
    with pytest.raises(NewerAligned, match="layout 99"):
        store.list()
    (aligned.folder / "manifest.json").write_text(json.dumps(manifest))
    store.delete(aligned.key)
    assert store.list() == []


def test_a_failed_pass_leaves_nothing(tmp_path: Path) -> None:
    side = tiny_side(words(), "llama", seed=1)

    def broken() -> tuple[LoadedModel, Any]:
        raise RuntimeError("no memory")

    windows = aligned_corpus(corpus(tmp_path), (side.tokenizer, side.tokenizer), AlignOptions(length=9))
    with pytest.raises(RuntimeError, match="no memory"):
        collect_aligned(tmp_path, (side, replace(side, load=broken)), windows, AlignOptions(length=9))
    assert list((tmp_path / "aligned").iterdir()) == []
