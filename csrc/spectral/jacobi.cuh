// Eigenpairs of symmetric matrices of at most kRows rows by one-sided Jacobi rotations.
//
// A is shifted to be positive definite, G = A + c I. Rotations of pairs of columns make the columns
// of G orthogonal: then G = V diag(lambda + c), and V is not needed beside it. In a round every
// column is in one pair, which eight lanes rotate: they read and write its 2 n numbers once and
// exchange three sums. n - 1 rounds of one barrier each are a sweep, in which every pair meets;
// seven to eleven sweeps converge for n from 32 to 128, the last of them without a rotation. Flops
// of a sweep: 7 n^3, of which 3 n^3 are inner products.
#pragma once

#include "krylov.cuh"

namespace hessreg::spectral::cuda {

// Sweeps at most; what has not converged by then is at rounding level all the same.
constexpr int kMaxSweeps = 24;

// Columns are rotated whose cosine is larger than this.
template <typename T>
constexpr T kOrthogonal = 2 * kEpsilon<T>;

// The columns of a block's matrix.
template <typename T>
struct Columns {
  T* g;        // [count, stride], zero beyond n
  int count;   // n, or n + 1 if that is odd
  int length;  // of a column in whole packs for all lanes

  __host__ __device__ static int count_of(int n) { return n + n % 2; }
  __host__ __device__ static int length_of(int n) {
    return static_cast<int>(round_up(n, kLanePacks<T>));
  }
  // A pack more than the length: columns read across then fall into several banks.
  __host__ __device__ static int stride_of(int n) { return length_of(n) + kPack<T>; }
  __host__ __device__ static int64_t elements(int n) { return int64_t{count_of(n)} * stride_of(n); }
  __device__ __forceinline__ int stride() const { return length + kPack<T>; }
  __device__ __forceinline__ T* column(int i) const { return g + int64_t{i} * stride(); }
};

// Two columns that kLanes lanes hold, and their inner products.
template <typename T, int kRows, bool kOnChip>
class Pair {
 public:
  T pp = 0, qq = 0, pq = 0;

  // `exists` is false for lanes that are left over: their products are zero.
  __device__ __forceinline__ Pair(const Columns<T>& columns, int p, int q, bool exists)
      : p_(columns.column(p)), q_(columns.column(q)), length_(exists ? columns.length : 0) {
    for_each_step([&](int step, int offset) {
      load(step, offset);
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e) {
        const T x = a_[step].values[e], y = b_[step].values[e];
        pp += x * x;
        qq += y * y;
        pq += x * y;
      }
    });
    pp = group_sum<kLanes>(pp);
    qq = group_sum<kLanes>(qq);
    pq = group_sum<kLanes>(pq);
  }

  __device__ __forceinline__ bool is_orthogonal() const {
    return !(pq * pq > kOrthogonal<T> * kOrthogonal<T> * (pp * qq));
  }

  // By the smaller angle that makes them orthogonal.
  __device__ __forceinline__ void rotate() {
    const T ratio = (qq - pp) / (2 * pq);
    const T tangent = (ratio < 0 ? T(-1) : T(1)) / (std::abs(ratio) + std::sqrt(1 + ratio * ratio));
    const T c = 1 / std::sqrt(1 + tangent * tangent), s = tangent * c, t = s / (1 + c);
    for_each_step([&](int step, int offset) {
      if constexpr (!kOnChip) load(step, offset);  // registers are needed for the addresses
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e) {
        const T x = a_[step].values[e], y = b_[step].values[e];
        a_[step].values[e] = x - s * (y + t * x);  // c x - s y, and exact if the angle is small
        b_[step].values[e] = y + s * (x - t * y);
      }
      store_pack(p_ + offset, a_[step]);
      store_pack(q_ + offset, b_[step]);
    });
  }

 private:
  // f(step, offset) for the packs of this lane.
  template <typename F>
  __device__ __forceinline__ void for_each_step(F f) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    HESSREG_UNROLL
    for (int step = 0; step < kSteps; ++step)
      if (step * kLanePacks<T> < length_) f(step, step * kLanePacks<T> + lane * kPack<T>);
  }

  __device__ __forceinline__ void load(int step, int offset) {
    a_[step] = load_pack(p_ + offset);
    b_[step] = load_pack(q_ + offset);
  }

  static constexpr int kSteps = kRows / kLanePacks<T>;
  T *p_, *q_;
  int length_;
  Pack<T> a_[kSteps], b_[kSteps];
};

template <typename T, int kRows, bool kOnChip, typename Source>
class Jacobi {
 public:
  static constexpr int kThreads = kRows / 2 * kLanes, kWarps = kThreads / 32;

  __device__ __forceinline__ Jacobi(const Source& source, T* memory)
      : source_(source),
        columns_{memory, Columns<T>::count_of(source.n), Columns<T>::length_of(source.n)} {}

  __device__ __forceinline__ void run(T* values, T* vectors) {
    HESSREG_SHARED(T, found, [kRows]);
    HESSREG_SHARED(T, inverse_norms, [kRows]);
    load();
    make_orthogonal();
    find_values(found, inverse_norms);
    __syncthreads();
    store(found, inverse_norms, values, vectors);
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }

  // G, scaled and shifted.
  __device__ __forceinline__ void load() {
    unsigned largest = 0;
    const int n = source_.n, stride = columns_.stride();
    for (int i = threadIdx.x; i < columns_.count * stride; i += kThreads) {
      const int row = i % stride, column = i / stride;
      const T entry = row < n && column < n ? source_(row, column) : T(0);
      columns_.g[i] = entry;
      largest = max(largest, magnitude(entry));
    }
    scale_ = scale_of_magnitude<T>(reduction_.max(largest));
    for (int i = threadIdx.x; i < columns_.count * stride; i += kThreads)
      columns_.g[i] *= scale_.factor;
    __syncthreads();
    const T bound = norm_bound();
    const T shift = bound > 0 ? T(1.25) * bound : T(1);
    if (static_cast<int>(threadIdx.x) < n) columns_.column(threadIdx.x)[threadIdx.x] += shift;
    __syncthreads();
  }

  // |A^2|_F^(1/2): a bound of the eigenvalues that is closer than |A|_F. Errors of the vectors grow
  // with the shift.
  __device__ __forceinline__ T norm_bound() {
    double sum = 0;
    for (int round = 0; round < columns_.count - 1; ++round) {
      const auto pair = pair_of(round);
      const double pp = pair.pp, qq = pair.qq, pq = pair.pq;
      if (lane() % kLanes == 0) sum += 2 * pq * pq + (round == 0 ? pp * pp + qq * qq : 0);
    }
    return static_cast<T>(std::sqrt(std::sqrt(reduction_.sum(sum))));
  }

  __device__ __forceinline__ void make_orthogonal() {
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      bool rotated = false;
      for (int round = 0; round < columns_.count - 1; ++round) {
        auto pair = pair_of(round);
        if (!pair.is_orthogonal()) {
          pair.rotate();
          rotated = true;
        }
        __syncthreads();
      }
      if (!__syncthreads_or(rotated)) break;
    }
  }

  // The columns of these lanes in a round of a tournament: the last player stays, the others move
  // on by one.
  __device__ __forceinline__ Pair<T, kRows, kOnChip> pair_of(int round) const {
    const int place = static_cast<int>(threadIdx.x) / kLanes, around = columns_.count - 1;
    const bool exists = 2 * place < columns_.count;
    const int first = exists ? place : 0;
    const int p = round + first, q = round - first;
    return {columns_, first == 0 ? around : (p < around ? p : p - around), q < 0 ? q + around : q,
            exists};
  }

  // Rayleigh quotients v' A v: their error is of second order in that of v, where the norms of the
  // columns would have that of the shift. Four columns at a time to a warp.
  __device__ __forceinline__ void find_values(T* found, T* inverse_norms) const {
    constexpr int kAtOnce = 4;
    const int n = source_.n;
    for (int first = warp() * kAtOnce; first < n; first += kWarps * kAtOnce) {
      T products[kAtOnce] = {};
      double squares[kAtOnce] = {};
      add_products(first, products, squares);
      HESSREG_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const double square = group_sum<32>(squares[k]), product = group_sum<32>(products[k]);
        if (lane() > 0 || first + k >= n) continue;
        found[first + k] = static_cast<T>(product / square);
        inverse_norms[first + k] = static_cast<T>(1 / std::sqrt(square));
      }
    }
  }

  template <int kAtOnce>
  __device__ __forceinline__ void add_products(int first, T (&products)[kAtOnce],
                                               double (&squares)[kAtOnce]) const {
    const int n = source_.n;
    const T* columns[kAtOnce];
    HESSREG_UNROLL
    for (int k = 0; k < kAtOnce; ++k) columns[k] = columns_.column(min(first + k, n - 1));
    for (int r = 0; r < n; ++r) {
      T sums[kAtOnce] = {};
      for (int c = lane(); c <= r; c += 32) {
        const T entry = source_(r, c) * scale_.factor * (c < r ? T(2) : T(1));
        HESSREG_UNROLL
        for (int k = 0; k < kAtOnce; ++k) sums[k] += entry * columns[k][c];
      }
      HESSREG_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        products[k] += columns[k][r] * sums[k];
        if (r % 32 == lane()) squares[k] += static_cast<double>(columns[k][r]) * columns[k][r];
      }
    }
  }

  // By ascending value; of equal ones the first comes first.
  __device__ __forceinline__ void store(const T* found, const T* inverse_norms, T* values,
                                        T* vectors) const {
    HESSREG_SHARED(int, order, [kRows]);
    const int n = source_.n, own = static_cast<int>(threadIdx.x);
    const bool is_finite = scale_.factor == scale_.factor;
    if (own < n) {
      int rank = is_finite ? 0 : own;
      for (int i = 0; i < n; ++i)
        rank += found[i] < found[own] || (found[i] == found[own] && i < own);
      order[rank] = own;
      values[rank] = found[own] * scale_.inverse;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n * n; i += kThreads) {
      const int column = order[i % n];
      vectors[i] = columns_.column(column)[i / n] * inverse_norms[column];
    }
  }

  Source source_;
  Columns<T> columns_;
  Scale<T> scale_;
  Reduction<kWarps> reduction_;
};

template <typename T>
__device__ __forceinline__ Lower<T> source_of(const SymmetricEigh& p, int64_t batch) {
  return {static_cast<const T*>(p.a) + batch * p.n * p.n, static_cast<int>(p.n)};
}
template <typename T>
__device__ __forceinline__ Tridiagonal<T> source_of(const TridiagonalEigh& p, int64_t batch) {
  return {static_cast<const T*>(p.alpha) + batch * p.m,
          static_cast<const T*>(p.beta) + batch * (p.m - 1), static_cast<int>(p.m)};
}

// With kOnChip G is in shared memory, else in scratch.
template <typename T, int kRows, bool kOnChip, typename Problem>
__global__ void __launch_bounds__(kRows / 2 * kLanes) eigenpairs_kernel(Problem p, void* scratch) {
  auto source = source_of<T>(p, blockIdx.x);
  const int64_t batch = blockIdx.x, n = source.n;
  T* memory;
  if constexpr (kOnChip) {
    HESSREG_DYNAMIC_SHARED(T, shared);
    memory = shared;
  } else {
    memory = static_cast<T*>(scratch) + batch * Columns<T>::elements(source.n);
  }
  Jacobi<T, kRows, kOnChip, decltype(source)> jacobi(source, memory);
  jacobi.run(static_cast<T*>(p.values) + batch * n, static_cast<T*>(p.vectors) + batch * n * n);
}

}  // namespace hessreg::spectral::cuda
