"""The fused kernel: x (tokens, K) times a packed weight, up to 128 tokens a pass."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.runtime import Kernel, TensorMaps, Workspaces, load
from spinfer.kernels.cuda.select import FusedConfig

_LAUNCH_ARGS = struct.Struct("128s7Q13i")
"""LaunchArgs of matmul_sm90.cu: tensor map, then MatmulArgs of matmul.cuh."""

_tensor_maps = TensorMaps()
_workspaces = Workspaces()


@functools.lru_cache(maxsize=1024)
def _kernel(config: FusedConfig, blocks_m: int, dtype: torch.dtype) -> Kernel:
    defines = {
        "SPINFER_BF16": int(dtype == torch.bfloat16),
        "SPINFER_BLOCKS_M": blocks_m,
        "SPINFER_TOKENS": config.tokens,
        "SPINFER_WARPS_K": config.warps_k,
    }
    return load(KernelSource("matmul_sm90.cu", config.arch, tuple(defines.items())), "spinfer_matmul")


def _tma_ready(x: Tensor) -> Tensor:
    """`x`, or a copy of it whose rows start at multiples of 16 bytes, as TMA wants them."""
    if x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]:
        return x
    padded = x.new_empty(x.shape[0], -(-x.shape[1] // 8) * 8)[:, : x.shape[1]]
    return padded.copy_(x)


def fused(
    x: Tensor, chunks: Tensor, offsets: Tensor, bias: Tensor | None, y: Tensor, grid: ChunkGrid, config: FusedConfig
) -> None:
    """Write y = x W^T + bias, one pass; the current device is x's.

    Args:
        x: (tokens, K), last stride 1, dtype of the values.
        chunks: the weight.
        offsets: of its chunks.
        bias: (M,), dtype of the values, or None.
        y: (tokens, M), contiguous.
        grid: how the weight is cut.
        config: for at least as many tokens.
    """
    kernel = _kernel(config, grid.blocks_m, x.dtype)
    x = _tma_ready(x)
    tokens, in_features = x.shape
    index = x.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    partials, counters = _workspaces.get(x.device, stream, config.partials_floats(grid), 1 + grid.row_blocks)
    stride = x.stride(0) if tokens > 1 else -(-in_features // 8) * 8
    address = x.data_ptr()
    kernel.launch(
        index,
        config.grid,
        config.warps_k * grid.blocks_m * 32 + 128,
        config.shared_nbytes,
        _LAUNCH_ARGS,
        _tensor_maps.get(address, tokens, in_features, stride, config.tokens),
        chunks.data_ptr(),
        offsets.data_ptr(),
        address,
        y.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        partials.data_ptr(),
        counters.data_ptr(),
        tokens,
        grid.out_features,
        in_features,
        stride,
        grid.chunks_k,
        grid.chunks,
        config.static_each,
        config.static_extra,
        config.unit,
        config.units,
        config.slots,
        config.ring_nbytes,
        config.in_flight,
        dependent=True,
    )
