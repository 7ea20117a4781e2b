"""What a query that only reads may be.

Both databases refuse, in a reading transaction, what would change the graph. Some of what they count as reading reaches beyond it:
files and addresses (`LOAD CSV`, `LOAD FROM`, `COPY … TO`), settings, other users and their transactions, procedures of every kind. So a
text is looked at before it is sent:

1. `_readings`: the texts that a database may take the given one for. Neo4j turns `\\u004c` into L before it reads a statement, even in
   the middle of a word, and not behind a backslash; each reading is looked at, and all must pass.
2. `tokens`: names, strings and signs. Comments and blanks are gone, so that nothing can hide a word or be taken for one. What the databases
   divide otherwise than this file does is refused: `1LOAD` (to Ladybug two words), a comment that ends in `**/` (which Ladybug may read on
   behind), a blank that is none here.
3. `_refuse`: how the statement begins, and the clauses and calls in it, against lists of what is allowed. What is on no list is refused.

The lists name what reads the graph alone. A user who may write (`--write`) is not asked.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .store import WriteRefused

_TOKEN = re.compile(
    r"""(?P<skipped>//[^\r\n]*|/\*.*?\*/|\s+)|(?P<string>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|`(?P<quoted>(?:``|[^`])*)`|(?P<word>\w+)|(?P<sign>.)""",
    re.DOTALL,
)
_NUMBER = re.compile(r"[0-9][0-9_]*([eE][0-9]*)?[fFdD]?|0[xX][0-9a-fA-F_]+|0[oO][0-7_]+")
_ESCAPE = re.compile(r"\\u+([0-9a-fA-F]{4})")
_UNESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\u+([0-9a-fA-F]{4})")

_BEHIND_A_NAME = frozenset({
    "AS", "ORDER", "SKIP", "OFFSET", "LIMIT", "WHERE", "UNION", "MATCH", "OPTIONAL", "UNWIND", "WITH", "RETURN", "CALL", "IN", "IS", "AND", "OR",
    "XOR", "STARTS", "ENDS", "CONTAINS", "FINISH", "NEXT", "FILTER", "LET",
})  # fmt: skip
"""Words that may follow a name, none of them a procedure's: where `call` is such a name, it calls nothing."""

PREFIXES = frozenset({"EXPLAIN", "PROFILE", "LOGICAL"})
WRITING = frozenset({"CREATE", "MERGE", "INSERT", "SET", "DELETE", "DETACH", "NODETACH", "REMOVE", "FOREACH", "DROP", "ALTER"})
_COMMON = frozenset({"MATCH", "OPTIONAL", "UNWIND", "WITH", "RETURN", "CALL"})

SHOWN = frozenset({"INDEX", "INDEXES", "CONSTRAINT", "CONSTRAINTS", "FUNCTION", "FUNCTIONS", "PROCEDURE", "PROCEDURES"})
"""What SHOW may be asked for on Neo4j; besides these, the database that one is in."""

_SERVERS = ("TRANSACTION", "SETTING", "USER", "CURRENT", "DATABASE", "PRIVILEGE", "ROLE", "SERVER", "ALIAS", "AUTH")

NEO4J_PROCEDURES = re.compile(
    r"db\.(labels|relationshipTypes|propertyKeys|info|ping)|db\.schema\.(visualization|nodeTypeProperties|relTypeProperties)"
    r"|db\.index\.(fulltext|vector)\.query(Nodes|Relationships)|db\.index\.fulltext\.listAvailableAnalyzers|dbms\.components"
    r"|gds\.(list|version|graph\.(list|exists))|gds(\.\w+)*\.(stream|stats|estimate)"
    r"|apoc\.(help|meta\.\w+|neighbors(\.\w+)+|path\.\w+|algo\.(aStar|aStarConfig|dijkstra|allSimplePaths|cover))"
)
NEO4J_FUNCTIONS = re.compile(
    r"(date|datetime|localdatetime|time|localtime|duration|point|coll|string|vector)(\.\w+)+|db\.nameFromElementId|gds\.(version|(util|similarity)\.\w+)"
    r"|apoc\.(version|(agg|any|bitwise|coll|convert|date|diff|hashing|label|map|math|number|scoring|temporal|text)\.\w+)"
)
"""Functions with a dot in their name; those without one are the database's own."""

LADYBUG_PROCEDURES = frozenset({
    "show_tables", "table_info", "show_connection", "show_functions", "show_indexes", "show_macros", "show_sequences", "show_graphs",
    "show_loaded_extensions", "show_attached_databases", "current_setting", "db_version", "stats_info", "storage_info", "show_warnings",
})  # fmt: skip
"""Without those that read files: called in a query, `read_csv_serial` even brings the process down."""


@dataclass(frozen=True, slots=True)
class Token:
    """A name (`word`; `quoted` by backquotes), a string, a sign, or what is `unclear`: where it ends, a database may see otherwise.

    upper: a word's capitals, by which clauses are told; "" for all others.
    """

    kind: str
    text: str

    @property
    def upper(self) -> str:
        return self.text.upper() if self.kind == "word" else ""

    @property
    def named(self) -> bool:
        """Whether it can be (part of) a name."""
        return self.kind in ("word", "quoted")


def tokens(cypher: str) -> list[Token]:
    """The tokens of a text. A quote that is never closed is a sign: the database refuses such a text whole."""
    found = ((str(match.lastgroup), match) for match in _TOKEN.finditer(cypher))
    return [Token(_unclear(kind, match[0]) or kind, match[kind]) for kind, match in found if kind != "skipped" or _unclear(kind, match[0])]


def _unclear(kind: str, text: str) -> str | None:
    """`unclear` for a text that a database may divide otherwise, None for all others."""
    if kind == "skipped":
        unclear = text.startswith("/*") and text.endswith("**/") and len(text) > len("/**/")
    elif kind == "word":
        unclear = text[0].isdecimal() and not _NUMBER.fullmatch(text)
    else:
        unclear = kind == "sign" and unicodedata.category(text)[0] in "CZ"
    return "unclear" if unclear else None


def require_reading(cypher: str, dialect: str) -> None:
    """Raise `WriteRefused`, with the reason, unless a text only reads the graph. dialect: `neo4j` or `ladybug`."""
    for reading in _readings(cypher) if dialect == "neo4j" else (cypher,):
        _refuse(tokens(reading), dialect)


def _readings(cypher: str) -> tuple[str, ...]:
    """A text as it stands; with its `\\uXXXX` turned into characters where no backslash protects them; with all of them turned."""
    if "\\u" not in cypher:
        return (cypher,)
    unescaped = _UNESCAPED.sub(lambda match: match[1] + chr(int(match[2], 16)), cypher)
    return cypher, unescaped, _ESCAPE.sub(lambda match: chr(int(match[1], 16)), cypher)


def _refuse(text: Sequence[Token], dialect: str) -> None:
    unclear = next((token.text for token in text if token.kind == "unclear"), None)
    if unclear is not None:
        raise WriteRefused(f"it cannot be told for sure where {unclear[:40]!a} ends: put a blank there, or leave it out")
    body = list(_without_prefixes(text, dialect))
    if not body:
        return  # the database says that nothing was asked
    _refuse_beginning(body[0], dialect)
    for i, token in enumerate(body):
        before, rest = body[i - 1] if i else None, body[i + 1 :]
        if before is not None and before.text in (".", ":") and before.kind == "sign" and not (i > 1 and body[i - 2].text[:1].isdecimal()):
            if before.text == ":" and dialect == "neo4j":
                _refuse_function(token, rest)  # a map's value
            continue  # a property, a label or a type (behind a number's point it would be none)
        if token.upper == "LOAD" and rest and rest[0].upper in ("CSV", "FROM", "WITH", "EXTENSION"):
            raise WriteRefused(f"LOAD {rest[0].upper} reads files and addresses")
        names = bool(rest) and rest[0].upper in _BEHIND_A_NAME and _length(rest) == 1  # `call` is a name there
        if token.upper == "CALL" and rest and rest[0].named and not names:
            _refuse_call(_chain(rest), dialect)
        if dialect == "neo4j":
            _refuse_of_neo4j(token, before, rest)


def _without_prefixes(text: Sequence[Token], dialect: str) -> Iterator[Token]:
    """The tokens behind EXPLAIN, PROFILE and, on Neo4j, `CYPHER 5 option=value`."""
    i = 0
    while i < len(text):
        if text[i].upper in PREFIXES:
            i += 1
        elif dialect == "neo4j" and text[i].upper == "CYPHER":
            i += 1
            # a version is a number with or without a point, an option is name = value
            while i < len(text) and (text[i].text.isdecimal() or text[i].text == "." or (i + 1 < len(text) and text[i + 1].text == "=")):
                i += 3 if i + 1 < len(text) and text[i + 1].text == "=" else 1
        else:
            break
    yield from text[i:]


def _refuse_beginning(first: Token, dialect: str) -> None:
    allowed = _COMMON | ({"SHOW", "USE", "TERMINATE", "LET", "FILTER", "FINISH", "WHEN"} if dialect == "neo4j" else frozenset())
    if first.upper in WRITING:
        raise WriteRefused("it would change the graph")
    if first.upper not in allowed and first.text not in ("(", "{"):
        near = difflib.get_close_matches(first.upper, sorted(allowed), 1)
        raise WriteRefused(f"{first.text[:40]!r} begins no reading statement" + (f" (did you mean {near[0]}?)" if near else ""))


def _refuse_call(name: str, dialect: str) -> None:
    if dialect == "neo4j":
        allowed = NEO4J_PROCEDURES.fullmatch(name) is not None
    else:
        allowed = name.lower() in LADYBUG_PROCEDURES
    if not allowed:
        raise WriteRefused(f"CALL {name[:60]} is not among the procedures that only read the graph")


def _refuse_of_neo4j(token: Token, before: Token | None, rest: Sequence[Token]) -> None:
    """What only Neo4j knows: another database, the server's own state, functions that plugins bring."""
    opens = before is None or before.text in ("{", "}") or before.upper in ("UNION", "ALL", "DISTINCT")
    if token.upper == "USE" and opens and rest and rest[0].named:
        raise WriteRefused("USE takes another database than the graph's")
    if token.upper == "TERMINATE" and rest and rest[0].upper.startswith("TRANSACTION"):
        raise WriteRefused("TERMINATE ends the transactions of others")
    if token.upper == "SHOW" and rest and rest[0].kind == "word":
        _refuse_show([item.upper for item in rest], begins=before is None)
    if before is None or before.upper != "CALL":
        _refuse_function(token, rest)


def _refuse_function(token: Token, rest: Sequence[Token]) -> None:
    """A function of a plugin at its name's beginning: only such have points in their names."""
    if token.named and rest and rest[0].text == ".":
        name, n = _chain([token, *rest]), _length([token, *rest])
        after = rest[n - 1] if n - 1 < len(rest) else None
        if after is not None and after.text == "(" and after.kind == "sign" and not NEO4J_FUNCTIONS.fullmatch(name):
            raise WriteRefused(f"{name[:60]}() is not among the functions that only compute")


def _refuse_show(words: Sequence[str], *, begins: bool) -> None:
    """SHOW tells of the server as well: its users, settings and transactions, with the texts of others' queries.

    Where it does not begin a statement the word may be a name: there it is refused where it is followed by what it tells of.
    """
    if any(pair in pairwise(words[:3]) for pair in (("HOME", "DATABASE"), ("DEFAULT", "DATABASE"))):
        return
    kinds = words[: next((i for i, word in enumerate(words) if word in ("YIELD", "WHERE", "")), len(words))]
    if not SHOWN & set(kinds) and (begins or any(word.startswith(_SERVERS) for word in kinds[:4])):
        raise WriteRefused(f"SHOW {' '.join(kinds[:2])} tells of the server, not of the graph".replace("  ", " "))


def _length(text: Sequence[Token]) -> int:
    """How many tokens the name at the beginning has: a, a.b, a.b.c."""
    n = 1
    while n + 1 < len(text) and text[n].text == "." and text[n].kind == "sign" and text[n + 1].named:
        n += 2
    return n


def _chain(text: Sequence[Token]) -> str:
    """The name at the beginning, without its quotes and blanks."""
    return "".join(token.text for token in text[: _length(text)])
