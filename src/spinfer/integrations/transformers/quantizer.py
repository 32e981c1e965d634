"""Load, save, compress and restore transformers models through its quantiser interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spinfer.checkpoint.config import FORMAT_NAME, QUANT_METHOD, CompressionConfig, ModuleEntry
from spinfer.checkpoint.header import read_header
from spinfer.checkpoint.stored import check_headers
from spinfer.errors import CheckpointError, FormatError, SpinferError
from spinfer.format import FORMAT_VERSION
from spinfer.integrations.transformers.dense_linear import DenseLinear
from spinfer.integrations.transformers.memory import MappedFiles, copied, trim_heap
from spinfer.integrations.transformers.tensor_parallel import keep_share, load_whole
from spinfer.linear import SparseLinear
from spinfer.model import Replacement, replace_linears, restore_linears


@register_quantization_config(QUANT_METHOD)
class SpinferConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a compressed model, as transformers holds it; see `CompressionConfig`."""

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        dense: dict[str, str] | None = None,
        format: str = FORMAT_NAME,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **_: Any,
    ) -> None:
        self.quant_method = quant_method
        self.format = format
        self.format_version = format_version
        self.modules = modules or {}
        self.dense = dense or {}

    def parsed(self) -> CompressionConfig:
        """Checked and typed."""
        return CompressionConfig.from_dict(self.to_dict())


@register_quantizer(QUANT_METHOD)
class SpinferHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a `SparseLinear` where the checkpoint has a compressed weight, before any weight is loaded."""

    requires_calibration = False
    quantization_config: SpinferConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work, before weights are touched."""
        if not self.pre_quantized:
            raise SpinferError(
                "from_pretrained cannot compress while it loads; run `spinfer compress MODEL -o OUT` and load OUT, "
                "or call spinfer.compress_model(model) on the loaded model"
            )
        self.quantization_config.parsed()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        compression = self.quantization_config.parsed()
        if checkpoint_files:  # transformers does not compare shapes where a quantiser is at work
            headers = [read_header(Path(file)) for file in checkpoint_files]
            tensors = {name: info for header in headers for name, info in header.items()}
            check_headers(Path(checkpoint_files[0]).parent, tensors, compression)
        for name, entry in compression.modules.items():
            path = _module_path(model, name)
            dense = model.get_submodule(path)
            if not isinstance(dense, nn.Linear) or (dense.out_features, dense.in_features) != entry.shape:
                raise CheckpointError(
                    f"config.json compresses {name!r} as a Linear of shape {entry.shape}, but the model has {dense}; "
                    "config.json and weights belong to different models"
                )
            sparse = SparseLinear(
                dense.in_features,
                dense.out_features,
                nnz=entry.nnz,
                values_len=entry.values_len,
                bias=dense.bias is not None,
                device="meta",
                dtype=dense.weight.dtype,
            )
            model.set_submodule(path, sparse)
            load_whole(model, path, sparse)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        files = MappedFiles()
        for name, entry in self.quantization_config.parsed().modules.items():
            path = _module_path(model, name)
            module = model.get_submodule(path)
            assert isinstance(module, SparseLinear)
            if module.weight.device.type == "meta":  # offloaded: accelerate brings the storage parts in for each call
                continue
            try:
                storage = module.storage
                entry.check(storage)
                keep_share(model, path, module)
                module.pack_()  # which validates the parts
            except FormatError as error:
                raise CheckpointError(
                    f"{getattr(model.config, 'name_or_path', '') or 'checkpoint'}: the parts of {name} disagree: "
                    f"{error}. The files are damaged or incomplete; fetch or compress the model again"
                ) from error
            for part in (storage.values, storage.bitmap, storage.offsets):
                files.release(part)
        DenseLinear.adopt(model.get_output_embeddings())
        for tensor in (*model.parameters(), *model.buffers()):  # one dense view would keep the whole file mapped
            if files.hold(tensor):
                view, tensor.data = tensor.data, copied(tensor.data)
                files.release(view)
        trim_heap()
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Bring the config up to date (the model may have been cast) before save_pretrained writes it.

        Raises:
            SpinferError: this rank holds a share of the weights only.
        """
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise SpinferError("a rank holds a share of the weights; load the model in one process to save it")
        model.config.quantization_config = _config_of(model, self.quantization_config.dense)
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        restore_linears(model)
        if isinstance(dtype, str):  # config.dtype is a name once the model has been saved
            dtype = getattr(torch, dtype)
        # Casting rounds fp32 buffers too (rotary frequencies), so cast only where another dtype is asked for.
        return model if dtype in (None, model.dtype) else model.to(dtype)

    def is_serializable(self) -> bool:
        """save_pretrained writes the compressed model back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through to activations and adapters; the sparse weights stay fixed."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Lets `generate` compile the forward pass with a static cache."""
        return True


def _sparse_modules(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def _module_path(model: PreTrainedModel, name: str) -> str:
    """A checkpoint's module name as this model has it: the base model's prefix may come or go between heads."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise CheckpointError(
        f"config.json compresses {name!r}, which {type(model).__name__} does not have; "
        "load it with the class it was compressed from (config.json, architectures)"
    )


def _config_of(model: nn.Module, dense: dict[str, str]) -> SpinferConfig:
    entries = {name: ModuleEntry.of(module.storage) for name, module in _sparse_modules(model).items()}
    return SpinferConfig(**CompressionConfig(entries, dense).to_dict())


def compress_model(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Replacement:
    """Encode a loaded model's Linears in place; a transformers model can then be saved compressed.

    Args:
        model: a module with pruned weights, on CPU or CUDA.
        include: as for `replace_linears`.
        ignore: likewise.
        progress: likewise.

    Returns:
        Which modules were encoded, and why the others were not.

    Raises:
        SpinferError: nothing can be compressed, or the model is quantised already.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise SpinferError("the model is quantised already; compress the unquantised one")
    result = replace_linears(model, include=include, ignore=ignore, progress=progress)
    trim_heap()
    if isinstance(model, PreTrainedModel):
        config = _config_of(model, result.dense)
        quantizer = SpinferHfQuantizer(config, pre_quantized=True)
        model.config.quantization_config = config
        model.hf_quantizer = quantizer
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
    return result
