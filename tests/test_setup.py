"""The ways in: make's targets, the set-up script, the CI entry, the compose file, and the rule that CI skips nothing."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from featlas.queries.neo4j_distribution import neo4j_version

ROOT = Path(__file__).resolve().parents[1]


def run(*line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["demo", "check", "test", "setup", "help"])
def test_make_knows_what_each_target_does(target: str) -> None:
    done = run("make", "-n", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_demo_and_check_ask_for_no_program_of_the_system() -> None:
    for target in ("demo", "check"):
        assert "setup.sh system" not in run("make", "-n", target).stdout
    assert "setup.sh system" in run("make", "-n", "test").stdout


def test_environment_is_made_once_for_each_lock_file() -> None:
    stamp = re.search(r"made-from-(\d+)", run("make", "-n", "-W", "no-such-file", "--always-make", "python").stdout)
    assert stamp is not None
    made = ROOT / ".venv" / f"made-from-{stamp[1]}"
    planned = run("make", "-n", "python").stdout
    assert ("setup.sh python" in planned) is (not made.exists())


@pytest.mark.parametrize("script", [".ci/run", "scripts/setup.sh", "scripts/typecheck.sh"])
def test_script_can_be_run_and_parses(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert (ROOT / script).read_text().startswith("#!/usr/bin/env bash\n")
    assert run("bash", "-n", script).returncode == 0


def test_set_up_says_what_it_takes() -> None:
    done = run("scripts/setup.sh")
    assert done.returncode == 2
    assert "python|system" in done.stderr


def test_what_cannot_be_installed_is_explained(tmp_path: Path) -> None:
    """Without apt-get and the programs, every one of them is named with its package and its conda-forge or macOS way."""
    for name in ("bash", "dirname", "id", "env"):
        (tmp_path / name).symlink_to(Path("/usr/bin") / name if (Path("/usr/bin") / name).exists() else Path("/bin") / name)
    done = run("scripts/setup.sh", "system", PATH=str(tmp_path), HOME=str(tmp_path), JAVA_HOME="")
    assert done.returncode == 1
    for expected in ("apt-get install maven", "brew install maven", "conda-forge maven", "playwright install", "make check"):
        assert expected in done.stderr


def test_compose_file_keeps_to_the_loopback_and_has_no_default_password() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["neo4j"]
    assert service["image"] == f"neo4j:{neo4j_version()}-community"
    assert sorted(service["ports"]) == ["127.0.0.1:7474:7474", "127.0.0.1:7687:7687"]
    assert re.fullmatch(r"neo4j/\$\{NEO4J_PASSWORD:\?[^}]+\}", service["environment"]["NEO4J_AUTH"])
    assert "neo4j-data:/data" in service["volumes"]
    assert {"healthcheck", "restart"} <= service.keys()
    assert {name for name in service["environment"] if "memory" in name} == {
        "NEO4J_server_memory_heap_initial__size", "NEO4J_server_memory_heap_max__size", "NEO4J_server_memory_pagecache_size",
    }  # fmt: skip


SKIPPING = """
import pytest
{whole}
@pytest.mark.neo4j
def test_service():
    pytest.skip("no server")

def test_other():
    pytest.skip("no matter")

@pytest.mark.browser
@pytest.mark.xfail(reason="known")
def test_known():
    assert False
"""


def outcome(tmp_path: Path, ci: str, whole: str = "") -> str:
    """Run a file of skipping tests under this project's conftest hooks in a process of its own; pytest's last line."""
    (tmp_path / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.conftest import *\n")
    (tmp_path / "test_skipping.py").write_text(SKIPPING.format(whole=whole))
    line = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(line, cwd=tmp_path, env={**os.environ, "CI": ci, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.slow
def test_ci_counts_a_skipped_service_as_failed(tmp_path: Path) -> None:
    assert outcome(tmp_path, ci="").startswith("2 skipped, 1 xfailed")
    assert outcome(tmp_path, ci="true").startswith("1 failed, 1 skipped, 1 xfailed")


@pytest.mark.slow
def test_ci_counts_a_file_that_skips_itself_as_failed(tmp_path: Path) -> None:
    whole = "pytest.importorskip('no_such_module')"
    assert outcome(tmp_path, "", whole).startswith("1 skipped")
    assert "1 error" in outcome(tmp_path, "true", whole)


def test_every_file_of_the_packages_is_installed_with_them() -> None:
    """What a package reads at run time must be named as its data, or an installed featlas lacks it."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    listed = subprocess.run(["git", "ls-files", "model", "ingest", "queries", "analysis"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(name) for name in listed.stdout.split("\n") if name and not name.endswith(".py")]
    assert len(files) > 20
    left_out = [str(f) for f in files if not any(Path(*f.parts[1:]).match(pattern) for pattern in data.get(f"featlas.{f.parts[0]}", []))]
    assert left_out == []
