"""Tensors of a directory's safetensors files, read by byte range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from spinfer.checkpoint.header import TORCH_DTYPES, TensorInfo, read_header
from spinfer.checkpoint.index import indexed_files
from spinfer.checkpoint.source import PIECE_NBYTES
from spinfer.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class SafetensorsSource:
    """A `TensorSource` over one or several safetensors files; memory holds only what is being read."""

    tied: Mapping[str, str] = {}

    def __init__(self, directory: Path) -> None:
        """List the files.

        Raises:
            CheckpointError: a missing or damaged file, an index that disagrees with the files, or a tensor that is in
                two files.
        """
        self.tensors: dict[str, TensorInfo] = {}
        single = directory / SINGLE_NAME
        index = {} if single.exists() else indexed_files(directory / INDEX_NAME)
        for path in [single] if single.exists() else sorted(set(index.values())):
            for name, info in read_header(path).items():
                if name in self.tensors:
                    raise CheckpointError(f"{info} is in {self.tensors[name].file.name} as well; remove one of them")
                self.tensors[name] = info
        for name, path in index.items():
            if name not in self.tensors or self.tensors[name].file != path:
                raise CheckpointError(
                    f"{directory / INDEX_NAME} places tensor {name!r} in {path.name}, which does not hold it; "
                    "download both files again"
                )

    def read(self, name: str) -> Tensor:
        """A fresh tensor.

        Raises:
            CheckpointError: the file cannot be read, or torch has no such element type.
        """
        info = self.tensors[name]
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{info}: torch has no element type {info.dtype}")
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        _read_into(data, info, 0)
        return data.view(TORCH_DTYPES[info.dtype]).view(info.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor's bytes, a piece at a time."""
        info = self.tensors[name]
        for start in range(0, info.nbytes, PIECE_NBYTES):
            piece = torch.empty(min(PIECE_NBYTES, info.nbytes - start), dtype=torch.uint8)
            _read_into(piece, info, start)
            yield piece


def _read_into(data: Tensor, info: TensorInfo, start: int) -> None:
    view = data.numpy().data
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset + start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{info}: the file ended early; download it again")
                view = view[count:]
    except OSError as error:
        raise CheckpointError(f"{info}: cannot be read: {error.strerror}") from error
