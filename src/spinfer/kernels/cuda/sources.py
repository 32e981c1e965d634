"""What has to be compiled for a weight: the kernels of a choice, or of all that any number of tokens leads to."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.configs import STAGED_TILES, DeviceTraits
from spinfer.kernels.cuda.dense import dense_source
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.matmul import source, staged_source
from spinfer.kernels.cuda.select import MOST_FUSED_TOKENS, NOT_TUNED, Dense, Fused, Plan, Staged, choose


def sources_of(grid: ChunkGrid, plan: Plan, dtype: torch.dtype, capability: tuple[int, int]) -> list[KernelSource]:
    """The kernels of one plan, for x and values of `dtype`."""
    if isinstance(plan, Fused):
        return [source(grid, config, dtype) for config in plan.passes]
    if isinstance(plan, Dense):
        return []
    if isinstance(plan, Staged):
        return [staged_source(grid, plan.launches[0].tile, dtype)]
    return [dense_source(grid, capability)]


def all_sources(
    shape: tuple[int, int],
    nnz: int,
    dtype: torch.dtype,
    traits: DeviceTraits,
    ranges: int = 0,
    dense: bool = False,
    tuned: Mapping[int, str] = NOT_TUNED,
) -> list[KernelSource]:
    """The kernels that a weight may need, those for few tokens first, each once.

    Args:
        shape: of the weight.
        nnz: its nonzeros.
        dtype: of values and x.
        traits: of the device.
        ranges: as of `choose`.
        dense: likewise.
        tuned: likewise.
    """
    grid = ChunkGrid.of(*shape)
    found: dict[KernelSource, None] = {}
    # Eight numbers of tokens are treated alike. Of larger ones a few show whether the weight is staged or decoded.
    counts = (*range(8, MOST_FUSED_TOKENS, 8), *range(MOST_FUSED_TOKENS, 8 * MOST_FUSED_TOKENS + 1, 128))
    plans = [choose(grid, nnz, tokens, True, traits, ranges, dense, tuned) for tokens in counts]
    for plan in plans:
        found |= dict.fromkeys(sources_of(grid, plan, dtype, traits.capability))
    if any(isinstance(plan, Staged) for plan in plans):
        found |= dict.fromkeys(staged_source(grid, tile, dtype) for tile in STAGED_TILES)
    return list(found)
