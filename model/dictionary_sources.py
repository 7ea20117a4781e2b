"""Where dictionaries come from: folders, sae_lens releases, the identity, and those that come with the project.

1. A source is listed first, without reading weights: which sites it has, and under which name each is found.
2. `build` makes a `Dictionary` of a configuration and weights as sae_lens saves them; kinds that do not fit are refused by name.
3. `SiteDictionaries` reads a dictionary's configuration and shapes when it is first asked for, its weights when they are first needed.
   With $FEATLAS_DICTIONARY_MEMORY the weights used longest ago are let go, and read again when needed.
4. Each dictionary lies where its layer computes.

Weights are read from safetensors; releases are fetched by sae_lens, which opens other formats without unpickling objects.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import FeatlasError, UserError
from .dictionaries import (
    Dictionary,
    GatedDictionary,
    InputTransform,
    JumpReLUDictionary,
    LinearDictionary,
    Normalisation,
    ReLUDictionary,
    Shelf,
    SparseDictionary,
    TopKDictionary,
    identity,
    per_head_linear,
)
from .hashes import remembered
from .loading import SMOLLM2, LoadedModel, cache_folder, dictionary_dtype
from .placement import parse_bytes, parse_device, parse_placement, place_of
from .sites import EMBED, OUTPUT, Basis, Site, SiteGraph, SiteKind, UnknownSite, parse_site

IDENTITY, IDENTITY_HEADS, DEMO = "identity", "identity-heads", "demo"
DEMO_FOLDER = Path(__file__).parent / "demo_dictionaries"
MEMORY_VARIABLE = "FEATLAS_DICTIONARY_MEMORY"
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
ID_LENGTH = 12
_LOOKED_AT = 256 * 2**20  # bytes of a file whose numbers are looked at when its header is read

REFUSED = {
    "temporal": "its decoder mixes positions, so that a feature has no one direction",
    "abstopk": "its features keep negative values, so that a feature is not on or off",
    "matching_pursuit": "it encodes step by step, so that a feature has no gradient of its own",
    "transcoder": "it reads one site and writes another",
    "skip_transcoder": "it reads one site and writes another",
    "jumprelu_transcoder": "it reads one site and writes another",
    "jumprelu_skip_transcoder": "it reads one site and writes another",
}
"""sae_lens's architectures that are no dictionary of one site with an affine decoder, and why."""


class UnsupportedDictionary(UserError):
    """A dictionary's kind or configuration does not fit."""


class MissingDictionary(UserError):
    """A source has no dictionary for a site."""


class UnknownDictionaries(UserError):
    """Dictionaries are named that are neither a folder, nor a release, nor `identity`, `identity-heads` or `demo`."""


class WidthMismatch(UserError):
    """A dictionary is not as wide as its site."""


class BrokenDictionary(UserError):
    """A dictionary's files are there but cannot be read."""


class ReleaseUnreachable(FeatlasError):
    """A release is known but could not be fetched."""


@dataclass(frozen=True, slots=True)
class Release:
    """A release in sae_lens's directory: its name, the model it belongs to, and the ids of its dictionaries."""

    name: str
    model: str
    repository: str
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """Reads one dictionary: whole, or only its `outline`, with tensors on `meta`, where that can be had without the weights."""

    whole: Callable[[], Dictionary]
    outline: Callable[[], Dictionary] | None = None

    def __call__(self) -> Dictionary:
        return self.whole()


class SiteDictionaries(Mapping[Site, Dictionary]):
    """Dictionaries by site, each opened when it is first asked for; `sites` is in the model's order.

    Weights are read when they are first needed; `shelf` lets those used longest ago go where they may not all be kept.
    """

    def __init__(
        self,
        readers: Mapping[Site, Callable[[], Dictionary]],
        *,
        n_layers: int,
        name: str,
        home: str | torch.device = "cpu",
        shelf: Shelf | None = None,
    ) -> None:
        self.name = name
        self.home = torch.device(home)
        self.shelf = shelf or Shelf()
        self.sites = SiteGraph.of(n_layers, False, readers).sites[:-1]  # without the output
        self._readers = dict(readers)
        self._loaded: dict[Site, Dictionary] = {}

    def __getitem__(self, site: Site) -> Dictionary:
        if site not in self._readers:
            raise MissingDictionary(f"{self.name} has no dictionary for {site.name}: it has {_names(self.sites)}")
        if site not in self._loaded:
            read = self._readers[site]
            outline = read.outline if isinstance(read, Reader) else None
            opened = (outline or read)()
            self.shelf.put(opened, read, self.home)
            self._loaded[site] = opened
        return self._loaded[site]

    def stored_numbers(self, site: Site) -> int:
        """How many numbers a dictionary keeps in memory once it is used: its tensors', and an encoder's once more, transposed."""
        read = self._readers[site]
        one = read.outline() if isinstance(read, Reader) and read.outline is not None else self[site]
        tensors = [value for value in vars(one).values() if isinstance(value, torch.Tensor)]
        encoder = one.d_in * one.d_sae if isinstance(one, SparseDictionary) else 0
        return sum(value.numel() for value in tensors) + encoder

    def __contains__(self, site: object) -> bool:
        return site in self._readers

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def load_dictionaries(
    spec: str, model: LoadedModel, *, sites: Sequence[Site] | None = None, device: str = "cpu", dtype: str = "float32"
) -> SiteDictionaries:
    """The dictionaries that `spec` names for `model`, for `sites` or, without, for every site that the source has.

    spec: a folder with a sub-folder per site (or of one dictionary), `demo` (SmolLM2's, which come with the project),
    `identity` or `identity-heads` (which need `sites`; the latter is at attn_L the identity on the heads' outputs, hook_z), or releases of
    sae_lens, `release` or `release:sae_id`, several with commas between them.
    Where a release has several for one site, the first in the release's own order is taken: name another by its id.
    device: one device for all, or a placement, with which each lies where its layer computes. dtype: the model's type, with the dictionaries' own
    behind a slash; without one they are in float32 (float64 with a float64 model).
    Raises `UserError`s for what is unknown, missing, refused, or not as wide as its site.
    """
    kept = dictionary_dtype(dtype)
    wanted = None if sites is None else tuple(sites)
    if wanted and OUTPUT in wanted:
        raise MissingDictionary(
            f"{spec} has no dictionary for y: the output is a number, and a dictionary belongs to embed, attn_L, mlp_L or resid_L"
        )
    found = _find(spec, model, wanted)
    missing = [site for site in wanted or () if site not in found]
    if missing:
        raise MissingDictionary(f"{spec} has no dictionary for {_names(missing)}: it has {_names(sorted(found, key=_order))}")
    chosen = {site: found[site] for site in wanted or found}
    for site in chosen:
        if site.layer >= model.n_layers:
            raise UnknownSite(
                f"{spec} has a dictionary for {site.name}, but {model.name} has layers 0 to {model.n_layers - 1}: name the sites to use"
            )
    places = _places(device, model, chosen)
    readers = {site: _checked(read, site, model, places[site], kept) for site, read in chosen.items()}
    home = places[next(iter(chosen))] if parse_placement(device).is_one_device and chosen else model.device
    return SiteDictionaries(readers, n_layers=model.n_layers, name=spec, home=home, shelf=Shelf(_memory()))


def _places(device: str, model: LoadedModel, sites: Mapping[Site, object]) -> dict[Site, torch.device]:
    """Where each site's dictionary goes."""
    placement = parse_placement(device)
    if placement.is_one_device:
        return dict.fromkeys(sites, parse_device(str(placement.device)))
    from .binding import Binding

    layers = Binding(model.module).layers
    return {site: model.device if site == EMBED else place_of(layers[site.layer]) for site in sites}


def _memory() -> int | None:
    """How many bytes of weights of dictionaries are kept at once, as the environment says; None for all."""
    said = os.environ.get(MEMORY_VARIABLE)
    if not said:
        return None
    if (amount := parse_bytes(said)) is None:
        raise UserError(f"${MEMORY_VARIABLE} is {said!r}, which is no amount of memory: write 512MB or 2GB, or leave it unset to keep all")
    return amount


def _find(spec: str, model: LoadedModel, sites: tuple[Site, ...] | None) -> dict[Site, Callable[[], Dictionary]]:
    """Readers of all sites of a source, nothing read yet."""
    if spec in (IDENTITY, IDENTITY_HEADS):
        if not sites:
            example = "resid_3,resid_5" if spec == IDENTITY else "attn_3,resid_3"
            raise UserError(f"{spec} dictionaries fit any site: name the sites, for example {example}")
        basis = {SiteKind.ATTN: Basis.HEADS} if spec == IDENTITY_HEADS else {}
        return {site: _identity_reader(model, basis.get(site.kind, Basis.RESIDUAL)) for site in sites}
    if spec == DEMO:
        if model.name != SMOLLM2:
            raise UnknownDictionaries(f"the demo dictionaries belong to {SMOLLM2}, not to {model.name}: name a folder or a release instead")
        return _folder_readers(DEMO_FOLDER)
    folder = Path(spec)
    if folder.is_dir():
        return _folder_readers(folder)
    return _release_readers(spec)


def _identity_reader(model: LoadedModel, basis: Basis) -> Callable[[], Dictionary]:
    return lambda: identity(site_width(model, basis), basis=basis)


def _checked(read: Callable[[], Dictionary], site: Site, model: LoadedModel, device: torch.device, dtype: torch.dtype) -> Reader:
    """A reader that also compares the width with the site's and moves the dictionary where it is needed."""

    def checked(how: Callable[[], Dictionary]) -> Dictionary:
        dictionary = how()
        if dictionary.basis is Basis.HEADS and site.kind is not SiteKind.ATTN:
            raise UnsupportedDictionary(f"dictionary {dictionary.id} reads attention heads (hook_z): it fits attn_L sites, not {site.name}")
        width = site_width(model, dictionary.basis)
        if dictionary.d_in != width:
            raise WidthMismatch(f"dictionary {dictionary.id} has width {dictionary.d_in}, but {site.name} of {model.name} has width {width}")
        return dictionary if dictionary.b_dec.is_meta else dictionary.to(device, dtype)

    outline = read.outline if isinstance(read, Reader) else None
    return Reader(partial(checked, read), None if outline is None else partial(checked, outline))


def site_width(model: LoadedModel, basis: Basis) -> int:
    """Width of a site's value in a basis."""
    if basis is Basis.RESIDUAL:
        return model.d_model
    config: Any = model.module.config
    n_heads = int(config.num_attention_heads)
    return n_heads * int(getattr(config, "head_dim", None) or model.d_model // n_heads)


def _names(sites: Sequence[Site]) -> str:
    return ", ".join(site.name for site in sites) or "none"


def _order(site: Site) -> tuple[int, str]:
    return site.layer, site.kind.value


# --- Folders ---------------------------------------------------------------------------------------------------------


def list_folder(folder: Path) -> dict[Site, Path]:
    """The sites of a folder and where each dictionary lies; a folder that is itself one dictionary counts as one site."""
    if (folder / CONFIG_FILE).exists():
        return {_site_of_config(_read_config(folder), folder): folder}
    found = {}
    for path in sorted(p for p in folder.iterdir() if (p / CONFIG_FILE).exists()):
        try:
            found[parse_site(path.name)] = path
        except UnknownSite as error:
            raise UnknownSite(f"{path}: {error}") from None
    if not found:
        raise UnknownDictionaries(f"folder {folder} has no dictionaries: it needs a sub-folder per site, such as resid_3/, with {CONFIG_FILE}")
    return found


def _folder_readers(folder: Path) -> dict[Site, Callable[[], Dictionary]]:
    return {site: _folder_reader(path, site) for site, path in list_folder(folder).items()}


def _folder_reader(path: Path, site: Site) -> Reader:
    def read(weights: Callable[[Path], dict[str, Tensor]]) -> Dictionary:
        config = _read_config(path)
        named = _hook_name(config)
        at = site_of_hook(named) if named else None
        if at is not None and at[0] != site:
            raise UnsupportedDictionary(f"{path} was trained on {at[0].name} ({named}), not on {site.name}: rename the folder")
        tensors = weights(path)
        try:
            return _sound(build(config, tensors, id=folder_id(path)), path)
        except KeyError as error:
            raise BrokenDictionary(f"{path}: {error} is neither in {CONFIG_FILE} nor in {WEIGHTS_FILE}, as its architecture needs it") from None
        except (AttributeError, IndexError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise BrokenDictionary(f"{path}: {CONFIG_FILE} and {WEIGHTS_FILE} describe no dictionary: {_first(error)}") from None

    return Reader(partial(read, _read_weights), partial(read, _read_shapes))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenDictionary(f"{path / CONFIG_FILE} is no JSON: {error}") from None
    except OSError as error:
        raise BrokenDictionary(f"{path / CONFIG_FILE} cannot be read: {error.strerror or error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("metadata"), dict | None) or not isinstance(_hook_name(config), str | None):
        raise BrokenDictionary(f"{path / CONFIG_FILE} is no dictionary's configuration: an object, its metadata another, its hook_name a text")
    if not isinstance(config.get("architecture"), str | None):
        raise BrokenDictionary(f"{path / CONFIG_FILE} names the architecture {config['architecture']!r:.40}, which is no text")
    if "metadata" in config or config.get("architecture") in _LINEAR:
        return config
    # Before version 6 the configuration was flat; sae_lens knows all of its former names.
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    try:
        return handle_config_defaulting(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BrokenDictionary(f"{path / CONFIG_FILE} is no configuration that sae_lens knows: {_first(error)}") from None


def _first(error: Exception) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _sound(dictionary: Dictionary, path: Path) -> Dictionary:
    """The dictionary, whose tensors fit each other and hold numbers. Raises `BrokenDictionary`."""
    if dictionary.W_dec.ndim != 2 or not all(dictionary.W_dec.shape):
        raise BrokenDictionary(f"{path}: W_dec is {_sizes(dictionary.W_dec)}: a matrix of (d_sae, d_in) is needed")
    d_sae, d_in = dictionary.shape
    expected = {"W_dec": (d_sae, d_in), "W_enc": (d_in, d_sae), "b_dec": (d_in,)}
    for name, value in vars(dictionary).items():
        if not isinstance(value, Tensor):
            continue
        if tuple(value.shape) != expected.get(name, (d_sae,)):
            raise BrokenDictionary(f"{path}: {name} is {_sizes(value)}, and W_dec {_sizes(dictionary.W_dec)}: they are of no one dictionary")
        if not value.is_meta:
            _check_finite(path, name, value)
    if isinstance(dictionary, TopKDictionary) and not 1 <= dictionary.k <= d_sae:
        raise BrokenDictionary(f"{path}: k is {dictionary.k}, of {d_sae} features")
    return dictionary


def _check_finite(path: Path, name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise BrokenDictionary(f"{path}: {name} holds numbers that are not finite: its training failed, or the file is damaged")


def _sizes(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape)) or "a single number"


def _read_weights(path: Path) -> dict[str, Tensor]:
    return _from_file(path, load_file)


_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _read_shapes(path: Path) -> dict[str, Tensor]:
    """The weights as tensors on `meta`, from the file's header; the numbers of a file that is not large are looked at."""

    def shapes(file: Path) -> dict[str, Tensor]:
        with safe_open(file, "pt") as stored:
            parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            if file.stat().st_size <= _LOOKED_AT:  # before anything is written about a run; larger ones when their weights are read
                for name in parts:
                    _check_finite(path, name, stored.get_tensor(name))
            return {name: torch.empty(part.get_shape(), dtype=_STORED.get(part.get_dtype()), device="meta") for name, part in parts.items()}

    return _from_file(path, shapes)


def _from_file(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    file = path / WEIGHTS_FILE
    if not file.exists():
        raise BrokenDictionary(f"{path} has no {WEIGHTS_FILE}: dictionaries are read from safetensors only")
    try:
        return read(file)
    except SafetensorError as error:
        raise BrokenDictionary(f"{file} is no safetensors file: {error}") from None
    except OSError as error:
        raise BrokenDictionary(f"{file} cannot be read: {error.strerror or error}") from None


def folder_id(path: Path) -> str:
    """First 12 hex digits of the sha256 over a dictionary's configuration and weights; of large files it is remembered."""
    files = [path / name for name in (CONFIG_FILE, WEIGHTS_FILE) if (path / name).exists()]

    def read() -> str:
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    return remembered(files, read, cache_folder(), "dictionary")[:ID_LENGTH]


def _hook_name(config: Mapping[str, Any]) -> str | None:
    return (config.get("metadata") or {}).get("hook_name") or config.get("hook_name")


def _site_of_config(config: Mapping[str, Any], path: Path) -> Site:
    named = _hook_name(config)
    at = site_of_hook(named) if named else None
    if at is None:
        raise UnknownSite(f"{path} does not say on which site it was trained (hook_name {named!r}): put it into a folder named after the site")
    return at[0]


# --- Names of hooks --------------------------------------------------------------------------------------------------

_HOOK = re.compile(r"blocks\.(\d+)\.(hook_resid_pre|hook_resid_post|hook_attn_out|hook_mlp_out|attn\.hook_z|hook_z)(?![a-z])")


def site_of_hook(name: str) -> tuple[Site, Basis] | None:
    """The site and basis behind TransformerLens's name of a hook (or an id that begins with one); None for other places.

    `hook_resid_pre` of layer l is the residual stream after layer l − 1, of layer 0 the embedding.
    """
    if name == "hook_embed":
        return EMBED, Basis.RESIDUAL
    match = _HOOK.match(name)
    if match is None:
        return None
    layer, hook = int(match[1]), match[2]
    if hook == "hook_resid_pre":
        return (Site(SiteKind.RESID, layer - 1) if layer else EMBED), Basis.RESIDUAL
    kind, basis = {
        "hook_resid_post": (SiteKind.RESID, Basis.RESIDUAL),
        "hook_attn_out": (SiteKind.ATTN, Basis.RESIDUAL),
        "hook_mlp_out": (SiteKind.MLP, Basis.RESIDUAL),
        "attn.hook_z": (SiteKind.ATTN, Basis.HEADS),
        "hook_z": (SiteKind.ATTN, Basis.HEADS),
    }[hook]
    return Site(kind, layer), basis


# --- Releases --------------------------------------------------------------------------------------------------------


def list_releases(containing: str = "") -> tuple[Release, ...]:
    """The releases in sae_lens's directory whose name or model contains a text; nothing is downloaded."""
    return tuple(r for r in _directory().values() if containing in r.name or containing in r.model)


def _directory() -> dict[str, Release]:
    # sae_lens takes seconds to import, and only releases need it.
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return {name: Release(name, entry.model, entry.repo_id, tuple(entry.saes_map)) for name, entry in get_pretrained_saes_directory().items()}


def release_sites(release: str) -> dict[Site, str]:
    """Site → id of the dictionary of a release, the first in its order where it has several; ids of other places are left out.

    Where the ids do not say their site, sae_lens's configuration does: for Gemma Scope that needs no download.
    """
    found: dict[Site, str] = {}
    for sae_id in _release(release).ids:
        at = _site_of_id(release, sae_id)
        if at is not None:
            found.setdefault(at[0], sae_id)
    if not found:
        raise UnsupportedDictionary(f"release {release} has no dictionary of a site that featlas knows")
    return found


def _release(name: str) -> Release:
    directory = _directory()
    if name not in directory:
        near = [r for r in directory if name and (name in r or r in name)][:3]
        hint = f"did you mean {', '.join(near)}?" if near else "`featlas dictionaries list` shows the releases"
        raise UnknownDictionaries(f"no dictionaries {name!r}: no such folder, and no such release; {hint}")
    return directory[name]


def _site_of_id(release: str, sae_id: str) -> tuple[Site, Basis] | None:
    at = site_of_hook(sae_id)
    if at is not None or sae_id.startswith("blocks."):
        return at
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    config = _fetched(release, sae_id, lambda: load_sae_config_from_huggingface(release, sae_id))
    name = _hook_name(config)
    return site_of_hook(name) if name else None


def _fetched(release: str, sae_id: str, fetch: Callable[[], Any]) -> Any:
    """Run a call of sae_lens that may download, and say in one line what went wrong."""
    try:
        return fetch()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ReleaseUnreachable(
            f"{release}:{sae_id} could not be fetched: {reason}; check the connection, or download it and name the folder"
        ) from error


def _release_readers(spec: str) -> dict[Site, Callable[[], Dictionary]]:
    readers: dict[Site, Callable[[], Dictionary]] = {}
    for part in spec.split(","):
        name, _, sae_id = part.strip().partition(":")
        for site, chosen in (_named(name, sae_id) if sae_id else release_sites(name)).items():
            if site in readers:
                raise UserError(f"{spec} names two dictionaries for {site.name}: keep one of them")
            readers[site] = _release_reader(name, chosen)
    return readers


def _named(release: str, sae_id: str) -> dict[Site, str]:
    """The one site of a dictionary that is named by its id."""
    ids = _release(release).ids
    if sae_id not in ids:
        near = [i for i in ids if sae_id in i or i in sae_id] or list(ids)
        raise UnknownDictionaries(f"release {release} has no {sae_id!r}: it has {', '.join(near[:4])}{', …' if len(near) > 4 else ''}")
    at = _site_of_id(release, sae_id)
    if at is None:
        raise UnsupportedDictionary(f"{release}:{sae_id} is of no site that featlas knows: embed, attn_L, mlp_L and resid_L are")
    return {at[0]: sae_id}


def _release_reader(release: str, sae_id: str) -> Callable[[], Dictionary]:
    def read() -> Dictionary:
        from sae_lens import SAE

        with warnings.catch_warnings():
            # It warns that another library should load the model; what that changes (the centring) is done in `build`.
            warnings.simplefilter("ignore", UserWarning)
            sae = _fetched(release, sae_id, lambda: SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32"))
        return build(sae.cfg.to_dict(), sae.state_dict(), id=f"{release}:{sae_id}")

    return read


# --- Configuration and weights → dictionary --------------------------------------------------------------------------


def build(config: Mapping[str, Any], weights: Mapping[str, Tensor], *, id: str) -> Dictionary:
    """A dictionary of a configuration and weights as sae_lens saves them, in float32 (float64 stays).

    Architectures `linear` and `per_head_linear` are featlas's own, with tensors W_enc, W_dec and, optionally, b_enc and
    b_dec; those of `per_head_linear` have the head as first dimension. Raises `UnsupportedDictionary`.
    """
    architecture = config.get("architecture", "standard")
    tensors = {name: _at_least_float32(tensor.detach()) for name, tensor in weights.items()}
    if architecture in _LINEAR:
        return _LINEAR[architecture](config, tensors, id)
    if architecture not in _SPARSE:
        reason = REFUSED.get(architecture, "its arithmetic is not known")
        raise UnsupportedDictionary(f"dictionary {id} is of kind {architecture!r}, which is not supported: {reason}")
    _check_config(config, id)
    tensors = _fold_decoder_norm(config, tensors)
    metadata = config.get("metadata") or {}
    writes = metadata.get("model_from_pretrained_kwargs") or {}
    basis = _basis(config)
    common: dict[str, Any] = {
        "id": id,
        "basis": basis,
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
        "W_enc": tensors["W_enc"],
        "prepend_bos": None if metadata.get("prepend_bos") is None else bool(metadata["prepend_bos"]),
        "input": InputTransform(
            # A model with centred writing weights has residual streams of mean 0; the Hugging Face model has not.
            centred=bool(writes.get("center_writing_weights")) and basis is Basis.RESIDUAL,
            normalisation=Normalisation(_NORMALISATION.get(config.get("normalize_activations") or "none", "none")),
            subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        ),
    }
    return _SPARSE[architecture](config, tensors, common)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


# The average norm was folded into the weights by whoever finished the training; what is left does nothing, as in sae_lens.
_NORMALISATION = {"none": "none", "expected_average_only_in": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm_rescale"}


def _check_config(config: Mapping[str, Any], id: str) -> None:
    normalisation = config.get("normalize_activations") or "none"
    if normalisation not in _NORMALISATION:
        raise UnsupportedDictionary(
            f"dictionary {id} has normalize_activations {normalisation!r}, whose statistics are not in its files: fold them into its weights first"
        )
    if (config.get("metadata") or {}).get("hook_head_index") is not None:
        raise UnsupportedDictionary(f"dictionary {id} reads a single attention head, which is not supported: use one of all heads (hook_z)")


def _basis(config: Mapping[str, Any]) -> Basis:
    at = site_of_hook(_hook_name(config) or "")
    if config.get("reshape_activations") == "hook_z" or (_hook_name(config) or "").endswith("hook_z"):
        return Basis.HEADS
    return at[1] if at else Basis.RESIDUAL


def _fold_decoder_norm(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the decoder rows' norms into the encoder, where the configuration says that activations count by them."""
    if not config.get("rescale_acts_by_decoder_norm"):
        return tensors
    norm = tensors["W_dec"].norm(dim=-1).clamp(min=1e-8)  # (d_sae,)
    folded = {"W_enc": tensors["W_enc"] * norm, "b_enc": tensors["b_enc"] * norm, "W_dec": tensors["W_dec"] / norm[:, None]}
    return {**tensors, **folded}


def _standard(config: Mapping[str, Any], tensors: dict[str, Tensor], common: dict[str, Any]) -> Dictionary:
    return ReLUDictionary(**common, b_enc=tensors["b_enc"])


def _gated(config: Mapping[str, Any], tensors: dict[str, Tensor], common: dict[str, Any]) -> Dictionary:
    return GatedDictionary(**common, b_gate=tensors["b_gate"], b_mag=tensors["b_mag"], r_mag=tensors["r_mag"])


def _topk(config: Mapping[str, Any], tensors: dict[str, Tensor], common: dict[str, Any]) -> Dictionary:
    return TopKDictionary(**common, b_enc=tensors["b_enc"], k=int(config["k"]))


def _jumprelu(config: Mapping[str, Any], tensors: dict[str, Tensor], common: dict[str, Any]) -> Dictionary:
    threshold = tensors["log_threshold"].exp() if "log_threshold" in tensors else tensors["threshold"]
    return JumpReLUDictionary(**common, b_enc=tensors["b_enc"], threshold=threshold)


def _batchtopk(config: Mapping[str, Any], tensors: dict[str, Tensor], common: dict[str, Any]) -> Dictionary:
    """As saved in training: the threshold that stands for the batch's k, the same for all features."""
    b_enc = tensors["b_enc"]
    threshold = tensors["topk_threshold"].to(b_enc).reshape(1).repeat(len(b_enc))
    return JumpReLUDictionary(**common, b_enc=b_enc, threshold=threshold)


def _linear(config: Mapping[str, Any], tensors: dict[str, Tensor], id: str) -> Dictionary:
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    b_enc, b_dec = tensors.get("b_enc"), tensors.get("b_dec")
    return LinearDictionary(
        id=id,
        basis=_basis(config),
        W_dec=W_dec,
        b_dec=W_dec.new_zeros(W_dec.shape[1]) if b_dec is None else b_dec,
        W_enc=W_enc,
        b_enc=W_enc.new_zeros(W_enc.shape[1]) if b_enc is None else b_enc,
    )


def _per_head(config: Mapping[str, Any], tensors: dict[str, Tensor], id: str) -> Dictionary:
    return per_head_linear(id, tensors["W_enc"], tensors["W_dec"], b_enc=tensors.get("b_enc"), b_dec=tensors.get("b_dec"))


_SPARSE: dict[str, Callable[[Mapping[str, Any], dict[str, Tensor], dict[str, Any]], Dictionary]] = {
    "standard": _standard,
    "gated": _gated,
    "topk": _topk,
    "jumprelu": _jumprelu,
    "batchtopk": _batchtopk,
    "matryoshka_batchtopk": _batchtopk,
}
_LINEAR: dict[str, Callable[[Mapping[str, Any], dict[str, Tensor], str], Dictionary]] = {"linear": _linear, "per_head_linear": _per_head}
