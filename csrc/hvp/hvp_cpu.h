#pragma once
#include "hvp.h"

namespace hessreg::hvp {

// A part of a problem that must be done before the next one starts: independent tasks.
struct Stage {
  int64_t tasks;
  int64_t work;  // operations of all tasks, about
};

// How one kind of problem is solved: stage after stage, in a workspace that all threads share,
// aligned to 64 bytes. What a task writes no other task of its stage reads or writes.
template <typename Problem>
struct Staged {
  int64_t (*workspace_bytes)(const Problem& problem);
  int64_t (*stages)(const Problem& problem);
  Stage (*stage)(const Problem& problem, int64_t index);
  void (*run)(const Problem& problem, void* workspace, int64_t stage, int64_t begin, int64_t end);
};

// The CPU kernels of one instruction set.
struct CpuKernels {
  Staged<Forward> forward;
  Staged<Backward> backward;
  Staged<Tangent> tangent;
  Staged<Adjoint> adjoint;
  Staged<SecondTangent> second_tangent;
  Staged<SecondAdjoint> second_adjoint;
  Staged<SymmetricProduct> symmetric_product;
};

namespace baseline {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}

}  // namespace hessreg::hvp
