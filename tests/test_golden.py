"""Golden runs, and determinism: numbers that were once found right stay; the same command twice gives the same bits; the manifest says where not."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from featlas.ingest import machine
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import open_graph
from featlas.queries.subgraphs import find_run

from .golden_runs import golden
from .study_atlas import TinyAtlas


@pytest.fixture(scope="module")
def found(tiny: TinyAtlas):
    return golden.numbers(tiny.atlas, tiny.runs["main"])


def test_the_tiny_run_is_as_it_was(found):
    """If this fails: `python scripts/golden.py check tiny ATLAS` says by how much; a change that was wanted is written anew."""
    differing = golden.differences(golden.read("tiny"), found)
    assert not differing, golden.table(differing)


def test_what_is_compared_is_what_the_graph_holds(found, tiny):
    with open_graph(tiny.atlas, read_only=True) as graph:
        run = find_run(graph, tiny.runs["main"]).key
        total = graph.query("MATCH (:Feature)-[e:INFLUENCES]->(:Feature) WHERE e.run = $run RETURN count(e) AS n", {"run": run})["n"].item()
        marks = graph.query(
            "MATCH (r:Run)-[m:ON_SEQUENCE]->(:Sequence) WHERE r.key = $run RETURN avg(m.metric_clean) AS clean, avg(m.metric_corrupt) AS corrupt",
            {"run": run},
        ).row(0, named=True)
    assert found["count"]["INFLUENCES"] == total > 100
    assert found["metric"]["clean"] == pytest.approx(marks["clean"])
    # the effects on the output sum to what the metric loses, by two steps of integrated gradients not exactly
    assert found["share"]["completeness of the attribution"] == pytest.approx(
        found["metric"]["effects on the output"] / (marks["clean"] - marks["corrupt"])
    )
    assert len(found["edge"]) == 2 * golden.N_EDGES


def changed(record, kind, name, value):
    other = copy.deepcopy(record)
    other[kind][name] = value
    return other


def test_a_changed_number_is_told_and_rounding_is_not(found):
    name, weight = next(iter(found["edge"].items()))
    assert golden.differences(found, changed(found, "edge", name, weight * (1 + 5e-5))) == []
    told = golden.differences(found, changed(found, "edge", name, weight * 1.001))
    assert [(one.what, round(one.relative, 9)) for one in told] == [(f"edge: {name}", 0.001)]
    assert golden.table(told).splitlines()[1].startswith(f"edge: {name}")
    assert golden.differences(found, changed(found, "metric", "clean", float("nan")))
    assert golden.differences(found, changed(found, "exact", "sequences", 7))
    count = found["count"]["ATTRIBUTES"]
    assert golden.differences(found, changed(found, "count", "ATTRIBUTES", count + 2)) == []
    assert golden.differences(found, changed(found, "count", "ATTRIBUTES", count + 3 + count // 1000))


def test_edges_of_equal_weight_may_change_places_but_none_may_come_or_go():
    edges = {f"a.{i} -> y": 1.0 - i / 1000 for i in range(100)}
    golden_, now = ({"exact": {}, "count": {}, "metric": {}, "share": {}, "mean": {}, "edge": dict(part)} for part in (edges, edges))
    last, next_ = "a.49 -> y", "a.50 -> y"
    now["edge"][last], now["edge"][next_] = 0.95096, 0.95100  # within 1e-4 of where they were, and now the other way round
    golden_["edge"][next_] = 0.95098
    assert golden.differences(golden_, now) == []
    now["edge"]["b.1 -> y"] = 0.97
    del now["edge"]["a.3 -> y"]
    told = {one.what: (one.golden, one.now) for one in golden.differences(golden_, now)}
    assert told == {"edge: b.1 -> y": (None, 0.97), "edge: a.3 -> y": (0.997, None)}


def test_a_golden_run_that_differs_is_a_table_and_an_exit_code(found, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    golden.write("mine", found)
    monkeypatch.setattr(sys, "argv", ["golden.py", "check", "mine", str(tiny.atlas), "--run", tiny.runs["main"]])
    assert golden.main() == 0
    assert "numbers as they were" in capsys.readouterr().out
    path = tmp_path / "mine.json"
    record = json.loads(path.read_text())
    record["metric"]["clean"] += 0.5
    path.write_text(json.dumps(record))
    assert golden.main() == 1
    out = capsys.readouterr().out
    assert "metric: clean" in out
    assert "1 numbers of mine differ" in out


# -- determinism ---------------------------------------------------------------------------------------------

TWICE = """
import sys, torch
from pathlib import Path
from featlas.ingest.pipeline import ingest_edges
from tests.study_atlas import options
torch.set_num_threads(int(sys.argv[3]))
ingest_edges(options(Path(sys.argv[1]), atlas=Path(sys.argv[2])))
"""
EDGES = (
    "MATCH (a:Feature)-[e:ATTRIBUTES]->(b:Feature) WHERE e.run = $run "
    "RETURN e.sequence AS sequence, a.key AS source, b.key AS target, e.weight AS weight ORDER BY sequence, source, target, weight"
)


def edges_of(atlas: Path, run: str) -> pl.DataFrame:
    with open_graph(atlas, read_only=True) as graph:
        return graph.query(EDGES, {"run": run})


def again(tiny: TinyAtlas, atlas: Path, threads: int) -> pl.DataFrame:
    """All edges of the main run, measured in a process of its own with so many threads."""
    child = subprocess.run(
        [sys.executable, "-c", TWICE, str(tiny.folder), str(atlas), str(threads)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)}, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return edges_of(atlas, tiny.runs["main"])


@pytest.mark.slow
def test_the_same_run_in_two_processes_is_the_same_bit_by_bit(tiny, tmp_path):
    first = edges_of(tiny.atlas, tiny.runs["main"])
    assert len(first) > 500
    assert first.equals(again(tiny, tmp_path / "again", torch.get_num_threads()))  # keys, order and every bit of every weight
    other = again(tiny, tmp_path / "threads", 3 - min(torch.get_num_threads(), 2))
    assert other.select("sequence", "source", "target").equals(first.select("sequence", "source", "target"))
    assert (other["weight"] - first["weight"]).abs().max() <= 1e-5 * first["weight"].abs().max()


def test_the_manifest_says_whether_the_bits_would_come_again(tiny, monkeypatch):
    manifest = json.loads((tiny.atlas / "runs" / f"{tiny.runs['main']}.json").read_text())
    assert manifest["deterministic"] is True
    assert manifest["why"].startswith("cpu: the same sums in the same order, for ")
    assert {"processor", "instructions", "cores", "blas"} <= manifest["hardware"].keys()
    with StatisticsStore(tiny.atlas, read_only=True) as store:
        run = store.find_run(tiny.statistics_run).run
    note = json.loads((tiny.atlas / "runs" / "statistics" / f"{run}.json").read_text())
    assert note["deterministic"] is True
    assert (note["threads"], note["workers"]) == (torch.get_num_threads(), None)
    assert machine.determinism("cuda:0").deterministic is False
    assert "use_deterministic_algorithms is off" in machine.determinism("cuda").why
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "CUBLAS_WORKSPACE_CONFIG is not" in machine.determinism("cuda").why
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert machine.determinism("cuda").deterministic is True
    assert machine.determinism("mps") == (False, "mps: torch promises nothing for this kind of device")


@pytest.mark.parametrize(
    ("device", "gpu", "deterministic"),
    [("cpu+disk", True, True), ("cuda+cpu", True, False), ("embed=cpu,layers=cuda:0", True, False), ("embed=cpu,layers=cpu", True, True),
     ("auto", True, False), ("auto", False, True), ("map.json", True, False), ("mps", False, False), ("cuda:1,mps", True, False)],
)  # fmt: skip
def test_a_placement_is_as_certain_as_the_least_certain_of_its_devices(monkeypatch, device, gpu, deterministic):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert machine.determinism(device).deterministic is deterministic
