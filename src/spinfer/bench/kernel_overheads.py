"""What a kernel costs beside its run time: compiling, launching from Python, repacking, decoding to dense."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from spinfer.bench.kernel_compile import kernel_sources
from spinfer.bench.kernel_masks import prune_
from spinfer.format import encode
from spinfer.kernels import backend_of, pack
from spinfer.kernels.cuda.compile import compile_source, cubin
from spinfer.kernels.cuda.dense import RowDecoder
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.matmul import FusedPass
from spinfer.kernels.cuda.runtime import device_traits
from spinfer.kernels.cuda.select import Fused, choose
from spinfer.ops import linear

_SPARSITY = 0.6
_DTYPE = torch.float16

_SMALL = (512, 512)
"""A kernel that the GPU finishes faster than Python launches the next, so that launches never wait for the GPU."""

_CALLS, _REPEATS = 300, 7
"""The queue of a stream holds about 1000 launches."""


def first_call(m: int = 4096, k: int = 4096) -> dict[str, float]:
    """Seconds until a kernel first runs; call it before anything else runs the kernel in this process.

    Returns:
        `compile_s` of the one kernel for N = 1, alone, as after the installation; `cached_s`, reading it from the disk
        cache; `first_call_s`, a call of `spinfer.linear` with the cubin cached, until its result is there.
    """
    kernels = kernel_sources([(m, k)], [1 - _SPARSITY], [1], [_DTYPE], device_traits(0))
    fused = next(kernel for kernel in kernels if kernel.file.startswith("matmul"))
    weight = pack(encode(_weight(m, k)))
    x = torch.randn(1, k, dtype=_DTYPE, device="cuda")
    cubin(fused)
    return {
        "compile_s": _seconds(lambda: compile_source(fused)),
        "cached_s": _seconds(lambda: cubin(fused)),
        "first_call_s": _seconds(lambda: linear(x, weight)),
    }


def launches() -> dict[str, float]:
    """Microseconds of the host a call, on an idle device: our kernel, the backend, `spinfer.linear`, the op that
    compiled code calls, and torch.mm.
    """
    m, k = _SMALL
    dense = _weight(m, k)
    weight = pack(encode(dense))
    x = torch.randn(1, k, dtype=_DTYPE, device="cuda")
    y = torch.empty(1, m, dtype=_DTYPE, device="cuda")
    grid = ChunkGrid.of(m, k)
    plan = choose(grid, weight.nnz, 1, True, device_traits(0))
    if not isinstance(plan, Fused):
        raise TypeError(f"the selection decodes a {m} x {k} weight at one token")
    run = FusedPass(grid, plan.passes[0], _DTYPE, x.device)
    with torch.inference_mode():
        inference = _host_us(functools.partial(linear, x, weight))
        spec = (weight.layout, weight.shape, weight.nnz, weight.dtype)
        op = _host_us(functools.partial(torch.ops.spinfer.linear.default, x, weight.parts, *spec, None))
    return {
        "kernel_us": _host_us(lambda: run(x, 1, k, weight.parts, None, y)),
        "backend_us": _host_us(functools.partial(backend_of(weight.layout).linear, x, weight, None)),
        "linear_us": _host_us(functools.partial(linear, x, weight)),
        "linear_inference_mode_us": inference,
        "op_inference_mode_us": op,
        "torch_mm_us": _host_us(functools.partial(torch.mm, x, dense.t())),
        "torch_mm_out_us": _host_us(functools.partial(torch.mm, x, dense.t(), out=y)),
    }


def repacking(m: int, k: int) -> dict[str, float]:
    """Milliseconds, until the result is there, for a weight (m, k); `*_gbps` in 10^9 bytes of dense weight a second.

    Returns:
        `encode_ms`, dense to storage; `pack_ms`, storage to the kernels' layout, and `unpack_ms` back; `decode_ms`,
        the kernels' layout to dense rows, with `decode_rw_gbps` counting what is read and written.
    """
    dense = _weight(m, k)
    storage = encode(dense)
    weight = pack(storage)
    backend, grid = backend_of(weight.layout), ChunkGrid.of(m, k)
    out = torch.empty_like(dense)
    decode, (chunks, offsets) = RowDecoder(grid, 0, grid.row_blocks, dense.device.index), weight.parts[:2]
    ms = {
        "encode": _median_ms(lambda: encode(dense)),
        "pack": _median_ms(lambda: backend.pack(storage)),
        "unpack": _median_ms(lambda: backend.unpack(weight)),
        "decode": _median_ms(lambda: decode(chunks, offsets, out)),
    }
    rates = {f"{name}_gbps": dense.nbytes / took / 1e6 for name, took in ms.items()}
    return {
        "m": m,
        "k": k,
        "sparsity": _SPARSITY,
        "dense_nbytes": dense.nbytes,
        "nbytes": weight.nbytes,
        **{f"{name}_ms": took for name, took in ms.items()},
        **rates,
        "decode_rw_gbps": (dense.nbytes + weight.nbytes) / ms["decode"] / 1e6,
    }


def _weight(m: int, k: int) -> torch.Tensor:
    return prune_(torch.randn(m, k, dtype=_DTYPE, device="cuda"), _SPARSITY, "random")


def _seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _host_us(call: Callable[[], Any]) -> float:
    """Median over repeats, each of so many calls that the device stays behind and never holds the host up."""
    times = []
    for _ in range(_REPEATS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        times.append((time.perf_counter() - start) / _CALLS * 1e6)
    return statistics.median(times[1:])


def _median_ms(call: Callable[[], object]) -> float:
    """Median of five after a warm-up."""
    call()
    return statistics.median(_seconds(call) for _ in range(5)) * 1e3
