#pragma once
// What every projection kernel shares: how lists of tensors fall into segments, how segments are
// cut into pieces of work. No torch, no CUDA runtime.
#include "../common/element.h"

namespace hessreg::projection {

// One tensor position of the lists, seen as [batch, rows, length]: row r of sample b belongs to
// segment b * segments + first_segment + r and is cut into pieces of at most piece_length elements.
struct Position {
  int64_t rows, length, first_segment, first_piece;
};

// m lists of tensors with the same shapes.
struct Lists {
  const void* const* data;    // [num_lists, num_positions], each contiguous
  const Position* positions;  // [num_positions]
  int64_t num_lists, num_positions;
  int64_t batch, segments;  // segments per sample
  int64_t piece_length;
  Element element;
  bool streaming = false;  // CPU: write results past the caches
};

HESSREG_HD int64_t pieces_per_row(int64_t length, int64_t piece_length) {
  return (length + piece_length - 1) / piece_length;
}

// Where a piece lies.
struct Piece {
  int64_t position, segment, offset, length;
};

HESSREG_HD Piece locate(const Position* positions, int64_t position, int64_t segments,
                        int64_t piece_length, int64_t piece) {
  const Position& p = positions[position];
  const int64_t per_row = pieces_per_row(p.length, piece_length);
  const int64_t row = (piece - p.first_piece) / per_row;
  const int64_t start = (piece - p.first_piece) % per_row * piece_length;
  const int64_t rest = p.length - start;
  return {position, row / p.rows * segments + p.first_segment + row % p.rows,
          row * p.length + start, rest < piece_length ? rest : piece_length};
}

// The position that holds a piece, among those with ascending first_piece.
HESSREG_HD int64_t position_of(const Position* positions, int64_t count, int64_t piece) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (positions[middle].first_piece <= piece ? low : high) = middle;
  }
  return low;
}

// How many inner products of m vectors are distinct, and where <x_a, x_b>, a <= b, is kept.
HESSREG_HD int64_t num_pairs(int64_t m) { return m * (m + 1) / 2; }
HESSREG_HD int64_t pair_index(int64_t a, int64_t b, int64_t m) {
  return a * m - a * (a - 1) / 2 + b - a;
}

// Whether a float32 pair holds a weight. Outside this range terms are combined in float64:
// gradients of 1e-30 and 1e18 have a coefficient of 1e-48.
HESSREG_HD bool fits_float32(double weight) {
  const double size = std::fabs(weight);
  return size == 0 || (size >= 0x1p-100 && size <= 0x1p100);
}

}  // namespace hessreg::projection
