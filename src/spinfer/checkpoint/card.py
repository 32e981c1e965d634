"""The model card (README.md) of a compressed checkpoint."""

from __future__ import annotations

from spinfer.checkpoint.carry import ORIGINAL_CARD_NAME
from spinfer.checkpoint.config import FORMAT_NAME
from spinfer.checkpoint.report import CompressionReport

_SHOWN = 20
"""Dense Linears listed by name; all are in config.json."""


def model_card(name: str, report: CompressionReport, *, has_original_card: bool) -> str:
    """Markdown: what this is, how to load it, how it was made and what it holds.

    Args:
        name: of the model that was compressed.
        report: of the compression.
        has_original_card: whether that model's card is carried over beside this one.
    """
    checkpoint = report.checkpoint
    lines = [
        "---",
        "library_name: transformers",
        "tags: [spinfer, sparse, tca-bme]",
        "---",
        f"# {name}, compressed with spinfer",
        "",
        f"The zeros of the Linear layers are not stored: their weights are in the {FORMAT_NAME} format, version "
        f"{checkpoint.format_version} (one bit a weight and the nonzeros). Every other tensor, and every nonzero, is "
        "bit for bit that of the original model.",
    ]
    if has_original_card:
        lines.append(
            f"The original model's card, with its licence and limits, is [{ORIGINAL_CARD_NAME}]({ORIGINAL_CARD_NAME})."
        )
    lines += [
        "",
        "## Load it",
        "",
        "```python",
        "import spinfer  # registers the format with transformers",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
        "```",
        "",
        "`import spinfer` is needed: without it transformers warns that it does not know the quantisation method and "
        "then fails on a shape mismatch, because each compressed weight is a 1-D array under the dense weight's name. "
        "`spinfer decompress DIRECTORY -o DENSE` gives the dense model back, for tools that cannot read this one.",
        "",
        "## What it holds",
        "",
        "| | |",
        "| --- | ---: |",
        f"| compressed Linears | {len(checkpoint.layers)} |",
        f"| their weights | {checkpoint.weights:,} |",
        f"| nonzero | {checkpoint.nnz:,} ({checkpoint.density:.2%}) |",
        f"| bits a weight | {checkpoint.bits_per_weight:.3f} |",
        f"| their bytes, dense | {checkpoint.dense_nbytes:,} |",
        f"| their bytes, compressed | {checkpoint.nbytes:,} |",
        f"| all tensors, dense | {checkpoint.total_dense_nbytes:,} bytes |",
        f"| all tensors, compressed | {checkpoint.total_nbytes:,} bytes |",
    ]
    if checkpoint.dense:
        lines += ["", "Left dense:", ""]
        lines += [f"- `{layer.name}`: {layer.reason}" for layer in checkpoint.dense[:_SHOWN]]
        if len(checkpoint.dense) > _SHOWN:
            lines.append(f"- and {len(checkpoint.dense) - _SHOWN} more, listed in config.json")
    if report.nonfinite:
        lines += ["", "NaN or infinite values of the original, kept as they are:", ""]
        lines += [f"- `{tensor}`: {count}" for tensor, count in report.nonfinite.items()]
    return "\n".join([*lines, ""])
