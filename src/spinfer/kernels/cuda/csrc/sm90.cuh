// What the Hopper kernels share: mbarriers, clusters, and the warp that copies the weight into a ring of shared memory.
#pragma once
#include "common.cuh"
#include "layout.cuh"
#include "matmul.cuh"

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
// For tests: with -DSPINFER_DELAYS=1 warps are held up for 30 us when they have waited for a barrier, a fifth of them every time, for
// a quarter of a millisecond before it is the turn of others, and any of them now and then.
#ifndef SPINFER_DELAYS
#define SPINFER_DELAYS 0
#endif
__device__ __forceinline__ void delay_at_random() {
  u32 now, clock;
  asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
  asm volatile("mov.u32 %0, %%clock;" : "=r"(clock));
  u32 hash = blockIdx.x * 0x85EBCA6Bu ^ (threadIdx.x >> 5) * 0x9E3779B9u ^ (now >> 18) * 0xC2B2AE35u;
  hash = (hash ^ hash >> 15) * 0x2545F491u;
  if ((hash ^ hash >> 13) % 5 == 0 || clock * 0x2545F491u >> 24 < 4) asm volatile("nanosleep.u32 30000;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
      "@!done bra retry;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
  if constexpr (SPINFER_DELAYS) delay_at_random();
}
// What all lanes of a warp have read is given back by one of them after a __syncwarp, which racecheck does not follow. For that
// tool -DSPINFER_EVERY_LANE_ARRIVES=1 lets each lane speak for itself (2 to 5 % slower on 4096 x 4096).
#ifndef SPINFER_EVERY_LANE_ARRIVES
#define SPINFER_EVERY_LANE_ARRIVES 0
#endif
constexpr int kArrivals = SPINFER_EVERY_LANE_ARRIVES ? 32 : 1;  // of a warp that gives something back
__device__ __forceinline__ void give_back_to(u32 barrier, int lane) {
  if (SPINFER_EVERY_LANE_ARRIVES || lane == 0) mbarrier_arrive(barrier);
}
// The same shared address in CTA `rank` of the cluster.
__device__ __forceinline__ u32 in_cta(u32 address, u32 rank) {
  u32 mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ __forceinline__ float4 lds_float4_of_cluster(u32 mapped) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(mapped) : "memory");
  return v;
}
// Tells another CTA that something has been read: a release of cluster scope would wait for all that the warp has under way.
__device__ __forceinline__ void mbarrier_arrive_remote(u32 mapped) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// With programmatic dependent launch: returns when the kernels before this one are complete and their writes visible.
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets the kernels after this one start, from one warp of each CTA. Not before wait_for_predecessor: what torch.compile generates
// (triton.enable_pdl) waits for the kernel just before it only, and takes it that the ones before that are complete.
__device__ __forceinline__ void start_successors() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

constexpr int kSlots = 8;
// Shared memory begins with the barriers of each slot, its note, and what a kernel adds from kFree on. Everything of slot s is
// kSlotStride s further on. A note is {flags, strip, address of the next chunk, -}.
constexpr u32 kSlotStride = 16, kLanded = 0, kEmpty = 8, kNotes = kSlotStride * kSlots, kFree = 2 * kNotes;

// Makes the barriers of the slots, which so many warps read; one thread calls it.
__device__ __forceinline__ void init_slots(const u32 start, int readers) {
  for (int i = 0; i < kSlots; i++) {
    mbarrier_init(start + kLanded + kSlotStride * i, 1);
    mbarrier_init(start + kEmpty + kSlotStride * i, kArrivals * readers);
  }
}

// Copies the weight's chunks of this CTA's work. All 32 lanes run it; lane 0 issues.
struct WeightProducer {
  const MatmulArgs& p;
  const u32 start;  // of shared memory
  const Work work;
  const int lane;
  int slot = 0, held = 0, release_slot = 0;
  u32 parity = 0, release_parity = 0;
  u32 head = 0, tail = 0;  // bytes ever taken and given back, skipped ends of the ring included; only differences count
  u32 at = 0;              // head's place in the ring
  u32 slot_end = 0;        // lane s: `head` after the chunk in slot s
  i32 offset = 0, offset_next = 0;  // lane i: of the i-th chunk from the last load on
  u32 strip = 0;                    // lane i: its strip, and in the top bit whether it ends a segment

  __device__ __forceinline__ WeightProducer(const MatmulArgs& p, const u32 start, const Work& work, int lane)
      : p(p), start(start), work(work), lane(lane) {}
  __device__ __forceinline__ i32 chunk_at(const Place& place) const {
    // With an odd number of row blocks the last one's twin multiplies with it too, for rows that are not there.
    const i32 row_block = kTwins == 1 ? row_block_of(p, place.strip) : min(row_block_of(p, place.strip), (p.out_features - 1) / kChunkRows);
    return row_block * p.chunks_k + place.k;
  }
  // Asks L2 for about the first chunk, by the mean size, while its offset is on its way: memory has nothing else to do then.
  // Behind kernels that do not let this one start early it saves 0.3 us a launch (an H200).
  __device__ __forceinline__ void prefetch_first() const {
    const i64 begin = static_cast<i64>(chunk_at(work.at(0))) * p.mean_chunk / 256 * 16;
    if (lane == 0)
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p.weight + begin), "r"(p.mean_chunk / 256 * 16) : "memory");
  }
  // What the 32 chunks from the i-th on need, one a lane. Each load serves 31: issuing a chunk takes the next one's size.
  __device__ __forceinline__ void load_offsets(i32 i) {
    const Place place = work.at(min(i + lane, work.count - 1));
    const i32 chunk = chunk_at(place);
    offset = __ldg(p.offsets + chunk);
    offset_next = __ldg(p.offsets + chunk + 1);
    strip = static_cast<u32>(place.strip) | (work.ends_segment(i + lane, place.k) ? 1u << 31 : 0);
  }
  __device__ __forceinline__ u32 ring() const { return start + p.ring_at; }
  __device__ __forceinline__ u32 bytes_of(int from) const {
    return static_cast<u32>(__shfl_sync(~0u, offset_next - offset, from)) * kOffsetUnit;
  }
  __device__ __forceinline__ void wait_released() {
    mbarrier_wait(start + kEmpty + kSlotStride * release_slot, release_parity);
    tail = __shfl_sync(~0u, slot_end, release_slot);
    held--;
    if (++release_slot == kSlots) release_slot = 0, release_parity ^= 1;
  }
  // Waits until the chunk `in_flight` before the next one has landed.
  __device__ __forceinline__ void limit_in_flight() const {
    const int back = slot - p.in_flight;
    mbarrier_wait(start + kLanded + kSlotStride * (back < 0 ? back + kSlots : back), back < 0 ? parity ^ 1 : parity);
  }
  // `from`: the lane that knows of the chunk.
  __device__ __forceinline__ void issue(i32 i, int from) {
    const i32 begin = __shfl_sync(~0u, offset, from);
    const u32 of_strip = __shfl_sync(~0u, strip, from);
    const u32 bytes = bytes_of(from);
    // With all slots issued at once the first chunk lands only when nearly all of them have (10 us instead of 3.9).
    if (i >= p.in_flight) limit_in_flight();
    if (at + bytes > static_cast<u32>(p.ring)) {
      head += p.ring - at;
      at = 0;
      // The skipped end comes free with the chunk before it, or `tail` would lag behind what consumers hold.
      if (held == 0) tail = head;
      if (lane == (slot ? slot : kSlots) - 1) slot_end = head;
    }
    while (held >= kSlots || head + bytes - tail > static_cast<u32>(p.ring)) wait_released();
    const u32 following = bytes_of(from + 1);
    const u32 next_at = at + bytes + following <= static_cast<u32>(p.ring) ? at + bytes : 0;
    // Consumers open a chunk before they give back the one before it; they must not if the ring cannot hold both, or if there
    // is none.
    const bool both_fit = (next_at || following <= at) && i + 1 < work.count;
    if (lane == 0) {
      sts_v4(start + kNotes + kSlotStride * slot, of_strip >> 31 | (both_fit ? 0 : kReleaseFirst), of_strip & 0x7fffffffu,
             ring() + next_at, 0);
      static_assert(kEndOfSegment == 1);
      mbarrier_expect(start + kLanded + kSlotStride * slot, bytes);
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
              ring() + at),
          "l"(p.weight + static_cast<i64>(begin) * kOffsetUnit), "r"(bytes), "r"(start + kLanded + kSlotStride * slot),
          "l"(kEvictFirst)
          : "memory");
    }
    __syncwarp();
    at += bytes;
    head += bytes;
    if (lane == slot) slot_end = head;
    if (++slot == kSlots) slot = 0, parity ^= 1;
    held++;
  }
  // The first load_offsets(0) is the caller's: it takes as long as setting up the barriers.
  __device__ __forceinline__ void run() {
    int from = 0;
    for (i32 i = 0; i < work.count; i++, from++) {
      if (from == 31) {
        load_offsets(i);
        from = 0;
      }
      issue(i, from);
    }
    // One more note, of no chunk, says that the work is done.
    while (held >= kSlots) wait_released();
    if (lane == 0) {
      sts_v4(start + kNotes + kSlotStride * slot, kEndOfWork, 0, 0, 0);
      mbarrier_arrive(start + kLanded + kSlotStride * slot);
    }
  }
};

// Asks L2 for the bias of the first 32 strips of the work, long before it is added. All 32 lanes call it.
__device__ __forceinline__ void prefetch_bias(const MatmulArgs& p, const Work& work, int lane) {
  if (!p.bias || lane * work.k_count >= work.count) return;
  const i32 row = row_block_of(p, work.at(lane * work.k_count).strip) * kChunkRows;
  for (i32 m = row; m < min(row + kChunkRows, p.out_features); m += 64)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p.bias + m) : "memory");
}

struct Note {
  u32 flags;
  i32 strip;
  u32 next_chunk;
};
__device__ __forceinline__ Note read_note(u32 address) {
  const uint4 v = lds_v4(address);
  return {v.x, static_cast<i32>(v.y), v.z};
}
