"""How good the selection is: every way of multiplying, measured, beside the one chosen.

`python -m spinfer.bench.kernel_choices --out FILE` measures as `SPINFER_AUTOTUNE=1` does (kernels/cuda/tune.py), over
the projections of common models, apart and merged, with random zeros. What an autotuner can gain is the difference.
With `SPINFER_DENSE_COPIES_GIB` set, dense copies are among the ways.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spinfer.bench.kernel import environment, require_cuda
from spinfer.bench.kernel_masks import prune_
from spinfer.bench.kernel_sweep import MODELS, SHAPES, Results
from spinfer.format import encode
from spinfer.kernels import pack
from spinfer.kernels.cuda.layout import has_dense_copy
from spinfer.kernels.cuda.runtime import device_traits
from spinfer.kernels.cuda.timing import GraphTimer
from spinfer.kernels.cuda.tune import Kind, measure, name_of_choice

APART = (
    (1024, 4096),
    (14336, 4096),
    (2048, 2048),
    (8192, 2048),
    (2048, 8192),
    (3072, 3072),
    (8192, 3072),
    (3072, 8192),
)
"""(M, K) of projections as transformers has them: of Llama-3-8B, those that vLLM merges; of Llama-3.2-1B and 3B."""

_FEW = (8, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 256, 300, 384, 420, 512)
_MANY = (640, 768, 900, 1024, 1100, 1536, 2048, 3000, 4096, 8192)
TOKENS = (*_FEW, *_MANY)
SPARSITIES = (0.6, 0.5, 0.7)

_WORSE = 1.03
"""From here on a choice counts as beaten; see _BETTER of kernels/cuda/tune.py."""

_SHOWN = 12


def shapes() -> list[tuple[int, int]]:
    """(M, K), each once."""
    return list(dict.fromkeys((*APART, *SHAPES, *(shape for shapes in MODELS.values() for shape in shapes))))


def run(results: Results, *, dtype: torch.dtype, budget_s: float) -> None:
    """Measure all shapes at 60 %, then at the other sparsities, as far as the budget goes."""
    timer, traits = GraphTimer(), device_traits(0)
    for sparsity in SPARSITIES:
        for m, k in shapes():
            if results.seconds > budget_s:
                return
            with results.recording(f"{m} x {k} at {sparsity}"):
                torch.cuda.empty_cache()
                weight = torch.empty(m, k, dtype=dtype, device="cuda").normal_()
                packed = pack(encode(prune_(weight, sparsity, "random")))
                del weight
                kind = Kind.of((m, k), packed.nnz, dtype, 0, 0, has_dense_copy(packed.parts))
                for tokens, us in measure(kind, packed.parts, TOKENS, timer).items():
                    row = {"m": m, "k": k, "sparsity": sparsity, "n": tokens, "us": us}
                    results.content["results"].append(row | {"chosen": name_of_choice(kind, tokens, traits)})
                results.save()
                print(f"{results.seconds:.0f} s: {m} x {k} at {sparsity}", file=sys.stderr, flush=True)


def lost(row: Mapping[str, Any]) -> float:
    """What the choice takes over the fastest."""
    return float(row["us"][row["chosen"]] / min(row["us"].values()))


def in_brief(rows: Sequence[Mapping[str, Any]]) -> str:
    """How often the choice is within 3 % of the fastest, and the worst of the others, as Markdown."""
    over = [lost(row) for row in rows]
    beaten = sorted((row for row in rows if lost(row) > _WORSE), key=lost, reverse=True)
    lines = [
        f"In {len(rows) - len(beaten):,} of {len(rows):,} cases the choice is within 3 % of the fastest way; on "
        f"average it takes {statistics.mean(over) - 1:.1%} more. Of the others, the worst:",
        "",
        "| M x K | zeros | tokens | chosen | us | fastest | us | over it |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: | ---: |",
    ]
    for row in beaten[:_SHOWN]:
        us, chosen = row["us"], row["chosen"]
        best = min(us, key=us.__getitem__)
        lines.append(
            f"| {row['m']} x {row['k']} | {row['sparsity']:.0%} | {row['n']:,} "
            f"| {chosen} | {us[chosen]:.1f} | {best} | {us[best]:.1f} | {lost(row):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m spinfer.bench.kernel_choices", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--time-budget", type=float, default=math.inf, help="seconds after which to stop")
    parser.add_argument("--commit", help="to record, where there is no git checkout")
    options = parser.parse_args()
    require_cuda()
    results = Results(options.out)
    results.content["environment"] = environment(options.commit) | {"dtype": "bfloat16"}
    try:
        run(results, dtype=torch.bfloat16, budget_s=options.time_budget)
    finally:
        results.save(now=True)
    print(in_brief(results.content["results"]))


if __name__ == "__main__":
    main()
