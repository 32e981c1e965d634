"""The safetensors header: what is listed, and that damage is refused, by us whenever by the library."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spinfer.checkpoint.header import DTYPE_BITS, TORCH_DTYPES, read_header
from spinfer.checkpoint.json_object import MAX_JSON_NBYTES
from spinfer.errors import CheckpointError


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_lists_what_the_library_wrote(tmp_path: Path) -> None:
    state = {
        name: torch.zeros(3, 2).to(dtype) for name, dtype in TORCH_DTYPES.items() if name not in ("F8_E8M0", "BOOL")
    }
    state |= {"BOOL": torch.zeros(3, 2, dtype=torch.bool), "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0)}
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert infos.keys() == state.keys()
    for name, tensor in state.items():
        info = infos[name]
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert TORCH_DTYPES[info.dtype] == tensor.dtype
        expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[info.offset : info.offset + info.nbytes] == expected


def test_every_torch_dtype_has_its_width() -> None:
    assert all(dtype.itemsize * 8 == DTYPE_BITS[name] for name, dtype in TORCH_DTYPES.items())


BAD = {
    "empty file": (b"", 0, b"", "truncated inside its header"),
    "header longer than the file": ({}, 1000, b"", "truncated inside its header"),
    "length overflows": ({}, 2**64 - 1, b"", "truncated inside its header"),
    "not JSON": (b"{oops", None, b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', None, b"", "not valid JSON"),
    "not an object": (b"[]", None, b"", "must be a JSON object"),
    "deeply nested": (b'{"a":' * 100_000, None, b"", "not valid JSON"),
    "the same name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        None,
        b"12",
        "comes twice",
    ),
    "entry of another type": ({"a": 3}, None, b"", "'a'"),
    "entry without shape": ({"a": {"dtype": "U8", "data_offsets": [0, 0]}}, None, b"", "'a'"),
    "unknown dtype": ({"a": entry(0, 1, dtype="Q8")}, None, b"1", "unknown dtype"),
    "dtype of another type": ({"a": entry(0, 1, dtype=["U8"])}, None, b"1", "unknown dtype"),
    "negative size": ({"a": entry(0, 1, shape=[-1])}, None, b"1", "not a list of sizes"),
    "fractional size": ({"a": entry(0, 1, shape=[1.0])}, None, b"1", "not a list of sizes"),
    "true as a size": ({"a": entry(0, 1, shape=[True])}, None, b"1", "not a list of sizes"),
    "shape that overflows": ({"a": entry(0, 1, shape=[2**63] * 1000)}, None, b"1", "does not take"),
    "shape that does not fit": ({"a": entry(0, 1, shape=[2])}, None, b"1", "does not take"),
    "offsets beyond the file": ({"a": entry(0, 4)}, None, b"123", "lie outside"),
    "offsets that decrease": ({"a": entry(2, 1, shape=[1])}, None, b"12", "lie outside"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]}}, None, b"1", "not two"),
    "overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, None, b"123", "overlaps"),
    "gap": ({"a": entry(0, 1), "b": entry(2, 3)}, None, b"123", "gap"),
    "data that nothing names": ({"a": entry(0, 1)}, None, b"123", "describes 1 bytes"),
    "metadata of another type": ({"__metadata__": {"a": 1}}, None, b"", "__metadata__"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str, tmp_path: Path) -> None:
    header, length, data, message = BAD[case]
    path = raw(tmp_path / "x.safetensors", header, data, length)
    if case == "empty file":
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_refuses_a_header_over_the_limit_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_JSON_NBYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_JSON_NBYTES + 100)  # sparse: takes no disk
    with pytest.raises(CheckpointError, match="over the limit"):
        read_header(path)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_accepts_nothing_that_the_library_refuses(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    save_file({"a": torch.arange(6).view(2, 3), "bc": torch.zeros(5, dtype=torch.float16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.sampled_from([*b'0123456789[]{},:"ab \x00\xff', content[position] ^ 1]))
    path.write_bytes(content)
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    try:
        with safe_open(path, "pt") as file:
            theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            assert ours.keys() == theirs.keys()
            for name, info in ours.items():
                assert list(info.shape) == theirs[name].get_shape()
                assert info.dtype == theirs[name].get_dtype()
    except SafetensorError as error:
        pytest.fail(f"the library refuses what we accept: {error}")
