// y = x W^T + bias on Hopper: bulk copies fill a ring, warps decode Tensor Core fragments straight from the bitmap.
//
// One CTA an SM. One warp copies chunks of the weight (a cp.async.bulk each), another the columns of x that go with them
// (TMA boxes of 64 columns, 128-byte swizzle, zero beyond tokens and in_features); mbarriers say what is there. With
// programmatic dependent launch the weight streams in while the predecessor still runs; only x waits for it. Chunks differ
// in size, so they lie back to back in a ring of bytes: a fully dense chunk fits, a sparse one takes only what it needs.
// Consumer warps open their next block (prefix sums) while they gather and multiply the current one.
//
// 16 consumer warps, one block of each chunk a warp. More than 40 tokens: matmul_wide_sm90.cu, but for up to 48 with pairs of
// CTAs and chunks of 64 rows.
#include "arrivals.cuh"
#include "common.cuh"
#include "decode.cuh"
#include "layout.cuh"
#include "matmul.cuh"
#include "sm90.cuh"

constexpr int kWarpsK = kBlocksK;
constexpr int kConsumerWarps = kBlocks;
constexpr int kConsumers = kConsumerWarps * 32;
constexpr int kThreads = kConsumers + 128;  // setmaxnreg works on groups of four warps
// consumers x registers + producers x registers <= threads x registers at launch, or the kernel would hang.
constexpr int kConsumerRegisters = 104, kProducerRegisters = 64;

constexpr u32 kBoxBytes = kTokens * 128;          // 64 columns of x
constexpr u32 kXBytes = kBlocksK * kBoxBytes;     // the columns of one chunk

// Addresses in shared memory, after those of sm90.cuh. All but the ring's are constants from the start: registers are short.
constexpr u32 kXLanded = kFree;  // of each slot
constexpr u32 kArrivalsAt = kXLanded + kSlotStride * kSlots;
constexpr u32 kReceived = kArrivalsAt + kArrivalsBytes, kCredit = kReceived + 8;  // with kSplit: barriers of partial sums, see finish_split
constexpr u32 kScratch = 1024;
constexpr u32 kPartialSums = kScratch + kConsumerWarps * 2 * 512;  // of the other CTAs of the cluster
constexpr u32 kX = kPartialSums + (kSplit - 1) * kPartialFloats * 4;  // 1024-byte aligned, for the swizzle
static_assert(kCredit + 8 * kSplit <= kScratch && kX % 1024 == 0);

// Copies the columns of x that go with each chunk of the work into boxes, as many as a power of two that is no more than the
// weight's slots: the columns of chunk i take the place of those of chunk i - boxes when consumers have given that chunk back.
__device__ __forceinline__ void produce_x(const MatmulArgs& p, const TensorMap* map, const u32 start, const Work& work, int lane) {
  prefetch_bias(p, work, lane);
  wait_for_predecessor();  // x may be its output
  start_successors();
  int box = 0, slot = 0;  // slot: of chunk i - boxes
  u32 parity = 0;
  i32 chunk_k = work.at(0).k;
  for (i32 i = 0; i < work.count; i++) {
    if (i >= p.boxes) {
      mbarrier_wait(start + kEmpty + kSlotStride * slot, parity);
      if (++slot == kSlots) slot = 0, parity ^= 1;
    }
    const u32 landed = start + kXLanded + i % kSlots * kSlotStride;
    if (lane == 0) mbarrier_expect(landed, kXBytes);
    __syncwarp();
    if (lane < kBlocksK)
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
          " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(start + kX + box * kXBytes + lane * kBoxBytes),
          "l"(map), "r"(chunk_k * kChunkCols + lane * kBlockCols), "r"(0), "r"(landed), "l"(kEvictLast)
          : "memory");
    if (work.ends_segment(i, chunk_k)) comes_to_end(p, work.at(i).strip, start + kArrivalsAt, lane);
    if (++chunk_k == work.k_end()) chunk_k = work.k_begin;
    if (++box == p.boxes) box = 0;
  }
}

// A chunk that has landed, and this warp's block in it.
struct Opened {
  BlockState block;
  Note note;
  u32 slot, parity;  // address of its barriers, and their phase
};

// What one warp multiplies: its block of every chunk of the work.
struct Consumer {
  const MatmulArgs& p;
  const u32 start;  // of shared memory
  const int thread;  // 32 x this warp's block of each chunk + lane
  const u32 x_first;  // shared address of its x in box 0, in row lane % 8, 16-byte column lane / 8, swizzled
  const BlockDecoder<kTokens == 8 || kTokens == 24> decoder;
  float acc[2][kTiles][4];
  static constexpr bool kXAhead = kTiles <= 4;  // more tiles would spill
  uint4 bx[kXAhead ? kTiles : 1];  // x of 32 columns
  u32 turn = 0;  // of the chunk to open next: its number x 2^28, so that the top bit is the phase of its slot's barriers

  __device__ __forceinline__ Consumer(const MatmulArgs& p, const u32 start, int thread)
      : p(p),
        start(start),
        thread(thread),
        x_first(start + kX + block() / kBlocksM * kBoxBytes + (lane() & 7) * 128 + (((lane() >> 3) ^ (lane() & 7)) << 4)),
        decoder(lane()) {
    clear(acc);
  }
  __device__ __forceinline__ int lane() const { return thread & 31; }
  __device__ __forceinline__ int block() const { return thread >> 5; }
  // Waits for the next chunk, and reads the masks of this warp's block in it.
  __device__ __forceinline__ void load(Opened& next, u32 chunk) {
    static_assert(kSlots == 8 && kSlotStride == 16);
    next.slot = (turn >> 24 & 0x70) | start;  // start is a multiple of 1024
    next.parity = turn >> 31;
    turn += 1u << 28;
    mbarrier_wait(next.slot + kLanded, next.parity);
    decoder.load(next.block, chunk, thread);
    next.note = read_note(next.slot + kNotes);
  }
  __device__ __forceinline__ void multiply(BlockState& state, u32 x_block, int s) {
    u32 fragment[2][4];
    if constexpr (kXAhead) {
      if (s % 2 == 0) {
#pragma unroll
        for (int n = 0; n < kTiles; n++) bx[n] = ldmatrix_x4((x_block + n * 1024) ^ (s ? 64u : 0u));
      }
      decoder.fragments(fragment, state, s);
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int n = 0; n < kTiles; n++)
          mma_m16n8k16(acc[r][n], fragment[r], (s & 1) ? bx[n].z : bx[n].x, (s & 1) ? bx[n].w : bx[n].y);
    } else {
      decoder.fragments(fragment, state, s);
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const uint2 b = ldmatrix_x2((x_block + n * 1024) ^ (s * 32));
#pragma unroll
        for (int r = 0; r < 2; r++) mma_m16n8k16(acc[r][n], fragment[r], b.x, b.y);
      }
    }
  }
  // Multiplies this warp's block of one chunk. With kAhead the next chunk is opened meanwhile.
  template <bool kAhead>
  __device__ __forceinline__ void chunk(Opened& now, Opened& next) {
    const u32 x = x_first + (now.slot & (p.boxes - 1) * kSlotStride) * (kXBytes / kSlotStride);
    if (kAhead) load(next, now.note.next_chunk);
    // This wait ends a basic block; without that the masks would be loaded, and the next block opened, last of all.
    mbarrier_wait(now.slot + kXLanded, now.parity);
    if (kAhead) decoder.open(next.block);
#pragma unroll
    for (int s = 0; s < 4; s++) multiply(now.block, x, s);
    __syncwarp();
    give_back_to(now.slot + kEmpty, lane());
  }
  __device__ __forceinline__ void open(Opened& next, u32 chunk) {
    load(next, chunk);
    decoder.open(next.block);
  }
  // Adds up the accumulators of the warps along k, in their order, 8 tokens at a time through shared memory, and clears them.
  // Fragment f, of band f % kBands and tile f / kBands, goes to warp f % kConsumerWarps: all warps have a share of what comes next.
  static constexpr int kFragments = kBands * kTiles, kOwn = (kFragments + kConsumerWarps - 1) / kConsumerWarps;
  static_assert(kConsumerWarps % kBands == 0);
  __device__ __forceinline__ void sum_own(float4 (&own)[kOwn]) {
    const u32 scratch = start + kScratch + lane() * 16;
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      named_barrier<1>(kConsumers);  // `scratch` is free
#pragma unroll
      for (int r = 0; r < 2; r++) sts_float4(scratch + (block() * 2 + r) * 512, acc[r][n]);
      named_barrier<1>(kConsumers);
      const int band = block() - n * kBands % kConsumerWarps;
      if (band >= 0 && band < kBands) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int q = 0; q < kWarpsK; q++) add(sum, lds_float4(scratch + (q * kBands + band) * 512));
        own[n * kBands / kConsumerWarps] = sum;
      }
    }
    clear(acc);
  }
  // Calls action(i, f) for own fragment i, which is fragment f of all.
  template <class Action>
  __device__ __forceinline__ void each_own(const Action& action) const {
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
      const int f = i * kConsumerWarps + block();
      if (f < kFragments) action(i, f);
    }
  }
  // Ends a segment with kSplit. Segment i belongs to CTA i % kSplit: the others send it their sums, straight into its shared
  // memory, and it adds them in the order of the ranks. `kReceived` completes when all have arrived; `kCredit + 8 r` in the
  // senders says that CTA r has read them and the next may come.
  __device__ __forceinline__ void finish_split(i32 strip) {
    const u32 segment = static_cast<u32>(strip) / (gridDim.x / kSplit), rank = blockIdx.x % kSplit;
    const u32 owner = segment % kSplit, round = segment / kSplit & 1;
    constexpr u32 kBytes = kPartialFloats * 4;
    const u32 sums = start + kPartialSums;
    if (segment == 0) cluster_wait();  // the others' barriers are ready
    float4 own[kOwn];
    sum_own(own);
    if (rank != owner) {
      if (segment >= kSplit) mbarrier_wait(start + kCredit + 8 * owner, round ^ 1);
      const u32 to = in_cta(sums + (rank - (rank > owner)) * kBytes, owner), received = in_cta(start + kReceived, owner);
      each_own([&](int i, int f) {
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                to + (f * 32 + lane()) * 16),
            "f"(own[i].x), "f"(own[i].y), "f"(own[i].z), "f"(own[i].w), "r"(received)
            : "memory");
      });
    } else {
      if (thread == 0) mbarrier_expect(start + kReceived, (kSplit - 1) * kBytes);
      mbarrier_wait(start + kReceived, round);
      each_own([&](int i, int f) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (u32 q = 0; q < kSplit; q++)
          add(sum, q == rank ? own[i] : lds_float4(sums + (q - (q > rank)) * kBytes + (f * 32 + lane()) * 16));
        store_own(strip, f, sum);
      });
      // Only a CTA that will send again still waits for this.
      __syncwarp();
      if (strip + static_cast<i32>(gridDim.x) < p.strips && lane() < kSplit && lane() != rank)
        mbarrier_arrive_remote(in_cta(start + kCredit + 8 * rank, lane()));
    }
  }
  __device__ __forceinline__ void store_own(i32 strip, int f, const float4& sum) const {
    store_fragment(p, row_block_of(p, strip) * kChunkRows + f % kBands * 16, first_token_of(p, strip) + f / kBands * 8, sum, lane());
  }
  // Ends a segment without kSplit: as finish_range of wide_finish.cuh does.
  __device__ __forceinline__ void finish_range(i32 strip) {
    const Range range = own_range(p);
    const bool whole = covers(p, range, strip);
    float4 own[kOwn];
    sum_own(own);
    if (!whole) {
      const Partials partials(p, strip);
      if (!adds_up(p, range, strip, start + kArrivalsAt)) {
        each_own([&](int i, int f) { __stcg(partial_of(p, range, strip) + f * 32 + lane(), own[i]); });
        leaves_sums<kConsumers>();
        return;
      }
      const int mine = range.index - partials.first;
      each_own([&](int i, int f) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
        for (int j = 0; j < partials.count; j++) add(sum, j == mine ? own[i] : __ldcg(partials.of(j) + f * 32 + lane()));
        own[i] = sum;
      });
    }
    each_own([&](int i, int f) { store_own(strip, f, own[i]); });
  }
  __device__ __forceinline__ void run() {
    Opened now;
    open(now, start + p.ring_at);
    while (true) {
      Opened next;
      while (now.note.flags == 0) {
        chunk<true>(now, next);
        now = next;
      }
      chunk<false>(now, next);  // a range ends with a segment, so this is no end of work
      if (now.note.flags & kEndOfSegment) finish(now.note.strip);
      open(next, now.note.next_chunk);
      if (next.note.flags & kEndOfWork) return;
      now = next;
    }
  }
  __device__ __forceinline__ void finish(i32 strip) {
    wait_for_predecessor();  // it may still use the partials, or read y
    if constexpr (kSplit > 1) {
      finish_split(strip);
    } else {
      finish_range(strip);
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) spinfer_matmul(const __grid_constant__ LaunchArgs args) {
  extern __shared__ __align__(1024) u8 memory[];
  const MatmulArgs& p = args.matmul;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 start = smem_address(memory);
  if (threadIdx.x == 0) {
    init_slots(start, kConsumerWarps);
    if (kSplit == 1) init_arrivals(start + kArrivalsAt);
    for (int i = 0; i < kSlots; i++) mbarrier_init(start + kXLanded + kSlotStride * i, 1);
    if constexpr (kSplit > 1) {
      mbarrier_init(start + kReceived, 1);
      for (int i = 0; i < kSplit; i++) mbarrier_init(start + kCredit + 8 * i, kConsumerWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if constexpr (kSplit > 1) cluster_arrive();
  if (warp >= kConsumerWarps) {
    const Work work(p);
    WeightProducer producer(p, start, work, lane);
    if (warp == kConsumerWarps) {
      producer.load_offsets(0);
      if (!kByCost) producer.prefetch_first();  // chunks of such weights are uneven
    }
    cta_barrier();
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    if (warp == kConsumerWarps) producer.run();
    if (warp == kConsumerWarps + 1) produce_x(p, &args.x_map, start, work, lane);
    if (kSplit == 1 && warp == kConsumerWarps + 2) take_turns<kConsumers>(p, work, start + kArrivalsAt, lane);
    if constexpr (kSplit > 1) cluster_wait();
  } else {
    cta_barrier();
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // or the compiler reads it anew in the loop, and takes 6 instructions more a block
    Consumer(p, start, thread).run();
  }
}
