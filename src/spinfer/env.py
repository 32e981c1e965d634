"""Environment variables: the only place that reads them."""

from __future__ import annotations

import os


def cpu_tier() -> str | None:
    """`SPINFER_CPU_TIER`: the tier that the CPU kernel must run ("avx512bf16", "avx512", "avx2" or "scalar")."""
    return os.environ.get("SPINFER_CPU_TIER") or None
