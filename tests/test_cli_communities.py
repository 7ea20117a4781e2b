"""The command `analyze communities`: what it prints, saves and writes, and one line with the way out for what users get wrong."""

import json
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from featlas.queries.store import open_graph

from .study_atlas import TinyAtlas

pytestmark = pytest.mark.slow  # each runs whole commands or sweeps

QUICK = ("--seeds", 2, "--no-scan", "--nulls", 2, "--held-out", 2, "--largest", 2, "--control-draws", 1)


@pytest.fixture(scope="module")
def atlas(tiny: TinyAtlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.copied(tmp_path_factory.mktemp("communities"))


@pytest.fixture
def run(featlas):
    """Run `featlas analyze communities` in this process: (exit code, standard output, standard error)."""
    return partial(featlas, "analyze", "communities")


def contents(atlas: Path) -> list[int]:
    with open_graph(atlas, read_only=True) as store:
        counts = [store.query(f"MATCH (n:{label}) RETURN count(n) AS n")["n"][0] for label in ("Partition", "Block", "Score")]
        return [*counts, *(store.read_edges(type).height for type in ("MEMBER_OF", "PART_OF", "SCORED"))]


@pytest.mark.slow
def test_communities_are_found_tested_shown_and_kept(run, tiny, atlas, tmp_path) -> None:
    asked = ("--run", tiny.runs["main"], "--atlas", atlas, "--error-nodes", *QUICK)
    page, nodes = tmp_path / "page.html", tmp_path / "nodes.csv"
    code, out, _ = run(*asked, "--gallery", page, "--output", nodes)
    assert code == 0
    expected = ("communities by leiden", "error nodes kept, output left out", "AMI with sites", "AMI with tasks", "rewired graphs")
    expected += ("Against 2 rewired", "between seeds", "Without each community", "random like it", "paired 95 % intervals", "written: partition")
    for text in expected:
        assert text in out, text
    assert page.stat().st_size > 10_000
    saved = pl.read_csv(nodes)
    before = contents(atlas)
    assert saved.height == before[3] > 0
    assert {"community", "share_even", "share_odd"} <= set(saved.columns)
    code, out, _ = run(*asked, "--json")
    told = json.loads(out)
    assert contents(atlas) == before  # written twice is written once
    assert before[0] == 1
    assert sum(one["size"] for one in told["communities"]) == saved.height
    assert {row["what"] for row in told["following"]} == {"site", "task"}
    assert set(told["tested"]["removals"][0]) == {"task", "removed", "value", "low", "high", "n"}
    assert told["significance"]["p"] >= 1 / 3


def test_without_the_model_and_without_writing(run, tiny, atlas) -> None:
    before = contents(atlas)
    code, out, _ = run("--run", tiny.runs["main"], "--atlas", atlas, "--no-test", "--no-write", "--method", "spectral", "--nulls", 0, "--seeds", 1)
    assert code == 0
    assert "communities by spectral" in out
    assert "Without each community" not in out
    assert contents(atlas) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--resolution", -1), "--resolution -1.0 is out of range"),
        (("--communities", 3), "leiden takes --resolution"),
        (("--method", "spectral", "--resolution", 2), "spectral takes --communities"),
        (("--nulls", -1), "--nulls -1 is too small"),
        (("--seeds", 0), "--seeds 0 is too small"),
        (("--largest", 0), "--largest 0 is too small"),
        (("--threshold", 1e9), "no edge is left of run"),
        (("--task", "ioi"), "no sequence of run"),
        (("--circuit", "zzz"), "no circuit 'zzz'"),
        (("--gds",), "--gds needs a graph on a Neo4j server"),
        (("--gds", "--method", "infomap"), "--gds divides by leiden or louvain, not infomap"),
        (("--gds", "--task", "even"), "--gds divides a run's whole graph"),
    ],
)
def test_mistakes_are_one_line(run, tiny, atlas, arguments, said) -> None:
    code, out, err = run("--run", tiny.runs["main"], "--atlas", atlas, "--no-test", *arguments)
    lines = [line for line in err.splitlines() if line.strip()]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert said in lines[0]
