"""Small pruned models of several architectures, and a stand-in for the compiler of kernels."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub; transformers reads it at import

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from spinfer.kernels.cuda import compile as kernel_compile
from spinfer.kernels.cuda.compile import KernelSource
from spinfer.model import linear_modules
from spinfer.pruning import prune_magnitude_

ARCHITECTURES = {
    "llama": LlamaConfig(
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
    ),
    "qwen2": Qwen2Config(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    ),
    "opt": OPTConfig(
        hidden_size=128,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=320,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
    ),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=320,
        max_position_embeddings=128,
    ),
    "wide": LlamaConfig(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        attention_bias=True,
        mlp_bias=True,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320, n_positions=128),
}


def pruned_model(architecture: str, *, sparsity: float = 0.6, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model with random weights, Linears pruned by magnitude. No token ends a text: by chance one would come."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[architecture]), dtype=dtype).eval()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    for name in linear_modules(model).linears:
        linear = model.get_submodule(name)
        prune_magnitude_(linear.weight, sparsity)
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias, std=0.1)  # transformers sets them to zero, so that nothing could be seen
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids [2, 12]."""
    return torch.randint(0, 320, (2, 12))


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    """A complete model directory with a tokenizer that knows single characters, and a chat template."""
    vocabulary = {chr(code): code for code in range(1, 256)} | {"<unk>": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def pruned_dir(tmp_path: Path) -> Path:
    """A pruned dense Llama on disk."""
    folder = tmp_path / "pruned"
    return save_with_tokenizer(pruned_model("llama"), folder)


class Nvrtc:
    """A stand-in for the compiler.

    Attributes:
        compiled: what it was asked for.
        meanwhile: called while it compiles.
    """

    def __init__(self) -> None:
        self.compiled: list[KernelSource] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self, source: KernelSource) -> bytes:
        self.compiled.append(source)
        self.meanwhile()
        return b"\x7fELF" + source.arch.encode()


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Nvrtc:
    """In place of NVRTC; the cache of kernels is empty and in `tmp_path`."""
    nvrtc = Nvrtc()
    monkeypatch.setattr(kernel_compile, "compile_source", nvrtc)
    monkeypatch.setattr(kernel_compile, "_compiler_versions", lambda: "1.0")
    monkeypatch.setenv("SPINFER_CACHE_DIR", str(tmp_path / "cache"))
    kernel_compile._warn_uncached.cache_clear()
    return nvrtc
