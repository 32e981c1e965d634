"""Files that travel with a model unchanged: tokenizer, generation config, chat template, licence, code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from spinfer.checkpoint.output import writing
from spinfer.checkpoint.source import CONFIG_NAME
from spinfer.errors import CheckpointError

CARD_NAME = "README.md"
ORIGINAL_CARD_NAME = "README.original.md"

_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".tflite",
)
"""Weights, in any framework's form, would be those of the other model. `training_args.bin` and the like are pickles."""


def carry_over(source: Path, target: Path, renamed: dict[str, str]) -> None:
    """Copy what is neither weights nor config.json; links are followed to files, not to directories.

    Args:
        source: the model directory.
        target: a new directory.
        renamed: new names of files at the top; an empty one leaves the file out.

    Raises:
        CheckpointError: a file cannot be read.
        OutputError: a copy cannot be written.
    """
    for root, directories, files in os.walk(source):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            relative = str(path.relative_to(source))
            relative = renamed.get(relative, relative)
            if not relative or relative == CONFIG_NAME or relative.endswith(_WEIGHT_SUFFIXES) or not path.is_file():
                continue
            _copy(path, target / relative)


def _copy(path: Path, copy: Path) -> None:
    try:
        original = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    with original, writing(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.open("wb") as file:
            shutil.copyfileobj(original, file)
