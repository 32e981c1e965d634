"""`spinfer inspect`: what a compressed directory holds, from its headers."""

from __future__ import annotations

from spinfer.checkpoint.inspect import inspect_checkpoint
from spinfer.cli.options import Json, Model
from spinfer.cli.output import megabytes, print_json, print_table, stdout


def inspect(model: Model, json: Json = False) -> None:
    """Shape, density, bytes and bits a weight of every layer, and totals; no tensor is read."""
    report = inspect_checkpoint(model)
    if json:
        print_json(report.to_dict())
        return
    rows = [
        [
            layer.name,
            "x".join(map(str, layer.shape)),
            f"{layer.density:.4f}",
            f"{layer.nbytes:,}",
            f"{layer.bits_per_weight:.3f}",
        ]
        for layer in report.layers
    ]
    rows.append(["compressed", "", f"{report.density:.4f}", f"{report.nbytes:,}", f"{report.bits_per_weight:.3f}"])
    print_table(["layer", "shape", "density", "bytes", "bits a weight"], rows)
    for left in report.dense:
        stdout.print(f"dense: {left.name}: {left.reason}", markup=False)
    stdout.print(
        f"format version {report.format_version}; all tensors: {megabytes(report.total_nbytes)}, "
        f"dense {megabytes(report.total_dense_nbytes)}"
    )
