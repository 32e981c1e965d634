"""Cutting and joining encoded matrices: the same bits as encoding the cut matrix, and nothing decoded."""

from __future__ import annotations

import pytest
import torch

from spinfer.errors import FormatError
from spinfer.format import TcaBmeTensor, encode
from spinfer.format.cut import can_join_rows, cut_columns, cut_rows, join_rows
from support import DTYPES, bits, sparse


def same(found: TcaBmeTensor, expected: TcaBmeTensor) -> None:
    """Every array and number agrees, and the parts pass their checks."""
    found.validate()
    assert (found.shape, found.nnz) == (expected.shape, expected.nnz)
    assert torch.equal(bits(found.values), bits(expected.values))
    assert torch.equal(found.bitmap, expected.bitmap)
    assert torch.equal(found.offsets, expected.offsets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 192), (128, 200), (0, 200)])
def test_rows(dtype: torch.dtype, start: int, stop: int) -> None:
    dense = sparse(200, 150, dtype)
    same(cut_rows(encode(dense), start, stop), encode(dense[start:stop]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 192), (128, 200), (0, 200)])
def test_columns(dtype: torch.dtype, start: int, stop: int) -> None:
    dense = sparse(150, 200, dtype)
    same(cut_columns(encode(dense), start, stop), encode(dense[:, start:stop]))


def test_pieces_without_a_nonzero() -> None:
    dense = sparse(192, 192)
    dense[64:128] = 0
    dense[:, 64:128] = 0
    weight = encode(dense)
    same(cut_rows(weight, 64, 128), encode(dense[64:128]))
    same(cut_columns(weight, 64, 128), encode(dense[:, 64:128]))


def test_a_cut_of_rows_copies_no_values() -> None:
    weight = encode(sparse(256, 64))
    piece = cut_rows(weight, 128, 256)
    assert piece.values.untyped_storage().data_ptr() == weight.values.untyped_storage().data_ptr()


@pytest.mark.parametrize("rows", [(128,), (64, 128), (128, 64, 70)])
def test_join(rows: tuple[int, ...]) -> None:
    parts = [sparse(count, 130) for count in rows]
    same(join_rows([encode(part) for part in parts]), encode(torch.cat(parts)))


def test_cut_and_joined_again() -> None:
    weight = encode(sparse(300, 90))
    same(join_rows([cut_rows(weight, 0, 64), cut_rows(weight, 64, 192), cut_rows(weight, 192, 300)]), weight)


@pytest.mark.parametrize(("start", "stop"), [(32, 64), (0, 100), (64, 64), (0, 256), (-64, 64)])
def test_a_cut_inside_a_tile_or_outside_is_refused(start: int, stop: int) -> None:
    weight = encode(sparse(200, 200))
    for cut in (cut_rows, cut_columns):
        with pytest.raises(FormatError, match=r"cannot cut"):
            cut(weight, start, stop)


def test_what_cannot_be_joined() -> None:
    weight = encode(sparse(70, 64))
    assert can_join_rows([64, 70])
    assert not can_join_rows([70, 64])
    with pytest.raises(FormatError, match="multiple of 64 rows"):
        join_rows([weight, weight])
    with pytest.raises(FormatError, match="different columns"):
        join_rows([encode(sparse(64, 64)), encode(sparse(64, 128))])
