"""SparseGPT: remove weights column by column and let the later columns make up for it."""

from __future__ import annotations

import torch
from torch import Tensor

from spinfer.errors import SpinferError
from spinfer.pruning.hessian import InverseFactor
from spinfer.pruning.masks import check_sparsity, is_mask, lowest, outside_pattern, zeros_first
from spinfer.pruning.pattern import Pattern

BLOCK_SIZE = 128
"""Columns whose weights compete with each other. Source: the paper, section 3.3 and figure 10."""


@torch.no_grad()
def prune_sparsegpt_(
    weight: Tensor,
    inverse: InverseFactor,
    sparsity: float,
    pattern: Pattern | None = None,
    *,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Prune and update, in place; returns the weight.

    Of every `block_size` columns the `floor(sparsity * n)` of n weights go that cost the output least; what stays in
    the columns to their right is changed to make up for them. Zeros that are so many that they are a mask
    (`masks.is_mask`) stay zero, and all weights of a dead input go.

    Args:
        weight: [out_features, in_features], any floating type; computed in that of `inverse`.
        inverse: of the layer's Hessian.
        sparsity: share of zeros wanted, in [0, 1).
        pattern: prune every M weights of a row to this instead.
        block_size: columns a block; rounded down to a multiple of M.

    Raises:
        SpinferError: sparsity out of range, a pattern that does not fit, or a result that is not finite.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot" (2023),
    algorithm 1.
    """
    check_sparsity(sparsity)
    columns = weight.shape[1]
    if pattern is not None:
        if columns % pattern.group:
            outside_pattern(weight, pattern)  # says what does not fit
        block_size = max(block_size - block_size % pattern.group, pattern.group)
    # Transposed, so that a column of W is contiguous: each step reads one and updates those after it.
    work = weight.t().to(inverse.upper.dtype, copy=True, memory_format=torch.contiguous_format)
    work[inverse.dead] = 0
    gone = inverse.dead[:, None].expand(weight.t().shape).clone()
    zeros = weight.t() == 0
    if is_mask(int(zeros.sum()), zeros.numel()):
        gone |= zeros
    for begin in range(0, columns, block_size):
        end = min(begin + block_size, columns)
        upper = inverse.upper[begin:end, begin:end]
        part, lost = work[begin:end], gone[begin:end]
        if pattern is None:
            lost |= lowest(_costs(part, upper, lost), sparsity)
        errors = torch.empty_like(part)
        scale = lost / upper.diagonal()[:, None]
        for column in range(end - begin):
            if pattern is not None and column % pattern.group == 0:
                group = slice(column, column + pattern.group)
                costs = _costs(part[group], upper[group, group], lost[group])
                lost[group] |= outside_pattern(costs.t(), pattern).t()
                scale[group] = lost[group] / upper.diagonal()[group, None]
            torch.mul(part[column], scale[column], out=errors[column])
            part[column + 1 :].addr_(upper[column, column + 1 :], errors[column], alpha=-1)
        part.masked_fill_(lost, 0)
        work[end:].addmm_(inverse.upper[begin:end, end:].t(), errors, alpha=-1)
    if not bool(torch.isfinite(work).all()):
        raise SpinferError("the pruned weights are not finite; calibrate with more text, or prune by wanda")
    return weight.copy_(work.t())


def _costs(columns: Tensor, upper: Tensor, zeros: Tensor) -> Tensor:
    """What removing each weight of some columns, [columns, out_features], adds to the squared error of the output."""
    return zeros_first((columns / upper.diagonal()[:, None]).square(), zeros)
