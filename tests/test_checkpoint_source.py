"""Opening what is to be compressed: kinds of weights, and damage."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from checkpoint_models import same, tensors, write_compressed, write_dense, write_json
from spinfer.checkpoint.dense import open_dense
from spinfer.checkpoint.source import PIECE_NBYTES
from spinfer.errors import CheckpointError


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    _, source = open_dense(directory)
    for name, info in source.tensors.items():
        pieces = list(source.pieces(name))
        assert all(piece.numel() <= PIECE_NBYTES for piece in pieces)
        joined = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
        assert joined.numel() == info.nbytes
        assert torch.equal(joined, source.read(name).reshape(-1).view(torch.uint8))
    return {name: source.read(name) for name in source.tensors}


def write_bin(directory: Path, state: dict[str, object], files: int = 1, **config: object) -> None:
    directory.mkdir()
    write_json(directory / "config.json", config)
    if files == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(files):
        file = f"pytorch_model-{number}.bin"
        names = list(state)[number::files]
        torch.save({name: state[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(directory / "pytorch_model.bin.index.json", {"weight_map": weight_map})


@pytest.mark.parametrize("files", [1, 3])
def test_safetensors(files: int, tmp_path: Path) -> None:
    state = write_dense(tmp_path / "model", files=files)
    assert same(read_all(tmp_path / "model"), state)


@pytest.mark.parametrize("files", [1, 3])
def test_bin(files: int, tmp_path: Path) -> None:
    state = tensors() | {"strided": torch.randn(6, 4).t(), "empty": torch.zeros(0)}
    write_bin(tmp_path / "model", state, files)
    assert same(read_all(tmp_path / "model"), state)


def test_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    state = write_dense(tmp_path / "blobs", files=2)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert same(read_all(tmp_path / "snapshot"), state)


def test_bin_keeps_tied_weights_tied(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    state = {"embed.weight": shared, "other.weight": shared[:3], "lm_head.weight": shared}
    write_bin(tmp_path / "model", state)
    _, source = open_dense(tmp_path / "model")
    assert set(source.tensors) == {"embed.weight", "other.weight"}
    assert source.tied == {"lm_head.weight": "embed.weight"}


def test_bin_of_an_untied_model_keeps_every_name(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    write_bin(tmp_path / "model", {"embed.weight": shared, "lm_head.weight": shared}, tie_word_embeddings=False)
    assert set(read_all(tmp_path / "model")) == {"embed.weight", "lm_head.weight"}


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("false",)


def test_bin_runs_no_code(tmp_path: Path) -> None:
    write_bin(tmp_path / "model", {"w": Evil()})
    with pytest.raises(CheckpointError, match="holds code"):
        open_dense(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_dense(tmp_path / "model")


def test_bin_refuses_a_tensor_larger_than_its_file(tmp_path: Path) -> None:
    write_bin(tmp_path / "model", {"w": torch.zeros(1).expand(2**40)})
    with pytest.raises(CheckpointError, match=r"'w' of shape .* larger than its file"):
        open_dense(tmp_path / "model")


@pytest.mark.parametrize("state", [[1, 2], {"w": 3}, {3: torch.zeros(1)}, {"w": torch.zeros(3).to_sparse()}])
def test_bin_refuses_what_is_no_state_dict(state: object, tmp_path: Path) -> None:
    write_bin(tmp_path / "model", state)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_dense(tmp_path / "model")


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_bin_truncated(keep: int, tmp_path: Path) -> None:
    write_bin(tmp_path / "model", dict(tensors()))
    path = tmp_path / "model" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_dense(tmp_path / "model")


def test_not_a_model_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_dense(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_dense(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        open_dense(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_dense(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write_dense(tmp_path / "model", files=3)
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing, with \d+ tensors"):
        open_dense(tmp_path / "model")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_shard(keep: int, tmp_path: Path) -> None:
    write_dense(tmp_path / "model", files=3)
    path = tmp_path / "model" / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors.* (truncated|download)"):
        open_dense(tmp_path / "model")


INDEXES = {
    "absent tensor": ({"ghost": "model-00001-of-00002.safetensors"}, "'ghost' in model-00001.*does not hold it"),
    "another file": ({"model.norm.weight": "model-00002-of-00002.safetensors"}, "'model.norm.weight'"),
    "parent directory": ({"x": "../model-00001-of-00002.safetensors"}, "'x' .*not a plain file name"),
    "absolute path": ({"x": "/etc/passwd"}, "'x' .*not a plain file name"),
    "directory itself": ({"x": ".."}, "'x' .*not a plain file name"),
    "zero byte": ({"x": "model\0"}, "'x' .*not a plain file name"),
    "number": ({"x": 3}, "'x' .*not a plain file name"),
    "file that is a directory": ({"x": "sub"}, "sub is missing"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_bad_index(case: str, tmp_path: Path) -> None:
    changes, message = INDEXES[case]
    state = dict(sorted(tensors().items()))
    write_dense(tmp_path / "model", state, files=2)
    (tmp_path / "model" / "sub").mkdir()
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if case == "another file":
        assert index["weight_map"]["model.norm.weight"] != changes["model.norm.weight"]
    index["weight_map"] |= changes
    write_json(path, index)
    with pytest.raises(CheckpointError, match=message):
        open_dense(tmp_path / "model")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, [], 3])
def test_malformed_index(index: object, tmp_path: Path) -> None:
    write_dense(tmp_path / "model", files=2)
    write_json(tmp_path / "model" / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_dense(tmp_path / "model")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    write_dense(tmp_path / "model", files=2)
    path = tmp_path / "model" / "model-00001-of-00002.safetensors"
    path.write_bytes((tmp_path / "model" / "model-00002-of-00002.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"is in model-00001-of-00002\.safetensors as well"):
        open_dense(tmp_path / "model")


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {}}},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {}},
            "sparsity_config": {"format": "sparse-bitmask"},
        },
        "gptq",
    ],
)
def test_refuses_quantised_weights(entry: object, tmp_path: Path) -> None:
    write_dense(tmp_path / "model", quantization_config=entry)
    with pytest.raises(CheckpointError, match="quantization_config says that the weights are"):
        open_dense(tmp_path / "model")


def test_refuses_what_is_compressed_already(tmp_path: Path) -> None:
    write_compressed(tmp_path / "compressed")
    with pytest.raises(CheckpointError, match="compressed already; see it with: spinfer inspect"):
        open_dense(tmp_path / "compressed")
