"""How a kernel holds a weight in memory, and what a backend must provide.

On disk there is one order, that of FORMAT.md. A backend may read another one faster: it repacks at load, losslessly,
and gives the on-disk bytes back when the weight is saved or moved.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spinfer.format import TcaBmeTensor

STORAGE_LAYOUT = "tca_bme"
"""The layout of FORMAT.md itself: parts are (values, bitmap, offsets)."""


@dataclass(frozen=True)
class WeightSpec:
    """What there is to know of a packed weight beside its arrays.

    Attributes:
        layout: name of the backend's layout.
        shape: (out_features, in_features).
        nnz: nonzeros.
        dtype: type of the values.
    """

    layout: str
    shape: tuple[int, int]
    nnz: int
    dtype: torch.dtype

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def known(layout: str, rows: int, columns: int, nnz: int, dtype: torch.dtype) -> WeightSpec:
        """The same object for the same arguments: making one, and what depends on it, takes as long as a launch."""
        return WeightSpec(layout, (rows, columns), nnz, dtype)

    @functools.cached_property
    def rounded_nnz(self) -> int:
        """Nonzeros to the nearest percent of the weights. Kernels are chosen by it: layers that are alike agree."""
        weights = self.shape[0] * self.shape[1]
        return round(100 * self.nnz / weights) * weights // 100


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in the layout that a backend's kernels read.

    Attributes:
        spec: what it is.
        parts: its arrays, as the backend defines them.
    """

    spec: WeightSpec
    parts: tuple[Tensor, ...]

    @property
    def layout(self) -> str:
        """Name of the backend's layout."""
        return self.spec.layout

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.spec.shape

    @property
    def nnz(self) -> int:
        """Nonzeros."""
        return self.spec.nnz

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.spec.dtype

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts)


class Backend(Protocol):
    """One layout and the kernels that read it."""

    layout: str

    def accepts(self, weight: TcaBmeTensor) -> bool:
        """Whether this backend can run the weight where it is (device, dtype, and what this machine offers)."""

    def pack(self, weight: TcaBmeTensor) -> PackedWeight:
        """Repack, losslessly, a bounded piece at a time."""

    def unpack(self, packed: PackedWeight) -> TcaBmeTensor:
        """The inverse of `pack`, bit-exact."""

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias.

        Args:
            x: (tokens, in_features) with last stride 1, or contiguous (..., in_features); not empty; fp16, bf16 or
                fp32. Views are not taken of it on the way here: one takes as long as a third of a launch.
            packed: what `pack` returned.
            bias: (out_features,) of x's dtype, or None.

        Returns:
            (..., out_features), contiguous, dtype and device of x, accumulated in fp32 or better.
        """


def tokens_and_stride(x: Tensor) -> tuple[int, int]:
    """Tokens of what `Backend.linear` takes, and how many elements lie from one to the next."""
    if x.dim() == 2:
        return x.shape[0], x.stride(0)
    in_features = x.shape[-1]
    return x.numel() // in_features, in_features


def as_packed(weight: TcaBmeTensor) -> PackedWeight:
    """The weight in its storage layout; shares memory."""
    spec = WeightSpec(STORAGE_LAYOUT, weight.shape, weight.nnz, weight.dtype)
    return PackedWeight(spec, (weight.values, weight.bitmap, weight.offsets))
