"""The documentation is true: it builds without a warning, its commands and options exist, its Cypher parses, every command and query stands in it."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import typer.main
from featlas import cli
from featlas.errors import UserError
from featlas.queries.library import load_query
from featlas.queries.store import open_graph

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


@cache
def program():
    """The whole program as a click command, made once: nothing of it runs."""
    return typer.main.get_command(cli.app)


def command_of(words):
    """The click command that the words name, and what is left of them."""
    command, rest = program(), words[1:]
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


@pytest.fixture(scope="module")
def empty_graph(tmp_path_factory):
    """A graph with the schema and nothing in it: labels, types and properties that the schema lacks are refused."""
    with open_graph(tmp_path_factory.mktemp("empty") / "graph") as opened:
        yield opened


@pytest.mark.parametrize(("page", "text"), CYPHER, ids=[f"{page}-{i}" for i, (page, _) in enumerate(CYPHER)])
def test_every_cypher_block_fits_the_schema(page, text, empty_graph):
    empty_graph.query(text)


def test_cypher_that_does_not_fit_the_schema_is_refused(empty_graph):
    for text in ("MATCH (f:Feature) RETURN f.colour", "MATCH (f:Latent) RETURN f", "MATCH (f:Feature) RETURN"):
        with pytest.raises(UserError):
            empty_graph.query(text)


@pytest.mark.slow
def test_every_cypher_block_is_answered(store):
    for _, text in CYPHER:
        store.query(text)


def test_every_command_stands_in_the_documentation():
    said = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    for name, command in program().commands.items():
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


def names_of(module):
    """What a module binds at its top, read and not run: importing some of them takes seconds."""
    source = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
    made = {node.id for statement in source.body for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {node.name for node in source.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return made | {alias.asname or alias.name for node in source.body if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}


def test_what_python_blocks_import_exists():
    asked = [(page, *found) for page, body in blocks("python") for found in re.findall(r"^from (featlas[\w.]*) import (\w+)", body, re.MULTILINE)]
    assert asked
    for page, module, name in asked:
        assert name in names_of(module), (page, module, name)


class Foreign(HTMLParser):
    """What a page loads from another host: everything with an address but the links that a reader clicks."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        asked = [value or "" for name, value in attrs if name.rpartition(":")[2] in {"src", "srcset", "href", "data", "poster"}]
        self.found += [(tag, value) for value in asked if tag != "a" and re.match(r"\s*(https?:)?//", value)]


def built(folder, environment):
    """The site, built in a folder without a warning; nothing in it is loaded from another host."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder / "site")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((folder / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        assert Foreign(page.read_text(encoding="utf-8")).found == [], page.name
    for sheet in (folder / "site").rglob("*.css"):
        assert re.findall(r"(?:@import|url\()[\s\"']*(?:https?:)?//[^)\s]*", sheet.read_text(encoding="utf-8")) == [], sheet.name
    return folder / "site"


def test_what_a_page_loads_from_another_host_is_found():
    page = """<a href="https://x.org">x</a><img src="figure.svg"><script>"<img src=//no>"</script><svg xmlns="http://www.w3.org/2000/svg"/>
        <script src="https://cdn.org/a.js"></script><link rel=stylesheet href=//cdn.org/b.css><image xlink:href='http://cdn.org/c.png'/>"""
    assert Foreign(page).found == [("script", "https://cdn.org/a.js"), ("link", "//cdn.org/b.css"), ("image", "http://cdn.org/c.png")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_builds_without_a_warning_and_asks_nothing_of_the_network(tmp_path):
    site = built(tmp_path, os.environ | {"FEATLAS_DOCS_EXECUTE": "0"})
    assert "<math" in (site / "attribution.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.timeout(900)
def test_the_tutorial_runs_from_top_to_bottom_and_its_figures_ask_nothing_of_the_network(tmp_path):
    left_out = ("FEATLAS_ATLAS", "NEO4J_URI", "FEATLAS_DOCS_EXECUTE")
    site = built(tmp_path, {name: value for name, value in os.environ.items() if name not in left_out})
    page = (site / "tutorial.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert page.count("_static/plotly.min.js") == 1
    assert (site / "_static" / "plotly.min.js").stat().st_size > 1_000_000
    assert re.search(r'<img[^>]+src="_images/[^"]+\.svg"', page)


def test_no_formula_stacks_an_index_under_an_accent() -> None:
    tex2mathml = pytest.importorskip("docutils.utils.math.latex2mathml").tex2mathml
    written = re.compile(r"\$\$?([^$`]+)\$\$?")
    formulas = [(page.name, found) for page in PAGES for found in written.findall(page.read_text(encoding="utf-8")) if "\\" in found]
    assert formulas
    for page, formula in formulas:
        made = tex2mathml(formula)
        assert not ("munderover" in made and "~" in made.partition("munderover")[2].partition("</munderover>")[0]), (page, formula)
