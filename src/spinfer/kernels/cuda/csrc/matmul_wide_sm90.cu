// y = x W^T + bias on Hopper for many tokens: as matmul_sm90.cu, with wgmma and all passes over the weight in one launch.
//
// Eight consumer warps. Each decodes blocks of 32 rows into A fragments in registers, and a wgmma for each tile of the block
// multiplies them with a box of x: 64 columns, in a ring of its own. Where a chunk has 64 rows only, two warps share a block, a
// tile each, and half of the boxes belong to each warpgroup.
//
// Integer MMAs queue behind wgmmas, so nothing may wait for one: a block's prefix sums, down to the byte offset of every
// lane's values, are worked out in four stages, one behind the wgmmas of each step of the block before.
#include "common.cuh"
#include "layout.cuh"
#include "matmul.cuh"
#include "sm90.cuh"
#include "wgmma.cuh"

constexpr int kConsumerWarps = 8;
constexpr int kBandsAWarp = kBlocksM == 2 ? 1 : 2;  // of 16 rows
constexpr int kWarpsM = kBands / kBandsAWarp;
constexpr int kWarpsK = kConsumerWarps / kWarpsM;
static_assert(kWarpsM % 4 == 0, "the warps of a warpgroup read the same x");
constexpr int kBlocksAWarp = kBlocksK / kWarpsK;
constexpr int kThreads = kConsumerWarps * 32 + 128;  // setmaxnreg works on groups of four warps
// consumers x registers + producers x registers <= threads x registers at launch, or the kernel would hang.
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;

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
  u32 at[kBandsAWarp][4];  // byte offset of the lane's upper pair in steps 2 s (low half) and 2 s + 1 (high half)
};

// Works out a Block in stages; see decode.cuh for what the MMAs compute.
struct Opener {
  u32 step_bits, triangle, ones, zero, within0, within1;
  u32 place[4];

  __device__ __forceinline__ explicit Opener(int lane) {
    const int g = lane >> 2, t = lane & 3;
    step_bits = 0x01010101u << g;
    triangle = (2 * t < g ? 1u : 0u) | (2 * t + 1 < g ? 0x10000u : 0u);
    ones = 0x00010001u;
    zero = 0;
    within0 = (!(g & 1) && t < (g >> 1)) ? 0x02020202u : 0u;
    within1 = ((g & 1) && t < (g >> 1)) ? 0x01010101u : 0u;
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const int step = 2 * s + (g & 1);
      place[s] = (2 * t == step ? 2u : 0u) | (2 * t + 1 == step ? 0x200u : 0u) | (2 * t < step ? 0x20000u : 0u) |
                 (2 * t + 1 < step ? 0x2000000u : 0u);
      asm volatile("" : "+r"(place[s]));
    }
    asm volatile("" : "+r"(step_bits), "+r"(triangle), "+r"(ones), "+r"(zero), "+r"(within0), "+r"(within1));
  }
  // Stage 0: masks, and nonzeros of each step in each quad of lanes. Of a chunk that is not there: an empty block.
  // `tile` is the one of the block to take with kBandsAWarp 1.
  __device__ __forceinline__ void load(Block& b, Int4 (&counts)[kBandsAWarp], u32 chunk, int block, int tile, int lane, bool there) const {
    const u32 header = there ? lds_u32(chunk + block * 4) : 0;
    const u32 at = there ? chunk + kHeaderBytes + block * 256 + lane * 8 : 0;
    const u32 values = (there ? chunk : 0) + kValuesAt;
    if constexpr (kBandsAWarp == 2) {
      const uint2 masks = there ? lds_v2(at) : make_uint2(0, 0);
      b.mask[0] = masks.x;
      b.mask[kBandsAWarp - 1] = masks.y;
      b.base[0] = values + (header & 0xffffu);
      b.base[kBandsAWarp - 1] = values + (header >> 16);
    } else {
      b.mask[0] = there ? lds_u32(at + tile * 4) : 0;
      b.base[0] = values + (tile ? header >> 16 : header & 0xffffu);
    }
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++) counts[r] = bmma_and_popc(step_bits, zero, b.mask[r], {0, 0, 0, 0});
  }
  // Stage 1: prefix over the quads and totals of each step.
  __device__ __forceinline__ void sum(Int4 (&sums)[kBandsAWarp], const Int4 (&counts)[kBandsAWarp]) const {
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++) {
      const u32 pair = static_cast<u32>(counts[r].a) + static_cast<u32>(counts[r].b) * 0x10000u;
      sums[r] = imma_k16(triangle, ones, pair, {0, 0, 0, 0});
    }
  }
  // Stages 2 and 3: byte offsets for steps 4 h to 4 h + 3, two
  // at a time, as (tile 0 even step, tile 0 odd, tile 1 even, tile 1 odd). Half 1 is due when the block's first values are already being loaded.
  __device__ __forceinline__ void place_half(Int4 (&offsets)[2], const u32 (&prefix)[2], const Block& b, int h) const {
#pragma unroll
    for (int i = 0; i < 2; i++) offsets[i] = imma_k16(prefix[0], prefix[1], place[2 * h + i], {0, 0, 0, 0});
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int s = 2 * h + i;
      const u32 y0 = b.mask[0] >> (2 * s), y1 = kBandsAWarp == 2 ? b.mask[kBandsAWarp - 1] >> (2 * s) : 0;
      offsets[i] = imma_k32(y0 & 0x01010101u, y1 & 0x01010101u, y0 & 0x02020202u, y1 & 0x02020202u, within0, within1, offsets[i]);
    }
  }
  __device__ __forceinline__ static void join(u32 (&prefix)[2], const Int4 (&sums)[kBandsAWarp]) {
    prefix[1] = 0;
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++)
      prefix[r] = static_cast<u32>(sums[r].a) + static_cast<u32>(sums[r].b) * 0x100u + static_cast<u32>(sums[r].c) * 0x10000u +
                  static_cast<u32>(sums[r].d) * 0x1000000u;
  }
  __device__ __forceinline__ static void pack_half(Block& b, const Int4 (&offsets)[2], int h) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      b.at[0][2 * h + i] = prmt(static_cast<u32>(offsets[i].a), static_cast<u32>(offsets[i].b), 0x5410u);
      if constexpr (kBandsAWarp == 2)
        b.at[kBandsAWarp - 1][2 * h + i] = prmt(static_cast<u32>(offsets[i].c), static_cast<u32>(offsets[i].d), 0x5410u);
    }
  }
};

// What one warp multiplies: its blocks of every chunk of the work.
struct Consumer {
  const MatmulArgs& p;
  const u32 start;  // of shared memory
  const int lane, warp_m, warp_k;
  const int tile;  // the one tile of a block that is this warp's, with kBandsAWarp 1
  const Opener opener;
  u32 select_even, select_odd, select_none;
  float acc[kBandsAWarp][kTiles][4];
  u32 a[2][kBandsAWarp][4];  // fragments of two steps: one being multiplied, one being decoded
  u32 raw[kBandsAWarp][8];   // of the next step: two values for each pair, whether there or not
  Block block, next;
  Int4 counts[kBandsAWarp], sums[kBandsAWarp], offsets[2];
  u32 prefix[2];
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
        opener(lane),
        box(warp / kWarpsM) {
    select_even = 0xDE0043DEu;
    select_odd = 0x6F0021EFu;
    select_none = 0x3232u;
    asm volatile("" : "+r"(select_even), "+r"(select_odd), "+r"(select_none));
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
      const u32 even = __dp2a_lo(b.at[r][s], 0x0001u, b.base[r]), odd = __dp2a_lo(b.at[r][s], 0x0100u, b.base[r]);
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
    f[0] = prmt(raw[r][0], raw[r][1], __dp2a_lo(select_even, even, select_none));
    f[1] = prmt(raw[r][2], raw[r][3], __dp2a_hi(select_even, even, select_none));
    f[2] = prmt(raw[r][4], raw[r][5], __dp2a_lo(select_odd, odd, select_none));
    f[3] = prmt(raw[r][6], raw[r][7], __dp2a_hi(select_odd, odd, select_none));
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
    opener.load(block, counts, chunk, block_at(0), tile, lane, true);
    opener.sum(sums, counts);
    opener.join(prefix, sums);
    opener.place_half(offsets, prefix, block, 0);
    opener.pack_half(block, offsets, 0);
    opener.place_half(offsets, prefix, block, 1);
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
        opener.pack_half(block, offsets, 1);
        multiply(descriptor, 0);
        gather(block, 1);
        if (b + 1 == kBlocksAWarp && there) mbarrier_wait(start + kLanded + 8 * slot, parity);
        opener.load(next, counts, b + 1 < kBlocksAWarp ? chunk : note.next_chunk, block_at((b + 1) % kBlocksAWarp), tile, lane, there);
        wgmma_wait<1>();  // all of the block before
        give_back();
        multiply(descriptor, 1);
        gather(block, 2);
        opener.sum(sums, counts);
        multiply(descriptor, 2);
        gather(block, 3);
        opener.join(prefix, sums);
        opener.place_half(offsets, prefix, next, 0);
        multiply(descriptor, 3);
        opener.pack_half(next, offsets, 0);
        block = next;
        gather(block, 0);
        opener.place_half(offsets, prefix, block, 1);
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
