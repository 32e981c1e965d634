"""Decode speed on the CPU, sparse against dense in every type: `python benchmarks/decode_cpu.py OUT.json [MODEL_DIR]`.

Without MODEL_DIR the model has the shape of Llama-3.2-1B and random weights, pruned to --sparsity at random.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import spinfer
from spinfer.bench.model import time_models

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


def build(directory: Path | None, dtype: torch.dtype, sparsity: float) -> PreTrainedModel:
    """The dense model with a share of zeros in its linear layers, the same ones every time."""
    torch.manual_seed(0)
    if directory is not None:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA_1B)
    torch.set_default_dtype(torch.float32)
    model.to_empty(device="cpu")
    model.init_weights()
    model.tie_weights()
    for name, module in model.named_modules():
        if "rotary" in name and hasattr(module, "inv_freq"):
            module.inv_freq = module.original_inv_freq = type(module)(LLAMA_1B).inv_freq
        if isinstance(module, nn.Linear) and name != "lm_head":
            with torch.no_grad():
                module.weight.mul_(torch.rand(module.weight.shape) >= sparsity)
    return model.eval()


def main() -> None:
    """Measure, interleaved, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--sparsity", type=float, default=0.6, help="of the random weights")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    models: dict[str, PreTrainedModel] = {}
    for name, dtype in DTYPES.items():
        models[f"dense {name}"] = build(args.model, dtype, args.sparsity)
    for name, dtype in list(DTYPES.items())[:2]:
        models[f"sparse {name}"] = build(args.model, dtype, args.sparsity)
        spinfer.compress_model(models[f"sparse {name}"])
    timings = time_models(models, prompt_tokens=16, new_tokens=args.new_tokens, repeats=args.repeats)
    result = {
        "model": args.model.name if args.model else f"Llama-3.2-1B shape, random, {args.sparsity:.0%} sparse",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "runs": {
            name: dataclasses.asdict(timing) | {"weights_mb": round(models[name].get_memory_footprint() / 1e6, 1)}
            for name, timing in timings.items()
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, run in result["runs"].items():
        print(f"{name}: {run['decode_tokens_per_s']:.1f} tokens/s, {run['weights_mb']:.0f} MB")


if __name__ == "__main__":
    main()
