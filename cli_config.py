"""Commands about files of settings: which count, what they come to, and a first one to fill in."""

import os
from typing import Annotated, Any

import typer

from . import configuration, console, files
from .errors import UserError
from .options import DEFAULT_ATLAS, Atlas, BadParameterValue, Json, config_app


class FileExists(UserError):
    """A file would be written over."""


IN_TEMPLATE = ("atlas", "graph", "model", "dictionaries", "sites", "device", "dtype", "memory", "batch-size", "seed")
"""Options that a new file shows, commented out: those that many commands have."""


def _tree() -> tuple[Any, list[str]]:
    """All commands, and the words of this call that name an atlas' file."""
    import sys

    from .options import app
    from .running import tree

    return tree(app), sys.argv[1:]


@config_app.command("path")
def config_path_command(atlas: Atlas = DEFAULT_ATLAS, as_json: Json = False) -> None:
    """The files that settings are read from, the nearest first, and which of them there are."""
    _, arguments = _tree()
    files = configuration.sources(arguments, os.environ, configuration.working_folder())
    if as_json:
        console.say_json([{"kind": source.kind, "path": str(source.path), "exists": source.exists} for source in files])
    elif files:
        console.table(("for", "file", ""), [(source.kind, str(source.path), "read" if source.exists else "not there") for source in files])
    else:
        console.say(f"none: {configuration.VARIABLE} is set to nothing")


@config_app.command("show")
def config_show_command(
    command: Annotated[list[str] | None, typer.Argument(help="The words of a command, as: ingest edges. All its options are shown then.")] = None,
    atlas: Atlas = DEFAULT_ATLAS,
    as_json: Json = False,
) -> None:
    """What the files of settings say; with a command: what each of its options is, and where that comes from."""
    root, arguments = _tree()
    found = configuration.load(root, arguments)
    rows = _settings_of(root, found, tuple(command)) if command else [(_section(s), s.option, s.value, str(s.source.path)) for s in found.settings]
    if as_json:
        console.say_json([dict(zip(("section", "option", "value", "from"), row)) for row in rows])
    elif rows:
        console.table(("section", "option", "value", "from"), rows)
    else:
        console.say("no file sets anything: `featlas config path` lists the files, `featlas config init` writes one")


def _section(setting: configuration.Setting) -> str:
    if setting.section == configuration.ROOT:
        return ""
    return f"[{'.'.join(setting.section) or configuration.DEFAULTS}]"


def _settings_of(root: Any, found: configuration.Configuration, words: tuple[str, ...]) -> list[tuple[str, str, Any, str]]:
    """Each option of a command with its value and where that comes from: the environment, a file, or featlas itself."""
    commands = dict(configuration.leaves(root))
    if words not in commands:
        raise BadParameterValue(f"there is no command {' '.join(words)!r}: write its words, as in `featlas config show ingest edges`")
    rows: list[tuple[str, str, Any, str]] = []
    for option, param in configuration.options_of(commands[words]).items():
        setting = found.of(words, option)
        variable = param.envvar if isinstance(param.envvar, str) else None
        if variable and os.environ.get(variable):
            rows.append(("", option, _without_login(os.environ[variable]), variable))
        elif setting is not None:
            rows.append((_section(setting), option, setting.value, str(setting.source.path)))
        else:
            rows.append(("", option, param.default if isinstance(param.default, bool | int | float | None) else str(param.default), "built in"))
    return rows


def _without_login(text: str) -> str:
    """An address without the name and password that it may hold."""
    scheme, there, rest = text.partition("://")
    return f"{scheme}://…@{rest.rpartition('@')[2]}" if there and "@" in rest else text


@config_app.command("init")
def config_init_command(
    user: Annotated[bool, typer.Option("--user", help="The user's file, for all projects, instead of featlas.toml here.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a file of settings in which everything is commented out: what options there are and what they are without it."""
    root, _ = _tree()
    path = configuration.user_file(os.environ) if user else configuration.working_folder() / configuration.FILE_NAME
    if path.exists() and not force:
        raise FileExists(f"{path} is there already: edit it, or write over it with --force")
    with console.saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, template(root))
    if as_json:
        console.say_json({"path": str(path)})
    else:
        console.say(f"wrote {path}: take the # away from what you want to set")


def template(root: Any) -> str:
    """The text of a new file: valid TOML that sets nothing."""
    commands = dict(configuration.leaves(root))
    known = configuration.options_of(commands["ingest", "edges"])
    lines = [
        "# Settings of featlas; `featlas config show` says what they come to, `featlas config path` which files count.",
        "# An option on the command line counts before its variable in the environment, that before this file.",
        "",
        "# quiet = true  # no progress bars and no notes",
        "",
        f"[{configuration.DEFAULTS}]  # for every command that has the option",
    ]
    lines += [f"# {option} = {_toml(known[option].default)}  # {known[option].help}" for option in IN_TEMPLATE]
    lines += ["", "[ingest.edges]  # for one command; [ingest] is for all commands of the group", "# steps = 10", "# threshold = 0.0", ""]
    return "\n".join(lines)


def _toml(value: object) -> str:
    if value is None or value == "":
        return '"…"'
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else f'"{value}"'
