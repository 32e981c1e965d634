"""Masks of what goes, from scores: True where a weight is to become zero."""

from __future__ import annotations

import torch
from torch import Tensor

from spinfer.errors import SpinferError
from spinfer.pruning.pattern import Pattern


def check_sparsity(sparsity: float) -> None:
    """Raise where it is no share of zeros.

    Raises:
        SpinferError: not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise SpinferError(f"sparsity is {sparsity}; expected 0 <= sparsity < 1, 0.5 for one half zeros")


def is_mask(zeros: int, weights: int) -> bool:
    """Whether so many zeros of a matrix are a mask to keep, not weights that happen to be 0: at least one in a hundred.

    Dense bf16 models have them too: 0.03 % of SmolLM2-135M's weights, at most 0.07 % of a matrix.
    """
    return zeros >= 0.01 * weights


def zeros_first(scores: Tensor, zeros: Tensor) -> Tensor:
    """Scores, all at least 0, in which weights that are zero already come before all others."""
    return scores.masked_fill(zeros, -1)


def lowest(scores: Tensor, sparsity: float) -> Tensor:
    """The `floor(sparsity * n)` lowest of all n scores; of equal ones any."""
    count = int(sparsity * scores.numel())
    chosen = scores.flatten().topk(count, largest=False, sorted=False).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[chosen] = True
    return mask.view_as(scores)


def lowest_of_rows(scores: Tensor, sparsity: float) -> Tensor:
    """The `floor(sparsity * n)` lowest of the n scores of each row; of equal ones the first."""
    count = int(sparsity * scores.shape[1])
    chosen = scores.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def outside_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """All but the N highest scores of every M in a row.

    Raises:
        SpinferError: the rows are no multiple of M long.
    """
    rows, columns = scores.shape
    if columns % pattern.group:
        raise SpinferError(
            f"pattern {pattern} does not fit {columns} inputs, which are no multiple of {pattern.group}; "
            "choose another pattern, or leave such Linears out with --ignore"
        )
    groups = scores.reshape(rows, -1, pattern.group)
    chosen = groups.topk(pattern.group - pattern.kept, dim=2, largest=False, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, chosen, True).view(rows, columns)
