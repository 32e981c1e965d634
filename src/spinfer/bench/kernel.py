"""Time the CUDA kernels against cuBLAS: cold L2, CUDA-graph replays, medians, both in one process and interleaved.

`python -m spinfer.bench.kernel -m 8192 -k 8192 -n 1 16 --sparsity 0.5 0.6`
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import spinfer
from spinfer.errors import SpinferError
from spinfer.format import encode
from spinfer.kernels import PackedWeight, backend_of, pack

SHAPES = [(28672, 8192), (8192, 28672), (8192, 8192), (28672, 4096), (4096, 14336), (4096, 4096)]
"""(M, K): projections of Llama-3-70B and 8B."""

MASKS = ("random", "rowwise", "clustered", "2:4")

_COLD_NBYTES = 240 << 20
"""Copies of a weight that calls rotate over: several times the L2 of any current GPU."""

_LAUNCHES = 40
"""Launches in a graph, at least."""

_REPLAYS = 9


def prune(weight: Tensor, sparsity: float, mask: str) -> Tensor:
    """Zero a share of a weight (M, K), in place.

    Args:
        weight: dense, without zeros.
        sparsity: share of zeros, in [0, 1]; "2:4" is always one half.
        mask: "random"; "rowwise", every row equally dense, as Wanda leaves it; "clustered", where blocks of 64 x 64 are
            dense, empty, or in between; or "2:4".
    """
    rows, columns = weight.shape
    for start in range(0, rows, 4096):
        part = weight[start : start + 4096]
        score = torch.rand(part.shape, device=part.device)
        if mask == "random":
            part[score < sparsity] = 0
        elif mask == "rowwise":
            part.scatter_(1, score.topk(round(columns * sparsity), dim=1).indices, 0)
        elif mask == "2:4":
            groups = score.view(-1, 4)
            part.view(-1, 4).scatter_(1, groups.topk(2, dim=1).indices, 0)
        elif mask == "clustered":
            blocks = torch.rand(-(-part.shape[0] // 64), -(-columns // 64), device=part.device)
            # Shares of zeros with the right mean: a tenth of the blocks dense, a tenth empty, the rest spread about.
            inner = (sparsity - 0.1) / 0.8
            share = (inner + (blocks - 0.5) * 0.6).clamp(0, 1)
            share[blocks < 0.1], share[blocks > 0.9] = 0, 1
            expanded = share.repeat_interleave(64, 0).repeat_interleave(64, 1)
            part[score < expanded[: part.shape[0], :columns]] = 0
        else:
            raise SpinferError(f"no mask {mask!r}; choose from {', '.join(MASKS)}")
    return weight


def _copies(tensor: Tensor) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(max(1, -(-_COLD_NBYTES // tensor.nbytes) - 1)))]


def _graph(calls: list[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph, launches = torch.cuda.CUDAGraph(), max(_LAUNCHES, len(calls))
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    graph.replay()
    return graph, launches


def _interleaved_us(graphs: list[tuple[torch.cuda.CUDAGraph, int]]) -> list[float]:
    """Median microseconds a launch of each graph, replayed in turn."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(_REPLAYS):
        for i, (graph, launches) in enumerate(graphs):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[i].append(start.elapsed_time(end) * 1e3 / launches)
    return [statistics.median(t) for t in times]


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, read and written: the ceiling of the byte limit."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    (us,) = _interleaved_us([_graph([lambda: target.copy_(source)])])
    return 2 * source.numel() / us * 1e6


def bench_kernel(
    m: int, k: int, tokens: list[int], sparsity: float, *, dtype: torch.dtype = torch.float16, mask: str = "random"
) -> Iterator[dict[str, Any]]:
    """Time x W^T for a random sparse weight, as `spinfer.linear` runs it, beside torch.mm on the dense weight.

    Args:
        m: out_features.
        k: in_features.
        tokens: rows of x, one result each.
        sparsity: share of zeros.
        dtype: of weight and x.
        mask: see `prune`.

    Yields:
        The case; `us` and `dense_us` (median microseconds of a launch); `speedup`; `nbytes` of the packed weight and
        `ideal_nbytes` = 2 nnz + M K / 8; `byte_limit`, the speed-up if both ran at the speed of memory; `error`, the
        relative error of the result against float64.
    """
    if not torch.cuda.is_available():
        raise SpinferError("the kernel benchmark needs a CUDA device")
    weight = torch.empty(m, k, dtype=dtype, device="cuda").normal_()
    prune(weight, sparsity, mask)
    packed = pack(encode(weight))
    backend, chunks = backend_of(packed.layout), _copies(packed.parts[0])
    sparse = [
        PackedWeight(packed.layout, (c, *packed.parts[1:]), packed.shape, packed.nnz, packed.dtype) for c in chunks
    ]
    dense = _copies(weight)
    ideal = packed.nnz * dtype.itemsize + m * k / 8
    for n in tokens:
        x = torch.randn(n, k, dtype=dtype, device="cuda")
        out = torch.empty(n, m, dtype=dtype, device="cuda")
        rows = min(m, 1024)
        expected = x.double() @ weight[:rows].double().t()
        error = (backend.linear(x, packed, None)[:, :rows].double() - expected).norm() / expected.norm()
        graphs = [
            _graph([functools.partial(backend.linear, x, w, None) for w in sparse]),
            _graph([functools.partial(torch.mm, x, w.t(), out=out) for w in dense]),
        ]
        us, dense_us = _interleaved_us(graphs)
        yield {
            "m": m,
            "k": k,
            "n": n,
            "sparsity": sparsity,
            "mask": mask,
            "dtype": str(dtype).removeprefix("torch."),
            "us": us,
            "dense_us": dense_us,
            "speedup": dense_us / us,
            "nbytes": packed.nbytes,
            "ideal_nbytes": ideal,
            "byte_limit": m * k * dtype.itemsize / ideal,
            "error": float(error),
        }


def environment() -> dict[str, Any]:
    """What a result depends on: device, driver, versions, commit."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "device": properties.name,
        "sm_count": properties.multi_processor_count,
        "driver": subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_core": importlib.metadata.version("cuda-core"),
        "spinfer": spinfer.__version__,
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        "copy_bandwidth": copy_bandwidth(),
    }


def main() -> None:
    """Command line: print a table, and write JSON with --out."""
    parser = argparse.ArgumentParser(prog="python -m spinfer.bench.kernel", description=__doc__)
    parser.add_argument("-m", type=int, help="out_features; with -k, instead of the six standard shapes")
    parser.add_argument("-k", type=int, help="in_features")
    parser.add_argument("-n", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128], help="tokens")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--mask", choices=MASKS, nargs="+", default=["random"])
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if (options.m is None) != (options.k is None):
        parser.error("give both -m and -k, or neither")
    results = []
    print(f"{'M x K':>13} {'sparsity':>8} {'mask':>9} {'N':>5} {'us':>8} {'cuBLAS':>8} {'speed-up':>8} {'limit':>5}")
    for m, k in SHAPES if options.m is None else [(options.m, options.k)]:
        for sparsity in options.sparsity:
            for mask in options.mask:
                for r in bench_kernel(m, k, options.n, sparsity, dtype=getattr(torch, options.dtype), mask=mask):
                    results.append(r)
                    print(
                        f"{f'{m} x {k}':>13} {sparsity:>8} {mask:>9} {r['n']:>5} {r['us']:>8.1f} {r['dense_us']:>8.1f} "
                        f"{r['speedup']:>8.2f} {r['byte_limit']:>5.2f}",
                        flush=True,
                    )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
