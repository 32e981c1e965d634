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
CPUS = {CPU: "2 cores of an Emerald Rapids Xeon", RESULTS / "cpu" / "epyc-zen4-2-cores": "2 cores of a Zen 4 EPYC"}
"""Machines, each shown where its results hold all that the table needs."""


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
    """Speed-up of the CPU kernel over torch's bf16 F.linear and over its best dense path, on each machine."""
    tokens, sparsities = [1, 4, 8, 16, 64, 512], (0.5, 0.6, 0.7)
    parts = []
    for directory, machine in CPUS.items():
        file = directory / "linear.csv"
        rows: dict[tuple[float, int], dict[str, str]] = {}
        if file.exists():
            with file.open() as stream:
                for row in csv.DictReader(stream):
                    shape = (row["out_features"], row["in_features"], row["dtype"], row["threads"])
                    if shape == ("4096", "4096", "bf16", "2"):
                        rows[float(row["sparsity"]), int(row["tokens"])] = row
        if not all((sparsity, n) in rows for sparsity in sparsities for n in tokens):
            continue
        lines = [
            f"| 4096 x 4096, {machine} | {' | '.join(f'N = {n}' for n in tokens)} |",
            f"| --- | {' | '.join('---:' for _ in tokens)} |",
        ]
        for sparsity in sparsities:
            cells = []
            for n in tokens:
                row = rows[sparsity, n]
                dense = [float(row[name]) for name in ("bf16", "fp16", "fp32", "prepacked_bf16")]
                best = min(time for time in dense if time == time)  # a baseline that was not run is NaN
                star = "" if int(row["samples"]) else r" \*"
                cells.append(f"{dense[0] / float(row['ours']):.1f}x / {best / float(row['ours']):.1f}x{star}")
            lines.append(f"| {sparsity:.0%} | {' | '.join(cells)} |")
        plot = (directory / "speedup.svg").relative_to(ROOT).as_posix()
        if any("*" in line for line in lines):
            lines += ["", r"\*: other processes disturbed every sample of one of the times."]
        lines += ["", f"![Speed-up over torch's bf16 F.linear against sparsity, 4096 x 4096, {machine}]({plot})"]
        parts.append(linked("\n".join(lines), file))
    return "\n\n".join(parts)


def decode() -> str:
    """Tokens a second, weights and resident memory of a whole model on each machine."""
    parts = []
    for directory, machine in CPUS.items():
        file = directory / "decode_llama1b.json"
        if not file.exists():
            continue
        recorded = json.loads(file.read_text())
        columns = {"decode_tokens_per_s": "decode tokens/s", "prefill_tokens_per_s": "prefill tokens/s"}
        columns |= {"weights_mb": "MB of weights", "resident_mb": "MB resident"}
        known = [name for name in columns if all(name in run for run in recorded["runs"].values())]
        lines = [
            f"| {recorded['model']}, {machine} | {' | '.join(columns[name] for name in known)} |",
            f"| --- | {' | '.join('---:' for _ in known)} |",
        ]
        for label, run in recorded["runs"].items():
            lines.append(f"| {label} | {' | '.join(f'{run[name]:,.1f}' for name in known)} |")
        parts.append(linked("\n".join(lines), file))
    return "\n\n".join(parts)


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
