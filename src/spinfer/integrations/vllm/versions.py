"""The versions of vLLM that the plugin is tested with."""

from __future__ import annotations

import re

from spinfer.errors import SpinferError

OLDEST = (0, 26)
NEWEST = (0, 32)


def check_version(version: str) -> None:
    """Refuse a version outside of the tested range.

    Raises:
        SpinferError: see there.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        tested = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
        raise SpinferError(
            f"this spinfer serves compressed models with vLLM {tested}, but vLLM {version} is installed; "
            f"install one of these, or a newer spinfer"
        )
