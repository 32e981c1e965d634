// y = x W^T + bias on any GPU from compute capability 8.0 on: cp.async and mma.m16n8k16, nothing newer.
//
// Eight warps a CTA; of every chunk of the range each takes two blocks that lie below each other, so that one copy of their 64
// columns of x serves both. A warp copies everything it needs itself and waits for no other before the end of a segment:
//   blocks  into a ring of bytes of its own, up to two ahead of the one it multiplies, as far as they fit: a dense block always
//           does, sparse ones take only what they need;
//   x       into one buffer, for the next chunk as soon as that of this one is in registers.
#include "block_copy.cuh"
#include "common.cuh"
#include "decode.cuh"
#include "layout.cuh"
#include "matmul.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kPair = 2;  // blocks of a chunk that a warp takes: 2 warp and the one below
constexpr int kWarpsM = kBlocksM / kPair, kWarpsK = kWarps / kWarpsM;
static_assert(kWarps * kPair == kBlocks && kWarpsK == kBlocksK);
constexpr int kAhead = 2;  // blocks that are copied ahead at most

constexpr u32 kXBytes = kTokens * kBlockCols * 2;
constexpr int kNotes = 4;  // more than the blocks that are in the ring at a time
static_assert(kNotes > kAhead && (kNotes & (kNotes - 1)) == 0);
// Addresses in shared memory.
constexpr u32 kNotesAt = kWarps * kXBytes;
constexpr u32 kScratch = kNotesAt + kWarps * kNotes * 8;
constexpr u32 kFlag = kScratch + (kWarpsK - 1) * kBands * 512;  // and then the rings

// Where this warp's two blocks of a chunk are.
struct PairPlace {
  i32 offset;         // of the chunk, in kOffsetUnit
  u32 header[kPair];  // byte offsets of their tiles' values
  u32 after;          // the header after them; for the last pair, where the chunk ends
};

// The blocks of one warp on their way through its ring, numbered kPair a chunk. Each is contiguous: what does not fit at the end
// begins at the start.
struct BlockRing {
  const MatmulArgs& p;
  u32 ring, notes;   // shared addresses: of its first byte for this lane, and of where each block is, with its header
  const u8* weight;  // for this lane
  const int warp, lane;
  u32 ahead;     // the block to be copied next
  u32 head = 0;  // where the last one ends
  // Each chunk's offset is read a chunk before its header, and that a chunk before its blocks are copied. Nothing is made of
  // either before it is needed, so that neither is waited for.
  i32 chunk;  // to be looked up next
  const i32 chunks_end;
  i32 offset, offset_after;  // of it, and of the one after
  PairPlace now, next;       // of the chunk that is being copied, and of the one after

  __device__ __forceinline__ BlockRing(const MatmulArgs& p, const Range& range, u32 start, int warp, int lane)
      : p(p),
        ring(start + p.ring_at + warp * p.ring + lane * 16),
        notes(start + kNotesAt + warp * kNotes * 8),
        weight(p.weight + lane * 16),
        warp(warp),
        lane(lane),
        ahead(range.begin * kPair),
        chunk(range.begin),
        chunks_end(range.end) {
    asm volatile("" : "+r"(ring), "+r"(notes), "+l"(weight));  // or they are computed again for each block
    offset = __ldg(p.offsets + chunk);
    offset_after = __ldg(p.offsets + chunk + 1);
    look();
  }
  // Looks up the next pair, if the one before is being copied.
  __device__ __forceinline__ void look() {
    if (chunk == chunks_end || chunk * kPair >= ahead + kPair) return;
    const u32* header = reinterpret_cast<const u32*>(p.weight + static_cast<i64>(offset) * kOffsetUnit) + warp * kPair;
    const uint2 mine = __ldg(reinterpret_cast<const uint2*>(header));
    next.offset = offset;
    next.header[0] = mine.x;
    next.header[1] = mine.y;
    if (warp + 1 < kWarps) {
      next.after = __ldg(header + kPair);
    } else {
      next.after = static_cast<u32>(offset_after - offset) * kOffsetUnit - kValuesAt;
    }
    offset = offset_after;
    if (++chunk < chunks_end) offset_after = __ldg(p.offsets + chunk + 1);
  }
  __device__ __forceinline__ u32 note_of(u32 block) const { return notes + block % kNotes * 8; }
  // Copies what fits of the blocks up to `block` + kAhead. All lanes have read those before `block`.
  __device__ __forceinline__ void copy(u32 block) {
    const u32 size = p.ring, last = min(static_cast<u32>(chunk) * kPair, block + kAhead + 1);
    u32 tail;  // where `block` begins: others may not reach so far, or an empty ring would look like a full one
    if (ahead > block) {
      tail = lds_u32(note_of(block));
    } else {
      head = 0;
      tail = size + 1;
    }
    while (ahead < last) {
      const bool second = ahead & 1;
      if (!second) now = next;
      const u32 header = second ? now.header[1] : now.header[0];
      const u32 begin = header & 0xffffu, first = begin & ~15u;
      u32 end = (second ? now.after : now.header[1]) & 0xffffu;
      // What the chunk's end includes is padding beyond what a dense block takes.
      if (second && warp + 1 == kWarps) end = min(now.after, begin + kBlockRows * kBlockCols * 2);
      const u32 nbytes = kMaskCopy + ((end - first + 15) & ~15u);
      const bool behind = head > tail, wraps = behind && head + nbytes > size;
      const u32 at = wraps ? 0 : head;
      if (at + nbytes >= (behind && !wraps ? size + 1 : tail)) break;
      head = at + nbytes;
      sts_v2(note_of(ahead), at, header);
      copy_bytes(ring + at, weight + static_cast<i64>(now.offset) * kOffsetUnit, warp * kPair + second, first, nbytes);
      ahead++;
    }
  }
  // Masks, and values from `first` on, `nbytes` in all.
  __device__ __forceinline__ void copy_bytes(u32 to, const u8* chunk, int block, u32 first, u32 nbytes) const {
    i32 rest = static_cast<i32>(nbytes) - lane * 16;
    const u32 values_at = kValuesAt - kMaskCopy + first;
    if (rest > 0) cp_async_16(to, chunk + (lane < kMaskCopy / 16 ? kHeaderBytes + block * kMaskCopy : values_at));
    const u8* values = chunk + values_at;
#pragma unroll 1  // at 60 % once
    do {
#pragma unroll
      for (int j = 1; j <= 4; j++)
        if (rest > j * 512) cp_async_16(to + j * 512, values + j * 512);
      rest -= 4 * 512;
      to += 4 * 512;
      values += 4 * 512;
    } while (rest > 512);
  }
  __device__ __forceinline__ void open(BlockState& state, u32 block) const {
    const uint2 note = lds_v2(note_of(block));
    load_copied(state, note.y, ring - lane * 16 + note.x, lane);
  }
};

// The columns of x that go with a warp's blocks: rows of 128 bytes in shared memory, 16-byte units swizzled for ldmatrix.
struct XCopy {
  const MatmulArgs& p;
  const int row, unit;  // what this lane copies of the first four tokens, and so on
  const u16* from;      // where that is
  u32 to, read;         // shared addresses: of where it goes, and of what this lane gives ldmatrix

  __device__ __forceinline__ XCopy(const MatmulArgs& p, u32 buffer, int lane)
      : p(p),
        row(lane >> 3),
        unit(lane & 7),
        from(p.x + static_cast<i64>(row) * p.x_stride + unit * 8),
        to(buffer + row * 128 + ((unit ^ row) << 4)),
        read(buffer + unit * 128 + ((row ^ unit) << 4)) {
    asm volatile("" : "+l"(from), "+r"(to), "+r"(read));
#pragma unroll
    for (int j = 0; j < kTokens / 4; j++)
      if (row + 4 * j >= p.tokens) sts_v4(at(j), 0, 0, 0, 0);
  }
  __device__ __forceinline__ u32 at(int j) const { return (to ^ (j & 1 ? 64u : 0u)) + j * 512; }
  // Columns from k on, zeros beyond in_features.
  __device__ __forceinline__ void copy(i32 k) const {
    const i64 step = static_cast<i64>(p.x_stride) * 4;
    if (k + kBlockCols <= p.in_features) {
      const u16* at_k = from + k;
#pragma unroll
      for (int j = 0; j < kTokens / 4; j++, at_k += step)
        if (row + 4 * j < p.tokens) cp_async_16(at(j), at_k);
    } else {
      const i32 count = max(0, min(8, p.in_features - k - unit * 8));
      const u16* at_k = from + (count ? k : -unit * 8);  // an address in x even if nothing is read
#pragma unroll 1
      for (int j = 0; j < kTokens / 4; j++, at_k += step)
        if (row + 4 * j < p.tokens) cp_async_16(at(j), at_k, count * 2);
    }
  }
  __device__ __forceinline__ void load(uint4 (&bx)[kTiles][2]) const {
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) bx[n][half] = ldmatrix_x4((read ^ (half ? 64u : 0u)) + n * 1024);
  }
};

constexpr int kBandsAWarp = kPair * 2;

__device__ __forceinline__ void store(const MatmulArgs& p, const float (&acc)[kBandsAWarp][kTiles][4], i32 strip, int band, int lane) {
  const i32 row = row_block_of(p, strip) * kChunkRows + band * 16, token = first_token_of(p, strip);
#pragma unroll
  for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      store_fragment(p, row + r * 16, token + n * 8, as_float4(acc[r][n]), lane);
      asm volatile("" ::: "memory");  // keeps the compiler from loading all biases first, and spilling
    }
}

// Sums the partials of a strip in the order of the ranges and writes y.
__device__ __forceinline__ void reduce_partials(const MatmulArgs& p, i32 strip, int thread) {
  const Partials partials(p, strip);
  const i32 row = row_block_of(p, strip) * kChunkRows, token = first_token_of(p, strip);
  constexpr int kVectors = kPartialVectors % kThreads ? 1 : kPartialVectors / kThreads;
  constexpr int kParts = 2;  // what is in flight at a time
#pragma unroll 1
  for (int i = thread; i < kPartialVectors; i += kVectors * kThreads) {
    float4 sum[kVectors] = {};
#pragma unroll 1
    for (int j = 0; j < partials.count; j += kParts) {
      float4 v[kParts][kVectors] = {};
#pragma unroll
      for (int q = 0; q < kParts; q++)
        if (j + q < partials.count)
#pragma unroll
          for (int u = 0; u < kVectors; u++) v[q][u] = __ldcg(partials.of(j + q) + i + u * kThreads);
#pragma unroll
      for (int q = 0; q < kParts; q++)
#pragma unroll
        for (int u = 0; u < kVectors; u++) add(sum[u], v[q][u]);
    }
#pragma unroll
    for (int u = 0; u < kVectors; u++) {
      const int fragment = (i + u * kThreads) >> 5;
      store_fragment(p, row + fragment / kTiles * 16, token + fragment % kTiles * 8, sum[u], thread & 31);
    }
  }
}

// Whether this CTA is the last to have left its partial of a strip.
__device__ __forceinline__ bool last_to_arrive(const MatmulArgs& p, i32 strip, u32 flag, int thread) {
  const i32 first = first_unit(p, strip);
  named_barrier<1>(kThreads);
  if (thread == 0) {
    const u32 parts = range_of(p, first + p.chunks_k - 1).index - range_of(p, first).index + 1;
    sts_u32(flag, arrives_last(p.arrivals + strip, parts));
  }
  named_barrier<1>(kThreads);
  return lds_u32(flag);
}

// Adds up the accumulators of the warps along k through shared memory, in their order, 8 tokens at a time, in those with warp_k 0.
__device__ __forceinline__ void sum_warps(float (&acc)[kBandsAWarp][kTiles][4], u32 scratch, int band, int warp_k, int lane) {
  auto at = [&](int q, int r) { return scratch + (((q - 1) * kBands + band + r) * 32 + lane) * 16; };
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
    named_barrier<1>(kThreads);  // `scratch` is free: the tokens or the segment before have been read
    if (warp_k) {
#pragma unroll
      for (int r = 0; r < kBandsAWarp; r++) sts_float4(at(warp_k, r), acc[r][n]);
    }
    named_barrier<1>(kThreads);
    if (warp_k == 0) {
#pragma unroll
      for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
        for (int q = 1; q < kWarpsK; q++) add(acc[r][n], lds_float4(at(q, r)));
    }
  }
}

// Ends a segment: adds up the warps along k, and writes y or leaves a partial; the last CTA of those that share a strip adds the
// partials up. All threads call it, as they do the three functions above.
__device__ __forceinline__ void finish_segment(const MatmulArgs& p, float (&acc)[kBandsAWarp][kTiles][4], i32 strip, u32 start,
                                               int warp_m, int warp_k, int lane) {
  const int thread = (warp_k * kWarpsM + warp_m) * 32 + lane, band = warp_m * kBandsAWarp;
  const Range range = own_range(p);
  const bool whole = covers(p, range, strip);
  sum_warps(acc, start + kScratch, band, warp_k, lane);
  if (warp_k == 0) {
    if (whole) {
      store(p, acc, strip, band, lane);
    } else {
      leave_partial<kTiles>(partial_of(p, range, strip) + fragment_index(band, 0, lane), acc);
    }
  }
  clear(acc);
  if (!whole && last_to_arrive(p, strip, start + kFlag, thread)) reduce_partials(p, strip, thread);
}

// Up to 16 tokens two CTAs share an SM, unless its shared memory (100 KB on 8.6, 8.9 and 12) holds only one.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kCtas = 1;
#else
constexpr int kCtas = kTokens > 16 ? 1 : 2;
#endif
extern "C" __global__ void __launch_bounds__(kThreads, kCtas) spinfer_matmul(const __grid_constant__ MatmulArgs p) {
  extern __shared__ __align__(1024) u8 memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_m = warp % kWarpsM, warp_k = warp / kWarpsM;
  const u32 start = smem_address(memory);
  const Range range = own_range(p);
  BlockRing ring(p, range, start, warp, lane);
  const XCopy x(p, start + warp * kXBytes, lane);
  const BlockDecoder<false> decoder(lane);
  float acc[kBandsAWarp][kTiles][4] = {};
  uint4 bx[kTiles][2];

  i32 strip = range.begin / p.chunks_k, chunk_k = range.begin % p.chunks_k;
  x.copy(chunk_k * kChunkCols + warp_k * kBlockCols);
  cp_async_commit();
  const u32 end = range.end * kPair;
  u32 before = 0, long_before = 0;  // blocks whose copies had begun one and two blocks ago
  for (u32 block = range.begin * kPair; block < end;) {
    i32 next_k = chunk_k + 1;
    const bool ends_strip = next_k == p.chunks_k;
    if (ends_strip) next_k = 0;
#pragma unroll
    for (int j = 0; j < kPair; j++, block++) {
      __syncwarp();  // all lanes have read the block before
      ring.copy(block);
      ring.look();
      cp_async_commit();
      // Two groups a block, the second of x (nothing, every other time): x comes from two blocks ago, the block from then, from
      // the one before, or, where the ring is too small to hold both, from now.
      if (long_before > block) {
        cp_async_wait<3>();
      } else if (before > block) {
        cp_async_wait<2>();
      } else {
        cp_async_wait<0>();
      }
      long_before = before;
      before = ring.ahead;
      __syncwarp();
      BlockState state;
      ring.open(state, block);
      if (j == 0) {
        x.load(bx);
        __syncwarp();  // all lanes have read x
        if (block + kPair < end) x.copy(next_k * kChunkCols + warp_k * kBlockCols);
      }
      cp_async_commit();
      decoder.open(state);
#pragma unroll
      for (int s = 0; s < 4; s++) {
        u32 fragment[2][4];
        decoder.fragments(fragment, state, s);
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
          const uint4& b = bx[n][s / 2];
#pragma unroll
          for (int r = 0; r < 2; r++) mma_m16n8k16(acc[2 * j + r][n], fragment[r], s & 1 ? b.z : b.x, s & 1 ? b.w : b.y);
        }
      }
    }
    if (ends_strip || block == end) finish_segment(p, acc, strip, start, warp_m, warp_k, lane);
    strip += ends_strip;
    chunk_k = next_k;
  }
}
