"""Compressed directory in, dense directory out, a tensor at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import Tensor

from spinfer.checkpoint.bitmask import PARTS, BitmaskTensor
from spinfer.checkpoint.bitmask_source import FORMAT_NAME, export_config
from spinfer.checkpoint.carry import CARD_NAME, ORIGINAL_CARD_NAME, carry_over
from spinfer.checkpoint.compress import Progress
from spinfer.checkpoint.names import safetensors_dtype, storage_names
from spinfer.checkpoint.output import new_directory, refuse_existing
from spinfer.checkpoint.report import DecompressionReport
from spinfer.checkpoint.source import CONFIG_NAME
from spinfer.checkpoint.stored import CompressedCheckpoint
from spinfer.checkpoint.writer import DEFAULT_SHARD_NBYTES, Outgoing, Planned, ShardWriter, outgoing, write_json
from spinfer.errors import CheckpointError


class Target(StrEnum):
    """What to write: dense tensors, or compressed-tensors' legacy format for the Linears that were compressed."""

    DENSE = "dense"
    SPARSE_BITMASK = FORMAT_NAME


def decompress_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    target: Target | str = Target.DENSE,
    max_shard_nbytes: int = DEFAULT_SHARD_NBYTES,
    progress: Progress = lambda done, total: None,
) -> DecompressionReport:
    """Write the dense model that a compressed directory stands for; tensors are bit-identical, zeros all positive.

    Args:
        source: a compressed directory.
        output: a directory that does not exist; it appears when it is complete.
        target: kind of directory.
        max_shard_nbytes: most bytes of tensors in one file.
        progress: called after every tensor.

    Raises:
        CheckpointError: not a compressed directory, or one that is damaged.
        OutputError: the output exists or cannot be written; what was written is removed.
    """
    began = time.monotonic()
    output, target = Path(output), Target(target)
    refuse_existing(output)
    if max_shard_nbytes < 1:
        raise CheckpointError(f"max_shard_nbytes is {max_shard_nbytes}; it must be positive")
    checkpoint = CompressedCheckpoint(source)
    tensors = checkpoint.source.tensors
    compressed_nbytes = sum(info.nbytes for info in tensors.values())
    with (
        new_directory(output) as partial,
        ShardWriter(partial, list(_plan(checkpoint, target)), max_shard_nbytes) as writer,
    ):
        done = 0
        for names, group in _groups(checkpoint, target):
            writer.write(group)
            done += sum(tensors[name].nbytes for name in names)
            progress(done, compressed_nbytes)
        nbytes = writer.finish()
        carry_over(checkpoint.directory, partial, {CARD_NAME: "", ORIGINAL_CARD_NAME: CARD_NAME})
        write_json(partial / CONFIG_NAME, _config(checkpoint, target))
    modules = len(checkpoint.compression.modules)
    return DecompressionReport(output, modules, compressed_nbytes, nbytes, time.monotonic() - began)


def _items(checkpoint: CompressedCheckpoint) -> Iterator[tuple[str, str | None]]:
    """Tensors of the dense model in the order of the files, with the module of those that are encoded."""
    owners: dict[str, str | None] = {}
    for module in checkpoint.compression.modules:
        values, bitmap, offsets = storage_names(module)
        owners |= {values: module, bitmap: None, offsets: None}
    for name in checkpoint.source.tensors:
        owner = owners.get(name, "")
        if owner is not None:
            yield name, owner or None


def _plan(checkpoint: CompressedCheckpoint, target: Target) -> Iterator[Planned]:
    for name, module in _items(checkpoint):
        if module is None:
            info = checkpoint.source.tensors[name]
            yield Planned((name,), info.nbytes, len(info.shape))
        elif target is Target.DENSE:
            entry = checkpoint.compression.modules[module]
            yield Planned((name,), entry.shape[0] * entry.shape[1] * entry.dtype.itemsize, 2)
        else:
            entry = checkpoint.compression.modules[module]
            names = tuple(_part_names(module))
            for part in names:
                if part in checkpoint.source.tensors:
                    raise CheckpointError(f"{checkpoint.source.tensors[part]} has the name of a part to be written")
            yield Planned(names, entry.nnz * entry.dtype.itemsize, 2)


def _groups(checkpoint: CompressedCheckpoint, target: Target) -> Iterator[tuple[tuple[str, ...], list[Outgoing]]]:
    """Names of the stored tensors that go into each group of the plan, and what to write for them."""
    for name, module in _items(checkpoint):
        if module is None:
            yield (name,), [Outgoing(checkpoint.source.tensors[name], checkpoint.source.pieces(name))]
        else:
            dense = checkpoint.load(module).decode()
            yield storage_names(module), _decoded(module, name, dense, target)


def _part_names(module: str) -> dict[str, str]:
    """Names of a module's tensors in the `sparse-bitmask` format, each with its part."""
    return {f"{module}.{part}": part for part in PARTS}


def _decoded(module: str, name: str, dense: Tensor, target: Target) -> list[Outgoing]:
    if target is Target.DENSE:
        return [outgoing(name, safetensors_dtype(dense.dtype), dense)]
    encoded = BitmaskTensor.encode(dense)
    parts: dict[str, Tensor] = {stored: getattr(encoded, part) for stored, part in _part_names(module).items()}
    return [outgoing(stored, safetensors_dtype(part.dtype), part) for stored, part in parts.items()]


def _config(checkpoint: CompressedCheckpoint, target: Target) -> dict[str, Any]:
    if target is Target.DENSE:
        return checkpoint.config
    modules = checkpoint.compression.modules.values()
    weights = sum(entry.shape[0] * entry.shape[1] for entry in modules)
    density = sum(entry.nnz for entry in modules) / max(1, weights)
    entry = export_config(density, sorted(checkpoint.compression.dense))
    return {**checkpoint.config, "quantization_config": entry}
