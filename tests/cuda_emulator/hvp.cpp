// The emulated kernels of csrc/hvp for NumPy; see tests/emulated.py.
#include <pybind11/stl.h>

#include <optional>

#include "hvp/hvp_cuda.h"
#include "numpy_arguments.hpp"

namespace {

namespace py = pybind11;
using hessreg::Element;
using hessreg::emulator::NumpyArguments;
using namespace hessreg::hvp;

using Arrays = std::vector<py::array>;
using AnyArray = std::optional<py::array>;
using Offsets = std::vector<int64_t>;

Element element_of(const py::array& array) {
  return array.itemsize() == 4 ? Element::kFloat32 : Element::kFloat64;
}

// A network, and lists of arrays as a launcher takes them.
class Arguments {
 public:
  Arguments(const Arrays& weights, int64_t batch) {
    const auto inputs = take("weight", weights);
    for (size_t l = 0; l < weights.size(); ++l)
      layers_.push_back({inputs[l], nullptr, weights[l].shape(1), weights[l].shape(0), -1, -1});
    network = {layers_.data(), static_cast<int64_t>(layers_.size()), batch, element_of(weights[0])};
  }

  void set_biases(const std::vector<AnyArray>& biases) {
    for (size_t l = 0; l < layers_.size(); ++l)
      layers_[l].bias = biases[l] ? memory.input("bias" + std::to_string(l), *biases[l]) : nullptr;
  }

  void set_offsets(const Offsets& weights, const Offsets& biases) {
    for (size_t l = 0; l < layers_.size(); ++l) {
      layers_[l].weight_offset = weights[l];
      layers_[l].bias_offset = biases[l];
    }
  }

  std::vector<const void*> take(const std::string& name, const Arrays& arrays) {
    std::vector<const void*> pointers;
    for (const py::array& array : arrays)
      pointers.push_back(memory.input(name + std::to_string(pointers.size()), array));
    return pointers;
  }

  const void* take_any(const std::string& name, const AnyArray& array) {
    return array ? memory.input(name, *array) : nullptr;
  }

  std::vector<void*> fill(const std::string& name, Arrays& arrays) {
    std::vector<void*> pointers;
    for (py::array& array : arrays)
      pointers.push_back(memory.output(name + std::to_string(pointers.size()), array));
    return pointers;
  }

  template <typename Problem>
  void run(void (*launch)(const Problem&, void*, void*), const Problem& problem) {
    const auto bytes = static_cast<size_t>(cuda::scratch_bytes(problem));
    launch(problem, memory.scratch<double>("scratch", (bytes + 7) / 8), nullptr);
  }

  NumpyArguments memory;
  Network network{};

 private:
  std::vector<Layer> layers_;
};

void forward(const py::array& x, const Arrays& weights, const std::vector<AnyArray>& biases,
             const std::vector<int64_t>& activations, const std::vector<double>& parameters,
             py::array y, Arrays a, Arrays first, Arrays second, Arrays third) {
  Arguments arguments(weights, x.shape(0));
  arguments.set_biases(biases);
  const auto values = arguments.fill("a", a), slopes = arguments.fill("first", first),
             bends = arguments.fill("second", second), thirds = arguments.fill("third", third);
  std::vector<Activation> kinds;
  for (const int64_t activation : activations) kinds.push_back(static_cast<Activation>(activation));
  arguments.run(cuda::forward,
                Forward{arguments.network, arguments.memory.input("x", x), kinds.data(),
                        parameters.data(), arguments.memory.output("y", y), values.data(),
                        slopes.data(), bends.data(), third.empty() ? nullptr : thirds.data()});
}

void backward(const py::array& delta_out, const Arrays& weights, const Arrays& first,
              const Arrays& second, const Arrays& third, Arrays delta, Arrays s, Arrays t) {
  Arguments arguments(weights, delta_out.shape(0));
  const auto slopes = arguments.take("first", first), bends = arguments.take("second", second),
             thirds = arguments.take("third", third);
  const auto deltas = arguments.fill("delta", delta), bent = arguments.fill("s", s),
             last = arguments.fill("t", t);
  arguments.run(cuda::backward, Backward{arguments.network, slopes.data(), bends.data(),
                                         third.empty() ? nullptr : thirds.data(),
                                         arguments.memory.input("delta_out", delta_out),
                                         deltas.data(), bent.data(), last.data()});
}

void tangent(const py::array& x, const Arrays& weights, const Arrays& a, const Arrays& first,
             const AnyArray& u, const py::array& v, const Offsets& weight_offsets,
             const Offsets& bias_offsets, py::array ry, Arrays rz) {
  Arguments arguments(weights, x.shape(0));
  arguments.set_offsets(weight_offsets, bias_offsets);
  const auto values = arguments.take("a", a), slopes = arguments.take("first", first);
  const auto moved = arguments.fill("rz", rz);
  arguments.run(cuda::tangent,
                Tangent{arguments.network, arguments.memory.input("x", x), values.data(),
                        slopes.data(), arguments.take_any("u", u), arguments.memory.input("v", v),
                        v.shape(0), v.shape(1), arguments.memory.output("ry", ry), moved.data()});
}

// What the result holds where no offset points stays.
void adjoint(const py::array& x, const Arrays& weights, const Arrays& a, const Arrays& first,
             const Arrays& delta, const Arrays& s, const Arrays& rz, const AnyArray& u,
             const py::array& v, const py::array& r_delta, const Offsets& weight_offsets,
             const Offsets& bias_offsets, bool gauss_newton, py::array result, AnyArray r_input) {
  Arguments arguments(weights, x.shape(0));
  arguments.set_offsets(weight_offsets, bias_offsets);
  const auto values = arguments.take("a", a), slopes = arguments.take("first", first),
             deltas = arguments.take("delta", delta), bent = arguments.take("s", s),
             moved = arguments.take("rz", rz);
  arguments.run(cuda::adjoint,
                Adjoint{arguments.network, arguments.memory.input("x", x), values.data(),
                        slopes.data(), deltas.data(), bent.data(), moved.data(),
                        arguments.take_any("u", u), arguments.memory.input("v", v), v.shape(0),
                        v.shape(1), arguments.memory.input("r_delta", r_delta), gauss_newton,
                        arguments.memory.in_out("result", result),
                        r_input ? arguments.memory.output("r_input", *r_input) : nullptr});
}

void second_tangent(const py::array& x, const Arrays& weights, const Arrays& a, const Arrays& first,
                    const Arrays& second, const py::array& v, const Offsets& weight_offsets,
                    const Offsets& bias_offsets, py::array ry, Arrays rz, Arrays ra) {
  Arguments arguments(weights, x.shape(0));
  arguments.set_offsets(weight_offsets, bias_offsets);
  const auto values = arguments.take("a", a), slopes = arguments.take("first", first),
             bends = arguments.take("second", second);
  const auto moved = arguments.fill("rz", rz), after = arguments.fill("ra", ra);
  arguments.run(
      cuda::second_tangent,
      SecondTangent{arguments.network, arguments.memory.input("x", x), values.data(), slopes.data(),
                    bends.data(), arguments.memory.input("v", v), v.shape(0), v.shape(1),
                    arguments.memory.output("ry", ry), moved.data(), after.data()});
}

// What the result holds where no offset points stays.
void second_adjoint(const py::array& x, const Arrays& weights, const Arrays& a, const Arrays& first,
                    const Arrays& second, const Arrays& delta, const Arrays& s, const Arrays& t,
                    const Arrays& rz, const Arrays& ra, const py::array& v,
                    const py::array& r_delta, const Offsets& weight_offsets,
                    const Offsets& bias_offsets, py::array result) {
  Arguments arguments(weights, x.shape(0));
  arguments.set_offsets(weight_offsets, bias_offsets);
  const auto values = arguments.take("a", a), slopes = arguments.take("first", first),
             bends = arguments.take("second", second), deltas = arguments.take("delta", delta),
             bent = arguments.take("s", s), last = arguments.take("t", t),
             moved = arguments.take("rz", rz), after = arguments.take("ra", ra);
  arguments.run(cuda::second_adjoint,
                SecondAdjoint{arguments.network, arguments.memory.input("x", x), values.data(),
                              slopes.data(), bends.data(), deltas.data(), bent.data(), last.data(),
                              moved.data(), after.data(), arguments.memory.input("v", v),
                              v.shape(0), v.shape(1), arguments.memory.input("r_delta", r_delta),
                              arguments.memory.in_out("result", result)});
}

void symmetric_product(const py::array& a, const py::array& v, py::array out) {
  NumpyArguments memory;
  const SymmetricProduct problem{
      memory.input("a", a), memory.input("v", v), memory.output("out", out), a.shape(0), a.shape(1),
      v.shape(2),           element_of(a)};
  const auto bytes = static_cast<size_t>(cuda::scratch_bytes(problem));
  cuda::symmetric_product(problem, memory.scratch<double>("scratch", (bytes + 7) / 8), nullptr);
}

}  // namespace

HESSREG_EMULATOR_MODULE(m) {
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("tangent", &tangent);
  m.def("adjoint", &adjoint);
  m.def("second_tangent", &second_tangent);
  m.def("second_adjoint", &second_adjoint);
  m.def("symmetric_product", &symmetric_product);
}
