"""Environment variables: the only place that reads them."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_tier() -> str | None:
    """`SPINFER_CPU_TIER`: the tier that the CPU kernel must run ("amx", "avx512bf16", "avx512", "avx2" or "scalar")."""
    return os.environ.get("SPINFER_CPU_TIER") or None


def autotune() -> bool:
    """`SPINFER_AUTOTUNE`: "1" to measure which CUDA kernel is the fastest for each kind of weight when it is loaded."""
    return os.environ.get("SPINFER_AUTOTUNE", "") not in ("", "0")


def dense_copies_gib() -> str | None:
    """`SPINFER_DENSE_COPIES_GIB`: how much memory of each GPU dense copies of compressed weights may take."""
    return os.environ.get("SPINFER_DENSE_COPIES_GIB") or None


def cache_directory() -> Path:
    """`SPINFER_CACHE_DIR`: where compiled CUDA kernels, and what was measured of them, are kept.

    By default `spinfer` in the user's cache directory.
    """
    chosen = os.environ.get("SPINFER_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spinfer"
