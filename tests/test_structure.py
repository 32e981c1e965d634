"""The house: which room may import which, who reads the environment, and what `import spinfer` costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spinfer

ROOT = Path(spinfer.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

FLOORS = (
    {"env"},
    {"errors"},
    {"format"},
    {"kernels"},
    {"ops"},
    {"linear"},
    {"pruning"},
    {"checkpoint"},
    {"model"},
    {"evaluation"},
    {"integrations"},
    {"bench"},
    {"cli"},
    {"__main__"},
)
"""Bottom to top: a room imports itself and rooms below it."""
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

ONLY_INTEGRATIONS = {"transformers", "vllm", "accelerate"}


def room_of(path: Path) -> str:
    """The first name under spinfer: `format` for spinfer/format/codec.py; "" for the package's own __init__."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(source: str, package: tuple[str, ...] = ("spinfer",)) -> Iterator[str]:
    """Dotted names that a file imports anywhere, at the top, inside functions, under TYPE_CHECKING or by string."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def file_imports(path: Path) -> list[str]:
    package = ("spinfer", *path.relative_to(ROOT).parts[:-1])
    return list(imports(path.read_text(), package))


def test_the_walker_sees_every_kind_of_import() -> None:
    source = """
import spinfer.cli
from spinfer import model
def f():
    from . import codec
    from ..linear import x
    importlib.import_module("vllm")
"""
    package = ("spinfer", "format")
    expected = {"spinfer.cli", "spinfer.model", "spinfer.format.codec", "spinfer.linear.x", "vllm"}
    assert set(imports(source, package)) == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if not room:
        return  # the package's face: it names what the rooms export, and no room below bench imports it
    assert room in LEVEL, f"{room} has no floor: add it to FLOORS, above what it imports"
    for name in file_imports(path):
        parts = name.split(".")
        if parts[0] != "spinfer":
            continue
        target = parts[1] if len(parts) > 1 else ""
        if target not in LEVEL:  # a name of the package's face
            assert LEVEL[room] >= LEVEL["bench"], f"{path} imports {name}: import the room that defines it"
            continue
        assert LEVEL[target] <= LEVEL[room], f"{path} imports {name}, which lies above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_other_inference_libraries_stay_in_integrations(path: Path) -> None:
    if room_of(path) != "integrations":
        foreign = {name.split(".")[0] for name in file_imports(path)} & ONLY_INTEGRATIONS
        assert not foreign, f"{path} imports {foreign}: that belongs into integrations/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_env_reads_the_environment(path: Path) -> None:
    if room_of(path) == "env":
        return
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(ast.parse(path.read_text())):
        used = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else None
        assert used not in names, f"{path}:{node.lineno} reads the environment: that belongs into env.py"


def test_every_floor_below_the_integrations_that_exists_was_walked() -> None:
    assert {room_of(path) for path in FILES} >= {"", "errors", "format", "kernels", "ops", "linear", "checkpoint"}


PROBE = """
import json, sys
import torch
import spinfer
names = [n for n in sys.modules]
print(json.dumps({
    "cuda": torch.cuda.is_initialized(),
    "modules": names,
    "dynamo": "torch._dynamo" in sys.modules,
}))
"""


def test_import_is_light() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, cwd=ROOT.parent, timeout=120
    )
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report["cuda"] is False
    loaded = {name.split(".")[0] for name in report["modules"]}
    assert "spinfer" in loaded
    heavy = loaded & {"transformers", "vllm", "accelerate", "typer", "click", "rich", "triton", "matplotlib", "pytest"}
    assert not heavy, f"import spinfer imports {heavy}"
    assert "torch.utils.cpp_extension" not in report["modules"], "import spinfer prepares to compile"


def test_at_most_ten_public_names() -> None:
    assert len(spinfer.__all__) <= 10
    assert sorted(spinfer.__all__) == sorted(set(spinfer.__all__))
    for name in spinfer.__all__:
        assert getattr(spinfer, name) is not None


def test_typed_and_documented() -> None:
    assert (ROOT / "py.typed").exists()
    for name in spinfer.__all__:
        assert (getattr(spinfer, name).__doc__ or "").strip()
