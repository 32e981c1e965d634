"""The command line as a user meets it: two streams and an exit status."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spinfer
from command_line import as_json, error_of, run, succeed
from conftest import pruned_model, save_with_tokenizer


@pytest.fixture
def compressed_dir(pruned_dir: Path) -> Path:
    """Compressed through the command line."""
    output = pruned_dir.parent / "compressed"
    succeed("compress", pruned_dir, "-o", output)
    return output


def test_compress_inspect_load_decompress(pruned_dir: Path, compressed_dir: Path, tmp_path: Path) -> None:
    report = as_json("inspect", compressed_dir, "--json")
    assert len(report["layers"]) == 14
    assert report["dense"][0]["name"] == "lm_head"
    assert report["total_nbytes"] < report["total_dense_nbytes"]
    table = succeed("inspect", compressed_dir)
    assert "model.layers.1.mlp.down_proj" in table
    assert "128x200" in table

    tokens = torch.randint(0, 320, (1, 9))
    dense = AutoModelForCausalLM.from_pretrained(pruned_dir, dtype="auto")
    sparse = AutoModelForCausalLM.from_pretrained(compressed_dir, dtype="auto")
    expected = dense(tokens).logits.float()
    assert (sparse(tokens).logits.float() - expected).norm() < 1e-2 * expected.norm()

    succeed("decompress", compressed_dir, "-o", tmp_path / "dense")
    restored, original = (
        load_file(tmp_path / "dense" / "model.safetensors"),
        load_file(pruned_dir / "model.safetensors"),
    )
    assert restored.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(restored[name], tensor), name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "dense" / name).read_bytes() == (pruned_dir / name).read_bytes()


def test_save_pretrained_writes_what_compress_wrote(compressed_dir: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(compressed_dir, dtype="auto").save_pretrained(tmp_path / "saved")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (compressed_dir, tmp_path / "saved"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    entries = [json.loads((folder / "config.json").read_text()) for folder in (compressed_dir, tmp_path / "saved")]
    assert entries[0]["quantization_config"] == entries[1]["quantization_config"]


def test_compress_in_memory_equals_compress_on_disk(pruned_dir: Path, compressed_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned_dir, dtype="auto")
    spinfer.compress_model(model)
    model.save_pretrained(tmp_path / "memory")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (compressed_dir, tmp_path / "memory"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_patterns(pruned_dir: Path, tmp_path: Path) -> None:
    report = as_json(
        "compress", pruned_dir, "-o", tmp_path / "out", "--include", "*.mlp.*", "--ignore", "re:.*down_proj", "--json"
    )
    assert {layer["name"].rsplit(".", 1)[1] for layer in report["layers"]} == {"up_proj", "gate_proj"}
    reasons = {layer["name"]: layer["reason"] for layer in report["dense"]}
    assert "re:.*down_proj" in reasons["model.layers.0.mlp.down_proj"]
    assert "include" in reasons["model.layers.0.self_attn.q_proj"]


def test_generate_streams_text_and_reports_speed(compressed_dir: Path) -> None:
    arguments = ("generate", compressed_dir, "--prompt", "abc", "--max-tokens", "5", "--device", "cpu")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    assert "peak memory" in done.stderr
    result = as_json(*arguments, "--json")
    assert done.stdout == result["text"] + "\n"
    assert result["prompt_tokens"] == 3
    assert result["new_tokens"] == 5
    assert result["generation_tokens_per_s"] > 0
    assert result["peak_memory_nbytes"] > 1e6


def test_eval_compares_with_the_dense_model(pruned_dir: Path, compressed_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 6, encoding="utf-8")
    arguments = ("eval", compressed_dir, "--text", text, "--context", "64", "--device", "cpu", "--dtype", "float32")
    sparse, dense = as_json(*arguments, "--compare", pruned_dir, "--json")
    assert sparse["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    assert sparse["tokens"] == dense["tokens"] > 200
    assert f"{sparse['perplexity']:.4f}" in succeed(*arguments)


def test_bench_compares_in_one_process(pruned_dir: Path, compressed_dir: Path) -> None:
    arguments = ("bench", compressed_dir, "-p", "8", "-n", "3", "-b", "2", "-r", "2", "--device", "cpu")
    result = as_json(*arguments, "-o", "json", "--compare", pruned_dir)
    assert [r["model"] for r in result["results"]] == [str(compressed_dir), str(pruned_dir)]
    assert all(r["decode_tokens_per_s"] > 0 and r["prefill_tokens_per_s"] > 0 for r in result["results"])
    assert result["results"][0]["memory_nbytes"] < result["results"][1]["memory_nbytes"]
    assert result["batch"] == 2
    assert "decode tokens/s" in succeed(*arguments)
    options_first = ("bench", *arguments[2:], compressed_dir)
    assert "decode tokens/s" in succeed(*options_first)


def test_bench_needs_no_tokenizer(compressed_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(compressed_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    assert "decode tokens/s" in succeed("bench", tmp_path / "bare", "-p", "4", "-n", "1", "-r", "1", "--device", "cpu")


def test_bench_of_cuda_graphs_needs_a_gpu(compressed_dir: Path) -> None:
    assert "CUDA device" in error_of("bench", compressed_dir, "--cuda-graphs", "--device", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_kernel_needs_a_gpu() -> None:
    assert "CUDA device" in error_of("bench", "kernel", "-m", "64", "-k", "64")


def test_bench_kernel_prints_a_table_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(m: int, k: int, tokens: list[int], sparsities: list[float], **options: Any) -> list[dict[str, Any]]:
        asked.append((m, k, tokens, sparsities, options["dtype"], options["mask"]))
        row = {"n": 4, "sparsity": 0.7, "us": 10.0, "dense_us": 25.0, "fp8_us": None, "speedup": 2.5}
        return [row | {"byte_limit": 2.76, "error": 2e-4}]

    monkeypatch.setattr("spinfer.cli.bench.bench_kernel", fake)
    monkeypatch.setattr("spinfer.cli.bench.environment", lambda: {"device": "made up"})
    monkeypatch.setattr("spinfer.cli.bench.bandwidths", lambda: {"read_bandwidth": 3e12})
    arguments = ("bench", "kernel", "-m", "64", "-k", "128", "-n", "4", "-n", "8", "--sparsity", "0.7")
    cells = [cell.strip() for cell in succeed(*arguments).splitlines()[-1].split("|")]
    assert cells[1:-1] == ["70%", "4", "10.0", "25.0", "", "2.50", "2.76", "2.0e-04"]
    result = as_json(*arguments, "--dtype", "bfloat16", "--mask", "2:4", "--json")
    assert result["environment"] == {"device": "made up", "read_bandwidth": 3e12}
    assert result["results"][0]["us"] == 10.0
    assert asked == [
        (64, 128, [4, 8], [0.7], torch.float16, "random"),
        (64, 128, [4, 8], [0.7], torch.bfloat16, "2:4"),
    ]


def test_every_verb_has_help() -> None:
    for verb in ("prune", "compress", "decompress", "inspect", "generate", "eval", "bench"):
        assert "MODEL" in succeed(verb, "--help")


def test_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spinfer", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "verb",
    [
        ["prune", "{}", "-o", "{}-out", "--method", "magnitude"],
        ["compress", "{}", "-o", "{}-out"],
        ["decompress", "{}", "-o", "{}-out"],
        ["inspect", "{}"],
        ["generate", "{}", "--prompt", "a"],
        ["eval", "{}", "--text", "pyproject.toml"],
        ["bench", "{}"],
    ],
)
def test_not_a_model_directory(verb: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert str(folder) in error_of(*(part.format(folder) for part in verb))
    assert not (tmp_path / "empty-out").exists()


def test_a_model_without_linears_says_why(tmp_path: Path) -> None:
    folder = save_with_tokenizer(pruned_model("gpt2"), tmp_path / "gpt2")
    message = error_of("compress", folder, "-o", tmp_path / "out")
    assert str(folder) in message
    assert "Conv1D" in message
    assert not (tmp_path / "out").exists()


def test_output_that_exists_is_kept(pruned_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "notes.txt").write_text("keep")
    assert str(output) in error_of("compress", pruned_dir, "-o", output)
    assert (output / "notes.txt").read_text() == "keep"


def test_truncated_weights_are_named(compressed_dir: Path) -> None:
    file = compressed_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for verb in (["inspect"], ["generate", "--prompt", "a"]):
        assert "compressed" in error_of(verb[0], compressed_dir, *verb[1:])


def test_inconsistent_parts_are_named(compressed_dir: Path) -> None:
    file = compressed_dir / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_bitmap"][3] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert "model.layers.0.mlp.up_proj" in error_of("generate", compressed_dir, "--prompt", "a", "--device", "cpu")


def test_text_that_is_not_text(compressed_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    assert "UTF-8" in error_of("eval", compressed_dir, "--text", tmp_path / "binary")
    assert "nowhere.txt" in error_of("eval", compressed_dir, "--text", tmp_path / "nowhere.txt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(compressed_dir: Path) -> None:
    assert "--device cpu" in error_of("generate", compressed_dir, "--prompt", "a", "--device", "cuda")
