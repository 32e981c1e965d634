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
        is_aligned: whether the encoded matrix can be cut for every rank.
    """

    shard: Shard
    rows: tuple[int, int]
    columns: tuple[int, int]
    shape: tuple[int, int]
    is_aligned: bool


def shares(layer: Any) -> list[Share]:
    """A rank's parts, in the order of the layer's output.

    Raises:
        SpinferError: a kind of linear layer that this plugin does not know.
    """
    kind, columns = type(layer), (0, layer.input_size)
    if kind is ReplicatedLinear:
        return [_of_rank(None, layer.output_size, columns, 0, 1)]
    if kind is RowParallelLinear:
        shape = (layer.output_size, layer.input_size)
        part, is_aligned = _cut(layer.input_size, layer.tp_rank, layer.tp_size)
        return [Share(None, (0, layer.output_size), part, shape, is_aligned)]
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


def _cut(size: int, rank: int, ranks: int) -> tuple[tuple[int, int], bool]:
    """A rank's range of rows or columns, and whether GroupTiles end where each rank's range does."""
    each = size // ranks
    return (rank * each, (rank + 1) * each), ranks == 1 or each % GROUP_TILE == 0


def _of_rank(shard: Shard, size: int, columns: tuple[int, int], rank: int, ranks: int) -> Share:
    rows, is_aligned = _cut(size, rank, ranks)
    return Share(shard, rows, columns, (size, columns[1]), is_aligned)


def fused(parts: list[Share]) -> list[Share]:
    """The same parts of one matrix that holds all of them below each other, as some checkpoints store them."""
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    if all(part.rows == (0, part.shape[0]) for part in parts):
        return [Share(None, (0, shape[0]), parts[0].columns, shape, all(part.is_aligned for part in parts))]
    found, above = [], 0
    for part in parts:
        rows = (above + part.rows[0], above + part.rows[1])
        found.append(Share(None, rows, part.columns, shape, part.is_aligned and above % GROUP_TILE == 0))
        above += part.shape[0]
    return found
