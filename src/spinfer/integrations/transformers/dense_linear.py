"""`DenseLinear`: the output matrix, which a compressed model keeps dense, on a CPU by the faster of two ways."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


class DenseLinear(nn.Linear):
    """y = x W^T + b as `nn.Linear` computes it, but for one bf16 token on a CPU without oneDNN where that is faster.

    The output matrix is over a third of what a model of 1B reads a token once its other Linears are sparse. torch
    multiplies by oneDNN, which on a Zen 4 takes 1.8 times as long for one token as torch's own loop.
    """

    @classmethod
    def adopt(cls, module: nn.Module | None) -> None:
        """Make one of a plain Linear, in place; other modules stay what they are."""
        if type(module) is nn.Linear:
            module.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        """Compute y = x W^T + b; x is (..., in_features), y (..., out_features) of x's dtype."""
        if (
            x.numel() == self.in_features
            and x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and torch._C._get_mkldnn_enabled()
            and _faster_without_onednn()
        ):
            return _without_onednn(x, self.weight, self.bias)
        return super().forward(x)


def _without_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The switch is the process's: what other threads multiply meanwhile may take torch's own way, too.
    torch._C._set_mkldnn_enabled(False)
    try:
        return nn.functional.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(True)


@functools.cache
def _faster_without_onednn() -> bool:
    """Whether torch's own loop is the faster one here: measured once a process, on 64 MB, in 50 ms."""
    weight = torch.ones(16384, 2048, dtype=torch.bfloat16)
    x = torch.ones(1, 2048, dtype=torch.bfloat16)

    def seconds(multiply: Callable[[Tensor, Tensor, None], Tensor]) -> float:
        began = time.perf_counter()
        multiply(x, weight, None)
        return time.perf_counter() - began

    with torch.no_grad():
        times = [(seconds(nn.functional.linear), seconds(_without_onednn)) for _ in range(4)]
    return min(own for _, own in times) < 0.9 * min(onednn for onednn, _ in times)
