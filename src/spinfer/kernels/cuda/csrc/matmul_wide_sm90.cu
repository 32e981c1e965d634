// y = x W^T + bias on Hopper for many tokens: as matmul_sm90.cu, with wgmma and all passes over the weight in one launch.
//
// Eight or sixteen consumer warps. Each decodes tiles of 16 rows into A fragments in registers, one or both of a block, and a
// wgmma for each multiplies them with a box of x: 64 columns, in a ring of its own. Where more than one warpgroup is left for
// the columns of a chunk, they take turns with the boxes.
//
// Integer MMAs would queue behind the wgmmas, so the prefix sums of decode.cuh are made with shuffles here, in stages, behind
// the wgmmas of each step of the block before.
#include "common.cuh"
#include "layout.cuh"
#include "matmul.cuh"
#include "sm90.cuh"
#include "wgmma.cuh"

#ifndef SPINFER_WARPS
#define SPINFER_WARPS 8
#endif
constexpr int kConsumerWarps = SPINFER_WARPS;
constexpr int kBandsAWarp = kConsumerWarps == 16 || kBlocksM == 2 || kTokens > 128 ? 1 : 2;  // of 16 rows
constexpr int kWarpsM = kBands / kBandsAWarp;
constexpr int kWarpsK = kConsumerWarps / kWarpsM;
static_assert(kWarpsM % 4 == 0, "the warps of a warpgroup read the same x");
constexpr int kBlocksAWarp = kBlocksK / kWarpsK;
constexpr int kThreads = kConsumerWarps * 32 + 128;  // setmaxnreg works on groups of four warps
// consumers x registers + producers x registers <= threads x registers at launch, or the kernel would hang.
constexpr int kConsumerRegisters = kConsumerWarps == 16 ? 104 : 232, kProducerRegisters = 40;

constexpr u32 kBoxBytes = kTokens * 128;  // 64 columns of x
constexpr int kMaxBoxes = 16;

// Addresses in shared memory, after those of sm90.cuh.
constexpr u32 kBoxLanded = kFree, kBoxEmpty = kBoxLanded + 8 * kMaxBoxes;
constexpr u32 kFlag = kBoxEmpty + 8 * kMaxBoxes;
constexpr u32 kScratch = 1024;
constexpr u32 kX = kScratch + scratch_bytes(kWarpsK);  // 1024-byte aligned, for the swizzle
static_assert(kFlag + 16 <= kScratch && kX % 1024 == 0);

// Copies the boxes of x that go with each chunk, in the order in which consumers use them: warp_k fastest.
__device__ __forceinline__ void produce_x(const MatmulArgs& p, const TensorMap* map, const u32 start, const Work& work, int lane) {
  wait_for_predecessor();  // x may be its output
  int slot = 0;
  u32 parity = 1;  // the first pass over the slots finds them empty
  Place place = work.at(0);
  for (i32 i = 0; i < work.count; i++) {
    const i32 token = first_token_of(p, place.strip);
#pragma unroll 1
    for (int b = 0; b < kBlocksK; b++) {
      mbarrier_wait(start + kBoxEmpty + 8 * slot, parity);
      if (lane == 0) {
        const u32 landed = start + kBoxLanded + 8 * slot;
        const int column = place.k * kChunkCols + (b % kWarpsK * kBlocksAWarp + b / kWarpsK) * kBlockCols;
        mbarrier_expect(landed, kBoxBytes);
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(start + kX + slot * kBoxBytes),
            "l"(map), "r"(column), "r"(token), "r"(landed), "l"(kEvictLast)
            : "memory");
      }
      __syncwarp();
      if (++slot == p.boxes) slot = 0, parity ^= 1;
    }
    if (++place.k == work.k_end()) place = {place.strip + 1, 0};
  }
}

// The tiles of a block that a warp decodes, of which all but the values themselves is known.
struct Block {
  u32 mask[kBandsAWarp];
  u32 base[kBandsAWarp];   // shared address of each tile's values
  u32 at[kBandsAWarp][4];  // values before the lane's upper pair in steps 2 s (low half) and 2 s + 1 (high half)
};

// v of the lanes up to and with this one, `offset` of them more than before.
template <int kOffset>
__device__ __forceinline__ void add_from_below(u32& v) {
  asm volatile(
      "{\n.reg .pred there;\n.reg .b32 below;\nshfl.sync.up.b32 below|there, %0, %1, 0, 0xffffffff;\n"
      "@there add.u32 %0, %0, below;\n}"
      : "+r"(v)
      : "n"(kOffset));
}

// Works out a Block in stages.
struct Opener {
  Block block;
  u32 own[kBandsAWarp][2];  // nonzeros of the lane, a byte a step
  u32 sum[kBandsAWarp][2];  // those of the lanes up to this one, of which there are at most 128

  // Masks, and nonzeros of each step. Of a chunk that is not there: an empty block. `tile` is the one of the block to take
  // with kBandsAWarp 1.
  __device__ __forceinline__ void load(u32 chunk, int index, int tile, int lane, bool there) {
    const u32 header = there ? lds_u32(chunk + index * 4) : 0;
    const u32 at = there ? chunk + kHeaderBytes + index * 256 + lane * 8 : 0;
    const u32 values = (there ? chunk : 0) + kValuesAt;
    if constexpr (kBandsAWarp == 2) {
      const uint2 masks = there ? lds_v2(at) : make_uint2(0, 0);
      block.mask[0] = masks.x;
      block.mask[kBandsAWarp - 1] = masks.y;
      block.base[0] = values + (header & 0xffffu);
      block.base[kBandsAWarp - 1] = values + (header >> 16);
    } else {
      block.mask[0] = there ? lds_u32(at + tile * 4) : 0;
      block.base[0] = values + (tile ? header >> 16 : header & 0xffffu);
    }
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 y0 = block.mask[r] >> (4 * h), y1 = block.mask[r] >> (4 * h + 2);
        // Odd steps' bits weigh 2: times 128 they count in the next byte.
        const u32 low = __dp4a(y0 & 0x02020202u, 0x80808080u, __dp4a(y0 & 0x01010101u, 0x01010101u, 0u));
        const u32 high = __dp4a(y1 & 0x02020202u, 0x80808080u, __dp4a(y1 & 0x01010101u, 0x01010101u, 0u));
        own[r][h] = sum[r][h] = high * 0x10000u + low;
      }
  }
  template <int kOffset>
  __device__ __forceinline__ void scan() {
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) add_from_below<kOffset>(sum[r][h]);
  }
  // Adds the nonzeros of the steps before each.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++) {
      u32 before = 0;  // of steps 2 s and 2 s + 1
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 total = __shfl_sync(~0u, sum[r][h], 31);
        const u32 lanes = sum[r][h] - own[r][h];
        const u32 first = prmt(lanes, 0, 0x4140u) + prmt(total, 0, 0x4044u), second = prmt(lanes, 0, 0x4342u) + prmt(total, 0, 0x4244u);
        block.at[r][2 * h] = before * 0x10001u + first;
        before = __dp4a(total, 0x00000101u, before);
        block.at[r][2 * h + 1] = before * 0x10001u + second;
        before = __dp4a(total, 0x01010000u, before);
      }
    }
  }
};

// What one warp multiplies: its blocks of every chunk of the work.
struct Consumer {
  const MatmulArgs& p;
  const u32 start;  // of shared memory
  const int lane, warp_m, warp_k;
  const int tile;  // the one tile of a block that is this warp's, with kBandsAWarp 1
  float acc[kBandsAWarp][kTiles][4];
  u32 a[2][kBandsAWarp][4];  // fragments of two steps: one being multiplied, one being decoded
  u32 raw[kBandsAWarp][8];   // of the next step: two values for each pair, whether there or not
  Block block;
  Opener next;
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
        box(warp / kWarpsM) {
    clear(acc);
  }
  __device__ __forceinline__ int block_at(int b) const {
    return (warp_k * kBlocksAWarp + b) * kBlocksM + warp_m * kBandsAWarp / 2;
  }
  // Loads what steps 2 s and 2 s + 1 of 8 columns may need.
  __device__ __forceinline__ void gather(const Block& b, int s) {
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++) {
      const u32 y = b.mask[r] >> (2 * s);
      const u32 even = __dp2a_lo(b.at[r][s], 0x0002u, b.base[r]), odd = __dp2a_lo(b.at[r][s], 0x0200u, b.base[r]);
      const u32 even_lower = __dp4a(y & 0x01010101u, 0x00000202u, even), odd_lower = __dp4a(y & 0x02020202u, 0x00000101u, odd);
      raw[r][0] = lds_u16<0>(even);
      raw[r][1] = lds_u16<2>(even);
      raw[r][2] = lds_u16<0>(even_lower);
      raw[r][3] = lds_u16<2>(even_lower);
      raw[r][4] = lds_u16<0>(odd);
      raw[r][5] = lds_u16<2>(odd);
      raw[r][6] = lds_u16<0>(odd_lower);
      raw[r][7] = lds_u16<2>(odd_lower);
    }
  }
  // Turns those of one tile into its fragment.
  __device__ __forceinline__ void select(u32 (&f)[4], const Block& b, int r, int s) const {
    const u32 y = b.mask[r] >> (2 * s);
    const u32 even = y & 0x01010101u, odd = y & 0x02020202u;
    // Selectors as in decode.cuh.
    f[0] = prmt(raw[r][0], raw[r][1], __dp2a_lo(0xDE0043DEu, even, 0x3232u));
    f[1] = prmt(raw[r][2], raw[r][3], __dp2a_hi(0xDE0043DEu, even, 0x3232u));
    f[2] = prmt(raw[r][4], raw[r][5], __dp2a_lo(0x6F0021EFu, odd, 0x3232u));
    f[3] = prmt(raw[r][6], raw[r][7], __dp2a_hi(0x6F0021EFu, odd, 0x3232u));
  }
  // Multiplies what was loaded for step s.
  __device__ __forceinline__ void multiply(u64 descriptor, int s) {
    u32(&f)[kBandsAWarp][4] = a[s & 1];
    wgmma_wait<1>();  // of the products of two steps ago, which read these registers
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++) select(f[r], block, r, s);
    wgmma_fence();
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++) wgmma(acc[r], f[r], descriptor + 2 * s);
    wgmma_commit();
  }
  // After a wait for all products of a block: gives back its box, and the chunk if it was the last of it.
  __device__ __forceinline__ void give_back() {
    __syncwarp();
    if (box_held) {
      if (lane == 0) mbarrier_arrive(box_held);
      box_held = 0;
    }
    if (slot_held) {
      if (lane == 0) mbarrier_arrive(slot_held);
      slot_held = 0;
    }
  }
  // Opens a chunk's first block and loads its first values, with nothing to overlap.
  __device__ __forceinline__ void open_now(u32 chunk) {
    next.load(chunk, block_at(0), tile, lane, true);
    next.scan<1>();
    next.scan<2>();
    next.scan<4>();
    next.scan<8>();
    next.scan<16>();
    next.finish();
    block = next.block;
    gather(block, 0);
  }
  __device__ __forceinline__ void run() {
    u32 chunk = start + p.ring_at;
    mbarrier_wait(start + kLanded, 0);
    open_now(chunk);
    Note note = read_note(start + kNotes + 16 * slot);
    while (true) {
      const u32 empty = start + kEmpty + 8 * slot;
      if (++slot == p.slots) slot = 0, parity ^= 1;
#pragma unroll
      for (int b = 0; b < kBlocksAWarp; b++) {
        // The next chunk is opened ahead unless the segment ends, where registers are short, or there is none yet.
        const bool there = b + 1 < kBlocksAWarp || !note.flags;
        const u64 descriptor = wgmma_descriptor(start + kX + box * kBoxBytes);
        mbarrier_wait(start + kBoxLanded + 8 * box, box_parity);
        multiply(descriptor, 0);
        gather(block, 1);
        if (b + 1 == kBlocksAWarp && there) mbarrier_wait(start + kLanded + 8 * slot, parity);
        next.load(b + 1 < kBlocksAWarp ? chunk : note.next_chunk, block_at((b + 1) % kBlocksAWarp), tile, lane, there);
        wgmma_wait<1>();  // all of the block before
        give_back();
        multiply(descriptor, 1);
        gather(block, 2);
        next.scan<1>();
        next.scan<2>();
        next.scan<4>();
        multiply(descriptor, 2);
        gather(block, 3);
        next.scan<8>();
        next.scan<16>();
        multiply(descriptor, 3);
        next.finish();
        block = next.block;
        gather(block, 0);
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
          finish_segment<kWarpsK>(p, acc, note.strip, start + kScratch, start + kFlag, warp_m * kBandsAWarp, warp_k, lane);
        }
        mbarrier_wait(start + kLanded + 8 * slot, parity);
        if (read_note(start + kNotes + 16 * slot).flags & kEndOfWork) return;
        open_now(note.next_chunk);
      }
      chunk = note.next_chunk;
      note = read_note(start + kNotes + 16 * slot);
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
      mbarrier_init(start + kEmpty + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < p.boxes; i++) {
      mbarrier_init(start + kBoxLanded + 8 * i, 1);
      mbarrier_init(start + kBoxEmpty + 8 * i, kWarpsM);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if (warp >= kConsumerWarps) {
    const Work work(p);
    WeightProducer producer(p, start, work, lane);
    if (warp == kConsumerWarps) producer.load_offsets(0);
    cta_barrier();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    if (warp == kConsumerWarps) producer.run();
    if (warp == kConsumerWarps + 1) produce_x(p, &args.x_map, start, work, lane);
  } else {
    cta_barrier();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    Consumer(p, start, warp, lane).run();
  }
}
