"""(problem, device) -> kernel configuration on CUDA: pure, so that every choice can be tested without a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from spinfer.kernels.cuda.layout import BLOCK_COLS, BLOCK_ROWS, MAX_CHUNK_NBYTES, OFFSET_UNIT, ChunkGrid

_MAX_NARROW = 32
"""Up to so many tokens csrc/matmul_sm90.cu is the faster one; see _narrow_pays."""

_NARROW_TILES = (8, 16, 24, 32, 40, 48)
_NARROW_LEAST_BUSY, _NARROW_LEAST_CHUNKS = 0.6, 3.6
"""From 33 tokens on; see _narrow_pays."""

_NARROW_SCRATCH_NBYTES = 16 * 1024
"""What its 16 warps add up through at a time: 8 tokens of 32 rows each."""

_WIDE_TILES = (48, 64, 96, 128, 192, 256)
_FEW, _MANY = 64, 128
"""Up to _FEW tokens a pass 16 warps of one tile are faster than 8 of two (5 % at 64; H100, 60 %). Beyond _MANY 8 warps
hold one tile each, and chunks of 64 rows go to twins, or to passes of _MANY."""

_TWIN_CHUNKS_A_CTA = 2
"""Chunks of 64 rows a CTA from which twins are faster, all passes of 256 tokens counted. On an H200 at 60 % and 256
tokens 4096 x 14336 takes 57 us instead of 77; 2048 x 4096, with 1.9 a CTA, 16.6 instead of 15.4."""

_IN_FLIGHT = 2
"""Copies of the weight outstanding at a time; 1 and 3 are slower (docs/kernel.md)."""

_CHUNKS_WANTED, _CHUNKS_LEAST = 4.02, 3.5
"""Chunks of the weight that are worth more than further boxes of x in csrc/matmul_wide_sm90.cu. On an H100 28672 x 8192
at 50 % and 64 tokens takes 117.7 us with 3.8 chunks and 10 boxes, 106.9 with 4.3 and 8. Where four do not fit all the
same, or chunks have 64 rows, fewer boxes cost 3 to 8 %."""

_PORTABLE_TILES = (8, 16, 32)
_PORTABLE_WARPS, _PORTABLE_NOTES = 8, 4
_BLOCK_BUFFER_NBYTES = 256 + BLOCK_ROWS * BLOCK_COLS * 2 + 32
"""What csrc/matmul_portable.cu needs for a dense block: kBlockBuffer."""

_MOST_RING_NBYTES = 4 * _BLOCK_BUFFER_NBYTES
"""Three dense blocks, and what is left at the end of the ring."""

_SHARED_RESERVED_NBYTES = 1024
"""What the driver takes of each block's shared memory: an SM has so much more than one block can use."""

_LEAST_STAGED, MOST_FUSED_TOKENS = 513, 1024
"""Tokens from which staging may be faster than the fused kernels on Hopper, and up to which these may be."""

_MORE_PASSES, _FUSED_MORE_US = 1.06, 10.0
_STAGED_US_A_COLUMN, _STAGED_MORE_US, _SHARING_US, _STAGING_US, _TOGETHER = 0.01213, 9.1, 11.2, 2.36e-6, 5
_DECODED_US, _DECODED_US_A_TOKEN, _DECODED_MORE_US, _MOST_DECODED = 0.82e-6, 2.57e-9, 6.4, 32_000_000
_LEAST_ROWS_DECODED = 1024
"""Of an H200 at 60 %, behind a kernel of 3 us; see _many_tokens."""

_MOST_PORTABLE = 64
"""Not measured on the GPUs it is for: two passes over the weight, then decoding once."""

_WORKSPACE_NBYTES = 512 << 20
"""Decoded rows held at a time: a whole matrix of any common layer, so that products fill the GPU."""

PANEL_ROWS, _TILE_TOKENS = 256, 128
"""A tile of csrc/matmul_staged_sm90.cu: kRows, kTileTokens."""

_TOKEN_GROUP = 16
"""Token tiles that all panels are multiplied with before the next ones: their x, 32 MB at K = 8192, stays in L2."""

_MOST_SHARES = 4

_BARRIER_NBYTES = 1024

_LINES_NBYTES = 4096
"""What a warpgroup of csrc/matmul_wide_sm90.cu writes y by way of: kLinesBytes."""

_WIDE_US, _WIDE_US_A_TOKEN, _FEW_SPLIT_SAVES_US, _MANY_SPLIT_SAVES_US = 0.31e-6, 0.0021e-6, 4.5, 5.6
"""Of an H200; see _wide_split_pays."""

_BYTES_A_US, _WEIGHTS_A_US, _COPIES_IDLE = 3.0e6, 4.0e6, 0.7
_SPLIT_SAVES_US, _SPLIT_LEAST_BUSY, _LARGE_US = 2.4, 0.45, 100.0
"""What all CTAs copy and decode; see _split_pays and hopper_config."""


@dataclass(frozen=True)
class DeviceTraits:
    """What a selection may depend on.

    Attributes:
        capability: compute capability, (9, 0) for Hopper.
        sm_count: multiprocessors.
        shared_nbytes: most dynamic shared memory of one block.
    """

    capability: tuple[int, int]
    sm_count: int
    shared_nbytes: int

    @property
    def hopper(self) -> bool:
        """Whether it has the instructions that Hopper alone has."""
        return self.capability == (9, 0)


@dataclass(frozen=True)
class HopperConfig:
    """One pass of csrc/matmul_sm90.cu.

    Attributes:
        tokens: columns of the pass, a compile-time constant.
        split: CTAs of a cluster, which share row blocks along k; 1 for ranges of chunks that CTAs share by chance.
        by_cost: whether ranges are those made when the weight was packed; else they are equally long.
        ctas: how many.
        boxes: chunks whose columns of x may be in shared memory: 2, 4 or 8 (kSlots of csrc/sm90.cuh).
        ring_at: where the weight is in shared memory, in bytes.
        ring_nbytes: how much of it.
        shared_nbytes: shared memory in all.
        in_flight: copies outstanding at a time.
    """

    tokens: int
    split: int
    by_cost: bool
    ctas: int
    boxes: int
    ring_at: int
    ring_nbytes: int
    shared_nbytes: int
    in_flight: int


@dataclass(frozen=True)
class WideConfig:
    """csrc/matmul_wide_sm90.cu: all passes over the weight in one launch.

    Attributes:
        tokens: columns of a pass, a compile-time constant.
        copy_tokens: columns of a copy of x, likewise; those that no token is in are left out.
        warps: that multiply, likewise.
        bands: of 16 rows that each of them takes, likewise.
        split: CTAs of a cluster that share a row block along k; 1 for ranges of consecutive chunks.
        twins: CTAs of a cluster that take row blocks one above the other and share the copies of x.
        by_cost: as of `HopperConfig`.
        passes: over the weight.
        ctas: how many.
        boxes: blocks of 64 columns of x likewise; a multiple of the warps along k, and two for each at least.
        ring_at: where the weight is in shared memory, in bytes.
        ring_nbytes: how much of it.
        shared_nbytes: shared memory in all.
        in_flight: copies outstanding at a time.
    """

    tokens: int
    copy_tokens: int
    warps: int
    bands: int
    split: int
    twins: int
    by_cost: bool
    passes: int
    ctas: int
    boxes: int
    ring_at: int
    ring_nbytes: int
    shared_nbytes: int
    in_flight: int


@dataclass(frozen=True)
class StagedConfig:
    """One launch of csrc/matmul_staged_sm90.cu; the first seven are fields of its StagedArgs.

    Attributes:
        row_blocks: chunks along M.
        panels: of PANEL_ROWS rows.
        token_tiles: tiles along N.
        token_group: how many of them all panels are multiplied with before the next ones.
        row_block_group: row blocks that are decoded side by side.
        whole: tiles that one CTA computes.
        shares: CTAs of each of the other tiles.
        first_row_block: chunk along M that the launch begins with.
        ctas: how many.
    """

    row_blocks: int
    panels: int
    token_tiles: int
    token_group: int
    row_block_group: int
    whole: int
    shares: int
    first_row_block: int
    ctas: int


@dataclass(frozen=True)
class PortableConfig:
    """One pass of csrc/matmul_portable.cu.

    Attributes:
        arch: what to compile for.
        tokens: columns of the pass, a compile-time constant.
        ctas: how many; each takes a range of consecutive chunks.
        ring_at: where the weight is in shared memory, in bytes.
        ring_nbytes: how much of it a warp has.
        shared_nbytes: shared memory of each CTA.
    """

    arch: str
    tokens: int
    ctas: int
    ring_at: int
    ring_nbytes: int
    shared_nbytes: int


def _scratch_nbytes(grid: ChunkGrid, warps_k: int, tile: int) -> int:
    return (warps_k - 1) * grid.blocks_m * 2 * (2 if tile > _MAX_NARROW else 1) * 512


def range_count(grid: ChunkGrid, traits: DeviceTraits) -> int:
    """Ranges of chunks that one pass over a weight is dealt out in on Hopper, one a CTA."""
    return min(traits.sm_count, grid.chunks)


def hopper_config(
    grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits, *, split: int | None = None, by_cost: bool = False
) -> HopperConfig:
    """Configuration of the kernel for 1 to 32 tokens, and for up to 48 where `_narrow_pays` says so.

    Args:
        grid: how the weight is cut.
        nnz: its nonzeros.
        tokens: N.
        traits: of the device.
        split: of `HopperConfig`, instead of the choice.
        by_cost: whether the weight has ranges by cost.
    """
    tile = next(tile for tile in _NARROW_TILES if tile >= tokens)
    if by_cost:
        split = 1
    if split is None:
        # At 24 and 32 tokens only the kernel without pairs has wgmma, which the largest matrices gain more from.
        split = 2 if _split_pays(grid, nnz, traits) and (tile <= 16 or _copies_us(grid, nnz) < _LARGE_US) else 1
    x_nbytes = grid.blocks_k * tile * 128
    fixed = _BARRIER_NBYTES + _NARROW_SCRATCH_NBYTES + (split - 1) * grid.chunk_rows * tile * 4
    room = traits.shared_nbytes - fixed
    chunk = grid.mean_chunk_nbytes(nnz)
    # Two more boxes are worth 1 to 4 % where five chunks of the weight still fit; where four do not, they cost up to
    # 20 %.
    boxes = 4 if room - 4 * x_nbytes >= 5 * chunk else 2
    ring_at = fixed + boxes * x_nbytes
    ring = (traits.shared_nbytes - ring_at) // 128 * 128
    ctas = range_count(grid, traits) if split == 1 else min(traits.sm_count // split, grid.row_blocks) * split
    return HopperConfig(
        tokens=tile,
        split=split,
        by_cost=by_cost,
        ctas=ctas,
        boxes=boxes,
        ring_at=ring_at,
        ring_nbytes=ring,
        shared_nbytes=ring_at + ring,
        in_flight=_IN_FLIGHT,
    )


def _narrow_pays(grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits, by_cost: bool) -> bool:
    """Whether csrc/matmul_sm90.cu is faster than csrc/matmul_wide_sm90.cu.

    From 33 tokens on it would spill without pairs of CTAs and chunks of 64 rows, and x leaves less of shared memory to
    the ring. Measured on an H200: 4096 x 14336 with 3.9 chunks in the ring 27.3 us instead of 32.5, with 3.4 32.3 (3584
    x 18944: 40.8 instead of 38.8), with 2.8 42.8 instead of 36.1. And 2048 x 8192, which leaves half of the
    multiprocessors idle, 16.0 instead of 15.3; 2560 x 6912, 15.1 instead of 16.2.
    """
    if tokens <= _MAX_NARROW:
        return True
    if tokens > _NARROW_TILES[-1] or grid.blocks_m > 2 or by_cost:
        return False
    narrow = hopper_config(grid, nnz, tokens, traits)
    busy = narrow.ctas >= _NARROW_LEAST_BUSY * traits.sm_count
    return narrow.split == 2 and busy and narrow.ring_nbytes >= _NARROW_LEAST_CHUNKS * grid.mean_chunk_nbytes(nnz)


def _copies_us(grid: ChunkGrid, nnz: int) -> float:
    """What reading the weight takes on an H100."""
    return grid.chunks * grid.mean_chunk_nbytes(nnz) / _BYTES_A_US


def _split_pays(grid: ChunkGrid, nnz: int, traits: DeviceTraits) -> bool:
    """Whether pairs of CTAs that share row blocks are faster than ranges of chunks.

    A pair saves 2.4 us of adding up (H100). Where row blocks do not go round evenly, the time of decoding grows with
    the inverse of the share of busy CTAs, that of the copies less, with a power of it (28.2 us instead of 23.4 with
    half of them idle). Fitted to 34 shapes, 50 to 70 % zeros and up to 32 tokens on an H200: what this chooses takes
    0.2 % more than the faster of the two on average, at most 13 % (3072 x 8192 at 50 % and 32 tokens).
    """
    clusters = traits.sm_count // 2
    if grid.chunks_k < 2 or clusters == 0:
        return False
    rounds = -(-grid.row_blocks // clusters)
    busy: float = grid.row_blocks / (rounds * clusters)
    copies, decoding = _copies_us(grid, nnz), grid.out_features * grid.in_features / _WEIGHTS_A_US
    lost = max(copies / busy**_COPIES_IDLE, decoding / busy) - max(copies, decoding)
    return busy >= _SPLIT_LEAST_BUSY and lost < _SPLIT_SAVES_US


def _wide_split_pays(grid: ChunkGrid, tile: int, traits: DeviceTraits) -> bool:
    """Whether pairs of CTAs, a row block each, are faster than ranges of chunks.

    Measured on an H200 at 60 %, where a weight takes _WIDE_US and for each token _WIDE_US_A_TOKEN: 64 row blocks for 66
    pairs are 1 to 6 % faster from 96 tokens on and 4 to 12 % at 64; 56 with 5120 columns 5 to 11 % up to 256, with 7168
    columns 3 % at 64 and as fast beyond, as are 48; 40 (5120 x 5120) are 7 to 9 % slower from 96 on.
    """
    pairs = traits.sm_count // 2
    if grid.chunks_k < 2 or grid.row_blocks > pairs:
        return False
    us = grid.out_features * grid.in_features * (_WIDE_US + _WIDE_US_A_TOKEN * tile)
    return us * (pairs / grid.row_blocks - 1) < (_FEW_SPLIT_SAVES_US if tile <= _FEW else _MANY_SPLIT_SAVES_US)


def _twins_pay(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> bool:
    """Whether row blocks of 64 rows are better taken by two CTAs that share the copies of x."""
    chunks = -(-tokens // _WIDE_TILES[-1]) * grid.chunks
    enough = chunks >= _TWIN_CHUNKS_A_CTA * traits.sm_count >= 2 * _TWIN_CHUNKS_A_CTA
    return grid.blocks_m == 2 and tokens > _MANY and enough


def wide_config(
    grid: ChunkGrid,
    nnz: int,
    tokens: int,
    traits: DeviceTraits,
    *,
    split: int | None = None,
    twins: int | None = None,
    by_cost: bool = False,
) -> WideConfig:
    """Configuration of the kernel for more tokens.

    Args:
        grid: how the weight is cut.
        nnz: its nonzeros.
        tokens: N.
        traits: of the device.
        split: of `WideConfig`, instead of the choice.
        twins: likewise.
        by_cost: whether the weight has ranges by cost; they are used where there is one pass, without twins.
    """
    if twins is None:
        twins = 2 if _twins_pay(grid, tokens, traits) else 1
    tiles = [tile for tile in _WIDE_TILES if tile <= _MANY or grid.blocks_m > 2 or twins > 1]
    each = -(-tokens // -(-tokens // tiles[-1]))
    tile = next(tile for tile in tiles if tile >= each)
    box = tile * 128
    warps = 16 if tile <= _FEW else 8
    bands = 1 if warps == 16 or grid.blocks_m == 2 or tile > _MANY else 2
    warps_m = 2 * grid.blocks_m // bands
    warps_k = warps // warps_m
    passes = -(-tokens // tile)
    by_cost = by_cost and passes == twins == 1
    if by_cost:
        split = 1
    if split is None:
        split = 2 if passes == twins == 1 and _wide_split_pays(grid, tile, traits) else 1
    # Two warps along k with more than _FEW tokens end a segment together: see finish_bytes of csrc/wide_finish.cuh.
    finishing = warps if warps_k == 2 and tile > _FEW else warps_m
    sums = max(_scratch_nbytes(grid, warps_k, tile), finishing // 4 * _LINES_NBYTES) if split == 1 else 0
    fixed = _BARRIER_NBYTES + sums
    room = traits.shared_nbytes - fixed
    chunk = grid.mean_chunk_nbytes(nnz)
    four_fit = grid.blocks_m > 2 and room - 4 * box >= _CHUNKS_WANTED * chunk
    wanted = max(MAX_CHUNK_NBYTES, int((_CHUNKS_WANTED if four_fit else _CHUNKS_LEAST) * chunk))
    # Warps give a box back when they have the next one: with a box each, all would wait for ever. And the copy before
    # in a box must be one that the same warps have seen land: a barrier tells the last phase alone from this one. With
    # 5 boxes for 4 warps results were wrong (4096 x 14336, 30 %, 64 tokens: by 0.045).
    boxes = max(4, 2 * warps_k, min(12, (room - wanted) // box)) // warps_k * warps_k
    ring_at = fixed + boxes * box
    ring = (traits.shared_nbytes - ring_at) // 128 * 128
    strips = passes * -(-grid.row_blocks // twins)  # of twins
    # Where nothing can be left out, copies as large as can be: with two for each box of x 96 and 128 tokens take 3 to
    # 12 % longer in pairs with chunks of 64 rows (H200).
    part = 64 if tile % 48 else 48
    return WideConfig(
        tokens=tile,
        copy_tokens=part if tokens - (passes - 1) * tile <= tile - part else tile // twins,
        warps=warps,
        bands=bands,
        split=split,
        twins=twins,
        by_cost=by_cost,
        passes=passes,
        ctas=twins * min(traits.sm_count // twins, strips * grid.chunks_k) if split == 1 else split * grid.row_blocks,
        boxes=boxes,
        ring_at=ring_at,
        ring_nbytes=ring,
        shared_nbytes=ring_at + ring,
        in_flight=_IN_FLIGHT,
    )


def staged_config(
    grid: ChunkGrid, first_row_block: int, row_blocks: int, tokens: int, traits: DeviceTraits
) -> StagedConfig:
    """Configuration of one launch of the kernel that stages the weight.

    Tiles that would leave more than half of the CTAs idle in a last round are shared along K.

    Args:
        grid: how the weight is cut.
        first_row_block: chunk along M to begin with, a multiple of a panel's.
        row_blocks: how many.
        tokens: N.
        traits: of the device.
    """
    blocks_a_panel = PANEL_ROWS // grid.chunk_rows
    panels, token_tiles = -(-row_blocks // blocks_a_panel), -(-tokens // _TILE_TOKENS)
    token_group = min(token_tiles, _TOKEN_GROUP)
    tiles = panels * token_tiles
    rest = tiles % traits.sm_count
    shares = max(1, min(_MOST_SHARES, traits.sm_count // rest, grid.chunks_k)) if rest else 1
    whole = tiles - rest if shares > 1 else tiles
    return StagedConfig(
        row_blocks=row_blocks,
        panels=panels,
        token_tiles=token_tiles,
        token_group=token_group,
        row_block_group=min(panels, -(-traits.sm_count // token_group)) * blocks_a_panel,
        whole=whole,
        shares=shares,
        first_row_block=first_row_block,
        ctas=min(traits.sm_count, whole) if whole else rest * shares,
    )


def _fused_us(grid: ChunkGrid, config: WideConfig) -> float:
    weights = grid.out_features * grid.in_features
    each = _WIDE_US + _WIDE_US_A_TOKEN * config.tokens
    return weights * config.passes * each * (_MORE_PASSES if config.passes > 1 else 1) + _FUSED_MORE_US


def _staged_us(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> float:
    config = staged_config(grid, 0, grid.row_blocks, tokens, traits)
    rounds: float = -(-config.whole // traits.sm_count)
    multiplying = _STAGED_MORE_US
    if config.whole < config.panels * config.token_tiles:
        rounds += 1 / config.shares
        multiplying += _SHARING_US
    multiplying += _STAGED_US_A_COLUMN * grid.in_features * rounds
    # The longer of the two, or somewhat more where they take about as long.
    staging: float = _STAGING_US * grid.out_features * grid.in_features
    return math.pow(multiplying**_TOGETHER + staging**_TOGETHER, 1 / _TOGETHER)


def _decoded_us(grid: ChunkGrid, tokens: int) -> float:
    weights = grid.out_features * grid.in_features
    # cuBLAS takes up to 2.7 times as long as the others for 300 x 5000, whose rows of y are not aligned.
    if weights > _MOST_DECODED or grid.out_features < _LEAST_ROWS_DECODED or grid.out_features % 8:
        return math.inf
    counted = -(-tokens // 8) * 8  # eight numbers of tokens are treated alike
    return weights * (_DECODED_US + _DECODED_US_A_TOKEN * counted) + _DECODED_MORE_US


def _many_tokens(
    grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits, by_cost: bool
) -> Fused | Staged | Decoded:
    """The fastest of three ways for more tokens than one pass of csrc/matmul_wide_sm90.cu takes.

    Its passes decode the weight several times, but go round evenly; staging decodes once, for tiles that do not (at 768
    tokens 4096 x 14336 has 96 of them for 132 multiprocessors); decoding first, for cuBLAS, takes as long as writing
    the dense weight, which is little of small matrices. Estimates, fitted to 34 shapes of 4 to 470 million weights, 50
    to 70 % zeros and 384 to 8,192 tokens on an H200: what they choose takes 0.2 % more than the fastest on average, at
    most 9 %. From 33 million weights on decoding first gains nothing, 3 % at most.
    """
    staged_us = _staged_us(grid, tokens, traits) if tokens >= _LEAST_STAGED else math.inf
    decoded_us = _decoded_us(grid, tokens)
    if tokens <= MOST_FUSED_TOKENS:
        wide = wide_config(grid, nnz, tokens, traits, by_cost=by_cost)
        if _fused_us(grid, wide) <= min(staged_us, decoded_us):
            return Fused(tokens, (wide,))
    return _staged(grid, tokens, traits) if staged_us <= decoded_us else _decoded(grid)


def portable_config(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> PortableConfig:
    """Configuration of one pass with 1 to 32 tokens on a GPU other than Hopper."""
    tile = next(tile for tile in _PORTABLE_TILES if tile >= tokens)
    x_nbytes = _PORTABLE_WARPS * tile * BLOCK_COLS * 2
    ring_at = x_nbytes + _PORTABLE_WARPS * _PORTABLE_NOTES * 8 + _scratch_nbytes(grid, grid.blocks_k, tile) + 16

    def ring_nbytes(shared: int) -> int:
        return min(_MOST_RING_NBYTES, (shared - ring_at - OFFSET_UNIT) // _PORTABLE_WARPS // OFFSET_UNIT * OFFSET_UNIT)

    # With more tokens registers leave no room for two.
    ctas_a_sm, ring = 2, ring_nbytes((traits.shared_nbytes - _SHARED_RESERVED_NBYTES) // 2)
    if ring < _BLOCK_BUFFER_NBYTES or tile > 16:
        ctas_a_sm, ring = 1, ring_nbytes(traits.shared_nbytes)
    return PortableConfig(
        arch=code_arch(traits.capability),
        tokens=tile,
        ctas=min(traits.sm_count * ctas_a_sm, grid.chunks),
        ring_at=ring_at,
        ring_nbytes=ring,
        shared_nbytes=ring_at + _PORTABLE_WARPS * ring + OFFSET_UNIT,  # a lane may read past the last value
    )


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


Plan = Fused | Staged | Decoded


def alternatives(grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits, ranges: int = 0) -> dict[str, Plan]:
    """All that can compute x W^T for x of the values' dtype, by name; `choose` takes one of these.

    Args:
        grid: how the weight is cut.
        nnz: its nonzeros.
        tokens: rows of x.
        traits: of the device.
        ranges: as of `choose`.
    """
    found: dict[str, Plan] = {}
    if traits.hopper:
        by_cost = ranges == range_count(grid, traits)
        can_split = grid.chunks_k >= 2 and traits.sm_count >= 2
        if tokens <= _MAX_NARROW:
            config = hopper_config(grid, nnz, tokens, traits, split=1, by_cost=by_cost)
            found["ranges"] = Fused(tokens, (config,))
        if can_split and tokens <= (_NARROW_TILES[-1] if grid.blocks_m == 2 else _MAX_NARROW):
            found["pairs"] = Fused(tokens, (hopper_config(grid, nnz, tokens, traits, split=2),))
        if _MAX_NARROW < tokens <= MOST_FUSED_TOKENS:
            wide = wide_config(grid, nnz, tokens, traits, split=1, twins=1, by_cost=by_cost)
            found["wide ranges"] = Fused(tokens, (wide,))
            if can_split and wide.passes == 1:
                config_of_pairs = wide_config(grid, nnz, tokens, traits, split=2, twins=1)
                found["wide pairs"] = Fused(tokens, (config_of_pairs,))
            if grid.blocks_m == 2 and tokens > _MANY:
                found["twins"] = Fused(tokens, (wide_config(grid, nnz, tokens, traits, split=1, twins=2),))
        if tokens > _MAX_NARROW:
            found["staged"] = _staged(grid, tokens, traits)
    elif tokens <= MOST_FUSED_TOKENS:
        found["portable"] = _portable(grid, tokens, traits)
    found["decoded"] = _decoded(grid)
    return found


def _portable(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> Fused:
    step = _PORTABLE_TILES[-1]
    return Fused(step, tuple(portable_config(grid, min(step, tokens - i), traits) for i in range(0, tokens, step)))


def _staged(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> Staged:
    row_nbytes, blocks_a_panel = grid.chunk_rows * grid.in_features * 2, PANEL_ROWS // grid.chunk_rows
    step = max(1, _WORKSPACE_NBYTES // (row_nbytes * blocks_a_panel)) * blocks_a_panel
    return Staged(
        tuple(
            staged_config(grid, first, min(step, grid.row_blocks - first), tokens, traits)
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
        tuned: what was measured to be faster than the choice made here: names of `alternatives`, by `TUNED_TOKENS`.
    """
    if not same_dtype:
        return _decoded(grid)
    name = tuned.get(next((each for each in TUNED_TOKENS if each >= tokens), 0)) if tuned else None
    if name is not None:
        plan = alternatives(grid, nnz, tokens, traits, ranges).get(name)
        if plan is not None:
            return plan
    if not traits.hopper:
        return _portable(grid, tokens, traits) if tokens <= _MOST_PORTABLE else _decoded(grid)
    by_cost = ranges == range_count(grid, traits)
    if tokens > _WIDE_TILES[-1]:
        return _many_tokens(grid, nnz, tokens, traits, by_cost)
    if _narrow_pays(grid, nnz, tokens, traits, by_cost):
        return Fused(tokens, (hopper_config(grid, nnz, tokens, traits, by_cost=by_cost),))
    return Fused(tokens, (wide_config(grid, nnz, tokens, traits, by_cost=by_cost),))


def code_arch(capability: tuple[int, int]) -> str:
    """What to compile for: Hopper's own instructions on 9.0, the exact architecture elsewhere."""
    return "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"
