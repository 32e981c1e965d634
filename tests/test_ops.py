"""`spinfer.linear` against the float64 oracle and against dense autograd; compile, export and opcheck."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

import spinfer
from spinfer import kernels
from spinfer.errors import SpinferError
from spinfer.kernels import PackedWeight, tilewise
from spinfer.kernels.packed import STORAGE_LAYOUT, as_packed
from support import DTYPES, EPS, ReversedBackend, relative_error, sparse

TOKENS = (*range(18), 31, 32, 33, 64, 128)


@pytest.fixture(autouse=True)
def nan_filled_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an implementation forgets to write shows up as NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    encoded = spinfer.encode(weight)
    y = spinfer.linear(x, encoded, bias)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    assert y.is_contiguous()
    assert relative_error(y, x, encoded, bias) <= EPS[x.dtype]
    return y


class TestAgainstTheOracle:
    def test_uninitialised_memory_is_nan_here(self) -> None:
        assert torch.empty(64).isnan().all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", TOKENS)
    def test_tokens(self, tokens: int, dtype: torch.dtype) -> None:
        check(torch.randn(tokens, 150).to(dtype), sparse(130, 150, dtype), torch.randn(130).to(dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 1), (7, 9), (63, 65), (64, 64), (65, 63), (200, 129), (1, 300), (300, 1)])
    def test_ragged_shapes(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        for tokens in (1, 5):
            check(torch.randn(tokens, shape[1]).to(dtype), sparse(*shape, dtype))

    @pytest.mark.parametrize(("x_dtype", "value_dtype"), list(itertools.product(DTYPES, DTYPES)))
    def test_mixed_dtypes(self, x_dtype: torch.dtype, value_dtype: torch.dtype) -> None:
        check(torch.randn(3, 150).to(x_dtype), sparse(130, 150, value_dtype), torch.randn(130).to(x_dtype))

    @pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.float32])
    def test_a_weight_out_of_the_range_of_x(self, value_dtype: torch.dtype) -> None:
        """fp16 ends at 65504: the wider of the two types decides how they are multiplied."""
        weight = sparse(70, 90, value_dtype) * 2.0**20
        y = check((torch.randn(4, 90) * 2.0**-14).half(), weight)
        assert y.isfinite().all()

    @pytest.mark.parametrize("shape", [(90,), (5, 90), (2, 3, 90), (2, 1, 3, 90), (2, 0, 90)])
    def test_rank(self, shape: tuple[int, ...]) -> None:
        check(torch.randn(shape), sparse(70, 90, torch.float32), torch.randn(70))

    @pytest.mark.parametrize(
        "x",
        [
            torch.randn(90, 5).t(),
            torch.randn(5, 180)[:, ::2],
            torch.randn(5, 100)[:, 7:97],
            torch.randn(10, 90)[::2],
            torch.randn(1, 90).expand(5, -1),
            torch.randn(5, 1).expand(-1, 90),
            torch.randn(3, 4, 90).transpose(0, 1),
        ],
        ids=["transposed", "every second", "offset", "rows", "expanded", "constant", "3-D"],
    )
    def test_strided_x(self, x: Tensor) -> None:
        before = x.clone()
        check(x, sparse(70, 90, torch.float32))
        assert torch.equal(x, before)

    @pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
    def test_densities(self, density: float) -> None:
        y = check(torch.randn(3, 150).half(), sparse(130, 150, density=density))
        assert density > 0 or not y.any()

    def test_empty_and_full_rows(self) -> None:
        weight = sparse(200, 150, density=0.5)
        weight[:70], weight[100], weight[150] = 0, torch.randn(150).half(), 0
        bias = torch.randn(200).half()
        y = check(torch.randn(3, 150).half(), weight, bias)
        assert torch.equal(y[:, :70], bias[:70].expand(3, -1))

    def test_several_panels(self) -> None:
        check(torch.randn(2, 2100).half(), sparse(1000, 2100), torch.randn(1000).half())

    def test_nan_and_inf_reach_only_their_rows(self) -> None:
        weight = sparse(70, 90, torch.float32)
        weight[3, 5], weight[68, 1] = torch.nan, torch.inf
        y = spinfer.linear(torch.ones(2, 90), spinfer.encode(weight))
        assert y[:, 3].isnan().all()
        assert y[:, 68].isinf().all()
        assert y.isfinite().sum() == 2 * 68

    def test_a_packed_weight_gives_the_same(self) -> None:
        """Up to rounding: another kernel adds in another order, and in one of nine runs a sum rounds the other way."""
        weight = spinfer.encode(sparse(70, 90))
        x = torch.randn(3, 90).half()
        assert relative_error(spinfer.linear(x, spinfer.pack(weight)), x, weight) <= EPS[x.dtype]


class TestErrors:
    @pytest.mark.parametrize(
        ("x", "bias", "message"),
        [
            (torch.zeros(2, 89), None, "last side must be in_features = 90"),
            (torch.zeros(90, 2), None, "last side"),
            (torch.tensor(1.0), None, "last side"),
            (torch.zeros(2, 90, dtype=torch.float64), None, "float64; convert"),
            (torch.zeros(2, 90, dtype=torch.int64), None, "int64; convert"),
            (torch.zeros(2, 90, device="meta"), None, "move one of them"),
            (torch.zeros(2, 90), torch.zeros(69), "bias is"),
            (torch.zeros(2, 90), torch.zeros(70, 1), "bias is"),
            (torch.zeros(2, 90), torch.zeros(70).half(), "bias is"),
            (torch.zeros(2, 90), torch.zeros(70, device="meta"), "bias is"),
        ],
    )
    def test_refuses(self, x: Tensor, bias: Tensor | None, message: str) -> None:
        with pytest.raises(SpinferError, match=message):
            spinfer.linear(x, spinfer.encode(sparse(70, 90)), bias)

    def test_unknown_layout(self) -> None:
        packed = as_packed(spinfer.encode(sparse(8, 8)))
        packed = dataclasses.replace(packed, spec=dataclasses.replace(packed.spec, layout="nobody's"))
        with pytest.raises(SpinferError, match="nobody's"):
            spinfer.linear(torch.zeros(1, 8), packed)

    def test_pack_refuses_parts_that_disagree(self) -> None:
        weight = spinfer.encode(sparse(70, 90))
        with pytest.raises(SpinferError, match="nnz"):
            spinfer.pack(dataclasses.replace(weight, nnz=weight.nnz - 1))


def layouts(weight: Tensor) -> list[PackedWeight]:
    encoded = spinfer.encode(weight)
    return [as_packed(encoded), ReversedBackend().pack(encoded)]


class TestGradients:
    @pytest.fixture(autouse=True)
    def reversed_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "BACKENDS", (ReversedBackend(), *kernels.BACKENDS))

    @pytest.mark.parametrize("with_bias", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(90,), (5, 90), (2, 3, 90), (0, 90)])
    def test_against_dense(self, shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool) -> None:
        weight = sparse(200, 90, dtype)
        x, bias = torch.randn(shape).to(dtype), torch.randn(200).to(dtype) if with_bias else None
        grad = torch.randn(*shape[:-1], 200).to(dtype)
        want_x = grad.double() @ weight.double()
        want_bias = grad.double().reshape(-1, 200).sum(0)
        for packed in layouts(weight):
            leaf = x.clone().requires_grad_()
            leaf_bias = None if bias is None else bias.clone().requires_grad_()
            spinfer.linear(leaf, packed, leaf_bias).backward(grad)
            scale = grad.double().abs() @ weight.double().abs()
            assert leaf.grad.dtype == dtype
            assert ((leaf.grad.double() - want_x).abs() <= EPS[dtype] * scale + 1e-6).all()
            if leaf_bias is not None:
                bound = EPS[dtype] * grad.double().abs().reshape(-1, 200).sum(0) + 1e-6
                assert ((leaf_bias.grad.double() - want_bias).abs() <= bound).all()

    def test_expanded_gradient(self) -> None:
        weight = sparse(70, 90, torch.float32)
        x = torch.randn(3, 90, requires_grad=True)
        spinfer.linear(x, spinfer.encode(weight)).sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)

    def test_several_panels(self) -> None:
        weight = sparse(1000, 2100, torch.float32)
        x, grad = torch.randn(2, 2100, requires_grad=True), torch.randn(2, 1000)
        spinfer.linear(x, spinfer.encode(weight)).backward(grad)
        torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-4, atol=1e-3)

    def test_second_order(self) -> None:
        weight = sparse(70, 90, torch.float32)
        x = torch.randn(3, 90, requires_grad=True)
        dense_x = x.detach().clone().requires_grad_()
        results = []
        for leaf, y in ((x, spinfer.linear(x, spinfer.encode(weight))), (dense_x, dense_x @ weight.t())):
            (first,) = torch.autograd.grad((y**3).sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad((first**2).sum(), leaf)
            results.append(second)
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-1)

    def test_only_what_is_asked_for(self) -> None:
        bias = torch.randn(70, requires_grad=True)
        x = torch.randn(3, 90)
        spinfer.linear(x, spinfer.encode(sparse(70, 90)), bias).sum().backward()
        torch.testing.assert_close(bias.grad, torch.full((70,), 3.0))
        assert x.grad is None


class TestTorchIntegration:
    @pytest.mark.parametrize("with_bias", [True, False])
    @pytest.mark.parametrize("shape", [(90,), (3, 90), (2, 3, 90)])
    def test_opcheck(self, shape: tuple[int, ...], with_bias: bool) -> None:
        packed = as_packed(spinfer.encode(sparse(70, 90, torch.float32)))
        bias = torch.randn(70, requires_grad=True) if with_bias else None
        weight = (list(packed.parts), packed.layout, list(packed.shape), packed.nnz, packed.dtype)
        torch.library.opcheck(torch.ops.spinfer.linear.default, (torch.randn(shape, requires_grad=True), *weight, bias))
        grad = torch.randn(*shape[:-1], 70, requires_grad=True)
        torch.library.opcheck(torch.ops.spinfer.linear_input_gradient.default, (grad, *weight))

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_compile_with_a_dynamic_batch(self, dtype: torch.dtype, packed: bool) -> None:
        torch._dynamo.reset()
        encoded = spinfer.encode(sparse(70, 90, dtype))
        weight = spinfer.pack(encoded) if packed else encoded

        @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
        def run(x: Tensor) -> Tensor:
            return spinfer.linear(x * 2, weight) + 1

        for tokens in (2, 3, 7):
            x = torch.randn(tokens, 90).to(dtype)
            torch.testing.assert_close(run(x), spinfer.linear(x * 2, weight) + 1)

    def test_compile_gradient(self) -> None:
        torch._dynamo.reset()
        weight = sparse(70, 90, torch.float32)
        encoded = spinfer.encode(weight)
        x = torch.randn(4, 90, requires_grad=True)
        torch.compile(lambda x: spinfer.linear(x, encoded).sum(), fullgraph=True, backend="aot_eager")(x).backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)

    def test_export_with_a_dynamic_batch(self) -> None:
        encoded = spinfer.encode(sparse(70, 90, torch.float32))

        class Model(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return spinfer.linear(x, encoded).relu()

        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(Model(), (torch.randn(3, 90),), dynamic_shapes={"x": {0: batch}})
        x = torch.randn(11, 90)
        torch.testing.assert_close(program.module()(x), spinfer.linear(x, encoded).relu())


class TestWorkspace:
    def test_never_decodes_the_whole_matrix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows: list[int] = []
        decode_rows = tilewise.decode_rows

        def spy(*args: object, **kwargs: int) -> Tensor:
            panel = decode_rows(*args, **kwargs)
            rows.append(panel.shape[0])
            return panel

        monkeypatch.setattr(tilewise, "decode_rows", spy)
        spinfer.linear(torch.randn(1, 2048).half(), spinfer.encode(sparse(2048, 2048)))
        assert sum(rows) == 2048
        assert max(rows) * 2048 * 2 <= 1 << 20

    @pytest.mark.parametrize("backward", [False, True])
    def test_peak_memory(self, backward: bool) -> None:
        """Allocations of torch, replayed: the peak stays far under the dense matrix (16 MiB)."""
        weight = spinfer.encode(sparse(2048, 4096))
        x = torch.randn(1, 4096, dtype=torch.float16, requires_grad=backward)
        torch.use_deterministic_algorithms(False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            y = spinfer.linear(x, weight)
            if backward:
                y.sum().backward()
        live = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        dense_nbytes = 2048 * 4096 * 2
        assert 1 << 20 < peak < dense_nbytes // 2


def test_layout_name() -> None:
    assert kernels.BACKENDS[-1].layout == STORAGE_LAYOUT
    assert kernels.BACKENDS[-1].accepts(spinfer.encode(sparse(8, 8)))
