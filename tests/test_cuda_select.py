"""The CUDA side that needs no GPU: how a matrix is cut, and which configuration a made-up device gets."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spinfer.kernels.cuda import dense, matmul, repack
from spinfer.kernels.cuda.configs import (
    PANEL_ROWS,
    STAGED_TILES,
    DeviceTraits,
    HopperConfig,
    PortableConfig,
    WideConfig,
    code_arch,
    range_count,
    staged_config,
)
from spinfer.kernels.cuda.layout import GATHER_NBYTES, MAX_CHUNK_NBYTES, ChunkGrid
from spinfer.kernels.cuda.select import (
    TUNED_TOKENS,
    Decoded,
    Dense,
    Fused,
    Plan,
    Staged,
    alternatives,
    choose,
    narrow_choice,
    staged_tiles,
    wide_choice,
)

H100 = DeviceTraits((9, 0), 132, 232448)
A100 = DeviceTraits((8, 0), 108, 166912)
RTX_4090 = DeviceTraits((8, 9), 128, 101376)
DEVICES = [H100, A100, RTX_4090, DeviceTraits((12, 0), 170, 101376), DeviceTraits((10, 0), 148, 232448)]

sides = st.integers(1, 40000)


def nnz_at_60_percent(shape: tuple[int, int]) -> int:
    return int(0.4 * shape[0] * shape[1])


@given(sides, sides)
def test_chunks_cover_the_matrix_once(m: int, k: int) -> None:
    grid = ChunkGrid.of(m, k)
    assert grid.blocks_m * grid.blocks_k == 16
    assert (grid.row_blocks - 1) * grid.chunk_rows < m <= grid.row_blocks * grid.chunk_rows
    assert (grid.chunks_k - 1) * grid.chunk_cols < k <= grid.chunks_k * grid.chunk_cols


@given(sides, sides, st.floats(0, 1), st.integers(1, 4096), st.sampled_from(DEVICES), st.booleans(), st.booleans())
@example(4096, 14336, 0.01, 40, H100, False, False)  # with four boxes of x a dense chunk would have no room
@example(4224, 139, 0.2, 342, DeviceTraits((9, 0), 1, 232448), False, False)  # one multiprocessor has no room for twins
def test_everything_fits_the_device(
    m: int, k: int, density: float, tokens: int, device: DeviceTraits, uneven: bool, dense: bool
) -> None:
    grid, nnz = ChunkGrid.of(m, k), int(density * m * k)
    ranges = range_count(grid, device) if uneven else 0
    every = alternatives(grid, nnz, tokens, device, ranges, dense)
    assert choose(grid, nnz, tokens, True, device, ranges, dense) in every.values()
    assert (every.pop("dense", None) is not None) == dense
    for plan in every.values():
        assert_fits(plan, grid, tokens, device)


@given(sides, sides, st.integers(1, 4096), st.sampled_from(DEVICES))
def test_what_was_measured_to_be_faster_is_chosen(m: int, k: int, tokens: int, device: DeviceTraits) -> None:
    grid, nnz = ChunkGrid.of(m, k), int(0.4 * m * k)
    chosen = choose(grid, nnz, tokens, True, device)
    stands_for = next((count for count in TUNED_TOKENS if count >= tokens), None)
    others = {count: "twins" for count in TUNED_TOKENS if count != stands_for}
    for name, plan in alternatives(grid, nnz, tokens, device).items():
        tuned = others if stands_for is None else others | {stands_for: name}
        assert choose(grid, nnz, tokens, True, device, tuned=tuned) == (chosen if stands_for is None else plan)
        assert isinstance(choose(grid, nnz, tokens, False, device, tuned=tuned), Decoded)
    for unknown in ({}, others, dict.fromkeys(TUNED_TOKENS, "another version's")):
        assert choose(grid, nnz, tokens, True, device, tuned=unknown) == chosen


def assert_fits(plan: Plan, grid: ChunkGrid, tokens: int, device: DeviceTraits) -> None:
    if isinstance(plan, Decoded):
        assert 1 <= plan.row_blocks <= grid.row_blocks
        return
    if isinstance(plan, Staged):
        assert device.capability == (9, 0)
        assert [launch.first_row_block for launch in plan.launches] == [
            sum(launch.row_blocks for launch in plan.launches[:i]) for i in range(len(plan.launches))
        ]
        assert sum(launch.row_blocks for launch in plan.launches) == grid.row_blocks
        return
    assert sum(min(plan.step, tokens - start) for start in range(0, tokens, plan.step)) == tokens
    assert len(plan.passes) == -(-tokens // plan.step)
    for i, config in enumerate(plan.passes):
        assert config.shared_nbytes <= device.shared_nbytes
        passes, twins = (config.passes, config.twins) if isinstance(config, WideConfig) else (1, 1)
        assert config.tokens * passes >= min(plan.step, tokens - i * plan.step)
        row_blocks = -(-grid.row_blocks // twins) * twins
        assert 1 <= config.ctas <= passes * row_blocks * grid.chunks_k
        assert config.ctas % twins == 0
        if isinstance(config, HopperConfig | WideConfig):
            assert device.capability == (9, 0)
            assert config.ring_nbytes >= MAX_CHUNK_NBYTES, "a dense chunk must fit, however sparse the rest"
            assert config.ring_at + config.ring_nbytes == config.shared_nbytes
            assert 1 <= config.in_flight <= 8
            assert config.split <= grid.chunks_k, "each CTA of a cluster has chunks"
        if isinstance(config, HopperConfig):
            assert config.ctas % config.split == 0
            assert config.boxes in (2, 4, 8), "the weight's slots tell when boxes are free, and which is whose"
            if config.split > 1:
                assert config.ctas // config.split <= grid.row_blocks, "each cluster has a row block"
        elif isinstance(config, WideConfig):
            assert grid.blocks_k <= 2 * config.boxes
            assert config.boxes <= 16
            assert config.split == 1 or config.twins == 1, "a cluster is of two"
            if config.split > 1:
                assert config.ctas == config.split * grid.row_blocks, "each pair has one segment"
                assert config.passes == 1
        else:
            assert isinstance(config, PortableConfig)
            assert device.capability != (9, 0)
            assert config.ring_at % 16 == config.ring_nbytes % 16 == 0, "cp.async copies units of 16 bytes"
            assert config.ring_nbytes >= 256 + 16 + 32 * 64 * 2, "a dense block must fit, and what is copied before it"
            assert config.ring_at + 8 * config.ring_nbytes + GATHER_NBYTES <= config.shared_nbytes
            if config.ctas > device.sm_count:
                assert 2 * (config.shared_nbytes + 1024) <= device.shared_nbytes + 1024, "two CTAs fit an SM"


@given(sides, sides, st.integers(1, 9000), st.integers(1, 200), st.sampled_from(STAGED_TILES))
def test_staged_tiles_are_each_computed_once(m: int, k: int, tokens: int, sm_count: int, tile: int) -> None:
    grid = ChunkGrid.of(m, k)
    config = staged_config(grid, 0, grid.row_blocks, tokens, DeviceTraits((9, 0), sm_count, 232448), tile=tile)
    assert (config.panels - 1) * PANEL_ROWS < grid.row_blocks * grid.chunk_rows <= config.panels * PANEL_ROWS
    assert (config.token_tiles - 1) * tile < tokens <= config.token_tiles * tile
    assert 1 <= config.token_group <= config.token_tiles
    rest = config.panels * config.token_tiles - config.whole
    assert config.whole >= 0
    assert 0 <= rest * config.shares <= config.ctas <= sm_count
    assert rest == 0 or config.shares > 1, "what is not whole is shared"
    assert 1 <= config.shares <= grid.chunks_k, "each share has a chunk"
    assert config.ctas == min(sm_count, config.whole) or config.whole == 0
    assert config.whole % config.ctas == 0 or rest == 0, "shares come after whole rounds"
    assert config.row_block_group % (PANEL_ROWS // grid.chunk_rows) == 0, "a panel is decoded side by side"


@pytest.mark.parametrize(
    ("tokens", "tiles"),
    [
        (1, [144]),
        (257, [144]),
        (513, [176, 144]),
        (768, [256, 192, 160, 144]),
        (1032, [208, 176, 160, 144]),
        (8192, [256, 240, 224, 208, 192, 176, 160, 144]),
    ],
)
def test_tokens_of_a_staged_tile(tokens: int, tiles: list[int]) -> None:
    assert staged_tiles(tokens) == tiles


@given(st.integers(1, 20000))
def test_groups_of_token_tiles_are_about_as_large(tokens: int) -> None:
    """A group of one tile or two would read the whole weight again for these."""
    for tile in STAGED_TILES:
        config = staged_config(ChunkGrid.of(4096, 4096), 0, 64, tokens, H100, tile=tile)
        groups = -(-config.token_tiles // config.token_group)
        assert config.token_group * tile <= 2560 + tile
        assert config.token_group - config.token_tiles // groups <= 1


@pytest.mark.parametrize(
    ("shape", "tokens", "kind"),
    [
        ((28672, 8192), 512, Fused),
        ((28672, 8192), 576, Fused),
        ((28672, 8192), 900, Fused),
        ((28672, 8192), 1024, Staged),
        ((8192, 8192), 512, Fused),
        ((8192, 8192), 768, Fused),
        ((8192, 8192), 1024, Staged),
        ((4096, 14336), 520, Fused),
        ((4096, 14336), 768, Staged),
        ((28672, 4096), 8192, Staged),
        ((4096, 4096), 520, Fused),
        ((4096, 4096), 704, Decoded),
        ((4096, 4096), 2048, Staged),
        ((6144, 4096), 512, Fused),
        ((6144, 4096), 900, Fused),
        ((3072, 3072), 256, Fused),
        ((3072, 3072), 384, Decoded),
        ((3072, 3072), 2048, Decoded),
        ((1020, 3072), 1024, Fused),
        ((1020, 3072), 1025, Staged),
        ((1028, 3072), 1025, Staged),
    ],
)
def test_the_fastest_of_three_ways_for_many_tokens(
    shape: tuple[int, int], tokens: int, kind: type[Fused] | type[Staged] | type[Decoded]
) -> None:
    """As measured on an H200. Where rows of y are not aligned, or few, cuBLAS is slow."""
    assert isinstance(choose(ChunkGrid.of(*shape), nnz_at_60_percent(shape), tokens, True, H100), kind)


@pytest.mark.parametrize(
    ("shape", "density", "tokens", "uneven", "kind"),
    [
        ((4096, 14336), 0.4, 32, False, HopperConfig),
        ((4096, 14336), 0.4, 40, False, HopperConfig),
        ((4096, 14336), 0.4, 40, True, HopperConfig),
        ((4096, 14336), 0.4, 41, False, WideConfig),
        ((4096, 14336), 0.3, 48, False, HopperConfig),
        ((4096, 14336), 0.3, 48, True, WideConfig),
        ((4096, 14336), 0.3, 49, False, WideConfig),
        ((4096, 14336), 0.5, 40, False, WideConfig),
        ((2048, 2048), 0.4, 40, False, WideConfig),
        ((2048, 8192), 0.4, 40, False, WideConfig),
        ((4096, 4096), 0.4, 40, False, WideConfig),
        ((5120, 5120), 0.4, 40, False, WideConfig),
        ((4096, 11008), 0.3, 40, False, HopperConfig),
        ((8192, 8192), 0.4, 40, False, HopperConfig),
        ((8192, 8192), 0.4, 41, False, WideConfig),
        ((28672, 8192), 0.5, 40, False, HopperConfig),
        ((28672, 8192), 0.6, 40, False, WideConfig),
    ],
)
def test_more_than_32_tokens_stay_narrow_where_the_ring_is_long_enough(
    shape: tuple[int, int], density: float, tokens: int, uneven: bool, kind: type[HopperConfig] | type[WideConfig]
) -> None:
    ranges = H100.sm_count if uneven else 0
    plan = choose(ChunkGrid.of(*shape), int(density * shape[0] * shape[1]), tokens, True, H100, ranges)
    assert isinstance(plan, Fused)
    assert isinstance(plan.passes[0], kind)


@pytest.mark.parametrize(
    ("shape", "tokens", "tile", "whole", "shares"),
    [
        ((4096, 4096), 512, 256, 0, 2),
        ((28672, 8192), 512, 256, 396, 2),
        ((28672, 8192), 1024, 256, 896, 1),
        ((28672, 8192), 1032, 208, 1056, 2),
        ((8192, 8192), 512, 256, 128, 1),
    ],
)
def test_tiles_of_a_short_last_round_are_shared(
    shape: tuple[int, int], tokens: int, tile: int, whole: int, shares: int
) -> None:
    grid = ChunkGrid.of(*shape)
    config = staged_config(grid, 0, grid.row_blocks, tokens, H100, tile=tile)
    assert (config.whole, config.shares) == (whole, shares)


@pytest.mark.parametrize(
    ("rows", "tokens", "tile", "passes", "warps"),
    [
        (8192, 48, 48, 1, 16),
        (8192, 65, 80, 1, 8),
        (8192, 129, 144, 1, 8),
        (8192, 256, 256, 1, 8),
        (8192, 300, 304, 1, 8),
        (8192, 321, 176, 2, 8),
        (8192, 640, 320, 2, 8),
        (8192, 768, 256, 3, 8),
        (4096, 129, 144, 1, 8),
        (4096, 288, 288, 1, 8),
        (4096, 300, 160, 2, 8),
        (1024, 129, 80, 2, 8),
        (1024, 256, 128, 2, 8),
    ],
)
def test_passes_are_as_few_as_fit_and_no_wider_than_needed(
    rows: int, tokens: int, tile: int, passes: int, warps: int
) -> None:
    config = wide_choice(ChunkGrid.of(rows, 4096), nnz_at_60_percent((rows, 4096)), tokens, H100)
    assert (config.tokens, config.passes, config.warps) == (tile, passes, warps)


@pytest.mark.parametrize("tokens", [33, 48, 64, 96, 100, 256])
@pytest.mark.parametrize("density", [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0])
@pytest.mark.parametrize("rows", [64, 4096, 8192])
def test_warps_along_k_share_boxes_of_x_evenly(rows: int, density: float, tokens: int) -> None:
    config = wide_choice(ChunkGrid.of(rows, 14336), int(density * rows * 14336), tokens, H100)
    warps_k = config.warps * config.bands // (2 * ChunkGrid.of(rows, 14336).blocks_m)
    assert config.boxes % warps_k == 0
    assert config.boxes >= 2 * warps_k
    assert config.ring_nbytes >= MAX_CHUNK_NBYTES


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((4096, 4096), 2),
        ((8192, 8192), 2),
        ((4096, 14336), 2),
        ((6144, 4096), 2),
        ((28672, 8192), 1),
        ((1024, 4096), 1),
        ((4096, 512), 1),
        ((14336, 4096), 1),
        ((15360, 5120), 1),
    ],
)
def test_pairs_share_row_blocks_where_enough_are_busy(shape: tuple[int, int], split: int) -> None:
    grid = ChunkGrid.of(*shape)
    assert narrow_choice(grid, nnz_at_60_percent(shape), 1, H100).split == split


@pytest.mark.parametrize(
    ("shape", "tokens", "split"), [((4096, 14336), 24, 2), ((4096, 14336), 32, 1), ((4096, 4096), 32, 2)]
)
def test_pairs_do_not_cost_a_large_weight_its_fourth_chunk(shape: tuple[int, int], tokens: int, split: int) -> None:
    """As measured on an H200 at 50 %."""
    grid = ChunkGrid.of(*shape)
    assert narrow_choice(grid, shape[0] * shape[1] // 2, tokens, H100).split == split


@pytest.mark.parametrize(
    ("shape", "tokens", "split", "twins"),
    [
        ((4096, 4096), 64, 2, 1),
        ((8192, 8192), 256, 2, 1),
        ((8192, 8192), 320, 2, 1),
        ((8192, 8192), 321, 1, 1),
        ((6144, 4096), 64, 1, 1),
        ((6144, 4096), 256, 2, 1),
        ((7168, 5120), 256, 2, 1),
        ((5120, 5120), 128, 1, 1),
        ((7168, 7168), 64, 1, 1),
        ((5120, 5120), 64, 1, 1),
        ((28672, 4096), 128, 1, 1),
        ((4096, 200), 64, 1, 1),
        ((4096, 4096), 129, 1, 2),
        ((4096, 14336), 512, 1, 2),
        ((2048, 4096), 256, 1, 1),
        ((2048, 4096), 289, 1, 2),
    ],
)
def test_clusters_for_many_tokens(shape: tuple[int, int], tokens: int, split: int, twins: int) -> None:
    config = wide_choice(ChunkGrid.of(*shape), nnz_at_60_percent(shape), tokens, H100)
    assert (config.split, config.twins) == (split, twins)


@pytest.mark.parametrize(
    ("shape", "tokens", "ranges", "by_cost"),
    [
        ((4096, 4096), 1, 132, True),
        ((4096, 4096), 1, 0, False),
        ((4096, 4096), 1, 114, False),
        ((28672, 8192), 320, 132, True),
        ((28672, 8192), 321, 132, False),
        ((4096, 14336), 128, 132, True),
        ((4096, 14336), 256, 132, False),
        ((64, 1024), 32, 2, True),
    ],
)
def test_ranges_by_cost(shape: tuple[int, int], tokens: int, ranges: int, by_cost: bool) -> None:
    """They are taken where the weight was packed for as many multiprocessors, with one pass and no clusters."""
    grid = ChunkGrid.of(*shape)
    plan = choose(grid, grid.out_features * grid.in_features // 2, tokens, True, H100, ranges)
    assert isinstance(plan, Fused)
    config = plan.passes[0]
    assert isinstance(config, HopperConfig | WideConfig)
    assert config.by_cost == by_cost
    if by_cost:
        assert config.split == 1
        assert config.ctas == ranges


def test_a_device_of_one_multiprocessor_has_no_clusters() -> None:
    config = wide_choice(ChunkGrid.of(4096, 4096), 1 << 20, 256, DeviceTraits((9, 0), 1, 232448))
    assert (config.split, config.twins, config.ctas) == (1, 1, 1)


@given(sides, sides, st.integers(0, 100), st.integers(1, 4096), st.sampled_from(DEVICES))
def test_eight_numbers_of_tokens_are_one_case(m: int, k: int, percent: int, tokens: int, device: DeviceTraits) -> None:
    """`backend._run` counts on it."""
    grid = ChunkGrid.of(m, k)
    exact, shared = (
        choose(grid, percent * m * k // 100, count, True, device) for count in (tokens, -(-tokens // 8) * 8)
    )
    if isinstance(exact, Fused):
        assert isinstance(shared, Fused)
        assert exact.passes == shared.passes
        assert exact.step == shared.step or len(exact.passes) == 1
    else:
        assert exact == shared


def test_other_dtypes_are_decoded_and_many_tokens_staged() -> None:
    grid = ChunkGrid.of(4096, 4096)
    assert isinstance(choose(grid, 1 << 20, 1, False, H100), Decoded)
    assert isinstance(choose(grid, 1 << 20, 4096, False, H100), Decoded)
    assert isinstance(choose(ChunkGrid.of(8192, 8192), 1 << 20, 4096, True, H100), Staged)
    assert isinstance(choose(grid, 1 << 20, 4096, True, RTX_4090), Decoded)
    assert isinstance(choose(grid, 1 << 20, 1, True, H100), Fused)
    assert isinstance(choose(grid, 1 << 20, 1, True, RTX_4090), Fused)


@pytest.mark.parametrize(
    ("shape", "device", "most"),
    [
        ((4096, 4096), H100, 32),
        ((5120, 5120), H100, 24),
        ((8192, 8192), H100, 72),
        ((28672, 8192), H100, 112),
        ((5120, 5120), A100, 64),
    ],
)
def test_more_tokens_go_to_a_dense_copy(shape: tuple[int, int], device: DeviceTraits, most: int) -> None:
    grid, nnz = ChunkGrid.of(*shape), nnz_at_60_percent(shape)
    for tokens in (1, 8, most):
        assert choose(grid, nnz, tokens, True, device, dense=True) == choose(grid, nnz, tokens, True, device)
    for tokens in (most + 1, most + 8, 1024, 8192):
        assert choose(grid, nnz, tokens, True, device, dense=True) == Dense()
        assert isinstance(choose(grid, nnz, tokens, True, device), Fused | Staged | Decoded)
        assert isinstance(choose(grid, nnz, tokens, False, device, dense=True), Decoded)


def test_decoded_rows_are_bounded() -> None:
    grid = ChunkGrid.of(262144, 16384)
    plan = choose(grid, 1 << 30, 4096, True, A100)
    assert isinstance(plan, Decoded)
    assert plan.row_blocks * grid.chunk_rows * grid.in_features * 2 <= 512 << 20
    plan = choose(grid, 1 << 30, 4096, True, H100)
    assert isinstance(plan, Staged)
    assert all(launch.panels * PANEL_ROWS * grid.in_features * 2 <= 512 << 20 for launch in plan.launches)


@pytest.mark.parametrize(("capability", "arch"), [((8, 0), "sm_80"), ((9, 0), "sm_90a"), ((12, 0), "sm_120")])
def test_code_arch(capability: tuple[int, int], arch: str) -> None:
    assert code_arch(capability) == arch


def test_argument_structs_have_the_size_of_the_kernels() -> None:
    # sizeof in csrc without padding at the end
    assert matmul._CALL.size + matmul._CONSTANTS.size == struct.calcsize("8Q14i")
    assert dense._HOPPER_CALL.size + dense._HOPPER_CONSTANTS.size == struct.calcsize("8Q14i")
    assert matmul._STAGED_CALL.size + matmul._STAGED_CONSTANTS.size == struct.calcsize("7Q12i")
    assert repack._REPACK_ARGS.size == struct.calcsize("6Q4i")
    assert dense._ARGS.size == struct.calcsize("4Q6i")
