"""Ranges of chunks of about the same cost, for a weight whose nonzeros are spread unevenly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_DECODING_NBYTES = 28e3
"""What the GPU copies in the time that a CTA takes to decode a chunk, however empty."""

_LARGE_NBYTES = 40e3
"""From here on a byte costs twice as much: shared memory holds few chunks of that size, so that copies wait."""

_UNEVEN = 1.3
"""Share of the mean cost that the dearest of equally long ranges must have. On an H200 at 60 % zeros and one token two
weights with 1.6 and 2.0 (dense and empty rows, blocks, and stretches of 256 x 2048) take, over random zeros, 1.01
instead of 1.39 (28672 x 8192), and 1.12 instead of 1.48 (8192 x 8192). Clustered zeros have 1.06 to 1.2. There nothing
is gained, and pairs of CTAs, which have no such ranges, are lost: 8192 x 8192 takes 1.05 with them and 1.16 without."""


def ranges_by_cost(nbytes: NDArray[np.int64], count: int) -> NDArray[np.int32] | None:
    """Deal chunks out in ranges of consecutive ones.

    Args:
        nbytes: [chunks], of each chunk.
        count: ranges, at most as many as chunks; none is empty.

    Returns:
        [count + 1], the chunk that each range begins with, and the number of chunks; or None where ranges of the same
        number of chunks do as well.
    """
    chunks = len(nbytes)
    cost = np.maximum(nbytes, _DECODING_NBYTES) + np.maximum(nbytes - _LARGE_NBYTES, 0)
    before = np.concatenate(([0.0], np.cumsum(cost)))
    mean = before[-1] / count
    each, extra = divmod(chunks, count)
    index = np.arange(count + 1)
    if np.diff(before[each * index + np.minimum(index, extra)]).max() < _UNEVEN * mean:
        return None
    # A chunk goes where its middle lies; then each range gets at least one.
    starts = np.searchsorted(before[1:] - cost / 2, index * mean)
    starts = np.maximum.accumulate(starts - index) + index
    ranges: NDArray[np.int32] = np.clip(starts, index, index + chunks - count).astype(np.int32)
    return ranges
