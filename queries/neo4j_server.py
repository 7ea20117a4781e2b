"""A real Neo4j Community server with its Browser on this machine, started and stopped by featlas.

`up`, under a lock on the server's home folder:
1. `status`: a server of this home that runs already is the answer.
2. `free_port`: a port of the loopback for bolt, one for the Browser.
3. `distribution`: Java and the jars.
4. `prepare_home`: the folders, the configuration, a generated password.
5. `_start`: the Java process in a session of its own, so that it outlives the caller.
6. `_wait_until_ready`: within a time limit, or the process is ended and the log's tail shown.

The password is kept in `<home>/password`, which only its owner can read; it is handed to Neo4j in a file as well, so that it
never stands on a command line. The process is known by its id in `<home>/server.json` and is only ever signalled when that
id still belongs to the Neo4j of this home.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from string import Template
from urllib.parse import urlsplit

from ..errors import FeatlasError, UserError
from .neo4j_distribution import GDS_FOLDER, distribution, exclusive, find_java, gds_plugin

USERNAME = "neo4j"
LOOPBACK = "127.0.0.1"
BOLT_PORT, HTTP_PORT = 7687, 7474
ENTRY_POINT = "org.neo4j.server.CommunityEntryPoint"
ADMIN_TOOL = "org.neo4j.cli.AdminTool"
PROC = Path("/proc")
STOP_LIMIT_S = 60.0
LOG_TAIL_LINES = 20
# what Neo4j's own start script passes to Java 17
JVM_OPTIONS = (
    "-Dfile.encoding=UTF-8", "-Dio.netty.tryReflectionSetAccessible=true", "-XX:+ExitOnOutOfMemoryError",
    "--add-opens=java.base/java.nio=ALL-UNNAMED", "--add-opens=java.base/java.io=ALL-UNNAMED", "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
)  # fmt: skip


class PortTaken(FeatlasError):
    """Something else listens where the server should."""


class ServerNotStarted(FeatlasError):
    """Neo4j ended, or was not ready in time."""


class ServerNotStopped(FeatlasError):
    """The process is still there after its time limit."""


class ServerRunning(FeatlasError):
    """The database's files cannot be touched while its server runs."""


class PasswordLost(FeatlasError):
    """The server has data, and its password's file is gone."""


class BadCertificate(UserError):
    """A server's certificate or its key cannot be used."""


class AdminFailed(FeatlasError):
    """An administration command of Neo4j ended with an error."""


@dataclass(frozen=True)
class TlsFiles:
    """A server's certificate (PEM, with those between it and its authority behind it) and its private key (PEM, PKCS #8, not encrypted)."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class ServerOptions:
    """How to run a server: ports (0 takes any free one), memory in MiB, seconds to wait until it answers.

    `throwaway` is for tests: it stops in 2 s instead of 10 by not waiting for its clients, and takes the small garbage collector.
    `gds` adds the open edition of Graph Data Science; without it a server that had it starts without.
    With `tls` bolt is encrypted, and answers to nothing else.
    """

    bolt_port: int = BOLT_PORT
    http_port: int = HTTP_PORT
    heap_mb: int = 2048
    pagecache_mb: int = 256
    start_limit_s: float = 180.0
    throwaway: bool = False
    gds: bool = False
    tls: TlsFiles | None = None


@dataclass(frozen=True)
class ServerInfo:
    """A running server: where it listens, who logs in and where the password is kept, and its process."""

    uri: str
    http_url: str
    username: str
    password_file: Path
    pid: int

    @property
    def password(self) -> str:
        """The generated password, read from its file; no field, so that it is in no representation or log."""
        return self.password_file.read_text().strip()


def default_home() -> Path:
    """`$FEATLAS_NEO4J_HOME`, or `featlas/neo4j` in the user's data folder: one local server serves all atlases of a user."""
    named = os.environ.get("FEATLAS_NEO4J_HOME")
    if named:
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "featlas" / "neo4j"


def up(home: Path, options: ServerOptions | None = None) -> ServerInfo:
    """Start the server of `home` and wait until it answers; the one that runs already is returned as it is.

    Raises JavaMissing, MavenMissing or DownloadFailed before anything is started, PortTaken, BadCertificate, ServerRunning where TLS is
    asked of one that runs without, and ServerNotStarted with the tail of its log.
    """
    options = options or ServerOptions()
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with exclusive(home / "lock"):
        running = status(home)
        if running is not None:
            if options.tls is not None and not running.uri.startswith("bolt+s:"):
                raise ServerRunning(f"the server of {home} runs without TLS: featlas neo4j down, then up again with the certificate")
            return running
        java, jars = find_java(), distribution()
        ports = free_port(options.bolt_port, "--bolt-port"), free_port(options.http_port, "--http-port")
        prepare_home(home, options, *ports)
        info = _start(home, options, _java_line(java, jars, options, home), ports)
        _wait_until_ready(home, info, options.start_limit_s)
        return info


def status(home: Path) -> ServerInfo | None:
    """The running server of `home`, None when it does not run (a left-over server.json of a dead process counts as that)."""
    home = home.absolute()
    try:
        state = json.loads((home / "server.json").read_text())
        info = _info(home, int(state["pid"]), (int(state["bolt_port"]), int(state["http_port"])), tls=bool(state.get("tls")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return info if _is_server_of(home, info.pid) else None


def down(home: Path) -> bool:
    """Stop the server of `home` and wait until it is gone; False when none was running.

    A server that has not ended after a minute is killed: committed data survives that (Neo4j recovers it at the next start).
    """
    home = home.absolute()
    if not home.is_dir():
        return False
    with exclusive(home / "lock"):
        running = status(home)
        if running is not None:
            _end(home, running.pid)
        (home / "server.json").unlink(missing_ok=True)
    return running is not None


def saved_credentials(uri: str, home: Path | None = None) -> tuple[str, str] | None:
    """(username, password) of the local server at `uri`, when the server of `home` (`default_home()` unless given) is the one that runs there.

    The process is checked, so that the password never goes to another program that took over the port.
    """
    home = home or default_home()
    address = urlsplit(uri)
    running = status(home)
    if running is None or address.hostname not in (LOOPBACK, "localhost", "::1"):
        return None
    if (address.port or BOLT_PORT) != urlsplit(running.uri).port:
        return None
    return running.username, running.password


def run_admin(home: Path, *arguments: str, folder: Path | None = None) -> str:
    """Run one `neo4j-admin` command on the stopped server of `home`, in `folder`, and return what it printed.

    Raises ServerRunning when it is not stopped, AdminFailed with the reason.
    """
    home = home.absolute()
    if status(home) is not None:
        raise ServerRunning(f"the Neo4j of {home} is running: stop it first (`featlas neo4j down`)")
    for part in ("conf", "plugins", "import", "logs"):
        (home / part).mkdir(parents=True, exist_ok=True)
    line = [str(find_java()), "-Dfile.encoding=UTF-8", f"-Dbasedir={home}", "-cp", f"{distribution()}/*", ADMIN_TOOL, *arguments]
    environment = {**os.environ, "NEO4J_HOME": str(home), "NEO4J_CONF": str(home / "conf")}
    done = subprocess.run(
        line, env=environment, cwd=folder, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
    )  # fmt: skip
    printed = done.stdout + done.stderr
    if done.returncode:
        raise AdminFailed(f"neo4j-admin {' '.join(arguments[:2])} ended with code {done.returncode}: {_admin_reason(printed)}")
    return printed


def _admin_reason(printed: str) -> str:
    """The innermost cause of what a failed command printed with `--verbose`, else its last lines."""
    lines = printed.strip().splitlines()
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    if causes:
        return causes[-1].partition(": ")[2] or causes[-1]  # without the name of the Java class
    return "\n".join(lines[-LOG_TAIL_LINES:])


def free_port(port: int, option: str) -> int:
    """`port` if nothing listens there on the loopback, any free one for 0; PortTaken names it and the option that changes it."""
    if not 0 <= port <= 65535:
        raise UserError(f"{option} {port} is no port: give one from 1 to 65535, or 0 for any free one")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was closed a moment ago is free
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise PortTaken(
                f"port {port} of {LOOPBACK} cannot be used ({error.strerror}), perhaps by another Neo4j: stop that or choose another by {option}"
            ) from error
        return int(probe.getsockname()[1])


def prepare_home(home: Path, options: ServerOptions, bolt_port: int, http_port: int) -> None:
    """Write the configuration, and set the password of a server that has never been started."""
    for folder in ("conf", "plugins", "import", "logs"):
        (home / folder).mkdir(exist_ok=True)
    here = Path(__file__)
    settings = Template(here.with_name("neo4j.conf").read_text()).substitute(
        bolt_port=bolt_port, http_port=http_port, pagecache_mb=options.pagecache_mb
    )
    if options.throwaway:
        settings += here.with_name("neo4j_throwaway.conf").read_text()
    if options.gds:
        settings += "dbms.security.procedures.unrestricted=gds.*\n"
    if options.tls is not None:
        _place_certificate(home / "certificates" / "bolt", options.tls)
        settings += here.with_name("neo4j_tls.conf").read_text()
    _link_gds(home / "plugins", gds_plugin() if options.gds else None)
    (home / "conf" / "neo4j.conf").write_text(settings)
    password_file = home / "password"
    if (home / "data" / "databases" / "system").exists():  # users are made at the first start
        if not password_file.exists():
            raise PasswordLost(f"{password_file} is gone and the server has data: put the file back, or move {home} away and start empty")
        return
    if not password_file.exists():
        write_private(password_file, secrets.token_hex(16))
    # neo4j-admin takes the password as an argument, and any argument from a file: this keeps it off the command line
    run_admin(home, "dbms", "set-initial-password", f"@{password_file}")


def _place_certificate(folder: Path, files: TlsFiles) -> None:
    """Copies of the certificate and the key where the server looks for them, the key for its owner alone. Raises `BadCertificate`."""
    try:
        certificate, key = files.certificate.read_text(), files.key.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadCertificate(f"the certificate {files.certificate} and its key {files.key} must be readable PEM files: {error}") from None
    if "-----BEGIN CERTIFICATE-----" not in certificate:
        raise BadCertificate(f"{files.certificate} holds no certificate in PEM (-----BEGIN CERTIFICATE-----)")
    if "-----BEGIN PRIVATE KEY-----" not in key:
        raise BadCertificate(
            f"{files.key} holds no private key that Neo4j reads (-----BEGIN PRIVATE KEY-----): openssl pkcs8 -topk8 -nocrypt -in KEY -out NEWKEY"
        )
    try:  # Neo4j starts with a key of another certificate, and then no client can talk to it
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise BadCertificate(f"{files.key} is not the key of the certificate {files.certificate}, or one of them is damaged: {error}") from None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, text in (("public.crt", certificate), ("private.key", key)):
        (folder / name).unlink(missing_ok=True)
        write_private(folder / name, text)


def _link_gds(plugins: Path, jars: Path | None) -> None:
    """Links to the jars of Graph Data Science in the folder of plugins in place of those that were there; what else is there stays."""
    for link in plugins.iterdir():
        if link.is_symlink() and GDS_FOLDER in link.readlink().parent.name:
            link.unlink()
    for jar in jars.glob("*.jar") if jars is not None else ():
        (plugins / jar.name).symlink_to(jar)


def write_private(path: Path, text: str) -> None:
    """Make the file `path`, readable by its owner alone from its first moment; it must not exist yet."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _java_line(java: Path, jars: Path, options: ServerOptions, home: Path) -> list[str]:
    """The command line that Neo4j's start script would make."""
    memory = [f"-Xms{min(256, options.heap_mb)}m", f"-Xmx{options.heap_mb}m"]
    collector = ["-XX:+UseSerialGC"] if options.throwaway else []
    class_path = f"{home}/conf:{home}/plugins/*:{jars}/*"
    return [
        str(java), *memory, *collector, *JVM_OPTIONS, "-cp", class_path, ENTRY_POINT,
        f"--home-dir={home}", f"--config-dir={home}/conf", "--console-mode",
    ]  # fmt: skip


def _start(home: Path, options: ServerOptions, line: list[str], ports: tuple[int, int]) -> ServerInfo:
    """Start the process and note its id."""
    log = os.open(home / "logs" / "console.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        # not Popen: nobody here waits for its end, the server lives on when this process is done
        actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        pid = os.posix_spawn(line[0], line, os.environ, file_actions=actions, setsid=True)
    finally:
        os.close(log)
    _await_exec(home, pid)
    tls = options.tls is not None
    state = {"pid": pid, "bolt_port": ports[0], "http_port": ports[1], "tls": tls}
    part = home / "server.json.part"
    part.write_text(json.dumps(state))
    part.replace(home / "server.json")
    return _info(home, pid, ports, tls=tls)


def _await_exec(home: Path, pid: int) -> None:
    """Wait until the command line of a new process shows: for an instant after the start it is empty, as that of an ended one is."""
    deadline = time.monotonic() + 5
    while not _is_server_of(home, pid) and _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)


def _info(home: Path, pid: int, ports: tuple[int, int], *, tls: bool) -> ServerInfo:
    bolt_port, http_port = ports
    return ServerInfo(f"bolt{'+s' if tls else ''}://{LOOPBACK}:{bolt_port}", f"http://{LOOPBACK}:{http_port}", USERNAME, home / "password", pid)


def _wait_until_ready(home: Path, info: ServerInfo, limit_s: float) -> None:
    """Return when bolt accepts and the Browser's port answers; end the process and raise ServerNotStarted after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not _answers(info):
        ended = not _is_server_of(home, info.pid)
        if ended or time.monotonic() > deadline:
            tail = _log_tail(home)
            _end(home, info.pid)
            (home / "server.json").unlink(missing_ok=True)
            why = "ended while starting" if ended else f"did not answer within {limit_s:.0f} s"
            raise ServerNotStarted(f"Neo4j {why}; the end of {home}/logs/console.log:\n{tail}")
        time.sleep(0.1)


def _answers(info: ServerInfo) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy to the loopback
    try:
        with socket.create_connection((LOOPBACK, urlsplit(info.uri).port or BOLT_PORT), timeout=5), direct.open(info.http_url, timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


def _log_tail(home: Path) -> str:
    lines = (home / "logs" / "console.log").read_text(errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])


def _end(home: Path, pid: int) -> None:
    """Ask the process to end, wait until it has, kill it after the limit; it is signalled only while it is the server of `home`."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if _is_server_of(home, pid):
            os.kill(pid, sent)
        deadline = time.monotonic() + STOP_LIMIT_S
        while _is_alive(pid):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return
    raise ServerNotStopped(f"process {pid}, the Neo4j of {home}, did not end: stop it by hand (`kill -9 {pid}`)")


def _is_server_of(home: Path, pid: int) -> bool:
    """Whether process `pid` runs and is the Neo4j of `home`: an id may by now belong to another program."""
    line = _command_line(pid)
    return ENTRY_POINT in line and f"--home-dir={home}" in line


def _is_alive(pid: int) -> bool:
    """Whether there is a process `pid` that has not ended; an ended child of this process is collected, so that nothing is left of it."""
    ended = _has_ended(pid) if PROC.is_dir() else _ps("stat", pid)[:1] in ("", "Z")
    if ended:
        with contextlib.suppress(ChildProcessError):  # another's child: that one's parent collects it
            os.waitpid(pid, os.WNOHANG)
    return not ended


def _has_ended(pid: int) -> bool:
    """By /proc: no such process, or one whose main thread has ended (Z) with no other thread left to hold files and ports."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()  # the state first, the number of threads eighteenth
    except (FileNotFoundError, ProcessLookupError):
        return True
    return fields[0] in "ZX" and int(fields[17]) <= 1


def _command_line(pid: int) -> list[str]:
    """The arguments of a process, empty when there is none; from /proc, or by `ps` where there is no /proc (macOS)."""
    if not PROC.is_dir():
        return _ps("command", pid).split()
    try:
        return (PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _ps(column: str, pid: int) -> str:
    return subprocess.run(["ps", "-ww", "-o", f"{column}=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()
