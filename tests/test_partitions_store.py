"""Parcellations in the stores: kept and read back, the names that people give blocks, and graphs that knew no circuits of blocks."""

from pathlib import Path

import polars as pl
import pytest
from featlas.queries.partitions import (
    LEVELS,
    MEMBERS,
    SCORES,
    SITES,
    NoSuchBlock,
    NoSuchParcellation,
    ParcellationRows,
    clear_label,
    find_parcellation,
    lost_labels,
    read_rows,
    set_label,
    stored_parcellations,
    user_labels,
    write_rows,
)
from featlas.queries.statistics import StatisticsStore, migrations
from featlas.queries.store import open_graph
from polars.testing import assert_frame_equal


def rows(key: str = "abc", *, blocks: tuple[int, ...] = (0, 0, 1, 0, 0), method: str = "ward") -> ParcellationRows:
    """resid_1 with features 0, 2, 3 in two blocks and resid_0 with features 1, 4 in one; resid_1 stands first, as in the model's order."""
    site = ["resid_1"] * 3 + ["resid_0"] * 2
    return ParcellationRows(
        key,
        {"samples": "s", "model": "m", "method": method, "basis": "activation", "settings": '{"seed": 0}'},
        pl.DataFrame({"site": ["resid_1", "resid_0"], "dictionary": "d", "d_sae": [5, 6], "chosen": [0, 0], "notes": "{}"}, schema=dict(SITES)),
        pl.DataFrame({"site": ["resid_0", "resid_1"], "level": [0, 0], "rule": "given", "n_blocks": [1, 2]}, schema=dict(LEVELS)),
        pl.DataFrame({"site": site, "level": 0, "feature": [0, 2, 3, 1, 4], "block": blocks}, schema=dict(MEMBERS)).sort("site", "feature"),
        pl.DataFrame({"site": "resid_1", "level": [0, 1], "n_blocks": [2, 1], "largest": [2, 3], "description_length": [None, 4.5],
                      "held_out": None, "stability": None, "stability_low": None, "stability_high": None}, schema=dict(SCORES)),
    )


def test_a_parcellation_is_read_as_it_was_written_and_writing_twice_is_writing_once(tmp_path: Path) -> None:
    given = rows()
    with StatisticsStore(tmp_path) as store:
        write_rows(store, rows(blocks=(1, 0, 0, 0, 0)))
        write_rows(store, given)
        write_rows(store, rows("other", method="leiden"))
        found = read_rows(store, "abc")
        assert found.record == given.record
        for name in ("sites", "levels", "members", "scores"):
            assert_frame_equal(getattr(found, name), getattr(given, name))
        listed = stored_parcellations(store)
        assert set(listed.select("parcellation", "method", "n_sites", "n_blocks").rows()) == {("abc", "ward", 2, 3), ("other", "leiden", 2, 3)}
        assert stored_parcellations(store, "another model").is_empty()


def test_nothing_of_a_parcellation_is_written_where_a_part_of_it_cannot_be(tmp_path: Path) -> None:
    good = rows()
    with StatisticsStore(tmp_path) as store:
        write_rows(store, good)
        broken = rows(blocks=(1, 0, 0, 0, 0))
        bad = ParcellationRows("abc", good.record, good.sites, good.levels, broken.members, good.scores.with_columns(largest=None))
        with pytest.raises(Exception, match="NOT NULL"):
            write_rows(store, bad)
        assert_frame_equal(read_rows(store, "abc").members, good.members)


def test_a_parcellation_is_found_by_the_beginning_of_its_key(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path) as store:
        with pytest.raises(NoSuchParcellation, match="featlas analyze rois"):
            find_parcellation(store)
        for key in ("abc1", "abd2", "ab"):
            write_rows(store, rows(key))
        assert find_parcellation(store, "abc") == "abc1"
        assert find_parcellation(store, "ab") == "ab"
        assert find_parcellation(store) == "ab"
        with pytest.raises(NoSuchParcellation, match=r"'a' is not unique .* abc1 \(ward of activations, 3 blocks\)"):
            find_parcellation(store, "a")
        with pytest.raises(NoSuchParcellation, match="no parcellation 'z'"):
            find_parcellation(store, "z")
        with pytest.raises(NoSuchParcellation, match="no parcellation of another"):
            find_parcellation(store, model="another")
        with pytest.raises(NoSuchParcellation, match="no parcellation 'abc'"):
            read_rows(store, "abc")


def test_a_name_stays_with_its_features_when_the_parcellation_is_found_again(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path) as store:
        write_rows(store, rows())
        set_label(store, "abc", "resid_1", 0, 0, "nouns")
        set_label(store, "abc", "resid_1", 0, 1, "'); DROP TABLE block_labels; --")
        set_label(store, "abc", "resid_1", 0, 1, "verbs")
        assert user_labels(store, "abc").rows() == [("resid_1", 0, 0, "nouns"), ("resid_1", 0, 1, "verbs")]
        write_rows(store, rows(blocks=(1, 1, 0, 0, 0)))  # the same sets, numbered the other way round
        assert user_labels(store, "abc").rows() == [("resid_1", 0, 0, "verbs"), ("resid_1", 0, 1, "nouns")]
        write_rows(store, rows(blocks=(0, 1, 1, 0, 0)))  # other sets
        assert user_labels(store, "abc").is_empty()
        assert set(lost_labels(store, "abc")["label"]) == {"nouns", "verbs"}
        write_rows(store, rows())
        clear_label(store, "abc", "resid_1", 0, 0)
        assert user_labels(store, "abc").rows() == [("resid_1", 0, 1, "verbs")]
        assert user_labels(store, "other").is_empty()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (("resid_9", 0, 0), "no site 'resid_9': its sites are resid_0, resid_1"), (("resid_1", 4, 0), "levels 0 to 0 .* not 4"),
        (("resid_1", 0, 2), "blocks 0 to 1 at level 0 .* not 2"),
    ],
)
def test_only_blocks_that_there_are_can_be_named(tmp_path: Path, block: tuple[str, int, int], message: str) -> None:
    with StatisticsStore(tmp_path) as store:
        write_rows(store, rows())
        with pytest.raises(NoSuchBlock, match=message):
            set_label(store, "abc", *block, "verbs")


def test_a_store_of_an_earlier_featlas_gets_room_for_parcellations(tmp_path: Path) -> None:
    StatisticsStore(tmp_path, steps=migrations()[:4]).close()
    with StatisticsStore(tmp_path, read_only=True) as store:
        assert stored_parcellations(store).is_empty()


@pytest.mark.slow
@pytest.mark.parametrize("read_only", [False, True])
def test_an_earlier_graph_learns_of_circuits_of_blocks(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "graph.lbug"
    with open_graph(path) as store:
        for text in (
            "DROP TABLE IN_CIRCUIT", "CREATE REL TABLE IN_CIRCUIT(FROM Feature TO Circuit, role STRING)", "DROP TABLE CIRCUIT_EDGE",
            "CREATE REL TABLE CIRCUIT_EDGE(FROM Feature TO Feature, circuit STRING, weight DOUBLE)", "ALTER TABLE Block DROP parcellation",
            "ALTER TABLE DRIVES DROP abs_sum",
            "CREATE (:Feature {key: 'f'})", "CREATE (:Circuit {key: 'c'})", "CREATE (:Block {key: 'b', size: 3})",
            "MATCH (f:Feature) MATCH (c:Circuit) CREATE (f)-[:IN_CIRCUIT {role: 'input'}]->(c)",
        ):  # fmt: skip
            store.query(text, write=True)
    with open_graph(path, read_only=read_only) as store:
        assert store.read_edges("IN_CIRCUIT").select("source", "target", "role").rows() == [("f", "c", "input")]
        assert store.query("MATCH (b:Block) RETURN b.key AS key, b.size AS size, b.parcellation AS of").rows() == [("b", 3, None)]
    with open_graph(path) as store:
        store.merge_edges("IN_CIRCUIT", pl.DataFrame({"source": ["b", "f"], "target": ["c", "c"], "role": ["output", "input"]}))
        store.merge_edges("CIRCUIT_EDGE", pl.DataFrame({"source": ["b", "f"], "target": ["b", "f"], "circuit": "c", "weight": [1.0, 2.0]}))
        assert store.read_edges("IN_CIRCUIT").select("source", "role").rows() == [("b", "output"), ("f", "input")]
        assert store.read_edges("CIRCUIT_EDGE").select("source", "target", "weight").rows() == [("b", "b", 1.0), ("f", "f", 2.0)]
