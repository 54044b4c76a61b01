#pragma once
#include "projection.h"

namespace hessreg::projection {

// The CPU kernels of one instruction set; each works on the pieces [begin, end).
struct CpuKernels {
  // partials[piece, pair] = inner product over the piece.
  void (*gram)(const Lists& x, double* partials, int64_t begin, int64_t end);
  // out[c] = sum_a weights[segment, c, a] x[a]; out: [num_outputs, num_positions] pointers.
  void (*linear_combination)(const Lists& x, const double* weights, void* const* out,
                             int64_t num_outputs, int64_t begin, int64_t end);
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

}  // namespace hessreg::projection
