"""Compressed directories that are wrong somewhere: each is refused, by file, tensor and remedy."""

import json
import resource
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_models import LINEARS, bits, write_compressed, write_json
from spinfer.checkpoint import CompressedCheckpoint, decompress_checkpoint, inspect_checkpoint, safetensors_source
from spinfer.checkpoint.config import CompressionConfig, ModuleEntry
from spinfer.errors import CheckpointError, FormatError
from spinfer.format import TcaBmeTensor, encode

NAME = next(iter(LINEARS))
VALUES, BITMAP, OFFSETS = f"{NAME}.weight", f"{NAME}.weight_bitmap", f"{NAME}.weight_offsets"

Stored = dict[str, Tensor]
Config = dict[str, Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_compressed(tmp_path / "model")
    return tmp_path / "model"


def change(
    model: Path,
    tensors: Callable[[Stored], object] = lambda stored: None,
    config: Callable[[Config], object] = lambda entry: None,
    *,
    keep_checksum: bool = False,
) -> None:
    """Edit the tensors and the `quantization_config`; the checksum goes, unless it is what is to be tested."""
    stored = load_file(model / "model.safetensors")
    tensors(stored)
    save_file(stored, model / "model.safetensors")
    content = json.loads((model / "config.json").read_text())
    entry = content["quantization_config"]
    if not keep_checksum:
        for module in entry["modules"].values():
            del module["crc32"]
    config(entry)
    write_json(model / "config.json", content)


def element(name: str, index: int, add: int) -> Callable[[Stored], object]:
    def edit(stored: Stored) -> None:
        stored[name][index] += add

    return edit


def resized(name: str, add: int) -> Callable[[Stored], object]:
    def edit(stored: Stored) -> None:
        old = stored[name]
        stored[name] = torch.cat([old, old[:add]]) if add > 0 else old[:add].clone()

    return edit


def module(**entries: Any) -> Callable[[Config], object]:
    return lambda entry: entry["modules"][NAME].update(entries)


def one_more_bit(stored: Stored) -> None:
    word = stored[BITMAP]
    empty = int((word != -1).nonzero()[0])
    bit = next(bit for bit in range(64) if not int(word[empty]) >> bit & 1)
    word[empty] |= torch.tensor(1 << bit if bit < 63 else -(1 << 63))


def converted(name: str, dtype: torch.dtype) -> Callable[[Stored], object]:
    return lambda stored: stored.update({name: stored[name].to(dtype)})


# Headers against config.json: seen when the directory is opened.
HEADERS: dict[str, tuple[Callable[[Stored], object], Callable[[Config], object], str]] = {
    "values too short": (resized(VALUES, -8), lambda entry: None, VALUES),
    "values too long": (resized(VALUES, 8), lambda entry: None, VALUES),
    "bitmap too short": (resized(BITMAP, -1), lambda entry: None, BITMAP),
    "bitmap too long": (resized(BITMAP, 64), lambda entry: None, BITMAP),
    "offsets too short": (resized(OFFSETS, -1), lambda entry: None, OFFSETS),
    "offsets too long": (resized(OFFSETS, 1), lambda entry: None, OFFSETS),
    "values of another type": (converted(VALUES, torch.float32), lambda entry: None, VALUES),
    "bitmap of another type": (converted(BITMAP, torch.int32), lambda entry: None, BITMAP),
    "offsets of another type": (converted(OFFSETS, torch.int64), lambda entry: None, OFFSETS),
    "values missing": (lambda stored: stored.pop(VALUES), lambda entry: None, VALUES),
    "bitmap missing": (lambda stored: stored.pop(BITMAP), lambda entry: None, BITMAP),
    "offsets missing": (lambda stored: stored.pop(OFFSETS), lambda entry: None, OFFSETS),
    "another shape": (lambda stored: None, module(shape=[700, 100]), BITMAP),
    "a huge shape": (lambda stored: None, module(shape=[2**40, 2**40]), BITMAP),
    "not in config.json": (lambda stored: None, lambda entry: entry["modules"].pop(NAME), "weight_(bitmap|offsets)"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_disagree_with_the_config(case: str, model: Path) -> None:
    tensors, config, tensor = HEADERS[case]
    change(model, tensors, config)
    with pytest.raises(CheckpointError, match=f"{model}.*{tensor}.*download") as caught:
        CompressedCheckpoint(model)
    assert NAME in str(caught.value)
    with pytest.raises(CheckpointError):
        inspect_checkpoint(model)


# Parts against each other: seen when they are read.
PARTS: dict[str, tuple[Callable[[Stored], object], Callable[[Config], object], str]] = {
    "offsets that decrease": (element(OFFSETS, 1, 10_000), lambda entry: None, "decrease"),
    "offsets that start below zero": (element(OFFSETS, 0, -1), lambda entry: None, "start at -1"),
    "offsets that end too early": (element(OFFSETS, -1, -1), lambda entry: None, "end at"),
    "offsets that overflow": (element(OFFSETS, -1, 2**31 - 10_000), lambda entry: None, "end at|decrease"),
    "a bit more": (one_more_bit, lambda entry: None, "counts|bits set"),
    "another nnz": (lambda stored: None, module(nnz=5), "nnz says 5"),
    "bits outside": (lambda stored: None, module(shape=[66, 100]), "outside"),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_disagree(case: str, model: Path) -> None:
    tensors, config, message = PARTS[case]
    change(model, tensors, config)
    checkpoint = CompressedCheckpoint(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(NAME)
    assert str(model / "model.safetensors") in str(caught.value)
    assert NAME in str(caught.value)
    assert "download or compress the model again" in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        decompress_checkpoint(model, model.parent / "dense")
    assert not (model.parent / "dense").exists()


@pytest.mark.parametrize("name", [VALUES, BITMAP])
def test_checksum_sees_what_nothing_else_does(name: str, model: Path) -> None:
    def swap(stored: Stored) -> None:  # two values; or the first two words of the bitmap, in one GroupTile
        first, second = stored[name][0].clone(), stored[name][1].clone()
        assert first != second
        stored[name][0], stored[name][1] = second, first

    change(model, swap, keep_checksum=True)
    with pytest.raises(CheckpointError, match="does not match the checksum"):
        CompressedCheckpoint(model).load(NAME)


def test_checksum_is_optional(model: Path) -> None:
    change(model)
    assert all(entry.crc32 is None for entry in CompressedCheckpoint(model).compression.modules.values())
    assert len(dict(CompressedCheckpoint(model).load_all())) == len(LINEARS)


def test_checksum_is_left_out_after_a_cast() -> None:
    weight = encode(torch.randn(64, 64).half())
    cast = TcaBmeTensor(weight.values.float(), weight.bitmap, weight.offsets, weight.shape, weight.nnz)
    entry = ModuleEntry.of(weight)
    entry.check(cast)
    other = TcaBmeTensor(weight.values + 1, weight.bitmap, weight.offsets, weight.shape, weight.nnz)
    with pytest.raises(FormatError, match="checksum"):
        entry.check(other)
    with pytest.raises(FormatError, match=r"config\.json says"):
        ModuleEntry.of(encode(torch.randn(64, 128).half())).check(weight)


def test_checksum_is_as_specified() -> None:
    """CRC-32 of `float16:1:1`, one padded GroupTile's values, 64 words, two offsets."""
    weight = encode(torch.ones(1, 1).half())
    values = b"\x00\x3c" + bytes(14)
    data = b"float16:1:1" + values + b"\x01" + bytes(511) + bytes(4) + b"\x01\0\0\0"
    assert ModuleEntry.of(weight).to_dict()["crc32"] == f"{zlib.crc32(data):08x}"


def test_format_version_of_the_future(model: Path) -> None:
    change(model, config=lambda entry: entry.update(format_version=2))
    with pytest.raises(CheckpointError, match=f"{model}.*version 2 is newer.*pip install --upgrade spinfer"):
        CompressedCheckpoint(model)


CONFIGS: dict[str, Callable[[Config], object]] = {
    "another method": lambda entry: entry.update(quant_method="gptq"),
    "another format": lambda entry: entry.update(format="csr"),
    "no version": lambda entry: entry.pop("format_version"),
    "version as text": lambda entry: entry.update(format_version="1"),
    "modules as a list": lambda entry: entry.update(modules=[]),
    "dense as a list": lambda entry: entry.update(dense=[]),
    "a reason that is no text": lambda entry: entry.update(dense={"x": 3}),
    "entry as a list": lambda entry: entry["modules"].update({NAME: []}),
    "no shape": lambda entry: entry["modules"][NAME].pop("shape"),
    "three sizes": module(shape=[1, 2, 3]),
    "an empty side": module(shape=[0, 100]),
    "size as text": module(shape=["70", 100]),
    "true as a number": module(nnz=True),
    "negative nnz": module(nnz=-1),
    "more nonzeros than values": module(nnz=10**9),
    "values_len that is no multiple of 8": module(values_len=2801),
    "values_len beyond the matrix": module(values_len=10**12),
    "unknown dtype": module(dtype="int4"),
    "dtype of another type": module(dtype=[]),
    "checksum as a number": module(crc32=3),
    "checksum too short": module(crc32="abc"),
    "unknown name": module(crc33="00000000"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_malformed_config(case: str, model: Path) -> None:
    change(model, config=CONFIGS[case])
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        CompressedCheckpoint(model)
    assert str(model) in str(caught.value)


def test_not_compressed(model: Path) -> None:
    dense = model.parent / "model-dense"
    with pytest.raises(CheckpointError, match=f"is not compressed; compress it with: spinfer compress {dense}"):
        inspect_checkpoint(dense)
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        inspect_checkpoint(model)


def test_config_round_trip(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())["quantization_config"]
    assert CompressionConfig.from_dict(content).to_dict() == content


def test_inspect_reads_no_tensor(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(safetensors_source, "_read_into", refuse)
    assert len(inspect_checkpoint(model).layers) == len(LINEARS)


def test_load_all_gives_the_weights(tmp_path: Path) -> None:
    state = write_compressed(tmp_path / "model", max_shard_nbytes=20_000)
    loaded = dict(CompressedCheckpoint(tmp_path / "model").load_all())
    assert loaded.keys() == LINEARS.keys()
    assert all(bits(weight.decode()) == bits(state[f"{name}.weight"]) for name, weight in loaded.items())


def test_a_huge_shape_takes_no_memory(model: Path) -> None:
    change(model, config=module(shape=[2**40, 2**40]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        CompressedCheckpoint(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
