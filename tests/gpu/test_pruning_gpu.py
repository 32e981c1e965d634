"""Pruning on the GPU against the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import spinfer
from checkpoint_models import load_directory
from conftest import save_with_tokenizer
from spinfer.integrations.transformers.prune_checkpoint import prune_checkpoint
from spinfer.pruning import Pattern, Recipe, inverse_factor, prune_magnitude_, prune_sparsegpt_, prune_wanda_
from test_pruning_model import build, mixture

pytestmark = pytest.mark.gpu


@pytest.fixture
def samples() -> Tensor:
    """Token ids [64, 32]."""
    return torch.randint(3, 320, (64, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_matrix(pattern: Pattern | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 512, generator=generator).to(dtype)
    inputs = torch.randn(2048, 512, generator=generator) * torch.rand(512, generator=generator)
    hessian, norms = inputs.t() @ inputs, inputs.norm(dim=0)

    def pruned(device: str) -> list[Tensor]:
        on = weight.to(device)
        return [
            prune_magnitude_(on.clone(), 0.5, pattern),
            prune_wanda_(on.clone(), norms.to(device), 0.5, pattern),
            prune_sparsegpt_(on.clone(), inverse_factor(hessian.to(device, copy=True)), 0.5, pattern),
        ]

    on_gpu, on_cpu = pruned("cuda"), pruned("cpu")
    # Which of equal magnitudes go is open (bf16 has many), what is left of them is not.
    assert torch.equal(on_gpu.pop(0).cpu().abs().flatten().sort().values, on_cpu.pop(0).abs().flatten().sort().values)
    for ours, expected in zip(on_gpu, on_cpu, strict=True):
        assert ((ours.cpu() == 0) == (expected == 0)).float().mean() > 0.999
        assert (ours.cpu().float() - expected.float()).norm() < 0.05 * expected.float().norm()


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma2", "bloom"])
def test_a_model_in_ram_with_blocks_on_the_gpu(architecture: str, samples: Tensor) -> None:
    on_cpu, on_gpu = build(architecture), build(architecture)
    expected = spinfer.prune(on_cpu, samples, sparsity=0.6, allocation="owl")
    report = spinfer.prune(on_gpu, samples, sparsity=0.6, allocation="owl", device="cuda")
    assert all(parameter.device.type == "cpu" for parameter in on_gpu.parameters())
    for ours, theirs in zip(report.blocks, expected.blocks, strict=True):
        assert ours.sparsity == pytest.approx(theirs.sparsity, abs=0.01)
        assert ours.error == pytest.approx(theirs.error, rel=0.05)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_mixture_on_the_gpu(method: str, samples: Tensor) -> None:
    model = mixture().to("cuda", torch.bfloat16)
    report = spinfer.prune(model, samples, method=method, sparsity=0.5)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    dense = save_with_tokenizer(build("llama", torch.bfloat16), tmp_path / "dense")
    results = {}
    for device in ("cpu", "cuda"):
        prune_checkpoint(
            dense,
            tmp_path / device,
            Recipe.of(method="wanda"),
            calibration=tmp_path / "text.txt",
            num_samples=16,
            sequence_length=32,
            device=device,
        )
        results[device] = load_directory(tmp_path / device)
    for name, tensor in results["cpu"].items():
        assert ((results["cuda"][name] == 0) == (tensor == 0)).float().mean() > 0.99, name
