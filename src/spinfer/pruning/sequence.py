"""A model's blocks one after another: each is pruned with what the pruned blocks before it give out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from spinfer.errors import SpinferError
from spinfer.pruning.allocation import outlier_share, owl_sparsities
from spinfer.pruning.block import prune_matrices
from spinfer.pruning.observe import Matrix, Observer
from spinfer.pruning.recipe import Allocation, Method, Recipe
from spinfer.pruning.report import BlockReport, MatrixReport
from spinfer.pruning.wanda import wanda_scores

Progress = Callable[[int, int, BlockReport], None]
"""Called with (blocks done, blocks, the last one's report)."""


class Blocks(Protocol):
    """Where the blocks come from and go to; one is on the compute device at a time."""

    @property
    def names(self) -> Sequence[str]:
        """Of the modules, in order."""

    def load(self, index: int) -> tuple[nn.Module, list[Matrix]]:
        """A block, ready to run, and its matrices that are to be pruned."""

    def save(self, index: int, matrices: Sequence[Matrix], report: BlockReport) -> None:
        """Keep what was pruned."""

    def release(self, index: int) -> None:
        """Free the compute device of the block."""

    def finished(self, index: int) -> BlockReport | None:
        """The report of a block that an earlier run has pruned; `load` gives it as it was saved."""


class Activations(Protocol):
    """The calibration tokens on their way through the model."""

    batches: list[Tensor]
    """What goes into the next block, each [samples, tokens, hidden_size]."""

    def forward(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block on a batch."""


@contextmanager
def _full_precision() -> Iterator[None]:
    """Sums of squares need all of float32: neither TF32 nor bf16 in their matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def plan_sparsities(
    blocks: Blocks,
    recipe: Recipe,
    activations: Activations | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Sparsity of each block; OWL runs the dense model once for it.

    Args:
        blocks: of the model, none of them pruned.
        recipe: how.
        activations: what goes into the first block; left as it is. None where the recipe needs no calibration.
        progress: called with (blocks done, blocks) where the model runs.

    Raises:
        SpinferError: see `owl_sparsities`.
    """
    if recipe.allocation is Allocation.UNIFORM:
        return [recipe.sparsity] * len(blocks.names)
    assert activations is not None
    shares, weights = outlier_shares(blocks, recipe.outlier_factor, activations, progress)
    return owl_sparsities(shares, weights, recipe.sparsity, recipe.spread)


@torch.no_grad()
def outlier_shares(
    blocks: Blocks,
    factor: float,
    activations: Activations,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[float], list[int]]:
    """Run the dense model: each block's `outlier_share`, and how many weights it has; arguments as above."""
    hidden = list(activations.batches)
    shares, weights = [], []
    for index in range(len(blocks.names)):
        block, matrices = blocks.load(index)
        observer = Observer(matrices, hessian=False)
        for number, batch in enumerate(hidden):
            hidden[number] = observer.run(partial(activations.forward, index, block, batch))
        scores = (
            wanda_scores(matrix.weight, torch.zeros((), device=matrix.weight.device) if seen is None else seen.norms)
            for seen, group in observer.groups(matrices)
            for matrix in group
        )
        shares.append(outlier_share(scores, factor))
        weights.append(sum(matrix.weight.numel() for matrix in matrices))
        blocks.release(index)
        progress(index + 1, len(blocks.names))
    return shares, weights


@torch.no_grad()
def prune_blocks(
    blocks: Blocks,
    recipe: Recipe,
    sparsities: Sequence[float],
    activations: Activations | None,
    progress: Progress = lambda done, total, report: None,
) -> list[BlockReport]:
    """Prune all blocks that are not finished.

    Args:
        blocks: of the model.
        recipe: how.
        sparsities: of each block; see `plan_sparsities`.
        activations: what goes into the first block; changed. None prunes by magnitude.
        progress: called after each block.

    Raises:
        SpinferError: a block that cannot be pruned, or outputs that are not finite.
    """
    reports: list[BlockReport] = []
    with _full_precision():
        for index, name in enumerate(blocks.names):
            began = time.monotonic()
            report = blocks.finished(index)
            try:
                if report is None:
                    block, matrices = blocks.load(index)
                    pruned, error = _prune_block(index, block, matrices, recipe, sparsities[index], activations)
                    report = BlockReport(name, sparsities[index], pruned, error, time.monotonic() - began)
                    blocks.save(index, matrices, report)
                elif activations is not None:
                    block, _ = blocks.load(index)
                    for number, batch in enumerate(activations.batches):
                        activations.batches[number] = activations.forward(index, block, batch)
            finally:
                blocks.release(index)
            reports.append(report)
            progress(index + 1, len(blocks.names), report)
    return reports


def _prune_block(
    index: int,
    block: nn.Module,
    matrices: list[Matrix],
    recipe: Recipe,
    sparsity: float,
    activations: Activations | None,
) -> tuple[tuple[MatrixReport, ...], float | None]:
    if activations is None:
        return prune_matrices(matrices, None, recipe, sparsity), None
    batches = activations.batches
    observer = Observer(matrices, hessian=recipe.method is Method.SPARSEGPT)
    dense = [observer.run(partial(activations.forward, index, block, batch)) for batch in batches]
    reports = prune_matrices(matrices, observer, recipe, sparsity)
    lost = added = 0.0
    for number, batch in enumerate(batches):
        output = activations.forward(index, block, batch)
        lost += float((output - dense[number]).float().square().sum(dtype=torch.float64))
        added += float((dense[number] - batch).float().square().sum(dtype=torch.float64))
        batches[number] = output
        dense[number] = batch.new_empty(0)
    if not lost < float("inf"):
        raise SpinferError(
            f"the outputs of block {index} are not finite; calibrate in a type of wider range (convert the model to "
            "bfloat16 or float32)"
        )
    return reports, lost / added if added else 0.0
