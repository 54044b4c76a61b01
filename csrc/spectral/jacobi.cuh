// Eigenpairs of symmetric matrices of at most kRows rows by one-sided Jacobi rotations.
//
// A is shifted to be positive definite, G = A + c I. Rotations of pairs of columns make the columns
// of G orthogonal: then G = V diag(lambda + c), and V is not needed beside it. In a round every
// column is in one pair, which eight lanes rotate: they read and write 4 n numbers, once each, and
// exchange three sums. n - 1 rounds of one barrier each are a sweep, in which every pair met; six
// to ten sweeps converge, quadratically at the end. Flops of a sweep: 6 n^3 with the inner
// products.
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

template <typename T, int kRows, typename Source>
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

  // G, scaled; the shift is a little more than the largest sum of a column bounds eigenvalues by.
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
    T sum = 0;
    if (static_cast<int>(threadIdx.x) < n)
      for (int r = 0; r < n; ++r) sum += abs(columns_.column(threadIdx.x)[r]);
    const T bound = of_magnitude<T>(reduction_.max(magnitude(sum)));
    const T shift = bound > 0 ? T(1.25) * bound : T(1);
    if (static_cast<int>(threadIdx.x) < n) columns_.column(threadIdx.x)[threadIdx.x] += shift;
    __syncthreads();
  }

  // Rounds as of a tournament: one player stays, the others move on by one.
  __device__ __forceinline__ void make_orthogonal() {
    const int place = static_cast<int>(threadIdx.x) / kLanes, around = columns_.count - 1;
    const bool is_pair = 2 * place < columns_.count;
    const int pair = is_pair ? place : 0;
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      bool rotated = false;
      for (int round = 0; round < around; ++round) {
        const int p = pair == 0 ? around : (round + pair) % around;
        const int q = (round + around - pair) % around;
        rotated |= rotate(columns_.column(p), columns_.column(q), is_pair);
        __syncthreads();
      }
      if (!__syncthreads_or(rotated)) break;
    }
  }

  // Makes two columns orthogonal; false if they were.
  __device__ __forceinline__ bool rotate(T* p, T* q, bool is_pair) {
    constexpr int kSteps = kRows / kLanePacks<T>;
    Pack<T> a[kSteps], b[kSteps];
    T aa = 0, bb = 0, ab = 0;
    for_each_step(is_pair, [&](int step, int offset) {
      a[step] = load_pack(p + offset);
      b[step] = load_pack(q + offset);
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e) {
        aa += a[step].values[e] * a[step].values[e];
        bb += b[step].values[e] * b[step].values[e];
        ab += a[step].values[e] * b[step].values[e];
      }
    });
    aa = group_sum<kLanes>(aa);
    bb = group_sum<kLanes>(bb);
    ab = group_sum<kLanes>(ab);
    if (!(ab * ab > kOrthogonal<T> * kOrthogonal<T> * (aa * bb))) return false;
    const T ratio = (bb - aa) / (2 * ab);
    const T tangent = (ratio < 0 ? T(-1) : T(1)) / (abs(ratio) + sqrt(1 + ratio * ratio));
    const T c = 1 / sqrt(1 + tangent * tangent), s = tangent * c;
    for_each_step(true, [&](int step, int offset) {
      Pack<T> x, y;
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e) {
        x.values[e] = c * a[step].values[e] - s * b[step].values[e];
        y.values[e] = s * a[step].values[e] + c * b[step].values[e];
      }
      store_pack(p + offset, x);
      store_pack(q + offset, y);
    });
    return true;
  }

  // f(step, offset) for the packs of a column that a lane holds.
  template <typename F>
  __device__ __forceinline__ void for_each_step(bool is_pair, F f) const {
    HESSREG_UNROLL
    for (int step = 0; step < kRows / kLanePacks<T>; ++step)
      if (is_pair && step * kLanePacks<T> < columns_.length)
        f(step, step * kLanePacks<T> + lane() % kLanes * kPack<T>);
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
        inverse_norms[first + k] = static_cast<T>(1 / sqrt(square));
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
  HESSREG_DYNAMIC_SHARED(T, shared);
  auto source = source_of<T>(p, blockIdx.x);
  const int64_t batch = blockIdx.x, n = source.n;
  T* memory = shared;
  if constexpr (!kOnChip) memory = static_cast<T*>(scratch) + batch * Columns<T>::elements(n);
  Jacobi<T, kRows, decltype(source)> jacobi(source, memory);
  jacobi.run(static_cast<T*>(p.values) + batch * n, static_cast<T*>(p.vectors) + batch * n * n);
}

}  // namespace hessreg::spectral::cuda
