"""The differences of two atlases are exactly the changes made to one of them, in blocks of any size."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from featlas.queries.checking import ROWS, graph_difference, statistics_difference
from featlas.queries.schema import EDGES, NODES
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, KeyRange, open_graph
from featlas.queries.streaming import added_hashes, content_hash, edge_blocks, key_ranges, node_blocks

from .atlas_cases import write_graph


@pytest.fixture
def store(tmp_path: Path) -> Iterator[GraphStore]:
    with open_graph(tmp_path / "one.lbug") as opened:
        write_graph(opened)
        yield opened


@pytest.fixture
def other(store: GraphStore, tmp_path: Path) -> Iterator[GraphStore]:
    with open_graph(tmp_path / "other.lbug") as opened:
        write_graph(opened)
        yield opened


@pytest.mark.slow
def test_a_copy_differs_nowhere_and_the_difference_names_each_change(store: GraphStore, other: GraphStore) -> None:
    assert graph_difference(store, other).is_empty()
    edges = store.read_edges("ATTRIBUTES")
    first = edges.row(0, named=True)
    where = "WHERE a.key = $source AND b.key = $target AND e.run = $run AND e.sequence = $sequence"
    given = {name: first[name] for name in ("source", "target", "run", "sequence")}
    other.query(f"MATCH (a:Feature)-[e:ATTRIBUTES]->(b:Feature) {where} SET e.weight = e.weight + 0.5", given, write=True)
    other.query("MATCH (r:Run) WHERE r.key = $run SET r.task = 'changed', r.n_edges = null", {"run": first["run"]}, write=True)
    gone = store.read_edges("INFLUENCES").row(0, named=True)
    text = "MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature) WHERE a.key = $a AND b.key = $b AND e.run = $r DELETE e"
    other.query(text, {"a": gone["source"], "b": gone["target"], "r": gone["run"]}, write=True)
    for size in (10, 250_000):
        found = graph_difference(store, other, size=size)
        assert found.select("type", "source", "target", "property").rows() == [
            ("ATTRIBUTES", first["source"], first["target"], "weight"),
            ("INFLUENCES", gone["source"], gone["target"], ROWS),
            ("Run", first["run"], None, "n_edges"),
            ("Run", first["run"], None, "task"),
        ]
        assert found.select("a", "b").rows()[0] == (str(first["weight"]), str(first["weight"] + 0.5))
        assert found.select("a", "b").rows()[1] == ("1", None)
        assert found.select("b").rows()[3] == ("changed",)
    assert graph_difference(store, other, ignoring=["INFLUENCES", "Run.task", "n_edges"], tolerance=1.0).is_empty()
    assert graph_difference(store, other, ignoring=["INFLUENCES", "Run"], tolerance=0.1).height == 1


def test_a_doubled_edge_is_a_difference(store: GraphStore, other: GraphStore) -> None:
    edge = store.read_edges("ATTRIBUTES").row(3, named=True)
    text = (
        "MATCH (a:Feature) WHERE a.key = $source MATCH (b:Feature) WHERE b.key = $target CREATE (a)-[:ATTRIBUTES {run: $run, sequence: $sequence,"
        " src_pos: $src_pos, dest_pos: $dest_pos, weight: $weight}]->(b)"
    )
    other.query(text, edge, write=True)
    found = graph_difference(store, other)
    assert found.select("type", "source", "property", "a", "b").rows() == [("ATTRIBUTES", edge["source"], ROWS, "1", "2")]


@pytest.mark.slow
def test_blocks_of_any_size_hold_every_row_once(store: GraphStore) -> None:
    for type in EDGES:
        whole = store.read_edges(type)
        for size in (1, 7, 10_000):
            parts = [block for (block,) in edge_blocks(type, store, size=size)]
            joined = pl.concat(parts) if parts else whole.clear()
            assert joined.sort(EDGES[type].order).equals(whole)
    for label in NODES:
        few, many = (pl.concat([block for (block,) in node_blocks(label, store, size=size)] or [pl.DataFrame()]) for size in (3, 10_000))
        assert few.equals(many)


def test_ranges_of_keys_by_hand() -> None:
    counts = pl.DataFrame({"node": ["a", "b", "c", "d", "e"], "n": [2, 2, 9, 9, 1]})
    assert key_ranges(counts, 5) == [KeyRange("a", "b"), KeyRange("c", "c"), KeyRange("d", "d"), KeyRange("e", "e")]
    assert key_ranges(counts.clear(), 5) == []


def test_the_hash_of_rows_knows_no_order_and_adds_up() -> None:
    rows = pl.DataFrame({"key": ["a", "b", "c", None], "value": [0.5, -0.0, None, float("nan")], "n": [1, 2, 3, 4]})
    assert content_hash(rows) == content_hash(rows.reverse()) == content_hash(rows.with_columns(value=pl.Series([0.5, 0.0, None, float("nan")])))
    assert content_hash(rows) == added_hashes(content_hash(rows.head(1)), content_hash(rows.tail(3)))
    assert content_hash(rows) != content_hash(rows.with_columns(n=pl.Series([2, 1, 3, 4])))
    assert content_hash(pl.concat([rows, rows])) != content_hash(rows)


@pytest.mark.slow
def test_differences_of_statistics(tmp_path: Path) -> None:
    rows = pl.DataFrame({
        "run": ["r", "r"], "circuit": ["", ""], "source": ["f", "g"], "target": ["", ""], "metric": ["m", "m"], "baseline": ["zero", "zero"],
        "split": ["found", "found"], "draw": [0, 0], "sequence": ["s", "s"], "task": ["t", "t"], "effect": [0.25, 0.5],
    })  # fmt: skip
    with StatisticsStore(tmp_path / "a") as a, StatisticsStore(tmp_path / "b") as b:
        a.write_effects(rows)
        b.write_effects(rows.with_columns(effect=pl.Series([0.25, 0.5 + 1e-9])))
        found = statistics_difference(a, b)
        assert sorted(found.select("type", "a", "b").rows(), key=str) == [("ablation_effects", "1", None), ("ablation_effects", None, "1")]
        assert all("0.5" in text and "'source': g" in text for text in found["identity"])
        assert statistics_difference(a, b, tolerance=1e-6).is_empty()
        assert statistics_difference(a, b, ignoring=["ablation_effects.effect"]).is_empty()
        assert statistics_difference(a, b, ignoring=["ablation_effects"]).is_empty()
