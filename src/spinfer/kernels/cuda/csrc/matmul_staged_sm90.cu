// y = x W^T + bias on Hopper for so many tokens that several tiles of y use each weight: it is decoded once, into a staging
// buffer in global memory, by warps beside those that multiply, in the order in which it is wanted.
//
// One CTA an SM. A warp copies x and staged weights into a ring, two warpgroups multiply 128 rows of W by up to 256 tokens, three
// warps decode. Whole rounds of tiles are dealt out evenly; where the last round has few, several CTAs share a tile along k,
// and the last of them to arrive adds up their sums, in their order.
//
// Tickets give the decoding warps their units. A unit that a CTA waits for is being decoded by a warp that waits for nothing,
// or comes after the units that such warps, this CTA's among them, take next: no CTA needs another one to be resident.
#include "block_copy.cuh"
#include "common.cuh"
#include "decode_scan.cuh"
#include "layout.cuh"
#include "lines.cuh"
#include "sm90.cuh"
#include "wgmma.cuh"

// Of a tile: rows of W, and tokens.
#ifndef SPINFER_TILE_TOKENS
#define SPINFER_TILE_TOKENS 256
#endif
constexpr int kRows = 128, kTileTokens = SPINFER_TILE_TOKENS, kTokenTiles = kTileTokens / 8;
static_assert(kTileTokens % 16 == 0 && kTileTokens <= 256);
constexpr int kConsumerWarps = 8, kDecoders = 3;
constexpr int kConsumers = kConsumerWarps * 32, kThreads = kConsumers + 32 + kDecoders * 32;
// consumers x registers + the others x registers <= threads x registers at launch, or the kernel would hang.
constexpr int kConsumerRegisters = 200, kOtherRegisters = 104;

struct StagedArgs {
  const u8* weight;    // chunks
  const i32* offsets;  // of the first row block, in kOffsetUnit
  u8* staging;         // [panels][steps][kRows][128 bytes]: rows of 64 weights, swizzled as wgmma reads them
  float4* partials;    // [shared tiles][shares][kTokenTiles][kConsumers]
  u32* counters;       // all zero between launches: tickets, warps that are through, 2 unused, [panels][chunks_k] decoded units,
                       // [shared tiles] arrivals
  u16* y;              // (tokens, y_stride)
  const u16* bias;     // [rows] or null
  i32 y_stride, tokens, rows;
  i32 chunks_k, row_blocks;
  i32 steps;            // of 64 columns
  i32 panels;           // of kRows rows
  i32 token_tiles;      // of kTileTokens
  i32 token_group;      // token tiles that all panels are multiplied with before the next ones
  i32 row_block_group;  // row blocks that are decoded side by side
  i32 whole;            // tiles that one CTA computes
  i32 shares;           // CTAs of each of the others
};
__device__ __forceinline__ i32 y_stride_of(const StagedArgs& p) { return p.y_stride; }
__device__ __forceinline__ i32 rows_of(const StagedArgs& p) { return p.rows; }
struct StagedLaunchArgs {
  TensorMap x_map;
  StagedArgs staged;
};

constexpr u32 kXBytes = kTileTokens * 128, kWBytes = kRows * 128, kStageBytes = kXBytes + kWBytes;
constexpr int kBuffers = 3;
constexpr u32 kBlockBytes = kBlockRows * 128, kDecodeBytes = kBuffers * kBlockBuffer + 2 * kBlockBytes;
constexpr u32 kLinesAt = 256, kLineBytes = kLinesBytes / 2;  // the latter of one buffer of a warpgroup
__device__ constexpr u32 decode_at(int buffers) { return kLinesAt + kConsumerWarps / 4 * buffers * kLineBytes; }
__device__ constexpr u32 stage_at(int buffers) { return (decode_at(buffers) + kDecoders * kDecodeBytes + 1023) / 1024 * 1024; }
__device__ constexpr int stages(int buffers) { return static_cast<int>((227 * 1024 - stage_at(buffers)) / kStageBytes); }
// One where that makes room for a stage: with 3 of them 192 tokens take 9 % longer (28672 x 8192, an H200).
constexpr int kLineBuffers = stages(1) > stages(2) ? 1 : 2, kStages = stages(kLineBuffers);
constexpr u32 kDecodeAt = decode_at(kLineBuffers), kStageAt = stage_at(kLineBuffers);
constexpr u32 kFilled = 0, kDrained = kFilled + 8 * kStages, kCopied = kDrained + 8 * kStages;
constexpr u32 kLast = kCopied + 8 * kBuffers * kDecoders;
static_assert(kLast + 4 <= kLinesAt && kBlockBuffer % 16 == 0 && kStages >= 3);

// A tile of y, and its steps that are this CTA's.
struct Item {
  i32 panel, token_tile;
  i32 begin, end;
  i32 shared, share;  // which shared tile it is, or -1
};
struct Items {
  const StagedArgs& p;
  const i32 cta = static_cast<i32>(blockIdx.x), ctas = static_cast<i32>(gridDim.x);
  const i32 rest;  // shared tiles

  __device__ __forceinline__ explicit Items(const StagedArgs& p) : p(p), rest(p.panels * p.token_tiles - p.whole) {}
  __device__ __forceinline__ i32 count() const { return (p.whole - cta + ctas - 1) / ctas + (cta < rest * p.shares); }
  __device__ __forceinline__ Item at(i32 i) const {
    i32 tile = cta + i * ctas;
    Item item = {0, 0, 0, p.steps, -1, 0};
    if (tile >= p.whole) {
      item.shared = cta % rest;
      item.share = cta / rest;
      tile = p.whole + item.shared;
      item.begin = item.share * p.chunks_k / p.shares * kBlocksK;
      item.end = min(p.steps, (item.share + 1) * p.chunks_k / p.shares * kBlocksK);
    }
    const i32 first = tile / (p.panels * p.token_group) * p.token_group, width = min(p.token_group, p.token_tiles - first);
    const i32 within = tile - p.panels * first;
    item.panel = within / width;
    item.token_tile = first + within % width;
    return item;
  }
};

// Four blocks of a chunk, one or two columns of blocks, that a warp decodes.
constexpr int kUnitBlocks = 4, kUnits = kBlocks / kUnitBlocks, kUnitCols = kUnitBlocks / kBlocksM;
constexpr int kRowBlocksAPanel = kRows / kChunkRows;
struct Unit {
  i32 chunk, block;  // the first of its blocks
  i32 ready;         // index of its counter
  i64 to;            // in the staging buffer
};
__device__ __forceinline__ i32 unit_count(const StagedArgs& p) { return p.row_blocks * p.chunks_k * kUnits; }
__device__ __forceinline__ u32* ready_at(const StagedArgs& p, i32 i) { return p.counters + 4 + i; }
// A warp that counts units, or waits for them, is through; the last one sets their counters to zero.
__device__ __forceinline__ void clear_after_all(const StagedArgs& p) {
  const int lane = threadIdx.x & 31;
  bool last = false;
  __syncwarp();
  if (lane == 0) last = arrives_last(p.counters + 1, gridDim.x * (kDecoders + 1));
  if (!__shfl_sync(~0u, last, 0)) return;
  for (i32 i = lane; i < 4 + p.panels * p.chunks_k; i += 32) p.counters[i] = 0;
}
// The row blocks of a group side by side, along k; then the next group.
__device__ __forceinline__ Unit unit_at(const StagedArgs& p, i32 ticket) {
  const i32 units_a_group = p.row_block_group * p.chunks_k * kUnits;
  const i32 group = ticket / units_a_group, first = group * p.row_block_group, within = ticket - group * units_a_group;
  const i32 width = min(p.row_block_group, p.row_blocks - first);
  i32 k = within / (width * kUnits);
  const i32 rest = within % (width * kUnits);
  // Where shares of tiles come first, all of them are decoded from their beginnings.
  if (p.whole == 0 && p.chunks_k % p.shares == 0) k = k % p.shares * (p.chunks_k / p.shares) + k / p.shares;
  const i32 row_block = first + rest / kUnits, unit = rest % kUnits, panel = row_block / kRowBlocksAPanel;
  const i64 tile = static_cast<i64>(panel) * p.chunks_k * kBlocksK + k * kBlocksK + unit * kUnitCols;
  return {row_block * p.chunks_k + k, unit * kUnitBlocks, panel * p.chunks_k + k,
          tile * kWBytes + row_block % kRowBlocksAPanel * kChunkRows * 128};
}

// One warp that decodes. While it selects a block's values it opens the next one and copies the one after that; and it looks up
// what the next unit needs, a step a block: ticket, offset of the chunk, where its values are.
struct Decoding {
  const StagedArgs& p;
  const u32 buffers, copied;  // shared memory and barriers of this warp
  const int lane;
  i32 ticket = 0;  // lane 0: of the unit after the ones known
  Unit unit = {}, next = {};
  const u8 *chunk = nullptr, *next_chunk = nullptr;
  // Lane i, for block i of the unit: where its two tiles' values are (tile 1 in the high half); lane kUnitBlocks: where they end.
  u32 header = 0, next_header = 0;
  u32 end = 0, next_end = 0;  // where the chunk's values end
  i32 offset = 0, offset_end = 0;  // of the next unit's chunk
  TileOpener<2, true> opener;
  OpenTiles<2> open;
  u32 raw[2][8];

  __device__ __forceinline__ Decoding(const StagedArgs& p, const u32 buffers, const u32 copied, int lane)
      : p(p), buffers(buffers), copied(copied), lane(lane), opener(lane) {}
  __device__ __forceinline__ void take_ticket() {
    // Not atomicAdd: the compiler would have all lanes wait for it at once.
    if (lane == 0) asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(p.counters) : "memory");
  }
  __device__ __forceinline__ void find_next() {
    const i32 mine = __shfl_sync(~0u, ticket, 0);
    next.chunk = -1;
    if (mine >= unit_count(p)) return;
    next = unit_at(p, mine);
    take_ticket();
    offset = __ldg(p.offsets + next.chunk);
    offset_end = __ldg(p.offsets + next.chunk + 1);
  }
  __device__ __forceinline__ void look_up_next() {
    if (next.chunk < 0) return;
    next_chunk = p.weight + static_cast<i64>(offset) * kOffsetUnit;
    next_end = static_cast<u32>(offset_end - offset) * kOffsetUnit - kValuesAt;
    const int block = next.block + min(lane, kUnitBlocks);
    if (block < kBlocks) next_header = __ldg(reinterpret_cast<const u32*>(next_chunk) + block);
  }
  __device__ __forceinline__ void advance() {
    unit = next;
    chunk = next_chunk;
    header = next_header;
    end = next_end;
  }
  // Copies masks and values of block i of the unit that the other arguments are of.
  __device__ __forceinline__ void copy(const u8* from, int block, u32 headers, u32 end, int i, int buffer) const {
    const u32 begin = __shfl_sync(~0u, headers, i) & 0xfff0u, next = __shfl_sync(~0u, headers, i + 1) & 0xffffu;
    // The end of a chunk's last block includes padding; a block holds no more than its weights.
    const u32 stop = block + i + 1 < kBlocks ? next : min(end, begin + kBlockRows * kBlockCols * 2 + 16);
    if (lane == 0) {
      const u32 to = buffers + buffer * kBlockBuffer, barrier = copied + 8 * buffer, bytes = (stop - begin + 15) & ~15u;
      mbarrier_expect(barrier, kMaskCopy + bytes);
      copy_bulk(to, from + kHeaderBytes + (block + i) * kMaskCopy, kMaskCopy, barrier);
      copy_bulk(to + kMaskCopy, from + kValuesAt + begin, bytes, barrier);
    }
  }
  __device__ __forceinline__ static void copy_bulk(u32 to, const u8* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
        : "memory");
  }
  // Begins to open a block with this header, or an empty one.
  __device__ __forceinline__ void begin_open(bool there, u32 header, int buffer, u32 parity) {
    const u32 from = buffers + buffer * kBlockBuffer;
    uint2 masks = make_uint2(0, 0);
    if (there) {
      mbarrier_wait(copied + 8 * buffer, parity);
      masks = lds_v2(from + lane * 8);
    }
    opener.tiles.mask[0] = masks.x;
    opener.tiles.mask[1] = masks.y;
    opener.tiles.base[0] = from + kMaskCopy + (header & 15u);
    opener.tiles.base[1] = from + kMaskCopy + (there ? (header >> 16) - (header & 0xfff0u) : 0);
    opener.count();
  }
  __device__ __forceinline__ void end_open() {
    open = opener.tiles;
    open.gather(raw, 0);
  }
  __device__ __forceinline__ void run() {
    const int row = lane & 7;
    // stmatrix: this lane's row in the four 8 x 8 matrices of 16 rows x 16 columns.
    const u32 stored = buffers + kBuffers * kBlockBuffer, store = stored + ((lane >> 3 & 1) * 8 + row) * 128;
    take_ticket();
    find_next();
    if (next.chunk < 0) return;
    look_up_next();
    advance();
    copy(chunk, unit.block, header, end, 0, 0);
    copy(chunk, unit.block, header, end, 1, 1);
    begin_open(true, __shfl_sync(~0u, header, 0), 0, 0);
    opener.scan_all();
    opener.finish();
    end_open();
    i32 decoded = -1;          // counter of the unit before
    int after = 1, ahead = 2;  // buffers of the next block and of the one after it
    u32 parity = 0;            // of the next block's
    while (true) {
#pragma unroll 1
      for (int i = 0; i < kUnitBlocks; i++) {
        if (i == 0) find_next();
        if (i == 1) look_up_next();
        const bool ours = i + 1 < kUnitBlocks;
        if (i + 2 < kUnitBlocks) {
          copy(chunk, unit.block, header, end, i + 2, ahead);
        } else if (next.chunk >= 0) {
          copy(next_chunk, next.block, next_header, next_end, i + 2 - kUnitBlocks, ahead);
        }
        const u32 to = i % 2 * kBlockBytes;
        // The block before the last one has left its tile.
        if (lane == 0) {
          if (i == 1 && decoded >= 0) {
            say_ready<1>(decoded);
          } else {
            asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
          }
        }
        begin_open(ours || next.chunk >= 0, __shfl_sync(~0u, ours ? header : next_header, (i + 1) % kUnitBlocks), after, parity);
#pragma unroll
        for (int s = 0; s < 4; s++) {
          u32 f[2][4];
#pragma unroll
          for (int r = 0; r < 2; r++) open.select(f[r], raw, r, s);
          if (s < 3) {
            open.gather(raw, s + 1);
          } else {
            end_open();
          }
#pragma unroll
          for (int r = 0; r < 2; r++) stmatrix_x4(store + to + r * 16 * 128 + ((2 * s + (lane >> 4)) ^ row) * 16, f[r]);
          if (s == 0) opener.scan<1>(), opener.scan<2>();
          if (s == 1) opener.scan<4>(), opener.scan<8>();
          if (s == 2) opener.scan<16>(), opener.finish();
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0) {
          const u8* out = p.staging + unit.to + i / kBlocksM * kWBytes + i % kBlocksM * kBlockBytes;
          asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out), "r"(stored + to), "n"(kBlockBytes)
                       : "memory");
          asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
        if (after == kBuffers - 1) parity ^= 1;
        after = ahead;
        ahead = ahead == kBuffers - 1 ? 0 : ahead + 1;
      }
      decoded = unit.ready;
      if (next.chunk < 0) break;
      advance();
    }
    if (lane == 0) say_ready<0>(decoded);
  }
  // Counts a unit as decoded when all but the latest kPending blocks are in global memory.
  template <int kPending>
  __device__ __forceinline__ void say_ready(i32 which) const {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(ready_at(p, which)) : "memory");
  }
};

// Copies x and the staged weight; one lane runs it.
__device__ __forceinline__ void produce(const StagedArgs& p, const TensorMap* map, const u32 start) {
  int stage = 0;
  u32 parity = 1;  // the first pass over the stages finds them drained
  const Items items(p);
  const i32 count = items.count();
  for (i32 i = 0; i < count; i++) {
    const Item item = items.at(i);
    const u8* from = p.staging + (static_cast<i64>(item.panel) * p.chunks_k * kBlocksK + item.begin) * kWBytes;
    const u32 wanted = min(kRowBlocksAPanel, p.row_blocks - item.panel * kRowBlocksAPanel) * kUnits;
    for (i32 s = item.begin; s < item.end; s++) {
      if (s % kBlocksK == 0) {
        const u32* ready = ready_at(p, item.panel * p.chunks_k + s / kBlocksK);
        u32 have;
        while (true) {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(have) : "l"(ready) : "memory");
          if (have >= wanted) break;
          __nanosleep(100);
        }
        asm volatile("fence.proxy.async.global;" ::: "memory");
      }
      const u32 filled = start + kFilled + 8 * stage, x = start + kStageAt + stage * kStageBytes, w = x + kXBytes;
      mbarrier_wait(start + kDrained + 8 * stage, parity);
      mbarrier_expect(filled, kStageBytes);
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(x),
          "l"(map), "r"(s * 64), "r"(item.token_tile * kTileTokens), "r"(filled)
          : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(w),
                   "l"(from), "n"(kWBytes), "r"(filled)
                   : "memory");
      from += kWBytes;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }
}

// What one warp multiplies: 16 rows of W of each tile.
struct Multiplying {
  const StagedArgs& p;
  const u32 start;  // of shared memory
  const int warp, lane;
  u32 turn = 0;  // where in its warpgroup's buffers the lines go that are written next
  float acc[kTokenTiles][4];

  __device__ __forceinline__ Multiplying(const StagedArgs& p, const u32 start, int warp, int lane)
      : p(p), start(start), warp(warp), lane(lane) {}
  __device__ __forceinline__ void give_back(int stage) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(start + kDrained + 8 * stage);
  }
  __device__ __forceinline__ void run() {
    int stage = 0;
    u32 parity = 0;
    const Items items(p);
    const i32 count = items.count();
    for (i32 i = 0; i < count; i++) {
      const Item item = items.at(i);
      int held = -1;  // the stage that products may still read
#pragma unroll 1
      for (i32 s = item.begin; s < item.end; s++) {
        const u32 x = start + kStageAt + stage * kStageBytes;
        const u64 a = wgmma_descriptor(x + kXBytes + (warp >> 2) * 64 * 128), b = wgmma_descriptor(x);
        mbarrier_wait(start + kFilled + 8 * stage, parity);
        wgmma_fence();
        wgmma(acc, a, b, s - item.begin);
        wgmma_commit();
        // With one product queued behind them the stage before is given back as soon as its own are through.
        wgmma_wait<1>();
        if (held >= 0) give_back(held);
        wgmma_fence();
#pragma unroll
        for (int k = 1; k < 4; k++) wgmma(acc, a + 2 * k, b + 2 * k, 1);
        wgmma_commit();
        held = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      give_back(held);
      if (item.shared < 0 || add_up(item)) store(item.panel * kRows + (warp >> 2) * 64, item.token_tile * kTileTokens);
    }
  }
  // Adds up the shares of a tile in their order, in the CTA that arrives last; whether that is this one.
  __device__ __forceinline__ bool add_up(const Item& item) {
    auto at = [&](i32 share) {
      return p.partials + (static_cast<i64>(item.shared) * p.shares + share) * kTokenTiles * kConsumers + warp * 32 + lane;
    };
    float4* mine = at(item.share);
#pragma unroll
    for (int n = 0; n < kTokenTiles; n++) __stcg(mine + n * kConsumers, as_float4(acc[n]));
    named_barrier<1>(kConsumers);
    if (threadIdx.x == 0) {
      sts_u32(start + kLast, arrives_last(ready_at(p, p.panels * p.chunks_k + item.shared), p.shares));
    }
    named_barrier<1>(kConsumers);
    if (!lds_u32(start + kLast)) return false;
#pragma unroll
    for (int n = 0; n < kTokenTiles; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[n][e] = 0.f;
#pragma unroll 1
    for (i32 share = 0; share < p.shares; share++) {
      const float4* from = at(share);
#pragma unroll
      for (int n = 0; n < kTokenTiles; n++) add(acc[n], __ldcg(from + n * kConsumers));
    }
    return true;
  }
  // Writes this warpgroup's 64 rows of the tile.
  __device__ __forceinline__ void store(const i32 row, const i32 token) {
    const u32 lines = start + kLinesAt + (warp >> 2) * kLineBuffers * kLineBytes;
    const float2 bias[1] = {bias_of(p, row + (warp & 3) * 16, lane)};
#pragma unroll
    for (int n = 0; n < kTokenTiles; n += 2) {
      const float4 v[2] = {as_float4(acc[n]), as_float4(acc[n + 1])};
      store_lines<1>(p, row, token + n * 8, p.tokens, v, bias, lines + turn, warp, lane);
      if (kLineBuffers == 2) {
        turn ^= kLineBytes;
      } else {
        group_barrier(warp);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) spinfer_matmul_staged(const __grid_constant__ StagedLaunchArgs args) {
  extern __shared__ __align__(1024) u8 memory[];
  const StagedArgs& p = args.staged;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 start = smem_address(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(start + kFilled + 8 * i, 1);
      mbarrier_init(start + kDrained + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < kBuffers * kDecoders; i++) mbarrier_init(start + kCopied + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  wait_for_predecessor();
  if (warp == kConsumerWarps) start_successors();
  if (warp >= kConsumerWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kOtherRegisters));
    const int decoder = warp - kConsumerWarps - 1;
    if (decoder >= 0) {
      Decoding(p, start + kDecodeAt + decoder * kDecodeBytes, start + kCopied + 8 * kBuffers * decoder, lane).run();
    } else if (lane == 0) {
      produce(p, &args.x_map, start);
    }
    clear_after_all(p);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    Multiplying(p, start, warp, lane).run();
  }
}
