// Which of the CTAs that share a strip adds their sums up: the last that comes to its end. A warp of each finds out, while others
// multiply: when x of the last chunk of a segment is being copied it asks, and waits for the others' sums if they are to be added.
//
// Only CTAs that have come are waited for, and between coming and leaving their sums they wait for nobody.
#pragma once
#include "common.cuh"
#include "matmul.cuh"
#include "sm90.cuh"

// In shared memory, for each of the two segments of a range that may not cover their strips: barriers, which complete once a launch,
// of its end coming and of the answer, and the answer, whether this CTA adds the sums up.
constexpr u32 kEndComes = 0, kAnswered = 16, kAnswer = 32, kArrivalsBytes = 48;
constexpr int kBarrierOfSums = 8;  // a named one, after those of lines.cuh

// One thread calls it; `at` is where these are.
__device__ __forceinline__ void init_arrivals(u32 at) {
  for (int i = 0; i < 4; i++) mbarrier_init(at + 8 * i, 1);
}

// A strip's word of `arrivals`: below, how many CTAs have come to its end; above, how many of them have left their sums.
constexpr u32 kLeft = 1u << 16;
__device__ __forceinline__ u32 come(u32* word) {
  u32 before;
  asm volatile("atom.acquire.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(word) : "memory");
  return before;
}
__device__ __forceinline__ void leave(u32* word) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(kLeft) : "memory");
}
// Comes to the end of a strip that `count` CTAs share. Whether it is the last; then the others have left their sums.
__device__ __forceinline__ bool comes_last(u32* word, int count) {
  const u32 others = static_cast<u32>(count) - 1;
  u32 now = come(word);
  if (now % kLeft != others) return false;
  while (now / kLeft != others) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
  *word = 0;  // for the next launch
  return true;
}

// What that warp does, beside kConsumers threads that multiply.
template <int kConsumers>
__device__ __forceinline__ void take_turns(const MatmulArgs& p, const Work& work, u32 at, int lane) {
  wait_for_predecessor();  // it may still use `arrivals`
  const Range range = own_range(p);
  const i32 first = work.at(0).strip, end = work.at(work.count - 1).strip;
#pragma unroll 1
  for (int i = 0; i < (first == end ? 1 : 2); i++) {
    const i32 strip = i ? end : first;
    if (covers(p, range, strip)) continue;
    u32* const word = p.arrivals + strip;
    mbarrier_wait(at + kEndComes + 8 * i, 0);
    bool last = false;
    if (lane == 0) {
      last = comes_last(word, Partials(p, strip).count);
      sts_u32(at + kAnswer + 4 * i, last);
      mbarrier_arrive(at + kAnswered + 8 * i);
    }
    if (!__shfl_sync(~0u, last, 0)) {
      named_barrier<kBarrierOfSums>(kConsumers + 32);
      if (lane == 0) leave(word);
    }
  }
}

// The warp that copies x tells it of the last chunk of a segment.
__device__ __forceinline__ void comes_to_end(const MatmulArgs& p, i32 strip, u32 at, int lane) {
  const Range range = own_range(p);
  if (kSplit == 1 && lane == 0 && !covers(p, range, strip)) mbarrier_arrive(at + kEndComes + 8 * is_second(p, range, strip));
}
// Those that multiply ask at the end of a segment that does not cover its strip whether they are to add the others' sums to theirs,
__device__ __forceinline__ bool adds_up(const MatmulArgs& p, const Range& range, i32 strip, u32 at) {
  const int second = is_second(p, range, strip);
  mbarrier_wait(at + kAnswered + 8 * second, 0);
  return lds_u32(at + kAnswer + 4 * second);
}
// and if not, say that they have left them.
template <int kConsumers>
__device__ __forceinline__ void leaves_sums() {
  barrier_arrive<kBarrierOfSums>(kConsumers + 32);
}
