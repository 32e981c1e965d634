"""From a plan to what runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from spinfer.kernels.cuda.dense import RowDecoder
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.matmul import FusedPass, StagedMatmul
from spinfer.kernels.cuda.select import Decoded, Dense, Fused, Plan, Staged


class Run(Protocol):
    """A plan ready to run."""

    def __call__(
        self, x: Tensor, tokens: int, stride: int, parts: tuple[Tensor, ...], bias: Tensor | None, y: Tensor
    ) -> None:
        """As `FusedPass.__call__`, for all tokens."""


def run_of(plan: Plan, grid: ChunkGrid, dtype: torch.dtype, device: torch.device) -> Run:
    """What runs a plan.

    Args:
        plan: for so many tokens or more.
        grid: how the weight is cut.
        dtype: of the values; of x, bias and y too, unless the weight is decoded.
        device: where it runs.
    """
    if isinstance(plan, Decoded):
        return _DecodedMatmul(grid, plan.row_blocks, dtype, device)
    if isinstance(plan, Dense):
        return _multiply_dense_copy
    if isinstance(plan, Staged):
        return StagedMatmul(grid, plan.launches, dtype, device)
    passes = [FusedPass(grid, config, dtype, device) for config in plan.passes]
    return passes[0] if len(passes) == 1 else _Passes(plan, passes)


class _Passes:
    def __init__(self, plan: Fused, passes: Sequence[Run]) -> None:
        self._step, self._passes = plan.step, passes

    def __call__(
        self, x: Tensor, tokens: int, stride: int, parts: tuple[Tensor, ...], bias: Tensor | None, y: Tensor
    ) -> None:
        x_rows, y_rows = x.reshape(tokens, -1), y.view(tokens, -1)
        for first, run in zip(range(0, tokens, self._step), self._passes, strict=True):
            part = x_rows[first : first + self._step]
            run(part, part.shape[0], stride, parts, bias, y_rows[first : first + self._step])


class _DecodedMatmul:
    """Decode some row blocks into a workspace, multiply with cuBLAS, go on to the next."""

    def __init__(self, grid: ChunkGrid, row_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._in_features = dtype, grid.in_features
        step = row_blocks * grid.chunk_rows
        self._rows = min(step, grid.out_features)
        # With columns of zeros up to a multiple of 8: else cuBLAS takes several times as long (2048 x 5773 by 512 bf16
        # tokens on an H200: 129 us; 2048 x 8192: 29), and may add what it splits in bf16.
        self._padded = -(-grid.in_features // 8) * 8
        self._parts = [
            (
                slice(first * grid.chunk_rows, min(first * grid.chunk_rows + step, grid.out_features)),
                RowDecoder(grid, first, min(row_blocks, grid.row_blocks - first), device.index),
            )
            for first in range(0, grid.row_blocks, row_blocks)
        ]

    def __call__(
        self, x: Tensor, tokens: int, stride: int, parts: tuple[Tensor, ...], bias: Tensor | None, y: Tensor
    ) -> None:
        chunks, offsets = parts[:2]
        x, y = x.reshape(tokens, -1), y.view(tokens, -1)
        if self._padded > self._in_features:
            x = torch.nn.functional.pad(x, (0, self._padded - self._in_features))
        workspace = x.new_empty(self._rows, self._padded, dtype=self._dtype)
        for rows, decode in self._parts:
            part = workspace[: rows.stop - rows.start]
            decode(chunks, offsets, part[:, : self._in_features])
            if self._padded > self._in_features:
                part[:, self._in_features :] = 0
            _multiply_dense(x, part.to(x.dtype), None if bias is None else bias[rows], y[:, rows])


def _multiply_dense_copy(
    x: Tensor, tokens: int, stride: int, parts: tuple[Tensor, ...], bias: Tensor | None, y: Tensor
) -> None:
    _multiply_dense(x.reshape(tokens, -1), parts[-1], bias, y.view(tokens, -1))


def _multiply_dense(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)
