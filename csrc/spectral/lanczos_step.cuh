// A step of Lanczos on long vectors, in launches of a fixed number: memory traffic is all that
// counts.
//
// A block takes tiles of columns, 512 bytes of every row, and its warps share the rows. The
// coefficients cost one reading of the basis. Subtracting costs another: what is left of a tile is
// then checked against the rows, which the block has just read and still has in its cache. Whether
// to subtract again is decided on the device; launches that are not needed return at once. Blocks
// leave their sums in float64, which one block adds up in their order.
#pragma once

#include "block.cuh"

namespace hessreg::spectral::cuda {

// A warp has so many loads under way, each of 16 bytes a lane.
constexpr int kStepWarps = 8, kStepRows = 8, kStepThreads = 32 * kStepWarps;
constexpr int kStepBlocks = 3;  // that one multiprocessor runs at a time
constexpr int kSumWarps = 32;
constexpr int kMaxPasses = 3;

template <typename T>
constexpr int kTile = 32 * kPack<T>;

// What the launches of a step leave each other.
struct StepMemory {
  double* state;         // [2]: whether to subtract (again); the factor of the row at the end
  double* coefficients;  // [count]: what to subtract
  double* partials;      // [count + 1, blocks]: sums of each block
};

__device__ __forceinline__ int step_lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int step_warp() { return static_cast<int>(threadIdx.x) / 32; }

// ---- Tiles

// This lane's part of a tile, zero beyond the `rest` of the vector: neighbours, or every 32nd
// element where rows are not aligned.
template <typename T, bool kPacked>
__device__ __forceinline__ Pack<T> load_part(const T* x, int64_t rest) {
  Pack<T> part{};
  if constexpr (kPacked) {
    const int column = step_lane() * kPack<T>;
    if (column < rest) part = load_pack(x + column);
  } else {
    HESSREG_UNROLL
    for (int e = 0; e < kPack<T>; ++e) {
      const int column = step_lane() + 32 * e;
      if (column < rest) part.values[e] = x[column];
    }
  }
  return part;
}

template <typename T, bool kPacked>
__device__ __forceinline__ void store_part(T* x, const Pack<T>& part) {
  if constexpr (kPacked) {
    store_pack(x + step_lane() * kPack<T>, part);
  } else {
    HESSREG_UNROLL
    for (int e = 0; e < kPack<T>; ++e) x[step_lane() + 32 * e] = part.values[e];
  }
}

// use(first, parts) for this warp's rows, first + kStepWarps u for u < kStepRows; zero beyond the
// last.
template <typename T, bool kPacked, typename Use>
__device__ __forceinline__ void for_own_rows(const LanczosStep& step, int64_t start, Use use) {
  const T* const tile = static_cast<const T*>(step.basis) + start;
  for (int64_t first = step_warp(); first < step.count; first += kStepWarps * kStepRows) {
    Pack<T> parts[kStepRows];
    HESSREG_UNROLL
    for (int u = 0; u < kStepRows; ++u) {
      const int64_t row = first + kStepWarps * u;
      const int64_t rest = row < step.count ? step.n - start : 0;
      parts[u] = load_part<T, kPacked>(tile + row * step.n, rest);
    }
    use(first, parts);
  }
}

// ---- Sums of the rows

// The sums over the warp of all values; lane / 4 says which of them a lane has.
template <typename T>
__device__ __forceinline__ T sum_each(T (&values)[kStepRows]) {
  static_assert(kStepRows == 8);
  HESSREG_UNROLL
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = step_lane() & 4 * half;
    HESSREG_UNROLL
    for (int i = 0; i < half; ++i) {
      const T kept = upper ? values[i + half] : values[i];
      const T given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(~0u, given, 4 * half);
    }
  }
  return group_sum<4>(values[0]);
}

template <typename T>
__device__ __forceinline__ T part_product(const Pack<T>& x, const Pack<T>& y) {
  T products[kPack<T>];
  HESSREG_UNROLL
  for (int e = 0; e < kPack<T>; ++e) products[e] = x.values[e] * y.values[e];
  return total<T>(products);
}

// The sum that this lane keeps of the rows from `first` on; none if it is not below the count.
__device__ __forceinline__ int64_t own_row(const LanczosStep& step, int64_t first) {
  return step_lane() % 4 == 0 ? first + kStepWarps * (step_lane() / 4) : step.count;
}

template <typename Use>
__device__ __forceinline__ void for_own_sums(const LanczosStep& step, Use use) {
  for (int64_t first = step_warp(); first < step.count; first += kStepWarps * kStepRows) {
    const int64_t row = own_row(step, first);
    if (row < step.count) use(row);
  }
}

// sums[row] += <row, x> over a tile. Each sum is always the same lane's.
template <typename T, bool kPacked>
__device__ __forceinline__ void add_dots(const LanczosStep& step, int64_t start, const Pack<T>& x,
                                         double* sums) {
  for_own_rows<T, kPacked>(step, start, [&](int64_t first, const Pack<T>(&parts)[kStepRows]) {
    T dots[kStepRows];
    HESSREG_UNROLL
    for (int u = 0; u < kStepRows; ++u) dots[u] = part_product(parts[u], x);
    const T sum = sum_each(dots);
    const int64_t row = own_row(step, first);
    if (row < step.count) sums[row] += sum;
  });
}

__device__ __forceinline__ void clear_sums(const LanczosStep& step, double* sums) {
  for_own_sums(step, [&](int64_t row) { sums[row] = 0; });
}

__device__ __forceinline__ void leave_sums(const LanczosStep& step, const double* sums,
                                           double* partials) {
  for_own_sums(step, [&](int64_t row) { partials[row * gridDim.x + blockIdx.x] = sums[row]; });
}

template <typename T, typename Use>
__device__ __forceinline__ void for_tiles(const LanczosStep& step, Use use) {
  const int64_t stride = int64_t{gridDim.x} * kTile<T>;  // blocks at work read the same pages
  for (int64_t start = int64_t{blockIdx.x} * kTile<T>; start < step.n; start += stride) use(start);
}

// ---- Kernels

template <typename T, bool kPacked>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks)
    step_dots_kernel(LanczosStep step, StepMemory memory) {
  HESSREG_DYNAMIC_SHARED(double, sums);  // [count]
  clear_sums(step, sums);
  for_tiles<T>(step, [&](int64_t start) {
    const T* const w = static_cast<const T*>(step.w) + start;
    add_dots<T, kPacked>(step, start, load_part<T, kPacked>(w, step.n - start), sums);
  });
  leave_sums(step, sums, memory.partials);
}

// This warp's share of the multiples of the rows that are to be subtracted.
template <typename T, bool kPacked>
__device__ __forceinline__ Pack<T> own_multiples(const LanczosStep& step, int64_t start,
                                                 const double* coefficients) {
  Pack<T> multiples{};
  for_own_rows<T, kPacked>(step, start, [&](int64_t first, const Pack<T>(&parts)[kStepRows]) {
    HESSREG_UNROLL
    for (int u = 0; u < kStepRows; ++u) {
      const int64_t row = first + kStepWarps * u;
      const T coefficient = row < step.count ? static_cast<T>(coefficients[row]) : T(0);
      HESSREG_UNROLL
      for (int e = 0; e < kPack<T>; ++e) multiples.values[e] += coefficient * parts[u].values[e];
    }
  });
  return multiples;
}

// One column of a tile: what is left of it, in the next row of the basis; zero beyond the last.
template <typename T>
__device__ __forceinline__ T subtract_column(const LanczosStep& step, const T* from, int64_t column,
                                             const T (&multiples)[kStepWarps][kTile<T>]) {
  if (column >= step.n) return T(0);
  T sum = 0;
  HESSREG_UNROLL
  for (int warp = 0; warp < kStepWarps; ++warp) sum += multiples[warp][threadIdx.x];
  const T left = from[column] - sum;
  static_cast<T*>(step.basis)[step.count * step.n + column] = left;
  return left;
}

template <typename T, bool kPacked>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks)
    step_subtract_kernel(LanczosStep step, StepMemory memory, bool again) {
  HESSREG_DYNAMIC_SHARED(double, sums);  // [count]
  HESSREG_SHARED(T, multiples, [kStepWarps][kTile<T>]);
  HESSREG_SHARED(T, left, [kTile<T>]);
  if (memory.state[0] == 0) return;
  const T* const next = static_cast<const T*>(step.basis) + step.count * step.n;
  const T* const from = again ? next : static_cast<const T*>(step.w);
  double squares = 0;  // in float64: those of small entries would vanish
  clear_sums(step, sums);
  for_tiles<T>(step, [&](int64_t start) {
    store_part<T, kPacked>(multiples[step_warp()],
                           own_multiples<T, kPacked>(step, start, memory.coefficients));
    __syncthreads();
    if (threadIdx.x < kTile<T>) {
      const T x = subtract_column(step, from, start + threadIdx.x, multiples);
      left[threadIdx.x] = x;
      squares += static_cast<double>(x) * x;
    }
    __syncthreads();
    add_dots<T, kPacked>(step, start, load_part<T, kPacked>(left, kTile<T>), sums);
  });
  leave_sums(step, sums, memory.partials);
  squares = Reduction<kStepWarps>().sum(squares);
  if (threadIdx.x == 0) memory.partials[step.count * gridDim.x + blockIdx.x] = squares;
}

// The sum of a row of partial sums, in all lanes.
__device__ __forceinline__ double sum_blocks(const double* partials, int64_t blocks) {
  double sum = 0;
  for (int64_t block = step_lane(); block < blocks; block += 32) sum += partials[block];
  return group_sum<32>(sum);
}

// The sums of the rows become coefficients, to be subtracted (again) if there is need.
__device__ __forceinline__ void take_coefficients(const LanczosStep& step, const StepMemory& memory,
                                                  bool again) {
  for (int64_t row = threadIdx.x; row < step.count; row += 32 * kSumWarps)
    step.result[row] = memory.coefficients[row] + (again ? step.result[row] : 0);
  if (threadIdx.x == 0) memory.state[0] = 1;
}

// One block, after so many passes of subtracting.
__global__ void __launch_bounds__(32 * kSumWarps)
    step_sums_kernel(LanczosStep step, StepMemory memory, int64_t blocks, int passes) {
  if (passes > 0 && memory.state[0] == 0) return;
  double squares = 0;
  for (int64_t row = step_warp(); row < step.count; row += kSumWarps) {
    const double sum = sum_blocks(memory.partials + row * blocks, blocks);
    if (step_lane() > 0) continue;
    memory.coefficients[row] = sum;
    squares += sum * sum;
  }
  squares = Reduction<kSumWarps>().sum(squares);
  if (passes == 0) return take_coefficients(step, memory, false);
  const double left = sum_blocks(memory.partials + step.count * blocks, blocks);
  if (passes < kMaxPasses && needs_another_pass(step, squares, left))
    return take_coefficients(step, memory, true);
  if (threadIdx.x > 0) return;
  memory.state[0] = 0;
  memory.state[1] = finish(step, left);
}

template <typename T>
__global__ void __launch_bounds__(kStepThreads)
    step_scale_kernel(LanczosStep step, StepMemory memory) {
  const double factor = memory.state[1];
  T* const row = static_cast<T*>(step.basis) + step.count * step.n;
  const int64_t stride = int64_t{gridDim.x} * kStepThreads;
  for (int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x; i < step.n; i += stride)
    row[i] = factor == 0 ? T(0) : static_cast<T>(row[i] * factor);
}

}  // namespace hessreg::spectral::cuda
