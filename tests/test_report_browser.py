"""The report in a real browser, from a file, with nothing to be fetched."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from featlas.pages.payload import answer
from featlas.pages.report import render
from featlas.pages.source import PageSource
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import open_graph
from playwright.sync_api import Page

from .chromium import CHROMIUM, visited
from .layered_circuit import HOSTILE
from .page_atlas import RUN, PageAtlas, key_of, page_atlas

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

READY = "body[data-ready]"
Visit = tuple[Page, list[str], list[str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PageAtlas:
    return page_atlas(tmp_path_factory.mktemp("report") / "atlas", per_site=60, density=0.6)


@pytest.fixture(scope="module")
def source(made: PageAtlas) -> Iterator[PageSource]:
    with open_graph(made.folder, read_only=True) as store, StatisticsStore(made.folder, read_only=True) as statistics:
        yield PageSource(store, statistics, made.folder)


@pytest.fixture(scope="module")
def file(source: PageSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(source), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def visit(file: Path) -> Iterator[Visit]:
    """The page opened in Chromium, with everything it asked for and everything it complained of."""
    with visited(file, READY, str(CHROMIUM)) as visit:
        visit[0].set_default_timeout(60_000)
        yield visit
        _, requests, complaints = visit
        assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert complaints == []


def open_at(page: Page, hash: str) -> None:
    """Go to an address of the page and wait until it is drawn."""
    page.evaluate("(hash) => { location.hash = hash; }", hash)
    page.wait_for_timeout(150)


def circuit(page: Page, hash: str = f"tab=circuits&run={RUN}") -> None:
    open_at(page, "tab=overview")
    open_at(page, hash)
    page.wait_for_selector("#circuit .stage canvas")
    page.wait_for_function("document.getElementById('counts').textContent.length > 0")


def counts(page: Page) -> tuple[int, int]:
    nodes, edges = page.locator("#counts b").all_inner_texts()
    return int(nodes.replace(",", "")), int(edges.replace(",", ""))


def slide(page: Page, value: int) -> float:
    """Drag the threshold's slider; the threshold that the page then has."""
    page.locator("#threshold").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); slider.dispatchEvent(new Event('change')); }", value
    )
    return float(page.locator("#threshold-number").input_value())


def test_overview_says_what_there_is(visit: Visit) -> None:
    page, _, _ = visit
    assert page.title() == "Atlas atlas"
    assert page.locator("nav button").all_inner_texts() == ["Overview", "Circuits", "Features", "Communities"]
    assert "kind" in page.locator("main table").first.inner_text()
    page.locator("main table tbody tr").first.click()
    page.wait_for_selector("#circuit .stage canvas")
    assert page.url.endswith(f"run={RUN}&tab=circuits")


def test_a_threshold_above_all_ways_says_so_and_leaves_the_slider_where_it_is(visit: Visit) -> None:
    page, _, _ = visit
    circuit(page)
    wide = page.locator("#threshold").bounding_box()
    page.locator("#threshold-number").fill("1e9")
    page.locator("#threshold-number").press("Enter")
    assert counts(page) == (0, 0)
    assert "no way to the output" in page.locator("#counts").inner_text()
    assert page.locator("#threshold").bounding_box() == wide


@pytest.mark.parametrize("value", [0, 300, 500, 650])
def test_the_slider_cuts_and_prunes_as_the_library_does(visit: Visit, source: PageSource, value: int) -> None:
    page, _, _ = visit
    circuit(page)
    slide(page, value)
    # the number shown is rounded: typing it cuts there exactly; the page has edges down to a threshold of its own
    box = page.locator("#threshold-number")
    threshold = float(box.input_value()) if value else answer(source, "circuit", {"run": RUN})["settings"]["threshold"]
    box.fill(repr(threshold))
    box.dispatch_event("change")
    expected = answer(source, "circuit", {"run": RUN, "threshold": repr(threshold)})
    assert counts(page) == (len(expected["nodes"]), len(expected["edges"]))
    shown = page.evaluate(
        "(t) => { const d = featlas.drawing, left = featlas.prune(d.nodes, d.edges, t);"
        " return Object.fromEntries(d.nodes.filter((_, i) => left.alive[i]).map((n) => [n.key, left.influence[n.place]])); }", threshold
    )  # fmt: skip
    assert shown == pytest.approx({node["key"]: node["influence"] for node in expected["nodes"]})


def test_pointing_at_a_node_explains_it_and_clicking_opens_it(visit: Visit, source: PageSource) -> None:
    page, _, _ = visit
    circuit(page)
    slide(page, 500)
    page.wait_for_timeout(600)
    key, x, y = page.evaluate("""() => {
      const drawing = featlas.drawing, shown = drawing.nodes.filter((n) => n.kind === "feature" && drawing.where(n.key));
      const key = shown.sort((a, b) => b.influence - a.influence)[0].key, box = document.querySelector(".stage").getBoundingClientRect();
      return [key, box.left + drawing.where(key)[0], box.top + drawing.where(key)[1]];
    }""")
    page.mouse.move(x - 40, y - 30)
    page.mouse.move(x, y, steps=5)
    page.wait_for_selector(".stage .tip:not([hidden])")
    assert "influence" in page.locator(".stage .tip").inner_text()
    page.mouse.click(x, y)
    page.wait_for_selector("#panel:not([hidden]) h2")
    expected = answer(source, "feature", {"key": key})
    assert page.locator("#panel .key").inner_text() == key
    assert page.locator("#panel .context").count() == len(expected["contexts"])
    assert page.locator("#panel .edges").count() == bool(expected["inputs"]) + bool(expected["outputs"])
    # on to a neighbour, and back by the browser's own button
    page.locator("#panel .edges button").first.click()
    first = (expected["inputs"] or expected["outputs"])[0]["key"]
    page.wait_for_function("(key) => document.querySelector('#panel .key').textContent === key", arg=first)
    page.go_back()
    page.wait_for_function("(key) => document.querySelector('#panel .key').textContent === key", arg=key)
    page.keyboard.press("Escape")
    page.wait_for_selector("#panel", state="hidden")


def test_slash_searches_and_escape_ends_it(visit: Visit) -> None:
    page, _, _ = visit
    circuit(page)
    page.keyboard.press("/")
    page.keyboard.type("plain na")
    page.wait_for_selector("#found .hit")
    assert page.locator("#found .hit").all_inner_texts() == ["plain name\nresid_4 / 1"]
    page.keyboard.press("Enter")
    page.wait_for_selector("#panel:not([hidden]) h2")
    assert page.locator("#panel h2").inner_text() == "plain name"
    page.locator("#search").fill("no such thing")
    page.wait_for_selector("#found p")
    page.keyboard.press("Escape")
    page.wait_for_selector("#found", state="hidden")
    assert page.locator("#search").input_value() == ""


def test_hostile_labels_and_tokens_stay_text(visit: Visit) -> None:
    page, _, _ = visit
    for site, index, name in (("resid_0", 0, HOSTILE), ("resid_0", 1, "</script><b>bold"), ("resid_4", 0, 'quotes " and \' and ⏎ and ${x}')):
        open_at(page, f"feature={key_of(site, index).replace('|', '%7C')}")
        page.wait_for_function("(name) => document.querySelector('#panel h2')?.textContent === name", arg=name)
    assert page.title() == "Atlas atlas"
    assert page.locator("b:text-is('it')").count() == 0
    page.keyboard.press("Escape")
    open_at(page, "tab=features")
    page.locator("#filter").fill("document.title")
    assert page.locator("main tbody tr td:first-child").all_inner_texts() == [HOSTILE]


def test_a_sequence_is_drawn_by_its_tokens(visit: Visit) -> None:
    page, _, _ = visit
    circuit(page, f"tab=circuits&run={RUN}&sequence=seq-a")
    toggle = page.locator("button", has_text="by token position")
    assert toggle.get_attribute("aria-pressed") == "true"
    columns = page.evaluate("""() => {
      const shown = featlas.drawing.nodes.filter((n) => featlas.drawing.where(n.key));
      return Object.fromEntries(shown.map((n) => [n.pos, Math.round(n.x / 208)]));
    }""")
    assert columns == {str(pos): pos for pos in map(int, columns)}
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "false"


def test_communities_and_their_members(visit: Visit) -> None:
    page, _, _ = visit
    open_at(page, "tab=communities")
    page.wait_for_selector("table.heat")
    page.locator("main tbody tr").nth(1).click()
    page.wait_for_selector("#block:not([hidden]) .chip")
    assert page.locator("#block .chip").count() == 3
    page.locator("#block .chip").first.click()
    page.wait_for_selector("#panel:not([hidden]) h2")
    page.keyboard.press("Escape")


def test_thousands_of_edges_stay_fluid(visit: Visit) -> None:
    page, _, _ = visit
    circuit(page)
    slide(page, 0)
    assert counts(page)[1] > 3000
    median = page.evaluate("""async () => {
      const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))), times = [];
      for (let i = 0; i < 15; i++) {
        const start = performance.now();
        featlas.drawing.cy.panBy({ x: 5, y: 2 });
        await frame();
        times.push(performance.now() - start);
      }
      return times.sort((a, b) => a - b)[7];
    }""")
    assert median < 500  # 33 ms on an idle machine without a GPU; a loaded one must still answer


def test_page_fits_a_narrow_window_and_the_dark(visit: Visit) -> None:
    page, _, _ = visit
    page.set_viewport_size({"width": 600, "height": 800})
    for tab in ("overview", "circuits", "features", "communities"):
        open_at(page, f"tab={tab}")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 600, tab
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 1000})


def test_the_policy_lets_nothing_else_run(visit: Visit, file: Path) -> None:
    """What an injected script or address would do is refused by the browser itself."""
    _, _, complaints = visit
    before = len(complaints)
    browser = visit[0].context.browser
    assert browser is not None
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(file.as_uri())
    page.wait_for_selector(READY)
    ran = page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.broken = 1";
      document.body.append(script);
      return window.broken;
    }""")
    fetched = page.evaluate("() => fetch('https://example.invalid/').then(() => 'yes', () => 'no')")
    assert (ran, fetched) == (None, "no")
    assert any("Content Security Policy" in text for text in refused), json.dumps(refused)
    page.close()
    assert len(complaints) == before
