// Power iteration on small matrices, one block of 64 threads to each.
#pragma once

#include "common/cuda_compat.cuh"
#include "planted.h"
#include "reductions.cuh"

namespace hessreg::planted {

constexpr int kMaxOrder = 64;

template <Bug kBug>
__global__ void __launch_bounds__(kMaxOrder) power_iteration_kernel(PowerIteration p) {
  HESSREG_SHARED(float, a, [kMaxOrder][kMaxOrder + 1]);
  HESSREG_SHARED(float, v, [kMaxOrder]);
  HESSREG_SHARED(bool, converged, [1]);
  const int t = threadIdx.x, n = p.n;
  const float* source = p.a + int64_t{blockIdx.x} * n * n;
  for (int i = t; i < n * n; i += kMaxOrder) a[i / n][i % n] = source[i];
  v[t] = t < n ? 1.0f + 0.01f * static_cast<float>(t) : 0.0f;
  if (t == 0) converged[0] = false;
  float quotient = 0, previous = 0;
  __syncthreads();
  for (int iteration = 0; iteration < p.iterations; ++iteration) {
    float product = 0;
    for (int k = 0; k < n && t < n; ++k) product += a[t][k] * v[k];
    const float norm = sqrtf(block_sum<kBug>(product * product));
    quotient = block_sum<kBug>(product * v[t]) / block_sum<kBug>(v[t] * v[t]);
    __syncthreads();  // redundant, as block_sum has one after the last use of v: the audit's catch
    v[t] = product / norm;
    const bool settled = fabsf(quotient - previous) <= p.tolerance * fabsf(quotient);
    previous = quotient;
    if constexpr (kBug == Bug::kThreadsLeaveAlone) {
      if (settled && t % 2 == 0) break;
    }
    if (t == 0) converged[0] = settled;
    if constexpr (kBug != Bug::kFlagReadWithoutBarrier) __syncthreads();
    if (converged[0]) break;
  }
  if (t < n) p.vector[int64_t{blockIdx.x} * n + t] = v[t];
  if (t == 0) p.value[blockIdx.x] = quotient;
}

}  // namespace hessreg::planted
