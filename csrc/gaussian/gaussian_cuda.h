#pragma once
#include "gaussian.h"

namespace hessreg::gaussian::cuda {

constexpr int64_t kMaxFactors = 8;  // of a sum

// How products of float32 are taken. kFloat32 keeps float32 accuracy; kTF32 rounds the operands to
// TF32, where torch is allowed to. float64 ignores it; half precision is computed in float32.
enum class Precision { kFloat32, kTF32 };

// Scratch memory, in bytes, that a call needs on the device. It may hold anything at the start.
int64_t scratch_bytes(const Sum& problem);
int64_t scratch_bytes(const Energy& problem);

// The calls of gaussian.h. All pointers are on the device, mixtures included; factors is a host
// array of device pointers. Throws std::invalid_argument for more than kMaxFactors factors, 128
// components of a mixture, or 2^31 - 1 tiles of 64 x 64 pairs of a matrix.
void matrix(const Matrix& problem, Precision precision, void* stream);
void sum(const Sum& problem, Precision precision, void* scratch, void* stream);
void energy(const Energy& problem, Precision precision, void* scratch, void* stream);

}  // namespace hessreg::gaussian::cuda
