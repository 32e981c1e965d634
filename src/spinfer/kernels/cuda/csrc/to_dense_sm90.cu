// Chunks to dense rows on Hopper, at the speed of memory: for batches so large that cuBLAS on decoded rows is the faster way.
//
// One CTA an SM, with a range of consecutive chunks. One warp copies them into a ring of shared memory, as for matmul_sm90.cu; of
// each, 16 warps decode a block into Tensor Core fragments, lay those out as rows in shared memory, and have TMA write them.
#include "common.cuh"
#include "decode.cuh"
#include "layout.cuh"
#include "matmul.cuh"
#include "sm90.cuh"

constexpr int kWarps = kBlocks, kThreads = kWarps * 32 + 32;
constexpr int kTilesAWarp = 2;  // one is filled while the other is written
constexpr u32 kTileBytes = kBlockRows * kBlockCols * 2, kTileAt = 1024;  // rows of 128 bytes, swizzled as TMA reads them; then the ring

// What one warp decodes: its block of every chunk of the work.
struct Decoding {
  const MatmulArgs& p;
  const TensorMap* map;  // of the dense rows, in boxes of a block
  const u32 start;       // of shared memory
  const int thread;      // 32 x this warp's block of each chunk + lane
  const BlockDecoder<true> decoder;

  __device__ __forceinline__ Decoding(const MatmulArgs& p, const TensorMap* map, const u32 start, int thread)
      : p(p), map(map), start(start), thread(thread), decoder(thread & 31) {}
  __device__ __forceinline__ void run(const Work& work) const {
    const int lane = thread & 31, block = thread >> 5, row = lane & 7;
    const u32 tiles = start + kTileAt + block * kTilesAWarp * kTileBytes;
    // stmatrix: this lane's row in the four 8 x 8 matrices of 16 rows x 16 columns.
    const u32 at = tiles + ((lane >> 3 & 1) * 8 + row) * 128;
    u32 chunk = start + p.ring_at;
    for (i32 i = 0; i < work.count; i++) {
      const u32 slot = start + i % kSlots * kSlotStride, tile = i % kTilesAWarp * kTileBytes;
      BlockState state;
      mbarrier_wait(slot + kLanded, i / kSlots & 1);
      decoder.load(state, chunk, thread);
      chunk = read_note(slot + kNotes).next_chunk;
      decoder.open(state);
      if (lane == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kTilesAWarp - 1) : "memory");
      __syncwarp();
#pragma unroll
      for (int s = 0; s < 4; s++) {
        u32 f[2][4];
        decoder.fragments(f, state, s);
#pragma unroll
        for (int r = 0; r < 2; r++) stmatrix_x4(at + tile + r * 16 * 128 + ((2 * s + (lane >> 4)) ^ row) * 16, f[r]);
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncwarp();
      give_back_to(slot + kEmpty, lane);
      const Place place = work.at(i);
      const i32 column = place.k * kChunkCols + block / kBlocksM * kBlockCols;
      if (i == 0) wait_for_predecessor();  // it may read what is written
      if (lane == 0) {
        const i32 first = place.strip * kChunkRows + block % kBlocksM * kBlockRows;
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column), "r"(first),
                     "r"(tiles + tile)
                     : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    }
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) spinfer_to_dense(const __grid_constant__ LaunchArgs args) {
  extern __shared__ __align__(1024) u8 memory[];
  const MatmulArgs& p = args.matmul;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 start = smem_address(memory);
  if (threadIdx.x == 0) {
    init_slots(start, kWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  const Work work(p);
  if (warp == kWarps) {
    WeightProducer producer(p, start, work, lane);
    producer.load_offsets(0);
    producer.prefetch_first();
    cta_barrier();
    producer.run();
  } else {
    cta_barrier();
    Decoding(p, &args.x_map, start, threadIdx.x).run(work);
  }
}
