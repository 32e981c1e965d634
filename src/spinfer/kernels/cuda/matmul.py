"""The fused kernels: x (tokens, K) times a packed weight, one pass over the weight for some tokens."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.runtime import LaunchShape, TensorMaps, Workspaces, load
from spinfer.kernels.cuda.select import HopperConfig, PortableConfig, WideConfig

_CALL = struct.Struct("7Q2i")
_CONSTANTS = struct.Struct("12i")
"""MatmulArgs of csrc/matmul.cuh: what changes from call to call, then what does not."""

_NARROW_WARPS, _PORTABLE_WARPS, _PRODUCER_WARPS = 16, 8, 4

_tensor_maps = TensorMaps()
_workspaces = Workspaces()


Config = HopperConfig | WideConfig | PortableConfig


class FusedPass:
    """One kernel with everything that does not change from call to call worked out, for a device and a configuration.

    Args:
        grid: how the weight is cut.
        config: of the kernel.
        dtype: of the values, x, bias and y.
        device: where it runs.
    """

    def __init__(self, grid: ChunkGrid, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        self._kernel = load(source(grid, config, dtype), "spinfer_matmul")
        self._hopper = not isinstance(config, PortableConfig)
        self._device = device
        self._padded = -(-grid.in_features // 8) * 8
        warps, passes, split, memory = _PORTABLE_WARPS, 1, 1, (0, 0, 0, 0, 0)
        if isinstance(config, HopperConfig):
            warps, split = _NARROW_WARPS + _PRODUCER_WARPS, config.split
            memory = (config.slots, config.ring_at, config.ring_nbytes, config.in_flight, 0)
        elif isinstance(config, WideConfig):
            warps, passes = config.warps + _PRODUCER_WARPS, config.passes
            memory = (config.slots, config.ring_at, config.ring_nbytes, config.in_flight, config.boxes)
        self._box_rows = config.tokens
        self._strips = passes * grid.row_blocks
        self._floats = 2 * config.ctas * grid.chunk_rows * config.tokens
        self._launch_shape = LaunchShape(config.ctas, warps * 32, config.shared_nbytes, split, dependent=self._hopper)
        each, extra = divmod(self._strips * grid.chunks_k, config.ctas)
        self._constants = _CONSTANTS.pack(
            grid.out_features, grid.in_features, grid.chunks_k, grid.row_blocks, self._strips, each, extra, *memory
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
        partials, arrivals = _workspaces.get(self._device, stream, self._floats, self._strips)
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
        self._kernel.launch(self._device.index, self._launch_shape, stream, arguments + self._constants)


def source(grid: ChunkGrid, config: Config, dtype: torch.dtype) -> KernelSource:
    """What to compile for a configuration."""
    defines = {
        "SPINFER_BF16": int(dtype == torch.bfloat16),
        "SPINFER_BLOCKS_M": grid.blocks_m,
        "SPINFER_TOKENS": config.tokens,
    }
    if isinstance(config, PortableConfig):
        return KernelSource("matmul_portable.cu", config.arch, tuple(defines.items()))
    if isinstance(config, WideConfig):
        return KernelSource("matmul_wide_sm90.cu", "sm_90a", (*defines.items(), ("SPINFER_WARPS", config.warps)))
    return KernelSource("matmul_sm90.cu", "sm_90a", (*defines.items(), ("SPINFER_SPLIT", config.split)))
