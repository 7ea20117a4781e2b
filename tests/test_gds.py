"""Communities by Graph Data Science: what is sent to a server, and on a real server with the library the same division as here."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.analysis.partitioning import ami
from featlas.errors import UserError
from featlas.queries.gds import GdsOptions, NoGds, NothingProjected, connected, gds_communities, require_gds
from featlas.queries.neo4j_distribution import DownloadFailed, gds_plugin
from featlas.queries.neo4j_server import ServerInfo, down, up
from featlas.queries.store import ServerCredentials, open_graph

from .servers import THROWAWAY


class Recorded:
    """A client that keeps what it is sent and answers from a list."""

    def __init__(self, *answers: dict[str, list]) -> None:
        self.answers, self.sent, self.closed = list(answers), [], 0

    def run_cypher(self, query: str, params: dict | None = None) -> dict[str, list]:
        self.sent.append((query, params))
        if "graph.drop" in query:
            return {"graphName": []}
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.closed += 1


def test_a_graph_is_projected_divided_and_dropped() -> None:
    client = Recorded({"nodes": [3], "edges": [4]}, {"key": ["b", "a", "c"], "community": [7, 7, 2]})
    found = gds_communities(lambda: client, "r'1", GdsOptions(weight="weight", threshold=0.5, kinds=("feature", "error"), resolution=2, seed=4))
    assert found.rows() == [("a", 7), ("b", 7), ("c", 2)]
    project, divide, drop = client.sent
    assert project[1] == {"name": project[1]["name"], "run": "r'1", "kinds": ["feature", "error"], "threshold": 0.5}
    assert "r'1" not in project[0]  # users' text is a parameter
    assert "abs(e.weight)" in project[0]
    assert "gds.leiden.stream" in divide[0]
    assert divide[1] == {"name": project[1]["name"], "resolution": 2.0, "seed": 4}
    assert drop[1] == {"name": project[1]["name"]}
    assert client.closed == 1


def test_the_projection_is_dropped_whatever_happens() -> None:
    failing = Recorded({"nodes": [3], "edges": [4]}, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        gds_communities(lambda: failing, "r", GdsOptions())
    assert "graph.drop" in failing.sent[-1][0]
    assert failing.closed == 1
    empty = Recorded({"nodes": [0], "edges": [0]})
    with pytest.raises(NothingProjected, match="run 'r' has no edge between feature nodes"):
        gds_communities(lambda: empty, "r", GdsOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (GdsOptions(method="infomap"), "divides by leiden or louvain, not infomap"),
        (GdsOptions(method="louvain", resolution=2.0), "Louvain of Graph Data Science has none"),
        (GdsOptions(weight="n"), "'n' is no weight"),
    ],
)
def test_what_the_library_does_not_have(options: GdsOptions, said: str) -> None:
    with pytest.raises(UserError, match=said):
        options.check()


def test_an_embedded_graph_has_no_library(tmp_path: Path) -> None:
    with open_graph(tmp_path / "graph.lbug") as store, pytest.raises(NoGds, match="featlas neo4j up --gds"):
        require_gds(store)


@pytest.mark.neo4j
def test_a_server_without_the_library_is_told_from_one_with(clean_neo4j) -> None:
    credentials = ServerCredentials(clean_neo4j.username, clean_neo4j.password)
    with open_graph(clean_neo4j.uri, credentials=credentials) as store, pytest.raises(NoGds, match="has no Graph Data Science library"):
        require_gds(store)


@pytest.fixture(scope="module")
def with_gds(neo4j_jars: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerInfo]:
    """A server of its own with the real library, in its open edition."""
    try:
        gds_plugin()
    except DownloadFailed as error:
        pytest.skip(f"no Graph Data Science here: {error}")
    home = tmp_path_factory.mktemp("gds")
    info = up(home, replace(THROWAWAY, gds=True, heap_mb=768))
    yield info
    down(home)
    assert any(path.is_symlink() for path in (home / "plugins").iterdir())


@pytest.mark.neo4j
@pytest.mark.slow
def test_the_real_library_finds_planted_communities(with_gds: ServerInfo) -> None:
    pytest.importorskip("graphdatascience")
    rng = np.random.default_rng(0)
    n, truth = 120, np.arange(120) % 3
    layer = np.repeat(np.arange(4), 30)
    pairs = [
        (i, j) for i in range(n) for j in range(n) if layer[i] < layer[j] and rng.random() < (0.4 if truth[i] == truth[j] else 0.02)
    ]
    credentials = ServerCredentials(with_gds.username, with_gds.password)
    with open_graph(with_gds.uri, credentials=credentials) as store:
        require_gds(store)
        keys = [f"f{i:03d}" for i in range(n)]
        kinds = ["error" if i % 30 == 29 else "feature" for i in range(n)]
        store.merge_nodes("Feature", pl.DataFrame({"key": keys, "site": [f"resid_{i}" for i in layer], "kind": kinds}))
        for run, share in (("r1", pairs), ("other", [(i, j) for i in range(30) for j in range(30, 60)])):
            frame = pl.DataFrame({"source": [keys[i] for i, _ in share], "target": [keys[j] for _, j in share]})
            store.merge_edges("INFLUENCES", frame.with_columns(run=pl.lit(run), weight=pl.lit(-1.0), abs_weight=pl.lit(1.0)))
    for method in ("leiden", "louvain"):
        options = GdsOptions(method=method)
        found = gds_communities(lambda: connected(with_gds.uri, credentials), "r1", options)
        features = [i for i in range(n) if kinds[i] == "feature"]
        assert found["key"].to_list() == [keys[i] for i in features]
        assert ami(found["community"].to_numpy(), truth[features]) > 0.95
        again = gds_communities(lambda: connected(with_gds.uri, credentials), "r1", options)
        assert again.equals(found)
    with pytest.raises(NothingProjected):
        gds_communities(lambda: connected(with_gds.uri, credentials), "none", GdsOptions())
