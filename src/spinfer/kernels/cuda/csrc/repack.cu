// Between the storage layout (FORMAT.md) and the kernels' layout (layout.cuh), bit-exact.
//
// A CTA takes chunks in a grid-stride loop, a warp one block of the chunk: two bands of 16 rows of a GroupTile. A band is 16
// words of 64 bits in storage order (TCTile, column half, row half); word 2 i + h is step i, row half h, and bits 2 lane,
// 2 lane + 1 of a word are that lane's pair. Both layouts hold a step's 128 weights before the next step's; the
// storage holds row half 0 first, the kernels' layout takes both halves lane by lane.
#include "common.cuh"
#include "layout.cuh"

struct RepackArgs {
  u64* bitmap;         // storage: words
  i32* group_offsets;  // storage: [GroupTiles + 1], in units of 8 values
  u16* values;         // storage
  u8* chunks;          // kernels' layout
  i32* offsets;        // [T + 1], in kOffsetUnit
  i64* sizes;          // [T], in kOffsetUnit
  i32 group_rows, group_cols;
  i32 chunks_k;
  i32 chunk_count;
};

constexpr int kThreads = kBlocks * 32;
constexpr int kStorageUnit = 8;

struct BlockPlace {
  i64 group_tile;  // -1: outside
  int band;        // of the GroupTile, 0 or 2
};
__device__ __forceinline__ BlockPlace place_of(const RepackArgs& p, i32 chunk, int block) {
  const i32 row_block = chunk / p.chunks_k, chunk_k = chunk % p.chunks_k;
  const i64 block_row = static_cast<i64>(row_block) * kBlocksM + block % kBlocksM;
  const i32 block_col = chunk_k * kBlocksK + block / kBlocksM;
  BlockPlace place;
  place.band = static_cast<int>(block_row & 1) * 2;
  const i64 group_row = block_row >> 1;
  place.group_tile = group_row < p.group_rows && block_col < p.group_cols ? group_row * p.group_cols + block_col : -1;
  return place;
}
// Words 0 .. 31 of the block's two bands, one a lane.
__device__ __forceinline__ u64 load_word(const RepackArgs& p, const BlockPlace& place, int lane) {
  return place.group_tile < 0 ? 0 : __ldg(p.bitmap + place.group_tile * 64 + place.band * 16 + lane);
}
__device__ __forceinline__ int inclusive_sum(int v, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, v, d);
    if (lane >= d) v += other;
  }
  return v;
}
// Exclusive prefix over the 32 tiles of a chunk, and the total; counts in shared memory.
__device__ __forceinline__ void scan_tiles(const u32* counts, u32* starts, int lane) {
  const int count = static_cast<int>(counts[lane]);
  const int end = inclusive_sum(count, lane);
  starts[lane] = static_cast<u32>(end - count);
  if (lane == 31) starts[32] = static_cast<u32>(end);
}
extern "C" __global__ void __launch_bounds__(kThreads) spinfer_chunk_sizes(const __grid_constant__ RepackArgs p) {
  __shared__ u32 count[kBlocks];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (i32 i = blockIdx.x; i < p.chunk_count; i += gridDim.x) {
    const int mine = __popcll(load_word(p, place_of(p, i, warp), lane));
    const u32 total = __reduce_add_sync(~0u, mine);
    if (lane == 0) count[warp] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
      u32 values = 0;
      for (int w = 0; w < kBlocks; w++) values += count[w];
      p.sizes[i] = chunk_bytes(static_cast<int>(values)) / kOffsetUnit;
    }
    __syncthreads();
  }
}

// Storage to chunks. A chunk is put together in shared memory and leaves in 16-byte stores.
extern "C" __global__ void __launch_bounds__(kThreads) spinfer_pack(const __grid_constant__ RepackArgs p) {
  extern __shared__ __align__(128) u8 staged[];
  __shared__ u32 counts[2 * kBlocks], starts[2 * kBlocks + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (i32 i = blockIdx.x; i < p.chunk_count; i += gridDim.x) {
    const BlockPlace place = place_of(p, i, warp);
    const u64 word = load_word(p, place, lane);
    const int count = __popcll(word);
    const int end = inclusive_sum(count, lane);
    const int band0 = __shfl_sync(~0u, end, 15);
    if (lane == 15) counts[2 * warp] = end;
    if (lane == 31) counts[2 * warp + 1] = end - band0;
    // Values before the block in its GroupTile: those of bands 0 and 1 if it holds bands 2 and 3.
    u32 before = 0;
    if (place.group_tile >= 0 && place.band) before = __reduce_add_sync(~0u, __popcll(__ldg(p.bitmap + place.group_tile * 64 + lane)));
    __syncthreads();
    if (warp == 0) scan_tiles(counts, starts, lane);
    __syncthreads();
    const u32 values = starts[2 * kBlocks];
    const int units = chunk_bytes(static_cast<int>(values)) / kOffsetUnit;
    if (lane == 0) {
      reinterpret_cast<u16*>(staged)[2 * warp] = static_cast<u16>(starts[2 * warp] * 2);
      reinterpret_cast<u16*>(staged)[2 * warp + 1] = static_cast<u16>(starts[2 * warp + 1] * 2);
    }
    u16* out = reinterpret_cast<u16*>(staged + kValuesAt);
    const u16* in = place.group_tile < 0 ? nullptr : p.values + static_cast<i64>(__ldg(p.group_offsets + place.group_tile)) * kStorageUnit + before;
    const int start = end - count;  // of this lane's word in the block
    const u64 below = (1ull << (2 * lane)) - 1;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      u32 mask = 0;
      const u32 tile_out = starts[2 * warp + r];
      const int tile_in = r ? band0 : 0;
#pragma unroll
      for (int step = 0; step < 8; step++) {
        const u64 upper = __shfl_sync(~0u, word, r * 16 + 2 * step), lower = __shfl_sync(~0u, word, r * 16 + 2 * step + 1);
        const int at_upper = __shfl_sync(~0u, start, r * 16 + 2 * step), at_lower = __shfl_sync(~0u, start, r * 16 + 2 * step + 1);
        const u32 u = static_cast<u32>(upper >> (2 * lane)) & 3u, l = static_cast<u32>(lower >> (2 * lane)) & 3u;
        mask |= ((u & 1u) | (u >> 1) << 8 | (l & 1u) << 16 | (l >> 1) << 24) << step;
        const int upper_before = __popcll(upper & below), lower_before = __popcll(lower & below);
        int to = static_cast<int>(tile_out) + at_upper - tile_in + upper_before + lower_before;
        int from = at_upper + upper_before;
        if (u & 1u) out[to++] = __ldg(in + from++);
        if (u & 2u) out[to++] = __ldg(in + from);
        from = at_lower + lower_before;
        if (l & 1u) out[to++] = __ldg(in + from++);
        if (l & 2u) out[to] = __ldg(in + from);
      }
      reinterpret_cast<u32*>(staged + kHeaderBytes)[(warp * 32 + lane) * 2 + r] = mask;
    }
    const int padding = (units * kOffsetUnit - kValuesAt) / 2 - static_cast<int>(values);
    if (static_cast<int>(threadIdx.x) < padding) out[values + threadIdx.x] = 0;
    __syncthreads();
    uint4* to = reinterpret_cast<uint4*>(p.chunks + static_cast<i64>(p.offsets[i]) * kOffsetUnit);
    for (int j = threadIdx.x; j < units; j += kThreads) to[j] = reinterpret_cast<const uint4*>(staged)[j];
    __syncthreads();
  }
}

// What a warp needs of its block of a packed chunk.
struct PackedBlock {
  const u16* values;
  u32 mask[2], start[2];  // start: of the tile, in values
};
__device__ __forceinline__ PackedBlock packed_block(const RepackArgs& p, i32 chunk, int block, int lane) {
  const u8* at = p.chunks + static_cast<i64>(__ldg(p.offsets + chunk)) * kOffsetUnit;
  const u32 header = __ldg(reinterpret_cast<const u32*>(at) + block);
  const uint2 masks = __ldg(reinterpret_cast<const uint2*>(at + kHeaderBytes) + block * 32 + lane);
  return {reinterpret_cast<const u16*>(at + kValuesAt), {masks.x, masks.y}, {(header & 0xffffu) / 2, (header >> 16) / 2}};
}
// The four bits of a step: upper row even, odd column, lower row even, odd column.
__device__ __forceinline__ u32 step_bits(u32 mask, int step) {
  const u32 y = (mask >> step) & 0x01010101u;
  return (y | y >> 7 | y >> 14 | y >> 21) & 15u;
}

// Chunks to the bitmap of the storage.
extern "C" __global__ void __launch_bounds__(kThreads) spinfer_unpack_bitmap(const __grid_constant__ RepackArgs p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (i32 i = blockIdx.x; i < p.chunk_count; i += gridDim.x) {
    const BlockPlace place = place_of(p, i, warp);
    if (place.group_tile < 0) continue;
    const PackedBlock block = packed_block(p, i, warp, lane);
    u32 even = 0, odd = 0;  // lane w: bits of word w, by column parity
#pragma unroll
    for (int w = 0; w < 32; w++) {
      const u32 bits = step_bits(block.mask[w / 16], (w % 16) / 2) >> (2 * (w % 2));
      const u32 even_w = __ballot_sync(~0u, bits & 1u), odd_w = __ballot_sync(~0u, bits & 2u);
      if (lane == w) even = even_w, odd = odd_w;
    }
    u64 word = 0;
#pragma unroll
    for (int b = 0; b < 32; b++) word |= static_cast<u64>((even >> b & 1u) | (odd >> b & 1u) << 1) << (2 * b);
    p.bitmap[place.group_tile * 64 + place.band * 16 + lane] = word;
  }
}

// Chunks to the values of the storage; bitmap and group_offsets are there, values are zero (their padding stays so).
extern "C" __global__ void __launch_bounds__(kThreads) spinfer_unpack_values(const __grid_constant__ RepackArgs p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (i32 i = blockIdx.x; i < p.chunk_count; i += gridDim.x) {
    const BlockPlace place = place_of(p, i, warp);
    if (place.group_tile < 0) continue;
    const PackedBlock block = packed_block(p, i, warp, lane);
    const u64 word = load_word(p, place, lane);
    const int count = __popcll(word);
    const int start = inclusive_sum(count, lane) - count;
    const int band0 = __shfl_sync(~0u, start, 16);
    u32 before = 0;
    if (place.band) before = __reduce_add_sync(~0u, __popcll(__ldg(p.bitmap + place.group_tile * 64 + lane)));
    u16* out = p.values + static_cast<i64>(__ldg(p.group_offsets + place.group_tile)) * kStorageUnit + before;
    const u64 below = (1ull << (2 * lane)) - 1;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const u16* in = block.values + block.start[r];
#pragma unroll
      for (int step = 0; step < 8; step++) {
        const u64 upper = __shfl_sync(~0u, word, r * 16 + 2 * step), lower = __shfl_sync(~0u, word, r * 16 + 2 * step + 1);
        const int at_upper = __shfl_sync(~0u, start, r * 16 + 2 * step), at_lower = __shfl_sync(~0u, start, r * 16 + 2 * step + 1);
        const u32 u = static_cast<u32>(upper >> (2 * lane)) & 3u, l = static_cast<u32>(lower >> (2 * lane)) & 3u;
        const int upper_before = __popcll(upper & below), lower_before = __popcll(lower & below);
        int from = at_upper - (r ? band0 : 0) + upper_before + lower_before;
        int to = at_upper + upper_before;
        if (u & 1u) out[to++] = __ldg(in + from++);
        if (u & 2u) out[to] = __ldg(in + from++);
        to = at_lower + lower_before;
        if (l & 1u) out[to++] = __ldg(in + from++);
        if (l & 2u) out[to] = __ldg(in + from);
      }
    }
  }
}
