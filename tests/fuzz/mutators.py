"""Damage to a model directory: of any byte, and of those places where a reader would trust what it finds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]
"""A directory's files by name."""

_NUMBERS = (0, 1, -1, 2, 7, 8, 63, 64, 65, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30)
_VALUES = (
    *_NUMBERS,
    0.5,
    1e308,
    True,
    False,
    None,
    "",
    "x",
    "BF16",
    "F32",
    "I64",
    "float16",
    "../x",
    "\0",
    [],
    {},
    [[]],
)


def damage(files: Files, rng: random.Random) -> str:
    """Change `files` in place in one to three ways; returns what was done, for the message of a failure."""
    return ", ".join(_damage_once(files, rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def _damage_once(files: Files, rng: random.Random) -> str:
    kinds: list[Callable[[Files, random.Random], str]] = [_bytes, _bytes, _json_file, _file]
    if any(name.endswith(".safetensors") for name in files):
        kinds += [_header, _header, _array, _array, _array]
    return rng.choice(kinds)(files, rng)


def _bytes(files: Files, rng: random.Random) -> str:
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    if not data:
        return "nothing"
    start = rng.randrange(len(data))
    length = rng.choice((1, 1, 2, 8, rng.randrange(1, len(data) + 1)))
    kind = rng.choice(("flip", "flip", "flip", "overwrite", "truncate", "append", "delete", "double", "clear"))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        data[start : start + length] = rng.randbytes(len(data[start : start + length]))
    elif kind == "clear":
        data[start : start + length] = bytes(len(data[start : start + length]))
    elif kind == "truncate":
        del data[start:]
    elif kind == "append":
        data += rng.randbytes(length)
    elif kind == "delete":
        del data[start : start + length]
    else:
        data[start:start] = data[start : start + length]
    files[name] = bytes(data)
    return f"{kind} in {name}"


def _json_file(files: Files, rng: random.Random) -> str:
    name = rng.choice(sorted(name for name in files if name.endswith(".json")) or [""])
    try:
        content = json.loads(files[name])
    except (KeyError, ValueError):
        return "nothing"
    done = change_json(content, rng)
    files[name] = json.dumps(content).encode()
    return f"{done} in {name}"


def change_json(node: Any, rng: random.Random) -> str:
    """Replace, rename, remove, nudge or exchange something below `node`."""
    spots: list[tuple[Any, Any]] = []

    def walk(parent: Any) -> None:
        for key in parent if isinstance(parent, dict) else range(len(parent)):
            spots.append((parent, key))
            if isinstance(parent[key], dict | list):
                walk(parent[key])

    if isinstance(node, dict | list):
        walk(node)
    if not spots:
        return "nothing"
    parent, key = rng.choice(spots)
    value = parent[key]
    kind = rng.choice(("replace", "remove", "nudge", "rename", "exchange"))
    if kind == "remove":
        del parent[key]
    elif kind == "nudge" and type(value) is int:
        parent[key] = value + rng.choice((-64, -8, -1, 1, 8, 64))
    elif kind == "rename" and isinstance(parent, dict):
        parent[rng.choice((f"{key}x", str(key)[:-1], *[str(other) for _, other in spots]))] = parent.pop(key)
    elif kind == "exchange":
        other, where = rng.choice([spot for spot in spots if type(spot[0][spot[1]]) is type(value)])
        parent[key], other[where] = json.loads(json.dumps(other[where])), json.loads(json.dumps(value))
    else:
        parent[key] = rng.choice(_VALUES)
    return f"{kind} {key!r}"


def _split(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return None
    return (header, data[8 + length :]) if isinstance(header, dict) else None


def _join(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _shard(files: Files, rng: random.Random) -> tuple[str, dict[str, Any], bytes] | None:
    name = rng.choice(sorted(name for name in files if name.endswith(".safetensors")) or [""])
    parts = _split(files.get(name, b""))
    return (name, *parts) if parts else None


def _header(files: Files, rng: random.Random) -> str:
    shard = _shard(files, rng)
    if shard is None:
        return "nothing"
    name, header, data = shard
    done = change_json(header, rng)
    files[name] = _join(header, data)
    return f"{done} in the header of {name}"


def _array(files: Files, rng: random.Random) -> str:
    """Change elements of a tensor in ways that keep lengths, often counts too."""
    shard = _shard(files, rng)
    if shard is None:
        return "nothing"
    name, header, data = shard
    names = sorted(name for name, entry in header.items() if isinstance(entry, dict) and "data_offsets" in entry)
    if not names:
        return "nothing"
    tensor = rng.choice(names)
    width = {"I64": 8, "I32": 4, "F32": 4}.get(str(header[tensor].get("dtype")), 2)
    try:
        start, end = header[tensor]["data_offsets"]
        array = bytearray(data[start:end])
        count = len(array) // width
    except (TypeError, ValueError):
        return "nothing"
    if count < 2:
        return "nothing"
    first, second = rng.randrange(count) * width, rng.randrange(count) * width
    kind = rng.choice(("swap elements", "swap bits", "set element", "add one", "reverse", "shift", "fill"))
    if kind == "swap elements":
        one, other = bytes(array[first : first + width]), bytes(array[second : second + width])
        array[first : first + width], array[second : second + width] = other, one
    elif kind == "swap bits":
        array[first] = ((array[first] << 1) | (array[first] >> 7)) & 0xFF
    elif kind == "set element":
        array[first : first + width] = rng.randbytes(width)
    elif kind == "add one":
        value = int.from_bytes(array[first : first + width], "little") + rng.choice((-1, 1))
        array[first : first + width] = (value % (1 << (8 * width))).to_bytes(width, "little")
    elif kind == "reverse":
        array.reverse()
    elif kind == "shift":
        array = array[width:] + array[:width]
    else:
        array[:] = rng.choice((b"\0", b"\xff", b"\x7f")) * len(array)
    files[name] = _join(header, data[:start] + bytes(array) + data[end:])
    return f"{kind} of {tensor} in {name}"


def _file(files: Files, rng: random.Random) -> str:
    name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
    if rng.random() < 0.5:
        files[name], files[other] = files[other], files[name]
        return f"exchange {name} and {other}"
    del files[name]
    if not files:
        files[name] = b""
    return f"remove {name}"
