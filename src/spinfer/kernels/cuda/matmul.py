"""The kernels that multiply: x (tokens, K) times a packed weight."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.configs import (
    MOST_COPIED_TOKENS,
    PANEL_ROWS,
    HopperConfig,
    PortableConfig,
    StagedConfig,
    WideConfig,
)
from spinfer.kernels.cuda.layout import BLOCK_COLS, ChunkGrid, ranges_in
from spinfer.kernels.cuda.runtime import LaunchShape, TensorMaps, Workspaces, load

_CALL = struct.Struct("8Q3i")
_CONSTANTS = struct.Struct("11i")
"""MatmulArgs of csrc/matmul.cuh: what changes from call to call, then what does not."""

_STAGED_CALL = struct.Struct("7Q2i")
_STAGED_CONSTANTS = struct.Struct("10i")
"""StagedArgs of csrc/matmul_staged_sm90.cu, likewise."""

_NARROW_WARPS, _PORTABLE_WARPS, _PRODUCER_WARPS = 16, 8, 4
_STAGED_THREADS, _STAGED_SHARED_NBYTES = 384, 227 * 1024

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
        warps, passes, split, twins, in_flight, boxes = _PORTABLE_WARPS, 1, 1, 1, 0, 0
        if not isinstance(config, PortableConfig):
            split, in_flight, boxes = config.split, config.in_flight, config.boxes
            warps = _NARROW_WARPS + _PRODUCER_WARPS
            if isinstance(config, WideConfig):
                warps, passes, twins = config.warps + _PRODUCER_WARPS, config.passes, config.twins
        row_blocks = -(-grid.row_blocks // twins) * twins
        self._copy_tokens = config.tokens // twins
        if self._copy_tokens > MOST_COPIED_TOKENS:
            self._copy_tokens //= 2
        self._strips = passes * row_blocks
        self._chunks, self._in_features = grid.chunks, grid.in_features
        # Pairs of CTAs exchange their sums without memory.
        self._floats = 0 if split > 1 else 2 * config.ctas * grid.chunk_rows * config.tokens
        self._launch_shape = LaunchShape(
            config.ctas, warps * 32, config.shared_nbytes, max(split, twins), dependent=self._hopper
        )
        each, extra = divmod(self._strips * grid.chunks_k // twins, config.ctas // twins)
        self._constants = _CONSTANTS.pack(
            grid.out_features,
            grid.in_features,
            grid.chunks_k,
            row_blocks,
            self._strips,
            each,
            extra,
            config.ring_at,
            config.ring_nbytes,
            in_flight,
            boxes,
        )

    def __call__(
        self, x: Tensor, tokens: int, stride: int, parts: tuple[Tensor, ...], bias: Tensor | None, y: Tensor
    ) -> None:
        """Write y = x W^T + bias on the current stream; the current device must be x's.

        Args:
            x: rows of K elements each, as of `Backend.linear`.
            tokens: how many, at most as many as the configuration has.
            stride: elements from one to the next.
            parts: of the weight.
            bias: (M,), or None.
            y: (..., M), contiguous, as many rows.
        """
        chunks, offsets = parts[:2]
        x, stride, address = _rows_aligned(x, tokens, stride, self._in_features)
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        partials = arrivals = 0
        if self._floats:
            workspace = _workspaces.get(self._device, stream, self._floats, self._strips)
            partials, arrivals = (part.data_ptr() for part in workspace)
        arguments = _CALL.pack(
            chunks.data_ptr(),
            offsets.data_ptr(),
            address,
            y.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            partials,
            arrivals,
            parts[2].data_ptr() if ranges_in(parts) else 0,
            stride,
            tokens,
            chunks.numel() * 16 // self._chunks,
        )
        if self._hopper:
            arguments = _tensor_maps.get(address, tokens, self._in_features, stride, self._copy_tokens) + arguments
        self._kernel.launch(self._device.index, self._launch_shape, stream, arguments + self._constants)


class _StagedLaunch:
    """What does not change from call to call of one launch of the kernel that stages the weight."""

    def __init__(self, grid: ChunkGrid, config: StagedConfig) -> None:
        shared_tiles = config.panels * config.token_tiles - config.whole
        self.row = config.first_row_block * grid.chunk_rows
        self.first_chunk = config.first_row_block * grid.chunks_k
        self.staging_nbytes = config.panels * grid.chunks_k * grid.blocks_k * PANEL_ROWS * BLOCK_COLS * 2
        self.partials_nbytes = shared_tiles * config.shares * PANEL_ROWS * config.tile * 4
        self.counters = 4 + config.panels * grid.chunks_k + shared_tiles
        self.shape = LaunchShape(config.ctas, _STAGED_THREADS, _STAGED_SHARED_NBYTES, dependent=True)
        self.constants = _STAGED_CONSTANTS.pack(
            min(config.row_blocks * grid.chunk_rows, grid.out_features - self.row),
            grid.chunks_k,
            config.row_blocks,
            -(-grid.in_features // BLOCK_COLS),
            config.panels,
            config.token_tiles,
            config.token_group,
            config.row_block_group,
            config.whole,
            config.shares,
        )


class StagedMatmul:
    """The kernel that stages the weight, likewise: all its launches for a device.

    Args:
        grid: how the weight is cut.
        launches: of the kernel.
        dtype: of the values, x, bias and y.
        device: where it runs.
    """

    def __init__(
        self, grid: ChunkGrid, launches: tuple[StagedConfig, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._tile = launches[0].tile  # of all of them
        self._kernel = load(staged_source(grid, self._tile, dtype), "spinfer_matmul_staged")
        self._launches = [_StagedLaunch(grid, config) for config in launches]
        self._out_features, self._in_features = grid.out_features, grid.in_features
        self._device = device

    def __call__(
        self, x: Tensor, tokens: int, stride: int, parts: tuple[Tensor, ...], bias: Tensor | None, y: Tensor
    ) -> None:
        """Write y = x W^T + bias as `FusedPass` does."""
        chunks, offsets = parts[:2]
        x, stride, address = _rows_aligned(x, tokens, stride, self._in_features)
        x_map = _tensor_maps.get(address, tokens, self._in_features, stride, self._tile)
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        for launch in self._launches:
            workspace = chunks.new_empty(launch.staging_nbytes + launch.partials_nbytes)
            staging = workspace.data_ptr()
            _, counters = _workspaces.get(self._device, stream, 0, launch.counters)
            call = _STAGED_CALL.pack(
                chunks.data_ptr(),
                offsets.data_ptr() + launch.first_chunk * offsets.element_size(),
                staging,
                staging + launch.staging_nbytes,
                counters.data_ptr(),
                y.data_ptr() + launch.row * y.element_size(),
                0 if bias is None else bias.data_ptr() + launch.row * bias.element_size(),
                self._out_features,
                tokens,
            )
            self._kernel.launch(self._device.index, launch.shape, stream, x_map + call + launch.constants)


def _rows_aligned(x: Tensor, tokens: int, stride: int, in_features: int) -> tuple[Tensor, int, int]:
    """x, or a copy of it, whose rows start at multiples of 16 bytes; its row stride and its address."""
    padded, address = -(-in_features // 8) * 8, x.data_ptr()
    if tokens == 1:
        stride = padded
    if address % 16 or stride % 8 or stride < in_features:
        x = x.new_empty(tokens, padded)[:, :in_features].copy_(x.reshape(tokens, in_features))
        return x, padded, x.data_ptr()
    return x, stride, address


def source(grid: ChunkGrid, config: Config, dtype: torch.dtype) -> KernelSource:
    """What to compile for a configuration."""
    defines = {
        "SPINFER_BF16": int(dtype == torch.bfloat16),
        "SPINFER_BLOCKS_M": grid.blocks_m,
        "SPINFER_TOKENS": config.tokens,
    }
    if isinstance(config, PortableConfig):
        return KernelSource("matmul_portable.cu", config.arch, tuple(defines.items()))
    defines |= {"SPINFER_SPLIT": config.split, "SPINFER_BY_COST": int(config.by_cost)}
    if isinstance(config, WideConfig):
        defines |= {
            "SPINFER_WARPS": config.warps,
            "SPINFER_BANDS": config.bands,
            "SPINFER_TWINS": config.twins,
        }
        return KernelSource("matmul_wide_sm90.cu", "sm_90a", tuple(defines.items()))
    return KernelSource("matmul_sm90.cu", "sm_90a", tuple(defines.items()))


def staged_source(grid: ChunkGrid, tile: int, dtype: torch.dtype) -> KernelSource:
    """What to compile for the kernel that stages the weight, for tiles of so many tokens."""
    defines = {
        "SPINFER_BF16": int(dtype == torch.bfloat16),
        "SPINFER_BLOCKS_M": grid.blocks_m,
        "SPINFER_TILE_TOKENS": tile,
    }
    return KernelSource("matmul_staged_sm90.cu", "sm_90a", tuple(defines.items()))
