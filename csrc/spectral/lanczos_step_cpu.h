#pragma once
// A step of Lanczos on long vectors, for spectral_cpu.cpp, once per instruction set: memory traffic
// is all that counts. Orthogonalising once reads the basis twice: for the coefficients, and to
// subtract; what is left in each block is checked against the rows while they are in cache.
#include "spectral_cpu_common.h"

namespace hessreg::spectral::HESSREG_ISA {
namespace {

// Summed up in the type of the elements; as much of every row stays in the second-level cache.
constexpr int64_t kBlockColumns = 4096;

template <typename T>
T* row_of(const LanczosStep& step, int64_t row) {
  return static_cast<T*>(step.basis) + row * step.n;
}

// <x, y>, while what is wanted next is fetched: the hardware's prefetchers start anew in every row.
template <typename T>
double block_dot(const T* x, const T* y, int64_t count, const T* next) {
  constexpr int kSums = 4;
  Vector<T> sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes<T> <= count; i += kSums * kLanes<T>)
    for (int u = 0; u < kSums; ++u) {
      prefetch(next + i + u * kLanes<T>);
      sums[u] += load(x + i + u * kLanes<T>) * load(y + i + u * kLanes<T>);
    }
  double total = sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) total += static_cast<double>(x[i]) * y[i];
  return total;
}

// In float64: squares of small entries would vanish.
template <typename T>
double block_squares(const T* x, int64_t count) {
  Vector<double> squares = {};
  int64_t i = 0;
  for (; i + kLanes<double> <= count; i += kLanes<double>) {
    const Vector<double> v = load_double(x + i);
    squares += v * v;
  }
  double total = sum(squares);
  for (; i < count; ++i) total += static_cast<double>(x[i]) * x[i];
  return total;
}

template <typename T>
void subtract_multiple(T* out, const T* from, const T* row, T coefficient, int64_t count,
                       const T* next) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    prefetch(next + i);
    store(out + i, load(from + i) - load(row + i) * coefficient);
  }
  for (; i < count; ++i) out[i] = from[i] - row[i] * coefficient;
}

// Calls use(start, count) for the blocks of the pieces [begin, end), and clears their sums before.
template <typename Use>
void for_blocks(const LanczosStep& step, double* sums, int64_t width, int64_t begin, int64_t end,
                const Use& use) {
  for (int64_t piece = begin; piece < end; ++piece) {
    double* own = sums + piece * width;
    for (int64_t i = 0; i < width; ++i) own[i] = 0;
    const int64_t stop = smaller(step.n, (piece + 1) * kStepPiece);
    for (int64_t start = piece * kStepPiece; start < stop; start += kBlockColumns)
      use(start, smaller(kBlockColumns, stop - start), own);
  }
}

// Of the row after r, or of the first row further on.
template <typename T>
const T* next_block(const LanczosStep& step, const T* row, int64_t r) {
  return r + 1 < step.count ? row + (r + 1) * step.n : row + kBlockColumns;
}

template <typename T>
void step_dots(const LanczosStep& step, double* sums, int64_t begin, int64_t end) {
  const T* w = static_cast<const T*>(step.w);
  for_blocks(step, sums, step.count, begin, end, [&](int64_t start, int64_t count, double* own) {
    const T* row = row_of<T>(step, 0) + start;
    for (int64_t r = 0; r < step.count; ++r)
      own[r] += block_dot(row + r * step.n, w + start, count, next_block(step, row, r));
  });
}

template <typename T>
void step_subtract(const LanczosStep& step, const T* from, const double* coefficients, double* sums,
                   int64_t begin, int64_t end) {
  T* out = row_of<T>(step, step.count);
  const int64_t rows = step.count;
  for_blocks(step, sums, rows + 1, begin, end, [&](int64_t start, int64_t count, double* own) {
    const T *source = from + start, *row = row_of<T>(step, 0) + start;
    for (int64_t r = 0; r < rows; ++r, source = out + start)
      subtract_multiple(out + start, source, row + r * step.n, static_cast<T>(coefficients[r]),
                        count, next_block(step, row, r));
    for (int64_t r = 0; r < rows; ++r)
      own[r] += block_dot(row + r * step.n, out + start, count, row);
    own[rows] += block_squares(out + start, count);
  });
}

template <typename T>
void step_scale(const LanczosStep& step, double factor, int64_t begin, int64_t end) {
  T* row = row_of<T>(step, step.count);
  const int64_t stop = smaller(step.n, end * kStepPiece);
  for (int64_t i = begin * kStepPiece; i < stop; ++i)
    row[i] = factor == 0 ? T(0) : static_cast<T>(row[i] * factor);
}

void lanczos_dots(const LanczosStep& step, double* sums, int64_t begin, int64_t end) {
  if (step.element == Element::kFloat64) return step_dots<double>(step, sums, begin, end);
  step_dots<float>(step, sums, begin, end);
}

void lanczos_subtract(const LanczosStep& step, bool again, const double* coefficients, double* sums,
                      int64_t begin, int64_t end) {
  const auto apply = [&](auto zero) {
    using T = decltype(zero);
    const T* w = again ? row_of<T>(step, step.count) : static_cast<const T*>(step.w);
    step_subtract<T>(step, w, coefficients, sums, begin, end);
  };
  step.element == Element::kFloat64 ? apply(double{}) : apply(float{});
}

void lanczos_scale(const LanczosStep& step, double factor, int64_t begin, int64_t end) {
  if (step.element == Element::kFloat64) return step_scale<double>(step, factor, begin, end);
  step_scale<float>(step, factor, begin, end);
}

}  // namespace
}  // namespace hessreg::spectral::HESSREG_ISA
