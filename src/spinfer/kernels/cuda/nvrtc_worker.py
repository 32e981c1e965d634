"""Child process of `compile`: CUDA C++ in, cubin out, so that a compiler crash ends this process and not the caller's.

Run as a script. The job arrives on stdin as JSON: source (path), include, arch, defines, output (path).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cuda.core import Program, ProgramOptions


def main() -> None:
    """Compile one job."""
    job = json.load(sys.stdin)
    options = ProgramOptions(
        name=Path(job["source"]).name,
        arch=job["arch"],
        std="c++17",
        include_path=[job["include"]],
        define_macro=[(name, str(value)) for name, value in job["defines"].items()],
    )
    cubin = Program(Path(job["source"]).read_text(), "c++", options).compile("cubin").code
    Path(job["output"]).write_bytes(cubin)


if __name__ == "__main__":
    main()
