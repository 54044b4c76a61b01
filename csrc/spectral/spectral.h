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

// A Q = Q T + r e_m' with T tridiagonal; each new vector is orthogonalised against all before it:
// twice, or once after the recurrence with the last two. Where its norm is within rounding error of
// zero (breakdown_tolerance), beta is zero and the iteration goes on with the unit vector e_j that
// Q holds least of (the first of several), likewise orthogonalised. A v0 of zero is such a case
// too.
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

// One step of Lanczos with vectors that fill no cache: w is made orthogonal to the first `count`
// rows of the basis, count > 0, and, normalised, becomes the next; that row is zero where no more
// than rounding error is left of w.
struct LanczosStep {
  void* basis;            // [more than count, n]
  const void* w;          // [n]
  const double* largest;  // [1]: the longest product so far
  double* result;         // [count + 3]: the coefficients on the rows, what is left of w,
                          // 1 where that row is zero, and the longest product with this one
  int64_t count, n;
  double breakdown;  // what counts as rounding error, relative to the longest product
  Element element;
};

// Whether what was orthogonalised once has to be once more: some of the rows are left in it.
HESSREG_HD bool needs_another_pass(const LanczosStep& step, double squares, double left) {
  const double epsilon = step.element == Element::kFloat64 ? 0x1p-52 : 0x1p-23;
  return squares > 64 * epsilon * epsilon * left;
}

// Fills in the rest of the result; what a row is to be multiplied by to become a unit vector.
HESSREG_HD double finish(const LanczosStep& step, double left) {
  double squares = left;
  for (int64_t i = 0; i < step.count; ++i) squares += step.result[i] * step.result[i];
  const double residual = std::sqrt(left), product = std::sqrt(squares);
  const double largest =
      product > step.largest[0] || product != product ? product : step.largest[0];
  const bool vanishes = !(residual > step.breakdown * largest);
  step.result[step.count] = residual;
  step.result[step.count + 1] = vanishes;
  step.result[step.count + 2] = largest;
  return vanishes ? 0 : 1 / residual;
}

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
template <typename T>
struct BitsOf {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};
template <typename T>
HESSREG_HD Scale<T> scale_of(T largest) {
  using Bits = typename BitsOf<T>::type;
  constexpr int kMantissa = sizeof(T) == sizeof(double) ? 52 : 23;
  constexpr Bits kNotFinite = sizeof(T) == sizeof(double) ? 0x7ff : 0xff;  // as an exponent
  Bits bits;
  std::memcpy(&bits, &largest, sizeof bits);
  const Bits found = bits >> kMantissa & kNotFinite;
  const Bits exponent = found < 1 ? 1 : found > kNotFinite - 2 ? kNotFinite - 2 : found;
  Bits factor = (kNotFinite - 1 - exponent) << kMantissa, inverse = exponent << kMantissa;
  if (found == kNotFinite) factor = inverse = kNotFinite << kMantissa | Bits(1) << (kMantissa - 1);
  Scale<T> scale;
  std::memcpy(&scale.factor, &factor, sizeof factor);
  std::memcpy(&scale.inverse, &inverse, sizeof inverse);
  return scale;
}

}  // namespace hessreg::spectral
