"""Prune the matrices of one block, with what was seen going into them."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from spinfer.errors import SpinferError
from spinfer.pruning.hessian import InverseFactor, inverse_factor
from spinfer.pruning.magnitude import prune_magnitude_
from spinfer.pruning.observe import Matrix, Observer
from spinfer.pruning.recipe import Method, Recipe
from spinfer.pruning.report import MatrixReport
from spinfer.pruning.sparsegpt import prune_sparsegpt_
from spinfer.pruning.statistics import InputStatistics
from spinfer.pruning.wanda import prune_wanda_


def prune_matrices(
    matrices: list[Matrix], observer: Observer | None, recipe: Recipe, sparsity: float
) -> tuple[MatrixReport, ...]:
    """Prune in place.

    An expert that fewer tokens reached than it has inputs says too little about itself: it is pruned by magnitude.

    Args:
        matrices: of the block.
        observer: that has seen all calibration tokens; None prunes by magnitude.
        recipe: how.
        sparsity: of each matrix.

    Raises:
        SpinferError: no token reached a matrix that is no expert, or a matrix cannot be pruned.
    """
    if observer is None:
        return tuple(_prune(matrix, None, None, recipe, sparsity) for matrix in matrices)
    reports: dict[str, MatrixReport] = {}
    groups = observer.groups(matrices)
    _check_reached(matrices, groups, recipe)
    while groups:  # each group's statistics are freed before the next one's factor takes memory
        statistics, members = groups.pop(0)
        factor = None
        if statistics is not None and statistics.hessian is not None and not _starved(members[0], statistics):
            factor = _factor(members[0], statistics.hessian, recipe)
        for matrix in members:
            reports[matrix.name] = _prune(matrix, statistics, factor, recipe, sparsity)
        del statistics, factor
    return tuple(reports[matrix.name] for matrix in matrices)


def _check_reached(
    matrices: list[Matrix], groups: list[tuple[InputStatistics | None, list[Matrix]]], recipe: Recipe
) -> None:
    """Raise where no token reached a Linear that is no expert, or any of the experts that are one parameter."""
    if recipe.method is Method.MAGNITUDE:
        return
    reached = {_layer(matrix) for statistics, group in groups if statistics is not None for matrix in group}
    for matrix in matrices:
        if _layer(matrix) not in reached:
            raise SpinferError(
                f"no calibration token reached {_layer(matrix)}: the model does not apply it by "
                "torch.nn.functional.linear; leave it out with --ignore"
            )


def _layer(matrix: Matrix) -> str:
    """The module or parameter, whose experts stand for each other."""
    return re.sub(r"\[\d+\]$|(?<=\.experts)\.\d+(?=\.)", "", matrix.name) if matrix.expert else matrix.name


def _factor(matrix: Matrix, hessian: Tensor, recipe: Recipe) -> InverseFactor:
    try:
        return inverse_factor(hessian, recipe.damping)
    except SpinferError as error:
        raise SpinferError(f"{matrix.name}: {error}") from error


def _starved(matrix: Matrix, statistics: InputStatistics) -> bool:
    return matrix.expert and statistics.tokens < matrix.weight.shape[1]


def _prune(
    matrix: Matrix, statistics: InputStatistics | None, factor: InverseFactor | None, recipe: Recipe, sparsity: float
) -> MatrixReport:
    weight, method = matrix.weight, recipe.method
    if not bool(torch.isfinite(weight).all()):
        raise SpinferError(f"{matrix.name} holds NaN or infinity; repair the model, or leave it out with --ignore")
    if statistics is None or _starved(matrix, statistics):
        method = Method.MAGNITUDE
    zeros_before = int((weight == 0).sum())
    try:
        if method is Method.MAGNITUDE:
            prune_magnitude_(weight, sparsity, recipe.pattern)
        elif method is Method.WANDA:
            assert statistics is not None
            prune_wanda_(weight, statistics.norms, sparsity, recipe.pattern)
        else:
            assert factor is not None
            prune_sparsegpt_(weight, factor, sparsity, recipe.pattern, block_size=recipe.block_size)
    except SpinferError as error:
        raise SpinferError(f"{matrix.name}: {error}") from error
    return MatrixReport(
        name=matrix.name,
        shape=(weight.shape[0], weight.shape[1]),
        zeros_before=zeros_before,
        zeros=int((weight == 0).sum()),
        tokens=None if statistics is None else statistics.tokens,
        dead_inputs=0 if statistics is None else int((statistics.square_sums == 0).sum()),
        method=method.value,
        damping=None if factor is None else factor.damping,
    )
