"""What a compressed checkpoint holds, and what a conversion did: plain data, for tables and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spinfer.format.layout import dtype_name


@dataclass(frozen=True)
class LayerReport:
    """One compressed Linear.

    Attributes:
        name: of the module.
        shape: (out_features, in_features).
        dtype: of the values.
        nnz: nonzeros.
        nbytes: of values, bitmap and offsets.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    nnz: int
    nbytes: int

    @property
    def weights(self) -> int:
        """Weights of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """Nonzeros over weights."""
        return self.nnz / self.weights

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense matrix."""
        return self.weights * self.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return 8 * self.nbytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "nnz": self.nnz,
            "density": self.density,
            "nbytes": self.nbytes,
            "dense_nbytes": self.dense_nbytes,
            "bits_per_weight": self.bits_per_weight,
        }


@dataclass(frozen=True)
class DenseLayer:
    """A Linear that was left dense.

    Attributes:
        name: of the module.
        reason: why.
        shape: of its weight; None where the checkpoint holds none under that name (tied, or absent).
        nbytes: of its weight.
    """

    name: str
    reason: str
    shape: tuple[int, ...] | None
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        shape = None if self.shape is None else list(self.shape)
        return {"name": self.name, "reason": self.reason, "shape": shape, "nbytes": self.nbytes}


@dataclass(frozen=True)
class CheckpointReport:
    """A compressed checkpoint; the totals without `total_` are over its compressed Linears.

    Attributes:
        path: the directory.
        format_version: of the encoding.
        layers: compressed Linears.
        dense: Linears left dense.
        other_nbytes: of all tensors that belong to no compressed Linear's weight.
    """

    path: Path
    format_version: int
    layers: tuple[LayerReport, ...]
    dense: tuple[DenseLayer, ...]
    other_nbytes: int

    @property
    def weights(self) -> int:
        """Weights of the dense matrices."""
        return sum(layer.weights for layer in self.layers)

    @property
    def nnz(self) -> int:
        """Nonzeros."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def density(self) -> float:
        """Nonzeros over weights."""
        return self.nnz / max(1, self.weights)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense matrices."""
        return sum(layer.dense_nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return 8 * self.nbytes / max(1, self.weights)

    @property
    def total_nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.nbytes + self.other_nbytes

    @property
    def total_dense_nbytes(self) -> int:
        """Bytes that all tensors would take dense."""
        return self.dense_nbytes + self.other_nbytes

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "format_version": self.format_version,
            "layers": [layer.to_dict() for layer in self.layers],
            "dense": [layer.to_dict() for layer in self.dense],
            "weights": self.weights,
            "nnz": self.nnz,
            "density": self.density,
            "nbytes": self.nbytes,
            "dense_nbytes": self.dense_nbytes,
            "bits_per_weight": self.bits_per_weight,
            "other_nbytes": self.other_nbytes,
            "total_nbytes": self.total_nbytes,
            "total_dense_nbytes": self.total_dense_nbytes,
        }


@dataclass(frozen=True)
class CompressionReport:
    """What `compress_checkpoint` wrote.

    Attributes:
        checkpoint: the result.
        nonfinite: tensors that hold NaN or infinity, with how many; they are kept as they are.
        tied: names that the source stored as views of another tensor and that stay out, with that tensor's name.
        seconds: wall time.
    """

    checkpoint: CheckpointReport
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.checkpoint.to_dict(),
            "nonfinite": dict(self.nonfinite),
            "tied": dict(self.tied),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class DecompressionReport:
    """What `decompress_checkpoint` wrote.

    Attributes:
        path: the new directory.
        modules: how many Linears were decoded.
        compressed_nbytes: of all tensors before.
        nbytes: of all tensors now.
        seconds: wall time.
    """

    path: Path
    modules: int
    compressed_nbytes: int
    nbytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "modules": self.modules,
            "compressed_nbytes": self.compressed_nbytes,
            "nbytes": self.nbytes,
            "seconds": self.seconds,
        }
