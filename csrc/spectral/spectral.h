#pragma once
// What every spectral kernel shares: the problems, and what counts as zero in them. No torch, no
// CUDA runtime.
#include "../common/element.h"

namespace hessreg::spectral {

// All arrays are contiguous and of one element type, float32 or float64. A matrix or start vector
// with an entry that is not finite makes all results of that matrix NaN, and of no other.

// v <- A v / |A v|, so many times, from v0 / |v0|. Where A v is zero, v is an eigenvector and
// stays; a v0 of zero stands for e_0.
struct PowerIteration {
  const void* a;   // [batch, n, n]
  const void* v0;  // [batch, n]
  void* value;     // [batch]: v' A v
  void* vector;    // [batch, n]: v
  void* residual;  // [batch]: |A v - (v' A v) v|
  int64_t batch, n, num_iterations;
  Element element;
};

// A Q = Q T + r e_m' with T tridiagonal; each new vector is orthogonalised twice against all before
// it. Where its norm is within rounding error of zero (breakdown_tolerance), beta is zero and the
// iteration goes on with the unit vector e_j that Q holds least of (the first of several), likewise
// orthogonalised. A v0 of zero is such a case too.
struct Lanczos {
  const void* a;   // [batch, n, n]
  const void* v0;  // [batch, n]
  void* alpha;     // [batch, m]: the diagonal of T
  void* beta;      // [batch, m]: the off-diagonal, and |r| last
  void* q;         // [batch, n, m]
  int64_t batch, n, m;
  Element element;
};

// The eigenpairs of tridiagonal matrices, values ascending.
struct TridiagonalEigh {
  const void* alpha;  // [batch, m]
  const void* beta;   // [batch, m - 1]
  void* values;       // [batch, m]
  void* vectors;      // [batch, m, m], in columns
  int64_t batch, m;
  Element element;
};

// The eigenpairs of symmetric matrices, of which only the lower triangle is read, values ascending.
struct SymmetricEigh {
  const void* a;  // [batch, n, n]
  void* values;   // [batch, n]
  void* vectors;  // [batch, n, n], in columns; null: values only
  int64_t batch, n;
  Element element;
};

template <typename T>
constexpr T kEpsilon = sizeof(T) == sizeof(double) ? T(0x1p-52) : T(0x1p-23);
template <typename T>
constexpr T kSmallestNormal = sizeof(T) == sizeof(double) ? T(0x1p-1022) : T(0x1p-126);

// A sum of squares below this has lost digits to underflow: what is summed counts as zero.
template <typename T>
constexpr T kSmallestSquare = kSmallestNormal<T> / kEpsilon<T>;

// What Lanczos takes for zero, relative to the Frobenius norm of the matrix.
template <typename T>
constexpr T kBreakdown = 64 * kEpsilon<T>;

// The power of two that brings `largest`, the largest magnitude of a matrix, into [1, 2), so that
// squares neither overflow nor vanish, and its inverse. Both are normal numbers; both are NaN where
// `largest` is not finite.
template <typename T>
struct Scale {
  T factor, inverse;
};
HESSREG_HD Scale<float> scale_of(float largest) {
  uint32_t bits;
  std::memcpy(&bits, &largest, sizeof bits);
  uint32_t exponent = bits >> 23 & 0xffu;
  Scale<float> scale;
  if (exponent == 0xffu) {
    const uint32_t nan = 0x7fc00000u;
    std::memcpy(&scale.factor, &nan, sizeof nan);
    scale.inverse = scale.factor;
    return scale;
  }
  exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  const uint32_t factor = (254 - exponent) << 23, inverse = exponent << 23;
  std::memcpy(&scale.factor, &factor, sizeof factor);
  std::memcpy(&scale.inverse, &inverse, sizeof inverse);
  return scale;
}
HESSREG_HD Scale<double> scale_of(double largest) {
  uint64_t bits;
  std::memcpy(&bits, &largest, sizeof bits);
  uint64_t exponent = bits >> 52 & 0x7ffu;
  Scale<double> scale;
  if (exponent == 0x7ffu) {
    const uint64_t nan = 0x7ff8000000000000u;
    std::memcpy(&scale.factor, &nan, sizeof nan);
    scale.inverse = scale.factor;
    return scale;
  }
  exponent = exponent < 1 ? 1 : exponent > 2045 ? 2045 : exponent;
  const uint64_t factor = (2046 - exponent) << 52, inverse = exponent << 52;
  std::memcpy(&scale.factor, &factor, sizeof factor);
  std::memcpy(&scale.inverse, &inverse, sizeof inverse);
  return scale;
}

}  // namespace hessreg::spectral
