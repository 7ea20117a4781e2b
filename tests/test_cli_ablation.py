"""The commands that put circuits to the test: what they print and write, and one line with the way out for everything that users get wrong."""

import json
from pathlib import Path

import polars as pl
import pytest
from featlas.analysis.circuits import Selection, run_circuit, write_circuit
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import open_graph
from featlas.queries.subgraphs import find_run

from .study_atlas import TinyAtlas

pytestmark = pytest.mark.slow  # each runs whole commands, copies or loads

COMMANDS = ("faithfulness", "effects", "mixture", "improve")


@pytest.fixture(scope="module")
def atlas(tiny: TinyAtlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.copied(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def run(featlas):
    """Run featlas in this process: (exit code, standard output, standard error)."""
    return featlas


def contents(atlas: Path) -> tuple[int, int, int]:
    """Circuits and scores in the graph, values in the statistics."""
    with open_graph(atlas, read_only=True) as store:
        counts = [store.query(f"MATCH (n:{label}) RETURN count(n) AS n")["n"][0] for label in ("Circuit", "Score")]
    with StatisticsStore(atlas, read_only=True) as statistics:
        return counts[0], counts[1], statistics.query("SELECT count(*) AS n FROM scores")["n"][0]


def test_faithfulness_measures_shows_and_keeps(run, tiny, atlas, tmp_path) -> None:
    asked = ("analyze", "faithfulness", "--run", tiny.runs["main"], "--atlas", atlas, "--shares", "0.4,1", "--held-out", 4, "--per-sequence", 1)
    asked += ("--controls", "random-edges,node-attribution", "--control-draws", 1, "--metrics", "logit_diff,accuracy")
    page, values = tmp_path / "page.html", tmp_path / "values.csv"
    code, out, _ = run(*asked, "--gallery", page, "--output", values)
    assert code == 0
    for text in ("found on 8 sequences, tested on 4 (held-out)", "baseline counterfactual", "completeness", "random edges", "CPR", "own circuit"):
        assert text in out, text
    assert page.stat().st_size > 10_000
    assert pl.read_csv(values).height == contents(atlas)[2] > 0
    before = contents(atlas)
    code, out, _ = run(*asked, "--json")
    told = json.loads(out)
    assert (code, told["tested"], told["split"]) == (0, 4, "held-out")
    assert contents(atlas) == before  # written twice is written once
    assert before[0] == 2
    code, out, _ = run("plot", "--run", tiny.runs["main"], "--atlas", atlas, "--output", tmp_path / "kept.html")
    assert (code, (tmp_path / "kept.html").stat().st_size > 10_000) == (0, True)


def test_nothing_is_written_where_it_is_not_wanted(run, tiny, atlas) -> None:
    before = contents(atlas)
    few = ("--run", tiny.runs["main"], "--atlas", atlas, "--held-out", 2, "--no-write")
    assert run("analyze", "faithfulness", *few, "--sizes", 150, "--controls", "none", "--metrics", "kl")[0] == 0
    assert run("analyze", "improve", *few, "--candidates", 60, "--found", 1, "--train-steps", 2, "--drop", 0.6, "--shares", "0.5,1")[0] == 0
    code, out, _ = run("analyze", "effects", *few, "--edges", 60, "--show", 3)
    assert code == 0
    assert "one edge alone is cut in the whole model" in out
    assert "have their effects now" not in out
    assert contents(atlas) == before


def test_effects_and_mixture(run, tiny, atlas, tmp_path) -> None:
    few = ("--run", tiny.runs["main"], "--atlas", atlas, "--held-out", 2)
    code, out, _ = run("analyze", "effects", *few, "--edges", 60, "--split", "halves", "--gallery", tmp_path / "effects.html")
    assert code == 0
    assert "of the graph have their effects now" in out
    with open_graph(atlas, read_only=True) as store:
        effects = store.query("MATCH ()-[i:INFLUENCES]->() WHERE i.ablation_effect IS NOT NULL RETURN i.ablation_metric AS metric, count(*) AS n")
        assert effects.row(0)[0] == "logit_diff"
    code, out, _ = run("analyze", "mixture", *few, "--edges", 150, "--control-draws", 1, "--json")
    assert {row["removed"] for row in json.loads(out)["table"]} >= {"nothing", "only even", "only odd"}
    code, out, _ = run("analyze", "mixture", *few, "--edges", 150, "--control-draws", 1, "--ablation", "node", "--gallery", tmp_path / "mixture.html")
    assert code == 0
    assert "what is left when these nodes are cut" in out
    assert out.index("only even") < out.index("random like only even") < out.index("only odd")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("effects.html", "mixture.html"))


MISTAKES = [
    ("circuit", ("--edges", "0"), ("--edges 0", "at least 1")),
    ("circuit", ("--threshold", "-1"), ("--threshold -1", "0 or more")),
    ("circuit", ("--positions",), ("--positions", "--sequence")),
    ("circuit", ("--sequence", "nope"), ("'nope'", "featlas query sequences")),
    ("faithfulness", ("--mean", "per-position"), ("means per position", "counterfactual")),
    ("faithfulness", ("--draws", "3"), ("--draws 3", "counterfactual", "leave it out")),
    ("faithfulness", ("--metrics", "logits"), ("'logits'", "logit_diff, log_prob")),
    ("faithfulness", ("--metrics", ","), ("--metrics is empty", "logit_diff")),
    ("faithfulness", ("--sizes", "20,many"), ("'20,many'", "20,50,200")),
    ("faithfulness", ("--shares", "0.1,2"), ("--shares 2", "0 to 1")),
    ("faithfulness", ("--thresholds", "-1"), ("--thresholds -1", "0 or more")),
    ("faithfulness", ("--sizes", "5", "--shares", "1"), ("--sizes and --shares", "give one")),
    ("faithfulness", ("--sizes", ""), ("--sizes is empty",)),
    ("faithfulness", ("--candidates", "0"), ("--candidates 0", "at least 1")),
    ("faithfulness", ("--held-out", "0"), ("--held-out 0", "--split halves")),
    ("faithfulness", ("--held-out", "2", "--task", "ioi"), ("'ioi'", "even, odd")),
    ("faithfulness", ("--controls", "random"), ("'random'", "random-edges")),
    ("faithfulness", ("--control-draws", "0"), ("--control-draws 0", "--controls none")),
    ("faithfulness", ("--per-sequence", "-1"), ("--per-sequence -1",)),
    ("faithfulness", ("--draws", "0"), ("--draws 0", "at least 1")),
    ("faithfulness", ("--batch-size", "0"), ("--batch-size 0", "at least 1")),
    ("faithfulness", ("--memory", "lots"), ("--memory 'lots'", "512MB")),
    ("faithfulness", ("--memory", "1MB"), ("--memory of 1048576 bytes", "16MB")),
    ("faithfulness", ("--noise-scale", "0"), ("--noise-scale 0", "above 0")),
    ("faithfulness", ("--baseline", "zero", "--mean", "per-position"), ("zero", "mean")),
    ("faithfulness", ("--baseline", "mean", "--statistics-run", "nowhere"), ("nowhere",)),
    ("faithfulness", ("--circuit", "nowhere"), ("nowhere",)),
    ("faithfulness", ("--dictionaries", "identity"), ("--dictionaries identity", "name those of the run")),
    ("faithfulness", ("--sizes", "1", "--held-out", "1"), ("no circuit of 1", "take more of the")),
    ("effects", ("--edges", "0"), ("--edges 0", "at least 1")),
    ("effects", ("--held-out", "0"), ("--held-out 0", "at least 1")),
    ("effects", ("--show", "0"), ("--show 0", "at least 1")),
    ("effects", ("--circuit", "nowhere"), ("nowhere",)),
    ("mixture", ("--edges", "0"), ("--edges 0", "at least 1")),
    ("mixture", ("--held-out", "0"), ("--held-out 0", "at least 1")),
    ("mixture", ("--control-draws", "0"), ("--control-draws 0", "at least 1")),
    ("improve", ("--methods", "better"), ("'better'", "measured, greedy, learned")),
    ("improve", ("--methods", ""), ("--methods ''", "measured, greedy, learned")),
    ("improve", ("--found", "0"), ("--found 0", "at least 1")),
    ("improve", ("--drop", "1.5"), ("--drop 1.5", "between 0 and 1")),
    ("improve", ("--train-steps", "0"), ("--train-steps 0", "at least 1")),
    ("improve", ("--rate", "0"), ("--rate 0", "above 0")),
    ("improve", ("--penalty", "-1"), ("--penalty -1",)),
    ("improve", ("--candidates", "0"), ("--candidates 0", "at least 1")),
]


@pytest.mark.parametrize(("command", "options", "said"), MISTAKES, ids=lambda x: x if isinstance(x, str) else None)
def test_mistakes_name_the_value_and_the_way_out(refused, tiny, atlas, command, options, said) -> None:
    before = contents(atlas)
    line = refused("analyze", command, "--run", tiny.runs["main"], "--atlas", atlas, *options)
    for text in said:
        assert text in line, line
    assert contents(atlas) == before


def test_a_run_or_circuit_that_does_not_fit(refused, tiny, atlas) -> None:
    assert "--run is needed: the graph has 4 runs" in refused("analyze", "faithfulness", "--atlas", atlas)
    assert "nowhere" in refused("analyze", "mixture", "--run", "nowhere", "--atlas", atlas)
    assert "--target" in refused("analyze", "effects", "--run", tiny.runs["probe"], "--atlas", atlas, "--held-out", 1)
    with open_graph(atlas) as store:
        found = find_run(store, tiny.runs["main"])
        key = write_circuit(store, run_circuit(store, found, Selection(found.key), n_edges=70))
    for command in ("faithfulness", "effects"):
        named = ("analyze", command, "--atlas", atlas, "--circuit", key[:10])
        assert f"not of {tiny.runs['identity']}" in refused(*named, "--run", tiny.runs["identity"])
        assert "--split fresh" in refused(*named, "--split", "halves")


def test_plot_without_anything_kept(refused, tiny, atlas, tmp_path) -> None:
    line = refused("plot", "--run", tiny.runs["identity"], "--atlas", atlas, "--output", tmp_path / "none.html")
    assert "featlas analyze faithfulness" in line
    assert not (tmp_path / "none.html").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_atlas(refused, tmp_path, command) -> None:
    assert "no graph in" in refused("analyze", command, "--atlas", tmp_path / "nothing")


def test_a_file_that_cannot_be_written_is_said(run, tiny, atlas, tmp_path) -> None:
    few = ("--run", tiny.runs["main"], "--atlas", atlas, "--held-out", 1, "--sizes", 150, "--controls", "none", "--no-write")
    code, _, err = run("analyze", "faithfulness", *few, "--output", tmp_path / "no" / "values.csv")
    assert (code, "cannot write" in err, "values.csv" in err) == (2, True, True)
