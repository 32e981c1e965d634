"""Calibration text: what is read, what is refused, and which windows are taken."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from spinfer.errors import SpinferError
from spinfer.pruning import read_texts, sample_tokens
from spinfer.pruning.calibration import digest


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_text("third", encoding="utf-8")
    lines = [json.dumps({"text": "first", "id": 1}), "", json.dumps({"text": "fürst"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert read_texts(tmp_path) == ["first", "fürst", "second", "third"]
    assert read_texts(tmp_path / "a.jsonl") == ["first", "fürst"]
    (tmp_path / "notes.md").write_text("any name will do", encoding="utf-8")
    assert read_texts(tmp_path / "notes.md") == ["any name will do"]


@pytest.mark.parametrize("content", [b"", b"  \n\t\n"])
def test_empty_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    for path in (tmp_path / "t.txt", tmp_path):
        with pytest.raises(SpinferError, match="it is empty"):
            read_texts(path)


def test_directories_without_text(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(SpinferError, match=r"holds no \.txt or \.jsonl file"):
        read_texts(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x80", b"abc\x00def"])
def test_files_that_are_not_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(SpinferError, match=r"t\.txt.*(UTF-8|NUL)"):
        read_texts(tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpinferError, match=r"nowhere\.txt: cannot be read"):
        read_texts(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("line", ["not json", '{"body": "x"}', '["text"]', '{"text": 5}', "3"])
def test_lines_that_are_not_samples(line: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"text": "good"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(SpinferError, match=r"t\.jsonl, line 2.*text"):
        read_texts(tmp_path / "t.jsonl")


def test_windows_start_where_the_papers_code_starts_them() -> None:
    text = "".join(chr(code) for code in range(32, 1000))
    samples = sample_tokens([text], characters, sequence_length=16, num_samples=5, seed=3)
    random.seed(3)
    for sample in samples:
        start = random.randint(0, len(text) - 16 - 1)
        assert sample.tolist() == characters(text)[start : start + 16]


def test_the_seed_decides() -> None:
    text = ["".join(chr(code) for code in range(32, 1000))]
    first, same, other = (
        sample_tokens(text, characters, sequence_length=8, num_samples=4, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert digest(first) == digest(same) != digest(other)


def test_texts_are_joined() -> None:
    samples = sample_tokens(["ab", "cd"], characters, sequence_length=5, num_samples=1)
    assert samples.tolist() == [characters("ab\n\nc")]


def test_too_short() -> None:
    with pytest.raises(SpinferError, match=r"too short: 8 tokens, and one sample takes 8 and one more"):
        sample_tokens(["12345678"], characters, sequence_length=8)
    assert sample_tokens(["123456789"], characters, sequence_length=8, num_samples=2).shape == (2, 8)


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (4, 1), (-1, 8)])
def test_sizes_that_cannot_be(samples: int, length: int) -> None:
    with pytest.raises(SpinferError, match="at least"):
        sample_tokens(["123456789"], characters, sequence_length=length, num_samples=samples)
