"""Exceptions that spinfer raises; every one is a `SpinferError`."""

from __future__ import annotations


class SpinferError(Exception):
    """Base of all errors that spinfer raises on purpose. The message says what to do."""


class FormatError(SpinferError, ValueError):
    """Encoded data is inconsistent, or a tensor cannot be encoded."""


class CheckpointError(SpinferError, ValueError):
    """A checkpoint on disk is missing, truncated, inconsistent or of an unsupported kind."""


class OutputError(SpinferError, OSError):
    """The output exists already or cannot be written."""
