"""The oracle: decode, then multiply in float64. Every kernel is compared with it; nothing runs on it."""

from __future__ import annotations

from torch import Tensor

from spinfer.format import TcaBmeTensor


def reference(x: Tensor, weight: TcaBmeTensor, bias: Tensor | None = None) -> Tensor:
    """Compute y = x W^T + bias in float64, whatever the inputs' types; x is (..., in_features), y float64."""
    y = x.double() @ weight.decode().double().t()
    return y if bias is None else y + bias.double()
