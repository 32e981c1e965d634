"""The whole benchmark of the CUDA kernels: `python -m spinfer.bench.kernel_sweep --out FILE`.

Weight shapes and tokens are those of `plan`, the most telling first. Rows go to FILE as they are measured, so that a
run that is cut off, or out of its --time-budget, leaves what it has; a case that fails is recorded and the next one
goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spinfer.bench.kernel import ShapeBench, bandwidths, environment, require_cuda
from spinfer.bench.kernel_compile import compile_all, kernel_sources
from spinfer.bench.kernel_masks import MASKS, RealMask
from spinfer.bench.kernel_overheads import first_call, launches, repacking
from spinfer.bench.kernel_targets import is_right
from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.runtime import device_traits

SHAPES = ((28672, 8192), (8192, 28672), (8192, 8192), (28672, 4096), (4096, 14336), (4096, 4096))
"""(M, K): projections of Llama-3-70B and 8B, swept over all tokens and sparsities."""

MODELS = {
    "Llama-3-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "Llama-3-70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "OPT-13B": ((15360, 5120), (5120, 5120), (20480, 5120), (5120, 20480)),
    "OPT-30B": ((21504, 7168), (7168, 7168), (28672, 7168), (7168, 28672)),
    "OPT-66B": ((27648, 9216), (9216, 9216), (36864, 9216), (9216, 36864)),
    "Qwen2.5-32B": ((7168, 5120), (5120, 5120), (55296, 5120), (5120, 27648)),
}
"""(M, K) of each model's QKV, O, gate and up (OPT: fc1), and down (OPT: fc2) projections; QKV, and gate and up, are one
matrix, as in vLLM."""

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 8192)


@dataclass(frozen=True)
class Group:
    """Cases that share a shape.

    Attributes:
        name: "grid", "models", "masks", "bfloat16" or "portable".
        shape: (M, K).
        tokens: N.
        sparsities: shares of zeros.
        masks: each with each sparsity.
        dtype: of weight and x.
        fp8: whether to time cuBLAS FP8 as well, once for each number of tokens.
    """

    name: str
    shape: tuple[int, int]
    tokens: tuple[int, ...]
    sparsities: tuple[float, ...]
    masks: tuple[str, ...] = ("random",)
    dtype: torch.dtype = torch.float16
    fp8: bool = False

    @property
    def cases(self) -> int:
        """How many rows it makes."""
        return len(self.tokens) * len(self.sparsities) * len(self.masks)


def plan(*, real_sparsities: Sequence[float] = (), quick: bool = False) -> list[Group]:
    """All cases, the most telling first.

    Args:
        real_sparsities: what the file of real masks has.
        quick: a few cases of each kind, for a first look.
    """
    if quick:
        shapes, tokens = (SHAPES[0], SHAPES[-1]), (1, 16, 64, 512)
        return [
            *(Group("grid", shape, tokens, (0.6,), fp8=True) for shape in shapes),
            Group("masks", SHAPES[2], (16,), (0.5,), MASKS),
            *(Group("masks", SHAPES[2], (16,), (s,), ("wanda",)) for s in real_sparsities[:1]),
        ]
    groups = [Group("grid", shape, TOKENS, (0.6, 0.5, 0.7), fp8=True) for shape in SHAPES]
    for shape in (SHAPES[2], SHAPES[0]):
        groups += [
            Group("masks", shape, (1, 16), (0.5,), ("2:4",)),
            Group("masks", shape, (1, 16), (0.6,), tuple(mask for mask in MASKS if mask not in ("random", "2:4"))),
        ]
        if real_sparsities:
            groups.append(Group("masks", shape, (1, 16), tuple(real_sparsities), ("wanda",)))
    groups += [Group("models", shape, (1, 16, 64, 512), (0.6,), fp8=True) for shape in _model_shapes()]
    groups += [Group("bfloat16", shape, (1, 16, 64, 512), (0.6,), dtype=torch.bfloat16) for shape in SHAPES[::5]]
    groups += [Group("portable", shape, (1, 8, 16, 32), (0.6,)) for shape in SHAPES[::5]]
    groups += [Group("grid", shape, TOKENS, (0.4, 0.3, 0.8)) for shape in SHAPES]
    return groups


def _model_shapes() -> list[tuple[int, int]]:
    shapes = dict.fromkeys(shape for shapes in MODELS.values() for shape in shapes)
    return [shape for shape in shapes if shape not in SHAPES]


class Results:
    """The result file: written beside itself and renamed, every few seconds and at the end."""

    def __init__(self, path: Path, *, every_s: float = 3.0) -> None:
        self.path = path
        self.content: dict[str, Any] = {"environment": {}, "overheads": {}, "errors": [], "results": []}
        self._every_s, self._written, self._start = every_s, 0.0, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    @contextmanager
    def recording(self, what: str) -> Iterator[None]:
        """Whatever fails inside becomes an entry of `errors`, and the run goes on.

        Raises:
            RuntimeError: the device is lost: nothing more can be measured in this process.
        """
        try:
            yield
        except Exception as error:
            self.content["errors"].append({"what": what, "error": f"{type(error).__name__}: {error}"[:2000]})
            print(f"{what}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises again after an error that the context does not survive

    def save(self, *, now: bool = False) -> None:
        """Write, if it was not done lately."""
        if now or time.monotonic() - self._written > self._every_s:
            self._written = time.monotonic()
            self.content["seconds"] = round(self.seconds, 1)
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps(self.content, indent=1))
            partial.replace(self.path)


def run_group(
    group: Group,
    bench: ShapeBench,
    results: Results,
    *,
    real: RealMask | None = None,
    budget_s: float = math.inf,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> None:
    """Measure a group into `results`, as far as the budget goes."""
    for sparsity, mask in itertools.product(group.sparsities, group.masks):
        what = f"{group.name} {group.shape} {sparsity} {mask}"
        with results.recording(what):
            bench.load(sparsity, mask, real=real, twin=group.name == "masks")
            for n in group.tokens:
                if results.seconds > budget_s:
                    return
                with results.recording(f"{what} N = {n}"):
                    row = {"set": group.name, **bench.measure(n)}
                    results.content["results"].append(row)
                    report(row)
                    results.save()


def table_line(row: dict[str, Any]) -> str:
    """One case for the terminal; `HEADER` names the columns."""
    return (
        f"{row['m']:>6} x {row['k']:<6} {row['sparsity']:>5} {row['mask']:>9} {row['n']:>5} {row['us']:>9.1f} "
        f"{row['dense_us']:>9.1f} {row['speedup']:>8.2f} {row['byte_limit']:>5.2f} {row['error']:>8.1e}"
    )


HEADER = f"{'M x K':>15} {'zeros':>5} {'mask':>9} {'N':>5} {'us':>9} {'cuBLAS':>9} {'speed-up':>8} limit    error"


def sweep(results: Results, groups: Sequence[Group], *, real: RealMask | None, budget_s: float) -> None:
    """Compile, measure the overheads, then all groups."""
    content, overheads = results.content, results.content["overheads"]
    content["planned"] = sum(group.cases for group in groups)
    with results.recording("bandwidths"):
        content["environment"] |= bandwidths()
    with results.recording("compile"):
        overheads["compile"] = _compile(groups)
    print(f"{results.seconds:.0f} s: {overheads}", file=sys.stderr, flush=True)
    with results.recording("first call"):
        overheads["first_call"] = first_call()
    with results.recording("launches"):
        overheads["launch"] = launches()
    overheads["repack"] = []
    for shape in (SHAPES[0], SHAPES[-1]):
        with results.recording(f"repacking {shape}"):
            overheads["repack"].append(repacking(*shape))
    results.save(now=True)
    print(f"{results.seconds:.0f} s: {json.dumps(overheads)}", file=sys.stderr, flush=True)

    print(HEADER)
    bench: ShapeBench | None
    for group in groups:
        if results.seconds > budget_s:
            break
        with results.recording(str(group.shape)):
            torch.cuda.empty_cache()
            bench = ShapeBench(*group.shape, dtype=group.dtype, fp8=group.fp8, portable=group.name == "portable")
            run_group(group, bench, results, real=real, budget_s=budget_s, report=_print_row)
        bench = None  # its memory, before the next one asks for more


def _print_row(row: dict[str, Any]) -> None:
    print(table_line(row), flush=True)


def _compile(groups: Sequence[Group]) -> dict[str, float]:
    """Every kernel that the groups need, on all processors at once."""
    traits = device_traits(0)
    sources: dict[KernelSource, None] = {}
    for group in groups:
        densities = [1 - sparsity for sparsity in group.sparsities]
        sources |= dict.fromkeys(
            kernel_sources(
                [group.shape], densities, group.tokens, [group.dtype], traits, uneven="extremes" in group.masks
            )
        )
    workers = len(os.sched_getaffinity(0))
    start = time.monotonic()
    compile_all(list(sources), workers)
    return {"kernels": len(sources), "workers": workers, "seconds": time.monotonic() - start}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m spinfer.bench.kernel_sweep", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--real-mask", type=Path, help="zeros of a really pruned model (benchmarks/real_mask.py)")
    parser.add_argument("--quick", action="store_true", help="a few cases of each kind")
    parser.add_argument("--time-budget", type=float, default=math.inf, help="seconds after which to stop")
    parser.add_argument("--commit", help="to record, where there is no git checkout")
    options = parser.parse_args()
    require_cuda()
    results = Results(options.out)
    real = None if options.real_mask is None else RealMask(options.real_mask, "cuda")
    groups = plan(real_sparsities=real.sparsities if real else (), quick=options.quick)
    results.content["environment"] = environment(options.commit) | {"real_mask": real.origin if real else None}
    try:
        sweep(results, groups, real=real, budget_s=options.time_budget)
    finally:
        results.save(now=True)
    content = results.content
    wrong = sum(not is_right(row) for row in content["results"])
    print(
        f"{len(content['results'])} cases in {results.seconds:.0f} s, {wrong} of them wrong, "
        f"{len(content['errors'])} errors"
    )
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
