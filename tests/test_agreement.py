"""Agreement of connectivities: measures by hand and against scipy, planted agreement, false alarms, and the readers on a small graph."""


import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from featlas import cli
from featlas.analysis import agreement
from featlas.analysis.agreement import (
    POOLED,
    AgreementOptions,
    BadAgreementOptions,
    Connections,
    Connectivity,
    Ends,
    Grid,
    NothingToCompare,
    Null,
    Pairs,
    Values,
    agree,
    compare,
    correlation,
    like_frequency,
    measure,
    ranks,
    relabellings,
    strongest,
    two_sided_p,
)
from featlas.analysis.connectivities import Basis, Ingredients, WrongStatisticsRun, read_grids
from featlas.analysis.plots import agreement_figure
from featlas.ingest.lookup import VirtualWeights
from featlas.ingest.structural import NeedsText
from featlas.ingest.wiring import PathKind
from featlas.model.binding import bind
from featlas.model.loading import load_model
from featlas.model.sites import parse_site
from featlas.queries.agreement import effective_pairs, run_features, wired_pairs
from featlas.queries.schema import feature_key, output_key
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, ServerCredentials, open_graph
from featlas.queries.subgraphs import find_run
from scipy import stats

from .micro import save_tiny
from .micro_dictionaries import tiny_dictionary
from .servers import Neo4jTestServer

EFFECTIVE, FUNCTIONAL, STRUCTURAL = Connectivity
OPTIONS = AgreementOptions(draws=100, k=(5, 0.1))


def grid_of(a: np.ndarray, b: np.ndarray, kept: np.ndarray | None = None, *, first=EFFECTIVE, second=STRUCTURAL, frequencies=None) -> Grid:
    """Two matrices as a grid; `kept` are the edges of the first."""
    kept = np.ones(a.shape, dtype=bool) if kept is None else kept
    own = Connections(a * kept, np.abs(a) * kept, kept)
    frequency = (None, None) if frequencies is None else frequencies
    names = [np.arange(n) for n in a.shape]
    return Grid("resid_0", "resid_1", *names, {first: own, second: Connections.exact(b)}, *frequency, int(kept.sum()))


def rows_of(table: pl.DataFrame, **wanted: str) -> dict[str, dict]:
    return {row["measure"]: row for row in table.filter(**wanted).to_dicts()}


# ---- measures


def test_a_case_by_hand() -> None:
    # a's ranks 1 2 3 4 5, b's 2 1 4 3 5: Σd² = 4, ρ = 1 − 6·4 / (5·24) = 0.8. Magnitudes: a 5 4 3 4½… see below.
    a, b = np.array([-5.0, -3.0, 1.0, 2.0, 4.0]), np.array([[-1.0, -2.0, 3.0, -0.5, 6.0]])
    ends = Ends(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 0]), None)
    found = measure(Values(a, np.abs(a)), Values(b, np.abs(b)), ends, (2, 0.4, 5))
    # b's ranks: −2 → 1, −1 → 2, −0.5 → 3, 3 → 4, 6 → 5, hence (2, 1, 4, 3, 5)
    assert found["signed"] == pytest.approx(0.8)
    # |a| = 5 3 1 2 4 has ranks (5, 3, 1, 2, 4), |b| = 1 2 3 0.5 6 has (2, 3, 4, 1, 5): Σd² = 9 + 0 + 9 + 1 + 1 = 20, ρ = 1 − 120/120 = 0
    assert found["magnitude"] == pytest.approx(0.0)
    # signs − − + + + against − − + − +: four of five
    assert found["sign"] == pytest.approx(0.8)
    # the two largest: pairs 0 and 4 of a, 4 and 2 of b: one in common; 40 % of five pairs are two as well; five of five say nothing
    assert found["overlap@2"] == pytest.approx(0.5)
    assert found["overlap@40%"] == pytest.approx(0.5)
    assert "overlap@5" not in found
    assert "partial_signed" not in found


def test_ranks_and_correlations_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=(7, 40)), rng.integers(0, 5, size=(7, 40)).astype(float)):
        assert np.allclose(ranks(values), stats.rankdata(values, axis=1))
    a, b = rng.normal(size=40), rng.integers(0, 6, size=(3, 40)).astype(float)
    expected = [stats.spearmanr(a, row).statistic for row in b]
    assert np.allclose(correlation(ranks(a), ranks(b)), expected)
    assert np.isnan(correlation(ranks(a), ranks(np.ones((1, 40))))).all()


def test_partial_rank_correlation_is_that_of_regression_residuals() -> None:
    rng = np.random.default_rng(1)
    n = 60
    frequency = rng.random((n, 2))
    a, b = frequency @ [2, 1] + rng.normal(size=n), frequency @ [1, -1] + rng.normal(size=(1, n))
    ends = Ends(np.arange(n), np.arange(n), np.column_stack([ranks(f) for f in frequency.T]))
    found = measure(Values(a, np.abs(a)), Values(b, np.abs(b)), ends, ())
    # the textbook's formula: the inverse of the correlation matrix of all four ranked variables
    inverse = np.linalg.inv(np.corrcoef([stats.rankdata(x) for x in (a, b[0], *frequency.T)]))
    assert found["partial_signed"] == pytest.approx(-inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1]))


def test_centring_removes_both_ends() -> None:
    rng = np.random.default_rng(2)
    kept = rng.random((9, 7)) < 0.6
    source, target = kept.nonzero()
    values = rng.normal(size=(2, len(source)))
    design = np.column_stack([source[:, None] == np.arange(9), target[:, None] == np.arange(7)]).astype(float)
    residual = values - (design @ np.linalg.lstsq(design, values.T, rcond=None)[0]).T
    assert np.allclose(Ends(source, target, None).centred(values), residual, atol=1e-3)


def test_a_matrix_of_node_effects_alone_agrees_by_magnitude_and_not_when_centred() -> None:
    rng = np.random.default_rng(3)
    nodes = np.outer(rng.lognormal(size=40), rng.lognormal(size=30))
    a, b = (nodes * np.exp(0.5 * rng.normal(size=nodes.shape)) for _ in range(2))
    found = rows_of(agree([grid_of(a, b)], OPTIONS).table, source_site="resid_0")
    assert found["magnitude"]["value"] > 0.8
    assert found["magnitude"]["p"] < 0.05
    assert abs(found["centred_magnitude"]["value"]) < 0.1
    # what is particular to a pair is all that it sees
    residual = b / nodes
    direct = rows_of(agree([grid_of(a, a / nodes * residual)], OPTIONS).table, source_site="resid_0")["centred_magnitude"]
    assert direct["value"] == pytest.approx(1 / np.sqrt(2), abs=0.06)
    assert direct["p"] < 0.05


def test_strongest_of_equal_ones_are_the_first() -> None:
    size = np.array([[1.0, 3.0, 2.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    assert strongest(size, 3).tolist() == [[False, True, True, True, False], [True, True, True, False, False]]


# ---- nulls


def test_relabelling_exchanges_inside_groups_only() -> None:
    group = np.array([2, 0, 1, 0, 2, 2])
    drawn = relabellings(group, 500, np.random.default_rng(0))
    assert (np.sort(drawn, axis=1) == np.arange(6)).all()
    assert (group[drawn] == group).all()
    assert {tuple(row) for row in drawn[:, [0, 4, 5]]} == {(0, 4, 5), (0, 5, 4), (4, 0, 5), (4, 5, 0), (5, 0, 4), (5, 4, 0)}


def test_groups_of_like_frequency() -> None:
    frequency = np.array([0.5, 0.1, 0.1, 0.9, 0.2, 0.3])
    assert like_frequency(frequency, 3).tolist() == [2, 0, 0, 2, 1, 1]
    assert like_frequency(np.full(4, 0.1), 3).tolist() == [0, 0, 0, 0]


def test_two_sided_p_counts_the_observed_one() -> None:
    draws = np.arange(1.0, 100.0)  # 99 draws
    assert two_sided_p(1000.0, draws) == pytest.approx(2 / 100)
    assert two_sided_p(50.0, draws) == 1.0
    assert two_sided_p(97.5, draws) == pytest.approx(2 * 3 / 100)


def test_planted_agreement_is_found() -> None:
    """Bivariate normal values with correlation r: Spearman's ρ is 6/π · arcsin(r/2)."""
    rng = np.random.default_rng(4)
    a = rng.normal(size=(60, 50))
    for r in (0.3, -0.6):
        b = r * a + np.sqrt(1 - r * r) * rng.normal(size=a.shape)
        kept = rng.random(a.shape) < 0.5
        found = rows_of(agree([grid_of(a, b, kept)], OPTIONS).table, source_site="resid_0")["signed"]
        n = int(kept.sum())
        assert found["n_pairs"] == n
        assert found["value"] == pytest.approx(6 / np.pi * np.arcsin(r / 2), abs=4 / np.sqrt(n))
        assert found["p"] == pytest.approx(2 / 101)
        assert found["null_low"] < 0 < found["null_high"]
        assert found["null_high"] < 4 / np.sqrt(n)


@pytest.mark.slow
def test_no_more_false_alarms_than_promised() -> None:
    """Unrelated matrices with strong structure of their own, 200 times: at most about 5 % at p <= 0.05, and p spread evenly."""
    found: dict[str, list[float]] = {}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        nodes = [np.outer(rng.lognormal(size=20), rng.lognormal(size=15)) for _ in range(2)]
        a, b = (node * rng.normal(size=node.shape) for node in nodes)
        kept = np.abs(a) > np.quantile(np.abs(a), 0.6)
        table = agree([grid_of(a, b, kept)], AgreementOptions(draws=100, k=(10,), seed=seed)).table
        for row in table.filter(source_site="resid_0").to_dicts():
            found.setdefault(row["measure"], []).append(row["p"])
    assert {"signed", "magnitude", "sign", "overlap@10", "centred_magnitude"} <= set(found)
    for name, p in found.items():
        # 18 of 200 are exceeded with probability 0.6 % where 5 % are expected
        assert sum(x <= 0.05 for x in p) <= 18, name
    # factors of the ends that both have are not taken for agreement of the pairs
    shared = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        node = np.outer(rng.lognormal(size=20), rng.lognormal(size=15))
        a, b = (node * rng.normal(size=node.shape) for _ in range(2))
        table = agree([grid_of(a, b, np.abs(a) > np.quantile(np.abs(a), 0.6))], AgreementOptions(draws=100, k=(), seed=seed)).table
        shared.append(rows_of(table, source_site="resid_0")["centred_magnitude"]["p"])
    assert sum(x <= 0.05 for x in shared) <= 9  # exceeded with probability 0.1 %
    for name in ("signed", "magnitude", "centred_magnitude"):
        assert stats.kstest(found[name], "uniform").pvalue > 0.001, name


@pytest.mark.slow
def test_matched_labels_take_out_what_frequency_explains() -> None:
    rng = np.random.default_rng(5)
    frequency = rng.lognormal(size=80), rng.lognormal(size=70)
    driver = np.log(np.outer(*frequency))
    a, b = (np.exp(driver + rng.normal(size=driver.shape)) for _ in range(2))
    table = agree([grid_of(a, b, frequencies=frequency)], AgreementOptions(draws=120, k=(), bins=20)).table
    free, matched = (rows_of(table, source_site="resid_0", null=null.value) for null in Null)
    assert free["magnitude"]["value"] == matched["magnitude"]["value"] > 0.4
    assert free["magnitude"]["p"] < 0.02
    assert matched["magnitude"]["null_mean"] > 0.8 * free["magnitude"]["value"]
    assert abs(free["partial_magnitude"]["value"]) < 0.06
    # a direct agreement stays
    direct = b * np.exp(0.7 * (np.log(a) - driver))
    table = agree([grid_of(a, direct, frequencies=frequency)], AgreementOptions(draws=120, k=(), bins=20)).table
    kept = rows_of(table, source_site="resid_0", null="matched")
    assert kept["magnitude"]["p"] < 0.02
    assert kept["partial_magnitude"]["value"] > 0.4


def test_null_is_the_naive_one() -> None:
    """Each draw of a stored comparison, against dense matrices relabelled by indexing."""
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(12, 9)), rng.normal(size=(12, 9))
    own, other = rng.random(a.shape) < 0.4, rng.random(a.shape) < 0.4
    first, second = Connections(a * own, np.abs(a) * own, own), Connections(b * other, np.abs(b) * other, other)
    grid = Grid("resid_0", "resid_1", np.arange(12), np.arange(9), {EFFECTIVE: first, FUNCTIONAL: second})
    row, column = rng.permutation(12), rng.permutation(9)
    moved, there = second.signed[np.ix_(row, column)], other[np.ix_(row, column)]
    for pairs, domain in ((Pairs.UNION, own | there), (Pairs.INTERSECTION, own & there)):
        found = agreement._measured(grid, first, second, None, AgreementOptions(pairs=pairs, k=()), row[None], column[None])
        assert found["signed"][0] == pytest.approx(stats.spearmanr(first.signed[domain], moved[domain]).statistic)
        assert found["shared"][0] == pytest.approx((own & there).sum() / (own | there).sum())
    fixed = agreement._measured(grid, first, second, own, OPTIONS, row[None], column[None])
    assert fixed["signed"][0] == pytest.approx(stats.spearmanr(first.signed[own], moved[own]).statistic)


def test_pooled_line_and_false_discovery_rate() -> None:
    rng = np.random.default_rng(7)
    grids = []
    for n, r in ((20, 0.8), (30, 0.0), (25, 0.5)):
        a = rng.normal(size=(n, n))
        own = grid_of(a, r * a + rng.normal(size=a.shape))
        grids.append(Grid(f"resid_{len(grids)}", f"resid_{len(grids) + 1}", own.sources, own.targets, own.connections, n_effective=n * n))
    result = agree(grids, AgreementOptions(draws=300, k=(10,)))
    signed = result.table.filter(measure="signed")
    single, pooled = signed.filter(pl.col("source_site") != POOLED), signed.filter(source_site=POOLED).to_dicts()[0]
    assert pooled["value"] == pytest.approx(np.average(single["value"], weights=[400, 900, 625]))
    assert pooled["n_pairs"] == 1925
    assert np.allclose(single["q"], stats.false_discovery_control(single["p"].to_numpy()))
    comparisons = [compare(grid, EFFECTIVE, STRUCTURAL, Null.SHUFFLED, AgreementOptions(draws=300, k=(10,))) for grid in grids]
    draws = np.average([c.draws["signed"] for c in comparisons if c is not None], axis=0, weights=[400, 900, 625])
    assert pooled["null_mean"] == pytest.approx(draws.mean())
    assert pooled["p"] == pytest.approx(2 / 301)
    again = agree(grids, AgreementOptions(draws=300, k=(10,)))
    assert again.table.equals(result.table)


def test_too_few_pairs_are_left_out_and_said() -> None:
    rng = np.random.default_rng(8)
    few = np.zeros((10, 10), dtype=bool)
    few[0, :4] = True
    lonely = grid_of(rng.normal(size=(10, 10)), rng.normal(size=(10, 10)), few)
    with pytest.raises(NothingToCompare, match="10 pairs of features"):
        agree([lonely], OPTIONS)
    full = grid_of(rng.normal(size=(10, 10)), rng.normal(size=(10, 10)))
    assert agree([full, lonely], OPTIONS).left_out == (("resid_0", "resid_1", 4),)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"draws": 10}, "draws is 10"), ({"k": (2.5,)}, "k is 2.5"), ({"max_pairs": 1}, "max_pairs is 1"), ({"bins": 0}, "bins is 0")]
)
def test_options_out_of_range_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(BadAgreementOptions, match=said):
        AgreementOptions(**wrong)


# ---- what is read

MODEL, DICTIONARIES = "m@1", {"resid_0": "d0", "resid_1": "d1"}


def key(site: str, index: int | str) -> str:
    return feature_key(MODEL, DICTIONARIES[site], site, index)


def features(frequency: float | None = 0.5) -> pl.DataFrame:
    """12 features and an error node at each site, a feature of another dictionary, the output."""
    rows = [
        {
            "key": key(site, index), "site": site, "dictionary": dictionary, "kind": "feature", "index": index,
            "frequency": frequency and frequency / (1 + index),
        }
        for site, dictionary in DICTIONARIES.items() for index in range(12)
    ]  # fmt: skip
    rows += [{"key": key(site, "error"), "site": site, "dictionary": DICTIONARIES[site], "kind": "error", "index": -1} for site in DICTIONARIES]
    rows.append({"key": feature_key(MODEL, "other", "resid_1", 0), "site": "resid_1", "dictionary": "other", "kind": "feature", "index": 0})
    rows.append({"key": output_key(MODEL, "logit_diff"), "site": "y", "dictionary": "-", "kind": "output", "index": -1})
    return pl.DataFrame(rows, infer_schema_length=None).with_columns(model=pl.lit(MODEL))


def weight(i: int, j: int) -> float:
    """What the edge from feature i to feature j has, in all three types."""
    return (-1) ** (i + j) * (1 + i + 12 * j) / 100


def fill(store: GraphStore, *, without: tuple[str, ...] = (), frequency: float | None = 0.5) -> GraphStore:
    """A graph in which i → j is an effective edge where j ≥ i, a correlation where i + j is even, and has two wires where j ≥ 6."""
    pairs = [(i, j) for i in range(12) for j in range(12)]
    frame = lambda chosen: pl.DataFrame({"source": [key("resid_0", i) for i, _ in chosen], "target": [key("resid_1", j) for _, j in chosen],
                                         "weight": [weight(i, j) for i, j in chosen]})  # fmt: skip
    store.merge_nodes("Feature", features(frequency))
    run = {"key": "run-r", "model": MODEL, "task": "t", "metric": "logit_diff", "dictionaries": json.dumps(DICTIONARIES)}
    store.merge_nodes("Run", pl.DataFrame([run]))
    if "INFLUENCES" not in without:
        effective = frame([(i, j) for i, j in pairs if j >= i]).with_columns(abs_weight=2 * pl.col("weight").abs())
        error = {"source": key("resid_0", "error"), "target": key("resid_1", 1), "weight": 1.0, "abs_weight": 1.0}
        output = {"source": key("resid_1", 1), "target": output_key(MODEL, "logit_diff"), "weight": 1.0, "abs_weight": 1.0}
        store.merge_edges("INFLUENCES", pl.concat([effective, pl.DataFrame([error, output])]).with_columns(run=pl.lit("run-r"), n=pl.lit(1)))
    if "CORRELATES" not in without:
        # one is stored the other way round, one is inside a site
        rows = frame([(i, j) for i, j in pairs if (i + j) % 2 == 0]).rename({"weight": "r"})
        turned = rows[:1].select(source="target", target="source", r="r")
        inside = pl.DataFrame({"source": [key("resid_0", 0)], "target": [key("resid_0", 1)], "r": [0.5]})
        edges = pl.concat([rows[1:], turned, inside]).with_columns(run=pl.lit("stats-1"), basis=pl.lit("activation"))
        store.merge_edges("CORRELATES", edges)
        store.merge_edges("CORRELATES", edges[:3].with_columns(run=pl.lit("stats-2"), basis=pl.lit("attribution")))
    if "WIRED" not in without:
        rows = frame([(i, j) for i, j in pairs if j >= 6])
        store.merge_edges("WIRED", rows.with_columns(path=pl.lit("residual")))
        store.merge_edges("WIRED", rows.with_columns(pl.col("weight") * 2, path=pl.lit("attn_1.head_0")))
        other = {"source": key("resid_0", 0), "target": feature_key(MODEL, "other", "resid_1", 0), "weight": 9.0, "path": "residual"}
        store.merge_edges("WIRED", pl.DataFrame([other]))
    return store


@pytest.fixture(params=["embedded", pytest.param("neo4j", marks=pytest.mark.neo4j)])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GraphStore]:
    if request.param == "embedded":
        opened = open_graph(tmp_path)
    else:
        server: Neo4jTestServer = request.getfixturevalue("clean_neo4j")
        opened = open_graph(server.uri, credentials=ServerCredentials("neo4j", server.password))
    with opened as store:
        yield store


@pytest.mark.slow
def test_stored_edges_are_read_alike_from_both_graphs(graph: GraphStore) -> None:
    run = find_run(fill(graph))
    edges, n_other = effective_pairs(graph, run, run_features(graph, run))
    assert (edges.height, n_other) == (78, 2)
    wires = wired_pairs(graph, MODEL, DICTIONARIES)
    assert wires.height == 72
    assert [row["weight"] for row in wires.to_dicts()] == pytest.approx([3 * weight(row["source"], row["target"]) for row in wires.to_dicts()])
    read = read_grids(Ingredients(graph, run), AgreementOptions(pairs=Pairs.UNION))
    (grid,) = read.grids
    assert (grid.source, grid.target, grid.n_effective) == ("resid_0", "resid_1", 78)
    assert (read.functional_run, read.n_other, read.missing) == ("stats-1", 2, {})
    exact = np.array([[weight(i, j) for j in range(12)] for i in range(12)])
    i, j = np.indices((12, 12))
    for name, kept, factor, size in ((EFFECTIVE, j >= i, 1, 2), (FUNCTIONAL, (i + j) % 2 == 0, 1, 1), (STRUCTURAL, j >= 6, 3, 3)):
        assert (grid.connections[name].kept == kept).all(), name
        assert np.allclose(grid.connections[name].signed, factor * exact * kept), name
        assert np.allclose(grid.connections[name].size, size * np.abs(exact) * kept), name
    assert grid.source_frequency is not None
    assert np.allclose(grid.source_frequency, 0.5 / (1 + np.arange(12)))
    # in the intersection all three have the same order
    table = agree(read.grids, AgreementOptions(pairs=Pairs.INTERSECTION, k=(), draws=100)).table
    found = rows_of(table, first="effective", second="structural", source_site="resid_0", null="shuffled")
    assert found["signed"]["value"] == found["magnitude"]["value"] == found["sign"]["value"] == pytest.approx(1.0)
    assert found["shared"]["value"] == pytest.approx(((j >= i) & (j >= 6)).sum() / ((j >= i) | (j >= 6)).sum())


def test_what_is_missing_is_said_and_two_suffice(tmp_path: Path) -> None:
    union = AgreementOptions(pairs=Pairs.UNION)
    with open_graph(tmp_path) as graph:
        run = find_run(fill(graph, without=("CORRELATES", "WIRED"), frequency=None))
        with pytest.raises(NothingToCompare, match=r"ingest correlations.*ingest weights"):
            read_grids(Ingredients(graph, run), union)
        with pytest.raises(NothingToCompare, match=r"no statistics.*--between adjacent.*not looked up"):
            read_grids(Ingredients(graph, run), OPTIONS)
        fill(graph, without=("INFLUENCES", "WIRED"), frequency=None)
        read = read_grids(Ingredients(graph, run), union)
        assert list(read.missing) == [STRUCTURAL]
        assert not read.grids[0].has_frequencies
        assert agree(read.grids, AgreementOptions(pairs=Pairs.UNION, k=(), draws=100)).table["null"].unique().to_list() == ["shuffled"]
        with pytest.raises(WrongStatisticsRun, match="stats-9"):
            read_grids(Ingredients(graph, run, statistics_run="stats-9"), union)
        assert read_grids(Ingredients(graph, run, basis=Basis.ATTRIBUTION), union).functional_run == "stats-2"
        # exact weights of the pairs of the effective graph, by any function
        virtual = lambda source, target, sources, targets: np.add.outer(sources, 100 * targets).astype(float)
        read = read_grids(Ingredients(graph, run, virtual=virtual), OPTIONS)
        assert list(read.missing) == [FUNCTIONAL]
        grid = read.grids[0]
        assert np.array_equal(grid.connections[STRUCTURAL].signed, np.add.outer(np.arange(12), 100 * np.arange(12)))
        assert grid.connections[EFFECTIVE].kept.sum() == 78


def test_many_pairs_are_thinned_by_features(tmp_path: Path) -> None:
    with open_graph(tmp_path) as graph:
        run = find_run(fill(graph))
        read = lambda **options: read_grids(Ingredients(graph, run), AgreementOptions(pairs=Pairs.UNION, **options)).grids[0]
        assert [len(side) for side in (read(max_pairs=40).sources, read(max_pairs=40).targets)] == [7, 7]  # √(40/117) of 12
        assert [len(side) for side in (read(max_features=10).sources, read(max_features=10).targets)] == [10, 10]
        grid = read(max_pairs=40, seed=3)
        expected = np.array([[weight(i, j) * (j >= i) for j in grid.targets] for i in grid.sources])
        assert np.allclose(grid.connections[EFFECTIVE].signed, expected)


# ---- exact virtual weights


def test_looked_up_weights_are_those_of_the_wires(tmp_path: Path) -> None:
    model = load_model(str(save_tiny(tmp_path / "model")))
    sites = [parse_site(name) for name in ("resid_0", "resid_2")]
    dictionaries = {site: tiny_dictionary("topk", 16, seed=n) for n, site in enumerate(sites)}
    encoder, decoder = dictionaries[sites[1]].W_enc.detach(), dictionaries[sites[0]].W_dec.detach()
    sources, targets = np.array([5, 0, 17, 3]), np.array([20, 1])
    residual = VirtualWeights(model, dictionaries)("resid_0", "resid_2", sources, targets)
    assert np.allclose(residual, decoder[sources] @ encoder[:, targets], atol=1e-6)
    assert VirtualWeights(model, dictionaries)("resid_2", "resid_0", sources, targets) is None
    # all heads of the layers between: Σ W_O W_V with the norm's gain, two heads sharing each head's values
    through = torch.zeros(16, 16)
    for layer in bind(model).module.model.layers[1:3]:
        attn, gain = layer.self_attn, layer.input_layernorm.weight
        values = attn.v_proj.weight.view(2, 1, 4, 16).expand(2, 2, 4, 16).reshape(16, 16)
        through += attn.o_proj.weight @ values * gain
    heads = VirtualWeights(model, dictionaries, [PathKind.ATTENTION])("resid_0", "resid_2", sources, targets)
    assert np.allclose(heads, decoder[sources] @ through.T @ encoder[:, targets], atol=1e-5)
    both = VirtualWeights(model, dictionaries, [PathKind.ATTENTION, PathKind.RESIDUAL])("resid_0", "resid_2", sources, targets)
    assert np.allclose(both, residual + heads, atol=1e-6)
    with pytest.raises(NeedsText, match="--task"):
        VirtualWeights(model, dictionaries, [PathKind.MLP])


# ---- the command


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run featlas in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["featlas", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


@pytest.mark.slow
def test_command_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, against numpy on what was stored: identity dictionaries, whose virtual weight is 1 on the diagonal."""
    for name in ("FEATLAS_ATLAS", "NEO4J_URI"):
        monkeypatch.delenv(name, raising=False)
    task = tmp_path / "pairs.jsonl"
    pairs = [{"clean": f"w1 w{i} w3", "corrupt": f"w1 w{i + 9} w3", "answer": " w5", "wrong_answer": " w6"} for i in range(7, 15)]
    task.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    atlas = ["--atlas", tmp_path / "atlas"]
    named = ["--model", save_tiny(tmp_path / "model" / "tiny"), "--dictionaries", "identity"]
    measured = [*named, "--sites", "resid_0,resid_1", "--task", task, *atlas, "--json"]
    run = lambda *words: command(monkeypatch, capsys, *words)
    agreement_of = lambda *words: run("analyze", "agreement", *named, *atlas, "--draws", 100, *words)
    assert run("ingest", "edges", *measured)[0] == 0
    code, _, said = agreement_of("--no-weights")
    assert code == 2
    assert "ingest statistics" in said
    statistics_run = json.loads(run("ingest", "statistics", *measured, "--between", "adjacent")[1])["run"]
    table, figure = tmp_path / "agreement.parquet", tmp_path / "agreement.html"
    code, out, said = agreement_of("--output", table, "--plot", figure, "--json", "--k", "5,0.1")
    assert code == 0, said
    found = json.loads(out)
    assert (found["functional_run"], found["missing"]) == (statistics_run, {})
    assert pl.read_parquet(table).to_dicts() == found["table"]
    assert "plotly" in figure.read_text(encoding="utf-8")
    with open_graph(tmp_path / "atlas", read_only=True) as graph, StatisticsStore(tmp_path / "atlas", read_only=True) as statistics:
        record = find_run(graph)
        edges, n_other = effective_pairs(graph, record, run_features(graph, record))
        live_u, live_d, r = statistics.correlation_between(statistics_run, "resid_0", "resid_1")
    at = np.searchsorted(live_u, edges["source"].to_numpy()), np.searchsorted(live_d, edges["target"].to_numpy())
    shuffled = [row for row in found["table"] if (row["source_site"], row["null"]) == ("resid_0", "shuffled")]
    rows = {(row["first"], row["second"], row["measure"]): row for row in shuffled}
    assert found["edges_with_error_or_output"] == n_other
    assert rows["effective", "functional", "signed"]["n_pairs"] == edges.height
    assert rows["effective", "functional", "signed"]["value"] == pytest.approx(stats.spearmanr(edges["weight"], r[at]).statistic)
    assert rows["effective", "functional", "magnitude"]["value"] == pytest.approx(stats.spearmanr(edges["abs_weight"], np.abs(r[at])).statistic)
    diagonal = (edges["source"] == edges["target"]).to_numpy().astype(float)
    assert rows["effective", "structural", "signed"]["value"] == pytest.approx(stats.spearmanr(edges["weight"], diagonal).statistic)
    code, out, said = agreement_of("--no-weights", "--pairs", "live")
    assert code == 0, said
    assert "counts as 0" in out
    assert "without structural connectivity" in said
    for words, named_there in (
        (["--k", "ten"], "'ten'"), (["--draws", 5], "draws is 5"), (["--output", "a.txt"], ".parquet"), (["--paths", "mlp"], "--task"),
        (["--pairs", "union"], "ingest correlations"), (["--statistics-run", "zzz"], "zzz"),
    ):
        code, out, said = agreement_of(*words)
        assert (code, out) == (2, ""), words
        assert named_there in said, words


def test_figure_has_a_cell_for_each_two_and_measure() -> None:
    rng = np.random.default_rng(9)
    grid = grid_of(rng.normal(size=(10, 10)), rng.normal(size=(10, 10)), frequencies=(rng.random(10), rng.random(10)))
    table = agree([grid], OPTIONS).table
    figure = agreement_figure(table, title="<b>")
    assert figure.layout.title.text == "&lt;b&gt;"
    dots = [trace for trace in figure.data if trace.type == "scatter"]
    assert len(dots) == 4
    signed = rows_of(table, source_site="resid_0", null="shuffled")["signed"]
    assert list(dots[0].x) == ["resid_0 → resid_1", "all"]
    assert dots[0].y[0] == pytest.approx(signed["value"])
    bars = [trace for trace in figure.data if trace.type == "bar"]
    assert bars[0].base[0] + bars[0].y[0] == pytest.approx(signed["null_high"])
