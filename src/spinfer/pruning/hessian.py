"""The inverse of a layer's Hessian X^T X, factored so that columns can be removed one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinfer.errors import SpinferError

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean. Source: the authors' code of SparseGPT (`percdamp`)."""

_ATTEMPTS = 3
"""With 1, 10 and 100 times the damping; past that the added diagonal outweighs what was measured."""


@dataclass(frozen=True)
class InverseFactor:
    """What `inverse_factor` found.

    Attributes:
        upper: U, upper triangular [in_features, in_features], with U^T U = (X^T X + damping)^-1.
        dead: bool [in_features], inputs that are zero in every token.
        damping: share of the mean diagonal that was added.
    """

    upper: Tensor
    dead: Tensor
    damping: float


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> InverseFactor:
    """Factor the inverse by Cholesky, with more damping where the matrix is not positive definite enough.

    Args:
        hessian: X^T X, float32 or float64 [in_features, in_features], symmetric; changed in place.
        damping: share of the mean of its diagonal to add to the diagonal first.

    Raises:
        SpinferError: half precision, values that are not finite, or no factor at 100 times the damping.
    """
    if hessian.dtype not in (torch.float32, torch.float64):
        raise SpinferError(f"the Hessian is {hessian.dtype}; sum it in float32, half precision loses the small inputs")
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise SpinferError("the layer's inputs hold NaN or infinity, or overflow float32; is the model itself sound?")
    dead = diagonal == 0
    live_mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    diagonal.masked_fill_(dead, float(live_mean) or 1.0)
    unit = diagonal.mean()
    added = 0.0
    for attempt in range(_ATTEMPTS):
        total = damping * 10**attempt
        diagonal += (total - added) * unit
        added = total
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper.diagonal()).all()):
                return InverseFactor(upper, dead, added)
    raise SpinferError(
        f"the Hessian has no Cholesky factor even with {added:.2g} of its mean diagonal added; "
        "calibrate with more or more varied text, or prune this Linear by wanda"
    )
