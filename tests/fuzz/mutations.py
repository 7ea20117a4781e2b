"""Nearly valid inputs: strategies that take something valid and spoil it.

1. `spoiled` changes a document (a tree of dicts, lists and values) in a few places: a field is dropped, doubled, renamed, or gets another value.
2. `written` spells a tree as JSON, also such as no writer makes: numbers of 5,000 digits, keys twice, lists nested 20,000 deep, half surrogates.
3. `bytes_of` is a text as a file may have it: another encoding, a byte order mark, CRLF, NULs, cut off, bytes flipped.
"""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Strategy = st.SearchStrategy


@dataclass(frozen=True)
class Raw:
    """A value spelled as it stands."""

    text: str


@dataclass(frozen=True)
class Doubled:
    """An object one of whose keys stands twice."""

    items: tuple[tuple[str, Any], ...]


DEEP = 20_000
"""Levels that no parser by recursion survives."""

RAW = (
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-0.0"), Raw("9" * 5_000), Raw("1" + "0" * 400), Raw("-9223372036854775809"),
    Raw("18446744073709551616"), Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP), Raw('"\\ud800"'), Raw('"\\u0000"'), Raw("01"), Raw("'"),
)  # fmt: skip

SHARP = (
    "", " ", "\n", "\r\n", "\t", "\x00", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\U0001f9e0", "e\u0301", "\u0130", "ß", "ﷺ", "𝔘", "한", "א",
    "'", '"', "`", "\\", "$key", "${x}", "{{}}", "%s", "%n", "<script>alert(1)</script>", "</script>", "<!--", "]]>", "&amp;", "--", ";", "' OR 1=1 //",
    "'}) MATCH (n) DETACH DELETE n //", "DROP TABLE labels;", "../../etc/passwd", "/dev/null", "~", "-", "--help", "|", "a|b|c|d", "error", "null", "nan", "inf",
    "-1", "0", "1e309", "99999999999999999999", "resid_0/1", "resid_0", "embed", "y", "x" * 501, "é" * 3_000,
)  # fmt: skip
"""Texts that have broken something somewhere: controls, quotes, marks of other languages, paths, options."""


def texts(most: int = 40) -> Strategy[str]:
    """Texts of every category of Unicode but half surrogates (no argument of a process holds these), and the sharp ones."""
    any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=most)
    return st.one_of(any_text, st.sampled_from(SHARP), st.tuples(st.sampled_from(SHARP), any_text).map("".join), st.text(string.printable, max_size=most))


def arguments(most: int = 40) -> Strategy[str]:
    """Texts as a process can be given them: without NULs, and now and then with bytes that are no UTF-8."""
    return st.one_of(texts(most), texts(most), texts(most), st.sampled_from(("\udcff", "a\udc80b"))).map(lambda text: text.replace("\x00", ""))


def values() -> Strategy[Any]:
    """Any value that JSON knows, and some that it does not."""
    plain = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), texts(), st.sampled_from(RAW),
        st.sampled_from([2**31, 2**53, 2**63, -(2**63) - 1, 1e308, 1e-320, 0.5]),
    )  # fmt: skip
    return st.one_of(plain, st.lists(plain, max_size=3), st.dictionaries(texts(8), plain, max_size=3))


def numbers() -> Strategy[str]:
    """Numbers as one types them, and what is nearly one."""
    odd = ["nan", "inf", "-inf", "-0", "+1", "1_000", "0x10", "1e400", "1e-400", "９", "1,5", "", " 1", "1 ", "9" * 400, "²", "1.0", "true"]
    return st.one_of(st.integers(-5, 30).map(str), st.integers().map(str), st.floats().map(str), st.sampled_from(odd), arguments(6))


# ---- 1. documents


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a tree, the whole included."""
    found = [at]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*at, key))
    return found


def changed(tree: Any, place: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """A copy of the tree in which what stands at a place is another thing; `DROP` leaves it out."""
    if not place:
        return change(tree)
    if isinstance(tree, dict):
        made = {key: changed(value, place[1:], change) if key == place[0] else value for key, value in tree.items()}
        return {key: value for key, value in made.items() if value is not DROP}
    if isinstance(tree, list):
        return [new for new in (changed(value, place[1:], change) if i == place[0] else value for i, value in enumerate(tree)) if new is not DROP]
    return tree


DROP = object()


@st.composite
def spoiled(draw: Any, document: Any, most: int = 3) -> Any:
    """The document with up to `most` changes; now and then none at all."""
    tree = document
    for _ in range(draw(st.integers(0, most))):
        place = draw(st.sampled_from(places(tree)))
        kind = draw(st.sampled_from(("drop", "value", "value", "double", "extra", "rename", "wrap", "swap")))
        tree = changed(tree, place, lambda old, kind=kind: _change(draw, kind, old, document))
        if tree is DROP:
            return None
    return tree


def _change(draw: Any, kind: str, old: Any, document: Any) -> Any:
    if kind == "drop":
        return DROP
    if kind == "wrap":
        return draw(st.sampled_from([[old], {"value": old}, json.dumps(old, default=str)]))
    if kind == "swap":  # something else of the document
        other = document
        for step in draw(st.sampled_from(places(document))):
            other = other[step]
        return other
    if isinstance(old, dict) and kind == "extra":
        return {**old, draw(texts(8)): draw(values())}
    if isinstance(old, dict) and old and kind == "double":
        key = draw(st.sampled_from(list(old)))
        return Doubled((*old.items(), (key, draw(values()))))
    if isinstance(old, dict) and old and kind == "rename":
        key = draw(st.sampled_from(list(old)))
        return {(draw(texts(8)) if name == key else name): value for name, value in old.items()}
    if isinstance(old, list) and old and kind == "double":
        return [*old, *old]
    return draw(values())


# ---- 2. spelling


def written(tree: Any) -> str:
    """JSON of a tree, with what JSON does not have spelled as it stands."""
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, Doubled):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(value)}" for key, value in tree.items) + "}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {written(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list | tuple):
        return "[" + ", ".join(written(value) for value in tree) + "]"
    return json.dumps(tree)


@st.composite
def documents(draw: Any, document: Any) -> bytes:
    """A file that holds one document."""
    return draw(bytes_of(written(draw(spoiled(document)))))


@st.composite
def line_files(draw: Any, records: list[Any]) -> bytes:
    """A file with a document on each line: some spoiled, some repeated, blank lines, one line of a megabyte."""
    lines = []
    for record in records:
        spoil = draw(st.sampled_from((False, False, True)))
        lines.append(written(draw(spoiled(record))) if spoil else json.dumps(record, ensure_ascii=draw(st.booleans())))
    extra = draw(st.sampled_from(("", "", "", "", "blank", "text", "long", "again")))
    if extra:
        lines.append({"blank": "  ", "text": draw(texts()), "long": json.dumps({"clean": "w1 " * 350_000}), "again": lines[0] if lines else ""}[extra])
    return draw(bytes_of(draw(st.sampled_from(("\n", "\n", "\r\n", "\n\n"))).join(lines) + draw(st.sampled_from(("", "\n")))))


# ---- 3. bytes


@st.composite
def bytes_of(draw: Any, text: str) -> bytes:
    """A text as bytes, mostly UTF-8 as it should be."""
    kind = draw(st.sampled_from(("plain",) * 8 + ("bom", "utf16", "latin1", "cut", "flip", "insert", "nul", "empty", "noise")))
    data = text.encode("utf-8", "surrogatepass")
    if kind == "bom":
        return b"\xef\xbb\xbf" + data
    if kind == "utf16":
        return text.encode("utf-16", "surrogatepass")
    if kind == "latin1":
        return text.replace("w", "é").encode("latin-1", "replace")
    if kind == "empty":
        return b""
    if kind == "noise":
        return draw(st.binary(max_size=200))
    if kind in ("cut", "flip", "insert", "nul"):
        return draw(broken_bytes(data, kind))
    return data


@st.composite
def broken_bytes(draw: Any, data: bytes, kind: str | None = None) -> bytes:
    """Bytes cut off, changed in a few places, or with others put in between."""
    kind = kind or draw(st.sampled_from(("cut", "flip", "flip", "insert", "nul", "same", "doubled")))
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    if kind == "cut":
        return data[:place]
    if kind == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place:]
    if kind == "nul":
        return data[:place] + b"\x00" * draw(st.sampled_from((1, 8, 4096))) + data[place:]
    if kind == "flip":
        made = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            if made:
                made[draw(st.integers(0, len(made) - 1))] = draw(st.integers(0, 255))
        return bytes(made)
    return data * 2 if kind == "doubled" else data
