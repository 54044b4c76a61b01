// c = a b' by TF32 tensor cores: one warp to each 16 x 8 tile, operands copied asynchronously.
#pragma once

#include "common/cuda_compat.cuh"
#include "planted.h"

namespace hessreg::planted {

constexpr int kDepth = 32;   // columns of a and b in one stage
constexpr int kStride = 36;  // of a row in shared memory: 16-byte aligned, no bank conflicts
constexpr int kRowsOfA = 16, kRowsOfB = 32;
constexpr int kStage = (kRowsOfA + kRowsOfB) * kStride;
constexpr int kProductThreads = 128;

struct Product {
  const float *a, *b;
  float* c;
  int m, n, k;
};

// Starts to copy columns [k0, k0 + 32) of the block's rows of a, then b; zero outside.
template <Bug kBug>
__device__ void load_stage(float* stage, const Product& p, int k0) {
  const int m0 = blockIdx.y * kRowsOfA, n0 = blockIdx.x * kRowsOfB;
  for (int piece = threadIdx.x; piece < (kRowsOfA + kRowsOfB) * kDepth / 4;
       piece += kProductThreads) {
    const int row = piece / (kDepth / 4), k = piece % (kDepth / 4) * 4;
    const bool is_a = row < kRowsOfA;
    const int source_row = is_a ? m0 + row : n0 + row - kRowsOfA;
    const float* source = (is_a ? p.a : p.b) + int64_t{source_row} * p.k + k0 + k;
    float* target = stage + row * kStride + k;
    const bool has_row = source_row < (is_a ? p.m : p.n) || kBug == Bug::kCopyPastTheEnd;
    if (has_row && k0 + k < p.k) {
      cp_async16(target, source);
    } else {
      *reinterpret_cast<float4*>(target) = make_float4(0, 0, 0, 0);
    }
  }
  cp_async_commit();
}

template <Bug kBug>
__device__ void multiply_stage(float (&sums)[4], const float* stage) {
  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  const float* a = stage + group * kStride + t;
  const float* b = stage + (kRowsOfA + threadIdx.x / 32 * 8 + group) * kStride + t;
  constexpr int kSwap = kBug == Bug::kFragmentSwapped ? 4 : 0;
  for (int k = 0; k < kDepth; k += 8) {
    const uint32_t a_fragment[4] = {to_tf32(a[k]), to_tf32(a[8 * kStride + k]), to_tf32(a[k + 4]),
                                    to_tf32(a[8 * kStride + k + 4])};
    const uint32_t b_fragment[2] = {to_tf32(b[k + kSwap]), to_tf32(b[k + 4 - kSwap])};
    mma_m16n8k8_tf32(sums, a_fragment, b_fragment, sums);
  }
}

template <Bug kBug>
__global__ void __launch_bounds__(kProductThreads) matrix_product_kernel(Product p) {
  HESSREG_DYNAMIC_SHARED(float, stages);
  float sums[4] = {};
  load_stage<kBug>(stages, p, 0);
  for (int k0 = 0, current = 0; k0 < p.k; k0 += kDepth, current ^= 1) {
    if (k0 + kDepth < p.k) {
      load_stage<kBug>(stages + (current ^ 1) * kStage, p, k0 + kDepth);
    } else {
      cp_async_commit();  // an empty group keeps the count
    }
    cp_async_wait<kBug == Bug::kWaitsForOneGroupLess ? 2 : 1>();
    __syncthreads();
    multiply_stage<kBug>(sums, stages + current * kStage);
    if constexpr (kBug != Bug::kStageReplacedTooEarly) __syncthreads();
  }
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = blockIdx.y * kRowsOfA + lane / 4 + i / 2 * 8;
    const int column = blockIdx.x * kRowsOfB + threadIdx.x / 32 * 8 + lane % 4 * 2 + i % 2;
    if (row < p.m && column < p.n) p.c[int64_t{row} * p.n + column] = sums[i];
  }
}

}  // namespace hessreg::planted
