"""The launcher of a real Neo4j: its password, ports, process and failures."""

import contextlib
import json
import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import neo4j
import pytest
from featlas.errors import UserError
from featlas.queries import neo4j_distribution as distribution_module
from featlas.queries import neo4j_server as launcher
from featlas.queries.neo4j_distribution import JavaMissing, MavenMissing, distribution, exclusive, find_java, java_version, neo4j_version

from .servers import THROWAWAY, Neo4jTestServer


@pytest.mark.neo4j
def test_server_answers_with_its_generated_password_only(clean_neo4j: Neo4jTestServer) -> None:
    assert clean_neo4j.run("RETURN 6 * 7 AS x") == [{"x": 42}]
    version = clean_neo4j.run("CALL dbms.components() YIELD versions, edition RETURN versions[0] AS version, edition")
    assert version == [{"version": neo4j_version(), "edition": "community"}]
    for auth in (None, ("neo4j", "neo4j"), ("neo4j", "wrong")):
        with neo4j.GraphDatabase.driver(clean_neo4j.uri, auth=auth) as driver, pytest.raises(neo4j.exceptions.AuthError):
            driver.verify_connectivity()


@pytest.mark.neo4j
def test_password_is_private_and_on_no_command_line(neo4j_server: Neo4jTestServer) -> None:
    file = neo4j_server.info.password_file
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(neo4j_server.password) == 32
    assert neo4j_server.password not in repr(neo4j_server.info)
    assert neo4j_server.password not in " ".join(launcher._command_line(neo4j_server.info.pid))
    for written in (neo4j_server.home / "conf" / "neo4j.conf", neo4j_server.home / "logs" / "console.log", neo4j_server.home / "server.json"):
        assert neo4j_server.password not in written.read_text()


def _sockets(pid: int) -> set[str]:
    """The socket inodes of a process; its files come and go while they are listed."""
    links = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.add(link.readlink().name)
    return {name for name in links if name.startswith("socket:")}


@pytest.mark.neo4j
@pytest.mark.skipif(not Path("/proc/net/tcp").exists() and not Path("/proc/net/tcp6").exists(), reason="needs Linux's /proc to see who listens")
def test_server_listens_on_the_loopback_only(neo4j_server: Neo4jTestServer) -> None:
    ours = _sockets(neo4j_server.info.pid)
    tables = [table for name in ("tcp", "tcp6") if (table := Path("/proc/net") / name).exists()]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    listening = {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in ours}
    assert listening
    assert listening <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.neo4j
def test_up_is_idempotent_and_status_and_credentials_know_the_server(neo4j_server: Neo4jTestServer) -> None:
    assert launcher.up(neo4j_server.home) == neo4j_server.info
    assert launcher.status(neo4j_server.home) == neo4j_server.info
    expected = (neo4j_server.username, neo4j_server.password)
    port = neo4j_server.uri.rsplit(":", 1)[1]
    for scheme, host in (("bolt", "127.0.0.1"), ("neo4j", "localhost")):
        assert launcher.saved_credentials(f"{scheme}://{host}:{port}", neo4j_server.home) == expected
    assert launcher.saved_credentials(f"bolt://localhost:{int(port) + 1}", neo4j_server.home) is None
    assert launcher.saved_credentials(f"bolt://db.example.org:{port}", neo4j_server.home) is None


@pytest.mark.neo4j
def test_admin_commands_are_refused_while_the_server_runs(neo4j_server: Neo4jTestServer) -> None:
    with pytest.raises(launcher.ServerRunning, match="featlas neo4j down"):
        launcher.run_admin(neo4j_server.home, "database", "info")


@pytest.mark.neo4j
@pytest.mark.slow
def test_data_and_password_outlive_a_restart_and_a_kill(neo4j_jars: None, tmp_path: Path) -> None:
    home = tmp_path / "server"
    info = launcher.up(home, THROWAWAY)
    password = info.password
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    with neo4j.GraphDatabase.driver(info.uri, auth=(info.username, password)) as driver:
        driver.execute_query("CREATE (:Feature {key: 'kept'})")
    os.kill(info.pid, 9)
    os.waitpid(info.pid, 0)
    assert launcher.status(home) is None  # server.json is there, its process is not
    assert launcher.saved_credentials(info.uri, home) is None
    again = launcher.up(home, THROWAWAY)
    try:
        assert again.password == password
        with neo4j.GraphDatabase.driver(again.uri, auth=(again.username, password)) as driver:
            assert driver.execute_query("MATCH (f:Feature) RETURN f.key AS key").records[0]["key"] == "kept"
    finally:
        assert launcher.down(home) is True
    assert launcher.down(home) is False
    assert not (home / "server.json").exists()
    assert not Path(f"/proc/{again.pid}").exists()
    (home / "password").unlink()
    with pytest.raises(launcher.PasswordLost, match="password is gone"):
        launcher.up(home, THROWAWAY)


@pytest.mark.neo4j
def test_server_that_dies_while_starting_shows_its_log(neo4j_jars: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "JVM_OPTIONS", ("-XX:NoSuchOption=1",))
    with pytest.raises(launcher.ServerNotStarted, match=r"(?s)ended while starting.*NoSuchOption"):
        launcher.up(tmp_path, THROWAWAY)
    assert launcher.status(tmp_path) is None


@pytest.mark.neo4j
def test_server_that_is_too_slow_is_ended(neo4j_jars: None, tmp_path: Path) -> None:
    hasty = launcher.ServerOptions(bolt_port=0, http_port=0, heap_mb=256, pagecache_mb=64, throwaway=True, start_limit_s=0.5)
    with pytest.raises(launcher.ServerNotStarted, match="did not answer within 0 s"):
        launcher.up(tmp_path, hasty)
    listed = subprocess.run(["ps", "-e", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert f"--home-dir={tmp_path} " not in listed


def test_taken_port_is_named_with_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(launcher.PortTaken, match=rf"port {port} .*--bolt-port"):
            launcher.free_port(port, "--bolt-port")
    assert launcher.free_port(port, "--bolt-port") == port
    assert launcher.free_port(0, "--bolt-port") > 0
    with pytest.raises(UserError, match="70000"):
        launcher.free_port(70000, "--http-port")


def test_left_over_process_id_of_another_program_is_never_signalled(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "server.json").write_text(json.dumps({"pid": other.pid, "bolt_port": 1, "http_port": 2}))
        assert launcher.status(tmp_path) is None
        assert launcher.down(tmp_path) is False
        assert other.poll() is None
        assert not (tmp_path / "server.json").exists()
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("text", ["", "not json", "{}", '{"pid": "x", "bolt_port": 1, "http_port": 2}', "[1]"])
def test_damaged_state_counts_as_not_running(tmp_path: Path, text: str) -> None:
    (tmp_path / "server.json").write_text(text)
    assert launcher.status(tmp_path) is None
    assert launcher.status(tmp_path / "nowhere") is None
    assert launcher.down(tmp_path / "nowhere") is False


def _fake_java(folder: Path, version: str) -> Path:
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2020-01-01' >&2\n")
    java.chmod(0o755)
    return java


@pytest.mark.parametrize(("version", "major"), [("17.0.15", 17), ("21", 21), ("1.8.0_402", 8), ("25.0.1", 25)])
def test_java_version_is_read(tmp_path: Path, version: str, major: int) -> None:
    assert java_version(_fake_java(tmp_path, version)) == major


def test_java_of_java_home_comes_first_and_wrong_ones_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, old = _fake_java(tmp_path / "good", "17.0.1"), _fake_java(tmp_path / "old", "11.0.2")
    monkeypatch.setattr(distribution_module, "SYSTEM_JAVAS", tmp_path / "none")
    monkeypatch.setenv("PATH", f"{good.parent}")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "old"))
    assert find_java() == good
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JavaMissing, match=rf"{old} is version 11.*openjdk-17-jre-headless.*JAVA_HOME"):
        find_java()
    monkeypatch.delenv("JAVA_HOME")
    with pytest.raises(JavaMissing, match="none was found"):
        find_java()


def test_missing_maven_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MavenMissing, match="apt-get install maven"):
        distribution()


def _fake_maven(folder: Path, body: str) -> None:
    folder.mkdir(exist_ok=True)
    maven = folder / "mvn"
    maven.write_text(f'#!/bin/sh\nfor a; do case "$a" in -DoutputDirectory=*) out="${{a#-DoutputDirectory=}}";; esac; done\n{body}\n')
    maven.chmod(0o755)


def test_jars_are_resolved_once_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_maven(tmp_path / "bin", f'echo asked >> {tmp_path}/log; sleep 0.2; mkdir -p "$out"; touch "$out/neo4j-{neo4j_version()}.jar"')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    threads = [threading.Thread(target=distribution) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "log").read_text().split() == ["asked"]
    assert [jar.name for jar in distribution().iterdir()] == [f"neo4j-{neo4j_version()}.jar"]
    assert sorted(path.name for path in distribution().parent.iterdir()) == [f"neo4j-{neo4j_version()}", f"neo4j-{neo4j_version()}.lock"]


def test_failed_download_leaves_nothing_and_shows_what_maven_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_maven(tmp_path / "bin", "echo 'Could not resolve dependencies'; exit 1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(distribution_module.DownloadFailed, match="Could not resolve dependencies"):
        distribution()
    assert not distribution_module.cache_folder().exists()


def test_lock_keeps_others_out(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with exclusive(tmp_path / "lock"):
            order.append("second")

    with exclusive(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_private_file_is_private_from_its_first_moment_and_never_overwritten(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        launcher.write_private(tmp_path / "password", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "password").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        launcher.write_private(tmp_path / "password", "y")


def test_default_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("FEATLAS_NEO4J_HOME", raising=False)
    assert launcher.default_home() == tmp_path / "featlas" / "neo4j"
    monkeypatch.setenv("FEATLAS_NEO4J_HOME", str(tmp_path / "mine"))
    assert launcher.default_home() == tmp_path / "mine"
