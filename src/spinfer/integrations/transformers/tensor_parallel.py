"""Tensor parallelism: transformers exchanges activations between ranks, and each keeps its share of the weights.

transformers would cut the stored arrays as it cuts dense ones. So they are loaded whole, and cut by GroupTiles after.
"""

from __future__ import annotations

import re
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel, TensorParallelLayer

from spinfer.errors import SpinferError
from spinfer.format.cut import cut_columns, cut_rows
from spinfer.format.layout import GROUP_TILE
from spinfer.linear import SparseLinear


class _Rowwise(RowwiseParallel):  # type: ignore[misc]
    """Adds up as transformers does what ranks computed with an nn.Linear; outputs of ours it would make DTensors of.

    A token through 16 layers on two CPU ranks takes 40 ms so, and 55 by way of DTensors.
    """

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any) -> Any:
        if not isinstance(module, SparseLinear) or type(output) is not Tensor or output.requires_grad:
            return super().transform_output_post_forward(module, output, mesh)
        dist.all_reduce(output, group=mesh.get_group(_dimension(mesh)))
        bias = module.bias
        if bias is None:
            return output
        return output + (bias.to_local() if isinstance(bias, DTensor) else bias)


_WHOLE, _ROWWISE = "spinfer_whole", "spinfer_rowwise"
ALL_PARALLEL_STYLES.register(_WHOLE, TensorParallelLayer())
ALL_PARALLEL_STYLES.register(_ROWWISE, _Rowwise())


def _dimension(mesh: Any) -> str | None:
    """The name of a mesh's dimension along which tensors are split; a mesh of one need not have one."""
    return "tp" if mesh.ndim > 1 else None


def _rule(path: str) -> str:
    """The name under which a model's plan has a module: layer numbers are stars."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def load_whole(model: Any, path: str, module: Any) -> None:
    """Have every rank load a compressed weight as it is stored; before transformers applies the model's plan."""
    plan = getattr(model, "tp_plan", None) or {}
    if _rule(path) in plan:
        plan[f"{_rule(path)}.weight"] = _WHOLE
        if plan[_rule(path)] == "rowwise":
            plan[_rule(path)] = _ROWWISE
        module._hf_quantized_needs_local_tp = True  # transformers then calls it with local tensors


def keep_share(model: Any, path: str, module: SparseLinear) -> None:
    """Cut a loaded weight to what this rank computes with.

    Raises:
        SpinferError: a size that the weight cannot be cut for, or a style of parallelism that is not supported; the
            same on every rank.
    """
    ranks = getattr(model, "_tp_size", None) or 1
    style = (getattr(model, "tp_plan", None) or {}).get(_rule(path))
    if ranks == 1 or style is None:
        return
    if not style.startswith(("colwise", "rowwise", _ROWWISE)):
        raise SpinferError(f"{path}: compressed weights cannot be split in the style {style!r}")
    by_rows = style.startswith("colwise")
    each, rest = divmod(module.out_features if by_rows else module.in_features, ranks)
    if rest or each % GROUP_TILE:
        raise SpinferError(
            f"tensor-parallel size {ranks} cuts {path!r}, {module.out_features} x {module.in_features}, inside of a "
            f"GroupTile of {GROUP_TILE} x {GROUP_TILE}, where an encoded matrix cannot be cut; choose another size"
        )
    rank = model._device_mesh.get_local_rank(_dimension(model._device_mesh))
    module.keep_((cut_rows if by_rows else cut_columns)(module.storage.validate(), rank * each, (rank + 1) * each))
