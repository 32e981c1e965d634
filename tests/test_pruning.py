"""Magnitude pruning."""

from __future__ import annotations

import pytest
import torch

from spinfer.errors import SpinferError
from spinfer.pruning import prune_magnitude_


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_the_smallest(sparsity: float, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 50).to(dtype)
    original = weight.clone()
    assert prune_magnitude_(weight, sparsity) is weight
    kept = weight != 0
    assert int((~kept).sum()) == int(sparsity * weight.numel())
    assert torch.equal(weight[kept], original[kept])
    if sparsity:
        assert original[~kept].abs().max() <= original[kept].abs().min()


def test_ties_still_give_the_exact_count() -> None:
    weight = torch.ones(10, 10)
    assert int((prune_magnitude_(weight, 0.37) == 0).sum()) == 37


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(SpinferError, match="sparsity"):
        prune_magnitude_(torch.randn(2, 2), sparsity)
