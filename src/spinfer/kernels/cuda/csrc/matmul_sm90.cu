// y = x W^T + bias on Hopper: bulk copies fill a ring, warps decode Tensor Core fragments straight from the bitmap.
//
// One CTA an SM. One warp copies chunks of the weight (a cp.async.bulk each), another the columns of x that go with them
// (TMA boxes of 64 columns, 128-byte swizzle, zero beyond tokens and in_features); mbarriers say what is there. With
// programmatic dependent launch the weight streams in while the predecessor still runs; only x waits for it. Chunks differ
// in size, so they lie back to back in a ring of bytes: a fully dense chunk fits, a sparse one takes only what it needs.
// Consumer warps open their next block (prefix sums) while they gather and multiply the current one.
//
// Up to 16 tokens: 16 consumer warps, one block of each chunk a warp, mma.m16n8k16. From 24 tokens: wgmma with A in
// registers, x read from shared memory by the Tensor Cores; with SPINFER_WARPS_K < kBlocksK fewer warps with more registers
// take several blocks of each chunk.
#include "common.cuh"
#include "decode.cuh"
#include "layout.cuh"
#include "matmul.cuh"

#ifndef SPINFER_WARPS_K
#define SPINFER_WARPS_K kBlocksK
#endif
#ifndef SPINFER_WGMMA
#define SPINFER_WGMMA (SPINFER_TOKENS > 16)
#endif
#if SPINFER_WGMMA
#include "wgmma.cuh"
#endif

constexpr int kWarpsK = SPINFER_WARPS_K;
constexpr int kConsumerWarps = kBlocksM * kWarpsK;
constexpr int kConsumers = kConsumerWarps * 32;
constexpr int kBlocksAWarp = kBlocksK / kWarpsK;
#ifndef SPINFER_STEPS
#define SPINFER_STEPS 1
#endif
constexpr int kStepsAGroup = SPINFER_STEPS;  // steps of 16 columns whose fragments are decoded before their wgmmas
static_assert(kBlocksAWarp * 4 / kStepsAGroup % 2 == 0, "groups alternate between two sets of fragments");
constexpr int kThreads = kConsumers + 128;  // setmaxnreg works on groups of four warps
static_assert(kConsumerWarps == 16 || kConsumerWarps == 8);
// consumers x registers + producers x registers <= threads x registers at launch, or the kernel would hang.
constexpr int kConsumerRegisters = kConsumerWarps == 16 ? 112 : 232;
constexpr int kProducerRegisters = kConsumerWarps == 16 ? 32 : 40;

constexpr u32 kBoxBytes = kTokens * 128;          // 64 columns of x
constexpr u32 kXBytes = kBlocksK * kBoxBytes;     // the columns of one chunk
constexpr int kMaxSlots = 8;

// L2 policies as createpolicy.fractional encodes them for a fraction of 1. Without them the weight, read once, evicts x,
// which every CTA reads: 5 % of the time at 32 tokens.
constexpr u64 kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

enum : u32 { kEndOfSegment = 1, kEndOfWork = 2, kReleaseFirst = 4 };

struct alignas(64) TensorMap {
  u64 opaque[16];
};
struct LaunchArgs {
  TensorMap x_map;
  MatmulArgs matmul;
};

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
      "@!done bra retry;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// With programmatic dependent launch: returns when the kernels before this one are complete and their writes visible.
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Addresses in shared memory. All but the ring's are constants from the start: registers are short.
constexpr u32 kLanded = 0, kXLanded = 8 * kMaxSlots, kEmpty = 16 * kMaxSlots;  // barriers of each slot
constexpr u32 kNotes = 24 * kMaxSlots;  // of each slot: {flags, row block, address of the next chunk, -}
constexpr u32 kFlag = 40 * kMaxSlots;
constexpr u32 kScratch = 1024;
constexpr u32 kX = kScratch + scratch_bytes(kWarpsK);  // 1024-byte aligned, for the swizzle
static_assert(kFlag + 16 <= kScratch && kX % 1024 == 0);

// Copies the weight's chunks of this CTA's range. All 32 lanes run it; lane 0 issues.
struct WeightProducer {
  const MatmulArgs& p;
  const u32 start;  // of shared memory
  const Range range;
  const int lane;
  int slot = 0, held = 0, release_slot = 0;
  u32 parity = 0, release_parity = 0;
  u32 head = 0, tail = 0;  // bytes ever taken and given back, skipped ends of the ring included; only differences count
  u32 at = 0;              // head's place in the ring
  u32 slot_end = 0;        // lane s: `head` after the chunk in slot s
  i32 offset, offset_next;
  i32 row_block, row_end;  // of the next chunk; its row block's last chunk + 1

  // The constructor runs before the barriers are ready: its loads take as long as their setup.
  __device__ __forceinline__ WeightProducer(const MatmulArgs& p, const u32 start, int lane)
      : p(p), start(start), range(range_at(p, static_cast<i32>(blockIdx.x))), lane(lane) {
    load_offsets(range.begin);
    row_block = range.begin / p.chunks_k;
    row_end = (row_block + 1) * p.chunks_k;
  }
  // Offsets of the 32 chunks from `chunk` on, one a lane. Each load serves 31: issuing a chunk takes the next one's size.
  __device__ __forceinline__ void load_offsets(i32 chunk) {
    const i32 i = min(chunk + lane, p.chunks - 1);
    offset = __ldg(p.offsets + i);
    offset_next = __ldg(p.offsets + i + 1);
  }
  __device__ __forceinline__ u32 ring() const { return start + kX + p.slots * kXBytes; }
  __device__ __forceinline__ u32 bytes_of(int from) const {
    return static_cast<u32>(__shfl_sync(~0u, offset_next - offset, from)) * kOffsetUnit;
  }
  __device__ __forceinline__ void wait_released() {
    mbarrier_wait(start + kEmpty + 8 * release_slot, release_parity);
    tail = __shfl_sync(~0u, slot_end, release_slot);
    held--;
    if (++release_slot == p.slots) release_slot = 0, release_parity ^= 1;
  }
  // Waits until the chunk `in_flight` before the next one has landed.
  __device__ __forceinline__ void limit_in_flight() const {
    const int back = slot - p.in_flight;
    mbarrier_wait(start + kLanded + 8 * (back < 0 ? back + p.slots : back), back < 0 ? parity ^ 1 : parity);
  }
  // `from`: the lane that holds the chunk's offsets.
  __device__ __forceinline__ void issue(i32 chunk, int from) {
    const i32 begin = __shfl_sync(~0u, offset, from);
    const u32 bytes = bytes_of(from);
    const u32 following = bytes_of(from + 1);
    const bool ends_range = chunk + 1 == range.end;
    // With all slots issued at once the first chunk lands only when nearly all of them have (10 us instead of 3.9).
    if (chunk - range.begin >= p.in_flight) limit_in_flight();
    if (at + bytes > static_cast<u32>(p.ring)) {
      head += p.ring - at;
      at = 0;
      // The skipped end comes free with the chunk before it, or `tail` would lag behind what consumers hold.
      if (held == 0) tail = head;
      if (lane == (slot ? slot : p.slots) - 1) slot_end = head;
    }
    while (held >= p.slots || head + bytes - tail > static_cast<u32>(p.ring)) wait_released();
    const bool ends_row = chunk + 1 == row_end;
    const u32 next_at = at + bytes + following <= static_cast<u32>(p.ring) ? at + bytes : 0;
    // Consumers open a chunk before they give back the one before it; they must not if the ring cannot hold both.
    const bool both_fit = next_at || following <= at;
    if (lane == 0) {
      const u32 flags = (ends_range || ends_row ? kEndOfSegment : 0) | (both_fit ? 0 : kReleaseFirst);
      sts_v4(start + kNotes + 16 * slot, flags, row_block, ring() + next_at, 0);
      mbarrier_expect(start + kLanded + 8 * slot, bytes);
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
              ring() + at),
          "l"(p.weight + static_cast<i64>(begin) * kOffsetUnit), "r"(bytes), "r"(start + kLanded + 8 * slot), "l"(kEvictFirst)
          : "memory");
    }
    __syncwarp();
    if (ends_row) row_block++, row_end += p.chunks_k;
    at += bytes;
    head += bytes;
    if (lane == slot) slot_end = head;
    if (++slot == p.slots) slot = 0, parity ^= 1;
    held++;
  }
  __device__ __forceinline__ void run() {
    int from = 0;
    for (i32 chunk = range.begin; chunk < range.end; chunk++, from++) {
      if (from == 31) {
        load_offsets(chunk);
        from = 0;
      }
      issue(chunk, from);
    }
    // One more note, of no chunk, says that the work is done.
    while (held >= p.slots) wait_released();
    if (lane == 0) {
      sts_v4(start + kNotes + 16 * slot, kEndOfWork, 0, 0, 0);
      mbarrier_arrive(start + kLanded + 8 * slot);
      mbarrier_arrive(start + kXLanded + 8 * slot);
    }
  }
};

// Copies the columns of x that go with each chunk of the range.
__device__ __forceinline__ void produce_x(const MatmulArgs& p, const TensorMap* map, const u32 start, int lane) {
  const Range range = range_at(p, static_cast<i32>(blockIdx.x));
  wait_for_predecessor();  // x may be its output
  int slot = 0;
  u32 parity = 1;  // the first pass over the slots finds them empty
  i32 chunk_k = range.begin % p.chunks_k;
  for (i32 chunk = range.begin; chunk < range.end; chunk++) {
    mbarrier_wait(start + kEmpty + 8 * slot, parity);
    if (lane == 0) mbarrier_expect(start + kXLanded + 8 * slot, kXBytes);
    __syncwarp();
    if (lane < kBlocksK)
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
          " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(start + kX + slot * kXBytes + lane * kBoxBytes),
          "l"(map), "r"(chunk_k * kChunkCols + lane * kBlockCols), "r"(0), "r"(start + kXLanded + 8 * slot), "l"(kEvictLast)
          : "memory");
    if (++chunk_k == p.chunks_k) chunk_k = 0;
    if (++slot == p.slots) slot = 0, parity ^= 1;
  }
}

struct Note {
  u32 flags;
  i32 row_block;
  u32 next_chunk;
};
__device__ __forceinline__ Note read_note(u32 address) {
  const uint4 v = lds_v4(address);
  return {v.x, static_cast<i32>(v.y), v.z};
}

// What one warp multiplies: its blocks of every chunk of the range.
struct Consumer {
  const MatmulArgs& p;
  const u32 start;  // of shared memory
  const int warp, lane, warp_m, warp_k;
  const int first_block;  // of a chunk; this warp's next is kBlocksM further
  const u32 x_first;      // shared address of its x in slot 0
  const BlockDecoder decoder;
  float acc[2][kTiles][4];
  BlockState state;  // of the block to multiply next
  Note note;         // of the chunk it is in
  u32 chunk_at;      // its shared address
  int slot = 0;
  u32 parity = 0, x;
#if SPINFER_WGMMA
  u32 to_release = 0;  // barrier of a slot that the latest products may still read
  u32 a[2][kStepsAGroup][2][4];
#else
  const u32 x_lane;  // row lane % 8, 16-byte column lane / 8, swizzled
  uint4 bx[kTiles];
#endif

  __device__ __forceinline__ Consumer(const MatmulArgs& p, const u32 start, int warp, int lane)
      : p(p),
        start(start),
        warp(warp),
        lane(lane),
        warp_m(warp % kBlocksM),
        warp_k(warp / kBlocksM),
        first_block(warp / kBlocksM * kBlocksAWarp * kBlocksM + warp % kBlocksM),
        x_first(start + kX + warp / kBlocksM * kBlocksAWarp * kBoxBytes),
        decoder(lane),
        x(x_first)
#if !SPINFER_WGMMA
        ,
        x_lane((lane & 7) * 128 + (((lane >> 3) ^ (lane & 7)) << 4))
#endif
  {
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int n = 0; n < kTiles; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[r][n][i] = 0.f;
  }
  // Waits for the chunk in `slot` and its x, and reads the masks of this warp's first block in it.
  __device__ __forceinline__ void load_chunk(Note& note, BlockState& state, u32 chunk) const {
    mbarrier_wait(start + kLanded + 8 * slot, parity);
    decoder.load(state, chunk, first_block, lane);
    note = read_note(start + kNotes + 16 * slot);
    // This wait ends a basic block; without that the masks would be loaded, and the next block opened, last of all.
    mbarrier_wait(start + kXLanded + 8 * slot, parity);
  }
  __device__ __forceinline__ void next_slot() {
    x += kXBytes;
    if (++slot == p.slots) slot = 0, parity ^= 1, x = x_first;
  }
#if SPINFER_WGMMA
  __device__ __forceinline__ void multiply(u32 x_block, int s) {
    u32(&fragments)[kStepsAGroup][2][4] = a[s / kStepsAGroup % 2];
    decoder.fragments(fragments[s % kStepsAGroup], state, s);
    if (s % kStepsAGroup < kStepsAGroup - 1) return;
    const u64 descriptor = wgmma_descriptor(x_block) + 2 * (s - s % kStepsAGroup);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kStepsAGroup; i++) {
      wgmma(acc[0], fragments[i][0], descriptor + 2 * i);
      wgmma(acc[1], fragments[i][1], descriptor + 2 * i);
    }
    wgmma_commit();
    wgmma_wait<1>();  // the group before: its fragments are written next
  }
#else
  __device__ __forceinline__ void multiply(u32 x_block, int s) {
    if (s % 2 == 0) {
#pragma unroll
      for (int n = 0; n < kTiles; n++) bx[n] = ldmatrix_x4((x_block + x_lane + n * 1024) ^ (s ? 64u : 0u));
    }
    u32 fragment[2][4];
    decoder.fragments(fragment, state, s);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int n = 0; n < kTiles; n++)
        mma_m16n8k16(acc[r][n], fragment[r], (s & 1) ? bx[n].z : bx[n].x, (s & 1) ? bx[n].w : bx[n].y);
  }
#endif
  // Multiplies this warp's blocks of one chunk. With kAhead the next chunk is opened meanwhile; without, this one is given
  // back first.
  template <bool kAhead>
  __device__ __forceinline__ void chunk(Note& next) {
    const u32 empty = start + kEmpty + 8 * slot, x_now = x;
    BlockState ahead;
    const u32 chunk_now = chunk_at, next_at = note.next_chunk;
    next_slot();
#if !SPINFER_WGMMA
    if (kAhead) load_chunk(next, ahead, next_at);
#endif
#pragma unroll
    for (int b = 0; b < kBlocksAWarp; b++) {
      const u32 x_block = x_now + b * kBoxBytes;
      BlockState opened;
#if SPINFER_WGMMA
      // The slot before is given back only now, when its last products have had this step's decoding to complete.
      multiply(x_block, 0);
      if (b == 0 && to_release) {
        give_back(to_release);
        to_release = 0;
      }
      if (b + 1 == kBlocksAWarp && kAhead) load_chunk(next, ahead, next_at);
#endif
      if (b + 1 < kBlocksAWarp) {
        decoder.load(opened, chunk_now, first_block + (b + 1) * kBlocksM, lane);
        decoder.open(opened);
      } else if (kAhead) {
        opened = ahead;
        decoder.open(opened);
      }
#pragma unroll
      for (int s = SPINFER_WGMMA; s < 4; s++) multiply(x_block, s);
      state = opened;
    }
    chunk_at = next_at;
#if SPINFER_WGMMA
    if (kAhead) {
      to_release = empty;
      return;
    }
    wgmma_wait<0>();
    to_release = 0;
#endif
    give_back(empty);
#if SPINFER_WGMMA
    open_next(next);
#endif
  }
  __device__ __forceinline__ void give_back(u32 empty) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty);
  }
  __device__ __forceinline__ void open_next(Note& next) {
    load_chunk(next, state, chunk_at);
    decoder.open(state);
  }
  __device__ __forceinline__ void run() {
    chunk_at = start + kX + p.slots * kXBytes;
    open_next(note);
    while (true) {
      Note next;
#if SPINFER_WGMMA
      // An inner loop as below would make the compiler move fragments between registers and serialise the wgmmas.
      if (note.flags & kReleaseFirst) {
        chunk<false>(next);
      } else {
        chunk<true>(next);
      }
      if (note.flags & kEndOfSegment) wgmma_wait<0>();
#else
      while (note.flags == 0) {
        chunk<true>(next);
        note = next;
      }
      chunk<false>(next);  // a range ends with a segment, so this is no end of work
#endif
      if (note.flags & kEndOfSegment) {
        wait_for_predecessor();  // it may still use the partials
        finish_segment<kWarpsK>(p, acc, range_at(p, static_cast<i32>(blockIdx.x)), note.row_block, start + kScratch,
                                start + kFlag, warp_m, warp_k, lane, warp * 32 + lane, kConsumers);
      }
#if !SPINFER_WGMMA
      open_next(next);
#endif
      if (next.flags & kEndOfWork) return;
      note = next;
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) spinfer_matmul(const __grid_constant__ LaunchArgs args) {
  extern __shared__ __align__(1024) u8 memory[];
  const MatmulArgs& p = args.matmul;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 start = smem_address(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; i++) {
      mbarrier_init(start + kLanded + 8 * i, 1);
      mbarrier_init(start + kXLanded + 8 * i, 1);
      mbarrier_init(start + kEmpty + 8 * i, kConsumerWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if (warp >= kConsumerWarps) {
    WeightProducer producer(p, start, lane);
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    if (warp == kConsumerWarps) producer.run();
    if (warp == kConsumerWarps + 1) produce_x(p, &args.x_map, start, lane);
  } else {
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    Consumer(p, start, warp, lane).run();
  }
}
