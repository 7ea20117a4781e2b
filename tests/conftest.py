"""What all tests share: threads, the real Neo4j, and the rule that CI skips no test of a real service."""

import os
import signal
import sys

# On small shared machines two OpenMP threads spin against each other and cost a factor of 25: before torch is imported by any test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["FEATLAS_CONFIG"] = ""  # no settings from files of whoever runs the tests

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import pytest
from featlas.queries.neo4j_distribution import DownloadFailed, JavaMissing, MavenMissing, distribution, find_java

from .servers import Neo4jTestServer, start_server, stop_server

if TYPE_CHECKING:
    from featlas.queries.store import GraphStore

    from .study_atlas import TinyAtlas

SERVICES = ("neo4j", "graphtool", "browser", "smollm2")  # markers of tests that need something outside the Python environment


def pytest_configure() -> None:
    """A shell that runs the tests in the background lets them ignore SIGINT, and every process that they start too: interrupts are tested."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test of a real service is a failure: there everything has been installed."""
    report = yield
    marked = [name for name in SERVICES if item.get_closest_marker(name)]
    if in_ci() and marked and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} (marked {', '.join(marked)}) must not be skipped in CI: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """In CI a test file that skips itself whole is a failure: its markers cannot be seen."""
    report = yield
    if in_ci() and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} must not skip itself in CI: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def neo4j_jars() -> None:
    """Java and Neo4j's jars are there (the jars are downloaded once per machine); skips with what is missing."""
    try:
        find_java()
        distribution()
    except (JavaMissing, MavenMissing, DownloadFailed) as error:
        pytest.skip(f"no real Neo4j here: {error}")


@pytest.fixture(scope="session")
def neo4j_server(neo4j_jars: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neo4jTestServer]:
    """One real Neo4j for the whole session, with authentication; what it holds at a test's start is not defined: see `clean_neo4j`."""
    server = start_server(tmp_path_factory.mktemp("neo4j"))
    yield server
    stop_server(server)


@pytest.fixture
def clean_neo4j(neo4j_server: Neo4jTestServer) -> Neo4jTestServer:
    """The session's Neo4j without any node (constraints and indexes of earlier tests may be there)."""
    neo4j_server.wipe()
    return neo4j_server


@pytest.fixture
def known_neo4j(clean_neo4j: Neo4jTestServer, monkeypatch: pytest.MonkeyPatch) -> Neo4jTestServer:
    """`clean_neo4j`, with its user and password in the environment."""
    monkeypatch.setenv("NEO4J_USERNAME", clean_neo4j.username)
    monkeypatch.setenv("NEO4J_PASSWORD", clean_neo4j.password)
    return clean_neo4j


@pytest.fixture
def featlas(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> "Callable[..., tuple[int, str, str]]":
    """Run featlas in this process, without the surroundings' settings: (exit code, standard output, standard error)."""
    from featlas import cli

    for name in ("NEO4J_URI", "FEATLAS_ATLAS"):
        monkeypatch.delenv(name, raising=False)

    def do(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["featlas", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return do


@pytest.fixture
def refused(run: "Callable[..., tuple[int, str, str]]") -> "Callable[..., str]":
    """The one line on standard error of a mistake of the user's, by the module's own `run`."""

    def do(*arguments: object) -> str:
        code, out, err = run(*arguments)
        lines = [line for line in err.splitlines() if line.strip()]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("featlas: ")
        return lines[0]

    return do


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "TinyAtlas":
    """The tiny atlas of runs, made once and only ever read: tests that write copy it."""
    from .study_atlas import tiny_atlas

    return tiny_atlas(tmp_path_factory)


@pytest.fixture(scope="module")
def store(tiny: "TinyAtlas") -> "Iterator[GraphStore]":
    """The tiny atlas' graph, for reading; modules that write have a store of their own."""
    from featlas.queries.store import open_graph

    with open_graph(tiny.atlas, read_only=True) as opened:
        yield opened


@pytest.fixture
def by_value() -> Iterator[None]:
    """A worker's process need not find the tests' modules: the functions of `cluster_work` travel whole."""
    from ray import cloudpickle

    from . import cluster_work

    cloudpickle.register_pickle_by_value(cluster_work)
    yield
    cloudpickle.unregister_pickle_by_value(cluster_work)
