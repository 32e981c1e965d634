"""Problem -> kernel configuration: one pure function, so that every choice can be tested without the hardware."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spinfer.format.layout import GROUP_TILE, Geometry


@dataclass(frozen=True)
class Problem:
    """What a selection may depend on.

    Attributes:
        tokens: N, rows of x.
        out_features: M.
        in_features: K.
        nnz: nonzeros of the weight.
        dtype: type of the values.
        device_type: "cpu" or "cuda".
    """

    tokens: int
    out_features: int
    in_features: int
    nnz: int
    dtype: torch.dtype
    device_type: str


@dataclass(frozen=True)
class TilewiseConfig:
    """Decode `group_rows` rows of GroupTiles into a dense panel, multiply, reuse the panel."""

    group_rows: int


_CPU_PANEL_NBYTES = 1 << 20
"""A decoded panel that stays in a core's L2 (1 to 2 MiB on current servers) until it has been multiplied."""

_CUDA_PANEL_NBYTES = 64 << 20
"""Bounded workspace; large enough that torch.mm on a panel runs at its full rate."""


def select(problem: Problem) -> TilewiseConfig:
    """Choose the kernel configuration for a weight in the storage layout."""
    geometry = Geometry(problem.out_features, problem.in_features)
    budget = _CPU_PANEL_NBYTES if problem.device_type == "cpu" else _CUDA_PANEL_NBYTES
    row_nbytes = GROUP_TILE * GROUP_TILE * geometry.group_cols * problem.dtype.itemsize
    return TilewiseConfig(group_rows=min(geometry.group_rows, max(1, budget // row_nbytes)))
