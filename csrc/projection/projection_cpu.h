#pragma once
#include "projection.h"

namespace hessreg::projection {

// Goes through the pieces in their order without dividing at each.
class Walker {
 public:
  HESSREG_HD Walker(const Lists& x, int64_t piece)
      : x_(x), position_(position_of(x.positions, x.num_positions, piece)) {
    const int64_t per_row = pieces_per_row(here().length, x.piece_length);
    row_ = (piece - here().first_piece) / per_row;
    start_ = (piece - here().first_piece) % per_row * x.piece_length;
  }

  HESSREG_HD Piece piece() const {
    const int64_t rest = here().length - start_;
    return {position_, segment(), row_ * here().length + start_,
            rest < x_.piece_length ? rest : x_.piece_length};
  }

  HESSREG_HD void advance() {
    start_ += x_.piece_length;
    if (start_ < here().length) return;
    start_ = 0;
    if (++row_ < x_.batch * here().rows) return;
    row_ = 0;
    do ++position_;
    while (position_ < x_.num_positions && x_.batch * here().rows * here().length == 0);
  }

 private:
  HESSREG_HD const Position& here() const { return x_.positions[position_]; }
  HESSREG_HD int64_t segment() const {
    const int64_t sample = x_.batch == 1 ? 0 : row_ / here().rows;
    return sample * x_.segments + here().first_segment + row_ - sample * here().rows;
  }

  const Lists& x_;
  int64_t position_, row_, start_;
};

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
