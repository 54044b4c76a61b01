// The emulated kernels of csrc/projection for NumPy; see tests/emulated.py.
#include <pybind11/stl.h>

#include "numpy_arguments.hpp"
#include "projection/projection_cuda.h"

namespace {

namespace py = pybind11;
using hessreg::Element;
using hessreg::emulator::NumpyArguments;
using namespace hessreg::projection;

Element element_of(const py::array& array) {
  if (array.dtype().kind() == 'u') return Element::kBFloat16;
  return array.itemsize() == 2   ? Element::kFloat16
         : array.itemsize() == 4 ? Element::kFloat32
                                 : Element::kFloat64;
}

// The lists as a launcher takes them. positions: [num_positions, 4], the members of Position.
class Arguments {
 public:
  Arguments(const std::vector<py::array>& tensors,
            const std::vector<std::vector<int64_t>>& positions, int64_t batch, int64_t segments) {
    for (size_t i = 0; i < tensors.size(); ++i)
      data_.push_back(memory.input("x" + std::to_string(i), tensors[i]));
    for (const auto& p : positions) positions_.push_back({p[0], p[1], p[2], p[3]});
    const auto count = static_cast<int64_t>(positions.size());
    lists = {data_.data(),
             positions_.data(),
             static_cast<int64_t>(tensors.size()) / count,
             count,
             batch,
             segments,
             cuda::kPieceLength,
             element_of(tensors[0])};
  }

  NumpyArguments memory;
  Lists lists{};

 private:
  std::vector<const void*> data_;
  std::vector<Position> positions_;
};

void gram(const std::vector<py::array>& tensors, const std::vector<std::vector<int64_t>>& positions,
          int64_t batch, int64_t segments, int64_t num_pieces, py::array out) {
  Arguments x(tensors, positions, batch, segments);
  double* partials =
      x.memory.scratch<double>("partials", num_pieces * num_pairs(x.lists.num_lists));
  cuda::gram(x.lists, partials, x.memory.output<double>("gram", out), nullptr, nullptr, nullptr);
}

void linear_combination(const std::vector<py::array>& tensors,
                        const std::vector<std::vector<int64_t>>& positions, int64_t batch,
                        int64_t segments, const py::array& weights, std::vector<py::array> out) {
  Arguments x(tensors, positions, batch, segments);
  std::vector<void*> pointers;
  for (size_t i = 0; i < out.size(); ++i)
    pointers.push_back(x.memory.output("y" + std::to_string(i), out[i]));
  cuda::linear_combination(x.lists, x.memory.input<double>("weights", weights), pointers.data(),
                           static_cast<int64_t>(out.size() / positions.size()), nullptr);
}

// The weights [segments, 2] that the launch of gram leaves for project.
void weights_of_projection(const std::vector<py::array>& tensors,
                           const std::vector<std::vector<int64_t>>& positions, int64_t batch,
                           int64_t segments, int64_t num_pieces, double strength, double tolerance,
                           bool conflict_only, py::array out) {
  Arguments x(tensors, positions, batch, segments);
  const Rule rule{strength, tolerance, conflict_only};
  double* partials = x.memory.scratch<double>("partials", num_pieces * num_pairs(2));
  double* gram = x.memory.scratch<double>("gram", batch * segments * 4);
  cuda::gram(x.lists, partials, gram, &rule, x.memory.output<double>("weights", out), nullptr);
}

}  // namespace

HESSREG_EMULATOR_MODULE(m) {
  m.attr("piece_length") = cuda::kPieceLength;
  m.def("gram", &gram);
  m.def("linear_combination", &linear_combination);
  m.def("projection_weights", &weights_of_projection);
}
