"""Dense copies of weights beside the compressed ones, for calls of many tokens: `SPINFER_DENSE_COPIES_GIB`."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef  # expires with the memory, whichever tensors share it

from spinfer import env
from spinfer.errors import SpinferError
from spinfer.kernels.cuda.dense import RowDecoder
from spinfer.kernels.cuda.layout import ChunkGrid

_ALIGNED = 8
"""cuBLAS needs rows of x, weight and y to start at multiples of 16 bytes to be fast."""


def memory_wanted() -> int:
    """Bytes of each GPU that dense copies may take, as the environment says; 0 if it says nothing.

    Raises:
        SpinferError: it says something else than an amount.
    """
    setting = env.dense_copies_gib()
    try:
        gib = float(setting or 0)
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise SpinferError(f"SPINFER_DENSE_COPIES_GIB is {setting!r}; set it to GiB of each GPU, such as 16, or to 0")
    return int(gib * 2**30)


class DenseCopies:
    """Makes copies as long as those alive leave room in the memory wanted for them."""

    def __init__(self) -> None:
        self._alive: dict[int, list[tuple[StorageWeakRef, int]]] = {}
        self._lock = threading.Lock()

    def room(self, index: int) -> int:
        """Bytes left on a device."""
        alive = [(storage, nbytes) for storage, nbytes in self._alive.get(index, []) if not storage.expired()]
        self._alive[index] = alive
        return memory_wanted() - sum(nbytes for _, nbytes in alive)

    def add(self, parts: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The parts of a weight with its dense copy (M, K) as the last, if there is room for one; else as they are.

        Waits for the GPU. Copies of weights whose sides are no multiples of 8 would gain nothing, and are not made.

        Raises:
            SpinferError: the GPU has less memory left than the environment wants to be used.
        """
        nbytes = shape[0] * shape[1] * dtype.itemsize
        device = parts[0].device
        with self._lock:
            if any(side % _ALIGNED for side in shape) or nbytes > self.room(device.index):
                return parts
            try:
                dense = torch.empty(shape, dtype=dtype, device=device)
            except torch.OutOfMemoryError as error:
                raise SpinferError(
                    f"no memory is left on {device} for a dense copy of a weight of {shape[0]} x {shape[1]}; "
                    "set SPINFER_DENSE_COPIES_GIB to less"
                ) from error
            self._alive[device.index].append((StorageWeakRef(dense.untyped_storage()), nbytes))
        grid = ChunkGrid.of(*shape)
        with torch.cuda.device(device):
            RowDecoder(grid, 0, grid.row_blocks, device.index)(parts[0], parts[1], dense)
        torch.cuda.current_stream(device).synchronize()
        return *parts, dense


DENSE_COPIES = DenseCopies()
"""Those of this process."""
