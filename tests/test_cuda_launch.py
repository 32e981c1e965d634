"""What `spinfer.linear` gives the CUDA kernels, read by a stand-in for the driver that computes as they do; no GPU."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spinfer
from spinfer.kernels.cuda import backend, matmul, passes, runtime, tune
from spinfer.kernels.cuda import dense as dense_kernel
from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.configs import DeviceTraits
from spinfer.kernels.cuda.layout import LAYOUT, MAX_CHUNK_NBYTES, ChunkGrid
from spinfer.kernels.cuda.select import Decoded
from spinfer.kernels.packed import PackedWeight, WeightSpec

HOPPER = DeviceTraits((9, 0), 132, 232448)
ADA = DeviceTraits((8, 9), 128, 101376)
MATMUL_ARGS, STAGED_ARGS, MAP = struct.Struct("8Q14i"), struct.Struct("7Q12i"), struct.Struct("5Q88x")
M, K = 300, 136
BATCHES = [(1,), (1, 1), (1, 7), (2, 1), (3, 20), (2, 2, 9), (1, 40), (1, 100), (2, 300), (1, 1100)]


def array(address: int, count: int) -> np.ndarray[Any, Any]:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


class Driver:
    """Runs "kernels" on fp32 tensors, of which there are no real ones: types do not matter to how they are launched.

    Attributes:
        weights: dense ones, by the address of their chunks.
        launched: the files whose kernels ran.
    """

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}
        self.launched: list[str] = []

    def load(self, source: KernelSource, name: str) -> Driver.Kernel:
        return Driver.Kernel(self, source)

    class Kernel:
        def __init__(self, driver: Driver, source: KernelSource) -> None:
            self._driver, self._file = driver, source.file
            defines = dict(source.defines)
            tokens = defines.get("SPINFER_TILE_TOKENS", defines.get("SPINFER_TOKENS", 0))
            each = tokens // defines.get("SPINFER_TWINS", 1)
            self._copied_tokens = each if each <= 256 else each // 2

        def launch(self, index: int | None, shape: runtime.LaunchShape, stream: int, arguments: bytes) -> None:
            self._driver.launched.append(self._file)
            tensor_map = None
            if self._file != "matmul_portable.cu":
                tensor_map, arguments = MAP.unpack(arguments[: MAP.size]), arguments[MAP.size :]
            if self._file == "matmul_staged_sm90.cu":
                weight, _, _, _, _, y, bias, y_stride, tokens, rows, *_ = STAGED_ARGS.unpack(arguments)
                x, x_stride, out_features, in_features = None, None, rows, K
                assert y_stride == M
            else:
                weight, _, x, y, bias, _, _, _, x_stride, tokens, _, out_features, in_features, *_ = MATMUL_ARGS.unpack(
                    arguments
                )
            if tensor_map is not None:
                assert x is None or tensor_map[:4] == (x, tokens, in_features, x_stride)
                x, tokens_of_map, in_features, x_stride, box = tensor_map
                assert tokens_of_map == tokens
                assert box == self._copied_tokens, "the kernel waits for as many bytes as a box has"
            assert x is not None
            assert x % 16 == x_stride * 2 % 16 == 0
            rows_of_x = array(x, (tokens - 1) * x_stride + in_features)
            taken = np.lib.stride_tricks.as_strided(rows_of_x, (tokens, in_features), (4 * x_stride, 4))
            product = taken.astype(np.float64) @ self._driver.weights[weight].double().numpy().T
            if bias:
                product += array(bias, out_features)
            array(y, tokens * out_features)[:] = product.astype(np.float32).ravel()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """In place of CUDA; a tensor map is what it describes."""
    driver, cpu = Driver(), torch.device("cpu")
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch, "device", lambda *_: cpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tune, "tuned", lambda kind: {})
    monkeypatch.setattr(matmul, "load", driver.load)
    monkeypatch.setattr(matmul._tensor_maps, "get", MAP.pack)
    monkeypatch.setattr(matmul, "_workspaces", runtime.Workspaces())
    backend._run.cache_clear()
    yield driver
    backend._run.cache_clear()


@pytest.fixture(params=[HOPPER, ADA], ids=["9.0", "8.9"])
def weight(request: pytest.FixtureRequest, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> PackedWeight:
    monkeypatch.setattr(runtime, "device_traits", lambda index: request.param)
    dense = torch.randn(M, K)
    chunks, offsets = torch.zeros(1 << 16, dtype=torch.uint8), torch.zeros(64, dtype=torch.int32)
    driver.weights[chunks.data_ptr()] = dense
    monkeypatch.setattr(passes, "RowDecoder", decoder(dense))
    return PackedWeight(WeightSpec(LAYOUT, (M, K), round(0.4 * M * K), torch.float32), (chunks, offsets))


def decoder(dense: Tensor) -> Callable[..., Callable[..., None]]:
    def of(grid: ChunkGrid, first: int, count: int, index: int | None) -> Callable[..., None]:
        rows = dense[first * grid.chunk_rows : (first + count) * grid.chunk_rows]

        def decode(chunks: Tensor, offsets: Tensor, out: Tensor) -> None:
            assert out.shape == rows.shape
            assert out.stride(0) % 8 == 0
            out.copy_(rows)

        return decode

    return of


def check(x: Tensor, weight: PackedWeight, driver: Driver, bias: Tensor | None) -> None:
    (dense,) = driver.weights.values()
    y = spinfer.linear(x, weight, bias)
    assert y.is_contiguous()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, bias), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("batch", BATCHES)
def test_any_leading_sides(batch: tuple[int, ...], weight: PackedWeight, driver: Driver) -> None:
    for bias in (None, torch.randn(M)):
        check(torch.randn(*batch, K), weight, driver, bias)
        check(torch.randn(*batch, K), weight, driver, bias)


@pytest.mark.parametrize("batch", BATCHES)
def test_any_strides(batch: tuple[int, ...], weight: PackedWeight, driver: Driver) -> None:
    wide = torch.randn(*batch, 3 * K)
    check(wide[..., K : 2 * K], weight, driver, None)
    check(wide[..., 3 : K + 3], weight, driver, None)  # not aligned
    check(torch.randn(K, *batch).movedim(0, -1), weight, driver, None)
    check(torch.randn(*batch, 5, K)[..., -1, :], weight, driver, None)
    check(torch.randn(5, *batch, K).movedim(0, -2)[..., -1:, :], weight, driver, None)


def test_every_path_is_taken(weight: PackedWeight, driver: Driver) -> None:
    for batch in BATCHES:
        spinfer.linear(torch.randn(*batch, K), weight)
    hopper = {"matmul_sm90.cu", "matmul_wide_sm90.cu", "matmul_staged_sm90.cu"}
    assert set(driver.launched) in (hopper, {"matmul_portable.cu"})


def test_decoded_a_few_row_blocks_at_a_time(
    weight: PackedWeight, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "choose", lambda *_: Decoded(row_blocks=2))
    for bias in (None, torch.randn(M)):
        check(torch.randn(3, 20, K), weight, driver, bias)
        check(torch.randn(60, 2 * K)[:, :K], weight, driver, bias)
    assert driver.launched == []


def test_what_decoding_some_row_blocks_gets(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Field by field, as MatmulArgs has them; x, y, bias, partials, arrivals, ranges and boxes are not read."""
    launches = []

    class Kernel:
        def launch(self, index: int, shape: runtime.LaunchShape, stream: int, arguments: bytes) -> None:
            launches.append((shape, MAP.unpack(arguments[: MAP.size]), MATMUL_ARGS.unpack(arguments[MAP.size :])))

    monkeypatch.setattr(dense_kernel, "load", lambda source, name: Kernel())
    monkeypatch.setattr(dense_kernel, "device_traits", lambda index: HOPPER)
    monkeypatch.setattr(dense_kernel._tensor_maps, "get", MAP.pack)
    grid = ChunkGrid.of(9000, 1030)
    chunks, offsets = (
        torch.zeros(grid.chunks * 1000, dtype=torch.uint8),
        torch.zeros(grid.chunks + 1, dtype=torch.int32),
    )
    out = torch.zeros(3 * grid.chunk_rows, 1032)[:, :1030]
    dense_kernel.RowDecoder(grid, 2, 3, 0)(chunks, offsets, out)
    ((shape, tensor_map, arguments),) = launches
    assert tensor_map == (out.data_ptr(), len(out), 1030, 1032, 32)
    weight, first_offset, *unread, _, _, mean_chunk, rows, columns, chunks_k, row_blocks, strips = arguments[:16]
    each, extra, ring_at, ring, in_flight, _ = arguments[16:]
    assert (weight, first_offset) == (chunks.data_ptr(), offsets[2 * grid.chunks_k :].data_ptr())
    assert unread == [0] * 6
    assert (mean_chunk, rows, columns) == (16 * 1000, 9000, 1030)
    assert (chunks_k, row_blocks, strips) == (grid.chunks_k, 3, 3)
    assert each * shape.ctas + extra == 3 * grid.chunks_k
    assert ring_at == 1024 + 16 * 2 * 4096, "two tiles for each of 16 warps lie before the ring"
    assert ring_at + ring <= shape.shared == HOPPER.shared_nbytes
    assert ring >= MAX_CHUNK_NBYTES
    assert in_flight == 2
    assert shape.threads == 17 * 32


def test_nothing_is_launched_for_nothing(weight: PackedWeight, driver: Driver) -> None:
    assert spinfer.linear(torch.randn(2, 0, K), weight).shape == (2, 0, M)
    assert driver.launched == []
