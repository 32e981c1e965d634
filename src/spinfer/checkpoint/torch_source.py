"""Tensors of a directory's `pytorch_model*.bin` files, without running what is pickled in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from spinfer.checkpoint.header import TORCH_DTYPES, TensorInfo
from spinfer.checkpoint.index import indexed_files
from spinfer.checkpoint.json_object import file_nbytes
from spinfer.checkpoint.source import pieces_of
from spinfer.errors import CheckpointError

SINGLE_NAME = "pytorch_model.bin"
INDEX_NAME = "pytorch_model.bin.index.json"

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TorchSource:
    """A `TensorSource` over files of `torch.save`, memory-mapped and read with `weights_only=True`.

    Such a file keeps tied weights as several names of one storage. With `drop_tied` only the first of them is listed,
    as `nn.Module.parameters` and `save_pretrained` do.
    """

    def __init__(self, directory: Path, *, drop_tied: bool) -> None:
        """List the files.

        Raises:
            CheckpointError: a missing or damaged file, one that needs more than tensors to be unpickled, or an index
                that disagrees with the files.
        """
        self.tensors: dict[str, TensorInfo] = {}
        tied: dict[str, str] = {}
        self.tied: Mapping[str, str] = tied
        self._loaded: dict[str, Tensor] = {}
        single = directory / SINGLE_NAME
        index = {} if single.exists() else indexed_files(directory / INDEX_NAME)
        for path in [single] if single.exists() else sorted(set(index.values())):
            first: dict[tuple[object, ...], str] = {}
            for name, tensor in _load(path).items():
                info = _info(path, name, tensor)
                if name in self.tensors or name in tied:
                    raise CheckpointError(f"{info} is in another file as well; remove one of them")
                view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if drop_tied and tensor.numel() and first.setdefault(view, name) != name:
                    tied[name] = first[view]
                    continue
                self.tensors[name], self._loaded[name] = info, tensor
        for name, path in index.items():
            if name not in tied and (name not in self.tensors or self.tensors[name].file != path):
                raise CheckpointError(
                    f"{directory / INDEX_NAME} places tensor {name!r} in {path.name}, which does not hold it; "
                    "download both files again"
                )

    def read(self, name: str) -> Tensor:
        """A fresh tensor."""
        return self._loaded[name].clone(memory_format=torch.contiguous_format)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor's bytes, a piece at a time."""
        return pieces_of(self._loaded[name])


def _load(path: Path) -> dict[str, Tensor]:
    file_nbytes(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler and the zip reader raise nearly anything on damaged bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be loaded as tensors only, memory-mapped ({reason}); it is damaged, older than torch 1.6, "
            "or holds code: convert it to safetensors where you trust it"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{path} is not a state dict; expected tensors by name")
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name!r} is a {type(tensor).__name__}, expected a tensor")
    return loaded


def _info(path: Path, name: str, tensor: Tensor) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _NAMES:
        raise CheckpointError(f"{where} is {tensor.layout}, {tensor.dtype} on {tensor.device}; cannot be converted")
    # A view with stride zero can claim any size: what is copied must not outgrow what is there.
    if tensor.numel() * tensor.itemsize > path.stat().st_size:
        raise CheckpointError(f"{where} of shape {tuple(tensor.shape)} is larger than its file; the file is damaged")
    return TensorInfo(name, _NAMES[tensor.dtype], tuple(tensor.shape), path)
