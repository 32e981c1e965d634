"""(problem, device) -> plan on CUDA: pure, so that every choice can be tested without a GPU.

What is measured is said where it decides; docs/kernel.md has the tables. tune.py measures instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from spinfer.kernels.cuda.configs import (
    CHUNKS_WANTED,
    MANY,
    MOST_OF_TWINS,
    PANEL_ROWS,
    PORTABLE_TILES,
    STAGED_TILES,
    DeviceTraits,
    HopperConfig,
    PortableConfig,
    StagedConfig,
    WideConfig,
    hopper_config,
    most_narrow,
    portable_config,
    range_count,
    staged_config,
    wide_config,
)
from spinfer.kernels.cuda.layout import ChunkGrid

_LEAST_WIDE, _FEW_NARROW_CHUNKS = 33, 8
"""Tokens from which csrc/matmul_wide_sm90.cu may be faster than csrc/matmul_sm90.cu, and how many chunks a CTA has at
most for it to be; see _narrow_pays."""

_TWIN_CHUNKS_A_CTA = 2
"""Chunks of 64 rows a CTA from which twins are faster, all passes counted. On an H200 at 60 % and 256 tokens
4096 x 14336 takes 57 us instead of 77; 2048 x 4096, with 1.9 a CTA, 16.6 instead of 15.4."""

_LEAST_DECODED, _LEAST_STAGED, MOST_FUSED_TOKENS = 257, 513, 1024
"""Tokens from which decoding first or staging may be faster than the fused kernels on Hopper, and up to which these
may be."""

_PASS_US, _PASS_US_A_TOKEN, _PASS_US_A_NONZERO = 0.05e-6, 0.0028e-6, 0.2e-6
_LATER_TWIN_PASS, _FUSED_MORE_US = 0.1, 6.0
_STAGED_US_A_COLUMN, _STAGED_US_A_COLUMN_TOKEN, _STAGED_MORE_US, _SHARING_US_A_TOKEN = 1.56e-3, 4.04e-5, 8.5, 0.051
_STAGING_US, _TOGETHER = 2.4e-6, 5.2
_DECODED_US, _DECODED_US_A_TOKEN, _DECODED_US_A_NONZERO, _MOST_DECODED = 0.4e-6, 0.0029e-6, 1.0e-6, 32_000_000
_LEAST_ROWS_DECODED = 1024
"""Of an H200, behind a kernel of 3 us; see _many_tokens."""

_MOST_PORTABLE = 64
"""Not measured on the GPUs it is for: two passes over the weight, then decoding once."""

_MOST_BESIDE_DENSE = 112
"""Tokens up to which large compressed weights are faster than dense ones; see _dense_pays."""

_WORKSPACE_NBYTES = 512 << 20
"""Decoded rows held at a time: a whole matrix of any common layer, so that products fill the GPU."""

_WIDE_US_A_CHUNK, _WIDE_SPLIT_SAVES_US_A_TOKEN = 1.2, 0.01
"""Of an H200; see _wide_split_pays."""

_BYTES_A_US, _WEIGHTS_A_US = 4.2e6, 4.0e6
_SPLIT_SAVES_US, _SPLIT_LEAST_BUSY, _FEW_CHUNKS_COST = 2.6, 0.45, 0.15
"""What all CTAs copy and decode on an H200; see _split_pays."""


@dataclass(frozen=True)
class Fused:
    """Passes of a fused kernel over `step` tokens each; the last has what remains."""

    step: int
    passes: tuple[HopperConfig | WideConfig | PortableConfig, ...]


@dataclass(frozen=True)
class Staged:
    """Launches of the kernel that stages the weight, over its rows."""

    launches: tuple[StagedConfig, ...]


@dataclass(frozen=True)
class Decoded:
    """Decode `row_blocks` row blocks at a time into a workspace and multiply with cuBLAS."""

    row_blocks: int


@dataclass(frozen=True)
class Dense:
    """Multiply with the weight's dense copy, by cuBLAS."""


Plan = Fused | Staged | Decoded | Dense


def in_eights(tokens: int) -> int:
    """The multiple of 8 that tokens come to: eight numbers of them are treated alike."""
    return -(-tokens // 8) * 8


def narrow_choice(grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits, by_cost: bool = False) -> HopperConfig:
    """The configuration of csrc/matmul_sm90.cu that is the fastest.

    Args:
        grid: how the weight is cut.
        nnz: its nonzeros.
        tokens: N.
        traits: of the device.
        by_cost: whether the weight has ranges by cost.
    """
    split = 1 if by_cost or not _split_pays(grid, nnz, tokens, traits) else 2
    return hopper_config(grid, nnz, tokens, traits, split=split, by_cost=by_cost)


def _narrow_pays(grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits, by_cost: bool) -> bool:
    """Whether csrc/matmul_sm90.cu is faster than csrc/matmul_wide_sm90.cu.

    From 33 tokens on x leaves less of shared memory to its ring, and what counts is whether that holds four chunks; and
    it takes less for a chunk, but more to end. Measured on an H200 at 40 tokens, and at 48 in pairs with chunks of 64
    rows, 32 shapes, 50 to 70 % zeros: what this chooses takes 0.2 % more than the faster of the two on average, 2.7 %
    at most (28672 x 8192 at 40 tokens: 90 us, not 98; 5120 x 5120, with 6 chunks a CTA, 19.6, not 21.0).
    """
    if tokens < _LEAST_WIDE:
        return True
    if tokens > most_narrow(grid, 2):
        return False
    narrow = narrow_choice(grid, nnz, tokens, traits, by_cost)
    if tokens > most_narrow(grid, narrow.split):
        return False
    four_fit = narrow.ring_nbytes >= CHUNKS_WANTED * grid.mean_chunk_nbytes(nnz)
    return four_fit and grid.chunks > _FEW_NARROW_CHUNKS * narrow.ctas


def _nbytes(grid: ChunkGrid, nnz: int) -> int:
    return grid.chunks * grid.mean_chunk_nbytes(nnz)


def _split_pays(grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits) -> bool:
    """Whether pairs of CTAs that share row blocks are faster than ranges of chunks.

    A pair with one row block saves 2.6 us of adding up, with two half of that. Where row blocks do not go round evenly,
    copies and decoding take longer by the share of idle CTAs; and copies do where the room in which pairs exchange
    their sums is what the fourth chunk in the ring lacks (4096 x 14336 at 50 % and 32 tokens: 31.8 us instead of 28.6).
    Fitted to 32 shapes, 50 and 60 % zeros and up to 32 tokens on an H200. Of 1,014 cases measured since, 30 to 70 % and
    up to 40 tokens, what this chooses takes 2.8 % more than the faster of the two at most, but for two at 40 % (6144 x
    4096 by 24 tokens: 5 %).
    """
    clusters = traits.sm_count // 2
    if grid.chunks_k < 2 or clusters == 0:
        return False
    rounds = -(-grid.row_blocks // clusters)
    busy: float = grid.row_blocks / (rounds * clusters)
    copies, decoding = _nbytes(grid, nnz) / _BYTES_A_US, grid.out_features * grid.in_features / _WEIGHTS_A_US
    lost = max(copies, decoding) * (1 / busy - 1)
    single, pair = (hopper_config(grid, nnz, tokens, traits, split=split).ring_nbytes for split in (1, 2))
    if pair < CHUNKS_WANTED * grid.mean_chunk_nbytes(nnz) <= single:
        lost += _FEW_CHUNKS_COST * copies
    return busy >= _SPLIT_LEAST_BUSY and lost < _SPLIT_SAVES_US / rounds


def wide_choice(grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits, by_cost: bool = False) -> WideConfig:
    """The configuration of csrc/matmul_wide_sm90.cu that is the fastest; arguments as of `narrow_choice`."""
    twins = 2 if _twins_pay(grid, tokens, traits) else 1
    config = wide_config(grid, nnz, tokens, traits, twins=twins, by_cost=by_cost)
    if config.by_cost or config.passes * twins > 1 or not _wide_split_pays(grid, config.tokens, traits):
        return config
    return wide_config(grid, nnz, tokens, traits, split=2)


def _wide_split_pays(grid: ChunkGrid, tile: int, traits: DeviceTraits) -> bool:
    """Whether pairs of CTAs, a row block each, are faster than ranges of chunks.

    They save less than a chunk takes, so where ranges have one chunk less they are faster but for many tokens. Fitted
    to 18 shapes, 50 to 70 % zeros and 48 to 320 tokens on an H200: what this chooses takes 0.1 % more than the faster
    of the two on average, 5 % at most.
    """
    if grid.chunks_k < 2 or grid.row_blocks > traits.sm_count // 2:
        return False
    more_chunks = -(-grid.chunks_k // 2) - -(-grid.chunks // range_count(grid, traits))
    return more_chunks * _WIDE_US_A_CHUNK < _WIDE_SPLIT_SAVES_US_A_TOKEN * tile


def _twins_pay(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> bool:
    """Whether row blocks of 64 rows are better taken by two CTAs that share the copies of x."""
    chunks = -(-tokens // MOST_OF_TWINS) * grid.chunks
    enough = chunks >= _TWIN_CHUNKS_A_CTA * traits.sm_count >= 2 * _TWIN_CHUNKS_A_CTA
    return grid.blocks_m == 2 and tokens > MANY and enough


def _fused_us(grid: ChunkGrid, nnz: int, config: WideConfig) -> float:
    weights = grid.out_features * grid.in_features
    each = weights * (_PASS_US + _PASS_US_A_TOKEN * config.tokens) + nnz * _PASS_US_A_NONZERO
    # 4096 x 14336 at 60 % takes 101 us by twins for 512 tokens, two passes, and 172 for 768.
    slower = 1 + _LATER_TWIN_PASS * (config.passes - 2) if config.twins > 1 else 1
    return config.passes * each * slower + _FUSED_MORE_US


def _staged_us(grid: ChunkGrid, tokens: int, tile: int, traits: DeviceTraits) -> float:
    config = staged_config(grid, 0, grid.row_blocks, tokens, traits, tile=tile)
    rounds: float = -(-config.whole // traits.sm_count)
    multiplying = _STAGED_MORE_US
    if config.whole < config.panels * config.token_tiles:
        rounds += 1 / config.shares
        multiplying += _SHARING_US_A_TOKEN * tile
    multiplying += (_STAGED_US_A_COLUMN + _STAGED_US_A_COLUMN_TOKEN * tile) * grid.in_features * rounds
    # The longer of the two, or somewhat more where they take about as long.
    staging: float = _STAGING_US * grid.out_features * grid.in_features
    return math.pow(multiplying**_TOGETHER + staging**_TOGETHER, 1 / _TOGETHER)


def staged_tiles(tokens: int) -> list[int]:
    """Tokens that a tile of the staging kernel may have: the fewest for each number of tiles, most first."""
    fewest, most = -(-tokens // STAGED_TILES[-1]), -(-tokens // STAGED_TILES[0])
    tiles = [next(tile for tile in STAGED_TILES if tile * count >= tokens) for count in range(fewest, most + 1)]
    return list(dict.fromkeys(tiles))


def _decoded_us(grid: ChunkGrid, nnz: int, tokens: int) -> float:
    weights = grid.out_features * grid.in_features
    # cuBLAS takes up to 2.7 times as long as the others for 300 x 5000, whose rows of y are not aligned.
    if weights > _MOST_DECODED or grid.out_features < _LEAST_ROWS_DECODED or grid.out_features % 8:
        return math.inf
    return weights * (_DECODED_US + _DECODED_US_A_TOKEN * in_eights(tokens)) + nnz * _DECODED_US_A_NONZERO


def _many_tokens(
    grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits, by_cost: bool
) -> Fused | Staged | Decoded:
    """The fastest of three ways for more tokens than one pass of csrc/matmul_wide_sm90.cu takes.

    Its passes decode the weight several times; staging decodes once, in its own time; decoding first, for cuBLAS, takes
    as long as writing the dense weight, which is little of small matrices. Estimates, fitted to 32 shapes of 4 to 470
    million weights, 50, 60 and 70 % zeros and 300 to 8,192 tokens on an H200: what they choose takes 0.2 % more than
    the fastest on average, 17 % at most. From 33 million weights on decoding first gains nothing, or little: 10 % at
    most.
    """
    tiles = staged_tiles(tokens) if tokens >= _LEAST_STAGED else []
    staged_us = min((_staged_us(grid, tokens, tile, traits) for tile in tiles), default=math.inf)
    decoded_us = _decoded_us(grid, nnz, tokens)
    if tokens <= MOST_FUSED_TOKENS:
        wide = wide_choice(grid, nnz, tokens, traits, by_cost)
        if _fused_us(grid, nnz, wide) <= min(staged_us, decoded_us):
            return Fused(tokens, (wide,))
    return _staged(grid, tokens, traits) if staged_us <= decoded_us else _decoded(grid)


def _dense_pays(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> bool:
    """Whether cuBLAS with a dense copy is faster than all that reads the compressed weight.

    What is compressed is, up to a number of tokens that grows with the weight, and twice as steeply where pairs of CTAs
    spare a launch its end. Fitted to 32 shapes, 50 to 70 % zeros and 8 to 8,192 tokens on an H200: what this chooses
    takes 0.2 % more than the faster of the two on average, and 32 % at most, where cuBLAS takes longer for a few tokens
    more (9216 x 9216: 50 us for 128 tokens, 76 for 144). Memory that reads slower favours what is compressed, which is
    not looked at.
    """
    if not traits.hopper:
        return tokens > _MOST_PORTABLE
    millions = grid.out_features * grid.in_features / 1e6
    return in_eights(tokens) > min(_MOST_BESIDE_DENSE, (2.2 if grid.blocks_m == 2 else 1.2) * millions - 4)


def alternatives(
    grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits, ranges: int = 0, dense: bool = False
) -> dict[str, Plan]:
    """All that can compute x W^T for x of the values' dtype, by name; `choose` takes one of these.

    Args:
        grid: how the weight is cut.
        nnz: its nonzeros.
        tokens: rows of x.
        traits: of the device.
        ranges: as of `choose`.
        dense: likewise.
    """
    found: dict[str, Plan] = {}
    if traits.hopper:
        by_cost = ranges == range_count(grid, traits)
        can_split = grid.chunks_k >= 2 and traits.sm_count >= 2
        if tokens <= most_narrow(grid, 1):
            config = hopper_config(grid, nnz, tokens, traits, by_cost=by_cost)
            found["ranges"] = Fused(tokens, (config,))
        if can_split and tokens <= most_narrow(grid, 2):
            found["pairs"] = Fused(tokens, (hopper_config(grid, nnz, tokens, traits, split=2),))
        if _LEAST_WIDE <= tokens <= MOST_FUSED_TOKENS:
            wide = wide_config(grid, nnz, tokens, traits, by_cost=by_cost)
            found["wide ranges"] = Fused(tokens, (wide,))
            if can_split and wide.passes == 1:
                config_of_pairs = wide_config(grid, nnz, tokens, traits, split=2)
                found["wide pairs"] = Fused(tokens, (config_of_pairs,))
            if grid.blocks_m == 2 and tokens > MANY and traits.sm_count >= 2:
                found["twins"] = Fused(tokens, (wide_config(grid, nnz, tokens, traits, twins=2),))
        if tokens >= _LEAST_WIDE:
            found["staged"] = _staged(grid, tokens, traits)
    elif tokens <= MOST_FUSED_TOKENS:
        found["portable"] = _portable(grid, tokens, traits)
    found["decoded"] = _decoded(grid)
    if dense:
        found["dense"] = Dense()
    return found


def _portable(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> Fused:
    step = PORTABLE_TILES[-1]
    return Fused(step, tuple(portable_config(grid, min(step, tokens - i), traits) for i in range(0, tokens, step)))


def _staged(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> Staged:
    row_nbytes, blocks_a_panel = grid.chunk_rows * grid.in_features * 2, PANEL_ROWS // grid.chunk_rows
    step = max(1, _WORKSPACE_NBYTES // (row_nbytes * blocks_a_panel)) * blocks_a_panel
    tile = min(staged_tiles(tokens), key=lambda tile: _staged_us(grid, tokens, tile, traits))
    return Staged(
        tuple(
            staged_config(grid, first, min(step, grid.row_blocks - first), tokens, traits, tile=tile)
            for first in range(0, grid.row_blocks, step)
        )
    )


def _decoded(grid: ChunkGrid) -> Decoded:
    row_nbytes = grid.chunk_rows * grid.in_features * 2
    return Decoded(row_blocks=max(1, min(grid.row_blocks, _WORKSPACE_NBYTES // row_nbytes)))


TUNED_TOKENS = (*range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, MOST_FUSED_TOKENS + 1, 64))
"""Numbers of tokens that are measured where choices are (tune.py); each stands for those below it."""

NOT_TUNED: Mapping[int, str] = MappingProxyType({})


def choose(
    grid: ChunkGrid,
    nnz: int,
    tokens: int,
    same_dtype: bool,
    traits: DeviceTraits,
    ranges: int = 0,
    dense: bool = False,
    tuned: Mapping[int, str] = NOT_TUNED,
) -> Plan:
    """How to compute x W^T for a weight on a GPU.

    Args:
        grid: how the weight is cut.
        nnz: its nonzeros.
        tokens: rows of x.
        same_dtype: whether x has the dtype of the values.
        traits: of the device.
        ranges: by cost that the weight has, made for the GPU on which it was packed; 0 if none.
        dense: whether the weight has a dense copy.
        tuned: what was measured to be faster than the choice made here: names of `alternatives`, by `TUNED_TOKENS`.
    """
    if not same_dtype:
        return _decoded(grid)
    name = tuned.get(next((each for each in TUNED_TOKENS if each >= tokens), 0)) if tuned else None
    if name is not None:
        plan = alternatives(grid, nnz, tokens, traits, ranges, dense).get(name)
        if plan is not None:
            return plan
    if dense and _dense_pays(grid, tokens, traits):
        return Dense()
    if not traits.hopper:
        return _portable(grid, tokens, traits) if tokens <= _MOST_PORTABLE else _decoded(grid)
    by_cost = ranges == range_count(grid, traits)
    if tokens >= _LEAST_DECODED:
        return _many_tokens(grid, nnz, tokens, traits, by_cost)
    if _narrow_pays(grid, nnz, tokens, traits, by_cost):
        return Fused(tokens, (narrow_choice(grid, nnz, tokens, traits, by_cost),))
    return Fused(tokens, (wide_choice(grid, nnz, tokens, traits, by_cost),))
