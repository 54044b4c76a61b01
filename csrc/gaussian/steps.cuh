// What a launch works on, and how a block goes through its tiles.
#pragma once

#include "pair_tile.cuh"

namespace hessreg::gaussian::cuda {

struct Pair {
  Points left, right;
};

// It travels in the launch's parameters. Rows are cut into tiles, and the tiles of a row among
// `splits` blocks, whose partial sums are then added in their order.
struct Work {
  Pair pairs[1 + kMaxFactors];  // the points, then the factors
  Points v;
  Mixture mixture;
  int num_products;  // of pairs
  int64_t batch, row_tiles, column_tiles, splits, tiles_of_split;
  void*
      partials;  // [splits, batch, rows, width] in the type of computation; null: out takes it all
  void* out;
  Element out_element;
  // Of energies only.
  int64_t first, blocks_of_batch;
  double within_first, across, within_rest;
  double* values;  // [batch, blocks_of_batch]
};

// Where a block is: at a chunk of the columns of one product of a tile, or of v when all products
// are done.
struct Step {
  int64_t position;  // of the tile in the block's sequence
  Tile tile;
  int product, chunk;
};

// Tiles [begin, end) of one row of tiles.
struct RowOfTiles {
  int64_t batch, begin, end;
  int row;
  __device__ int64_t stride() const { return 1; }
  __device__ Tile tile(int64_t position) const { return {row, static_cast<int>(position)}; }
};

// Every so-manieth tile (I, J), I <= J, of a square, counted along its columns.
struct UpperTriangle {
  int64_t batch, begin, end, step;
  __device__ int64_t stride() const { return step; }
  __device__ Tile tile(int64_t position) const {
    auto column = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(position) + 1) - 1) / 2);
    while (column * (column + 1) / 2 > position) --column;
    while ((column + 1) * (column + 2) / 2 <= position) ++column;
    const int64_t row = position - column * (column + 1) / 2;
    return {static_cast<int>(row), static_cast<int>(column)};
  }
};

// The vectors that weights are multiplied with: none, or a few in registers, or many by chunks.
enum class Vectors { kNone, kNarrow, kWide };

// Vectors of more than one chunk are finished tile by tile: their sums do not fit in registers.
template <typename C, Vectors kVectors>
__device__ __forceinline__ bool has_chunks(const Work& work) {
  return kVectors == Vectors::kWide && work.v.depth > kWide<C>;
}

template <typename C>
__device__ __forceinline__ int64_t first_column(const Work& work, const Step& step) {
  return int64_t{step.chunk} * (step.product == work.num_products ? kWide<C> : kDepth<C>);
}

template <typename C, Vectors kVectors, typename Tiles>
__device__ __forceinline__ Step step_after(const Work& work, const Tiles& tiles, Step step) {
  const bool is_v = step.product == work.num_products;
  const int64_t depth = is_v ? work.v.depth : work.pairs[step.product].left.depth;
  ++step.chunk;
  if (first_column<C>(work, step) < depth) return step;
  step.chunk = 0;
  if (++step.product < work.num_products + (kVectors != Vectors::kNone)) return step;
  step.product = 0;
  step.position += tiles.stride();
  if (step.position < tiles.end) step.tile = tiles.tile(step.position);
  return step;
}

template <typename C, Vectors kVectors>
__device__ __forceinline__ void load_step(const Work& work, int64_t batch, const Step& step,
                                          C* stage) {
  const int64_t i0 = step.tile.i0(), j0 = step.tile.j0(), k0 = first_column<C>(work, step);
  if (step.product < work.num_products) {
    const Pair& pair = work.pairs[step.product];
    load_operand(stage, pair.left, batch, i0, k0);
    load_operand(stage + kTile * kStride<C>, pair.right, batch, j0, k0);
  } else if constexpr (kVectors == Vectors::kNarrow) {
    load_operand(stage, work.v, batch, j0, 0);
  } else if constexpr (kVectors == Vectors::kWide) {
    load_wide(stage, work.v, batch, j0, k0);
  }
  cp_async_commit();
}

// The norms of a tile's points, as far as this thread has seen them.
template <typename C>
struct NormSums {
  C left[kNormsOfThread] = {}, right[kNormsOfThread] = {};
};

template <Mode kMode, typename C>
__device__ __forceinline__ void centre_points(const Work& work, int64_t batch, const Step& step,
                                              bool is_last, C* stage, NormSums<C>& sums, C* norms) {
  const Points& x = work.pairs[0].left;
  const int64_t k0 = first_column<C>(work, step);
  const Piece<C> centre =
      centre_piece<C>(x, batch, step.tile.i0(), k0 + threadIdx.x % 8 * kPiece<C>);
  centre_operand<kMode>(stage, x.depth - k0, centre, sums.left);
  centre_operand<kMode>(stage + kTile * kStride<C>, x.depth - k0, centre, sums.right);
  if (!is_last) return;
  store_norms(norms, sums.left);
  store_norms(norms + kTile, sums.right);
}

// Points as the vectors of a gradient. One that is not finite has weight zero or NaN: it is made
// zero, as zero times infinity would be NaN.
template <typename C>
__device__ __forceinline__ void centre_vectors(const Points& x, int64_t batch, int64_t i0,
                                               int64_t k0, C* stage) {
  const Piece<C> centre = centre_piece<C>(x, batch, i0, k0 + threadIdx.x % 16 * kPiece<C>);
  for_own_pieces<C, 16, kWideStride<C>>(stage, [&](C* target, int, int, int) {
    Piece<C> piece = load_shared(target);
    HESSREG_UNROLL
    for (int q = 0; q < kPiece<C>; ++q) {
      const C x = piece.values[q] - centre.values[q];
      piece.values[q] = std::isfinite(x) ? x : C(0);
    }
    *reinterpret_cast<Piece<C>*>(target) = piece;
  });
}

// Adds the chunk of a product that is in the stage to its sums; the last chunk of the first product
// turns them into squared distances.
template <typename C, Mode kMode, bool kHasFactors>
__device__ __forceinline__ void add_product(const Work& work, int64_t batch, const Step& step,
                                            bool is_last, const C* stage, const C* norms,
                                            C (&sums)[kRows][kColumns]) {
  const Pair& pair = work.pairs[step.product];
  const int64_t depth = pair.left.depth - first_column<C>(work, step);
  if (step.chunk == 0) clear(sums);
  if (kMode != Mode::kDifferences || step.product == 0) {
    multiply<kMode>(stage, depth, sums);
  } else if constexpr (kMode == Mode::kDifferences && kHasFactors) {
    multiply<Mode::kMultiply>(stage, depth, sums);
  }
  if (kMode != Mode::kDifferences && is_last && step.product == 0)
    products_to_distances(pair.left, pair.right, batch, step.tile, norms, sums);
}

// Goes through all steps of a block: task.take_product(...) has the sums of each product of a tile
// and leaves weights in their place; with these, task.take_vectors(...) has chunk after chunk of
// the vectors. While one stage is computed, the other is loaded; a barrier a step keeps them apart.
template <typename C, Mode kMode, Vectors kVectors, typename Tiles, typename Task>
__device__ __forceinline__ void run(const Work& work, const Tiles& tiles, C* shared, Task& task) {
  Step step{}, after{tiles.begin, tiles.tile(tiles.begin), 0, 0};
  NormSums<C> norm_sums;
  C sums[kRows][kColumns];
  bool is_loaded = false;  // nothing in the first round
  for (int current = 0, parity = 0;; current ^= 1) {
    const bool is_product = step.product < work.num_products;
    const bool is_last = after.product != step.product || after.position != step.position;
    C* stage = shared + current * kStage<C>;
    C* norms = shared + kStages<C> + parity * 2 * kTile;  // those before may still be read
    cp_async_wait<0>();
    if (kMode != Mode::kDifferences && is_loaded && step.product == 0)
      centre_points<kMode>(work, tiles.batch, step, is_last, stage, norm_sums, norms);
    if constexpr (Task::kCentresVectors)
      if (!is_product)
        centre_vectors(work.pairs[0].left, tiles.batch, step.tile.i0(), first_column<C>(work, step),
                       stage);
    __syncthreads();
    const bool goes_on = after.position < tiles.end;
    if (goes_on)
      load_step<C, kVectors>(work, tiles.batch, after, shared + (current ^ 1) * kStage<C>);
    if (is_loaded && is_product) {
      add_product<C, kMode, Task::kHasFactors>(work, tiles.batch, step, is_last, stage, norms,
                                               sums);
      if (is_last) task.take_product(step, stage, sums);
    } else if constexpr (kVectors != Vectors::kNone) {
      if (is_loaded) task.take_vectors(step, stage, sums);
    }
    if (!goes_on) return;
    if (after.position != step.position) parity ^= 1;
    step = after;
    after = step_after<C, kVectors>(work, tiles, step);
    is_loaded = true;
  }
}

}  // namespace hessreg::gaussian::cuda
