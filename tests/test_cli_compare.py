"""`featlas compare` and `featlas analyze joint` as a user meets them."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.analysis.circuits import By
from featlas.analysis.comparison_records import Comparison, Values
from featlas.analysis.comparison_verdict import verdict
from featlas.analysis.comparisons_store import list_comparisons
from featlas.analysis.finding import FindingOptions
from featlas.analysis.graph_comparison import stored_matching
from featlas.analysis.graph_sides import SideOptions, UnknownSide, read_side
from featlas.analysis.joint_partition import NotAligned, joined, mean_shared, moved, partition_jointly, shared
from featlas.queries.matches import NoMatching
from featlas.queries.samples import SiteSamples
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, open_graph
from scipy import sparse

from .study_atlas import TinyAtlas

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
    assert stored_matching(None, a, a) == ("", None)
    with pytest.raises(UnknownSide):
        read_side(store, "zzz", SideOptions())


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


def test_what_was_cut_off_is_in_a_side_s_name(tiny: TinyAtlas, atlas: Path) -> None:
    with open_graph(atlas, read_only=True) as store:
        whole = read_side(store, tiny.runs["main"], SideOptions())
        cut = read_side(store, tiny.runs["main"], SideOptions(by=By.WEIGHT, top_edges=20, errors=False))
    assert cut.name == whole.name + ", the 20 strongest edges, by weight, without error nodes"
