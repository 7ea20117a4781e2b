"""Who imports whom, and where Cypher, plotly and each database's driver may stand; each check is shown to fail on a bad file."""

import subprocess
from pathlib import Path

import pytest

from .imports_rule import REGISTRY_HOSTS, registry_hosts, violations

ROOT = Path(__file__).resolve().parents[1]


def tracked(*patterns: str) -> list[str]:
    """Files of the repository by git, untracked ones that are not ignored included."""
    line = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_the_package_keeps_the_rule() -> None:
    files = tracked("*.py")
    assert {"errors.py", "queries/server.py", "queries/embedded.py", "model/binding.py"} <= set(files)
    found = [violation for name in files for violation in violations(name, (ROOT / name).read_text())]
    assert found == []


def test_no_file_names_a_registry_by_host() -> None:
    found = []
    for name in tracked():
        if name == "uv.lock":
            continue
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {host}" for host in registry_hosts(text)]
    assert found == []


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("model/a.py", "from ..queries.store import open_graph", "model must not import .queries.store"),
        ("model/a.py", "from .. import ingest", "model must not import .ingest"),
        ("queries/a.py", "def f():\n    from ..model import sites", "queries must not import .model"),
        ("ingest/a.py", "from ..analysis.circuits import prune", "ingest must not import .analysis.circuits"),
        ("analysis/a.py", "from ..ingest import pipeline", "analysis must not import .ingest"),
        ("analysis/a.py", "from ..cli import main", "analysis must not import .cli"),
        ("errors.py", "from .model import sites", "errors.py must not import .model"),
        ("model/a.py", "from featlas.errors import UserError", "relative, not featlas.errors"),
        ("cli.py", "import featlas.model.sites", "relative, not featlas.model.sites"),
        ("queries/a.py", "from ....x import y", "..outside"),
        ("__init__.py", '"""featlas."""\nimport os', "docstring and nothing else"),
        ("__init__.py", "", "docstring and nothing else"),
        ("ingest/a.py", "import ladybug", "ladybug may be imported only in queries/embedded.py"),
        ("queries/embedded.py", "from neo4j import GraphDatabase", "neo4j may be imported only in queries/server.py"),
        ("queries/bulk_import.py", "def f():\n    import neo4j.exceptions", "neo4j may be imported only in queries/server.py"),
        ("analysis/a.py", "import duckdb", "duckdb may be imported only in"),
        ("analysis/summary.py", "import plotly.graph_objects as go", "plotly may be imported only in"),
        ("analysis/a.py", "import graph_tool.all", "graph_tool may be imported only in analysis/graph_tool_worker.py"),
        ("model/a.py", "import pickle", "pickle may be imported only in no file"),
        ("model/a.py", "weights = torch.load(path)", "torch.load runs code"),
        ("ingest/a.py", "moments = np.load(path, allow_pickle=True)", "allow_pickle runs code"),
        ("analysis/a.py", "q = 'MATCH (n) RETURN n'", "Cypher stands only under queries/"),
        ("ingest/a.py", "q = f'MERGE (n:{label}) SET n.x = 1'", "Cypher stands only under queries/"),
        ("cli.py", "q = '''\nCREATE (:Run {key: $key})'''", "Cypher stands only under queries/"),
        ("analysis/a.py", "q = 'MATCH p = shortestPath((a)-[*]->(b)) RETURN p'", "Cypher stands only under queries/"),
    ],
)
def test_a_bad_file_is_caught(path: str, text: str, said: str) -> None:
    found = violations(path, text)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("model/a.py", "import torch\nfrom ..errors import UserError\nfrom .sites import Site\nfrom . import tasks"),
        ("ingest/a.py", "from ..model.sites import Site\nfrom ..queries import store"),
        ("analysis/plots.py", "import plotly.graph_objects as go\nfrom ..queries.store import open_graph"),
        ("analysis/region_plots.py", "import plotly.graph_objects as go"),
        ("cli.py", "from .ingest import pipeline\nfrom .analysis.summary import write"),
        ("queries/server.py", "import neo4j\nq = 'MATCH (n) RETURN n'"),
        ("queries/a.py", "from .neo4j_server import up"),
        ("analysis/a.py", '"""Cypher like MATCH (n) in a docstring is an explanation."""'),
        ("analysis/a.py", "text = 'no match (yet), create (nothing)'"),
        ("__init__.py", '"""featlas."""'),
    ],
)
def test_a_good_file_is_let_through(path: str, text: str) -> None:
    assert violations(path, text) == []


def test_registry_host_is_caught() -> None:
    for host in REGISTRY_HOSTS:
        assert host in registry_hosts(f"get it from https://{host}/simple")
    assert registry_hosts("conda install -c conda-forge openjdk; brew install maven") == []
