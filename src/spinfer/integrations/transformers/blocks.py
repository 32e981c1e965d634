"""The decoder blocks of a transformers model, and what the model passes to each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spinfer.errors import SpinferError

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}
"""Calibration tokens in one run of a block: on the CPU one sample stays in cache, a GPU wants more work at once."""


@dataclass(frozen=True)
class DecoderBlocks:
    """The list of a model's blocks.

    Attributes:
        name: of the list within the model, such as `model.layers`.
        modules: the list.
    """

    name: str
    modules: nn.ModuleList

    @property
    def names(self) -> list[str]:
        """Of the blocks."""
        return [f"{self.name}.{index}" for index in range(len(self.modules))]


def decoder_blocks(model: PreTrainedModel) -> DecoderBlocks:
    """Find the one list of modules that transformers marks as the model's blocks (`_no_split_modules`).

    Raises:
        SpinferError: there is none, or several.
    """
    classes = set(getattr(model, "_no_split_modules", None) or ())
    found = [
        DecoderBlocks(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(m).__name__ in classes for m in module)
    ]
    if len(found) != 1:
        raise SpinferError(
            f"{type(model).__name__} cannot be pruned a block at a time: expected one list of decoder blocks, found "
            f"{', '.join(f'{blocks.name} ({len(blocks.modules)})' for blocks in found) or 'none'}; pruning supports "
            "decoder-only language models"
        )
    return found[0]


@dataclass(frozen=True)
class _Call:
    """What a block gets beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class RecordedActivations:
    """Calibration tokens in front of the first block, and what each block is called with; see `Activations`."""

    def __init__(self, batches: list[Tensor], calls: dict[int, list[_Call]]) -> None:
        """Take what `record` found; calls are by samples in a batch, then by block."""
        self.batches = batches
        self._calls = calls

    def to(self, device: torch.device) -> RecordedActivations:
        """The same on another device."""
        moved: dict[int, Tensor] = {}
        calls = {samples: [_moved(call, device, moved) for call in made] for samples, made in self._calls.items()}
        return RecordedActivations([batch.to(device) for batch in self.batches], calls)

    def forward(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block on a batch."""
        call = self._calls[hidden.shape[0]][index]
        return _first(block(hidden, *call.args, **call.kwargs))


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def record(model: PreTrainedModel, blocks: DecoderBlocks, samples: Tensor, device: torch.device) -> RecordedActivations:
    """Run a model up to its first block and note what it would call each block with; no block runs.

    Args:
        model: whatever runs before the blocks is loaded, on the device where the samples are.
        blocks: its blocks; they may be on the meta device.
        samples: int64 [samples, tokens].
        device: where the blocks are going to run.

    Raises:
        SpinferError: the model does more between its blocks than to pass the hidden states on, or passes them something
            that depends on the text or is shared between them.
    """
    size = max(1, TOKENS_AT_ONCE.get(device.type, 1024) // samples.shape[1])
    tensors: list[Tensor] = []
    calls: dict[int, list[_Call]] = {}
    as_tuple = False
    for batch in samples.split(size):
        try:
            hidden, batch_calls = _trace(model, blocks, batch, as_tuple)
        except _BrokenChain:
            as_tuple = True  # some models take the hidden states out of a tuple
            try:
                hidden, batch_calls = _trace(model, blocks, batch, as_tuple)
            except _BrokenChain as error:
                raise _unsupported(model, str(error)) from None
        tensors.append(hidden)
        if batch.shape[0] not in calls:
            _check(model, batch_calls)
            calls[batch.shape[0]] = batch_calls
            other = (batch + 1) % int(model.config.get_text_config().vocab_size)
            _, other_calls = _trace(model, blocks, other, as_tuple)
            if not _same(batch_calls, other_calls):
                raise _unsupported(model, "what its blocks are called with depends on the text")
    return RecordedActivations(tensors, calls).to(device)


def _unsupported(model: PreTrainedModel, reason: str) -> SpinferError:
    return SpinferError(
        f"{type(model).__name__} cannot be calibrated a block at a time: {reason}; magnitude needs no calibration"
    )


class _BrokenChain(Exception):
    """The model does not hand one block's output to the next."""


class _Stop(Exception):
    """All blocks have been called."""


class _Recorder(nn.Module):
    """Stands in a block's place, notes how it is called and gives new hidden states back."""

    def __init__(self, block: nn.Module, trace: _Trace, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # no submodule
        object.__setattr__(self, "_trace", trace)
        self._index = index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)  # models read attributes of their blocks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._trace.note(self._index, args, kwargs)


class _Trace:
    """One run of a model whose blocks only take notes."""

    def __init__(self, blocks: int, as_tuple: bool) -> None:
        self.first: Tensor | None = None
        self.calls: list[_Call] = []
        self._blocks = blocks
        self._as_tuple = as_tuple
        self._given: Tensor | None = None

    def note(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states", None)
        if index != len(self.calls):
            raise _BrokenChain(f"block {index} is called after {len(self.calls)} others")
        if not isinstance(hidden, Tensor) or (index and hidden is not self._given):
            raise _BrokenChain(f"block {index} does not get what the block before it gives")
        if self.first is None:
            self.first = hidden
        self.calls.append(_Call(tuple(args[1:]), kwargs))
        if len(self.calls) == self._blocks:
            raise _Stop
        self._given = torch.zeros_like(hidden)
        return (self._given,) if self._as_tuple else self._given


@contextmanager
def _replaced(blocks: DecoderBlocks, trace: _Trace) -> Iterator[None]:
    originals = list(blocks.modules)
    try:
        for index, block in enumerate(originals):
            blocks.modules[index] = _Recorder(block, trace, index)
        yield
    finally:
        for index, block in enumerate(originals):
            blocks.modules[index] = block


def _trace(model: PreTrainedModel, blocks: DecoderBlocks, batch: Tensor, as_tuple: bool) -> tuple[Tensor, list[_Call]]:
    trace = _Trace(len(blocks.modules), as_tuple)
    try:
        with _replaced(blocks, trace):
            model(batch, use_cache=False)
    except _Stop:
        pass
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        if not trace.calls:
            raise
        raise _BrokenChain(f"its blocks give more than hidden states ({error})") from error
    if trace.first is None or len(trace.calls) != len(blocks.modules):
        raise _BrokenChain(f"{len(trace.calls)} of its {len(blocks.modules)} blocks are called")
    return trace.first, trace.calls


def _check(model: PreTrainedModel, calls: Sequence[_Call]) -> None:
    for call in calls:
        for value in (*call.args, *call.kwargs.values()):
            if not _plain(value):
                raise _unsupported(model, f"its blocks get a {type(value).__name__}, which they may change")


def _plain(value: Any) -> bool:
    """Whether nothing can pass from block to block through it."""
    if isinstance(value, tuple | list):
        return bool(value) and all(_plain(item) for item in value)
    if isinstance(value, dict):
        return bool(value) and all(_plain(item) for item in value.values())
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _moved(value: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    """To a device; a mask that all blocks share is moved once (`moved` has the copy by the original's id)."""
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if isinstance(value, _Call):
        return _Call(_moved(value.args, device, moved), _moved(value.kwargs, device, moved))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device, moved) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device, moved) for key, item in value.items()}
    return value


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, _Call):
        return isinstance(right, _Call) and _same(left.args, right.args) and _same(left.kwargs, right.kwargs)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return bool(left == right)
