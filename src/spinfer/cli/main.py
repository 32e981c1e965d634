"""The `spinfer` command: puts the verbs together and turns errors into one line and a nonzero exit status."""

from __future__ import annotations

import sys

import typer

from spinfer.cli.output import stderr
from spinfer.errors import SpinferError

app = typer.Typer(
    name="spinfer",
    help="Unstructured-sparse language models, smaller and faster to run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _add_verbs() -> None:
    # Imported here: the verbs bring in transformers, which takes seconds, and `spinfer --version` should not wait.
    from spinfer.cli.bench import bench
    from spinfer.cli.evaluate import evaluate
    from spinfer.cli.generate import generate

    app.command()(generate)
    app.command("eval")(evaluate)
    app.command()(bench)


def main() -> None:
    """Entry point."""
    try:
        _add_verbs()
        app()
    except SpinferError as error:
        stderr.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        stderr.print("interrupted")
        sys.exit(130)
