"""TCA-BME against FORMAT.md: golden bytes, round trips of every bit pattern, sizes, and refusals."""

from __future__ import annotations

import dataclasses
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import spinfer
from spinfer.errors import FormatError
from spinfer.format import Geometry, TcaBmeTensor, codec, encode, tensor
from spinfer.format.layout import estimate_nbytes, max_values_len
from support import DTYPES, bits, expected_decode, sparse


def literal(weight: Tensor) -> tuple[bytes, bytes, bytes, int]:
    """FORMAT.md word for word, one weight at a time in plain Python: bytes of values, bitmap, offsets, and nnz."""
    rows, cols = weight.shape
    pattern = bits(weight).tolist()
    size = weight.element_size()
    sign = 1 << (8 * size - 1)
    cols_of_groups = (cols + 63) // 64
    groups = (rows + 63) // 64 * cols_of_groups
    words = [0] * (64 * groups)
    stored: list[list[tuple[int, int, int]]] = [[] for _ in range(groups)]
    for m in range(rows):
        for k in range(cols):
            g = (m // 64) * cols_of_groups + k // 64
            w = 64 * g + 16 * (m % 64 // 16) + 4 * (k % 64 // 16) + 2 * (k % 16 // 8) + (m % 16 // 8)
            b = 8 * (m % 8) + k % 8
            value = pattern[m][k] % (2 * sign)
            if value not in (0, sign):
                words[w] |= 1 << b
                stored[g].append((w, b, value))
    values, offsets = b"", [0]
    for group in stored:
        numbers = [value for _, _, value in sorted(group)]
        numbers += [0] * (-len(numbers) % 8)
        values += b"".join(number.to_bytes(size, "little") for number in numbers)
        offsets.append(offsets[-1] + len(numbers) // 8)
    bitmap = b"".join(word.to_bytes(8, "little") for word in words)
    return values, bitmap, struct.pack(f"<{len(offsets)}i", *offsets), sum(map(len, stored))


def raw(part: Tensor) -> bytes:
    return part.contiguous().view(torch.uint8).numpy().tobytes()


def arrays(encoded: TcaBmeTensor) -> tuple[bytes, bytes, bytes, int]:
    return raw(encoded.values), raw(encoded.bitmap), raw(encoded.offsets), encoded.nnz


GOLDEN_ENTRIES = {  # (row, column): fp16 bits; the worked example of FORMAT.md
    (0, 0): 0x3C00,
    (1, 2): 0x3800,
    (9, 0): 0xBC00,
    (0, 9): 0x4000,
    (0, 20): 0x8000,
    (17, 63): 0x0001,
    (2, 69): 0x7E01,
    (17, 64): 0x4200,
}
GOLDEN_VALUES = "003c003800bc00400100000000000000 017e0042000000000000000000000000"
GOLDEN_WORDS = {
    0: "0104000000000000",
    1: "0001000000000000",
    2: "0200000000000000",
    30: "0080000000000000",
    64: "0000200000000000",
    80: "0001000000000000",
}
GOLDEN_OFFSETS = "00000000 01000000 02000000"


def golden_weight() -> Tensor:
    pattern = torch.zeros(18, 70, dtype=torch.int32)
    for at, value in GOLDEN_ENTRIES.items():
        pattern[at] = value
    return pattern.to(torch.int16).view(torch.float16)


class TestGoldenBytes:
    def test_worked_example(self) -> None:
        encoded = encode(golden_weight())
        bitmap = b"".join(bytes.fromhex(GOLDEN_WORDS.get(word, "00" * 8)) for word in range(128))
        golden = (bytes.fromhex(GOLDEN_VALUES), bitmap, bytes.fromhex(GOLDEN_OFFSETS), 7)
        assert arrays(encoded) == golden
        assert literal(golden_weight()) == golden
        assert encoded.nbytes == 1068

    def test_bytes_decode_to_the_weight(self) -> None:
        values = torch.frombuffer(bytearray.fromhex(GOLDEN_VALUES), dtype=torch.float16)
        bitmap = torch.zeros(128 * 8, dtype=torch.uint8).view(-1, 8)
        for word, text in GOLDEN_WORDS.items():
            bitmap[word] = torch.tensor(list(bytes.fromhex(text)))
        offsets = torch.frombuffer(bytearray.fromhex(GOLDEN_OFFSETS), dtype=torch.int32)
        parts = TcaBmeTensor(values, bitmap.view(torch.int64).view(-1), offsets, (18, 70), 7).validate()
        assert torch.equal(bits(parts.decode()), expected_decode(golden_weight()))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 1), (8, 8), (64, 64), (65, 64), (64, 65), (130, 200), (200, 7)])
    def test_agrees_with_the_literal_loop(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        weight = sparse(*shape, dtype, density=0.4)
        assert arrays(encode(weight)) == literal(weight)


def check_round_trip(weight: Tensor) -> TcaBmeTensor:
    before = bits(weight).clone()
    encoded = encode(weight)
    decoded = encoded.validate().decode()
    expected = expected_decode(weight)
    assert decoded.dtype == weight.dtype
    assert decoded.shape == weight.shape
    assert decoded.is_contiguous()
    assert torch.equal(bits(decoded), expected)
    assert encoded.nnz == int((expected != 0).sum())
    assert torch.equal(bits(weight), before), "encode changed its input"
    return encoded


class TestRoundTrip:
    @settings(max_examples=150, deadline=None)
    @given(
        rows=st.integers(1, 200),
        cols=st.integers(1, 200),
        density=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 1 << 32),
    )
    def test_any_shape_and_density(self, rows: int, cols: int, density: float, dtype: torch.dtype, seed: int) -> None:
        check_round_trip(sparse(rows, cols, dtype, density, seed))

    @settings(max_examples=60, deadline=None)
    @given(data=st.binary(min_size=4, max_size=4 * 900), cols=st.integers(1, 90), dtype=st.sampled_from(DTYPES))
    def test_any_bytes(self, data: bytes, cols: int, dtype: torch.dtype) -> None:
        flat = torch.frombuffer(bytearray(data[: len(data) // 4 * 4]), dtype=dtype)
        cols = min(cols, flat.numel())
        check_round_trip(flat[: flat.numel() // cols * cols].view(-1, cols))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("flush", [False, True])
    def test_every_16_bit_pattern(self, dtype: torch.dtype, flush: bool) -> None:
        weight = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
        supported = torch.set_flush_denormal(flush)
        try:
            encoded = check_round_trip(weight)
        finally:
            torch.set_flush_denormal(False)
        if flush and not supported:
            pytest.skip("this CPU cannot flush denormals; the round trip itself passed")
        assert encoded.nnz == 65534

    @pytest.mark.parametrize("flush", [False, True])
    def test_special_fp32_patterns(self, flush: bool) -> None:
        edges = [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
        pattern = torch.tensor([edges, [edge | 0x80000000 for edge in edges]], dtype=torch.int64).to(torch.int32)
        torch.set_flush_denormal(flush)
        try:
            assert check_round_trip(pattern.view(torch.float32)).nnz == 18
        finally:
            torch.set_flush_denormal(False)

    def test_negative_zeros_are_not_stored(self) -> None:
        encoded = check_round_trip(-torch.zeros(70, 70, dtype=torch.float16))
        assert encoded.nnz == 0
        assert encoded.values.numel() == 0

    @pytest.mark.parametrize(
        "view",
        [
            lambda w: w.t(),
            lambda w: w[::2, ::3],
            lambda w: w[5:, 7:],
            lambda w: w[:1].expand(90, -1),
            lambda w: w.view(13, 10, 150).permute(1, 0, 2)[3],
            lambda w: torch.nn.Parameter(w),
        ],
        ids=["transposed", "strided", "offset", "expanded", "permuted", "parameter"],
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_strides(self, view, dtype: torch.dtype) -> None:
        weight = view(sparse(130, 150, dtype))
        encoded = check_round_trip(weight)
        assert arrays(encoded) == arrays(encode(weight.detach().clone(memory_format=torch.contiguous_format)))
        assert not encoded.values.requires_grad

    @pytest.mark.parametrize("shape", [(1100, 1000), (65, 17000), (17000, 63), (1, 1 << 20)])
    def test_chunk_boundaries(self, shape: tuple[int, int]) -> None:
        geometry = Geometry(*shape)
        assert geometry.group_tiles * 4096 > codec._CHUNK_WEIGHTS
        check_round_trip(sparse(*shape, density=0.3))

    def test_chunking_changes_no_byte(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = sparse(333, 200)
        whole = arrays(encode(weight))
        for chunk in (1, 3 * 4 * 4096):
            monkeypatch.setattr(codec, "_CHUNK_WEIGHTS", chunk)
            assert arrays(encode(weight)) == whole
            assert torch.equal(bits(encode(weight).decode()), expected_decode(weight))

    def test_empty_and_full_rows_and_tiles(self) -> None:
        weight = sparse(192, 200, density=0.5)
        weight[3], weight[:, 150] = 0, 0
        weight[100], weight[:, 7] = 1, 2
        weight[64:128, 64:128] = 0  # an empty GroupTile between others
        weight[:64, :64] = 3  # a full one
        weight[128:136, 128:136] = 0  # an empty BitmapTile
        encoded = check_round_trip(weight)
        steps = encoded.offsets.diff()
        assert steps[0] == 512
        assert steps[1 * 4 + 1] == 0
        assert encoded.bitmap[0] == -1
        assert arrays(encoded) == literal(weight)

    @pytest.mark.parametrize("nnz", range(18))
    def test_padding_of_a_group_tile(self, nnz: int) -> None:
        weight = torch.zeros(64, 64, dtype=torch.float16)
        weight.view(-1)[torch.randperm(4096)[:nnz]] = torch.inf
        encoded = check_round_trip(weight)
        assert encoded.values.numel() == -(-nnz // 8) * 8
        assert not bits(encoded.values[nnz:]).any()

    def test_stored_zeros_are_accepted(self) -> None:
        encoded = encode(torch.full((3, 3), 1e-30))
        narrow = dataclasses.replace(encoded, values=encoded.values.half()).validate()
        assert narrow.nnz == 9
        assert not narrow.decode().any()

    def test_under_a_meta_default_device(self) -> None:
        codec._unpack_table.cache_clear()
        weight = sparse(70, 70)
        with torch.device("meta"):
            decoded = encode(weight).decode()
        assert torch.equal(bits(decoded), expected_decode(weight))

    def test_decode_rows_refuses_too_few_values(self) -> None:
        encoded = encode(sparse(128, 64, density=1.0))
        with pytest.raises(FormatError, match=r"4096 values, but 4088"):
            codec.decode_rows(encoded.values[8 + 4096 :], encoded.bitmap, encoded.geometry, group_row=1, group_rows=1)


class TestSize:
    @pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7])
    def test_bits_a_weight(self, sparsity: float) -> None:
        weight = torch.ones(4096, 4096, dtype=torch.float16)
        weight.view(-1)[torch.randperm(weight.numel())[: round(sparsity * weight.numel())]] = 0
        encoded = encode(weight)
        bits_a_weight = 8 * encoded.nbytes / weight.numel()
        assert bits_a_weight == pytest.approx(16 * (1 - sparsity) + 1, rel=0.005)
        estimate = estimate_nbytes(encoded.geometry, encoded.nnz, encoded.dtype)
        assert estimate == pytest.approx(encoded.nbytes, rel=2e-4)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 1), (100, 300), (1000, 64)])
    def test_formula(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        encoded = encode(sparse(*shape, dtype))
        groups = -(-shape[0] // 64) * -(-shape[1] // 64)
        assert encoded.nbytes == sum(len(part) for part in arrays(encoded)[:3])
        assert encoded.bitmap.numel() == 64 * groups
        assert encoded.offsets.numel() == groups + 1
        bound = 512 * groups + 4 * (groups + 1) + dtype.itemsize * (encoded.nnz + 7 * groups)
        assert encoded.nbytes <= bound
        estimate = estimate_nbytes(encoded.geometry, encoded.nnz, dtype)
        assert abs(estimate - encoded.nbytes) <= dtype.itemsize * 4 * groups

    def test_most_values(self) -> None:
        encoded = encode(torch.ones(65, 130, dtype=torch.float16))
        assert max_values_len(encoded.geometry) == 6 * 4096
        full = encode(torch.ones(128, 192, dtype=torch.float16))
        assert full.values.numel() == max_values_len(full.geometry)


class TestTensor:
    def test_attributes(self) -> None:
        weight = sparse(70, 130, torch.bfloat16)
        encoded = encode(weight)
        assert encoded.shape == (70, 130)
        assert encoded.dtype == torch.bfloat16
        assert encoded.device == torch.device("cpu")
        assert encoded.nnz == int((weight != 0).sum())
        assert encoded.density == encoded.nnz / 9100
        assert encoded.nbytes == encoded.values.nbytes + encoded.bitmap.nbytes + encoded.offsets.nbytes

    def test_frozen(self) -> None:
        encoded = encode(sparse(8, 8))
        for field in dataclasses.fields(encoded):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(encoded, field.name, None)

    def test_to(self) -> None:
        encoded = encode(sparse(70, 70))
        assert encoded.to("cpu") is encoded
        meta = encoded.to("meta")
        assert (meta.device.type, meta.shape, meta.nnz, meta.nbytes) == ("meta", (70, 70), encoded.nnz, encoded.nbytes)

    def test_validate_returns_itself(self) -> None:
        encoded = encode(sparse(70, 70))
        assert encoded.validate() is encoded

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (torch.zeros(4), "2-D"),
            (torch.zeros(2, 3, 4), "2-D"),
            (torch.tensor(1.0), "2-D"),
            (torch.zeros(0, 4), "at least 1"),
            (torch.zeros(4, 0), "at least 1"),
            (torch.zeros(4, 4, dtype=torch.float64), "float64 cannot be encoded; convert"),
            (torch.zeros(4, 4, dtype=torch.int8), "int8 cannot be encoded"),
            (torch.zeros(4, 4, dtype=torch.complex64), "complex64 cannot be encoded"),
            (torch.zeros(4, 4, device="meta"), "meta"),
            (torch.eye(4).to_sparse(), "to_dense"),
        ],
    )
    def test_encode_refuses(self, weight: Tensor, message: str) -> None:
        with pytest.raises(FormatError, match=message):
            encode(weight)

    def test_encode_refuses_more_values_than_an_offset_reaches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def small(dtype: torch.dtype) -> object:
            return type("Info", (), {"max": 511})()

        monkeypatch.setattr(codec.torch, "iinfo", small)
        encode(torch.ones(64, 63))
        with pytest.raises(FormatError, match="split it"):
            encode(torch.ones(64, 64))

    def test_errors_are_spinfer_errors_and_value_errors(self) -> None:
        assert issubclass(FormatError, spinfer.SpinferError)
        assert issubclass(FormatError, ValueError)


def replace(encoded: TcaBmeTensor, **parts: object) -> TcaBmeTensor:
    return dataclasses.replace(encoded, **parts)


def with_offset(encoded: TcaBmeTensor, index: int, value: int) -> Tensor:
    offsets = encoded.offsets.clone()
    offsets[index] = value
    return offsets


class TestConstructionRefuses:
    """What types and lengths alone give away; construction checks it."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda e: {"values": e.values.double()}, "float64"),
            (lambda e: {"values": e.values.view(torch.int16)}, "int16"),
            (lambda e: {"bitmap": e.bitmap.int()}, "bitmap is torch.int32"),
            (lambda e: {"bitmap": e.bitmap.view(torch.uint64)}, "bitmap is torch.uint64"),
            (lambda e: {"offsets": e.offsets.long()}, "offsets is torch.int64"),
            (lambda e: {"values": e.values[:-1]}, "multiple of 8"),
            (lambda e: {"values": e.values.view(-1, 8)}, "1-D"),
            (lambda e: {"bitmap": e.bitmap[:-1]}, r"bitmap has shape \(383,\)"),
            (lambda e: {"bitmap": torch.cat([e.bitmap, e.bitmap[:1]])}, r"bitmap has shape \(385,\)"),
            (lambda e: {"bitmap": e.bitmap.view(-1, 64)}, "bitmap has shape"),
            (lambda e: {"offsets": e.offsets[:-1]}, "offsets has shape"),
            (lambda e: {"offsets": torch.cat([e.offsets, e.offsets[-1:]])}, "offsets has shape"),
            (lambda e: {"shape": (65, 64)}, "bitmap has shape"),
            (lambda e: {"shape": (0, 64)}, "at least 1"),
            (lambda e: {"shape": (-100, 64)}, "at least 1"),
            (lambda e: {"shape": (100,)}, "out_features"),
            (lambda e: {"shape": (100, 64, 1)}, "out_features"),
            (lambda e: {"shape": (1 << 40, 1 << 40)}, "bitmap has shape"),
            (lambda e: {"nnz": -1}, "nnz -1"),
            (lambda e: {"nnz": e.values.numel() + 1}, "do not fit"),
            (lambda e: {"values": e.values.new_zeros(6 * 4096 + 8)}, "do not fit"),
            (lambda e: {"values": e.values.new_empty(2 * e.values.numel())[::2]}, "contiguous"),
            (lambda e: {"bitmap": torch.stack([e.bitmap, e.bitmap], 1)[:, 0]}, "contiguous"),
            (lambda e: {"bitmap": e.bitmap.to("meta")}, "different devices"),
            (lambda e: {"offsets": e.offsets.to("meta")}, "different devices"),
        ],
    )
    def test_refuses(self, change, message: str) -> None:
        encoded = encode(sparse(374, 60))
        with pytest.raises(FormatError, match=message):
            replace(encoded, **change(encoded))


class TestValidateRefuses:
    """What only the data gives away."""

    def check(self, encoded: TcaBmeTensor, message: str, **change: object) -> None:
        encoded.validate()
        with pytest.raises(FormatError, match=message):
            replace(encoded, **change).validate()

    @pytest.mark.parametrize(
        ("index", "delta", "message"),
        [
            (0, 1, "start at 1"),
            (0, -1, "start at -1"),
            (3, 1 << 20, "decrease at GroupTile 3"),
            (3, -(1 << 20), "decrease at GroupTile 2"),
            (3, 1, "GroupTile 2 has .* room for"),
            (3, -1, "GroupTile 2 has .* room for"),
            (-1, 1, "offsets end at"),
            (-1, -1, "offsets end at"),
            (-1, 1 << 28, "offsets end at"),
        ],
    )
    def test_offsets(self, index: int, delta: int, message: str) -> None:
        encoded = encode(sparse(128, 190, density=0.5))
        value = int(encoded.offsets[index]) + delta
        self.check(encoded, message, offsets=with_offset(encoded, index, value))

    @pytest.mark.parametrize("value", [-(1 << 31), (1 << 31) - 1])
    @pytest.mark.parametrize("index", range(7))
    def test_extreme_offsets_do_not_overflow(self, index: int, value: int) -> None:
        encoded = encode(sparse(128, 190))
        self.check(encoded, "offsets", offsets=with_offset(encoded, index, value))

    def test_values_too_long_or_too_short(self) -> None:
        encoded = encode(sparse(128, 190))
        self.check(encoded, "offsets end", values=torch.cat([encoded.values, encoded.values[:8]]))
        self.check(encoded, "offsets end", values=encoded.values[:-8])

    def test_nnz(self) -> None:
        encoded = encode(sparse(128, 190))
        self.check(encoded, "nnz says", nnz=encoded.nnz + 1)
        self.check(encoded, "nnz says", nnz=encoded.nnz - 1)

    def test_a_bit_more_or_less(self) -> None:
        weight = torch.zeros(64, 64, dtype=torch.float16)
        weight.view(-1)[torch.randperm(4096)[:20]] = 1
        encoded = encode(weight)
        more, less = encoded.bitmap.clone(), encoded.bitmap.clone()
        more[(more == 0).nonzero()[0]] = 1 << 5
        less[less.nonzero()[0]] = 0
        self.check(encoded, "nnz says", bitmap=more)  # 21 bits still fit 24 values
        self.check(encoded, "nnz says|room for", bitmap=less)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_padding(self, dtype: torch.dtype) -> None:
        weight = torch.zeros(64, 5 * 64, dtype=dtype)  # GroupTiles with 0, 1, 8, 13 and 4096 values
        for tile, count in ((1, 1), (2, 8), (3, 13)):
            weight[:, 64 * tile : 64 * tile + 1].view(-1)[:count] = 1
        weight[:, 4 * 64 :] = 1
        encoded = encode(weight)
        padding = (*range(1, 8), *range(8 + 8 + 13, 8 + 8 + 16))
        zero = replace(encoded, values=encoded.values.clone())
        zero.values[[i for i in range(encoded.values.numel()) if i not in padding]] = -0.0
        zero.validate()  # what is stored may be anything
        for at in padding:
            for value in (1.0, -0.0, torch.nan):
                values = encoded.values.clone()
                values[at] = value
                self.check(encoded, "padded", values=values)

    @settings(max_examples=200, deadline=None)
    @given(rows=st.integers(1, 140), cols=st.integers(1, 140), data=st.data())
    def test_a_bit_outside(self, rows: int, cols: int, data: st.DataObject) -> None:
        """One bit outside, one less inside the same GroupTile: every count agrees, the place does not."""
        padded_rows, padded_cols = -(-rows // 64) * 64, -(-cols // 64) * 64
        m = data.draw(st.integers(0, padded_rows - 1))
        k = data.draw(st.integers(0, padded_cols - 1))
        weight = torch.zeros(padded_rows, padded_cols)
        weight[m, k] = 1
        parts = encode(weight)
        cut = replace(parts, shape=(rows, cols))
        if m < rows and k < cols:
            cut.validate()
        else:
            with pytest.raises(FormatError, match="outside"):
                cut.validate()

    @settings(max_examples=300, deadline=None)
    @given(
        part=st.sampled_from(["bitmap", "offsets"]),
        at=st.integers(0, 1 << 16),
        flip=st.integers(0, 63),
        seed=st.integers(0, 5),
    )
    def test_any_flipped_bit_is_found(self, part: str, at: int, flip: int, seed: int) -> None:
        encoded = encode(sparse(100, 140, density=0.3, seed=seed))
        changed = getattr(encoded, part).clone()
        octets = changed.view(torch.uint8)
        at %= octets.numel()
        octets[at] ^= 1 << (flip % 8)
        with pytest.raises(FormatError):
            replace(encoded, **{part: changed}).validate()


def test_public_names() -> None:
    assert spinfer.encode is encode is tensor.encode
    assert spinfer.TcaBmeTensor is TcaBmeTensor
