"""The README is true: its commands run, its Cypher is answered, and every command of featlas stands in it.

A fenced block ```console holds lines `$ featlas …`; the words after `console` are markers of what it needs. All blocks run in one
folder, in the order of the page, so that later ones find what earlier ones made; RUN stands for the graph's run.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from featlas import cli
from featlas.queries.library import load_query
from featlas.queries.store import open_graph
from featlas.queries.subgraphs import list_runs

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = [(header.split(), body) for header, body in re.findall(r"^```(\w[^\n]*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)]


def commands_of(body: str) -> list[str]:
    return [line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ ")]


def console_blocks(*needs: str) -> list[str]:
    """Commands of the blocks that need exactly these."""
    return [line for header, body in BLOCKS if header[0] == "console" and tuple(header[1:]) == needs for line in commands_of(body)]


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """One command of the page in this process; its exit code."""
    words = shlex.split(line)
    assert words[0] == "featlas", line
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def with_run(line: str, atlas: Path) -> str:
    """The line with a run's key: by the end the graph has two runs, the demo's and the ingested one, where the page's reader has one."""
    group, name = line.split()[1:3]
    if group not in ("analyze", "explain", "query", "report", "plot", "export") and "RUN" not in line:
        return line
    if group == "export" and "parquet" in line:  # which is the whole graph
        return line
    if name in ("selectivity", "heads", "vision", "rois", "match", "joint"):  # which measure on their own, or read samples
        return line
    with open_graph(atlas, read_only=True) as graph:
        runs = list_runs(graph)
    # Of a mixture's parts only a run of a mixture can tell; what is plotted is that of the run that was put to the test before.
    key = next(run.key for run in runs if name != "mixture" or "+" in run.task)
    takes_run = group == "query" and not name.startswith("-") and any(p.name == "run" for p in load_query(name).parameters)
    return line.replace("RUN", key) + (f" --param run={key}" if takes_run else "" if group in ("query", "ingest", "compare") else f" --run {key}")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to run in, without the surroundings' settings."""
    for name in ("FEATLAS_ATLAS", "NEO4J_URI", "NEO4J_USERNAME", "NEO4J_PASSWORD", "NEO4J_DATABASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FEATLAS_NEO4J_HOME", str(tmp_path / "neo4j"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "text.txt").write_text(3 * TEXT, encoding="utf-8")
    return tmp_path


def test_every_command_and_group_stands_in_the_readme() -> None:
    named = [command.name for command in cli.app.registered_commands]
    for name in named:
        assert f"`featlas {name}`" in TEXT, name
    for group in cli.app.registered_groups:
        assert group.typer_instance is not None
        heading = " ".join(line for line in TEXT.splitlines() if line.startswith(f"### `featlas {group.name} "))
        for command in group.typer_instance.registered_commands:
            assert f"`{command.name}`" in heading or f"`featlas {group.name} {command.name}`" in heading, (group.name, command.name)
            assert re.search(rf"^\$ featlas {group.name} {command.name}\b", TEXT, re.MULTILINE), (group.name, command.name)


def test_every_console_line_is_a_command() -> None:
    lines = [line for header, body in BLOCKS if header[0] == "console" for line in body.splitlines() if line.strip()]
    assert len(lines) > 20
    assert all(line.startswith("$ featlas ") for line in lines)
    known = {("console",), ("console", "smollm2"), ("console", "smollm2", "slow"), ("console", "neo4j")}
    assert {tuple(header) for header, _ in BLOCKS if header[0] == "console"} <= known


@pytest.mark.parametrize("line", [line for line in console_blocks() if "query" not in line or "--list" in line])
def test_light_commands_run(line: str, clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(line, monkeypatch) == 0


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.timeout(1800)  # some forty commands, one after the other
def test_commands_on_the_language_model_run_one_after_the_other(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_of_the_demo = [line for line in console_blocks() if line.startswith("featlas query")]
    for line in [*console_blocks("smollm2"), *asked_of_the_demo]:
        assert run(with_run(line, clean / "atlas"), monkeypatch) == 0, line
    assert (clean / "report.html").stat().st_size > 1_000_000
    with open_graph(clean / "atlas", read_only=True) as graph:
        for header, body in BLOCKS:
            if header == ["cypher"]:
                assert graph.query(body).height > 0, body
    for number, body in enumerate(body for header, body in BLOCKS if header == ["python"]):
        # A file of its own: nnsight reads the source of the code that it traces.
        script = clean / f"example_{number}.py"
        script.write_text(body, encoding="utf-8")
        done = subprocess.run([sys.executable, script], cwd=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.smollm2
@pytest.mark.slow
def test_training_runs(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in console_blocks("smollm2", "slow"):
        assert run(line, monkeypatch) == 0, line
    assert (clean / "dictionaries" / "resid_3" / "cfg.json").exists()


@pytest.mark.neo4j
@pytest.mark.slow
def test_local_server_goes_up_and_down_and_takes_an_exported_graph(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (clean / "atlas").mkdir()
    with open_graph(clean / "atlas") as graph:
        graph.merge_nodes("Feature", pl.DataFrame([{"key": "a", "label": "ä, \"quoted\""}, {"key": "b", "label": None}]))
        graph.merge_edges("INFLUENCES", pl.DataFrame([{"source": "a", "target": "b", "run": "r", "weight": 0.5}]))
    for line in console_blocks("neo4j"):
        assert run(line, monkeypatch) == 0, line
    assert run("featlas neo4j status", monkeypatch) == 1
