"""`spinfer eval`: perplexity of a text file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from spinfer.cli.options import Device, Dtype, Json, Model, Threads, resolve_device, set_threads
from spinfer.cli.output import print_json, print_table, progress_bar
from spinfer.errors import SpinferError
from spinfer.evaluation import perplexity
from spinfer.integrations.transformers.models import load_causal_lm


def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option("--text", "-t", help="UTF-8 text file.")],
    context: Annotated[int, typer.Option("--context", "-c", min=2, help="Tokens a window.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", min=2, help="Stop after so many.")] = None,
    compare: Annotated[str | None, typer.Option("--compare", metavar="DENSE_DIR", help="A second model.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Perplexity over consecutive windows of a text."""
    device = resolve_device(device)
    set_threads(threads)
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpinferError(f"{text}: cannot be read as UTF-8 text: {error}") from error
    results: list[dict[str, Any]] = []
    for path in [model] if compare is None else [model, compare]:
        lm, tokenizer = load_causal_lm(path, device=device, dtype=dtype)
        token_ids = tokenizer(content, return_tensors="pt", verbose=False)["input_ids"][0][:max_tokens]
        with progress_bar(f"perplexity of {path}") as progress:
            result = perplexity(lm, torch.as_tensor(token_ids).to(device), context=context, progress=progress)
        results.append({"model": path, **asdict(result)})
        del lm
    if json:
        print_json(results if compare is not None else results[0])
        return
    rows = [[r["model"], f"{r['perplexity']:.4f}", str(r["tokens"]), str(r["context"])] for r in results]
    print_table(["model", "perplexity", "tokens", "context"], rows)
