"""Encode and decode TCA-BME in vectorised torch: the executable specification, on any device.

A chunk of GroupTile rows at a time is permuted into storage order; from there the bitmap is the packed nonzero test
and the values are one select of the nonzeros. Each GroupTile's row in the work buffer ends in OFFSET_UNIT spare lanes,
of which as many are selected as the GroupTile needs padding, so padded values come out of the same select.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from spinfer.errors import FormatError
from spinfer.format.layout import (
    BIT_PATTERN_DTYPES,
    GROUP_TILE,
    GROUP_TILE_BITMAPS,
    GROUP_TILE_WEIGHTS,
    OFFSET_UNIT,
    Geometry,
    dtype_name,
)

_CHUNK_WEIGHTS = 1 << 20
"""Weights encoded or decoded at a time, at least one row of GroupTiles: bounds the work buffers (about 15 bytes a
weight). On a CPU 256 Ki and 512 Ki were no faster."""

_TILE_AXES = (4, 4, 2, 2, 8, 8)  # band, TCTile along K, column half, row half, row, column
_PACK_BITS = 0x0102040810204080  # (0/1 bytes b0..b7 as int64) * this, top byte: bit j is b_j


def _storage_order(rows: Tensor, group_cols: int) -> Tensor:
    """View (64 n, 64 group_cols) as (n, group_cols, band, TCTile, column half, row half, row, column)."""
    split = rows.view(-1, 4, 2, 8, group_cols, 4, 2, 8)
    return split.permute(0, 4, 1, 5, 6, 2, 3, 7)


def _rows_per_chunk(geometry: Geometry) -> int:
    return max(1, _CHUNK_WEIGHTS // (GROUP_TILE_WEIGHTS * geometry.group_cols))


@functools.lru_cache(maxsize=8)
def _unpack_table(device: torch.device) -> Tensor:
    """int64 [256]: entry b holds the eight bits of b as 0/1 bytes."""
    # Every factory names its device: a table made under `with torch.device("meta")` would hold nothing.
    byte = torch.arange(256, dtype=torch.int64, device=device)
    table = torch.zeros(256, dtype=torch.int64, device=device)
    for bit in range(8):
        table |= ((byte >> bit) & 1) << (8 * bit)
    return table


def _positions(mask: Tensor) -> Tensor:
    """Indices of the True entries of a mask, int64, in order."""
    # On random bits torch's nonzero, masked_select and masked_scatter mispredict a branch per weight on a CPU (5 to
    # 9 ns each, measured); numpy's flatnonzero is branchless (1 ns), which makes encode 3 and decode 2 times as fast.
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)


def group_tile_counts(bitmap: Tensor) -> Tensor:
    """Nonzeros of each GroupTile, int64 [GroupTiles], from the bitmap (int64 [BitmapTiles])."""
    # Popcount of each word by adding neighbours: 2, 4, then 8 bits wide; the product's top byte sums the eight.
    pairs = bitmap - ((bitmap >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    words = (octets * 0x0101010101010101) >> 56
    return words.view(-1, GROUP_TILE_BITMAPS).sum(dim=1)


def encode_arrays(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Encode a dense (M, K) tensor.

    Args:
        weight: fp16, bf16 or fp32, any strides, on any device.

    Returns:
        values: 1-D, dtype of `weight`, padded a GroupTile; bitmap: int64; offsets: int32, in offset units; nnz.
    """
    dtype_name(weight.dtype)
    geometry = Geometry(*weight.shape)
    bits = weight.detach().view(BIT_PATTERN_DTYPES[weight.dtype])
    device = bits.device
    group_cols, step = geometry.group_cols, _rows_per_chunk(geometry)
    pad_cols = group_cols * GROUP_TILE - geometry.in_features
    lane = torch.arange(OFFSET_UNIT, device=device)

    values, bitmaps, counts = [], [], []
    for start in range(0, geometry.group_rows, step):
        rows = bits[start * GROUP_TILE : (start + step) * GROUP_TILE]
        pad_rows = -rows.shape[0] % GROUP_TILE
        if pad_cols or pad_rows:
            rows = torch.nn.functional.pad(rows, (0, pad_cols, 0, pad_rows))
        tiles_n = (rows.shape[0] // GROUP_TILE) * group_cols
        work = torch.empty(tiles_n, GROUP_TILE_WEIGHTS + OFFSET_UNIT, dtype=bits.dtype, device=device)
        weights = work[:, :GROUP_TILE_WEIGHTS]
        weights.view(-1, group_cols, *_TILE_AXES).copy_(_storage_order(rows, group_cols))
        work[:, GROUP_TILE_WEIGHTS:] = 0
        mask = torch.empty(work.shape, dtype=torch.bool, device=device)
        # Shifting the sign out makes -0.0 zero and keeps every other pattern, subnormals and NaN included.
        torch.ne(weights << 1, 0, out=mask[:, :GROUP_TILE_WEIGHTS])
        packed = (mask.view(torch.int64)[:, : GROUP_TILE_WEIGHTS // 8] * _PACK_BITS) >> 56
        bitmap = packed.to(torch.uint8).view(torch.int64).view(-1)
        count = group_tile_counts(bitmap)
        mask[:, GROUP_TILE_WEIGHTS:] = lane < (-count % OFFSET_UNIT).unsqueeze(1)
        values.append(work.view(-1).index_select(0, _positions(mask)))
        bitmaps.append(bitmap)
        counts.append(count)

    count = torch.cat(counts)
    offsets = torch.zeros(geometry.offsets_len, dtype=torch.int64, device=device)
    torch.cumsum((count + OFFSET_UNIT - 1) // OFFSET_UNIT, 0, out=offsets[1:])
    nnz, end = (int(n) for n in torch.stack((count.sum(), offsets[-1])).tolist())
    if end > torch.iinfo(torch.int32).max:
        raise FormatError(f"a weight of shape {tuple(weight.shape)} holds more values than one tensor can; split it")
    return torch.cat(values).view(weight.dtype), torch.cat(bitmaps), offsets.to(torch.int32), nnz


def decode_rows(values: Tensor, bitmap: Tensor, geometry: Geometry, *, group_row: int, group_rows: int) -> Tensor:
    """Decode some consecutive rows of GroupTiles.

    Args:
        values: 1-D values that start at the first of these GroupTiles (more may follow).
        bitmap: the whole bitmap, int64.
        geometry: of the whole matrix.
        group_row: first row of GroupTiles.
        group_rows: how many.

    Returns:
        Dense rows, dtype of `values`, shape (rows, in_features), -0.0 never among the restored zeros.

    Raises:
        FormatError: fewer values than the bitmap asks for (on a CPU; `TcaBmeTensor.validate` checks anywhere).
    """
    group_cols = geometry.group_cols
    per_row = group_cols * GROUP_TILE_BITMAPS
    words = bitmap[group_row * per_row : (group_row + group_rows) * per_row]
    tiles_n = group_rows * group_cols
    work = torch.zeros(
        tiles_n,
        GROUP_TILE_WEIGHTS + OFFSET_UNIT,
        dtype=BIT_PATTERN_DTYPES[values.dtype],
        device=values.device,
    )
    mask = torch.empty(work.shape, dtype=torch.bool, device=values.device)
    lanes = _unpack_table(values.device).index_select(0, words.view(torch.uint8).int())
    mask.view(torch.int64)[:, : GROUP_TILE_WEIGHTS // 8] = lanes.view(tiles_n, -1)
    pad = -group_tile_counts(words) % OFFSET_UNIT
    mask[:, GROUP_TILE_WEIGHTS:] = torch.arange(OFFSET_UNIT, device=values.device) < pad.unsqueeze(1)
    if values.device.type == "cpu":
        positions = _positions(mask)
        if positions.numel() > values.numel():
            raise FormatError(f"the bitmap asks for {positions.numel()} values, but {values.numel()} are left")
        work.view(-1).scatter_(0, positions, values.view(work.dtype))
    else:
        work.masked_scatter_(mask, values.view(work.dtype))
    weights = work[:, :GROUP_TILE_WEIGHTS].view(group_rows, group_cols, *_TILE_AXES)
    dense = weights.permute(0, 2, 5, 6, 1, 3, 4, 7).reshape(group_rows * GROUP_TILE, group_cols * GROUP_TILE)
    end = min(group_rows * GROUP_TILE, geometry.out_features - group_row * GROUP_TILE)
    return dense[:end, : geometry.in_features].view(values.dtype)


def decode_arrays(values: Tensor, bitmap: Tensor, offsets: Tensor, geometry: Geometry) -> Tensor:
    """Decode a whole matrix, a chunk of GroupTile rows at a time; dense (M, K), contiguous, dtype of `values`."""
    dense = torch.empty(geometry.out_features, geometry.in_features, dtype=values.dtype, device=values.device)
    step = _rows_per_chunk(geometry)
    starts = offsets[: geometry.group_tiles : geometry.group_cols * step].tolist()
    for index, start in enumerate(starts):
        group_row = index * step
        group_rows = min(step, geometry.group_rows - group_row)
        dense[group_row * GROUP_TILE : (group_row + group_rows) * GROUP_TILE] = decode_rows(
            values[start * OFFSET_UNIT :], bitmap, geometry, group_row=group_row, group_rows=group_rows
        )
    return dense
