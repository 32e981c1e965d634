"""A compressed directory: config.json and headers are checked when it is opened, data when it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spinfer.checkpoint.config import FORMAT_NAME, CompressionConfig
from spinfer.checkpoint.header import TensorInfo
from spinfer.checkpoint.names import safetensors_dtype, storage_module, storage_names
from spinfer.checkpoint.safetensors_source import INDEX_NAME, SINGLE_NAME, SafetensorsSource
from spinfer.checkpoint.source import CONFIG_NAME, read_config
from spinfer.errors import CheckpointError, FormatError
from spinfer.format import Geometry, TcaBmeTensor


def check_headers(origin: str | Path, tensors: Mapping[str, TensorInfo], compression: CompressionConfig) -> None:
    """Compare what config.json says with what the files hold, before any data is read.

    Args:
        origin: the directory, for messages.
        tensors: all stored tensors by name.
        compression: the parsed entry of config.json.

    Raises:
        CheckpointError: an array of a compressed module is missing, or has another type or length.
    """
    for name, entry in compression.modules.items():
        geometry = Geometry(*entry.shape)
        expected = (
            (safetensors_dtype(entry.dtype), entry.values_len),
            ("I64", geometry.bitmap_words),
            ("I32", geometry.offsets_len),
        )
        for stored, (dtype, length) in zip(storage_names(name), expected, strict=True):
            info = tensors.get(stored)
            if info is None:
                raise CheckpointError(
                    f"{origin}: tensor {stored!r} of compressed module {name!r} is missing; download the model again"
                )
            if (info.dtype, info.shape) != (dtype, (length,)):
                raise CheckpointError(
                    f"{info} is {info.dtype} {list(info.shape)}, but {CONFIG_NAME} asks for {dtype} [{length}]; "
                    "config.json and weights are of different models, download both again"
                )


class CompressedCheckpoint:
    """An opened directory; no tensor is in memory.

    Attributes:
        directory: where it is.
        config: config.json without `quantization_config`.
        compression: that entry.
        source: all stored tensors.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open a directory.

        Raises:
            CheckpointError: not a directory that `compress_checkpoint` or `save_pretrained` wrote, a format version of
                the future, damaged or missing files, or headers that disagree with config.json.
        """
        self.directory = Path(directory)
        self.config: dict[str, Any] = read_config(self.directory)
        entry = self.config.pop("quantization_config", None)
        if not isinstance(entry, dict):
            raise CheckpointError(
                f"{self.directory / CONFIG_NAME} has no quantization_config, so the model is not compressed; "
                f"compress it with: spinfer compress {self.directory} -o OUT"
            )
        try:
            self.compression = CompressionConfig.from_dict(entry)
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory}: {error}") from error
        if not any((self.directory / name).exists() for name in (SINGLE_NAME, INDEX_NAME)):
            raise CheckpointError(f"{self.directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; download it again")
        self.source = SafetensorsSource(self.directory)
        check_headers(self.directory, self.source.tensors, self.compression)
        for info in self.source.tensors.values():
            owner = storage_module(info.name)
            if owner is not None and owner not in self.compression.modules:
                raise CheckpointError(
                    f"{info} belongs to a compressed module that {CONFIG_NAME} does not list; "
                    "config.json and weights are of different models, download both again"
                )

    def infos(self, name: str) -> tuple[TensorInfo, TensorInfo, TensorInfo]:
        """Headers of a module's (values, bitmap, offsets)."""
        values, bitmap, offsets = storage_names(name)
        tensors = self.source.tensors
        return tensors[values], tensors[bitmap], tensors[offsets]

    def load(self, name: str) -> TcaBmeTensor:
        """Read one compressed weight and check it.

        Raises:
            CheckpointError: parts that disagree with each other, config.json or the checksum.
        """
        entry = self.compression.modules[name]
        infos = self.infos(name)
        values, bitmap, offsets = (self.source.read(info.name) for info in infos)
        try:
            weight = TcaBmeTensor(values, bitmap, offsets, entry.shape, entry.nnz).validate()
            entry.check(weight)
        except FormatError as error:
            files = " and ".join(sorted({str(info.file) for info in infos}))
            raise CheckpointError(
                f"{files}: {FORMAT_NAME} weight {name!r} is damaged: {error}; download or compress the model again"
            ) from error
        return weight

    def load_all(self) -> Iterator[tuple[str, TcaBmeTensor]]:
        """Every compressed weight with its module's name, read and checked one at a time."""
        for name in self.compression.modules:
            yield name, self.load(name)
