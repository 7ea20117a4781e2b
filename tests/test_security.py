"""Queries that only read cannot do anything else, by the command and by the page, whatever they are written like; see `attacks`."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import duckdb
import polars as pl
import pytest
from featlas.pages.reader import AtlasReader
from featlas.pages.server import Served, make_app
from featlas.queries.access import Token, require_reading, tokens
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import ServerCredentials, WriteRefused, open_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from .attacks import EMBEDDED, EMBEDDED_READING, NEO4J, NEO4J_READING

CANARY = "canary-7f3a"
TOKEN = "the-token"


def digest(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- how a text is read -----------------------------------------------------------------------------------------------


def test_tokens_of_a_text_with_everything_that_can_hide_a_word() -> None:
    read = tokens("MATCH /* 'a */ (`b``c`:D) // \"e\r WHERE f.g = 'h\\'i' AND \"j//\" <> 2")
    assert [(token.kind, token.text) for token in read] == [
        ("word", "MATCH"), ("sign", "("), ("quoted", "b``c"), ("sign", ":"), ("word", "D"), ("sign", ")"), ("word", "WHERE"),
        ("word", "f"), ("sign", "."),
        ("word", "g"), ("sign", "="), ("string", "'h\\'i'"), ("word", "AND"), ("string", '"j//"'), ("sign", "<"), ("sign", ">"), ("word", "2"),
    ]  # fmt: skip
    assert Token("quoted", "call").upper == ""


@settings(max_examples=150, deadline=None)
@given(st.text("LOADCSV '\"`/*\\\n\rx.", max_size=12), st.text("'\"`/*\\\n\r x", max_size=6))
def test_what_stands_in_a_whole_string_or_comment_is_no_clause_and_no_more(inside: str, between: str) -> None:
    """Whatever is put into a comment, a string or a quoted name is one token or none, and what follows is read as it is."""
    for text in (f"/*{inside.replace('*/', '')}{'*/' if not inside.endswith('*') else ' */'}", f"`{inside.replace('`', '')}`"):
        assert [token.upper for token in tokens(f"RETURN {text} LOAD CSV")][-2:] == ["LOAD", "CSV"]
    text = f"{between} LOAD /**/ CSV"
    hidden = [token for token in tokens(text) if token.upper == "LOAD"]
    if not any(mark in between for mark in "'\"`/"):
        assert hidden


@pytest.mark.parametrize("text", [text for text in NEO4J if not text.startswith("MATCH (n) RETURN n;")])
def test_each_attack_on_neo4j_is_known_by_its_text_or_is_plainly_a_change(text: str) -> None:
    """Without a server: what is not one of the clauses that the database itself refuses is refused by its text."""
    asked = text.format(out="/x", secret="/y", address="http://127.0.0.1/")
    if any(word in asked for word in ("CREATE (", "MERGE", " SET f", "REMOVE", "DELETE", "CR\\u0045ATE")):
        return
    with pytest.raises(WriteRefused, match="--write"):
        require_reading(asked, "neo4j")


@pytest.mark.parametrize("text", NEO4J_READING)
def test_reading_passes(text: str) -> None:
    require_reading(text.format(secret="/y"), "neo4j")


def test_refusals_say_why() -> None:
    def why(text: str, dialect: str = "neo4j") -> str:
        with pytest.raises(WriteRefused) as caught:
            require_reading(text, dialect)
        return caught.value.reason

    assert why("LOAD CSV FROM 'x' AS r RETURN r", "neo4j") == "'LOAD' begins no reading statement"
    assert why("MATCH (f) LOAD CSV FROM 'x' AS r RETURN r") == "LOAD CSV reads files and addresses"
    assert why("MATHC (f) RETURN f") == "'MATHC' begins no reading statement (did you mean MATCH?)"
    assert why("CALL dbms.killConnection('x')") == "CALL dbms.killConnection is not among the procedures that only read the graph"
    assert why("RETURN apoc.cypher.runFirstColumnMany('x', {})") == "apoc.cypher.runFirstColumnMany() is not among the functions that only compute"
    assert why("SHOW USERS YIELD user") == "SHOW USERS tells of the server, not of the graph"
    assert why("USE system MATCH (n) RETURN n") == "USE takes another database than the graph's"
    assert why("CALL threads = 1", "ladybug") == "CALL threads is not among the procedures that only read the graph"


# --- the embedded graph -----------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """An atlas of two features, a folder that could be written to and a file that could be read."""
    atlas, out, secret = tmp_path / "atlas", tmp_path / "out", tmp_path / "secret.csv"
    atlas.mkdir()
    with open_graph(atlas) as store:
        store.merge_nodes("Feature", pl.DataFrame({"key": ["a", "b"], "site": ["resid_0", "resid_1"]}))
    out.mkdir()
    secret.write_text(f"a,b\n{CANARY},2\n")
    return {"atlas": atlas, "out": out, "secret": secret}


@pytest.mark.slow
def test_the_command_refuses_attacks_on_the_embedded_graph(featlas, places) -> None:
    before = digest(places["atlas"])
    for text in EMBEDDED[::7]:  # the page is shown all of them
        code, out, err = featlas("query", "--cypher", text.format(**places), "--atlas", places["atlas"])
        assert (code, out) == (2, ""), (text, out)
        assert err.startswith("featlas: "), (text, err)
        assert CANARY not in err
    code, out, err = featlas("query", "--cypher", EMBEDDED_READING[0].format(**places), "--format", "csv", "--atlas", places["atlas"])
    assert (code, out) == (0, "n\n2\n"), err
    assert (digest(places["atlas"]), list(places["out"].iterdir())) == (before, [])


@pytest.mark.slow
def test_the_page_refuses_every_attack_on_the_embedded_graph(places) -> None:
    before = digest(places["atlas"])
    with AtlasReader(places["atlas"]) as reader:
        app = make_app(reader, TOKEN, Served("", {}))
        client = TestClient(app, base_url="http://localhost:1", headers={"authorization": f"Bearer {TOKEN}"})
        for text in EMBEDDED:
            answer = client.post("/api/query", json={"cypher": text.format(**places)})
            assert answer.status_code == 400, (text, answer.text)
            assert CANARY not in answer.text
        for text in EMBEDDED_READING:
            answer = client.post("/api/query", json={"cypher": text.format(**places)})
            assert answer.status_code == 200, (text, answer.text)
        for path in ("/api/../../etc/passwd", "/api/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/scripts/..%2f..%2fpages%2fserver.py", "/scripts/%00"):
            assert client.get(path).status_code == 404, path
    assert (digest(places["atlas"]), list(places["out"].iterdir())) == (before, [])


def test_writing_is_for_those_who_ask_for_it(featlas, places) -> None:
    code, out, _ = featlas("query", "--write", "--format", "csv", "--cypher", f"LOAD FROM '{places['secret']}' RETURN b", "--atlas", places["atlas"])
    assert (code, out.splitlines()) == (0, ["b", "2"])


# --- a real server ----------------------------------------------------------------------------------------------------


class _Heard(BaseHTTPRequestHandler):
    heard: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.heard.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(CANARY.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """An address that notes who asks it."""
    _Heard.heard.clear()
    server = HTTPServer(("127.0.0.1", 0), _Heard)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/row.csv", _Heard.heard
    server.shutdown()
    server.server_close()


def state(server) -> object:
    """What a query could have changed: nodes, labels, indexes and constraints, users, databases, the folder of imports, settings that show."""
    texts = (
        "MATCH (n) RETURN elementId(n) AS id, properties(n) AS p ORDER BY id", "CALL db.labels()", "CALL db.propertyKeys()",
        "SHOW INDEXES YIELD name",
        "SHOW CONSTRAINTS YIELD name",
        "SHOW USERS YIELD user", "SHOW DATABASES YIELD name, currentStatus",
    )  # fmt: skip
    return [server.run(text) for text in texts], digest(server.home / "import")


@pytest.mark.neo4j
def test_what_reads_is_let_through_by_a_server_and_the_attacks_are_real(clean_neo4j, listener, tmp_path: Path) -> None:
    address, heard = listener
    secret = clean_neo4j.home / "import" / "secret.csv"
    secret.write_text(f"{CANARY},2\n")
    credentials = ServerCredentials(clean_neo4j.username, clean_neo4j.password)
    open_graph(clean_neo4j.uri, credentials=credentials).close()
    clean_neo4j.run("CREATE (:Feature {key: 'a'})")
    before = state(clean_neo4j)

    with open_graph(clean_neo4j.uri, credentials=credentials) as store:  # open for writing: a query still is not
        for text in NEO4J_READING:
            store.query(text.format(address=address), {"load": [1]})
        assert (state(clean_neo4j), heard) == (before, [])
        # the same by those who may write reaches the file and the address: the attacks were real
        assert CANARY in str(store.query("LO\\u0041D CSV FROM 'file:///secret.csv' AS row RETURN row", write=True).rows())
        assert CANARY in str(store.query(f"LOAD // \r CSV FROM '{address}' AS row RETURN row", write=True).rows())
    assert heard == ["/row.csv"]
    secret.unlink()


@pytest.mark.neo4j
def test_the_page_over_a_server_refuses_every_attack(clean_neo4j, listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, heard = listener
    monkeypatch.setenv("NEO4J_USERNAME", clean_neo4j.username)
    monkeypatch.setenv("NEO4J_PASSWORD", clean_neo4j.password)
    open_graph(clean_neo4j.uri).close()
    (clean_neo4j.home / "import" / "secret.csv").write_text(f"{CANARY},2\n")
    before = state(clean_neo4j)
    with AtlasReader(tmp_path, clean_neo4j.uri) as reader:
        client = TestClient(make_app(reader, TOKEN, Served("", {})), base_url="http://localhost:1", headers={"authorization": f"Bearer {TOKEN}"})
        for text in NEO4J:
            answer = client.post("/api/query", json={"cypher": text.format(address=address, secret="x", out="x")})
            assert answer.status_code == 400, (text, answer.text)
            assert clean_neo4j.password not in answer.text
            assert CANARY not in answer.text
    assert (state(clean_neo4j), heard) == (before, [])


# --- an atlas from somebody else --------------------------------------------------------------------------------------


def test_views_in_a_statistics_store_of_somebody_else_reach_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text(f"a\n{CANARY}\n")
    with StatisticsStore(tmp_path):
        pass
    with duckdb.connect(tmp_path / "statistics.duckdb") as connection:
        connection.execute(f"CREATE VIEW told AS SELECT * FROM read_csv('{secret}')")
        assert connection.execute("FROM told").fetchall() == [(CANARY,)]
    for read_only in (True, False):
        with StatisticsStore(tmp_path, read_only=read_only) as store:
            for text in (
                "SELECT * FROM told", f"SELECT * FROM read_csv('{secret}')", f"COPY (SELECT 1) TO '{tmp_path}/out.csv'",
                "SELECT * FROM glob('/*')",
                f"ATTACH '{tmp_path}/other.duckdb'", "INSTALL httpfs", "SET enable_external_access = true", "SET threads = 3",
            ):  # fmt: skip
                with pytest.raises(duckdb.Error, match=r"disabled|Cannot (access|change)"):
                    store.query(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.csv", "statistics.duckdb"]
