"""Compiling kernels needs NVRTC but no GPU; keeping what was compiled needs neither."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from conftest import Nvrtc
from cubin import kernel_usage
from spinfer.bench.kernel_compile import kernel_sources
from spinfer.bench.kernel_sweep import SHAPES
from spinfer.kernels.cuda import compile as kernel_compile
from spinfer.kernels.cuda.compile import CompileError, KernelSource, compile_source, cubin
from spinfer.kernels.cuda.configs import DeviceTraits

ELF = b"\x7fELF"
ARCHS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
DTYPES = [torch.float16, torch.bfloat16]


def _sources(capability: tuple[int, int], tokens: range) -> list[KernelSource]:
    """All that can be asked for on such a device, whatever the matrix."""
    traits = DeviceTraits(capability, 100, 232448 if capability in ((9, 0), (10, 0)) else 101376)
    return kernel_sources([*SHAPES, (300, 500)], [0.05, 0.4, 0.7, 1.0], tokens, DTYPES, traits, uneven=True, every=True)


def _nvrtc() -> None:
    pytest.importorskip("cuda.core", reason="the extra spinfer[cuda] is not installed")
    try:
        kernel_compile._compiler_versions()
    except CompileError as error:
        pytest.skip(str(error))


def _check(kernel: KernelSource, code: bytes) -> None:
    assert code.startswith(ELF)
    usage = kernel_usage(code, "spinfer_")
    assert usage, f"no kernel in {kernel}"
    for name, used in usage.items():
        assert 0 < used.registers <= 255
        assert used.local_nbytes == 0, f"{name} of {kernel} spills: {used.local_nbytes} bytes a thread"


@pytest.mark.parametrize("capability", ARCHS)
def test_a_kernel_compiles(capability: tuple[int, int]) -> None:
    _nvrtc()
    kernel = next(kernel for kernel in _sources(capability, range(1, 2)) if kernel.file.startswith("matmul"))
    _check(kernel, compile_source(kernel))


@pytest.mark.nvrtc
@pytest.mark.parametrize("capability", ARCHS)
def test_kernels_compile_without_spills(capability: tuple[int, int]) -> None:
    """Every kernel of sm_80, sm_90a and sm_120; of the architectures between, which compile the same code, a third."""
    kernels = _sources(capability, range(1, 769))
    if capability not in ((8, 0), (9, 0), (12, 0)):
        kernels = kernels[::3]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for kernel, code in zip(kernels, pool.map(compile_source, kernels), strict=True):
            _check(kernel, code)


@pytest.mark.nvrtc
def test_spills_are_seen(tmp_path: Path) -> None:
    """Nothing above can fail if the reader overlooks local memory."""
    source = tmp_path / "spills.cu"
    source.write_text(
        """extern "C" __global__ void spinfer_spills(int* p) {
             int kept[ROOM];
             for (int i = 0; i < ROOM; ++i) kept[i] = p[i];
             for (int i = 0; i < p[ROOM]; ++i) kept[p[i] & (ROOM - 1)] += kept[p[i + 1] & (ROOM - 1)];
             p[0] = kept[p[ROOM] & (ROOM - 1)];
           }"""
    )
    usage = kernel_usage(compile_source(KernelSource(str(source), "sm_90a", (("ROOM", 64),))), "spinfer_")
    assert usage["spinfer_spills"].local_nbytes == 256


def test_compiler_errors_are_reported() -> None:
    _nvrtc()
    with pytest.raises(CompileError, match="ended with status"):
        compile_source(KernelSource("matmul_sm90.cu", "sm_90a", (("SPINFER_TOKENS", 7),)))


@pytest.fixture
def compiled(nvrtc: Nvrtc) -> list[KernelSource]:
    """What the stand-in for NVRTC was asked for."""
    return nvrtc.compiled


KERNEL = KernelSource("repack.cu", "sm_80", (("SPINFER_BLOCKS_M", 4),))


def test_cache_compiles_once(compiled: list[KernelSource]) -> None:
    assert cubin(KERNEL) == cubin(KERNEL) == ELF + b"sm_80"
    assert compiled == [KERNEL]


def test_cache_tells_options_architectures_and_versions_apart(
    compiled: list[KernelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [
        KernelSource("repack.cu", "sm_90a", KERNEL.defines),
        KernelSource("repack.cu", "sm_80", (("SPINFER_BLOCKS_M", 2),)),
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
