"""The `spinfer` command: puts the verbs together and turns errors into one line and a nonzero exit status."""

from __future__ import annotations

import functools
import sys

import typer

from spinfer.cli.output import stderr
from spinfer.errors import SpinferError


@functools.cache
def application() -> typer.Typer:
    """The command with all its verbs; they import transformers, which takes seconds, so only when it runs."""
    from spinfer.cli.bench import bench_commands
    from spinfer.cli.compress import compress
    from spinfer.cli.decompress import decompress
    from spinfer.cli.evaluate import evaluate
    from spinfer.cli.generate import generate
    from spinfer.cli.inspect import inspect
    from spinfer.cli.plan import plan
    from spinfer.cli.prune import prune

    app = typer.Typer(
        name="spinfer",
        help="Unstructured-sparse language models, smaller and faster to run.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(prune)
    app.command()(compress)
    app.command()(decompress)
    app.command()(inspect)
    app.command()(generate)
    app.command("eval")(evaluate)
    app.add_typer(bench_commands(), name="bench", help="Time MODEL, or one kernel: bench MODEL, bench kernel.")
    app.command()(plan)
    return app


def main() -> None:
    """Entry point."""
    try:
        application()()
    except SpinferError as error:
        stderr.print(f"error: {error}", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        stderr.print("interrupted")
        sys.exit(130)
