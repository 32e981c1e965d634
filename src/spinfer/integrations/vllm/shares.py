"""What of the checkpoint's matrices a tensor-parallel rank holds, for each of vLLM's linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from spinfer.errors import SpinferError
from spinfer.format.layout import GROUP_TILE

Shard = int | str | None
"""Which of a merged layer's matrices: "q", "k", "v"; a number; None where layer or checkpoint has but one."""


@dataclass(frozen=True)
class Share:
    """A rank's part of one matrix.

    Attributes:
        shard: the matrix.
        rows: first row and end.
        columns: first column and end.
        shape: of the whole matrix, (out_features, in_features).
    """

    shard: Shard
    rows: tuple[int, int]
    columns: tuple[int, int]
    shape: tuple[int, int]

    @property
    def is_aligned(self) -> bool:
        """Whether the encoded matrix can be cut there."""
        cuts = zip((self.rows, self.columns), self.shape, strict=True)
        return all(start % GROUP_TILE == 0 and (stop % GROUP_TILE == 0 or stop == size) for (start, stop), size in cuts)


def shares(layer: Any) -> list[Share]:
    """A rank's parts, in the order of the layer's output.

    Raises:
        SpinferError: a kind of linear layer that this plugin does not know.
    """
    kind, columns = type(layer), (0, layer.input_size)
    if kind is ReplicatedLinear:
        return [_of_rank(None, layer.output_size, columns, 0, 1)]
    if kind is RowParallelLinear:
        each = layer.input_size // layer.tp_size
        part = (layer.tp_rank * each, (layer.tp_rank + 1) * each)
        return [Share(None, (0, layer.output_size), part, (layer.output_size, layer.input_size))]
    if kind is ColumnParallelLinear:
        return [_of_rank(None, layer.output_size, columns, layer.tp_rank, layer.tp_size)]
    if kind is MergedColumnParallelLinear:
        return [
            _of_rank(shard, size, columns, layer.tp_rank, layer.tp_size)
            for shard, size in enumerate(layer.output_sizes)
        ]
    if kind is QKVParallelLinear:
        replicas = layer.num_kv_head_replicas
        heads = {
            "q": (layer.total_num_heads * layer.head_size, 1),
            "k": (layer.total_num_kv_heads * layer.head_size, replicas),
            "v": (layer.total_num_kv_heads * layer.v_head_size, replicas),
        }
        return [
            _of_rank(shard, size, columns, layer.tp_rank // copies, layer.tp_size // copies)
            for shard, (size, copies) in heads.items()
        ]
    raise SpinferError(
        f"{layer.prefix} is vLLM's {kind.__name__}, which this plugin cannot load compressed; "
        f"leave it dense: spinfer compress --ignore '{layer.prefix}'"
    )


def _of_rank(shard: Shard, size: int, columns: tuple[int, int], rank: int, ranks: int) -> Share:
    each = size // ranks
    return Share(shard, (rank * each, (rank + 1) * each), columns, (size, columns[1]))


def fused(parts: list[Share]) -> list[Share]:
    """The same parts of one matrix that holds all of them below each other, as some checkpoints store them."""
    rows = sum(part.shape[0] for part in parts)
    found, above = [], 0
    for part in parts:
        start, stop = part.rows
        found.append(Share(None, (above + start, above + stop), part.columns, (rows, part.shape[1])))
        above += part.shape[0]
    return found
