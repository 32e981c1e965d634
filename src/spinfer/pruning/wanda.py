"""Wanda: of each row the weights go whose magnitude times the norm of their input is least."""

from __future__ import annotations

import torch
from torch import Tensor

from spinfer.pruning.masks import check_sparsity, lowest_of_rows, outside_pattern, zeros_first
from spinfer.pruning.pattern import Pattern


def wanda_scores(weight: Tensor, input_norms: Tensor) -> Tensor:
    """|W_ij| ||X_j||, float32 [out_features, in_features].

    Args:
        weight: [out_features, in_features].
        input_norms: float32 [in_features], the L2 norm of each input over the calibration tokens, in any unit.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023), equation 1.
    """
    return weight.abs().float() * input_norms


@torch.no_grad()
def prune_wanda_(weight: Tensor, input_norms: Tensor, sparsity: float, pattern: Pattern | None = None) -> Tensor:
    """Zero the `floor(sparsity * in_features)` lowest scores of each row, in place; returns the weight.

    Zeros count as lowest, then weights of inputs that are always zero.

    Args:
        weight: [out_features, in_features].
        input_norms: float32 [in_features]; see `wanda_scores`.
        sparsity: share of zeros wanted, in [0, 1).
        pattern: prune every M weights of a row to this instead.

    Raises:
        SpinferError: sparsity out of range, or a pattern that does not fit.
    """
    check_sparsity(sparsity)
    scores = zeros_first(wanda_scores(weight, input_norms), weight == 0)
    return weight.masked_fill_(
        lowest_of_rows(scores, sparsity) if pattern is None else outside_pattern(scores, pattern), 0
    )
