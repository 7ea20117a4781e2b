"""The documentation is true: it builds without a warning, its commands and options exist, its Cypher parses, every command and query stands in it."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import typer.main
from featlas import cli
from featlas.queries.library import load_query

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
GUIDES = sorted((DOCS / "guides").glob("*.md"))
LARGEST = 3_000_000  # bytes of all figures together
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(kind):
    """(page, text) of every fenced block of a kind."""
    return [(page, body) for page in PAGES for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == kind]


CONSOLE = [
    (page.relative_to(DOCS).as_posix(), line[2:]) for page, body in blocks("console") for line in body.splitlines() if line.startswith("$ featlas")
]
CYPHER = [(page.relative_to(DOCS).as_posix(), body) for page, body in blocks("cypher")]


def command_of(words):
    """The click command that the words name, and what is left of them."""
    command, rest = typer.main.get_command(cli.app), words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"no command {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize(("page", "line"), CONSOLE)
def test_every_console_line_names_a_command_and_options_that_exist(page, line):
    command, rest = command_of(shlex.split(line))
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help", "--version"}
    assert {word for word in rest if re.fullmatch(r"--?[a-z][\w-]*", word)} <= known, page
    if command.name == "query" and rest and not rest[0].startswith("-"):
        given = {word.partition("=")[0] for i, word in enumerate(rest) if rest[i - 1] == "--param"}
        assert given <= {parameter.name for parameter in load_query(rest[0]).parameters}


@pytest.mark.parametrize(("page", "text"), CYPHER, ids=[f"{page}-{i}" for i, (page, _) in enumerate(CYPHER)])
def test_every_cypher_block_is_answered(page, text, store):
    store.query(text)


def test_every_command_stands_in_the_documentation():
    said = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    for name, command in typer.main.get_command(cli.app).commands.items():
        for words in [f"{name} {sub}" for sub in command.commands] if hasattr(command, "commands") else [name]:
            assert re.search(rf"featlas {words}\b", said), f"featlas {words} stands on no page of docs/"


@pytest.mark.parametrize("page", [page for page in GUIDES if page.stem != "index"], ids=lambda page: page.stem)
def test_every_guide_asks_shows_and_explains(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("**Question.** ") == 1
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "Command"
    assert headings[-1] == "How to read it"
    assert f"\n{page.stem}\n" in (DOCS / "guides" / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_and_images_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} leads to {target}, which is not there"


def test_figures_are_small_and_all_shown():
    figures = list((DOCS / "figures").iterdir())
    assert sum(path.stat().st_size for path in figures) < LARGEST
    said = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [path.name for path in figures if f"figures/{path.name}" not in said] == []


def test_the_tutorial_is_kept_without_results():
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)


def test_what_python_blocks_import_exists():
    for page, body in blocks("python"):
        for module, name in re.findall(r"^from (featlas[\w.]*) import (\w+)", body, re.MULTILINE):
            assert hasattr(importlib.import_module(module), name), (page, module, name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_builds_without_a_warning_and_asks_nothing_of_the_network(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path / "site")]
    environment = os.environ | {"FEATLAS_DOCS_EXECUTE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)"', text) == [], page.name
        assert re.findall(r'<link[^>]+stylesheet[^>]+href="(https?:[^"]+)"', text) == [], page.name
    assert "<math" in (tmp_path / "site" / "attribution.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.timeout(900)
def test_the_tutorial_runs_from_top_to_bottom(monkeypatch):
    from nbclient import NotebookClient

    for name in ("FEATLAS_ATLAS", "NEO4J_URI"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) or "plotly" in str(output.get("data", {})) for output in shown)
    assert any("image/svg+xml" in output.get("data", {}) for output in shown)


def test_no_formula_stacks_an_index_under_an_accent() -> None:
    tex2mathml = pytest.importorskip("docutils.utils.math.latex2mathml").tex2mathml
    written = re.compile(r"\$\$?([^$`]+)\$\$?")
    formulas = [(page.name, found) for page in PAGES for found in written.findall(page.read_text(encoding="utf-8")) if "\\" in found]
    assert formulas
    for page, formula in formulas:
        made = tex2mathml(formula)
        assert not ("munderover" in made and "~" in made.partition("munderover")[2].partition("</munderover>")[0]), (page, formula)
