"""The CUDA side that needs no GPU: how a matrix is cut, and which configuration a made-up device gets."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinfer.kernels.cuda import matmul, repack
from spinfer.kernels.cuda.layout import MAX_CHUNK_NBYTES, ChunkGrid
from spinfer.kernels.cuda.select import (
    Decoded,
    DeviceTraits,
    Fused,
    HopperConfig,
    PortableConfig,
    choose,
    code_arch,
    token_tile,
)

H100 = DeviceTraits((9, 0), 132, 232448)
A100 = DeviceTraits((8, 0), 108, 166912)
RTX_4090 = DeviceTraits((8, 9), 128, 101376)
DEVICES = [H100, A100, RTX_4090, DeviceTraits((12, 0), 170, 101376), DeviceTraits((10, 0), 148, 232448)]

sides = st.integers(1, 40000)


@given(sides, sides)
def test_chunks_cover_the_matrix_once(m: int, k: int) -> None:
    grid = ChunkGrid.of(m, k)
    assert grid.blocks_m * grid.blocks_k == 16
    assert (grid.row_blocks - 1) * grid.chunk_rows < m <= grid.row_blocks * grid.chunk_rows
    assert (grid.chunks_k - 1) * grid.chunk_cols < k <= grid.chunks_k * grid.chunk_cols


@given(sides, sides, st.floats(0, 1), st.integers(1, 4096), st.sampled_from(DEVICES))
def test_every_choice_fits_the_device(m: int, k: int, density: float, tokens: int, device: DeviceTraits) -> None:
    grid = ChunkGrid.of(m, k)
    plan = choose(grid, int(density * m * k), tokens, True, device)
    if isinstance(plan, Decoded):
        assert 1 <= plan.row_blocks <= grid.row_blocks
        return
    assert sum(min(plan.step, tokens - start) for start in range(0, tokens, plan.step)) == tokens
    assert len(plan.passes) == -(-tokens // plan.step)
    for i, config in enumerate(plan.passes):
        assert config.tokens >= min(plan.step, tokens - i * plan.step)
        assert 1 <= config.ctas <= grid.chunks
        assert config.shared_nbytes <= device.shared_nbytes
        if isinstance(config, HopperConfig):
            assert device.capability == (9, 0)
            assert config.ring_nbytes >= MAX_CHUNK_NBYTES, "a dense chunk must fit, however sparse the rest"
            assert 2 <= config.slots <= 8
            assert 1 <= config.in_flight <= config.slots
            assert config.warps_k * grid.blocks_m in (8, 16)
            assert (grid.blocks_k // config.warps_k) * 4 // config.steps % 2 == 0
        else:
            assert isinstance(config, PortableConfig)
            assert device.capability != (9, 0)


@given(st.integers(1, 128))
def test_token_tile_holds_the_tokens(tokens: int) -> None:
    assert token_tile(tokens) >= tokens
    assert token_tile(tokens) <= max(8, 2 * tokens)


def test_other_dtypes_and_many_tokens_are_decoded() -> None:
    grid = ChunkGrid.of(4096, 4096)
    assert isinstance(choose(grid, 1 << 20, 1, False, H100), Decoded)
    assert isinstance(choose(grid, 1 << 20, 4096, True, H100), Decoded)
    assert isinstance(choose(grid, 1 << 20, 1, True, H100), Fused)
    assert isinstance(choose(grid, 1 << 20, 1, True, RTX_4090), Fused)


def test_decoded_rows_are_bounded() -> None:
    grid = ChunkGrid.of(262144, 16384)
    plan = choose(grid, 1 << 30, 4096, True, H100)
    assert isinstance(plan, Decoded)
    assert plan.row_blocks * grid.chunk_rows * grid.in_features * 2 <= 512 << 20


@pytest.mark.parametrize(("capability", "arch"), [((8, 0), "sm_80"), ((9, 0), "sm_90a"), ((12, 0), "sm_120")])
def test_code_arch(capability: tuple[int, int], arch: str) -> None:
    assert code_arch(capability) == arch


def test_argument_structs_have_the_size_of_the_kernels() -> None:
    # sizeof in csrc: seven pointers and eleven ints, and seven pointers, a 64-bit stride and eight ints
    assert matmul._CALL.size + matmul._CONSTANTS.size == struct.calcsize("7Q11i") == 100
    assert repack._REPACK_ARGS.size == 96
