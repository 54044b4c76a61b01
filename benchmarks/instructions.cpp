// Calls each CPU kernel once on a fixed problem, each in a function of its own name, for callgrind
// to count: see instructions.py. Compiled with the kernels of one instruction set, without torch.
#include <cstdio>
#include <memory>
#include <vector>

#include "../csrc/gaussian/gaussian_cpu.h"
#include "../csrc/hvp/hvp_cpu.h"
#include "../csrc/projection/projection_cpu.h"
#include "../csrc/spectral/spectral_cpu.h"

#define COUNTED extern "C" __attribute__((noinline)) void

namespace {

using namespace hessreg;

// Numbers between -1 and 1 that look random and are the same everywhere.
std::vector<float> numbers(size_t count) {
  std::vector<float> found(count);
  uint32_t state = 1;
  for (float& x : found) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<float>(state >> 8) / 8388608.f - 1.f;
  }
  return found;
}

class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(static_cast<size_t>(bytes) + 64) {}
  void* aligned() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (64 - address % 64) % 64;
  }

 private:
  std::vector<char> memory_;
};

template <typename Problem>
void run_stages(const hvp::Staged<Problem>& kernel, const Problem& problem, void* workspace) {
  for (int64_t index = 0; index < kernel.stages(problem); ++index)
    kernel.run(problem, workspace, index, 0, kernel.stage(problem, index).tasks);
}

// ---- projection: two lists of one tensor -------------------------------------------------------

constexpr int64_t kLength = 100'000, kPieceLength = 8'192;

struct Projection {
  std::vector<float> x = numbers(kLength), y = numbers(kLength), out = numbers(kLength);
  const void* data[2] = {x.data(), y.data()};
  void* results[1] = {out.data()};
  projection::Position position = {1, kLength, 0, 0};
  projection::Lists lists = {data, &position, 2, 1, 1, 1, kPieceLength, Element::kFloat32};
  int64_t pieces = projection::pieces_per_row(kLength, kPieceLength);
  std::vector<double> partials = std::vector<double>(static_cast<size_t>(pieces) * 3);
  double weights[2] = {1, -0.25};
};

}  // namespace

COUNTED projection_gram(Projection& p) {
  projection::HESSREG_ISA::kernels.gram(p.lists, p.partials.data(), 0, p.pieces);
}
COUNTED projection_linear_combination(Projection& p) {
  projection::HESSREG_ISA::kernels.linear_combination(p.lists, p.weights, p.results, 1, 0,
                                                      p.pieces);
}

// ---- gaussian: two samples of 128 points -------------------------------------------------------

namespace {

constexpr int64_t kPoints = 128;

struct Gaussian {
  explicit Gaussian(int64_t d)
      : z(numbers(static_cast<size_t>(2 * kPoints * d))),
        out(static_cast<size_t>(kPoints * kPoints)),
        gradient(static_cast<size_t>(2 * kPoints * gaussian::gradient_width(d))),
        energy{z.data(), {&gamma, nullptr, 1}, 1, kPoints, 2 * kPoints, d, 1.0, -2.0, 1.0, nullptr,
               nullptr,  Element::kFloat32},
        matrix{
            z.data(), z.data() + kPoints * d, {&gamma, nullptr, 1}, out.data(), 1, kPoints, kPoints,
            d,        Element::kFloat32},
        workspace(kernels.energy_workspace(energy) + kernels.matrix_workspace(matrix)) {}

  const gaussian::CpuKernels& kernels = gaussian::HESSREG_ISA::kernels;
  double gamma = 0.25;
  std::vector<float> z, out;
  std::vector<double> gradient;
  gaussian::Energy energy;
  gaussian::Matrix matrix;
  Workspace workspace;
  gaussian::SpanPair pairs[3] = {{0, {0, kPoints}, {0, kPoints}},
                                 {0, {kPoints, 2 * kPoints}, {kPoints, 2 * kPoints}},
                                 {0, {0, kPoints}, {kPoints, 2 * kPoints}}};
  double values[3] = {};

  void run_energy(bool with_gradient) {
    energy.gradient = with_gradient ? gradient.data() : nullptr;
    kernels.energy(energy, pairs, values, with_gradient ? gradient.data() : nullptr,
                   workspace.aligned(), 0, 3);
  }
};

}  // namespace

COUNTED gaussian_energy_d2(Gaussian& p) { p.run_energy(false); }
COUNTED gaussian_energy_gradient_d2(Gaussian& p) { p.run_energy(true); }
COUNTED gaussian_energy_d64(Gaussian& p) { p.run_energy(false); }
COUNTED gaussian_energy_gradient_d64(Gaussian& p) { p.run_energy(true); }
COUNTED gaussian_matrix_d64(Gaussian& p) {
  const gaussian::Blocks blocks(kPoints);
  p.kernels.matrix(p.matrix, p.workspace.aligned(), 0, blocks.count);
}

// ---- spectral: sixteen matrices ----------------------------------------------------------------

namespace {

constexpr int64_t kBatch = 16, kSteps = 30;

struct Spectral {
  explicit Spectral(int64_t n) : n(n), a(numbers(static_cast<size_t>(kBatch * n * n))) {
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < i; ++j) at(b, i, j) = at(b, j, i);
  }

  float& at(int64_t b, int64_t i, int64_t j) { return a[static_cast<size_t>((b * n + i) * n + j)]; }
  size_t total(int64_t each) const { return static_cast<size_t>(kBatch * each); }

  const spectral::CpuKernels& kernels = spectral::HESSREG_ISA::kernels;
  int64_t n;
  std::vector<float> a, v0 = numbers(total(n)), q = std::vector<float>(total(n * n)),
                        values = std::vector<float>(total(n)),
                        vectors = std::vector<float>(total(n * n)),
                        residual = std::vector<float>(total(n));
  spectral::PowerIteration power = {
      a.data(), v0.data(), values.data(), vectors.data(),   residual.data(),
      kBatch,   n,         kSteps,        Element::kFloat32};
  spectral::Lanczos lanczos = {a.data(), v0.data(), values.data(), residual.data(),  q.data(),
                               kBatch,   n,         kSteps,        Element::kFloat32};
  spectral::SymmetricEigh eigenvalues = {a.data(), values.data(),    nullptr, kBatch,
                                         n,        Element::kFloat32};
  Workspace workspace =
      Workspace(kernels.power_iteration_workspace(power) + kernels.lanczos_workspace(lanczos) +
                kernels.symmetric_eigh_workspace(eigenvalues));
};

}  // namespace

COUNTED spectral_power_iteration_n32(Spectral& p) {
  p.kernels.power_iteration(p.power, p.workspace.aligned(), 0, kBatch);
}
COUNTED spectral_power_iteration_n64(Spectral& p) {
  p.kernels.power_iteration(p.power, p.workspace.aligned(), 0, kBatch);
}
COUNTED spectral_lanczos_n32(Spectral& p) {
  p.kernels.lanczos(p.lanczos, p.workspace.aligned(), 0, kBatch);
}
COUNTED spectral_eigenvalues_n32(Spectral& p) {
  p.kernels.symmetric_eigh(p.eigenvalues, p.workspace.aligned(), 0, kBatch);
}

// ---- hvp: a network 64-128-1 and a batch of 64 -------------------------------------------------

namespace {

constexpr int64_t kIn = 64, kHidden = 128, kRows = 64;

struct HVP {
  std::vector<float> w1 = numbers(kHidden * kIn), b1 = numbers(kHidden), w2 = numbers(kHidden),
                     b2 = numbers(1), x = numbers(kRows * kIn), y = numbers(kRows),
                     a = numbers(kHidden * kRows), first = a, second = a, rz = a,
                     v = numbers(kHidden * (kIn + 2) + 1), ry = y;
  hvp::Layer layers[2] = {
      {w1.data(), b1.data(), kIn, kHidden, 0, kHidden * kIn},
      {w2.data(), b2.data(), kHidden, 1, kHidden * (kIn + 1), kHidden * (kIn + 2)}};
  hvp::Network network = {layers, 2, kRows, Element::kFloat32};
  hvp::Activation activation = hvp::Activation::kTanh;
  double parameter = 0;
  void* lists[4] = {a.data(), first.data(), second.data(), rz.data()};
  hvp::Forward forward = {network, x.data(),  &activation, &parameter, y.data(),
                          lists,   lists + 1, lists + 2,   nullptr};
  hvp::Tangent tangent = {network,   x.data(), lists, lists + 1,
                          nullptr,   v.data(), 1,     static_cast<int64_t>(v.size()),
                          ry.data(), lists + 3};
  std::vector<float> matrix = numbers(64 * 64), column = numbers(64), product = column;
  hvp::SymmetricProduct symmetric = {matrix.data(),    column.data(), product.data(), 1, 64, 1,
                                     Element::kFloat32};
  const hvp::CpuKernels& kernels = hvp::HESSREG_ISA::kernels;
  Workspace workspace = Workspace(kernels.forward.workspace_bytes(forward) +
                                  kernels.tangent.workspace_bytes(tangent) +
                                  kernels.symmetric_product.workspace_bytes(symmetric));
};

}  // namespace

COUNTED hvp_forward(HVP& p) { run_stages(p.kernels.forward, p.forward, p.workspace.aligned()); }
COUNTED hvp_tangent(HVP& p) { run_stages(p.kernels.tangent, p.tangent, p.workspace.aligned()); }
COUNTED hvp_symmetric_product(HVP& p) {
  run_stages(p.kernels.symmetric_product, p.symmetric, p.workspace.aligned());
}

int main() {
  Projection projection;
  projection_gram(projection);
  projection_linear_combination(projection);
  Gaussian flat(2), deep(64);
  gaussian_energy_d2(flat);
  gaussian_energy_gradient_d2(flat);
  gaussian_energy_d64(deep);
  gaussian_energy_gradient_d64(deep);
  gaussian_matrix_d64(deep);
  Spectral small(32), large(64);
  spectral_power_iteration_n32(small);
  spectral_power_iteration_n64(large);
  spectral_lanczos_n32(small);
  spectral_eigenvalues_n32(small);
  const auto hvp = std::make_unique<HVP>();
  hvp_forward(*hvp);
  hvp_tangent(*hvp);
  hvp_symmetric_product(*hvp);
  // All of it, so that nothing is left out as unused.
  std::printf("%g %g %g %g %g %g\n", projection.partials[0], static_cast<double>(projection.out[0]),
              flat.values[0], static_cast<double>(deep.out[0]),
              static_cast<double>(small.values[0]), static_cast<double>(hvp->ry[0]));
}
