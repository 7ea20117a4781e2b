"""graph-tool in a child process: the bridge against stand-ins for its Python, which end, die, hang or refuse to go; then graph-tool itself."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from featlas.analysis import graph_tool as bridge
from featlas.analysis.graph_tool import (
    GraphToolFailed,
    GraphToolMissing,
    GraphToolTimeout,
    NestedKind,
    NotAGraph,
    complete_edges,
    distinct_levels,
    find_graph_tool,
    nearest_edges,
    nested_block_model,
    nested_directed,
    require_graph_tool,
)
from featlas.analysis.planted import Planted, planted
from featlas.errors import UserError
from sklearn.metrics import adjusted_mutual_info_score

FOUND = """
import json, os, sys, time
from pathlib import Path
import numpy as np
if "-c" in sys.argv:
    print("9.9")
    sys.exit(0)
folder = Path(sys.argv[-1])
settings = json.loads((folder / "settings.json").read_text())
given = dict(np.load(folder / "input.npz"))
def leave(labels, **more):
    np.savez(folder / "state-1.npz", labels=np.array(labels))
    told = {"state": "state-1.npz", "entropy": 12.5, "phase": "told", "sweeps": 3, "graph_tool": "9.9", **more}
    (folder / "checkpoint.json").write_text(json.dumps(told))
"""
"""What every stand-in begins with: it has graph-tool 9.9, and reads the input as the worker does."""

CORRELATION = np.array([[1, 0.9, 0.1, 0], [0.9, 1, 0.2, 0], [0.1, 0.2, 1, 0.8], [0, 0, 0.8, 1]])

Stand = Callable[[str], str]


@pytest.fixture
def stand_in(tmp_path: Path) -> Stand:
    """Makes an executable that behaves as an interpreter with graph-tool whose worker runs the given lines."""

    def make(lines: str, beginning: str = FOUND) -> str:
        script, program = tmp_path / "stand_in.py", tmp_path / "python-with-graph-tool"
        script.write_text(beginning + textwrap.dedent(lines))
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
        program.chmod(0o755)
        return str(program)

    return make


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test asks its interpreters itself, and none is named from outside."""
    for name in (bridge.VARIABLE, "CONDA_PREFIX", "CONDA_EXE", "MAMBA_ROOT_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    bridge._ask.cache_clear()
    yield
    bridge._ask.cache_clear()


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process has ended (or is a zombie of a parent that is not ours) soon."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def fit(program: str, folder: Path, **more: Any) -> Any:
    return nested_block_model(CORRELATION, neighbours=1, interpreter=program, folder=folder, **more)


# What is given to the worker, and what becomes of what it gives


def test_nearest_neighbours_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    r = np.corrcoef(rng.standard_normal((30, 40)), rowvar=False)
    expected = set()
    for i in range(40):
        others = sorted((j for j in range(40) if j != i), key=lambda j: -r[i, j])[:5]
        expected |= {(min(i, j), max(i, j)) for j in others if r[i, j] > 0}
    assert [tuple(edge) for edge in nearest_edges(r, 5).tolist()] == sorted(expected)


def test_features_that_correlate_with_none_have_no_edges() -> None:
    r = np.zeros((4, 4))
    r[0, 1] = r[1, 0] = 0.5
    r[2, 3] = r[3, 2] = -0.5
    assert nearest_edges(r, 3).tolist() == [[0, 1]]
    with pytest.raises(NotAGraph, match="no two features correlate positively"):
        nearest_edges(np.eye(3), 2)


def test_more_neighbours_than_features_are_all_of_them() -> None:
    assert len(nearest_edges(np.full((5, 5), 0.5), 20)) == 10


def test_neighbours_grow_with_the_number_of_features() -> None:
    assert [bridge.usual_neighbours(n) for n in (2, 4, 50, 200, 500, 1000, 2000, 5000)] == [1, 3, 5, 7, 11, 16, 20, 20]


def test_complete_graph_has_each_pair_once() -> None:
    made = complete_edges(CORRELATION)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    assert made["edges"].tolist() == [list(pair) for pair in pairs]
    np.testing.assert_allclose(made["weights"], [np.log((1 + CORRELATION[p]) / (1 - CORRELATION[p])) for p in pairs], atol=1e-12)
    assert np.isfinite(complete_edges(np.ones((3, 3)))["weights"]).all()


def test_levels_that_repeat_one_another_are_dropped() -> None:
    labels = np.array([[7, 7, 3, 5], [7, 7, 3, 5], [1, 1, 0, 0], [2, 2, 9, 9], [0, 0, 0, 0], [4, 4, 4, 4]])
    assert distinct_levels(labels).tolist() == [[0, 0, 1, 2], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert distinct_levels(np.zeros((5, 3), dtype=np.int64)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("correlation", "more", "said"),
    [
        (np.zeros((3, 2)), {}, "shape"),
        (np.full((3, 3), np.nan), {}, "finite"),
        (CORRELATION, {"neighbours": 0}, "0 neighbours"),
        (np.eye(501), {"kind": NestedKind.COMPLETE}, "501 features"),
        (CORRELATION, {"kind": NestedKind.COMPLETE, "start": np.zeros(3, dtype=np.int64)}, "3 start labels for 4"),
        (CORRELATION, {"start": np.zeros(4, dtype=np.int64)}, "complete weighted graph only"),
        (CORRELATION, {"seconds": 0.0}, "0.0 s"),
    ],
)
def test_what_is_no_graph_is_refused(correlation: np.ndarray, more: dict[str, Any], said: str, stand_in: Stand) -> None:
    with pytest.raises(UserError, match=said):
        nested_block_model(correlation, interpreter=stand_in("leave([[0]])"), **more)


@pytest.mark.parametrize(
    ("source", "target", "weight", "layers", "said"),
    [
        ([0, 1], [1], None, None, "2 sources and 1 targets"),
        ([], [], None, None, "at least one"),
        ([0, 1], [1, 5], None, None, "nodes 0 to 5"),
        ([0, 1], [1, 2], [1.0], None, "1 weights for 2 edges"),
        ([0, 1], [1, 2], [1.0, np.inf], None, "finite"),
        ([0, 1], [1, 2], None, [0, 1], "2 layers for 3"),
    ],
)
def test_what_is_no_directed_graph_is_refused(source: list[int], target: list[int], weight: Any, layers: Any, said: str) -> None:
    as_array = lambda x: None if x is None else np.array(x)
    with pytest.raises(NotAGraph, match=said):
        nested_directed(np.array(source), np.array(target), as_array(weight), 3, layers=as_array(layers))


def test_signed_weights_are_normal_and_positive_ones_exponential(stand_in: Stand, tmp_path: Path) -> None:
    program = stand_in("leave([[0, 0, 1], [0, 0, 0]], finished=True, converged=True, out_of_time=False)")
    ends = np.array([0, 1]), np.array([1, 2])
    models = [nested_directed(*ends, weight, 3, interpreter=program).info["weights"] for weight in (None, np.ones(2), np.array([1.0, -1.0]))]
    assert models == [None, "real-exponential", "real-normal"]


# The interpreter


def test_one_that_is_named_is_the_only_one_tried(stand_in: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    program = stand_in("")
    found = find_graph_tool(program)
    assert found is not None
    assert (found.path, found.version, found.found) == (program, "9.9", "as asked")
    monkeypatch.setenv(bridge.VARIABLE, program)
    named = find_graph_tool()
    assert named is not None
    assert named.found == bridge.VARIABLE
    assert find_graph_tool("/nowhere/python") is None


def test_missing_says_what_was_tried_and_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "_usual", lambda: iter([(sys.executable, "this Python")]))
    with pytest.raises(GraphToolMissing) as raised:
        require_graph_tool()
    for said in (sys.executable, "this Python", "No module named 'graph_tool'", "conda-forge", "apt-get install python3-graph-tool", bridge.VARIABLE):
        assert said in str(raised.value)
    assert raised.value.exit_code == 2
    with pytest.raises(GraphToolMissing, match=r"/nowhere/python \(as asked\): No such file"):
        nested_block_model(CORRELATION, interpreter="/nowhere/python")


def test_conda_environments_are_tried_in_order(stand_in: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(stand_in(""))
    for place in ("active/bin", "root/envs/graph-tool/bin", "root/envs/gt/bin"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "python").symlink_to(program)
    monkeypatch.setenv("CONDA_EXE", str(tmp_path / "root/bin/conda"))
    found = find_graph_tool()
    assert found is not None
    assert (found.path, found.found) == (str(tmp_path / "root/envs/graph-tool/bin/python"), "conda's graph-tool")
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "active"))
    active = find_graph_tool()
    assert active is not None
    assert active.found == "the active conda environment"


@pytest.mark.slow
def test_an_interpreter_is_asked_once_and_not_for_ever(stand_in: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    program = stand_in("", f"import os, time\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\ntime.sleep(60)\n")
    monkeypatch.setattr(bridge, "ASK_SECONDS", 0.6)
    began = time.monotonic()
    assert find_graph_tool(program) is None
    assert find_graph_tool(program) is None
    assert time.monotonic() - began < 5
    asked = [int(pid) for pid in pids.read_text().split()]
    assert len(asked) == 1
    assert gone(asked[0])
    with pytest.raises(GraphToolMissing, match="no answer in"):
        require_graph_tool(program)


# The bridge


def test_result_of_a_worker_becomes_a_path(stand_in: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen.json"
    monkeypatch.setenv("PYTHONPATH", "/somewhere/of/ours")
    program = stand_in(f"""
        environment = {{name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}}
        Path({str(seen)!r}).write_text(json.dumps({{
            **environment, "leads": os.getsid(0) == os.getpid(), "edges": given["edges"].tolist(), "settings": settings,
            "arguments": sys.argv[1:], "kinds": [array.dtype.str for array in given.values()], "folder": os.getcwd(),
        }}))
        leave([[3, 3, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]], finished=True, converged=True, out_of_time=False)
    """)
    work = tmp_path / "work"
    work.mkdir()
    path = fit(program, work, seed=5)
    assert path.method == "nested-sbm"
    assert path.labels.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert path.description_length is None
    assert {key: path.info[key] for key in ("entropy", "sweeps", "seed", "graph_tool", "timed_out", "killed", "converged", "n_edges")} == {
        "entropy": 12.5, "sweeps": 3, "seed": 5, "graph_tool": "9.9", "timed_out": False, "killed": False, "converged": True, "n_edges": 2,
    }  # fmt: skip
    json.dumps(path.info)
    told = json.loads(seen.read_text())
    assert (told["PYTHONPATH"], told["OMP_NUM_THREADS"], told["OPENBLAS_NUM_THREADS"], told["leads"]) == (None, "1", "1", True)
    assert told["edges"] == [[0, 1], [2, 3]]
    assert told["settings"]["seed"] == 5
    assert told["arguments"][0] == "-I"
    assert told["kinds"] == ["<i8"]
    assert Path(told["folder"]).parent == work
    assert list(work.iterdir()) == []


STUBBORN = """
    import signal, subprocess
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    other = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
    {checkpoint}
    Path({pids!r}).write_text(f"{{os.getpid()}} {{other.pid}}")
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["leave([[0, 0, 1, 1], [0, 0, 0, 0]], finished=False)", ""])
def test_one_that_hangs_is_ended_with_all_it_started(checkpoint: str, stand_in: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses the first signal. What it left is the result; where it left nothing that is an error."""
    pids, work = tmp_path / "pids", tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(bridge, "GRACE_SECONDS", 0.2)
    program = stand_in(STUBBORN.format(checkpoint=checkpoint, pids=str(pids)))
    began = time.monotonic()
    if checkpoint:
        path = fit(program, work, seconds=3)
        assert path.n_blocks.tolist() == [2, 1]
        assert path.info["timed_out"]
        assert path.info["killed"]
        assert not path.info["converged"]
    else:
        with pytest.raises(GraphToolTimeout, match="after 3 s without a partition"):
            fit(program, work, seconds=3)
    assert 2.9 < time.monotonic() - began < 10
    assert all(gone(int(pid)) for pid in pids.read_text().split())
    assert list(work.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("raise ValueError('no such block')", "ended with status 1: .*ValueError: no such block"),
        ("leave([[0, 0, 1, 1]]); print('last words'); sys.stdout.flush(); os.kill(os.getpid(), 11)", "was ended by SIGSEGV: last words"),
        ("print('nothing done')", "ended without a result: nothing done"),
        ("", "it said nothing"),
    ],
)
def test_one_that_dies_is_quoted(lines: str, said: str, stand_in: Stand, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(GraphToolFailed, match=said):
        fit(stand_in(lines), work)
    assert list(work.iterdir()) == []


def test_an_interrupt_ends_it_too(stand_in: Stand, tmp_path: Path) -> None:
    pids, work = tmp_path / "pids", tmp_path / "work"
    work.mkdir()
    program = stand_in(STUBBORN.format(checkpoint="", pids=str(pids)).replace("SIG_IGN", "SIG_DFL"))

    def interrupt_when_it_runs() -> None:
        until = time.monotonic() + 20
        while not (pids.exists() and pids.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt_when_it_runs).start()
        with pytest.raises(KeyboardInterrupt):
            fit(program, work, seconds=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert all(gone(int(pid)) for pid in pids.read_text().split())
    assert list(work.iterdir()) == []


# graph-tool itself


@pytest.fixture
def installed() -> None:
    try:
        require_graph_tool()
    except GraphToolMissing as missing:
        pytest.skip(str(missing))


def agreement(labels: np.ndarray, truth: np.ndarray) -> float:
    known = truth >= 0
    return float(adjusted_mutual_info_score(truth[known], labels[known]))


@pytest.mark.graphtool
@pytest.mark.usefixtures("installed")
def test_planted_blocks_are_found_and_the_seed_decides(tmp_path: Path) -> None:
    made = planted(Planted.SAE, 200, seed=0, samples=3000)
    first, again = (nested_block_model(made.correlation(), seed=3, folder=tmp_path) for _ in range(2))
    assert agreement(first.labels[0], made.fine) > 0.95
    assert first.n_blocks[-1] == 1
    assert np.array_equal(first.labels, again.labels)
    assert first.info["entropy"] == again.info["entropy"]
    assert first.info["converged"]
    assert not first.info["timed_out"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.graphtool
@pytest.mark.usefixtures("installed")
def test_start_labels_are_refined_in_the_complete_graph() -> None:
    made = planted(Planted.GAUSS, 60, seed=1, samples=3000, noise_share=0.0)
    wrong = made.fine.copy()
    wrong[:6] = (wrong[:6] + 1) % (wrong.max() + 1)
    path = nested_block_model(made.correlation(), kind=NestedKind.COMPLETE, start=wrong, seconds=60)
    assert path.method == "weighted-sbm"
    assert agreement(path.labels[0], made.fine) > agreement(wrong, made.fine)
    assert path.n_blocks[0] <= 15


@pytest.mark.graphtool
@pytest.mark.usefixtures("installed")
def test_blocks_of_a_directed_graph_keep_to_their_layers() -> None:
    """Two communities through three layers; within the layers' blocks both are told apart."""
    layer, community = np.repeat([0, 1, 2], 40), np.tile([0, 1], 60)
    chance = np.where(layer[:, None] < layer, np.where(community[:, None] == community, 0.5, 0.02), 0)
    source, target = np.nonzero(np.random.default_rng(0).random((120, 120)) < chance)
    path = nested_directed(source, target, None, 120, layers=layer, seconds=60)
    assert path.method == "directed-sbm"
    assert adjusted_mutual_info_score(2 * layer + community, path.labels[0]) > 0.95
    assert all(len(set(layer[path.labels[0] == block])) == 1 for block in range(path.n_blocks[0]))


@pytest.mark.slow
@pytest.mark.graphtool
@pytest.mark.usefixtures("installed")
def test_a_call_that_does_not_return_is_cut_off(tmp_path: Path) -> None:
    """The first agglomerative sweep of 150,000 weights takes minutes: the time limit holds, and the first state is what there is."""
    made = planted(Planted.SAE, 550, seed=0, samples=2000)
    began = time.monotonic()
    path = nested_block_model(made.correlation(), kind=NestedKind.COMPLETE, largest=600, seconds=10, folder=tmp_path)
    assert time.monotonic() - began < 20
    assert path.info["timed_out"]
    assert path.info["phase"] in ("start", "quick")
    assert path.labels.shape[1] == 550
    assert not [p for p in psutil.process_iter(["cmdline"]) if any(str(tmp_path) in word for word in p.info["cmdline"] or [])]
    assert list(tmp_path.iterdir()) == []


ORPHANED = """
import sys
import numpy as np
from pathlib import Path
from featlas.analysis.graph_tool import NestedKind, nested_block_model
r = np.corrcoef(np.random.default_rng(0).standard_normal((2000, 500)), rowvar=False)
nested_block_model(r, kind=NestedKind.COMPLETE, seconds=300, folder=Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.graphtool
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the worker outlives its killed parent until its alarm")
@pytest.mark.usefixtures("installed")
def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHANED, str(tmp_path)])
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("*/checkpoint.json")) and parent.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        workers = [child.pid for child in psutil.Process(parent.pid).children()]
    finally:
        parent.kill()
        parent.wait()
    assert len(workers) == 1
    assert gone(workers[0])
