"""Open what `compress` reads: a dense checkpoint, or one that another tool compressed in a way we can import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spinfer.checkpoint import safetensors_source, torch_source
from spinfer.checkpoint.bitmask_source import FORMAT_NAME, BitmaskSource, holds_bitmask
from spinfer.checkpoint.config import QUANT_METHOD
from spinfer.checkpoint.safetensors_source import SafetensorsSource
from spinfer.checkpoint.source import TensorSource, read_config
from spinfer.checkpoint.torch_source import TorchSource
from spinfer.errors import CheckpointError

_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "sparsity_config")


def open_dense(directory: Path) -> tuple[dict[str, Any], TensorSource]:
    """Open a directory.

    Returns:
        config.json without an entry on compression, and the dense tensors.

    Raises:
        CheckpointError: not a model directory, no weights that we read, damaged ones, or quantised ones.
    """
    config = read_config(directory)
    entries = {key: config.pop(key) for key in _QUANTIZATION_KEYS if config.get(key) is not None}
    for key, entry in entries.items():
        _check_importable(directory, key, entry)
    source = _open_stored(directory, drop_tied=config.get("tie_word_embeddings", True) is not False)
    if holds_bitmask(source):
        return config, BitmaskSource(source)
    return config, source


def _open_stored(directory: Path, *, drop_tied: bool) -> TensorSource:
    """The first kind of weights that is there, in the order in which transformers looks for them."""
    if any((directory / name).exists() for name in (safetensors_source.SINGLE_NAME, safetensors_source.INDEX_NAME)):
        return SafetensorsSource(directory)
    if any((directory / name).exists() for name in (torch_source.SINGLE_NAME, torch_source.INDEX_NAME)):
        return TorchSource(directory, drop_tied=drop_tied)
    raise CheckpointError(
        f"{directory} holds no weights: expected {safetensors_source.SINGLE_NAME}, {safetensors_source.INDEX_NAME}, "
        f"{torch_source.SINGLE_NAME} or {torch_source.INDEX_NAME}"
    )


def _check_importable(directory: Path, key: str, entry: Any) -> None:
    if isinstance(entry, Mapping):
        if entry.get("quant_method") == QUANT_METHOD:
            raise CheckpointError(f"{directory} is compressed already; see it with: spinfer inspect {directory}")
        sparsity = entry.get("sparsity_config") if key != "sparsity_config" else entry
        sparse_format = sparsity.get("format") if isinstance(sparsity, Mapping) else None
        if sparse_format in (FORMAT_NAME, "dense") and not entry.get("config_groups"):
            return
        found = f"{entry.get('quant_method')} {sparse_format or entry.get('format') or ''}".strip()
    else:
        found = repr(entry)
    raise CheckpointError(
        f"{directory}/config.json: {key} says that the weights are {found}; convert them to dense fp16, bf16 or fp32 "
        f"with the tool that made them ({FORMAT_NAME} of compressed-tensors is read as it is)"
    )
