"""What the graph says of features is held against the rows of the statistics that it was copied from."""

import json
import os
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from featlas.ingest.statistics import shard_folder as shards_of_statistics
from featlas.queries import compaction
from featlas.queries.atlases import abandoned
from featlas.queries.contents import RUNS, atlas_contents, going_on, last_runs, unfinished_here
from featlas.queries.integrity import SHARDS, Repair, Severity, check_atlas, leftovers, unmarked_edges
from featlas.queries.pruning import delete_unused, unused
from featlas.queries.repairing import repair_atlas
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import SequenceCommit, StoreFailed, open_graph

from .atlas_cases import STATISTICS_RUN, edges_of, write_atlas

HOUR_S = 3600
Run = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_rows_that_the_statistics_lost_are_missed(tmp_path: Path) -> None:
    atlas = write_atlas(tmp_path / "atlas")
    with open_graph(atlas) as store, StatisticsStore(atlas) as statistics:
        named = store.query("MATCH (f:Feature) WHERE f.statistics_run IS NOT NULL RETURN f.key AS key ORDER BY key")["key"]
        assert not [one for one in check_atlas(store, statistics, atlas, fast=True) if "has no row" in one.what]
        statistics._run("DELETE FROM feature_statistics WHERE key = ?", [named[0]])
        found = [one for one in check_atlas(store, statistics, atlas, fast=True) if "has no row" in one.what]
        assert [(one.severity, one.n, one.repair) for one in found] == [(Severity.ERROR, 1, None)]
        assert named[0] in found[0].examples[0]


@pytest.mark.slow
def test_aggregated_edges_outlive_measured_ones_that_are_missing(tmp_path: Path) -> None:
    """Which edge it was is known from them alone."""
    atlas = write_atlas(tmp_path / "atlas")
    with open_graph(atlas) as store, StatisticsStore(atlas) as statistics:
        store.query("MATCH (:Feature)-[e:ATTRIBUTES]->(:Feature) WHERE e.sequence = 's0' DELETE e", write=True)
        before = store.read_edges("INFLUENCES")
        found = check_atlas(store, statistics, atlas)
        assert any(one.repair is Repair.INFLUENCES for one in found)
        repair_atlas(store, statistics, atlas, found)
        assert store.read_edges("INFLUENCES", run="one").equals(before.filter(pl.col("run") == "one"))


@pytest.mark.slow
def test_a_text_that_edges_or_a_circuit_name_is_in_use_though_its_mark_is_lost(tmp_path: Path) -> None:
    with open_graph(write_atlas(tmp_path / "atlas")) as store:
        store.query("MATCH (:Run)-[m:ON_SEQUENCE]->(:Sequence) DELETE m", write=True)
        assert unused(store, "Sequence").is_empty()
        store.query("MATCH (:Feature)-[e:ATTRIBUTES]->(:Feature) DELETE e", write=True)
        store.query("MATCH (c:Circuit {key: 'circuit-one'}) SET c.sequence = 's1'", write=True)
        assert unused(store, "Sequence").to_list() == ["s0", "s2", "s3"]
        assert delete_unused(store, ["Sequence"]) == {"Sequence": 3}
        assert store.query("MATCH (s:Sequence) RETURN s.key AS key")["key"].to_list() == ["s1"]


@pytest.mark.slow
def test_edges_without_their_mark_go_so_that_the_run_can_go_on(tmp_path: Path) -> None:
    with open_graph(write_atlas(tmp_path / "atlas")) as store:
        store.query("MATCH (r:Run {key: 'one'})-[m:ON_SEQUENCE]->(:Sequence {key: 's1'}) DELETE m", write=True)
        found = check_atlas(store)
        assert {one.repair for one in found if one.severity is Severity.ERROR} == {Repair.UNMARKED, Repair.RUN_COUNTS}  # no INFLUENCES are promised
        assert repair_atlas(store, None, None, found)[Repair.UNMARKED] == 10
        assert store.read_edges("ATTRIBUTES", run="one")["sequence"].unique().sort().to_list() == ["s0", "s2"]
        assert store.read_edges("ATTRIBUTES", run="two").height == 8
        assert [one.what for one in check_atlas(store) if one.severity is not Severity.NOTE] == ["runs that are not finished"]
        assert store.query("MATCH (s:Sequence {key: 's1'}) RETURN s.clean AS text")["text"].to_list() in ([], ["clean s1\n🙂"])


@pytest.mark.slow
def test_what_cannot_be_read_is_a_finding_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    class Torn(StatisticsStore):
        def query(self, sql: str, parameters: object = None) -> pl.DataFrame:
            if " runs" in sql or '"runs"' in sql or "feature_labels" in sql:
                raise OSError("Could not read enough bytes")
            return super().query(sql, parameters)

    atlas = write_atlas(tmp_path / "atlas", samples=True)
    next((atlas / "samples").glob("*/tokens.parquet")).unlink()
    with open_graph(atlas) as store, Torn(atlas) as statistics:
        store.query("MATCH (f:Feature) SET f.mean_activation = 7.0", write=True)
        found = check_atlas(store, statistics, atlas, fast=True)
    assert sorted(one.what for one in found) == [
        "runs of samples whose files are not what they should be", "table feature_labels cannot be read", "table runs cannot be read",
    ]  # fmt: skip
    assert any("tokens.parquet is missing" in one.examples[0] for one in found), found


@pytest.mark.slow
def test_a_graph_that_is_cut_off_may_be_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_atlas(tmp_path / "atlas") / "graph.lbug"
    with file.open("r+b") as cut:
        cut.truncate(file.stat().st_size // 8192 * 4096)
    monkeypatch.setattr("featlas.queries.embedded.READ_ONLY_PATIENCE_S", 0.1)
    with pytest.raises(StoreFailed, match="or the file is damaged: put a copy in its place"):
        open_graph(file.parent, read_only=True)


def put_old(*files: Path) -> None:
    """Files, with the folders above them, that were written two hours ago."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("kept", encoding="utf-8")
    at = time.time() - 2 * HOUR_S
    for path in {one for file in files for one in (file, *list(file.parents)[:4])}:
        os.utime(path, (at, at))


@pytest.mark.slow
def test_only_what_featlas_itself_names_counts_as_left_by_a_killed_process(tmp_path: Path) -> None:
    """Hidden folders of an atlas' user stay, wherever they are."""
    atlas, gone = write_atlas(tmp_path / "a" / "b" / "c" / "atlas"), 2**22 + 1
    work = compaction._work(atlas / "graph.lbug")
    assert list(abandoned(atlas)) == [work]  # the two modules agree on the name
    work.rmdir()
    own = [".git/objects/x", ".venv/bin/x", ".ssh/id", ".cache.0123456789ab/x", "samples/.git/x", "series/.tmp/x", f".compacting-notes-{gone}/x"]
    left = ["samples/.samples1.0123456789ab/x", "dictionaries/.d.ba9876543210/x", f".compacting-graph-{gone}/x", f".compacting-statistics-{gone}/x"]
    at_work = f".compacting-graph-{os.getpid()}/x"
    put_old(*(atlas / name for name in (*own, *left, at_work)))
    with open_graph(atlas) as store, StatisticsStore(atlas) as statistics:
        found = check_atlas(store, statistics, atlas)
        assert [(one.what, one.n) for one in found] == [("leftovers of processes that were killed (or are at work now)", 5)]
        assert repair_atlas(store, statistics, atlas, found) == {Repair.LEFTOVERS: 4}
    assert all((atlas / name).exists() for name in (*own, at_work))
    assert not any((atlas / name).parent.exists() for name in left)


@pytest.mark.slow
def test_shards_stay_until_their_run_is_known_to_be_done(tmp_path: Path) -> None:
    """A batch system's jobs measure shards without opening the statistics, which do not know the run before it is merged."""
    atlas = write_atlas(tmp_path / "a" / "b" / "c" / "atlas")
    parts = atlas / "statistics.parts"
    shard, merged, forgotten = parts / "unmerged" / "shards" / "1" / "state.npz", parts / STATISTICS_RUN / "shards" / "1" / "x", parts / "gone" / "x"
    put_old(shard, merged, forgotten)
    assert [path.name for path in leftovers(atlas, None)] == ["gone"]
    with open_graph(atlas) as store, StatisticsStore(atlas) as statistics:
        assert [path.name for path in leftovers(atlas, statistics)] == ["gone", STATISTICS_RUN]
        assert repair_atlas(store, statistics, atlas, check_atlas(store, statistics, atlas)) == {Repair.LEFTOVERS: 2}
    assert [path.name for path in parts.iterdir()] == ["unmerged"]
    assert shard.exists()
    assert shards_of_statistics(atlas, "unmerged").path == parts / "unmerged" / SHARDS


@pytest.mark.slow
def test_edges_of_a_run_without_any_mark_are_found_and_taken_away(tmp_path: Path) -> None:
    """What an import left that was stopped when edges were in and marks were not: going on would write every edge twice."""
    with open_graph(write_atlas(tmp_path / "atlas", ("one",))) as store:
        store.query("MATCH (:Run)-[m:ON_SEQUENCE]->(:Sequence) DELETE m", write=True)
        store.query("MATCH (:Feature)-[e:INFLUENCES]->(:Feature) DELETE e", write=True)
        store.query("MATCH (r:Run) SET r.status = 'running'", write=True)
        assert unmarked_edges(store).rows() == [("one", "s0", 10), ("one", "s1", 10), ("one", "s2", 10)]
        found = check_atlas(store)
        wrong = [one for one in found if one.severity is Severity.ERROR]
        assert [(one.what, one.n, one.repair) for one in wrong] == [("edges of sequences that are not marked as done", 30, Repair.UNMARKED)]
        assert "featlas import files" in wrong[0].mend
        assert "would write them twice" in wrong[0].mend
        assert repair_atlas(store, None, None, found)[Repair.UNMARKED] == 30
        assert not [one for one in check_atlas(store) if one.severity is Severity.ERROR]
        sequences = ("s0", "s1", "s2")
        assert store.commit_sequences([SequenceCommit("one", s, edges_of("one", s), {}) for s in sequences]) == 3
        assert store.read_edges("ATTRIBUTES", run="one").height == 30


@pytest.mark.slow
def test_every_feature_of_a_site_that_was_measured_has_a_row(tmp_path: Path) -> None:
    atlas = write_atlas(tmp_path / "atlas")
    with open_graph(atlas) as store, StatisticsStore(atlas) as statistics:
        statistics._run("DELETE FROM feature_statistics WHERE feature > 0")
        found = check_atlas(store, statistics, atlas)
        what = "sites of statistics runs with more or fewer rows than features"
        assert [(one.what, one.severity) for one in found] == [(what, Severity.ERROR)]
        assert found[0].examples == (f"{STATISTICS_RUN}, resid_0: 5 features, 1 rows",)
        statistics._run("DELETE FROM feature_statistics")
        statistics._run("UPDATE runs SET status = 'running'")
        assert what not in [one.what for one in check_atlas(store, statistics, atlas)]


@pytest.mark.slow
def test_a_compacted_file_is_as_private_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas, seen = write_atlas(tmp_path / "atlas"), []
    files = (atlas / "graph.lbug", atlas / "statistics.duckdb")
    for file, mode in zip(files, (0o600, 0o640), strict=True):
        file.chmod(mode)
    put = compaction._put_in_place

    def watched(new: Path, old: Path) -> None:
        seen.append(stat.S_IMODE(new.parent.stat().st_mode))
        put(new, old)

    monkeypatch.setattr(compaction, "_put_in_place", watched)
    compaction.compact_graph(files[0])
    compaction.compact_statistics(atlas)
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o640]
    assert seen == [0o700, 0o700]


def test_the_command_that_goes_on_names_all_that_makes_the_run() -> None:
    options = {
        "model": "m", "dictionaries": "d", "task": "ioi", "limit": 10, "bos": False, "graph": "server", "skip_invalid": True,
        "settings": {"baseline": "mean", "per_position": True, "steps": 10},
    }  # fmt: skip
    run, server = {"key": "k", "status": "running"}, "bolt://host:7687"
    assert going_on(run, {"options": options}, Path("atlas"), server) == (
        "featlas ingest edges --model m --dictionaries d --task ioi --limit 10 --baseline mean --steps 10 --mean per-position --bos no"
        " --skip-invalid --atlas atlas --graph bolt://host:7687"
    )
    plain = going_on(run, {"options": {**options, "bos": None, "skip_invalid": False, "settings": {"per_position": False}}}, Path("atlas"))
    assert plain == "featlas ingest edges --model m --dictionaries d --task ioi --limit 10 --atlas atlas"
    assert going_on({**run, "status": "deleting"}, {}, Path("a"), server) == "featlas atlas prune k --yes --atlas a --graph bolt://host:7687"
    assert going_on(run, {"options": {**options, "import_files": "files"}}, Path("a")) == "featlas import files files --atlas a"


@pytest.mark.slow
def test_the_address_of_the_graph_is_in_the_command_that_goes_on(tmp_path: Path) -> None:
    atlas = write_atlas(tmp_path / "atlas", ("one",))
    manifest = {"run": "one", "options": {"model": "m", "settings": {}}}
    (atlas / "runs" / "one.json").write_text(json.dumps(manifest), encoding="utf-8")
    with open_graph(atlas) as store:
        store.query("MATCH (r:Run) SET r.status = 'running'", write=True)
        for graph, said in (("bolt://host:7687", " --graph bolt://host:7687"), (str(atlas / "graph.lbug"), "")):
            contents = atlas_contents(store, None, atlas, graph)
            assert contents.unfinished["command"].to_list() == [f"featlas ingest edges --model m --atlas {atlas}{said}"]


def runs_of(**measured: str | None) -> pl.DataFrame:
    """Rows of `atlas_runs`: unfinished runs, begun when it is said; of those without a time there is no manifest."""
    rows = [{"run": run, "status": "running", "measured": at, "goes_on": "again"} for run, at in measured.items()]
    return pl.DataFrame(rows, schema={name: dtype for name, dtype in RUNS.items() if name in rows[0]})


def test_runs_of_which_no_manifest_tells_are_neither_the_oldest_nor_abandoned() -> None:
    now = datetime(2026, 5, 1, 12, tzinfo=UTC)
    runs = runs_of(theirs=None, new="2026-05-01T11:30:00+00:00", old="2026-05-01T09:00:00+00:00", oldest="2026-04-01T09:00:00+00:00")
    assert last_runs(runs, 1) == (["old", "oldest"], ["theirs"])
    assert last_runs(runs, 0) == (["new", "old", "oldest"], ["theirs"])
    assert unfinished_here(runs, on_server=True, now=now) == (["old", "oldest"], ["new"], ["theirs"])
    assert unfinished_here(runs, on_server=False, now=now)[0] == runs["run"].to_list()  # nobody else can be at work
    deleting = runs.with_columns(status=pl.lit("deleting"))
    assert unfinished_here(deleting, on_server=True, now=now)[0] == runs["run"].to_list()


@pytest.mark.slow
def test_prune_leaves_runs_without_a_manifest_alone(tmp_path: Path, featlas: Run) -> None:
    atlas = write_atlas(tmp_path / "atlas")
    for run, at in (("one", "2026-05-01T11:30:00+00:00"), ("two", None)):
        (atlas / "runs" / f"{run}.json").write_text(json.dumps({"run": run, **({"written": at} if at else {})}), encoding="utf-8")
    code, out, err = featlas("atlas", "prune", "--keep-last", 0, "--atlas", atlas, "--yes", "--no-compact", "--json")
    assert code == 0
    assert {row["of"] for row in json.loads(out)["deleted"]} == {"run one", "nothing else needs"}
    assert "when 1 run(s) were measured (two): they stay, unless named by key" in err
