// For the bindings of emulated kernels: NumPy arrays as the raw pointers that launchers take.
//
//   HESSREG_EMULATOR_MODULE(m) {
//     m.def("scale", [](py::array x, float factor, py::array out) {
//       NumpyArguments arguments;
//       hessreg::scale(arguments.input<float>("x", x), factor,
//                      arguments.output<float>("out", out), x.size(), nullptr);
//     });
//   }
//
// Arrays must be C-contiguous and of the very dtype: float16 is __half, uint16 is __nv_bfloat16.
// While `arguments` lives, the check build knows their memory by their names, and a kernel may
// touch no other.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_types.hpp"
#include "python_module.hpp"
#include "runtime.hpp"

namespace hessreg::emulator {

namespace py = pybind11;

template <typename T>
py::dtype dtype_of() {
  if constexpr (std::is_same_v<T, __half>) {
    return py::dtype("float16");
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return py::dtype("uint16");
  } else {
    return py::dtype::of<T>();
  }
}

class NumpyArguments {
 public:
  NumpyArguments() = default;
  NumpyArguments(const NumpyArguments&) = delete;
  NumpyArguments& operator=(const NumpyArguments&) = delete;
  ~NumpyArguments() {
    for (const void* address : registered_) unregister_memory(address);
  }

  // T = void takes an array of any dtype.
  template <typename T = void>
  const T* input(const std::string& name, const py::array& array) {
    require<T>(name, array);
    return static_cast<const T*>(add(name, array.data(), array.nbytes()));
  }

  // An array that the kernel reads and writes.
  template <typename T = void>
  T* in_out(const std::string& name, py::array& array) {
    require<T>(name, array);
    return static_cast<T*>(add(name, array.mutable_data(), array.nbytes()));
  }

  // An array that the kernel fills. It starts as NaN (integers: -1), to show what is left out.
  template <typename T = void>
  T* output(const std::string& name, py::array& array) {
    T* data = in_out<T>(name, array);
    poison(data, array.nbytes());
    return data;
  }

  // Temporary memory, NaN at the start.
  template <typename T>
  T* scratch(const std::string& name, size_t count) {
    const size_t bytes = count * sizeof(T);
    T* data = reinterpret_cast<T*>(scratch_.emplace_back(new std::byte[bytes]).get());
    poison(data, bytes);
    add(name, data, static_cast<py::ssize_t>(bytes));
    return data;
  }

 private:
  template <typename T>
  static void require(const std::string& name, const py::array& array) {
    if constexpr (!std::is_void_v<T>) {
      if (!array.dtype().equal(dtype_of<T>())) {
        throw py::type_error(name + ": expected dtype " + text(dtype_of<T>()) + ", got " +
                             text(array.dtype()));
      }
    }
    if (!(array.flags() & py::array::c_style)) {
      throw py::value_error(name + ": expected a C-contiguous array");
    }
  }

  static std::string text(const py::object& object) { return py::str(object); }

  static void poison(void* data, size_t bytes) {
    if (bytes > 0) std::memset(data, 0xff, bytes);
  }

  template <typename Pointer>
  Pointer add(const std::string& name, Pointer data, py::ssize_t bytes) {
    register_memory(data, static_cast<size_t>(bytes), name);
    registered_.push_back(data);
    return data;
  }

  std::vector<const void*> registered_;
  std::vector<std::unique_ptr<std::byte[]>> scratch_;
};

}  // namespace hessreg::emulator

// Defines the extension module; the build gives its name.
#define HESSREG_EMULATOR_MODULE(variable)                         \
  static void hessreg_define_module(pybind11::module_& variable); \
  PYBIND11_MODULE(HESSREG_EMU_MODULE, module) {                   \
    hessreg::emulator::bind_emulator(module);                     \
    hessreg_define_module(module);                                \
  }                                                               \
  static void hessreg_define_module(pybind11::module_& variable)
