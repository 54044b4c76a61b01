#pragma once
// Multilayer perceptrons and symmetric products on the GPU. Two ways through the layers, chosen on
// the host from the shapes and from what shared memory a block of the device may have:
//
// - One launch a layer: tiles of 64 x 64 or 32 x 32 of an output. Both products of an output (W Ra
// +
//   V a) are summed in registers, and what follows from it is done before it is stored once. The
//   products are our own, and not a library's: this layer of the package knows no torch, and two
//   products to one sum would otherwise cost a pass over the output more.
// - One launch for all layers, where no width exceeds 128 and the weights fit in the shared memory
//   of a block: each block takes 16 samples at a time from layer to layer.
//
// What it should cost, with k directions, p parameters, batch n, and w the sum of the widths:
//
//              multiplications   bytes, in elements   launches: layers one by one, all at once
//   forward    p n               p + 3 w n            L      1
//   backward   p n               p + 4 w n            L      1
//   tangent    2 k p n           (k + 1) p + 3 k w n  L      1
//   adjoint    4 k p n           2 k p + 6 k w n      L + 1  2   (one more with partial sums)
//   symmetric  n^2 columns       n^2 / 2 (the cache willing; else n^2) + 2 n columns    1 or 2
//
// Operands that several tiles share are read again from the L2 cache, a 32nd or 64th of the
// multiplications. A tile of 64 x 64 takes 32 multiply-adds from three shared loads of 16 bytes,
// and is bound by arithmetic; one of 32 x 32 is bound by shared memory, and used where those of 64
// would leave multiprocessors idle. At once, latency counts: a block loads all weights in one go,
// and then reads from device memory only what it multiplies by element.
#include "hvp.h"

namespace hessreg::hvp::cuda {

// Scratch memory, in bytes, that a call needs on the device. It may hold anything at the start.
int64_t scratch_bytes(const Forward& problem);
int64_t scratch_bytes(const Backward& problem);
int64_t scratch_bytes(const Tangent& problem);
int64_t scratch_bytes(const Adjoint& problem);
int64_t scratch_bytes(const SymmetricProduct& problem);

// The calls of hvp.h. Lists are host arrays of device pointers. float32 keeps float32 accuracy.
// Throws std::invalid_argument for more than 2^31 - 1 tiles.
void forward(const Forward& problem, void* scratch, void* stream);
void backward(const Backward& problem, void* scratch, void* stream);
void tangent(const Tangent& problem, void* scratch, void* stream);
void adjoint(const Adjoint& problem, void* scratch, void* stream);
void symmetric_product(const SymmetricProduct& problem, void* scratch, void* stream);

}  // namespace hessreg::hvp::cuda
