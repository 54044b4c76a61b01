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

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

// HESSREG_ISA lowers the choice, so that every copy can be tested on one machine. Null for a value
// that is no name of an instruction set, or more than the processor has.
inline const Isa* chosen_isa() {
  static Isa isa = supported_isa();
  const char* wish = std::getenv("HESSREG_ISA");
  if (!wish || !*wish) return &isa;
  for (int candidate = 0; candidate <= static_cast<int>(supported_isa()); ++candidate) {
    if (std::strcmp(wish, kIsaNames[candidate])) continue;
    isa = static_cast<Isa>(candidate);
    return &isa;
  }
  return nullptr;
}

// What runs from the first call on; importing the library has refused a wrong HESSREG_ISA.
inline Isa active_isa() {
  static const Isa isa = chosen_isa() ? *chosen_isa() : supported_isa();
  return isa;
}

}  // namespace hessreg
