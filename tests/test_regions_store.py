"""Regions in the stores: parcellations kept whole, blocks with members and nesting in the graph, what they drive, circuits of them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from featlas.analysis.circuits import NotRestored, read_circuit
from featlas.analysis.parcellation import NotAPartition, Parcellation
from featlas.analysis.regions import Description, describe
from featlas.analysis.regions_store import (
    drives_of_sequences,
    label_block,
    read_parcellation,
    unit_blocks,
    write_drives,
    write_parcellation,
    write_region_circuit,
    write_regions,
)
from featlas.model.units import NotUnits
from featlas.queries.blocks import blocks_of, drives_of, members_of
from featlas.queries.partitions import stored_parcellations, user_labels
from featlas.queries.schema import block_key, feature_key, partition_key
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import GraphStore, ServerCredentials, UnknownEndpoint, open_graph
from featlas.region_verdict import RegionTests, sweep_subject
from featlas.regions import at_level

from .region_cases import MODEL, SEQUENCES, TOKENS, random_weights, site_partition, small_parcellation, small_samples, small_units
from .servers import Neo4jTestServer


@pytest.fixture(params=["embedded", pytest.param("server", marks=pytest.mark.neo4j)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GraphStore]:
    target, credentials = str(tmp_path / "graph.lbug"), None
    if request.param == "server":
        server: Neo4jTestServer = request.getfixturevalue("clean_neo4j")
        target, credentials = server.uri, ServerCredentials(server.username, server.password)
    with open_graph(target, credentials=credentials) as opened:
        opened.merge_nodes("Run", pl.DataFrame({"key": ["r1"]}))
        yield opened


def small_description(parcellation: Parcellation) -> Description:
    return describe(parcellation, small_samples, SEQUENCES, TOKENS)


def contents(store: GraphStore) -> list[list[tuple[object, ...]]]:
    """Everything that regions consist of in the graph."""
    labels = ("Partition", "Block", "Feature", "Circuit")
    nodes = [store.query(f"MATCH (n:{label}) RETURN properties(n) AS n ORDER BY n.key").rows() for label in labels]
    return [*nodes, *(store.read_edges(type).rows() for type in ("MEMBER_OF", "PART_OF", "DRIVES", "IN_CIRCUIT", "CIRCUIT_EDGE"))]


# DuckDB


def test_a_parcellation_comes_back_whole(tmp_path: Path) -> None:
    given = small_parcellation()
    with StatisticsStore(tmp_path) as statistics:
        write_parcellation(statistics, given)
        write_parcellation(statistics, small_parcellation("p2", method="leiden"))
        found = read_parcellation(statistics, "p1")
        assert set(stored_parcellations(statistics)["parcellation"]) == {"p1", "p2"}
        assert stored_parcellations(statistics).filter(pl.col("parcellation") == "p1")["n_blocks"].item() == 5
    for name in ("key", "samples", "model", "method", "basis"):
        assert getattr(found, name) == getattr(given, name)
    assert found.settings == {"seed": 3, "n": 2}
    assert list(found.sites) == list(given.sites)
    for name, own in given.sites.items():
        other = found.sites[name]
        assert (other.dictionary, other.d_sae, other.chosen, other.notes) == (own.dictionary, own.d_sae, own.chosen, {**own.notes})
        assert np.array_equal(other.features, own.features)
        assert [level.rule for level in other.levels] == [level.rule for level in own.levels]
        for level in (0, 1):
            assert np.array_equal(other.labels_of(level), own.labels_of(level))
        assert other.scores.equals(own.scores)


def test_a_site_whose_features_are_all_dead_is_kept(tmp_path: Path) -> None:
    whole = small_parcellation()
    given = replace(whole, sites={**whole.sites, "resid_2": site_partition("resid_2", [], [], [])})
    with StatisticsStore(tmp_path) as statistics:
        write_parcellation(statistics, given)
        assert np.array_equal(read_parcellation(statistics).sites["resid_2"].labels_of(), np.full(6, -1))
    with open_graph(tmp_path) as store:
        assert write_regions(store, given).n_blocks == 3 + 2 + 2 + 3 + 2 + 1 + 2
        assert unit_blocks(given, small_units(given)).filter(pl.col("site") == "resid_2")["kind"].to_list() == ["dead", "error"]


# Blocks


def test_blocks_members_and_nesting(store: GraphStore) -> None:
    given = small_parcellation()
    written = write_regions(store, given)
    assert (written.n_partitions, written.n_blocks, written.n_members, written.replaced) == (2, (3 + 2 + 2) + (3 + 2 + 1), 14, False)
    partition = store.query("MATCH (p:Partition) RETURN p.key, p.level, p.n_blocks, p.run, p.settings ORDER BY p.key")
    assert partition.rows() == [
        (partition_key("p1", f"resid_{i}"), i, n, "samples1", '{"n": 2, "seed": 3}') for i, n in ((0, 3), (1, 2))
    ]
    blocks = blocks_of(store, "p1")
    for name, own in given.sites.items():
        for level in (0, 1):
            of_level = blocks.filter((pl.col("site") == name) & (pl.col("level") == level)).sort("index")
            assert of_level["size"].to_list() == np.bincount(own.levels[level].labels).tolist()
            assert set(of_level["chosen"]) == {level == own.chosen}
            assert set(of_level["kind"]) == {"roi"}
    assert blocks.filter(pl.col("kind") == "dead").select("key", "size").rows() == [(block_key("p1", "resid_0", "dead"), 1)]
    members = dict(members_of(store, "p1").rows())
    for name, own in given.sites.items():
        for feature, block in enumerate(own.labels_of(0)):
            target = block_key("p1", name, "dead") if block < 0 else block_key("p1", name, "roi", 0, int(block))
            assert members[feature_key(MODEL, own.dictionary, name, feature)] == target
        assert members[feature_key(MODEL, own.dictionary, name, "error")] == block_key("p1", name, "error")
    parts = {(a, b) for a, b in store.read_edges("PART_OF").rows()}
    assert (block_key("p1", "resid_0", "roi", 0, 2), block_key("p1", "resid_0", "roi", 1, 1)) in parts
    assert (block_key("p1", "resid_1", "roi", 1, 0), partition_key("p1", "resid_1")) in parts
    assert (block_key("p1", "resid_0", "dead"), partition_key("p1", "resid_0")) in parts
    assert len(parts) == 13  # every block is part of one thing
    features = store.query("MATCH (f:Feature) RETURN f.site AS site, f.kind AS kind, f.layer AS layer, count(*) AS n ORDER BY site, kind")
    assert features.rows() == [("resid_0", "error", 0, 1), ("resid_0", "feature", 0, 6), ("resid_1", "error", 1, 1), ("resid_1", "feature", 1, 6)]


def test_writing_twice_is_writing_once_and_labels_of_features_stay(store: GraphStore) -> None:
    given = small_parcellation()
    key = feature_key(MODEL, "d0", "resid_0", 1)
    store.merge_nodes("Feature", pl.DataFrame({"key": [key], "label": ["verbs"]}))
    description, units = small_description(given), small_units(given)
    for _ in range(2):
        written = write_regions(store, given, description)
        write_drives(store, "r1", given, units, random_weights(units))
        write_region_circuit(store, "r1", given, units, [(0, units.output)], random_weights(units)[0])
        assert not written.replaced
        first = contents(store) if _ == 0 else first  # noqa: F821
    assert contents(store) == first
    assert store.query("MATCH (f:Feature) WHERE f.key = $key RETURN f.label AS label", {"key": key})["label"].item() == "verbs"


def test_a_parcellation_found_again_with_other_blocks_takes_the_place_of_the_one_before(store: GraphStore) -> None:
    before, after = small_parcellation(), small_parcellation(fine=(0, 1, 1, 0, 0))
    units = small_units(before)
    write_regions(store, before)
    write_regions(store, small_parcellation("other"))
    write_drives(store, "r1", before, units, random_weights(units))
    circuit = write_region_circuit(store, "r1", before, units, [(0, units.output)], random_weights(units)[0])
    store.merge_nodes("Score", pl.DataFrame({"key": ["x"]}))
    store.merge_edges("SCORED", pl.DataFrame({"source": [circuit], "target": ["x"]}))
    assert write_regions(store, after).replaced
    blocks = blocks_of(store, "p1")
    assert blocks.filter((pl.col("site") == "resid_0") & (pl.col("level") == 0)).sort("index")["size"].to_list() == [3, 2]
    assert len(members_of(store, "p1")) == 14
    assert drives_of(store, "p1").is_empty()
    assert store.query("MATCH (c:Circuit) RETURN count(*) AS n")["n"].item() == 0
    assert store.query("MATCH (c:Score) RETURN count(*) AS n")["n"].item() == 0
    assert blocks_of(store, "other").height == 13


def test_levels_that_are_not_nested_are_refused(store: GraphStore) -> None:
    given = small_parcellation()
    crossed = site_partition("resid_0", [0, 1, 2, 4, 5], [0, 0, 1, 2, 1], [0, 1, 0, 1, 0])
    with pytest.raises(NotAPartition, match="level 1 of resid_0 is no coarsening of level 0"):
        write_regions(store, replace(given, sites={"resid_0": crossed}))
    assert store.query("MATCH (b:Block) RETURN count(*) AS n")["n"].item() == 0


def test_blocks_say_what_they_are(store: GraphStore, tmp_path: Path) -> None:
    given = small_parcellation()
    description = small_description(given)
    with StatisticsStore(tmp_path) as statistics:
        write_parcellation(statistics, given)
        write_regions(store, given, description.with_labels(user_labels(statistics, description.parcellation)))
        key = block_key("p1", "resid_0", "roi", 0, 1)
        read = lambda: store.query("MATCH (b:Block) WHERE b.key = $key RETURN properties(b) AS b", {"key": key})["b"].item()
        block = json.loads(read())
        known = description.blocks.filter((pl.col("site") == "resid_0") & (pl.col("level") == 0) & (pl.col("block") == 1)).row(0, named=True)
        for name in ("mean_correlation", "mean_correlation_outside", "frequency", "member_frequency", "mean_activation", "task_share"):
            assert block[name] == pytest.approx(known[name])
        assert block["task"] == known["task"]
        assert block["label"] == block["automatic_label"] == known["automatic_label"]
        assert json.loads(block["top_features"]) == [2, 5] or json.loads(block["top_features"]) == [5, 2]
        assert all("【" in text for text in json.loads(block["contexts"]))
        label_block(statistics, store, "p1", "resid_0", 0, 1, "names'; MATCH (n) DETACH DELETE n; //")
        assert json.loads(read())["label"].startswith("names'")
        write_regions(store, given, description.with_labels(user_labels(statistics, description.parcellation)))
        assert json.loads(read())["label"].startswith("names'")
        assert json.loads(read())["automatic_label"] == known["automatic_label"]
        label_block(statistics, store, "p1", "resid_0", 0, 1, None)
        assert json.loads(read())["label"] == known["automatic_label"]
        label_block(statistics, None, "p1", "resid_0", 0, 1, "only kept")
        assert description.with_labels(user_labels(statistics, description.parcellation)).blocks["label"].drop_nulls().to_list() == ["only kept"]


def test_blocks_of_heads_are_heads(store: GraphStore) -> None:
    write_regions(store, small_parcellation(method="heads"))
    assert set(blocks_of(store, "p1")["kind"]) == {"head", "dead", "error"}


# Drives


@pytest.mark.parametrize("level", [None, 0, 1])
def test_what_blocks_drive_is_the_mean_over_sequences(store: GraphStore, level: int | None) -> None:
    given = small_parcellation()
    units = small_units(given, level)
    weights = random_weights(units)
    write_regions(store, given)
    n = write_drives(store, "r1", given, units, weights, level=level)
    blocks = unit_blocks(given, units, level)
    found = {(row["source"], row["target"]): row for row in drives_of(store, "p1", "r1").to_dicts()}
    sizes = units.sizes.tolist()
    expected = 0
    for u in range(len(units) + 1):
        for v in range(len(units) + 1):
            values = weights[:, u, v]
            if not values.any():
                assert (blocks["key"][u], blocks["key"][v]) not in found
                continue
            row = found[blocks["key"][u], blocks["key"][v]]
            assert row["weight_sum"] == pytest.approx(values.sum() / 3)
            assert row["weight_mean"] == pytest.approx(values.sum() / 3 / (sizes[u] * sizes[v]))
            assert row["abs_sum"] == pytest.approx(sum(abs(x) for x in values) / 3)
            assert row["n"] == sum(x != 0 for x in values)
            expected += 1
    assert n == len(found) == expected > 10
    kinds = store.query("MATCH (a:Block)-[d:DRIVES]->(b:Block) WHERE b.kind = 'output' RETURN DISTINCT a.site AS site").rows()
    assert kinds == [("resid_2",)]
    whole = blocks_of(store, "p1").filter(pl.col("site") == "resid_2")
    assert set(whole.select("kind", "size").rows()) == {("whole", 6), ("error", 1)}


def test_units_and_their_blocks_are_the_same_nodes() -> None:
    given = small_parcellation()
    for level in (None, 0, 1):
        units = small_units(given, level)
        blocks = unit_blocks(given, units, level, output="logit_diff")
        assert blocks["size"].to_list() == units.sizes.tolist()
        assert blocks["label"][-1] == "logit_diff"
        for unit, (site, kind, index) in enumerate(blocks.select("site", "kind", "index").rows()):
            if kind == "roi":
                assert units.names[unit] == f"{site}/block {index}"
            elif kind in ("dead", "error"):
                assert units.names[unit] == f"{site}/{kind}"
    with pytest.raises(NotUnits, match="not the blocks of parcellation p1 at that level"):
        unit_blocks(given, small_units(given, 0), 1)


def test_drives_are_replaced_run_by_run_and_need_their_blocks(store: GraphStore) -> None:
    given = small_parcellation()
    units = small_units(given)
    weights = random_weights(units)
    with pytest.raises(UnknownEndpoint, match="Write the nodes first"):
        write_drives(store, "r1", given, units, weights)
    write_regions(store, given)
    write_drives(store, "r1", given, units, weights)
    write_drives(store, "r2", given, units, weights)
    fewer = weights * (np.arange(len(units) + 1) > 2)[:, None]
    n = write_drives(store, "r1", given, units, drives_of_sequences(units, fewer))
    assert len(drives_of(store, "p1", "r1")) == n < len(drives_of(store, "p1", "r2"))
    ends = lambda run: set(drives_of(store, "p1", run).select("source", "target").rows())
    chosen, coarse = ends("r2"), small_units(given, 1)
    m = write_drives(store, "r2", given, coarse, random_weights(coarse), level=1)
    shared = set(unit_blocks(given, coarse, 1)["key"])  # resid_1's chosen level is the coarse one, and some blocks stand at all levels
    kept = {edge for edge in chosen if not set(edge) <= shared}
    assert kept < ends("r2")
    assert len(ends("r2")) == len(kept) + m


# Circuits


def test_a_circuit_of_blocks(store: GraphStore) -> None:
    given = small_parcellation()
    units = small_units(given)
    write_regions(store, given)
    start, middle, end = 0, units.at(units.graph.sites[1])[0], units.at(units.graph.sites[2])[0]
    edges = [(start, middle), (middle, end), (end, units.output)]
    weights = np.zeros((len(units) + 1, len(units) + 1))
    for i, (u, v) in enumerate(edges):
        weights[u, v] = (-1) ** i * (i + 1)
    key = write_region_circuit(store, "r1", given, units, edges, weights, task="ioi")
    assert write_region_circuit(store, "r1", given, units, np.array(edges), weights) == key
    circuit = store.query("MATCH (c:Circuit)-[:OF_RUN]->(r:Run) RETURN c.key, c.n_nodes, c.n_edges, c.average_degree, c.density, r.key").rows()
    assert circuit == [(key, 4, 3, 1.5, 0.5, "r1")]
    blocks = unit_blocks(given, units)["key"]
    members = store.query("MATCH (b:Block)-[i:IN_CIRCUIT]->(c:Circuit) RETURN b.key AS block, i.role AS role")
    assert dict(members.rows()) == {blocks[start]: "input", blocks[middle]: "inner", blocks[end]: "inner", blocks[units.output]: "output"}
    links = store.read_edges("CIRCUIT_EDGE").select("source", "target", "weight", "strength").rows()
    assert set(links) == {(blocks[u], blocks[v], weights[u, v], abs(weights[u, v])) for u, v in edges}
    with pytest.raises(NotRestored, match="blocks of parcellation p1"):
        read_circuit(store, key)


def test_values_of_other_levels_and_rankings_are_kept_apart() -> None:
    given, study = small_parcellation(), SimpleNamespace(run=SimpleNamespace(key="r1"))
    verdict = lambda mean: SimpleNamespace(study=study, options=RegionTests(per_member=mean))
    coarse = at_level(given, 1)
    subjects = [sweep_subject(verdict(mean), own) for own in (given, coarse) for mean in (False, True)]
    assert len(set(subjects)) == 4
    assert subjects[0] == sweep_subject(verdict(False), at_level(given, None)) == "r1:p1@0,1"


def test_a_circuit_of_blocks_has_the_strengths_it_was_cut_by_and_one_key_whatever_the_rounding(store: GraphStore) -> None:
    given = small_parcellation()
    units = small_units(given)
    write_regions(store, given)
    edges = [(0, units.at(units.graph.sites[1])[0]), (units.at(units.graph.sites[1])[0], units.output)]
    weights = np.zeros((len(units) + 1, len(units) + 1))
    strengths = weights.copy()
    for i, end in enumerate(edges):
        weights[end], strengths[end] = -0.5 * i, 2.0 + i  # signs that change from sequence to sequence cancel in the mean
    write = lambda values, baseline: write_region_circuit(
        store, "r1", given, units, edges, values, strengths=strengths, settings={"baseline": baseline}
    )
    key = write(weights, "zero")
    assert write(weights * (1 + 1e-9), "zero") == key
    assert write(weights, "counterfactual") != key
    links = store.read_edges("CIRCUIT_EDGE").filter(pl.col("circuit") == key)
    assert sorted(links["strength"].to_list()) == [2.0, 3.0]
    assert sorted(links["weight"].to_list()) == pytest.approx([-0.5, 0.0], rel=1e-6)
    row = store.query("MATCH (c:Circuit) WHERE c.key = $key RETURN c.by AS how, c.settings AS settings", {"key": key})
    assert row["how"].item() == "abs_sum"
    assert json.loads(row["settings"].item())["baseline"] == "zero"
