"""Magnitude pruning: the smallest weights of each matrix go."""

from __future__ import annotations

import torch
from torch import Tensor

from spinfer.errors import SpinferError


@torch.no_grad()
def prune_magnitude_(weight: Tensor, sparsity: float) -> Tensor:
    """Zero the `floor(sparsity * weights)` entries of least magnitude, in place; returns the weight.

    Args:
        weight: any floating tensor; compared as a whole.
        sparsity: share of zeros wanted, in [0, 1).

    Raises:
        SpinferError: sparsity out of range.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015), section 3.
    """
    if not 0 <= sparsity < 1:
        raise SpinferError(f"sparsity is {sparsity}; expected 0 <= sparsity < 1")
    count = int(sparsity * weight.numel())
    smallest = weight.abs().flatten().topk(count, largest=False, sorted=False).indices
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[smallest] = False
    return weight.mul_(mask.view_as(weight))
