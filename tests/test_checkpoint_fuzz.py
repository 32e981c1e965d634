"""Damaged directories: a clean refusal or the right weights; no crash, no unbounded memory, no wrong weight.

SPINFER_FUZZ_CASES sets how many directories are damaged (1,000 by default; the full count is 10,000) and
SPINFER_FUZZ_SEED where the sequence starts.
"""

from __future__ import annotations

import json
import os
import random
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from checkpoint_models import bits, write_dense, write_json
from fuzz.mutators import Files, damage
from spinfer.checkpoint import CompressedCheckpoint, compress_checkpoint, decompress_checkpoint, inspect_checkpoint
from spinfer.checkpoint.bitmask import PARTS
from spinfer.checkpoint.dense import open_dense
from spinfer.errors import SpinferError

CASES = int(os.environ.get("SPINFER_FUZZ_CASES", "1000"))
SEED = int(os.environ.get("SPINFER_FUZZ_SEED", "0"))

MEMORY_NBYTES = 1 << 30
"""What a reader may take on top of what the process has; the directories are about 30 KB."""

LINEARS = {"model.a": (70, 100), "model.b": (70, 100), "model.c": (64, 130)}


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{name}.weight": (
            torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.4)
        ).bfloat16()
        for name, shape in LINEARS.items()
    }
    return found | {"model.norm.weight": torch.ones(4)}


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let allocations beyond MEMORY_NBYTES fail, which surfaces as an error that is not ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_NBYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def read_files(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_files(directory: Path, files: Files) -> None:
    for path in directory.iterdir():
        path.unlink()
    for name, data in files.items():
        (directory / name).write_bytes(data)


def is_protected(directory: Path, name: str) -> bool:
    config = json.loads((directory / "config.json").read_text())
    return "crc32" in config["quantization_config"]["modules"][name]


def check_compressed(directory: Path) -> str:
    """Load everything; what loads must be the original, unless the damage removed the checksum."""
    expected = {name: bits(weight) for name, weight in state().items()}
    report = inspect_checkpoint(directory)
    outcome = "right"
    loaded = dict(CompressedCheckpoint(directory).load_all())
    assert {layer.name for layer in report.layers} == loaded.keys()
    assert loaded.keys() == LINEARS.keys()
    for name, weight in loaded.items():
        dense = weight.decode()
        if tuple(dense.shape) == LINEARS[name] and bits(dense) == expected[f"{name}.weight"]:
            continue
        assert not is_protected(directory, name), f"{name} loaded wrong"
        outcome = "unprotected"
    return outcome


def check_dense(directory: Path) -> str:
    """What loads must be what the safetensors library reads there."""
    _, source = open_dense(directory)
    for name, info in source.tensors.items():
        tensor = source.read(name)
        with safe_open(info.file, "pt") as file:
            theirs = file.get_tensor(name)
        assert (tensor.dtype, tensor.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
    return "consistent"


def check_bitmask(directory: Path) -> str:
    """What loads must be what numpy makes of the parts, where the parts are still there."""
    _, source = open_dense(directory)
    outcome = "consistent"
    for name, info in source.tensors.items():
        tensor = source.read(name)
        assert tuple(tensor.shape) == info.shape
        assert tensor.dtype != torch.bool or info.dtype == "BOOL"
        with safe_open(info.file, "pt") as file:
            prefix = name.removesuffix(".weight")
            if f"{prefix}.bitmask" not in file.keys():  # noqa: SIM118
                continue
            shape, values, bitmask, _ = (file.get_tensor(f"{prefix}.{part}") for part in PARTS)
        mask = np.unpackbits(bitmask.numpy(), axis=-1, count=int(shape[-1]), bitorder="little").astype(bool)
        width = values.itemsize
        found = tensor.view(torch.uint8).numpy().reshape(*mask.shape, width)
        assert np.array_equal(found[mask].reshape(-1), values.view(torch.uint8).numpy().reshape(-1))
        assert not found[~mask].any()
    return outcome


def check_bin(directory: Path) -> str:
    """What loads must be tensors that can be read through."""
    _, source = open_dense(directory)
    for name, info in source.tensors.items():
        assert source.read(name).nbytes == info.nbytes
        assert sum(piece.numel() for piece in source.pieces(name)) == info.nbytes
    return "consistent"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    root = tmp_path_factory.mktemp("originals")
    write_dense(root / "dense", state(), files=2)
    compress_checkpoint(root / "dense", root / "compressed", linears=LINEARS, dense={}, max_shard_nbytes=20_000)
    decompress_checkpoint(root / "compressed", root / "bitmask", target="sparse-bitmask")
    (root / "bin").mkdir()
    write_json(root / "bin" / "config.json", {})
    torch.save(state(), root / "bin" / "pytorch_model.bin")
    files = {path.name: read_files(path) for path in root.iterdir()}
    for directory in files.values():  # what the readers do not open would only thin the damage out
        for name in set(directory) - {"config.json"}:
            if not name.endswith((".safetensors", ".index.json", ".bin")):
                del directory[name]
    return files


KINDS: dict[str, tuple[int, Callable[[Path], str]]] = {
    "compressed": (70, check_compressed),
    "dense": (10, check_dense),
    "bitmask": (10, check_bitmask),
    "bin": (10, check_bin),
}
"""Share of the cases in percent, and the check."""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_directories(kind: str, originals: dict[str, Files], tmp_path: Path) -> None:
    share, check = KINDS[kind]
    write_files(tmp_path, originals[kind])
    assert check(tmp_path) in ("right", "consistent")
    outcomes: Counter[str] = Counter()
    with bounded_memory():
        for case in range(CASES * share // 100):
            seed = f"{SEED}:{kind}:{case}"
            files = dict(originals[kind])
            done = damage(files, random.Random(seed))
            write_files(tmp_path, files)
            try:
                outcomes[check(tmp_path)] += 1
            except SpinferError:
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"case {seed} ({done}) ends in {error!r}") from error
    print(f"{kind}: {dict(outcomes)}")
    assert outcomes["refused"] > outcomes.total() // 4, "the damage is too tame to show anything"
