"""Nested stochastic block models by graph-tool, which lives under a Python of its own and runs in a child process.

1. The interpreter that has graph-tool is found (`find_graph_tool`): the one that is named, or this one, conda's, the system's.
2. A graph is made here: the nearest-neighbour graph of a correlation, its complete weighted graph, or a directed effective graph.
3. `graph_tool_worker` gets it as plain arrays in a temporary folder, in a process group of its own, with one thread, and leaves checkpoints there.
4. A call into graph-tool may never return, and nothing inside that process can stop it: when the time is up its group is ended, and the last
   checkpoint is the result (`info["timed_out"]`). Without one it is `GraphToolTimeout`.
5. The levels become a `PartitionPath`: fine to coarse, without repetitions.

The entropy S in `info` is graph-tool's description length in nats, of the whole nested model: `description_length` of the single levels is None.
It chooses no level: on correlations, which share sampling noise, the least description length splits blocks (see docs/regions.md).

Source: Peixoto, "Hierarchical block structures and high-resolution model selection in large networks", Phys. Rev. X 4, 011047 (2014); weights:
Peixoto, "Nonparametric weighted stochastic block models", Phys. Rev. E 97, 012306 (2018).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FeatlasError, UserError
from .correlations import fisher
from .parcellation import FloatArray, IntArray, PartitionPath, by_size

VARIABLE = "FEATLAS_GRAPH_TOOL"
SYSTEM_PYTHONS = ("/usr/bin/python3", "/opt/homebrew/bin/python3", "/usr/local/bin/python3")
CONDA_FOLDERS = ("miniforge3", "mambaforge", "miniconda3", "anaconda3", "micromamba", ".conda")
ENVIRONMENTS = ("graph-tool", "gt")
INSTALL = (
    "install it with `conda create -n graph-tool -c conda-forge graph-tool` or `apt-get install python3-graph-tool`; "
    f"a Python elsewhere is named by {VARIABLE}"
)
WORKER = Path(__file__).with_name("graph_tool_worker.py")
ASK = "import graph_tool; print(graph_tool.__version__.split()[0])"
ASK_SECONDS = 30.0
"""How long an interpreter has to say that it has graph-tool: a cold import from a slow disk takes several seconds."""
GRACE_SECONDS = 2.0
"""Between the signal that a process may act on and the one that it cannot refuse."""
LARGEST_COMPLETE = 500
"""Features of a complete weighted graph, unless more are asked for: time grows with the square of it, and is bounded by the limit alone."""
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "BLIS", "VECLIB_MAXIMUM")}
LAST_LINES = 4  # of what a worker that died has said


class GraphToolMissing(UserError):
    """No interpreter that was tried can import graph_tool."""


class GraphToolTimeout(FeatlasError):
    """The time was up before there was any partition."""


class GraphToolFailed(FeatlasError):
    """The worker died, or left no result."""


class NotAGraph(UserError):
    """Input that graph-tool cannot partition: not finite, not square, without edges, out of range, too large."""


class NestedKind(StrEnum):
    """The graph that stands for a correlation matrix."""

    NEAREST = "nearest-neighbour graph"
    COMPLETE = "complete weighted graph"


@dataclass(frozen=True)
class Interpreter:
    """A Python that can import graph_tool. found: how it was found."""

    path: str
    version: str
    found: str


@dataclass(frozen=True)
class Attempt:
    """What asking one interpreter gave: its version of graph-tool, or why not."""

    path: str
    found: str
    version: str | None
    said: str


# 1. The interpreter ---------------------------------------------------------------------------------------------------------------------------


def find_graph_tool(interpreter: str | None = None) -> Interpreter | None:
    """The interpreter that has graph-tool, or None. `interpreter` (a path or a command), else $FEATLAS_GRAPH_TOOL, is the only one tried if given.

    Each is asked in a child process, once per process of ours.
    """
    return next((Interpreter(a.path, a.version, a.found) for a in attempts(interpreter) if a.version is not None), None)


def require_graph_tool(interpreter: str | None = None) -> Interpreter:
    """As `find_graph_tool`; raises `GraphToolMissing`, which says what was tried and how to install it."""
    found = find_graph_tool(interpreter)
    if found is None:
        tried = "; ".join(f"{attempt.path} ({attempt.found}): {attempt.said}" for attempt in attempts(interpreter))
        raise GraphToolMissing(f"graph-tool was not found. Tried {tried}. {INSTALL[0].upper()}{INSTALL[1:]}")
    return found


def attempts(interpreter: str | None = None) -> Iterator[Attempt]:
    """Each interpreter that comes into question, asked in turn; the caller stops at the first that has it."""
    for path, found in _candidates(interpreter):
        whole = str(Path(path).expanduser()) if path.startswith("~") else path
        yield Attempt(whole, found, *_ask(whole))


def _candidates(interpreter: str | None) -> Iterator[tuple[str, str]]:
    """(path, how it was found), each path once, in order."""
    if interpreter is not None:
        yield interpreter, "as asked"
        return
    if named := os.environ.get(VARIABLE):
        yield named, VARIABLE
        return
    seen = set()
    for path, found in _usual():
        if path not in seen and Path(path).exists():
            seen.add(path)
            yield path, found


def _usual() -> Iterator[tuple[str, str]]:
    yield sys.executable, "this Python"
    if active := os.environ.get("CONDA_PREFIX"):
        yield f"{active}/bin/python", "the active conda environment"
    roots = [os.environ.get("MAMBA_ROOT_PREFIX"), os.environ.get("CONDA_EXE") and str(Path(os.environ["CONDA_EXE"]).parents[1])]
    roots += [str(Path.home() / name) for name in CONDA_FOLDERS]
    for root in filter(None, [*roots, "/opt/conda"]):
        yield from ((f"{root}/envs/{name}/bin/python", f"conda's {name}") for name in ENVIRONMENTS)
    yield from ((path, "the system's Python") for path in SYSTEM_PYTHONS)


@cache
def _ask(path: str) -> tuple[str | None, str]:
    """The version of graph-tool under an interpreter, and what it said instead where there is none."""
    with tempfile.TemporaryFile() as said:
        try:
            with _child([path, "-I", "-c", ASK], said) as process:
                code = process.wait(ASK_SECONDS)
        except subprocess.TimeoutExpired:
            return None, f"no answer in {ASK_SECONDS:.0f} s"
        except OSError as error:
            return None, error.strerror or str(error)
        lines = _last_lines(said)
    return (lines[-1], "") if code == 0 and lines else (None, lines[-1] if lines else _ending(code))


# 2. The bridge --------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Job:
    """What the worker is to do: arrays and settings as its module says. seconds: for all of it, the start of its Python included."""

    arrays: Mapping[str, NDArray[Any]]
    settings: Mapping[str, Any]
    seconds: float
    folder: Path | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """labels: (n_levels, n) as graph-tool has them. told: the checkpoint's own words. killed: the time limit ended the worker."""

    labels: IntArray
    told: Mapping[str, Any]
    killed: bool
    seconds: float


def run_worker(interpreter: Interpreter, job: Job) -> Outcome:
    """Run the worker in a temporary folder (made in `job.folder`), which is gone at the end, as is the worker, whatever happens.

    Raises `GraphToolTimeout` where the time was up before the first checkpoint, `GraphToolFailed` where the worker died.
    """
    if not job.seconds > 0:
        raise UserError(f"a time limit of {job.seconds} s: a positive number of seconds is needed")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="featlas-graph-tool-", dir=job.folder, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _write(folder, job)
        with (folder / "said.txt").open("w+b") as said:
            killed = False
            with _child([interpreter.path, "-I", str(WORKER), str(folder)], said, folder) as process:
                try:
                    code = process.wait(max(job.seconds - (time.monotonic() - began), 0.01))
                except subprocess.TimeoutExpired:
                    killed = True
            lines = _last_lines(said)
        if not killed and code != 0:
            raise GraphToolFailed(f"graph-tool's worker under {interpreter.path} {_ending(code)}: {' / '.join(lines) or 'it said nothing'}")
        found = _read(folder)
    if found is None and killed:
        raise GraphToolTimeout(f"graph-tool was stopped after {job.seconds:g} s without a partition: allow more time, or take the dense block model")
    if found is None:
        raise GraphToolFailed(f"graph-tool's worker under {interpreter.path} ended without a result: {' / '.join(lines) or 'it said nothing'}")
    return Outcome(*found, killed=killed, seconds=time.monotonic() - began)


def _write(folder: Path, job: Job) -> None:
    """The worker's input: input.npz of plain arrays, which an older numpy reads too, and settings.json."""
    np.savez(folder / "input.npz", **job.arrays)  # type: ignore[arg-type]
    own = {"seconds": job.seconds, "kill_after": job.seconds + 2 * GRACE_SECONDS, "began": time.time(), "parent": os.getpid()}
    (folder / "settings.json").write_text(json.dumps({**job.settings, **own}))


def _read(folder: Path) -> tuple[IntArray, Mapping[str, Any]] | None:
    """The last checkpoint: labels and what was said of them."""
    path = folder / "checkpoint.json"
    if not path.exists():
        return None
    told = json.loads(path.read_text())
    with np.load(folder / told["state"], allow_pickle=False) as arrays:
        return arrays["labels"].astype(np.int64), told


@contextlib.contextmanager
def _child(command: list[str], said: IO[bytes], folder: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, with one thread and nothing of our Python's environment; its group is gone when this is left.

    -I in the command keeps the folder of the script, whose module graph_tool is not graph-tool, and the user's packages out of its path.
    """
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ} | ONE_THREAD
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: asked first, then without asking. One that has ended by itself is left alone."""
    if process.poll() is not None:
        return
    try:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:  # an interrupt while it is being asked does not spare it
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], which: signal.Signals) -> None:
    """A signal to the group, whose number is the process's own: it began a session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the second of a group of zombies
        os.killpg(process.pid, which)


def _last_lines(said: IO[bytes]) -> list[str]:
    said.seek(0)
    return [line for line in said.read().decode(errors="replace").splitlines() if line.strip()][-LAST_LINES:]


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


# 3. The models --------------------------------------------------------------------------------------------------------------------------------


def nested_block_model(
    correlation: FloatArray,
    *,
    kind: NestedKind = NestedKind.NEAREST,
    neighbours: int | None = None,
    degree_corrected: bool = True,
    seed: int = 0,
    seconds: float = 120.0,
    interpreter: str | None = None,
    folder: Path | None = None,
    start: IntArray | None = None,
    largest: int = LARGEST_COMPLETE,
) -> PartitionPath:
    """Nested stochastic block model of n features by graph-tool. correlation: (n, n), symmetric; the diagonal is ignored.

    NEAREST: without weights, on the graph that joins each feature to its `neighbours` most correlated ones (see `nearest_edges`;
    `usual_neighbours` unless given). COMPLETE: on all pairs, with 2 · artanh(r) as normally distributed weights, and at most n / 4 blocks (see
    `graph_tool_worker`); never degree-corrected, as all have one degree; refused for more than `largest` features. It begins from the blocks of the
    nearest-neighbour graph, then searches by itself; from start, (n,) labels, if given, which are refined alone.
    folder: where the temporary folder is made. Raises `NotAGraph`, `GraphToolMissing`, `GraphToolTimeout`, `GraphToolFailed`.
    """
    n = _checked(correlation)
    near = usual_neighbours(n) if neighbours is None else neighbours
    settings: dict[str, Any] = {"n": n, "directed": False, "seed": seed % 2**32}
    if kind is NestedKind.NEAREST:
        if start is not None:
            raise NotAGraph("start labels are refined in the complete weighted graph only")
        arrays = {"edges": nearest_edges(correlation, near)}
        settings |= {"degree_corrected": degree_corrected, "most_blocks": n, "quick_first": False, "refine_sweeps": 0}
    else:
        if n > largest:
            raise NotAGraph(f"{n} features for a complete weighted graph of at most {largest}: take the nearest-neighbour graph, or raise the limit")
        first = {"near": nearest_edges(correlation, near)} if start is None else {"start": _labels(start, n, "start labels")}
        arrays = complete_edges(correlation) | first
        settings |= {"degree_corrected": False, "most_blocks": max(n // 4, 1), "weight_model": "real-normal"}
        settings |= {"quick_first": True, "refine_sweeps": 100}
    method = "nested-sbm" if kind is NestedKind.NEAREST else "weighted-sbm"
    more = {"graph": kind.value, "neighbours": near}
    return _fit(method, Job(arrays, settings, seconds, folder), interpreter, more)


def nested_directed(
    source: IntArray,
    target: IntArray,
    weight: FloatArray | None,
    n: int,
    *,
    layers: IntArray | None = None,
    seed: int = 0,
    seconds: float = 120.0,
    interpreter: str | None = None,
    degree_corrected: bool = True,
    folder: Path | None = None,
) -> PartitionPath:
    """Nested stochastic block model of a directed graph of n nodes. source, target: (m,) nodes 0 … n − 1 of its edges.

    weight: (m,), modelled as exponential where all are positive (magnitudes) and as normal otherwise; None leaves them out, which is several times
    faster. layers: (n,) labels; no block of the finest level then joins two of them, those above may. Raises as `nested_block_model`.
    """
    if len(source) != len(target) or not len(source):
        raise NotAGraph(f"{len(source)} sources and {len(target)} targets: as many of one as of the other are needed, at least one")
    edges = np.stack([source, target], axis=1).astype(np.int64)
    if edges.min() < 0 or edges.max() >= n:
        raise NotAGraph(f"edges join nodes {edges.min()} to {edges.max()} in a graph of {n}")
    arrays: dict[str, NDArray[Any]] = {"edges": edges}
    settings: dict[str, Any] = {"n": n, "directed": True, "seed": seed % 2**32, "degree_corrected": degree_corrected, "quick_first": True}
    settings |= {"most_blocks": n, "refine_sweeps": 20}
    if weight is not None:
        if len(weight) != len(edges) or not np.isfinite(weight).all():
            raise NotAGraph(f"{len(weight)} weights for {len(edges)} edges: one finite number for each is needed")
        arrays["weights"] = weight.astype(np.float64)
        settings["weight_model"] = "real-exponential" if (weight > 0).all() else "real-normal"
    if layers is not None:
        arrays["layers"] = _labels(layers, n, "layers")
    more = {"weights": settings.get("weight_model"), "layers": layers is not None}
    return _fit("directed-sbm", Job(arrays, settings, seconds, folder), interpreter, more)


def _checked(correlation: FloatArray) -> int:
    """The number of features of a correlation matrix; raises `NotAGraph` for what is none."""
    n = len(correlation)
    if correlation.shape != (n, n) or n < 2 or not np.isfinite(correlation).all():
        raise NotAGraph(f"a correlation of shape {correlation.shape}: a square matrix of finite numbers for at least two features is needed")
    return n


def _labels(labels: IntArray, n: int, what: str) -> IntArray:
    if len(labels) != n:
        raise NotAGraph(f"{len(labels)} {what} for {n} nodes")
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def usual_neighbours(n: int) -> int:
    """√n / 2, from 5 to 20: about half of a block where there are √n blocks.

    With more neighbours than a block has members the fine blocks are joined; with fewer the coarse levels fade (docs/regions.md).
    """
    return max(1, min(n - 1, max(5, min(20, round(n**0.5 / 2)))))


def nearest_edges(correlation: FloatArray, neighbours: int) -> IntArray:
    """Edges (m, 2) of the nearest-neighbour graph: i and j are joined if either is among the other's `neighbours` of greatest r, each pair once.

    Only positive r counts: a feature without any (a constant one) stays without edges, rather than being joined to the first ones in order.
    """
    n = len(correlation)
    if neighbours < 1:
        raise NotAGraph(f"{neighbours} neighbours: at least one is needed")
    k = min(neighbours, n - 1)
    near = np.array(correlation, dtype=np.float64)
    np.fill_diagonal(near, -np.inf)
    chosen = np.argpartition(near, n - k, axis=1)[:, n - k :]  # (n, k)
    positive = np.take_along_axis(near, chosen, axis=1) > 0
    pairs = np.stack([np.repeat(np.arange(n), k), chosen.ravel()], axis=1)[positive.ravel()]
    if not len(pairs):
        raise NotAGraph("no two features correlate positively: there is no nearest-neighbour graph")
    return np.unique(np.sort(pairs, axis=1), axis=0).astype(np.int64)


def complete_edges(correlation: FloatArray) -> dict[str, NDArray[Any]]:
    """All pairs (m, 2) and their weights 2 · artanh(r) (m,)."""
    above = np.triu_indices(len(correlation), 1)
    return {"edges": np.stack(above, axis=1).astype(np.int64), "weights": fisher(correlation)[above]}


def _fit(method: str, job: Job, interpreter: str | None, more: Mapping[str, Any]) -> PartitionPath:
    """Run a job and make its levels a path; `more` goes into its info."""
    found = require_graph_tool(interpreter)
    outcome = run_worker(found, job)
    told = outcome.told
    info = {
        "entropy": told["entropy"], "phase": told["phase"], "sweeps": told["sweeps"], "seconds": round(outcome.seconds, 3),
        "time_limit": job.seconds, "timed_out": outcome.killed or told.get("out_of_time", False), "killed": outcome.killed,
        "converged": told.get("converged", False), "seed": job.settings["seed"], "graph_tool": told["graph_tool"],
        "interpreter": found.path, "n_edges": len(job.arrays["edges"]), "degree_corrected": job.settings["degree_corrected"],
    }  # fmt: skip
    return PartitionPath(method, distinct_levels(outcome.labels), None, info | dict(more))


def distinct_levels(labels: IntArray) -> IntArray:
    """Levels (n_levels, n), fine to coarse, without those that repeat the one before; blocks renumbered, larger ones first."""
    kept: list[IntArray] = []
    for level in labels:
        renamed = by_size(level)
        if not kept or renamed.max() != kept[-1].max():  # each level is a coarsening: as many blocks are the same blocks
            kept.append(renamed)
    return np.stack(kept)
