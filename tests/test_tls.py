"""Encrypted connections: a real Neo4j with a certificate of our own authority, and servers whose certificates are wrong."""

import logging
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from featlas.queries.credentials import BadAuthority, BadPasswordFile, authorities, password_of
from featlas.queries.gds import connected
from featlas.queries.neo4j_server import BadCertificate, ServerInfo, ServerOptions, TlsFiles, down, prepare_home, status, up
from featlas.queries.server import Neo4jStore, _warn_where_readable
from featlas.queries.store import ServerCredentials, StoreUnreachable, WrongCredentials, open_graph
from neo4j.exceptions import DriverError


@dataclass(frozen=True)
class Authority:
    """An authority of one's own, its certificate in `file`."""

    ca: trustme.CA
    file: Path

    def sign(self, *names: str, **options: Any) -> TlsFiles:
        """A certificate for these names, with its key as Neo4j reads it."""
        made = self.ca.issue_cert(*names, **options)
        files = TlsFiles(self.file.with_name(f"{names[0]}-{len(options)}.crt"), self.file.with_name(f"{names[0]}-{len(options)}.key"))
        files.certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        key = load_pem_private_key(made.private_key_pem.bytes(), None)
        files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files


@pytest.fixture(scope="module")
def new_authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Authority]:
    def make() -> Authority:
        made = Authority(trustme.CA(), tmp_path_factory.mktemp("authority") / "ca.pem")
        made.ca.cert_pem.write_to_path(made.file)
        return made

    return make


@pytest.fixture(scope="module")
def authority(new_authority: Callable[[], Authority]) -> Authority:
    return new_authority()


@pytest.fixture(scope="module")
def encrypted(neo4j_jars: None, authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerInfo]:
    """A real Neo4j that answers to TLS alone, with a certificate for 127.0.0.1."""
    home = tmp_path_factory.mktemp("encrypted")
    files = authority.sign("127.0.0.1")
    yield up(home, ServerOptions(bolt_port=0, http_port=0, heap_mb=512, pagecache_mb=64, throwaway=True, start_limit_s=300, tls=files))
    down(home)


def reached(info: ServerInfo, scheme: str, authority: Authority | None = None, host: str = "127.0.0.1", password: str | None = None) -> str:
    """What one who connects sees: `connected`, or the message."""
    uri = f"{scheme}://{host}:{info.uri.rpartition(':')[2]}"
    who = ServerCredentials("neo4j", password or info.password, authorities=authority and authority.file)
    try:
        with open_graph(uri, credentials=who) as store:
            return "connected" if store.query("RETURN 1 AS x").rows() == [(1,)] else "wrong"
    except (StoreUnreachable, WrongCredentials) as error:
        return str(error).replace(info.password, "THE PASSWORD")


@pytest.mark.neo4j
def test_a_server_with_a_certificate(encrypted: ServerInfo, authority: Authority, new_authority: Callable[[], Authority]) -> None:
    assert encrypted.uri.startswith("bolt+s://127.0.0.1:")
    again = status(encrypted.password_file.parent)
    assert again is not None
    assert again.uri == encrypted.uri
    for scheme in ("bolt+s", "neo4j+s"):  # the second asks for a routing table, and connects to what that names
        assert reached(encrypted, scheme, authority) == "connected"
    for scheme in ("bolt+ssc", "neo4j+ssc"):
        assert reached(encrypted, scheme) == "connected"
    for trusted in (None, new_authority()):
        refused = reached(encrypted, "bolt+s", trusted)
        assert "nobody that this machine trusts has signed its certificate" in refused
        assert "NEO4J_CA_CERTIFICATE" in refused
        assert "bolt+ssc://" in refused
    assert "its certificate is another name's" in reached(encrypted, "bolt+s", authority, host="localhost")
    for scheme in ("bolt", "neo4j"):
        assert "a server that asks for TLS answers to bolt+s://" in reached(encrypted, scheme)
    refused = reached(encrypted, "bolt+s", authority, password="wrong-password")
    assert "--ask-password" in refused
    assert "wrong-password" not in refused
    key = encrypted.password_file.parent / "certificates" / "bolt" / "private.key"
    assert key.stat().st_mode & 0o077 == 0


@pytest.mark.neo4j
def test_the_client_of_graph_data_science_believes_the_same_authority(encrypted: ServerInfo, authority: Authority, monkeypatch) -> None:
    closed = []

    class Client:
        """What the library's client does with a driver, on a server without the library."""

        def __init__(self, driver: Any, **_: Any) -> None:
            self.driver = driver

        def run_cypher(self, query: str, params: dict[str, Any] | None = None) -> Any:
            return self.driver.execute_query(query, params).records

        def close(self) -> None:
            closed.append(self.driver)

    monkeypatch.setattr("graphdatascience.GraphDataScience", Client)
    client = connected(encrypted.uri, ServerCredentials("neo4j", encrypted.password, authorities=authority.file))
    assert client.run_cypher("RETURN $x AS x", {"x": 1})[0]["x"] == 1
    client.close()
    with pytest.raises(DriverError):
        closed[0].verify_connectivity()


@pytest.mark.neo4j
def test_the_command_by_the_environment(encrypted: ServerInfo, authority: Authority, featlas, tmp_path: Path, monkeypatch) -> None:
    open_graph(encrypted.uri, credentials=ServerCredentials("neo4j", encrypted.password, authorities=authority.file)).close()
    kept = tmp_path / "password"
    kept.write_text(f"{encrypted.password}\n")
    kept.chmod(0o600)
    monkeypatch.delenv("NEO4J_PASSWORD", raising=False)
    monkeypatch.setenv("NEO4J_PASSWORD_FILE", str(kept))
    ask = ("query", "--cypher", "RETURN 1 AS x", "--format", "csv", "--graph", encrypted.uri)
    code, out, err = featlas(*ask)
    assert (code, out, "NEO4J_CA_CERTIFICATE" in err) == (1, "", True)
    monkeypatch.setenv("NEO4J_CA_CERTIFICATE", str(authority.file))
    assert featlas(*ask) == (0, "x\n1\n", "")
    kept.chmod(0o644)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEO4J_PASSWORD", "not-it")
        code, _, err = featlas(*ask)
        assert (code, "refused the user name or password" in err, "not-it" in err) == (2, True, False)


# --- certificates that no server should have --------------------------------------------------------------------------


class _Silent(BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(64)


class _TlsServer(TCPServer):
    allow_reuse_address = True
    context: ssl.SSLContext

    def get_request(self) -> tuple[Any, Any]:
        raw, address = super().get_request()
        return self.context.wrap_socket(raw, server_side=True), address


@contextmanager
def answering(files: TlsFiles) -> Iterator[int]:
    """The port of a server that shows this certificate and says nothing else."""
    with _TlsServer(("127.0.0.1", 0), _Silent) as server:
        server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.context.load_cert_chain(files.certificate, files.key)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_certificate_out_of_date_is_refused(authority: Authority) -> None:
    expired = authority.sign("127.0.0.1", not_after=datetime.now(UTC) - timedelta(days=1))
    with answering(expired) as port, pytest.raises(StoreUnreachable, match="certificate is out of date: have it renewed"):
        Neo4jStore(f"bolt+s://127.0.0.1:{port}", ServerCredentials("neo4j", "x", authorities=authority.file))


def test_what_a_server_cannot_start_with(authority: Authority, tmp_path: Path) -> None:
    good, other = authority.sign("127.0.0.1"), tmp_path / "other.pem"
    other.write_text("-----BEGIN EC PRIVATE KEY-----\n")
    for files, shown in (
        (TlsFiles(tmp_path / "none", good.key), "must be readable PEM files"), (TlsFiles(good.key, good.key), "holds no certificate in PEM"),
        (TlsFiles(good.certificate, other), "openssl pkcs8 -topk8"),
        (TlsFiles(good.certificate, authority.sign("localhost").key), "is not the key of the certificate"),
    ):  # fmt: skip
        with pytest.raises(BadCertificate, match=shown):
            prepare_home(tmp_path, ServerOptions(tls=files), 1, 2)


def test_both_files_or_none(featlas, tmp_path: Path) -> None:
    code, _, err = featlas("neo4j", "up", "--home", tmp_path, "--tls-key", "x")
    assert (code, "belong together" in err) == (2, True)


# --- passwords and authorities by the environment ---------------------------------------------------------------------


def test_a_password_by_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "password"
    environment = {"NEO4J_PASSWORD_FILE": str(file)}
    for content, password in ((b"s3cret\n", "s3cret"), (b"s3cret", "s3cret"), (b" two words \r\n", " two words "), ("ö\n".encode(), "ö")):
        file.write_bytes(content)
        file.chmod(0o600)
        assert password_of(environment) == password
    assert caplog.messages == []
    file.chmod(0o644)
    password_of(environment)
    assert caplog.messages == [f"{file} can be read by other users of this machine: chmod 600 {file}"]
    assert password_of({**environment, "NEO4J_PASSWORD": "first"}) == "first"
    assert password_of({}) is None
    for content in (b"", b"\n", b"a\nb\n", b"\xff\xfe", b"x" * 5000):
        file.write_bytes(content)
        with pytest.raises(BadPasswordFile, match="nothing else") as caught:
            password_of(environment)
        assert "xxx" not in str(caught.value)
    file.unlink()
    with pytest.raises(BadPasswordFile, match="No such file"):
        password_of(environment)


def test_authorities_by_a_file(authority: Authority, tmp_path: Path) -> None:
    assert authorities({"NEO4J_CA_CERTIFICATE": str(authority.file)}) == authority.file
    assert authorities({}) is None
    (tmp_path / "no.pem").write_text("no certificate")
    for name in ("no.pem", "missing.pem"):
        with pytest.raises(BadAuthority, match=name):
            authorities({"NEO4J_CA_CERTIFICATE": str(tmp_path / name)})


@pytest.mark.parametrize(("uri", "warned"), [
    ("bolt://127.0.0.1:7687", False), ("bolt://localhost", False), ("neo4j://[::1]:7687", False), ("bolt+s://db.example.org", False),
    ("neo4j+ssc://db.example.org", False), ("bolt://db.example.org:7687", True), ("neo4j://10.0.0.7", True), ("bolt://localhost.example.org", True),
])  # fmt: skip
def test_a_password_that_leaves_the_machine_unencrypted_is_warned_of(uri: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _warn_where_readable(uri)
    assert [uri in message and "is not encrypted" in message for message in caplog.messages] == ([True] if warned else [])


def test_a_password_is_asked_for_on_a_terminal_alone(featlas, monkeypatch: pytest.MonkeyPatch) -> None:
    from featlas import options

    code, out, err = featlas("--ask-password", "query", "--list")
    assert (code, out, "needs a terminal" in err) == (2, "", True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr(options.typer, "prompt", lambda text, *, hide_input, err: f"typed-{hide_input}-{err}")
    monkeypatch.setenv("NEO4J_PASSWORD", "before")
    code, out, err = featlas("--ask-password", "query", "--list")
    assert (code, os.environ["NEO4J_PASSWORD"]) == (0, "typed-True-True")
    assert "typed" not in out + err
