#pragma once
// Tiles of registers for matrix products in CPU kernels, and what goes with them: for kernel files,
// which are compiled once per instruction set. All functions are always inlined. No torch.
//
// One operand stands in panels, so many columns side by side that they fill two vectors; rows of
// the other are broadcast, a group at a time.
#include "cpu_memory.h"
#include "simd.h"

namespace hessreg {

template <typename C>
constexpr int kPanel = 2 * kLanes<C>;                // columns of a panel
constexpr int kGroup = kVectorBytes == 64 ? 12 : 6;  // rows that are broadcast at a time

template <typename C, int R, int N = 2>
using Tile = Vector<C>[R][N];

template <typename C, int R, int N>
HESSREG_HD void clear(Tile<C, R, N>& tile) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < N; ++h) tile[r][h] = Vector<C>{};
}

// tile[r][:] += sum_k a[k a_step :] b[k b_step + r b_row], or with kDiffer the sum of the squared
// differences of the two.
template <bool kDiffer, typename C, int R, int N>
HESSREG_HD void multiply(const C* a, int64_t a_step, const C* b, int64_t b_step, int64_t b_row,
                         int64_t depth, Tile<C, R, N>& tile) {
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Vector<C> column[N];
#pragma GCC unroll 2
    for (int h = 0; h < N; ++h) column[h] = load<C, kLanes<C>>(a + h * kLanes<C>);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < N; ++h) {
        if constexpr (kDiffer) {
          const Vector<C> difference = column[h] - b[r * b_row];
          tile[r][h] += difference * difference;
        } else {
          tile[r][h] += column[h] * b[r * b_row];
        }
      }
    }
  }
}

// Part of a panel, [column of `from`, kPanel], from as many rows, `stride` apart, and columns as
// there are lanes in a vector.
template <typename C>
HESSREG_HD void load_square(const C* from, int64_t stride, C* to) {
  Vector<C> rows[kLanes<C>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<C>; ++i) rows[i] = load<C, kLanes<C>>(from + i * stride);
  transpose<C>(rows);
#pragma GCC unroll 16
  for (int k = 0; k < kLanes<C>; ++k) store(to + k * kPanel<C>, rows[k]);
}

// The same from fewer, with zeros in the place of rows that are missing.
template <typename C>
HESSREG_HD void load_part(const C* from, int64_t stride, int64_t rows, int64_t columns, C* to) {
  for (int64_t k = 0; k < smaller(columns, kLanes<C>); ++k)
    for (int64_t i = 0; i < kLanes<C>; ++i)
      to[k * kPanel<C> + i] = i < rows ? from[i * stride + k] : C(0);
}

// Rows [0, rows), `stride` apart, of `columns` each as the panel [columns, kPanel].
template <typename C>
HESSREG_HD void load_panel(const C* from, int64_t stride, int64_t rows, int64_t columns, C* to) {
  constexpr int64_t kSide = kLanes<C>;
  for (int64_t i = 0; i < kPanel<C>; i += kSide) {
    for (int64_t k = 0; k < columns; k += kSide) {
      const C* square = from + i * stride + k;
      const bool whole = i + kSide <= rows && k + kSide <= columns;
      whole ? load_square(square, stride, to + k * kPanel<C> + i)
            : load_part(square, stride, rows - i, columns - k, to + k * kPanel<C> + i);
    }
  }
}

}  // namespace hessreg
