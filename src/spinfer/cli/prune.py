"""`spinfer prune`: a dense model directory in, one with zeros out."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from spinfer.cli.options import Device, Json, MaxShard, Model, Output, Threads, resolve_device, set_threads
from spinfer.cli.output import print_json, progress_bar, stderr, stdout
from spinfer.integrations.transformers.prune_checkpoint import prune_checkpoint
from spinfer.pruning.calibration import NUM_SAMPLES
from spinfer.pruning.recipe import Allocation, Method, Recipe
from spinfer.pruning.report import BlockReport, PruningReport


def prune(
    model: Model,
    output: Output,
    method: Annotated[Method, typer.Option("--method", help="How weights are chosen.")] = Method.SPARSEGPT,
    sparsity: Annotated[float | None, typer.Option("--sparsity", "-s", help="Share of zeros; 0.5 by default.")] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", metavar="N:M", help="At most N nonzeros in every M weights of a row.")
    ] = None,
    allocation: Annotated[
        Allocation, typer.Option("--allocation", help="Zeros over the blocks: alike, or by their outliers.")
    ] = Allocation.UNIFORM,
    ignore: Annotated[
        list[str], typer.Option("--ignore", help="Leave modules of this pattern alone: `*.down_proj`, or `re:REGEX`.")
    ] = [],  # noqa: B006  (typer copies it)
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="UTF-8 text, .jsonl with `text`, or a directory of such.")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="Windows of the text.")] = NUM_SAMPLES,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", min=2, help="Tokens a window; 2048, or what the model can read.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the windows' places.")] = 0,
    compress: Annotated[bool, typer.Option("--compress", help="Write the compressed directory at once.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    max_shard_gb: MaxShard = 5.0,
    json: Json = False,
) -> None:
    """Prune the Linears of every decoder block, one block at a time.

    An interrupted run goes on where it was when the same command is given again. Wanda and SparseGPT need
    --calibration.
    """
    device = resolve_device(device)
    set_threads(threads)
    recipe = Recipe.of(method=method, sparsity=sparsity, pattern=pattern, allocation=allocation)
    with progress_bar("prune") as bar:
        report = prune_checkpoint(
            model,
            output,
            recipe,
            ignore=ignore,
            calibration=calibration,
            num_samples=num_samples,
            sequence_length=sequence_length,
            seed=seed,
            device=device,
            compress=compress,
            max_shard_nbytes=int(max_shard_gb * 1e9),
            on_resume=lambda done, total: stderr.print(f"going on after {done} of {total} blocks"),
            on_plan=bar,
            progress=_Lines(bar),
        )
    if json:
        print_json({"path": str(output), **report.to_dict()})
        return
    _say(report)
    stdout.print(
        f"{output}: {report.sparsity:.2%} zeros in {report.weights:,} weights of {len(report.blocks)} blocks, "
        f"in {report.seconds:.1f} s"
    )


class _Lines:
    """A line a block on stderr, with the time that is left."""

    def __init__(self, bar: Callable[[int, int], None]) -> None:
        self._bar = bar
        self._began = time.monotonic()

    def __call__(self, done: int, total: int, report: BlockReport) -> None:
        self._bar(done, total)
        left = (time.monotonic() - self._began) / done * (total - done)
        error = "" if report.error is None else f", error {report.error:.4f}"
        stderr.print(
            f"block {done}/{total}: {report.zeros / max(1, report.weights):.2%} zeros{error}, {report.seconds:.1f} s; "
            f"about {left:.0f} s left"
        )


def _say(report: PruningReport) -> None:
    for name, reason in report.dense.items():
        stderr.print(f"left dense: {name}: {reason}", markup=False)
    if report.zeros_before:
        share = report.zeros_before / report.weights
        kept = "; they are kept" if any(matrix.was_pruned for matrix in report.matrices) else ""
        stderr.print(f"the model had {report.zeros_before:,} zeros already ({share:.2%}){kept}")
    dead = [matrix.name for matrix in report.matrices if matrix.dead_inputs]
    if dead:
        stderr.print(f"inputs that no calibration token used, in {len(dead)} Linears: {', '.join(dead[:3])}, …")
    if report.starved:
        stderr.print(
            f"{len(report.starved)} experts were reached by fewer tokens than they have inputs, and pruned by magnitude"
        )
