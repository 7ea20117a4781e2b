"""Copies that hold what both sides have against each other, and what stands in their way."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.ingest.moments import LiveRule
from featlas.ingest.products import Batch, JointMoments, packed, unpacked
from featlas.queries.atlases import Place, copy_atlas
from featlas.queries.checking import graph_difference
from featlas.queries.copying import AtlasesClash, Clashes, CopyDiffers, derive_influences
from featlas.queries.samples import SampleStore
from featlas.queries.schema import EDGES
from featlas.queries.series import SeriesRecord, read_series, write_series
from featlas.queries.statistics import RunRecord, SiteRecord, StatisticsStore
from featlas.queries.store import NotAGraph, ServerCredentials, open_graph

from .atlas_cases import DICTIONARY, MODEL, STATISTICS_RUN, feature, write_atlas
from .servers import Neo4jTestServer

pytestmark = pytest.mark.slow  # each runs whole commands, copies or loads


def test_an_atlas_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    source = write_atlas(tmp_path / "a[1]*", samples=True)
    frames = {"members": pl.DataFrame({"name": ["m"]})}
    write_series(source, SeriesRecord("key", "title", "axis", {}, frames))
    copy_atlas(Place(source), Place(tmp_path / "b[1]*"))
    samples = SampleStore(tmp_path / "b[1]*")
    assert samples.tokens("samples1").height == 6
    assert read_series(tmp_path / "b[1]*").frames["members"].equals(frames["members"])


# -- sequences that both have ---------------------------------------------------------------------------------


def measured_otherwise(atlas: Path) -> Path:
    """Sequence s1 of run one with other weights, one edge less and one more, and what follows from that."""
    first = "MATCH (a:Feature)-[e:ATTRIBUTES]->(b:Feature) WHERE e.run = 'one' AND e.sequence = 's1' "
    with open_graph(atlas) as store:
        store.query(first + "SET e.weight = 7 * e.weight", write=True)
        store.query(first + "AND a.key = $key DELETE e", {"key": feature(1)}, write=True)
        extra = "MATCH (a:Feature), (b:Feature) WHERE a.key = $a AND b.key = $b CREATE (a)-[:ATTRIBUTES {run: 'one', sequence: 's1', src_pos: -1, "
        store.query(extra + "dest_pos: -1, weight: 0.5}]->(b)", {"a": feature(0), "b": feature(8)}, write=True)
        derive_influences(store, "one")
    return atlas


def whole_graph(atlas: Path) -> list[pl.DataFrame]:
    with open_graph(atlas, read_only=True) as store:
        return [store.read_edges(type) for type in EDGES]


def differences(first: Path, second: Path) -> pl.DataFrame:
    with open_graph(first, read_only=True) as a, open_graph(second, read_only=True) as b:
        return graph_difference(a, b)


def test_a_sequence_measured_otherwise_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, target = write_atlas(tmp_path / "a"), measured_otherwise(write_atlas(tmp_path / "b", ("one",)))
    before = whole_graph(target)
    with pytest.raises(AtlasesClash, match=r"1 sequences: run one has 10 edges in sequence s1, and others.*--on-clash keep"):
        copy_atlas(Place(source), Place(target))
    assert all(a.equals(b) for a, b in zip(before, whole_graph(target), strict=True))


def test_a_sequence_measured_otherwise_stays_where_it_is_to_be_kept(tmp_path: Path) -> None:
    source, target = write_atlas(tmp_path / "a"), measured_otherwise(write_atlas(tmp_path / "b", ("one",)))
    expected = measured_otherwise(write_atlas(tmp_path / "expected"))
    for _ in range(2):
        copied = copy_atlas(Place(source), Place(target), clashes=Clashes.KEEP)
        kept = {one.type: one.kept for one in copied.graph if one.kept}
        assert kept == {"ATTRIBUTES": 10, "ON_SEQUENCE": 1}
        assert differences(expected, target).is_empty()


def test_a_sequence_measured_otherwise_is_replaced(tmp_path: Path) -> None:
    source, target = write_atlas(tmp_path / "a"), measured_otherwise(write_atlas(tmp_path / "b", ("one",)))
    copied = copy_atlas(Place(source), Place(target), clashes=Clashes.REPLACE)
    assert {one.type: one.written for one in copied.graph}["ATTRIBUTES"] == 10 + 8
    assert differences(source, target).is_empty()


def test_marks_that_say_different_things_clash(tmp_path: Path) -> None:
    source, target = write_atlas(tmp_path / "a"), write_atlas(tmp_path / "b")
    with open_graph(target) as store:
        store.query("MATCH (r:Run {key: 'one'})-[m:ON_SEQUENCE]->(s:Sequence {key: 's0'}) SET m.metric_clean = 9.0", write=True)
    with pytest.raises(AtlasesClash, match="1 sequences"):
        copy_atlas(Place(source), Place(target))
    copy_atlas(Place(source), Place(target), clashes=Clashes.REPLACE)
    assert differences(source, target).is_empty()


def test_edges_that_the_target_has_twice_are_named_and_replaced(tmp_path: Path) -> None:
    source, target = write_atlas(tmp_path / "a"), write_atlas(tmp_path / "b")
    twice = "MATCH (a:Feature)-[e:{0}]->(b:Feature) WHERE e.run = 'one' AND a.key = $key CREATE (a)-[:{0} {{run: 'one'{1}}}]->(b)"
    with open_graph(target) as store:
        one = ", sequence: e.sequence, src_pos: e.src_pos, dest_pos: e.dest_pos, weight: e.weight"
        store.query(twice.format("ATTRIBUTES", one), {"key": feature(0)}, write=True)
    with pytest.raises(AtlasesClash, match="run one has 10 edges in sequence s0, and 11"):
        copy_atlas(Place(source), Place(target))
    copy_atlas(Place(source), Place(target), clashes=Clashes.REPLACE)
    assert differences(source, target).is_empty()
    with open_graph(target) as store:
        store.query(twice.format("INFLUENCES", ", weight: e.weight"), {"key": feature(0)}, write=True)
    with pytest.raises(CopyDiffers, match=r"INFLUENCES differ.*look at both with `featlas atlas check`$"):
        copy_atlas(Place(source), Place(target), clashes=Clashes.REPLACE)


def test_a_run_that_was_closed_meanwhile_stays_closed(tmp_path: Path) -> None:
    source, target = write_atlas(tmp_path / "a"), write_atlas(tmp_path / "b")
    with open_graph(source) as store:
        store.query("MATCH (r:Run {key: 'one'}) SET r.status = 'running'", write=True)
    copy_atlas(Place(source), Place(target))
    with open_graph(target, read_only=True) as store:
        assert store.query("MATCH (r:Run {key: 'one'}) RETURN r.status AS s")["s"].to_list() == ["done"]


# -- folders --------------------------------------------------------------------------------------------------


def test_a_statistics_run_goes_on_in_the_copy(tmp_path: Path) -> None:
    """What is accumulated in files goes with the state that names it; so do finished shards, whose run is not registered before they are merged."""
    source, target = write_atlas(tmp_path / "a"), tmp_path / "b"
    site = SiteRecord("resid_0", 0, DICTIONARY, 8, 10)
    batches = [Batch(6, 3, {"resid_0": (np.arange(6, dtype=np.int32), np.full(6, i, np.int32), np.ones(6, np.float32))}) for i in range(2)]
    with StatisticsStore(source) as statistics:
        statistics.start_run(RunRecord("half", MODEL, "corpus", "hash", "activation", (site,), 400, {}, "1"))
        moments = JointMoments({"resid_0": 10}, [("resid_0", "resid_0")], LiveRule(), statistics.parts("half"))
        moments.take(batches[0])
        statistics.save_state("half", 2, 6, {"second moments": packed(moments.save())})
        shards, left = statistics.parts("sharded") / "shards", statistics.parts(STATISTICS_RUN)
    for folder in (shards, left):  # a finished run needs none
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text("{}")
    for written in (2, 0):
        files = copy_atlas(Place(source), Place(target)).files
        assert files.filter(pl.col("what") == "unfinished statistics").select("n", "written").rows() == [(2, written)]
    assert sorted(path.name for path in (target / "statistics.parts").iterdir()) == ["half", "sharded"]
    with StatisticsStore(target) as statistics:
        again = JointMoments({"resid_0": 10}, [("resid_0", "resid_0")], LiveRule(), statistics.parts("half"))
        again.restore(unpacked(statistics.load_state("half")["second moments"]))
        again.take(batches[1])
    copy_atlas(Place(source), Place(tmp_path / "one"), runs=["one"])
    assert not (tmp_path / "one" / "statistics.parts").exists()


@pytest.mark.neo4j
def test_a_graph_moves_to_a_server_beside_its_folder(known_neo4j: Neo4jTestServer, tmp_path: Path) -> None:
    """Statistics and samples are where they were: nothing of them is copied; a sequence of the server's own is replaced there too."""
    atlas = write_atlas(tmp_path / "a", samples=True)
    credentials = ServerCredentials.from_environment()
    there = Place(atlas, known_neo4j.uri, credentials)
    copied = copy_atlas(Place(atlas), there)
    assert (copied.statistics, copied.files.height) == ([], 0)
    with open_graph(known_neo4j.uri) as store:
        store.query("MATCH (:Feature)-[e:ATTRIBUTES]->() WHERE e.run = 'one' AND e.sequence = 's1' SET e.weight = 7 * e.weight", write=True)
    with pytest.raises(AtlasesClash, match="1 sequences"):
        copy_atlas(Place(atlas), there)
    copy_atlas(Place(atlas), there, clashes=Clashes.REPLACE)
    with open_graph(known_neo4j.uri) as store, open_graph(atlas, read_only=True) as expected:
        assert graph_difference(expected, store).is_empty()


def test_a_server_s_address_is_looked_at_before_anything_is_made(tmp_path: Path) -> None:
    atlas = write_atlas(tmp_path / "atlas")
    for address in ("bolt://neo4j:hunter2@127.0.0.1:1", "bolt://127.0.0.1:1?password=hunter2"):
        with pytest.raises(NotAGraph) as caught:
            copy_atlas(Place(atlas), Place.of(str(tmp_path / "there"), address))
        assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "there").exists()
