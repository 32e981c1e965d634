"""The main job on a real model: prune, compress, load, generate, and compare with the dense model.

Each step is the command a user would type; this script only chains them and prints one table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from fetch import fetch_model, fetch_text
from table import table

from spinfer.bench.processor import processor

PROMPT = "Norway is a country in"


def spinfer(*arguments: str | Path, capture: bool = False) -> Any:
    """Run `spinfer ...`; its JSON when captured."""
    command = [sys.executable, "-m", "spinfer", *map(str, arguments)]
    print(f"\n$ spinfer {shlex.join(command[3:])}", file=sys.stderr)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE if capture else None)
    return json.loads(done.stdout) if capture else None


def weights_nbytes(folder: Path) -> int:
    """Bytes of a directory's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    """Run the demo in a folder that keeps what was fetched."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".demo"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--method", choices=("magnitude", "wanda", "sparsegpt"), default="sparsegpt")
    parser.add_argument("--num-samples", type=int, default=16, help="of calibration; more take longer and prune better")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, help="also write the result here, as JSON")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(exist_ok=True)

    dense = fetch_model(folder)
    calibration, text = fetch_text(folder)
    pruned, compressed = folder / "smollm2-135m-pruned", folder / "smollm2-135m-spinfer"
    for path in (pruned, compressed):
        shutil.rmtree(path, ignore_errors=True)
    sampling = ["--num-samples", arguments.num_samples, "--sequence-length", arguments.sequence_length]
    choice = ["--method", arguments.method, "--sparsity", arguments.sparsity, "--calibration", calibration]
    pruning = spinfer("prune", dense, "-o", pruned, *choice, *sampling, "--json", capture=True)
    spinfer("compress", pruned, "-o", compressed)
    report = spinfer("inspect", compressed, "--json", capture=True)
    spinfer("generate", compressed, "--raw", "--prompt", PROMPT, "--max-tokens", "48")
    # In fp32 the compressed and the pruned model, which hold the same numbers, also compute the same ones.
    evaluation = ["--text", text, "--max-tokens", arguments.eval_tokens, "--dtype", "float32", "--json"]
    dense_result = spinfer("eval", dense, *evaluation, capture=True)
    compressed_result, pruned_result = spinfer("eval", compressed, *evaluation, "--compare", pruned, capture=True)
    bench = spinfer("bench", compressed, "-p", 64, "-n", 16, "-r", 9, "-o", "json", "--compare", pruned, capture=True)
    sparse_speed, dense_speed = bench["results"]

    result = {
        "model": "SmolLM2-135M-Instruct",
        "sparsity": arguments.sparsity,
        "method": arguments.method,
        "calibration": {"num_samples": arguments.num_samples, "sequence_length": arguments.sequence_length},
        "pruning_seconds": pruning["seconds"],
        "evaluated_tokens": dense_result["tokens"],
        "device": bench["device"],
        "processor": processor(),
        "threads": bench["threads"],
        "load_average_5_minutes": os.getloadavg()[1],
        "versions": {name: bench[name] for name in ("spinfer", "torch", "transformers")},
        "rows": [
            row("dense", dense, dense_result, None, 8.0 * torch.bfloat16.itemsize),
            row("pruned", pruned, pruned_result, dense_speed, 8.0 * torch.bfloat16.itemsize),
            row("compressed", compressed, compressed_result, sparse_speed, report["bits_per_weight"]),
        ],
    }
    print(f"\n{table(result)}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def row(
    name: str, path: Path, evaluation: dict[str, Any], speed: dict[str, Any] | None, bits: float
) -> dict[str, str | float | None]:
    """One line of the table; speed is None where the model was not timed."""
    return {
        "model": name,
        "disk_nbytes": weights_nbytes(path),
        "bits_per_weight": bits,
        "perplexity": evaluation["perplexity"],
        "decode_tokens_per_s": speed["decode_tokens_per_s"] if speed else None,
        "prefill_tokens_per_s": speed["prefill_tokens_per_s"] if speed else None,
        "memory_nbytes": speed["memory_nbytes"] if speed else None,
    }


if __name__ == "__main__":
    main()
