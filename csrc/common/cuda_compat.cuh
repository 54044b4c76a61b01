// The one header a kernel file includes. Under nvcc it is CUDA itself and holds all inline PTX of
// the project; under a host compiler it is the test emulator in tests/cuda_emulator, which runs the
// same kernels on a machine without a GPU. Both sides offer the same names:
//
//   HESSREG_SHARED(float, tile, [32][33]);    a static shared array
//   HESSREG_DYNAMIC_SHARED(float, buffer);    float* to the launch's dynamic shared memory
//   HESSREG_UNROLL for (...)                  #pragma unroll
//   HESSREG_LAUNCH((kernel<a, b>), grid, block, shared_bytes, stream, arguments...);
//   HESSREG_LAUNCH_COOPERATIVE(...);          the same, for kernels that call grid_sync()
//
// A large by-value parameter is declared `const Params __grid_constant__ params`, in this order.
#pragma once

#if defined(__CUDACC__)

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#define HESSREG_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define HESSREG_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char hessreg_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(hessreg_dynamic_shared)
#define HESSREG_UNROLL _Pragma("unroll")

namespace hessreg {

using cuda_stream = cudaStream_t;

struct LaunchShape {
  const char* kernel_name;
  dim3 grid, block;
  size_t shared_bytes;
  cuda_stream stream;
  bool cooperative;
};

inline void check_launch(cudaError_t status, const LaunchShape& shape) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is ours to report: leave none behind for the next caller's check
  throw std::runtime_error("CUDA launch of " + std::string(shape.kernel_name) +
                           " failed: " + cudaGetErrorString(status));
}

// Calls through HESSREG_LAUNCH. The arguments are converted to the kernel's parameter types.
template <typename... Params, typename... Args>
void launch(const LaunchShape& shape, void (*kernel)(Params...), Args&&... args) {
  constexpr size_t kDefaultSharedLimit = 48 * 1024;
  if (shape.shared_bytes > kDefaultSharedLimit) {
    check_launch(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shape.shared_bytes)),
                 shape);
  }
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = shape.cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  check_launch(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), shape);
}

// How much dynamic shared memory a block may have on the current device.
inline int64_t max_shared_bytes() {
  int device = 0, bytes = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("the CUDA device does not tell its shared memory: ") +
                             cudaGetErrorString(status));
  return bytes;
}

// Waits for every thread of the grid; the launch must be cooperative.
__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }

// 2^x with a relative error of at most 2^-22; subnormals are flushed to zero.
__device__ inline float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x rounded to TF32 (10 mantissa bits, ties away from zero), as the register mma.sync takes.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// d = a b + c for a[16, 8] and b[8, 8] spread over the warp. With g = lane / 4 and t = lane % 4:
//   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b: (t, g), (t + 4, g)
//   c, d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// d = a b + c for a[16, 16] and b[16, 8] in bfloat16, two neighbours along k to a register, the
// lower one in the lower half:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   b: (2t, g), (2t + 8, g)
//   c, d: as for TF32
__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// Starts a copy of 16 bytes, both addresses 16-byte aligned. It has landed, for this thread only,
// once cp_async_wait has returned; a barrier shows it to the others.
__device__ inline void cp_async16(void* shared, const void* global) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
}

// The same for one element of 4 or 8 bytes, aligned to its size: on the way, a matrix can be
// transposed.
template <typename T>
__device__ inline void cp_async(T* shared, const T* global) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global),
               "n"(sizeof(T))
               : "memory");
}

// Closes the group of the copies started since the last commit.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the latest groups are under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace hessreg

#else

#include "cuda_emulator.hpp"

#endif

#define HESSREG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  HESSREG_LAUNCH_AS(false, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
#define HESSREG_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  HESSREG_LAUNCH_AS(true, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
#define HESSREG_LAUNCH_AS(cooperative, kernel, grid, block, shared_bytes, stream, ...)        \
  ::hessreg::launch(                                                                          \
      ::hessreg::LaunchShape{#kernel, grid, block, static_cast<size_t>(shared_bytes), stream, \
                             cooperative},                                                    \
      kernel __VA_OPT__(, ) __VA_ARGS__)
