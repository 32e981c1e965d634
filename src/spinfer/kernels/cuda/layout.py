"""The layout that the CUDA kernels read, from the host's side; csrc/layout.cuh and docs/kernel.md define it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LAYOUT = "tca_bme_chunks"
"""Parts are (chunks uint8, offsets int32 [chunks + 1] in units of 16 bytes); then, where a weight has them,
`ranges_by_cost` and a dense copy (M, K)."""

BLOCK_ROWS = 32
BLOCK_COLS = 64
BLOCKS = 16
"""Blocks of a chunk: one a warp."""

OFFSET_UNIT = 16
CHUNK_ALIGN = 128
HEADER_NBYTES = BLOCKS * 4
MASK_NBYTES = BLOCKS * 256
VALUES_AT = HEADER_NBYTES + MASK_NBYTES

GATHER_NBYTES = 4
"""How far a lane may read past the last value; every chunk is padded by so much."""

MAX_CHUNK_NBYTES = -(-(VALUES_AT + BLOCKS * BLOCK_ROWS * BLOCK_COLS * 2 + GATHER_NBYTES) // CHUNK_ALIGN) * CHUNK_ALIGN
"""A fully dense chunk."""

_SHORT = 4224
"""Up to so many rows, chunks of 64 x 512, so that 66 clusters of two CTAs all have a row block; else 128 x 256."""


@dataclass(frozen=True)
class ChunkGrid:
    """How a matrix is cut into chunks; chunk numbers run along k first.

    Attributes:
        out_features: M.
        in_features: K.
        blocks_m: blocks of a chunk along M: 2 or 4; 16 / blocks_m along K.
    """

    out_features: int
    in_features: int
    blocks_m: int

    @classmethod
    def of(cls, out_features: int, in_features: int) -> ChunkGrid:
        """The cut used for a shape."""
        blocks_m = 2 if out_features <= _SHORT else 4
        return cls(out_features, in_features, blocks_m)

    @property
    def blocks_k(self) -> int:
        """Blocks of a chunk along K."""
        return BLOCKS // self.blocks_m

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        return self.blocks_m * BLOCK_ROWS

    @property
    def chunk_cols(self) -> int:
        """Columns of a chunk."""
        return self.blocks_k * BLOCK_COLS

    @property
    def row_blocks(self) -> int:
        """Chunks along M."""
        return -(-self.out_features // self.chunk_rows)

    @property
    def chunks_k(self) -> int:
        """Chunks along K."""
        return -(-self.in_features // self.chunk_cols)

    @property
    def chunks(self) -> int:
        """All chunks."""
        return self.row_blocks * self.chunks_k

    def mean_chunk_nbytes(self, nnz: int) -> int:
        """Bytes of a chunk if nonzeros are spread evenly."""
        return VALUES_AT + CHUNK_ALIGN // 2 + 2 * nnz // self.chunks


def ranges_in(parts: tuple[Tensor, ...]) -> int:
    """Ranges by cost that a weight has; 0 if it is even."""
    return parts[2].numel() - 1 if len(parts) > 2 and parts[2].dim() == 1 else 0


def has_dense_copy(parts: tuple[Tensor, ...]) -> bool:
    """Whether a weight has a dense copy."""
    return parts[-1].dim() == 2
