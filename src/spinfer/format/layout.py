"""TCA-BME tile geometry and storage arithmetic (see FORMAT.md).

Notation is that of `torch.nn.Linear`: a weight is (out_features, in_features), written M x K, and y = x W^T.
The SpInfer paper writes Y = W X with X of shape (K, N); its tiles are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spinfer.errors import FormatError

FORMAT_VERSION = 1

BITMAP_TILE = 8
"""Rows and columns of a BitmapTile: 64 weights, one 64-bit word of the bitmap."""

TC_TILE = 16
"""Rows and columns of a TCTile: 2 x 2 BitmapTiles, column-major, as the A fragment of mma.m16n8k16."""

GROUP_TILE = 64
"""Rows and columns of a GroupTile: 4 bands of 16 rows, each of 4 TCTiles."""

GROUP_TILE_WEIGHTS = GROUP_TILE * GROUP_TILE
GROUP_TILE_BITMAPS = GROUP_TILE_WEIGHTS // 64

OFFSET_UNIT = 8
"""The values of each GroupTile start at a multiple of this many values, and offsets count in it: 16-byte copies of
16-bit values stay aligned, an int32 reaches 2^34 values in one matrix, and casting the values changes no offset."""

VALUE_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""Types of values that format version 1 defines, by the name written into checkpoints."""

BIT_PATTERN_DTYPES: dict[torch.dtype, torch.dtype] = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
}
"""Integer type of the same width: encoding compares and moves bit patterns, never floats."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a value dtype as checkpoints write it.

    Raises:
        FormatError: the dtype is not one that the format stores.
    """
    for name, value in VALUE_DTYPES.items():
        if value == dtype:
            return name
    raise FormatError(f"values of {dtype} cannot be encoded; convert the weight to one of {', '.join(VALUE_DTYPES)}")


@dataclass(frozen=True)
class Geometry:
    """How many tiles an (out_features, in_features) matrix takes; edges are padded with zeros inside the encoding."""

    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        if self.out_features < 1 or self.in_features < 1:
            raise FormatError(f"shape {(self.out_features, self.in_features)}: both sides must be at least 1")

    @property
    def group_rows(self) -> int:
        """Rows of GroupTiles."""
        return -(-self.out_features // GROUP_TILE)

    @property
    def group_cols(self) -> int:
        """GroupTiles in a row."""
        return -(-self.in_features // GROUP_TILE)

    @property
    def group_tiles(self) -> int:
        """GroupTiles, numbered row by row."""
        return self.group_rows * self.group_cols

    @property
    def bitmap_words(self) -> int:
        """64-bit words of the bitmap."""
        return self.group_tiles * GROUP_TILE_BITMAPS

    @property
    def offsets_len(self) -> int:
        """Entries of the offsets array: one a GroupTile and the end."""
        return self.group_tiles + 1


def max_values_len(geometry: Geometry) -> int:
    """Most values (padding included) that a matrix of this geometry can store."""
    return geometry.group_tiles * GROUP_TILE_WEIGHTS


def estimate_nbytes(geometry: Geometry, nnz: int, dtype: torch.dtype) -> int:
    """Expected size in bytes of an encoded matrix whose nonzeros are spread evenly.

    8 a BitmapTile, 4 (GroupTiles + 1), and the values, each GroupTile of which is padded by half a unit on average.
    Source: SpInfer (EuroSys 2025), section 4.2, with the offset unit of FORMAT.md.
    """
    padding = geometry.group_tiles * (OFFSET_UNIT - 1) // 2
    return 8 * geometry.bitmap_words + 4 * geometry.offsets_len + (nnz + padding) * dtype.itemsize
