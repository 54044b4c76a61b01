// All layers of a small network in one launch. The weights are in shared memory, and a block takes
// kSamples samples at a time from layer to layer: what one layer gives on, the next one finds
// there.
#pragma once

#include "product.cuh"

namespace hessreg::hvp::cuda {

constexpr int kMaxSteps = kMaxProducts;
constexpr int kMaxWidth = 128;
constexpr int kSamples = 16;
constexpr int kChainRows = kMaxWidth * kSamples / kColumns / kThreads;  // of one thread
static_assert(kChainRows == 4);  // what widths are rounded up to

struct Chain {
  Product steps[kMaxSteps];  // the first right operand of all but the first comes from before
  int64_t count, directions, samples;
  int64_t blocks_of_direction;
  Operand input;  // of the first step, [samples, input_rows]; or null
  int64_t input_rows;
  void* copy;  // [input_rows, samples]: the input once more; or null
  // Where they are in shared memory, in elements.
  int left[kMaxSteps][2], right[kMaxSteps], passed[2];
};

HESSREG_HD int64_t padded_rows(int64_t rows) {
  return (rows + kChainRows - 1) / kChainRows * kChainRows;
}

// From one column of a left operand to the next: an odd number of pieces, no conflicts.
template <typename C>
HESSREG_HD int64_t left_stride(int64_t rows) {
  return padded_rows(rows) + 16 / static_cast<int64_t>(sizeof(C));
}

// Starts to bring the rows of an operand to shared memory, as [depth, stride], with zeros behind.
template <typename C>
__device__ __forceinline__ void load_rows(const Operand& operand, int64_t offset, int rows,
                                          int padded, int depth, int stride, C* target) {
  const bool along_depth = operand.depth_stride == 1;
  const int patch_depth = along_depth ? 8 : 2, patch_rows = 32 / patch_depth;
  const int lane_k = along_depth ? lane_index() % 8 : lane_index() / 16;
  const int lane_row = along_depth ? lane_index() / 8 : lane_index() % 16;
  const int across = (depth + patch_depth - 1) / patch_depth;
  const int patches = across * ((padded + patch_rows - 1) / patch_rows);
  const C* source = static_cast<const C*>(operand.data) + offset;
  for (int patch = warp_index(); patch < patches; patch += kWarps) {
    const int k = patch % across * patch_depth + lane_k;
    const int row = patch / across * patch_rows + lane_row;
    if (k >= depth || row >= padded) continue;
    if (row < rows) {
      cp_async(target + k * stride + row,
               source + row * operand.row_stride + k * operand.depth_stride);
    } else {
      target[k * stride + row] = 0;
    }
  }
}

template <typename C>
class ChainTask {
  using Threads = Share<C, kSamples, kChainRows>;

 public:
  __device__ __forceinline__ ChainTask(const Chain& chain, C* shared)
      : chain_(chain),
        shared_(shared),
        direction_(blockIdx.x / chain.blocks_of_direction),
        block_(blockIdx.x % chain.blocks_of_direction) {}

  __device__ __forceinline__ void run() {
    for (int i = 0; i < chain_.count; ++i) load_weights(i);
    const int64_t stride = chain_.blocks_of_direction * kSamples;
    for (sample0_ = block_ * kSamples; sample0_ < chain_.samples; sample0_ += stride) {
      samples_ = static_cast<int>(min(chain_.samples - sample0_, int64_t{kSamples}));
      load_samples();
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      if (chain_.copy) copy_input();
      for (int i = 0; i < chain_.count; ++i) run_step(i);
    }
  }

 private:
  __device__ __forceinline__ void load_weights(int i) {
    const Product& step = chain_.steps[i];
    const int rows = static_cast<int>(step.rows);
    for (int t = 0; t < 2; ++t) {
      const Operand& left = step.terms[t].left;
      if (left.data)
        load_rows<C>(left, direction_ * left.direction_stride, rows,
                     static_cast<int>(padded_rows(rows)), static_cast<int>(step.depth),
                     static_cast<int>(left_stride<C>(rows)), shared_ + chain_.left[i][t]);
    }
  }

  __device__ __forceinline__ void load_samples() {
    if (chain_.input.data) load_right(chain_.input, chain_.input_rows, shared_ + chain_.passed[0]);
    for (int i = 0; i < chain_.count; ++i) {
      const Term& second = chain_.steps[i].terms[1];
      if (second.left.data)
        load_right(second.right, chain_.steps[i].depth, shared_ + chain_.right[i]);
    }
  }

  __device__ __forceinline__ void load_right(const Operand& right, int64_t depth, C* target) {
    const int64_t offset = direction_ * right.direction_stride + sample0_ * right.row_stride;
    load_rows<C>(right, offset, samples_, kSamples, static_cast<int>(depth), kSamples, target);
  }

  __device__ __forceinline__ void copy_input() const {
    for (int e = threadIdx.x; e < chain_.input_rows * kSamples; e += kThreads) {
      const int row = e / kSamples, sample = e % kSamples;
      if (sample < samples_)
        put(chain_.copy, row * chain_.samples + sample0_ + sample, shared_[chain_.passed[0] + e]);
    }
  }

  __device__ __forceinline__ void run_step(int i) {
    const Product& step = chain_.steps[i];
    const int rows = static_cast<int>(step.rows), depth = static_cast<int>(step.depth);
    const int stride = static_cast<int>(left_stride<C>(rows));
    C* next = shared_ + chain_.passed[(i + 1) % 2];
    if (Threads::row() < rows) {
      C sums[kChainRows][kColumns] = {};
      for (int t = 0; t < 2; ++t) {
        const int right = t == 0 ? chain_.passed[i % 2] : chain_.right[i];
        if (step.terms[t].left.data)
          Threads::multiply(shared_ + chain_.left[i][t], stride, shared_ + right, kSamples, depth,
                            sums);
      }
      Threads::store(sums, next, kSamples);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < rows * kSamples; e += kThreads) {
      const int row = e / kSamples, sample = e % kSamples;
      if (sample < samples_)
        next[e] = finish(step.epilogue, direction_, row, sample0_ + sample, next[e]);
    }
    __syncthreads();
  }

  const Chain& chain_;
  C* shared_;
  int64_t direction_, block_, sample0_;
  int samples_;
};

// One block a direction and some of the samples.
template <typename C>
__global__ void __launch_bounds__(kThreads) chain_kernel(const Chain __grid_constant__ chain) {
  HESSREG_DYNAMIC_SHARED(C, shared);
  ChainTask<C>(chain, shared).run();
}

}  // namespace hessreg::hvp::cuda
