"""The portable path: decode a panel of rows into cache, multiply it with torch, go on to the next.

Pure torch, on any device; never holds the whole matrix dense. Native kernels are faster wherever they exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spinfer.format import Geometry, TcaBmeTensor
from spinfer.format.codec import decode_rows
from spinfer.format.layout import GROUP_TILE, OFFSET_UNIT
from spinfer.kernels.packed import STORAGE_LAYOUT, PackedWeight, as_packed
from spinfer.kernels.select import Problem, select


class TilewiseBackend:
    """Runs the storage layout as it is."""

    layout = STORAGE_LAYOUT

    def accepts(self, weight: TcaBmeTensor) -> bool:
        """Every weight."""
        return True

    def pack(self, weight: TcaBmeTensor) -> PackedWeight:
        """The same arrays; nothing is copied."""
        return as_packed(weight)

    def unpack(self, packed: PackedWeight) -> TcaBmeTensor:
        """The same arrays; nothing is copied."""
        values, bitmap, offsets = packed.parts
        return TcaBmeTensor(values, bitmap, offsets, packed.shape, packed.nnz)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """See `Backend.linear`."""
        leading, x = x.shape[:-1], x.reshape(-1, packed.shape[1])
        y = x.new_empty(x.shape[0], packed.shape[0])
        # Of two types the wider: a bf16 or fp32 weight may lie outside the range of an fp16 x.
        dtype = torch.promote_types(x.dtype, packed.dtype)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        for start, panel in _panels(x, packed):
            rows = slice(start, start + panel.shape[0])
            part = None if bias is None else bias[rows]
            y[:, rows] = torch.nn.functional.linear(x, panel.to(dtype), part)
        return y.view(*leading, packed.shape[0])

    def input_gradient(self, grad: Tensor, packed: PackedWeight) -> Tensor:
        """Compute grad W, (tokens, in_features), for grad (tokens, out_features); summed in fp32 over panels."""
        total = torch.zeros(grad.shape[0], packed.shape[1], dtype=torch.float32, device=grad.device)
        dtype = torch.promote_types(grad.dtype, packed.dtype)
        for start, panel in _panels(grad, packed):
            total += grad[:, start : start + panel.shape[0]].to(dtype) @ panel.to(dtype)
        return total.to(grad.dtype)


def _panels(x: Tensor, packed: PackedWeight) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, dense rows) panel by panel."""
    values, bitmap, offsets = packed.parts
    geometry = Geometry(*packed.shape)
    config = select(Problem(x.shape[0], *packed.shape, nnz=packed.nnz, dtype=packed.dtype, device_type=x.device.type))
    whole = config.group_rows >= geometry.group_rows
    # Reading offsets synchronises on CUDA; one panel needs none, and then CUDA graphs can capture this path.
    starts = [0] if whole else offsets[: -1 : geometry.group_cols * config.group_rows].tolist()
    for index, start in enumerate(starts):
        group_row = index * config.group_rows
        group_rows = min(config.group_rows, geometry.group_rows - group_row)
        dense = decode_rows(values[start * OFFSET_UNIT :], bitmap, geometry, group_row=group_row, group_rows=group_rows)
        yield group_row * GROUP_TILE, dense
