"""What pruning did: plain data, for messages and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spinfer.pruning.masks import is_mask


@dataclass(frozen=True)
class MatrixReport:
    """One pruned matrix.

    Attributes:
        name: see `Matrix`.
        shape: (out_features, in_features).
        zeros_before: zeros that it had.
        zeros: that it has now.
        tokens: calibration tokens that reached it; None without calibration.
        dead_inputs: inputs that were zero in all of them.
        method: that pruned it: the recipe's, or magnitude for an expert that too few tokens reach.
        damping: added to the Hessian, as a share of its mean diagonal; None where none was used.
    """

    name: str
    shape: tuple[int, int]
    zeros_before: int
    zeros: int
    tokens: int | None = None
    dead_inputs: int = 0
    method: str = "magnitude"
    damping: float | None = None

    @property
    def weights(self) -> int:
        """Zeros and nonzeros."""
        return self.shape[0] * self.shape[1]

    @property
    def was_pruned(self) -> bool:
        """Whether its zeros before were a mask, which is kept."""
        return is_mask(self.zeros_before, self.weights)


@dataclass(frozen=True)
class BlockReport:
    """One decoder block.

    Attributes:
        name: of the module.
        sparsity: that was asked for.
        matrices: that were pruned.
        error: squared error of the block's output, over the square of what the block adds to its input; both sums over
            the calibration tokens, with the inputs that the pruned blocks before it give. None without calibration.
        seconds: wall time.
    """

    name: str
    sparsity: float
    matrices: tuple[MatrixReport, ...]
    error: float | None
    seconds: float

    @property
    def weights(self) -> int:
        """Of all matrices."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def zeros(self) -> int:
        """Of all matrices."""
        return sum(matrix.zeros for matrix in self.matrices)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> BlockReport:
        """Back from `to_dict`."""
        matrices = tuple(MatrixReport(**{**m, "shape": tuple(m["shape"])}) for m in entry["matrices"])
        return cls(**{**entry, "matrices": matrices})


@dataclass(frozen=True)
class PruningReport:
    """A pruned model; sums are over the matrices that were to be pruned.

    Attributes:
        recipe: `Recipe.to_dict`.
        calibration: what text went through the model; None where none did.
        blocks: in the model's order.
        dense: Linears that were left alone, each with the reason.
        seconds: wall time, of this run.
    """

    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    blocks: tuple[BlockReport, ...]
    dense: Mapping[str, str]
    seconds: float = 0.0

    @property
    def matrices(self) -> tuple[MatrixReport, ...]:
        """Of all blocks."""
        return tuple(matrix for block in self.blocks for matrix in block.matrices)

    @property
    def weights(self) -> int:
        """Zeros and nonzeros."""
        return sum(block.weights for block in self.blocks)

    @property
    def zeros(self) -> int:
        """Zeros now."""
        return sum(block.zeros for block in self.blocks)

    @property
    def zeros_before(self) -> int:
        """Zeros that were there."""
        return sum(matrix.zeros_before for matrix in self.matrices)

    @property
    def sparsity(self) -> float:
        """Share of zeros now."""
        return self.zeros / max(1, self.weights)

    @property
    def starved(self) -> tuple[str, ...]:
        """Experts that too few tokens reached, pruned by magnitude instead."""
        return tuple(m.name for m in self.matrices if m.method != self.recipe["method"])

    def summary(self) -> dict[str, Any]:
        """For config.json: how the model was made, without the single matrices."""
        return {
            **self.recipe,
            "calibration": None if self.calibration is None else dict(self.calibration),
            "sparsity_reached": self.sparsity,
            "zeros_before": self.zeros_before,
            "block_sparsities": [block.zeros / max(1, block.weights) for block in self.blocks],
            "block_errors": [block.error for block in self.blocks],
            "starved_experts": list(self.starved),
            "dense": dict(self.dense),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.summary(),
            "weights": self.weights,
            "zeros": self.zeros,
            "blocks": [block.to_dict() for block in self.blocks],
            "seconds": self.seconds,
        }
