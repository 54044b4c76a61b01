#pragma once
// What the kernels of spectral_cpu.cpp share: vector functions they alone need.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../common/cpu_memory.h"
#include "../common/simd.h"
#include "spectral_cpu.h"

namespace hessreg::spectral::HESSREG_ISA {
namespace {

// Memory of later use, brought into the second level of the caches a part at a time.
class Ahead {
 public:
  HESSREG_HD Ahead(const void* begin, const void* end, int64_t parts)
      : here_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)) {
    step_ = (end_ - here_) / (parts > 0 ? parts : 1) + 1;
  }
  HESSREG_HD void fetch_part() {
    const char* const until = end_ - here_ < step_ ? end_ : here_ + step_;
    for (; here_ < until; here_ += kLine) __builtin_prefetch(here_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *here_, *end_;
  int64_t step_;
};

template <typename T>
HESSREG_HD Vector<T> magnitude(Vector<T> x) {
  using Bits = Signs<T>;
  const Bits all = ~Bits{};
  if constexpr (sizeof(T) == 8) return (Vector<T>)((Bits)x & (all ^ (Bits{} + INT64_MIN)));
  return (Vector<T>)((Bits)x & (all ^ (Bits{} + INT32_MIN)));
}

// The larger of bits of magnitudes, and that of x: infinity and NaN come after all numbers.
template <typename T>
HESSREG_HD Signs<T> larger(Signs<T> most, Vector<T> x) {
  const Signs<T> bits = (Signs<T>)magnitude<T>(x);
  return bits > most ? bits : most;
}

HESSREG_HD float scalar_root(float x) { return __builtin_sqrtf(x); }
HESSREG_HD double scalar_root(double x) { return __builtin_sqrt(x); }

template <typename T>
HESSREG_HD Vector<T> square_root(Vector<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_maskz_sqrt_pd(-1, (__m512d)x);
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_maskz_sqrt_ps(-1, (__m512)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm256_sqrt_pd((__m256d)x);
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm_sqrt_pd((__m128d)x);
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm_sqrt_ps((__m128)x);
#else
  for (int lane = 0; lane < kLanes<T>; ++lane) x[lane] = scalar_root(x[lane]);
  return x;
#endif
}

// From 14 bits, which each of Newton's steps doubles: a third of the time of root and division.
template <typename T>
HESSREG_HD Vector<T> inverse_square_root(Vector<T> x) {
#if defined(__AVX512F__)
  Vector<T> y;
  if constexpr (sizeof(T) == 8)
    y = (Vector<T>)_mm512_maskz_rsqrt14_pd(-1, (__m512d)x);
  else
    y = (Vector<T>)_mm512_maskz_rsqrt14_ps(-1, (__m512)x);
  for (int k = 0; k < static_cast<int>(sizeof(T)) / 4; ++k) {
    const Vector<T> rest = 1 - (x * y) * y;
    y += y * T(0.5) * rest;
  }
  return y;
#else
  return 1 / square_root<T>(x);
#endif
}

// Which lanes change places: those whose numbers differ by step. (Filled in a loop, GCC 12 would
// make the numbers anew at every use.)
template <int... Lane>
struct LaneNumbers {
  template <typename T, int kStep>
  HESSREG_HD static Signs<T> partners() {
    return Signs<T>{(Lane ^ kStep)...};
  }
};

// The lane that `larger` takes for the largest.
template <typename T, int kStep = kLanes<T> / 2>
HESSREG_HD T largest_lane(Vector<T> x) {
  if constexpr (kStep == 0) {
    return x[0];
  } else {
    using Numbers = LaneNumbers<__integer_pack(kLanes<T>)...>;
    const Vector<T> other = __builtin_shuffle(x, Numbers::template partners<T, kStep>());
    return largest_lane<T, kStep / 2>((Vector<T>)larger<T>((Signs<T>)x, other));
  }
}

// The sum of the lanes, pairwise, in each of them.
template <typename T, int kStep = kLanes<T> / 2>
HESSREG_HD Vector<T> sum_everywhere(Vector<T> x) {
  if constexpr (kStep == 0) {
    return x;
  } else {
    using Numbers = LaneNumbers<__integer_pack(kLanes<T>)...>;
    x += __builtin_shuffle(x, Numbers::template partners<T, kStep>());
    return sum_everywhere<T, kStep / 2>(x);
  }
}

template <typename T>
HESSREG_HD T sum_pairwise(Vector<T> x) {
  return sum_everywhere<T>(x)[0];
}

}  // namespace
}  // namespace hessreg::spectral::HESSREG_ISA
