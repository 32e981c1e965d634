"""Decoding on the CPU, sparse against dense in every type: `python benchmarks/decode_cpu.py OUT.json [MODEL_DIR]`.

Without MODEL_DIR the model has the shape of Llama-3.2-1B and random weights, pruned to --sparsity at random. Speed: all
models in one process, in turns. Memory: a process for each model, which loads it and decodes a little.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import spinfer  # noqa: F401  (registers the format)
from spinfer.bench.model import run_once, time_models

LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROMPT_TOKENS = 16


def write_random(directory: Path, sparsity: float) -> None:
    """Save a bf16 model with a share of zeros in its linear layers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LLAMA_1B, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            with torch.no_grad():
                module.weight.mul_(torch.rand(module.weight.shape) >= sparsity)
    model.save_pretrained(directory)


def load(directory: Path, dtype: str) -> PreTrainedModel:
    """A dense or compressed model, ready for inference."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype]).eval()


def variants(dense: Path, sparse: Path) -> Iterator[tuple[str, Path, str]]:
    """What is measured: label, directory, type of the values and activations."""
    for dtype in DTYPES:
        yield f"dense {dtype}", dense, dtype
    for dtype in ("bf16", "fp16"):
        yield f"sparse {dtype}", sparse, dtype


def memory_mb(field: str) -> float:
    """A line of this process's status: VmRSS, or VmHWM for its peak."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition(f"{field}:")[2].split()[0]) * 1024 / 1e6, 1)


def print_memory(directory: Path, dtype: str) -> None:
    """Resident memory of this process: before the model is loaded, while it decodes, and the most it ever was."""
    before = memory_mb("VmRSS")
    model = load(directory, dtype)
    run_once(model, torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64), 4)
    weights = round(model.get_memory_footprint() / 1e6, 1)
    resident = {"resident_mb": memory_mb("VmRSS"), "peak_mb": memory_mb("VmHWM")}
    print(json.dumps({"weights_mb": weights, "imports_mb": before, **resident}))


def run_this(*arguments: object) -> str:
    """Output of this interpreter with other arguments."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model", type=Path, nargs="?", help="a pruned dense model")
    parser.add_argument("--sparsity", type=float, default=0.6, help="of the random weights")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each model; 0: memory only")
    parser.add_argument(
        "--memory-as", choices=DTYPES, help=argparse.SUPPRESS
    )  # in a process of its own: OUT is a model
    args = parser.parse_args()
    if args.memory_as:
        print_memory(args.out, args.memory_as)
        return
    load_average = os.getloadavg()[0]  # of others
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse = args.model or Path(folder, "dense"), Path(folder, "sparse")
        if not args.model:
            write_random(dense, args.sparsity)
        run_this("-m", "spinfer", "compress", dense, "-o", sparse)
        memory = {
            label: json.loads(run_this(__file__, directory, "--memory-as", dtype))
            for label, directory, dtype in variants(dense, sparse)
        }
        speed = {label: {} for label in memory}
        if args.repeats:
            models = {label: load(directory, dtype) for label, directory, dtype in variants(dense, sparse)}
            timings = time_models(models, prompt_tokens=PROMPT_TOKENS, new_tokens=args.new_tokens, repeats=args.repeats)
            speed = {label: dataclasses.asdict(timing) for label, timing in timings.items()}
    result = {
        "model": args.model.name if args.model else f"Llama-3.2-1B shape, random, {args.sparsity:.0%} sparse",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average_1_minute": load_average,
        "date": time.strftime("%Y-%m-%d"),
        "runs": {label: speed[label] | memory[label] for label in memory},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for label, run in result["runs"].items():
        print(label, *(f"{name} {value:.1f}" for name, value in run.items()), sep=", ")


if __name__ == "__main__":
    main()
