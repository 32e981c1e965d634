"""See what goes into each matrix while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spinfer.errors import SpinferError
from spinfer.pruning.statistics import InputStatistics


@dataclass(frozen=True)
class Matrix:
    """A weight to prune.

    Attributes:
        name: of its module; an expert of a fused tensor has its number behind it, `...experts.down_proj[3]`.
        weight: [out_features, in_features], the parameter itself or a view of it.
        expert: whether only some tokens reach it.
    """

    name: str
    weight: Tensor
    expert: bool = False


class Observer(TorchFunctionMode):
    """Collects the inputs of matrices that are applied by `torch.nn.functional.linear` while it is entered.

    Matrices that get the very same tensor (query, key and value; gate and up) share one `InputStatistics`.
    """

    def __init__(self, matrices: Iterable[Matrix], *, hessian: bool) -> None:
        """Watch some matrices; with `hessian` X^T X is summed, else only its diagonal."""
        super().__init__()
        self._names = {_identity(matrix.weight): matrix.name for matrix in matrices}
        self._hessian = hessian
        self._leader: dict[str, str] = {}
        self._statistics: dict[str, InputStatistics] = {}
        self._seen: list[tuple[Tensor, str]] = []

    def run(self, forward: Callable[[], Tensor]) -> Tensor:
        """Run a block once."""
        with self:
            output = forward()
        self._seen.clear()
        return output

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let every call through; note those that apply a matrix."""
        kwargs = kwargs or {}
        if func is functional.linear:
            inputs = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self._names.get(_identity(weight))
            if name is not None:
                self._note(name, inputs)
        return func(*args, **kwargs)

    def _note(self, name: str, inputs: Tensor) -> None:
        # The tensors are kept until the block has run, so that no other can come to lie where one of them was.
        leader = next((other for tensor, other in self._seen if tensor is inputs), name)
        if self._leader.setdefault(name, leader) != leader:
            raise SpinferError(f"{name} shares its input with other Linears in some runs only; leave it out")
        if leader == name:
            self._seen.append((inputs, name))
            if name not in self._statistics:
                self._statistics[name] = InputStatistics(inputs.shape[-1], inputs.device, hessian=self._hessian)
            self._statistics[name].add(inputs)

    def groups(self, matrices: Sequence[Matrix]) -> list[tuple[InputStatistics | None, list[Matrix]]]:
        """Matrices by the statistics that they share; None for those that no token reached.

        The statistics are handed over: once a caller drops them their memory is free.
        """
        members: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            members.setdefault(self._leader.get(matrix.name, matrix.name), []).append(matrix)
        statistics, self._statistics = self._statistics, {}
        return [(statistics.pop(leader, None), group) for leader, group in members.items()]


def _identity(weight: Tensor) -> tuple[int, torch.Size]:
    return weight.data_ptr(), weight.shape
