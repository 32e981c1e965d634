"""Fill the README's marked blocks from the committed results, so that no figure there is typed by hand.

A block stands between `<!-- NAME -->` and `<!-- /NAME -->`. Tables and plots of the GPU results are written beside
them. `--check` fails when any of it is not what the results say.
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

from spinfer.bench.kernel_report import PLOTS, Sweep, report, speedups_over_tokens, write  # noqa: E402

CPU = RESULTS / "cpu" / "xeon-emerald-rapids-2-cores"
GPU_RESULTS = [file for name in ("h100", "h200") if (file := RESULTS / name / "kernel.json").exists()]
TOKENS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
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


def gpu() -> str:
    """Speed-up of the CUDA kernels over cuBLAS at 60 % sparsity, for each GPU that has results; and the plots."""
    return "\n\n".join(_of_gpu(Sweep(file)) for file in GPU_RESULTS)


def _of_gpu(sweep: Sweep) -> str:
    table = speedups_over_tokens(sweep.of("grid", sparsity=0.6), TOKENS, f"{sweep.device}, 60 % sparsity")
    folder = sweep.path.parent.relative_to(ROOT).as_posix()
    plots = "\n".join(f"![{PLOTS[name]}, {sweep.device}]({folder}/{name})" for name in sweep.plots())
    return linked(f"{table}\n\n{plots}", sweep.path)


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


BLOCKS = {"demo": demo, "cpu": cpu, "decode": decode, "gpu": gpu}


def filled(readme: str) -> str:
    """The README with every block made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in readme or end not in readme:
            raise SystemExit(f"README.md has no block {name!r}")
        before, _, rest = readme.partition(begin)
        readme = before + begin + make() + "\n" + end + rest.partition(end)[2]
    return readme


def stale() -> list[Path]:
    """Tables and plots beside the GPU results that are not of these results."""
    found = []
    for sweep in map(Sweep, GPU_RESULTS):
        tables = sweep.path.with_suffix(".md")
        if not tables.exists() or tables.read_text(encoding="utf-8") != report(sweep):
            found.append(tables)
        for plot in map(sweep.path.with_name, sweep.plots()):
            if not plot.exists() or sweep.digest not in plot.read_text(encoding="utf-8"):
                found.append(plot)
    return found


def main() -> None:
    """Write, or check."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        wrong = [path.relative_to(ROOT) for path in [path] * (before != after) + stale()]
        if wrong:
            raise SystemExit(f"not what benchmarks/results say: {', '.join(map(str, wrong))}; run `make readme`")
    else:
        path.write_text(after, encoding="utf-8")
        for sweep in map(Sweep, GPU_RESULTS):
            write(sweep)


if __name__ == "__main__":
    main()
