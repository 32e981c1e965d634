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
