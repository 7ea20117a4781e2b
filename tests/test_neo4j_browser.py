"""What makes Neo4j Browser ready for features: the style, the guide, saved queries; and the real Browser, which shows them."""

import html
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import polars as pl
import pytest
from featlas.analysis.circuits import Selection, run_circuit, write_circuit
from featlas.queries.neo4j_browser import (
    ONLY_ASKED,
    NotANeo4j,
    draw_circuit,
    drawn_question,
    files_server,
    grass,
    guide,
    mark_nodes,
    questions,
    style,
    style_command,
    unmark,
    write_browser_files,
)
from featlas.queries.schema import EDGES, NODES
from featlas.queries.store import GraphStore, ServerCredentials, open_graph
from featlas.queries.streaming import edge_blocks, node_blocks
from featlas.queries.subgraphs import find_run

from .chromium import CHROMIUM
from .study_atlas import TinyAtlas

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from .servers import Neo4jTestServer

LAYERS = (0, 1, 12)


def parsed(text: str) -> dict[str, dict[str, str]]:
    """GraSS as the Browser reads it: quotes are dropped, braces in them kept, `;` and the first `:` tell properties apart."""
    found = {}
    for selector, body in re.findall(r"([\w.]+)\s*\{((?:'[^']*'|[^'}])*)\}", text):
        pairs = (line.split(":", 1) for line in body.split(";") if ":" in line)
        found[selector] = {name.strip(): value.strip().strip("'") for name, value in pairs}
    return found


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_file_says_the_rules() -> None:
    rules = style(LAYERS)
    assert parsed(grass(rules)) == rules


def test_each_label_has_a_rule_of_its_own_before_those_of_several() -> None:
    """A label without colour and caption is given a rule by the Browser, over all others."""
    selectors = list(style(LAYERS))
    rules = style(LAYERS)
    for label in ("Feature", "Residual", "Attention", "Mlp", "Embedding", "Error", "Output", "L0", "L1", "L12"):
        assert {"color", "caption"} <= set(rules[f"node.{label}"]), label
    for several in (selector for selector in selectors if selector.count(".") == 2):
        assert all(selectors.index(f"node.{label}") < selectors.index(several) for label in several.split(".")[1:])


def test_layers_darken_widths_grow_and_texts_can_be_read() -> None:
    rules = style(LAYERS)
    light = [luminance(rules[f"node.Residual.L{layer}"]["color"]) for layer in LAYERS]
    assert light == sorted(light, reverse=True)
    widths = [float(rules[f"relationship.RAISES_{i}"]["shaft-width"].removesuffix("px")) for i in range(1, 6)]
    assert widths == sorted(set(widths))
    for selector, rule in rules.items():
        if selector.startswith("node."):
            low, high = sorted((luminance(rule["color"]), luminance(rule["text-color-internal"])))
            assert (high + 0.05) / (low + 0.05) > 2.5, selector


def test_the_command_is_one_line_that_the_editor_does_not_cut() -> None:
    command = style_command(style(LAYERS))
    assert not set(";\n") & set(command)
    assert json.loads(command.removeprefix(":style ")) == style(LAYERS)


def test_there_are_ten_questions_each_in_the_guide_and_the_files(tmp_path: Path) -> None:
    assert len(questions()) == 10
    page = guide()
    for question in (*questions(), drawn_question()):
        assert html.escape(question.title) in page
        assert html.escape(question.cypher) in page
        assert question.about.endswith(".")
    files = write_browser_files(tmp_path / "browser", style(LAYERS))
    assert len(files.queries) == 11
    assert all(path.read_text().startswith("// ") for path in files.queries)
    saved = json.loads(re.search(r"const queries = (\[.*?\n\]);", files.saved.read_text(), re.DOTALL)[1])
    assert saved == [question.script for question in (*questions(), drawn_question())]
    write_browser_files(tmp_path / "browser", style(LAYERS))  # again


@pytest.fixture(scope="module")
def asked(tiny: TinyAtlas, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GraphStore]:
    """The tiny atlas with a saved circuit and a region."""
    with open_graph(tiny.copied(tmp_path_factory.mktemp("asked"))) as graph:
        run = find_run(graph, tiny.runs["main"])
        write_circuit(graph, run_circuit(graph, run, Selection(run.key), n_edges=30))
        member = graph.query("MATCH (f:Feature) WHERE f.kind = 'feature' RETURN f.key AS key ORDER BY key LIMIT 3")["key"]
        graph.merge_nodes("Block", pl.DataFrame([{"key": "b", "kind": "roi", "chosen": True, "size": 3, "automatic_label": "w1"}]))
        graph.merge_edges("MEMBER_OF", pl.DataFrame({"source": member, "target": ["b"] * 3}))
        key = run.key
        weak = graph.read_edges("INFLUENCES", run=key).filter(pl.col("n") > 1).head(1).with_columns(weight=pl.col("abs_weight") / 10)
        graph.merge_edges("INFLUENCES", weak)
        yield graph


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.name)
def test_each_question_is_answered_by_the_embedded_graph(question: "object", asked: GraphStore) -> None:
    assert asked.query(question.cypher).height > 0


def test_an_embedded_graph_has_no_browser(asked: GraphStore) -> None:
    for call in (mark_nodes, unmark, lambda graph: draw_circuit(graph, "x")):
        with pytest.raises(NotANeo4j, match="featlas neo4j up"):
            call(asked)


def copied(source: GraphStore, server: "Neo4jTestServer") -> GraphStore:
    """The graph of `source` on the server."""
    target = open_graph(server.uri, credentials=ServerCredentials(server.username, server.password, "neo4j"))
    for label in NODES:
        for (rows,) in node_blocks(label, source) if label != "Meta" else ():
            target.merge_nodes(label, rows)
    for type in EDGES:
        for (rows,) in edge_blocks(type, source):
            target.merge_edges(type, rows)
    return target


@pytest.mark.neo4j
def test_each_question_is_answered_by_neo4j_and_marks_come_and_go(asked: GraphStore, clean_neo4j: "Neo4jTestServer") -> None:
    with copied(asked, clean_neo4j) as graph:
        for question in questions():
            assert graph.query(question.cypher).height > 0, question.name
        before = graph.query("MATCH (n) RETURN properties(n) AS x ORDER BY n.key")
        assert mark_nodes(graph) == mark_nodes(graph) == [0, 1]
        labelled = "f:Error AS error, f:Output AS output, f:Residual OR f:Mlp OR f:Embedding AS named"
        kinds = graph.query(f"MATCH (f:Feature) RETURN f.kind AS kind, {labelled}")
        for row in kinds.iter_rows(named=True):
            assert (row["error"], row["output"], row["named"]) == (row["kind"] == "error", row["kind"] == "output", row["kind"] == "feature")
        key, n = draw_circuit(graph, "")
        assert draw_circuit(graph, key) == (key, n)
        types = graph.query("MATCH ()-[e]->() WHERE type(e) =~ '(RAISES|LOWERS)_.' RETURN type(e) AS type, e.weight AS weight")
        assert types.height == n
        greatest = types["weight"].abs().max()
        for row in types.iter_rows(named=True):
            place = min(5, 1 + int(5 * (abs(row["weight"]) / greatest) ** 0.5))
            assert row["type"] == f"{'RAISES' if row['weight'] > 0 else 'LOWERS'}_{place}"
        assert json.loads(graph.query("MATCH (f:Feature:Error) RETURN f LIMIT 1")["f"][0])["label"] == "Feature"
        unmark(graph)
        assert graph.query(drawn_question().cypher).is_empty()
        assert graph.query("MATCH (f:Feature) WHERE size(labels(f)) > 1 RETURN f").is_empty()
        assert before.equals(graph.query("MATCH (n) RETURN properties(n) AS x ORDER BY n.key"))


@contextmanager
def logged_in(server: "Neo4jTestServer", limit_ms: float = 60_000) -> "Iterator[Page]":
    """The real Browser in a real Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1500, "height": 1050})
        page.set_default_timeout(limit_ms)
        page.goto(f"{server.info.http_url}/browser/?{urlencode({'dbms': server.uri, 'db': 'neo4j', 'cmd': 'edit', 'arg': 'RETURN 1'})}")
        page.fill("[data-testid=username]", server.username)
        page.fill("[data-testid=password]", server.password)
        page.click("[data-testid=connect]")
        page.wait_for_selector("[data-testid=password]", state="detached")
        yield page
        browser.close()


def run_in_editor(page: "Page", text: str) -> None:
    page.click(".monaco-editor")
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(text)
    page.keyboard.press("Control+Enter")


@pytest.mark.neo4j
@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install chromium")
def test_the_real_browser_shows_the_style_the_guide_and_the_saved_queries(
    asked: GraphStore, clean_neo4j: "Neo4jTestServer", tmp_path: Path
) -> None:
    with copied(asked, clean_neo4j) as graph:
        rules = style(mark_nodes(graph))
        n_edges = draw_circuit(graph, "")[1]
        n_nodes = graph.query("MATCH (c:Circuit) RETURN c.n_nodes AS n")["n"][0]
    files = write_browser_files(tmp_path / "files", rules)
    with files_server(files.folder, 0) as server, logged_in(clean_neo4j) as page:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://localhost:{server.server_port}"
        run_in_editor(page, f":style {address}/style.grass")
        page.get_by_text("node.Feature {").wait_for()
        run_in_editor(page, f":play {address}/guide.html")
        page.get_by_text("A graph of features").first.wait_for()
        page.screenshot(path=tmp_path / "guide.png")
        run_in_editor(page, ONLY_ASKED)
        run_in_editor(page, ":clear")
        run_in_editor(page, drawn_question().cypher)
        page.wait_for_selector("svg g.node")
        page.wait_for_timeout(3000)  # the layout settles
        page.screenshot(path=tmp_path / "circuit.png")
        assert (page.locator("svg g.node").count(), page.locator("svg g.relationship").count()) == (n_nodes, n_edges)
        fills = page.eval_on_selector_all("svg g.node circle.b-outline", "circles => circles.map(c => c.getAttribute('fill'))")
        assert rules["node.Output"]["color"] in fills
        assert {rules[f"node.{label}"]["color"] for label in ("Embedding", "Residual.L0", "Mlp.L1", "Error")} & set(fills)
        assert set(fills) <= {rule.get("color") for selector, rule in rules.items() if selector.startswith("node")}
        texts = " ".join(page.locator("svg g.node text").all_text_contents())
        assert "logit" in texts
        page.evaluate(files.saved.read_text(encoding="utf-8"))
        page.wait_for_timeout(4000)  # the page is loaded anew
        page.click("[data-testid=navigationFavorites]")
        page.get_by_text("featlas", exact=True).first.click()
        for question in questions():
            page.get_by_text(question.title).first.wait_for()
        page.screenshot(path=tmp_path / "saved.png")
        server.shutdown()
