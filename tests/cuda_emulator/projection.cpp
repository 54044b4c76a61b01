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
            const std::vector<std::vector<int64_t>>& positions, int64_t batch, int64_t segments,
            bool in_place = false) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      py::array array = tensors[i];
      const std::string name = "x" + std::to_string(i);
      const bool written = in_place && i < positions.size();
      data_.push_back(written ? memory.in_out(name, array) : memory.input(name, array));
    }
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
  cuda::gram(x.lists, partials, x.memory.output<double>("gram", out), nullptr, nullptr);
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

// In place: the outputs are the tensors of the first list.
void linear_combination_inplace(const std::vector<py::array>& tensors,
                                const std::vector<std::vector<int64_t>>& positions, int64_t batch,
                                int64_t segments, const py::array& weights) {
  Arguments x(tensors, positions, batch, segments, true);
  std::vector<void*> pointers;
  for (size_t t = 0; t < positions.size(); ++t)
    pointers.push_back(const_cast<void*>(x.lists.data[t]));
  cuda::linear_combination(x.lists, x.memory.input<double>("weights", weights), pointers.data(), 1,
                           nullptr);
}

// What the launches of gram leave for project and pcgrad.
void find_weights(Arguments& x, int64_t num_pieces, const Rule& rule, py::array& weights,
                  double* cosines) {
  const int64_t m = x.lists.num_lists, segments = x.lists.batch * x.lists.segments;
  double* partials = x.memory.scratch<double>("partials", num_pieces * num_pairs(m));
  double* gram = x.memory.scratch<double>("gram", segments * m * m);
  const Outcome outcome{rule, x.memory.scratch<double>("work", segments * work_size(m)),
                        x.memory.output<double>("combination weights", weights), cosines};
  cuda::gram(x.lists, partials, gram, &outcome, nullptr);
}

void project_weights_of(const std::vector<py::array>& tensors,
                        const std::vector<std::vector<int64_t>>& positions, int64_t batch,
                        int64_t segments, int64_t num_pieces, double eps, double strength,
                        bool conflict_only, bool rescale, py::array weights, py::array cosines) {
  Arguments x(tensors, positions, batch, segments);
  const Rule rule = projection_rule(eps, strength, conflict_only, rescale);
  find_weights(x, num_pieces, rule, weights, x.memory.output<double>("cosines", cosines));
}

void pcgrad_weights_of(const std::vector<py::array>& tensors,
                       const std::vector<std::vector<int64_t>>& positions, int64_t batch,
                       int64_t segments, int64_t num_pieces, const py::array& order,
                       int64_t reduction, py::array weights) {
  Arguments x(tensors, positions, batch, segments);
  const int64_t* numbers = x.memory.input<int64_t>("order", order);
  find_weights(x, num_pieces, pcgrad_rule(numbers, static_cast<Reduction>(reduction)), weights,
               nullptr);
}

}  // namespace

HESSREG_EMULATOR_MODULE(m) {
  m.attr("piece_length") = cuda::kPieceLength;
  m.def("gram", &gram);
  m.def("linear_combination", &linear_combination);
  m.def("linear_combination_inplace", &linear_combination_inplace);
  m.def("project_weights", &project_weights_of);
  m.def("pcgrad_weights", &pcgrad_weights_of);
}
