"""Command line: one thin file a verb."""

from spinfer.cli.main import main

__all__ = ["main"]
