// Blocks of the weight into shared memory without Hopper's instructions: each warp copies its own with cp.async.
#pragma once
#include "common.cuh"
#include "decode.cuh"
#include "layout.cuh"

constexpr u32 kMaskCopy = 256;
// A dense block, up to 14 bytes of the block before it (copies start at multiples of 16 bytes), and kGatherBytes.
constexpr u32 kBlockBuffer = kMaskCopy + kBlockRows * kBlockCols * 2 + 32;

__device__ __forceinline__ void cp_async_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Of `count` bytes, and zeros after them.
__device__ __forceinline__ void cp_async_16(u32 to, const void* from, u32 count) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(count) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

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
// Masks and addresses of a block that has landed. header: byte offsets of its tiles' values.
__device__ __forceinline__ void load_copied(BlockState& state, u32 header, u32 buffer, int lane) {
  const uint2 masks = lds_v2(buffer + lane * 8);
  const u32 values = buffer + kMaskCopy - ((header & 0xffffu) & ~15u);
  state.mask[0] = masks.x;
  state.mask[1] = masks.y;
  state.base[0] = values + (header & 0xffffu);
  state.base[1] = values + (header >> 16);
}
