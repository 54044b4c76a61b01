// All eigenvalues of a symmetric matrix of at most kRows rows: Householder tridiagonalisation in
// registers, then bisection with one eigenvalue to every four threads.
//
// Per column of the tridiagonalisation: two barriers, and per thread at most kRows / 4
// multiply-adds for the product and as many three times for the update of rank two; whole packs of
// columns and whole warps of rows that are done are left out. Bisection: n divisions in a chain a
// round, for 2.3 bits each; no barrier.
#pragma once

#include "block.cuh"

namespace hessreg::spectral::cuda {

constexpr int kThreadsOfRow = 4;

template <typename T>
struct alignas(2 * sizeof(T)) TridiagonalRow {
  T diagonal, before;  // and the entry to its left
};

template <typename Matrix>
class Tridiagonalisation {
 public:
  using T = typename Matrix::Element;
  static constexpr int kRows = Matrix::kRows;
  using Sums = Reduction<Matrix::kWarps>;

  // Overwrites the matrix; rows[n] is ready after the next barrier.
  __device__ __forceinline__ static void run(Matrix& matrix, int n, TridiagonalRow<T>* rows,
                                             Sums& sums) {
    HESSREG_SHARED(Pack<T>, reflectors, [2][kRows / kPack<T>]);
    HESSREG_SHARED(Pack<T>, product_packs, [kRows / kPack<T>]);
    HESSREG_SHARED(T, weights, [2]);
    T* const products = reinterpret_cast<T*>(product_packs);
    for (int k = 0; k < n; ++k) {
      T* const v = reinterpret_cast<T*>(reflectors[k % 2]);
      if (static_cast<int>(threadIdx.x) / 32 == k * Matrix::kParts / 32)
        take_row(matrix, k, n, rows, v, &weights[k % 2]);
      if (!reflects(k, n)) continue;
      __syncthreads();
      apply(matrix, k, v, weights[k % 2], products, sums);
    }
  }

 private:
  __device__ __forceinline__ static bool reflects(int k, int n) { return k + 2 < n; }

  // Row k as of the tridiagonal matrix, and its reflector: I - weight v v' takes what is right of
  // the diagonal to its first entry. Called by the warp of row k.
  __device__ __forceinline__ static void take_row(Matrix& matrix, int k, int n,
                                                  TridiagonalRow<T>* rows, T* v, T* weight) {
    T diagonal = 0, head = 0;
    double squares = 0;  // of what is to vanish
    matrix.for_each_entry([&](int column, T& entry) {
      if (column == k) diagonal = entry;
      if (column == k + 1) head = entry;
      if (column > k + 1) squares += static_cast<double>(entry) * entry;
    });
    diagonal = group_sum<Matrix::kParts>(diagonal);
    head = group_sum<Matrix::kParts>(head);
    squares = group_sum<Matrix::kParts>(squares);
    const bool vanishes = squares < kSmallestSquare<T>;
    const T norm = std::sqrt(static_cast<T>(squares + static_cast<double>(head) * head));
    const T left = vanishes ? head : (head > 0 ? -norm : norm), first = head - left;
    if (matrix.row() != k) return;
    if (matrix.part() == 0) {
      rows[k].diagonal = diagonal;
      if (k == 0) rows[0].before = 0;
      if (k + 1 < n) rows[k + 1].before = left;
    }
    if (!reflects(k, n)) return;  // nor may the memory be written: the one before is in use
    matrix.for_each_pack(0, [&](int column, const T(&entries)[kPack<T>]) {
      Pack<T> pack;
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e)
        pack.values[e] = column + e > k + 1 ? entries[e] : (column + e == k + 1 ? first : T(0));
      store_pack(v + column, pack);
    });
    if (matrix.part() > 0) return;
    *weight = vanishes ? T(0) : T(2) / static_cast<T>(squares + static_cast<double>(first) * first);
  }

  // A <- H A H with H = I - weight v v', that is A - v w' - w v' with w = p - (weight p'v / 2) v
  // and p = weight A v. Rows and columns up to k are not needed any more.
  __device__ __forceinline__ static void apply(Matrix& matrix, int k, const T* v, T weight,
                                               T* products, Sums& sums) {
    const bool is_done = (static_cast<int>(threadIdx.x) | 31) / Matrix::kParts <= k;  // whole warps
    const T own = v[matrix.row()];
    T product = 0;
    if (!is_done) {
      product = weight * matrix.row_product(v, k + 1);
      if (matrix.part() == 0) products[matrix.row()] = product;
    }
    const double share = matrix.part() == 0 ? static_cast<double>(product) * own : 0;
    const T shift = static_cast<T>(weight * sums.sum(share) / 2);
    if (is_done) return;
    const T own_weight = product - shift * own;
    matrix.for_each_pack(k + 1, [&](int column, T(&entries)[kPack<T>]) {
      const Pack<T> x = load_pack(v + column), p = load_pack(products + column);
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e)
        entries[e] -= own * (p.values[e] - shift * x.values[e]) + own_weight * x.values[e];
    });
  }
};

// How many eigenvalues of the tridiagonal matrix are below x: the negative pivots of its
// factorisation with x taken from the diagonal (Sturm). Divisions are rounded to nearest, so that
// the count grows with x.
template <typename T>
__device__ __forceinline__ int count_below(const TridiagonalRow<T>* rows, int n, T x) {
  int count = 0;
  T pivot = 1;
  for (int i = 0; i < n; ++i) {
    const TridiagonalRow<T> row = rows[i];
    pivot = (row.diagonal - x) - row.before * row.before / pivot;
    if (std::abs(pivot) < kSmallestSquare<T>) pivot = -kSmallestSquare<T>;
    count += pivot < 0;
  }
  return count;
}

// The eigenvalue of this index, which the kThreadsOfRow threads of a group look for together: each
// round divides the interval [-bound, bound] by five.
template <typename T>
__device__ __forceinline__ T bisect(const TridiagonalRow<T>* rows, int n, int index, T bound) {
  constexpr int kRounds = sizeof(T) == sizeof(float) ? 12 : 25;  // 5^-kRounds < kEpsilon / 16
  T low = -bound, high = bound;
  for (int round = 0; round < kRounds; ++round) {
    const T step = (high - low) / (kThreadsOfRow + 1);
    const int part = static_cast<int>(threadIdx.x) % kThreadsOfRow;
    const int below = group_sum<kThreadsOfRow>(
        static_cast<int>(count_below(rows, n, low + step * T(part + 1)) <= index));
    high = below == kThreadsOfRow ? high : low + step * T(below + 1);
    low += step * T(below);
  }
  return low + (high - low) / 2;
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kRows* kThreadsOfRow) eigenvalues_kernel(SymmetricEigh p) {
  using Matrix = RegisterMatrix<T, kRows, kThreadsOfRow>;
  HESSREG_SHARED(TridiagonalRow<T>, rows, [kRows]);
  const int n = static_cast<int>(p.n);
  Reduction<Matrix::kWarps> reduction;
  Matrix matrix(Lower<T>{static_cast<const T*>(p.a) + int64_t{blockIdx.x} * n * n, n}, reduction);
  Tridiagonalisation<Matrix>::run(matrix, n, rows, reduction);
  __syncthreads();
  const int index = matrix.row();
  T radius = 0;  // of Gershgorin's interval about zero
  if (index < n)
    radius = std::abs(rows[index].diagonal) + std::abs(rows[index].before) +
             (index + 1 < n ? std::abs(rows[index + 1].before) : T(0));
  const T bound = of_magnitude<T>(reduction.max(magnitude(radius))) * T(1.001);
  const T value = bisect(rows, n, index, bound);
  if (index < n && matrix.part() == 0)
    static_cast<T*>(p.values)[int64_t{blockIdx.x} * n + index] = value * matrix.scale().inverse;
}

}  // namespace hessreg::spectral::cuda
