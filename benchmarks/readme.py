"""Fill the README's marked blocks from the committed results, so that no figure there is typed by hand.

A block stands between `<!-- NAME -->` and `<!-- /NAME -->`. `--check` fails when a block is not what the results say.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "demo"))

from table import table  # noqa: E402  (the demo's own)

CPU = RESULTS / "cpu" / "xeon-emerald-rapids-2-cores"


def linked(text: str, file: Path) -> str:
    """The text and where its figures come from."""
    name = file.relative_to(ROOT).as_posix()
    return f"{text}\n\nFrom [{name}]({name})."


def demo() -> str:
    """The demo's table."""
    file = CPU / "demo.json"
    result = json.loads(file.read_text())
    return linked(f"{table(result)}\n\n{result['processor']}, torch {result['versions']['torch']}.", file)


def h100() -> str:
    """Speed-up of the CUDA kernels over cuBLAS at 60 % sparsity."""
    file = RESULTS / "h100" / "kernel.json"
    recorded = json.loads(file.read_text())
    rows = [row for row in recorded["results"] if row["sparsity"] == 0.6]
    tokens = sorted({row["n"] for row in rows})
    lines = [
        f"| out x in, 60 % sparsity | byte limit | {' | '.join(f'N = {n}' for n in tokens)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in tokens)} |",
    ]
    for shape in dict.fromkeys((row["m"], row["k"]) for row in rows):
        speedups = {row["n"]: row["speedup"] for row in rows if (row["m"], row["k"]) == shape}
        limit = next(row["byte_limit"] for row in rows if (row["m"], row["k"]) == shape)
        cells = " | ".join(f"{speedups[n]:.2f}x" for n in tokens)
        lines.append(f"| {shape[0]} x {shape[1]} | {limit:.2f}x | {cells} |")
    return linked("\n".join(lines), file)


def cpu() -> str:
    """Speed-up of the CPU kernel over torch's bf16 F.linear and over its best dense path."""
    file = CPU / "linear.csv"
    with file.open() as stream:
        rows = [
            row
            for row in csv.DictReader(stream)
            if (row["out_features"], row["in_features"], row["dtype"], row["threads"]) == ("4096", "4096", "bf16", "2")
        ]
    tokens = [1, 4, 8, 16, 64, 512]
    lines = [
        f"| 4096 x 4096, 2 threads | {' | '.join(f'N = {n}' for n in tokens)} |",
        f"| --- | {' | '.join('---:' for _ in tokens)} |",
    ]
    for sparsity in (0.5, 0.6, 0.7):
        mine = {int(row["tokens"]): row for row in rows if float(row["sparsity"]) == sparsity}
        cells = []
        for n in tokens:
            dense = [float(mine[n][name]) for name in ("bf16", "fp16", "fp32", "prepacked_bf16")]
            best = min(time for time in dense if time == time)  # a baseline that was not run is NaN
            ours = float(mine[n]["ours"])
            cells.append(f"{dense[0] / ours:.1f}x / {best / ours:.1f}x")
        lines.append(f"| {sparsity:.0%} | {' | '.join(cells)} |")
    plot = (CPU / "speedup.svg").relative_to(ROOT).as_posix()
    lines += ["", f"![Speed-up over torch's bf16 F.linear against sparsity, 4096 x 4096, 2 threads]({plot})"]
    return linked("\n".join(lines), file)


def decode() -> str:
    """Tokens a second of a whole model on the CPU."""
    file = CPU / "decode_llama1b.json"
    recorded = json.loads(file.read_text())
    lines = [
        f"| {recorded['model']} | decode tokens/s | prefill tokens/s | MB of weights |",
        "| --- | ---: | ---: | ---: |",
    ]
    for label, run in recorded["runs"].items():
        cells = (run["decode_tokens_per_s"], run["prefill_tokens_per_s"], run["weights_mb"])
        lines.append(f"| {label} | {' | '.join(f'{cell:,.1f}' for cell in cells)} |")
    return linked("\n".join(lines), file)


BLOCKS = {"demo": demo, "cpu": cpu, "decode": decode, "h100": h100}


def filled(readme: str) -> str:
    """The README with every block made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in readme or end not in readme:
            raise SystemExit(f"README.md has no block {name!r}")
        before, _, rest = readme.partition(begin)
        readme = before + begin + make() + "\n" + end + rest.partition(end)[2]
    return readme


def main() -> None:
    """Write, or check."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            raise SystemExit("README.md is not what benchmarks/results say; run `make readme`")
    else:
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
