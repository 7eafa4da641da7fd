// FP8's numbers and scales, and the tiles in which our kernels quantise.
//
// A block of 512 threads has tiles of 128 rows by 128 columns. Warp w has rows 8 w to 8 w + 7, lane
// l columns 4 l to 4 l + 3: a row is read and written as whole lines, its largest magnitude is one
// reduction over the warp, and what a thread holds of a column are 8 bytes of the transposed tile,
// which goes through shared memory to be written as whole lines. Numbers in bf16 are compared and scaled
// in pairs: exact, but for products that are 0 in FP8.
//
// Rows sorted by group are transposed with each group padded to a multiple of 128 rows; a tile finds
// its group in the lists of ends, so no size is needed on the host.

#pragma once

#include "hopper.cuh"

typedef unsigned char u8;
typedef long long i64;

constexpr int THREADS = 512, WARPS = 16;
constexpr int ROWS = 8;  // of a warp
constexpr u32 ALL = 0xFFFFFFFF;

struct alignas(16) Shared {
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

// 1 / scale for a pair of largest magnitudes, without signs; any number for 0, NaN where not finite.
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

// The same for what the kernel writes later.
__device__ __forceinline__ float4 load_to_update_if(bool here, const float* from) {
  float4 x;
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; "
      "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "l"(from), "r"((u32)here));
  return x;
}

__device__ __forceinline__ void store_if(bool here, float* to, const float4& x) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%4], {%0, %1, %2, %3};}" ::"f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w), "l"(to), "r"((u32)here)
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

// Raises the largest magnitudes of a tile's columns to those over this warp's rows, of which a thread has
// two pairs. They are complete after a barrier.
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

// Divides a block of 128 × 128 by its scale, largest / 448, and returns that. of_warps: free for 16 numbers.
__device__ __forceinline__ float scale_block(u32* of_warps, const Place& at, float (&tile)[ROWS][4]) {
  u32 largest = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int j = 0; j < 4; j++) largest = max(largest, __float_as_uint(tile[r][j]) & 0x7FFFFFFF);
  largest = __reduce_max_sync(ALL, largest);
  if (at.lane == 0) of_warps[at.warp] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) largest = max(largest, of_warps[i]);
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
  return scale;
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
