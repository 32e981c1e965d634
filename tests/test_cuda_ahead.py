"""Kernels compiled ahead of the calls that need them; no GPU and no NVRTC."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from conftest import Nvrtc
from spinfer.kernels.cuda.ahead import BackgroundCompiler
from spinfer.kernels.cuda.compile import CompileError, KernelSource, cubin, is_cached
from spinfer.kernels.cuda.configs import STAGED_TILES, DeviceTraits, range_count
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.matmul import staged_source
from spinfer.kernels.cuda.select import Staged, choose
from spinfer.kernels.cuda.sources import all_sources, sources_of

HOPPER = DeviceTraits((9, 0), 132, 232448)
ADA = DeviceTraits((8, 9), 128, 101376)
KERNELS = [KernelSource("repack.cu", "sm_80", (("SPINFER_BLOCKS_M", number),)) for number in range(12)]


@pytest.mark.parametrize("traits", [HOPPER, ADA], ids=["9.0", "8.9"])
@pytest.mark.parametrize("shape", [(6144, 4096), (28672, 8192), (4096, 14336), (300, 500)])
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("uneven", [False, True])
def test_no_number_of_tokens_needs_another_kernel(
    traits: DeviceTraits, shape: tuple[int, int], density: float, uneven: bool
) -> None:
    grid, nnz = ChunkGrid.of(*shape), round(density * shape[0] * shape[1])
    ranges = range_count(grid, traits) if uneven else 0
    known = all_sources(shape, nnz, torch.bfloat16, traits, ranges)
    needed = set()
    for tokens in (*range(1, 1200), *range(1200, 9000, 40), 65536):
        plan = choose(grid, nnz, tokens, True, traits, ranges)
        needed.update(sources_of(grid, plan, torch.bfloat16, traits.capability))
        if isinstance(plan, Staged):  # then tiles of any width are at hand
            needed.update(staged_source(grid, tile, torch.bfloat16) for tile in STAGED_TILES)
    assert set(known) == needed
    assert len(known) == len(needed)


def four_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def test_compiles_each_once_several_at_a_time(nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
    four_at_once(monkeypatch)
    together = threading.Barrier(4)
    nvrtc.meanwhile = lambda: together.wait(10)
    compiler = BackgroundCompiler()
    compiler.submit(KERNELS[:8])
    compiler.submit(KERNELS)
    compiler.submit(KERNELS[4:])
    compiler.wait()
    assert sorted(nvrtc.compiled, key=KERNELS.index) == KERNELS
    assert all(map(is_cached, KERNELS))
    assert {cubin(kernel) for kernel in KERNELS} == {b"\x7fELFsm_80"}
    assert len(nvrtc.compiled) == len(KERNELS)


def test_what_is_in_the_cache_starts_nothing(nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in KERNELS:
        cubin(kernel)
    monkeypatch.setattr(threading, "Thread", None)
    BackgroundCompiler().submit(KERNELS)
    assert nvrtc.compiled == KERNELS


def test_a_call_waits_for_what_is_being_compiled(nvrtc: Nvrtc) -> None:
    begun, let_go = threading.Event(), threading.Event()

    def meanwhile() -> None:
        begun.set()
        assert let_go.wait(10)

    nvrtc.meanwhile = meanwhile
    compiler = BackgroundCompiler()
    compiler.submit(KERNELS[:1])
    assert begun.wait(10)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(cubin, KERNELS[0])
        assert not call.done()
        let_go.set()
        assert call.result(10) == b"\x7fELFsm_80"
    compiler.wait()
    assert nvrtc.compiled == KERNELS[:1]


def test_what_fails_is_left_to_the_call_that_needs_it(nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
    one_at_a_time(monkeypatch)

    def meanwhile() -> None:
        raise CompileError("no")

    nvrtc.meanwhile = meanwhile
    compiler = BackgroundCompiler()
    compiler.submit(KERNELS)
    compiler.wait()
    assert nvrtc.compiled == KERNELS[:1]  # the others would fail as well
    with pytest.raises(CompileError, match="no"):
        cubin(KERNELS[1])


def test_nothing_is_compiled_for_a_cache_that_keeps_nothing(
    nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one_at_a_time(monkeypatch)
    (tmp_path / "cache").write_text("a file where the directory should be")
    compiler = BackgroundCompiler()

    def run() -> None:
        compiler.submit(KERNELS)
        compiler.wait()

    with pytest.warns(UserWarning, match="SPINFER_CACHE_DIR"):
        run()
    assert nvrtc.compiled == KERNELS[:1]
