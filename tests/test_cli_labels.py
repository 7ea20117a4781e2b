"""featlas labels: by hand, from files and Neuronpedia, by rule, found and saved, on the tiny atlas; the mistakes one can make."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from featlas.ingest.label_files import neuronpedia_sites, read_label_file
from featlas.queries.labels import graph_labels
from featlas.queries.statistics import RunRecord, SiteRecord, StatisticsStore
from featlas.queries.store import open_graph

pytestmark = pytest.mark.slow  # each runs whole commands or sweeps

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def atlas(tiny, tmp_path) -> Path:
    return tiny.copied(tmp_path)


@pytest.fixture
def run(featlas: Run, atlas: Path) -> Run:
    """`featlas labels …` on a copy of the tiny atlas."""
    return lambda *arguments: featlas("labels", *arguments, "--atlas", atlas)


def answer(run: Run, *arguments: object):
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def shown(atlas: Path, name: str) -> tuple[str | None, str | None]:
    """What the graph calls a feature, and who gave it the name."""
    key = key_of(atlas, name) if name.count("|") == 0 else name
    with open_graph(atlas, read_only=True) as store:
        return graph_labels(store, [key]).select("label", "label_kind").row(0)


def dictionary(atlas: Path, site: str = "resid_0") -> str:
    """The id of the main run's dictionary: two runs have others at the same site."""
    with StatisticsStore(atlas, read_only=True) as statistics:
        return statistics.query("SELECT DISTINCT dictionary FROM run_sites WHERE site = ?", [site])["dictionary"][0]


def present(atlas: Path, site: str = "resid_0") -> list[str]:
    """Names of features of the graph, of the main run's dictionary."""
    with open_graph(atlas, read_only=True) as store:
        rows = graph_labels(store).filter((pl.col("site") == site) & pl.col("key").str.contains(f"|{dictionary(atlas)}|", literal=True))
    return [f"{site}/{i}" for i in rows["feature"].sort()]


def key_of(atlas: Path, name: str) -> str:
    site, index = name.split("/")
    with StatisticsStore(atlas, read_only=True) as statistics:
        return statistics.query("SELECT key FROM feature_statistics WHERE site = ? AND feature = ?", [site, int(index)])["key"][0]


@pytest.mark.slow
def test_a_label_by_hand_stands_above_automatic_ones_and_survives_measuring_again(run, featlas, atlas, tiny):
    name = present(atlas)[0]
    key = key_of(atlas, name)
    found = answer(run, "auto")
    assert found["labels"]["summary"] > 0
    assert shown(atlas, name)[1] == "automatic"
    assert answer(run, "set", key, "mine, \"quoted\" 🎉", "--author", "Ann")["before"] is None
    assert answer(run, "set", key, "mine now")["before"] == 'mine, "quoted" 🎉'
    answer(run, "auto", "--rules", "tokens,class")
    assert shown(atlas, name) == ("mine now", "hand")
    named = ("--model", tiny.folder / "model", "--dictionaries", tiny.folder / "dictionaries", "--task", tiny.folder / "task.jsonl")
    where = ("--sites", "embed,resid_0,mlp_1", "--atlas", atlas, "--json")
    assert featlas("ingest", "statistics", *named, "--limit", 6, *where)[0] == 0
    (atlas / "graph.lbug").unlink()
    assert featlas("ingest", "edges", *named, "--limit", 8, "--steps", 2, *where)[0] == 0
    assert shown(atlas, name) == ("mine now", "hand")
    assert {row["kind"] for row in answer(run, "list", key)} == {"hand", "automatic"}
    assert answer(run, "remove", key)["removed"][0]["label"] == "mine now"
    assert shown(atlas, name)[1] == "automatic"


@pytest.mark.slow
def test_automatic_labels_are_the_same_each_time_and_name_their_rules(run, atlas, tiny):
    model = ("--model", tiny.folder / "model", "--dictionaries", tiny.folder / "dictionaries")
    first = answer(run, "auto", *model, "--of", key_of(atlas, "resid_0/0").split("|")[0])
    assert first["left_out"].keys() <= {"class", "region"}
    assert first["labels"]["decoder"] >= first["labels"]["tokens"] > 0
    keep = lambda: [{k: v for k, v in row.items() if k != "written"} for row in answer(run, "list", "--kind", "automatic")]
    labels = keep()
    again = answer(run, "auto", *model)
    assert (again["labels"], again["changed"], keep()) == (first["labels"], 0, labels)
    answer(run, "auto", "--rules", "task", "--sites", "resid_0")
    assert keep() == labels  # one rule alone leaves the others, and their summary
    code, out, _ = run("auto", "--rules", "tokens,place", "--show", 2)
    assert code == 0
    assert "tokens: the surest" in out
    assert "fires on ‘" in out


@pytest.mark.slow
def test_files_are_read_whole_or_not_at_all(run, atlas, tmp_path, refused):
    one, two = present(atlas)[:2]
    file = tmp_path / "labels.csv"
    good = f'site,index,label,author\nresid_0,{one.split("/")[1]},"a, ""b""\nc",Ann\n'
    file.write_text(good + "resid_0,x,bad,\nresid_0,99999,far,\nresid_9,0,nowhere,\n,,none,\nresid_0,1,,\nresid_0,2\n", encoding="utf-8-sig")
    of = ("--of", dictionary(atlas))
    said = refused("import", file, *of)
    for words in ("6 lines are wrong", "line 4: index 'x' is no whole number", "line 7: neither a key, nor a site and an index", "--skip-invalid",
                  "line 8: a label must have", "line 9: 2 values where the first line names 4 columns"):  # fmt: skip
        assert words in said
    assert answer(run, "list") == []
    found = answer(run, "import", file, "--skip-invalid", *of)
    assert (found["labels"], found["changed"], len(found["left_out"])) == (1, 1, 6)
    assert shown(atlas, one) == ('a, "b"\nc', "file")
    lines = tmp_path / "labels.jsonl.gz"
    lines.write_bytes(gzip.compress(f'{json.dumps({"key": key_of(atlas, two), "description": "von Hand"})}\n\n'.encode()))
    assert answer(run, "import", lines)["labels"] == 1
    assert answer(run, "list", two, *of)[0]["source"] == "labels.jsonl"
    whole = tmp_path / "labels.json"
    whole.write_text(json.dumps({key_of(atlas, two): "from a mapping"}))
    assert answer(run, "import", whole)["changed"] == 1


@pytest.mark.parametrize("suffix", ["tsv", "jsonl"])
@pytest.mark.slow
def test_what_is_exported_can_be_imported_as_it_was(run, atlas, tmp_path, suffix):
    name = key_of(atlas, present(atlas)[0])
    answer(run, "auto", "--rules", "tokens,task")
    answer(run, "set", name, 'tab\t"quote", comma\nline', "--author", "Ann")
    kept = lambda: [{k: v for k, v in row.items() if k != "written"} for row in answer(run, "list", "--site", "resid_0")]
    before, file = kept(), tmp_path / f"out.{suffix}"
    assert answer(run, "export", file, "--site", "resid_0")["labels"] == len(before)
    answer(run, "remove", "--kind", "hand")
    answer(run, "remove", "--kind", "automatic")
    assert kept() == []
    assert answer(run, "import", file)["labels"] == len(before)
    assert kept() == before
    answer(run, "export", tmp_path / "best.parquet", "--best")
    assert pl.read_parquet(tmp_path / "best.parquet")["key"].is_duplicated().sum() == 0


def test_an_import_says_how_many_labels_by_hand_it_replaces(run, atlas, tmp_path):
    name, other = (key_of(atlas, place) for place in present(atlas)[:2])
    answer(run, "set", name, "Ann's")
    answer(run, "set", other, "the same")
    file = tmp_path / "hand.csv"
    file.write_text(f"key,label,kind\n{name},Bob's,hand\n{other},the same,hand\n")
    assert answer(run, "import", file)["replaced"] == 1
    assert answer(run, "import", file)["replaced"] == 0
    answer(run, "set", name, "Ann's")
    assert "; 1 label by hand replaced" in run("import", file)[1]


def explanation(index: int, text: str | None, **other: object) -> dict[str, object]:
    known = {"modelId": "tiny", "layer": "0-res-x", "index": str(index), "typeName": "np_max", "explanationModelName": "a-model", "embedding": [0.1]}
    return {**known, "description": text, **other}


@pytest.mark.slow
def test_neuronpedias_exports_and_answers_are_read(run, atlas, tmp_path, refused):
    first, second, third = (int(name.split("/")[1]) for name in present(atlas)[:3])
    folder = tmp_path / "np" / "explanations"
    folder.mkdir(parents=True)
    lines = [explanation(first, "terms of X"), explanation(second, ""), explanation(second, None)]
    (folder / "batch-0.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    said = refused("import", folder, "--format", "neuronpedia")
    assert "no site is known for Neuronpedia's source 'tiny/0-res-x'" in said
    assert "--site tiny/0-res-x=SITE" in said
    of = ("--format", "neuronpedia", "--of", dictionary(atlas))
    assert "fits several features: choose by --of" in refused("import", folder, "--format", "neuronpedia", "--site", "resid_0")
    found = answer(run, "import", folder, *of, "--site", "resid_0")
    assert (found["labels"], found["empty"]) == (1, 2)
    assert shown(atlas, f"resid_0/{first}") == ("terms of X", "neuronpedia")
    feature = tmp_path / "feature.json"
    scored = {"description": "of the API", "typeName": "t", "explanationModelName": "m", "scores": [{"value": 0.25}, {"value": 0.75}]}
    feature.write_text(json.dumps({"modelId": "tiny", "layer": "0-res-x", "index": str(third), "activations": [], "explanations": [scored]}))
    assert answer(run, "import", feature, *of, "--site", "tiny/0-res-x=resid_0")["labels"] == 1
    (row,) = answer(run, "list", key_of(atlas, f"resid_0/{third}"))[:1]
    assert (row["label"], row["rule"], row["source"], row["confidence"]) == ("of the API", "t m", "tiny/0-res-x", 0.75)
    (folder / "batch-1.jsonl").write_text('{"layer": "0-res-x"}\nnot json\n')
    said = refused("import", folder, *of, "--site", "resid_0")
    assert "batch-1.jsonl line 1: modelId, layer and index" in said
    assert "batch-1.jsonl line 2: no JSON" in said
    assert answer(run, "remove", "--source", "tiny/0-res-x")["changed"] == 2


def test_sae_lens_says_which_site_a_source_of_neuronpedias_is(tmp_path):
    dictionary = "gpt2-small-res-jb:blocks.6.hook_resid_pre"
    with StatisticsStore(tmp_path) as statistics:
        statistics.start_run(RunRecord("r", "gpt2@0", "t", "c", "activation", (SiteRecord("resid_5", 5, dictionary, 768, 24576),), 1, {}, "0"))
        assert neuronpedia_sites(None, statistics) == {"gpt2-small/6-res-jb": "resid_5"}


@pytest.mark.slow
def test_search_finds_what_people_tokens_and_contexts_say(run, atlas):
    name = key_of(atlas, present(atlas)[0])
    answer(run, "set", name, "Éclairs and others")
    (hit,) = answer(run, "search", "eclair*")
    assert (hit["key"], hit["fields"], hit["label_kind"]) == (name, ["label"], "hand")
    token = answer(run, "auto", "--rules", "tokens") and answer(run, "list", "--rule", "tokens", "--site", "resid_0")[0]["label"].split(" · ")[0]
    hits = answer(run, "search", token, "--in", "token", "--site", "resid_0")
    assert len(hits) > 0
    assert all(f"【{token}】" in hit["text"] and hit["site"] == "resid_0" for hit in hits)
    code, out, _ = run("search", "nothing-like-it")
    assert code == 0
    assert "nothing found" in out


def test_mistakes_are_one_line(run, refused, atlas, tmp_path):
    name = key_of(atlas, present(atlas)[0])
    for arguments, words in (
        (("set", "resid_0/99999", "x"), "no feature 'resid_0/99999'"), (("set", "nonsense", "x"), "SITE/INDEX (resid_11/123)"),
        (("set", name, " "), "at least one character"), (("set", name, "x" * 501), "500 characters at most, not 501"),
        (("remove",), "--kind or --source"), (("remove", name), "no label of kind hand"), (("auto", "--rules", "tokens,magic"), "no rule 'magic'"),
        (("auto", "--model", "smollm2"), "both --model and --dictionaries"), (("auto", "--of", "gpt9"), "no model 'gpt9'"),
        (("search", "  "), "nothing to search for"), (("search", "x", "--in", "labels"), "label, token, context"),
        (("import", tmp_path / "no.csv"), "cannot read"), (("import", tmp_path / "x.doc"), ".csv, .tsv"),
        (("import", tmp_path / "x.csv", "--site", "resid_0"), "--format neuronpedia"), (("export", tmp_path / "x.doc"), ".parquet"),
        (("export", tmp_path / "no" / "x.csv"), "cannot write"),
    ):  # fmt: skip
        assert words in refused(*arguments), arguments


def test_an_atlas_that_is_not_there_is_said(featlas, tmp_path):
    for command in (("set", "resid_0/1", "x"), ("auto",), ("list",), ("search", "x"), ("export", "x.csv")):
        code, out, err = featlas("labels", *command, "--atlas", tmp_path / "none")
        assert (code, out) == (2, ""), command
        assert "none" in err


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [("x.csv", b"", "is empty"), ("x.csv.gz", b"no gzip", "no whole gzip"), ("x.jsonl", b"\xff\xfe", "not UTF-8 from byte 0"),
     ("x.json", b"{", "no JSON"), ("x.json", b"[" * 100_000, "nested too deep")],
)  # fmt: skip
def test_files_that_are_no_label_files_are_refused(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Exception, match=said) as raised:
        read_label_file(tmp_path / name)
    assert type(raised.value).__name__ == "NoLabelFile"


@pytest.mark.parametrize(
    ("line", "said"),
    [("[1]", "no object"), ('{"key": "k", "label": 3}', "the label 3 is no text"), ('{"key": "k"}', "no label"),
     ('{"site": "s", "index": 1.5, "label": "x"}', "1.5"), ('{"site": "s", "index": -1, "label": "x"}', "-1"),
     ('{"site": "s", "index": true, "label": "x"}', "True"), ('{"key": ["k"], "label": "x"}', "no text"),
     ('{"key": "k", "label": "x", "kind": "magic"}', "unknown kind 'magic'"), ('{"key": "k", "label": "x", "colour": 1}', "unknown column 'colour'"),
     ('{"key": "k", "label": "\\u0000"}', r"U\+0000"), ('{"key": "k", "label": "x", "confidence": "much"}', "confidence 'much'"),
     ('{"key": "k", "label": "x", "confidence": NaN}', "confidence nan"), ("[" * 100_000, "nested too deep")],
)  # fmt: skip
def test_lines_that_are_no_labels_are_told(tmp_path, line, said):
    (tmp_path / "x.jsonl").write_text(f'{{"key": "good", "label": "y"}}\n{line}\n')
    read = read_label_file(tmp_path / "x.jsonl")
    assert read.rows["key"].to_list() == ["good"]
    assert len(read.problems) == 1
    assert re.search(rf"^line 2: .*{said}", read.problems[0])
