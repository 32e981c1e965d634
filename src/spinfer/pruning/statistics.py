"""What a layer's inputs add up to over the calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class InputStatistics:
    """Sums over tokens in float32, whatever the inputs are.

    Attributes:
        tokens: how many came.
        square_sums: float32 [in_features], of each input; its square root is the L2 norm.
        hessian: X^T X, float32 [in_features, in_features], where it was asked for.
    """

    def __init__(self, in_features: int, device: torch.device, *, hessian: bool) -> None:
        """Start at zero."""
        self.tokens = 0
        self.square_sums = torch.zeros(in_features, device=device)
        self.hessian = torch.zeros(in_features, in_features, device=device) if hessian else None

    def add(self, inputs: Tensor) -> None:
        """Add the inputs [..., in_features] of some tokens."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += rows.shape[0]
        if self.hessian is None:
            self.square_sums += rows.square().sum(0)
        else:
            self.hessian.addmm_(rows.t(), rows)
            self.square_sums = self.hessian.diagonal().clone()

    @property
    def norms(self) -> Tensor:
        """L2 norm of each input, float32 [in_features]."""
        return self.square_sums.sqrt()
