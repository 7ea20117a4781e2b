"""What stands around every command: its settings are gathered, it is run, and whatever ends it becomes one line and an exit code.

1. `tree` is the commands as the command line knows them, each with --quiet.
2. `configuration.load` gives options their defaults from files.
3. The command runs while `interruption` listens.
4. A mistake of the user's is one line on standard error and exit code 2, a failure one line and 1, an interrupt one line and 130 (143 where the
   process was terminated). With --json the line is an object: error, kind, exit_code. Anything else is a bug and keeps its traceback.
"""

import copy
import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from . import configuration, console, files, interruption
from .errors import FeatlasError, UserError

_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
"""What makes a path none, wherever it is first looked at."""

COMPLETE = "_FEATLAS_COMPLETE"
"""The variable by which a shell asks for completions."""


def tree(app: typer.Typer) -> Any:
    """The commands of an app; --quiet may stand behind any of them."""
    root: Any = get_command(app)
    quiet = next((param for param in root.params if param.name == "quiet"), None)
    if quiet is not None:
        anywhere = copy.copy(quiet)
        anywhere.expose_value, anywhere.envvar = False, None
        anywhere.callback = lambda context, param, value: console.be_quiet(True) if value else None
        for _, command in configuration.leaves(root):
            if all(param.name != "quiet" for param in command.params):
                command.params.append(anywhere)
    return root


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run a command line to its end; the exit code."""
    with interruption.listening() as signals:
        code = _run(app, arguments, signals)
        for stream in (sys.stdout, sys.stderr):  # what comes now may end the process at once
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.flush()
        return code


def _run(app: typer.Typer, arguments: Sequence[str], signals: interruption.Signals) -> int:
    words: tuple[str, ...] = ()
    try:
        _check_texts(arguments)
        root = tree(app)
        words = configuration.command_of(root, arguments)
        return _invoked(root, words, arguments)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if signals.received is not None or isinstance(error, KeyboardInterrupt | typer.Abort):
            return _interrupted(error, words, arguments, signals.received)
        code = _failed(error, arguments)
        if code is None:
            raise
        return code


class NoText(UserError):
    """What was given on the command line is no text."""


def _check_texts(arguments: Sequence[str]) -> None:
    """Raise `NoText` for bytes that are no UTF-8: no database, no JSON and no page could hold them."""
    for word in arguments:
        if not word.isascii() and any("\ud800" <= character <= "\udfff" for character in word):
            raise NoText(f"{word!r:.200} holds bytes that are no UTF-8 text: rename the file, or set the terminal to UTF-8")


def _invoked(root: Any, words: Sequence[str], arguments: Sequence[str]) -> int:
    """Run the command with its defaults from files. A shell that asks for completions gets them, and the process ends."""
    if COMPLETE in os.environ:
        root.main(prog_name="featlas", default_map=configuration.for_completion(root, arguments))
    # The commands about files of settings say themselves what is wrong with one.
    defaults = {} if words[:1] == ("config",) else configuration.load(root, arguments).default_map
    with root.make_context("featlas", list(arguments), default_map=defaults) as context:
        code = root.invoke(context)
    return code if isinstance(code, int) else 0


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for JSON, even one that cannot be read."""
    return "--json" in arguments


def _failed(error: BaseException, arguments: Sequence[str]) -> int | None:
    """One line and an exit code for an error that was raised on purpose; None for any other."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, FeatlasError):
        return _say(str(error), type(error).__name__, error.exit_code, arguments)
    if files.is_full(error):
        named = getattr(error, "filename", None)
        return _failed(files.DiskFull(Path(named) if isinstance(named, str) else None), arguments)
    if isinstance(error, typer.TyperException):
        return _say(error.format_message(), "BadCommandLine", 2, arguments)
    if isinstance(error, BrokenPipeError):
        # the reader went away (`featlas … | head`): nothing to say, and nothing more to flush
        sys.stdout = None
        return 0
    if isinstance(error, OSError) and error.errno in _NO_PATH:
        return _say(f"{str(error.filename)[:200]}: {error.strerror}: name another path", "NoSuchPath", 2, arguments)
    return None


def _interrupted(error: BaseException, words: Sequence[str], arguments: Sequence[str], received: signal.Signals | None) -> int:
    reached = error.reached if isinstance(error, interruption.Interrupted) else None
    counts = {} if reached is None else {"stage": reached.label, "done": reached.done, "total": reached.total}
    message = interruption.explained(words, reached, arguments)
    return _say(message, "Interrupted", 128 + (received or signal.SIGINT), arguments, **counts)


def _say(message: str, kind: str, code: int, arguments: Sequence[str], **more: object) -> int:
    if wants_json(arguments):
        message = json.dumps({"error": message, "kind": kind, "exit_code": code, **more}, ensure_ascii=False)
        sys.stderr.write(f"{_harmless(message, json.dumps)}\n")
    elif message.startswith("Usage: "):  # a group without a command: the help says enough
        sys.stderr.write(f"{message}\n")
    else:
        if len(message) > _LONGEST:
            message = f"{message[:_LONGEST]}… ({len(message) - _LONGEST:,} characters more)"
        lines = [message] if code == 2 else message.split("\n")  # a failure may quote another program's log
        sys.stderr.write("featlas: " + "\n    ".join(_harmless(line.rstrip(), repr) for line in lines) + "\n")
    return code


_LONGEST = 8_000  # characters of a message: what a file or a database says may be of any length

# What moves a terminal's cursor, ends a line, or turns the direction of what follows: names of files and labels may hold it.
_ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _harmless(text: str, spelled: Callable[[str], str]) -> str:
    """The text with every character that acts on a terminal spelled out, so that a message is one line that says what it says."""
    return _ACTING.sub(lambda match: spelled(match[0])[1:-1], text)
