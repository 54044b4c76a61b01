// Sample kernels with bugs planted on demand, for testing that the emulator finds them.
#pragma once

#include <cstdint>

namespace hessreg::planted {

enum class Bug : int {
  kNone,
  // warp_sum, block_sum
  kShuffleStartsAtEight,   // half of the lanes are never added
  kMaskNamesHalfTheWarp,   // although all lanes call
  kScratchReusedTooEarly,  // no barrier between two calls
  kScratchReadTooEarly,    // no barrier between write and read
  kOneSlotTooMany,         // reads a warp's sum that no warp has written
  // project, ratio
  kPlainAddAcrossBlocks,  // instead of an atomic
  kNoGridSync,
  kNoFence,           // between the partial sums and the ticket
  kFenceTooEarly,     // before the partial sums
  kSumOfAnotherWarp,  // is not ordered with the fence: no barrier between
  // gaussian_rows
  kTileReplacedTooEarly,  // no barrier between use and next load
  kTileUsedTooEarly,      // no barrier between load and use
  kOneColumnTooMany,      // reads the padding of a tile
  kNoTailGuard,           // reads rows past the end of x, and does not use them
  kEarlyReturn,           // of warps without rows, in front of a barrier
  kTailNotCleared,        // leaves the rest of a tile uninitialised
  kMisalignedVector,
  kUnpaddedTile,  // right but slow: bank conflicts
  // matrix_product
  kWaitsForOneGroupLess,
  kCopyPastTheEnd,  // of rows that do not exist
  kFragmentSwapped,
  kStageReplacedTooEarly,  // no barrier between use and next load
  // power_iteration
  kThreadsLeaveAlone,  // each judges its own component
  kFlagReadWithoutBarrier,
  // warp_scan, axpy
  kNoWarpBarrier,  // the lanes are taken to run in lockstep
  kVoteAsBarrier,  // brings the lanes together, but does not order their accesses
  kOneElementTooMany,
};

// out = g - <g, v> / <v, v> v in one cooperative launch; sums: [2], zero at the start.
void project(const float* g, const float* v, float* sums, float* out, int n, int blocks, Bug bug);

// out[0] = <g, v> / <v, v>, by the last block; partials: [blocks, 2]; ticket: zero at the start.
void ratio(const float* g, const float* v, float* partials, uint32_t* ticket, float* out, int n,
           int blocks, Bug bug);

// out[i] = sum_j w[j] exp(-c |x_i - y_j|^2) for x: [n, d], y: [m, d].
struct GaussianRows {
  const float *x, *y, *w;
  float* out;
  int n, m, d;
  float c;
};
void gaussian_rows(const GaussianRows& arguments, Bug bug);

// c = a b' on tensor cores for a: [m, k], b: [n, k], c: [m, n]; k a multiple of 4.
void matrix_product(const float* a, const float* b, float* c, int m, int n, int k, Bug bug);

// The eigenvalue of largest modulus of each matrix, and its vector; a: [batch, n, n], n <= 64.
struct PowerIteration {
  const float* a;
  float *value, *vector;
  int batch, n, iterations;
  float tolerance;
};
void power_iteration(const PowerIteration& arguments, Bug bug);

// Prefix sums within groups of 32.
void warp_scan(const float* x, float* out, int n, Bug bug);

// out = g - c[0] v
void axpy(const float* g, const float* v, const float* c, float* out, int n, Bug bug);

}  // namespace hessreg::planted
