"""Settings from files: which count, what beats what, what is refused, and that help shows what is true."""

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from featlas import cli, cli_config, configuration, running
from featlas.configuration import BadConfiguration

ROOT: Any = running.tree(cli.app)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """A project with a folder in it, an atlas and a user's folder for settings."""
    found = {"project": tmp_path / "project", "inside": tmp_path / "project" / "a" / "b", "atlas": tmp_path / "atlas", "user": tmp_path / "xdg"}
    for path in (found["inside"], found["atlas"], found["user"] / "featlas"):
        path.mkdir(parents=True)
    return found


def write(folder: Path, text: str, name: str = "featlas.toml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def loaded(places: dict[str, Path], *arguments: str, **environment: str) -> configuration.Configuration:
    own = {"XDG_CONFIG_HOME": str(places["user"]), **environment}
    return configuration.load(ROOT, ["ingest", "edges", *arguments], environment=own, folder=places["inside"])


def edges(found: configuration.Configuration) -> dict[str, Any]:
    return found.default_map.get("ingest", {}).get("edges", {})


def test_the_nearest_file_counts_and_inside_a_file_the_narrowest_table(places: dict[str, Path]) -> None:
    write(places["user"] / "featlas", '[defaults]\nseed = 1\nlimit = 1\nsteps = 1\nmetric = "kl"\n[ingest.edges]\nlimit = 2\n', "config.toml")
    assert edges(loaded(places)) == {"seed": "1", "limit": "2", "steps": "1", "metric": "kl"}
    write(places["project"], "quiet = true\n[defaults]\nlimit = 3\nseed = 3\n[ingest]\nseed = 4\n[ingest.edges]\nfirst-factor = 'clean'\n")
    # [defaults] of the nearer file beats [ingest.edges] of the farther one
    assert edges(loaded(places)) == {"seed": "4", "limit": "3", "steps": "1", "metric": "kl", "first_factor": "clean"}
    assert loaded(places).default_map["quiet"] is True
    assert loaded(places).default_map["tasks"]["show"] == {"seed": "3", "limit": "3"}
    write(places["atlas"], "[defaults]\nlimit = 5\n")
    assert edges(loaded(places, "--atlas", str(places["atlas"])))["limit"] == "5"
    assert edges(loaded(places, f"--atlas={places['atlas']}"))["limit"] == "5"
    assert edges(loaded(places, FEATLAS_ATLAS=str(places["atlas"])))["limit"] == "5"
    assert edges(loaded(places))["limit"] == "3"


def test_the_variable_names_one_file_or_none(places: dict[str, Path]) -> None:
    write(places["project"], "[defaults]\nlimit = 3\n")
    other = write(places["atlas"], "[defaults]\nseed = 9\n", "other.toml")
    assert edges(loaded(places, FEATLAS_CONFIG=str(other))) == {"seed": "9"}
    assert loaded(places, FEATLAS_CONFIG="").default_map == {}
    with pytest.raises(BadConfiguration, match=r"none\.toml, which is no file: `featlas config init`"):
        loaded(places, FEATLAS_CONFIG="none.toml")


def test_paths_stand_as_seen_from_their_file(places: dict[str, Path]) -> None:
    write(places["project"], '[defaults]\natlas = "here"\nmodel = "smollm2"\ncorpus = "./text"\n')
    (places["project"] / "text").mkdir()
    found = loaded(places)
    assert edges(found) == {"atlas": str(places["project"] / "here"), "model": "smollm2"}
    assert found.default_map["ingest"]["statistics"]["corpus"] == str(places["project"] / "text")
    # the atlas that a file names has its own file too
    (places["project"] / "here").mkdir()
    write(places["project"] / "here", "[defaults]\nlimit = 8\n")
    assert edges(loaded(places))["limit"] == "8"


def test_lists_are_given_as_the_command_line_takes_them(places: dict[str, Path]) -> None:
    write(places["project"], '[defaults]\nsites = ["resid_3", "mlp_4"]\n[query]\nparam = ["limit=3", "run=a"]\n[analyze.agreement]\nk = [10, 0.5]\n')
    found = loaded(places)
    assert edges(found)["sites"] == "resid_3,mlp_4"
    assert found.default_map["query"]["param"] == ["limit=3", "run=a"]
    assert found.default_map["analyze"]["agreement"]["k"] == "10,0.5"


@pytest.mark.parametrize(("text", "message"), [
    ("[defaults]\nlimt = 3", r"\[defaults\]: there is no 'limt': did you mean 'limit'\?"),
    ("[ingest.edgs]\nlimit = 3", r"\[ingest\]: there is no 'edgs': did you mean 'edges'\?"),
    ("[ingst]\nlimit = 3", r"there is no 'ingst': did you mean 'ingest'\?"),
    ("limit = 3", r"there is no 'limit': options stand in a table, \[defaults\]"),
    ("[ingest.edges]\nzzzzzz = 3", r"there is no 'zzzzzz': `featlas ingest edges --help` lists the options"),
    ("[defaults]\nlimit = 'x'", r"limit = 'x': .*valid integer"),
    ("[ingest.edges]\nmetric = 'brilliance'", r"\(for ingest edges\): metric = 'brilliance': .*logit_diff"),
    ("[ingest.edges]\nseed = true", "seed = true: it takes a text or a number"),
    ("[ingest.edges]\nskip-invalid = 'yes'", "skip-invalid = 'yes': it takes true or false"),
    ("[ingest.edges]\njson = true", "'json' is for the command line alone"),
    ("[ingest.edges]\ntask = 'nonsense'", "there is no task 'nonsense'"),
    ("limit = ", "is no TOML"),
    ("limit = " + "[" * 5000, "nested too deep"),
])  # fmt: skip
def test_what_is_wrong_is_refused_with_the_way_out(places: dict[str, Path], text: str, message: str) -> None:
    path = write(places["project"], text + "\n")
    with pytest.raises(BadConfiguration, match=message) as refused:
        loaded(places)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("line", ["password = 'hunter2'", "neo4j_password = 'hunter2'", "hf-token = 'hunter2'", "graph = 'bolt://me:hunter2@host'"])
def test_secrets_are_refused_and_not_repeated(places: dict[str, Path], line: str) -> None:
    for text in (line, f"[defaults]\n{line}"):
        write(places["project"], text + "\n")
        with pytest.raises(BadConfiguration, match=r"NEO4J_PASSWORD|there is no 'graph'") as refused:
            loaded(places)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("line", ["graph-tool = '/tmp/evil'", "output = '/tmp/evil'", "atlas = '/tmp/evil'", "graph = 'bolt://evil'"])
def test_an_atlas_of_somebody_else_runs_and_writes_nothing(places: dict[str, Path], line: str) -> None:
    write(places["atlas"], f"[defaults]\n{line}\n")
    with pytest.raises(BadConfiguration, match="an atlas' own file cannot set"):
        loaded(places, "--atlas", str(places["atlas"]))


def test_the_command_line_beats_the_environment_beats_files(
    featlas: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FEATLAS_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(places["user"]))
    monkeypatch.chdir(places["inside"])
    write(places["project"], '[defaults]\natlas = "by_file"\n')
    assert str(places["project"] / "by_file") in featlas("query", "runs")[2]
    monkeypatch.setenv("FEATLAS_ATLAS", str(tmp_path / "by_variable"))
    assert "by_variable" in featlas("query", "runs")[2]
    assert "by_option" in featlas("query", "runs", "--atlas", tmp_path / "by_option")[2]
    monkeypatch.delenv("FEATLAS_ATLAS")
    shown = " ".join(featlas("ingest", "edges", "--help")[1].split())
    assert "by_file" in shown.replace(" ", "")  # help tells the default that is true here


@pytest.mark.slow
def test_the_commands(featlas: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEATLAS_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(places["user"]))
    monkeypatch.chdir(places["inside"])
    listed = json.loads(featlas("config", "path", "--json")[1])
    assert [(one["kind"], one["exists"]) for one in listed] == [("atlas", False), ("project", False), ("user", False)]
    assert "no file sets anything" in featlas("config", "show")[1]
    assert featlas("config", "init")[0] == 0
    made = places["inside"] / "featlas.toml"
    assert tomllib.loads(made.read_text()) == {"defaults": {}, "ingest": {"edges": {}}}
    code, _, said = featlas("config", "init")
    assert (code, "--force" in said) == (2, True)
    made.write_text("[defaults]\nseed = 5\n")
    assert json.loads(featlas("config", "show", "--json")[1]) == [{"section": "[defaults]", "option": "seed", "value": "5", "from": str(made)}]
    monkeypatch.setenv("NEO4J_URI", "bolt://me:hunter2@host")
    rows = {row["option"]: row for row in json.loads(featlas("config", "show", "ingest", "edges", "--json")[1])}
    assert (rows["seed"]["value"], rows["seed"]["from"]) == ("5", str(made))
    assert (rows["limit"]["value"], rows["limit"]["from"]) == (100, "built in")
    assert (rows["graph"]["value"], rows["graph"]["from"]) == ("bolt://…@host", "NEO4J_URI")
    assert "featlas config show ingest edges" in featlas("config", "show", "nonsense")[2]
    assert json.loads(featlas("config", "init", "--user", "--json")[1]) == {"path": str(places["user"] / "featlas" / "config.toml")}


def test_a_broken_file_does_not_stop_the_commands_about_files(featlas: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEATLAS_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(places["user"]))
    monkeypatch.chdir(places["inside"])
    write(places["project"], "nonsense = 1\n")
    code, _, said = featlas("query", "--list")
    assert (code, "nonsense" in said) == (2, True)
    assert featlas("config", "path")[0] == 0
    assert featlas("config", "init")[0] == 0
    assert featlas("config", "show")[0] == 0  # the nearer file, just made, counts instead


def test_the_template_names_options_that_there_are() -> None:
    text = cli_config.template(ROOT)
    uncommented = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines() if "…" not in line.partition("  #")[0])
    given = tomllib.loads(uncommented)
    assert set(given["defaults"]) <= set(cli_config.IN_TEMPLATE)
    assert given["ingest"]["edges"] == {"steps": 10, "threshold": 0.0}
    assert os.environ["FEATLAS_CONFIG"] == ""  # tests are not run with anybody's own settings
