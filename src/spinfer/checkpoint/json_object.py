"""JSON objects from files that are not trusted: one meaning or an error."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from spinfer.errors import CheckpointError

MAX_JSON_NBYTES = 100_000_000
"""The safetensors library refuses larger headers; config.json and indexes are held to the same."""


def file_nbytes(path: Path) -> int:
    """Size of a regular file (symbolic links are followed).

    Raises:
        CheckpointError: missing, or not a regular file (reading from a pipe would wait for ever).
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; download the file again") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size


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
    if file_nbytes(path) > MAX_JSON_NBYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_NBYTES} bytes; download the file again")
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
