#pragma once
// Element types of the kernels and what they are computed in. No torch, no CUDA runtime.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// Always inlined on the host too: a copy left out of line in an AVX-512 object could be linked into
// the baseline path.
#ifdef __CUDACC__
#define HESSREG_HD __host__ __device__ __forceinline__
#else
#define HESSREG_HD __attribute__((always_inline)) inline
#endif

namespace hessreg {

enum class Element : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// A double as the sum of two values of type T (the second is zero where one is enough): one
// float32 coefficient alone would leave a residual of 1e-5 where 1e-8 is attainable.
template <typename T>
struct Split {
  T high, low;
  HESSREG_HD explicit Split(double value)
      : high(static_cast<T>(value)), low(static_cast<T>(value - static_cast<double>(high))) {
    if (!std::isfinite(high)) low = T(0);
  }
};

}  // namespace hessreg
