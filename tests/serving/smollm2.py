"""Make the real model that the vLLM tests serve: `python smollm2.py FOLDER` fetches, prunes and compresses it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))

from fetch import fetch_model
from run import spinfer

NAME = "smollm2-135m-spinfer"


def main() -> None:
    """Make what is not there already."""
    folder = Path(sys.argv[1])
    pruned, compressed = folder / "smollm2-135m-pruned", folder / NAME
    folder.mkdir(exist_ok=True)
    if not pruned.exists():
        spinfer("prune", fetch_model(folder), "--method", "magnitude", "-o", pruned)
    if not compressed.exists():
        spinfer("compress", pruned, "-o", compressed)


if __name__ == "__main__":
    main()
