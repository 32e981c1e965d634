"""Time and peak memory of compress, decompress and inspect on a synthetic sharded model.

    python benchmarks/checkpoint.py --directory /tmp/spinfer-bench --output benchmarks/results/DEVICE/checkpoint.json

Each step runs in a process of its own, which reports its peak resident memory (VmHWM) beside what it had after
importing everything. The baseline is `cp` of the same dense directory, flushed to disk as the conversions are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spinfer.bench.processor import cpu_facts
from spinfer.checkpoint import CompressedCheckpoint, compress_checkpoint, decompress_checkpoint, inspect_checkpoint

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 1536, 8960, 256, 151_936
"""Shapes of Qwen2.5-1.5B; its output embedding is tied, so it is not stored."""

SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def linears(layers: int) -> dict[str, tuple[int, int]]:
    """Module names and shapes."""
    return {f"model.layers.{index}.{name}": shape for index in range(layers) for name, shape in SHAPES.items()}


def write_model(directory: Path, layers: int, sparsity: float, shards: int) -> None:
    """Random bf16 weights, pruned at random."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    groups: list[dict[str, tuple[int, int]]] = [{} for _ in range(shards)]
    for index, (name, shape) in enumerate(linears(layers).items()):
        groups[index * shards // (layers * len(SHAPES))][name] = shape
    weight_map = {}
    for number, group in enumerate(groups, 1):
        state = {}
        for name, shape in group.items():
            weight = torch.randn(shape, generator=generator)
            state[f"{name}.weight"] = (weight * (torch.rand(shape, generator=generator) >= sparsity)).bfloat16()
        if number == 1:
            state["model.embed_tokens.weight"] = torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16()
            state |= {f"model.layers.{index}.input_layernorm.weight": torch.ones(HIDDEN) for index in range(layers)}
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(state, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "tie_word_embeddings": True}))


def memory_nbytes(field: str) -> int:
    """A line of this process's status, such as VmHWM (peak resident) or VmRSS."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def load(directory: Path) -> None:
    """Read and check every compressed weight."""
    for _ in CompressedCheckpoint(directory).load_all():
        pass


def steps(root: Path, layers: int, max_shard_nbytes: int) -> dict[str, Callable[[], object]]:
    """What is measured, in order; each finds what the one before it left."""
    return {
        "compress": lambda: compress_checkpoint(
            root / "dense",
            root / "compressed",
            linears=linears(layers),
            dense={"lm_head": "output embedding"},
            max_shard_nbytes=max_shard_nbytes,
        ),
        "inspect": lambda: inspect_checkpoint(root / "compressed"),
        "load and check": lambda: load(root / "compressed"),
        "decompress": lambda: decompress_checkpoint(
            root / "compressed", root / "back", max_shard_nbytes=max_shard_nbytes
        ),
        "copy (baseline)": lambda: subprocess.run(
            ["sh", "-c", 'cp --reflink=never -r "$1" "$2" && sync "$2"/*', "sh", root / "dense", root / "copy"],
            check=True,
        ),
    }


def measure(step: Callable[[], object]) -> dict[str, Any]:
    """Run here; seconds, and peak memory over what the process had."""
    before = memory_nbytes("VmRSS")
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "imported_nbytes": before, "peak_nbytes": memory_nbytes("VmHWM")}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="for the models; removed afterwards (12 GB)")
    parser.add_argument("--output", type=Path, help="JSON file for the result; standard output where absent")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--max-shard-nbytes", type=int, default=10**9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    todo = steps(options.directory, options.layers, options.max_shard_nbytes)
    if options.step:
        print(json.dumps(measure(todo[options.step])))
        return
    options.directory.mkdir()
    try:
        write_model(options.directory / "dense", options.layers, options.sparsity, options.shards)
        dense_nbytes = sum(path.stat().st_size for path in (options.directory / "dense").iterdir())
        results = {}
        for name in todo:
            run = subprocess.run(
                [sys.executable, *sys.argv, "--step", name], capture_output=True, text=True, check=True
            )
            results[name] = json.loads(run.stdout)
            results[name]["dense_megabytes_per_s"] = dense_nbytes / 1e6 / results[name]["seconds"]
            print(f"{name}: {results[name]}", file=sys.stderr)
        report = inspect_checkpoint(options.directory / "compressed").to_dict()
    finally:
        shutil.rmtree(options.directory)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    content = {
        "device": cpu_facts()["model name"],
        "cores": os.cpu_count(),
        "threads": options.threads,
        "load_average_5_minutes": os.getloadavg()[1],
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": commit,
        "layers": options.layers,
        "sparsity": options.sparsity,
        "max_shard_nbytes": options.max_shard_nbytes,
        "dense_nbytes": dense_nbytes,
        "largest_layer_nbytes": 2 * INTERMEDIATE * HIDDEN,
        "bits_per_weight": report["bits_per_weight"],
        "compressed_nbytes": report["total_nbytes"],
        "steps": results,
    }
    text = json.dumps(content, indent=2) + "\n"
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
