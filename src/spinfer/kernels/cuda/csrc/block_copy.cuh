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

// Masks and addresses of a block that has landed. header: byte offsets of its tiles' values.
__device__ __forceinline__ void load_copied(BlockState& state, u32 header, u32 buffer, int lane) {
  const uint2 masks = lds_v2(buffer + lane * 8);
  const u32 values = buffer + kMaskCopy - ((header & 0xffffu) & ~15u);
  state.mask[0] = masks.x;
  state.mask[1] = masks.y;
  state.base[0] = values + (header & 0xffffu);
  state.base[1] = values + (header >> 16);
}
