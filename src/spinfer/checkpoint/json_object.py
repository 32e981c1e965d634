"""JSON objects from files that are not trusted: one meaning or an error."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from spinfer.errors import CheckpointError


def parse_json_object(data: bytes, origin: str) -> dict[str, Any]:
    """Parse UTF-8 JSON that must be an object; a name that comes twice in one object is refused, not overwritten.

    Raises:
        CheckpointError: anything else; `origin` says in the message where the bytes are from.
    """
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON ({error}); download the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{origin} must be a JSON object, found {type(parsed).__name__}")
    return parsed


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file; see `parse_json_object`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_json_object(data, str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {repeated!r} comes twice")
    return found
