"""Ranges of chunks of about the same cost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from spinfer.kernels.cuda.layout import MAX_CHUNK_NBYTES, VALUES_AT
from spinfer.kernels.cuda.ranges import ranges_by_cost


def _dearest(nbytes: NDArray[np.int64], starts: list[int]) -> float:
    """Of the ranges' costs, over the mean: an empty chunk's is 0.4 of a dense one's bytes, large ones' count twice."""
    cost = np.maximum(nbytes, 28e3) + np.maximum(nbytes - 40e3, 0)
    each = np.array([cost[a:b].sum() for a, b in itertools.pairwise(starts)])
    return float(each.max() / each.mean())


def _equal(chunks: int, count: int) -> list[int]:
    each, extra = divmod(chunks, count)
    return [i * each + min(i, extra) for i in range(count + 1)]


@given(st.lists(st.integers(VALUES_AT, MAX_CHUNK_NBYTES), min_size=1, max_size=400), st.data())
def test_every_chunk_is_in_one_range_and_none_is_empty(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    nbytes = np.array(sizes)
    ranges = ranges_by_cost(nbytes, count)
    equal = _equal(len(sizes), count)
    if ranges is None:
        assert _dearest(nbytes, equal) < 1.3
        return
    starts = ranges.tolist()
    assert ranges.dtype == np.int32
    assert starts[0] == 0
    assert starts[-1] == len(sizes)
    assert len(starts) == count + 1
    assert all(a < b for a, b in itertools.pairwise(starts))


def test_even_weights_have_none() -> None:
    assert ranges_by_cost(np.full(1000, 31000), 132) is None
    assert ranges_by_cost(np.full(132, MAX_CHUNK_NBYTES), 132) is None


@pytest.mark.parametrize("dense_first", [False, True])
def test_a_dense_stretch_is_shared(dense_first: bool) -> None:
    nbytes = np.full(2000, 31000)
    nbytes[:400] = MAX_CHUNK_NBYTES if dense_first else VALUES_AT
    nbytes[-400:] = VALUES_AT if dense_first else MAX_CHUNK_NBYTES
    ranges = ranges_by_cost(nbytes, 132)
    assert ranges is not None
    assert _dearest(nbytes, ranges.tolist()) < 1.15 < 1.8 < _dearest(nbytes, _equal(2000, 132))
