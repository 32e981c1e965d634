"""The `quantization_config` entry of a compressed checkpoint's config.json."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from spinfer.errors import CheckpointError, FormatError
from spinfer.format import FORMAT_VERSION, Geometry, TcaBmeTensor
from spinfer.format.layout import OFFSET_UNIT, VALUE_DTYPES, dtype_name, max_values_len

QUANT_METHOD = "spinfer"
FORMAT_NAME = "tca_bme"


def checksum(weight: TcaBmeTensor) -> int:
    """CRC-32 (zlib) of `dtype:rows:columns`, then the bytes of values, bitmap and offsets."""
    crc = zlib.crc32(f"{dtype_name(weight.dtype)}:{weight.shape[0]}:{weight.shape[1]}".encode())
    for part in (weight.values, weight.bitmap, weight.offsets):
        crc = zlib.crc32(part.detach().cpu().contiguous().view(torch.uint8).numpy().data, crc)
    return crc


def _parse_crc32(text: Any) -> int:
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{8}", text):
        raise ValueError(f"crc32 must be eight hexadecimal digits, found {text!r}")
    return int(text, 16)


@dataclass(frozen=True)
class ModuleEntry:
    """What config.json says of one compressed Linear.

    Attributes:
        shape: (out_features, in_features).
        nnz: nonzeros.
        values_len: length of the values array, padding included.
        dtype: type of the values on disk.
        crc32: checksum of the arrays (see `checksum`), or None from a writer that does not give it. A flipped bit
            inside the values disagrees with nothing else.
    """

    shape: tuple[int, int]
    nnz: int
    values_len: int
    dtype: torch.dtype
    crc32: int | None = None

    @classmethod
    def of(cls, weight: TcaBmeTensor) -> ModuleEntry:
        """Describe an encoded weight."""
        return cls(weight.shape, weight.nnz, weight.values.numel(), weight.dtype, checksum(weight))

    def check(self, weight: TcaBmeTensor) -> None:
        """Check an encoded weight, as it was loaded, and compare it with this entry; see `compare`.

        Raises:
            FormatError: they disagree, or the parts of the weight do.
        """
        weight.validate()
        self.compare(weight)

    def compare(self, weight: TcaBmeTensor) -> None:
        """Compare an encoded weight with this entry.

        A weight that was cast while it was loaded keeps its bitmap and offsets, but has another checksum; then only
        the rest is compared.

        Raises:
            FormatError: they disagree.
        """
        found = (weight.shape, weight.nnz, weight.values.numel())
        expected = (self.shape, self.nnz, self.values_len)
        if found != expected:
            raise FormatError(f"(shape, nnz, values) are {found}, but config.json says {expected}")
        if self.crc32 is not None and weight.dtype == self.dtype and checksum(weight) != self.crc32:
            raise FormatError("the data does not match the checksum in config.json")

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return {
            "shape": list(self.shape),
            "nnz": self.nnz,
            "values_len": self.values_len,
            "dtype": dtype_name(self.dtype),
            **({} if self.crc32 is None else {"crc32": f"{self.crc32:08x}"}),
        }

    @classmethod
    def from_dict(cls, name: str, entry: Any) -> ModuleEntry:
        """Parse and check one entry; `name` is for messages."""
        try:
            unknown = entry.keys() - {"shape", "nnz", "values_len", "dtype", "crc32"}
            if unknown:
                raise ValueError(f"unknown names {sorted(unknown)}")
            rows, cols = entry["shape"]
            numbers = (rows, cols, entry["nnz"], entry["values_len"])
            if not all(type(number) is int for number in numbers):
                raise TypeError("shape, nnz and values_len must be integers")
            crc32 = _parse_crc32(entry["crc32"]) if "crc32" in entry else None
            parsed = cls((rows, cols), entry["nnz"], entry["values_len"], VALUE_DTYPES[entry["dtype"]], crc32)
            limit = max_values_len(Geometry(*parsed.shape))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"config.json: quantization_config.modules[{name!r}] is malformed: {error}"
            ) from error
        if not 0 <= parsed.nnz <= parsed.values_len <= limit or parsed.values_len % OFFSET_UNIT:
            raise CheckpointError(
                f"config.json: quantization_config.modules[{name!r}]: nnz {parsed.nnz} and values_len "
                f"{parsed.values_len} do not fit shape {parsed.shape}"
            )
        return parsed


@dataclass(frozen=True)
class CompressionConfig:
    """The whole entry.

    Attributes:
        modules: compressed Linears by module name.
        dense: Linears left dense by module name, each with its reason.
    """

    modules: Mapping[str, ModuleEntry]
    dense: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "modules": {name: entry.to_dict() for name, entry in self.modules.items()},
            "dense": dict(self.dense),
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> CompressionConfig:
        """Parse and check.

        Raises:
            CheckpointError: another method, a format version of the future, or malformed modules.
        """
        if entry.get("quant_method") != QUANT_METHOD or entry.get("format") != FORMAT_NAME:
            found = (entry.get("quant_method"), entry.get("format"))
            raise CheckpointError(f"config.json: expected method {(QUANT_METHOD, FORMAT_NAME)}, found {found}")
        version = entry.get("format_version")
        if type(version) is not int or version < 1:
            raise CheckpointError(f"config.json: format_version is {version!r}; expected a positive integer")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"config.json: format version {version} is newer than this spinfer reads ({FORMAT_VERSION}); "
                "upgrade with: pip install --upgrade spinfer"
            )
        modules, dense = entry.get("modules"), entry.get("dense", {})
        if not isinstance(modules, Mapping) or not isinstance(dense, Mapping):
            raise CheckpointError("config.json: quantization_config.modules and .dense must be objects")
        if not all(isinstance(reason, str) for reason in dense.values()):
            raise CheckpointError("config.json: quantization_config.dense must give each reason as a string")
        return cls({name: ModuleEntry.from_dict(name, item) for name, item in modules.items()}, dict(dense))
