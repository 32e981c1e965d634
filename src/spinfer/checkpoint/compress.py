"""Dense directory in, compressed directory out, a tensor at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spinfer.checkpoint.card import model_card
from spinfer.checkpoint.carry import CARD_NAME, ORIGINAL_CARD_NAME, carry_over
from spinfer.checkpoint.config import CompressionConfig, ModuleEntry
from spinfer.checkpoint.dense import open_dense
from spinfer.checkpoint.header import TORCH_DTYPES, TensorInfo
from spinfer.checkpoint.inspect import inspect_checkpoint
from spinfer.checkpoint.names import find_stored, safetensors_dtype, storage_names
from spinfer.checkpoint.output import new_directory, refuse_existing, writing
from spinfer.checkpoint.report import CompressionReport
from spinfer.checkpoint.select import Selection
from spinfer.checkpoint.source import CONFIG_NAME, TensorSource, pieces_of
from spinfer.checkpoint.writer import DEFAULT_SHARD_NBYTES, Outgoing, Planned, ShardWriter, outgoing, write_json
from spinfer.errors import CheckpointError
from spinfer.format import Geometry, TcaBmeTensor, encode
from spinfer.format.layout import BIT_PATTERN_DTYPES, VALUE_DTYPES

Progress = Callable[[int, int], None]
"""Called with (done, total) bytes of the input."""


def compress_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    linears: Mapping[str, tuple[int, int]],
    dense: Mapping[str, str],
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    max_shard_nbytes: int = DEFAULT_SHARD_NBYTES,
    progress: Progress = lambda done, total: None,
) -> CompressionReport:
    """Compress a Hugging Face directory.

    Every Linear that becomes smaller is encoded, decoded again and compared bit for bit (the sign of zeros aside)
    before it is written; all other tensors are copied bit by bit. Memory holds one layer, dense and encoded.

    Args:
        source: directory with config.json and weights: safetensors or `.bin`, single or sharded, dense or
            compressed-tensors' `sparse-bitmask`.
        output: a directory that does not exist; it appears when it is complete.
        linears: (out_features, in_features) of the model's Linears by module name. The base model's prefix may be
            missing in the checkpoint.
        dense: modules that are to stay dense, each with the reason.
        include: patterns of module names to compress, all where empty; see `Selection`.
        ignore: patterns of module names to leave dense.
        max_shard_nbytes: most bytes of tensors in one file; a larger single layer gets its own.
        progress: called after every tensor.

    Raises:
        CheckpointError: the source is damaged or of an unsupported kind, disagrees with `linears`, or holds nothing
            that becomes smaller.
        OutputError: the output exists or cannot be written; what was written is removed.
    """
    began = time.monotonic()
    source, output = Path(source), Path(output)
    refuse_existing(output)
    if max_shard_nbytes < 1:
        raise CheckpointError(f"max_shard_nbytes is {max_shard_nbytes}; it must be positive")
    config, tensors = open_dense(source)
    if not linears:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
        raise CheckpointError(f"{source}: the model has no Linear to compress ({reasons or 'none of any kind'})")
    run = _Run(source, tensors, linears, dense, Selection([*linears, *dense], include, ignore))
    with new_directory(output) as partial, ShardWriter(partial, run.plan(), max_shard_nbytes) as writer:
        for group in run.groups(progress):
            writer.write(group)
        if not run.modules:
            raise CheckpointError(f"{source}: nothing becomes smaller: {_summary(run.dense)}; prune the model first")
        writer.finish()
        carry_over(source, partial, {CARD_NAME: ORIGINAL_CARD_NAME})
        entry = CompressionConfig(run.modules, run.dense).to_dict()
        write_json(partial / CONFIG_NAME, {**config, "quantization_config": entry})
        checkpoint = dataclasses.replace(inspect_checkpoint(partial), path=output)
        report = CompressionReport(checkpoint, run.nonfinite, tensors.tied, time.monotonic() - began)
        with writing(partial / CARD_NAME):
            card = model_card(source.resolve().name, report, has_original_card=(source / CARD_NAME).is_file())
            (partial / CARD_NAME).write_text(card, encoding="utf-8")
    return report


class _Run:
    """One compression: what is decided before, and what is found out on the way."""

    def __init__(
        self,
        directory: Path,
        source: TensorSource,
        linears: Mapping[str, tuple[int, int]],
        dense: Mapping[str, str],
        selection: Selection,
    ) -> None:
        self.source = source
        self.modules: dict[str, ModuleEntry] = {}
        self._known = {storage_names(name)[0] for name in (*linears, *dense)}
        self.dense = {self._find(name) or name: reason for name, reason in dense.items()}
        self.nonfinite: dict[str, int] = {}
        self._candidates: dict[str, str] = {}  # tensor name -> module name
        for name, shape in linears.items():
            self._consider(name, shape, selection)
        if not any(self._find(name) for name in linears):
            raise CheckpointError(
                f"{directory}: none of the model's {len(linears)} Linears is in the checkpoint (the first is "
                f"{next(iter(linears))!r}, the files hold {', '.join(list(source.tensors)[:3])}, …); "
                "config.json and weights are of different models"
            )

    def _find(self, module: str) -> str | None:
        """A module's name in the checkpoint."""
        weight = find_stored(storage_names(module)[0], self.source.tensors, self._known)
        return None if weight is None else weight.rpartition(".")[0]

    def _consider(self, module: str, shape: tuple[int, int], selection: Selection) -> None:
        stored = self._find(module)
        if stored is None:
            tied = self.source.tied.get(storage_names(module)[0])
            self.dense[module] = f"tied to {tied}" if tied else "not in the checkpoint"
            return
        info = self.source.tensors[storage_names(stored)[0]]
        if info.shape != tuple(shape):
            raise CheckpointError(
                f"{info} has shape {list(info.shape)}, but the model of config.json asks for {list(shape)}; "
                "config.json and weights are of different models"
            )
        refusal = selection.refusal(module)
        if refusal is not None:
            self.dense[stored] = refusal
        elif TORCH_DTYPES.get(info.dtype) not in VALUE_DTYPES.values():
            self.dense[stored] = f"values of {info.dtype} are not supported"
        else:
            for name in storage_names(stored)[1:]:
                if name in self.source.tensors:
                    raise CheckpointError(f"{self.source.tensors[name]} has the name of a part that is to be written")
            self._candidates[info.name] = stored

    def plan(self) -> list[Planned]:
        return [self._planned(info) for info in self.source.tensors.values()]

    def _planned(self, info: TensorInfo) -> Planned:
        module = self._candidates.get(info.name)
        if module is None:
            return Planned((info.name,), info.nbytes, len(info.shape))
        geometry = Geometry(info.shape[0], info.shape[1])
        least = min(info.nbytes, 8 * geometry.bitmap_words + 4 * geometry.offsets_len)
        return Planned(storage_names(module), least, 2)

    def groups(self, progress: Progress) -> Iterator[list[Outgoing]]:
        """What to write for each tensor of the source, in the order of `plan`."""
        total = sum(info.nbytes for info in self.source.tensors.values())
        done = 0
        for info in self.source.tensors.values():
            module = self._candidates.get(info.name)
            yield [self._copied(info)] if module is None else self._compressed(info, module)
            done += info.nbytes
            progress(done, total)

    def _copied(self, info: TensorInfo) -> Outgoing:
        return Outgoing(info, self._watched(info, self.source.pieces(info.name)))

    def _compressed(self, info: TensorInfo, module: str) -> list[Outgoing]:
        dense = self.source.read(info.name)
        encoded = encode(dense)
        if encoded.nbytes >= dense.nbytes:
            self.dense[module] = f"would be larger: density {encoded.density:.3f}"
            return [Outgoing(info, self._watched(info, pieces_of(dense)))]
        if not _same_bits(encoded, dense):
            raise CheckpointError(f"{info} does not come back from its encoding; please report this as a bug")
        self._count_nonfinite(info, encoded.values)
        self.modules[module] = ModuleEntry.of(encoded)
        parts = (encoded.values, encoded.bitmap, encoded.offsets)
        return [
            outgoing(name, safetensors_dtype(part.dtype), part)
            for name, part in zip(storage_names(module), parts, strict=True)
        ]

    def _watched(self, info: TensorInfo, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass pieces on, counting what is not finite where the element type is one that we encode."""
        dtype = TORCH_DTYPES.get(info.dtype)
        for piece in pieces:
            if dtype is not None and dtype in VALUE_DTYPES.values():
                self._count_nonfinite(info, piece.view(dtype))
            yield piece

    def _count_nonfinite(self, info: TensorInfo, values: Tensor) -> None:
        # Both bounds are NaN where any value is; 20 times as fast as isfinite over 16-bit values.
        if values.numel() and not bool(torch.isfinite(torch.stack(values.aminmax())).all()):
            count = values.numel() - int(torch.isfinite(values).count_nonzero())
            self.nonfinite[info.name] = self.nonfinite.get(info.name, 0) + count


def _same_bits(encoded: TcaBmeTensor, dense: Tensor) -> bool:
    """Whether decoding gives `dense` back, its negative zeros made positive in place."""
    bits = dense.view(BIT_PATTERN_DTYPES[dense.dtype])
    bits.masked_fill_(bits == torch.iinfo(bits.dtype).min, 0)
    return torch.equal(encoded.decode().view(bits.dtype), bits)


def _summary(dense: Mapping[str, str]) -> str:
    reasons = [f"{name}: {reason}" for name, reason in list(dense.items())[:3]]
    return "; ".join(reasons) + (f"; and {len(dense) - 3} more" if len(dense) > 3 else "")
