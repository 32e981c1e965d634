"""`spinfer bench`: prefill and decode speed of a model."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import version
from typing import Annotated, Any

import torch
import typer

from spinfer.bench.model import time_models
from spinfer.cli.options import Device, Dtype, Model, Threads, resolve_device, set_threads
from spinfer.cli.output import megabytes, print_json, print_table, progress_bar
from spinfer.integrations.transformers.models import load_causal_lm


class Format(StrEnum):
    """Of the result."""

    md = "md"
    json = "json"


def bench(
    model: Model,
    prompt_tokens: Annotated[int, typer.Option("-p", "--prompt-tokens", min=1, help="Prompt length.")] = 128,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", min=0, help="Decode steps.")] = 32,
    batch: Annotated[int, typer.Option("-b", "--batch", min=1, help="Sequences at once.")] = 1,
    repeats: Annotated[int, typer.Option("-r", "--repeats", min=1, help="Timed runs; the median counts.")] = 3,
    output: Annotated[Format, typer.Option("-o", "--output", help="Form of the result.")] = Format.md,
    compare: Annotated[str | None, typer.Option("--compare", metavar="DENSE_DIR", help="Time beside this one.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Prefill and decode tokens/s; with --compare the two models take turns in one process."""
    device = resolve_device(device)
    set_threads(threads)
    paths = [model] if compare is None else [model, compare]
    models = {path: load_causal_lm(path, device=device, dtype=dtype)[0] for path in paths}
    with progress_bar("bench") as progress:
        timings = time_models(
            models,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            repeats=repeats,
            progress=progress,
        )
    results: list[dict[str, Any]] = [
        {"model": path, "memory_nbytes": models[path].get_memory_footprint(), **asdict(timings[path])} for path in paths
    ]
    if output is Format.json:
        settings = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "repeats": repeats}
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
