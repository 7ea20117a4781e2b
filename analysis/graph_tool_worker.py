"""Nested stochastic block models by graph-tool, run by the Python that has it: `python -I graph_tool_worker.py FOLDER` (see `graph_tool`).

1. FOLDER holds settings.json and input.npz: n nodes, edges (m, 2), optionally weights (m,), layers (n,), start labels (n,), near edges.
2. A state is built and refined until nothing lowers its description length, or until the time is nearly up:
   - quick_first: a first state and a few multiflip sweeps of it, so that there is something to return. It is the start labels, or the blocks of the
     graph of `near` edges (p, 2) without weights, which are found in seconds, or one block;
   - without start labels: agglomerative multilevel sweeps, level by level, up and down the hierarchy. This is graph-tool's
     `minimize_nested_blockmodel_dl`, whose loop is taken apart here so that there is a checkpoint after each level;
   - refine_sweeps: multiflip sweeps at zero temperature from the best so far.
3. After each step the partition of least description length so far is left in FOLDER: state-K.npz, then checkpoint.json, which names it, by rename.
   Whoever kills the process at any moment finds a whole checkpoint or none.

States of more than `most_blocks` finest blocks are passed over. With weights that are normally distributed within a pair of blocks, the description
length has no lower bound as blocks become single nodes: one weight has no variance. graph-tool does end there at times.

A call into graph-tool may never return, so the process ends itself too: by an alarm whose default action needs no Python to run, and, on Linux,
when its parent dies. Only numpy and graph-tool are imported; the file works with Python 3.9.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import graph_tool
import graph_tool.inference
import numpy as np

Arrays = Mapping[str, np.ndarray]
ZERO_TEMPERATURE: Mapping[str, Any] = {"beta": np.inf}
QUICK_SWEEPS = 10  # of the first state
CHUNK = 5  # multiflip sweeps between checkpoints
QUIET_CHUNKS = 2  # so many in a row without gain end the refinement
GAIN = 1e-5  # a chunk that lowers the description length by a smaller share of it is without gain
RESERVE = 0.95  # of the time: no step begins that is expected to end later
SIGKILL_AT_PARENTS_DEATH = 1  # prctl's PR_SET_PDEATHSIG


class OutOfTime(Exception):
    """The next step would end after the time is up."""


def end_with(parent: int, seconds: float) -> None:
    """Have the operating system end this process when its time is up or its parent is gone, even in the middle of a call."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SIGKILL_AT_PARENTS_DEATH, signal.SIGKILL)
    os.kill(parent, 0)  # raises where it died before that was set


def build(settings: Mapping[str, Any], given: Arrays) -> tuple[Any, dict[str, Any]]:
    """The graph of the input and the arguments of its state."""
    g = graph_tool.Graph(directed=settings["directed"])
    g.add_vertex(settings["n"])
    g.add_edge_list(given["edges"])
    arguments: dict[str, Any] = {"deg_corr": settings["degree_corrected"]}
    if "weights" in given:
        weights = g.new_edge_property("double")
        weights.a = given["weights"]
        arguments.update(recs=[weights], rec_types=[settings["weight_model"]])
    if "layers" in given:
        arguments["clabel"] = given["layers"]  # as pclabel, with levels above that have none, the entropy becomes not a number
    return g, arguments


def new_state(g: Any, arguments: Mapping[str, Any], start: np.ndarray | None = None) -> Any:
    """One block (one a layer, where there are layers), or the start labels under one block."""
    levels: list[np.ndarray] | None = None
    if start is not None:
        levels = [start] + [np.zeros(1, dtype=np.int64)] * int(np.ceil(np.log2(max(g.num_vertices(), 2))))
    return nested(g, levels, arguments)


def nested(g: Any, levels: list[np.ndarray] | None, arguments: Mapping[str, Any]) -> Any:
    """A state of given levels. Where there are layers, only the finest blocks keep to one: those above may join blocks of several."""
    above: dict[str, None] = {"clabel": None, "pclabel": None} if "clabel" in arguments else {}
    return graph_tool.inference.NestedBlockState(g, bs=levels, state_args=arguments, hstate_args=above)


def projected(state: Any) -> np.ndarray:
    """Blocks of the nodes at each level, (n_levels, n) int64, fine to coarse."""
    blocks = [np.asarray(b, dtype=np.int64) for b in state.get_bs()]
    labels: list[np.ndarray] = [blocks[0]]
    for above in blocks[1:]:
        labels.append(above[labels[-1]])
    return np.stack(labels)


class Checkpoints:
    """The best state so far, in the folder; and the clock."""

    def __init__(self, folder: Path, seconds: float, most_blocks: int) -> None:
        self.folder, self.began, self.deadline = folder, time.monotonic(), RESERVE * seconds
        self.most_blocks, self.out_of_time = most_blocks, False
        self.count, self.sweeps, self.best = 0, 0, np.inf
        self.blocks: list[np.ndarray] | None = None
        self.longest: dict[str, float] = {}

    def step(self, kind: str, run: Callable[[], Any]) -> Any:
        """Run one step unless it is expected to end too late, by the longest of its kind so far. Returns what it returns."""
        started = time.monotonic()
        if started - self.began + self.longest.get(kind, 0.0) > self.deadline:
            self.out_of_time = True
            raise OutOfTime(kind)
        found = run()
        self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - started)
        self.sweeps += 1
        return found

    def keep(self, state: Any, phase: str) -> None:
        """Write the state if it is the best so far, and no heap of single nodes."""
        entropy = float(state.entropy())
        if not entropy < self.best or state.levels[0].get_nonempty_B() > self.most_blocks:
            return
        self.best, self.blocks = entropy, state.get_bs()
        self.write(projected(state), phase)

    def write(self, labels: np.ndarray, phase: str) -> None:
        """state-K.npz first, checkpoint.json by rename, then the one before goes."""
        self.count += 1
        name = f"state-{self.count}.npz"
        np.savez(self.folder / name, labels=labels)
        told = {"state": name, "entropy": self.best, "phase": phase, "sweeps": self.sweeps, "graph_tool": graph_tool.__version__.split()[0]}
        self.tell(told, finished=False)
        with contextlib.suppress(FileNotFoundError):
            (self.folder / f"state-{self.count - 1}.npz").unlink()

    def finish(self, **ending: bool) -> None:
        """Mark the last checkpoint as the result."""
        told = json.loads((self.folder / "checkpoint.json").read_text())
        self.tell(told, finished=True, sweeps=self.sweeps, **ending)

    def tell(self, told: Mapping[str, Any], **more: Any) -> None:
        """checkpoint.json, whole at any moment."""
        whole = self.folder / "checkpoint.json.new"
        whole.write_text(json.dumps(dict(told, seconds=time.monotonic() - self.began, **more)))
        whole.replace(self.folder / "checkpoint.json")


def multilevel(state: Any, checkpoints: Checkpoints, *, keep: bool = True) -> bool:
    """Agglomerative sweeps of one level at a time: a level up while the description length falls, a level down when it does not.

    Returns whether there was time for all of it: what is left of it suffices for the shorter sweeps that follow.
    """
    level = 0
    while level >= 0:
        kind, bound = ("multilevel at 0", {"B_max": checkpoints.most_blocks}) if level == 0 else ("multilevel above", {})
        sweep: dict[str, Any] = {**ZERO_TEMPERATURE, **bound, "ls": [level], "niter": 1, "psingle": 0}
        try:
            change = checkpoints.step(kind, partial(state.multilevel_mcmc_sweep, **sweep))[0]
        except OutOfTime:
            return False
        if keep and (level == 0 or change < -1e-8):
            checkpoints.keep(state, "multilevel")
        level = level - 1 if abs(change) < 1e-8 else min(level + 1, len(state.levels) - 1)
    return True


def multiflip(state: Any, checkpoints: Checkpoints, phase: str, sweeps: int) -> bool:
    """Merges, splits and single moves of blocks at all levels, at zero temperature, until chunks of sweeps bring nothing more.

    Returns whether they came to that.
    """
    quiet = 0
    for _ in range(sweeps // CHUNK):
        change = 0.0
        for _ in range(CHUNK):
            change += checkpoints.step("multiflip", partial(state.multiflip_mcmc_sweep, niter=1, **ZERO_TEMPERATURE))[0]
        checkpoints.keep(state, phase)
        quiet = quiet + 1 if -change < GAIN * abs(checkpoints.best) else 0
        if quiet == QUIET_CHUNKS:
            return True
    return False


def near_blocks(settings: Mapping[str, Any], given: Arrays, checkpoints: Checkpoints) -> np.ndarray:
    """The finest blocks of the graph of near edges: a state of another graph, whose description length does not compare, so it is not kept."""
    g, arguments = build({**settings, "degree_corrected": True}, {"edges": given["near"]})
    state = new_state(g, arguments)
    multilevel(state, checkpoints, keep=False)
    return projected(state)[0]


def fit(settings: Mapping[str, Any], given: Arrays, checkpoints: Checkpoints) -> bool:
    """Step 2 of the module: the best state is in the checkpoints. Returns whether all of it came to its own end."""
    g, arguments = build(settings, given)
    start = given.get("start")
    converged = True
    if settings["quick_first"]:
        checkpoints.keep(new_state(g, arguments, start), "start")
        first = new_state(g, arguments, near_blocks(settings, given, checkpoints) if "near" in given else start)
        checkpoints.keep(first, "start")
        multiflip(first, checkpoints, "quick", QUICK_SWEEPS)
    if start is None:
        converged = multilevel(new_state(g, arguments), checkpoints)
    if settings["refine_sweeps"] and checkpoints.count:
        converged &= multiflip(nested(g, checkpoints.blocks, arguments), checkpoints, "refined", settings["refine_sweeps"])
    return converged


def main(folder: Path) -> None:
    """Read the input, fit, leave the result in the folder."""
    settings = json.loads((folder / "settings.json").read_text())
    end_with(settings["parent"], settings["kill_after"])
    graph_tool.openmp_set_num_threads(1)
    graph_tool.seed_rng(settings["seed"])
    np.random.seed(settings["seed"])  # noqa: NPY002 - graph-tool draws its bisections from it
    with np.load(folder / "input.npz", allow_pickle=False) as arrays:
        given = {name: arrays[name] for name in arrays.files}
    checkpoints = Checkpoints(folder, settings["seconds"] - (time.time() - settings["began"]), settings["most_blocks"])
    try:
        converged = fit(settings, given, checkpoints)
    except OutOfTime:
        converged = False
    if checkpoints.count:
        checkpoints.finish(converged=converged, out_of_time=checkpoints.out_of_time)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
