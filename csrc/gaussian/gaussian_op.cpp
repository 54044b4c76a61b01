#include <algorithm>
#include <memory>

#include "../common/binding.h"
#include "gaussian.h"
#ifdef HESSREG_CUDA
#include "gaussian_cuda.h"
#else
#include "../common/cpu_isa.h"
#include "gaussian_cpu.h"
#endif

namespace hessreg::gaussian {
namespace {

// Checks that a tensor is dense [batch, rows, columns], of the dtype and on the device of the
// model.
Tensor checked(const Tensor& tensor, const char* name, const Tensor& model, int64_t rows,
               int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 3, "gaussian: ", name, " must have 3 dimensions, got ",
                  tensor.dim());
  STD_TORCH_CHECK(
      tensor.size(0) == model.size(0) && tensor.size(1) == rows && tensor.size(2) == columns,
      "gaussian: ", name, " must be [", model.size(0), ", ", rows, ", ", columns, "], got [",
      tensor.size(0), ", ", tensor.size(1), ", ", tensor.size(2), "]");
  STD_TORCH_CHECK(are_alike(tensor, model), "gaussian: ", name,
                  " differs from the points in dtype or device");
  return torch::stable::contiguous(tensor);
}

Tensor checked_points(const Tensor& points) {
  STD_TORCH_CHECK(points.dim() == 3, "gaussian: points must have 3 dimensions, got ", points.dim());
  return torch::stable::contiguous(points);
}

// What only float32 and float64 are computed in.
Element wide_element_of(const Tensor& tensor) {
  const Element element = element_of(tensor, "gaussian");
  STD_TORCH_CHECK(element == Element::kFloat32 || element == Element::kFloat64,
                  "gaussian: expected float32 or float64");
  return element;
}

// A mixture with what keeps its memory alive.
class Components {
 public:
  Components(const Tensor& gamma, const Tensor* coefficient, const Tensor& points)
      : gamma_(checked(gamma, points)) {
    if (coefficient) {
      coefficient_ = std::make_unique<Tensor>(checked(*coefficient, points));
      STD_TORCH_CHECK(coefficient_->size(1) == gamma_.size(1),
                      "gaussian: gamma and coefficient must have as many components");
    }
  }

  Mixture mixture() const {
    return {gamma_.const_data_ptr<double>(),
            coefficient_ ? coefficient_->const_data_ptr<double>() : nullptr, gamma_.size(1)};
  }

 private:
  static Tensor checked(const Tensor& values, const Tensor& points) {
    STD_TORCH_CHECK(values.dim() == 2 && values.size(0) == points.size(0) && values.size(1) > 0 &&
                        values.scalar_type() == ScalarType::Double &&
                        values.device() == points.device(),
                    "gaussian: a mixture must be float64 [batch, components] on the device of the "
                    "points");
    return torch::stable::contiguous(values);
  }

  Tensor gamma_;
  std::unique_ptr<Tensor> coefficient_;
};

// The factors of a sum with what keeps their memory alive.
class Factors {
 public:
  Factors(const std::vector<Tensor>& left, const std::vector<Tensor>& right, const Tensor& x,
          const Tensor& y) {
    STD_TORCH_CHECK(left.size() == right.size(), "gaussian: ", left.size(), " left and ",
                    right.size(), " right sides do not make factors");
    for (size_t l = 0; l < left.size(); ++l) {
      STD_TORCH_CHECK(left[l].dim() == 3, "gaussian: left must have 3 dimensions");
      const int64_t rank = left[l].size(2);
      kept_.push_back(checked(left[l], "left", x, x.size(1), rank));
      kept_.push_back(checked(right[l], "right", x, y.size(1), rank));
      factors_.push_back({kept_[2 * l].const_data_ptr(), kept_[2 * l + 1].const_data_ptr(), rank});
    }
  }

  const Factor* data() const { return factors_.data(); }
  int64_t size() const { return static_cast<int64_t>(factors_.size()); }

 private:
  std::vector<Tensor> kept_;
  std::vector<Factor> factors_;
};

#ifdef HESSREG_CUDA

cuda::Precision precision(bool allow_tf32) {
  return allow_tf32 ? cuda::Precision::kTF32 : cuda::Precision::kFloat32;
}

template <typename Problem>
Tensor scratch_for(const Problem& problem, const Tensor& like) {
  return torch::stable::new_empty(like, {cuda::scratch_bytes(problem)}, ScalarType::Byte);
}

void run(const Matrix& problem, const Tensor& like, bool allow_tf32) {
  const Executor executor(like);
  cuda::matrix(problem, precision(allow_tf32), executor.stream());
}

template <typename Problem>
void run_with_scratch(void (*launch)(const Problem&, cuda::Precision, void*, void*),
                      const Problem& problem, const Tensor& like, bool allow_tf32) {
  const Executor executor(like);
  Tensor scratch = scratch_for(problem, like);
  launch(problem, precision(allow_tf32), scratch.mutable_data_ptr(), executor.stream());
}

void run(const Sum& problem, const Tensor& like, bool allow_tf32) {
  run_with_scratch(cuda::sum, problem, like, allow_tf32);
}

void run(const Energy& problem, const Tensor& like, bool allow_tf32) {
  run_with_scratch(cuda::energy, problem, like, allow_tf32);
}

#else

const CpuKernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() == Isa::kAvx512) return avx512::kernels;
  if (active_isa() == Isa::kAvx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

// The workspace of one thread.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(new std::byte[bytes + kAlignment]) {}
  void* aligned() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr size_t kAlignment = 64;
  std::unique_ptr<std::byte[]> memory_;
};

// Runs body(workspace, begin, end) over all tasks, in torch's thread pool where there is work
// enough.
template <typename Body>
void parallel_tasks(int64_t tasks, int64_t pairs, int64_t workspace_bytes, const Body& body) {
  constexpr int64_t kPairsOfThread = 1 << 15;
  const int64_t grain = pairs <= kPairsOfThread ? tasks : 1;
  if (tasks == 0) return;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const Workspace workspace(workspace_bytes);
    body(workspace.aligned(), begin, end);
  });
}

void run(const Matrix& problem, const Tensor&, bool) {
  if (problem.m == 0) return;
  const int64_t tasks = problem.batch * Blocks(problem.n).count;
  parallel_tasks(tasks, problem.batch * problem.n * problem.m, kernels().matrix_workspace(problem),
                 [&](void* workspace, int64_t begin, int64_t end) {
                   kernels().matrix(problem, workspace, begin, end);
                 });
}

void run(const Sum& problem, const Tensor&, bool) {
  const int64_t tasks = problem.batch * Blocks(problem.n).count;
  parallel_tasks(tasks, problem.batch * problem.n * problem.m, kernels().sum_workspace(problem),
                 [&](void* workspace, int64_t begin, int64_t end) {
                   kernels().sum(problem, workspace, begin, end);
                 });
}

// The spans of the first points and of the rest: none holds both.
std::vector<Range> ranges_of(const Energy& problem) {
  std::vector<Range> ranges;
  for (const Range part : {Range{0, problem.first}, Range{problem.first, problem.count}}) {
    const Blocks spans(part.size(), span_for(problem.count));
    for (int64_t span = 0; span < spans.count; ++span)
      ranges.push_back({part.begin + spans.begin(span), part.begin + spans.end(span)});
  }
  return ranges;
}

// The pairs of spans of one round: in round 0 each span with itself, then as in a tournament, so
// that every span is in one pair at most. Its gradient then has one writer at a time, and grows in
// the same order whatever the number of threads.
std::vector<SpanPair> round_of(const std::vector<Range>& ranges, int64_t round, int64_t batch) {
  const auto count = static_cast<int64_t>(ranges.size()), places = count + count % 2;
  std::vector<SpanPair> pairs;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t k = 0; round == 0 && k < count; ++k) pairs.push_back({b, ranges[k], ranges[k]});
    for (int64_t k = 0; round > 0 && k < places / 2; ++k) {
      const int64_t around = places - 1;
      int64_t i = (round + k) % around, j = k == 0 ? around : (round + around - k) % around;
      if (i > j) std::swap(i, j);
      if (j < count) pairs.push_back({b, ranges[i], ranges[j]});
    }
  }
  return pairs;
}

// Runs all rounds; gradient: [batch, count, gradient_width(d)] or null.
void run_rounds(const Energy& problem, double* gradient) {
  std::fill(problem.value, problem.value + problem.batch, 0.0);
  const std::vector<Range> ranges = ranges_of(problem);
  const auto rounds = static_cast<int64_t>(ranges.size() + ranges.size() % 2);
  const int64_t bytes = kernels().energy_workspace(problem);
  for (int64_t round = 0; round < rounds; ++round) {
    const std::vector<SpanPair> pairs = round_of(ranges, round, problem.batch);
    const auto tasks = static_cast<int64_t>(pairs.size());
    std::vector<double> values(pairs.size());
    const auto body = [&](void* workspace, int64_t begin, int64_t end) {
      kernels().energy(problem, pairs.data(), values.data(), gradient, workspace, begin, end);
    };
    parallel_tasks(tasks, tasks * kBlock * kBlock, bytes, body);
    for (size_t k = 0; k < pairs.size(); ++k) problem.value[pairs[k].batch] += values[k];
  }
}

template <typename C>
void narrow(const std::vector<double>& gradient, const Energy& problem) {
  const int64_t d = problem.d, width = gradient_width(d);
  C* out = static_cast<C*>(problem.gradient);
  for (int64_t i = 0; i < problem.batch * problem.count; ++i)
    for (int64_t k = 0; k < d; ++k) out[i * d + k] = static_cast<C>(gradient[i * width + k]);
}

void run(const Energy& problem, const Tensor&, bool) {
  if (!problem.gradient) return run_rounds(problem, nullptr);
  std::vector<double> gradient(problem.batch * problem.count * gradient_width(problem.d));
  run_rounds(problem, gradient.data());
  problem.element == Element::kFloat64 ? narrow<double>(gradient, problem)
                                       : narrow<float>(gradient, problem);
}

#endif

Tensor matrix_op(Tensor x_, Tensor y_, Tensor gamma, Tensor coefficient, bool allow_tf32) {
  const Tensor x = checked_points(x_);
  STD_TORCH_CHECK(y_.dim() == 3, "gaussian: y must have 3 dimensions, got ", y_.dim());
  const Tensor y = checked(y_, "y", x, y_.size(1), x.size(2));
  const Components components(gamma, &coefficient, x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), y.size(1)});
  run(Matrix{x.const_data_ptr(), y.const_data_ptr(), components.mixture(), out.mutable_data_ptr(),
             x.size(0), x.size(1), y.size(1), x.size(2), element_of(x, "gaussian")},
      x, allow_tf32);
  return out;
}

Tensor sum_op(Tensor x_, Tensor y_, Tensor gamma, Tensor coefficient, std::vector<Tensor> left,
              std::vector<Tensor> right, Tensor v_, bool allow_tf32) {
  const Tensor x = checked_points(x_);
  STD_TORCH_CHECK(y_.dim() == 3 && v_.dim() == 3, "gaussian: y and v must have 3 dimensions");
  const Tensor y = checked(y_, "y", x, y_.size(1), x.size(2));
  const Tensor v = checked(v_, "v", x, y.size(1), v_.size(2));
  const Components components(gamma, &coefficient, x);
  const Factors factors(left, right, x, y);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), v.size(2)});
  run(Sum{x.const_data_ptr(), y.const_data_ptr(), components.mixture(), factors.data(),
          factors.size(), v.const_data_ptr(), out.mutable_data_ptr(), x.size(0), x.size(1),
          y.size(1), x.size(2), v.size(2), wide_element_of(x)},
      x, allow_tf32);
  return out;
}

std::vector<Tensor> energy_op(Tensor z_, Tensor gamma, int64_t first, double within_first,
                              double across, double within_rest, bool allow_tf32,
                              bool with_gradient) {
  const Tensor z = checked_points(z_);
  STD_TORCH_CHECK(first >= 0 && first <= z.size(1), "gaussian: first must be in [0, ", z.size(1),
                  "], got ", first);
  const Components components(gamma, nullptr, z);
  std::vector<Tensor> out{new_float64(z, {z.size(0)})};
  if (with_gradient) out.push_back(torch::stable::new_empty(z, z.sizes()));
  run(Energy{z.const_data_ptr(), components.mixture(), z.size(0), first, z.size(1), z.size(2),
             within_first, across, within_rest, out[0].mutable_data_ptr<double>(),
             with_gradient ? out[1].mutable_data_ptr() : nullptr, wide_element_of(z)},
      z, allow_tf32);
  return out;
}

}  // namespace

#ifndef HESSREG_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(hessreg, m) {
  m.def(
      "gaussian_matrix(Tensor x, Tensor y, Tensor gamma, Tensor coefficient, bool allow_tf32)"
      " -> Tensor");
  m.def(
      "gaussian_sum(Tensor x, Tensor y, Tensor gamma, Tensor coefficient, Tensor[] left,"
      " Tensor[] right, Tensor v, bool allow_tf32) -> Tensor");
  m.def(
      "gaussian_energy(Tensor z, Tensor gamma, int first, float within_first, float across,"
      " float within_rest, bool allow_tf32, bool with_gradient) -> Tensor[]");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(hessreg, HESSREG_DISPATCH_KEY, m) {
  m.impl("gaussian_matrix", TORCH_BOX(&matrix_op));
  m.impl("gaussian_sum", TORCH_BOX(&sum_op));
  m.impl("gaussian_energy", TORCH_BOX(&energy_op));
}

}  // namespace hessreg::gaussian
