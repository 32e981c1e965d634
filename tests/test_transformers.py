"""Compressed models through transformers: load, run, save, generate, in several architectures."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import spinfer
from conftest import ARCHITECTURES, pruned_model
from spinfer.errors import CheckpointError, SpinferError
from spinfer.integrations.transformers.dense_linear import DenseLinear
from spinfer.integrations.transformers.memory import MappedFiles
from spinfer.integrations.transformers.quantizer import SpinferConfig

WITH_LINEARS = [name for name in ARCHITECTURES if name != "gpt2"]

# bf16 keeps 8 bits: one rounding of the output is 2^-9 relative; panels may sum in another order than the whole matrix.
BF16_TOLERANCE = 1e-2


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64."""
    return float((actual.double() - expected.double()).norm().detach() / expected.double().norm().detach())


def sparse_modules(model: nn.Module) -> dict[str, spinfer.SparseLinear]:
    """By name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, spinfer.SparseLinear)}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's shards."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(params=WITH_LINEARS)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture that has Linears to compress."""
    return str(request.param)


def test_compress_model_keeps_logits(architecture: str, tokens: Tensor) -> None:
    model = pruned_model(architecture)
    expected = model(tokens).logits
    result = spinfer.compress_model(model)
    assert set(result.modules) == set(sparse_modules(model))
    assert len(result.modules) >= 8
    assert not any("lm_head" in name or "embed_out" in name for name in result.modules)
    assert relative_error(model(tokens).logits, expected) < BF16_TOLERANCE


def test_float32_logits_against_dense(architecture: str, tokens: Tensor) -> None:
    model = pruned_model(architecture, dtype=torch.float32)
    expected = copy.deepcopy(model).double()(tokens).logits
    spinfer.compress_model(model)
    assert relative_error(model(tokens).logits, expected) < 1e-5


def test_save_load_save_is_bit_exact(architecture: str, tokens: Tensor, tmp_path: Path) -> None:
    model = pruned_model(architecture)
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    loaded.save_pretrained(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees mapped files through /proc")
def test_a_loaded_model_keeps_no_file_mapped(architecture: str, tmp_path: Path) -> None:
    model = pruned_model(architecture)
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    head = loaded.get_output_embeddings().weight
    assert (head is loaded.get_input_embeddings().weight) == model.config.tie_word_embeddings


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="sees resident pages through /proc")
def test_pages_of_a_mapped_file_are_given_back(tmp_path: Path) -> None:
    def resident_kb() -> int:
        ours = False
        total = 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split(maxsplit=1)[0]:
                ours = line.endswith(str(tmp_path / "model.safetensors"))
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1])
        return total

    save_file({"a": torch.arange(1 << 20), "b": torch.ones(8)}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")
    files = MappedFiles()
    read = mapped["a"].clone()
    assert files.hold(mapped["a"])
    assert not files.hold(read)
    assert resident_kb() >= 8 << 10
    files.release(mapped["a"])
    assert resident_kb() < 1 << 10
    assert torch.equal(mapped["a"], read)


def test_generate_and_dequantize(architecture: str, tokens: Tensor, tmp_path: Path) -> None:
    model = pruned_model(architecture, dtype=torch.float32)
    mask = torch.ones_like(tokens)
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **arguments)
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(loaded.generate(tokens, **arguments), expected)
    restored = loaded.dequantize()
    assert not sparse_modules(restored)
    for name, parameter in restored.named_parameters():
        assert torch.equal(parameter, dense[name]), name
    restored.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


def test_never_holds_a_dense_weight_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    shapes = {module.storage.shape for module in sparse_modules(model).values()}

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was decoded while loading")

    monkeypatch.setattr("spinfer.format.tensor.decode_arrays", refuse)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    held = [tensor for tensor in (*loaded.parameters(), *loaded.buffers()) if tuple(tensor.shape) in shapes]
    assert not held


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtype_argument_casts_the_values(dtype: torch.dtype, keyword: str, tokens: Tensor, tmp_path: Path) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path / "bf16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", **{keyword: dtype})
    assert loaded.dtype == dtype
    assert {module.storage.dtype for module in sparse_modules(loaded).values()} == {dtype}
    dense = pruned_model("llama")
    dense.load_state_dict({**model.dequantize().state_dict()})
    assert relative_error(loaded(tokens).logits, dense.to(dtype)(tokens).logits) < 1e-3
    loaded.save_pretrained(tmp_path / "cast")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cast", dtype="auto")
    assert torch.equal(again(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map: object, tokens: Tensor, tmp_path: Path) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map=device_map, low_cpu_mem_usage=True)
    logits = loaded(tokens.to(loaded.device)).logits  # "auto" takes a GPU where there is one
    assert relative_error(logits.cpu(), model(tokens).logits) < BF16_TOLERANCE


def test_disk_offload(tokens: Tensor, tmp_path: Path) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path / "model")
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {name: "disk" if name == "model.layers.1" else "cpu" for name in names}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="auto", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_base_model_loads_from_a_causal_checkpoint(tokens: Tensor, tmp_path: Path) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_memory_footprint_counts_compressed_bytes(tmp_path: Path) -> None:
    model = pruned_model("llama", sparsity=0.7)
    before = model.get_memory_footprint()
    linears = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear)) - model.lm_head.weight.nbytes
    spinfer.compress_model(model)
    saved = before - model.get_memory_footprint()
    encoded = sum(module.weight_nbytes for module in sparse_modules(model).values())
    assert saved == linears - encoded
    assert saved > 0.4 * linears


def test_compiled_forward_matches(tokens: Tensor) -> None:
    model = pruned_model("llama", dtype=torch.float32)
    spinfer.compress_model(model)
    expected = model(tokens).logits
    compiled = torch.compile(model, fullgraph=True)
    assert relative_error(compiled(tokens).logits, expected) < 1e-5


def test_gpt2_lists_conv1d_as_dense() -> None:
    model = pruned_model("gpt2")
    with pytest.raises(SpinferError, match=r"nothing to compress in this GPT2LMHeadModel.*Conv1D"):
        spinfer.compress_model(model)


def test_tied_embeddings_stay_tied(tokens: Tensor, tmp_path: Path) -> None:
    model = pruned_model("qwen2")
    result = spinfer.compress_model(model)
    assert result.dense["lm_head"] == "output embedding"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert isinstance(loaded.lm_head, DenseLinear)
    assert "lm_head.weight" not in all_tensors(tmp_path)


def test_a_dense_weight_is_left_dense_with_its_reason() -> None:
    model = pruned_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data.normal_()
    result = spinfer.compress_model(model)
    assert result.dense["model.layers.0.mlp.up_proj"].startswith("would be larger: density 1.0")
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def test_already_compressed_is_refused() -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    with pytest.raises(SpinferError, match="quantised already"):
        spinfer.compress_model(model)


def test_compressing_while_loading_is_refused(tmp_path: Path) -> None:
    pruned_model("llama").save_pretrained(tmp_path)
    with pytest.raises(SpinferError, match="spinfer compress"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SpinferConfig())


def _rewrite(folder: Path, name: str, change: object) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weight", lambda t: t[:-8]),
        ("weight_bitmap", lambda t: t[:-1]),
        ("weight_bitmap", lambda t: t ^ 1),
        ("weight_offsets", lambda t: t.flip(0)),
        ("weight_offsets", lambda t: t + 1),
        ("weight_offsets", lambda t: t * 1000),
    ],
)
def test_damaged_parts_are_refused(part: str, change: object, tmp_path: Path) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    _rewrite(tmp_path, f"model.layers.1.self_attn.q_proj.{part}", change)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")


def test_a_missing_part_is_refused(tmp_path: Path) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight_bitmap"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 200', '"intermediate_size": 264'))
    with pytest.raises(CheckpointError, match="different models"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")


def test_a_future_format_version_is_refused(tmp_path: Path) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match="pip install --upgrade spinfer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


LOAD = "AutoModelForCausalLM.from_pretrained({path!r})"


@pytest.mark.parametrize(
    ("imports", "loads"),
    [
        ("import spinfer; from transformers import AutoModelForCausalLM", True),
        ("from transformers import AutoModelForCausalLM; import spinfer", True),
        ("from transformers import AutoModelForCausalLM, PreTrainedModel; import spinfer", True),
        ("from transformers import AutoModelForCausalLM", False),
    ],
)
def test_import_order_and_the_failure_without_spinfer(imports: str, loads: bool, tmp_path: Path) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    code = f"{imports}\n{LOAD.format(path=str(tmp_path))}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode == 0) is loads, done.stderr
    if not loads:
        assert "ignore_mismatched_sizes" in done.stderr


def test_saved_names_are_those_of_the_specification(tmp_path: Path) -> None:
    model = pruned_model("llama")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if "layers.0.mlp.up_proj" in key]  # noqa: SIM118
    assert sorted(key.rsplit(".", 1)[1] for key in keys) == ["weight", "weight_bitmap", "weight_offsets"]
