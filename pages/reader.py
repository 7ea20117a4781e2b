"""An atlas that many requests read, and that other processes may write in between.

The graph and the statistics are opened when a request wants them, shared by the requests that run, and let go a moment after the last:
an embedded database can be written by one process only when no other holds it, and what is opened shows what was there when it was
opened. Where the files have changed since, the next request opens them anew.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from ..queries.statistics import FILE_NAME, OlderStatisticsStore, StatisticsStore, StatisticsStoreHeld
from ..queries.store import GraphStore, graph_target, is_server, open_graph
from .source import PageSource

log = logging.getLogger(__name__)

IDLE_S = 2.0
WAIT_S = 0.5
"""Seconds that a page waits for statistics that another process writes."""


class _Closing(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closing)


class Shared(Generic[T]):
    """Something that is opened on demand and closed `idle_s` seconds after the last use; `stamp` changes when it must be opened anew."""

    def __init__(self, opening: Callable[[], T], stamp: Callable[[], object], idle_s: float = IDLE_S) -> None:
        self._opening, self._stamp, self._idle_s = opening, stamp, idle_s
        self._lock = threading.Lock()
        self._held: T | None = None
        self._seen: object = None
        self._users = 0
        self._timer: threading.Timer | None = None

    @contextmanager
    def use(self) -> Iterator[T]:
        """The thing, open; any number of threads may use it at a time."""
        held = self._take()
        try:
            yield held
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._timer = threading.Timer(self._idle_s, self.release)
                    self._timer.daemon = True
                    self._timer.start()

    @property
    def is_open(self) -> bool:
        """Whether it is held at the moment."""
        return self._held is not None

    def release(self) -> None:
        """Close it, unless someone uses it."""
        with self._lock:
            if not self._users:
                self._let_go()

    def _take(self) -> T:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if not self._users and self._held is not None and self._stamp() != self._seen:
                self._let_go()
            if self._held is None:
                self._seen = self._stamp()
                self._held = self._opening()
            self._users += 1
            return self._held

    def _let_go(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            held.close()


class AtlasReader:
    """The graph and the statistics of an atlas for reading. Opening it once at the start raises what `open_graph` raises."""

    def __init__(self, atlas: Path, graph: str | None = None, *, idle_s: float = IDLE_S) -> None:
        self.atlas = atlas
        self.target = graph_target(atlas, graph)
        files = [] if is_server(self.target) else [Path(self.target), Path(f"{self.target}.wal")]
        statistics = atlas / FILE_NAME
        self._graph: Shared[GraphStore] = Shared(lambda: open_graph(self.target, read_only=True), lambda: _stamp(files), idle_s)
        opening = lambda: StatisticsStore(atlas, read_only=True, wait_s=WAIT_S)
        self._statistics: Shared[StatisticsStore] = Shared(opening, lambda: _stamp([statistics]), idle_s)
        # One connection to the statistics, which is not for several threads at a time.
        self._reading = threading.Lock()
        with self.graph() as store:
            self.dialect = store.dialect

    def graph(self) -> AbstractContextManager[GraphStore]:
        """The graph, for as long as it is used; several threads may."""
        return self._graph.use()

    @contextmanager
    def source(self) -> Iterator[PageSource]:
        """The graph and the statistics, where there are any, for one thread at a time; without them while another process writes them."""
        with self._reading, ExitStack() as stack:
            store = stack.enter_context(self.graph())
            if not (self.atlas / FILE_NAME).exists():
                yield PageSource(store, None, self.atlas)
                return
            try:
                statistics = stack.enter_context(self._statistics.use())
            except (StatisticsStoreHeld, OlderStatisticsStore) as error:
                log.info("pages without statistics: %s", error)
                yield PageSource(store, None, self.atlas, held=True)
                return
            yield PageSource(store, statistics, self.atlas)

    @property
    def holds(self) -> bool:
        """Whether a database file is held at the moment."""
        return self._graph.is_open or self._statistics.is_open

    def close(self) -> None:
        """Let go of what nobody uses."""
        self._graph.release()
        self._statistics.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stamp(files: list[Path]) -> tuple[tuple[int, int] | None, ...]:
    """When files were last written, and how large they are: different when they have changed."""
    return tuple((file.stat().st_mtime_ns, file.stat().st_size) if file.exists() else None for file in files)
