"""Small model directories for the checkpoint tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spinfer.checkpoint import compress_checkpoint

LINEARS = {
    "model.layers.0.attn.q_proj": (70, 100),
    "model.layers.0.mlp.up_proj": (200, 70),
    "model.layers.1.attn.q_proj": (70, 100),
    "model.layers.1.mlp.up_proj": (200, 70),
}
DENSE = {"lm_head": "output embedding"}


def tensors(density: float = 0.4, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with pruned Linears (their zeros of both signs), and tensors of other kinds beside them."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, shape in LINEARS.items():
        weight = torch.randn(shape, generator=generator)
        found[f"{name}.weight"] = (weight * (torch.rand(shape, generator=generator) < density)).to(dtype)
    found["model.layers.0.attn.q_proj.bias"] = torch.randn(70, generator=generator).to(dtype)
    found["model.embed_tokens.weight"] = torch.randn(51, 7, generator=generator).to(dtype)
    found["model.norm.weight"] = torch.randn(3, generator=generator)
    found["model.counter"] = torch.tensor(7)
    found["model.flags"] = torch.tensor([True, False, True])
    found["model.scales"] = torch.randn(5, generator=generator).to(torch.float8_e4m3fn)
    return found


def write_dense(
    directory: Path, state: Mapping[str, Tensor] | None = None, *, files: int = 1, **config: Any
) -> dict[str, Tensor]:
    """Write a dense safetensors directory with the usual company; returns its tensors."""
    state = dict(tensors() if state is None else state)
    directory.mkdir(parents=True)
    write_json(directory / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config})
    write_json(directory / "tokenizer.json", {"version": "1.0"})
    write_json(directory / "generation_config.json", {"max_length": 5})
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "README.md").write_text("the original card")
    if files == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return state
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        names = list(state)[number::files]
        save_file({name: state[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return state


def write_compressed(directory: Path, **options: Any) -> dict[str, Tensor]:
    """Write a compressed directory; returns the dense tensors."""
    state = write_dense(directory.parent / f"{directory.name}-dense")
    compress_checkpoint(
        directory.parent / f"{directory.name}-dense", directory, linears=LINEARS, dense=DENSE, **options
    )
    return state


def load_directory(directory: Path) -> dict[str, Tensor]:
    """All tensors, by the safetensors library."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content))


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor, with negative zeros made positive."""
    if tensor.is_floating_point() and tensor.itemsize > 1:
        tensor = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are the same, bit for bit, the sign of zeros aside."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and bits(left[name]) == bits(right[name])
        for name in left
    )
