"""Compressed Hugging Face checkpoints on disk: config, streaming read and write, conversion, inspection."""

from spinfer.checkpoint.compress import compress_checkpoint
from spinfer.checkpoint.decompress import decompress_checkpoint
from spinfer.checkpoint.inspect import inspect_checkpoint
from spinfer.checkpoint.report import CheckpointReport, CompressionReport, DecompressionReport
from spinfer.checkpoint.stored import CompressedCheckpoint

__all__ = [
    "CheckpointReport",
    "CompressedCheckpoint",
    "CompressionReport",
    "DecompressionReport",
    "compress_checkpoint",
    "decompress_checkpoint",
    "inspect_checkpoint",
]
