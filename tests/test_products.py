"""Second moments within and between sites against numpy on the whole matrix: out of core, interrupted, in shards, far from zero."""

import numpy as np
import pytest
import torch
from featlas.ingest import products
from featlas.ingest.moments import LiveRule, ShapesDiffer, SparseNodes
from featlas.ingest.products import LAGS, JointMoments, PartsMissing, packed, unpacked

POS = 7
WIDTHS = {"a": 12, "b": 9, "c": 5}
PAIRS = [("a", "a"), ("b", "b"), ("c", "c"), ("a", "b"), ("a", "c"), ("b", "c")]
BATCHES = (4, 1, 5, 3, 2, 4)
RULE = LiveRule(rows=30, min_frequency=0.05)
LARGE = 1 << 30


def sample(seed: int = 0, mean: float = 1e3) -> dict[str, np.ndarray]:
    """Site → (sequence, pos, d_sae + 1), the error node last: sparse, dense and signed, one never active, one constant, with a common cause."""
    rng = np.random.default_rng(seed)
    n = sum(BATCHES)
    cause = rng.normal(size=(n, 1, 1)) + 0.5 * rng.normal(size=(n, POS, 1))
    found = {}
    for site, width in WIDTHS.items():
        x = np.maximum(rng.normal(size=(n, POS, width + 1)) + cause - 0.8, 0)
        x[..., 0] = 0.0
        x[..., 1] = mean + rng.normal(size=(n, POS))
        x[..., 2] = mean
        x[..., -1] = 3 * mean + cause[..., 0] + rng.normal(size=(n, POS))
        found[site] = x
    return found


def batches(data: dict[str, np.ndarray]):
    start = 0
    for n in BATCHES:
        rows = {site: torch.from_numpy(x[start : start + n].reshape(n * POS, -1)) for site, x in data.items()}
        yield {site: SparseNodes.of_scalars(x[:, :-1].contiguous(), x[:, -1].clone()) for site, x in rows.items()}
        start += n


def measured(data, folder, *, memory=LARGE, parts=slice(None), live=None) -> JointMoments:
    joint = JointMoments(WIDTHS, PAIRS, RULE, folder, memory=memory, live=live)
    for nodes in list(batches(data))[parts]:
        joint.add(nodes, POS)
    return joint


def blocks(joint: JointMoments) -> dict[tuple[str, str], np.ndarray]:
    """Pair → covariances of the live nodes."""
    parts: dict[tuple[str, str], list[np.ndarray]] = {pair: [] for pair in PAIRS}
    for tile, sums in joint.blocks():
        parts[tile.first, tile.second].append(sums.copy())
    found = {}
    for (first, second), rows in parts.items():
        mean = [joint.sums[site].sums / joint.rows for site in (first, second)]
        found[first, second] = np.concatenate(rows) / joint.rows - np.outer(*mean)
    return found


def expected(data, joint: JointMoments, first: str, second: str) -> np.ndarray:
    x, y = (data[site].reshape(-1, data[site].shape[-1])[:, joint.live[site]] for site in (first, second))
    return (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)


@pytest.mark.parametrize("sparse_share", [1, 16])
@pytest.mark.parametrize("flush_rows", [11, 40, 10_000])
def test_covariances_of_every_pair_equal_those_of_the_full_matrix(flush_rows, sparse_share, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "FLUSH_ROWS", flush_rows)
    data = sample()
    joint = measured(data, tmp_path)
    for pair, found in blocks(joint).items():
        np.testing.assert_allclose(found, expected(data, joint, *pair), rtol=1e-9, atol=1e-9, err_msg=str(pair))
    first = data["a"][:5].reshape(-1, 13)  # two batches have the rule's 30 rows
    able = np.flatnonzero((first != 0).mean(0) >= 0.05)
    assert joint.live["a"].tolist() == able.tolist()
    assert 12 in able  # the error node takes part
    assert joint.rows == sum(BATCHES) * POS


def test_dense_blocks_equal_sparse_products(tmp_path, monkeypatch):
    data = sample(1)
    x, y = (data[site].reshape(-1, data[site].shape[-1]) for site in ("a", "b"))
    sparse = [products.sparse.csr_matrix(np.where(np.random.default_rng(0).random(m.shape) < 0.05, m, 0)) for m in (x, y)]
    tile = products.Tile("a", "b", 2, 9)
    calls = []
    monkeypatch.setattr(products.torch, "zeros", lambda *shape, **options: calls.append(shape) or torch.empty(*shape, **options).zero_())
    few = products._product(sparse[0], sparse[0].T.tocsr(), sparse[1], tile, torch.device("cpu"))
    assert not calls
    dense = [products.sparse.csr_matrix(m) for m in (x, y)]
    many = products._product(dense[0], dense[0].T.tocsr(), dense[1], tile, torch.device("cpu"))
    assert calls
    np.testing.assert_allclose(few, (sparse[0].T @ sparse[1]).toarray()[2:9], rtol=1e-12)
    np.testing.assert_allclose(many, (x.T @ y)[2:9], rtol=1e-12)


@pytest.mark.parametrize("mean", [1e6, 1e9])
def test_no_digits_are_lost_far_from_zero(mean, tmp_path):
    data = sample(2, mean)
    joint = measured(data, tmp_path)
    for pair, found in blocks(joint).items():
        exact = expected(data, joint, *pair)
        # The values themselves are rounded to mean · 2e-16: that much and no more.
        np.testing.assert_allclose(found, exact, rtol=1e-7, atol=1e-14 * mean, err_msg=str(pair))
    x = data["a"].reshape(-1, 13)[:, [1, 12]]
    raw = x.T @ x / len(x) - np.outer(x.mean(0), x.mean(0))
    assert np.abs(raw - np.cov(x.T, bias=True)).max() > (1e-5 if mean == 1e6 else 1)  # what sums of raw products give


def test_autocorrelation_and_skewness_sums(tmp_path):
    data = sample(3, mean=5.0)
    joint = measured(data, tmp_path)
    joint.fold()
    for site, x in data.items():
        x = x[..., joint.live[site]]
        sums = joint.sums[site]
        z = x - sums.shift
        np.testing.assert_allclose(sums.sums, z.sum((0, 1)), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(sums.squares, (z**2).sum((0, 1)), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(sums.cubes, (z**3).sum((0, 1)), rtol=1e-9, atol=1e-7)
        centred, found = x - x.mean((0, 1)), sums.autocorrelation(joint.rows, joint.lag_rows)
        for i, lag in enumerate(LAGS):
            assert joint.lag_rows[i] == len(x) * max(POS - lag, 0)
            if lag < POS:
                covariance = (centred[:, :-lag] * centred[:, lag:]).mean((0, 1))
                variance = (centred**2).mean((0, 1))
                known = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 1e-12)
                np.testing.assert_allclose(np.where(variance > 1e-12, found[:, i], 0.0), np.clip(known, -1, 1), rtol=1e-6, atol=1e-8)
            else:
                assert (found[:, i] == 0).all()


def test_products_beyond_the_memory_are_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "TILE_BYTES", 8 * 9 * 2)
    monkeypatch.setattr(products, "FLUSH_ROWS", 20)
    data = sample(4)
    whole = measured(data, tmp_path / "whole")
    memory = 1600  # 800 bytes of products stay, out of about 2,600
    small = measured(data, tmp_path / "small", memory=memory)
    assert small.tiles.resident
    assert sum(tile.nbytes for tile in small.tiles.resident.values()) <= memory // 2
    on_disk = list((tmp_path / "small").iterdir())
    assert len(on_disk) == len(small.tiles.files) > 5
    assert sum(8 * len(small.live[first]) * len(small.live[second]) for first, second in PAIRS) > memory
    assert not (tmp_path / "whole").exists()
    assert {pair: len(b) for pair, b in blocks(small).items()} == {pair: len(b) for pair, b in blocks(whole).items()}
    for pair, found in blocks(small).items():
        np.testing.assert_allclose(found, expected(data, small, *pair), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [LARGE, 60_000, 1600])
@pytest.mark.parametrize("stops", [(1,), (3,), (2, 3, 5)])
def test_a_killed_run_goes_on_to_the_same_bits(stops, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "TILE_BYTES", 8 * 9 * 2)
    monkeypatch.setattr(products, "FLUSH_ROWS", 20)
    data = sample(5)
    whole = measured(data, tmp_path / "whole", memory=memory)
    folder, committed, done = tmp_path / "killed", None, 0
    every = list(batches(data))
    for stop in stops:
        joint = JointMoments(WIDTHS, PAIRS, RULE, folder, memory=memory)
        if committed is not None:
            joint.restore(unpacked(committed))
        for nodes in every[done:stop]:
            joint.add(nodes, POS)
        state = packed(joint.save())
        committed, done = state, stop
        joint.cleaned()
        # What is done after the commit is lost, and must leave no trace: another batch, folded, and files of a commit that never was.
        joint.add(every[stop], POS)
        joint.fold()
        joint.save()
    joint = JointMoments(WIDTHS, PAIRS, RULE, folder, memory=memory)
    joint.restore(unpacked(committed))
    named = set(joint.tiles.files.values()) | set(joint.segments)
    assert {path.name for path in folder.iterdir()} == named
    for nodes in every[done:]:
        joint.add(nodes, POS)
    for (tile, found), (other, sums) in zip(joint.blocks(), whole.blocks(), strict=True):
        assert tile == other
        assert np.array_equal(found, sums)
    for site, sums in whole.sums.items():
        assert all(np.array_equal(value, getattr(joint.sums[site], name)) for name, value in vars(sums).items())


def test_shards_merge_into_one_pass(tmp_path):
    data = sample(6)
    whole = measured(data, tmp_path / "whole")
    first = measured(data, tmp_path / "first", parts=slice(0, 3))
    first.fold()
    second = measured(data, tmp_path / "second", parts=slice(3, None), live=first.live)
    second.fold()
    assert not np.array_equal(first.sums["a"].shift, second.sums["a"].shift)
    first.merge(second)
    assert first.rows == whole.rows
    joined, known = blocks(first), blocks(whole)
    for pair in PAIRS:
        np.testing.assert_allclose(joined[pair], known[pair], rtol=1e-9, atol=1e-9)
    for site, sums in whole.sums.items():
        for name, value in vars(sums.shifted(first.sums[site].shift, whole.rows, whole.lag_rows)).items():
            np.testing.assert_allclose(getattr(first.sums[site], name), value, rtol=1e-7, atol=1e-6, err_msg=name)


def test_shards_of_other_nodes_are_refused(tmp_path):
    data = sample(7)
    first, second = (measured(data, tmp_path / name, parts=part) for name, part in (("a", slice(0, 3)), ("b", slice(3, None))))
    first.fold()
    second.live = {site: nodes[1:] for site, nodes in first.live.items()}
    second.sums = {}
    with pytest.raises(ShapesDiffer, match="give both shards the same live nodes"):
        first.merge(second)


def test_entries_are_not_collected_beyond_the_memory(tmp_path):
    joint = JointMoments(WIDTHS, PAIRS, LiveRule(rows=10_000), tmp_path, memory=40 * 4 * products.ENTRY_BYTES)
    for nodes in batches(sample(8)):
        joint.add(nodes, POS)
        assert sum(batch.n_entries for batch in joint.pending) < 40


def test_a_lost_file_is_said(tmp_path):
    joint = measured(sample(9), tmp_path)
    state = packed(joint.save())
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(PartsMissing, match="is gone: delete the run"):
        JointMoments(WIDTHS, PAIRS, RULE, tmp_path).restore(unpacked(state))


def test_a_site_without_live_nodes(tmp_path):
    joint = JointMoments({"a": 3, "b": 2}, [("a", "a"), ("a", "b"), ("b", "b")], RULE, tmp_path)
    none = SparseNodes.of_scalars(torch.zeros(6, 3), torch.zeros(6))
    some = SparseNodes.of_scalars(torch.eye(6, 2), torch.zeros(6))
    joint.add({"a": none, "b": some}, 3)
    assert [(tile.first, tile.second) for tile, _ in joint.blocks()] == [("b", "b")]
    assert joint.live["a"].tolist() == []
