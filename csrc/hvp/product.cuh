// Sums of up to two products of matrices, and what becomes of each element before it is stored.
//
// A block computes a square tile of an output in steps. Of each operand a step has kDepth columns,
// which lie transposed in one of two stages in shared memory; the next step's are on their way to
// registers while it is computed.
#pragma once

#include "../common/cuda_compat.cuh"
#include "hvp.h"

namespace hessreg::hvp::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kDepth = 16;   // of a step
constexpr int kColumns = 4;  // of a tile that one thread has
constexpr int kMaxProducts = 8;

__device__ inline int lane_index() { return threadIdx.x % 32; }
__device__ inline int warp_index() { return threadIdx.x / 32; }

// A matrix [rows, depth] for each direction.
struct Operand {
  const void* data;   // null: there is none
  const void* scale;  // of a right operand: factors of its elements for all directions; or null
  int64_t row_stride, depth_stride, direction_stride;
};

// left right', for left [rows, depth] and right [columns, depth].
struct Term {
  Operand left, right;
};

// What becomes of an element. Where the next layer is computed by the same block, it is given on.
enum class Finish {
  kStore,
  kActivate,  // out: f, f', f'', f''' if there is room for it; which is given on: f
  kTangent,   // given on: first o value
  kBackward,  // out: first o value, given on; second o value; third o value if there is third
  kAdjoint,   // first o value + s o rz, given on; out: that; value if there is room for it
  // Of two directions and both, 0, 1, 2, side by side in rz, rg and what is written:
  kSecondTangent,  // out: value, which is R z of 2; R a of 0, 1, 2
  kSecondAdjoint,  // R delta of 2, from R g of 0 and 1 and the value, which is that of 2
};

struct Epilogue {
  Finish finish;
  Activation activation;
  double parameter;
  const void* bias;     // [rows], or null
  int64_t bias_stride;  // from direction to direction
  void* out[4];
  int64_t row_stride, column_stride, direction_stride;
  const void* added;  // to what is stored, as the output; or null
  // As the output for one direction, and rz and rg for all. Without s, it is zero.
  const void *first, *second, *third, *s, *t, *rz, *rg;
};

struct Product {
  Term terms[2];
  int64_t rows, columns, depth;
  Epilogue epilogue;
  void* row_sums;  // [rows] for each direction: the sums over the first left operand; or null
  void* partials;  // [splits, directions, partial_size()] if splits > 1
  int64_t splits, depth_of_split;
  int64_t row_tiles, column_tiles, first_block;

  HESSREG_HD int64_t partial_size() const { return rows * columns + rows; }
};

// The products of one launch.
struct Group {
  Product products[kMaxProducts];
  int64_t count, directions;
};

__device__ __forceinline__ const Product& product_of_block(const Group& group) {
  int64_t found = 0;
  for (int64_t p = 1; p < group.count; ++p)
    if (group.products[p].first_block <= blockIdx.x) found = p;
  return group.products[found];
}

template <typename C>
__device__ __forceinline__ C element(const void* data, int64_t index) {
  return static_cast<const C*>(data)[index];
}

template <typename C>
__device__ __forceinline__ void put(void* out, int64_t index, C value) {
  static_cast<C*>(out)[index] = value;
}

// f'' o R_1 z o R_2 z + f' o R_12 z, the last of them the value; writes R a.
template <typename C>
__device__ __forceinline__ void finish_second_tangent(const Epilogue& e, int64_t index, C value) {
  const int64_t step = e.direction_stride;
  const C first = element<C>(e.first, index);
  const C z0 = element<C>(e.rz, index), z1 = element<C>(e.rz, step + index);
  put(e.out[1], index, first * z0);
  put(e.out[1], step + index, first * z1);
  put(e.out[1], 2 * step + index, element<C>(e.second, index) * z0 * z1 + first * value);
}

// R_12 delta, from R_12 g.
template <typename C>
__device__ __forceinline__ C second_adjoint(const Epilogue& e, int64_t index, C value) {
  const int64_t step = e.direction_stride;
  const C z0 = element<C>(e.rz, index), z1 = element<C>(e.rz, step + index);
  const C crossed = z0 * element<C>(e.rg, step + index) + z1 * element<C>(e.rg, index);
  return element<C>(e.first, index) * value + element<C>(e.second, index) * crossed +
         element<C>(e.s, index) * element<C>(e.rz, 2 * step + index) +
         element<C>(e.t, index) * z0 * z1;
}

// Stores what becomes of an element, and returns what is given on.
template <typename C>
__device__ __forceinline__ C finish(const Epilogue& e, int64_t direction, int64_t row,
                                    int64_t column, C value) {
  const int64_t index = row * e.row_stride + column * e.column_stride;
  const int64_t own = direction * e.direction_stride + index;
  if (e.bias) value += element<C>(e.bias, direction * e.bias_stride + row);
  if (e.added) value += element<C>(e.added, own);
  C next = value;
  if (e.finish == Finish::kActivate) {
    const Jet<C> jet = activate<ScalarMath<C>>(e.activation, static_cast<C>(e.parameter), value);
    put(e.out[1], own, jet.first);
    put(e.out[2], own, jet.second);
    if (e.out[3]) put(e.out[3], own, jet.third);
    value = next = jet.value;
  } else if (e.finish == Finish::kSecondTangent) {
    finish_second_tangent(e, index, value);
  } else if (e.finish == Finish::kSecondAdjoint) {
    value = second_adjoint(e, index, value);
  } else if (e.finish != Finish::kStore) {
    next *= element<C>(e.first, index);
    if (e.finish == Finish::kBackward) {
      put(e.out[1], own, element<C>(e.second, index) * value);
      if (e.third) put(e.out[2], own, element<C>(e.third, index) * value);
    }
    if (e.finish == Finish::kAdjoint) {
      if (e.s) next += element<C>(e.s, index) * element<C>(e.rz, own);
      if (e.out[1]) put(e.out[1], own, value);
    }
    if (e.finish != Finish::kTangent) value = next;
  }
  put(e.out[0], own, value);
  return next;
}

// ---- Products in shared memory

template <typename C>
constexpr int kPiece = 16 / sizeof(C);  // elements moved by one instruction

template <typename C, int kCount>
struct alignas(kCount * sizeof(C)) Pack {
  C values[kCount];
};

template <int kCount, typename C>
__device__ __forceinline__ void load_pack(const C* from, C* to) {
  const auto pack = *reinterpret_cast<const Pack<C, kCount>*>(from);
  HESSREG_UNROLL
  for (int i = 0; i < kCount; ++i) to[i] = pack.values[i];
}

template <int kCount, typename C>
__device__ __forceinline__ void store_pack(const C* from, C* to) {
  Pack<C, kCount> pack;
  HESSREG_UNROLL
  for (int i = 0; i < kCount; ++i) pack.values[i] = from[i];
  *reinterpret_cast<Pack<C, kCount>*>(to) = pack;
}

// Who has what of a tile that is kWidth columns wide, with kRows rows of a thread.
template <typename C, int kWidth, int kRows>
struct Share {
  static constexpr int kAcross = kWidth / kColumns;  // threads side by side
  static constexpr int kRowPack = kRows < kPiece<C> ? kRows : kPiece<C>;
  static constexpr int kColumnPack = kColumns < kPiece<C> ? kColumns : kPiece<C>;

  __device__ static int row() { return threadIdx.x / kAcross * kRows; }
  // Pieces of neighbours are neighbours: no bank conflicts.
  __device__ static int column(int c) {
    return (c / kColumnPack * kAcross + threadIdx.x % kAcross) * kColumnPack + c % kColumnPack;
  }

  // sums += left' right for left [depth, rows] and right [depth, columns] in shared memory.
  __device__ static __forceinline__ void multiply(const C* left, int left_stride, const C* right,
                                                  int right_stride, int depth,
                                                  C (&sums)[kRows][kColumns]) {
    left += row();
    HESSREG_UNROLL
    for (int k = 0; k < depth; ++k) {
      C a[kRows], b[kColumns];
      HESSREG_UNROLL
      for (int r = 0; r < kRows; r += kRowPack) load_pack<kRowPack>(left + r, a + r);
      HESSREG_UNROLL
      for (int c = 0; c < kColumns; c += kColumnPack)
        load_pack<kColumnPack>(right + column(c), b + c);
      HESSREG_UNROLL
      for (int i = 0; i < kRows * kColumns; ++i)
        sums[i / kColumns][i % kColumns] += a[i / kColumns] * b[i % kColumns];
      left += left_stride;
      right += right_stride;
    }
  }

  __device__ static __forceinline__ void store(const C (&sums)[kRows][kColumns], C* tile,
                                               int stride) {
    HESSREG_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HESSREG_UNROLL
      for (int c = 0; c < kColumns; c += kColumnPack)
        store_pack<kColumnPack>(sums[r] + c, tile + (row() + r) * stride + column(c));
    }
  }
};

// ---- Tiles

template <typename C, int kTile>
struct TileShape {
  static constexpr int kAcross = kTile / kColumns;
  static constexpr int kRows = kTile * kAcross / kThreads;
  static constexpr int kStride = kTile + kPiece<C>;
  static constexpr int kStage = 2 * kDepth * kStride;  // elements: the left operand, the right one
  static constexpr int kOwn = kTile * kDepth / kThreads;  // of one operand that one thread loads
  using Threads = Share<C, kTile, kRows>;
  static_assert(kTile * kStride <= 2 * kStage);  // the tile takes the place of the stages
};

template <typename C, int kTile>
struct alignas(16) Stages {
  C values[2][TileShape<C, kTile>::kStage];
};

// Where a step of one operand begins, and where the operand ends.
struct Window {
  int64_t row0, rows, k0, depth;
};

// The elements of a step that one thread loads: lanes lie where memory is contiguous, and write to
// the stage without bank conflicts.
template <int kTile>
struct Places {
  int row, k;          // of the first
  int row_far, k_far;  // from one pair to the next
  int k_near;          // within a pair

  __device__ __forceinline__ explicit Places(bool depth_is_contiguous) {
    if (depth_is_contiguous) {
      row = warp_index() * 4 + lane_index() / 8;
      k = lane_index() % 8;
      row_far = 4 * kWarps;
      k_far = 0;
      k_near = 8;
    } else {
      row = threadIdx.x % kTile;
      k = threadIdx.x / kTile;
      row_far = 0;
      k_near = kThreads / kTile;
      k_far = 2 * k_near;
    }
  }
  __device__ __forceinline__ int row_of(int i) const { return row + i / 2 * row_far; }
  __device__ __forceinline__ int k_of(int i) const { return k + i / 2 * k_far + i % 2 * k_near; }
};

// A count that is only compared with places in a tile.
__device__ __forceinline__ int clamped(int64_t count) {
  return static_cast<int>(min(count, int64_t{1024}));
}

// The elements of an operand, or its factors: data + offset.
template <typename C, int kTile>
__device__ __forceinline__ void load(const Operand& operand, const void* data, int64_t offset,
                                     const Window& w, C (&values)[TileShape<C, kTile>::kOwn]) {
  const Places<kTile> places(operand.depth_stride == 1);
  const int64_t first =
      (w.row0 + places.row) * operand.row_stride + (w.k0 + places.k) * operand.depth_stride;
  const int64_t far = places.row_far * operand.row_stride + places.k_far * operand.depth_stride;
  const int64_t near = places.k_near * operand.depth_stride;
  const int rows = clamped(w.rows - w.row0), depth = clamped(w.depth - w.k0);
  HESSREG_UNROLL
  for (int i = 0; i < TileShape<C, kTile>::kOwn; ++i) {
    const bool inside = places.row_of(i) < rows && places.k_of(i) < depth;
    values[i] = inside ? element<C>(data, offset + first + i / 2 * far + i % 2 * near) : C(0);
  }
}

// The same of a symmetric matrix [n, n], of which only the lower triangle is read.
template <typename C, int kTile>
__device__ __forceinline__ void load_symmetric(const Operand& operand, int64_t direction,
                                               const Window& w,
                                               C (&values)[TileShape<C, kTile>::kOwn]) {
  const int64_t n = w.rows;
  const Places<kTile> places(w.k0 <= w.row0);
  const C* data = static_cast<const C*>(operand.data) + direction * operand.direction_stride;
  HESSREG_UNROLL
  for (int i = 0; i < TileShape<C, kTile>::kOwn; ++i) {
    const int64_t row = w.row0 + places.row_of(i), k = w.k0 + places.k_of(i);
    const bool inside = row < n && k < w.depth;
    values[i] = inside ? data[max(row, k) * n + min(row, k)] : C(0);
  }
}

template <typename C, int kTile>
__device__ __forceinline__ void put_in_stage(const C (&values)[TileShape<C, kTile>::kOwn],
                                             bool depth_is_contiguous, C* stage) {
  const Places<kTile> places(depth_is_contiguous);
  HESSREG_UNROLL
  for (int i = 0; i < TileShape<C, kTile>::kOwn; ++i)
    stage[places.k_of(i) * TileShape<C, kTile>::kStride + places.row_of(i)] = values[i];
}

// One tile of one product, for one direction and a part of the depth.
template <typename C, int kTile, bool kSymmetric>
class TileTask {
  using Shape = TileShape<C, kTile>;
  using Threads = typename Shape::Threads;

 public:
  __device__ __forceinline__ TileTask(const Group& group, const Product& product)
      : product_(product), directions_(group.directions) {
    int64_t rest = blockIdx.x - product.first_block;
    column0_ = rest % product.column_tiles * kTile;
    rest /= product.column_tiles;
    row0_ = rest % product.row_tiles * kTile;
    rest /= product.row_tiles;
    split_ = rest % product.splits;
    direction_ = rest / product.splits;
    begin_ = split_ * product.depth_of_split;  // a whole number of steps
    const int64_t depth = min(product.depth_of_split, product.depth - begin_);
    steps_of_term_ = static_cast<int>((depth + kDepth - 1) / kDepth);
  }

  __device__ __forceinline__ void run(C (&stages)[2][Shape::kStage]) {
    C sums[Shape::kRows][kColumns] = {}, row_sum = 0;
    const int steps = steps_of_term_ * (has_term(0) + has_term(1));
    if (steps > 0) {
      fetch(0);
      put_step(0, stages[0]);
    }
    __syncthreads();
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) fetch(step + 1);
      const C* stage = stages[step % 2];
      Threads::multiply(stage, Shape::kStride, stage + kDepth * Shape::kStride, Shape::kStride,
                        kDepth, sums);
      if (sums_rows() && step < steps_of_term_) row_sum += sum_of_row(stage);
      if (step + 1 < steps) put_step(step + 1, stages[(step + 1) % 2]);
      __syncthreads();
    }
    C* tile = stages[0];
    Threads::store(sums, tile, Shape::kStride);
    __syncthreads();
    finish_tile(tile);
    if (sums_rows()) finish_row(row_sum);
  }

 private:
  __device__ __forceinline__ bool has_term(int t) const {
    return product_.terms[t].left.data != nullptr;
  }
  __device__ __forceinline__ const Term& term_of(int step) const {
    return product_.terms[step >= steps_of_term_ || !has_term(0)];
  }
  // Where a step begins along the depth. Of a symmetric matrix, a part of the lower triangle is
  // taken at the same time by the two blocks that need it: the second finds it in the cache.
  __device__ __forceinline__ int64_t depth_of(int step) const {
    const int step_of_term = step < steps_of_term_ ? step : step - steps_of_term_;
    const int64_t k0 = begin_ + step_of_term * kDepth;
    if (!kSymmetric) return k0;
    const int64_t turned = k0 - row0_;
    return turned < 0 ? turned + (product_.depth + kDepth - 1) / kDepth * kDepth : turned;
  }

  __device__ __forceinline__ void fetch(int step) {
    const Term& term = term_of(step);
    const int64_t k0 = depth_of(step);
    const Window left{row0_, product_.rows, k0, product_.depth};
    const Window right{column0_, product_.columns, k0, product_.depth};
    if constexpr (kSymmetric) {
      load_symmetric<C, kTile>(term.left, direction_, left, left_);
    } else {
      load<C, kTile>(term.left, term.left.data, direction_ * term.left.direction_stride, left,
                     left_);
    }
    load<C, kTile>(term.right, term.right.data, direction_ * term.right.direction_stride, right,
                   right_);
    if (!kSymmetric && term.right.scale)
      load<C, kTile>(term.right, term.right.scale, 0, right, factors_);
  }

  // Only here what has been loaded is waited for.
  __device__ __forceinline__ void put_step(int step, C* stage) {
    const Term& term = term_of(step);
    if (!kSymmetric && term.right.scale) {
      HESSREG_UNROLL
      for (int i = 0; i < Shape::kOwn; ++i) right_[i] *= factors_[i];
    }
    const bool along_depth = kSymmetric ? depth_of(step) <= row0_ : term.left.depth_stride == 1;
    put_in_stage<C, kTile>(left_, along_depth, stage);
    put_in_stage<C, kTile>(right_, term.right.depth_stride == 1, stage + kDepth * Shape::kStride);
  }

  // One of the tiles side by side adds up the rows of the first left operand.
  __device__ __forceinline__ bool sums_rows() const {
    return !kSymmetric && product_.row_sums && column0_ == 0 && threadIdx.x < kTile;
  }
  __device__ __forceinline__ C sum_of_row(const C* stage) const {
    C sum = 0;
    for (int k = 0; k < kDepth; ++k) sum += stage[k * Shape::kStride + threadIdx.x];
    return sum;
  }

  // The elements of the tile so that neighbours store to neighbours.
  __device__ __forceinline__ void finish_tile(const C* tile) const {
    constexpr int kDown = kTile / 8, kRowsAtOnce = kThreads / kTile;
    const bool along_rows = product_.epilogue.row_stride == 1;
    for (int i = 0; i < kTile * kTile / kThreads; ++i) {
      const int patch = warp_index() + i * kWarps;  // 8 x 4
      const int row =
          along_rows ? patch % kDown * 8 + lane_index() % 8 : threadIdx.x / kTile + i * kRowsAtOnce;
      const int column = along_rows ? patch / kDown * 4 + lane_index() / 8 : threadIdx.x % kTile;
      if (row0_ + row >= product_.rows || column0_ + column >= product_.columns) continue;
      finish_element(row0_ + row, column0_ + column, tile[row * Shape::kStride + column]);
    }
  }

  __device__ __forceinline__ void finish_element(int64_t row, int64_t column, C value) const {
    if (product_.splits > 1) {
      put(product_.partials, partial() + row * product_.columns + column, value);
    } else {
      finish(product_.epilogue, direction_, row, column, value);
    }
  }

  __device__ __forceinline__ void finish_row(C sum) const {
    const int64_t row = row0_ + threadIdx.x;
    if (row >= product_.rows) return;
    if (product_.splits > 1) {
      put(product_.partials, partial() + product_.rows * product_.columns + row, sum);
    } else {
      put(product_.row_sums, direction_ * product_.epilogue.direction_stride + row, sum);
    }
  }

  __device__ __forceinline__ int64_t partial() const {
    return (split_ * directions_ + direction_) * product_.partial_size();
  }

  const Product& product_;
  int64_t directions_, direction_, split_, row0_, column0_, begin_;
  int steps_of_term_;
  C left_[Shape::kOwn], right_[Shape::kOwn], factors_[Shape::kOwn];
};

// Blocks at once on a multiprocessor, as registers allow; without it, ptxas spills to save them.
template <typename C, int kTile>
constexpr int kResident = sizeof(C) == sizeof(double) && kTile == 64 ? 2 : 4;

// One block a tile, direction and part of the depth.
template <typename C, int kTile, bool kSymmetric>
__global__ void __launch_bounds__(kThreads, kResident<C, kTile>)
    product_kernel(const Group __grid_constant__ group) {
  using Memory = Stages<C, kTile>;
  HESSREG_SHARED(Memory, stages, [1]);
  TileTask<C, kTile, kSymmetric>(group, product_of_block(group)).run(stages[0].values);
}

// ---- Partial sums

constexpr int kCombined = 4 * kThreads;  // elements of one block

// Adds up what the parts of the depth gave, always in the same order.
template <typename C>
__global__ void __launch_bounds__(kThreads) combine_kernel(const Group __grid_constant__ group) {
  const Product& p = product_of_block(group);
  const int64_t size = p.partial_size(), matrix = p.rows * p.columns;
  const int64_t begin = (blockIdx.x - p.first_block) * kCombined;
  const int64_t end = min(begin + kCombined, group.directions * size);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t direction = i / size, e = i % size;
    if (e >= matrix && !p.row_sums) continue;
    C sum = 0;
    for (int64_t split = 0; split < p.splits; ++split)
      sum += element<C>(p.partials, split * group.directions * size + i);
    if (e < matrix) {
      const Epilogue& to = p.epilogue;
      const int64_t at = direction * to.direction_stride + e / p.columns * to.row_stride +
                         e % p.columns * to.column_stride;
      put(to.out[0], at, to.added ? sum + element<C>(to.added, at) : sum);
    } else {
      put(p.row_sums, direction * p.epilogue.direction_stride + e - matrix, sum);
    }
  }
}

// ---- Transposition

// out[columns, rows] = in[rows, columns]
template <typename C>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const C* in, C* out, int64_t rows, int64_t columns) {
  constexpr int kTile = 32;
  HESSREG_SHARED(C, tile, [kTile][kTile + 1]);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x / tiles * kTile, column0 = blockIdx.x % tiles * kTile;
  for (int r = warp_index(); r < kTile; r += kWarps) {
    const int64_t row = row0 + r, column = column0 + lane_index();
    if (row < rows && column < columns) tile[r][lane_index()] = in[row * columns + column];
  }
  __syncthreads();
  for (int c = warp_index(); c < kTile; c += kWarps) {
    const int64_t row = row0 + lane_index(), column = column0 + c;
    if (row < rows && column < columns) out[column * rows + row] = tile[lane_index()][c];
  }
}

}  // namespace hessreg::hvp::cuda
