"""`SpinferConfig`: vLLM's view of a compressed checkpoint's `quantization_config`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_world_group
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from spinfer.checkpoint.config import QUANT_METHOD, CompressionConfig, ModuleEntry
from spinfer.checkpoint.stored import CompressedCheckpoint
from spinfer.errors import CheckpointError, SpinferError
from spinfer.integrations.vllm.agree import agree
from spinfer.integrations.vllm.linear import SpinferLinearMethod
from spinfer.integrations.vllm.shares import Shard
from spinfer.integrations.vllm.versions import check_version


class SpinferConfig(QuantizationConfig):  # type: ignore[misc]
    """Which modules are compressed, under vLLM's names.

    Args:
        compression: what config.json says.
        hashed: where what compiled graphs depend on is kept: vLLM's own copy of the entry in config.json.
    """

    def __init__(self, compression: CompressionConfig, hashed: MutableMapping[str, Any]) -> None:
        super().__init__()
        self.modules: Mapping[str, ModuleEntry] = compression.modules
        self._hashed = hashed
        self._files_checked = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpinferConfig:
        """Parse the entry of config.json.

        Raises:
            SpinferError: a version of vLLM that the plugin is not tested with.
            CheckpointError: a format version of the future, or a malformed entry.
        """
        check_version(vllm.__version__)
        return cls(CompressionConfig.from_dict(config), config)

    @classmethod
    def get_name(cls) -> str:
        """The method's name in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability 8.0."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json says it all."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules as vLLM renames the checkpoint's."""
        self.modules = hf_to_vllm_mapper.apply_dict(dict(self.modules))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer computes.

        Raises:
            SpinferError: the checkpoint compresses modules that vLLM computes in another kind of layer.
            CheckpointError: files are missing or damaged on any rank; every rank raises the same.
        """
        if not self._files_checked:
            self._files_checked = True
            agree(get_world_group(), self._file_error())
        if isinstance(layer, LinearBase):
            sources = self._sources(layer, prefix)
            return SpinferLinearMethod(prefix, sources, self.note) if sources else UnquantizedLinearMethod()
        inside = next((name for name in self.modules if name == prefix or name.startswith(f"{prefix}.")), None)
        if inside is not None:
            raise SpinferError(
                f"{inside} is compressed, but vLLM computes it in {type(layer).__name__}, which takes dense weights "
                f"only (mixtures of experts are not supported); leave it dense: spinfer compress --ignore '{prefix}*'"
            )
        return None

    def note(self, packed: str) -> None:
        """Take account of how a layer's weights are packed, before vLLM looks for compiled graphs.

        It keeps these under a hash of the model's config, in which our entry is. They hold layouts, numbers and sizes
        of the packed arrays, which depend on more: the values, the device, what is installed, dense copies wanted.
        """
        self._hashed["packed"] = hashlib.sha256(f"{self._hashed.get('packed')} {packed}".encode()).hexdigest()

    def _file_error(self) -> str | None:
        """What is wrong with this rank's copy of the checkpoint, by its headers; vLLM passes over missing files."""
        model = get_current_vllm_config().model_config
        if model is None or not Path(model.model).is_dir():
            return None
        try:
            CompressedCheckpoint(model.model)
        except CheckpointError as error:
            return str(error)
        return None

    def _sources(self, layer: nn.Module, prefix: str) -> dict[Shard, tuple[str, ModuleEntry]]:
        """The compressed modules that make up one of vLLM's layers, by the shard that vLLM loads each into."""
        if prefix in self.modules:
            return {None: (prefix, self.modules[prefix])}
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [])
        shards: Sequence[Shard] = "qkv" if isinstance(layer, QKVParallelLinear) else range(len(parts))
        names = {shard: f"{parent}.{part}" for shard, part in zip(shards, parts, strict=False)}
        return {shard: (name, self.modules[name]) for shard, name in names.items() if name in self.modules}


def register_config() -> None:
    """Register with vLLM; again does nothing."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(SpinferConfig)
