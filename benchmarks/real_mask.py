"""Prune a real model with Wanda and keep where its zeros are, for `kernel_sweep --real-mask`:

    python benchmarks/real_mask.py build/real_mask.safetensors

The model and the calibration text are the demo's. A weight's score is |w| times the norm of its input feature over the
calibration tokens, and every row loses its lowest (Sun et al. 2024, https://arxiv.org/abs/2306.11695). Kept are the
projections that read the hidden state, stacked: 5 to 10 MB for each sparsity.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from fetch import fetch_model, fetch_text  # noqa: E402  (the demo's own)

LAYERS = ("q_proj", "gate_proj", "up_proj")


@torch.inference_mode()
def wanda_scores(folder: Path, tokens: int, context: int = 512) -> list[Tensor]:
    """Scores (M, K) of every layer of `LAYERS`, in the model's order."""
    dense = fetch_model(folder)
    text, _ = fetch_text(folder)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    layers = [module for name, module in model.named_modules() if name.endswith(LAYERS)]
    squares: dict[nn.Module, Tensor] = {module: torch.zeros(module.in_features) for module in layers}

    def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
        squares[module] += inputs[0].flatten(0, -2).square().sum(0)

    for module in layers:
        module.register_forward_pre_hook(add)
    ids = AutoTokenizer.from_pretrained(dense)(text.read_text("utf-8")[: 8 * tokens], return_tensors="pt").input_ids
    for start in range(0, min(tokens, ids.shape[1]), context):
        model(ids[:, start : start + context])
    return [module.weight.abs() * squares[module].sqrt() for module in layers]


def kept(score: Tensor, sparsity: float) -> Tensor:
    """Bits (M, K / 8) of the weights that stay when every row loses the same share."""
    mask = torch.ones_like(score, dtype=torch.bool)
    mask.scatter_(1, score.topk(round(score.shape[1] * sparsity), dim=1, largest=False).indices, False)
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="what was fetched")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    scores = wanda_scores(options.folder, options.calibration_tokens)
    masks = {str(s): torch.cat([kept(score, s) for score in scores]) for s in options.sparsity}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_name(options.output.name + ".partial")
    origin = f"SmolLM2-135M-Instruct, {', '.join(LAYERS)}, Wanda on {options.calibration_tokens} tokens of Wikipedia"
    save_file(masks, partial, metadata={"origin": origin})
    partial.replace(options.output)


if __name__ == "__main__":
    main()
