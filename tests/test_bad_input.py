"""What users get wrong, and what may be down: one line that names the value and the way out, the exit code, nothing written."""

import json
import sys
from pathlib import Path

import polars as pl
import pytest
from featlas import cli
from featlas.queries.store import open_graph

from .micro import save_tiny

GOOD = {"clean": "w1 w2 w3", "corrupt": "w1 w4 w3", "answer": " w5", "wrong_answer": " w6"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command in this process; its one line on standard error, the exit code checked."""
    for name in ("NEO4J_URI", "NEO4J_USERNAME", "NEO4J_PASSWORD", "FEATLAS_ATLAS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, code: int) -> str:
        monkeypatch.setattr(sys, "argv", ["featlas", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.strip()]
        assert ended.value.code == code, printed.err
        assert printed.out == ""
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("featlas: ")
        return lines[0]

    return run


def task_file(folder: Path, *pairs: dict[str, str]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def ingest(model: Path, task: Path, atlas: Path, *more: object) -> list[object]:
    return ["ingest", "edges", "--model", model, "--task", task, "--atlas", atlas, "--dictionaries", "identity", "--sites", "resid_1", *more]


def test_unequal_lengths(refused, model, tmp_path):
    task = task_file(tmp_path, GOOD, GOOD | {"corrupt": "w1 w4 w3 w3"})
    line = refused(*ingest(model, task, tmp_path / "atlas"), code=2)
    assert "line 2" in line
    assert "3 tokens" in line or "clean 3" in line
    assert "4" in line.split("line 2", 1)[1]
    assert "--skip-invalid" in line
    assert not (tmp_path / "atlas" / "graph.lbug").exists()


def test_answers_of_several_tokens(refused, model, tmp_path):
    task = task_file(tmp_path, GOOD, GOOD, GOOD | {"answer": " w5 w6"})
    line = refused(*ingest(model, task, tmp_path / "atlas"), code=2)
    assert "line 3" in line
    assert "w5 w6" in line
    assert "token" in line


def test_an_unknown_site(refused, model, tmp_path):
    line = refused(*ingest(model, task_file(tmp_path, GOOD), tmp_path / "atlas", "--sites", "residual_3"), code=2)
    assert "'residual_3'" in line
    assert "resid_3" in line
    line = refused(*ingest(model, task_file(tmp_path, GOOD), tmp_path / "atlas", "--sites", "mlp_9"), code=2)
    assert "mlp_9" in line
    assert not (tmp_path / "atlas" / "graph.lbug").exists()


def test_a_missing_dictionary(refused, model, tmp_path):
    line = refused(*ingest(model, task_file(tmp_path, GOOD), tmp_path / "atlas", "--dictionaries", tmp_path / "nowhere"), code=2)
    assert "nowhere" in line
    (tmp_path / "dictionaries" / "resid_0").mkdir(parents=True)
    (tmp_path / "dictionaries" / "resid_0" / "cfg.json").write_text("{}")
    line = refused(*ingest(model, task_file(tmp_path, GOOD), tmp_path / "atlas", "--dictionaries", tmp_path / "dictionaries"), code=2)
    assert "resid_1" in line
    assert "resid_0" in line


def test_a_store_that_is_down(refused, model, tmp_path):
    line = refused(*ingest(model, task_file(tmp_path, GOOD), tmp_path / "atlas", "--graph", "bolt://127.0.0.1:1"), code=1)
    assert "bolt://127.0.0.1:1" in line
    assert "featlas neo4j up" in line


def test_a_password_in_the_address(refused):
    line = refused("query", "runs", "--graph", "bolt://user:hunter2@127.0.0.1:1", code=2)
    assert "hunter2" not in line
    assert "NEO4J_PASSWORD" in line


@pytest.mark.neo4j
def test_a_wrong_password(refused, model, tmp_path, neo4j_server, monkeypatch):
    monkeypatch.setenv("NEO4J_USERNAME", neo4j_server.username)
    monkeypatch.setenv("NEO4J_PASSWORD", "not-the-word")
    line = refused(*ingest(model, task_file(tmp_path, GOOD), tmp_path / "atlas", "--graph", neo4j_server.uri), code=2)
    assert neo4j_server.uri in line
    assert "NEO4J_PASSWORD" in line
    assert "not-the-word" not in line


def test_a_schema_of_another_version(refused, model, tmp_path):
    atlas = tmp_path / "atlas"
    atlas.mkdir()
    with open_graph(atlas) as store:
        store.merge_nodes("Meta", pl.DataFrame({"key": ["schema_version"], "value": ["999"]}))
    line = refused(*ingest(model, task_file(tmp_path, GOOD), atlas), code=2)
    assert "999" in line
    assert "--atlas" in line


@pytest.mark.neo4j
def test_a_servers_schema_of_another_version(refused, tmp_path, clean_neo4j, monkeypatch):
    monkeypatch.setenv("NEO4J_USERNAME", clean_neo4j.username)
    monkeypatch.setenv("NEO4J_PASSWORD", clean_neo4j.password)
    with open_graph(clean_neo4j.uri) as store:
        store.merge_nodes("Meta", pl.DataFrame({"key": ["schema_version"], "value": ["999"]}))
    assert "999" in refused("query", "runs", "--graph", clean_neo4j.uri, code=2)


def test_text_that_is_not_utf8(refused, model, tmp_path):
    task = tmp_path / "pairs.jsonl"
    task.write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"clean": "caf\xe9"}\n')
    line = refused(*ingest(model, task, tmp_path / "atlas"), code=2)
    assert "pairs.jsonl" in line
    assert "UTF-8" in line
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(b"w1 w2 caf\xe9 w3")
    arguments = ["--model", model, "--dictionaries", "identity", "--sites", "resid_1", "--corpus", corpus, "--atlas", tmp_path / "atlas"]
    line = refused("ingest", "statistics", *arguments, "--length", 32, code=2)
    assert "corpus.txt" in line
    assert "UTF-8" in line
    assert "byte 9" in line


@pytest.mark.slow
def test_settings_of_the_engine_out_of_range(refused, model, tmp_path):
    task = task_file(tmp_path, GOOD)
    for options, message in [
        (("--steps", 0), "--steps 0"),
        (("--screen", 0), "--screen 0.0"),
        (("--tolerance", -1), "--tolerance -1.0"),
        (("--memory", "lots"), "--memory 'lots'"),
        (("--memory", "1MB"), "--memory of 1048576 bytes"),
        (("--threshold", -1), "--threshold -1.0"),
        (("--limit", 0), "--limit 0"),
        (("--batch-size", 0), "--batch-size 0"),
        (("--noise-scale", "nan"), "--noise-scale nan"),
        (("--baseline", "noise"), "--statistics-run"),
        (("--mean", "per-position"), "not of counterfactual"),
        (("--metric", "kl", "--steps", 1), "'kl'"),
        (("--first-factor", "interpolated", "--tail-dtype", "bfloat16"), "--tail-dtype"),
        (("--target", "resid_1/99999"), "99999"),
        (("--baseline", "resample"), "no other"),
    ]:
        assert message in refused(*ingest(model, task, tmp_path / "atlas", *options), code=2)
    assert not (tmp_path / "atlas" / "graph.lbug").exists()
