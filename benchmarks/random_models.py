"""Models of real shapes with random weights: a config.json for dense runs, a compressed checkpoint for sparse ones.

`python benchmarks/random_models.py llama-3-8b DIR` writes such a checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from spinfer import encode
from spinfer.checkpoint.config import CompressionConfig, ModuleEntry
from spinfer.checkpoint.names import safetensors_dtype, storage_names
from spinfer.checkpoint.writer import Outgoing, Planned, ShardWriter, outgoing, write_json
from spinfer.format import TcaBmeTensor
from spinfer.model import linear_modules


def llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int = 8) -> dict[str, Any]:
    """A Llama 3 of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def opt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    """An OPT of this shape."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def qwen2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """A Qwen2.5 of this shape."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


SHAPES = {
    "llama-3-8b": llama(32, 4096, 14336, 32),
    "llama-3-70b": llama(80, 8192, 28672, 64),
    "opt-13b": opt(40, 5120, 40),
    "opt-30b": opt(48, 7168, 56),
    "qwen2.5-32b": qwen2(64, 5120, 27648, 40, 8),
    "tiny": llama(2, 256, 512, 4, 2) | {"vocab_size": 1024},
}


def write_config(shape: dict[str, Any], directory: Path) -> Path:
    """A directory with nothing but config.json, for engines that fill a model with random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", shape)
    return directory


def write_compressed(
    shape: dict[str, Any], directory: Path, *, sparsity: float, device: str, distinct_layers: int = 4
) -> int:
    """Write a compressed checkpoint of random bf16 weights, pruned at random; returns the bytes of its tensors.

    Checksums are left out (the format allows it): loading would be timed with computing them on the CPU.

    Args:
        shape: config.json.
        directory: where to.
        sparsity: share of zeros in every Linear.
        device: where the weights are made and encoded.
        distinct_layers: so many decoder layers have weights of their own; the others repeat them.
    """
    directory.mkdir(parents=True)
    write_json(directory / "config.json", shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    model.tie_weights()
    linears = linear_modules(model)
    generator = torch.Generator(device).manual_seed(0)
    cache: dict[str, TcaBmeTensor] = {}
    modules: dict[str, ModuleEntry] = {}
    parameters = dict(model.named_parameters())

    def groups() -> Iterator[list[Outgoing]]:
        for name, parameter in parameters.items():
            module = name.removesuffix(".weight")
            if module not in linears.linears:
                dense = _random(parameter.shape, generator, device)
                if parameter.dim() == 1:
                    dense.fill_(float(name.endswith(".weight")))  # norms pass on, biases add nothing
                yield [outgoing(name, "BF16", dense.cpu())]
                continue
            key = _repeating(module, distinct_layers)
            if key not in cache:
                dense = _random(parameter.shape, generator, device)
                dense *= torch.rand(dense.shape, generator=generator, device=device) >= sparsity
                cache[key] = encode(dense).to("cpu")
            weight = cache[key]
            modules[module] = _entry(weight)
            parts = (weight.values, weight.bitmap, weight.offsets)
            yield [
                outgoing(part_name, safetensors_dtype(part.dtype), part)
                for part_name, part in zip(storage_names(module), parts, strict=True)
            ]

    plan = [_planned(name, parameter, linears.linears) for name, parameter in parameters.items()]
    with ShardWriter(directory, plan, 5 * 10**9) as writer:
        for group in groups():
            writer.write(group)
        total = writer.finish()
    entry = CompressionConfig(modules, linears.dense).to_dict()
    write_json(directory / "config.json", shape | {"quantization_config": entry})
    return total


def _random(shape: torch.Size, generator: torch.Generator, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, generator=generator, device=device) * 0.02


def _repeating(module: str, distinct_layers: int) -> str:
    """The module's name with its layer's number taken modulo the number of distinct layers."""
    return ".".join(str(int(part) % distinct_layers) if part.isdigit() else part for part in module.split("."))


def _entry(weight: TcaBmeTensor) -> ModuleEntry:
    return ModuleEntry(weight.shape, weight.nnz, weight.values.numel(), weight.dtype)


def _planned(name: str, parameter: Tensor, linears: Any) -> Planned:
    module = name.removesuffix(".weight")
    names = storage_names(module) if module in linears else (name,)
    return Planned(names, parameter.numel() * 2 // (8 if module in linears else 1), 2)


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.name]
    nbytes = write_compressed(shape, arguments.directory, sparsity=arguments.sparsity, device=arguments.device)
    print(f"{arguments.directory}: {nbytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
