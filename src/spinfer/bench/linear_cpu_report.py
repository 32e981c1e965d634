"""Table and plot from raw results of linear_cpu: `python -m spinfer.bench.linear_cpu_report DIRECTORY`.

Writes linear.md and speedup.svg beside DIRECTORY/linear.csv. The plot needs matplotlib (`pip install spinfer[bench]`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spinfer.bench.linear_cpu import Row, read_rows

PLOTTED_TOKENS = (1, 4, 16, 64)


def table(rows: Sequence[Row], *, threads: int, sparsities: Sequence[float] = (0.5, 0.6, 0.7)) -> str:
    """Markdown: ours over each baseline, one line for a shape, sparsity and number of tokens; lower is better.

    A star marks rows in which some time has no undisturbed sample.
    """
    lines = [
        "| out x in | type | sparsity | N | us | / bf16 | / fp16 | / fp32 | / prepacked bf16 | share of pure read |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = sorted(rows, key=lambda row: (-row.out_features * row.in_features, row.dtype, row.sparsity, row.tokens))
    for row in order:
        if row.threads == threads and row.sparsity in sparsities:
            ratios = (row.ours / other for other in (row.bf16, row.fp16, row.fp32, row.prepacked_bf16))
            cells = (f"{row.out_features} x {row.in_features}", row.dtype, f"{row.sparsity:.0%}", row.tokens)
            star = "" if row.samples else " \\*"
            numbers = (f"{row.ours:.0f}{star}", *(f"{ratio:.2f}" for ratio in ratios), f"{row.read / row.ours:.2f}")
            lines.append(f"| {' | '.join(map(str, cells + numbers))} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path, *, shape: tuple[int, int] = (4096, 4096), threads: int = 2) -> None:
    """Speed-up over bf16 F.linear against sparsity, one line per N, and the limit of a pure read at N = 1.

    Nothing is written where no row is of that shape.
    """
    from matplotlib.figure import Figure

    wanted = (*shape, "bf16", threads)
    mine = [row for row in rows if (row.out_features, row.in_features, row.dtype, row.threads) == wanted]
    if not mine:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for tokens in PLOTTED_TOKENS:
        line = sorted((row for row in mine if row.tokens == tokens), key=lambda row: row.sparsity)
        axes.plot([100 * r.sparsity for r in line], [r.bf16 / r.ours for r in line], marker="o", label=f"N = {tokens}")
        if tokens == 1:
            limit = [row.bf16 / row.read for row in line]
            axes.plot([100 * r.sparsity for r in line], limit, "k--", label="byte limit (pure read), N = 1")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        xlabel="sparsity (%)",
        ylabel="speed-up over torch bf16 F.linear",
        title=f"{shape[0]} x {shape[1]}, bf16, {threads} threads, cold weights",
        ylim=(0, None),
    )
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    rows = read_rows(directory / "linear.csv")
    (directory / "linear.md").write_text(
        "Medians; ours in microseconds and as a ratio to each baseline of the same N (lower is better). \\*: other "
        "processes disturbed every sample of one of the times, which is then the least of them.\n\n"
        + "\n".join(f"## {n} thread{'s' * (n > 1)}\n\n{table(rows, threads=n)}" for n in (2, 1))
    )
    plot(rows, directory / "speedup.svg")


if __name__ == "__main__":
    main()
