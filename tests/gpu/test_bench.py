"""The kernel benchmark's own GPU side, on small cases."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from spinfer.bench import kernel_sweep
from spinfer.bench.kernel import ShapeBench, bench_kernel
from spinfer.bench.kernel_overheads import first_call, launches, repacking
from spinfer.bench.kernel_sweep import Group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("n", [1, 16, 300])
def test_times_are_plausible(n: int) -> None:
    (row,) = bench_kernel(4096, 4096, [n], [0.6])
    read_us = row["ideal_nbytes"] / 8e12 * 1e6
    for name in ("us", "dense_us", "fp8_us"):
        assert read_us < row[name] < 5000, name
    assert row["error"] < 4e-4


def test_replays_write_only_what_they_hold() -> None:
    """Baselines are replayed long after they were captured; a new weight may not lie where one of them writes."""
    bench = ShapeBench(2048, 2048)
    for sparsity in (0.6, 0.5, 0.7):
        bench.load(sparsity)
        assert all(bench.measure(n)["error"] < 4e-4 for n in (1, 8, 300, 1, 8))


def test_overheads() -> None:
    for found in (first_call(1024, 1024), launches(), repacking(1024, 2048)):
        assert all(value > 0 for value in found.values())


def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [
        Group("grid", (1024, 1024), (1, 300), (0.6,), fp8=True),
        Group("masks", (1024, 8192), (16,), (0.6,), ("extremes",)),
        Group("bfloat16", (1024, 1024), (1,), (0.6,), dtype=torch.bfloat16),
    ]
    monkeypatch.setattr(kernel_sweep, "plan", lambda real_sparsities, quick: groups)
    monkeypatch.setattr(sys, "argv", ["sweep", "--out", str(tmp_path / "kernel.json")])
    kernel_sweep.main()
    content = json.loads((tmp_path / "kernel.json").read_text())
    assert content["errors"] == []
    assert len(content["results"]) == content["planned"] == 4
    assert content["environment"]["read_bandwidth"] > 1e11
