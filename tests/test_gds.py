"""Communities, ranks and paths by Graph Data Science: what is sent to a server, and on a real one with the library the same results as here."""

import math
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.analysis.partitioning import ami
from featlas.analysis.ranks import Direction, RankMethod, RankOptions, rank_nodes
from featlas.analysis.routes import NoRoute, RouteOptions, best_routes, gds_ranking, gds_routes
from featlas.errors import UserError
from featlas.queries.gds import (
    GdsOptions,
    NoGds,
    NothingProjected,
    NotProjected,
    Projection,
    TooLarge,
    connected,
    gds_communities,
    gds_paths,
    gds_ranks,
    require_gds,
)
from featlas.queries.neo4j_distribution import DownloadFailed, gds_plugin
from featlas.queries.neo4j_server import ServerInfo, down, up
from featlas.queries.store import ServerCredentials, open_graph
from featlas.queries.subgraphs import RunRow

from .servers import THROWAWAY
from .test_ranks import candidates_of, random_graph


class Recorded:
    """A client that keeps what it is sent and answers from a list."""

    def __init__(self, *answers: dict[str, list]) -> None:
        self.answers, self.sent, self.closed = list(answers), [], 0
        self.left: list[str] = []
        self.needed = 1000

    def run_cypher(self, query: str, params: dict | None = None) -> dict[str, list]:
        if "graph.list" in query:
            return {"name": self.left, "stale": [name.endswith("old") for name in self.left]}
        if "project.estimate" in query:
            return {"nodes": [3], "edges": [4], "needed": [self.needed]}
        if "queryJmx" in query:
            return {"heap": [2**30]}
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
    assert project[1] == {"name": project[1]["name"], "run": "r'1", "kinds": ["feature", "error"], "threshold": 0.5, "threads": 1}
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


def test_copies_that_were_left_are_dropped_and_no_others() -> None:
    """Those of processes of this machine that are gone, and any that are old; not those that are in use here or on another machine."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    own = f"featlas-{socket.gethostname()}-"
    client = Recorded({"nodes": [2], "edges": [1]}, {"key": ["a"], "community": [1]})
    client.left = [f"{own}{ended.pid}-1", f"{own}{os.getpid()}-2", "featlas-elsewhere-1-3", "featlas-elsewhere-1-old", f"{own}x-4"]
    gds_communities(lambda: client, "r", GdsOptions())
    dropped = [params["name"] for query, params in client.sent if "graph.drop" in query][:-1]
    assert dropped == [client.left[0], client.left[3]]


def test_a_graph_that_does_not_fit_is_refused_before_it_is_copied() -> None:
    client = Recorded()
    client.needed = 3 * 2**30
    with pytest.raises(TooLarge, match=r"4 edges of 3 nodes need 3,072 MiB of the server's memory, which has 1,024 MiB: give it more"):
        gds_communities(lambda: client, "r", GdsOptions())
    assert [("graph.drop" in query) for query, _ in client.sent] == [True]
    said = "Procedure was blocked since minimum estimated memory (5 GiB) exceeds current free memory (1 GiB)."
    blocked = Recorded({"nodes": [3], "edges": [4]}, RuntimeError(said))
    with pytest.raises(TooLarge, match=r"minimum estimated memory \(5 GiB\) exceeds .*--heap-mb"):
        gds_communities(lambda: blocked, "r", GdsOptions())
    absent = Recorded({"nodes": [3], "edges": [4]}, RuntimeError("targetNode nodes do not exist in the in-memory graph: [18]"))
    with pytest.raises(NotProjected, match="lower --threshold"):
        gds_paths(lambda: absent, Projection("r"), "a", "b", 3)


def test_what_is_sent_for_ranks_and_paths() -> None:
    client = Recorded({"nodes": [2], "edges": [1]}, {"key": ["a", "b"], "value": [1.0, 3.0]})
    found = gds_ranks(lambda: client, Projection("r", threads=3), "pagerank", backward=True, damping=0.5, start=["a'"])
    assert found.rows() == [("a", 0.25), ("b", 0.75)]
    project, rank, _ = client.sent
    assert "$name, target, source" in project[0]
    assert rank[1] == {"name": project[1]["name"], "threads": 3, "damping": 0.5, "start": ["a'"]}
    client = Recorded({"nodes": [2], "edges": [1]}, {"keys": [["a", "c", "b"]], "length": [math.log(4)]})
    assert gds_paths(lambda: client, Projection("r"), "a", "b", 3).rows() == [(["a", "c", "b"], pytest.approx(0.25))]
    assert "-log(edge.strength / entering)" in client.sent[0][0]


@pytest.mark.parametrize(
    "make", [lambda: gds_ranks(Recorded, Projection("r"), "influence"), Projection("r", threads=5).check, Projection("r", "n").check]
)
def test_ranks_that_the_library_does_not_have(make: Callable[[], object]) -> None:
    with pytest.raises(UserError):
        make()


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
    ranks_agree(with_gds, credentials)


def ranks_agree(info: ServerInfo, credentials: ServerCredentials) -> None:
    """PageRank of every kind, betweenness, strength and the strongest paths are those of the library, on the same server."""
    graph = random_graph(4)
    keys, run = graph.nodes["key"], RunRow("r3", "m", "t", "logit_diff", {}, {})
    connect = lambda: connected(info.uri, credentials)
    with open_graph(info.uri, credentials=credentials) as store:
        store.merge_nodes("Feature", graph.nodes.drop("order").with_columns(model=pl.lit("m")))
        ends = {"source": keys.gather(graph.source), "target": keys.gather(graph.target)}
        weights = {"weight": -graph.weight, "abs_weight": graph.weight}
        store.merge_edges("INFLUENCES", pl.DataFrame({**ends, **weights}).with_columns(run=pl.lit("r3")))
        asked = [RankOptions(RankMethod.BETWEENNESS), RankOptions(RankMethod.STRENGTH)]
        asked += [RankOptions(RankMethod.PAGERANK, way, (start,)) for way in Direction for start in ("all", "output", "embed/0")]
        for options in asked:
            theirs, ours = gds_ranking(store, connect, run, options, threads=2), rank_nodes("r3", graph, options)
            both = ours.rows.join(theirs.rows, on="key", how="full", suffix="_gds")
            assert (both["value"] - both["value_gds"]).abs().max() < 1e-9, options
            assert both.null_count().sum_horizontal().item() == 0
            assert (ours.rows.columns, dict(ours.settings)) == (theirs.rows.columns, dict(theirs.settings))
        options = RouteOptions("embed/0", n=7)
        theirs, ours = gds_routes(store, connect, run, options), best_routes("r3", candidates_of(graph), options)
        assert [path.nodes for path in theirs.paths] == [path.nodes for path in ours.paths]
        assert [path.weights for path in theirs.paths] == [path.weights for path in ours.paths]
        assert [path.score for path in theirs.paths] == pytest.approx([path.score for path in ours.paths])
        with pytest.raises(NoRoute):
            gds_routes(store, connect, run, RouteOptions("output", "embed/0"))
        with pytest.raises(NotProjected):
            gds_routes(store, connect, run, RouteOptions("embed/0", threshold=float(graph.weight.max())))
