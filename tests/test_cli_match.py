"""`featlas ingest aligned` and `featlas analyze match`: two tiny models with different tokenizers, what is printed, kept and refused."""

import json
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from featlas.queries.matches import AlignedStore, list_matchings
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import open_graph

from .micro import tiny_module, word_tokenizer
from .study_atlas import TinyAtlas
from .test_alignment import byte_tokenizer
from .test_dictionary_sources import save_sae

pytestmark = pytest.mark.slow  # each runs whole commands, copies or loads

WORDS = [f"w{(7 * i * i + 3 * i) % 41}" for i in range(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `words` and `bytes`, whose tokenizers differ, dictionaries `one` and `two` of both, and a text."""
    made = tmp_path_factory.mktemp("match")
    for seed, (name, tokenizer) in enumerate((("words", word_tokenizer()), ("bytes", byte_tokenizer()))):
        module = tiny_module("llama", seed=seed, n_layers=2, d_model=8, n_heads=2)
        module.resize_token_embeddings(max(len(tokenizer), 48))
        module.save_pretrained(made / name)
        tokenizer.save_pretrained(made / name)
    for seed, name in enumerate(("one", "two")):
        for site in ("resid_0", "resid_1"):
            save_sae(made / name / site, d_in=8, seed=seed)
    (made / "text.txt").write_text(" ".join(WORDS))
    return made


@pytest.fixture
def run(featlas, folder: Path):
    return partial(featlas, "ingest", "aligned", "--atlas", folder / "atlas", "--model", folder / "words", "--dictionaries", folder / "one")


def text(folder: Path) -> tuple[object, ...]:
    return "--corpus", folder / "text.txt", "--length", 40


def test_two_models_with_different_tokenizers(run, featlas, folder: Path) -> None:
    others = ("--other-model", folder / "bytes", "--other-dictionaries", folder / "two", "--other-sites", "resid_1")
    code, out, err = run(*text(folder), *others, "--pool", "last")
    assert (code, err) == (0, "")
    aligned = AlignedStore(folder / "atlas").open()
    assert out.startswith(f"aligned {aligned.key}: {aligned.n_segments:,} segments of {aligned.a.run.n_sequences} sequences\n")
    assert "a segment is 1.00 tokens of A and" in out
    assert "of several the last counts" in out
    assert f"featlas analyze match {aligned.key[:8]}" in out
    assert [side.site_names for side in (aligned.a, aligned.b)] == [("resid_0", "resid_1"), ("resid_1",)]
    code, out, _ = run(*text(folder), *others, "--pool", "last", "--one-at-a-time", "--batch-size", 3, "--json")
    assert (code, json.loads(out)["new"], json.loads(out)["aligned"]) == (0, False, aligned.key)

    match = partial(featlas, "analyze", "match", aligned.key[:6], "--atlas", folder / "atlas")
    code, out, err = match("--fdr", 0.5, "--json", "--gallery", folder / "page.html")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [(row["site_a"], row["site_b"]) for row in found["sites"]] == [("resid_0", "resid_1"), ("resid_1", "resid_1")]
    assert all(0 < row["cka"] < 1 and 0 < row["svcca"] <= 1 for row in found["sites"])
    assert {row["site_a"] for row in found["correspondence"]} == {"resid_0", "resid_1"}
    page = (folder / "page.html").read_text()
    assert "words@" in page
    assert f"featlas analyze match {aligned.key[:8]} --fdr 0.5 --null sequences" in page
    for null, hint in (("sequences", True), ("shift", False)):  # so low a rate that nothing is significant
        code, out, _ = match("--fdr", 1e-6, "--no-write", "--null", null)
        assert (code, "no match: none of the" in out, "their r reaches 0." in out) == (0, True, True)
        assert ("--null shift" in out) == hint
    assert "Which site corresponds to which?" in page
    with open_graph(folder / "atlas", read_only=True) as store:
        edges = store.read_edges("MATCHES")
    assert edges.height == found["edges"] >= edges["mutual"].sum() == found["n_matched"] > 0


def test_other_dictionaries_of_the_same_model(run, featlas, folder: Path, tmp_path: Path) -> None:
    code, out, _ = run(*text(folder), "--other-dictionaries", folder / "two", "--json")
    made = json.loads(out)
    assert (code, made["new"], made["tokens_per_segment"], made["a"]["model"]) == (0, True, [1.0, 1.0], made["b"]["model"])
    assert made["a"]["sites"][0]["dictionary"] != made["b"]["sites"][0]["dictionary"]
    match = partial(featlas, "analyze", "match", made["aligned"], "--atlas", folder / "atlas")
    code, out, _ = match("--output", tmp_path / "pairs.csv", "--edges", "both")
    assert code == 0
    assert "Which site of B each site of A is most like" in out
    assert "Pairs of sites" in out
    key = out.split("matching ")[1].split()[0]
    pairs = pl.read_csv(tmp_path / "pairs.csv")
    assert {"source", "target", "score", "mutual", "assigned", "significant", "method"} <= set(pairs.columns)
    code, out, _ = match()
    assert (code, f"matching {key}" in out, "found before" in out) == (0, True, True)
    code, out, _ = match("--again", "--no-write", "--json")
    assert (code, json.loads(out)["matching"], json.loads(out)["new"], json.loads(out)["edges"]) == (0, key, True, None)
    code, out, _ = featlas("analyze", "match", "--list", "--atlas", folder / "atlas")
    assert (code, key in out) == (0, True)
    with StatisticsStore(folder / "atlas", read_only=True) as statistics:
        assert key in list_matchings(statistics)["matching"].to_list()


def test_the_same_dictionaries_are_their_own_counterparts(run, featlas, folder: Path) -> None:
    code, out, _ = run(*text(folder))
    assert (code, "a segment is a token" in out) == (0, True)
    key = AlignedStore(folder / "atlas").open().key
    code, out, _ = featlas("analyze", "match", key, "--atlas", folder / "atlas")
    assert code == 0
    assert "100.0% of" in out
    assert "each feature is its own counterpart" in out
    assert "resid_0 (100.0%)  resid_0 (1.000)" in out


def test_prompts_of_a_task(featlas, tiny: TinyAtlas, tmp_path: Path) -> None:
    named = ("--model", tiny.folder / "model", "--dictionaries", tiny.folder / "dictionaries", "--atlas", tmp_path)
    code, out, _ = featlas("ingest", "aligned", *named, "--task", tiny.folder / "task.jsonl", "--limit", 12, "--no-covariances", "--json")
    made = json.loads(out)
    assert (code, made["sequences"], made["available"]) == (0, 24, 24)
    code, out, _ = featlas("analyze", "match", "--atlas", tmp_path, "--min-active", 5, "--json")
    found = json.loads(out)
    assert (code, found["settings"]["null"], found["sites"][0]["cka"]) == (0, "shift", None)
    code, out, _ = featlas("analyze", "match", "--atlas", tmp_path / "none", "--list")
    assert (code, "no matchings in" in out) == (0, True)


def test_mistakes_of_ingest_are_one_line(refused, folder: Path) -> None:
    for arguments, words in (
        ((), ("--corpus", "--task")), ((*text(folder), "--task", "agreement"), ("--corpus", "--task")),
        ((*text(folder), "--other-sites", "resid_7"), ("resid_7",)), ((*text(folder), "--other-model", "nowhere/at/all"), ("nowhere",)),
        ((*text(folder), "--length", 1), ("length is 1",)), ((*text(folder), "--max-segments", 0), ("max_segments is 0",)),
        ((*text(folder), "--memory", "1KB", "--pool", "mean"), ("--no-covariances", "--sites")), ((*text(folder), "--limit", 0), ("--limit 0",)),
        (("--corpus", folder / "none"), ("none",)), ((*text(folder), "--batch-size", 0), ("--batch-size 0",)),
    ):  # fmt: skip
        line = refused(*arguments)
        for word in words:
            assert word in line, line


def test_mistakes_of_match_are_one_line(featlas, folder: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("--atlas", tmp_path), ("no aligned samples", "featlas ingest aligned")), (("zz", "--atlas", folder / "atlas"), ("'zz'",)),
        (("--atlas", folder / "atlas", "--fdr", 2), ("fdr is 2",)), (("--atlas", folder / "atlas", "--draws", 0), ("draws is 0",)),
        (("--atlas", folder / "atlas", "--min-active", 100_000), ("100000", "give more text")),
    ):  # fmt: skip
        code, out, err = featlas("analyze", "match", *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        for word in words:
            assert word in err, err
    assert not (tmp_path / "statistics.duckdb").exists()
