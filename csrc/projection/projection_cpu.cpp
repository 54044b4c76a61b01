// Compiled once per instruction set, with HESSREG_ISA naming the namespace.
#include "projection_cpu.h"

#include "../common/simd.h"

namespace hessreg::projection::HESSREG_ISA {
namespace {

constexpr int64_t kMaxFused = 5;  // lists whose inner products all fit in registers

// Elements to fetch ahead (Zen 5, vectors larger than the caches: 10-15 % over the hardware
// prefetchers alone, which start anew at every page of every list).
constexpr int64_t kGramAhead = 2048, kCombineAhead = 1536;

template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line

// pairs[a <= b] = sum_i x_a[i] x_b[i]: products of float32 are exact in float64, so the sum is
// right to float64 rounding in whatever order it is taken.
template <typename T, int M, bool kFetch = true>
void gram_piece(const T* const (&x)[M], int64_t n, double* pairs) {
  constexpr int kPairs = M * (M + 1) / 2;
  constexpr int kUnroll = M == 1 ? 8 : M == 2 ? 4 : 1;  // independent sums hide the FMA latency
  constexpr int kStep = kLanes<double>;
  Vector<double> sums[kUnroll][kPairs] = {};
  int64_t i = 0;
  for (; i + kUnroll * kStep <= n; i += kUnroll * kStep) {
    for (int u = 0; u < kUnroll; ++u) {
      Vector<double> v[M];
      for (int a = 0; kFetch && a < M; ++a) prefetch(x[a] + i + u * kStep + kGramAhead);
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

// sums[a, b] += <x_a, y_b> over n elements, which are in the first-level cache.
template <typename T, int A, int B, bool kFetch>
void add_cross_products(const T* const (&x)[A], const T* const* y, int64_t n, double* sums) {
  Vector<double> s[A][B] = {};
  int64_t i = 0;
  for (; i + kLanes<double> <= n; i += kLanes<double>) {
    Vector<double> v[A];
    for (int a = 0; a < A; ++a) v[a] = load_double(x[a] + i);
    for (int b = 0; b < B; ++b) {
      if (kFetch) prefetch(y[b] + i + kGramAhead);
      const Vector<double> w = load_double(y[b] + i);
      for (int a = 0; a < A; ++a) s[a][b] += v[a] * w;
    }
  }
  for (int a = 0; a < A; ++a) {
    for (int b = 0; b < B; ++b) {
      sums[a * B + b] = sum(s[a][b]);
      for (int64_t k = i; k < n; ++k)
        sums[a * B + b] += static_cast<double>(to_compute(x[a][k])) * to_compute(y[b][k]);
    }
  }
}

// The inner products of M lists from number `first` with each other and, M being kMaxFused then,
// with the lists behind them.
template <typename T, int M, bool kFetch>
void add_row_of_blocks(const Lists& x, const Piece& piece, int64_t first, double* pairs) {
  const int64_t m = x.num_lists;
  const T* own[M];
  for (int a = 0; a < M; ++a) own[a] = element_pointer<T>(x, first + a, piece);
  double sums[M * kMaxFused];
  gram_piece<T, M, kFetch>(own, piece.length, sums);
  for (int a = 0, pair = 0; a < M; ++a)
    for (int b = a; b < M; ++b, ++pair) pairs[pair_index(first + a, first + b, m)] += sums[pair];
  for (int64_t next = first + M; next < m; next += kMaxFused) {
    const int64_t count = m - next < kMaxFused ? m - next : kMaxFused;
    const T* other[kMaxFused];
    for (int64_t b = 0; b < count; ++b) other[b] = element_pointer<T>(x, next + b, piece);
    switch (count) {
      case 1: add_cross_products<T, M, 1, kFetch>(own, other, piece.length, sums); break;
      case 2: add_cross_products<T, M, 2, kFetch>(own, other, piece.length, sums); break;
      case 3: add_cross_products<T, M, 3, kFetch>(own, other, piece.length, sums); break;
      case 4: add_cross_products<T, M, 4, kFetch>(own, other, piece.length, sums); break;
      default: add_cross_products<T, M, kMaxFused, kFetch>(own, other, piece.length, sums);
    }
    for (int a = 0; a < M; ++a)
      for (int64_t b = 0; b < count; ++b)
        pairs[pair_index(first + a, next + b, m)] += sums[a * count + b];
  }
}

// Many lists: so few elements at a time that all lists fit in the cache, four lists against four.
template <typename T>
void gram_in_blocks(const Lists& x, const Piece& piece, double* pairs) {
  constexpr int64_t kElements = 1024;
  for (int64_t pair = 0; pair < num_pairs(x.num_lists); ++pair) pairs[pair] = 0;
  for (int64_t start = 0; start < piece.length; start += kElements) {
    const int64_t rest = piece.length - start;
    const Piece part{piece.position, piece.segment, piece.offset + start,
                     rest < kElements ? rest : kElements};
    add_row_of_blocks<T, kMaxFused, true>(x, part, 0, pairs);  // brings all lists into the cache
    int64_t first = kMaxFused;
    for (; first + kMaxFused <= x.num_lists; first += kMaxFused)
      add_row_of_blocks<T, kMaxFused, false>(x, part, first, pairs);
    switch (x.num_lists - first) {
      case 1: add_row_of_blocks<T, 1, false>(x, part, first, pairs); break;
      case 2: add_row_of_blocks<T, 2, false>(x, part, first, pairs); break;
      case 3: add_row_of_blocks<T, 3, false>(x, part, first, pairs); break;
      case 4: add_row_of_blocks<T, 4, false>(x, part, first, pairs); break;
    }
  }
}

template <typename T>
void gram_any(const Lists& x, const Piece& piece, double* pairs) {
  switch (x.num_lists) {
    case 1: return gram_fused<T, 1>(x, piece, pairs);
    case 2: return gram_fused<T, 2>(x, piece, pairs);
    case 3: return gram_fused<T, 3>(x, piece, pairs);
    case 4: return gram_fused<T, 4>(x, piece, pairs);
    case kMaxFused: return gram_fused<T, kMaxFused>(x, piece, pairs);
    default: return gram_in_blocks<T>(x, piece, pairs);
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

// The lists whose weights are not zero, so that infinities in others stay where they are.
template <typename T>
struct Terms {
  const T* x[2];
  double weights[2];
  int64_t count = 0;
  bool fit = true;  // the weights: in the range of float32

  HESSREG_HD Terms(const Lists& lists, const Piece& piece, const double* all) {
    for (int64_t a = 0; a < lists.num_lists; ++a) {
      if (all[a] == 0) continue;
      if (count < 2) {
        x[count] = element_pointer<T>(lists, a, piece);
        weights[count] = all[a];
      }
      fit = fit && (sizeof(Compute<T>) == sizeof(double) || fits_float32(all[a]));
      ++count;
    }
  }
};

// More lists, or weights that float32 does not fit: in float64, since directions that are nearly
// dependent have large weights that cancel.
template <typename T, bool kStream>
void combine_in_float64(const Lists& x, const Piece& piece, const double* weights, T* out) {
  constexpr int kUnroll = 8;
  constexpr int64_t kStep = kUnroll * kLanes<double>;
  int64_t i = 0;
  for (; i + kStep <= piece.length; i += kStep) {
    Vector<double> y[kUnroll] = {};
    for (int64_t a = 0; a < x.num_lists; ++a) {
      if (weights[a] == 0) continue;
      const T* v = element_pointer<T>(x, a, piece) + i;
      for (int64_t line = 0; line < kStep; line += kLine<T>) prefetch(v + kCombineAhead + line);
      for (int u = 0; u < kUnroll; ++u) y[u] += weights[a] * load_double(v + u * kLanes<double>);
    }
    for (int u = 0; u < kUnroll; ++u) store_double<T, kStream>(out + i + u * kLanes<double>, y[u]);
  }
  for (; i < piece.length; ++i) {
    double y = 0;
    for (int64_t a = 0; a < x.num_lists; ++a)
      if (weights[a] != 0) y += weights[a] * to_compute(element_pointer<T>(x, a, piece)[i]);
    out[i] = from_compute<T>(static_cast<Compute<T>>(y));
  }
}

template <typename T, bool kStream>
void combine_any(const Lists& x, const Piece& piece, const double* weights, T* out) {
  const Terms<T> terms(x, piece, weights);
  const T *one[] = {terms.x[0]}, *two[] = {terms.x[0], terms.x[1]};
  if (terms.count == 0) return fill_zero(out, piece.length);
  // Two products may cancel: then one of them must be exact.
  const bool exact = terms.count == 1 || terms.weights[0] == 1;
  if (terms.count > 2 || !terms.fit || !exact)
    return combine_in_float64<T, kStream>(x, piece, weights, out);
  if (terms.count == 1) return combine_piece<T, 1, kStream>(one, terms.weights, piece.length, out);
  combine_piece<T, 2, kStream>(two, terms.weights, piece.length, out);
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
        const double* own = weights + (piece.segment * num_outputs + c) * x.num_lists;
        const bool stream = x.streaming && reinterpret_cast<uintptr_t>(y) % kVectorBytes == 0;
        stream ? combine_any<T, true>(x, piece, own, y) : combine_any<T, false>(x, piece, own, y);
      }
    }
    if (x.streaming) stream_fence();
  });
}

}  // namespace

const CpuKernels kernels = {gram, linear_combination};

}  // namespace hessreg::projection::HESSREG_ISA
