"""Pruning loaded models: every architecture a block at a time, mixtures of experts, tied weights, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import spinfer
from conftest import ARCHITECTURES
from spinfer.errors import CheckpointError, SpinferError
from spinfer.integrations.transformers import blocks as blocks_module
from spinfer.integrations.transformers.blocks import decoder_blocks, record
from spinfer.model import linear_modules
from spinfer.pruning import inverse_factor, prune_sparsegpt_, prune_wanda_

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OTHERS = (
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "bloom",
    "stablelm",
    "olmo",
    "starcoder2",
)
DENSE = ("llama", "qwen2", "opt", "gpt_neox", *OTHERS)


def build(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A small random model; the same each time."""
    torch.manual_seed(0)
    if architecture in ARCHITECTURES:
        config = copy.deepcopy(ARCHITECTURES[architecture])
    else:
        config = CONFIG_MAPPING[architecture](**{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture
def samples() -> Tensor:
    """Token ids [12, 24]."""
    return torch.randint(3, 320, (12, 24), generator=torch.Generator().manual_seed(1))


def hidden_after(model: PreTrainedModel, block: int, samples: Tensor) -> Tensor:
    """What a block gives when the whole model runs."""
    found: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_blocks(model).modules[block].register_forward_hook(note)
    with torch.no_grad():
        model(samples, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("architecture", DENSE)
def test_block_by_block_is_the_model(architecture: str, samples: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of five samples and a last one of two."""
    monkeypatch.setitem(blocks_module.TOKENS_AT_ONCE, "cpu", 5 * samples.shape[1])
    model = build(architecture)
    blocks = decoder_blocks(model)
    activations = record(model, blocks, samples, torch.device("cpu"))
    assert [len(batch) for batch in activations.batches] == [5, 5, 2]
    with torch.no_grad():
        for index, block in enumerate(blocks.modules):
            activations.batches = [activations.forward(index, block, batch) for batch in activations.batches]
            expected = hidden_after(model, index, samples)
            assert torch.allclose(torch.cat(activations.batches), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_every_architecture(architecture: str, method: str, samples: Tensor) -> None:
    model = build(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = spinfer.prune(model, samples, method=method, sparsity=0.5)
    names = {matrix.name for matrix in report.matrices}
    inside = {name for name in linear_modules(model).linears if name.startswith(f"{decoder_blocks(model).name}.")}
    assert names == inside
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(block.error is not None and 0 < block.error < 1 for block in report.blocks)
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in names:
            assert float((tensor == 0).float().mean()) == pytest.approx(0.5, abs=0.02), name
            if method == "wanda":
                assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])
        else:
            assert torch.equal(tensor, before[name]), name


def test_wanda_and_sparsegpt_see_the_pruned_blocks_before_them(samples: Tensor) -> None:
    """The last matrix of the second block, from inputs that hooks collect in the model pruned up to there."""
    for method in ("wanda", "sparsegpt"):
        dense, pruned = build("llama"), build("llama")
        spinfer.prune(pruned, samples, method=method, sparsity=0.5)
        halfway = build("llama")
        halfway.model.layers[0] = pruned.model.layers[0]
        inputs: list[Tensor] = []
        last = halfway.model.layers[1].mlp.down_proj
        last.register_forward_pre_hook(lambda module, given, inputs=inputs: inputs.append(given[0].detach()))
        with torch.no_grad():
            halfway(samples)
        rows = torch.cat(inputs).flatten(0, 1)
        expected = dense.model.layers[1].mlp.down_proj.weight.data.clone()
        if method == "wanda":
            prune_wanda_(expected, rows.norm(dim=0), 0.5)
        else:
            prune_sparsegpt_(expected, inverse_factor(rows.t() @ rows), 0.5)
        found = pruned.model.layers[1].mlp.down_proj.weight.data
        assert ((expected == 0) == (found == 0)).float().mean() > 0.999
        assert (expected - found).norm() < 1e-2 * expected.norm()


def test_sparsegpt_errs_least(samples: Tensor) -> None:
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        report = spinfer.prune(build("llama"), samples, method=method, sparsity=0.6)
        errors[method] = report.blocks[0].error
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_magnitude_needs_no_text() -> None:
    model = build("llama")
    report = spinfer.prune(model, method="magnitude", sparsity=0.3)
    assert report.sparsity == pytest.approx(0.3, abs=1e-3)
    assert report.calibration is None
    assert report.blocks[0].error is None


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_owl_spreads_unevenly(method: str, samples: Tensor) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:5] *= 20
    report = spinfer.prune(model, samples, method=method, sparsity=0.5, allocation="owl")
    first, second = report.blocks
    assert second.sparsity < first.sparsity
    assert first.sparsity - second.sparsity == pytest.approx(0.16)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_patterns_and_ignored_modules(samples: Tensor) -> None:
    model = build("llama")
    report = spinfer.prune(
        model, samples, method="sparsegpt", pattern="2:4", ignore=["*.down_proj", "re:.*layers\\.0.*"]
    )
    assert {matrix.name for matrix in report.matrices} == {
        f"model.layers.1.{name}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    } | {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}
    for matrix in report.matrices:
        weight = model.get_submodule(matrix.name).weight
        assert ((weight != 0).view(weight.shape[0], -1, 4).sum(-1) == 2).all()
    assert "re:" in report.dense["model.layers.0.mlp.up_proj"]
    assert report.dense["lm_head"] == "output embedding"


def test_the_recipe_is_saved_with_the_model(samples: Tensor, tmp_path: Any) -> None:
    model = build("llama")
    spinfer.prune(model, samples, method="wanda", sparsity=0.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    entry = loaded.config.spinfer_pruning
    assert entry["method"] == "wanda"
    assert entry["calibration"]["num_samples"] == 12
    assert len(entry["block_errors"]) == 2
    spinfer.compress_model(loaded)


def test_tied_embeddings_stay_tied(samples: Tensor) -> None:
    model = build("qwen2")
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    before = embedding.detach().clone()
    spinfer.prune(model, samples, sparsity=0.5)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(embedding, before)


def test_linears_that_share_a_weight_are_left_alone(samples: Tensor) -> None:
    model = build("llama")
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    before = first.weight.detach().clone()
    report = spinfer.prune(model, samples, sparsity=0.5)
    assert first.weight is second.weight
    assert torch.equal(first.weight, before)
    assert "tied" in report.dense["model.layers.0.mlp.up_proj"]
    assert "tied" in report.dense["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_model_that_is_pruned_already(method: str, samples: Tensor) -> None:
    model = build("llama")
    first = spinfer.prune(model, samples, method="wanda", sparsity=0.4)
    zeros = {m.name: model.get_submodule(m.name).weight == 0 for m in first.matrices}
    again = spinfer.prune(model, samples, method=method, sparsity=0.6)
    assert again.zeros_before == first.zeros
    assert again.sparsity == pytest.approx(0.6, abs=0.01)
    for name, mask in zeros.items():
        assert (model.get_submodule(name).weight[mask] == 0).all()
    less = spinfer.prune(model, samples, method=method, sparsity=0.1)
    assert less.zeros == less.zeros_before == again.zeros


def test_dead_inputs_are_reported(samples: Tensor) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:7] = 0
    report = spinfer.prune(model, samples, sparsity=0.5)
    dead = {matrix.name.rpartition(".")[2]: matrix.dead_inputs for matrix in report.blocks[0].matrices}
    assert dead == {"q_proj": 7, "k_proj": 7, "v_proj": 7} | dict.fromkeys(
        ("o_proj", "gate_proj", "up_proj", "down_proj"), 0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, samples: Tensor) -> None:
    half, full = (spinfer.prune(build("llama", kind), samples, sparsity=0.5) for kind in (dtype, torch.float32))
    for ours, exact in zip(half.blocks, full.blocks, strict=True):
        assert ours.error == pytest.approx(exact.error, rel=0.1)


# --- mixtures of experts ---


def mixture(**changes: Any) -> PreTrainedModel:
    return build("mixtral", num_local_experts=4, num_experts_per_tok=2, **changes)


def expert_inputs(model: PreTrainedModel, layer: int, samples: Tensor) -> list[Tensor]:
    """What goes into each expert, from the router's own choices."""
    block = model.model.layers[layer].mlp
    inputs: list[Tensor] = []
    handle = block.experts.register_forward_pre_hook(lambda module, given: inputs.extend(given[:2]))
    with torch.no_grad():
        model(samples, use_cache=False)
    handle.remove()
    hidden, chosen = inputs
    return [hidden[(chosen == expert).any(-1)] for expert in range(4)]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_are_pruned_with_the_tokens_that_reach_them(method: str, samples: Tensor) -> None:
    dense, model = mixture(num_hidden_layers=1), mixture(num_hidden_layers=1)
    implementation = model.config._experts_implementation
    samples = samples.repeat(3, 1)
    report = spinfer.prune(model, samples, method=method, sparsity=0.5)
    assert model.config._experts_implementation == implementation
    assert not report.starved
    reached = {m.name: m.tokens for m in report.matrices}
    # Attention is pruned in the same pass, with the dense block's activations, as the papers' code does.
    for expert, rows in enumerate(expert_inputs(dense, 0, samples)):
        name = f"model.layers.0.mlp.experts.gate_up_proj[{expert}]"
        assert reached[name] == len(rows)
        expected = dense.model.layers[0].mlp.experts.gate_up_proj.data[expert].clone()
        if method == "wanda":
            prune_wanda_(expected, rows.norm(dim=0), 0.5)
        else:
            prune_sparsegpt_(expected, inverse_factor(rows.t() @ rows), 0.5)
        found = model.model.layers[0].mlp.experts.gate_up_proj.data[expert]
        assert ((expected == 0) == (found == 0)).float().mean() > 0.999
    gate = next(name for name, _ in model.named_parameters() if name.endswith("gate.weight"))
    assert torch.equal(model.get_parameter(gate), dense.get_parameter(gate))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_starved_experts_are_pruned_by_magnitude(method: str, samples: Tensor) -> None:
    """Expert 3 is never chosen: its router weights are far below the others'."""
    model = mixture(num_hidden_layers=1)
    with torch.no_grad():
        router = next(p for name, p in model.named_parameters() if name.endswith("gate.weight"))
        router.zero_()
        model.model.layers[0].mlp.experts.gate_up_proj[3] = 0.01 * torch.randn(192, 64)
    few = samples[:2]  # 48 tokens, fewer than the 64 inputs
    original = model.model.layers[0].mlp.experts.gate_up_proj.data[3].clone()
    report = spinfer.prune(model, few, method=method, sparsity=0.5)
    assert "model.layers.0.mlp.experts.gate_up_proj[3]" in report.starved
    entry = next(m for m in report.matrices if m.name == "model.layers.0.mlp.experts.gate_up_proj[3]")
    assert entry.method == "magnitude"
    expected = spinfer.pruning.prune_magnitude_(original, 0.5)
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj.data[3], expected)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert model.config.spinfer_pruning["starved_experts"] == list(report.starved)


def test_experts_that_are_applied_otherwise_are_refused(samples: Tensor) -> None:
    """gpt-oss keeps its experts transposed and multiplies by them itself."""
    model = build("gpt_oss", num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=1)
    with pytest.raises(SpinferError, match=r"no calibration token reached .*experts.*--ignore"):
        spinfer.prune(model, samples, method="wanda", sparsity=0.5)
    report = spinfer.prune(model, samples, method="wanda", sparsity=0.5, ignore=["*.experts.*"])
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


# --- what is refused ---


def test_without_text(samples: Tensor) -> None:
    for choices in ({"method": "wanda"}, {"method": "sparsegpt"}, {"method": "magnitude", "allocation": "owl"}):
        with pytest.raises(SpinferError, match="needs calibration text"):
            spinfer.prune(build("llama"), **choices)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"token ids \[samples, tokens\]"),
        (torch.zeros(3, 4), r"token ids \[samples, tokens\]"),
        (torch.zeros(0, 4, dtype=torch.int64), r"token ids \[samples, tokens\]"),
        (torch.full((2, 4), 320), "outside the model's vocabulary of 320"),
        (torch.full((2, 4), -1), "outside the model's vocabulary of 320"),
        (torch.ones(2, 129, dtype=torch.int64), "longer than the model's limit of 128"),
    ],
)
def test_samples_that_are_none(bad: Tensor, message: str) -> None:
    with pytest.raises(SpinferError, match=message):
        spinfer.prune(build("llama"), bad)


def test_models_without_linears(samples: Tensor) -> None:
    with pytest.raises(SpinferError, match=r"nothing to prune.*Conv1D"):
        spinfer.prune(build("gpt2"), samples)


def test_architectures_that_list_no_blocks(samples: Tensor) -> None:
    model = build("llama")
    model._no_split_modules = []
    with pytest.raises(SpinferError, match="expected one list of decoder blocks, found none"):
        spinfer.prune(model, samples)


def test_blocks_that_talk_to_each_other(samples: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")

    def between(self: nn.Module, input_ids: Tensor, **rest: Any) -> Any:
        first, second = self.layers
        hidden = first(self.embed_tokens(input_ids), attention_mask=None, position_embeddings=None)
        return second(hidden * 2, attention_mask=None, position_embeddings=None)

    monkeypatch.setattr(type(model.model), "forward", between)
    with pytest.raises(SpinferError, match="block 1 does not get what the block before it gives"):
        spinfer.prune(model, samples)


def test_blocks_that_depend_on_the_text(samples: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")

    def forward(self: nn.Module, input_ids: Tensor, **rest: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, token_ids=input_ids)
        return hidden

    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.raises(SpinferError, match="depends on the text"):
        spinfer.prune(model, samples)


def test_blocks_that_share_a_cache(samples: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")

    def forward(self: nn.Module, input_ids: Tensor, **rest: Any) -> Any:
        hidden, shared = self.embed_tokens(input_ids), {}
        for layer in self.layers:
            hidden = layer(hidden, shared=shared)
        return hidden

    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.raises(SpinferError, match="its blocks get a dict, which they may change"):
        spinfer.prune(model, samples)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, samples: Tensor) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    for method in ("magnitude", "sparsegpt"):
        with pytest.raises(SpinferError, match=r"layers\.1\.mlp\.(up|down)_proj"):
            spinfer.prune(model, samples, method=method)


def test_a_pattern_that_matches_nothing(samples: Tensor) -> None:
    with pytest.raises(CheckpointError, match="matches no Linear"):
        spinfer.prune(build("llama"), samples, ignore=["*.typo"])


def test_everything_ignored(samples: Tensor) -> None:
    with pytest.raises(SpinferError, match="nothing to prune"):
        spinfer.prune(build("llama"), samples, ignore=["*"])


def test_compressed_models_are_refused(samples: Tensor) -> None:
    model = build("llama", torch.bfloat16)
    spinfer.prune(model, method="magnitude", sparsity=0.6)
    spinfer.compress_model(model)
    with pytest.raises(SpinferError, match="prune the dense one"):
        spinfer.prune(model, samples)


def test_training_mode_is_given_back(samples: Tensor) -> None:
    model = build("opt").train()
    spinfer.prune(model, samples, sparsity=0.5)
    assert model.training
