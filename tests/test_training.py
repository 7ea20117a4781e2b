"""Training of dictionaries on a tiny model: saved files, seeds, resuming after a kill, quality; and what evaluation measures."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from featlas.model import training
from featlas.model.binding import bind, capture_sites
from featlas.model.corpus import read_texts, token_blocks
from featlas.model.dictionaries import Basis, Kind, LinearDictionary, identity
from featlas.model.dictionary_sources import SiteDictionaries, load_dictionaries
from featlas.model.evaluation import NothingToEvaluate, cross_entropy, evaluate_dictionaries, usual_positions
from featlas.model.loading import LoadedModel, load_model
from featlas.model.sites import EMBED, Site, parse_site
from featlas.model.training import (
    Architecture,
    BadTrainingOption,
    CorpusTooSmall,
    OtherTraining,
    Progress,
    TrainingDiverged,
    TrainingOptions,
    hook_name,
    read_activations,
    train_dictionaries,
    without_outliers,
)
from sae_lens import SAE

from .micro import save_tiny

SITES = (parse_site("resid_0"), parse_site("mlp_1"))
OPTIONS = TrainingOptions(sites=SITES, width=24, k=4, tokens=6000, context=12, batch=128, epochs=1, prompt_share=0.0, save_dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_tiny(tmp_path_factory.mktemp("model") / "tiny")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random words of the tiny vocabulary, 8000 tokens."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    draws = torch.randint(1, 40, (80, 100), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("".join(json.dumps({"text": " ".join(f"w{n}" for n in row)}) + "\n" for row in draws))
    return path


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_training_saves_what_sae_lens_and_the_loader_read(tmp_path: Path, model: LoadedModel, corpus: Path) -> None:
    seen: list[Progress] = []
    trained = train_dictionaries(model, corpus, tmp_path, replace(OPTIONS, epochs=4, learning_rate=1e-2), progress=seen.append)
    assert [t.site for t in trained] == list(SITES)
    assert {p.stage for p in seen} == {"capture", "resid_0", "mlp_1"}
    assert all(p.done <= p.total for p in seen)
    assert not (tmp_path / ".activations").exists()
    sae = SAE.load_from_disk(tmp_path / "resid_0")
    assert (sae.cfg.architecture(), sae.cfg.k, sae.cfg.metadata.hook_name) == ("topk", 4, "blocks.0.hook_resid_post")
    found = load_dictionaries(str(tmp_path), model)
    value = capture_sites(bind(model), torch.arange(1, 25).view(2, 12), {SITES[0]: Basis.RESIDUAL})[SITES[0]]
    assert (found[SITES[0]].encode(value) - sae.encode(value)).abs().max() < 1e-5
    quality = evaluate_dictionaries(model, found, token_blocks(read_texts(corpus), model.tokenizer, 12, limit=60))
    # 24 features on 16 dimensions of a random network: far better than the mean, which has FVU 1.
    assert all(q.fvu < 0.3 for q in quality)
    assert all(q.l0 <= 4 for q in quality)
    assert all(q.dead_share < 0.2 for q in quality)


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path, model: LoadedModel, corpus: Path) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_dictionaries(model, corpus, tmp_path / name, replace(OPTIONS, sites=SITES[:1], seed=seed))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a")["resid_0/sae_weights.safetensors"] != weights(tmp_path / "c")["resid_0/sae_weights.safetensors"]
    assert torch.equal(before, torch.random.get_rng_state())


class Killed(Exception):
    """Stands for the end of the process in the middle of the work."""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("capture", 2), ("resid_0", 1), ("mlp_1", 1)])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(tmp_path: Path, model: LoadedModel, corpus: Path, stage: str, step: int) -> None:
    train_dictionaries(model, corpus, tmp_path / "whole", OPTIONS)
    seen: list[Progress] = []

    def kill(progress: Progress) -> None:
        seen.append(progress)
        if sum(p.stage == stage for p in seen) == step:
            raise Killed

    with pytest.raises(Killed):
        train_dictionaries(model, corpus, tmp_path / "cut", OPTIONS, progress=kill)
    assert (tmp_path / "cut" / ".activations").exists()
    again = train_dictionaries(model, corpus, tmp_path / "cut", OPTIONS)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert [t.steps == 0 for t in again] == [stage == "mlp_1", False]


def test_finished_shards_and_sites_are_not_computed_again(tmp_path: Path, model: LoadedModel, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    shard = training._shard
    monkeypatch.setattr(training, "_shard", lambda *a: runs.append(a[2]) or shard(*a))

    def kill(progress: Progress) -> None:
        if len(runs) == 2:
            raise Killed

    with pytest.raises(Killed):
        train_dictionaries(model, corpus, tmp_path, OPTIONS, progress=kill)
    train_dictionaries(model, corpus, tmp_path, OPTIONS)
    train_dictionaries(model, corpus, tmp_path, OPTIONS)
    assert runs == [0, 128, 256, 384]  # 500 sequences of 12 tokens in shards of 128, each once


def test_other_options_or_texts_do_not_continue_the_work(tmp_path: Path, model: LoadedModel, corpus: Path) -> None:
    train_dictionaries(model, corpus, tmp_path / "a", OPTIONS)
    with pytest.raises(OtherTraining, match="begun with k = 4, not 5"):
        train_dictionaries(model, corpus, tmp_path / "a", replace(OPTIONS, k=5))
    with pytest.raises(OtherTraining, match="begun with prompts"):
        train_dictionaries(model, corpus, tmp_path / "a", OPTIONS, prompts=["w1 w2"])
    other = tmp_path / "other.txt"
    other.write_text("w1 w2 w3")
    with pytest.raises(OtherTraining, match="begun with corpus"):
        train_dictionaries(model, other, tmp_path / "a", OPTIONS)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"k": 25}, "k is 25: no more than the 24 features"),
        ({"width": 0}, "width is 0: it must be above 0"),
        ({"sites": ()}, "no site to train"),
        ({"sites": (EMBED, EMBED)}, "named twice: embed, embed"),
        ({"prompt_share": 1.5}, "between 0 and 1"),
        ({"save_dtype": "int8"}, "save_dtype is 'int8'"),
    ],
)
def test_options_that_make_no_sense_are_named(tmp_path: Path, model: LoadedModel, corpus: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadTrainingOption, match=complaint):
        train_dictionaries(model, corpus, tmp_path, replace(OPTIONS, **change))


def test_too_small_a_corpus_is_refused(tmp_path: Path, model: LoadedModel) -> None:
    (tmp_path / "small.txt").write_text("w1 w2 w3 " * 50)
    with pytest.raises(CorpusTooSmall, match=r"has 144 tokens: .* at least 512"):
        train_dictionaries(model, tmp_path / "small.txt", tmp_path / "out", OPTIONS)


def test_divergence_is_reported_with_the_site(tmp_path: Path, model: LoadedModel, corpus: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"loss at resid_0 is (nan|inf).*lower the learning rate"):
        train_dictionaries(model, corpus, tmp_path, replace(OPTIONS, learning_rate=1e30))
    assert not (tmp_path / "resid_0").exists()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list(Architecture))
def test_every_architecture_trains_and_loads(tmp_path: Path, model: LoadedModel, corpus: Path, architecture: Architecture) -> None:
    options = replace(OPTIONS, sites=(parse_site("attn_1"),), architecture=architecture, sparsity=0.05, epochs=6, heads=True, save_dtype="float16")
    (trained,) = train_dictionaries(model, corpus, tmp_path, options)
    dictionary = load_dictionaries(str(tmp_path), model)[trained.site]
    kinds = {Architecture.STANDARD: Kind.RELU, Architecture.BATCHTOPK: Kind.JUMPRELU}
    assert dictionary.kind == kinds.get(architecture, architecture.value)
    assert dictionary.basis is Basis.HEADS
    assert json.loads((trained.folder / "cfg.json").read_text())["dtype"] == "float16"
    (quality,) = evaluate_dictionaries(
        model, load_dictionaries(str(tmp_path), model), token_blocks(read_texts(corpus), model.tokenizer, 12), loss_tokens=0
    )
    assert quality.fvu < 0.6
    assert 0 < quality.l0 < 24
    assert math.isnan(quality.loss_recovered)
    sae = SAE.load_from_disk(trained.folder, dtype="float32")
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    assert (dictionary.encode(x) - sae.encode(x.view(6, 4, 4))).abs().max() < 1e-5


def test_the_shards_hold_the_activations_without_position_0_and_split(tmp_path: Path, model: LoadedModel) -> None:
    sequences = [torch.randint(0, 40, (5 + i % 3,), generator=torch.Generator().manual_seed(i)) for i in range(150)]
    training.capture_activations(model, iter(sequences), tmp_path, replace(OPTIONS, sites=SITES[:1], batch=16), lambda _: None)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == 2
    binding = bind(model)
    values = [capture_sites(binding, s[None], {SITES[0]: Basis.RESIDUAL})[SITES[0]][0, 1:] for s in sequences]
    for name, chosen in (("resid_0", [i for i in range(150) if i % 50 != 49]), ("resid_0.heldout", [49, 99, 149])):
        expected = without_outliers(torch.cat([values[i] for i in chosen]))
        found = read_activations(paths, name)
        # The order differs, since equal lengths run together: compare as sets of rows.
        assert found.shape == expected.shape
        assert (torch.cdist(found, expected, compute_mode="donot_use_mm_for_euclid_dist").amin(1)).max() < 1e-5


def test_outliers_of_the_norm_are_left_out() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 100.0]])
    assert without_outliers(rows).tolist() == rows[:3].tolist()
    values = torch.ones(1, 5, 2)
    values[0, 3] = 50.0
    assert usual_positions(values).tolist() == [[False, True, True, False, True]]


def test_prompts_take_their_share_of_the_tokens(model: LoadedModel, corpus: Path) -> None:
    options = replace(OPTIONS, tokens=3000, prompt_share=0.25)
    sequences = list(training._sequences(model, corpus, ["w1 w2 w3 w4 w5"] * 1000, options))
    of_prompts = sum(len(s) for s in sequences if len(s) == 5)
    total = sum(len(s) for s in sequences)
    assert 3000 <= total < 3012
    assert abs(of_prompts / total - 0.25) < 0.01


@pytest.mark.parametrize("site", ["embed", "attn_0", "mlp_11", "resid_3"])
def test_hook_names_lead_back_to_their_sites(site: str) -> None:
    from featlas.model.dictionary_sources import site_of_hook

    for basis in (Basis.RESIDUAL, Basis.HEADS) if site == "attn_0" else (Basis.RESIDUAL,):
        assert site_of_hook(hook_name(parse_site(site), basis)) == (parse_site(site), basis)


# --- Evaluation ------------------------------------------------------------------------------------------------------


def dictionaries_of(found: dict[Site, Any]) -> SiteDictionaries:
    return SiteDictionaries({site: (lambda d=d: d) for site, d in found.items()}, n_layers=3, name="test")


def blocks(n: int = 20) -> list[torch.Tensor]:
    return list(torch.randint(0, 40, (n, 10), generator=torch.Generator().manual_seed(4)))


def test_the_identity_is_perfect_and_a_constant_is_worth_nothing(model: LoadedModel) -> None:
    site, last = parse_site("resid_1"), parse_site("resid_2")
    mean = capture_sites(bind(model), torch.stack(blocks()), {last: Basis.RESIDUAL})[last][:, 1:].flatten(0, 1).mean(0)
    constant = LinearDictionary(
        id="constant", basis=Basis.RESIDUAL, W_dec=torch.zeros(3, 16), b_dec=mean, W_enc=torch.zeros(16, 3), b_enc=torch.tensor([1.0, 0, 0])
    )
    first, second = evaluate_dictionaries(model, dictionaries_of({site: identity(16), last: constant}), blocks())
    assert abs(first.fvu) < 1e-6
    assert first.loss_recovered == pytest.approx(1.0, abs=1e-5)
    assert (first.l0, first.dead_share, first.positions) == (16.0, 0.0, 180)
    # The mean of exactly these positions explains nothing of their variance: FVU is 1 by its definition.
    assert second.fvu == pytest.approx(1.0, abs=1e-5)
    assert (second.l0, second.dead_share) == (1.0, pytest.approx(2 / 3))


def test_the_clean_loss_is_the_model_s_own(model: LoadedModel) -> None:
    tokens = torch.stack(blocks())
    logits = model.module(input_ids=tokens).logits[:, 1:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 2:].flatten())
    found, count = cross_entropy(bind(model), [tokens], {})
    assert (found, count) == (pytest.approx(float(expected), abs=1e-5), 160)


def test_the_loss_with_the_last_site_at_zero_is_that_of_no_information(model: LoadedModel) -> None:
    """With the last residual stream 0 the normed stream is 0 and, without an unembedding bias, every token equally likely."""
    site = parse_site("resid_2")
    (quality,) = evaluate_dictionaries(model, dictionaries_of({site: identity(16)}), blocks())
    assert quality.loss_zero == pytest.approx(math.log(48), abs=1e-4)


def test_losses_are_spliced_in_the_heads_basis_too(model: LoadedModel) -> None:
    site = parse_site("attn_1")
    (quality,) = evaluate_dictionaries(model, dictionaries_of({site: identity(16, basis=Basis.HEADS)}), blocks())
    assert quality.loss_recovered == pytest.approx(1.0, abs=1e-4)
    assert quality.loss_zero != pytest.approx(quality.loss_clean, abs=1e-6)


def test_nothing_to_evaluate_is_said(model: LoadedModel) -> None:
    with pytest.raises(NothingToEvaluate, match="resid_1"):
        evaluate_dictionaries(model, dictionaries_of({parse_site("resid_1"): identity(16)}), [torch.tensor([1])])


@pytest.mark.slow
def test_blocks_of_text_are_no_longer_than_the_model_s_context(tmp_path: Path, corpus: Path, featlas: Callable[..., tuple[int, str, str]]) -> None:
    folder = save_tiny(tmp_path / "tiny")  # it reads 64 tokens; blocks of text are 128 unless --length says otherwise
    small = ("--model", folder, "--sites", "resid_0", "--corpus", corpus, "--tokens", 5000, "--epochs", 1, "--width", 24, "--k", 4)
    code, _, err = featlas("dictionaries", "train", *small, "--output", tmp_path / "made")
    assert code == 0, err
    assert "blocks of 64 tokens, not 128" in err
    assert json.loads((tmp_path / "made" / "training.json").read_text())["context"] == 64
    code, _, err = featlas("dictionaries", "train", *small, "--output", tmp_path / "short", "--length", 16)
    assert (code, "blocks of" in err) == (0, False)
    assert json.loads((tmp_path / "short" / "training.json").read_text())["context"] == 16
    read = ("--model", folder, "--dictionaries", tmp_path / "made", "--corpus", corpus, "--limit", 4)
    assert featlas("dictionaries", "evaluate", *read, "--loss-tokens", 0)[0] == 0
    assert featlas("ingest", "statistics", *read, "--atlas", tmp_path / "atlas")[0] == 0
