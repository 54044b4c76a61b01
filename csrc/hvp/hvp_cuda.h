#pragma once
// Multilayer perceptrons and symmetric products on the GPU. Two ways through the layers, chosen on
// the host from the shapes and from what shared memory a block of the device may have:
//
// - One launch a layer: tiles of 64 x 64 or 32 x 32 of an output. Both of its products, such as
//   W Ra + V a, are summed in registers, and what follows from them is done before it is stored.
//   The products are our own, and not a library's: this layer of the package knows no torch, and
//   two products to one sum would otherwise cost one more pass over the output.
// - One launch for all layers, where no width exceeds 128 and the weights fit in the shared memory
//   of a block: each block takes 16 samples at a time from layer to layer.
//
// What it should cost, by count, with k directions, p parameters, batch n, w the sum of the widths:
//
//              multiplications  elements of device memory     launches: by layer, or at once
//   forward    p n              p + 4 w n                     L         1
//   backward   p n              p + 5 w n                     L         1
//   tangent    2 k p n          (k + 1) p + (2 k + 2) w n     L         1
//   adjoint    4 k p n          (2 k + 1) p + (5 k + 6) w n   L or L+1  2
//   symmetric  n^2 columns      n^2 / 2 + 2 n columns         1
//   second t.  7 p n            6 p + 19 w n                  3 L - 1   2 L
//   second a.  11 p n           9 p + 34 w n                  3 L - 1   2 L + 1
//
// and one launch more where a long depth with few tiles is summed in parts. The tangent and the
// adjoint of second order begin with those of two directions, at once if they fit; what comes on
// top of these goes by layer, with a launch for each two products of a sum. What several tiles
// share, the weights among it, comes from the L2 cache: one element for 32 or 64 multiplications.
// From shared memory, a thread multiplies and adds 32 times for three loads of 16 bytes in tiles of
// 64 x 64; in those of 32 x 32, which are used where others would leave multiprocessors idle, 8
// times for one and a half. At once, latency counts: a block asks for all weights in one go, and
// then reads of device memory only what it multiplies by element. None of this is measured.
#include "hvp.h"

namespace hessreg::hvp::cuda {

// Scratch memory, in bytes, that a call needs on the device. It may hold anything at the start.
int64_t scratch_bytes(const Forward& problem);
int64_t scratch_bytes(const Backward& problem);
int64_t scratch_bytes(const Tangent& problem);
int64_t scratch_bytes(const Adjoint& problem);
int64_t scratch_bytes(const SecondTangent& problem);
int64_t scratch_bytes(const SecondAdjoint& problem);
int64_t scratch_bytes(const SymmetricProduct& problem);

// The calls of hvp.h. Lists are host arrays of device pointers. float32 keeps float32 accuracy.
// Throws std::invalid_argument for more than 2^31 - 1 tiles.
void forward(const Forward& problem, void* scratch, void* stream);
void backward(const Backward& problem, void* scratch, void* stream);
void tangent(const Tangent& problem, void* scratch, void* stream);
void adjoint(const Adjoint& problem, void* scratch, void* stream);
void second_tangent(const SecondTangent& problem, void* scratch, void* stream);
void second_adjoint(const SecondAdjoint& problem, void* scratch, void* stream);
void symmetric_product(const SymmetricProduct& problem, void* scratch, void* stream);

}  // namespace hessreg::hvp::cuda
