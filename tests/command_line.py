"""Run the command line in this process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from spinfer.cli import main


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `spinfer ...` through its entry point, in this process: starting one costs seconds."""
    command = ["spinfer", *map(str, arguments)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        try:
            main()
        except SystemExit as exit:
            status = int(exit.code or 0)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def succeed(*arguments: str | Path) -> str:
    """Its stdout; fails the test on a nonzero status."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_json(*arguments: str | Path) -> Any:
    """Its stdout, which must be JSON and nothing else."""
    return json.loads(succeed(*arguments))


def error_of(*arguments: str | Path) -> str:
    """The one line that a failing command ends with."""
    done = run(*arguments)
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last
