#include "common/cuda_compat.cuh"
#include "semantics.h"

namespace hessreg::semantics {

namespace {

constexpr unsigned kFullMask = 0xffffffffu;

__global__ void shuffles_kernel(int* out) {
  const int lane = threadIdx.x;
  int* row = out + lane * kShuffles;
  row[0] = __shfl_sync(kFullMask, lane, 5);
  row[1] = __shfl_sync(kFullMask, lane, 3, 8);
  row[2] = __shfl_sync(kFullMask, lane, 37);
  row[3] = __shfl_up_sync(kFullMask, lane, 3, 16);
  row[4] = __shfl_down_sync(kFullMask, lane, 3, 16);
  row[5] = __shfl_xor_sync(kFullMask, lane, 9, 8);
  row[6] = __shfl_xor_sync(kFullMask, lane, 31);
  row[7] = static_cast<int>(__ballot_sync(kFullMask, lane % 3 == 0));
}

__global__ void wide_shuffle_kernel(const double* x, double* out) {
  out[threadIdx.x] = __shfl_xor_sync(kFullMask, x[threadIdx.x], 1);
}

// 40 threads: the second warp has 8 lanes; the first 4 lanes of each go another way.
__global__ void partial_warps_kernel(int* out) {
  const int t = threadIdx.x, lane = t % 32;
  if (lane < 4) {
    out[t] = __reduce_max_sync(0xfu, t);
  } else {
    out[t] = __popc(__ballot_sync(0xfffffff0u, 1));
  }
  out[40 + t] = __any_sync(kFullMask, lane == 3);
  out[80 + t] = __all_sync(kFullMask, lane < 8);
}

__global__ void votes_of_rest_kernel(int* out) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __popc(__ballot_sync(kFullMask, 1));
}

__global__ void votes_of_block_kernel(int* out) {
  const int t = threadIdx.x;
  out[t] = __syncthreads_count(t % 4 == 0);
  out[64 + t] = __syncthreads_and(t < 63);
  out[128 + t] = __syncthreads_or(t == 63);
}

__global__ void reductions_kernel(const int* x, int* out) {
  const int value = x[threadIdx.x];
  const unsigned bits = value;
  const int results[] = {__reduce_add_sync(kFullMask, value),
                         __reduce_min_sync(kFullMask, value),
                         __reduce_max_sync(kFullMask, value),
                         static_cast<int>(__reduce_and_sync(kFullMask, bits)),
                         static_cast<int>(__reduce_or_sync(kFullMask, bits)),
                         static_cast<int>(__reduce_xor_sync(kFullMask, bits))};
  for (int i = 0; i < 6 && threadIdx.x == 0; ++i) out[i] = results[i];
}

__global__ void atomics_kernel(int* out) {
  const int t = threadIdx.x;
  atomicAdd(&out[0], t);
  atomicMin(&out[1], -t);
  atomicMax(&out[2], t);
  atomicCAS(&out[3], 0, 7);
  atomicExch(&out[4], 9);
  atomicInc(reinterpret_cast<unsigned*>(&out[5]), 4);
}

__device__ uint32_t tf32_register(float x, bool rounded) {
  return rounded ? to_tf32(x) : __float_as_uint(x);
}

__global__ void mma_tf32_kernel(const float* a, const float* b, float* c, bool rounded) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a_fragment[4], b_fragment[2];
  for (int i = 0; i < 4; ++i) {
    a_fragment[i] = tf32_register(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4], rounded);
  }
  for (int i = 0; i < 2; ++i) b_fragment[i] = tf32_register(b[g * 8 + t + i * 4], rounded);
  float sums[4] = {1, 1, 1, 1};
  mma_m16n8k8_tf32(sums, a_fragment, b_fragment, sums);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

__device__ uint32_t load_pair(const uint16_t* x) {
  return static_cast<uint32_t>(x[1]) << 16 | x[0];
}

__global__ void mma_bf16_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint16_t *top = a + g * 16 + 2 * t, *bottom = top + 8 * 16, *column = b + g * 16 + 2 * t;
  const uint32_t a_fragment[4] = {load_pair(top), load_pair(bottom), load_pair(top + 8),
                                  load_pair(bottom + 8)};
  const uint32_t b_fragment[2] = {load_pair(column), load_pair(column + 8)};
  float sums[4] = {1, 1, 1, 1};
  mma_m16n8k16_bf16(sums, a_fragment, b_fragment, sums);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

__device__ int grid_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

__global__ void round_to_tf32_kernel(const float* x, float* out, int n) {
  const int i = grid_index();
  if (i < n) out[i] = __uint_as_float(to_tf32(x[i]));
}

__global__ void power_of_two_kernel(const float* x, float* out, int n) {
  const int i = grid_index();
  if (i < n) out[i] = ex2(x[i]);
}

__global__ void float_to_half_kernel(const float* x, __half* out, int n) {
  const int i = grid_index();
  if (i < n) out[i] = __float2half(x[i]);
}

__global__ void half_to_float_kernel(const __half* x, float* out, int n) {
  const int i = grid_index();
  if (i < n) out[i] = __half2float(x[i]);
}

__global__ void float_to_bfloat16_kernel(const float* x, __nv_bfloat16* out, int n) {
  const int i = grid_index();
  if (i < n) out[i] = __float2bfloat16(x[i]);
}

__global__ void bfloat16_to_float_kernel(const __nv_bfloat16* x, float* out, int n) {
  const int i = grid_index();
  if (i < n) out[i] = __bfloat162float(x[i]);
}

__global__ void thread_order_kernel(int* next, int* out) {
  __syncthreads();
  out[atomicAdd(next, 1)] = grid_index();
}

__global__ void initial_shared_memory_kernel(float* out) {
  HESSREG_SHARED(float, values, [2]);
  HESSREG_DYNAMIC_SHARED(float, more_values);
  out[0] = values[1];
  out[1] = more_values[1];
  values[1] = more_values[1] = 1;  // must not be there for the next block
}

__global__ void load_vectors_kernel(float* out, int stride) {
  HESSREG_SHARED(float4, values, [64]);
  const int t = threadIdx.x;
  values[t] = values[t + 32] = make_float4(0, 1, 2, 3);
  __syncthreads();
  const float4 value = values[t * stride];
  out[t] = value.w;
}

template <typename T>
__global__ void transpose_kernel(const T* x, T* out) {
  HESSREG_SHARED(T, tile, [8][4]);
  const int t = threadIdx.x;
  cp_async(&tile[t % 8][t / 8], x + t);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[t] = tile[t / 4][t % 4];
}

struct LargeParameter {
  uint64_t values[500];
};

__global__ void parameter_addresses_kernel(const LargeParameter __grid_constant__ parameter,
                                           uint64_t* out) {
  out[threadIdx.x] = reinterpret_cast<uint64_t>(&parameter) + parameter.values[0];
}

__global__ void write_local_kernel(int* x, int index) {
  int values[4] = {};
  values[index & 7] = 1;
  x[0] = values[0];
}

__global__ void calculate_with_integers_kernel(int* x, int value) {
  x[0] = value + 1;
  x[1] = 1 << value % 64;
}

__global__ void read_kernel(const float* x, float* out) { out[0] = x[0]; }

__global__ void race_on_half_word_kernel(uint16_t* x, bool write_last) {
  if (threadIdx.x < 2) {
    if (write_last) {
      x[2 + threadIdx.x] = x[threadIdx.x];
    } else {
      x[threadIdx.x] = 1;
    }
  } else if (threadIdx.x == 32) {
    if (write_last) {
      x[0] = 1;
    } else {
      x[2] = x[0];
    }
  }
}

__global__ void race_with_first_warp_kernel(int* x) {
  const int value = x[0];
  if (threadIdx.x < 32) return;
  __syncwarp();
  if (threadIdx.x == 32) x[0] = value;
}

__global__ void write_shared_kernel(float* out, int index) {
  HESSREG_SHARED(float, first, [16]);
  HESSREG_SHARED(float, second, [16]);
  float* element = first + index;
  second[0] = 0;
  *element = 1;
  out[0] = second[0];
}

__constant__ float table[] = {0, 1, 4, 9};

__global__ void read_constant_kernel(float* out, int index) {
  const float* source =
      index >= 0 ? table : out;  // for the compiler not to see that it is constant
  out[0] = source[index];
}

__global__ void diverge_at_barriers_kernel() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void deadlock_kernel() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void call_outside_mask_kernel() { __syncwarp(0x0000ffffu); }

#if !defined(__CUDACC__)  // which refuses it
__global__ void large_array_kernel() {
  HESSREG_SHARED(double, large, [7000]);
  large[threadIdx.x] = 1;
}
#endif

__global__ void dynamic_array_kernel() {
  HESSREG_DYNAMIC_SHARED(float, values);
  values[threadIdx.x] = 1;
}

__global__ void grid_sync_kernel() { grid_sync(); }

__global__ void empty_kernel() {}

unsigned blocks_for(int n) { return static_cast<unsigned>(n + 255) / 256; }

}  // namespace

void shuffles(int* out) { HESSREG_LAUNCH(shuffles_kernel, 1, 32, 0, nullptr, out); }
void wide_shuffle(const double* x, double* out) {
  HESSREG_LAUNCH(wide_shuffle_kernel, 1, 32, 0, nullptr, x, out);
}
void partial_warps(int* out) { HESSREG_LAUNCH(partial_warps_kernel, 1, 40, 0, nullptr, out); }
void votes_of_rest(int* out) { HESSREG_LAUNCH(votes_of_rest_kernel, 1, 32, 0, nullptr, out); }
void votes_of_block(int* out) { HESSREG_LAUNCH(votes_of_block_kernel, 1, 64, 0, nullptr, out); }
void reductions(const int* x, int* out) {
  HESSREG_LAUNCH(reductions_kernel, 1, 32, 0, nullptr, x, out);
}
void atomics(int* out) { HESSREG_LAUNCH(atomics_kernel, 1, 32, 0, nullptr, out); }

void mma_tf32(const float* a, const float* b, float* c, bool rounded) {
  HESSREG_LAUNCH(mma_tf32_kernel, 1, 32, 0, nullptr, a, b, c, rounded);
}
void mma_bf16(const uint16_t* a, const uint16_t* b, float* c) {
  HESSREG_LAUNCH(mma_bf16_kernel, 1, 32, 0, nullptr, a, b, c);
}

void round_to_tf32(const float* x, float* out, int n) {
  HESSREG_LAUNCH(round_to_tf32_kernel, blocks_for(n), 256, 0, nullptr, x, out, n);
}
void power_of_two(const float* x, float* out, int n) {
  HESSREG_LAUNCH(power_of_two_kernel, blocks_for(n), 256, 0, nullptr, x, out, n);
}
void float_to_half(const float* x, uint16_t* out, int n) {
  HESSREG_LAUNCH(float_to_half_kernel, blocks_for(n), 256, 0, nullptr, x,
                 reinterpret_cast<__half*>(out), n);
}
void half_to_float(const uint16_t* x, float* out, int n) {
  HESSREG_LAUNCH(half_to_float_kernel, blocks_for(n), 256, 0, nullptr,
                 reinterpret_cast<const __half*>(x), out, n);
}
void float_to_bfloat16(const float* x, uint16_t* out, int n) {
  HESSREG_LAUNCH(float_to_bfloat16_kernel, blocks_for(n), 256, 0, nullptr, x,
                 reinterpret_cast<__nv_bfloat16*>(out), n);
}
void bfloat16_to_float(const uint16_t* x, float* out, int n) {
  HESSREG_LAUNCH(bfloat16_to_float_kernel, blocks_for(n), 256, 0, nullptr,
                 reinterpret_cast<const __nv_bfloat16*>(x), out, n);
}

void thread_order(int* next, int* out, int blocks, int threads) {
  HESSREG_LAUNCH(thread_order_kernel, blocks, threads, 0, nullptr, next, out);
}
void initial_shared_memory(float* out) {
  HESSREG_LAUNCH(initial_shared_memory_kernel, 2, 1, 2 * sizeof(float), nullptr, out);
}
void transpose(const float* x, float* out) {
  HESSREG_LAUNCH(transpose_kernel<float>, dim3(1), dim3(32), 0, nullptr, x, out);
}
void transpose_wide(const double* x, double* out) {
  HESSREG_LAUNCH(transpose_kernel<double>, dim3(1), dim3(32), 0, nullptr, x, out);
}
int64_t most_shared_memory() { return max_shared_bytes(); }
void load_vectors(float* out, int stride) {
  HESSREG_LAUNCH(load_vectors_kernel, 1, 32, 0, nullptr, out, stride);
}
void parameter_addresses(uint64_t* out, int threads) {
  HESSREG_LAUNCH(parameter_addresses_kernel, 1, threads, 0, nullptr, LargeParameter{}, out);
}
void write_local(int* x, int index) {
  HESSREG_LAUNCH(write_local_kernel, 1, 1, 0, nullptr, x, index);
}
void calculate_with_integers(int* x, int value) {
  HESSREG_LAUNCH(calculate_with_integers_kernel, 1, 1, 0, nullptr, x, value);
}
void read_unregistered(const float* x, float* out) {
  HESSREG_LAUNCH(read_kernel, 1, 1, 0, nullptr, x, out);
}
void race_on_half_word(uint16_t* x, bool write_last) {
  HESSREG_LAUNCH(race_on_half_word_kernel, 1, 64, 0, nullptr, x, write_last);
}
void race_with_first_warp(int* x) {
  HESSREG_LAUNCH(race_with_first_warp_kernel, 1, 64, 0, nullptr, x);
}
void write_shared(float* out, int index) {
  HESSREG_LAUNCH(write_shared_kernel, 1, 1, 0, nullptr, out, index);
}
void read_constant(float* out, int index) {
  HESSREG_LAUNCH(read_constant_kernel, 1, 1, 0, nullptr, out, index);
}

void diverge_at_barriers() { HESSREG_LAUNCH(diverge_at_barriers_kernel, 1, 32, 0, nullptr); }
void deadlock() { HESSREG_LAUNCH(deadlock_kernel, 1, 32, 0, nullptr); }
void call_outside_mask() { HESSREG_LAUNCH(call_outside_mask_kernel, 1, 32, 0, nullptr); }
#if !defined(__CUDACC__)
void use_too_much_shared_memory() { HESSREG_LAUNCH(large_array_kernel, 1, 32, 0, nullptr); }
#endif
void use_dynamic_shared_memory_of_none() {
  HESSREG_LAUNCH(dynamic_array_kernel, 1, 32, 0, nullptr);
}
void sync_grid_without_cooperative_launch() { HESSREG_LAUNCH(grid_sync_kernel, 1, 32, 0, nullptr); }
void launch(int blocks, int threads, int shared_bytes, bool cooperative) {
  if (cooperative) {
    HESSREG_LAUNCH_COOPERATIVE(empty_kernel, blocks, threads, shared_bytes, nullptr);
  } else {
    HESSREG_LAUNCH(empty_kernel, blocks, threads, shared_bytes, nullptr);
  }
}

}  // namespace hessreg::semantics
