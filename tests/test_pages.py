"""What pages show, against what the frames say when read one by one; and the file that a report is."""

import base64
import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from featlas.pages.commands import commands_of
from featlas.pages.document import PACKED_FROM, document, embedded
from featlas.pages.payload import BadPageParameter, UnknownPage, answer, feature_pages
from featlas.pages.report import NothingToReport, ReportOptions, contents, render
from featlas.pages.source import PageSource, plain
from featlas.pages.studies import NoStatistics, NoSuchStudy
from featlas.queries.pages import circuits_of
from featlas.queries.schema import NODES
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import open_graph
from featlas.queries.subgraphs import RunRow

from .layered_circuit import HOSTILE
from .page_atlas import MODEL, RUN, SEQUENCES, SITES, PageAtlas, key_of, page_atlas


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PageAtlas:
    return page_atlas(tmp_path_factory.mktemp("pages") / "atlas")


@pytest.fixture(scope="module")
def source(made: PageAtlas) -> Iterator[PageSource]:
    with open_graph(made.folder, read_only=True) as store, StatisticsStore(made.folder, read_only=True) as statistics:
        yield PageSource(store, statistics, made.folder)


def on_a_way(edges: list[tuple[str, str, float]], inputs: set[str], output: str) -> set[tuple[str, str]]:
    """The edges between an input and the output, by walking from either end."""
    ahead, back = defaultdict(set), defaultdict(set)
    for u, v, _ in edges:
        ahead[u].add(v)
        back[v].add(u)

    def reached(starts: set[str], step: dict[str, set[str]]) -> set[str]:
        seen, waiting = set(starts), list(starts)
        while waiting:
            for node in step[waiting.pop()] - seen:
                seen.add(node)
                waiting.append(node)
        return seen

    down, up = reached(inputs, ahead), reached({output}, back)
    return {(u, v) for u, v, _ in edges if u in down and v in up}


def means(made: PageAtlas) -> dict[tuple[str, str], float]:
    """Mean magnitude of each edge over the two sequences, positions summed first."""
    summed: dict[tuple[str, str, str], float] = defaultdict(float)
    for sequence, u, v, _, _, weight in made.edges.iter_rows():
        summed[sequence, u, v] += weight
    found: dict[tuple[str, str], float] = defaultdict(float)
    for (_, u, v), weight in summed.items():
        found[u, v] += abs(weight) / len(SEQUENCES)
    return dict(found)


def test_a_circuit_is_what_lies_on_ways_from_input_to_output(source: PageSource, made: PageAtlas) -> None:
    strength = means(made)
    threshold = sorted(strength.values())[-40]
    page = answer(source, "circuit", {"run": RUN, "threshold": repr(threshold)})
    inputs = {key_of("resid_0", i) for i in [*range(6), "error"]}
    kept = on_a_way([(u, v, s) for (u, v), s in strength.items() if s >= threshold], inputs, key_of("y", -1))
    by_id = {node["id"]: node for node in page["nodes"]}
    assert {(by_id[a]["key"], by_id[b]["key"]) for a, b, _, _ in page["edges"]} == kept
    assert [edge[3] for edge in page["edges"]] == sorted((strength[pair] for pair in kept), reverse=True)
    assert {node["key"] for node in page["nodes"]} == {end for pair in kept for end in pair}
    assert page["sites"] == [*SITES, "y"]
    assert all(page["sites"][node["row"]] == node["site"] for node in page["nodes"])
    assert page["settings"]["n_candidates"] == len(strength)
    assert sum(node["influence"] for node in page["nodes"] if node["role"] == "input") == pytest.approx(1)
    assert page["tokens"] is None


def test_the_strongest_edges_are_taken_where_no_threshold_is_named(source: PageSource, made: PageAtlas) -> None:
    everything = answer(source, "circuit", {"run": RUN})
    inputs = {key_of("resid_0", i) for i in [*range(6), "error"]}
    assert len(everything["edges"]) == len(on_a_way([(u, v, s) for (u, v), s in means(made).items()], inputs, key_of("y", -1)))
    few = answer(source, "circuit", {"run": RUN, "edges": "30"})
    assert 0 < len(few["edges"]) <= 31
    assert few["settings"]["threshold"] > 0
    assert {tuple(edge[2:]) for edge in few["edges"]} < {tuple(edge[2:]) for edge in everything["edges"]}


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_a_sequence_keeps_its_positions_and_has_its_tokens(source: PageSource, made: PageAtlas, sequence: str) -> None:
    page = answer(source, "circuit", {"run": RUN, "sequence": sequence})
    assert page["tokens"] == SEQUENCES[sequence]  # of seq-a from the samples, of seq-b from contexts
    assert page["settings"]["positions"] is True
    own = made.edges.filter(pl.col("sequence") == sequence)
    ends = set(own.select("source", "target", "src_pos", "dest_pos").iter_rows())
    by_id = {node["id"]: node for node in page["nodes"]}
    shown = {(by_id[a]["key"], by_id[b]["key"], by_id[a]["pos"], by_id[b]["pos"]) for a, b, _, _ in page["edges"]}
    assert shown
    assert shown <= ends


def test_a_features_page_has_its_moments_edges_and_contexts_token_by_token(source: PageSource, made: PageAtlas) -> None:
    key = key_of("resid_4", 0)
    page = answer(source, "feature", {"key": key})
    own = made.values["resid_4"][:, 0].astype(float)
    assert page["statistics"]["frequency"] == pytest.approx((own > 0).mean())
    assert page["statistics"]["maximum"] == pytest.approx(own.max())
    assert (page["name"], page["label_kind"], page["kind"]) == ('quotes " and \' and \u2028 and ${x}', "hand", "feature")
    strength = means(made)
    entering = sorted(((u, s) for (u, v), s in strength.items() if v == key), key=lambda edge: -edge[1])
    assert [(row["key"], row["run"]) for row in page["inputs"]] == [(u, RUN) for u, _ in entering[:12]]
    assert [row["abs_weight"] for row in page["inputs"]] == pytest.approx([s for _, s in entering[:12]])
    assert page["inputs"][0]["of"] == len(entering)
    assert {row["key"] for row in page["outputs"]} == {v for (u, v) in strength if u == key}
    assert [made["value"] for made in page["contexts"]] == pytest.approx(sorted(own, reverse=True)[:3])
    for context in page["contexts"]:
        tokens = [*context["before"], context["token"], *context["after"]]
        of = next(name for name, texts in SEQUENCES.items() if texts == tokens)
        if of == "seq-a":  # which samples were kept of
            np.testing.assert_allclose(context["values"], own[:5], rtol=6e-3)
        else:
            assert context["values"] is None
    assert [row["index"] for row in page["communities"]] == [1]
    assert page["regions"] == []


@pytest.mark.slow
def test_many_features_at_once_are_each_as_alone(source: PageSource) -> None:
    keys = [key_of(site, i) for site in SITES for i in (0, 3, "error")]
    together = feature_pages(source, [*keys, "m@1|d|resid_0|999"])
    assert set(together) == set(keys)
    assert all(together[key] == answer(source, "feature", {"key": key}) for key in keys)


def test_overview_and_run_say_what_there_is(source: PageSource) -> None:
    page = answer(source, "overview")
    assert [run["key"] for run in page["runs"]] == [RUN]
    assert (page["counts"]["Feature"], page["counts"]["Sequence"], page["counts"]["Run"]) == (22, 2, 1)
    assert [row["parcellation"] for row in page["communities"]] == ["parts0123"]
    assert (page["matchings"], page["comparisons"], page["sweeps"], page["parcellations"]) == ([], [], [], [])
    run = answer(source, "run", {"run": RUN[:5]})
    assert run["positions"] is True
    assert {row["key"] for row in run["sequences"]} == set(SEQUENCES)
    assert run["tasks"]["rows"] == [["kind", 2, 1.0, 2.0, -1.0]]
    assert run["paths"][0]["nodes"][-1]["kind"] == "output"
    assert all(f"--run {RUN}" in command or RUN in command or "--cypher" in command for command in run["commands"])


def test_communities_sum_what_their_members_send(source: PageSource, made: PageAtlas) -> None:
    page = answer(source, "community", {"parcellation": "parts0123"})
    first = {key_of(site, 0) for site in SITES}
    number = {block["key"]: block["index"] for block in page["blocks"]}
    flows = {(number[row[0]], number[row[1]]): row[4] for row in page["flows"]}
    features = {key_of(site, i) for site in SITES for i in range(6)}
    expected: dict[tuple[int, int], float] = defaultdict(float)
    for (u, v), s in means(made).items():
        if u in features and v in features:
            expected[int(u in first), int(v in first)] += s
    assert flows == pytest.approx(dict(expected))


def test_what_is_wrong_is_said(source: PageSource) -> None:
    for name, parameters, error, words in (
        ("nonsense", {}, UnknownPage, "overview"),
        ("circuit", {"colour": "red"}, BadPageParameter, "threshold"),
        ("circuit", {"threshold": "high"}, BadPageParameter, "'high'"),
        ("circuit", {"by": "size"}, BadPageParameter, "abs_weight"),
        ("feature", {}, BadPageParameter, "needs key"),
        ("sweep", {"subject": "none"}, NoSuchStudy, "none"),
        ("region", {"parcellation": "none"}, NoSuchStudy, "analyze rois"),
        ("community", {"parcellation": "none"}, NoSuchStudy, "analyze communities"),
        ("matching", {"matching": "none"}, NoSuchStudy, "analyze match"),
    ):
        with pytest.raises(error, match=words):
            answer(source, name, parameters)
    with pytest.raises(NoStatistics, match="statistics"):
        answer(PageSource(source.store, None, source.atlas), "sweep", {"subject": "x"})


@pytest.mark.slow
def test_an_atlas_without_statistics_has_its_pages(source: PageSource) -> None:
    bare = PageSource(source.store, None, source.atlas)
    assert answer(bare, "feature", {"key": key_of("resid_4", 2)})["name"] == "feature 2"
    assert answer(bare, "features")["table"]["rows"]
    assert set(contents(bare)["pages"]) == set(contents(source)["pages"])


def test_features_are_found_by_their_labels(source: PageSource) -> None:
    bare = PageSource(source.store, None, source.atlas)
    assert [row["key"] for row in answer(bare, "search", {"text": "Plain"})["found"]] == [key_of("resid_4", 1)]
    assert answer(source, "search", {"text": "  "})["found"] == []
    for asked in ("resid_4/1", key_of("resid_4", 1)):
        assert answer(source, "search", {"text": asked})["found"][0]["key"] == key_of("resid_4", 1)
    # while one still types, the last word is a beginning
    whole = [row["key"] for row in answer(source, "search", {"text": "dogs "})["found"]]
    assert whole
    assert [row["key"] for row in answer(source, "search", {"text": "do"})["found"]] == whole
    assert answer(source, "search", {"text": "do "})["found"] == []
    assert {row["key"] for row in answer(source, "search", {"text": "dogs"})["found"]} <= {key_of(site, i) for site in SITES for i in range(6)}


def test_values_are_what_json_has() -> None:
    assert plain({"a": float("nan"), 1: [float("inf"), 2.5], "b": None, "c": Path("x")}) == {"a": None, "1": [None, 2.5], "b": None, "c": "x"}


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_report_holds_the_pages_by_their_addresses(source: PageSource) -> None:
    said: list[tuple[int, int, str]] = []
    pages = contents(source, ReportOptions(), lambda done, total, what: said.append((done, total, what)))["pages"]
    of_run = {f"run?run={RUN}", f"circuit?run={RUN}", f"circuit?run={RUN}&sequence=seq-a"}
    assert {"overview", "features", "community?parcellation=parts0123", *of_run} <= set(pages)
    features = {name for name in pages if name.startswith("feature?")}
    assert len(features) == 22
    assert said[-1][:2] == (len(said) - 1, len(said) - 1)
    few = contents(source, ReportOptions(run=RUN[:4], max_edges=20, max_sequences=0, max_features=5))["pages"]
    assert len([name for name in few if name.startswith("feature?")]) == 5
    assert not [name for name in few if "sequence=" in name]
    assert len(few[f"circuit?run={RUN}"]["edges"]) <= 21


def test_the_file_runs_only_what_its_policy_names_and_holds_no_tag_of_a_label(source: PageSource) -> None:
    text = render(source)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src" not in policy[1]
    assert "unsafe-inline' ;" not in policy[1]
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 6
    for script in scripts:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy[1]
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", text.replace("".join(scripts), ""))
    assert HOSTILE not in text
    assert "<b>bold" not in text


@pytest.mark.parametrize("filler", [0, PACKED_FROM])
def test_contents_come_back_from_the_page_as_they_were(filler: int) -> None:
    given = {"pages": {"overview": {"name": HOSTILE + "\u2028</script><!-- & ${title}", "filler": "x" * filler}}}
    element = embedded(given)
    inner = element[element.index(">") + 1 : element.rindex("</script>")]
    assert not set("<>") & set(inner)
    text = gzip.decompress(base64.b64decode(inner)).decode() if filler else inner
    assert json.loads(text) == given
    assert element in document("a title", element)
    assert f"<title>{HOSTILE}" not in document(HOSTILE, "")


def test_an_empty_atlas_is_said_to_be_empty(tmp_path: Path) -> None:
    with open_graph(tmp_path) as store, pytest.raises(NothingToReport, match="featlas demo"):
        render(PageSource(store, None, tmp_path))


def test_the_model_is_named(source: PageSource) -> None:
    assert [model["key"] for model in answer(source, "overview")["models"]] == [MODEL]


def test_nodes_have_every_property_of_the_schema_null_where_they_have_none(tmp_path: Path) -> None:
    with open_graph(tmp_path) as store:
        store.merge_nodes("Circuit", pl.DataFrame({"key": ["c"], "run": ["r"]}))
        (circuit,) = circuits_of(store)
    assert set(NODES["Circuit"].all_columns) <= set(circuit)
    assert (circuit["key"], circuit["run"], circuit["faithfulness"]) == ("c", "r", None)


def test_the_command_that_made_a_run_has_what_its_key_depends_on(tmp_path: Path) -> None:
    settings = {"metric": "logit_diff", "baseline": "mean", "steps": 1, "threshold": 0.5, "first_factor": "exact", "per_position": True}
    options = {"model": "m", "task": "a b.jsonl", "seed": 0, "bos": False, "skip_invalid": True, "dtype": "bfloat16", "statistics_run": "s1"}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "r1.json").write_text(json.dumps({"options": {**options, "settings": settings}}), encoding="utf-8")
    said = commands_of(tmp_path, [RunRow("r1", "m", "a b", "logit_diff", {}, {})])
    assert said == [
        "featlas ingest edges --model m --task 'a b.jsonl' --dtype bfloat16 --statistics-run s1 --baseline mean --steps 1 --threshold 0.5"
        f" --mean per-position --bos no --skip-invalid --atlas {tmp_path}"
    ]
