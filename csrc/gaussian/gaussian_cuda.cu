#include <stdexcept>

#include "../common/cuda_compat.cuh"
#include "gaussian_cuda.h"
#include "steps.cuh"

namespace hessreg::gaussian::cuda {
namespace {

constexpr int64_t kTargetBlocks = 512;  // that fill a large GPU
constexpr int kCombineThreads = 256;
constexpr int64_t kCombined = 4 * kCombineThreads;  // elements of one block

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Matrix

template <typename C>
struct MatrixTask {
  static constexpr bool kCentresVectors = false, kHasFactors = false;
  const Work& work;
  const Components<C>& components;
  int64_t batch;
  C* shared;

  __device__ __forceinline__ void take_product(const Step& step, const C*,
                                               C (&sums)[kRows][kColumns]) {
    for_each_weight<false>(components, work.mixture.count, sums,
                           [&](int r, int c, C phi, C) { sums[r][c] = phi; });
    __syncthreads();  // the stages become the tile of weights
    share_weights(sums, shared);
    store_rows(step.tile);
  }

  // A warp's rows, one after the other, so that neighbours store neighbours.
  __device__ __forceinline__ void store_rows(const Tile& tile) {
    const int64_t n = work.pairs[0].left.rows, m = work.pairs[0].right.rows;
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const int row = warp_index() * kRowsOfWarp + r;
      if (tile.i0() + row >= n) break;
      const int64_t base = (batch * n + tile.i0() + row) * m + tile.j0();
      for (int c = lane_index(); c < kTile && tile.j0() + c < m; c += 32)
        store_element(work.out, work.out_element, base + c, shared[row * kWeightStride + c]);
    }
  }
};

// One block a tile.
template <typename C, Mode kMode>
__global__ void __launch_bounds__(kThreads) matrix_kernel(const Work __grid_constant__ work) {
  HESSREG_DYNAMIC_SHARED(C, shared);
  HESSREG_SHARED(Components<C>, components, [1]);
  const int64_t column = blockIdx.x % work.column_tiles, row = blockIdx.x / work.column_tiles;
  const int64_t batch = row / work.row_tiles;
  load_components(work.mixture, batch, components);
  MatrixTask<C> task{work, components[0], batch, shared};
  const RowOfTiles tiles{batch, column, column + 1, static_cast<int>(row % work.row_tiles)};
  run<C, kMode, Vectors::kNone>(work, tiles, shared, task);
}

// ---- Sums

__device__ __forceinline__ int64_t split_of_block(const Work& work) {
  return blockIdx.x % work.splits;
}

__device__ __forceinline__ RowOfTiles tiles_of_block(const Work& work) {
  const int64_t row = blockIdx.x / work.splits;
  const int64_t begin = split_of_block(work) * work.tiles_of_split;
  const int64_t end = min(begin + work.tiles_of_split, work.column_tiles);
  return {row / work.row_tiles, begin, end, static_cast<int>(row % work.row_tiles)};
}

// Where the sums of a block go. If v has several chunks they are added to tile by tile, always by
// the same thread.
template <typename C>
__device__ __forceinline__ void put(const Work& work, int64_t batch, int64_t row, int64_t e,
                                    C value, bool is_first) {
  const int64_t n = work.pairs[0].left.rows;
  const int64_t index = (batch * n + row) * work.v.depth + e;
  if (!work.partials) return store_element(work.out, work.out_element, index, value);
  const int64_t before = split_of_block(work) * work.batch * n * work.v.depth;
  C* partial = static_cast<C*>(work.partials) + before + index;
  *partial = is_first ? value : *partial + value;
}

// put(r, e, ...) for all sums of a thread over narrow vectors: the four threads of a row share
// them.
template <typename C, typename Put>
__device__ __forceinline__ void for_each_narrow(int64_t width, C (&out)[kRows][kNarrow<C>],
                                                Put put) {
  HESSREG_UNROLL
  for (int r = 0; r < kRows; ++r) {
    sum_over_row(out[r]);
    HESSREG_UNROLL
    for (int e = 0; e < kNarrow<C>; ++e)
      if (e % 4 == lane_index() % 4 && e < width) put(r, e, out[r][e]);
  }
}

template <typename C, typename Put>
__device__ __forceinline__ void for_each_wide(int64_t width, C (&out)[kRows][kNarrow<C>], Put put) {
  HESSREG_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HESSREG_UNROLL
    for (int c = 0; c < kNarrow<C>; ++c)
      if (column_of(c) < width) put(r, column_of(c), out[r][c]);
  }
}

// Adds the weights times a chunk of vectors; the tile of weights is float64's.
template <Mode kMode, typename C>
__device__ __forceinline__ void add_chunk(const Work& work, const Step& step,
                                          const C (&weights)[kRows][kColumns], const C* v,
                                          C* weight_tile, C (&out)[kRows][kNarrow<C>]) {
  constexpr Mode kProduct = kMode == Mode::kDifferences ? Mode::kTf32x3 : kMode;
  if constexpr (sizeof(C) == sizeof(double))
    if (step.chunk == 0) share_weights(weights, weight_tile);
  add_wide<kProduct>(weights, v, work.v.depth - first_column<C>(work, step), weight_tile, out);
}

template <typename C, Mode kMode, Vectors kVectors>
struct SumTask {
  static constexpr bool kCentresVectors = false, kHasFactors = true;
  const Work& work;
  const Components<C>& components;
  const RowOfTiles& tiles;
  C* weight_tile;  // with factors, and for wide vectors in float64
  C out[kRows][kNarrow<C>];

  __device__ __forceinline__ void take_product(const Step& step, const C*,
                                               C (&sums)[kRows][kColumns]) {
    if (step.product == 0) {
      const int columns = rows_within(work.pairs[0].right.rows, step.tile.j0());
      for_each_weight<false>(components, work.mixture.count, sums, [&](int r, int c, C phi, C) {
        sums[r][c] = column_of(c) < columns ? phi : C(0);
      });
    } else {
      multiply_by_pairs(weight_tile, sums);
    }
    if (step.product + 1 < work.num_products) store_pairs(sums, weight_tile);
  }

  __device__ __forceinline__ void take_vectors(const Step& step, const C* v,
                                               const C (&weights)[kRows][kColumns]) {
    if constexpr (kVectors == Vectors::kNarrow) {
      add_narrow(weights, v, work.v.depth, out);
    } else {
      add_chunk<kMode>(work, step, weights, v, weight_tile, out);
    }
    const bool tile_by_tile = has_chunks<C, kVectors>(work);
    if (tile_by_tile || step.position + 1 == tiles.end)
      finish(first_column<C>(work, step), !tile_by_tile || step.position == tiles.begin);
  }

  __device__ __forceinline__ void finish(int64_t e0, bool is_first) {
    const auto put_sum = [&](int r, int e, C value) {
      const int64_t row = int64_t{tiles.row} * kTile + row_of(r);
      if (row < work.pairs[0].left.rows) put(work, tiles.batch, row, e0 + e, value, is_first);
    };
    if constexpr (kVectors == Vectors::kNarrow) {
      for_each_narrow(work.v.depth, out, put_sum);
    } else {
      for_each_wide(work.v.depth - e0, out, put_sum);
    }
    clear(out);
  }
};

// One block a row of tiles and split of its columns.
template <typename C, Mode kMode, Vectors kVectors>
__global__ void __launch_bounds__(kThreads) sum_kernel(const Work __grid_constant__ work) {
  HESSREG_DYNAMIC_SHARED(C, shared);
  HESSREG_SHARED(Components<C>, components, [1]);
  const RowOfTiles tiles = tiles_of_block(work);
  load_components(work.mixture, tiles.batch, components);
  SumTask<C, kMode, kVectors> task{work, components[0], tiles, shared + kShared<C>, {}};
  run<C, kMode, kVectors>(work, tiles, shared, task);
}

// ---- Energies

// The sum over the block, in thread 0. The order is fixed, so that equal inputs give equal bits.
template <int kBlock>
__device__ double block_sum(double value) {
  HESSREG_SHARED(double, warp_sums, [kBlock / 32]);
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 1; threadIdx.x == 0 && warp < kBlock / 32; ++warp) value += warp_sums[warp];
  return value;
}

// The weights of one row's pairs with the first points and with the rest.
struct RowWeights {
  double first, rest;
  __device__ __forceinline__ RowWeights(const Work& work, int64_t i)
      : first(i < work.first ? work.within_first : work.across),
        rest(i < work.first ? work.across : work.within_rest) {}
};

template <typename C, Mode kMode, Vectors kGradient>
struct EnergyTask {
  static constexpr bool kCentresVectors = kGradient == Vectors::kWide, kHasFactors = false;
  const Work& work;
  const Components<C>& components;
  const RowOfTiles& tiles;
  C* weight_tile;
  double value;
  C row_sums[kRows];  // of the weights of z_i - z_j in the gradient
  C out[kRows][kNarrow<C>];

  __device__ __forceinline__ void take_product(const Step& step, const C* stage,
                                               C (&sums)[kRows][kColumns]) {
    weigh(step, sums);
    if constexpr (kGradient == Vectors::kNarrow) add_differences(stage, sums);
    if constexpr (kGradient == Vectors::kWide) add_row_sums(sums);
  }

  // Adds to the value, and turns distances into the weights of the gradient.
  __device__ __forceinline__ void weigh(const Step& step, C (&sums)[kRows][kColumns]) {
    constexpr bool kSlopes = kGradient != Vectors::kNone;
    const Points& z = work.pairs[0].left;
    const int64_t i0 = step.tile.i0(), j0 = step.tile.j0();
    const int rows = rows_within(z.rows, i0), columns = rows_within(z.rows, j0);
    const int first_columns = rows_within(work.first, j0);
    const RowWeights w[kRows] = {{work, i0 + row_of(0)}, {work, i0 + row_of(1)}};
    const C with_first[kRows] = {static_cast<C>(w[0].first), static_cast<C>(w[1].first)};
    const C with_rest[kRows] = {static_cast<C>(w[0].rest), static_cast<C>(w[1].rest)};
    C first[kRows] = {}, rest[kRows] = {};
    for_each_weight<kSlopes>(
        components, work.mixture.count, sums, [&](int r, int c, C phi, C slope) {
          const int row = row_of(r), column = column_of(c);
          const bool inside = row < rows && column < columns && (i0 != j0 || row != column);
          const bool is_first = column < first_columns;
          (is_first ? first[r] : rest[r]) += inside ? phi : C(0);
          sums[r][c] = inside ? (is_first ? with_first[r] : with_rest[r]) * slope : C(0);
        });
    const int times = kSlopes || i0 == j0 ? 1 : 2;  // without a gradient, a tile and its mirror
    HESSREG_UNROLL
    for (int r = 0; r < kRows; ++r) value += times * (w[r].first * first[r] + w[r].rest * rest[r]);
  }

  __device__ __forceinline__ void add_differences(const C* stage,
                                                  const C (&weights)[kRows][kColumns]) {
    HESSREG_UNROLL
    for (int e = 0; e < kNarrow<C>; e += kPiece<C>) {
      if (e >= work.v.depth) break;
      const Piece<C> x[kRows] = {bounded(stage + row_of(0) * kStride<C> + e),
                                 bounded(stage + row_of(1) * kStride<C> + e)};
      HESSREG_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const Piece<C> y = bounded(stage + (kTile + column_of(c)) * kStride<C> + e);
        HESSREG_UNROLL
        for (int p = 0; p < kRows * kPiece<C>; ++p) {
          const int r = p / kPiece<C>, q = p % kPiece<C>;
          out[r][e + q] += weights[r][c] * (x[r].values[q] - y.values[q]);
        }
      }
    }
  }

  // Points at infinity brought to where their weights are zero already, as zero times infinity
  // would be NaN.
  __device__ __forceinline__ Piece<C> bounded(const C* p) const {
    constexpr C kFar = sizeof(C) == sizeof(float) ? C(0x1p120) : C(0x1p1000);
    Piece<C> piece = load_shared(p);
    HESSREG_UNROLL
    for (int q = 0; q < kPiece<C>; ++q) piece.values[q] = min(max(piece.values[q], -kFar), kFar);
    return piece;
  }

  __device__ __forceinline__ void add_row_sums(const C (&weights)[kRows][kColumns]) {
    HESSREG_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HESSREG_UNROLL
      for (int c = 0; c < kColumns; ++c) row_sums[r] += weights[r][c];
    }
  }

  __device__ __forceinline__ void take_vectors(const Step& step, const C* v,
                                               const C (&weights)[kRows][kColumns]) {
    add_chunk<kMode>(work, step, weights, v, weight_tile, out);
    if (!has_chunks<C, kGradient>(work)) return;
    const int64_t e0 = first_column<C>(work, step);
    const bool is_first = step.position == tiles.begin;
    for_each_wide(work.v.depth - e0, out,
                  [&](int r, int e, C sum) { put_row(r, e0 + e, 4 * sum, is_first); });
    clear(out);
  }

  __device__ __forceinline__ int64_t row_at(int r) const {
    return int64_t{tiles.row} * kTile + row_of(r);
  }

  __device__ __forceinline__ void put_row(int r, int64_t e, C value, bool is_first) {
    if (row_at(r) < work.v.rows) put(work, tiles.batch, row_at(r), e, value, is_first);
  }

  // -4 sum_j weight_ij (z_i - z_j).
  __device__ __forceinline__ void finish(C* stage) {
    if constexpr (kGradient == Vectors::kNarrow) {
      for_each_narrow(work.v.depth, out,
                      [&](int r, int e, C sum) { put_row(r, e, -4 * sum, true); });
    } else {
      sum_over_row(row_sums);
      for (int64_t e0 = 0; e0 < work.v.depth; e0 += kWide<C>) add_own_chunk(e0, stage);
    }
  }

  // Adds what the points themselves have in it to sum_j weight_ij (z_j - centre), which is in out,
  // or with several chunks already where it goes.
  __device__ __forceinline__ void add_own_chunk(int64_t e0, C* stage) {
    const int64_t i0 = int64_t{tiles.row} * kTile;
    __syncthreads();  // what is there has been read
    load_wide(stage, work.v, tiles.batch, i0, e0);
    cp_async_commit();
    cp_async_wait<0>();
    centre_vectors(work.v, tiles.batch, i0, e0, stage);
    __syncthreads();
    const bool is_first = !has_chunks<C, kGradient>(work);
    for_each_wide(work.v.depth - e0, out, [&](int r, int e, C sum) {
      const C own = stage[row_of(r) * kWideStride<C> + e];
      put_row(r, e0 + e, -4 * (row_sums[r] * own - sum), is_first);
    });
  }
};

// Blocks at once on a multiprocessor, as registers allow.
template <typename C, Vectors kGradient>
constexpr int kResident = (sizeof(C) == sizeof(float) && kGradient != Vectors::kWide ? 3 : 2) +
                          (kGradient == Vectors::kNone);

// With a gradient, one block a row of tiles and split of its columns; without, the upper triangle
// of tiles is spread over the blocks.
template <typename C, Mode kMode, Vectors kGradient>
__global__ void __launch_bounds__(kThreads, kResident<C, kGradient>)
    energy_kernel(const Work __grid_constant__ work) {
  HESSREG_DYNAMIC_SHARED(C, shared);
  HESSREG_SHARED(Components<C>, components, [1]);
  constexpr bool kHasGradient = kGradient != Vectors::kNone;
  const RowOfTiles tiles = kHasGradient ? tiles_of_block(work) : RowOfTiles{};
  const int64_t batch = blockIdx.x / work.blocks_of_batch;
  load_components(work.mixture, batch, components);
  EnergyTask<C, kMode, kGradient> task{work, components[0], tiles, shared + kShared<C>, 0, {}, {}};
  if constexpr (kHasGradient) {
    constexpr auto kLoaded = kGradient == Vectors::kWide ? kGradient : Vectors::kNone;
    run<C, kMode, kLoaded>(work, tiles, shared, task);
    task.finish(shared);
  } else {
    const int64_t end = work.row_tiles * (work.row_tiles + 1) / 2;
    const UpperTriangle triangle{batch, blockIdx.x % work.blocks_of_batch, end,
                                 work.blocks_of_batch};
    run<C, kMode, Vectors::kNone>(work, triangle, shared, task);
  }
  const double total = block_sum<kThreads>(task.value);
  if (threadIdx.x == 0) work.values[blockIdx.x] = total;
}

// ---- Partial sums

struct Partials {
  const double* values;  // [num_values, blocks_of_batch]
  double* value;
  int64_t num_values, blocks_of_batch;
  const void* sums;  // [splits, count]
  void* out;
  Element out_element;
  int64_t splits, count;
};

// The first blocks add up a value each, the others the sums.
template <typename C>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const Partials __grid_constant__ p) {
  if (blockIdx.x < p.num_values) {
    double value = 0;
    for (int64_t i = threadIdx.x; i < p.blocks_of_batch; i += kCombineThreads)
      value += p.values[blockIdx.x * p.blocks_of_batch + i];
    value = block_sum<kCombineThreads>(value);
    if (threadIdx.x == 0) p.value[blockIdx.x] = value;
    return;
  }
  const int64_t begin = (blockIdx.x - p.num_values) * kCombined;
  for (int64_t i = begin + threadIdx.x; i < min(begin + kCombined, p.count); i += kCombineThreads) {
    C sum = 0;
    for (int64_t split = 0; split < p.splits; ++split)
      sum += static_cast<const C*>(p.sums)[split * p.count + i];
    store_element(p.out, p.out_element, i, sum);
  }
}

// ---- Launching

int64_t size_of(Element element) {
  return element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2;
}

int64_t compute_size(Element element) { return element == Element::kFloat64 ? 8 : 4; }

bool is_compute_type(Element element) { return size_of(element) == compute_size(element); }

Points points(const void* data, int64_t rows, int64_t depth, Element element) {
  const int64_t piece = element == Element::kFloat64 ? kPiece<double> : kPiece<float>;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const bool vectors = depth % piece == 0 && address % (piece * size_of(element)) == 0;
  return {data, rows, depth, element, vectors};
}

void check_mixture(const Mixture& mixture) {
  if (mixture.count > kMaxComponents)
    throw std::invalid_argument("gaussian: CUDA takes mixtures of at most 128 components");
}

unsigned grid_size(int64_t blocks) {
  if (blocks > kMaxBlocks) throw std::invalid_argument("gaussian: too many rows");
  return static_cast<unsigned>(blocks);
}

// A launch's work without its arrays: the tiles of [n, m] pairs, and among how many blocks the
// tiles of a row are split.
Work cut(int64_t batch, int64_t n, int64_t m) {
  Work work{};
  work.batch = batch;
  work.row_tiles = ceil_div(n, kTile);
  work.column_tiles = ceil_div(m, kTile);
  const int64_t rows = batch * work.row_tiles;
  int64_t splits = rows > 0 ? kTargetBlocks / rows : 1;
  splits = splits < 1 ? 1 : splits > work.column_tiles ? work.column_tiles : splits;
  work.tiles_of_split = splits > 0 ? ceil_div(work.column_tiles, splits) : 0;
  work.splits = splits > 0 ? ceil_div(work.column_tiles, work.tiles_of_split) : 0;
  return work;
}

Work cut(const Energy& problem) {
  Work work = cut(problem.batch, problem.count, problem.count);
  const int64_t tiles = work.row_tiles * (work.row_tiles + 1) / 2;
  const int64_t most = ceil_div(kTargetBlocks, problem.batch < 1 ? 1 : problem.batch);
  work.blocks_of_batch = problem.gradient ? work.row_tiles * work.splits
                         : tiles < most   ? tiles
                                          : most;
  return work;
}

// Calls body(zero, mode) for the type that is computed in and the way products are taken.
template <Mode kMode>
struct ModeConstant {
  static constexpr Mode value = kMode;
};
template <typename Body>
void dispatch(Element element, int64_t d, Precision precision, Body body) {
  if (element == Element::kFloat64) {
    if (d <= 8) return body(double{}, ModeConstant<Mode::kDifferences>{});
    return body(double{}, ModeConstant<Mode::kMultiply>{});
  }
  if (d < 16) return body(float{}, ModeConstant<Mode::kDifferences>{});
  if (precision == Precision::kTF32) return body(float{}, ModeConstant<Mode::kTf32>{});
  return body(float{}, ModeConstant<Mode::kTf32x3>{});
}

template <typename C>
size_t shared_bytes(const Work& work, Vectors vectors) {
  const bool shares_weights =
      work.num_products > 1 || (vectors == Vectors::kWide && sizeof(C) == sizeof(double));
  return (kShared<C> + (shares_weights ? kWeights<C> : 0)) * sizeof(C);
}

void combine(const Partials& partials, Element element, cuda_stream stream) {
  const int64_t blocks = partials.num_values + ceil_div(partials.count, kCombined);
  if (blocks == 0) return;
  const dim3 grid(grid_size(blocks)), block(kCombineThreads);
  if (element == Element::kFloat64) {
    HESSREG_LAUNCH((combine_kernel<double>), grid, block, 0, stream, partials);
  } else {
    HESSREG_LAUNCH((combine_kernel<float>), grid, block, 0, stream, partials);
  }
}

Work work_of(const Matrix& problem) {
  Work work = cut(problem.batch, problem.n, problem.m);
  work.pairs[0] = {points(problem.x, problem.n, problem.d, problem.element),
                   points(problem.y, problem.m, problem.d, problem.element)};
  work.num_products = 1;
  work.mixture = problem.mixture;
  work.out = problem.out;
  work.out_element = problem.element;
  return work;
}

// Whether the sums of the blocks are not yet those asked for, or cannot be added up where they go.
bool needs_partials(const Sum& problem, const Work& work) {
  const bool has_chunks = problem.e * compute_size(problem.element) > kWide<char>;
  return work.splits != 1 || (has_chunks && !is_compute_type(problem.element));
}

Work work_of(const Sum& problem, void* scratch) {
  const Element element = problem.element;
  Work work = cut(problem.batch, problem.n, problem.m);
  work.pairs[0] = {points(problem.x, problem.n, problem.d, element),
                   points(problem.y, problem.m, problem.d, element)};
  for (int64_t l = 0; l < problem.num_factors; ++l) {
    const Factor& factor = problem.factors[l];
    work.pairs[1 + l] = {points(factor.left, problem.n, factor.rank, element),
                         points(factor.right, problem.m, factor.rank, element)};
  }
  work.num_products = 1 + static_cast<int>(problem.num_factors);
  work.v = points(problem.v, problem.m, problem.e, element);
  work.mixture = problem.mixture;
  work.out = problem.out;
  work.out_element = element;
  work.partials = needs_partials(problem, work) ? scratch
                  : is_compute_type(element)    ? problem.out
                                                : nullptr;
  return work;
}

template <typename C, Mode kMode>
void launch_sum(const Work& work, cuda_stream stream) {
  const dim3 grid(grid_size(work.batch * work.row_tiles * work.splits)), block(kThreads);
  if (grid.x == 0) return;
  if (work.v.depth > kNarrow<C>) {
    HESSREG_LAUNCH((sum_kernel<C, kMode, Vectors::kWide>), grid, block,
                   shared_bytes<C>(work, Vectors::kWide), stream, work);
  } else {
    HESSREG_LAUNCH((sum_kernel<C, kMode, Vectors::kNarrow>), grid, block,
                   shared_bytes<C>(work, Vectors::kNarrow), stream, work);
  }
}

// Whether the blocks of an energy leave partial sums.
bool has_partial_values(const Work& work) { return work.blocks_of_batch != 1; }
bool has_partial_gradients(const Energy& problem, const Work& work) {
  return problem.gradient && work.splits > 1;
}

Work work_of(const Energy& problem, double* scratch) {
  Work work = cut(problem);
  const Points z = points(problem.z, problem.count, problem.d, problem.element);
  work.pairs[0] = {z, z};
  work.num_products = 1;
  work.v = z;
  work.mixture = problem.mixture;
  work.first = problem.first;
  work.within_first = problem.within_first;
  work.across = problem.across;
  work.within_rest = problem.within_rest;
  const bool has_values = has_partial_values(work);
  double* gradients = scratch + (has_values ? work.batch * work.blocks_of_batch : 0);
  work.values = has_values ? scratch : problem.value;
  work.partials = has_partial_gradients(problem, work) ? gradients : problem.gradient;
  return work;
}

Partials partials_of(const Energy& problem, const Work& work) {
  Partials partials{};
  if (has_partial_values(work)) {
    partials.values = work.values;
    partials.value = problem.value;
    partials.num_values = problem.batch;
    partials.blocks_of_batch = work.blocks_of_batch;
  }
  if (has_partial_gradients(problem, work)) {
    const bool wide = problem.element == Element::kFloat64;
    partials.sums = work.partials;
    partials.out = problem.gradient;
    partials.out_element = wide ? Element::kFloat64 : Element::kFloat32;
    partials.splits = work.splits;
    partials.count = problem.batch * problem.count * problem.d;
  }
  return partials;
}

template <typename C, Mode kMode>
void launch_energy(const Work& work, bool has_gradient, cuda_stream stream) {
  constexpr auto kGradient = kMode == Mode::kDifferences ? Vectors::kNarrow : Vectors::kWide;
  const dim3 grid(grid_size(work.batch * work.blocks_of_batch)), block(kThreads);
  if (grid.x == 0) return;
  if (has_gradient) {
    HESSREG_LAUNCH((energy_kernel<C, kMode, kGradient>), grid, block,
                   shared_bytes<C>(work, kGradient), stream, work);
  } else {
    HESSREG_LAUNCH((energy_kernel<C, kMode, Vectors::kNone>), grid, block,
                   shared_bytes<C>(work, Vectors::kNone), stream, work);
  }
}

}  // namespace

int64_t scratch_bytes(const Sum& problem) {
  const Work work = cut(problem.batch, problem.n, problem.m);
  if (!needs_partials(problem, work)) return 0;
  return work.splits * problem.batch * problem.n * problem.e * compute_size(problem.element);
}

int64_t scratch_bytes(const Energy& problem) {
  const Work work = cut(problem);
  const int64_t values = has_partial_values(work) ? problem.batch * work.blocks_of_batch : 0;
  const int64_t gradients = has_partial_gradients(problem, work)
                                ? work.splits * problem.batch * problem.count * problem.d
                                : 0;
  return values * int64_t{sizeof(double)} + gradients * compute_size(problem.element);
}

void matrix(const Matrix& problem, Precision precision, void* stream) {
  check_mixture(problem.mixture);
  const Work work = work_of(problem);
  const dim3 grid(grid_size(work.batch * work.row_tiles * work.column_tiles)), block(kThreads);
  if (grid.x == 0) return;
  dispatch(problem.element, problem.d, precision, [&](auto zero, auto mode) {
    using C = decltype(zero);
    HESSREG_LAUNCH((matrix_kernel<C, decltype(mode)::value>), grid, block,
                   shared_bytes<C>(work, Vectors::kNone), static_cast<cuda_stream>(stream), work);
  });
}

void sum(const Sum& problem, Precision precision, void* scratch, void* stream_) {
  const auto stream = static_cast<cuda_stream>(stream_);
  check_mixture(problem.mixture);
  if (problem.num_factors > kMaxFactors)
    throw std::invalid_argument("gaussian: CUDA takes at most 8 factors");
  const int64_t size = problem.batch * problem.n * problem.e;
  if (size == 0) return;
  const Work work = work_of(problem, scratch);
  dispatch(problem.element, problem.d, precision, [&](auto zero, auto mode) {
    launch_sum<decltype(zero), decltype(mode)::value>(work, stream);
  });
  if (!needs_partials(problem, work)) return;
  Partials partials{};
  partials.sums = scratch;
  partials.out = problem.out;
  partials.out_element = problem.element;
  partials.splits = work.splits;
  partials.count = size;
  combine(partials, problem.element, stream);
}

void energy(const Energy& problem, Precision precision, void* scratch, void* stream_) {
  const auto stream = static_cast<cuda_stream>(stream_);
  check_mixture(problem.mixture);
  const Work work = work_of(problem, static_cast<double*>(scratch));
  dispatch(problem.element, problem.d, precision, [&](auto zero, auto mode) {
    launch_energy<decltype(zero), decltype(mode)::value>(work, problem.gradient, stream);
  });
  combine(partials_of(problem, work), problem.element, stream);
}

}  // namespace hessreg::gaussian::cuda
