"""Load a rank's share of compressed matrices into one of vLLM's linear layers, and compute with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import LinearMethodBase

from spinfer.checkpoint.config import ModuleEntry
from spinfer.errors import CheckpointError, FormatError, SpinferError
from spinfer.format import TcaBmeTensor, encode
from spinfer.format.cut import can_join_rows, cut_columns, cut_rows, join_rows
from spinfer.integrations.vllm.agree import agree
from spinfer.integrations.vllm.shares import Shard, Share, fused, shares
from spinfer.kernels import PackedWeight, pack, prepare
from spinfer.linear import STORAGE_NAMES


class SpinferLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One layer's weight: collected part by part, cut, packed as soon as it is complete, then multiplied with.

    Args:
        prefix: the layer's name.
        sources: name and entry of the compressed modules that make it up, by shard.
        note: is told what is in the graphs of this layer, as text.
    """

    def __init__(
        self, prefix: str, sources: Mapping[Shard, tuple[str, ModuleEntry]], note: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._prefix = prefix
        self._sources = sources
        self._note = note
        self._parts: dict[Shard, dict[str, Tensor]] = {}
        self._pieces: dict[Share, TcaBmeTensor] = {}
        self._shares: list[Share] = []
        self._dtype = torch.bfloat16
        self._weights: list[PackedWeight] = []
        self._calls: tuple[tuple[Any, ...], ...] = ()
        self._error: str | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make empty parameters under the names of the checkpoint, which collect what vLLM loads.

        Raises:
            SpinferError: the layer cannot be cut for its tensor-parallel size; the same on every rank.
        """
        self._shares = fused(shares(layer)) if None in self._sources else shares(layer)
        for share in self._shares:
            if share.shard in self._sources:
                self._check(share, layer.tp_size)
        self._dtype = params_dtype
        for name, dtype in zip(STORAGE_NAMES, (params_dtype, torch.int64, torch.int32), strict=True):
            parameter: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = functools.partial(self._load, name)
            layer.register_parameter(name, parameter)

    def _check(self, share: Share, ranks: int) -> None:
        name, entry = self._sources[share.shard]
        if entry.shape != share.shape:
            raise CheckpointError(
                f"config.json compresses {name!r} as {entry.shape}, but vLLM's model has {share.shape}; "
                "config.json and weights belong to different models"
            )
        if not share.is_aligned:
            raise SpinferError(
                f"tensor-parallel size {ranks} cuts {name!r}, {entry.shape[0]} x {entry.shape[1]}, inside of a "
                "GroupTile of 64 x 64, where an encoded matrix cannot be cut; choose another size"
            )

    def _load(self, part: str, parameter: nn.Parameter, loaded: Tensor, shard: Shard = None) -> None:
        """Take one array of one matrix, as vLLM's weight loader. What is wrong is told after loading, on all ranks."""
        if self._error is not None:
            return
        if loaded.dim() == 2:  # one of a merged layer's matrices was left dense
            for share in self._shares:
                if share.shard == shard:
                    dense = loaded[slice(*share.rows), slice(*share.columns)]
                    self._pieces[share] = encode(dense.to(parameter.device, self._dtype))
        else:
            parts = self._parts.setdefault(shard, {})
            parts[part] = loaded
            if len(parts) == len(STORAGE_NAMES):
                del self._parts[shard]
                self._cut(shard, parts, parameter.device)
        if len(self._pieces) == len(self._shares):
            self._weights = [pack(weight, validated=True) for weight in self._joined()]
            self._pieces.clear()
            for weight in self._weights:
                prepare(weight)

    def _cut(self, shard: Shard, parts: dict[str, Tensor], device: torch.device) -> None:
        """Check a matrix as the checkpoint has it, and keep the rank's shares of it."""
        name, entry = self._sources[shard]
        try:
            values, bitmap, offsets = (parts[part] for part in STORAGE_NAMES)
            stored = TcaBmeTensor(values, bitmap, offsets, entry.shape, entry.nnz)
            entry.check(stored)
            weight = stored.to(device).validate()
        except FormatError as error:
            self._error = f"{name} is damaged: {error}; download or compress the model again"
            return
        weight = dataclasses.replace(weight, values=weight.values.to(self._dtype))
        for share in self._shares:
            if share.shard == shard:
                piece = weight if share.columns == (0, entry.shape[1]) else cut_columns(weight, *share.columns)
                self._pieces[share] = piece if share.rows == (0, entry.shape[0]) else cut_rows(piece, *share.rows)

    def _joined(self) -> list[TcaBmeTensor]:
        """The shares below each other, in as few matrices as their rows allow."""
        groups: list[list[TcaBmeTensor]] = []
        for share in self._shares:
            piece = self._pieces[share]
            if groups and can_join_rows([weight.shape[0] for weight in (*groups[-1], piece)]):
                groups[-1].append(piece)
            else:
                groups.append([piece])
        return [join_rows(group) for group in groups]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the packed arrays into the layer.

        Raises:
            CheckpointError: parts that are missing or damaged, on any rank; every rank raises the same.
        """
        if self._calls:  # vLLM may process a layer again
            return
        agree(get_tp_group(), self._error or self._missing())
        for name in STORAGE_NAMES[1:]:
            delattr(layer, name)
        calls = []
        for index, weight in enumerate(self._weights):
            names = tuple(f"packed_{index}_{number}" for number in range(len(weight.parts)))
            for name, part in zip(names, weight.parts, strict=True):
                layer.register_parameter(name, nn.Parameter(part, requires_grad=False))
            # Rounded, torch.compile makes one graph for layers that are alike.
            calls.append((names, weight.layout, list(weight.shape), weight.spec.rounded_nnz, weight.dtype))
            self._note(f"{self._prefix} {calls[-1]} {[tuple(part.shape) for part in weight.parts]}")
        self._calls = tuple(calls)
        self._weights.clear()

    def _missing(self) -> str | None:
        """What did not come, or None."""
        if self._weights:
            return None
        for shard, (name, _) in self._sources.items():
            if not any(share.shard == shard and share in self._pieces for share in self._shares):
                lacking = [part for part in STORAGE_NAMES if part not in self._parts.get(shard, {})]
                return f"{', '.join(f'{name}.{part}' for part in lacking)} missing from the checkpoint's files"
        return f"{self._prefix}: a dense weight is missing from the checkpoint's files"

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute y = x W^T + bias; x is (..., K), y (..., M) of x's dtype."""
        outputs, row = [], 0
        for names, layout, shape, nnz, dtype in self._calls:
            parts = [getattr(layer, name) for name in names]
            part = bias if bias is None or len(self._calls) == 1 else bias[row : row + shape[0]]
            outputs.append(torch.ops.spinfer.linear(x, parts, layout, shape, nnz, dtype, part))
            row += shape[0]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
