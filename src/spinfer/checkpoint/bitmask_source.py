"""A compressed-tensors `sparse-bitmask` checkpoint, read as the dense tensors that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from spinfer.checkpoint.bitmask import PARTS, BitmaskTensor
from spinfer.checkpoint.header import DTYPE_BITS, TensorInfo
from spinfer.checkpoint.source import TensorSource, pieces_of
from spinfer.errors import CheckpointError, FormatError

FORMAT_NAME = "sparse-bitmask"


def holds_bitmask(source: TensorSource) -> bool:
    """Whether any tensor of the source is in this format."""
    return any(name.endswith(".bitmask") for name in source.tensors)


class BitmaskSource:
    """A `TensorSource` that decodes tensors of another; those that are not in the format pass through."""

    def __init__(self, stored: TensorSource) -> None:
        """List the dense tensors; reads only the shapes.

        Raises:
            CheckpointError: a tensor with missing parts, or parts whose shapes or types do not fit.
        """
        self._stored = stored
        self._prefixes: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.tied: Mapping[str, str] = stored.tied
        prefixes = [name.removesuffix(".bitmask") for name in stored.tensors if name.endswith(".bitmask")]
        # Until January 2025 the parts were named after the tensor (`fc.weight.bitmask`), since then after the module
        # (`fc.bitmask`), whose only tensor in the format is its weight.
        suffix = "" if any(prefix.endswith(".weight") for prefix in prefixes) else ".weight"
        for prefix in prefixes:
            info = self._dense_info(prefix, prefix + suffix)
            self.tensors[info.name] = info
            self._prefixes[info.name] = prefix
        parts = {f"{prefix}.{part}" for prefix in prefixes for part in PARTS}
        for name, info in stored.tensors.items():
            if name in self.tensors:
                raise CheckpointError(f"{info} is there both dense and as {FORMAT_NAME}; remove one of them")
            if name not in parts:
                self.tensors[name] = info

    def _dense_info(self, prefix: str, name: str) -> TensorInfo:
        for part in PARTS:
            if f"{prefix}.{part}" not in self._stored.tensors:
                bitmask = self._stored.tensors[f"{prefix}.bitmask"]
                raise CheckpointError(f"{bitmask} lacks the part {prefix}.{part} beside it; download the model again")
        shape, compressed, bitmask, row_offsets = (self._stored.tensors[f"{prefix}.{part}"] for part in PARTS)
        dtypes = (shape.dtype, bitmask.dtype, row_offsets.dtype)
        if dtypes != ("I64", "U8", "I64") or shape.shape not in ((1,), (2,)) or DTYPE_BITS[compressed.dtype] % 8:
            raise CheckpointError(
                f"{bitmask}: its parts have dtypes {dtypes} and {compressed.dtype}; not {FORMAT_NAME}"
            )
        sizes = tuple(int(size) for size in self._stored.read(shape.name))
        if min(sizes) < 1 or bitmask.shape != (*sizes[:-1], -(-sizes[-1] // 8)):
            raise CheckpointError(f"{bitmask} has shape {bitmask.shape}, which does not fit {prefix}.shape {sizes}")
        return TensorInfo(name, compressed.dtype, sizes, compressed.file)

    def read(self, name: str) -> Tensor:
        """A fresh dense tensor.

        Raises:
            CheckpointError: parts that disagree.
        """
        if name not in self._prefixes:
            return self._stored.read(name)
        parts = (self._stored.read(f"{self._prefixes[name]}.{part}") for part in PARTS)
        try:
            return BitmaskTensor(*parts).decode()
        except FormatError as error:
            raise CheckpointError(f"{self.tensors[name]}: {error}; download the file again") from error

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The dense tensor's bytes, a piece at a time."""
        return pieces_of(self.read(name)) if name in self._prefixes else self._stored.pieces(name)


def export_config(density: float, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` with which compressed-tensors 0.9 to 0.12 reads an export.

    Args:
        density: nonzeros over weights of the exported Linears.
        ignore: Linears that stay dense.
    """
    return {
        "quant_method": "compressed-tensors",
        "version": "0.9.4",
        "sparsity_config": {
            "format": FORMAT_NAME,
            "global_sparsity": 1.0 - density,
            "ignore": ignore,
            "registry_requires_subclass": False,
            "sparsity_structure": "unstructured",
            "targets": ["Linear"],
        },
    }
