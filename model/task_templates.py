"""The sentences of the tasks, as spaces of pairs that are counted and indexed without being built.

A task gives one `Space` for each of its labels. A space is the product of a few lists of words and a function that makes a pair
of one choice from each, or None where the choice makes no sense; `space[i]` decodes `i` in mixed radix. Clean and corrupt differ
in one word wherever the task allows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from . import words
from .pairs import Pair, encode_pairs
from .words import Vocabulary


@dataclass(frozen=True)
class Space:
    """All pairs that `make` gives over the product of `slots`."""

    slots: tuple[Sequence[Any], ...]
    make: Callable[..., Pair | None]

    @cached_property
    def size(self) -> int:
        """The number of choices, those included that make no pair; as a property, since it can be above what len() holds."""
        return prod(len(slot) for slot in self.slots)

    def __getitem__(self, index: int) -> Pair | None:
        chosen = []
        for slot in reversed(self.slots):
            index, i = divmod(index, len(slot))
            chosen.append(slot[i])
        return self.make(*reversed(chosen))


Spaces = Mapping[str, Space]

# ---- number agreement

_OPENINGS = ("The", "I think that the", "We heard that the", "Today the", "They say that the", "It seems that the")
_NUMBERS = (("singular", 0), ("plural", 1))


def agreement(vocabulary: Vocabulary) -> Spaces:
    """An adjective, a noun and the verb, after one of a few openings; by the noun's number."""
    nouns = vocabulary.single_forms(words.PEOPLE + words.THINGS)
    slots = (_OPENINGS, vocabulary.single(words.ADJECTIVES), nouns, vocabulary.single_forms(words.COPULAS))

    def space(label: str, number: int) -> Space:
        def make(opening: str, adjective: str, noun: tuple[str, str], copula: tuple[str, str]) -> Pair:
            clean, corrupt = (f"{opening} {adjective} {noun[n]}" for n in (number, 1 - number))
            return Pair(clean, corrupt, f" {copula[number]}", f" {copula[1 - number]}", "agreement", label)

        return Space(slots, make)

    return {label: space(label, number) for label, number in _NUMBERS}


def agreement_rc(vocabulary: Vocabulary) -> Spaces:
    """A person, a clause about what another does to them, and the verb; by the first person's number. The other is as often of another number."""
    people = vocabulary.single_forms(words.PEOPLE)
    slots = (people, people, (0, 1), vocabulary.single_forms(words.RELATIONS), vocabulary.single_forms(words.COPULAS))

    def space(label: str, number: int) -> Space:
        def make(subject: tuple[str, str], other: tuple[str, str], n_other: int, verb: tuple[str, str], copula: tuple[str, str]) -> Pair | None:
            if subject == other:
                return None
            clean, corrupt = (f"The {subject[n]} who the {other[n_other]} {verb[n_other]}" for n in (number, 1 - number))
            return Pair(clean, corrupt, f" {copula[number]}", f" {copula[1 - number]}", "agreement_rc", label)

        return Space(slots, make)

    return {label: space(label, number) for label, number in _NUMBERS}


# ---- people

_GIVING = (
    "When {a} and {b} went to the {place}, {giver} gave a {gift} to",
    "After {a} and {b} met at the {place}, {giver} handed the {gift} to",
    "Then {a} and {b} went to the {place}. {giver} gave the {gift} to",
    "While {a} and {b} were at the {place}, {giver} gave a {gift} to",
)


def ioi(vocabulary: Vocabulary) -> Spaces:
    """Two names, one of whom gives something to the other; by which of them is named first."""
    names = vocabulary.single(words.FEMALE_NAMES + words.MALE_NAMES)
    slots = (_GIVING, names, names, vocabulary.single(words.PLACES), vocabulary.single(words.GIFTS))

    def space(label: str, receiver_first: bool) -> Space:
        def make(template: str, receiver: str, giver: str, place: str, gift: str) -> Pair | None:
            if receiver == giver:
                return None
            a, b = (receiver, giver) if receiver_first else (giver, receiver)
            clean, corrupt = (template.format(a=a, b=b, place=place, gift=gift, giver=who) for who in (giver, receiver))
            return Pair(clean, corrupt, f" {receiver}", f" {giver}", "ioi", label)

        return Space(slots, make)

    return {"receiver first": space("receiver first", True), "receiver second": space("receiver second", False)}


_ABOUT_ONE = (
    "So {name} is a really great friend, isn't",
    "My friend {name} went home early because",
    "We like {name} because",
    "I know that {name} is tired, because",
    "When I met {name},",
)


def pronoun(vocabulary: Vocabulary) -> Spaces:
    """A sentence about somebody that goes on with a pronoun; by gender."""
    female, male = vocabulary.single(words.FEMALE_NAMES), vocabulary.single(words.MALE_NAMES)

    def space(label: str, names: Sequence[str], others: Sequence[str], answer: str, wrong: str) -> Space:
        def make(template: str, name: str, other: str) -> Pair:
            return Pair(template.format(name=name), template.format(name=other), answer, wrong, "pronoun", label)

        return Space((_ABOUT_ONE, names, others), make)

    return {"female": space("female", female, male, " she", " he"), "male": space("male", male, female, " he", " she")}


def profession_gender(vocabulary: Vocabulary) -> Spaces:
    """What somebody did, then their profession, gender unchanged; by gender and profession."""
    names = {"female": vocabulary.single(words.FEMALE_NAMES), "male": vocabulary.single(words.MALE_NAMES)}
    professions = vocabulary.single(words.BIOGRAPHIES)

    def space(label: str, profession: str, gender: str) -> Space:
        pronoun = {"female": "She", "male": "He"}[gender]
        others = tuple((other, fact) for other in professions if other != profession for fact in words.BIOGRAPHIES[other])

        def make(name: str, fact: str, other: tuple[str, str]) -> Pair:
            clean, corrupt = (f"My friend {name} {what}. {pronoun} worked as a" for what in (fact, other[1]))
            return Pair(clean, corrupt, f" {profession}", f" {other[0]}", "profession_gender", label)

        return Space((names[gender], words.BIOGRAPHIES[profession], others), make)

    cases = [(f"{gender} {profession}", profession, gender) for profession in professions for gender in names]
    return {label: space(label, profession, gender) for label, profession, gender in cases}


# ---- order and logic

_CENTURIES = ("12", "13", "14", "15", "16", "17", "18")
_LASTING = "The {event} lasted from the year {century}{year} to the year {century}"
_GROWING = "During the {event} the number rose from {count} to"


def greater_than(vocabulary: Vocabulary) -> Spaces:
    """The first of three forms that the tokenizer can answer by one token: two digits, one digit, or number words.

    Two come first: a tokenizer that reads digits in twos would take one as well, but a year never goes on so there.
    """
    events = vocabulary.single(words.EVENTS)
    numbers = vocabulary.single(words.NUMBER_WORDS)
    forms = (_by_two_digits(events), _by_digit(events), _by_word(events, numbers))
    return next((form for form in forms if _fits(form, vocabulary)), forms[-1])


def _fits(spaces: Spaces, vocabulary: Vocabulary) -> bool:
    """Whether the greater part of a sample over the spaces is valid for the tokenizer."""
    sample = [pair for s in spaces.values() for i in range(min(s.size, 64)) if (pair := s[i * s.size // min(s.size, 64)]) is not None]
    valid = [not isinstance(encoded, str) for encoded in encode_pairs(sample, vocabulary.tokenizer)]
    return sum(valid) > len(valid) / 2


def _by_digit(events: Sequence[str]) -> Spaces:
    """The tens digit of the last year; the wrong one lies between the corrupt year's and the clean year's."""
    tens = [(clean, corrupt, good, bad) for corrupt, bad, clean, good in product(range(10), repeat=4) if corrupt < bad < clean < good]

    def make(event: str, century: str, unit: int, digits: tuple[int, int, int, int]) -> Pair:
        clean, corrupt = (_LASTING.format(event=event, century=century, year=f"{ten}{unit}") for ten in digits[:2])
        return Pair(clean, corrupt, str(digits[2]), str(digits[3]), "greater_than", century)

    return {century: Space((events, (century,), range(10), tens), make) for century in _CENTURIES}


def _by_two_digits(events: Sequence[str]) -> Spaces:
    """The last two digits of the last year."""
    years = [(clean, corrupt, good, bad) for corrupt, bad, clean, good in product(range(11, 99, 4), repeat=4) if corrupt < bad < clean < good]

    def make(event: str, century: str, two: tuple[int, int, int, int]) -> Pair:
        clean, corrupt = (_LASTING.format(event=event, century=century, year=year) for year in two[:2])
        return Pair(clean, corrupt, str(two[2]), str(two[3]), "greater_than", century)

    return {century: Space((events, (century,), years), make) for century in _CENTURIES}


def _by_word(events: Sequence[str], numbers: Sequence[str]) -> Spaces:
    """A number word greater than the one in the prompt."""
    n = len(numbers)
    counts = [(clean, corrupt, good, bad) for corrupt, bad, clean, good in product(range(n), repeat=4) if corrupt < bad < clean < good]

    def make(event: str, four: tuple[int, int, int, int]) -> Pair:
        clean, corrupt = (_GROWING.format(event=event, count=numbers[i]) for i in four[:2])
        return Pair(clean, corrupt, f" {numbers[four[2]]}", f" {numbers[four[3]]}", "greater_than", "words")

    return {"words": Space((events, counts), make)}


# Small models need to be shown the form; no expression below has as few literals as these, so that none is answered here.
_SHOWN = "True and False == False\nTrue or False == True\nnot True == False\nnot False == True\n"
_N_LITERALS = (3, 4, 5, 6)


def boolean(vocabulary: Vocabulary) -> Spaces:
    """Three to six literals; the corrupt expression has one of them the other way round, which changes the value."""
    del vocabulary  # True, False and the operators are the same for every tokenizer; pairs are checked one by one

    def space(label: str, value: bool, n: int) -> Space:
        def make(*choice: Any) -> Pair | None:
            literals, operators, flipped = choice[:n], choice[n:-1], choice[-1]
            others = tuple(literal ^ (i == flipped) for i, literal in enumerate(literals))
            if _value(literals, operators) != value or _value(others, operators) == value:
                return None
            clean, corrupt = (f"{_SHOWN}{_expression(x, operators)} ==" for x in (literals, others))
            return Pair(clean, corrupt, f" {value}", f" {not value}", "boolean", label)

        return Space(((True, False),) * n + (("and", "or"),) * (n - 1) + (range(n),), make)

    return {f"{value} of {n}": space(f"{value} of {n}", value, n) for n in _N_LITERALS for value in (True, False)}


def _expression(literals: Sequence[bool], operators: Sequence[str]) -> str:
    return " ".join(part for literal, operator in zip(literals, (*operators, "")) for part in (str(literal), operator)).rstrip()


def _value(literals: Sequence[bool], operators: Sequence[str]) -> bool:
    """What Python makes of the expression: `and` binds closer than `or`."""
    conjunctions = [True]
    for literal, operator in zip(literals, ("and", *operators)):
        if operator == "or":
            conjunctions.append(True)
        conjunctions[-1] &= literal
    return any(conjunctions)
