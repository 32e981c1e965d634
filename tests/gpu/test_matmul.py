"""The CUDA kernels against float64, on fresh random data, into NaN-filled outputs."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from products import DTYPES, check, random_weight
from torch import Tensor

from spinfer import SparseLinear, encode, linear, pack
from spinfer.kernels import PackedWeight, unpack
from spinfer.kernels.cuda import matmul
from spinfer.kernels.cuda.compile import KernelSource
from spinfer.kernels.cuda.configs import (
    MAX_NARROW,
    PANEL_ROWS,
    STAGED_TILES,
    DeviceTraits,
    hopper_config,
    portable_config,
    staged_config,
    wide_config,
)
from spinfer.kernels.cuda.dense import RowDecoder
from spinfer.kernels.cuda.layout import LAYOUT, ChunkGrid, ranges_in
from spinfer.kernels.cuda.matmul import Config, FusedPass, StagedMatmul
from spinfer.kernels.cuda.passes import run_of
from spinfer.kernels.cuda.runtime import device_traits
from spinfer.kernels.cuda.select import Plan, alternatives
from spinfer.kernels.packed import tokens_and_stride

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def packed(w: Tensor) -> PackedWeight:
    result = pack(encode(w))
    assert result.layout == LAYOUT
    return result


def fused(x: Tensor, weight: PackedWeight, config: Config, bias: Tensor | None = None) -> Tensor:
    y = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=x.device)
    grid = ChunkGrid.of(*weight.shape)
    FusedPass(grid, config, x.dtype, x.device)(x, *tokens_and_stride(x), weight.parts, bias, y)
    return y


def plans(weight: PackedWeight, tokens: int, sm_count: int = 0) -> dict[str, Plan]:
    """All ways to multiply with it, by name, on this GPU or on one with so many multiprocessors."""
    traits = device_traits(0)
    if sm_count:
        traits = dataclasses.replace(traits, sm_count=sm_count)
    return alternatives(ChunkGrid.of(*weight.shape), weight.nnz, tokens, traits, ranges_in(weight.parts))


def planned(x: Tensor, weight: PackedWeight, plan: Plan, bias: Tensor | None = None) -> Tensor:
    y = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=x.device)
    grid = ChunkGrid.of(*weight.shape)
    run_of(plan, grid, x.dtype, x.device)(x, *tokens_and_stride(x), weight.parts, bias, y)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [*range(1, 50), 63, 64, 65, *range(79, 322, 16), 129, 257, 640, 1000, 8192])
def test_tokens(tokens: int, dtype: torch.dtype) -> None:
    w = random_weight(520, 1000, 0.4, dtype)
    x = torch.randn(tokens, 1000, device="cuda", dtype=dtype)
    bias = torch.randn(520, device="cuda", dtype=dtype)
    check(linear(x, packed(w), bias), x, w, bias)


SHAPES = [(1, 1), (1, 300), (300, 1), (7, 131), (64, 64), (257, 300), (1009, 2003), (16640, 520), (3, 8209)]


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, int], density: float) -> None:
    w = random_weight(*shape, density)
    weight = packed(w)
    for tokens in (1, 16, 17, 33, 65, 128):
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
        check(linear(x, weight), x, w)


@pytest.mark.parametrize("density", [0.7, 1.0])
@pytest.mark.parametrize("tokens", [33, 48, 64])
def test_dense_weights_with_many_tokens(tokens: int, density: float) -> None:
    """The weight and x compete for shared memory; four warps along k wait for their boxes of x."""
    w = random_weight(4096, 5000, density)
    x = torch.randn(tokens, 5000, device="cuda", dtype=torch.float16)
    check(linear(x, packed(w)), x, w)


@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 128, 200, 500])
def test_uneven_density(tokens: int) -> None:
    """Chunks of very different sizes follow each other through the ring: dense, empty, and in between."""
    density = torch.rand(4, 64, device="cuda").pow(3).repeat_interleave(256, 0).repeat_interleave(64, 1)
    density[:64, :64] = 1
    density[:, 1024:1536] = 1
    density[300:400] = 0
    w = torch.where(torch.rand_like(density) < density, torch.randn_like(density), 0.0).half()
    x = torch.randn(tokens, w.shape[1], device="cuda", dtype=torch.float16)
    check(linear(x, packed(w)), x, w)


def compile_with(patch: pytest.MonkeyPatch, name: str, value: int) -> None:
    """Have kernels that are made from now on compiled with one more define."""

    def defining(source: Callable[..., KernelSource]) -> Callable[..., KernelSource]:
        def with_define(*arguments: Any) -> KernelSource:
            kernel = source(*arguments)
            return dataclasses.replace(kernel, defines=(*kernel.defines, (name, value)))

        return with_define

    patch.setattr(matmul, "source", defining(matmul.source))
    patch.setattr(matmul, "staged_source", defining(matmul.staged_source))


def portable_configs(grid: ChunkGrid, tokens: int) -> list[Config]:
    """As on a GPU with little shared memory, one CTA an SM, and as on this one."""
    traits = device_traits(0)
    sizes = (101376, traits.shared_nbytes)
    return [portable_config(grid, tokens, DeviceTraits(traits.capability, traits.sm_count, size)) for size in sizes]


@pytest.mark.parametrize("shape", [(1009, 2003), (16640, 520)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_portable_kernel(shape: tuple[int, int], dtype: torch.dtype) -> None:
    grid = ChunkGrid.of(*shape)
    for density in (0.0, 0.4, 1.0):
        w = random_weight(*shape, density, dtype)
        weight = packed(w)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype)
        for tokens in (1, 5, 8, 16, 17, 32):
            x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
            for config in portable_configs(grid, tokens):
                check(fused(x, weight, config, bias), x, w, bias)


@pytest.mark.parametrize("tokens", [1, 16, 32])
@pytest.mark.parametrize("rows", [4096, 8192])
def test_portable_kernel_with_uneven_density(rows: int, tokens: int) -> None:
    """Blocks of very different sizes follow each other through a warp's ring, and many CTAs share row blocks."""
    density = torch.rand(rows // 32, 66, device="cuda").pow(3).repeat_interleave(32, 0).repeat_interleave(64, 1)
    density[torch.rand(rows // 32, device="cuda").repeat_interleave(32) < 0.2] = 1
    w = torch.where(torch.rand_like(density) < density, torch.randn_like(density), 0.0).half()
    weight = packed(w)
    x = torch.randn(tokens, w.shape[1], device="cuda", dtype=torch.float16)
    for config in portable_configs(ChunkGrid.of(*w.shape), tokens):
        check(fused(x, weight, config), x, w)


@pytest.mark.parametrize("tokens", [1, 16, 32])
@pytest.mark.parametrize("shape", [(1009, 2003), (16640, 520)])
def test_portable_kernel_counts_without_b1_mmas(
    shape: tuple[int, int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on compute capability 10.0 and 12.0: the same bits."""
    (config, *_) = portable_configs(ChunkGrid.of(*shape), tokens)
    for density in (0.0, 0.4, 1.0):
        weight = packed(random_weight(*shape, density))
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
        expected = fused(x, weight, config)
        with monkeypatch.context() as patch:
            compile_with(patch, "SPINFER_B1_MMA", 0)
            assert torch.equal(fused(x, weight, config), expected)


@pytest.mark.parametrize("columns", [1, 7, 63, 64, 65, 1001])
@pytest.mark.parametrize("rows", [100, 4300])
def test_portable_kernel_takes_only_its_columns_of_x(rows: int, columns: int) -> None:
    w = random_weight(rows, columns, 0.5)
    weight = packed(w)
    for tokens in range(1, 33):
        x = torch.full((tokens, 1024), torch.nan, device="cuda", dtype=torch.float16)[:, 8 : 8 + columns]
        x.normal_()
        for config in portable_configs(ChunkGrid.of(rows, columns), tokens):
            check(fused(x, weight, config), x, w)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_other_dtype_of_x(x_dtype: torch.dtype) -> None:
    w = random_weight(300, 520, 0.4)
    x = torch.randn(5, 520, device="cuda", dtype=x_dtype)
    y = linear(x, packed(w))
    assert y.dtype == x_dtype
    expected = x @ w.to(x_dtype).t()
    assert torch.allclose(y, expected, rtol=1e-2, atol=1e-2)


def test_strided_and_misaligned_x() -> None:
    w = random_weight(300, 1001, 0.4)
    weight = packed(w)
    storage = torch.randn(9, 2300, device="cuda", dtype=torch.float16)
    for x in (storage[:, 3:1004], storage[::2, 8:1009], storage.t()[:1001].t()):
        check(linear(x, weight), x, w)


def test_nonfinite_values_propagate_as_in_dense() -> None:
    w = random_weight(64, 256, 0.4)
    x = torch.randn(4, 256, device="cuda", dtype=torch.float16)
    x[1, 7], x[2, 9] = torch.inf, torch.nan
    w[5, 11] = torch.inf
    expected = x @ w.t()
    y = linear(x, packed(w))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 128, 250, 512, 700, 1030])
def test_deterministic(tokens: int) -> None:
    w = random_weight(4096, 4096, 0.4)
    weight = packed(w)
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.float16)
    first = linear(x, weight)
    assert all(torch.equal(linear(x, weight), first) for _ in range(20))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_repacking_is_bit_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for density in (0.0, 0.4, 1.0):
        w = random_weight(*shape, density, dtype)
        w.view(-1)[::97] = torch.nan
        storage = encode(w)
        weight = packed(w)
        back = unpack(weight).validate()
        assert torch.equal(back.bitmap, storage.bitmap)
        assert torch.equal(back.offsets, storage.offsets)
        assert torch.equal(back.values.view(torch.int16), storage.values.view(torch.int16))
        grid = ChunkGrid.of(*shape)
        padded = -(-shape[1] // 8) * 8
        dense = torch.full((shape[0] + 1, padded + 8), torch.nan, dtype=dtype, device="cuda")
        RowDecoder(grid, 0, grid.row_blocks, 0)(*weight.parts[:2], dense[:-1, : shape[1]])
        assert torch.equal(dense[:-1, : shape[1]].view(torch.int16), w.view(torch.int16))
        assert dense[:, padded:].isnan().all()
        assert dense[-1].isnan().all()


@pytest.mark.parametrize("tokens", [4, 700])
def test_cuda_graph(tokens: int) -> None:
    w = random_weight(4096, 1024, 0.4)
    weight = packed(w)
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.float16)
    linear(x, weight)
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x, weight)
            y = linear(x, weight) + y
        graphs.append((graph, y))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        eager = linear(x, weight)
        for graph, y in graphs:
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, eager + eager)


def test_torch_compile() -> None:
    w = random_weight(512, 256, 0.4)
    weight = packed(w)
    x = torch.randn(4, 256, device="cuda", dtype=torch.float16)
    compiled = torch.compile(lambda x: linear(x, weight).relu(), fullgraph=True)
    assert torch.equal(compiled(x), linear(x, weight).relu())


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_torch_compile_with_cuda_graphs(tokens: int) -> None:
    """Warmed up, captured, replayed: what the kernels keep from call to call must not lie in the graphs' memory."""
    torch._dynamo.reset()
    weights = (random_weight(*shape, 0.4) for shape in ((9000, 1024), (1024, 9000)))
    layers = torch.nn.Sequential(*(SparseLinear.from_weight(encode(weight)).pack_() for weight in weights))
    compiled = torch.compile(layers, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(tokens, 1024, device="cuda", dtype=torch.float16)
            assert torch.equal(compiled(x), layers(x))


def test_streams_and_threads() -> None:
    """10,000 launches on four streams from two threads, shapes at random: no hang, no difference."""
    cases = []
    for m, k in [(4096, 4096), (1000, 777), (300, 5000), (17000, 256)]:
        weight = packed(random_weight(m, k, 0.4))
        for tokens in (1, 16, 40, 700):
            x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
            cases.append((x, weight, linear(x, weight)))
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        streams = [torch.cuda.Stream() for _ in range(2)]
        differences = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
        torch.cuda.synchronize()
        for _ in range(5000):
            i, s = (int(torch.randint(n, (), generator=generator)) for n in (len(cases), 2))
            x, weight, expected = cases[i]
            with torch.cuda.stream(streams[s]):
                differences[s] += (linear(x, weight) != expected).any()
        torch.cuda.synchronize()
        wrong.extend(int(d) for d in differences)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0, 0, 0]


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="the Hopper kernels"
)


@hopper
@pytest.mark.parametrize("sm_count", [2, 6, 22, 400])
@pytest.mark.parametrize("tokens", [1, 13, 32, 40, 64, 128, 142, 190, 256, 310, 700])
def test_any_number_of_ctas(tokens: int, sm_count: int) -> None:
    """CTAs with many strips each, and three times as many as can run at once: none waits for one that does not run."""
    w = random_weight(9000, 2000, 0.4)
    weight = packed(w)
    x = torch.randn(tokens, 2000, device="cuda", dtype=torch.float16)
    grid = ChunkGrid.of(9000, 2000)
    traits = DeviceTraits((9, 0), sm_count, device_traits(0).shared_nbytes)
    configs: list[Config] = []
    if tokens <= MAX_NARROW:
        configs += [hopper_config(grid, weight.nnz, tokens, traits, split=split) for split in (1, 2)]
    if tokens > 32:
        configs += [wide_config(grid, weight.nnz, tokens, traits, split=1, twins=twins) for twins in (1, 2)]
    for config in configs:
        check(fused(x, weight, config), x, w)


@hopper
@pytest.mark.parametrize("shape", [(30000, 500), (24000, 700), (11000, 1300), (4200, 2500)])
@pytest.mark.parametrize("tokens", [1, 16, 40, 48, 64, 128, 176, 320])
def test_short_segments(tokens: int, shape: tuple[int, int]) -> None:
    """Of one to five chunks: x of a range's last one is copied before its first segment has ended."""
    w = random_weight(*shape, 0.4)
    weight = packed(w)
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
    make = hopper_config if tokens <= MAX_NARROW else wide_config
    config = make(ChunkGrid.of(*shape), int(0.4 * w.numel()), tokens, device_traits(0))
    y = fused(x, weight, config)
    check(y, x, w)
    for _ in range(50):
        assert torch.equal(fused(x, weight, config), y)


@hopper
@pytest.mark.parametrize("shape", [(64, 512), (200, 513), (4096, 1025), (8200, 700), (17000, 300)])
@pytest.mark.parametrize("tokens", [1, 9, 20, 32, 33, 40, 47, 64, 80, 90, 112, 128, 140, 171, 203, 250, 270, 320])
def test_pairs_of_ctas(shape: tuple[int, int], tokens: int) -> None:
    weight_of = {density: random_weight(*shape, density) for density in (0.0, 0.4, 1.0)}
    for w in weight_of.values():
        weight = packed(w)
        grid = ChunkGrid.of(*shape)
        if grid.chunks_k < 2:
            pytest.skip("one chunk along k")
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
        configs: list[Config] = []
        if tokens <= MAX_NARROW or (tokens <= 48 and grid.blocks_m == 2):
            configs.append(hopper_config(grid, weight.nnz, tokens, device_traits(0), split=2))
        if tokens > 32:
            wide = wide_config(grid, weight.nnz, tokens, device_traits(0), split=2, twins=1)
            if wide.passes > 1:
                pytest.skip("pairs take one pass")
            configs.append(wide)
        for config in configs:
            first = fused(x, weight, config)
            check(first, x, w)
            assert all(torch.equal(fused(x, weight, config), first) for _ in range(5))


def uneven_weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Dense and empty stretches, and random zeros between them."""
    w = random_weight(rows, columns, 0.4, dtype)
    w[rows // 4 : rows // 2, : columns // 2].normal_()
    w[rows // 2 : 3 * rows // 4] = 0
    return w


@hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9000, 2000), (4096, 4100), (1100, 3000)])
@pytest.mark.parametrize("tokens", [1, 9, 20, 32, 40, 47, 64, 75, 90, 128, 173, 250, 285, 300, 400])
def test_uneven_weights(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    """Ranges by cost: some CTAs have many chunks, some one, and a strip has any number of partial sums."""
    w = uneven_weight(*shape, dtype)
    weight = packed(w)
    assert len(weight.parts) == 3
    x, bias = (torch.randn(n, device="cuda", dtype=dtype) for n in ((tokens, shape[1]), shape[0]))
    first = linear(x, weight, bias)
    check(first, x, w, bias)
    assert all(torch.equal(linear(x, weight, bias), first) for _ in range(5))
    assert torch.equal(unpack(weight).values, encode(w).values)


@hopper
@pytest.mark.parametrize("tokens", [1, 16, 40, 64, 80, 128])
def test_ranges_of_one_chunk(tokens: int) -> None:
    """A row block with as many partial sums as it has chunks, beside one that has none."""
    w = random_weight(1024, 8192, 0.4)
    weight = packed(w)
    grid = ChunkGrid.of(*w.shape)
    starts = [0, *range(5, 5 + 2 * grid.chunks_k), grid.chunks - 1, grid.chunks]
    ranges = torch.tensor(starts, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    traits = DeviceTraits((9, 0), len(starts) - 1, device_traits(0).shared_nbytes)
    config_of = hopper_config if tokens <= MAX_NARROW else wide_config
    config = config_of(grid, weight.nnz, tokens, traits, by_cost=True)
    assert config.ctas == len(starts) - 1
    uneven = PackedWeight(weight.spec, (*weight.parts[:2], ranges))
    x = torch.randn(tokens, 8192, device="cuda", dtype=torch.float16)
    first = fused(x, uneven, config)
    check(first, x, w)
    assert all(torch.equal(fused(x, uneven, config), first) for _ in range(20))


@pytest.mark.parametrize("shape", [(64, 512), (200, 513), (4096, 1025), (8200, 700)])
@pytest.mark.parametrize("tokens", [1, 24, 40, 48, *range(64, 321, 16), 600, 1024, 1500])
def test_every_alternative(shape: tuple[int, int], tokens: int) -> None:
    """What may be chosen after measuring, `choose` or not."""
    for w in (random_weight(*shape, 0.4), uneven_weight(*shape, torch.float16)):
        weight = packed(w)
        x, bias = (torch.randn(n, device="cuda", dtype=torch.float16) for n in ((tokens, shape[1]), shape[0]))
        for plan in plans(weight, tokens).values():
            check(planned(x, weight, plan, bias), x, w, bias)


@hopper
@pytest.mark.parametrize("shape", [(4300, 600), (2100, 2048), (9000, 2000)])
@pytest.mark.parametrize("tokens", [5, 29, 40, 61, 125, 173, 253, 700])
def test_warps_held_up_at_random(tokens: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing depends on how fast a warp is: the same bits when some of them lag."""
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
    for w in (random_weight(*shape, 0.4), uneven_weight(*shape, torch.float16)):
        weight = packed(w)
        for sm_count in (8, 22, 0):
            for name, plan in plans(weight, tokens, sm_count).items():
                if name == "decoded":
                    continue
                expected = planned(x, weight, plan)
                check(expected, x, w)
                with monkeypatch.context() as patch:
                    compile_with(patch, "SPINFER_DELAYS", 1)
                    assert all(torch.equal(planned(x, weight, plan), expected) for _ in range(10))


@pytest.mark.parametrize("shape", [(1000, 1024), (9000, 520)])
def test_some_row_blocks_are_decoded(shape: tuple[int, int]) -> None:
    w = random_weight(*shape, 0.4)
    weight, grid = packed(w), ChunkGrid.of(*shape)
    for first, count in ((0, 1), (1, 2), (grid.row_blocks - 3, 3)):
        rows = w[first * grid.chunk_rows : (first + count) * grid.chunk_rows]
        out = torch.full_like(rows, torch.nan)
        RowDecoder(grid, first, count, 0)(*weight.parts[:2], out)
        assert torch.equal(out, rows)


@pytest.mark.parametrize("shape", [(2280, 5943), (504, 4772), (1000, 4551)])
@pytest.mark.parametrize("tokens", [22, 65, 207, 768])
def test_decoded_with_any_number_of_columns(tokens: int, shape: tuple[int, int]) -> None:
    """With K no multiple of 8 cuBLAS would add partial sums in bf16."""
    w = random_weight(*shape, 0.2, torch.bfloat16)
    weight = packed(w)
    x, bias = (torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in ((tokens, shape[1]), shape[0]))
    check(planned(x, weight, plans(weight, tokens)["decoded"], bias), x, w, bias)


@hopper
@pytest.mark.parametrize("shape", [(64, 512), (200, 513), (4096, 1025), (4100, 700), (8200, 700)])
@pytest.mark.parametrize("tokens", [33, 64, 80, 128, 129, 160, 171, 203, 220, 240, 256, 272, 288, 305, 600])
def test_twins(shape: tuple[int, int], tokens: int) -> None:
    """Two CTAs share the copies of x; with an odd number of row blocks the last twin's rows are not there."""
    for density in (0.0, 0.4, 1.0):
        w = random_weight(*shape, density)
        weight = packed(w)
        x, bias = (torch.randn(n, device="cuda", dtype=torch.float16) for n in ((tokens, shape[1]), shape[0]))
        config = wide_config(ChunkGrid.of(*shape), weight.nnz, tokens, device_traits(0), split=1, twins=2)
        first = fused(x, weight, config, bias)
        check(first, x, w, bias)
        assert all(torch.equal(fused(x, weight, config, bias), first) for _ in range(5))


def staged(
    x: Tensor, weight: PackedWeight, sm_count: int, launches: int = 1, bias: Tensor | None = None, tile: int = 256
) -> Tensor:
    y = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=x.device)
    grid = ChunkGrid.of(*weight.shape)
    traits = DeviceTraits((9, 0), sm_count, device_traits(0).shared_nbytes)
    panel = PANEL_ROWS // grid.chunk_rows
    step = -(-grid.row_blocks // panel // launches) * panel or panel
    configs = tuple(
        staged_config(grid, first, min(step, grid.row_blocks - first), x.shape[0], traits, tile=tile)
        for first in range(0, grid.row_blocks, step)
    )
    StagedMatmul(grid, configs, x.dtype, x.device)(x, *tokens_and_stride(x), weight.parts, bias, y)
    return y


@hopper
@pytest.mark.parametrize("density", [0.0, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (4100, 4104), (2000, 640)])
def test_staged_shapes(shape: tuple[int, int], density: float) -> None:
    w = random_weight(*shape, density)
    weight = packed(w)
    bias = torch.randn(shape[0], device="cuda", dtype=torch.float16)
    for tokens in (1, 127, 300):
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
        check(staged(x, weight, 132, bias=bias), x, w, bias)


@hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", STAGED_TILES)
def test_staged_tiles_of_any_width(tile: int, dtype: torch.dtype) -> None:
    """Several tiles a CTA: what one leaves in shared memory must not reach the next one's y."""
    for shape in ((3001, 520), (4300, 1032)):
        w = random_weight(*shape, 0.4, dtype)
        weight = packed(w)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype)
        for tokens in (tile, 5 * tile - 3):
            x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
            first = staged(x, weight, 20, bias=bias, tile=tile)
            check(first, x, w, bias)
            assert all(torch.equal(staged(x, weight, 20, bias=bias, tile=tile), first) for _ in range(5))


@hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sm_count", [1, 2, 7, 40, 132, 400])
@pytest.mark.parametrize("tokens", [100, 513, 2500])
def test_staged_with_any_number_of_ctas(tokens: int, sm_count: int, dtype: torch.dtype) -> None:
    """Shared tiles and whole ones, rounds of many tiles, and more CTAs than can run at once."""
    for shape in ((3001, 2000), (9000, 1032)):
        w = random_weight(*shape, 0.4, dtype)
        weight = packed(w)
        x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
        first = staged(x, weight, sm_count)
        check(first, x, w)
        assert torch.equal(staged(x, weight, sm_count), first)


@pytest.mark.parametrize("tokens", [8, 128, 1000])
def test_x_at_one_address_after_another(tokens: int) -> None:
    w = random_weight(5000, 1000, 0.4)
    weight = packed(w)
    for x in torch.randn(4, tokens, 1000, device="cuda", dtype=torch.float16):
        check(linear(x, weight), x, w)


@hopper
def test_staged_in_several_launches() -> None:
    w = random_weight(5000, 1000, 0.4)
    weight = packed(w)
    x, bias = (torch.randn(n, device="cuda", dtype=torch.float16) for n in ((700, 1000), 5000))
    check(staged(x, weight, 132, launches=3, bias=bias), x, w, bias)


def test_completes_while_another_kernel_holds_most_sms() -> None:
    """A kernel on another stream holds its SMs until ours are through, so ours must do with what is left."""
    x = torch.randn(16, 4096, device="cuda", dtype=torch.float16)
    w = random_weight(4096, 4096, 0.4)
    weight = packed(w)
    expected = {n: linear(x.repeat(n, 1), weight) for n in (1, 4, 40)}
    torch.cuda.synchronize()
    holder = torch.cuda.Stream()
    with torch.cuda.stream(holder):
        torch.cuda._sleep(2_000_000_000)  # about a second of one SM; its stream cannot go on
        busy = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
        for _ in range(50):
            busy = busy @ busy
    for n, y in expected.items():
        assert torch.equal(linear(x.repeat(n, 1), weight), y)
    torch.cuda.synchronize()
