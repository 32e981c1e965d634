"""The fused kernels: x (tokens, K) times a packed weight, one pass over the weight for some tokens."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.runtime import TensorMaps, Workspaces, load
from spinfer.kernels.cuda.select import HopperConfig, PortableConfig

_CALL = struct.Struct("7Q2i")
_CONSTANTS = struct.Struct("9i")
"""MatmulArgs of csrc/matmul.cuh: what changes from call to call, then what does not."""

_PORTABLE_THREADS = 256
_PRODUCER_THREADS = 128

_tensor_maps = TensorMaps()
_workspaces = Workspaces()


class FusedPass:
    """One kernel with everything that does not change from call to call worked out, for a device and a configuration.

    Args:
        grid: how the weight is cut.
        config: of the Hopper kernel or of the portable one.
        dtype: of the values, x, bias and y.
        device: where it runs.
    """

    def __init__(
        self, grid: ChunkGrid, config: HopperConfig | PortableConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._kernel = load(source(grid, config, dtype), "spinfer_matmul")
        self._hopper = isinstance(config, HopperConfig)
        self._device = device
        self._box_rows = config.tokens
        self._padded = -(-grid.in_features // 8) * 8
        self._floats = 2 * config.ctas * grid.chunk_rows * config.tokens
        self._row_blocks = grid.row_blocks
        threads, ring = _PORTABLE_THREADS, (0, 0, 0)
        if isinstance(config, HopperConfig):
            threads = config.warps_k * grid.blocks_m * 32 + _PRODUCER_THREADS
            ring = (config.slots, config.ring_nbytes, config.in_flight)
        self._launch_shape = (device.index, config.ctas, threads, config.shared_nbytes)
        each, extra = divmod(grid.chunks, config.ctas)
        self._constants = _CONSTANTS.pack(
            grid.out_features, grid.in_features, grid.chunks_k, grid.chunks, each, extra, *ring
        )

    def __call__(self, x: Tensor, chunks: Tensor, offsets: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Write y = x W^T + bias on the current stream; the current device must be x's.

        Args:
            x: (tokens, K), last stride 1, at most as many tokens as the configuration has.
            chunks: the weight.
            offsets: of its chunks.
            bias: (M,), or None.
            y: (tokens, M), contiguous.
        """
        tokens, in_features = x.shape
        stride, address = x.stride(0), x.data_ptr()
        if tokens == 1:
            stride = self._padded
        if address % 16 or stride % 8 or stride < in_features:  # rows must start at multiples of 16 bytes
            x = x.new_empty(tokens, self._padded)[:, :in_features].copy_(x)
            stride, address = self._padded, x.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        partials, arrivals = _workspaces.get(self._device, stream, self._floats, self._row_blocks)
        arguments = _CALL.pack(
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
        if self._hopper:
            arguments = _tensor_maps.get(address, tokens, in_features, stride, self._box_rows) + arguments
        self._kernel.launch(*self._launch_shape, stream, arguments + self._constants, dependent=self._hopper)


def source(grid: ChunkGrid, config: HopperConfig | PortableConfig, dtype: torch.dtype) -> KernelSource:
    """What to compile for a configuration."""
    defines = {
        "SPINFER_BF16": int(dtype == torch.bfloat16),
        "SPINFER_BLOCKS_M": grid.blocks_m,
        "SPINFER_TOKENS": config.tokens,
    }
    if isinstance(config, PortableConfig):
        return KernelSource("matmul_portable.cu", config.arch, tuple(defines.items()))
    defines |= {"SPINFER_WARPS_K": config.warps_k, "SPINFER_STEPS": config.steps}
    return KernelSource("matmul_sm90.cu", "sm_90a", tuple(defines.items()))
