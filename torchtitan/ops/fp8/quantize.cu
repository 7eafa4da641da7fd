// Quantisation to FP8 where the values are made or moved; quantize.py is the definition.
//
// A block of 512 threads has a tile of 128 rows by 128 columns. Warp w has rows 8 w to 8 w + 7, lane
// l columns 4 l to 4 l + 3: a row is read and written as whole lines, its largest magnitude is one
// reduction over the warp, and what a thread holds of a column are 8 bytes of the transposed tile,
// which goes through shared memory to be written as whole lines.
//
// Rows sorted by group are transposed with each group padded to a multiple of 128 rows; a tile finds
// its group in the lists of ends, so no size is needed on the host.
//
// Compiled by NVRTC with E5M2 = 1 where gradients are e5m2.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int THREADS = 512, WARPS = 16;
constexpr int ROWS = 8;  // of a warp
constexpr u32 ALL = 0xFFFFFFFF;

struct Shared {
  u32 largest[3][128];        // of each column, for up to three tiles; 0 at first
  uint2 lines[128 * WARPS];   // a transposed tile, bytes; 8-byte pieces of a line are permuted
};

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000); }

__device__ __forceinline__ u32 pack(float first, float second) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

template <bool WIDE>
__device__ __forceinline__ u32 to_fp8(float first, float second) {
  u16 packed;
  if (WIDE)
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(second), "f"(first));
  else
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(second), "f"(first));
  return packed;
}

template <bool WIDE>
__device__ __forceinline__ u32 to_fp8(float a, float b, float c, float d) {
  return to_fp8<WIDE>(a, b) | to_fp8<WIDE>(c, d) << 16;
}

template <bool WIDE>
__device__ __forceinline__ float2 from_fp8(u32 pair) {
  u32 half;
  if (WIDE)
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(half) : "h"((u16)pair));
  else
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(half) : "h"((u16)pair));
  float2 x;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(x.x), "=f"(x.y)
      : "r"(half));
  return x;
}

// As an integer, so that NaN is larger than every number.
__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFF; }

// largest / (448 or 57344), both 1.75 times a power of two, rounded up to a power of two. NaN where
// largest is not finite.
template <bool WIDE>
__device__ __forceinline__ float power_of_two_scale(u32 largest) {
  if (largest == 0) return 1.f;
  if (largest >= 0x7F800000) return __uint_as_float(0x7FFFFFFF);
  const int exponent = (int)((largest + 0x1FFFFF) >> 23) - (WIDE ? 15 : 8);
  return __uint_as_float((u32)max(exponent, 1) << 23);
}

__device__ __forceinline__ float inverse_of_power(float scale) {
  const u32 bits = __float_as_uint(scale);
  return bits < 0x7F800000 ? __uint_as_float(0x7F000000 - bits) : scale;
}

struct Place {
  int warp, lane, column;  // first of the thread's columns in the tile
  __device__ Place() : warp(threadIdx.x / 32), lane(threadIdx.x % 32), column(lane * 4) {}
};

// Before the first barrier.
__device__ __forceinline__ void clear(Shared& shared) {
  if (threadIdx.x < 3 * 128) shared.largest[0][threadIdx.x] = 0;
}

// The columns' largest magnitudes over all warps, from those over this warp's rows.
__device__ __forceinline__ void combine_columns(Shared& shared, const Place& at, int tile,
                                                u32 (&largest)[4]) {
  u32* line = shared.largest[tile] + at.lane;  // of column 4 l + j at l + 32 j: a bank for each lane
#pragma unroll
  for (int j = 0; j < 4; j++) atomicMax(line + 32 * j, largest[j]);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 4; j++) largest[j] = line[32 * j];
}

__device__ __forceinline__ uint2& piece_of(Shared& shared, int column, int piece) {
  return shared.lines[column * WARPS + (piece ^ ((column >> 2) & 15))];
}

// Write the transposed tile: line c of it to out + c · pitch, `columns` lines of `rows` bytes.
__device__ __forceinline__ void write_lines(Shared& shared, u8* out, i64 pitch, int columns,
                                            int rows) {
  __syncthreads();
  const int part = threadIdx.x % 8;
#pragma unroll
  for (int c = threadIdx.x / 8; c < 128; c += THREADS / 8) {
    const uint2 first = piece_of(shared, c, 2 * part), second = piece_of(shared, c, 2 * part + 1);
    if (c < columns && part * 16 < rows)
      *reinterpret_cast<uint4*>(out + c * pitch + part * 16) =
          make_uint4(first.x, first.y, second.x, second.y);
  }
  __syncthreads();
}

// Store a tile of bf16 pairs by columns.
template <bool WIDE>
__device__ __forceinline__ void store_columns(Shared& shared, const Place& at, int which,
                                              const u32 (&x)[ROWS][2], u8* out, float* scales,
                                              i64 pitch, int columns) {
  u32 largest[4] = {0, 0, 0, 0};
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      largest[j] = max(largest[j], magnitude(j % 2 ? high(x[r][j / 2]) : low(x[r][j / 2])));
  combine_columns(shared, at, which, largest);
  float scale[4];
#pragma unroll
  for (int j = 0; j < 4; j++) scale[j] = power_of_two_scale<WIDE>(largest[j]);
  if (at.warp == 0 && at.column < columns)
    *reinterpret_cast<float4*>(scales + at.column) =
        make_float4(scale[0], scale[1], scale[2], scale[3]);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float inverse = inverse_of_power(scale[j]);
    u32 quads[2];
#pragma unroll
    for (int q = 0; q < 2; q++) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 pair = x[q * 4 + i][j / 2];
        v[i] = (j % 2 ? high(pair) : low(pair)) * inverse;
      }
      quads[q] = to_fp8<WIDE>(v[0], v[1], v[2], v[3]);
    }
    piece_of(shared, at.column + j, at.warp) = make_uint2(quads[0], quads[1]);
  }
  write_lines(shared, out, pitch, columns, 128);
}

// Quantise a row's 4 elements, for all of which `scale` is the row's.
template <bool WIDE>
__device__ __forceinline__ u32 quantize_row(u32 first, u32 second, float& scale) {
  u32 largest = max(magnitude(low(first)), magnitude(high(first)));
  largest = max(largest, max(magnitude(low(second)), magnitude(high(second))));
  largest = __reduce_max_sync(ALL, largest);
  scale = power_of_two_scale<WIDE>(largest);
  const float inverse = inverse_of_power(scale);
  return to_fp8<WIDE>(low(first) * inverse, high(first) * inverse, low(second) * inverse,
                      high(second) * inverse);
}

// The same; lane `slot` keeps the scale.
template <bool WIDE>
__device__ __forceinline__ u32 quantize_row(const Place& at, u32 first, u32 second, int slot,
                                            float& kept_scale) {
  float scale;
  const u32 quantized = quantize_row<WIDE>(first, second, scale);
  if (at.lane == slot) kept_scale = scale;
  return quantized;
}

// x (R, K) bf16; grid (tiles of rows, blocks of columns).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    quantize_rows(const u16* __restrict__ x, u8* __restrict__ values, float* __restrict__ scales,
                  int R, int K) {
  const Place at;
  const int column = blockIdx.y * 128 + at.column, first = blockIdx.x * 128 + at.warp * ROWS;
  u32 tile[ROWS][2];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    uint2 pair = make_uint2(0, 0);
    if (first + r < R && column < K)
      pair = *reinterpret_cast<const uint2*>(x + (i64)(first + r) * K + column);
    tile[r][0] = pair.x, tile[r][1] = pair.y;
  }
  float scale = 1.f;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const u32 q = quantize_row<E5M2>(at, tile[r][0], tile[r][1], r, scale);
    if (first + r < R && column < K)
      *reinterpret_cast<u32*>(values + (i64)(first + r) * K + column) = q;
  }
  if (at.lane < ROWS && first + at.lane < R) scales[(i64)blockIdx.y * R + first + at.lane] = scale;
}

// w (E, N, K) bf16 or fp32 (wide) to values (E, N, K), or transposed to (E, K, N). Grid (blocks of K,
// blocks of N, E).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    quantize_blocks(const void* __restrict__ w, u8* __restrict__ values, float* __restrict__ scales,
                    int N, int K, int wide, int transposed) {
  __shared__ Shared shared;
  const Place at;
  const int k = blockIdx.x * 128 + at.column, first = blockIdx.y * 128 + at.warp * ROWS;
  const i64 matrix = (i64)blockIdx.z * N * K;
  float tile[ROWS][4];
  u32 largest = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    const i64 index = matrix + (i64)(first + r) * K + k;
    if (first + r < N && k < K) {
      if (wide) {
        v = *reinterpret_cast<const float4*>(static_cast<const float*>(w) + index);
      } else {
        const uint2 p = *reinterpret_cast<const uint2*>(static_cast<const u16*>(w) + index);
        v = make_float4(low(p.x), high(p.x), low(p.y), high(p.y));
      }
    }
    tile[r][0] = v.x, tile[r][1] = v.y, tile[r][2] = v.z, tile[r][3] = v.w;
#pragma unroll
    for (int j = 0; j < 4; j++) largest = max(largest, magnitude(tile[r][j]));
  }
  largest = __reduce_max_sync(ALL, largest);
  if (at.lane == 0) shared.largest[0][at.warp] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) largest = max(largest, shared.largest[0][i]);
  const float scale = largest == 0 ? 1.f : __fdiv_rn(__uint_as_float(largest), 448.f);
  const float inverse = __frcp_rn(scale);
  if (scale > 1e-30f && scale < 1e30f) {
    // Correctly rounded division by a number whose correctly rounded inverse is known (Markstein);
    // what may underflow here is 0 in FP8.
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float quotient = tile[r][j] * inverse;
        tile[r][j] = fmaf(fmaf(-quotient, scale, tile[r][j]), inverse, quotient);
      }
  } else {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int j = 0; j < 4; j++) tile[r][j] = __fdiv_rn(tile[r][j], scale);
  }
  const int of_n = blockIdx.y, of_k = blockIdx.x;
  if (threadIdx.x == 0)
    scales[(i64)blockIdx.z * gridDim.x * gridDim.y +
           (transposed ? of_k * gridDim.y + of_n : of_n * gridDim.x + of_k)] = scale;
  if (!transposed) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      if (first + r < N && k < K)
        *reinterpret_cast<u32*>(values + matrix + (i64)(first + r) * K + k) =
            to_fp8<false>(tile[r][0], tile[r][1], tile[r][2], tile[r][3]);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u32 quads[2];
#pragma unroll
    for (int q = 0; q < 2; q++)
      quads[q] = to_fp8<false>(tile[q * 4][j], tile[q * 4 + 1][j], tile[q * 4 + 2][j],
                               tile[q * 4 + 3][j]);
    piece_of(shared, at.column + j, at.warp) = make_uint2(quads[0], quads[1]);
  }
  write_lines(shared, values + matrix + (i64)of_k * 128 * N + of_n * 128, N, K - of_k * 128,
              N - of_n * 128);
}

// Four rows of four bytes to four columns.
__device__ __forceinline__ void turn(const u32 (&rows)[4], u32 (&columns)[4]) {
  const u32 a = __byte_perm(rows[0], rows[1], 0x5140), b = __byte_perm(rows[2], rows[3], 0x5140);
  const u32 c = __byte_perm(rows[0], rows[1], 0x7362), d = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(a, b, 0x5410), columns[1] = __byte_perm(a, b, 0x7632);
  columns[2] = __byte_perm(c, d, 0x5410), columns[3] = __byte_perm(c, d, 0x7632);
}

// values (E, N, K) by blocks to (E, K, N), and their scales. Grid (blocks of K, blocks of N, E).
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    transpose_blocks(const u8* __restrict__ values, const float* __restrict__ scales,
                     u8* __restrict__ out, float* __restrict__ out_scales, int N, int K) {
  __shared__ Shared shared;
  const Place at;
  const int of_n = blockIdx.y, of_k = blockIdx.x;
  const int k = of_k * 128 + at.column, first = of_n * 128 + at.warp * ROWS;
  const i64 matrix = (i64)blockIdx.z * N * K, blocks = (i64)blockIdx.z * gridDim.x * gridDim.y;
  u32 rows[2][4], columns[2][4];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    rows[r / 4][r % 4] = 0;
    if (first + r < N && k < K)
      rows[r / 4][r % 4] = *reinterpret_cast<const u32*>(values + matrix + (i64)(first + r) * K + k);
  }
  if (threadIdx.x == 0)
    out_scales[blocks + of_k * gridDim.y + of_n] = scales[blocks + of_n * gridDim.x + of_k];
  turn(rows[0], columns[0]), turn(rows[1], columns[1]);
#pragma unroll
  for (int j = 0; j < 4; j++)
    piece_of(shared, at.column + j, at.warp) = make_uint2(columns[0][j], columns[1][j]);
  write_lines(shared, out + matrix + (i64)of_k * 128 * N + of_n * 128, N, K - of_k * 128,
              N - of_n * 128);
}

// The rows of a padded tile: the first one, and how many of the 128 exist; none = no such tile.
__device__ __forceinline__ int rows_of_tile(int tile, const int* ends, const int* padded_ends,
                                            int groups, int& first) {
  __shared__ int found[2];
  for (int g = threadIdx.x; g < groups; g += THREADS) {
    const int begin = g ? padded_ends[g - 1] : 0;
    if (begin <= tile * 128 && tile * 128 < padded_ends[g]) {
      found[0] = (g ? ends[g - 1] : 0) + tile * 128 - begin;
      found[1] = ends[g] - found[0];
    }
  }
  if (threadIdx.x == 0 && tile * 128 >= padded_ends[groups - 1]) found[1] = 0;
  __syncthreads();
  first = found[0];
  return min(found[1], 128);
}

// A row's 4 elements as numbers.
__device__ __forceinline__ void widen(u32 quantized, float scale, float (&x)[4]) {
  const float2 a = from_fp8<E5M2>(quantized & 0xFFFF), b = from_fp8<E5M2>(quantized >> 16);
  x[0] = a.x * scale, x[1] = a.y * scale, x[2] = b.x * scale, x[3] = b.y * scale;
}

// Quantise a tile by columns and write it transposed. Grid (tiles, blocks of columns).
__device__ __forceinline__ void write_columns(Shared& shared, const Place& at,
                                              const float (&x)[ROWS][4], int K, u8* out,
                                              float* out_scales) {
  u32 largest[4] = {0, 0, 0, 0};
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int j = 0; j < 4; j++) largest[j] = max(largest[j], magnitude(x[r][j]));
  combine_columns(shared, at, 0, largest);
  float new_scale[4];
#pragma unroll
  for (int j = 0; j < 4; j++) new_scale[j] = power_of_two_scale<E5M2>(largest[j]);
  const int columns = min(128, K - blockIdx.y * 128);
  if (at.warp == 0 && at.column < columns)
    *reinterpret_cast<float4*>(out_scales + ((i64)blockIdx.x * gridDim.y + blockIdx.y) * 128 +
                               at.column) =
        make_float4(new_scale[0], new_scale[1], new_scale[2], new_scale[3]);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float inverse = inverse_of_power(new_scale[j]);
    u32 quads[2];
#pragma unroll
    for (int q = 0; q < 2; q++)
      quads[q] = to_fp8<E5M2>(x[q * 4][j] * inverse, x[q * 4 + 1][j] * inverse,
                              x[q * 4 + 2][j] * inverse, x[q * 4 + 3][j] * inverse);
    piece_of(shared, at.column + j, at.warp) = make_uint2(quads[0], quads[1]);
  }
  const i64 pitch = (i64)gridDim.x * 128;
  write_lines(shared, out + (i64)blockIdx.y * 128 * pitch + blockIdx.x * 128, pitch, columns, 128);
}

// Transposes rows quantised by rows. slot_of_row: rows are tokens slot / top_k; null = as they come.
// T: rows of `values`. Grid (tiles, blocks of columns).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    transpose(const u8* __restrict__ values, const float* __restrict__ scales,
              const int* __restrict__ slot_of_row, const int* __restrict__ ends,
              const int* __restrict__ padded_ends, u8* __restrict__ out,
              float* __restrict__ out_scales, int T, int K, int groups, int top_k) {
  __shared__ Shared shared;
  const Place at;
  clear(shared);
  int begin;
  const int exist = rows_of_tile(blockIdx.x, ends, padded_ends, groups, begin);
  if (exist <= 0) return;
  const int column = blockIdx.y * 128 + at.column, first = at.warp * ROWS;
  int source = 0;
  float scale = 0.f;
  if (at.lane < ROWS && first + at.lane < exist) {
    source = begin + first + at.lane;
    if (slot_of_row) source = slot_of_row[source] / top_k;
    scale = scales[(i64)blockIdx.y * T + source];
  }
  u32 tile[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const i64 row = __shfl_sync(ALL, source, r);
    tile[r] = 0;
    if (first + r < exist && column < K)
      tile[r] = *reinterpret_cast<const u32*>(values + row * K + column);
  }
  float x[ROWS][4];
#pragma unroll
  for (int r = 0; r < ROWS; r++) widen(tile[r], __shfl_sync(ALL, scale, r), x[r]);
  write_columns(shared, at, x, K, out, out_scales);
}

// x (R, K) bf16 by rows, and these transposed as by `transpose`. Grid (tiles, blocks of columns).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    quantize_both(const u16* __restrict__ source, const int* __restrict__ ends,
                  const int* __restrict__ padded_ends, u8* __restrict__ values,
                  float* __restrict__ scales, u8* __restrict__ out, float* __restrict__ out_scales,
                  int R, int K, int groups) {
  __shared__ Shared shared;
  const Place at;
  clear(shared);
  int begin;
  const int exist = rows_of_tile(blockIdx.x, ends, padded_ends, groups, begin);
  if (exist <= 0) return;
  const int column = blockIdx.y * 128 + at.column, first = at.warp * ROWS;
  const i64 top = begin + first;
  uint2 pairs[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    pairs[r] = make_uint2(0, 0);
    if (first + r < exist && column < K)
      pairs[r] = *reinterpret_cast<const uint2*>(source + (top + r) * K + column);
  }
  float x[ROWS][4], kept_scale = 1.f;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float scale;
    const u32 q = quantize_row<E5M2>(pairs[r].x, pairs[r].y, scale);
    if (at.lane == r) kept_scale = scale;
    widen(q, scale, x[r]);
    if (first + r < exist && column < K)
      *reinterpret_cast<u32*>(values + (top + r) * K + column) = q;
  }
  if (at.lane < ROWS && first + at.lane < exist)
    scales[(i64)blockIdx.y * R + top + at.lane] = kept_scale;
  write_columns(shared, at, x, K, out, out_scales);
}

// Copies every row's token and its scales. A warp a row; grid (⌈R / 16⌉). K is a multiple of 16.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    gather(const u8* __restrict__ values, const float* __restrict__ scales,
           const int* __restrict__ slot_of_row, const int* __restrict__ ends, u8* __restrict__ out,
           float* __restrict__ out_scales, int T, int R, int K, int groups, int top_k) {
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= ends[groups - 1]) return;
  const int token = slot_of_row[row] / top_k;
  const uint4* from = reinterpret_cast<const uint4*>(values + (i64)token * K);
  uint4* to = reinterpret_cast<uint4*>(out + (i64)row * K);
#pragma unroll 4
  for (int i = lane; i < K / 16; i += 32) to[i] = from[i];
  for (int k = lane; k < (K + 127) / 128; k += 32)
    out_scales[(i64)k * R + row] = scales[(i64)k * T + token];
}

__device__ __forceinline__ void take(uint2 pair, u32 (&to)[2]) { to[0] = pair.x, to[1] = pair.y; }

// Adds up four numbers over the warp: lanes 4 n + i get the sum of the i-th.
__device__ __forceinline__ float sum_of_four(const Place& at, const float (&x)[4]) {
  const bool second = at.lane & 1, upper = at.lane & 2;
  float a = second ? x[1] : x[0], b = second ? x[3] : x[2];
  a += __shfl_xor_sync(ALL, second ? x[0] : x[1], 1);
  b += __shfl_xor_sync(ALL, second ? x[2] : x[3], 1);
  float sum = upper ? b : a;
  sum += __shfl_xor_sync(ALL, upper ? a : b, 2);
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(ALL, sum, step);
  return sum;
}

// gate_up (R, 2F) bf16. Writes the weighted activation, and gate and up to keep. weights: null = 1.
// Grid (tiles of rows, blocks of F).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    swiglu(const u16* __restrict__ gate_up, const float* __restrict__ weights,
           const int* __restrict__ slot_of_row, const int* __restrict__ ends,
           u8* __restrict__ values, float* __restrict__ scales, u8* __restrict__ kept,
           float* __restrict__ kept_scales, int R, int F, int groups) {
  const Place at;
  const int column = blockIdx.y * 128 + at.column, first = blockIdx.x * 128 + at.warp * ROWS;
  const int rows = ends[groups - 1];
  if (first >= rows) return;
  float weight = 0.f, of_hidden = 1.f, of_gate = 1.f, of_up = 1.f;
  if (at.lane < ROWS && first + at.lane < rows)
    weight = weights ? weights[slot_of_row[first + at.lane]] : 1.f;
#pragma unroll 4
  for (int r = 0; r < ROWS; r++) {
    const i64 row = first + r;
    const bool here = row < rows && column < F;
    uint2 g = make_uint2(0, 0), u = g;
    if (here) {
      g = *reinterpret_cast<const uint2*>(gate_up + row * 2 * F + column);
      u = *reinterpret_cast<const uint2*>(gate_up + row * 2 * F + F + column);
    }
    const float factor = __shfl_sync(ALL, weight, r);
    float h[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 of_g = j / 2 ? g.y : g.x, of_u = j / 2 ? u.y : u.x;
      const float gate = j % 2 ? high(of_g) : low(of_g), up = j % 2 ? high(of_u) : low(of_u);
      h[j] = gate * __fdividef(1.f, 1.f + __expf(-gate)) * up * factor;
    }
    const u32 q_gate = quantize_row<false>(at, g.x, g.y, r, of_gate);
    const u32 q_up = quantize_row<false>(at, u.x, u.y, r, of_up);
    const u32 q = quantize_row<false>(at, pack(h[0], h[1]), pack(h[2], h[3]), r, of_hidden);
    if (here) {
      *reinterpret_cast<u32*>(kept + row * 2 * F + column) = q_gate;
      *reinterpret_cast<u32*>(kept + row * 2 * F + F + column) = q_up;
      *reinterpret_cast<u32*>(values + row * F + column) = q;
    }
  }
  if (at.lane < ROWS && first + at.lane < rows) {
    const i64 row = first + at.lane;
    scales[(i64)blockIdx.y * R + row] = of_hidden;
    kept_scales[(i64)blockIdx.y * R + row] = of_gate;
    kept_scales[(i64)(gridDim.y + blockIdx.y) * R + row] = of_up;
  }
}

// The gradient of gate and up by rows and by columns, the weighted activation by columns, and, with
// weights, this block's part of their gradient. F is a multiple of 128. Grid (padded tiles, blocks of
// F).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    swiglu_backward(const u16* __restrict__ grad_hidden, const u8* __restrict__ kept,
                    const float* __restrict__ kept_scales, const float* __restrict__ weights,
                    const int* __restrict__ slot_of_row, const int* __restrict__ ends,
                    const int* __restrict__ padded_ends, u8* __restrict__ grad,
                    float* __restrict__ grad_scales, u8* __restrict__ t_grad,
                    float* __restrict__ t_grad_scales, u8* __restrict__ t_hidden,
                    float* __restrict__ t_hidden_scales, float* __restrict__ parts, int R, int F,
                    int groups) {
  // The results wait here for the whole tile, whose columns are quantised together. Transposed lines
  // then take the place of the activation, which every thread has taken back by the first barrier.
  extern __shared__ uint4 raw[];
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  const Place at;
  clear(shared);
  int begin;
  const int exist = rows_of_tile(blockIdx.x, ends, padded_ends, groups, begin);
  if (exist <= 0) return;
  const int column = blockIdx.y * 128 + at.column, first = at.warp * ROWS;
  const i64 top = begin + first;
  float weight = 0.f, scale_gate = 0.f, scale_up = 0.f;
  if (at.lane < ROWS && first + at.lane < exist) {
    weight = weights ? weights[slot_of_row[top + at.lane]] : 1.f;
    scale_gate = kept_scales[(i64)blockIdx.y * R + top + at.lane];
    scale_up = kept_scales[(i64)(gridDim.y + blockIdx.y) * R + top + at.lane];
  }
  uint2* waiting = shared.lines + threadIdx.x;
  float out_gate = 1.f, out_up = 1.f, part = 0.f, sums[4];
#pragma unroll 4
  for (int r = 0; r < ROWS; r++) {
    const i64 row = top + r;
    uint2 g = make_uint2(0, 0);
    u32 q_gate = 0, q_up = 0;
    if (first + r < exist) {
      g = *reinterpret_cast<const uint2*>(grad_hidden + row * F + column);
      q_gate = *reinterpret_cast<const u32*>(kept + row * 2 * F + column);
      q_up = *reinterpret_cast<const u32*>(kept + row * 2 * F + F + column);
    }
    const float factor = __shfl_sync(ALL, weight, r);
    const float s_gate = __shfl_sync(ALL, scale_gate, r), s_up = __shfl_sync(ALL, scale_up, r);
    float& sum = sums[r % 4];
    sum = 0.f;
    u32 hidden[2], of_gate[2], of_up[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float2 gates = from_fp8<false>(half ? q_gate >> 16 : q_gate & 0xFFFF);
      const float2 ups = from_fp8<false>(half ? q_up >> 16 : q_up & 0xFFFF);
      const u32 pair = half ? g.y : g.x;
      float h[2], dg[2], du[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float gate = (j ? gates.y : gates.x) * s_gate, up = (j ? ups.y : ups.x) * s_up;
        float d = j ? high(pair) : low(pair);
        const float sigmoid = __fdividef(1.f, 1.f + __expf(-gate)), silu = gate * sigmoid;
        h[j] = silu * up;
        sum += d * h[j];
        d *= factor;
        h[j] *= factor;
        dg[j] = d * up * (sigmoid + silu * (1.f - sigmoid));
        du[j] = d * silu;
      }
      hidden[half] = pack(h[0], h[1]);
      of_gate[half] = pack(dg[0], dg[1]);
      of_up[half] = pack(du[0], du[1]);
    }
    waiting[r * THREADS] = make_uint2(hidden[0], hidden[1]);
    waiting[(ROWS + r) * THREADS] = make_uint2(of_gate[0], of_gate[1]);
    waiting[(2 * ROWS + r) * THREADS] = make_uint2(of_up[0], of_up[1]);
    if (r % 4 == 3) {
      const float four = sum_of_four(at, sums);
      if (at.lane / 4 == r / 4) part = four;
    }
    const u32 q0 = quantize_row<E5M2>(at, of_gate[0], of_gate[1], r, out_gate);
    const u32 q1 = quantize_row<E5M2>(at, of_up[0], of_up[1], r, out_up);
    if (first + r < exist) {
      *reinterpret_cast<u32*>(grad + row * 2 * F + column) = q0;
      *reinterpret_cast<u32*>(grad + row * 2 * F + F + column) = q1;
    }
  }
  if (at.lane < ROWS && first + at.lane < exist) {
    const i64 row = top + at.lane;
    grad_scales[(i64)blockIdx.y * R + row] = out_gate;
    grad_scales[(i64)(gridDim.y + blockIdx.y) * R + row] = out_up;
    if (weights) parts[(i64)blockIdx.y * R + row] = part;
  }
  const i64 pitch = (i64)gridDim.x * 128, line = blockIdx.y * 128;
  const i64 to = line * pitch + blockIdx.x * 128;
  const i64 its_scales = (i64)blockIdx.x * 2 * F + line;
  u32 tile[ROWS][2];
#pragma unroll
  for (int r = 0; r < ROWS; r++) take(waiting[r * THREADS], tile[r]);
  store_columns<false>(shared, at, 0, tile, t_hidden + to, t_hidden_scales + (i64)blockIdx.x * F + line,
                       pitch, 128);
#pragma unroll
  for (int r = 0; r < ROWS; r++) take(waiting[(ROWS + r) * THREADS], tile[r]);
  store_columns<E5M2>(shared, at, 1, tile, t_grad + to, t_grad_scales + its_scales, pitch, 128);
#pragma unroll
  for (int r = 0; r < ROWS; r++) take(waiting[(2 * ROWS + r) * THREADS], tile[r]);
  store_columns<E5M2>(shared, at, 2, tile, t_grad + to + F * pitch, t_grad_scales + its_scales + F, pitch,
                      128);
}
