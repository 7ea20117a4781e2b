"""What can be said of an option's value at once, before a library is loaded that takes seconds: names, places and numbers.

Each check takes a parsed value and gives it back, or raises a `UserError` that names it and the way out. None of them is the last word: what needs
the model (which layers it has, what its tokenizer makes of a text) is checked when it is there.
"""

import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import typer

from .errors import FeatlasError, UserError

TASK_NAMES = ("agreement", "agreement_rc", "ioi", "pronoun", "greater_than", "boolean", "profession_gender")
"""The tasks of `model.tasks`, which takes seconds to import."""

DTYPE_NAMES = ("float32", "float64", "bfloat16", "float16")
"""The floating-point types of `model.loading`."""

NAMED_DICTIONARIES = ("demo", "identity", "identity-heads")
"""What --dictionaries takes beside folders and releases."""

CONNECT_SECONDS = 5.0
BOLT_PORT = 7687
_KIND = r"(?:cpu|mps|disk|cuda(?::\d+)?)"
_DEVICE = re.compile(rf"cpu|mps|cuda(:\d+)?|auto|balanced|{_KIND}\+(cpu|disk)|{_KIND}=\d+(-\d+)?(,\s*{_KIND}=\d+(-\d+)?)*|.+\.json")
_PLACE = re.compile(r"^(\.{0,2}/|~|\.{1,2}$)")  # a text that can only be a path


class BadOption(UserError):
    """An option's value cannot be what it must be."""


class NoAnswer(FeatlasError):
    """Nothing listens where a server was named."""


def _of(context: typer.Context, value: object) -> bool:
    """Whether a value is to be looked at: not where a shell only asks what could stand there."""
    return value is not None and not context.resilient_parsing


def device(context: typer.Context, value: str | None) -> str | None:
    """A device, or where each layer goes, by its form."""
    if _of(context, value) and not _DEVICE.fullmatch(str(value)):
        raise BadOption(
            f"--device {value!r} is no device: give cpu, cuda, cuda:0 (or another number), mps, auto, layers as cuda:0=0-15,cuda:1=16-31, "
            "cuda:0+cpu, or a device map's .json"
        )
    return value


def dtype(context: typer.Context, value: str | None) -> str | None:
    """A floating-point type by its name, or that of the model / that of the dictionaries."""
    if _of(context, value) and any(name not in DTYPE_NAMES for name in str(value).split("/", 1)):
        raise BadOption(f"unknown dtype {value!r}: choose one of {', '.join(DTYPE_NAMES)}")
    return value


def task(context: typer.Context, value: str | None) -> str | None:
    """A task, a mixture, or files of pairs that are there."""
    if not _of(context, value) or Path(str(value)).is_file():
        return value
    for part in (part.strip() for part in str(value).split("+")):
        if part in TASK_NAMES or Path(part).is_file():
            continue
        if part.endswith(".jsonl"):
            raise BadOption(f"there is no file {part}: --task takes a task's name, a mixture as in 'agreement+ioi', or a .jsonl file of pairs")
        raise BadOption(f"there is no task {part!r}: choose from {', '.join(TASK_NAMES)}, a mixture as in 'agreement+ioi', or a .jsonl file of pairs")
    return value


def sites(context: typer.Context, value: str | None) -> str | None:
    """Sites by the form of their names."""
    if _of(context, value):
        from .model.sites import parse_site

        for name in str(value).split(","):
            if name.strip():
                parse_site(name.strip())
    return value


def model(context: typer.Context, value: str | None) -> str | None:
    """A model's folder or file that is there; other names are the hub's to know."""
    if not _of(context, value):
        return value
    path = Path(str(value)).expanduser()
    if path.suffix == ".gguf" and not path.is_file():
        raise BadOption(f"no such model file: {value}")
    if not path.exists() and (_PLACE.match(str(value)) or str(value).count("/") > 1):
        raise BadOption(f"no such model folder: {value}")
    return value


def dictionaries(context: typer.Context, value: str | None) -> str | None:
    """A folder that is there, or the names of releases that sae_lens lists."""
    if not _of(context, value) or value in NAMED_DICTIONARIES or Path(str(value)).is_dir():
        return value
    if _PLACE.match(str(value)):
        raise BadOption(f"no dictionaries {value!r}: there is no such folder")
    known = releases()
    for name in (part.strip().partition(":")[0] for part in str(value).split(",")):
        if known and name not in known:
            near = [release for release in known if name and (name in release or release in name)][:3]
            hint = f"did you mean {', '.join(near)}?" if near else "`featlas dictionaries list` shows the releases"
            raise BadOption(f"no dictionaries {value!r}: no such folder, and no such release; {hint}")
    return value


def corpus(context: typer.Context, value: str | None) -> str | None:
    """Text that is there; other names are the hub's to know."""
    if _of(context, value) and not Path(str(value)).exists() and (_PLACE.match(str(value)) or Path(str(value)).suffix in (".txt", ".md", ".jsonl")):
        raise BadOption(f"there is no corpus {value!r}: no such file or folder")
    return value


def graph(context: typer.Context, value: str | None) -> str | None:
    """A server that listens. Raises `NoAnswer`; what its address must look like is said when it is opened."""
    if not _of(context, value):
        return value
    try:
        address = urlsplit(str(value))
        host, port = address.hostname, address.port or BOLT_PORT
    except ValueError:
        return value
    if address.scheme.partition("+")[0] not in ("bolt", "neo4j") or not host or "@" in address.netloc:
        return value
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise NoAnswer(f"no Neo4j answers at {value} ({error.strerror or error}): start one with `featlas neo4j up`, or check the address") from None
    return value


def at_least_one(context: typer.Context, param: typer.CallbackParam, value: int | None) -> int | None:
    """A number of things, of which there must be one."""
    if _of(context, value) and value is not None and value < 1:
        raise BadOption(f"{max(param.opts, key=len)} {value} is too small: give at least 1")
    return value


def releases() -> tuple[str, ...]:
    """The names of sae_lens' releases, read from its list without importing it; none where it cannot be found."""
    from importlib.util import find_spec

    spec = find_spec("sae_lens")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "pretrained_saes.yaml"
        if path.is_file():
            return tuple(re.findall(r"^([^\s#:][^\s:]*):\s*$", path.read_text(encoding="utf-8"), re.MULTILINE))
    return ()
