// What a GPU can do at most: multiply-adds and exponentials of all its multiprocessors. Compiled by
// limits.py with nvcc for the device at hand. Both return operations a second, negative on an
// error.
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256, kBlocksEach = 8, kRounds = 4096, kChains = 8, kTries = 5;

template <typename T>
__global__ void multiply_adds_kernel(T* out, T x, T y) {
  T sums[kChains];
  for (int u = 0; u < kChains; ++u) sums[u] = static_cast<T>(threadIdx.x + u);
  for (int i = 0; i < kRounds; ++i)
#pragma unroll
    for (int u = 0; u < kChains; ++u) sums[u] = sums[u] * x + y;
  T total = 0;
  for (int u = 0; u < kChains; ++u) total += sums[u];
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

__global__ void exponentials_kernel(float* out, float x, float) {
  float values[kChains];
  for (int u = 0; u < kChains; ++u) values[u] = x * static_cast<float>(threadIdx.x + u);
  for (int i = 0; i < kRounds; ++i)
#pragma unroll
    for (int u = 0; u < kChains; ++u) asm volatile("ex2.approx.f32 %0, %0;" : "+f"(values[u]));
  float total = 0;
  for (int u = 0; u < kChains; ++u) total += values[u];
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

template <typename T>
double rate(void (*kernel)(T*, T, T), double operations_each) {
  int device = 0, processors = 0;
  T* out = nullptr;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int blocks = processors * kBlocksEach;
  if (cudaMalloc(&out, sizeof(T) * blocks * kThreads) != cudaSuccess) return -1;
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  float best = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    float milliseconds = 0;
    cudaEventRecord(start);
    kernel<<<blocks, kThreads>>>(out, T(0.5), T(0.25));
    cudaEventRecord(stop);
    cudaEventSynchronize(stop);
    cudaEventElapsedTime(&milliseconds, start, stop);
    if (attempt == 0 || milliseconds < best) best = milliseconds;
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  cudaFree(out);
  if (cudaGetLastError() != cudaSuccess || best <= 0) return -1;
  return operations_each * blocks * kThreads * kRounds * kChains / best * 1e3;
}

}  // namespace

extern "C" double multiply_adds_float(int) { return rate<float>(multiply_adds_kernel<float>, 2); }
extern "C" double multiply_adds_double(int) {
  return rate<double>(multiply_adds_kernel<double>, 2);
}
extern "C" double exponentials_float(int) { return rate<float>(exponentials_kernel, 1); }
