"""`featlas serve`: who may ask, what is answered, what is refused, and that nothing is held or written."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import polars as pl
import pytest
from featlas.pages.answers import exact, graph_of
from featlas.pages.reader import AtlasReader, Shared
from featlas.pages.server import Guard, NotLoopback, PortTaken, Served, ServeOptions, address_of, foreign, listen, make_app
from featlas.queries.library import list_queries
from featlas.queries.store import open_graph
from starlette.testclient import TestClient

TOKEN = "the-token-of-this-test"
HOSTILE = "<img src=x onerror=alert(1)> </script> 'q' \"q\"\u2028"
SLOW = (
    "UNWIND range(1, 20000) AS a UNWIND range(1, 20000) AS b UNWIND range(1, 100) AS c WITH a, b, c WHERE a + b + c = -1 "
    "RETURN count(*) AS n"
)
FEATLAS = Path(sys.executable).parent / "featlas"


def fill(folder: Path) -> None:
    """a drives b and c, b drives c; a is of a circuit; its label is hostile. A run, with a sequence."""
    with open_graph(folder) as store:
        keys = ["m|d|resid_0|1", "m|d|resid_1|2", "m|-|y|logit_diff"]
        store.merge_nodes("Feature", pl.DataFrame({
            "key": keys, "site": ["resid_0", "resid_1", "y"], "layer": [0, 1, -1], "index": [1, 2, -1], "kind": ["feature", "feature", "output"],
            "label": [HOSTILE, None, "logit_diff"], "model": "m",
        }))
        run = {"key": "r1", "model": "m", "task": "agreement", "metric": "logit_diff", "dictionaries": "{}"}
        store.merge_nodes("Run", pl.DataFrame([run]))
        store.merge_nodes("Circuit", pl.DataFrame({"key": ["round"], "run": ["r1"]}))
        store.merge_edges("IN_CIRCUIT", pl.DataFrame({"source": keys[:1], "target": ["round"]}))
        drawn = pl.DataFrame({"source": [keys[0], keys[0], keys[1]], "target": [keys[1], keys[2], keys[2]], "weight": [0.5, -0.25, 1.0]})
        store.merge_edges("INFLUENCES", drawn.with_columns(abs_weight=pl.col("weight").abs(), run=pl.lit("r1"), n=1))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AtlasReader]:
    folder = tmp_path_factory.mktemp("served")
    fill(folder)
    with AtlasReader(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def app(reader: AtlasReader) -> Guard:
    return make_app(reader, TOKEN, Served("<!doctype html>", {"page.js": "1;"}), ServeOptions(rows=50, seconds=5))


@pytest.fixture
def client(app: Guard) -> TestClient:
    """A program that knows the token."""
    return TestClient(app, base_url="http://127.0.0.1:8765", headers={"authorization": f"Bearer {TOKEN}"})


@pytest.fixture
def stranger(app: Guard) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1:8765")


def ask(client: TestClient, cypher: str, **others: object) -> dict:
    answer = client.post("/api/query", json={"cypher": cypher, **others})
    assert answer.status_code == 200, answer.text
    return answer.json()


# Who may ask


@pytest.mark.parametrize("path", ["/", "/api/queries", "/api/overview", "/nothing", "/api/query"])
def test_nothing_is_answered_without_the_token(stranger: TestClient, path: str) -> None:
    for refused in (stranger.get(path), stranger.get(path + "?token=wrong"), stranger.get(path, headers={"authorization": "Bearer wrong"}),
                    stranger.get(path, headers={"cookie": "featlas-8765=wrong"}), stranger.get(path + "?token=")):  # fmt: skip
        assert refused.status_code == 401
        assert "featlas serve" in refused.text
        assert "set-cookie" not in refused.headers
        assert TOKEN not in refused.text


def test_the_address_sets_a_cookie_that_scripts_cannot_read(stranger: TestClient) -> None:
    first = stranger.get(f"/?token={TOKEN}")
    assert first.status_code == 200
    assert first.headers["set-cookie"] == f"featlas-8765={TOKEN}; HttpOnly; SameSite=Strict; Path=/"
    again = stranger.get("/")  # the cookie was kept
    assert again.status_code == 200
    assert "set-cookie" not in again.headers
    assert stranger.get("/api/queries").status_code == 200


def test_a_cookie_of_another_port_is_not_taken(app: Guard) -> None:
    other = TestClient(app, base_url="http://127.0.0.1:8765", cookies={"featlas-9000": TOKEN})
    assert other.get("/").status_code == 401
    assert TestClient(app, base_url="http://127.0.0.1:9000", cookies={"featlas-9000": TOKEN}).get("/").status_code == 200


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1:8765", 200), ("localhost:9000", 200), ("localhost", 200), ("[::1]:8765", 200), ("127.0.0.2:1", 200),
    ("evil.example", 421), ("evil.example:8765", 421), ("127.0.0.1.evil.example", 421), ("192.168.0.2:8765", 421), ("localhost@evil.example", 421),
    ("0.0.0.0:8765", 421), ("", 421), ("localhost:8765:1", 421), ("[::1", 421), ("évil", 421),
])
def test_it_answers_to_loopback_names_alone(client: TestClient, host: str, status: int) -> None:
    answer = client.get("/api/queries", headers={"host": host.encode("utf-8")})
    assert answer.status_code == status, answer.text
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("headers", "status"), [
    ({"origin": "http://127.0.0.1:8765"}, None), ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403),
    ({"origin": "http://127.0.0.1:9999"}, 403), ({"sec-fetch-site": "same-origin"}, None), ({"sec-fetch-site": "none"}, None),
    ({"sec-fetch-site": "cross-site"}, 403), ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, None),
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "origin": "http://evil.example"}, 403),
])
def test_other_pages_scripts_and_forms_are_refused(headers: dict[str, str], status: int | None) -> None:
    refusal = foreign({"host": "127.0.0.1:8765", **headers})
    assert (None if refusal is None else refusal[0]) == status


def test_every_answer_has_the_headers_of_a_careful_server(client: TestClient, stranger: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "unsafe-eval" not in policy
    script = client.get("/scripts/page.js?v=1")
    assert (script.text, script.headers["content-type"]) == ("1;", "text/javascript; charset=utf-8")
    assert (client.get("/scripts/other.js").status_code, stranger.get("/scripts/page.js").status_code) == (404, 401)
    assert "immutable" in script.headers["cache-control"]
    for answer in (page, stranger.get("/"), client.get("/api/queries"), client.get("/api/nothing"), client.post("/api/query", json={"cypher": "("})):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_requests_of_any_size_are_not_read(client: TestClient) -> None:
    assert client.post("/api/query", content=b"x" * (2**20 + 1)).status_code == 413
    assert client.post("/api/query", content=iter([b"{}"])).status_code == 411
    for body in (b"", b"[]", b"{", b'{"cypher": 1}', b'{"cypher": "RETURN 1 AS x", "write": true}', b'{"cypher": "RETURN 1 AS x", "rows": 0}'):
        answer = client.post("/api/query", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, body
        assert answer.json()["error"]


# Queries


def test_an_answer_has_rows_and_their_graph(client: TestClient) -> None:
    text = "MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature) WHERE a.site = $site RETURN a AS a, e AS e ORDER BY e.weight"
    found = ask(client, text, parameters={"site": "resid_0"})
    assert found["columns"] == ["a", "e"]
    assert [row[1]["properties"]["weight"] for row in found["rows"]] == [-0.25, 0.5]
    assert found["rows"][0][0]["properties"]["label"] == HOSTILE
    nodes = {node["key"]: node for node in found["graph"]["nodes"]}
    # b was not returned, but is an end of what was
    assert set(nodes) == {"m|d|resid_0|1", "m|d|resid_1|2", "m|-|y|logit_diff"}
    assert nodes["m|d|resid_1|2"]["name"] == "resid_1/2"
    edges = [(edge["source"], edge["target"], edge["type"], edge["properties"]["weight"]) for edge in found["graph"]["edges"]]
    a = "Feature:m|d|resid_0|1"
    assert sorted(edges) == [(a, "Feature:m|-|y|logit_diff", "INFLUENCES", -0.25), (a, "Feature:m|d|resid_1|2", "INFLUENCES", 0.5)]
    assert (found["cut"], found["graph"]["cut"], found["limit"]) == (False, False, 50)
    assert 0 < found["ms"] < 5_000


def test_keys_and_paths_in_a_table_are_drawn(reader: AtlasReader) -> None:
    keys = ["m|d|resid_0|1", "m|d|resid_1|2", "m|-|y|logit_diff"]
    with reader.graph() as store:
        drawn = graph_of(store, ["source", "target", "effect"], [[keys[0], keys[1], 0.5], [keys[0], "absent", 1.0]])
        assert [(edge["source"], edge["target"], edge["type"], edge["properties"]["weight"]) for edge in drawn["edges"]] == [
            (f"Feature:{keys[0]}", f"Feature:{keys[1]}", "row", 0.5)]
        drawn = graph_of(store, ["strength", "path", "weights"], [[0.5, " > ".join(keys), [0.5, 1.0]]])
        assert [edge["properties"]["weight"] for edge in drawn["edges"]] == [0.5, 1.0]
        assert len(drawn["nodes"]) == 3
        assert graph_of(store, ["text"], [[" > ".join(keys)]]) == {"nodes": [], "edges": [], "cut": False}
        assert [node["label"] for node in graph_of(store, ["circuit"], [["round"], ["round"]])["nodes"]] == ["Circuit"]
        nested = graph_of(store, ["list"], [[[{"inner": {"label": "Run", "properties": {"key": "r1", "task": "agreement"}}}]]])
        assert [(node["id"], node["name"]) for node in nested["nodes"]] == [("Run:r1", "agreement")]


def test_a_key_of_two_labels_is_two_nodes_and_edges_find_theirs(reader: AtlasReader) -> None:
    both = [{"label": label, "properties": {"key": "m|d|resid_0|1"}} for label in ("Circuit", "Feature")]
    edge = {"type": "IN_CIRCUIT", "source": "m|d|resid_0|1", "target": "m|d|resid_0|1", "properties": {}}
    with reader.graph() as store:
        drawn = graph_of(store, ["a", "b", "e"], [[*both, edge]])
    assert len(drawn["nodes"]) == 2
    assert (drawn["edges"][0]["source"], drawn["edges"][0]["target"]) == ("Feature:m|d|resid_0|1", "Circuit:m|d|resid_0|1")


def test_numbers_arrive_as_they_are(client: TestClient) -> None:
    found = ask(client, "RETURN 9007199254740993 AS big, -1 AS small, 0.1 AS x, [1, 2] AS l, null AS z, true AS b")
    assert found["rows"] == [["9007199254740993", -1, 0.1, [1, 2], None, True]]
    assert exact({"a": [2**60, 2**53 - 1]}) == {"a": [str(2**60), 2**53 - 1]}
    assert ask(client, "RETURN CAST('nan', 'DOUBLE') AS x, CAST('inf', 'DOUBLE') AS y")["rows"] == [["NaN", "Infinity"]]


def test_answers_are_cut_and_say_so(client: TestClient) -> None:
    found = ask(client, "UNWIND range(1, 1000) AS i RETURN i ORDER BY i")
    assert (len(found["rows"]), found["cut"]) == (50, True)
    assert len(ask(client, "UNWIND range(1, 1000) AS i RETURN i", rows=1000)["rows"]) == 1000
    assert not ask(client, "RETURN 1 AS x", rows=1)["cut"]
    assert not ask(client, "UNWIND range(1, 50) AS i RETURN i")["cut"]
    assert client.post("/api/query", json={"cypher": "RETURN 1 AS x", "rows": 10_001}).status_code == 400


def test_a_query_that_takes_too_long_is_stopped(client: TestClient) -> None:
    began = time.monotonic()
    answer = client.post("/api/query", json={"cypher": SLOW, "seconds": 0.3})
    assert (answer.status_code, answer.json()["kind"]) == (400, "QueryTooSlow")
    assert "stopped after 0.3 s" in answer.json()["error"]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("cypher", [
    "CREATE (:Feature {key: 'x'})", "MERGE (f:Feature {key: 'x'}) RETURN f", "MATCH (f:Feature) SET f.label = 'x'",
    "MATCH (f:Feature) DETACH DELETE f", "DROP TABLE WIRED", "ALTER TABLE Score DROP task",
    "COPY Feature FROM '/etc/passwd'", "COPY (MATCH (f:Feature) RETURN f.key) TO '/tmp/out.csv'",
    "LOAD FROM '/etc/passwd' (header=false) RETURN *", "ATTACH '/tmp/x.lbug' AS x (dbtype lbug)", "INSTALL json", "CALL threads = 1",
    "EXPORT DATABASE '/tmp/exported'", "CHECKPOINT", "BEGIN TRANSACTION", "COMMIT",
])
def test_what_is_not_reading_is_refused(client: TestClient, cypher: str) -> None:
    answer = client.post("/api/query", json={"cypher": cypher})
    assert (answer.status_code, answer.json()["kind"]) == (400, "WriteRefused"), answer.text
    assert answer.json()["error"].endswith("This page only reads")
    assert ask(client, "MATCH (n:Feature) RETURN count(*) AS n")["rows"] == [[3]]


@pytest.mark.parametrize(("body", "shown"), [
    ({"cypher": "MATCH (f:Feature RETURN f"}, "Parser exception"), ({"cypher": "MATCH (f:Nonsense) RETURN f"}, "Nonsense"),
    ({"cypher": "RETURN $missing AS x"}, "missing"), ({"cypher": "RETURN 1 AS x; RETURN 2 AS x"}, "statement"), ({}, "one of the two"),
    ({"cypher": "RETURN 1 AS x", "name": "runs"}, "one of the two"), ({"name": "top_edge"}, "did you mean top_edges"),
    ({"name": "top_edges", "parameters": {"limit": "many"}}, "'many' is no int"),
])
def test_mistakes_are_answered_with_the_message(client: TestClient, body: dict, shown: str) -> None:
    answer = client.post("/api/query", json=body)
    assert answer.status_code == 400
    assert shown in answer.json()["error"]


def test_the_named_queries_with_what_their_parameters_may_be(client: TestClient) -> None:
    listed = client.get("/api/queries").json()
    assert {query["name"] for query in listed["queries"]} == {query.name for query in list_queries()}
    top = next(query for query in listed["queries"] if query["name"] == "top_edges")
    shown = [(parameter["name"], parameter["kind"], parameter["required"], parameter["default"]) for parameter in top["parameters"]]
    assert shown == [("run", "string", True, None), ("limit", "int", False, 20)]
    assert "INFLUENCES" in top["cypher"]
    assert (listed["choices"]["run"], listed["choices"]["site"]) == (["r1"], ["resid_0", "resid_1", "y"])
    assert listed["schema"]["edges"]["INFLUENCES"]["ends"] == [["Feature", "Feature"]]
    assert "frequency" in listed["schema"]["nodes"]["Feature"]
    assert (listed["dialect"], listed["limits"]["rows"]) == ("ladybug", 50)
    found = client.post("/api/query", json={"name": "top_edges", "parameters": {"limit": "2"}}).json()
    assert [row[found["columns"].index("weight")] for row in found["rows"]] == [1.0, 0.5]
    assert len(found["graph"]["edges"]) == 2
    assert found["parameters"] == {"run": "r1", "limit": 2}
    assert "INFLUENCES" in found["cypher"]


@pytest.mark.neo4j
def test_a_neo4j_graph_is_served_alike(clean_neo4j, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEO4J_USERNAME", clean_neo4j.username)
    monkeypatch.setenv("NEO4J_PASSWORD", clean_neo4j.password)
    with open_graph(clean_neo4j.uri) as store:
        drawn = pl.DataFrame({"source": ["a"], "target": ["b"], "weight": [0.5], "path": ["residual"]})
        store.merge_nodes("Feature", pl.DataFrame({"key": ["a", "b"], "site": ["resid_0", "resid_1"]}))
        store.merge_edges("WIRED", drawn)
    with AtlasReader(tmp_path, clean_neo4j.uri) as reader:
        client = TestClient(make_app(reader, TOKEN, Served("", {})), base_url="http://localhost:1", headers={"authorization": f"Bearer {TOKEN}"})
        found = ask(client, "MATCH ()-[e:WIRED]->() RETURN e")
        assert [(edge["source"], edge["target"]) for edge in found["graph"]["edges"]] == [("Feature:a", "Feature:b")]
        assert client.get("/api/queries").json()["dialect"] == "neo4j"
        assert ask(client, "RETURN 'LOAD CSV' AS x // LOAD CSV")["rows"] == [["LOAD CSV"]]
        for text in (
            "CREATE (:Feature {key: 'x'})", "MATCH (f:Feature) SET f.label = 'x'", "MATCH (f) DETACH DELETE f",
            "CREATE INDEX FOR (f:Feature) ON (f.x)", "CALL { CREATE (:Feature {key: 'x'}) } IN TRANSACTIONS",
            "LOAD CSV FROM 'file:///x.csv' AS row RETURN row", "load/**/csv FROM 'x' AS r RETURN r", "MERGE (f:Feature {key: 'x'}) RETURN f",
        ):  # fmt: skip
            answer = client.post("/api/query", json={"cypher": text})
            assert answer.status_code == 400, (text, answer.text)
        assert ask(client, "MATCH (n:Feature) RETURN count(*) AS n")["rows"] == [[2]]
        wrong = client.post("/api/query", json={"cypher": "MATCH (f:Feature RETURN f"}).json()
        assert (wrong["kind"], "^" in wrong["error"]) == ("QueryRejected", True)
        assert ask(client, "UNWIND range(1, 9) AS i RETURN i", rows=4)["cut"]


# Pages


def test_pages_by_their_names(client: TestClient) -> None:
    overview = client.get("/api/overview").json()
    assert overview["runs"][0]["key"] == "r1"
    circuit = client.get("/api/circuit", params={"run": "r1", "threshold": "0.4"}).json()
    assert [edge[2] for edge in circuit["edges"]] == [1.0, 0.5]
    lower = client.get("/api/circuit", params={"run": "r1", "threshold": "0.2"}).json()
    assert [edge[2] for edge in lower["edges"]] == [1.0, 0.5, -0.25]
    feature = client.get("/api/feature", params={"key": "m|d|resid_0|1"})
    assert feature.status_code == 200
    assert HOSTILE in feature.json().values()
    assert feature.headers["content-type"] == "application/json"
    assert client.get("/api/nothing").status_code == 404
    wrong = client.get("/api/circuit", params={"run": "r1", "threshold": "high"})
    assert (wrong.status_code, "threshold" in wrong.json()["error"]) == (400, True)
    for name, text in (("threshold", "nan"), ("threshold", "inf"), ("edges", "0"), ("edges", "-5"), ("edges", "9" * 30)):
        assert client.get("/api/circuit", params={"run": "r1", name: text}).status_code == 400, (name, text)
    for cypher, parameters in (("RETURN $x", {"x": 10**30}), ("RETURN '\ud800'", {})):
        body = json.dumps({"cypher": cypher, "parameters": parameters})
        refused = client.post("/api/query", content=body, headers={"content-type": "application/json"})
        assert refused.status_code == 400, refused.text
    assert client.get("/api/circuit", params={"run": "other"}).status_code == 400
    assert client.get("/elsewhere").json()["kind"] == "NotFound"
    assert client.put("/api/query", json={}).status_code == 405


def test_requests_at_the_same_time(client: TestClient) -> None:
    def one(i: int) -> object:
        if i % 3 == 0:
            return client.get("/api/overview").json()["runs"][0]["key"]
        return ask(client, "MATCH (f:Feature) RETURN count(f) + $i AS n", parameters={"i": i})["rows"][0][0]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(one, range(24)))
    assert found == ["r1" if i % 3 == 0 else 3 + i for i in range(24)]


# What is held


def test_what_is_shared_is_opened_once_and_closed_after_the_last() -> None:
    class Thing:
        closed = False

        def close(self) -> None:
            self.closed = True

    made: list[Thing] = []
    stamp = [0]
    shared = Shared(lambda: made.append(Thing()) or made[-1], lambda: stamp[0], idle_s=0.05)
    with shared.use() as one, shared.use() as other:
        assert one is other
        stamp[0] = 1
        with shared.use() as third:  # in use: it stays
            assert third is one
    with shared.use() as later:  # changed meanwhile: opened anew
        assert later is not one
        assert one.closed
    until = time.monotonic() + 5
    while shared.is_open and time.monotonic() < until:
        time.sleep(0.01)
    assert later.closed
    assert len(made) == 2


@pytest.mark.slow
def test_others_write_between_requests_and_are_seen(tmp_path: Path) -> None:
    fill(tmp_path)
    reader = AtlasReader(tmp_path, idle_s=60)
    client = TestClient(make_app(reader, TOKEN, Served("", {})), base_url="http://127.0.0.1:1", headers={"authorization": f"Bearer {TOKEN}"})
    assert ask(client, "MATCH (f:Feature) RETURN count(*) AS n")["rows"] == [[3]]
    assert reader.holds
    script = (
        "import sys, polars as pl; from featlas.queries.store import open_graph\n"
        "with open_graph(sys.argv[1]) as store: store.merge_nodes('Feature', pl.DataFrame({'key': ['new']}))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert ask(client, "MATCH (f:Feature) RETURN count(*) AS n")["rows"] == [[4]]
    reader.close()
    assert not reader.holds


@pytest.mark.slow
def test_pages_answer_from_the_graph_while_another_process_writes_the_statistics(tmp_path: Path) -> None:
    fill(tmp_path)
    code = "import sys; from featlas.queries.statistics import StatisticsStore as S\nwith S(sys.argv[1]): print(flush=True); sys.stdin.read()"
    reader = AtlasReader(tmp_path)
    client = TestClient(make_app(reader, TOKEN, Served("", {})), base_url="http://127.0.0.1:1", headers={"authorization": f"Bearer {TOKEN}"})
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        overview = client.get("/api/overview").json()
        assert "Another process is writing the statistics" in overview["held"]
        assert client.get("/api/search", params={"text": "resid_0/1"}).json()["found"][0]["key"] == "m|d|resid_0|1"
        assert client.get("/api/feature", params={"key": "m|d|resid_0|1"}).status_code == 200
        assert client.get("/api/features").status_code == 200
        refused = client.get("/api/matching", params={"matching": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"] == (
            "matchings are kept in the statistics of the atlas, which another process is writing: try again when it is done"
        )
        holder.communicate()
    assert "held" not in client.get("/api/overview").json()
    reader.close()


# Listening


def test_only_loopback_and_free_ports() -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org", ""):
        with pytest.raises(NotLoopback, match="ssh -L"):
            listen(host, 0)
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert address_of(bound, "t") == f"http://127.0.0.1:{port}/?token=t"
        with pytest.raises(PortTaken, match=f"port {port} .*--port 0"):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", None) as one, listen("127.0.0.1", None) as other:
        assert one.getsockname()[1] < other.getsockname()[1]


def test_mistakes_on_the_command_line(refused, tmp_path: Path) -> None:
    assert "no graph in" in refused("serve", "--atlas", tmp_path)
    fill(tmp_path)
    assert "0.0.0.0" in refused("serve", "--host", "0.0.0.0", "--no-open", "--atlas", tmp_path)
    with listen("127.0.0.1", 0) as bound:
        assert "taken" in refused("serve", "--port", bound.getsockname()[1], "--no-open", "--atlas", tmp_path)


@pytest.fixture
def run(featlas):
    return featlas


def served(folder: Path) -> tuple[subprocess.Popen, dict]:
    process = subprocess.Popen([FEATLAS, "serve", "--port", "0", "--no-open", "--json", "--atlas", folder], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    lines = ""
    while not lines.rstrip().endswith("}"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        lines += line
    return process, json.loads(lines)


def cut_off(browser: httpx.Client) -> None:
    """Ask what takes long; the server goes away meanwhile."""
    with contextlib.suppress(httpx.HTTPError):
        browser.post("/api/query", json={"cypher": SLOW}, timeout=60)


@pytest.mark.slow
def test_the_command_serves_and_ends_cleanly(tmp_path: Path) -> None:
    fill(tmp_path)
    process, told = served(tmp_path)
    try:
        base = told["address"].partition("/?")[0]
        with httpx.Client(base_url=base) as browser:
            page = browser.get(f"/?token={told['token']}")
            assert page.status_code == 200
            assert "<!doctype html>" in page.text.lower()
            assert told["token"] not in page.text
            assert browser.post("/api/query", json={"cypher": "RETURN 1 AS x"}).json()["rows"] == [[1]]
            assert httpx.get(f"{base}/").status_code == 401
            assert browser.get("/", headers={"host": "evil.example"}).status_code == 421
            # a query that runs does not keep it from ending
            waiting = threading.Thread(target=cut_off, args=(browser,))
            waiting.start()
            time.sleep(1)
            began = time.monotonic()
            process.send_signal(2)
            assert process.wait(30) == 0
            assert time.monotonic() - began < 8
            waiting.join()
        assert process.stderr.read().strip() == "stopped"
    finally:
        process.kill()


@pytest.mark.slow
def test_it_ends_cleanly_where_a_shell_started_it_in_the_background(tmp_path: Path) -> None:
    fill(tmp_path)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process, told = served(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        with httpx.Client(base_url=told["address"].partition("/?")[0]) as browser:
            browser.get(f"/?token={told['token']}")
            assert browser.post("/api/query", json={"cypher": "RETURN 1 AS x"}).json()["rows"] == [[1]]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read().strip() == "stopped"
    finally:
        process.kill()


def test_a_port_is_free_again_after_closing() -> None:
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
