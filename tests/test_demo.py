"""The demonstration on the real language model: what it prints, what it leaves, and that its last words are true."""

import contextlib
import io
import shlex
import sys
from pathlib import Path

import pytest
from featlas import cli
from featlas.demo import DemoOptions, NothingSolved, run_demo
from featlas.queries.store import open_graph

from .golden_runs import golden

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]


def test_demo_leaves_a_graph_a_page_and_three_commands_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEATLAS_ATLAS", "NEO4J_URI"):
        monkeypatch.delenv(name, raising=False)
    options = DemoOptions(atlas=tmp_path / "an atlas", output=tmp_path / "page.html", limit=6, candidates=("agreement", "pronoun", "boolean"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        report = run_demo(options)
    said = printed.getvalue()
    assert "no: left out" in next(line for line in said.splitlines() if line.startswith("boolean"))
    assert "6 pairs of agreement+pronoun" in said
    assert report.circuit.n_edges > 20
    assert report.paths[0].nodes[-1].endswith("|y|logit_diff")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    # what a person reads are tokens: nearly all of the most influential features have names
    names = [name for name in report.notes["name"] if not name.startswith("feature ")]
    assert len(names) / report.notes.height > 0.8
    # before the commands: one of them saves a circuit of its own
    differing = golden.differences(golden.read("demo"), golden.numbers(options.atlas))
    assert not differing, golden.table(differing)
    assert len(report.options.commands) == 3
    for command in report.options.commands:
        assert command in said
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with contextlib.redirect_stdout(io.StringIO()) as answer, pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0, command
        assert len(answer.getvalue().splitlines()) > 3, command
    counts = "MATCH (:Feature)-[e:ATTRIBUTES]->(:Feature) RETURN count(e) AS n"
    with open_graph(options.atlas, read_only=True) as graph:
        before = graph.query(counts)["n"].to_list()
    with contextlib.redirect_stdout(io.StringIO()):
        again = run_demo(options)
    with open_graph(options.atlas, read_only=True) as graph:
        assert graph.query(counts)["n"].to_list() == before
        assert graph.query("MATCH (r:Run) RETURN count(r) AS n")["n"].to_list() == [1]
    # the second time the features have labels, which are their names of the first time
    assert again.circuit.key == report.circuit.key
    assert again.notes.select("key", "name").sort("key").equals(report.notes.select("key", "name").sort("key"))


def test_a_model_that_solves_nothing_is_told_so(tmp_path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(NothingSolved, match="solves none of boolean"):
        run_demo(DemoOptions(atlas=tmp_path / "atlas", output=tmp_path / "page.html", limit=4, candidates=("boolean",)))
