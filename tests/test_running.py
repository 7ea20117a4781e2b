"""What stands around every command: JSON everywhere, mistakes as objects, quiet, no colour, completions."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from featlas import checks, cli, completion, configuration, console, interruption, running
from featlas.model.loading import DTYPES
from featlas.model.tasks import TASKS
from featlas.queries import keys

from .study_atlas import TinyAtlas

ROOT: Any = running.tree(cli.app)
LEAVES = list(configuration.leaves(ROOT))
PRINT_NOTHING: set[tuple[str, ...]] = set()
"""Commands that print nothing, and hence no JSON."""

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(("words", "command"), LEAVES, ids=[" ".join(words) for words, _ in LEAVES])
def test_every_command_prints_json_and_can_be_quiet(words: tuple[str, ...], command: Any) -> None:
    options = {option for param in command.params for option in param.opts}
    assert words in PRINT_NOTHING or "--json" in options
    assert {"--quiet", "-q"} <= options
    assert all(param.help for param in command.params if param.param_type_name == "option" and not param.hidden), words


def test_every_command_that_shows_progress_says_what_an_interrupt_leaves() -> None:
    """Each entry of the table is a command, and each function with a bar is that of a command in it (those not in it say the general thing)."""
    known = {words for words, _ in LEAVES}
    assert set(interruption.KEPT) <= known
    assert all(kept.also or kept.counted for kept in interruption.KEPT.values())


def test_names_that_are_known_without_their_libraries() -> None:
    assert tuple(TASKS) == checks.TASK_NAMES
    assert tuple(DTYPES) == checks.DTYPE_NAMES


@pytest.mark.slow
def test_releases_are_those_of_sae_lens() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    assert set(checks.releases()) == set(get_pretrained_saes_directory())


# --- JSON, quiet, colour ---------------------------------------------------------------------------------------------


def test_mistakes_are_objects_with_json(featlas: Run, tmp_path: Path) -> None:
    for arguments, kind, code in (
        (("query", "runs", "--atlas", tmp_path / "none"), "NoAtlas", 2),
        (("query", "runs", "--graph", "bolt://127.0.0.1:1"), "NoAnswer", 1),
        (("ingest", "edges", "--metric", "brilliance"), "BadCommandLine", 2),
        (("ingest", "edges", "--nonsense"), "BadCommandLine", 2),
    ):
        ended, out, err = featlas(*arguments, "--json")
        said = json.loads(err)
        assert (ended, out, said["kind"], said["exit_code"]) == (code, "", kind, code)
        assert said["error"]


def test_json_of_commands_that_had_none(featlas: Run, tmp_path: Path) -> None:
    listed = json.loads(featlas("query", "--list", "--json")[1])
    assert {"query", "parameters", "doc"} == set(listed[0])
    assert "hubs" in {one["query"] for one in listed}
    assert json.loads(featlas("neo4j", "down", "--home", tmp_path, "--json")[1]) == {"stopped": False}
    made = json.loads(featlas("tasks", "bios", "-o", tmp_path / "bios.jsonl", "--limit", 8, "--json")[1])
    assert made == {"output": str(tmp_path / "bios.jsonl"), "biographies": len((tmp_path / "bios.jsonl").read_text().splitlines())}
    code, out, err = featlas("query", "hubs", "--json", "--format", "csv", "--atlas", tmp_path)
    assert (code, out, "--format csv" in json.loads(err)["error"]) == (2, "", True)


@pytest.mark.slow
def test_quiet_keeps_results_and_mistakes(featlas: Run, tiny: TinyAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    cypher = "MATCH (f:Feature) WHERE f.key = $feature RETURN f.key AS key"
    asked = ("query", "--cypher", cypher, "--param", "feature=nope", "--atlas", tiny.atlas, "--json")
    loud = featlas(*asked)
    assert "feature=nope" in loud[2]
    with mock.patch.dict(os.environ):
        for quiet in (featlas("-q", *asked), featlas(*asked, "--quiet")):
            assert quiet == (0, loud[1], "")
        monkeypatch.setenv("FEATLAS_QUIET", "1")
        assert featlas(*asked)[2] == ""
        assert "nowhere" in featlas("query", "runs", "--atlas", "nowhere")[2]
        monkeypatch.delenv("FEATLAS_QUIET")
    assert "feature=nope" in featlas(*asked)[2]  # one quiet command does not silence the next


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("environment", "escapes"), [({"TERM": "xterm-256color"}, True), ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False)])
def test_no_color_is_taken_at_its_word(environment: dict[str, str], escapes: bool) -> None:
    terminal = Terminal()
    with mock.patch.dict(os.environ, environment), contextlib.redirect_stderr(terminal), contextlib.redirect_stdout(terminal):
        os.environ.pop("NO_COLOR", None) if escapes else None
        console.note("a note")
        console.heading("a heading")
        console.table(("n",), [(1,)])
    assert ("\x1b[" in terminal.getvalue()) == escapes
    assert "a note" in terminal.getvalue()


def test_what_steps_say_stands_aside_of_json() -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with console.aside():
            console.heading("a step")
            console.table(("n",), [(1,)])
        console.say_json({"n": 1})
    assert json.loads(out.getvalue()) == {"n": 1}
    assert "a step" in err.getvalue()


# --- options are checked before anything large is loaded --------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    (("--task", "nonsense"), ("'nonsense'", "agreement")),
    (("--task", "agreement+none.jsonl"), ("none.jsonl", "no file")),
    (("--sites", "resid_3,residual_4"), ("'residual_4'", "resid_3")),
    (("--device", "tpu"), ("'tpu'", "cuda")),
    (("--dtype", "float8"), ("'float8'", "bfloat16")),
    (("--model", "./nowhere"), ("./nowhere",)),
    (("--model", "none.gguf"), ("none.gguf",)),
    (("--dictionaries", "/nowhere"), ("/nowhere", "no such folder")),
    (("--dictionaries", "gemma-scope-2b-pt-re"), ("did you mean gemma-scope-2b-pt-res",)),
    (("--batch-size", "0"), ("--batch-size 0",)),
    (("--limit", "0"), ("--limit 0",)),
    (("--graph", "bolt://127.0.0.1:1"), ("bolt://127.0.0.1:1", "featlas neo4j up")),
])  # fmt: skip
def test_cheap_mistakes_cost_no_model(featlas: Run, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    with mock.patch("featlas.model.loading.load_model", side_effect=AssertionError("the model is loaded")):
        code, out, err = featlas("ingest", "edges", *arguments)
    assert (code in (1, 2), out) == (True, "")
    assert all(word in err for word in words), err


# --- completions -----------------------------------------------------------------------------------------------------


def complete(line: str, monkeypatch: pytest.MonkeyPatch, shell: str = "bash") -> list[str]:
    """What a shell is offered for the last word of a line."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line, running.COMPLETE: f"complete_{shell}"}
    out = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["featlas"])
    with mock.patch.dict(os.environ, asked), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return out.getvalue().split()


@pytest.mark.slow
def test_commands_options_and_choices_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete("featlas ana", monkeypatch) == ["analyze"]
    assert "circuit" in complete("featlas analyze ", monkeypatch)
    assert complete("featlas ingest edges --tail", monkeypatch) == ["--tail-dtype"]
    assert complete("featlas ingest edges --first-factor c", monkeypatch) == ["clean"]
    assert complete("featlas query hub", monkeypatch) == ["hubs"]
    assert complete("featlas query hubs --param r", monkeypatch) == ["run="]
    assert complete("featlas ingest edges --task pronoun+agr", monkeypatch) == ["pronoun+agreement", "pronoun+agreement_rc"]
    assert complete("featlas tasks show bool", monkeypatch) == ["boolean"]
    assert complete("featlas ingest edges --sites resid_5,resid_2", monkeypatch) == ["resid_5,resid_23", "resid_5,resid_29"]
    assert complete("featlas ingest edges --dictionaries identity-", monkeypatch) == ["identity-heads"]
    assert complete("featlas ingest edges --dtype bf", monkeypatch) == ["bfloat16"]


def test_keys_of_the_atlas_are_offered(tiny: TinyAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [key for key, _ in keys.measured_runs(tiny.atlas)]
    assert runs
    assert complete(f"featlas analyze circuit --atlas {tiny.atlas} --run ", monkeypatch) == runs
    monkeypatch.setenv("FEATLAS_ATLAS", str(tiny.atlas))
    assert complete(f"featlas report --run {runs[0][:4]}", monkeypatch) == [key for key in runs if key.startswith(runs[0][:4])]
    assert complete("featlas analyze faithfulness --circuit ", monkeypatch) == [key for key, _ in keys.circuits(tiny.atlas)]
    assert complete("featlas ingest edges --statistics-run ", monkeypatch) == [key for key, _ in keys.rows(tiny.atlas, "statistics")]


def test_an_atlas_that_is_not_there_or_broken_has_no_keys(tmp_path: Path) -> None:
    for atlas in (tmp_path / "none", tmp_path):
        assert keys.measured_runs(atlas) == keys.sample_runs(atlas) == keys.circuits(atlas) == keys.rows(atlas, "statistics") == []
        (tmp_path / "runs").mkdir(exist_ok=True)
        for name in ("runs/a.json", "graph.lbug", "statistics.duckdb"):
            (tmp_path / name).write_text("nonsense")


@pytest.mark.slow
def test_completions_load_no_heavy_library(tmp_path: Path) -> None:
    heavy = ("torch", "transformers", "polars", "sae_lens", "nnsight", "numpy", "plotly")
    code = (
        f"import sys; from featlas import cli; sys.argv = ['featlas']\n"
        f"try:\n    cli.main()\nexcept SystemExit:\n    print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    line = f"featlas ingest edges --atlas {tmp_path} --run-"
    asked = {**os.environ, "COMP_WORDS": line, "COMP_CWORD": "5", running.COMPLETE: "complete_bash"}
    for option in ("--task ", "--dictionaries gemma", "--statistics-run "):
        asked["COMP_WORDS"] = f"featlas ingest edges --atlas {tmp_path} {option}"
        asked["COMP_CWORD"] = "6"
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=asked, check=True)
        assert done.stderr.strip() == "[]"
        assert time.monotonic() - began < 10  # a quarter of a second on a quiet machine


def test_the_shells_get_their_scripts(featlas: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setattr("shellingham.detect_shell", lambda shell=shell: (shell, f"/bin/{shell}"))
        monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "")
        code, out, _ = featlas("--show-completion")
        assert code == 0
        assert re.search(r"_FEATLAS_COMPLETE", out), out


def test_offers_are_cut_to_what_was_typed_and_described() -> None:
    offered = completion.dictionaries("demo")
    assert offered == [("demo", "small ones of SmolLM2")]
    assert completion.tasks("ioi+") == [(f"ioi+{name}", "") for name in checks.TASK_NAMES if name != "ioi"]
