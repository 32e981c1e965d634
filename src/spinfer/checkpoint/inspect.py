"""What a compressed directory holds, from config.json and the headers alone."""

from __future__ import annotations

from pathlib import Path

from spinfer.checkpoint.names import natural_order, storage_names
from spinfer.checkpoint.report import CheckpointReport, DenseLayer, LayerReport
from spinfer.checkpoint.stored import CompressedCheckpoint
from spinfer.format import FORMAT_VERSION


def inspect_checkpoint(path: str | Path) -> CheckpointReport:
    """Describe a compressed directory, layers in the order of their names; no tensor is read.

    Raises:
        CheckpointError: not a compressed directory, damaged headers, or headers that disagree with config.json.
    """
    checkpoint = CompressedCheckpoint(path)
    tensors = checkpoint.source.tensors
    modules, left = checkpoint.compression.modules, checkpoint.compression.dense
    layers = []
    for name in sorted(modules, key=natural_order):
        entry, nbytes = modules[name], sum(info.nbytes for info in checkpoint.infos(name))
        layers.append(LayerReport(name, entry.shape, entry.dtype, entry.nnz, nbytes))
    dense = []
    for name in sorted(left, key=natural_order):
        info = tensors.get(storage_names(name)[0])
        dense.append(DenseLayer(name, left[name], info.shape if info else None, info.nbytes if info else 0))
    total = sum(info.nbytes for info in tensors.values())
    return CheckpointReport(
        path=checkpoint.directory,
        format_version=FORMAT_VERSION,
        layers=tuple(layers),
        dense=tuple(dense),
        other_nbytes=total - sum(layer.nbytes for layer in layers),
    )
