#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "../spectral/spectral_op.h"
#include "hvp.h"
#ifdef HESSREG_CUDA
#include "hvp_cuda.h"
#else
#include "../common/cpu_isa.h"
#include "hvp_cpu.h"
#endif

namespace hessreg::hvp {
namespace {

Element wide_element_of(const Tensor& tensor) {
  const Element element = element_of(tensor, "hvp");
  STD_TORCH_CHECK(element == Element::kFloat32 || element == Element::kFloat64,
                  "hvp: expected float32 or float64");
  return element;
}

// Tensors as a kernel takes them, all of the dtype and on the device of the model.
class Inputs {
 public:
  explicit Inputs(const Tensor& model) : model_(model) {}

  const void* take(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
    STD_TORCH_CHECK(tensor.sizes().equals(sizes), "hvp: ", name, " must be ", written(sizes),
                    ", got ", written({tensor.sizes().begin(), tensor.sizes().end()}));
    STD_TORCH_CHECK(
        tensor.scalar_type() == model_.scalar_type() && tensor.device() == model_.device(),
        "hvp: ", name, " differs from the first argument in dtype or device");
    kept_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr();
  }

  // Null for a tensor without elements where sizes asks for some: it was left out.
  const void* take_any(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
    return tensor.numel() == 0 ? nullptr : take(tensor, name, sizes);
  }

 private:
  static std::string written(const std::vector<int64_t>& sizes) {
    std::string text = "[";
    for (size_t i = 0; i < sizes.size(); ++i)
      text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
    return text + "]";
  }

  Tensor model_;
  std::vector<Tensor> kept_;
};

using Offsets = std::vector<int64_t>;

// The layers of a network, and lists of what belongs to its hidden layers.
class Arguments {
 public:
  Arguments(const Tensor& model, const std::vector<Tensor>& weights) : inputs_(model) {
    STD_TORCH_CHECK(model.dim() == 2, "hvp: the first argument must have 2 dimensions, got ",
                    model.dim());
    STD_TORCH_CHECK(!weights.empty(), "hvp: a network needs at least one layer");
    for (const Tensor& weight : weights) {
      STD_TORCH_CHECK(weight.dim() == 2, "hvp: weights must have 2 dimensions, got ", weight.dim());
      const int64_t out = weight.size(0), in = weight.size(1);
      STD_TORCH_CHECK(layers_.empty() || layers_.back().out == in,
                      "hvp: a weight must have a column for each output of the layer before");
      layers_.push_back({inputs_.take(weight, "weights", {out, in}), nullptr, in, out, -1, -1});
    }
    network_ = {layers_.data(), static_cast<int64_t>(layers_.size()), model.size(0),
                wide_element_of(model)};
  }

  const Network& network() const { return network_; }
  Inputs& inputs() { return inputs_; }

  void set_biases(const std::vector<Tensor>& biases) {
    STD_TORCH_CHECK(biases.size() == layers_.size(), "hvp: ", biases.size(), " biases for ",
                    layers_.size(), " layers");
    for (size_t l = 0; l < layers_.size(); ++l)
      layers_[l].bias = inputs_.take_any(biases[l], "biases", {layers_[l].out});
  }

  void set_offsets(const Offsets& weights, const Offsets& biases, int64_t length) {
    STD_TORCH_CHECK(weights.size() == layers_.size() && biases.size() == layers_.size(),
                    "hvp: there must be an offset for each layer");
    std::vector<std::pair<int64_t, int64_t>> ranges;
    for (size_t l = 0; l < layers_.size(); ++l) {
      layers_[l].weight_offset = weights[l];
      layers_[l].bias_offset = biases[l];
      if (weights[l] >= 0) ranges.emplace_back(weights[l], layers_[l].in * layers_[l].out);
      if (biases[l] >= 0) ranges.emplace_back(biases[l], layers_[l].out);
    }
    check_apart(ranges, length);
  }

  // Whether offsets point to every element of a flat vector.
  bool covers_all() const { return covers_all_; }

  // Pointers to matrices [width of layer, batch] of the first `count` layers.
  std::vector<const void*> take_hidden(const std::vector<Tensor>& tensors, const char* name,
                                       int64_t count, int64_t directions = -1) {
    STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == count, "hvp: ", name, " must hold ",
                    count, " tensors, got ", tensors.size());
    std::vector<const void*> pointers;
    for (int64_t l = 0; l < count; ++l) {
      std::vector<int64_t> sizes{layers_[l].out, network_.batch};
      if (directions >= 0) sizes.insert(sizes.begin(), directions);
      pointers.push_back(inputs_.take(tensors[l], name, sizes));
    }
    return pointers;
  }

  int64_t hidden() const { return network_.depth - 1; }

 private:
  void check_apart(std::vector<std::pair<int64_t, int64_t>>& ranges, int64_t length) {
    std::sort(ranges.begin(), ranges.end());
    int64_t end = 0, total = 0;
    for (const auto& [start, count] : ranges) {
      STD_TORCH_CHECK(start >= end && start + count <= length,
                      "hvp: offsets must point to parts of a vector of ", length,
                      " elements that do not overlap");
      end = start + count;
      total += count;
    }
    covers_all_ = total == length;
  }

  Inputs inputs_;
  std::vector<Layer> layers_;
  Network network_{};
  bool covers_all_ = false;
};

// Appends new matrices [width of layer, batch] of the first `count` layers to the results.
std::vector<void*> append_hidden(std::vector<Tensor>& results, const Tensor& like,
                                 const Network& network, int64_t count, int64_t directions = -1) {
  std::vector<void*> pointers;
  for (int64_t l = 0; l < count; ++l) {
    std::vector<int64_t> sizes{network.layers[l].out, network.batch};
    if (directions >= 0) sizes.insert(sizes.begin(), directions);
    results.push_back(torch::stable::new_empty(like, sizes));
    pointers.push_back(results.back().mutable_data_ptr());
  }
  return pointers;
}

#ifdef HESSREG_CUDA

template <typename Problem>
void run(void (*launch)(const Problem&, void*, void*), const Problem& problem, const Tensor& like) {
  const Executor executor(like);
  Tensor scratch = torch::stable::new_empty(like, {cuda::scratch_bytes(problem)}, ScalarType::Byte);
  launch(problem, scratch.mutable_data_ptr(), executor.stream());
}

void run(const Forward& problem, const Tensor& like) { run(cuda::forward, problem, like); }
void run(const Backward& problem, const Tensor& like) { run(cuda::backward, problem, like); }
void run(const Tangent& problem, const Tensor& like) { run(cuda::tangent, problem, like); }
void run(const Adjoint& problem, const Tensor& like) { run(cuda::adjoint, problem, like); }
void run(const SecondTangent& problem, const Tensor& like) {
  run(cuda::second_tangent, problem, like);
}
void run(const SecondAdjoint& problem, const Tensor& like) {
  run(cuda::second_adjoint, problem, like);
}
void run(const SymmetricProduct& problem, const Tensor& like) {
  run(cuda::symmetric_product, problem, like);
}

#else

const CpuKernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() == Isa::kAvx512) return avx512::kernels;
  if (active_isa() == Isa::kAvx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

// Memory aligned to 64 bytes, as it comes. A small one is kept for the next call of the thread,
// which then finds it in cache; calls do not nest.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    thread_local std::vector<std::byte> kept;
    std::vector<std::byte>& memory = bytes <= kKeptBytes ? kept : memory_;
    if (static_cast<int64_t>(memory.size()) < bytes + kAlignment) memory.resize(bytes + kAlignment);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    aligned_ = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  void* aligned() const { return aligned_; }

 private:
  static constexpr int64_t kAlignment = 64, kKeptBytes = 4 << 20;
  std::vector<std::byte> memory_;
  void* aligned_;
};

// Runs stage after stage, in torch's thread pool where there is work enough.
template <typename Problem>
void run(const Staged<Problem>& kernel, const Problem& problem) {
  constexpr int64_t kWorkOfThread = 1 << 20;
  const Workspace workspace(kernel.workspace_bytes(problem));
  for (int64_t index = 0; index < kernel.stages(problem); ++index) {
    const Stage stage = kernel.stage(problem, index);
    if (stage.tasks == 0) continue;
    const int64_t grain = stage.work <= kWorkOfThread ? stage.tasks : 1;
    torch::stable::parallel_for(0, stage.tasks, grain, [&](int64_t begin, int64_t end) {
      kernel.run(problem, workspace.aligned(), index, begin, end);
    });
  }
}

void run(const Forward& problem, const Tensor&) { run(kernels().forward, problem); }
void run(const Backward& problem, const Tensor&) { run(kernels().backward, problem); }
void run(const Tangent& problem, const Tensor&) { run(kernels().tangent, problem); }
void run(const Adjoint& problem, const Tensor&) { run(kernels().adjoint, problem); }
void run(const SecondTangent& problem, const Tensor&) { run(kernels().second_tangent, problem); }
void run(const SecondAdjoint& problem, const Tensor&) { run(kernels().second_adjoint, problem); }
void run(const SymmetricProduct& problem, const Tensor&) {
  run(kernels().symmetric_product, problem);
}

#endif

Tensor symmetric_matmul_op(Tensor a_, Tensor v_) {
  STD_TORCH_CHECK(a_.dim() == 3 && v_.dim() == 3, "hvp: a and v must have 3 dimensions");
  const int64_t batch = a_.size(0), n = a_.size(1), columns = v_.size(2);
  Inputs inputs(a_);
  const void* a = inputs.take(a_, "a", {batch, n, n});
  const void* v = inputs.take(v_, "v", {batch, n, columns});
  Tensor out = torch::stable::new_empty(a_, {batch, n, columns});
  run(SymmetricProduct{a, v, out.mutable_data_ptr(), batch, n, columns, wide_element_of(a_)}, a_);
  return out;
}

std::vector<Activation> checked_activations(const std::vector<int64_t>& numbers, int64_t hidden) {
  STD_TORCH_CHECK(static_cast<int64_t>(numbers.size()) == hidden, "hvp: ", numbers.size(),
                  " activations for ", hidden, " hidden layers");
  std::vector<Activation> activations;
  for (const int64_t number : numbers) {
    STD_TORCH_CHECK(number >= 0 && number < kNumActivations, "hvp: activations must be in [0, ",
                    kNumActivations, "), got ", number);
    activations.push_back(static_cast<Activation>(number));
  }
  return activations;
}

std::vector<Tensor> forward_op(Tensor x_, std::vector<Tensor> weights, std::vector<Tensor> biases,
                               std::vector<int64_t> activations_, std::vector<double> parameters,
                               bool with_third) {
  Arguments arguments(x_, weights);
  const auto activations = checked_activations(activations_, arguments.hidden());
  STD_TORCH_CHECK(parameters.size() == activations.size(), "hvp: ", parameters.size(),
                  " parameters for ", activations.size(), " activations");
  arguments.set_biases(biases);
  const Network& network = arguments.network();
  const void* x = arguments.inputs().take(x_, "x", {network.batch, network.inputs()});
  std::vector<Tensor> out{torch::stable::new_empty(x_, {network.batch, network.outputs()})};
  const auto a = append_hidden(out, x_, network, arguments.hidden());
  const auto first = append_hidden(out, x_, network, arguments.hidden());
  const auto second = append_hidden(out, x_, network, arguments.hidden());
  const auto third = append_hidden(out, x_, network, with_third ? arguments.hidden() : 0);
  run(Forward{network, x, activations.data(), parameters.data(), out[0].mutable_data_ptr(),
              a.data(), first.data(), second.data(), with_third ? third.data() : nullptr},
      x_);
  return out;
}

std::vector<Tensor> backward_op(Tensor delta_, std::vector<Tensor> weights, std::vector<Tensor> d1,
                                std::vector<Tensor> d2, std::vector<Tensor> d3) {
  Arguments arguments(delta_, weights);
  const Network& network = arguments.network();
  const auto first = arguments.take_hidden(d1, "d1", arguments.hidden());
  const auto second = arguments.take_hidden(d2, "d2", arguments.hidden());
  const bool with_third = !d3.empty();
  const auto third = arguments.take_hidden(d3, "d3", with_third ? arguments.hidden() : 0);
  const void* delta_out =
      arguments.inputs().take(delta_, "delta", {network.batch, network.outputs()});
  std::vector<Tensor> out;
  const auto delta = append_hidden(out, delta_, network, network.depth);
  const auto s = append_hidden(out, delta_, network, arguments.hidden());
  const auto t = append_hidden(out, delta_, network, with_third ? arguments.hidden() : 0);
  run(Backward{network, first.data(), second.data(), with_third ? third.data() : nullptr, delta_out,
               delta.data(), s.data(), t.data()},
      delta_);
  return out;
}

std::vector<Tensor> tangent_op(Tensor x_, std::vector<Tensor> weights, std::vector<Tensor> a_,
                               std::vector<Tensor> d1, Tensor direction_x, Tensor v_,
                               Offsets weight_offsets, Offsets bias_offsets) {
  STD_TORCH_CHECK(v_.dim() == 2, "hvp: v must have 2 dimensions, got ", v_.dim());
  Arguments arguments(x_, weights);
  const Network& network = arguments.network();
  const int64_t directions = v_.size(0), length = v_.size(1);
  arguments.set_offsets(weight_offsets, bias_offsets, length);
  Inputs& inputs = arguments.inputs();
  const void* x = inputs.take(x_, "x", {network.batch, network.inputs()});
  const void* u =
      inputs.take_any(direction_x, "direction_x", {directions, network.batch, network.inputs()});
  const void* v = inputs.take(v_, "v", {directions, length});
  const auto a = arguments.take_hidden(a_, "a", arguments.hidden());
  const auto first = arguments.take_hidden(d1, "d1", arguments.hidden());
  std::vector<Tensor> out{
      torch::stable::new_empty(x_, {directions, network.batch, network.outputs()})};
  const auto rz = append_hidden(out, x_, network, arguments.hidden(), directions);
  run(Tangent{network, x, a.data(), first.data(), u, v, directions, length,
              out[0].mutable_data_ptr(), rz.data()},
      x_);
  return out;
}

std::vector<Tensor> adjoint_op(Tensor x_, std::vector<Tensor> weights, std::vector<Tensor> a_,
                               std::vector<Tensor> d1, std::vector<Tensor> delta_,
                               std::vector<Tensor> s_, std::vector<Tensor> rz_, Tensor direction_x,
                               Tensor v_, Tensor r_delta_, Offsets weight_offsets,
                               Offsets bias_offsets, bool gauss_newton, bool with_input) {
  STD_TORCH_CHECK(v_.dim() == 2, "hvp: v must have 2 dimensions, got ", v_.dim());
  Arguments arguments(x_, weights);
  const Network& network = arguments.network();
  const int64_t directions = v_.size(0), length = v_.size(1), hidden = arguments.hidden();
  arguments.set_offsets(weight_offsets, bias_offsets, length);
  Inputs& inputs = arguments.inputs();
  const std::vector<int64_t> input_sizes{directions, network.batch, network.inputs()};
  const auto a = arguments.take_hidden(a_, "a", hidden);
  const auto first = arguments.take_hidden(d1, "d1", hidden);
  const auto delta = arguments.take_hidden(delta_, "delta", gauss_newton ? 0 : network.depth);
  const auto s = arguments.take_hidden(s_, "s", gauss_newton ? 0 : hidden);
  const auto rz = arguments.take_hidden(rz_, "rz", gauss_newton ? 0 : hidden, directions);
  Adjoint problem{network,
                  inputs.take(x_, "x", {network.batch, network.inputs()}),
                  a.data(),
                  first.data(),
                  delta.data(),
                  s.data(),
                  rz.data(),
                  inputs.take_any(direction_x, "direction_x", input_sizes),
                  inputs.take(v_, "v", {directions, length}),
                  directions,
                  length,
                  inputs.take(r_delta_, "r_delta", {directions, network.batch, network.outputs()}),
                  gauss_newton,
                  nullptr,
                  nullptr};
  std::vector<Tensor> out{torch::stable::new_empty(x_, {directions, length})};
  if (!arguments.covers_all()) torch::stable::zero_(out[0]);
  problem.result = out[0].mutable_data_ptr();
  if (with_input) {
    out.push_back(torch::stable::new_empty(x_, input_sizes));
    problem.r_input = out[1].mutable_data_ptr();
  }
  run(problem, x_);
  return out;
}

// Along two directions, or one on the CPU.
std::vector<Tensor> second_tangent(const Tensor& x_, const std::vector<Tensor>& weights,
                                   const std::vector<Tensor>& a_, const std::vector<Tensor>& d1,
                                   const std::vector<Tensor>& d2, const Tensor& v_,
                                   const Offsets& weight_offsets, const Offsets& bias_offsets) {
  Arguments arguments(x_, weights);
  const Network& network = arguments.network();
  const int64_t directions = v_.size(0), length = v_.size(1), hidden = arguments.hidden();
  arguments.set_offsets(weight_offsets, bias_offsets, length);
  const void* x = arguments.inputs().take(x_, "x", {network.batch, network.inputs()});
  const void* v = arguments.inputs().take(v_, "v", {directions, length});
  const auto a = arguments.take_hidden(a_, "a", hidden);
  const auto first = arguments.take_hidden(d1, "d1", hidden);
  const auto second = arguments.take_hidden(d2, "d2", hidden);
  std::vector<Tensor> out{
      torch::stable::new_empty(x_, {directions + 1, network.batch, network.outputs()})};
  const auto rz = append_hidden(out, x_, network, hidden, directions + 1);
  const auto ra = append_hidden(out, x_, network, hidden, directions + 1);
  run(SecondTangent{network, x, a.data(), first.data(), second.data(), v, directions, length,
                    out[0].mutable_data_ptr(), rz.data(), ra.data()},
      x_);
  return out;
}

void check_pair(const Tensor& v) {
  STD_TORCH_CHECK(v.dim() == 2 && v.size(0) == 2, "hvp: v must be [2, length]");
}

std::vector<Tensor> second_tangent_op(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> a,
                                      std::vector<Tensor> d1, std::vector<Tensor> d2, Tensor v,
                                      Offsets weight_offsets, Offsets bias_offsets) {
  check_pair(v);
  return second_tangent(x, weights, a, d1, d2, v, weight_offsets, bias_offsets);
}

// Likewise.
Tensor second_adjoint(const Tensor& x_, const std::vector<Tensor>& weights,
                      const std::vector<Tensor>& a_, const std::vector<Tensor>& d1,
                      const std::vector<Tensor>& d2, const std::vector<Tensor>& delta_,
                      const std::vector<Tensor>& s_, const std::vector<Tensor>& t_,
                      const std::vector<Tensor>& rz_, const std::vector<Tensor>& ra_,
                      const Tensor& v_, const Tensor& r_delta_, const Offsets& weight_offsets,
                      const Offsets& bias_offsets) {
  Arguments arguments(x_, weights);
  const Network& network = arguments.network();
  const int64_t directions = v_.size(0), length = v_.size(1), hidden = arguments.hidden();
  arguments.set_offsets(weight_offsets, bias_offsets, length);
  Inputs& inputs = arguments.inputs();
  const auto a = arguments.take_hidden(a_, "a", hidden);
  const auto first = arguments.take_hidden(d1, "d1", hidden);
  const auto second = arguments.take_hidden(d2, "d2", hidden);
  const auto delta = arguments.take_hidden(delta_, "delta", network.depth);
  const auto s = arguments.take_hidden(s_, "s", hidden);
  const auto t = arguments.take_hidden(t_, "t", hidden);
  const auto rz = arguments.take_hidden(rz_, "rz", hidden, directions + 1);
  const auto ra = arguments.take_hidden(ra_, "ra", hidden, directions + 1);
  Tensor out = torch::stable::new_empty(x_, {length});
  if (!arguments.covers_all()) torch::stable::zero_(out);
  run(SecondAdjoint{network, inputs.take(x_, "x", {network.batch, network.inputs()}), a.data(),
                    first.data(), second.data(), delta.data(), s.data(), t.data(), rz.data(),
                    ra.data(), inputs.take(v_, "v", {directions, length}), directions, length,
                    inputs.take(r_delta_, "r_delta",
                                {directions + 1, network.batch, network.outputs()}),
                    out.mutable_data_ptr()},
      x_);
  return out;
}

Tensor second_adjoint_op(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> a,
                         std::vector<Tensor> d1, std::vector<Tensor> d2, std::vector<Tensor> delta,
                         std::vector<Tensor> s, std::vector<Tensor> t, std::vector<Tensor> rz,
                         std::vector<Tensor> ra, Tensor v, Tensor r_delta, Offsets weight_offsets,
                         Offsets bias_offsets) {
  check_pair(v);
  return second_adjoint(x, weights, a, d1, d2, delta, s, t, rz, ra, v, r_delta, weight_offsets,
                        bias_offsets);
}

Tensor product_of(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Products with one vector after another, of the Hessian of a loss that is a sum over the outputs.
// What they leave on the way has its memory once.
class SumProducts {
 public:
  SumProducts(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& a,
              const std::vector<Tensor>& d1, const std::vector<Tensor>& delta,
              const std::vector<Tensor>& s, const Tensor& curvature, const Offsets& weight_offsets,
              const Offsets& bias_offsets, int64_t length, bool gauss_newton)
      : arguments_(x, weights), curvature_(curvature), length_(length) {
    const Network& network = arguments_.network();
    const int64_t hidden = arguments_.hidden();
    arguments_.set_offsets(weight_offsets, bias_offsets, length);
    const void* from = arguments_.inputs().take(x, "x", {network.batch, network.inputs()});
    a_ = arguments_.take_hidden(a, "a", hidden);
    first_ = arguments_.take_hidden(d1, "d1", hidden);
    delta_ = arguments_.take_hidden(delta, "delta", gauss_newton ? 0 : network.depth);
    s_ = arguments_.take_hidden(s, "s", gauss_newton ? 0 : hidden);
    moved_.push_back(torch::stable::new_empty(x, {1, network.batch, network.outputs()}));
    rz_ = append_hidden(moved_, x, network, hidden, 1);
    moved_.push_back(torch::stable::new_empty(x, {length}));
    if (!arguments_.covers_all()) torch::stable::zero_(moved_.back());
    tangent_ = {network,
                from,
                a_.data(),
                first_.data(),
                nullptr,
                nullptr,
                1,
                length,
                moved_[0].mutable_data_ptr(),
                rz_.data()};
    adjoint_ = {network,       from,
                a_.data(),     first_.data(),
                delta_.data(), s_.data(),
                rz_.data(),    nullptr,
                nullptr,       1,
                length,        nullptr,
                gauss_newton,  moved_.back().mutable_data_ptr(),
                nullptr};
  }

  // With v [length]; the next call writes over it.
  const Tensor& multiply(const Tensor& v) {
    tangent_.v = adjoint_.v = arguments_.inputs().take(v, "v", {length_});
    run(tangent_, v);
    const Tensor r_delta = product_of(moved_[0], curvature_);
    adjoint_.r_delta_out = arguments_.inputs().take(
        r_delta, "r_delta", {1, tangent_.network.batch, tangent_.network.outputs()});
    run(adjoint_, v);
    return moved_.back();
  }

 private:
  Arguments arguments_;
  Tensor curvature_;
  int64_t length_;
  std::vector<const void*> a_, first_, delta_, s_;
  std::vector<void*> rz_;
  std::vector<Tensor> moved_;  // R y, Rz of the hidden layers and the product
  Tangent tangent_{};
  Adjoint adjoint_{};
};

std::vector<Tensor> lanczos_op(Tensor basis, int64_t first, int64_t num_steps, double breakdown,
                               Tensor largest, Tensor x, std::vector<Tensor> weights,
                               std::vector<Tensor> a, std::vector<Tensor> d1,
                               std::vector<Tensor> delta, std::vector<Tensor> s, Tensor curvature,
                               Offsets weight_offsets, Offsets bias_offsets, bool gauss_newton) {
  STD_TORCH_CHECK(
      basis.dim() == 2 && 0 <= first && 0 <= num_steps && first + num_steps < basis.size(0),
      "hvp: basis must have a row after the last of ", num_steps, " from ", first);
  SumProducts products(x, weights, a, d1, delta, s, curvature, weight_offsets, bias_offsets,
                       basis.size(1), gauss_newton);
  std::vector<Tensor> results;
  for (int64_t row = first; row < first + num_steps; ++row) {
    const Tensor product = products.multiply(torch::stable::select(basis, 0, row));
    results.push_back(spectral::lanczos_step_op(basis, product, row + 1, largest, breakdown));
    largest = torch::stable::narrow(results.back(), 0, row + 3, 1);
  }
  return results;
}

#ifndef HESSREG_CUDA

// scale f(sign y) with its derivatives in y, one row of numbers after another.
template <typename C>
void loss_term(const C* y, int64_t count, Activation activation, double parameter, double sign,
               double scale, C* const (&derivatives)[3]) {
  const double factors[] = {scale * sign, scale, scale * sign};
  for (int64_t i = 0; i < count; ++i) {
    const Jet<double> jet =
        activate<ScalarMath<double>>(activation, parameter, sign * static_cast<double>(y[i]));
    const double found[] = {jet.first, jet.second, jet.third};
    for (int k = 0; k < 3; ++k) derivatives[k][i] = static_cast<C>(factors[k] * found[k]);
  }
}

template <typename C>
void loss_terms(const Tensor& y, const std::vector<int64_t>& rows,
                const std::vector<Activation>& activations, const std::vector<double>& parameters,
                const std::vector<double>& signs, const std::vector<double>& scales, Tensor& out) {
  const C* from = static_cast<const C*>(y.const_data_ptr());
  C* to = static_cast<C*>(out.mutable_data_ptr());
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t count = rows[i] * y.size(1), all = y.numel();
    loss_term<C>(from, count, activations[i], parameters[i], signs[i], scales[i],
                 {to, to + all, to + 2 * all});
    from += count, to += count;
  }
}

Tensor loss_terms_op(Tensor y_, std::vector<int64_t> rows, std::vector<int64_t> activations_,
                     std::vector<double> parameters, std::vector<double> signs,
                     std::vector<double> scales) {
  const Element element = wide_element_of(y_);
  const auto activations = checked_activations(activations_, rows.size());
  STD_TORCH_CHECK(y_.dim() == 2 && parameters.size() == rows.size() &&
                      signs.size() == rows.size() && scales.size() == rows.size() &&
                      std::accumulate(rows.begin(), rows.end(), int64_t{0}) == y_.size(0),
                  "hvp: there must be a term for each of the rows of y");
  const Tensor y = torch::stable::contiguous(y_);
  Tensor out = torch::stable::new_empty(y, {3, y.size(0), y.size(1)});
  (element == Element::kFloat64 ? loss_terms<double> : loss_terms<float>)(y, rows, activations,
                                                                          parameters, signs, scales,
                                                                          out);
  return out;
}

// The eigenpairs of the Lanczos matrix [m, m], vectors in columns.
struct RitzPairs {
  Tensor values_, vectors_;
  int64_t m;

  double value(int64_t k) const { return static_cast<const double*>(values_.const_data_ptr())[k]; }
  double coordinate(int64_t j, int64_t k) const {
    return static_cast<const double*>(vectors_.const_data_ptr())[j * m + k];
  }
  double largest() const { return std::max(std::abs(value(0)), std::abs(value(m - 1))); }
};

RitzPairs ritz_pairs(const std::vector<Tensor>& steps, int64_t m) {
  Tensor alpha = new_float64(steps[0], {1, m}), beta = new_float64(steps[0], {1, m - 1});
  for (int64_t j = 0; j < m; ++j) {
    const double* row = static_cast<const double*>(steps[j].const_data_ptr()) + j;
    static_cast<double*>(alpha.mutable_data_ptr())[j] = row[0];
    if (j + 1 < m) static_cast<double*>(beta.mutable_data_ptr())[j] = row[1];
  }
  const std::vector<Tensor> pairs = spectral::tridiagonal_eigh_op(alpha, beta);
  return {pairs[0], pairs[1], m};
}

// z' f(T) z of the Lanczos matrix T, f(t) = weight |t| smoothed, and the coefficients of
// weight sign(T) z in the Krylov basis.
struct Quadrature {
  double value;
  std::vector<double> coefficients;
};

Quadrature absolute_quadrature(const RitzPairs& ritz, double smoothing, double weight) {
  const double delta = smoothing * ritz.largest();
  Quadrature found{0, std::vector<double>(ritz.m)};
  for (int64_t k = 0; k < ritz.m; ++k) {
    const double value = ritz.value(k), size = std::hypot(value, delta);
    const double part = size > 0 ? weight * value / size * ritz.coordinate(0, k) : 0;
    found.value += value * part * ritz.coordinate(0, k);
    for (int64_t j = 0; j < ritz.m; ++j) found.coefficients[j] += part * ritz.coordinate(j, k);
  }
  return found;
}

// How many of the steps count: up to an invariant subspace. 0: there is something not finite.
int64_t count_steps(const std::vector<Tensor>& steps) {
  for (size_t j = 0; j < steps.size(); ++j) {
    const double* row = static_cast<const double*>(steps[j].const_data_ptr()) + j;
    if (!std::isfinite(row[0] + row[1] + row[2])) return 0;
    if (row[2] > 0) return j + 1;
  }
  return steps.size();
}

template <typename C>
void sum_rows(const Tensor& rows, const std::vector<double>& coefficients, Tensor& out) {
  const int64_t n = rows.size(1);
  C* to = static_cast<C*>(out.mutable_data_ptr());
  std::fill(to, to + n, C(0));
  for (size_t j = 0; j < coefficients.size(); ++j) {
    const C* from = static_cast<const C*>(rows.const_data_ptr()) + j * n;
    const C factor = static_cast<C>(coefficients[j]);
    for (int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
  }
}

// The first row of `out` as a sum of rows.
void combine_rows(const Tensor& rows, const std::vector<double>& coefficients, Tensor& out) {
  const bool wide = wide_element_of(out) == Element::kFloat64;
  (wide ? sum_rows<double> : sum_rows<float>)(rows, coefficients, out);
}

template <typename C>
void scale(Tensor& x, double factor) {
  C* to = static_cast<C*>(x.mutable_data_ptr());
  const int64_t count = x.numel();
  for (int64_t i = 0; i < count; ++i) to[i] *= static_cast<C>(factor);
}

// A perceptron, linearised at a batch, and the derivatives of a loss that is a sum over its
// outputs.
struct SumOfOutputs {
  Tensor x;
  std::vector<Tensor> weights, a, d1, d2, delta, s, t;
  Tensor loss;  // [3, batch, outputs]
  Offsets weight_offsets, bias_offsets;
};

struct KrylovSpace {
  Tensor basis;
  std::vector<Tensor> steps;
  int64_t m;  // how many of the rows count
};

KrylovSpace krylov_space(const SumOfOutputs& of, const Tensor& z, int64_t num_steps,
                         double breakdown) {
  STD_TORCH_CHECK(z.dim() == 1 && num_steps > 0, "hvp: z must be [n], and num_steps positive");
  STD_TORCH_CHECK(!of.weights.empty() && of.x.dim() == 2 && of.loss.is_contiguous() &&
                      of.loss.scalar_type() == z.scalar_type() &&
                      of.loss.sizes().equals({3, of.x.size(0), of.weights.back().size(0)}),
                  "hvp: loss must be [3, batch, outputs] of the dtype of z, contiguous");
  const int64_t n = z.size(0);
  Tensor basis = torch::stable::new_empty(z, {std::min(num_steps, n) + 1, n});
  Tensor row = torch::stable::select(basis, 0, 0);
  torch::stable::copy_(row, z);
  const Tensor largest = torch::stable::new_zeros(z, {1}, ScalarType::Double);
  const Tensor curvature = torch::stable::select(of.loss, 0, 1);
  std::vector<Tensor> steps =
      lanczos_op(basis, 0, basis.size(0) - 1, breakdown, largest, of.x, of.weights, of.a, of.d1,
                 of.delta, of.s, curvature, of.weight_offsets, of.bias_offsets, false);
  const int64_t m = count_steps(steps);
  return {basis, std::move(steps), m};
}

// How far the operator leads out of the space from a unit vector in it, by its last coordinate.
double residual(const KrylovSpace& space, int64_t num_steps, double last) {
  if (space.m < num_steps || space.m == space.basis.size(1)) return 0;
  const double* row = static_cast<const double*>(space.steps.back().const_data_ptr()) + space.m - 1;
  return row[2] > 0 ? 0 : row[1] * std::abs(last);
}

// What moves with the outputs: R_j y times the second derivative, and what bends with both
// directions times the third.
template <typename C>
void bend(const Tensor& loss, Tensor& ry) {
  const int64_t count = loss.numel() / 3, both = ry.size(0) - 1;
  const C *second = static_cast<const C*>(loss.const_data_ptr()) + count, *third = second + count;
  const C share = both == 2 ? C(1) : C(0.5);
  C *r = static_cast<C*>(ry.mutable_data_ptr()), *other = r + (both - 1) * count;
  for (int64_t i = 0; i < count; ++i) {
    const C by_both = share * third[i] * r[i] * other[i];
    for (int64_t j = 0; j <= both; ++j) r[j * count + i] *= second[i];
    r[both * count + i] += by_both;
  }
}

// The third derivative along two directions, or half of that along one and the same.
Tensor third_derivative(const SumOfOutputs& of, const Tensor& v) {
  std::vector<Tensor> moved =
      second_tangent(of.x, of.weights, of.a, of.d1, of.d2, v, of.weight_offsets, of.bias_offsets);
  const bool wide = wide_element_of(v) == Element::kFloat64;
  (wide ? bend<double> : bend<float>)(of.loss, moved[0]);
  const auto middle = moved.begin() + of.weights.size();
  return second_adjoint(of.x, of.weights, of.a, of.d1, of.d2, of.delta, of.s, of.t,
                        {moved.begin() + 1, middle}, {middle, moved.end()}, v, moved[0],
                        of.weight_offsets, of.bias_offsets);
}

std::vector<Tensor> absolute_form_op(Tensor z, int64_t num_steps, double smoothing, double weight,
                                     double breakdown, bool with_gradient, Tensor x,
                                     std::vector<Tensor> weights, std::vector<Tensor> a,
                                     std::vector<Tensor> d1, std::vector<Tensor> d2,
                                     std::vector<Tensor> delta, std::vector<Tensor> s,
                                     std::vector<Tensor> t, Tensor loss, Offsets weight_offsets,
                                     Offsets bias_offsets) {
  const SumOfOutputs of{x, weights, a, d1, d2, delta, s, t, loss, weight_offsets, bias_offsets};
  const KrylovSpace space = krylov_space(of, z, num_steps, breakdown);
  if (space.m == 0) return {};
  const Quadrature found = absolute_quadrature(ritz_pairs(space.steps, space.m), smoothing, weight);
  Tensor v = torch::stable::new_empty(z, {2, z.size(0)});
  combine_rows(space.basis, found.coefficients, v);
  Tensor second = torch::stable::select(v, 0, 1);
  torch::stable::copy_(second, z);
  Tensor value = torch::stable::full({}, found.value, z.scalar_type());
  std::vector<Tensor> out{value, torch::stable::select(v, 0, 0)};
  if (with_gradient) out.push_back(third_derivative(of, v));
  return out;
}

// Of the Ritz value of largest modulus: that and the norm of the residual, in float64; the unit
// vector, on z's side; and the gradient of the modulus.
std::vector<Tensor> spectral_form_op(Tensor z, int64_t num_steps, double breakdown,
                                     bool with_gradient, Tensor x, std::vector<Tensor> weights,
                                     std::vector<Tensor> a, std::vector<Tensor> d1,
                                     std::vector<Tensor> d2, std::vector<Tensor> delta,
                                     std::vector<Tensor> s, std::vector<Tensor> t, Tensor loss,
                                     Offsets weight_offsets, Offsets bias_offsets) {
  const SumOfOutputs of{x, weights, a, d1, d2, delta, s, t, loss, weight_offsets, bias_offsets};
  const KrylovSpace space = krylov_space(of, z, num_steps, breakdown);
  if (space.m == 0) return {};
  const RitzPairs ritz = ritz_pairs(space.steps, space.m);
  const int64_t k = ritz.value(space.m - 1) == ritz.largest() ? space.m - 1 : 0;
  std::vector<double> coordinates;
  const double side = ritz.coordinate(0, k) < 0 ? -1 : 1;
  for (int64_t j = 0; j < space.m; ++j) coordinates.push_back(side * ritz.coordinate(j, k));
  Tensor ends = new_float64(z, {2}), v = torch::stable::new_empty(z, {1, z.size(0)});
  static_cast<double*>(ends.mutable_data_ptr())[0] = ritz.value(k);
  static_cast<double*>(ends.mutable_data_ptr())[1] = residual(space, num_steps, coordinates.back());
  combine_rows(space.basis, coordinates, v);
  std::vector<Tensor> out{ends, torch::stable::select(v, 0, 0)};
  if (!with_gradient) return out;
  out.push_back(third_derivative(of, v));
  const bool wide = wide_element_of(z) == Element::kFloat64;
  (wide ? scale<double> : scale<float>)(out[2], ritz.value(k) < 0 ? -2 : 2);
  return out;
}

#endif

}  // namespace

#ifndef HESSREG_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(hessreg, m) {
  m.def("symmetric_matmul(Tensor a, Tensor v) -> Tensor");
  m.def(
      "mlp_forward(Tensor x, Tensor[] weights, Tensor[] biases, int[] activations,"
      " float[] parameters, bool with_third) -> Tensor[]");
  m.def(
      "mlp_backward(Tensor delta, Tensor[] weights, Tensor[] d1, Tensor[] d2, Tensor[] d3)"
      " -> Tensor[]");
  m.def(
      "mlp_tangent(Tensor x, Tensor[] weights, Tensor[] a, Tensor[] d1, Tensor direction_x,"
      " Tensor v, int[] weight_offsets, int[] bias_offsets) -> Tensor[]");
  m.def(
      "mlp_adjoint(Tensor x, Tensor[] weights, Tensor[] a, Tensor[] d1, Tensor[] delta,"
      " Tensor[] s, Tensor[] rz, Tensor direction_x, Tensor v, Tensor r_delta,"
      " int[] weight_offsets, int[] bias_offsets, bool gauss_newton, bool with_input)"
      " -> Tensor[]");
  m.def(
      "mlp_second_tangent(Tensor x, Tensor[] weights, Tensor[] a, Tensor[] d1, Tensor[] d2,"
      " Tensor v, int[] weight_offsets, int[] bias_offsets) -> Tensor[]");
  m.def(
      "mlp_second_adjoint(Tensor x, Tensor[] weights, Tensor[] a, Tensor[] d1, Tensor[] d2,"
      " Tensor[] delta, Tensor[] s, Tensor[] t, Tensor[] rz, Tensor[] ra, Tensor v, Tensor r_delta,"
      " int[] weight_offsets, int[] bias_offsets) -> Tensor");
  m.def(
      "mlp_lanczos(Tensor(a!) basis, int first, int num_steps, float breakdown, Tensor largest,"
      " Tensor x, Tensor[] weights, Tensor[] a, Tensor[] d1, Tensor[] delta, Tensor[] s,"
      " Tensor curvature, int[] weight_offsets, int[] bias_offsets, bool gauss_newton)"
      " -> Tensor[]");
  m.def(
      "mlp_loss_terms(Tensor y, int[] rows, int[] activations, float[] parameters, float[] signs,"
      " float[] scales) -> Tensor");
  m.def(
      "mlp_absolute_form(Tensor z, int num_steps, float smoothing, float weight, float breakdown,"
      " bool with_gradient, Tensor x, Tensor[] weights, Tensor[] a, Tensor[] d1, Tensor[] d2,"
      " Tensor[] delta, Tensor[] s, Tensor[] t, Tensor loss, int[] weight_offsets,"
      " int[] bias_offsets) -> Tensor[]");
  m.def(
      "mlp_spectral_form(Tensor z, int num_steps, float breakdown, bool with_gradient, Tensor x,"
      " Tensor[] weights, Tensor[] a, Tensor[] d1, Tensor[] d2, Tensor[] delta, Tensor[] s,"
      " Tensor[] t, Tensor loss, int[] weight_offsets, int[] bias_offsets) -> Tensor[]");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(hessreg, HESSREG_DISPATCH_KEY, m) {
  m.impl("symmetric_matmul", TORCH_BOX(&symmetric_matmul_op));
  m.impl("mlp_forward", TORCH_BOX(&forward_op));
  m.impl("mlp_backward", TORCH_BOX(&backward_op));
  m.impl("mlp_tangent", TORCH_BOX(&tangent_op));
  m.impl("mlp_adjoint", TORCH_BOX(&adjoint_op));
  m.impl("mlp_second_tangent", TORCH_BOX(&second_tangent_op));
  m.impl("mlp_second_adjoint", TORCH_BOX(&second_adjoint_op));
  m.impl("mlp_lanczos", TORCH_BOX(&lanczos_op));
#ifndef HESSREG_CUDA  // where the small numbers would have to come to the host
  m.impl("mlp_loss_terms", TORCH_BOX(&loss_terms_op));
  m.impl("mlp_absolute_form", TORCH_BOX(&absolute_form_op));
  m.impl("mlp_spectral_form", TORCH_BOX(&spectral_form_op));
#endif
}

}  // namespace hessreg::hvp
