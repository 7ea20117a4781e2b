"""`featlas compare` and `featlas analyze joint` as a user meets them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.analysis.circuits import By
from featlas.analysis.comparison_records import Comparison, Values
from featlas.analysis.comparison_verdict import verdict
from featlas.analysis.comparisons_store import list_comparisons
from featlas.analysis.finding import FindingOptions
from featlas.analysis.graph_comparison import MatchSites, stored_matching
from featlas.analysis.graph_sides import BadMatching, BadSide, GraphSide, SideOptions, UnknownSide, read_side
from featlas.analysis.joint_partition import NotAligned, joined, mean_shared, moved, partition_jointly, shared
from featlas.queries.matches import OVERALL, PAIRS, SCORES, MatchingRows, Method, NoMatching, matched_dictionaries, write_matching
from featlas.queries.matches import SITES as MATCHED_SITES
from featlas.queries.samples import SiteSamples
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, open_graph
from featlas.show_compare import show_values
from scipy import sparse

from .study_atlas import TinyAtlas

pytestmark = pytest.mark.slow  # each runs whole commands, copies or loads

QUICK = ("--draws", 3, "--without", "transport,regions")


@pytest.fixture(scope="module")
def atlas(tiny: TinyAtlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.copied(tmp_path_factory.mktemp("compare"))


def test_a_run_with_itself_is_the_same_and_is_kept(featlas, tiny: TinyAtlas, atlas: Path, tmp_path: Path) -> None:
    run = tiny.runs["main"]
    table, page = tmp_path / "values.csv", tmp_path / "page.html"
    code, out, err = featlas("compare", run, run, *QUICK, "--atlas", atlas, "--output", table, "--plot", page)
    assert code == 0, err
    assert "The graphs have the same edges with the same strengths." in out
    assert "fractionally isomorphic" in out
    values = pl.read_csv(table)
    assert values.filter((pl.col("quantity") == "weighted Jaccard") & (pl.col("part") == "edges"))["value"].to_list() == [1.0, 1.0]
    assert "edges-by-size" in page.read_text(encoding="utf-8")
    code, out, _ = featlas("compare", "--list", "--json", "--atlas", atlas)
    kept = json.loads(out)
    assert [row["run_a"] for row in kept] == [run]
    code, shown, _ = featlas("compare", "--show", kept[0]["comparison"][:6], "--atlas", atlas)
    assert code == 0
    assert "The graphs have the same edges" in shown


def test_two_tasks_of_a_run_as_json_and_nothing_is_kept_without_write(featlas, tiny: TinyAtlas, atlas: Path) -> None:
    with StatisticsStore(atlas) as statistics:
        before = list_comparisons(statistics).height
    code, out, err = featlas(
        "compare", tiny.runs["main"], "--task", "even", "--other-task", "odd", *QUICK, "--no-write", "--json", "--atlas", atlas
    )
    assert code == 0, err
    found = json.loads(out)
    assert [found[side].split(" of ")[0] for side in "ab"] == ["task even", "task odd"]
    row = next(row for row in found["values"] if row["quantity"] == "Jaccard" and row["part"] == "edges")
    assert 0 < row["value"] <= 1
    assert {"null", "null_mean", "z", "p"} <= set(row)
    with StatisticsStore(atlas) as statistics:
        assert list_comparisons(statistics).height == before


def test_one_sequence_against_the_run(featlas, tiny: TinyAtlas, atlas: Path, store: GraphStore) -> None:
    from featlas.queries.runs import done_sequences

    sequence = sorted(done_sequences(store, tiny.runs["main"]))[0]
    code, out, err = featlas(
        "compare", tiny.runs["main"], "--sequence", sequence[:8], "--only", "edges", "--draws", 0, "--no-write", "--json", "--atlas", atlas
    )
    assert code == 0, err
    values = {row["quantity"]: row for row in json.loads(out)["values"] if row["part"] == "edges"}
    # every edge of the sequence is one of the run's
    side, whole = (read_side(store, tiny.runs["main"], SideOptions(sequence=name)) for name in (sequence, None))
    assert values["Jaccard"]["value"] == pytest.approx(side.m / whole.m)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing",), "the beginning of no run's key and of no circuit's"),
        ((), "a run is needed"),
        (("RUN", "--task", "no"), "its tasks are even, odd"),
        (("RUN", "--task", "even", "--sequence", "x"), "exclude each other"),
        (("RUN", "--without", "edge"), "choose from edges, profiles"),
        (("RUN", "--only", "edges", "--without", "profiles"), "exclude each other"),
        (("RUN", "--draws", -1), "--draws -1"),
        (("RUN", "--threshold", 1e9), "no edge is left"),
        (("--show", "nothing"), "no comparison 'nothing'"),
        (("RUN", "--matching", "nothing"), "no matching 'nothing'"),
    ],
)
def test_mistakes_are_one_line_with_the_way_out(featlas, tiny: TinyAtlas, atlas: Path, arguments: tuple, said: str) -> None:
    words = [tiny.runs["main"] if word == "RUN" else word for word in arguments]
    code, out, err = featlas("compare", *words, "--atlas", atlas)
    assert code == 2, err
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert said in err


def test_other_dictionaries_need_a_matching(tiny: TinyAtlas, atlas: Path, store: GraphStore) -> None:
    a, b = (read_side(store, tiny.runs[name], SideOptions()) for name in ("main", "identity"))
    with StatisticsStore(atlas) as statistics, pytest.raises(NoMatching, match="featlas analyze match"):
        stored_matching(statistics, a, b)
    assert stored_matching(None, a, a).pairs is None
    with pytest.raises(BadSide, match="same nodes"):
        stored_matching(None, a, a, sites=MatchSites.ALL)
    with pytest.raises(UnknownSide):
        read_side(store, "zzz", SideOptions())


def write_pairs(statistics: StatisticsStore, key: str, ends: tuple[str, str], pairs: list[tuple[str, str, Method]]) -> None:
    """A stored matching of these pairs of keys, all mutual and significant."""
    sure = {"score": 0.9, "mutual": True, "assigned": True, "significant": True}
    rows = [
        {"source": a, "target": b, "site_a": of_a[2], "site_b": of_b[2], "feature_a": int(of_a[3]), "feature_b": int(of_b[3]), "method": str(method)}
        | sure
        for a, b, method in pairs for of_a, of_b in [(a.split("|"), b.split("|"))]
    ]  # fmt: skip
    record = {"aligned": "gone", "model_a": ends[0], "model_b": ends[1], "source": "text", "settings": "{}", **dict.fromkeys(OVERALL, 1)}
    frames = (pl.DataFrame(schema=dict(MATCHED_SITES)), pl.DataFrame(rows, schema=dict(PAIRS)), pl.DataFrame(schema=dict(SCORES)))
    write_matching(statistics, MatchingRows(key, record, *frames))


def features_at(side: GraphSide, site: str) -> list[str]:
    return side.nodes.filter((pl.col("kind") == "feature") & (pl.col("site") == site))["key"].to_list()


@pytest.fixture
def two_sides(tiny: TinyAtlas, store: GraphStore) -> tuple[GraphSide, GraphSide]:
    a, b = (read_side(store, tiny.runs[name], SideOptions()) for name in ("main", "identity"))
    assert set(a.dictionaries) == set(b.dictionaries)
    return a, b


def planned(a: GraphSide, b: GraphSide) -> tuple[list[tuple[str, str, Method]], list[tuple[str, str, Method]]]:
    """Pairs of the same site, one for one; and pairs over all sites, one of which goes from the first site of A to the last of B."""
    sites = [site for site in a.dictionaries if features_at(a, site) and features_at(b, site)]
    same = [(x, y, Method.SITE_PAIRS) for site in sites for x, y in zip(features_at(a, site), features_at(b, site))]
    far = (same[0][0], same[-1][1])
    return same, [(*far, Method.ALL_SITES), (*far, Method.SITE_PAIRS), *((x, y, Method.ALL_SITES) for x, y, _ in same[1:-1])]


def test_features_are_matched_between_the_same_sites_or_over_all(
    featlas, tiny: TinyAtlas, two_sides: tuple[GraphSide, GraphSide], tmp_path: Path
) -> None:  # fmt: skip
    a, b = two_sides
    atlas = tiny.copied(tmp_path)
    same, far = planned(a, b)
    with StatisticsStore(atlas) as statistics:
        write_pairs(statistics, "m1", (a.model, b.model), same + far)
        found = stored_matching(statistics, a, b)
        assert found.sites is MatchSites.SAME
        assert set(found.pairs.select("source", "target").iter_rows()) == {(x, y) for x, y, _ in same}
        over_all = stored_matching(statistics, a, b, sites=MatchSites.ALL)
        assert set(over_all.pairs.select("source", "target").iter_rows()) == {pair[:2] for pair in far}
        # a site of one name lies elsewhere in a model of another depth
        elsewhere = replace(b, model="other")
        write_pairs(statistics, "m2", (a.model, "other"), [(x, y.replace(b.model, "other", 1), method) for x, y, method in same + far])
        for depth, expected in ((2, MatchSites.SAME), (3, MatchSites.ALL)):
            assert stored_matching(statistics, a, elsewhere, layers={a.model: 2, "other": depth}).sites is expected
        assert stored_matching(statistics, b, a).pairs.select("target", "source").sort("target").rows() == sorted((x, y) for x, y, _ in same)
    asked = ("compare", tiny.runs["main"], tiny.runs["identity"], "--only", "edges", "--draws", 0, "--no-write", "--atlas", atlas)
    code, out, err = featlas(*asked)
    assert code == 0, err
    assert "between the same sites" in out
    kept = [json.loads(featlas(*asked, "--json", "--match-sites", sites)[1]) for sites in ("same", "all")]
    assert [one["settings"]["match_sites"] for one in kept] == ["same", "all"]
    assert kept[0]["key"] != kept[1]["key"]


def test_the_newest_matching_of_the_runs_dictionaries_is_taken(tiny: TinyAtlas, two_sides: tuple[GraphSide, GraphSide], tmp_path: Path) -> None:
    a, b = two_sides
    same, _ = planned(a, b)
    others = [(x.replace("|", "|not-", 1), y, method) for x, y, method in same]
    with StatisticsStore(tiny.copied(tmp_path)) as statistics:
        write_pairs(statistics, "other", (a.model, b.model), others)
        with pytest.raises(NoMatching, match="matching other is of other dictionaries"):
            stored_matching(statistics, a, b)
        write_pairs(statistics, "fits", (a.model, b.model), same)
        write_pairs(statistics, "newer", (a.model, b.model), others)
        assert stored_matching(statistics, a, b).key == "fits"
        assert stored_matching(statistics, b, a).key == "fits"
        with pytest.raises(NoMatching, match="matching newer is of other dictionaries"):
            stored_matching(statistics, a, b, "newer")
        ends = matched_dictionaries(statistics, "fits")
        assert ends == tuple(frozenset(key.rpartition("|")[0] + "|" for key in side) for side in zip(*(pair[:2] for pair in same)))
        write_pairs(statistics, "fits too", (a.model, b.model), same)
        assert stored_matching(statistics, a, b).key == "fits too"


def test_a_matching_that_found_nothing_says_so(tiny: TinyAtlas, two_sides: tuple[GraphSide, GraphSide], tmp_path: Path) -> None:
    a, b = two_sides
    with StatisticsStore(tiny.copied(tmp_path)) as statistics:
        write_pairs(statistics, "none", (a.model, b.model), [])
        with pytest.raises(BadMatching, match=r"matching none found no pair .*more text .*--null shift .*--draws"):
            stored_matching(statistics, a, b)


# --- joint partitions ---------------------------------------------------------------------------------------------------


def planted(*, common: bool, seed: int = 0, d: int = 24, n: int = 1200) -> tuple[SiteSamples, SiteSamples]:
    """Two models of three groups of features each, on 60 sequences of 20 segments: by the same causes, or each by its own."""
    rng = np.random.default_rng(seed)
    sequence = np.repeat(np.arange(60), 20)
    causes = [rng.random((n, 3)) < 0.2 for _ in range(2)]
    sites = []
    for side in range(2):
        own = causes[0 if common else side]
        group = np.arange(d) % 3
        values = np.where(own[:, group] & (rng.random((n, d)) < 0.9), rng.random((n, d)) + 0.5, 0.0)
        sites.append(SiteSamples(f"resid_{side}", "ab"[side], d, sparse.csr_matrix(values.astype(np.float32)), sequence, np.tile(np.arange(20), 60)))
    return sites[0], sites[1]


def test_shared_by_hand() -> None:
    n_a, n_b, how_far = shared(np.array([0, 0, 0, 1]), np.array([0, 1, 1, 2]), 3)
    assert (n_a.tolist(), n_b.tolist()) == ([3, 1, 0], [1, 2, 1])
    # shares 3/4 and 1/4; 1/4 and 1/2; 0 and 1/4
    assert how_far == pytest.approx([0.5, 2 / 3, 0])
    assert mean_shared(np.array([0, 0, 0, 1]), np.array([0, 1, 1, 2]), 3) == pytest.approx(0.25 + 0.25 + 0)


def test_groups_of_common_causes_are_shared_and_others_are_not() -> None:
    options = FindingOptions(nulls=3)
    both = partition_jointly(*planted(common=True), options, draws=2)
    assert both.blocks.height == 3
    assert both.shared == pytest.approx(1)
    assert both.blocks["shared"].to_list() == pytest.approx([1] * 3)
    assert (both.labels_a == both.labels_b).all()
    assert both.blocks["r_between"].min() > 0.3  # type: ignore[operator]
    assert both.null.max() < 0.5
    own = partition_jointly(*planted(common=False), options, draws=2)
    assert own.shared < 0.4
    assert own.blocks.height == 6
    assert not np.intersect1d(own.labels_a, own.labels_b).size


def test_mean_correlations_of_a_block_are_those_of_its_pairs() -> None:
    a, b = planted(common=True, n=1200, d=6)
    found = partition_jointly(a, b, FindingOptions(nulls=0), draws=0)
    r = np.corrcoef(np.concatenate([a.values.toarray(), b.values.toarray()], axis=1), rowvar=False)
    for row in found.blocks.iter_rows(named=True):
        of_a, of_b = (features[labels == row["block"]] for features, labels in
                      ((found.features_a, found.labels_a), (found.features_b, found.labels_b)))  # fmt: skip
        pairs = [r[i, j] for i in of_a for j in of_a if i < j]
        assert row["r_a"] == pytest.approx(np.mean(pairs))
        assert row["r_between"] == pytest.approx(np.mean([r[i, 6 + j] for i in of_a for j in of_b]))


def test_moved_text_keeps_what_is_inside_a_model_and_rows_must_be_the_same_segments() -> None:
    a, b = planted(common=True)
    away = moved(b, 3)
    assert np.corrcoef(away.values.toarray(), rowvar=False) == pytest.approx(np.corrcoef(b.values.toarray(), rowvar=False))
    between = np.corrcoef(joined(a, away).values.toarray(), rowvar=False)[:24, 24:]
    assert np.abs(between).max() < 0.2
    shorter = SiteSamples(b.site, b.dictionary, b.d_sae, b.values[:-1], b.sequence[:-1], b.position[:-1])
    with pytest.raises(NotAligned, match="not the same segments"):
        joined(a, shorter)


def test_one_block_of_unrelated_features_is_not_shared() -> None:
    random = np.random.default_rng(0)
    sequence, position = np.repeat(np.arange(40), 10), np.tile(np.arange(10), 40)
    sides = [
        SiteSamples(name, name, 12, sparse.csr_matrix((random.gamma(2.0, size=(400, 12)) * (random.random((400, 12)) < 0.3)).astype(np.float32)),
                    sequence, position)
        for name in "ab"
    ]  # fmt: skip
    found = partition_jointly(*sides, FindingOptions(nulls=0), draws=2)
    assert found.blocks.height == 1
    assert np.isnan(found.shared)
    values = Values("joint")
    values.add_against("shared", found.shared, "moved", found.null, site="a and b", n=24)
    told = verdict(Comparison("k", "joint", "m", "n", "r", "r", "m", "n", "", {}, {}, values.frame()))
    assert told == ["a and b: no blocks were found in the joint correlations, so that nothing can be said of what is shared."]


def test_joint_partitions_of_few_draws_say_that_no_p_can_be_small() -> None:
    for draws, few in ((3, True), (18, True), (19, False)):
        values = Values("joint")
        values.add_against("shared", 0.75, "moved", [0.5] * draws, site="a and b", n=24)
        told = verdict(Comparison("k", "joint", "m", "n", "r", "r", "m", "n", "", {"draws": draws}, {}, values.frame()))
        assert told[0].startswith("a and b: 75.0% of both models' features lie in the same blocks (by chance, moved: 50.0%")
        assert any(f"{draws} draws are too few" in line and "--draws 19" in line for line in told) is few


def test_counts_are_whole_answers_are_words_and_a_table_without_nulls_has_no_columns_of_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    values = Values("refinement")
    values.add("regions that correspond", 155.0)
    values.add("fractionally isomorphic", 0.0)
    show_values(values.frame())
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["regions", "that", "correspond", "155"] in lines
    assert ["fractionally", "isomorphic", "no"] in lines
    assert "null" not in said
    values.add_against("Jaccard", 0.5, "rewired", [0.25, 0.25])
    show_values(values.frame())
    assert "null's mean" in capsys.readouterr().out


def test_percent_stands_beside_percent() -> None:
    values = Values("edges")
    values.add_against("Jaccard", 0.287, "B rewired", [0.257] * 19)
    values.add_against("weighted Jaccard", 0.4, "B rewired", [0.3] * 19)
    told = verdict(Comparison("k", "graphs", "m", "n", "r", "r", "m", "n", "", {"draws": 19}, {}, values.frame()))
    assert told[0].startswith("Of all edges of either graph 28.7% are in both (by chance, B rewired: 25.7%, p = 0.05)")
    assert "weighted by strength 40.0% (by chance, B rewired: 30.0%" in told[0]


def test_what_was_cut_off_is_in_a_side_s_name(tiny: TinyAtlas, atlas: Path) -> None:
    with open_graph(atlas, read_only=True) as store:
        whole = read_side(store, tiny.runs["main"], SideOptions())
        cut = read_side(store, tiny.runs["main"], SideOptions(by=By.WEIGHT, top_edges=20, errors=False))
    assert cut.name == whole.name + ", the 20 strongest edges, by weight, without error nodes"
