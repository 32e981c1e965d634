"""From the kernels' layout to dense rows, on the GPU."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.layout import BLOCK_COLS, BLOCK_ROWS, BLOCKS, ChunkGrid
from spinfer.kernels.cuda.runtime import LaunchShape, device_traits, load
from spinfer.kernels.cuda.select import code_arch

_ARGS = struct.Struct("3Qq6i")
"""DenseArgs of csrc/to_dense.cu."""

_WARPS = 4
_BLOCK_BUFFER_NBYTES = 256 + BLOCK_ROWS * BLOCK_COLS * 2 + 32
_SHARED_NBYTES = _WARPS * (2 * _BLOCK_BUFFER_NBYTES + BLOCK_ROWS * (BLOCK_COLS * 2 + 16))
_CTAS_A_SM = 4


def dense_source(grid: ChunkGrid, capability: tuple[int, int]) -> KernelSource:
    """What to compile for a matrix and a device."""
    return KernelSource("to_dense.cu", code_arch(capability), (("SPINFER_BLOCKS_M", grid.blocks_m),))


def decode_row_blocks(chunks: Tensor, offsets: Tensor, grid: ChunkGrid, first: int, count: int, out: Tensor) -> None:
    """Write the dense rows of row blocks `first` to `first + count - 1` into `out`.

    Args:
        chunks: the weight.
        offsets: of its chunks.
        grid: how it is cut.
        first: row block.
        count: of row blocks.
        out: (rows, K), last stride 1, dtype of the values.
    """
    index = chunks.device.index
    traits = device_traits(index)
    chunk_count = count * grid.chunks_k
    arguments = _ARGS.pack(
        chunks.data_ptr(),
        offsets.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        grid.out_features,
        grid.in_features,
        grid.chunks_k,
        first * grid.chunks_k,
        chunk_count,
        first * grid.chunk_rows,
    )
    with torch.cuda.device(index):
        load(dense_source(grid, traits.capability), "spinfer_to_dense").launch(
            index,
            LaunchShape(min(chunk_count * BLOCKS // _WARPS, traits.sm_count * _CTAS_A_SM), _WARPS * 32, _SHARED_NBYTES),
            torch._C._cuda_getCurrentRawStream(index),
            arguments,
        )
