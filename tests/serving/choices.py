"""What transformers chooses greedily, and by how much, which tells where rounding to 16 bits decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spinfer.integrations.transformers.models import load_causal_lm


@dataclass(frozen=True)
class Choices:
    """Greedy tokens of each prompt.

    Attributes:
        prompts: their token ids.
        tokens: what was chosen.
        leads: by how much the logit of each chosen token leads every token's, (tokens, vocabulary) for each prompt.
        rounding: how far 16 bits move the lead over the next best token from what it is in fp32, at most.
        changed: how many tokens would be others in fp32, after the same tokens before them.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    leads: list[Tensor]
    rounding: float
    changed: int

    @property
    def margin(self) -> float:
        """Implementations that are each as far off as `rounding` agree on every token that leads by more than this."""
        return 2 * self.rounding

    def decided(self) -> float:
        """The share of tokens that lead by more than the margin."""
        seconds = torch.cat(self.leads).topk(2, largest=False).values[:, 1]
        return float((seconds > self.margin).float().mean())


def choices(model: Path, prompts: list[str], count: int, *, dtype: str, device: str) -> Choices:
    """Generate with transformers, and compute the logits again in fp32, for which a GPU has none of our kernels."""
    loaded, tokenizer = load_causal_lm(str(model), device=device, dtype=dtype)
    sequences, logits = [], []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        output = loaded.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            return_dict_in_generate=True,
            output_logits=True,
        )
        sequences.append(output.sequences)
        logits.append(torch.cat(output.logits).float())
    exact, _ = load_causal_lm(str(model), device=device, dtype="float32")
    leads, rounding, changed = [], 0.0, 0
    for sequence, rounded in zip(sequences, logits, strict=True):
        best = rounded.topk(2).indices
        with torch.inference_mode():
            unrounded = exact(sequence).logits[0, -count - 1 : -1]
        moved = _lead(rounded, best) - _lead(unrounded, best)
        rounding = max(rounding, float(moved.abs().max()))
        chosen = sequence[0, -count:]
        changed += int((unrounded.argmax(1) != chosen).sum())
        leads.append((rounded.gather(1, chosen[:, None]) - rounded).cpu())
    assert min(float(lead.min()) for lead in leads) == 0.0  # nothing was forbidden that would have been chosen
    whole = [sequence[0].tolist() for sequence in sequences]
    return Choices([ids[:-count] for ids in whole], [ids[-count:] for ids in whole], leads, rounding, changed)


def _lead(logits: Tensor, best: Tensor) -> Tensor:
    pair = logits.gather(1, best)
    return pair[:, 0] - pair[:, 1]
