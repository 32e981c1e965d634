"""`spinfer decompress`: a compressed directory in, a dense one out."""

from __future__ import annotations

from typing import Annotated

import typer

from spinfer.checkpoint.decompress import Target, decompress_checkpoint
from spinfer.cli.options import Json, MaxShard, Model, Output
from spinfer.cli.output import megabytes, print_json, progress_bar, stdout


def decompress(
    model: Model,
    output: Output,
    to: Annotated[
        Target, typer.Option("--to", help="dense, or compressed-tensors' sparse-bitmask for other tools.")
    ] = Target.DENSE,
    max_shard_gb: MaxShard = 5.0,
    json: Json = False,
) -> None:
    """Give back a dense directory; tensors are bit-identical, except that -0.0 came back as 0.0."""
    with progress_bar("decompress") as progress:
        report = decompress_checkpoint(
            model, output, target=to, max_shard_nbytes=int(max_shard_gb * 1e9), progress=progress
        )
    if json:
        print_json(report.to_dict())
        return
    stdout.print(
        f"{output}: {report.modules} Linears decoded; "
        f"{megabytes(report.compressed_nbytes)} -> {megabytes(report.nbytes)} in {report.seconds:.1f} s"
    )
