"""Biographies with a profession and a gender: the Bias in Bios data set, texts of its form made here, and prompts made of them.

Bias in Bios (De-Arteaga et al. 2019, arXiv 1901.09451) holds people's web biographies without their first sentence, which names the
profession. It is read as Hugging Face has it (`LabHC/bias_in_bios`): `hard_text`, `profession` (0 to 27, see `PROFESSIONS`), `gender` (0 male,
1 female). `make_bios` writes small texts of that form, for tests and for work without a network.

Two selections are those of Marks et al. 2024 (arXiv 2403.19647, SHIFT): in the *ambiguous* set every bio of one profession is a man's and every
bio of the other a woman's, so that profession and gender cannot be told apart; in the *balanced* set all four combinations are equally frequent.

Prompts come in pairs whose corrupt side is the clean one with the gender turned round: `bio_pairs` of bios, `question_pairs` of short
templates that end in a question about the profession or about the gender.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from itertools import islice, product
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text
from . import words
from .pairs import Pair, encode_pairs
from .words import Vocabulary

DATA_SET = "LabHC/bias_in_bios"
SPLITS = ("train", "dev", "test")
PROFESSIONS = (
    "accountant", "architect", "attorney", "chiropractor", "comedian", "composer", "dentist", "dietitian", "dj", "filmmaker", "interior_designer",
    "journalist", "model", "nurse", "painter", "paralegal", "pastor", "personal_trainer", "photographer", "physician", "poet", "professor",
    "psychologist", "rapper", "software_engineer", "surgeon", "teacher", "yoga_teacher",
)  # fmt: skip
"""The professions of the data set; a bio's `profession` is a place in this list."""

_COLUMNS = ("hard_text", "profession", "gender")
_DRAWS = 200  # random prompts in a row that may fail before a space counts as exhausted


class BadBio(UserError):
    """A record is no biography of the data set's form."""


class NoBios(UserError):
    """A name leads to no biographies, or they are too few for what is asked."""


class UnknownProfession(UserError):
    """A profession that the data set does not have, or that no text can be made of here."""


class Gender(IntEnum):
    """As the data set counts them."""

    MALE = 0
    FEMALE = 1

    @property
    def word(self) -> str:
        """`male` or `female`."""
        return self.name.lower()

    @property
    def other(self) -> "Gender":
        return Gender(1 - self)


@dataclass(frozen=True, slots=True)
class Bio:
    """One biography; `profession` is a place in `PROFESSIONS`."""

    text: str
    profession: int
    gender: Gender

    @property
    def group(self) -> str:
        """`female nurse`: by which bios are told apart when a result is broken down."""
        return f"{self.gender.word} {PROFESSIONS[self.profession]}"


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two professions: in the ambiguous set bios of `male` are men's, those of `female` women's."""

    male: str = "professor"
    female: str = "nurse"

    def __post_init__(self) -> None:
        for name in (self.male, self.female):
            profession_number(name)
        if self.male == self.female:
            raise UnknownProfession(f"{self.male!r} twice: two different professions are told apart")

    def has(self, bio: Bio) -> bool:
        """Whether a bio is of either profession."""
        return PROFESSIONS[bio.profession] in (self.male, self.female)

    def label(self, bio: Bio) -> int:
        """1 for the profession `female`, 0 for `male`, whatever the person's own gender."""
        return int(PROFESSIONS[bio.profession] == self.female)

    def congruent(self, bio: Bio) -> bool:
        """Whether profession and gender are as in the ambiguous set."""
        return self.label(bio) == bio.gender


def profession_number(name: str) -> int:
    """The place of a profession; raises `UnknownProfession`."""
    if name not in PROFESSIONS:
        raise UnknownProfession(f"there is no profession {name!r} in Bias in Bios: choose from {', '.join(PROFESSIONS)}")
    return PROFESSIONS.index(name)


# ---- reading and writing


def read_bios(spec: str | Path = DATA_SET, *, split: str = "train", limit: int | None = None) -> Iterator[Bio]:
    """Biographies, in order, at most `limit`: of a JSONL file (which has no splits), a saved data set, or one on the Hugging Face hub.

    Raises `NoBios` for a name that leads nowhere, `BadBio` for a record that is none, with its line where there are lines.
    """
    path = Path(spec)
    return islice(_file_bios(path) if path.is_file() else _data_set_bios(str(spec), split), limit)


def _file_bios(path: Path) -> Iterator[Bio]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8")
                record = json.loads(text) if text.strip() else None
            except (ValueError, RecursionError) as error:
                raise BadBio(f"{path} line {number} is no JSON in UTF-8: {error}") from None
            if record is not None:
                yield _bio(record, f"{path} line {number}")


def _data_set_bios(spec: str, split: str) -> Iterator[Bio]:
    for number, record in enumerate(_open_data_set(spec, split), start=1):
        yield _bio(record, f"{spec} ({split}), record {number},")


def _open_data_set(spec: str, split: str) -> Iterable[dict[str, Any]]:
    # datasets takes a second to import and is needed here only.
    import datasets

    if split not in SPLITS:
        raise NoBios(f"there is no split {split!r}: choose from {', '.join(SPLITS)}")
    path = Path(spec)
    try:
        if path.is_dir() and not any(path.rglob("*.parquet")):
            return datasets.load_from_disk(spec)[split]
        return datasets.load_dataset(spec, split=split, streaming=True)
    except (FileNotFoundError, KeyError, ValueError, OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NoBios(
            f"no biographies {spec!r}: no such file, and as a data set with a split {split!r} it cannot be opened ({reason}); "
            "`featlas tasks bios` makes a file that needs no network"
        ) from error


def _bio(record: object, where: str) -> Bio:
    if not isinstance(record, dict) or any(name not in record for name in _COLUMNS):
        raise BadBio(f"{where} lacks {', '.join(_COLUMNS)}: a biography has a text and two numbers of these names")
    text, profession, gender = (record[name] for name in _COLUMNS)
    if not isinstance(text, str) or not text.strip():
        raise BadBio(f"{where} has hard_text {text!r}, not a text")
    for name, value, n in (("profession", profession, len(PROFESSIONS)), ("gender", gender, len(Gender))):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
            raise BadBio(f"{where} has {name} {value!r}: a whole number from 0 to {n - 1}")
    return Bio(text, profession, Gender(gender))


def write_bios(path: str | Path, bios: Iterable[Bio]) -> int:
    """Write one JSON object a line in the data set's form; returns how many."""
    lines = [
        json.dumps({"hard_text": bio.text, "profession": bio.profession, "gender": int(bio.gender)}, ensure_ascii=False) + "\n" for bio in bios
    ]
    write_text(Path(path), "".join(lines))
    return len(lines)


# ---- selections


def ambiguous(bios: Iterable[Bio], contrast: Contrast, *, n: int | None = None, seed: int = 0) -> list[Bio]:
    """Men of the one profession and women of the other, equally many, shuffled; at most `n` in all. Raises `NoBios`."""
    return _equal_parts(bios, contrast, [(0, Gender.MALE), (1, Gender.FEMALE)], n, seed)


def balanced(bios: Iterable[Bio], contrast: Contrast, *, n: int | None = None, seed: int = 0) -> list[Bio]:
    """Both professions in both genders, the four equally frequent, shuffled; at most `n` in all. Raises `NoBios`."""
    return _equal_parts(bios, contrast, list(product((0, 1), Gender)), n, seed)


def _equal_parts(bios: Iterable[Bio], contrast: Contrast, parts: list[tuple[int, Gender]], n: int | None, seed: int) -> list[Bio]:
    """Of each part (label, gender) as many as of the rarest, the first ones in order, shuffled by the seed."""
    found: dict[tuple[int, Gender], list[Bio]] = {part: [] for part in parts}
    for bio in bios:
        part = (contrast.label(bio), bio.gender)
        if contrast.has(bio) and part in found:
            found[part].append(bio)
    size = min(map(len, found.values()))
    size = size if n is None else min(size, n // len(parts))
    if not size:
        counts = ", ".join(f"{gender.word} {(contrast.male, contrast.female)[label]}: {len(group)}" for (label, gender), group in found.items())
        raise NoBios(f"too few biographies for {len(parts)} equal parts ({counts}): take more of them, or other professions")
    chosen = [bio for group in found.values() for bio in group[:size]]
    random.Random(seed).shuffle(chosen)
    return chosen


# ---- bios made here

# Sentences by what they say; {They} she/he, {their} her/his, capital as written.
_WORK: dict[str, tuple[str, ...]] = {
    "nurse": (
        "{They} cares for patients on a busy hospital ward.", "{Their} work includes giving medication and dressing wounds.",
        "{They} spent ten years in intensive care.", "{They} looks after newborn babies and their families.",
        "{They} is licensed and works night shifts at the clinic.", "{Their} patients praise the care that they receive.",
        "{They} trained on a surgical ward before joining the clinic.", "{They} visits elderly patients at home.",
    ),
    "professor": (
        "{Their} research appears in many academic journals.", "{They} holds a chair in the department of physics.",
        "{They} supervises doctoral students and gives lectures.", "{They} is the author of two scholarly books on economic theory.",
        "{Their} lectures at the university draw many students.", "{They} leads a research group at the university.",
        "{They} received tenure for work on number theory.", "{They} has edited a journal of history and philosophy.",
    ),
    "surgeon": (
        "{They} performs operations on the knee and the hip.", "{Their} speciality is the repair of heart valves.",
        "{They} is board certified and has operated on thousands of patients.", "{They} completed a residency in surgery.",
        "{They} developed a less invasive operation for the spine.", "{Their} practice offers reconstructive operations.",
    ),
    "teacher": (
        "{They} helps children learn to read and write.", "{Their} classroom has twenty eager pupils.",
        "{They} has taught fourth grade for many years.", "{They} plans lessons in English and mathematics.",
        "{Their} pupils enjoy the school projects.", "{They} coaches the school's chess club.",
    ),
}  # fmt: skip
_ELSE = (
    "{They} lives near the coast with two dogs.", "In {their} free time {they} enjoys hiking and cooking.", "{They} grew up in a small town.",
    "{Their} family comes from the north of the country.", "{They} speaks three languages.", "{They} moved to the city five years ago.",
    "On weekends {they} likes to play the guitar.", "{They} enjoys travelling with {their} children.", "{They} studied abroad for a year.",
    "{Their} friends know that {they} loves old films.", "{They} runs a marathon every spring.", "{They} volunteers for a local charity.",
)  # fmt: skip
_WORDS = {Gender.MALE: ("he", "his"), Gender.FEMALE: ("she", "her")}


def make_bios(n: int, *, contrast: Contrast | None = None, stereotyped: float = 0.5, seed: int = 0) -> list[Bio]:
    """`n` distinct biographies of a contrast's two professions in turn: three to five sentences, one or two of them about the work.

    `stereotyped` is the probability that the gender is the one that goes with the profession in the ambiguous set: 0.5 is
    balanced, 1 ambiguous. Raises `UnknownProfession` where there are no sentences, `NoBios` where `n` or the share cannot be had.
    """
    contrast = contrast or Contrast()
    if unknown := [name for name in (contrast.male, contrast.female) if name not in _WORK]:
        raise UnknownProfession(f"no text can be made of {unknown[0]!r}: choose from {', '.join(_WORK)}, or read the data set")
    if n < 1 or not 0 <= stereotyped <= 1:
        raise NoBios(f"{n} bios with a share of {stereotyped} cannot be made: give 1 or more, and a share from 0 to 1")
    rng = random.Random(f"bios:{seed}")
    made: dict[str, Bio] = {}
    failed = 0
    while len(made) < n and failed < _DRAWS:
        own = Gender(len(made) % 2)
        gender = own if rng.random() < stereotyped else own.other
        text = _text((contrast.male, contrast.female)[own], gender, rng)
        failed = failed + 1 if text in made else 0
        made.setdefault(text, Bio(text, profession_number((contrast.male, contrast.female)[own]), gender))
    if len(made) < n:
        raise NoBios(f"only {len(made)} different bios were found, not {n}: ask for fewer")
    return list(made.values())


def _text(profession: str, gender: Gender, rng: random.Random) -> str:
    sentences = rng.sample(_WORK[profession], rng.choice((1, 2))) + rng.sample(_ELSE, rng.choice((2, 3)))
    rng.shuffle(sentences)
    they, their = _WORDS[gender]
    return " ".join(sentences).format(they=they, their=their, They=they.capitalize(), Their=their.capitalize())


# ---- gender turned round

_SWAPS = {
    "she": "he", "herself": "himself", "hers": "his", "woman": "man", "women": "men", "mother": "father", "daughter": "son", "wife": "husband",
    "sister": "brother", "girl": "boy", "girls": "boys", "mrs": "mr", "ms": "mr", "lady": "gentleman", "actress": "actor",
}  # fmt: skip
_BACK = {"he": "she", "him": "her", "his": "her", "himself": "herself", "mr": "mrs"}
# What follows `her` where it is an object: without a parser a short list of words that begin no noun phrase.
_NO_NOUN = frozenset(
    (
        "and", "or", "but", "to", "in", "on", "at", "for", "with", "as", "by", "from", "that", "who", "when", "where", "while", "because", "if",
        "into", "onto", "about", "over", "after", "before", "through", "is", "was",
    )
)  # fmt: skip
_TURNED = {**{new: old for old, new in reversed(_SWAPS.items())}, **_SWAPS, **_BACK}
_GENDERED = re.compile(rf"\b({'|'.join(sorted([*_TURNED, 'her'], key=len, reverse=True))})\b(?=(\s+(\w+))?)", re.IGNORECASE)


def swap_gender(text: str) -> str:
    """The text with its gendered words turned round; names stay. `her` becomes `his` before a noun, as far as a word list can tell, else `him`."""

    def turned(match: re.Match[str]) -> str:
        word, following = match[1], (match[3] or "").lower()
        new = ("him" if not following or following in _NO_NOUN else "his") if word.lower() == "her" else _TURNED[word.lower()]
        return new.upper() if len(word) > 1 and word.isupper() else new.capitalize() if word[0].isupper() else new

    return _GENDERED.sub(turned, text)


def bio_pairs(bios: Sequence[Bio], tokenizer: Any, *, length: int | None = None) -> list[tuple[Bio, Pair]]:
    """Bios as pairs: clean is the text, cut at `length` tokens, corrupt the same with the gender turned round, the answer `she` or `he`.

    The label is the bio's group. Left out are bios whose gender no word (within the length) tells, those whose two texts have different
    numbers of tokens, and repeated ones.
    """
    answers = {Gender.FEMALE: " she", Gender.MALE: " he"}
    texts = [_cut(bio.text.strip(), tokenizer, length) for bio in bios]
    pairs = [
        Pair(text, swap_gender(text), answers[bio.gender], answers[bio.gender.other], "bios", bio.group)
        for bio, text in zip(bios, texts, strict=True)
    ]
    fitting: dict[str, tuple[Bio, Pair]] = {}
    for bio, pair, encoded in zip(bios, pairs, encode_pairs(pairs, tokenizer), strict=True):
        if not isinstance(encoded, str) and encoded.clean != encoded.corrupt:
            fitting.setdefault(pair.key, (bio, pair))
    return list(fitting.values())


def _cut(text: str, tokenizer: Any, length: int | None) -> str:
    """The text's first `length` tokens as a text, special tokens counted but not written."""
    if length is None:
        return text
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    if len(ids) <= length:
        return text
    special = len(ids) - len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tokenizer.decode(ids[special:length])


def turned(pair: Pair) -> Pair:
    """The pair seen from its other side: a person of the other gender, who has the other pronoun for an answer, and the same profession."""
    about_gender = pair.answer.strip() in {they for they, _ in _WORDS.values()}
    answers = (pair.wrong_answer, pair.answer) if about_gender else (pair.answer, pair.wrong_answer)
    gender, _, rest = (pair.label or "").partition(" ")
    other = Gender[gender.upper()].other.word
    return Pair(pair.corrupt, pair.clean, *answers, pair.task, f"{other} {rest}")


# ---- questions


class Question(StrEnum):
    """What a short biography's prompt asks for."""

    PROFESSION = "profession"
    GENDER = "gender"


STEREOTYPES = {Gender.FEMALE: ("nurse", "teacher"), Gender.MALE: ("doctor", "professor")}
"""Professions of `words.BIOGRAPHIES` that language models expect of a gender."""

_BEGINNING = "My friend {name} {fact}. {They}"
_ENDINGS = {
    Question.PROFESSION: ("worked as a", "got a job as a", "had always wanted to be a"),
    Question.GENDER: ("was tired, because", "was happy when", "stopped for a while, since"),
}


def question_pairs(question: Question, tokenizer: Any, *, n: int, seed: int = 0) -> list[Pair]:
    """`n` distinct pairs that ask for the profession or the gender after the same beginnings: `My friend Mary cared for patients in a hospital. She`.

    The corrupt prompt has a name and pronoun of the other gender. The profession's wrong answer is a profession that is
    expected of the other gender (`STEREOTYPES`), so that a model which goes by gender answers half of the pairs wrongly. The labels, gender
    and profession, take turns. Raises `NoBios` where the tokenizer allows fewer.
    """
    vocabulary = Vocabulary(tokenizer)
    names = {Gender.FEMALE: vocabulary.single(words.FEMALE_NAMES), Gender.MALE: vocabulary.single(words.MALE_NAMES)}
    professions = {gender: vocabulary.single(own) for gender, own in STEREOTYPES.items()}
    kinds = [(gender, expected, name) for expected, own in professions.items() for name in own for gender in Gender]
    rng = random.Random(f"bios:{question.value}:{seed}")
    found: dict[str, Pair] = {}
    failed = 0
    while len(found) < n and failed < _DRAWS and kinds and all(names.values()) and all(professions.values()):
        gender, expected, profession = kinds[len(found) % len(kinds)]
        wrong = rng.choice(professions[expected.other])
        pair = _question_pair(question, gender, (profession, wrong), names, rng)
        fits = not isinstance(next(encode_pairs([pair], tokenizer)), str) and pair.key not in found
        failed = 0 if fits else failed + 1
        if fits:
            found[pair.key] = pair
    if len(found) < n:
        raise NoBios(f"{len(found)} distinct {question.value} questions were found for this tokenizer: ask for no more than that, not {n}")
    return list(found.values())


def _question_pair(
    question: Question, gender: Gender, professions: tuple[str, str], names: dict[Gender, tuple[str, ...]], rng: random.Random
) -> Pair:
    fact, ending = rng.choice(words.BIOGRAPHIES[professions[0]]), rng.choice(_ENDINGS[question])
    clean, corrupt = (
        f"{_BEGINNING.format(name=rng.choice(names[one]), fact=fact, They=_WORDS[one][0].capitalize())} {ending}" for one in (gender, gender.other)
    )
    answer, wrong = professions if question is Question.PROFESSION else (_WORDS[gender][0], _WORDS[gender.other][0])
    return Pair(clean, corrupt, f" {answer}", f" {wrong}", f"bios_{question.value}", f"{gender.word} {professions[0]}")
