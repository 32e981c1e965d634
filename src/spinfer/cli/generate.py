"""`spinfer generate`: stream text from a model, then say how fast it came."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import torch
import typer

from spinfer.cli.options import Device, Dtype, Json, Model, Threads, resolve_device, set_threads
from spinfer.cli.output import megabytes, peak_memory_nbytes, print_json, stderr
from spinfer.integrations.transformers import generation
from spinfer.integrations.transformers.models import load_causal_lm


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue, or the user's turn of a chat.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="For sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Ignore the chat template; continue the text as it is.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Generate text; it streams to stdout, speed and memory follow on stderr."""
    device = resolve_device(device)
    set_threads(threads)
    torch.manual_seed(seed)
    lm, tokenizer = load_causal_lm(model, device=device, dtype=dtype)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    result = generation.generate(
        lm,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        chat=not raw,
        on_text=(lambda text: None) if json else show,
    )
    memory = peak_memory_nbytes(device)
    if json:
        print_json({"model": model, **asdict(result), "peak_memory_nbytes": memory})
        return
    sys.stdout.write("\n")
    stderr.print(
        f"prompt: {result.prompt_tokens} tokens, {result.prompt_tokens_per_s:.1f} tokens/s; "
        f"generation: {result.new_tokens} tokens, {result.generation_tokens_per_s:.2f} tokens/s; "
        f"peak memory: {megabytes(memory)}"
    )
