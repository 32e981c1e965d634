// The layout that the kernels read. See docs/kernel.md, section Layout; spinfer/kernels/cuda/layout.py is its Python side.
//
// A block is 32 rows x 64 columns (k), the work of one warp at a time: two tiles of 16 x 64, each one band of a stored
// GroupTile. A chunk is SPINFER_BLOCKS_M x SPINFER_BLOCKS_K = 16 blocks, numbered blocks_m fastest; chunks run along k
// first. A chunk is contiguous and starts at a multiple of 128 bytes:
//   u16 [16][2]          byte offset of each tile's values from the start of the chunk's values
//   u32 [16][32][2]      mask of each lane and tile
//   16-bit values        in order (block, tile, step 0..7, lane, row half, column parity)
// and at least kGatherBytes of padding.
// Lane (g = lane / 4, t = lane % 4) owns what mma.m16n8k16 gives it of A: rows g and g + 8, columns 2 t and 2 t + 1 of each
// 8-column step. Its mask bit is step + 8 (2 (row half) + column parity).
#pragma once
#include "common.cuh"

#ifndef SPINFER_BLOCKS_M
#define SPINFER_BLOCKS_M 4
#endif
constexpr int kBlocksM = SPINFER_BLOCKS_M;
constexpr int kBlocks = 16;
constexpr int kBlocksK = kBlocks / kBlocksM;
constexpr int kBlockRows = 32;
constexpr int kBlockCols = 64;
constexpr int kChunkRows = kBlocksM * kBlockRows;
constexpr int kChunkCols = kBlocksK * kBlockCols;
constexpr int kChunkAlign = 128;
constexpr int kOffsetUnit = 16;  // bytes a unit of the chunk offsets
constexpr int kHeaderBytes = kBlocks * 4;
constexpr int kMaskBytes = kBlocks * 256;
constexpr int kValuesAt = kHeaderBytes + kMaskBytes;
constexpr int kGatherBytes = 4;  // a lane without a pair reads up to so far past the last value
__device__ constexpr int chunk_bytes(int values) {
  return (kValuesAt + values * 2 + kGatherBytes + kChunkAlign - 1) / kChunkAlign * kChunkAlign;
}
