"""`spinfer.linear` calls the kernel without the dispatcher, but only where nobody could tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import spinfer
from spinfer import ops
from spinfer.kernels.packed import PackedWeight


@pytest.fixture
def problem() -> tuple[Tensor, PackedWeight, Tensor]:
    weight = torch.randn(40, 30) * (torch.rand(40, 30) > 0.5)
    return torch.randn(2, 3, 30), spinfer.pack(spinfer.encode(weight)), torch.randn(40)


@pytest.fixture
def shortcuts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    taken: list[bool] = []
    decide = ops._nobody_watches

    def spy(x: Tensor, bias: Tensor | None) -> bool:
        taken.append(decide(x, bias))
        return taken[-1]

    monkeypatch.setattr(ops, "_nobody_watches", spy)
    return taken


def through_the_op(x: Tensor, packed: PackedWeight, bias: Tensor) -> Tensor:
    parts = (packed.parts, packed.layout, packed.shape, packed.nnz, packed.dtype)
    return torch.ops.spinfer.linear(x, *parts, bias)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_taken_where_no_gradient_is_asked_for(problem: Any, shortcuts: list[bool], mode: Any) -> None:
    with mode():
        y = spinfer.linear(*problem)
    assert shortcuts == [True]
    assert not y.requires_grad
    assert torch.equal(y, through_the_op(*problem))


@pytest.mark.parametrize("which", ["x", "bias"])
def test_gradients_go_through_the_op(problem: Any, shortcuts: list[bool], which: str) -> None:
    x, packed, bias = problem
    leaf = (x if which == "x" else bias).requires_grad_()
    spinfer.linear(x, packed, bias).sum().backward()
    assert shortcuts == [False]
    assert leaf.grad is not None
    with torch.no_grad():
        spinfer.linear(x, packed, bias)
    assert shortcuts == [False, True]


def test_dispatch_modes_see_the_op(problem: Any) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        spinfer.linear(*problem)
    assert torch.ops.spinfer.linear.default in seen


def test_traces_hold_the_op(problem: Any) -> None:
    x, packed, bias = problem
    graph = make_fx(lambda x: spinfer.linear(x, packed, bias), tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    assert torch.ops.spinfer.linear.default in [node.target for node in graph.graph.nodes]


def test_transforms_and_subclasses_go_through_the_op(problem: Any, shortcuts: list[bool]) -> None:
    x, packed, bias = problem
    with torch.no_grad(), forward_ad.dual_level():
        spinfer.linear(x, packed, bias)
    with pytest.raises(RuntimeError, match="functorch"):  # which the op does not support
        torch.func.vjp(lambda x: spinfer.linear(x, packed, bias), x)
    spinfer.linear(torch.nn.Parameter(x, requires_grad=False), packed, bias)
    assert shortcuts == [False, False, False]
