"""`spinfer compress`: a pruned model directory in, a compressed one out."""

from __future__ import annotations

from typing import Annotated

import typer

from spinfer.checkpoint.compress import compress_checkpoint
from spinfer.cli.options import Json, MaxShard, Model, Output
from spinfer.cli.output import megabytes, print_json, progress_bar, stderr, stdout
from spinfer.integrations.transformers.models import model_linears


def compress(
    model: Model,
    output: Output,
    include: Annotated[
        list[str], typer.Option("--include", help="Compress only modules of this pattern: `*.mlp.*`, or `re:REGEX`.")
    ] = [],  # noqa: B006  (typer copies it)
    ignore: Annotated[list[str], typer.Option("--ignore", help="Leave modules of this pattern dense.")] = [],  # noqa: B006
    max_shard_gb: MaxShard = 5.0,
    json: Json = False,
) -> None:
    """Compress a pruned model; every layer is decoded again and compared before it is written.

    MODEL may hold safetensors or .bin files, dense or in compressed-tensors' sparse-bitmask format.
    """
    found = model_linears(model)
    with progress_bar("compress") as progress:
        report = compress_checkpoint(
            model,
            output,
            linears=found.linears,
            dense=found.dense,
            include=include,
            ignore=ignore,
            max_shard_nbytes=int(max_shard_gb * 1e9),
            progress=progress,
        )
    if json:
        print_json(report.to_dict())
        return
    for layer in report.checkpoint.dense:
        stderr.print(f"left dense: {layer.name}: {layer.reason}", markup=False)
    for name, count in report.nonfinite.items():
        stderr.print(f"kept: {name} holds {count} NaN or infinite values", markup=False)
    done = report.checkpoint
    stdout.print(
        f"{output}: {len(done.layers)} Linears, density {done.density:.3f}, {done.bits_per_weight:.3f} bits a weight; "
        f"{megabytes(done.total_dense_nbytes)} -> {megabytes(done.total_nbytes)} in {report.seconds:.1f} s"
    )
