#pragma once
#include "gaussian.h"

namespace hessreg::gaussian {

// Points are worked on in blocks of so many: a multiple of what any instruction set takes at a
// time, and small enough for the weights of a pair of blocks to stay in the second-level cache.
constexpr int64_t kBlock = 192;

// Blocks of equal size but for the last, of which none is larger than `most`, a multiple of kBlock.
struct Blocks {
  int64_t points, count, size;

  HESSREG_HD explicit Blocks(int64_t points, int64_t most = kBlock)
      : points(points), count((points + most - 1) / most), size(0) {
    constexpr int64_t kStep = 64;  // whole panels
    if (count > 0) size = ((points + count - 1) / count + kStep - 1) / kStep * kStep;
    if (size > 0) count = (points + size - 1) / size;
  }
  HESSREG_HD int64_t begin(int64_t block) const {
    return block * size < points ? block * size : points;
  }
  HESSREG_HD int64_t end(int64_t block) const { return begin(block + 1); }
};

// An energy goes over spans of several blocks, so that what is laid out once serves several pairs
// of blocks; over single ones where there would be too few spans for many threads.
constexpr int64_t kMaxSpan = 4 * kBlock;
HESSREG_HD int64_t span_for(int64_t count) {
  constexpr int64_t kSpans = 10;
  const int64_t blocks = count > 0 ? (count + kSpans * kBlock - 1) / (kSpans * kBlock) : 1;
  return blocks * kBlock < kMaxSpan ? blocks * kBlock : kMaxSpan;
}

// Points [begin, end) of an energy, all among the first or all among the rest.
struct Range {
  int64_t begin, end;
  HESSREG_HD int64_t size() const { return end - begin; }
};

// Up to so many dimensions, distances are taken from differences, and gradients in registers.
constexpr int64_t kDirect = 4;

// The width of one point in the gradients of an energy: whole vectors, beyond few dimensions.
HESSREG_HD int64_t gradient_width(int64_t d) { return d <= kDirect ? d : (d + 15) / 16 * 16; }

// One pair of spans of one sample. The pairs of a round have no span in common.
struct SpanPair {
  int64_t batch;
  Range i, j;
};

// The CPU kernels of one instruction set. workspace_bytes is what one thread needs, aligned to 64.
struct CpuKernels {
  // Works on rows [begin, end) of the blocks of x of all samples, counted through.
  void (*matrix)(const Matrix& problem, void* workspace, int64_t begin, int64_t end);
  void (*sum)(const Sum& problem, void* workspace, int64_t begin, int64_t end);
  // Pairs [begin, end): values[pair] = sum of w phi over the pair, both orders; and gradient
  // [batch, count, gradient_width(d)] grows by the pair's part, unless it is null.
  void (*energy)(const Energy& problem, const SpanPair* pairs, double* values, double* gradient,
                 void* workspace, int64_t begin, int64_t end);
  int64_t (*matrix_workspace)(const Matrix& problem);
  int64_t (*sum_workspace)(const Sum& problem);
  int64_t (*energy_workspace)(const Energy& problem);
};

namespace baseline {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}

}  // namespace hessreg::gaussian
