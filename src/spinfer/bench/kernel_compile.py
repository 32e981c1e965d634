"""Which kernels a set of problems needs, and compiling them all at once before anything is timed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from spinfer.kernels.cuda.compile import KernelSource, cubin
from spinfer.kernels.cuda.configs import DeviceTraits, range_count
from spinfer.kernels.cuda.dense import dense_source
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.repack import repack_source
from spinfer.kernels.cuda.select import alternatives, choose
from spinfer.kernels.cuda.sources import sources_of


def kernel_sources(
    shapes: Iterable[tuple[int, int]],
    densities: Iterable[float],
    tokens: Iterable[int],
    dtypes: Sequence[torch.dtype],
    traits: DeviceTraits,
    *,
    uneven: bool = False,
    every: bool = False,
) -> list[KernelSource]:
    """Everything that these problems compile on a device, repacking included, each once.

    Args:
        shapes: of weights.
        densities: of them.
        tokens: of x.
        dtypes: of both.
        traits: of the device.
        uneven: whether there are weights with ranges by cost too.
        every: whether to compile all alternatives, for measuring them, and not only what the selection chooses.
    """
    shapes, densities, tokens = list(shapes), list(densities), list(tokens)
    found: dict[KernelSource, None] = {}
    for m, k in shapes:
        grid = ChunkGrid.of(m, k)
        found[repack_source(grid, traits.capability)] = None
        found[dense_source(grid, traits.capability)] = None
        for density in densities:
            for n, by_cost in itertools.product(tokens, (False, True) if uneven else (False,)):
                nnz, ranges = round(density * m * k), range_count(grid, traits) if by_cost else 0
                if every:
                    plans = list(alternatives(grid, nnz, n, traits, ranges).values())
                else:
                    plans = [choose(grid, nnz, n, True, traits, ranges)]
                for plan, dtype in itertools.product(plans, dtypes):
                    found |= dict.fromkeys(sources_of(grid, plan, dtype, traits.capability))
    return list(found)


def compile_all(sources: Sequence[KernelSource], workers: int) -> None:
    """Bring kernels into the disk cache, several compilers at a time."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(cubin, sources))
