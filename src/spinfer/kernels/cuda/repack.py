"""Storage layout <-> kernels' layout, on the GPU."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from spinfer.errors import FormatError
from spinfer.format import Geometry, TcaBmeTensor
from spinfer.format.codec import group_tile_counts
from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.configs import code_arch, range_count
from spinfer.kernels.cuda.layout import BLOCKS, MAX_CHUNK_NBYTES, OFFSET_UNIT, ChunkGrid
from spinfer.kernels.cuda.ranges import ranges_by_cost
from spinfer.kernels.cuda.runtime import LaunchShape, device_traits, load

_REPACK_ARGS = struct.Struct("6Q4i")
"""RepackArgs of repack.cu."""

_THREADS = BLOCKS * 32
_CTAS_A_SM = 8
"""Chunks differ in size, so CTAs are a few waves' worth and take chunks in a stride."""


def repack_source(grid: ChunkGrid, capability: tuple[int, int]) -> KernelSource:
    """What to compile for a matrix and a device."""
    return KernelSource("repack.cu", code_arch(capability), (("SPINFER_BLOCKS_M", grid.blocks_m),))


def _launch(
    name: str,
    grid: ChunkGrid,
    device: torch.device,
    *,
    bitmap: Tensor | None = None,
    group_offsets: Tensor | None = None,
    values: Tensor | None = None,
    chunks: Tensor | None = None,
    offsets: Tensor | None = None,
    sizes: Tensor | None = None,
    shared: int = 0,
) -> None:
    geometry = Geometry(grid.out_features, grid.in_features)
    index = device.index
    traits = device_traits(index)
    source = repack_source(grid, traits.capability)
    parts = (bitmap, group_offsets, values, chunks, offsets, sizes)
    arguments = _REPACK_ARGS.pack(
        *(0 if part is None else part.data_ptr() for part in parts),
        geometry.group_rows,
        geometry.group_cols,
        grid.chunks_k,
        grid.chunks,
    )
    with torch.cuda.device(index):
        load(source, name).launch(
            index,
            LaunchShape(min(grid.chunks, traits.sm_count * _CTAS_A_SM), _THREADS, shared),
            torch._C._cuda_getCurrentRawStream(index),
            arguments,
        )


def pack_chunks(weight: TcaBmeTensor) -> tuple[Tensor, ...]:
    """Bring a weight on a CUDA device into the kernels' layout; returns its parts.

    Waits for the GPU: the size of the result depends on the data, and the fused kernel may read it before the kernels
    ahead of it in its stream are complete.
    """
    grid = ChunkGrid.of(*weight.shape)
    device = weight.device
    sizes = torch.empty(grid.chunks, dtype=torch.int64, device=device)
    _launch("spinfer_chunk_sizes", grid, device, bitmap=weight.bitmap, sizes=sizes)
    # On the host: copying there and back takes less time than the launches of some 20 small kernels.
    size_of = sizes.cpu().numpy()
    ends = np.concatenate(([0], np.cumsum(size_of)))
    units = int(ends[-1])
    if units > torch.iinfo(torch.int32).max:
        raise FormatError(f"a weight of shape {weight.shape} takes more than 32 GiB; split it")
    offsets = torch.from_numpy(ends.astype(np.int32)).to(device)
    traits = device_traits(device.index)
    ranges = ranges_by_cost(size_of * OFFSET_UNIT, range_count(grid, traits)) if traits.hopper else None
    uneven = () if ranges is None else (torch.from_numpy(ranges).to(device),)
    chunks = torch.empty(units * OFFSET_UNIT, dtype=torch.uint8, device=device)
    _launch(
        "spinfer_pack",
        grid,
        device,
        bitmap=weight.bitmap,
        group_offsets=weight.offsets,
        values=weight.values,
        chunks=chunks,
        offsets=offsets,
        shared=MAX_CHUNK_NBYTES,
    )
    torch.cuda.current_stream(device).synchronize()
    return chunks, offsets, *uneven


def unpack_chunks(
    chunks: Tensor, offsets: Tensor, shape: tuple[int, int], nnz: int, dtype: torch.dtype
) -> TcaBmeTensor:
    """The inverse of `pack_chunks`, bit-exact."""
    grid, geometry, device = ChunkGrid.of(*shape), Geometry(*shape), chunks.device
    bitmap = torch.empty(geometry.bitmap_words, dtype=torch.int64, device=device)
    _launch("spinfer_unpack_bitmap", grid, device, bitmap=bitmap, chunks=chunks, offsets=offsets)
    ends = torch.zeros(geometry.offsets_len, dtype=torch.int64, device=device)
    torch.cumsum((group_tile_counts(bitmap) + 7) // 8, 0, out=ends[1:])
    group_offsets = ends.to(torch.int32)
    values = torch.zeros(int(ends[-1]) * 8, dtype=dtype, device=device)
    _launch(
        "spinfer_unpack_values",
        grid,
        device,
        bitmap=bitmap,
        group_offsets=group_offsets,
        values=values,
        chunks=chunks,
        offsets=offsets,
    )
    return TcaBmeTensor(values, bitmap, group_offsets, shape, nnz)
