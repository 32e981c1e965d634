"""Perplexity against a direct computation."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import pruned_model
from spinfer.errors import SpinferError
from spinfer.evaluation import perplexity


@pytest.mark.parametrize(("length", "context"), [(50, 16), (17, 16), (16, 16), (7, 16), (2, 2)])
def test_perplexity_is_the_mean_over_windows(length: int, context: int) -> None:
    model = pruned_model("llama", dtype=torch.float32)
    ids = torch.randint(0, 320, (length,))
    losses = []
    for start in range(0, length, context):
        window = ids[start : start + context]
        if window.numel() < 2:
            continue
        probabilities = model(window.unsqueeze(0)).logits[0].double().softmax(-1)
        losses += [-math.log(float(probabilities[i, window[i + 1]].detach())) for i in range(window.numel() - 1)]
    result = perplexity(model, ids, context=context)
    assert result.tokens == len(losses)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


@pytest.mark.parametrize(("length", "context"), [(1, 16), (0, 16), (10, 1)])
def test_too_short(length: int, context: int) -> None:
    with pytest.raises(SpinferError, match="at least 2 tokens"):
        perplexity(pruned_model("llama"), torch.zeros(length, dtype=torch.int64), context=context)
