"""`spinfer bench MODEL`: prefill and decode speed of a model; `spinfer bench kernel`: one matrix on the GPU."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import version
from typing import Annotated, Any, Literal

import torch
import typer
from typer.core import TyperGroup

from spinfer.bench.kernel import bandwidths, bench_kernel, environment
from spinfer.bench.kernel_masks import MASKS
from spinfer.bench.model import time_models
from spinfer.cli.options import Device, Dtype, Json, Model, Threads, resolve_device, set_threads
from spinfer.cli.output import megabytes, print_json, print_table, progress_bar
from spinfer.errors import SpinferError
from spinfer.integrations.transformers.models import load_model


class Format(StrEnum):
    """Of the result."""

    md = "md"
    json = "json"


class ModelByDefault(TyperGroup):
    """`spinfer bench MODEL_DIR` means `spinfer bench model MODEL_DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Name the verb where the arguments do not."""
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["model", *args]
        return super().parse_args(ctx, args)


def bench_model(
    model: Model,
    prompt_tokens: Annotated[int, typer.Option("-p", "--prompt-tokens", min=1, help="Prompt length.")] = 128,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", min=0, help="Decode steps.")] = 32,
    batch: Annotated[int, typer.Option("-b", "--batch", min=1, help="Sequences at once.")] = 1,
    repeats: Annotated[int, typer.Option("-r", "--repeats", min=1, help="Timed runs; the median counts.")] = 3,
    output: Annotated[Format, typer.Option("-o", "--output", help="Form of the result.")] = Format.md,
    compare: Annotated[str | None, typer.Option("--compare", metavar="DENSE_DIR", help="Time beside this one.")] = None,
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs", help="Decode from CUDA graphs: generate(cache_implementation='static') of transformers."
        ),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Prefill and decode tokens/s; with --compare the two models take turns in one process."""
    device = resolve_device(device)
    if cuda_graphs and not device.startswith("cuda"):
        raise SpinferError(f"--cuda-graphs needs a CUDA device, not {device}; leave it out, or choose --device cuda")
    set_threads(threads)
    paths = [model] if compare is None else [model, compare]
    models = {path: load_model(path, device=device, dtype=dtype) for path in paths}
    with progress_bar("bench") as progress:
        timings = time_models(
            models,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            repeats=repeats,
            cuda_graphs=cuda_graphs,
            progress=progress,
        )
    results: list[dict[str, Any]] = [
        {"model": path, "memory_nbytes": models[path].get_memory_footprint(), **asdict(timings[path])} for path in paths
    ]
    if output is Format.json:
        settings = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "repeats": repeats}
        settings |= {"cuda_graphs": cuda_graphs}
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
        versions = {package: version(package) for package in ("spinfer", "torch", "transformers")}
        print_json({"device": name, "threads": torch.get_num_threads(), **versions, **settings, "results": results})
        return
    print_table(
        ["model", "weights", "prefill tokens/s", "first token ms", "decode tokens/s", "step ms"],
        [
            [
                r["model"],
                megabytes(r["memory_nbytes"]),
                f"{r['prefill_tokens_per_s']:.1f}",
                f"{r['time_to_first_token_ms']:.1f}",
                f"{r['decode_tokens_per_s']:.2f}",
                f"{r['decode_step_ms']:.2f}",
            ]
            for r in results
        ],
    )


def bench_one_kernel(
    out_features: Annotated[int, typer.Option("-m", min=1, help="M, rows of the weight.")],
    in_features: Annotated[int, typer.Option("-k", min=1, help="K, columns of the weight.")],
    tokens: Annotated[list[int] | None, typer.Option("-n", min=1, help="N, rows of x; repeatable.  [1, 16]")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", min=0, max=1, help="Share of zeros; repeatable.  [0.6]")
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16"], typer.Option("--dtype", help="Type of the weight and of x.")
    ] = "float16",
    mask: Annotated[str, typer.Option("--mask", help=f"Where the zeros are: {', '.join(MASKS)}.")] = "random",
    json: Json = False,
) -> None:
    """Microseconds of x W^T with a random sparse W, beside cuBLAS: cold L2, CUDA graphs, medians."""
    with progress_bar("bench") as progress:
        rows = bench_kernel(
            out_features,
            in_features,
            tokens or [1, 16],
            sparsity or [0.6],
            dtype=getattr(torch, dtype),
            mask=mask,
            progress=progress,
        )
    if json:
        print_json({"environment": environment() | bandwidths(), "results": rows})
        return
    print_table(
        ["sparsity", "tokens", "us", "cuBLAS us", "FP8 us", "speed-up", "byte limit", "error"],
        [
            [
                f"{r['sparsity']:.0%}",
                str(r["n"]),
                f"{r['us']:.1f}",
                f"{r['dense_us']:.1f}",
                f"{r['fp8_us']:.1f}" if r.get("fp8_us") else "",
                f"{r['speedup']:.2f}",
                f"{r['byte_limit']:.2f}",
                f"{r['error']:.1e}",
            ]
            for r in rows
        ],
    )


def bench_commands() -> typer.Typer:
    """`spinfer bench` with its two verbs."""
    app = typer.Typer(cls=ModelByDefault, no_args_is_help=True)
    app.command("model")(bench_model)
    app.command("kernel")(bench_one_kernel)
    return app
