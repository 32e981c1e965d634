"""Names in the files: tensors of a compressed module, and element types."""

from __future__ import annotations

import re
from collections.abc import Container

import torch

from spinfer.checkpoint.header import TORCH_DTYPES
from spinfer.linear import STORAGE_NAMES

_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_SUFFIXES = tuple(f".{name}" for name in STORAGE_NAMES[1:])


def storage_names(module: str) -> tuple[str, str, str]:
    """Names of a module's (values, bitmap, offsets)."""
    values, bitmap, offsets = STORAGE_NAMES
    return f"{module}.{values}", f"{module}.{bitmap}", f"{module}.{offsets}"


def storage_module(name: str) -> str | None:
    """The module whose bitmap or offsets a tensor of this name is, or None."""
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def safetensors_dtype(dtype: torch.dtype) -> str:
    """An element type as safetensors writes it."""
    return _DTYPES[dtype]


def natural_order(name: str) -> list[str]:
    """Sort key that puts layers.2 before layers.10."""
    # Digits as text, the longer number last: int() refuses more than 4300 of them.
    return [f"{len(part):08}{part}" if i % 2 else part for i, part in enumerate(re.split(r"0*(\d+)", name))]


def find_stored(name: str, stored: Container[str], known: Container[str]) -> str | None:
    """The name in a checkpoint of what a model calls `name`; the base model's prefix (its first part) may be missing.

    Args:
        name: in the model.
        stored: names in the checkpoint.
        known: all such names of the model: one that the model itself has is no shortened form of another.
    """
    bare = name.partition(".")[2]
    for candidate in (name, bare if bare not in known else ""):
        if candidate and candidate in stored:
            return candidate
    return None
