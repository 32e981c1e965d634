"""Encode and decode TCA-BME in vectorised torch: the executable specification, on any device.

A chunk of GroupTile rows at a time is permuted into storage order; from there the bitmap is the packed nonzero test
and the values are one masked select. Each GroupTile's row in the work buffer ends in OFFSET_UNIT spare
lanes, of which as many are selected as the GroupTile needs padding, so padded values come out of the same select.
"""

from __future__ import annotations

import functools

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
"""Weights encoded or decoded at a time. 1 Mi keeps the work buffers (about 5 bytes a weight) near the caches."""

_TILE_AXES = (4, 4, 2, 2, 8, 8)  # band, TCTile along K, column half, row half, row, column
_PACK_BITS = 0x0102040810204080  # (0/1 bytes b0..b7 as int64) * this, top byte: bit j is b_j


def _storage_order(rows: Tensor, group_cols: int) -> Tensor:
    """View (64 n, 64 group_cols) as (n, group_cols, band, TCTile, column half, row half, row, column)."""
    split = rows.view(-1, 4, 2, 8, group_cols, 4, 2, 8)
    return split.permute(0, 4, 1, 5, 6, 2, 3, 7)


def _rows_per_chunk(geometry: Geometry) -> int:
    return max(1, _CHUNK_WEIGHTS // (GROUP_TILE * GROUP_TILE * geometry.group_cols))


@functools.lru_cache(maxsize=8)
def _unpack_table(device: torch.device) -> Tensor:
    """int64 [256]: entry b holds the eight bits of b as 0/1 bytes."""
    byte = torch.arange(256, dtype=torch.int64)
    table = torch.zeros(256, dtype=torch.int64)
    for bit in range(8):
        table |= ((byte >> bit) & 1) << (8 * bit)
    return table.to(device)


@functools.lru_cache(maxsize=8)
def _popcount_table(device: torch.device) -> Tensor:
    return torch.tensor([bin(b).count("1") for b in range(256)], dtype=torch.uint8).to(device)


def group_tile_counts(bitmap: Tensor) -> Tensor:
    """Nonzeros of each GroupTile, int64 [GroupTiles], from the bitmap (int64 [BitmapTiles])."""
    bits = _popcount_table(bitmap.device)[bitmap.view(torch.uint8).int()]
    return bits.view(-1, GROUP_TILE_BITMAPS * 8).sum(dim=1, dtype=torch.int64)


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
        weights.view(-1, group_cols, *_TILE_AXES).copy_(_storage_order(rows.contiguous(), group_cols))
        work[:, GROUP_TILE_WEIGHTS:] = 0
        mask = torch.empty(work.shape, dtype=torch.bool, device=device)
        # Shifting the sign out makes -0.0 zero and keeps every other pattern, subnormals and NaN included.
        torch.ne(weights << 1, 0, out=mask[:, :GROUP_TILE_WEIGHTS])
        packed = (mask.view(torch.int64)[:, : GROUP_TILE_WEIGHTS // 8] * _PACK_BITS) >> 56
        bitmap = packed.to(torch.uint8).view(torch.int64).view(-1)
        count = group_tile_counts(bitmap)
        mask[:, GROUP_TILE_WEIGHTS:] = lane < (-count % OFFSET_UNIT).unsqueeze(1)
        values.append(torch.masked_select(work, mask))
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
    table = _unpack_table(values.device)
    mask.view(torch.int64)[:, : GROUP_TILE_WEIGHTS // 8] = table[words.view(torch.uint8).int()].view(tiles_n, -1)
    pad = -group_tile_counts(words) % OFFSET_UNIT
    mask[:, GROUP_TILE_WEIGHTS:] = torch.arange(OFFSET_UNIT, device=values.device) < pad.unsqueeze(1)
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
