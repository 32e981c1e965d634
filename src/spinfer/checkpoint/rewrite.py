"""A dense directory with some tensors replaced: all others, and the files beside them, are copied bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spinfer.checkpoint.carry import CARD_NAME, carry_over
from spinfer.checkpoint.names import safetensors_dtype
from spinfer.checkpoint.output import new_directory, writing
from spinfer.checkpoint.source import CONFIG_NAME, TensorSource
from spinfer.checkpoint.writer import Outgoing, Planned, ShardWriter, outgoing, write_json


def rewrite_checkpoint(
    source: Path,
    output: Path,
    tensors: TensorSource,
    replaced: Mapping[str, Callable[[], Tensor]],
    *,
    config: Mapping[str, Any],
    card: str,
    max_shard_nbytes: int,
) -> None:
    """Write safetensors; memory holds one replaced tensor at a time.

    Args:
        source: the model directory.
        output: a directory that does not exist; it appears when it is complete.
        tensors: of the source.
        replaced: gives the new tensor for a stored name; of the same shape and type.
        config: the new config.json.
        card: the new model card.
        max_shard_nbytes: most bytes of tensors in one file.

    Raises:
        OutputError: the output exists or cannot be written; what was written is removed.
    """
    plan = [Planned((info.name,), info.nbytes, len(info.shape)) for info in tensors.tensors.values()]
    with new_directory(output) as partial, ShardWriter(partial, plan, max_shard_nbytes) as writer:
        for group in _groups(tensors, replaced):
            writer.write(group)
        writer.finish()
        carry_over(source, partial, {CARD_NAME: ""})
        write_json(partial / CONFIG_NAME, dict(config))
        with writing(partial / CARD_NAME):
            (partial / CARD_NAME).write_text(card, encoding="utf-8")


def _groups(tensors: TensorSource, replaced: Mapping[str, Callable[[], Tensor]]) -> Iterator[list[Outgoing]]:
    for name, info in tensors.tensors.items():
        if name not in replaced:
            yield [Outgoing(info, tensors.pieces(name))]
            continue
        tensor = replaced[name]()
        if safetensors_dtype(tensor.dtype) != info.dtype or tuple(tensor.shape) != info.shape:
            raise RuntimeError(f"{info} is to be replaced by {tensor.dtype} {list(tensor.shape)}")
        yield [outgoing(name, info.dtype, tensor)]
