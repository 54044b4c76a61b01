#pragma once

#include <pybind11/pybind11.h>

namespace hessreg::emulator {

// Adds the submodule `emulator`: configure, configuration, statistics, take_profile, checked.
void bind_emulator(pybind11::module_& module);

}  // namespace hessreg::emulator
