"""Samples on tiny models: against the nodes of all texts at once, kept and read back, drawn by seed, repeated, interrupted, refused."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from featlas.analysis.correlations import correlation, halves
from featlas.ingest import samples as job
from featlas.ingest.effective import EdgeSettings, node_attributions, prepare
from featlas.ingest.moments import NotFinite
from featlas.ingest.samples import SampleOptions, SampleSource, collect_samples, plan_samples, task_source, text_source
from featlas.ingest.statistics import (
    BadStatisticsOptions,
    EmptyCorpus,
    StatisticsOptions,
    activation_measure,
    measure_statistics,
    node_means,
    text_corpus,
)
from featlas.model.baselines import Baseline
from featlas.model.binding import bind, capture_sites
from featlas.model.dictionaries import Basis
from featlas.model.loading import load_model
from featlas.model.sites import parse_site
from featlas.model.tasks import Pair
from featlas.queries import samples as kept
from featlas.queries.samples import BadSamples, NewerSamples, NoSamples, SampleRun, SampleStore, SiteSamples
from featlas.queries.statistics import StatisticsStore
from scipy import sparse

from .micro import save_tiny_with_corpus
from .micro_dictionaries import tiny_dictionary

RESID, MLP, ATTN = parse_site("resid_1"), parse_site("mlp_0"), parse_site("attn_1")
OPTIONS = SampleOptions(length=6, batch_size=4)
N_BLOCKS = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model and a corpus of random words beside it."""
    return save_tiny_with_corpus(tmp_path_factory.mktemp("tiny"), words=6 * N_BLOCKS)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder / "model"))


@pytest.fixture(scope="module")
def dictionaries():
    """A TopK, a linear (dense, signed) and a concatenated-heads dictionary."""
    return {
        RESID: tiny_dictionary("topk", 16, seed=1),
        MLP: tiny_dictionary("linear", 16, seed=2),
        ATTN: tiny_dictionary("relu", 16, seed=3, basis=Basis.HEADS),
    }


@pytest.fixture(scope="module")
def source(folder, model) -> SampleSource:
    return text_source(str(folder / "corpus.txt"), model.tokenizer, OPTIONS)


@pytest.fixture(scope="module")
def whole(folder, model, dictionaries, source) -> tuple[SampleStore, SampleRun]:
    """All blocks of the corpus."""
    store = SampleStore(folder / "atlas")
    return store, collect_samples(store, model, dictionaries, source, OPTIONS)


def pairs() -> list[Pair]:
    """Nine pairs of two tasks and lengths, of which one has labels that matter."""
    clean = ["w1 w2 w3", "w4 w5 w6", "w7 w8 w9", "w2 w4 w6", "w1 w5 w9 w3", "w3 w6 w9 w1", "w8 w7 w6 w2", "w2 w9 w5", "w5 w1 w8"]
    found = [Pair(text, f"w11 {text.split(' ', 1)[1]}", f" w{20 + i}", f" w{30 + i}", "tiny", "some") for i, text in enumerate(clean[:-2])]
    return found + [Pair(text, text.replace("w5", "w15"), " w3", " w4", "profession_gender", "female w3") for text in clean[-2:]]


def dense(samples: SiteSamples) -> np.ndarray:
    return np.asarray(samples.values if samples.dense else samples.values.toarray())


# -- numbers -------------------------------------------------------------------------------------------------


def test_samples_are_the_nodes_of_all_tokens(whole, model, dictionaries, source) -> None:
    store, run = whole
    tokens = torch.cat([batch.tokens for batch in source.batches])
    assert (run.n_sequences, run.n_tokens, run.basis) == (N_BLOCKS, N_BLOCKS * 5, "activation")
    values = capture_sites(bind(model), tokens, {site: d.basis for site, d in dictionaries.items()})
    for site, dictionary in dictionaries.items():
        found = store.read(run.key, site.name)
        expected = dictionary.encode(values[site])[:, 1:].reshape(N_BLOCKS * 5, -1).numpy()
        assert found.values.dtype == np.float32
        np.testing.assert_allclose(dense(found), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.sequence, np.repeat(np.arange(N_BLOCKS), 5))
        np.testing.assert_array_equal(found.position, np.tile(np.arange(1, 6), N_BLOCKS))
        np.testing.assert_array_equal(found.group.reshape(-1, 5), found.group[::5, None].repeat(5, axis=1))
        assert len(set(found.group)) == N_BLOCKS
        assert run.site(site.name).mean_l0 == pytest.approx((expected != 0).sum(1).mean())
        assert (found.dictionary, found.d_sae) == (dictionary.id, dictionary.d_sae)
    assert {s.site: s.dense for s in run.sites} == {"resid_1": False, "mlp_0": True, "attn_1": True}
    texts = [model.tokenizer.decode([token]) for token in tokens[:, 1:].flatten().tolist()]
    assert store.tokens(run.key)["text"].to_list() == texts
    assert run.sequences["text"].to_list() == model.tokenizer.batch_decode(tokens)
    assert run.sequences["label"].null_count() == run.sequences["task"].null_count() == N_BLOCKS


def test_correlations_are_those_of_the_statistics_store(whole, folder, model, dictionaries, tmp_path) -> None:
    store, run = whole
    options = StatisticsOptions(length=6, batch_size=4, min_frequency=0.0)
    with StatisticsStore(tmp_path) as statistics:
        record = measure_statistics(statistics, model, dictionaries, text_corpus(str(folder / "corpus.txt"), model.tokenizer, options), options)
        for site in dictionaries:
            features, expected = statistics.correlation(record.run, site.name)
            assert len(features) > 10
            np.testing.assert_allclose(correlation(store.read(run.key, site.name), features), expected, atol=1e-6)


def test_the_prompts_of_a_task_have_classes_and_keep_together(model, dictionaries, tmp_path) -> None:
    source = task_source("mixed", pairs(), model.tokenizer, OPTIONS)
    assert task_source("mixed", pairs(), model.tokenizer, replace(OPTIONS, batch_size=1)).hash == source.hash
    run = collect_samples(SampleStore(tmp_path), model, dictionaries, source, OPTIONS)
    assert run.n_sequences == 18
    by_text = {row["text"]: row for row in run.sequences.iter_rows(named=True)}
    for pair in pairs():
        clean, corrupt = by_text[pair.clean], by_text[pair.corrupt]
        assert clean["key"] == corrupt["key"] == pair.key
        assert (clean["part"], corrupt["part"]) == ("clean", "corrupt")
        assert clean["task"] == pair.task
        labels = ("female w3", "female w4") if pair.task == "profession_gender" else (pair.answer.strip(), pair.wrong_answer.strip())
        assert (clean["label"], corrupt["label"]) == labels
    samples = SampleStore(tmp_path, read_only=True).read(run.key, "resid_1")
    text_of = samples.sequence[0]
    assert run.sequences["sequence"].to_list() == list(range(18))
    keys = np.array(run.sequences["key"].to_list())
    for half in halves(samples, 2):
        assert not set(keys[samples.sequence[half]]) & set(keys[samples.sequence[~half]])
    length = (samples.sequence == text_of).sum()
    assert samples.position[:length].tolist() == list(range(length))  # a task keeps its first position
    rows = SampleStore(tmp_path).tokens(run.key).filter(pl.col("sequence") == text_of)["text"].to_list()
    assert " ".join(rows) == run.sequences["text"][int(text_of)]


def test_pairs_that_share_a_prompt_are_never_in_two_halves(model, dictionaries, tmp_path) -> None:
    texts = [("w1 w2", "w3 w2"), ("w3 w2", "w5 w2"), ("w6 w2", "w7 w2"), ("w8 w2", "w9 w2"), ("w9 w2", "w8 w2")]
    given = [Pair(clean, corrupt, " w20", " w30", "tiny") for clean, corrupt in texts]
    run = collect_samples(SampleStore(tmp_path), model, dictionaries, task_source("shared", given, model.tokenizer, OPTIONS), OPTIONS)
    samples = SampleStore(tmp_path, read_only=True).read(run.key, "resid_1")
    text = np.array(run.sequences["text"].to_list())[samples.sequence]
    group = {part: set(samples.group[text == part].tolist()) for pair in texts for part in pair}
    assert group["w1 w2"] == group["w3 w2"] == group["w5 w2"] != group["w6 w2"] == group["w7 w2"]
    assert group["w8 w2"] == group["w9 w2"]
    assert len(set().union(*group.values())) == 3
    for seed in range(8):
        first, second = halves(samples, seed)
        assert not set(text[first]) & set(text[second])


@pytest.mark.parametrize("baseline", [Baseline.COUNTERFACTUAL, Baseline.MEAN, Baseline.RESAMPLE])
def test_attributions_are_those_of_the_engine(whole, folder, model, dictionaries, tmp_path, baseline) -> None:
    settings = EdgeSettings(baseline=baseline, steps=3)
    chosen = [pair for pair in pairs() if len(pair.clean.split()) == 3][:4]
    source = task_source("tiny", chosen, model.tokenizer, OPTIONS, clean_only=True, donor_seed=1 if baseline is Baseline.RESAMPLE else None)
    means, statistics_run = None, None
    if baseline is Baseline.MEAN:
        options = StatisticsOptions(length=6, batch_size=4)
        with StatisticsStore(tmp_path) as statistics:
            record = measure_statistics(statistics, model, dictionaries, text_corpus(str(folder / "corpus.txt"), model.tokenizer, options), options)
            means, statistics_run = node_means(statistics, record.run, model, dictionaries, settings.choice), record.run
    store = SampleStore(tmp_path)
    run = collect_samples(store, model, dictionaries, source, OPTIONS, settings=settings, means=means, statistics_run=statistics_run)
    assert (run.basis, run.n_sequences, run.settings["metric"], run.settings["steps"]) == ("attribution", 4, "logit_diff", 3)
    assert run.sequences["text"].to_list() == [pair.clean for pair in chosen]
    prepared = prepare(bind(model), dictionaries, source.batches[0].pairs, settings, means)
    for site, features, _ in node_attributions(prepared):
        np.testing.assert_allclose(dense(store.read(run.key, site.name)), features.flatten(0, 1).numpy(), rtol=1e-4, atol=1e-6)


# -- drawing -------------------------------------------------------------------------------------------------


def test_blocks_are_drawn_from_the_whole_corpus_by_seed(folder, model, source) -> None:
    corpus = str(folder / "corpus.txt")
    every = torch.cat([batch.tokens for batch in source.batches])
    drawn = {}
    for seed in range(40):
        few = text_source(corpus, model.tokenizer, replace(OPTIONS, max_tokens=29, seed=seed))
        assert (few.n_sequences, few.n_tokens, few.n_available) == (5, 25, N_BLOCKS)
        tokens = torch.cat([batch.tokens for batch in few.batches])
        drawn[seed] = [int((every == row).all(dim=1).nonzero()) for row in tokens]
        assert drawn[seed] == sorted(drawn[seed])
    counts = np.bincount([block for blocks in drawn.values() for block in blocks], minlength=N_BLOCKS)
    assert counts.min() > 0  # none of 22 in 40 draws of 5: less than 1 in 1000
    assert counts.max() < 25
    again = text_source(corpus, model.tokenizer, replace(OPTIONS, max_tokens=29, seed=7))
    assert again.hash == text_source(corpus, model.tokenizer, replace(OPTIONS, max_tokens=29, seed=7, batch_size=2)).hash
    assert again.hash != text_source(corpus, model.tokenizer, replace(OPTIONS, max_tokens=29, seed=8)).hash
    assert text_source(corpus, model.tokenizer, OPTIONS, max_sequences=3).n_available == 3


def test_pairs_are_drawn_whole(model) -> None:
    few = task_source("tiny", pairs(), model.tokenizer, SampleOptions(max_tokens=25, seed=1))
    assert few.n_tokens <= 25
    assert few.n_available == 18
    assert set(few.sequences["key"].value_counts()["count"]) == {2}
    others = [task_source("tiny", pairs(), model.tokenizer, SampleOptions(max_tokens=25, seed=seed)).hash for seed in range(5)]
    assert len(set(others)) > 1


def test_what_cannot_be_sampled_is_refused(folder, model, dictionaries, source, tmp_path) -> None:
    corpus = str(folder / "corpus.txt")
    with pytest.raises(BadStatisticsOptions, match="--max-tokens 4 is less"):
        text_source(corpus, model.tokenizer, replace(OPTIONS, max_tokens=4))
    with pytest.raises(BadStatisticsOptions, match="--max-tokens 2 is less"):
        task_source("tiny", pairs(), model.tokenizer, SampleOptions(max_tokens=2))
    with pytest.raises(BadStatisticsOptions, match="--max-tokens 0"):
        SampleOptions(max_tokens=0)
    with pytest.raises(BadStatisticsOptions, match="--skip-positions is 6"):
        text_source(corpus, model.tokenizer, replace(OPTIONS, skip_positions=6))
    with pytest.raises(EmptyCorpus, match="fewer than 400"):
        text_source(corpus, model.tokenizer, replace(OPTIONS, length=400))
    with pytest.raises(BadStatisticsOptions, match="a task, not a text corpus"):
        collect_samples(SampleStore(tmp_path), model, dictionaries, source, OPTIONS, settings=EdgeSettings())
    assert not list((tmp_path / "samples").iterdir())


# -- the run -------------------------------------------------------------------------------------------------


def test_a_repetition_computes_nothing(whole, model, dictionaries, source, monkeypatch) -> None:
    store, run = whole
    before = {path: path.stat().st_mtime_ns for path in sorted(store.folder.rglob("*"))}
    monkeypatch.setattr(job, "activation_measure", None)
    other = SampleSource(source.name, tuple(source.batches), source.sequences, source.first_position, source.n_available)
    assert collect_samples(store, model, dictionaries, other, replace(OPTIONS, batch_size=2)).key == run.key
    assert {path: path.stat().st_mtime_ns for path in sorted(store.folder.rglob("*"))} == before


def test_the_key_depends_on_what_determines_the_samples(model, dictionaries, source, folder) -> None:
    key = lambda chosen, texts, **options: plan_samples(model, chosen, texts, OPTIONS, **options).key
    task = task_source("tiny", pairs(), model.tokenizer, OPTIONS, clean_only=True)
    wider = {**dictionaries, RESID: tiny_dictionary("relu", 16, d_sae=25)}
    keys = [
        key(dictionaries, source), key({RESID: dictionaries[RESID]}, source), key(wider, source),
        key(dictionaries, text_source(str(folder / "corpus.txt"), model.tokenizer, OPTIONS, max_sequences=5)), key(dictionaries, task),
        key(dictionaries, task, settings=EdgeSettings()), key(dictionaries, task, settings=EdgeSettings(steps=3)),
        key(dictionaries, text_source(str(folder / "corpus.txt"), model.tokenizer, replace(OPTIONS, skip_positions=2))),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(dict(reversed(dictionaries.items())), source) == keys[0]


def test_what_model_and_dictionaries_were_called_is_kept_and_is_no_part_of_the_key(model, dictionaries, source) -> None:
    plain = plan_samples(model, dictionaries, source, OPTIONS)
    named = plan_samples(model, dictionaries, source, OPTIONS, named={"model": "here/model", "dictionaries": "here/dictionaries"})
    assert named.key == plain.key
    assert named.settings["named"] == {"model": "here/model", "dictionaries": "here/dictionaries"}
    assert "named" not in plain.settings
    assert plain.dictionaries == named.dictionaries == {site.name: dictionaries[site].id for site in (MLP, ATTN, RESID)}


def test_an_interrupted_run_leaves_nothing(whole, model, dictionaries, source, tmp_path, monkeypatch) -> None:
    store = SampleStore(tmp_path)

    def stop(done: int, total: int, tokens: int) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_samples(store, model, dictionaries, source, OPTIONS, progress=stop)
    assert not list(store.folder.iterdir())
    # a process that was killed could not clean up: its folder is no run, and goes later
    killed = store.folder / f".{whole[1].key}.abc"
    shutil.copytree(whole[0].folder / whole[1].key, killed)
    assert store.runs() == []
    collect_samples(store, model, dictionaries, source, OPTIONS)
    assert killed.exists()  # another process may be at it
    store.delete(whole[1].key)
    for path in (*killed.iterdir(), killed):
        os.utime(path, (time.time() - 4000,) * 2)
    run = collect_samples(store, model, dictionaries, source, OPTIONS)
    assert [path.name for path in store.folder.iterdir()] == [run.key]
    for site in run.sites:
        name = f"{run.key}/{site.site}.npz"
        assert (store.folder / name).read_bytes() == (whole[0].folder / name).read_bytes()


def test_a_process_that_is_beaten_by_another_is_content(whole, tmp_path) -> None:
    _, run = whole
    store = SampleStore(tmp_path)
    samples = [whole[0].read(run.key, site) for site in run.dictionaries]
    with store.writing(run.key) as writer:
        for site in samples:
            writer.add(site.site, sparse.csr_matrix(site.values))
        writer.add_tokens(whole[0].tokens(run.key))
        store.write(run, samples)
        first = store.find().finished
        assert writer.finish(run).finished == first
    assert [path.name for path in store.folder.iterdir()] == [run.key]


def test_a_value_that_is_no_number_is_named(model, dictionaries, source, tmp_path) -> None:
    broken = {RESID: dictionaries[RESID], ATTN: tiny_dictionary("relu", 16, seed=3, basis=Basis.HEADS)}
    broken[ATTN].b_enc[3] = torch.inf
    with pytest.raises(NotFinite, match="attn_1"):
        collect_samples(SampleStore(tmp_path), model, broken, source, OPTIONS)


# -- the store -----------------------------------------------------------------------------------------------


def made(key: str = "abc123", *, finished: str = "", **changed: Any) -> tuple[SampleRun, list[SiteSamples]]:
    """A run of two sequences of three tokens at one sparse and one dense site."""
    random = np.random.default_rng(0)
    sequence, position = np.repeat([0, 1], 3), np.tile(np.arange(3), 2)
    values = random.normal(size=(6, 5)).astype(np.float32)
    thin = np.where(random.random((6, 7)) < 0.2, random.random((6, 7)), 0).astype(np.float32)
    sites = [SiteSamples("a", "da", 7, sparse.csr_matrix(thin), sequence, position), SiteSamples("b", "db", 5, values, sequence, position)]
    frame = pl.DataFrame({"sequence": [0, 1], "key": ["k", "k"], "task": ["t", "t"], "label": ["x", None], "text": ["one", "two"]})
    run = SampleRun(key, "m@1", "activation", "t", {"a": "da", "b": "db"}, 2, 6, {"seed": 3}, frame, finished=finished)
    return replace(run, **changed), sites


def test_what_is_written_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(kept, "CHUNK_ROWS", 4)
    store = SampleStore(tmp_path)
    run, sites = made()
    assert store.runs() == []
    assert not store.has(run.key)
    written = store.write(run, sites, ["one", "two", "three", "four", None, "six"])
    assert store.has(run.key)
    for site in sites:
        found = store.read(run.key, site.site)
        np.testing.assert_array_equal(dense(found), dense(site))
        assert found.dense == site.dense
        np.testing.assert_array_equal(found.group, 0)  # both sequences have one key
        np.testing.assert_array_equal(found.position, site.position)
    scipys = sparse.load_npz(store.folder / run.key / "a.npz")
    np.testing.assert_array_equal(scipys.toarray(), dense(sites[0]))
    assert store.tokens(run.key)["text"].to_list() == ["one", "two", "three", "four", None, "six"]
    again = store.find("abc")
    assert again.settings == {"seed": 3}
    assert again.sequences.equals(run.sequences)
    assert again.n_bytes == sum((store.folder / run.key / f"{site}.npz").stat().st_size for site in "ab")
    assert store.write(replace(run, settings={}), sites).finished == written.finished  # left as it is


def test_runs_are_found_by_key_model_and_dictionaries(tmp_path) -> None:
    store = SampleStore(tmp_path)
    first, sites = made("abc1")
    store.write(first, sites)
    store.write(replace(first, key="abd2", basis="attribution"), sites)
    store.write(replace(first, key="xyz3", model="other"), sites)
    assert [run.key for run in store.runs()] == ["abc1", "abd2", "xyz3"]
    assert store.find().key == "xyz3"
    assert store.find("abd").key == "abd2"
    latest = lambda *given: getattr(store.latest(*given), "key", None)
    assert latest("m@1", {"a": "da"}) == "abd2"
    assert latest("m@1", {"a": "da"}, "activation") == "abc1"
    assert latest("m@1", {"a": "another"}) is None
    with pytest.raises(NoSamples, match=r"not unique.*abc1 \(activations of t"):
        store.find("ab")
    with pytest.raises(NoSamples, match="'q'"):
        store.find("q")
    with pytest.raises(NoSamples, match="no site 'c': they have a, b"):
        store.read("abc1", "c")
    with pytest.raises(NoSamples, match="nothing"):
        store.read("nothing", "a")
    with pytest.raises(NoSamples, match="featlas ingest samples"):
        SampleStore(tmp_path / "none", read_only=True).find()
    assert not (tmp_path / "none").exists()
    store.delete("abd2")
    assert not store.has("abd2")


def test_what_does_not_fit_is_not_written(tmp_path) -> None:
    store = SampleStore(tmp_path)
    run, sites = made()
    for wrong in (replace(run, n_tokens=7), replace(run, n_sequences=3), replace(run, dictionaries={"a": "da"})):
        with pytest.raises(BadSamples, match="6 tokens"):
            store.write(wrong, sites)
    with pytest.raises(BadSamples, match="no tokens"):
        store.write(run, [])
    with pytest.raises(BadSamples, match="no name of a site"):
        store.write(run, [replace(sites[0], site="../a")])
    with pytest.raises(BadSamples, match="for reading"):
        SampleStore(tmp_path, read_only=True).write(run, sites)
    with pytest.raises(BadSamples, match=r"\(6, 5\).*6 tokens × 7"):
        replace(sites[1], d_sae=7)
    assert not list(store.folder.iterdir())


def test_samples_of_a_newer_featlas_are_refused(tmp_path) -> None:
    store = SampleStore(tmp_path)
    run, sites = made()
    store.write(run, sites)
    path = store.folder / run.key / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layout": 2}))
    with pytest.raises(NewerSamples, match="layout 2"):
        store.read(run.key, "a")


def test_measures_are_those_of_the_statistics(whole, model, dictionaries, source) -> None:
    """The rows are in the order in which the measure gives them."""
    store, run = whole
    nodes = activation_measure(bind(model), dictionaries, 1)(source.batches[1])[RESID]
    own = store.read(run.key, "resid_1").values[20:40].tocoo()
    np.testing.assert_array_equal(own.row, nodes.row.numpy())
    np.testing.assert_array_equal(own.col, nodes.feature.numpy())


def test_the_files_are_plain(whole) -> None:
    """No pickle, and no path of this machine, in what is handed on."""
    store, run = whole
    folder = store.folder / run.key
    assert sorted(path.name for path in Path(folder).iterdir()) == [
        "attn_1.npz", "manifest.json", "mlp_0.npz", "resid_1.npz", "sequences.parquet", "tokens.parquet",
    ]  # fmt: skip
    with np.load(folder / "resid_1.npz", allow_pickle=False) as file:
        assert file["format"].item() == b"csr"
        assert file["data"].dtype == np.float32
