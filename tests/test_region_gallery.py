"""Pages of regions, heads and communities: their numbers, their names as text, and in a real browser with nothing to be fetched."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.analysis.communities import Communities, CommunityOptions, Method, directed_modularity
from featlas.analysis.community_nulls import following
from featlas.analysis.community_records import describe as describe_communities
from featlas.analysis.community_study import CommunityStudy
from featlas.analysis.correlations import correlation
from featlas.analysis.heads import HeadShares, overlap
from featlas.analysis.parcellation import by_size
from featlas.analysis.region_gallery import Tested, communities_page, heads_page, path_exhibits, regions_of_run, regions_page, verdict_page
from featlas.analysis.regions import Description, describe
from featlas.analysis.regions_store import label_block, write_parcellation, write_regions
from featlas.queries.blocks import blocks_of, losses_of
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, open_graph
from featlas.queries.subgraphs import RunRow
from playwright.sync_api import Page

from .chromium import CHROMIUM, visited
from .layered_circuit import HOSTILE
from .region_cases import MODEL, SEQUENCES, TOKENS, small_parcellation, small_samples
from .region_frames import made_drives, made_matrix, made_nodes, made_selectivity, made_sweep
from .test_communities import planted

RUN = RunRow("r1", MODEL, "ioi+gender", "logit_diff", {"resid_0": "d0", "resid_1": "d1", "resid_2": "d2"}, {})


def described() -> Description:
    """The small parcellation's blocks, one of which is called something hostile, with made-up cosines."""
    found = describe(small_parcellation(), small_samples, SEQUENCES, TOKENS)
    blocks = found.blocks.with_columns(label=pl.lit(HOSTILE), mean_cosine=pl.lit(0.1), mean_cosine_outside=pl.lit(0.0))
    return replace(found, blocks=blocks)


def small_correlation(site: str) -> np.ndarray:
    return correlation(small_samples(site), small_parcellation().sites[site].features)


@cache
def pages() -> dict[str, str]:
    compared = pl.DataFrame({"method": ["features", "features"], "difference": [0.2, 0.1], "low": [0.1, -0.1], "high": [0.3, 0.3]})
    tested = Tested(
        made_sweep(), {"Kept": compared}, made_matrix(), made_selectivity(), made_drives(), made_nodes(), "logit_diff", "logit_diff · 12 sequences"
    )
    graph, truth = planted(n_edges=500)
    labels, strengths = by_size(truth), np.eye(2)[np.arange(graph.n) % 2]
    found = Communities(labels, Method.LOUVAIN, directed_modularity(graph, labels))
    study = CommunityStudy(
        RUN, graph, CommunityOptions(Method.LOUVAIN), found, ("ioi", HOSTILE), strengths,
        describe_communities(graph, labels, ("ioi", "b"), strengths), following(graph, found, strengths, draws=20),
    )  # fmt: skip
    blocks, heads = np.array([0, 0, 1, 1, 2, 2, -1]), np.array([0, 0, 1, 1, 1, 0, 1])
    shares = HeadShares(f"attn_0 {HOSTILE}", "d", "encoder", ((0, 0), (0, 1)), np.eye(2)[heads])
    return {
        "regions": regions_page(small_parcellation(), described(), small_correlation, settings=[("samples of", HOSTILE)]),
        "verdict": verdict_page(tested, {"resid_0/block 0": HOSTILE}, f"Regions put to the test {HOSTILE}"),
        "heads": heads_page(blocks, shares, overlap(blocks, shares, draws=20)), "communities": communities_page(study),
    }  # fmt: skip


FIGURES = {
    "regions": ("path-0", "likeness", "correlation-resid-0", "correlation-resid-1"), "verdict": ("sweep", "matrix", "selectivity", "drives"),
    "heads": ("alluvial",), "communities": ("communities-site", "communities-task"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_page_has_its_figures_and_names_stay_text(name: str) -> None:
    page = pages()[name]
    body = page.replace(page.partition("</script>")[0], "", 1)
    assert HOSTILE not in body
    assert tuple(re.findall(r'<section id="([^"]+)-exhibit">', page)) == FIGURES[name]
    assert page.count("plotly.js v") == 1
    assert not re.findall(r'(?:src|href)="https?:', body)


def test_findings_say_what_the_frames_say() -> None:
    verdict, regions = pages()["verdict"], pages()["regions"]
    assert "Kept: φ of features is higher than the regions&#x27; at 1, lower at 0 and undecided at 1 of 2 sizes; mean difference +0.150." in verdict
    assert "ioi loses most without resid_0/block 1: 0.800 (0.700 … 0.900) of its effect." in verdict
    assert "random blocks: selectivity 0.300 (0.100 … 0.600), regions&#x27; subtracted −0.400 (−0.600 … −0.100)." in verdict
    assert "resid_0: 3 blocks of 5 live features, by held-out likelihood (2 by stability between halves)." in regions
    same = made_drives()["weight"].to_numpy() * made_drives()["effect"].to_numpy() > 0
    assert f"the way attribution says for {same.mean():.0%} of 8 edges" in verdict


def test_many_sites_are_shared_out_over_figures_and_none_is_drawn_without_a_path() -> None:
    own = small_parcellation()
    sites = {f"resid_{i}": replace(own.sites["resid_0"], site=f"resid_{i}") for i in range(7)}
    assert [exhibit.table["site"].n_unique() for exhibit in path_exhibits(replace(own, sites=sites))] == [5, 2]
    bare = {name: replace(site, scores=site.scores.clear()) for name, site in own.sites.items()}
    assert path_exhibits(replace(own, sites=bare)) == []
    assert "Settings" in regions_page(replace(own, sites=bare))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[GraphStore, StatisticsStore]]:
    with open_graph(str(tmp_path / "graph.lbug")) as store, StatisticsStore(tmp_path) as statistics:
        yield store, statistics


def test_the_report_knows_the_regions_of_its_model_and_dictionaries(opened: tuple[GraphStore, StatisticsStore]) -> None:
    store, statistics = opened
    assert regions_of_run(store, statistics, RUN) is None
    parcellation = small_parcellation()
    write_parcellation(statistics, parcellation)
    sizes_only = regions_of_run(store, statistics, RUN)  # not in the graph
    assert sizes_only is not None
    assert sizes_only.blocks.select("site", "number", "size").rows() == [("resid_0", 0, 2), ("resid_0", 1, 2), ("resid_0", 2, 1), ("resid_1", 0, 4),
                                                                         ("resid_1", 1, 2)]  # fmt: skip
    assert sizes_only.matrix is None
    assert regions_of_run(store, statistics, replace(RUN, dictionaries={"resid_0": "another", "resid_1": "d1"})) is None
    assert regions_of_run(store, statistics, replace(RUN, model="another@1")) is None

    description = describe(parcellation, small_samples, SEQUENCES, TOKENS)
    write_regions(store, parcellation, description)
    label_block(statistics, None, parcellation.key, "resid_0", 0, 1, "plural nouns")
    block = blocks_of(store, parcellation.key).filter(chosen=True, site="resid_0", index=1, level=0)["key"]
    scores = pl.DataFrame({
        "key": ["s1", "s2", "s3"], "subject": [block[0]] * 3, "kind": ["loss", "loss", "faithfulness"], "task": ["ioi", "gender", "ioi"],
        "metric": ["logit_diff"] * 3, "baseline": ["counterfactual"] * 3, "split": ["held-out"] * 3, "averaging": ["ratio of means"] * 3,
        "seed": [0] * 3, "value": [0.5, -0.1, 0.9], "low": [0.4, -0.2, 0.8], "high": [0.6, 0.1, 1.0], "n": [12] * 3, "undefined_n": [0] * 3,
    })  # fmt: skip
    store.merge_nodes("Score", scores)
    store.merge_edges("SCORED", scores.select(pl.col("subject").alias("source"), pl.col("key").alias("target")))
    losses = losses_of(store, parcellation.key).select("site", "index", "task", "value").rows()
    assert losses == [("resid_0", 1, "gender", -0.1), ("resid_0", 1, "ioi", 0.5)]
    found = regions_of_run(store, statistics, RUN)
    assert found is not None
    known = description.chosen(description.blocks).sort("site", "block")
    assert found.blocks["correlation_inside"].to_list() == pytest.approx(known["mean_correlation"].to_list())
    assert found.matrix is not None
    assert "resid_0/1 plural nouns" in found.matrix.data[0].y[0]
    assert list(found.matrix.data[0].z[0]) == [-0.1, 0.5]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("name", FIGURES)
def test_a_page_is_drawn_in_a_browser_and_nothing_is_fetched(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.html"
    file.write_text(pages()[name], encoding="utf-8")
    with visited(file, f"#{FIGURES[name][-1]} .main-svg", CHROMIUM or "") as (page, requests, complaints):
        assert all(page.locator(f"#{figure} .main-svg").count() for figure in FIGURES[name])
        assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert complaints == []
        assert page.title() != "broken"
        if name == "verdict":
            _switch_metric(page)
        if name == "regions":
            _point_at_a_cell(page)
        assert complaints == []


def _switch_metric(page: Page) -> None:
    """The second metric's lines replace the first one's."""
    shown = "JSON.stringify(document.getElementById('sweep')._fullData.map((t) => t.visible))"
    before = page.evaluate(shown)
    page.locator("#sweep .updatemenu-button", has_text="accuracy").click()
    page.wait_for_function(f"{shown} !== {before!r}")
    assert page.locator("#sweep .scatterlayer .point").count() > 0


def _point_at_a_cell(page: Page) -> None:
    """A matrix of few features names each pair."""
    box = page.evaluate("""() => {
      const plot = document.getElementById("correlation-resid-0"); plot.scrollIntoView({block: "center"});
      const place = plot.getBoundingClientRect(), x = plot._fullLayout.xaxis, y = plot._fullLayout.yaxis;
      return [place.left + x._offset + x.d2p(1), place.top + y._offset + y.d2p(0)];
    }""")
    page.mouse.move(box[0] - 8, box[1] - 8)
    page.mouse.move(*box, steps=4)
    page.wait_for_selector("#correlation-resid-0 .hoverlayer .hovertext")
    text = page.locator("#correlation-resid-0 .hoverlayer .hovertext").first.text_content() or ""
    # blocks 0 0 1 2 1 of features 0, 1, 2, 4, 5; the coarser level's greater block holds 1 and 2, so that features 2 and 5 stand first
    r = small_correlation("resid_0")[2, 4]
    assert text.startswith("resid_0/2resid_0/5")
    assert f"r {r:.3f}".replace("-", "−") in text
