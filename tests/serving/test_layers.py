"""Each kind of vLLM's linear layers, loaded from compressed matrices at several tensor-parallel sizes."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from spinfer.checkpoint.config import CompressionConfig, ModuleEntry
from spinfer.checkpoint.names import storage_names
from spinfer.format import encode
from support import sparse

pytestmark = pytest.mark.vllm

K = 256
HEADS, KV_HEADS, HEAD = 8, 2, 64


def matrices(kind: str) -> dict[str, Tensor]:
    """What the checkpoint holds for a layer, dense."""
    rows = {
        "replicated": {"proj": 128},
        "column": {"proj": 512},
        "row": {"proj": 192},
        "gate_up": {"gate_proj": 512, "up_proj": 512},
        "fused_gate_up": {"gate_up_proj": 1024},
        "qkv": {"q_proj": HEADS * HEAD, "k_proj": KV_HEADS * HEAD, "v_proj": KV_HEADS * HEAD},
        "fused_qkv": {"qkv_proj": (HEADS + 2 * KV_HEADS) * HEAD},
        "mixed_qkv": {"q_proj": HEADS * HEAD, "k_proj": KV_HEADS * HEAD, "v_proj": KV_HEADS * HEAD},
        "uneven": {"gate_proj": 200, "up_proj": 200},
        "fused_uneven": {"gate_up_proj": 400},
        "thin": {"proj": 96},
    }[kind]
    return {name: sparse(count, K, torch.float32, seed=seed) for seed, (name, count) in enumerate(rows.items())}


def make(kind: str, config: Any) -> tuple[Any, dict[str, Any]]:
    """The layer, and the shard that each matrix is loaded as."""
    from vllm.model_executor.layers import linear

    common = {"bias": False, "quant_config": config, "params_dtype": torch.float32, "return_bias": False}
    if kind == "replicated":
        return linear.ReplicatedLinear(K, 128, prefix="mlp.proj", **common), {"proj": None}
    if kind in ("column", "thin"):
        size = 96 if kind == "thin" else 512
        return linear.ColumnParallelLinear(K, size, prefix="mlp.proj", **common), {"proj": None}
    if kind == "row":
        return linear.RowParallelLinear(K, 192, prefix="mlp.proj", reduce_results=False, **common), {"proj": None}
    if kind in ("gate_up", "fused_gate_up", "uneven", "fused_uneven"):
        size = 200 if "uneven" in kind else 512
        layer = linear.MergedColumnParallelLinear(K, [size, size], prefix="mlp.gate_up_proj", **common)
        return layer, {"gate_up_proj": None, "gate_proj": 0, "up_proj": 1}
    layer = linear.QKVParallelLinear(K, HEAD, HEADS, KV_HEADS, prefix="mlp.qkv_proj", **common)
    return layer, {"qkv_proj": None, "q_proj": "q", "k_proj": "k", "v_proj": "v"}


def load(kind: str, without: str = "", damage: str = "") -> Any:
    """A layer with its weights; `without` names a tensor that does not come, `damage` one that comes changed."""
    from spinfer.integrations.vllm.config import SpinferConfig

    left_dense = {"k_proj"} if kind == "mixed_qkv" else set()
    dense = matrices(kind)
    encoded = {name: encode(weight) for name, weight in dense.items() if name not in left_dense}
    entries = {f"mlp.{name}": ModuleEntry.of(weight) for name, weight in encoded.items()}
    config = SpinferConfig.from_config(CompressionConfig(entries).to_dict())
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    layer, shards = make(kind, config)
    for name, weight in dense.items():
        tensors = {f"{name}.weight": weight}
        if name in encoded:
            parts = (encoded[name].values, encoded[name].bitmap, encoded[name].offsets)
            tensors = dict(zip(storage_names(name), parts, strict=True))
        for stored, tensor in tensors.items():
            parameter = getattr(layer, stored.rpartition(".")[2])
            if stored == damage:
                tensor = tensor.clone()
                tensor[0] ^= 1
            if stored != without:
                shard = () if shards[name] is None else (shards[name],)
                parameter.weight_loader(parameter, tensor, *shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def expected(kind: str, rank: int, size: int) -> Tensor:
    """The dense rows or columns that vLLM gives a rank."""
    weights = matrices(kind)
    if kind == "replicated":
        return weights["proj"]
    if kind == "row":
        return weights["proj"].chunk(size, dim=1)[rank]
    if kind in ("fused_gate_up", "fused_uneven"):
        weights = dict(enumerate(weights["gate_up_proj"].chunk(2)))
    if kind == "fused_qkv":
        weights = dict(enumerate(weights["qkv_proj"].split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD])))
    parts = []
    for number, weight in enumerate(weights.values()):
        ranks = min(size, KV_HEADS) if "qkv" in kind and number else size
        parts.append(weight.chunk(ranks)[rank * ranks // size])
    return torch.cat(parts)


def multiply(rank: int, size: int, kind: str) -> tuple[float, int, int, int]:
    """Largest error of the layer's product; its kernels; its bytes and those of the dense weight."""
    layer = load(kind)
    dense = expected(kind, rank, size)
    torch.manual_seed(0)
    x = torch.randn(3, dense.shape[1])
    error = float((layer.quant_method.apply(layer, x) - x @ dense.t()).abs().max())
    held = sum(parameter.nbytes for parameter in layer.parameters())
    return error, len(layer.quant_method._calls), held, dense.nbytes


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "kind", ["replicated", "column", "row", "gate_up", "fused_gate_up", "qkv", "fused_qkv", "mixed_qkv"]
)
def test_every_rank_holds_its_share_encoded(kind: str, size: int) -> None:
    for result in on_ranks(size, multiply, size, kind):
        error, kernels, held, dense = result
        assert error < 1e-4
        assert kernels == 1
        assert held < 0.75 * dense


@pytest.mark.parametrize(("kind", "expected_kernels"), [("uneven", 2), ("fused_uneven", 1)])
def test_matrices_that_end_inside_a_tile_stay_apart_or_together(kind: str, expected_kernels: int) -> None:
    [(error, kernels, _, _)] = on_ranks(1, multiply, 1, kind)
    assert error < 1e-4
    assert kernels == expected_kernels


def hashed(rank: int, number_of_parts: int) -> dict[str, Any]:
    """What vLLM has of the entry in config.json, after a layer has been loaded whose weight has so many parts."""
    from spinfer.integrations.vllm import linear
    from spinfer.kernels import PackedWeight, pack

    def pack_as(weight: Any, **options: Any) -> PackedWeight:
        packed = pack(weight, **options)
        parts = (*packed.parts, *(torch.zeros(1) for _ in range(number_of_parts)))[:number_of_parts]
        return PackedWeight(packed.spec, parts)

    with patch.object(linear, "pack", pack_as):
        entry: dict[str, Any] = load("column").quant_method._note.__self__._hashed
    return entry


def test_compiled_graphs_are_told_apart_by_what_is_in_them() -> None:
    """They are kept under a hash of the config; a dense copy, for one, is a part more."""
    first, again, other = (on_ranks(1, hashed, count)[0] for count in (3, 3, 4))
    assert first == again
    assert {**first, "packed": None} == {**other, "packed": None}
    assert first["packed"] != other["packed"]


def attempt(rank: int, kind: str, without: str, damage: str, broken_rank: int) -> str:
    """Load, with something wrong on one rank."""
    load(kind, without if rank == broken_rank else "", damage if rank == broken_rank else "")
    return "loaded"


@pytest.mark.parametrize(
    ("kind", "size", "cut"),
    [
        ("uneven", 2, "'mlp.gate_proj', 200 x 256"),
        ("fused_uneven", 2, "'mlp.gate_up_proj', 400 x 256"),
        ("thin", 3, "'mlp.proj', 96 x 256"),  # the last rank's own share would be whole tiles
    ],
)
def test_a_size_that_cuts_tiles_is_refused_on_every_rank(kind: str, size: int, cut: str) -> None:
    [message, *others] = on_ranks(size, attempt, kind, "", "", 0)
    assert f"SpinferError: tensor-parallel size {size} cuts {cut}" in message
    assert others == [message] * (size - 1)


@pytest.mark.parametrize("broken_rank", [0, 1])
@pytest.mark.parametrize("part", ["weight", "weight_bitmap", "weight_offsets"])
def test_a_tensor_missing_on_one_rank_stops_every_rank(part: str, broken_rank: int) -> None:
    [message, *others] = on_ranks(2, attempt, "qkv", f"v_proj.{part}", "", broken_rank)
    assert message.startswith(f"CheckpointError: rank {broken_rank}: ")
    assert f"mlp.v_proj.{part} missing" in message
    assert others == [message]


def test_damage_on_one_rank_stops_every_rank() -> None:
    [message, *others] = on_ranks(2, attempt, "row", "", "proj.weight_bitmap", 1)
    assert "rank 1: mlp.proj is damaged" in message
    assert others == [message]
