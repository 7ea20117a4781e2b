"""What is printed and drawn: a terminal obeys no label, a page runs none, and no password stands in anything that is written."""

import json
import re
from pathlib import Path

import polars as pl
import pytest
from featlas import console
from featlas.queries.store import open_graph

from .chromium import CHROMIUM, visited

HOSTILE = (
    "</script><img src=x onerror=pwned=1>", "<!--<script>pwned=2</script>", "\u2028pwned=3", "{{constructor.constructor('pwned=4')()}}",
    "`${pwned=5}`",
    "javascript:pwned=6", "\"><svg onload=pwned=7>", "'-pwned=8-'", "<a href=\"javascript:pwned=9\">x</a>", "&lt;img src=x onerror=pwned=10&gt;",
    "\x1b]0;titled\x07\x1b[2J", "\u202etxet\u202c", "[red]bold[/red]", "=cmd|' /C calc'!A0", "x" * 5000,
)  # fmt: skip


def fill(folder: Path) -> None:
    """Features, a run, its sequence and a circuit, all called something hostile."""
    n = len(HOSTILE)
    keys = [f"m|d|resid_{i % 2}|{i}" for i in range(n)]
    with open_graph(folder) as store:
        features = pl.DataFrame({
            "key": [*keys, "m|-|y|logit_diff"], "site": [*(f"resid_{i % 2}" for i in range(n)), "y"], "layer": [*(i % 2 for i in range(n)), -1],
            "index": [*range(n), -1], "kind": ["feature"] * n + ["output"], "label": [*HOSTILE, "logit_diff"], "model": "m",
            "dictionary": HOSTILE[0],
        })  # fmt: skip
        store.merge_nodes("Feature", features)
        run = {"key": "r1", "model": "m", "task": HOSTILE[0], "metric": "logit_diff", "dictionaries": "{}", "method": HOSTILE[6]}
        store.merge_nodes("Run", pl.DataFrame([{**run, "status": "done"}]))
        text = {"key": "s1", "task": HOSTILE[1], "clean": HOSTILE[0], "corrupt": HOSTILE[6], "answer": HOSTILE[8]}
        store.merge_nodes("Sequence", pl.DataFrame([text]))
        edges = pl.DataFrame({"source": keys, "target": ["m|-|y|logit_diff"] * n, "weight": [1.0 / (i + 1) for i in range(n)]})
        store.commit_sequence("r1", "s1", edges, {})
        store.merge_edges("INFLUENCES", edges.with_columns(abs_weight="weight", run=pl.lit("r1"), n=1))


# --- terminals --------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_control_characters_and_obeys_none(featlas, tmp_path: Path) -> None:
    assert console.shown("a\x1b[2J\x07\x9b\u202eb\r\tc\n\x7f") == "a␛[2J␇\\x9b\\u202eb␍\tc\n␡"
    fill(tmp_path)
    code, out, err = featlas("query", "--cypher", "MATCH (f:Feature) RETURN f.label AS label ORDER BY f.`index`", "--atlas", tmp_path)
    assert code == 0, err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)
    assert "␛]0;titled␇" in out
    assert "[red]bold[/red]" in out
    code, out, _ = featlas("query", "--json", "--cypher", "MATCH (f:Feature) RETURN f.label AS label ORDER BY f.`index`", "--atlas", tmp_path)
    assert [row["label"] for row in json.loads(out)][1:] == list(HOSTILE)  # a pipe gets them as they are
    code, _, err = featlas("query", "runs\x1b[2J", "--atlas", tmp_path)
    assert (code, "\x1b" in err) == (2, False)


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.slow
def test_no_label_runs_in_the_report_and_none_leaves_its_place(featlas, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    fill(tmp_path)
    code, _, err = featlas("report", "--atlas", tmp_path, "--output", tmp_path / "report.html")
    assert code == 0, err
    for tab in ("overview", "circuit", "features", "queries"):
        address = tmp_path / "report.html"
        with visited(address, "#tabs", CHROMIUM) as (page, requests, complaints):
            page.evaluate(f"location.hash = 'tab={tab}'")
            page.wait_for_timeout(400)
            for row in page.query_selector_all("tbody tr, .feature, a[href^='#']")[:12]:
                if row.is_visible():
                    row.hover(timeout=1000, force=True)
            assert page.evaluate("typeof window.pwned") == "undefined", tab
            assert page.query_selector("img[src=x], svg[onload], a[href^='javascript:']") is None, tab
            assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
            assert not [text for text in complaints if "Content Security Policy" in text]


# --- secrets ----------------------------------------------------------------------------------------------------------

CANARY = "c4nary-p4ssw0rd"


@pytest.mark.slow
def test_no_password_stands_in_what_is_printed_or_written(featlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of every kind, most of them failing, with secrets in the environment and in the file of a password."""
    fill(tmp_path / "atlas")
    kept = tmp_path.parent / f"{tmp_path.name}-password"
    kept.write_text(CANARY)
    kept.chmod(0o600)
    monkeypatch.setenv("HF_TOKEN", f"hf_{CANARY}")
    atlas = tmp_path / "atlas"
    nowhere = "bolt://127.0.0.1:1"
    commands = [
        ("query", "runs", "--atlas", atlas), ("query", "--cypher", "RETURN $NEO4J_PASSWORD", "--atlas", atlas),
        ("query", "runs", "--graph", nowhere), ("query", "runs", "--graph", f"bolt://neo4j:{CANARY}@127.0.0.1:1"),
        ("report", "--atlas", atlas, "--output", tmp_path / "report.html"), ("config", "show"), ("config", "path"),
        ("export", "--format", "graphml", "--run", "r1", "--atlas", atlas, "--output", tmp_path / "g.graphml"),
        ("config", "init", "--json"), ("doctor", "--json", "--graph", nowhere), ("neo4j", "status", "--home", tmp_path / "home"),
        ("analyze", "circuit", "--run", "r1", "--atlas", atlas, "--json"),
        ("ingest", "edges", "--model", tmp_path, "--task", "ioi", "--atlas", atlas),
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for how in ({"NEO4J_PASSWORD": CANARY}, {"NEO4J_PASSWORD_FILE": str(kept)}):
        with monkeypatch.context() as patch:
            for name, value in how.items():
                patch.setenv(name, value)
            for command in commands:
                code, out, err = featlas(*command)
                assert code in (0, 1, 2), (command, err)
                assert CANARY not in out + err, (command, out, err)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 2
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []


def test_no_representation_tells_a_password() -> None:
    from featlas.queries.neo4j_server import ServerInfo
    from featlas.queries.store import ServerCredentials

    assert CANARY not in repr(ServerCredentials("neo4j", CANARY))
    assert CANARY not in repr(ServerInfo("bolt://x", "http://x", "neo4j", Path("password"), 1))
