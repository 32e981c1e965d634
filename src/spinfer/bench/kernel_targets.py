"""What the CUDA kernels are meant to reach: speed-up over cuBLAS fp16, and which results fall short."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_LARGEST = {(28672, 8192), (8192, 28672)}
_MIDDLE = {(8192, 8192), (28672, 4096), (4096, 14336)}
_SMALL = {(4096, 4096)}

_FLOOR = 0.98
"""Never slower than dense by more than the noise, from 40 % zeros and 1024 x 1024 on."""

_H100 = (
    # shapes, sparsity, then speed-ups at N <= 16, 32, 64, 128
    (_LARGEST, 0.3, (1.2, None, None, None)),
    (_LARGEST, 0.4, (1.42, None, None, None)),
    (_LARGEST, 0.5, (1.72, 1.65, 1.5, 1.2)),
    (_LARGEST, 0.6, (2.1, 1.95, 1.7, 1.3)),
    (_LARGEST, 0.7, (2.6, 2.3, 1.9, 1.4)),
    (_MIDDLE, 0.3, (1.05, None, None, None)),
    (_MIDDLE, 0.4, (1.2, None, None, None)),
    (_MIDDLE, 0.6, (1.95, 1.75, 1.5, 1.15)),
    (_SMALL, 0.3, (1.0, None, None, None)),
    (_SMALL, 0.4, (1.05, None, None, None)),
    (_SMALL, 0.6, (1.45, 1.35, 1.2, 1.0)),
)
_H200 = (
    (_LARGEST, 0.5, (1.7, None, None, None)),
    (_LARGEST, 0.6, (1.95, None, None, None)),
    (_LARGEST, 0.7, (2.1, None, None, None)),
)


_MOST_ERROR = {"float16": 4e-4, "bfloat16": 3e-3}
"""Relative to float64. Beyond, a result is wrong, and how fast it came means nothing."""


def is_right(row: dict[str, Any]) -> bool:
    """Whether a row's result is as near to float64 as its type allows."""
    return bool(row["error"] <= _MOST_ERROR[row["dtype"]])


def target(device: str, row: dict[str, Any]) -> float | None:
    """The speed-up that a row should reach on a device ("NVIDIA H100 ..."), or None where there is no target."""
    shape, sparsity, n = (row["m"], row["k"]), row["sparsity"], row["n"]
    column = 0 if n <= 16 else {32: 1, 64: 2, 128: 3}.get(n)
    if column is not None and row["mask"] == "random":
        for shapes, at, wanted in _H200 if "H200" in device else _H100:
            found = wanted[column]
            if shape in shapes and at == sparsity and found is not None:
                return found
    return _FLOOR if min(shape) >= 1024 and row.get("density", 1 - sparsity) <= 0.601 else None


def missed(device: str, rows: Iterable[dict[str, Any]]) -> tuple[int, list[tuple[float, dict[str, Any]]]]:
    """How many rows have a target, and those below it, each with its target."""
    wanted = [(aim, row) for row in rows if (aim := target(device, row)) is not None]
    return len(wanted), [(aim, row) for aim, row in wanted if row["speedup"] < aim]
