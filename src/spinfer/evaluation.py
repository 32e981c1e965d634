"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spinfer.errors import SpinferError


@dataclass(frozen=True)
class Perplexity:
    """Result of `perplexity`.

    Attributes:
        perplexity: exp of the mean negative log likelihood a predicted token, natural logarithm.
        tokens: predicted tokens.
        context: tokens a window.
    """

    perplexity: float
    tokens: int
    context: int


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    context: int = 1024,
    batch: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Evaluate over consecutive windows that do not overlap; every token but the first of a window is predicted.

    Args:
        model: a causal language model (its output has `.logits`).
        token_ids: int64 [tokens], the whole text.
        context: tokens a window; a last partial window counts too.
        batch: windows at once.
        progress: called with (windows done, windows).

    Raises:
        SpinferError: fewer than two tokens, or a context below two.
    """
    if token_ids.numel() < 2 or context < 2:
        raise SpinferError(
            f"perplexity needs at least 2 tokens and a context of 2, got {token_ids.numel()} and {context}"
        )
    whole = token_ids.numel() // context
    batches = [*token_ids[: whole * context].view(whole, context).split(batch), token_ids[None, whole * context :]]
    total, count, done = 0.0, 0, 0
    windows = sum(len(rows) for rows in batches if rows.shape[1] > 1)
    for rows in batches:
        if rows.numel() and rows.shape[1] > 1:
            logits = model(rows, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten().to(logits.device), reduction="sum")
            total += float(losses)
            count += logits.shape[0]
            done += len(rows)
            progress(done, windows)
    return Perplexity(math.exp(total / count), count, context)
