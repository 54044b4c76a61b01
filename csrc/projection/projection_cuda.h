#pragma once
#include "projection_rules.h"

namespace hessreg::projection::cuda {

// Elements of one block's piece of work.
constexpr int64_t kPieceLength = 4096;

// gram[segment, a, b] = <x_a, x_b>. partials: scratch for num_pieces * num_pairs doubles. With an
// outcome (or null) also what it asks for.
void gram(const Lists& x, double* partials, double* gram, const Outcome* outcome, void* stream);

// out[c] = sum_a weights[segment, c, a] x[a]; out: [num_outputs, num_positions] device pointers,
// which may be those of x where there is one output.
void linear_combination(const Lists& x, const double* weights, void* const* out,
                        int64_t num_outputs, void* stream);

}  // namespace hessreg::projection::cuda
