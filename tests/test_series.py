"""Series of models: the same analysis over checkpoints, what is kept of it, and how it is shown."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from featlas.analysis.circuits import Circuit, Selection
from featlas.analysis.series_gallery import beside_last, beside_previous, series_page, solved_from
from featlas.analysis.series_plots import Panel, axis_of, lines_figure, written
from featlas.model.small_models import SmallModelOptions, train_small_model
from featlas.pages.payload import answer
from featlas.pages.source import PageSource
from featlas.queries.series import NoSeries, SeriesRecord, list_series, put_part, read_part, read_series, write_series
from featlas.queries.store import open_graph
from featlas.series import (
    BadSeries,
    SeriesOptions,
    begin_series,
    compare_members,
    flow_by_site,
    graph_numbers,
    measure_member,
    measure_series,
    members_of,
    series_key,
)

TINY = SmallModelOptions(
    tasks=("agreement", "pronoun"), n_layers=2, d_model=16, n_heads=2, steps=64, batch=16, learning_rate=0.01, first=64, evenly=2
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    train_small_model(folder, TINY)
    return folder


def options(atlas: Path, checkpoints: Path, **changed: object) -> SeriesOptions:
    small = {"dictionaries": "identity", "sites": ("resid_0", "resid_1"), "limit": 4, "held_out": 4, "matched": 8, "draws": 2, "shares": (0.1, 1.0)}
    return begin_series([str(checkpoints)], SeriesOptions(**{"atlas": atlas, "task": "", **small, **changed}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def measured(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SeriesRecord]:
    atlas = tmp_path_factory.mktemp("atlas")
    return atlas, measure_series(members_of([str(checkpoints)]), options(atlas, checkpoints), title="Tiny <b>", axis="step")


# -- the models


def test_the_members_of_a_folder_are_its_checkpoints(checkpoints: Path) -> None:
    members = members_of([str(checkpoints)])
    assert [(member.name, member.x) for member in members] == [("step0", 0.0), ("step32", 32.0), ("step64", 64.0)]
    assert members[0].loss > members[-1].loss
    assert Path(members[1].model) == checkpoints / "step32"


@pytest.mark.parametrize(
    ("models", "places"),
    [
        (["EleutherAI/pythia-70m-deduped@step3000", "EleutherAI/pythia-70m-deduped@step512"], [("step512", 512), ("step3000", 3000)]),
        (["E/pythia-160m", "E/pythia-1.4b", "E/pythia-70m"], [("pythia-70m", 70e6), ("pythia-160m", 160e6), ("pythia-1.4b", 1.4e9)]),
        (["models/first", "models/second/"], [("first", 0), ("second", 1)]),
        (["seed-3/model", "seed-4/model"], [("seed-3/model", 0), ("seed-4/model", 1)]),
        (["E/pythia-70m@step8", "E/pythia-160m@step8"], [("pythia-70m/step8", 0), ("pythia-160m/step8", 1)]),
        (["a-7b", "b-7b"], [("a-7b", 0), ("b-7b", 1)]),
    ],
)
def test_places_are_read_from_names_where_all_differ(models: list[str], places: list[tuple[str, float]]) -> None:
    assert [(member.name, member.x) for member in members_of(models)] == places


def test_places_that_are_given_count() -> None:
    assert [(member.model, member.x) for member in members_of(["a1", "b2"], axis=[5, 3])] == [("b2", 3.0), ("a1", 5.0)]


@pytest.mark.parametrize(
    ("models", "axis", "said"),
    [(["one"], None, "at least two models"), (["a", "a"], None, "a is named twice"), (["a", "b"], [1.0], "1 places are given for 2 models")],
)
def test_what_makes_no_series_is_refused(models: list[str], axis: list[float] | None, said: str) -> None:
    with pytest.raises(BadSeries, match=said):
        members_of(models, axis=axis)


def test_options_that_cannot_be(tmp_path: Path, checkpoints: Path) -> None:
    with pytest.raises(BadSeries, match="name one with --task"):
        begin_series(["a", "b"], SeriesOptions(atlas=tmp_path, task=""))
    with pytest.raises(BadSeries, match="need a text"):
        begin_series(["a", "b"], SeriesOptions(atlas=tmp_path, task="agreement"))
    with pytest.raises(BadSeries, match="no such file"):
        begin_series(["a", "b"], SeriesOptions(atlas=tmp_path, task="agreement", texts=tmp_path / "none.txt"))
    with pytest.raises(BadSeries, match="draws is 0"):
        options(tmp_path, checkpoints, draws=0)
    with pytest.raises(BadSeries, match="1 is one of them"):
        options(tmp_path, checkpoints, shares=(0.1, 0.5))
    assert begin_series([str(checkpoints)], SeriesOptions(atlas=tmp_path, task="")).texts == checkpoints / "texts.jsonl"


# -- what is measured


@pytest.mark.slow
def test_every_model_is_measured_and_put_beside_the_last_and_the_one_before(measured: tuple[Path, SeriesRecord]) -> None:
    _, record = measured
    assert record.frames["members"]["name"].to_list() == ["step0", "step32", "step64"]
    accuracy = record.frames["tasks"].filter(pl.col("label").is_null() & (pl.col("task") == "agreement")).sort("x")["accuracy"].to_list()
    assert accuracy[-1] > 0.9
    assert set(record.frames["faithfulness"]["task"]) == {"agreement", "pronoun", "pooled"}
    whole = record.frames["faithfulness"].filter((pl.col("share") == 0.0) & (pl.col("n_edges") > 0))
    assert whole.is_empty()
    pairs = record.frames["matching"].select("name", "reference").rows()
    assert pairs == [("step0", "step64"), ("step32", "step64"), ("step32", "step0"), ("step64", "step32")]
    assert beside_last(record, "matching")["name"].to_list() == ["step0", "step32"]
    assert beside_previous(record, "matching").select("name", "reference").rows() == [("step32", "step0"), ("step64", "step32")]
    assert record.frames["sites"]["cka"].is_between(-1e-6, 1 + 1e-6).all()
    assert record.frames["flow"].group_by("name").agg(pl.col("share").sum())["share"].to_list() == pytest.approx([1.0] * 3)


@pytest.mark.slow
def test_a_model_beside_itself_is_itself(checkpoints: Path, tmp_path: Path) -> None:
    last = members_of([str(checkpoints)])[-1]
    settings = options(tmp_path, checkpoints, matched=16)
    run = str(measure_member(last, settings)["members"]["run"][0])
    itself = compare_members(last, last, (run, run), settings)
    assert itself["matching"]["share_a"][0] == pytest.approx(1.0)
    same = itself["sites"].filter(pl.col("site_a") == pl.col("site_b"))
    assert same["cka"].to_list() == pytest.approx([1.0, 1.0])
    shared = itself["values"].filter(pl.col("quantity") == "weighted Jaccard, mean over sizes")
    assert shared["value"].to_list() == pytest.approx([1.0] * shared.height)
    # every neuron drives every neuron here: there is nothing to rewire, but exchanged counterparts share little
    chance = dict(shared.select("null", "null_mean").iter_rows())
    assert chance == {"B rewired": pytest.approx(1.0), "matching permuted": pytest.approx(0.25, abs=0.2)}


@pytest.mark.slow
def test_an_interrupted_series_goes_on(
    measured: tuple[Path, SeriesRecord], checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured[1]
    members, settings = members_of([str(checkpoints)]), options(tmp_path, checkpoints)

    def interrupt(done: int, total: int, what: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_series(members, settings, title="Tiny <b>", axis="step", progress=interrupt)
    assert list_series(tmp_path) == []
    monkeypatch.setattr("featlas.series.measure_member", lambda *_: pytest.fail("it is measured already"))
    record = measure_series(members, settings, title="Tiny <b>", axis="step")
    assert record.key == whole.key
    for name in ("tasks", "graphs", "faithfulness", "sites", "matching", "values"):
        assert record.frames[name].equals(whole.frames[name]), name


@pytest.mark.slow
def test_a_graph_without_edges_is_a_row_of_zeros(checkpoints: Path, tmp_path: Path) -> None:
    member = members_of([str(checkpoints)])[0]
    frames = measure_member(member, options(tmp_path, checkpoints, threshold=1e9))
    assert frames["graphs"].select("edges", "effective_edges", "error_share").row(0) == (0, 0.0, None)
    assert "faithfulness" not in frames
    assert frames["tasks"].height > 0


def circuit(strengths: list[float]) -> Circuit:
    """Two features and an error node of resid_0 that lead to the output."""
    keys, kinds = ["a", "b", "e", "y"], ["feature", "feature", "error", "output"]
    nodes = pl.DataFrame({"key": keys, "pos": -1, "site": ["resid_0"] * 3 + ["y"], "layer": [0, 0, 0, -1], "kind": kinds, "index": [0, 1, -1, -1]})
    edges = pl.DataFrame({"source": keys[:3], "target": "y", "src_pos": -1, "dest_pos": -1, "weight": strengths, "strength": strengths})
    return Circuit(Selection("run"), nodes, edges)


def test_effective_edges_by_hand() -> None:
    even = graph_numbers(circuit([2.0, 2.0, 2.0])).row(0, named=True)
    assert even["effective_edges"] == pytest.approx(3.0)
    assert even["error_share"] == pytest.approx(1 / 3)
    uneven = graph_numbers(circuit([1.0, 1.0, 2.0])).row(0, named=True)
    assert uneven["effective_edges"] == pytest.approx(math.exp(0.5 * math.log(4) + 0.5 * math.log(2)))
    assert uneven["error_share"] == pytest.approx(0.5)
    assert flow_by_site(circuit([1.0, 1.0, 2.0])).rows() == [("resid_0", "y", 3, 4.0, 1.0)]


# -- what is kept


def test_parts_and_records_are_kept_whole(tmp_path: Path) -> None:
    frame = pl.DataFrame({"x": [1.0], "name": ["ü"]})
    assert read_part(tmp_path, "key", "one") is None
    put_part(tmp_path, "key", "one", {"members": frame})
    assert read_part(tmp_path, "key", "one")["members"].equals(frame)
    with pytest.raises(NoSeries, match="has none"):
        read_series(tmp_path)
    write_series(tmp_path, SeriesRecord("key", "t", "step", {"k": 1}, {"members": frame}))
    write_series(tmp_path, SeriesRecord("other", "u", "step", {}, {"members": frame}))
    assert read_series(tmp_path, "ke").settings == {"k": 1}
    with pytest.raises(NoSeries, match=r"key \(t\), other \(u\)"):
        read_series(tmp_path)
    with pytest.raises(NoSeries, match="no series 'z'"):
        read_series(tmp_path, "z")


# -- what is shown


def test_when_a_task_is_solved_by_hand() -> None:
    accuracy = {"a": (0.5, 0.95, 0.8, 0.9, 1.0), "b": (0.5, 0.5, 0.5, 0.5, 0.6)}
    rows = [(task, x, share) for task, shares in accuracy.items() for x, share in zip((0, 1, 2, 4, 8), shares)]
    tasks = pl.DataFrame(rows, schema=["task", "x", "accuracy"], orient="row").with_columns(
        pl.col("x").cast(pl.Float64), pl.lit(None, pl.String).alias("label"), pl.format("step{}", "x").alias("name")
    )
    record = SeriesRecord("key", "t", "step", {}, {"tasks": tasks})
    assert solved_from(record).rows() == [("a", 4.0, "step4"), ("b", None, None)]


def test_an_axis_that_spans_much_is_logarithmic_with_zero_beside_the_least() -> None:
    axis = axis_of([0, 32, 64, 3000], "step")
    assert axis.where == {0: 4.0, 32: 5.0, 64: 6.0, 3000: math.log2(3000)}
    assert axis.ticks[-1][1] == "3000"
    assert axis_of([1, 2, 3], "step").where == {1: 1, 2: 2, 3: 3}
    assert [written(x) for x in (0, 512, 1500, 16000, 135e6, 1.4e9)] == ["0", "512", "1500", "16k", "135M", "1.4B"]


def test_lines_escape_names_and_draw_what_chance_gives() -> None:
    values = {"value": [0.1, 0.2], "null": [0.0, 0.1], "low": [0.0, None], "high": [0.3, None]}
    frame = pl.DataFrame({"x": [1.0, 2.0], "line": "<i>", "name": ["m<1>", "m2"], **values})
    text = lines_figure([Panel("p", frame)], axis="size", title="t").to_json()
    assert "<i>" not in text.replace("\\u003c", "<")
    assert "m&lt;1&gt;" in text.replace("\\u0026", "&")
    assert "chance" in text


@pytest.mark.slow
def test_the_page_has_every_figure_and_no_markup_of_names(measured: tuple[Path, SeriesRecord]) -> None:
    page = series_page(measured[1])
    for name in ("abilities", "dictionaries", "faithfulness", "graphs", "features", "sites", "edges"):
        assert f'id="{name}-exhibit"' in page
    assert "<h1>Tiny <b>" not in page
    assert "agreement is solved from step" in page


# -- the commands


@pytest.mark.slow
def test_a_series_from_the_command_line(featlas: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    made = ("series", "train", tmp_path / "models", "--tasks", "agreement", "--layers", 1, "--width", 16, "--heads", 2, "--steps", 4, "--first", 4)
    code, out, _ = featlas(*made, "--evenly", 1, "--json")
    assert code == 0
    assert [checkpoint["step"] for checkpoint in json.loads(out)["checkpoints"]] == [0, 4]
    measure = ("series", "measure", tmp_path / "models", "--dictionaries", "identity", "--sites", "resid_0", "--limit", 2, "--held-out", 2)
    code, out, err = featlas(*measure, "--matched", 4, "--draws", 1, "--page", tmp_path / "page.html", "--atlas", tmp_path / "atlas")
    assert code == 0, err
    assert "agreement: " in out
    assert (tmp_path / "page.html").stat().st_size > 1_000_000
    code, out, _ = featlas("series", "list", "--atlas", tmp_path / "atlas", "--json")
    (listed,) = json.loads(out)
    assert listed["models"] == ["step0", "step4"]
    code, out, _ = featlas("series", "show", "--atlas", tmp_path / "atlas", "--json")
    assert json.loads(out)["key"] == listed["key"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("measure", "a", "b", "--at", "1,x", "--task", "agreement"), "no list of numbers"),
        (("measure", "a", "--task", "agreement"), "at least two models"),
        (("show", "--atlas", "nowhere"), "the atlas has none"),
        (("train", "nowhere/m", "--tasks", "x"), "no task 'x'"),
    ],
)
def test_mistakes_are_one_line(featlas: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], said: str) -> None:
    code, _, err = featlas("series", *arguments)
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert said in err


# -- on the page


@pytest.mark.slow
def test_a_series_stands_on_the_page_of_its_atlas(measured: tuple[Path, SeriesRecord]) -> None:
    atlas, record = measured
    with open_graph(atlas, read_only=True) as store:
        source = PageSource(store, None, atlas)
        (row,) = answer(source, "overview")["series"]
        assert row == {"series": record.key, "title": "Tiny <b>", "axis": "step", "models": ["step0", "step32", "step64"]}
        page = answer(source, "series", {"series": record.key})
    assert [exhibit["name"] for exhibit in page["exhibits"]][:2] == ["abilities", "dictionaries"]
    assert json.loads(json.dumps(page, allow_nan=False))["members"]["rows"][0][0] == "step0"


def test_a_file_that_was_changed_makes_another_series(checkpoints: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    lines = (checkpoints / "held_out.jsonl").read_text().splitlines()
    task.write_text("\n".join(lines[:20]) + "\n")
    members, settings = members_of([str(checkpoints)]), options(tmp_path, checkpoints, task=str(task))
    before = series_key(members, settings)
    assert series_key(members, settings) == before
    task.write_text("\n".join(lines[:19]) + "\n")
    assert series_key(members, settings) != before
    assert series_key(members, options(tmp_path, checkpoints, task=str(task), seed=1)) != series_key(members, settings)
