"""Tables and plots of a sweep: `python -m spinfer.bench.kernel_report FILE` writes them beside FILE.

The plots need matplotlib (`pip install spinfer[bench]`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spinfer.bench.kernel_targets import is_right, missed

Row = dict[str, Any]

PLOTS = {
    "speedup_sparsity.svg": "Speed-up over cuBLAS fp16 against sparsity, 16 tokens",
    "speedup_tokens.svg": "Speed-up over cuBLAS fp16 against the number of tokens, 60 % sparsity",
    "share_size.svg": "Share of the byte limit against the size of the matrix, 60 % sparsity",
}
"""What is written beside the results."""

_PLOTTED_SHARES = (1, 16, 64)


class Sweep:
    """The results of one run of `kernel_sweep`.

    Attributes:
        path: of the JSON file.
        environment: see `kernel.environment`.
        overheads: see `kernel_overheads`.
        rows: see `kernel.ShapeBench.measure`; those whose results are right.
        wrong: the others.
    """

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        recorded = json.loads(content)
        self.path = path
        self.digest = hashlib.sha256(content).hexdigest()
        self.environment: dict[str, Any] = recorded["environment"]
        self.overheads: dict[str, Any] = recorded.get("overheads", {})
        self.rows: list[Row] = [row for row in recorded["results"] if is_right(row)]
        self.wrong: list[Row] = [row for row in recorded["results"] if not is_right(row)]

    @property
    def device(self) -> str:
        """Name of the GPU."""
        return str(self.environment["device"])

    def of(self, *sets: str, **wanted: Any) -> list[Row]:
        """Rows of some sets ("grid", "models", "masks", "bfloat16", "portable") with these values."""
        return [
            row
            for row in self.rows
            if row.get("set", "grid") in sets and all(row[name] == value for name, value in wanted.items())
        ]

    def share(self, row: Row) -> float | None:
        """Share of the byte limit: the time of a pure read of 2 nnz + M K / 8 bytes over ours."""
        bandwidth = self.environment.get("read_bandwidth")
        return None if bandwidth is None else row["ideal_nbytes"] / bandwidth * 1e6 / row["us"]

    def plots(self) -> list[str]:
        """Names of the plots that these results have the figures for."""
        return [name for name in PLOTS if name != "share_size.svg" or "read_bandwidth" in self.environment]


def shapes_of(rows: Iterable[Row]) -> list[tuple[int, int]]:
    """(M, K), each once, in the order of the rows."""
    return list(dict.fromkeys((row["m"], row["k"]) for row in rows))


def _shape(row: Row) -> str:
    return f"{row['m']} x {row['k']}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table, numbers to the right of the first column."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def speedups_over_tokens(rows: Sequence[Row], tokens: Sequence[int], first: str) -> str:
    """A line for each shape, a column for each number of tokens; `first` heads the shapes."""
    tokens = [n for n in tokens if any(row["n"] == n for row in rows)]
    lines = []
    for shape in shapes_of(rows):
        mine = {row["n"]: row for row in rows if (row["m"], row["k"]) == shape}
        limit = next(iter(mine.values()))["byte_limit"]
        cells = [f"{mine[n]['speedup']:.2f}x" if n in mine else "" for n in tokens]
        lines.append([f"{shape[0]} x {shape[1]}", f"{limit:.2f}x", *cells])
    return markdown([first, "byte limit", *(f"N = {n}" for n in tokens)], lines)


def _environment(sweep: Sweep) -> str:
    facts = []
    for name, value in sweep.environment.items():
        if name.endswith("_bandwidth"):
            facts.append(f"{name.removesuffix('_bandwidth')} {value / 1e12:.2f} TB/s")
        elif value is not None and name != "device":
            facts.append(f"{name} {value}")
    return ", ".join(facts) + "."


def _details(sweep: Sweep, n: int) -> str:
    """Microseconds, speed-up and share of the byte limit for each sparsity."""
    rows = sweep.of("grid", n=n)
    sparsities = sorted({row["sparsity"] for row in rows})
    lines = []
    for shape in shapes_of(rows):
        mine = {row["sparsity"]: row for row in rows if (row["m"], row["k"]) == shape}
        dense = mine.get(0.6, next(iter(mine.values())))["dense_us"]
        cells = [_cell(sweep, mine[s]) if s in mine else "" for s in sparsities]
        lines.append([f"{shape[0]} x {shape[1]} ({dense:.1f})", *cells])
    return markdown(["M x K (cuBLAS us)", *(f"{s:.0%}" for s in sparsities)], lines)


def _cell(sweep: Sweep, row: Row) -> str:
    share = sweep.share(row)
    return f"{row['us']:.1f}; {row['speedup']:.2f}" + ("" if share is None else f"; {share:.2f}")


def _fp8(sweep: Sweep) -> str:
    """Ours at 60 % against cuBLAS FP8."""
    rows = [row | {"speedup": row["fp8_us"] / row["us"]} for row in sweep.of("grid", sparsity=0.6) if row.get("fp8_us")]
    return speedups_over_tokens(rows, sorted({row["n"] for row in rows}), "cuBLAS FP8 us / ours")


def _portable(sweep: Sweep) -> str:
    """The kernel for other GPUs, on this one."""
    lines = [
        [
            _shape(row),
            str(row["n"]),
            f"{row['portable_us']:.1f}",
            f"{row['dense_us'] / row['portable_us']:.2f}x",
            f"{row['us'] / row['portable_us']:.2f}x",
        ]
        for row in sweep.of("portable")
    ]
    return markdown(["M x K", "N", "us", "over cuBLAS", "over the kernel chosen here"], lines)


def _masks(sweep: Sweep) -> str:
    lines = [
        [
            _shape(row),
            row["mask"],
            f"{1 - row['density']:.1%}",
            str(row["n"]),
            f"{row['us']:.1f}",
            f"{row['us'] / row['random_us']:.3f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in sweep.of("masks")
    ]
    return markdown(["M x K", "mask", "zeros", "N", "us", "of random", "of cuBLAS"], lines)


def _overheads(sweep: Sweep) -> str:
    """What was measured beside the kernels, one figure a line."""
    lines = []
    for section in ("compile", "first_call", "launch"):
        lines += [[f"{section}: {name}", f"{value:.4g}"] for name, value in sweep.overheads.get(section, {}).items()]
    for found in sweep.overheads.get("repack", []):
        shape = f"{found['m']} x {found['k']}, {found['sparsity']:.0%}"
        lines += [[f"{shape}: {name}", f"{v:.4g}"] for name, v in found.items() if name.endswith(("_ms", "_gbps"))]
    return markdown(["", "measured"], lines)


def _missed(sweep: Sweep) -> str:
    wanted, short = missed(sweep.device, sweep.of("grid", "models", "masks", "bfloat16"))
    lines = [
        [
            _shape(row),
            row["mask"],
            row["dtype"],
            f"{row['sparsity']:.0%}",
            str(row["n"]),
            f"{aim:.2f}x",
            f"{row['speedup']:.2f}x",
        ]
        for aim, row in short
    ]
    text = f"{wanted - len(short)} of {wanted} cases with a target reach it."
    header = ["missed: M x K", "mask", "type", "sparsity", "N", "target", "measured"]
    return f"{text}\n\n{markdown(header, lines)}" if lines else text


def report(sweep: Sweep) -> str:
    """All tables, as Markdown."""
    errors = [row["error"] for row in sweep.rows]
    parts = [
        f"# {sweep.device}",
        _environment(sweep),
        f"{len(sweep.rows)} cases; largest relative error against float64: {max(errors):.2e}. "
        "Microseconds; speed-up over cuBLAS fp16; share of the byte limit, a pure read of 2 nnz + M K / 8 bytes.",
    ]
    for row in sweep.wrong:
        parts.append(
            f"**Wrong, and left out of all tables:** {_shape(row)}, {row['dtype']}, "
            f"{row['sparsity']:.0%} zeros ({row['mask']}), N = {row['n']}: relative error {row['error']:.1e}."
        )
    for n in (1, 16):
        if sweep.of("grid", n=n):
            parts += [f"## N = {n}", _details(sweep, n)]
    rows = sweep.of("grid", sparsity=0.6)
    tokens = sorted({row["n"] for row in rows})
    parts += ["## Speed-up over the number of tokens, 60 %", speedups_over_tokens(rows, tokens, "M x K")]
    for title, name in (("Models, 60 %", "models"), ("bfloat16, 60 %", "bfloat16")):
        rows = sweep.of(name)
        if rows:
            parts += [f"## {title}", speedups_over_tokens(rows, sorted({row["n"] for row in rows}), "M x K")]
    if any(row.get("fp8_us") for row in sweep.rows):
        parts += ["## Against cuBLAS FP8, dense, 60 %", _fp8(sweep)]
    if sweep.of("portable"):
        parts += ["## The portable kernel on this GPU, 60 %", _portable(sweep)]
    if sweep.of("masks") and all("random_us" in row for row in sweep.of("masks")):
        parts += ["## Masks, against random zeros of the same density", _masks(sweep)]
    if sweep.overheads:
        parts += ["## Beside the kernels", _overheads(sweep)]
    parts += ["## Targets", _missed(sweep)]
    return "\n\n".join(parts) + "\n"


def plot(sweep: Sweep, name: str) -> None:
    """Write one of `PLOTS`; the file names the results that it shows."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "spinfer"}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        {
            "speedup_sparsity.svg": _plot_sparsity,
            "speedup_tokens.svg": _plot_tokens,
            "share_size.svg": _plot_share,
        }[name](sweep, axes)
        axes.set(ylim=(0, None), title=f"{sweep.device}, {sweep.rows[0]['dtype']}, cold L2")
        axes.grid(linewidth=0.3)
        axes.legend(fontsize="small")
        path = sweep.path.with_name(name)
        figure.savefig(path, metadata={"Date": None, "Description": f"{sweep.path.name} {sweep.digest}"})


def _lines(axes: Any, rows: Sequence[Row], x: str) -> None:
    for shape in shapes_of(rows):
        line = sorted((row for row in rows if (row["m"], row["k"]) == shape), key=lambda row: float(row[x]))
        scale = 100 if x == "sparsity" else 1
        label = f"{shape[0]} x {shape[1]}"
        axes.plot([scale * row[x] for row in line], [row["speedup"] for row in line], marker=".", label=label)
    axes.axhline(1, color="grey", linewidth=0.8)


def _plot_sparsity(sweep: Sweep, axes: Any) -> None:
    rows = sweep.of("grid", n=16, mask="random")
    _lines(axes, rows, "sparsity")
    limits = dict(sorted((row["sparsity"], row["byte_limit"]) for row in rows))
    axes.plot([100 * s for s in limits], list(limits.values()), "k--", label="byte limit (dense bytes / ours)")
    axes.set(xlabel="sparsity (%)", ylabel="speed-up over cuBLAS fp16, N = 16")


def _plot_tokens(sweep: Sweep, axes: Any) -> None:
    rows = sweep.of("grid", sparsity=0.6, mask="random")
    _lines(axes, rows, "n")
    axes.axhline(rows[0]["byte_limit"], color="k", linestyle="--", label="byte limit (dense bytes / ours)")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["n"] for row in rows if row["n"].bit_count() == 1})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set(xlabel="tokens N", ylabel="speed-up over cuBLAS fp16, 60 % sparsity")


def _plot_share(sweep: Sweep, axes: Any) -> None:
    for n, marker in zip(_PLOTTED_SHARES, "os^", strict=True):
        rows = sweep.of("grid", "models", sparsity=0.6, n=n, mask="random")
        sizes = [row["m"] * row["k"] / 1e6 for row in rows]
        axes.scatter(sizes, [sweep.share(row) for row in rows], marker=marker, s=20, label=f"N = {n}")
    axes.axhline(1, color="k", linestyle="--", label="byte limit")
    axes.set_xscale("log", base=2)
    ticks = (16, 32, 64, 128, 256, 512)
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set(xlabel="weights of the matrix (millions)", ylabel="share of the byte limit, 60 % sparsity")


def write(sweep: Sweep) -> None:
    """The tables, and the plots that there are figures for, beside the results."""
    sweep.path.with_suffix(".md").write_text(report(sweep))
    for name in sweep.plots():
        plot(sweep, name)


def main() -> None:
    """Write tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    write(Sweep(parser.parse_args().file))


if __name__ == "__main__":
    main()
