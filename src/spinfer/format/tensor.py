"""`TcaBmeTensor`: one encoded matrix, its parts named, frozen and validated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinfer.errors import FormatError
from spinfer.format.codec import decode_arrays, encode_arrays, group_tile_counts
from spinfer.format.layout import (
    BIT_PATTERN_DTYPES,
    BITMAP_TILE,
    GROUP_TILE,
    OFFSET_UNIT,
    Geometry,
    dtype_name,
    max_values_len,
)


@dataclass(frozen=True, eq=False)
class TcaBmeTensor:
    """A sparse (out_features, in_features) matrix in Tensor-Core-Aware Bitmap Encoding; FORMAT.md is its specification.

    Construction checks types and lengths, which is cheap and touches no data. For parts of unknown origin call
    `validate()` as well: it reads them and refuses whatever disagrees.

    Attributes:
        values: 1-D, fp16, bf16 or fp32: nonzeros in storage order, each GroupTile padded with zeros to a multiple of 8.
        bitmap: int64 [BitmapTiles]: bit `8 * row + column` of a word is set where the BitmapTile has a nonzero.
        offsets: int32 [GroupTiles + 1]: where each GroupTile's values start, in units of 8 values.
        shape: (out_features, in_features).
        nnz: nonzeros.
    """

    values: Tensor
    bitmap: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    nnz: int

    def __post_init__(self) -> None:
        if len(self.shape) != 2:
            raise FormatError(f"shape {tuple(self.shape)}; expected (out_features, in_features)")
        geometry = self.geometry
        dtype_name(self.values.dtype)
        for name, part, dtype, length in (
            ("bitmap", self.bitmap, torch.int64, geometry.bitmap_words),
            ("offsets", self.offsets, torch.int32, geometry.offsets_len),
        ):
            if part.dtype != dtype:
                raise FormatError(f"{name} is {part.dtype}, expected {dtype}")
            if part.dim() != 1 or part.numel() != length:
                raise FormatError(f"{name} has shape {tuple(part.shape)}; a {self.shape} matrix needs ({length},)")
        if self.values.dim() != 1 or self.values.numel() % OFFSET_UNIT:
            shape = tuple(self.values.shape)
            raise FormatError(f"values have shape {shape}; expected 1-D, a multiple of {OFFSET_UNIT} long")
        if not 0 <= self.nnz <= self.values.numel() <= max_values_len(geometry):
            raise FormatError(f"{self.values.numel()} values and nnz {self.nnz} do not fit a {self.shape} matrix")
        if not all(part.is_contiguous() for part in (self.values, self.bitmap, self.offsets)):
            raise FormatError("values, bitmap and offsets must be contiguous; call .contiguous() on each")
        if not (self.values.device == self.bitmap.device == self.offsets.device):
            raise FormatError("values, bitmap and offsets are on different devices")

    @property
    def geometry(self) -> Geometry:
        """Tile counts of the shape."""
        return Geometry(*self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.values.device

    @property
    def density(self) -> float:
        """Nonzeros over weights, in [0, 1]."""
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.values.nbytes + self.bitmap.nbytes + self.offsets.nbytes

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> TcaBmeTensor:
        """The same matrix on another device; `self` when it is there already."""
        values = self.values.to(device, non_blocking=non_blocking)
        if values is self.values:
            return self
        bitmap = self.bitmap.to(device, non_blocking=non_blocking)
        offsets = self.offsets.to(device, non_blocking=non_blocking)
        return TcaBmeTensor(values, bitmap, offsets, self.shape, self.nnz)

    def decode(self) -> Tensor:
        """Dense (out_features, in_features), bit-identical to what was encoded, except that -0.0 came in as zero."""
        return decode_arrays(self.values, self.bitmap, self.offsets, self.geometry)

    def validate(self) -> TcaBmeTensor:
        """Read the parts and check that they agree; returns self.

        Raises:
            FormatError: offsets that do not start at zero, decrease, or disagree with the bitmap or the values; bits
                outside the matrix; a bitmap that does not count `nnz`; padding that is not zero.
        """
        offsets = self.offsets.long()
        counts = group_tile_counts(self.bitmap)
        steps = offsets[1:] - offsets[:-1]
        if int(offsets[0]) != 0:
            raise FormatError(f"offsets start at {int(offsets[0])}, expected 0")
        if bool((steps < 0).any()):
            raise FormatError(f"offsets decrease at GroupTile {int((steps < 0).nonzero()[0])}")
        end = int(offsets[-1]) * OFFSET_UNIT
        if end != self.values.numel():
            raise FormatError(f"offsets end at {end} values, but {self.values.numel()} are there")
        wrong = steps != (counts + OFFSET_UNIT - 1) // OFFSET_UNIT
        if bool(wrong.any()):
            tile = int(wrong.nonzero()[0])
            room = int(steps[tile]) * OFFSET_UNIT
            raise FormatError(f"GroupTile {tile} has {int(counts[tile])} bits set but room for {room} values")
        if int(counts.sum()) != self.nnz:
            raise FormatError(f"the bitmap counts {int(counts.sum())} nonzeros, but nnz says {self.nnz}")
        if bool(self._bits_outside().any()):
            raise FormatError(f"the bitmap has bits set outside the {self.shape} matrix")
        if bool(self._padding(counts).any()):
            raise FormatError("a GroupTile's values are padded with something else than zeros")
        return self

    def _padding(self, counts: Tensor) -> Tensor:
        """Bit patterns of the last OFFSET_UNIT values of each GroupTile, those that are not padding set to zero."""
        used = counts.nonzero().view(-1)
        units = self.values.view(BIT_PATTERN_DTYPES[self.dtype]).view(-1, OFFSET_UNIT)
        last = units.index_select(0, self.offsets[1:].index_select(0, used) - 1)
        lane = torch.arange(OFFSET_UNIT, device=self.device)
        return last * (lane > ((counts.index_select(0, used) - 1) % OFFSET_UNIT).unsqueeze(1))

    def _bits_outside(self) -> Tensor:
        """Words of the edge GroupTiles, masked to the bits that lie in the padding."""
        geometry = self.geometry
        words = self.bitmap.view(geometry.group_rows, geometry.group_cols, 4, 4, 2, 2)
        local = torch.arange(GROUP_TILE // BITMAP_TILE, device=self.device) * BITMAP_TILE
        bit = torch.arange(BITMAP_TILE, dtype=torch.int64, device=self.device)

        def lanes(size: int) -> Tensor:  # [tiles, 8] 1 where the row or column lies outside
            inside = size - (-(-size // GROUP_TILE) - 1) * GROUP_TILE
            return (local.unsqueeze(1) + bit >= inside).long()

        rows = (lanes(self.shape[0]) << (8 * bit)).sum(1) * 0xFF
        cols = (lanes(self.shape[1]) << bit).sum(1) * 0x0101010101010101
        bottom = words[-1] & rows.view(4, 1, 1, 2)
        right = words[:, -1] & cols.view(1, 4, 2, 1)
        return torch.cat([bottom.reshape(-1), right.reshape(-1)])


def encode(weight: Tensor) -> TcaBmeTensor:
    """Encode a dense weight.

    Lossless for every bit pattern but one: -0.0 counts as zero and decodes to +0.0, because pruning by
    `weight * mask` leaves -0.0 for half of the pruned weights.

    Args:
        weight: (out_features, in_features), fp16, bf16 or fp32, on CPU or CUDA, any strides.

    Raises:
        FormatError: not 2-D, an empty side, another dtype, a tensor without data (meta), or a torch sparse layout.
    """
    if weight.layout != torch.strided:
        raise FormatError(f"expected a dense tensor, got {weight.layout}; call .to_dense() first")
    if weight.dim() != 2:
        raise FormatError(f"expected a 2-D weight (out_features, in_features), got shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise FormatError("the weight is on the meta device and holds no data; load it first")
    values, bitmap, offsets, nnz = encode_arrays(weight)
    return TcaBmeTensor(values, bitmap, offsets, (weight.shape[0], weight.shape[1]), nnz)
