"""Time the CPU kernel against torch's dense linear layers: `python -m spinfer.bench.linear_cpu DIRECTORY`.

How it measures: all variants of one shape (dense baselines, ours at each sparsity, and a pure read of the same bytes as
ours) take turns in one process. Each has so many copies of its weight that all other variants' copies, `COLD_NBYTES`
or more, pass through the caches before a copy comes again. A sample is dropped when the system preempted one of the
process's threads during it (rusage counts that), and medians are taken of the rest. Rows go to DIRECTORY/linear.csv as
they are measured; a run that finds rows there measures only what is missing, or has fewer undisturbed samples than
--enough, and keeps the better of the two.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from spinfer.bench.processor import cpu_facts
from spinfer.errors import SpinferError
from spinfer.format import encode
from spinfer.kernels import CPU
from spinfer.kernels.cpu.library import CpuLibrary, load
from spinfer.kernels.packed import PackedWeight

SHAPES = {
    "SmolLM2-135M": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
    "Llama-3.2-1B": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "Llama-3-8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Llama-2-7B": ((11008, 4096),),
}
"""(out_features, in_features) of the linear layers of a model, each once."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

COLD_NBYTES = 1 << 30
"""Bytes that pass between two uses of a copy. Reading slows down until about 256 MB on a CPU with 260 MB of L3."""

Call = Callable[[int], object]


@dataclass(frozen=True)
class Row:
    """One line of linear.csv; times are medians in microseconds.

    `ours` is the kernel with `dtype` values and activations, `read` a pure read of its bytes, the others torch's dense
    layers: F.linear in three types, and oneDNN with a prepacked bf16 weight (NaN where it does not exist). `samples` is
    the smallest number of undisturbed samples behind any of them; without one, a time is the least of all.
    """

    model: str
    out_features: int
    in_features: int
    dtype: str
    sparsity: float
    tokens: int
    threads: int
    tier: str
    nbytes: int
    samples: int
    ours: float
    read: float
    bf16: float
    fp16: float
    fp32: float
    prepacked_bf16: float

    @property
    def key(self) -> tuple[object, ...]:
        """What identifies a measurement."""
        return astuple(self)[:8]


def read_rows(path: Path) -> list[Row]:
    """The rows of a linear.csv, of one measured twice the one with more samples; none if there is no such file."""
    if not path.exists():
        return []
    kinds = {"str": str, "int": int, "float": float}
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)}) for line in lines]
    return list({row.key: row for row in sorted(rows, key=lambda row: row.samples)}.values())


def write_rows(path: Path, rows: Iterable[Row], mode: Literal["a", "w"]) -> None:
    """Write or append rows."""
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


class Bench:
    """Times calls in turn.

    Args:
        seconds: least time to spend on one set of calls.
        samples: undisturbed samples of each call to gather, if four times `seconds` allow.
    """

    def __init__(self, seconds: float, samples: int) -> None:
        self._seconds, self._samples = seconds, samples
        self._warm = torch.zeros(1 << 17)

    def _preemptions(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

    def measure(self, calls: dict[str, Call]) -> tuple[dict[str, float], int]:
        """Time calls, which get a running number that picks their copy.

        Returns:
            Each call's median in microseconds (the least of the samples where all were disturbed), and the smallest
            number of undisturbed samples behind one.
        """
        kept: dict[str, list[float]] = {name: [] for name in calls}
        disturbed: dict[str, list[float]] = {name: [] for name in calls}
        start = time.perf_counter()
        for turn in itertools.count():
            for name, call in calls.items():
                self._warm.add_(1)  # the pool is awake, as it is between the layers of a model
                before = self._preemptions()
                begin = time.perf_counter()
                call(turn)
                took = (time.perf_counter() - begin) * 1e6
                (kept if self._preemptions() == before else disturbed)[name].append(took)
            spent = time.perf_counter() - start
            fewest = min(map(len, kept.values()))
            patience = self._seconds if fewest >= self._samples else 4 * self._seconds
            if turn >= 2 and spent >= patience:
                break
        medians = {name: statistics.median(times) if times else min(disturbed[name]) for name, times in kept.items()}
        return medians, fewest


class Weights:
    """Copies of one layer's weight for each variant: more than the caches hold of all variants together."""

    def __init__(self, shape: tuple[int, int], dtype: str, sparsities: Sequence[float]) -> None:
        self.shape, self.dtype = shape, DTYPES[dtype]
        density = sum(1 / 8 + self.dtype.itemsize * (1 - sparsity) for sparsity in sparsities)
        turn_nbytes = shape[0] * shape[1] * (10 + 2 * density)  # four dense copies; sparse ones, each used and read
        copies = max(2, math.ceil(COLD_NBYTES / turn_nbytes))
        dense = torch.randn(shape)
        self.dense = {name: [dense.to(kind, copy=True) for _ in range(copies)] for name, kind in DTYPES.items()}
        self.prepacked: list[Tensor] = []
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.prepacked = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in self.dense["bf16"]]
        self.sparse: dict[float, list[PackedWeight]] = {}
        rank = torch.rand(shape)
        for sparsity in sparsities:
            stored = encode(torch.where(rank < sparsity, 0, dense).to(self.dtype))
            self.sparse[sparsity] = [CPU.pack(stored) for _ in range(copies)]
        self.copies = copies

    def calls(self, library: CpuLibrary, tokens: int) -> dict[str, Call]:
        """Every variant's call for x of that many rows."""
        x = torch.randn(tokens, self.shape[1])
        calls: dict[str, Call] = {}
        for name, dense in self.dense.items():
            calls[name] = functools.partial(self._dense, x.to(DTYPES[name]), dense)
        if self.prepacked:
            calls["prepacked_bf16"] = functools.partial(self._prepacked, x.bfloat16())
        for sparsity, packed in self.sparse.items():
            calls[f"ours {sparsity}"] = functools.partial(self._ours, x.to(self.dtype), packed)
            calls[f"read {sparsity}"] = functools.partial(self._read, library, packed)
        return calls

    def _dense(self, x: Tensor, weights: list[Tensor], turn: int) -> None:
        torch.nn.functional.linear(x, weights[turn % self.copies])

    def _prepacked(self, x: Tensor, turn: int) -> None:
        torch.ops.mkldnn._linear_pointwise(x, self.prepacked[turn % self.copies], None, "none", [], "")

    def _ours(self, x: Tensor, packed: list[PackedWeight], turn: int) -> None:
        CPU.linear(x, packed[turn % self.copies], None)

    def _read(self, library: CpuLibrary, packed: list[PackedWeight], turn: int) -> None:
        for part in packed[(turn + self.copies // 2) % self.copies].parts[:2]:  # values and masks
            library.native.spinfer_cpu_read(part.data_ptr(), part.nbytes, torch.get_num_threads())


def measure(library: CpuLibrary, bench: Bench, done: Sequence[Row], args: argparse.Namespace) -> Iterator[Row]:
    """Measure what `done` lacks, row by row."""
    known = {row.key for row in done}
    for model, shape in [(name, shape) for name in args.models for shape in SHAPES[name]]:
        weights: Weights | None = None
        for tokens, threads in itertools.product(args.tokens, args.threads):
            key = (model, *shape, args.dtype)
            if all((*key, s, tokens, threads, library.tier) in known for s in args.sparsities):
                continue
            weights = weights or Weights(shape, args.dtype, args.sparsities)
            torch.set_num_threads(threads)
            took, fewest = bench.measure(weights.calls(library, tokens))
            for s in args.sparsities:
                nbytes = sum(part.nbytes for part in weights.sparse[s][0].parts[:2])
                dense = [round(took.get(name, math.nan), 1) for name in (*DTYPES, "prepacked_bf16")]
                ours = [round(took[f"{name} {s}"], 1) for name in ("ours", "read")]
                yield Row(*key, s, tokens, threads, library.tier, nbytes, fewest, *ours, *dense)


def machine(library: CpuLibrary) -> dict[str, object]:
    """What the numbers depend on besides the code."""
    cpu = cpu_facts()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": {name: cpu.get(name) for name in ("model name", "cpu family", "model", "cache size", "flags")},
        "cores": os.cpu_count(),
        "tiers": library.tiers,
        "tier": library.tier,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_1_minute": os.getloadavg()[0],
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="type of our values and activations")
    parser.add_argument("--seconds", type=float, default=1.5, help="least time for one shape and number of tokens")
    parser.add_argument("--samples", type=int, default=15, help="undisturbed samples of each variant")
    parser.add_argument("--enough", type=int, default=0, help="undisturbed samples below which rows are measured again")
    args = parser.parse_args()
    library = load()
    if library is None:
        raise SpinferError("there is no native CPU kernel to measure; install a C++ compiler and reinstall spinfer")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    args.directory.mkdir(parents=True, exist_ok=True)
    (args.directory / "machine.json").write_text(json.dumps(machine(library), indent=1) + "\n")
    path = args.directory / "linear.csv"
    done = [row for row in read_rows(path) if row.samples >= args.enough]
    for row in measure(library, Bench(args.seconds, args.samples), done, args):
        write_rows(path, [row], "a")
        print(*astuple(row), f"{row.ours / row.bf16:.2f} of bf16, {row.read / row.ours:.2f} of reading", flush=True)
    write_rows(path, sorted(read_rows(path), key=lambda row: row.key), "w")


if __name__ == "__main__":
    main()
