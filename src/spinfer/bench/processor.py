"""Which CPU a result is of."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_facts() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor; nothing where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def processor() -> str:
    """How many processors, and their model's name."""
    model = cpu_facts().get("model name")
    return f"{os.cpu_count()} x {model}" if model else platform.processor()
