"""Write safetensors shards as the tensors come: nothing is held back but the few bytes that would break alignment.

The safetensors library writes a file from tensors that are all in memory; a header comes first and needs all sizes.
Here room for the header is left at the start of each shard and filled in at its end; the format allows trailing spaces.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from spinfer.checkpoint.header import DTYPE_BITS, TensorInfo
from spinfer.checkpoint.output import writing
from spinfer.checkpoint.safetensors_source import INDEX_NAME, SINGLE_NAME
from spinfer.checkpoint.source import as_bytes

DEFAULT_SHARD_NBYTES = 5 * 10**9
"""What the Hugging Face hub advises for one file."""

_ALIGNMENT = 8
"""Every tensor starts at a multiple of its element size, as the library writes; 8 bytes is the widest element."""

_ENTRY_NBYTES = 110
"""Upper bound of a header entry without name and sizes: two 20-digit offsets, the longest dtype, punctuation."""


@dataclass(frozen=True)
class Planned:
    """Tensors that come together, described well enough to leave room for their header entries.

    Attributes:
        names: all that may come.
        least_nbytes: bytes that they take at least.
        dims: most dimensions of any.
    """

    names: tuple[str, ...]
    least_nbytes: int
    dims: int

    @property
    def header_nbytes(self) -> int:
        """Upper bound of their part of the header."""
        return sum(len(json.dumps(name)) + _ENTRY_NBYTES + 21 * self.dims for name in self.names)


@dataclass(frozen=True)
class Outgoing:
    """A tensor to write: `info` (its file and offset are ignored) and its bytes in pieces of 1-D uint8."""

    info: TensorInfo
    pieces: Iterable[Tensor]


class ShardWriter:
    """Writes planned groups, in order, into as few shards as the limit allows; a group is never split."""

    def __init__(self, directory: Path, plan: Sequence[Planned], max_shard_nbytes: int) -> None:
        """Plan; nothing is written yet."""
        self._directory = directory
        self._plan = plan
        self._max_shard_nbytes = max_shard_nbytes
        self._next = 0
        self._shards: list[_Shard] = []

    def __enter__(self) -> ShardWriter:
        """Files that are still open when the block ends are closed, so that a failed run holds on to nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        if self._shards:
            self._shards[-1].release()

    def write(self, group: Sequence[Outgoing]) -> None:
        """Write the next group of the plan.

        Raises:
            OutputError: the file cannot be written.
        """
        nbytes = sum(outgoing.info.nbytes for outgoing in group)
        shard = self._shards[-1] if self._shards else None
        if shard is None or (shard.nbytes and shard.nbytes + nbytes > self._max_shard_nbytes):
            if shard is not None:
                shard.close()
            path = self._directory / f"shard-{len(self._shards) + 1:05d}.partial"
            shard = _Shard(path, self._header_room())
            self._shards.append(shard)
        self._next += 1
        for outgoing in group:
            shard.add(outgoing)

    def _header_room(self) -> int:
        """Enough for every group that may still get into a shard that starts now."""
        room, least = len('{"__metadata__":{"format":"pt"}}'), 0
        for planned in self._plan[self._next :]:
            if least and least + planned.least_nbytes > self._max_shard_nbytes:
                break
            least += planned.least_nbytes
            room += planned.header_nbytes
        return room

    def finish(self) -> int:
        """Complete the last shard, give all their final names and write the index; returns the bytes of all tensors."""
        if not self._shards:
            self._shards.append(_Shard(self._directory / "shard-00001.partial", self._header_room()))
        self._shards[-1].close()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            name = SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            with writing(shard.path):
                shard.path.rename(self._directory / name)
            weight_map.update(dict.fromkeys(shard.names, name))
        total = sum(shard.nbytes for shard in self._shards)
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self._directory / INDEX_NAME, index)
        return total


class _Shard:
    """One file. Tensors of a size that is no multiple of 8 bytes wait for its end, the widest elements first."""

    def __init__(self, path: Path, header_room: int) -> None:
        self.path = path
        self.nbytes = 0
        self._written = 0
        self._header: dict[str, Any] = {}
        self._waiting: list[Outgoing] = []
        self._room = header_room + -header_room % _ALIGNMENT
        with writing(path):
            self._file: BinaryIO = path.open("wb", buffering=0)
            self._file.seek(8 + self._room)

    @property
    def names(self) -> Iterator[str]:
        return (name for name in self._header if name != "__metadata__")

    def add(self, outgoing: Outgoing) -> None:
        self.nbytes += outgoing.info.nbytes
        if outgoing.info.nbytes % _ALIGNMENT:
            self._waiting.append(Outgoing(outgoing.info, list(outgoing.pieces)))
        else:
            self._put(outgoing)

    def _put(self, outgoing: Outgoing) -> None:
        info, start = outgoing.info, self._written
        for piece in outgoing.pieces:
            self._write(piece.numpy().data)
            self._written += piece.numel()
        if self._written - start != info.nbytes:
            raise RuntimeError(f"{info.name}: {self._written - start} bytes came, {info.nbytes} were announced")
        offsets = [start, self._written]
        self._header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}

    def close(self) -> None:
        for outgoing in sorted(self._waiting, key=lambda outgoing: -DTYPE_BITS[outgoing.info.dtype]):
            self._put(outgoing)
        self._waiting.clear()
        text = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        if len(text) > self._room:
            raise RuntimeError(f"{self.path}: room for a header of {self._room} bytes, {len(text)} are needed")
        with writing(self.path):
            self._file.seek(0)
            self._write(memoryview(self._room.to_bytes(8, "little") + text.ljust(self._room)))
            self.release()

    def release(self) -> None:
        self._file.close()

    def _write(self, data: memoryview) -> None:
        with writing(self.path):
            while data:
                data = data[self._file.write(data) :]


def outgoing(name: str, dtype: str, tensor: Tensor) -> Outgoing:
    """A tensor that is in memory."""
    return Outgoing(TensorInfo(name, dtype, tuple(tensor.shape), Path()), [as_bytes(tensor)])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as transformers does.

    Raises:
        OutputError: the file cannot be written.
    """
    with writing(path):
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
