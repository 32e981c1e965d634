"""The native CPU kernel: every tier against float64, packing there and back, hostile layouts, threads."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import spinfer
from spinfer.errors import FormatError, SpinferError
from spinfer.format import TcaBmeTensor, encode
from spinfer.kernels import BACKENDS, CPU, unpack
from spinfer.kernels.cpu import CPU_LAYOUT, CpuBackend
from spinfer.kernels.cpu import library as library_module
from spinfer.kernels.cpu.library import CpuLibrary, load
from spinfer.kernels.packed import PackedWeight
from spinfer.kernels.reference import reference

LIBRARY = load()
if LIBRARY is None:
    pytest.skip("spinfer was installed without its native CPU kernel", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERY_N = (*range(1, 18), 31, 32, 33, 48, 63, 64, 65, 512, 530)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""Half a unit in the last place of 1, relative: what rounding the fp32 sum to the output's type may add."""


@pytest.fixture(params=LIBRARY.tiers)
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    return CpuBackend(request.param)


@pytest.fixture(autouse=True)
def nan_filled_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernel does not write shows up as NaN."""
    empty = torch.empty

    def filled(*args: object, **kwargs: object) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)


def sparse(shape: tuple[int, int], dtype: torch.dtype, density: float = 0.5) -> Tensor:
    return (torch.randn(shape) * (torch.rand(shape) < density)).to(dtype)


def assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Sums exact to 1e-6 of what was summed, then rounded to the output's type."""
    expected = x.double() @ weight.double().t()
    summed = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        expected, summed = expected + bias.double(), summed + bias.double().abs()
    error = (y.double() - expected).abs()
    assert bool((error <= 1e-6 * summed + ROUNDING[y.dtype] * expected.abs() + 2.0**-25).all())
    if y.dtype == torch.float32:
        # Of one or a few sums the norm may cancel; their expected size for random signs does not.
        size = (x.double().square() @ weight.double().square().t()).sum().sqrt()
        assert float(error.norm()) <= 1e-6 * max(float(expected.norm()), float(size))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_n(backend: CpuBackend, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    weight = sparse((131, 1031), dtype)
    packed = backend.pack(encode(weight))
    for n in EVERY_N:
        x = torch.randn(n, 1031).to(x_dtype)
        bias = torch.randn(131).to(x_dtype) if n % 2 else None
        assert_close(backend.linear(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_shape(backend: CpuBackend, dtype: torch.dtype) -> None:
    for out_features in range(1, 71):
        in_features = 1 + out_features * 37 % 70  # 37 and 70 are coprime: every size from 1 to 70 once
        weight = sparse((out_features, in_features), dtype, density=0.4)
        packed = backend.pack(encode(weight))
        x = torch.randn(1 + out_features % 4, in_features).to(dtype)
        assert_close(backend.linear(x, packed, None), x, weight)


@pytest.mark.parametrize("shape", [(1, 8191), (4099, 1), (1009, 2003), (33, 10007)])
def test_large_primes(backend: CpuBackend, shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        weight = sparse(shape, dtype, density=0.3)
        packed = backend.pack(encode(weight))
        for n in (1, 5, 40):
            x = torch.randn(n, shape[1]).to(dtype)
            assert_close(backend.linear(x, packed, None), x, weight)


@pytest.mark.parametrize("in_features", [4096, 11008])
def test_relative_error_of_long_rows(backend: CpuBackend, in_features: int) -> None:
    for dtype in DTYPES:
        weight = sparse((256, in_features), dtype)
        packed = backend.pack(encode(weight))
        for n in (1, 2, 8, 16, 33):
            for x in (torch.randn(n, in_features), torch.randn(n, in_features).to(dtype)):
                assert_close(backend.linear(x, packed, None), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 4, 20])
def test_extreme_densities(backend: CpuBackend, dtype: torch.dtype, n: int) -> None:
    full = torch.randn(96, 200).to(dtype)
    rows = full.clone()
    rows[::3] = 0  # empty rows between full ones
    for weight in (torch.zeros_like(full), full, rows):
        x = torch.randn(n, 200).to(dtype)
        assert_close(backend.linear(x, backend.pack(encode(weight)), None), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 20])
def test_nan_and_inf_propagate_as_in_dense(backend: CpuBackend, dtype: torch.dtype, n: int) -> None:
    weight = sparse((70, 129), dtype)
    weight[3, 5], weight[40, 128], weight[69, 0] = float("nan"), float("inf"), float("-inf")
    x = torch.randn(n, 129).to(dtype)
    x[0, 7], x[n - 1, 64] = float("inf"), float("nan")
    for at in (x, torch.randn(n, 129).to(dtype)):
        y = backend.linear(at, backend.pack(encode(weight)), None).double()
        dense = (at.double().unsqueeze(1) * weight.double()).sum(-1)
        assert torch.equal(y.isnan(), dense.isnan())
        infinite = dense.isinf()
        assert torch.equal(y[infinite], dense[infinite])
        assert bool(y[dense.isfinite()].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_multiplied_exactly(backend: CpuBackend, dtype: torch.dtype) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    weight = bits.view(dtype).view(256, 256)
    finite = weight.isfinite()
    one_hot = torch.eye(256, dtype=torch.float32)
    y = backend.linear(one_hot, backend.pack(encode(torch.where(finite, weight, 0))), None)
    assert torch.equal(y.t(), torch.where(finite, weight, 0).float())


def test_takes_turns_with_torch(backend: CpuBackend) -> None:
    """Its products set up the tiles of AMX, too, in the same threads."""
    weight = sparse((256, 512), torch.bfloat16)
    packed = backend.pack(encode(weight))
    xs = [torch.randn(n, 512).bfloat16() for n in (64, 7, 100, 16)]
    ours = [backend.linear(x, packed, None) for x in xs]
    dense = [torch.nn.functional.linear(x, weight) for x in xs]
    for x, y, of_torch in zip(xs, ours, dense, strict=True):
        assert torch.equal(torch.nn.functional.linear(x, weight), of_torch)
        assert torch.equal(backend.linear(x, packed, None), y)
        assert_close(y, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_round_to_nearest_even(backend: CpuBackend, dtype: torch.dtype) -> None:
    x = torch.randn(9, 300).to(dtype) * torch.logspace(-12, 4, 9).unsqueeze(1).to(dtype)
    weight = torch.eye(300, dtype=torch.float32) * (1 + 2.0**-9)
    exact = x.float() * (1 + 2.0**-9)
    assert torch.equal(backend.linear(x, backend.pack(encode(weight)), None), exact.to(dtype))


def test_strided_x(backend: CpuBackend) -> None:
    weight = sparse((50, 77), torch.bfloat16)
    packed = backend.pack(encode(weight))
    wide = torch.randn(6, 500).bfloat16()
    assert_close(backend.linear(wide[::2, 11:88], packed, None), wide[::2, 11:88], weight)
    turned = torch.randn(77, 5).bfloat16().t()
    assert_close(spinfer.linear(turned, packed), turned, weight)


@pytest.mark.parametrize("columns", [32, 96, 576])
def test_x_wherever_it_lies(backend: CpuBackend, columns: int) -> None:
    """Rows of whole cache lines may be read in place, others are copied; what lies around them is not read."""
    weight = sparse((80, columns), torch.bfloat16)
    packed = backend.pack(encode(weight))
    for tokens in (2, 16, 17, 33, 100, 225, 530):
        x = torch.randn(tokens, columns).bfloat16()
        y = backend.linear(x, packed, None)
        assert_close(y, x, weight)
        for first in (0, 32, 5):
            around = torch.full((tokens + 20, columns + 64), torch.nan).bfloat16()
            inside = around[:tokens, first : first + columns].copy_(x)
            assert torch.equal(backend.linear(inside, packed, None), y), (tokens, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_loses_nothing(backend: CpuBackend, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (64, 64), (65, 63), (200, 1000), (31, 129)):
        stored = encode(sparse(shape, dtype, density=0.45))
        packed = backend.pack(stored)
        assert packed.layout == CPU_LAYOUT
        assert_same(unpack(packed), stored)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    tier=st.sampled_from(LIBRARY.tiers),
    seed=st.integers(0, 2**31),
)
def test_pack_loses_nothing_anywhere(
    shape: tuple[int, int], density: float, dtype: torch.dtype, tier: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    stored = encode(weight.to(dtype))
    backend = CpuBackend(tier)
    packed = backend.pack(stored)
    assert_same(backend.unpack(packed), stored)


def test_pack_keeps_stored_zeros_and_odd_patterns(backend: CpuBackend) -> None:
    stored = encode(torch.ones(40, 50, dtype=torch.float16))
    values = stored.values.clone()
    values[:8] = torch.tensor([0, -32768, 1, 31744, 32767, -1, 512, -31744], dtype=torch.int16).view(torch.float16)
    odd = TcaBmeTensor(values, stored.bitmap, stored.offsets, stored.shape, stored.nnz).validate()
    assert_same(backend.unpack(backend.pack(odd)), odd)


def assert_same(one: TcaBmeTensor, other: TcaBmeTensor) -> None:
    assert (one.shape, one.nnz, one.dtype) == (other.shape, other.nnz, other.dtype)
    for name in ("values", "bitmap", "offsets"):
        a, b = getattr(one, name), getattr(other, name)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def test_layers_pack_for_the_cpu_kernel_and_save_the_stored_bytes() -> None:
    dense = torch.nn.Linear(200, 130)
    with torch.no_grad():
        dense.weight.mul_(torch.rand(130, 200) > 0.5)
    layer = spinfer.SparseLinear.from_linear(dense)
    assert layer._packed is not None
    assert layer._packed.layout == CPU_LAYOUT
    stored, state = encode(dense.weight), layer.state_dict()
    assert torch.equal(state["weight"], stored.values)
    assert torch.equal(state["weight_bitmap"], stored.bitmap)
    assert torch.equal(state["weight_offsets"], stored.offsets)
    x = torch.randn(3, 2, 200, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, dense(x))
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense.weight.sum(0).expand_as(x).contiguous())


def broken(change: Callable[[dict[str, Tensor]], None]) -> TcaBmeTensor:
    weight = torch.ones(100, 150).bfloat16()
    weight[99, 149] = 0  # 791 nonzeros in the last GroupTile, and one zero of padding
    stored = encode(weight)
    parts = {"values": stored.values.clone(), "bitmap": stored.bitmap.clone(), "offsets": stored.offsets.clone()}
    change(parts)
    return TcaBmeTensor(parts["values"], parts["bitmap"], parts["offsets"], stored.shape, stored.nnz)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts["offsets"].__setitem__(0, 1), "offsets"),
        (lambda parts: parts["offsets"].__setitem__(2, 2**31 - 1), "offsets"),
        (lambda parts: parts["offsets"].__setitem__(3, -5), "offsets"),
        (lambda parts: parts["offsets"].__setitem__(-1, 0), "offsets"),
        (lambda parts: parts.__setitem__("values", parts["values"].repeat(2)[:16000]), "offsets"),
        (lambda parts: parts["bitmap"].__setitem__(0, 1), "offsets"),
        (lambda parts: parts["bitmap"].__setitem__(-1, 1), "outside"),
        (lambda parts: parts["values"].__setitem__(-1, 1), "padded"),
    ],
)
def test_pack_refuses_what_disagrees(change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    weight = broken(change)
    with pytest.raises(FormatError, match=message):
        CPU.pack(weight)


def test_pack_refuses_a_wrong_nnz() -> None:
    stored = encode(torch.ones(64, 64).half())
    with pytest.raises(FormatError, match="nnz"):
        CPU.pack(TcaBmeTensor(stored.values, stored.bitmap, stored.offsets, stored.shape, 4095))


@pytest.fixture
def requested_threads() -> Iterator[list[int]]:
    """The numbers of threads that the kernel asks its pool for; the pool then runs on the caller."""
    assert LIBRARY is not None
    requested: list[int] = []

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def pool(body: Callable[[int | None], None], data: int | None, threads: int, _: int) -> None:
        requested.append(threads)
        body(data)

    LIBRARY.native.spinfer_cpu_set_pool(ctypes.cast(pool, ctypes.c_void_p))
    yield requested
    LIBRARY._share_pool()


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restored_threads")
def test_threads_follow_torch(requested_threads: list[int]) -> None:
    weight = sparse((1000, 1000), torch.bfloat16)
    packed = CPU.pack(encode(weight))
    x = torch.randn(3, 1000).bfloat16()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        requested_threads.clear()
        assert_close(CPU.linear(x, packed, None), x, weight)
        assert requested_threads == ([threads] if threads > 1 else [])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads through /proc")
def test_no_threads_beside_those_of_torch() -> None:
    code = """
import os, torch, spinfer
torch.set_num_threads(3)
torch.ones(1 << 22).add_(1)  # torch's pool is up
before = len(os.listdir("/proc/self/task"))
packed = spinfer.pack(spinfer.encode(torch.randn(2048, 2048)))
spinfer.linear(torch.randn(4, 2048), packed)
print(before, len(os.listdir("/proc/self/task")))
"""
    before, after = run_python(code).split()
    assert int(before) >= 3
    assert before == after


@pytest.mark.usefixtures("restored_threads")
def test_more_threads_than_cores(backend: CpuBackend) -> None:
    torch.set_num_threads(8)
    weight = sparse((777, 555), torch.bfloat16)
    packed = backend.pack(encode(weight))
    assert_same(backend.unpack(packed), encode(weight))
    for n in (1, 200):
        x = torch.randn(n, 555).bfloat16()
        assert_close(backend.linear(x, packed, None), x, weight)


def test_concurrent_calls() -> None:
    problems = []
    for n, shape in ((1, (1024, 512)), (3, (512, 1024)), (70, (300, 700))):
        weight = sparse(shape, torch.bfloat16)
        problems.append((torch.randn(n, shape[1]).bfloat16(), weight, CPU.pack(encode(weight))))
    failures: list[BaseException] = []

    def work(x: Tensor, weight: Tensor, packed: PackedWeight) -> None:
        try:
            for _ in range(30):
                assert_close(CPU.linear(x, packed, None), x, weight)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=problem) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def run_python(code: str, **env: str) -> str:
    source = str(Path(spinfer.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source, **env}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    return done.stdout if done.returncode == 0 else done.stderr


def test_the_environment_picks_a_tier() -> None:
    code = "from spinfer.kernels.cpu.library import load; print(load().tier)"
    assert run_python(code, SPINFER_CPU_TIER="scalar").strip() == "scalar"
    assert "the CPU tier 'sse9' does not exist; this machine runs" in run_python(code, SPINFER_CPU_TIER="sse9")


def test_a_tier_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIBRARY is not None
    packed = CPU.pack(encode(torch.ones(8, 8)))
    monkeypatch.setattr(LIBRARY, "tiers", ("scalar",))
    backend = CpuBackend(next(name for name in LIBRARY._names if name != "scalar"))
    with pytest.raises(SpinferError, match="instructions that this CPU lacks; this machine runs scalar"):
        backend.linear(torch.ones(1, 8), packed, None)


def test_the_library_checks_its_arguments() -> None:
    assert LIBRARY is not None
    x = torch.zeros(8)
    at = x.data_ptr()
    scalar = LIBRARY.tier_index("scalar")
    for tier, kind, x_kind, tokens in (
        (99, 0, 0, 1),
        (-1, 0, 0, 1),
        (scalar, 3, 0, 1),
        (scalar, 0, 3, 1),
        (scalar, 0, 0, 0),
    ):
        result = LIBRARY.native.spinfer_cpu_linear(tier, at, at, at, 1, 1, kind, at, 1, tokens, x_kind, None, at, 1)
        with pytest.raises(FormatError, match="out of range"):
            LIBRARY.check(result, "linear")
    with pytest.raises(MemoryError):
        LIBRARY.check(-1, "linear")


def test_without_the_library_one_warning_and_the_portable_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library_module, "_PATH", tmp_path / "missing.so")
    load.cache_clear()
    try:
        weight = encode(torch.randn(70, 70))
        with pytest.warns(UserWarning, match=r"C\+\+ compiler") as warned:
            packed, again = (spinfer.pack(weight) for _ in range(2))
        assert len(warned) == 1
        assert packed.layout == again.layout == BACKENDS[-1].layout
        x = torch.randn(2, 70)
        torch.testing.assert_close(spinfer.linear(x, packed).double(), reference(x, weight), rtol=1e-5, atol=1e-5)
        with pytest.raises(SpinferError, match="not installed"):
            CPU.pack(weight)
    finally:
        load.cache_clear()


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "uname"):  # no compiler among them
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"needs {name}")
        (tools / name).symlink_to(found)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "cmake", "-S", str(root), "-B", str(tmp_path / "build"), "-G", "Unix Makefiles"]
    done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    message = " ".join(done.stderr.split())
    assert "No C++ compiler was found: spinfer is installed without its native CPU kernel" in message
    assert "Install g++ or clang++ and reinstall" in message


def test_another_versions_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "_ABI", -1)
    with pytest.raises(SpinferError, match="another version"):
        CpuLibrary(library_module._PATH)
