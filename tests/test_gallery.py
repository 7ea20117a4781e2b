"""The gallery's captions and numbers, and the page in a real browser, from a file, with nothing to be fetched."""

import base64
import io
import re
from collections.abc import Iterator
from functools import cache

import polars as pl
import pytest
from featlas.analysis.faithfulness import Bootstrap, areas, per_sequence
from featlas.analysis.gallery import (
    Exhibit,
    GalleryOptions,
    UnknownCandidates,
    completed,
    effects_exhibit,
    gallery,
    improvement_exhibit,
    removal_exhibit,
    sweep_exhibits,
)
from playwright.sync_api import Page
from polars.testing import assert_frame_equal

from .chromium import CHROMIUM, visited
from .layered_circuit import HOSTILE
from .made_scores import DRAWS, GRID, IMPROVED, RATES, RATIOS, UNDEFINED, N, made_effects, made_removals, made_sizes, made_values

METHODS = {name: RATES[name] for name in ("attribution", "node attribution", "random edges")}
FEW = Bootstrap(resamples=50)
OPTIONS = GalleryOptions("logit_diff", candidates=GRID[-1], bootstrap=FEW)


def of_two_tasks() -> pl.DataFrame:
    """The made values, half of the sequences of another task, and accuracy beside the logit difference."""
    odd = pl.col("sequence").str.extract(r"(\d+)").cast(pl.Int64) % 2 == 1
    values = made_values({"attribution": 45.0}).with_columns(task=pl.when(odd).then(pl.lit(HOSTILE)).otherwise("task"))
    return pl.concat([values, values.with_columns(metric=pl.lit("accuracy"))])


@cache
def exhibits() -> tuple[Exhibit, ...]:
    values, sizes = made_values(METHODS), made_sizes(METHODS)
    improved = improvement_exhibit(made_values(IMPROVED), made_sizes(IMPROVED), OPTIONS)
    one_frame = (effects_exhibit(made_effects(200), "logit_diff"), removal_exhibit(made_removals(), "held-out sequences"))
    return (*sweep_exhibits(values, sizes, OPTIONS), improved, *one_frame)


@cache
def page_text() -> str:
    return gallery(exhibits(), f"Circuits {HOSTILE}", subtitle="sub", settings=[("task", HOSTILE)], commands=[f"echo {HOSTILE}"])


@pytest.mark.slow
def test_a_sweep_has_its_exhibits_in_order() -> None:
    shown = sweep_exhibits(of_two_tasks(), made_sizes(METHODS), GalleryOptions("logit_diff", ("kl", "accuracy"), GRID[-1], bootstrap=FEW))
    pooled, *tasks, equal, sequences, area, accuracy = [exhibit.name for exhibit in shown]
    assert (pooled, equal, sequences, area) == ("faithfulness-logit-diff-pooled", "matched", "sequences", "areas")
    assert accuracy == "faithfulness-accuracy-pooled"  # KL was not measured
    assert len(tasks) == 2
    assert len({exhibit.name for exhibit in shown}) == len(shown)
    assert all(re.fullmatch(r"[A-Za-z0-9-]+", exhibit.name) for exhibit in shown)
    assert all(exhibit.question and exhibit.fixed and exhibit.reading and exhibit.table.height for exhibit in shown)
    assert "ratio of means" in shown[-1].fixed
    assert "mean of ratios" in shown[-2].fixed
    without = sweep_exhibits(made_values(METHODS), made_sizes(METHODS), GalleryOptions("logit_diff", bootstrap=FEW))
    assert [exhibit.name for exhibit in without] == ["faithfulness-logit-diff-pooled", "matched", "sequences"]


@pytest.mark.slow
def test_findings_say_what_the_frames_say() -> None:
    first, equal, sequences, *_ = exhibits()
    assert first.findings[0].startswith("By edge ablation, φ ≥ 0.8 is first reached by 317 nodes and 1,000 edges: φ = 0.98")
    assert first.findings[3].startswith("By node ablation, φ ≥ 0.9 is first reached by 701 nodes and 3,000 edges: φ = 0.99")
    random = next(said for said in equal.findings if said.startswith("random edges, edge"))
    assert "higher at 0, lower at 6 and undecided at 2 of 8 sizes" in random  # nothing kept and all kept are the same for every method
    assert sequences.findings == [f"{UNDEFINED} sequences are undefined."]
    assert "1,000 candidates (the smallest to reach 0.8)" in sequences.fixed
    assert f"{N} sequences" in sequences.fixed


def test_a_level_that_nothing_reaches_is_said() -> None:
    values = made_values({"attribution": 45.0}).filter(pl.col("size") <= 100)
    first, *rest = sweep_exhibits(values, made_sizes(METHODS), GalleryOptions("logit_diff", candidates=GRID[-1], bootstrap=FEW))
    assert [exhibit.name for exhibit in rest] == ["matched", "sequences"]  # no areas of a sweep that ends before all candidates
    sequences = rest[-1]
    assert len(first.findings) == 2
    said = "By edge ablation, no circuit of the sweep reaches φ ≥ 0.8 or 0.9; the greatest is of 60 nodes and 100 edges: φ = 0.3"
    assert first.findings[0].startswith(said)
    assert "none reaches 0.8" in sequences.fixed
    assert sequences.table.height == per_sequence(values).filter((pl.col("part") == "circuit") & (pl.col("size") == 30)).height


def test_gains_are_differences_of_cpr_and_need_the_candidates() -> None:
    values, sizes = made_values(IMPROVED), made_sizes(IMPROVED)
    measured = areas(values, GRID[-1], averaging=(RATIOS,), bootstrap=FEW).filter(area="CPR", ablation="edge")
    cpr = dict(measured.select("method", "value").rows())
    said = improvement_exhibit(values, sizes, OPTIONS).findings
    assert f"greedy pruning, edge ablation: CPR {cpr['greedy pruning'] - cpr['attribution']:+.3f} against attribution." in said
    assert len(said) == 4
    with pytest.raises(UnknownCandidates):
        improvement_exhibit(values, sizes, GalleryOptions("logit_diff"))


def test_the_whole_candidate_set_is_measured_once() -> None:
    values = made_values(METHODS)
    short = values.filter((pl.col("method") == "attribution") | (pl.col("size") < GRID[-1]))
    full = completed(short, GRID[-1])
    assert full.height == values.height
    own = full.filter(method="attribution", size=GRID[-1]).drop("method", "draw").sort("ablation", "part", "sequence")
    for draw in range(DRAWS):
        others = full.filter(method="random edges", size=GRID[-1], draw=draw).drop("method", "draw").sort("ablation", "part", "sequence")
        assert_frame_equal(others, own)
    assert_frame_equal(completed(values, {"edge": GRID[-1], "node": GRID[-1]}), values)


def test_the_page_is_one_file_with_every_number() -> None:
    page = page_text()
    assert page.count("plotly.js v") == 1
    assert HOSTILE not in page.replace(page.partition("</script>")[0], "", 1)
    files = re.findall(r'download="([^"]+)" href="data:text/csv;base64,([^"]+)"', page)
    assert [name for name, _ in files] == [f"{exhibit.name}.csv" for exhibit in exhibits()]
    for (_, data), exhibit in zip(files, exhibits()):
        read = pl.read_csv(io.BytesIO(base64.b64decode(data)), infer_schema_length=None)
        assert read.shape == exhibit.table.shape
        for name in ("value", "ratio", "measured"):
            if name in read.columns:
                assert read[name].to_list() == pytest.approx(exhibit.table[name].to_list(), nan_ok=True)
    # A table on the page shows a value beside its interval, and a null as a dash.
    assert "<th class=number>95 % interval</th>" in page
    assert "0.42 … 0.62" in page
    assert "<td class=number>–</td>" in page


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, list[str], list[str]]]:
    """The page opened in Chromium, with everything it asked for and everything it complained of."""
    file = tmp_path_factory.mktemp("gallery") / "gallery.html"
    file.write_text(page_text(), encoding="utf-8")
    with visited(file, "#removals .heatmaplayer image", CHROMIUM) as visit:
        yield visit


_POINT = """([id, name, i]) => {
  const plot = document.getElementById(id); plot.scrollIntoView({block: "center"});
  const trace = plot._fullData.findIndex((t) => t.name === name && t.mode === "lines+markers"), of = plot._fullData[trace];
  const x = plot._fullLayout[of.xaxis === "x" ? "xaxis" : "xaxis" + of.xaxis.slice(1)], y = plot._fullLayout[of.yaxis === "y" ? "yaxis" : "yaxis" + of.yaxis.slice(1)];
  const box = plot.getBoundingClientRect(), point = plot.calcdata[trace][i];
  return [box.left + x._offset + x.c2p(point.x), box.top + y._offset + y.c2p(point.y)];
}"""  # noqa: E501


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
class TestInABrowser:
    """The page as a reader sees it."""

    def test_every_figure_is_drawn_and_nothing_is_fetched(self, visit: tuple[Page, list[str], list[str]]) -> None:
        page, requests, complaints = visit
        assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert complaints == []
        drawn = {exhibit.name: page.locator(f"#{exhibit.name} .main-svg").count() for exhibit in exhibits()}
        assert all(drawn.values())
        marks = {name: page.locator(f"#{name} {of}").count() for name, of in (
            ("faithfulness-logit-diff-pooled", ".scatterlayer .point"), ("sequences", ".violinlayer .point"), ("areas", ".barlayer .point"),
            ("effects", ".scatterlayer .point"), ("removals", ".heatmaplayer image"), ("matched", ".errorbar"),
        )}  # fmt: skip
        # three methods, two parts, two ablations, eight sizes; two marks of the smallest by either ablation, of which one circuit is both
        assert marks["faithfulness-logit-diff-pooled"] == 3 * 2 * 2 * 8 + 3
        assert marks["sequences"] == 3 * 2 * (N - UNDEFINED)
        assert marks["areas"] == 3 * 2 * 2
        assert marks["effects"] == 2 * 200
        assert marks["removals"] == 1
        assert marks["matched"] >= 5 * 8

    def test_names_stay_text(self, visit: tuple[Page, list[str], list[str]]) -> None:
        page, _, _ = visit
        assert page.locator("h1").inner_text() == f"Circuits {HOSTILE}"
        assert page.locator("pre").inner_text() == f"echo {HOSTILE}"
        assert page.locator("nav li").count() == len(exhibits())

    def test_pointing_at_a_mark_gives_its_numbers(self, visit: tuple[Page, list[str], list[str]]) -> None:
        page, _, complaints = visit
        x, y = page.evaluate(_POINT, ["faithfulness-logit-diff-pooled", "attribution", 4])
        page.mouse.move(x - 30, y - 30)
        page.mouse.move(x, y, steps=5)
        page.wait_for_selector("#faithfulness-logit-diff-pooled .hoverlayer .hovertext")
        text = page.locator("#faithfulness-logit-diff-pooled .hoverlayer .hovertext").first.text_content() or ""
        row = exhibits()[0].table.filter(method="attribution", ablation="edge", part="circuit", size=300).row(0, named=True)
        assert f"φ {row['value']:.3f}" in text
        assert f"{row['low']:.3f} … {row['high']:.3f}" in text
        assert "300 edges" in text
        assert f"{N} sequences, {UNDEFINED} undefined" in text
        assert complaints == []

    @pytest.mark.parametrize(
        ("figure", "button"), [("faithfulness-logit-diff-pooled", "nodes"), ("matched", "average degree"), ("effects", "linear")]
    )
    def test_switches_change_the_axes(self, visit: tuple[Page, list[str], list[str]], figure: str, button: str) -> None:
        page, _, complaints = visit
        state = f"JSON.stringify([0, 1].map(() => document.getElementById('{figure}')._fullLayout.xaxis.range))"
        before = page.evaluate(state)
        page.locator(f"#{figure} .updatemenu-button", has_text=button).last.click()
        page.wait_for_function(f"{state} !== {before!r}")
        assert page.locator(f"#{figure} .scatterlayer .point").count() > 0
        assert complaints == []

    def test_page_fits_a_narrow_window(self, visit: tuple[Page, list[str], list[str]]) -> None:
        page, _, _ = visit
        page.set_viewport_size({"width": 700, "height": 800})
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= 700


def test_a_sweep_without_attribution_has_nothing_to_be_matched_to() -> None:
    others = {method: rate for method, rate in METHODS.items() if method != "attribution"}
    shown = sweep_exhibits(made_values(others), made_sizes(others), GalleryOptions("logit_diff", bootstrap=FEW))
    assert "faithfulness-logit-diff-pooled" in [exhibit.name for exhibit in shown]
    assert "matched" not in [exhibit.name for exhibit in shown]
