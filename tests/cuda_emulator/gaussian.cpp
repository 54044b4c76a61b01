// The emulated kernels of csrc/gaussian for NumPy; see tests/emulated.py.
#include <pybind11/stl.h>

#include <optional>

#include "gaussian/gaussian_cuda.h"
#include "numpy_arguments.hpp"

namespace {

namespace py = pybind11;
using hessreg::Element;
using hessreg::emulator::NumpyArguments;
using namespace hessreg::gaussian;
using Precision = cuda::Precision;

Element element_of(const py::array& array) {
  if (array.dtype().kind() == 'u') return Element::kBFloat16;
  return array.itemsize() == 2   ? Element::kFloat16
         : array.itemsize() == 4 ? Element::kFloat32
                                 : Element::kFloat64;
}

Precision precision_of(bool allow_tf32) {
  return allow_tf32 ? Precision::kTF32 : Precision::kFloat32;
}

Mixture mixture_of(NumpyArguments& memory, const py::array& gamma,
                   const std::optional<py::array>& coefficient) {
  return {memory.input<double>("gamma", gamma),
          coefficient ? memory.input<double>("coefficient", *coefficient) : nullptr,
          gamma.shape(1)};
}

// As aligned as memory of torch.
void* scratch_of(NumpyArguments& memory, int64_t bytes) {
  return memory.scratch<double>("scratch", (static_cast<size_t>(bytes) + 7) / 8);
}

void matrix(const py::array& x, const py::array& y, const py::array& gamma,
            const std::optional<py::array>& coefficient, bool allow_tf32, py::array out) {
  NumpyArguments memory;
  const Matrix problem{memory.input("x", x),
                       memory.input("y", y),
                       mixture_of(memory, gamma, coefficient),
                       memory.output("out", out),
                       x.shape(0),
                       x.shape(1),
                       y.shape(1),
                       x.shape(2),
                       element_of(x)};
  cuda::matrix(problem, precision_of(allow_tf32), nullptr);
}

void sum(const py::array& x, const py::array& y, const py::array& gamma,
         const std::optional<py::array>& coefficient, const std::vector<py::array>& left,
         const std::vector<py::array>& right, const py::array& v, bool allow_tf32, py::array out) {
  NumpyArguments memory;
  std::vector<Factor> factors;
  for (size_t i = 0; i < left.size(); ++i)
    factors.push_back({memory.input("left" + std::to_string(i), left[i]),
                       memory.input("right" + std::to_string(i), right[i]), left[i].shape(2)});
  const Sum problem{memory.input("x", x),
                    memory.input("y", y),
                    mixture_of(memory, gamma, coefficient),
                    factors.data(),
                    static_cast<int64_t>(factors.size()),
                    memory.input("v", v),
                    memory.output("out", out),
                    x.shape(0),
                    x.shape(1),
                    y.shape(1),
                    x.shape(2),
                    v.shape(2),
                    element_of(x)};
  cuda::sum(problem, precision_of(allow_tf32), scratch_of(memory, cuda::scratch_bytes(problem)),
            nullptr);
}

void energy(const py::array& z, const py::array& gamma, int64_t first, double within_first,
            double across, double within_rest, bool allow_tf32, py::array value,
            std::optional<py::array> gradient) {
  NumpyArguments memory;
  const Energy problem{memory.input("z", z),
                       mixture_of(memory, gamma, std::nullopt),
                       z.shape(0),
                       first,
                       z.shape(1),
                       z.shape(2),
                       within_first,
                       across,
                       within_rest,
                       memory.output<double>("value", value),
                       gradient ? memory.output("gradient", *gradient) : nullptr,
                       element_of(z)};
  cuda::energy(problem, precision_of(allow_tf32), scratch_of(memory, cuda::scratch_bytes(problem)),
               nullptr);
}

}  // namespace

HESSREG_EMULATOR_MODULE(m) {
  m.attr("max_factors") = cuda::kMaxFactors;
  m.def("matrix", &matrix);
  m.def("sum", &sum);
  m.def("energy", &energy);
}
