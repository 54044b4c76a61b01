#pragma once
// The CPU kernels are compiled once per instruction set, each copy in a namespace of its own, and
// chosen when the library is loaded. Kernel files instantiate nothing from the standard library:
// the linker could otherwise give a baseline caller the copy that needs AVX-512.
#include <cstdlib>
#include <cstring>

namespace hessreg {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa supported_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// HESSREG_ISA=baseline|avx2 lowers the choice, so that every copy can be tested on one machine.
inline Isa active_isa() {
  static const Isa isa = [] {
    const Isa best = supported_isa();
    const char* wish = std::getenv("HESSREG_ISA");
    if (wish && !std::strcmp(wish, "baseline")) return Isa::kBaseline;
    if (wish && !std::strcmp(wish, "avx2") && best != Isa::kBaseline) return Isa::kAvx2;
    return best;
  }();
  return isa;
}

}  // namespace hessreg
