// Products of FP8 matrices with block scales on Hopper: D = A · Bᵀ, bf16, for groups of rows.
//
// Both operands lie with the reduction dim contiguous (the tensor cores take FP8 no other way), and
// have a scale for every 128 elements of it. Tensor cores add up 128 products in their own
// accumulator, which keeps some 14 bits; the sum is scaled and added in fp32 ("promotion").
//
//   ROWS_BY_BLOCKS   A rows sorted by group (R, K), B a weight a group (G, N, K) with a scale for
//                    128 × 128: D (R, N). Outputs and gradients of inputs.
//   ROWS_BY_ROWS     A (M, P), B (N, P), P tokens sorted by group, each group padded to 128; scales
//                    1 × 128 in both: D (G, M, N), a product a group. Gradients of weights.
//
// A block of 384 threads: one warpgroup whose first thread has the TMA fetch tiles, two that
// multiply. Each owns half of a tile of 2 · 64 · HALVES rows by 128 columns; while one promotes, the
// tensor cores work for the other. Blocks are persistent, and take tiles in turn; they find a tile's
// group in the device's list of ends, so the host need not know any size.
//
// A warp's results leave through shared memory while its next tile begins, whose first scales are loaded
// before.
//
// Compiled by NVRTC with KIND (0 or 1), HALVES (1 or 2), STAGES and BUFFERS (of results, of a warp) defined.

#include "hopper.cuh"

constexpr int TILE_M = 128 * HALVES;
constexpr int TILE_N = 128;
constexpr int TILE_K = 128;  // one scale; bytes of a swizzled line of shared memory
constexpr int BYTES_A = TILE_M * TILE_K;
constexpr int BYTES_B = TILE_N * TILE_K;
constexpr int BYTES_STAGE = BYTES_A + BYTES_B;
constexpr int BYTES_SCALES = KIND == 0 ? 0 : TILE_N * 4;  // of B's rows, a stage
constexpr int SUPER = 8;  // tiles of rows that are visited together, so that the L2 cache serves
constexpr bool BY_BLOCKS = KIND == 0;
constexpr int BYTES_BOX = 16 * 128;  // 16 rows of 64 results
using Stores = Boxes<BUFFERS, BYTES_BOX>;

__device__ __forceinline__ void fetch_line(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ float2 load_pair(u32 address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
  return pair;
}

// 64 × 128 products over 32 elements; `add`: to what `d` holds. a, b: from `tile_descriptor`.
__device__ __forceinline__ void multiply(float (&d)[64], u32 a, u32 b, int add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32." TYPE_A ".e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63])
      : "l"(whole_descriptor(a)), "l"(whole_descriptor(b)), "r"(add));
}

struct Tile {
  int row_a, row_b;      // first rows in A and B
  int first_k, last_k;   // blocks of the reduction
  int rows, column;      // rows to store; first column
  long long out;         // index of the tile's first row in the output
  int scales_b;          // index of the tile's first scale
};

// The tiles of this block, in order.
struct Tiles {
  const int* ends;
  int groups, M, N, K;
  int group = 0, begin = 0, before = 0;

  // BY_WARP: called by whole warps.
  template <bool BY_WARP>
  __device__ bool find(int index, Tile& tile) {
    const int tiles_n = (N + TILE_N - 1) / TILE_N;
    for (; group < groups; group++) {
      const int end = BY_WARP ? uniform(ends[group]) : ends[group];
      const int rows = BY_BLOCKS ? end - begin : M;
      const int tiles_m = (rows + TILE_M - 1) / TILE_M;
      if (index < before + tiles_m * tiles_n) {
        const int super = SUPER * tiles_n, local = index - before;
        const int first_m = local / super * SUPER;
        const int size_m = min(tiles_m - first_m, SUPER);
        const int m = first_m + local % super % size_m, n = local % super / size_m;
        tile.rows = min(rows - m * TILE_M, TILE_M);
        tile.column = n * TILE_N;
        if (BY_BLOCKS) {
          const int blocks = (K + TILE_K - 1) / TILE_K;
          tile.row_a = begin + m * TILE_M;
          tile.row_b = group * N + n * TILE_N;
          tile.first_k = 0;
          tile.last_k = blocks;
          tile.out = tile.row_a;
          tile.scales_b = (group * tiles_n + n) * blocks;
        } else {
          tile.row_a = m * TILE_M;
          tile.row_b = n * TILE_N;
          tile.first_k = begin / TILE_K;
          tile.last_k = end / TILE_K;
          tile.out = (long long)group * M + m * TILE_M;
          tile.scales_b = n * TILE_N;
        }
        return true;
      }
      before += tiles_m * tiles_n;
      begin = end;
    }
    return false;
  }
};

// The scales of this thread's rows, r and r + 8 of every half, and (BY_BLOCKS) of B: a block ahead.
struct Scales {
  const float *of_rows[HALVES][2], *of_b;
  float rows[HALVES][2], b = 1.f;
  int line;

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int j = 0; j < 2; j++) rows[h][j] = __ldg(of_rows[h][j]), of_rows[h][j] += line;
    if (BY_BLOCKS) b = __ldg(of_b++);
  }

  // first_row: this thread's, in a tile. M: rows of A.
  __device__ __forceinline__ void begin(const Tile& tile, const float* scales_a, const float* scales_b,
                                        int first_row, int M) {
    line = BY_BLOCKS ? M : (M + 127) / 128 * 128;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int row = min(tile.row_a + first_row + h * 64 + j * 8, M - 1);
        of_rows[h][j] = scales_a + (long long)tile.first_k * line + row;
      }
    of_b = scales_b + tile.scales_b;
    if (tile.first_k < tile.last_k) load();
  }
};

// Has the tiles of this block fetched: the part of one thread.
__device__ __forceinline__ void bring_tiles(const TensorMap* map_a, const TensorMap* map_b, const float* scales_b,
                                            u32 base, u32 columns, u32 full, u32 empty, Tiles& tiles) {
  const int line = (tiles.N + TILE_N - 1) / TILE_N * TILE_N;  // a stage fetches whole lines
  int stage = 0;
  u32 parity = 0;
  Tile tile;
  for (int index = blockIdx.x; tiles.find<false>(index, tile); index += gridDim.x) {
    for (int k = tile.first_k; k < tile.last_k; k++) {
      barrier_wait(empty + 8 * stage, parity ^ 1);
      const u32 a = base + stage * BYTES_STAGE, b = a + BYTES_A;
      barrier_expect(full + 8 * stage, BYTES_STAGE + BYTES_SCALES);
      if (!BY_BLOCKS)
        fetch_line(columns + stage * BYTES_SCALES, scales_b + (long long)k * line + tile.scales_b,
                   BYTES_SCALES, full + 8 * stage);
      fetch(a, map_a, k * TILE_K, tile.row_a, full + 8 * stage);
      fetch(b, map_b, k * TILE_K, tile.row_b, full + 8 * stage);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  }
}

// Scales 64 × 128 sums of products and adds them to the totals.
//
// of_columns: place of the columns' scales in shared memory (not BY_BLOCKS).
__device__ __forceinline__ void promote(float (&total)[64], const float (&sum)[64], const float (&scale)[2],
                                        u32 of_columns) {
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float2 column = make_float2(1.f, 1.f);
    if (!BY_BLOCKS) column = load_pair(of_columns + i * 32);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float first = BY_BLOCKS ? scale[j] : scale[j] * column.x;
      const float second = BY_BLOCKS ? scale[j] : scale[j] * column.y;
      total[i * 4 + j * 2] += first * sum[i * 4 + j * 2];
      total[i * 4 + j * 2 + 1] += second * sum[i * 4 + j * 2 + 1];
    }
  }
}

// M: rows of A. ends: rows (BY_BLOCKS) or padded tokens up to the end of each group.
// scales_a: (blocks of the reduction, M), scales_b: (G, blocks of N, blocks of K). ROWS_BY_ROWS: both
// (blocks of the reduction, M or N rounded up to 128).
extern "C" __global__ void __launch_bounds__(384, 1)
    fp8_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
             const __grid_constant__ TensorMap map_out, const float* __restrict__ scales_a,
             const float* __restrict__ scales_b, u16* __restrict__ out, const int* __restrict__ ends,
             int groups, int M, int N, int K) {
  extern __shared__ __align__(1024) char raw[];  // where it begins: four stages and all buffers just fit
  const u32 base = shared_address(raw), buffers = base + STAGES * BYTES_STAGE;
  const u32 columns = buffers + 8 * BUFFERS * BYTES_BOX;
  const u32 full = columns + STAGES * BYTES_SCALES, empty = full + 8 * STAGES;
  const int warpgroup = uniform(threadIdx.x / 128);

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 8);  // warps that multiply
    }
    barriers_are_ready();
  }
  __syncthreads();

  Tiles tiles{ends, groups, M, N, K};
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) bring_tiles(&map_a, &map_b, scales_b, base, columns, full, empty, tiles);
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x % 128 / 32);
  const int first_row = (warpgroup - 1) * 64 * HALVES + warp * 16;
  const Out results{&map_out, out, N};
  Stores boxes{buffers + ((warpgroup - 1) * 4 + warp) * BUFFERS * BYTES_BOX};
  Scales scales;
  Tile next;
  int stage = 0, index = blockIdx.x;
  u32 parity = 0;
  bool more = tiles.find<true>(index, next);
  if (more) scales.begin(next, scales_a, scales_b, first_row + lane / 4, M);
  while (more) {
    const Tile tile = next;
    float total[HALVES][64];
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int i = 0; i < 64; i++) total[h][i] = 0.f;

    for (int k = tile.first_k; k < tile.last_k; k++) {
      float scale[HALVES][2];
#pragma unroll
      for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int j = 0; j < 2; j++) scale[h][j] = BY_BLOCKS ? scales.rows[h][j] * scales.b : scales.rows[h][j];
      if (k + 1 < tile.last_k) scales.load();

      const u32 of_columns = columns + stage * BYTES_SCALES + lane % 4 * 8;
      barrier_wait(full + 8 * stage, parity);
      const u32 a = base + stage * BYTES_STAGE, b = a + BYTES_A;
      const u32 of_a = tile_descriptor<false>(a + (warpgroup - 1) * HALVES * 64 * TILE_K);
      const u32 of_b = tile_descriptor<false>(b);
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        float sum[64];
        pin(sum);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < 4; step++)
          multiply(sum, of_a + h * (64 * TILE_K >> 4) + step * 2, of_b + step * 2, step > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        pin(sum);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        pin(sum);
        if (BY_BLOCKS && h == HALVES - 1 && lane == 0) barrier_arrive(empty + 8 * stage);
        promote(total[h], sum, scale[h], of_columns);
      }
      if (!BY_BLOCKS) {  // the columns' scales are in the stage, too
        // Arriving doesn't wait for loads, and the TMA's next scales would overtake them.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * stage);
      }
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }

    more = tiles.find<true>(index += gridDim.x, next);
    if (more) scales.begin(next, scales_a, scales_b, first_row + lane / 4, M);
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int box = 0; box < 2; box++) {
        const int column = tile.column + box * 64, row = first_row + h * 64;
        u32 x[2][8];
        round_box(total[h] + box * 32, x);
        if (column < N) boxes.store(x, results, tile.out + row, column, tile.rows - row);
      }
  }
  if (lane == 0) wait_until_read<0>();
}
