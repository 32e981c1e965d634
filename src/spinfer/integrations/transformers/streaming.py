"""A model whose weights stay on disk: parts of it are loaded when they are needed and dropped after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor
from transformers import PreTrainedModel

from spinfer.checkpoint.dense import open_dense
from spinfer.checkpoint.header import TORCH_DTYPES
from spinfer.checkpoint.names import find_stored
from spinfer.errors import CheckpointError
from spinfer.format.layout import VALUE_DTYPES
from spinfer.integrations.transformers.models import described_model


class StreamedModel:
    """A causal language model on the meta device, and the files that hold its weights.

    Attributes:
        directory: of the model.
        config: config.json, without an entry on compression.
        source: its tensors.
        model: the modules; buffers that are computed are in place, parameters are on the meta device.
        dtype: that it is computed in; float32 until the caller chooses another.
    """

    def __init__(self, directory: Path) -> None:
        """Read headers; no weights.

        Raises:
            CheckpointError: no model directory, an architecture that transformers does not know, damaged files.
        """
        self.directory = directory
        self.config, self.source = open_dense(directory)
        self.model = described_model(str(directory), buffers=True).eval()
        self.dtype = torch.float32
        parameters = [*dict(self.model.named_parameters()), *_stored_buffers(self.model)]
        self._known = frozenset(parameters)

    def stored_name(self, parameter: str) -> str:
        """A parameter's name in the files.

        Raises:
            CheckpointError: it is not there under its name.
        """
        name = find_stored(parameter, self.source.tensors, self._known)
        if name is None:
            raise CheckpointError(
                f"{self.directory} does not hold {parameter!r} as one tensor of that name; transformers makes it when "
                "it loads the model (mixtures of experts, older names). Load the model with from_pretrained, prune it "
                "with spinfer.prune(model, samples) and save it with save_pretrained"
            )
        info, shape = self.source.tensors[name], self._shape(parameter)
        if info.shape != shape:
            raise CheckpointError(
                f"{info} has shape {list(info.shape)}, but the model of config.json asks for {list(shape)}; "
                "config.json and weights are of different models"
            )
        return name

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """Of a weight that is to be pruned.

        Raises:
            CheckpointError: none that can be computed with.
        """
        info = self.source.tensors[self.stored_name(parameter)]
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None or dtype not in VALUE_DTYPES.values():
            raise CheckpointError(f"{info}: weights of {info.dtype} cannot be pruned; convert them to 16 bits first")
        return dtype

    def _shape(self, parameter: str) -> tuple[int, ...]:
        owner, _, last = parameter.rpartition(".")
        return tuple(getattr(self.model.get_submodule(owner), last).shape)

    def inside(self, module: str) -> list[str]:
        """Parameters of a module."""
        return sorted(name for name in self._known if name.startswith(f"{module}."))

    def outside(self, module: str) -> list[str]:
        """Parameters that are not in it, without those of the output embedding."""
        output = self.model.get_output_embeddings()
        others = self._known.difference(self.inside(module))
        return sorted(name for name in others if self.model.get_submodule(name.rpartition(".")[0]) is not output)

    def load(
        self, parameters: Iterable[str], device: torch.device, overriding: Mapping[str, Tensor] | None = None
    ) -> None:
        """Load parameters.

        Args:
            parameters: their names.
            device: where to.
            overriding: what to take instead of the stored ones, by name.
        """
        for name in parameters:
            given = (overriding or {}).get(name)
            value = self.source.read(self.stored_name(name)) if given is None else given
            value = value.to(self.dtype) if value.is_floating_point() else value
            set_module_tensor_to_device(self.model, name, device, value=value, dtype=value.dtype)

    def unload(self, parameters: Iterable[str]) -> None:
        """Drop them again."""
        for name in parameters:
            set_module_tensor_to_device(self.model, name, "meta")

    def move_buffers(self, device: torch.device) -> None:
        """Bring what is computed rather than stored (rotary frequencies and the like) to a device."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(device)


def _stored_buffers(model: PreTrainedModel) -> list[str]:
    stored = set(model.state_dict())
    return [name for name, _ in model.named_buffers() if name in stored]
