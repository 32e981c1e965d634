"""Compressed models on a GPU through transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import spinfer
from conftest import pruned_model
from spinfer.kernels.cuda import ahead, backend, runtime, tune
from spinfer.kernels.cuda import compile as kernel_compile

pytestmark = pytest.mark.gpu


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    """A compressed Llama on disk."""
    model = pruned_model("llama", dtype=torch.float16)
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def logits_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float(((actual.double() - expected.double()).norm() / expected.double().norm()).detach())


@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}])
def test_loads_onto_the_gpu(device_map: object, compressed: Path, tokens: Tensor) -> None:
    on_cpu = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype="auto", device_map=device_map)
    assert model.device.type == "cuda"
    assert logits_error(model(tokens.cuda()).logits.cpu(), on_cpu(tokens).logits) < 5e-3


def test_moves_between_devices_and_saves_the_same_bytes(compressed: Path, tokens: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype="auto")
    expected = model(tokens).logits
    model.cuda()
    assert logits_error(model(tokens.cuda()).logits.cpu(), expected) < 5e-3
    model.save_pretrained(tmp_path / "from-gpu")
    saved = tmp_path / "from-gpu" / "model.safetensors"
    assert saved.read_bytes() == (compressed / "model.safetensors").read_bytes()
    model.cpu()
    assert torch.equal(model(tokens).logits, expected)


def test_compresses_on_the_gpu(tokens: Tensor) -> None:
    dense = pruned_model("llama", dtype=torch.float16).cuda()
    model = copy.deepcopy(dense)
    spinfer.compress_model(model)
    assert logits_error(model(tokens.cuda()).logits, dense(tokens.cuda()).logits) < 5e-3


def test_generates_the_dense_model_s_tokens(tokens: Tensor) -> None:
    dense = pruned_model("llama", dtype=torch.float32).cuda()
    arguments = {"attention_mask": torch.ones_like(tokens).cuda(), "max_new_tokens": 8, "do_sample": False}
    expected = dense.generate(tokens.cuda(), pad_token_id=0, **arguments)
    spinfer.compress_model(dense)
    assert torch.equal(dense.generate(tokens.cuda(), pad_token_id=0, **arguments), expected)


def test_generates_the_same_tokens_from_cuda_graphs(tokens: Tensor) -> None:
    """`generate` compiles the model for a static cache, with CUDA graphs."""
    torch._dynamo.reset()
    model = pruned_model("llama", dtype=torch.float16).cuda()
    spinfer.compress_model(model)
    arguments = {"attention_mask": torch.ones_like(tokens).cuda(), "max_new_tokens": 8, "do_sample": False}
    arguments |= {"pad_token_id": 0, "cache_implementation": "static"}
    expected = model.generate(tokens.cuda(), disable_compile=True, **arguments)
    assert torch.equal(model.generate(tokens.cuda(), **arguments), expected)


def test_peak_memory_of_loading_is_that_of_the_compressed_model(tmp_path: Path) -> None:
    model = pruned_model("llama", dtype=torch.float16, sparsity=0.8)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(200, 128, dtype=torch.float16))
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    footprint = model.get_memory_footprint()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map="cuda")
    largest_layer = 200 * 128 * 2
    # Allocations are rounded to 512 bytes; a layer being repacked exists twice.
    assert torch.cuda.max_memory_allocated() - before < 1.5 * footprint + 4 * largest_layer


def test_measured_kernels_give_the_same(
    compressed: Path,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ids = tokens.cuda().flatten().repeat(-(-700 // tokens.numel()))[None, :700]
    expected = AutoModelForCausalLM.from_pretrained(compressed, dtype="auto", device_map="cuda")(ids).logits
    monkeypatch.setenv("SPINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SPINFER_AUTOTUNE", "1")
    monkeypatch.setattr(tune, "TUNED_TOKENS", (8, 64, 704))
    monkeypatch.setattr(tune, "_BETTER", 2.0)  # so that whatever is fastest is another one
    monkeypatch.setattr(tune, "_known", {})
    monkeypatch.setattr(tune, "_tried", set())
    backend._run.cache_clear()
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype="auto", device_map="cuda")
    kinds = len(list((tmp_path / "cache").glob("tuned-*.json")))
    assert capsys.readouterr().err.count("3 numbers of tokens") == kinds >= 3
    assert all(set(known) == {8, 64, 704} for known in tune._known.values())
    assert logits_error(model(ids).logits, expected) < 5e-3
    backend._run.cache_clear()


def test_no_call_waits_for_a_compiler(
    compressed: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a model begins to compile all that it may need."""
    monkeypatch.setenv("SPINFER_CACHE_DIR", str(tmp_path / "cache"))
    backend._compile_ahead.cache_clear()
    monkeypatch.setattr(ahead, "COMPILER", ahead.BackgroundCompiler())
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype="auto", device_map="cuda")
    ahead.COMPILER.wait()
    runtime._loaded.cache_clear()
    backend._run.cache_clear()
    monkeypatch.setattr(kernel_compile, "compile_source", None)
    for count in (1, 17, 40, 200, 700, 1500):
        ids = tokens.cuda().flatten().repeat(-(-count // tokens.numel()))[:count]
        assert model(ids[None], use_cache=False).logits.isfinite().all()
