"""The index of a sharded checkpoint: which file holds which tensor."""

from __future__ import annotations

from pathlib import Path

from spinfer.checkpoint.json_object import read_json_object
from spinfer.errors import CheckpointError


def indexed_files(index: Path) -> dict[str, Path]:
    """File of each tensor.

    Raises:
        CheckpointError: malformed, empty, a file that is not there, or a name that is not a plain file name beside the
            index (`../x`, an absolute path): an index must not reach into other directories.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object that places every tensor in a file")
    files: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or any(char in file for char in "/\\\0"):
            raise CheckpointError(f"{index}: tensor {name!r} is placed in {file!r}, which is not a plain file name")
        files[name] = index.parent / file
    for file in sorted(set(files.values())):
        if not file.is_file():
            absent = sum(1 for other in files.values() if other == file)
            raise CheckpointError(f"{file} is missing, with {absent} tensors of {index.name}; download it again")
    return files
