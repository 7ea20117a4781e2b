"""`featlas serve` in a real browser: open the address, ask, look at the table and the graph, walk to a feature, cut a circuit anew."""

import threading
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import uvicorn
from featlas.pages.live import live_page, scripts
from featlas.pages.reader import AtlasReader
from featlas.pages.server import Served, address_of, listen, make_app
from featlas.queries.store import open_graph
from playwright.sync_api import Page, expect, sync_playwright

from .chromium import CHROMIUM
from .layered_circuit import HOSTILE, layered_circuit

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

TOKEN = "the-token-of-this-test"


def fill(folder: Path) -> None:
    """A run of a random layered graph, whose strongest feature has a hostile label."""
    circuit, _ = layered_circuit(n_sites=4, per_site=12)
    nodes = circuit.nodes.select("key", "site", "layer", "kind", label=pl.when(pl.int_range(pl.len()) == 3).then(pl.lit(HOSTILE)))
    nodes = nodes.with_columns(model=pl.lit("m@1"), dictionary=pl.lit("d"), index=pl.int_range(pl.len()))
    edges = circuit.edges.select("source", "target", "weight", abs_weight=pl.col("strength"), run=pl.lit("abc123"), n=pl.lit(1))
    with open_graph(folder) as store:
        run = {"key": "abc123", "model": "m@1", "task": HOSTILE, "metric": "logit_diff", "dictionaries": "{}", "status": "done", "n_edges": 9}
        store.merge_nodes("Run", pl.DataFrame([run]))
        store.merge_nodes("Feature", nodes)
        store.merge_edges("INFLUENCES", edges)


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, str, list[str], list[str]]]:
    """The page as the printed address opens it, with everything it asked for and everything it complained of."""
    folder = tmp_path_factory.mktemp("alive")
    fill(folder)
    requests: list[str] = []
    complaints: list[str] = []
    with AtlasReader(folder) as reader, listen("127.0.0.1", 0) as bound:
        app = make_app(reader, TOKEN, Served(live_page(), scripts()))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        address = address_of(bound, TOKEN)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1360, "height": 1000})
            page.set_default_timeout(20_000)
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(address)
            page.wait_for_selector("body[data-ready]")
            yield page, address.partition("/?")[0], requests, complaints
            browser.close()
        server.should_exit = True
        thread.join(20)


def cypher(page: Page, base: str) -> None:
    page.goto("about:blank")  # an address that differs in its fragment alone is not loaded anew
    page.goto(f"{base}/#tab=cypher")
    page.wait_for_selector("[data-query=top_edges]")


def ask(page: Page, text: str) -> None:
    page.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(text)
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Enter")


def test_the_token_leaves_the_address_and_the_cookie_stays(visit) -> None:
    page, base, _, _ = visit
    assert TOKEN not in page.url
    assert TOKEN not in page.content()
    assert page.evaluate("document.cookie") == ""
    page.reload()
    page.wait_for_selector("body[data-ready]")
    kept = page.context.cookies()
    assert [(cookie["value"], cookie["httpOnly"], cookie["sameSite"]) for cookie in kept] == [(TOKEN, True, "Strict")]
    assert kept[0]["name"] == f"featlas-{base.rpartition(':')[2]}"


def test_a_named_query_is_asked_by_a_click_and_shown_as_graph_table_and_json(visit) -> None:
    page, base, _, complaints = visit
    cypher(page, base)
    page.fill("input[placeholder^=Filter]", "edges top")
    names = page.locator(".cy-item[data-query]")
    expect(names.first).to_have_attribute("data-query", "top_edges")
    assert names.count() < 4
    page.click("[data-query=top_edges]")
    page.wait_for_selector(".cy-canvas canvas")
    expect(page.locator(".cy-status")).to_contain_text("20 rows in")
    expect(page.locator(".cm-content")).to_contain_text("INFLUENCES")
    assert page.input_value(".cy-parameters textarea") == '{"run":"abc123","limit":20}'
    expect(page.locator(".cy-tools")).to_contain_text("20 edges")
    page.click("[data-view=table]")
    assert page.locator(".cy-table tbody tr").count() == 20
    page.locator(".cy-table th button", has_text="weight").first.click()
    assert page.locator(".cy-table th", has_text="↓").count() == 1
    page.click("[data-view=json]")
    expect(page.locator(".cy-json")).to_contain_text('"source"')
    page.fill(".cy-form input[name=limit]", "3")
    page.click(".cy-form button[type=submit]")
    expect(page.locator(".cy-status")).to_contain_text("3 rows in")
    assert complaints == []


def test_cypher_of_ones_own_its_parameters_and_its_mistakes(visit) -> None:
    page, base, _, complaints = visit
    cypher(page, base)
    page.evaluate("document.querySelector('.cy-parameters').open = true")
    page.fill(".cy-parameters textarea", '{"site": "resid_4"}')
    ask(page, "MATCH (f:Feature) WHERE f.site = $site RETURN f AS feature, f.layer AS layer ORDER BY f.key")
    page.wait_for_selector(".cy-canvas canvas")
    page.click("[data-view=table]")
    assert set(page.locator(".cy-table tbody td.number").all_inner_texts()) == {"4"}
    page.fill(".cy-parameters textarea", "{")
    ask(page, "RETURN 1 AS x")
    expect(page.locator(".cy-error")).to_contain_text("not JSON")
    page.fill(".cy-parameters textarea", "")
    ask(page, "MATCH (f:Feature RETURN f")
    expect(page.locator(".cy-error")).to_contain_text("Parser exception")
    ask(page, "MATCH (f:Feature) SET f.label = 'x'")
    expect(page.locator(".cy-error")).to_contain_text("This page only reads")
    ask(page, "RETURN 1 AS x")
    expect(page.locator(".cy-error")).to_be_hidden()
    expect(page.locator(".cy-status")).to_contain_text("1 row in")
    # what was refused stands in the browser's console as a failed request, and nothing else does
    assert all("400" in text for text in complaints)
    complaints.clear()


def test_what_was_asked_is_remembered_and_hostile_labels_stay_text(visit) -> None:
    page, base, _, complaints = visit
    cypher(page, base)
    ask(page, "MATCH (f:Feature) WHERE f.label IS NOT NULL RETURN f AS f, f.label AS label")
    page.wait_for_selector(".cy-canvas canvas")
    page.click("[data-view=table]")
    assert page.locator(".cy-table tbody td").nth(1).text_content() == HOSTILE
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    page.reload()
    page.wait_for_selector(".cy-item code")
    expect(page.locator(".cy-item code").first).to_contain_text("f.label IS NOT NULL")
    page.locator(".cy-item:has(code)").first.click()
    expect(page.locator(".cm-content")).to_contain_text("f.label IS NOT NULL")
    assert complaints == []


def node_at(page: Page, kind: str) -> tuple[float, float]:
    """Where on the screen the first node of a kind is drawn."""
    return page.evaluate(
        """(kind) => {
          const canvas = document.querySelector(".cy-canvas"), box = canvas.getBoundingClientRect(), chart = canvas._cyreg.cy;
          const at = chart.nodes().filter((node) => node.data("properties").kind === kind)[0].renderedPosition();
          return [box.left + at.x, box.top + at.y];
        }""",
        kind,
    )


def test_a_node_tells_what_it_is_grows_by_its_neighbours_and_leads_to_its_page(visit) -> None:
    page, base, _, complaints = visit
    cypher(page, base)
    ask(page, "MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature) WHERE a.kind = 'feature' RETURN e AS e ORDER BY e.abs_weight DESC LIMIT 1")
    page.wait_for_selector(".cy-canvas canvas")
    page.locator(".cy-canvas").scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    page.mouse.click(*node_at(page, "feature"))
    expect(page.locator(".cy-panel")).to_contain_text("m@1|d|")
    before = page.evaluate("document.querySelector('.cy-canvas')._cyreg.cy.nodes().length")
    page.click("[data-expand]")
    expect(page.locator(".cy-panel")).to_contain_text("more node")
    assert page.evaluate("document.querySelector('.cy-canvas')._cyreg.cy.nodes().length") > before
    page.click("[data-feature]")
    expect(page.locator("#panel")).to_be_visible()
    assert "feature=" in page.url
    address = page.url
    page.goto("about:blank")
    page.goto(address)  # a deep link
    expect(page.locator("#panel")).to_be_visible()
    assert complaints == []


def test_a_circuit_is_cut_anew_by_the_server(visit) -> None:
    page, base, requests, complaints = visit
    page.goto(f"{base}/#tab=circuits")
    page.wait_for_selector("#counts b")
    whole = page.locator("#counts").inner_text()
    requests.clear()
    page.fill("#cut-edges", "70")
    page.locator("#cut-edges").press("Enter")
    expect(page.locator("#counts")).not_to_have_text(whole)
    assert any("/api/circuit?" in url and "edges=70" in url for url in requests)
    few = page.locator("#counts b").nth(1).inner_text()
    assert 0 < int(few) <= 70
    page.fill("#cut-least", "0.0001")
    page.locator("#cut-least").press("Enter")
    expect(page.locator("#counts b").nth(1)).not_to_have_text(few)
    assert any("threshold=0.0001" in url for url in requests)
    assert complaints == []


def test_the_page_asks_its_own_server_alone(visit) -> None:
    _, base, requests, _ = visit
    assert requests
    assert [url for url in requests if not url.startswith((base, "data:", "blob:", "about:"))] == []
