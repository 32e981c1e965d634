"""From the kernels' layout to dense rows, on the GPU."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.configs import BLOCK_BUFFER_NBYTES, IN_FLIGHT, code_arch
from spinfer.kernels.cuda.layout import BLOCK_COLS, BLOCK_ROWS, BLOCKS, ChunkGrid
from spinfer.kernels.cuda.runtime import LaunchShape, TensorMaps, device_traits, load

_ARGS = struct.Struct("3Qq6i")
"""DenseArgs of csrc/to_dense.cu."""

_WARPS = 4
_SHARED_NBYTES = _WARPS * (2 * BLOCK_BUFFER_NBYTES + BLOCK_ROWS * (BLOCK_COLS * 2 + 16))
_CTAS_A_SM = 4

_HOPPER_CALL, _HOPPER_CONSTANTS = struct.Struct("2Q56xi"), struct.Struct("11i")
"""MatmulArgs of csrc/matmul.cuh, of which csrc/to_dense_sm90.cu reads the weight and how it is dealt out."""

_HOPPER_THREADS = (BLOCKS + 1) * 32
_HOPPER_RING_AT = 1024 + BLOCKS * 2 * BLOCK_ROWS * BLOCK_COLS * 2

_tensor_maps = TensorMaps()


def dense_source(grid: ChunkGrid, capability: tuple[int, int]) -> KernelSource:
    """What to compile for a matrix and a device."""
    file = "to_dense_sm90.cu" if capability == (9, 0) else "to_dense.cu"
    return KernelSource(file, code_arch(capability), (("SPINFER_BLOCKS_M", grid.blocks_m),))


class RowDecoder:
    """Decodes some row blocks of a weight; what does not change from call to call is worked out once.

    Args:
        grid: how the weight is cut.
        first: row block.
        count: of row blocks.
        index: of the device.
    """

    def __init__(self, grid: ChunkGrid, first: int, count: int, index: int) -> None:
        traits = device_traits(index)
        self._kernel = load(dense_source(grid, traits.capability), "spinfer_to_dense")
        self._grid, self._first, self._count, self._index = grid, first, count, index
        self._hopper = traits.hopper
        chunks = count * grid.chunks_k
        if self._hopper:
            ctas = min(chunks, traits.sm_count)
            self._shape = LaunchShape(ctas, _HOPPER_THREADS, traits.shared_nbytes, dependent=True)
            self._constants = _HOPPER_CONSTANTS.pack(
                grid.out_features,
                grid.in_features,
                grid.chunks_k,
                count,
                count,
                *divmod(chunks, ctas),
                _HOPPER_RING_AT,
                (traits.shared_nbytes - _HOPPER_RING_AT) // 128 * 128,
                IN_FLIGHT,
                0,
            )
        else:
            ctas = min(chunks * BLOCKS // _WARPS, traits.sm_count * _CTAS_A_SM)
            self._shape = LaunchShape(ctas, _WARPS * 32, _SHARED_NBYTES)

    def __call__(self, chunks: Tensor, offsets: Tensor, out: Tensor) -> None:
        """Write them on the current stream; the current device must be the weight's.

        Args:
            chunks: of the whole weight.
            offsets: of its chunks.
            out: (rows, K), dtype of the values, last stride 1; rows start at multiples of 16 bytes, and are written up
                to one.
        """
        arguments = (self._hopper_arguments if self._hopper else self._portable_arguments)(chunks, offsets, out)
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        self._kernel.launch(self._index, self._shape, stream, arguments)

    def _hopper_arguments(self, chunks: Tensor, offsets: Tensor, out: Tensor) -> bytes:
        grid = self._grid
        rows_map = _tensor_maps.get(out.data_ptr(), out.shape[0], grid.in_features, out.stride(0), BLOCK_ROWS)
        first_offset = offsets.data_ptr() + self._first * grid.chunks_k * offsets.element_size()
        call = _HOPPER_CALL.pack(chunks.data_ptr(), first_offset, chunks.numel() * 16 // grid.chunks)
        return rows_map + call + self._constants

    def _portable_arguments(self, chunks: Tensor, offsets: Tensor, out: Tensor) -> bytes:
        grid = self._grid
        return _ARGS.pack(
            chunks.data_ptr(),
            offsets.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            grid.out_features,
            grid.in_features,
            grid.chunks_k,
            self._first * grid.chunks_k,
            self._count * grid.chunks_k,
            self._first * grid.chunk_rows,
        )
