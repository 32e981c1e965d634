// y = x W^T + bias on any GPU from compute capability 8.0 on: cp.async and mma.m16n8k16, nothing newer.
//
// Eight warps a CTA; each takes its blocks of every chunk of the range and copies them ahead into two buffers of its own, so
// no warp waits for another before the end of a segment. x is read through the L1 cache.
#include "block_copy.cuh"
#include "common.cuh"
#include "decode.cuh"
#include "layout.cuh"
#include "matmul.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kWarpsK = kWarps / kBlocksM;
constexpr int kBlocksAWarp = kBlocksK / kWarpsK;
constexpr u32 kScratch = 2 * kWarps * kBlockBuffer;
constexpr u32 kFlag = kScratch + scratch_bytes(kWarpsK);

__device__ __forceinline__ u32 load_x_pair(const MatmulArgs& p, i32 token, i32 k) {
  if (token >= p.tokens || k >= p.in_features) return 0;
  const u16* at = p.x + static_cast<i64>(token) * p.x_stride + k;  // rows start at multiples of 16 bytes, k is even
  if (k + 1 < p.in_features) return __ldg(reinterpret_cast<const u32*>(at));
  return __ldg(at);
}

extern "C" __global__ void __launch_bounds__(kThreads, kTokens > 16 ? 1 : 2) spinfer_matmul(const __grid_constant__ MatmulArgs p) {
  extern __shared__ __align__(1024) u8 memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int warp_m = warp % kBlocksM, warp_k = warp / kBlocksM;
  const u32 start = smem_address(memory);
  const u32 buffers = start + warp * 2 * kBlockBuffer;
  const BlockDecoder<false> decoder(lane);
  const Range range = range_at(p, static_cast<i32>(blockIdx.x));
  const i32 blocks = (range.end - range.begin) * kBlocksAWarp;
  auto block_of = [&](i32 i) { return (warp_k * kBlocksAWarp + i % kBlocksAWarp) * kBlocksM + warp_m; };
  float acc[2][kTiles][4] = {};

  BlockCopy current = find_block(p.weight, p.offsets, range.begin, block_of(0));
  copy_block(current, block_of(0), buffers, lane);
  for (i32 i = 0; i < blocks; i++) {
    const i32 chunk = range.begin + i / kBlocksAWarp;
    const u32 buffer = buffers + (i & 1) * kBlockBuffer;
    BlockCopy next = current;
    if (i + 1 < blocks) {
      next = find_block(p.weight, p.offsets, range.begin + (i + 1) / kBlocksAWarp, block_of(i + 1));
      copy_block(next, block_of(i + 1), buffers + (~i & 1) * kBlockBuffer, lane);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncwarp();
    BlockState state;
    load_copied(state, current, buffer, lane);
    decoder.open(state);
    const i32 k = chunk % p.chunks_k * kChunkCols + (warp_k * kBlocksAWarp + i % kBlocksAWarp) * kBlockCols + 2 * t;
#pragma unroll
    for (int s = 0; s < 4; s++) {
      u32 fragment[2][4];
      decoder.fragments(fragment, state, s);
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const u32 b0 = load_x_pair(p, n * 8 + g, k + 16 * s), b1 = load_x_pair(p, n * 8 + g, k + 16 * s + 8);
#pragma unroll
        for (int r = 0; r < 2; r++) mma_m16n8k16(acc[r][n], fragment[r], b0, b1);
      }
    }
    __syncwarp();  // all lanes have read the buffer before the copy after the next goes into it
    current = next;
    const bool ends_chunk = i % kBlocksAWarp == kBlocksAWarp - 1;
    if (ends_chunk && ((chunk + 1) % p.chunks_k == 0 || chunk + 1 == range.end))
      finish_segment<kWarpsK>(p, acc, chunk / p.chunks_k, start + kScratch, start + kFlag, warp_m * 2, warp_k, lane);
  }
}
