"""Ranks tell each other what is wrong before any of them stops, so that none waits for one that has stopped."""

from __future__ import annotations

from typing import Any

import torch.distributed

from spinfer.errors import CheckpointError


def agree(group: Any, error: str | None) -> None:
    """Raise on every rank what is wrong on any.

    Args:
        group: vLLM's group of ranks; each must call this.
        error: what is wrong here, or None.

    Raises:
        CheckpointError: with the same message everywhere.
    """
    errors = [error]
    if group.world_size > 1:
        errors = [None] * group.world_size
        torch.distributed.all_gather_object(errors, error, group=group.cpu_group)
    found = [f"rank {rank}: {text}" if len(errors) > 1 else text for rank, text in enumerate(errors) if text]
    if found:
        raise CheckpointError("; ".join(found))
