"""`featlas ingest samples`: what it keeps and says, and one line with the way out for everything that users get wrong."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from featlas.queries.samples import SampleStore
from featlas.queries.statistics import StatisticsStore

from .study_atlas import SITES, TinyAtlas


@pytest.fixture(scope="module")
def atlas(tiny: TinyAtlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.copied(tmp_path_factory.mktemp("samples"))


@pytest.fixture
def run(featlas, tiny: TinyAtlas, atlas: Path):
    """Run the command on the tiny model in this process: (exit code, standard output, standard error)."""
    named = ("--model", tiny.folder / "model", "--dictionaries", tiny.folder / "dictionaries", "--atlas", atlas)
    return partial(featlas, "ingest", "samples", *named)


def task(tiny: TinyAtlas) -> tuple[object, ...]:
    return "--task", tiny.folder / "task.jsonl"


def test_samples_of_a_task(run, tiny: TinyAtlas, atlas: Path) -> None:
    code, out, err = run(*task(tiny), "--limit", 10)
    assert (code, err) == (0, "")
    store = SampleStore(atlas, read_only=True)
    found = store.find()
    assert out.startswith(f"samples {found.key}: activations at {found.n_tokens:,} tokens of 20 sequences\n")
    for site in SITES:
        line = next(line for line in out.splitlines() if line.startswith(site))
        assert f"{found.site(site).mean_l0:.1f}" in line
    assert f"featlas analyze rois --samples {found.key[:8]}" in out
    assert set(found.sequences["task"]) == {"even", "odd"}
    assert set(found.sequences["label"]) == {"w1", "w2"}

    code, out, _ = run(*task(tiny), "--limit", 10, "--batch-size", 3)
    assert (code, f"samples {found.key}, there already" in out) == (0, True)


@pytest.mark.slow
def test_both_bases_of_a_task_stand_beside_each_other(run, tiny: TinyAtlas, atlas: Path) -> None:
    code, out, _ = run(*task(tiny), "--limit", 8, "--sites", "resid_0,mlp_1", "--json")
    activations = json.loads(out)
    assert (code, activations["basis"], activations["new"], activations["sequences"]) == (0, "activation", True, 16)
    for extra in ((), ("--steps", 4), ("--baseline", "resample"), ("--baseline", "mean", "--statistics-run", tiny.statistics_run[:6])):
        code, out, err = run(*task(tiny), "--limit", 8, "--sites", "resid_0,mlp_1", "--basis", "attribution", "--json", *extra)
        assert code == 0, err
        found = json.loads(out)
        assert (found["basis"], found["new"], found["sequences"]) == ("attribution", True, 8)
        assert found["tokens"] * 2 == activations["tokens"]
        values = SampleStore(atlas).read(found["samples"], "resid_0").values
        dense = values if isinstance(values, np.ndarray) else values.toarray()
        assert (dense > 0).any()
        assert (dense < 0).any()
    keys = {run.key for run in SampleStore(atlas).runs()}
    assert activations["samples"] in keys
    assert [site["site"] for site in activations["sites"]] == ["resid_0", "mlp_1"]
    assert all(site["bytes"] > 0 and site["mean_l0"] > 0 for site in activations["sites"])


def test_samples_of_a_corpus_are_drawn(run, tiny: TinyAtlas, atlas: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{(i * i) % 41}" for i in range(400)))
    code, out, _ = run("--corpus", tmp_path / "text.txt", "--length", 8, "--max-tokens", 100, "--seed", 4)
    assert code == 0
    assert "activations at 98 tokens of 14 sequences (of 50, drawn by seed 4)" in out
    code, out, _ = run("--corpus", tmp_path / "text.txt", "--length", 8, "--limit", 3, "--skip-positions", 2)
    assert (code, "at 18 tokens of 3 sequences\n" in out) == (0, True)


@pytest.mark.slow
def test_mistakes_are_one_line(refused, tiny: TinyAtlas, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w1 w2")
    for arguments, words in (
        ((), ("--corpus", "--task")),
        ((*task(tiny), "--corpus", short), ("--corpus", "--task")),
        (("--corpus", short, "--basis", "attribution"), ("--basis attribution", "--task")),
        (("--corpus", short), ("short.txt", "fewer than 128 tokens")),
        ((*task(tiny), "--max-tokens", 0), ("--max-tokens 0",)),
        ((*task(tiny), "--max-tokens", 3), ("--max-tokens 3", "raise it")),
        ((*task(tiny), "--limit", 0), ("--limit 0",)),
        ((*task(tiny), "--batch-size", 0), ("--batch-size 0",)),
        ((*task(tiny), "--skip-positions", -1), ("skip_positions is -1",)),
        ((*task(tiny), "--skip-positions", 6), ("no position would be left",)),
        ((*task(tiny), "--basis", "attribution", "--baseline", "mean"), ("--statistics-run",)),
        ((*task(tiny), "--basis", "attribution", "--metric", "accuracy"), ("accuracy",)),
        ((*task(tiny), "--basis", "attribution", "--steps", 0), ("--steps 0",)),
        ((*task(tiny), "--sites", "resid_7"), ("resid_7",)),
        (("--task", tmp_path / "none.jsonl"), ("none.jsonl",)),
        (("--corpus", tmp_path / "none"), ("none",)),
    ):
        line = refused(*arguments)
        for word in words:
            assert word in line, line


def test_a_mean_baseline_needs_statistics_in_the_atlas(refused, tiny: TinyAtlas, tmp_path: Path) -> None:
    line = refused(*task(tiny), "--basis", "attribution", "--baseline", "mean", "--statistics-run", "abc", "--atlas", tmp_path)
    assert "no statistics store" in line
    assert not (tmp_path / "samples").exists()


def test_the_statistics_are_left_alone(tiny: TinyAtlas, atlas: Path) -> None:
    with StatisticsStore(atlas, read_only=True) as statistics:
        assert statistics.runs()["run"].to_list() == [tiny.statistics_run]
