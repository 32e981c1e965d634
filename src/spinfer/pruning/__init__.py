"""Pruning: dense weights in, dense weights with zeros out."""

from spinfer.pruning.calibration import read_texts, sample_tokens
from spinfer.pruning.hessian import inverse_factor
from spinfer.pruning.magnitude import prune_magnitude_
from spinfer.pruning.pattern import Pattern
from spinfer.pruning.recipe import Allocation, Method, Recipe
from spinfer.pruning.report import PruningReport
from spinfer.pruning.sparsegpt import prune_sparsegpt_
from spinfer.pruning.wanda import prune_wanda_

__all__ = [
    "Allocation",
    "Method",
    "Pattern",
    "PruningReport",
    "Recipe",
    "inverse_factor",
    "prune_magnitude_",
    "prune_sparsegpt_",
    "prune_wanda_",
    "read_texts",
    "sample_tokens",
]
