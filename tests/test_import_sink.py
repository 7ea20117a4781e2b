"""Import files written while a run is measured: they hold the graph that a store would, whatever is killed in between."""

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.ingest.closing import close_run
from featlas.queries import import_sink
from featlas.queries.bulk_import import ARGUMENTS, FolderNotEmpty, NoImportFiles, bulk_import, export_import_files
from featlas.queries.import_loading import load_import_files
from featlas.queries.import_sink import ImportSink
from featlas.queries.store import GraphStore, QueryRejected, SequenceCommit, UnknownEndpoint, open_graph

from .test_bulk_import import content, embedded, weird_graph  # noqa: F401 - a fixture

KEYS = [f"m|d|resid_{i % 3}|{i}, \"é\"" for i in range(30)]


def provenance(store: GraphStore, run: str = "r1", n: int = 6) -> None:
    store.merge_nodes("Model", pl.DataFrame({"key": ["m"], "name": ["m"]}))
    store.merge_nodes("Run", pl.DataFrame({"key": [run], "model": ["m"], "status": ["running"], "n_planned": [n]}))
    store.merge_edges("OF_MODEL", pl.DataFrame({"source": [run], "target": ["m"]}))
    store.merge_nodes("Sequence", pl.DataFrame({"key": [f"s{i}" for i in range(n)], "clean": [f'text "{i}"\nof two lines' for i in range(n)]}))
    store.merge_nodes("Feature", pl.DataFrame({"key": KEYS, "site": [f"resid_{i % 3}" for i in range(30)], "kind": ["feature"] * 30}))


def commit(sequence: int, run: str = "r1") -> SequenceCommit:
    """Edges of one sequence: a hub with many, several positions, an infinite weight."""
    rng = np.random.default_rng(sequence)
    n = 40 + sequence
    source = np.where(rng.random(n) < 0.4, 3, rng.integers(0, 10, n))
    edges = pl.DataFrame(
        {
            "source": [KEYS[i] for i in source], "target": [KEYS[i] for i in rng.integers(10, 30, n)], "src_pos": np.arange(n) % 7,
            "dest_pos": np.arange(n) // 7, "weight": rng.standard_normal(n),
        }
    )  # fmt: skip
    edges = edges.unique(["source", "target", "src_pos", "dest_pos"], keep="first", maintain_order=True)
    return SequenceCommit(run, f"s{sequence}", edges, {"metric_clean": 0.5})


def measure(store: GraphStore, batches: list[list[int]], size: int = 25, run: str = "r1") -> int:
    provenance(store, run)
    for batch in batches:
        store.commit_sequences([commit(i, run) for i in batch])
    return close_run(store, run, size)


def everything(store: GraphStore) -> dict[str, pl.DataFrame]:
    return content(store) | {type: store.read_edges(type) for type in ("ON_SEQUENCE", "OF_MODEL", "INFLUENCES", "ATTRIBUTES")}


def assert_same(found: dict[str, pl.DataFrame], expected: dict[str, pl.DataFrame]) -> None:
    for name, rows in expected.items():
        assert found[name].equals(rows), f"{name}:\n{found[name]}\n{rows}"


@pytest.fixture
def direct(tmp_path: Path) -> dict[str, pl.DataFrame]:
    """What an embedded graph holds of the same run."""
    with open_graph(tmp_path / "direct.lbug") as store:
        measure(store, [[0, 1], [2, 3], [4, 5]])
        return everything(store)


def loaded(folder: Path, path: Path) -> dict[str, pl.DataFrame]:
    with open_graph(path) as store:
        load_import_files(store, folder, edges_per_block=50)
        return everything(store)


@pytest.mark.parametrize("size", [25, pytest.param(10**6, marks=pytest.mark.slow)])
def test_the_files_hold_what_a_store_would(tmp_path: Path, direct: dict[str, pl.DataFrame], monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(import_sink, "ROWS_AT_ONCE", 60)  # several groups are dealt
    with ImportSink(tmp_path / "files") as sink:
        n = measure(sink, [[0, 1], [2, 3], [4, 5]], size)
        assert n == direct["INFLUENCES"].height
        assert sink.read_edges("ATTRIBUTES", run="r1", sequence="s2").equals(direct["ATTRIBUTES"].filter(pl.col("sequence") == "s2"))
    assert_same(loaded(tmp_path / "files", tmp_path / "loaded.lbug"), direct)
    assert_same(loaded(tmp_path / "files", tmp_path / "loaded.lbug"), direct)  # twice is once


def test_blocks_are_those_of_a_store(tmp_path: Path) -> None:
    """Every edge once, in order, all of a pair together, a hub in ranges of its targets."""
    with ImportSink(tmp_path / "files") as sink:
        measure(sink, [[0, 1, 2], [3, 4, 5]])
        blocks = list(sink.edge_blocks("r1", 20))
        whole = sink.read_edges("ATTRIBUTES", run="r1")
        assert pl.concat(blocks).sort(whole.columns).equals(whole.sort(whole.columns))
        pairs = [set(block.select("source", "target").rows()) for block in blocks]
        assert len(set().union(*pairs)) == sum(map(len, pairs))
        assert [min(p) for p in pairs] == sorted(min(p) for p in pairs)
        assert max(block.height for block in blocks) <= 40
        assert not list((tmp_path / "files").glob("bins-*"))
        assert list(sink.edge_blocks("none", 20)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["f[1]", "f*", "f?"])
def test_a_folder_may_be_called_like_a_pattern(tmp_path: Path, direct: dict[str, pl.DataFrame], name: str) -> None:
    with ImportSink(tmp_path / name) as sink:
        assert measure(sink, [[0, 1], [2, 3], [4, 5]]) == direct["INFLUENCES"].height
        assert sink.read_edges("ATTRIBUTES", run="r1").equals(direct["ATTRIBUTES"])
    assert_same(loaded(tmp_path / name, tmp_path / "loaded.lbug"), direct)


@pytest.mark.slow
def test_a_run_in_two_goes_and_a_second_run(tmp_path: Path, direct: dict[str, pl.DataFrame]) -> None:
    with ImportSink(tmp_path / "files") as sink:
        measure(sink, [[0, 1]])
    first = (tmp_path / "files" / ARGUMENTS).read_text()
    with ImportSink(tmp_path / "files") as sink:
        assert not (tmp_path / "files" / ARGUMENTS).exists()  # unfinished again
        with pytest.raises(NoImportFiles, match="is not finished"):
            bulk_import(tmp_path / "files", tmp_path / "home")
        assert sink.commit_sequences([commit(0), commit(1)]) == 0
        measure(sink, [[0, 1], [2, 3], [4, 5]])
        close_run(sink, "r1", 1000)  # again: in place of the first
    assert (tmp_path / "files" / ARGUMENTS).read_text() != first
    assert_same(loaded(tmp_path / "files", tmp_path / "loaded.lbug"), direct)
    with ImportSink(tmp_path / "files") as sink:
        measure(sink, [[0, 5]], run="r2")
    both = loaded(tmp_path / "files", tmp_path / "both.lbug")
    assert both["INFLUENCES"].filter(pl.col("run") == "r1").equals(direct["INFLUENCES"])
    assert both["ON_SEQUENCE"]["source"].to_list() == ["r1"] * 6 + ["r2"] * 2
    assert both["Run"]["status"].to_list() == ["done", "running"]


class Killed(BaseException):
    """What ends a run in the middle."""


def stop_at(at: str, sink: ImportSink, patch: pytest.MonkeyPatch) -> None:
    """Let the next part, its mark file, the ledger's commit, the fourth block of INFLUENCES, or the end, fail."""

    def killed(*_: object, **__: object) -> None:
        raise Killed

    write = sink._write

    def fourth_killed(name: str, rows: pl.DataFrame) -> None:
        if len(sink._influences) == 3:
            raise Killed
        write(name, rows)

    if at == "edges":
        (sink.folder / ".edges-ATTRIBUTES-Feature-Feature-0.csv.gz.01234567.part").write_bytes(b"half a")
        patch.setattr(import_sink, "write_part", killed)
    elif at == "mark":
        patch.setattr(import_sink, "write_text", killed)
    elif at == "ledger":
        patch.setattr(sink._ledger, "commit_sequences", killed)
    elif at == "influences":
        patch.setattr(sink, "_write", fourth_killed)
    else:
        patch.setattr(sink, "finish", killed)


def rest_of_the_run(sink: ImportSink, at: str, patch: pytest.MonkeyPatch) -> None:
    committing = at in ("edges", "mark", "ledger")
    if committing:
        stop_at(at, sink, patch)
    sink.commit_sequences([commit(2), commit(3)])
    sink.commit_sequences([commit(4), commit(5)])
    stop_at(at, sink, patch)
    close_run(sink, "r1", 25)
    sink.__exit__(None, None, None)


SLOW = [pytest.param(at, marks=pytest.mark.slow) for at in ("edges", "mark", "influences", "finish")]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["ledger", *SLOW])
def test_a_run_that_stops_anywhere_goes_on_to_the_same_files(
    tmp_path: Path, direct: dict[str, pl.DataFrame], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = tmp_path / "files"
    sink = ImportSink(folder)
    provenance(sink)
    sink.commit_sequences([commit(0), commit(1)])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        rest_of_the_run(sink, at, patch)
    sink.close()
    assert not (folder / ARGUMENTS).exists()
    with ImportSink(folder) as again:
        n_done = again.query("MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) RETURN count(*) AS n")["n"].item()
        assert n_done == (2 if at in ("edges", "mark", "ledger") else 6)
        # other batches than before: what was left of the killed one must not count
        measure(again, [[0, 1], [3], [4, 5, 2]])
    assert_same(loaded(folder, tmp_path / "loaded.lbug"), direct)
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_influences_of_a_closed_run_stay_whatever_comes_after(
    tmp_path: Path, direct: dict[str, pl.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after a run was closed, and again while the same run is closed anew, before the arguments are written."""
    folder = tmp_path / "files"
    sink = ImportSink(folder)
    measure(sink, [[0, 1], [2, 3], [4, 5]])
    sink.close()
    again = ImportSink(folder)
    write, left = again._write, [2]

    def stopping(name: str, rows: pl.DataFrame) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed
        write(name, rows)

    monkeypatch.setattr(again, "_write", stopping)
    with pytest.raises(Killed):
        close_run(again, "r1", 25)
    again.close()
    with ImportSink(folder) as other:
        measure(other, [[0, 5]], run="r2")
    both = loaded(folder, tmp_path / "both.lbug")
    assert both["INFLUENCES"].filter(pl.col("run") == "r1").equals(direct["INFLUENCES"])
    assert both["INFLUENCES"]["run"].unique().sort().to_list() == ["r1", "r2"]


def test_what_a_sink_refuses(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    with pytest.raises(FolderNotEmpty, match="is not empty"):
        ImportSink(tmp_path / "full")
    with pytest.raises(FolderNotEmpty, match="is a file"):
        ImportSink(tmp_path / "full" / "notes.txt")
    with ImportSink(tmp_path / "files") as sink:
        provenance(sink)
        with pytest.raises(QueryRejected, match="their ATTRIBUTES can be asked for when they are loaded"):
            sink.query("MATCH ()-[e:ATTRIBUTES]->() RETURN count(*) AS n")
        nowhere = pl.DataFrame({"source": [KEYS[0]], "target": ["nowhere"], "weight": [1.0]})
        with pytest.raises(UnknownEndpoint, match="nowhere"):
            sink.commit_sequences([SequenceCommit("r1", "s0", nowhere)])
        with pytest.raises(UnknownEndpoint):
            sink.commit_sequences([SequenceCommit("r1", "no such", commit(0).edges)])
        assert sink.commit_sequences([SequenceCommit("r1", "s1", nowhere.clear())]) == 1  # a sequence may have no edges
    arguments = (tmp_path / "files" / ARGUMENTS).read_text()
    assert "ATTRIBUTES" not in arguments


@pytest.mark.slow
def test_any_exported_graph_can_be_loaded(embedded: GraphStore, tmp_path: Path) -> None:  # noqa: F811
    """Awkward texts, infinities, types that join several labels: what is loaded is what was exported, in blocks or at once."""
    whole = export_import_files(embedded, tmp_path / "whole")
    blocks = export_import_files(embedded, tmp_path / "blocks", edges_per_block=3, rows_per_file=11)
    assert (whole.n_nodes, whole.n_edges) == (blocks.n_nodes, blocks.n_edges)
    expected = content(embedded)
    for name in ("whole", "blocks"):
        with open_graph(tmp_path / f"{name}.lbug") as store:
            assert load_import_files(store, tmp_path / name).n_edges == 43
            assert_same(content(store), expected)
    assert weird_graph()[1]["ATTRIBUTES"]["weight"].to_list().count(math.inf) == 4


def test_mark_files_say_whose_a_part_is(tmp_path: Path) -> None:
    with ImportSink(tmp_path / "files") as sink:
        provenance(sink)
        sink.commit_sequences([commit(0), commit(1)])
    (mark,) = (tmp_path / "files" / "marks").glob("*.json")
    said = json.loads(mark.read_text())
    assert (said["run"], said["sequences"], said["rows"]) == ("r1", ["s0", "s1"], commit(0).edges.height + commit(1).edges.height)
    assert (tmp_path / "files" / said["file"]).exists()
