"""What a featlas process is doing at a moment, written where a kill cannot take it away.

A number of functions of the package are wrapped: each writes its phase into memory that the parent shares, one slot for the main thread and
one for the writing thread. A process that is killed leaves there what it was doing.
"""

import importlib
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

SLOT = 512

# module, function, and what is being done there
PHASES = (
    *(
        (module, f"{store}.{method}", phase)
        for module, store in (("embedded", "LadybugStore"), ("server", "Neo4jStore"))
        for method, phase in (
            ("__init__", "opening the graph"), ("merge_nodes", "nodes"), ("merge_edges", "edges"), ("commit_sequences", "sequence"),
            ("answer", "query"),
        )
    ),
    ("embedded", "_end_transaction", "commit"),
    ("embedded", "_release", "closing (checkpoint)"),
    ("statistics", "StatisticsStore.__init__", "opening the statistics"),
    ("statistics", "StatisticsStore.start_run", "start_run"),
    ("statistics", "StatisticsStore.save_state", "save_state"),
    ("statistics", "StatisticsStore.finish_run", "finish_run"),
    ("statistics", "StatisticsStore.close", "closing the statistics (checkpoint)"),
    ("statistics", "StatisticsStore.write_scores", "scores to DuckDB"),
    ("statistics", "StatisticsStore.write_effects", "effects to DuckDB"),
    ("statistics", "StatisticsStore.write_correlations", "correlations to DuckDB"),
    ("statistics", "StatisticsStore.rewrite", "rows to DuckDB"),
    ("labels", "write_labels", "labels to DuckDB"),
    ("labels", "apply_labels", "labels to the graph"),
    ("blocks", "forget_parcellation", "taking regions away"),
    ("runs", "record_counts", "closing the run"),
)


@dataclass
class Board:
    """The shared memory, and how to be told of a phase: `wanted` (phase, occurrence) is written to `bell` when it begins."""

    memory: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 2 * SLOT))

    def clear(self) -> None:
        self.memory[:] = b"\0" * len(self.memory)

    def phase(self) -> str:
        """What was going on: the writing thread's phase where it had one, else the main thread's, else the computation itself."""
        slots = [bytes(self.memory[i * SLOT : (i + 1) * SLOT]).rstrip(b"\0").decode(errors="replace") for i in (1, 0)]
        return next((slot for slot in slots if slot), "computing")

    def show(self, main: bool, text: str) -> None:
        encoded = text.encode()[: SLOT - 1]
        at = 0 if main else SLOT
        self.memory[at : at + SLOT] = encoded.ljust(SLOT, b"\0")


class Recorder:
    """Wraps the functions in a process that is about to run, and counts how often and how long each phase was gone through."""

    def __init__(self, board: Board, wanted: tuple[str, int] | None, bell: int) -> None:
        self.board, self.wanted, self.bell = board, wanted, bell
        self.counts: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._stacks: dict[int, list[str]] = {}

    def install(self) -> None:
        for module_name, path, phase in PHASES:
            module: Any = importlib.import_module(f"featlas.queries.{module_name}")
            owner, _, name = path.rpartition(".")
            holder = getattr(module, owner) if owner else module
            plain = holder.__dict__[name]
            wrapped = self._wrapped(plain, phase)
            setattr(holder, name, wrapped)
            if not owner:  # also where it was imported by its name
                for other in [m for n, m in sys.modules.items() if n.startswith("featlas") and getattr(m, name, None) is plain]:
                    setattr(other, name, wrapped)

    def _wrapped(self, plain: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(plain)
        def within(*arguments: Any, **named: Any) -> Any:
            stack = self._stacks.setdefault(threading.get_ident(), [])
            stack.append(phase)
            where = " › ".join(dict.fromkeys(stack))
            main = threading.current_thread() is threading.main_thread()
            self.board.show(main, where)
            began, number = time.monotonic(), self.counts.get(where, 0)
            self.counts[where] = number + 1
            if self.wanted == (where, number):
                os.write(self.bell, b"!")
            try:
                return plain(*arguments, **named)
            finally:
                self.seconds[where] = self.seconds.get(where, 0.0) + time.monotonic() - began
                stack.pop()
                self.board.show(main, " › ".join(dict.fromkeys(stack)))

        return within

    def save(self, path: Path) -> None:
        """{phase: [how often, seconds in all]}."""
        path.write_text(json.dumps({phase: [n, self.seconds.get(phase, 0.0)] for phase, n in self.counts.items()}))
