// What a block shares: sums and maxima in a fixed order, powers of two, vector loads, and a
// symmetric matrix held in registers or streamed from memory.
#pragma once

#include "../common/cuda_compat.cuh"
#include "spectral.h"

namespace hessreg::spectral::cuda {

// Sixteen bytes of elements, moved by one instruction.
template <typename T>
constexpr int kPack = 16 / sizeof(T);
template <typename T>
struct alignas(16) Pack {
  T values[kPack<T>];
};

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(p);
}

template <typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(p) = pack;
}

// ---- Magnitudes

// The upper 32 bits of |x|: they grow with it and hold its exponent, and a warp finds the largest
// in one instruction.
__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ unsigned magnitude(double x) {
  return static_cast<unsigned>(__double_as_longlong(x) >> 32) & 0x7fffffffu;
}

// The smallest number of this magnitude.
template <typename T>
__device__ __forceinline__ T of_magnitude(unsigned magnitude) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return __uint_as_float(magnitude);
  } else {
    return __longlong_as_double(static_cast<long long>(magnitude) << 32);
  }
}

// The power of two that brings what has this magnitude into [1, 2); NaN where it is not finite.
template <typename T>
__device__ __forceinline__ Scale<T> scale_of_magnitude(unsigned magnitude) {
  return scale_of(of_magnitude<T>(magnitude));
}

// ---- Reductions

// Sums and maxima over a block of kWarps warps, the same bits in every thread. One barrier each:
// consecutive calls alternate between two sets of slots, so that a set is written again only after
// the barrier of the call between.
template <int kWarps>
class Reduction {
 public:
  __device__ __forceinline__ double sum(double value) {
    HESSREG_SHARED(double, sums, [2][kWarps]);
    HESSREG_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return combine(sums, value, [](double a, double b) { return a + b; });
  }

  __device__ __forceinline__ unsigned max(unsigned value) {
    HESSREG_SHARED(unsigned, maxima, [2][kWarps]);
    value = __reduce_max_sync(~0u, value);
    return combine(maxima, value, [](unsigned a, unsigned b) { return a < b ? b : a; });
  }

 private:
  template <typename V, typename Combine>
  __device__ __forceinline__ V combine(V (&slots)[2][kWarps], V value, Combine combine) {
    set_ ^= 1;
    if (threadIdx.x % 32 == 0) slots[set_][threadIdx.x / 32] = value;
    __syncthreads();
    V result = slots[set_][0];
    HESSREG_UNROLL
    for (int warp = 1; warp < kWarps; ++warp) result = combine(result, slots[set_][warp]);
    return result;
  }

  int set_ = 0;
};

// The sum over groups of kLanes neighbouring lanes, in each of them.
template <int kLanes, typename T>
__device__ __forceinline__ T group_sum(T value) {
  HESSREG_UNROLL
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

template <typename T>
__device__ __forceinline__ T total(const T (&sums)[kPack<T>]) {
  T sum = sums[0] + sums[1];
  if constexpr (kPack<T> == 4) sum += sums[2] + sums[3];
  return sum;
}

// ---- Where entries come from

// A whole matrix.
template <typename T>
struct Full {
  const T* a;  // [n, n]
  int n;
  __device__ __forceinline__ T operator()(int row, int column) const {
    return a[int64_t{row} * n + column];
  }
};

// The lower triangle of a matrix.
template <typename T>
struct Lower {
  const T* a;  // [n, n]
  int n;
  __device__ __forceinline__ T operator()(int row, int column) const {
    return a[int64_t{max(row, column)} * n + min(row, column)];
  }
};

// A tridiagonal matrix.
template <typename T>
struct Tridiagonal {
  const T* alpha;  // [n]
  const T* beta;   // [n - 1]
  int n;
  __device__ __forceinline__ T operator()(int row, int column) const {
    if (row == column) return alpha[row];
    return std::abs(row - column) == 1 ? beta[min(row, column)] : T(0);
  }
};

// ---- Matrices

// A matrix of at most kRows rows in the registers of kRows * kParts threads. The kParts
// neighbouring threads of a row have its packs of columns in turn, so that together they read a
// vector in shared memory without bank conflicts.
template <typename T, int kRows_, int kParts_>
class RegisterMatrix {
 public:
  using Element = T;
  static constexpr bool kOnChip = true;
  static constexpr int kRows = kRows_, kParts = kParts_;
  static constexpr int kThreads = kRows * kParts, kWarps = kThreads / 32;
  static constexpr int kPacks = kRows / kParts / kPack<T>;

  template <typename Source>
  __device__ __forceinline__ RegisterMatrix(const Source& source, Reduction<kWarps>& reduction) {
    unsigned largest = 0;
    for_each_entry([&](int column, T& entry) {
      const bool inside = row() < source.n && column < source.n;
      entry = inside ? source(row(), column) : T(0);
      largest = max(largest, magnitude(entry));
    });
    scale_ = scale_of_magnitude<T>(reduction.max(largest));
    for_each_entry([&](int, T& entry) { entry *= scale_.factor; });
  }

  __device__ __forceinline__ static int row() { return static_cast<int>(threadIdx.x) / kParts; }
  __device__ __forceinline__ static int part() { return static_cast<int>(threadIdx.x) % kParts; }
  __device__ __forceinline__ static int first_column(int pack) {
    return (pack * kParts + part()) * kPack<T>;
  }

  __device__ __forceinline__ const Scale<T>& scale() const { return scale_; }

  // f(column, entry) for the entries of this thread.
  template <typename F>
  __device__ __forceinline__ void for_each_entry(F f) {
    HESSREG_UNROLL
    for (int p = 0; p < kPacks; ++p) {
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e) f(first_column(p) + e, entries_[p][e]);
    }
  }

  // f(column, entries, pack of v) for the packs that hold columns from `begin` on.
  template <typename F>
  __device__ __forceinline__ void for_each_pack(int begin, F f) {
    HESSREG_UNROLL
    for (int p = 0; p < kPacks; ++p)
      if ((p + 1) * kParts * kPack<T> > begin) f(first_column(p), entries_[p]);
  }

  // This thread's row times v[kRows] from column `begin` on, in all threads of the row.
  __device__ __forceinline__ T row_product(const T* v, int begin) {
    T sums[kPack<T>] = {};
    for_each_pack(begin, [&](int column, const T(&entries)[kPack<T>]) {
      const Pack<T> x = load_pack(v + column);
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e) sums[e] += entries[e] * x.values[e];
    });
    return group_sum<kParts>(total<T>(sums));
  }

  // This thread's share of the sum of squares.
  __device__ __forceinline__ double squares() {
    T sum = 0;
    for_each_entry([&](int, T& entry) { sum += entry * entry; });
    return sum;
  }

  // take(row, product) in one thread of each row of the product with v.
  template <typename Take>
  __device__ __forceinline__ void multiply(const T* v, Take take) {
    const T product = row_product(v, 0);
    if (part() == 0) take(row(), product);
  }

 private:
  T entries_[kPacks][kPack<T>];
  Scale<T> scale_;
};

// A matrix of any size, read from memory (mostly the L2 cache) for each product: four rows at a
// time to a warp, so that it has enough loads under way and reads v once for all of them.
template <typename T>
class StreamedMatrix {
 public:
  using Element = T;
  static constexpr bool kOnChip = false;
  static constexpr int kParts = 1;
  static constexpr int kThreads = 512, kWarps = kThreads / 32, kRowsAtOnce = 4;

  __device__ __forceinline__ StreamedMatrix(const Full<T>& source, Reduction<kWarps>& reduction)
      : a_(source.a), n_(source.n) {
    unsigned largest = 0;
    for_each_entry([&](T entry) { largest = max(largest, magnitude(entry)); });
    scale_ = scale_of_magnitude<T>(reduction.max(largest));
  }

  __device__ __forceinline__ const Scale<T>& scale() const { return scale_; }

  __device__ __forceinline__ double squares() const {
    T sum = 0;
    for_each_entry([&](T entry) { sum += entry * scale_.factor * (entry * scale_.factor); });
    return sum;
  }

  template <typename Take>
  __device__ __forceinline__ void multiply(const T* v, Take take) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int row = warp * kRowsAtOnce; row < n_; row += kWarps * kRowsAtOnce) {
      T sums[kRowsAtOnce] = {};
      add_products(v, row, lane, sums);
      HESSREG_UNROLL
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const T product = group_sum<32>(sums[r]);
        if (lane == 0 && row + r < n_) take(row + r, product);
      }
    }
  }

 private:
  __device__ __forceinline__ void add_products(const T* v, int row, int lane,
                                               T (&sums)[kRowsAtOnce]) const {
    for (int column = lane; column < n_; column += 32) {
      const T x = v[column];
      HESSREG_UNROLL
      for (int r = 0; r < kRowsAtOnce; ++r)  // a row beyond the last: the last again
        sums[r] += a_[int64_t{min(row + r, n_ - 1)} * n_ + column] * scale_.factor * x;
    }
  }

  template <typename F>
  __device__ __forceinline__ void for_each_entry(F f) const {
    for (int64_t i = threadIdx.x; i < int64_t{n_} * n_; i += kThreads) f(a_[i]);
  }

  const T* a_;
  int n_;
  Scale<T> scale_;
};

}  // namespace hessreg::spectral::cuda
