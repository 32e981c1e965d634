"""Options that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from spinfer.errors import SpinferError

Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to make; it must not exist.")]
MaxShard = Annotated[float, typer.Option("--max-shard-gb", min=0.001, help="Most 10^9 bytes in one weights file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto: CUDA where there is one.")]
Dtype = Annotated[
    Literal["auto", "float16", "bfloat16", "float32"],
    typer.Option("--dtype", help="Type to load as; auto is the one config.json names."),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face model directory.")]


def resolve_device(device: str) -> str:
    """The device that `auto` means here.

    Raises:
        SpinferError: CUDA is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SpinferError("--device cuda: torch sees no CUDA device; use --device cpu")
    return device


def set_threads(threads: int | None) -> None:
    """Apply --threads."""
    if threads is not None:
        torch.set_num_threads(threads)
