"""Calibration text: files or directories to token ids."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spinfer.errors import SpinferError

NUM_SAMPLES = 128
"""As in the papers on Wanda and SparseGPT."""

_JSONL = ".jsonl"
_SUFFIXES = (".txt", _JSONL)


def read_texts(path: str | Path) -> list[str]:
    """Texts of a file or of all `.txt` and `.jsonl` files below a directory, in the order of their names.

    A `.jsonl` file has one object a line, whose `text` counts; any other file is one UTF-8 text.

    Raises:
        SpinferError: missing, empty, or not text.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise SpinferError(f"{path} holds no {' or '.join(_SUFFIXES)} file to calibrate with")
    else:
        files = [path]
    texts = [text for file in files for text in _read(file) if text.strip()]
    if not texts:
        raise SpinferError(f"{path} holds no text to calibrate with: it is empty")
    return texts


def _read(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpinferError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    if "\0" in content:
        raise SpinferError(f"{file} is not text: it holds NUL characters")
    return _read_lines(file, content) if file.suffix == _JSONL else [content]


def _read_lines(file: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, TypeError, KeyError) as error:
                raise SpinferError(f"{file}, line {number}: expected a JSON object with a member `text`") from error
            if not isinstance(texts[-1], str):
                raise SpinferError(f"{file}, line {number}: `text` is no string")
    return texts


def sample_tokens(
    texts: Sequence[str],
    tokenize: Callable[[str], Sequence[int]],
    *,
    sequence_length: int,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> Tensor:
    """Random windows of the joined texts, int64 [num_samples, sequence_length]; they may overlap.

    Args:
        texts: joined by an empty line.
        tokenize: token ids of a text.
        sequence_length: tokens a window.
        num_samples: windows.
        seed: of the windows' starts.

    Raises:
        SpinferError: fewer tokens than one window takes, or a size below 1.

    Source: the sampling of WikiText in the code of SparseGPT and Wanda, with the same starts for the same seed.
    """
    if num_samples < 1 or sequence_length < 2:
        raise SpinferError(f"calibration needs 1 sample of 2 tokens at least, got {num_samples} of {sequence_length}")
    ids = torch.as_tensor(tokenize("\n\n".join(texts)), dtype=torch.int64)
    last = ids.numel() - sequence_length - 1
    if last < 0:
        raise SpinferError(
            f"the calibration text is too short: {ids.numel()} tokens, and one sample takes {sequence_length} and one "
            "more; give more text, or a smaller --sequence-length"
        )
    starts = random.Random(seed)
    windows = [starts.randint(0, last) for _ in range(num_samples)]
    return torch.stack([ids[start : start + sequence_length] for start in windows])


def digest(samples: Tensor) -> str:
    """SHA-256 of the token ids: whether two runs were calibrated with the same."""
    return hashlib.sha256(samples.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()
