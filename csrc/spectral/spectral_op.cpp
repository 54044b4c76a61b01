#include "spectral_op.h"

#include <algorithm>
#include <memory>

#include "spectral.h"
#ifdef HESSREG_CUDA
#include "spectral_cuda.h"
#else
#include "../common/cpu_isa.h"
#include "spectral_cpu.h"
#endif

namespace hessreg::spectral {
namespace {

Element wide_element_of(const Tensor& tensor) {
  const Element element = element_of(tensor, "spectral");
  STD_TORCH_CHECK(element == Element::kFloat32 || element == Element::kFloat64,
                  "spectral: expected float32 or float64");
  return element;
}

Tensor checked_matrices(const Tensor& a) {
  STD_TORCH_CHECK(a.dim() == 3 && a.size(1) == a.size(2), "spectral: a must be [batch, n, n], got ",
                  a.dim(), " dimensions", a.dim() == 3 ? " that are not square" : "");
  wide_element_of(a);
  return as_contiguous(a);
}

// Checks that a tensor is [batch, n] like the model.
Tensor checked_vectors(const Tensor& v, const char* name, const Tensor& model, int64_t n) {
  STD_TORCH_CHECK(v.dim() == 2 && v.size(0) == model.size(0) && v.size(1) == n, "spectral: ", name,
                  " must be [", model.size(0), ", ", n, "]");
  STD_TORCH_CHECK(are_alike(v, model), "spectral: ", name,
                  " differs from the first argument in dtype or device");
  return as_contiguous(v);
}

#ifdef HESSREG_CUDA

template <typename Problem>
void run(void (*launch)(const Problem&, void* scratch, void* stream), const Problem& problem,
         const Tensor& like) {
  if (problem.batch == 0) return;
  const Executor executor(like);
  Tensor scratch = torch::stable::new_empty(like, {cuda::scratch_bytes(problem)}, ScalarType::Byte);
  launch(problem, scratch.mutable_data_ptr(), executor.stream());
}

void run(const PowerIteration& problem, const Tensor& like) {
  run(cuda::power_iteration, problem, like);
}
void run(const Lanczos& problem, const Tensor& like) { run(cuda::lanczos, problem, like); }
void run(const TridiagonalEigh& problem, const Tensor& like) {
  run(cuda::tridiagonal_eigh, problem, like);
}
void run(const SymmetricEigh& problem, const Tensor& like) {
  run(cuda::symmetric_eigh, problem, like);
}
void run(const LanczosStep& step, const Tensor& like) {
  const Executor executor(like);
  Tensor scratch = torch::stable::new_empty(like, {cuda::scratch_bytes(step)}, ScalarType::Byte);
  cuda::lanczos_step(step, scratch.mutable_data_ptr(), executor.stream());
}

#else

const CpuKernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() == Isa::kAvx512) return avx512::kernels;
  if (active_isa() == Isa::kAvx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

constexpr size_t kAlignment = 64;

// Runs a kernel over the batch, in torch's thread pool where there is work enough: each thread
// then gets whole vectors of matrices, of up to so many.
template <typename Problem>
void run(void (*kernel)(const Problem&, void*, int64_t, int64_t), const Problem& problem,
         int64_t workspace_bytes, int64_t operations) {
  constexpr int64_t kMatrices = 32, kOperationsOfThread = 1 << 18;
  if (problem.batch == 0) return;
  const int64_t enough = kOperationsOfThread / std::max<int64_t>(1, operations) + 1;
  const int64_t grain = operations > kOperationsOfThread ? 1 : std::max(kMatrices, enough);
  torch::stable::parallel_for(0, problem.batch, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<std::byte[]> memory(new std::byte[workspace_bytes + kAlignment]);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    const uintptr_t aligned = (address + kAlignment - 1) / kAlignment * kAlignment;
    kernel(problem, reinterpret_cast<void*>(aligned), begin, end);
  });
}

void run(const PowerIteration& problem, const Tensor&) {
  run(kernels().power_iteration, problem, kernels().power_iteration_workspace(problem),
      problem.n * problem.n * (problem.num_iterations + 1));
}
void run(const Lanczos& problem, const Tensor&) {
  run(kernels().lanczos, problem, kernels().lanczos_workspace(problem),
      problem.n * problem.m * (problem.n + 2 * problem.m));
}
void run(const TridiagonalEigh& problem, const Tensor&) {
  run(kernels().tridiagonal_eigh, problem, kernels().tridiagonal_eigh_workspace(problem),
      3 * problem.m * problem.m * problem.m);
}
void run(const SymmetricEigh& problem, const Tensor&) {
  run(kernels().symmetric_eigh, problem, kernels().symmetric_eigh_workspace(problem),
      (problem.vectors ? 5 : 1) * problem.n * problem.n * problem.n);
}

// Runs one stage over the pieces of the vectors and adds up what they have summed.
template <typename Stage>
std::vector<double> sum_pieces(const LanczosStep& step, int64_t width, const Stage& stage) {
  const int64_t pieces = (step.n + kStepPiece - 1) / kStepPiece;
  std::vector<double> sums(pieces * width), total(width);
  torch::stable::parallel_for(0, pieces, 4,
                              [&](int64_t begin, int64_t end) { stage(sums.data(), begin, end); });
  for (int64_t i = 0; i < pieces * width; ++i) total[i % width] += sums[i];
  return total;
}

void run(const LanczosStep& step, const Tensor&) {
  const int64_t rows = step.count;
  std::vector<double> c = sum_pieces(step, rows, [&](double* sums, int64_t begin, int64_t end) {
    kernels().lanczos_dots(step, sums, begin, end);
  });
  std::fill(step.result, step.result + rows, 0.0);
  double left = 0, squares = 0;
  for (int pass = 0; pass == 0 || (pass < 3 && needs_another_pass(step, squares, left)); ++pass) {
    for (int64_t i = 0; i < rows; ++i) step.result[i] += c[i];
    const std::vector<double> coefficients = std::move(c);
    c = sum_pieces(step, rows + 1, [&](double* sums, int64_t begin, int64_t end) {
      kernels().lanczos_subtract(step, pass > 0, coefficients.data(), sums, begin, end);
    });
    left = c[rows], squares = 0;
    for (int64_t i = 0; i < rows; ++i) squares += c[i] * c[i];
  }
  const double factor = finish(step, left);
  sum_pieces(step, 0, [&](double*, int64_t begin, int64_t end) {
    kernels().lanczos_scale(step, factor, begin, end);
  });
}

#endif

std::vector<Tensor> power_iteration_op(Tensor a_, Tensor v0_, int64_t num_iterations) {
  const Tensor a = checked_matrices(a_);
  const Tensor v0 = checked_vectors(v0_, "v0", a, a.size(1));
  STD_TORCH_CHECK(num_iterations >= 0, "spectral: num_iterations must not be negative, got ",
                  num_iterations);
  const int64_t batch = a.size(0), n = a.size(1);
  Tensor value = new_like(a, {batch}), vector = new_like(a, {batch, n});
  Tensor residual = new_like(a, {batch});
  run(PowerIteration{a.const_data_ptr(), v0.const_data_ptr(), value.mutable_data_ptr(),
                     vector.mutable_data_ptr(), residual.mutable_data_ptr(), batch, n,
                     num_iterations, wide_element_of(a)},
      a);
  return {value, vector, residual};
}

std::vector<Tensor> lanczos_op(Tensor a_, Tensor v0_, int64_t num_steps) {
  const Tensor a = checked_matrices(a_);
  const Tensor v0 = checked_vectors(v0_, "v0", a, a.size(1));
  STD_TORCH_CHECK(num_steps >= 0, "spectral: num_steps must not be negative, got ", num_steps);
  const int64_t batch = a.size(0), n = a.size(1), m = std::min(num_steps, n);
  Tensor alpha = new_like(a, {batch, m}), beta = new_like(a, {batch, m});
  Tensor q = new_like(a, {batch, n, m});
  run(Lanczos{a.const_data_ptr(), v0.const_data_ptr(), alpha.mutable_data_ptr(),
              beta.mutable_data_ptr(), q.mutable_data_ptr(), batch, n, m, wide_element_of(a)},
      a);
  return {alpha, beta, q};
}

Tensor symmetric_eigvalsh_op(Tensor a_) {
  const Tensor a = checked_matrices(a_);
  Tensor values = new_like(a, {a.size(0), a.size(1)});
  run(SymmetricEigh{a.const_data_ptr(), values.mutable_data_ptr(), nullptr, a.size(0), a.size(1),
                    wide_element_of(a)},
      a);
  return values;
}

std::vector<Tensor> symmetric_eigh_op(Tensor a_) {
  const Tensor a = checked_matrices(a_);
  Tensor values = new_like(a, {a.size(0), a.size(1)});
  Tensor vectors = new_like(a, {a.size(0), a.size(1), a.size(1)});
  run(SymmetricEigh{a.const_data_ptr(), values.mutable_data_ptr(), vectors.mutable_data_ptr(),
                    a.size(0), a.size(1), wide_element_of(a)},
      a);
  return {values, vectors};
}

}  // namespace

std::vector<Tensor> tridiagonal_eigh_op(Tensor alpha_, Tensor beta_) {
  STD_TORCH_CHECK(alpha_.dim() == 2, "spectral: alpha must be [batch, m], got ", alpha_.dim(),
                  " dimensions");
  const Tensor alpha = as_contiguous(alpha_);
  const int64_t batch = alpha.size(0), m = alpha.size(1);
  const Tensor beta = checked_vectors(beta_, "beta", alpha, std::max<int64_t>(m - 1, 0));
  Tensor values = new_like(alpha, {batch, m}), vectors = new_like(alpha, {batch, m, m});
  run(TridiagonalEigh{alpha.const_data_ptr(), beta.const_data_ptr(), values.mutable_data_ptr(),
                      vectors.mutable_data_ptr(), batch, m, wide_element_of(alpha)},
      alpha);
  return {values, vectors};
}

Tensor lanczos_step_op(Tensor basis, Tensor w, int64_t count, Tensor largest, double breakdown) {
  STD_TORCH_CHECK(basis.dim() == 2 && basis.is_contiguous(),
                  "spectral: basis must be [rows, n] and contiguous");
  STD_TORCH_CHECK(0 < count && count < basis.size(0),
                  "spectral: count must be a row of the basis after the first, got ", count);
  STD_TORCH_CHECK(
      w.dim() == 1 && w.size(0) == basis.size(1) && w.is_contiguous() && are_alike(w, basis),
      "spectral: w must be like a row of the basis");
  STD_TORCH_CHECK(largest.numel() == 1 && largest.scalar_type() == ScalarType::Double &&
                      largest.device() == basis.device(),
                  "spectral: largest must be one float64 number beside the basis");
  Tensor result = new_float64(basis, {count + 3});
  run(LanczosStep{basis.mutable_data_ptr(), w.const_data_ptr(),
                  static_cast<const double*>(largest.const_data_ptr()),
                  static_cast<double*>(result.mutable_data_ptr()), count, basis.size(1), breakdown,
                  wide_element_of(basis)},
      basis);
  return result;
}

#ifndef HESSREG_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(hessreg, m) {
  m.def("power_iteration(Tensor a, Tensor v0, int num_iterations) -> Tensor[]");
  m.def("lanczos(Tensor a, Tensor v0, int num_steps) -> Tensor[]");
  m.def("tridiagonal_eigh(Tensor alpha, Tensor beta) -> Tensor[]");
  m.def("symmetric_eigvalsh(Tensor a) -> Tensor");
  m.def("symmetric_eigh(Tensor a) -> Tensor[]");
  m.def(
      "lanczos_step(Tensor(a!) basis, Tensor w, int count, Tensor largest, float"
      " breakdown) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(hessreg, HESSREG_DISPATCH_KEY, m) {
  m.impl("power_iteration", TORCH_BOX(&power_iteration_op));
  m.impl("lanczos", TORCH_BOX(&lanczos_op));
  m.impl("tridiagonal_eigh", TORCH_BOX(&tridiagonal_eigh_op));
  m.impl("symmetric_eigvalsh", TORCH_BOX(&symmetric_eigvalsh_op));
  m.impl("symmetric_eigh", TORCH_BOX(&symmetric_eigh_op));
  m.impl("lanczos_step", TORCH_BOX(&lanczos_step_op));
}

}  // namespace hessreg::spectral
