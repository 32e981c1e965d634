"""Tables and a plot of what `vllm_gpu.py` measured: `python benchmarks/vllm_report.py RESULT.json ... [PLOT.svg]`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MODES = {"bf16": "dense bf16", "fp8": "dense FP8", "sparse": "sparse bf16", "copies": "sparse, dense copies"}


def engines(result: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The runs that succeeded, by model and mode; of several, the first, and what only later ones measured."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for run in result["runs"]:
        if run.get("rows"):
            rows = found.setdefault(run["model"], {}).setdefault(run["mode"], run | {"rows": []})["rows"]
            known = {(row["input"], row["batch"]) for row in rows}
            rows += [row for row in run["rows"] if (row["input"], row["batch"]) not in known]
    return found


def together(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The runs of several calls as one result; they must be of one kind of GPU, one vLLM and one sparsity."""
    same = ("device", "vllm", "sparsity", "tensor_parallel")
    if len({tuple(result[name] for name in same) for result in results}) != 1:
        raise SystemExit(f"results that differ in {', '.join(same)} do not belong in one table")
    return {**results[0], "runs": [run for result in results for run in result["runs"]]}


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
        "| model | input | batch | dense bf16 | dense FP8 | sparse | over bf16 | first token, ms | over bf16 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, modes in engines(result).items():
        for (length, batch), row in _rows(modes):
            cells = [f"{row[m]['decode_tokens_per_s']:,.0f}" if m in row else "" for m in ("bf16", "fp8", "sparse")]
            ratios = ["", f"{row['sparse']['ttft_ms']:,.1f}" if "sparse" in row else "", ""]
            if "bf16" in row and "sparse" in row:
                ratios[0] = f"{row['bf16']['decode_ms'] / row['sparse']['decode_ms']:.2f}x"
                ratios[2] = f"{row['sparse']['ttft_ms'] / row['bf16']['ttft_ms']:.2f}"
            lines.append(f"| {model} | {length} | {batch} | {' | '.join((*cells, *ratios))} |")
    return "\n".join(lines)


def copies(result: Mapping[str, Any]) -> str:
    """Sparse without and with dense copies: decode speed and time to the first token over dense bf16, Markdown."""
    lines = [
        "| model | in | batch | dense tokens/s | sparse | with copies | first token, ms | sparse | with copies |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, modes in engines(result).items():
        for (length, batch), row in _rows(modes):
            dense, *others = (row[mode] for mode in ("bf16", "sparse", "copies"))
            cells = [f"{length:,}", f"{batch}", f"{dense['decode_tokens_per_s']:,.0f}"]
            cells += [f"{dense['decode_ms'] / other['decode_ms']:.2f}x" for other in others]
            cells += [f"{dense['ttft_ms']:,.1f}", *(f"{other['ttft_ms'] / dense['ttft_ms']:.2f}" for other in others)]
            lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_brief(result: Mapping[str, Any], length: int) -> str:
    """Decode speed, and over dense bf16, for prompts of one length: a model a line, Markdown."""
    found = {
        model: {batch: row for (at, batch), row in _rows(modes) if at == length and {"bf16", "sparse"} <= set(row)}
        for model, modes in engines(result).items()
    }
    batches = sorted({batch for rows in found.values() for batch in rows})
    lines = [
        f"| | {' | '.join(f'batch {batch}' for batch in batches)} | GiB of weights, dense | sparse |",
        f"| --- | {' | '.join('---:' for _ in batches)} | ---: | ---: |",
    ]
    for model, modes in engines(result).items():
        cells = []
        for batch in batches:
            dense, sparse = (found[model][batch][mode] for mode in ("bf16", "sparse"))
            cells.append(f"{sparse['decode_tokens_per_s']:,.0f}, {dense['decode_ms'] / sparse['decode_ms']:.2f}x")
        cells += [f"{max(modes[mode]['weights_gib']):.1f}" for mode in ("bf16", "sparse")]
        lines.append(f"| {model} | {' | '.join(cells)} |")
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


def breakdown(results: Sequence[Mapping[str, Any]], what: str = "step", batches: Sequence[int] = ()) -> str:
    """Microseconds by kind of kernel, Markdown; empty where nothing was profiled.

    Args:
        results: of calls, or of several together.
        what: "step" of decoding, or "first" token of all prompts.
        batches: to show; all, by default.
    """
    profiles = [
        (model, mode, result["tensor_parallel"], profile)
        for result in results
        for model, modes in engines(result).items()
        for mode, run in modes.items()
        for profile in run["profiles"]
        if any(profile.get(f"{what}_us", {}).values())  # earlier, workers and first tokens were not seen
        and (not batches or profile["batch"] in batches)
    ]
    if not profiles:
        return ""
    kinds = list(profiles[0][-1][f"{what}_us"])
    gaps = "gaps" if what == "step" else "first_gaps"
    lines = [
        f"| model | weights | GPUs | batch | {' | '.join(kinds)} | gaps |",
        f"| --- | --- {'| ---: ' * (len(kinds) + 3)}|",
    ]
    for model, mode, gpus, profile in profiles:
        cells = [f"{gpus}", f"{profile['batch']}"]
        cells += [f"{us:,.0f}" for us in (*profile[f"{what}_us"].values(), profile[f"{gaps}_us"])]
        lines.append(f"| {model} | {MODES.get(mode, MODES['sparse'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Decode tokens a second over dense bf16, a panel for each model; the file names the results that it shows."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = {model: modes for model, modes in engines(result).items() if "bf16" in modes}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "spinfer"}):
        figure = Figure(figsize=(3.2 * len(found), 3.2), layout="constrained")
        axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axis, (model, modes) in zip(axes, found.items(), strict=True):
            length = modes["bf16"]["rows"][0]["input"]
            rows = {key[1]: row for key, row in _rows(modes) if key[0] == length and "bf16" in row}
            for number, mode in enumerate(MODES):
                points = [
                    (b, row["bf16"]["decode_ms"] / row[mode]["decode_ms"]) for b, row in rows.items() if mode in row
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", label=MODES[mode])
            axis.set(title=model, xlabel="batch", xscale="log", xticks=list(rows), xticklabels=list(rows))
            axis.minorticks_off()
            axis.grid(linewidth=0.3)
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel("decode speed over dense bf16")
        axes[0].legend(fontsize="small")
        figure.savefig(path, metadata={"Date": None, "Description": digest(result)})


def digest(result: Mapping[str, Any]) -> str:
    """Of the runs that the tables and the plot show."""
    return hashlib.sha256(json.dumps(result["runs"], sort_keys=True).encode()).hexdigest()


def main() -> None:
    """Print the tables and draw the plot."""
    files = [Path(argument) for argument in sys.argv[1:]]
    result = together([json.loads(file.read_text()) for file in files if file.suffix == ".json"])
    parts = (speed(result), memory(result), breakdown([result]), breakdown([result], "first"))
    print("\n\n".join(part for part in parts if part))
    for file in files:
        if file.suffix == ".svg":
            plot(result, file)


if __name__ == "__main__":
    main()
