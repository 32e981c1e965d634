"""How many zeros each block gets: the same everywhere, or fewer where outliers are many (OWL)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spinfer.errors import SpinferError

OUTLIER_FACTOR = 5.0
"""A score is an outlier above this many means. Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)" (2023),
section 3.2 and the authors' commands (`Hyper_m`)."""

SPREAD = 0.08
"""Half the difference between the densest and the sparsest block's sparsity (`Lamda` there)."""


def outlier_share(scores: Iterable[Tensor], factor: float = OUTLIER_FACTOR) -> float:
    """Share of a block's scores that exceed `factor` times their mean.

    Args:
        scores: of all its matrices; see `wanda_scores`.
        factor: of the mean.
    """
    matrices = list(scores)
    count = sum(matrix.numel() for matrix in matrices)
    mean = sum(float(matrix.sum(dtype=torch.float64)) for matrix in matrices) / max(1, count)
    return sum(int((matrix > factor * mean).sum()) for matrix in matrices) / max(1, count)


def owl_sparsities(
    shares: Sequence[float], weights: Sequence[int], sparsity: float, spread: float = SPREAD
) -> list[float]:
    """Sparsity of each block: the more outliers, the less of it.

    Densities lie linearly in the outlier shares over a range of `2 spread`, and are shifted so that the model as a
    whole gets `sparsity`.

    Args:
        shares: `outlier_share` of each block.
        weights: how many weights each block has.
        sparsity: of all weights together.
        spread: half the range.

    Raises:
        SpinferError: a block would get a sparsity outside [0, 1).
    """
    low, high = min(shares), max(shares)
    above = [2 * spread * (share - low) / (high - low) if high > low else 0.0 for share in shares]
    mean = sum(a * w for a, w in zip(above, weights, strict=True)) / max(1, sum(weights))
    sparsities = [sparsity - a + mean for a in above]
    if not all(0 <= s < 1 for s in sparsities):
        raise SpinferError(
            f"OWL at sparsity {sparsity} asks for {min(sparsities):.3f} to {max(sparsities):.3f} in the blocks, "
            "outside [0, 1); use --allocation uniform"
        )
    return sparsities
