"""The statistics job on tiny models: against numpy on all activations at once, interrupted, killed, repeated, and asked for nonsense."""

import multiprocessing
import time
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from featlas.errors import UserError
from featlas.ingest.effective import EdgeSettings, node_attributions, prepare
from featlas.ingest.moments import Moments, NotFinite, SparseNodes
from featlas.ingest.statistics import (
    BadStatisticsOptions,
    Between,
    EmptyCorpus,
    StateDoesNotFit,
    StatisticsOptions,
    activation_measure,
    measure_attributions,
    measure_statistics,
    node_means,
    pair_corpus,
    plan_run,
    text_corpus,
)
from featlas.model.baselines import Baseline, BaselineChoice
from featlas.model.binding import bind, capture_sites
from featlas.model.corpus import NotUtf8
from featlas.model.dictionaries import Basis
from featlas.model.loading import load_model
from featlas.model.pairs import NoDonor
from featlas.model.sites import parse_site
from featlas.model.tasks import Pair
from featlas.queries.statistics import ERROR, RESULT_TABLES, StatisticsStore

from .micro import save_tiny_with_corpus
from .micro_dictionaries import tiny_dictionary

RESID, MLP, ATTN = parse_site("resid_1"), parse_site("mlp_0"), parse_site("attn_1")
OPTIONS = StatisticsOptions(
    length=6, batch_size=4, n_contexts=3, before=2, after=1, live_rows=40, min_frequency=0.05, by_position=True, between=Between.ALL,
    commit_seconds=0,
)  # fmt: skip
N_BLOCKS = 22  # the last of 6 batches is not full


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model and a corpus of random words beside it."""
    return save_tiny_with_corpus(tmp_path_factory.mktemp("tiny"), words=6 * N_BLOCKS)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder / "model"))


def site_dictionaries():
    """A TopK, a linear (dense, signed) and a concatenated-heads dictionary."""
    return {
        RESID: tiny_dictionary("topk", 16, seed=1),
        MLP: tiny_dictionary("linear", 16, seed=2),
        ATTN: tiny_dictionary("relu", 16, seed=3, basis=Basis.HEADS),
    }


@pytest.fixture(scope="module")
def dictionaries():
    return site_dictionaries()


@pytest.fixture(scope="module")
def corpus(folder, model):
    return text_corpus(str(folder / "corpus.txt"), model.tokenizer, OPTIONS)


@pytest.fixture(scope="module")
def whole(folder, model, dictionaries, corpus):
    """A store with one uninterrupted run."""
    with StatisticsStore(folder / "whole.duckdb") as store:
        record = measure_statistics(store, model, dictionaries, corpus, OPTIONS)
        yield store, record.run


@pytest.fixture
def store(tmp_path):
    with StatisticsStore(tmp_path / "statistics.duckdb") as opened:
        yield opened


def all_nodes(model, dictionaries, corpus):
    """Site → nodes (sequence, pos, d_sae) and error vectors (sequence, pos, d_in) of the whole corpus, float64, and the tokens."""
    tokens = torch.cat([batch.tokens for batch in corpus.batches()])
    values = capture_sites(bind(model), tokens, {site: d.basis for site, d in dictionaries.items()})
    found = {}
    for site, dictionary in dictionaries.items():
        nodes = dictionary.encode(values[site])
        found[site] = (nodes.double().numpy(), (values[site] - dictionary.decode(nodes)).double().numpy())
    return found, tokens.numpy()


def assert_same_tables(store: StatisticsStore, other: StatisticsStore, run: str) -> None:
    """Every result row of the run is equal, to the last bit."""
    for table in RESULT_TABLES:
        order = {"contexts": "site, feature, rank", "second_moments": "site, feature_i, feature_j", "live_nodes": "site, feature"}.get(table, "ALL")
        frames = [s.query(f"SELECT * FROM {table} WHERE run = ? ORDER BY {order}", [run]) for s in (store, other)]
        assert len(frames[0]) > 0, table
        assert frames[0].equals(frames[1]), table


# -- numbers -------------------------------------------------------------------------------------------------


def test_moments_of_every_node(whole, model, dictionaries, corpus):
    store, run = whole
    nodes, _ = all_nodes(model, dictionaries, corpus)
    assert store.run(run).tokens == corpus.n_sequences * 5  # position 0 is left out
    for site, (features, errors) in nodes.items():
        norms = np.linalg.norm(errors, axis=-1, keepdims=True)
        full = np.concatenate([norms, features], axis=-1)[:, 1:].reshape(corpus.n_sequences * 5, -1)
        frame = store.feature_statistics(run, site.name)
        assert frame["feature"].to_list() == list(range(-1, features.shape[-1]))
        active = np.maximum((full != 0).sum(0), 1)
        for name, expected in {
            "count": (full != 0).sum(0), "frequency": (full != 0).mean(0), "mean": full.mean(0), "variance": full.var(0),
            "minimum": full.min(0), "maximum": full.max(0), "mean_active": full.sum(0) / active, "mean_magnitude": np.abs(full).mean(0),
        }.items():  # fmt: skip
            np.testing.assert_allclose(frame[name].to_numpy(), expected, rtol=2e-5, atol=2e-6, err_msg=f"{site} {name}")


def test_keys_and_kinds_are_those_of_the_graph(whole, model):
    store, run = whole
    frame = store.feature_statistics(run, "resid_1")
    assert frame["key"].to_list()[:2] == [f"{model.key}|tiny|resid_1|error", f"{model.key}|tiny|resid_1|0"]
    assert frame["kind"].to_list()[:2] == ["error", "feature"]
    assert frame["layer"].unique().to_list() == [1]
    properties = store.feature_properties(run)
    assert len(properties) == len(store.feature_statistics(run))
    assert properties["statistics_run"].unique().to_list() == [run]


def test_contexts_hold_the_strongest_tokens(whole, model, dictionaries, corpus):
    store, run = whole
    nodes, tokens = all_nodes(model, dictionaries, corpus)
    features, errors = nodes[RESID]
    for feature in (ERROR, *np.flatnonzero((features[:, 1:] != 0).any((0, 1)))):
        values = np.linalg.norm(errors, axis=-1) if feature == ERROR else features[..., feature]
        size = np.abs(values[:, 1:])  # (sequence, pos)
        strongest = [s for s in np.argsort(-size.max(1), kind="stable") if size[s].max() > 0][:3]
        rows = store.contexts(run, "resid_1", int(feature)).rows(named=True)
        assert [row["sequence"] for row in rows] == strongest
        for rank, (row, sequence) in enumerate(zip(rows, strongest)):
            position = int(size[sequence].argmax()) + 1
            assert (row["rank"], row["position"], row["sequence_key"]) == (rank, position, None)
            assert row["value"] == pytest.approx(values[sequence, position], rel=1e-5)
            low, ids = max(position - 2, 0), tokens[sequence].tolist()
            assert row["token_ids"] == ids[low : position + 2]
            assert row["before"] == [f"w{i}" for i in ids[low:position]]
            assert row["token"] == f"w{ids[position]}"
            assert row["after"] == [f"w{i}" for i in ids[position + 1 : position + 2]]


def test_covariances_of_live_features(whole, model, dictionaries, corpus):
    store, run = whole
    nodes, _ = all_nodes(model, dictionaries, corpus)
    for site, (features, _) in nodes.items():
        full = features[:, 1:].reshape(-1, features.shape[-1])
        live, covariance = store.covariance(run, site.name)
        seen = full[:40]  # two batches of 4 × 5 rows fill the rule's first 40
        assert live.tolist() == np.flatnonzero((seen != 0).mean(0) >= 0.05).tolist()
        np.testing.assert_allclose(covariance, np.cov(full[:, live].T, bias=True), rtol=1e-4, atol=1e-5)
        _, correlation = store.correlation(run, site.name)
        varied = np.diag(covariance) > 1e-9
        np.testing.assert_allclose(correlation[np.ix_(varied, varied)], np.corrcoef(full[:, live[varied]].T), atol=1e-5)


def test_baselines_by_position(whole, model, dictionaries, corpus):
    store, run = whole
    nodes, _ = all_nodes(model, dictionaries, corpus)
    features, errors = nodes[MLP]
    baseline = store.baseline_means(run, "mlp_0", "tiny", model=model.key)
    np.testing.assert_allclose(baseline.features, features[:, 1:].mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(baseline.features_std, features[:, 1:].std((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(baseline.error, errors[:, 1:].mean((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(baseline.error_std, errors[:, 1:].std((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(baseline.position_features[1:], features[:, 1:].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(baseline.position_errors[1:], errors[:, 1:].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(baseline.position_features[0], baseline.features)


# -- tasks ---------------------------------------------------------------------------------------------------


def pairs(n: int = 5) -> list[Pair]:
    """Pairs of two lengths that differ in their second word."""
    text = lambda word, i: f"w1 w{word + i} w2" + " w3" * (1 + i % 2)
    return [Pair(clean=text(10, i), corrupt=text(20, i), answer=" w5", wrong_answer=" w6", task="t") for i in range(n)]


def test_a_task_measures_both_sides_and_names_its_pairs(store, model, dictionaries):
    listed = pairs()
    corpus = pair_corpus("t", listed, model.tokenizer, OPTIONS)
    assert (corpus.n_sequences, corpus.first_position) == (10, 0)
    record = measure_statistics(store, model, dictionaries, corpus, OPTIONS)
    texts = {pair.key: (pair.clean, pair.corrupt) for pair in listed}
    assert record.tokens == sum(len(text.split()) for sides in texts.values() for text in sides)
    rows = store.contexts(record.run, "resid_1").rows(named=True)
    for row in rows:
        around = "".join(f" {word}" for word in (*row["before"], row["token"], *row["after"])).strip()
        assert any(around in side for side in texts[row["sequence_key"]]), row
    corrupt_only = {f"w{20 + i}" for i in range(5)}
    assert corrupt_only & {row["token"] for row in rows}
    clean = pair_corpus("t", listed, model.tokenizer, OPTIONS, clean_only=True)
    assert clean.n_sequences == 5
    assert clean.hash != corpus.hash


def test_attributions_feed_the_same_records(store, model, dictionaries):
    binding, settings = bind(model), EdgeSettings(steps=1)
    corpus = pair_corpus("t", pairs(), model.tokenizer, OPTIONS, clean_only=True)
    record = measure_attributions(store, model, dictionaries, corpus, OPTIONS, settings)
    rows = {site: [] for site in dictionaries}
    for batch in corpus.batches():
        prepared = prepare(binding, dictionaries, batch.pairs, settings)
        corrupt = capture_sites(binding, batch.pairs.corrupt, prepared.bases)
        for site, dictionary in dictionaries.items():
            clean_nodes, corrupt_nodes = (dictionary.encode(value) for value in (prepared.values[site], corrupt[site]))
            errors = prepared.values[site] - dictionary.decode(clean_nodes) - (corrupt[site] - dictionary.decode(corrupt_nodes))
            gradient = prepared.gradients[site]
            by_feature = (gradient @ dictionary.W_dec.T) * (clean_nodes - corrupt_nodes)
            rows[site].append(torch.cat([(gradient * errors).sum(-1, keepdim=True), by_feature], dim=-1).flatten(0, 1).double().numpy())
    for site, parts in rows.items():
        full = np.concatenate(parts)
        frame = store.feature_statistics(record.run, site.name)
        np.testing.assert_allclose(frame["mean"].to_numpy(), full.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(frame["variance"].to_numpy(), full.var(0), rtol=1e-4, atol=1e-7)
    assert store.query("SELECT count(*) FROM error_means").item() == 0
    assert (record.arguments["metric"], record.arguments["node_baseline"]) == ("logit_diff", "counterfactual")
    with pytest.raises(UserError, match="is over attributions"):
        store.baseline_means(record.run, "resid_1")


def donors_as_corrupt(store, model, dictionaries, corpus):
    """The means that attributions from the donors' nodes have, as a counterfactual whose corrupted prompts they are."""
    rows = []
    for batch in corpus.batches():
        prepared = prepare(bind(model), dictionaries, replace(batch.pairs, corrupt=batch.pairs.donor), EdgeSettings(steps=1))
        rows += [features.flatten(0, 1).double() for site, features, _ in node_attributions(prepared) if site == RESID]
    return torch.cat(rows).mean(0).numpy()


def test_attributions_from_a_resampled_baseline(store, model, dictionaries):
    settings = EdgeSettings(steps=1, baseline=Baseline.RESAMPLE)
    listed, measured = pairs(8), {}
    for seed in (0, 1):
        corpus = pair_corpus("t", listed, model.tokenizer, OPTIONS, clean_only=True, donor_seed=seed)
        record = measure_attributions(store, model, dictionaries, corpus, OPTIONS, settings)
        frame = store.feature_statistics(record.run, "resid_1")
        measured[record.run] = frame.filter(frame["feature"] >= 0).sort("feature")["mean"].to_numpy()
        np.testing.assert_allclose(measured[record.run], donors_as_corrupt(store, model, dictionaries, corpus), rtol=1e-4, atol=1e-6)
        assert record.arguments["donor_seed"] == seed
    first, second = measured.values()
    assert not np.allclose(first, second)
    corpus = pair_corpus("t", listed, model.tokenizer, OPTIONS, clean_only=True)
    with pytest.raises(UserError, match="made with donors"):
        measure_attributions(store, model, dictionaries, corpus, OPTIONS, settings)
    with pytest.raises(NoDonor):
        pair_corpus("t", listed[:2], model.tokenizer, OPTIONS, clean_only=True, donor_seed=0)


def test_moments_of_a_baseline(whole, model, dictionaries):
    store, run = whole
    moments = node_means(store, run, model, dictionaries, BaselineChoice(Baseline.NOISE))[RESID]
    baseline = store.baseline_means(run, "resid_1")
    for name, array in vars(baseline).items():
        np.testing.assert_array_equal(getattr(moments, name).numpy(), array)
    with pytest.raises(UserError, match="--baseline noise needs --statistics-run"):
        node_means(store, None, model, dictionaries, BaselineChoice(Baseline.NOISE))
    with pytest.raises(UserError, match="--baseline mean needs --statistics-run"):
        node_means(store, None, model, dictionaries)


def test_attributions_of_a_text_are_refused(store, model, dictionaries, corpus):
    with pytest.raises(BadStatisticsOptions, match="give a task"):
        measure_attributions(store, model, dictionaries, corpus, OPTIONS, EdgeSettings())
    with pytest.raises(BadStatisticsOptions, match="'attribution' needs"):
        measure_statistics(store, model, dictionaries, corpus, OPTIONS, basis="attribution")


# -- resuming ------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a pass from inside."""


def stopping_after(n: int):
    seen = []

    def progress(sequences: int, total: int, tokens: int) -> None:
        seen.append((sequences, total, tokens))
        if len(seen) == n:
            raise Stop

    return progress


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(1,), (2, 3), (5,), (1, 1, 1, 1, 1)])
def test_an_interrupted_run_resumes_to_the_same_result(stops, whole, store, model, dictionaries, corpus):
    reference, run = whole
    for stop in stops:
        with pytest.raises(Stop):
            measure_statistics(store, model, dictionaries, corpus, OPTIONS, progress=stopping_after(stop))
    assert store.run(run).sequences == 4 * sum(stops)
    measure_statistics(store, model, dictionaries, corpus, OPTIONS)
    assert store.run(run).sequences == corpus.n_sequences
    assert_same_tables(store, reference, run)


def test_what_was_not_committed_is_measured_again(whole, store, model, dictionaries, corpus):
    reference, run = whole
    rarely = replace(OPTIONS, commit_seconds=3600.0)
    with pytest.raises(Stop):
        measure_statistics(store, model, dictionaries, corpus, rarely, progress=stopping_after(3))
    assert store.run(run).sequences == 0
    measure_statistics(store, model, dictionaries, corpus, rarely)
    assert_same_tables(store, reference, run)


def test_the_same_run_twice_changes_nothing(whole, model, dictionaries, corpus):
    store, run = whole
    before = store.runs()

    def measure(batch):
        raise AssertionError("a finished run was measured again")

    assert measure_statistics(store, model, dictionaries, corpus, OPTIONS, measure=measure).run == run
    assert store.runs().equals(before)


def _slow_run(folder: str, path: str, reached) -> None:
    """In a child process: the run of `whole`, which sets `reached` after three batches and stops for good after four."""
    torch.set_num_threads(1)
    model = load_model(f"{folder}/model")
    corpus = text_corpus(f"{folder}/corpus.txt", model.tokenizer, OPTIONS)

    def progress(sequences: int, total: int, tokens: int) -> None:
        if sequences == 12:
            reached.set()
        if sequences == 16:
            time.sleep(600)

    with StatisticsStore(path) as store:
        measure_statistics(store, model, site_dictionaries(), corpus, OPTIONS, progress=progress)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(whole, folder, tmp_path, model, dictionaries, corpus):
    reference, run = whole
    path = tmp_path / "killed.duckdb"
    context = multiprocessing.get_context("spawn")
    reached = context.Event()
    child = context.Process(target=_slow_run, args=(str(folder), str(path), reached))
    child.start()
    try:
        assert reached.wait(timeout=120)
    finally:
        child.kill()
        child.join()
    assert child.exitcode == -9
    with StatisticsStore(path) as store:
        assert store.run(run).status == "running"
        assert store.run(run).sequences in (12, 16)
        measure_statistics(store, model, dictionaries, corpus, OPTIONS)
        assert_same_tables(store, reference, run)


def test_a_state_that_does_not_fit_is_refused(store, model, dictionaries, corpus):
    with pytest.raises(Stop):
        measure_statistics(store, model, dictionaries, corpus, OPTIONS, progress=stopping_after(2))
    run = store.runs()["run"].item()
    store.save_state(run, 7, 35, store.load_state(run))
    with pytest.raises(StateDoesNotFit, match="stopped at sequence 7, inside a batch"):
        measure_statistics(store, model, dictionaries, corpus, OPTIONS)
    store.save_state(run, 8, 40, {})
    with pytest.raises(StateDoesNotFit, match="8 sequences and 0 saved parts"):
        measure_statistics(store, model, dictionaries, corpus, OPTIONS)


# -- keys, order, bad input ----------------------------------------------------------------------------------


def test_the_key_names_what_was_measured(model, dictionaries, corpus):
    key = lambda **changes: plan_run(model, dictionaries, corpus, replace(OPTIONS, **changes)).run
    assert key() == key(commit_seconds=99.0) == key(seed=7)
    keys = [key(), key(n_contexts=4), key(min_frequency=0.2), key(batch_size=2), key(by_position=False)]
    keys.append(plan_run(model, {RESID: dictionaries[RESID]}, corpus, OPTIONS).run)
    keys.append(plan_run(model, dictionaries, replace(corpus, hash="x"), OPTIONS).run)
    keys += [plan_run(model, dictionaries, corpus, OPTIONS, basis="attribution", arguments={"metric": m}).run for m in ("kl", "tv")]
    assert len(set(keys)) == len(keys)


def test_sites_are_stored_in_topological_order(whole):
    store, run = whole
    assert [site.site for site in store.run(run).sites] == ["mlp_0", "attn_1", "resid_1"]
    assert store.feature_statistics(run)["site"].unique(maintain_order=True).to_list() == ["mlp_0", "attn_1", "resid_1"]


def test_the_corpus_hash_follows_the_text(folder, tmp_path, model, corpus):
    same = tmp_path / "same.txt"
    same.write_text((folder / "corpus.txt").read_text())
    assert text_corpus(str(same), model.tokenizer, OPTIONS).hash == corpus.hash
    same.write_text((folder / "corpus.txt").read_text().replace("w7 ", "w8 ", 1))
    assert text_corpus(str(same), model.tokenizer, OPTIONS).hash != corpus.hash
    assert text_corpus(str(same), model.tokenizer, OPTIONS, max_sequences=3).n_sequences == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "length is 1"), ({"batch_size": 0}, "batch_size is 0"), ({"n_contexts": -1}, "n_contexts is -1"),
        ({"min_frequency": 1.5}, "min_frequency is 1.5"), ({"skip_positions": -2}, "skip_positions is -2"), ({"max_live": 0}, "max_live is 0"),
    ],
)  # fmt: skip
def test_options_out_of_range(changes, message):
    with pytest.raises(BadStatisticsOptions, match=message):
        replace(OPTIONS, **changes)


def test_bad_corpora(tmp_path, model):
    text = tmp_path / "short.txt"
    text.write_text("w1 w2")
    with pytest.raises(EmptyCorpus, match="fewer than 6 tokens"):
        text_corpus(str(text), model.tokenizer, OPTIONS)
    with pytest.raises(BadStatisticsOptions, match="skip_positions is 6 and length 6"):
        text_corpus(str(text), model.tokenizer, replace(OPTIONS, skip_positions=6))
    text.write_bytes(b"w1 w2 \xff")
    with pytest.raises(NotUtf8, match=r"short\.txt"):
        text_corpus(str(text), model.tokenizer, OPTIONS)
    with pytest.raises(EmptyCorpus, match="'t' has no pairs"):
        pair_corpus("t", [], model.tokenizer, OPTIONS)
    with pytest.raises(BadStatisticsOptions, match="skip_positions is 4, but a sequence has 4 tokens"):
        pair_corpus("t", pairs(), model.tokenizer, replace(OPTIONS, skip_positions=4))


def test_a_value_that_is_not_finite_names_site_and_sequences(store, model, dictionaries, corpus):
    plain = activation_measure(bind(model), dictionaries, corpus.first_position)
    calls = []

    def measure(batch):
        calls.append(batch)
        nodes = plain(batch)
        if len(calls) == 2:
            nodes[RESID] = replace(nodes[RESID], value=nodes[RESID].value * float("nan"))
        return nodes

    with pytest.raises(NotFinite, match=r"site resid_1, sequences 4 to 7: .* NaN"):
        measure_statistics(store, model, dictionaries, corpus, OPTIONS, measure=measure)


def test_without_second_moments_and_contexts(store, model, dictionaries, corpus):
    options = replace(OPTIONS, second_moments=False, between=Between.NONE, n_contexts=0, by_position=False)
    record = measure_statistics(store, model, dictionaries, corpus, options)
    assert store.contexts(record.run, "resid_1").is_empty()
    assert not store.feature_statistics(record.run)["live"].any()
    assert store.baseline_means(record.run, "resid_1").position_features is None
    with pytest.raises(UserError, match="no second moments at resid_1"):
        store.covariance(record.run, "resid_1")


def test_a_dead_feature_has_zeros(store, model):
    dictionary = tiny_dictionary("relu", 16, seed=1)
    dictionary = replace(dictionary, b_enc=dictionary.b_enc.index_fill(0, torch.tensor([3]), -1e6))
    sites = {RESID: dictionary}
    listed = pair_corpus("t", pairs(), model.tokenizer, OPTIONS)
    record = measure_statistics(store, model, sites, listed, OPTIONS)
    row = store.feature_statistics(record.run).filter(pl.col("feature") == 3).row(0, named=True)
    numbers = ("count", "frequency", "mean", "variance", "minimum", "maximum", "mean_active", "mean_magnitude")
    assert [row[name] for name in numbers] == [0.0] * len(numbers)
    assert row["live"] is False
    assert store.contexts(record.run, "resid_1", 3).is_empty()


def test_nodes_on_half_precision_are_summed_in_float64():
    nodes = torch.full((4096, 1), 0.1, dtype=torch.bfloat16)
    sparse = SparseNodes.of(nodes, torch.zeros(4096, 2, dtype=torch.bfloat16))
    assert Moments.of(sparse).mean[0].item() == pytest.approx(nodes[0].double().item(), rel=1e-12)
