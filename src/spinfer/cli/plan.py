"""`spinfer plan`: does a model fit, and how large a batch, before anything is downloaded but config.json."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from spinfer.cli.options import Json, Model
from spinfer.cli.output import print_json, print_table, stdout
from spinfer.integrations.transformers.sizing import fit, model_size

_GIB = 2**30


def plan(
    model: Model,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", min=1, help="GiB of each GPU.")] = 80.0,
    sparsity: Annotated[float, typer.Option("--sparsity", min=0, max=1, help="Share of zeros in the Linears.")] = 0.6,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Tensor-parallel size.")] = 1,
    context: Annotated[
        int, typer.Option("--context", min=1, help="Tokens of a request, prompt and answer; at most the model's.")
    ] = 4096,
    utilization: Annotated[
        float, typer.Option("--utilization", min=0.1, max=1, help="Of the memory; vLLM's --gpu-memory-utilization.")
    ] = 0.9,
    reserve: Annotated[
        float, typer.Option("--reserve", min=0, help="GiB of each GPU for activations and the CUDA context.")
    ] = 2.0,
    json: Json = False,
) -> None:
    """Weights, KV cache and the largest batch, dense and compressed, in 16 bits; reads config.json only."""
    size = model_size(model)
    context = min(context, size.most_positions)
    usable = int((gpu_memory * utilization - reserve) * _GIB)
    compressed = size.compressed_nbytes(sparsity)
    weights = {
        "dense": size.dense_nbytes,
        "compressed": compressed,
        "compressed_with_dense_copies": compressed + size.copies_nbytes,
    }
    labels = ("dense", f"{sparsity:.0%} sparse", f"{sparsity:.0%} sparse, dense copies")
    fits = {
        name: fit(size, nbytes, gpus=gpus, usable_nbytes=usable, context=context) for name, nbytes in weights.items()
    }
    if json:
        results = {name: dataclasses.asdict(found) for name, found in fits.items()}
        print_json({"model": model, "gpus": gpus, "sparsity": sparsity, "context": context} | results)
        return
    rows = [
        [
            label,
            f"{found.weights_nbytes / gpus / _GIB:,.1f}",
            f"{found.kv_nbytes_per_token / 1024:,.0f}",
            f"{found.kv_tokens:,}" if found.kv_tokens else "does not fit",
            f"{found.batch:,}",
        ]
        for label, found in zip(labels, fits.values(), strict=True)
    ]
    header = ["weights", "GiB a GPU", "KiB a token", "tokens of KV cache", f"requests of {context:,} tokens"]
    print_table(header, rows)
    stdout.print(
        f"{gpus} x {gpu_memory:g} GiB, {utilization:.0%} of it used, {reserve:g} GiB kept for activations", markup=False
    )
