#pragma once
// What every Gaussian kernel (the function) and every kernel (the program) here shares: the sums
// over pairs of points that are taken, and how one pair enters them. No torch, no CUDA runtime.
//
// Everywhere s_ij = |x_i - y_j|^2 and phi(s) = sum_c coefficient_c exp(-gamma_c s). All arrays are
// contiguous; mixtures are always float64.
#include "../common/element.h"

namespace hessreg::gaussian {

struct Mixture {
  const double* gamma;        // [batch, count]
  const double* coefficient;  // [batch, count], or null: 1 / count each
  int64_t count;
};

// out[b, i, j] = phi(s_ij)
struct Matrix {
  const void* x;  // [batch, n, d]
  const void* y;  // [batch, m, d]
  Mixture mixture;
  void* out;  // [batch, n, m]
  int64_t batch, n, m, d;
  Element element;
};

// q_ij = <left_i, right_j>
struct Factor {
  const void* left;   // [batch, n, rank]
  const void* right;  // [batch, m, rank]
  int64_t rank;
};

// out[b, i, :] = sum_j phi(s_ij) q^1_ij q^2_ij ... v[b, j, :]. Its derivatives in every argument
// are sums of this form, with one factor more for each derivative in a point.
struct Sum {
  const void* x;  // [batch, n, d]
  const void* y;  // [batch, m, d]
  Mixture mixture;
  const Factor* factors;
  int64_t num_factors;
  const void* v;  // [batch, m, e]
  void* out;      // [batch, n, e]
  int64_t batch, n, m, d, e;
  Element element;
};

// value[b] = sum_{i != j} w_ij phi(s_ij) over the ordered pairs of points z, and its gradient. The
// weight w_ij depends on whether i and j are among the first points or the rest.
struct Energy {
  const void* z;  // [batch, count, d]
  Mixture mixture;
  int64_t batch, first, count, d;
  double within_first, across, within_rest;
  double* value;   // [batch]
  void* gradient;  // [batch, count, d] in float32, or in float64 for float64 z; null: value only
  Element element;

  HESSREG_HD double weight(int64_t i, int64_t j) const {
    return (i < first) != (j < first) ? across : i < first ? within_first : within_rest;
  }
};

template <typename C>
constexpr C kLeast = std::numeric_limits<C>::min();  // that is normal
template <typename C>
constexpr C kMost = std::numeric_limits<C>::max();

// A number within the normal range of C: times an infinite s, or times 0, it is no NaN.
template <typename C>
HESSREG_HD C within_range(double value) {
  return value < kLeast<C> ? kLeast<C> : value > kMost<C> ? kMost<C> : static_cast<C>(value);
}

// A coefficient as a finite number of C: what is multiplied by it may be 0.
template <typename C>
HESSREG_HD C finite(double value) {
  return value > kMost<C> ? kMost<C> : value < -kMost<C> ? -kMost<C> : static_cast<C>(value);
}

// exp(-gamma s) is taken as 2^(-scale s).
template <typename C>
HESSREG_HD C scale_of(double gamma) {
  return within_range<C>(1.4426950408889634 * gamma);
}

HESSREG_HD double coefficient_of(const Mixture& mixture, int64_t batch, int64_t component) {
  if (!mixture.coefficient) return 1.0 / static_cast<double>(mixture.count);
  return mixture.coefficient[batch * mixture.count + component];
}

// |x - y|^2 from |x|^2 + |y|^2 - 2 <x, y> has lost digits below this share of |x|^2 + |y|^2: it is
// then taken again from the differences.
constexpr float kCancelled = 0.125f;

}  // namespace hessreg::gaussian
