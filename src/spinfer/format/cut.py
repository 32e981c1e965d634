"""Cut an encoded matrix, and join matrices below each other, by GroupTiles: nothing is decoded (FORMAT.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinfer.errors import FormatError
from spinfer.format.codec import group_tile_counts
from spinfer.format.layout import GROUP_TILE, GROUP_TILE_BITMAPS, OFFSET_UNIT
from spinfer.format.tensor import TcaBmeTensor


def cut_rows(weight: TcaBmeTensor, start: int, stop: int) -> TcaBmeTensor:
    """Rows start to stop of a matrix.

    Args:
        weight: (M, K).
        start: a multiple of 64.
        stop: a multiple of 64, or M.

    Returns:
        (stop - start, K); values and bitmap share memory with `weight`.

    Raises:
        FormatError: a cut inside of a GroupTile, or outside of the matrix.
    """
    first, end = _tiles(start, stop, weight.shape[0], "rows")
    columns = weight.geometry.group_cols
    offsets = weight.offsets[first * columns : end * columns + 1]
    begin, finish = offsets[[0, -1]].tolist()
    values = weight.values[begin * OFFSET_UNIT : finish * OFFSET_UNIT]
    bitmap = weight.bitmap[first * columns * GROUP_TILE_BITMAPS : end * columns * GROUP_TILE_BITMAPS]
    return _piece(values, bitmap, offsets - begin, (stop - start, weight.shape[1]))


def cut_columns(weight: TcaBmeTensor, start: int, stop: int) -> TcaBmeTensor:
    """Columns start to stop of a matrix (M, K); see `cut_rows`. Returns a copy of shape (M, stop - start)."""
    first, end = _tiles(start, stop, weight.shape[1], "columns")
    rows, columns = weight.geometry.group_rows, weight.geometry.group_cols
    tile = torch.arange(rows, device=weight.device).unsqueeze(1) * columns
    bounds = (weight.offsets[tile + torch.tensor([first, end], device=weight.device)] * OFFSET_UNIT).tolist()
    values = torch.cat([weight.values[begin:finish] for begin, finish in bounds])
    bitmap = weight.bitmap.view(rows, columns, GROUP_TILE_BITMAPS)[:, first:end].reshape(-1)
    steps = weight.offsets.diff().view(rows, columns)[:, first:end].reshape(-1)
    offsets = torch.zeros(steps.numel() + 1, dtype=torch.int32, device=weight.device)
    torch.cumsum(steps, 0, dtype=torch.int32, out=offsets[1:])
    return _piece(values, bitmap, offsets, (weight.shape[0], stop - start))


def can_join_rows(rows: Sequence[int]) -> bool:
    """Whether matrices of so many rows can be joined: all but the last must end with a GroupTile."""
    return all(count % GROUP_TILE == 0 for count in rows[:-1])


def join_rows(weights: Sequence[TcaBmeTensor]) -> TcaBmeTensor:
    """Matrices (M_i, K) below each other: (sum of M_i, K).

    Raises:
        FormatError: matrices of different K or dtype, or one but the last whose M is no multiple of 64.
    """
    if len(weights) == 1:
        return weights[0]
    if len({(weight.shape[1], weight.dtype) for weight in weights}) != 1:
        found = ", ".join(f"{weight.shape} {weight.dtype}" for weight in weights)
        raise FormatError(f"matrices of different columns or dtypes cannot be joined: {found}")
    if not can_join_rows([weight.shape[0] for weight in weights]):
        raise FormatError(f"only matrices of a multiple of {GROUP_TILE} rows can be joined")
    offsets, end = [weights[0].offsets[:1]], 0
    for weight in weights:
        offsets.append(weight.offsets[1:] + end)
        end += weight.values.numel() // OFFSET_UNIT
    if end > torch.iinfo(torch.int32).max:
        raise FormatError("the matrices hold more values together than one tensor can")
    return TcaBmeTensor(
        torch.cat([weight.values for weight in weights]),
        torch.cat([weight.bitmap for weight in weights]),
        torch.cat(offsets),
        (sum(weight.shape[0] for weight in weights), weights[0].shape[1]),
        sum(weight.nnz for weight in weights),
    )


def _tiles(start: int, stop: int, size: int, what: str) -> tuple[int, int]:
    """The GroupTiles that rows or columns start to stop are, as a range."""
    if not 0 <= start < stop <= size:
        raise FormatError(f"cannot cut {what} {start} to {stop} out of {size}")
    if start % GROUP_TILE or (stop % GROUP_TILE and stop != size):
        raise FormatError(
            f"cannot cut at {what} {start} to {stop}: the encoding is cut at multiples of {GROUP_TILE} only"
        )
    return start // GROUP_TILE, -(-stop // GROUP_TILE)


def _piece(values: Tensor, bitmap: Tensor, offsets: Tensor, shape: tuple[int, int]) -> TcaBmeTensor:
    return TcaBmeTensor(values, bitmap, offsets, shape, int(group_tile_counts(bitmap).sum()))
