// SwiGLU that quantises what it makes, forward and backward; quantize.py is the definition. Where there are
// many tiles, a block goes through several blocks of columns of the same rows.
//
// Compiled by NVRTC with E5M2 = 1 where gradients are e5m2.

#include "fp8/tiles.cuh"

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
