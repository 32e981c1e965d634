"""compressed-tensors' sparse-bitmask: golden files of two of its releases, and the way there and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_models import LINEARS, load_directory, same, write_compressed
from spinfer.checkpoint import compress_checkpoint, decompress_checkpoint
from spinfer.checkpoint.bitmask import BitmaskTensor
from spinfer.checkpoint.dense import open_dense
from spinfer.errors import CheckpointError

GOLDEN = Path(__file__).parent / "data" / "sparse_bitmask"
RELEASES = ("0.8.1", "0.12.2")


def golden(directory: Path, release: str) -> Path:
    directory.mkdir()
    shutil.copyfile(GOLDEN / f"compressed-tensors-{release}.safetensors", directory / "model.safetensors")
    shutil.copyfile(GOLDEN / f"compressed-tensors-{release}.config.json", directory / "config.json")
    return directory


@pytest.mark.parametrize("release", RELEASES)
def test_reads_what_compressed_tensors_wrote(release: str, tmp_path: Path) -> None:
    config, source = open_dense(golden(tmp_path / "model", release))
    dense = load_file(GOLDEN / "dense.safetensors")
    assert config == {}
    assert same({name: source.read(name) for name in source.tensors}, dense)
    assert all(info.shape == dense[name].shape for name, info in source.tensors.items())


def test_encodes_as_compressed_tensors_did() -> None:
    dense = load_file(GOLDEN / "dense.safetensors")
    stored = load_file(GOLDEN / "compressed-tensors-0.12.2.safetensors")
    for module in ("layers.0", "layers.1"):
        ours = BitmaskTensor.encode(dense[f"{module}.weight"] + 0)  # makes negative zeros positive
        for part in ("shape", "compressed", "bitmask", "row_offsets"):
            expected = stored[f"{module}.{part}"]
            found = getattr(ours, part)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), part


@pytest.mark.parametrize("max_shard_nbytes", [10**9, 10_000])
def test_there_and_back(max_shard_nbytes: int, tmp_path: Path) -> None:
    state = write_compressed(tmp_path / "compressed")
    decompress_checkpoint(
        tmp_path / "compressed", tmp_path / "bitmask", target="sparse-bitmask", max_shard_nbytes=max_shard_nbytes
    )
    entry = json.loads((tmp_path / "bitmask" / "config.json").read_text())["quantization_config"]
    assert entry["sparsity_config"]["format"] == "sparse-bitmask"
    stored = load_directory(tmp_path / "bitmask")
    assert {f"{module}.bitmask" for module in LINEARS} <= stored.keys()
    compress_checkpoint(tmp_path / "bitmask", tmp_path / "again", linears=LINEARS, dense={})
    assert "sparsity_config" not in (tmp_path / "again" / "config.json").read_text()
    decompress_checkpoint(tmp_path / "again", tmp_path / "dense")
    assert same(load_directory(tmp_path / "dense"), state)


def test_export_refuses_a_name_that_a_part_would_take(tmp_path: Path) -> None:
    write_compressed(tmp_path / "compressed")
    stored = load_file(tmp_path / "compressed" / "model.safetensors")
    name = f"{next(iter(LINEARS))}.shape"
    save_file({**stored, name: torch.zeros(2)}, tmp_path / "compressed" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}' has the name of a part"):
        decompress_checkpoint(tmp_path / "compressed", tmp_path / "bitmask", target="sparse-bitmask")
    assert not (tmp_path / "bitmask").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 17), (64, 64)])
def test_round_trip_in_memory(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = (torch.randn(shape).to(dtype).float() * (torch.rand(shape) < 0.5)).abs().to(dtype)
    assert same({"w": BitmaskTensor.encode(dense).decode()}, {"w": dense})
    assert same({"w": BitmaskTensor.encode(torch.zeros_like(dense)).decode()}, {"w": torch.zeros_like(dense)})


def damaged(directory: Path, **changes: torch.Tensor | None) -> Path:
    golden(directory, "0.12.2")
    stored = load_file(directory / "model.safetensors")
    for part, tensor in changes.items():
        if tensor is None:
            del stored[f"layers.0.{part}"]
        else:
            stored[f"layers.0.{part}"] = tensor
    save_file(stored, directory / "model.safetensors")
    return directory


STORED = load_file(GOLDEN / "compressed-tensors-0.12.2.safetensors")
BITMASK, OFFSETS = STORED["layers.0.bitmask"], STORED["layers.0.row_offsets"]
CHANGES = {
    "no shape": ({"shape": None}, "lacks the part"),
    "another shape": ({"shape": torch.tensor([12, 44])}, "does not fit"),
    "a huge shape": ({"shape": torch.tensor([2**62, 2**62])}, "does not fit"),
    "a negative shape": ({"shape": torch.tensor([-12, 20])}, "does not fit"),
    "columns that the bitmask does not leave empty": ({"shape": torch.tensor([12, 17])}, "outside"),
    "shape of another type": ({"shape": torch.tensor([12, 20], dtype=torch.int32)}, "not sparse-bitmask"),
    "a bit more": ({"bitmask": BITMASK | 1}, "disagree|counts"),
    "fewer rows": ({"bitmask": BITMASK[1:].clone()}, "does not fit"),
    "other offsets": ({"row_offsets": OFFSETS + 1}, "row_offsets disagree"),
    "fewer offsets": ({"row_offsets": OFFSETS[1:].clone()}, "does not fit"),
    "fewer values": ({"compressed": STORED["layers.0.compressed"][1:].clone()}, "nonzeros"),
    "dense as well": ({"weight": torch.zeros(12, 20)}, "both dense and"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_refuses_parts_that_disagree(case: str, tmp_path: Path) -> None:
    changes, message = CHANGES[case]
    directory = damaged(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_dense(directory)[1].read("layers.0.weight")
    assert "layers.0" in str(caught.value)
    assert "model.safetensors" in str(caught.value)
