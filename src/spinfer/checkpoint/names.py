"""Names in the files: tensors of a compressed module, and element types."""

from __future__ import annotations

import re

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
