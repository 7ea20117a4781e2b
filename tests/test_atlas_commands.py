"""Atlases checked, copied and pruned: every change is found, every copy is equal, every kill leaves an atlas that can be read and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from featlas.atlas import Atlas, ReadOnly
from featlas.queries import atlases, compaction, copying, pruning
from featlas.queries.atlases import Place, Prunable, copy_atlas, prune_atlas
from featlas.queries.belongings import BELONGINGS, UNCOPIED, tables_of
from featlas.queries.checking import graph_difference, statistics_difference
from featlas.queries.compaction import compact_graph, compact_statistics
from featlas.queries.copying import AtlasesClash, Clashes, UnknownRuns, select
from featlas.queries.foreign import foreign_parts
from featlas.queries.integrity import Finding, Repair, Severity, check_atlas
from featlas.queries.neo4j_browser import mark_nodes
from featlas.queries.repairing import repair_atlas
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import SequenceCommit, ServerCredentials, open_graph

from .atlas_cases import ERROR, MODEL, STATISTICS_RUN, edges_of, feature, write_atlas, write_graph
from .servers import Neo4jTestServer

pytestmark = pytest.mark.slow  # each runs whole commands, copies or loads

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs with samples; `two` beside it has only the second."""
    folder = tmp_path_factory.mktemp("made")
    write_atlas(folder / "two", ("two",))
    return write_atlas(folder / "both", samples=True)


@pytest.fixture
def atlas(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "atlas"))


def checked(atlas: Path, **options: object) -> list[Finding]:
    with open_graph(atlas, read_only=True) as store, StatisticsStore(atlas, read_only=True) as statistics:
        return check_atlas(store, statistics, atlas, **options)  # type: ignore[arg-type]


def differences(a: Path, b: Path) -> pl.DataFrame:
    with open_graph(a, read_only=True) as first, open_graph(b, read_only=True) as second:
        graph = graph_difference(first, second)
    with StatisticsStore(a, read_only=True) as one, StatisticsStore(b, read_only=True) as other:
        return pl.concat([graph, statistics_difference(one, other)])


# -- check ---------------------------------------------------------------------------------------------------


def test_a_sound_atlas_has_no_finding(made: Path) -> None:
    assert checked(made) == checked(made, fast=True) == checked(made, size=3) == []


DAMAGES: dict[str, tuple[str, Severity, Repair | None]] = {
    "MATCH (:Feature)-[e:ATTRIBUTES]->(:Feature) WHERE e.sequence = 's0' WITH e LIMIT 1 DELETE e": ("than their mark says", Severity.ERROR, None),
    "MATCH (:Feature)-[e:INFLUENCES]->(:Feature) WHERE e.run = 'one' WITH e LIMIT 1 DELETE e": ("missing", Severity.ERROR, Repair.INFLUENCES),
    "MATCH (:Feature)-[e:INFLUENCES]->(:Feature) WHERE e.run = 'one' SET e.variance = 9.5": ("what follows", Severity.ERROR, Repair.INFLUENCES),
    "MATCH (a:Feature {index: 1}), (b:Feature {index: 2}) CREATE (a)-[:INFLUENCES {run: 'two', weight: 1.0}]->(b)": (
        "of edges that are not there", Severity.ERROR, Repair.INFLUENCES,
    ),
    "MATCH (r:Run {key: 'one'}) SET r.n_edges = 7": ("count other sequences", Severity.ERROR, Repair.RUN_COUNTS),
    "MATCH (r:Run {key: 'one'}) SET r.n_planned = 9": ("called done", Severity.ERROR, Repair.RUN_COUNTS),
    "MATCH (r:Run {key: 'one'}) SET r.status = 'running'": ("not finished", Severity.WARNING, None),
    "MATCH (r:Run {key: 'one'})-[m:ON_SEQUENCE]->(:Sequence {key: 's1'}) DELETE m": ("not marked", Severity.ERROR, Repair.UNMARKED),
    "MATCH (r:Run {key: 'two'}) DETACH DELETE r": ("runs that the graph does not have", Severity.ERROR, Repair.ORPHANS),
    "MATCH (c:Circuit {key: 'circuit-one'}) SET c.n_nodes = 4": ("circuits that count", Severity.ERROR, Repair.CIRCUIT_COUNTS),
    "MATCH (c:Circuit {key: 'circuit-one'}) DETACH DELETE c": ("edges of circuits", Severity.ERROR, Repair.ORPHANS),
    "MATCH (c:Circuit {key: 'circuit-one'}) SET c.faithfulness = 0.5": ("none of their scores has", Severity.ERROR, None),
    "MATCH (c:Circuit {key: 'circuit-one'})-[:SCORED]->(s:Score) SET s.method = 'random'": (
        "of which the statistics have no value", Severity.WARNING, None,
    ),
    "MATCH (f:Feature {index: 3}) SET f.site = 'resid_9'": ("contradict their key", Severity.ERROR, None),
    "MATCH (f:Feature {index: 0}) SET f.mean_activation = 7.0": ("another frequency", Severity.ERROR, Repair.STATISTICS),
    "MATCH (f:Feature {index: 0}) SET f.statistics_run = 'gone'": ("statistics run is not there", Severity.WARNING, Repair.STATISTICS),
    "MATCH (f:Feature {index: 0}) SET f.label = 'wrong'": ("not the best", Severity.WARNING, Repair.LABELS),
    "CREATE (:Feature {key: 'micro@0|dic|resid_0|77', model: 'micro@0', dictionary: 'dic', site: 'resid_0', kind: 'feature', index: 77})": (
        "nothing uses", Severity.NOTE, Repair.UNUSED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_and_what_can_be_derived_is_mended(damage: str, atlas: Path) -> None:
    what, severity, repair = DAMAGES[damage]
    before = _rows(atlas)
    with open_graph(atlas) as store, StatisticsStore(atlas) as statistics:
        # `index` is a word of the embedded database
        store.query(damage.replace("{index:", "{`index`:").replace(" index:", " `index`:"), write=True)
        found = check_atlas(store, statistics, atlas)
        fitting = [one for one in found if what in one.what]
        assert [(one.severity, one.repair) for one in fitting][:1] == [(severity, repair)], found
        assert fitting[0].n >= 1
        assert fitting[0].examples
        if repair is None:
            return
        mended = repair_atlas(store, statistics, atlas, found)
        assert mended[repair] >= 1
        left = [one for one in check_atlas(store, statistics, atlas) if one.severity is Severity.ERROR]
        assert not left, left
    if repair in (Repair.INFLUENCES, Repair.STATISTICS, Repair.LABELS, Repair.UNUSED) and "gone" not in damage:
        assert _rows(atlas) == before


def _rows(atlas: Path) -> list[tuple[object, ...]]:
    with open_graph(atlas, read_only=True) as store:
        edges = store.read_edges("INFLUENCES").select(pl.selectors.exclude(pl.Float64), pl.selectors.float().round(9)).rows()
        return [*edges, *store.query("MATCH (f:Feature) RETURN f.key, f.label, f.frequency, f.mean_activation ORDER BY f.key").rows()]


def test_doubled_edges_and_no_numbers_are_found(atlas: Path) -> None:
    with open_graph(atlas) as store:
        edge = store.read_edges("ATTRIBUTES").row(0, named=True)
        text = (
            "MATCH (a:Feature) WHERE a.key = $source MATCH (b:Feature) WHERE b.key = $target CREATE (a)-[:ATTRIBUTES {run: $run, sequence: $sequence,"
            " src_pos: $src_pos, dest_pos: $dest_pos, weight: $weight}]->(b)"
        )
        store.query(text, edge, write=True)
        store.query(text, {**edge, "dest_pos": 5, "weight": float("inf")}, write=True)
    said = [one.what for one in checked(atlas) if one.severity is Severity.ERROR]
    assert any("more than once" in what for what in said)
    assert any("no number" in what for what in said)


def test_files_are_held_against_what_they_should_be(atlas: Path) -> None:
    file = next((atlas / "samples").glob("*/resid_0.npz"))
    content = bytearray(file.read_bytes())
    content[60] ^= 0xFF  # inside the values
    file.write_bytes(content)
    (atlas / "runs" / "three.json").write_text("{}", encoding="utf-8")
    (atlas / "samples" / ".left.0123456789ab").mkdir()
    with StatisticsStore(atlas) as statistics:
        statistics._run("INSERT INTO run_sites VALUES ('nowhere', 0, 'resid_0', 0, 'dic', 8, 5)")
    found = {one.what: one for one in checked(atlas)}
    assert any("files are not what they should be" in what and one.severity is Severity.ERROR for what, one in found.items())
    assert found["manifests of runs that this graph does not have"].examples == ("three",)
    assert any("rows of run_sites" in what for what in found)
    assert any("leftovers" in what for what in found)


def test_every_table_of_the_statistics_belongs_to_something(made: Path) -> None:
    with StatisticsStore(made, read_only=True) as statistics:
        tables = tables_of(statistics)
    assert set(tables) - set(UNCOPIED) == set(BELONGINGS)
    assert all(set(one.columns) <= set(tables[one.table]) for one in BELONGINGS.values())


# -- copy ----------------------------------------------------------------------------------------------------


def test_a_copy_is_equal_and_done_again_writes_nothing(made: Path, tmp_path: Path) -> None:
    copied = copy_atlas(Place(made), Place(tmp_path / "copy"))
    assert differences(made, tmp_path / "copy").is_empty()
    assert all(one.equal and one.written == one.n for one in (*copied.graph, *copied.statistics))
    assert atlases.contents_hash(made / "samples") == atlases.contents_hash(tmp_path / "copy" / "samples")
    assert checked(tmp_path / "copy") == []
    again = copy_atlas(Place(made), Place(tmp_path / "copy"))
    assert sum(one.written for one in (*again.graph, *again.statistics)) == int(again.files["written"].sum()) == 0


def test_what_users_made_beside_an_atlas_is_named_when_it_stays_behind(atlas: Path, tmp_path: Path, featlas: Run) -> None:
    code, out, err = featlas("atlas", "copy", atlas, tmp_path / "first")
    assert (code, "left behind" in err, "first has all of it:" in out) == (0, False, True)
    with open_graph(atlas) as store:
        store.query("CREATE NODE TABLE Note (id STRING PRIMARY KEY)", write=True)
        store.query("ALTER TABLE Feature ADD comment STRING", write=True)
    code, out, err = featlas("atlas", "copy", atlas, tmp_path / "copy")
    assert (code, "left behind, since they are no atlas' own: Feature.comment, Note" in err) == (0, True), err
    assert "copy has all that is an atlas' own:" in out
    code, out, _ = featlas("atlas", "copy", atlas, tmp_path / "copy", "--json")
    assert json.loads(out)["left_behind"] == ["Feature.comment", "Note"]


def test_one_run_is_copied_with_what_belongs_to_it(made: Path, tmp_path: Path) -> None:
    """Run `two` of both is the atlas of run `two` alone, without the features that nothing of it touches."""
    copy_atlas(Place(made), Place(tmp_path / "copy"), runs=["two"])
    expected = Path(shutil.copytree(made.parent / "two", tmp_path / "expected"))
    with open_graph(expected) as store:
        pruning.delete_unused(store)
    found = differences(tmp_path / "copy", expected)
    assert found.is_empty(), found
    assert sorted(path.name for path in (tmp_path / "copy" / "runs").iterdir()) == ["two.json"]
    with pytest.raises(UnknownRuns, match="it has one, two"), open_graph(made, read_only=True) as store:
        select(store, ["three"])


def test_two_atlases_become_one(made: Path, tmp_path: Path) -> None:
    for run in ("one", "two"):
        copy_atlas(Place(made), Place(tmp_path / "whole"), runs=[run])
    with open_graph(made, read_only=True) as first, open_graph(tmp_path / "whole", read_only=True) as second:
        assert graph_difference(first, second).is_empty()


def test_parts_of_one_run_are_joined(made: Path, tmp_path: Path) -> None:
    """One atlas has sequence s0 of run one, the other all but s1: together s0, s1 … and what follows from all of them."""
    parts = [Path(shutil.copytree(made, tmp_path / name)) for name in ("a", "b")]
    for part, gone in zip(parts, (["s1", "s2"], ["s0"]), strict=True):
        with open_graph(part) as store:
            for sequence in gone:
                given = {"sequence": sequence}
                store.query("MATCH (:Feature)-[e:ATTRIBUTES]->(:Feature) WHERE e.run = 'one' AND e.sequence = $sequence DELETE e", given, write=True)
                store.query("MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) WHERE r.key = 'one' AND s.key = $sequence DELETE m", given, write=True)
            copying.derive_influences(store, "one")
    copy_atlas(Place(parts[0]), Place(parts[1]))
    assert differences(parts[1], made).filter(pl.col("property") != "status").is_empty()


def test_what_clashes_is_refused_kept_or_replaced(made: Path, atlas: Path) -> None:
    with open_graph(atlas) as store:
        store.query("MATCH (c:Circuit {key: 'circuit-one'}) SET c.n_nodes = 99", write=True)
        store.query("MATCH (f:Feature) WHERE f.key = $key SET f.label = 'mine'", {"key": feature(0)}, write=True)
    with StatisticsStore(atlas) as statistics:
        statistics._run("UPDATE ablation_effects SET effect = 0.75 WHERE run = 'one'")
    with pytest.raises(AtlasesClash, match=r"1 Circuit nodes: circuit-one has n_nodes 3 and 99.*--on-clash"):
        copy_atlas(Place(made), Place(atlas))
    copy_atlas(Place(made), Place(atlas), clashes=Clashes.KEEP)
    assert differences(made, atlas).select("type", "property", "b").rows()[:2] == [("Circuit", "n_nodes", "99"), ("Feature", "label", "mine")]
    copied = copy_atlas(Place(made), Place(atlas), clashes=Clashes.REPLACE)
    assert differences(made, atlas).is_empty()
    written = {one.type: one.written for one in (*copied.graph, *copied.statistics) if one.written}
    assert written == {"Circuit": 1, "Feature": 1, "ablation_effects": 1}


@pytest.mark.parametrize("step", ["commit_sequences", "merge_edges", "merge_nodes"])
def test_a_copy_that_fails_anywhere_leaves_a_sound_atlas_and_goes_on(
    step: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featlas.queries.embedded import LadybugStore

    kept, calls, limit = getattr(LadybugStore, step), [0], [0]

    def failing(self: LadybugStore, *arguments: object) -> object:
        calls[0] += 1
        if calls[0] > limit[0]:
            raise KeyboardInterrupt
        return kept(self, *arguments)

    monkeypatch.setattr(LadybugStore, step, failing)
    stopped = 0
    while True:
        calls[0] = 0
        try:
            copy_atlas(Place(made), Place(tmp_path / "copy"))
            break
        except KeyboardInterrupt:
            stopped += 1
            limit[0] += 2
            with open_graph(tmp_path / "copy", read_only=True) as store:
                wrong = [one.what for one in check_atlas(store) if one.severity is Severity.ERROR]
            # circuits and models come before, or after, what they name
            assert not [what for what in wrong if "circuits" not in what and "models" not in what], wrong
    assert stopped >= 1
    assert differences(made, tmp_path / "copy").is_empty()


# -- prune ---------------------------------------------------------------------------------------------------


def _pruned(atlas: Path, *runs: str) -> dict[str, int]:
    with open_graph(atlas) as store, StatisticsStore(atlas) as statistics:
        return prune_atlas(store, statistics, atlas, Prunable(runs=runs))


def test_a_run_goes_with_all_that_hangs_on_it_and_no_more(made: Path, atlas: Path, tmp_path: Path) -> None:
    assert _pruned(atlas, "one") == {"Feature": 6, "Sequence": 2, "Model": 0}  # f1 f2 f3 f6 f7 f8: the others are in two's edges or communities
    expected = Path(shutil.copytree(made.parent / "two", tmp_path / "expected"))
    with open_graph(expected) as store:
        pruning.delete_unused(store)
    assert differences(atlas, expected).is_empty()
    assert checked(atlas) == []
    with open_graph(atlas, read_only=True) as store:
        assert store.query("MATCH (f:Feature) WHERE f.key = $key RETURN count(*) AS n", {"key": ERROR})["n"][0] == 1
    assert _pruned(atlas, "two")["Model"] == 1
    with open_graph(atlas, read_only=True) as store:
        assert store.query("MATCH (n) RETURN count(*) AS n")["n"][0] == 1  # the schema's version


def plan_run(atlas: Path, status: str = "running") -> None:
    """A run `three` that has planned p0 … p4 and measured none of them, and features that nothing uses, one with a label by hand."""
    with open_graph(atlas) as store:
        store.merge_nodes("Sequence", pl.DataFrame({"key": [f"p{i}" for i in range(5)], "task": "t"}))
        store.merge_nodes("Run", pl.DataFrame({"key": ["three"], "model": [MODEL], "status": [status], "n_planned": [5]}))
        alone = {"key": ["other|d|resid_0|1", "other|d|resid_0|2"], "model": "other", "dictionary": "d", "site": "resid_0", "kind": "feature"}
        store.merge_nodes("Feature", pl.DataFrame({**alone, "index": [1, 2], "label": ["mine", None], "label_kind": ["hand", None]}))


def keys_of(atlas: Path, label: str) -> list[str]:
    with open_graph(atlas, read_only=True) as store:
        return store.query(f"MATCH (n:{label}) RETURN n.key AS key ORDER BY key")["key"].to_list()


def listed_nodes(atlas: Path, *runs: str) -> dict[str, int]:
    with open_graph(atlas, read_only=True) as store, StatisticsStore(atlas, read_only=True) as statistics:
        rows = atlases.doomed(store, statistics, atlas, Prunable(runs=runs)).filter(pl.col("of") == atlases.NEEDED_BY_NOTHING_ELSE)
    return dict(rows.select("what", "n").iter_rows())


def test_nodes_stay_while_another_run_is_unfinished(atlas: Path, featlas: Run) -> None:
    plan_run(atlas)
    before = {label: keys_of(atlas, label) for label in ("Feature", "Sequence", "Model")}
    assert listed_nodes(atlas, "one") == {}
    code, out, err = featlas("atlas", "prune", "one", "--atlas", atlas, "--yes", "--no-compact")
    assert code == 0
    assert "1 other run(s) are not finished (three)" in err
    assert "nodes" not in out.replace("nodes' ablation effects", "")
    assert {label: keys_of(atlas, label) for label in before} == before
    with open_graph(atlas) as store:
        assert store.commit_sequences([SequenceCommit("three", f"p{i}", edges_of("one", "s0"), {}) for i in range(5)]) == 5


def test_only_what_the_run_itself_used_goes_and_is_listed_before(atlas: Path, featlas: Run) -> None:
    plan_run(atlas, "done")
    others = ["other|d|resid_0|1", "other|d|resid_0|2"]
    assert listed_nodes(atlas, "one") == {"Feature nodes": 6, "Sequence nodes": 2}
    code, out, _ = featlas("atlas", "prune", "one", "--atlas", atlas, "--yes", "--no-compact", "--json")
    assert code == 0
    said = json.loads(out)
    assert said["unused"] == {"Feature": 6, "Sequence": 2, "Model": 0}
    assert {row["what"]: row["n"] for row in said["deleted"] if row["of"] == "nothing else needs"} == {"Feature nodes": 6, "Sequence nodes": 2}
    assert keys_of(atlas, "Sequence") == [*(f"p{i}" for i in range(5)), "s2", "s3"]
    assert keys_of(atlas, "Feature")[-2:] == others


def test_labels_and_numbers_that_the_graph_alone_has_are_not_deleted(atlas: Path) -> None:
    with open_graph(atlas) as store, StatisticsStore(atlas) as statistics:
        own = pl.DataFrame({"key": [feature(1), feature(2), feature(3)], "label": ["a", "b", None], "label_kind": ["hand", "file", None]})
        store.merge_nodes("Feature", own.with_columns(statistics_run=pl.Series([None, None, "elsewhere"])))
        going = pruning.Going(("one",))
        assert pruning.needed_by_nothing_else(store, statistics, going)["Feature"].to_list() == [feature(i) for i in (2, 6, 7, 8)]
        store.merge_nodes("Feature", pl.DataFrame({"key": [feature(6)], "statistics_run": [STATISTICS_RUN]}))
        assert feature(6) in pruning.needed_by_nothing_else(store, statistics, going)["Feature"].to_list()
        assert feature(6) not in pruning.needed_by_nothing_else(store, None, going)["Feature"].to_list()


def test_a_node_that_is_in_use_when_it_is_to_go_stays(atlas: Path) -> None:
    plan_run(atlas, "done")
    with open_graph(atlas) as store:
        for label, unneeded in (("Sequence", ["p0", "p1", "p2", "p3", "p4"]), ("Feature", ["other|d|resid_0|1", "other|d|resid_0|2"]), ("Model", [])):
            everything = store.query(f"MATCH (n:{label}) RETURN n.key AS key")["key"].cast(pl.String)
            assert pruning.delete_nodes(store, label, everything, size=3) == len(unneeded)
            assert set(store.query(f"MATCH (n:{label}) RETURN n.key AS key")["key"]) == set(everything) - set(unneeded)


def test_a_prune_that_fails_at_any_statement_can_be_read_and_is_finished(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featlas.queries.embedded import LadybugStore

    atlas, kept, state = Path(shutil.copytree(made, tmp_path / "atlas")), LadybugStore.answer, {"left": 0}

    def failing(self: LadybugStore, cypher: str, parameters: object = None, *, write: bool = False, limits: object = None) -> object:
        if write:
            state["left"] -= 1
            if state["left"] < 0:
                raise KeyboardInterrupt
        return kept(self, cypher, parameters, write=write, limits=limits)  # type: ignore[arg-type]

    for at in range(40):
        state["left"] = at
        monkeypatch.setattr(LadybugStore, "answer", failing)
        try:
            _pruned(atlas, "one")
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(LadybugStore, "answer", kept)
            with open_graph(atlas, read_only=True) as store:
                found = [one for one in check_atlas(store) if one.severity is Severity.ERROR]
                # a run that is going is said to be so, and its aggregated edges and circuits are no contradiction
                assert not [one for one in found if "circuits" not in one.what], (at, found)
                status = store.query("MATCH (r:Run {key: 'one'}) RETURN r.status AS status")
                assert status.is_empty() or at == 0 or status["status"][0] == pruning.DELETING
    assert at >= 5  # each try goes on where the one before was stopped
    monkeypatch.setattr(LadybugStore, "answer", kept)
    assert checked(atlas) == []


def test_circuits_of_blocks_go_with_their_parcellation_which_is_found_until_all_is_gone(atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_graph(atlas) as store, StatisticsStore(atlas) as statistics:
        row = ("communities-two",)
        statistics._run("INSERT INTO parcellations VALUES (?, '', 'm', 'leiden', 'effective', '{}', now())", list(row))
        blocks = store.query("MATCH (b:Block) WHERE b.parcellation = $p RETURN b.key AS key ORDER BY key LIMIT 2", {"p": row[0]})["key"].to_list()
        store.merge_nodes("Circuit", pl.DataFrame({"key": ["of blocks"], "run": ["two"], "n_nodes": [2], "n_edges": [1]}))
        store.merge_edges("IN_CIRCUIT", pl.DataFrame({"source": blocks, "target": ["of blocks"] * 2}))
        store.merge_edges("CIRCUIT_EDGE", pl.DataFrame({"source": blocks[:1], "target": blocks[1:], "circuit": ["of blocks"]}))
        assert ("circuits of blocks", 1) in atlases.doomed(store, statistics, atlas, Prunable(parcellations=row)).select("what", "n").rows()
        kept, left = type(store).answer, {"n": 2}

        def failing(*given: object, write: bool = False, **named: object) -> object:
            left["n"] -= write
            if left["n"] < 0:
                raise KeyboardInterrupt
            return kept(*given, write=write, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(type(store), "answer", failing)
        with pytest.raises(KeyboardInterrupt):
            prune_atlas(store, statistics, atlas, Prunable(parcellations=row))
        monkeypatch.setattr(type(store), "answer", kept)
        assert statistics.query("SELECT 1 FROM parcellations WHERE parcellation = $p", {"p": row[0]}).height == 1  # the command finds it again
        prune_atlas(store, statistics, atlas, Prunable(parcellations=row))
        assert statistics.query("SELECT 1 FROM parcellations WHERE parcellation = $p", {"p": row[0]}).is_empty()
    assert [one for one in checked(atlas) if one.severity is Severity.ERROR] == []


def test_a_graph_with_tables_of_its_users_own_is_not_compacted(tmp_path: Path) -> None:
    """They would be lost, and no comparison of the schema's types would tell."""
    with open_graph(tmp_path / "graph.lbug") as store:
        store.query("CREATE NODE TABLE Mine(k STRING, PRIMARY KEY(k))", write=True)
        store.query("CREATE (:Mine {k: 'a note'})", write=True)
        store.query("ALTER TABLE Feature ADD mine STRING", write=True)
    with pytest.raises(compaction.CompactionDiffers, match=r"Feature\.mine, Mine"):
        compact_graph(tmp_path / "graph.lbug")
    with open_graph(tmp_path / "graph.lbug", read_only=True) as store:
        assert store.query("MATCH (m:Mine) RETURN m.k AS k")["k"].to_list() == ["a note"]


@pytest.mark.parametrize("step", ["_export", "_load", "_differing_types", "_checkpoint", "_put_in_place"])
def test_a_compaction_that_fails_anywhere_changes_nothing(step: str, made: Path, atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compaction, step, failing)
    with pytest.raises(KeyboardInterrupt):
        compact_graph(atlas / "graph.lbug")
    assert differences(made, atlas).is_empty()
    assert not list(atlas.glob(f"{compaction.WORK}*"))


def test_compaction_gives_space_back_and_keeps_every_row(made: Path, atlas: Path) -> None:
    with open_graph(atlas) as store:
        for i in range(3):
            rows = pl.DataFrame({"key": [f"x{i}-{j}" for j in range(3000)], "clean": "some text " * 20})
            store.merge_nodes("Sequence", rows)
        store.query("MATCH (s:Sequence) WHERE s.key STARTS WITH 'x' DELETE s", write=True)
    smaller = compact_graph(atlas / "graph.lbug")
    assert smaller.after < smaller.before
    compact_statistics(atlas)
    assert differences(made, atlas).is_empty()
    with StatisticsStore(atlas) as statistics, pytest.raises(Exception, match=r"(?i)duplicate|primary"):
        statistics._run("INSERT INTO search_origins VALUES ('a', now()), ('a', now())")  # constraints are there still
    with open_graph(atlas) as store:
        write_graph(store)  # it can be written to: all of it is there already


@pytest.mark.parametrize("after_s", [0.8, 1.5])
def test_a_killed_copy_or_prune_goes_on(after_s: float, made: Path, atlas: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "featlas.cli", "atlas"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NEO4J_", "FEATLAS_"))}
    for arguments in (["copy", str(made), str(tmp_path / "copy")], ["prune", "one", "--yes", "--atlas", str(atlas)]):
        process = subprocess.Popen([*program, *arguments], env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for _ in range(2):  # the run may be gone already, which is a mistake to name again
            subprocess.run([*program, *arguments], env=clean, capture_output=True, check=False)
    assert differences(made, tmp_path / "copy").is_empty()
    assert [one for one in checked(atlas) if one.severity is not Severity.NOTE] == []


# -- a server ------------------------------------------------------------------------------------------------


@pytest.fixture
def server(known_neo4j: Neo4jTestServer) -> str:
    return known_neo4j.uri


@pytest.mark.neo4j
def test_to_a_server_and_back_is_equal_edge_for_edge(server: str, made: Path, tmp_path: Path) -> None:
    copy_atlas(Place(made), Place.of(server))
    credentials = ServerCredentials.from_environment()
    with open_graph(made, read_only=True) as first, open_graph(server, credentials=credentials) as second:
        assert graph_difference(first, second).is_empty()
        assert check_atlas(second) == []
    assert copy_atlas(Place(made, server, credentials), Place(tmp_path / "back")).foreign == ()
    assert differences(made, tmp_path / "back").is_empty()
    with open_graph(server, credentials=credentials) as second:
        mark_nodes(second)
        assert foreign_parts(second) == []
        second.query("MATCH (f:Feature)-[e:INFLUENCES]->() CREATE (:Note)-[:ABOUT]->(f) SET e.seen = 1, f.comment = 'x'", write=True)
        assert foreign_parts(second) == ["ABOUT", "Feature.comment", "INFLUENCES.seen", "Note"]
        second.query("MATCH (n:Note) DETACH DELETE n", write=True)
    with open_graph(server, credentials=credentials) as second, open_graph(made.parent / "two", read_only=True) as two:
        pruning.delete_run(second, None, "one")
        assert pruning.delete_unused(second)["Sequence"] == 2
        found = graph_difference(second, two, ignoring=["OF_MODEL"])
        assert set(found["source"]) == {feature(i) for i in (1, 2, 3, 6, 7, 8)}  # which nothing uses in `two` either


# -- the commands --------------------------------------------------------------------------------------------


def test_the_commands_say_what_they_did(featlas: Run, atlas: Path, tmp_path: Path) -> None:
    code, out, _ = featlas("atlas", "info", "--atlas", atlas, "--json")
    info = json.loads(out)
    assert code == 0
    assert [(run["run"], run["edges"]) for run in info["runs"]] == [("one", 30), ("two", 8)]
    assert {part["part"] for part in info["parts"]} == {"graph.lbug", "statistics.duckdb", "samples", "runs"}
    assert featlas("atlas", "check", "--atlas", atlas)[:2] == (0, f"{atlas}: nothing is wrong\n")
    code, out, _ = featlas("atlas", "copy", atlas, tmp_path / "copy")
    assert code == 0
    assert "read again on both sides and are equal" in out
    code, _, err = featlas("atlas", "prune", "one", "--atlas", atlas)
    assert code == 2
    assert "say --yes" in err
    code, out, _ = featlas("atlas", "prune", "one", "--atlas", atlas, "--yes")
    assert code == 0
    assert "6 Feature nodes" in out
    assert "graph.lbug:" in out
    with open_graph(atlas) as store:
        store.query("MATCH (r:Run {key: 'two'}) SET r.n_edges = 1", write=True)
    code, out, _ = featlas("atlas", "check", "--atlas", atlas, "--repair")
    assert code == 1
    assert "two says 2 sequences, 1 edges, and has 2, 8" in out
    assert "nothing was changed" in out
    code, out, _ = featlas("atlas", "check", "--atlas", atlas, "--repair", "--yes")
    assert code == 0
    assert "mended: run counts (1)" in out
    assert featlas("atlas", "copy", atlas, atlas)[0] == 2


def test_the_same_from_python(atlas: Path, tmp_path: Path) -> None:
    opened = Atlas(atlas, read_only=False)
    assert opened.info().runs["run"].to_list() == ["one", "two"]
    assert opened.check() == []
    assert opened.copy(tmp_path / "copy", runs=["two"]).runs == ("two",)
    assert opened.prune("one")["Feature"] == 6
    assert Atlas(tmp_path / "copy").info().runs["run"].to_list() == opened.info().runs["run"].to_list() == ["two"]
    with pytest.raises(ReadOnly, match="read_only=False"):
        Atlas(atlas).prune("two")
