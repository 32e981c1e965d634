"""`SparseLinear`: construction, state dicts, moves, pickles, compile and export, whichever layout is live."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import spinfer
from spinfer import SparseLinear, kernels
from spinfer.errors import FormatError, SpinferError
from spinfer.format import TcaBmeTensor
from spinfer.linear import STORAGE_NAMES
from support import EPS, ReversedBackend, bits, relative_error, sparse


@pytest.fixture(params=["tca_bme", "reversed", "native"], autouse=True)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the storage layout, with one that differs from it in every array, and as installed."""
    backends = {"tca_bme": (), "reversed": (ReversedBackend(),), "native": kernels.BACKENDS[:-1]}[request.param]
    monkeypatch.setattr(kernels, "BACKENDS", (*backends, kernels.TILEWISE))
    if request.param == "native":
        return kernels.pack(spinfer.encode(torch.ones(8, 8))).layout
    return str(request.param)


def dense_layer(bias: bool = True, dtype: torch.dtype = torch.float16) -> nn.Linear:
    layer = nn.Linear(90, 70, bias=bias, dtype=dtype)
    layer.weight.data = sparse(70, 90, dtype)
    return layer


def assert_same_storage(module: SparseLinear, expected: TcaBmeTensor) -> None:
    storage = module.storage.validate()
    assert (storage.shape, storage.nnz, storage.dtype) == (expected.shape, expected.nnz, expected.dtype)
    assert torch.equal(bits(storage.values), bits(expected.values))
    assert torch.equal(storage.bitmap, expected.bitmap)
    assert torch.equal(storage.offsets, expected.offsets)


def empty_like(module: SparseLinear, device: str = "cpu") -> SparseLinear:
    values_len = module.storage.values.numel()
    return SparseLinear(90, 70, nnz=module.nnz, values_len=values_len, device=device, dtype=torch.float16)


class TestConstruction:
    @pytest.mark.parametrize("bias", [True, False])
    def test_from_linear(self, bias: bool, layout: str) -> None:
        dense = dense_layer(bias)
        module = SparseLinear.from_linear(dense)
        assert module.is_packed
        assert module._packed.layout == layout
        assert_same_storage(module, spinfer.encode(dense.weight))
        x = torch.randn(2, 3, 90).half()
        error = relative_error(module(x).detach(), x, module.storage, None if module.bias is None else module.bias.data)
        assert error <= EPS[torch.float16]
        assert (module.bias is None) is not bias
        assert bias is False or module.bias.data_ptr() == dense.bias.data_ptr()

    @pytest.mark.parametrize("training", [True, False])
    def test_from_linear_keeps_the_mode(self, training: bool) -> None:
        assert SparseLinear.from_linear(dense_layer().train(training)).training is training

    def test_from_weight_shares_memory(self) -> None:
        encoded = spinfer.encode(dense_layer().weight)
        module = SparseLinear.from_weight(encoded)
        assert not module.is_packed
        assert module.weight.data_ptr() == encoded.values.data_ptr()
        assert module.weight_bitmap.data_ptr() == encoded.bitmap.data_ptr()
        assert module.weight_nbytes == encoded.nbytes

    def test_packed_and_unpacked_agree(self) -> None:
        module = SparseLinear.from_weight(spinfer.encode(dense_layer().weight))
        x = torch.randn(5, 90).half()
        before = module(x)
        assert module.pack_() is module
        assert module.is_packed
        torch.testing.assert_close(module(x), before)
        assert module.unpack_() is module
        assert not module.is_packed
        assert torch.equal(module(x), before)

    def test_packing_frees_the_storage(self) -> None:
        module = SparseLinear.from_linear(dense_layer())
        assert module.weight.numel() == 0
        assert (module.weight.dtype, module.weight.device.type) == (torch.float16, "cpu")
        assert module.weight_bitmap is None
        assert module.weight_offsets is None
        assert module.weight_nbytes == sum(buffer.nbytes for buffer in module.buffers())

    def test_parameters(self) -> None:
        module = SparseLinear.from_weight(spinfer.encode(dense_layer().weight), torch.zeros(70).half())
        values_len = module.storage.values.numel()
        assert sum(p.numel() for p in module.parameters()) == values_len + 70
        assert [n for n, p in module.named_parameters() if p.requires_grad] == []
        assert [n for n, _ in module.named_buffers()] == list(STORAGE_NAMES[1:])
        module.pack_()
        assert sum(p.numel() for p in module.parameters()) == 70
        assert [n for n, p in SparseLinear.from_linear(dense_layer()).named_parameters() if p.requires_grad] == ["bias"]

    def test_extra_repr(self) -> None:
        module = SparseLinear.from_weight(spinfer.encode(torch.eye(64).half()))
        assert repr(module) == "SparseLinear(in_features=64, out_features=64, bias=False, density=0.016)"

    def test_meta(self) -> None:
        module = empty_like(SparseLinear.from_linear(dense_layer()), "meta")
        assert {t.device.type for t in module.state_dict().values()} == {"meta"}
        assert module(torch.empty(3, 90, device="meta", dtype=torch.float16)).shape == (3, 70)

    def test_pack_refuses_a_weight_not_loaded_yet(self) -> None:
        module = empty_like(SparseLinear.from_linear(dense_layer()))
        with pytest.raises(FormatError, match="offsets end at 0"):
            module.pack_()
        assert not module.is_packed


@pytest.mark.parametrize("source_packed", [True, False])
@pytest.mark.parametrize("target_packed", [True, False])
class TestStateDict:
    def modules(self, source_packed: bool, target_packed: bool) -> tuple[SparseLinear, SparseLinear]:
        weight = sparse(70, 90)
        source = SparseLinear.from_weight(spinfer.encode(weight), torch.randn(70).half())
        # Same number of nonzeros elsewhere, so that the padded lengths may differ.
        other = weight.view(-1)[torch.randperm(6300)].view(70, 90)
        target = SparseLinear.from_weight(spinfer.encode(other), torch.zeros(70).half())
        return source.pack_() if source_packed else source, target.pack_() if target_packed else target

    def test_round_trip(self, source_packed: bool, target_packed: bool) -> None:
        source, target = self.modules(source_packed, target_packed)
        state = source.state_dict(prefix="")
        storage = source.storage
        for name, part in zip(STORAGE_NAMES, (storage.values, storage.bitmap, storage.offsets), strict=True):
            assert torch.equal(state[name], part)
        assert set(state) == {*STORAGE_NAMES, "bias"}
        target.load_state_dict(state, strict=True)
        assert target.is_packed is target_packed
        assert_same_storage(target, storage)
        x = torch.randn(3, 90).half()
        torch.testing.assert_close(target(x), source(x))

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_assign(self, source_packed: bool, target_packed: bool, device: str) -> None:
        source, target = self.modules(source_packed, target_packed)
        target = target if device == "cpu" else empty_like(source, "meta")
        target.load_state_dict(source.state_dict(), strict=True, assign=True)
        assert_same_storage(target, source.storage)

    def test_inside_a_model(self, source_packed: bool, target_packed: bool) -> None:
        source, target = self.modules(source_packed, target_packed)
        nn.Sequential(nn.ReLU(), target).load_state_dict(nn.Sequential(nn.ReLU(), source).state_dict(), strict=True)
        assert_same_storage(target, source.storage)

    def test_another_dtype_is_cast(self, source_packed: bool, target_packed: bool) -> None:
        source, target = self.modules(source_packed, target_packed)
        wide = source.storage.values.float()
        target.load_state_dict({**source.state_dict(), "weight": wide})
        assert_same_storage(target, source.storage)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda s: s.update(weight=s["weight"][:-8]),
            lambda s: s.update(weight=s["weight"][:-1]),
            lambda s: s.update(weight=s["weight"].double()),
            lambda s: s.update(weight=torch.zeros(70, 90).half()),
            lambda s: s.update(weight_bitmap=~s["weight_bitmap"]),
            lambda s: s.update(weight_bitmap=s["weight_bitmap"].flip(0)),
            lambda s: s.update(weight_bitmap=s["weight_bitmap"][:-64]),
            lambda s: s.update(weight_offsets=s["weight_offsets"] + 1),
            lambda s: s.update(weight_offsets=-s["weight_offsets"]),
            lambda s: s.update(weight_offsets=s["weight_offsets"].flip(0)),
            lambda s: s.update(weight_offsets=s["weight_offsets"].long()),
            lambda s: s.pop("weight"),
            lambda s: s.pop("weight_bitmap"),
            lambda s: s.pop("weight_offsets"),
        ],
    )
    def test_hostile_parts_are_refused_and_nothing_is_lost(
        self, source_packed: bool, target_packed: bool, damage: Callable[[dict], object]
    ) -> None:
        source, target = self.modules(source_packed, target_packed)
        state, before = dict(source.state_dict()), target.storage
        damage(state)
        for strict in (True, False):
            with pytest.raises(SpinferError):
                target.load_state_dict(state, strict=strict)
            assert target.is_packed is target_packed
            assert_same_storage(target, before)

    def test_no_part_at_all(self, source_packed: bool, target_packed: bool) -> None:
        source, target = self.modules(source_packed, target_packed)
        before = target.storage
        with pytest.raises(RuntimeError, match="Missing key"):
            target.load_state_dict({"bias": source.bias}, strict=True)
        assert target.load_state_dict({"bias": source.bias}, strict=False).missing_keys[0] == "weight"
        assert_same_storage(target, before)
        assert torch.equal(target.bias, source.bias)


@pytest.mark.parametrize("packed", [True, False])
class TestMovesAndCopies:
    def module(self, packed: bool, dtype: torch.dtype = torch.float16) -> SparseLinear:
        module = SparseLinear.from_linear(dense_layer(dtype=dtype))
        return module if packed else module.unpack_()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_casts(self, packed: bool, dtype: torch.dtype, layout: str) -> None:
        module = self.module(packed)
        before = module.storage
        expected = TcaBmeTensor(before.values.to(dtype), before.bitmap, before.offsets, before.shape, before.nnz)
        assert module.to(dtype) is module
        assert module.is_packed is packed
        assert module.weight.dtype == module.bias.dtype == dtype
        assert_same_storage(module, expected)
        if packed and layout == "reversed":  # it does not take fp32: another backend must have stepped in
            assert module._packed.layout == ("tca_bme" if dtype == torch.float32 else "reversed")
        x = torch.randn(3, 90).to(dtype)
        assert relative_error(module(x).detach(), x, expected, module.bias.data) <= EPS[dtype]

    def test_half_and_bfloat16(self, packed: bool) -> None:
        module = self.module(packed, torch.float32)
        decoded = module.storage.decode()
        assert torch.equal(module.half().storage.decode(), decoded.half())
        assert torch.equal(module.bfloat16().storage.decode(), decoded.half().bfloat16())

    def test_underflow_in_a_cast_keeps_the_parts_in_agreement(self, packed: bool) -> None:
        module = SparseLinear.from_linear(dense_layer(dtype=torch.float32))
        module.unpack_().weight.data *= 1e-20
        module = module.pack_() if packed else module
        assert not module.half().storage.validate().decode().any()

    def test_an_unsupported_cast_says_so_and_loses_nothing(self, packed: bool) -> None:
        module = self.module(packed)
        before = module.storage

        def cast_and_run() -> None:
            module.double()
            module(torch.zeros(1, 90))

        with pytest.raises(FormatError, match="float64 cannot be encoded"):
            cast_and_run()
        assert_same_storage(module.half(), before)

    def test_to_meta_and_cpu(self, packed: bool) -> None:
        module = self.module(packed)
        storage = module.storage
        assert module.to("cpu").is_packed is packed
        assert_same_storage(module, storage)
        meta = copy.deepcopy(module).to("meta")
        assert not meta.is_packed
        assert meta.storage.nbytes == storage.nbytes

    def test_deepcopy(self, packed: bool) -> None:
        module = self.module(packed)
        clone = copy.deepcopy(module)
        assert clone.is_packed is packed
        storage = module.storage.values.clone()
        clone.unpack_().weight.data.zero_()
        assert torch.equal(module.storage.values, storage)

    @pytest.mark.parametrize("how", ["pickle", "torch.save"])
    def test_pickle(self, packed: bool, how: str) -> None:
        module = nn.Sequential(self.module(packed))
        if how == "pickle":
            clone = pickle.loads(pickle.dumps(module))
        else:
            buffer = io.BytesIO()
            torch.save(module, buffer)
            buffer.seek(0)
            clone = torch.load(buffer, weights_only=False)
        assert clone[0].is_packed is packed
        assert module[0].is_packed is packed
        assert_same_storage(clone[0], module[0].storage)
        assert torch.equal(clone[0].bias, module[0].bias)

    def test_a_pickle_needs_no_backend_of_its_writer(self, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        module = self.module(packed)
        storage, data = module.storage, pickle.dumps(module)
        monkeypatch.setattr(kernels, "BACKENDS", (kernels.TILEWISE,))
        assert_same_storage(pickle.loads(data), storage)

    def test_saved_state_dict_loads_weights_only(self, packed: bool) -> None:
        module = self.module(packed)
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        other = empty_like(module)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert_same_storage(other, module.storage)


@pytest.mark.parametrize("packed", [True, False])
class TestTorchIntegration:
    def model(self, packed: bool) -> nn.Module:
        layer = SparseLinear.from_linear(dense_layer())
        return nn.Sequential(layer if packed else layer.unpack_(), nn.GELU())

    def test_compile(self, packed: bool) -> None:
        torch._dynamo.reset()
        model = self.model(packed)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (2, 5, 9):
            x = torch.randn(tokens, 90).half()
            torch.testing.assert_close(compiled(x), model(x))

    def test_export(self, packed: bool) -> None:
        model = self.model(packed)
        shapes = {"input": {0: torch.export.Dim("batch", min=1, max=64)}}
        program = torch.export.export(model, (torch.randn(3, 90).half(),), dynamic_shapes=shapes)
        x = torch.randn(11, 90).half()
        torch.testing.assert_close(program.module()(x), model(x))

    def test_gradient_reaches_x_and_bias(self, packed: bool) -> None:
        model = self.model(packed)
        x = torch.randn(3, 90, dtype=torch.float16, requires_grad=True)
        model(x).float().sum().backward()
        assert x.grad.isfinite().all()
        assert model[0].bias.grad.abs().sum() > 0
        assert model[0].weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(layout: str, dtype: torch.dtype) -> None:
    """As nn.Linear: whatever the types of input and bias, it computes in autocast's, and gradients come in theirs."""
    dense = dense_layer().to(dtype)
    module = SparseLinear.from_linear(dense)
    for x_dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 90, dtype=x_dtype, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = module(x), dense(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        assert (y - expected).float().norm() < 1e-2 * expected.float().norm()
        y.sum().backward()
        assert x.grad.dtype == x_dtype
        assert module.bias.grad.dtype == dtype
    with torch.autocast("cpu", enabled=False):
        assert module(torch.randn(4, 90, dtype=dtype)).dtype == dtype


def test_compile_with_inductor(layout: str) -> None:
    torch._dynamo.reset()
    module = SparseLinear.from_linear(dense_layer())
    x = torch.randn(4, 90).half()
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))
