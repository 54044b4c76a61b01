#include "semantics.h"

#include "numpy_arguments.hpp"

namespace {

using namespace hessreg::semantics;
using hessreg::emulator::NumpyArguments;
namespace py = pybind11;

int size(const py::array& array) { return static_cast<int>(array.size()); }

// out = function(x), element by element.
template <typename In, typename Out>
void define_map(py::module_& module, const char* name, void (*function)(const In*, Out*, int)) {
  module.def(name, [function](py::array x, py::array out) {
    NumpyArguments a;
    function(a.input<In>("x", x), a.output<Out>("out", out), size(x));
  });
}

// A kernel that only fills an array.
void define_fill(py::module_& module, const char* name, void (*function)(int*)) {
  module.def(name, [function](py::array out) {
    NumpyArguments a;
    function(a.in_out<int>("out", out));
  });
}

void bind_collectives(py::module_& module) {
  define_fill(module, "shuffles", &shuffles);
  define_fill(module, "partial_warps", &partial_warps);
  define_fill(module, "votes_of_rest", &votes_of_rest);
  define_fill(module, "votes_of_block", &votes_of_block);
  define_fill(module, "atomics", &atomics);
  module.def("wide_shuffle", [](py::array x, py::array out) {
    NumpyArguments a;
    wide_shuffle(a.input<double>("x", x), a.output<double>("out", out));
  });
  module.def("reductions", [](py::array x, py::array out) {
    NumpyArguments a;
    reductions(a.input<int>("x", x), a.output<int>("out", out));
  });
  module.def("mma_tf32", [](py::array a, py::array b, py::array c, bool rounded) {
    NumpyArguments arguments;
    mma_tf32(arguments.input<float>("a", a), arguments.input<float>("b", b),
             arguments.output<float>("c", c), rounded);
  });
  module.def("mma_bf16", [](py::array a, py::array b, py::array c) {
    NumpyArguments arguments;
    mma_bf16(arguments.input<uint16_t>("a", a), arguments.input<uint16_t>("b", b),
             arguments.output<float>("c", c));
  });
}

void bind_maps(py::module_& module) {
  define_map(module, "round_to_tf32", &round_to_tf32);
  define_map(module, "power_of_two", &power_of_two);
  define_map(module, "float_to_half", &float_to_half);
  define_map(module, "half_to_float", &half_to_float);
  define_map(module, "float_to_bfloat16", &float_to_bfloat16);
  define_map(module, "bfloat16_to_float", &bfloat16_to_float);
}

void bind_launches(py::module_& module) {
  module.def("thread_order", [](py::array next, py::array out, int blocks, int threads) {
    NumpyArguments a;
    thread_order(a.in_out<int>("next", next), a.output<int>("out", out), blocks, threads);
  });
  module.def("initial_shared_memory", [](py::array out) {
    NumpyArguments a;
    initial_shared_memory(a.output<float>("out", out));
  });
  module.def("transpose", [](py::array x, py::array out) {
    NumpyArguments a;
    transpose(a.input<float>("x", x), a.output<float>("out", out));
  });
  module.def("transpose_wide", [](py::array x, py::array out) {
    NumpyArguments a;
    transpose_wide(a.input<double>("x", x), a.output<double>("out", out));
  });
  module.def("most_shared_memory", &most_shared_memory);
  module.def("load_vectors", [](py::array out, int stride) {
    NumpyArguments a;
    load_vectors(a.output<float>("out", out), stride);
  });
  module.def("parameter_addresses", [](py::array out) {
    NumpyArguments a;
    parameter_addresses(a.output<uint64_t>("out", out), size(out));
  });
  module.def("launch", &launch);
}

void bind_memory_errors(py::module_& module) {
  module.def("write_local", [](py::array x, int index) {
    NumpyArguments a;
    write_local(a.in_out<int>("x", x), index);
  });
  module.def("calculate_with_integers", [](py::array x, int value) {
    NumpyArguments a;
    calculate_with_integers(a.output<int>("x", x), value);
  });
  module.def("read_unregistered", [](py::array x, py::array out) {
    NumpyArguments a;
    read_unregistered(static_cast<const float*>(x.data()), a.output<float>("out", out));
  });
  module.def("race_on_half_word", [](py::array x, bool write_last) {
    NumpyArguments a;
    race_on_half_word(a.in_out<uint16_t>("x", x), write_last);
  });
  module.def("race_with_first_warp", [](py::array x) {
    NumpyArguments a;
    race_with_first_warp(a.in_out<int>("x", x));
  });
  module.def("write_shared", [](py::array out, int index) {
    NumpyArguments a;
    write_shared(a.output<float>("out", out), index);
  });
  module.def("read_constant", [](py::array out, int index) {
    NumpyArguments a;
    read_constant(a.output<float>("out", out), index);
  });
}

void bind_errors(py::module_& module) {
  module.def("diverge_at_barriers", &diverge_at_barriers);
  module.def("deadlock", &deadlock);
  module.def("call_outside_mask", &call_outside_mask);
  module.def("use_too_much_shared_memory", &use_too_much_shared_memory);
  module.def("use_dynamic_shared_memory_of_none", &use_dynamic_shared_memory_of_none);
  module.def("sync_grid_without_cooperative_launch", &sync_grid_without_cooperative_launch);
}

}  // namespace

HESSREG_EMULATOR_MODULE(module) {
  bind_collectives(module);
  bind_maps(module);
  bind_launches(module);
  bind_memory_errors(module);
  bind_errors(module);
}
