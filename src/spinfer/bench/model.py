"""Prefill and decode speed of whole models, interleaved so that a drifting machine treats each alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spinfer.kernels.cuda.ahead import COMPILER


@dataclass(frozen=True)
class ModelTiming:
    """Medians over repeats.

    Attributes:
        prefill_tokens_per_s: prompt tokens of the whole batch over the time to the first token.
        decode_tokens_per_s: generated tokens of the whole batch over their time.
        time_to_first_token_ms: prefill time.
        decode_step_ms: time of one decode step.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_ms: float
    decode_step_ms: float


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def run_once(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """One greedy run; seconds of the prefill, and of `new_tokens` decode steps together.

    Args:
        model: a transformers causal language model.
        prompt: int64 [batch, prompt tokens], on the model's device.
        new_tokens: decode steps after the first token.
    """
    _synchronize(prompt.device)
    start = time.perf_counter()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    _synchronize(prompt.device)
    prefilled = time.perf_counter()
    cache = "cache" if "cache" in out else "past_key_values"  # its name from transformers 5.24 on, and before
    for _ in range(new_tokens):
        out = model(token, **{cache: out[cache]}, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    _synchronize(prompt.device)
    return prefilled - start, time.perf_counter() - prefilled


class _Clock:
    """A streamer of transformers that notes when it gets the prompt, and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def generate_once(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """What `run_once` does, by `generate` with a static cache: on a GPU its decode steps are CUDA graphs."""
    clock = _Clock()
    model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens + 1,
        min_new_tokens=new_tokens + 1,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        streamer=clock,
    )
    start, prefilled, *_ = clock.times
    return prefilled - start, clock.times[-1] - prefilled


def time_models(
    models: Mapping[str, nn.Module],
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int = 1,
    repeats: int = 3,
    cuda_graphs: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, ModelTiming]:
    """Time models against each other: a warm-up each (two with CUDA graphs), then repeats in turn, medians.

    Args:
        models: by label; transformers causal language models with the same vocabulary.
        prompt_tokens: prompt length; the prompt is random.
        new_tokens: decode steps.
        batch: sequences.
        repeats: timed runs of each model.
        cuda_graphs: time `generate_once`, on a GPU, instead of `run_once`.
        progress: called with (runs done, runs).
    """
    vocabulary = min(int(model.config.vocab_size) for model in models.values())  # type: ignore[union-attr, arg-type]
    ids = torch.randint(0, vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    run, warm_ups = (generate_once, 2) if cuda_graphs else (run_once, 1)
    # CUDA graphs are of one length, and cuDNN's attention plans for each length that it meets, 35 ms on an H200's host.
    on_gpu = any(next(model.parameters()).is_cuda for model in models.values())
    warm_up_tokens = new_tokens if cuda_graphs or on_gpu else min(2, new_tokens)
    runs: dict[str, list[tuple[float, float]]] = {label: [] for label in models}
    COMPILER.wait()  # it takes half of the processors
    for repeat in range(-warm_ups, repeats):
        for index, (label, model) in enumerate(models.items()):
            times = run(model, ids.to(next(model.parameters()).device), warm_up_tokens if repeat < 0 else new_tokens)
            if repeat >= 0:
                runs[label].append(times)
            progress((repeat + warm_ups) * len(models) + index + 1, (repeats + warm_ups) * len(models))
    return {label: _timing(times, prompt_tokens, new_tokens, batch) for label, times in runs.items()}


def _timing(times: list[tuple[float, float]], prompt_tokens: int, new_tokens: int, batch: int) -> ModelTiming:
    prefill = statistics.median(prefill for prefill, _ in times)
    decode = statistics.median(decode for _, decode in times)
    return ModelTiming(
        prefill_tokens_per_s=batch * prompt_tokens / prefill,
        decode_tokens_per_s=batch * new_tokens / decode if new_tokens else 0.0,
        time_to_first_token_ms=prefill * 1e3,
        decode_step_ms=decode / max(1, new_tokens) * 1e3,
    )
