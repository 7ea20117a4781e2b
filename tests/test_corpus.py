"""Corpora from every source, wrong bytes and records named by place, and the blocks of tokens cut from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from featlas.errors import UserError
from featlas.model.corpus import BadRecord, NoCorpus, NotUtf8, prompt_tokens, read_texts, token_blocks

from .micro import word_tokenizer

# w0 is both the end-of-text and the beginning-of-text token here, as in the tiny models.
TOKENIZER = word_tokenizer()
TOKENIZER.eos_token = "w0"


def ids(*numbers: int) -> list[int]:
    return TOKENIZER(" ".join(f"w{n}" for n in numbers))["input_ids"]


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("eins\nzwei\n", encoding="utf-8")
    assert list(read_texts(str(tmp_path / "a.txt"))) == ["eins\nzwei\n"]


def test_a_long_text_file_comes_in_pieces_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 1000 + "\n\n"  # 5002 characters
    (tmp_path / "a.txt").write_text(paragraph * 9, encoding="utf-8")
    pieces = list(read_texts(str(tmp_path / "a.txt")))
    assert [len(piece) for piece in pieces] == [20007, 20008, 5003]
    assert "".join(pieces) == paragraph * 9


def test_a_folder_gives_its_texts_by_path_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.md").write_text("three")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a2.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "skipped.py").write_text("print()")
    assert list(read_texts(str(tmp_path))) == ["one", "two", "three"]
    assert list(read_texts(str(tmp_path), limit=2)) == ["one", "two"]


def test_jsonl_gives_text_and_skips_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ä"}\n\n{"text": "b", "source": "x"}\n', encoding="utf-8")
    assert list(read_texts(path)) == ["ä", "b"]


@pytest.mark.parametrize(("line", "complaint"), [("{broken", "is no JSON"), ('{"txt": "a"}', 'no string "text"'), ("[1]", 'no string "text"')])
def test_a_wrong_record_is_named_by_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(BadRecord, match=rf"a\.jsonl line 2 .*{complaint}"):
        list(read_texts(tmp_path / "a.jsonl"))


def test_text_that_is_not_utf_8_is_named_by_file_and_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("gut\nÄhre ".encode() + b"caf\xe9\n")
    with pytest.raises(NotUtf8, match=r"a\.txt is not UTF-8 text: byte 13 is 0xe9"):
        list(read_texts(tmp_path / "a.txt"))


def test_an_empty_folder_and_an_unknown_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoCorpus, match=r"holds no text"):
        list(read_texts(tmp_path))
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(NoCorpus, match=r"'some/data'.*offline"):
        list(read_texts("some/data"))


def test_saved_and_parquet_data_sets_are_read(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    data.save_to_disk(tmp_path / "saved")
    assert list(read_texts(tmp_path / "saved")) == ["one", "two"]
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    assert list(read_texts(tmp_path / "splits")) == ["one", "two"]
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    assert list(read_texts(tmp_path / "parquet")) == ["one", "two"]
    data.rename_column("text", "body").save_to_disk(tmp_path / "other")
    with pytest.raises(NoCorpus, match="its columns are body, id"):
        list(read_texts(tmp_path / "other"))


def test_blocks_join_texts_with_the_end_of_text_token() -> None:
    blocks = list(token_blocks(["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"], TOKENIZER, 4))
    assert [block.tolist() for block in blocks] == [ids(1, 2, 3, 0), ids(4, 0, 5, 6), ids(7, 8, 9, 0)]
    assert blocks[0].dtype == torch.int64
    assert [b.tolist() for b in token_blocks(["w1 w2 w3 w4"], TOKENIZER, 3, limit=1)] == [ids(1, 2, 3)]


def test_blocks_start_with_the_token_that_the_tokenizer_itself_puts_first() -> None:
    class Beginning:
        bos_token_id, eos_token_id = 9, None

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [9] * add_special_tokens + [ord(c) for c in text]}

    assert [b.tolist() for b in token_blocks(["\x01\x02\x03\x04\x05"], Beginning(), 3)] == [[9, 1, 2], [9, 3, 4]]


def test_blocks_of_one_token_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        token_blocks(["w1"], TOKENIZER, 1)


def test_prompts_stay_apart_and_are_cut() -> None:
    assert [t.tolist() for t in prompt_tokens(["w1 w2", "w3", "w4 w5 w6 w7"], TOKENIZER, longest=3)] == [ids(1, 2), ids(4, 5, 6)]


def test_texts_are_streamed(tmp_path: Path) -> None:
    """A wrong line at the end is met only when it is reached: nothing was read ahead."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(5)) + "broken\n")
    stream = read_texts(tmp_path / "a.jsonl")
    assert [next(stream) for _ in range(5)] == ["0", "1", "2", "3", "4"]
    with pytest.raises(BadRecord):
        next(stream)
