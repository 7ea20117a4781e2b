"""The command as a user meets it: help at once, one line for a mistake, exit codes, JSON for machines."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import polars as pl
import pytest
from featlas import cli, console
from featlas.ingest.effective import Baseline, Positions
from featlas.model.metrics import Metric
from featlas.queries.store import open_graph

from .layered_circuit import layered_circuit
from .micro import save_tiny

FEATLAS = Path(sys.executable).parent / "featlas"


def installed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    return subprocess.run([str(FEATLAS), *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


def featlas(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has the heavy imports behind it, without the surroundings' settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FEATLAS_", "NEO4J_"))}
    line, out, err = ["featlas", *map(str, arguments)], io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {"FEATLAS_CONFIG": "", **clean, **environment}, clear=True), mock.patch.object(sys, "argv", line),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left,
    ):  # fmt: skip
        cli.main()
    return subprocess.CompletedProcess(line, int(left.value.code or 0), out.getvalue(), err.getvalue())


def all_commands() -> list[tuple[str, ...]]:
    """Every command with the group it stands in."""
    found = [(command.name or "",) for command in cli.app.registered_commands]
    for group in cli.app.registered_groups:
        assert group.typer_instance is not None
        found += [(group.name or "", command.name or "") for command in group.typer_instance.registered_commands]
    return found


def test_importing_the_command_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "plotly", "polars", "sae_lens", "nnsight", "ladybug", "neo4j", "duckdb", "numpy", "pyarrow")
    script = f"import sys, featlas.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_help_answers_within_a_second() -> None:
    best = 10.0
    for _ in range(3):
        started = time.monotonic()
        assert installed("--help").returncode == 0
        best = min(best, time.monotonic() - started)
    assert best < 1.0


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_each_command_has_help(command: tuple[str, ...]) -> None:
    done = featlas(*command, "--help")
    assert done.returncode == 0
    assert f"featlas {' '.join(command)}" in done.stdout
    assert len(done.stdout.splitlines()) > 4


def test_commands_are_those_of_the_design() -> None:
    assert set(all_commands()) == {
        ("demo",), ("doctor",), ("plan",), ("query",), ("report",), ("serve",), ("export",), ("compare",), ("analyze", "joint"), ("neo4j", "import"),
        ("import", "circuit-tracer"), ("import", "files"), ("neo4j", "browser"),
        ("tasks", "list"), ("tasks", "show"), ("tasks", "build"), ("tasks", "check"), ("tasks", "bios"), ("tasks", "probe"),
        ("dictionaries", "list"), ("dictionaries", "train"), ("dictionaries", "evaluate"), ("ingest", "edges"), ("ingest", "statistics"),
        ("ingest", "samples"), ("ingest", "aligned"), ("analyze", "match"),
        ("series", "train"), ("series", "measure"), ("series", "list"), ("series", "show"),
        ("ingest", "finish"), ("ingest", "weights"), ("ingest", "correlations"), ("ingest", "definitions"), ("analyze", "circuit"),
        ("analyze", "agreement"), ("analyze", "selectivity"), ("analyze", "faithfulness"), ("analyze", "effects"), ("analyze", "mixture"),
        ("analyze", "improve"), ("analyze", "rois"), ("analyze", "ablate-rois"), ("analyze", "communities"), ("analyze", "heads"),
        ("analyze", "rank"), ("analyze", "paths"), ("analyze", "vision"), ("explain", "ablation"), ("explain", "attribution"),
        ("labels", "set"), ("labels", "remove"), ("labels", "import"), ("labels", "export"), ("labels", "auto"), ("labels", "list"),
        ("labels", "search"),
        ("plot",), ("neo4j", "up"), ("neo4j", "down"), ("neo4j", "status"),
        ("config", "path"), ("config", "show"), ("config", "init"),
        ("atlas", "info"), ("atlas", "check"), ("atlas", "copy"), ("atlas", "prune"),
    }  # fmt: skip


def test_choices_on_the_command_line_are_those_of_the_library() -> None:
    text = " ".join(featlas("ingest", "edges", "--help").stdout.replace("\n", " ").split())
    assert f"[{'|'.join(Metric)}]" in text.replace(" ", "") or all(choice in text for choice in Metric)
    for choice in (*Baseline, *Positions, *Metric):
        assert choice in text


def mistake(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One line on standard error, nothing on standard output, the exit code, and what the line must name."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("featlas: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.slow
def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    mistake(installed("nonsense"), 2, "nonsense")
    mistake(installed("query", "runs", "--atlas", tmp_path / "none"), 2, "none", "featlas demo")
    mistake(featlas("ingest", "edges", "--metric", "brilliance"), 2, "--metric", "brilliance")
    mistake(featlas("query", "runs", "--atlas", tmp_path / "none"), 2, "none", "featlas demo")
    mistake(featlas("analyze", "circuit", "--atlas", tmp_path / "none"), 2, "no graph in", "--atlas")
    mistake(featlas("query", "runs", "--graph", "http://127.0.0.1:1"), 2, "http://127.0.0.1:1", "bolt://")
    mistake(featlas("ingest", "statistics"), 2, "--corpus", "--task")


def test_a_server_that_is_down_is_a_failure_with_exit_code_1() -> None:
    mistake(featlas("query", "runs", "--graph", "bolt://127.0.0.1:1"), 1, "bolt://127.0.0.1:1")


def test_no_arguments_show_the_help_and_fail() -> None:
    done = featlas()
    assert done.returncode == 2
    assert "Usage: featlas" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_unexpected_errors_keep_their_traceback() -> None:
    script = "import sys, featlas.cli as c; c.console.say = lambda *a: 1 / 0; sys.argv = ['featlas', '--version']; c.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" in done.stderr


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas with one run of a random layered graph."""
    folder = tmp_path_factory.mktemp("atlas")
    circuit, _ = layered_circuit(n_sites=4, per_site=20)
    nodes = circuit.nodes.select("key", "site", "layer", "kind").with_columns(model=pl.lit("m@1"), dictionary=pl.lit("d"), index=pl.lit(-1))
    edges = circuit.edges.select("source", "target", "weight", abs_weight=pl.col("strength"), run=pl.lit("abc123"), n=pl.lit(1))
    sequence = {"key": "s1", "task": "agreement", "clean": "The dogs", "corrupt": "The dog", "answer": " are", "wrong_answer": " is"}
    with open_graph(folder) as store:
        store.merge_nodes("Model", pl.DataFrame([{"key": "m@1", "name": "m"}]))
        run = {"key": "abc123", "model": "m@1", "task": "agreement", "metric": "logit_diff", "dictionaries": '{"resid_0": "d"}', "status": "done"}
        store.merge_nodes("Run", pl.DataFrame([run]))
        store.merge_nodes("Sequence", pl.DataFrame([sequence]))
        store.merge_nodes("Feature", nodes)
        store.merge_edges("INFLUENCES", edges)
        attributes = circuit.edges.select("source", "target", "weight")
        store.commit_sequence("abc123", "s1", attributes, {"metric_clean": 2.0, "metric_corrupt": -1.0})
    return folder


def test_circuit_by_threshold_is_printed_written_and_repeated(atlas: Path) -> None:
    done = featlas("analyze", "circuit", "--threshold", 0.5, "--atlas", atlas, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["n_edges"] == len(found["edges"]) > 0
    assert min(edge["strength"] for edge in found["edges"]) >= 0.5
    assert found["run"] == "abc123"
    again = json.loads(featlas("analyze", "circuit", "--threshold", 0.5, "--atlas", atlas, "--json").stdout)
    assert again["circuit"] == found["circuit"]
    with open_graph(atlas, read_only=True) as store:
        assert store.query("MATCH (c:Circuit) RETURN c.key AS key, c.n_edges AS n").rows() == [(found["circuit"], found["n_edges"])]
    table = featlas("analyze", "circuit", "--threshold", 0.5, "--atlas", atlas, "--no-write").stdout
    for part in ("Where the effect flows", "Features with the most influence", "Strongest paths", "resid_4", "average degree"):
        assert part in table


@pytest.mark.slow
def test_circuit_mistakes(atlas: Path) -> None:
    mistake(featlas("analyze", "circuit", "--threshold", 1e9, "--atlas", atlas), 2, "1e+09", "the first path is whole at --threshold")
    mistake(featlas("analyze", "circuit", "--run", "zzz", "--atlas", atlas), 2, "zzz", "abc123")
    mistake(featlas("analyze", "circuit", "--sequence", "zzz", "--atlas", atlas), 2, "zzz")


@pytest.mark.slow
def test_circuits_of_a_task_of_others_and_by_hand(atlas: Path, tmp_path: Path) -> None:
    def analyze(*arguments: object) -> dict[str, Any]:
        done = featlas("analyze", "circuit", *arguments, "--atlas", atlas, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def pairs(found: dict[str, Any]) -> set[tuple[str, str]]:
        return {(edge["source"], edge["target"]) for edge in found["edges"]}

    large, small = analyze("--edges", 120), analyze("--task", "agreement", "--threshold", 2.0)
    assert small["description"] == "task 'agreement' of run 'abc123': edges with abs_weight >= 2"
    either, both = (analyze(f"--{name}", f"{small['circuit'][:12]},{large['circuit']}") for name in ("union", "intersection"))
    rest = analyze("--difference", f"{large['circuit']},{small['circuit']}", "--no-prune")
    assert pairs(either) == pairs(large) | pairs(small)
    assert pairs(both) == pairs(large) & pairs(small)
    assert pairs(rest) == pairs(large) - pairs(small)
    file = tmp_path / "edges.csv"
    pl.DataFrame(small["edges"]).select("source", "target").write_csv(file)
    by_file = analyze("--file", file)
    asked = "MATCH (a:Feature)-[e:CIRCUIT_EDGE]->(b:Feature) WHERE e.circuit = '{}' RETURN a.key AS source, b.key AS target"
    by_query = analyze("--cypher", asked.format(small["circuit"]))
    assert pairs(by_file) == pairs(by_query) == pairs(small)
    assert by_file["description"] == "file edges.csv"
    assert "made of union of" in featlas("analyze", "circuit", "--union", f"{small['circuit']},{rest['circuit']}", "--atlas", atlas).stdout
    mistake(featlas("analyze", "circuit", "--task", "ioi", "--atlas", atlas), 2, "'ioi'", "agreement")
    mistake(featlas("analyze", "circuit", "--union", small["circuit"], "--atlas", atlas), 2, "two or more")
    mistake(featlas("analyze", "circuit", "--union", "zz,yy", "--atlas", atlas), 2, "no circuit 'zz'", small["circuit"])
    mistake(featlas("analyze", "circuit", "--union", "a,b", "--file", file, "--atlas", atlas), 2, "--union and --file exclude each other")
    mistake(featlas("analyze", "circuit", "--file", file, "--threshold", 1, "--atlas", atlas), 2, "--file and --threshold")
    mistake(featlas("analyze", "circuit", "--task", "a", "--sequence", "b", "--atlas", atlas), 2, "--task and --sequence")
    mistake(featlas("analyze", "circuit", "--cypher", "MATCH (f:Feature) RETURN f.site AS site", "--atlas", atlas), 2, "name neither edges")
    mistake(featlas("analyze", "circuit", "--cypher", "MATCH (f:Feature) SET f.label = 'x'", "--no-write", "--atlas", atlas), 2, "refused")


def test_environment_names_the_atlas(atlas: Path) -> None:
    done = featlas("analyze", "circuit", "--edges", 50, "--no-write", "--json", FEATLAS_ATLAS=str(atlas))
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["n_edges"] <= 55


def test_report_is_one_file(atlas: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = featlas("report", "--output", page, "--atlas", atlas, "--max-edges", 100, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"file": str(page), "bytes": page.stat().st_size}
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert f"<title>Atlas {atlas.name}</title>" in text
    mistake(featlas("report", "--output", tmp_path / "no" / "folder.html", "--atlas", atlas), 2, "folder.html")


@pytest.mark.slow
def test_query_formats_and_refused_writes(atlas: Path, tmp_path: Path) -> None:
    cypher = "MATCH (r:Run) RETURN r.key AS run, r.task AS task"
    assert json.loads(featlas("query", "--cypher", cypher, "--atlas", atlas, "--format", "json").stdout) == [{"run": "abc123", "task": "agreement"}]
    assert featlas("query", "--cypher", cypher, "--atlas", atlas, "--format", "csv").stdout == "run,task\nabc123,agreement\n"
    assert "abc123" in featlas("query", "--cypher", cypher, "--atlas", atlas).stdout
    file = tmp_path / "out.parquet"
    assert featlas("query", "--cypher", cypher, "--atlas", atlas, "--format", "parquet", "--output", file).returncode == 0
    assert pl.read_parquet(file).rows() == [("abc123", "agreement")]
    mistake(featlas("query", "--cypher", cypher, "--atlas", atlas, "--format", "parquet"), 2, "--output")
    write = "MATCH (r:Run) SET r.status = 'broken'"
    mistake(featlas("query", "--cypher", write, "--atlas", atlas), 2, "--write")
    assert featlas("query", "--cypher", write, "--atlas", atlas, "--write").returncode == 0
    status = featlas("query", "--cypher", "MATCH (r:Run) RETURN r.status AS status", "--atlas", atlas, "--format", "csv").stdout
    assert status == "status\nbroken\n"


def test_a_run_that_is_not_there_is_a_mistake_and_no_rows_are_said(atlas: Path) -> None:
    mistake(featlas("query", "hubs", "--param", "run=nope", "--atlas", atlas), 2, "nope", "abc123")
    assert featlas("query", "hubs", "--param", "run=abc", "--atlas", atlas).returncode == 0  # the beginning of the key is enough
    done = featlas("query", "feature_inputs", "--param", "feature=nope", "--atlas", atlas, "--format", "json")
    assert json.loads(done.stdout) == []
    assert "feature=nope" in done.stderr


def test_wrong_query_shows_the_databases_message(atlas: Path) -> None:
    done = featlas("query", "--cypher", "MATCH (f:Feature RETURN f", "--atlas", atlas)
    assert done.returncode == 2
    assert "Parser exception" in done.stderr
    assert "Traceback" not in done.stderr


def test_parameters_are_numbers_where_they_look_like_it(atlas: Path) -> None:
    cypher = "MATCH (f:Feature) WHERE f.layer >= $least AND f.kind = $kind RETURN count(f) AS n"
    done = featlas("query", "--cypher", cypher, "--param", "least=4", "--param", "kind=feature", "--atlas", atlas, "--format", "csv")
    assert done.stdout == "n\n60\n", done.stderr
    mistake(featlas("query", "--cypher", cypher, "--param", "least", "--atlas", atlas), 2, "least", "name=value")


def test_tables_do_not_read_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("token", "n"), [("[bold red]x[/]", 1), ("[/nonsense]", 22)])
    printed = capsys.readouterr().out
    assert "[bold red]x[/]" in printed
    assert "[/nonsense]" in printed


def test_neo4j_status_and_down_without_a_server(tmp_path: Path) -> None:
    status = featlas("neo4j", "status", "--home", tmp_path)
    assert status.returncode == 1
    assert "featlas neo4j up" in status.stdout
    assert featlas("neo4j", "down", "--home", tmp_path).stdout.strip() == "no Neo4j of featlas was running"


def test_doctor_names_what_it_found(tmp_path: Path) -> None:
    done = featlas("doctor", "--atlas", tmp_path, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0
    assert checks["torch"]["status"] == "ok"
    assert {"graph-tool", "java", "maven", "chromium", "embedded graph", "statistics", "memory", "disk", "pot"} <= set(checks)


@pytest.mark.slow
def test_from_pairs_to_circuit_on_a_tiny_model(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model" / "tiny")
    pairs = [{"clean": f"w1 w{i} w3", "corrupt": f"w1 w{i + 9} w3", "answer": " w5", "wrong_answer": " w6"} for i in range(7, 12)]
    task = tmp_path / "pairs.jsonl"
    task.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    named = ["--model", model, "--dictionaries", "identity", "--sites", "resid_0,resid_1", "--task", task, "--atlas", tmp_path / "atlas", "--json"]
    first = json.loads(featlas("ingest", "edges", *named).stdout)
    assert first["n_sequences"] == 5
    assert first["n_edges"] > 0
    again = json.loads(featlas("ingest", "edges", *named).stdout)
    assert (again["run"], again["n_edges"], again["n_skipped"]) == (first["run"], 0, 5)
    statistics = json.loads(featlas("ingest", "statistics", *named).stdout)
    assert statistics["sequences"] == 10
    # identity has 16 features and an error node at each of two sites; the output is no feature of a dictionary
    assert 0 < statistics["annotated"] <= 34
    finished = json.loads(featlas("ingest", "finish", first["run"][:6], "--atlas", tmp_path / "atlas", "--json").stdout)
    assert finished == {"run": first["run"], "n_influences": first["n_influences"]}
    circuit = json.loads(featlas("analyze", "circuit", "--threshold", 0, "--atlas", tmp_path / "atlas", "--json").stdout)
    assert {node["site"] for node in circuit["nodes"]} == {"resid_0", "resid_1", "y"}
    assert circuit["n_edges"] == first["n_influences"]
    labels = featlas("query", "--cypher", "MATCH (f:Feature) WHERE f.label IS NOT NULL RETURN count(f) AS n", "--atlas", tmp_path / "atlas")
    assert int(labels.stdout.split()[-1]) > 0
    checked = json.loads(featlas("tasks", "check", task, "--model", model, "--json").stdout)
    assert checked[0]["n"] == 5


@pytest.mark.slow
def test_correlations_of_a_tiny_model(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(7 * i * i + i // 5) % 40}" for i in range(1200)), encoding="utf-8")
    atlas = ["--atlas", tmp_path / "atlas"]
    named = ["--model", save_tiny(tmp_path / "model" / "tiny"), "--dictionaries", "identity", "--sites", "resid_0,resid_1,resid_2", "--corpus", text]
    mistake(featlas("ingest", "correlations", *atlas), 2, "no statistics store", "featlas ingest statistics")
    assert featlas("ingest", "statistics", *named, *atlas, "--length", 20, "--between", "all", "--memory", "100MB").returncode == 0
    found = json.loads(featlas("ingest", "correlations", *atlas, "--min-r", 0.2, "--max-edges", 25, "--json").stdout)
    assert found["n_tested"] == 48 * 47 // 2  # 16 neurons at each of three sites; their error nodes are always 0
    assert found["n_significant"] > found["n_edges"] == 25
    edges = featlas("query", "--cypher", "MATCH (a:Feature)-[c:CORRELATES]->(b:Feature) RETURN count(c) AS n", *atlas)
    assert int(edges.stdout.split()[-1]) == 25
    shown = featlas("ingest", "correlations", *atlas, "--min-r", 0.2, "--max-edges", 10)
    assert "10 CORRELATES edges" in shown.stdout
    assert "weaker ones are in the statistics only" in shown.stderr
    null = featlas("ingest", "statistics", *named, *atlas, "--length", 20, "--between", "all", "--shuffled")
    assert null.returncode == 0, null.stderr
    by_chance = featlas("ingest", "correlations", *atlas)
    assert "CORRELATES" not in by_chance.stdout
    mistake(featlas("ingest", "correlations", "zzz", *atlas), 2, "zzz", "shuffled activations of")
    mistake(featlas("ingest", "correlations", *atlas, "--fdr", 2), 2, "fdr is 2.0")


@pytest.mark.slow
def test_weights_of_a_tiny_model(tmp_path: Path) -> None:
    task = tmp_path / "pairs.jsonl"
    task.write_text(json.dumps({"clean": "w1 w2 w3", "corrupt": "w1 w4 w3", "answer": " w5", "wrong_answer": " w6"}), encoding="utf-8")
    model = save_tiny(tmp_path / "model" / "tiny")
    named = ["--model", model, "--dictionaries", "identity", "--sites", "resid_0,resid_1", "--atlas", tmp_path / "atlas"]
    first = json.loads(featlas("ingest", "weights", *named, "--task", task, "--json").stdout)
    assert (first["kinds"], first["tokens"]) == (["residual", "attention", "mlp"], 4)
    (pair,) = first["pairs"]
    assert [report["kind"] for report in pair["reports"]] == first["kinds"]
    assert pair["reports"][0]["edges"] == 16  # neurons: along the stream each to itself
    assert {row["role"] for row in first["heads"]} == {"write", "value", "query", "key"}
    again = featlas("ingest", "weights", *named, "--task", task)
    assert "was there" in again.stdout
    assert "0 edges and 0 heads' shares written" in again.stdout
    wired = json.loads(featlas("query", "wired_paths", "--param", "site=resid_1", "--format", "json", "--atlas", tmp_path / "atlas").stdout)
    assert sum(row["n_wires"] for row in wired) == first["edges"]
    plain = featlas("ingest", "weights", *named, "--no-heads", "--top-k", 1, "--memory", "1MB", "--weight", "cosine", "--keep", "inputs")
    assert "paths through MLPs were left out" in plain.stderr
    assert "heads with" not in plain.stdout.lower()
    for words, said in (
        (["--paths", "mlp"], ("--task", "--corpus")), (["--paths", "ov"], ("'ov'", "residual, attention, mlp")),
        (["--norm-scale", "mean"], ("mean scales", "--task")), (["--memory", "much"], ("'much'", "512MB")), (["--memory", "1KB"], ("give at least",)),
        (["--task", task, "--corpus", task], ("--corpus", "--task")), (["--top-k", 0], ("--top-k 0",)),
    ):
        mistake(featlas("ingest", "weights", *named, *words), 2, *said)


def test_unusable_pairs_are_named_and_left_out_when_asked(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model" / "tiny")
    good = {"clean": "w1 w2", "corrupt": "w1 w4", "answer": " w5", "wrong_answer": " w6"}
    task = tmp_path / "pairs.jsonl"
    task.write_text("".join(json.dumps(pair) + "\n" for pair in (good, good | {"corrupt": "w1"})), encoding="utf-8")
    mistake(featlas("tasks", "show", task, "--model", model), 2, "line 2", "--skip-invalid")
    shown = featlas("tasks", "show", task, "--model", model, "--skip-invalid", "--json")
    assert [pair["clean"] for pair in json.loads(shown.stdout)] == ["w1 w2"]
    assert "line 2" in shown.stderr


@pytest.mark.graphtool
def test_doctor_finds_graph_tool_in_its_own_python(tmp_path: Path) -> None:
    if not Path("/usr/bin/python3").exists() or subprocess.run(["/usr/bin/python3", "-c", "import graph_tool"], check=False).returncode:
        pytest.skip("graph-tool is not installed under /usr/bin/python3")
    checks = {check["name"]: check for check in json.loads(featlas("doctor", "--atlas", tmp_path, "--json").stdout)}
    assert checks["graph-tool"]["status"] == "ok"
