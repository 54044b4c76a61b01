// Power and Lanczos iterations: one block a matrix, all iterations in one launch.
//
// With the matrix in registers (n <= 128) a product costs each thread kRows / kParts fused
// multiply-adds and, per 16 bytes of its row, one vector load from shared memory; nothing is read
// from global memory after the start. A power iteration has one barrier. A step of Lanczos has six,
// and reads the vectors before it four times from shared memory: 8 n j flops for n^2 of the
// product. A larger matrix is read from the L2 cache (or beyond) once a product, by one
// multiprocessor.
#pragma once

#include "block.cuh"

namespace hessreg::spectral::cuda {

__host__ __device__ constexpr int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}

// Lanes that together hold a vector, a pack each and in turn: 128 contiguous bytes at a time, which
// no two banks of shared memory share and which global memory delivers at once.
constexpr int kLanes = 8;
template <typename T>
constexpr int kLanePacks = kLanes * kPack<T>;

// The length of a vector with the zeros after it.
template <typename Matrix>
__host__ __device__ constexpr int64_t length_of(int64_t n) {
  if constexpr (Matrix::kOnChip) {
    return Matrix::kRows;
  } else {
    return round_up(n, kLanePacks<typename Matrix::Element>);
  }
}

// ---- Power iteration

// The start vector scaled by a power of two, zero beyond n; e_0 in the place of zero. The vector is
// ready after the next barrier.
template <int kThreads, typename T>
__device__ __forceinline__ void load_start(const T* v0, int n, int length, T* x,
                                           Reduction<kThreads / 32>& reduction) {
  unsigned largest = 0;
  for (int r = threadIdx.x; r < n; r += kThreads) largest = max(largest, magnitude(v0[r]));
  largest = reduction.max(largest);
  const T factor = scale_of_magnitude<T>(largest).factor;
  for (int r = threadIdx.x; r < length; r += kThreads) {
    const T value = r < n ? v0[r] * factor : T(0);
    x[r] = largest == 0 && r == 0 ? T(1) : value;
  }
}

// The two vectors of a power iteration: in shared memory beside a matrix on chip, else in scratch.
template <typename Matrix, typename T>
__device__ __forceinline__ T* power_vectors(T* scratch, int length) {
  if constexpr (Matrix::kOnChip) {
    HESSREG_SHARED(Pack<T>, vectors, [2 * Matrix::kRows / kPack<T>]);
    return reinterpret_cast<T*>(vectors);
  } else {
    return scratch + int64_t{blockIdx.x} * 2 * length;
  }
}

// x becomes a multiple of A^k x, with y for scratch. Vectors are normalised by powers of two, and
// only as they are used: nothing waits for a square root. Returns where the result is.
template <typename Matrix, typename T, typename Reduction>
__device__ __forceinline__ T* iterate(Matrix& matrix, int64_t num_iterations, T* x, T* y,
                                      Reduction& reduction) {
  T factor = 1;
  for (int64_t k = 0; k < num_iterations; ++k) {
    unsigned largest = 0;
    matrix.multiply(x, [&](int row, T product) {
      y[row] = product * factor;
      largest = max(largest, magnitude(y[row]));
    });
    largest = reduction.max(largest);
    if (largest == 0) break;  // x is an eigenvector
    factor = scale_of_magnitude<T>(largest).factor;
    T* const next = y;
    y = x;
    x = next;
  }
  return x;
}

template <typename Matrix>
__global__ void __launch_bounds__(Matrix::kThreads, 1)
    power_iteration_kernel(PowerIteration p, void* scratch) {
  using T = typename Matrix::Element;
  constexpr int kThreads = Matrix::kThreads;
  const int n = static_cast<int>(p.n), length = static_cast<int>(length_of<Matrix>(n));
  const int64_t batch = blockIdx.x;
  Reduction<Matrix::kWarps> reduction;
  Matrix matrix(Full<T>{static_cast<const T*>(p.a) + batch * n * n, n}, reduction);
  T* const vectors = power_vectors<Matrix>(static_cast<T*>(scratch), length);
  load_start<kThreads>(static_cast<const T*>(p.v0) + batch * n, n, length, vectors, reduction);
  __syncthreads();
  T* const x = iterate(matrix, p.num_iterations, vectors, vectors + length, reduction);
  T* const y = x == vectors ? vectors + length : vectors;
  double xx = 0, xy = 0, residual = 0;
  matrix.multiply(x, [&](int row, T product) {
    y[row] = product;
    xx += static_cast<double>(x[row]) * x[row];
    xy += static_cast<double>(x[row]) * product;
  });
  xx = n > 0 ? reduction.sum(xx) : 1;
  const double value = reduction.sum(xy) / xx, inverse_norm = 1 / std::sqrt(xx);
  T* const vector = static_cast<T*>(p.vector) + batch * n;
  for (int r = threadIdx.x; r < n; r += kThreads) {
    const double rest = y[r] - value * x[r];
    residual += rest * rest;
    vector[r] = static_cast<T>(x[r] * inverse_norm);
  }
  residual = std::sqrt(reduction.sum(residual) / xx);
  if (threadIdx.x > 0) return;
  static_cast<T*>(p.value)[batch] = static_cast<T>(value) * matrix.scale().inverse;
  static_cast<T*>(p.residual)[batch] = static_cast<T>(residual) * matrix.scale().inverse;
}

// ---- Lanczos

// Where a block keeps its vectors: on chip in shared memory, else in scratch. The stride on chip
// spreads what the kParts threads of a row read over the banks.
template <typename Matrix>
struct Basis {
  using T = typename Matrix::Element;
  static constexpr int kThreads = Matrix::kThreads, kParts = Matrix::kParts;

  T* q;  // [m, stride]: the vectors in rows, zero beyond n
  T* w;  // [length]: what becomes the next one
  T* h;  // [m]: products with w
  int length, stride;

  __host__ __device__ static int64_t stride_of(int64_t n) {
    return length_of<Matrix>(n) + (Matrix::kOnChip ? 128 / sizeof(T) / kParts : 0);
  }
  // Of q alone on chip; of all without.
  __host__ __device__ static int64_t elements(int64_t n, int64_t m) {
    const int64_t q = m * stride_of(n);
    return Matrix::kOnChip ? q : q + length_of<Matrix>(n) + round_up(m, kLanePacks<T>);
  }

  __device__ __forceinline__ Basis(int n, int m, T* scratch)
      : length(static_cast<int>(length_of<Matrix>(n))), stride(static_cast<int>(stride_of(n))) {
    if constexpr (Matrix::kOnChip) {
      HESSREG_SHARED(Pack<T>, w_packs, [Matrix::kRows / kPack<T>]);
      HESSREG_SHARED(T, products, [Matrix::kRows]);
      HESSREG_DYNAMIC_SHARED(T, vectors);
      q = vectors;
      w = reinterpret_cast<T*>(w_packs);
      h = products;
    } else {
      q = scratch + blockIdx.x * elements(n, m);
      w = q + int64_t{m} * stride;
      h = w + length;
    }
  }

  // h[i] = q_i' w for the first `count` vectors, eight lanes each.
  __device__ __forceinline__ void multiply_all(int count) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    constexpr int kAtOnce = 32 / kLanes;
    for (int first = warp * kAtOnce; first < count; first += Matrix::kWarps * kAtOnce) {
      const int i = first + lane / kLanes;
      const T product = group_sum<kLanes>(i < count ? lane_product(i, lane % kLanes) : T(0));
      if (i < count && lane % kLanes == 0) h[i] = product;
    }
  }

  // w -= Q h; returns this thread's share of the squares of w.
  __device__ __forceinline__ double subtract_all(int count) const {
    double squares = 0;
    const int part = static_cast<int>(threadIdx.x) % kParts;
    for (int r = static_cast<int>(threadIdx.x) / kParts; r < length; r += kThreads / kParts) {
      T sum = 0;
      for (int i = part; i < count; i += kParts) sum += q[int64_t{i} * stride + r] * h[i];
      sum = group_sum<kParts>(sum);
      if (part > 0) continue;
      const T rest = w[r] - sum;
      w[r] = rest;
      squares += static_cast<double>(rest) * rest;
    }
    return squares;
  }

  // Makes w orthogonal to the first `count` vectors; returns the norm that is left. To `removed`
  // goes what w had of the last of them.
  template <typename Reduction>
  __device__ __forceinline__ T orthogonalise(int count, Reduction& reduction, T* removed) const {
    *removed = 0;
    double squares = 0;
    for (int pass = 0; pass < 2; ++pass) {
      multiply_all(count);
      __syncthreads();
      if (count > 0) *removed += h[count - 1];
      squares = subtract_all(count);
      if (pass == 0) __syncthreads();
    }
    return static_cast<T>(std::sqrt(reduction.sum(squares)));
  }

  // w becomes the unit vector that the first `count` vectors hold least of, orthogonal to them;
  // returns its norm.
  template <typename Reduction>
  __device__ __forceinline__ T restart(int n, int count, Reduction& reduction) const {
    HESSREG_SHARED(int, least, [1]);
    for (int r = threadIdx.x; r < n; r += kThreads) {
      T sum = 0;
      for (int i = 0; i < count; ++i) {
        const T entry = q[int64_t{i} * stride + r];
        sum += entry * entry;
      }
      w[r] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {  // seldom done: one thread is enough
      least[0] = 0;
      for (int r = 1; r < n; ++r)
        if (w[r] < w[least[0]]) least[0] = r;
    }
    __syncthreads();
    for (int r = threadIdx.x; r < n; r += kThreads) w[r] = r == least[0] ? T(1) : T(0);
    __syncthreads();
    T removed;
    return orthogonalise(count, reduction, &removed);
  }

 private:
  __device__ __forceinline__ T lane_product(int i, int lane) const {
    T sums[kPack<T>] = {};
    const T* const own = q + int64_t{i} * stride;
    for (int k = lane * kPack<T>; k < length; k += kLanePacks<T>) {
      const Pack<T> a = load_pack(own + k), b = load_pack(w + k);
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e) sums[e] += a.values[e] * b.values[e];
    }
    return total<T>(sums);
  }
};

template <typename Matrix>
__global__ void __launch_bounds__(Matrix::kThreads, 1) lanczos_kernel(Lanczos p, void* scratch) {
  using T = typename Matrix::Element;
  constexpr int kThreads = Matrix::kThreads;
  const int n = static_cast<int>(p.n), m = static_cast<int>(p.m);
  const int64_t batch = blockIdx.x;
  Reduction<Matrix::kWarps> reduction;
  Matrix matrix(Full<T>{static_cast<const T*>(p.a) + batch * n * n, n}, reduction);
  const Basis<Matrix> basis(n, m, static_cast<T*>(scratch));
  const T tolerance = kBreakdown<T> * static_cast<T>(std::sqrt(reduction.sum(matrix.squares())));
  load_start<kThreads>(static_cast<const T*>(p.v0) + batch * n, n, basis.length, basis.w,
                       reduction);
  T alpha, norm = basis.orthogonalise(0, reduction, &alpha);
  const T poison = norm * T(0) + tolerance * T(0);  // NaN where the input is not finite
  bool vanished = false;
  for (int j = 0; j < m; ++j) {
    if (vanished) norm = basis.restart(n, j, reduction);
    T* const q = basis.q + int64_t{j} * basis.stride;
    for (int r = threadIdx.x; r < basis.length; r += kThreads) q[r] = basis.w[r] / norm;
    __syncthreads();
    matrix.multiply(q, [&](int row, T product) { basis.w[row] = product; });
    __syncthreads();
    norm = basis.orthogonalise(j + 1, reduction, &alpha);
    vanished = j + 1 == n || !(norm > tolerance);
    if (threadIdx.x > 0) continue;
    static_cast<T*>(p.alpha)[batch * m + j] = alpha * matrix.scale().inverse + poison;
    static_cast<T*>(p.beta)[batch * m + j] =
        (vanished ? T(0) : norm * matrix.scale().inverse) + poison;
  }
  T* const out = static_cast<T*>(p.q) + batch * n * m;
  for (int64_t i = threadIdx.x; i < int64_t{n} * m; i += kThreads)
    out[i] = basis.q[i % m * basis.stride + i / m] + poison;
}

}  // namespace hessreg::spectral::cuda
