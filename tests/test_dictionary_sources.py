"""Dictionaries from folders and releases: which site each belongs to, what is refused, and that only the needed are read."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from featlas.errors import UserError
from featlas.model.dictionaries import Basis, Kind
from featlas.model.dictionary_sources import (
    DEMO_FOLDER,
    REFUSED,
    BrokenDictionary,
    MissingDictionary,
    ReleaseUnreachable,
    UnknownDictionaries,
    UnsupportedDictionary,
    WidthMismatch,
    build,
    folder_id,
    list_folder,
    list_releases,
    load_dictionaries,
    release_sites,
    site_of_hook,
)
from featlas.model.evaluation import evaluate_dictionaries
from featlas.model.loading import LoadedModel, load_model
from featlas.model.sites import EMBED, OUTPUT, Site, SiteKind, UnknownSite, parse_site
from huggingface_hub.errors import LocalEntryNotFoundError
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from .micro import save_tiny

D_MODEL = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_tiny(tmp_path_factory.mktemp("model") / "tiny")))


def save_sae(folder: Path, *, d_in: int = D_MODEL, hook: str | None = None, seed: int = 0, **config: Any) -> SAE[Any]:
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=12, metadata=SAEMetadata(hook_name=hook) if hook else SAEMetadata(), **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    sae.save_model(folder)
    return sae


@pytest.mark.parametrize(
    ("hook", "site", "basis"),
    [
        ("blocks.0.hook_resid_pre", "embed", Basis.RESIDUAL),
        ("hook_embed", "embed", Basis.RESIDUAL),
        ("blocks.4.hook_resid_pre", "resid_3", Basis.RESIDUAL),
        ("blocks.4.hook_resid_post", "resid_4", Basis.RESIDUAL),
        ("blocks.4.hook_resid_post__trainer_2", "resid_4", Basis.RESIDUAL),
        ("blocks.11.hook_attn_out", "attn_11", Basis.RESIDUAL),
        ("blocks.11.hook_mlp_out", "mlp_11", Basis.RESIDUAL),
        ("blocks.2.attn.hook_z", "attn_2", Basis.HEADS),
        ("blocks.2.hook_z", "attn_2", Basis.HEADS),
    ],
)
def test_hook_names_lead_to_sites(hook: str, site: str, basis: Basis) -> None:
    assert site_of_hook(hook) == (parse_site(site), basis)


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_mid", "blocks.2.hook_mlp_in", "blocks.2.ln2.hook_normalized", "model.layers.3", ""])
def test_other_hooks_are_no_site(hook: str) -> None:
    assert site_of_hook(hook) is None


def test_a_folder_of_sites_gives_sae_lens_s_numbers(tmp_path: Path, model: LoadedModel) -> None:
    saes = {name: save_sae(tmp_path / name, seed=i) for i, name in enumerate(("resid_1", "embed", "mlp_0"))}
    found = load_dictionaries(str(tmp_path), model)
    assert [site.name for site in found.sites] == ["embed", "mlp_0", "resid_1"]
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(9))
    for name, sae in saes.items():
        dictionary = found[parse_site(name)]
        assert (dictionary.encode(x) - sae.encode(x)).abs().max() < 1e-5
        assert dictionary.id == folder_id(tmp_path / name)
        assert len(dictionary.id) == 12
    assert len({dictionary.id for dictionary in found.values()}) == 3


def test_only_the_sites_asked_for_are_read(tmp_path: Path, model: LoadedModel) -> None:
    save_sae(tmp_path / "resid_1")
    save_sae(tmp_path / "resid_2")
    (tmp_path / "resid_2" / "sae_weights.safetensors").write_bytes(b"broken")
    found = load_dictionaries(str(tmp_path), model)
    assert found[parse_site("resid_1")].d_sae == 12
    assert found[parse_site("resid_1")] is found[parse_site("resid_1")]
    with pytest.raises(BrokenDictionary, match=r"resid_2.*safetensors"):
        found[parse_site("resid_2")]


def test_a_missing_site_names_what_there_is(tmp_path: Path, model: LoadedModel) -> None:
    save_sae(tmp_path / "resid_1")
    with pytest.raises(MissingDictionary, match=r"no dictionary for attn_0, mlp_1: it has resid_1"):
        load_dictionaries(str(tmp_path), model, sites=[parse_site("attn_0"), parse_site("mlp_1")])
    with pytest.raises(MissingDictionary, match="no dictionary for y: the output is a number"):
        load_dictionaries("identity", model, sites=[OUTPUT])
    with pytest.raises(MissingDictionary, match="no dictionary for embed"):
        load_dictionaries(str(tmp_path), model)[EMBED]


def test_a_wrong_width_names_dictionary_and_site(tmp_path: Path, model: LoadedModel) -> None:
    save_sae(tmp_path / "resid_1", d_in=24)
    found = load_dictionaries(str(tmp_path), model)
    with pytest.raises(WidthMismatch, match=r"dictionary [0-9a-f]{12} has width 24, but resid_1 of tiny has width 16"):
        found[parse_site("resid_1")]


def test_a_layer_that_the_model_lacks_is_named(tmp_path: Path, model: LoadedModel) -> None:
    save_sae(tmp_path / "resid_7")
    with pytest.raises(UnknownSite, match=r"resid_7, but tiny has layers 0 to 2"):
        load_dictionaries(str(tmp_path), model)


def test_a_folder_that_contradicts_its_hook_is_refused(tmp_path: Path, model: LoadedModel) -> None:
    save_sae(tmp_path / "resid_1", hook="blocks.1.hook_resid_pre")
    with pytest.raises(UnsupportedDictionary, match=r"trained on resid_0 .*not on resid_1"):
        load_dictionaries(str(tmp_path), model)[parse_site("resid_1")]


def test_a_single_dictionary_s_folder_is_one_site(tmp_path: Path, model: LoadedModel) -> None:
    save_sae(tmp_path / "any", hook="blocks.2.hook_resid_pre")
    assert load_dictionaries(str(tmp_path / "any"), model).sites == (parse_site("resid_1"),)


def test_unknown_names_say_the_way_out(tmp_path: Path, model: LoadedModel) -> None:
    with pytest.raises(UnknownDictionaries, match="needs a sub-folder per site"):
        load_dictionaries(str(tmp_path), model)
    (tmp_path / "layer3").mkdir()
    save_sae(tmp_path / "layer3")
    with pytest.raises(UnknownSite, match=r"layer3"):
        load_dictionaries(str(tmp_path), model)
    with pytest.raises(UnknownDictionaries, match="no such release; did you mean pythia-70m-deduped-"):
        load_dictionaries("pythia-70m-deduped", model)
    with pytest.raises(UserError, match="name the sites"):
        load_dictionaries("identity", model)
    with pytest.raises(UnknownDictionaries, match="belong to smollm2, not to tiny"):
        load_dictionaries("demo", model)


def test_identity_fits_the_sites_named(model: LoadedModel) -> None:
    sites = [parse_site("resid_2"), parse_site("attn_0")]
    found = load_dictionaries("identity", model, sites=sites, dtype="float64")
    assert [site.name for site in found] == ["attn_0", "resid_2"]
    dictionary = found[sites[0]]
    assert (dictionary.id, dictionary.d_sae, dictionary.W_dec.dtype) == ("identity", D_MODEL, torch.float64)


def test_identity_on_heads_reads_them_at_attention_sites(model: LoadedModel) -> None:
    attn, resid = parse_site("attn_1"), parse_site("resid_1")
    found = load_dictionaries("identity-heads", model, sites=[resid, attn])
    assert (found[attn].id, found[attn].basis, found[attn].d_sae) == ("identity-heads", Basis.HEADS, 16)
    assert (found[resid].id, found[resid].basis, found[resid].d_sae) == ("identity", Basis.RESIDUAL, 16)
    assert load_dictionaries("identity", model, sites=[attn])[attn].id == "identity"
    with pytest.raises(UserError, match="name the sites, for example attn_3"):
        load_dictionaries("identity-heads", model)


def test_heads_dictionaries_fit_attention_sites_only(tmp_path: Path, model: LoadedModel) -> None:
    save_sae(tmp_path / "attn_1", hook="blocks.1.attn.hook_z", reshape_activations="hook_z")
    save_sae(tmp_path / "mlp_1", reshape_activations="hook_z")
    found = load_dictionaries(str(tmp_path), model)
    assert found[parse_site("attn_1")].basis is Basis.HEADS
    with pytest.raises(UnsupportedDictionary, match="fits attn_L sites, not mlp_1"):
        found[parse_site("mlp_1")]


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_other_kinds_are_refused_by_name_with_the_reason(architecture: str) -> None:
    assert architecture in SAE_CLASS_REGISTRY
    with pytest.raises(UnsupportedDictionary, match=f"'{architecture}', which is not supported: it"):
        build({"architecture": architecture}, {}, id="x")


def test_every_kind_of_sae_lens_is_either_built_or_refused() -> None:
    assert set(SAE_CLASS_REGISTRY) == {"standard", "gated", "topk", "jumprelu", *REFUSED}


def test_statistics_that_are_not_in_the_files_are_refused() -> None:
    with pytest.raises(UnsupportedDictionary, match="covariance_whitening"):
        build({"architecture": "standard", "normalize_activations": "covariance_whitening"}, {}, id="x")
    with pytest.raises(UnsupportedDictionary, match="single attention head"):
        build({"architecture": "standard", "metadata": {"hook_head_index": 3}}, {}, id="x")


def test_pickled_weights_are_never_opened(tmp_path: Path, model: LoadedModel) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("sprung").touch, ())

    save_sae(tmp_path / "resid_1")
    (tmp_path / "resid_1" / "sae_weights.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BrokenDictionary):
        load_dictionaries(str(tmp_path), model)[parse_site("resid_1")]
    (tmp_path / "resid_1" / "sae_weights.safetensors").unlink()
    (tmp_path / "resid_1" / "sae_weights.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BrokenDictionary, match="read from safetensors only"):
        load_dictionaries(str(tmp_path), model)[parse_site("resid_1")]
    assert not (tmp_path / "sprung").exists()


def test_a_flat_configuration_of_former_versions_is_read(tmp_path: Path, model: LoadedModel) -> None:
    sae = save_sae(tmp_path / "resid_0")
    flat = {"d_in": D_MODEL, "d_sae": 12, "hook_point": "blocks.1.hook_resid_pre", "dtype": "torch.float32", "apply_b_dec_to_input": False}
    (tmp_path / "resid_0" / "cfg.json").write_text(json.dumps(flat))
    sae.cfg.apply_b_dec_to_input = False
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(9))
    dictionary = load_dictionaries(str(tmp_path), model)[parse_site("resid_0")]
    assert (dictionary.encode(x) - sae.encode(x)).abs().max() < 1e-5


def test_linear_dictionaries_of_our_own_format(tmp_path: Path, model: LoadedModel) -> None:
    for name, config, weights in (
        ("resid_0", {"architecture": "linear"}, {"W_enc": torch.full((D_MODEL, 2), 0.5), "W_dec": torch.ones(2, D_MODEL)}),
        ("attn_0", {"architecture": "per_head_linear"}, {"W_enc": torch.ones(4, 4, 3), "W_dec": torch.ones(4, 3, 4)}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cfg.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / name / "sae_weights.safetensors")
    found = load_dictionaries(str(tmp_path), model)
    assert found[parse_site("resid_0")].encode(torch.ones(1, D_MODEL)).tolist() == [[8.0, 8.0]]
    assert (found[parse_site("attn_0")].kind, found[parse_site("attn_0")].basis) == (Kind.PER_HEAD_LINEAR, Basis.HEADS)
    assert found[parse_site("attn_0")].encode(torch.ones(1, D_MODEL)).tolist() == [[4.0] * 12]


# --- Releases: the directory that sae_lens brings, and a download replaced by a local file ---------------------------


@pytest.mark.parametrize(
    ("release", "kind", "layers", "with_embed"),
    [
        ("pythia-70m-deduped-res-sm", SiteKind.RESID, 6, True),
        ("pythia-70m-deduped-att-sm", SiteKind.ATTN, 6, False),
        ("pythia-70m-deduped-mlp-sm", SiteKind.MLP, 6, False),
        ("gpt2-small-res-jb", SiteKind.RESID, 12, True),
        ("gemma-scope-2b-pt-res-canonical", SiteKind.RESID, 26, False),
        ("gemma-scope-2b-pt-att-canonical", SiteKind.ATTN, 26, False),
        ("gemma-scope-2b-pt-mlp-canonical", SiteKind.MLP, 26, False),
    ],
)
def test_sites_of_known_releases_need_no_download(release: str, kind: SiteKind, layers: int, with_embed: bool) -> None:
    expected = {Site(kind, layer) for layer in range(layers)} | ({EMBED} if with_embed else set())
    assert set(release_sites(release)) == expected


def test_ids_of_known_releases() -> None:
    assert release_sites("gpt2-small-res-jb")[parse_site("resid_3")] == "blocks.4.hook_resid_pre"
    assert release_sites("gpt2-small-res-jb")[parse_site("resid_11")] == "blocks.11.hook_resid_post"
    # Gemma Scope's canonical release has two widths for each layer: the first listed is the narrower.
    assert release_sites("gemma-scope-2b-pt-res-canonical")[parse_site("resid_12")] == "layer_12/width_16k/canonical"
    assert [r.model for r in list_releases("pythia-70m-deduped-res-sm")] == ["pythia-70m-deduped"]
    assert len(list_releases()) > 100


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the hub: sae_lens's download finds files of this folder."""
    import sae_lens.loading.pretrained_sae_loaders as loaders

    def download(repo_id: str, filename: str, **_: Any) -> str:
        path = tmp_path / repo_id / filename
        if not path.exists():
            raise LocalEntryNotFoundError(f"{repo_id} has no {filename}")
        return str(path)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    return tmp_path


def test_a_release_is_loaded_through_sae_lens(hub: Path, model: LoadedModel) -> None:
    sae = save_sae(hub / "ctigges/pythia-70m-deduped__res-sm_processed" / "1-res-sm", hook="blocks.1.hook_resid_post")
    found = load_dictionaries("pythia-70m-deduped-res-sm:blocks.1.hook_resid_post", model)
    dictionary = found[parse_site("resid_1")]
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(9))
    assert dictionary.id == "pythia-70m-deduped-res-sm:blocks.1.hook_resid_post"
    assert (dictionary.encode(x) - sae.encode(x)).abs().max() < 1e-5


def test_whole_releases_together_cover_their_sites(hub: Path, model: LoadedModel) -> None:
    sites = [EMBED, parse_site("attn_2"), parse_site("resid_2")]
    found = load_dictionaries("pythia-70m-deduped-res-sm, pythia-70m-deduped-att-sm", model, sites=sites)
    assert found.sites == tuple(sites)
    with pytest.raises(ReleaseUnreachable, match=r"pythia-70m-deduped-att-sm:blocks.2.hook_attn_out could not be fetched: .*2-att-sm"):
        found[parse_site("attn_2")]
    with pytest.raises(UserError, match="two dictionaries for embed"):
        load_dictionaries("pythia-70m-deduped-res-sm,pythia-70m-deduped-res-sm", model)


def test_gpt2_small_res_jb_is_centred(hub: Path, model: LoadedModel) -> None:
    folder = hub / "jbloom/GPT2-Small-SAEs-Reformatted" / "blocks.2.hook_resid_pre"
    sae = save_sae(folder)
    # The release is of a former version, with a flat configuration.
    (folder / "cfg.json").write_text(json.dumps({"d_in": D_MODEL, "d_sae": 12, "hook_point": "blocks.2.hook_resid_pre", "dtype": "torch.float32"}))
    dictionary: Any = load_dictionaries("gpt2-small-res-jb:blocks.2.hook_resid_pre", model)[parse_site("resid_1")]
    assert dictionary.input.centred
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(9)) + 3
    assert (dictionary.encode(x) - sae.encode(x - x.mean(-1, keepdim=True))).abs().max() < 1e-4


def test_an_unknown_id_names_near_ones(model: LoadedModel) -> None:
    with pytest.raises(UnknownDictionaries, match=r"has no 'layer_3/width_16k': it has layer_3/width_16k/canonical"):
        load_dictionaries("gemma-scope-2b-pt-res-canonical:layer_3/width_16k", model)
    with pytest.raises(UnknownSite, match=r"resid_12, but tiny has layers 0 to 2"):
        load_dictionaries("gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical", model)


def test_listing_a_folder_reads_no_weights(tmp_path: Path) -> None:
    save_sae(tmp_path / "resid_1")
    (tmp_path / "resid_1" / "sae_weights.safetensors").unlink()
    (tmp_path / "notes").mkdir()
    assert list_folder(tmp_path) == {parse_site("resid_1"): tmp_path / "resid_1"}


# --- The dictionaries that come with the project ---------------------------------------------------------------------

DEMO_SITES = [parse_site(f"resid_{layer}") for layer in (5, 11, 17, 23, 29)]


def test_the_demo_dictionaries_are_small_and_in_half_precision() -> None:
    folders = list_folder(DEMO_FOLDER)
    assert sorted(folders, key=lambda s: s.layer) == DEMO_SITES
    weights = [load_file(path / "sae_weights.safetensors") for path in folders.values()]
    assert {tensor.dtype for tensors in weights for tensor in tensors.values()} == {torch.float16}
    assert sum(path.stat().st_size for path in DEMO_FOLDER.rglob("*") if path.is_file()) < 24_000_000


def test_the_demo_s_model_card_names_every_dictionary() -> None:
    card = (DEMO_FOLDER / "README.md").read_text(encoding="utf-8")
    for site, path in list_folder(DEMO_FOLDER).items():
        assert f"| {site.name} | `{folder_id(path)}` |" in card


@pytest.mark.smollm2
def test_the_demo_dictionaries_explain_smollm2() -> None:
    """On plain English of our own: at most a third of the variance unexplained, and little of the loss lost."""
    smollm2 = load_model("smollm2")
    found = load_dictionaries("demo", smollm2)
    sae = SAE.load_from_disk(DEMO_FOLDER / "resid_11", dtype="float32")
    text = (
        "The old woman walked slowly to the station, because the bus that the city had promised did not come. Her brother was waiting there with "
        "a letter from the hospital. When they had read it twice, he gave her the keys of the house and said that she would need them in winter. "
        "The trains were late, and the guards at the gate knew nothing. In the evening the teachers of the school came home from a long meeting."
    )
    tokens = smollm2.tokenizer(text, return_tensors="pt")["input_ids"]
    qualities = evaluate_dictionaries(smollm2, found, list(tokens), loss_tokens=1000)
    assert [quality.site for quality in qualities] == DEMO_SITES
    for quality in qualities:
        assert quality.fvu < 0.33
        assert 31 < quality.l0 <= 32
        assert quality.loss_recovered > 0.9
    x = torch.randn(7, smollm2.d_model, generator=torch.Generator().manual_seed(0)) * 5
    assert (found[DEMO_SITES[1]].encode(x) - sae.encode(x)).abs().max() < 1e-3
