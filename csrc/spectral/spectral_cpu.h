#pragma once
#include "spectral.h"

namespace hessreg::spectral {

// Elements of a long vector that are summed up together: sums do not depend on the threads.
constexpr int64_t kStepPiece = 1 << 14;

// The CPU kernels of one instruction set; each works on the matrices [begin, end) of the batch.
// The result for a matrix depends on that matrix alone. workspace_bytes is what one thread needs,
// aligned to 64.
struct CpuKernels {
  void (*power_iteration)(const PowerIteration& problem, void* workspace, int64_t begin,
                          int64_t end);
  void (*lanczos)(const Lanczos& problem, void* workspace, int64_t begin, int64_t end);
  void (*tridiagonal_eigh)(const TridiagonalEigh& problem, void* workspace, int64_t begin,
                           int64_t end);
  void (*symmetric_eigh)(const SymmetricEigh& problem, void* workspace, int64_t begin, int64_t end);
  int64_t (*power_iteration_workspace)(const PowerIteration& problem);
  int64_t (*lanczos_workspace)(const Lanczos& problem);
  int64_t (*tridiagonal_eigh_workspace)(const TridiagonalEigh& problem);
  int64_t (*symmetric_eigh_workspace)(const SymmetricEigh& problem);
  // Pieces [begin, end) of the vectors of a step. sums[piece, row] = the part of <row, w>.
  void (*lanczos_dots)(const LanczosStep& step, double* sums, int64_t begin, int64_t end);
  // Row `count` = w, or itself if `again`, less the multiples of the rows; sums[piece, row] as
  // before of what is left, and its squares last.
  void (*lanczos_subtract)(const LanczosStep& step, bool again, const double* coefficients,
                           double* sums, int64_t begin, int64_t end);
  void (*lanczos_scale)(const LanczosStep& step, double factor, int64_t begin, int64_t end);
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

}  // namespace hessreg::spectral
