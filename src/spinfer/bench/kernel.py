"""Time the CUDA kernels against cuBLAS on one matrix shape: `spinfer bench kernel`, and what the sweep is made of.

Calls go through `spinfer.linear`, as a user's do, and are captured in CUDA graphs whose calls rotate over copies of
the weight, so that each finds a cold L2. cuBLAS (torch.mm on the pruned weight, stored densely) takes turns with ours
in one process; medians of the replays.
"""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import spinfer
from spinfer.bench.kernel_masks import RealMask, prune_
from spinfer.errors import SpinferError
from spinfer.format import encode
from spinfer.kernels import PackedWeight, pack
from spinfer.kernels.cuda.configs import portable_config
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.matmul import FusedPass
from spinfer.kernels.cuda.runtime import device_traits
from spinfer.kernels.cuda.timing import Call, GraphTimer, Timer, cold_copies
from spinfer.kernels.packed import tokens_and_stride
from spinfer.ops import linear

_FP8_MULTIPLE = 16
"""What torch._scaled_mm asks of both sides of the weight; the tokens are padded to it."""

_CHECKED_ROWS, _CHECKED_TOKENS = 256, 64
"""Sample of the result that is compared with float64: the whole of a large one takes longer than its timing."""


class ShapeBench:
    """One weight shape: dense baselines, against which sparse weights are timed.

    Args:
        m: out_features.
        k: in_features.
        dtype: of weight and x.
        device: where.
        timer: how; by default CUDA graphs.
        fp8: whether to time cuBLAS FP8 too (torch._scaled_mm, e4m3, fast accumulation, one scale a tensor, fp16 or bf16
            out), where both sides are multiples of 16; once for each number of tokens, x padded to a multiple of 16.
        portable: whether to time the kernel for GPUs other than Hopper too, up to 32 tokens.
    """

    def __init__(
        self,
        m: int,
        k: int,
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cuda",
        timer: Timer | None = None,
        fp8: bool = False,
        portable: bool = False,
    ) -> None:
        self.m, self.k, self.dtype = m, k, dtype
        self._device = torch.device(device)
        self._timer = GraphTimer() if timer is None else timer
        self._wants_portable = portable
        self._wants_fp8 = fp8 and m % _FP8_MULTIPLE == 0 and k % _FP8_MULTIPLE == 0
        weight = torch.empty(m, k, dtype=dtype, device=self._device)
        self._dense = [weight, *(torch.empty_like(weight) for _ in range(cold_copies(weight.nbytes) - 1))]
        self._x: dict[int, Tensor] = {}
        self._baselines: dict[int, Any] = {}
        self._fp8_weights: list[Tensor] = []
        self._fp8: dict[int, float | str] = {}
        self._case: dict[str, Any] = {}
        self._sparse: list[PackedWeight] = []
        self._twin: list[PackedWeight] = []

    def load(self, sparsity: float, mask: str = "random", *, real: RealMask | None = None, twin: bool = False) -> None:
        """Make a new random weight, pruned, and its copies, dense and sparse.

        Args:
            sparsity: share of zeros; of some masks only about (rows tell the density).
            mask: see `kernel_masks.prune_`.
            real: for the mask "wanda".
            twin: also make a weight as dense whose zeros are at random, to be timed in turn.
        """
        self._case, self._sparse, self._twin = {}, [], []
        weight = self._dense[0]
        self._sparse = self._packed(prune_(weight.normal_(), sparsity, mask, real))
        packed = self._sparse[0]
        density = packed.nnz / (self.m * self.k)
        if twin:
            self._twin = self._packed(prune_(torch.empty_like(weight).normal_(), 1 - density, "random"))
        for copy in self._dense[1:]:
            copy.copy_(weight)
        ideal = packed.nnz * self.dtype.itemsize + self.m * self.k / 8
        self._case = {
            "sparsity": sparsity,
            "mask": mask,
            "density": density,
            "nbytes": packed.nbytes,
            "ideal_nbytes": ideal,
            "byte_limit": self.m * self.k * self.dtype.itemsize / ideal,
        }

    def _packed(self, weight: Tensor) -> list[PackedWeight]:
        packed = pack(encode(weight))
        copies = [packed]
        for _ in range(cold_copies(packed.nbytes) - 1):
            parts = tuple(part.clone() for part in packed.parts)
            copies.append(PackedWeight(packed.spec, parts))
        return copies

    def measure(self, n: int) -> dict[str, Any]:
        """Time the loaded weight with n tokens.

        Returns:
            m, k, n, dtype, sparsity, mask, density; `us`, `dense_us` (microseconds of a call), with `spread` and
            `dense_spread`; `speedup` = dense_us / us; `fp8_us` (None where it was not timed, with the reason in
            `fp8_error` if it failed); with a twin `random_us`; `portable_us` where it was asked for; `nbytes` of the
            packed weight and `ideal_nbytes` = 2 nnz + M K / 8; `byte_limit`, the speed-up if both ran at the speed of
            memory; `error`, the relative error of the result against float64 on a sample of rows and tokens (Frobenius
            norms).
        """
        x = self._tokens(n)
        error = self._error(x)
        kinds = [self._prepare(self._sparse, x), self._baseline(n, x)]
        if self._twin:
            kinds.append(self._prepare(self._twin, x))
        if self._wants_portable:
            kinds.append(self._portable(x))
        ours, dense, *others = self._timer.interleaved(kinds)
        row = {
            "m": self.m,
            "k": self.k,
            "n": n,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self._case,
            "us": ours.us,
            "spread": ours.spread,
            "dense_us": dense.us,
            "dense_spread": dense.spread,
            "speedup": dense.us / ours.us,
            "error": error,
        }
        if self._twin:
            row["random_us"] = others.pop(0).us
        if self._wants_portable:
            row["portable_us"] = others.pop(0).us
        if self._wants_fp8:
            found = self._fp8_us(n, x)
            row["fp8_us"] = None if isinstance(found, str) else found
            if isinstance(found, str):
                row["fp8_error"] = found
        return row

    def _tokens(self, n: int) -> Tensor:
        if n not in self._x:
            self._x[n] = torch.randn(n, self.k, dtype=self.dtype, device=self._device)
        return self._x[n]

    def _prepare(self, weights: Sequence[PackedWeight], x: Tensor) -> Any:
        return self._timer.prepare([functools.partial(linear, x, weight) for weight in weights])

    def _portable(self, x: Tensor) -> Any:
        grid = ChunkGrid.of(self.m, self.k)
        config = portable_config(grid, x.shape[0], device_traits(x.device.index))
        run = FusedPass(grid, config, self.dtype, x.device)
        y = torch.empty(x.shape[0], self.m, dtype=self.dtype, device=self._device)

        def call(weight: PackedWeight) -> None:
            run(x, *tokens_and_stride(x), weight.parts, None, y)

        return self._timer.prepare([functools.partial(call, weight) for weight in self._sparse])

    def _baseline(self, n: int, x: Tensor) -> Any:
        if n not in self._baselines:
            out = torch.empty(n, self.m, dtype=self.dtype, device=self._device)
            calls: list[Call] = [functools.partial(torch.mm, x, weight.t(), out=out) for weight in self._dense]
            self._baselines[n] = self._timer.prepare(calls)
        return self._baselines[n]

    def _fp8_us(self, n: int, x: Tensor) -> float | str:
        """Microseconds, or why there are none."""
        if n not in self._fp8:
            try:
                (timing,) = self._timer.interleaved([self._timer.prepare(self._fp8_calls(x))])
                self._fp8[n] = timing.us
            except (RuntimeError, TypeError) as error:
                self._fp8[n] = str(error).splitlines()[0][:300]
        return self._fp8[n]

    def _fp8_calls(self, x: Tensor) -> list[Call]:
        if not self._fp8_weights:
            first = self._dense[0].to(torch.float8_e4m3fn)
            self._fp8_weights = [first, *(first.clone() for _ in range(cold_copies(first.nbytes) - 1))]
        padding = -x.shape[0] % _FP8_MULTIPLE
        padded = torch.nn.functional.pad(x, (0, 0, 0, padding)).to(torch.float8_e4m3fn)
        scale = torch.ones((), device=x.device)
        return [
            functools.partial(
                torch._scaled_mm,
                padded,
                weight.t(),
                scale,
                scale,
                out_dtype=self.dtype,
                use_fast_accum=True,
            )
            for weight in self._fp8_weights
        ]

    def _error(self, x: Tensor) -> float:
        """Relative error against float64, on rows and tokens spread over the result."""
        y = linear(x, self._sparse[0])
        rows = torch.arange(0, self.m, -(-self.m // _CHECKED_ROWS), device=x.device)
        tokens = torch.arange(0, x.shape[0], -(-x.shape[0] // _CHECKED_TOKENS), device=x.device)
        expected = x[tokens].double() @ self._dense[0][rows].double().t()
        return float((y[tokens][:, rows].double() - expected).norm() / expected.norm())


def bandwidths() -> dict[str, float]:
    """Bytes a second of device memory.

    Returns:
        `read_bandwidth`, a pure read of 4 GiB, the better of two reductions: the ceiling of the byte limit; and
        `copy_bandwidth`, a copy of 1 GiB, read and written.
    """
    timer = GraphTimer()
    source = torch.zeros(1 << 30, dtype=torch.float32, device="cuda")
    quarter = source[: source.numel() // 4]
    target = torch.empty_like(quarter)
    calls: list[Call] = [
        functools.partial(torch.sum, source),
        functools.partial(torch.amax, source),
        functools.partial(target.copy_, quarter),
    ]
    reduce, extreme, copy = timer.interleaved([timer.prepare([call]) for call in calls])
    return {
        "read_bandwidth": source.nbytes / min(reduce.us, extreme.us) * 1e6,
        "copy_bandwidth": 2 * target.nbytes / copy.us * 1e6,
    }


def environment(commit: str | None = None) -> dict[str, Any]:
    """What a result depends on: device, driver, versions, commit (by default that of the checkout this runs from)."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "sm_count": properties.multi_processor_count,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name.replace("-", "_"): _version(name) for name in ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")},
        "spinfer": spinfer.__version__,
        "commit": commit or _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def require_cuda() -> None:
    """Raises SpinferError where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise SpinferError("the kernel benchmark needs a CUDA device, and torch sees none")


def bench_kernel(
    m: int,
    k: int,
    tokens: Sequence[int],
    sparsities: Sequence[float],
    *,
    dtype: torch.dtype = torch.float16,
    mask: str = "random",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Time x W^T for a random sparse weight (M, K) beside cuBLAS on the dense weight.

    Args:
        m: out_features.
        k: in_features.
        tokens: rows of x.
        sparsities: shares of zeros.
        dtype: of weight and x.
        mask: see `kernel_masks.prune_`.
        progress: called with (cases done, cases).

    Returns:
        One `ShapeBench.measure` for each sparsity and number of tokens.

    Raises:
        SpinferError: no CUDA device.
    """
    require_cuda()
    bench = ShapeBench(m, k, dtype=dtype, fp8=True)
    rows = []
    for sparsity in sparsities:
        bench.load(sparsity, mask)
        for n in tokens:
            rows.append(bench.measure(n))
            progress(len(rows), len(sparsities) * len(tokens))
    return rows
