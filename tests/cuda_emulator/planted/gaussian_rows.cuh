// Rows of a Gaussian kernel matrix times a vector, from tiles of 32 x 32 in shared memory.
#pragma once

#include "common/cuda_compat.cuh"
#include "planted.h"
#include "reductions.cuh"

namespace hessreg::planted {

constexpr int kTile = 32;  // rows of x, rows of y, and columns of both
constexpr int kWarpsOfTile = 8;
constexpr int kRowsOfWarp = kTile / kWarpsOfTile;

template <Bug kBug>
constexpr int kTileStride = kBug == Bug::kUnpaddedTile ? kTile : kTile + 1;

template <Bug kBug>
using Tile = float[kTile][kTileStride<kBug>];

// Loads rows [row0, row0 + 32) and columns [k0, k0 + 32) of source: [rows, d]; zero outside.
template <Bug kBug>
__device__ void load_scalars(Tile<kBug>& tile, const float* source, int rows, int d, int row0,
                             int k0) {
  const int column = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < kTile; row += kWarpsOfTile) {
    const bool has_row = row0 + row < rows || kBug == Bug::kNoTailGuard;
    const bool inside = has_row && k0 + column < d;
    const float* element = source + int64_t{row0 + row} * d + k0 + column;
    if constexpr (kBug == Bug::kTailNotCleared) {
      if (inside) tile[row][column] = *element;
    } else {
      tile[row][column] = inside ? *element : 0.0f;
    }
  }
}

// The same for d a multiple of 4, with one vector load for each thread.
template <Bug kBug>
__device__ void load_vectors(Tile<kBug>& tile, const float* source, int rows, int d, int row0,
                             int k0) {
  const int row = threadIdx.x / 8, column = threadIdx.x % 8 * 4;
  float4 values = make_float4(0, 0, 0, 0);
  if (row0 + row < rows && k0 + column < d) {
    const int shift = kBug == Bug::kMisalignedVector ? 1 : 0;
    const float* element = source + int64_t{row0 + row} * d + k0 + column + shift;
    values = *reinterpret_cast<const float4*>(element);
  }
  tile[row][column] = values.x;
  tile[row][column + 1] = values.y;
  tile[row][column + 2] = values.z;
  tile[row][column + 3] = values.w;
}

template <Bug kBug>
__global__ void __launch_bounds__(kTile* kWarpsOfTile)
    gaussian_rows_kernel(const GaussianRows __grid_constant__ arguments) {
  constexpr Bug kBugOfY = kBug == Bug::kUnpaddedTile ? kBug : Bug::kNone;
  HESSREG_SHARED(Tile<kBug>, x_tile);
  HESSREG_SHARED(Tile<kBugOfY>, y_tile);
  const auto& [x, y, w, out, n, m, d, c] = arguments;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * kRowsOfWarp;
  const int i0 = blockIdx.x * kTile;
  if constexpr (kBug == Bug::kEarlyReturn) {
    if (i0 + first_row >= n) return;
  }
  float sums[kRowsOfWarp] = {};
  for (int j0 = 0; j0 < m; j0 += kTile) {
    float distances[kRowsOfWarp] = {};
    for (int k0 = 0; k0 < d; k0 += kTile) {
      if (d % 4 == 0) {
        load_vectors<kBug>(x_tile, x, n, d, i0, k0);
        load_vectors<kBugOfY>(y_tile, y, m, d, j0, k0);
      } else {
        load_scalars<kBug>(x_tile, x, n, d, i0, k0);
        load_scalars<kBugOfY>(y_tile, y, m, d, j0, k0);
      }
      if constexpr (kBug != Bug::kTileUsedTooEarly) __syncthreads();
      constexpr int kColumns = kBug == Bug::kOneColumnTooMany ? kTile + 1 : kTile;
      for (int k = 0; k < kColumns; ++k) {
        for (int r = 0; r < kRowsOfWarp; ++r) {
          const float difference = x_tile[first_row + r][k] - y_tile[lane][k];
          distances[r] += difference * difference;
        }
      }
      if constexpr (kBug != Bug::kTileReplacedTooEarly) __syncthreads();
    }
    const float weight = j0 + lane < m ? w[j0 + lane] : 0.0f;
    for (int r = 0; r < kRowsOfWarp; ++r) {
      sums[r] += weight * ex2(-1.4426950408889634f * c * distances[r]);
    }
  }
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const float sum = warp_sum<kBug>(sums[r]);
    const int i = i0 + first_row + r;
    if (lane == 0 && i < n) out[i] = sum;
  }
}

}  // namespace hessreg::planted
