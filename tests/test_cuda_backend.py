"""What the CUDA backend says where it cannot run; no GPU needed."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spinfer import encode
from spinfer.kernels.cuda import CudaBackend, backend
from spinfer.kernels.cuda.layout import LAYOUT
from spinfer.kernels.packed import PackedWeight, WeightSpec


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What `accepts` looks at of a weight on a GPU of compute capability 9.0, with everything installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "_missing", lambda: None)
    backend._warn_once.cache_clear()
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)


def accepts(weight: Any) -> bool:
    return CudaBackend().accepts(weight)


def test_leaves_cpu_weights_alone() -> None:
    assert not accepts(encode(torch.eye(4, dtype=torch.float16)))


def test_accepts_16_bit_values(on_gpu: SimpleNamespace) -> None:
    assert accepts(on_gpu)
    on_gpu.dtype = torch.float32
    assert not accepts(on_gpu)


def test_old_gpus_are_refused_with_one_warning(on_gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match=r"compute capability 7\.5 is older"):
        assert not accepts(on_gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not accepts(on_gpu)


def test_a_missing_extra_is_named(on_gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_missing", lambda: "cuda-core is not installed (pip install 'spinfer[cuda]')")
    with pytest.warns(UserWarning, match="spinfer.cuda."):
        assert not accepts(on_gpu)


def test_layers_that_are_alike_run_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes several launches' time, and prompts have ever other numbers of tokens."""
    runs = []

    def compute(x: torch.Tensor, tokens: int, *others: Any) -> None:
        assert x.shape[0] == tokens

    def run(*key: Any) -> Any:
        runs.append(key)
        return compute

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(backend, "_run", run)
    for nnz in (4002, 3998):
        weight = PackedWeight(WeightSpec(LAYOUT, (100, 100), nnz, torch.float16), (torch.zeros(1), torch.zeros(1)))
        for tokens in (1001, 1008):
            assert CudaBackend().linear(torch.zeros(tokens, 100), weight, None).shape == (tokens, 100)
    assert runs[0][:3] == ((100, 100), 4000, 1008)
    assert len(set(runs)) == 1


def test_a_dense_copy_is_multiplied_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, bias = torch.randn(24, 16), torch.randn(24)
    weight = PackedWeight(WeightSpec(LAYOUT, (24, 16), 99, torch.float32), (torch.zeros(1), torch.zeros(1), dense))
    keys = []
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(backend, "_run", lambda *key: keys.append(key))
    for x in (torch.randn(2, 5, 16), torch.randn(10, 32)[:, :16]):
        y = CudaBackend().linear(x, weight, bias)
        assert torch.equal(y, torch.nn.functional.linear(x, dense, bias))
        assert y.is_contiguous()
    assert [key[-2:] for key in keys] == [(0, True)] * 2
