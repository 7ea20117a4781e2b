"""Settings from files: `featlas.toml` gives options of commands their defaults.

1. `sources` are the files that count, the nearest first: the one that FEATLAS_CONFIG names (then none but the user's besides), the atlas' own
   `featlas.toml`, that of the working folder or the nearest folder above it, and the user's `config.toml`.
2. A file has `quiet`, a table `[defaults]` of options for every command that has them, `[ingest]` for the commands of a group, and `[query]` or
   `[ingest.edges]` for one command. Options are written as on the command line, without the dashes.
3. Every name and value is checked when the file is read: an unknown one is refused, with the nearest that is known. Passwords are refused.
4. `default_map` is what the command line takes as defaults. An option on the command line counts before its variable in the environment, that
   before any file, a nearer file before a farther one, and inside a file the narrower table before the wider.

A relative path stands as seen from its file. An atlas may come from somebody else: its own file sets a few options only (`ATLAS_OPTIONS`), no
files to write and no programs to run.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from .errors import UserError

FILE_NAME = "featlas.toml"
VARIABLE = "FEATLAS_CONFIG"
DEFAULTS = "defaults"
EVERYWHERE: tuple[str, ...] = ()  # the section [defaults]
ROOT = ("",)  # what stands above all tables: options of featlas itself

ATLAS_OPTIONS = frozenset({
    "model", "dictionaries", "sites", "task", "limit", "seed", "metric", "baseline", "bos", "steps", "threshold", "edges", "by", "run",
    "statistics-run", "length", "basis", "dtype", "batch-size", "memory",
})  # fmt: skip
"""What the file in an atlas may set."""

NOT_IN_FILES = frozenset({"help", "version", "json", "install-completion", "show-completion"})
_SECRET = re.compile(r"pass(word|wd|phrase)?$|password|secret|token$|credential|api[-_]?key", re.IGNORECASE)
_LOGIN = re.compile(r"://[^/\s]*@")


class FolderGone(UserError):
    """The folder that the command was given in is not there any more."""


class BadConfiguration(UserError):
    """A file of settings cannot be read, or holds what it must not."""


@dataclass(frozen=True)
class Source:
    """A file that settings may come from. kind: FEATLAS_CONFIG, atlas, project or user."""

    path: Path
    kind: str

    @property
    def exists(self) -> bool:
        return self.path.is_file()


@dataclass(frozen=True)
class Setting:
    """One line of a file. section: the command's words, a group's, `EVERYWHERE` or `ROOT`; value: as the command line takes it."""

    section: tuple[str, ...]
    option: str
    value: Any
    source: Source


@dataclass(frozen=True)
class Configuration:
    """All settings, those of the nearest file first, and what they come to."""

    sources: tuple[Source, ...] = ()
    settings: tuple[Setting, ...] = ()
    default_map: dict[str, Any] = field(default_factory=dict)

    def of(self, command: Sequence[str], option: str) -> Setting | None:
        """What a command's option is set to: in the nearest file, and there in the narrowest table."""
        fitting = [s for s in self.settings if s.option == option and (s.section == tuple(command[: len(s.section)]) or s.section == ROOT == command)]
        return max(fitting, key=lambda s: (-self.sources.index(s.source), len(s.section)), default=None)


# --- the commands ----------------------------------------------------------------------------------------------------


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that it is called by."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, own in command.commands.items():
        yield from leaves(own, (*path, name))


def options_of(command: Any) -> dict[str, Any]:
    """Option (its first long name, without dashes) → parameter, of one command."""
    found = {}
    for param in command.params:
        if param.param_type_name == "option" and param.expose_value:
            name = next((opt for opt in param.opts if opt.startswith("--")), param.opts[0]).lstrip("-")
            if name not in NOT_IN_FILES:
                found[name] = param
    return found


def command_of(root: Any, arguments: Sequence[str]) -> tuple[str, ...]:
    """The words of the command in a command line; options of the root have no values."""
    at, words = root, []
    for word in arguments:
        if word.startswith("-"):
            continue
        own = getattr(at, "commands", {})
        if word not in own:
            break
        words.append(word)
        at = own[word]
    return tuple(words)


# --- 1. the files ----------------------------------------------------------------------------------------------------


def user_file(environment: Mapping[str, str]) -> Path:
    """`$XDG_CONFIG_HOME/featlas/config.toml`, or `~/.config/featlas/config.toml`."""
    base = environment.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "featlas" / "config.toml"


def project_file(folder: Path) -> Path:
    """The `featlas.toml` of a folder or the nearest one above it; where there is none, the folder's own."""
    return next((parent / FILE_NAME for parent in (folder, *folder.parents) if (parent / FILE_NAME).is_file()), folder / FILE_NAME)


def atlas_of(arguments: Sequence[str], environment: Mapping[str, str], files: Sequence[Mapping[str, Any]] = ()) -> Path:
    """The atlas that a command line means, before it is read: --atlas, FEATLAS_ATLAS, `[defaults] atlas` of the files, or `atlas`."""
    for i, word in enumerate(arguments):
        if word == "--atlas" and i + 1 < len(arguments):
            return Path(arguments[i + 1])
        if word.startswith("--atlas="):
            return Path(word.removeprefix("--atlas="))
    named = environment.get("FEATLAS_ATLAS") or next((table["atlas"] for table in files if isinstance(table.get("atlas"), str)), None)
    return Path(named or "atlas")


def sources(arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> tuple[Source, ...]:
    """The files that count, whether they are there or not, the nearest first. An empty FEATLAS_CONFIG means none at all."""
    user = Source(user_file(environment), "user")
    if (named := environment.get(VARIABLE)) is not None:
        return (Source(folder / Path(named).expanduser(), VARIABLE), user) if named else ()
    project = Source(project_file(folder), "project")
    wider = [dict(_atlas_table(source)) for source in (project, user)]
    atlas = Source(folder / atlas_of(arguments, environment, wider).expanduser() / FILE_NAME, "atlas")
    found = (atlas, project, user)
    # An atlas that one stands in is the project too: its file is somebody's own then.
    return tuple(source for source in found if not (source.kind == "atlas" and source.path.resolve() == project.path.resolve()))


def _atlas_table(source: Source) -> Mapping[str, Any]:
    """`[defaults]` of a file with its atlas as seen from the file; what is wrong with the file is said when it is read for good."""
    try:
        table = tomllib.loads(source.path.read_text(encoding="utf-8")).get(DEFAULTS, {})
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(table, dict) or not isinstance(table.get("atlas"), str):
        return {}
    return {"atlas": str(source.path.parent / Path(table["atlas"]).expanduser())}


# --- 2. and 3. what stands in them -----------------------------------------------------------------------------------


def load(
    root: Any, arguments: Sequence[str] = (), *, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Configuration:
    """Read and check every file that counts. Raises `BadConfiguration`."""
    environment = os.environ if environment is None else environment
    files = sources(arguments, environment, working_folder() if folder is None else folder)
    settings: list[Setting] = []
    for source in files:
        if source.exists:
            settings += _read(root, source)
        elif source.kind == VARIABLE:
            raise BadConfiguration(f"{VARIABLE} names {source.path}, which is no file: `featlas config init` writes one")
    found = Configuration(files, tuple(settings))
    return Configuration(files, tuple(settings), _default_map(root, found))


def for_completion(root: Any, arguments: Sequence[str]) -> dict[str, Any]:
    """The defaults for a shell's completions; a broken file is no reason to have none."""
    try:
        return load(root, arguments).default_map
    except UserError:
        return {}


def working_folder() -> Path:
    """The folder that a command is given in. Raises `FolderGone`."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise FolderGone("the folder that you are in was removed, or made anew: go to one that is there, for example by cd") from None


def _read(root: Any, source: Source) -> list[Setting]:
    try:
        document = tomllib.loads(source.path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfiguration(f"{source.path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise BadConfiguration(f"{source.path} is no TOML: {error}") from None
    except RecursionError:  # a few hundred brackets in each other
        raise BadConfiguration(f"{source.path} is no TOML that can be read: its lists are nested too deep") from None
    commands = dict(leaves(root))
    of_root = options_of(root)
    found: list[Setting] = []
    for name, value in document.items():
        if name == DEFAULTS and isinstance(value, dict):
            found += _section(EVERYWHERE, value, commands, source)
        elif isinstance(value, dict) and name in root.commands:
            found += _table((name,), value, root.commands[name], commands, source)
        elif not isinstance(value, dict) and (option := name.replace("_", "-")) in of_root:
            found.append(Setting(ROOT, option, _checked(of_root[option], value, option, source, ""), source))
        else:
            _no_secret(name, value, source, "")
            _unknown(name, [DEFAULTS, *root.commands, *of_root], source, "", hint=f"options stand in a table, [{DEFAULTS}] for all commands")
    return found


def _table(path: tuple[str, ...], table: Mapping[str, Any], command: Any, commands: Mapping[tuple[str, ...], Any], source: Source) -> list[Setting]:
    """A group's table, which may hold its commands' own, or a command's."""
    own = getattr(command, "commands", {})
    found: list[Setting] = []
    for name, value in table.items():
        if isinstance(value, dict):
            if name not in own:
                _unknown(name, list(own), source, f"[{'.'.join(path)}]")
            found += _section((*path, name), value, commands, source)
    return found + _section(path, {name: value for name, value in table.items() if not isinstance(value, dict)}, commands, source)


def _section(path: tuple[str, ...], table: Mapping[str, Any], commands: Mapping[tuple[str, ...], Any], source: Source) -> list[Setting]:
    """The options of a section: each must be one of a command that the section is about, and fit all that have it."""
    where = f"[{'.'.join(path) or DEFAULTS}]"
    known: dict[str, list[tuple[tuple[str, ...], Any]]] = {}
    for words, command in commands.items():
        if words[: len(path)] == path:
            for name, param in options_of(command).items():
                known.setdefault(name, []).append((words, param))
    found = []
    for name, value in table.items():
        option = name.replace("_", "-")
        _no_secret(name, value, source, where)
        if option in NOT_IN_FILES:
            raise BadConfiguration(f"{source.path}, {where}: {option!r} is for the command line alone: a script asks for it where it wants it")
        if option not in known:
            _unknown(name, list(known), source, where)
        if source.kind == "atlas" and option not in ATLAS_OPTIONS:
            raise BadConfiguration(f"{source.path}, {where}: an atlas' own file cannot set {option!r}: put it into your own featlas.toml")
        # One value for several commands must fit them all.
        checked = [_checked(param, value, option, source, f"{where} (for {' '.join(words)})") for words, param in known[option]]
        found.append(Setting(path, option, checked[0], source))
    return found


def _no_secret(name: str, value: object, source: Source, where: str) -> None:
    place = f"{source.path}{f', {where}' if where else ''}"
    if _SECRET.search(name):
        raise BadConfiguration(f"{place}: {name!r} does not belong into a file: give passwords by the environment, as NEO4J_PASSWORD")
    if isinstance(value, str) and _LOGIN.search(value):
        raise BadConfiguration(f"{place}: {name!r} holds a name or password in an address: give them as NEO4J_USERNAME and NEO4J_PASSWORD")


def _unknown(name: str, known: Sequence[str], source: Source, where: str, hint: str = "") -> None:
    near = difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.6)
    way_out = f"did you mean {near[0]!r}?" if near else hint or f"`featlas {' '.join(where.strip('[]').split('.'))} --help` lists the options"
    if near and hint:
        way_out += f" ({hint})"
    raise BadConfiguration(f"{source.path}{f', {where}' if where else ''}: there is no {name!r}: {way_out}")


def _checked(param: Any, value: Any, option: str, source: Source, where: str) -> Any:
    """A value as the command line takes it; raises `BadConfiguration` where it would not."""
    place = f"{source.path}{f', {where}' if where else ''}"
    if isinstance(value, bool) != bool(param.is_flag) or isinstance(value, dict):
        expected = "true or false" if param.is_flag else "a text or a number"
        raise BadConfiguration(f"{place}: {option} = {_shown(value)}: it takes {expected}")
    if isinstance(value, bool):
        return value
    several = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    several = [_from_file(part, param, source) for part in several]
    # The command line's own way of lists: the option repeated, or commas.
    given: Any = several if param.multiple else ",".join(several)
    try:
        param.process_value(typer.Context(TyperCommand(option)), given)
    except typer.TyperException as error:
        raise BadConfiguration(f"{place}: {option} = {_shown(value)}: {error.format_message()}") from None
    except UserError as error:
        raise BadConfiguration(f"{place}: {error}") from None
    return given


def _from_file(text: str, param: Any, source: Source) -> str:
    """A path as seen from the file: one of an option that takes paths, or a text that says it is one by ./, ../ or ~/."""
    is_path = param.type_descriptor.annotation is Path
    if text.startswith("~/"):
        return str(Path(text).expanduser())
    if text.startswith(("./", "../")) or (is_path and not Path(text).is_absolute()):
        return os.path.normpath(source.path.parent / text)
    return text


def _shown(value: object) -> str:
    text = repr(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


# --- 4. defaults -----------------------------------------------------------------------------------------------------


def _default_map(root: Any, found: Configuration) -> dict[str, Any]:
    """Defaults by group, command and parameter, as nested tables."""
    settings: dict[str, Any] = {}
    for option, param in options_of(root).items():
        if (one := found.of(ROOT, option)) is not None:
            settings[param.name] = one.value
    for words, command in leaves(root):
        own = {param.name: one.value for option, param in options_of(command).items() if (one := found.of(words, option)) is not None}
        if own:
            at = settings
            for word in words:
                at = at.setdefault(word, {})
            at.update(own)
    return settings
