"""What several test files share: random sparse matrices, bit-exact comparison, and a backend with its own layout."""

from __future__ import annotations

import torch
from torch import Tensor

from spinfer.format import TcaBmeTensor
from spinfer.format.layout import BIT_PATTERN_DTYPES
from spinfer.kernels import PackedWeight
from spinfer.kernels.packed import WeightSpec
from spinfer.kernels.reference import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}
"""Relative error allowed against the float64 oracle: one unit in the last place for the 16-bit types, whose result is
rounded once from an fp32 sum; for fp32, eight units, since the sum itself is rounded."""


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, on the CPU."""
    return tensor.detach().cpu().contiguous().view(BIT_PATTERN_DTYPES[tensor.dtype])


def expected_decode(weight: Tensor) -> Tensor:
    """What decoding must give back: the same bit patterns, -0.0 as +0.0."""
    pattern = bits(weight).clone()
    pattern[pattern == torch.iinfo(pattern.dtype).min] = 0
    return pattern


def sparse(
    rows: int, cols: int, dtype: torch.dtype = torch.float16, density: float = 0.5, seed: int | None = None
) -> Tensor:
    """A random matrix of about this density, pruned by multiplication, so that -0.0 occurs."""
    generator = torch.Generator().manual_seed(torch.seed() % (1 << 63) if seed is None else seed)
    weight = torch.randn(rows, cols, generator=generator)
    return (weight * (torch.rand(rows, cols, generator=generator) < density)).to(dtype)


def relative_error(y: Tensor, x: Tensor, weight: TcaBmeTensor, bias: Tensor | None = None) -> float:
    """Largest error against the oracle, over the magnitude of the terms that each sum adds up, or the smallest normal
    number of y's type, below which rounding is absolute.
    """
    exact = reference(x, weight, bias)
    scale = x.double().abs() @ weight.decode().double().abs().t()
    if bias is not None:
        scale = scale + bias.double().abs()
    error = (y.double() - exact).abs()
    assert not error.isnan().any()
    return float((error / scale.clamp_min(torch.finfo(y.dtype).smallest_normal)).max()) if error.numel() else 0.0


class ReversedBackend:
    """A backend whose layout differs from storage in every array, to show what survives a round trip through it."""

    layout = "reversed"

    def accepts(self, weight: TcaBmeTensor) -> bool:
        return weight.device.type == "cpu" and weight.dtype != torch.float32

    def pack(self, weight: TcaBmeTensor) -> PackedWeight:
        parts = (weight.offsets.flip(0), ~weight.bitmap, weight.values.flip(0))
        return PackedWeight(WeightSpec(self.layout, weight.shape, weight.nnz, weight.dtype), parts)

    def unpack(self, packed: PackedWeight) -> TcaBmeTensor:
        offsets, bitmap, values = packed.parts
        return TcaBmeTensor(values.flip(0), ~bitmap, offsets.flip(0), packed.shape, packed.nnz)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        return reference(x, self.unpack(packed), bias).to(x.dtype)
