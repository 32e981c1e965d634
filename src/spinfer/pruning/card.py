"""The model card (README.md) of a pruned model: the original's, with a section on the pruning before it."""

from __future__ import annotations

import json

from spinfer.pruning.recipe import describe
from spinfer.pruning.report import PruningReport

_FENCE = "---\n"


def pruned_card(name: str, report: PruningReport, original: str) -> str:
    """Markdown; the original's metadata stays at the top, where readers of cards look for it.

    Args:
        name: of the model that was pruned.
        report: of the pruning.
        original: its card; empty where it has none.
    """
    metadata, body = _split(original)
    summary = report.summary()
    errors = [error for error in summary["block_errors"] if error is not None]
    lines = [
        f"# {name}, pruned with spinfer",
        "",
        f"{report.sparsity:.2%} of the {report.weights:,} weights in the Linears of the decoder blocks are zero "
        f"({describe(report.recipe)}). Everything else is that of {name}; the files are an ordinary dense checkpoint. "
        "`spinfer compress` makes it smaller.",
        "",
        "| | |",
        "| --- | ---: |",
        f"| weights to prune | {report.weights:,} |",
        f"| zeros before | {report.zeros_before:,} |",
        f"| zeros now | {report.zeros:,} |",
    ]
    if errors:
        lines.append(f"| error of the blocks' outputs | {min(errors):.4f} to {max(errors):.4f} |")
    if report.starved:
        lines.append(f"| experts pruned by magnitude, for want of tokens | {len(report.starved)} |")
    recipe = {**report.recipe, "calibration": report.calibration}
    lines += ["", "Recipe:", "", "```json", json.dumps(recipe, indent=2), "```", ""]
    return metadata + "\n".join(lines) + (f"\n{body}" if body else "")


def _split(card: str) -> tuple[str, str]:
    """Metadata with its fences, and the rest."""
    if card.startswith(_FENCE):
        metadata, fence, body = card.removeprefix(_FENCE).partition(f"\n{_FENCE}")
        if fence:
            return f"{_FENCE}{metadata}{fence}", body.lstrip("\n")
    return f"{_FENCE}library_name: transformers\n{_FENCE}", card
