"""Timing whole models, without a GPU."""

from __future__ import annotations

import pytest
import torch

from conftest import pruned_model
from spinfer.bench.model import time_models


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_times_every_model(cuda_graphs: bool) -> None:
    """On a CPU `generate` takes the static cache without compiling anything."""
    models = {label: pruned_model("llama", dtype=torch.float32) for label in ("a", "b")}
    done: list[tuple[int, int]] = []
    timings = time_models(
        models,
        prompt_tokens=8,
        new_tokens=3,
        batch=2,
        repeats=2,
        cuda_graphs=cuda_graphs,
        progress=lambda *of: done.append(of),
    )
    for timing in timings.values():
        assert timing.decode_tokens_per_s == pytest.approx(2e3 / timing.decode_step_ms)
        assert timing.prefill_tokens_per_s == pytest.approx(16e3 / timing.time_to_first_token_ms)
    runs = 8 if cuda_graphs else 6
    assert done == [(i + 1, runs) for i in range(runs)]
