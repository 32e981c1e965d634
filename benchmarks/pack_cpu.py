"""How fast a weight is validated, packed for the CPU kernel and unpacked: `python benchmarks/pack_cpu.py OUT.json`.

Bytes are those of the weight on disk. The least of the repeats, because other processes can only slow one down.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from spinfer.format import encode
from spinfer.kernels import CPU

SHAPE = (4096, 4096)


def least_seconds(call: Callable[[], object], repeats: int) -> float:
    """Time of the fastest call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for sparsity in (0.5, 0.7):
            weight = encode(torch.where(torch.rand(SHAPE) < sparsity, 0, torch.randn(SHAPE)).to(dtype))
            packed = CPU.pack(weight)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                steps = {
                    "validate": weight.validate,
                    "pack": lambda weight=weight: CPU.pack(weight),
                    "unpack": lambda packed=packed: CPU.unpack(packed),
                }
                rates = {
                    f"{name}_gb_per_s": round(weight.nbytes / least_seconds(call, args.repeats) / 1e9, 2)
                    for name, call in steps.items()
                }
                rows.append({"dtype": str(dtype)[6:], "sparsity": sparsity, "threads": threads, **rates})
                print(rows[-1])
    result = {
        "shape": SHAPE,
        "torch": torch.__version__,
        "load_average_1_minute": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
