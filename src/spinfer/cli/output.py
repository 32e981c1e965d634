"""What every verb shares: progress and messages on stderr, results on stdout, as a table or as JSON."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; yields a callback that takes (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(description, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def print_json(result: Any) -> None:
    """Machine-readable result on stdout."""
    json.dump(result, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, which a terminal shows as well as a document does; numbers align right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    for cells in (header, rule, *rows):
        stdout.print(line(cells), markup=False)


def megabytes(nbytes: int) -> str:
    """10^6 bytes, the unit in which disks and models are sold."""
    return f"{nbytes / 1e6:,.1f} MB"


def peak_memory_nbytes(device: str) -> int:
    """Most memory the process has held: allocated on the GPU, or resident in RAM."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    scale = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
