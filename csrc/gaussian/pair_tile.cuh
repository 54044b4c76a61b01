// Tiles of 64 x 64 pairs of points: how a block loads them, takes their squared distances and inner
// products, and multiplies the weights that follow from these with more vectors.
//
// A tile is worked on in steps. Each loads up to 128 bytes of every row of two operands (or 256 of
// one) into one of two stages in shared memory while the step before is computed. Of a tile, a
// thread has the pairs (row(r), column(c)): the fragment of the tensor cores, for every precision.
#pragma once

#include "../common/cuda_compat.cuh"
#include "gaussian_cuda.h"

namespace hessreg::gaussian::cuda {

// How a product is taken: as the sum of squared differences, or as the inner product by plain
// multiplications, by tensor cores from operands split in two, or by tensor cores at once.
enum class Mode { kDifferences, kMultiply, kTf32x3, kTf32 };

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 64;
constexpr int kRowsOfWarp = kTile / kWarps;
constexpr int kRows = 2, kColumns = 16;  // pairs of one thread
constexpr int64_t kMaxBlocks = 0x7fffffff;

template <typename C>
constexpr int kPiece = 16 / sizeof(C);  // elements moved by one instruction
template <typename C>
constexpr int kDepth = 128 / sizeof(C);  // columns of an operand in one step
template <typename C>
constexpr int kStride =
    kDepth<C> + kPiece<C>;  // of its rows: an odd number of pieces, no conflicts
template <typename C>
constexpr int kWide = 256 / sizeof(C);  // columns of v in one step
template <typename C>
constexpr int kWideStride = kWide<C> + kPiece<C>;
template <typename C>
constexpr int kNarrow = 64 / sizeof(C);  // columns of v that are multiplied in registers
template <typename C>
constexpr int kStage = 2 * kTile * kStride<C>;
template <typename C>
constexpr int kStages = 2 * kStage<C>;
constexpr int kWeightStride = kTile + 8;  // of a tile of weights in shared memory
template <typename C>
constexpr int kWeights = kTile * kWeightStride;
static_assert(kTile * kWideStride<float> <= kStage<float>);
static_assert(kTile * kWideStride<double> <= kStage<double>);
static_assert(kWeights<float> <= kStages<float> && kWeights<double> <= kStages<double>);

// The stages, and the squared norms of the rows of two tiles in turn.
template <typename C>
constexpr int kShared = kStages<C> + 2 * 2 * kTile;

__device__ inline int lane_index() { return threadIdx.x % 32; }
__device__ inline int warp_index() { return threadIdx.x / 32; }
__device__ inline int row_of(int r) {
  return warp_index() * kRowsOfWarp + lane_index() / 4 + 8 * r;
}
__device__ inline int column_of(int c) { return c / 2 * 8 + lane_index() % 4 * 2 + c % 2; }

// An array [batch, rows, depth].
struct Points {
  const void* data;
  int64_t rows, depth;
  Element element;
  bool vectors;  // each piece of a row is aligned and lies within the row
};

template <typename C>
struct alignas(16) Piece {
  C values[kPiece<C>];
};
template <typename C>
__device__ __forceinline__ Piece<C> load_shared(const C* p) {
  return *reinterpret_cast<const Piece<C>*>(p);
}

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename C>
__device__ __forceinline__ C load_element(const Points& p, int64_t index) {
  if constexpr (sizeof(C) == sizeof(float)) {
    if (p.element == Element::kFloat16) return to_float(static_cast<const __half*>(p.data)[index]);
    if (p.element == Element::kBFloat16)
      return to_float(static_cast<const __nv_bfloat16*>(p.data)[index]);
  }
  return static_cast<const C*>(p.data)[index];
}

template <typename C>
__device__ __forceinline__ void store_element(void* out, Element element, int64_t index, C value) {
  if constexpr (sizeof(C) == sizeof(float)) {
    if (element == Element::kFloat16) {
      static_cast<__half*>(out)[index] = __float2half(value);
      return;
    }
    if (element == Element::kBFloat16) {
      static_cast<__nv_bfloat16*>(out)[index] = __float2bfloat16(value);
      return;
    }
  }
  static_cast<C*>(out)[index] = value;
}

template <typename T, typename C>
__device__ __forceinline__ Piece<C> load_four(const void* data, int64_t index) {
  struct alignas(8) Four {
    T values[4];
  };
  const Four four = *reinterpret_cast<const Four*>(static_cast<const T*>(data) + index);
  return {to_float(four.values[0]), to_float(four.values[1]), to_float(four.values[2]),
          to_float(four.values[3])};
}

// The elements from index on of a row that has `count` more; zero behind them.
template <typename C>
__device__ __forceinline__ Piece<C> load_global(const Points& p, int64_t index, int64_t count) {
  if (p.vectors && count > 0) {
    if constexpr (sizeof(C) == sizeof(float)) {
      if (p.element == Element::kFloat16) return load_four<__half, C>(p.data, index);
      if (p.element == Element::kBFloat16) return load_four<__nv_bfloat16, C>(p.data, index);
    }
    return *reinterpret_cast<const Piece<C>*>(static_cast<const C*>(p.data) + index);
  }
  Piece<C> piece;
  HESSREG_UNROLL
  for (int q = 0; q < kPiece<C>; ++q)
    piece.values[q] = q < count ? load_element<C>(p, index + q) : C(0);
  return piece;
}

// A tile's rows from `row` on, kPieces of each. A thread visits the same pieces every time: what it
// has copied itself it may change before others see it.
template <typename C, int kPieces, int kRowStride, typename Visit>
__device__ __forceinline__ void for_own_pieces(C* stage, Visit visit) {
  constexpr int kRowsAtOnce = kThreads / kPieces;
  const int first = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  HESSREG_UNROLL
  for (int i = 0; i < kTile / kRowsAtOnce; ++i) {
    const int row = first + i * kRowsAtOnce;
    visit(stage + row * kRowStride + piece * kPiece<C>, row, piece * kPiece<C>, i);
  }
}

// Whether elements are computed with as they are stored.
__device__ __forceinline__ bool is_copied(Element element) {
  return element == Element::kFloat32 || element == Element::kFloat64;
}

// Of an operand with `depth` columns left, how many a product reads: up to a multiple of eight.
__device__ __forceinline__ int64_t columns_read(int64_t depth) { return (depth + 7) / 8 * 8; }

// Starts to load a tile's rows from row0 on and columns from k0 on, as many as are read; zero where
// the array ends. Only the fast way is unrolled: all ways together would not fit in the
// instruction cache.
template <typename C, int kPieces, int kRowStride>
__device__ __forceinline__ void load_rows(C* stage, const Points& p, int64_t batch, int64_t row0,
                                          int64_t k0, int64_t end) {
  const int piece = threadIdx.x % kPieces * kPiece<C>;
  const int64_t count = p.depth - k0 - piece;
  if (k0 + piece >= end) return;
  if (p.vectors && is_copied(p.element) && count > 0) {
    const C* source = static_cast<const C*>(p.data) + (batch * p.rows + row0) * p.depth + k0;
    for_own_pieces<C, kPieces, kRowStride>(stage, [&](C* target, int row, int k, int) {
      if (row0 + row < p.rows) {
        cp_async16(target, source + row * p.depth + k);
      } else {
        *reinterpret_cast<Piece<C>*>(target) = {};
      }
    });
  } else {
    for (int row = threadIdx.x / kPieces; row < kTile; row += blockDim.x / kPieces) {
      const int64_t index = (batch * p.rows + row0 + row) * p.depth + k0 + piece;
      *reinterpret_cast<Piece<C>*>(stage + row * kRowStride + piece) =
          load_global<C>(p, index, row0 + row < p.rows ? count : 0);
    }
  }
}

// Columns of an operand of a product.
template <typename C>
__device__ __forceinline__ void load_operand(C* stage, const Points& p, int64_t batch, int64_t row0,
                                             int64_t k0) {
  load_rows<C, 8, kStride<C>>(stage, p, batch, row0, k0, k0 + columns_read(p.depth - k0));
}

// A chunk of wide vectors.
template <typename C>
__device__ __forceinline__ void load_wide(C* stage, const Points& p, int64_t batch, int64_t row0,
                                          int64_t k0) {
  load_rows<C, 16, kWideStride<C>>(stage, p, batch, row0, k0, k0 + kWide<C>);
}

// ---- Centres

// Distances do not change with the origin, but the digits that |x|^2 + |y|^2 - 2 <x, y> loses do:
// it is taken relative to the mean of a few rows of the tile of x, so that data far from the origin
// are as exact as any, and no single outlier costs digits.
constexpr int kCentreRows = 4;

__device__ __forceinline__ int64_t centre_row(const Points& x, int64_t batch, int64_t i0, int r) {
  return batch * x.rows + min(i0 + r * (kTile / kCentreRows), x.rows - 1);
}

// A coordinate that is not finite is no centre.
template <typename C>
__device__ __forceinline__ C mean_of_rows(C sum) {
  return std::isfinite(sum) ? sum / kCentreRows : C(0);
}

template <typename C>
__device__ __forceinline__ Piece<C> centre_piece(const Points& x, int64_t batch, int64_t i0,
                                                 int64_t k) {
  Piece<C> sum = {};
  HESSREG_UNROLL
  for (int r = 0; r < kCentreRows; ++r) {
    const int64_t index = centre_row(x, batch, i0, r) * x.depth + k;
    const Piece<C> row = load_global<C>(x, index, x.depth - k);
    HESSREG_UNROLL
    for (int q = 0; q < kPiece<C>; ++q) sum.values[q] += row.values[q];
  }
  HESSREG_UNROLL
  for (int q = 0; q < kPiece<C>; ++q) sum.values[q] = mean_of_rows(sum.values[q]);
  return sum;
}

// The value as the product takes it, so that norms and products are of the same numbers.
template <Mode kMode, typename C>
__device__ __forceinline__ C rounded(C x) {
  if constexpr (kMode == Mode::kTf32) {
    return __uint_as_float(to_tf32(x));
  } else {
    return x;
  }
}

// Centres this thread's pieces of an operand with `depth` columns left, and adds their squares.
template <Mode kMode, typename C>
__device__ __forceinline__ void centre_operand(C* stage, int64_t depth, const Piece<C>& centre,
                                               C* sums) {
  for_own_pieces<C, 8, kStride<C>>(stage, [&](C* target, int, int k, int i) {
    if (k >= columns_read(depth)) return;
    Piece<C> piece = load_shared(target);
    HESSREG_UNROLL
    for (int q = 0; q < kPiece<C>; ++q) {
      const C x = rounded<kMode>(piece.values[q] - centre.values[q]);
      piece.values[q] = x;
      sums[i] += x * x;
    }
    *reinterpret_cast<Piece<C>*>(target) = piece;
  });
}

constexpr int kNormsOfThread = kTile * 8 / kThreads;  // rows of one operand that it has pieces of

// The sums of the eight threads that share a row.
template <typename C>
__device__ __forceinline__ void store_norms(C* norms, C* sums) {
  HESSREG_UNROLL
  for (int i = 0; i < kNormsOfThread; ++i) {
    HESSREG_UNROLL
    for (int offset = 1; offset < 8; offset *= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], offset);
    if (threadIdx.x % 8 == 0) norms[threadIdx.x / 8 + i * (kThreads / 8)] = sums[i];
    sums[i] = 0;
  }
}

template <typename C, int kCount>
__device__ __forceinline__ void clear(C (&x)[kRows][kCount]) {
  HESSREG_UNROLL
  for (int p = 0; p < kRows * kCount; ++p) x[p / kCount][p % kCount] = 0;
}

// ---- Products

// sums += products of `depth` columns, which are zero up to a multiple of kPiece.
template <bool kDifferences, typename C>
__device__ __forceinline__ void multiply_plainly(const C* stage, int depth,
                                                 C (&sums)[kRows][kColumns]) {
  for (int k = 0; k < depth; k += kPiece<C>) {
    Piece<C> a[kRows];
    HESSREG_UNROLL
    for (int r = 0; r < kRows; ++r) a[r] = load_shared(stage + row_of(r) * kStride<C> + k);
    HESSREG_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const Piece<C> b = load_shared(stage + (kTile + column_of(c)) * kStride<C> + k);
      HESSREG_UNROLL
      for (int r = 0; r < kRows; ++r) {
        HESSREG_UNROLL
        for (int q = 0; q < kPiece<C>; ++q) {
          const C x = a[r].values[q], y = b.values[q];
          sums[r][c] += kDifferences ? (x - y) * (x - y) : x * y;
        }
      }
    }
  }
}

// Values as a high part that tensor cores take exactly, and what is left of them.
template <int kCount>
struct TensorSplit {
  uint32_t high[kCount], low[kCount];
  __device__ __forceinline__ explicit TensorSplit(const float (&x)[kCount]) {
    HESSREG_UNROLL
    for (int i = 0; i < kCount; ++i) {
      high[i] = to_tf32(x[i]);
      low[i] = to_tf32(x[i] - __uint_as_float(high[i]));
    }
  }
};

// sum += a b; with kTf32x3 all but the product of the low parts.
template <Mode kMode>
__device__ __forceinline__ void multiply_fragments(float (&sum)[4], const TensorSplit<4>& a,
                                                   const TensorSplit<2>& b) {
  if constexpr (kMode == Mode::kTf32x3) {
    mma_m16n8k8_tf32(sum, a.low, b.high, sum);
    mma_m16n8k8_tf32(sum, a.high, b.low, sum);
  }
  mma_m16n8k8_tf32(sum, a.high, b.high, sum);
}

// sums += by tensor cores. They cut off what does not fit when they add: no sum stays with them for
// longer than a step.
template <Mode kMode>
__device__ __forceinline__ void multiply_by_tensor_cores(const float* stage, int depth,
                                                         float (&sums)[kRows][kColumns]) {
  constexpr int kStrideOfRow = kStride<float>;
  const int group = lane_index() / 4, t = lane_index() % 4;
  const float* a = stage + row_of(0) * kStrideOfRow + t;
  const float* b = stage + (kTile + group) * kStrideOfRow + t;
  float step[kColumns / 2][4] = {};
  for (int k = 0; k < depth; k += 8) {
    const TensorSplit<4> left(
        {a[k], a[8 * kStrideOfRow + k], a[k + 4], a[8 * kStrideOfRow + k + 4]});
    HESSREG_UNROLL
    for (int n = 0; n < kColumns / 2; ++n) {
      const float* column = b + 8 * n * kStrideOfRow + k;
      multiply_fragments<kMode>(step[n], left, TensorSplit<2>({column[0], column[4]}));
    }
  }
  HESSREG_UNROLL
  for (int n = 0; n < kColumns / 2; ++n) {
    HESSREG_UNROLL
    for (int i = 0; i < 4; ++i) sums[i / 2][2 * n + i % 2] += step[n][i];
  }
}

template <Mode kMode, typename C>
__device__ __forceinline__ void multiply(const C* stage, int64_t depth,
                                         C (&sums)[kRows][kColumns]) {
  const int bound = static_cast<int>(depth < kDepth<C> ? depth : kDepth<C>);
  if constexpr (kMode == Mode::kTf32x3 || kMode == Mode::kTf32) {
    multiply_by_tensor_cores<kMode>(stage, bound, sums);
  } else {
    multiply_plainly<kMode == Mode::kDifferences>(stage, bound, sums);
  }
}

// ---- Distances

// |x_i - y_j|^2 from the differences, by the whole warp.
template <typename C>
__device__ __forceinline__ C distance(const Points& x, int64_t i, const Points& y, int64_t j) {
  C sum = 0;
  for (int64_t k = lane_index(); k < x.depth; k += 32) {
    const C difference = load_element<C>(x, i * x.depth + k) - load_element<C>(y, j * y.depth + k);
    sum += difference * difference;
  }
  HESSREG_UNROLL
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// How many of a tile's rows, which start at i0, are before the end.
__device__ __forceinline__ int rows_within(int64_t end, int64_t i0) {
  const int64_t rows = end - i0;
  return static_cast<int>(rows < 0 ? 0 : rows < kTile ? rows : kTile);
}

// A tile by its place among tiles.
struct Tile {
  int row, column;
  __device__ __forceinline__ int64_t i0() const { return int64_t{row} * kTile; }
  __device__ __forceinline__ int64_t j0() const { return int64_t{column} * kTile; }
};

// Takes again the distances that have lost digits: bit r kColumns + c of lost stands for s[r][c].
template <typename C>
__device__ __forceinline__ void take_again(const Points& x, const Points& y, int64_t batch,
                                           const Tile& tile, unsigned lost,
                                           C (&s)[kRows][kColumns]) {
  for (unsigned lanes; (lanes = __ballot_sync(~0u, lost != 0)) != 0;) {
    const int lane = __ffs(lanes) - 1;
    const int pair = __ffs(__shfl_sync(~0u, lost, lane)) - 1;
    const int row = __shfl_sync(~0u, row_of(pair / kColumns), lane);
    const int column = __shfl_sync(~0u, column_of(pair % kColumns), lane);
    const C exact =
        distance<C>(x, batch * x.rows + tile.i0() + row, y, batch * y.rows + tile.j0() + column);
    if (lane != lane_index()) continue;
    lost &= lost - 1;
    HESSREG_UNROLL
    for (int p = 0; p < kRows * kColumns; ++p)
      if (p == pair) s[p / kColumns][p % kColumns] = exact;
  }
}

// Turns inner products of centred points into squared distances.
template <typename C>
__device__ __forceinline__ void products_to_distances(const Points& x, const Points& y,
                                                      int64_t batch, const Tile& tile,
                                                      const C* norms, C (&s)[kRows][kColumns]) {
  const int rows = rows_within(x.rows, tile.i0()), columns = rows_within(y.rows, tile.j0());
  unsigned lost = 0;
  HESSREG_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const C row_norm = norms[row_of(r)];
    HESSREG_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const C norm = row_norm + norms[kTile + column_of(c)];
      s[r][c] = norm - 2 * s[r][c];
      const bool kept = s[r][c] >= static_cast<C>(kCancelled) * norm && std::isfinite(norm);
      const bool inside = row_of(r) < rows && column_of(c) < columns;
      if (inside && !kept) lost |= 1u << (r * kColumns + c);
    }
  }
  take_again(x, y, batch, tile, lost, s);
}

// ---- Mixtures

constexpr int kMaxComponents = 128;

// What the kernels need of the components, in shared memory.
template <typename C>
struct Components {
  C scale[kMaxComponents], coefficient[kMaxComponents], slope[kMaxComponents];
};

template <typename C>
__device__ __forceinline__ void load_components(const Mixture& mixture, int64_t batch,
                                                Components<C>* out) {
  for (int c = threadIdx.x; c < mixture.count; c += kThreads) {
    const double gamma = mixture.gamma[batch * mixture.count + c];
    const double coefficient = coefficient_of(mixture, batch, c);
    out->scale[c] = scale_of<C>(gamma);
    out->coefficient[c] = finite<C>(coefficient);
    out->slope[c] = finite<C>(coefficient * gamma);
  }
}

__device__ inline float power_of_two(float x) { return ex2(x); }
__device__ inline double power_of_two(double x) { return exp2(x); }

// Calls visit(r, c, phi(s), -phi'(s)) for all pairs, a few at a time to save registers.
template <bool kSlopes, typename C, typename Visit>
__device__ __forceinline__ void for_each_weight(const Components<C>& components, int64_t count,
                                                const C (&s)[kRows][kColumns], Visit visit) {
  constexpr int kAtOnce = 8;
  HESSREG_UNROLL
  for (int first = 0; first < kRows * kColumns; first += kAtOnce) {
    C phi[kAtOnce] = {}, slope[kAtOnce] = {};
    for (int k = 0; k < count; ++k) {
      const C scale = components.scale[k], coefficient = components.coefficient[k];
      HESSREG_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const C power = power_of_two(-scale * s[(first + u) / kColumns][(first + u) % kColumns]);
        phi[u] += coefficient * power;
        if constexpr (kSlopes) slope[u] += components.slope[k] * power;
      }
    }
    HESSREG_UNROLL
    for (int u = 0; u < kAtOnce; ++u)
      visit((first + u) / kColumns, (first + u) % kColumns, phi[u], slope[u]);
  }
}

// ---- Weights times vectors

// out[r] += sum_c weights[r][c] v[column(c)] for up to kNarrow columns of v. Each thread sums over
// its own columns of the tile.
template <typename C>
__device__ __forceinline__ void add_narrow(const C (&weights)[kRows][kColumns], const C* v,
                                           int64_t width, C (&out)[kRows][kNarrow<C>]) {
  HESSREG_UNROLL
  for (int e = 0; e < kNarrow<C>; e += kPiece<C>) {
    if (e >= width) break;
    HESSREG_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const Piece<C> piece = load_shared(v + column_of(c) * kStride<C> + e);
      HESSREG_UNROLL
      for (int r = 0; r < kRows; ++r) {
        HESSREG_UNROLL
        for (int q = 0; q < kPiece<C>; ++q) out[r][e + q] += weights[r][c] * piece.values[q];
      }
    }
  }
}

// The sums over the four threads that share a row.
template <typename C, int kCount>
__device__ __forceinline__ void sum_over_row(C (&x)[kCount]) {
  HESSREG_UNROLL
  for (int i = 0; i < kCount; ++i) {
    x[i] += __shfl_xor_sync(~0u, x[i], 1);
    x[i] += __shfl_xor_sync(~0u, x[i], 2);
  }
}

// out[r][c] += sum_j weights[row(r), j] v[j, column(c)] for up to 8 kCount columns. The sums of a
// product are, as they are, an operand of the next if its rows are taken in their order.
template <Mode kMode, int kCount>
__device__ __forceinline__ void add_columns(const float (&weights)[kRows][kColumns], const float* v,
                                            float (&out)[kRows][kNarrow<float>]) {
  constexpr int kStrideOfRow = kWideStride<float>;
  const float* column = v + lane_index() % 4 * 2 * kStrideOfRow + lane_index() / 4;
  float step[kCount][4] = {};
  HESSREG_UNROLL
  for (int n = 0; n < kColumns / 2; ++n) {
    const TensorSplit<4> left(
        {weights[0][2 * n], weights[1][2 * n], weights[0][2 * n + 1], weights[1][2 * n + 1]});
    HESSREG_UNROLL
    for (int f = 0; f < kCount; ++f) {
      const float* b = column + 8 * n * kStrideOfRow + 8 * f;
      multiply_fragments<kMode>(step[f], left, TensorSplit<2>({b[0], b[kStrideOfRow]}));
    }
  }
  HESSREG_UNROLL
  for (int i = 0; i < 4 * kCount; ++i) out[i % 4 / 2][i / 4 * 2 + i % 2] += step[i / 4][i % 4];
}

template <Mode kMode>
__device__ __forceinline__ void add_wide(const float (&weights)[kRows][kColumns], const float* v,
                                         int64_t width, float*,
                                         float (&out)[kRows][kNarrow<float>]) {
  constexpr int kAll = kWide<float> / 8;
  if (width > 4 * kAll) {
    add_columns<kMode, kAll>(weights, v, out);
  } else {
    add_columns<kMode, kAll / 2>(weights, v, out);
  }
}

// The same in float64, with the warp's weights in shared memory.
template <Mode kMode>
__device__ __forceinline__ void add_wide(const double (&)[kRows][kColumns], const double* v,
                                         int64_t width, double* tile,
                                         double (&out)[kRows][kNarrow<double>]) {
  const double* column = v + lane_index() % 4 * 2;
  for (int k = 0; k < kTile; k += 2) {
    Piece<double> a[kRows];
    HESSREG_UNROLL
    for (int r = 0; r < kRows; ++r) a[r] = load_shared(tile + row_of(r) * kWeightStride + k);
    HESSREG_UNROLL
    for (int f = 0; f < kWide<double> / 8; ++f) {
      if (8 * f >= width) break;
      HESSREG_UNROLL
      for (int q = 0; q < 2; ++q) {
        const Piece<double> b = load_shared(column + (k + q) * kWideStride<double> + 8 * f);
        HESSREG_UNROLL
        for (int i = 0; i < 4; ++i)
          out[i / 2][2 * f + i % 2] += a[i / 2].values[q] * b.values[i % 2];
      }
    }
  }
}

template <typename C>
struct alignas(2 * sizeof(C)) Two {
  C values[2];
};

// Each thread's own pairs, to a tile in shared memory.
template <typename C>
__device__ __forceinline__ void store_pairs(const C (&x)[kRows][kColumns], C* tile) {
  HESSREG_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HESSREG_UNROLL
    for (int c = 0; c < kColumns; c += 2) {
      C* target = tile + row_of(r) * kWeightStride + column_of(c);
      *reinterpret_cast<Two<C>*>(target) = {x[r][c], x[r][c + 1]};
    }
  }
}

template <typename C>
__device__ __forceinline__ void multiply_by_pairs(const C* tile, C (&x)[kRows][kColumns]) {
  HESSREG_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HESSREG_UNROLL
    for (int c = 0; c < kColumns; c += 2) {
      const C* source = tile + row_of(r) * kWeightStride + column_of(c);
      const Two<C> two = *reinterpret_cast<const Two<C>*>(source);
      x[r][c] *= two.values[0];
      x[r][c + 1] *= two.values[1];
    }
  }
}

// Shows a thread's pairs to its warp, whose rows they are. A barrier has parted them from what was
// there.
template <typename C>
__device__ __forceinline__ void share_weights(const C (&weights)[kRows][kColumns], C* tile) {
  store_pairs(weights, tile);
  __syncwarp();
}

}  // namespace hessreg::gaussian::cuda
