"""Fill the README's marked blocks from the committed results, so that no figure there is typed by hand.

A block stands between `<!-- NAME -->` and `<!-- /NAME -->`. `--check` fails when a block is not what the results say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "demo"))

from table import table  # noqa: E402  (the demo's own)

CPU = RESULTS / "cpu" / "xeon-emerald-rapids-2-cores"


def linked(text: str, file: Path) -> str:
    """The text and where its figures come from."""
    name = file.relative_to(ROOT).as_posix()
    return f"{text}\n\nFrom [{name}]({name})."


def demo() -> str:
    """The demo's table."""
    file = CPU / "demo.json"
    result = json.loads(file.read_text())
    return linked(f"{table(result)}\n\n{result['processor']}, torch {result['versions']['torch']}.", file)


BLOCKS = {"demo": demo}


def filled(readme: str) -> str:
    """The README with every block made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in readme or end not in readme:
            raise SystemExit(f"README.md has no block {name!r}")
        before, _, rest = readme.partition(begin)
        readme = before + begin + make() + "\n" + end + rest.partition(end)[2]
    return readme


def main() -> None:
    """Write, or check."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            raise SystemExit("README.md is not what benchmarks/results say; run `make readme`")
    else:
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
