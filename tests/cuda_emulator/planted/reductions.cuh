// Sums over a warp, a block and a grid.
#pragma once

#include "common/cuda_compat.cuh"
#include "planted.h"

namespace hessreg::planted {

template <Bug kBug>
__device__ float warp_sum(float value) {
  constexpr int kFirst = kBug == Bug::kShuffleStartsAtEight ? 8 : 16;
  constexpr unsigned kMask = kBug == Bug::kMaskNamesHalfTheWarp ? 0x0000ffffu : 0xffffffffu;
  HESSREG_UNROLL
  for (int distance = kFirst; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kMask, value, distance);
  }
  return value;
}

// The sum over the block, in every thread. All threads must call it.
template <Bug kBug>
__device__ float block_sum(float value) {
  HESSREG_SHARED(float, warp_sums, [32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps = (blockDim.x + 31) / 32;
  value = warp_sum<kBug>(value);
  if constexpr (kBug != Bug::kScratchReusedTooEarly) __syncthreads();
  if (lane == 0) warp_sums[warp] = value;
  if constexpr (kBug != Bug::kScratchReadTooEarly) __syncthreads();
  const int slots = kBug == Bug::kOneSlotTooMany ? warps + 1 : warps;
  value = lane < slots ? warp_sums[lane] : 0.0f;
  return warp_sum<kBug>(value);
}

struct Sums {
  float gv, vv;
};

// <g, v> and <v, v> over the elements that fall to this block.
template <Bug kBug>
__device__ Sums block_dots(const float* g, const float* v, int n) {
  Sums sums{0, 0};
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
    sums.gv += g[i] * v[i];
    sums.vv += v[i] * v[i];
  }
  return {block_sum<kBug>(sums.gv), block_sum<kBug>(sums.vv)};
}

template <Bug kBug>
__device__ void add(float* total, float value) {
  if constexpr (kBug == Bug::kPlainAddAcrossBlocks) {
    *total += value;
  } else {
    atomicAdd(total, value);
  }
}

template <Bug kBug>
__global__ void __launch_bounds__(256)
    project_kernel(const float* g, const float* v, float* sums, float* out, int n) {
  const Sums mine = block_dots<kBug>(g, v, n);
  if (threadIdx.x == 0) {
    add<kBug>(&sums[0], mine.gv);
    add<kBug>(&sums[1], mine.vv);
  }
  if constexpr (kBug != Bug::kNoGridSync) grid_sync();
  const float c = sums[0] / sums[1];
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) out[i] = g[i] - c * v[i];
}

// The last block to draw a ticket sees the sums of all others and finishes.
template <Bug kBug>
__global__ void __launch_bounds__(256) ratio_kernel(const float* g, const float* v, float* partials,
                                                    uint32_t* ticket, float* out, int n) {
  HESSREG_SHARED(bool, is_last, [1]);
  const Sums mine = block_dots<kBug>(g, v, n);
  if constexpr (kBug == Bug::kFenceTooEarly) __threadfence();
  constexpr unsigned kSecondWriter = kBug == Bug::kSumOfAnotherWarp ? 32 : 0;
  if (threadIdx.x == kSecondWriter) partials[2 * blockIdx.x + 1] = mine.vv;
  if (threadIdx.x == 0) {
    partials[2 * blockIdx.x] = mine.gv;
    if constexpr (kBug != Bug::kNoFence && kBug != Bug::kFenceTooEarly) __threadfence();
    is_last[0] = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0]) return;
  Sums all{0, 0};
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
    all.gv += partials[2 * block];
    all.vv += partials[2 * block + 1];
  }
  all = {block_sum<kBug>(all.gv), block_sum<kBug>(all.vv)};
  if (threadIdx.x == 0) out[0] = all.gv / all.vv;
}

}  // namespace hessreg::planted
