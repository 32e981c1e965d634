"""Make the real model that the vLLM tests serve: `python smollm2.py FOLDER` fetches, prunes and compresses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))

from fetch import fetch_model
from run import prune

NAME = "smollm2-135m-spinfer"


def main() -> None:
    """Do nothing where the model is there already."""
    folder = Path(sys.argv[1])
    if not (folder / NAME).exists():
        folder.mkdir(exist_ok=True)
        pruned = folder / "smollm2-135m-pruned"
        prune(fetch_model(folder), pruned, 0.5)
        subprocess.run([sys.executable, "-m", "spinfer", "compress", pruned, "-o", folder / NAME], check=True)


if __name__ == "__main__":
    main()
