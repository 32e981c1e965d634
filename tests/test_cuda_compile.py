"""Compiling kernels needs NVRTC but no GPU; keeping what was compiled needs neither."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch

from spinfer.kernels.cuda import compile as kernel_compile
from spinfer.kernels.cuda.compile import CompileError, KernelSource, compile_source, cubin
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.matmul import source
from spinfer.kernels.cuda.select import DeviceTraits, Fused, choose

ELF = b"\x7fELF"
ARCHS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
GRIDS = [ChunkGrid.of(4096, 4096), ChunkGrid.of(28672, 4096)]
DTYPES = [torch.float16, torch.bfloat16]


def _sources(capability: tuple[int, int], tokens: list[int]) -> list[KernelSource]:
    traits = DeviceTraits(capability, 100, 232448 if capability in ((9, 0), (10, 0)) else 101376)
    found = {}
    for grid, dtype, n in itertools.product(GRIDS, DTYPES, tokens):
        plan = choose(grid, grid.out_features * grid.in_features // 2, n, True, traits)
        assert isinstance(plan, Fused)
        for config in plan.passes:
            found[source(grid, config, dtype)] = None
    arch = "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"
    return [*found, *(KernelSource("repack.cu", arch, (("SPINFER_BLOCKS_M", grid.blocks_m),)) for grid in GRIDS)]


def _nvrtc() -> None:
    pytest.importorskip("cuda.core", reason="the extra spinfer[cuda] is not installed")
    try:
        kernel_compile._compiler_versions()
    except CompileError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("capability", ARCHS)
def test_kernels_compile(capability: tuple[int, int]) -> None:
    _nvrtc()
    for kernel in _sources(capability, [1])[::3]:
        assert compile_source(kernel).startswith(ELF)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHS)
def test_all_kernels_compile(capability: tuple[int, int]) -> None:
    _nvrtc()
    tokens = [8, 16, 24, 32, 48, 64, 96, 128] if capability == (9, 0) else [8, 16, 32]
    for kernel in _sources(capability, tokens):
        assert compile_source(kernel).startswith(ELF)


def test_compiler_errors_are_reported() -> None:
    _nvrtc()
    with pytest.raises(CompileError, match="ended with status"):
        compile_source(KernelSource("matmul_sm90.cu", "sm_90a", (("SPINFER_TOKENS", 7),)))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[KernelSource]:
    """A stand-in for NVRTC that records what it is asked for; the cache is empty and in `tmp_path`."""
    calls: list[KernelSource] = []

    def fake(kernel: KernelSource) -> bytes:
        calls.append(kernel)
        return ELF + kernel.arch.encode()

    monkeypatch.setattr(kernel_compile, "compile_source", fake)
    monkeypatch.setattr(kernel_compile, "_compiler_versions", lambda: "1.0")
    monkeypatch.setenv("SPINFER_CACHE_DIR", str(tmp_path / "cache"))
    kernel_compile._warn_uncached.cache_clear()
    return calls


KERNEL = KernelSource("repack.cu", "sm_80", (("SPINFER_BLOCKS_M", 4),))


def test_cache_compiles_once(compiled: list[KernelSource]) -> None:
    assert cubin(KERNEL) == cubin(KERNEL) == ELF + b"sm_80"
    assert compiled == [KERNEL]


def test_cache_tells_options_architectures_and_versions_apart(
    compiled: list[KernelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [
        KernelSource("repack.cu", "sm_90a", KERNEL.defines),
        KernelSource("repack.cu", "sm_80", (("SPINFER_BLOCKS_M", 8),)),
    ]
    for kernel in (KERNEL, *others):
        cubin(kernel)
    monkeypatch.setattr(kernel_compile, "_compiler_versions", lambda: "1.1")
    cubin(KERNEL)
    assert compiled == [KERNEL, *others, KERNEL]


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_damaged_entries_are_compiled_again(compiled: list[KernelSource], tmp_path: Path, damage: bytes | None) -> None:
    cubin(KERNEL)
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1] if damage is None else damage)
    assert cubin(KERNEL) == ELF + b"sm_80"
    assert compiled == [KERNEL, KERNEL]
    assert cubin(KERNEL) == ELF + b"sm_80"
    assert len(compiled) == 2


def test_unusable_cache_directory_warns_once(compiled: list[KernelSource], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="SPINFER_CACHE_DIR"):
        assert cubin(KERNEL) == ELF + b"sm_80"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cubin(KERNEL) == ELF + b"sm_80"
