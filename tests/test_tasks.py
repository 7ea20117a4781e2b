"""Tasks, pairs and batches on a small byte-level tokenizer trained here, on a word-level one, and on SmolLM2's own."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from featlas.model import words
from featlas.model.pairs import _DUPLICATE, NoDonor, donors, encode_pairs
from featlas.model.task_templates import _expression, _value
from featlas.model.tasks import (
    TASKS,
    InvalidPairs,
    NoPairs,
    Pair,
    Refusal,
    TaskTooSmall,
    UnknownTask,
    batches,
    build_task,
    load_task,
    read_pairs,
    write_pairs,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .micro import word_tokenizer


def word_pieces(number: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every word of the word lists after a space, letters otherwise; `number` matches one token of digits."""
    forms = [word for pair in words.PEOPLE + words.THINGS + words.COPULAS + words.RELATIONS for word in pair]
    known = {*forms, *words.FEMALE_NAMES, *words.MALE_NAMES, *words.ADJECTIVES, *words.PLACES, *words.GIFTS, *words.EVENTS, *words.NUMBER_WORDS}
    known |= {*words.BIOGRAPHIES, "she", "he", "True", "False"}
    pieces = {f"Ġ{word}" for word in known} | {str(i) for i in range(100)} | {f"{i:02}" for i in range(10)}
    entries = [*pre_tokenizers.ByteLevel.alphabet(), *sorted(piece for piece in pieces if len(piece) > 1)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(entries)}, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(rf"{number}| ?[A-Za-z]+|[^A-Za-z0-9]"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_pieces("[0-9]")


def tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


# ---- the generators


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_pairs_fit_the_tokenizer(name: str, tokenizer: Any) -> None:
    pairs = build_task(name, tokenizer, n=120)
    assert len({pair.key for pair in pairs}) == 120
    for pair in pairs:
        clean, corrupt = tokens(tokenizer, pair.clean), tokens(tokenizer, pair.corrupt)
        assert len(clean) == len(corrupt)
        assert clean != corrupt
        for answer in (pair.answer, pair.wrong_answer):
            assert tokens(tokenizer, pair.clean + answer)[:-1] == clean
            assert len(tokens(tokenizer, answer)) == 1
        assert pair.answer != pair.wrong_answer
        assert pair.task == name


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_labels_are_balanced_and_draws_are_repeatable(name: str, tokenizer: Any) -> None:
    pairs = build_task(name, tokenizer, n=64, seed=3)
    counts = Counter(pair.label for pair in pairs)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert build_task(name, tokenizer, n=64, seed=3) == pairs
    assert build_task(name, tokenizer, n=40, seed=3) == pairs[:40]
    assert build_task(name, tokenizer, n=64, seed=4) != pairs


def test_draws_never_change() -> None:
    (pair,) = build_task("agreement", word_pieces("[0-9]"), n=1, seed=0)
    assert pair.label == "singular"
    assert pair.clean.removesuffix(pair.clean.split()[-1]) == pair.corrupt.removesuffix(pair.corrupt.split()[-1])


@pytest.mark.parametrize(("name", "opposite"), [("agreement", "number"), ("agreement_rc", "number"), ("pronoun", "gender")])
def test_one_word_differs_and_the_answer_follows_it(name: str, opposite: str, tokenizer: Any) -> None:
    numbers = {word: i for pair in words.PEOPLE + words.THINGS for i, word in enumerate(pair)}
    genders = {**dict.fromkeys(words.FEMALE_NAMES, 0), **dict.fromkeys(words.MALE_NAMES, 1)}
    value = {"number": numbers, "gender": genders}[opposite]
    order = {"number": [form for pair in words.COPULAS for form in pair], "gender": ["she", "he"]}[opposite]
    for pair in build_task(name, tokenizer, n=200):
        differing = [(a.strip(","), b.strip(",")) for a, b in zip(pair.clean.split(), pair.corrupt.split(), strict=True) if a != b]
        assert len(differing) == 1
        clean, corrupt = differing[0]
        assert value[clean] == 1 - value[corrupt] == order.index(pair.answer.strip()) % 2
        assert order.index(pair.wrong_answer.strip()) % 2 == value[corrupt]


def test_relative_clauses_agree_within_and_attract_half_of_the_time(tokenizer: Any) -> None:
    number = {word: i for pair in words.PEOPLE for i, word in enumerate(pair)}
    verb_number = {word: i for pair in words.RELATIONS for i, word in enumerate(pair)}
    pairs = build_task("agreement_rc", tokenizer, n=400)
    clauses = [pair.clean.split() for pair in pairs]
    assert all(number[c[4]] == verb_number[c[5]] for c in clauses)
    attracting = sum(number[c[1]] != number[c[4]] for c in clauses)
    assert 160 < attracting < 240


def test_the_receiver_is_the_one_named_once(tokenizer: Any) -> None:
    for pair in build_task("ioi", tokenizer, n=200):
        names = lambda text: [word.strip(".,") for word in text.split() if word.strip(".,") in words.FEMALE_NAMES + words.MALE_NAMES]
        clean, corrupt = Counter(names(pair.clean)), Counter(names(pair.corrupt))
        assert clean == {pair.answer.strip(): 1, pair.wrong_answer.strip(): 2}
        assert corrupt == {pair.answer.strip(): 2, pair.wrong_answer.strip(): 1}
        first = names(pair.clean)[0] == pair.answer.strip()
        assert pair.label == ("receiver first" if first else "receiver second")


@pytest.mark.parametrize(("number", "digits"), [("[0-9]", 1), ("[0-9]{2}", 2)])
def test_years_for_tokenizers_of_one_and_of_two_digits(number: str, digits: int) -> None:
    for pair in build_task("greater_than", word_pieces(number), n=200):
        start, early, century = pair.clean.split()[6], pair.corrupt.split()[6], pair.clean.split()[-1]
        assert len(pair.answer) == len(pair.wrong_answer) == digits
        year, wrong, before = int(start[2 : 2 + digits]), int(pair.wrong_answer), int(early[2 : 2 + digits])
        assert before < wrong < year < int(pair.answer)
        assert start.startswith(century)
        assert early.startswith(century)
        assert pair.label == century


def test_number_words_for_tokenizers_of_other_digits() -> None:
    count = {word: i for i, word in enumerate(words.NUMBER_WORDS, start=1)}
    for pair in build_task("greater_than", word_pieces("[0-9]{3,}"), n=200):
        clean, corrupt = count[pair.clean.split()[-2]], count[pair.corrupt.split()[-2]]
        assert corrupt < count[pair.wrong_answer.strip()] < clean < count[pair.answer.strip()]


def test_boolean_answers_are_what_python_says(tokenizer: Any) -> None:
    for pair in build_task("boolean", tokenizer, n=200):
        clean, corrupt = (text.splitlines()[-1].removesuffix(" ==") for text in (pair.clean, pair.corrupt))
        assert f" {eval(clean)}" == pair.answer
        assert f" {eval(corrupt)}" == pair.wrong_answer
        assert sum(a != b for a, b in zip(clean.split(), corrupt.split(), strict=True)) == 1
        shown = [line.split(" == ") for line in pair.clean.splitlines()[:-1]]
        assert all(str(eval(expression)) == value for expression, value in shown)


@given(st.lists(st.tuples(st.sampled_from(["and", "or"]), st.booleans()), min_size=1, max_size=7))
def test_value_of_an_expression(parts: list[tuple[str, bool]]) -> None:
    literals, operators = [value for _, value in parts], [operator for operator, _ in parts[1:]]
    spelt = _expression(literals, operators)
    assert _value(literals, operators) == eval(spelt)


@pytest.mark.slow
def test_professions_differ_and_gender_does_not(tokenizer: Any) -> None:
    gender = {**dict.fromkeys(words.FEMALE_NAMES, "female"), **dict.fromkeys(words.MALE_NAMES, "male")}
    pairs = build_task("profession_gender", tokenizer, n=240)
    for pair in pairs:
        assert pair.label == f"{gender[pair.clean.split()[2]]}{pair.answer}"
        assert pair.clean.split()[:3] == pair.corrupt.split()[:3]
        assert pair.clean.split()[-4:] == pair.corrupt.split()[-4:]
        assert ("She" in pair.clean.split()) == pair.label.startswith("female")
        for text, profession in ((pair.clean, pair.answer), (pair.corrupt, pair.wrong_answer)):
            assert any(fact in text for fact in words.BIOGRAPHIES[profession.strip()])
            assert profession.strip() not in text


def test_mixture_takes_turns(tokenizer: Any) -> None:
    pairs = build_task("agreement+ioi+pronoun", tokenizer, n=8)
    assert [pair.task for pair in pairs] == ["agreement", "ioi", "pronoun"] * 2 + ["agreement", "ioi"]
    assert [pair for pair in pairs if pair.task == "ioi"] == build_task("ioi", tokenizer, n=3)


def test_what_cannot_be_built(tokenizer: Any) -> None:
    with pytest.raises(UnknownTask, match=r"no task 'ioj': choose from agreement, .*\.jsonl"):
        build_task("agreement+ioj", tokenizer, n=4)
    with pytest.raises(TaskTooSmall, match="0 pairs"):
        build_task("ioi", tokenizer, n=0)
    with pytest.raises(TaskTooSmall, match="'pronoun' has 0 distinct pairs for this tokenizer"):
        build_task("pronoun", word_tokenizer(("she", "he")), n=4)


def test_a_task_is_exhausted_exactly() -> None:
    # Two women, two men, five sentences: 2·2 pairs of names, each in five sentences and two directions.
    few = word_tokenizer(("Mary", "Anna", "John", "Paul", "she", "he"))
    assert len(build_task("pronoun", few, n=40)) == 40
    with pytest.raises(TaskTooSmall, match="has 40 distinct pairs"):
        build_task("pronoun", few, n=41)


# ---- records and batches


def test_key_is_a_hash_of_the_content() -> None:
    pair = Pair("a", "b", " c", " d", "t")
    assert pair.key == hashlib.sha256(b'["t", "a", "b", " c", " d"]').hexdigest()[:24]
    assert Pair("a", "b", " c", " d", "t", "label").key == pair.key
    assert len({pair.key, Pair("a", "b", " c", " d", "u").key, Pair("a", "b", " d", " c", "t").key}) == 3


def word_pairs() -> Iterator[Pair]:
    """Pairs of 2, 3, 2, 2, 3 words."""
    for i, length in enumerate((2, 3, 2, 2, 3)):
        head = [f"w{i}", "w9", "w9"][: length - 1]
        yield Pair(" ".join([*head, "w10"]), " ".join([*head, "w11"]), " w1", " w2", "t")


def test_batches_by_hand() -> None:
    tokenizer = word_tokenizer()
    found = list(batches(word_pairs(), tokenizer, batch_size=2))
    assert [[tuple(row) for row in batch.clean.tolist()] for batch in found] == [[(0, 10), (2, 10)], [(1, 9, 10), (4, 9, 10)], [(3, 10)]]
    assert [batch.corrupt[:, -1].tolist() for batch in found] == [[11, 11], [11, 11], [11]]
    assert all(set(batch.answer.tolist()) == {1} and set(batch.wrong_answer.tolist()) == {2} for batch in found)
    assert [batch.first_difference.tolist() for batch in found] == [[1, 1], [2, 2], [1]]
    assert [pair.clean for pair in found[2].pairs] == ["w3 w10"]
    assert found[0].clean.dtype == torch.int64
    moved = found[0].to("meta")
    assert moved.clean.device.type == moved.answer.device.type == "meta"
    assert moved.pairs == found[0].pairs


def test_first_difference_of_equal_prompts() -> None:
    pairs = [Pair("w1 w2", "w1 w2", " w3", " w4", "t"), Pair("w1 w2", "w5 w2", " w3", " w4", "t")]
    (batch,) = batches(pairs, word_tokenizer(), batch_size=8)
    assert batch.first_difference.tolist() == [2, 0]


def test_batches_refuse_what_does_not_fit() -> None:
    with pytest.raises(InvalidPairs, match="clean has 2 tokens and corrupt 1"):
        list(batches([Pair("w1 w2", "w1", " w3", " w4", "t")], word_tokenizer(), batch_size=2))


def donor_pairs() -> list[Pair]:
    """Nine pairs of two tokens, of which three share their clean prompt, and four of three tokens."""
    short = [Pair(f"w{i} w9", f"w{i} w8", " w1", " w2", "t") for i in range(6)] + [Pair("w7 w9", f"w{i} w9", " w1", " w2", "t") for i in (1, 2, 3)]
    long = [Pair(f"w{i} w5 w9", f"w{i} w6 w9", " w1", " w2", "t") for i in range(4)]
    return [pair for i in range(9) for pair in (short[i], *long[i : i + 1])]


def test_donors_are_others_of_equal_length_whatever_the_batches() -> None:
    tokenizer, pairs = word_tokenizer(), donor_pairs()
    found = {}
    for batch_size in (1, 2, 3, 100):
        rows = {}
        for batch in batches(pairs, tokenizer, batch_size=batch_size, donor_seed=3):
            assert batch.donor is not None
            assert batch.donor.shape == batch.clean.shape
            rows |= {pair.key: tuple(row) for pair, row in zip(batch.pairs, batch.donor.tolist(), strict=True)}
            assert batch.to("meta").donor.device.type == "meta"
        found[batch_size] = rows
    assert len(found[1]) == len(pairs)
    assert all(rows == found[1] for rows in found.values())
    cleans = {tuple(tokens(tokenizer, pair.clean)) for pair in pairs}
    for pair in pairs:
        donor = found[1][pair.key]
        assert donor in cleans
        assert donor != tuple(tokens(tokenizer, pair.clean))
        assert len(donor) == len(tokens(tokenizer, pair.clean))
    differently = [batch.donor for batch in batches(pairs, tokenizer, batch_size=100, donor_seed=4)]
    assert any(not torch.equal(a, b.donor) for a, b in zip(differently, batches(pairs, tokenizer, batch_size=100, donor_seed=3), strict=True))
    assert all(batch.donor is None for batch in batches(pairs, tokenizer, batch_size=4))


def test_donors_are_drawn_evenly() -> None:
    tokenizer, pairs = word_tokenizer(), donor_pairs()
    encoded = [one for one in encode_pairs(pairs, tokenizer) if not isinstance(one, str)]
    drawn = Counter(donors(pairs, encoded, seed)[0] for seed in range(600))
    assert len(drawn) == 6  # the five other prompts of its length and the one that three pairs share
    assert all(60 < n < 140 for n in drawn.values())


def test_a_pair_alone_of_its_length_has_no_donor() -> None:
    pairs = [*donor_pairs(), Pair("w1 w2 w3 w4", "w1 w2 w3 w5", " w1", " w2", "t")]
    with pytest.raises(NoDonor, match=r"'w1 w2 w3 w4' has 4 tokens, and no other pair .*--limit.*--baseline"):
        list(batches(pairs, word_tokenizer(), batch_size=4, donor_seed=0))
    twins = [Pair("w1 w2", f"w{i} w2", " w1", " w2", "t") for i in (3, 4)]
    (batch,) = batches(twins, word_tokenizer(), batch_size=4, donor_seed=0)
    assert batch.donor.tolist() == [[1, 2], [1, 2]]


# ---- files


GOOD = {"clean": "w1 w2", "corrupt": "w3 w2", "answer": " w4", "wrong_answer": " w5"}


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n")
    return path


def test_file_there_and_back(tmp_path: Path, tokenizer: Any) -> None:
    pairs = build_task("ioi+boolean", tokenizer, n=20)
    assert write_pairs(tmp_path / "pairs.jsonl", pairs) == 20
    assert read_pairs(tmp_path / "pairs.jsonl", tokenizer) == (pairs, [])
    assert load_task(str(tmp_path / "pairs.jsonl"), tokenizer, n=5, seed=0) == pairs[:5]


def test_task_and_label_are_optional(tmp_path: Path) -> None:
    named, unlabelled = {**GOOD, "clean": "w2 w1", "task": "other", "label": "l"}, {**GOOD, "clean": "w6 w1", "label": None}
    path = write(tmp_path / "mine.jsonl", GOOD, b"", named, unlabelled)
    pairs, refusals = read_pairs(path, word_tokenizer())
    assert [(pair.task, pair.label) for pair in pairs] == [("mine", None), ("other", "l"), ("mine", None)]
    assert refusals == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"clean": ', "not JSON: Expecting value at column 11"),
        (b"[1]", "not an object but a list"),
        ({k: v for k, v in GOOD.items() if k not in ("answer", "corrupt")}, "lacks 'corrupt', 'answer'"),
        ({**GOOD, "lable": "x"}, "has 'lable', which no pair has"),
        ({**GOOD, "answer": 4}, "answer is 4, not a text"),
        ({**GOOD, "clean": None}, "clean is null, not a text"),
        ({**GOOD, "answer": ""}, "answer is empty"),
        ({**GOOD, "clean": "w1"}, "clean has 1 tokens and corrupt 2"),
        ({**GOOD, "answer": " w4 w6"}, r"answer ' w4 w6' is 2 tokens \('w4', 'w6'\), not one"),
        ({**GOOD, "answer": " zebra"}, "answer ' zebra' is unknown to the tokenizer"),
        ({**GOOD, "wrong_answer": "w5"}, r"wrong_answer 'w5' is joined to the end of the prompt"),
        ({**GOOD, "wrong_answer": "  w4"}, "' w4' and wrong_answer '  w4' are the same token"),
        (b'{"clean": "\\ud800 w2", "corrupt": "w3 w2", "answer": " w4", "wrong_answer": " w5"}', "clean holds half of a surrogate pair"),
        (b'{"clean": "caf\xe9"}', r"not UTF-8 at byte 93 of the file \(0xe9\)"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_lines_that_are_no_pair(line: object, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, line, {**GOOD, "clean": "w7 w7"}, {**GOOD, "answer": 1})
    with pytest.raises(InvalidPairs, match=rf"bad\.jsonl line 2: .*{reason}.*\(and 1 more lines\); correct the file, or .*--skip-invalid") as raised:
        read_pairs(path, word_tokenizer())
    assert "\n" not in str(raised.value)
    pairs, refusals = read_pairs(path, word_tokenizer(), skip_invalid=True)
    assert [pair.clean for pair in pairs] == ["w1 w2", "w7 w7"]
    assert [refusal.line for refusal in refusals] == [2, 4]


def test_repeated_pairs_are_kept_once_and_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "twice.jsonl", GOOD, {**GOOD, "clean": "w7 w7"}, GOOD)
    pairs, refusals = read_pairs(path, word_tokenizer())
    assert len(pairs) == 2
    assert refusals == [Refusal(3, f"{_DUPLICATE}1")]
    assert refusals[0].duplicate
    reported: list[tuple[str, Refusal]] = []
    assert load_task(str(path), word_tokenizer(), n=9, report=lambda name, refusal: reported.append((name, refusal))) == pairs
    assert reported == [(str(path), refusals[0])]


def test_files_without_pairs(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(NoPairs, match=r"empty\.jsonl holds no pairs: it is empty"):
        read_pairs(tmp_path / "empty.jsonl", word_tokenizer())
    with pytest.raises(NoPairs, match=r"cannot be read: No such file"):
        load_task(str(tmp_path / "absent.jsonl"), word_tokenizer(), n=1)
    with pytest.raises(NoPairs, match=r"no valid pair: line 1: not an object"):
        read_pairs(write(tmp_path / "bad.jsonl", b"1"), word_tokenizer(), skip_invalid=True)


def test_bytes_of_windows_editors(tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    pairs, refusals = read_pairs(tmp_path / "w.jsonl", word_tokenizer())
    assert (len(pairs), refusals) == (1, [])


def test_mixture_with_a_file_and_a_plus_in_its_name(tmp_path: Path, tokenizer: Any) -> None:
    own = build_task("agreement", tokenizer, n=3, seed=9)
    write_pairs(tmp_path / "own.jsonl", own)
    mixed = load_task(f"ioi+{tmp_path}/own.jsonl", tokenizer, n=10, seed=0)
    assert [pair.task for pair in mixed] == ["ioi", "agreement"] * 3 + ["ioi"] * 2
    write_pairs(tmp_path / "a+b.jsonl", own)
    assert load_task(f"{tmp_path}/a+b.jsonl", tokenizer, n=10, seed=0) == own


def test_every_task_says_what_it_is() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert "\n" not in task.summary
        assert len(task.summary) < 120 < len(task.feature) + 60
        assert "Labels:" in task.feature


# ---- SmolLM2's own tokenizer


@pytest.mark.smollm2
@pytest.mark.parametrize("name", TASKS)
def test_thousands_of_pairs_for_smollm2(name: str) -> None:
    from featlas.model.loading import find_source
    from transformers import AutoTokenizer

    smollm2 = AutoTokenizer.from_pretrained(find_source("smollm2").folder)
    pairs = build_task(name, smollm2, n=2000)
    assert len({pair.key for pair in pairs}) == 2000
    assert sum(len(batch.pairs) for batch in batches(pairs, smollm2, batch_size=64)) == 2000
