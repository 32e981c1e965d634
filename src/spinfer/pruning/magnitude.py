"""Magnitude pruning: the smallest weights of each matrix go."""

from __future__ import annotations

import torch
from torch import Tensor

from spinfer.pruning.masks import check_sparsity, lowest, outside_pattern
from spinfer.pruning.pattern import Pattern


@torch.no_grad()
def prune_magnitude_(weight: Tensor, sparsity: float, pattern: Pattern | None = None) -> Tensor:
    """Zero the `floor(sparsity * weights)` entries of least magnitude, in place; returns the weight.

    Args:
        weight: any floating tensor; compared as a whole.
        sparsity: share of zeros wanted, in [0, 1).
        pattern: prune every M weights of a row to this instead; weight must be [out_features, in_features].

    Raises:
        SpinferError: sparsity out of range, or a pattern that does not fit.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015), section 3.
    """
    check_sparsity(sparsity)
    scores = weight.abs()
    return weight.masked_fill_(lowest(scores, sparsity) if pattern is None else outside_pattern(scores, pattern), 0)
