"""How a model is to be pruned: checked once, then only read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from spinfer.errors import SpinferError
from spinfer.pruning.allocation import OUTLIER_FACTOR, SPREAD
from spinfer.pruning.hessian import DAMPING
from spinfer.pruning.masks import check_sparsity
from spinfer.pruning.pattern import Pattern
from spinfer.pruning.sparsegpt import BLOCK_SIZE


class Method(StrEnum):
    """Which weights go, and compared with which others."""

    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    SPARSEGPT = "sparsegpt"


class Allocation(StrEnum):
    """How zeros are spread over the blocks."""

    UNIFORM = "uniform"
    OWL = "owl"


@dataclass(frozen=True)
class Recipe:
    """What decides the result, the model and the calibration text aside.

    Attributes:
        method: of choosing weights.
        sparsity: share of zeros among the weights that are pruned; what `pattern` says, where there is one.
        pattern: N:M; None is unstructured.
        allocation: over the blocks.
        damping: of the Hessian; see `inverse_factor`.
        block_size: columns whose weights compete in SparseGPT.
        outlier_factor: of OWL; see `outlier_share`.
        spread: of OWL; see `owl_sparsities`.
    """

    method: Method = Method.SPARSEGPT
    sparsity: float = 0.5
    pattern: Pattern | None = None
    allocation: Allocation = Allocation.UNIFORM
    damping: float = DAMPING
    block_size: int = BLOCK_SIZE
    outlier_factor: float = OUTLIER_FACTOR
    spread: float = SPREAD

    @classmethod
    def of(
        cls,
        *,
        method: str = Method.SPARSEGPT,
        sparsity: float | None = None,
        pattern: str | None = None,
        allocation: str = Allocation.UNIFORM,
    ) -> Recipe:
        """From what a user gives; a sparsity that is not given is the pattern's, or one half.

        Raises:
            SpinferError: an unknown word, a sparsity outside [0, 1), or choices that contradict each other.
        """
        for kind, word in ((Method, method), (Allocation, allocation)):
            if word not in list(kind):
                raise SpinferError(f"{kind.__name__.lower()} {word!r} is unknown; choose from {', '.join(kind)}")
        parsed = None if pattern is None else Pattern.parse(pattern)
        if sparsity is None:
            sparsity = 0.5 if parsed is None else parsed.sparsity
        check_sparsity(sparsity)
        if parsed is not None and abs(sparsity - parsed.sparsity) > 1e-9:
            raise SpinferError(
                f"pattern {parsed} means sparsity {parsed.sparsity:g}, but {sparsity:g} is asked for; leave one out"
            )
        if parsed is not None and allocation == Allocation.OWL:
            raise SpinferError(f"pattern {parsed} fixes the sparsity of every block; use --allocation uniform with it")
        return cls(Method(method), sparsity, parsed, Allocation(allocation))

    @property
    def needs_calibration(self) -> bool:
        """Whether text must run through the model."""
        return self.method is not Method.MAGNITUDE or self.allocation is Allocation.OWL

    def to_dict(self) -> dict[str, Any]:
        """For JSON; only what has a say in this recipe."""
        entry: dict[str, Any] = {
            "method": self.method.value,
            "sparsity": self.sparsity,
            "pattern": None if self.pattern is None else str(self.pattern),
            "allocation": self.allocation.value,
        }
        if self.method is Method.SPARSEGPT:
            entry |= {"damping": self.damping, "block_size": self.block_size}
        if self.allocation is Allocation.OWL:
            entry |= {"outlier_factor": self.outlier_factor, "spread": self.spread}
        return entry


def describe(entry: Mapping[str, Any]) -> str:
    """A recipe's dictionary in words, for one line."""
    shape = f"{entry['pattern']} pattern" if entry["pattern"] else f"{entry['sparsity']:.0%} zeros"
    return f"{entry['method']}, {shape}, {entry['allocation']} allocation"
