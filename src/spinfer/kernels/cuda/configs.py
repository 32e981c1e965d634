"""Configurations of the CUDA kernels: how work is laid out on a device. Pure; select.py says which to use."""

from __future__ import annotations

from dataclasses import dataclass

from spinfer.kernels.cuda.layout import BLOCK_COLS, BLOCK_ROWS, MAX_CHUNK_NBYTES, OFFSET_UNIT, ChunkGrid

MAX_NARROW = 40
"""Up to so many tokens csrc/matmul_sm90.cu takes weights of any shape, without pairs too; with more it would spill but
for pairs with chunks of 64 rows."""

NARROW_TILES = (8, 16, 24, 32, 40, 48)

_NARROW_SCRATCH_NBYTES = 16 * 1024
"""What its 16 warps add up through at a time: 8 tokens of 32 rows each."""

WIDE_TILES = tuple(range(48, 321, 16))
_FEW, MANY, MOST_OF_TWINS = 64, 128, 288
"""Up to _FEW tokens a pass 16 warps of one tile are as fast as 8 of two, or up to 3 % faster; but with chunks of 64
rows 8 of one tile are faster than 16, by 3 to 5 % (H200, 50 to 70 %, nine shapes). Beyond MANY 8 warps hold one tile
each, and chunks of 64 rows go to twins, or to passes of MANY. Of more than MOST_OF_TWINS tokens their four boxes would
leave no room for a dense chunk."""

MOST_COPIED_TOKENS = 256
"""What one copy by TMA may have of x, and one wgmma."""

IN_FLIGHT = 2
"""Copies of the weight outstanding at a time; 1 and 3 are slower (docs/kernel.md)."""

CHUNKS_WANTED, _CHUNKS_LEAST = 4.02, 3.5
"""Chunks of the weight that the ring should hold; worth more than further boxes of x in csrc/matmul_wide_sm90.cu. On an
H100 28672 x 8192 at 50 % and 64 tokens takes 117.7 us with 3.8 chunks and 10 boxes, 106.9 with 4.3 and 8. Where four do
not fit all the same, or chunks have 64 rows, fewer boxes cost 3 to 8 %; with less than three it takes 4 to 20 % longer
(docs/kernel.md)."""

PORTABLE_TILES = (8, 16, 32)
_PORTABLE_WARPS, _PORTABLE_NOTES = 8, 4
BLOCK_BUFFER_NBYTES = 256 + BLOCK_ROWS * BLOCK_COLS * 2 + 32
"""What a warp needs for a dense block in csrc/block_copy.cuh: kBlockBuffer."""

_MOST_RING_NBYTES = 4 * BLOCK_BUFFER_NBYTES
"""Three dense blocks, and what is left at the end of the ring."""

_SHARED_RESERVED_NBYTES = 1024
"""What the driver takes of each block's shared memory: an SM has so much more than one block can use."""

PANEL_ROWS = 128
STAGED_TILES = tuple(range(144, 257, 16))
"""Rows of a tile of csrc/matmul_staged_sm90.cu, kRows, and how many tokens one may have, kTileTokens."""

_TOKEN_GROUP = 2560
"""Most tokens that all panels are multiplied with before the next ones, whose x L2 keeps. Groups are of about the same
size: for a last one of a single tile the whole weight was read again (4096 x 14336 by 15 tiles of 144 tokens, an H200:
446 us with groups of 14 and 1, 416 with 15)."""

_MOST_SHARES = 4

_BARRIER_NBYTES = 1024

_LINES_NBYTES = 4096
"""What a warpgroup of csrc/matmul_wide_sm90.cu writes y by way of: kLinesBytes."""


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
class RingConfig:
    """What both of Hopper's kernels have that copy chunks into a ring in shared memory.

    Attributes:
        tokens: columns of a pass over the weight, a compile-time constant.
        split: CTAs of a cluster, which share row blocks along k; 1 for ranges of chunks that CTAs share by chance.
        by_cost: whether ranges are those made when the weight was packed; else they are equally long.
        ctas: how many.
        boxes: places for x in shared memory.
        ring_at: where the weight is in shared memory, in bytes.
        ring_nbytes: how much of it.
        shared_nbytes: shared memory in all.
        in_flight: copies of the weight outstanding at a time.
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
class HopperConfig(RingConfig):
    """One pass of csrc/matmul_sm90.cu. A box is of a chunk's columns of x; there are 2, 4 or 8 (kSlots of sm90.cuh)."""


@dataclass(frozen=True)
class WideConfig(RingConfig):
    """csrc/matmul_wide_sm90.cu: all passes over the weight in one launch.

    A box is of 64 columns of x; there are a multiple of the warps along k, and two for each at least. A split is of one
    row block for each pair.

    Attributes:
        warps: that multiply, a compile-time constant.
        bands: of 16 rows that each of them takes, likewise.
        twins: CTAs of a cluster that take row blocks one above the other and share the copies of x.
        passes: over the weight.
    """

    warps: int
    bands: int
    twins: int
    passes: int


@dataclass(frozen=True)
class StagedConfig:
    """One launch of csrc/matmul_staged_sm90.cu; all but the first and the last two are fields of its StagedArgs.

    Attributes:
        tile: tokens of a tile, a compile-time constant.
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

    tile: int
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


def most_narrow(grid: ChunkGrid, split: int) -> int:
    """Tokens that csrc/matmul_sm90.cu can take at most, with `split` of `RingConfig`."""
    return NARROW_TILES[-1] if split > 1 and grid.blocks_m == 2 else MAX_NARROW


def range_count(grid: ChunkGrid, traits: DeviceTraits) -> int:
    """Ranges of chunks that one pass over a weight is dealt out in on Hopper, one a CTA."""
    return min(traits.sm_count, grid.chunks)


def hopper_config(
    grid: ChunkGrid, nnz: int, tokens: int, traits: DeviceTraits, *, split: int = 1, by_cost: bool = False
) -> HopperConfig:
    """Configuration of csrc/matmul_sm90.cu: 1 to `most_narrow` tokens.

    Args:
        grid: how the weight is cut.
        nnz: its nonzeros.
        tokens: N.
        traits: of the device.
        split: of `HopperConfig`.
        by_cost: likewise; without pairs.
    """
    tile = next(tile for tile in NARROW_TILES if tile >= tokens)
    x_nbytes = grid.blocks_k * tile * 128
    fixed = _BARRIER_NBYTES + _NARROW_SCRATCH_NBYTES + (split - 1) * grid.chunk_rows * tile * 4
    room = traits.shared_nbytes - fixed
    chunk = grid.mean_chunk_nbytes(nnz)
    # Two more boxes are worth 1 to 4 % where five chunks of the weight still fit; where four do not, they cost up to
    # 20 %. A dense chunk has to fit, or its copy would wait for ever.
    boxes = 4 if room - 4 * x_nbytes >= max(5 * chunk, MAX_CHUNK_NBYTES) else 2
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
        in_flight=IN_FLIGHT,
    )


def wide_config(
    grid: ChunkGrid,
    nnz: int,
    tokens: int,
    traits: DeviceTraits,
    *,
    split: int = 1,
    twins: int = 1,
    by_cost: bool = False,
) -> WideConfig:
    """Configuration of csrc/matmul_wide_sm90.cu.

    Args:
        grid: how the weight is cut.
        nnz: its nonzeros.
        tokens: N.
        traits: of the device.
        split: of `WideConfig`; 2 for a single pass without twins.
        twins: likewise.
        by_cost: likewise, where it can be: in one pass, without pairs and twins.
    """
    most = WIDE_TILES[-1] if grid.blocks_m > 2 else MOST_OF_TWINS if twins > 1 else MANY
    tiles = [tile for tile in WIDE_TILES if tile <= most]
    each = -(-tokens // -(-tokens // tiles[-1]))
    tile = next(tile for tile in tiles if tile >= each)
    box = tile * 128
    warps = 16 if tile <= _FEW and grid.blocks_m > 2 else 8
    bands = 1 if warps == 16 or grid.blocks_m == 2 or tile > MANY else 2
    warps_k = warps // (2 * grid.blocks_m // bands)
    passes = -(-tokens // tile)
    fixed = _BARRIER_NBYTES + (warps // 4 * _LINES_NBYTES if split == 1 else 0)  # finish_bytes of csrc/wide_finish.cuh
    room = traits.shared_nbytes - fixed
    chunk = grid.mean_chunk_nbytes(nnz)
    four_fit = grid.blocks_m > 2 and room - 4 * box >= CHUNKS_WANTED * chunk
    wanted = max(MAX_CHUNK_NBYTES, int((CHUNKS_WANTED if four_fit else _CHUNKS_LEAST) * chunk))
    # Warps give a box back when they have the next one: with a box each, all would wait for ever. And the copy before
    # in a box must be one that the same warps have seen land: a barrier tells the last phase alone from this one. With
    # 5 boxes for 4 warps results were wrong (4096 x 14336, 30 %, 64 tokens: by 0.045).
    boxes = max(3, 2 * warps_k, min(12, (room - wanted) // box)) // warps_k * warps_k
    ring_at = fixed + boxes * box
    ring = (traits.shared_nbytes - ring_at) // 128 * 128
    strips = passes * -(-grid.row_blocks // twins)  # of twins
    return WideConfig(
        tokens=tile,
        warps=warps,
        bands=bands,
        split=split,
        twins=twins,
        by_cost=by_cost and passes == split == twins == 1,
        passes=passes,
        ctas=twins * min(traits.sm_count // twins, strips * grid.chunks_k) if split == 1 else split * grid.row_blocks,
        boxes=boxes,
        ring_at=ring_at,
        ring_nbytes=ring,
        shared_nbytes=ring_at + ring,
        in_flight=IN_FLIGHT,
    )


def staged_config(
    grid: ChunkGrid, first_row_block: int, row_blocks: int, tokens: int, traits: DeviceTraits, *, tile: int
) -> StagedConfig:
    """Configuration of one launch of the kernel that stages the weight.

    Tiles that would leave more than half of the CTAs idle in a last round are shared along K.

    Args:
        grid: how the weight is cut.
        first_row_block: chunk along M to begin with, a multiple of a panel's.
        row_blocks: how many.
        tokens: N.
        traits: of the device.
        tile: of `StagedConfig`, one of STAGED_TILES.
    """
    blocks_a_panel = PANEL_ROWS // grid.chunk_rows
    panels, token_tiles = -(-row_blocks // blocks_a_panel), -(-tokens // tile)
    token_group = -(-token_tiles // -(-token_tiles * tile // _TOKEN_GROUP))
    tiles = panels * token_tiles
    rest = tiles % traits.sm_count
    shares = max(1, min(_MOST_SHARES, traits.sm_count // rest, grid.chunks_k)) if rest else 1
    whole = tiles - rest if shares > 1 else tiles
    return StagedConfig(
        tile=tile,
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


def portable_config(grid: ChunkGrid, tokens: int, traits: DeviceTraits) -> PortableConfig:
    """Configuration of one pass with 1 to 32 tokens on a GPU other than Hopper."""
    tile = next(tile for tile in PORTABLE_TILES if tile >= tokens)
    x_nbytes = _PORTABLE_WARPS * tile * BLOCK_COLS * 2
    sums_nbytes = (grid.blocks_k - 1) * grid.blocks_m * 2 * 512  # what sum_warps has
    ring_at = x_nbytes + _PORTABLE_WARPS * _PORTABLE_NOTES * 8 + sums_nbytes + 16

    def ring_nbytes(shared: int) -> int:
        return min(_MOST_RING_NBYTES, (shared - ring_at - OFFSET_UNIT) // _PORTABLE_WARPS // OFFSET_UNIT * OFFSET_UNIT)

    # With more tokens registers leave no room for two.
    ctas_a_sm, ring = 2, ring_nbytes((traits.shared_nbytes - _SHARED_RESERVED_NBYTES) // 2)
    if ring < BLOCK_BUFFER_NBYTES or tile > 16:
        ctas_a_sm, ring = 1, ring_nbytes(traits.shared_nbytes)
    return PortableConfig(
        arch=code_arch(traits.capability),
        tokens=tile,
        ctas=min(traits.sm_count * ctas_a_sm, grid.chunks),
        ring_at=ring_at,
        ring_nbytes=ring,
        shared_nbytes=ring_at + _PORTABLE_WARPS * ring + OFFSET_UNIT,  # a lane may read past the last value
    )


def code_arch(capability: tuple[int, int]) -> str:
    """What to compile for: Hopper's own instructions on 9.0, the exact architecture elsewhere."""
    return "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"
