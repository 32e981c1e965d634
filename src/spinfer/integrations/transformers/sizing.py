"""What a model takes on GPUs, dense and compressed, from its config.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spinfer.errors import CheckpointError
from spinfer.format import Geometry
from spinfer.format.layout import estimate_nbytes
from spinfer.integrations.transformers.models import described_model
from spinfer.model import linear_modules

_VALUE_NBYTES = 2
"""Weights and KV cache in 16 bits."""


@dataclass(frozen=True)
class ModelSize:
    """What decides how much memory a model takes.

    Attributes:
        linears: (out_features, in_features) of the Linears that are compressed.
        other_nbytes: of all other parameters, in 16 bits.
        layers: with attention.
        kv_heads: of each.
        head_dim: numbers of one key, or value, of one head.
        most_positions: the longest context.
    """

    linears: Sequence[tuple[int, int]]
    other_nbytes: int
    layers: int
    kv_heads: int
    head_dim: int
    most_positions: int

    @property
    def copies_nbytes(self) -> int:
        """The weights of all Linears in 16 bits."""
        return sum(rows * columns for rows, columns in self.linears) * _VALUE_NBYTES

    @property
    def dense_nbytes(self) -> int:
        """All weights in 16 bits."""
        return self.copies_nbytes + self.other_nbytes

    def compressed_nbytes(self, sparsity: float) -> int:
        """All weights with so large a share of zeros in the Linears, spread evenly."""
        linears = 0
        for rows, columns in self.linears:
            nnz = round(rows * columns * (1 - sparsity))
            linears += estimate_nbytes(Geometry(rows, columns), nnz, torch.bfloat16)
        return linears + self.other_nbytes

    def kv_nbytes_per_token(self, gpus: int = 1) -> int:
        """Bytes that one token's keys and values take on each GPU; heads fewer than GPUs are held more than once."""
        heads = -(-self.kv_heads // gpus)
        return 2 * self.layers * heads * self.head_dim * _VALUE_NBYTES


@dataclass(frozen=True)
class Fit:
    """How a model fits on GPUs.

    Attributes:
        weights_nbytes: on all GPUs.
        kv_nbytes_per_token: on each GPU.
        kv_tokens: tokens that the memory left holds; 0 where not even the weights fit.
        batch: requests of the given context that fit at once.
    """

    weights_nbytes: int
    kv_nbytes_per_token: int
    kv_tokens: int
    batch: int


def model_size(path: str) -> ModelSize:
    """Read config.json of a causal language model; loads no weights.

    Raises:
        CheckpointError: no config.json, an architecture that transformers does not know, or attention that does not
            keep keys and values by head.
    """
    model = described_model(path)
    model.tie_weights()
    config: Any = model.config
    text: Any = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if heads is None or getattr(text, "kv_lora_rank", None) is not None:
        raise CheckpointError(f"{path}: {config.model_type} does not keep keys and values by head; not supported")
    linears = linear_modules(model).linears
    compressed = {f"{name}.weight" for name in linears}
    other = sum(p.numel() for name, p in model.named_parameters() if name not in compressed)
    return ModelSize(
        linears=tuple(linears.values()),
        other_nbytes=other * _VALUE_NBYTES,
        layers=text.num_hidden_layers,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        most_positions=text.max_position_embeddings,
    )


def fit(size: ModelSize, weights_nbytes: int, *, gpus: int, usable_nbytes: int, context: int) -> Fit:
    """Weights split evenly over the GPUs, and the KV cache in what is left.

    Args:
        size: of the model.
        weights_nbytes: dense or compressed.
        gpus: tensor-parallel size.
        usable_nbytes: of each GPU, for weights and KV cache.
        context: tokens of one request, prompt and answer.
    """
    each = size.kv_nbytes_per_token(gpus)
    tokens = max(0, usable_nbytes - -(-weights_nbytes // gpus)) // each
    return Fit(weights_nbytes, each, tokens, tokens // context)
