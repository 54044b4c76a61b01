// The emulated kernels of csrc/spectral for NumPy; see tests/emulated.py.
#include <pybind11/stl.h>

#include <optional>

#include "numpy_arguments.hpp"
#include "spectral/spectral_cuda.h"

namespace {

namespace py = pybind11;
using hessreg::Element;
using hessreg::emulator::NumpyArguments;
using namespace hessreg::spectral;

Element element_of(const py::array& array) {
  return array.itemsize() == 4 ? Element::kFloat32 : Element::kFloat64;
}

// As aligned as memory of torch has to be.
struct alignas(16) Aligned {
  double values[2];
};

template <typename Problem>
void* scratch_of(NumpyArguments& memory, const Problem& problem) {
  return memory.scratch<Aligned>("scratch", static_cast<size_t>(cuda::scratch_bytes(problem)) / 16);
}

void power_iteration(const py::array& a, const py::array& v0, int64_t num_iterations,
                     py::array value, py::array vector, py::array residual) {
  NumpyArguments memory;
  const PowerIteration problem{memory.input("a", a),
                               memory.input("v0", v0),
                               memory.output("value", value),
                               memory.output("vector", vector),
                               memory.output("residual", residual),
                               a.shape(0),
                               a.shape(1),
                               num_iterations,
                               element_of(a)};
  cuda::power_iteration(problem, scratch_of(memory, problem), nullptr);
}

void lanczos(const py::array& a, const py::array& v0, py::array alpha, py::array beta,
             py::array q) {
  NumpyArguments memory;
  const Lanczos problem{memory.input("a", a),
                        memory.input("v0", v0),
                        memory.output("alpha", alpha),
                        memory.output("beta", beta),
                        memory.output("q", q),
                        a.shape(0),
                        a.shape(1),
                        alpha.shape(1),
                        element_of(a)};
  cuda::lanczos(problem, scratch_of(memory, problem), nullptr);
}

void tridiagonal_eigh(const py::array& alpha, const py::array& beta, py::array values,
                      py::array vectors) {
  NumpyArguments memory;
  const TridiagonalEigh problem{memory.input("alpha", alpha),
                                memory.input("beta", beta),
                                memory.output("values", values),
                                memory.output("vectors", vectors),
                                alpha.shape(0),
                                alpha.shape(1),
                                element_of(alpha)};
  cuda::tridiagonal_eigh(problem, scratch_of(memory, problem), nullptr);
}

void symmetric_eigh(const py::array& a, py::array values, std::optional<py::array> vectors) {
  NumpyArguments memory;
  const SymmetricEigh problem{memory.input("a", a),
                              memory.output("values", values),
                              vectors ? memory.output("vectors", *vectors) : nullptr,
                              a.shape(0),
                              a.shape(1),
                              element_of(a)};
  cuda::symmetric_eigh(problem, scratch_of(memory, problem), nullptr);
}

void lanczos_step(py::array basis, const py::array& w, int64_t count, const py::array& largest,
                  double breakdown, py::array result) {
  NumpyArguments memory;
  const LanczosStep step{memory.in_out("basis", basis),
                         memory.input("w", w),
                         memory.input<double>("largest", largest),
                         memory.output<double>("result", result),
                         count,
                         basis.shape(1),
                         breakdown,
                         element_of(basis)};
  cuda::lanczos_step(step, scratch_of(memory, step), nullptr);
}

}  // namespace

HESSREG_EMULATOR_MODULE(m) {
  m.attr("max_size") = cuda::kMaxSize;
  m.attr("max_step_rows") = cuda::kMaxStepRows;
  m.def("power_iteration", &power_iteration);
  m.def("lanczos", &lanczos);
  m.def("tridiagonal_eigh", &tridiagonal_eigh);
  m.def("symmetric_eigh", &symmetric_eigh);
  m.def("lanczos_step", &lanczos_step);
}
