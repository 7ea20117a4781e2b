"""The Neo4j server of a campaign: a real one, that may be stopped, killed and started again on the same ports and the same data."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import neo4j
from featlas.queries.neo4j_server import ServerOptions, down, status, up

from tests.servers import WIPE

from .forks import Forks
from .jobs import Command, Place
from .kills import Unexpected


class Server:
    """A context manager; the home folder is its own, with all data."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.info = up(home, self._options(0, 0))
        self.password = self.info.password
        ports = urlsplit(self.info.uri).port or 0, urlsplit(self.info.http_url).port or 0
        self.options = self._options(*ports)

    @staticmethod
    def _options(bolt_port: int, http_port: int) -> ServerOptions:
        return ServerOptions(bolt_port=bolt_port, http_port=http_port, heap_mb=512, pagecache_mb=128, throwaway=True, start_limit_s=300)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        down(self.home)

    @property
    def port(self) -> int:
        return self.options.bolt_port

    def stop(self) -> None:
        down(self.home)

    def kill(self) -> None:
        """SIGKILL, to the process that is this home's server."""
        running = status(self.home)
        if running is not None:
            os.kill(running.pid, signal.SIGKILL)
        down(self.home)

    def start(self) -> None:
        self.info = up(self.home, self.options)

    def place(self, atlas: Path, port: int | None = None) -> Place:
        """An atlas whose graph is here; by another port, that of a proxy."""
        uri = self.info.uri if port is None else f"bolt://127.0.0.1:{port}"
        return Place(atlas, uri, self.info.username, self.password)

    @contextmanager
    def _session(self) -> Iterator[neo4j.Session]:
        auth = self.info.username, self.password
        with neo4j.GraphDatabase.driver(self.info.uri, auth=auth, notifications_min_severity="OFF") as driver, driver.session() as session:
            yield session

    def sequences(self) -> int:
        """How many sequences are committed."""
        with self._session() as session:
            return int(session.run("MATCH ()-[m:ON_SEQUENCE]->() RETURN count(m)").single(strict=True)[0])

    def wipe(self) -> None:
        with self._session() as session:
            session.run(WIPE).consume()

    def refill(self, forks: Forks, commands: list[Command], place: Place) -> None:
        """Empty the graph, and run the commands that make what a job begins with."""
        self.wipe()
        for command in commands:
            ended = forks.run(*command, *place.options, environment=place.environment)
            if ended.code != 0:
                raise Unexpected(f"{' '.join(map(str, command[:2]))} ended with {ended.code}: {ended.err[-500:]}")
