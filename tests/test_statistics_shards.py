"""Statistics in shards: merged they are what one pass gives, whoever measured them, in whatever order, and whatever died meanwhile."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from featlas.ingest.corpora import BatchMark
from featlas.ingest.moments import Contexts, LiveRule, Moments, PositionSums, SparseNodes, VectorMoments, Window
from featlas.ingest.products import Batch, Collected, JointMoments
from featlas.ingest.records import Records, StateDoesNotFit
from featlas.ingest.statistics import (
    SHUFFLED,
    Between,
    StatisticsOptions,
    activations,
    measure_into,
    run_measurement,
    shard_folder,
    text_corpus,
)
from featlas.ingest.statistics_shards import BadShards, BatchReader, CorpusDiffers, ShardInWork, default_shards, plan_shards
from featlas.ingest.statistics_workers import measure_one_shard
from featlas.model.loading import load_model
from featlas.model.sites import parse_site
from featlas.queries.statistics import RESULT_TABLES, StatisticsStore
from hypothesis import given, settings
from hypothesis import strategies as st

from .micro import save_tiny_with_corpus
from .micro_dictionaries import tiny_dictionary

OPTIONS = StatisticsOptions(
    length=6, batch_size=2, n_contexts=3, before=2, after=1, live_rows=35, min_frequency=0.05, by_position=True, between=Between.ALL,
    commit_seconds=0,
)  # fmt: skip
N_BLOCKS = 23  # 12 batches, the last of one sequence; the first four hold the 35 rows by which live nodes are chosen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_with_corpus(tmp_path_factory.mktemp("tiny"), words=6 * N_BLOCKS)


def made(folder, options=OPTIONS, **more):
    """The measurement of the tiny model's corpus, made anew."""
    torch.set_num_threads(1)
    model = load_model(str(folder / "model"))
    dictionaries = {parse_site("resid_1"): tiny_dictionary("topk", 16, seed=1), parse_site("mlp_0"): tiny_dictionary("linear", 16, seed=2)}
    return activations(model, dictionaries, text_corpus(str(folder / "corpus.txt"), model.tokenizer, options), options, **more)


@pytest.fixture(scope="module")
def measurement(folder):
    return made(folder)


@pytest.fixture(scope="module")
def whole(folder, measurement):
    """Table → frame of one pass."""
    with StatisticsStore(folder / "whole.duckdb") as store:
        return tables(store, run_measurement(store, measurement).run)


def tables(store, run):
    """The result tables of a run, in an order of their own."""
    orders = {
        "contexts": "site, feature, rank", "second_moments": "site, feature_i, feature_j", "live_nodes": "site, feature",
        "second_moments_between": "site_i, site_j, feature_i, feature_j", "feature_statistics": "site, feature",
        "node_means": "site, position, feature",
        "error_means": "site, position", "run_lags": "lag", "site_pairs": "ordinal",
    }  # fmt: skip
    found = {table: store.query(f"SELECT * FROM {table} WHERE run = ? ORDER BY {orders[table]}", [run]) for table in RESULT_TABLES}
    assert all(len(frame) for frame in found.values())
    return found


def assert_agree(found, expected):
    """Everything that is counted or named is equal, every sum to the last few bits; contexts are equal altogether."""
    assert found["contexts"].equals(expected["contexts"])
    for table, frame in expected.items():
        exact = [name for name, dtype in frame.schema.items() if not (dtype.is_float() or dtype == pl.List(pl.Float64))]
        assert found[table].select(exact).equals(frame.select(exact)), table
        for name in (name for name in frame.columns if name not in exact):
            here, there = (np.array(one[name].explode().to_list(), dtype=float) for one in (found[table], frame))
            np.testing.assert_allclose(here, there, rtol=1e-9, atol=1e-9 * max(1.0, np.abs(there).max()), err_msg=f"{table}.{name}")


def shard_by_shard(measurement, atlas, n_shards, order=None):
    """Measure all shards in an order, as jobs of a batch system would."""
    for number in order or range(1, n_shards + 1):
        assert measure_one_shard(atlas, measurement, number, n_shards).measured


# -- every record --------------------------------------------------------------------------------------------


def sample(seed: int, n_sequences: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sparse nodes (sequence, 4, 5 + error) and tokens (sequence, 4); with `ties` values that are often equal."""
    random = np.random.default_rng(seed)
    values = random.integers(-2, 3, (n_sequences, 4, 6)).astype(float) if ties else random.normal(size=(n_sequences, 4, 6)) + 3
    values[random.random(values.shape) < 0.4] = 0.0
    return values, random.integers(0, 50, (n_sequences, 4))


def nodes_of(values: np.ndarray) -> SparseNodes:
    """The nodes of some sequences, the last column the error node; its vector is two of the others."""
    rows = torch.from_numpy(values.reshape(-1, values.shape[-1]))
    return replace(SparseNodes.of_scalars(rows[:, :-1].contiguous(), rows[:, -1].clone()), error_vector=rows[:, :2].clone())


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans(), cuts=st.lists(st.integers(1, 11), max_size=4, unique=True))
def test_the_records_of_any_shards_merge_to_those_of_one_pass(seed, ties, cuts):
    values, tokens = sample(seed, 12, ties)
    bounds = [0, *sorted(cuts), 12]
    records = []
    for start, stop in pairwise(bounds):
        nodes, window = nodes_of(values[start:stop]), Window(torch.from_numpy(tokens[start:stop]), start)
        positions = PositionSums(5, 2)
        positions.add(nodes, window)
        assert nodes.error_vector is not None
        records.append((Moments.of(nodes), VectorMoments.of(nodes.error_vector), Contexts.empty(6, 3, 2, 1).add(nodes, window), positions))
    moments, errors, contexts, positions = records[0]
    for other in records[1:]:
        moments, errors, contexts, positions = (mine.merge(one) for mine, one in zip((moments, errors, contexts, positions), other, strict=True))
    rows = values.reshape(-1, 6)
    assert moments.count.tolist() == (rows != 0).sum(0).tolist()
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moments.variance, rows.var(0), rtol=1e-10, atol=1e-12)
    assert (moments.minimum.tolist(), moments.maximum.tolist()) == (rows.min(0).tolist(), rows.max(0).tolist())
    np.testing.assert_allclose(moments.magnitude, np.abs(rows).sum(0))
    np.testing.assert_allclose(errors.variance, rows[:, :2].var(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(positions.sums[1], values[..., :5].sum(0), atol=1e-12)
    for node in range(6):  # the strongest of each sequence, the first of equal ones; of equal sequences the earlier
        size = np.abs(values[..., node])
        strongest = [s for s in np.argsort(-size.max(1), kind="stable") if size[s].max() > 0][:3]
        assert [s for s in contexts.sequence[node].tolist() if s >= 0] == strongest
        assert [p for p in contexts.position[node].tolist() if p >= 0] == [int(size[s].argmax()) for s in strongest]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 11), max_size=3, unique=True), rule_rows=st.integers(1, 60))
def test_the_products_of_any_shards_merge_to_those_of_one_pass(seed, cuts, rule_rows, tmp_path_factory):
    values, _ = sample(seed, 12, ties=False)
    rule, widths, where = LiveRule(rule_rows, 0.3), {"a": 5}, tmp_path_factory.mktemp("products")
    joint = lambda name, **more: JointMoments(widths, [("a", "a")], rule, where / name, **more)
    batches = [Batch.of({"a": nodes_of(values[i : i + 1])}, widths, 4) for i in range(12)]
    single, merged = joint("single"), joint("merged")
    for batch in batches:
        single.take(batch)
    bounds = [0, *sorted(cuts), 12]
    for start, stop in pairwise(bounds):
        if 4 * start < rule_rows:
            shard = Collected(widths, where / f"{start}", memory=1)
        else:
            shard = joint(f"{start}", live=merged.live, shifts={"a": merged.sums["a"].shift})
        for i in range(start, stop):
            shard.add({"a": nodes_of(values[i : i + 1])}, 4)
        arrays = shard.save()
        again = Collected(widths, where / f"{start}") if isinstance(shard, Collected) else joint(f"{start}", live=merged.live)
        again.restore(arrays)
        if isinstance(again, Collected):
            for batch in again.batches():
                merged.take(batch)
        else:
            merged.merge(again)
    assert single.rows == merged.rows == 48
    for one, other in zip(single.blocks(), merged.blocks(), strict=True):
        assert one[0] == other[0]
        np.testing.assert_allclose(one[1], other[1], rtol=1e-9, atol=1e-9)
    assert single.live is not None
    assert merged.live is not None
    np.testing.assert_array_equal(single.live["a"], merged.live["a"])
    for name in ("shift", "sums", "squares", "cubes", "lagged", "ends"):
        np.testing.assert_allclose(getattr(single.sums["a"], name), getattr(merged.sums["a"], name), rtol=1e-9, atol=1e-9)
    # and what one may compute by hand
    live = single.live["a"]
    x = values.reshape(48, 6)[:, live] - single.sums["a"].shift
    np.testing.assert_allclose(np.concatenate([sums for _, sums in merged.blocks()]), x.T @ x, rtol=1e-9, atol=1e-9)


def test_a_corpus_is_cut_evenly():
    marks = [BatchMark(4, 6, str(i)) for i in range(10)] + [BatchMark(1, 6, "last")]
    shards = plan_shards(marks, 4, first_position=1, rule=LiveRule(rows=41))
    assert [(s.first_batch, s.stop_batch) for s in shards] == [(0, 2), (2, 5), (5, 8), (8, 11)]
    assert [(s.first, s.stop) for s in shards] == [(0, 8), (8, 20), (20, 32), (32, 41)]
    assert [s.collected for s in shards] == [True, True, False, False]  # the third begins after 5 · 4 · 5 rows
    assert str(shards[2]) == "shard 3/4"
    assert not any(s.collected for s in plan_shards(marks, 4, first_position=1, rule=None))
    assert [default_shards(n) for n in (1, 7, 8, 100, 10_000)] == [1, 1, 2, 25, 64]
    with pytest.raises(BadShards, match="12 shards: the corpus has 11 batches"):
        plan_shards(marks, 12, first_position=1, rule=None)


# -- runs in shards ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("order", [(1, 2, 3, 4, 5), (5, 3, 1, 4, 2)])
def test_shards_measured_apart_and_merged_are_one_pass(order, tmp_path, measurement, whole):
    shard_by_shard(measurement, tmp_path, 5, order)
    assert not measure_one_shard(tmp_path, measurement, 2, 5).measured  # it is there
    with StatisticsStore(tmp_path) as store:
        done = []
        record = run_measurement(store, measurement, progress=lambda *at: done.append(at))
        assert (record.status, record.sequences, record.tokens) == ("done", N_BLOCKS, N_BLOCKS * 5)
        assert_agree(tables(store, record.run), whole)
        assert len(done) == 5  # once for each shard: nothing was measured here
        assert not store.parts(record.run).exists()


@pytest.mark.slow
def test_whoever_measures_a_shard_the_result_is_the_same_bit_by_bit(tmp_path, measurement):
    shard_by_shard(measurement, tmp_path / "a", 4, (3, 1, 4, 2))
    shard_by_shard(measurement, tmp_path / "b", 4, (2,))  # the merging process measures the others
    found = []
    for name in ("a", "b"):
        with StatisticsStore(tmp_path / name) as store:
            found.append(tables(store, run_measurement(store, measurement).run))
    for table, frame in found[0].items():
        assert frame.equals(found[1][table]), table


class Stop(Exception):
    """The run is interrupted here."""


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 3])
def test_a_merge_that_was_stopped_goes_on(after, tmp_path, measurement, whole):
    shard_by_shard(measurement, tmp_path, 5)
    seen = []

    def stopping(*at: int) -> None:
        seen.append(at)
        if len(seen) == after:
            raise Stop

    with StatisticsStore(tmp_path) as store:
        with pytest.raises(Stop):
            run_measurement(store, measurement, progress=stopping)
        run = measurement.plan().run
        assert store.run(run).sequences == seen[-1][0] > 0  # what is merged is committed, and its shards are gone
        left = sorted(path.name for path in (store.parts(run) / "shards").iterdir() if path.is_dir())
        assert left == [f"{number:06d}" for number in range(after + 1, 6)]
        run_measurement(store, measurement)
        assert_agree(tables(store, run), whole)


def test_a_single_pass_that_was_stopped_goes_on_in_shards(tmp_path, measurement, whole):
    def stopping(sequences: int, total: int, tokens: int) -> None:
        if sequences == 10:
            raise Stop

    with StatisticsStore(tmp_path) as store, pytest.raises(Stop):
        run_measurement(store, measurement, progress=stopping)
    shard_by_shard(measurement, tmp_path, 3, (3,))  # the second begins at sequence 8
    with StatisticsStore(tmp_path) as store:
        assert_agree(tables(store, run_measurement(store, measurement).run), whole)


def test_a_shard_that_was_stopped_goes_on_from_its_last_commit(tmp_path, folder, measurement, whole):
    calls = []

    def measure(batch):
        calls.append(batch)
        if len(calls) == 4:
            raise Stop
        return measurement.measure(batch)

    with pytest.raises(Stop):
        measure_one_shard(tmp_path, replace(measurement, measure=measure), 1, 2)
    calls[:] = [None] * 9
    assert measure_one_shard(tmp_path, replace(measurement, measure=measure), 1, 2).n_done == 1
    assert len(calls) == 9 + 3  # three of the six batches were kept
    with StatisticsStore(tmp_path) as store:
        assert_agree(tables(store, run_measurement(store, measurement).run), whole)


def test_a_damaged_shard_is_measured_again(tmp_path, measurement, whole):
    shard_by_shard(measurement, tmp_path, 3)
    run = measurement.plan().run
    shards = shard_folder(tmp_path, run)
    first, second, third = measurement.shards(3)
    assert shards.is_done(first)
    state = shards.folder(first) / "state.npz"
    state.write_bytes(state.read_bytes()[:-7] + b"\0" * 7)
    next(shards.products(second).glob("entries*")).unlink()
    (shards.folder(third) / "done.json").write_text("{")
    assert not any(map(shards.is_done, (first, second, third)))
    with StatisticsStore(tmp_path) as store:
        assert_agree(tables(store, run_measurement(store, measurement).run), whole)


def test_asking_after_a_shard_removes_nothing_that_another_process_writes(tmp_path, measurement, monkeypatch):
    """A shard that is finished between two looks at it, and one that is damaged while somebody holds it."""
    run, (first, second, *_) = measurement.plan().run, measurement.shards(6)
    shards = shard_folder(tmp_path / "statistics.duckdb", run)
    reader = BatchReader(measurement.corpus.batches)
    read_text = Path.read_text

    def finished_meanwhile(path, **how):
        try:
            return read_text(path, **how)
        except FileNotFoundError:
            monkeypatch.setattr(Path, "read_text", read_text)
            measure_into(shards, first, measurement, reader)
            raise

    monkeypatch.setattr(Path, "read_text", finished_meanwhile)
    shards.is_done(first)
    assert (shards.folder(first) / "done.json").exists()
    assert shards.is_done(first)

    measure_into(shards, second, measurement, reader)
    (shards.folder(second) / "done.json").write_bytes(b"\xff[")
    with shards.held(second):
        before = (shards.folder(second) / "lock").stat().st_ino
        assert not shards.is_done(second)
        assert (shards.folder(second) / "lock").stat().st_ino == before  # who waits for it waits for this very file
        with pytest.raises(ShardInWork), shards.held(second, wait_s=0):
            pass
    assert measure_into(shards, second, measurement, reader)
    assert shards.is_done(second)



@pytest.mark.slow
def test_the_null_is_cut_into_shards_too(tmp_path, folder):
    shuffled = made(folder, replace(OPTIONS, by_position=False, n_contexts=0), basis=SHUFFLED)
    shard_by_shard(shuffled, tmp_path, 3, (2, 3, 1))
    numbers = []
    for where in (tmp_path, tmp_path / "single"):
        with StatisticsStore(where) as store:
            run = run_measurement(store, shuffled).run
            numbers.append(store.query("SELECT * EXCLUDE run FROM second_moments_between ORDER BY ALL"))
            assert store.run(run).basis == SHUFFLED
    np.testing.assert_allclose(numbers[0]["sum_product"], numbers[1]["sum_product"], rtol=1e-9, atol=1e-9)


def test_without_second_moments_no_shard_waits_for_live_nodes(tmp_path, folder):
    plain = made(folder, replace(OPTIONS, second_moments=False, between=Between.NONE))
    shard_by_shard(plain, tmp_path, 3, (3, 2, 1))
    assert shard_folder(tmp_path, plain.plan().run).head() is None
    with StatisticsStore(tmp_path) as store:
        assert run_measurement(store, plain).status == "done"


# -- what is refused -----------------------------------------------------------------------------------------


def test_shards_out_of_range_or_of_another_cut_are_refused(tmp_path, measurement):
    for number, of, message in [(0, 3, "--shard 0/3: shards are numbered from 1 to 3"), (4, 3, "from 1 to 3"), (1, 99, "99 shards: .* 12 batches")]:
        with pytest.raises(BadShards, match=message):
            measure_one_shard(tmp_path, measurement, number, of)
    measure_one_shard(tmp_path, measurement, 1, 3)
    with pytest.raises(BadShards, match="was cut into 3 shards; go on with those, or delete"):
        measure_one_shard(tmp_path, measurement, 1, 4)


def test_a_shard_that_another_process_measures_is_refused(tmp_path, measurement):
    folder = shard_folder(tmp_path, measurement.plan().run)
    folder.settle(3)
    with folder.held(measurement.shards(3)[0]), pytest.raises(ShardInWork, match=r"shard 1/3 of run .* is being measured by another process"):
        measure_one_shard(tmp_path, measurement, 1, 3)


def test_another_text_under_the_same_name_is_noticed(tmp_path, folder, measurement):
    changed = tmp_path / "changed.txt"
    changed.write_text((folder / "corpus.txt").read_text().replace("w7 ", "w8 ", 1))
    other = text_corpus(str(changed), measurement.model.tokenizer, OPTIONS)
    run, shards = measurement.plan().run, measurement.shards(2)
    where = shard_folder(tmp_path, run)
    with pytest.raises(CorpusDiffers, match=r"shard 1/2 of run .* has other texts here"):
        measure_into(where, shards[0], measurement, BatchReader(other.batches))
    assert not where.folder(shards[0]).exists()
    with pytest.raises(CorpusDiffers, match="the corpus ended after 12 batches, 13 were counted"):
        list(BatchReader(other.batches).between(0, 13))


def test_shards_with_other_live_features_are_refused(tmp_path, measurement):
    folder = shard_folder(tmp_path, measurement.plan().run)
    folder.settle(3)
    folder.settle_head({"mlp_0": np.array([0]), "resid_1": np.array([1])}, {"mlp_0": np.zeros(1), "resid_1": np.zeros(1)})
    with StatisticsStore(tmp_path) as store, pytest.raises(StateDoesNotFit, match="were measured with other live features"):
        run_measurement(store, measurement)


def test_a_plan_that_cannot_be_read_is_refused(tmp_path, measurement):
    folder = shard_folder(tmp_path, measurement.plan().run)
    assert folder.settle(3) == folder.settle(5) == folder.n_shards() == 3
    (folder.path / "plan.json").write_text("[]")
    with pytest.raises(StateDoesNotFit, match=r"plan\.json cannot be read .*: delete .*shards, and measure the shards again"):
        folder.n_shards()
    (folder.path / "plan.json").write_text(json.dumps({"run": "other", "shards": 3}))
    with pytest.raises(StateDoesNotFit, match="holds shards of run other"):
        folder.n_shards()


def test_records_are_merged_in_order_only(tmp_path, measurement):
    empty = measurement.records(tmp_path)
    with pytest.raises(StateDoesNotFit, match="from 4 on were to be merged after 0"):
        empty.merge(Records(empty.shapes, None, torch.device("cpu"), first=4))
