#pragma once

#include "common/cuda_compat.cuh"
#include "planted.h"

namespace hessreg::planted {

// Prefix sums of each warp, exchanged through shared memory.
template <Bug kBug>
__global__ void __launch_bounds__(256) warp_scan_kernel(const float* x, float* out, int n) {
  HESSREG_SHARED(float, sums, [256]);
  const int t = threadIdx.x, i = blockIdx.x * 256 + t;
  sums[t] = i < n ? x[i] : 0.0f;
  __syncwarp();
  for (int distance = 1; distance < 32; distance *= 2) {
    const float left = t % 32 >= distance ? sums[t - distance] : 0.0f;
    if constexpr (kBug == Bug::kVoteAsBarrier) {
      __any_sync(0xffffffffu, true);
    } else if constexpr (kBug != Bug::kNoWarpBarrier) {
      __syncwarp();
    }
    sums[t] += left;
    __syncwarp();
  }
  if (i < n) out[i] = sums[t];
}

template <Bug kBug>
__global__ void __launch_bounds__(256)
    axpy_kernel(const float* g, const float* v, const float* c, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = g[i] - c[0] * v[i];
  if (kBug == Bug::kOneElementTooMany && i == n) out[i] = 0;
}

}  // namespace hessreg::planted
