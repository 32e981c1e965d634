"""The fused kernel: x (tokens, K) times a packed weight, up to 128 tokens a pass."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.runtime import TensorMaps, Workspaces, load
from spinfer.kernels.cuda.select import FusedConfig

_POINTERS = struct.Struct("128s7Q2i")
_CONSTANTS = struct.Struct("7i")
"""LaunchArgs of matmul_sm90.cu: tensor map and MatmulArgs of matmul.cuh, split into what changes from call to call
and what does not."""

_tensor_maps = TensorMaps()
_workspaces = Workspaces()


class FusedPass:
    """One kernel with everything that does not change from call to call worked out, for a device and a configuration.

    Args:
        grid: how the weight is cut.
        config: tile of tokens, warps, shared memory.
        dtype: of the values, x, bias and y.
        device: where it runs.
    """

    def __init__(self, grid: ChunkGrid, config: FusedConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._kernel = load(self.source(grid, config, dtype), "spinfer_matmul")
        self._device = device
        self._box_rows = config.tokens
        self._padded = -(-grid.in_features // 8) * 8
        self._launch_shape = (
            device.index,
            config.ctas,
            config.warps_k * grid.blocks_m * 32 + 128,
            config.shared_nbytes,
        )
        self._floats = config.partials_floats(grid)
        self._row_blocks = grid.row_blocks
        self._constants = _CONSTANTS.pack(
            grid.out_features,
            grid.in_features,
            grid.chunks_k,
            grid.chunks,
            config.slots,
            config.ring_nbytes,
            config.in_flight,
        )

    @staticmethod
    def source(grid: ChunkGrid, config: FusedConfig, dtype: torch.dtype) -> KernelSource:
        """What to compile for a configuration."""
        defines = {
            "SPINFER_BF16": int(dtype == torch.bfloat16),
            "SPINFER_BLOCKS_M": grid.blocks_m,
            "SPINFER_TOKENS": config.tokens,
            "SPINFER_WARPS_K": config.warps_k,
            "SPINFER_STEPS": config.steps,
        }
        return KernelSource("matmul_sm90.cu", config.arch, tuple(defines.items()))

    def __call__(self, x: Tensor, chunks: Tensor, offsets: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Write y = x W^T + bias on the current stream; the current device must be x's.

        Args:
            x: (tokens, K), last stride 1.
            chunks: the weight.
            offsets: of its chunks.
            bias: (M,), or None.
            y: (tokens, M), contiguous.
        """
        tokens, in_features = x.shape
        stride, address = x.stride(0), x.data_ptr()
        if tokens == 1:
            stride = self._padded
        if address % 16 or stride % 8 or stride < in_features:  # TMA wants rows that start at multiples of 16 bytes
            x = x.new_empty(tokens, self._padded)[:, :in_features].copy_(x)
            stride, address = self._padded, x.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        partials, arrivals = _workspaces.get(self._device, stream, self._floats, self._row_blocks)
        arguments = _POINTERS.pack(
            _tensor_maps.get(address, tokens, in_features, stride, self._box_rows),
            chunks.data_ptr(),
            offsets.data_ptr(),
            address,
            y.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            partials.data_ptr(),
            arrivals.data_ptr(),
            stride,
            tokens,
        )
        self._kernel.launch(*self._launch_shape, stream, arguments + self._constants, dependent=True)
