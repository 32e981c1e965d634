"""The header of a safetensors file: what it holds and where, checked against the file's size before any data is read.

Our own reader, because the safetensors library gives no byte ranges and maps whole files; tests hold it to refusing
all that the library refuses. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spinfer.checkpoint.json_object import MAX_JSON_NBYTES, file_nbytes, parse_json_object
from spinfer.errors import CheckpointError

METADATA = "__metadata__"

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Element types that torch can hold; tensors of the others are only ever copied as bytes."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor without reading it.

    Attributes:
        name: state-dict name.
        dtype: element type as safetensors writes it.
        shape: sizes.
        file: where its data is.
        offset: first byte of the data in a safetensors file; 0 for other files.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name!r}"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """List a safetensors file in the order of its data.

    Raises:
        CheckpointError: the file is truncated or too long, or the header is not JSON, names a tensor twice, or gives a
            shape, type or byte range that does not fit (ranges must cover the data exactly, without overlap).
    """
    size = file_nbytes(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path} is truncated inside its header; download the file again")
            if length > MAX_JSON_NBYTES:
                raise CheckpointError(f"{path}: a header of {length} bytes is over the limit of {MAX_JSON_NBYTES}")
            header = parse_json_object(file.read(length), f"{path}: header")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {METADATA} must map names to strings")

    data_nbytes = size - 8 - length
    entries = [_parse_entry(path, name, entry, data_nbytes) for name, entry in header.items()]
    entries.sort(key=lambda info: (info.offset, info.offset + info.nbytes))
    end = 0
    for info in entries:
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{info}: its data {what}; download the file again")
        end += info.nbytes
    if end != data_nbytes:
        raise CheckpointError(f"{path}: the header describes {end} bytes of data, {data_nbytes} follow")
    return {info.name: _shifted(info, 8 + length) for info in entries}


def _shifted(info: TensorInfo, start: int) -> TensorInfo:
    return TensorInfo(info.name, info.dtype, info.shape, info.file, info.offset + start)


def _parse_entry(path: Path, name: str, entry: Any, data_nbytes: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} == entry.keys():
        raise CheckpointError(f"{where}: its header entry must be an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}; expected one of {', '.join(DTYPE_BITS)}")
    if not _naturals(shape):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} are not two byte positions")
    start, end = offsets
    if not start <= end <= data_nbytes:
        raise CheckpointError(
            f"{where}: bytes {start} to {end} lie outside the file's {data_nbytes} bytes of data; "
            "the file is truncated or damaged, download it again"
        )
    bits = _bits(shape, DTYPE_BITS[dtype], limit=8 * data_nbytes)
    if bits != 8 * (end - start):
        raise CheckpointError(f"{where}: {dtype} of shape {shape} does not take the {end - start} bytes that it has")
    return TensorInfo(name, dtype, tuple(shape), path, start)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _bits(shape: list[int], dtype_bits: int, limit: int) -> int:
    """Bits of a tensor; stops multiplying beyond `limit`, so that a hostile shape costs nothing."""
    bits = 0 if 0 in shape else dtype_bits
    for size in shape:
        bits *= size
        if bits > limit:
            break
    return bits
