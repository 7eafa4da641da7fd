// Quantisation to FP8 where the values are made or moved; quantize.py is the definition.
//
// A block of 512 threads has a tile of 128 rows by 128 columns. Warp w has rows 8 w to 8 w + 7, lane
// l columns 4 l to 4 l + 3: a row is read and written as whole lines, its largest magnitude is one
// reduction over the warp, and what a thread holds of a column are 8 bytes of the transposed tile,
// which goes through shared memory to be written as whole lines. Magnitudes are compared and scales
// applied two at a time, in bf16: both are exact there.
//
// Rows sorted by group are transposed with each group padded to a multiple of 128 rows; a tile finds
// its group in the lists of ends, so no size is needed on the host. Where there are many tiles, a block
// goes through several blocks of columns of the same rows.
//
// Compiled by NVRTC with E5M2 = 1 where gradients are e5m2.

#include "hopper.cuh"

typedef unsigned char u8;
typedef long long i64;

constexpr int THREADS = 512, WARPS = 16;
constexpr int ROWS = 8;  // of a warp
constexpr u32 ALL = 0xFFFFFFFF;

struct Shared {
  u32 largest[3][128];        // of each column, for up to three tiles; 0 at first
  uint2 lines[128 * WARPS];   // a transposed tile, bytes; 8-byte pieces of a line are permuted
};

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

// The larger magnitudes of two pairs of bf16, with signs of no meaning; NaN is larger than every number.
__device__ __forceinline__ u32 larger(u32 x, u32 y) {
  u32 pair;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(y));
  return pair;
}

__device__ __forceinline__ u32 multiply(u32 x, u32 y) {
  u32 pair;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(y));
  return pair;
}

// 448 and 57344, the largest numbers, are 1.75 times these powers of two.
template <bool WIDE>
constexpr u32 LARGEST_EXPONENT = WIDE ? 15 : 8;

// The scale for a largest magnitude, bf16 in the upper half of `largest`: divided by the largest number
// and rounded up to a power of two. NaN where it is not finite.
template <bool WIDE>
__device__ __forceinline__ float power_of_two_scale(u32 largest) {
  largest &= 0xFFFF0000;
  if (largest == 0) return 1.f;
  if (largest >= 0x7F800000) return __uint_as_float(0x7FFFFFFF);
  const int exponent = (int)((largest + 0x1FFFFF) >> 23) - (int)LARGEST_EXPONENT<WIDE>;
  return __uint_as_float((u32)max(exponent, 1) << 23);
}

// 1 / scale for a pair of largest magnitudes; any number for zeros.
template <bool WIDE>
__device__ __forceinline__ u32 inverse_scales(u32 largest) {
  constexpr u32 ONES = 0x00010001;
  const u32 exponents = (largest + 0x1F * ONES) & 0xFF80FF80;  // rounded up above 1.75
  const u32 inverse =
      ((254 + LARGEST_EXPONENT<WIDE>) << 7) * ONES -
      __vmaxu2(exponents, ((1 + LARGEST_EXPONENT<WIDE>) << 7) * ONES);
  u32 pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(largest), "r"(0), "r"(inverse));  // keeps NaN
  return pair;
}

// Four elements, two pairs of bf16, times `inverse`.
template <bool WIDE>
__device__ __forceinline__ u32 quantize(u32 first, u32 second, u32 inverse) {
  first = multiply(first, inverse), second = multiply(second, inverse);
  return to_fp8<WIDE>(low(first), high(first), low(second), high(second));
}

// Loads if `here`, else zeros.
__device__ __forceinline__ u32 load_if(bool here, const u32* from) {
  u32 x;
  asm("{.reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.b32 %0, [%1];}"
      : "=r"(x)
      : "l"(from), "r"((u32)here));
  return x;
}

__device__ __forceinline__ uint2 load_if(bool here, const uint2* from) {
  uint2 x;
  asm("{.reg .pred p; setp.ne.b32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p ld.global.nc.v2.b32 {%0, %1}, [%2];}"
      : "=r"(x.x), "=r"(x.y)
      : "l"(from), "r"((u32)here));
  return x;
}

__device__ __forceinline__ void store_if(bool here, u8* to, u32 x) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.b32 [%0], %1;}" ::"l"(to), "r"(x), "r"((u32)here)
               : "memory");
}

struct Place {
  int warp, lane, column;  // first of the thread's columns in the tile
  __device__ Place() : warp(uniform(threadIdx.x / 32)), lane(threadIdx.x % 32), column(lane * 4) {}
};

// Before the first barrier.
__device__ __forceinline__ void clear(Shared& shared) {
  if (threadIdx.x < 3 * 128) shared.largest[0][threadIdx.x] = 0;
}

// Puts the largest magnitudes of this thread's columns, two pairs over its warp's rows, to those of the
// tile; they are complete after a barrier.
__device__ __forceinline__ void add_columns(u32* of_tile, const Place& at, const u32 (&largest)[2]) {
  u32* line = of_tile + at.lane;  // of column 4 l + j at l + 32 j: a bank for each lane
#pragma unroll
  for (int j = 0; j < 4; j++)
    atomicMax(line + 32 * j, (j % 2 ? largest[j / 2] : largest[j / 2] << 16) & 0x7FFF0000);
}

// The place of 8 bytes of a transposed line, a column of the tile: warp w's are piece w. Permuted so that
// neither a warp's columns nor a line's pieces of 16 bytes share banks.
__device__ __forceinline__ uint2& piece_of(uint2* lines, int column, int piece) {
  const int lane = column / 4;
  return lines[column * WARPS + (piece ^ (2 * (lane % 8) + lane / 8 % 2))];
}

// Write the transposed tile: line c of it to out + c · pitch, `columns` lines of `rows` bytes.
__device__ __forceinline__ void write_lines(uint2* lines, u8* out, i64 pitch, int columns, int rows) {
  const int part = threadIdx.x % 8, first = threadIdx.x / 8;
  out += first * pitch + part * 16;
#pragma unroll
  for (int c = first; c < 128; c += THREADS / 8) {
    const int turn = c / 4;
    uint4 bytes = *reinterpret_cast<const uint4*>(lines + c * WARPS + 2 * (part ^ turn % 8));
    if (turn / 8 % 2) bytes = make_uint4(bytes.z, bytes.w, bytes.x, bytes.y);
    if (c < columns && part * 16 < rows) *reinterpret_cast<uint4*>(out) = bytes;
    out += THREADS / 8 * pitch;
  }
}

// Quantises a tile of bf16 pairs by columns, whose largest magnitudes are complete, into transposed lines.
template <bool WIDE>
__device__ __forceinline__ void fill_lines(uint2* lines, const u32* largest, const Place& at,
                                           const u32 (&x)[ROWS][2], float* scales, int columns) {
  if (threadIdx.x < columns)
    scales[threadIdx.x] = power_of_two_scale<WIDE>(largest[threadIdx.x % 4 * 32 + threadIdx.x / 4]);
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {
    const u32* line = largest + pair * 64 + at.lane;
    const u32 inverse = inverse_scales<WIDE>(__byte_perm(line[0], line[32], 0x7632));
    u32 scaled[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) scaled[r] = multiply(x[r][pair], inverse);
    const u32(&a)[ROWS] = scaled;
    piece_of(lines, at.column + 2 * pair, at.warp) =
        make_uint2(to_fp8<WIDE>(low(a[0]), low(a[1]), low(a[2]), low(a[3])),
                   to_fp8<WIDE>(low(a[4]), low(a[5]), low(a[6]), low(a[7])));
    piece_of(lines, at.column + 2 * pair + 1, at.warp) =
        make_uint2(to_fp8<WIDE>(high(a[0]), high(a[1]), high(a[2]), high(a[3])),
                   to_fp8<WIDE>(high(a[4]), high(a[5]), high(a[6]), high(a[7])));
  }
}

// The largest magnitude of a row, of which each thread of a warp has two pairs: in the upper half.
__device__ __forceinline__ u32 largest_of_row(u32 first, u32 second) {
  const u32 pair = larger(first, second) & 0x7FFF7FFF;
  return __reduce_max_sync(ALL, max(pair, pair << 16));
}

// Loads `count` rows, of K elements of bf16, and zeros after them.
__device__ __forceinline__ void load_rows(const u16* from, int K, int count, u32 (&tile)[ROWS][2]) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint2 pairs = load_if(r < count, reinterpret_cast<const uint2*>(from));
    from += K;
    tile[r][0] = pairs.x, tile[r][1] = pairs.y;
  }
}

// Returns in lane r the largest magnitude of row r.
__device__ __forceinline__ u32 largest_of_rows(const Place& at, const u32 (&tile)[ROWS][2]) {
  u32 largest = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const u32 of_row = largest_of_row(tile[r][0], tile[r][1]);
    if (at.lane == r) largest = of_row;
  }
  return largest;
}

// x (R, K) bf16; grid (tiles of rows, blocks of columns).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    quantize_rows(const u16* __restrict__ x, u8* __restrict__ values, float* __restrict__ scales,
                  int R, int K) {
  const Place at;
  const int column = blockIdx.y * 128 + at.column, first = blockIdx.x * 128 + at.warp * ROWS;
  const int count = column < K ? R - first : 0;
  const u16* from = x + (i64)first * K + column;
  u8* to = values + (i64)first * K + column;
  u32 tile[ROWS][2];
  load_rows(from, K, count, tile);
  const u32 largest = largest_of_rows(at, tile);
  const u32 inverse = inverse_scales<E5M2>(__byte_perm(largest, 0, 0x3232));
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const u32 q = quantize<E5M2>(tile[r][0], tile[r][1], __shfl_sync(ALL, inverse, r));
    store_if(r < count, to, q);
    to += K;
  }
  if (at.lane < ROWS && first + at.lane < R)
    scales[(i64)blockIdx.y * R + first + at.lane] = power_of_two_scale<E5M2>(largest);
}

// w (E, N, K) bf16 or fp32 (wide) to values (E, N, K), or transposed to (E, K, N). Grid (blocks of K,
// blocks of N, E).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    quantize_blocks(const void* __restrict__ w, u8* __restrict__ values, float* __restrict__ scales,
                    int N, int K, int wide, int transposed) {
  __shared__ Shared shared;
  const Place at;
  const int k = blockIdx.x * 128 + at.column, first = blockIdx.y * 128 + at.warp * ROWS;
  const int count = k < K ? N - first : 0;
  const i64 matrix = (i64)blockIdx.z * N * K, index = matrix + (i64)first * K + k;
  float tile[ROWS][4];
  if (wide) {
    const float* from = static_cast<const float*>(w) + index;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
      if (r < count) v = *reinterpret_cast<const float4*>(from);
      tile[r][0] = v.x, tile[r][1] = v.y, tile[r][2] = v.z, tile[r][3] = v.w;
      from += K;
    }
  } else {
    u32 pairs[ROWS][2];
    load_rows(static_cast<const u16*>(w) + index, K, count, pairs);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int j = 0; j < 4; j++) tile[r][j] = j % 2 ? high(pairs[r][j / 2]) : low(pairs[r][j / 2]);
  }
  u32 largest = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int j = 0; j < 4; j++) largest = max(largest, __float_as_uint(tile[r][j]) & 0x7FFFFFFF);
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
    u8* to = values + index;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      store_if(r < count, to, to_fp8<false>(tile[r][0], tile[r][1], tile[r][2], tile[r][3]));
      to += K;
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u32 quads[2];
#pragma unroll
    for (int q = 0; q < 2; q++)
      quads[q] = to_fp8<false>(tile[q * 4][j], tile[q * 4 + 1][j], tile[q * 4 + 2][j],
                               tile[q * 4 + 3][j]);
    piece_of(shared.lines, at.column + j, at.warp) = make_uint2(quads[0], quads[1]);
  }
  __syncthreads();
  write_lines(shared.lines, values + matrix + (i64)of_k * 128 * N + of_n * 128, N, K - of_k * 128,
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
    piece_of(shared.lines, at.column + j, at.warp) = make_uint2(columns[0][j], columns[1][j]);
  __syncthreads();
  write_lines(shared.lines, out + matrix + (i64)of_k * 128 * N + of_n * 128, N, K - of_k * 128,
              N - of_n * 128);
}

// The rows of a padded tile: the first one, and how many of the 128 exist; none = no such tile.
__device__ __forceinline__ int rows_of_tile(int tile, const int* ends, const int* padded_ends,
                                            int groups, int& first) {
  __shared__ int found[2];
#pragma unroll 1
  for (int g = threadIdx.x; g < groups; g += THREADS) {
    const int begin = g ? padded_ends[g - 1] : 0, end = padded_ends[g];
    if (begin <= tile * 128 && tile * 128 < end) {
      found[0] = (g ? ends[g - 1] : 0) + tile * 128 - begin;
      found[1] = ends[g] - found[0];
    }
    if (g == groups - 1 && tile * 128 >= end) found[1] = 0;
  }
  __syncthreads();
  first = uniform(found[0]);
  return min(uniform(found[1]), 128);
}

// Four elements in bf16, as exact as FP8.
__device__ __forceinline__ void widen(u32 quantized, float scale, u32 (&x)[2]) {
  const float2 a = from_fp8<E5M2>(quantized & 0xFFFF), b = from_fp8<E5M2>(quantized >> 16);
  x[0] = pack(a.x * scale, a.y * scale), x[1] = pack(b.x * scale, b.y * scale);
}

// Quantises a tile by columns and writes it transposed.
//
// odd: whether the number of tiles before is odd. load: called when `x` is no longer needed.
template <typename Load>
__device__ __forceinline__ void write_columns(Shared& shared, const Place& at, bool odd, const u32 (&x)[ROWS][2],
                                              int block, int K, u8* out, i64 pitch, float* out_scales, Load load) {
  u32 largest[2] = {0, 0};
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int pair = 0; pair < 2; pair++) largest[pair] = larger(largest[pair], x[r][pair]);
  add_columns(shared.largest[odd], at, largest);
  __syncthreads();
  if (threadIdx.x < 128) shared.largest[!odd][threadIdx.x] = 0;
  const int columns = min(128, K - block * 128), blocks = (K + 127) / 128;
  fill_lines<E5M2>(shared.lines, shared.largest[odd], at, x,
                   out_scales + ((i64)blockIdx.x * blocks + block) * 128, columns);
  load();
  __syncthreads();
  write_lines(shared.lines, out + (i64)block * 128 * pitch + blockIdx.x * 128, pitch, columns, 128);
}

// Transposes rows quantised by rows. slot_of_row: rows are tokens slot / top_k; null = as they come.
// T: rows of `values`. Grid (tiles, parts of the columns).
extern "C" __global__ void __launch_bounds__(THREADS, 3)
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
  const int first = at.warp * ROWS, count = exist - first;
  const bool mine = at.lane < ROWS && at.lane < count;
  int source = 0;
  if (mine) {
    source = begin + first + at.lane;
    if (slot_of_row) source = slot_of_row[source] / top_k;
  }
  float scale;
  u32 tile[ROWS];
  const auto load = [&](int block) {
    const int column = block * 128 + at.column;
    scale = mine ? scales[(i64)block * T + source] : 0.f;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const u8* from = values + (i64)__shfl_sync(ALL, source, r) * K + column;
      tile[r] = load_if(r < count && column < K, reinterpret_cast<const u32*>(from));
    }
  };
  load(blockIdx.y);
  bool odd = false;
  for (int block = blockIdx.y; block * 128 < K; block += gridDim.y, odd = !odd) {
    u32 x[ROWS][2];
#pragma unroll
    for (int r = 0; r < ROWS; r++) widen(tile[r], __shfl_sync(ALL, scale, r), x[r]);
    const int next = block + gridDim.y;
    write_columns(shared, at, odd, x, block, K, out, (i64)gridDim.x * 128, out_scales, [&] {
      if (next * 128 < K) load(next);
    });
  }
}

// x (R, K) bf16 by rows, and these transposed as by `transpose`. Grid (tiles, parts of the columns).
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
  const int first = at.warp * ROWS;
  const i64 top = begin + first;
  u32 tile[ROWS][2];
  const auto load = [&](int block) {
    const int column = block * 128 + at.column;
    load_rows(source + top * K + column, K, column < K ? exist - first : 0, tile);
  };
  load(blockIdx.y);
  bool odd = false;
  for (int block = blockIdx.y; block * 128 < K; block += gridDim.y, odd = !odd) {
    const int column = block * 128 + at.column, count = column < K ? exist - first : 0;
    const u32 largest = largest_of_rows(at, tile);
    const u32 inverse = inverse_scales<E5M2>(__byte_perm(largest, 0, 0x3232));
    const float scale = power_of_two_scale<E5M2>(largest);
    u8* to = values + top * K + column;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const u32 q = quantize<E5M2>(tile[r][0], tile[r][1], __shfl_sync(ALL, inverse, r));
      widen(q, __shfl_sync(ALL, scale, r), tile[r]);
      store_if(r < count, to, q);
      to += K;
    }
    if (at.lane < ROWS && first + at.lane < exist) scales[(i64)block * R + top + at.lane] = scale;
    const int next = block + gridDim.y;
    write_columns(shared, at, odd, tile, block, K, out, (i64)gridDim.x * 128, out_scales, [&] {
      if (next * 128 < K) load(next);
    });
  }
}

// Copies every row's token and its scales. A warp copies 8 rows of 512 bytes: all rows of one part of the
// columns after the other, so that the L2 cache serves for tokens of several experts. K is a multiple of 16.
// Grid (tiles, parts of the columns).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    gather(const u8* __restrict__ values, const float* __restrict__ scales,
           const int* __restrict__ slot_of_row, const int* __restrict__ ends, u8* __restrict__ out,
           float* __restrict__ out_scales, int T, int R, int K, int groups, int top_k) {
  const Place at;
  const int first = blockIdx.x * 128 + at.warp * ROWS, rows = ends[groups - 1];
  const int row = min(first + at.lane % ROWS, R - 1), column = blockIdx.y * 512 + at.lane * 16;
  const int token = row < rows ? slot_of_row[row] / top_k : 0;
  uint4 bytes[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const u8* from = values + (i64)__shfl_sync(ALL, token, r) * K + column;
    if (column < K) bytes[r] = *reinterpret_cast<const uint4*>(from);
  }
  u8* to = out + (i64)first * K + column;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (column < K && first + r < rows) *reinterpret_cast<uint4*>(to) = bytes[r];
    to += K;
  }
  const int block = blockIdx.y * 4 + at.lane / ROWS;
  if (block * 128 < K && first + at.lane % ROWS < rows)
    out_scales[(i64)block * R + row] = scales[(i64)block * T + token];
}

// Keeps the compiler from computing what depends on x before a loop, where it would occupy registers.
__device__ __forceinline__ int here_only(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

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

// 1 / (1 + e^−x).
__device__ __forceinline__ float sigmoid(float x) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
  return inverse;
}

constexpr int AT_A_TIME = 4;  // rows of SwiGLU that a warp quantises together

// gate_up (R, 2F) bf16. Writes the weighted activation, and gate and up to keep. weights: null = 1.
// A warp goes through 8 rows. Grid (tiles of 64 rows, parts of the columns).
extern "C" __global__ void __launch_bounds__(256, 3)
    swiglu(const u16* __restrict__ gate_up, const float* __restrict__ weights,
           const int* __restrict__ slot_of_row, const int* __restrict__ ends,
           u8* __restrict__ values, float* __restrict__ scales, u8* __restrict__ kept,
           float* __restrict__ kept_scales, int R, int F, int groups) {
  const Place at;
  const int first = (blockIdx.x * 8 + at.warp) * ROWS, blocks = F / 128;
  const int count = min(ends[groups - 1] - first, ROWS);
  if (count <= 0) return;
  float weight = 0.f;
  if (at.lane < count) weight = weights ? weights[slot_of_row[first + at.lane]] : 1.f;
  // Lane 4 t + r quantises row r of gate (t = 0), of up (1) and of the activation (2).
  const int which = at.lane / AT_A_TIME, its_row = at.lane % AT_A_TIME;
  float* its_scales = (which == 2 ? scales : kept_scales + (i64)(which * blocks) * R) + first + its_row;
  const u16* from = gate_up + (i64)first * 2 * F + at.column;
  u8* to = values + (i64)first * F + at.column;
  u8* to_keep = kept + (i64)first * 2 * F + at.column;
  uint2 loaded[2][2][AT_A_TIME];  // upper and lower rows, of gate and of up
  const auto load = [&](int block, int half) {
    const u16* at_row = from + block * 128 + half * AT_A_TIME * 2 * F;
#pragma unroll
    for (int r = 0; r < AT_A_TIME; r++) {
      const bool here = half * AT_A_TIME + r < count;
      loaded[half][0][r] = load_if(here, reinterpret_cast<const uint2*>(at_row));
      loaded[half][1][r] = load_if(here, reinterpret_cast<const uint2*>(at_row + F));
      at_row += 2 * F;
    }
  };
  load(blockIdx.y, 0);
#pragma unroll 1
  for (int block = blockIdx.y; block < blocks; block += gridDim.y) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (half == 0)
        load(block, 1);
      else if (block + gridDim.y < blocks)
        load(block + gridDim.y, 0);
      uint2 x[3][AT_A_TIME];
      u32 largest = 0;
#pragma unroll
      for (int r = 0; r < AT_A_TIME; r++) {
        x[0][r] = loaded[half][0][r], x[1][r] = loaded[half][1][r];
        const float factor = __shfl_sync(ALL, weight, half * AT_A_TIME + r);
        float h[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const u32 of_gate = j / 2 ? x[0][r].y : x[0][r].x, of_up = j / 2 ? x[1][r].y : x[1][r].x;
          const float gate = j % 2 ? high(of_gate) : low(of_gate);
          h[j] = gate * sigmoid(gate) * (j % 2 ? high(of_up) : low(of_up)) * factor;
        }
        x[2][r] = make_uint2(pack(h[0], h[1]), pack(h[2], h[3]));
#pragma unroll
        for (int t = 0; t < 3; t++) {
          const u32 of_row = largest_of_row(x[t][r].x, x[t][r].y);
          if (at.lane == AT_A_TIME * t + r) largest = of_row;
        }
      }
      const u32 inverse = inverse_scales<false>(__byte_perm(largest, 0, 0x3232));
      u8* kept_row = to_keep + block * 128 + half * AT_A_TIME * 2 * F;
      u8* row = to + block * 128 + half * AT_A_TIME * F;
#pragma unroll
      for (int r = 0; r < AT_A_TIME; r++) {
        u32 q[3];
#pragma unroll
        for (int t = 0; t < 3; t++)
          q[t] = quantize<false>(x[t][r].x, x[t][r].y, __shfl_sync(ALL, inverse, AT_A_TIME * t + r));
        const bool here = half * AT_A_TIME + r < count;
        store_if(here, kept_row, q[0]);
        store_if(here, kept_row + F, q[1]);
        store_if(here, row, q[2]);
        kept_row += 2 * F, row += F;
      }
      if (which < 3 && half * AT_A_TIME + its_row < count)
        its_scales[(i64)block * R + half * AT_A_TIME] = power_of_two_scale<false>(largest);
    }
  }
}

// The gradient of gate and up by rows and by columns, the weighted activation by columns, and, with
// weights, this block's part of their gradient. F is a multiple of 128. Grid (padded tiles, parts of the
// columns).
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
  const int first = at.warp * ROWS, count = exist - first, blocks = F / 128;
  const i64 top = begin + first, pitch = (i64)gridDim.x * 128;
  const bool mine = at.lane < ROWS && at.lane < count;
  float weight = 0.f;
  if (mine) weight = weights ? weights[slot_of_row[top + at.lane]] : 1.f;
  // Lane 4 t + r quantises row r of the gradients of gate (t = 0) and of up (1).
  const int which = at.lane / AT_A_TIME, its_row = at.lane % AT_A_TIME;
  uint2 *lines = shared.lines, *others = lines + 128 * WARPS;  // while some are written, others are filled
  uint2* waiting = lines + threadIdx.x;
  uint2 g[AT_A_TIME], q[AT_A_TIME];
  float scale_gate, scale_up;
  const auto load = [&](int block, int half) {
    const i64 row = begin + here_only(first) + half * AT_A_TIME;
    const int column = block * 128 + at.column;
    const u16* from = grad_hidden + row * F + column;
    const u8* from_kept = kept + row * 2 * F + column;
#pragma unroll
    for (int i = 0; i < AT_A_TIME; i++) {
      const bool here = half * AT_A_TIME + i < count;
      g[i] = load_if(here, reinterpret_cast<const uint2*>(from));
      q[i].x = load_if(here, reinterpret_cast<const u32*>(from_kept));
      q[i].y = load_if(here, reinterpret_cast<const u32*>(from_kept + F));
      from += F, from_kept += 2 * F;
    }
    if (half) return;
    scale_gate = mine ? kept_scales[(i64)block * R + top + at.lane] : 0.f;
    scale_up = mine ? kept_scales[(i64)(blocks + block) * R + top + at.lane] : 0.f;
  };
  for (int block = blockIdx.y; block < blocks; block += gridDim.y) {
    const int column = block * 128;
    load(block, 0);
    u8* to = grad + (begin + here_only(first)) * (i64)(2 * F) + column + at.column;
    u32 columns[3][2] = {};  // largest of the activation, of the gradients of gate and of up
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint2 x[3][AT_A_TIME];
      u32 largest = 0;
      float sums[AT_A_TIME];
#pragma unroll
      for (int i = 0; i < AT_A_TIME; i++) {
        const int r = half * AT_A_TIME + i;
        const float factor = __shfl_sync(ALL, weight, r);
        const float s_gate = __shfl_sync(ALL, scale_gate, r), s_up = __shfl_sync(ALL, scale_up, r);
        sums[i] = 0.f;
        u32 pairs[3][2];
#pragma unroll
        for (int p = 0; p < 2; p++) {
          const float2 gates = from_fp8<false>(p ? q[i].x >> 16 : q[i].x & 0xFFFF);
          const float2 ups = from_fp8<false>(p ? q[i].y >> 16 : q[i].y & 0xFFFF);
          const u32 pair = p ? g[i].y : g[i].x;
          float h[2], of_gate[2], of_up[2];
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const float gate = (j ? gates.y : gates.x) * s_gate, up = (j ? ups.y : ups.x) * s_up;
            float d = j ? high(pair) : low(pair);
            const float share = sigmoid(gate), silu = gate * share;
            h[j] = silu * up;
            sums[i] += d * h[j];
            d *= factor;
            h[j] *= factor;
            of_gate[j] = d * up * (share + silu * (1.f - share));
            of_up[j] = d * silu;
          }
          pairs[0][p] = pack(h[0], h[1]);
          pairs[1][p] = pack(of_gate[0], of_gate[1]);
          pairs[2][p] = pack(of_up[0], of_up[1]);
        }
#pragma unroll
        for (int t = 0; t < 3; t++) {
          x[t][i] = make_uint2(pairs[t][0], pairs[t][1]);
          waiting[(ROWS * t + r) * THREADS] = x[t][i];
          columns[t][0] = larger(columns[t][0], pairs[t][0]);
          columns[t][1] = larger(columns[t][1], pairs[t][1]);
          if (t == 0) continue;
          const u32 of_row = largest_of_row(pairs[t][0], pairs[t][1]);
          if (at.lane == AT_A_TIME * (t - 1) + i) largest = of_row;
        }
      }
      if (half == 0) load(block, 1);
      const float four = sum_of_four(at, sums);
      if (weights && which == half && mine) parts[(i64)block * R + top + at.lane] = four;
      const u32 inverse = inverse_scales<E5M2>(__byte_perm(largest, 0, 0x3232));
#pragma unroll
      for (int i = 0; i < AT_A_TIME; i++) {
        const bool here = half * AT_A_TIME + i < count;
#pragma unroll
        for (int t = 0; t < 2; t++)
          store_if(here, to + t * F,
                   quantize<E5M2>(x[t + 1][i].x, x[t + 1][i].y, __shfl_sync(ALL, inverse, AT_A_TIME * t + i)));
        to += 2 * F;
      }
      if (which < 2 && half * AT_A_TIME + its_row < count)
        grad_scales[(i64)(which * blocks + block) * R + top + half * AT_A_TIME + its_row] =
            power_of_two_scale<E5M2>(largest);
    }
#pragma unroll
    for (int t = 0; t < 3; t++) add_columns(shared.largest[t], at, columns[t]);
    u32 tile[ROWS][2];
    const auto take = [&](int t) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const uint2 pairs = waiting[(ROWS * t + r) * THREADS];
        tile[r][0] = pairs.x, tile[r][1] = pairs.y;
      }
    };
    take(0);
    __syncthreads();
    const i64 to_lines = column * pitch + blockIdx.x * 128;
    float* its_scales = t_grad_scales + (i64)blockIdx.x * 2 * F + column;
    fill_lines<false>(lines, shared.largest[0], at, tile, t_hidden_scales + (i64)blockIdx.x * F + column, 128);
    take(1);
    __syncthreads();
    write_lines(lines, t_hidden + to_lines, pitch, 128, 128);
    fill_lines<E5M2>(others, shared.largest[1], at, tile, its_scales, 128);
    take(2);
    __syncthreads();
    write_lines(others, t_grad + to_lines, pitch, 128, 128);
    fill_lines<E5M2>(lines, shared.largest[2], at, tile, its_scales + F, 128);
    __syncthreads();
    clear(shared);
    write_lines(lines, t_grad + to_lines + F * pitch, pitch, 128, 128);
    __syncthreads();
  }
}
