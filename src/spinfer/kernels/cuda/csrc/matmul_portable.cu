// y = x W^T + bias on any GPU from compute capability 8.0 on: cp.async and mma.m16n8k16, nothing newer.
//
// Eight warps a CTA; each takes its blocks of every chunk of the range and copies them ahead into two buffers of its own, so
// no warp waits for another before the end of a segment. x is read through the L1 cache.
#include "common.cuh"
#include "decode.cuh"
#include "layout.cuh"
#include "matmul.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kWarpsK = kWarps / kBlocksM;
constexpr int kBlocksAWarp = kBlocksK / kWarpsK;
constexpr u32 kMaskCopy = 256;
// A dense block, up to 14 bytes of the block before it (copies start at multiples of 16 bytes), and kGatherBytes.
constexpr u32 kBuffer = kMaskCopy + kBlockRows * kBlockCols * 2 + 32;
constexpr u32 kScratch = 2 * kWarps * kBuffer;
constexpr u32 kFlag = kScratch + scratch_bytes(kWarpsK);

__device__ __forceinline__ void cp_async_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A block of this warp on its way into a buffer.
struct BlockCopy {
  u32 header;  // byte offsets of its tiles' values
  u32 end;     // byte offset of the values after it
  const u8* chunk;
};

// The i-th block this warp takes in the range: chunk i / kBlocksAWarp, in order along k.
__device__ __forceinline__ BlockCopy find_block(const MatmulArgs& p, i32 chunk, int block) {
  const u8* at = p.weight + static_cast<i64>(__ldg(p.offsets + chunk)) * kOffsetUnit;
  const u32 header = __ldg(reinterpret_cast<const u32*>(at) + block);
  u32 end;
  if (block + 1 < kBlocks) {
    end = __ldg(reinterpret_cast<const u32*>(at) + block + 1) & 0xffffu;
  } else {
    end = static_cast<u32>(__ldg(p.offsets + chunk + 1) - __ldg(p.offsets + chunk)) * kOffsetUnit - kValuesAt;
    // The last block's end includes the padding of the chunk; a block holds no more than its weights.
    end = min(end, (header & 0xffffu) + kBlockRows * kBlockCols * 2);
  }
  return {header, end, at};
}
__device__ __forceinline__ void copy_block(const BlockCopy& copy, int block, u32 buffer, int lane) {
  if (lane < 16) cp_async_16(buffer + lane * 16, copy.chunk + kHeaderBytes + block * 256 + lane * 16);
  const u32 first = (copy.header & 0xffffu) & ~15u;
  for (u32 i = first + lane * 16; i < copy.end; i += 32 * 16)
    cp_async_16(buffer + kMaskCopy + i - first, copy.chunk + kValuesAt + i);
  cp_async_commit();
}

__device__ __forceinline__ u32 load_x_pair(const MatmulArgs& p, i32 token, i32 k) {
  if (token >= p.tokens || k >= p.in_features) return 0;
  const u16* at = p.x + static_cast<i64>(token) * p.x_stride + k;  // rows start at multiples of 16 bytes, k is even
  if (k + 1 < p.in_features) return __ldg(reinterpret_cast<const u32*>(at));
  return __ldg(at);
}

extern "C" __global__ void __launch_bounds__(kThreads) spinfer_matmul(const __grid_constant__ MatmulArgs p) {
  extern __shared__ __align__(1024) u8 memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int warp_m = warp % kBlocksM, warp_k = warp / kBlocksM;
  const u32 start = smem_address(memory);
  const u32 buffers = start + warp * 2 * kBuffer;
  const BlockDecoder decoder(lane);
  const Range range = range_at(p, static_cast<i32>(blockIdx.x));
  const i32 blocks = (range.end - range.begin) * kBlocksAWarp;
  auto block_of = [&](i32 i) { return (warp_k * kBlocksAWarp + i % kBlocksAWarp) * kBlocksM + warp_m; };
  float acc[2][kTiles][4] = {};

  BlockCopy current = find_block(p, range.begin, block_of(0));
  copy_block(current, block_of(0), buffers, lane);
  for (i32 i = 0; i < blocks; i++) {
    const i32 chunk = range.begin + i / kBlocksAWarp;
    const u32 buffer = buffers + (i & 1) * kBuffer;
    BlockCopy next = current;
    if (i + 1 < blocks) {
      next = find_block(p, range.begin + (i + 1) / kBlocksAWarp, block_of(i + 1));
      copy_block(next, block_of(i + 1), buffers + (~i & 1) * kBuffer, lane);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncwarp();
    BlockState state;
    const uint2 masks = lds_v2(buffer + lane * 8);
    const u32 values = buffer + kMaskCopy - ((current.header & 0xffffu) & ~15u);
    state.mask[0] = masks.x;
    state.mask[1] = masks.y;
    state.base[0] = values + (current.header & 0xffffu);
    state.base[1] = values + (current.header >> 16);
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
      finish_segment<kWarpsK>(p, acc, range, chunk / p.chunks_k, start + kScratch, start + kFlag, warp_m, warp_k, lane,
                              threadIdx.x, kThreads);
  }
}
