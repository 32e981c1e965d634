"""Which matrices of a model are pruned: the Linears of its decoder blocks, and its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from spinfer.checkpoint.select import Selection
from spinfer.errors import SpinferError
from spinfer.integrations.transformers.blocks import DecoderBlocks
from spinfer.model import linear_modules
from spinfer.pruning.observe import Matrix

_EXPERTS = "experts"
"""Name of the module that holds a mixture's experts, in every architecture of transformers."""

_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linears that choose experts; small, and a slip in them sends tokens astray."""


@dataclass(frozen=True)
class Targets:
    """What is pruned.

    Attributes:
        parameters: names of the parameters, by block; a Linear's weight, or all experts of a layer, [experts, out, in].
        dense: Linears that are left alone, each with the reason.
    """

    parameters: tuple[tuple[str, ...], ...]
    dense: dict[str, str]

    def matrices(self, model: PreTrainedModel, block: int) -> list[Matrix]:
        """Views of a block's parameters as they are now."""
        found = []
        for name in self.parameters[block]:
            parameter = model.get_parameter(name).data
            if parameter.dim() == 3:
                found += [Matrix(f"{name}[{i}]", weight, expert=True) for i, weight in enumerate(parameter)]
            else:
                found.append(Matrix(name.removesuffix(".weight"), parameter, expert=_EXPERTS in name.split(".")))
        return found


def targets(model: PreTrainedModel, blocks: DecoderBlocks, ignore: Sequence[str]) -> Targets:
    """Choose; the model may be on the meta device.

    Args:
        model: whose Linears are asked for.
        blocks: of the model.
        ignore: patterns of module names to leave alone; see `Selection`. Fused experts go by their parameter's name.

    Raises:
        CheckpointError: a pattern matches nothing.
        SpinferError: nothing is left to prune.
    """
    found = linear_modules(model)
    dense = dict(found.dense)
    experts = _fused_experts(model)
    selection = Selection([*found.linears, *found.dense, *experts], (), ignore)
    chosen: list[list[str]] = [[] for _ in blocks.modules]
    for name in (*found.linears, *experts):
        index = _block_of(name, blocks)
        reason = selection.refusal(name)
        if index is None:
            reason = "outside the decoder blocks"
        elif reason is None and _is_router(model, name):
            reason = "router of a mixture of experts"
        if reason is not None or index is None:
            dense[name] = reason or ""
        else:
            chosen[index].append(name if name in experts else f"{name}.weight")
    if not any(chosen):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
        raise SpinferError(f"nothing to prune in this {type(model).__name__} ({reasons or 'it has no Linear'})")
    return Targets(tuple(map(tuple, chosen)), dense)


def _block_of(name: str, blocks: DecoderBlocks) -> int | None:
    inside = name.removeprefix(f"{blocks.name}.")
    return None if inside == name else int(inside.partition(".")[0])


def _fused_experts(model: nn.Module) -> list[str]:
    """Parameters that hold all experts of a layer in one tensor, as transformers 5 does."""
    return [
        name for name, parameter in model.named_parameters() if parameter.dim() == 3 and name.split(".")[-2] == _EXPERTS
    ]


def _is_router(model: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return last in _ROUTERS and any(child == _EXPERTS for child, _ in model.get_submodule(parent).named_children())
