"""Functional connectivity: correlations against numpy.corrcoef, the threshold against scipy's Benjamini–Hochberg, edges in both graphs."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from featlas.ingest import functional, products
from featlas.ingest.functional import (
    BadCorrelationOptions,
    CorrelationOptions,
    CorrelationTest,
    NothingToCorrelate,
    Sample,
    correlate,
    histogram,
    lag_weights,
    threshold,
    two_sided_p,
    write_correlates,
)
from featlas.ingest.moments import SparseNodes
from featlas.ingest.products import LAGS
from featlas.ingest.statistics import (
    SHUFFLED,
    BadStatisticsOptions,
    Between,
    Corpus,
    EmptyCorpus,
    StatisticsOptions,
    TokenBatch,
    measure_statistics,
    shuffled_corpus,
    shuffled_measure,
)
from featlas.model.loading import load_model
from featlas.model.sites import parse_site
from featlas.queries.embedded import LadybugStore
from featlas.queries.statistics import ERROR, LARGEST_R, StatisticsStore, fisher_weights
from featlas.queries.store import ServerCredentials, open_graph
from scipy import stats

from .micro import save_tiny
from .micro_dictionaries import tiny_dictionary

SITES = tuple(parse_site(name) for name in ("mlp_0", "resid_0", "resid_1"))
WIDTH, POS, SEQUENCES, BATCH = 24, 12, 60, 6
OPTIONS = StatisticsOptions(
    length=POS, batch_size=BATCH, skip_positions=0, n_contexts=0, live_rows=100, min_frequency=0.01, between=Between.ALL, commit_seconds=0
)  # fmt: skip
CONSTANT, DEAD = 5, 6
PAIRS = 3 * 253 + 3 * 529


def activations(seed: int = 0) -> np.ndarray:
    """(site, sequence, pos, WIDTH + 1), the error node last: some nodes share a cause across sites, one is constant, one never active."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(SITES), SEQUENCES, POS, WIDTH + 1))
    cause = 4 * rng.normal(size=(1, SEQUENCES, POS, 3))
    x[..., :3] += cause  # features 0, 1, 2 of all sites
    x = np.maximum(x - 0.3, 0)
    x[..., WIDTH] += 50 + cause[..., 0]
    x[..., 4] = 1e5 + rng.normal(size=x.shape[:-1]) + (x[..., 3] > 0)  # far from zero, and tied to feature 3 of its own site
    x[..., CONSTANT], x[..., DEAD] = 1e7 / 3, 0.0
    return x


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(save_tiny(tmp_path_factory.mktemp("tiny") / "model")))


def source(x: np.ndarray):
    """A corpus, and a measure that gives `x` as its nodes."""
    tokens = torch.arange(SEQUENCES * POS).reshape(SEQUENCES, POS)

    def batches():
        for start in range(0, SEQUENCES, BATCH):
            yield TokenBatch(tokens[start : start + BATCH])

    def measure(batch):
        start = int(batch.tokens[0, 0]) // POS
        found = {}
        for site, nodes in zip(SITES, x):
            rows = torch.from_numpy(nodes[start : start + len(batch.tokens)].reshape(-1, WIDTH + 1))
            found[site] = SparseNodes.of_scalars(rows[:, :-1].contiguous(), rows[:, -1].clone())
        return found

    return Corpus("text", hashlib.sha256(x.tobytes()).hexdigest()[:8], SEQUENCES, batches, 0), measure


def ingest(store: StatisticsStore, model, x: np.ndarray, options: StatisticsOptions = OPTIONS, basis: str = "activation"):
    """A finished run whose nodes are `x`."""
    corpus, measure = source(x)
    dictionaries = {site: tiny_dictionary("topk", WIDTH, seed=1) for site in SITES}
    return measure_statistics(store, model, dictionaries, corpus, options, basis=basis, measure=measure)


@pytest.fixture
def store(tmp_path):
    with StatisticsStore(tmp_path / "statistics.duckdb") as opened:
        yield opened


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """A store with a run over `activations()`."""
    with StatisticsStore(tmp_path_factory.mktemp("store")) as opened:
        yield opened, ingest(opened, model, activations()).run


def corrcoef(x: np.ndarray, site_i: int, site_j: int) -> np.ndarray:
    """(WIDTH + 1)² correlations, NaN for constant nodes; the error node last."""
    i, j = (x[site].reshape(-1, WIDTH + 1) for site in (site_i, site_j))
    i, j = i - i.mean(0), j - j.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (i.T @ j) / len(i) / np.outer(i.std(0), j.std(0))
    r[CONSTANT], r[:, CONSTANT] = np.nan, np.nan
    return r


# -- correlations ---------------------------------------------------------------------------------------------


def test_correlations_within_and_between_sites_are_those_of_numpy(finished):
    store, run = finished
    x = activations()
    alive = [f for f in range(WIDTH) if f != DEAD]
    for s, site in enumerate(SITES):
        live, r = store.correlation(run, site.name)
        assert live.tolist() == alive
        known = np.nan_to_num(corrcoef(x, s, s)[np.ix_(alive, alive)])
        np.fill_diagonal(known, 1.0)
        np.testing.assert_allclose(r, known, atol=1e-9)
        with_error, r = store.correlation(run, site.name, errors=True)
        assert with_error.tolist() == [ERROR, *alive]
        np.testing.assert_allclose(r[0, 1:], np.nan_to_num(corrcoef(x, s, s)[WIDTH, alive]), atol=1e-9)
    for s, t in ((0, 1), (0, 2), (1, 2), (2, 0)):
        live_i, live_j, r = store.correlation_between(run, SITES[s].name, SITES[t].name)
        assert live_i.tolist() == live_j.tolist() == alive
        np.testing.assert_allclose(r, np.nan_to_num(corrcoef(x, s, t)[np.ix_(alive, alive)]), atol=1e-9)
        _, _, covariance = store.covariance_between(run, SITES[s].name, SITES[t].name)
        i, j = (x[site].reshape(-1, WIDTH + 1)[:, alive] for site in (s, t))
        np.testing.assert_allclose(covariance, (i - i.mean(0)).T @ (j - j.mean(0)) / len(i), rtol=1e-6, atol=1e-7)


def test_adjacent_pairs_are_a_site_and_what_it_reads(store, model):
    run = ingest(store, model, activations(), replace(OPTIONS, between=Between.ADJACENT)).run
    within = [(site.name, site.name) for site in SITES]
    assert store.site_pairs(run) == [*within, ("mlp_0", "resid_0"), ("resid_0", "resid_1")]
    with pytest.raises(Exception, match=r"no products of mlp_0 with resid_1: .*--between all"):
        store.covariance_between(run, "mlp_0", "resid_1")


def test_the_table_holds_the_significant_with_fisher_weights(finished):
    store, run = finished
    summary = correlate(store, run, CorrelationOptions(fdr=0.01))
    rows = store.correlations(run)
    assert rows.height == summary.n_significant >= 12
    assert rows["r"].is_finite().all()
    x = activations()
    names = [site.name for site in SITES]
    for row in rows.rows(named=True):
        known = corrcoef(x, names.index(row["site_i"]), names.index(row["site_j"]))[row["feature_i"], row["feature_j"]]  # -1 is the last
        assert row["r"] == pytest.approx(known, abs=1e-9)
        assert row["fisher"] == pytest.approx(2 * np.arctanh(known), rel=1e-6)
        assert row["site_i"] != row["site_j"] or row["feature_i"] < row["feature_j"]
    found = {(row["site_i"], row["feature_i"], row["site_j"], row["feature_j"]) for row in rows.rows(named=True)}
    assert {("mlp_0", f, "resid_1", f) for f in range(3)} | {("resid_0", 3, "resid_0", 4)} <= found
    assert not {f for row in found for f in (row[1], row[3])} & {CONSTANT, DEAD}
    assert rows["r"].abs().to_list() == sorted(rows["r"].abs(), reverse=True)
    tests = store.correlation_tests(run)
    assert tests["n_significant"].sum() == rows.height
    assert summary.least_r == pytest.approx(rows["r"].abs().min()) == tests["least_r"].min()
    assert tests["n_tested"].to_list() == [253, 253, 253, 529, 529, 529]  # 23 nodes that vary: 22 features and the error node


def test_fisher_weights_are_finite():
    most = 2 * np.arctanh(LARGEST_R)
    assert fisher_weights(np.array([1.0, -1.0, 0.0, 0.5])).tolist() == pytest.approx([most, -most, 0.0, np.log(3)])


@pytest.mark.slow
@pytest.mark.parametrize("sample", list(Sample))
def test_the_significant_are_those_of_scipy(finished, sample):
    store, run = finished
    options = CorrelationOptions(fdr=0.05, sample=sample)
    test = CorrelationTest(store, store.run(run), replace(options, fdr=1 - 1e-12))  # every p-value
    everything = [test.examine(part) for part in test.parts]
    p = np.concatenate([part.p for part in everything])
    assert len(p) == sum(part.n_tested for part in everything) == PAIRS
    expected = stats.false_discovery_control(p, method="bh") <= 0.05
    summary = correlate(store, run, options)
    assert 0 < expected.sum() < PAIRS
    assert (summary.n_tested, summary.n_significant) == (PAIRS, expected.sum())
    assert summary.p_threshold == p[expected].max()


@pytest.mark.slow
def test_parts_within_the_memory_come_to_the_same(finished):
    store, run = finished
    correlate(store, run)
    whole = store.correlations(run)
    options = CorrelationOptions(memory=2 * functional.CELL_BYTES * (WIDTH + 1))
    assert len(CorrelationTest(store, store.run(run), options).parts) > 12
    correlate(store, run, options)
    assert store.correlations(run).equals(whole)


def test_small_ones_are_passed_over(finished):
    store, run = finished
    before = correlate(store, run)
    after = correlate(store, run, CorrelationOptions(min_r=0.4))
    assert 0 < after.n_significant < before.n_significant
    assert after.least_r >= 0.4
    assert after.p_threshold == before.p_threshold


# -- p-values -------------------------------------------------------------------------------------------------


def test_p_values_without_skewness_are_normal():
    r, n = np.array([-0.5, 0.0, 0.1, 0.3]), 101.0
    np.testing.assert_allclose(two_sided_p(r, n, 0.0), 2 * stats.norm.sf(np.abs(r) * 10), rtol=1e-12)


@pytest.mark.parametrize("skewness", [0.1, 1.0, 4.0, -2.0])
def test_the_longer_tail_is_of_pearson_type_3(skewness):
    z = np.array([0.5, 2.0, 5.0])
    r = np.sign(skewness) * z / 100
    tail = stats.pearson3.sf(z, abs(skewness))
    np.testing.assert_allclose(two_sided_p(r, 10_001.0, skewness), np.minimum(2 * tail, 1), rtol=1e-6)
    np.testing.assert_allclose(two_sided_p(-r, 10_001.0, skewness), 2 * stats.norm.sf(z), rtol=1e-9)


def test_rare_features_that_meet_once_are_no_discovery():
    """Two features on 16 of 16,384 tokens each that meet on one: r = 0.06, eight standard errors, and yet p is near 16 · 16 / 16,384."""
    n, k = 16_384, 16
    x, y = np.zeros(n), np.zeros(n)
    x[:k], y[k - 1 : 2 * k - 1] = 1, 1
    r = np.corrcoef(x, y)[0, 1]
    skewness = stats.skew(x) * stats.skew(y) / np.sqrt(n)
    meeting = stats.hypergeom.sf(0, n, k, k)
    assert two_sided_p(np.array([r]), n, 0.0)[0] < 1e-14
    assert 0.2 < two_sided_p(np.array([r]), n, skewness)[0] / meeting < 5


def test_weights_of_the_lags_sum_every_distance():
    length, sequences = 30, 7
    rows = np.array([sequences * max(length - lag, 0) for lag in LAGS])
    weights = lag_weights(np.array(LAGS), rows, length * sequences)
    every = np.arange(1, length)
    for rho in (lambda k: np.ones_like(k, dtype=float), lambda k: np.exp(-k / 6)):
        exact = ((length - every) / length * rho(every)).sum()
        assert (weights * rho(np.array(LAGS))).sum() == pytest.approx(exact, rel=0.03)


@pytest.mark.slow
def test_dependent_tokens_give_no_false_discoveries(store, model):
    """Two sites of independent but slowly varying features: counting every token finds correlations that are not there."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(len(SITES), SEQUENCES, 2, WIDTH + 1)), POS // 2, axis=2) + 0.1 * rng.normal(size=(3, SEQUENCES, POS, WIDTH + 1))
    run = ingest(store, model, x).run
    found = {sample: correlate(store, run, CorrelationOptions(sample=sample)) for sample in Sample}
    assert found[Sample.TOKENS].n_significant > 50
    assert found[Sample.EFFECTIVE].n_significant <= 1
    share = found[Sample.EFFECTIVE].tests["effective_share"]
    assert share.min() > 1.5 / POS
    assert share.max() < 3 / POS  # two independent values in twelve tokens


# -- the threshold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fdr", [0.01, 0.05, 0.5])
def test_the_threshold_is_that_of_a_sort(seed, fdr):
    rng = np.random.default_rng(seed)
    kinds = [rng.random(300), rng.random(100) * 10.0 ** rng.integers(-30, 0, size=100), np.zeros(seed), np.full(5, 0.003)]
    p = np.concatenate(kinds[: 1 + seed % 4])
    called = stats.false_discovery_control(p, method="bh") <= fdr
    passes = []
    low = p[p <= fdr]
    found = threshold(histogram(low), len(p), fdr, lambda passing: passes.append(1) or passing(low))
    assert found == (p[called].max() if called.any() else None)
    assert len(passes) <= 5


def test_the_threshold_inside_one_bin():
    p = np.array([0.0100, 0.01001, 0.01002, 0.9, 0.9, 0.9])  # 3 of 6: the third may be up to 0.025
    assert threshold(histogram(p[:3]), 6, 0.05, lambda passing: passing(p[:3])) == 0.01002
    assert threshold(histogram(p[:3]), 6, 0.02003, lambda passing: passing(p[:3])) is None


# -- the null -------------------------------------------------------------------------------------------------


def test_shuffled_sites_see_different_texts():
    x = activations()
    corpus, measure = source(x)
    batch = next(corpus.batches())
    nodes = shuffled_measure(measure)(batch)
    for k, site in enumerate(SITES):
        moved = np.roll(x[k, :BATCH], -k, axis=0).reshape(BATCH * POS, -1)
        dense = np.zeros((BATCH * POS, WIDTH + 1))
        row, feature, value = (column.numpy() for column in nodes[site].entries)
        dense[row, feature] = value
        np.testing.assert_allclose(dense, moved)
        assert (np.diff(nodes[site].row.numpy()) >= 0).all()
    with pytest.raises(BadStatisticsOptions, match="3 sites cannot be shuffled in batches of 2"):
        shuffled_measure(measure)(TokenBatch(batch.tokens[:2]))


def test_a_shuffled_corpus_keeps_every_sequence_once():
    corpus, _ = source(activations())
    mixed = shuffled_corpus(corpus, 7, seed=0)
    tokens = torch.cat([batch.tokens for batch in mixed.batches()])
    assert [len(batch.tokens) for batch in mixed.batches()] == [7] * 8  # 56 of 60
    firsts = tokens[:, 0].tolist()
    assert len(set(firsts)) == 56 == mixed.n_sequences
    assert set(firsts) <= {POS * i for i in range(SEQUENCES)}
    assert firsts != sorted(firsts)
    assert mixed.hash == shuffled_corpus(corpus, 7, seed=0).hash != shuffled_corpus(corpus, 7, seed=1).hash
    with pytest.raises(EmptyCorpus, match="no 61 sequences of one length"):
        shuffled_corpus(corpus, 61, seed=0)


# -- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"fdr": 0.0}, "fdr is 0.0"), ({"fdr": 1.0}, "fdr is 1.0"), ({"min_r": 1.5}, "min_r is 1.5"), ({"max_edges": -1}, "max_edges is -1")],
)
def test_options_out_of_range(changes, message):
    with pytest.raises(BadCorrelationOptions, match=message):
        CorrelationOptions(**changes)


def test_a_run_without_products_is_refused(store, model):
    run = ingest(store, model, activations(), replace(OPTIONS, second_moments=False, between=Between.NONE)).run
    with pytest.raises(NothingToCorrelate, match="no second moments"):
        correlate(store, run)


# -- the graph ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["embedded", pytest.param("server", marks=pytest.mark.neo4j)])
def graph(request, tmp_path):
    if request.param == "embedded":
        opened = open_graph(tmp_path / "graph.lbug")
    else:
        server = request.getfixturevalue("clean_neo4j")
        opened = open_graph(server.uri, credentials=ServerCredentials(server.username, server.password))
    with opened:
        yield opened


def test_edges_are_written_once_in_order_and_replaced(finished, graph):
    store, run = finished
    correlate(store, run, CorrelationOptions(fdr=0.01))
    rows = store.correlations(run)
    written = write_correlates(graph, store, run, max_edges=100_000)
    edges = graph.read_edges("CORRELATES", run=run)
    assert written == edges.height == rows.height
    assert (edges["source"] < edges["target"]).all()
    assert edges["basis"].unique().to_list() == ["activation"]
    ends = lambda s, t: (min(s, t), max(s, t))
    assert {ends(row["key_i"], row["key_j"]): row["r"] for row in rows.rows(named=True)} == {
        (row["source"], row["target"]): row["r"] for row in edges.rows(named=True)
    }
    assert write_correlates(graph, store, run, max_edges=100_000) == written
    assert graph.read_edges("CORRELATES", run=run).equals(edges)
    assert write_correlates(graph, store, run, max_edges=10) == 10
    kept = graph.read_edges("CORRELATES", run=run)
    assert sorted(kept["r"].abs(), reverse=True) == pytest.approx(rows["r"].abs().to_list()[:10])
    features = graph.query("MATCH (f:Feature) RETURN f.key AS key, f.kind AS kind, f.`index` AS number, f.site AS site ORDER BY f.key")
    assert {"error", "feature"} == set(features["kind"])
    assert all(row["key"].endswith(f"{row['site']}|{row['number'] if row['kind'] == 'feature' else 'error'}") for row in features.rows(named=True))


def test_an_interrupted_write_goes_on(finished, graph, monkeypatch):
    store, run = finished
    correlate(store, run, CorrelationOptions(fdr=0.01))
    monkeypatch.setattr("featlas.queries.correlations.CHUNK", 3)
    merge, calls = type(graph).merge_edges, []

    def failing(self, type, rows):
        calls.append(rows.height)
        if len(calls) == 3:
            raise KeyboardInterrupt
        merge(self, type, rows)

    monkeypatch.setattr(type(graph), "merge_edges", failing)
    with pytest.raises(KeyboardInterrupt):
        write_correlates(graph, store, run, 1000)
    assert graph.read_edges("CORRELATES", run=run).height == 6
    n = write_correlates(graph, store, run, 1000)
    assert sum(calls[3:]) == n - 6  # what was there is not written again
    assert graph.read_edges("CORRELATES", run=run).height == n


def test_labels_of_the_graphs_features_stay(finished, tmp_path):
    store, run = finished
    correlate(store, run)
    key = store.correlations(run)["key_i"][0]
    with LadybugStore(tmp_path / "graph.lbug") as graph:
        graph.merge_nodes("Feature", pl.DataFrame({"key": [key], "label": ["a name"], "frequency": [0.5]}))
        write_correlates(graph, store, run, 50)
        row = json.loads(graph.query("MATCH (f:Feature) WHERE f.key = $key RETURN properties(f) AS p", {"key": key})["p"][0])
    assert (row["label"], row["frequency"]) == ("a name", 0.5)


def test_a_shuffled_run_has_no_place_in_the_graph(store, model, tmp_path):
    run = ingest(store, model, activations(), basis=SHUFFLED).run
    summary = correlate(store, run)
    assert summary.n_tested == 3 * 529  # pairs within a site see the same text
    with LadybugStore(tmp_path / "graph.lbug") as graph, pytest.raises(BadCorrelationOptions, match="is shuffled"):
        write_correlates(graph, store, run, 10)


@pytest.mark.slow
def test_a_run_beyond_its_memory_comes_to_the_same_tables(finished, store, model, monkeypatch):
    reference, run = finished
    monkeypatch.setattr(products, "TILE_BYTES", 64)
    monkeypatch.setattr("featlas.ingest.statistics_options.LEAST_MEMORY", 1)
    monkeypatch.setattr(products, "FLUSH_ROWS", 150)
    assert ingest(store, model, activations(), replace(OPTIONS, memory=2000)).run == run
    assert not store.parts(run).exists()
    for name in ("correlation", "covariance"):
        for site in SITES:
            for mine, known in zip(getattr(store, name)(run, site.name), getattr(reference, name)(run, site.name)):
                np.testing.assert_allclose(mine, known, rtol=1e-9, atol=1e-9)
    assert store.query("SELECT count(*) FROM second_moments_between").item() == reference.query("SELECT count(*) FROM second_moments_between").item()
