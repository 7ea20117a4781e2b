"""The commands of regions: what they print, keep and write, and one line with the way out for everything that users get wrong."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from featlas import cli
from featlas.queries.samples import SampleStore
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import open_graph

from .study_atlas import TinyAtlas

pytestmark = pytest.mark.slow  # each runs whole commands, copies or loads

FIND = ("--min-count", 1, "--min-sequences", 1, "--method", "ward", "--level", 3, "--nulls", 0)
TEST = ("--held-out", 2, "--shares", "0.4,1", "--edge-shares", "0.5,1", "--blocks", 2, "--drives", 2, "--random-draws", 1)


@pytest.fixture(scope="module")
def prepared(tiny: TinyAtlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny atlas with samples of its task and regions found in them: read only."""
    atlas = tiny.copied(tmp_path_factory.mktemp("regions"))
    model = ("--model", tiny.folder / "model", "--dictionaries", tiny.folder / "dictionaries", "--atlas", atlas)
    for command in (("ingest", "samples", *model, "--task", tiny.folder / "task.jsonl", "--limit", 10), ("analyze", "rois", *FIND, "--atlas", atlas)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["featlas", *map(str, command)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        assert not ended.value.code
    return atlas


@pytest.fixture
def run(featlas):
    """Run `featlas analyze …` in this process: (exit code, standard output, standard error)."""
    return partial(featlas, "analyze")


def contents(atlas: Path) -> dict[str, int]:
    """How much the graph and the statistics have of regions."""
    with open_graph(atlas, read_only=True) as store:
        found = {label: store.query(f"MATCH (n:{label}) RETURN count(n) AS n")["n"][0] for label in ("Partition", "Block", "Circuit", "Score")}
        found |= {kind: store.read_edges(kind).height for kind in ("MEMBER_OF", "PART_OF", "DRIVES", "SCORED")}
    with StatisticsStore(atlas, read_only=True) as statistics:
        return found | {"scores": statistics.query("SELECT count(*) AS n FROM scores")["n"][0]}


def parcellations(run, atlas: Path) -> list[dict]:
    code, out, _ = run("rois", "--list", "--atlas", atlas, "--json")
    assert code == 0
    return json.loads(out)


# --- finding ----------------------------------------------------------------------------------------------------------


def test_regions_are_found_shown_and_kept(run, prepared, tmp_path) -> None:
    before = contents(prepared)
    page, table = tmp_path / "page.html", tmp_path / "regions.csv"
    code, out, err = run("rois", *FIND, "--atlas", prepared, "--gallery", page, "--output", table)
    assert (code, err) == (0, "")
    assert contents(prepared) == before  # found twice is found once
    (kept,) = parcellations(run, prepared)
    assert f"Regions {kept['parcellation']}: ward of activations" in out
    for text in ("live", "chosen by", "number of blocks", "not tested", "embed: 3 regions", "r inside", "featlas query regions"):
        assert text in out, text
    saved = pl.read_csv(table)
    sites = SampleStore(prepared, read_only=True).find().dictionaries
    assert set(saved["site"]) == set(sites)
    assert page.stat().st_size > 10_000
    assert kept["parcellation"] in page.read_text(encoding="utf-8")
    with open_graph(prepared, read_only=True) as store:
        nodes = store.query("MATCH (b:Block)-[:PART_OF]->(p:Partition) RETURN p.site AS site, b.size AS size, b.kind AS kind")
    assert set(nodes["site"]) == set(sites)

    code, out, _ = run("rois", *FIND, "--atlas", prepared, "--json")
    told = json.loads(out)
    assert (code, told["parcellation"], told["method"]) == (0, kept["parcellation"], "ward")
    for row in told["sites"]:
        assert sum(one["size"] for one in told["blocks"] if one["site"] == row["site"]) == row["n_live"]
    assert {row["n_blocks"] for row in told["sites"] if row["level"] == 0} >= {3}


def test_found_before_is_shown_again(run, prepared) -> None:
    key = parcellations(run, prepared)[0]["parcellation"]
    code, found, _ = run("rois", *FIND, "--atlas", prepared)
    code, shown, _ = run("rois", "--parcellation", key[:6], "--atlas", prepared, "--no-write")
    assert (code, shown) == (0, found)


def test_names_are_kept_and_taken_away(run, tiny, prepared, tmp_path) -> None:
    atlas = Path(shutil.copytree(prepared, tmp_path / "atlas"))
    named = ("--label", "embed/0=plural nouns", "--label", "resid_0/1= names ")
    assert run("rois", *FIND, "--atlas", atlas, *named)[0] == 0
    key = parcellations(run, atlas)[0]["parcellation"]
    for arguments in (("--parcellation", key[:8]), FIND):  # kept with the regions, and when they are found again
        code, out, _ = run("rois", *arguments, "--atlas", atlas)
        assert (code, "plural nouns" in out, " names " in out) == (0, True, True)
    with open_graph(atlas, read_only=True) as store:
        labels = store.query("MATCH (b:Block) WHERE b.label = 'plural nouns' RETURN b.site AS site, b.`index` AS i")
    assert labels.rows() == [("embed", 0)]
    code, out, _ = run("rois", "--atlas", atlas, "--label", "embed/1=of those found last")  # nothing is found anew for a name alone
    assert (code, "embed/1 is called 'of those found last' now" in out) == (0, True)
    assert parcellations(run, atlas)[0]["parcellation"] == key
    assert run("rois", "--parcellation", key, "--atlas", atlas, "--label", "embed/0=")[0] == 0
    code, out, _ = run("rois", "--parcellation", key, "--atlas", atlas)
    assert "plural nouns" not in out
    assert "names" in out


def test_no_write_writes_nothing(run, prepared) -> None:
    before, known = contents(prepared), parcellations(run, prepared)
    code, out, _ = run("rois", *FIND[:-4], "--level", 2, "--nulls", 0, "--sites", "resid_0", "--atlas", prepared, "--no-write")
    assert code == 0
    assert "resid_0: 2 regions" in out
    assert "embed" not in out
    assert (contents(prepared), parcellations(run, prepared)) == (before, known)


FIND_MISTAKES = [
    (("--method", "magic"), ("magic",)),
    (("--level", "best"), ("--level 'best'", "held-out, stability, heads, description-length, or a number")),
    (("--level", "0"), ("--level 0", "at least 1")),
    (("--sites", "resid_7"), ("--sites 'resid_7'", "embed, resid_0")),
    (("--samples", "nowhere"), ("'nowhere'", "activations of")),
    (("--parcellation", "nowhere"), ("nowhere",)),
    (("--parcellation", "a", "--samples", "b"), ("give one",)),
    (("--method", "heads"), ("embed", "identity on the heads' outputs")),
    (("--parcellation", "a", "--level", "3"), ("leave out --level",)),
    (("--parcellation", "a", "--sites", "embed"), ("leave out --sites",)),
    (("--min-count", "0"), ("--min-count 0", "at least 1")),
    (("--nulls", "2"), ("--nulls 2", "at least 3")),
    (("--nulls", "-1"), ("--nulls -1", "at least 0")),
    (("--neighbours", "0"), ("--neighbours 0", "at least 1")),
    (("--seconds", "0"), ("--seconds 0", "above 0")),
    (("--show", "0"), ("--show 0", "at least 1")),
    (("--label", "resid_0=x"), ("--label 'resid_0=x'", "SITE/BLOCK=TEXT")),
    (("--label", "resid_7/0=x"), ("'resid_7'", "embed, resid_0")),
    (("--label", "embed/99=x"), ("99",)),
    (("--label", "embed/0=x", "--no-write"), ("leave out --no-write",)),
    (("--dictionaries", "identity"), ("other dictionaries", "--model and --dictionaries")),
]


@pytest.mark.parametrize(("options", "said"), FIND_MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, tuple) else None)
def test_mistakes_of_finding(refused, prepared, options, said) -> None:
    before = contents(prepared)
    how = () if "--parcellation" in options else FIND  # of regions that are shown nothing is chosen
    line = refused("rois", *how, *options, "--atlas", prepared)
    for text in said:
        assert text in line, line
    assert contents(prepared) == before


def test_without_samples(refused, run, tiny, tmp_path) -> None:
    assert "featlas ingest samples" in refused("rois", "--atlas", tiny.atlas)
    assert "no" in refused("ablate-rois", "--run", tiny.runs["main"], "--atlas", tiny.atlas)
    code, out, _ = run("rois", "--list", "--atlas", tiny.atlas)
    assert (code, "featlas analyze rois" in out) == (0, True)


# --- putting them to the test -----------------------------------------------------------------------------------------


def test_regions_are_put_to_the_test_and_what_is_found_is_kept(run, tiny, prepared, tmp_path) -> None:
    atlas = Path(shutil.copytree(prepared, tmp_path / "atlas"))
    page, values = tmp_path / "page.html", tmp_path / "values.csv"
    asked = ("ablate-rois", "--run", tiny.runs["main"], "--atlas", atlas, *TEST)
    code, out, err = run(*asked, "--against", "features,spectral", "--gallery", page, "--output", values)
    assert (code, err) == (0, "")
    key = parcellations(run, atlas)[0]["parcellation"]
    for text in (
        f"Regions {key} (ward, activations) under ablation", "tested on 2 held-out", "Only the strongest units alive", "The strongest units cut",
        "spectral", "features", "random blocks", "Circuits of units", "Which region breaks which task", "Selectivity", "Strongest edges", "written:",
    ):  # fmt: skip
        assert text in out, text
    assert page.stat().st_size > 10_000
    saved = pl.read_csv(values, infer_schema_length=None)
    assert set(saved["test"]) == {"kept", "block cut", "edge cut"}
    assert set(saved["method"]) == {"regions", "spectral", "features", "random blocks"}
    before = contents(atlas)
    assert min(before[kind] for kind in ("DRIVES", "Circuit", "Score", "SCORED", "scores")) > 0
    code, out, _ = run(*asked, "--against", "features,spectral", "--json")
    told = json.loads(out)
    assert (code, told["parcellation"], told["tested"]) == (0, key, 2)
    assert contents(atlas) == before  # written twice is written once
    assert {row["method"] for row in told["compared"]} == {"spectral", "features", "random blocks"}


def test_less_is_tested_and_nothing_written(run, tiny, prepared) -> None:
    before = contents(prepared)
    least = ("--held-out", 1, "--shares", "1", "--edge-shares", "none", "--blocks", 0, "--drives", 0, "--random-draws", 1, "--no-write")
    code, out, err = run("ablate-rois", "--run", tiny.runs["main"], "--atlas", prepared, *least, "--against", "", "--rank", "mean")
    assert (code, err) == (0, "")
    for text in ("Circuits of units", "Which region", "Strongest edges", "written:", "features ("):
        assert text not in out, text
    assert contents(prepared) == before


TEST_MISTAKES = [
    (("--shares", "0"), ("--shares 0", "above 0")),
    (("--shares", "0.1,2"), ("--shares 2", "at most 1")),
    (("--shares", "many"), ("'many'",)),
    (("--edge-shares", "-1"), ("--edge-shares -1",)),
    (("--blocks", "-1"), ("--blocks -1", "at least 0")),
    (("--random-draws", "0"), ("--random-draws 0", "at least 1")),
    (("--held-out", "0"), ("--held-out 0", "at least 1")),
    (("--show", "0"), ("--show 0", "at least 1")),
    (("--parcellation", "nowhere"), ("nowhere",)),
    (("--against", "magic"), ("magic", "ward", "found before")),
    (("--level", "9"), ("--level 9", "levels 0 to")),
    (("--metrics", "logits"), ("'logits'", "logit_diff")),
    (("--draws", "3"), ("--draws 3", "counterfactual")),
]


@pytest.mark.parametrize(("options", "said"), TEST_MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, tuple) else None)
def test_mistakes_of_testing(refused, tiny, prepared, options, said) -> None:
    before = contents(prepared)
    line = refused("ablate-rois", "--run", tiny.runs["main"], "--atlas", prepared, *options)
    for text in said:
        assert text in line, line
    assert contents(prepared) == before


def test_regions_of_other_dictionaries_than_the_runs(refused, tiny, prepared) -> None:
    line = refused("ablate-rois", "--run", tiny.runs["identity"], "--atlas", prepared, *TEST, "--against", "")
    assert "find regions anew" in line
