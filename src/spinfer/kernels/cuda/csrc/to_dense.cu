// Chunks to dense rows, for batches so large that cuBLAS on decoded rows is the faster way. On Hopper: to_dense_sm90.cu.
//
// Four warps a CTA. Each takes blocks in a stride, copies the next one while it decodes this one into Tensor Core fragments,
// lays those out as rows in shared memory and writes rows of 128 bytes.
#include "block_copy.cuh"
#include "common.cuh"
#include "decode.cuh"
#include "layout.cuh"

struct DenseArgs {
  const u8* weight;    // chunks
  const i32* offsets;  // [T + 1], in kOffsetUnit
  u16* dense;          // (rows of the row blocks asked for, columns), rows at multiples of 16 bytes
  i64 dense_stride;
  i32 rows, columns;   // M, K
  i32 chunks_k;
  i32 first_chunk, chunk_count;
  i32 first_row;       // of `dense`
};

constexpr int kWarps = 4;
constexpr u32 kRowBytes = kBlockCols * 2 + 16;  // padded by 16 bytes: the 8 rows of a step fall into different banks
constexpr u32 kTileBytes = kBlockRows * kRowBytes;
constexpr u32 kWarpBytes = 2 * kBlockBuffer + kTileBytes;
static_assert(kBlockBuffer % 16 == 0 && kTileBytes % 16 == 0);

// A block on its way into a buffer.
struct BlockCopy {
  u32 header;  // byte offsets of its tiles' values
  u32 end;     // byte offset of the values after it
  const u8* chunk;
};

__device__ __forceinline__ BlockCopy find_block(const u8* weight, const i32* offsets, i32 chunk, int block) {
  const u8* at = weight + static_cast<i64>(__ldg(offsets + chunk)) * kOffsetUnit;
  const u32 header = __ldg(reinterpret_cast<const u32*>(at) + block);
  u32 end;
  if (block + 1 < kBlocks) {
    end = __ldg(reinterpret_cast<const u32*>(at) + block + 1) & 0xffffu;
  } else {
    end = static_cast<u32>(__ldg(offsets + chunk + 1) - __ldg(offsets + chunk)) * kOffsetUnit - kValuesAt;
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

extern "C" __global__ void __launch_bounds__(kWarps * 32, 4) spinfer_to_dense(const __grid_constant__ DenseArgs p) {
  extern __shared__ __align__(128) u8 memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const u32 buffers = smem_address(memory) + warp * kWarpBytes, tile = buffers + 2 * kBlockBuffer;
  const BlockDecoder<false> decoder(lane);
  const i64 blocks = static_cast<i64>(p.chunk_count) * kBlocks, step = static_cast<i64>(gridDim.x) * kWarps;
  const i64 begin = static_cast<i64>(blockIdx.x) * kWarps + warp;
  auto chunk_of = [&](i64 i) { return p.first_chunk + static_cast<i32>(i / kBlocks); };
  // Where a block lies is looked up (two dependent loads) one block before its copy, and that one before its decoding.
  BlockCopy current{}, next{};
  auto find = [&](i64 i) { return i < blocks ? find_block(p.weight, p.offsets, chunk_of(i), static_cast<int>(i % kBlocks)) : BlockCopy{}; };
  current = find(begin);
  if (begin < blocks) copy_block(current, begin % kBlocks, buffers, lane);
  next = find(begin + step);
  int parity = 0;
  for (i64 i = begin; i < blocks; i += step, parity ^= 1) {
    const u32 buffer = buffers + parity * kBlockBuffer;
    if (i + step < blocks) copy_block(next, static_cast<int>((i + step) % kBlocks), buffers + (parity ^ 1) * kBlockBuffer, lane);
    const BlockCopy after = find(i + 2 * step);
    if (i + step < blocks) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncwarp();
    BlockState state;
    load_copied(state, current.header, buffer, lane);
    decoder.open(state);
#pragma unroll
    for (int s = 0; s < 4; s++) {
      u32 a[2][4];
      decoder.fragments(a, state, s);
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int q = 0; q < 4; q++) sts_u32(tile + (r * 16 + q % 2 * 8 + g) * kRowBytes + (s * 8 + q / 2 * 4 + t) * 4, a[r][q]);
    }
    __syncwarp();
    const i32 chunk = chunk_of(i);
    const int block = static_cast<int>(i % kBlocks);
    const i32 row = (chunk / p.chunks_k * kBlocksM + block % kBlocksM) * kBlockRows;
    const i32 column = (chunk % p.chunks_k * kBlocksK + block / kBlocksM) * kBlockCols;
    u16* out = p.dense + static_cast<i64>(row - p.first_row) * p.dense_stride + column;
    const int rows = min(kBlockRows, p.rows - row), columns = min(kBlockCols, p.columns - column);
    if (columns == kBlockCols) {
#pragma unroll
      for (int k = 0; k < kBlockRows / 4; k++) {
        const int m = k * 4 + (lane >> 3);
        if (m < rows) *reinterpret_cast<uint4*>(out + m * p.dense_stride + (lane & 7) * 8) = lds_v4(tile + m * kRowBytes + (lane & 7) * 16);
      }
    } else {
      for (int m = 0; m < rows; m++)
        for (int c = lane; c < columns; c += 32) out[m * p.dense_stride + c] = static_cast<u16>(lds_u16<0>(tile + m * kRowBytes + c * 2));
    }
    __syncwarp();  // all lanes have read the tile and the buffer before they are written again
    current = next;
    next = after;
  }
}
