// Quantises, transposes and gathers matrices; quantize.py is the definition.
//
// Compiled by NVRTC with E5M2 = 1 where gradients are e5m2.

#include "fp8/tiles.cuh"

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

// w (E, N, K) bf16 or fp32 to values (E, N, K), or transposed to (E, K, N). Grid (blocks of K,
// blocks of N, E).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    quantize_blocks(const void* __restrict__ w, u8* __restrict__ values, float* __restrict__ scales,
                    int N, int K, int fp32, int transposed) {
  __shared__ Shared shared;
  const Place at;
  const int k = blockIdx.x * 128 + at.column, first = blockIdx.y * 128 + at.warp * ROWS;
  const int count = k < K ? N - first : 0;
  const i64 matrix = (i64)blockIdx.z * N * K, index = matrix + (i64)first * K + k;
  float tile[ROWS][4];
  if (fp32) {
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
  const float scale = scale_block(shared.largest[0], at, tile);
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

// Four elements in bf16: exact for what was quantised from bf16.
__device__ __forceinline__ void widen(u32 quantized, float scale, u32 (&x)[2]) {
  const float2 a = from_fp8<E5M2>(quantized & 0xFFFF), b = from_fp8<E5M2>(quantized >> 16);
  x[0] = pack(a.x * scale, a.y * scale), x[1] = pack(b.x * scale, b.y * scale);
}

// Quantises a tile by columns and writes it transposed. A block does so with several blocks of columns of
// its rows, where there are many tiles.
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
  if (first >= rows) return;
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
