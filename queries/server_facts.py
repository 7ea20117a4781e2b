"""What a Neo4j server says of itself: version, how fast it answers, whether its database may be written. Nothing is changed there."""

import time
from dataclasses import dataclass

from .store import GraphStore

ASKED = 5  # times, of which the median counts


@dataclass(frozen=True)
class ServerFacts:
    """latency: median seconds of one answer. access: of the database, as the server says it; None where it does not."""

    version: str
    edition: str
    latency: float
    access: str | None

    @property
    def writable(self) -> bool:
        """Whether writing is possible as far as the database goes; where that is not said, it is taken to be."""
        return self.access in (None, "read-write")


def server_facts(store: GraphStore) -> ServerFacts:
    """Ask an open store of a server."""
    kernel = store.query("CALL dbms.components() YIELD name, versions, edition RETURN versions[0] AS version, edition ORDER BY name LIMIT 1")
    seconds = []
    for _ in range(ASKED):
        began = time.monotonic()
        store.query("RETURN 1 AS one")
        seconds.append(time.monotonic() - began)
    access = store.query("SHOW HOME DATABASE YIELD access RETURN access AS access")
    said = access["access"][0] if access.height else None
    return ServerFacts(str(kernel["version"][0]), str(kernel["edition"][0]), sorted(seconds)[ASKED // 2], said)
