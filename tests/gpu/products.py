"""Random weights on the GPU, and their products against float64."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3}
DTYPES = [torch.float16, torch.bfloat16]


def random_weight(m: int, k: int, density: float, dtype: torch.dtype = torch.float16) -> Tensor:
    w = torch.randn(m, k, device="cuda")
    return torch.where(torch.rand_like(w) < density, w, 0.0).to(dtype)


def check(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    expected = x.double() @ w.double().t()
    if bias is not None:
        expected += bias.double()
    scale = expected.norm()
    error = (y.double() - expected).norm() / scale if scale else (y.double() - expected).norm()
    # A handful of outputs can all round badly; half a unit in the last place bounds each.
    tolerance = TOLERANCE[y.dtype] * (1 if y.numel() >= 1000 else 1.4)
    assert error <= tolerance, f"relative error {error:.2e}"
