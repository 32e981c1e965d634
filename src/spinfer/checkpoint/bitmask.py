"""The layout of compressed-tensors' legacy `sparse-bitmask`: row-major nonzeros and one bit a weight.

Source: compressed-tensors 0.8.1 to 0.12, compressors/sparse_compressors/sparse_bitmask.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinfer.errors import FormatError

PARTS = ("shape", "compressed", "bitmask", "row_offsets")

_BIT = torch.arange(8, dtype=torch.uint8)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bits are moved, never floats: NaN payloads survive, and float8 has no masked operations."""


@dataclass(frozen=True, eq=False)
class BitmaskTensor:
    """One tensor.

    Attributes:
        shape: int64 [dimensions]: (R, C), or (C,), which counts as one row.
        compressed: 1-D nonzeros, row by row.
        bitmask: uint8 [R, ceil(C / 8)] or [ceil(C / 8)], least significant bit first.
        row_offsets: int64 [R] or []: nonzeros before each row.
    """

    shape: Tensor
    compressed: Tensor
    bitmask: Tensor
    row_offsets: Tensor

    def decode(self) -> Tensor:
        """The dense tensor.

        Raises:
            FormatError: parts that disagree. Memory is bounded by the size of the bitmask.
        """
        shape = tuple(int(size) for size in self.shape)
        packed = (*shape[:-1], -(-shape[-1] // 8))
        if tuple(self.bitmask.shape) != packed or tuple(self.row_offsets.shape) != shape[:-1]:
            found = f"bitmask {tuple(self.bitmask.shape)}, row_offsets {tuple(self.row_offsets.shape)}"
            raise FormatError(f"shape {shape} does not fit {found}")
        bits = ((self.bitmask.unsqueeze(-1) >> _BIT) & 1).bool().flatten(-2)
        mask = bits[..., : shape[-1]]
        if bool(bits[..., shape[-1] :].any()):
            raise FormatError(f"the bitmask has bits set outside shape {shape}")
        counts = mask.sum(-1)
        if not torch.equal(counts.cumsum(0) - counts, self.row_offsets):
            raise FormatError("row_offsets disagree with the bitmask")
        if self.compressed.dim() != 1 or int(counts.sum()) != self.compressed.numel():
            raise FormatError(f"the bitmask counts {int(counts.sum())} nonzeros, {self.compressed.numel()} are there")
        integer = _INTEGERS[self.compressed.itemsize]
        dense = torch.zeros(shape, dtype=integer)
        dense.masked_scatter_(mask, self.compressed.view(integer))
        return dense.view(self.compressed.dtype)

    @classmethod
    def encode(cls, dense: Tensor) -> BitmaskTensor:
        """Encode a (R, C) tensor whose zeros are all +0.0."""
        bits = dense.view(_INTEGERS[dense.itemsize])
        mask = bits != 0
        lanes = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
        counts = mask.sum(-1)
        return cls(
            torch.tensor(dense.shape),
            bits[mask].view(dense.dtype),
            (lanes.to(torch.uint8) << _BIT).sum(-1, dtype=torch.uint8),
            counts.cumsum(0) - counts,
        )
