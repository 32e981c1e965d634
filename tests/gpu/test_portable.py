"""The format and the portable path on CUDA: the same bytes as on the CPU, and the oracle's numbers."""

from __future__ import annotations

import copy

import pytest
import torch

import spinfer
from spinfer import SparseLinear
from spinfer.errors import SpinferError
from spinfer.kernels import TILEWISE
from spinfer.kernels.packed import as_packed
from support import DTYPES, EPS, bits, expected_decode, relative_error, sparse

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1), (64, 64), (65, 63), (200, 7), (300, 500), (2100, 2100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bytes_as_on_the_cpu(shape: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    weight = sparse(*shape, dtype, density)
    on_cpu, on_cuda = spinfer.encode(weight), spinfer.encode(weight.cuda())
    assert on_cuda.device.type == "cuda"
    assert on_cuda.nnz == on_cpu.nnz
    assert torch.equal(bits(on_cuda.values), bits(on_cpu.values))
    assert torch.equal(on_cuda.bitmap.cpu(), on_cpu.bitmap)
    assert torch.equal(on_cuda.offsets.cpu(), on_cpu.offsets)
    assert torch.equal(bits(on_cuda.validate().decode()), expected_decode(weight))
    assert torch.equal(bits(on_cpu.to("cuda").decode()), expected_decode(weight))
    assert torch.equal(bits(on_cuda.to("cpu").decode()), expected_decode(weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_pattern(dtype: torch.dtype) -> None:
    weight = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    assert torch.equal(bits(spinfer.encode(weight.cuda()).decode()), expected_decode(weight))


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(333, 200).cuda()
    whole = spinfer.encode(weight)
    monkeypatch.setattr("spinfer.format.codec._CHUNK_WEIGHTS", 1)
    pieces = spinfer.encode(weight)
    assert torch.equal(bits(pieces.values), bits(whole.values))
    assert torch.equal(pieces.bitmap, whole.bitmap)
    assert torch.equal(bits(whole.decode()), expected_decode(weight.cpu()))


def test_validate_on_cuda() -> None:
    encoded = spinfer.encode(sparse(128, 190).cuda())
    encoded.offsets[3] += 1
    with pytest.raises(SpinferError, match="GroupTile 2"):
        encoded.validate()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [*range(18), 31, 32, 33, 64, 128, 500])
def test_linear_against_the_oracle(tokens: int, dtype: torch.dtype) -> None:
    weight = spinfer.encode(sparse(130, 150, dtype).cuda())
    x = torch.randn(tokens, 150, device="cuda").to(dtype)
    bias = torch.randn(130, device="cuda").to(dtype)
    y = spinfer.linear(x, weight, bias)
    assert (y.shape, y.dtype, y.device) == ((tokens, 130), dtype, x.device)
    assert relative_error(y, x, weight, bias) <= EPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_panels(dtype: torch.dtype) -> None:
    weight = spinfer.encode(sparse(3000, 17000, dtype, density=0.3).cuda())
    x = torch.randn(3, 17000, device="cuda").to(dtype)
    assert relative_error(spinfer.linear(x, weight), x, weight) <= EPS[dtype]


def test_gradient() -> None:
    weight = sparse(200, 90, torch.float32).cuda()
    x, grad = torch.randn(5, 90, device="cuda", requires_grad=True), torch.randn(5, 200, device="cuda")
    spinfer.linear(x, spinfer.encode(weight)).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-4, atol=1e-3)


def test_another_stream() -> None:
    weight = spinfer.encode(sparse(200, 90).cuda())
    x = torch.randn(5, 90, device="cuda").half()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = spinfer.linear(x, weight)
    stream.synchronize()
    assert relative_error(y, x, weight) <= EPS[torch.float16]


def test_one_panel_can_be_captured_in_a_graph() -> None:
    weight = as_packed(spinfer.encode(sparse(200, 90).cuda()))
    x = torch.randn(5, 90, device="cuda").half()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            TILEWISE.linear(x, weight, None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = TILEWISE.linear(x, weight, None)
    x.copy_(torch.randn(5, 90, device="cuda"))
    y.fill_(torch.nan)
    graph.replay()
    assert relative_error(y, x, TILEWISE.unpack(weight)) <= EPS[torch.float16]


def test_a_module_moves_and_saves_the_same_bytes() -> None:
    dense = torch.nn.Linear(90, 70, dtype=torch.float16)
    dense.weight.data = sparse(70, 90)
    module = SparseLinear.from_linear(dense)
    expected = {name: part.clone() for name, part in module.state_dict().items()}
    on_cuda = copy.deepcopy(module).cuda()
    assert on_cuda.is_packed
    for name, part in on_cuda.state_dict().items():
        assert part.device.type == "cuda"
        assert torch.equal(part.cpu(), expected[name])
    back = on_cuda.cpu()
    for name, part in back.state_dict().items():
        assert torch.equal(part, expected[name])


def test_compile() -> None:
    weight = spinfer.encode(sparse(70, 90).cuda())
    x = torch.randn(4, 90, device="cuda").half()
    compiled = torch.compile(lambda x: spinfer.linear(x, weight) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), spinfer.linear(x, weight) + 1)


def test_devices_must_agree() -> None:
    with pytest.raises(SpinferError, match="move one of them"):
        spinfer.linear(torch.zeros(1, 90), spinfer.encode(sparse(70, 90).cuda()))
