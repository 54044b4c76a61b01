#include <stdexcept>
#include <string>

#include "eigenvalues.cuh"
#include "jacobi.cuh"
#include "krylov.cuh"
#include "lanczos_step.cuh"
#include "spectral_cuda.h"

namespace hessreg::spectral::cuda {
namespace {

constexpr int64_t kMaxBlocks = 0x7fffffff;

// Dynamic shared memory of a block: of the 99 KB that every architecture since 8.0 has at least, 3
// are for the static arrays.
constexpr int64_t kMaxShared = 96 * 1024;

// A thread holds 32 entries.
template <typename T, int kRows>
using InRegisters = RegisterMatrix<T, kRows, kRows / 32>;

template <typename Body>
auto dispatch(Element element, Body body) {
  return element == Element::kFloat64 ? body.template operator()<double>()
                                      : body.template operator()<float>();
}

// body<Matrix>() with the smallest kind of matrix on chip that has n rows, or with the streamed
// one.
template <typename T, typename Body>
auto dispatch_matrix(int64_t n, bool on_chip, Body body) {
  if (!on_chip) return body.template operator()<StreamedMatrix<T>>();
  if (n <= 32) return body.template operator()<InRegisters<T, 32>>();
  if (n <= 64) return body.template operator()<InRegisters<T, 64>>();
  return body.template operator()<InRegisters<T, 128>>();
}

// body<kRows>() with the smallest size that has n rows.
template <typename Body>
void dispatch_rows(int64_t n, Body body) {
  if (n <= 32) return body.template operator()<32>();
  if (n <= 64) return body.template operator()<64>();
  return body.template operator()<128>();
}

dim3 grid_of(int64_t batch) {
  if (batch > kMaxBlocks) throw std::invalid_argument("spectral: CUDA takes 2^31 - 1 matrices");
  return dim3(static_cast<unsigned>(batch));
}

template <typename T>
bool fits_on_chip(const Lanczos& p) {
  using Matrix = InRegisters<T, 128>;  // n <= 64 always fits
  return p.n <= 64 || (p.n <= Matrix::kRows &&
                       Basis<Matrix>::elements(p.n, p.m) * int64_t{sizeof(T)} <= kMaxShared);
}

template <typename T>
bool columns_fit(int64_t n) {
  return Columns<T>::elements(static_cast<int>(n)) * int64_t{sizeof(T)} <= kMaxShared;
}

int64_t columns_scratch(Element element, int64_t batch, int64_t n) {
  return dispatch(element, [&]<typename T>() -> int64_t {
    if (columns_fit<T>(n)) return 0;
    return batch * Columns<T>::elements(static_cast<int>(n)) * int64_t{sizeof(T)};
  });
}

// Eigenpairs of matrices of n rows, one launch.
template <typename Problem>
void launch_eigenpairs(const Problem& p, int64_t n, void* scratch, cuda_stream stream) {
  dispatch(p.element, [&]<typename T>() {
    if constexpr (sizeof(T) == sizeof(double)) {  // float32 always fits
      if (!columns_fit<T>(n)) {
        HESSREG_LAUNCH((eigenpairs_kernel<T, 128, false, Problem>), grid_of(p.batch),
                       dim3(128 / 2 * kLanes), 0, stream, p, scratch);
        return;
      }
    }
    dispatch_rows(n, [&]<int kRows>() {
      const int64_t bytes = Columns<T>::elements(static_cast<int>(n)) * int64_t{sizeof(T)};
      HESSREG_LAUNCH((eigenpairs_kernel<T, kRows, true, Problem>), grid_of(p.batch),
                     dim3(kRows / 2 * kLanes), bytes, stream, p, scratch);
    });
  });
}

// ---- A step of Lanczos

int64_t bounded(int64_t x, int64_t least, int64_t most) {
  return x < least ? least : x > most ? most : x;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many for each multiprocessor of a large GPU as leave the tiles that are worked on in its
// cache. Results depend on their number, which therefore is not the device's.
int64_t step_blocks(const LanczosStep& step) {
  constexpr int64_t kMultiprocessors = 132, kCache = 24 << 20, kTileBytes = 512;
  const int64_t each =
      bounded(kCache / (kMultiprocessors * kTileBytes * step.count), 1, kStepBlocks);
  const int64_t tiles =
      ceil_div(step.n, step.element == Element::kFloat64 ? kTile<double> : kTile<float>);
  return bounded(tiles, 1, each * kMultiprocessors);
}

// Whether all vectors start at multiples of 16 bytes.
template <typename T>
bool is_packed(const LanczosStep& step) {
  const auto addresses =
      reinterpret_cast<uintptr_t>(step.basis) | reinterpret_cast<uintptr_t>(step.w);
  return addresses % 16 == 0 && step.n % kPack<T> == 0;
}

StepMemory memory_of(const LanczosStep& step, void* scratch) {
  auto* const numbers = static_cast<double*>(scratch);
  return {numbers, numbers + 2, numbers + 2 + step.count};
}

template <typename T, bool kPacked>
void launch_step(const LanczosStep& step, const StepMemory& memory, cuda_stream stream) {
  const int64_t blocks = step_blocks(step), shared = step.count * int64_t{sizeof(double)};
  const dim3 grid(static_cast<unsigned>(blocks)), block(kStepThreads), sum_block(32 * kSumWarps);
  HESSREG_LAUNCH((step_dots_kernel<T, kPacked>), grid, block, shared, stream, step, memory);
  HESSREG_LAUNCH(step_sums_kernel, dim3(1), sum_block, 0, stream, step, memory, blocks, 0);
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    HESSREG_LAUNCH((step_subtract_kernel<T, kPacked>), grid, block, shared, stream, step, memory,
                   pass > 0);
    HESSREG_LAUNCH(step_sums_kernel, dim3(1), sum_block, 0, stream, step, memory, blocks, pass + 1);
  }
  const dim3 scale_grid(static_cast<unsigned>(bounded(ceil_div(step.n, kStepThreads), 1, 1 << 16)));
  HESSREG_LAUNCH((step_scale_kernel<T>), scale_grid, block, 0, stream, step, memory);
}

void check_size(int64_t n) {
  if (n > kMaxSize)
    throw std::invalid_argument("spectral: CUDA finds all eigenvalues up to n = 128, got n = " +
                                std::to_string(n));
}

}  // namespace

int64_t scratch_bytes(const PowerIteration& p) {
  return dispatch(p.element, [&]<typename T>() -> int64_t {
    if (p.n <= kMaxSize) return 0;
    return p.batch * 2 * length_of<StreamedMatrix<T>>(p.n) * int64_t{sizeof(T)};
  });
}

int64_t scratch_bytes(const Lanczos& p) {
  return dispatch(p.element, [&]<typename T>() -> int64_t {
    if (fits_on_chip<T>(p)) return 0;
    return p.batch * Basis<StreamedMatrix<T>>::elements(p.n, p.m) * int64_t{sizeof(T)};
  });
}

int64_t scratch_bytes(const TridiagonalEigh& p) { return columns_scratch(p.element, p.batch, p.m); }

int64_t scratch_bytes(const SymmetricEigh& p) {
  return p.vectors ? columns_scratch(p.element, p.batch, p.n) : 0;
}

int64_t scratch_bytes(const LanczosStep& step) {
  const int64_t numbers = 2 + step.count + (step.count + 1) * step_blocks(step);
  return round_up(numbers * int64_t{sizeof(double)}, 16);
}

void power_iteration(const PowerIteration& p, void* scratch, void* stream) {
  if (p.batch == 0) return;
  dispatch(p.element, [&]<typename T>() {
    dispatch_matrix<T>(p.n, p.n <= kMaxSize, [&]<typename Matrix>() {
      HESSREG_LAUNCH((power_iteration_kernel<Matrix>), grid_of(p.batch), dim3(Matrix::kThreads), 0,
                     static_cast<cuda_stream>(stream), p, scratch);
    });
  });
}

void lanczos(const Lanczos& p, void* scratch, void* stream) {
  if (p.batch == 0 || p.m == 0) return;
  dispatch(p.element, [&]<typename T>() {
    dispatch_matrix<T>(p.n, fits_on_chip<T>(p), [&]<typename Matrix>() {
      const int64_t bytes = Basis<Matrix>::elements(p.n, p.m) * int64_t{sizeof(T)};
      HESSREG_LAUNCH((lanczos_kernel<Matrix>), grid_of(p.batch), dim3(Matrix::kThreads),
                     Matrix::kOnChip ? bytes : 0, static_cast<cuda_stream>(stream), p, scratch);
    });
  });
}

void tridiagonal_eigh(const TridiagonalEigh& p, void* scratch, void* stream) {
  if (p.batch == 0 || p.m == 0) return;
  check_size(p.m);
  launch_eigenpairs(p, p.m, scratch, static_cast<cuda_stream>(stream));
}

void symmetric_eigh(const SymmetricEigh& p, void* scratch, void* stream) {
  if (p.batch == 0 || p.n == 0) return;
  check_size(p.n);
  if (p.vectors) return launch_eigenpairs(p, p.n, scratch, static_cast<cuda_stream>(stream));
  dispatch(p.element, [&]<typename T>() {
    dispatch_rows(p.n, [&]<int kRows>() {
      HESSREG_LAUNCH((eigenvalues_kernel<T, kRows>), grid_of(p.batch), dim3(kRows * kThreadsOfRow),
                     0, static_cast<cuda_stream>(stream), p);
    });
  });
}

void lanczos_step(const LanczosStep& step, void* scratch, void* stream_) {
  if (step.count > kMaxStepRows)
    throw std::invalid_argument("spectral: CUDA takes a basis of up to " +
                                std::to_string(kMaxStepRows) + " rows, got " +
                                std::to_string(step.count));
  const auto stream = static_cast<cuda_stream>(stream_);
  const StepMemory memory = memory_of(step, scratch);
  dispatch(step.element, [&]<typename T>() {
    if (is_packed<T>(step)) return launch_step<T, true>(step, memory, stream);
    launch_step<T, false>(step, memory, stream);
  });
}

}  // namespace hessreg::spectral::cuda
