// What our kernels for Hopper share: barriers in shared memory, fetches and stores by the tensor
// memory accelerator (TMA), and what the tensor cores' operands and results look like.

#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  char bytes[128];
};

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Before the first use, by the thread that called `barrier_init`.
__device__ __forceinline__ void barriers_are_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Fetches the box of a matrix that begins at `row` and `column`, in elements; zeros outside of it.
__device__ __forceinline__ void fetch(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Fetches a box into the same place of the blocks of a cluster that `blocks` names, a bit each; each
// block's own barrier counts the bytes that it gets.
__device__ __forceinline__ void fetch_for(u16 blocks, u32 to, const TensorMap* map, int column, int row,
                                          u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row),
      "r"(barrier), "h"(blocks)
      : "memory");
}

// Stores a box from shared memory, without what lies outside of the matrix.
__device__ __forceinline__ void tma_store(const TensorMap* map, int column, int row, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(column), "r"(row), "r"(from)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but the last `LEFT` boxes that this thread stores have been read from shared memory.
template <int LEFT>
__device__ __forceinline__ void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}

// Stores four matrices of 8 × 8 elements of two bytes, of which each thread of a warp holds what it
// holds of the tensor cores' results. to: the place of one of their lines (columns where ACROSS),
// number lane % 8 of matrix lane / 8.
template <bool ACROSS>
__device__ __forceinline__ void store_matrices(u32 to, u32 x0, u32 x1, u32 x2, u32 x3) {
  if constexpr (ACROSS)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x0),
                 "r"(x1), "r"(x2), "r"(x3)
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x0),
                 "r"(x1), "r"(x2), "r"(x3)
                 : "memory");
}

// Loads four such matrices, of which `from` is the place of one line as above.
__device__ __forceinline__ void load_matrices(u32 from, u32& x0, u32& x1, u32& x2, u32& x3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x0), "=r"(x1), "=r"(x2), "=r"(x3)
               : "r"(from)
               : "memory");
}

// Arrives at a barrier of another block of the cluster. Not `.release.cluster`: for that the compiler
// waits for all memory of the GPU, every time.
__device__ __forceinline__ void barrier_arrive_at(u32 block, u32 barrier) {
  asm volatile(
      "{\n"
      ".reg .u32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(barrier), "r"(block)
      : "memory");
}

// Stores a number in the shared memory of a block of the cluster; that block's barrier counts 4 bytes.
__device__ __forceinline__ void send(u32 block, u32 to, int number, u32 barrier) {
  asm volatile(
      "{\n"
      ".reg .u32 there, its_barrier;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 its_barrier, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [its_barrier];\n"
      "}\n" ::"r"(to), "r"(number), "r"(barrier), "r"(block)
      : "memory");
}

// Returns a number that all threads of a warp have, and lets the compiler know that they do: a branch on
// it keeps the warp together, and what follows from it is computed once a warp, not in each thread.
// Called by whole warps.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(0xFFFFFFFF, x); }

__device__ __forceinline__ u32 block_in_cluster() {
  u32 rank;
  asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

constexpr int BOX = 64 * 128;  // bytes: 64 lines of 128, swizzled

// The place of 16 bytes in lines of 128 that are swizzled as the TMA does it.
__device__ __forceinline__ u32 swizzled(int line, int piece) {
  return line * 128 + ((piece ^ (line & 7)) << 4);
}

// Describes a tile of boxes for the tensor cores: the lower half, in which an addition moves the tile,
// in units of 16 bytes.
//
// ACROSS: the dim that a product adds up is the one between lines, not along them.
template <bool ACROSS>
__device__ __forceinline__ u32 tile_descriptor(u32 address) {
  const u32 field = (address & 0x3FFFF) >> 4, boxes = ACROSS ? BOX >> 4 : 1;
  return field | boxes << 16;
}

// Adds the upper half, which all tiles have: the distance of eight lines, and how lines are swizzled.
__device__ __forceinline__ u64 whole_descriptor(u32 lower) {
  const u64 eight_lines = 1024 >> 4;
  return lower | eight_lines << 32 | 1ull << 62;
}

// Keeps the compiler from moving uses of `d` over this line.
template <int SIZE>
__device__ __forceinline__ void pin(float (&d)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; i++) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000); }

// 1 / (1 + e^−x). Flushes subnormal numbers to zero: without that the compiler spends four instructions
// more on them.
__device__ __forceinline__ float sigmoid(float x) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
  return inverse;
}

__device__ __forceinline__ void swap_if(bool condition, u32& x, u32& y) {
  const u32 first = condition ? y : x;
  y = condition ? x : y;
  x = first;
}

// Stores 32 columns of a row, of which each of four neighbouring threads holds two in every 8: x0 of
// the first 8, x1 of the next. They transpose, so that each holds 8 columns, and stores 16 bytes.
//
// quad: number of the thread among the four. to: place of this thread's 8 columns.
__device__ __forceinline__ void store32(u16* to, u32 x0, u32 x1, u32 x2, u32 x3, int quad, bool inside) {
  const bool odd = quad & 1, upper = quad & 2;
  swap_if(odd, x0, x1);  // swapped in odd threads, so that x1 is what goes to the neighbour
  swap_if(odd, x2, x3);
  x1 = __shfl_xor_sync(0xFFFFFFFF, x1, 1);
  x3 = __shfl_xor_sync(0xFFFFFFFF, x3, 1);
  swap_if(odd, x0, x1);
  swap_if(odd, x2, x3);
  swap_if(upper, x0, x2);
  swap_if(upper, x1, x3);
  x2 = __shfl_xor_sync(0xFFFFFFFF, x2, 2);
  x3 = __shfl_xor_sync(0xFFFFFFFF, x3, 2);
  swap_if(upper, x0, x2);
  swap_if(upper, x1, x3);
  if (inside) *reinterpret_cast<uint4*>(to) = make_uint4(x0, x1, x2, x3);
}

// A matrix that is stored.
struct Out {
  const TensorMap* map;
  u16* matrix;
  int width;
};

// Stores 64 columns of the warp's 16 rows by way of shared memory: the TMA takes one instruction, and
// goes on while the next tile is multiplied.
//
// x: two columns in every 8 of two rows, 8 apart. buffer: free for all threads. row, column: of the
// matrix, where the box begins.
__device__ __forceinline__ void store_box(const u32 (&x)[2][8], u32 buffer, const Out& out, long long row,
                                          int column) {
  const int lane = threadIdx.x % 32;
  const u32 to = buffer + swizzled(lane % 16, lane / 16);
#pragma unroll
  for (int i = 0; i < 4; i++)  // 16 columns
    store_matrices<false>(to ^ i * 32, x[0][2 * i], x[1][2 * i], x[0][2 * i + 1], x[1][2 * i + 1]);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (lane == 0) tma_store(out.map, column, row, buffer);
}

// Stores the first `rows` of them; the others are the next group's.
__device__ __forceinline__ void store_rows(const u32 (&x)[2][8], const Out& out, long long row, int column,
                                           int rows) {
  const int line = threadIdx.x % 32 / 4, quad = threadIdx.x % 4, first = column + quad * 8;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    u16* to = out.matrix + (row + line + j * 8) * out.width + first;
    const bool inside = line + j * 8 < rows;
    store32(to, x[j][0], x[j][1], x[j][2], x[j][3], quad, inside && first < out.width);
    store32(to + 32, x[j][4], x[j][5], x[j][6], x[j][7], quad, inside && first + 32 < out.width);
  }
}

// Stores boxes of results by way of COUNT buffers of BYTES in shared memory, taken in turn.
template <int COUNT, int BYTES>
struct Boxes {
  u32 buffers;
  int turn = 0;

  // Returns the next buffer, free for the first thread of each warp; others wait for those.
  __device__ u32 next_buffer() {
    const u32 buffer = buffers + turn * BYTES;
    turn = (turn + 1) % COUNT;
    if (threadIdx.x % 32 == 0) wait_until_read<COUNT - 1>();
    return buffer;
  }

  // Stores 64 columns of the warp's 16 rows, or of the first `rows` of them.
  __device__ void store(const u32 (&x)[2][8], const Out& out, long long row, int column, int rows) {
    if (uniform(rows) < 16) {
      store_rows(x, out, row, column, rows);
      return;
    }
    const u32 buffer = next_buffer();
    __syncwarp();
    store_box(x, buffer, out, row, column);
  }
};

// Rounds 64 columns of this thread's two rows.
__device__ __forceinline__ void round_box(const float* of, u32 (&x)[2][8]) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) x[j][i] = pack(of[i * 4 + j * 2], of[i * 4 + j * 2 + 1]);
}
