"""Builds the text that the shipped SmolLM2 dictionaries are trained on, from Debian packages and templates of our own.

    apt-get install --no-install-recommends fortunes fortunes-min python3.11-doc anarchism jargon-text
    python scripts/demo_corpus.py OUT [--seed 0]

1. `prose`: quotations and verse (fortunes), essays (an FAQ on political theory), humour and definitions (the Jargon File).
2. `documentation`: the reStructuredText sources of Python's manual.
3. `prompts`: sentences of the shapes that featlas's tasks have (agreement, names, pronouns, years, booleans, professions).

OUT/corpus.jsonl gets the texts of 1 and 2 in seeded order, OUT/prompts.jsonl those of 3, one `{"text": …, "source": …}` a line.
"""

# ruff: noqa: SIM905 (word lists read better as text)
import argparse
import gzip
import html
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

FORTUNES = Path("/usr/share/games/fortunes")
FAQ = Path("/usr/share/doc/anarchism/html")
JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
MANUAL = Path("/usr/share/doc/python3.11/html/_sources")

# Drawings and other languages than English would spend tokens on what no task reads.
_NOT_PROSE = {"art", "ascii-art", "translate-me"}

# Characters taken from each source: about 60 % prose, 40 % documentation.
SHARES = {"fortunes": 1_000_000, "faq": 600_000, "jargon": 400_000, "manual": 900_000}


def fortunes() -> Iterator[str]:
    """Ten quotations together make one text, so that most of a block's tokens have some context."""
    quotes = []
    for path in sorted(p for p in FORTUNES.iterdir() if not p.suffix and p.name not in _NOT_PROSE):
        quotes += [q.strip("\n").expandtabs(4) for q in re.split(r"^%\n", path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)]
    quotes = [q for q in quotes if q.strip() and "�" not in q]
    random.Random(0).shuffle(quotes)
    for begin in range(0, len(quotes), 10):
        yield "\n\n".join(quotes[begin : begin + 10])


def faq() -> Iterator[str]:
    """Running text of the FAQ's pages, without markup."""
    for path in sorted(FAQ.glob("sec*.html")):
        body = path.read_text(encoding="utf-8", errors="replace").split("<body>", 1)[-1]
        paragraphs = [html.unescape(re.sub(r"<[^>]+>", "", p)) for p in re.findall(r"<p>(.*?)</p>", body, flags=re.DOTALL)]
        text = "\n\n".join(re.sub(r"\s+", " ", p).strip() for p in paragraphs)
        if len(text) > 500:
            yield text[:12_000]


def jargon() -> Iterator[str]:
    """The dictionary's entries, some together; the table of contents before the first entry is left out."""
    text = gzip.decompress(JARGON.read_bytes()).decode("utf-8", errors="replace")
    entries = re.split(r"\n(?=   :[^\n:]+:)", text)[1:]
    lines = [re.sub(r"^   ", "", e, flags=re.MULTILINE) for e in entries]
    for begin in range(0, len(lines), 8):
        yield "\n".join(lines[begin : begin + 8])


def manual() -> Iterator[str]:
    """Pages of Python's manual, the longest ones cut."""
    for path in sorted(MANUAL.rglob("*.rst.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) > 1000 and "whatsnew/changelog" not in str(path):
            yield text[:20_000]


SOURCES = {"fortunes": fortunes, "faq": faq, "jargon": jargon, "manual": manual}

NOUNS = (
    "author teacher guard farmer doctor pilot lawyer manager senator officer writer customer singer dancer actor student "
    "key box letter picture window plant table boat house car dog cat bird horse painting report book"
).split()
VERBS_OF_LIKING = "admire help know avoid follow remember praise trust hate visit".split()
PREPOSITIONS = "near behind beside with by across from".split()
WOMEN = "Mary Anna Emma Laura Sarah Alice Jane Susan Linda Karen Lisa Nancy Helen Amy Rachel Julia Kate Maria Rose Claire".split()
MEN = "John James Robert David Tom Mark Paul Peter Kevin Steven Frank Scott Jack Adam Henry Luke George Simon Daniel Michael".split()
PLACES = "store park school office station garden library hospital market beach restaurant museum".split()
OBJECTS = "drink book ball ring kiss letter key flower basket computer ticket snack".split()
EVENTS = "war siege voyage reign project expedition conflict dynasty campaign strike trial drought".split()
PROFESSIONS = (
    "nurse professor doctor lawyer teacher engineer dentist painter poet model pastor composer journalist surgeon "
    "photographer psychologist architect accountant"
).split()
CITIES = "Boston Chicago London Paris Denver Seattle Dublin Toronto Sydney Berlin".split()


def _noun(rng: random.Random, plural: bool) -> str:
    noun = rng.choice(NOUNS)
    if not plural:
        return noun
    return noun + "es" if noun.endswith("x") else noun + "s"


def agreement(rng: random.Random) -> str:
    plural = rng.random() < 0.5
    verb = rng.choice(("are", "were", "have", "do") if plural else ("is", "was", "has", "does"))
    subject = _noun(rng, plural)
    end = rng.choice(("", " very old.", " here.", " not seen.", " a lot to say."))
    shape = rng.randrange(3)
    if shape == 0:
        return f"The {subject} {verb}{end}"
    other = _noun(rng, rng.random() < 0.5)
    if shape == 1:
        return f"The {subject} {rng.choice(PREPOSITIONS)} the {other} {verb}{end}"
    liking = rng.choice(VERBS_OF_LIKING) + ("" if other.endswith("s") else "s")
    if rng.random() < 0.5:
        liking = rng.choice(VERBS_OF_LIKING) + ("" if plural else "s")
        return f"The {subject} that {liking} the {other} {verb}{end}"
    return f"The {subject} that the {other} {liking} {verb}{end}"


def names(rng: random.Random) -> str:
    first, second = rng.sample(WOMEN + MEN, 2)
    giver, taker = rng.choice(((first, second), (second, first), (rng.choice(WOMEN + MEN), second)))
    start = rng.choice(("When", "Then,", "After", "While"))
    gave = rng.choice(("gave", "handed", "offered", "sold", "passed"))
    place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
    did = rng.choice((f"went to the {place}", f"were at the {place}", "had a long talk"))
    return f"{start} {first} and {second} {did}, {giver} {gave} a {thing} to {taker}"


def pronouns(rng: random.Random) -> str:
    woman = rng.random() < 0.5
    name, word = (rng.choice(WOMEN), "she") if woman else (rng.choice(MEN), "he")
    thing, place, profession = rng.choice(OBJECTS), rng.choice(PLACES), rng.choice(PROFESSIONS)
    shape = rng.randrange(4)
    if shape == 0:
        return f"{name} is a great {profession}, isn't {word}?"
    if shape == 1:
        return f"So {name} is such a good {profession}, isn't {word}"
    if shape == 2:
        return f"{name} went to the {place} because {word} wanted a {thing}."
    return f"{name} lost the {thing} that {'her' if woman else 'his'} friend had bought, and {word} was sad."


def years(rng: random.Random) -> str:
    century, begin = rng.randrange(11, 20), rng.randrange(2, 98)
    end = rng.randrange(begin + 1, 100)
    return f"The {rng.choice(EVENTS)} lasted from the year {century}{begin:02d} to the year {century}{end:02d}"


def booleans(rng: random.Random) -> str:
    def expression(depth: int) -> tuple[str, bool]:
        if depth == 0:
            value = rng.random() < 0.5
            return str(value), value
        left, a = expression(depth - 1)
        if rng.random() < 0.3:
            return f"not {left}" if depth == 1 else f"not ( {left} )", not a
        right, b = expression(rng.randrange(depth))
        operator = rng.choice(("and", "or"))
        return f"( {left} {operator} {right} )", (a and b) if operator == "and" else (a or b)

    text, value = expression(rng.randrange(1, 4))
    return f"{text} is {value}"


def biographies(rng: random.Random) -> str:
    woman = rng.random() < 0.5
    name = rng.choice(WOMEN if woman else MEN)
    he, his = ("She", "her") if woman else ("He", "his")
    profession, city = rng.choice(PROFESSIONS), rng.choice(CITIES)
    article = "an" if profession[0] in "aeiou" else "a"
    return rng.choice(
        (
            f"{name} is {article} {profession} in {city}. {he} studied in {rng.choice(CITIES)} and loves {his} work.",
            f"{he} works in {city} and has {his} own practice. The best word for {his} profession is {profession}",
            f"{he} has been {article} {profession} for ten years. {he} lives in {city} with {his} family.",
            f"The {profession} said that {he.lower()} would come to {city}.",
        )
    )


SHAPES = {"agreement": agreement, "names": names, "pronouns": pronouns, "years": years, "booleans": booleans, "biographies": biographies}


def corpus(rng: random.Random) -> list[dict[str, str]]:
    """Texts of all sources up to their shares, shuffled together."""
    records = []
    for source, budget in SHARES.items():
        texts = list(SOURCES[source]())
        rng.shuffle(texts)
        for text in texts:
            if budget <= 0:
                break
            records.append({"text": text, "source": source})
            budget -= len(text)
    rng.shuffle(records)
    return records


def prompts(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Distinct sentences, the shapes in turn; agreement twice as often since it has most variants."""
    shapes = ["agreement", *SHAPES]
    records: dict[str, dict[str, str]] = {}
    for number in range(4 * count):
        if len(records) == count:
            break
        source = shapes[number % len(shapes)]
        text = SHAPES[source](rng)
        records.setdefault(text, {"text": text, "source": source})
    return list(records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=12_000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(arguments.seed)
    for name, records in (("corpus", corpus(rng)), ("prompts", prompts(rng, arguments.prompts))):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (arguments.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}.jsonl: {len(lines)} texts, {sum(len(r['text']) for r in records):,} characters")


if __name__ == "__main__":
    main()
