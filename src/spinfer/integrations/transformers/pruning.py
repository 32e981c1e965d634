"""Prune a loaded transformers model in place."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spinfer.errors import SpinferError
from spinfer.integrations.transformers.blocks import DecoderBlocks, decoder_blocks, record
from spinfer.integrations.transformers.matrices import Targets, targets
from spinfer.pruning.calibration import digest
from spinfer.pruning.observe import Matrix
from spinfer.pruning.recipe import Recipe
from spinfer.pruning.report import BlockReport, PruningReport
from spinfer.pruning.sequence import Progress, plan_sparsities, prune_blocks

RECIPE_KEY = "spinfer_pruning"
"""Of the entry in config.json that says how a model was pruned."""


class LoadedBlocks:
    """`Blocks` of a model that is in memory: each is brought to the compute device and back."""

    def __init__(self, model: PreTrainedModel, blocks: DecoderBlocks, chosen: Targets, device: torch.device) -> None:
        """Take the model as it is."""
        self.names = blocks.names
        self._model = model
        self._modules = blocks.modules
        self._targets = chosen
        self._device = device
        self._homes = [next(module.parameters()).device for module in blocks.modules]

    def load(self, index: int) -> tuple[nn.Module, list[Matrix]]:
        """Move a block to the compute device."""
        block = self._modules[index].to(self._device)
        return block, self._targets.matrices(self._model, index)

    def save(self, index: int, matrices: Sequence[Matrix], report: BlockReport) -> None:
        """Nothing to do: the weights were changed in place."""

    def release(self, index: int) -> None:
        """Move it back."""
        self._modules[index].to(self._homes[index])

    def finished(self, index: int) -> BlockReport | None:
        """Nothing is kept of an earlier run."""
        return None


@contextmanager
def calibrating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and with each expert applied by itself, so that its inputs can be seen."""
    training, experts = model.training, model.get_experts_implementation()
    model.eval()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(experts)
        model.train(training)


def prune(
    model: PreTrainedModel,
    samples: Tensor | None = None,
    *,
    method: str = "sparsegpt",
    sparsity: float | None = None,
    pattern: str | None = None,
    allocation: str = "uniform",
    ignore: Sequence[str] = (),
    device: str | torch.device | None = None,
    progress: Progress = lambda done, total, report: None,
) -> PruningReport:
    """Prune the Linears in a model's decoder blocks, in place; the recipe goes into its config.

    Args:
        model: a decoder-only language model of transformers, with its weights loaded.
        samples: calibration token ids, int64 [samples, tokens]; see `spinfer.pruning.sample_tokens`. Magnitude with
            uniform allocation needs none.
        method: "magnitude" (compares within each matrix), "wanda" (within each row), "sparsegpt" (within 128 columns).
        sparsity: share of zeros, in [0, 1); one half by default.
        pattern: "N:M", at most N nonzeros in every M weights of a row, instead.
        allocation: "uniform", or "owl": fewer zeros in blocks with many outliers.
        ignore: patterns of module names to leave alone (`*.down_proj`, or `re:` and a regular expression).
        device: where each block is computed; by default where it is.
        progress: called with (blocks done, blocks, report of the last) after each.

    Raises:
        SpinferError: choices that contradict each other, no calibration where it is needed, a model whose blocks cannot
            be run one at a time, or weights or activations that are not finite. The blocks before the one that it is
            about have been pruned by then.
    """
    began = time.monotonic()
    recipe = Recipe.of(method=method, sparsity=sparsity, pattern=pattern, allocation=allocation)
    if getattr(model, "hf_quantizer", None) is not None:
        raise SpinferError("the model is quantised or compressed; prune the dense one")
    blocks = decoder_blocks(model)
    chosen = targets(model, blocks, ignore)
    check_calibration(recipe, samples, model)
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise SpinferError(
            f"the model's weights are on {', '.join(sorted(map(str, devices)))}; load it onto one device (the CPU, "
            "where it is large) and choose where blocks are computed by `device`"
        )
    where = torch.device(device) if device is not None else next(blocks.modules.parameters()).device
    with calibrating(model):
        activations = None
        if samples is not None:
            activations = record(model, blocks, samples.to(model.get_input_embeddings().weight.device), where)
        loaded = LoadedBlocks(model, blocks, chosen, where)
        sparsities = plan_sparsities(loaded, recipe, activations)
        reports = prune_blocks(loaded, recipe, sparsities, activations, progress)
    report = PruningReport(
        recipe=recipe.to_dict(),
        calibration=None if samples is None else calibration_entry(samples),
        blocks=tuple(reports),
        dense=chosen.dense,
        seconds=time.monotonic() - began,
    )
    setattr(model.config, RECIPE_KEY, report.summary())
    return report


def check_calibration(recipe: Recipe, samples: Tensor | None, model: PreTrainedModel) -> None:
    """Raise where samples are needed and missing, or not token ids of the model.

    Raises:
        SpinferError: which of these.
    """
    if samples is None:
        if recipe.needs_calibration:
            raise SpinferError(
                f"{recipe.method} with {recipe.allocation} allocation needs calibration text; give some, or use "
                "magnitude with uniform allocation"
            )
        return
    config = model.config.get_text_config()
    if samples.dim() != 2 or samples.is_floating_point() or not samples.numel():
        raise SpinferError(f"samples must be token ids [samples, tokens], got {samples.dtype} {list(samples.shape)}")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and samples.shape[1] > longest:
        raise SpinferError(f"samples of {samples.shape[1]} tokens are longer than the model's limit of {longest}")
    if not (int(samples.min()) >= 0 and int(samples.max()) < config.vocab_size):
        raise SpinferError(f"samples hold token ids outside the model's vocabulary of {config.vocab_size}")


def calibration_entry(samples: Tensor, **facts: Any) -> dict[str, Any]:
    """What the recipe says about the calibration."""
    return {
        **facts,
        "num_samples": samples.shape[0],
        "sequence_length": samples.shape[1],
        "samples_sha256": digest(samples),
    }
