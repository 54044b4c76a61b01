#pragma once
// Products of layers as tiles of registers, and activations of whole vectors: for hvp_cpu.cpp, once
// per instruction set.
//
// Weights and directions are read where they lie. What they are multiplied by stands in panels,
// either of samples, [width, kPanel] (a vector holds neighbouring samples of one unit), or of
// units, [batch, kPanel] (a vector holds neighbouring units of one sample).
#include "../common/cpu_tiles.h"
#include "hvp_cpu.h"

namespace hessreg::hvp::HESSREG_ISA {
namespace {

// Terms of a sum at a time: a panel stays in cache, and a sum of sums is more exact.
constexpr int64_t kDepth = 64;
constexpr int64_t kRows = 4 * kGroup;  // rows that go through a panel while it is there

HESSREG_HD int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

// ---- activations -------------------------------------------------------------------------------

template <typename T>
struct TanhSeries;
// tanh(z) = z + z s p(s) with s = z^2 up to |z| = 0.625 (Cephes).
template <>
struct TanhSeries<float> {
  HESSREG_HD static Vector<float> of(Vector<float> s) {
    Vector<float> p = s * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    return p * s - 3.33332819422e-1f;
  }
};
template <>
struct TanhSeries<double> {
  HESSREG_HD static Vector<double> of(Vector<double> s) {
    const Vector<double> p =
        (s * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * s - 1.61468768441708447952e3;
    const Vector<double> q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s +
                             4.84406305325125486048e3;
    return p / q;
  }
};

// The functions that activations are made of, of the lanes of a vector; exp, expm1 for z <= 0 and
// log1p for 0 <= z <= 1 only, which is where they are needed.
template <typename T>
struct VectorMath {
  using Scalar = T;
  using V = Vector<T>;
  HESSREG_HD static V exp(V z) { return exp2_of_product(z, T(1.4426950408889634)); }
  HESSREG_HD static V tanh(V z) {
    const V size = z < 0 ? -z : z, square = z * z, e = exp(-2 * size);
    const V far = (1 - e) / (1 + e), near = z + z * square * TanhSeries<T>::of(square);
    return size < T(0.625) ? near : z < 0 ? -far : far;
  }
  HESSREG_HD static V expm1(V z) {
    const V t = tanh(T(0.5) * z);
    return 2 * t / (1 - t);
  }
  // 2 artanh(z / (2 + z)), by its series.
  HESSREG_HD static V log1p(V z) {
    constexpr int kTerms = sizeof(T) == 8 ? 17 : 8;
    const V ratio = z / (2 + z), square = ratio * ratio;
    V sum = {};
    for (int k = kTerms - 1; k >= 0; --k) sum = sum * square + T(1) / T(2 * k + 1);
    return 2 * ratio * sum;
  }
  HESSREG_HD static V erf(V z) {
    for (int lane = 0; lane < kLanes<T>; ++lane) z[lane] = std::erf(z[lane]);
    return z;
  }
};

// ---- products ----------------------------------------------------------------------------------

// A product that rows of tiles grow by: row r by sum_k scalars[k, r] vectors[k, :].
template <typename C>
struct Term {
  const C* vectors;   // [depth, kPanel]
  const C* scalars;   // of k = 0, r = 0
  int64_t step, row;  // from one k to the next, from one r to the next
  int64_t depth;
  int64_t segment, segment_step;  // scalars of so many k lie in `step`, then all in `segment_step`
};

// The rows of a matrix [.., in] times a panel of samples.
template <typename C>
HESSREG_HD Term<C> rows_of(const C* matrix, int64_t in, const C* panel) {
  return {panel, matrix, 1, in, in, kDepth, kDepth};
}

// The columns of a matrix [out, in] times a panel of samples.
template <typename C>
HESSREG_HD Term<C> columns_of(const C* matrix, int64_t in, int64_t out, const C* panel) {
  return {panel, matrix, in, 1, out, kDepth, kDepth * in};
}

// Rows of panels of samples [panel, width, kPanel] times a panel of units.
template <typename C>
HESSREG_HD Term<C> samples_of(const C* samples, int64_t width, int64_t batch, const C* panel) {
  return {panel, samples, 1, kPanel<C>, batch, kPanel<C>, kPanel<C> * width};
}

template <typename C, int R, int N>
void sum_terms(const Term<C>* terms, int count, int64_t first_row, bool add, C* out,
               int64_t stride) {
  Tile<C, R, N> tile;
  clear<C, R, N>(tile);
#pragma GCC unroll 1
  for (int t = 0; t < count; ++t) {
    const Term<C> term = terms[t];
    const C *vectors = term.vectors, *scalars = term.scalars + first_row * term.row;
#pragma GCC unroll 1
    for (int64_t left = term.depth; left > 0; left -= term.segment) {
      multiply<false, C, R, N>(vectors, kPanel<C>, scalars, term.step, term.row,
                               smaller(left, term.segment), tile);
      vectors += term.segment * kPanel<C>;
      scalars += term.segment_step;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < N; ++h) {
      C* to = out + r * stride + h * kLanes<C>;
      store(to, add ? load<C, kLanes<C>>(to) + tile[r][h] : tile[r][h]);
    }
}

template <typename C, int N>
HESSREG_HD void sweep(const Term<C>* terms, int count, int64_t rows, bool add, C* out,
                      int64_t stride) {
  int64_t r = 0;
  for (; r + kGroup <= rows; r += kGroup)
    sum_terms<C, kGroup, N>(terms, count, r, add, out + r * stride, stride);
  for (; r + 4 <= rows; r += 4) sum_terms<C, 4, N>(terms, count, r, add, out + r * stride, stride);
  for (; r < rows; ++r) sum_terms<C, 1, N>(terms, count, r, add, out + r * stride, stride);
}

template <typename C>
HESSREG_HD void sweep_columns(const Term<C>* terms, int count, int64_t rows, int64_t columns,
                              bool add, C* out, int64_t stride) {
  columns > kLanes<C> ? sweep<C, 2>(terms, count, rows, add, out, stride)
                      : sweep<C, 1>(terms, count, rows, add, out, stride);
}

// out [rows, stride] = the sum of the terms, in the first `columns` of a panel and what fills up
// their vectors. Deep sums are sums of sums.
template <typename C>
HESSREG_HD void sum_products(const Term<C>* terms, int count, int64_t rows, int64_t columns, C* out,
                             int64_t stride) {
  int64_t depth = 0;
  for (int t = 0; t < count; ++t) depth += terms[t].depth;
  if (depth <= kDepth) return sweep_columns(terms, count, rows, columns, false, out, stride);
  bool add = false;
  for (int t = 0; t < count; ++t) {
    for (int64_t start = 0; start < terms[t].depth; start += kDepth) {
      Term<C> part = terms[t];
      part.vectors += start * kPanel<C>;
      part.scalars += start / part.segment * part.segment_step;
      part.depth = smaller(kDepth, part.depth - start);
      sweep_columns(&part, 1, rows, columns, add, out, stride);
      add = true;
    }
  }
}

// ---- panels ------------------------------------------------------------------------------------

// [panel, rows, kPanel]; whole vectors beyond the last column, zero.
template <typename C>
struct Panels {
  C* data;
  int64_t rows;

  HESSREG_HD C* panel(int64_t p) const { return data + p * kPanel<C> * rows; }

  // From a matrix [rows, columns].
  HESSREG_HD void load_rows(const C* from, int64_t columns) const {
    for (int64_t start = 0; start < columns; start += kPanel<C>) {
      C* to = data + start * rows;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t h = 0; h < kPanel<C>; h += kLanes<C>)
          store(to + i * kPanel<C> + h,
                load_some(from + i * columns + start + h, columns - start - h));
    }
  }

  // From a matrix [columns, rows].
  HESSREG_HD void load_columns(const C* from, int64_t columns) const {
    for (int64_t start = 0; start < columns; start += kPanel<C>)
      load_panel(from + start * rows, rows, columns - start, rows, data + start * rows);
  }
};

// A matrix [rows, columns] whose rows are `stride` apart as its transpose, likewise.
template <typename C>
HESSREG_HD void transpose_matrix(const C* from, int64_t stride, int64_t rows, int64_t columns,
                                 C* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += kLanes<C>) {
    for (int64_t j = 0; j < columns; j += kLanes<C>) {
      Vector<C> square[kLanes<C>];
      for (int k = 0; k < kLanes<C>; ++k)
        square[k] =
            i + k < rows ? load_some(from + (i + k) * stride + j, columns - j) : Vector<C>{};
      transpose<C>(square);
      for (int k = 0; k < kLanes<C> && j + k < columns; ++k)
        store_some<C>(to + (j + k) * to_stride + i, square[k], rows - i);
    }
  }
}

}  // namespace
}  // namespace hessreg::hvp::HESSREG_ISA
