// y = x W^T + bias on Hopper for many tokens: as matmul_sm90.cu, with wgmma and all passes over the weight in one launch.
//
// Eight or sixteen consumer warps. Each decodes tiles of 16 rows into A fragments in registers, one or both of a block, and a
// wgmma for each, or two, multiplies them with a box of x: 64 columns, in a ring of its own. Where more than one warpgroup is left for
// the columns of a chunk, they take turns with the boxes.
//
// The prefix sums of a block are made in stages, behind the wgmmas of the first three steps of the block before.
//
// CTAs have a range of chunks each, or are pairs (kSplit) or twins (kTwins): see matmul.cuh. In a cluster the shared addresses of
// all CTAs but the first have high bits set, so that none may be made up: 0 is the first one's.
#include "arrivals.cuh"
#include "common.cuh"
#include "decode_scan.cuh"
#include "layout.cuh"
#include "matmul.cuh"
#include "sm90.cuh"
#include "wgmma.cuh"
#include "wide_finish.cuh"

#ifndef SPINFER_WARPS
#define SPINFER_WARPS 8
#endif
#ifndef SPINFER_BANDS
#define SPINFER_BANDS 1
#endif
constexpr int kConsumerWarps = SPINFER_WARPS;
constexpr int kBandsAWarp = SPINFER_BANDS;  // of 16 rows: one tile of a block, or both
constexpr int kWarpsM = kBands / kBandsAWarp;
constexpr int kWarpsK = kConsumerWarps / kWarpsM;
static_assert(kWarpsM % 4 == 0, "the warps of a warpgroup read the same x");
constexpr int kBlocksAWarp = kBlocksK / kWarpsK;
constexpr int kThreads = kConsumerWarps * 32 + 128;  // setmaxnreg works on groups of four warps
// consumers x registers + producers x registers <= threads x registers at launch, or the kernel would hang.
constexpr int kConsumerRegisters = kConsumerWarps == 16 ? 104 : 232, kProducerRegisters = 40;

constexpr u32 kBoxBytes = kTokens * 128;  // 64 columns of x
constexpr int kHalvesOfX = kTokens > 256 ? 2 : 1;  // a wgmma has 256 columns at most, a copy as many rows
constexpr u32 kHalfBytes = kBoxBytes / kHalvesOfX;
constexpr int kCopies = kTwins > 1 ? 1 : kHalvesOfX, kCopyTokens = kTokens / kTwins / kCopies;  // of each CTA
static_assert(kTiles % kHalvesOfX == 0 && kCopyTokens <= 256);
constexpr int kMaxBoxes = 16;

// Addresses in shared memory, after those of sm90.cuh.
constexpr u32 kBoxLanded = kFree, kBoxEmpty = kBoxLanded + 8 * kMaxBoxes;
constexpr u32 kArrivalsAt = kBoxEmpty + 8 * kMaxBoxes;
constexpr u32 kScratch = 1024;
constexpr u32 kX = kScratch + finish_bytes(kConsumerWarps);  // 1024-byte aligned, for the swizzle
static_assert(kArrivalsAt + kArrivalsBytes <= kScratch && kX % 1024 == 0);

// Copies the boxes of x that go with each chunk, in the order in which consumers use them: warp_k fastest.
__device__ __forceinline__ void produce_x(const MatmulArgs& p, const TensorMap* map, const u32 start, const Work& work, int lane) {
  prefetch_bias(p, work, lane);
  wait_for_predecessor();  // x may be its output
  start_successors();
  int slot = 0;
  u32 parity = 1;  // the first pass over the slots finds them empty
  Place place = work.at(0);
  for (i32 done = 0; done < work.count; done++) {
    const int part = static_cast<int>(blockIdx.x % kTwins) * (kTokens / kTwins);  // this twin's
    const i32 token = first_token_of(p, place.strip) + part;
#pragma unroll 1
    for (int b = 0; b < kBlocksK; b++) {
      mbarrier_wait(start + kBoxEmpty + 8 * slot, parity);
      if (lane == 0) {
        const u32 landed = start + kBoxLanded + 8 * slot, to = start + kX + slot * kBoxBytes + part * 128;
        const int column = place.k * kChunkCols + (b % kWarpsK * kBlocksAWarp + b / kWarpsK) * kBlockCols;
        mbarrier_expect(landed, kBoxBytes);
        if constexpr (kTwins > 1) {
          asm volatile(
              "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
              " [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
              "l"(map), "r"(column), "r"(token), "r"(landed), "h"(static_cast<u16>((1 << kTwins) - 1)), "l"(kEvictLast)
              : "memory");
        } else {
#pragma unroll
          for (int i = 0; i < kCopies; i++)
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to + i * kCopyTokens * 128),
                "l"(map), "r"(column), "r"(token + i * kCopyTokens), "r"(landed), "l"(kEvictLast)
                : "memory");
        }
      }
      __syncwarp();
      if (++slot == p.boxes) slot = 0, parity ^= 1;
    }
    if (work.ends_segment(done, place.k)) comes_to_end(p, place.strip, start + kArrivalsAt, lane);
    if (++place.k == work.k_end()) place = {place.strip + work.strip_step, 0};
  }
}
// Gives a box back, to the twin's copying warp too.
__device__ __forceinline__ void give_box_back(u32 barrier, int lane) {
  if constexpr (kTwins > 1) {
#pragma unroll
    for (int q = 0; q < (SPINFER_EVERY_LANE_ARRIVES ? kTwins : 1); q++) {
      const int twin = SPINFER_EVERY_LANE_ARRIVES ? q : lane;
      if (twin < kTwins) mbarrier_arrive_remote(in_cta(barrier, twin));
    }
  } else {
    give_back_to(barrier, lane);
  }
}

// What one warp multiplies: its blocks of every chunk of the work.
struct Consumer {
  const MatmulArgs& p;
  const u32 start;  // of shared memory
  const int lane, warp_m, warp_k;
  const int tile;  // the one tile of a block that is this warp's, with kBandsAWarp 1
  float acc[kBandsAWarp][kTiles][4];
  u32 a[2][kBandsAWarp][4];  // fragments of two steps: one being multiplied, one being decoded
  u32 raw[kBandsAWarp][8];   // of the next step: two values for each pair, whether there or not
  OpenTiles<kBandsAWarp> block;
  TileOpener<kBandsAWarp, kConsumerWarps == 8> next;
  int slot = 0;
  u32 parity = 0;
  int box, box_parity = 0;
  u32 box_held = 0;   // barrier of the box that the latest products may still read
  u32 slot_held = 0;  // of the chunk likewise

  __device__ __forceinline__ Consumer(const MatmulArgs& p, const u32 start, int warp, int lane)
      : p(p),
        start(start),
        lane(lane),
        warp_m(warp % kWarpsM),
        warp_k(warp / kWarpsM),
        tile(warp % 2),
        next(lane),
        box(warp / kWarpsM) {
    clear(acc);
  }
  __device__ __forceinline__ int block_at(int b) const {
    return (warp_k * kBlocksAWarp + b) * kBlocksM + warp_m * kBandsAWarp / 2;
  }
  // Masks, and nonzeros of each step, of a block of a chunk that is there, or of an empty block.
  __device__ __forceinline__ void load_next(u32 chunk, int index, bool there) {
    const u32 header = there ? lds_u32(chunk + index * 4) : 0;
    const u32 at = there ? chunk + kHeaderBytes + index * 256 + lane * 8 : 0;
    const u32 values = (there ? chunk : start) + kValuesAt;
    if constexpr (kBandsAWarp == 2) {
      const uint2 masks = there ? lds_v2(at) : make_uint2(0, 0);
      next.tiles.mask[0] = masks.x;
      next.tiles.mask[kBandsAWarp - 1] = masks.y;
      next.tiles.base[0] = values + (header & 0xffffu);
      next.tiles.base[kBandsAWarp - 1] = values + (header >> 16);
    } else {
      next.tiles.mask[0] = there ? lds_u32(at + tile * 4) : 0;
      next.tiles.base[0] = values + (tile ? header >> 16 : header & 0xffffu);
    }
    next.count();
  }
  // Multiplies what was loaded for step s.
  __device__ __forceinline__ void multiply(u64 descriptor, int s) {
    u32(&f)[kBandsAWarp][4] = a[s & 1];
    wgmma_wait<1>();  // of the products of two steps ago, which read these registers
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++) block.select(f[r], raw, r, s);
    wgmma_fence();
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
      for (int half = 0; half < kHalvesOfX; half++)
        wgmma(reinterpret_cast<float(&)[kTiles / kHalvesOfX][4]>(acc[r][half * (kTiles / kHalvesOfX)]), f[r],
              descriptor + 2 * s + half * (kHalfBytes / 16));
    wgmma_commit();
  }
  // After a wait for all products of a block: gives back its box, and the chunk if it was the last of it.
  __device__ __forceinline__ void give_back() {
    __syncwarp();
    if (box_held) {
      give_box_back(box_held, lane);
      box_held = 0;
    }
    if (slot_held) {
      give_back_to(slot_held, lane);
      slot_held = 0;
    }
  }
  // Opens a chunk's first block and loads its first values, with nothing to overlap.
  __device__ __forceinline__ void open_now(u32 chunk) {
    load_next(chunk, block_at(0), true);
    next.scan_all();
    next.finish();
    block = next.tiles;
    block.gather(raw, 0);
  }
  __device__ __forceinline__ void run() {
    u32 chunk = start + p.ring_at;
    mbarrier_wait(start + kLanded, 0);
    open_now(chunk);
    Note note = read_note(start + kNotes + kSlotStride * slot);
    while (true) {
      const u32 empty = start + kEmpty + kSlotStride * slot;
      if (++slot == kSlots) slot = 0, parity ^= 1;
#pragma unroll
      for (int b = 0; b < kBlocksAWarp; b++) {
        // The next chunk is opened ahead unless the segment ends, where registers are short, or there is none yet.
        const bool there = b + 1 < kBlocksAWarp || !note.flags;
        const u64 descriptor = wgmma_descriptor(start + kX + box * kBoxBytes);
        mbarrier_wait(start + kBoxLanded + 8 * box, box_parity);
        multiply(descriptor, 0);
        block.gather(raw, 1);
        if (b + 1 == kBlocksAWarp && there) mbarrier_wait(start + kLanded + kSlotStride * slot, parity);
        load_next(b + 1 < kBlocksAWarp ? chunk : note.next_chunk, block_at((b + 1) % kBlocksAWarp), there);
        wgmma_wait<1>();  // all of the block before
        give_back();
        next.scan<1>();
        next.scan<2>();
        multiply(descriptor, 1);
        block.gather(raw, 2);
        next.scan<4>();
        next.scan<8>();
        multiply(descriptor, 2);
        block.gather(raw, 3);
        next.scan<16>();
        next.finish();
        multiply(descriptor, 3);
        block = next.tiles;
        block.gather(raw, 0);
        box_held = start + kBoxEmpty + 8 * box;
        box += kWarpsK;
        if (box >= p.boxes) box -= p.boxes, box_parity ^= 1;
      }
      slot_held = empty;
      if (note.flags) {
        wgmma_wait<0>();
        give_back();
        if (note.flags & kEndOfSegment) {
          wait_for_predecessor();  // it may still use the partials, or read y
          const WarpPlace place{warp_m, warp_k, lane};
          if constexpr (kSplit > 1) return finish_split<kWarpsM, kWarpsK>(p, acc, note.strip, start + kX, place);
          finish_range<kWarpsM, kWarpsK>(p, acc, note.strip, start + kScratch, start + kArrivalsAt, place);
        }
        mbarrier_wait(start + kLanded + kSlotStride * slot, parity);
        if (read_note(start + kNotes + kSlotStride * slot).flags & kEndOfWork) return;
        open_now(note.next_chunk);
      }
      chunk = note.next_chunk;
      note = read_note(start + kNotes + kSlotStride * slot);
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
    for (int i = 0; i < p.boxes; i++) {
      mbarrier_init(start + kBoxLanded + 8 * i, 1);
      mbarrier_init(start + kBoxEmpty + 8 * i, kArrivals * kWarpsM * kTwins);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if constexpr (kTwins > 1) cluster_arrive();
  if (warp >= kConsumerWarps) {
    const Work work(p);
    WeightProducer producer(p, start, work, lane);
    if (warp == kConsumerWarps) producer.load_offsets(0);
    cta_barrier();
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    if (warp == kConsumerWarps) producer.run();
    if constexpr (kTwins > 1) {
      __syncwarp();
      cluster_wait();  // the twin's barriers are ready
    }
    if (warp == kConsumerWarps + 1) produce_x(p, &args.x_map, start, work, lane);
    if (kSplit == 1 && warp == kConsumerWarps + 2) take_turns<kConsumerWarps * 32>(p, work, start + kArrivalsAt, lane);
  } else {
    cta_barrier();
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    if constexpr (kTwins > 1) cluster_wait();
    Consumer(p, start, warp, lane).run();
    if constexpr (kTwins > 1) {
      __syncwarp();
      cluster_arrive();  // until the twin has given everything back
      cluster_wait();
    }
  }
}
