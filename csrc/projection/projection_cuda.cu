#include <stdexcept>
#include <string>

#include "../common/cuda_compat.cuh"
#include "projection_cuda.h"

namespace hessreg::projection::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxFused = 4;        // lists whose inner products all fit in registers
constexpr int64_t kMaxLists = 256;  // vectors in one call
constexpr int kMaxPositions = 96;   // tensors of a list in one launch
constexpr int kMaxPointers = 512;
constexpr int64_t kMaxBlocks = 0x7fffffff;

// As many tensors of the lists as one launch takes. It travels in the launch's parameters: there is
// no copy to the device to wait for, and a CUDA graph can record it.
struct Table {
  Position positions[kMaxPositions];
  const void* data[kMaxPointers];  // [num_lists, count], then the outputs [num_outputs, count]
  int64_t count, num_lists, segments, num_pieces;
};

__device__ float to_compute(float x) { return x; }
__device__ double to_compute(double x) { return x; }
__device__ float to_compute(__half x) { return __half2float(x); }
__device__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

__device__ void from_compute(float x, float* y) { *y = x; }
__device__ void from_compute(double x, double* y) { *y = x; }
__device__ void from_compute(float x, __half* y) { *y = __float2half(x); }
__device__ void from_compute(float x, __nv_bfloat16* y) { *y = __float2bfloat16(x); }

// Sixteen bytes of elements, moved by one instruction.
template <typename T>
constexpr int kPack = 16 / sizeof(T);
template <typename T>
struct alignas(16) Pack {
  T values[kPack<T>];
};

template <typename T>
__device__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T>) == 0;
}

template <typename T>
__device__ const T* element_pointer(const Table& x, int64_t list, const Piece& piece) {
  return static_cast<const T*>(x.data[list * x.count + piece.position]) + piece.offset;
}

__device__ Piece piece_of(const Table& x, int64_t number) {
  const int64_t position = position_of(x.positions, x.count, number);
  return locate(x.positions, position, x.segments, kPieceLength, number);
}

// Which two of `count` things the pair number `pair` is, first <= second.
struct PairOf {
  int64_t first = 0, second;
  __device__ PairOf(int64_t pair, int64_t count) {
    for (; pair >= count - first; ++first) pair -= count - first;
    second = first + pair;
  }
};

// The sum over the block, in thread 0. The order is fixed, so that equal inputs give equal bits.
__device__ double block_sum(double value) {
  HESSREG_SHARED(double, warp_sums, [kWarps]);
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 1; threadIdx.x == 0 && warp < kWarps; ++warp) value += warp_sums[warp];
  return value;
}

template <int M>
__device__ void add_products(const double (&v)[M], double* sums) {
  HESSREG_UNROLL
  for (int a = 0, pair = 0; a < M; ++a) {
    HESSREG_UNROLL
    for (int b = a; b < M; ++b, ++pair) sums[pair] += v[a] * v[b];
  }
}

// sums[a <= b] += this thread's share of <x_a, x_b> over n elements. Products of float32 are exact
// in float64.
template <typename T, int M>
__device__ void accumulate(const T* const (&x)[M], int64_t n, double* sums) {
  bool aligned = true;
  for (int a = 0; a < M; ++a) aligned = aligned && is_aligned(x[a]);
  const int64_t packs = aligned ? n / kPack<T> : 0;
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    Pack<T> p[M];
    HESSREG_UNROLL
    for (int a = 0; a < M; ++a) p[a] = reinterpret_cast<const Pack<T>*>(x[a])[i];
    HESSREG_UNROLL
    for (int e = 0; e < kPack<T>; ++e) {
      double v[M];
      HESSREG_UNROLL
      for (int a = 0; a < M; ++a) v[a] = to_compute(p[a].values[e]);
      add_products<M>(v, sums);
    }
  }
  for (int64_t i = packs * kPack<T> + threadIdx.x; i < n; i += kThreads) {
    double v[M];
    HESSREG_UNROLL
    for (int a = 0; a < M; ++a) v[a] = to_compute(x[a][i]);
    add_products<M>(v, sums);
  }
}

// One block a piece: partials[piece, pair] for all pairs of M lists.
template <typename T, int M>
__global__ void __launch_bounds__(kThreads)
    gram_kernel(const Table __grid_constant__ x, double* partials) {
  constexpr int kPairs = M * (M + 1) / 2;
  const Piece piece = piece_of(x, blockIdx.x);
  const T* pointers[M];
  HESSREG_UNROLL
  for (int a = 0; a < M; ++a) pointers[a] = element_pointer<T>(x, a, piece);
  double sums[kPairs] = {};
  accumulate<T, M>(pointers, piece.length, sums);
  HESSREG_UNROLL
  for (int pair = 0; pair < kPairs; ++pair) {
    const double total = block_sum(sums[pair]);
    if (threadIdx.x == 0) partials[int64_t(blockIdx.x) * kPairs + pair] = total;
  }
}

// sums[a, b] += this thread's share of <x_a, y_b> over n elements.
template <typename T>
__device__ void accumulate_cross(const T* const (&x)[kMaxFused], const T* const (&y)[kMaxFused],
                                 int64_t n, double (&sums)[kMaxFused][kMaxFused]) {
  bool aligned = true;
  for (int a = 0; a < kMaxFused; ++a) aligned = aligned && is_aligned(x[a]) && is_aligned(y[a]);
  const int64_t packs = aligned ? n / kPack<T> : 0;
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    Pack<T> p[kMaxFused], q[kMaxFused];
    HESSREG_UNROLL
    for (int a = 0; a < kMaxFused; ++a) {
      p[a] = reinterpret_cast<const Pack<T>*>(x[a])[i];
      q[a] = reinterpret_cast<const Pack<T>*>(y[a])[i];
    }
    HESSREG_UNROLL
    for (int e = 0; e < kPack<T> * kMaxFused * kMaxFused; ++e) {
      const int a = e / kMaxFused % kMaxFused, b = e % kMaxFused, k = e / kMaxFused / kMaxFused;
      sums[a][b] += double(to_compute(p[a].values[k])) * to_compute(q[b].values[k]);
    }
  }
  for (int64_t i = packs * kPack<T> + threadIdx.x; i < n; i += kThreads) {
    HESSREG_UNROLL
    for (int e = 0; e < kMaxFused * kMaxFused; ++e) {
      const int a = e / kMaxFused, b = e % kMaxFused;
      sums[a][b] += double(to_compute(x[a][i])) * to_compute(y[b][i]);
    }
  }
}

// The same for many lists, one block a piece and pair of blocks of kMaxFused lists. The pairs of a
// piece are neighbours, so that its elements are read from memory once. Lists that are not there
// stand for the last one.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gram_blocks_kernel(const Table __grid_constant__ x, int64_t blocks, double* partials) {
  const int64_t number = blockIdx.x / num_pairs(blocks);
  const Piece piece = piece_of(x, number);
  const PairOf tile(blockIdx.x % num_pairs(blocks), blocks);
  const int64_t first = tile.first, second = tile.second;
  const T *p[kMaxFused], *q[kMaxFused];
  for (int a = 0; a < kMaxFused; ++a) {
    const int64_t i = first * kMaxFused + a, j = second * kMaxFused + a, last = x.num_lists - 1;
    p[a] = element_pointer<T>(x, i < last ? i : last, piece);
    q[a] = element_pointer<T>(x, j < last ? j : last, piece);
  }
  double sums[kMaxFused][kMaxFused] = {};
  accumulate_cross<T>(p, q, piece.length, sums);
  HESSREG_UNROLL
  for (int e = 0; e < kMaxFused * kMaxFused; ++e) {
    const int64_t a = first * kMaxFused + e / kMaxFused, b = second * kMaxFused + e % kMaxFused;
    const double total = block_sum(sums[e / kMaxFused][e % kMaxFused]);
    if (threadIdx.x == 0 && a <= b && b < x.num_lists)
      partials[number * num_pairs(x.num_lists) + pair_index(a, b, x.num_lists)] = total;
  }
}

// This thread's share of one pair's partial sums over the pieces of a segment.
__device__ double sum_of_pieces(const Table& x, const double* partials, int64_t pair) {
  const int64_t sample = blockIdx.x / x.segments, segment = blockIdx.x % x.segments;
  double sum = 0;
  for (int64_t t = 0; t < x.count; ++t) {
    const Position& p = x.positions[t];
    if (segment < p.first_segment || segment >= p.first_segment + p.rows) continue;
    const int64_t pieces = pieces_per_row(p.length, kPieceLength);
    const int64_t row = sample * p.rows + segment - p.first_segment;
    for (int64_t i = threadIdx.x; i < pieces; i += kThreads)
      sum += partials[(p.first_piece + row * pieces + i) * num_pairs(x.num_lists) + pair];
  }
  return sum;
}

// One block a segment and pair (blockIdx.y): gram[segment] (+)= the sum over its pieces.
__global__ void __launch_bounds__(kThreads)
    sum_pieces_kernel(const Table __grid_constant__ x, const double* partials, double* gram,
                      bool first) {
  const int64_t m = x.num_lists;
  const PairOf pair(blockIdx.y, m);
  double* out = gram + blockIdx.x * m * m;
  const double total = block_sum(sum_of_pieces(x, partials, blockIdx.y));
  if (threadIdx.x > 0) return;
  double* here = out + pair.first * m + pair.second;
  *here = out[pair.second * m + pair.first] = total + (first ? 0 : *here);
}

constexpr int kTeam = 32;

struct Warp {
  int64_t rank = threadIdx.x, size = kTeam;
  __device__ void sync() const { __syncthreads(); }
};

// One warp a segment: what follows from its inner products. (In the kernel above it would spill.)
__global__ void __launch_bounds__(kTeam)
    outcome_kernel(const double* gram, int64_t m, const Outcome outcome) {
  const int64_t segment = blockIdx.x;
  outcome.find(gram + segment * m * m, m, segment, outcome.work + segment * work_size(m), Warp{});
}

// The weights of one output, split where float32 needs it. A list with weight zero is not read, so
// that infinities in it stay where they are.
template <typename C, int M>
struct Weights {
  C high[M], low[M];
  bool used[M], fit = true;

  __device__ explicit Weights(const double* weights) {
    HESSREG_UNROLL
    for (int a = 0; a < M; ++a) {
      const Split<C> split(weights[a]);
      high[a] = split.high;
      low[a] = split.low;
      used[a] = weights[a] != 0;
      fit = fit && (sizeof(C) == sizeof(double) || fits_float32(weights[a]));
    }
    // Two products may cancel: then one of them must be exact.
    if (M > 1 && sizeof(C) < sizeof(double)) fit = fit && (weights[0] == 1 || !used[0] || !used[1]);
  }

  // The high parts first: where they cancel, the sum is small and rounds as finely as the low
  // parts need.
  __device__ C combine(const C (&v)[M]) const {
    C y = 0;
    HESSREG_UNROLL
    for (int a = 0; a < M; ++a) y += high[a] * v[a];
    if constexpr (sizeof(C) == sizeof(float)) {
      HESSREG_UNROLL
      for (int a = 0; a < M; ++a)
        if (low[a] != 0) y += low[a] * v[a];  // zero times infinity would be NaN
    }
    return y;
  }
};

// out[i] = sum_a weights[a] x_a[i], sixteen bytes at a time.
template <typename T, int M>
__device__ void combine_packs(const T* const (&x)[M], const Weights<Compute<T>, M>& w,
                              int64_t packs, T* out) {
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    Pack<T> p[M] = {}, y;
    HESSREG_UNROLL
    for (int a = 0; a < M; ++a)
      if (w.used[a]) p[a] = reinterpret_cast<const Pack<T>*>(x[a])[i];
    HESSREG_UNROLL
    for (int e = 0; e < kPack<T>; ++e) {
      Compute<T> v[M];
      HESSREG_UNROLL
      for (int a = 0; a < M; ++a) v[a] = to_compute(p[a].values[e]);
      from_compute(w.combine(v), &y.values[e]);
    }
    reinterpret_cast<Pack<T>*>(out)[i] = y;
  }
}

// The same in float64, for many lists and for weights beyond float32: directions that are nearly
// dependent have large weights that cancel.
template <typename T>
__device__ void combine_in_float64(const Table& x, const Piece& piece, const double* weights,
                                   T* out) {
  bool aligned = is_aligned(out);
  for (int64_t a = 0; a < x.num_lists; ++a)
    aligned = aligned && is_aligned(element_pointer<T>(x, a, piece));
  const int64_t packs = aligned ? piece.length / kPack<T> : 0;
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    double y[kPack<T>] = {};
    for (int64_t a = 0; a < x.num_lists; ++a) {
      if (weights[a] == 0) continue;
      const Pack<T> p = reinterpret_cast<const Pack<T>*>(element_pointer<T>(x, a, piece))[i];
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e) y[e] += weights[a] * to_compute(p.values[e]);
    }
    Pack<T> result;
    HESSREG_UNROLL
    for (int e = 0; e < kPack<T>; ++e)
      from_compute(static_cast<Compute<T>>(y[e]), &result.values[e]);
    reinterpret_cast<Pack<T>*>(out)[i] = result;
  }
  for (int64_t i = packs * kPack<T> + threadIdx.x; i < piece.length; i += kThreads) {
    double y = 0;
    for (int64_t a = 0; a < x.num_lists; ++a)
      if (weights[a] != 0) y += weights[a] * to_compute(element_pointer<T>(x, a, piece)[i]);
    from_compute(static_cast<Compute<T>>(y), out + i);
  }
}

// One block a piece and output (blockIdx.y).
template <typename T, int M>
__global__ void __launch_bounds__(kThreads, 3)  // or ptxas spills to save registers
    combine_kernel(const Table __grid_constant__ x, const double* weights) {
  using C = Compute<T>;
  const Piece piece = piece_of(x, blockIdx.x);
  const double* own = weights + (piece.segment * gridDim.y + blockIdx.y) * M;
  const Weights<C, M> w(own);
  T* out = const_cast<T*>(element_pointer<T>(x, M + blockIdx.y, piece));
  if (!w.fit) return combine_in_float64<T>(x, piece, own, out);
  const T* pointers[M];
  bool aligned = is_aligned(out);
  HESSREG_UNROLL
  for (int a = 0; a < M; ++a) {
    pointers[a] = element_pointer<T>(x, a, piece);
    aligned = aligned && is_aligned(pointers[a]);
  }
  const int64_t packs = aligned ? piece.length / kPack<T> : 0;
  combine_packs<T, M>(pointers, w, packs, out);
  for (int64_t i = packs * kPack<T> + threadIdx.x; i < piece.length; i += kThreads) {
    C v[M];
    HESSREG_UNROLL
    for (int a = 0; a < M; ++a) v[a] = w.used[a] ? to_compute(pointers[a][i]) : C(0);
    from_compute(w.combine(v), out + i);
  }
}

// The same for many lists.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_many_kernel(const Table __grid_constant__ x, const double* weights) {
  const Piece piece = piece_of(x, blockIdx.x);
  const double* own = weights + (piece.segment * gridDim.y + blockIdx.y) * x.num_lists;
  T* out = const_cast<T*>(element_pointer<T>(x, x.num_lists + blockIdx.y, piece));
  combine_in_float64<T>(x, piece, own, out);
}

template <typename Body>
void dispatch(Element element, Body body) {
  switch (element) {
    case Element::kFloat32: return body(float{});
    case Element::kFloat64: return body(double{});
    case Element::kFloat16: return body(__half{});
    case Element::kBFloat16: return body(__nv_bfloat16{});
  }
}

// Calls body(table) for the lists, as many tensors at a time as fit in one launch's table.
template <typename Body>
void for_each_table(const Lists& x, void* const* out, int64_t num_outputs, Body body) {
  const int64_t columns = x.num_lists + num_outputs;
  if (columns > kMaxPointers || x.num_lists > kMaxLists)
    throw std::invalid_argument(
        "projection: CUDA takes 256 vectors at a time, derivatives of g and v among them, got " +
        std::to_string(x.num_lists));
  const int64_t fit =
      kMaxPointers / columns < kMaxPositions ? kMaxPointers / columns : kMaxPositions;
  for (int64_t begin = 0; begin < x.num_positions; begin += fit) {
    Table table;
    table.count = x.num_positions - begin < fit ? x.num_positions - begin : fit;
    table.num_lists = x.num_lists;
    table.segments = x.segments;
    table.num_pieces = 0;
    for (int64_t t = 0; t < table.count; ++t) {
      Position p = x.positions[begin + t];
      p.first_piece = table.num_pieces;
      table.num_pieces += x.batch * p.rows * pieces_per_row(p.length, kPieceLength);
      table.positions[t] = p;
      for (int64_t a = 0; a < x.num_lists; ++a)
        table.data[a * table.count + t] = x.data[a * x.num_positions + begin + t];
      for (int64_t c = 0; c < num_outputs; ++c)
        table.data[(x.num_lists + c) * table.count + t] = out[c * x.num_positions + begin + t];
    }
    const int64_t tiles = num_pairs((x.num_lists + kMaxFused - 1) / kMaxFused);
    if (table.num_pieces > kMaxBlocks / tiles)
      throw std::invalid_argument("projection: too many rows");
    body(table);
  }
}

template <typename T>
void launch_gram(const Table& table, double* partials, cuda_stream stream) {
  const int64_t blocks = (table.num_lists + kMaxFused - 1) / kMaxFused;
  const dim3 grid(table.num_pieces), tiles(table.num_pieces * num_pairs(blocks)), block(kThreads);
  switch (table.num_lists) {
    case 1: return HESSREG_LAUNCH((gram_kernel<T, 1>), grid, block, 0, stream, table, partials);
    case 2: return HESSREG_LAUNCH((gram_kernel<T, 2>), grid, block, 0, stream, table, partials);
    case 3: return HESSREG_LAUNCH((gram_kernel<T, 3>), grid, block, 0, stream, table, partials);
    case kMaxFused:
      return HESSREG_LAUNCH((gram_kernel<T, kMaxFused>), grid, block, 0, stream, table, partials);
    default:
      return HESSREG_LAUNCH((gram_blocks_kernel<T>), tiles, block, 0, stream, table, blocks,
                            partials);
  }
}

template <typename T>
void launch_combine(const Table& table, const double* weights, int64_t num_outputs,
                    cuda_stream stream) {
  const dim3 grid(table.num_pieces, num_outputs), block(kThreads);
  switch (table.num_lists) {
    case 1: return HESSREG_LAUNCH((combine_kernel<T, 1>), grid, block, 0, stream, table, weights);
    case 2: return HESSREG_LAUNCH((combine_kernel<T, 2>), grid, block, 0, stream, table, weights);
    default:
      return HESSREG_LAUNCH((combine_many_kernel<T>), grid, block, 0, stream, table, weights);
  }
}

}  // namespace

void gram(const Lists& x, double* partials, double* gram, const Outcome* outcome, void* stream_) {
  const auto stream = static_cast<cuda_stream>(stream_);
  const int64_t num_segments = x.batch * x.segments;
  if (num_segments == 0) return;
  if (num_segments > kMaxBlocks) throw std::invalid_argument("projection: too many rows");
  const dim3 segments(num_segments), segment_pairs(num_segments, num_pairs(x.num_lists));
  const dim3 block(kThreads);
  bool first = true;
  for_each_table(x, nullptr, 0, [&](const Table& table) {
    if (table.num_pieces > 0) {
      dispatch(x.element, [&](auto zero) { launch_gram<decltype(zero)>(table, partials, stream); });
    }
    HESSREG_LAUNCH(sum_pieces_kernel, segment_pairs, block, 0, stream, table, partials, gram,
                   first);
    first = false;
  });
  if (outcome)
    HESSREG_LAUNCH(outcome_kernel, segments, dim3(kTeam), 0, stream, gram, x.num_lists, *outcome);
}

void linear_combination(const Lists& x, const double* weights, void* const* out,
                        int64_t num_outputs, void* stream_) {
  const auto stream = static_cast<cuda_stream>(stream_);
  for_each_table(x, out, num_outputs, [&](const Table& table) {
    if (table.num_pieces == 0 || num_outputs == 0) return;
    dispatch(x.element, [&](auto zero) {
      launch_combine<decltype(zero)>(table, weights, num_outputs, stream);
    });
  });
}

}  // namespace hessreg::projection::cuda
