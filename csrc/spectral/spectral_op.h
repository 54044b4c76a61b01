#pragma once
// The operators of this family that others are made of.
#include "../common/binding.h"

namespace hessreg::spectral {

// Eigenvalues [batch, m] and eigenvectors [batch, m, m] of tridiagonal matrices.
std::vector<Tensor> tridiagonal_eigh_op(Tensor alpha, Tensor beta);

// Makes w the row `count` of an orthonormal basis; see hessreg.ops.spectral.lanczos_step.
Tensor lanczos_step_op(Tensor basis, Tensor w, int64_t count, Tensor largest, double breakdown);

}  // namespace hessreg::spectral
