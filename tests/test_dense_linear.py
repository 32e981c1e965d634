"""`DenseLinear`: the same values whichever way is taken, the process's switch left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spinfer.integrations.transformers import dense_linear
from spinfer.integrations.transformers.dense_linear import DenseLinear


def adopted(bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    linear = nn.Linear(70, 50, bias=bias, dtype=dtype)
    DenseLinear.adopt(linear)
    assert isinstance(linear, DenseLinear)
    return linear


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether oneDNN was on at each product."""
    seen: list[bool] = []
    multiply = nn.functional.linear

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        seen.append(torch._C._get_mkldnn_enabled())
        return multiply(*arguments)

    monkeypatch.setattr(nn.functional, "linear", watched)
    monkeypatch.setattr(dense_linear, "_faster_without_onednn", lambda: True)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(70,), (1, 70), (1, 1, 70)])
def test_one_token_goes_without_onednn(ways: list[bool], shape: tuple[int, ...], bias: bool) -> None:
    linear, x = adopted(bias), torch.randn(shape, dtype=torch.bfloat16)
    y = linear(x)
    assert ways == [False]
    assert torch._C._get_mkldnn_enabled()
    expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert y.shape == expected.shape
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() / expected.norm() < 4e-3
    y.sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 70), torch.bfloat16), ((1, 70), torch.float32), ((1, 70), torch.float16)]
)
def test_the_rest_is_as_before(ways: list[bool], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    adopted(dtype=dtype)(torch.randn(shape, dtype=dtype))
    assert ways == [True]


def test_not_where_it_is_slower_or_onednn_is_off(ways: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = adopted(), torch.randn(1, 70, dtype=torch.bfloat16)
    monkeypatch.setattr(dense_linear, "_faster_without_onednn", lambda: False)
    linear(x)
    with torch.backends.mkldnn.flags(enabled=False):
        monkeypatch.setattr(dense_linear, "_faster_without_onednn", lambda: True)
        linear(x)
        assert not torch._C._get_mkldnn_enabled()
    assert ways == [True, False]


def test_the_switch_is_put_back_after_an_error(ways: list[bool]) -> None:
    linear = adopted()
    linear.weight = nn.Parameter(torch.zeros(50, 71, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError):
        linear(torch.zeros(1, 70, dtype=torch.bfloat16))
    assert ways == [False]
    assert torch._C._get_mkldnn_enabled()


def test_measures() -> None:
    assert dense_linear._faster_without_onednn() in (True, False)


def test_adopts_plain_linears_alone() -> None:
    class Mine(nn.Linear):
        pass

    for module in (Mine(4, 4), nn.Embedding(4, 4), None):
        before = type(module)
        DenseLinear.adopt(module)
        assert type(module) is before
