// One AdamW step of weights (E, N, K) and states in fp32, which quantises the new weights by blocks;
// reference: ops/adamw.py.
//
// Compiled by NVRTC with GRAD_FP32 = 1 where gradients are fp32 (else bf16).

#include "fp8/tiles.cuh"

// What changes from step to step: see `step_numbers`. factor: of the gradient, or null.
struct Step {
  float lr, keep, inverse1, inverse2, factor;
  __device__ __forceinline__ Step(const float* numbers, const float* factor)
      : lr(numbers[0]),
        keep(1.f - numbers[1]),
        inverse1(1.f / numbers[2]),
        inverse2(1.f / numbers[3]),
        factor(factor ? *factor : 1.f) {}
};

struct Settings {
  float beta1, beta2, l2;
};

__device__ __forceinline__ void update(float& p, float g, float& m, float& v, const Step& step,
                                       const Settings& with, float eps) {
  g = g * step.factor + with.l2 * p;
  m += (g - m) * (1.f - with.beta1);
  v += (g * g - v) * (1.f - with.beta2);
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v * step.inverse2));
  p = p * step.keep - __fdividef(step.lr * (m * step.inverse1), root + eps);
}

// What a thread reads of a row.
struct Row {
  float4 p, m, v, g;
};

// Grid (blocks of K, blocks of N, E). Strides: of E. N and K are multiples of 16.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    adamw(float* param, const void* __restrict__ grad, float* mean, float* square,
          const float* __restrict__ numbers, u8* __restrict__ values, float* __restrict__ scales,
          const float* __restrict__ factor, int N, int K, int param_stride, int grad_stride, int values_stride,
          int scales_stride, float beta1, float beta2, float eps, float l2) {
  __shared__ u32 of_warps[WARPS];
  const Place at;
  const int k = blockIdx.x * 128 + at.column, first = blockIdx.y * 128 + at.warp * ROWS;
  const int count = k < K ? N - first : 0;
  const i64 e = blockIdx.z, index = (i64)first * K + k;
  const Step step(numbers, factor);
  const Settings with{beta1, beta2, l2};
  param += e * param_stride + index;
  mean += e * N * K + index, square += e * N * K + index;
  const i64 of_grad = e * grad_stride + index;
  const auto load = [&](int r) {
    const int there = r * K;
    Row row;
    row.p = load_to_update_if(r < count, param + there);
    row.m = load_to_update_if(r < count, mean + there), row.v = load_to_update_if(r < count, square + there);
    if (GRAD_FP32) {
      row.g = load_to_update_if(r < count, static_cast<const float*>(grad) + of_grad + there);
    } else {
      const u16* from = static_cast<const u16*>(grad) + of_grad + there;
      const uint2 g = load_if(r < count, reinterpret_cast<const uint2*>(from));
      row.g = make_float4(low(g.x), high(g.x), low(g.y), high(g.y));
    }
    return row;
  };
  float tile[ROWS][4];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    Row row = load(r);
    const float safe_eps = r < count ? eps : 1.f;  // zeros stay zeros behind the matrix
    update(row.p.x, row.g.x, row.m.x, row.v.x, step, with, safe_eps);
    update(row.p.y, row.g.y, row.m.y, row.v.y, step, with, safe_eps);
    update(row.p.z, row.g.z, row.m.z, row.v.z, step, with, safe_eps);
    update(row.p.w, row.g.w, row.m.w, row.v.w, step, with, safe_eps);
    store_if(r < count, param + r * K, row.p);
    store_if(r < count, mean + r * K, row.m);
    store_if(r < count, square + r * K, row.v);
    tile[r][0] = row.p.x, tile[r][1] = row.p.y, tile[r][2] = row.p.z, tile[r][3] = row.p.w;
  }
  const float scale = scale_block(of_warps, at, tile);
  if (threadIdx.x == 0) scales[e * scales_stride + blockIdx.y * gridDim.x + blockIdx.x] = scale;
  u8* to = values + e * values_stride + index;
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    store_if(r < count, to + r * K, to_fp8<false>(tile[r][0], tile[r][1], tile[r][2], tile[r][3]));
}
