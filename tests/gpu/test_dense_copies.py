"""Weights with a dense copy beside them: `SPINFER_DENSE_COPIES_GIB`."""

from __future__ import annotations

import pytest
import torch
from products import DTYPES, check, random_weight
from torch import Tensor

from spinfer import SparseLinear, encode, linear, pack
from spinfer.kernels import unpack
from spinfer.kernels.cuda.layout import ChunkGrid, has_dense_copy, ranges_in
from spinfer.kernels.cuda.runtime import device_traits
from spinfer.kernels.cuda.select import Dense, choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPE = (4096, 1032)


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINFER_DENSE_COPIES_GIB", "1")


def sparse_matrix(dtype: torch.dtype, uneven: bool = False) -> Tensor:
    w = random_weight(*SHAPE, 0.4, dtype)
    if uneven:
        w[: SHAPE[0] // 8] = 1.5
    return w


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_tokens(dtype: torch.dtype, uneven: bool) -> None:
    w = sparse_matrix(dtype, uneven)
    weight = pack(encode(w))
    assert has_dense_copy(weight.parts)
    assert ranges_in(weight.parts) > 0 or not (uneven and device_traits(0).hopper)
    assert torch.equal(weight.parts[-1], w)
    assert torch.equal(unpack(weight).decode(), w)
    bias = torch.randn(SHAPE[0], device="cuda", dtype=dtype)
    for tokens in (1, 7, 33, 100, 300, 1000, 5000):
        for x in (torch.randn(tokens, SHAPE[1], device="cuda"), torch.randn(tokens, 2 * SHAPE[1], device="cuda")):
            x = x.to(dtype)[:, : SHAPE[1]]
            for b in (None, bias):
                check(linear(x, weight, b), x, w, b)


def test_many_tokens_are_multiplied_by_the_copy() -> None:
    w = sparse_matrix(torch.bfloat16)
    x = torch.randn(2, 1000, SHAPE[1], device="cuda", dtype=torch.bfloat16)
    weight = pack(encode(w))
    traits = device_traits(0)
    chosen = choose(ChunkGrid.of(*SHAPE), weight.nnz, 2000, True, traits, ranges_in(weight.parts), True)
    assert isinstance(chosen, Dense)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, w))
    weight.parts[-1].zero_()
    assert linear(x, weight).eq(0).all()
    assert not linear(x[0, :1], weight).eq(0).any(), "few read what is compressed"


def test_in_a_graph_and_compiled() -> None:
    w = sparse_matrix(torch.float16)
    layer = SparseLinear.from_weight(encode(w)).pack_()
    x = torch.randn(512, SHAPE[1], device="cuda", dtype=torch.float16)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)


def test_a_layer_counts_its_copy() -> None:
    w = sparse_matrix(torch.float16)
    layer = SparseLinear.from_weight(encode(w)).pack_()
    assert layer.weight_nbytes > w.nbytes
    held = torch.cuda.memory_allocated()
    layer.unpack_()
    assert torch.cuda.memory_allocated() < held - 0.9 * w.nbytes
    layer.to(torch.bfloat16).pack_()
    copies = [part for part in layer.buffers() if part.dim() == 2]
    assert len(copies) == 1
    assert torch.equal(copies[0], w.to(torch.bfloat16))
