"""The named queries: `NAME.cypher` files beside this module, each the answer to one question.

A file begins with comment lines. The first says what the query answers; each parameter has one of its own,

    // $limit: int = 20  how many rows

with its type (string, int, float, bool, or count: a whole number from 1 on that neither database takes as a parameter, such as
the bound of a path's length, and that is written into the text) and, where it may be left out, its default as JSON. One text serves
both databases; where their dialects cannot say it alike there is a text for each, `NAME.neo4j.cypher` and `NAME.ladybug.cypher`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from pathlib import Path

import polars as pl

from ..errors import UserError
from .schema import NODES
from .store import GraphStore

_FOLDER = Path(__file__).parent
_PARAMETER = re.compile(r"//\s*\$(?P<name>\w+):\s*(?P<kind>\w+)(?:\s*=\s*(?P<default>\"[^\"]*\"|\S+))?(?:\s+(?P<doc>.*))?")
_TRUTH = {"true": True, "false": False}


class UnknownQuery(UserError):
    """No named query of that name."""


class BadParameters(UserError):
    """A named query was given other parameters than it takes."""


class ParameterKind(StrEnum):
    """What a parameter's value must be."""

    STRING = "string"
    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    COUNT = "count"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a named query; `default` holds only where it is not `required`."""

    name: str
    kind: ParameterKind
    required: bool
    default: object
    doc: str

    def __str__(self) -> str:
        return f"{self.name}: {self.kind.value}" + ("" if self.required else f" = {json.dumps(self.default)}")

    def value(self, given: object) -> object:
        """`given` as this parameter's type; text, as a command line gives it, is read. Raises ValueError."""
        if self.kind is ParameterKind.STRING:
            return str(given)
        if self.kind is ParameterKind.BOOL:
            return given if isinstance(given, bool) else _TRUTH[str(given).lower()]
        if self.kind is ParameterKind.FLOAT:
            return float(str(given))
        number = int(str(given))
        if self.kind is ParameterKind.COUNT and number < 1:
            raise ValueError(number)
        return number


@dataclass(frozen=True)
class NamedQuery:
    """A question with its text for each dialect; the key "" is the text for any."""

    name: str
    doc: str
    parameters: tuple[Parameter, ...]
    texts: Mapping[str, str]

    @property
    def text(self) -> str:
        """The text that is shown to a reader."""
        return self.texts.get("") or "\n".join(f"// for {dialect}\n{text}" for dialect, text in sorted(self.texts.items()))

    def text_for(self, dialect: str) -> str:
        """The text for one dialect of Cypher."""
        return self.texts.get(dialect) or self.texts[""]

    def bind(self, given: Mapping[str, object]) -> dict[str, object]:
        """Every parameter with its value; raises `BadParameters`, which lists what the query takes."""
        takes = f"{self.name} takes {', '.join(map(str, self.parameters)) or 'no parameters'}"
        unknown = [name for name in given if name not in {parameter.name for parameter in self.parameters}]
        if unknown:
            raise BadParameters(f"unknown parameter {unknown[0]!r}: {takes}")
        values: dict[str, object] = {}
        for parameter in self.parameters:
            if parameter.name not in given and parameter.required:
                raise BadParameters(f"parameter {parameter.name!r} is missing ({parameter.doc or parameter.kind.value}): {takes}")
            try:
                values[parameter.name] = parameter.value(given[parameter.name]) if parameter.name in given else parameter.default
            except (ValueError, KeyError):
                raise BadParameters(f"{given[parameter.name]!r} is no {parameter.kind.value} for {parameter.name!r}: {takes}") from None
        return values


def list_queries() -> list[NamedQuery]:
    """Every named query, by name."""
    return [_queries()[name] for name in sorted(_queries())]


def load_query(name: str) -> NamedQuery:
    """The named query; raises `UnknownQuery` with the names that there are. A hyphen in the name is as good as an underscore."""
    query = _queries().get(name.replace("-", "_"))
    if query is None:
        close = get_close_matches(name, _queries(), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UnknownQuery(f"unknown query {name!r}{hint}: there are {', '.join(sorted(_queries()))}")
    return query


def run_query(store: GraphStore, name: str, given: Mapping[str, object] | None = None) -> pl.DataFrame:
    """Answer a named query with the parameters of `bound_query`. Raises `UnknownQuery` or `BadParameters`."""
    bound = bound_query(store, name, given)
    return store.query(bound.text, bound.values)


@dataclass(frozen=True, slots=True)
class BoundQuery:
    """A named query ready to be sent: its text in the store's dialect and the values of its parameters."""

    text: str
    values: Mapping[str, object]


def bound_query(store: GraphStore, name: str, given: Mapping[str, object] | None = None) -> BoundQuery:
    """A named query with its parameters. A `run` may be the beginning of a run's key; left out, it is the graph's only run, where it has just
    one. Likewise `parcellation`.

    Raises `UnknownQuery` or `BadParameters`.
    """
    query = load_query(name)
    given = dict(given or {})
    for name, known in _KEYS.items():
        if any(parameter.name == name for parameter in query.parameters):
            given[name] = _whole_key(store, name, known, given.get(name))
    values, text = query.bind(given), query.text_for(store.dialect)
    for parameter in query.parameters:
        if parameter.kind is ParameterKind.COUNT:
            text = re.sub(rf"\${parameter.name}\b", str(values.pop(parameter.name)), text)
    return BoundQuery(text, values)


def parameter_choices(store: GraphStore, at_most: int = 200) -> dict[str, list[str]]:
    """What the graph has for the parameters of named queries that pick one of a few things, by the parameter's name."""
    choices = {}
    for name, text in {**{name: known.text for name, known in _KEYS.items()}, **_CHOICES}.items():
        choices[name] = [str(key) for key in store.query(f"{text} LIMIT {at_most}")["key"]]
    return {**choices, "other_task": choices["task"]}


def _whole_key(store: GraphStore, name: str, known: "_Keys", given: object) -> str:
    """The one key that `given` begins, or the only one where nothing is given."""
    keys = [str(key) for key in store.query(known.text)["key"]]
    fitting = [key for key in keys if given is None or key == given] or [key for key in keys if key.startswith(str(given))]
    if len(fitting) == 1:
        return fitting[0]
    there = f"the graph has {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}" if keys else f"the graph has no {name} yet"
    said = f"parameter {name!r} is missing" if given is None else f"no {name} {given!r}" if not fitting else f"{name} {given!r} fits several"
    raise BadParameters(f"{said}, and {there}: see the query {known.query}")


@dataclass(frozen=True, slots=True)
class _Keys:
    """How to find which keys a parameter may have: `text` lists them, `query` is the named query that shows what they are of."""

    text: str
    query: str


_KEYS = {
    "run": _Keys("MATCH (r:Run) RETURN r.key AS key ORDER BY key", "runs"),
    "parcellation": _Keys("MATCH (p:Partition) WHERE p.parcellation IS NOT NULL RETURN DISTINCT p.parcellation AS key ORDER BY key", "partitions"),
}


def nodes_by_key(store: GraphStore, keys: Sequence[str]) -> list[tuple[str, dict[str, object]]]:
    """The nodes of these keys, of whichever label: (label, properties that they have)."""
    found: list[tuple[str, dict[str, object]]] = []
    if not keys:
        return found
    for label in NODES:
        # one label at a time: keys are indexed within a label
        answer = store.answer(f"MATCH (n:{label}) WHERE n.key IN $keys RETURN n AS n ORDER BY n.key", {"keys": list(keys)})
        found += [(label, node["properties"]) for node in answer.columns[0] if isinstance(node, dict)]
    return found


# What other parameters may be, for those who are to choose.
_CHOICES = {
    "circuit": "MATCH (c:Circuit) RETURN c.key AS key ORDER BY key",
    "task": "MATCH (s:Sequence) WHERE s.task IS NOT NULL RETURN DISTINCT s.task AS key ORDER BY key",
    "site": "MATCH (f:Feature) RETURN DISTINCT f.site AS key ORDER BY key",
    "partition": "MATCH (p:Partition) RETURN p.key AS key ORDER BY key",
    "community": "MATCH (b:Block) WHERE b.kind = 'community' RETURN b.key AS key ORDER BY key",
}


@cache
def _queries() -> dict[str, NamedQuery]:
    found: dict[str, NamedQuery] = {}
    for path in sorted(_FOLDER.glob("*.cypher")):
        name, _, dialect = path.name.removesuffix(".cypher").partition(".")
        doc, parameters, text = _parsed(path)
        earlier = found.get(name)
        if earlier is not None and (earlier.doc, earlier.parameters) != (doc, parameters):
            raise ValueError(f"{path.name} says otherwise than its pair what it answers or takes")
        found[name] = NamedQuery(name, doc, parameters, {**(earlier.texts if earlier else {}), dialect: text})
    return found


def _parsed(path: Path) -> tuple[str, tuple[Parameter, ...], str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    n_header = next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))
    if n_header == 0:
        raise ValueError(f"{path.name} must begin with a comment that says what it answers")
    matches = [_PARAMETER.fullmatch(line) for line in lines[1:n_header]]
    if None in matches:
        raise ValueError(f"{path.name}, line {matches.index(None) + 2}: not a parameter, // $name: type = default  meaning")
    return lines[0].removeprefix("//").strip(), tuple(_parameter(match) for match in matches if match), "\n".join(lines[n_header:]).strip()


def _parameter(match: re.Match[str]) -> Parameter:
    default = match["default"]
    value = None if default is None else json.loads(default)
    return Parameter(match["name"], ParameterKind(match["kind"]), default is None, value, match["doc"] or "")
