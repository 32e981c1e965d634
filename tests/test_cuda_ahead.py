"""Kernels compiled ahead of the calls that need them; no GPU and no NVRTC."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from spinfer.kernels.cuda import compile as kernel_compile
from spinfer.kernels.cuda.ahead import BackgroundCompiler
from spinfer.kernels.cuda.compile import CompileError, KernelSource, cubin, is_cached
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.select import DeviceTraits, choose, range_count
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
    for tokens in (*range(1, 1200), 2048, 8192, 65536):
        plan = choose(grid, nnz, tokens, True, traits, ranges)
        needed.update(sources_of(grid, plan, torch.bfloat16, traits.capability))
    assert set(known) == needed
    assert len(known) == len(needed)


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[KernelSource], bytes]], None]:
    """Puts a stand-in for NVRTC in place; the cache is empty, and there are eight processors."""
    monkeypatch.setattr(kernel_compile, "_compiler_versions", lambda: "1.0")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("SPINFER_CACHE_DIR", str(tmp_path))
    return lambda fake: monkeypatch.setattr(kernel_compile, "compile_source", fake)


def test_compiles_each_once_several_at_a_time(
    compile_with: Callable[[Callable[[KernelSource], bytes]], None],
) -> None:
    compiled, together = [], threading.Barrier(4)

    def fake(source: KernelSource) -> bytes:
        compiled.append(source)
        together.wait(10)
        return b"code"

    compile_with(fake)
    compiler = BackgroundCompiler()
    compiler.submit(KERNELS[:8])
    compiler.submit(KERNELS)
    compiler.submit(KERNELS[4:])
    compiler.wait()
    assert sorted(compiled, key=KERNELS.index) == KERNELS
    assert all(map(is_cached, KERNELS))


def test_a_call_waits_for_what_is_being_compiled(
    compile_with: Callable[[Callable[[KernelSource], bytes]], None],
) -> None:
    compiled, begun, let_go = [], threading.Event(), threading.Event()

    def fake(source: KernelSource) -> bytes:
        compiled.append(source)
        begun.set()
        assert let_go.wait(10)
        return b"code"

    compile_with(fake)
    compiler = BackgroundCompiler()
    compiler.submit(KERNELS[:1])
    assert begun.wait(10)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(cubin, KERNELS[0])
        assert not call.done()
        let_go.set()
        assert call.result(10) == b"code"
    compiler.wait()
    assert compiled == KERNELS[:1]


def test_what_fails_is_left_to_the_call_that_needs_it(
    compile_with: Callable[[Callable[[KernelSource], bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def fake(source: KernelSource) -> bytes:
        compiled.append(source)
        raise CompileError("no")

    compile_with(fake)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    compiler = BackgroundCompiler()
    compiler.submit(KERNELS)
    compiler.wait()
    assert compiled == KERNELS[:1]  # the others would fail as well
    with pytest.raises(CompileError, match="no"):
        cubin(KERNELS[1])


def test_nothing_is_compiled_for_a_cache_that_keeps_nothing(
    compile_with: Callable[[Callable[[KernelSource], bytes]], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    compiled = []

    def fake(source: KernelSource) -> bytes:
        compiled.append(source)
        return b"code"

    compile_with(fake)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setenv("SPINFER_CACHE_DIR", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    kernel_compile._warn_uncached.cache_clear()
    compiler = BackgroundCompiler()

    def run() -> None:
        compiler.submit(KERNELS)
        compiler.wait()

    with pytest.warns(UserWarning, match="SPINFER_CACHE_DIR"):
        run()
    assert compiled == KERNELS[:1]
