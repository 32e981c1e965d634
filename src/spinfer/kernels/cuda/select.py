"""(problem, device) -> kernel configuration on CUDA: pure, so that every choice can be tested without a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from spinfer.kernels.cuda.layout import BLOCK_COLS, BLOCK_ROWS, MAX_CHUNK_NBYTES, ChunkGrid

MAX_TOKENS = 128
"""Most columns of one pass over the weight."""

_TOKEN_TILES = (8, 16, 24, 32, 48, 64, 96, 128)
_MAX_SLOTS = 8
_PORTABLE_TILES = (8, 16, 32)
_PORTABLE_WARPS = 8

_MOST_HOPPER = 256
"""Most tokens of the fused path. Measured on an H100 at 60 %, 28672 x 8192: two passes take 409 us at 256 tokens, three
632 at 384; decoding takes 335 and cuBLAS then 189 and 248. benchmarks/results/h100/kernel_tokens.json."""

_MOST_PORTABLE = 64
"""Not measured on the GPUs it is for: two passes over the weight, then decoding once."""

_WORKSPACE_NBYTES = 512 << 20
"""Dense rows held at a time on the decoded path: a whole matrix of any common layer, so that cuBLAS fills the GPU."""

_BARRIER_NBYTES = 1024


@dataclass(frozen=True)
class DeviceTraits:
    """What a selection may depend on.

    Attributes:
        capability: compute capability, (9, 0) for Hopper.
        sm_count: multiprocessors.
        shared_nbytes: most dynamic shared memory of one block.
    """

    capability: tuple[int, int]
    sm_count: int
    shared_nbytes: int


@dataclass(frozen=True)
class HopperConfig:
    """One pass of csrc/matmul_sm90.cu.

    Attributes:
        tokens: columns of the pass, a compile-time constant.
        warps_k: warps along k; blocks_m * warps_k consumer warps.
        steps: steps of 16 columns decoded before their products are issued.
        ctas: how many; each takes a range of consecutive chunks.
        slots: chunks that may be in shared memory.
        ring_nbytes: shared memory for the weight.
        shared_nbytes: shared memory in all.
        in_flight: copies outstanding at a time.
    """

    tokens: int
    warps_k: int
    steps: int
    ctas: int
    slots: int
    ring_nbytes: int
    shared_nbytes: int
    in_flight: int


@dataclass(frozen=True)
class PortableConfig:
    """One pass of csrc/matmul_portable.cu.

    Attributes:
        arch: what to compile for.
        tokens: columns of the pass, a compile-time constant.
        ctas: how many; each takes a range of consecutive chunks.
        shared_nbytes: shared memory of each.
    """

    arch: str
    tokens: int
    ctas: int
    shared_nbytes: int


def _scratch_nbytes(grid: ChunkGrid, warps_k: int, tile: int) -> int:
    return (warps_k - 1) * grid.blocks_m * 2 * min(2, tile // 8) * 512


def token_tile(tokens: int) -> int:
    """The smallest compiled number of columns that holds `tokens` (at most 128)."""
    return next(tile for tile in _TOKEN_TILES if tile >= tokens)


def hopper_config(
    grid: ChunkGrid,
    nnz: int,
    tokens: int,
    traits: DeviceTraits,
    *,
    warps: int | None = None,
    steps: int | None = None,
    in_flight: int = 2,
) -> HopperConfig:
    """Configuration of one pass with 1 to 128 tokens.

    Args:
        grid: how the weight is cut.
        nnz: its nonzeros.
        tokens: N.
        traits: of the device.
        warps: consumer warps, 16 or 8, instead of the choice.
        steps: of `HopperConfig`, instead of the choice.
        in_flight: copies of the weight outstanding at a time.
    """
    tile = token_tile(tokens)
    # 16 warps of 112 registers hold the accumulators of 32 tokens (48 spill); beyond, 8 warps of 232.
    if warps is None:
        warps = 16 if tile <= 32 else 8
    if steps is None:
        steps = 2 if 32 < tile < 128 else 1
    warps_k = warps // grid.blocks_m
    x_nbytes = grid.blocks_k * tile * 128
    scratch = _scratch_nbytes(grid, warps_k, tile)
    room = traits.shared_nbytes - scratch - _BARRIER_NBYTES
    chunk = grid.mean_chunk_nbytes(nnz)
    slots = max(2, min(_MAX_SLOTS, room // (x_nbytes + chunk), (room - MAX_CHUNK_NBYTES) // x_nbytes))
    ring = (room - slots * x_nbytes) // 128 * 128
    return HopperConfig(
        tokens=tile,
        warps_k=warps_k,
        steps=steps,
        ctas=min(traits.sm_count, grid.chunks),
        slots=slots,
        ring_nbytes=ring,
        shared_nbytes=slots * x_nbytes + ring + scratch + _BARRIER_NBYTES,
        in_flight=min(in_flight, slots),
    )


def portable_config(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> PortableConfig:
    """Configuration of one pass with 1 to 32 tokens on a GPU other than Hopper."""
    tile = next(tile for tile in _PORTABLE_TILES if tile >= tokens)
    warps_k = _PORTABLE_WARPS // grid.blocks_m
    buffers = 2 * _PORTABLE_WARPS * (256 + BLOCK_ROWS * BLOCK_COLS * 2 + 32)
    shared = buffers + _scratch_nbytes(grid, warps_k, tile) + 16
    ctas_a_sm = 2 if traits.shared_nbytes >= 2 * shared else 1
    return PortableConfig(
        arch=code_arch(traits.capability),
        tokens=tile,
        ctas=min(traits.sm_count * ctas_a_sm, grid.chunks),
        shared_nbytes=shared,
    )


@dataclass(frozen=True)
class Fused:
    """Passes of a fused kernel over `step` tokens each; the last has what remains."""

    step: int
    passes: tuple[HopperConfig, ...] | tuple[PortableConfig, ...]


@dataclass(frozen=True)
class Decoded:
    """Decode `row_blocks` row blocks at a time into a workspace and multiply with cuBLAS."""

    row_blocks: int


@functools.lru_cache(maxsize=4096)
def choose(grid: ChunkGrid, nnz: int, tokens: int, same_dtype: bool, traits: DeviceTraits) -> Fused | Decoded:
    """How to compute x W^T for a weight on a GPU.

    Args:
        grid: how the weight is cut.
        nnz: its nonzeros.
        tokens: rows of x.
        same_dtype: whether x has the dtype of the values.
        traits: of the device.
    """
    hopper = traits.capability == (9, 0)
    most, step = (_MOST_HOPPER, MAX_TOKENS) if hopper else (_MOST_PORTABLE, _PORTABLE_TILES[-1])
    if same_dtype and tokens <= most:
        parts = [min(step, tokens - start) for start in range(0, tokens, step)]
        if hopper:
            return Fused(step, tuple(hopper_config(grid, nnz, part, traits) for part in parts))
        return Fused(step, tuple(portable_config(grid, part, traits) for part in parts))
    row_nbytes = grid.chunk_rows * grid.in_features * 2
    return Decoded(row_blocks=max(1, min(grid.row_blocks, _WORKSPACE_NBYTES // row_nbytes)))


def code_arch(capability: tuple[int, int]) -> str:
    """What to compile for: Hopper's own instructions on 9.0, the exact architecture elsewhere."""
    return "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"
