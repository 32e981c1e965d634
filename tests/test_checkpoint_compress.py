"""Compress and decompress: what is encoded, what stays, and that nothing changes but the form."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint_models import DENSE, LINEARS, bits, load_directory, same, tensors, write_dense, write_json
from spinfer.checkpoint import CompressedCheckpoint, compress_checkpoint, decompress_checkpoint, inspect_checkpoint
from spinfer.checkpoint import compress as compress_module
from spinfer.checkpoint.header import TORCH_DTYPES, read_header
from spinfer.errors import CheckpointError

Q0, UP0, Q1, UP1 = LINEARS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("files", "max_shard_nbytes"), [(1, 10**9), (3, 20_000), (1, 1)])
def test_there_and_back(dtype: torch.dtype, files: int, max_shard_nbytes: int, tmp_path: Path) -> None:
    state = write_dense(tmp_path / "dense", tensors(dtype=dtype), files=files)
    report = compress_checkpoint(
        tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE, max_shard_nbytes=max_shard_nbytes
    )
    assert {layer.name for layer in report.checkpoint.layers} == LINEARS.keys()
    for name, weight in CompressedCheckpoint(tmp_path / "out").load_all():
        assert bits(weight.decode()) == bits(state[f"{name}.weight"])
    decompress_checkpoint(tmp_path / "out", tmp_path / "back", max_shard_nbytes=max_shard_nbytes)
    assert same(load_directory(tmp_path / "back"), state)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (tmp_path / "dense/config.json").read_text()
    )


def test_other_tensors_are_copied_with_their_negative_zeros(tmp_path: Path) -> None:
    state = tensors()
    state["model.norm.weight"] = torch.tensor([0.0, -0.0, 1.0])
    write_dense(tmp_path / "dense", state)
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE)
    copied = load_directory(tmp_path / "out")["model.norm.weight"]
    assert torch.equal(copied.view(torch.int32), state["model.norm.weight"].view(torch.int32))


def test_company_is_carried_over_and_comes_back(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    (tmp_path / "dense" / "training_args.bin").write_bytes(b"pickle")
    (tmp_path / "dense" / ".git").mkdir()
    (tmp_path / "dense" / ".git" / "HEAD").write_text("x")
    (tmp_path / "dense" / "additional_chat_templates").mkdir()
    (tmp_path / "dense" / "additional_chat_templates" / "tools.jinja").write_text("tools")
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE)
    decompress_checkpoint(tmp_path / "out", tmp_path / "back")

    def listing(directory: Path) -> set[str]:
        return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}

    company = {
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    }
    own = {"config.json", "model.safetensors", "README.md"}
    assert listing(tmp_path / "out") == company | own | {"README.original.md"}
    assert listing(tmp_path / "back") == company | own
    for name in (*company, "README.md"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import spinfer" in card
    assert "shape mismatch" in card
    assert "README.original.md" in card


def test_shards_obey_the_limit_and_keep_layers_whole(tmp_path: Path) -> None:
    state = write_dense(tmp_path / "dense")
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE, max_shard_nbytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    found: dict[str, str] = {}
    for path in files:
        infos = read_header(path)
        size = sum(info.nbytes for info in infos.values())
        assert size <= 20_000 or len(infos) <= 3
        found |= dict.fromkeys(infos, path.name)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        for info in infos.values():
            assert info.offset % TORCH_DTYPES[info.dtype].itemsize == 0
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_directory(tmp_path / "out").values())
    for name in LINEARS:
        assert len({found[f"{name}.{part}"] for part in ("weight", "weight_bitmap", "weight_offsets")}) == 1
    assert len(files) > 2
    assert state.keys() <= found.keys()


@pytest.mark.parametrize(
    ("include", "ignore", "compressed"),
    [
        ((), ("*.mlp.*",), {Q0, Q1}),
        (("*.0.*",), (), {Q0, UP0}),
        (("*.0.*",), ("*q_proj",), {UP0}),
        (("re:.*\\.[01]\\.attn\\..*",), (), {Q0, Q1}),
        ((Q0,), ("lm_head",), {Q0}),
    ],
)
def test_patterns(include: tuple[str, ...], ignore: tuple[str, ...], compressed: set[str], tmp_path: Path) -> None:
    state = write_dense(tmp_path / "dense")
    report = compress_checkpoint(
        tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE, include=include, ignore=ignore
    )
    assert {layer.name for layer in report.checkpoint.layers} == compressed
    dense = {layer.name: layer for layer in report.checkpoint.dense}
    assert dense.keys() == (LINEARS.keys() - compressed) | {"lm_head"}
    assert dense["lm_head"].reason == "output embedding"
    assert dense["lm_head"].shape is None
    for name in LINEARS.keys() - compressed:
        assert "pattern" in dense[name].reason
        assert dense[name].nbytes == state[f"{name}.weight"].nbytes


@pytest.mark.parametrize(
    ("pattern", "message"), [("*.nothing.*", "matches no Linear"), ("re:(", "not a regular expression")]
)
def test_bad_patterns(pattern: str, message: str, tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=message):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE, ignore=(pattern,))
    assert not (tmp_path / "out").exists()


def test_what_stays_dense_has_its_reason(tmp_path: Path) -> None:
    state = tensors()
    state[f"{Q0}.weight"] = torch.ones(70, 100, dtype=torch.bfloat16)
    state[f"{UP0}.weight"] = state[f"{UP0}.weight"].double()
    del state[f"{Q1}.weight"]
    write_dense(tmp_path / "dense", state)
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE)
    assert {layer.name: layer.reason for layer in report.checkpoint.dense} == {
        "lm_head": "output embedding",
        Q0: "would be larger: density 1.000",
        UP0: "values of F64 are not supported",
        Q1: "not in the checkpoint",
    }
    assert [layer.name for layer in report.checkpoint.layers] == [UP1]
    decompress_checkpoint(tmp_path / "out", tmp_path / "back")
    assert same(load_directory(tmp_path / "back"), state)


def test_nothing_becomes_smaller(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", tensors(density=1.0))
    with pytest.raises(CheckpointError, match=r"nothing becomes smaller: .*density 1\.000.*prune the model first"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_model_without_linears(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"no Linear to compress \(lm_head: output embedding\)"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears={}, dense=DENSE)


def test_config_and_weights_of_different_models(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"none of the model's 1 Linears is in the checkpoint .*'other\.fc'"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears={"other.fc": (3, 3)}, dense={})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .*q_proj.* asks for \[71, 100\]"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears={**LINEARS, Q0: (71, 100)}, dense={})


def test_names_without_the_base_model_prefix(tmp_path: Path) -> None:
    state = {name.removeprefix("model."): tensor for name, tensor in tensors().items()}
    write_dense(tmp_path / "dense", state)
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE)
    assert {layer.name for layer in report.checkpoint.layers} == {name.removeprefix("model.") for name in LINEARS}


def test_a_prefix_is_not_dropped_onto_another_linear(tmp_path: Path) -> None:
    state = {"fc.weight": tensors()[f"{Q0}.weight"], "norm.weight": torch.ones(3)}
    write_dense(tmp_path / "dense", state)
    shape = LINEARS[Q0]
    linears = {"fc": shape, "head.fc": shape}
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=linears, dense={})
    assert [layer.name for layer in report.checkpoint.layers] == ["fc"]
    assert [(layer.name, layer.reason) for layer in report.checkpoint.dense] == [("head.fc", "not in the checkpoint")]


def test_nan_and_infinity_are_kept_and_said(tmp_path: Path) -> None:
    state = tensors()
    state[f"{Q0}.weight"][0, :2] = torch.tensor([float("nan"), float("-inf")])
    state["model.norm.weight"][1] = float("inf")
    write_dense(tmp_path / "dense", state)
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE)
    assert report.nonfinite == {f"{Q0}.weight": 2, "model.norm.weight": 1}
    assert f"`{Q0}.weight`: 2" in (tmp_path / "out" / "README.md").read_text()
    decompress_checkpoint(tmp_path / "out", tmp_path / "back")
    assert same(load_directory(tmp_path / "back"), state)


def test_tied_names_of_a_bin_stay_out(tmp_path: Path) -> None:
    state = tensors()
    (tmp_path / "dense").mkdir()
    write_json(tmp_path / "dense" / "config.json", {})
    torch.save(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, tmp_path / "dense/pytorch_model.bin")
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE)
    assert report.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    decompress_checkpoint(tmp_path / "out", tmp_path / "back")
    assert same(load_directory(tmp_path / "back"), state)


def test_a_name_that_an_encoded_part_would_take(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", tensors() | {f"{Q0}.weight_bitmap": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="has the name of a part"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE)


def test_a_layer_counts_only_when_it_decodes_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dense(tmp_path / "dense")
    encode = compress_module.encode

    def wrong(weight: torch.Tensor) -> object:
        encoded = encode(weight)
        encoded.values[3] += 1
        return encoded

    monkeypatch.setattr(compress_module, "encode", wrong)
    with pytest.raises(CheckpointError, match="does not come back"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    seen: list[tuple[int, int]] = []
    compress_checkpoint(
        tmp_path / "dense",
        tmp_path / "out",
        linears=LINEARS,
        dense=DENSE,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0
    seen.clear()
    decompress_checkpoint(tmp_path / "out", tmp_path / "back", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0


def test_report_agrees_with_the_files(tmp_path: Path) -> None:
    state = write_dense(tmp_path / "dense")
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=LINEARS, dense=DENSE)
    checkpoint = inspect_checkpoint(tmp_path / "out")
    assert checkpoint == report.checkpoint
    stored = load_directory(tmp_path / "out")
    assert checkpoint.total_nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert checkpoint.total_dense_nbytes == sum(tensor.nbytes for tensor in state.values())
    assert checkpoint.nnz == sum(int(state[f"{name}.weight"].count_nonzero()) for name in LINEARS)
    by_name = {layer.name: layer for layer in checkpoint.layers}
    layer = by_name[Q0]
    nbytes = sum(stored[f"{Q0}.{part}"].nbytes for part in ("weight", "weight_bitmap", "weight_offsets"))
    assert (layer.shape, layer.nbytes) == ((70, 100), nbytes)
    assert layer.bits_per_weight == pytest.approx(8 * nbytes / 7000)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["name"] == checkpoint.layers[0].name


def test_layers_are_listed_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"layers.{i}.{part}" for i in (0, 2, 10, 11, 100) for part in ("a", "b")]
    write_dense(tmp_path / "dense", {f"{name}.weight": torch.eye(64) for name in reversed(names)})
    dense = dict.fromkeys(names[1::2], "not pruned")
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=dict.fromkeys(names[::2], (64, 64)), dense=dense)
    report = inspect_checkpoint(tmp_path / "out")
    assert [layer.name for layer in report.layers] == names[::2]
    assert [layer.name for layer in report.dense] == names[1::2]


def test_an_empty_tensor_before_a_layer_that_fills_a_shard(tmp_path: Path) -> None:
    """The two share a shard, whose header must have room for both."""
    weight = tensors(dtype=torch.float32)[f"{Q0}.weight"]
    state = {"a": torch.zeros(0), "fc.weight": weight}
    write_dense(tmp_path / "dense", state)
    linears = {"fc": LINEARS[Q0]}
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears=linears, dense={}, max_shard_nbytes=1)
    decompress_checkpoint(tmp_path / "out", tmp_path / "back", max_shard_nbytes=1)
    assert same(load_directory(tmp_path / "back"), state)


def test_a_model_of_one_empty_linear(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    write_json(tmp_path / "dense" / "config.json", {})
    save_file({"fc.weight": torch.zeros(64, 64)}, tmp_path / "dense" / "model.safetensors")
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", linears={"fc": (64, 64)}, dense={})
    decompress_checkpoint(tmp_path / "out", tmp_path / "back")
    assert torch.equal(load_directory(tmp_path / "back")["fc.weight"], torch.zeros(64, 64))
