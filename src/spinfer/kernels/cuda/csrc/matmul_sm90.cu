// y = x W^T + bias on Hopper: bulk copies fill a ring, warps decode Tensor Core fragments straight from the bitmap.
//
// One CTA an SM. A producer warp copies each chunk (one cp.async.bulk) and its columns of x (TMA boxes of 64 columns,
// 128-byte swizzle, zero beyond tokens and in_features) and says through an mbarrier when they are there. Chunks differ in
// size, so they lie back to back in a ring of bytes; a fully dense chunk fits, and a sparse one takes only what it needs.
// Consumer warps open their next block (prefix sums) while they gather and multiply the current one.
//
// Up to 16 tokens: 16 consumer warps, one block of each chunk a warp, mma.m16n8k16. From 24 tokens: wgmma with A in
// registers and x read from shared memory by the Tensor Cores; from SPINFER_WARPS_K < kBlocksK on, fewer warps with more
// registers take several blocks of each chunk.
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
constexpr int kThreads = kConsumers + 128;  // setmaxnreg works on groups of four warps
static_assert(kConsumerWarps == 16 || kConsumerWarps == 8);
// consumers x registers + producers x registers <= threads x registers at launch, or the kernel would hang.
constexpr int kConsumerRegisters = kConsumerWarps == 16 ? 112 : 240;
constexpr int kProducerRegisters = kConsumerWarps == 16 ? 32 : 24;

constexpr u32 kBoxBytes = kTokens * 128;          // 64 columns of x
constexpr u32 kXBytes = kBlocksK * kBoxBytes;     // the columns of one chunk
constexpr u32 kScratchBytes = scratch_bytes(kWarpsK);
constexpr int kMaxSlots = 8;

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

// Addresses in shared memory, 1024-byte aligned: x slots, ring, scratch, barriers, notes.
struct Shared {
  u32 x, ring, scratch, full, empty, notes, flag;
  __device__ __forceinline__ explicit Shared(const MatmulArgs& p, u32 start) {
    x = start;
    ring = x + p.slots * kXBytes;
    scratch = ring + p.ring + 128;  // a gather may read two bytes past the last value
    full = scratch + kScratchBytes;
    empty = full + 8 * kMaxSlots;
    notes = empty + 8 * kMaxSlots;  // a slot: {chunk's address, flags, row block, range}
    flag = notes + 16 * kMaxSlots;
  }
};

// Copies chunks in the order of the schedule. All 32 lanes run it; lane 0 issues.
struct Producer {
  const MatmulArgs& p;
  const TensorMap* x_map;
  const Shared& shared;
  const int lane;
  u64 weight_policy, x_policy;
  int slot = 0, issued = 0, released = 0, release_slot = 0, landed = 0, landed_slot = 0;
  u32 release_parity = 0, landed_parity = 0;
  i64 head = 0, tail = 0;  // bytes ever taken and given back, skipped ends of the ring included
  u32 at = 0;              // head's place in the ring
  i64 slot_end = 0;        // lane s: `head` after the chunk in slot s
  i32 offset = 0, offset_next = 0;

  __device__ __forceinline__ Producer(const MatmulArgs& p, const TensorMap* x_map, const Shared& shared, int lane)
      : p(p), x_map(x_map), shared(shared), lane(lane) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(weight_policy));
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(x_policy));
  }
  // Offsets of the 32 chunks from `chunk` on, one a lane.
  __device__ __forceinline__ void load_offsets(i32 chunk) {
    const i32 i = min(chunk + lane, p.chunks - 1);
    offset = __ldg(p.offsets + i);
    offset_next = __ldg(p.offsets + i + 1);
  }
  __device__ __forceinline__ void wait_released() {
    mbarrier_wait(shared.empty + 8 * release_slot, release_parity);
    tail = __shfl_sync(~0u, slot_end, release_slot);
    released++;
    if (++release_slot == p.slots) release_slot = 0, release_parity ^= 1;
  }
  __device__ __forceinline__ void limit_in_flight() {
    // With all slots issued at once the first chunk lands only when nearly all of them have (10 us instead of 3.9).
    while (issued - landed >= p.in_flight) {
      mbarrier_wait(shared.full + 8 * landed_slot, landed_parity);
      landed++;
      if (++landed_slot == p.slots) landed_slot = 0, landed_parity ^= 1;
    }
  }
  __device__ __forceinline__ u32 bytes_of(int from) const {
    return static_cast<u32>(__shfl_sync(~0u, offset_next - offset, from)) * kOffsetUnit;
  }
  // Takes a slot and issues the copy of the weight's chunk; `from` is the lane that holds its offsets.
  __device__ __forceinline__ void issue_chunk(i32 chunk, int from, const Range& range) {
    const i32 begin = __shfl_sync(~0u, offset, from);
    const u32 bytes = bytes_of(from);
    const bool ends_range = chunk + 1 == range.end;
    const u32 following = from == 31 || ends_range ? kMaxChunkBytes : bytes_of(from + 1);
    limit_in_flight();
    if (at + bytes > static_cast<u32>(p.ring)) {
      head += p.ring - at;
      at = 0;
      // The skipped end comes free with the chunk before it, or `tail` would lag behind what consumers hold.
      if (issued == released) tail = head;
      if (lane == (slot ? slot : p.slots) - 1) slot_end = head;
    }
    while (issued - released >= p.slots || head + bytes > tail + p.ring) wait_released();
    const i32 row_block = chunk / p.chunks_k;
    const bool ends_segment = ends_range || (chunk + 1) % p.chunks_k == 0;
    // Consumers open a chunk before they give back the one before it; they must not if the ring cannot hold both.
    const bool both_fit = at + bytes + following <= static_cast<u32>(p.ring) || following <= at;
    if (lane == 0) {
      sts_v4(shared.notes + 16 * slot, shared.ring + at, (ends_segment ? kEndOfSegment : 0) | (both_fit ? 0 : kReleaseFirst),
             row_block, range.index);
      mbarrier_expect(shared.full + 8 * slot, bytes + kXBytes);
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
              shared.ring + at),
          "l"(p.weight + static_cast<i64>(begin) * kOffsetUnit), "r"(bytes), "r"(shared.full + 8 * slot), "l"(weight_policy)
          : "memory");
    }
    __syncwarp();
    at += bytes;
    head += bytes;
    if (lane == slot) slot_end = head;
    if (++slot == p.slots) slot = 0;
    issued++;
  }
  __device__ __forceinline__ void issue_x(i32 chunk, int into) {
    const i32 column = (chunk % p.chunks_k) * kChunkCols + lane * kBlockCols;
    if (lane < kBlocksK)
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
          " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared.x + into * kXBytes + lane * kBoxBytes),
          "l"(x_map), "r"(column), "r"(0), "r"(shared.full + 8 * into), "l"(x_policy)
          : "memory");
  }
  __device__ __forceinline__ void issue_end() {
    while (issued - released >= p.slots) wait_released();
    if (lane == 0) {
      sts_v4(shared.notes + 16 * slot, shared.ring, kEndOfWork, 0, 0);
      mbarrier_arrive(shared.full + 8 * slot);
    }
  }
  // Takes the next tail unit. The CTA that is told of the last failure puts the counter back to zero.
  __device__ __forceinline__ i32 next_unit() {
    u32 unit = 0;
    if (lane == 0) {
      unit = atomicAdd(p.counters, 1u);
      if (unit == static_cast<u32>(p.units) + gridDim.x - 1) p.counters[0] = 0;
    }
    return static_cast<i32>(__shfl_sync(~0u, unit, 0));
  }
  __device__ __forceinline__ void run() {
    Range range = static_range(p, static_cast<i32>(blockIdx.x));
    load_offsets(range.begin);
    // The weight is constant, so its first chunks are fetched before the predecessor is complete; x may be its output.
    const int most = min(p.in_flight, range.end - range.begin);
    int early = 0;
    for (; early < most && at + bytes_of(early) <= static_cast<u32>(p.ring); early++) issue_chunk(range.begin + early, early, range);
    wait_for_predecessor();
    for (int i = 0; i < early; i++) issue_x(range.begin + i, i);
    i32 done = early;
    while (true) {
      for (i32 i = done; i < range.end - range.begin; i++) {
        if (i && (i & 31) == 0) load_offsets(range.begin + i);
        const int into = slot;
        issue_chunk(range.begin + i, i & 31, range);
        issue_x(range.begin + i, into);
      }
      if (p.units == 0) break;
      const i32 unit = next_unit();
      if (unit >= p.units) break;
      range = tail_range(p, unit);
      load_offsets(range.begin);
      done = 0;
    }
    issue_end();
  }
};

struct Note {
  u32 chunk, flags;
  i32 row_block, range;
};
__device__ __forceinline__ Note read_note(u32 address) {
  const uint4 v = lds_v4(address);
  return {v.x, v.y, static_cast<i32>(v.z), static_cast<i32>(v.w)};
}

// What one warp multiplies: its blocks of every chunk this CTA takes.
struct Consumer {
  const MatmulArgs& p;
  const Shared& shared;
  const int warp, lane, warp_m, warp_k;
  const int first_block;  // of a chunk; this warp's next is kBlocksM further
  const u32 x_first;      // shared address of its x in slot 0
  const BlockDecoder decoder;
  float acc[2][kTiles][4];
  BlockState state;  // of the block to multiply next
  Note note;         // of the chunk it is in
  int slot = 0;
  u32 parity = 0, x;
#if SPINFER_WGMMA
  u32 a[2][2][4];
  u32 reading = 0;  // barrier of the slot whose x the latest wgmma group may still read
#else
  const u32 x_lane;  // row lane % 8, 16-byte column lane / 8, swizzled
#endif

  __device__ __forceinline__ Consumer(const MatmulArgs& p, const Shared& shared, int warp, int lane)
      : p(p),
        shared(shared),
        warp(warp),
        lane(lane),
        warp_m(warp % kBlocksM),
        warp_k(warp / kBlocksM),
        first_block(warp / kBlocksM * kBlocksAWarp * kBlocksM + warp % kBlocksM),
        x_first(shared.x + warp / kBlocksM * kBlocksAWarp * kBoxBytes),
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
  // Waits for the chunk in `slot` and opens this warp's first block in it; after the last chunk that reads bytes that
  // nobody uses.
  __device__ __forceinline__ void open_chunk(Note& note, BlockState& state) const {
    mbarrier_wait(shared.full + 8 * slot, parity);
    note = read_note(shared.notes + 16 * slot);
    decoder.open(state, note.chunk, first_block, lane);
  }
  __device__ __forceinline__ void next_slot() {
    x += kXBytes;
    if (++slot == p.slots) slot = 0, parity ^= 1, x = x_first;
  }
  __device__ __forceinline__ void release(u32 empty) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty);
  }
#if SPINFER_WGMMA
  __device__ __forceinline__ void multiply(u32 x_block, int s) {
    u32(&fragment)[2][4] = a[s & 1];
    decoder.fragments(fragment, state, s);
    const u64 descriptor = wgmma_descriptor(x_block) + 2 * s;
    wgmma_fence();
    wgmma(acc[0], fragment[0], descriptor);
    wgmma(acc[1], fragment[1], descriptor);
    wgmma_commit();
    wgmma_wait<1>();
  }
#else
  uint4 bx[kTiles];
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
  // Multiplies this warp's blocks of one chunk and opens the next chunk: while the current one is multiplied (kAhead),
  // or, where the ring cannot hold both, after it has been given back.
  template <bool kAhead>
  __device__ __forceinline__ void chunk(Note& next) {
    const u32 empty = shared.empty + 8 * slot;
    const u32 x_now = x;
#pragma unroll
    for (int b = 0; b < kBlocksAWarp; b++) {
      const u32 x_block = x_now + b * kBoxBytes;
      BlockState opened;
      multiply(x_block, 0);
#if SPINFER_WGMMA
      if (b == 0 && reading) release(reading);
#endif
      if (b + 1 < kBlocksAWarp) {
        decoder.open(opened, note.chunk, first_block + (b + 1) * kBlocksM, lane);
      } else if (kAhead) {
        next_slot();
        open_chunk(next, opened);
      }
#pragma unroll
      for (int s = 1; s < 4; s++) multiply(x_block, s);
      state = opened;
    }
#if SPINFER_WGMMA
    if (kAhead) {
      reading = empty;
      return;
    }
    wgmma_wait<0>();
    reading = 0;
#endif
    release(empty);
    if (!kAhead) {
      next_slot();
      open_chunk(next, state);
    }
  }
  __device__ __forceinline__ void run() {
    open_chunk(note, state);
    while (!(note.flags & kEndOfWork)) {
      Note next;
      if (note.flags & kReleaseFirst) {
        chunk<false>(next);
      } else {
        chunk<true>(next);
      }
      if (note.flags & kEndOfSegment) {
#if SPINFER_WGMMA
        wgmma_wait<0>();
#endif
        wait_for_predecessor();  // the kernel before may still use the partials
        finish_segment<kWarpsK>(p, acc, range_at(p, note.range), note.row_block, shared.scratch, shared.flag, warp_m, warp_k,
                                lane, warp * 32 + lane, kConsumers);
      }
      note = next;
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) spinfer_matmul(const __grid_constant__ LaunchArgs args) {
  extern __shared__ __align__(1024) u8 memory[];
  const MatmulArgs& p = args.matmul;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shared shared(p, smem_address(memory));
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; i++) {
      mbarrier_init(shared.full + 8 * i, 1);
      mbarrier_init(shared.empty + 8 * i, kConsumerWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if (warp >= kConsumerWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    if (warp == kConsumerWarps) Producer(p, &args.x_map, shared, lane).run();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    Consumer(p, shared, warp, lane).run();
  }
}
