// Compiled once per instruction set, with HESSREG_ISA naming the namespace.
#include "projection_cpu.h"

#include "../common/simd.h"

namespace hessreg::projection::HESSREG_ISA {
namespace {

constexpr int64_t kMaxFused = 4;  // lists whose inner products all fit in registers

// Elements to fetch ahead (Zen 5, vectors larger than the caches: 10-15 % over the hardware
// prefetchers alone, which start anew at every page of every list).
constexpr int64_t kGramAhead = 2048, kCombineAhead = 1536;

// pairs[a <= b] = sum_i x_a[i] x_b[i]: products of float32 are exact in float64, so the sum is
// right to float64 rounding in whatever order it is taken.
template <typename T, int M>
void gram_piece(const T* const (&x)[M], int64_t n, double* pairs) {
  constexpr int kPairs = M * (M + 1) / 2;
  constexpr int kUnroll = M == 1 ? 8 : M == 2 ? 4 : 1;  // independent sums hide the FMA latency
  constexpr int kStep = kLanes<double>;
  Vector<double> sums[kUnroll][kPairs] = {};
  int64_t i = 0;
  for (; i + kUnroll * kStep <= n; i += kUnroll * kStep) {
    for (int u = 0; u < kUnroll; ++u) {
      Vector<double> v[M];
      for (int a = 0; a < M; ++a) prefetch(x[a] + i + u * kStep + kGramAhead);
      for (int a = 0; a < M; ++a) v[a] = load_double(x[a] + i + u * kStep);
      for (int a = 0, pair = 0; a < M; ++a)
        for (int b = a; b < M; ++b, ++pair) sums[u][pair] += v[a] * v[b];
    }
  }
  for (int u = 1; u < kUnroll; ++u)
    for (int pair = 0; pair < kPairs; ++pair) sums[0][pair] += sums[u][pair];
  for (int pair = 0; pair < kPairs; ++pair) pairs[pair] = sum(sums[0][pair]);
  for (; i < n; ++i)
    for (int a = 0, pair = 0; a < M; ++a)
      for (int b = a; b < M; ++b, ++pair)
        pairs[pair] += static_cast<double>(to_compute(x[a][i])) * to_compute(x[b][i]);
}

template <typename T>
const T* element_pointer(const Lists& x, int64_t list, const Piece& piece) {
  return static_cast<const T*>(x.data[list * x.num_positions + piece.position]) + piece.offset;
}

template <typename T, int M>
void gram_fused(const Lists& x, const Piece& piece, double* pairs) {
  const T* pointers[M];
  for (int a = 0; a < M; ++a) pointers[a] = element_pointer<T>(x, a, piece);
  gram_piece<T, M>(pointers, piece.length, pairs);
}

// Many lists: pair by pair, from cache.
template <typename T>
void gram_pairwise(const Lists& x, const Piece& piece, double* pairs) {
  for (int64_t a = 0; a < x.num_lists; ++a) {
    for (int64_t b = a; b < x.num_lists; ++b) {
      double products[3];
      const T* pointers[2] = {element_pointer<T>(x, a, piece), element_pointer<T>(x, b, piece)};
      gram_piece<T, 2>(pointers, piece.length, products);
      pairs[pair_index(a, b, x.num_lists)] = products[1];
    }
  }
}

template <typename T>
void gram_any(const Lists& x, const Piece& piece, double* pairs) {
  switch (x.num_lists) {
    case 1: return gram_fused<T, 1>(x, piece, pairs);
    case 2: return gram_fused<T, 2>(x, piece, pairs);
    case 3: return gram_fused<T, 3>(x, piece, pairs);
    case kMaxFused: return gram_fused<T, kMaxFused>(x, piece, pairs);
    default: return gram_pairwise<T>(x, piece, pairs);
  }
}

// out[i] = sum_a weights[a] x_a[i]. The high parts of the weights first: where they cancel, the sum
// is small and rounds as finely as the low parts need.
template <typename T, int M, bool kStream>
void combine_piece(const T* const (&x)[M], const double* weights, int64_t n, T* out) {
  using C = Compute<T>;
  C high[M], low[M];
  for (int a = 0; a < M; ++a) {
    const Split<C> split(weights[a]);
    high[a] = split.high;
    low[a] = split.low;
  }
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) {
    Vector<C> v[M], y = {};
    for (int a = 0; a < M; ++a) prefetch(x[a] + i + kCombineAhead);
    for (int a = 0; a < M; ++a) v[a] = load(x[a] + i);
    for (int a = 0; a < M; ++a) y += v[a] * high[a];
    for (int a = 0; a < M; ++a)
      if (low[a] != 0) y += v[a] * low[a];  // zero times infinity would be NaN
    kStream ? stream(out + i, y) : store(out + i, y);
  }
  for (; i < n; ++i) {
    C y = 0;
    for (int a = 0; a < M; ++a) y += to_compute(x[a][i]) * high[a];
    for (int a = 0; a < M; ++a)
      if (low[a] != 0) y += to_compute(x[a][i]) * low[a];
    out[i] = from_compute<T>(y);
  }
}

template <typename T>
void fill_zero(T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = T{};
}

// A list with weight zero is left out, so that infinities in it stay where they are.
template <typename T>
struct Terms {
  const T* x[kMaxFused];
  double weights[kMaxFused];
  int count = 0;
};

template <typename T>
Terms<T> used_terms(const Lists& x, const Piece& piece, const double* weights) {
  Terms<T> terms;
  for (int64_t a = 0; a < x.num_lists; ++a) {
    if (weights[a] == 0) continue;
    terms.x[terms.count] = element_pointer<T>(x, a, piece);
    terms.weights[terms.count++] = weights[a];
  }
  return terms;
}

template <typename T, int M>
void combine_fused(const Terms<T>& terms, bool streaming, int64_t n, T* out) {
  const T* pointers[M];
  for (int a = 0; a < M; ++a) pointers[a] = terms.x[a];
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  if (streaming && aligned)
    combine_piece<T, M, true>(pointers, terms.weights, n, out);
  else
    combine_piece<T, M, false>(pointers, terms.weights, n, out);
}

// Many lists, or weights out of the range of float32: in float64. A block of the sum stays in the
// first-level cache while the lists pass by.
template <typename T>
void combine_blocked(const Lists& x, const Piece& piece, const double* weights, T* out) {
  constexpr int64_t kBlock = 512;
  double y[kBlock];
  for (int64_t start = 0; start < piece.length; start += kBlock) {
    const int64_t n = piece.length - start < kBlock ? piece.length - start : kBlock;
    for (int64_t i = 0; i < n; ++i) y[i] = 0;
    for (int64_t a = 0; a < x.num_lists; ++a) {
      if (weights[a] == 0) continue;
      const T* v = element_pointer<T>(x, a, piece) + start;
      for (int64_t i = 0; i < n; ++i) y[i] += weights[a] * to_compute(v[i]);
    }
    for (int64_t i = 0; i < n; ++i) out[start + i] = from_compute<T>(static_cast<Compute<T>>(y[i]));
  }
}

template <typename T>
bool needs_float64(const double* weights, int64_t count) {
  if (sizeof(Compute<T>) == sizeof(double)) return false;
  for (int64_t a = 0; a < count; ++a)
    if (!fits_float32(weights[a])) return true;
  return false;
}

template <typename T>
void combine_any(const Lists& x, const Piece& piece, const double* weights, T* out) {
  if (x.num_lists > kMaxFused || needs_float64<T>(weights, x.num_lists))
    return combine_blocked<T>(x, piece, weights, out);
  const Terms<T> terms = used_terms<T>(x, piece, weights);
  switch (terms.count) {
    case 0: return fill_zero(out, piece.length);
    case 1: return combine_fused<T, 1>(terms, x.streaming, piece.length, out);
    case 2: return combine_fused<T, 2>(terms, x.streaming, piece.length, out);
    case 3: return combine_fused<T, 3>(terms, x.streaming, piece.length, out);
    default: return combine_fused<T, kMaxFused>(terms, x.streaming, piece.length, out);
  }
}

template <typename Body>
void dispatch(Element element, Body body) {
  switch (element) {
    case Element::kFloat32: return body(float{});
    case Element::kFloat64: return body(double{});
    case Element::kFloat16: return body(Float16{});
    case Element::kBFloat16: return body(BFloat16{});
  }
}

void gram(const Lists& x, double* partials, int64_t begin, int64_t end) {
  dispatch(x.element, [&](auto zero) {
    Walker walker(x, begin);
    for (int64_t i = begin; i < end; ++i, walker.advance())
      gram_any<decltype(zero)>(x, walker.piece(), partials + i * num_pairs(x.num_lists));
  });
}

void linear_combination(const Lists& x, const double* weights, void* const* out,
                        int64_t num_outputs, int64_t begin, int64_t end) {
  dispatch(x.element, [&](auto zero) {
    using T = decltype(zero);
    Walker walker(x, begin);
    for (int64_t i = begin; i < end; ++i, walker.advance()) {
      const Piece piece = walker.piece();
      for (int64_t c = 0; c < num_outputs; ++c) {
        T* y = static_cast<T*>(out[c * x.num_positions + piece.position]) + piece.offset;
        combine_any<T>(x, piece, weights + (piece.segment * num_outputs + c) * x.num_lists, y);
      }
    }
    if (x.streaming) stream_fence();
  });
}

}  // namespace

const CpuKernels kernels = {gram, linear_combination};

}  // namespace hessreg::projection::HESSREG_ISA
