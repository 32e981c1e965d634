"""Open a model directory: its Linears without its weights, or the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from spinfer.errors import CheckpointError, SpinferError
from spinfer.model import LinearModules, linear_modules


def described_model(path: str, *, buffers: bool = False) -> PreTrainedModel:
    """The causal language model that config.json in a directory describes, on the meta device; loads no weights.

    Args:
        path: a model directory.
        buffers: compute them (rotary frequencies and the like).

    Raises:
        CheckpointError: no config.json, or no architecture that transformers knows.
    """
    try:
        config: Any = AutoConfig.from_pretrained(path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: not a causal language model that transformers knows: {first_line}") from error
    return model


def model_linears(path: str) -> LinearModules:
    """List the Linears of the causal language model that config.json in a directory describes; loads no weights.

    Raises:
        CheckpointError: no config.json, or no architecture that transformers knows.
    """
    return linear_modules(described_model(path))


@contextmanager
def _refusals_named(path: str) -> Iterator[None]:
    try:
        yield
    except SpinferError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {str(error).strip().splitlines()[0]}") from error


def load_model(path: str, *, device: str = "cpu", dtype: str = "auto") -> PreTrainedModel:
    """Load a dense or compressed causal language model, ready for inference.

    Args:
        path: a model directory.
        device: where to.
        dtype: name of the type to load as; "auto" is the one that config.json names.

    Raises:
        CheckpointError: the directory lacks what transformers needs.
    """
    if not Path(path, "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; name a Hugging Face model directory")
    with _refusals_named(path):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device)
    return model.eval()


def load_causal_lm(path: str, *, device: str = "cpu", dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Load a model as `load_model` does, and its tokenizer."""
    model = load_model(path, device=device, dtype=dtype)
    with _refusals_named(path):
        return model, AutoTokenizer.from_pretrained(path)
