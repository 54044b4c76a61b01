#pragma once
#include "spectral.h"

namespace hessreg::spectral::cuda {

// The largest matrix of which all eigenvalues are found.
constexpr int64_t kMaxSize = 128;
// The most rows a long vector is made orthogonal to: a block holds a sum for each.
constexpr int64_t kMaxStepRows = 12 * 1024;

// Scratch memory, in bytes, that a call needs on the device. It may hold anything at the start.
int64_t scratch_bytes(const PowerIteration& problem);
int64_t scratch_bytes(const Lanczos& problem);
int64_t scratch_bytes(const TridiagonalEigh& problem);
int64_t scratch_bytes(const SymmetricEigh& problem);
int64_t scratch_bytes(const LanczosStep& step);

// The calls of spectral.h, each one launch but the last. All pointers are on the device. Throws
// std::invalid_argument for n (or m of tridiagonal matrices) above kMaxSize where all eigenvalues
// are wanted, for 2^31 matrices, and for more than kMaxStepRows rows of a basis.
void power_iteration(const PowerIteration& problem, void* scratch, void* stream);
void lanczos(const Lanczos& problem, void* scratch, void* stream);
void tridiagonal_eigh(const TridiagonalEigh& problem, void* scratch, void* stream);
void symmetric_eigh(const SymmetricEigh& problem, void* scratch, void* stream);
void lanczos_step(const LanczosStep& step, void* scratch, void* stream);

}  // namespace hessreg::spectral::cuda
