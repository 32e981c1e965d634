"""A dense Hugging Face directory, opened safely: what it holds, and one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spinfer.checkpoint.header import TensorInfo
from spinfer.checkpoint.json_object import read_json_object
from spinfer.errors import CheckpointError

CONFIG_NAME = "config.json"

PIECE_NBYTES = 16 << 20
"""Tensors that are only copied pass through in pieces of this size."""


class TensorSource(Protocol):
    """Tensors by state-dict name, listed without reading them."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What is there, in the order that reads fastest."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Names that share the data of another tensor and are not in `tensors`, with that tensor's name."""

    def read(self, name: str) -> Tensor:
        """A fresh tensor that the caller may change."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor's bytes as 1-D uint8, PIECE_NBYTES at a time."""


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's data as 1-D uint8, without a copy when it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def pieces_of(tensor: Tensor) -> Iterator[Tensor]:
    """Cut a tensor that is in memory."""
    yield from as_bytes(tensor).split(PIECE_NBYTES)


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        CheckpointError: not a directory, or without a readable config.json.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give a model directory with {CONFIG_NAME} and weights")
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no {CONFIG_NAME}, so it is not a Hugging Face model directory")
    return read_json_object(path)
