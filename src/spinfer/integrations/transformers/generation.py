"""Generate from a prompt and time it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer


@dataclass(frozen=True)
class Generation:
    """What came out, and how fast.

    Attributes:
        text: the generated text.
        prompt_tokens: length of the prompt.
        new_tokens: tokens generated.
        prompt_tokens_per_s: prompt tokens over the time to the first token.
        generation_tokens_per_s: tokens after the first over their time.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_tokens_per_s: float
    generation_tokens_per_s: float


class _TimedStreamer(TextStreamer):  # type: ignore[misc]
    """Hands text on as tokens arrive, and notes when the first one did."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.first_token_at: float | None = None
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call carries the prompt
            self.first_token_at = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    chat: bool = True,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue a prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: the text to continue, or the user's turn.
        max_tokens: most tokens to generate.
        temperature: 0 is greedy.
        chat: use the tokenizer's chat template where it has one.
        on_text: called with each piece of text as it becomes final.
    """
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    streamer = _TimedStreamer(tokenizer, on_text)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_tokens, streamer=streamer, **sampling)
    end = time.perf_counter()
    prompt_tokens = inputs["input_ids"].shape[1]
    new_tokens = output.shape[1] - prompt_tokens
    first = streamer.first_token_at or end
    return Generation(
        text=tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prompt_tokens_per_s=prompt_tokens / (first - start),
        generation_tokens_per_s=(new_tokens - 1) / (end - first) if new_tokens > 1 else 0.0,
    )
