"""Prune a model directory into another: one block in memory at a time, and going on after an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from spinfer.checkpoint.carry import CARD_NAME
from spinfer.checkpoint.compress import compress_checkpoint
from spinfer.checkpoint.output import refuse_existing
from spinfer.checkpoint.rewrite import rewrite_checkpoint
from spinfer.checkpoint.workspace import Workspace, workspace
from spinfer.checkpoint.writer import DEFAULT_SHARD_NBYTES
from spinfer.errors import CheckpointError
from spinfer.integrations.transformers.blocks import DecoderBlocks, RecordedActivations, decoder_blocks, record
from spinfer.integrations.transformers.matrices import Targets, targets
from spinfer.integrations.transformers.memory import trim_heap
from spinfer.integrations.transformers.pruning import (
    RECIPE_KEY,
    calibrating,
    calibration_entry,
    check_calibration,
)
from spinfer.integrations.transformers.streaming import StreamedModel
from spinfer.model import linear_modules
from spinfer.pruning.calibration import NUM_SAMPLES, digest, read_texts, sample_tokens
from spinfer.pruning.card import pruned_card
from spinfer.pruning.observe import Matrix
from spinfer.pruning.recipe import Recipe
from spinfer.pruning.report import BlockReport, PruningReport
from spinfer.pruning.sequence import Progress, plan_sparsities, prune_blocks

SEQUENCE_LENGTH = 2048
"""Tokens a sample where nothing else is asked for and the model can read that many, as in the papers."""


class StreamedBlocks:
    """`Blocks` of a model on disk; finished ones are kept in a workspace."""

    def __init__(
        self, streamed: StreamedModel, blocks: DecoderBlocks, chosen: Targets, work: Workspace, device: torch.device
    ) -> None:
        """Nothing is loaded yet."""
        self.names = blocks.names
        self._streamed = streamed
        self._modules = blocks.modules
        self._targets = chosen
        self._work = work
        self._device = device

    def load(self, index: int) -> tuple[nn.Module, list[Matrix]]:
        """Read a block, with the pruned weights where it is finished."""
        pruned: dict[str, Tensor] = {}
        if self.finished(index) is not None:
            pruned = {name: self._work.tensor(index, name) for name in self._targets.parameters[index]}
        self._streamed.load(self._streamed.inside(self.names[index]), self._device, pruned)
        return self._modules[index], self._targets.matrices(self._streamed.model, index)

    def save(self, index: int, matrices: Sequence[Matrix], report: BlockReport) -> None:
        """Keep the pruned weights in the type in which they are stored."""
        weights = {
            name: self._streamed.model.get_parameter(name).data.to("cpu", self._streamed.stored_dtype(name))
            for name in self._targets.parameters[index]
        }
        self._work.save(index, weights, report.to_dict())

    def release(self, index: int) -> None:
        """Drop a block's weights."""
        self._streamed.unload(self._streamed.inside(self.names[index]))
        trim_heap()  # or what small matrices leave in it adds up to the whole model

    def finished(self, index: int) -> BlockReport | None:
        """What the workspace says."""
        report = self._work.report(index)
        return None if report is None else BlockReport.from_dict(report)


def prune_checkpoint(
    source: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    ignore: Sequence[str] = (),
    calibration: str | Path | None = None,
    num_samples: int = NUM_SAMPLES,
    sequence_length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    compress: bool = False,
    max_shard_nbytes: int = DEFAULT_SHARD_NBYTES,
    on_resume: Callable[[int, int], None] = lambda done, total: None,
    on_plan: Callable[[int, int], None] = lambda done, total: None,
    progress: Progress = lambda done, total, report: None,
) -> PruningReport:
    """Prune the Linears in the decoder blocks of a Hugging Face directory.

    Memory holds one block, the calibration tokens on their way through the model, and the Hessians of one block. What
    is finished is kept in `.OUTPUT.work` until the output is complete; the same call goes on with it.

    Args:
        source: a dense directory; see `compress_checkpoint`.
        output: a directory that does not exist; it appears when it is complete.
        recipe: how.
        ignore: patterns of module names to leave alone; see `Selection`.
        calibration: text file, `.jsonl` file, or directory of such; see `read_texts`.
        num_samples: windows of the text.
        sequence_length: tokens a window; by default 2048, or as many as the model can read.
        seed: of the windows.
        device: where blocks are computed.
        compress: write the compressed directory instead of the dense one.
        max_shard_nbytes: most bytes of tensors in one file.
        on_resume: called once with (blocks done, blocks) where an earlier run is taken up.
        on_plan: called with (blocks done, blocks) while OWL looks at the dense model.
        progress: called with (blocks done, blocks, report of the last) after each block.

    Raises:
        CheckpointError: a damaged or unsupported source, or a workspace of another run.
        OutputError: the output exists or cannot be written; finished blocks are kept.
        SpinferError: see `prune`, `read_texts` and `sample_tokens`.
    """
    began = time.monotonic()
    source, output, where = Path(source), Path(output), torch.device(device)
    refuse_existing(output)
    streamed = StreamedModel(source)
    blocks = decoder_blocks(streamed.model)
    chosen = targets(streamed.model, blocks, ignore)
    streamed.dtype = _compute_dtype(streamed, chosen)
    streamed.move_buffers(where)
    samples = None
    if calibration is not None:
        samples = _samples(streamed, calibration, num_samples, sequence_length, seed)
    check_calibration(recipe, samples, streamed.model)
    facts = {} if calibration is None else {"text": Path(calibration).name, "seed": seed}
    task = {
        "recipe": recipe.to_dict(),
        "ignore": list(ignore),
        "model": _fingerprint(streamed),
        "samples": None if samples is None else digest(samples),
    }
    with workspace(output, task) as work, calibrating(streamed.model):
        pieces = StreamedBlocks(streamed, blocks, chosen, work, where)
        done = sum(pieces.finished(index) is not None for index in range(len(pieces.names)))
        if done:
            on_resume(done, len(pieces.names))
        activations = None
        if samples is not None and done < len(pieces.names):
            activations = _activations(streamed, blocks, samples, where)
        sparsities = work.notes("sparsities")
        if sparsities is None:
            sparsities = plan_sparsities(pieces, recipe, activations, on_plan)
            work.note("sparsities", sparsities)
        reports = prune_blocks(pieces, recipe, sparsities, activations, progress)
        del activations
        report = PruningReport(
            recipe=recipe.to_dict(),
            calibration=None if samples is None else calibration_entry(samples, **facts),
            blocks=tuple(reports),
            dense=chosen.dense,
            seconds=time.monotonic() - began,
        )
        _write(streamed, work, chosen, report, output, compress, max_shard_nbytes)
        work.remove()
    return report


def _compute_dtype(streamed: StreamedModel, chosen: Targets) -> torch.dtype:
    """The widest type in which a weight to prune is stored: then what stays can be written back unchanged."""
    dtypes = {streamed.stored_dtype(name) for names in chosen.parameters for name in names}
    if len(dtypes) == 2 and torch.float32 not in dtypes:
        return torch.float32  # neither float16 nor bfloat16 holds the other
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _samples(
    streamed: StreamedModel, calibration: str | Path, num_samples: int, sequence_length: int | None, seed: int
) -> Tensor:
    texts = read_texts(calibration)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(streamed.directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{streamed.directory}: no tokenizer: {str(error).strip().splitlines()[0]}") from error
    if sequence_length is None:
        longest = getattr(streamed.model.config.get_text_config(), "max_position_embeddings", None)
        sequence_length = min(SEQUENCE_LENGTH, longest or SEQUENCE_LENGTH)
    return sample_tokens(
        texts,
        lambda text: tokenizer(text, verbose=False)["input_ids"],
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=seed,
    )


def _fingerprint(streamed: StreamedModel) -> dict[str, Any]:
    """Whether two runs read the same weights: names, sizes and times of the files, not their content."""
    files = sorted({info.file for info in streamed.source.tensors.values()})
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _activations(
    streamed: StreamedModel, blocks: DecoderBlocks, samples: Tensor, device: torch.device
) -> RecordedActivations:
    """Load what runs before the blocks, run it, and drop it."""
    before = streamed.outside(blocks.name)
    streamed.load(before, device)
    activations = record(streamed.model, blocks, samples.to(device), device)
    streamed.unload(before)
    return activations


def _write(
    streamed: StreamedModel,
    work: Workspace,
    chosen: Targets,
    report: PruningReport,
    output: Path,
    compress: bool,
    max_shard_nbytes: int,
) -> None:
    source = streamed.directory
    original = source / CARD_NAME
    card = pruned_card(source.resolve().name, report, original.read_text("utf-8") if original.is_file() else "")
    dense = work.path / f"{source.resolve().name}-pruned" if compress else output
    if not (compress and dense.exists()):  # an earlier run may have come as far as that
        rewrite_checkpoint(
            source,
            dense,
            streamed.source,
            {
                streamed.stored_name(name): partial(work.tensor, index, name)
                for index, names in enumerate(chosen.parameters)
                for name in names
            },
            config={**streamed.config, RECIPE_KEY: report.summary()},
            card=card,
            max_shard_nbytes=max_shard_nbytes,
        )
    if compress:
        found = linear_modules(streamed.model)
        compress_checkpoint(dense, output, linears=found.linears, dense=found.dense, max_shard_nbytes=max_shard_nbytes)
