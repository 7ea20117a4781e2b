"""Small transformers trained on the tasks: their tokenizer, what they never see, their checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from featlas.model.loading import NoSuchModel, find_source, load_model
from featlas.model.pairs import encode_pairs, read_pairs
from featlas.model.small_models import (
    HELD_OUT_FILE,
    LISTING,
    TEXTS_FILE,
    BadSmallModel,
    OtherSeries,
    SmallModelOptions,
    encoded_texts,
    held_out_pairs,
    is_held_out,
    read_series,
    tasks_tokenizer,
    train_small_model,
)
from featlas.model.solvability import check_task
from featlas.model.tasks import TASKS, UnknownTask, build_task

TINY = SmallModelOptions(tasks=("agreement", "pronoun"), n_layers=2, d_model=16, n_heads=2, steps=12, batch=8, first=1, evenly=2)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series") / "tiny"
    train_small_model(folder, TINY)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", ["agreement", "agreement_rc", "pronoun", "ioi", "greater_than", "profession_gender"])
def test_every_pair_of_a_task_fits_the_tokenizer(task: str) -> None:
    tokenizer = tasks_tokenizer([task])
    pairs = build_task(task, tokenizer, n=60)
    assert not [refused for refused in encode_pairs(pairs, tokenizer) if isinstance(refused, str)]
    texts = [pair.clean + pair.answer for pair in pairs]
    tokens, targets = encoded_texts(texts, tokenizer)
    assert tokenizer.unk_token_id not in tokens[targets >= 0]
    assert [tokenizer.decode(row[target >= 0]) for row, target in zip(tokens, targets)] == texts


def test_checkpoints_double_and_lie_evenly() -> None:
    assert TINY.checkpoints == (0, 1, 2, 4, 6, 8, 12)
    assert SmallModelOptions(steps=1, evenly=3).checkpoints == (0, 1)


@pytest.mark.slow
def test_held_out_prompts_are_a_tenth_and_never_trained_on(series: Path) -> None:
    tokenizer = load_model(str(series / "step0")).tokenizer
    prompts = {pair.clean for pair in build_task("ioi", tasks_tokenizer(["ioi"]), n=2000)}
    assert sum(map(is_held_out, prompts)) / len(prompts) == pytest.approx(0.1, abs=0.025)
    trained = [json.loads(line)["text"] for line in (series / TEXTS_FILE).read_text().splitlines()]
    pairs, _ = read_pairs(str(series / HELD_OUT_FILE), tokenizer)
    held = {prompt for pair in pairs for prompt in (pair.clean, pair.corrupt)}
    assert all(map(is_held_out, held))
    assert not [text for text in trained if text.rpartition(" ")[0] in held]
    assert [pair.task for pair in pairs[:4]] == ["agreement", "pronoun", "agreement", "pronoun"]
    assert [pair.label for pair in pairs[:4]] == ["singular", "female", "plural", "male"]


def test_checkpoints_are_saved_as_models_whose_loss_is_what_is_said(series: Path) -> None:
    checkpoints = read_series(series)
    assert [checkpoint.step for checkpoint in checkpoints] == list(TINY.checkpoints)
    assert checkpoints[0].tokens == 0
    assert checkpoints[-1].loss < checkpoints[0].loss
    last = load_model(str(series / checkpoints[-1].folder))
    assert (last.family, last.n_layers, last.d_model) == ("llama", 2, 16)
    pairs, _ = read_pairs(str(series / HELD_OUT_FILE), last.tokenizer)
    losses = []  # one text at a time, without padding
    for pair in pairs:
        tokens = torch.tensor([last.tokenizer(pair.clean + pair.answer)["input_ids"]])
        logits = last.module(tokens).logits[0, :-1].log_softmax(-1)
        losses += (-logits[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]]).tolist()
    assert sum(losses) / len(losses) == pytest.approx(checkpoints[-1].loss, rel=1e-5)


@pytest.mark.slow
def test_the_same_options_give_the_same_weights_and_a_finished_folder_is_kept(series: Path, tmp_path: Path) -> None:
    train_small_model(tmp_path / "again", TINY)
    first, second = (load_model(str(folder / "step12")).module.state_dict() for folder in (series, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = (series / LISTING).stat().st_mtime_ns
    assert train_small_model(series, TINY) == read_series(series)
    assert (series / LISTING).stat().st_mtime_ns == before
    other = SmallModelOptions(tasks=TINY.tasks, n_layers=2, d_model=16, n_heads=2, steps=13, batch=8, first=1, evenly=2)
    with pytest.raises(OtherSeries, match="steps 12, not 13"):
        train_small_model(series, other)


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_small_model(tmp_path / "series", TINY, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_other_families_train(family: str, tmp_path: Path) -> None:
    options = SmallModelOptions(tasks=("agreement",), family=family, n_layers=1, d_model=16, n_heads=2, steps=4, batch=4, evenly=1)
    train_small_model(tmp_path / "series", options)
    model = load_model(str(tmp_path / "series" / "step4"))
    assert model.family == family
    assert check_task(model, held_out_pairs(["agreement"], model.tokenizer, 8))["n"][0] == 8


@pytest.mark.slow
def test_a_small_model_learns_agreement_in_seconds(tmp_path: Path) -> None:
    options = SmallModelOptions(tasks=("agreement",), n_layers=2, d_model=32, n_heads=2, steps=150, batch=32, learning_rate=0.01, evenly=1)
    train_small_model(tmp_path / "series", options)
    solved = []
    for step in (0, 150):
        model = load_model(str(tmp_path / "series" / f"step{step}"))
        solved.append(check_task(model, held_out_pairs(["agreement"], model.tokenizer, 64))["accuracy"][0])
    assert solved[0] < 0.75
    assert solved[1] > 0.95


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tasks": ("nonsense",)}, "no task 'nonsense'"),
        ({"tasks": ()}, "at least one task"),
        ({"family": "mamba"}, "no small model of family 'mamba'"),
        ({"d_model": 20, "n_heads": 4}, "multiple of twice the heads"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 2.0}, "learning_rate is 2.0"),
        ({"evenly": 0}, "evenly is 0"),
    ],
)
def test_options_out_of_range_are_refused(fields: dict, said: str) -> None:
    with pytest.raises((BadSmallModel, UnknownTask), match=said):
        SmallModelOptions(**fields)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OtherSeries, match="not empty"):
        train_small_model(tmp_path, TINY)
    with pytest.raises(BadSmallModel, match="no series"):
        read_series(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_more_held_out_pairs_than_there_are() -> None:
    with pytest.raises(BadSmallModel, match="pairs that are not trained on"):
        held_out_pairs(["pronoun"], tasks_tokenizer(["pronoun"]), 100_000)


def test_a_revision_may_be_part_of_the_name(tmp_path: Path, series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, revision: str | None = None, **_: object) -> str:
        asked.update(name=name, revision=revision)
        return str(series / "step0")

    monkeypatch.setattr("featlas.model.loading.snapshot_download", download)
    source = find_source("EleutherAI/pythia-70m-deduped@step3000")
    assert asked == {"name": "EleutherAI/pythia-70m-deduped", "revision": "step3000"}
    assert (source.name, source.revision) == ("EleutherAI/pythia-70m-deduped", "step3000")
    (tmp_path / "a@b").symlink_to(series / "step0")
    assert find_source(str(tmp_path / "a@b")).name == "step0"
    with pytest.raises(NoSuchModel, match="only Hugging Face names have revisions"):
        find_source(f"{series / 'step0'}@main")


@pytest.mark.slow
def test_all_tasks_have_words() -> None:
    assert len(tasks_tokenizer(list(TASKS))) > 500
