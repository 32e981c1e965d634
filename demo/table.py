"""The demo's result as a table."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """The result as text, in Markdown."""

    def cell(value: float | None, digits: int, scale: float = 1.0) -> str:
        return "" if value is None else f"{value / scale:,.{digits}f}"

    samples, length = (result["calibration"][key] for key in ("num_samples", "sequence_length"))
    busy = result["load_average_5_minutes"] - result["threads"]
    speed = "speed in bf16" + (", on a machine busy with other work: only its ratio says something" if busy > 1 else "")
    lines = [
        f"{result['model']}, whose weights its packager had rounded to 4 bits, pruned to {result['sparsity']:.0%} by "
        f"{result['method']} in every Linear, calibrated with {samples} samples of {length:,} tokens; perplexity "
        f"(fp32) of {result['evaluated_tokens']:,} tokens of held-out Wikipedia text; {speed}.",
        "",
        "| model | MB on disk | bits a Linear weight | perplexity | decode tokens/s | MB in memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in result["rows"]:
        cells = [
            cell(r["disk_nbytes"], 1, 1e6),
            cell(r["bits_per_weight"], 2),
            cell(r["perplexity"], 3),
            cell(r["decode_tokens_per_s"], 1),
            cell(r["memory_nbytes"], 1, 1e6),
        ]
        lines.append(f"| {r['model']} | {' | '.join(cells)} |")
    return "\n".join(lines)
