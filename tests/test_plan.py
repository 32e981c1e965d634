"""`spinfer plan` against a model that is really compressed and really run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

import spinfer
from conftest import ARCHITECTURES, pruned_model
from spinfer.cli.main import application
from spinfer.errors import CheckpointError
from spinfer.integrations.transformers.sizing import fit, model_size

WITH_LINEARS = [name for name in ARCHITECTURES if name != "gpt2"]


@pytest.mark.parametrize("architecture", WITH_LINEARS)
def test_sizes_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    model = pruned_model(architecture, sparsity=0.6)
    model.config.save_pretrained(tmp_path)
    size = model_size(str(tmp_path))
    assert size.dense_nbytes == sum(parameter.nbytes for parameter in model.parameters())
    cache = model(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert size.kv_nbytes_per_token() == held / 10
    spinfer.compress_model(model)
    sparse = [module for module in model.modules() if isinstance(module, spinfer.SparseLinear)]
    rest = sum(p.nbytes for p in model.parameters() if p.numel())  # their values are packed elsewhere
    stored = sum(module.storage.nbytes for module in sparse)
    assert len(sparse) == len(size.linears)
    assert size.compressed_nbytes(0.6) == pytest.approx(stored + rest, rel=0.01)


def test_heads_fewer_than_gpus_are_held_more_than_once(tmp_path: Path) -> None:
    ARCHITECTURES["llama"].save_pretrained(tmp_path)
    size = model_size(str(tmp_path))
    assert [size.kv_nbytes_per_token(gpus) for gpus in (1, 2, 4)] == [512, 256, 256]


def test_what_does_not_fit(tmp_path: Path) -> None:
    ARCHITECTURES["llama"].save_pretrained(tmp_path)
    size = model_size(str(tmp_path))
    found = fit(size, 10_000, gpus=1, usable_nbytes=10_000 + 512 * 100, context=30)
    assert (found.kv_tokens, found.batch) == (100, 3)
    assert fit(size, 10_000, gpus=1, usable_nbytes=9_000, context=30).kv_tokens == 0


def test_command(tmp_path: Path) -> None:
    ARCHITECTURES["llama"].save_pretrained(tmp_path)
    done = CliRunner().invoke(application(), ["plan", str(tmp_path), "--gpu-memory", "80", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["context"] == 128  # the model's longest
    compressed, dense = (result[name]["weights_nbytes"] for name in ("compressed", "dense"))
    assert compressed < dense < result["compressed_with_dense_copies"]["weights_nbytes"] < compressed + dense
    table = CliRunner().invoke(application(), ["plan", str(tmp_path), "--sparsity", "0.5"]).stdout
    assert "| 50% sparse" in table


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a causal language model"):
        model_size(str(tmp_path))


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_tables_in_the_documentation(gpus: int, tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ).save_pretrained(tmp_path)
    printed = CliRunner().invoke(application(), ["plan", str(tmp_path), "--gpus", str(gpus)]).stdout
    documentation = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    for line in printed.strip().splitlines():
        assert line in documentation
