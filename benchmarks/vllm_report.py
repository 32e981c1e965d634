"""Tables and a plot of what `vllm_gpu.py` measured: `python benchmarks/vllm_report.py RESULT.json [PLOT.svg]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MODES = {"bf16": "dense bf16", "fp8": "dense FP8", "sparse": "sparse bf16"}


def engines(result: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The runs that succeeded, by model and mode."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for run in result["runs"]:
        if run.get("rows"):
            found.setdefault(run["model"], {})[run["mode"]] = run
    return found


def _rows(modes: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[tuple[int, int], dict[str, dict[str, Any]]]]:
    """(input, batch) with each mode's measurement."""
    keys = dict.fromkeys((row["input"], row["batch"]) for run in modes.values() for row in run["rows"])
    for key in keys:
        yield (
            key,
            {mode: row for mode, run in modes.items() for row in run["rows"] if (row["input"], row["batch"]) == key},
        )


def speed(result: Mapping[str, Any]) -> str:
    """Decode speed and time to the first token, Markdown."""
    lines = [
        "| model | input | batch | dense bf16 | dense FP8 | sparse | over bf16 | first token, over bf16 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, modes in engines(result).items():
        for (length, batch), row in _rows(modes):
            cells = [f"{row[m]['decode_tokens_per_s']:,.0f}" if m in row else "" for m in MODES]
            ratios = ["", ""]
            if "bf16" in row and "sparse" in row:
                ratios = [
                    f"{row['bf16']['decode_ms'] / row['sparse']['decode_ms']:.2f}x",
                    f"{row['sparse']['ttft_ms'] / row['bf16']['ttft_ms']:.2f}",
                ]
            lines.append(f"| {model} | {length} | {batch} | {' | '.join((*cells, *ratios))} |")
    return "\n".join(lines)


def memory(result: Mapping[str, Any]) -> str:
    """Weights and room for the KV cache, measured and as `spinfer plan` says, Markdown."""
    lines = [
        "| model | weights | GiB a GPU | planned | tokens of KV cache | planned |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for model, modes in engines(result).items():
        for mode, run in modes.items():
            plan = run.get("planned") or {}
            cells = (
                f"{max(run['weights_gib']):.2f}",
                f"{plan['weights_gib']:.2f}" if plan else "",
                f"{run['kv_cache_tokens']:,}",
                f"{plan['kv_cache_tokens']:,}" if plan else "",
            )
            lines.append(f"| {model} | {MODES[mode]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scaling(results: Sequence[Mapping[str, Any]]) -> str:
    """One sparse model on more and more GPUs, Markdown; each result has one run, of the same batches."""
    lines = [
        "| GPUs | batch | tokens/s | over the first | first token, ms | GiB of weights a GPU | tokens of KV cache |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = results[0]["runs"][0]["rows"]
    for result in results:
        run = result["runs"][0]
        for base, row in zip(first, run["rows"], strict=True):
            cells = (
                f"{row['decode_tokens_per_s']:,.1f}",
                f"{base['decode_ms'] / row['decode_ms']:.2f}x",
                f"{row['ttft_ms']:,.0f}",
                f"{max(run['weights_gib']):.2f}",
                f"{run['kv_cache_tokens']:,}",
            )
            lines.append(f"| {result['tensor_parallel']} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def breakdown(result: Mapping[str, Any]) -> str:
    """Microseconds of one decode step by kind of kernel, Markdown; empty where nothing was profiled."""
    profiles = [
        (model, mode, profile)
        for model, modes in engines(result).items()
        for mode, run in modes.items()
        for profile in run["profiles"]
        if any(profile["step_us"].values())  # earlier, workers were not seen
    ]
    if not profiles:
        return ""
    kinds = list(profiles[0][2]["step_us"])
    lines = [
        f"| model | weights | GPUs | batch | {' | '.join(kinds)} | gaps |",
        f"| --- | --- {'| ---: ' * (len(kinds) + 3)}|",
    ]
    for model, mode, profile in profiles:
        cells = [f"{result['tensor_parallel']}", f"{profile['batch']}"]
        cells += [f"{us:,.0f}" for us in (*profile["step_us"].values(), profile["gaps_us"])]
        lines.append(f"| {model} | {MODES.get(mode, MODES['sparse'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Decode tokens a second over dense bf16, a panel for each model."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "spinfer"
    from matplotlib import pyplot

    found = {model: modes for model, modes in engines(result).items() if "bf16" in modes}
    figure, axes = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 3.2), sharey=True, squeeze=False)
    for axis, (model, modes) in zip(axes[0], found.items(), strict=True):
        length = modes["bf16"]["rows"][0]["input"]
        rows = {key[1]: row for key, row in _rows(modes) if key[0] == length and "bf16" in row}
        for mode in modes:
            points = [(b, row["bf16"]["decode_ms"] / row[mode]["decode_ms"]) for b, row in rows.items() if mode in row]
            axis.plot([b for b, _ in points], [ratio for _, ratio in points], marker="o", label=MODES[mode])
        axis.set(title=model, xlabel="batch", xscale="log", xticks=list(rows), xticklabels=list(rows))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("decode speed over dense bf16")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the tables and draw the plot."""
    result = json.loads(Path(sys.argv[1]).read_text())
    print("\n\n".join(part for part in (speed(result), memory(result), breakdown(result)) if part))
    if len(sys.argv) > 2:
        plot(result, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
