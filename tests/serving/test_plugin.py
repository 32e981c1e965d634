"""Registration, and what the plugin refuses."""

from __future__ import annotations

import pytest
import torch

from spinfer.checkpoint.config import CompressionConfig, ModuleEntry
from spinfer.errors import SpinferError
from spinfer.format import encode
from support import sparse

pytestmark = pytest.mark.vllm


def entries(*names: str) -> dict[str, object]:
    """config.json's entry with compressed modules of these names."""
    entry = ModuleEntry.of(encode(sparse(64, 64)))
    return CompressionConfig(dict.fromkeys(names, entry)).to_dict()


def test_registering_again_does_nothing() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from spinfer.integrations.vllm import register
    from spinfer.integrations.vllm.config import SpinferConfig

    register()
    register()
    assert QUANTIZATION_METHODS.count("spinfer") == 1
    assert get_quantization_config("spinfer") is SpinferConfig


def test_an_untested_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from spinfer.integrations.vllm.config import SpinferConfig

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(SpinferError, match=r"vLLM 0\.26 to 0\.32, but vLLM 0\.99\.0 is installed"):
        SpinferConfig.from_config(entries("a.q_proj"))


def test_compressed_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from spinfer.integrations.vllm import config as module

    monkeypatch.setattr(module, "agree", lambda group, error: None)
    monkeypatch.setattr(module, "get_world_group", lambda: None)
    config = module.SpinferConfig.from_config(entries("layers.0.mlp.experts.0.w1"))
    with (
        set_current_vllm_config(VllmConfig()),
        pytest.raises(SpinferError, match=r"experts\.0\.w1 is compressed, but .*mixtures of experts"),
    ):
        config.get_quant_method(torch.nn.Module(), "layers.0.mlp.experts")
    assert config.get_quant_method(torch.nn.Module(), "layers.0.attn") is None
